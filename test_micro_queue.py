"""Tests of micro_queue: standard library only, no sleeping on clocks. Run: python3 -m unittest"""
import contextlib
import dataclasses
import errno
import http.client
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zlib

import micro_queue as mq

HERE = os.path.dirname(os.path.abspath(__file__))
SERVER = os.path.join(HERE, "micro_queue.py")
POST = "aa9d7b0a-8bee-47e4-887c-bdb799533793"
GET = "bb9d7b0a-8bee-47e4-887c-bdb799533773"
OTHER = "cc9d7b0a-8bee-47e4-887c-bdb799533773"
ADMIN = "de9d7b0a-8bee-47e4-887c-bdb799533733"


def setUpModule():
    logging.disable(logging.CRITICAL)


def tearDownModule():
    logging.disable(logging.NOTSET)


class FakeClock(mq.Clock):
    def __init__(self):
        self.wall, self.passed = 1_700_000_000_000, 0

    def wall_ms(self):
        return self.wall + self.passed

    def monotonic_ms(self):
        return self.passed


class FailingStorage(mq.Storage):
    """Storage on which a named call fails with an errno, or writes only a part."""

    def __init__(self):
        self.failing = {}
        self.calls = []

    def _call(self, name, real, *args):
        self.calls.append(name)
        failure = self.failing.get(name)
        if failure == "short":
            real(args[0], args[1][:len(args[1]) // 2], args[2])
            return len(args[1]) // 2
        if failure:
            raise OSError(failure, os.strerror(failure))
        return real(*args)

    def pwrite(self, *args):
        return self._call("pwrite", os.pwrite, *args)

    def fdatasync(self, *args):
        return self._call("fdatasync", os.fdatasync, *args)

    def fsync(self, *args):
        return self._call("fsync", os.fsync, *args)

    def truncate(self, *args):
        return self._call("truncate", os.ftruncate, *args)

    def rename(self, *args):
        return self._call("rename", os.rename, *args)


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
        queue = mq.Queue(mq.QueueConfig(name="q"), self.folder(name),
                         **{"fsync": "no", **options})
        queue.log.lock()
        self.queues.append(queue)
        queue.recover()
        return queue

    def drop(self):
        """Let go of every queue as a kill would: nothing more is written."""
        for queue in self.queues:
            queue.log.close()
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

    def forget_bookmark(self, name="q"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.folder(name), "meta.json"))

    def put_meta(self, value, name="q"):
        os.makedirs(self.folder(name), exist_ok=True)
        with open(os.path.join(self.folder(name), "meta.json"), "w") as file:
            file.write(value if isinstance(value, str) else json.dumps(value))


def drain(queue, settle=True):
    """Take until the queue is empty; return [(id, payload)]."""
    found = []
    while True:
        delivery = queue.take()
        if delivery is None:
            return found
        found.extend((m.id, m.payload) for m in delivery.messages)
        if settle:
            queue.settle(delivery)


def payloads(queue):
    return [payload for _, payload in drain(queue)]


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
            (lambda c: c["queues"][0].update(ttl=5), "queues[0].ttl", "not supported yet"),
            (lambda c: c["queues"][0].update(kind="broadcast"), "queues[0].kind"),
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


# ---- Records ------------------------------------------------------------------------------

class RecordTest(unittest.TestCase):
    def test_a_record_is_one_only_in_its_log_and_at_its_offset(self):
        codec, other = mq.Codec.new(1), mq.Codec.new(1)
        record = mq.Record(mq.MESSAGE, 7, 1234, b"payload", 3, 500)
        data = codec.encode(record, 44)
        self.assertEqual(codec.size_at(data, 0), len(data))
        self.assertEqual(codec.decode(data, 0, len(data), 44), record)
        self.assertIsNone(codec.decode(data, 0, len(data), 45))
        self.assertIsNone(other.size_at(data, 0))

    def test_every_flipped_bit_is_seen(self):
        codec = mq.Codec.new(1)
        data = codec.encode(mq.Record(mq.MESSAGE, 7, 1234, b"payload"), 44)
        for bit in range(len(data) * 8):
            bad = bytearray(data)
            bad[bit // 8] ^= 1 << bit % 8
            size = codec.size_at(bytes(bad), 0)
            self.assertTrue(size != len(data)
                            or codec.decode(bytes(bad), 0, size, 44) is None)

    def test_a_header_is_read_back_and_guarded(self):
        header = mq.Codec.new(99).header()
        self.assertEqual(mq.Codec.of_header(header).next_id, 99)
        for at in range(len(header)):
            bad = bytearray(header)
            bad[at] ^= 0xFF
            self.assertIsNone(mq.Codec.of_header(bytes(bad)))


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
        queue.close()
        self.queues.clear()
        queue = self.open()
        self.assertEqual(queue.put([b"b"]), 2)
        queue = self.crash()
        self.assertGreater(queue.put([b"c"]), 2 + mq.ID_GAP - 1)

    def test_a_clean_mark_counts_once(self):
        queue = self.filled(b"a")
        queue.close()
        self.queues.clear()
        self.open()
        self.assertGreater(self.crash().put([b"b"]), mq.ID_GAP)

    def test_a_log_cut_at_every_byte_keeps_all_whole_records(self):
        queue = self.filled(b"one", b"two", b"three")
        settled_one = queue.take()
        queue.settle(settled_one)
        queue.put([b"four"])
        queue.close()
        self.queues.clear()
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
        queue = self.filled(b"one", b"two", b"three", b"four")
        queue.close()
        self.queues.clear()
        data = self.read_log()
        scan = self.open()
        spans = [(o, e, r) for o, e, r in scan.log.scan(mq.HEADER.size, len(data))]
        self.drop()
        for at in range(mq.HEADER.size, len(data)):
            bad = bytearray(data)
            bad[at] ^= 0xFF
            self.write_log(bytes(bad))
            self.forget_bookmark()
            left = [r.payload for o, e, r in spans if r.type == mq.MESSAGE and not o <= at < e]
            self.assertEqual(payloads(self.crash()), left, at)
        self.drop()
        names = [name for name in os.listdir(self.folder()) if "corrupt" in name]
        self.assertEqual(len(names), len(spans))

    def test_a_flipped_header_is_refused_and_nothing_is_touched(self):
        self.filled(b"one").close()
        self.queues.clear()
        data = self.read_log()
        for at in range(mq.HEADER.size):
            bad = bytearray(data)
            bad[at] ^= data[at] if at == 0 else 0xFF     # a zero first, as a Go log has it
            self.write_log(bytes(bad))
            with self.assertRaises(mq.StorageError):
                self.open()
            self.drop()
            self.assertEqual(self.read_log(), bytes(bad))

    def test_tails_that_are_no_records_are_cut(self):
        queue = self.filled(b"one", b"two")
        inner = self.read_log()[mq.HEADER.size:]
        queue.put([inner])                   # a payload that holds valid records
        queue.close()
        self.queues.clear()
        good = self.read_log()
        other = self.filled(b"other", name="other")
        other.close()
        self.queues.clear()
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
            found = drain(queue, settle=False)
            self.assertEqual([p for _, p in found], wanted)
            self.drop()

    def test_delivery_counts_survive_and_a_message_returns_to_its_place(self):
        queue = self.filled(b"a", b"b")
        queue.retry(queue.take())
        first = self.crash().take().messages[0]
        self.assertEqual((first.payload, first.delivery), (b"a", 2))

    def test_a_message_damaged_after_the_start_is_set_aside_not_delivered(self):
        queue = self.filled(b"aaaa", b"bbbb")
        at = self.read_log().index(b"aaaa")
        with open(self.log_path(), "r+b") as file:
            file.seek(at)
            file.write(b"XXXX")
        self.assertEqual(payloads(queue), [b"bbbb"])
        self.assertEqual(queue.log.corrupt_records, 1)

    def test_time_does_not_go_back_with_the_wall_clock(self):
        clock = FakeClock()
        queue = self.filled(b"a", clock=clock)
        clock.wall -= 10_000_000
        queue = self.crash(clock=clock)
        self.assertGreaterEqual(queue.now_ms(), queue.state.time_ms)
        self.assertEqual(queue.oldest_age_s_locked(queue.state.subscriptions[""]), 0)


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
            storage = FailingStorage()
            storage.failing[call] = errno.EIO
            with self.assertRaises((OSError, mq.CompactionFailed)):
                self.open(storage=storage)
            self.drop()
            self.assertEqual(payloads(self.open()), [b"two"])
            self.drop()


class AppendTest(Folder):
    def test_a_full_disk_refuses_the_put_and_leaves_the_log_whole(self):
        for failure in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, "short"):
            storage = FailingStorage()
            queue = self.filled(b"one", storage=storage)
            before = self.read_log()
            storage.failing["pwrite"] = failure
            with self.assertRaises(mq.ApiError) as caught:
                queue.put([b"two"])
            self.assertEqual(caught.exception.status, 503)
            self.assertEqual(self.read_log(), before)
            queue.settle(queue.take())       # takes go on, in memory
            self.assertEqual(payloads(queue), [])
            storage.failing.clear()
            self.assertTrue(queue.wants_compaction())
            queue.compact()                  # what memory knew is in the log now
            queue.put([b"three"])
            self.assertEqual(payloads(self.crash()), [b"three"])
            self.drop()
            shutil.rmtree(self.folder())

    def test_any_other_error_poisons_the_log(self):
        for call, failure in (("pwrite", errno.EIO), ("fdatasync", errno.EIO),
                              ("pwrite", errno.ESTALE), ("fdatasync", errno.ENOSPC)):
            storage = FailingStorage()
            queue = self.filled(b"one", fsync="always", storage=storage)
            storage.failing[call] = failure
            with self.assertRaises(mq.LogFailed):
                queue.put([b"two"])
            storage.failing.clear()
            del storage.calls[:]
            with self.assertRaises(mq.LogFailed):
                queue.put([b"three"])
            with self.assertRaises(mq.LogFailed):
                queue.settle(queue.take())
            self.assertEqual([c for c in storage.calls if c != "pread"], [])
            self.drop()
            shutil.rmtree(self.folder())

    def test_a_failed_truncate_after_a_full_disk_poisons_the_log(self):
        storage = FailingStorage()
        queue = self.filled(b"one", storage=storage)
        storage.failing.update(pwrite="short", truncate=errno.EIO)
        with self.assertRaises(mq.LogFailed):
            queue.put([b"two"])

    def test_concurrent_puts_share_syncs_and_none_returns_before_its_own(self):
        class Slow(FailingStorage):
            def fdatasync(self, fd):
                size = os.fstat(fd).st_size
                time.sleep(0.005)
                super().fdatasync(fd)
                self.synced = size

        storage = Slow()
        queue = self.open(fsync="always", storage=storage)
        late = []

        def produce():
            for _ in range(10):
                first, number = queue.append([b"x"])
                end = queue.log.tail
                queue.log.wait_durable(number)
                if queue.log.durable < number:
                    late.append((first, end))

        threads = [threading.Thread(target=produce) for _ in range(16)]
        before = queue.log.syncs
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(late, [])
        self.assertLess(queue.log.syncs - before, 160)

    def test_a_failing_sync_fails_every_waiter(self):
        storage = FailingStorage()
        queue = self.open(fsync="always", storage=storage)
        storage.failing["fdatasync"] = errno.EIO
        failures = []

        def produce():
            try:
                queue.put([b"x"])
            except mq.LogFailed:
                failures.append(1)

        threads = [threading.Thread(target=produce) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len(failures), 8)


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
        self.open().close()
        self.queues.clear()
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
        counts = queue.counts_locked(queue.state.subscriptions[""])
        self.assertEqual(counts, {"ready": 1, "leased": 0, "delayed": 1})
        self.assertEqual(queue.take().messages[0].payload, b"now")
        self.assertIsNone(queue.take())
        clock.passed += 10_000
        self.assertEqual(queue.take().messages[0].payload, b"late")

    def test_a_delay_survives_a_restart(self):
        clock = FakeClock()
        queue = self.open(clock=clock)
        queue.put([b"late"], delay_s=10)
        delivery = self.filled(b"x", name="other", clock=clock).take()
        self.queues[1].retry(delivery, 20)
        self.drop()
        one, other = self.open(clock=clock), self.open("other", clock=clock)
        self.assertIsNone(one.take())
        clock.passed += 10_000
        self.assertIsNotNone(one.take())
        self.assertIsNone(other.take())
        clock.passed += 10_000
        self.assertIsNotNone(other.take())

    def test_a_late_word_on_what_is_gone_does_nothing(self):
        queue = self.filled(b"a")
        delivery = queue.take()
        queue.settle(delivery)
        size = queue.log.tail
        queue.settle(delivery)
        queue.retry(delivery)
        self.assertEqual(queue.log.tail, size)
        self.assertEqual(queue.out_total, 1)

    def test_memory_does_not_grow_with_the_backlog(self):
        queue = self.open()
        queue.put([b"x" * 100] * 5000)
        queue.take()
        subscription = queue.state.subscriptions[""]
        self.assertEqual(len(subscription.entries), 1)
        self.assertLess(len(subscription._ahead), 200)
        self.assertEqual(subscription.ready_count, 4999)

    def test_operations_agree_with_a_model_through_crashes_and_compactions(self):
        for seed in range(4):
            self.run_model(random.Random(seed))
            self.drop()
            shutil.rmtree(self.folder())

    def run_model(self, rng):
        clock = FakeClock()
        queue = self.open(clock=clock)
        waiting, out, serial = {}, [], 0     # id: [payload, deliveries, due_ms]
        for step in range(600):
            clock.passed += rng.randrange(50)
            dice = rng.random()
            if dice < 0.35:
                batch = [b"%d" % (serial + n) for n in range(rng.choice((1, 1, 1, 5)))]
                serial += len(batch)
                delay_s = rng.choice((0, 0, 0, 1))
                first = queue.put(batch, delay_s)
                due = queue.now_ms() + delay_s * 1000 if delay_s else 0
                waiting.update({first + n: [p, 0, due] for n, p in enumerate(batch)})
            elif dice < 0.65:
                delivery = queue.take()
                ready = [i for i in sorted(waiting) if waiting[i][2] <= queue.now_ms()]
                self.assertEqual(delivery is None, not ready, step)
                if delivery:
                    message = delivery.messages[0]
                    payload, count, _ = waiting.pop(ready[0])
                    self.assertEqual((message.id, message.payload, message.delivery),
                                     (ready[0], payload, count + 1))
                    out.append((delivery, count + 1))
            elif dice < 0.9 and out:
                delivery, count = out.pop(rng.randrange(len(out)))
                message = delivery.messages[0]
                if rng.random() < 0.6:
                    queue.settle(delivery)
                else:
                    delay_s = rng.choice((0, 1))
                    due = queue.now_ms() + delay_s * 1000 if delay_s else 0
                    queue.retry(delivery, delay_s)
                    waiting[message.id] = [message.payload, count, due]
            elif dice < 0.94:
                queue.compact()
            elif dice < 0.96:
                queue.bookmark()
            elif dice > 0.98:
                for delivery, count in out:  # leases end; this delivery was not written down
                    message = delivery.messages[0]
                    waiting[message.id] = [message.payload, count - 1, 0]
                out.clear()
                queue = self.crash(clock=clock)
            self.assertEqual(queue.state.held()[0], len(waiting) + len(out), step)


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
            while not stop.is_set():
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

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            queue.compact(lambda: time.sleep(0.0001))
        stop.set()
        for thread in threads:
            thread.join()
        taken += payloads(self.crash())
        self.assertEqual(sorted(taken), [b"%05d" % n for n in range(puts[0])])

    def test_any_failure_before_the_rename_keeps_the_old_log(self):
        for call, failure in (("fsync", errno.EIO), ("pwrite", errno.ENOSPC),
                              ("pwrite", errno.EIO), ("rename", errno.EIO)):
            storage = FailingStorage()
            queue = self.filled(b"a", b"b", storage=storage)
            queue.settle(queue.take())
            storage.failing[call] = failure
            with self.assertRaises(mq.CompactionFailed):
                queue.compact()
            storage.failing.clear()
            self.assertFalse(os.path.exists(self.log_path() + ".tmp"))
            queue.put([b"c"])
            self.assertEqual(payloads(self.crash()), [b"b", b"c"])
            self.drop()
            shutil.rmtree(self.folder())

    def test_a_log_that_was_removed_is_put_back(self):
        queue = self.filled(b"a", b"b")
        os.unlink(self.log_path())
        self.assertTrue(queue.wants_compaction())
        queue.compact()
        self.assertEqual(payloads(self.crash()), [b"a", b"b"])
