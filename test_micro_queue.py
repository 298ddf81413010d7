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
import io
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
import tarfile
import tempfile
import threading
import time
import tracemalloc
import unittest
import unittest.mock
import zlib
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
        self._synced, self._syncing = 0, {}  # what was settled before is durable
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

    def syncing(self, what):
        """What was settled so far is about to be made durable."""
        with self._lock:
            self._syncing[what] = self._event()

    def moment(self):
        """Return what to hand to `synced` later."""
        with self._lock:
            return self._event()

    def synced(self, when=None):
        """All that was settled so far, or until a moment or that `syncing`, is durable."""
        with self._lock:
            moment = self._syncing.get(when, when) or self._event()
            self._synced = max(self._synced, moment)

    def forgotten(self):
        """What is settled is forgotten, or about to be: what the data still holds comes again."""
        with self._lock:
            self._out.update({payload: [None, None] for payload in self._out})
            self._refused -= self._dropped

    def joined(self):
        """A subscriber starts from now on: what was put before must not come."""
        with self._lock:
            self._refused.update(self._answered)
            self._answered.clear()
            self._out.clear()

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
        for message, count in zip(delivery.messages, delivery.counts) if ledger else ():
            ledger.delivered(consumer, message.payload, message.id, count)
        if settle:
            queue.settle(delivery)
            if ledger:
                ledger.settled(consumer)
    return found


def drain_until(queue, payload):
    """Take until this payload comes, giving back the others; return its delivery."""
    out = list(iter(queue.take, None))
    found = next(delivery for delivery in out if delivery.messages[0].payload == payload)
    for delivery in out:
        if delivery is not found:
            queue.retry(delivery)
    return found


def payloads(queue, subscriber="", settle=True):
    """Empty a queue; return what was in it."""
    return [message.payload for message in drain(queue, subscriber, settle)]


def held(queue):
    """Return how many messages, and bytes of records, anyone has not settled."""
    return queue.state.held_count, queue.state.held_bytes


def snapshot(queue):
    """Write a snapshot now; return whether there was space."""
    return mq.exhaust(queue.snapshot())


def compact(queue):
    """Free all dead bytes now, without a rest."""
    mq.exhaust(queue.compact())


def upkeep(queue):
    """Do now what upkeep would do each second."""
    queue.prepare()
    mq.exhaust(queue.upkeep())


def stored(queue):
    """Return all messages that a queue's files hold, settled or not, in their order."""
    found, offset, after = [], -1, mq.FIRST
    while after != offset:
        offset = after
        messages, after = queue.log.read(offset, queue.log.tail)
        found += messages
    return found


# So that rotations, cleanings and snapshots happen all the time.
SMALL = {"SEGMENT_BYTES": 600, "READY_BYTES": 300, "DEAD_BYTES": 400, "DEAD_LOW_BYTES": 200,
         "AHEAD_BYTES": 400, "SLICE_BYTES": 300, "SLICE_MESSAGES": 3, "MARKS_BYTES": 2000,
         "SNAPSHOT_DATA_BYTES": 2000, "TRUNCATE_BYTES": 300, "PASSED_OVER": 50,
         "SEGMENTS_MOST": 8}


def small_segments(**sizes):
    return unittest.mock.patch.multiple(mq, **{**SMALL, **sizes})


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
    return {(name, id_) for name, consumers in queue._consumers.items() for id_ in consumers.dying}


def append_unsynced(queue):
    """Append a message for which somebody waits, but nobody syncs."""
    with queue.lock:
        queue._append_locked([mq.Put([b"x"])])
    queue.log.when_durable(queue.log.appends, lambda: None)


class Gate:
    """In place of a lock: has acts done, each before the lock is taken once more."""

    def __init__(self, lock, acts):
        self._lock, self._acts, self._acting = lock, list(acts), False

    def acquire(self, *arguments, **options):
        if self._acts and not self._acting:
            self._acting = True
            self._acts.pop(0)()
            self._acting = False
        return self._lock.acquire(*arguments, **options)

    __enter__ = acquire

    def release(self):
        self._lock.release()

    def __exit__(self, *_):
        self.release()


def before_syncs(queue, *acts):
    """Have acts done, each before a log begins with something that no sync may come between."""
    queue.log._one_sync = Gate(queue.log._one_sync, acts)


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

    def file(self, file_name, name="q"):
        return os.path.join(self.base, name, file_name)

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

    def locked(self, names):
        """Return which files of a queue another process finds locked."""
        check = ("import fcntl, sys\n"
                 "for name in sys.argv[1:]:\n"
                 "    try: fcntl.lockf(open(name, 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
                 "    except OSError: print(name)\n")
        found = subprocess.run([sys.executable, "-c", check, *names], cwd=self.folder(),
                               stdout=subprocess.PIPE, timeout=60, check=True).stdout
        return set(found.decode().split())

    def overwrite(self, old, new):
        """Damage a log where some bytes stand, under the queue that has it open."""
        at = self.read_log().index(old)
        with open(self.log_path(), "r+b") as file:
            file.seek(at)
            file.write(new)

    def files(self, name="q"):
        """Return what the folder of a queue holds, by name."""
        found = {}
        for file_name in os.listdir(self.folder(name)):
            with open(os.path.join(self.folder(name), file_name), "rb") as file:
                found[file_name] = file.read()
        return found

    def put_files(self, files, name="q"):
        """Have the folder of a queue hold these files, and no others."""
        shutil.rmtree(self.folder(name), ignore_errors=True)
        os.makedirs(self.folder(name))
        for file_name, data in files.items():
            with open(os.path.join(self.folder(name), file_name), "wb") as file:
                file.write(data)

    def forget_marks(self, name="q"):
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
            (lambda c: c["queues"][0].update(name="lock"), "queues[0].name"),
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
        plain = self.parse(self.text).tokens[0]
        hashed = self.changed(lambda c: c["tokens"][0].update(token_sha256=plain.digest.hex()))
        del hashed["tokens"][0]["token"]
        self.assertEqual(self.parse(hashed).tokens[0].digest, plain.digest)

    def test_no_config_keeps_a_token(self):
        config = self.parse(self.text)
        for token in (POST, GET, OTHER, ADMIN):
            self.assertNotIn(token, repr(config))
            self.assertIn(hashlib.sha256(token.encode()).digest(),
                          [kept.digest for kept in config.tokens])


# ---- Records ------------------------------------------------------------------------------

class RecordTest(unittest.TestCase):
    def decoded(self, codec, data, offset):
        found = []
        codec.decode(data, offset, found)
        return found

    def test_a_record_is_one_only_in_its_log_its_segment_and_its_place(self):
        codec, other, offset = mq.Codec.new(), mq.Codec.new(), 3 << 32 | 500
        data, messages = codec.encode([(7, 1234, 5, b"payload")], offset)
        self.assertEqual(messages, [mq.Message(7, 1234, 5, b"payload", offset, len(data))])
        self.assertEqual(codec.size_of(data), len(data))
        self.assertEqual(self.decoded(codec, data, offset), messages)
        for elsewhere in (offset + 1, 500, 4 << 32 | 500):
            self.assertEqual(self.decoded(codec, data, elsewhere), [])
        self.assertEqual(other.size_of(data), 0)
        twin = mq.Codec(other.log_id, codec.marker)
        self.assertEqual(self.decoded(twin, data, offset), [])

    def test_every_flipped_bit_is_seen(self):
        codec = mq.Codec.new()
        data = codec.encode([(7, 1234, 5, b"payload")], 44)[0]
        for bit in range(len(data) * 8):
            bad = flipped(data, bit // 8, 1 << bit % 8)
            self.assertEqual(self.decoded(codec, bad, 44), [], bit)

    def test_records_are_read_up_to_the_first_that_is_not_whole(self):
        codec = mq.Codec.new()
        items = [(n, 0, 0, b"x" * n) for n in range(1, 5)]
        data, messages = codec.encode(items, 100)
        for cut in range(len(data) + 1):
            found, whole = [], [m for m in messages if m.offset + m.size <= 100 + cut]
            end = codec.decode(data[:cut], 100, found)
            self.assertEqual((found, end), (whole, 100 + sum(m.size for m in whole)))

    def test_a_header_is_read_back_and_guarded(self):
        codec = mq.Codec.new()
        header = codec.header(7)
        found = mq.Codec.of_header(header, 7)
        self.assertEqual((found.log_id, found.marker), (codec.log_id, codec.marker))
        self.assertIsNone(mq.Codec.of_header(header, 8))
        for at in range(len(header)):
            self.assertIsNone(mq.Codec.of_header(flipped(header, at), 7))
            self.assertIsNone(mq.Codec.of_header(header[:at], 7))

    def test_a_start_is_read_back_and_guarded(self):
        codec, start = mq.Codec.new(), mq.Start(9, 8, 700)
        data = codec.encode_start(start, 5)
        self.assertEqual(codec.decode_start(data + b"more", 5), start)
        self.assertIsNone(codec.decode_start(data, 6))
        message = codec.encode([(9, 1234, 0, bytes(16))], 5 << 32 | mq.FIRST)[0]
        self.assertIsNone(codec.decode_start(message, 5))
        for at in range(len(data)):
            self.assertIsNone(codec.decode_start(flipped(data, at), 5))

    def test_each_line_of_the_marks_is_json_that_ends_with_its_crc(self):
        marks, reader = mq.Marks(bytes(16)), mq.Marks(bytes(16))
        several = [mq.Mark(mq.SETTLED, 'a "quoted"\n, name', 1, 1 << 60, 7 << 32 | 44),
                   mq.Mark(mq.RETRY, "", 5, 6, 44, 3, 1 << 50),
                   mq.Mark(mq.POSITION, "ä", 9, 9, 44)]
        lines = [marks.encode(mark) for mark in several]
        self.assertEqual([reader.decode(line) for line in lines], several)
        head, page = {"log_id": "00", "pages": 1}, {3: mq.ENTRY.pack(3, 44, 0, 30, 1)}
        lines += [marks.head(head), marks.page(page)]
        self.assertEqual(reader.decode_head(lines[-2]), head)
        self.assertEqual(reader.decode_page(lines[-1]), page)
        crc = zlib.crc32(bytes(16))
        for line in lines:                   # each goes on from the one before
            crc = zlib.crc32(line[:line.rindex(b",")], crc)
            self.assertEqual(json.loads(line)[-1], crc)

    def test_no_line_of_the_marks_is_read_that_is_damaged_or_elsewhere(self):
        mark, head = mq.Mark(mq.RETRY, "sub", 5, 6, 44, 3, 99), {"log_id": "00"}
        page = {3: mq.ENTRY.pack(3, 44, 0, 30, 1)}
        decoders = ("decode", "decode_head", "decode_page")
        for decoder, make in zip(decoders, (lambda m: m.encode(mark), lambda m: m.head(head),
                                            lambda m: m.page(page))):
            def read(line, decoder=decoder, log_id=bytes(16), before=()):
                marks = mq.Marks(log_id)
                for other in before:
                    self.assertIsNotNone(marks.decode(other))
                return getattr(marks, decoder)(line)

            line = make(mq.Marks(bytes(16)))
            self.assertIsNotNone(read(line))
            self.assertIsNone(read(line, log_id=b"x" * 16))
            first = mq.Marks(bytes(16)).encode(mark)
            self.assertIsNone(read(line, before=[first]))        # it stood at another place
            for other in set(decoders).difference([decoder]):
                self.assertIsNone(read(line, other))
            for at in range(len(line)):
                self.assertIsNone(read(flipped(line, at)), at)
                self.assertIsNone(read(line[:at]), at)


# ---- Log ----------------------------------------------------------------------------------

class RecoveryTest(Folder):
    def ends(self, queue):
        """Return (start, end, message) of each message in the first segment."""
        return [(m.offset, m.offset + m.size, m) for m in stored(queue)
                if m.offset >> mq.SEGMENT_SHIFT == 0]

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

    def test_a_clean_stop_goes_on_in_the_same_segment_a_crash_in_a_new_one(self):
        queue = self.filled(b"a")
        segment = queue.log.current
        self.assertEqual(segment.room, os.path.getsize(self.log_path()))
        self.stop_cleanly()
        self.assertEqual(os.path.getsize(self.log_path()), segment.end)
        queue = self.open()
        queue.put([b"b"])
        self.assertEqual(queue.log.current.number, segment.number)
        queue = self.crash()
        queue.put([b"c"])
        self.assertGreater(queue.log.current.number, segment.number)
        self.assertEqual(queue.log.current.start.next_id, 3 + mq.ID_GAP)
        self.assertEqual(payloads(queue), [b"a", b"b", b"c"])

    def test_no_id_is_given_twice_whatever_is_lost(self):
        highest, rng = 0, random.Random(SEED)
        with small_segments():
            for _ in range(60):
                queue = self.crash()
                for _ in range(rng.randrange(20)):
                    given = queue.put([bytes(rng.randrange(200))])
                    self.assertGreater(given, highest)
                    highest = given
                    if rng.random() < 0.9:   # else it stays, so that ids are in a snapshot only
                        queue.settle(queue.take())
                    upkeep(queue)
                if rng.random() < 0.3:
                    compact(queue)
                if rng.random() < 0.5:
                    self.stop_cleanly()
                self.drop()
                if rng.random() < 0.3:
                    self.forget_marks()
            self.assertGreater(queue.log.highest, 60)

    def test_a_start_that_gets_no_further_forgets_no_number_of_a_segment(self):
        self.filled(b"a").prepare()
        with unittest.mock.patch.object(mq, "READY_BYTES", 1):
            self.queues[0].prepare()
        ready = self.queues[0].log.ready.number
        queue = self.crash()
        self.assertGreater(queue.log.current.number, ready)
        self.assertNotIn(f"data.{ready}.log", self.files())

    def test_a_log_cut_at_every_byte_keeps_all_whole_records(self):
        queue = self.filled(b"one", b"two", b"three")
        queue.settle(queue.take())
        queue.put([b"four"])
        ends = self.ends(queue)
        self.stop_cleanly()
        files = self.files()
        for with_marks in (True, False):
            for cut in range(mq.FIRST, len(files["data.log"])):
                self.put_files({**files, "data.log": files["data.log"][:cut]})
                if not with_marks:
                    self.forget_marks()
                waiting = [m.payload for _, end, m in ends
                           if end <= cut and not (with_marks and m.id == 1)]
                queue = self.open(storage=FakeStorage(quick=True))
                self.assertGreater(queue.put([b"new"]), 4 if with_marks else len(waiting))
                self.assertEqual(payloads(queue), [*waiting, b"new"], cut)
                self.assertEqual(counts(queue), (0, 0, 0))
                self.drop()

    def test_every_flipped_byte_costs_only_the_record_it_hit(self):
        ends = self.ends(self.filled(b"one", b"two", b"three", b"four"))
        self.stop_cleanly()
        files = self.files()
        for with_marks in (True, False):
            for at in range(0 if with_marks else mq.FIRST, len(files["data.log"])):
                self.put_files({**files, "data.log": flipped(files["data.log"], at)})
                if not with_marks:
                    self.forget_marks()
                left = [m.payload for start, end, m in ends if not start <= at < end]
                queue = self.open(storage=FakeStorage(quick=True))
                self.assertEqual(payloads(queue), left, at)
                self.assertEqual(counts(queue), (0, 0, 0))
                self.assertGreater(queue.put([b"new"]), 4 if with_marks else len(left))
                torn = at >= ends[-1][0]     # nothing follows: as if a write had been cut short
                self.assertTrue([name for name in self.files() if "corrupt" in name], at)
                if not (torn or with_marks):
                    self.assertEqual(queue.log.corrupt_records, 1)
                self.drop()

    def test_a_flipped_header_that_nothing_else_tells_of_is_refused_and_nothing_is_touched(self):
        self.filled(b"one")
        self.stop_cleanly()
        data = self.files()["data.log"]
        for at in range(mq.FIRST):
            bad = flipped(data, at, data[at] if at == 0 else 0xFF)   # a zero, as a Go log has it
            self.refused({"data.log": bad})

    def test_a_damaged_header_is_damage_like_any_other_where_the_log_is_known(self):
        for kept in ("meta.json", "data.1.log"):
            with small_segments():
                queue = self.filled(b"one" * 100, b"two" * 100)
                upkeep(queue)
                queue.put([b"three"])
                self.assertEqual(queue.log.current.number, 1)
                self.stop_cleanly()
                files = self.files()
                for name in ("data.log", "data.1.log"):
                    if name == kept:
                        continue
                    bad = {**files, name: bytes(mq.FIRST) + files[name][mq.FIRST:]}
                    if kept != "meta.json":
                        del bad["meta.json"]
                    self.put_files(bad)
                    queue = self.open()
                    self.assertEqual(counts(queue), (3, 0, 0))
                    self.assertEqual(payloads(queue), [b"one" * 100, b"two" * 100, b"three"])
                    self.assertEqual(queue.log.corrupt_records, 1)
                    self.drop()
            shutil.rmtree(self.folder())

    def test_a_damaged_start_of_a_segment_costs_no_message_and_no_count(self):
        with small_segments():
            queue = self.filled(*[b"%03d" % n * 50 for n in range(3)])
            for n in range(3, 12):
                upkeep(queue)
                queue.put([b"%03d" % n * 50])
            for _ in range(2):
                queue.settle(queue.take())
            self.stop_cleanly()
            files = self.files()
            wanted = [b"%03d" % n * 50 for n in range(2, 12)]
            segments = [name for name, data in files.items() if len(data) > mq.EMPTY_BYTES
                        and name != "meta.json"]
            self.assertGreater(len(segments), 3)
            for with_marks in (True, False):
                for name in segments:
                    self.put_files({**files, name: flipped(files[name], mq.FIRST + 20)})
                    if not with_marks:
                        self.forget_marks()
                    queue = self.open()
                    left = wanted if with_marks else [b"%03d" % n * 50 for n in range(12)]
                    self.assertEqual(counts(queue), (len(left), 0, 0), (name, with_marks))
                    self.assertEqual(held(queue), (len(left), sum(map(len, left))
                                                   + len(left) * mq.HEAD.size))
                    upkeep(queue)            # takes nothing for dead
                    self.assertEqual(payloads(queue), left)
                    self.assertEqual(held(queue), (0, 0))
                    self.assertEqual(counts(queue), (0, 0, 0))
                    self.drop()

    def test_tails_that_are_no_records_are_cut(self):
        queue = self.filled(b"one", b"two")
        inner = self.read_log()[mq.FIRST:queue.log.tail]
        queue.put([inner])                   # a payload that holds valid records
        self.stop_cleanly()
        good = self.read_log()
        self.filled(b"other", name="other")
        self.stop_cleanly()
        tails = [bytes(100), b"garbage" * 30, self.read_log("other"), inner,
                 self.read_log("other")[mq.FIRST:], good, b"\0" * 5000 + b"x"]
        for tail in tails:
            self.put_files({"data.log": good + tail})
            queue = self.open()
            self.assertEqual(payloads(queue), [b"one", b"two", inner])
            kept = [data for name, data in self.files().items() if "corrupt" in name]
            self.assertEqual(kept, [tail] if tail.strip(b"\0") else [])
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
        for data in (b"", bytes(mq.FIRST), bytes(9000)):
            self.put_files({"data.log": data})
            queue = self.open()
            self.assertEqual(queue.put([b"x"]), 1)
            self.assertEqual(payloads(queue), [b"x"])
            self.drop()

    def test_only_a_start_that_finds_messages_and_no_marks_warns_of_it(self):
        with unittest.mock.patch.object(mq, "event") as event:
            self.open()
            self.crash().put([b"x"])
            self.crash()
            self.assertNotIn("no_marks", [call[0][1] for call in event.call_args_list])
            self.drop()
            self.forget_marks()
            self.assertEqual(payloads(self.open()), [b"x"])
            self.assertIn("no_marks", [call[0][1] for call in event.call_args_list])

    def test_a_start_without_descriptors_does_not_blame_the_disk(self):
        storage = FakeStorage()
        opened = storage.open

        def open_but_marks(path, *arguments):
            if path.endswith(".tmp"):
                raise OSError(errno.EMFILE, "Too many open files")
            return opened(path, *arguments)
        storage.open = open_but_marks
        with self.assertRaisesRegex(OSError, "Too many open files"):
            self.open(storage=storage)

    def refused(self, files, *words):
        """These files are refused with one line, and left as they are."""
        self.put_files(files)
        with self.assertRaises(mq.StorageError) as caught:
            self.open()
        self.drop()
        for word in words:
            self.assertIn(word, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))
        self.assertEqual(self.files(), files)

    def test_what_is_not_ours_is_refused_and_nothing_is_touched(self):
        ours = mq.Codec.new()
        old = struct.pack(">8sI16s4sQ", mq.MAGIC, 1, ours.log_id, ours.marker, 9)
        old += zlib.crc32(old).to_bytes(4, "big") + b"records"
        self.refused({"data.log": old}, "2.0", f"move {self.folder()} away")
        self.refused({"data.log": old, "meta.json": b'{"clean": true, "log_id": "00"}'}, "2.0")
        self.refused({"data.log": b"x" * 100})
        self.refused({"data.log": b"x"})
        self.refused({"data.log": b"\0" * 7 + b"\x05abc"})           # less than one message
        self.refused({"data.log": b"\0" * 7 + b"\x03abc" + b"x" * 9})  # lengths that lead astray
        go = b"\0" * 7 + b"\x03abc"
        self.refused({"data.log": go, "data.1.log": b""})            # a Go folder has one log
        self.refused({"data.log": go, "data.1.log": ours.header(2)})
        self.refused({"data.log": b"x" * 100, "meta.json": b"not marks"})

    def test_other_files_without_the_first_segment_are_refused(self):
        self.filled(b"a")
        self.stop_cleanly()
        files = self.files()
        del files["data.log"]
        self.refused(files, "data.log is missing", "meta.json")
        self.refused({"data.3.log": mq.Codec.new().header(3)}, "data.log is missing")

    def test_a_segment_of_another_queue_is_refused(self):
        self.filled(b"a")
        self.stop_cleanly()
        foreign = mq.Codec.new()
        self.refused({**self.files(), "data.7.log": foreign.header(7)}, "another")

    def test_without_marks_everything_in_the_data_waits_again(self):
        clock = FakeClock()
        with small_segments():
            queue = self.open(clock=clock, subscribers=("a", "b"))
            for n in range(30):
                queue.put([b"%03d" % n * 30], delay_s=10 if n % 5 == 0 else 0)
                upkeep(queue)
            for name in ("a", "b"):
                self.assertEqual(len(payloads(queue, name)), 24)
            upkeep(queue)                    # what is dead is gone
            left = sorted({m.payload for m in stored(queue)})
            highest = queue.state.next_id - 1
            self.drop()
            self.forget_marks()
            queue = self.open(clock=clock, subscribers=("a", "b"))
            now = sum(n % 5 > 0 for n in range(30) if b"%03d" % n * 30 in left)
            self.assertGreaterEqual(len(left), 6)
            for name in ("a", "b"):
                self.assertEqual(counts(queue, name), (now, 0, 6))
            clock.passed += 10_000
            for name in ("a", "b"):
                self.assertEqual(payloads(queue, name), left)
            self.assertGreater(queue.put([b"new"]), highest)

    def marked(self):
        """Leave marks of every kind behind; return the payloads that wait."""
        queue = self.filled(*[b"%d" % n for n in range(50)])
        for _ in range(20):
            queue.settle(queue.take())
        queue.retry(queue.take())
        snapshot(queue)
        held = [queue.take() for _ in range(3)]
        queue.settle(held[1])
        queue.retry(held[2])
        queue.put([b"50"])
        self.drop()
        return [b"%d" % n for n in range(20, 51) if n != 21]

    def test_damage_to_the_marks_at_worst_repeats_messages(self):
        wanted = self.marked()
        files, known = self.files(), [b"%d" % n for n in range(51)]
        meta = files["meta.json"].rstrip(b"\0")
        lines = [json.loads(line) for line in meta.splitlines()]
        self.assertEqual([line[0] for line in lines], ["snapshot", "entries", "s", "r"])
        step = 1 if TORTURE else 3
        broken = [meta[:cut] for cut in range(0, len(meta), step)]
        broken += [flipped(meta, at) for at in range(0, len(meta), step)]
        broken += [b"", b"[]", b"null", b"{}", b"[" * 100_000, meta + b"garbage", meta + meta,
                   mq.Marks(b"x" * 16).head(lines[0][1])]
        for number, text in enumerate(broken):
            self.put_files({**files, "meta.json": text})
            queue = self.open(storage=FakeStorage(quick=True))
            found = payloads(queue, settle=False)
            self.assertLessEqual(set(wanted), set(found), number)
            self.assertEqual(found, known[-len(found):] if len(found) > 30 else wanted, number)
            self.drop()

    def test_marks_that_end_early_are_kept_for_who_wants_to_know(self):
        self.marked()
        files = self.files()
        meta = files["meta.json"].rstrip(b"\0")
        for text, rest in ((meta + bytes(5000), None), (meta + b"half a l", b"half a l"),
                           (meta[:-9], meta[:-9].splitlines()[-1]),
                           (b"junk\n" + meta, b"junk\n" + meta)):
            self.put_files({**files, "meta.json": text})
            self.open()
            self.drop()
            saved = [data.rstrip(b"\0") for name, data in self.files().items()
                     if name.startswith("meta.json.corrupt-")]
            self.assertEqual(saved, [rest] if rest else [])

    def test_older_marks_repeat_what_was_settled_since_and_lose_nothing(self):
        queue = self.filled(*[b"%d" % n for n in range(10)])
        queue.settle(queue.take())
        snapshot(queue)
        older = self.files()["meta.json"]
        for _ in range(5):
            queue.settle(queue.take())
        queue.put([b"10"])
        snapshot(queue)
        self.drop()
        self.put_files({**self.files(), "meta.json": older})
        self.assertEqual(payloads(self.open()), [b"%d" % n for n in range(1, 11)])

    def test_marks_that_were_on_disk_before_the_data_settle_nothing_that_comes_later(self):
        queue = self.filled(b"a", b"b", b"c")
        tail = self.ends(queue)[0][1]
        queue.settle(queue.take())
        for _ in range(2):
            queue.settle(queue.take())
        self.drop()
        os.truncate(self.log_path(), tail)   # a power cut: b and c never were
        queue = self.open()
        self.assertEqual(queue.put([b"d"]), 4 + mq.ID_GAP)
        self.assertEqual(counts(queue), (1, 0, 0))
        self.assertEqual(payloads(queue), [b"d"])

    def test_delivery_counts_survive_and_a_message_returns_to_its_place(self):
        queue = self.filled(b"a", b"b")
        queue.retry(queue.take())
        again = self.crash().take()
        self.assertEqual((again.messages[0].payload, again.counts), (b"a", [2]))

    def test_a_first_segment_whose_start_record_is_damaged_begins_at_nothing(self):
        self.filled(b"a", b"b", b"c")
        self.drop()
        self.forget_marks()
        self.write_log(flipped(self.read_log(), mq.FIRST + 10))
        queue = self.open()
        self.assertEqual(queue.log.segments[0].start, mq.Start())
        self.assertEqual(counts(queue), (3, 0, 0))
        self.assertEqual(payloads(queue), [b"a", b"b", b"c"])
        self.assertEqual(counts(queue), (0, 0, 0))

    def test_a_message_damaged_after_the_start_is_set_aside_not_delivered(self):
        queue = self.filled(b"aaaa", b"bbbb")
        self.overwrite(b"aaaa", b"XXXX")
        self.assertEqual(payloads(queue), [b"bbbb"])
        self.assertEqual(queue.log.corrupt_records, 1)

    def test_what_was_damaged_after_the_start_is_not_counted_as_ready(self):
        clock = FakeClock()
        queue = self.open(clock=clock)
        queue.put([b"plain"])
        queue.put([b"late1"], delay_s=10)
        queue.put([b"again"])
        queue.put([b"late2"], delay_s=10)
        taken = [queue.take() for _ in range(2)]
        queue.retry(taken[1])
        queue.settle(taken[0])
        for bad in (b"late1", b"again"):
            self.overwrite(bad, b"XXXXX")
        clock.passed += 10_000
        self.assertEqual(payloads(queue), [b"late2"])
        self.assertEqual(counts(queue), (0, 0, 0))
        self.assertEqual(held(queue), (0, 0))
        self.assertEqual(queue.log.corrupt_records, 2)
        self.assertEqual(payloads(self.crash(clock=clock)), [])

    def test_plain_messages_damaged_after_the_start_are_not_counted_for_ever(self):
        queue = self.filled(b"aaaa", b"bbbb", b"cccc")
        self.overwrite(b"bbbb", b"XXXX")
        self.assertEqual(payloads(queue), [b"aaaa", b"cccc"])
        self.assertEqual(counts(queue), (0, 0, 0))
        self.assertEqual(held(queue), (0, 0))

    def test_time_does_not_go_back_with_the_wall_clock(self):
        clock = FakeClock()
        queue = self.filled(b"a", clock=clock)
        clock.wall -= 10_000_000
        queue = self.crash(clock=clock)
        self.assertGreaterEqual(queue.now_ms(), queue.state.time_ms)
        self.assertEqual(queue.numbers()["subscribers"][""]["oldest_message_age_seconds"], 0)


class UnreadableTest(Folder):
    """A disk that cannot read some of its blocks."""

    def setUp(self):
        super().setUp()
        self.bad = set()
        self.storage = FakeStorage()
        self.storage.before["pread"] = self.read

    def read(self, fd, size, position):
        blocks = range(position // mq.BLOCK_BYTES, (position + size - 1) // mq.BLOCK_BYTES + 1)
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        if any((name, block) in self.bad for block in blocks):
            raise OSError(errno.EIO, "unreadable")

    def messages(self, count):
        """Return a queue with messages of 3,000 bytes each, and what they are."""
        several = [b"%04d" % n * 750 for n in range(count)]
        return self.filled(*several, storage=self.storage), several

    def hit(self, queue, block):
        """Return the payloads of which a part stands in a block of the first segment."""
        start, end = block * mq.BLOCK_BYTES, (block + 1) * mq.BLOCK_BYTES
        return [m.payload for m in stored(queue) if m.offset < end and m.offset + m.size > start]

    def test_a_block_that_cannot_be_read_at_a_take_costs_what_stands_in_it(self):
        queue, several = self.messages(20)
        lost = self.hit(queue, 3)
        self.assertIn(len(lost), (2, 3))
        self.bad.add(("data.log", 3))
        self.assertEqual(payloads(queue), [p for p in several if p not in lost])
        self.assertGreater(queue.log.corrupt_records, 0)
        queue.put([b"more"])
        self.assertEqual(payloads(queue), [b"more"])

    def test_a_segment_that_cannot_be_kept_either_keeps_upkeep_from_nothing(self):
        def rename(_, target):
            if "unreadable" in target:
                raise OSError(errno.EIO, "broken")

        queue, _ = self.messages(3)
        drain(queue)
        compact(queue)                       # goes on in another segment each time
        queue.put([b"x" * 3000])
        drain(queue)
        number = queue.log.current.number
        queue.log.segments[number].is_unreadable = True
        self.storage.before["rename"] = rename
        compact(queue)
        self.assertNotIn(number, queue.log.segments)
        self.assertIn(f"data.{number}.log", os.listdir(self.folder()))

    def test_it_ends_no_start_either(self):
        queue, several = self.messages(20)
        for _ in range(2):
            queue.settle(queue.take())
        lost = self.hit(queue, 3)
        self.bad.add(("data.log", 3))
        for with_marks in (True, False):
            self.drop()
            if not with_marks:
                self.forget_marks()
            queue = self.open(storage=self.storage)
            wanted = [p for p in several[2 if with_marks else 0:] if p not in lost]
            self.assertEqual(payloads(queue, settle=False), wanted)

    def test_marks_that_cannot_be_read_are_no_marks(self):
        queue, several = self.messages(3)
        queue.settle(queue.take())
        self.drop()
        self.bad.add(("meta.json", 0))
        self.assertEqual(payloads(self.open(storage=self.storage)), several)

    def test_a_segment_that_cannot_be_read_is_kept_under_another_name(self):
        with small_segments():
            queue, several = self.messages(1)
            upkeep(queue)
            for payload in (b"b" * 9000, b"c"):
                queue.put([payload])
                upkeep(queue)
            self.assertIn("data.1.log", self.files())
            self.bad.add(("data.1.log", 1))
            self.assertEqual(payloads(queue), [*several, b"c"])
            self.bad.clear()
            upkeep(queue)
            self.assertNotIn("data.1.log", os.listdir(self.folder()))
            kept = [data for name, data in self.files().items() if "unreadable" in name]
            self.assertEqual(len(kept), 1)
            self.assertIn(b"b" * 9000, kept[0])
            self.assertEqual(payloads(self.crash()), [])

    def test_a_start_that_can_read_nothing_of_a_segment_keeps_it(self):
        with small_segments():
            queue = self.messages(1)[0]
            for payload in (b"b" * 900, b"c" * 900, b"d"):
                upkeep(queue)
                queue.put([payload])
            snapshot(queue)
            self.drop()
            self.bad.add(("data.1.log", 0))
            self.open(storage=self.storage)
            kept = [data for name, data in self.files().items() if "unreadable" in name]
            self.assertEqual(len(kept), 1)
            self.assertIn(b"b" * 900, kept[0])

    def test_a_first_segment_that_cannot_be_read_is_reported_once(self):
        with small_segments():
            queue = self.messages(2)[0]
            upkeep(queue)
            queue.put([b"more"])
            self.bad.add(("data.log", 1))
            self.assertEqual(payloads(queue)[-1], b"more")
            with unittest.mock.patch.object(mq, "event") as event:
                for _ in range(3):
                    upkeep(queue)
            self.assertEqual([call.args[1] for call in event.call_args_list],
                             ["unreadable_segment_kept"])

    def test_any_other_error_is_the_end(self):
        for failure in (errno.ESTALE, errno.EBADF):
            queue = self.messages(1)[0]
            self.storage.fail("pread", failure)
            with self.assertRaises(mq.LogFailed):
                queue.take()
            self.storage.heal()
            with self.assertRaises(mq.LogFailed):
                queue.put([b"b"])
            self.drop()
            self.storage.fail("pread", failure)
            with self.assertRaises(mq.LogFailed):
                self.open(storage=self.storage)
            self.storage.heal()
            self.drop()
            shutil.rmtree(self.folder())


class LegacyTest(Folder):
    """Folders that the Go server left behind."""

    def go_log(self, *items):
        return b"".join(struct.pack(">Q", len(item)) + item for item in items)

    def meta(self, head, tail):
        return json.dumps({"head_offset": head, "tail_offset": tail}).encode()

    def put_go(self, data, meta=None):
        self.put_files({"data.log": data, **({} if meta is None else {"meta.json": meta})})

    def take_over(self, data, meta=None):
        self.put_go(data, self.meta(*meta) if isinstance(meta, tuple) else meta)
        queue = self.open(storage=FakeStorage(quick=True))
        found = payloads(queue)
        self.drop()
        return found

    def test_what_waits_between_head_and_tail_is_taken_over_and_the_old_files_kept(self):
        data = self.go_log(b"one", b"two", b"three")
        meta = self.meta(11, len(data))
        self.assertEqual(self.take_over(data, meta), [b"two", b"three"])
        files = self.files()
        self.assertEqual((files["data.log.legacy"], files["meta.json.legacy"]), (data, meta))
        self.assertEqual(payloads(self.open()), [])

    def test_what_was_taken_over_is_a_queue_like_any_other(self):
        self.put_go(self.go_log(b"one", b"two", b"three"))
        queue = self.open()
        self.assertEqual(counts(queue), (3, 0, 0))
        queue.settle(queue.take())
        self.stop_cleanly()
        queue = self.open()
        self.assertEqual(queue.put([b"four"]), 4)
        compact(queue)
        self.assertEqual(payloads(self.crash()), [b"two", b"three", b"four"])

    def test_files_become_private_and_the_old_ones_too(self):
        data = self.go_log(b"one")
        self.put_go(data, self.meta(0, len(data)))
        os.chmod(self.folder(), 0o755)
        for name in os.listdir(self.folder()):
            os.chmod(os.path.join(self.folder(), name), 0o644)
        self.open()
        self.assertEqual(os.stat(self.folder()).st_mode & 0o777, 0o700)
        modes = {name: os.stat(os.path.join(self.folder(), name)).st_mode & 0o777
                 for name in os.listdir(self.folder())}
        self.assertLessEqual({"data.log.legacy", "meta.json.legacy", "data.1.log"}, set(modes))
        self.assertEqual(set(modes.values()), {0o600}, modes)

    def test_damage_to_the_marks_is_told_behind_a_takeover_too(self):
        data = self.go_log(b"one", b"two")
        self.assertEqual(self.take_over(data, (11, len(data))), [b"two"])
        self.assertFalse([name for name in os.listdir(self.folder()) if "corrupt" in name])
        self.put_meta("no marks of ours")
        queue = self.open()
        self.assertEqual(queue.log.corrupt_records, 1)
        self.assertTrue([name for name in os.listdir(self.folder()) if "corrupt" in name])

    def test_every_cut_and_every_head(self):
        items = [b"one", b"", b"two2", b"three"]
        data = self.go_log(*items)
        ends, at = [], 0
        for item in items:
            at += 8 + len(item)
            ends.append((at, item))
        for cut in range(1, len(data) + 1):
            wanted = [item for end, item in ends if end <= cut and item]
            self.assertEqual(self.take_over(data[:cut], (0, len(data))), wanted, cut)
            if wanted:
                self.assertEqual(self.take_over(data[:cut]), wanted, cut)
            elif any(data[:cut]):            # nothing proves whose log it is
                with self.assertRaises(mq.StorageError):
                    self.take_over(data[:cut])
                self.drop()
                self.assertEqual(self.files(), {"data.log": data[:cut]})
        for head in range(len(data)):
            wanted = [item for end, item in ends if end > head and item]
            self.assertEqual(self.take_over(data, (head, len(data))), wanted, head)

    def test_an_interrupted_compaction_and_unreadable_offsets_mean_everything(self):
        data = self.go_log(b"one", b"two")
        self.assertEqual(self.take_over(data, (100, 100 + len(data))), [b"one", b"two"])
        for meta in (b"", b"{", b'{"head_offset": "x"}', b'{"head_offset": -5, "tail_offset": -9}'):
            self.assertEqual(self.take_over(data, meta), [b"one", b"two"], meta)

    def test_what_cannot_be_a_message_is_kept_beside(self):
        data = self.go_log(b"one") + b"\xff" * 20
        self.assertEqual(self.take_over(data, (0, len(data))), [b"one"])
        kept = [value for name, value in self.files().items() if ".corrupt-" in name]
        self.assertEqual(kept, [b"\xff" * 20])

    def test_a_message_that_is_too_large_is_set_aside_under_its_own_name(self):
        data = self.go_log(b"one", b"x" * 200, b"two")
        with unittest.mock.patch.object(mq, "MAX_MESSAGE_BYTES", 100), \
                unittest.mock.patch.object(mq, "event") as event:
            self.assertEqual(self.take_over(data, (0, len(data))), [b"one", b"two"])
        kept = {name: value for name, value in self.files().items() if "too-large" in name}
        self.assertEqual(list(kept.values()), [b"x" * 200])
        self.assertEqual(os.stat(os.path.join(self.folder(), *kept)).st_mode & 0o777, 0o600)
        events = [call.args[1] for call in event.call_args_list]
        self.assertIn("message_too_large", events)
        self.assertNotIn("corrupt_record", events)

    def test_more_than_a_segment_of_messages_becomes_several(self):
        several = [b"%03d" % n * 50 for n in range(40)]
        data = self.go_log(*several)
        with small_segments(), unittest.mock.patch.object(mq, "MIB", 400):
            self.put_go(data)
            queue = self.open()
            self.assertGreater(len(queue.log.segments), 5)
            self.assertEqual(counts(queue), (40, 0, 0))
            self.assertEqual(payloads(queue, settle=False), several)
            self.assertEqual(payloads(self.crash()), several)

    def dies_at(self, step):
        """Return a storage that changes nothing any more from a call on."""
        storage, calls = FakeStorage(quick=True), itertools.count(1)

        def die(*_):
            if next(calls) >= step:
                raise OSError(errno.EIO, "killed")

        for name in ("open", "pwrite", "fdatasync", "fsync", "rename", "link", "truncate",
                     "allocate", "unlink"):
            storage.before[name] = die
        return storage

    def test_a_takeover_that_was_cut_short_is_repeated_at_whatever_step(self):
        data = self.go_log(b"one", b"two", b"three")
        meta = self.meta(11, len(data))
        for step in itertools.count(1):
            self.put_go(data, meta)
            storage = self.dies_at(step)
            try:
                self.open(storage=storage)
            except (OSError, mq.LogFailed, mq.StorageError):
                pass
            else:
                break
            storage.before.clear()
            self.drop()
            taken = self.open(storage=FakeStorage(quick=True))
            self.assertEqual(payloads(taken), [b"two", b"three"], step)
            self.drop()
            files = self.files()
            self.assertEqual((files["data.log.legacy"], files["meta.json.legacy"]), (data, meta))
            self.assertEqual([name for name in files if name.endswith(".tmp")], [])
            self.assertEqual(payloads(self.open(storage=FakeStorage(quick=True))), [])
            self.drop()
        self.assertGreater(step, 20)

    def test_nothing_goes_into_the_old_file_when_there_is_no_space_for_a_segment(self):
        data = self.go_log(b"one", b"two")
        self.put_go(data)
        storage = FakeStorage()

        def refuse(fd, data, offset):        # the start record, and only that
            if offset == mq.FIRST:
                raise OSError(errno.ENOSPC, "full")
        storage.before["pwrite"] = refuse
        with self.assertRaises(mq.DiskFull):
            self.open(storage=storage)
        self.drop()
        self.assertEqual(self.files()["data.log.legacy"], data)
        self.assertEqual(payloads(self.open()), [b"one", b"two"])

    def test_a_legacy_file_that_is_in_the_way_is_not_overwritten(self):
        data = self.go_log(b"one")
        files = {"data.log": data, "data.log.legacy": b"precious"}
        self.put_files(files)
        with self.assertRaisesRegex(mq.StorageError, "data.log.legacy"):
            self.open()
        self.drop()
        self.assertEqual(self.files(), files)


class DiskOf(FakeStorage):
    """Storage on a disk that has so many bytes `left`, and gives them out in blocks."""

    def __init__(self, left=1 << 40, **options):
        super().__init__(**options)
        self.left = left

    def _call(self, name, *arguments):
        size = {"pwrite": lambda fd, data, offset: offset + len(data),
                "allocate": lambda fd, start, length: start + length,
                "truncate": lambda fd, length: length}.get(name)
        if size:
            growth = self._blocks(size(*arguments)) - self._blocks(os.fstat(arguments[0]).st_size)
            growth = growth if name == "truncate" else max(0, growth)
            if growth > self.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= growth
        if name in ("unlink", "rename"):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(arguments[-1])
                self.left += self._blocks(status.st_size) if status.st_nlink == 1 else 0
        return super()._call(name, *arguments)

    def _blocks(self, size):
        return -(-size // mq.BLOCK_BYTES) * mq.BLOCK_BYTES


class AppendTest(Folder):
    def test_a_full_disk_refuses_the_put_and_leaves_the_log_whole(self):
        for failure in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, SHORT):
            storage = FakeStorage()
            queue = self.filled(b"one", storage=storage)
            tail, before = queue.log.tail, self.read_log()[:queue.log.tail]
            storage.fail("pwrite", failure)
            storage.fail("allocate", errno.ENOSPC)
            with self.assertRaises(mq.DiskFull):
                queue.put([b"two"])
            self.assertEqual(self.read_log(), before)        # room ahead is given back as well
            self.assertEqual(queue.log.tail, tail)
            if failure == SHORT:
                storage.fail("pwrite", errno.ENOSPC)
            queue.settle(queue.take())       # takes go on, in memory
            self.assertEqual(payloads(queue), [])
            self.assertGreater(queue.owed, 0)
            self.assertTrue(queue.wants_snapshot())
            self.assertFalse(snapshot(queue))
            self.assertGreater(queue.owed, 0)
            storage.heal()
            upkeep(queue)                    # what memory knew is in the marks now
            self.assertEqual(queue.owed, 0)
            queue.put([b"three"])
            self.assertEqual(payloads(self.crash()), [b"three"])
            self.drop()
            shutil.rmtree(self.folder())

    def test_only_a_snapshot_frozen_after_the_miss_pays_for_it(self):
        storage = FakeStorage()
        queue = self.filled(b"a", b"b", storage=storage)
        steps = queue.snapshot()
        next(steps)                          # frozen
        storage.fail("pwrite", errno.ENOSPC)
        queue.settle(queue.take())
        storage.heal()
        self.assertTrue(mq.exhaust(steps))
        self.assertEqual(queue.owed, 1)
        self.assertTrue(queue.wants_snapshot())
        self.assertTrue(snapshot(queue))
        self.assertEqual(queue.owed, 0)
        self.assertEqual(payloads(self.crash()), [b"b"])

    def test_what_was_marked_while_a_snapshot_was_written_is_in_it(self):
        queue = self.filled(*[b"%d" % n for n in range(6)])
        for number in itertools.count():
            steps = queue.snapshot()
            done = [step for _, step in zip(range(number), steps)]
            queue.put([b"%d" % (number + 6)])
            queue.settle(queue.take())       # in a step between the freeze and the rename
            mq.exhaust(steps)
            waiting = [b"%d" % n for n in range(number + 1, number + 7)]
            self.assertEqual(payloads(self.crash(), settle=False), waiting)
            queue = self.crash()
            if len(done) < number:
                break
        self.assertGreater(number, 2)

    def test_a_snapshot_is_never_ahead_of_the_data_whatever_fsync_says(self):
        storage, order = FakeStorage(), []
        queue = self.filled(b"a", fsync="no", storage=storage)
        snapshot(queue)
        queue.put([b"b"])
        storage.before["fdatasync"] = lambda fd: order.append(
            os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        storage.before["rename"] = lambda *_: order.append("rename")
        storage.before["fsync"] = lambda _: order.append("folder")
        snapshot(queue)
        self.assertEqual(order[0], "data.log")
        self.assertRegex(order[1], r"^meta\.json\..*\.tmp$")
        self.assertEqual(order[2:], ["rename", "folder"])

    def test_a_clean_stop_that_still_owes_says_so_and_repeats_at_worst(self):
        storage = FakeStorage()
        queue = self.filled(b"a", b"b", storage=storage)
        storage.fail("pwrite", errno.ENOSPC)
        queue.settle(queue.take())
        self.assertFalse(queue.close())
        self.queues.clear()
        storage.heal()
        queue = self.open(storage=storage)
        self.assertEqual(payloads(queue), [b"a", b"b"])
        self.assertTrue(queue.close())
        self.queues.clear()

    def test_a_closed_log_has_nothing_to_sync(self):
        queue = self.filled(b"a", fsync="always")
        queue.settle(queue.take())
        queue.log.close()
        queue.log.sync()
        queue.log.sync_marks()
        self.assertIsNone(queue.log.failure)

    def test_marks_get_the_room_ahead_of_the_data_before_they_are_owed(self):
        with unittest.mock.patch.object(mq, "mount_of", lambda _: mq.Mount("/", "ext4")):
            storage = DiskOf()
            queue = self.filled(*[b"x"] * 200, storage=storage)
            storage.left = 0
            for _ in range(100):
                queue.retry(queue.take())
                queue.settle(queue.take())
            self.assertEqual(queue.owed, 0)
            self.assertEqual(os.path.getsize(self.file(queue.log.current.name)),
                             queue.log.current.end)

    def test_a_purge_works_with_no_byte_free(self):
        patch = unittest.mock.patch.object(mq, "mount_of", lambda _: mq.Mount("/", "other"))
        patch.start()                        # no room ahead of the data that marks could have
        self.addCleanup(patch.stop)
        storage = DiskOf()
        queue = self.filled(*[b"x" * 100] * 3000, storage=storage)
        queue.prepare()
        storage.left = 0
        for _ in range(100):
            queue.retry(queue.take())
            queue.settle(queue.take())
        self.assertGreater(queue.owed, 0)
        self.assertFalse(snapshot(queue))
        self.assertEqual(queue.purge(), 2900)
        upkeep(queue)                        # what the purge made dead pays for what is owed
        self.assertEqual(queue.owed, 0)
        queue.put([b"new"])
        self.assertEqual(payloads(self.crash()), [b"new"])

    def test_what_is_dead_goes_first_when_a_start_finds_the_disk_full(self):
        with small_segments():
            storage = DiskOf()
            queue = self.filled(b"x" * 2000, storage=storage)
            for n in range(3):
                queue.prepare()
                queue.put([b"%d" % n * 2000])
            for _ in range(3):
                queue.settle(queue.take())
            self.drop()
            storage.left = 0
            queue = self.open(storage=storage)
            self.assertEqual(payloads(queue), [b"2" * 2000])

    def test_a_start_that_finds_no_space_says_how_much_it_needs_and_loses_nothing(self):
        patch = unittest.mock.patch.object(mq, "mount_of", lambda _: mq.Mount("/", "other"))
        patch.start()                        # no room ahead that a start could give back
        self.addCleanup(patch.stop)
        storage = DiskOf()
        self.filled(b"a", b"b", storage=storage)
        for left in (0, 0, 4096, 0, 0):      # for a segment at most
            self.drop()
            storage.left = left
            with self.assertRaisesRegex(mq.StorageError, r"full; free about [0-9]+ bytes"):
                self.open(storage=storage)
        self.drop()
        self.assertEqual(sorted(self.files()), ["data.1.log", "data.log", "meta.json"])
        storage.left = 4096                  # and what the last one made is dead
        self.assertEqual(payloads(self.open(storage=storage)), [b"a", b"b"])

    def test_a_start_gives_back_the_room_it_kept_before_it_says_that_the_disk_is_full(self):
        with unittest.mock.patch.object(mq, "mount_of", lambda _: mq.Mount("/", "ext4")):
            storage = DiskOf()
            self.filled(b"a", storage=storage)
            self.drop()
            self.assertGreater(os.path.getsize(self.log_path()), mq.ROOM_LEAST_BYTES)
            storage.left = 0
            self.assertEqual(payloads(self.open(storage=storage)), [b"a"])

    def test_room_ahead_is_given_back_at_a_seal_at_a_stop_and_to_a_full_disk(self):
        with unittest.mock.patch.object(mq, "mount_of", lambda _: mq.Mount("/", "ext4")), \
                small_segments():
            storage = DiskOf()
            queue = self.filled(b"x" * 400, storage=storage)
            segment = queue.log.current

            def ahead():
                return os.path.getsize(self.file(segment.name)) - segment.end

            self.assertGreaterEqual(ahead(), mq.ROOM_LEAST_BYTES)
            storage.left = 0
            queue.put([b"x" * 200])          # takes of the room
            self.assertGreater(ahead(), 0)
            with self.assertRaises(mq.DiskFull):
                queue.put([b"x" * (1 << 20)])
            self.assertEqual(ahead(), 0)
            storage.left = 1 << 40
            queue.put([b"y"])
            self.assertGreater(ahead(), 0)
            queue.prepare()
            queue.put([b"z"])
            self.assertIsNot(queue.log.current, segment)
            self.assertEqual(ahead(), 0)
            segment = queue.log.current
            self.assertGreater(ahead(), 0)
            self.stop_cleanly()
            self.assertEqual(ahead(), 0)

    def test_a_put_beyond_what_an_offset_can_tell_is_refused(self):
        queue = self.filled(b"a")
        queue.log.current.end = mq.POSITION_MASK - 20
        with self.assertRaises(mq.DiskFull):
            queue.put([b"b"])

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
            with self.assertRaises(mq.LogFailed):
                snapshot(queue)
            self.assertEqual([c for c in storage.calls if c != "pread"], [])
            self.drop()
            shutil.rmtree(self.folder())

    def test_an_error_of_the_marks_poisons_the_log_unless_it_is_a_lack_of_space(self):
        for call, failure in (("pwrite", errno.EIO), ("fdatasync", errno.EIO),
                              ("fdatasync", errno.ENOSPC)):
            storage = FakeStorage()
            queue = self.filled(b"one", b"two", storage=storage)
            delivery = queue.take()
            storage.fail(call, failure)
            with self.assertRaises(mq.LogFailed):
                queue.settle(delivery)
                queue.log.sync_marks()
            self.drop()
            shutil.rmtree(self.folder())

    def test_an_error_between_a_write_and_what_it_means_poisons_the_log(self):
        queue = self.filled(b"a")
        for name, act in (("apply", lambda queue, _: queue.put([b"b"])),
                          ("apply_mark", mq.Queue.settle)):
            delivery = queue.take()
            with unittest.mock.patch.object(mq.State, name, side_effect=MemoryError), \
                    self.assertRaises(mq.LogFailed):
                act(queue, delivery)
            self.assertIsNotNone(queue.log.failure)
            queue = self.crash()

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
            tail = queue.log.tail            # the file may reach beyond it: room ahead
            time.sleep(0.005)
            os.fdatasync(fd)
            synced.append(tail)

        queue = self.open(fsync="always", storage=storage)
        storage.fdatasync = sync

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

    def test_a_failing_sync_fails_whoever_syncs_at_the_same_time(self):
        first, second = threading.Lock(), threading.Event()

        def fail_once(_):
            """As the kernel: of two syncs of one descriptor, one is told of the error."""
            if not first.acquire(blocking=False):
                second.set()
                return
            second.wait(0.2)
            raise OSError(errno.EIO, "broken")

        queue = self.open(fsync="always", lead=lambda log: None)
        append_unsynced(queue)
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

        append_unsynced(queue)
        storage.before["fdatasync"] = sync
        together(queue.log.sync, close)
        queue.log.sync()
        self.assertEqual(order, ["synced", "closed"])


class LockTest(Folder):
    def test_a_folder_is_used_by_one_queue_at_a_time(self):
        self.open()
        second = mq.Queue(mq.QueueConfig(name="q"), self.folder())
        with self.assertRaisesRegex(mq.StorageError, "in use"):
            second.log.lock()
        self.drop()
        second.log.lock()
        second.log.close()

    def test_every_file_is_locked_and_stays_so_whatever_else_is_closed(self):
        with small_segments():
            queue = self.filled(*[b"x" * 400] * 2)
            for _ in range(4):
                upkeep(queue)
                queue.put([b"x" * 400])
            for _ in range(3):
                queue.settle(queue.take())
            upkeep(queue)                    # frees some, renames the marks
            names = [name for name in os.listdir(self.folder()) if "corrupt" not in name]
            self.assertGreater(len(names), 4)
            self.assertEqual(self.locked(names), set(names))

    def test_folders_and_files_are_private(self):
        with small_segments():
            queue = self.filled(b"x" * 500)
            upkeep(queue)
            queue.put([b"y"])
            self.overwrite(b"x" * 500, b"X")
            self.assertEqual(payloads(queue), [b"y"])
            self.stop_cleanly()
        self.assertEqual(os.stat(self.folder()).st_mode & 0o777, 0o700)
        names = os.listdir(self.folder())
        self.assertGreater(len(names), 3)
        for name in names:
            self.assertEqual(os.stat(self.file(name)).st_mode & 0o777, 0o600)

    def test_a_lock_that_was_lost_is_the_end_before_a_file_is_used(self):
        for act in (lambda queue: queue.log.make_ready(), snapshot):
            queue = self.filled(b"a")
            before = sorted(self.files())
            failed = functools.partial(queue.log._fail, "keep the lock of", OSError(0, "lost"))
            with unittest.mock.patch.object(queue.log, "prove_lock", side_effect=failed), \
                    self.assertRaises(mq.LogFailed):
                act(queue)
            with self.assertRaises(mq.LogFailed):
                queue.put([b"b"])
            self.assertEqual([n for n in self.files() if n.endswith(".tmp")], [])
            self.assertLessEqual(set(before), set(self.files()))
            self.assertEqual(payloads(self.crash()), [b"a"])
            self.drop()
            shutil.rmtree(self.folder())

    def test_temporary_files_are_removed_before_the_marks_are_read(self):
        self.filled(b"a")
        self.drop()
        names = ["meta.json." + "0" * 16 + ".tmp", "data.log." + "a" * 16 + ".tmp",
                 "data.7.log." + "f" * 16 + ".tmp"]
        others = ["meta.json.tmp", "data.log.legacy.tmp", "notes"]
        for name in names + others:
            with open(self.file(name), "w"):
                pass
        order, storage = [], FakeStorage()
        storage.before["unlink"] = lambda path: order.append(os.path.basename(path))
        read = mq.Log.read_marks
        with unittest.mock.patch.object(mq.Log, "read_marks", lambda log: (
                order.append("read"), read(log))[1]):
            self.open(storage=storage)
        self.assertEqual(set(order[:3]), set(names))
        self.assertEqual(order[3], "read")
        self.assertLessEqual(set(others), set(self.files()))


class SegmentTest(Folder):
    """Files that are filled, sealed, emptied and removed."""

    def setUp(self):
        super().setUp()
        patch = small_segments(DEAD_BYTES=1 << 30)       # nothing is cleaned by itself
        patch.start()
        self.addCleanup(patch.stop)

    def segments(self):
        return sorted(name for name in os.listdir(self.folder()) if name.startswith("data.")
                      and name.endswith(".log"))

    def spread(self, count, size=400, **options):
        """Return a queue whose messages stand one or two a segment."""
        queue = self.open(**options)
        for number in range(count):
            queue.put([b"%03d" % number + bytes(size - 3)])
            upkeep(queue)
        return queue

    def test_a_full_segment_is_sealed_and_the_next_one_begins_with_what_was_put_before(self):
        queue, size = self.open(), 0
        for number in range(1, 20):
            first = queue.log.current
            before = queue.state.start
            queue.put([b"x" * 200])
            size += 200 + mq.HEAD.size
            if queue.log.current is not first:
                self.assertGreaterEqual(first.end, 600)
                self.assertEqual(os.path.getsize(self.file(first.name)), first.end)
                data = self.files()[queue.log.current.name]
                self.assertIsNotNone(mq.Codec.of_header(data, queue.log.current.number))
                start = queue.log.codec.decode_start(data[mq.FIRST:], queue.log.current.number)
                self.assertEqual(start, before)
                self.assertEqual(start, (number, number - 1, size - 200 - mq.HEAD.size))
            queue.prepare()
        self.assertGreater(queue.log.current.number, 4)
        self.assertEqual(counts(self.crash()), (19, 0, 0))

    def test_the_next_segment_is_made_ready_when_this_one_is_half_full(self):
        calls = []
        queue = self.open(call_upkeep=lambda: calls.append(1))
        queue.put([b"x" * 100])
        queue.prepare()
        self.assertIsNone(queue.log.ready)
        self.assertEqual(calls, [])
        queue.put([b"x" * 100])
        queue.put([b"x"])
        self.assertNotEqual(calls, [])
        queue.prepare()
        self.assertEqual((queue.log.ready.number, queue.log.current.number), (1, 0))
        self.assertEqual(self.files()["data.1.log"], queue.log.codec.header(1))

    def test_without_a_next_segment_the_current_one_grows(self):
        for failure in (errno.ENOSPC, errno.EMFILE):
            storage = FakeStorage()
            queue = self.filled(b"x" * 500, storage=storage)
            storage.fail("open", failure)
            queue.prepare()
            for _ in range(3):
                queue.put([b"x" * 500])
            self.assertEqual(queue.log.current.number, 0)
            storage.heal()
            queue.prepare()
            queue.put([b"y"])
            self.assertEqual(queue.log.current.number, 1)
            self.assertEqual(len(payloads(self.crash())), 5)
            self.drop()
            shutil.rmtree(self.folder())

    def test_a_start_that_finds_no_space_lets_the_current_segment_grow(self):
        storage = FakeStorage()
        queue = self.filled(b"x" * 700, storage=storage)
        queue.prepare()
        storage.fail("pwrite", errno.ENOSPC)
        storage.fail("allocate", errno.ENOSPC)
        with self.assertRaises(mq.DiskFull):
            queue.put([b"y"])
        storage.heal()
        queue.put([b"z"])
        self.assertEqual(queue.log.current.number, 1)
        self.assertEqual(payloads(self.crash()), [b"x" * 700, b"z"])

    def test_a_segment_that_could_not_be_made_leaves_no_name(self):
        for call in ("pwrite", "fdatasync", "fsync"):
            storage = FakeStorage()
            queue = self.filled(b"x" * 500, storage=storage)
            storage.fail(call, errno.ENOSPC)
            queue.prepare()
            storage.heal()
            self.assertEqual(self.segments(), ["data.log"])
            queue.put([b"y"])
            self.assertEqual(payloads(queue), [b"x" * 500, b"y"])
            self.drop()
            shutil.rmtree(self.folder())

    def test_a_name_that_exists_is_left_alone(self):
        queue = self.filled(b"x" * 500)
        for number in (1, 2):
            with open(self.file(f"data.{number}.log"), "w") as file:
                file.write("another node's")
        queue.prepare()
        self.assertEqual(queue.log.ready.number, 3)
        self.assertEqual(self.files()["data.1.log"], b"another node's")

    def test_the_number_of_a_segment_that_was_only_ready_does_not_come_back(self):
        queue = self.filled(b"x" * 400)
        queue.prepare()
        ready = queue.log.ready.number
        self.stop_cleanly()
        queue = self.open()                  # goes on in the old one, and removes that one
        self.assertEqual((queue.log.current.number, self.segments()), (0, ["data.log"]))
        queue.prepare()
        self.assertGreater(queue.log.ready.number, ready)

    def test_no_number_comes_back(self):
        seen, rng = set(), random.Random(SEED)
        for _ in range(12):
            queue = self.open(storage=FakeStorage(quick=True))
            for _ in range(rng.randrange(6)):
                queue.put([b"x" * 400])
                upkeep(queue)
                if rng.random() < 0.8:
                    queue.settle(queue.take())
            mine = {queue.log.current.number} | ({queue.log.ready.number} if queue.log.ready
                                                 else set())
            self.assertFalse({n for n in mine if n and n in seen} - queue.log.segments.keys())
            seen |= set(queue.log.segments) | mine
            self.stop_cleanly() if rng.random() < 0.5 else self.drop()
        self.assertGreater(max(seen), 12)

    def test_a_dead_segment_goes_and_the_first_one_is_never_written_again(self):
        queue = self.spread(8)
        self.assertGreater(len(self.segments()), 4)
        for _ in range(8):
            queue.settle(queue.take())
        upkeep(queue)
        self.assertLessEqual(len(self.segments()), 3)        # the first, the current, a ready one
        first = self.files()["data.log"]
        self.assertEqual(first, queue.log.codec.header(0))
        for number in range(8):
            queue.put([b"%d" % number * 400])
            upkeep(queue)
        self.assertEqual(self.files()["data.log"], first)
        queue = self.crash()
        self.assertEqual(self.files()["data.log"], first)
        self.assertEqual(len(payloads(queue)), 8)

    def test_a_segment_that_somebody_needs_stays(self):
        queue = self.spread(8, subscribers=("a", "b"))
        before = self.segments()
        for _ in range(8):
            queue.settle(queue.take("a"))
        upkeep(queue)
        self.assertEqual(self.segments(), before)
        out = [queue.take("b") for _ in range(8)]
        for delivery in out[:3] + out[4:]:
            queue.settle(delivery)
        upkeep(queue)
        self.assertLess(len(self.segments()), len(before))
        self.assertEqual(len(self.files()[f"data.{out[3].messages[0].offset >> 32}.log"]) > 400,
                         True)
        queue.retry(out[3])
        queue = self.crash(subscribers=("a", "b"))
        self.assertEqual(payloads(queue, "b"), [b"003" + bytes(397)])

    def test_a_segment_out_of_which_copies_went_goes_only_behind_a_snapshot(self):
        storage = FakeStorage()
        queue = self.spread(2, size=200, storage=storage)
        queue.put([b"x" * 400])
        queue.put([b"y"])
        self.assertGreater(queue.log.current.number, 0)
        queue.settle(queue.take())
        queue.retry(queue.take())            # 001 is an entry, and stands in the first segment
        queue.settle(drain_until(queue, b"x" * 400))
        storage.fail("rename", errno.ENOSPC)
        with contextlib.suppress(mq.CompactionFailed):
            compact(queue)
        self.assertIn(b"001", self.files()["data.log"])
        storage.heal()
        upkeep(queue)
        order = []
        storage.before["rename"] = lambda *_: order.append("rename")
        storage.before["truncate"] = lambda fd, _: order.append(
            os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        compact(queue)
        self.assertNotIn(b"001", self.files()["data.log"])
        self.assertEqual(sorted(m.payload[:3] for m in drain(self.crash(), settle=False)),
                         [b"001", b"y"])

    def test_many_segments_of_one_cleaning_share_a_snapshot(self):
        queue = self.spread(30, size=200)
        out = [queue.take() for _ in range(30)]
        for number, delivery in enumerate(out):
            (queue.retry if number % 3 == 0 else queue.settle)(delivery)
        before = len(self.segments())
        renames = []
        queue.log.storage = FakeStorage()
        queue.log.storage.before["rename"] = lambda *_: renames.append(1)
        with unittest.mock.patch.object(mq, "MARKS_BYTES", 1 << 30):
            compact(queue)
        self.assertLess(len(self.segments()), before)
        self.assertEqual(len(renames), 1)
        self.assertEqual([p[:3] for p in payloads(self.crash())],
                         [b"%03d" % n for n in range(0, 30, 3)])

    def test_a_file_that_somebody_deleted_is_put_back(self):
        queue = self.spread(6)
        upkeep(queue)
        current = queue.log.current.name
        sealed = next(name for name in self.segments() if name not in ("data.log", current))
        for name in ("data.log", current, sealed, "meta.json"):
            os.unlink(self.file(name))
            upkeep(queue)
            self.assertIn(name, os.listdir(self.folder()))
            self.assertEqual(os.stat(self.file(name)).st_mode & 0o777, 0o600)
            queue.put([b"more" + bytes(300)])
        names = {"data.log", current, sealed, "meta.json"}
        self.assertEqual(self.locked(names), names)
        queue.settle(queue.take())
        left = payloads(self.crash(), settle=False)
        self.assertEqual([p[:4].strip(b"\0") for p in left],
                         [b"%03d" % n for n in range(1, 6)] + [b"more"] * 4)
        self.assertEqual([n for n in self.files() if n.endswith(".tmp")], [])

    def test_the_whole_folder_deleted_is_put_back(self):
        queue = self.spread(4)
        shutil.rmtree(self.folder())
        for _ in range(3):
            upkeep(queue)
        self.assertEqual(len(payloads(self.crash())), 4)

    def test_a_name_that_another_file_took_is_the_end_and_that_file_is_left_alone(self):
        for name in ("data.log", "data.1.log"):
            queue = self.spread(3)
            self.assertIn(name, self.files())
            os.rename(self.file(name), self.file("aside"))
            with open(self.file(name), "w") as file:
                file.write("another's")
            with self.assertRaises(mq.LogFailed):
                upkeep(queue)
            with self.assertRaises(mq.LogFailed):
                queue.put([b"x"])
            self.assertEqual(self.files()[name], b"another's")
            self.drop()
            shutil.rmtree(self.folder())

    def test_a_close_lets_go_of_segments_that_are_being_removed(self):
        queue = self.spread(5)
        for _ in range(5):
            queue.settle(queue.take())
        steps = queue._free_dead_segments()
        while not queue.log._gone:
            next(steps)
        gone = list(queue.log._gone)
        steps.close()
        self.assertTrue(gone and all(segment.fd >= 0 for segment in gone))
        queue.log.hold(gone[:1])             # a backup that was cut off
        self.assertTrue(queue.close())
        self.assertEqual({segment.fd for segment in gone}, {-1})

    def test_a_file_is_truncated_in_parts_with_rests(self):
        queue = self.spread(1, size=2000)
        queue.put([b"y"])
        queue.settle(queue.take())
        sizes = []
        for rest in queue.upkeep():
            sizes.append((os.path.getsize(self.file("data.log")), rest))
        self.assertLessEqual(sizes[-1][0], mq.FIRST)
        steps = [before - after for (before, _), (after, _) in zip(sizes, sizes[1:])]
        self.assertGreater(len([s for s in steps if s]), 4)
        self.assertLessEqual(max(steps), mq.TRUNCATE_BYTES)
        self.assertEqual(len(payloads(queue)), 1)


# ---- State --------------------------------------------------------------------------------

class EntriesTest(unittest.TestCase):
    def filled(self, *ids):
        entries = mq.Entries()
        for id_ in ids:
            entries.put(id_, 100 + id_, 0, 50, 0)
        return entries

    def test_what_was_put_is_found_counted_and_popped(self):
        entries = self.filled(5, 1, 5000)
        entries.put(7, 107, 999, 50, 2)
        self.assertEqual((entries.count, entries.delayed), (4, 1))
        self.assertEqual(entries[7], (7, 107, 999, 50, 2))
        entries.put(7, 200, 0, 50, 3)        # moved, and no longer delayed
        self.assertEqual((entries.count, entries.delayed, entries[7].offset), (4, 0, 200))
        self.assertEqual((entries.due(7), entries.due(8), 8 in entries), (0, None, False))
        self.assertEqual(sorted(entry[0] for entry in entries), [1, 5, 7, 5000])
        self.assertEqual(entries.lowest(), 1)
        for first, last in ((1, 5), (2, 5000), (0, 1 << 50), (8, 4999)):
            self.assertEqual(entries.between(first, last),
                             [n for n in (1, 5, 7, 5000) if first <= n <= last])
        self.assertEqual(entries.pop(2, 6), [(5, 105, 0, 50, 0)])
        self.assertEqual(entries.pop(2, 6), [])
        self.assertEqual((entries.count, 5 in entries, 7 in entries), (3, False, True))
        entries.add([mq.Message(n, 0, 0, b"", 100 + n, 50) for n in range(1020, 1030)])
        self.assertEqual((entries.count, entries[1024]), (13, (1024, 1124, 0, 50, 0)))
        entries.put(1025, 1, 5, 50, 0)
        self.assertEqual([entry[0] for entry in entries.pop(2, 1 << 50)],
                         [7, *range(1020, 1030), 5000])
        self.assertEqual((entries.count, entries.delayed), (1, 0))
        self.assertEqual([entry[0] for entry in entries], [1])

    def test_a_frozen_page_never_changes_again(self):
        entries = self.filled(*range(3000))
        frozen = entries.freeze()
        before = [dict(page) for page in frozen]
        entries.put(5, 999, 7, 1, 1)
        entries.put(5000, 999, 7, 1, 1)
        entries.pop(1024, 2047)
        again = entries.freeze()
        self.assertEqual(frozen, before)
        self.assertEqual([min(page) for page in again], [0, 2048, 5000])
        self.assertIs(frozen[2], again[1])   # what did not change is shared
        other = mq.Entries(again)
        other.pop(0, 0)
        self.assertEqual(other.count, entries.count - 1)
        self.assertIn(0, again[0])


# ---- Queue --------------------------------------------------------------------------------

class DeadlinesTest(unittest.TestCase):
    def test_what_is_due_comes_out_in_time_and_nothing_earlier(self):
        rng, wanted = random.Random(SEED), {}
        deadlines = mq.Deadlines(wanted.get)
        for key in range(2000):
            wanted[key] = rng.randrange(20_000)
            deadlines.add(wanted[key], key)
            if rng.random() < 0.3:           # another one, earlier or later
                wanted[key] = rng.randrange(20_000)
                deadlines.add(wanted[key], key)
        for now in range(0, 21_000, 77):
            due = {key for key, deadline in wanted.items() if deadline <= now}
            found = []
            while deadlines.next_ms() <= now:
                some = deadlines.pop_due(now, 100)
                self.assertLessEqual(len(some), 100)
                found += some
                for key in some:
                    del wanted[key]
            self.assertEqual((sorted(found), len(set(found))), (sorted(due), len(found)))
        self.assertEqual(deadlines.next_ms(), mq.NEVER)

    def test_what_became_stale_costs_no_sweep(self):
        asked = []
        wanted = {-1: 5000}
        deadlines = mq.Deadlines(lambda key: (asked.append(key), wanted.get(key))[1])
        deadlines.add(5000, *range(1_000_000))           # none of which is wanted any more
        deadlines.add(5000, -1)
        self.assertEqual(deadlines.pop_due(4000, 1000), [])
        self.assertEqual(asked, [])
        self.assertEqual(deadlines.next_ms(), 4096)
        found, holds = [], 0
        while not found:
            del asked[:]
            found, holds = deadlines.pop_due(5000, 1000), holds + 1
            self.assertLessEqual(len(asked), 1000)
        self.assertEqual((found, holds <= 1002), ([-1], True))


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
        self.assertEqual(queue.take().counts[0], 2)

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

    def test_what_is_leased_or_delayed_costs_what_the_readme_says(self):
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            text = re.search(r"grow with\s+their number.*?\.", file.read(), re.S)[0]
        leased, in_batches, delayed = map(int, re.findall(r"\d+", text))

        def put(queue):
            for _ in range(10):
                queue.put([b"x"] * 1000, 60)

        def take(size):
            def act(queue):
                for _ in range(10_000 // size):
                    queue.take(wish=mq.Wish(0 if size == 1 else size, mq.MIB, 60))
            return act
        for act, wanted in ((take(1), leased), (take(1000), in_batches), (put, delayed)):
            queue = self.open(f"q{len(self.queues)}")
            if act is not put:
                queue.put([b"x"] * 10_000)
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            before = tracemalloc.get_traced_memory()[0]
            act(queue)
            used = (tracemalloc.get_traced_memory()[0] - before) / 10_000
            tracemalloc.stop()
            self.assertLess(used, wanted * 1.1)
            self.assertGreater(used, wanted * 0.6)

    def test_memory_does_not_grow_with_the_backlog(self):
        queue = self.open()
        queue.put([b"x" * 100] * 5000)
        queue.take()
        subscription = queue.state.subscriptions[""]
        self.assertEqual(subscription.entries.count, 1)
        self.assertLess(read_ahead_count(queue), 200)
        self.assertEqual(counts(queue), (4999, 1, 0))


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

    def test_no_start_serves_before_its_snapshot_is_written(self):
        queue = self.filled(b"a")
        self.stop_cleanly()
        size = os.path.getsize(self.log_path())
        storage = FakeStorage()
        storage.fail("rename", errno.ENOSPC)
        with self.assertRaises(mq.StorageError):         # else the stop would stay a clean one
            self.open(storage=storage)
        queue = self.crash()
        seen = queue.put([b"b"])
        self.drop()
        os.truncate(self.log_path(), size)   # a power cut: the put was not durable
        self.assertGreater(self.open().put([b"c"]), seen)

    def test_a_snapshot_does_not_forget_what_the_full_disk_refused(self):
        clock, storage = FakeClock(), FakeStorage()
        queue = self.filled(b"a", b"b", storage=storage, clock=clock)
        lease = queue.take(wish=mq.Wish(0, 0, 600)).lease
        storage.fail("pwrite", errno.ENOSPC)
        queue.nack("", lease, 3600)
        storage.heal()
        compact(queue)
        upkeep(queue)
        self.assertEqual(counts(queue), (1, 0, 1))
        queue = self.crash(clock=clock)
        clock.passed += 3_600_000
        self.assertEqual(queue.take().counts[0], 2)

    def test_a_mark_that_found_no_space_does_not_let_a_later_one_be_misread(self):
        storage = FakeStorage()
        queue = self.filled(*[b"%d" % n for n in range(6)], storage=storage)
        out = [queue.take() for _ in range(4)]
        queue.settle(out[0])
        storage.fail("pwrite", SHORT)
        with contextlib.suppress(mq.LogFailed):
            queue.settle(out[2])
        storage.heal()
        self.assertIsNone(queue.log.failure)
        queue.settle(out[3])
        left = payloads(self.crash())
        self.assertLessEqual({b"1", b"4", b"5"}, set(left))
        self.assertNotIn(b"0", left)
        self.assertNotIn(b"3", left)

    def test_upkeep_does_not_go_on_for_ever_about_what_it_must_keep(self):
        with small_segments():
            queue = self.filled(*[b"x"] * 200)
            out = [queue.take() for _ in range(200)]
            for delivery in out:
                queue.retry(delivery)
            upkeep(queue)
            for _ in range(3):
                before = queue.log.appends, queue.log.current.number
                upkeep(queue)
                self.assertEqual(before, (queue.log.appends, queue.log.current.number))
            drain(queue)
            queue.put([b"y"])                # behind what is dead now
            upkeep(queue)
            self.assertLess(queue.log.size, 1000)

    def test_a_compaction_ends_though_more_comes_than_it_copies(self):
        with small_segments():
            queue = self.filled(*[b"x" * 50] * 100)
            for number, delivery in enumerate([queue.take() for _ in range(100)]):
                (queue.retry if number % 3 == 0 else queue.settle)(delivery)
            left = []
            for _ in queue.compact():
                self.assertLess(len(left), 2000, "it does not end")
                for _ in range(2):
                    left.append(b"%d" % len(left) + b"y" * 300)
                    queue.put([left[-1]])
            self.assertGreater(len(left), 20)
            self.assertEqual(payloads(self.crash()), [b"x" * 50] * 34 + left)

    def test_a_cursor_that_stands_where_nothing_is_left_reads_on(self):
        with small_segments():
            queue = self.open(subscribers=("a", "b"))
            for n in range(10):
                queue.put([b"%d" % n * 300])
                upkeep(queue)
            drain(queue, "a")
            queue.settle(queue.take("b"))
            self.drop()
            for name in ("data.2.log", "data.3.log"):    # as an operator would
                os.unlink(self.file(name))
            queue = self.open(subscribers=("a", "b"))
            gone = counts(queue, "b")[0]
            left = payloads(queue, "b")
            self.assertEqual(left, sorted(left))
            self.assertLess(len(left), 9)
            self.assertGreaterEqual(gone, len(left))
            self.assertEqual((counts(queue, "b"), held(queue)), ((0, 0, 0), (0, 0)))

    def test_many_ends_at_once_are_served_in_bounded_holds_of_the_lock(self):
        clock = FakeClock()
        queue = self.open(clock=clock)
        queue.put([b"x"] * 2500, delay_s=5)
        clock.passed += 5000
        ready = [0]
        while counts_now(queue)["delayed"]:
            queue.tick()
            ready.append(counts_now(queue)["ready"])
            self.assertLessEqual(ready[-1] - ready[-2], 1000)
        self.assertEqual((ready[-1], len(ready) <= 7), (2500, True))     # a key may be seen twice
        for _ in range(2500):
            queue.take(wish=mq.Wish(0, 0, 5))
        clock.passed += 5000
        ready = [0]
        while counts_now(queue)["leased"]:
            queue.tick()
            ready.append(counts_now(queue)["ready"])
            self.assertLess(ready[-1] - ready[-2], 1000 + mq.AT_ONCE_LEASES)
        self.assertEqual((ready[-1], len(ready) <= 7), (2500, True))

    def test_a_dead_letter_whose_bytes_went_bad_is_no_obstacle(self):
        config = mq.QueueConfig(name="q", max_deliveries=1, dead_letter="dead")
        queue = self.filled(b"bad", b"good", config=config)
        for delivery in [queue.take(), queue.take()]:
            queue.retry(delivery)
        self.overwrite(b"bad", b"BAD")
        self.assertEqual([m.payload for m in queue.dead_letters().messages], [b"good"])

    def test_who_waits_comes_before_who_comes_just_as_a_lease_ends(self):
        clock, answers = FakeClock(), []
        queue = self.filled(b"a", clock=clock)
        queue.take(wish=mq.Wish(0, 0, 5))
        queue.take(waiter=mq.Waiter(mq.ONE, 60, answers.append))
        clock.passed += 5000
        self.assertIsNone(queue.take())
        self.assertEqual(len(answers), 1)

    def test_who_waits_too_long_while_there_is_no_room_is_told_so(self):
        clock, budget, answers = FakeClock(), mq.Budget(200_000, 100_000), []
        queue = self.filled(b"x" * 70_000, b"y" * 70_000, clock=clock, budget=budget)
        queue.retry(queue.take())            # an entry, so that there is more to be read on
        budget.hold(150_000)
        queue.take(waiter=mq.Waiter(mq.ONE, 1, answers.append))
        clock.passed += 5000
        queue.tick()
        self.assertEqual(answers, [None])
        self.assertGreater(queue.tick(), clock.passed + 1000)    # nothing keeps it busy

    def test_who_comes_late_for_what_expires_is_not_told_that_the_queue_is_empty(self):
        clock, answers = FakeClock(), []
        queue = self.open(clock=clock, config=mq.QueueConfig(name="q", ttl=1))
        for _ in range(5):
            queue.put([b"old"] * mq.AT_ONCE)
        clock.passed += 1000
        queue.put([b"new"])
        self.assertIsNone(queue.take(waiter=mq.Waiter(mq.ONE, 0, answers.append)))
        while not answers:
            queue.tick()
        self.assertEqual(answers[0].messages[0].payload, b"new")

    def test_a_compaction_without_memory_fails_the_log_and_takes_no_message_twice(self):
        queue = self.filled(*[b"%d" % number for number in range(10)])
        for _ in range(6):
            queue.settle(queue.take())
        patch = unittest.mock.patch.object(mq.Subscription, "take_in", side_effect=MemoryError)
        with patch, self.assertRaises(mq.LogFailed):
            compact(queue)
        self.assertEqual(payloads(self.crash()), [b"6", b"7", b"8", b"9"])

    def test_a_take_reads_on_behind_what_is_delayed_until_it_knows(self):
        with unittest.mock.patch.object(mq, "MIB", 4096):
            queue = self.filled()
            queue.put([b"x" * 30] * 2000, delay_s=60)
            queue.put([b"ready"])
            self.assertEqual(queue.take().messages[0].payload, b"ready")
            self.assertIsNone(queue.take())

    def test_what_does_not_fit_is_not_read_for_who_is_refused(self):
        budget = mq.Budget(200_000, 100_000)
        queue = self.filled(b"x" * 70_000, budget=budget)
        queue.retry(queue.take())
        budget.hold(150_000)
        with unittest.mock.patch.object(queue.log, "message_at") as read:
            for wish in (mq.ONE, mq.Wish(peek=True)):
                with self.assertRaises(mq.ApiError):
                    queue.take(wish=wish)
            read.assert_not_called()

    def test_an_answer_that_fails_fails_the_log_for_its_message_would_be_out_for_ever(self):
        queue = self.open()
        queue.take(waiter=mq.Waiter(mq.ONE, 60, unittest.mock.Mock(side_effect=ValueError)))
        with self.assertRaises(mq.LogFailed):
            queue.put([b"a"])
        self.assertEqual(counts(self.crash()), (1, 0, 0))

    def test_a_put_on_a_full_broadcast_queue_costs_no_look_at_every_entry(self):
        queue = self.open(subscribers=("a", "b"), config=mq.QueueConfig(
            name="q", kind="broadcast", max_messages=100_000))
        queue.put([b"x"] * 3000)
        for name in "ab":
            queue.take(name, mq.Wish(1000, mq.MIB, 60))
        held(queue)
        with unittest.mock.patch.object(queue.state, "recount") as count:
            queue.put([b"y"])
            queue.settle(queue.take("a"))
            self.assertEqual(held(queue)[0], 3001)
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
            for item in self.ready(name, now):
                if self.is_expired(item, now):
                    self.expire(name, item)
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
            if most and item.count >= most:
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

    def setUp(self):
        super().setUp()
        small = unittest.mock.patch.multiple(mq, **SMALL)
        small.start()
        self.addCleanup(small.stop)

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
            self.peek, self.bury, self.late_lease, self.upkeep]
        for _ in range(500):
            self.clock.passed += rng.choice((0, 1, 30, 400))
            self.tick()
            act = rng.choice(acts)
            if rng.random() < 0.05:
                act = rng.choice((self.compact, self.snapshot, self.restart, self.purge))
            act()
            self.compare(act.__name__)

    def compact(self):
        """Compact, with more of everything between its steps."""
        self.go_through(self.queue.compact())

    def upkeep(self):
        self.queue.prepare()
        self.go_through(self.queue.upkeep())

    def snapshot(self):
        self.go_through(self.queue.snapshot())

    def go_through(self, steps):
        for _ in steps:
            self.rng.choice((self.put, self.take, self.finish, self.finish, self.wait))()

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
        items = self.model.all_held().values()
        self.assertEqual(held(self.queue), (len(items), sum(
            len(item.payload) + mq.HEAD.size for item in items)), act)
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
        return [(m.id, n) for m, n in zip(delivery.messages, delivery.counts)] if delivery else []

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
        delivery = self.queue.take(name, wish._replace(lease_s=0, peek=True))
        expected = self.model.chosen(name, wish, self.queue.now_ms())
        self.assertEqual(self.told(delivery), [(item.id, item.count) for item in expected])

    def bury(self):
        found = set()
        for letters in iter(self.queue.dead_letters, None):
            found.update((letters.subscriber, id_) for id_ in letters.ids)
            self.queue.bury(letters)
        self.assertEqual(found, self.model.dead())
        self.model.bury(found)

    def purge(self):
        self.assertEqual(self.queue.purge(), len(self.model.all_held()))
        self.model.purge()


class BroadcastModelTest(ModelTest):
    """The same with several subscribers, who join and leave; and with a change of kind."""

    subscribers = ("a", "b")
    others = (("a", "b"), ("a",), ("b", "c"), ("a", "b", "c"), ("",))

    def peek(self):
        super().peek()
        wish, subscriptions = mq.Wish(1000, mq.MIB, peek=True), self.queue.state.subscriptions
        name = min(self.subscribers, key=lambda name: subscriptions[name].cursor)
        self.assertEqual(self.told(self.queue.take(None, wish)), [
            (item.id, item.count) for item in self.model.chosen(name, wish, self.queue.now_ms())])


class SubscriberTest(Folder):
    """Who gets what when the config changes between two starts."""

    def take_all(self, queue, *names):
        return {name: payloads(queue, name) for name in names}

    def test_a_new_subscriber_starts_from_now_on_and_one_that_left_holds_nothing(self):
        queue = self.filled(b"1", b"2", subscribers=("a", "b"))
        queue.settle(queue.take("a"))
        queue = self.crash(subscribers=("a", "c"))
        queue.put([b"3"])
        self.assertEqual(held(queue)[0], 2)
        self.assertEqual(self.take_all(queue, "a", "c"), {"a": [b"2", b"3"], "c": [b"3"]})
        self.assertEqual(held(queue), (0, 0))
        queue = self.crash(subscribers=("a", "b"))
        self.assertEqual(self.take_all(queue, "a", "b"), {"a": [], "b": []})

    def test_positions_are_kept_by_restarts_and_compactions(self):
        queue = self.filled(*[b"%d" % n for n in range(6)], subscribers=("a", "b"))
        for name, settle in (("a", (0, 1, 3)), ("b", (2,))):
            out = [queue.take(name) for _ in range(4)]
            for number, delivery in enumerate(out):
                (queue.settle if number in settle else queue.retry)(delivery)
        compact(queue)
        for _ in range(2):
            queue = self.crash(subscribers=("a", "b"))
            snapshot(queue)
        self.stop_cleanly()
        queue = self.open(subscribers=("a", "b"))
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
        self.assertEqual(queue.take("a").counts[0], 2)
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

    def test_a_change_of_subscribers_is_part_of_the_starts_snapshot_all_or_nothing(self):
        self.filled(b"1", b"2", subscribers=("a", "b")).settle(self.queues[0].take("a"))
        for call in ("open", "pwrite", "fdatasync", "rename", "fsync"):
            for at in range(1, 6):
                storage = FakeStorage()
                storage.fail(call, errno.EIO, at=at)
                self.drop()
                files = self.files()
                try:
                    queue = self.open(subscribers=("a", "c", "d"), storage=storage)
                except (OSError, mq.LogFailed, mq.StorageError):
                    self.drop()
                    queue = self.open(subscribers=("a", "b"))
                    found = self.take_all(queue, "a", "b")
                    self.assertIn(found, (
                        {"a": [b"2"], "b": [b"1", b"2"]},        # nothing was changed, or all
                        {"a": [b"2"], "b": []} if call == "fsync" else None), (call, at))
                self.drop()
                self.put_files(files)

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
    """What frees space while the queue goes on, small."""

    def setUp(self):
        super().setUp()
        patch = small_segments()
        patch.start()
        self.addCleanup(patch.stop)

    def test_only_what_is_held_is_kept_wherever_it_is(self):
        queue = self.filled(*[b"%03d" % n * 10 for n in range(300)])
        stuck = queue.take()
        for _ in range(250):
            queue.settle(queue.take())
        back = queue.take()
        queue.retry(back)
        before = queue.log.size
        compact(queue)
        self.assertLess(queue.log.size, before / 3)
        queue.settle(stuck)
        left = [b"%03d" % n * 10 for n in range(251, 300)]
        queue = self.crash()
        first = queue.take()
        self.assertEqual(first.counts, [2])
        queue.retry(first)
        self.assertEqual(payloads(queue), left)

    def test_a_put_that_rotates_while_a_segment_is_sealed_is_no_full_disk(self):
        queue = self.filled(b"a" * 700, b"b")
        queue.settle(queue.take())
        queue.prepare()
        self.assertIsNotNone(queue.log.ready)
        # The second hold is the one that seals.
        queue.lock = Gate(queue.lock, [lambda: None, lambda: queue.log.rotate(queue.state.start)])
        compact(queue)
        self.assertEqual(payloads(queue), [b"b"])

    def test_a_cleaning_ends_where_another_reader_met_damage_at_the_end(self):
        queue = self.filled(b"a" * 100, b"b" * 100, b"c" * 600)
        upkeep(queue)
        queue.put([b"d"])
        segment = queue.log.segments[0]
        for _ in range(2):
            queue.settle(queue.take())
        queue.take()                         # what nobody holds is not read
        steps, end = queue._clean(segment), segment.end
        next(steps)
        self.overwrite(b"c" * 600, b"C" * 600)
        queue.log.read(end - 600 - mq.HEAD.size, queue.state.end)
        self.assertLess(segment.end, end)
        some = iter([queue.log.read] * 10)   # and no more
        with unittest.mock.patch.object(queue.log, "read", side_effect=lambda *a: next(some)(*a)):
            for _ in steps:
                pass

    def test_a_start_without_space_frees_nothing_out_of_which_copies_went(self):
        with small_segments(**dict.fromkeys(("DEAD_BYTES", "DEAD_LOW_BYTES", "MARKS_BYTES",
                                             "SNAPSHOT_DATA_BYTES"), mq.MIB)):
            queue = self.open()
            for n in range(12):
                queue.put([b"%02d" % n * 50])
                upkeep(queue)
            queue.take(wish=mq.Wish(lease_s=100))
            for _ in range(8):
                queue.settle(queue.take())
            mq.exhaust(queue._clean(queue.log.segments[0]))
            self.drop()                      # killed before the snapshot that knows of it

            def refuse(fd, data, offset):
                if data.startswith(b'["snapshot"'):
                    raise OSError(errno.ENOSPC, "full")
            storage = FakeStorage()
            storage.before["pwrite"] = refuse
            with self.assertRaises(mq.StorageError):
                self.open(storage=storage)
            self.assertNotIn("data.1.log", os.listdir(self.folder()))    # none went out of this
            self.assertEqual(payloads(self.crash()), [b"%02d" % n * 50 for n in (0, 9, 10, 11)])

    def test_the_folder_stays_under_twice_what_is_held_and_some(self):
        queue, rng, out = self.open(storage=FakeStorage(quick=True)), random.Random(SEED), []
        for number in range(800):
            queue.put([b"%04d" % number * 10])
            if number % 10 < 9:              # every tenth stays: no segment is ever empty
                delivery = queue.take()
                out.append(delivery) if rng.random() < 0.1 else queue.settle(delivery)
            if len(out) > 20:
                queue.retry(out.pop(0))
            upkeep(queue)
            data = sum(segment.end for segment in queue.log.segments.values())
            self.assertLess(data, 2 * held(queue)[1] + mq.DEAD_BYTES + 6 * mq.SEGMENT_BYTES)
            self.assertLess(len(queue.log.segments), 60)
        self.assertGreater(held(queue)[0], 80)
        for delivery in out:
            queue.retry(delivery)
        left = payloads(queue, settle=False)
        self.assertEqual(payloads(self.crash()), left)

    def test_delays_counts_and_other_subscribers_places_survive_a_copy(self):
        clock = FakeClock()
        queue = self.open(clock=clock, subscribers=("a", "b"))
        queue.put([b"late" + bytes(96)], delay_s=3600)
        for n in range(12):
            queue.put([b"%02d" % n * 50])
            upkeep(queue)
        for name, settle in (("a", range(1, 12)), ("b", range(0, 12, 2))):
            for number, delivery in enumerate([queue.take(name) for _ in range(12)]):
                (queue.settle if number in settle else queue.retry)(delivery)
        before = queue.log.segments.keys() - {0}
        compact(queue)
        self.assertLess(len(before & queue.log.segments.keys()), len(before))
        for _ in range(2):
            for name, waiting in (("a", [0]), ("b", range(1, 12, 2))):
                self.assertEqual(counts(queue, name), (len(waiting), 0, 1))
            queue = self.crash(clock=clock, subscribers=("a", "b"))
        clock.passed += 3_600_000
        for name, waiting in (("a", [0]), ("b", range(1, 12, 2))):
            got = list(iter(functools.partial(queue.take, name), None))
            self.assertEqual([d.messages[0].payload[:2] for d in got],
                             [b"la"] + [b"%02d" % n for n in waiting])
            self.assertEqual([d.counts[0] for d in got], [1] + [2] * len(waiting))

    def test_ids_are_not_reused_when_nothing_is_left(self):
        queue = self.filled(b"a", b"b")
        drain(queue)
        compact(queue)
        self.assertEqual(queue.put([b"c"]), 3)
        drain(queue)
        compact(queue)
        self.assertGreater(self.crash().put([b"d"]), 3)

    def test_a_segment_that_was_large_for_much_goes_when_little_is_left_and_no_put_comes(self):
        queue = self.filled(*[b"x" * 100] * 200)
        drain(queue)
        queue.prepare()
        with small_segments():               # as if what is held had allowed for more before
            upkeep(queue)
        self.assertLess(queue.log.size, 2000)

    def test_a_full_segment_in_which_somebody_has_still_to_read_on_is_not_cleaned(self):
        queue = self.open(subscribers=("a", "b"))
        queue.put([b"%d" % n * 100 for n in range(10)])
        queue.prepare()
        for name, count in (("a", 9), ("b", 7)):
            for _ in range(count):
                queue.settle(queue.take(name))
        queue.retry(queue.take("a"))         # an entry of a, which b has not come to yet
        with small_segments():
            upkeep(queue)
            self.assertEqual([counts(queue, name)[0] for name in "ab"], [1, 3])
            self.assertEqual(len(drain(queue, "b")), 3)

    def test_calls_and_cleaned_segments_are_counted(self):
        queue = self.filled(b"kept", *[b"x"] * 20)
        queue.take(wish=mq.Wish(lease_s=60))
        drain(queue)
        compact(queue)                       # cleans the one that holds what is leased
        self.assertEqual(queue.numbers()["compactions_total"], 2)
        compact(queue)
        self.assertEqual(queue.numbers()["compactions_total"], 3)

    def test_a_queue_that_holds_nothing_becomes_small(self):
        queue = self.filled(*[b"x" * 100] * 200)
        drain(queue)
        compact(queue)
        upkeep(queue)
        self.assertLess(queue.log.size, 2000)
        self.assertLess(sum(os.path.getsize(self.file(name)) for name in os.listdir(self.folder())
                            if name != queue.log.current.name), 3000)

    def test_puts_takes_and_returns_go_on_meanwhile(self):
        queue = self.filled(*[b"%05d" % n for n in range(1000)])
        stop, taken, lock = threading.Event(), [], threading.Lock()
        puts = [1000]

        def work():
            while not stop.is_set() and puts[0] < 10_000:        # names of five digits sort
                with lock:
                    queue.put([b"%05d" % puts[0]])
                    puts[0] += 1
                delivery = queue.take()
                if delivery and delivery.ids[0] % 7 == 0 and delivery.counts[0] == 1:
                    queue.retry(delivery)
                elif delivery:
                    queue.settle(delivery)
                    taken.append(delivery.messages[0].payload)

        def keep():
            try:
                for _ in range(4):
                    for steps in (queue.compact(), queue.upkeep()):
                        queue.prepare()
                        for _ in steps:
                            time.sleep(0.00001)
            finally:
                stop.set()

        together(work, work, work, keep)
        self.assertGreater(queue.log.current.number, 0)      # how many depends on the machine
        taken += payloads(self.crash())
        self.assertEqual(sorted(taken), [b"%05d" % n for n in range(puts[0])])

    def test_a_kill_in_any_step_loses_nothing(self):
        for step in itertools.count():
            queue = self.filled(*[b"%02d" % n * 50 for n in range(20)],
                                storage=FakeStorage(quick=True))
            for number, delivery in enumerate([queue.take() for _ in range(15)]):
                (queue.retry if number % 4 == 0 else queue.settle)(delivery)
            done = len([None for _, _ in zip(range(step), queue.compact())])
            queue = self.crash(storage=FakeStorage(quick=True))
            self.assertEqual([p[:2] for p in payloads(queue)],
                             [b"%02d" % n for n in [*range(0, 15, 4), *range(15, 20)]], step)
            self.drop()
            shutil.rmtree(self.folder())
            if done < step:
                break
        self.assertGreater(step, 10)

    def test_a_lack_of_space_is_told_and_loses_nothing(self):
        for call, failure in (("pwrite", errno.ENOSPC), ("pwrite", errno.EDQUOT)):
            storage = FakeStorage()
            queue = self.filled(*[b"%02d" % n * 50 for n in range(10)], storage=storage)
            for number, delivery in enumerate([queue.take() for _ in range(10)]):
                (queue.retry if number % 4 == 0 else queue.settle)(delivery)
            storage.fail(call, failure)
            storage.fail("allocate", errno.ENOSPC)
            with self.assertRaises(mq.CompactionFailed):
                compact(queue)
            self.assertIsNone(queue.log.failure)
            storage.heal()
            queue.put([b"c"])
            compact(queue)
            self.assertEqual([p[:2] for p in payloads(self.crash())],
                             [b"00", b"04", b"08", b"c"])
            self.drop()
            shutil.rmtree(self.folder())

    def test_any_other_error_poisons_the_log_and_loses_nothing(self):
        for call in ("pwrite", "fdatasync", "fsync", "rename", "open"):
            storage = FakeStorage()
            queue = self.filled(b"a" * 100, b"b", storage=storage)
            queue.settle(queue.take())
            storage.fail(call, errno.EIO)
            with self.assertRaises((mq.LogFailed, OSError, mq.CompactionFailed)):
                compact(queue)
                snapshot(queue)
            storage.heal()
            self.assertEqual(payloads(self.crash()), [b"b"])
            self.drop()
            shutil.rmtree(self.folder())

    def test_a_lack_of_descriptors_is_none_of_the_logs_faults(self):
        storage = FakeStorage()
        queue = self.filled(b"a", b"b", storage=storage)
        queue.settle(queue.take())
        storage.fail("open", errno.EMFILE)
        with self.assertRaises(mq.CompactionFailed):
            compact(queue)
        self.assertFalse(snapshot(queue))
        self.assertIsNone(queue.log.failure)
        queue.put([b"c"])
        self.assertEqual(payloads(queue), [b"b", b"c"])

    def test_it_uses_the_reserve_down_to_a_quarter_of_it(self):
        queue = self.filled(*[b"%02d" % n * 50 for n in range(10)])
        for number, delivery in enumerate([queue.take() for _ in range(10)]):
            (queue.retry if number % 4 == 0 else queue.settle)(delivery)
        free = queue.space.free_bytes()
        queue.space.min_free_bytes = free * 8
        with self.assertRaises(mq.CompactionFailed):
            compact(queue)
        queue.space.min_free_bytes = free * 2
        compact(queue)
        self.assertEqual(held(queue)[0], 3)


# ---- No memory ----------------------------------------------------------------------------

CALLS = 60                                   # that find no memory, of an operation


class Starved:
    """No memory for the `at`-th call that the server makes from here on, in Python or in C.

    Calls of the tests do not count, nor the release of a lock, which needs no memory."""

    def __init__(self, at):
        self.left, self.where = at, "nowhere"

    def __enter__(self):
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _see(self, frame, what, argument):
        if (what in ("call", "c_call") and frame.f_code.co_filename == mq.__file__
                and getattr(argument, "__name__", "") not in ("release", "__exit__")
                and frame.f_code is not mq.Poll.left.__code__):
            self.left -= 1
            if self.left == 0:
                self.where = f"{frame.f_code.co_name}:{frame.f_lineno} {what} {argument}"
                raise MemoryError


class MemoryTest(Folder):
    """Whatever call finds no memory: nothing that was answered is lost, who waits is answered,
    and nothing stays held without a lease. What a queue raises, a server answers with 500 or 503;
    once its log has failed, the process ends, and with it every connection."""

    config = {"name": "q", "max_deliveries": 3}

    def setUp(self):
        super().setUp()
        self.base = tempfile.mkdtemp(prefix="mq-test-", dir="/dev/shm" if os.access(
            "/dev/shm", os.W_OK) else None)  # some thousand small folders
        self.addCleanup(shutil.rmtree, self.base, ignore_errors=True)
        ignored = unittest.mock.patch.object(sys, "unraisablehook", lambda _: None)
        ignored.start()                      # a generator that is let go of has its calls too
        self.addCleanup(ignored.stop)
        self.clock, self.storage = FakeClock(), FakeStorage(quick=True)
        small = unittest.mock.patch.multiple(mq, **SMALL)
        small.start()
        self.addCleanup(small.stop)

    # -- a server in few lines

    def begin(self):
        self.drop()
        shutil.rmtree(self.folder(), ignore_errors=True)
        self.ledger, self.number, self.buried = Ledger(), 0, []
        self.start()

    def start(self):
        """Start on the folder, as after a kill."""
        self.drop()
        self.ledger.fault()
        self.told, self.answers, self.staging = [], [], set()
        self.queue = self.open(config=mq.QueueConfig(**self.config), clock=self.clock,
                               storage=self.storage, staging=self.staging)

    def end_round(self):
        for queue in list(self.staging):
            queue.flush()

    def put(self, count=1, delay_s=0, end_round=True):
        sent, told = [], []
        for _ in range(count):
            self.number += 1
            sent.append(b"%d" % self.number * 30)
            self.ledger.sending(sent[-1], delayed=delay_s > 0)

        def done(result):
            told.append(result)
            for number, payload in enumerate(sent if isinstance(result, int) else ()):
                self.ledger.accepted(payload, result + number)
        self.told.append(told)
        try:
            self.queue.stage(mq.Put(sent, delay_s, done))
        except Exception as error:
            done(error)
            raise
        if end_round:
            self.end_round()

    def deliver(self, delivery, consumer="c"):
        for message, count in zip(delivery.messages, delivery.counts):
            self.ledger.delivered(consumer, message.payload, message.id, count)
        return delivery

    def take(self, wish=mq.ONE, waiter=None, consumer="c"):
        delivery = self.queue.take("", wish, waiter)
        return self.deliver(delivery, consumer) if delivery else None

    def settle(self, delivery, consumer="c"):
        self.left(delivery)
        self.end_round()
        self.ledger.settled(consumer)

    def left(self, delivery, sent=True):
        mq.Poll.left(self, mq.Answer(taken=(self.queue, delivery)), sent=sent)

    def wait(self, wish=mq.ONE, seconds=100):
        def answer(delivery):
            told.append(delivery)
            if delivery and delivery.lease is None:
                self.settle(self.deliver(delivery, f"w{len(self.answers)}"),
                            f"w{len(self.answers)}")
        told = []
        self.answers.append(told)
        waiter = mq.Waiter(wish, seconds, answer)
        try:
            if self.queue.take("", wish, waiter):
                raise AssertionError("nothing was ready")
        except Exception as error:
            told.append(error)
            raise

    # -- every call of an operation

    def try_all(self, prepare, work):
        """Do a work, each time with no memory for another of its calls: for each of them, or, of
        very many, some."""
        calls = self.try_one(prepare, work, 0)
        every = range(1, calls + 1)
        if calls > CALLS and not TORTURE:
            every = sorted(random.Random(SEED).sample(every, CALLS))
        for at in every:
            with self.subTest(at=at):
                self.try_one(prepare, work, at)

    def try_one(self, prepare, work, at):
        """Return how many calls a work made."""
        self.begin()
        given, starved = prepare() if prepare else (), Starved(at)
        try:
            with starved:
                work(*given)
        except (MemoryError, mq.ApiError, mq.LogFailed):
            self.assertTrue(at)
        self.judge(starved.where)
        return -starved.left

    def judge(self, where):
        """See that all is well, at once or after a start, whichever the log asks for."""
        if self.queue.log.failure or self.queue._closed:
            self.start()
        self.assertTrue(self.queue.lock.acquire(timeout=0), where)
        self.queue.lock.release()
        self.end_round()
        for _ in range(3):                   # every lease, delay and wait ends
            pass_time(self.queue, 500)
            self.end_round()
        self.assertEqual([told for told in self.told if len(told) != 1], [], where)
        self.assertEqual([told for told in self.answers if len(told) != 1], [], where)
        drain(self.queue, ledger=self.ledger)
        self.end_round()
        for letters in iter(self.queue.dead_letters, None):
            self.ledger.moved([message.payload for message in letters.messages])
            self.queue.bury(letters)
        self.assertEqual(counts(self.queue), (0, 0, 0), where)
        self.assertEqual(held(self.queue), (0, 0), where)
        lost = [line for line in self.ledger.faults() if not line.startswith("duplicated")]
        self.assertEqual(lost, [], where)
        self.start()
        self.assertEqual(held(self.queue), (0, 0), where)

    def test_an_answer_that_fails_behind_a_sync_leaves_nobody_waiting(self):
        queue = self.open(fsync="always", staging=set(), lead=lambda log: None)
        for done in (unittest.mock.Mock(side_effect=MemoryError), lambda _: None):
            queue.stage(mq.Put([b"a"], 0, done))
            queue.flush()
        with self.assertRaises(mq.LogFailed):        # a start is what helps
            queue.log.lead()
        self.assertIsNotNone(queue.log.failure)

    def test_what_cannot_be_read_for_want_of_memory_is_refused_and_all_goes_on(self):
        budget, queue = mq.Budget(mq.MIB), self.filled(b"a", b"b" * mq.MIB)
        patch = unittest.mock.patch.object(mq.Log, "read", side_effect=MemoryError)
        for wish in (mq.ONE, mq.Wish(9, mq.MIB), mq.Wish(lease_s=1), mq.Wish(peek=True)):
            with patch, self.assertRaises(mq.ApiError) as caught:
                queue.take(wish=wish)
            self.assertEqual((caught.exception.status, budget.held), (503, 0))
        with patch:
            told = []
            queue.tick()
            with self.assertRaises(mq.ApiError):
                queue.take(waiter=mq.Waiter(mq.ONE, 9, told.append))
        patch = unittest.mock.patch.object(mq.Codec, "encode", side_effect=MemoryError)
        with patch, self.assertRaises(mq.ApiError):
            queue.put([b"c"])
        self.assertIsNone(queue.log.failure)
        self.assertEqual((counts(queue), [len(p) for p in payloads(queue)], told),
                         ((2, 0, 0), [1, mq.MIB], []))

    def test_an_error_within_a_change_fails_the_log(self):
        queue = self.filled(b"x" * 2 * mq.UNCOUNTED_BYTES)
        patch = unittest.mock.patch.object(mq.Consumers, "add_lease", side_effect=MemoryError)
        with patch, self.assertRaises(mq.LogFailed):
            queue.take(wish=mq.Wish(lease_s=1))
        self.assertEqual(counts(self.crash()), (1, 0, 0))

    def test_a_put(self):
        self.try_all(None, self.put)

    def test_a_batch_and_a_delayed_one(self):
        def work():
            self.put(3, end_round=False)
            self.put(2, delay_s=5)
        self.try_all(None, work)

    def test_a_put_that_is_not_staged(self):
        def work():
            self.number += 1
            payload = b"%d" % self.number * 30
            self.ledger.sending(payload)
            self.ledger.accepted(payload, self.queue.put([payload]))
        self.try_all(None, work)

    def test_a_put_with_settled_ones_in_its_round(self):
        def prepare():
            self.put(3)
            return self.take(), self.take(consumer="d")

        def work(one, other):
            self.left(one)
            self.left(other)
            self.put()
        self.try_all(prepare, work)

    def test_a_put_for_those_who_wait(self):
        def prepare():
            for _ in range(2):
                self.wait()
            self.wait(mq.Wish(lease_s=20))
            return ()
        self.try_all(prepare, lambda: self.put(4))

    def test_a_wait(self):
        self.try_all(None, self.wait)

    def test_a_take(self):
        self.try_all(lambda: [self.put(3)][:0], self.take_and_settle)

    def take_and_settle(self, wish=mq.ONE):
        delivery = self.queue.take("", wish)
        try:
            self.left(delivery)
        finally:
            self.deliver(delivery)           # it may have left
        self.end_round()

    def test_a_take_of_a_batch(self):
        self.try_all(lambda: [self.put(5)][:0],
                     lambda: self.take_and_settle(mq.Wish(3, mq.MIB)))

    def test_a_take_with_a_lease_its_extension_and_its_ack(self):
        def work():
            lease = self.take(mq.Wish(2, mq.MIB, 5)).lease
            self.queue.extend("", lease, 10)
            self.queue.ack("", lease)
            self.end_round()
        self.try_all(lambda: [self.put(5)][:0], work)

    def test_a_nack(self):
        for delay_s in (0, 5):
            def work(delivery, delay_s=delay_s):
                self.queue.nack("", delivery.lease, delay_s)
            self.try_all(self.lease_some, work)

    def lease_some(self):
        self.put(5)
        return [self.take(mq.Wish(3, mq.MIB, 9))]

    def test_a_delivery_that_could_not_leave(self):
        def prepare():
            self.put(5)
            return [self.take(mq.Wish(2, mq.MIB))]
        self.try_all(prepare, lambda delivery: self.left(delivery, sent=False))

    def test_leases_and_delays_that_end(self):
        def prepare():
            self.put(6)
            for number in range(4):
                self.take(mq.Wish(lease_s=5), consumer=str(number))
            self.put(2, delay_s=5)
            return ()
        self.try_all(prepare, lambda: pass_time(self.queue, 6))

    def test_a_last_lease_that_ends(self):
        with unittest.mock.patch.dict(self.config, max_deliveries=1):
            for dead_letter in (None, "dead"):
                self.config["dead_letter"] = dead_letter
                self.try_all(self.lease_some, lambda _: pass_time(self.queue, 10))

    def test_a_snapshot(self):
        self.try_all(self.lease_some, lambda _: snapshot(self.queue))

    def test_a_clean_stop(self):
        def work(_):
            self.queue.close()
        self.try_all(self.lease_some, work)

    def test_a_purge(self):
        def work(_):
            self.ledger.dropping()
            self.queue.purge()
        self.try_all(self.lease_some, work)

    def test_lives_that_end(self):
        for dead_letter in (None, "dead"):
            with unittest.mock.patch.dict(self.config, dead_letter=dead_letter, ttl=30):
                def work(_):
                    self.ledger.dropping()
                    pass_time(self.queue, 31)
                self.try_all(self.lease_some, work)

    def test_a_cleaning(self):
        def prepare():
            for _ in range(6):
                self.put(6)
                self.queue.prepare()
            self.take(mq.Wish(2, mq.MIB, 60), consumer="held")
            for _ in range(25):
                self.settle(self.take())
            return ()

        def work():
            self.queue.prepare()
            compact(self.queue)
            upkeep(self.queue)
        self.try_all(prepare, work)

    def test_a_start(self):
        def prepare():
            self.put(3)
            snapshot(self.queue)
            self.put(3)
            self.put(2, delay_s=5)
            self.queue.nack("", self.take(mq.Wish(2, mq.MIB, 9)).lease, 3)
            self.drop()
            self.queue = mq.Queue(mq.QueueConfig(**self.config), self.folder(), fsync="no",
                                  clock=self.clock, storage=self.storage, staging=self.staging)
            self.queue.log.lock()
            self.queues.append(self.queue)
            return ()

        def work():
            try:
                self.queue.recover()
            except BaseException:
                self.queue.log.close()
                self.start()
                raise
        self.try_all(prepare, work)


# ---- Bounded work -------------------------------------------------------------------------

class Holds:
    """Counts the calls that the server makes in one hold of a queue's lock: `most` in any, and
    in how many holds."""

    def __init__(self, queue):
        self.most = self.count = self._now = 0
        self._lock = queue.lock

    def __enter__(self):
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _see(self, frame, what, _):
        if what in ("call", "c_call") and frame.f_code.co_filename != __file__:
            if self._lock.locked():
                self.count += not self._now
                self._now += 1
                self.most = max(self.most, self._now)
            else:
                self._now = 0


class BoundedTest(Folder):
    """No hold of the lock grows with what waits: calls are counted, never time. Where that is
    quicker, what bounds a hold is smaller than in a server."""

    def setUp(self):
        super().setUp()
        self.clock, self.storage = FakeClock(), FakeStorage(quick=True)

    def small(self, **constants):
        patch = unittest.mock.patch.multiple(mq, **constants)
        patch.start()
        self.addCleanup(patch.stop)

    def queue_of(self, subscribers=("",), **config):
        return self.open(f"q{len(self.queues)}", clock=self.clock, storage=self.storage,
                         subscribers=subscribers, config=mq.QueueConfig(name="q", **config))

    def sizes_read(self):
        """Return a list that grows by what each read from here on gives."""
        sizes, pread = [], self.storage.pread

        def counted(*arguments):
            data = pread(*arguments)
            sizes.append(len(data))
            return data
        self.storage.pread = counted
        return sizes

    def assert_same(self, measure, few, many):
        """What is measured must not depend on how many there are."""
        first, second = measure(few), measure(many)
        self.assertGreater(first, 5)
        self.assertLess(second, first * 1.3 + 20)

    def test_a_take_when_all_of_many_subscribers_expired(self):
        self.small(AT_ONCE=100, MIB=4096)
        for dead_letter in (None, "dead"):
            def measure(count, dead_letter=dead_letter):
                names = [str(number) for number in range(10)]
                queue = self.queue_of(names, ttl=60, dead_letter=dead_letter)
                queue.put([b"x" * 30] * count)
                self.clock.passed += 61_000
                queue.put([b"young"])
                with Holds(queue) as holds:
                    delivery = queue.take("3")
                    while queue.tick() <= self.clock.passed:
                        pass
                self.assertEqual(delivery.messages[0].payload, b"young")
                self.assertEqual(queue.expired_total, 10 * count)
                self.assertGreater(holds.count, count * 10 // 100)
                return holds.most
            self.assert_same(measure, 200, 600)

    def test_a_peek_behind_many_that_are_delayed(self):
        self.small(MIB=4096)

        def measure(count):
            queue = self.queue_of()
            queue.put([b"x" * 30] * count, delay_s=60)
            queue.put([b"ready"])
            answers, peek = [], mq.Wish(peek=True)
            waiter = mq.Waiter(peek, 0, answers.append)
            with Holds(queue) as holds:
                self.assertIsNone(queue.take(wish=peek, waiter=waiter))
                while not answers:
                    queue.tick()
            self.assertEqual(answers[0].messages[0].payload, b"ready")
            self.assertGreater(holds.count, count * 60 // mq.AHEAD_BYTES // 2)
            return holds.most
        self.assert_same(measure, 1000, 4000)

    def ticked(self, queue):
        """Let time do all that it has to do now; return the holds of the lock for it."""
        with Holds(queue) as holds:
            while queue.tick() <= self.clock.passed:
                pass
        return holds

    def test_leases_that_end_at_once(self):
        self.small(AT_ONCE=100)

        def measure(count):
            queue = self.queue_of()
            queue.put([b"x"] * count)
            for _ in range(count):
                queue.take(wish=mq.Wish(lease_s=5))
            self.clock.passed += 6000
            holds = self.ticked(queue)
            self.assertEqual(counts(queue), (count, 0, 0))
            return holds.most
        self.assert_same(measure, 200, 800)

    def test_delays_that_end_at_once(self):
        self.small(AT_ONCE=100)

        def measure(count):
            queue = self.queue_of()
            queue.put([b"x"] * count, delay_s=5)
            self.clock.passed += 6000
            holds = self.ticked(queue)
            self.assertEqual(counts(queue), (count, 0, 0))
            return holds.most
        self.assert_same(measure, 300, 1200)

    def test_deadlines_that_became_stale_are_never_looked_through(self):
        def measure(count):
            queue = self.queue_of()
            queue.put([b"x"])
            lease = queue.take(wish=mq.Wish(lease_s=60)).lease
            for number in range(count):
                queue.extend("", lease, 60 + number % 500)
            with Holds(queue) as holds:
                for _ in range(10):
                    queue.extend("", lease, 1000)
                    pass_time(queue, 20)
            return holds.most
        self.small(AT_ONCE=50, AT_ONCE_LEASES=16)
        self.assert_same(measure, 2000, 8000)

    def test_numbers_read_a_few_heads_and_keep_no_payload(self):
        queue = self.queue_of([str(number) for number in range(100)])
        queue.put([bytes(4 * mq.MIB)])
        queue.put([b"x"] * 100)
        sizes = self.sizes_read()
        queue.numbers()
        self.assertGreaterEqual(len(sizes), 100)
        self.assertLessEqual(len(sizes), 100 * mq.GLANCES)
        self.assertLessEqual(max(sizes), mq.HEAD.size)
        self.assertEqual(sum(read_ahead_count(queue, str(n)) for n in range(100)), 0)

    def test_new_subscribers_read_nothing_of_what_waits(self):
        queue = self.queue_of(["old"])
        queue.put([b"x" * 100] * 5000)
        self.stop_cleanly()
        sizes = self.sizes_read()
        names = ["old", *[f"new{number}" for number in range(100)]]
        queue = self.open("q0", clock=self.clock, storage=self.storage, subscribers=names)
        self.assertLess(sum(sizes), 100_000)
        self.assertEqual((counts(queue, "old")[0], counts(queue, "new7")[0]), (5000, 0))

    def test_cleaning_a_segment_holds_the_lock_for_a_slice(self):
        self.small(DEAD_BYTES=1000)

        def measure(count):
            queue = self.queue_of()
            queue.put([b"x" * 100] * count)
            deliveries = [queue.take() for _ in range(count)]
            for delivery in deliveries[::3] + deliveries[1::3]:
                queue.settle(delivery)
            queue._seal()
            taken = []
            with Holds(queue) as holds:
                for _ in queue.upkeep():
                    taken.append(queue.put([b"meanwhile"]))
                    queue.settle(queue.take())
            self.assertGreater(len(taken), count // 3 // mq.SLICE_MESSAGES)
            self.assertEqual(len(queue.log.segments), 2)
            return holds.most
        self.assert_same(measure, 1500, 4500)

    def test_a_snapshot_touches_pages_under_the_lock_and_is_written_in_steps(self):
        self.small(SNAPSHOT_WORK_S=0)

        def measure(count):
            queue = self.queue_of()
            queue.put([b"x"] * count, delay_s=60)
            entered = []
            with Holds(queue) as holds:
                steps = queue.snapshot()
                for _ in steps:
                    entered.append(queue.lock.locked())
            self.assertGreater(len(entered), count // 1024)
            self.assertFalse(any(entered))
            return holds.most
        self.assert_same(measure, 3000, 30_000)

    def test_freezing_looks_at_no_entry(self):
        queue = self.queue_of()
        queue.put([b"x"] * 20_000, delay_s=60)
        entries = queue.state.subscriptions[""].entries
        with unittest.mock.patch.object(mq, "ENTRY", None):      # whoever unpacks one fails
            pages = queue.state.freeze().pages
        self.assertEqual(len(pages), 20)
        self.assertTrue(all(page is own for page, own in zip(pages, entries._pages.values())))

    def test_a_purge_leaves_its_pages_to_upkeep(self):
        def measure(count):
            queue = self.queue_of()
            queue.put([b"x"] * count, delay_s=60)
            with Holds(queue) as holds:
                self.assertEqual(queue.purge(), count)
            self.assertEqual(sum(map(len, queue.state.trash)), count)
            self.assertGreater(sum(1 for _ in queue.upkeep()), count // 1024)
            self.assertFalse(queue.state.trash)
            return holds.most
        self.assert_same(measure, 3000, 30_000)

    def test_a_settled_run_visits_only_the_pages_it_touches(self):
        def measure(count):
            queue = self.queue_of()
            queue.put([b"x"] * 2000 + [b"late"] * count)
            delivery = queue.take(wish=mq.Wish(1000, mq.MIB))
            rest = [queue.take(wish=mq.Wish(1000, mq.MIB)) for _ in range(count // 1000 + 1)]
            self.assertEqual(len(rest[-1].ids), 1000)
            with Holds(queue) as holds:
                queue.settle(delivery)
            return holds.most
        self.assert_same(measure, 2000, 20_000)

    def test_a_delayed_put_of_too_many_entries_is_refused(self):
        names = [str(number) for number in range(50)]
        queue = self.queue_of(names)
        queue._staging = set()
        with self.assertRaises(mq.ApiError) as caught:
            queue.stage(mq.Put([b"x"] * 2001, 1))
        self.assertEqual(caught.exception.status, 413)
        queue.stage(mq.Put([b"x"] * 2000, 1))

    def test_idle_queues_sync_nothing(self):
        config = mq.parse_config({
            "settings": {"path": self.base, "fsync": "everysec", "min_free_bytes": 0},
            "queues": [{"name": f"q{number}"} for number in range(20)],
            "tokens": [{"name": "a", "token": "t" * 32, "admin": True}]})
        broker = mq.Broker(config, self.fail, self.clock)
        for queue in broker.queues.values():
            queue.log.storage = self.storage
            self.queues.append(queue)
            queue.log.lock()
            queue.recover()
            queue.put([b"x"])
        broker._each_second()
        broker._jobs.clear()
        self.storage.calls.clear()
        broker._each_second()
        for queue in broker.queues.values():
            queue.prepare()
            mq.exhaust(queue.upkeep())
        self.assertEqual([c for c in self.storage.calls if "sync" in c or "write" in c], [])

    def test_a_dead_letter_is_durable_before_it_is_settled_whatever_fsync_says(self):
        for fsync in ("always", "everysec", "no"):
            config = mq.parse_config({
                "settings": {"path": self.folder(fsync), "fsync": fsync, "min_free_bytes": 0},
                "queues": [{"name": "q", "max_deliveries": 1, "dead_letter": "dead"},
                           {"name": "dead"}],
                "tokens": [{"name": "a", "token": "t" * 32, "admin": True}]})
            broker = mq.Broker(config, self.fail, self.clock)
            for queue in broker.queues.values():
                self.queues.append(queue)
                queue.log.lock()
                queue.recover()
            queue, target = broker.queues["q"], broker.queues["dead"]
            queue.put([b"x"])
            queue.retry(queue.take())
            durable = []

            def bury(letters, queue=queue, log=target.log, durable=durable):
                durable.append(log.durable == log.appends)
                mq.Queue.bury(queue, letters)

            with unittest.mock.patch.object(queue, "bury", side_effect=bury):
                move_dead_letters(broker, queue)
            self.assertEqual((durable, payloads(target)), ([True], [b"x"]), fsync)

    def test_nothing_large_is_kept_of_what_was_read(self):
        names = [str(number) for number in range(10)]
        queue = self.queue_of(names)
        for _ in range(2):
            queue.put([bytes(mq.MIB)])
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for look in (lambda name: queue.take(name, mq.Wish(peek=True)),
                     lambda name: queue.settle(queue.take(name)) or True):
            for name in names:
                self.assertTrue(look(name))
            self.assertLess(tracemalloc.get_traced_memory()[0], 3 * mq.MIB)

    def test_a_peek_of_a_large_one_waits_for_room(self):
        queue = self.queue_of()
        queue.put([bytes(mq.MIB)])
        queue._budget = mq.Budget(2 * mq.MIB, mq.MIB)
        queue._budget.hold(2 * mq.MIB)
        peek = mq.Wish(peek=True)
        with Holds(queue), self.assertRaises(mq.ApiError) as caught:
            queue.take(wish=peek)
        self.assertEqual(caught.exception.status, 503)
        queue._budget.hold(-2 * mq.MIB)
        self.assertEqual(len(queue.take(wish=peek).messages[0].payload), mq.MIB)

    def test_a_batch_that_is_peeked_at_is_bounded(self):
        def measure(count):
            queue = self.queue_of()
            queue.put([b"x" * 1000] * count)
            queue.nack("", queue.take(wish=mq.Wish(count, mq.MIB * 10, 9)).lease)
            with Holds(queue) as holds:
                delivery = queue.take(wish=mq.Wish(20, mq.MIB, peek=True))
            self.assertEqual(len(delivery.messages), 20)
            return holds.most
        self.assert_same(measure, 300, 3000)


# ---- Crash states -------------------------------------------------------------------------
# Every disk that a power cut may leave, at every point of a run, through the real recovery.

WANTED = 25                                  # states of a scenario that are tried
TEAR_BYTES = (64, 512, 4096)                 # what memory, disks and file systems write at once
LONGER = 0.03                                # how many of them with something behind a file
SECTOR_BYTES = 512                           # the first one of a file is never torn: any header
NOW = "all"                                  # nothing is missing: what a kill leaves
ROOM_OR_NOT = ("ext4", "tmpfs")              # file systems with room ahead, and without
# Two segments are in the middle of something all the time, and each line is a step.
TINY = {**SMALL, "READY_BYTES": 300, "ROOM_BYTES": 300, "ROOM_LEAST_BYTES": 200, "PAGE_SHIFT": 2,
        "SNAPSHOT_WORK_S": 0, "LOG_CHUNK_BYTES": 512}


class Recorder(mq.Storage):
    """Does every call for real and notes, in one order, those that change the disk.

    `calls` also holds what the ledger is to know, as ("ledger", method, *arguments). A sync
    covers what was written before it began. `broken` names calls that are only claimed.
    `space` is by how many bytes files may still grow; None: as they like. `meanwhile` has acts
    that are to be done each in the middle of a sync of a file."""

    def __init__(self, broken=()):
        self.calls, self.broken, self.space = [], broken, None
        self.meanwhile = []
        self.lock = threading.RLock()
        self.numbers, self.paths = {}, {}    # number of a file by its path, and by descriptor

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
        self.note("judge", True)

    def _create(self, path):
        self.numbers[path] = len(self.calls) + 1
        self.note("create", path, self.numbers[path])
        return self.numbers[path]

    def _grow(self, fd, end):
        """Return up to where a file may reach that is wanted to reach to `end`."""
        size = os.fstat(fd).st_size
        if self.space is None or end <= size:
            return end
        end = min(end, size + max(0, self.space))
        self.space -= end - size
        return end

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
            data = data[:max(0, self._grow(fd, offset + len(data)) - offset)]
            if not data:
                raise OSError(errno.ENOSPC, "no space")
            self.note("write", self.paths[fd], bytes(data), offset)
            return os.pwrite(fd, data, offset)

    def allocate(self, fd, offset, size):
        with self.lock:
            if self._grow(fd, offset + size) < offset + size:
                raise OSError(errno.ENOSPC, "no space")
            os.posix_fallocate(fd, offset, size)
            self.note("allocate", self.paths[fd], offset + size)

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
        if self.meanwhile:
            self.meanwhile.pop(0)()
        self.note("end_sync", number)

    def truncate(self, fd, size):
        if "truncate" not in self.broken:
            with self.lock:
                if self.space is not None:
                    self.space += os.fstat(fd).st_size - size
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
        self.pending = []                    # (number, kind, *what) in order
        self.pending_names = []
        self.begun = {}                      # number: writes that a sync under way covers

    def apply(self, kind, *rest):
        if kind == "create":
            self.synced[rest[1]] = b""
            self.pending_names.append(("name", *rest))
        elif kind in ("write", "truncate", "allocate"):
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
        """Yield (what was kept, names, writes) for each disk there may be now.

        Of the writes, truncations and room, any choice. A file system with a journal keeps the
        first part of what was done to names, the order of truncations and unlinks among it. We
        count on less: each name leads to any file that it led to since the folder was synced,
        whatever the other names do, and what was cut off or unlinked may come back."""
        choices = list(self.choices(rng))
        for some, names in self.name_choices(rng):
            for what, calls in choices:
                yield (NOW if some == what == NOW else f"{what} writes, {some} names"), names, calls

    def files(self, names, calls):
        """Return {path: (number, bytes)} of a state."""
        files = {number: written(self.synced[number], [call for call in calls
                                                       if call[0] == number])
                 for number in set(names.values())}
        return {path: (number, files[number]) for path, number in names.items()}

    def name_choices(self, rng):
        states = [named(self.names, self.pending_names[:count])
                  for count in range(len(self.pending_names) + 1)]
        yield NOW, states[-1]
        if len(states) == 1:
            return
        for count, names in enumerate(states[:-1]):
            yield (f"the first {count}" if count else "no"), names
        paths = sorted({path for names in states for path in names})
        values = {path: list(dict.fromkeys(names.get(path) for names in states))
                  for path in paths}
        values = {path: several for path, several in values.items() if len(several) > 1}
        picks = list(itertools.islice(itertools.product(*values.values()), 17))
        if len(picks) > 16:                  # too many: what one name does alone, and any
            news = [several[-1] for several in values.values()]
            olds = [several[0] for several in values.values()]
            picks = [[*most[:at], value, *most[at + 1:]] for most in (news, olds)
                     for at, several in enumerate(values.values()) for value in several]
            picks += [[rng.choice(several) for several in values.values()] for _ in range(8)]
        for pick in picks:
            names = {**states[0], **dict(zip(values, pick))}
            yield (f"{[(os.path.basename(path), at) for path, at in zip(values, pick)]}",
                   {path: number for path, number in names.items() if number is not None})

    def choices(self, rng):
        """Yield (what is kept, its calls) for what was not synced."""
        calls = self.pending
        yield NOW, calls
        if not calls:
            return
        yield "no", []
        files = sorted({call[0] for call in calls})
        for number in files if len(files) > 1 else ():
            yield f"file {number}'s", [call for call in calls if call[0] == number]
            yield f"all but file {number}'s", [call for call in calls if call[0] != number]
        sizes = [call for call in calls if call[1] != "write"]
        if sizes:
            yield "no sizes but", [call for call in calls if call[1] == "write"]
            yield "sizes but no", sizes
        for at in range(len(calls)):
            if at:
                yield f"the first {at}", calls[:at]
            yield f"all but number {at} of the", calls[:at] + calls[at + 1:]
            yield f"number {at} of the", [calls[at]]
            for what, torn in tears(calls[at]):
                yield f"number {at} {what} of the", [*calls[:at], torn, *calls[at + 1:]]
        for _ in range(3):
            kept = [at for at in range(len(calls)) if rng.random() < 0.5]
            yield f"{kept} of the", [calls[at] for at in kept]
            upto = {number: rng.randrange(len(calls) + 1) for number in files}
            yield f"up to {upto} of the", [call for at, call in enumerate(calls)
                                           if at < upto[call[0]]]


def written(content, calls):
    """Return a file's bytes after its writes, truncations and allocations."""
    data = bytearray(content)
    for _, kind, *rest in calls:
        if kind == "write":
            piece, offset = rest
            data.extend(bytes(max(0, offset - len(data))))
            data[offset:offset + len(piece)] = piece
        else:
            size = rest[0] if kind == "truncate" else max(rest[0], len(data))
            data[size:] = bytes(max(0, size - len(data)))
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
        if at < len(data) and offset + at >= (SECTOR_BYTES if offset == 0 else 0):
            yield f"torn: only its start up to {size}", (number, kind, data[:at], offset)
            yield f"torn: only its end from {size}", (number, kind, data[at:], offset + at)


def longer(state, growing, rng):
    """Yield the state with one file, of those that were growing, longer than it was: zeros,
    garbage, or old bytes, its own or another file's."""
    for path, (number, data) in state.items():
        others = [other for _, other in state.values() if other]
        if data and number in growing:
            old = rng.choice(others)
            tails = {"zeros": bytes(700), "garbage": rng.randbytes(700),
                     "old bytes": data[-700:], "another's bytes": old[-rng.randrange(1, 900):]}
            for kind, tail in tails.items():
                yield f"{kind} behind {os.path.basename(path)}", {**state,
                                                                  path: (number, data + tail)}


class UnseededCodec(mq.Codec):
    """Records whose crc does not tell their place."""

    def encode(self, items, offset, kind=mq.MESSAGE):
        parts, messages = [], []
        for item in items:
            data, (message,) = super().encode([item], 0, kind)
            parts.append(data)
            messages.append(message._replace(offset=offset))
            offset += len(data)
        return b"".join(parts), messages

    def decode(self, data, offset, messages):
        while self.size_of(data):
            found, size = [], self.size_of(data)
            if super().decode(data[:size], 0, found) == 0:
                break
            messages += [message._replace(offset=offset) for message in found]
            data, offset = data[size:], offset + size
        return offset


class User:
    """Uses a queue on a recording storage and tells the ledger of it."""

    def __init__(self, queue, storage, name="m"):
        self.queue, self.storage, self.name = queue, storage, name
        self.puts, self.keys = 0, {}         # leases that are held, by key
        self.unsynced = []                   # what was put, and nobody was told
        self.due_ms = {}                     # of what was put with a delay, by payload

    def _payload(self, size, delay_s=0):
        self.puts += 1
        payload = b"%s%d " % (self.name.encode(), self.puts) + b"x" * size
        self.storage.tell("sending", payload, delay_s > 0)
        if delay_s:
            self.storage.tell("due", payload, self.queue.now_ms() + delay_s * 1000)
        return payload

    def put(self, size=0, count=1, delay_s=0):
        """Put; on a full disk that may be refused. A power cut may still bring it back, until the
        next put is durable: only then the refusal counts."""
        payloads = [self._payload(size, delay_s) for _ in range(count)]
        try:
            first = self.queue.put(payloads, delay_s)
        except mq.DiskFull:
            return payloads
        for number, payload in enumerate(payloads):
            self.storage.tell("accepted", payload, first + number, False)
        return []

    def put_unsynced(self, size=0, count=1):
        """Put what is not promised before `sync`."""
        payloads = [self._payload(size) for _ in range(count)]
        first = self.queue.put(payloads)
        self.unsynced += [(payload, first + number) for number, payload in enumerate(payloads)]

    def sync(self):
        self.queue.log.sync()
        for payload, message_id in self.unsynced:
            self.storage.tell("accepted", payload, message_id, False)
        self.unsynced.clear()

    def put_bytes(self, payload):
        self.storage.tell("sending", payload)
        self.storage.tell("accepted", payload, self.queue.put([payload]), False)

    def refused_put(self, count, short_by):
        """A put that the disk has no room for."""
        segment = self.queue.log.current
        needed = count * (mq.HEAD.size + 204) - short_by
        self.storage.space = needed - max(0, segment.room - segment.end)
        payloads = self.put(200, count)
        self.storage.space = None
        self.put()
        for payload in payloads:
            self.storage.tell("refused", payload)
        self.tell_owed()

    def _delivered(self, consumer, delivery):
        for message, count in zip(delivery.messages, delivery.counts):
            self.storage.tell("delivered", consumer, message.payload, message.id, count)

    def take(self, settle=True, wish=mq.ONE, delay_s=0, subscriber=""):
        """Take, and settle or give back; with a lease by its key."""
        delivery, consumer = self.queue.take(subscriber, wish), subscriber or self.name
        if not delivery:
            return
        self._delivered(consumer, delivery)
        if delivery.lease is None:
            (self.queue.settle if settle else self.queue.retry)(delivery)
        elif settle:
            self.queue.ack(subscriber, delivery.lease)
        else:
            self.queue.nack(subscriber, delivery.lease, delay_s)
        self.storage.tell("settled" if settle else "returned", consumer)
        self.tell_owed()

    def hold(self, subscriber="", lines=1):
        """Take with a lease, and keep it."""
        delivery = self.queue.take(subscriber, mq.Wish(lines, 10_000, 10_000))
        if delivery:
            self.keys[delivery.lease] = subscriber
            self._delivered(f"{subscriber or self.name} {delivery.lease}", delivery)

    def let_go(self, settle=True, at=0):
        """Ack, or give back, what was held first, or later."""
        if not self.keys:
            return
        key = list(self.keys)[at % len(self.keys)]
        subscriber = self.keys.pop(key)
        (self.queue.ack if settle else self.queue.nack)(subscriber, key)
        self.storage.tell("settled" if settle else "returned", f"{subscriber or self.name} {key}")
        self.tell_owed()

    def abandon(self, seconds):
        """Take with a lease and let it run out."""
        delivery = self.queue.take(wish=mq.Wish(3, 10_000, seconds))
        if delivery:
            self._delivered(self.name, delivery)
        self.storage.tell("returned", self.name)
        self.wait(seconds)

    def wait(self, seconds):
        pass_time(self.queue, seconds)
        self.storage.tell("now", self.queue.now_ms())

    def purge(self):
        """Drop everything; from before the call on, nothing needs to come any more."""
        self.storage.tell("dropping")
        self.queue.purge()
        self.keys.clear()
        self.queue.log.sync_marks()
        self.tell_owed()
        if not self.queue.owed:
            self.storage.tell("dropped")

    def move_dead(self, target):
        letters = self.queue.dead_letters()
        if letters:
            target.put([message.payload for message in letters.messages], limited=False)
            self.queue.bury(letters)

    def on_a_full_disk(self, *acts):
        self.storage.space = 0
        for act in acts:
            act()
        self.storage.space = None

    def tell_owed(self):
        """While marks are owed, a kill is as bad as a power cut."""
        self.storage.tell("owes", self.queue.owed > 0)

    def sync_marks(self):
        self.storage.tell("syncing", "marks")
        self.queue.log.sync_marks()
        if not self.queue.owed:
            self.storage.tell("synced", "marks")

    def snapshot(self, *acts):
        """Write a snapshot, and do something else at each of its steps."""
        self.storage.tell("syncing", "state")
        if self.during(self.queue.snapshot(), *acts) and not self.queue.owed:
            self.storage.tell("synced", "state")
        self.tell_owed()

    def during(self, steps, *acts):
        """Do work in steps, and something else at each; return what the work gives."""
        acts = iter(acts)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value
            next(acts, lambda: None)()

    def compact(self, *acts):
        with contextlib.suppress(mq.CompactionFailed):
            self.during(self.queue.compact(), *acts)
        self.tell_owed()

    def upkeep(self, *acts):
        self.queue.prepare()
        self.during(self.queue.upkeep(), *acts)
        self.tell_owed()


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
        self.kind = ROOM_OR_NOT[0]
        small = unittest.mock.patch.multiple(
            mq, **TINY, mount_of=lambda path: mq.Mount("/", self.kind))
        small.start()
        self.addCleanup(small.stop)

    # -- exploring

    def faults_of(self, scenario, wanted=math.inf, broken=(), nested=0.0):
        """Return a text about the smallest state that shows a fault, None without any. Tries
        about as many states as wanted."""
        self.drop()
        for name in ("q", "dead"):
            shutil.rmtree(self.folder(name), ignore_errors=True)
        storage = Recorder(broken)
        scenario(storage)
        self.drop()
        storage.note("end")                  # a cut behind the last answer
        return self.explore(storage.calls, [], wanted, nested)

    def explore(self, calls, before, wanted, nested=0.0):
        """Cut before each call that changes the disk: the ledger knows most then."""
        share = 1.0
        if wanted < math.inf:
            share = wanted / max(1, sum(1 for _ in self.cuts(calls, before)))
        seen = set()
        for number, disk, marks, (what, names, kept) in self.cuts(calls, before):
            if self.rng.random() >= (share * 10 if what == NOW else share):
                continue
            state = disk.files(names, kept)
            states = [(what, state)]
            if self.rng.random() < LONGER:
                growing = {call[0] for call in disk.pending}
                states += [(f"{what}, {more}", other)
                           for more, other in longer(state, growing, self.rng)
                           if self.rng.random() < max(share, 0.2)]
            found = []
            for what, state in states:
                key = len(marks), what == NOW, hash(tuple(sorted(state.items())))
                if key not in seen:
                    seen.add(key)
                    found += self.faults_in(what, state, marks, nested)
            if found:
                _, text = min(found)
                return (f"seed {SEED}, {self.kind}, before call {number} of {len(calls)}, "
                        f"{calls[number][:2]}: {text}")
        return None

    def cuts(self, calls, before):
        """Yield (number of the next call, disk, what the ledger knows, state) for all states."""
        disk, marks, rng = Disk(), list(before), random.Random(SEED)
        judge = not any(call[0] == "judge" and call[1] for call in calls)
        for number, call in enumerate(calls):
            if call[0] == "ledger":
                marks.append(call[1:])
            elif call[0] == "judge":
                judge = call[1]
            elif call[0] != "begin_sync":
                for state in disk.states(rng) if judge else ():
                    yield number, disk, marks, state
            disk.apply(*call)

    def faults_in(self, what, state, marks, nested):
        self.tried += 1
        CrashStateTest.total += 1
        faults = self.check(what, state, marks)
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
        storage, marks = Recorder(), [*marks, ("fault", True)]
        storage.adopt(self.base)
        queue = self.open(fsync="always", storage=storage, subscribers=self.placed(marks))
        storage.tell("synced")
        user = User(queue, storage, "nested")
        user.put()
        user.upkeep()
        self.drop()
        storage.note("end")
        return self.explore(storage.calls, marks, math.inf if TORTURE else 15)

    @staticmethod
    def placed(marks):
        """Return the subscribers of the run in which these marks end."""
        return next((names for method, *names in reversed(marks) if method == "placed"), [""])

    def check(self, what, state, marks):
        """Return the faults that the next starts show: put, kill, start, drain, start again."""
        self.restore(state)
        clock, subscribers = FakeClock(), self.placed(marks)
        options = {"storage": FakeStorage(quick=True), "fsync": "always", "clock": clock,
                   "subscribers": subscribers}
        owes = next((mark[1] for mark in reversed(marks) if mark[0] == "owes"), False)
        ledgers = {name: self.ledger_of(name, marks) for name in subscribers}
        due_ms = {mark[1]: mark[2] for mark in marks if mark[0] == "due"}
        clock.wall = max([clock.wall, *[mark[1] for mark in marks if mark[0] == "now"]])
        faults = []
        try:
            queue = self.open("state/q", **options)
            message_id = queue.put([b"later"])
            if self.rng.random() < 0.3:      # space can be freed at once, and nothing is lost
                compact(queue)
            queue = self.crash(name="state/q", **options)
            if self.rng.random() < 0.3:
                compact(queue)
            waiting, taken = held(queue)[0], []
            for name, ledger in ledgers.items():
                ledger.fault(power_cut=what != NOW or owes)
                ledger.sending(b"later")
                ledger.accepted(b"later", message_id, False)
                taken.append(drain(queue, name, True, ledger, "first drain"))
                faults += [f"early: {message.payload[:40]!r}" for message in taken[-1]
                           if due_ms.get(message.payload, 0) > queue.now_ms()]
            clock.passed += 1_000_000        # delays are over
            for name, ledger in ledgers.items():
                taken.append(drain(queue, name, True, ledger, "second drain"))
            for ids in [[message.id for message in found] for found in taken]:
                faults += ["out of order"] if ids != sorted(set(ids)) else []
            if len(ledgers) == 1 and sum(map(len, taken)) > waiting:     # fewer: some are damaged
                faults += [f"{waiting} held, {sum(map(len, taken))} taken"]
            if held(queue) != (0, 0) or any(queue.state.live.values()):
                faults += [f"held when all was taken: {held(queue)} {dict(queue.state.live)}"]
            queue = self.crash(name="state/q", **options)
            for name, ledger in ledgers.items():
                drain(queue, name, True, ledger, "third drain")
            compact(queue)
            if len(queue.log.segments) > 2:
                faults += [f"never freed: {sorted(queue.log.segments)}"]
            self.drop()
            if os.path.exists(self.folder("state/dead")):
                ledgers[""].moved(payloads(self.open("state/dead", **options)))
                self.drop()
        except (mq.StorageError, mq.LogFailed, OSError) as error:
            return [f"does not start: {error}"]
        return faults + [fault for ledger in ledgers.values() for fault in ledger.faults()]

    def ledger_of(self, subscriber, marks):
        """Return what one subscriber is owed; what the others took does not concern it."""
        ledger, known = Ledger(), None
        for method, *arguments in marks:
            if method == "placed":
                if known is not None and subscriber not in known and "" not in known:
                    ledger.joined()
                known = arguments
            elif method in ("delivered", "settled", "returned"):
                owner = arguments[0].split()[0]
                if subscriber in ("", owner) or owner not in ("a", "b", "c"):
                    getattr(ledger, method)(*arguments)
            elif method not in ("owes", "due", "now"):
                getattr(ledger, method)(*arguments)
        return ledger

    # -- scenarios

    def user(self, storage, **options):
        """Return the user of a queue, who has come to stay if it is the second of a run."""
        storage.tell("placed", *options.get("subscribers", ("",)))
        return User(self.open(fsync="always", storage=storage,
                              **{"clock": FakeClock(), **options}), storage)

    def restart(self, user, clean=False, **options):
        """Stop, or kill, the server, and start it."""
        storage, owed = user.storage, user.queue.owed > 0
        if clean:
            self.queues.remove(user.queue)
            if user.queue.close():
                storage.tell("synced")
        else:
            self.drop()
        storage.tell("placed", *options.get("subscribers", user.queue.subscribers))
        user.queue = self.open(fsync="always", storage=storage, **{
            "subscribers": user.queue.subscribers, "clock": user.queue._clock, **options})
        user.keys.clear()
        storage.tell("fault", owed)
        storage.tell("synced")               # by the start's own snapshot
        storage.tell("owes", False)

    def used(self, storage):
        """First start in an empty folder, then everything that a queue does."""
        user = self.user(storage)
        user.put(count=3)
        user.take()
        user.put(600)
        user.take(settle=False)
        user.put_bytes(self.read_log() + user.queue.log.codec.encode(
            [(1 << 40, 0, 0, b"forged")], 0)[0])     # what looks like records stays none
        user.snapshot()
        user.take()
        user.upkeep()
        user.put(5000)
        user.take()
        user.put()
        user.compact()
        user.put()

    def leased(self, storage):
        """Leases that are acked, given back, delayed and run out; a batch; a purge."""
        user = self.user(storage)
        user.put(count=5)
        user.put(delay_s=2)
        user.take(wish=mq.Wish(2, 10_000, 9))
        user.take(settle=False, wish=mq.Wish(0, 0, 9), delay_s=5)
        user.abandon(3)
        user.snapshot()
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
        user.snapshot()
        user.take(settle=False)
        user.compact()
        user.move_dead(target)
        compact(target)
        user.take()

    def broadcast(self, storage):
        """Two subscribers; each has a ledger of its own."""
        user = self.user(storage, subscribers=("a", "b"))
        user.put(count=4)
        for subscriber in "abbb":
            user.take(subscriber=subscriber)
        user.snapshot(user.put, lambda: user.take(subscriber="a"))
        user.take(settle=False, subscriber="b")
        user.compact()
        user.put()
        user.take(subscriber="a")
        user.put(600)
        user.take(subscriber="b")
        user.upkeep()

    def switched(self, storage):
        """A fifo queue, partly taken, becomes a broadcast queue: each gets what was waiting."""
        user = self.user(storage)
        user.put(count=5)
        held = user.queue.take()
        user.take()
        user.queue.retry(held)
        user.take(settle=False)
        user.upkeep()
        self.restart(user, subscribers=("a", "b"))
        user.take(subscriber="b")
        user.put()
        user.take(subscriber="a")

    def joined_and_left(self, storage):
        """Subscribers come, go and come back as others: from then on, with nothing from before."""
        user = self.user(storage, subscribers=("a", "b"))
        user.put(count=3)
        user.take(subscriber="a")
        self.restart(user, subscribers=("a", "b", "c"))
        user.put(200, count=2)
        user.take(subscriber="c")
        user.take(subscriber="b")
        self.restart(user, clean=True, subscribers=("b", "c"))
        user.put()
        user.take(subscriber="b")
        user.upkeep()
        self.restart(user, subscribers=("a", "b", "c"))
        user.put(300)
        user.take(subscriber="a")
        user.compact(lambda: user.take(subscriber="b"), lambda: user.take(subscriber="c"))
        user.take(subscriber="c")

    def short_of_space(self, storage):
        """A batch that the disk takes only a part of, then what fits, over its remains."""
        user = self.user(storage)
        user.put()
        user.refused_put(3, short_by=100)
        user.take()
        user.put()

    def together(self, storage):
        """Puts at the same time, which share syncs, beside takes."""
        storage.tell("placed", "")
        queue = self.open(fsync="always", storage=storage)
        users = [User(queue, storage, name) for name in "mno"]

        def work(user):
            for number in range(3):
                user.put(number)
            user.take()

        together(*[functools.partial(work, user) for user in users])

    def rotated(self, storage):
        """One segment after the other, each cut at any point of its life."""
        user = self.user(storage)
        for number in range(7):
            user.put(150, count=2)
            user.queue.prepare()
            if number % 2:
                user.take()
            if number == 3:
                user.sync_marks()
            if number == 4:
                self.restart(user)
        self.restart(user, clean=True)
        self.assertGreater(user.queue.log.current.number, 3)
        user.put(700)
        user.queue.prepare()
        self.restart(user, clean=True)       # with a segment that was ready
        user.put(100)
        user.take()
        user.sync_marks()

    def cleaned(self, storage):
        """Some stay leased while all around them goes; their copies are made, and later more."""
        user = self.user(storage)
        for _ in range(6):
            user.put(100, count=3)
            user.queue.prepare()
        for _ in range(6):
            user.hold()
            user.take()
            user.take()
        user.upkeep(user.put, user.take, user.let_go, user.put, user.sync_marks)
        user.sync_marks()
        user.put(300)
        user.let_go(settle=False)
        user.compact(user.take, user.let_go, user.put)
        user.let_go(at=1)
        user.upkeep()
        self.restart(user)
        user.take()

    def copied(self, storage):
        """Copies are made while the last snapshot is an old one, which knows the originals only."""
        with unittest.mock.patch.multiple(mq, SNAPSHOT_DATA_BYTES=mq.MIB, MARKS_BYTES=mq.MIB):
            user = self.user(storage)
            for _ in range(5):
                user.put(150, count=2)
                user.queue.prepare()
                user.hold()
                user.take()
            user.upkeep()
            user.put(200, count=2)
            user.queue.prepare()             # syncs the folder
            user.let_go()
            user.compact(user.put, user.take)
            user.let_go(at=1)
            user.take()
            user.upkeep()

    def unsynced(self, storage):
        """Without a sync for each put: ids were seen that are lost, marks are ahead of the data."""
        user = self.user(storage)
        user.queue.log.fsync = "no"
        for number in range(5):
            user.put_unsynced(150, count=2)
            user.queue.prepare()
            user.put_unsynced(200, count=2)
            user.take()
            user.take(settle=False)
            user.hold()
            if number % 2:
                user.sync_marks()
                user.take()
            if number == 3:
                user.sync()
        user.let_go()
        user.upkeep(user.put_unsynced, user.take, user.sync)
        user.take()

    def freed(self, storage):
        """All is taken: the first segment is truncated, the others go; and it goes on."""
        user = self.user(storage)
        for _ in range(2):
            for _ in range(4):
                user.put(250, count=2)
                user.queue.prepare()
            for _ in range(8):
                user.take()
            user.upkeep(user.put, user.take)
            user.put(10)
        user.sync_marks()
        user.upkeep(user.take, user.sync_marks)
        self.restart(user)
        user.put()

    def frozen(self, storage):
        """Marks come while a snapshot is written, and syncs of them."""
        user = self.user(storage)
        user.put(20, count=12)
        for _ in range(4):
            user.hold()
            user.take()
        user.snapshot(user.take, user.let_go, user.sync_marks, user.put,
                      functools.partial(user.let_go, False), user.take)
        user.take()
        user.sync_marks()
        user.snapshot(user.put, user.let_go)
        user.take()
        user.put(20, count=5)

        storage.meanwhile = [user.take, user.take, user.let_go]
        user.snapshot(user.take)
        user.sync_marks()

        def take_and_sync():
            user.take()
            user.sync_marks()

        for act in (user.sync_marks, take_and_sync):     # its name is new, but not on disk
            before_syncs(user.queue, user.take, take_and_sync, act)
            user.snapshot(user.take)
            user.put(20, count=3)
            user.take()

    def purged(self, storage):
        """What is purged does not come back, on a full disk neither."""
        user = self.user(storage)
        for _ in range(3):
            user.put(200, count=2)
            user.queue.prepare()
        user.hold()
        user.take()
        user.purge()
        user.put(100)
        user.upkeep(user.put, user.purge, user.put)
        user.take()
        user.snapshot(user.put, user.purge, user.put)
        user.on_a_full_disk(user.purge, user.put, user.upkeep)
        user.put()
        user.upkeep()
        user.take()

    def forgotten(self, storage):
        """An operator deletes the marks between two runs: all that the data holds comes again."""
        user = self.user(storage)
        user.put(delay_s=500)
        for _ in range(3):
            user.put(150, count=2)
            user.queue.prepare()
        user.hold()
        user.take()
        user.take()
        user.compact()                       # there are copies
        user.put(delay_s=5)
        user.put()
        user.purge()
        user.put(200, count=2)
        user.take()
        for clean in (False, True):
            storage.tell("forgotten")
            storage.unlink(os.path.join(self.folder(), "meta.json"))
            self.restart(user, clean)
            user.take()
            user.put()

    def put_back(self, storage):
        """An operator deletes files under the server; once upkeep saw it all is as before."""
        user = self.user(storage)
        for _ in range(4):
            user.put(150, count=2)
            user.queue.prepare()
        user.take()
        names = [segment.name for segment in user.queue.log.segments.values()]
        for some in (["data.log"], names[1:2], names[-1:], ["meta.json"], names):
            storage.note("judge", False)
            for name in some:
                with contextlib.suppress(FileNotFoundError):
                    storage.unlink(os.path.join(self.folder(), name))
            user.upkeep()
            user.upkeep()
            storage.note("judge", True)
            user.put(100)
            user.take()
        self.restart(user)
        user.take()

    def owing(self, storage):
        """A full disk takes no marks: they are owed, and paid once there is space."""
        user = self.user(storage)
        user.put(100, count=8)
        user.hold()
        storage.space = 0
        for _ in range(5):
            user.take()
        user.let_go()
        user.sync_marks()
        user.put(300)
        user.upkeep(user.take, user.put)
        storage.space = 900
        user.upkeep(user.take, user.put)
        user.take()
        storage.space = None
        user.snapshot(functools.partial(user.on_a_full_disk, user.take, user.put), user.take)
        user.take()
        user.snapshot()
        user.put(count=4)
        user.on_a_full_disk(*[functools.partial(user.take, settle=False)] * 3)
        self.restart(user)
        user.take()

    def delayed(self, storage):
        """Delays survive takes, cleanings and starts."""
        user = self.user(storage)
        user.put(100, count=3)
        user.put(100, count=2, delay_s=5)
        user.queue.prepare()
        user.put(100, count=2)
        user.take(settle=False, wish=mq.Wish(0, 0, 9), delay_s=7)
        user.put(50, delay_s=3)
        user.take(wish=mq.Wish(2, 10_000, 9))
        user.queue.prepare()
        user.put(50)
        user.compact(user.take, user.put)
        user.wait(4)
        user.take()
        user.sync_marks()
        self.restart(user)
        user.wait(2)
        user.take()
        user.upkeep()
        user.compact()
        user.take()

    def recovered(self, storage):
        """A start from what a kill left: a snapshot, damage in the middle, a torn tail."""
        first = Recorder()
        user = self.user(first)
        user.put(count=3)
        user.take()
        user.snapshot()
        end = user.queue.log.tail & mq.POSITION_MASK
        user.put()
        user.put()
        end_of_all = user.queue.log.tail & mq.POSITION_MASK
        self.drop()
        with open(self.log_path(), "r+b") as file:
            file.seek(end + 4)
            file.write(b"damage")
            file.seek(end_of_all)
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
        rng, user = self.rng, self.user(storage)
        wishes = (mq.ONE, mq.Wish(0, 0, 5), mq.Wish(3, 1000, 5))

        def space():
            storage.space = None if storage.space is not None else rng.choice((0, 300, 1500))

        def some():
            return rng.choice(acts[:-6])()

        acts = [*[lambda: user.put(rng.choice((0, 100, 700)), rng.choice((1, 1, 4)))] * 6,
                *[lambda: user.take(rng.random() < 0.7, rng.choice(wishes),
                                    rng.choice((0, 0, 3)))] * 6,
                *[lambda: user.hold(lines=rng.choice((1, 3)))] * 3,
                *[lambda: user.let_go(rng.random() < 0.8, rng.randrange(9))] * 4,
                lambda: user.put(delay_s=3), lambda: user.wait(2), user.sync_marks,
                user.queue.prepare, lambda: user.abandon(2), user.purge,
                space, space,
                lambda: user.snapshot(some, some, some, some),
                lambda: user.compact(some, some, some),
                lambda: user.upkeep(some, some, some),
                lambda: user.upkeep(some, some, some)]
        for _ in range(rng.choice((10, 20, 40))):
            rng.choice(acts)()
            if rng.random() < 0.08:
                storage.space = None
                self.restart(user, rng.random() < 0.5)
        storage.space = None

    def test_no_power_cut_loses_repeats_or_makes_up_a_message(self):
        scenarios = (self.used, self.short_of_space, self.leased, self.dead_lettered,
                     self.broadcast, self.switched, self.joined_and_left, self.together,
                     self.rotated, self.unsynced, self.cleaned, self.copied, self.freed,
                     self.frozen, self.purged, self.forgotten, self.put_back, self.owing,
                     self.delayed, self.recovered, self.taken_over)
        for scenario, kind in itertools.product(scenarios, ROOM_OR_NOT):
            with self.subTest(scenario=scenario.__name__, file_system=kind):
                self.tried, self.kind = 0, kind
                fault = self.faults_of(scenario, 3000 if TORTURE else WANTED, nested=0.02)
                self.assertIsNone(fault)
                self.assertGreater(self.tried, WANTED / 10)

    def test_no_power_cut_after_a_random_run_does_either(self):
        for run in range(60 if TORTURE else 6):
            with self.subTest(run=run):
                self.kind = ROOM_OR_NOT[run % 2]
                self.assertIsNone(self.faults_of(self.random_run, 1500 if TORTURE else WANTED))

    # Controls: the same without one of the means, which must then be missed.

    def test_a_sync_that_does_nothing_is_reported(self):
        for call in ("fdatasync", "folder"):
            with self.subTest(left_out=call):
                self.assertRegex(self.faults_of(self.used, 2000, broken=(call,)),
                                 "lost|told|is missing")

    def test_a_short_write_that_is_not_cut_off_is_reported(self):
        self.kind = "tmpfs"                  # without room ahead: that would be cut off as well
        self.assertRegex(self.faults_of(self.short_of_space, 2000, broken=("truncate",)),
                         "refused, yet delivered|was used for")

    def test_a_crc_that_does_not_tell_its_place_is_reported(self):
        with unittest.mock.patch.object(mq, "Codec", UnseededCodec):
            self.assertRegex(self.faults_of(self.used, 2000), "made up")


# ---- HTTP ---------------------------------------------------------------------------------

class BackupTest(Folder):
    """Backups of a queue, unpacked and started."""

    def setUp(self):
        super().setUp()
        small = small_segments(READY_BYTES=100, PIECE_BYTES=600)
        small.start()
        self.addCleanup(small.stop)
        self.clock, self.names = FakeClock(), itertools.count()

    def tar_of(self, stream):
        data = b"".join(iter(stream.read, b""))
        self.assertEqual(len(data), len(stream))
        return data

    def restored(self, data, **options):
        """Return a queue that starts with a backup's files."""
        name = f"restored-{next(self.names)}"
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar.getmembers():
                self.assertEqual((member.mode, member.isfile()), (0o600, True))
                self.assertNotIn("/", member.name)
            self.assertEqual(tar.getnames()[0], "meta.json")
            self.assertEqual(len(set(tar.getnames())), len(tar.getnames()))
            os.makedirs(self.folder(name))
            for member in tar.getmembers():
                with open(os.path.join(self.folder(name), member.name), "wb") as file:
                    file.write(tar.extractfile(member).read())
        return self.open(name, clock=self.clock, **options)

    def content(self, queue):
        """Return what each subscriber is given, now and when all delays are over."""
        found = []
        for later_s in (0, 1000):
            self.clock.passed += later_s * 1000
            queue.tick()
            found.append({name: [(m.id, m.payload, count) for delivery in iter(
                lambda name=name: queue.take(name), None)
                for m, count in zip(delivery.messages, delivery.counts)]
                for name in queue.subscribers})
            self.clock.passed -= later_s * 1000
        return found

    def mixed(self, *subscribers):
        """Return a queue in which each subscriber is somewhere else, and has all there is:
        settled, leased, returned and delayed messages, in many segments."""
        queue = self.open(clock=self.clock, subscribers=subscribers)
        for number in range(60):
            queue.put([b"%d" % number * 20], delay_s=100 if number % 7 == 3 else 0)
            if number % 10 == 9:
                queue.prepare()
        for at, name in enumerate(subscribers):
            for number in range(5 + 12 * at):
                wish = mq.Wish(lease_s=50 if number % 6 == 5 else 0)
                delivery = queue.take(name, wish)
                if number % 4 == 3:
                    queue.retry(delivery)
                elif not wish.lease_s:
                    queue.settle(delivery)
        upkeep(queue)
        queue.put([b"last"])
        self.assertGreater(len(queue.log.segments), 4)
        return queue

    def each_mixed(self):
        for subscribers in (("",), ("a", "b", "c")):
            with self.subTest(subscribers=subscribers):
                yield self.mixed(*subscribers)
                self.drop()
                shutil.rmtree(self.folder())

    def test_a_restored_queue_holds_just_what_waited(self):
        for queue in self.each_mixed():
            data, subscribers = self.tar_of(queue.backup()), queue.subscribers
            restored = self.content(self.restored(data, subscribers=subscribers))
            self.drop()
            before = self.open(clock=self.clock, subscribers=subscribers)
            self.assertEqual(restored, self.content(before))
            self.assertTrue(all(restored[0].values()) and all(restored[1].values()))

    def test_whatever_becomes_of_the_queue_meanwhile_it_is_the_one_that_was(self):
        def rotate(queue):
            for number in range(40):
                queue.prepare()
                queue.put([b"%d" % number * 30])

        def lose_files(queue):
            for name in [s.name for s in queue.log.segments.values()] + ["meta.json"]:
                os.unlink(os.path.join(self.folder(), name))
            upkeep(queue)
            self.assertEqual(queue.log.missing_files(), [])

        def free(queue):
            for name in queue.subscribers:
                drain(queue, name)
            upkeep(queue)
            rotate(queue)

        def purge(queue):
            queue.purge()
            upkeep(queue)

        for act in (rotate, lose_files, free, purge, compact):
            for queue in self.each_mixed():
                whole, stream = self.tar_of(queue.backup()), queue.backup()
                users = list(queue.log.segments.values())
                begun = [stream.read() for _ in range(4)]
                act(queue)
                compact(queue)
                data = b"".join(begun) + self.tar_of_rest(stream)
                self.assertEqual(len(data), len(stream))
                subscribers = queue.subscribers
                self.assertEqual(self.content(self.restored(data, subscribers=subscribers)),
                                 self.content(self.restored(whole, subscribers=subscribers)))
                self.assertEqual({segment.users for segment in users}, {0})
                self.assertEqual({s.fd for s in users if s.is_gone} - {-1}, set())

    def tar_of_rest(self, stream):
        return b"".join(iter(stream.read, b""))

    def test_an_empty_queue_has_one_and_it_is_never_marked_clean(self):
        for prepare in (lambda queue: None, lambda queue: queue.put([b"x"]), drain, compact):
            queue = self.open()
            prepare(queue)
            self.stop_cleanly()
            queue = self.open()
            data = self.tar_of(queue.backup())
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                head = tar.extractfile("meta.json").readline()
            self.assertIs(json.loads(head)[1]["clean"], False)
            restored = self.restored(data)
            self.assertEqual(held(restored), held(queue))
            self.assertGreater(restored.put([b"new"]), queue.put([b"new"]) + mq.ID_GAP - 1)
            self.drop()

    def test_what_is_settled_in_the_round_of_a_backup_is_settled_in_it(self):
        queue = self.open(staging=set())
        for payload in (b"a", b"b"):
            queue.stage(mq.Put([payload]))
        queue.flush()
        queue.settle(queue.take())
        self.assertEqual(payloads(self.restored(self.tar_of(queue.backup()))), [b"b"])

    def test_one_that_is_taken_under_load_loses_nothing_and_brings_nothing_back(self):
        queue, ended = self.open(), threading.Event()
        accepted, taken, settled = [], [], []

        def load():
            for number in itertools.count():
                if ended.is_set():
                    return
                queue.put([b"%d" % number * 5])
                accepted.append(number)
                if number % 3:
                    delivery = queue.take()
                    taken.append(int_of(delivery))
                    queue.settle(delivery)
                    settled.append(taken[-1])
                if number % 20 == 0:
                    queue.purge() if number % 400 == 200 else upkeep(queue)
                    if number % 400 == 200:
                        settled.extend(range(number + 1))
                        taken.extend(range(number + 1))
                if number % 50 == 0:
                    compact(queue)

        def int_of(delivery):
            payload = delivery.messages[0].payload
            return int(payload[:len(payload) // 5])

        thread = threading.Thread(target=load)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(ended.set)
        for _ in range(30):
            more = len(accepted) + 20
            eventually(lambda more=more: len(accepted) > more)
            accepted_before, settled_before = set(accepted), set(settled)
            data = self.tar_of(queue.backup())
            taken_after, accepted_after = set(taken), set(accepted)
            restored = [int(text[:len(text) // 5])
                        for text in payloads(self.restored(data))]
            self.assertEqual(restored, sorted(set(restored)))
            self.assertLessEqual(accepted_before, set(restored) | taken_after)
            self.assertLessEqual(set(restored), accepted_after | {len(accepted_after)})
            self.assertFalse(set(restored) & settled_before)

    def test_what_was_read_or_is_not_wanted_any_more_is_let_go(self):
        queue = self.mixed("")
        users = list(queue.log.segments.values())
        stream = queue.backup()
        self.assertEqual({s.users for s in users}, {1})
        while users[0].users:
            stream.read()
        self.assertEqual(users[-1].users, 1)
        stream.close()
        stream.close()
        self.assertEqual({s.users for s in users}, {0})
        stream = queue.backup()              # not even begun
        stream.close()
        self.assertEqual({s.users for s in users}, {0})

    def test_upkeep_may_be_ended_at_any_step(self):
        for step in range(0, 60, 4):
            queue = self.mixed("")
            pass_time(queue, 1000)
            taken = [queue.take() for _ in range(50)]
            for delivery in taken[::4] + taken[1::4] + taken[2::4]:
                queue.settle(delivery)
            with unittest.mock.patch.multiple(mq, DEAD_BYTES=0):
                steps = queue.upkeep()
                for _ in zip(range(step), steps):
                    pass
                for delivery in taken[3::4]:         # more could be freed now
                    queue.settle(delivery)
                steps.close()
            waited = held(queue)[0]
            self.stop_cleanly()
            self.assertEqual(held(self.open(clock=self.clock))[0], waited)
            self.drop()
            shutil.rmtree(self.folder())

    def test_the_first_segment_is_emptied_when_the_last_backup_has_read_it(self):
        queue = self.mixed("")
        whole, streams = os.path.getsize(self.log_path()), [queue.backup(), queue.backup()]
        drain(queue)
        compact(queue)
        pass_time(queue, 1000)
        drain(queue)
        compact(queue)
        for stream in streams:
            self.assertEqual(os.path.getsize(self.log_path()), whole)
            stream.close()
            upkeep(queue)
        self.assertEqual(os.path.getsize(self.log_path()), mq.FIRST)

    def test_one_that_keeps_freed_bytes_is_cut_off_when_the_disk_is_nearly_full(self):
        for first_only in (False, True):
            queue = self.mixed("")
            queue.space.left, stream = -1, queue.backup()
            users = list(queue.log.segments.values())
            stream.read()                    # it keeps nothing that was freed
            pass_time(queue, 1000)
            drain(queue)
            upkeep(queue)
            if first_only:                   # it has no name to lose, only bytes
                for segment in users[1:]:
                    segment.is_gone = False
            self.assertTrue(first_only or any(s.is_gone for s in users))
            queue.space.left = -1
            with self.assertRaises(mq.CompactionFailed):
                self.tar_of(stream)
            self.assertEqual({s.users for s in users}, {0})
            self.assertEqual(len(self.tar_of(queue.backup())) % 512, 0)
            self.drop()
            shutil.rmtree(self.folder())

    def test_a_file_that_became_shorter_and_a_failure_end_it_and_let_all_go(self):
        queue = self.mixed("")
        users = list(queue.log.segments.values())
        for error in (MemoryError, None):
            stream = queue.backup()
            failing = unittest.mock.patch.object(queue.log, "read_raw", side_effect=error,
                                                 return_value=b"short")
            with failing, self.assertRaises(error or mq.CompactionFailed):
                self.tar_of(stream)
            self.assertEqual({s.users for s in users}, {0})

    def test_a_file_that_is_put_back_while_it_is_read_stays_open(self):
        storage = FakeStorage(quick=True)
        queue = self.open(clock=self.clock, storage=storage)
        for number in range(60):
            queue.prepare()
            queue.put([b"%d" % number * 20])
        stream, first = queue.backup(), queue.log.segments[0]

        def put_back(fd, *_):
            if fd == first.fd:
                del storage.before["pread"]
                os.unlink(self.log_path())
                upkeep(queue)
        storage.before["pread"] = put_back
        restored = self.restored(self.tar_of(stream))
        self.assertTrue(os.path.exists(self.log_path()))
        self.assertEqual(first.fd, -1)
        self.assertEqual(payloads(restored), payloads(queue))

    def test_what_a_disk_cannot_read_is_damage_in_the_backup_too(self):
        storage = FakeStorage(quick=True)
        queue = self.open(clock=self.clock, storage=storage)
        for number in range(9):
            queue.put([b"%d" % number])
        stream = queue.backup()
        storage.fail("pread", errno.EIO)
        with unittest.mock.patch.object(mq, "event") as event:
            data = self.tar_of(stream)
        self.assertEqual(event.call_args[0][1], "backup_lacks_unreadable")
        storage.heal()
        self.assertEqual(payloads(queue), [b"%d" % number for number in range(9)])
        self.assertNotIn(queue.log.codec.marker, data[-20 * 512:])

    def test_no_piece_is_too_large_and_a_slow_one_keeps_no_pages(self):
        queue = self.open()
        with unittest.mock.patch.object(mq, "PIECE_BYTES", 1 << 18):
            for _ in range(300):
                queue.put([bytes(10_000)])
            for _ in range(3):
                queue.put([b"x"] * 3000, delay_s=100)
            stream, sizes = queue.backup(), []
            for piece in iter(stream.read, b""):
                sizes.append(len(piece))
        self.assertLessEqual(max(sizes), 1 << 18)
        self.assertLess(len(sizes), 2 * sum(sizes) / (1 << 17))


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
        self.broker.space.min_free_bytes = size
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
        self.assertEqual(held(self.queue), (0, 0))

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
        self.assertLess(self.queue.log.size, 60_000)
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
        self.assertEqual(delivery.counts[0], 2)

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


class Rounds(ServerTest):
    """A server whose rounds the test makes: what is done in which is not left to chance. At the
    end nothing may be held for clients that left."""

    settings = {"max_message_bytes": 1 << 20, "max_inflight_bytes": 2 << 20}

    def serve(self):
        ample = unittest.mock.patch.multiple(mq, SHARE_S=9, EVENTS_S=9, BACKLOG_S=9)
        ample.start()                        # on a busy machine too: steps are counted here
        self.addCleanup(ample.stop)
        self.poll, self.wires = self.server.poll, []
        self.answered = self.poll.answered

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


class RoundsTest(Rounds):
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
        queue._clock, queue._ttl_ms, queue._consumers[""].expiry_ms = FakeClock(), 1000, 0
        queue.tick = lambda: mq.NEVER        # the timers are busy
        for _ in range(3):
            queue.put([b"old"] * mq.AT_ONCE)
        queue._clock.passed += 1000
        queue.put([b"new"])

        def expire(consumers, now_ms):
            holds.append(now_ms)
            mq.Queue._expire_locked(queue, consumers, now_ms)

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

    def test_a_late_peek_of_who_will_send_no_more_is_answered(self):
        with unittest.mock.patch.object(mq, "MIB", 4096):
            self.queue.put([b"x" * 30] * 2000, delay_s=60)
            self.queue.put([b"ready"])
            wire, = self.pairs(1, request("GET", "/peek/fetcher"))
            self.round()
            self.assertEqual(wire.handler.state, mq.LATE)
            wire.shut()
            self.until(lambda: self.queue.tick() and wire.handler.state != mq.LATE)
        self.assertEqual(wire.answer().body, b"ready")

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

    def test_what_a_round_put_is_one_write_and_what_it_settled_one_mark(self):
        self.queue.put([b"x"])               # so that there is room
        drain(self.queue)
        self.queue.flush()
        self.queue.log.storage = storage = FakeStorage()
        wires = self.pairs(20, request("POST", "/in/fetcher", b"x"))
        self.round()
        self.assertEqual(self.statuses(wires), [200] * 20)
        self.assertEqual(storage.calls, ["pwrite"])
        written, marks = [], mq.Marks(bytes(16))
        marks.crc = self.queue.log.marks.lines.crc
        storage.before["pwrite"] = lambda fd, data, offset: written.append(data)
        for wire in wires:
            wire.send(request("GET", "/out/fetcher"))
        self.round()
        self.assertEqual(self.statuses(wires), [200] * 20)
        mark, = [marks.decode(line) for line in written]
        self.assertEqual(mark, (mq.SETTLED, "", 2, 21, self.queue.log.tail, 0, 0))

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
            delivery = self.queue.take()
            self.assertEqual(delivery.counts, [1])
            self.queue.settle(delivery)
            self.queue.flush()

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
        for where, what in ((mq, "render_delivery"), (mq, "render_head"), (mq.Handler, "_render")):
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
        routes = self.poll.routes
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

    # -- splits

    def test_no_event_is_forgotten_when_a_round_finds_no_memory(self):
        for at in range(1, 80):
            wire, = self.pairs(1, request("GET", "/healthz"))
            starved = Starved(at)
            try:
                with starved:
                    self.server.serve_round(0)
            except MemoryError:
                self.poll.look_again()       # as serve_forever does
            self.round(2)
            self.assertFalse(wire.is_silent(), (at, starved.where))

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


class BackupAnswerTest(Rounds):
    """A backup on its way to a client. At the end nothing is held for any."""

    settings = {**Rounds.settings, "request_timeout": 5, "max_inflight_bytes": 3 << 20}
    PATH = "/backup/fetcher"

    def setUp(self):
        super().setUp()
        self.failed = []
        for name in ("exception", "error"):
            patch = unittest.mock.patch.object(mq.log_event, name,
                                               lambda *told, **_: self.failed.append(told))
            patch.start()
            self.addCleanup(patch.stop)

    def stop(self):
        super().stop()                       # which closed every connection
        self.assertEqual([s.users for s in self.queue.log.segments.values() if s.users], [])
        self.assertEqual(self.failed, [])

    def fill(self, count=4):
        """Have more to send than sockets hold."""
        for _ in range(count):
            self.queue.put([os.urandom(1 << 20)])

    def asked(self, *behind):
        wire = self.pair()
        return wire.send(request("GET", self.PATH) + b"".join(behind))

    def stuck(self, *behind):
        """Ask, and read nothing: return when the server can send no more."""
        wire = self.asked(*behind)
        self.until(lambda: wire.handler._blocked)
        return wire

    def is_free(self):
        return not any(s.users for s in self.queue.log.segments.values())

    def names_in(self, body):
        with tarfile.open(fileobj=io.BytesIO(body)) as tar:
            return tar.getnames()

    def test_it_is_sent_whole_and_what_is_pipelined_behind_it_is_served(self):
        for count in (0, 1, 4):
            self.fill(count)
            wire = self.asked(request("GET", "/healthz"), request("GET", self.PATH),
                              request("GET", "/readyz", token=None))
            answers = [self.answer_to(wire) for _ in range(4)]
            self.assertEqual([answer.status for answer in answers], [200] * 4)
            self.assertEqual(answers[0].headers["Content-Type"], "application/x-tar")
            self.assertNotIn("Connection", answers[0].headers)
            for answer in (answers[0], answers[2]):
                self.assertEqual(self.names_in(answer.body), ["meta.json", *[
                    s.name for s in self.queue.log.segments.values()]])
                self.assertEqual(answer.body[-1024:], bytes(1024))
            self.assertEqual(answers[3].body, b"ready\n")
            self.until(self.is_free)
            self.assertEqual(wire.handler.state, mq.READ)
            self.assertTrue(wire.is_silent())

    def test_it_is_for_admins_by_get_alone(self):
        for method, path, token, status in (
                ("HEAD", self.PATH, ADMIN, 405), ("POST", self.PATH, ADMIN, 405),
                ("GET", self.PATH, GET, 403), ("GET", self.PATH, POST, 403),
                ("GET", self.PATH, None, 401), ("GET", "/backup/none", ADMIN, 404),
                ("GET", "/backup", ADMIN, 404), ("GET", self.PATH + "?max=1", ADMIN, 400)):
            wire = self.pair().send(request(method, path, token=token))
            self.until(lambda wire=wire: not wire.is_silent())
            self.assertEqual(wire.answer(method == "HEAD").status, status, (method, path))

    def test_http_1_0_and_who_wishes_for_it_are_closed_behind_it(self):
        self.fill(2)
        for data in (request("GET", self.PATH, version="1.0"),
                     request("GET", self.PATH, headers=("Connection: close",))):
            wire = self.pair().send(data)
            answer = self.answer_to(wire)
            self.assertEqual(self.names_in(answer.body)[0], "meta.json")
            self.assertEqual(answer.headers["Connection"], "close")
            self.until(lambda wire=wire: not wire.handler.connection.fileno() >= 0)
            self.assertTrue(wire.at_end())

    def test_a_client_that_hangs_up_at_any_byte_leaves_nothing_behind(self):
        self.fill(1)
        whole = self.answer_to(self.asked())
        size = len(whole.body)
        for at in (0, 1, 100, 200, 700, 1 << 17, 1 << 18, 1 << 19, size - 1, size):
            for rounds in (0, 1, 2):
                wire = self.asked()
                self.round(rounds)
                with contextlib.suppress(BlockingIOError):
                    got = 0
                    wire.socket.setblocking(False)
                    while got < at:
                        got += len(wire.socket.recv(at - got))
                        self.round()
                wire.close()
                self.until(lambda wire=wire: wire.handler.state == mq.CLOSED)
                self.until(self.is_free)
                self.assertEqual(self.broker.budget.held, 0)

    def test_who_sends_no_more_but_reads_gets_it_all(self):
        self.fill()
        wire = self.asked()
        wire.shut()
        self.assertGreater(len(self.answer_to(wire).body), 4 << 20)

    def test_request_timeout_holds_for_each_mebibyte_that_is_not_taken(self):
        with self.fake_time() as clock:
            self.fill(8)
            slow, fast, silent = self.stuck(), self.stuck(), self.stuck()

            def read(wire, size):
                wire.socket.settimeout(ANSWER_S)
                while size > 0 and wire.handler.state != mq.CLOSED:
                    if not wire.is_silent():
                        size -= len(wire.socket.recv(min(size, 1 << 16)))
                    self.round()
                self.until(lambda: wire.handler._blocked or wire.handler.state == mq.CLOSED)
            for seconds in range(1, 4):
                self.pass_seconds(clock, 4)
                read(fast, 1500_000)
                read(slow, 300_000)          # a piece, but no MiB
                self.assertEqual(silent.handler.state == mq.CLOSED, seconds > 1)
            self.assertEqual(fast.handler.state, mq.LATE)
            self.assertEqual(slow.handler.state, mq.CLOSED)
            fast.close()
            self.until(self.is_free)

    def test_a_disk_that_hangs_is_not_the_clients_fault_and_holds_up_nobody_else(self):
        with self.fake_time() as clock:
            self.fill()
            wire, reading, go_on = self.stuck(), threading.Event(), threading.Event()
            self.addCleanup(go_on.set)
            whole = self.queue.log.read_raw

            def hang(*arguments):
                reading.set()
                go_on.wait(ANSWER_S)
                return whole(*arguments)
            with unittest.mock.patch.object(self.queue.log, "read_raw", hang):
                wire.socket.settimeout(ANSWER_S)
                while not reading.is_set():
                    if not wire.is_silent():
                        wire.socket.recv(1 << 16)
                    self.round()
                self.pass_seconds(clock, 100)
                self.assertEqual(wire.handler.state, mq.LATE)
                other = self.pair().send(request("GET", "/readyz"))
                self.round(2)
                self.assertEqual(self.statuses([other]), [200])
                wire.handler.close()         # the generator runs, in the other thread
                self.round(2)
                self.assertFalse(self.is_free())
                go_on.set()
                self.until(self.is_free)

    def test_several_at_once_and_others_do_not_wait_for_one_that_does_not_read(self):
        self.fill()
        stuck = [self.stuck() for _ in range(3)]
        body = self.answer_to(self.asked()).body
        self.assertEqual(self.names_in(body)[0], "meta.json")
        for method, path in (("POST", "/purge/fetcher"), ("GET", "/compact/fetcher"),
                             ("GET", "/peek/fetcher")):
            wire = self.pair().send(request(method, path))
            self.until(lambda wire=wire: not wire.is_silent())
            self.assertIn(wire.answer().status, (200, 404))
        bodies = [self.answer_to(wire).body for wire in stuck]
        self.assertEqual({len(other) for other in bodies}, {len(body)})

    def test_what_is_read_for_clients_counts_and_is_bounded(self):
        self.fill()
        stuck = [self.stuck() for _ in range(4)]
        self.assertGreater(self.broker.budget.held, 4 << 16)
        self.assertLessEqual(self.broker.budget.held, 4 * mq.PIECE_BYTES)
        self.broker.budget.hold(3 << 20)
        refused = self.asked()
        self.until(lambda: not refused.is_silent())
        self.assertEqual(refused.answer().status, 503)
        self.broker.budget.hold(-3 << 20)
        for wire in stuck:
            self.assertGreater(len(self.answer_to(wire).body), 4 << 20)
        self.assertEqual(self.broker.budget.held, 0)

    def test_a_stop_waits_for_it(self):
        self.fill()
        wire = self.stuck()
        self.broker.unready = mq.DRAINING
        self.assertFalse(self.server._is_drained())
        self.assertGreater(len(self.answer_to(wire).body), 4 << 20)
        self.until(self.server._is_drained)

    def test_what_cannot_be_read_ends_the_connection_before_its_end(self):
        self.fill()
        for error in (MemoryError(), mq.CompactionFailed("the disk is nearly full")):
            wire = self.stuck()
            with unittest.mock.patch.object(self.queue.log, "read_raw", side_effect=error):
                with self.assertRaises(ConnectionResetError):
                    self.answer_to(wire)
                self.until(self.is_free)
        with unittest.mock.patch.object(self.queue.log, "hold", side_effect=MemoryError):
            wire = self.asked()
            self.assertEqual(self.answer_to(wire).status, 500)
        self.assertEqual(len(self.failed), 1)
        self.failed.clear()

    def test_an_answer_that_cannot_be_made_lets_go_of_it(self):
        with unittest.mock.patch.object(mq, "render_head", side_effect=MemoryError):
            wire = self.asked()
            self.until(lambda: wire.handler.state == mq.CLOSED)
        self.until(self.is_free)
        self.assertEqual(len(self.failed), 1)
        self.failed.clear()

    def test_a_log_that_fails_while_it_is_read_ends_the_process_whoever_asked(self):
        self.fill()
        wire = self.stuck()
        wire.handler.close()

        def fail():
            self.queue.log.give_up(MemoryError())
        self.broker.read(fail, lambda _: None)
        eventually(lambda: self.failures == [self.queue.log.failure])


class UpkeepTest(ServerTest):
    """Jobs that upkeep does, each second and when it is asked to."""

    def setUp(self):
        quick = unittest.mock.patch.object(mq, "UPKEEP_S", 0.02)
        quick.start()
        self.addCleanup(quick.stop)
        super().setUp()
        self.other = self.broker.queues["manager-reload"]
        self.ended = []

    def endless(self, rest_s, ended=None):
        while not (ended and ended.is_set()):
            yield rest_s

    def raising(self, error):
        yield 0
        raise error

    def test_marks_that_begin_to_be_owed_are_logged_once_and_so_is_their_payment(self):
        broker = mq.Broker(self.broker.config, self.fail)
        with unittest.mock.patch.object(mq, "event") as event:
            for owed in (0, 1, 2, 0, 0):
                broker.queues["fetcher"].owed = owed
                broker._watch_space()
        self.assertEqual([(call[0][1], call[1]["queue"]) for call in event.call_args_list],
                         [("marks_owed", "fetcher"), ("marks_paid", "fetcher")])

    def test_a_disk_without_a_byte_left_is_logged_whatever_is_to_be_kept_free(self):
        broker = mq.Broker(self.broker.config, self.fail)
        self.assertEqual(broker.space.min_free_bytes, 0)
        with unittest.mock.patch.object(mq, "event") as event, \
                unittest.mock.patch.object(mq.Space, "free_bytes", lambda _: 0):
            broker._watch_space()
        self.assertEqual(event.call_args[0][1], "disk_nearly_full")

    def test_a_put_that_was_refused_for_its_size_is_not_counted(self):
        space = mq.Space(self.base, 0)
        with self.assertRaises(mq.ApiError) as caught:
            space.use(1 << 60)
        self.assertEqual(caught.exception.status, 503)
        self.assertGreater(space.left, 0)

    def test_a_job_that_raises_anything_is_told_so_and_the_others_go_on(self):
        for error in (ValueError("x"), MemoryError(), OSError(errno.EIO, "x"), mq.DiskFull(),
                      mq.StorageError("x"), mq.CompactionFailed("x")):
            ended = []
            self.broker.do(self.queue, self.raising(error), ended.append)
            self.broker.do(self.queue, iter(()), ended.append)
            self.broker.do(self.other, iter(()), ended.append)
            eventually(lambda ended=ended: len(ended) == 3, 0.9)     # no pause for a failure
            self.assertEqual([e for e in ended if e], [error])
        with unittest.mock.patch.object(mq.Queue, "_seal", side_effect=OSError(errno.EIO, "x")):
            self.call("POST", "/in/fetcher", b"x")
            self.call("GET", "/out/fetcher")
            self.call("GET", "/compact/fetcher", expect=503)
        self.call("GET", "/compact/fetcher")

    def test_an_endless_job_keeps_neither_other_queues_nor_syncs_waiting(self):
        for rest_s in (0, 3600):
            ended, synced = threading.Event(), threading.Event()
            self.broker.do(self.queue, self.endless(rest_s, ended))
            patch = unittest.mock.patch.object(self.queue.log, "sync_marks", synced.set)
            with patch, unittest.mock.patch.object(self.queue.log, "fsync", "everysec"):
                self.broker.do(self.other, iter([0, 0, 0]), lambda _, e=ended: e.set())
                self.assertTrue(ended.wait(ANSWER_S))
                self.assertTrue(synced.wait(ANSWER_S))
            self.call("GET", "/compact/fetcher")

    def test_who_asks_for_a_compaction_while_there_is_one_waits_for_the_same(self):
        go_on, begun = threading.Event(), []

        def slowly(outcome):
            begun.append(outcome)
            while not go_on.is_set():
                yield 0.001
            if outcome == 503:
                raise mq.CompactionFailed("no space")
        self.addCleanup(go_on.set)
        for outcome in (200, 503):
            begun.clear()
            go_on.clear()
            with unittest.mock.patch.object(self.queue, "compact",
                                            lambda outcome=outcome: slowly(outcome)):
                wires = [self.wire().send(request("GET", "/compact/fetcher")) for _ in range(3)]
                eventually(lambda: sum(job.is_compaction for job in list(self.broker._jobs)) == 3)
                self.call("GET", "/compact/manager-reload")
                go_on.set()
                self.assertEqual([wire.answer().status for wire in wires], [outcome] * 3)
                self.assertEqual(begun, [outcome])
                self.call("GET", "/compact/fetcher", expect=outcome)
                self.assertEqual(begun, [outcome] * 2)

    def test_a_stop_does_not_wait_for_a_compaction_but_answers_those_who_do(self):
        with unittest.mock.patch.object(self.queue, "compact", lambda: self.endless(0.001)):
            wires = [self.wire().send(request("GET", "/compact/fetcher")) for _ in range(2)]
            eventually(lambda: sum(job.is_compaction for job in list(self.broker._jobs)) == 2)
            started = time.monotonic()
            self.assertTrue(self.server.drain())
        self.assertLess(time.monotonic() - started, mq.DRAIN_S)
        self.assertEqual([wire.answer().status for wire in wires], [503] * 2)
        self.broker.close = lambda: True     # once is enough

    def test_a_segment_that_cannot_be_made_ready_is_not_tried_at_each_step_of_a_job(self):
        tries, steps = [], []

        def fail():
            tries.append(len(steps))
            raise mq.StorageError("another node's")
        with unittest.mock.patch.multiple(mq, READY_BYTES=1, UPKEEP_S=3600), \
                unittest.mock.patch.object(self.queue.log, "make_ready", fail):
            self.call("POST", "/in/fetcher", b"x")
            self.broker.do(self.queue, (steps.append(0) or 0.0001 for _ in itertools.count()))
            eventually(lambda: len(steps) > 500)
        self.assertLess(len(tries), 5)

    def test_a_stop_answers_the_jobs_and_leaves_a_clean_stop(self):
        told = []
        for queue in (self.queue, self.queue, self.other):
            self.broker.do(queue, self.endless(0.001), told.append)
        eventually(lambda: self.broker._jobs)
        for _ in range(2):
            self.broker.dismiss()
        self.assertEqual([str(error)[:22] for error in told], ["the server is stopping"] * 3)
        self.assertTrue(self.broker.close())
        self.broker.close = lambda: True     # once is enough
        self.assertEqual(len(told), 3)

    def test_a_stop_answers_a_purge_that_waits_for_space(self):
        upkeep = unittest.mock.Mock(side_effect=lambda: self.endless(0.001))
        with unittest.mock.patch.object(self.queue, "upkeep", upkeep):
            eventually(lambda: upkeep.called)
            self.queue.owed = 1
            wire = self.wire().send(request("POST", "/purge/fetcher", token=ADMIN))
            self.assertTrue(wire.is_silent(0.1))
            self.assertTrue(self.server.drain())
        self.assertEqual(wire.answer().status, 503)
        self.broker.close = lambda: True     # once is enough


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
            json.dump(example_config(path=self.folder("data"), listen_port=0), file)
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
            self.assertTrue(json.loads(file.readline())[1]["clean"])
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
            "recover = mq.Broker.recover\n"
            "def recover_then_break(broker):\n"
            "    recover(broker)\n"
            "    def fail(fd): raise OSError(errno.EIO, 'broken')\n"
            "    mq.Storage.fdatasync = staticmethod(fail)\n"
            "mq.Broker.recover = recover_then_break").wait_ready()
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


class StandbyTest(Processes):
    """Two nodes on one folder, each a process that may take over."""

    def node(self, number, **options):
        options = {"settings": {"standby": True, "metric_exporter": True}, **options}
        node = ServerProcess(self.folder(f"node{number}"), self.folder("data"), **options)
        self.addCleanup(node.kill)
        return node

    def pair(self):
        os.makedirs(self.folder("data"))
        active = self.node(1).wait_ready()
        standby = self.node(2)
        eventually(lambda: "standby reason=" in standby.stderr())
        return active, standby

    def test_a_standby_says_so_and_serves_once_the_other_is_killed(self):
        active, standby = self.pair()
        for number in range(100):
            active.ask("POST", "/in/fetcher", b"%d" % number)
        told = active.ask("GET", "/out/fetcher?lease=60")
        for path, status, text in (
                ("/healthz", 200, b"running"), ("/readyz", 503, b"Not ready: standby"),
                ("/in/fetcher", 503, b"standby"), ("/stats", 200, b"{}"),
                ("/stats/fetcher", 503, b"standby"), ("/nothing", 503, b"standby"),
                ("/metrics", 200, b"oxl_micro_queue_active 0\n")):
            answer = standby.ask("POST" if path == "/in/fetcher" else "GET", path, b"x"
                                 if path == "/in/fetcher" else b"")
            self.assertEqual(answer.status, status, path)
            self.assertIn(text, answer.body)
        self.assertEqual(standby.ask("GET", "/stats", token="none" * 9).status, 401)
        active.kill()
        started = time.monotonic()
        standby.wait_ready()
        self.assertLess(time.monotonic() - started, START_S)
        self.assertIn(b"oxl_micro_queue_active 1\n", standby.ask("GET", "/metrics").body)
        self.assertEqual(standby.ask("POST", f"/ack/fetcher?lease={told.headers['Lease-Id']}"
                                     ).status, 410)    # leases end with their node
        found = [standby.ask("GET", "/out/fetcher") for _ in range(100)]
        self.assertEqual([int(answer.body) for answer in found], list(range(100)))
        for node in (active, standby):
            node.check_log()

    def test_a_stop_of_the_active_one_hands_over_and_it_waits_in_turn(self):
        active, standby = self.pair()
        for number in range(3):
            active.ask("POST", "/in/fetcher", b"%d" % number)
            self.assertEqual(active.stop(), 0)
            standby.wait_ready()
            self.assertEqual(standby.ask("GET", "/out/fetcher").body, b"%d" % number)
            self.assertIn("scanned_bytes=0", standby.stderr())
            active, standby = standby, self.node(1)

    def test_a_standby_stops_at_once_with_nothing_made_or_changed(self):
        path = self.folder("data")
        node = self.node(1)                  # the folder is missing: as if it was not mounted
        eventually(lambda: "standby reason=" in node.stderr())
        self.assertEqual(node.stop(), 0)
        self.assertFalse(os.path.exists(path))
        active, standby = self.pair()
        standby.process.send_signal(signal.SIGHUP)
        eventually(lambda: "no_reload" in standby.stderr())
        before = {name: os.listdir(os.path.join(path, name)) for name in sorted(os.listdir(path))
                  if name != "lock"}
        self.assertEqual(standby.stop(), 0)
        self.assertEqual({name: os.listdir(os.path.join(path, name)) for name in before}, before)
        self.assertEqual(active.ask("GET", "/readyz").status, 200)

    def test_two_configs_with_different_queues_never_serve_one_folder(self):
        def other(config):
            config["queues"] = [{"name": "other"}]
            config["tokens"] = [{"name": "a", "token": ADMIN, "admin": True}]
        self.pair()
        eager = self.node(3, settings={}, change=other)
        self.assertEqual(eager.wait_end(), 3)
        self.assertIn("in use by another micro_queue", eager.stderr())
        self.assertEqual(eager.stderr().count("\n"), 1)
        self.assertFalse(os.path.exists(self.folder("data/other")))

    def test_who_lost_its_marks_to_another_file_writes_them_again(self):
        queue = self.open()
        queue.put([b"a"])
        queue.settle(queue.take())
        shutil.copy(self.folder("q/meta.json"), self.folder("q/late"))
        os.rename(self.folder("q/late"), self.folder("q/meta.json"))     # a late rename
        self.assertFalse(queue.log.owns_marks)
        upkeep(queue)
        self.assertTrue(queue.log.owns_marks)
        self.assertEqual(payloads(self.crash()), [])

    def test_a_sync_that_hung_is_answered_only_if_the_lock_is_still_ours(self):
        queue = self.open(fsync="always")
        lost = OSError(errno.EBADFD, "File descriptor in bad state")
        with unittest.mock.patch.object(mq, "LOCK_S", -1):
            queue.put([b"a"])                # it is
            with unittest.mock.patch.object(mq.fcntl, "lockf", side_effect=lost), \
                    self.assertRaisesRegex(mq.LogFailed, "cannot keep the lock of .*bad state"):
                queue.put([b"b"])

    def test_a_segment_that_a_node_without_the_lock_made_ready_is_removed(self):
        queue = self.filled(b"a")
        header = queue.log.codec.header(7)
        self.drop()
        path = self.folder("q/data.7.log")
        with open(path, "wb") as file:
            file.write(header)
        code = f"import fcntl, time; f = open({path!r}, 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
        holder = subprocess.Popen([sys.executable, "-c", code + "print(1, flush=True)\n"
                                   "time.sleep(60)"], stdout=subprocess.PIPE)
        self.addCleanup(holder.stdout.close)
        self.addCleanup(holder.wait)
        self.addCleanup(holder.kill)
        holder.stdout.readline()
        queue = self.open()
        self.assertEqual(payloads(queue), [b"a"])
        self.assertFalse(os.path.exists(path))
        self.assertGreater(queue.log.current.number, 7)

    def test_where_locks_are_known_to_one_node_only_a_standby_is_refused(self):
        table = ("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
                 "23 22 0:41 / {} rw,relatime shared:1 - {} host:/x {}\n")
        for kind, options, fits in (
                ("ext4", "rw", True), ("fuse.glusterfs", "rw", True), ("ceph", "rw", True),
                ("nfs4", "rw,vers=4.2,local_lock=none", True), ("nfs", "rw,vers=3", False),
                ("nfs4", "rw,local_lock=all", False), ("nfs4", "rw,local_lock=posix", False),
                ("nfs4", "rw,local_lock=flock", True), ("nfs4", "rw,nolock", False),
                ("cifs", "rw", False), ("fuse.sshfs", "rw", False)):
            with open(self.folder("mounts"), "w", encoding="ascii") as file:
                file.write(table.format(self.base.replace(" ", "\\040"), kind, options))
            with unittest.mock.patch.object(mq, "MOUNTS", self.folder("mounts")):
                self.assertEqual(mq.mount_of(self.base).kind, kind)
                reason = mq.why_no_standby(self.base)
            self.assertEqual(reason is None, fits, (kind, options))
        with open(self.folder("mounts"), "ab") as file:          # names that are not ours
            file.write(b"24 22 0:42 / /a\xff\rb\xc2\xa0c rw - ext4 /dev/sdb1 rw\n")
        with unittest.mock.patch.object(mq, "MOUNTS", self.folder("mounts")):
            self.assertEqual(mq.mount_of("/").kind, "ext4")
        lost = self.folder("recover_lost_locks")
        for text, fits in (("Y\n", False), ("N\n", True)):
            with open(lost, "w", encoding="ascii") as file:
                file.write(text)
            with unittest.mock.patch.multiple(mq, RECOVER_LOST_LOCKS=lost, mount_of=lambda _:
                                              mq.Mount("/", "nfs4", ("rw",))):
                self.assertEqual(mq.why_no_standby("/") is None, fits)


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
        del storage.calls[:]
        storage.fail("pwrite", errno.ENOSPC, at=2)
        queue.put([b"b"])
        for _ in range(2):
            with self.assertRaises(mq.DiskFull):
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

class ShellBackupTest(Processes):
    def test_curl_and_tar_make_a_folder_that_starts(self):
        if not (shutil.which("curl") and shutil.which("tar")):
            self.skipTest("needs curl and tar")
        self.start()
        for number in range(50):
            self.server.ask("POST", f"/in/fetcher?delay={number % 2 * 3600}", b"%d" % number)
        for _ in range(5):
            self.server.ask("GET", "/out/fetcher")
        lease = self.server.ask("GET", "/out/fetcher?lease=60").headers["Lease-Id"]
        self.server.ask("POST", f"/nack/fetcher?lease={lease}")
        stats = json.loads(self.server.ask("GET", "/stats/fetcher").body)
        script = (f"curl -sfo q.tar -H 'Authorization: Bearer {ADMIN}' "
                  f"http://127.0.0.1:{self.server.port}/backup/fetcher && "
                  "mkdir -pm 700 there/fetcher && tar xf q.tar -C there/fetcher")
        subprocess.run(["sh", "-c", script], cwd=self.base, check=True, timeout=20)
        self.server.ask("POST", "/purge/fetcher")
        restored = ServerProcess(self.base, self.folder("there")).wait_ready()
        self.addCleanup(restored.kill)
        now = json.loads(restored.ask("GET", "/stats/fetcher").body)
        self.assertEqual([now[key] for key in ("ready", "delayed", "leased")],
                         [stats["ready"], stats["delayed"], 0])
        first = restored.ask("GET", "/out/fetcher?max=1000")
        self.assertEqual((first.body.split()[0], first.count), (b"10", 2))
        for name in os.listdir(self.folder("there/fetcher")):
            self.assertEqual(os.stat(self.folder(f"there/fetcher/{name}")).st_mode & 0o777, 0o600)


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

    def test_every_event_to_watch_for_is_one_that_the_code_logs(self):
        text = re.search(r"\*\*Logs\*\*.*?\n\n", self.readme, re.S)[0]
        with open(SERVER, encoding="utf-8") as file:
            logged = re.findall(r'event\(logging\.(?:WARNING|ERROR), "(\w+)"', file.read())
        watched = set(re.findall(r"`([a-z]+_[a-z_]+)`", text))
        self.assertGreater(len(watched), 10)
        self.assertEqual(watched - set(logged), set())

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
        found = [subprocess.run(block, shell=True, capture_output=True, timeout=20, cwd=folder)
                 for block in blocks]
        self.assertEqual([done.stderr.count(b"HTTP/1.1 200") for done in found], [1, 1, 1, 2, 0])
        self.assertEqual([done.returncode for done in found], [0] * 5)
        self.assertEqual(found[1].stdout, b'{"context": "test"}')
        self.assertIn(b'messages_out_total{queue_name="fetcher"} 1', found[2].stdout)
        self.assertEqual(found[3].stdout, b'{"n": 1}\n{"n": 2}\n')
        with tarfile.open(os.path.join(folder, "fetcher.tar")) as tar:
            self.assertEqual(tar.getnames(), ["meta.json", "data.log"])
        for name in ("fetcher/data.log", "fetcher/meta.json", "manager-reload"):
            self.assertTrue(os.path.exists(os.path.join(server.path, name)), name)


if __name__ == "__main__":
    unittest.main()
