#!/usr/bin/env python3
"""Break the server in one place at a time, and see that the tests notice.

    python3 .ci/mutants.py                           # all of them: under a minute
    python3 .ci/mutants.py --only lease              # those whose name has this word

A mutant is a patch of a copy of `micro_queue.py` and the tests each of which must fail with it;
one that runs into the time limit failed, for a lost wake-up shows so. First the same tests must
pass on the server as it is. A patch whose old text is not found, or found more than once, has
to be renewed: the code that it breaks was rewritten.

Exit code: 0 all good; 1 a test passes although the server is broken, fails although it is not,
or a patch does not fit; 2 usage.
"""
import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
from typing import List, NamedTuple, Optional, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES = "micro_queue.py", "test_micro_queue.py", "config.example.json", "README.md"
TIMEOUT_S = 30
ANSWER_S = "4"                   # how long a test waits for what, with a mutant, never comes
AT_ONCE = 2                      # tests


class Mutant(NamedTuple):
    """What is broken, by which (old text, new text), and the tests that must fail."""

    name: str
    edits: Tuple[Tuple[str, str], ...]
    tests: Tuple[str, ...]


MUTANTS = [
    Mutant("a crc that does not tell the place of its record", (
        ("crc = crc32(payload, crc32(checked, seed ^ position))",
         "crc = crc32(payload, crc32(checked, seed))"),
        ("if crc32(payload, crc32(data[at + 8:body], seed ^ (position + at))) != crc:",
         "if crc32(payload, crc32(data[at + 8:body], seed)) != crc:")), (
        "RecordTest.test_a_record_is_one_only_in_its_log_its_segment_and_its_place",)),
    Mutant("a crc that does not tell the log of its record", (
        ("return zlib.crc32(self.log_id, number)", "return number"),), (
        "RecordTest.test_a_record_is_one_only_in_its_log_its_segment_and_its_place",)),
    Mutant("a crc that does not tell the segment of its record", (
        ("return zlib.crc32(self.log_id, number)", "return zlib.crc32(self.log_id)"),), (
        "RecordTest.test_a_record_is_one_only_in_its_log_its_segment_and_its_place",)),
    Mutant("a crc that is not looked at", (
        ("if crc32(payload, crc32(data[at + 8:body], seed ^ (position + at))) != crc:",
         "if crc32(payload, crc32(data[at + 8:body], seed ^ (position + at))) == -1:"),), (
        "RecordTest.test_every_flipped_bit_is_seen",
        "RecoveryTest.test_every_flipped_byte_costs_only_the_record_it_hit")),
    Mutant("a line of the marks whose crc is not looked at", (
        ('if found != b"%d]\\n" % crc:', "if not found:"),), (
        "RecordTest.test_no_line_of_the_marks_is_read_that_is_damaged_or_elsewhere",)),
    Mutant("a line of the marks that may stand anywhere", (
        ("self.crc = zlib.crc32(text, self.crc)", "self.crc = self.crc"),
        ('return b"%b,%d]\\n" % (text, self.crc)',
         'return b"%b,%d]\\n" % (text, zlib.crc32(text, self.crc))'),
        ("        self.crc = crc\n        return text", "        return text")), (
        "RecordTest.test_no_line_of_the_marks_is_read_that_is_damaged_or_elsewhere",)),
    Mutant("a put that does not wait for its sync", (
        ("if marks or self.durable < number:", "if marks or self.durable < 0:"),
        ("(number is None or number > self.durable)", "number is None")), (
        "AppendTest.test_a_failing_sync_fails_every_waiter",
        "DurableServerTest.test_a_failed_sync_is_no_200",
        "CrashStateTest.test_no_power_cut_after_a_random_run_does_either")),
    Mutant("a sync that is left out", (
        ("self.storage.fdatasync(file.fd)\n        except", "pass\n        except"),), (
        "AppendTest.test_any_other_error_poisons_the_log",
        "DurableServerTest.test_a_failed_sync_is_no_200")),
    Mutant("a sync that counts for what was written after it began", (
        ("self.durable = max(self.durable, target)", "self.durable = self.appends"),), (
        "AppendTest.test_concurrent_puts_share_syncs_and_none_returns_before_its_own",)),
    Mutant("a failed sync that is forgotten", (
        ("            self.failure = failure\n", ""),), (
        "AppendTest.test_any_other_error_poisons_the_log",)),
    Mutant("a short write that is not cut off", (
        ("            self.storage.truncate(file.fd, file.end)\n"
         "            file.room = file.end\n        except",
         "            pass\n        except"),), (
        "AppendTest.test_a_full_disk_refuses_the_put_and_leaves_the_log_whole",)),
    Mutant("a start that serves before its snapshot", (
        ("        self._with_space(self._snapshot_or_full)\n", ""),), (
        "WorstDayTest.test_no_start_serves_before_its_snapshot_is_written",)),
    Mutant("a snapshot that pays for what it does not know", (
        ("self.owed -= owed", "self.owed = 0"),), (
        "AppendTest.test_only_a_snapshot_frozen_after_the_miss_pays_for_it",)),
    Mutant("a snapshot that forgets what was marked meanwhile", (
        ("while since < self.marks.end:", "while False:"),), (
        "AppendTest.test_what_was_marked_while_a_snapshot_was_written_is_in_it",)),
    Mutant("a frozen page that changes", (
        ("        self._ours.clear()\n        return list(", "        return list("),), (
        "EntriesTest.test_a_frozen_page_never_changes_again",)),
    Mutant("a mark that is applied where it is read", (
        ("while left and (left[0].tail <= after or after == position):", "while left:"),), (
        "ModelTest",)),
    Mutant("a segment that goes before its copies are known", (
        ("self.copies[moved >> SEGMENT_SHIFT] = message.offset + message.size", "pass"),), (
        "SegmentTest.test_a_segment_out_of_which_copies_went_goes_only_behind_a_snapshot",)),
    Mutant("a number of a segment that comes back", (
        ("        self.highest = max([0, *numbers])\n", "        self.highest = 0\n"),
        ('self.highest = max([self.highest, head["highest"],',
         'max([self.highest, head["highest"],')), (
        "SegmentTest.test_no_number_comes_back",)),
    Mutant("an id that is given again after a kill", (
        ("state.see_id(state.next_id + ID_GAP - 1)", "pass"),), (
        "RecoveryTest.test_ids_leave_a_gap_unless_the_stop_was_clean",)),
    Mutant("a cursor off by one", (
        ("self.cursor_id = last.id + 1", "self.cursor_id = last.id + 2"),), (
        "ModelTest", "SubscriberTest.test_positions_are_kept_by_restarts_and_compactions")),
    Mutant("a delivery that counts twice", (
        ("consumers.entries[id_][4] + 1 for", "consumers.entries[id_][4] + 2 for"),), (
        "ModelTest",)),
    Mutant("a lease that never ends", (
        ("if consumers.lease_deadlines.is_due(now_ms):",
         "if consumers.lease_deadlines.next_ms() <= 0:"),), (
        "ConsumptionTest.test_what_is_not_acked_in_time_comes_back_at_its_place",
        "WorstDayTest.test_who_waits_comes_before_who_comes_just_as_a_lease_ends")),
    Mutant("an ack that comes late and still counts", (
        ("if lease is None or lease.deadline_ms <= self.now_ms():", "if lease is None:"),), (
        "QueueTest.test_a_lease_is_over_in_time_whoever_looks_first",)),
    Mutant("a put that does not wake who waits", (
        ("self._touched.update(self._awaited)", "pass"),), (
        "WorstDayTest.test_an_answer_that_fails_fails_the_log_for_its_message_would_be_out_for_ever",
        "ConsumptionTest.test_those_who_wait_are_served_in_the_order_they_came")),
    Mutant("a message that comes back and does not wake who waits", (
        ("self._touched.add(subscriber)\n        if due_ms:", "if due_ms:"),), (
        "ModelTest",
        "ConsumptionTest.test_nacks_ends_of_leases_and_of_delays_wake_those_who_wait")),
    Mutant("a second consumer that is forgotten when the first is woken", (
        ("            if not consumers.waiters:\n                self._awaited.discard(name)",
         "            self._awaited.discard(name)"),), (
        "ModelTest", "ConsumptionTest.test_those_who_wait_are_served_in_the_order_they_came")),
    Mutant("a consumer that is answered twice", (
        ("del waiters[waiter.key]", "pass"),), (
        "ModelTest",)),
    Mutant("an ack that is answered before it is written", (
        ("        if broker.staging:\n            broker.end_round()\n        for",
         "        for"),), (
        "RoundsTest.test_a_put_and_an_ack_are_written_before_their_answer_a_take_behind_it",)),
    Mutant("a take that is settled though it could not leave", (
        ("(queue.settle if sent else queue.retry)(delivery)", "queue.settle(delivery)"),), (
        "RoundsTest.test_nothing_is_held_for_who_left",
        "FramingTest.test_a_client_that_does_not_take_its_answer_loses_the_message_to_the_next")),
    Mutant("a client that gets more than its share", (
        ("self.poll.share -= SHARE_BYTES // SHARE_REQUESTS", "pass"),), (
        "RoundsTest.test_who_pipelines_without_end_gets_a_share_of_each_round",)),
    Mutant("a client that is waited for though it hung up", (
        ("            self._hung_up = True\n            self.when_gone(self._when_gone)",
         "            self._hung_up = True"),), (
        "ConsumptionTest.test_a_hang_up_is_noticed_however_the_request_came",)),
    Mutant("a copy that forgets what came back", (
        ("subscription.entries.put(id_, message.offset, entry[2], entry[3], entry[4])",
         "subscription.entries.put(id_, message.offset, entry[2], entry[3], 0)"),), (
        "CompactionTest.test_delays_counts_and_other_subscribers_places_survive_a_copy",)),
    Mutant("a dead letter that is buried before it is safe", (
        ("consumers.dying.update(dict.fromkeys(ids))",
         "consumers.dying.update(dict.fromkeys(ids))\n"
         "            self._settle_runs_locked(consumers.subscription.name, ids)"),), (
        "ConsumptionTest.test_dead_letters_wait_where_they_are_while_the_disk_is_full",)),
]


def broken(source: str, mutant: Mutant) -> str:
    """Return the source with a mutant's edits. Raises ValueError where one does not fit."""
    for old, new in mutant.edits:
        if source.count(old) != 1:
            raise ValueError(f"renew the patch of {mutant.name!r}: its old text stands "
                             f"{source.count(old)} times in micro_queue.py, not once:\n{old}")
        source = source.replace(old, new)
    compile(source, "micro_queue.py", "exec")
    return source


def make_copy(folder: str, source: Optional[str] = None) -> str:
    """Copy what the tests need to `folder`, with another source of the server if given."""
    os.mkdir(folder)
    for name in FILES:
        shutil.copy(os.path.join(ROOT, name), folder)
    if source is not None:
        with open(os.path.join(folder, "micro_queue.py"), "w", encoding="utf-8") as file:
            file.write(source)
    return folder


def passes(folder: str, *tests: str) -> bool:
    """Tell whether all of these tests pass in a copy, in time."""
    command = [sys.executable, "-m", "unittest", "-f", *(f"test_micro_queue.{t}" for t in tests)]
    try:
        done = subprocess.run(command, cwd=folder, timeout=TIMEOUT_S, check=False,
                              env={**os.environ, "ANSWER_S": ANSWER_S}, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def survivors(base: str, source: str, mutants: List[Mutant]) -> List[str]:
    """Return what was not noticed, as lines."""
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        whole = make_copy(os.path.join(base, "whole"))
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        found = [f"fails although nothing is broken: {test}" for test, good in zip(
            tests, pool.map(lambda test: passes(whole, test), tests)) if not good]
        cases = [(mutant, test, make_copy(os.path.join(base, f"{number}-{test}"),
                                          broken(source, mutant)))
                 for number, mutant in enumerate(mutants) for test in mutant.tests]
        passed = pool.map(lambda case: passes(case[2], case[1]), cases)
        return found + [f"passes with {mutant.name}: {test}"
                        for (mutant, test, _), good in zip(cases, passed) if good]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD")
    mutants = [mutant for mutant in MUTANTS if parser.parse_args().only in mutant.name]
    with open(os.path.join(ROOT, "micro_queue.py"), encoding="utf-8") as file:
        source = file.read()
    with tempfile.TemporaryDirectory(prefix="mq-mutants-") as base:
        try:
            found = survivors(base, source, mutants)
        except ValueError as error:
            found = [str(error)]
    for line in found:
        print(f"FAULT {line}")
    print(f"mutants: {len(mutants)} ways to break the server, "
          f"{sum(len(mutant.tests) for mutant in mutants)} tests that must notice; "
          f"faults {len(found)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
