#!/usr/bin/env python3
"""A steady load for a long time on a server of the real sizes: does it keep what it promises?

    python3 .ci/soak.py 60                           # minutes; also .ci/torture --soak 60

Some producers and consumers on a fifo queue, of which a part is delayed, by up to days; a
broadcast queue with a subscriber that keeps up, a slow one, and one that stopped and comes back
at the end. The server's clock runs 720 times as fast as ours, so that days of delays end within
minutes. Checked all the time: the folder is under twice what is held plus 64 MiB; nobody waits
longer than 250 ms besides what syncs take, which are measured beside it on the same disk. At
the end all is taken, and a Ledger for each subscriber judges.

Needs Python 3.9. The folder is made in ROUNDS_DIR (default /var/tmp). Exit code: 0 all good; 1 a
fault, the folder is kept; 2 usage.
"""
import collections
import contextlib
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from typing import Any, Callable, Deque, Dict, List, Tuple

from rounds import message, name_of
from test_micro_queue import ADMIN, Fault, Ledger, ServerProcess, Wire, count_faults

FIFO, BROADCAST = "fetcher", "news"
SPEED = 720
FAST_CLOCK = f"""
import sys, time
sys.path.insert(0, {os.path.dirname(os.path.dirname(os.path.abspath(__file__)))!r})
import micro_queue as mq
wall, begin = int(time.time() * 1000), time.monotonic_ns()
fast = lambda self: (time.monotonic_ns() - begin) * {SPEED} // 1000000
mq.Clock.monotonic_ms, mq.Clock.wall_ms = fast, lambda self: wall + fast(self)
sys.exit(mq.main())
"""
SUBSCRIBERS = {"fast": "f" * 30, "slow": "s" * 30, "stopped": "t" * 30}
PAUSES_S = {"fast": 0.0, "slow": 0.02}
PUT_PAUSE_S = 0.005              # of each producer
DELAYED_EVERY = 20
MOST_BEYOND_S, SLACK_BYTES = 0.25, 64 << 20
CHECK_S = 2
PROBE_S = 0.05
TIMEOUT_S = 60


class Probe:
    """What an fdatasync takes on the same disk, measured without end by a thread."""

    def __init__(self, folder: str) -> None:
        self._fd = os.open(os.path.join(folder, "probe"), os.O_RDWR | os.O_CREAT, 0o600)
        self._found: Deque[Tuple[float, float]] = collections.deque(maxlen=10_000)
        self.longest_s, self.is_over = 0.0, threading.Event()
        threading.Thread(target=self._measure, daemon=True).start()

    def _measure(self) -> None:
        at = 0
        while not self.is_over.wait(PROBE_S):
            started = time.monotonic()
            os.pwrite(self._fd, bytes(4096), at)
            os.fdatasync(self._fd)
            ended, at = time.monotonic(), (at + 4096) % (1 << 24)
            self._found.append((ended, ended - started))
            self.longest_s = max(self.longest_s, ended - started)

    def longest_between(self, start: float, end: float) -> float:
        return max((took for ended, took in list(self._found)
                    if ended - took - PROBE_S <= end and ended >= start - PROBE_S), default=0.0)


class Soak:
    """The server, who works on it, and what was measured."""

    def __init__(self, base: str, minutes: float, seed: int) -> None:
        self.ends_at = time.monotonic() + 60 * minutes
        self._seconds, self._random = 60 * minutes, random.Random(seed)
        self.ledgers = {name: Ledger() for name in ("fifo", *SUBSCRIBERS)}
        self.server = ServerProcess(base, program=("-c", FAST_CLOCK), change=self._configure,
                                    settings={"fsync": "always"})
        self.folder, self.probe = self.server.path, Probe(base)
        self.unexpected: List[str] = []
        self.is_over, self._lock = threading.Event(), threading.Lock()
        self._number = 0
        self._put = dict.fromkeys((FIFO, BROADCAST), 0)          # bytes
        self._settled = dict.fromkeys(("fifo", *SUBSCRIBERS), 0)
        self.latest_s = self.latest_beyond_s = 0.0
        self.latest_what = "nothing"
        self.requests = self.most_bytes = self.most_beyond_bytes = self.rss = 0

    @staticmethod
    def _configure(config: Dict[str, Any]) -> None:
        config["queues"].append({"name": BROADCAST, "kind": "broadcast"})
        config["tokens"] += [{"name": name, "token": token, "get": [BROADCAST]}
                             for name, token in SUBSCRIBERS.items()]

    def ask(self, wire: Wire, *request: Any) -> Any:
        started = time.monotonic()
        answer = wire.ask(*request)
        took = time.monotonic() - started
        beyond = took - 2 * self.probe.longest_between(started, started + took)
        with self._lock:
            self.requests += 1
            self.latest_s = max(self.latest_s, took)
            if beyond > self.latest_beyond_s:
                self.latest_beyond_s = beyond
                self.latest_what = f"{request[:2]} at {time.strftime('%H:%M:%S')}"
        return answer

    # -- clients

    def produce(self, wire: Wire, queue: str) -> None:
        names = ["fifo"] if queue == FIFO else list(SUBSCRIBERS)
        while not self.is_over.wait(PUT_PAUSE_S):
            with self._lock:
                self._number += 1
                body = message(self._number)
                late = self._random.random()
            left_s = self.ends_at - time.monotonic()
            is_delayed = queue == FIFO and self._number % DELAYED_EVERY == 0
            delay_s = int(late * max(0, left_s - 10) * SPEED) if is_delayed else 0
            for name in names:
                self.ledgers[name].sending(name_of(body), delayed=delay_s > 0)
            answer = self.ask(wire, "POST", f"/in/{queue}?delay={min(delay_s, 2_592_000)}", body)
            if answer.status != 200:
                raise Fault(f"a put was answered {answer}")
            with self._lock:
                self._put[queue] += len(body) + 37
            for name in names:
                self.ledgers[name].accepted(name_of(body), answer.id)

    def consume(self, wire: Wire, name: str, consumer: str, until_empty: bool = False) -> None:
        queue, token = (FIFO, ADMIN) if name == "fifo" else (BROADCAST, SUBSCRIBERS[name])
        ledger = self.ledgers[name]
        while until_empty or not self.is_over.is_set():
            answer = self.ask(wire, "GET", f"/out/{queue}", b"", token)
            ledger.settled(consumer)
            if answer.status == 200:
                ledger.delivered(consumer, name_of(answer.body), answer.id, answer.count)
                with self._lock:
                    self._settled[name] += len(answer.body) + 37
            elif answer.status != 404:
                raise Fault(f"a take was answered {answer}")
            elif until_empty:
                return
            pause_s = PAUSES_S.get(name, 0.0) + 0.01 * (answer.status == 404)
            time.sleep(0 if until_empty else pause_s)

    def client(self, work: Callable[..., None], *arguments: Any) -> threading.Thread:
        def run() -> None:
            try:
                with self.server.wire(TIMEOUT_S) as wire:
                    work(wire, *arguments)
            except Exception:
                self.unexpected.append(traceback.format_exc())
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    # -- checks

    def held_bytes(self) -> int:
        with self._lock:
            return (self._put[FIFO] - self._settled["fifo"] + self._put[BROADCAST]
                    - min(self._settled[name] for name in SUBSCRIBERS))

    def check(self) -> None:
        held, size = self.held_bytes(), 0
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    size += os.stat(os.path.join(folder, name)).st_blocks * 512
        self.most_bytes = max(self.most_bytes, size)
        self.most_beyond_bytes = max(self.most_beyond_bytes, size - 2 * held)
        self.rss = max(self.rss, self.server.resident_bytes())
        if size > 2 * held + SLACK_BYTES:
            self.unexpected.append(f"the folder has {size} bytes, of which {held} are held")

    def run(self) -> None:
        self.server.wait_ready()
        threads = [self.client(self.produce, queue) for queue in (FIFO, FIFO, BROADCAST)]
        threads += [self.client(self.consume, "fifo", f"c{number}") for number in range(2)]
        threads += [self.client(self.consume, name, name) for name in PAUSES_S]
        while time.monotonic() < self.ends_at and not self.unexpected:
            time.sleep(CHECK_S)
            self.check()
        self.is_over.set()
        for thread in threads:
            thread.join()
        time.sleep(2)                        # for the last delays
        for name in self.ledgers:
            self.client(self.consume, name, f"{name}-drain", True).join()
        self.check()
        self.server.check_log()
        if self.server.stop() != 0:
            self.unexpected.append(f"status {self.server.process.returncode}")
        self.probe.is_over.set()
        if self.latest_beyond_s > MOST_BEYOND_S:
            self.unexpected.append(f"late: {self.latest_beyond_s:.3f} s beyond syncs, for "
                                   f"{self.latest_what}")

    def faults(self) -> List[str]:
        found = [f"unexpected: {line}" for line in self.unexpected]
        return found + [f"{line} ({name})" for name, ledger in self.ledgers.items()
                        for line in ledger.faults()]

    def __str__(self) -> str:
        return (f"{self.requests:,} requests; latest answer {self.latest_s * 1000:.0f} ms, beyond "
                f"two syncs {self.latest_beyond_s * 1000:.0f} ms (longest sync "
                f"{self.probe.longest_s * 1000:.0f} ms); folder up to {self.most_bytes >> 20} MiB, "
                f"beyond twice what is held {self.most_beyond_bytes >> 20} MiB; resident "
                f"{self.rss >> 20} MiB; {sum(self._put.values()) >> 20} MiB put")


def main() -> int:
    try:
        minutes = float(sys.argv[1])
    except (IndexError, ValueError):
        print("usage: [SEED=n] soak.py MINUTES", file=sys.stderr)
        return 2
    seed = int(os.environ.get("SEED", "1"))
    base = tempfile.mkdtemp(prefix="mq-soak-", dir=os.environ.get("ROUNDS_DIR", "/var/tmp"))
    soak, found = Soak(base, minutes, seed), ["unexpected: the harness ended"]
    try:
        soak.run()
        found = soak.faults()
    except Fault as error:
        found = [f"unexpected: {error}"]
    finally:
        ServerProcess.kill_all()
    for line in found[:20]:
        print(f"    {line}")
    print(f"soak of {minutes:g} minutes, seed {seed}: {soak}; {count_faults(found)}")
    if found:
        print(f"kept: {base}")
    else:
        shutil.rmtree(base)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
