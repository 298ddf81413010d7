#!/usr/bin/env python3
"""Take out one rule of the storage at a time, and see what it is there for.

    python3 .ci/rules.py                             # every rule: some seconds
    python3 .ci/rules.py --only a4                   # one of them

Each rule of the storage that bears a name (RULES) has a story here: a queue is used, at the
worst moment the power goes or the process is killed, and a queue is started on what is left. The
story must end well on the server as it is, and must not once the rule is taken out of a copy of
the source: then a message is lost, comes back although its end was durable, comes early, an id
is used twice, or a file is never freed. A rule that another one covers is taken out together
with that one, its partner; with the partner alone out, the story must end well too.

What a power cut leaves is decided by the story: what a sync covered, and of the rest what it
says had reached the disk anyway. Nothing here is random.

A patch whose old text is not found, or found more than once, has to be renewed: the code that it
breaks was rewritten.

Exit code: 0 all good; 1 a story ends badly with its rule in place, or well without it, or a
patch does not fit; 2 usage.
"""
import argparse
import contextlib
import errno
import logging
import os
import shutil
import stat
import sys
import tempfile
import types
from typing import (Any, Callable, Collection, Dict, Iterator, List, NamedTuple, Optional,
                    Sequence, Tuple)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from test_micro_queue import FakeClock, FakeStorage, compact, drain, snapshot, upkeep  # noqa: E402

SOURCE = os.path.join(ROOT, "micro_queue.py")
BEHIND = "\n# ---- Broker ---"       # from here on the source is not needed
HOUR_S = 3600
LARGE = b"x" * 600                   # two of them fill a segment
SMALL = {"SEGMENT_BYTES": 1000, "READY_BYTES": 500}

RULES = {
    "a1": "what was marked since the freeze is in the new marks",
    "a2": "... and synced before the rename",
    "a3": "a sync of the marks syncs the folder too, until the rename is durable",
    "a4": "the data is synced up to the frozen tail before the rename",
    "b3": "a copy keeps its delay",
    "b5": "a cursor passes over a delayed record that is no entry: it was settled",
    "c1": "an owed snapshot is paid only by one that was frozen after the miss",
    "c2": "a start serves only behind its own snapshot",
    "c4": "a segment that could not be made is removed again",
    "d1": "no number comes back that the marks mention",
    "d2": "a segment's start record is durable before an older one goes",
    "e1": "a segment out of which copies went is dead only behind a later snapshot",
    "e2": "... that was frozen after the last copy",
    "f1": "a start behind no clean stop goes on in a new segment, whose start says so",
    "f2": "where a segment's name is taken, the next number is",
    "f3": "a file that was made is used only if the lock was proven after its own lock",
    "f4": "temporary files have names of their own, and a start removes them",
    "f6": "the number of a ready segment that a start removed is not used again",
    "g1": "ids are given at the write; a purge ends the round first",
    "r1": "an entry whose record is gone was settled",
    "r2": "a cursor whose segment is gone comes to the start of the next one",
}

Edit = Tuple[str, str]               # old and new text


class Case(NamedTuple):
    """A rule, the story that needs it, and how it is taken out: with which partners. At a pause,
    which is there in any case, the story does what in the server another thread may do."""

    rule: str
    story: Callable[["Run"], None]
    edits: Sequence[Edit]
    partners: Sequence[str]
    pauses: Sequence[Edit]


CASES: List[Case] = []


def case(rule: str, *edits: Edit, partners: Sequence[str] = (), pauses: Sequence[Edit] = ()
         ) -> Callable[[Callable[["Run"], None]], Callable[["Run"], None]]:
    """Tell of a story which rule it needs."""
    def note(story: Callable[["Run"], None]) -> Callable[["Run"], None]:
        CASES.append(Case(rule, story, edits, partners, pauses))
        return story
    return note


# ---- A disk, and runs on it ---------------------------------------------------------------

class Disk(FakeStorage):
    """A folder on a disk that knows what a power cut would leave of it."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder, self._kept = folder, folder + ".kept"
        os.mkdir(self._kept)
        self._synced: Dict[int, bytes] = {}  # content by inode
        for name in os.listdir(folder):
            self._keep(os.path.join(folder, name))
        self._durable = self._names()
        self._synced = {inode: self._content(inode) for inode in self._synced}

    def _keep(self, path: str) -> None:
        """Know a file from here on; a link of ours keeps its inode from being used again."""
        inode = os.stat(path).st_ino
        if inode not in self._synced:
            os.link(path, os.path.join(self._kept, str(inode)))
            self._synced[inode] = b""

    def _content(self, inode: int) -> bytes:
        with open(os.path.join(self._kept, str(inode)), "rb") as file:
            return file.read()

    def _names(self) -> Dict[str, int]:
        return {name: os.stat(os.path.join(self.folder, name)).st_ino
                for name in os.listdir(self.folder)}

    def _call(self, name: str, *arguments: Any) -> Any:
        result = super()._call(name, *arguments)
        if name == "open" and arguments[1] & os.O_CREAT:
            self._keep(arguments[0])
        if name in ("fsync", "fdatasync"):
            status = os.fstat(arguments[0])
            if stat.S_ISDIR(status.st_mode):
                self._durable = self._names()
            else:
                self._synced[status.st_ino] = os.pread(arguments[0], status.st_size, 0)
        return result

    def left(self, reached: Optional[Collection[str]] = ()) -> Dict[str, bytes]:
        """Return what a power cut would leave now: what syncs covered; and of the names in
        `reached` what they are now. None: all of it, as a kill does."""
        now, left = self._names(), {}
        for name in {*now, *self._durable}:
            is_new = reached is None or name in reached
            inode = (now if is_new else self._durable).get(name)
            if inode is not None:
                left[name] = self._content(inode) if is_new else self._synced[inode]
        return left


class Fenced:
    """The disk of a node that lost its locks: what it had locked fails, names and new files do
    not."""

    def __init__(self, disk: Disk, queue: Any) -> None:
        self._disk = disk
        self._lost = {file.fd for file in (*queue.log.segments.values(), queue.log.marks)}

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._disk, name)

        def fenced(*arguments: Any) -> Any:
            fd = getattr(arguments[0], "fd", arguments[0]) if arguments else None
            if fd in self._lost and name != "close":
                raise OSError(errno.EBADFD, "File descriptor in bad state")
            return call(*arguments)
        return fenced


class Run:
    """One story: a queue that is started, ended and started again in the folders of `base`."""

    def __init__(self, mq: Any, base: str) -> None:
        self.mq, self.base = mq, base
        self.clock = FakeClock()
        self.faults: List[str] = []
        self._lives = 0
        self._told: Dict[int, bytes] = {}    # payloads by id
        self._queue: Any = None
        self._put_at({})

    def _put_at(self, files: Dict[str, bytes]) -> None:
        folder = os.path.join(self.base, str(self._lives))
        self._lives += 1
        os.mkdir(folder, 0o700)
        for name, data in files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(data)
        self.disk = Disk(folder)

    # -- lives

    def start(self, *, fsync: str = "always", staging: Any = None, **config: Any) -> Any:
        self._queue = queue = self.mq.Queue(
            self.mq.QueueConfig(name="q", **config), self.disk.folder, fsync=fsync,
            clock=self.clock, storage=self.disk, staging=staging)
        queue.log.lock()
        queue.recover()
        return queue

    def lose_the_lock(self, queue: Any) -> None:
        """The locks of a node are given away, and it does not know."""
        queue.log.storage = Fenced(self.disk, queue)

        def not_proven() -> None:
            queue.log._fail("keep the lock of", OSError(errno.EBADFD, "in bad state"))
        queue.log.prove_lock = not_proven
        self.mq._open_logs.clear()           # the other node is a process of its own

    def cut(self, *reached: str, left: Optional[Dict[str, bytes]] = None) -> None:
        """The power goes. The next start finds what was synced, and what `reached` the disk
        without; or what was left at an earlier moment."""
        left = self.disk.left(reached) if left is None else left
        self._queue.log.close()
        self._put_at(left)

    def kill(self) -> None:
        self.cut(left=self.disk.left(None))

    def stop(self) -> None:
        self._queue.close()
        self._put_at(self.disk.left())

    def delete_marks(self) -> None:
        """Between two lives."""
        left = self.disk.left()
        del left["meta.json"]
        self._put_at(left)

    def end(self) -> None:
        if self._queue:
            self._queue.log.close()

    # -- using the queue

    def put(self, payload: bytes, delay_s: int = 0) -> int:
        try:
            id_: int = self._queue.put([payload], delay_s)
        except self.mq.ApiError as error:
            self.faults.append(f"refused: {payload[:20]!r}: {error}")
            return 0
        self.tell(id_, payload)
        return id_

    def tell(self, id_: int, payload: bytes) -> None:
        """Somebody was told the id of a message."""
        if self._told.setdefault(id_, payload) != payload:
            self.faults.append(f"id used twice: {id_} {self._told[id_][:20]!r} and "
                               f"{payload[:20]!r}")

    def lease(self) -> Any:
        return self._queue.take("", self.mq.Wish(0, 1 << 20, HOUR_S))

    def take(self, count: int = 1) -> None:
        """Take messages, and settle them."""
        for _ in range(count):
            self._queue.settle(self._queue.take())

    # -- judging

    def waits(self, *payloads: bytes, early: bool = False) -> None:
        """Exactly these wait now, in this order."""
        found = {message.payload: message.id for message in drain(self._queue)}
        known = {payload: id_ for id_, payload in self._told.items()}
        self.faults += [f"lost: {known.get(payload)} {payload[:20]!r}"
                        for payload in payloads if payload not in found]
        self.faults += [f"{'early' if early else 'came back'}: {id_} {payload[:20]!r}"
                        for payload, id_ in found.items() if payload not in payloads]

    def is_free(self) -> None:
        """The first segment holds nothing any more."""
        if self._queue.log.segments[0].end > self.mq.FIRST:
            self.faults.append("never freed: data.log")


def until_copied(queue: Any, steps: Iterator[Any]) -> None:
    """Do the steps of a compaction until it has copied something."""
    appends = queue.log.appends
    while queue.log.appends == appends:
        next(steps)


# ---- The stories --------------------------------------------------------------------------

@case("a1", ("while since < self.marks.end:", "while False:"))
def settled_beside_a_snapshot(run: Run) -> None:
    """While a snapshot is being written messages are settled, and the marks are synced. They are
    the old ones: unless their lines go along, a cut behind the rename brings messages back."""
    queue = run.start()
    numbers = list(b"123456789")
    for number in numbers:
        run.put(b"m%c" % number)
    for _ in queue.snapshot():
        run.take()
        del numbers[0]
        queue.log.sync_marks()
    run.cut()
    run.start()
    run.waits(*[b"m%c" % number for number in numbers])


case("a2",
     ("            since = self._copy_marks(new, since)         # perhaps synced\n"
      "            self.storage.fdatasync(new.fd)\n",
      "            self.storage.fdatasync(new.fd)\n"
      "            since = self._copy_marks(new, since)\n"))(
          settled_beside_a_snapshot)


RENAMED = (("            return False\n        self.sync_marks()\n",
            "            return False\n        yield 0\n        self.sync_marks()\n"),)


def until_renamed(run: Run, steps: Iterator[Any]) -> None:
    """Do the steps of a snapshot until it has its name, which no sync covers yet."""
    while "rename" not in run.disk.calls:
        next(steps)


@case("a3", ("            if self._folder_fd >= 0:         # or a power cut",
             "            if False:                        # or a power cut"), pauses=RENAMED)
def settled_before_the_folder_is_synced(run: Run) -> None:
    """The new marks were renamed into place, the folder is about to be synced. Just now a
    message is settled and the marks are synced. At a cut the name is still the old file's, and
    the message is back: unless that sync was one of the folder too."""
    queue = run.start()
    run.put(b"m1")
    run.put(b"m2")
    run.disk.calls.clear()
    until_renamed(run, queue.snapshot())
    run.take()
    queue.log.sync_marks()
    run.cut()
    run.start()
    run.waits(b"m2")


@case("a3", ("            if self._folder_fd >= 0:         # or a power cut",
             "            if self._folder_fd >= 0 and was_behind:  # or a power cut"),
      ("            if self.marks.fd >= 0 and self.marks.synced < self.marks.end:\n",
       "            was_behind = self.marks.synced < self.marks.end\n            if was_behind:\n"),
      pauses=RENAMED)
def settled_before_the_rename(run: Run) -> None:
    """As above, but the message was settled before the rename: its mark went along and is on
    disk, but in a file that has no durable name yet."""
    queue = run.start()
    run.put(b"m1")
    run.put(b"m2")
    run.disk.calls.clear()
    steps = queue.snapshot()
    next(steps)
    run.take()
    until_renamed(run, steps)
    queue.log.sync_marks()
    run.cut()
    run.start()
    run.waits(b"m2")


@case("a4", ("        self.sync()                          # what is frozen must not be ahead",
             "        pass                                 # what is frozen must not be ahead"))
def copied_and_not_synced(run: Run) -> None:
    """What a consumer has in hand is copied out of a segment, and a snapshot says where it
    stands now. The power goes before anybody synced the copy: the snapshot points at nothing,
    which means settled, although the first record is still there."""
    queue = run.start()
    run.put(b"m1")
    run.put(b"m2")
    run.lease()
    run.take()
    steps = queue.compact()
    until_copied(queue, steps)
    snapshot(queue)
    run.cut()
    run.start()
    run.waits(b"m1")


@case("b3", ("subscription.entries.put(id_, message.offset, message.due_ms, message.size, 0)",
             "subscription.entries.put(id_, message.offset, message.due_ms if is_new else 0, "
             "message.size, 0)"))
def a_copy_with_a_delay(run: Run) -> None:
    """A message with a delay is copied out of a segment, which is freed. The process is killed
    and the marks are deleted: all that is left of the message is its copy, which must not be
    delivered before its time."""
    queue = run.start()
    run.put(b"d1", HOUR_S)
    run.put(b"m2")
    run.take()
    compact(queue)
    run.kill()
    run.delete_marks()
    run.start()
    run.waits(early=True)
    run.clock.passed += HOUR_S * 1000
    run.waits(b"d1")


@case("b5", ("        return (message.id >= self.cursor_id and not message.delay_ms\n"
             "                and message.id not in self.entries)",
             "        return message.id >= self.cursor_id and message.id not in self.entries"))
def a_delay_whose_copy_is_gone(run: Run) -> None:
    """A message with a delay was copied, a kill came before its first record was freed, and the
    marks were deleted: all waits again, the cursor stands before the first record, the entry
    is the copy. Now all is purged and both segments are freed, but the power goes before the
    mark, and the loss of the first record, reached the disk. There is no entry any more, yet the
    record is there: it must not come, least of all before its time."""
    queue = run.start()
    run.put(b"m1")
    run.put(b"d2", HOUR_S)
    run.take()
    steps = queue.compact()
    until_copied(queue, steps)
    run.kill()
    run.delete_marks()
    queue = run.start()
    queue.purge()
    upkeep(queue)
    compact(queue)
    run.cut("data.1.log")
    run.start()
    run.waits(b"m1", early=True)             # the purge had not durably dropped it


@case("c1", ("                self.owed -= owed            # what was refused",
             "                self.owed = 0                # what was refused"))
def a_mark_that_a_snapshot_missed(run: Run) -> None:
    """While a snapshot is being written the disk is full for a moment: what is settled is
    refused by the marks and known to memory alone. The snapshot was frozen before, so another
    one has to follow: or a kill brings back what was settled long ago."""
    queue = run.start()
    run.put(b"m1")
    run.put(b"m2")
    steps = queue.snapshot()
    next(steps)
    run.disk.fail("pwrite", errno.ENOSPC)
    run.take()
    run.disk.heal()
    run.mq.exhaust(steps)
    upkeep(queue)
    queue.log.sync_marks()
    run.kill()
    run.start()
    run.waits(b"m2")


@case("c2", ("        self._with_space(self._snapshot_or_full)\n", ""))
def a_start_that_stays_clean(run: Run) -> None:
    """After a clean stop no gap is left between ids. The next start puts a message, whose id is
    told, and the power goes before it is on disk. If the marks still told of the clean stop, the
    start after that would give the same id to another message."""
    run.start()
    run.stop()
    run.start(fsync="no")
    run.put(b"m1")
    run.cut()
    run.start()
    run.put(b"m2")
    run.waits(b"m2")


@case("c4", ("                    if leads_to(path, fd):\n"
             "                        self.storage.unlink(path)\n",
             "                    pass\n"),
      partners=("f2",))
def a_segment_without_space(run: Run) -> None:
    """The disk is full when the next segment is made: its name is there, its header is not. If
    the name stayed, and no other number was tried, there would never be a next segment, and the
    space of this one would never come back."""
    queue = run.start()
    run.put(b"m1")
    run.take()
    run.disk.fail("pwrite", errno.ENOSPC)
    try_to_compact(run, queue)
    run.disk.heal()
    try_to_compact(run, queue)
    run.put(b"m2")
    run.is_free()
    run.waits(b"m2")


@case("f2", ("            except FileExistsError:          # another node's, perhaps\n"
             "                self.prove_lock()\n"
             "                self.highest += 1\n",
             "            except FileExistsError:\n"
             "                raise\n"))
def a_name_that_is_taken(run: Run) -> None:
    """As above, but the disk is so full that the name cannot be removed either, as on btrfs. The
    next number is taken, or there would never be a next segment."""
    queue = run.start()
    run.put(b"m1")
    run.take()
    run.disk.fail("pwrite", errno.ENOSPC)
    run.disk.fail("unlink", errno.ENOSPC)
    try_to_compact(run, queue)
    run.disk.heal()
    try_to_compact(run, queue)
    run.put(b"m2")
    run.is_free()
    run.kill()
    run.start()
    run.waits(b"m2")


def try_to_compact(run: Run, queue: Any) -> None:
    with contextlib.suppress(run.mq.CompactionFailed):
        compact(queue)


@case("d1",
      ('        self.highest = max([self.highest, head["highest"],\n',
       '        max([self.highest, head["highest"],\n'),
      partners=("f6", "c2"))
def a_purge_in_a_segment_that_is_lost(run: Run) -> None:
    """Without syncs of the data, messages go into segment 1, a purge says so in the marks, and
    the power goes: the purge is on disk, segment 1 has its header only, like one that was made
    ready and never used. The start removes it. If it gave its number again, and served behind
    the old marks, a new message would stand before the place that the purge names."""
    queue = run.start(fsync="no")
    snapshot(queue)
    run.put(b"1" + LARGE)
    queue.prepare()
    for number in b"234":
        run.put(bytes([number]) + LARGE)
    queue.purge()
    queue.log.sync_marks()
    run.cut()
    run.start()
    run.put(b"m5")
    run.kill()
    run.start()
    run.waits(b"m5")


case("f6",
     ("        self.highest = max([0, *numbers])\n", "        self.highest = 0\n"),
     ("            log.rewrite(start)\n",
      "            log.remove_unused()\n            log.rewrite(start)\n"),
     partners=("d1", "c2"))(a_purge_in_a_segment_that_is_lost)


@case("d2", ("            self.log.sync()                  # the current one's start tells",
             "            pass                             # the current one's start tells"))
def the_next_id_is_told_by_a_start(run: Run) -> None:
    """All messages are settled and their segment is freed; the power goes before the marks were
    synced. What their ids were is told by the start record of the new segment alone: if that was
    lost as well, ids would be used again. (The gap that a start leaves is small here: it covers
    16 million of them.)"""
    run.mq.ID_GAP = 1
    queue = run.start()
    for number in b"123":
        run.put(b"m%c" % number)
    run.take(3)
    compact(queue)
    run.cut("data.log")
    run.start()
    run.put(b"m4")
    run.waits(b"m4")


@case("e1",
      ("return self.state.copies.get(number, 0) <= self._snapshot_tail", "return True"))
def freed_behind_an_old_snapshot(run: Run) -> None:
    """The snapshot on disk is from before the first take. Of three messages the first is in a
    consumer's hands, the others are settled; it is copied, and the segment is freed. A start
    from that snapshot cannot tell any more, when it meets the mark of the others, that the first
    was not settled: its record is gone, and its copy looks like one of what is."""
    queue = run.start()
    for number in b"123":
        run.put(b"m%c" % number)
    run.lease()
    run.take(2)
    queue.log.sync_marks()
    compact(queue)
    run.cut("data.log")
    run.start()
    run.waits(b"m1")


@case("e2", ("self._covered, self._snapshot_tail = covered, tail",
             "self._covered, self._snapshot_tail = covered, self.log.tail"))
def freed_behind_a_snapshot_that_was_frozen_before(run: Run) -> None:
    """As above, but a snapshot was begun before the first take and is done behind the copy: it
    does not know the copy either."""
    queue = run.start()
    for number in b"123":
        run.put(b"m%c" % number)
    snapshot_steps = queue.snapshot()
    next(snapshot_steps)
    run.lease()
    run.take(2)
    steps = queue.compact()
    until_copied(queue, steps)
    run.mq.exhaust(snapshot_steps)
    run.mq.exhaust(steps)
    run.cut("data.log")
    run.start()
    run.waits(b"m1")


@case("f1", ("            self._with_space(lambda: log.begin_anew(state.start))\n", ""))
def the_gap_is_told_by_a_start(run: Run) -> None:
    """A start after a power cut leaves a gap of ids, a message gets the first id behind it, and
    the power goes again before it is on disk; then the marks are deleted. That ids behind the
    gap were told to somebody only the start record of the new segment knows."""
    run.start(fsync="no")
    run.cut()
    run.start(fsync="no")
    run.put(b"m1")
    run.cut()
    run.delete_marks()
    run.start()
    run.put(b"m2")
    run.waits(b"m2")


@case("g1",
      ("            self._puts.append(put)           # last: what raises is not told again\n",
       "            self._puts.append(put)\n"
       "            self._given = [*getattr(self, '_given', []), self.state.next_id]\n"
       "            self.state.see_id(self.state.next_id + len(put.payloads) - 1)\n"),
      ("            firsts.append(next_id)\n",
       "            next_id = self._given.pop(0)\n            firsts.append(next_id)\n"))
def taken_before_the_round_ends(run: Run) -> None:
    """In one round a message is put, and somebody else finds the queue empty: his cursor comes
    to the end, behind all ids that were given. The put is written at the end of the round. If it
    had its id before, it would stand behind that cursor and never be seen."""
    queue = run.start(staging=set())
    queue.stage(run.mq.Put([b"m1"], 0, lambda id_: run.tell(id_, b"m1")))
    run.waits()
    queue.flush()
    run.waits(b"m1")


@case("f3", ("                    self.write_first(segment, None)\n"
             "                    self.prove_lock()\n",
             "                    self.write_first(segment, None)\n"))
def a_segment_made_without_the_lock(run: Run) -> None:
    """A node has just made a segment when it hangs and loses its locks; another one takes over,
    and removes what holds no message. The first one goes on: the new file is its own, so that it
    can lock it, go on in it and answer, for a message that nobody will find."""
    old, told = run.start(), []
    run.put(LARGE)
    real = run.disk.open

    def late(path: str, *arguments: int) -> int:
        run.disk.open = real
        fd: int = real(path, *arguments)
        run.lose_the_lock(old)
        run.start()
        run.put(b"m2")
        return fd
    run.disk.open = late
    with contextlib.suppress(run.mq.LogFailed):
        old.log.make_ready()
        old.log.rotate(old.state.start)
        old.put([b"late"])
        told.append(b"late")
    run.kill()
    run.start()
    run.waits(LARGE, b"m2", *told)


@case("f3", ("                self.prove_lock()\n                self.storage.rename(path,",
             "                self.storage.rename(path,"))
def marks_made_without_the_lock(run: Run) -> None:
    """A node lost its locks, and another one serves, where a message is settled. Now the old one
    writes a snapshot: the file is new, its own and locked. If that got the name, the message would
    be back, were the new node killed before it looks."""
    old = run.start()
    run.put(b"m1")
    run.put(b"m2")
    run.lose_the_lock(old)
    queue = run.start()
    run.take()
    queue.log.sync_marks()
    with contextlib.suppress(run.mq.LogFailed):
        snapshot(old)
    run.kill()
    run.start()
    run.waits(b"m2")


@case("f4", ('        return f"{self.file(name)}.{secrets.token_hex(8)}.tmp"',
             '        return f"{self.file(name)}.{\'0\' * 16}.tmp"'))
def a_rename_that_comes_late(run: Run) -> None:
    """A node has just proven its lock, and is about to rename its new marks, when it hangs;
    another one takes over, and writes marks of its own. Were they of the same name, the old
    node's rename would give it to them before they are whole."""
    old = run.start()
    for number in b"123":
        run.put(b"m%c" % number)
    run.mq.SNAPSHOT_WORK_S = 0
    rename = run.disk.rename

    def late(source: str, target: str) -> None:
        run.disk.rename = rename
        run.lose_the_lock(old)
        queue = run.start()
        run.take()
        run.lease()
        queue.log.sync_marks()
        steps = queue.snapshot()
        next(steps)                          # one line of it
        try:
            rename(source, target)
        finally:
            run.kill()
    run.disk.rename = late
    with contextlib.suppress(run.mq.LogFailed):
        snapshot(old)
    run.start()
    run.waits(b"m2", b"m3")


@case("g1", ("        self.flush()                         # what was put before",
             "        pass                                 # what was put before"))
def purged_in_its_round(run: Run) -> None:
    """In one round a message is put, then all is purged. The put is written first, or it would
    survive a purge that came behind it."""
    queue = run.start(staging=set())
    queue.stage(run.mq.Put([b"m1"], 0, lambda id_: run.tell(id_, b"m1")))
    queue.purge()
    queue.flush()
    run.waits()


@case("r1", ("            for id_ in gone:                 # it was settled",
             "            for id_ in ():                   # it was settled"))
def an_entry_that_was_freed(run: Run) -> None:
    """A snapshot has a message that was in a consumer's hands. It is acked, and its segment is
    freed; the power goes before the mark was synced. Nothing is left of the message: if the
    entry stayed, a queue of one message would be full of it."""
    queue = run.start(max_messages=1)
    run.put(b"m1")
    delivery = run.lease()
    snapshot(queue)
    queue.ack("", delivery.lease)
    compact(queue)
    run.cut("data.log")
    run.start(max_messages=1)
    run.put(b"m2")
    run.waits(b"m2")


@case("r2", ("            subscription.advance(subscription.early_id)      # out of segments",
             "            pass                             # out of segments"))
def a_cursor_that_was_freed(run: Run) -> None:
    """A snapshot has the cursor before a message. That is settled, its segment is freed, and the
    power goes before the mark was synced. If the cursor stayed in what is not there any more, the
    message would count as held: a queue of one message would be full of it."""
    queue = run.start(max_messages=1)
    run.put(b"m1")
    run.take()
    compact(queue)
    run.cut("data.log")
    run.start(max_messages=1)
    run.put(b"m2")
    run.waits(b"m2")


# ---- Running them -------------------------------------------------------------------------

def edits_of(*rules: str) -> List[Edit]:
    """Return what takes rules out: the first way of each."""
    ways = {case_.rule: case_.edits for case_ in reversed(CASES)}
    return [edit for rule in rules for edit in ways[rule]]


def module_of(source: str, edits: Collection[Edit]) -> Any:
    """Return the server up to its queues, with edits. Raises ValueError where one does not
    fit."""
    for old, new in edits:
        if source.count(old) != 1:
            raise ValueError(f"renew the patch: its old text stands {source.count(old)} times in "
                             f"micro_queue.py, not once:\n{old}")
        source = source.replace(old, new)
    module = types.ModuleType("micro_queue")
    exec(compile(source.partition(BEHIND)[0], "micro_queue.py", "exec"), vars(module))
    for name, value in SMALL.items():
        assert hasattr(module, name), name
        setattr(module, name, value)
    return module


def tell(story: Callable[[Run], None], mq: Any, base: str) -> List[str]:
    """Return what went wrong in a story."""
    folder = tempfile.mkdtemp(dir=base)
    run = Run(mq, folder)
    try:
        story(run)
    except Exception as error:               # a rule that is missing may show so as well
        run.faults.append(f"{type(error).__name__}: {error}")
    finally:
        run.end()
        shutil.rmtree(folder)
    return run.faults


def judge(case_: Case, source: str, base: str) -> Tuple[bool, str]:
    """Return whether a rule is kept and needed, and a line about it."""
    rule, partners = case_.rule, " and ".join(case_.partners)

    def faults_without(*edits: Edit) -> List[str]:
        return tell(case_.story, module_of(source, [*case_.pauses, *edits]), base)

    faults = faults_without()
    if faults:
        return False, f"{rule} FAULT with it: {'; '.join(faults)}"
    faults = faults_without(*edits_of(*case_.partners)) if partners else []
    if faults:
        return False, f"{rule} FAULT with it, without {partners}: {'; '.join(faults)}"
    faults = faults_without(*case_.edits, *edits_of(*case_.partners))
    without = f"it and {partners}" if partners else "it"
    if not faults:
        return False, f"{rule} FAULT without {without} nothing goes wrong"
    return True, f"{rule} good; without {without}: {faults[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=sorted(RULES), metavar="RULE")
    only = parser.parse_args().only
    assert {c.rule for c in CASES} == set(RULES)
    logging.disable(logging.CRITICAL)
    with open(SOURCE, encoding="utf-8") as file:
        source = file.read()
    good = True
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="mq-rules-", dir=shm) as base:
        for case_ in sorted(CASES, key=lambda c: c.rule):
            if only in (None, case_.rule):
                try:
                    kept, line = judge(case_, source, base)
                except ValueError as error:
                    kept, line = False, f"{case_.rule} FAULT {error}"
                good = good and kept
                print(line, flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
