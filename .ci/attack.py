#!/usr/bin/env python3
"""Attack a server, and see that an honest client is answered in time all the while.

    python3 .ci/attack.py                            # each attack for a moment: a look, for CI
    python3 .ci/attack.py --long                     # for longer, with fsync "always" and "no"
    python3 .ci/attack.py --only blanks --only polls # attacks whose name has one of these words

A server process gets an honest client, in a process of its own: one connection puts, another
takes and asks /healthz in turn, and the tests' Ledger is told all of it. Then attackers come, in
processes of their own. Judged, for each attack:

- The honest client's worst wait. In the long mode 250 ms at most, and for durable puts twice as
  much more as the slowest fdatasync took that the harness made beside it. The short mode runs on
  machines that others load too: one second, or five times the worst wait that the same run saw
  without an attack.
- Nothing of the honest client is lost, made up, altered, or given twice.
- Memory and threads stay bounded, whatever clients send or leave unread.
- SIGTERM ends the server with 0 in the time that the README gives, and without a traceback.
- What an attack checks besides, see its docstring.

Needs Linux and Python 3.9; without threads runs as another user where this one is root. All
traffic is on loopback. Folders are made in ATTACK_DIR (default /var/tmp, which should be a disk);
that of a fault is kept and named. Exit code: 0 all good; 1 a fault; 2 usage.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from test_micro_queue import (  # noqa: E402
    SERVER, Client, Fault, Ledger, ServerProcess, Wire, request)

KIB, MIB = 1 << 10, 1 << 20
ATTACK_DIR = os.environ.get("ATTACK_DIR", "/var/tmp")
ATTACKED = "manager-reload"      # the attackers' queue; the honest client has the other
SHORT_S, LONG_S = 0.6, 6         # an attack, if it does not say how long it takes
LONG_LIMIT_S, SHORT_LIMIT_S = 0.25, 1.0
SHORT_FACTOR = 5                 # times the worst wait without an attack
SYNCS = 2                        # a durable put may come while one sync is under way
PATIENCE_S = 4, 15               # short, long: how long the honest client waits for an answer
PAUSE_S = 0.002                  # between its requests: it is not an attack itself
DRAIN_S = 5                      # the README: how long a stop waits for requests under way
END_S = DRAIN_S + 2
ATTACKER_S = 120                 # one that nobody is left to call off ends by itself
FINITE_S = 20                    # an attack that ends by itself must by then
INFLIGHT_BYTES = 64 * MIB        # max_inflight_bytes where the server has it; else its default
DEFAULT_INFLIGHT_BYTES = 256 * MIB
MEMORY_BYTES = 64 * MIB          # more than at the start, for an attack that names no bound
THREADS = 12                     # more than before the attack: syncs have some of their own
SOMEBODY = 54_321                # a user that nobody is: no process of another counts as theirs
HARD_THREADS = 1000
NICE = 10                        # of attackers: what is measured is the server, not two cores

processes = multiprocessing.get_context("fork")


# ---- The honest client --------------------------------------------------------------------

class Waits(NamedTuple):
    """The worst waits of the honest client, in seconds, and of a sync beside it."""

    quick: float                 # takes and /healthz
    put: float
    sync: float
    count: int                   # requests
    faults: List[str]


class Honest:
    """Puts, takes and asks /healthz until it is told to stop; then takes what is left.

    Runs in a process of its own. What makes a request wait counts however it ends: a request that
    gets no answer in `patience_s` waited for that long."""

    def __init__(self, port: int, folder: str, patience_s: float, durable: bool) -> None:
        self._port, self._patience_s, self._folder = port, patience_s, folder
        self._durable = durable
        self._worst = {"quick": 0.0, "put": 0.0, "sync": 0.0}
        self._count = 0
        self._ledger = Ledger()
        self._stop, self._puts_ended = threading.Event(), threading.Event()
        self._broken = False                 # what a broken connection was given is not known

    def run(self, pipe: Any) -> None:
        works = (self._put, self._take, self._sync)
        put, *others = [threading.Thread(target=self._guarded, args=(work,)) for work in works]
        for thread in (put, *others):
            thread.start()
        while self._count < 20 and not self._stop.is_set():
            time.sleep(PAUSE_S)
        pipe.send("ready")
        self._worst = dict.fromkeys(self._worst, 0.0)    # what a start takes is no attack's
        pipe.recv()
        self._stop.set()
        put.join()
        self._puts_ended.set()               # from now on an empty queue stays empty
        for thread in others:
            thread.join()
        pipe.send(Waits(*(self._worst[kind] for kind in ("quick", "put", "sync")), self._count,
                        self._ledger.faults(drained=not self._broken)))

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self._ledger.note(f"honest client: {work.__name__.strip('_')}: {error!r}")
            self._broken = True
            self._stop.set()

    @contextlib.contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._worst[kind] = max(self._worst[kind], time.monotonic() - started)
            self._count += 1

    def _client(self, wire: Wire) -> Client:
        return Client(wire, self._ledger, "honest", durable=self._durable)

    def _put(self) -> None:
        with Wire(self._port, self._patience_s) as wire:
            client = self._client(wire)
            while not self._stop.is_set():
                with self._timed("put"):
                    answer = client.put(b"%d " % self._count + os.urandom(40).hex().encode())
                self._expect(answer.status == 200, f"a put was answered {answer.status}")
                time.sleep(PAUSE_S)

    def _take(self) -> None:
        with Wire(self._port, self._patience_s) as wire:
            client = self._client(wire)
            status, ended = 0, False
            while not (ended and status == 404):
                ended = self._puts_ended.is_set()
                with self._timed("quick"):
                    status = client.take().status
                self._expect(status in (200, 404), f"a take was answered {status}")
                with self._timed("quick"):
                    answer = wire.ask("GET", "/healthz", token="")
                self._expect(answer.status == 200, f"/healthz was answered {answer.status}")
                time.sleep(0 if ended else PAUSE_S)

    def _sync(self) -> None:
        """Make syncs of one's own, to know what the disk takes for one just now."""
        with open(os.path.join(self._folder, "probe"), "wb", 0) as file:
            while not self._stop.wait(0.02):
                file.write(bytes(100))
                started = time.monotonic()
                os.fdatasync(file.fileno())
                self._worst["sync"] = max(self._worst["sync"], time.monotonic() - started)

    def _expect(self, good: bool, what: str) -> None:
        if not good:
            self._ledger.note(f"honest client: {what}")


# ---- What attackers work with ---------------------------------------------------------------

class Ground:
    """What an attacker is given. Each process has its own `tally`: requests, bytes sent."""

    def __init__(self, port: int, long: bool, limit_s: float, seed: str, faults: Any,
                 over: Any) -> None:
        self.port, self.long, self.limit_s = port, long, limit_s
        self.rng = random.Random(seed)
        self._faults, self._over = faults, over
        self.tally = processes.RawArray("Q", 2)

    def sent(self, requests: int = 0, size: int = 0) -> None:
        self.tally[0] += requests
        self.tally[1] += size

    def fault(self, text: str) -> None:
        """Tell what is wrong; nothing is, once the server was told to stop."""
        if not self._over.value:
            self._faults.put(text)

    def wire(self, timeout: float = 30) -> Wire:
        return Wire(self.port, timeout)

    def connect(self, receive_bytes: int = 0) -> socket.socket:
        """Open a connection; one that takes so many bytes in advance, in segments of Ethernet's
        size, if they are given: then the server's system takes little in advance as well."""
        connection = socket.socket()
        if receive_bytes:                    # to be set before: both are agreed on then
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", self.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def ask(self, data: bytes, timeout: float = 30) -> int:
        """Send a request on a new connection; return the answer's status, 0 without one."""
        self.sent(1, len(data))
        with contextlib.suppress(OSError), self.wire(timeout) as wire:
            answer = wire.send(data).answer()
            return answer.status if answer else 0
        return 0


class Member:
    """A connection of a crowd."""

    def __init__(self, connection: socket.socket, todo: bytes) -> None:
        self.connection, self.todo = connection, memoryview(todo)
        self.seen, self.tail = 0, b""        # answers since the last sending; their last bytes


class Crowd:
    """Connections that one thread serves: each sends `first`, then `then` again and again.

    With `answers`, it sends `then` once so many answers have come, all of them 200, else without
    a pause. Unless it `reads`, it lets all answers lie. One that the server closes is opened
    again, if `again`."""

    def __init__(self, ground: Ground, count: int, first: bytes, then: bytes = b"", *,
                 answers: int = 0, reads: bool = True, again: bool = True,
                 receive_bytes: int = 0) -> None:
        self._ground, self._first, self._then = ground, first, then
        self._answers, self._reads, self._again = answers, reads, again
        self._receive_bytes = receive_bytes
        self._epoll, self._members = select.epoll(), {}  # type: Any, Dict[int, Member]
        for _ in range(count):
            self._join()

    def run(self) -> None:
        while True:
            for fd, events in self._epoll.poll(0.1):
                member = self._members[fd]
                try:
                    if events & select.EPOLLIN:
                        self._read(member)
                    if events & (select.EPOLLHUP | select.EPOLLERR):
                        raise ConnectionResetError
                    if events & select.EPOLLOUT:
                        self._write(member)
                except BlockingIOError:
                    pass
                except OSError:
                    self._leave(fd)

    def _join(self) -> None:
        connection = self._ground.connect(self._receive_bytes)
        connection.setblocking(False)
        self._members[connection.fileno()] = Member(connection, self._first)
        self._epoll.register(connection, select.EPOLLOUT | self._in)

    def _leave(self, fd: int) -> None:
        self._members.pop(fd).connection.close()         # which leaves the epoll, too
        if self._again:
            with contextlib.suppress(OSError):
                self._join()

    @property
    def _in(self) -> int:
        return select.EPOLLIN if self._reads else 0

    def _write(self, member: Member) -> None:
        size = member.connection.send(member.todo)
        member.todo = member.todo[size:]
        self._ground.sent(0, size)
        if member.todo:
            return
        self._ground.sent(1)
        if self._then and not self._answers:
            member.todo = memoryview(self._then)
        else:
            self._epoll.modify(member.connection, self._in)

    def _read(self, member: Member) -> None:
        data = member.connection.recv(MIB)
        if not data:
            raise ConnectionResetError
        if not self._answers:
            return
        text = member.tail + data            # a status line may come in two pieces
        member.tail = data[-12:] if len(data) >= 12 else text[-12:]
        member.seen += text.count(b"HTTP/1.1 200 ")
        if member.seen >= self._answers:
            member.seen, member.tail, member.todo = 0, b"", memoryview(self._then)
            self._epoll.modify(member.connection, select.EPOLLOUT | self._in)


def hold(connections: Sequence[Any]) -> None:
    """Keep connections open until this process is ended."""
    while connections:
        time.sleep(60)


def put_head(length: int, *fields: str) -> bytes:
    """Return the head of a put whose body is sent apart."""
    return request("POST", f"/in/{ATTACKED}", headers=(f"Content-Length: {length}", *fields))


CHUNKED_HEAD = request("POST", f"/in/{ATTACKED}", headers=("Transfer-Encoding: chunked",))
HEALTH = request("GET", "/healthz", token="")


# ---- Attacks: what is slow to read ----------------------------------------------------------

def keep_asking(ground: Ground, *inputs: bytes) -> None:
    """Send each in turn, each on a connection of its own."""
    while True:
        for data in inputs:
            ground.ask(data)


def with_field(field: bytes) -> bytes:
    return b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + field + b"\r\n\r\n"


def blanks_before_a_control_character(ground: Ground) -> None:
    """A field that no client may send, as long as a head may be: no token."""
    keep_asking(ground, *(with_field(b"A:" + b" " * size + b"\x01") for size in (1_600, 30_000)))


def blanks_within_a_value(ground: Ground) -> None:
    """A field that is valid: no token."""
    keep_asking(ground, with_field(b"A:x" + b" " * 30_000 + b"y"),
                with_field(b"A:" + b"x " * 15_000 + b"y"))


def blanks_in_trailers(ground: Ground) -> None:
    """Behind a chunked body, in lines as long as they may be."""
    keep_asking(ground, *(CHUNKED_HEAD + b"1\r\nx\r\n0\r\n" + trailer + b"\r\n\r\n" for trailer in (
        b"A:" + b" " * 1_600 + b"\x01", b"A:x" + b" " * 8_000 + b"y",
        (b"A:x" + b" " * 8_000 + b"y\r\n") * 90 + b"A:" + b" " * 8_000 + b"\x01")))


def blanks_in_chunk_extensions(ground: Ground) -> None:
    """Before and behind the semicolon, with names without end."""
    lines = [b"1" + b" " * 8_000 + b"\x01", b"1" + b" " * 4_000 + b";" + b" " * 4_000 + b"\x01",
             b"1" + b";a=b " * 1_500 + b"\x01", b"1;" + b"a" * 8_000 + b"=\x01",
             b"1;a=\"" + b"\\" * 8_000]
    keep_asking(ground, *(CHUNKED_HEAD + (b"1;a=" + b"b" * 8_000 + b"\r\nx\r\n") * 100 + line
                          + b"\r\nx\r\n0\r\n\r\n" for line in lines))


def long_lines_of_every_kind(ground: Ground) -> None:
    """Request lines of 8 KiB, and Host, Authorization, Connection, Content-Type of 30,000."""
    targets = [b"/" + b"a/" * 4_000, b"/in/" + b"a" * 8_000, b"/out/x?" + b"wait=1&" * 1_150,
               b"http://" + b"a" * 8_000, b"/?" + b"=&" * 4_000]
    values = [b" " * 30_000 + b"x", b"x:" * 15_000, b"Bearer " + b" " * 29_000 + b"x",
              b"close," * 5_000, b"a;" * 15_000]
    keep_asking(ground, *(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target for target in targets),
                *(with_field(name + b": " + value) for value in values
                  for name in (b"Host", b"Authorization", b"Connection", b"Content-Type")))


# ---- Attacks: too much at once --------------------------------------------------------------

def pipelines_without_a_pause(ground: Ground) -> None:
    """40 connections send `GET /healthz` as fast as they can: no token."""
    Crowd(ground, 40, HEALTH, HEALTH * 1_000).run()


def pipelines_whose_answers_are_not_read(ground: Ground) -> None:
    """The same, but nobody reads."""
    Crowd(ground, 40, HEALTH, HEALTH * 1_000, reads=False).run()


def bodies_in_chunks_of_one_byte(ground: Ground) -> None:
    """40 connections send a body in the smallest pieces that there are, without end."""
    Crowd(ground, 40, CHUNKED_HEAD, b"1\r\nx\r\n" * 10_000).run()


def floods_of_connections(ground: Ground) -> None:
    """Connect and close at once, with a reset each second time."""
    while True:
        with contextlib.suppress(OSError), ground.wire() as wire:
            ground.sent(1)
            if ground.rng.random() < 0.5:
                wire.reset()


def connections_that_never_speak(ground: Ground) -> None:
    """Three times as many as the server takes; those that it refuses come again."""
    Crowd(ground, 300, b"").run()


def pipelined_puts(ground: Ground) -> None:
    """Clumsy clients send puts by hundreds and then read their answers."""
    data = b"".join(request("POST", f"/in/{ATTACKED}", b"x" * 100) for _ in range(200))
    Crowd(ground, 20, data, data, answers=200).run()


def a_busy_durable_queue(ground: Ground) -> None:
    """40 producers that go on as soon as they are answered."""
    data = request("POST", f"/in/{ATTACKED}", b"x" * 100)
    Crowd(ground, 40, data, data, answers=1).run()


def large_uploads(ground: Ground) -> None:
    """Four honest clients put and take 4 MiB at full speed; here is one of them."""
    with ground.wire() as wire:
        for body in iter(lambda: ground.rng.randbytes(4 * MIB), b""):
            status = wire.put(body, queue=ATTACKED).status
            if status != 200:
                ground.fault(f"an upload was answered {status}")
            wire.take(queue=ATTACKED)
            ground.sent(2, len(body))


# ---- Attacks: what comes slowly, or not at all ----------------------------------------------

def slow_heads_and_bodies(ground: Ground) -> None:
    """400 connections send a byte now and then."""
    slow = []
    for number in range(400):
        connection = ground.connect()
        if number % 2:
            connection.sendall(put_head(1_000_000))
        slow.append(connection)
    head = put_head(1_000_000)[:-2] + b"Filler: " + b"x" * 20_000
    for number in range(len(head)):
        for connection in slow:
            with contextlib.suppress(OSError):
                connection.send(head[number:number + 1])
        ground.sent(0, len(slow))
        time.sleep(0.1)


def half_sent_requests(ground: Ground) -> None:
    """1,000 requests of which the rest never comes: they may start no thread."""
    halves = [b"GET /hea", put_head(10) + b"half", CHUNKED_HEAD + b"5\r\nab", put_head(10)[:-2],
              put_head(70_000) + b"x" * 60_000,
              request("GET", f"/out/{ATTACKED}?wait=60") + b"G"]
    held = []
    for number in range(1_000):
        held.append(ground.connect())
        held[-1].sendall(halves[number % len(halves)])
        ground.sent(1, len(halves[number % len(halves)]))
    hold(held)


def long_polls_that_hang_up(ground: Ground) -> None:
    """None of them is handed a message: the next take has it, at its first delivery."""
    for number in range(200 if ground.long else 20):
        polls = [ground.wire() for _ in range(20)]
        for wire in polls:
            wire.send(request("GET", f"/out/{ATTACKED}?wait=60"))
        time.sleep(0.01)
        for at, wire in enumerate(polls):
            wire.reset() if at % 2 else wire.close()
        with ground.wire() as wire:
            wire.put(b"%d" % number, queue=ATTACKED)
            answer = wire.take("?wait=1", queue=ATTACKED)
        if (answer.status, answer.body, answer.count) != (200, b"%d" % number, 1):
            ground.fault(f"behind long polls that hung up, a take was answered {answer}")
        ground.sent(len(polls) + 2)


def resets_at_every_byte(ground: Ground) -> None:
    """Of a put, of a take with a lease, and of its answer: what was answered 200 comes back."""
    ledger = Ledger()
    with ground.wire() as wire:
        for number in range(20):
            ledger.sending(b"kept %d" % number)
            answer = wire.put(b"kept %d" % number, queue=ATTACKED)
            ledger.accepted(b"kept %d" % number, answer.id)
    take = request("GET", f"/out/{ATTACKED}?lease=1")
    length = len(request("POST", f"/in/{ATTACKED}", b"cut 000"))
    for at in range(length + 1):
        ledger.sending(b"cut %03d" % at)
        reset(ground, request("POST", f"/in/{ATTACKED}", b"cut %03d" % at)[:at])
        reset(ground, take[:at])
        if at % 10 == 0:
            reset(ground, take, read=at)
    missing = {b"kept %d" % number for number in range(20)}
    with ground.wire() as wire:
        while True:
            answer = wire.take("?wait=2" if missing else "", queue=ATTACKED)
            if answer.status != 200:
                break
            missing.discard(answer.body)
            ledger.delivered("rest", answer.body, answer.id, answer.count)
            ledger.settled("rest")
    for fault in ledger.faults():
        ground.fault(f"behind resets: {fault}")


def reset(ground: Ground, data: bytes, read: Optional[int] = None) -> None:
    """Send, read so many bytes, and reset."""
    ground.sent(1, len(data))
    with ground.wire() as wire, contextlib.suppress(OSError):
        wire.send(data)
        if read:
            wire.socket.recv(read)
        wire.reset()


def idle_connections(ground: Ground) -> None:
    """They are closed about on time though durable puts go on."""
    wires = [ground.wire(FINITE_S) for _ in range(50)]
    for wire in wires:
        wire.send(HEALTH).answer()
    started = time.monotonic()
    ends = []
    for wire in wires:
        with contextlib.suppress(OSError):   # a timeout: it is still open
            wire.socket.settimeout(max(0.01, started + IDLE_S[1] + 0.5 - time.monotonic()))
            ends.append(time.monotonic() - started if wire.at_end() else -1)
    ground.sent(len(wires))
    if len(ends) < len(wires) or not IDLE_S[0] * 0.8 < min(ends) <= max(ends) < IDLE_S[1]:
        ground.fault(f"idle_timeout {IDLE_S[0]} s: {len(wires) - len(ends)} of {len(wires)} "
                     f"connections are open after {IDLE_S[1]} s, the others were closed "
                     f"after {min(ends, default=0):.1f} to {max(ends, default=0):.1f} s")


IDLE_S = 1, 3                    # when they should be closed, and by when they must be


# ---- Attacks: memory ------------------------------------------------------------------------

BIG_BYTES = 8 * MIB
TAKEN = 10                       # messages of so many bytes
SLOWLY_S = 1, 5                  # request_timeout, and by when a message must be back


def put_big_messages(server: ServerProcess) -> None:
    with server.wire(30) as wire:
        for _ in range(TAKEN):
            wire.put(os.urandom(1024) * (BIG_BYTES // 1024), queue=ATTACKED)


def answers_that_nobody_reads(ground: Ground) -> None:
    """100 peeks of 8 MiB."""
    Crowd(ground, 100, request("GET", f"/peek/{ATTACKED}"), reads=False, again=False,
          receive_bytes=4096).run()


def answers_that_are_read_slowly(ground: Ground) -> None:
    """Takes of which little is read, always a bit more, or nothing. They end by request_timeout,
    which holds for each MiB, and their messages are back then."""
    takers = [ground.connect(8 * KIB) for _ in range(TAKEN)]
    for taker in takers:
        taker.sendall(request("GET", f"/out/{ATTACKED}"))
        taker.setblocking(False)
    ground.sent(len(takers))
    deadline, ready = time.monotonic() + SLOWLY_S[1], 0
    with ground.wire() as wire:
        while time.monotonic() < deadline and ready < TAKEN:
            time.sleep(0.03)                 # at most 270 KiB a second
            for taker in takers[::2]:
                with contextlib.suppress(OSError):
                    taker.recv(8 * KIB)
            stats = json.loads(wire.ask("GET", f"/stats/{ATTACKED}").body)
            ready = stats["ready"]
    if ready < TAKEN:
        ground.fault(f"of {TAKEN} answers that are hardly read, {ready} had ended within "
                     f"{SLOWLY_S[1]} s; request_timeout is {SLOWLY_S[0]} s")


def bodies_one_byte_short(ground: Ground) -> None:
    """50 bodies of 16 MiB, of which the last byte never comes."""
    size = 16 * MIB
    Crowd(ground, 50, put_head(size) + b"x" * (size - 1), again=False).run()


def lines_too_many_to_count(ground: Ground) -> None:
    """NDJSON bodies of millions of lines, full and blank: refused, and soon."""
    fields = "Content-Type: application/x-ndjson", "Connection: close"
    for line, expected in ((b"ab\n", 413), (b"\n", 400), (b"\r\n", 400)):
        body = line * (16 * MIB // len(line))
        started = time.monotonic()
        status = ground.ask(put_head(len(body), *fields) + body)
        took_s = time.monotonic() - started
        if status != expected or took_s > 3:
            ground.fault(f"16 MiB of {line!r}: {status} after {took_s:.1f} s")


# ---- Attacks: long polls by the thousand ----------------------------------------------------

def a_thousand_long_polls(ground: Ground) -> None:
    """Each put wakes one of them, at once; it asks again."""
    polls, epoll = {}, select.epoll()
    poll = request("GET", f"/out/{ATTACKED}?wait=60")
    for _ in range(1_000):
        wire = ground.wire()
        polls[wire.fileno()] = wire.send(poll)
        epoll.register(wire, select.EPOLLIN)
    with ground.wire() as producer:
        while True:
            producer.put(b"x", queue=ATTACKED)
            started = time.monotonic()
            ready = epoll.poll(10)
            took_s = time.monotonic() - started
            if len(ready) != 1 or took_s > ground.limit_s:
                ground.fault(f"a put woke {len(ready)} long polls after {took_s:.2f} s")
                return
            wire = polls[ready[0][0]]
            wire.answer()
            wire.send(poll)
            ground.sent(2)


# ---- Attacks: what an admin's token may do ---------------------------------------------------

def backups_that_are_read_slowly(ground: Ground) -> None:
    """40 backups of 80 MiB, each read a bit at a time, while what they hold is freed."""
    readers = [ground.connect(8 * KIB) for _ in range(40)]
    for reader in readers:
        reader.sendall(request("GET", f"/backup/{ATTACKED}"))
        reader.setblocking(False)
    ground.sent(len(readers))
    ground.ask(request("POST", f"/purge/{ATTACKED}"))
    while True:
        time.sleep(0.02)
        for reader in readers:
            with contextlib.suppress(OSError):
                reader.recv(4 * KIB)


def backups_that_hang_up(ground: Ground) -> None:
    """At any place, while others put and compact; one that is read to its end is whole."""
    backup = request("GET", f"/backup/{ATTACKED}")
    while True:
        for _ in range(10):
            reset(ground, backup, read=ground.rng.randrange(1, MIB))
        ground.ask(request("GET", f"/compact/{ATTACKED}"))
        with ground.wire() as wire:
            answer = wire.send(backup).answer()
            ground.sent(1)
            if answer is None or answer.status != 200 or answer.body[-1024:] != bytes(1024):
                ground.fault(f"a backup: {answer and (answer.status, len(answer.body))}")


def large_deletes(ground: Ground) -> None:
    """Purges and compactions, again and again, of more than a segment each."""
    body = b"\n".join([os.urandom(500).hex().encode()] * 1_000)
    put = request("POST", f"/in/{ATTACKED}", body,
                  headers=("Content-Type: application/x-ndjson",))
    while True:
        for delete in (("POST", "purge"), ("GET", "compact")):
            for _ in range(20):
                ground.ask(put)
            with ground.wire() as wire:      # half of it, to be copied
                for _ in range(10):
                    wire.take("?max=1000", queue=ATTACKED)
            status = ground.ask(request(delete[0], f"/{delete[1]}/{ATTACKED}"))
            if status != 200:
                ground.fault(f"{delete[1]}: {status}")


# ---- What is done to the server meanwhile ---------------------------------------------------

class Meanwhile(NamedTuple):
    """What the harness itself works with during an attack."""

    server: ServerProcess
    fault: Callable[[str], None]


def pause(meanwhile: Meanwhile) -> None:
    """Stop the process for a second, as a busy or swapping machine does."""
    time.sleep(0.1)
    meanwhile.server.process.send_signal(signal.SIGSTOP)
    time.sleep(PAUSED_S)
    meanwhile.server.process.send_signal(signal.SIGCONT)
    time.sleep(0.3)


PAUSED_S = 1


def exhaust_descriptors(meanwhile: Meanwhile) -> None:
    """Let accept fail for a moment; afterwards a new client must be served soon."""
    server = meanwhile.server
    limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir(f"/proc/{server.pid}/fd"))
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used + 6, limits[1]))
    waiting = [socket.create_connection(("127.0.0.1", server.port), 5) for _ in range(60)]
    time.sleep(0.7)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
    for connection in waiting:
        connection.close()
    if "cannot_accept" not in server.stderr():
        meanwhile.fault("the limit of descriptors did not bite: nothing is proved")
    try:
        server.ask("GET", "/healthz", token="", timeout=ACCEPT_S)
    except OSError as error:
        meanwhile.fault(f"{ACCEPT_S} s after there were descriptors again: {error!r}")


ACCEPT_S = 2.5


def take_threads_away(meanwhile: Meanwhile) -> None:
    """No new thread is to be had from now on."""
    limits = ("prlimit", f"--pid={meanwhile.server.pid}", "--nproc=1:")
    subprocess.run(limits, check=True, **as_somebody())  # root may lack the right
    time.sleep(1.2)


def slow_clients_and_polls(ground: Ground) -> None:
    """What a thread each would be nice for: slow clients, long polls with bytes behind them."""
    held = []
    for number in range(40):
        held.append(ground.connect())
        held[-1].sendall((put_head(10) + b"half",
                          request("GET", f"/out/{ATTACKED}?wait=60") + b"G")[number % 2])
        ground.sent(1)
        time.sleep(0.02)
    data = request("POST", f"/in/{ATTACKED}", b"x")
    Crowd(ground, 4, data, data, answers=1).run()


# ---- The table ------------------------------------------------------------------------------

class Attack(NamedTuple):
    """A row: who attacks, and what is allowed."""

    name: str
    attackers: Sequence[Callable[[Ground], None]]
    settings: Dict[str, Any] = {}
    prepare: Callable[[ServerProcess], None] = lambda server: None
    meanwhile: Callable[[Meanwhile], None] = lambda meanwhile: None
    seconds: Tuple[float, float] = (SHORT_S, LONG_S)
    ends: bool = False           # the first attacker ends by itself, and is waited for
    memory_bytes: Optional[int] = MEMORY_BYTES           # None: as max_inflight_bytes says
    allowed_s: float = 0         # added to the honest client's limit
    stops_under_it: bool = False         # SIGTERM comes while it goes on, in the short mode too
    needs: str = ""              # "somebody": the server runs as a user of its own


def by(*attackers: Callable[[Ground], None], **options: Any) -> Attack:
    """A row that is named as its first attacker."""
    return Attack(attackers[0].__name__.replace("_", " "), attackers, **options)


SLOWLY = {"request_timeout": SLOWLY_S[0]}
ATTACKS = (
    Attack("nothing", ()),
    by(blanks_before_a_control_character),
    by(blanks_within_a_value),
    by(blanks_in_trailers),
    by(blanks_in_chunk_extensions),
    by(long_lines_of_every_kind),
    by(pipelines_without_a_pause, seconds=(1, LONG_S), stops_under_it=True),
    by(pipelines_whose_answers_are_not_read),
    by(bodies_in_chunks_of_one_byte, seconds=(1, LONG_S), memory_bytes=None),
    by(slow_heads_and_bodies),
    by(half_sent_requests, memory_bytes=128 * MIB),
    by(answers_that_nobody_reads, prepare=put_big_messages, memory_bytes=None),
    by(answers_that_are_read_slowly, settings=SLOWLY, prepare=put_big_messages, ends=True,
           memory_bytes=None),
    by(bodies_one_byte_short, seconds=(2, LONG_S), memory_bytes=None),
    by(lines_too_many_to_count, ends=True, memory_bytes=96 * MIB),
    by(resets_at_every_byte, ends=True),
    by(long_polls_that_hang_up, ends=True),
    by(floods_of_connections),
    by(connections_that_never_speak, settings={"max_connections": 100}, stops_under_it=True),
    Attack("no descriptors", (), meanwhile=exhaust_descriptors),
    Attack("no threads", (slow_clients_and_polls,), meanwhile=take_threads_away,
           needs="somebody"),
    Attack("a pause of the whole process", (a_busy_durable_queue,), meanwhile=pause,
           allowed_s=PAUSED_S),
    by(idle_connections, a_busy_durable_queue, settings={"idle_timeout": IDLE_S[0]},
           ends=True),
    by(a_busy_durable_queue, seconds=(1, LONG_S)),
    by(pipelined_puts),
    by(large_uploads, large_uploads, large_uploads, large_uploads),
    by(backups_that_are_read_slowly, prepare=put_big_messages, seconds=(1, LONG_S)),
    by(backups_that_hang_up, large_uploads, prepare=put_big_messages, seconds=(1, LONG_S)),
    by(large_deletes, seconds=(2, LONG_S), stops_under_it=True),
    by(a_thousand_long_polls, seconds=(1, LONG_S), stops_under_it=True),
)


# ---- Runs -----------------------------------------------------------------------------------

class Result(NamedTuple):
    """A line of the table."""

    name: str
    seconds: float
    requests: int
    size: int
    waits: Waits
    resident_bytes: int
    faults: List[str]

    def __str__(self) -> str:
        return (f"{self.name:<40} {self.seconds:5.1f} {self.requests:9,} {self.size / MIB:8,.1f} "
                f"{self.waits.quick * 1e3:8,.0f} {self.waits.put * 1e3:8,.0f} "
                f"{self.waits.sync * 1e3:6,.0f} {self.resident_bytes / MIB:6,.0f}  "
                f"{'FAIL' if self.faults else 'ok'}" +
                "".join(f"\n    {fault}" for fault in self.faults[:5]))


HEADINGS = (f"{'attack':<40} {'s':>5} {'requests':>9} {'MiB sent':>8} {'quick ms':>8} "
            f"{'put ms':>8} {'sync':>6} {'MiB':>6}")


def as_somebody() -> Dict[str, Any]:
    """Return Popen's options to run as a user whose threads nobody else counts to."""
    return {"user": SOMEBODY} if os.geteuid() == 0 else {}


class Battle:
    """One attack on one server."""

    def __init__(self, attack: Attack, fsync: str, options: argparse.Namespace,
                 limit_s: float) -> None:
        self._attack, self._fsync, self._options, self._limit_s = attack, fsync, options, limit_s
        self._seconds = attack.seconds[options.long]
        self._faults: List[str] = []
        self._attackers: List[Tuple[Any, Ground]] = []
        self._told, self._over = processes.SimpleQueue(), processes.RawValue("b", 0)

    def run(self) -> Result:
        started = time.monotonic()
        folder = tempfile.mkdtemp(prefix="attack-", dir=ATTACK_DIR)
        waits, resident = Waits(0, 0, 0, 0, []), 0
        with self._server(folder) as server:
            try:
                server.wait_ready()
                self._attack.prepare(server)
                waits, resident = self._fight(server, folder)
                self._end(server)
            except (Fault, OSError) as fault:
                self._faults.append(f"{fault!r}")
            finally:
                self._call_off()
        while not self._told.empty():
            self._faults.append(self._told.get())
        if self._faults:
            self._faults.append(f"its folder is {folder}")
        else:
            shutil.rmtree(folder)
        sent = [sum(column) for column in zip(*(ground.tally for _, ground in self._attackers))]
        return Result(f"{self._attack.name} ({self._fsync})", time.monotonic() - started,
                      *(sent or (0, 0)), waits, resident, self._faults)

    def _server(self, folder: str) -> ServerProcess:
        settings = {"fsync": self._fsync, "min_free_bytes": 0, "max_connections": 2_000,
                    **({"max_inflight_bytes": INFLIGHT_BYTES} if self._options.inflight else {}),
                    **self._attack.settings}
        if not self._attack.needs:
            return ServerProcess(folder, settings=settings)
        path, server = os.path.join(folder, "data"), os.path.join(folder, "micro_queue.py")
        os.chmod(folder, 0o755)
        os.mkdir(path)
        shutil.copy(SERVER, server)          # to where another user may read it
        if os.geteuid() == 0:
            os.chown(path, SOMEBODY, SOMEBODY)
        limits = {resource.RLIMIT_NPROC: HARD_THREADS} if os.geteuid() == 0 else None
        return ServerProcess(folder, path, settings=settings, program=(server,), limits=limits,
                             python=self._options.python, **as_somebody())

    def _fight(self, server: ServerProcess, folder: str) -> Tuple[Waits, int]:
        """Let the honest client work, attack, and judge; return its waits and the memory."""
        with self._honest(server, folder) as pipe:
            resident, threads = resident_peak(server), server.thread_count()
            for number, function in enumerate(self._attack.attackers):
                self._send(function, server, number)
            until = time.monotonic() + self._seconds
            self._attack.meanwhile(Meanwhile(server, self._faults.append))
            most = max(self._watch(server, until), threads)
            if self._attack.ends:
                self._attackers[0][0].join(FINITE_S)
                if self._attackers[0][0].is_alive():
                    self._faults.append(f"the attack did not end within {FINITE_S} s")
            pipe.send("stop")
            if not pipe.poll(2 * self._patience_s + 10):
                raise Fault("the honest client does not end")
            waits = pipe.recv()
        peak = resident_peak(server)
        self._judge(waits, peak - resident, most - threads)
        return waits, peak

    @property
    def _patience_s(self) -> float:
        return PATIENCE_S[self._options.long]

    @contextlib.contextmanager
    def _honest(self, server: ServerProcess, folder: str) -> Iterator[Any]:
        pipe, other = processes.Pipe()
        honest = Honest(server.port, folder, self._patience_s, self._fsync == "always")
        process = processes.Process(target=honest.run, args=(other,))
        process.start()
        try:
            if not pipe.poll(self._patience_s * 2):
                raise Fault("the honest client is not served, before any attack")
            pipe.recv()
            yield pipe
        finally:
            process.kill()
            process.join()

    def _send(self, function: Callable[[Ground], None], server: ServerProcess,
              number: int) -> None:
        ground = Ground(server.port, self._options.long, self._limit_s,
                        f"{self._options.seed}-{self._attack.name}-{number}", self._told,
                        self._over)
        process = processes.Process(target=attacker, args=(function, ground))
        process.start()
        self._attackers.append((process, ground))

    def _watch(self, server: ServerProcess, until: float) -> int:
        """Wait; return the most threads that the server had."""
        most = server.thread_count()
        while time.monotonic() < until and server.process.poll() is None:
            time.sleep(0.02)
            most = max(most, server.thread_count())
        return most

    def _judge(self, waits: Waits, memory_bytes: int, threads: int) -> None:
        limit_s, found = self._limit_s + self._attack.allowed_s, self._faults
        put_limit_s = limit_s + (SYNCS * waits.sync if self._fsync == "always" else 0)
        if waits.quick > limit_s:
            found.append(f"late: an answer took {waits.quick:.2f} s, not {limit_s:.2f} s")
        if waits.put > put_limit_s:
            found.append(f"late: a put took {waits.put:.2f} s, not {put_limit_s:.2f} s")
        found += waits.faults
        bound = self._attack.memory_bytes
        if bound is None:
            bound = MEMORY_BYTES + (INFLIGHT_BYTES if self._options.inflight
                                    else DEFAULT_INFLIGHT_BYTES)
        if memory_bytes > bound:
            found.append(f"{memory_bytes / MIB:,.0f} MiB more memory, not {bound / MIB:,.0f}")
        if threads > THREADS:
            found.append(f"{threads} more threads, not {THREADS}")

    def _end(self, server: ServerProcess) -> None:
        """Stop the server; in the long mode always while the attack goes on."""
        if not (self._attack.stops_under_it or self._options.long):
            self._call_off()
        self._over.value, started = 1, time.monotonic()
        status = server.stop(signal.SIGTERM, END_S)
        if status != 0:
            raise Fault(f"status {status} after SIGTERM, after {time.monotonic() - started:.1f} s: "
                        f"{server.stderr()[-500:]}")
        server.check_log()

    def _call_off(self) -> None:
        for process, _ in self._attackers:
            process.kill()
        for process, _ in self._attackers:
            process.join()


def attacker(function: Callable[[Ground], None], ground: Ground) -> None:
    """Attack, in a process of its own. That a server which has ended breaks connections is no
    fault of it: the honest client and the exit status tell why it did."""
    signal.alarm(ATTACKER_S)
    os.nice(NICE)
    try:
        function(ground)
    except OSError:
        pass
    except Exception:
        ground.fault(traceback.format_exc())


def resident_peak(server: ServerProcess) -> int:
    """Return the most memory that the process had so far."""
    with open(f"/proc/{server.pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * KIB for line in file if line.startswith("VmHWM"))


def knows_inflight() -> bool:
    """Tell whether the server has max_inflight_bytes."""
    with tempfile.TemporaryDirectory(prefix="attack-") as folder, ServerProcess(
            folder, settings={"max_inflight_bytes": INFLIGHT_BYTES},
            program=(SERVER, "--check")) as server:
        return server.wait_end() == 0


def python_for_somebody() -> str:
    """Return a Python that another user may run, "" if there is none."""
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            code = "import sys; sys.exit(sys.version_info < (3, 9))"
            if subprocess.run([python, "-c", code], check=False, cwd="/",
                              **as_somebody()).returncode == 0:
                return python
    return ""


def run_all(options: argparse.Namespace) -> List[Result]:
    limit_s = LONG_LIMIT_S if options.long else SHORT_LIMIT_S
    results = []
    for fsync in ("always", "no") if options.long else ("always",):
        for attack in ATTACKS:
            named = not options.only or any(word in attack.name for word in options.only)
            if attack.name != "nothing" and not named:
                continue
            if attack.needs and not (options.python and shutil.which("prlimit")):
                print(f"skipped: {attack.name}: no Python that another user may run, or no prlimit")
                continue
            results.append(Battle(attack, fsync, options, limit_s).run())
            print(results[-1], flush=True)
            if attack.name == "nothing" and not options.long:
                waits = results[-1].waits
                limit_s = max(limit_s, SHORT_FACTOR * max(waits.quick, waits.put))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="longer, and with fsync no too")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", action="append", metavar="NAME",
                        help="attacks whose name has this in it; repeatable")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20_000) if hard > 0 else 20_000, hard))
    options.inflight, options.python = knows_inflight(), python_for_somebody()
    print(f"attack: seed {options.seed}\n{HEADINGS}", flush=True)
    started = time.monotonic()
    results = run_all(options)
    failed = sum(bool(result.faults) for result in results)
    print(f"attack: {len(results)} attacks in {time.monotonic() - started:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
