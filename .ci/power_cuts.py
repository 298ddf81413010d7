#!/usr/bin/env python3
"""Cut the power under a working server, again and again, and prove that nothing is lost.

    python3 .ci/power_cuts.py                        # some cuts on ext4 and xfs, for CI
    python3 .ci/power_cuts.py --long                 # several dozen on each
    python3 .ci/power_cuts.py --kind xfs --seed 7    # one of them, with a known seed
    python3 .ci/power_cuts.py --control              # a server that does not sync: must fail

A real server process works on a file system of its own, on a loop image, for several clients
that put, take and compact. At a random moment the power is cut, in one of two ways:
- below the file system: its image lies on another one, an xfs, which is shut down. What the
  file system wrote and did not flush is gone, as from the cache of a disk.
- in the file system: it is shut down itself, with or without its journal being flushed first.
The server must end by itself with status 4, or is killed; the file system is mounted again,
which replays its journal, and the next server goes on with what is left. Some cuts come while
the server starts, the first of them in an empty folder. Two servers of three have the sizes of
small.py: so a cut meets changes of segments, cleanings, removals and snapshots as well.

Proves: a put that was answered 200 is there after the cut, whole, once, in order; a message
that was settled more than two syncs of the marks ago does not come back; a server
whose disk is gone answers no put.
Does not prove: what a disk does that forgets what it was told to flush.

Needs Linux, root, `xfs_io` and the mkfs of each kind: apt-get install -y xfsprogs e2fsprogs.
Images are made in BENCH_DIR (default /var/tmp) and removed; that of a fault is kept and named.
Exit code: 0 good or skipped, 1 a fault, 2 usage.
"""
import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Iterator, List, Optional, Sequence

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from test_micro_queue import (  # noqa: E402
    LATE_S, QUEUE, SERVER, Answer, Client, Fault, Ledger, ServerProcess, Wire, count_faults)

MIB = 1 << 20
ANSWER_TIMEOUT_S = 30
MARKS_SYNCED_S = 0.4             # of small.py's servers: their upkeep comes 50 times a second
END_TIMEOUT_S = 10               # how soon a server under load must notice that its disk is gone
SHOWN_FAULTS = 10
PRODUCERS, CONSUMERS = 8, 3
SMALL = os.path.join(ROOT, ".ci", "small.py")
NOT_SYNCING = (
    "import os, sys; os.fdatasync = lambda fd: None\n"
    f"sys.path.insert(0, {ROOT!r})\n"
    "import micro_queue; sys.exit(micro_queue.main())")


class Skipped(Exception):
    """Something that a part needs is missing here."""


def run(*command: str) -> str:
    """Run a system command; return its output. Raises OSError with its last line of stderr."""
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["failed"]
        raise OSError(f"{' '.join(command[:2])}: {lines[-1]}")
    return done.stdout.decode(errors="replace")


def need(*commands: str) -> None:
    """Raise Skipped unless we are root and have these commands."""
    if os.geteuid() != 0:
        raise Skipped("needs root")
    for command in commands:
        if not shutil.which(command):
            raise Skipped(f"{command} is missing")


@contextlib.contextmanager
def work_folder(prefix: str) -> Iterator[str]:
    """A folder that is removed, unless a Fault passes, which names it."""
    folder = tempfile.mkdtemp(prefix=prefix, dir=os.environ.get("BENCH_DIR", "/var/tmp"))
    os.chmod(folder, 0o755)                  # a server may run as another user
    try:
        yield folder
    except Fault:
        print(f"kept: {folder}", flush=True)
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder)


# ---- Disk ---------------------------------------------------------------------------------

SIZES = {"ext4": 256 * MIB, "xfs": 320 * MIB}        # xfs refuses less than 300 MiB
SIZE_BELOW = 512 * MIB
MAKE = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}


class Disk:
    """A file system of its own, mounted at `path`; `kind` is ext4, xfs or tmpfs."""

    def __init__(self, kind: str, image: str, path: str, size: int = 0,
                 options: str = "") -> None:
        self.kind, self.image, self.path, self.size = kind, image, path, size or SIZES[kind]
        self._options = options
        self.mounted = False

    def __enter__(self) -> "Disk":
        """Make and mount it. Raises Skipped where that does not work."""
        os.makedirs(self.path, exist_ok=True)
        failing = "nothing can make"
        try:
            if self.kind != "tmpfs":
                with open(self.image, "wb") as file:
                    file.truncate(self.size)
                run(*MAKE[self.kind], self.image)
            failing = "the kernel does not mount"
            self.mount()
        except OSError as error:
            raise Skipped(f"{failing} {self.kind} here: {error}") from None
        except BaseException:                # Ctrl-C
            self.unmount()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.unmount()

    def mount(self) -> None:
        extra = [self._options] if self._options else []
        if self.kind == "tmpfs":
            run("mount", "-t", "tmpfs", "-o", ",".join([f"size={self.size}", *extra]),
                "tmpfs", self.path)
        else:
            run("mount", "-t", self.kind, "-o", ",".join(["loop", *extra]), self.image, self.path)
        self.mounted = True

    def unmount(self) -> None:
        """Detach; waits a little for a process that is just ending."""
        for _ in range(100):
            if not self.mounted:
                return
            with contextlib.suppress(OSError):
                run("umount", self.path)
                self.mounted = False
            time.sleep(0.05 if self.mounted else 0)
        run("umount", "-l", self.path)
        self.mounted = False

    def shut_down(self, *, flush: bool = False) -> None:
        """Let nothing more reach the image; `flush` writes the journal first."""
        run("xfs_io", "-x", "-c", "shutdown" + (" -f" if flush else ""), self.path)


BELOW, NO_FLUSH, FLUSH = "below", "without its journal", "with its journal"


class PoweredDisk:
    """A file system whose image lies on another one, so that both can lose their power."""

    def __init__(self, kind: str, folder: str) -> None:
        self.kind, self.path = kind, os.path.join(folder, kind)
        below = os.path.join(folder, "below")
        self._below = Disk("xfs", below + ".img", below, SIZE_BELOW)
        self._disk = Disk(kind, os.path.join(below, kind + ".img"), self.path)

    def __enter__(self) -> "PoweredDisk":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._below)
            stack.enter_context(self._disk)
            run("sync", "-f", self._below.path)          # so that the image itself survives
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def cut(self, way: str, server: ServerProcess) -> None:
        if way == BELOW:
            self._below.shut_down()
            return
        # ext4 answers 0 to an fdatasync that is under way while it is shut down, though its
        # data is lost (seen with Linux 6.18). So none is under way.
        with paused(server):
            self._disk.shut_down(flush=way == FLUSH)

    def mount_again(self) -> None:
        """What a reboot does: forget all caches, replay the journals."""
        self._disk.unmount()
        self._below.unmount()
        self._below.mount()
        self._disk.mount()


# ---- Server and clients -------------------------------------------------------------------

@contextlib.contextmanager
def paused(server: ServerProcess) -> Iterator[None]:
    """Stop all threads where they are; a system call that is under way ends first."""
    with contextlib.suppress(ProcessLookupError):
        server.process.send_signal(signal.SIGSTOP)
    while server.process.poll() is None and not is_stopped(server.pid):
        time.sleep(0.001)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.process.send_signal(signal.SIGCONT)


def is_stopped(pid: int) -> bool:
    folder, states = f"/proc/{pid}/task", set()
    for task in os.listdir(folder):
        with contextlib.suppress(OSError), open(f"{folder}/{task}/stat", "rb") as file:
            states.add(file.read().rsplit(b") ", 1)[1][:1])
    return states <= {b"T", b"Z"}


def fingerprint(payload: bytes) -> bytes:
    """What the ledger keeps of a payload: its name, and a hash that any change changes."""
    return payload[:20] + hashlib.sha256(payload).hexdigest()[:20].encode()


class Payloads:
    """Messages of random sizes, mostly small, none sent twice. Used by one thread."""

    def __init__(self, name: str, rng: random.Random, largest: int = MIB) -> None:
        self._name, self._rng, self._number = name, rng, 0
        self._largest = largest
        self._block = rng.randbytes(largest)

    def next(self) -> bytes:
        self._number += 1
        limit = self._largest if self._rng.random() < 0.01 else min(self._largest, 1 << 14)
        size = int(2 ** self._rng.uniform(0, limit.bit_length() - 1))
        at = self._rng.randrange(len(self._block) - size + 1)
        return f"{self._name}-{self._number}".encode().ljust(20, b".") + self._block[at:at + size]


def client(wire: Wire, ledger: Ledger, name: str = "drain") -> Client:
    """Return a client; that a put is answered says nothing of takes: marks have their own sync."""
    return Client(wire, ledger, name, fingerprint, durable=False)


class Load:
    """Clients that work until their server is gone, and come back for as long as it starts."""

    def __init__(self, server: ServerProcess, ledger: Ledger, rng: random.Random,
                 name: str, syncs_often: bool) -> None:
        self._server, self._ledger = server, ledger
        self._over, self._cut = threading.Event(), threading.Event()
        self.problems: List[str] = []
        makers = [Payloads(f"{name}-{number}", random.Random(rng.random()))
                  for number in range(PRODUCERS)]
        works: List[Callable[[Wire], None]] = [self._compact]
        works += [lambda wire, maker=maker: self._produce(wire, maker)  # type: ignore[misc]
                  for maker in makers]
        works += [lambda wire, name=f"consumer-{number}": self._consume(wire, name)  # type: ignore
                  for number in range(CONSUMERS)]
        # Slower consumers leave a backlog: what a cut can lose is what nobody took yet.
        self._pause_s = rng.choice((0.001, 0.01, 0.1))
        self._threads = [threading.Thread(target=self._keep, args=(work,), daemon=True)
                         for work in works]
        if syncs_often:
            self._threads.append(threading.Thread(target=self._watch_syncs, daemon=True))
        for thread in self._threads:
            thread.start()

    def cutting(self) -> None:
        """The power is about to be cut."""
        self._cut.set()

    def end(self) -> None:
        """Wait for the clients; their server must have ended."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _keep(self, work: Callable[[Wire], None]) -> None:
        """Connect until there is a server, then work until the connection breaks."""
        while not self._over.is_set():
            try:
                with self._server.wire(ANSWER_TIMEOUT_S) as wire:
                    self._until_ready(wire)
                    work(wire)
            except socket.timeout:
                self.problems.append(f"no answer within {ANSWER_TIMEOUT_S} s")
            except OSError:
                time.sleep(0.002)

    def _watch_syncs(self) -> None:
        """Tell the ledger what must be on disk, because it was settled long enough ago."""
        moments: List[int] = []
        while not self._cut.wait(MARKS_SYNCED_S / 4) and not self._over.is_set():
            with contextlib.suppress(OSError):
                if self._server.ask("GET", "/readyz").status == 200:
                    moments.append(self._ledger.moment())
            if len(moments) > 5 and not self._cut.is_set():
                self._ledger.synced(moments.pop(0))

    def _until_ready(self, wire: Wire) -> None:
        while wire.ask("GET", "/readyz").status != 200:
            time.sleep(0.002)

    def _produce(self, wire: Wire, payloads: Payloads) -> None:
        producer = client(wire, self._ledger)
        while not self._over.is_set():
            self._expect(producer.put(payloads.next()), 200, 503)

    def _consume(self, wire: Wire, name: str) -> None:
        consumer = client(wire, self._ledger, name)
        while not self._over.is_set():
            self._expect(consumer.take(), 200, 404)
            time.sleep(self._pause_s)

    def _compact(self, wire: Wire) -> None:
        while not self._over.is_set():
            self._expect(wire.ask("GET", f"/compact/{QUEUE}"), 200, 503)
            time.sleep(0.05)

    def _expect(self, answer: Answer, *statuses: int) -> None:
        if answer.status not in statuses:
            self.problems.append(f"answered {answer.status}: {answer.body[:200]!r}")


def check(ledger: Ledger, *, drained: bool) -> None:
    """Raise LedgerFault with what went wrong, the worst first."""
    found = ledger.faults(drained=drained)
    if found:
        raise LedgerFault(sorted(found, key=lambda line: not line.startswith("lost")))


class LedgerFault(Fault):
    """What the ledger found, in lines."""

    def __init__(self, found: List[str]) -> None:
        shown = found[:SHOWN_FAULTS]
        more = [f"... and {len(found) - len(shown)} more"] if len(found) > len(shown) else []
        super().__init__("\n".join([*shown, *more]))
        self.found = found


# ---- Power cuts ---------------------------------------------------------------------------

class Figures:
    """What the last line tells."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self.cuts = dict.fromkeys(kinds, 0)
        self.answered = self.ended_itself = 0
        self.found: List[str] = []

    def __str__(self) -> str:
        cuts = ", ".join(f"{count} on {kind}" for kind, count in self.cuts.items())
        return (f"power cuts: {cuts}; the server ended by itself {self.ended_itself} times; "
                f"{self.answered:,} messages answered; {count_faults(self.found)}")


class Series:
    """Several cuts on one file system, then a look at all that is left."""

    def __init__(self, disk: PoweredDisk, folder: str, rng: random.Random, figures: Figures,
                 programs: Sequence[Sequence[str]]) -> None:
        self.disk, self.folder, self.rng, self.figures = disk, folder, rng, figures
        self.ledger = Ledger(LATE_S)
        self.history: List[str] = []         # how each cut was made
        self._programs = programs

    def start(self, program: Sequence[str] = (SERVER,)) -> ServerProcess:
        return ServerProcess(self.folder, os.path.join(self.disk.path, "data"),
                             program=program,
                             settings={"fsync": "always", "min_free_bytes": MIB})

    def run(self, cuts: int) -> None:
        for number in range(cuts):
            self.cut(f"c{number}", early=self.rng.random() < (0.5 if number == 0 else 0.2))
            suspect = self.ledger.faults(drained=False)
            if suspect or number == cuts - 1 or self.rng.random() < 0.3:
                self.look()

    def cut(self, name: str, *, early: bool) -> None:
        """One round: load, the cut, the end of the server, the journal's replay."""
        way = self.rng.choice((BELOW, BELOW, NO_FLUSH, FLUSH))
        at_once = early or self.rng.random() < 0.3
        self.history.append(f"{way}{', early' if early else ''}")
        program = self.rng.choice(self._programs)
        with self.start(program) as server:
            load = Load(server, self.ledger, self.rng, name, program == (SMALL,))
            try:
                self.wait_moment(server, early)
                load.cutting()
                self.disk.cut(way, server)
                self.figures.cuts[self.disk.kind] += 1
                status = None if at_once else server.wait_end(END_TIMEOUT_S)
            finally:
                server.kill()
                load.end()
            if not at_once:
                self.check_end(status)
            server.check_log()
        if load.problems:
            raise Fault(load.problems[0])
        self.disk.mount_again()
        self.ledger.fault(power_cut=True)

    def wait_moment(self, server: ServerProcess, early: bool) -> None:
        if early:                            # while it starts, or just after
            time.sleep(self.rng.uniform(0, 0.5))
        else:
            server.wait_ready()
            time.sleep(self.rng.uniform(0.1, 1.5))

    def check_end(self, status: Optional[int]) -> None:
        if status is None:
            raise Fault(f"the server went on for {END_TIMEOUT_S} s after its disk was gone")
        if status != 4:
            raise Fault(f"the server ended with status {status} instead of 4")
        self.figures.ended_itself += 1

    def look(self) -> None:
        """Take everything. Nothing of it comes back, for the end that follows syncs it: that
        of the server, or that of the mount."""
        with self.start() as server:
            with server.wait_ready().wire(ANSWER_TIMEOUT_S) as wire:
                client(wire, self.ledger).drain()
            check(self.ledger, drained=True)
            if self.rng.random() < 0.5 and server.stop() != 0:
                raise Fault(f"a clean stop ended with status {server.process.returncode}: "
                            f"{server.stderr()[-2000:]}")
            server.check_log()
        self.disk.mount_again()
        self.ledger.fault()


def run_kind(kind: str, options: argparse.Namespace, figures: Figures) -> None:
    """Make several file systems of a kind, each for a series of cuts. Raises Fault."""
    need("mount", "umount", "xfs_io", MAKE[kind][0])
    programs = [("-c", NOT_SYNCING)] if options.control else [(SMALL,), (SMALL,), (SERVER,)]
    rng = random.Random(f"{options.seed}-{kind}")
    series, cuts = (8, 5) if options.long else (2, 3)
    for number in range(1, series + 1):
        with work_folder(f"power-cuts-{kind}-") as folder, PoweredDisk(kind, folder) as disk:
            one = Series(disk, folder, rng, figures, programs)
            try:
                one.run(cuts)
            except (Fault, OSError) as fault:
                print(f"{kind}, file system {number}, cuts: {'; '.join(one.history)}", flush=True)
                raise fault if isinstance(fault, Fault) else Fault(repr(fault)) from fault
            finally:
                figures.answered += one.ledger.answered_count
        print(f"  {kind}: file system {number} of {series}: {one.ledger}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Cut the power under micro_queue.")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--long", action="store_true", help="several dozen cuts on each kind")
    parser.add_argument("--kind", action="append", choices=sorted(SIZES), help="repeatable")
    parser.add_argument("--control", action="store_true",
                        help="with a server that does not sync: this must find lost messages")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"power cuts: seed {options.seed}", flush=True)
    kinds = options.kind or sorted(SIZES)
    figures, bad = Figures(kinds), False
    for kind in kinds:
        try:
            run_kind(kind, options, figures)
        except Skipped as reason:
            print(f"skipped: {kind}: {reason}", flush=True)
        except Fault as fault:
            bad = True
            figures.found += getattr(fault, "found", [str(fault)])
            print(f"FAULT on {kind}, cut {figures.cuts[kind]}, seed {options.seed}:\n{fault}",
                  flush=True)
    print(figures)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
