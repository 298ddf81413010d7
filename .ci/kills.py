#!/usr/bin/env python3
"""Kill a queue at every system call that changes its folder, and fail each such call once.

    python3 .ci/kills.py                             # a sample of the calls: half a minute
    python3 .ci/kills.py --long                      # a larger one, some minutes
    python3 .ci/kills.py --every                     # every call of every scenario, an hour
    python3 .ci/kills.py --only cleaning:rename:2    # one case again, with its --seed

A worker drives a queue of the library, with segments of some messages, and tells each step
before and after it. `strace` kills it at the N-th call of a name, or has that call fail; a kill
leaves the page cache, so what was told must be there for the next start. Then the folder is
opened, drained and judged by the tests' Ledger; what was accepted must also have been synced, as
the calls tell; and in the end nothing but an empty queue's files may be left. The last part does
the same to a server process. The worker is forked from here and strace attaches to it, so that
no interpreter starts for a kill, and calls are counted from the worker's first.

Needs Python 3.9, Linux, root and `strace`. Folders are made in KILLS_DIR (default /dev/shm);
some scenarios take a tmpfs for a disk on which files get room ahead, with --long each does both.
Exit code: 0 all good, or skipped; 1 a fault, its folder is kept; 2 usage.
"""
import argparse
import collections
import contextlib
import itertools
import json
import logging
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, NoReturn, Optional, Set, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import micro_queue as mq  # noqa: E402
from test_micro_queue import (  # noqa: E402
    LATE_S, QUEUE, SMALL, Client, FakeClock, Fault, Ledger, ServerProcess, compact, count_faults,
    drain, flipped, together, upkeep)

KILLS_DIR = os.environ.get("KILLS_DIR", "/dev/shm" if os.path.isdir("/dev/shm") else None)
HOUR_S, DAY_MS = 3600, 86_400_000
TIMEOUT_S = 60                   # a worker or server that hangs for so long is a fault
SAMPLE, SAMPLE_LONG = 2, 3       # calls of a name that are harmed, in a scenario
ERRORS_SHORT = 6                 # kinds of errors that the short mode makes, once a scenario
NESTED, NESTED_LONG = 1, 2       # first kills, of a scenario, whose recovery is killed too,
AGAIN, AGAIN_LONG = 4, 12        # at so many calls
GAVE_UP, FAILED = 3, 4           # exit codes, as the server's

WITH_ROOM = mq.ROOM_KINDS

# What a call may be named on this machine; strace ignores an unknown name behind a "?".
CALLS = {"pwrite64": "pwrite64", "fdatasync": "fdatasync", "fsync": "fsync",
         "ftruncate": "ftruncate", "fallocate": "fallocate", "openat": "openat",
         "rename": "?rename,?renameat,?renameat2",
         "unlink": "?unlink,?unlinkat", "link": "?link,?linkat", "mkdir": "?mkdir,?mkdirat",
         "pread64": "pread64"}
KILLED = [call for call in CALLS if call != "pread64"]   # that changes nothing, and only fails
ERRORS = [("fdatasync", "EIO"), ("fsync", "EIO"), ("pwrite64", "EIO"), ("pwrite64", "ENOSPC"),
          ("ftruncate", "EIO"), ("ftruncate", "ENOSPC"), ("fdatasync", "ENOSPC"),
          ("fsync", "ENOSPC"), ("rename", "EIO"), ("rename", "ENOSPC"), ("openat", "ENOSPC"),
          ("openat", "EMFILE"), ("link", "EIO"), ("link", "ENOSPC"), ("unlink", "EIO"),
          ("mkdir", "ENOSPC"), ("fallocate", "ENOSPC"), ("fallocate", "EIO"), ("pread64", "EIO")]
LACKING = ("pwrite64", "ENOSPC"), ("fallocate", "ENOSPC"), ("openat", "ENOSPC"), (
    "openat", "EMFILE"), ("rename", "ENOSPC"), ("link", "ENOSPC"), ("mkdir", "ENOSPC")

Step = Tuple[Any, ...]           # ("accepted", payload, id): a call of the Ledger, or see replay


class Injection(NamedTuple):
    """What strace does to the `number`-th call of a name that a thread makes."""

    call: str
    number: int
    effect: str                  # "kill", or the error's name

    def options(self) -> List[str]:
        effect = "signal=SIGKILL" if self.effect == "kill" else f"error={self.effect}"
        return ["-e", f"inject={CALLS[self.call]}:{effect}:when={self.number}"]


# ---- The worker ---------------------------------------------------------------------------
# What runs in the process that is killed: verbs on a queue, each told before and after it.

def payload_of(number: int) -> bytes:
    """Return the message of a number: its name, then up to some hundred bytes."""
    return b"<%d>" % number + b"x" * (number * 37 % 200)


def nothing(*_: object) -> None:
    pass


class Worker:
    """Drives the queue in `folder`; `tell` gets every step at once."""

    def __init__(self, folder: str, tell: Callable[..., None], first: int) -> None:
        self.folder, self.tell = folder, tell
        self._numbers = itertools.count(first)
        self.ready = False

    def next_payload(self) -> bytes:
        return payload_of(next(self._numbers))

    def open(self) -> None:
        self.ready = False
        self.queue = open_queue(self.folder)
        self.ready = True

    def put(self, times: int = 1, *, count: int = 1, delay_s: int = 0) -> None:
        """Put `times` times `count` messages at once."""
        for _ in range(times):
            payloads = [self.next_payload() for _ in range(count)]
            for payload in payloads:
                self.tell("sending", payload)
            try:
                first = self.queue.put(payloads, delay_s)
            except (mq.DiskFull, mq.ApiError) as error:
                if isinstance(error, mq.ApiError) and error.status != 503:
                    raise
                for payload in payloads:
                    self.tell("refused", payload)
            else:
                for number, payload in enumerate(payloads):
                    self.tell("accepted", payload, first + number)

    def take(self, consumer: str, wish: mq.Wish = mq.ONE) -> Optional[mq.Delivery]:
        delivery = self.queue.take(wish=wish)
        for message, count in zip(delivery.messages, delivery.counts) if delivery else ():
            self.tell("delivered", consumer, message.payload, message.id, count)
        return delivery

    def settle(self, consumer: str, delivery: Optional[mq.Delivery]) -> None:
        """Settle; on a full disk memory alone may know it until a snapshot ended well."""
        if delivery:
            self.tell("settling", consumer)
            if delivery.lease is None:
                self.queue.settle(delivery)
            else:
                self.queue.ack(mq.FIFO, delivery.lease)
            self.tell("unsure" if self.queue.owed else "settled", consumer)

    def give_back(self, consumer: str, delivery: Optional[mq.Delivery], delay_s: int = 0) -> None:
        if delivery:
            if delivery.lease is None:
                self.queue.retry(delivery)
            else:
                self.queue.nack(mq.FIFO, delivery.lease, delay_s)
            self.tell("returned", consumer)

    def consume(self, times: int, consumer: str = "main") -> None:
        for _ in range(times):
            self.settle(consumer, self.take(consumer))

    def consume_in_disorder(self) -> None:
        """Have five out at once, in the end on leases: settle the third and the first, give the
        others back."""
        out = [(f"hand{number}", self.take(f"hand{number}", mq.Wish(lease_s=HOUR_S * (number > 1))))
               for number in range(5)]
        self.settle(*out[2])
        self.give_back(*out[1])
        self.settle(*out[0])
        self.give_back(*out[3], HOUR_S)
        self.give_back(*out[4])

    def upkeep(self, meanwhile: Callable[[], None] = nothing) -> None:
        """Do what upkeep does each second, and other things between its steps."""
        self.queue.prepare()
        for _ in self.queue.upkeep():
            meanwhile()

    def snapshot(self, meanwhile: Callable[[], None] = nothing) -> None:
        for _ in self.queue.snapshot():
            meanwhile()

    def compact(self, meanwhile: Callable[[], None] = nothing) -> None:
        try:
            for _ in self.queue.compact():
                meanwhile()
        except mq.CompactionFailed as error:
            self.tell("not compacted", str(error))

    def turns(self, count: int) -> Callable[[], None]:
        """Return what does something else each time, `count` times at most."""
        return some(itertools.cycle((
            lambda: self.put(2), lambda: self.consume(1), self.queue.prepare,
            lambda: self.put(count=3), self.consume_in_disorder)), count)

    def purge(self) -> None:
        self.tell("dropping")
        self.queue.purge()
        self.queue.log.sync_marks()
        if not self.queue.owed:
            self.tell("dropped")

    def lose_files(self, *names: str) -> None:
        """Take files away from the queue; `judge` brings back what it did not write again."""
        if not names:
            try:
                names = tuple(os.listdir(self.folder))
            except OSError:                  # the injected error was for this call
                names = tuple(os.listdir(self.folder))
        for name in names:
            with contextlib.suppress(OSError):           # missing, or the call that fails here
                os.replace(os.path.join(self.folder, name), self.folder + ".lost-" + name)

    def close(self) -> None:
        if not self.queue.close():
            self.tell("owing")
        self.ready = False

    def let_go(self) -> None:
        """End as a kill does: nothing more is written."""
        self.queue.log.close()
        self.tell("killed")

    def prove_dead(self) -> None:
        """Once a log failed every later call must raise LogFailed too."""
        log = self.queue.log
        mark = mq.Mark(mq.SETTLED, mq.FIFO, 1, 1, log.tail)
        for call in (lambda: log.append([(1, 1, 0, b"dead")]), log.sync, log.sync_marks,
                     lambda: log.mark([mark], nothing), lambda: log.wait_durable(log.appends + 1)):
            with contextlib.suppress(mq.LogFailed):
                call()
                self.tell("odd", "a call succeeded after LogFailed")

    def run(self, work: Callable[["Worker"], None]) -> int:
        """Do the work; return the exit code that the server would end with."""
        try:
            work(self)
        except mq.LogFailed:
            if self.ready:
                self.prove_dead()
            return FAILED
        except (mq.StorageError, mq.DiskFull, mq.ApiError, OSError):
            if self.ready:                   # only a start may end so
                self.tell("odd", traceback.format_exc())
            return GAVE_UP
        except BaseException:
            self.tell("odd", traceback.format_exc())
            return 1
        return 0


def open_queue(folder: str, clock: Optional[mq.Clock] = None) -> mq.Queue:
    queue = mq.Queue(mq.QueueConfig(name="q"), folder, clock=clock)
    try:
        queue.log.lock()
        queue.recover()
    except BaseException:
        queue.log.close()
        raise
    return queue


def some(turns: Iterator[Callable[[], None]], count: int) -> Callable[[], None]:
    """Return what does the next of `turns` when called, `count` times at most."""
    todo = itertools.chain(itertools.islice(turns, count), itertools.repeat(nothing))
    return lambda: next(todo)()


def make_loops_short() -> None:
    """Have a small folder go through every loop that large ones go through."""
    for name, value in {**SMALL, "LOG_CHUNK_BYTES": 512, "MIB": 300}.items():
        setattr(mq, name, value)             # MIB: a batch of a takeover


# ---- Scenarios ----------------------------------------------------------------------------
# `prepare` makes the folder and is not harmed; `work` is.

class Scenario(NamedTuple):
    name: str
    prepare: Callable[[Worker], None]
    work: Callable[[Worker], None]
    damaged: bool = False
    fills_disk: bool = False
    room: bool = False                       # files get room ahead


def first_start(worker: Worker) -> None:
    """All that a queue can do, from an empty folder to a clean stop and another start."""
    worker.open()
    worker.put(4)
    worker.put(count=3)
    worker.consume(2)
    worker.put(3)
    worker.consume_in_disorder()
    worker.put(delay_s=HOUR_S)
    held = worker.take("holder")
    worker.snapshot()
    worker.put(2)
    worker.consume(1)
    worker.upkeep()
    worker.settle("holder", held)
    worker.put(2)
    worker.consume_in_disorder()
    worker.consume(1)
    worker.compact()
    worker.put(1)
    worker.close()
    worker.open()
    worker.put(1)
    worker.consume(2)
    worker.close()


def threads(worker: Worker) -> None:
    """Puts share syncs; takes, snapshots and cleanings go on meanwhile."""
    worker.open()
    together(lambda: worker.put(9), lambda: worker.put(5, count=2),
             lambda: worker.put(9), lambda: worker.consume(12, "thread"))
    together(lambda: worker.put(9), lambda: worker.consume(9, "thread"),
             lambda: [worker.upkeep(), worker.snapshot(), worker.compact()])
    worker.close()


def used(worker: Worker) -> None:
    """A folder of several segments, with a snapshot, and with marks and messages of every kind
    before and behind it."""
    worker.open()
    worker.put(12)
    worker.consume(3)
    worker.consume_in_disorder()
    worker.upkeep()
    worker.put(6)
    worker.upkeep()
    worker.put(delay_s=HOUR_S)
    worker.snapshot()
    worker.put(8)
    worker.queue.prepare()
    worker.consume(7)
    worker.consume_in_disorder()
    worker.put(4)
    worker.let_go()


def used_and_damaged(worker: Worker) -> None:
    """Besides: damage where a settled message stands, a put that nobody answered and that is
    damaged, and another of which only half was written."""
    used(worker)
    worker.open()
    worker.put(1)
    worker.consume(1)
    for _ in range(2):
        payload = worker.next_payload()
        worker.tell("sending", payload)
        worker.queue.put([payload])
        worker.queue.prepare()
        worker.put(1)
    queue = worker.queue
    log, subscription = queue.log, queue.state.subscriptions[mq.FIFO]
    there = list(messages_of(log))
    settled = [message for message in there if message.id < subscription.cursor_id
               and message.id not in subscription.entries]
    for message in (settled[0], settled[-1], there[-4]):
        segment = log.segments[message.offset >> mq.SEGMENT_SHIFT]
        flip_byte(log.file(segment.name),
                  (message.offset & mq.POSITION_MASK) + message.size - 1)
    torn = worker.next_payload()
    worker.tell("sending", torn)
    data = log.codec.encode([(queue.state.next_id, 1, 0, torn)], log.tail)[0]
    os.pwrite(log.current.fd, data[:len(data) // 2], log.current.end)
    worker.let_go()


def messages_of(log: mq.Log) -> Iterator[mq.Message]:
    offset, after = -1, 0
    while after != offset:
        offset = after
        messages, after = log.read(offset, log.tail)
        yield from messages


def used_damaged_and_without_marks(worker: Worker) -> None:
    used_and_damaged(worker)
    os.unlink(os.path.join(worker.folder, mq.META_NAME))
    worker.tell("forgotten")


def flip_byte(path: str, offset: int) -> None:
    with open(path, "r+b") as file:
        data = flipped(file.read(), offset)
        file.seek(0)
        file.write(data)


def go_on(worker: Worker) -> None:
    """Start, and do a little of everything."""
    worker.open()
    worker.put(2)
    worker.consume(2)
    worker.consume_in_disorder()
    worker.upkeep()
    worker.compact()
    worker.put(1)
    worker.consume(1)
    worker.close()


def rotation(worker: Worker) -> None:
    """Go from segment to segment, with the next one ready and without, and free them."""
    worker.open()
    for turn in range(5):
        worker.put(3)
        if turn != 2:
            worker.queue.prepare()
        worker.put(count=3)
        worker.consume(4)
    worker.upkeep()
    worker.consume(99)
    worker.upkeep(worker.turns(4))
    worker.put(1)
    worker.close()


def cleaning(worker: Worker) -> None:
    """Free segments that are dead, and copy out of others, while others put and take."""
    worker.open()
    held = worker.take("holder")
    for _ in range(3):
        worker.put(5)
        worker.consume_in_disorder()
        worker.consume(2)
        worker.upkeep(worker.turns(6))
    worker.give_back("holder", held, HOUR_S)
    worker.consume(8)
    worker.upkeep(worker.turns(3))
    worker.consume(99)
    worker.upkeep()
    worker.close()


def snapshots(worker: Worker) -> None:
    """Others go on between the steps of a snapshot."""
    worker.open()
    for _ in range(3):
        worker.put(3)
        worker.snapshot(worker.turns(9))
        worker.consume(3)
    worker.close()


def compaction(worker: Worker) -> None:
    """Free all that can be freed while others put and take, more than once."""
    worker.open()
    worker.put(6, count=2)
    worker.consume(4)
    held = worker.take("holder")
    worker.compact(worker.turns(10))
    worker.put(1)
    worker.consume(1)
    worker.give_back("holder", held)
    worker.compact(worker.turns(10))
    worker.consume(99)
    worker.put(4)
    worker.compact(worker.turns(10))
    worker.close()


def purge(worker: Worker) -> None:
    """Drop all, with messages in someone's hands; a purge that was told holds."""
    worker.open()
    held = worker.take("holder", mq.Wish(lease_s=HOUR_S))
    worker.purge()
    worker.put(3)
    worker.upkeep(worker.turns(3))
    worker.put(2, delay_s=HOUR_S)
    worker.purge()
    with contextlib.suppress(mq.ApiError):   # 410: the purge ended the lease
        worker.settle("holder", held)
    worker.put(2)
    worker.consume(1)
    worker.close()


def lost_files(worker: Worker) -> None:
    """Somebody takes files away under the queue: a sealed one, the first, the current one, the
    one that is ready, the marks, all, and the folder."""
    worker.open()
    worker.put(4)
    worker.queue.prepare()
    log = worker.queue.log
    for names in ([list(log.segments.values())[-2].name], [mq.LOG_NAME], [log.current.name],
                  [log.ready.name] if log.ready else [], [mq.META_NAME], []):
        worker.lose_files(*names)
        worker.put(1)
        worker.upkeep(worker.turns(2))
        worker.put(2)
        worker.consume(1)
    worker.upkeep()
    worker.close()


def go_server(worker: Worker) -> None:
    """What the Go server leaves: the first two messages are behind its head, one is empty."""
    payloads = [worker.next_payload() for _ in range(14)]
    for payload in payloads:
        worker.tell("sending", payload)
    for payload in payloads[:2]:
        worker.tell("refused", payload)
    for number, payload in enumerate(payloads[2:], 1):
        worker.tell("accepted", payload, number)
    payloads.insert(5, b"")
    items = [struct.pack(">Q", len(payload)) + payload for payload in payloads]
    os.makedirs(worker.folder)
    with open(os.path.join(worker.folder, mq.LOG_NAME), "wb") as file:
        file.write(b"".join(items))
    with open(os.path.join(worker.folder, mq.META_NAME), "w", encoding="ascii") as file:
        json.dump({"head_offset": len(items[0] + items[1]), "tail_offset": len(b"".join(items))},
                  file)


def full_disk(worker: Worker) -> None:
    """A limit of a file's size is a disk that takes a part of a write, and then nothing."""
    worker.open()
    for room in (1, 45, 60, 350):
        worker.put(1)
        delivery = worker.take("full")
        with limited_file_size(worker.queue.log.current.end + room):
            worker.put(count=3)
            worker.settle("full", delivery)
            worker.put(count=3)
            worker.upkeep()
            worker.compact()
        worker.put(1)
        worker.upkeep()
        worker.compact()
        worker.consume(1)
    worker.close()


@contextlib.contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


SCENARIOS = [
    Scenario("first-start", nothing, first_start, room=True),
    Scenario("threads", nothing, threads),
    Scenario("recovery", used_and_damaged, go_on, damaged=True),
    Scenario("recovery-without-marks", used_damaged_and_without_marks, go_on, damaged=True),
    Scenario("rotation", nothing, rotation, room=True),
    Scenario("cleaning", used, cleaning),
    Scenario("snapshots", used, snapshots, room=True),
    Scenario("compaction", used, compaction),
    Scenario("purge", used, purge),
    Scenario("lost-files", used, lost_files),
    Scenario("takeover", go_server, go_on, room=True),
    Scenario("full-disk", used, full_disk, fills_disk=True),
]


# ---- Running under strace -----------------------------------------------------------------

class Outcome(NamedTuple):
    """How a worker ended: `status` is its exit code, or minus the signal."""

    status: int
    steps: List[Step]
    calls: List[str]             # strace's lines


class Strace:
    """strace, attached to a process and its threads; calls are counted from then on."""

    def __init__(self, pid: int, output: str, injection: Optional[Injection]) -> None:
        self._output = output
        names = ",".join(CALLS.values())
        self._process = subprocess.Popen(
            ["strace", "-f", "-y", "-s", "4000", "-o", output, "-e", f"trace={names}",
             "-e", "signal=none", *(injection.options() if injection else ()), "-p", str(pid)],
            stderr=subprocess.PIPE)
        assert self._process.stderr is not None
        said = self._process.stderr.readline()
        if b"attached" not in said:
            raise Skipped(f"the kernel does not let strace attach: {said.decode().strip()}")

    def lines(self) -> List[str]:
        """Wait for the end of what is traced; return the calls."""
        self._process.communicate(timeout=TIMEOUT_S)
        with open(self._output, encoding="latin-1") as file:
            return file.read().splitlines()


class Skipped(Exception):
    """This machine cannot run the harness."""


def run_worker(work: Callable[[Worker], None], folder: str, first: int,
               injection: Optional[Injection]) -> Outcome:
    """Fork a worker, attach strace, let it work, and collect what it told."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        ours.close()
        be_worker(work, folder, first, theirs)
    theirs.close()
    steps: List[Step] = []
    with ours:
        ours.settimeout(TIMEOUT_S)
        try:
            strace = Strace(pid, folder + ".strace", injection)
            ours.send(b"go")
            for data in iter(lambda: ours.recv(1 << 20), b""):
                steps.append(pickle.loads(data))
        except socket.timeout:
            os.kill(pid, signal.SIGKILL)
            steps.append(("odd", f"the worker hung for {TIMEOUT_S} s"))
        status = os.waitpid(pid, 0)[1]
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Outcome(code, steps, strace.lines())


def be_worker(work: Callable[[Worker], None], folder: str, first: int,
              told: socket.socket) -> NoReturn:
    code = 1
    try:
        if told.recv(2):
            worker = Worker(folder, lambda *step: told.send(pickle.dumps(step)), first)
            code = worker.run(work)
    finally:
        os._exit(code)


CALL = re.compile(r"(\d+) +(\w+)\((?:(\d+)<([^>]*)>)?")
RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>")
NAME = re.compile(r"<(\d+)>")


def count_calls(lines: List[str], call: str) -> int:
    """Return how often the thread that makes a call most often makes it."""
    names = CALLS[call].replace("?", "").split(",")
    found = (CALL.match(line) for line in lines)
    counts = collections.Counter(match[1] for match in found if match and match[2] in names)
    return max(counts.values(), default=0)


def synced_names(lines: List[str]) -> Set[int]:
    """Return the numbers of the messages whose write a good sync of that file followed."""
    written: Dict[str, Set[int]] = collections.defaultdict(set)
    under_way: Dict[str, Set[int]] = {}      # by thread: what its write or sync is about
    synced: Set[int] = set()
    for line in lines:
        start, end = CALL.match(line), RESUMED.match(line)
        match = start or end
        if not match:
            continue
        thread, call, file = match[1], match[2], start[4] if start else ""
        if start and call == "pwrite64":
            numbers = {int(number) for number in NAME.findall(line, start.end())}
            written[file] |= numbers
        elif start and call in ("fdatasync", "fsync"):
            under_way[thread] = set(written[file])
        if call in ("fdatasync", "fsync") and re.search(r"\) += 0$", line):
            synced |= under_way.pop(thread, set())
    return synced


# ---- Judging ------------------------------------------------------------------------------

def replay(steps: List[Step]) -> Ledger:
    """Enter steps into a new ledger. What was out, and not about to be settled, when a worker
    was killed, is known to be back. What is not sure to be settled stays open for ever: its
    consumer goes on under another name."""
    ledger = Ledger(LATE_S)
    out: Set[str] = set()
    seen: Set[bytes] = set()
    unsure: Dict[str, int] = collections.Counter()
    for verb, *arguments in steps:
        if verb in ("delivered", "settling", "settled", "unsure", "returned"):
            consumer = arguments[0]
            arguments[0] += "'" * unsure[consumer]
            unsure[consumer] += verb == "unsure"
        if verb == "delivered":
            out.add(arguments[0])
            seen.add(arguments[1])
        elif verb in ("settling", "returned"):
            out.discard(arguments[0])
        if verb == "killed":
            for consumer in out:
                ledger.returned(consumer)
            out.clear()
            ledger.fault(power_cut=False)
        elif verb == "forgotten":            # what was settled may come again
            ledger.moved(seen)
        elif verb == "odd":
            raise Fault(arguments[0])
        elif verb not in ("settling", "unsure", "not compacted", "owing"):
            getattr(ledger, verb)(*arguments)
    return ledger


def take_all(folder: str, ledger: Ledger, damaged: bool) -> mq.Queue:
    """Open a folder a day later and take all that is there."""
    clock = FakeClock()
    clock.wall = int(time.time() * 1000) + DAY_MS
    queue = open_queue(folder, clock)
    drain(queue, ledger=ledger)
    if queue.log.corrupt_records and not damaged:
        ledger.note(f"corrupt: {queue.log.corrupt_records} damaged records")
    return queue


KNOWN = re.compile(r"(data(\.\d+)?\.log|meta\.json)"
                   r"(\.legacy|\.(corrupt|unreadable)-[0-9a-f]+(-\d+)?)?")
LEFT_FILES = 4                   # of an empty queue: the first, the current, the next one, marks


def judge(folder: str, steps: List[Step], damaged: bool) -> List[str]:
    """Return the faults that show in a folder after what was told, over three more starts."""
    bring_back(folder)
    ledger = replay([*steps, ("killed",)])
    for turn in range(2):
        queue = take_all(folder, ledger, damaged)
        late = b"late %d" % turn             # a reused id or a stale tail shows only now
        ledger.sending(late)
        ledger.accepted(late, queue.put([late]))
        queue.log.close()
        ledger.fault(power_cut=False)
    queue = take_all(folder, ledger, damaged)
    upkeep(queue)
    compact(queue)
    queue.close()
    names = os.listdir(folder)
    found = [f"left behind: {name}" for name in names if not KNOWN.fullmatch(name)]
    ours = [name for name in names if mq.SEGMENT_NAME.fullmatch(name) or name in (
        mq.LOG_NAME, mq.META_NAME)]
    if len(ours) > LEFT_FILES:
        found.append(f"not freed: {sorted(ours)}")
    return ledger.faults() + found


def bring_back(folder: str) -> None:
    """Put files that were taken away back, as an operator would, where none is in their place."""
    for path in lost_files_of(folder):
        os.makedirs(folder, exist_ok=True)
        target = os.path.join(folder, path[len(folder + ".lost-"):])
        if os.path.exists(target):
            os.unlink(path)
        else:
            os.rename(path, target)


def lost_files_of(folder: str) -> List[str]:
    parent = os.path.dirname(folder)
    return [os.path.join(parent, name) for name in os.listdir(parent)
            if name.startswith(os.path.basename(folder) + ".lost-")]


def check_synced(outcome: Outcome) -> List[str]:
    """Return the messages that were accepted although no sync covered them."""
    synced = synced_names(outcome.calls)
    accepted = [step[1] for step in outcome.steps if step[0] == "accepted"]
    return [f"answered before its sync: {payload[:40]!r}" for payload in accepted
            if int(NAME.match(payload.decode())[1]) not in synced]


def check_error(injection: Injection, outcome: Outcome) -> List[str]:
    """Return what is wrong with how a worker ended after a call failed."""
    places = [number for number, line in enumerate(outcome.calls) if "(INJECTED)" in line]
    if not places:
        return [] if outcome.status == 0 else [f"exit {outcome.status} without an error"]
    found = []
    if outcome.status not in (0, GAVE_UP, FAILED):
        found.append(f"exit {outcome.status} after {injection.effect}")
    files = {at: file_of(outcome.calls, at) for at in places}
    line = outcome.calls[places[-1]][:200]
    if (injection.call, injection.effect) in LACKING and outcome.status == FAILED:
        found.append(f"ended for want of something: {line}")
    if (injection.call == "pread64" and outcome.status == FAILED
            and not any(map(is_marks, files.values()))):
        found.append(f"ended because of bytes that cannot be read: {line}")
    if injection.call in ("fdatasync", "fsync") or injection[::2] == ("pwrite64", "EIO"):
        fatal = [at for at in places if not was_given_up(outcome.calls[at + 1:], files[at])]
        if fatal and outcome.status == 0:
            found.append(f"went on after {injection.effect}: {outcome.calls[fatal[0]][:200]}")
        elif fatal:
            found += touched_again(injection, outcome.calls, fatal[0])
    return found


def touched_again(injection: Injection, calls: List[str], at: int) -> List[str]:
    failed = whose_call(calls, at)
    thread = failed[1] if failed else ""
    touched = [line for line in calls[at + 1:] if touches_log(line, thread)]
    if injection.call != "fdatasync" and touched and is_sync_of_another(touched[0], thread):
        del touched[0]           # on its way as well; but after a failed sync there is none
    return [f"touched the failed log again: {line[:200]}" for line in touched]


def file_of(calls: List[str], at: int) -> str:
    """Return the file of the call that ends in line `at`."""
    started = whose_call(calls, at)
    return (started[4] or "") if started else ""


def is_marks(path: str) -> bool:
    return os.path.basename(path).startswith(mq.META_NAME)


def marks_were_unread(calls: List[str]) -> bool:
    """Tell whether marks could not be read: then what was settled comes again."""
    return any("(INJECTED)" in line and "pread64" in line and is_marks(file_of(calls, at))
               for at, line in enumerate(calls))


def was_given_up(lines: List[str], path: str) -> bool:
    """Tell whether the file of a call that failed was removed, or holds only what was damaged:
    a segment that was being made, a file that was being written again; or whether it is a
    folder, in which such a file was being made."""
    if ".corrupt-" in path:
        return True
    name = re.escape(os.path.basename(path))
    removed = re.compile(rf'unlink(at)?\(.*/({name}|data\.[^/"]*)"')
    return any(removed.search(line) for line in lines[:8])


def is_sync_of_another(line: str, thread: str) -> bool:
    match = CALL.match(line)
    return match is not None and match[2] == "fdatasync" and match[1] != thread


def touches_log(line: str, thread: str) -> bool:
    """Tell whether a call begins that no thread, or not this one, may make on a failed log.

    Another thread's write may have been on its way; nobody waits for it.
    """
    match = CALL.match(line)
    name = os.path.basename(match[4] or "") if match else ""
    if not match or not (name == mq.LOG_NAME or mq.SEGMENT_NAME.fullmatch(name) or is_marks(name)):
        return False
    return (match[2] in ("fdatasync", "fsync", "ftruncate")
            or (match[2] == "pwrite64" and match[1] == thread))


def only_reads(line: str) -> bool:
    """Tell whether opening a file for reading failed, which a full disk does not do: whoever
    cannot read the Go server's offsets takes everything over, as documented."""
    return "(INJECTED)" in line and mq.META_NAME in line and "O_RDONLY" in line


def whose_call(lines: List[str], at: int) -> Optional["re.Match[str]"]:
    """Return the start of the call that ends in line `at`."""
    resumed = RESUMED.match(lines[at])
    if not resumed:
        return CALL.match(lines[at])
    started = (CALL.match(line) for line in reversed(lines[:at]))
    return next((m for m in started if m and m[1] == resumed[1]), None)


# ---- The harness --------------------------------------------------------------------------

class Template(NamedTuple):
    """A folder to be copied for each case, and what is known of it."""

    name: str
    folder: str
    steps: List[Step]
    work: Callable[[Worker], None]
    damaged: bool
    fills_disk: bool = False
    room: bool = False


class Harness:
    """The temporary folder, the random numbers, and what was found."""

    def __init__(self, base: str, seed: int, long: bool, every: bool, only: str) -> None:
        self.base, self.seed, self.long, self._every = base, seed, long or every, every
        self._only = only.split(":") if only else []
        self._random = random.Random(seed)
        self.case_numbers = itertools.count()
        self.kills = self.errors = 0
        self.faults: List[str] = []

    def prepare(self, scenario: Scenario) -> Template:
        mq.ROOM_KINDS = (*WITH_ROOM, "tmpfs") if scenario.room else WITH_ROOM
        folder = os.path.join(self.base, f"{scenario.name}{'-with-room' * scenario.room}")
        steps: List[Step] = []
        worker = Worker(folder, lambda *step: steps.append(step), 0)
        scenario.prepare(worker)
        return Template(scenario.name, folder, steps, *scenario[2:])

    def run(self, template: Template, injection: Optional[Injection]) -> Tuple[str, Outcome]:
        """Do a template's work in a copy of its folder; return the copy."""
        folder = os.path.join(self.base, f"case{next(self.case_numbers)}")
        copy_folder(template.folder, folder)
        first = sum(step[0] == "sending" for step in template.steps)
        return folder, run_worker(template.work, folder, first, injection)

    def check(self, template: Template, injection: Optional[Injection]) -> Outcome:
        """Run a case and judge it."""
        folder, outcome = self.run(template, injection)
        effect = injection.effect if injection else "nothing"
        try:
            found = check_synced(outcome)
            if effect == "kill":
                if outcome.status not in (0, -signal.SIGKILL):
                    found.append(f"exit {outcome.status}")
                self.kills += outcome.status == -signal.SIGKILL
            elif injection:
                found += check_error(injection, outcome)
                self.errors += any("(INJECTED)" in line for line in outcome.calls)
            elif outcome.status:
                found.append(f"exit {outcome.status} although nothing was done to it")
            if effect in ("kill", "nothing") and not template.fills_disk:
                found += [" ".join(map(str, step)) for step in outcome.steps
                          if step[0] in ("not compacted", "owing")]
            if not any(only_reads(line) for line in outcome.calls):
                faults = judge(folder, template.steps + outcome.steps, template.damaged)
                found += [fault for fault in faults if not (fault.startswith("duplicated")
                                                            and marks_were_unread(outcome.calls))]
        except Exception as error:
            text = str(error) if isinstance(error, Fault) else traceback.format_exc()
            found = [f"unexpected: {text}"]
        if found:
            self.report(template.name, injection, folder, found)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            for path in (folder + ".strace", *lost_files_of(folder)):
                os.unlink(path)
        return outcome

    def report(self, name: str, injection: Optional[Injection], folder: str,
               found: List[str]) -> None:
        self.faults += found
        at = f"{injection.call}:{injection.number}" if injection else "-:0"
        print(f"FAULT {name}:{at}, {injection.effect if injection else 'nothing injected'}, "
              f"seed {self.seed}; folder {folder}, calls {folder}.strace")
        for line in found[:10]:
            print(f"    {line}")
        print(f"    ... {len(found)} in all" if len(found) > 10 else "", end="", flush=True)

    def numbers(self, calls: List[str], call: str, sample: int) -> List[int]:
        """Return which calls of a name to harm: all, or the last and some others."""
        count = count_calls(calls, call)
        if len(self._only) == 3:
            return [int(self._only[2])]
        if self._every or count <= sample:
            return list(range(1, count + 1))
        if sample == 1:
            return [self._random.randint(1, count)]
        return sorted([count, *self._random.sample(range(1, count), sample - 1)])

    @property
    def is_whole(self) -> bool:
        return not self._only

    def wanted(self, *parts: str) -> bool:
        return all(wanted == part for wanted, part in zip(self._only, parts))

    def kill_and_fail(self, template: Template) -> None:
        """Harm a scenario's calls, each in a run of its own."""
        calls = self.check(template, None).calls
        for call in KILLED:
            if self.wanted(template.name, call):
                for number in self.numbers(calls, call, SAMPLE_LONG if self.long else SAMPLE):
                    self.check(template, Injection(call, number, "kill"))
        short = not self.long and self.is_whole
        for call, error in self._random.sample(ERRORS, ERRORS_SHORT) if short else ERRORS:
            if self.wanted(template.name, call):
                for number in self.numbers(calls, call, 1 if short else SAMPLE_LONG):
                    self.check(template, Injection(call, number, error))

    def kill_twice(self, template: Template) -> None:
        """Kill, and then kill the start that follows."""
        calls = self.run(template, None)[1].calls
        firsts = NESTED_LONG if self.long else NESTED
        for call, number in self._random.sample(points(calls), firsts):
            folder, outcome = self.run(template, Injection(call, number, "kill"))
            bring_back(folder)
            again = Template(f"{template.name}-{call}-{number}-again", folder,
                             [*template.steps, *outcome.steps, ("killed",)], go_on,
                             template.damaged)
            following = points(self.check(again, None).calls)
            count = min(len(following), AGAIN_LONG if self.long else AGAIN)
            for second, at in following if self._every else self._random.sample(following, count):
                self.check(again, Injection(second, at, "kill"))


def points(calls: List[str]) -> List[Tuple[str, int]]:
    """Return all that a kill can be at."""
    return [(call, number) for call in KILLED for number in range(1, count_calls(calls, call) + 1)]


def copy_folder(source: str, target: str) -> None:
    """Copy a folder that may be missing; what was one file under two names stays one."""
    if not os.path.isdir(source):
        return
    os.mkdir(target, 0o700)
    copied: Dict[int, str] = {}
    for name in os.listdir(source):
        old, new = os.path.join(source, name), os.path.join(target, name)
        inode = os.stat(old).st_ino
        if inode in copied:
            os.link(copied[inode], new)
        else:
            shutil.copyfile(old, new)
            copied[inode] = new


# ---- The server ---------------------------------------------------------------------------

class ServerCase(NamedTuple):
    """Clients put until the server ends, or until each has put PUTS messages."""

    injection: Injection
    clients: int


PUTS = 40                        # enough for each thread to come to its sixth sync
SERVER_CASES = [
    ServerCase(Injection("fdatasync", 1, "EIO"), 1),
    ServerCase(Injection("fdatasync", 3, "EIO"), 8),
    ServerCase(Injection("pwrite64", 2, "EIO"), 1),
    ServerCase(Injection("pwrite64", 1, "ENOSPC"), 1),
    ServerCase(Injection("pwrite64", 3, "ENOSPC"), 8),
]
SERVER_CASES_LONG = [ServerCase(Injection(call, number, error), clients)
                     for call, error in (("fdatasync", "EIO"), ("pwrite64", "EIO"),
                                         ("pwrite64", "ENOSPC"))
                     for number in range(1, 7) for clients in (1, 4, 16)]


class Notes:
    """In place of a ledger: what it would be told, as steps."""

    def __init__(self) -> None:
        self.steps: List[Step] = []

    def __getattr__(self, verb: str) -> Callable[..., None]:
        return lambda *arguments: self.steps.append((verb, *arguments))

    @contextlib.contextmanager
    def timing(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.steps.append(("answered_in", what, time.monotonic() - started))


def put_until_end(client: Client, numbers: Iterator[int], notes: Notes) -> None:
    with contextlib.suppress(OSError), client.wire:      # the server ended
        for _ in range(PUTS):
            answer = client.put(payload_of(next(numbers)))
            if answer.status != 200 and (answer.status != 503 or not answer.headers["Retry-After"]):
                notes.odd(f"{answer.status} {answer.headers}")


def fail_server(harness: Harness, case: ServerCase) -> None:
    """Have one system call of a serving process fail, and judge what it does then."""
    base = os.path.join(harness.base, f"server{next(harness.case_numbers)}")
    server = ServerProcess(base, base, settings={"min_free_bytes": 0})
    try:
        server.wait_ready()
        strace = Strace(server.pid, base + ".strace", case.injection)
        steps = put_from_clients(server, case.clients)
        if case.injection.effect == "ENOSPC":
            server.stop()
        status = server.wait_end(TIMEOUT_S)
        if status is None:
            raise Fault(f"the server did not end within {TIMEOUT_S} s")
        found = check_server(case, Outcome(status, steps, strace.lines()))
        server.check_log()
        found += judge(os.path.join(base, QUEUE), steps, damaged=False)
    except (Fault, subprocess.TimeoutExpired) as error:
        found = [f"unexpected: {error}"]
    finally:
        server.kill()
    harness.errors += 1
    if found:
        harness.report(f"server with {case.clients} clients", case.injection, base, found)


def put_from_clients(server: ServerProcess, count: int) -> List[Step]:
    notes, numbers = Notes(), itertools.count()
    clients = [Client(server.wire(TIMEOUT_S), notes) for _ in range(count)]
    together(*[lambda client=client: put_until_end(client, numbers, notes)  # type: ignore[misc]
               for client in clients])
    return notes.steps


def check_server(case: ServerCase, outcome: Outcome) -> List[str]:
    """EIO ends the server with status 4; ENOSPC is a 503, and it serves on."""
    found = check_synced(outcome)
    refused = sum(step[0] == "refused" for step in outcome.steps)
    sent = sum(step[0] == "sending" for step in outcome.steps)
    if not any("(INJECTED)" in line for line in outcome.calls):
        found.append("unexpected: nothing was injected")
    if case.injection.effect == "EIO":
        if outcome.status != FAILED or refused:
            found.append(f"exit {outcome.status} and {refused} refused puts after EIO")
    elif outcome.status or not refused or sent != case.clients * PUTS:
        found.append(f"exit {outcome.status}, {refused} refused puts of {sent} after ENOSPC")
    return found


# ---- main ---------------------------------------------------------------------------------

def check_machine() -> None:
    """Raise Skipped where strace cannot do this."""
    if os.geteuid():
        raise Skipped("needs root")
    if not shutil.which("strace"):
        raise Skipped("strace is missing")


def run(harness: Harness) -> None:
    make_loops_short()
    scenarios = SCENARIOS
    if harness.long:                         # with room ahead and without
        scenarios = [scenario._replace(room=room) for scenario in scenarios
                     for room in (False, True)]
    for scenario in scenarios:
        if harness.wanted(scenario.name):
            template = harness.prepare(scenario)
            harness.kill_and_fail(template)
            if harness.is_whole:
                harness.kill_twice(template)
    if harness.is_whole:
        for case in SERVER_CASES_LONG if harness.long else SERVER_CASES:
            fail_server(harness, case)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="more calls")
    parser.add_argument("--every", action="store_true", help="every call, not a sample")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", default="", metavar="SCENARIO[:CALL[:NUMBER]]")
    arguments = parser.parse_args()
    if arguments.only and arguments.only.split(":")[0] not in {s.name for s in SCENARIOS}:
        parser.error(f"scenarios are {', '.join(scenario.name for scenario in SCENARIOS)}")
    logging.disable(logging.CRITICAL)
    base = tempfile.mkdtemp(prefix="mq-kills-", dir=KILLS_DIR)
    harness = Harness(base, arguments.seed, arguments.long, arguments.every, arguments.only)
    try:
        check_machine()
        print(f"seed {arguments.seed}", flush=True)
        run(harness)
    except Skipped as reason:
        print(f"skipped: kills: {reason}")
        return 0
    finally:
        if not harness.faults:
            shutil.rmtree(base)
    print(f"kills: {harness.kills} kills and {harness.errors} injected errors at {len(CALLS)} "
          f"system calls in {len(SCENARIOS)} scenarios; {count_faults(harness.faults)}")
    return 1 if harness.faults else 0


if __name__ == "__main__":
    sys.exit(main())
