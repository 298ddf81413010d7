"""Tests of micro_queue: standard library only, no sleeping on clocks. Run: python3 -m unittest"""
import concurrent.futures
import contextlib
import copy
import dataclasses
import errno
import functools
import gc
import hashlib
import http.client
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unittest
import unittest.mock
from typing import Dict, List, NamedTuple

import micro_queue as mq

# ---- The kit ------------------------------------------------------------------------------
# What the tests and the harnesses in .ci share: a clock, a disk, a ledger, a connection, a
# server process; one of each. What is asked of the insides of the server stands here too.

HERE = os.path.dirname(os.path.abspath(__file__))
SERVER = os.path.join(HERE, "micro_queue.py")
QUEUE = "fetcher"                            # of config.example.json, as these tokens
POST = "aa9d7b0a-8bee-47e4-887c-bdb799533793"
GET = "bb9d7b0a-8bee-47e4-887c-bdb799533773"
OTHER = "cc9d7b0a-8bee-47e4-887c-bdb799533773"
ADMIN = "de9d7b0a-8bee-47e4-887c-bdb799533733"
SEED = int(os.environ.get("SEED", "1"))      # of everything that is random here
TORTURE = bool(os.environ.get("TORTURE"))    # many more of it, for hours
ANSWER_S = float(os.environ.get("ANSWER_S", "10"))       # how long a test waits for anything
START_S, END_S = 60, 60                      # how long for a server process to start, to end
LATE_S = 10                                  # an answer that takes longer is a harness's fault
SHORT = "short"                              # in place of an errno: only half is written


class Fault(Exception):
    """The server did what it must not do; one line a finding."""


def eventually(condition, seconds=ANSWER_S, what="did not happen", pause_s=0.002):
    """Wait until a condition holds; return what it gave. Raises Fault."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise Fault(f"{what} within {seconds:g} s")
        time.sleep(pause_s)


def together(*works):
    """Call all at once, each in a thread of its own; return what each gave, or raise what one
    of them raised."""
    with concurrent.futures.ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(work) for work in works]]


def example_config(**settings):
    """Return config.example.json, as JSON, with other settings."""
    with open(os.path.join(HERE, "config.example.json"), encoding="utf-8") as file:
        config = json.load(file)
    config["settings"].update(settings)
    return config


class FakeClock(mq.Clock):
    """Time passes when a test says so: `passed` ms since the start, which was at `wall`."""

    def __init__(self):
        self.wall, self.passed = 1_700_000_000_000, 0

    def wall_ms(self):
        return self.wall + self.passed

    def monotonic_ms(self):
        return self.passed


class FakeStorage(mq.Storage):
    """Storage that notes the name of each call in `calls`, and fails as it is told.

    `before` has, by a call's name, what gets the call's arguments before it is made, and may
    raise in its place. With `quick`, syncs do nothing: for what no power cut follows."""

    def __init__(self, quick=False):
        self.calls, self.before = [], {}
        self._quick, self._failing = quick, {}           # name: [calls until then, how]
        for name, call in vars(mq.Storage).items():
            if isinstance(call, staticmethod):
                setattr(self, name, functools.partial(self._call, name))

    def fail(self, name, how, at=1):
        """Have the `at`-th call of a name from now on, and all behind it, fail with an errno;
        a `pwrite` with SHORT writes half."""
        self._failing[name] = [at, how]

    def heal(self):
        self._failing.clear()

    def _call(self, name, *arguments):
        self.calls.append(name)
        self.before.get(name, lambda *_: None)(*arguments)
        failing = self._failing.get(name, [math.inf, None])
        failing[0] -= 1
        if failing[0] <= 0 and failing[1] == SHORT:
            fd, data, offset = arguments
            return os.pwrite(fd, data[:len(data) // 2], offset)
        if failing[0] <= 0:
            raise OSError(failing[1], os.strerror(failing[1]))
        if self._quick and name in ("fdatasync", "fsync"):
            return None
        return getattr(mq.Storage, name)(*arguments)


class Ledger:
    """What was sent, answered, delivered and settled, through any number of faults.

    The yardstick of every harness: `faults` names each message that was lost, made up, altered,
    delivered out of order, or delivered again without a reason, and each answer that took
    longer than `limit_s`. Times are counts of events. A consumer is whoever has one delivery at
    a time: a connection, or a thread. Thread-safe."""

    def __init__(self, limit_s=None):
        self._lock = threading.RLock()
        self._now = 0
        self._sent, self._answered, self._refused = {}, {}, set()
        self._dropped, self._delayed = set(), set()
        self._payload_of = {}                # id: payload
        self._highest = 0                    # id that anyone was told
        self._highest_when_sent = {}
        self._out = {}                       # payload: [consumer, settled at or None]
        self._open = {}                      # consumer: payloads of its last delivery
        self._since_fault = set()            # payloads that were delivered since
        self._last_id = {}                   # consumer: the last first delivery since the fault
        self._synced = 0                     # what was settled before is durable
        self._found = []
        self._limit_s = limit_s
        self._latest = 0.0, "nothing"        # the slowest answer, and to what

    def _event(self):
        self._now += 1
        return self._now

    # -- producers

    def sending(self, payload, delayed=False):
        """A put is about to begin; every payload is sent once. A delayed one keeps no order."""
        with self._lock:
            if delayed:
                self._delayed.add(payload)
            self._sent[payload] = self._event()
            self._highest_when_sent[payload] = self._highest

    def accepted(self, payload, message_id, durable=True):
        """The put was answered 200; if `durable`, all that was settled before it is too."""
        with self._lock:
            self._answered[payload] = message_id
            self._name(message_id, payload)
            if message_id <= self._highest_when_sent[payload]:
                self.note(f"id {message_id} of {payload[:40]!r} was told before its put")
            if durable:
                self._synced = max(self._synced, self._sent[payload])

    def refused(self, payload):
        """The put was answered with an error: nothing may come of it."""
        with self._lock:
            self._refused.add(payload)

    def _name(self, message_id, payload):
        if self._payload_of.setdefault(message_id, payload) != payload:
            self.note(f"id {message_id} was used for {payload[:40]!r} and for "
                      f"{self._payload_of[message_id][:40]!r}")
        self._highest = max(self._highest, message_id)

    # -- consumers

    def delivered(self, consumer, payload, message_id, count=1):
        with self._lock:
            if payload not in self._sent:
                self.note(f"made up or altered: {message_id} {payload[:40]!r}")
            elif payload in self._refused:
                self.note(f"refused, yet delivered: {message_id} {payload[:40]!r}")
            self._name(message_id, payload)
            before = self._out.get(payload)
            if before and (before[1] is not None or (count == 1 and before[0] is not None)):
                self.note(f"duplicated: {message_id} {payload[:40]!r}")
            if before is None and count == 1 and payload not in self._delayed:
                if message_id < self._last_id.get(consumer, 0):
                    self.note(f"out of order: {message_id} after "
                              f"{self._last_id[consumer]} at {consumer}")
                self._last_id[consumer] = message_id
            self._out[payload] = [consumer, None]
            self._since_fault.add(payload)
            self._open.setdefault(consumer, []).append(payload)

    def settled(self, consumer):
        """What the consumer was delivered is known to be settled."""
        with self._lock:
            now = self._event()
            for payload in self._open.pop(consumer, ()):
                self._out[payload][1] = now

    def returned(self, consumer):
        """What the consumer was delivered is known to be back: lost if it is not seen again."""
        with self._lock:
            for payload in self._open.pop(consumer, ()):
                if self._out.get(payload, (None,))[0] == consumer:   # no other has it by now
                    del self._out[payload]

    def dropping(self):
        """All that was answered so far is about to be dropped: it may come, or not."""
        with self._lock:
            self._dropped.update(self._answered)
            self._answered.clear()

    def dropped(self):
        """What was to be dropped is, and durably: it must not come any more."""
        with self._lock:
            self._refused |= self._dropped

    def moved(self, payloads):
        """These were found among the dead letters: a crash may repeat them there, no more."""
        with self._lock:
            self._found += [f"made up dead letter: {payload[:40]!r}" for payload in payloads
                            if payload not in self._sent or payload in self._refused]
            self._out.update({payload: [None, None] for payload in payloads})

    def synced(self):
        """All that was settled so far is durable."""
        with self._lock:
            self._synced = self._event()

    # -- time

    @contextlib.contextmanager
    def timing(self, what, wait_s=0):
        """Take the time of what stands below it, unless that raises; `wait_s` of it were asked
        for, by a long poll."""
        started = time.monotonic()
        yield
        self.answered_in(what, time.monotonic() - started - wait_s)

    def answered_in(self, what, seconds):
        with self._lock:
            self._latest = max(self._latest, (seconds, what))
            if self._limit_s is not None and seconds > self._limit_s:
                self.note(f"late: {what} was answered in {seconds:.3f} s, not {self._limit_s:g} s")

    # -- faults

    def fault(self, power_cut=False):
        """The server ended; after a power cut, settlements that were not synced may be gone."""
        with self._lock:
            self._open.clear()
            self._last_id.clear()
            while self._since_fault:
                out = self._out.get(self._since_fault.pop())
                if out and (out[1] is None or (power_cut and out[1] >= self._synced)):
                    out[:] = [None, None]

    def note(self, fault):
        """Enter a fault that was seen elsewhere, as one line."""
        with self._lock:
            self._found.append(fault)

    def faults(self, drained=True):
        """Return what went wrong, as lines; `drained` if every message was taken since."""
        with self._lock:
            lost = [f"lost: {message_id} {payload[:40]!r}"
                    for payload, message_id in self._answered.items()
                    if drained and payload not in self._out]
            return self._found + lost

    @property
    def answered_count(self):
        """How many puts were answered 200 and not dropped since."""
        return len(self._answered)

    @property
    def latest_s(self):
        """How long the slowest answer took."""
        return self._latest[0]

    def __str__(self):
        return (f"{len(self._sent)} sent, {len(self._answered)} answered, "
                f"{len(self._out)} delivered; the slowest answer took {self._latest[0]:.3f} s, "
                f"to {self._latest[1]}")


def count_faults(found):
    """Return how many of a ledger's lines tell of a loss, of anything else, of a repetition."""
    lost, twice = (sum(line.startswith(kind) for line in found) for kind in ("lost", "duplicated"))
    return f"lost {lost}, unexpected {len(found) - lost - twice}, duplicated {twice}"


# -- HTTP

class Answer(NamedTuple):
    """What the server answered."""

    status: int
    headers: Dict[str, str]
    body: bytes

    @property
    def id(self):
        return int(self.headers.get("Message-Id", 0))

    @property
    def count(self):
        return int(self.headers.get("Delivery-Count", 0))


def request(method, path, body=b"", token=ADMIN, headers=(), version="1.1"):
    """Return the bytes of a request; `headers` are whole lines."""
    lines = [f"{method} {path} HTTP/{version}", "Host: x", *headers]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


class Wire:
    """A raw connection: sends bytes, reads answers. Reading raises OSError once it is broken,
    socket.timeout when nothing comes. `socket` is for what only sockets can do."""

    def __init__(self, port, timeout=ANSWER_S, host="127.0.0.1"):
        self._address, self._timeout = (host, port), timeout
        self._connect()

    def _connect(self):
        self.socket = socket.create_connection(self._address, self._timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._data, self._closing = b"", False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def fileno(self):
        return self.socket.fileno()

    # -- sending

    def send(self, data, one_by_one=False, pause_s=0):
        """Send bytes whole, or one by one with a pause behind each. What fails, the answer
        tells: the server may answer and close before the end."""
        with contextlib.suppress(OSError):
            for piece in ([data[at:at + 1] for at in range(len(data))] if one_by_one else [data]):
                self.socket.sendall(piece)
                if pause_s:
                    time.sleep(pause_s)
        return self

    def shut(self):
        """Send no more, but go on reading."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self):
        """Close as a process that crashes, so that the server gets an error."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self):
        self.socket.close()

    # -- reading

    def answer(self, head_only=False):
        """Return the next Answer; None at the end of the stream."""
        while b"\r\n\r\n" not in self._data:
            if not self._receive():
                return None
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        length = 0 if head_only else int(headers.get("Content-Length", 0))
        while len(self._data) < length:
            if not self._receive():
                raise ConnectionResetError("the answer is cut short")
        body, self._data = self._data[:length], self._data[length:]
        self._closing = headers.get("Connection") == "close"
        return Answer(int(first.split()[1]), headers, body)

    def _receive(self):
        more = self.socket.recv(1 << 18)
        self._data += more
        return bool(more)

    def is_silent(self, seconds=0):
        """Tell whether nothing came that was not read, and nothing comes for so long."""
        return not self._data and not select.select([self.socket], [], [], seconds)[0]

    def at_end(self):
        """Tell whether the server closed."""
        try:
            return not self._data and self.socket.recv(1) == b""
        except ConnectionResetError:
            return False

    # -- both

    def ask(self, method, path, body=b"", token=ADMIN, headers=()):
        """Send a request and return its answer, on a new connection if the last answer closed
        this one. Raises OSError if there is none."""
        if self._closing:
            self.close()
            self._connect()
        answer = self.send(request(method, path, body, token, headers)).answer(method == "HEAD")
        if answer is None:
            raise ConnectionResetError("the server closed")
        return answer

    def put(self, body, query="", queue=QUEUE):
        return self.ask("POST", f"/in/{queue}{query}", body)

    def take(self, query="", queue=QUEUE):
        return self.ask("GET", f"/out/{queue}{query}")


class PairWire(Wire):
    """A wire of which the test has both ends: no listener accepts `other`."""

    def __init__(self):
        super().__init__(0)

    def _connect(self):
        self.socket, self.other = socket.socketpair()
        self.socket.settimeout(self._timeout)
        self.other.setblocking(False)
        self._data, self._closing = b"", False


def ask(port, method, path, body=b"", token=ADMIN, headers=(), timeout=ANSWER_S):
    """Make one request on a connection of its own; return the Answer."""
    with Wire(port, timeout) as wire:
        return wire.ask(method, path, body, token, headers)


class Client:
    """Puts and takes on a wire; the ledger is told all of it. One that goes on after a broken
    connection gets a new wire. `key` makes of a message what the ledger is to call it."""

    def __init__(self, wire, ledger, name="drain", key=bytes, durable=True):
        self.wire, self.ledger, self.name = wire, ledger, name
        self._key, self._durable = key, durable

    def put(self, payload, query=""):
        """Put a message; without an answer it is unknown what came of it. Unless `durable` is
        false, what was settled before a put that is answered is on disk with it."""
        key = self._key(payload)
        self.ledger.sending(key)
        with self.ledger.timing("a put"):
            answer = self.wire.put(payload, query)
        if answer.status == 200:
            self.ledger.accepted(key, answer.id, self._durable)
        else:
            self.ledger.refused(key)
        return answer

    def take(self):
        """Take a message; that this is answered says that the one before is settled."""
        with self.ledger.timing("a take"):
            answer = self.wire.take()
        self.ledger.settled(self.name)
        return self._delivered(answer)

    def lease(self, seconds, wait_s=0):
        """Take a message with a lease, waiting for one."""
        with self.ledger.timing("a long poll", wait_s):
            return self._delivered(self.wire.take(f"?lease={seconds}&wait={wait_s}"))

    def _delivered(self, answer):
        if answer.status == 200:
            self.ledger.delivered(self.name, self._key(answer.body), answer.id, answer.count)
        return answer

    def end(self, action, lease):
        """Ack or nack a lease. What is not answered 200 is back, at the latest after a start."""
        with self.ledger.timing(f"a {action}"):
            answer = self.wire.ask("POST", f"/{action}/{QUEUE}?lease={lease}")
        acked = answer.status == 200 and action == "ack"
        (self.ledger.settled if acked else self.ledger.returned)(self.name)
        return answer

    def drain(self, count=sys.maxsize):
        """Take all there is, or `count` messages."""
        while count and self.take().status == 200:
            count -= 1


# -- processes

class ServerProcess:
    """A server in a process of its own, on a free port; serving, once `wait_ready` says so.

    `folder` gets its config and what it writes to stderr; `path` is the data folder. `settings`
    stand above those of the example, `change` may alter the whole config. What runs is
    `[*wrapper, python, *program, "-c", config]`: a wrapper must become the server, as `ip netns
    exec` and `strace -D` do. `limits` has resource.RLIMIT_*; other options are Popen's."""

    _running: List["ServerProcess"] = []

    def __init__(self, folder, path="", *, settings=None, change=lambda config: None,
                 program=(SERVER,), python=sys.executable, wrapper=(), host="127.0.0.1",
                 limits=None, **options):
        os.makedirs(folder, exist_ok=True)
        self.path, self.host = path or os.path.join(folder, "data"), host
        self.config = os.path.join(folder, "config.json")
        config = example_config(**{"path": self.path, "listen_port": free_port(),
                                   **(settings or {})})
        change(config)
        self.port = config["settings"]["listen_port"]
        with open(self.config, "w", encoding="utf-8") as file:
            json.dump(config, file)
        if limits:
            options["preexec_fn"] = lambda: [resource.setrlimit(kind, (limit, limit))
                                             for kind, limit in limits.items()]
        self._log = os.path.join(folder, "stderr.txt")   # of all servers, for who looks later
        with open(self._log, "ab") as file:              # a pipe that nobody reads would fill up
            self._log_start = file.tell()
            self.process = subprocess.Popen([*wrapper, python, *program, "-c", self.config],
                                            stdout=file, stderr=file, **options)
        self._running.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    @property
    def pid(self):
        return self.process.pid

    def wait_ready(self, seconds=START_S):
        """Wait until it serves. Raises Fault if it ends or takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if self.ask("GET", "/readyz").status == 200:
                    return self
            time.sleep(0.002)
        raise Fault(f"the server did not start (status {self.process.poll()}): "
                    f"{self.stderr()[-2000:]}")

    # -- talking

    def wire(self, timeout=ANSWER_S):
        return Wire(self.port, timeout, self.host)

    def ask(self, method, path, body=b"", token=ADMIN, headers=(), timeout=ANSWER_S):
        """Make one request on a connection of its own; return the Answer."""
        with self.wire(timeout) as wire:
            return wire.ask(method, path, body, token, headers)

    def stderr(self):
        """Return what it wrote so far."""
        with open(self._log, "rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def check_log(self):
        """Raise Fault if there is a traceback in what it wrote."""
        if "Traceback" in self.stderr():
            raise Fault(f"a traceback: {self.stderr()[-3000:]}")

    # -- ending

    def wait_end(self, seconds=END_S):
        """Return the exit status, None if it did not end in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode

    def stop(self, number=signal.SIGTERM, seconds=END_S):
        """Send a signal, unless it ended already, and return the exit status. Raises Fault if
        it does not end."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        if self.wait_end(seconds) is None:
            raise Fault(f"the server did not end within {seconds} s after signal {number}")
        if self in self._running:
            self._running.remove(self)
        return self.process.returncode

    def kill(self):
        """Kill -9 it, if it still runs; return the exit status."""
        return self.stop(signal.SIGKILL)

    @classmethod
    def kill_all(cls):
        """Kill every server that was started here and still runs."""
        for server in list(cls._running):
            server.kill()

    # -- what the system tells

    def resident_bytes(self):
        with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def thread_count(self):
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def cpu_seconds(self):
        """Return what it used of a core, from its threads' schedstat where there is one: a tick
        of 10 ms in 10 s is already the 0.1 % that an idle server may take."""
        try:
            total = 0
            for task in os.listdir(f"/proc/{self.pid}/task"):
                with open(f"/proc/{self.pid}/task/{task}/schedstat", encoding="ascii") as file:
                    total += int(file.read().split()[0])
            return total / 1e9
        except OSError:
            with open(f"/proc/{self.pid}/stat", encoding="ascii") as file:
                fields = file.read().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- queues

def drain(queue, subscriber="", settle=True, ledger=None, consumer="drain"):
    """Take, and settle, until a queue has no more for a subscriber; return the messages. A
    ledger is told of each."""
    found = []
    for delivery in iter(lambda: queue.take(subscriber), None):
        found += delivery.messages
        for message in delivery.messages if ledger else ():
            ledger.delivered(consumer, message.payload, message.id, message.delivery)
        if settle:
            queue.settle(delivery)
            if ledger:
                ledger.settled(consumer)
    return found


def payloads(queue, subscriber="", settle=True):
    """Empty a queue; return what was in it."""
    return [message.payload for message in drain(queue, subscriber, settle)]


def flipped(data, at, bits=0xFF):
    """Return bytes of which one is damaged."""
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1:]


def counts(queue, subscriber=""):
    """Return how many messages are ready, leased and delayed."""
    numbers = queue.numbers()["subscribers"][subscriber]
    return numbers["ready"], numbers["leased"], numbers["delayed"]


# -- insides: whatever else the tests and harnesses know of how the server does it

def counts_now(queue, subscriber=""):
    """As `numbers` of a subscriber, without letting time do its work first."""
    return queue._numbers_locked(subscriber)


def waiting_consumers(*queues):
    """Return how many long polls wait."""
    return sum(len(consumers.waiters) for queue in queues
               for consumers in queue._consumers.values())


def pass_time(queue, seconds):
    """Let time pass on a queue's FakeClock, as the timers would notice it."""
    queue._clock.passed += int(seconds * 1000)
    queue.tick()


def move_dead_letters(broker, queue):
    """Move the dead letters of a queue now, as upkeep does each second."""
    broker._move_dead_letters(queue)


def dying(queue):
    """Return the (subscriber, id) of what is to be dead-lettered."""
    return set(queue._dead)


def append_unsynced(queue):
    """Append a message for which somebody waits, but nobody syncs."""
    with queue._turn:
        queue._append_locked([mq.Put([b"x"])])
    queue.log.when_durable(queue.log.appends, lambda _: None)


def unused_bytes(handler):
    """Return how much a connection received and did not use yet."""
    return len(handler._data) - handler._at


def read_ahead_count(queue, subscriber=""):
    """Return how many messages a subscription holds in memory because it read ahead."""
    return len(queue.state.subscriptions[subscriber]._ahead)


# ---- A folder and its queues --------------------------------------------------------------

def setUpModule():
    logging.disable(logging.CRITICAL)


def tearDownModule():
    logging.disable(logging.NOTSET)


class Folder(unittest.TestCase):
    """A temporary folder, and queues in it."""

    def setUp(self):
        self.base = tempfile.mkdtemp(prefix="mq-test-")
        self.addCleanup(shutil.rmtree, self.base, ignore_errors=True)
        self.queues = []
        self.addCleanup(self.drop)

    def folder(self, name="q"):
        return os.path.join(self.base, name)

    def log_path(self, name="q"):
        return os.path.join(self.base, name, "data.log")

    def open(self, name="q", **options):
        config = options.pop("config", mq.QueueConfig(name="q"))
        queue = mq.Queue(config, self.folder(name), **{"fsync": "no", **options})
        queue.log.lock()
        self.queues.append(queue)
        queue.recover()
        return queue

    def drop(self):
        """Let go of every queue as a kill would: nothing more is written."""
        for queue in self.queues:
            queue.log.close()
        self.queues.clear()

    def stop_cleanly(self):
        """Close every queue as a clean stop does."""
        for queue in self.queues:
            queue.close()
        self.queues.clear()

    def crash(self, **options):
        self.drop()
        return self.open(**options)

    def filled(self, *payloads, **options):
        queue = self.open(**options)
        for payload in payloads:
            queue.put([payload])
        return queue

    def read_log(self, name="q"):
        with open(self.log_path(name), "rb") as file:
            return file.read()

    def write_log(self, data, name="q"):
        os.makedirs(self.folder(name), exist_ok=True)
        with open(self.log_path(name), "wb") as file:
            file.write(data)

    def overwrite(self, old, new):
        """Damage a log where some bytes stand, under the queue that has it open."""
        at = self.read_log().index(old)
        with open(self.log_path(), "r+b") as file:
            file.seek(at)
            file.write(new)

    def forget_bookmark(self, name="q"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.folder(name), "meta.json"))

    def put_meta(self, value, name="q"):
        os.makedirs(self.folder(name), exist_ok=True)
        with open(os.path.join(self.folder(name), "meta.json"), "w") as file:
            file.write(value if isinstance(value, str) else json.dumps(value))


# ---- Config -------------------------------------------------------------------------------

class ConfigTest(unittest.TestCase):
    def setUp(self):
        with open(os.path.join(HERE, "config.example.json"), "rb") as file:
            self.text = file.read()

    def parse(self, text):
        with tempfile.NamedTemporaryFile() as file:
            file.write(text if isinstance(text, bytes) else json.dumps(text).encode())
            file.flush()
            return mq.load_config(file.name)

    def changed(self, change):
        value = json.loads(self.text)
        change(value)
        return value

    def refused(self, value, *words):
        with self.assertRaises(mq.ConfigError) as caught:
            self.parse(value)
        for word in words:
            self.assertIn(word, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))

    def test_the_example_is_valid_and_defaults_are_the_contract(self):
        config = self.parse(self.text)
        self.assertEqual([q.name for q in config.queues], ["fetcher", "manager-reload"])
        self.assertEqual(config.settings.fsync, "always")
        self.assertEqual(config.settings.max_message_bytes, 16777216)
        self.assertEqual(mq.Settings().path, "/tmp/micro_queue")

    def test_yaml_is_refused_with_the_way_to_convert_it(self):
        self.refused(b"---\nsettings:\n  path: /tmp\n", "not JSON", "yq")

    def test_what_is_wrong_is_named_by_its_path(self):
        cases = [
            (lambda c: c["settings"].update(listen_port="10000"), "settings.listen_port"),
            (lambda c: c["settings"].update(listen_port=True), "settings.listen_port"),
            (lambda c: c["settings"].update(color=1), "settings.color"),
            (lambda c: c["settings"].update(fsync="never"), "settings.fsync"),
            (lambda c: c.update(settings=None), "settings"),
            (lambda c: c.update(extra=1), "config.extra"),
            (lambda c: c.update(queues=[]), "queues"),
            (lambda c: c.update(tokens=[]), "tokens"),
            (lambda c: c["queues"][0].update(name="no/slash"), "queues[0].name"),
            (lambda c: c["queues"][0].pop("name"), "queues[0].name"),
            (lambda c: c["queues"].append({"name": "fetcher"}), "queues[2].name"),
            (lambda c: c["queues"][0].update(ttl=0), "queues[0].ttl"),
            (lambda c: c["queues"][1].update(dead_letter="x"), "queues[1].dead_letter", "named"),
            (lambda c: c["queues"][0].update(dead_letter="fetcher"), "queues[0].dead", "circle"),
            (lambda c: c["queues"][0].update(kind="topic"), "queues[0].kind"),
            (lambda c: (c["queues"][0].update(kind="broadcast"), c["tokens"].pop(1)),
             "queues[0].kind", "subscriber"),
            (lambda c: c["settings"].update(standby=True), "settings.standby"),
            (lambda c: c["tokens"][1].update(get=["nope"]), "tokens[1].get[0]"),
            (lambda c: c["tokens"][1].update(get="fetcher"), "tokens[1].get"),
            (lambda c: c["tokens"][1].update(token="short"), "tokens[1].token"),
            (lambda c: c["tokens"][1].update(token="with blank " * 3), "tokens[1].token"),
            (lambda c: c["tokens"][1].pop("token"), "tokens[1]"),
            (lambda c: c["tokens"][1].update(token_sha256="0" * 64), "tokens[1]"),
            (lambda c: c["tokens"][1].update(token=POST), "tokens[1].token"),
            (lambda c: c["tokens"][1].update(name="server01"), "tokens[1].name"),
        ]
        for change, *words in cases:
            with self.subTest(words=words):
                self.refused(self.changed(change), *words)

    def test_files_that_are_no_config_are_refused(self):
        for text in (b"", b"[]", b"1", b"\xff\xfe", b"[" * 100000, b'{"settings": 1'):
            with self.subTest(text=text[:20]):
                self.refused(text)

    def test_a_key_that_stands_twice_is_refused(self):
        self.refused(b'{"settings": {"path": "/a", "path": "/b"}}', "settings.path", "twice")

    def test_a_hashed_token_opens_the_same_door(self):
        digest = mq.Token(name="a", token=POST).digest
        self.assertEqual(mq.Token(name="a", token_sha256=digest.hex()).digest, digest)

    def test_no_config_keeps_a_token(self):
        config = self.parse(self.text)
        for token in (POST, GET, OTHER, ADMIN):
            self.assertNotIn(token, repr(config))
            self.assertIn(hashlib.sha256(token.encode()).digest(),
                          [kept.digest for kept in config.tokens])


# ---- Records ------------------------------------------------------------------------------

class RecordTest(unittest.TestCase):
    def test_a_record_is_one_only_in_its_log_and_at_its_offset(self):
        codec, other = mq.Codec.new(1), mq.Codec.new(1)
        record = mq.Record(mq.MESSAGE, 7, 1234, b"payload", 3, 500)
        data = codec.encode([record], 44)[0]
        self.assertEqual(codec.size_of(data), len(data))
        self.assertEqual(list(codec.records(data, 0, 44)), [(44, 44 + len(data), record)])
        self.assertEqual(list(codec.records(data, 0, 45)), [])
        self.assertEqual(other.size_of(data), 0)
        twin = mq.Codec(other.log_id, codec.marker, 1)
        self.assertEqual(list(twin.records(data, 0, 44)), [])

    def test_every_flipped_bit_is_seen(self):
        codec = mq.Codec.new(1)
        data = codec.encode([mq.Record(mq.MESSAGE, 7, 1234, b"payload")], 44)[0]
        for bit in range(len(data) * 8):
            bad = flipped(data, bit // 8, 1 << bit % 8)
            self.assertEqual(list(codec.records(bad, 0, 44)), [], bit)

    def test_a_header_is_read_back_and_guarded(self):
        header = mq.Codec.new(99).header()
        self.assertEqual(mq.Codec.of_header(header).next_id, 99)
        for at in range(len(header)):
            self.assertIsNone(mq.Codec.of_header(flipped(header, at)))


# ---- Log ----------------------------------------------------------------------------------

class RecoveryTest(Folder):
    def test_order_ids_and_settlements_survive_a_kill(self):
        queue = self.filled(b"a", b"b", b"c")
        queue.settle(queue.take())
        queue = self.crash()
        self.assertEqual(payloads(queue), [b"b", b"c"])
        self.assertEqual(payloads(self.crash()), [])

    def test_ids_leave_a_gap_unless_the_stop_was_clean(self):
        queue = self.filled(b"a")
        self.stop_cleanly()
        queue = self.open()
        self.assertEqual(queue.put([b"b"]), 2)
        queue = self.crash()
        self.assertGreater(queue.put([b"c"]), 2 + mq.ID_GAP - 1)

    def test_a_clean_mark_counts_once(self):
        self.filled(b"a")
        self.stop_cleanly()
        self.open()
        self.assertGreater(self.crash().put([b"b"]), mq.ID_GAP)

    def test_a_log_cut_at_every_byte_keeps_all_whole_records(self):
        queue = self.filled(b"one", b"two", b"three")
        settled_one = queue.take()
        queue.settle(settled_one)
        queue.put([b"four"])
        self.stop_cleanly()
        data, ends = self.read_log(), []
        scan = self.open()
        for _, end, record in scan.log.scan(mq.HEADER.size, len(data)):
            ends.append((end, record))
        self.drop()
        for cut in range(mq.HEADER.size, len(data)):
            self.write_log(data[:cut])
            self.forget_bookmark()
            whole = [record for end, record in ends if end <= cut]
            waiting = {r.id: r.payload for r in whole if r.type == mq.MESSAGE}
            for record in whole:
                if record.type == mq.SETTLED:
                    waiting.pop(record.id)
            queue = self.crash()
            highest = max([r.id for r in whole], default=0)
            self.assertGreater(queue.put([b"new"]), highest)
            self.assertEqual(payloads(queue), [*waiting.values(), b"new"], cut)
            self.drop()

    def test_every_flipped_byte_costs_only_the_record_it_hit(self):
        self.filled(b"one", b"two", b"three", b"four")
        self.stop_cleanly()
        data = self.read_log()
        scan = self.open()
        spans = [(o, e, r) for o, e, r in scan.log.scan(mq.HEADER.size, len(data))]
        self.drop()
        for at in range(mq.HEADER.size, len(data)):
            self.write_log(flipped(data, at))
            self.forget_bookmark()
            left = [r.payload for o, e, r in spans if r.type == mq.MESSAGE and not o <= at < e]
            self.assertEqual(payloads(self.crash()), left, at)
        self.drop()
        names = [name for name in os.listdir(self.folder()) if "corrupt" in name]
        self.assertEqual(len(names), len(spans))

    def test_a_flipped_header_is_refused_and_nothing_is_touched(self):
        self.filled(b"one")
        self.stop_cleanly()
        data = self.read_log()
        for at in range(mq.HEADER.size):
            bad = flipped(data, at, data[at] if at == 0 else 0xFF)   # a zero, as a Go log has it
            self.write_log(bad)
            with self.assertRaises(mq.StorageError):
                self.open()
            self.drop()
            self.assertEqual(self.read_log(), bad)

    def test_tails_that_are_no_records_are_cut(self):
        queue = self.filled(b"one", b"two")
        inner = self.read_log()[mq.HEADER.size:]
        queue.put([inner])                   # a payload that holds valid records
        self.stop_cleanly()
        good = self.read_log()
        self.filled(b"other", name="other")
        self.stop_cleanly()
        tails = [bytes(100), b"garbage" * 30, self.read_log("other"), inner,
                 self.read_log("other")[mq.HEADER.size:], good, b"\0" * 5000 + b"x"]
        for tail in tails:
            self.write_log(good + tail)
            self.forget_bookmark()
            queue = self.crash()
            self.assertEqual(payloads(queue), [b"one", b"two", inner])
            self.drop()

    def test_messages_behind_a_hole_of_zeros_are_kept(self):
        queue = self.filled(b"one", b"two", b"three")
        start = queue.log.tail
        queue.put([b"lost"])
        end = queue.log.tail
        queue.put([b"four"])
        self.drop()
        data = self.read_log()
        self.write_log(data[:start] + bytes(end - start) + data[end:])
        queue = self.open()
        self.assertEqual(payloads(queue), [b"one", b"two", b"three", b"four"])
        self.assertEqual(queue.log.corrupt_records, 1)

    def test_empty_and_all_zero_files_become_new_logs(self):
        for data in (b"", bytes(44), bytes(9000)):
            self.write_log(data)
            queue = self.crash()
            self.assertEqual(queue.put([b"x"]), 1)
            self.assertEqual(payloads(queue), [b"x"])
            self.drop()

    def test_a_bookmark_is_only_a_shortcut(self):
        queue = self.filled(*[b"%d" % n for n in range(50)])
        for _ in range(20):
            queue.settle(queue.take())
        held = queue.take()
        queue.retry(held)
        old = os.path.join(self.base, "old.json")
        queue.bookmark()
        shutil.copy(os.path.join(self.folder(), "meta.json"), old)
        queue.put([b"50"])
        queue.settle(queue.take())
        queue.bookmark()
        self.drop()
        with open(os.path.join(self.folder(), "meta.json")) as file:
            newest = file.read()
        data = self.read_log()
        wanted = [b"%d" % n for n in range(21, 51)]
        foreign = dict(json.loads(newest), log_id="0" * 32)
        beyond = json.loads(newest)
        beyond["tail_offset"] += 1000
        beyond.pop("crc32")
        beyond["crc32"] = mq._checksum(beyond)
        flipped = newest.replace('"passed": ', '"passed": 1')
        with open(old) as file:
            older = file.read()
        for meta in (newest, older, newest[:40], "", "[]", "null", flipped,
                     json.dumps(foreign), json.dumps(beyond), None):
            self.write_log(data)
            self.forget_bookmark()
            if meta is not None:
                self.put_meta(meta)
            queue = self.open()
            self.assertEqual(payloads(queue, settle=False), wanted)
            self.drop()

    def test_delivery_counts_survive_and_a_message_returns_to_its_place(self):
        queue = self.filled(b"a", b"b")
        queue.retry(queue.take())
        first = self.crash().take().messages[0]
        self.assertEqual((first.payload, first.delivery), (b"a", 2))

    def test_a_message_damaged_after_the_start_is_set_aside_not_delivered(self):
        queue = self.filled(b"aaaa", b"bbbb")
        self.overwrite(b"aaaa", b"XXXX")
        self.assertEqual(payloads(queue), [b"bbbb"])
        self.assertEqual(queue.log.corrupt_records, 1)

    def test_time_does_not_go_back_with_the_wall_clock(self):
        clock = FakeClock()
        queue = self.filled(b"a", clock=clock)
        clock.wall -= 10_000_000
        queue = self.crash(clock=clock)
        self.assertGreaterEqual(queue.now_ms(), queue.state.time_ms)
        self.assertEqual(queue.numbers()["subscribers"][""]["oldest_message_age_seconds"], 0)


class LegacyTest(Folder):
    """Folders that the Go server left behind."""

    def go_log(self, *items):
        return b"".join(struct.pack(">Q", len(item)) + item for item in items)

    def take_over(self, data, meta=None):
        shutil.rmtree(self.folder(), ignore_errors=True)
        self.write_log(data)
        if meta is not None:
            self.put_meta({"head_offset": meta[0], "tail_offset": meta[1]}
                          if isinstance(meta, tuple) else meta)
        queue = self.open()
        found = payloads(queue)
        self.drop()
        return found

    def test_what_waits_between_head_and_tail_is_taken_over_and_the_old_files_kept(self):
        data = self.go_log(b"one", b"two", b"three")
        self.assertEqual(self.take_over(data, (11, len(data))), [b"two", b"three"])
        with open(self.log_path() + ".legacy", "rb") as file:
            self.assertEqual(file.read(), data)
        self.assertTrue(os.path.exists(os.path.join(self.folder(), "meta.json.legacy")))

    def test_every_cut_and_every_head(self):
        items = [b"one", b"", b"two2", b"three"]
        data = self.go_log(*items)
        ends, at = [], 0
        for item in items:
            at += 8 + len(item)
            ends.append((at, item))
        for cut in range(1, len(data) + 1):
            wanted = [item for end, item in ends if end <= cut and item]
            if any(data[:cut]):
                self.assertEqual(self.take_over(data[:cut]), wanted, cut)
        for head in range(len(data)):
            wanted = [item for end, item in ends if end > head and item]
            self.assertEqual(self.take_over(data, (head, len(data))), wanted, head)

    def test_an_interrupted_compaction_and_unreadable_offsets_mean_everything(self):
        data = self.go_log(b"one", b"two")
        self.assertEqual(self.take_over(data, (100, 100 + len(data))), [b"one", b"two"])
        for meta in ("", "{", '{"head_offset": "x"}', '{"head_offset": -5, "tail_offset": -9}'):
            self.assertEqual(self.take_over(data, meta), [b"one", b"two"], meta)

    def test_a_takeover_that_was_cut_short_is_repeated(self):
        data = self.go_log(b"one", b"two")
        for call in ("rename", "fsync"):
            shutil.rmtree(self.folder(), ignore_errors=True)
            self.write_log(data)
            self.put_meta({"head_offset": 11, "tail_offset": len(data)})
            storage = FakeStorage()
            storage.fail(call, errno.EIO)
            with self.assertRaises((OSError, mq.CompactionFailed)):
                self.open(storage=storage)
            self.drop()
            self.assertEqual(payloads(self.open()), [b"two"])
            self.drop()


class AppendTest(Folder):
    def test_a_full_disk_refuses_the_put_and_leaves_the_log_whole(self):
        for failure in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, SHORT):
            storage = FakeStorage()
            queue = self.filled(b"one", storage=storage)
            before = self.read_log()
            storage.fail("pwrite", failure)
            with self.assertRaises(mq.ApiError) as caught:
                queue.put([b"two"])
            self.assertEqual(caught.exception.status, 503)
            self.assertEqual(self.read_log(), before)
            queue.settle(queue.take())       # takes go on, in memory
            self.assertEqual(payloads(queue), [])
            storage.heal()
            self.assertTrue(queue.wants_compaction())
            queue.compact()                  # what memory knew is in the log now
            queue.put([b"three"])
            self.assertEqual(payloads(self.crash()), [b"three"])
            self.drop()
            shutil.rmtree(self.folder())

    def test_any_other_error_poisons_the_log(self):
        for call, failure in (("pwrite", errno.EIO), ("fdatasync", errno.EIO),
                              ("pwrite", errno.ESTALE), ("fdatasync", errno.ENOSPC)):
            storage = FakeStorage()
            queue = self.filled(b"one", fsync="always", storage=storage)
            storage.fail(call, failure)
            with self.assertRaises(mq.LogFailed):
                queue.put([b"two"])
            storage.heal()
            del storage.calls[:]
            with self.assertRaises(mq.LogFailed):
                queue.put([b"three"])
            with self.assertRaises(mq.LogFailed):
                queue.settle(queue.take())
            self.assertEqual([c for c in storage.calls if c != "pread"], [])
            self.drop()
            shutil.rmtree(self.folder())

    def test_a_failed_truncate_after_a_full_disk_poisons_the_log(self):
        storage = FakeStorage()
        queue = self.filled(b"one", storage=storage)
        storage.fail("pwrite", SHORT)
        storage.fail("truncate", errno.EIO)
        with self.assertRaises(mq.LogFailed):
            queue.put([b"two"])

    def test_concurrent_puts_share_syncs_and_none_returns_before_its_own(self):
        storage, late, synced = mq.Storage(), [], []

        def sync(fd):
            size = os.fstat(fd).st_size
            time.sleep(0.005)
            os.fdatasync(fd)
            synced.append(size)

        storage.fdatasync = sync
        queue = self.open(fsync="always", storage=storage)

        def produce():
            for _ in range(10):
                first = queue.put([b"x"])
                number = earlier + first     # of its append: each has one message
                end = empty + first * (mq.HEAD.size + 1)         # of what is told as durable
                if queue.log.durable < number or synced[-1] < end:
                    late.append((first, end))

        before, empty = queue.log.syncs, queue.log.tail
        earlier = queue.log.appends - queue.state.next_id + 1
        together(*[produce] * 16)
        self.assertEqual(late, [])
        self.assertLess(queue.log.syncs - before, 160)

    def test_a_failing_sync_fails_every_waiter(self):
        storage = FakeStorage()
        queue = self.open(fsync="always", storage=storage)
        storage.fail("fdatasync", errno.EIO)

        def produce():
            with self.assertRaises(mq.LogFailed):
                queue.put([b"x"])

        together(*[produce] * 8)

    def test_a_log_that_cannot_be_read_is_the_end(self):
        storage = FakeStorage()
        queue = self.filled(b"a", storage=storage)
        storage.fail("pread", errno.EIO)
        with self.assertRaises(mq.LogFailed):
            queue.take()
        storage.heal()
        with self.assertRaises(mq.LogFailed):
            queue.put([b"b"])

    def test_a_failing_sync_fails_whoever_syncs_at_the_same_time(self):
        first, second = threading.Lock(), threading.Event()

        def fail_once(_):
            """As the kernel: of two syncs of one descriptor, one is told of the error."""
            if not first.acquire(blocking=False):
                second.set()
                return
            second.wait(0.2)
            raise OSError(errno.EIO, "broken")

        queue = self.open(fsync="always")
        queue.log.storage = FakeStorage()
        queue.log.storage.before["fdatasync"] = fail_once

        def sync():
            with self.assertRaises(mq.LogFailed):
                queue.log.sync()

        together(sync, sync)

    def test_who_waits_for_a_sync_waits_for_two_at_most(self):
        storage = FakeStorage()
        queue = self.open(fsync="always", storage=storage, lead=lambda log: None)
        syncs = []

        def append_more(_):
            syncs.append(1)
            if len(syncs) < 20:
                append_unsynced(queue)

        storage.before["fdatasync"] = append_more
        for put in (queue.put, functools.partial(queue.put, limited=False)):
            del syncs[:]
            put([b"x"])                      # as a client's, as a dead letter
            self.assertLessEqual(len(syncs), 2)

    def test_a_close_waits_for_the_sync_that_is_under_way_and_none_comes_after(self):
        storage, entered, gate, order = FakeStorage(), threading.Event(), threading.Event(), []
        queue = self.filled(b"a", storage=storage)

        def sync(fd):
            entered.set()
            gate.wait(ANSWER_S)
            os.fstat(fd)                     # raises if it was closed
            order.append("synced")

        def close():
            entered.wait(ANSWER_S)
            threading.Timer(0.05, gate.set).start()
            queue.log.close()
            order.append("closed")

        storage.before["fdatasync"] = sync
        together(queue.log.sync, close)
        queue.log.sync()
        self.assertEqual(order, ["synced", "closed"])

    def test_after_a_failed_sync_replaced_files_are_closed_all_the_same(self):
        storage = FakeStorage()
        queue = self.filled(b"a", storage=storage)
        storage.fail("fdatasync", errno.EIO)
        with self.assertRaises(mq.LogFailed):
            queue.log.sync()
        queue.log._retired.append(storage.open(self.log_path(), os.O_RDONLY))
        closing = threading.Thread(target=queue.log.close_replaced, daemon=True)
        closing.start()
        closing.join(1)
        self.assertFalse(closing.is_alive())


class LockTest(Folder):
    def test_a_folder_is_used_by_one_queue_at_a_time(self):
        self.open()
        second = mq.Queue(mq.QueueConfig(name="q"), self.folder())
        with self.assertRaisesRegex(mq.StorageError, "in use"):
            second.log.lock()
        self.drop()
        second.log.lock()
        second.log.close()

    def test_folders_and_files_are_private(self):
        self.open()
        self.stop_cleanly()
        self.assertEqual(os.stat(self.folder()).st_mode & 0o777, 0o700)
        for name in os.listdir(self.folder()):
            self.assertEqual(os.stat(os.path.join(self.folder(), name)).st_mode & 0o777, 0o600)


# ---- Queue --------------------------------------------------------------------------------

class QueueTest(Folder):
    def test_what_comes_back_comes_back_at_its_old_place(self):
        queue = self.filled(b"a", b"b", b"c")
        first, second = queue.take(), queue.take()
        queue.retry(second)
        queue.retry(first)
        self.assertEqual(payloads(queue), [b"a", b"b", b"c"])

    def test_a_delayed_message_waits_and_keeps_its_place(self):
        clock = FakeClock()
        queue = self.open(clock=clock)
        queue.put([b"late"], delay_s=10)
        queue.put([b"now"])
        self.assertEqual(counts(queue), (1, 0, 1))
        self.assertEqual(queue.take().messages[0].payload, b"now")
        self.assertIsNone(queue.take())
        clock.passed += 10_000
        self.assertEqual(queue.take().messages[0].payload, b"late")

    def test_a_delay_survives_a_restart(self):
        clock = FakeClock()
        queue = self.open(clock=clock)
        queue.put([b"late"], delay_s=10)
        other = self.filled(b"x", name="other", clock=clock)
        other.nack("", other.take(wish=mq.Wish(lease_s=5)).lease, 20)
        self.drop()
        one, other = self.open(clock=clock), self.open("other", clock=clock)
        self.assertIsNone(one.take())
        clock.passed += 10_000
        self.assertIsNotNone(one.take())
        self.assertIsNone(other.take())
        clock.passed += 10_000
        self.assertIsNotNone(other.take())

    def test_a_lease_is_over_in_time_whoever_looks_first(self):
        clock = FakeClock()
        queue = self.filled(b"a", clock=clock)
        lease = queue.take(wish=mq.Wish(0, 0, 5)).lease
        clock.passed += 5000                 # and no timer saw it yet
        for late in (queue.ack, queue.nack, lambda *lease: queue.extend(*lease, 9)):
            with self.assertRaises(mq.ApiError) as caught:
                late("", lease)
            self.assertEqual(caught.exception.status, 410)
        self.assertEqual(queue.take().messages[0].delivery, 2)

    def test_a_late_word_on_what_is_gone_does_nothing(self):
        queue = self.filled(b"a")
        delivery = queue.take()
        queue.settle(delivery)
        size = queue.log.tail
        queue.settle(delivery)
        queue.retry(delivery)
        self.assertEqual(queue.log.tail, size)
        self.assertEqual(queue.out_total, 1)

    def test_an_entry_costs_200_bytes_at_most(self):
        queue = self.open()
        queue.put([b"x"] * 20_000)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            lease = queue.take(wish=mq.Wish(1000, mq.MIB, 60)).lease
            queue.nack("", lease, 60)
        used = tracemalloc.get_traced_memory()[0] - before
        self.assertEqual(counts(queue), (0, 0, 20_000))
        self.assertLess(used / 20_000, 200)

    def test_memory_does_not_grow_with_the_backlog(self):
        queue = self.open()
        queue.put([b"x" * 100] * 5000)
        queue.take()
        subscription = queue.state.subscriptions[""]
        self.assertEqual(len(subscription.entries), 1)
        self.assertLess(read_ahead_count(queue), 200)
        self.assertEqual(subscription.ready_count, 4999)


class WorstDayTest(Folder):
    """What went wrong once, or nearly."""

    def test_a_waiter_is_answered_once_by_whoever_made_the_message_ready(self):
        queue, answers, inside = self.open(), [], threading.Event()
        queue.take(waiter=mq.Waiter(mq.ONE, 60, answers.append))

        class Lock:
            """Lets another thread in between a release and what follows it."""

            def __init__(self, lock):
                self.acquire, self._lock = lock.acquire, lock

            def release(self):
                self._lock.release()
                if not inside.is_set():
                    inside.set()
                    queue.put([b"a"])

            def __enter__(self):
                self.acquire()

            def __exit__(self, *_):
                self.release()

        queue.lock = Lock(queue.lock)
        queue.tick()
        self.assertEqual([d.messages[0].payload for d in answers], [b"a"])

    def test_a_start_on_a_full_disk_does_not_forget_who_was_there(self):
        self.filled(b"a", b"b")
        self.stop_cleanly()
        storage = FakeStorage()
        storage.fail("pwrite", errno.ENOSPC)
        with self.assertRaises(mq.StorageError):
            self.open(subscribers=("x", "y"), storage=storage)
        queue = self.crash(subscribers=("x", "y"))
        self.assertEqual((payloads(queue, "x"), payloads(queue, "y")),
                         ([b"a", b"b"], [b"a", b"b"]))

    def test_a_start_whose_bookmark_fails_is_no_clean_stop(self):
        queue = self.filled(b"a")
        self.stop_cleanly()
        size = os.path.getsize(self.log_path())
        storage = FakeStorage()
        storage.fail("rename", errno.ENOSPC)
        queue = self.open(storage=storage)
        seen = queue.put([b"b"])
        self.drop()
        os.truncate(self.log_path(), size)   # a power cut: the put was not durable
        self.assertGreater(self.open().put([b"c"]), seen)

    def test_a_compaction_does_not_forget_what_the_full_disk_refused(self):
        clock, storage = FakeClock(), FakeStorage()
        queue = self.filled(b"a", b"b", storage=storage, clock=clock)
        lease = queue.take(wish=mq.Wish(0, 0, 600)).lease
        compaction = mq.Compaction(queue, lambda: None)
        storage.fail("pwrite", errno.ENOSPC)
        queue.nack("", lease, 3600)
        storage.heal()
        with self.assertRaises(mq.CompactionFailed):
            compaction.run()
        queue.compact()
        self.assertEqual(counts(queue), (1, 0, 1))
        queue = self.crash(clock=clock)
        clock.passed += 3_600_000
        self.assertEqual(queue.take().messages[0].delivery, 2)

    def test_compaction_does_not_go_on_for_ever_about_what_it_must_keep(self):
        with unittest.mock.patch.object(mq, "COMPACT_DEAD_BYTES", 1000):
            queue = self.filled(*[b"x"] * 200)
            out = [queue.take() for _ in range(200)]
            for delivery in out:
                queue.retry(delivery)
            queue.compact()
            self.assertFalse(queue.wants_compaction())
            drain(queue)
            queue.put([b"y" * 20_000])
            drain(queue)
            self.assertTrue(queue.wants_compaction())

    def test_a_compaction_ends_though_more_comes_than_it_copies(self):
        queue = self.filled(b"x" * 500_000)
        queue.settle(queue.take())
        left = []

        def pause():
            self.assertLess(len(left), 500, "it does not end")
            for _ in range(2):
                left.append(b"%d" % len(left) + b"y" * 20_000)
                queue.put([left[-1]])

        with unittest.mock.patch.object(mq, "COMPACT_LOCKED_BYTES", 1000):
            queue.compact(pause)
        self.assertEqual(payloads(queue), left)

    def test_many_ends_at_once_are_served_in_bounded_holds_of_the_lock(self):
        clock = FakeClock()
        queue = self.open(clock=clock)
        queue.put([b"x"] * 2500, delay_s=5)
        clock.passed += 5000
        ready = []
        while counts_now(queue)["delayed"]:
            queue.tick()
            ready.append(counts_now(queue)["ready"])
        self.assertEqual(ready, [1000, 2000, 2500])
        for _ in range(2500):
            queue.take(wish=mq.Wish(0, 0, 5))
        clock.passed += 5000
        ready.clear()
        while counts_now(queue)["leased"]:
            queue.tick()
            ready.append(counts_now(queue)["ready"])
        self.assertEqual(ready, [1000, 2000, 2500])

    def test_a_dead_letter_whose_bytes_went_bad_is_no_obstacle(self):
        config = mq.QueueConfig(name="q", max_deliveries=1, dead_letter="dead")
        queue = self.filled(b"bad", b"good", config=config)
        for delivery in [queue.take(), queue.take()]:
            queue.retry(delivery)
        self.overwrite(b"bad", b"BAD")
        queue.compact()
        self.assertEqual([m.payload for _, m in queue.dead_letters()], [b"good"])

    def test_who_waits_comes_before_who_comes_just_as_a_lease_ends(self):
        clock, answers = FakeClock(), []
        queue = self.filled(b"a", clock=clock)
        queue.take(wish=mq.Wish(0, 0, 5))
        queue.take(waiter=mq.Waiter(mq.ONE, 60, answers.append))
        clock.passed += 5000
        self.assertIsNone(queue.take())
        self.assertEqual(len(answers), 1)

    def test_one_answer_that_fails_keeps_the_others_from_nothing(self):
        queue, answers = self.open(), []

        def fail(delivery):
            raise ValueError("broken")

        for answer in (fail, answers.append):
            queue.take(waiter=mq.Waiter(mq.ONE, 60, answer))
        queue.put([b"a", b"b"])
        self.assertEqual([d.messages[0].payload for d in answers], [b"b"])
        self.assertEqual(counts(queue), (1, 1, 0))

    def test_a_put_on_a_full_broadcast_queue_costs_no_look_at_every_entry(self):
        queue = self.open(subscribers=("a", "b"), config=mq.QueueConfig(
            name="q", kind="broadcast", max_messages=100_000))
        queue.put([b"x"] * 3000)
        for name in "ab":
            queue.take(name, mq.Wish(1000, mq.MIB, 60))
        queue.state.held()
        with unittest.mock.patch.object(queue.state, "_count_held") as count:
            queue.put([b"y"])
            queue.settle(queue.take("a"))
            self.assertEqual(queue.state.held()[0], 3001)
            count.assert_not_called()


class Held:
    """A message that a subscriber has not settled, in the model."""

    def __init__(self, message_id, payload, time_ms, due_ms):
        self.id, self.payload, self.time_ms, self.due_ms = message_id, payload, time_ms, due_ms
        self.count, self.owner = 0, None     # who has it: None, a key, or "dead"


class Model:
    """What a queue promises, in plain lists and loops; says nothing of how."""

    def __init__(self, config, subscribers):
        self.config = config
        self.held = {name: {} for name in subscribers}
        self.leases = {name: {} for name in subscribers}     # key: (held, deadline or None)
        self.waiters = {name: [] for name in subscribers}    # (key, wish, deadline)
        self.answers = []                                    # (waiter's key, ids or None)
        self.restarted()

    def restarted(self):
        self.totals = dict.fromkeys(("in", "out", "redelivered", "expired"), 0)
        self.dead_lettered = dict.fromkeys(self.held, 0)
        for name, held in self.held.items():
            self.leases[name].clear()
            self.waiters[name].clear()
            for item in held.values():
                item.owner = None
                if self.config.max_deliveries and item.count >= self.config.max_deliveries:
                    self.expel(name, item)

    def change(self, subscribers):
        """Another config: who is new starts from now on, or, if the kind changed, with what
        anyone had not settled, as early and as little delivered as for any of them."""
        known, union = self.held, {}
        switched = ("" in known) != ("" in subscribers)
        for item in [item for held in known.values() for item in held.values()]:
            first = union.setdefault(item.id, item)
            if first is not item:
                both = Held(item.id, item.payload, item.time_ms, min(first.due_ms, item.due_ms))
                both.count = min(first.count, item.count)
                union[item.id] = both
        self.held = {name: known[name] if name in known else
                     {id_: copy.copy(item) for id_, item in union.items()} if switched else {}
                     for name in subscribers}
        self.leases = {name: {} for name in subscribers}
        self.waiters = {name: [] for name in subscribers}

    def all_held(self):
        return {item.id: item for held in self.held.values() for item in held.values()}

    def refusal(self, payloads):
        items, config = self.all_held().values(), self.config
        size, more = sum(len(item.payload) for item in items), sum(map(len, payloads))
        limits = ((config.max_messages, len(items), len(payloads)),
                  (config.max_bytes, size, more))
        if any(limit is not None and wanted > limit for limit, _, wanted in limits):
            return 413
        if any(limit is not None and have + wanted > limit for limit, have, wanted in limits):
            return 429
        return None

    def put(self, first, payloads, delay_s, now):
        for number, payload in enumerate(payloads):
            for held in self.held.values():
                held[first + number] = Held(first + number, payload, now,
                                            now + delay_s * 1000 if delay_s else 0)
        self.totals["in"] += len(payloads)
        self.match(now)

    def ready(self, name, now):
        return [item for _, item in sorted(self.held[name].items())
                if item.owner is None and item.due_ms <= now]

    def chosen(self, name, wish, now):
        ready = self.ready(name, now)
        if not wish.lines:
            return ready[:1]
        batch = ready[:1] if ready and not mq.is_line(ready[0].payload) else []
        for item in ready if not batch else ():
            fits = sum(len(i.payload) + 1 for i in [*batch, item]) <= wish.max_bytes
            if len(batch) == wish.lines or not mq.is_line(item.payload) or (batch and not fits):
                break
            batch.append(item)
        return batch

    def take(self, name, key, wish, now):
        """Return [(id, number of this delivery)]; `key` is how the test calls the delivery."""
        batch = self.chosen(name, wish, now)
        for item in batch:
            item.owner = key
        if batch:
            deadline = now + wish.lease_s * 1000 if wish.lease_s else None
            self.leases[name][key] = (batch, deadline)
        return [(item.id, item.count + 1) for item in batch]

    def match(self, now):
        for name, waiters in self.waiters.items():
            while waiters and self.ready(name, now):
                key, wish, _ = waiters.pop(0)
                self.answers.append((key, self.take(name, key, wish, now)))

    def out(self, name, key):
        batch, _ = self.leases[name].pop(key)
        return [item for item in batch if item.owner == key]

    def settle(self, name, key):
        for item in self.out(name, key):
            del self.held[name][item.id]
            self.totals["out"] += 1

    def retry(self, name, key, delay_s, now):
        for item in self.out(name, key):
            item.owner, item.count = None, item.count + 1
            item.due_ms = now + delay_s * 1000 if delay_s else 0
            most = self.config.max_deliveries
            if self.is_expired(item, now):
                self.expire(name, item)
            elif most and item.count >= most:
                self.expel(name, item)
            else:
                self.totals["redelivered"] += 1

    def is_expired(self, item, now):
        return bool(self.config.ttl) and item.time_ms + self.config.ttl * 1000 <= now

    def expire(self, name, item):
        self.totals["expired"] += 1
        self.expel(name, item, expired=True)

    def expel(self, name, item, expired=False):
        item.owner = "dead"
        if not self.config.dead_letter:
            self.held[name] = {i: h for i, h in self.held[name].items() if h is not item}
            self.dead_lettered[name] += not expired

    def dead(self):
        return {(name, item.id) for name, held in self.held.items()
                for item in held.values() if item.owner == "dead"}

    def bury(self, letters):
        for name, message_id in letters:
            del self.held[name][message_id]
            self.dead_lettered[name] += 1

    def purge(self):
        for name in self.held:
            self.held[name].clear()
            self.leases[name] = {key: ([], None) for key, (_, deadline)
                                 in self.leases[name].items() if deadline is None}

    def tick(self, now):
        for name in self.held:
            for item in list(self.held[name].values()):
                if item.owner is None and self.is_expired(item, now):
                    self.expire(name, item)
            for key, (_, deadline) in list(self.leases[name].items()):
                if deadline is not None and deadline <= now:
                    self.retry(name, key, 0, now)
        self.match(now)
        for name, waiters in self.waiters.items():
            late = sorted((deadline, key) for key, _, deadline in waiters if deadline <= now)
            self.answers += [(key, None) for _, key in late]
            self.waiters[name] = [waiter for waiter in waiters if waiter[2] > now]

    def numbers(self, name, now):
        items = self.held[name].values()
        oldest = self.held[name][min(self.held[name])].time_ms if items else now
        return {"ready": len(self.ready(name, now)),
                "leased": sum(item.owner is not None for item in items),
                "delayed": sum(item.owner is None and item.due_ms > now for item in items),
                "oldest_message_age_seconds": (now - oldest) / 1000,
                "messages_dead_lettered_total": self.dead_lettered[name]}


class ModelTest(Folder):
    """Random operations on a queue and on the model; every answer must be the same."""

    subscribers = ("",)
    others = ()                              # sets of subscribers that a restart may bring

    def test_a_queue_agrees_with_the_model_through_restarts_and_compactions(self):
        configs = [{}, {"max_messages": 12, "max_bytes": 300}, {"ttl": 2},
                   {"max_deliveries": 2}, {"ttl": 3, "max_deliveries": 3, "dead_letter": "dead"}]
        for number in range(100 if TORTURE else 5):
            config = mq.QueueConfig(name="q", **configs[number % len(configs)])
            with self.subTest(seed=SEED, run=number, config=config):
                self.drop()
                shutil.rmtree(self.folder(), ignore_errors=True)
                self.run_model(config, random.Random(SEED * 1000 + number))

    def run_model(self, config, rng):
        self.config, self.rng, self.clock = config, rng, FakeClock()
        self.model = Model(config, self.subscribers)
        self.keys = iter(range(1_000_000))
        self.deliveries, self.answers, self.serial = {}, [], 0
        self.start()
        acts = [self.put] * 7 + [self.take] * 8 + [self.finish] * 9 + [self.wait] * 2 + [
            self.peek, self.bury, self.late_lease]
        for _ in range(500):
            self.clock.passed += rng.choice((0, 1, 30, 400))
            self.tick()
            act = rng.choice(acts)
            if rng.random() < 0.05:
                act = rng.choice((self.compact, self.queue.bookmark, self.restart, self.purge))
            act()
            self.compare(act.__name__)

    def compact(self):
        """Compact in small steps, with more of everything between them."""
        def meanwhile():
            self.rng.choice((self.put, self.take, self.finish, self.finish, self.wait))()

        with unittest.mock.patch.multiple(mq, AHEAD_BYTES=400, COMPACT_LOCKED_BYTES=800):
            self.queue.compact(meanwhile)

    def start(self):
        self.queue = mq.Queue(self.config, self.folder(), fsync="no", clock=self.clock,
                              subscribers=self.subscribers)
        self.queue.log.lock()
        self.queues.append(self.queue)
        self.queue.recover()

    def restart(self):
        (self.stop_cleanly if self.rng.random() < 0.3 else self.drop)()
        if self.others and self.rng.random() < 0.5:
            self.subscribers = self.rng.choice(self.others)
            self.model.change(self.subscribers)
        self.start()
        self.deliveries.clear()
        self.model.restarted()
        self.tick()

    def tick(self):
        while self.queue.tick() <= self.clock.passed:
            pass
        self.model.tick(self.queue.now_ms())

    def compare(self, act):
        now = self.queue.now_ms()
        self.assertEqual(sorted(self.answers), sorted(self.model.answers), act)
        numbers = self.queue.numbers()
        for name in self.subscribers:
            self.assertEqual(numbers["subscribers"][name], self.model.numbers(name, now), act)
        for name, total in self.model.totals.items():
            self.assertEqual(numbers[f"messages_{name}_total"], total, (act, name))
        self.assertEqual(numbers["messages_dead_lettered_total"],
                         sum(self.model.dead_lettered.values()), act)
        held = self.model.all_held().values()
        self.assertEqual(self.queue.state.held(), (len(held), sum(
            len(item.payload) + mq.HEAD.size for item in held)), act)
        self.assertEqual(dying(self.queue), self.model.dead(), act)

    def put(self):
        payloads = []
        for _ in range(self.rng.choice((1, 1, 1, 4, 13))):
            self.serial += 1
            tail = self.rng.choice((b"", b"\n", b"a\nb", b"x" * 90))
            payloads.append(b"%d%b" % (self.serial, tail))
        delay_s, refusal = self.rng.choice((0, 0, 0, 1, 5)), self.model.refusal(payloads)
        try:
            first = self.queue.put(payloads, delay_s)
        except mq.ApiError as error:
            self.assertEqual(error.status, refusal)
            return
        self.assertIsNone(refusal)
        self.model.put(first, payloads, delay_s, self.queue.now_ms())

    def wish(self):
        return mq.Wish(self.rng.choice((0, 0, 1, 5)), 200, self.rng.choice((0, 0, 1, 3)))

    def take(self):
        name, wish, key = self.rng.choice(self.subscribers), self.wish(), next(self.keys)
        delivery = self.queue.take(name, wish)
        expected = self.model.take(name, key, wish, self.queue.now_ms())
        self.assertEqual(self.told(delivery), expected)
        if delivery:
            self.deliveries[key] = name, delivery

    def told(self, delivery):
        return [(m.id, m.delivery) for m in delivery.messages] if delivery else []

    def wait(self):
        name, wish, key = self.rng.choice(self.subscribers), self.wish(), next(self.keys)
        wait_s = self.rng.choice((1, 3))

        def answer(delivery):
            self.answers.append((key, self.told(delivery) if delivery else None))
            if delivery:
                self.deliveries[key] = name, delivery

        waiter = mq.Waiter(wish, wait_s, answer)
        delivery = self.queue.take(name, wish, waiter)
        expected = self.model.take(name, key, wish, self.queue.now_ms())
        self.assertEqual(self.told(delivery), expected)
        if delivery:
            self.deliveries[key] = name, delivery
        else:
            deadline = self.queue.now_ms() + wait_s * 1000
            self.model.waiters[name].append((key, wish, deadline))

    def finish(self):
        """Settle, return or extend something that is out, or was."""
        if not self.deliveries:
            return
        key = self.rng.choice(list(self.deliveries))
        name, delivery = self.deliveries[key]
        known = key in self.model.leases[name]
        act, delay_s = self.rng.random(), self.rng.choice((0, 0, 1))
        if delivery.lease is None:
            (self.queue.settle if act < 0.7 else self.queue.retry)(delivery)
            delay_s = 0
        else:
            call = [lambda: self.queue.ack(name, delivery.lease),
                    lambda: self.queue.nack(name, delivery.lease, delay_s),
                    lambda: self.queue.extend(name, delivery.lease, 2)][
                        0 if act < 0.7 else 1 if act < 0.9 else 2]
            try:
                call()
            except mq.ApiError as error:
                self.assertEqual((error.status, known), (410, False))
                del self.deliveries[key]
                return
            self.assertTrue(known)
        now = self.queue.now_ms()
        if act >= 0.9 and delivery.lease is not None:
            batch, _ = self.model.leases[name][key]
            self.model.leases[name][key] = batch, now + 2000
            return
        if act < 0.7:
            self.model.settle(name, key)
        else:
            self.model.retry(name, key, delay_s, now)
            self.model.match(now)
        del self.deliveries[key]

    def late_lease(self):
        """A lease that never was, here or at all."""
        for call in (self.queue.ack, self.queue.nack):
            with self.assertRaises(mq.ApiError) as caught:
                call(self.rng.choice(self.subscribers), self.rng.getrandbits(96))
            self.assertEqual(caught.exception.status, 410)

    def peek(self):
        name, wish = self.rng.choice(self.subscribers), self.wish()
        delivery = self.queue.peek(name, wish)
        expected = self.model.chosen(name, wish, self.queue.now_ms())
        self.assertEqual(self.told(delivery), [(item.id, item.count) for item in expected])

    def bury(self):
        letters = self.queue.dead_letters()
        self.assertEqual({(name, m.id) for name, m in letters}, self.model.dead())
        self.queue.bury(letters)
        self.model.bury(self.model.dead())

    def purge(self):
        self.assertEqual(self.queue.purge()[0], len(self.model.all_held()))
        self.model.purge()


class BroadcastModelTest(ModelTest):
    """The same with several subscribers, who join and leave; and with a change of kind."""

    subscribers = ("a", "b")
    others = (("a", "b"), ("a",), ("b", "c"), ("a", "b", "c"), ("",))

    def peek(self):
        super().peek()
        delivery = self.queue.peek(None, mq.Wish(1000, mq.MIB))
        held = self.model.all_held()
        messages = list(itertools.takewhile(lambda i: mq.is_line(held[i].payload), sorted(held)))
        expected = messages or sorted(held)[:1]
        self.assertEqual(self.told(delivery), [(id_, 0) for id_ in expected])


class SubscriberTest(Folder):
    """Who gets what when the config changes between two starts."""

    def take_all(self, queue, *names):
        return {name: payloads(queue, name) for name in names}

    def test_a_new_subscriber_starts_from_now_on_and_one_that_left_holds_nothing(self):
        queue = self.filled(b"1", b"2", subscribers=("a", "b"))
        queue.settle(queue.take("a"))
        queue = self.crash(subscribers=("a", "c"))
        queue.put([b"3"])
        self.assertEqual(queue.state.held()[0], 2)
        self.assertEqual(self.take_all(queue, "a", "c"), {"a": [b"2", b"3"], "c": [b"3"]})
        self.assertEqual(queue.state.held(), (0, 0))
        queue = self.crash(subscribers=("a", "b"))
        self.assertEqual(self.take_all(queue, "a", "b"), {"a": [], "b": []})

    def test_positions_are_kept_by_restarts_and_compactions(self):
        queue = self.filled(*[b"%d" % n for n in range(6)], subscribers=("a", "b"))
        for name, settle in (("a", (0, 1, 3)), ("b", (2,))):
            out = [queue.take(name) for _ in range(4)]
            for number, delivery in enumerate(out):
                (queue.settle if number in settle else queue.retry)(delivery)
        queue.compact()
        self.forget_bookmark()
        queue = self.crash(subscribers=("a", "b"))
        self.assertEqual(self.take_all(queue, "a", "b"), {
            "a": [b"2", b"4", b"5"], "b": [b"0", b"1", b"3", b"4", b"5"]})

    def test_from_fifo_to_broadcast_everyone_gets_what_was_waiting(self):
        clock = FakeClock()
        queue = self.filled(b"0", b"1", b"2", b"3", clock=clock)
        queue.put([b"late"], delay_s=10)
        out = [queue.take() for _ in range(3)]
        queue.settle(out[1])
        queue.retry(out[2])
        queue = self.crash(subscribers=("a", "b"), clock=clock)
        self.assertEqual(queue.take("a").messages[0].payload, b"0")
        self.assertEqual(queue.take("a").messages[0].delivery, 2)
        queue = self.crash(subscribers=("a", "b"), clock=clock)
        clock.passed += 10_000
        waiting = [b"0", b"2", b"3", b"late"]
        self.assertEqual(self.take_all(queue, "a", "b"), {"a": waiting, "b": waiting})

    def test_from_broadcast_to_fifo_what_anyone_had_not_settled_is_kept(self):
        queue = self.filled(b"0", b"1", b"2", b"3", subscribers=("a", "b"))
        for name, settle in (("a", (0, 1)), ("b", (1, 2))):
            for number, delivery in enumerate([queue.take(name) for _ in range(3)]):
                (queue.settle if number in settle else queue.retry)(delivery)
        self.assertEqual(payloads(self.crash()), [b"0", b"2", b"3"])


    def test_who_waits_for_room_keeps_no_other_subscriber_waiting(self):
        budget, got = mq.Budget(2 << 20, 1 << 20), []
        names = [f"s{number}" for number in range(12)]
        queue = self.open(subscribers=names, budget=budget)
        queue.put([bytes(1 << 20)])
        for name in names[6:]:
            delivery = queue.take(name)
            queue.settle(delivery)
        budget.hold(2 << 20)
        for name in names:
            queue.take(name, waiter=mq.Waiter(
                mq.ONE, 60, lambda delivery: got.append(delivery.subscriber)))
        queue.put([b"small"])
        self.assertEqual(sorted(got), sorted(names[6:]))


class CompactionTest(Folder):
    def test_only_live_records_are_kept_wherever_they_are(self):
        queue = self.filled(*[b"%03d" % n * 10 for n in range(300)])
        stuck = queue.take()
        for _ in range(250):
            queue.settle(queue.take())
        back = queue.take()
        queue.retry(back)
        before = queue.log.tail
        queue.compact()
        self.assertLess(queue.log.tail, before / 4)
        queue.settle(stuck)
        left = [b"%03d" % n * 10 for n in range(251, 300)]
        queue = self.crash()
        first = queue.take()
        self.assertEqual(first.messages[0].delivery, 2)
        queue.retry(first)
        self.assertEqual(payloads(queue), left)

    def test_ids_are_not_reused_when_nothing_is_left(self):
        queue = self.filled(b"a", b"b")
        drain(queue)
        queue.compact()
        self.assertEqual(queue.put([b"c"]), 3)
        queue.compact()
        self.assertGreater(self.crash().put([b"d"]), 3)

    def test_puts_takes_and_returns_go_on_meanwhile(self):
        queue = self.filled(*[b"%05d" % n for n in range(3000)])
        stop, taken, lock = threading.Event(), [], threading.Lock()
        puts = [3000]

        def work():
            while not stop.is_set() and puts[0] < 20_000:        # names of five digits sort
                with lock:
                    queue.put([b"%05d" % puts[0]])
                    puts[0] += 1
                delivery = queue.take()
                if delivery and delivery.messages[0].id % 7 == 0 and \
                        delivery.messages[0].delivery == 1:
                    queue.retry(delivery)
                elif delivery:
                    queue.settle(delivery)
                    taken.append(delivery.messages[0].payload)

        def compact():
            for _ in range(4):
                queue.compact(lambda: time.sleep(0.0001))
            stop.set()

        together(work, work, work, compact)
        taken += payloads(self.crash())
        self.assertEqual(sorted(taken), [b"%05d" % n for n in range(puts[0])])

    def test_what_came_while_the_queue_was_nearly_empty_is_still_given(self):
        for steps in range(100, 200, 7):
            queue = self.open(f"q{steps}")
            compaction = mq.Compaction(queue, lambda: None)
            for _ in range(steps):
                queue.put([b"taken" * 40])
                queue.settle(queue.take())
            waiting = [b"%05d" % n * 1000 for n in range(250)]
            for payload in waiting:
                queue.put([payload])
            compaction.run()
            self.assertTrue(payloads(queue) == waiting, steps)

    def test_any_failure_before_the_rename_keeps_the_old_log(self):
        for call, failure in (("fsync", errno.EIO), ("pwrite", errno.ENOSPC),
                              ("pwrite", errno.EIO), ("rename", errno.EIO)):
            storage = FakeStorage()
            queue = self.filled(b"a", b"b", storage=storage)
            queue.settle(queue.take())
            storage.fail(call, failure)
            with self.assertRaises(mq.CompactionFailed):
                queue.compact()
            storage.heal()
            self.assertFalse(os.path.exists(self.log_path() + ".tmp"))
            queue.put([b"c"])
            self.assertEqual(payloads(self.crash()), [b"b", b"c"])
            self.drop()
            shutil.rmtree(self.folder())

    def test_a_lack_of_descriptors_before_the_rename_keeps_the_old_log(self):
        storage = FakeStorage()
        queue = self.filled(b"a", b"b", storage=storage)
        compaction = mq.Compaction(queue, lambda: None)
        storage.fail("open", errno.EMFILE)
        with self.assertRaises(OSError):
            compaction.run()
        self.assertIsNone(queue.log.failure)
        queue.put([b"c"])
        self.assertEqual(payloads(queue), [b"a", b"b", b"c"])

    def test_a_log_that_was_removed_is_put_back(self):
        queue = self.filled(b"a", b"b")
        os.unlink(self.log_path())
        self.assertTrue(queue.wants_compaction())
        queue.compact()
        self.assertEqual(payloads(self.crash()), [b"a", b"b"])


# ---- Crash states -------------------------------------------------------------------------
# Every disk that a power cut may leave, at every point of a run, through the real recovery.
# `TORTURE=1 python3 -m unittest` tries all of them, and many more random runs.

TEAR_BYTES = (512, 4096)                     # what disks and file systems write at once


class Recorder(mq.Storage):
    """Does every call for real and notes, in one order, those that change the disk.

    `calls` also holds what the ledger is to know, as ("ledger", method, *arguments). A sync
    covers what was written before it began. `broken` names calls that are only claimed."""

    def __init__(self, broken=()):
        self.calls, self.broken = [], broken
        self.lock = threading.RLock()
        self.numbers, self.paths = {}, {}    # number of a file by its path, and by descriptor
        self.short_by = 0                    # the next write falls short by so much

    def note(self, *call):
        with self.lock:
            self.calls.append(call)

    def tell(self, method, *arguments):
        self.note("ledger", method, *arguments)

    def adopt(self, folder):
        """Start from the files that stand below a folder, all of them on disk."""
        by_inode = {}
        for path in sorted(os.path.join(place, name) for place, _, names in os.walk(folder)
                           for name in names):
            inode = os.stat(path).st_ino
            if inode in by_inode:
                self.numbers[path] = by_inode[inode]
                self.note("name", path, self.numbers[path])
                continue
            by_inode[inode] = self._create(path)
            with open(path, "rb") as file:
                self.note("write", self.numbers[path], file.read(), 0)
            self.note("begin_sync", self.numbers[path])
            self.note("end_sync", self.numbers[path])
        self.note("sync_names")
        self.note("ready")

    def _create(self, path):
        self.numbers[path] = len(self.calls) + 1
        self.note("create", path, self.numbers[path])
        return self.numbers[path]

    def open(self, path, flags, mode=0o777):
        with self.lock:
            existed = os.path.lexists(path)
            fd = os.open(path, flags, mode)
            if not flags & os.O_DIRECTORY:
                if not existed:
                    self._create(path)
                elif flags & os.O_TRUNC:
                    self.note("truncate", self.numbers[path], 0)
                self.paths[fd] = self.numbers[path]
            else:
                self.paths[fd] = None
            return fd

    def pwrite(self, fd, data, offset):
        with self.lock:
            data, self.short_by = data[:len(data) - self.short_by], 0
            self.note("write", self.paths[fd], bytes(data), offset)
            return os.pwrite(fd, data, offset)

    def fdatasync(self, fd):
        if "fdatasync" not in self.broken:
            self._sync(fd)

    def fsync(self, fd):
        if self.paths[fd]:
            self._sync(fd)
        elif "folder" not in self.broken:
            self.note("sync_names")

    def _sync(self, fd):
        number = self.paths[fd]
        self.note("begin_sync", number)
        time.sleep(0)                        # others may write meanwhile
        self.note("end_sync", number)

    def truncate(self, fd, size):
        if "truncate" not in self.broken:
            with self.lock:
                self.note("truncate", self.paths[fd], size)
                os.ftruncate(fd, size)

    def rename(self, source, target):
        with self.lock:
            os.rename(source, target)
            self.numbers[target] = self.numbers.pop(source)
            self.note("rename", source, target)

    def link(self, source, target):
        with self.lock:
            os.link(source, target)
            self.numbers[target] = self.numbers[source]
            self.note("name", target, self.numbers[source])

    def unlink(self, path):
        with self.lock:
            os.unlink(path)
            self.numbers.pop(path, None)
            self.note("unlink", path)


class Disk:
    """What of a run's calls is certainly on disk, and what may be."""

    def __init__(self):
        self.synced, self.names = {}, {}     # number: bytes; path: number
        self.pending = []                    # [number, kind, *what] in order
        self.pending_names = []
        self.begun = {}                      # number: writes that a sync under way covers

    def apply(self, kind, *rest):
        if kind == "create":
            self.synced[rest[1]] = b""
            self.pending_names.append(("name", *rest))
        elif kind in ("write", "truncate"):
            self.pending.append((rest[0], kind, *rest[1:]))
        elif kind == "begin_sync":
            self.begun[rest[0]] = [call for call in self.pending if call[0] == rest[0]]
        elif kind == "end_sync":
            covered = self.begun.pop(rest[0], ())
            self.synced[rest[0]] = written(self.synced[rest[0]], covered)
            self.pending = [call for call in self.pending
                            if not any(call is done for done in covered)]
        elif kind == "sync_names":
            self.names, self.pending_names = named(self.names, self.pending_names), []
        elif kind in ("name", "rename", "unlink"):
            self.pending_names.append((kind, *rest))

    def states(self, rng):
        """Yield (what was kept, {path: (number, bytes)}) for each disk there may be now.

        Of the names any first part is kept, as a journal would; of the writes, any choice."""
        for count in range(len(self.pending_names) + 1):
            names = named(self.names, self.pending_names[:count])
            for what, calls in self.choices(rng):
                files = {number: written(self.synced[number],
                                         [call for call in calls if call[0] == number])
                         for number in set(names.values())}
                state = {path: (number, files[number]) for path, number in names.items()}
                yield f"{what}, {count} of {len(self.pending_names)} names", state
                if what in ("all writes", "no writes"):
                    yield from longer(what, state, rng)

    def choices(self, rng):
        """Yield (what is kept, its calls) for what was not synced."""
        calls = self.pending
        yield "all writes", calls
        if not calls:
            return
        for at in range(len(calls)):
            yield (f"the first {at} writes" if at else "no writes"), calls[:at]
            yield f"all writes but number {at}", calls[:at] + calls[at + 1:]
            yield f"write {at} alone", [calls[at]]
            for what, torn in tears(calls[at]):
                yield f"write {at} {what}", [*calls[:at], torn, *calls[at + 1:]]
        for _ in range(3):
            kept = [at for at in range(len(calls)) if rng.random() < 0.5]
            yield f"writes {kept}", [calls[at] for at in kept]


def written(content, calls):
    """Return a file's bytes after its writes and truncates."""
    data = bytearray(content)
    for _, kind, *rest in calls:
        if kind == "truncate":
            size = rest[0]
            data[size:] = bytes(max(0, size - len(data)))
        else:
            piece, offset = rest
            data.extend(bytes(max(0, offset - len(data))))
            data[offset:offset + len(piece)] = piece
    return bytes(data)


def named(names, calls):
    """Return the names of a folder after its changes."""
    names = dict(names)
    for kind, *rest in calls:
        if kind == "name":
            names[rest[0]] = rest[1]
        elif kind == "rename":
            names[rest[1]] = names.pop(rest[0])
        else:
            names.pop(rest[0], None)
    return names


def tears(call):
    """Yield (what, call) for a write of which only the start or only the end was written."""
    number, kind, *rest = call
    if kind != "write":
        return
    data, offset = rest
    for size in TEAR_BYTES:
        at = size - offset % size            # the first border within the write
        if at < len(data):
            yield f"torn: only its start up to {size}", (number, kind, data[:at], offset)
            yield f"torn: only its end from {size}", (number, kind, data[at:], offset + at)


def longer(what, state, rng):
    """Yield the state with its log longer than it was: zeros, garbage, or its own old bytes."""
    for path, (number, data) in state.items():
        if path.endswith("data.log") and data:
            tails = {"zeros": bytes(700), "garbage": rng.randbytes(700), "old bytes": data[-700:]}
            for kind, tail in tails.items():
                yield f"{what}, then {kind}", {**state, path: (number, data + tail)}


class UnseededCodec(mq.Codec):
    """Records whose crc tells neither the log nor the place."""

    def __init__(self, log_id, marker, next_id):
        super().__init__(bytes(16), marker, next_id)

    def encode(self, records, offset):
        parts, places = [], []
        for record in records:
            parts.append(super().encode([record], 0)[0])
            places.append((offset, len(parts[-1])))
            offset += len(parts[-1])
        return b"".join(parts), places

    def records(self, data, at, offset):
        place = next(super().records(data[at:], 0, 0), None)
        while place:
            _, size, record = place
            yield offset, offset + size, record
            at, offset = at + size, offset + size
            place = next(super().records(data[at:], 0, 0), None)


class User:
    """Uses a queue on a recording storage and tells the ledger of it."""

    def __init__(self, queue, storage, name="m"):
        self.queue, self.storage, self.name = queue, storage, name
        self.puts = 0

    def _payload(self, size, delayed=False):
        self.puts += 1
        payload = b"%s%d " % (self.name.encode(), self.puts)
        self.storage.tell("sending", payload + b"x" * size, delayed)
        return payload + b"x" * size

    def put(self, size=0, count=1, delay_s=0):
        payloads = [self._payload(size, delay_s > 0) for _ in range(count)]
        first = self.queue.put(payloads, delay_s)
        for number, payload in enumerate(payloads):
            self.storage.tell("accepted", payload, first + number)

    def put_bytes(self, payload):
        self.storage.tell("sending", payload)
        self.storage.tell("accepted", payload, self.queue.put([payload]))

    def refused_put(self, count, short_by):
        """A put that the disk has no room for. A power cut may still bring it back, until the
        next put is durable: so that comes first, then the refusal counts."""
        payloads = [self._payload(200) for _ in range(count)]
        self.storage.short_by = short_by
        with contextlib.suppress(mq.ApiError):
            self.queue.put(payloads)
            raise AssertionError("a short write was answered")
        self.put()
        for payload in payloads:
            self.storage.tell("refused", payload)

    def take(self, settle=True, wish=mq.ONE, delay_s=0, subscriber=""):
        """Take, and settle or give back; with a lease by its key."""
        delivery, consumer = self.queue.take(subscriber, wish), subscriber or self.name
        if not delivery:
            return
        for message in delivery.messages:
            self.storage.tell("delivered", consumer, message.payload, message.id,
                              message.delivery)
        if delivery.lease is None:
            (self.queue.settle if settle else self.queue.retry)(delivery)
        elif settle:
            self.queue.ack(subscriber, delivery.lease)
        else:
            self.queue.nack(subscriber, delivery.lease, delay_s)
        self.storage.tell("settled" if settle else "returned", consumer)

    def abandon(self, seconds):
        """Take with a lease and let it run out."""
        delivery = self.queue.take(wish=mq.Wish(3, 10_000, seconds))
        for message in delivery.messages if delivery else ():
            self.storage.tell("delivered", self.name, message.payload, message.id,
                              message.delivery)
        self.storage.tell("returned", self.name)
        pass_time(self.queue, seconds)

    def purge(self):
        """Drop everything; from before the call on, nothing needs to come any more."""
        self.storage.tell("dropping")
        self.queue.purge()
        self.queue.log.wait_durable(self.queue.log.appends)
        self.storage.tell("dropped")

    def move_dead(self, target):
        letters = self.queue.dead_letters()
        if letters:
            target.put([message.payload for _, message in letters], limited=False)
            self.queue.bury(letters)

    def bookmark(self):
        self.queue.bookmark()
        self.storage.tell("synced")

    def compact(self):
        self.queue.compact()
        self.storage.tell("synced")

    def compact_without_bookmark(self):
        """As far as others can put before the bookmark, which makes the folder durable too."""
        mq.Compaction(self.queue, lambda: None).run()
        self.storage.tell("synced")


class CrashStateTest(Folder):
    """A scenario gets a Recorder and uses a queue; `faults_of` tries all that may be left."""

    total = 0

    @classmethod
    def tearDownClass(cls):
        if TORTURE:
            print(f"seed {SEED}: {cls.total} states of the disk tried")

    def setUp(self):
        super().setUp()
        shm = "/dev/shm"
        if os.access(shm, os.W_OK):          # thousands of small folders: not on a disk
            self.base = tempfile.mkdtemp(prefix="mq-test-", dir=shm)
            self.addCleanup(shutil.rmtree, self.base, ignore_errors=True)
        self.rng = random.Random(SEED)
        self.tried = 0

    # -- exploring

    def faults_of(self, scenario, share=1.0, broken=(), nested=0.0):
        """Return a text about the smallest state that shows a fault, None without any."""
        for name in ("q", "dead"):
            shutil.rmtree(self.folder(name), ignore_errors=True)
        storage, self.subscribers = Recorder(broken), ("",)
        scenario(storage)
        self.drop()
        storage.note("end")                  # a cut behind the last answer
        return self.explore(storage.calls, [], share, nested)

    def explore(self, calls, before, share, nested=0.0):
        disk, marks, seen = Disk(), list(before), set()
        ready = not any(call[0] == "ready" for call in calls)
        for number, call in enumerate(calls):
            ready = ready or call[0] == "ready"
            if call[0] == "ledger":
                marks.append(call[1:])
                continue
            disk.apply(*call)
            found = []
            for what, state in disk.states(self.rng) if ready else ():
                key = len(marks), hash(tuple(sorted(state.items())))
                if key not in seen and (self.rng.random() < share):
                    seen.add(key)
                    found += self.faults_in(what, state, marks, nested)
            if found:
                _, text = min(found)
                return f"seed {SEED}, after call {number} of {len(calls)}, {call[:2]}: {text}"
        return None

    def faults_in(self, what, state, marks, nested):
        self.tried += 1
        CrashStateTest.total += 1
        faults = self.check(state, marks)
        if not faults and self.rng.random() < nested:
            again = self.cut_recovery(state, marks)
            faults = [f"when the recovery is cut: {again}"] if again else []
        size = sum(len(data) for _, data in state.values())
        files = {os.path.relpath(path, self.base): len(data) for path, (_, data) in state.items()}
        return [(size, f"{what}: {files}: {faults}")] if faults else []

    def restore(self, state, name="state"):
        shutil.rmtree(self.folder(name), ignore_errors=True)
        os.makedirs(self.folder(name), 0o700)
        made = {}
        for path, (number, data) in state.items():
            target = os.path.join(self.folder(name), os.path.relpath(path, self.base))
            os.makedirs(os.path.dirname(target), 0o700, exist_ok=True)
            if number in made:
                os.link(made[number], target)
                continue
            made[number] = target
            with open(target, "wb") as file:
                file.write(data)

    def cut_recovery(self, state, marks):
        """Explore the recovery of a state as a run of its own."""
        self.restore(state, "")              # in place of the whole base
        storage = Recorder()
        storage.adopt(self.base)
        queue = self.open(fsync="always", storage=storage, subscribers=self.subscribers)
        User(queue, storage, "nested").put()
        self.drop()
        storage.note("end")
        return self.explore(storage.calls, [*marks, ("fault", True)], 0.3)

    def check(self, state, marks):
        """Return the faults that the next starts show: put, kill, start, drain, start again."""
        self.restore(state)
        clock = FakeClock()
        clock.wall += 1_000_000              # delays are over
        options = {"storage": FakeStorage(quick=True), "fsync": "always", "clock": clock}
        ledgers = {name: self.ledger_of(name, marks) for name in self.subscribers}
        faults = []
        try:
            queue = self.open("state/q", subscribers=self.subscribers, **options)
            message_id = queue.put([b"later"])
            for consumer in ("first drain", "second drain"):
                queue = self.crash(name="state/q", subscribers=self.subscribers, **options)
                for name, ledger in ledgers.items():
                    if consumer == "first drain":
                        ledger.sending(b"later")
                        ledger.accepted(b"later", message_id)
                    ids = [message.id for message in drain(queue, name, True, ledger, consumer)]
                    faults += ["out of order"] if ids != sorted(set(ids)) else []
            self.drop()
            if os.path.exists(self.folder("state/dead")):
                ledgers[""].moved(payloads(self.open("state/dead", **options)))
                self.drop()
        except (mq.StorageError, mq.LogFailed, OSError) as error:
            return [f"does not start: {error}"]
        return faults + [fault for ledger in ledgers.values() for fault in ledger.faults()]

    def ledger_of(self, subscriber, marks):
        """Return what one subscriber is owed; what the others took does not concern it."""
        ledger = Ledger()
        for method, *arguments in marks:
            others = set(self.subscribers) - {subscriber}
            if method not in ("delivered", "settled", "returned") or arguments[0] not in others:
                getattr(ledger, method)(*arguments)
        ledger.fault(power_cut=True)
        return ledger

    # -- scenarios

    def user(self, storage, **options):
        return User(self.open(fsync="always", storage=storage, **options), storage)

    def used(self, storage):
        """First start in an empty folder, then everything that a queue does."""
        user = self.user(storage)
        user.put(count=3)
        user.take()
        user.put(600)
        user.take(settle=False)
        user.put_bytes(self.read_log())      # what looks like records must not become some
        user.bookmark()
        user.take()
        user.compact()
        user.put(5000)
        user.take()
        user.put()
        user.compact_without_bookmark()
        user.put()

    def leased(self, storage):
        """Leases that are acked, given back, delayed and run out; a batch; a purge."""
        user = self.user(storage, clock=FakeClock())
        user.put(count=5)
        user.put(delay_s=2)
        user.take(wish=mq.Wish(2, 10_000, 9))
        user.take(settle=False, wish=mq.Wish(0, 0, 9), delay_s=5)
        user.abandon(3)
        user.bookmark()
        user.take(wish=mq.Wish(0, 0, 9))
        user.compact()
        user.take(settle=False, wish=mq.Wish(2, 10_000, 9))
        user.take()
        user.purge()
        user.put(count=2)
        user.take()

    def dead_lettered(self, storage):
        """What came back too often moves to another queue, which is compacted too."""
        config = mq.QueueConfig(name="q", max_deliveries=1, dead_letter="dead")
        user = self.user(storage, config=config)
        target = self.open("dead", fsync="always", storage=storage)
        user.put(count=4)
        user.take(settle=False)
        user.take(settle=False)
        user.move_dead(target)
        user.bookmark()
        user.take(settle=False)
        user.compact()
        user.move_dead(target)
        target.compact()
        user.take()

    def broadcast(self, storage):
        """Two subscribers; each has a ledger of its own."""
        self.subscribers = ("a", "b")
        user = self.user(storage, subscribers=self.subscribers)
        user.put(count=4)
        for subscriber in "abbb":
            user.take(subscriber=subscriber)
        user.bookmark()
        user.take(settle=False, subscriber="b")
        user.compact()
        user.put()
        user.take(subscriber="a")
        user.put(600)
        user.take(subscriber="b")

    def switched(self, storage):
        """A fifo queue, partly taken, becomes a broadcast queue: each gets what was waiting."""
        first = Recorder()
        user = self.user(first)
        user.put(count=5)
        held = user.queue.take()
        user.take()
        user.queue.retry(held)
        user.take(settle=False)
        user.bookmark()
        self.drop()
        for call in first.calls:
            if call[0] == "ledger":
                storage.note(*call)
        storage.tell("fault", True)
        storage.adopt(self.folder())
        self.subscribers = ("a", "b")
        user = self.user(storage, subscribers=self.subscribers)
        user.name = "again"
        user.take(subscriber="b")
        user.put()

    def short_of_space(self, storage):
        """A batch that the disk takes only a part of, then what fits, over its remains."""
        user = self.user(storage)
        user.put()
        user.refused_put(3, short_by=100)
        user.take()
        user.put()

    def together(self, storage):
        """Puts at the same time, which share syncs, beside takes."""
        queue = self.open(fsync="always", storage=storage)
        users = [User(queue, storage, name) for name in "mno"]

        def work(user):
            for number in range(3):
                user.put(number)
            user.take()

        together(*[functools.partial(work, user) for user in users])

    def recovered(self, storage):
        """A start from what a kill left: a bookmark, damage in the middle, a torn tail."""
        first = Recorder()
        user = self.user(first)
        user.put(count=3)
        user.take()
        user.bookmark()
        end = user.queue.log.tail
        user.put()
        user.put()
        self.drop()
        with open(self.log_path(), "r+b") as file:
            file.seek(end + 4)
            file.write(b"damage")
            file.seek(0, os.SEEK_END)
            file.write(b"torn" * 40)
        marks = [call[1:] for call in first.calls if call[0] == "ledger"]
        damaged = [mark for mark in marks if mark[1:2] != (b"m4 ",)]
        for method, *arguments in damaged:
            storage.tell(method, *arguments)
        storage.tell("fault", True)
        storage.adopt(self.folder())
        User(self.open(fsync="always", storage=storage), storage, "again").put()

    def taken_over(self, storage):
        """A folder of the Go server."""
        items = [b"m%d" % number for number in range(4)]
        data = b"".join(struct.pack(">Q", len(item)) + item for item in items)
        self.write_log(data)
        self.put_meta({"head_offset": 10, "tail_offset": len(data)})
        for number, item in enumerate(items):
            storage.tell("sending", item)
            if number:
                storage.tell("accepted", item, number)
        storage.adopt(self.folder())
        self.user(storage).put()

    def random_run(self, storage):
        """Any order of what a queue does, kills and starts among it."""
        user = self.user(storage, clock=FakeClock())
        wishes = (mq.ONE, mq.Wish(0, 0, 5), mq.Wish(3, 1000, 5))
        acts = [*[lambda: user.put(self.rng.choice((0, 100, 700)), self.rng.choice((1, 1, 4)))] * 4,
                *[lambda: user.take(self.rng.random() < 0.7, self.rng.choice(wishes),
                                    self.rng.choice((0, 0, 3)))] * 5,
                lambda: user.put(delay_s=3), lambda: user.abandon(2), lambda: user.bookmark(),
                lambda: user.compact(), lambda: user.refused_put(2, 150), lambda: user.purge()]
        for _ in range(12):
            self.rng.choice(acts)()
            if self.rng.random() < 0.1:
                user.queue = self.crash(fsync="always", storage=storage, clock=FakeClock())
                storage.tell("fault")

    def test_no_power_cut_loses_repeats_or_makes_up_a_message(self):
        for scenario, share in ((self.used, 0.4), (self.short_of_space, 0.5),
                                (self.leased, 0.4), (self.dead_lettered, 0.4),
                                (self.broadcast, 0.4), (self.switched, 1),
                                (self.together, 0.4), (self.recovered, 1), (self.taken_over, 1)):
            with self.subTest(scenario=scenario.__name__):
                self.tried = 0
                fault = self.faults_of(scenario, 1 if TORTURE else share,
                                       nested=0.1 if TORTURE else 0.01)
                self.assertIsNone(fault)
                self.assertGreater(self.tried, 50)

    def test_no_power_cut_after_a_random_run_does_either(self):
        for run in range(500 if TORTURE else 6):
            with self.subTest(run=run):
                self.assertIsNone(self.faults_of(self.random_run, 1 if TORTURE else 0.05))

    # Controls: the same without one of the means, which must then be missed.

    def test_a_sync_that_does_nothing_is_reported(self):
        for call in ("fdatasync", "folder"):
            with self.subTest(left_out=call):
                self.assertRegex(self.faults_of(self.used, broken=(call,)), "lost|told")

    def test_a_short_write_that_is_not_cut_off_is_reported(self):
        self.assertRegex(self.faults_of(self.short_of_space, broken=("truncate",)),
                         "refused, yet delivered|was used for")

    def test_a_crc_that_does_not_tell_its_place_is_reported(self):
        with unittest.mock.patch.object(mq, "Codec", UnseededCodec):
            self.assertRegex(self.faults_of(self.used), "duplicated")


# ---- HTTP ---------------------------------------------------------------------------------

class ServerTest(Folder):
    """A server in this process, on port 0."""

    settings = {}
    clock = None

    def configure(self, value):
        """Change the config before the server starts."""

    def setUp(self):
        super().setUp()
        value = example_config(listen_port=0, path=self.base, fsync="no", min_free_bytes=0,
                               **self.settings)
        self.configure(value)
        config = mq.parse_config(value)
        self.broker = mq.Broker(config, self.fail_storage, self.clock)
        self.broker.lock()
        self.server = mq.Server(self.broker)
        self.port = self.server.server_address[1]
        self.failures = []
        self.serve()
        self.broker.recover()
        self.queue = self.broker.queues["fetcher"]
        self.addCleanup(self.stop)

    def serve(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fail_storage(self, failure):
        self.failures.append(failure)
        raise SystemExit                     # of this thread, in place of the process

    def stop(self):
        with contextlib.suppress(mq.LogFailed):
            self.server.drain()
        self.close_connections()
        self.server.poll.epoll.close()

    def wire(self):
        wire = Wire(self.port)
        self.addCleanup(wire.close)
        return wire

    def open_connections(self):
        """Return how many connections the server has."""
        return len(self.server.poll.handlers)

    def close_connections(self):
        """Close all connections, as the end of the process would."""
        for handler in list(self.server.poll.handlers.values()):
            handler.close()

    def waiting_consumers(self):
        return waiting_consumers(*self.broker.queues.values())

    def leave_free(self, size):
        """Have the server want so many bytes free on the disk, and look."""
        self.broker.space._min_free_bytes = size
        self.broker.space.look()

    def allow_messages_of(self, size):
        self.broker.config.settings.__dict__["max_message_bytes"] = size

    def call(self, method, path, body=b"", expect=200, token=ADMIN, headers=()):
        """Make one request on a new connection; return (headers, body)."""
        answer = ask(self.port, method, path, body, token, headers)
        if expect is not None:
            self.assertEqual(answer.status, expect, (method, path, answer.body))
        return answer.headers, answer.body


class ParseTest(unittest.TestCase):
    def test_whatever_a_client_sends_is_read_in_linear_time(self):
        def head(line):                      # of HTTP/1.0, where no Host is needed
            return lambda text: mq.parse_request(b"GET / HTTP/1.0\r\n" + line % text)

        def pieces(text):
            return lambda: [mq.check_head(piece, 0, len(piece) - 64) for piece in
                            [text[:end] for end in range(64, len(text), 64)]]

        def field(line):
            return lambda text: mq.parse_fields([line % text])

        def query(text):
            return mq.parse_parameters(text.decode(), mq.ACTIONS["out"])

        worst = [
            *[(field(line), b" ") for line in (b"A:%b\x01", b"A:x%by", b"A:%b", b"A%b:")],
            *[(field(b"A:%b\x01"), unit) for unit in (b"\t ", b"x ", b"a:", b"\xff")],
            *[(field(b"%b"), unit) for unit in (b"a", b"a:", b": ")],
            *[(mq.parse_request_line, unit) for unit in (b"A", b" ", b"A ", b"http://", b"/")],
            *[(lambda text: mq.parse_request_line(b"GET /" + text), unit)
              for unit in (b"x", b"x ", b"HTTP/1.", b"http://")],
            *[(head(b"Host:%b"), unit) for unit in (b" ", b"%41", b"%4", b":", b"[", b"[:", b"1")],
            *[(head(b"Authorization: bearer%b\x80"), unit) for unit in (b" ", b" x", b"x")],
            *[(head(b"Connection: %b"), unit) for unit in (b",", b"a,", b" ,", b"close ")],
            *[(head(b"Content-%b"), unit) for unit in (b"Type: ;", b"Length: 1", b"1")],
            *[(lambda text: mq.parse_chunk_line(b"5" + text + b"\x01"), unit) for unit in (
                b" ", b";", b";a", b" ; a ", b";a=b", b";a = b ", b';a="', b';a="\\"', b';a="b"',
                b"0", b";a ", b"\\", b"; ", b"a=")],
            *[(query, unit) for unit in (b"&", b"wait=", b"=", b"a", b"wait=1&", b"1")],
            *[(pieces, unit) for unit in (b"a", b"a\r\n", b"GET / HTTP/1.1\r\n", b" ")],
        ]
        for read, unit in worst:
            before_s = math.inf
            for size in (500, 2000, 8000, 32000):
                seconds, text = math.inf, unit * (size // len(unit))
                work = read(text) if read is pieces else functools.partial(read, text)
                for _ in range(3):
                    started = time.thread_time()
                    with contextlib.suppress(mq.ApiError):
                        work()
                    seconds = min(seconds, time.thread_time() - started)
                self.assertLessEqual(seconds, 8 * before_s + 0.001, (read, unit, size))
                before_s = seconds

    def test_too_many_lines_are_refused_without_splitting_them(self):
        body = b"ab\n" * 500_000
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        with self.assertRaises(mq.ApiError) as caught:
            mq.split_lines(body)
        self.assertEqual(caught.exception.status, 413)
        self.assertLess(tracemalloc.get_traced_memory()[1], 3 * len(body))


class ApiTest(ServerTest):
    settings = {"max_message_bytes": 100_000}

    def test_a_message_goes_in_and_out_with_its_headers(self):
        headers, body = self.call("POST", "/in/fetcher", b'{"a": 1}', token=POST)
        self.assertEqual((headers["Message-Id"], body), ("1", b""))
        headers, body = self.call("GET", "/out/fetcher", token=GET)
        self.assertEqual(body, b'{"a": 1}')
        for name, value in (("Content-Type", "application/json"), ("Message-Id", "1"),
                            ("Message-Age", "0"), ("Delivery-Count", "1"),
                            ("Server", "micro-queue"), ("Cache-Control", "no-store")):
            self.assertEqual(headers[name], value)
        headers, body = self.call("GET", "/out/fetcher", expect=404, token=GET)
        self.assertEqual((body, headers["Message-Count"]), (b"Queue is empty\n", "0"))

    def test_any_bytes_come_back_as_they_were(self):
        for body in (bytes(range(256)) * 300, b"\n", b"a\r\nb", b"\0"):
            self.call("POST", "/in/fetcher", body)
            self.assertEqual(self.call("POST", "/out/fetcher")[1], body)

    def test_who_may_do_what(self):
        cases = [
            ("POST", "/in/fetcher", None, 401), ("POST", "/in/fetcher", "x" * 30, 401),
            ("POST", "/in/fetcher", GET, 403), ("GET", "/out/fetcher", POST, 403),
            ("GET", "/out/fetcher", OTHER, 403), ("GET", "/compact/fetcher", POST, 403),
            ("GET", "/out/nowhere", GET, 403), ("GET", "/out/nowhere", ADMIN, 404),
            ("GET", "/nothing/fetcher", GET, 404), ("GET", "/nothing/fetcher", None, 401),
            ("GET", "/in/fetcher", POST, 405), ("DELETE", "/out/fetcher", GET, 405),
            ("HEAD", "/out/fetcher", GET, 405), ("GET", "/out/fetcher?x=1", GET, 400),
            ("GET", "/out/fetcher?", GET, 404), ("GET", "/out/fetcher/", GET, 404),
            ("GET", "/compact/fetcher", ADMIN, 200), ("POST", "/compact/fetcher", ADMIN, 200),
            ("GET", "/out", GET, 404), ("GET", "/out//fetcher", GET, 404),
            ("GET", "/out/../fetcher", GET, 404), ("GET", "/out/%66etcher", GET, 404),
            ("GET", "/metrics/x", ADMIN, 404), ("POST", "/", None, 405),
            ("GET", "/out/fetcherhttp://x", GET, 404), ("GET", "http://x/readyz", None, 200),
            ("GET", "HTTP://x/out/fetcher?max=1", GET, 404),
            ("GET", "/", None, 200), ("GET", "/healthz?x=1", None, 200),
            ("GET", "/readyz", None, 200), ("GET", "/metrics", None, 200),
        ]
        for method, path, token, status in cases:
            with self.subTest(method=method, path=path, status=status):
                headers, body = self.call(method, path, token=token, expect=status)
                if status >= 400 and method != "HEAD":
                    self.assertEqual(body.count(b"\n"), 1)
                if status == 401:
                    self.assertEqual(headers["WWW-Authenticate"], "Bearer")
                if status == 405:
                    self.assertIn("OPTIONS", headers["Allow"])
                if status == 404 and not re.search(r"/out/fetcher([/?]|$)", path):
                    self.assertNotIn("Message-Count", headers)

    def test_malformed_authorization_is_401(self):
        for value in ("Bearer", "Basic abc", f"Bearer {ADMIN} x", ADMIN, ""):
            self.call("GET", "/out/fetcher", token=None, expect=401,
                      headers=[f"Authorization: {value}"])
        self.call("GET", "/out/fetcher", token=None, expect=404,
                  headers=[f"Authorization: bEARER {ADMIN}"])

    def test_bad_messages_are_refused_and_the_connection_goes_on(self):
        wire = self.wire()
        for sent, status in ((request("POST", "/in/fetcher"), 400),
                             (request("GET", "/out/fetcher", b"lease=5"), 400),
                             (request("POST", "/in/fetcher?x=1", b"abc"), 400),
                             (request("POST", "/in/fetcher", b"abc", token=None), 401),
                             (request("POST", "/in/fetcher", b"abc", token=GET), 403)):
            self.assertEqual(wire.send(sent).answer()[0], status)
        headers = ["Content-Encoding: gzip"]
        sent = request("POST", "/in/fetcher", b"abc", headers=headers)
        self.assertEqual(wire.send(sent).answer()[0], 415)
        self.assertEqual(wire.send(request("GET", "/out/fetcher")).answer()[0], 404)

    def test_a_body_that_is_too_large_is_refused_before_it_is_read(self):
        wire = self.wire()
        head = request("POST", "/in/fetcher", headers=["Content-Length: 100001"])
        self.assertEqual(wire.send(head).answer()[0], 413)
        self.assertTrue(wire.at_end())
        chunked = request("POST", "/in/fetcher", headers=["Transfer-Encoding: chunked"])
        self.assertEqual(self.wire().send(chunked + b"fffff\r\n").answer()[0], 413)
        self.assertIsNone(self.queue.take())

    def test_options_and_head(self):
        headers, body = self.call("OPTIONS", "/in/nowhere", token=None)
        self.assertEqual(headers["Allow"], "POST, OPTIONS")
        self.assertIn(b"POST", body)
        self.call("OPTIONS", "*", token=None)
        self.call("OPTIONS", "/", token=None)
        for path in ("/nothing", "/in", "/in/a/b", "/healthz/fetcher", "/In/fetcher"):
            self.call("OPTIONS", path, token=None, expect=404)
        headers, body = self.call("HEAD", "/healthz", token=None)
        self.assertEqual(body, b"")
        self.assertGreater(int(headers["Content-Length"]), 0)

    def test_pipelined_requests_are_answered_in_order(self):
        wire = self.wire()
        wire.send(b"".join(request("POST", "/in/fetcher", b"m%d" % n) for n in range(20))
                  + request("GET", "/out/fetcher") * 21)
        statuses = [wire.answer() for _ in range(41)]
        self.assertEqual([body for _, _, body in statuses[20:40]],
                         [b"m%d" % n for n in range(20)])
        self.assertEqual(statuses[40][0], 404)

    def test_many_connections_lose_and_double_nothing(self):
        """With the library's own client: a second opinion on what an answer is."""
        sent, found = [], []

        def work(number):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            fields = {"Authorization": f"Bearer {ADMIN}"}
            for n in range(40):
                body = b"%d-%d" % (number, n)
                connection.request("POST", "/in/fetcher", body, fields)
                connection.getresponse().read()
                connection.request("GET", "/out/fetcher", headers=fields)
                answer = connection.getresponse()
                data = answer.read()
                sent.append(body)
                found.extend([data] if answer.status == 200 else [])
            connection.close()

        together(*[functools.partial(work, number) for number in range(16)])
        self.assertEqual(sorted(found + payloads(self.queue)), sorted(sent))

    def test_metrics_are_well_formed_and_counted(self):
        self.call("POST", "/in/fetcher", b"x")
        self.call("GET", "/out/fetcher")
        text = self.call("GET", "/metrics", token=None)[1].decode()
        self.assertIn('oxl_micro_queue_messages_in_total{queue_name="fetcher"} 1\n', text)
        self.assertIn('oxl_micro_queue_messages_out_total{queue_name="fetcher"} 1\n', text)
        self.assertIn('oxl_micro_queue_messages_out_total{queue_name="manager-reload"} 0\n', text)
        self.assertIn('http_requests_total{action="in",code="200"} 1\n', text)
        for name, kind, _ in mq.METRICS:
            self.assertIn(f"# TYPE {name} {kind}\n", text)

    def test_while_it_recovers_or_drains_it_says_so(self):
        for reason in (mq.RECOVERING, mq.DRAINING):
            self.broker.unready = reason
            headers = self.call("GET", "/out/fetcher", expect=503)[0]
            self.assertEqual(headers["Retry-After"], "5")
            self.assertIn(reason.encode(), self.call("GET", "/readyz", expect=503, token=None)[1])
            self.call("GET", "/healthz", token=None)
        self.broker.unready = None

    def test_a_nearly_full_disk_refuses_puts_only(self):
        self.call("POST", "/in/fetcher", b"x")
        self.leave_free(1 << 60)
        headers, _ = self.call("POST", "/in/fetcher", b"y", expect=503)
        self.assertEqual(headers["Retry-After"], "5")
        self.assertEqual(self.call("GET", "/out/fetcher")[1], b"x")


class ConsumptionTest(ServerTest):
    """Leases, long polls, batches, delays and limits over HTTP, on a clock of their own."""

    settings = {"max_message_bytes": 1000, "request_timeout": 5}

    def configure(self, value):
        value["queues"] = [{"name": "fetcher", "max_deliveries": 3, "dead_letter": "dead"},
                           {"name": "manager-reload", "max_messages": 3, "max_bytes": 50},
                           {"name": "dead"}, {"name": "short-lived", "ttl": 60}]

    def setUp(self):
        self.clock = FakeClock()
        super().setUp()

    def later(self, seconds):
        """Let time pass, as the timers would notice it."""
        self.clock.passed += int(seconds * 1000)
        for queue in self.broker.queues.values():
            queue.tick()

    def put(self, *messages, path="/in/fetcher"):
        for message in messages:
            self.call("POST", path, message)

    def lease(self, seconds=60, query=""):
        headers, body = self.call("GET", f"/out/fetcher?lease={seconds}{query}")
        self.assertRegex(headers["Lease-Id"], r"^[A-Za-z0-9_-]{16,}$")
        return headers["Lease-Id"], body

    def waiting(self, path="/out/fetcher?wait=30", **options):
        """Return a wire on which a long poll waits."""
        before = self.waiting_consumers()
        wire = self.wire().send(request("GET", path, **options))
        eventually(lambda: self.waiting_consumers() == before + 1)
        return wire

    # -- leases

    def test_a_leased_message_is_done_with_an_ack_and_only_once(self):
        self.put(b"a", b"b")
        lease, body = self.lease()
        self.assertEqual(body, b"a")
        self.assertEqual(self.call("POST", f"/ack/fetcher?lease={lease}")[1], b"")
        for action in ("ack", "nack"):
            self.call("POST", f"/{action}/fetcher?lease={lease}", expect=410)
        self.call("POST", f"/extend/fetcher?lease={lease}&seconds=9", expect=410)
        self.assertEqual(payloads(self.queue), [b"b"])

    def test_a_lease_of_another_queue_is_gone_there_and_good_here(self):
        self.put(b"a")
        lease, _ = self.lease()
        self.call("POST", f"/ack/dead?lease={lease}", expect=410)
        self.call("POST", f"/ack/fetcher?lease={lease}")

    def test_what_is_not_acked_in_time_comes_back_at_its_place(self):
        self.put(b"a", b"b")
        lease, _ = self.lease(10)
        self.later(9.9)
        self.assertEqual(counts(self.queue), (1, 1, 0))
        self.later(0.1)
        self.assertEqual(counts(self.queue), (2, 0, 0))
        self.call("POST", f"/ack/fetcher?lease={lease}", expect=410)
        headers, body = self.call("GET", "/out/fetcher")
        self.assertEqual((body, headers["Delivery-Count"]), (b"a", "2"))

    def test_extend_counts_from_now(self):
        self.put(b"a")
        lease, _ = self.lease(10)
        self.later(9)
        self.call("POST", f"/extend/fetcher?lease={lease}&seconds=10")
        self.later(9)
        self.assertEqual(counts(self.queue), (0, 1, 0))
        self.later(1)
        self.assertEqual(counts(self.queue), (1, 0, 0))

    def test_nack_puts_back_at_once_or_after_a_delay(self):
        self.put(b"a")
        self.call("POST", f"/nack/fetcher?lease={self.lease()[0]}")
        self.call("POST", f"/nack/fetcher?lease={self.lease()[0]}&delay=5")
        self.assertEqual(counts(self.queue), (0, 0, 1))
        self.call("GET", "/out/fetcher", expect=404)
        self.later(5)
        self.assertEqual(self.call("GET", "/out/fetcher")[0]["Delivery-Count"], "3")

    def test_bad_parameters_get_one_line_that_says_what_to_send(self):
        lease = "lease=" + "0" * 24
        for method, path, words in (
                ("GET", "/out/fetcher?lease=0", "1 to 43200"),
                ("GET", "/out/fetcher?lease=abc", "1 to 43200"),
                ("GET", "/out/fetcher?lease=43201", "1 to 43200"),
                ("GET", "/out/fetcher?max=0", "1 to 1000"),
                ("GET", "/out/fetcher?max=1001", "1 to 1000"),
                ("GET", "/out/fetcher?wait=-1", "0 to 300"),
                ("GET", "/out/fetcher?wait=301", "0 to 300"),
                ("GET", "/out/fetcher?wait=1.5", "0 to 300"),
                ("GET", "/out/fetcher?wait=", "empty"), ("GET", "/out/fetcher?wait", "empty"),
                ("GET", "/out/fetcher?wait=1&wait=1", "repeated"),
                ("GET", "/out/fetcher?delay=1", "known here: wait, lease, max"),
                ("GET", "/peek/fetcher?lease=5", "known here: max"),
                ("POST", "/in/fetcher?delay=2592001", "0 to 2592000"),
                ("POST", "/in/fetcher?delay=000000001", "0 to 2592000"),
                ("POST", "/ack/fetcher", "lease is missing"),
                ("POST", "/ack/fetcher?lease=60", "the Lease-Id"),
                ("POST", f"/extend/fetcher?{lease}", "seconds is missing"),
                ("POST", f"/extend/fetcher?{lease}&seconds=0", "1 to 43200"),
                ("POST", f"/nack/fetcher?{lease}&delay=x", "0 to 2592000")):
            with self.subTest(path=path):
                body = self.call(method, path, b"", expect=400)[1]
                self.assertIn(words.encode(), body)
                self.assertEqual(body.count(b"\n"), 1)
        self.call("GET", f"/ack/fetcher?{lease}", expect=405)
        self.call("POST", f"/ack/fetcher?{lease}", expect=410)

    def test_who_may_settle(self):
        self.put(b"a")
        lease, _ = self.lease()
        for token, status in ((None, 401), (POST, 403), (OTHER, 403), (GET, 200)):
            self.call("POST", f"/ack/fetcher?lease={lease}", token=token, expect=status)

    # -- long polls

    def test_those_who_wait_are_served_in_the_order_they_came(self):
        wires = [self.waiting() for _ in range(3)]
        self.put(b"a", b"b", b"c")
        self.assertEqual([wire.answer()[2] for wire in wires], [b"a", b"b", b"c"])
        eventually(lambda: self.queue.out_total == 3)

    def test_a_wait_ends_with_404_and_the_connection_goes_on(self):
        wire = self.waiting("/out/fetcher?wait=3")
        self.later(3)
        self.assertEqual(wire.answer()[0], 404)
        self.put(b"a")
        self.assertEqual(wire.send(request("GET", "/out/fetcher?wait=3")).answer()[2], b"a")
        self.assertEqual(self.call("GET", "/out/fetcher?wait=0", expect=404)[1],
                         b"Queue is empty\n")

    def test_nacks_ends_of_leases_and_of_delays_wake_those_who_wait(self):
        self.put(b"a")
        lease, _ = self.lease(10)
        wire = self.waiting("/out/fetcher?wait=60&lease=20")
        self.call("POST", f"/nack/fetcher?lease={lease}")
        self.assertEqual(wire.answer()[1]["Delivery-Count"], "2")
        wire = self.waiting("/out/fetcher?wait=60")
        self.later(20)
        self.assertEqual(wire.answer()[1]["Delivery-Count"], "3")
        self.put(b"b", path="/in/fetcher?delay=7")
        wire = self.waiting("/out/fetcher?wait=60")
        self.later(7)
        self.assertEqual(wire.answer()[2], b"b")

    def test_a_client_that_hung_up_is_not_handed_anything(self):
        wires = [self.waiting() for _ in range(3)]
        wires[0].close()
        wires[1].reset()
        eventually(lambda: self.waiting_consumers() == 1)
        self.put(b"a")
        self.assertEqual(wires[2].answer()[2], b"a")
        self.assertEqual(self.queue.redelivered_total, 0)

    def test_a_hang_up_is_noticed_however_the_request_came(self):
        text = request("GET", "/out/fetcher?wait=300")
        for parts in ((text[:20], text[20:]), (text + request("GET", "/healthz"), b"")):
            wire = self.wire()
            for part in parts:
                wire.send(part)
                time.sleep(0.02)
            eventually(lambda: self.waiting_consumers() == 1)
            wire.close()
            eventually(lambda: self.waiting_consumers() == 0)
            eventually(lambda: self.open_connections() == 0)

    def test_what_a_waiting_client_sends_is_answered_afterwards(self):
        wire = self.waiting()
        wire.send(request("GET", "/healthz"))
        time.sleep(0.05)
        wire.send(request("GET", "/out/fetcher?wait=5"))
        self.put(b"a", b"b")
        self.assertEqual([wire.answer()[2] for _ in range(3)],
                         [b"a", b"micro_queue is running\n", b"b"])

    def test_unread_bytes_do_not_reset_an_answer_that_closes(self):
        wire = self.waiting(headers=["Connection: close"])
        wire.send(b"\r\n")                   # never read: a close would reset the connection
        time.sleep(0.05)
        self.queue.put([b"x" * 8_000_000])
        self.assertEqual(len(wire.answer()[2]), 8_000_000)

    def test_a_refused_body_that_comes_late_gets_its_answer(self):
        wire = self.wire().send(request("POST", "/in/fetcher", token=None, headers=[
            "Connection: close", "Content-Length: 50000"]))
        time.sleep(0.05)
        self.assertEqual(wire.send(b"x" * 50_000).answer()[0], 401)

    def test_requests_behind_a_long_poll_in_one_packet_wait_for_it(self):
        wire = self.wire().send(request("GET", "/out/fetcher?wait=30") + request("GET", "/healthz"))
        eventually(lambda: self.waiting_consumers() == 1)
        self.put(b"a")
        self.assertEqual([wire.answer()[0], wire.answer()[0]], [200, 200])

    def test_draining_answers_those_who_wait(self):
        wire = self.waiting()
        self.broker.unready = mq.DRAINING
        self.queue.dismiss()
        status, headers, _ = wire.answer()
        self.assertEqual((status, headers["Retry-After"]), (503, "5"))
        self.broker.unready = None

    def test_a_slow_client_that_waits_keeps_nobody_else(self):
        self.allow_messages_of(1 << 26)
        wire = self.waiting()
        self.put(b"x" * (1 << 24))           # answered while the other has not read it
        self.put(b"b")
        self.assertEqual(counts(self.queue), (1, 1, 0))
        self.assertEqual(len(wire.answer()[2]), 1 << 24)
        eventually(lambda: counts(self.queue) == (1, 0, 0))

    # -- batches

    def lines(self, body, path="/in/fetcher", expect=200, kind="Application/X-NDJSON; q=1"):
        return self.call("POST", path, body, expect=expect, headers=[f"Content-Type: {kind}"])

    def test_lines_go_in_as_messages_and_come_out_as_lines(self):
        headers, _ = self.lines(b'{"a":1}\r\n\n{"b":2}\n\r\nlast')
        self.assertEqual((headers["Message-Id"], headers["Message-Count"]), ("1", "3"))
        headers, body = self.call("GET", "/out/fetcher?max=10")
        self.assertEqual(body, b'{"a":1}\n{"b":2}\nlast\n')
        self.assertEqual((headers["Content-Type"], headers["Message-Count"],
                          headers["Message-Id"]), ("application/x-ndjson", "3", "1"))
        eventually(lambda: self.queue.out_total == 3)

    def test_a_batch_is_one_lease(self):
        self.put(b"a", b"b", b"c")
        lease, body = self.lease(60, "&max=2")
        self.assertEqual(body, b"a\nb\n")
        size = self.queue.log.tail
        self.call("POST", f"/ack/fetcher?lease={lease}")
        self.assertLessEqual(self.queue.log.tail - size, mq.HEAD.size + 8)
        self.assertEqual(counts(self.queue), (1, 0, 0))

    def test_a_message_with_line_breaks_comes_alone(self):
        self.put(b"a", b"b\n", b"c\nd", b"e\r", b"\n", b"f")
        seen = []
        for _ in range(5):
            headers, body = self.call("GET", "/out/fetcher?max=10")
            seen.append((body, headers.get("Message-Count"), headers["Content-Type"]))
        plain, lines = "application/json", "application/x-ndjson"
        self.assertEqual(seen, [(b"a\nb\n", "2", lines), (b"c\nd", None, plain),
                                (b"e\r", None, plain), (b"\n", None, plain),
                                (b"f\n", "1", lines)])

    def test_a_batch_ends_before_it_is_too_large_but_is_never_empty(self):
        self.put(b"x" * 600, b"y" * 300, b"z" * 300, b"w" * 1000)
        sizes = [len(self.call("GET", "/out/fetcher?max=10")[1]) for _ in range(3)]
        self.assertEqual(sizes, [902, 301, 1001])

    def test_a_batch_is_taken_whole_or_not_at_all(self):
        self.lines(b"a\n" * 3 + b"x" * 1000, expect=413)
        self.lines(b"\r\n\n", expect=400)
        self.lines(b"1\n2\n3\n4\n", "/in/manager-reload", expect=413)
        self.lines(b"1\n2\n", "/in/manager-reload")
        self.lines(b"3\n4\n", "/in/manager-reload", expect=429)
        self.assertEqual(payloads(self.queue), [])
        self.assertEqual(payloads(self.broker.queues["manager-reload"]), [b"1", b"2"])

    def test_more_than_10000_lines_are_too_many(self):
        self.allow_messages_of(100_000)
        self.lines(b"a\n" * 10_001, expect=413)
        self.lines(b"a\n" * 10_000)

    def test_another_content_type_is_one_message(self):
        self.lines(b"a\nb\n", kind="application/x-www-form-urlencoded")
        self.assertEqual(payloads(self.queue), [b"a\nb\n"])

    # -- limits, expiry, dead letters

    def test_a_full_queue_says_429_until_there_is_room(self):
        self.put(b"a", b"b", b"c", path="/in/manager-reload")
        headers, _ = self.call("POST", "/in/manager-reload", b"d", expect=429)
        self.assertEqual(headers["Retry-After"], "5")
        self.call("GET", "/out/manager-reload")
        self.call("POST", "/in/manager-reload", b"d" * 49, expect=429)
        self.call("POST", "/in/manager-reload", b"d" * 48)
        self.call("POST", "/in/manager-reload", b"d" * 51, expect=413)

    def test_a_message_that_failed_too_often_moves_to_the_dead_letters(self):
        self.put(b"bad", b"good")
        for _ in range(3):
            lease, body = self.lease()
            self.assertEqual(body, b"bad")
            self.call("POST", f"/nack/fetcher?lease={lease}")
        self.assertEqual(self.call("GET", "/out/fetcher")[1], b"good")
        dead = self.broker.queues["dead"]
        eventually(lambda: dead.in_total == 1)
        eventually(lambda: self.queue.numbers()["messages_dead_lettered_total"] == 1)
        headers, body = self.call("GET", "/out/dead")
        self.assertEqual((body, headers["Delivery-Count"]), (b"bad", "1"))
        eventually(lambda: self.queue.out_total == 1)

    def test_dead_letters_wait_where_they_are_while_the_disk_is_full(self):
        dead = self.broker.queues["dead"]
        storage = dead.log.storage = FakeStorage()
        storage.fail("pwrite", errno.ENOSPC)
        self.put(b"bad")
        for _ in range(3):
            self.call("POST", f"/nack/fetcher?lease={self.lease()[0]}")
        move_dead_letters(self.broker, self.queue)
        self.assertEqual((counts(self.queue), counts(dead)), ((0, 1, 0), (0, 0, 0)))
        storage.heal()
        move_dead_letters(self.broker, self.queue)
        self.assertEqual((counts(self.queue), counts(dead)), ((0, 0, 0), (1, 0, 0)))

    def test_what_is_too_old_is_dropped_and_counted(self):
        self.put(b"a", b"b", path="/in/short-lived")
        self.later(59)
        self.put(b"c", path="/in/short-lived")
        self.later(1)
        queue = self.broker.queues["short-lived"]
        self.assertEqual((queue.expired_total, counts(queue)), (2, (1, 0, 0)))
        self.assertEqual(self.call("GET", "/out/short-lived")[1], b"c")

    def test_a_delayed_message_waits(self):
        self.put(b"late", path="/in/fetcher?delay=30")
        self.put(b"now")
        self.assertEqual(self.call("GET", "/out/fetcher")[1], b"now")
        self.call("GET", "/out/fetcher", expect=404)
        self.later(30)
        headers, body = self.call("GET", "/out/fetcher")
        self.assertEqual((body, headers["Message-Age"]), (b"late", "30"))

    # -- peek, purge, stats

    def test_peek_shows_without_taking(self):
        self.put(b"a", b"b")
        for _ in range(2):
            headers, body = self.call("GET", "/peek/fetcher")
            self.assertEqual((body, headers["Delivery-Count"]), (b"a", "0"))
        self.assertEqual(self.call("GET", "/peek/fetcher?max=5")[1], b"a\nb\n")
        headers, body = self.call("HEAD", "/peek/fetcher")
        self.assertEqual((headers["Message-Id"], headers["Content-Length"]), ("1", "1"))
        self.assertEqual(payloads(self.queue), [b"a", b"b"])
        headers, _ = self.call("GET", "/peek/fetcher", expect=404)
        self.assertEqual(headers["Message-Count"], "0")

    def test_purge_drops_all_and_ends_leases(self):
        self.put(b"a", b"b")
        self.put(b"c", path="/in/fetcher?delay=9")
        lease, _ = self.lease()
        self.call("POST", "/purge/fetcher", token=GET, expect=403)
        self.assertEqual(self.call("POST", "/purge/fetcher")[1], b"3\n")
        self.call("POST", f"/ack/fetcher?lease={lease}", expect=410)
        self.later(9)
        self.call("GET", "/out/fetcher", expect=404)
        self.put(b"d")
        self.assertEqual(self.call("GET", "/out/fetcher")[1], b"d")

    def test_stats_tell_a_token_of_its_own_queues(self):
        self.put(b"a", b"b")
        self.put(b"c", path="/in/fetcher?delay=9")
        self.lease()
        self.later(5)
        numbers = json.loads(self.call("GET", "/stats/fetcher", token=GET)[1])
        expected = {"kind": "fifo", "ready": 1, "leased": 1, "delayed": 1,
                    "oldest_message_age_seconds": 5.0, "messages_in_total": 3}
        self.assertEqual({key: numbers[key] for key in expected}, expected)
        self.assertEqual(list(json.loads(self.call("GET", "/stats", token=GET)[1])), ["fetcher"])
        self.assertEqual(len(json.loads(self.call("GET", "/stats/")[1])), 4)
        self.call("GET", "/stats", token=None, expect=401)
        self.call("GET", "/stats/dead", token=GET, expect=403)
        self.call("GET", "/stats/none", expect=404)
        self.call("GET", "/stats?x=1", expect=400)
        self.assertEqual(self.call("HEAD", "/stats")[1], b"")


class BroadcastTest(ServerTest):
    """One put, every subscriber, over HTTP."""

    ALICE, BOB = "alice-" + "0" * 20, "bob-" + "0" * 20
    extra = {}

    def configure(self, value):
        value["queues"] = [{"name": "fetcher", "kind": "broadcast", **self.extra},
                           {"name": "manager-reload"}, {"name": "dead"}]
        value["tokens"] = [
            {"name": "sender", "token": POST, "post": ["fetcher"]},
            {"name": "alice", "token": self.ALICE, "get": ["fetcher"]},
            {"name": "bob", "token": self.BOB, "get": ["fetcher"]},
            {"name": "admin", "token": ADMIN, "get": ["fetcher"], "admin": True}]

    def out(self, token, query="", expect=200):
        return self.call("GET", f"/out/fetcher{query}", token=token, expect=expect)

    def test_every_subscriber_gets_every_message_at_its_own_pace(self):
        for message in (b"1", b"2"):
            self.call("POST", "/in/fetcher", message, token=POST)
        self.assertEqual([self.out(self.ALICE)[1] for _ in range(2)], [b"1", b"2"])
        self.out(self.ALICE, expect=404)
        self.assertEqual(counts(self.queue, "bob"), (2, 0, 0))
        self.assertEqual(self.out(self.BOB, "?max=9")[1], b"1\n2\n")
        eventually(lambda: self.queue.out_total == 4)
        self.assertEqual(self.queue.state.held(), (0, 0))

    def test_leases_and_delivery_counts_are_each_subscribers_own(self):
        self.call("POST", "/in/fetcher", b"1", token=POST)
        alice = self.out(self.ALICE, "?lease=60")[0]["Lease-Id"]
        bob = self.out(self.BOB, "?lease=60")[0]["Lease-Id"]
        self.call("POST", f"/ack/fetcher?lease={alice}", token=self.BOB, expect=410)
        self.call("POST", f"/nack/fetcher?lease={bob}", token=self.BOB)
        self.assertEqual(self.out(self.BOB, "?lease=60")[0]["Delivery-Count"], "2")
        self.call("POST", f"/ack/fetcher?lease={alice}", token=self.ALICE)
        self.assertEqual((counts(self.queue, "alice"), counts(self.queue, "bob")),
                         ((0, 0, 0), (0, 1, 0)))

    def test_all_who_wait_are_woken_by_one_put(self):
        wires = [self.wire().send(request("GET", "/out/fetcher?wait=30", token=token))
                 for token in (self.ALICE, self.BOB)]
        eventually(lambda: self.waiting_consumers() == 2)
        self.call("POST", "/in/fetcher", b"1", token=POST)
        self.assertEqual([wire.answer()[2] for wire in wires], [b"1", b"1"])

    def test_an_admin_is_no_subscriber_but_may_look_and_purge(self):
        self.call("POST", "/in/fetcher", b"1", token=POST)
        self.out(self.ALICE)
        for method, path in (("GET", "/out/fetcher"), ("POST", "/ack/fetcher?lease=" + "0" * 24),
                             ("GET", "/out/fetcher?bad=1"), ("DELETE", "/out/fetcher")):
            body = self.call(method, path, token=ADMIN, expect=403)[1]
            self.assertIn(b"no subscriber", body)
        self.assertEqual(self.call("GET", "/peek/fetcher")[1], b"1")
        self.call("GET", "/peek/fetcher", token=self.ALICE, expect=404)
        numbers = json.loads(self.call("GET", "/stats/fetcher")[1])
        self.assertEqual((numbers["kind"], numbers["ready"]), ("broadcast", 1))
        self.assertEqual({name: item["ready"] for name, item in numbers["subscribers"].items()},
                         {"alice": 0, "bob": 1})
        self.call("GET", "/compact/fetcher")
        self.assertEqual(self.call("POST", "/purge/fetcher")[1], b"1\n")
        self.out(self.BOB, expect=404)

    def test_metrics_tell_of_each_subscriber(self):
        self.call("POST", "/in/fetcher", b"1", token=POST)
        text = self.call("GET", "/metrics", token=None)[1].decode()
        for name in ("alice", "bob"):
            self.assertIn(f'messages{{queue_name="fetcher",subscriber="{name}",state="ready"}} 1\n',
                          text)
            self.assertIn(f'age_seconds{{queue_name="fetcher",subscriber="{name}"}}', text)

    def test_a_laggard_pins_only_what_it_has_not_seen(self):
        for _ in range(100):
            self.call("POST", "/in/fetcher", b"x" * 1000, token=POST)
        while self.out(self.ALICE, "?max=1000", expect=None)[0].get("Message-Id"):
            pass
        self.out(self.BOB, "?max=50")
        eventually(lambda: self.queue.out_total == 150)
        self.call("GET", "/compact/fetcher")
        self.assertLess(self.queue.log.tail, 60_000)
        self.assertEqual(counts(self.queue, "bob"), (50, 0, 0))


class BroadcastLimitTest(BroadcastTest):
    """The same with limits, which count what is held for anyone, and with dead letters."""

    extra = {"max_messages": 100, "max_deliveries": 2, "dead_letter": "dead"}

    def test_limits_count_what_anyone_holds(self):
        self.call("POST", "/in/fetcher", b"\n".join([b"x"] * 100), token=POST,
                  headers=["Content-Type: application/x-ndjson"])
        self.out(self.ALICE, "?max=100")
        self.call("POST", "/in/fetcher", b"y", token=POST, expect=429)
        self.out(self.BOB)
        eventually(lambda: self.queue.out_total == 101)
        self.call("POST", "/in/fetcher", b"y", token=POST)

    def test_dead_letters_are_each_subscribers_own(self):
        self.call("POST", "/in/fetcher", b"1", token=POST)
        for _ in range(2):
            lease = self.out(self.BOB, "?lease=9")[0]["Lease-Id"]
            self.call("POST", f"/nack/fetcher?lease={lease}", token=self.BOB)
        self.out(self.BOB, expect=404)
        eventually(lambda: counts(self.broker.queues["dead"]) == (1, 0, 0))
        self.assertEqual(self.out(self.ALICE)[1], b"1")
        eventually(lambda: self.queue.numbers()["messages_dead_lettered_total"] == 1)
        numbers = json.loads(self.call("GET", "/stats/fetcher")[1])["subscribers"]
        self.assertEqual({name: item["messages_dead_lettered_total"]
                          for name, item in numbers.items()}, {"alice": 0, "bob": 1})


class FramingTest(ServerTest):
    """The table of strict HTTP: each row sent whole and one byte at a time."""

    settings = {"request_timeout": 1, "idle_timeout": 2}
    FIELD = b"POST /in/fetcher HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n" % ADMIN.encode()

    def rows(self, rows, goes_on=False):
        for sent, status in rows:
            for one_by_one in (False, True) if len(sent) < 600 else (False,):
                with self.subTest(sent=sent[:200], one_by_one=one_by_one):
                    self.row(sent, status, one_by_one, goes_on)

    def row(self, sent, status, one_by_one, goes_on):
        with Wire(self.port) as wire:
            answer = wire.send(sent, one_by_one).answer()
            self.assertEqual(answer.status, status, answer)
            if goes_on:
                self.assertEqual(wire.send(request("GET", "/healthz")).answer().status, 200)
            else:
                self.assertEqual(answer.headers.get("Connection"), "close")
                wire.shut()
                self.assertTrue(wire.at_end())

    def test_framing_errors_close(self):
        field = self.FIELD
        chunked = field + b"Transfer-Encoding: chunked\r\n\r\n"
        self.rows([
            (field + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc", 400),
            (field.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n", 400),
            (field + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400),
            (field + b"Content-Length: 3, 3\r\n\r\nabc", 400),
            (field + b"Content-Length: +3\r\n\r\nabc", 400),
            (field + b"Content-Length: 1234567890123456789\r\n\r\nabc", 400),
            (field + b"Content-Length: \r\n\r\nabc", 400),
            (field + b"Transfer-Encoding: gzip\r\n\r\n", 501),
            (field + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            (field + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 400),
            (field + b"A: b\r\n folded\r\n\r\n", 400),
            (field + b"A : b\r\n\r\n", 400),
            (field + b"no colon\r\n\r\n", 400),
            (field + b"na(me: b\r\n\r\n", 400),
            (field + b"A: b\x00c\r\n\r\n", 400),
            (field + b"A: b\x7f\r\n\r\n", 400),
            (field + b"A: b\rc\r\n\r\n", 400),
            (field + b"A: b\nC: d\r\n\r\n", 400),
            (b"GET / HTTP/1.1\nHost: x\n\n", 400),
            (b"\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
            (b"GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n", 400),
            *[(b"GET / HTTP/1.%d\r\nHost: %b\r\n\r\n" % (version, host), 400)
              for host in (b"a/b", b"a@b", b"a#", b"a?", b"a:1:2", b"a:b", b"[::1", b"[::1]x",
                           b"::1", b"a b", b"a,b", b"%4", b"%zz", b"\xe4", b"[]:1")
              for version in (0, 1)],
            (b"GET / HTTP/x\r\nHost: x\r\n\r\n", 400),
            (b"GET / HTTP/1.10\r\nHost: x\r\n\r\n", 400),
            (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
            (b"GET /\r\nHost: x\r\n\r\n", 400),
            (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
            (b"G@T / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
            (b"GET x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
            (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
            (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 100 + b"\r\n", 431),
            (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 33000 + b"\r\n\r\n", 431),
            (field + b"Expect: the-unexpected\r\n\r\n", 417),
            (field + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
            (field + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n", 400),
            (field + b"Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n", 400),
            *[(chunked + b"3" + extension + b"\r\nabc\r\n0\r\n\r\n", 400) for extension in (
                b";a\x01", b";", b"; =x", b";a=", b";a b", b";(a)", b';a="b', b';a="b"c', b";a;",
                b' ;a="\\"', b";a=b=c", b" ", b";a=b ")],
            (chunked + (b"1;" + b"a" * 100 + b"\r\nx\r\n") * 82 + b"0\r\n\r\n", 400),
            (field + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nno colon\r\n\r\n", 400),
        ])
        self.assertIsNone(self.queue.take())

    def test_what_is_allowed_goes_on(self):
        field = self.FIELD
        self.rows([
            (b"\r\n" + request("GET", "/healthz"), 200),
            (b"GET /healthz HTTP/1.9\r\nHost: x\r\n\r\n", 200),
            (b"GET http://x/healthz HTTP/1.1\r\nHost: x\r\n\r\n", 200),
            (b"GET /healthz HTTP/1.1\r\nHost:\r\n\r\n", 200),
            (b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: \t b\tc\x80\xff \r\n\r\n", 200),
            (b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200),
            (b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 99 + b"\r\n", 200),
            (field + b"\r\n", 400),
            (request("OPTIONS", "/in/fetcher", b"abc"), 400),
            (field + b"Content-Length: 3\r\n\r\nabc", 200),
            (field + b"Transfer-Encoding: Chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 200),
            (field + b"Transfer-Encoding: chunked\r\n\r\n"
             b"2;ext=\"x\"\r\nde\r\n001\r\nf\r\n0\r\nTrail: er\r\n\r\n", 200),
            (field + b"Content-Length: 1000001\r\n\r\n"[:0] + b"Content-Length: 0\r\n\r\n", 400),
            *[(b"GET /healthz HTTP/1.1\r\nHost: %b\r\n\r\n" % host, 200) for host in (
                b"", b"a:1", b"a:", b":1", b"[::1]", b"[::1]:80", b"a_b.c~%41!$&'()*+;=", b" a\t")],
            (field + b"Transfer-Encoding: chunked\r\n\r\n"
             b'3 ; a = "b;\\"\t\xe4" ;c\t=d;e\r\nabc\r\n0;f\r\n\r\n', 200),
        ], goes_on=True)
        self.assertEqual(payloads(self.queue), [b"abc"] * 4 + [b"def"] * 2 + [b"abc"] * 2)
        self.rows([(field + b"Transfer-Encoding: chunked\r\n\r\n"
                    + (b"1;" + b"a" * 100 + b"\r\nx\r\n") * 80 + b"0\r\n\r\n", 200)], goes_on=True)
        self.assertEqual(payloads(self.queue), [b"x" * 80])

    def test_a_line_feed_behind_a_body_stands_alone_whatever_the_body_ends_in(self):
        for one_by_one in (False, True):
            wire = self.wire().send(request("PUT", "/in/fetcher", b"1234\r") + b"\n", one_by_one)
            self.assertEqual([wire.answer().status for _ in range(2)], [405, 400])

    def test_old_clients_are_closed_unless_they_ask(self):
        wire = self.wire().send(b"GET /healthz HTTP/1.0\r\n\r\n")
        self.assertEqual(wire.answer()[1]["Connection"], "close")
        self.assertTrue(wire.at_end())

    def test_expect_is_answered_once_nothing_else_is_wrong(self):
        expect = self.FIELD + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n"
        wire = self.wire().send(expect)
        self.assertEqual(wire.answer()[0], 100)
        self.assertEqual(wire.send(b"abc").answer()[0], 200)
        wire = self.wire().send(expect.replace(ADMIN.encode(), GET.encode()))
        self.assertEqual(wire.answer()[0], 403)
        self.assertTrue(wire.at_end())

    def test_a_body_that_is_cut_short_is_not_queued(self):
        for sent in (b"Content-Length: 5\r\n\r\nabc",
                     b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"):
            wire = self.wire().send(self.FIELD + sent)
            wire.shut()
            self.assertTrue(wire.at_end())
        self.assertIsNone(self.queue.take())

    def test_a_slow_request_is_408_and_an_idle_connection_is_closed(self):
        slow = self.wire().send(b"GET / HT")
        body = self.wire().send(self.FIELD + b"Content-Length: 5\r\n\r\nab")
        idle = self.wire()
        self.assertEqual(slow.answer()[0], 408)
        self.assertEqual(body.answer()[0], 408)
        self.assertTrue(idle.at_end())

    def test_a_client_that_does_not_take_its_answer_loses_the_message_to_the_next(self):
        big = os.urandom(1 << 20) * 12
        self.queue.put([big])
        wire = self.wire()
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.send(request("GET", "/out/fetcher"))
        eventually(lambda: self.queue.redelivered_total)
        delivery = self.queue.take()
        self.assertEqual(delivery.messages[0].payload, big)
        self.assertEqual(delivery.messages[0].delivery, 2)

    def test_a_client_that_resets_at_any_byte_loses_nothing(self):
        sent = request("GET", "/out/fetcher")
        self.queue.put([b"x" * 200_000])
        for cut in range(0, len(sent) + 1, 7):
            Wire(self.port).send(sent[:cut]).reset()
        self.assertEqual(self.wire().send(request("GET", "/healthz")).answer()[0], 200)

    def test_a_large_refused_body_does_not_reset_the_answer(self):
        head = self.FIELD.replace(ADMIN.encode(), GET.encode())
        wire = self.wire()
        threading.Thread(target=wire.send, daemon=True, args=(
            head + b"Content-Length: 3000000\r\n\r\n" + bytes(3_000_000),)).start()
        self.assertEqual(wire.answer()[0], 403)


class RoundsTest(ServerTest):
    """A server whose rounds the test makes: what is done in which is not left to chance. At the
    end nothing may be held for clients that left."""

    settings = {"max_message_bytes": 1 << 20, "max_inflight_bytes": 2 << 20}

    def serve(self):
        ample = unittest.mock.patch.multiple(mq, SHARE_S=9, EVENTS_S=9, BACKLOG_S=9)
        ample.start()                        # on a busy machine too: steps are counted here
        self.addCleanup(ample.stop)
        self.poll, self.wires = self.server.poll, []
        self.answered = self.poll.service.answered

    def stop(self):
        for wire in self.wires:
            wire.close()
        try:
            self.until(lambda: not self.poll.handlers)
            self.assertEqual(self.broker.budget.held, 0)
        finally:
            self.server._ended.set()         # no thread serves
            super().stop()

    def pair(self):
        """Return a wire to a connection of the poll; its `handler` is that."""
        wire = PairWire()
        wire.handler = mq.Handler(wire.other, ("pair", len(self.wires)), self.poll)
        self.poll.add(wire.handler)
        self.wires.append(wire)
        return wire

    def pairs(self, count, *sent):
        return [self.pair().send(b"".join(sent)) for _ in range(count)]

    def round(self, count=1, seconds=0):
        for _ in range(count):
            self.poll.wait(seconds)
            self.poll.end_round()

    def until(self, condition):
        eventually(lambda: self.round(seconds=0.001) or condition(), pause_s=0)

    def push(self, wire, data):
        """Send what a socket does not hold at once, with rounds between."""
        wire.socket.setblocking(False)
        at = 0
        while at < len(data):
            with contextlib.suppress(BlockingIOError):
                at += wire.socket.send(data[at:at + 100_000])
            self.round()
        wire.socket.settimeout(ANSWER_S)
        return wire

    def answer_to(self, wire):
        """Return an answer that no socket holds at once."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(wire.answer)
            self.until(answer.done)
            return answer.result()

    def at_end(self, wire):
        wire.shut()
        self.round(2)
        return wire.at_end()

    def statuses(self, wires):
        """Return what the last rounds answered, without waiting for more."""
        return [None if wire.is_silent() else wire.answer().status for wire in wires]

    @contextlib.contextmanager
    def fake_time(self):
        """Have the server's monotonic clock stand, but for `passed` seconds."""
        clock = unittest.mock.Mock(wraps=time, passed=0)
        start, steps = time.monotonic(), itertools.count()
        clock.monotonic = lambda: start + clock.passed + next(steps) * 1e-6
        with unittest.mock.patch.object(mq, "time", clock):
            yield clock

    def pass_seconds(self, clock, seconds):
        clock.passed += seconds
        self.server.serve_round(0)

    # -- shares

    def test_who_pipelines_without_end_gets_a_share_of_each_round(self):
        crowd = self.pairs(40, request("GET", "/healthz", token=None) * 900)
        honest = self.pair().send(request("GET", "/readyz"))
        self.poll.wait(0)
        self.assertEqual(self.answered["readyz", 200], 1)
        self.assertEqual(self.answered["healthz", 200], len(crowd) * mq.SHARE_REQUESTS)
        self.poll.end_round()
        self.assertEqual(honest.answer().status, 200)
        for answers in range(2, 5):          # who comes later waits no longer
            before = self.answered["healthz", 200]
            for wire in crowd:               # are in the backlog, and told of more
                wire.send(request("GET", "/healthz", token=None))
            honest.send(request("GET", "/readyz"))
            self.poll.wait(0)
            self.assertEqual(self.answered["readyz", 200], answers)
            self.assertEqual(self.answered["healthz", 200], before)
            self.poll.end_round()

    def test_a_share_is_one_of_time_too(self):
        self.pairs(5, request("GET", "/healthz", token=None) * 9)
        with unittest.mock.patch.object(mq, "SHARE_S", -1):
            self.poll.wait(0)
        self.assertEqual(self.answered["healthz", 200], 5)
        self.round()
        self.assertEqual(self.answered["healthz", 200], 45)
        self.pairs(5, request("GET", "/readyz", token=None))
        with unittest.mock.patch.multiple(mq, EVENTS_S=-1, BACKLOG_S=-1):
            self.round()
        self.assertEqual(self.answered["readyz", 200], 0)
        self.round()
        self.assertEqual(self.answered["readyz", 200], 5)

    def test_what_expires_keeps_nobody_waiting(self):
        queue, holds = self.queue, []
        queue.config, queue._clock = dataclasses.replace(queue.config, ttl=1), FakeClock()
        queue.tick = lambda: mq.NEVER        # the timers are busy
        for _ in range(3):
            queue.put([b"old"] * mq.AT_ONCE)
        queue._clock.passed += 1000
        queue.put([b"new"])

        def expire(now_ms):
            holds.append(now_ms)
            mq.Queue._expire_locked(queue, now_ms)

        wire, = self.pairs(1, request("GET", "/out/fetcher"))
        with unittest.mock.patch.object(queue, "_expire_locked", expire):
            self.round()
        self.assertLess(len(holds), 4)
        self.assertEqual(wire.handler.state, mq.LATE)
        del queue.tick
        while queue.tick() <= queue._clock.monotonic_ms():
            pass
        self.round()
        self.assertEqual((wire.answer().body, queue.expired_total), (b"new", 3 * mq.AT_ONCE))

    def test_nothing_is_received_while_a_whole_request_stands_unserved(self):
        wire = self.pair()
        wire.socket.setblocking(False)
        for _ in range(50):
            with contextlib.suppress(BlockingIOError):
                wire.socket.send(request("GET", "/out/fetcher?wait=300") * 2000)
            self.round()
            self.assertLessEqual(unused_bytes(wire.handler), mq.RECEIVE_BYTES)
        self.assertEqual(wire.handler.state, mq.LATE)

    def test_chunks_of_one_byte_are_a_share_too(self):
        head = request("POST", "/in/fetcher", headers=["Transfer-Encoding: chunked"])
        body = b"1\r\nx\r\n" * 9000
        wires = self.pairs(10, head + body)
        honest = self.pair().send(request("GET", "/readyz"))
        self.poll.wait(0)
        self.assertEqual(self.answered["readyz", 200], 1)
        for wire in wires:
            used = len(head + body) - unused_bytes(wire.handler)
            self.assertLessEqual(used, len(head) + 6 * mq.SHARE_CHUNKS)
        self.poll.end_round()
        for wire in (*wires, honest):
            wire.send(b"0\r\n\r\n")
        self.until(lambda: self.answered["in", 200] == 10)
        self.assertEqual({len(payload) for payload in payloads(self.queue)}, {9000})

    # -- writes

    def test_what_a_round_put_is_one_write_and_what_it_settled_one_record(self):
        self.queue.log.storage = storage = FakeStorage()
        wires = self.pairs(20, request("POST", "/in/fetcher", b"x"))
        self.round()
        self.assertEqual(self.statuses(wires), [200] * 20)
        self.assertEqual(storage.calls, ["pwrite"])
        tail = self.queue.log.tail
        for wire in wires:
            wire.send(request("GET", "/out/fetcher"))
        self.round()
        self.assertEqual(self.statuses(wires), [200] * 20)
        self.assertEqual(storage.calls.count("pwrite"), 2)
        marks = [record for _, _, record in self.queue.log.scan(tail, self.queue.log.tail)]
        self.assertEqual([mark.type for mark in marks], [mq.SETTLED])

    def test_a_full_disk_refuses_each_put_of_the_round_and_applies_none(self):
        self.queue.log.storage = storage = FakeStorage()
        storage.fail("pwrite", errno.ENOSPC)
        wires = self.pairs(5, request("POST", "/in/fetcher", b"x"))
        before = self.queue.log.tail, self.queue.state.next_id
        self.round()
        self.assertEqual(self.statuses(wires), [503] * 5)
        self.assertEqual(before, (self.queue.log.tail, self.queue.state.next_id))
        self.assertEqual(counts(self.queue), (0, 0, 0))
        storage.heal()
        self.assertEqual(self.statuses(self.pairs(1, request("POST", "/in/fetcher", b"y"))), [None])
        self.round()
        self.assertEqual(payloads(self.queue), [b"y"])

    def test_a_put_and_an_ack_are_written_before_their_answer_a_take_behind_it(self):
        self.queue.log.storage = storage = FakeStorage()
        wire, silent = self.pair(), []
        storage.before["pwrite"] = lambda *_: silent.append(wire.is_silent())

        def ask(method, path, body=b""):
            del silent[:]
            wire.send(request(method, path, body))
            self.round()
            return wire.answer()

        ask("POST", "/in/fetcher", b"a")
        self.assertEqual(silent, [True])
        lease = ask("GET", "/out/fetcher?lease=60").headers["Lease-Id"]
        self.assertEqual(silent, [])
        self.assertEqual(ask("POST", f"/ack/fetcher?lease={lease}").status, 200)
        self.assertEqual(silent, [True])
        ask("POST", "/in/fetcher", b"b")
        self.assertEqual(ask("GET", "/out/fetcher").body, b"b")
        self.assertEqual(silent, [False])
        storage.before.clear()

    def test_a_kill_within_a_round_repeats_what_it_handed_out(self):
        self.queue.put([b"a"])
        wire = self.pair().send(request("GET", "/out/fetcher"))
        with unittest.mock.patch.object(self.broker, "end_round"):       # the kill comes before
            self.round()
            self.assertEqual(wire.answer().body, b"a")
            shutil.copytree(self.folder("fetcher"), self.folder("killed"))
        self.round()
        shutil.copytree(self.folder("fetcher"), self.folder("later"))
        self.assertEqual([payloads(self.open(name)) for name in ("killed", "later")], [[b"a"], []])


    # -- the state table

    def test_a_late_answer_is_given_once_and_another_puts_back_what_it_took(self):
        self.queue.put([b"a"])
        wire = self.pair().send(request("POST", "/in/fetcher", b"b"))
        self.poll.wait(0)
        self.assertEqual(wire.handler.state, mq.LATE)
        self.broker.end_round()
        wire.handler.finish_with(mq.answer_with(self.queue, self.queue.take()))
        self.assertEqual(counts(self.queue), (1, 1, 0))
        self.poll.end_round()
        self.assertEqual((wire.answer().body, wire.handler.state), (b"", mq.READ))
        self.assertTrue(wire.is_silent())
        self.assertEqual([m.payload for m in drain(self.queue)], [b"a", b"b"])

    def test_a_hang_up_is_only_noted_while_an_answer_is_late(self):
        wire = self.pair().send(request("POST", "/in/fetcher", b"a"))
        self.poll.wait(0)
        wire.close()
        self.poll.wait(0)
        self.assertEqual(wire.handler.state, mq.LATE)
        self.poll.end_round()
        self.round()
        self.assertEqual(wire.handler.state, mq.CLOSED)
        self.assertEqual(payloads(self.queue), [b"a"])

    def test_a_long_poll_of_a_client_that_left_is_not_handed_anything(self):
        for leave in (PairWire.close, PairWire.shut):
            wire = self.pair().send(request("GET", "/out/fetcher?wait=60"))
            self.round()
            leave(wire)
            self.queue.put([b"a"])           # before the poll could see it
            self.assertEqual(counts(self.queue), (1, 0, 0))
            self.round(2)
            self.assertEqual(wire.handler.state, mq.CLOSED)
            self.assertEqual(self.waiting_consumers(), 0)
            self.assertEqual([m.delivery for m in drain(self.queue)], [1])

    def test_who_sends_no_more_still_gets_its_answers(self):
        wire = self.pair().send(request("POST", "/in/fetcher", b"a") + request("GET", "/healthz")
                                + request("GET", "/out/fetcher") + request("GET", "/readyz"))
        wire.shut()
        self.round(4)
        self.assertEqual([wire.answer().body for _ in range(4)],
                         [b"", b"micro_queue is running\n", b"a", b"ready\n"])
        self.assertTrue(wire.at_end())
        self.assertEqual(counts(self.queue), (0, 0, 0))

    def test_an_answer_that_closes_waits_for_the_client_but_not_for_ever(self):
        with self.fake_time() as clock:
            wires = self.pairs(2, request("POST", "/in/fetcher", token=None, headers=[
                "Content-Length: 900000"]))
            self.round()
            self.assertEqual(self.statuses(wires), [401, 401])
            self.assertEqual([wire.handler.state for wire in wires], [mq.LINGER] * 2)
            self.assertTrue(self.at_end(wires[0]))
            self.assertEqual(wires[0].handler.state, mq.CLOSED)
            self.pass_seconds(clock, mq.LINGER_S / 2)
            self.assertEqual(wires[1].handler.state, mq.LINGER)
            self.pass_seconds(clock, mq.LINGER_S)
            self.assertEqual(wires[1].handler.state, mq.CLOSED)

    def test_who_sends_on_does_not_put_off_the_end_of_an_answer_that_closes(self):
        with self.fake_time() as clock:
            wire, = self.pairs(1, request("POST", "/in/fetcher", token=None, headers=[
                "Content-Length: 900000"]))
            for _ in range(8):
                self.pass_seconds(clock, mq.LINGER_S / 2)
                wire.send(b"x")
            self.assertEqual(wire.handler.state, mq.CLOSED)

    def test_100_continue_comes_only_where_the_body_is_awaited(self):
        expect = request("POST", "/in/fetcher", headers=["Expect: 100-continue",
                                                         "Content-Length: 3"])
        begun, waits = self.pairs(1, expect, b"a") + self.pairs(1, expect)
        self.round()
        self.assertEqual(self.statuses([begun, waits]), [None, 100])
        begun.send(b"bc")
        waits.send(b"abc")
        self.round()
        self.assertEqual(self.statuses([begun, waits]), [200, 200])

    # -- memory

    BIG = bytes(1 << 20)
    BIG_PUT = request("POST", "/in/fetcher", headers=["Content-Length: 1048576"])

    def test_what_clients_hold_is_bounded_and_a_message_always_fits_for_takes(self):
        other = self.broker.queues["manager-reload"]
        for _ in range(3):
            self.queue.put([self.BIG])
        first = self.push(self.pair(), self.BIG_PUT + self.BIG[:700_000])
        crossing = self.push(self.pair(), self.BIG_PUT + self.BIG[:500_000])
        answer = crossing.answer()
        self.assertEqual((answer.status, answer.headers["Connection"]), (503, "close"))
        self.assertLess(self.broker.budget.held, 1 << 20)
        taker, = self.pairs(1, request("GET", "/out/fetcher"))
        self.round()
        self.assertFalse(taker.is_silent())  # it fits, and is not read
        asking = [self.pair().send(request("GET", path)) for path in (
            "/out/fetcher", "/peek/fetcher", "/out/manager-reload", "/out/manager-reload?wait=60")]
        other.put([b"small"])
        self.round()
        other.put([self.BIG])
        self.round()
        self.assertEqual(self.statuses(asking), [503, 503, 200, None])
        waits = asking[3]
        self.assertEqual(self.answer_to(taker).body, self.BIG)
        self.assertEqual(self.answer_to(waits).body, self.BIG)           # there is room again
        self.push(first, self.BIG[700_000:])
        self.assertEqual(self.answer_to(first).status, 200)
        self.assertEqual(counts(self.queue), (3, 0, 0))

    def test_who_began_to_wait_while_there_was_no_room_is_answered_once_there_is(self):
        self.queue.put([self.BIG])
        self.broker.budget.hold(1 << 21)
        waits, = self.pairs(1, request("GET", "/out/fetcher?wait=60"))
        self.round()
        self.assertEqual(self.waiting_consumers(), 1)
        self.broker.budget.hold(-(1 << 21))
        self.queue.tick()                    # which the budget asks for
        self.assertEqual(self.waiting_consumers(), 0)
        self.assertEqual(self.answer_to(waits).body, self.BIG)

    def test_nothing_is_held_for_who_left(self):
        for _ in range(2):
            self.queue.put([self.BIG])
        body = self.push(self.pair(), self.BIG_PUT + self.BIG[:700_000])
        takers = self.pairs(1, request("GET", "/out/fetcher"))
        self.round()
        self.assertGreater(self.broker.budget.held, 1_700_000)
        for wire in (body, *takers):
            wire.close()
        self.round(2)
        self.assertEqual((self.broker.budget.held, counts(self.queue)), (0, (2, 0, 0)))

    def test_who_takes_an_answer_too_slowly_is_closed_and_who_takes_a_mib_in_time_is_not(self):
        with self.fake_time() as clock:
            for step, lives in ((16 << 10, False), (50 << 10, True)):
                self.queue.put([self.BIG * 3])
                wire, got = self.pair().send(request("GET", "/out/fetcher")), 0
                self.round()
                while wire.handler.state != mq.CLOSED and got < 3 << 20:
                    got += len(wire.socket.recv(step))
                    self.pass_seconds(clock, 1)
                self.assertEqual(got >= 3 << 20, lives, got)
                self.assertEqual(counts(self.queue), (0, 0, 0) if lives else (1, 0, 0))
                self.queue.purge()

    def test_who_does_not_take_an_answer_is_closed_in_time_though_the_next_one_was_late(self):
        with self.fake_time() as clock:
            self.queue.put([self.BIG])
            wire, = self.pairs(1, request("GET", "/peek/fetcher"),
                               request("GET", "/out/manager-reload?wait=60"))
            self.round(2)
            self.broker.queues["manager-reload"].put([b"x"])
            self.round(2)
            self.assertEqual(wire.handler.state, mq.WRITE)
            for _ in range(self.poll.request_timeout + 2):
                self.pass_seconds(clock, 1)
            self.assertEqual(wire.handler.state, mq.CLOSED)

    def test_who_does_not_take_an_answer_is_closed_in_time_though_the_next_one_waits(self):
        with self.fake_time() as clock:
            self.queue.put([self.BIG])
            wire, = self.pairs(1, request("GET", "/peek/fetcher"),
                               request("GET", "/out/manager-reload?wait=300"))
            self.round(2)
            self.assertEqual(wire.handler.state, mq.LATE)
            self.pass_seconds(clock, self.poll.request_timeout + 2)
            self.assertEqual(wire.handler.state, mq.CLOSED)
        self.assertEqual(self.waiting_consumers(), 0)

    def test_who_resets_while_its_first_of_two_answers_leaves_waits_no_longer(self):
        wire, = self.pairs(1, request("GET", "/"), request("GET", "/out/fetcher?wait=300"))
        self.poll.wait(0)
        self.assertEqual(self.waiting_consumers(), 1)
        wire.close()
        self.poll.end_round()
        self.assertEqual((wire.handler.state, self.waiting_consumers()), (mq.CLOSED, 0))

    def test_an_empty_line_behind_a_request_is_none(self):
        with self.fake_time() as clock:
            wire, = self.pairs(1, request("GET", "/"), b"\r\n")
            self.round(2)
            self.assertEqual(wire.answer().status, 200)
            self.assertFalse(wire.handler.busy)
            self.pass_seconds(clock, self.poll.request_timeout + 2)
            self.assertTrue(wire.is_silent())
            self.assertEqual(wire.send(request("GET", "/")).handler.state, mq.READ)
            self.round()
            self.assertEqual(wire.answer().status, 200)

    def test_any_number_of_answers_leaves(self):
        wire = self.pair()
        with unittest.mock.patch.object(mq, "SHARE_REQUESTS", 1 << 20):
            self.push(wire, request("GET", "/", token=None) * 3000)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                answers = pool.submit(lambda: [wire.answer().status for _ in range(3000)])
                self.until(answers.done)
        self.assertEqual(answers.result(), [200] * 3000)

    # -- what should not happen

    def test_an_error_between_a_take_and_its_answer_puts_the_message_back(self):
        for where, what in ((mq, "render_delivery"), (mq, "render_head"), (mq.Queue, "_delivery"),
                            (mq.Handler, "_render")):
            for query in ("", "?lease=60", "?max=9", "?wait=60", "?wait=60&lease=60"):
                for waits in (False, True)[:1 + query.startswith("?wait")]:
                    with self.subTest(what=what, query=query, waits=waits):
                        self.break_a_take(where, what, query, waits)

    def break_a_take(self, where, what, query, waits):
        wire = self.pair()
        ask, have = (functools.partial(wire.send, request("GET", f"/out/fetcher{query}")),
                     functools.partial(self.queue.put, [b"a"]))
        (ask if waits else have)()
        self.round()
        with unittest.mock.patch.object(where, what, side_effect=MemoryError):
            (have if waits else ask)()
            self.round(2)
        self.assertEqual(self.broker.budget.held, 0)
        self.assertEqual(counts_now(self.queue)["ready"], 1)
        if waits and what == "_delivery":    # it waits on, and gets it in a second
            self.queue.tick()
            self.round(2)
            self.assertEqual(wire.answer().body, b"a")
        else:
            answer = wire.answer()
            self.assertTrue(answer is None or answer.status == 500, answer)
            self.assertEqual(payloads(self.queue), [b"a"])
        again, = self.pairs(1, request("GET", "/healthz"))
        self.round()
        self.assertEqual(self.statuses([again]), [200])
        self.queue.purge()

    def test_what_could_not_be_rendered_is_not_held(self):
        self.queue.put([self.BIG])
        for path in ("/out/fetcher", "/out/fetcher?wait=9&lease=9", "/peek/fetcher"):
            wire, = self.pairs(1, request("GET", path))
            with unittest.mock.patch.object(mq, "render_delivery", side_effect=MemoryError):
                self.round(2)
            self.assertEqual((wire.answer().status, counts(self.queue)), (500, (1, 0, 0)))
        self.assertEqual(self.broker.budget.held, 0)

    def test_a_waiting_connection_that_an_error_closed_keeps_no_other_waiter(self):
        first, second = self.pairs(2, request("GET", "/out/fetcher?wait=60"))
        self.round()
        first.shut()
        with unittest.mock.patch.object(mq.Handler, "when_gone", side_effect=MemoryError):
            self.round()
        self.assertEqual(first.handler.state, mq.CLOSED)
        self.queue.put([b"a"])
        self.round(2)
        self.assertFalse(second.is_silent())

    def test_nothing_that_is_kept_of_a_request_is_a_token(self):
        for token in (POST, GET, ADMIN, "unknown-token-of-somebody"):
            for wire in self.pairs(1, request("POST", "/in/fetcher", b"x", token),
                                   request("GET", "/stats", token=token)):
                self.round(2)
                wire.close()
        self.round(2)
        routes = self.poll.service.routes
        self.assertGreater(len(routes), 2)
        seen, left = set(), [routes, self.broker.tokens, self.broker.config]
        while left:
            item = left.pop()
            if id(item) in seen or isinstance(item, (type, type(os), type(request), mq.Queue)):
                continue
            seen.add(id(item))
            if isinstance(item, (bytes, bytearray, str)):
                item = item.encode("latin-1", "replace") if isinstance(item, str) else item
                for token in (POST, GET, OTHER, ADMIN):
                    self.assertNotIn(token.encode(), item)
            left += gc.get_referents(item)

    # -- without waiting for a disk, or for a thread

    def make_durable(self, *names):
        for name in names:
            self.broker.queues[name].log.fsync = "always"
        return self.pairs(1, request("POST", f"/in/{names[0]}", b"x")) + self.pairs(
            1, request("POST", f"/in/{names[1]}", b"x"))

    def test_a_disk_that_hangs_for_one_queue_keeps_no_other_waiting(self):
        gate, self.queue.log.storage = threading.Event(), FakeStorage()
        self.queue.log.storage.before["fdatasync"] = lambda _: gate.wait(ANSWER_S)
        self.addCleanup(gate.set)
        hangs, goes_on = self.make_durable("fetcher", "manager-reload")
        self.until(lambda: not goes_on.is_silent())
        self.assertEqual(self.statuses([hangs, goes_on]), [None, 200])
        gate.set()
        self.assertEqual(self.answer_to(hangs).status, 200)

    def test_without_a_thread_durable_puts_are_answered_all_the_same(self):
        with unittest.mock.patch.object(threading.Thread, "start", side_effect=RuntimeError):
            for _ in range(3):
                wires = self.make_durable("fetcher", "manager-reload")
                self.round(2)
                self.assertEqual(self.statuses(wires), [200, 200])
        hangs, goes_on = self.make_durable("fetcher", "manager-reload")
        self.assertEqual(self.answer_to(hangs).status, self.answer_to(goes_on).status, 200)
        self.assertFalse(self.broker.syncers.unserved)

    # -- splits

    def test_a_split_never_changes_an_answer(self):
        def filled(start, size, end, at=0, odd=b""):
            filler = b"x" * (size - len(start) - len(end))
            return start + filler[:at] + odd + filler[at + len(odd):] + end

        line, version = b"GET /healthz?", b" HTTP/1.1"
        head, end = b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: ", b"\r\n\r\n"
        chunks = request("POST", "/in/fetcher", headers=["Transfer-Encoding: chunked"])
        chunk = b"\r\nhello\r\n0\r\n\r\n"
        rest = b"\r\nHost: x\r\n\r\n"
        rows = [
            (filled(line, 8192, version) + rest, 200), (filled(line, 8193, version) + rest, 414),
            (filled(head, 32768, b"") + end, 200), (filled(head, 32769, b"") + end, 431),
            *[(filled(line, size, version, at, odd) + rest,
               414 if at + (odd == b"\r") > 8180 else 400)      # a CR may get its LF yet
              for size in (8192, 10_000) for at in (50, 8160, 8179, 8180, 8181, 9000)
              for odd in (b"\n", b"\r") if at < size - 30],
            *[(filled(head, 40_000, b"", at, b"\n") + end, 400 if at < 32_700 else 431)
              for at in (50, 8170, 32_699, 33_000)],
            (head + b"b\r\nC: \nd" + end, 400), (head + b"b\r\n\r\x00", 400),
            (chunks + filled(b"5;", 8190, b"") + chunk, 200),
            (chunks + filled(b"5;", 8191, b"") + chunk, 400),
            (chunks + filled(b"5;", 8190, b"", 100, b"\n") + chunk, 400),
            (chunks + filled(b"5;", 9000, b"", 8500, b"\n") + chunk, 400),
            (chunks + b"5" + chunk[:-2] + filled(b"A:", 8191, b"") + end, 400),
            (chunks + b"5" + chunk[:-2] + filled(b"A:", 8190, b"") + end, 200),
        ]
        for number, (sent, status) in enumerate(rows):
            cuts = (1, 8191, 8192, 8193, 8194, 8195, 32_768, 32_769, 32_771, 32_772, 32_773)
            ways = [[sent], *[[sent[:at], sent[at:]] for at in (*cuts, len(sent) - 1)]]
            step = 1 if len(sent) < 8300 and status != 400 else 61
            ways.append([sent[at:at + step] for at in range(0, len(sent), step)])
            for way in ways:
                with self.subTest(row=number, first=len(way[0]), pieces=len(way)):
                    wire = self.pair()
                    for piece in filter(None, way):
                        wire.send(piece)
                        self.round()
                    self.assertEqual(self.statuses([wire]), [status])
                    wire.close()
                    self.round()


class LimitTest(ServerTest):
    settings = {"max_connections": 3}

    def test_connections_above_the_limit_are_told_so(self):
        kept = [self.wire().send(request("GET", "/healthz")) for _ in range(3)]
        self.assertEqual([wire.answer()[0] for wire in kept], [200] * 3)
        extra = self.wire()
        status, headers, _ = extra.answer()
        self.assertEqual((status, headers["Connection"]), (503, "close"))
        kept[0].close()
        eventually(lambda: ask(self.port, "GET", "/healthz").status == 200, 5, "no room again")


class DurableServerTest(ServerTest):
    settings = {"idle_timeout": 1}

    def setUp(self):
        super().setUp()
        for queue in self.broker.queues.values():
            queue.log.fsync = "always"

    def test_concurrent_and_pipelined_puts_are_answered_after_their_sync(self):
        wires = [self.wire() for _ in range(10)]
        for number, wire in enumerate(wires):
            wire.send(b"".join(request("POST", "/in/fetcher", b"%d-%d" % (number, n))
                               for n in range(10)))
        for wire in wires:
            self.assertEqual([wire.answer()[0] for _ in range(10)], [200] * 10)
        self.assertEqual(self.queue.log.durable, self.queue.log.appends)
        self.assertEqual(len(payloads(self.queue)), 100)

    def test_a_steady_producer_keeps_neither_the_idle_open_nor_the_listener_shut(self):
        accept, shortages, idle, began = socket.socket.accept, [1], self.wire(), threading.Event()

        def accept_later(listener):
            if shortages:
                raise OSError(errno.EMFILE, f"no descriptor {shortages.pop()}")
            return accept(listener)

        def produce():
            with Wire(self.port) as wire:
                while not ended.is_set():
                    wire.put(b"x")
                    began.set()

        ended, producer = threading.Event(), threading.Thread(target=produce)
        producer.start()
        self.addCleanup(producer.join)
        self.addCleanup(ended.set)
        began.wait(ANSWER_S)
        with unittest.mock.patch.object(socket.socket, "accept", accept_later):
            self.assertEqual(self.wire().ask("GET", "/healthz").status, 200)
        self.assertEqual(shortages, [])
        self.assertTrue(idle.at_end())

    def test_a_failed_sync_is_no_200(self):
        self.queue.log.storage = FakeStorage()
        self.queue.log.storage.fail("fdatasync", errno.EIO)
        wire = self.wire().send(request("POST", "/in/fetcher", b"x"))
        eventually(lambda: self.failures)
        self.assertTrue(wire.is_silent())
        self.close_connections()             # a server would have ended


# ---- main ---------------------------------------------------------------------------------

class Processes(Folder):
    """Real server processes, one after the other on one folder."""

    def start(self, **options):
        """Start a server and wait until it is ready."""
        self.server = ServerProcess(self.base, **options)
        self.addCleanup(self.server.kill)
        return self.server.wait_ready()

    def run_code(self, code):
        """Start a server whose module a test changed: `code` runs first, with it as `mq`."""
        program = (f"import errno, os, sys, threading\nsys.path.insert(0, {HERE!r})\n"
                   f"import micro_queue as mq\n{code}\nsys.exit(mq.main())")
        server = ServerProcess(self.base, program=("-c", program))
        self.addCleanup(server.kill)
        return server

    def run_main(self, *arguments):
        done = subprocess.run([sys.executable, SERVER, *arguments], timeout=20,
                              capture_output=True)
        return done.returncode, done.stdout.decode() + done.stderr.decode()


class ProcessTest(Processes):
    def test_exit_codes_and_one_line_for_each_mistake(self):
        path = os.path.join(self.base, "config.json")
        with open(path, "w") as file:
            json.dump(example_config(path=self.folder("data")), file)
        self.assertEqual(self.run_main("-c", path, "--check")[0], 0)
        self.assertEqual(self.run_main("--version")[0], 0)
        self.assertEqual(self.run_main()[0], 2)
        for file, code in ((self.folder("none.json"), 1), (SERVER, 1)):
            status, text = self.run_main("-c", file)
            self.assertEqual((status, text.count("\n")), (code, 1), text)
        self.write_log(b"something else", "data/fetcher")
        os.chmod(self.folder("data/fetcher"), 0o700)
        status, text = self.run_main("-c", path)
        self.assertEqual(status, 3)
        self.assertNotIn("Traceback", text)

    def test_a_second_start_on_the_folder_fails_and_names_it(self):
        status, text = self.run_main("-c", self.start().config)
        self.assertEqual(status, 3)
        self.assertIn(self.server.path, text)
        self.assertEqual(text.count("\n"), 1)

    def test_sigterm_drains_and_marks_a_clean_stop(self):
        server = self.start()
        server.ask("POST", "/in/fetcher", b"x")
        with server.wire():                  # an idle one
            self.assertEqual(server.stop(seconds=10), 0)
        with open(self.folder("data/fetcher/meta.json")) as file:
            self.assertTrue(json.load(file)["clean"])
        server.check_log()

    def test_kill_9_loses_nothing_that_was_answered(self):
        rng, ledger, numbers = random.Random(SEED), Ledger(), itertools.count()

        def produce(client):
            while True:
                client.put(b"%06d" % next(numbers))

        def consume(client):
            while True:
                client.take()

        def until_the_end(work, server, name):
            with contextlib.suppress(ConnectionError), server.wire() as wire:
                work(Client(wire, ledger, name))

        def kill(server):
            time.sleep(0.3 + rng.random() * 0.3)
            server.kill()

        for _ in range(4):
            server = self.start()
            works = [functools.partial(until_the_end, work, server, f"{work.__name__}-{number}")
                     for work, count in ((produce, 4), (consume, 3)) for number in range(count)]
            together(*works, functools.partial(kill, server))
            ledger.fault()
        with self.start().wire() as wire:
            Client(wire, ledger).drain()
        self.assertEqual(ledger.faults(), [], f"seed {SEED}")
        self.assertGreater(ledger.answered_count, 0)

    def test_a_failing_disk_ends_the_process_without_a_200(self):
        server = self.run_code(
            "def fail(fd):\n"
            "    if os.fstat(fd).st_size > 90: raise OSError(errno.EIO, 'broken')\n"
            "mq.Storage.fdatasync = staticmethod(fail)").wait_ready()
        with self.assertRaises(ConnectionError):
            server.ask("POST", "/in/fetcher", b"x")
        self.assertEqual(server.wait_end(10), 4)
        server.check_log()

    def test_what_is_not_whole_and_what_is_not_read_starts_no_thread(self):
        server, wires = self.start(), []
        server.ask("POST", "/in/fetcher", bytes(8_000_000))
        before = server.thread_count()
        put = request("POST", "/in/fetcher", headers=["Content-Length: 9"])
        chunked = request("POST", "/in/fetcher", headers=["Transfer-Encoding: chunked"])
        for sent, count in ((put[:20], 70), (put + b"x", 70), (chunked + b"1\r\nx\r\n2", 60),
                            (request("GET", "/out/manager-reload?wait=60") + b"G", 30),
                            (request("GET", "/peek/fetcher"), 10)):
            for _ in range(count):
                wires.append(server.wire().send(sent))
                self.addCleanup(wires[-1].close)
        eventually(lambda: not wires[-1].is_silent())
        self.assertEqual(server.ask("GET", "/healthz").status, 200)
        self.assertLessEqual(server.thread_count(), before)

    def test_a_start_without_threads_ends_with_one_line(self):
        server = self.run_code("def fail(thread): raise RuntimeError('no thread')\n"
                               "threading.Thread.start = fail")
        self.assertEqual(server.wait_end(20), 3)
        self.assertTrue(server.stderr().endswith("\nmicro_queue: cannot start: no thread\n"))
        server.check_log()

    @unittest.skipUnless(os.geteuid() == 0, "mounting a tmpfs needs root")
    def test_a_full_disk_refuses_puts_until_there_is_space_again(self):
        data = self.folder("data")
        os.mkdir(data, 0o700)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", data],
                                 stderr=subprocess.DEVNULL)
        if mounted.returncode:
            self.skipTest("the kernel allows no mount here")
        self.addCleanup(subprocess.run, ["umount", "-l", data])
        server, count = self.start(settings={"min_free_bytes": 65536}), 0
        with server.wire() as wire:
            while wire.put(b"%06d" % count + bytes(20_000)).status == 200:
                count += 1
            self.assertGreater(count, 20)
            for number in range(count):
                answer = wire.take()
                self.assertEqual((answer.status, answer.body[:6]), (200, b"%06d" % number))
            self.assertEqual(wire.ask("GET", "/compact/fetcher").status, 200)
            self.assertEqual(wire.put(b"again").status, 200)
        server.kill()
        again = self.start(settings={"min_free_bytes": 65536}).ask("GET", "/out/fetcher")
        self.assertEqual(again.body, b"again")


class KitTest(Processes):
    """What the kit promises and no other test would miss."""

    def test_a_ledger_names_an_answer_that_came_too_late(self):
        ledger = Ledger(limit_s=0.5)
        ledger.answered_in("a put", 0.4)
        with ledger.timing("a long poll", wait_s=9):
            pass
        self.assertEqual((ledger.faults(), ledger.latest_s), ([], 0.4))
        with contextlib.suppress(OSError), ledger.timing("a take"):
            raise OSError("no answer at all is another matter")
        ledger.answered_in("a take", 0.6)
        self.assertEqual(ledger.faults(), ["late: a take was answered in 0.600 s, not 0.5 s"])

    def test_a_storage_fails_from_the_call_on_that_it_was_told(self):
        storage = FakeStorage()
        queue = self.filled(b"a", storage=storage)
        storage.fail("pwrite", errno.ENOSPC, at=2)
        queue.put([b"b"])
        for _ in range(2):
            with self.assertRaises(mq.ApiError):
                queue.put([b"c"])
        storage.heal()
        queue.put([b"d"])
        self.assertEqual(payloads(queue), [b"a", b"b", b"d"])
        self.assertEqual(storage.calls.count("truncate"), 2)

    def test_a_process_tells_of_itself_and_ends_as_it_is_told(self):
        server = self.start(limits={resource.RLIMIT_NOFILE: 200}, wrapper=("env",),
                            settings={"max_connections": 10},
                            env={**os.environ, "MODE_DEBUG": "1"})
        self.assertEqual(server.ask("GET", "/healthz").status, 200)
        with open(f"/proc/{server.pid}/limits") as file:
            self.assertRegex(file.read(), r"Max open files +200 +200")
        self.assertGreater(server.resident_bytes(), 1 << 20)
        self.assertGreater(server.cpu_seconds(), 0)
        self.assertGreater(server.thread_count(), 1)
        eventually(lambda: "action=readyz" in server.stderr())
        self.assertEqual((server.kill(), server.stop()), (-signal.SIGKILL, -signal.SIGKILL))
        with self.assertRaises(OSError):
            server.ask("GET", "/healthz")


# ---- Documents ----------------------------------------------------------------------------

class ShellConsumerTest(Processes):
    """The README's consumer loop, killed again and again."""

    def setUp(self):
        super().setUp()
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            script = re.search(r"```sh\n(#!/bin/sh\n.*?)```", file.read(), re.DOTALL)[1]
        if not shutil.which("curl"):
            self.skipTest("needs curl")
        self.start()
        script = script.replace("127.0.0.1:10000", f"127.0.0.1:{self.server.port}")
        self.write("consumer", script)
        self.done = os.path.join(self.base, "done")
        self.write("work", f"#!/bin/sh\ncat >> {self.done}\n")
        open(self.done, "w").close()

    def write(self, name, text):
        path = os.path.join(self.base, name)
        with open(path, "w") as file:
            file.write(text)
        os.chmod(path, 0o700)

    def consumer(self):
        return subprocess.Popen(["./consumer"], cwd=self.base, start_new_session=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def finished(self):
        with open(self.done) as file:
            return file.read().split()

    def end_consumers(self, *consumers):
        for consumer in consumers:
            os.killpg(consumer.pid, signal.SIGKILL)
            consumer.wait()

    def test_killed_at_any_point_every_message_is_done_or_back(self):
        sent = [f"m{number}" for number in range(60)]
        for message in sent:
            body = (message + "\n").encode()
            self.assertEqual(self.server.ask("POST", "/in/fetcher", body).status, 200)
        rng = random.Random(SEED)
        for _ in range(12):
            consumer = self.consumer()
            time.sleep(rng.uniform(0, 0.2))
            self.end_consumers(consumer)
        done = self.finished()
        port = self.server.port              # which the consumers know
        self.server.stop()                   # which ends all leases
        self.start(settings={"listen_port": port})
        back = self.server.ask("GET", "/peek/fetcher?max=1000").body.decode().split()
        self.assertEqual(set(done) | set(back), set(sent))
        self.assertTrue(back, "nothing was left to be killed at")
        workers = [self.consumer() for _ in range(3)]
        self.addCleanup(self.end_consumers, *workers)
        eventually(lambda: set(self.finished()) == set(sent), 20, "not all was done")

    def test_what_work_fails_at_comes_back_later(self):
        self.write("work", "#!/bin/sh\nexit 1\n")
        self.server.ask("POST", "/in/fetcher", b"bad")
        consumer = self.consumer()
        self.addCleanup(self.end_consumers, consumer)
        eventually(lambda: json.loads(
            self.server.ask("GET", "/stats/fetcher").body)["delayed"] == 1)


class DocumentTest(unittest.TestCase):
    """What the README says is what the code does."""

    def setUp(self):
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            self.readme = file.read()

    def test_every_action_is_in_the_api_table_and_no_other(self):
        rows = re.findall(r"^\| `(?:[A-Z]+) /([a-z]*)", self.readme, re.MULTILINE)
        self.assertEqual(set(rows) - {""}, set(mq.ACTIONS) - {""})

    def test_the_config_table_is_the_dataclasses(self):
        rows = dict(re.findall(r"^\| `((?:settings|queues\[\]|tokens\[\])\.\w+)` \| (\S+)",
                               self.readme, re.MULTILINE))
        wanted = {}
        for prefix, cls in (("settings", mq.Settings), ("queues[]", mq.QueueConfig),
                            ("tokens[]", mq.Token)):
            for field in dataclasses.fields(cls):
                default = "`required`"
                if field.default is not dataclasses.MISSING:
                    value = list(field.default) if field.default == () else field.default
                    default = f"`{json.dumps(value)}`"
                wanted[f"{prefix}.{field.name}"] = default
        self.assertEqual(rows, wanted)

    def test_the_example_of_a_larger_config_is_valid(self):
        text = re.search(r"^```json\n(.*?)^```", self.readme, re.M | re.S)[1]
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(text)
            file.flush()
            config = mq.load_config(file.name)
        self.assertEqual(config.subscribers(config.queues[2]), ("worker",))

    def test_every_curl_line_works_as_it_stands_but_for_the_port(self):
        if not shutil.which("curl"):
            self.skipTest("needs curl")
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        server = ServerProcess(folder)       # 10000 may be taken, e.g. by this very test
        self.addCleanup(server.kill)
        server.wait_ready()
        url = f"http://127.0.0.1:{server.port}/"
        readme = self.readme.replace("http://127.0.0.1:10000/", url)
        blocks = [block for block in re.findall(r"^```sh\n(.*?)^```", readme, re.M | re.S)
                  if url in block]
        found = [subprocess.run(block, shell=True, capture_output=True, timeout=20)
                 for block in blocks]
        self.assertEqual([done.stderr.count(b"HTTP/1.1 200") for done in found], [1, 1, 1, 2])
        self.assertEqual(found[1].stdout, b'{"context": "test"}')
        self.assertIn(b'messages_out_total{queue_name="fetcher"} 1', found[2].stdout)
        self.assertEqual(found[3].stdout, b'{"n": 1}\n{"n": 2}\n')
        for name in ("fetcher/data.log", "fetcher/meta.json", "manager-reload"):
            self.assertTrue(os.path.exists(os.path.join(server.path, name)), name)


if __name__ == "__main__":
    unittest.main()
