#!/usr/bin/env python3
"""Kill a queue at every system call that changes its folder, and fail each such call once.

    python3 .ci/kills.py                             # a sample of the calls: under a minute
    python3 .ci/kills.py --long                      # every call of every scenario
    python3 .ci/kills.py --only compaction:rename:2  # one case again, with its --seed

A worker drives a queue of the library and tells each step before and after it. `strace` kills
it at the N-th call of a name, or has that call fail; a kill leaves the page cache, so what was
told must be there for the next start. Then the folder is opened, drained and judged by the
tests' Ledger; what was accepted must also have been synced, as the calls tell. The last part
does the same to a server process. The worker is forked from here and strace attaches to it, so
that no interpreter starts for a kill, and calls are counted from the worker's first.

Needs Python 3.9, Linux, root and `strace`. Folders are made in KILLS_DIR (default /dev/shm).
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
    LATE_S, QUEUE, Client, FakeClock, FakeStorage, Fault, Ledger, ServerProcess, count_faults,
    drain, flipped, together)

KILLS_DIR = os.environ.get("KILLS_DIR", "/dev/shm" if os.path.isdir("/dev/shm") else None)
HOUR_S, DAY_MS = 3600, 86_400_000
TIMEOUT_S = 60                   # a worker or server that hangs for so long is a fault
SAMPLE = 3                       # calls of a name that the short mode kills at, in a scenario
NESTED, NESTED_LONG = 2, 4      # first kills, of a scenario, whose recovery is killed too
GAVE_UP, FAILED = 3, 4           # exit codes, as the server's

# What a call may be named on this machine; strace ignores an unknown name behind a "?".
CALLS = {"pwrite64": "pwrite64", "fdatasync": "fdatasync", "fsync": "fsync",
         "ftruncate": "ftruncate", "openat": "openat", "rename": "?rename,?renameat,?renameat2",
         "unlink": "?unlink,?unlinkat", "link": "?link,?linkat", "mkdir": "?mkdir,?mkdirat"}
ERRORS = [("fdatasync", "EIO"), ("fsync", "EIO"), ("pwrite64", "EIO"), ("pwrite64", "ENOSPC"),
          ("ftruncate", "EIO"), ("ftruncate", "ENOSPC"), ("fdatasync", "ENOSPC"),
          ("fsync", "ENOSPC"), ("rename", "EIO"), ("openat", "ENOSPC"), ("link", "EIO"),
          ("unlink", "EIO"), ("mkdir", "ENOSPC")]

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
        self.storage = FakeStorage()
        self.queue = open_queue(self.folder, storage=self.storage)
        self.ready = True

    def put(self, times: int = 1, *, count: int = 1, delay_s: int = 0) -> None:
        """Put `times` times `count` messages at once."""
        for _ in range(times):
            payloads = [self.next_payload() for _ in range(count)]
            for payload in payloads:
                self.tell("sending", payload)
            try:
                first = self.queue.put(payloads, delay_s)
            except mq.ApiError as error:
                if error.status != 503:
                    raise
                for payload in payloads:
                    self.tell("refused", payload)
            else:
                for number, payload in enumerate(payloads):
                    self.tell("accepted", payload, first + number)

    def take(self, consumer: str, wish: mq.Wish = mq.ONE) -> Optional[mq.Delivery]:
        delivery = self.queue.take(wish=wish)
        for message in delivery.messages if delivery else ():
            self.tell("delivered", consumer, message.payload, message.id, message.delivery)
        return delivery

    def settle(self, consumer: str, delivery: Optional[mq.Delivery]) -> None:
        """Settle; on a full disk memory alone may know it until a compaction ended well."""
        if delivery:
            self.tell("settling", consumer)
            if delivery.lease is None:
                self.queue.settle(delivery)
            else:
                self.queue.ack(mq.FIFO, delivery.lease)
            self.tell("unsure" if self.queue.unlogged else "settled", consumer)

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

    def compact(self, pause: Callable[[], None] = nothing) -> None:
        try:
            self.queue.compact(pause)
        except mq.CompactionFailed as error:
            self.tell("not compacted", str(error))

    def compact_busily(self) -> None:
        """Compact, and put and take meanwhile."""
        turns = itertools.cycle((lambda: self.put(2), lambda: self.consume(1),
                                 lambda: self.put(count=3), self.consume_in_disorder))
        meanwhile = some(turns, 6)

        def go_on(fd: int) -> None:          # others do while the new log is synced, but for
            queue = self.queue               # the last step: that holds the lock
            if fd != queue.log.fd and not queue.lock.locked():
                meanwhile()
        self.storage.before["fdatasync"] = go_on
        self.compact(some(turns, 10))
        self.storage.before.clear()

    def close(self) -> None:
        self.queue.close()
        self.ready = False

    def let_go(self) -> None:
        """End as a kill does: nothing more is written."""
        self.queue.log.close()
        self.tell("killed")

    def prove_dead(self) -> None:
        """Once a log failed every later call must raise LogFailed too."""
        log = self.queue.log
        for call in (lambda: log.append([mq.settled(1, 1, mq.FIFO, 1)]), self.queue.compact,
                     log.sync, lambda: log.wait_durable(log.appends + 1)):
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
        except (mq.StorageError, mq.CompactionFailed, mq.ApiError, OSError):
            if self.ready:                   # only a start may end so
                self.tell("odd", traceback.format_exc())
            return GAVE_UP
        except BaseException:
            self.tell("odd", traceback.format_exc())
            return 1
        return 0


def open_queue(folder: str, clock: Optional[mq.Clock] = None,
               storage: Optional[mq.Storage] = None) -> mq.Queue:
    queue = mq.Queue(mq.QueueConfig(name="q"), folder, clock=clock, storage=storage)
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
    mq.AHEAD_BYTES = 512
    mq.COMPACT_LOCKED_BYTES = 1500
    mq.COMPACT_SYNC_BYTES = 2500
    mq.REWRITE_BYTES = 1000
    mq.MIB = 300                             # a batch of a takeover


# ---- Scenarios ----------------------------------------------------------------------------
# `prepare` makes the folder and is not harmed; `work` is.

class Scenario(NamedTuple):
    name: str
    prepare: Callable[[Worker], None]
    work: Callable[[Worker], None]
    damaged: bool = False
    fills_disk: bool = False


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
    worker.queue.bookmark()
    worker.put(2)
    worker.consume(1)
    worker.compact()
    worker.settle("holder", held)
    worker.put(2)
    worker.consume_in_disorder()
    worker.queue.bookmark()
    worker.consume(1)
    worker.compact()
    worker.put(1)
    worker.close()
    worker.open()
    worker.put(1)
    worker.consume(2)
    worker.close()


def threads(worker: Worker) -> None:
    """Puts share syncs; takes, a bookmark and a compaction go on meanwhile."""
    worker.open()
    together(lambda: worker.put(9), lambda: worker.put(5, count=2),
             lambda: worker.put(9), lambda: worker.consume(12, "thread"))
    together(lambda: worker.put(9), lambda: worker.consume(9, "thread"),
             worker.compact, worker.queue.bookmark)
    worker.close()


def used(worker: Worker) -> None:
    """A folder with a bookmark, and with records of every kind before and behind it."""
    worker.open()
    worker.put(12)
    worker.consume(3)
    worker.consume_in_disorder()
    worker.put(delay_s=HOUR_S)
    worker.queue.bookmark()
    worker.put(8)
    worker.consume(3)
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
        worker.put(1)
    log = worker.queue.log
    places = [(offset, end, record) for offset, end, record in log.scan(mq.HEADER.size, log.tail)
              if record and record.type == mq.MESSAGE]
    settled = [end for _, end, record in places if not worker.queue.state.holds(record.id)]
    unanswered = [end for _, end, record in places[-4::2]]
    for end in (settled[0], settled[-1], unanswered[0]):
        flip_byte(log.path, end - 1)
    torn = mq.Record(mq.MESSAGE, worker.queue.state.next_id, 1, worker.next_payload())
    worker.tell("sending", torn.payload)
    data = log.codec.encode([torn], log.tail)[0]
    os.pwrite(log.fd, data[:len(data) // 2], log.tail)
    worker.let_go()


def used_damaged_and_without_bookmark(worker: Worker) -> None:
    used_and_damaged(worker)
    os.unlink(os.path.join(worker.folder, mq.META_NAME))


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
    worker.compact()
    worker.put(1)
    worker.consume(1)
    worker.close()


def compaction(worker: Worker) -> None:
    """Rewrite while others put and take, more than once."""
    worker.open()
    worker.put(6, count=2)
    worker.consume(4)
    held = worker.take("holder")
    worker.compact_busily()
    worker.put(1)
    worker.consume(1)
    worker.give_back("holder", held)
    worker.compact_busily()
    worker.consume(99)
    worker.put(4)
    worker.compact_busily()
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
        with limited_file_size(worker.queue.log.tail + room):
            worker.put(count=3)
            worker.settle("full", delivery)
            worker.put(count=3)
            worker.compact()
        worker.put(1)
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
    Scenario("first-start", nothing, first_start),
    Scenario("threads", nothing, threads),
    Scenario("recovery", used_and_damaged, go_on, damaged=True),
    Scenario("recovery-without-bookmark", used_damaged_and_without_bookmark, go_on, damaged=True),
    Scenario("compaction", used, compaction),
    Scenario("takeover", go_server, go_on),
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
        thread, call, fd = match[1], match[2], start[3] if start else ""
        if start and call == "pwrite64":
            numbers = {int(number) for number in NAME.findall(line, start.end())}
            written[fd] |= numbers
        elif start and call in ("fdatasync", "fsync"):
            under_way[thread] = set(written[fd])
        if call in ("fdatasync", "fsync") and re.search(r"\) += 0$", line):
            synced |= under_way.pop(thread, set())
    return synced


# ---- Judging ------------------------------------------------------------------------------

def replay(steps: List[Step]) -> Ledger:
    """Enter steps into a new ledger. What was out, and not about to be settled, when a worker
    was killed, is known to be back. What is not sure to be settled stays open for ever: its
    consumer goes on under another name."""
    ledger, out = Ledger(LATE_S), set()      # type: Tuple[Ledger, Set[str]]
    unsure: Dict[str, int] = collections.Counter()
    for verb, *arguments in steps:
        if verb in ("delivered", "settling", "settled", "unsure", "returned"):
            consumer = arguments[0]
            arguments[0] += "'" * unsure[consumer]
            unsure[consumer] += verb == "unsure"
        if verb == "delivered":
            out.add(arguments[0])
        elif verb in ("settling", "returned"):
            out.discard(arguments[0])
        if verb == "killed":
            for consumer in out:
                ledger.returned(consumer)
            out.clear()
            ledger.fault(power_cut=False)
        elif verb == "odd":
            raise Fault(arguments[0])
        elif verb not in ("settling", "unsure", "not compacted"):
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


def judge(folder: str, steps: List[Step], damaged: bool) -> List[str]:
    """Return the faults that show in a folder after what was told, over three more starts."""
    ledger = replay([*steps, ("killed",)])
    for turn in range(2):
        queue = take_all(folder, ledger, damaged)
        late = b"late %d" % turn             # a reused id or a stale tail shows only now
        ledger.sending(late)
        ledger.accepted(late, queue.put([late]))
        queue.log.close()
        ledger.fault(power_cut=False)
    take_all(folder, ledger, damaged).close()
    known = re.compile(r"(data\.log|meta\.json)(\.legacy)?|data\.log\.corrupt-[0-9a-f]+-\d+")
    left = [name for name in os.listdir(folder) if not known.fullmatch(name)]
    return ledger.faults() + [f"left behind: {name}" for name in left]


def check_synced(outcome: Outcome) -> List[str]:
    """Return the messages that were accepted although no sync covered them."""
    synced = synced_names(outcome.calls)
    accepted = [step[1] for step in outcome.steps if step[0] == "accepted"]
    return [f"answered before its sync: {payload[:40]!r}" for payload in accepted
            if int(NAME.match(payload.decode())[1]) not in synced]


def check_error(injection: Injection, outcome: Outcome) -> List[str]:
    """Return what is wrong with how a worker ended after a call failed."""
    at = next((number for number, line in enumerate(outcome.calls) if "(INJECTED)" in line), None)
    if at is None:
        return [] if outcome.status == 0 else [f"exit {outcome.status} without an error"]
    found = []
    started = whose_call(outcome.calls, at)
    on_log = started is not None and (started[4] or "").endswith("/" + mq.LOG_NAME)
    if outcome.status not in (0, GAVE_UP, FAILED):
        found.append(f"exit {outcome.status} after {injection.effect}")
    no_space = injection.call == "pwrite64" and injection.effect == "ENOSPC"
    if on_log and injection.call != "openat" and not no_space and outcome.status == 0:
        found.append(f"went on after {injection.effect}: {outcome.calls[at][:200]}")
    if no_space and outcome.status == FAILED:
        found.append(f"ended because of a full disk: {outcome.calls[at][:200]}")
    if on_log and not no_space and outcome.status in (GAVE_UP, FAILED):
        touched = [line for line in outcome.calls[at + 1:] if touches_log(line, started[1])]
        if injection.call != "fdatasync" and touched and is_sync_of_another(touched[0], started[1]):
            del touched[0]       # on its way as well; but after a failed sync there is none
        found += [f"touched the failed log again: {line[:200]}" for line in touched]
    return found


def is_sync_of_another(line: str, thread: str) -> bool:
    match = CALL.match(line)
    return match is not None and match[2] == "fdatasync" and match[1] != thread


def touches_log(line: str, thread: str) -> bool:
    """Tell whether a call begins that no thread, or not this one, may make on a failed log.

    Another thread's write may have been on its way; nobody waits for it.
    """
    match = CALL.match(line)
    if not match or not (match[4] or "").endswith("/" + mq.LOG_NAME):
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


class Harness:
    """The temporary folder, the random numbers, and what was found."""

    def __init__(self, base: str, seed: int, long: bool, only: str) -> None:
        self.base, self.seed, self.long = base, seed, long
        self._only = only.split(":") if only else []
        self._random = random.Random(seed)
        self.case_numbers = itertools.count()
        self.kills = self.errors = 0
        self.faults: List[str] = []

    def prepare(self, scenario: Scenario) -> Template:
        folder, steps = os.path.join(self.base, scenario.name), []  # type: Tuple[str, List[Step]]
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
                found += [f"not compacted: {step[1]}" for step in outcome.steps
                          if step[0] == "not compacted"]
            if not any(only_reads(line) for line in outcome.calls):
                found += judge(folder, template.steps + outcome.steps, template.damaged)
        except Exception as error:
            text = str(error) if isinstance(error, Fault) else traceback.format_exc()
            found = [f"unexpected: {text}"]
        if found:
            self.report(template.name, injection, folder, found)
        else:
            shutil.rmtree(folder)
            os.unlink(folder + ".strace")
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

    def numbers(self, calls: List[str], call: str) -> List[int]:
        """Return which calls of a name to harm: all, or the last and some others."""
        count = count_calls(calls, call)
        if len(self._only) == 3:
            return [int(self._only[2])]
        if self.long or count <= SAMPLE:
            return list(range(1, count + 1))
        return sorted([count, *self._random.sample(range(1, count), SAMPLE - 1)])

    @property
    def is_whole(self) -> bool:
        return not self._only

    def wanted(self, *parts: str) -> bool:
        return all(wanted == part for wanted, part in zip(self._only, parts))

    def kill_and_fail(self, template: Template) -> None:
        """Harm a scenario's calls, each in a run of its own."""
        calls = self.check(template, None).calls
        for call in CALLS:
            if self.wanted(template.name, call):
                for number in self.numbers(calls, call):
                    self.check(template, Injection(call, number, "kill"))
        for call, error in ERRORS:
            if self.wanted(template.name, call):
                for number in self.numbers(calls, call):
                    self.check(template, Injection(call, number, error))

    def kill_twice(self, template: Template) -> None:
        """Kill, and then kill the start that follows."""
        calls = self.run(template, None)[1].calls
        points = [(call, number) for call in CALLS
                  for number in range(1, count_calls(calls, call) + 1)]
        for call, number in self._random.sample(points, NESTED_LONG if self.long else NESTED):
            folder, outcome = self.run(template, Injection(call, number, "kill"))
            again = Template(f"{template.name}-{call}-{number}-again", folder,
                             [*template.steps, *outcome.steps, ("killed",)], go_on,
                             template.damaged)
            calls = self.check(again, None).calls
            for second in CALLS:
                for at in self.numbers(calls, second):
                    self.check(again, Injection(second, at, "kill"))


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
    for scenario in SCENARIOS:
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
    parser.add_argument("--long", action="store_true", help="every call, not a sample")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", default="", metavar="SCENARIO[:CALL[:NUMBER]]")
    arguments = parser.parse_args()
    if arguments.only and arguments.only.split(":")[0] not in {s.name for s in SCENARIOS}:
        parser.error(f"scenarios are {', '.join(scenario.name for scenario in SCENARIOS)}")
    logging.disable(logging.CRITICAL)
    base = tempfile.mkdtemp(prefix="mq-kills-", dir=KILLS_DIR)
    harness = Harness(base, arguments.seed, arguments.long, arguments.only)
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
