#!/usr/bin/env python3
"""Full and failing disks, and no descriptors or threads left: nothing that was answered is lost.

    python3 .ci/disks.py                             # every part once, in one way, for CI
    python3 .ci/disks.py --long                      # more cycles of each
    python3 .ci/disks.py --part full --seed 7        # some parts: see PARTS at the end

A real server process works on file systems of a few MiB, under limits of the system, and where
it cannot work at all; every other one has the sizes of small.py. Proves: what does not fit is
refused with 503 and Retry-After; takes go on, and they alone give the room back, as a purge does
without a free byte; a stop that owes marks ends with status 4 and a line; dead letters leave the
disk its last room; a disk that fails ends the process with status 4 and no 200 for what is not
durable, but what it cannot read costs only that; files that somebody deletes come back; a folder
that cannot be used ends it with status 3 and one line; without descriptors the current segment
grows, without threads the server pauses, and serves again afterwards. After each of these a
restart finds all that was answered, once, in order, and no traceback is in its log.

Needs Linux, root and e2fsprogs; what cannot run here is skipped. Folders are made in BENCH_DIR
(default /var/tmp) and removed; that of a fault is kept and named.
Exit code: 0 good or skipped, 1 a fault, 2 usage.
"""
import argparse
import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

from power_cuts import (ANSWER_TIMEOUT_S, MIB, SMALL, Disk, Payloads, Skipped, check, client, need,
                        run, work_folder)
from test_micro_queue import (LATE_S, QUEUE, SERVER, Answer, Client, Fault, Ledger, ServerProcess,
                              Wire, eventually, request, together)

KIB = 1 << 10
TINY = {"tmpfs": 4 * MIB, "ext4": 8 * MIB}
PRODUCERS = 4
BALLAST_BYTES = 64 * KIB         # what a start on a full disk is given, if it asks for space
EATEN_BYTES = 16 * MIB           # more than the tiny disks have
REFUSED_IN_A_ROW = 20            # puts of random sizes: then nothing fits any more
RESUME_TIMEOUT_S = 20            # upkeep looks each second, a compaction of some MiB is quick
END_TIMEOUT_S = 10
PAUSE_S = 1                      # how long a pause is watched
PAUSE_CPU_SHARE = 0.1            # of a core; a spin takes all of it
HARD_THREADS = 1000
SLOW_CLIENTS = 6                 # more than the threads that a quiet server has
HALF_A_PUT = request("POST", f"/in/{QUEUE}", b"whole")[:-3]
SOMEBODY = 54_321                # a user that nobody is: no process of another counts as theirs


class Scene:
    """A data folder, the server on it, and the ledger of its messages.

    `logged` says that every settlement finds room in the marks. Where a disk may be full to the
    last byte, memory alone knows some of them until a snapshot, and a kill forgets those; and a
    start there may ask for space: `ballast` is what to free then.
    """

    def __init__(self, figures: "Figures", folder: str, path: str, rng: random.Random, *,
                 logged: bool = True, settings: Optional[Dict[str, Any]] = None,
                 **options: Any) -> None:
        self.path, self.rng, self.ledger = path, rng, Ledger(LATE_S)
        self._figures, self._folder = figures, folder
        self._logged, self._options = logged, options
        self._settings = {"fsync": "always", "min_free_bytes": 0, **(settings or {})}
        self._ballast = os.path.join(os.path.dirname(path), "ballast")
        self._payloads = [Payloads(f"p{number}", random.Random(rng.random()), 256 * KIB)
                          for number in range(PRODUCERS)]

    def __enter__(self) -> "Scene":
        self.start()
        return self

    def __exit__(self, kind: Any, error: Any, *_: Any) -> None:
        status = self.server.process.poll()
        self.server.kill()
        self._figures.answered += self.ledger.answered_count
        if isinstance(error, OSError):
            raise Fault(f"{error!r}; the server's status was {status}, and it said: "
                        f"{self.server.stderr()[-2000:]}")

    # -- life

    def start(self, **options: Any) -> None:
        program = {"program": (self.rng.choice((SMALL, SERVER)),)}
        self.server = ServerProcess(self._folder, self.path, settings=self._settings,
                                    **{**program, **self._options, **options})
        self.server.wait_ready()

    def kill(self) -> None:
        """Kill -9, and see that there was no traceback until then."""
        self.server.kill()
        self.server.check_log()
        self.ledger.fault(power_cut=not self._logged)

    def restart(self) -> None:
        self.kill()
        self._figures.restarts += 1
        try:
            self.start()
        except Fault:
            if "the disk is full; free about" not in self.server.stderr():
                raise
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._ballast)     # as the line says
            self.start()
        check(self.ledger, drained=False)

    def finish(self) -> None:
        """A last restart, after which everything must be there."""
        self.restart()
        self.drain()
        check(self.ledger, drained=True)
        self.kill()

    def expect_end(self, status: int) -> None:
        """The process must end by itself."""
        found = self.server.wait_end(END_TIMEOUT_S)
        if found != status:
            raise Fault(f"status {found} instead of {status}: {self.server.stderr()[-1000:]}")
        self._figures.ends += 1
        self.kill()

    # -- messages

    @contextlib.contextmanager
    def client(self, name: str = "drain") -> Iterator[Client]:
        """Open a connection for puts and takes."""
        with self.server.wire(ANSWER_TIMEOUT_S) as wire:
            yield client(wire, self.ledger, name)

    def put(self, producer: Client, number: int = 0) -> Answer:
        """Put one message; 200, or 503 with the time to wait, is all there may be."""
        answer = producer.put(self._payloads[number].next())
        if answer.status == 503:
            self._figures.refused += 1
        if (answer.status, answer.headers.get("Retry-After")) not in ((200, None), (503, "5")):
            raise Fault(f"a put was answered {answer}")
        return answer

    def put_some(self, count: int = 50) -> None:
        with self.client() as producer:
            for _ in range(count):
                if self.put(producer).status != 200:
                    raise Fault("a put was refused while there is room")

    def fill(self) -> None:
        """Put from several connections until nothing fits.

        Where the disk may be full to the last byte, another program takes and frees the rest of
        it meanwhile: what the server saw free is not there when it writes.
        """
        with contextlib.suppress(OSError), open(self._ballast, "wb", buffering=0) as file:
            file.write(bytes(BALLAST_BYTES))
        if not self._logged:
            with eaten(os.path.dirname(self.path)):
                self._fill_all()
        self._fill_all()

    def _fill_all(self) -> None:
        together(*[lambda number=number: self._fill(number)  # type: ignore[misc]
                   for number in range(PRODUCERS)])

    def _fill(self, number: int) -> None:
        refused = 0
        with self.client() as producer:
            while refused < REFUSED_IN_A_ROW:
                refused = refused + 1 if self.put(producer, number).status == 503 else 0

    def drain(self, count: int = sys.maxsize) -> None:
        with self.client() as consumer:
            consumer.drain(count)
            consumer.wire.ask("GET", "/healthz")     # this too comes after the last settlement
            self.ledger.settled(consumer.name)

    def compact(self) -> bool:
        answer = self.server.ask("GET", f"/compact/{QUEUE}", timeout=ANSWER_TIMEOUT_S)
        if answer.status not in (200, 503):
            raise Fault(f"a compaction was answered {answer}")
        return answer.status == 200

    def purge(self) -> None:
        self.ledger.dropping()
        answer = self.server.ask("POST", f"/purge/{QUEUE}", timeout=ANSWER_TIMEOUT_S)
        if answer.status != 200:
            raise Fault(f"a purge was answered {answer}")
        self.ledger.dropped()

    def resume(self) -> None:
        """Wait until puts are taken again, at times with the help of /compact; nobody frees
        space but the server, and mostly nothing is asked of it until it had time to."""
        asks = self.rng.random() < 0.2
        if self.rng.random() < 0.5:
            time.sleep(2)
        with self.client() as producer:
            eventually(lambda: (not asks or self.compact()) and self.put(producer).status == 200,
                       RESUME_TIMEOUT_S, "no put was accepted, though everything was taken,",
                       pause_s=0.2)


@contextlib.contextmanager
def eaten(folder: str) -> Iterator[None]:
    """Have a thread fill the disk and free it again, several times a second."""
    over = threading.Event()

    def eat() -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            while not over.wait(0.05):
                with contextlib.suppress(OSError):
                    while file.tell() < EATEN_BYTES:
                        os.write(file.fileno(), bytes(4 * KIB))
                        file.seek(0, os.SEEK_END)
                over.wait(0.05)
                file.truncate(0)
                file.seek(0)

    thread = threading.Thread(target=eat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# ---- Full disks ---------------------------------------------------------------------------

def cycle(scene: Scene) -> None:
    """Full, half empty, full again, empty; with restarts between."""
    scene.fill()
    scene.restart()
    scene.drain(scene.rng.randrange(1, 200))
    if scene.rng.random() < 0.5:
        scene.restart()
    scene.fill()
    scene.drain()
    check(scene.ledger, drained=True)
    if scene.rng.random() < 0.5:
        scene.restart()
        scene.drain()                        # what came back because only memory knew better
    scene.resume()


def full(part: "Part") -> None:
    """File systems of a few MiB, filled to the brim or to min_free_bytes."""
    cases = [("tmpfs", 0), ("ext4", MIB), ("ext4", 0), ("tmpfs", MIB)]
    for kind, min_free in cases if part.cycles > 1 else part.rng.sample(cases, 1):
        with part.disk(kind, TINY[kind]) as (folder, disk), \
                part.scene(folder, os.path.join(disk.path, "data"), logged=min_free > 0,
                           settings={"min_free_bytes": min_free}) as scene:
            for _ in range(part.cycles):
                cycle(scene)
            scene.finish()


def file_size(part: "Part") -> None:
    """A limit for the size of a file (RLIMIT_FSIZE): a segment that comes to it is the last of
    its messages, not of the queue."""
    with part.folder() as folder, part.scene(
            folder, os.path.join(folder, "data"), logged=False, program=(SERVER,),
            limits={resource.RLIMIT_FSIZE: 2 * MIB}) as scene:
        for _ in range(part.cycles):
            refused = 0
            with scene.client() as producer:
                for number in range(1500):
                    refused += scene.put(producer, number % PRODUCERS).status == 503
                    time.sleep(0.02 * (number % 100 == 0))       # upkeep makes the next segment
            if refused > 150:
                raise Fault(f"{refused} puts were refused because of one file's size")
            scene.restart()
            scene.drain(scene.rng.randrange(1, 1000))
            scene.restart()
        scene.finish()


def used_up(folder: str, name: str = "others") -> int:
    """Have another program take what is left of a disk, to the last byte; return how much."""
    taken = 0
    with open(os.path.join(folder, name), "ab", buffering=0) as file:
        for size in (64 * KIB, 4 * KIB, 1):
            with contextlib.suppress(OSError):
                while taken < EATEN_BYTES:
                    taken += file.write(bytes(size))
    return taken


def free_bytes(folder: str) -> int:
    status = os.statvfs(folder)
    return status.f_bfree * status.f_frsize


def purged(part: "Part") -> None:
    """A purge where no byte is free, and where takes owe marks: it makes room."""
    kinds = list(TINY) if part.cycles > 1 else [part.rng.choice(list(TINY))]
    for kind in kinds:
        with part.disk(kind, TINY[kind]) as (folder, disk), part.scene(
                folder, os.path.join(disk.path, "data"), logged=False) as scene:
            scene.fill()
            scene.drain(scene.rng.choice((0, 20)))
            used_up(disk.path)
            scene.purge()
            scene.resume()
            scene.restart()
            scene.finish()


def owed(part: "Part") -> None:
    """A stop while memory alone knows what was taken: status 4 and a line, and what the next
    start repeats is what was owed."""
    with part.disk("tmpfs", TINY["tmpfs"]) as (folder, disk), part.scene(
            folder, os.path.join(disk.path, "data"), logged=False,
            program=(SERVER,)) as scene:
        with scene.client() as producer:
            for _ in range(1000):
                producer.put(b"%d" % scene.rng.getrandbits(100))
        used_up(disk.path)
        with scene.client("taker") as taker:
            taker.drain(500)
        used_up(disk.path)
        status = scene.server.stop()
        if status != 4 or "marks_owed" not in scene.server.stderr():
            raise Fault(f"a stop that owes marks: {status}, {scene.server.stderr()[-500:]}")
        os.unlink(os.path.join(disk.path, "others"))
        scene.restart()
        scene.drain(100)
        if scene.server.stop() != 0:
            raise Fault(f"a stop with room: {scene.server.stderr()[-500:]}")
        scene.finish()


def dead_letters(part: "Part") -> None:
    """Dead letters stop moving while less than half of min_free_bytes is free, and go on."""
    def with_dead_letters(config: Dict[str, Any]) -> None:
        config["queues"][0].update(max_deliveries=1, dead_letter=config["queues"][1]["name"])
        other.append(config["queues"][1]["name"])
    other: List[str] = []
    with part.disk("tmpfs", 8 * MIB) as (folder, disk), part.scene(
            folder, os.path.join(disk.path, "data"), settings={"min_free_bytes": 2 * MIB},
            change=with_dead_letters) as scene:
        scene.fill()
        hold = os.path.join(disk.path, "others")
        with open(hold, "wb") as file:
            file.write(bytes(max(0, free_bytes(disk.path) - MIB + 64 * KIB)))
        count = expel_all(scene)
        before = free_bytes(disk.path)
        time.sleep(1.5)
        if before - free_bytes(disk.path) > 128 * KIB or "dead_letters_wait" not in (
                scene.server.stderr()):
            raise Fault(f"dead letters took {before - free_bytes(disk.path)} bytes of the last")
        os.unlink(hold)
        scene.ledger.dropping()              # they are another queue's now
        scene.restart()
        bodies: Set[bytes] = set()
        eventually(lambda: count <= len(take_from(scene, other[0], bodies)), 2 * RESUME_TIMEOUT_S,
                   "not all dead letters arrived", pause_s=0.2)
        if len(bodies) > count:
            raise Fault(f"{len(bodies)} dead letters of {count} messages")
        scene.kill()


def take_from(scene: Scene, queue: str, bodies: Set[bytes]) -> Set[bytes]:
    """Take all that is there, for what is dead must be taken to make room for more."""
    with scene.server.wire(ANSWER_TIMEOUT_S) as wire:
        while True:
            answer = wire.take(queue=queue)
            if answer.status != 200:
                return bodies
            bodies.add(answer.body)


def expel_all(scene: Scene) -> int:
    """Take each message with a lease and give it back: once too often. Return their number."""
    for count in range(1 << 20):
        with scene.server.wire(ANSWER_TIMEOUT_S) as wire:
            answer = wire.take("?lease=60")
            if answer.status == 404:
                return count
            ended = wire.ask("POST", f"/nack/{QUEUE}?lease={answer.headers['Lease-Id']}")
            if ended.status != 200:
                raise Fault(f"a nack was answered {ended}")
    raise Fault("no end of messages")


# ---- Failing disks ------------------------------------------------------------------------

def put_until_end(scene: Scene) -> None:
    """Put until the connection breaks; a 200 that is not kept is for the ledger to find."""
    with contextlib.suppress(OSError), scene.client() as producer:
        deadline = time.monotonic() + END_TIMEOUT_S
        while time.monotonic() < deadline:
            scene.put(producer)


def take_until_end(scene: Scene) -> None:
    """Take until the connection breaks."""
    with contextlib.suppress(OSError), scene.client("taker") as consumer:
        consumer.drain()


def error_trigger(disk: Disk) -> str:
    """Return the file that makes an ext4 believe that it is damaged."""
    source = run("findmnt", "-n", "-o", "SOURCE", disk.path).strip()
    path = f"/sys/fs/ext4/{os.path.basename(source)}/trigger_fs_error"
    if not os.path.exists(path):
        raise Skipped(f"the kernel has no {path}")
    return path


def read_only(part: "Part") -> None:
    """A file system that turns read-only under the server, as one does that found an error."""
    need("mkfs.ext4", "e2fsck", "findmnt")
    for work in (put_until_end, take_until_end):
        with part.disk("ext4", TINY["ext4"], "errors=remount-ro") as (folder, disk), \
                part.scene(folder, os.path.join(disk.path, "data")) as scene:
            scene.put_some()
            with open(error_trigger(disk), "w", encoding="ascii") as file:
                file.write("micro_queue")
            work(scene)
            scene.expect_end(4)
            repair(disk)
            scene.start()
            scene.finish()


def unreadable(part: "Part") -> None:
    """Bytes that the disk cannot read (EIO of some reads), at a take and at a start: that much is
    lost at most, is said and set aside; nothing else is, and the server goes on."""
    need("strace")
    cases = [(False, "5+3"), (True, "9+5"), (True, "20+9")]
    for start_at, times in cases if part.cycles > 1 else part.rng.sample(cases, 1):
        with part.folder() as folder, part.scene(
                folder, os.path.join(folder, "data"), program=(SERVER,)) as scene:
            scene.put_some(300)
            inject = ["-qq", "-e", "trace=pread64", "-o", os.path.join(folder, "calls"),
                      "-e", f"inject=pread64:error=EIO:when={times}"]
            for name in ("data.log", "data.1.log", "data.2.log"):
                inject += ["-P", os.path.join(scene.path, QUEUE, name)]
            if start_at:
                scene.kill()
                scene.start(wrapper=["strace", "-D", "-f", *inject])
            else:
                watcher = subprocess.Popen(["strace", "-f", *inject, "-p", str(scene.server.pid)],
                                           stderr=subprocess.DEVNULL)
                time.sleep(0.5)
            scene.drain()
            scene.put_some()
            scene.drain()
            lost = [line for line in scene.ledger.faults() if line.startswith("lost")]
            others = [line for line in scene.ledger.faults() if not line.startswith("lost")]
            said = scene.server.stderr().count("corrupt_record")
            if not start_at:
                watcher.terminate()
                watcher.wait()
            with open(os.path.join(folder, "calls"), encoding="latin-1") as file:
                injected = file.read().count("INJECTED")
            if not injected or others or (lost and not said):
                raise Fault(f"{injected} reads failed: {others[:5]}, {len(lost)} lost, said {said}")
            scene.kill()


def deleted(part: "Part") -> None:
    """Files are deleted under a busy server: each is there again soon, and nothing is lost."""
    with part.folder() as folder, part.scene(
            folder, os.path.join(folder, "data"), program=(SMALL,)) as scene:
        over = threading.Event()
        place = os.path.join(scene.path, QUEUE)

        def produce(number: int) -> None:
            with scene.client() as producer:
                while not over.is_set():
                    scene.put(producer, number)
                    over.wait(0.01)

        def consume() -> None:
            with scene.client("taker") as taker:
                while not over.is_set():
                    taker.take()
                    over.wait(0.03)

        def delete() -> None:
            try:
                for _ in range(8 * part.cycles):
                    time.sleep(0.3)
                    names = os.listdir(place)
                    wanted = scene.rng.sample(names, scene.rng.choice((1, 1, 3, len(names))))
                    gone = [name for name in wanted if not name.endswith(".tmp")]
                    for name in gone:
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(os.path.join(place, name))
                    eventually(lambda: is_whole(scene, place), RESUME_TIMEOUT_S,
                               f"{gone} did not come back", pause_s=0.02)
            finally:
                over.set()
        together(lambda: produce(0), lambda: produce(1), consume, delete)
        time.sleep(0.5)
        scene.finish()


def is_whole(scene: Scene, place: str) -> bool:
    """Tell whether no file that the server has open is a deleted one."""
    folder = f"/proc/{scene.server.pid}/fd"
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):   # what was written again was linked: the name is old
            if os.readlink(path).startswith(place + "/") and not os.stat(path).st_nlink:
                return False
    return True


def repair(disk: Disk) -> None:
    """Unmount, repair, mount."""
    disk.unmount()
    done = subprocess.run(["e2fsck", "-fy", disk.image], capture_output=True, check=False)
    if done.returncode not in (0, 1):        # 1: errors were corrected
        raise Fault(f"e2fsck: {done.stdout.decode()[-500:]}")
    disk.mount()


def remount(part: "Part") -> None:
    """A remount is refused while the log is open; afterwards a start ends with one line."""
    for kind, size in TINY.items():
        with part.disk(kind, size) as (folder, disk), \
                part.scene(folder, os.path.join(disk.path, "data")) as scene:
            scene.put_some()
            with contextlib.suppress(OSError):           # "busy", and so it should be
                run("mount", "-o", "remount,ro", disk.path)
                put_until_end(scene)
                scene.expect_end(4)
                run("mount", "-o", "remount,rw", disk.path)
                scene.start()
            scene.put_some()
            scene.kill()
            run("mount", "-o", "remount,ro", disk.path)
            part.refused(folder, scene.path)
            part.refused(folder, os.path.join(disk.path, "other"))
            run("mount", "-o", "remount,rw", disk.path)
            scene.start()
            scene.finish()


# ---- Folders that cannot be used ----------------------------------------------------------

def unusable(part: "Part") -> None:
    """A file in the place of a folder, a folder in the place of a log."""
    with part.folder() as folder:
        with open(os.path.join(folder, "file"), "wb"):
            pass
        os.makedirs(os.path.join(folder, "data", QUEUE, "data.log"), mode=0o700)
        for name in ("file", "file/data", "data"):
            part.refused(folder, os.path.join(folder, name))


def not_ours(part: "Part") -> None:
    """A folder that another user owns, and one that may not be written."""
    python = python_for_somebody()
    with part.folder() as folder:
        server = copy_server(folder)
        locked, owned = os.path.join(folder, "locked"), os.path.join(folder, "owned")
        for path in (locked, owned):
            os.mkdir(path)
        os.makedirs(os.path.join(owned, QUEUE))
        os.chmod(os.path.join(owned, QUEUE), 0o777)
        for path in (locked, owned):
            part.refused(folder, path, program=(server,), python=python, user=SOMEBODY)


def python_for_somebody() -> str:
    """Return a Python that another user may run; ours may lie in root's home."""
    need()
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            code = "import sys; sys.exit(sys.version_info < (3, 9))"
            if subprocess.run([python, "-c", code], user=SOMEBODY, check=False).returncode == 0:
                return python
    raise Skipped("no Python from 3.9 on that another user may run")


def copy_server(folder: str) -> str:
    """Copy the server to where another user may read it."""
    path = os.path.join(folder, "micro_queue.py")
    shutil.copy(SERVER, path)
    os.chmod(path, 0o644)
    return path


# ---- No descriptors, no threads -----------------------------------------------------------

def watch_pause(server: ServerProcess) -> None:
    """See that the server does not spin, neither on a core nor in its log."""
    time.sleep(0.5)                          # for what is said once, at its begin
    cpu, lines = server.cpu_seconds(), server.stderr().count("\n")
    time.sleep(PAUSE_S)
    share = (server.cpu_seconds() - cpu) / PAUSE_S
    if share > PAUSE_CPU_SHARE:
        raise Fault(f"the server spins: {share:.0%} of a core while it should wait")
    if server.stderr().count("\n") - lines > 10 * PAUSE_S:
        raise Fault(f"the server fills its log: {server.stderr()[-500:]}")


@contextlib.contextmanager
def connected(server: ServerProcess, count: int) -> Iterator[List[Wire]]:
    """Open connections that stay idle; they are set up by the kernel, accepted or not."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(server.wire()) for _ in range(count)]


def leave_descriptors(server: ServerProcess, spare: int) -> None:
    """Limit a server's descriptors so that it has `spare` left."""
    used = {int(name) for name in os.listdir(f"/proc/{server.pid}/fd")}
    limit = 0
    while spare or limit <= 3:
        spare -= limit not in used
        limit += 1
    while limit in used:
        limit += 1
    hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (limit, hard))


def descriptors(part: "Part") -> None:
    """Descriptors run out while the server runs: the current segment grows."""
    with part.folder() as folder, part.scene(
            folder, os.path.join(folder, "data"), program=(SMALL,)) as scene:
        server = scene.server
        limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        scene.put_some()
        with scene.client("old") as old:
            old.wire.ask("GET", "/readyz")
            for spare in range(6):           # whichever step of a compaction finds none left
                leave_descriptors(server, spare)
                answer = old.wire.ask("GET", f"/compact/{QUEUE}")
                if answer.status not in (200, 503):
                    raise Fault(f"a compaction was answered {answer}")
                if scene.put(old).status != 200:
                    raise Fault("a put was refused for want of descriptors")
                for _ in range(100):
                    scene.put(old)
                if server.stderr().count("segment_not_ready") > 5:
                    raise Fault("a line for each try to make a segment")
                resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
            leave_descriptors(server, 20)
            with connected(server, 60):
                watch_pause(server)
                serves_old_connections(scene, old)
        scene.put_some()
        scene.finish()


def serves_old_connections(scene: Scene, old: Client) -> None:
    for _ in range(20):
        if scene.put(old).status != 200:
            raise Fault("a put was refused for want of descriptors")
        old.take()


def few_descriptors(part: "Part") -> None:
    """A hard limit from the start: fewer connections, and the rest is told so."""
    with part.folder() as folder, part.scene(
            folder, os.path.join(folder, "data"), limits={resource.RLIMIT_NOFILE: 120}) as scene:
        server = scene.server
        scene.put_some()
        with connected(server, 150):
            watch_pause(server)
        time.sleep(0.5)
        scene.put_some()
        scene.finish()


def threads(part: "Part") -> None:
    """No thread is to be had: from the start, and while the server runs."""
    need("prlimit")
    python = python_for_somebody()
    with part.folder() as folder:
        server = copy_server(folder)
        path = os.path.join(folder, "data")
        os.mkdir(path)
        os.chown(path, SOMEBODY, SOMEBODY)
        somebody = {"program": (server,), "python": python, "user": SOMEBODY}
        for count in range(1, 7):
            start_with_threads(part, folder, path, count, somebody)
        with part.scene(folder, path, limits={resource.RLIMIT_NPROC: HARD_THREADS},
                        settings={"request_timeout": 1}, **somebody) as scene:
            run_without_threads(scene)
            scene.finish()


def start_with_threads(part: "Part", folder: str, path: str, count: int,
                       somebody: Dict[str, Any]) -> None:
    """With too few threads a start ends with one line; it never hangs and never half serves."""
    with ServerProcess(folder, path, limits={resource.RLIMIT_NPROC: count},
                       **somebody) as server:
        try:
            server.wait_ready(END_TIMEOUT_S)
        except Fault:
            if server.process.poll() is None:
                raise
            one_line(server)
        server.check_log()


def run_without_threads(scene: Scene) -> None:
    """Slow clients hold all threads there are; the others wait, and are answered."""
    server = scene.server
    limit_threads(server, "1")               # before the first put, which starts a thread to sync
    scene.put_some(5)
    with connected(server, SLOW_CLIENTS) as slow, contextlib.ExitStack() as stack:
        for wire in slow:
            wire.send(HALF_A_PUT)
        clients = [stack.enter_context(scene.client(f"taker-{number}"))
                   for number in range(PRODUCERS)]
        for _ in range(3):
            together(*[lambda number=number: scene.put(  # type: ignore[misc]
                clients[number], number) for number in range(PRODUCERS)])
            for taker in clients:
                taker.take()
        if "cannot_start_thread" not in server.stderr():
            raise Fault("the limit of threads did not bite: nothing is proved")
        watch_pause(server)
    limit_threads(server, str(HARD_THREADS))
    scene.put_some()
    if not scene.compact():
        raise Fault("no compaction after threads were short")


def memory(part: "Part") -> None:
    """No memory for large bodies and answers: 500, 503 or an end with 4, and nothing is lost."""
    large = {"fsync": "no", "max_message_bytes": 8 * MIB}
    one_arena = {**os.environ, "MALLOC_ARENA_MAX": "1"}      # others have 64 MiB each in reserve
    with part.folder() as folder, part.scene(folder, os.path.join(folder, "data"),
                                             settings=large, env=one_arena) as scene:
        rng, block, bites = scene.rng, bytes(8 * MIB - KIB), [0]
        serial = itertools.count()

        def work(number: int) -> None:
            for turn in range(6):
                name = f"{next(serial)}-{number}-{turn}-".encode()
                try:
                    with scene.client(f"client-{number}") as one:
                        answers = one.put(name + block[:rng.randrange(len(block))]), one.take()
                except OSError:              # a close is all that there was memory for
                    bites[0] += 1
                    continue
                bites[0] += sum(answer.status in (500, 503) for answer in answers)
                if any(answer.status not in (200, 404, 500, 503) for answer in answers):
                    raise Fault(f"without memory the answers were {answers}")

        for cycle in range(3 * part.cycles):
            scene.put_some(5)
            with open(f"/proc/{scene.server.pid}/statm", encoding="ascii") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            limit = used + (rng.randrange(4, 28) if cycle else 1) * MIB      # the first bites
            resource.prlimit(scene.server.pid, resource.RLIMIT_AS, (limit, limit))
            together(*[lambda number=number: work(number)  # type: ignore[misc]
                       for number in range(PRODUCERS)])
            status = scene.server.process.poll()
            if status not in (None, 4):
                raise Fault(f"status {status} instead of 4: {scene.server.stderr()[-1000:]}")
            scene.server.kill()              # its log has tracebacks, and may
            scene.ledger.fault()
            scene.start()
            scene.drain(3)
            check(scene.ledger, drained=False)
        if not bites[0]:
            raise Fault("the limit of memory did not bite: nothing is proved")
        scene.finish()


def limit_threads(server: ServerProcess, limit: str) -> None:
    """Set the soft limit, as the user that the server runs as: root may lack the right."""
    subprocess.run(["prlimit", f"--pid={server.pid}", f"--nproc={limit}:"],
                   user=SOMEBODY, check=True)


def one_line(server: ServerProcess) -> None:
    """What a start that failed says last: one line of its own, and no traceback."""
    said = [line for line in server.stderr().splitlines() if line.startswith("micro_queue: ")]
    if "Traceback" in server.stderr() or len(said) != 1:
        raise Fault(f"not one clear line: {server.stderr()[-2000:]}")


# ---- Parts --------------------------------------------------------------------------------

class Figures:
    """What the last line tells."""

    def __init__(self) -> None:
        self.parts = self.skipped = self.faults = 0
        self.answered = self.refused = self.restarts = self.ends = 0

    def __str__(self) -> str:
        return (f"disks: {self.parts} parts, {self.skipped} skipped; {self.answered:,} messages "
                f"answered, {self.refused:,} puts refused; {self.restarts} restarts, "
                f"{self.ends} ends for a failed disk; faults {self.faults}")


class Part:
    """What a part works with: folders, disks, scenes, and what random there is."""

    def __init__(self, figures: Figures, seed: str, cycles: int) -> None:
        self.cycles = cycles
        self._figures, self.rng = figures, random.Random(seed)

    def folder(self) -> Any:
        return work_folder("disks-")

    @contextlib.contextmanager
    def disk(self, kind: str, size: int, options: str = "") -> Iterator[Tuple[str, Disk]]:
        """A mounted file system, and a folder beside it."""
        need("mount", "umount", *([f"mkfs.{kind}"] if kind != "tmpfs" else []))
        with self.folder() as folder:
            image, path = os.path.join(folder, kind + ".img"), os.path.join(folder, "disk")
            with Disk(kind, image, path, size, options) as disk:
                yield folder, disk

    def scene(self, folder: str, path: str, **options: Any) -> Scene:
        return Scene(self._figures, folder, path, self.rng, **options)

    def refused(self, folder: str, path: str, **options: Any) -> None:
        """A start on this data folder must end with status 3 and one line."""
        with ServerProcess(folder, path, **options) as server:
            status = server.wait_end(END_TIMEOUT_S)
            if status != 3:
                raise Fault(f"{path}: status {status} instead of 3: {server.stderr()[-1000:]}")
            one_line(server)


PARTS: Dict[str, Callable[[Part], None]] = {
    "full": full, "purged": purged, "owed": owed, "dead-letters": dead_letters,
    "file-size": file_size, "unreadable": unreadable, "deleted": deleted,
    "read-only": read_only, "remount": remount, "unusable": unusable, "not-ours": not_ours,
    "descriptors": descriptors, "few-descriptors": few_descriptors, "threads": threads,
    "memory": memory}


def main() -> int:
    parser = argparse.ArgumentParser(description="Full and failing disks under micro_queue.")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--long", action="store_true", help="more cycles")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; repeatable")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"disks: seed {options.seed}", flush=True)
    figures = Figures()
    for name in options.part or PARTS:
        figures.parts += 1
        started = time.monotonic()
        try:
            PARTS[name](Part(figures, f"{options.seed}-{name}", 10 if options.long else 1))
            print(f"  {name}: good, {time.monotonic() - started:.1f} s", flush=True)
        except Skipped as reason:
            figures.skipped += 1
            print(f"skipped: {name}: {reason}", flush=True)
        except (Fault, OSError) as fault:
            figures.faults += 1
            print(f"FAULT in {name}, seed {options.seed}:\n{fault!r}", flush=True)
        finally:
            ServerProcess.kill_all()         # one that did not even start
    print(figures)
    return 1 if figures.faults else 0


if __name__ == "__main__":
    sys.exit(main())
