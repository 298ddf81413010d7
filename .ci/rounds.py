#!/usr/bin/env python3
"""Kill a busy server again and again; prove that no message is lost, made up or given twice.

    python3 .ci/rounds.py                            # some rounds: a look, for CI
    python3 .ci/rounds.py --rounds 100 --seed 7
    python3 .ci/rounds.py --long                     # 250 rounds

A round starts the server on the folder that the last one left, lets 16 producers and 16
consumers at it while it compacts without end, and ends it within 0.6 s: with SIGKILL, now and
then with SIGTERM. Three rounds of four have the sizes of small.py, so that a kill meets changes
of segments, cleanings, removals and snapshots. What the clients saw goes into the tests' Ledger;
every 20 rounds, and at the end, one consumer takes all that is left, the Ledger judges, and the
folder must become small. An answer to a consumer tells that what the same connection was given
before is settled; what a broken connection was given may be settled or come again; a put without
an answer may be in the queue or not.

Needs Python 3.9. The folder is made in ROUNDS_DIR (default /var/tmp, which should be a disk;
without a disk's room ahead: /dev/shm). The seed fixes sizes, moments and ends of the rounds, not
how threads take turns. Exit code: 0 all good; 1 a fault, the folder is kept; 2 usage.
"""
import argparse
import contextlib
import functools
import itertools
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
import zlib
from typing import Callable, List

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from test_micro_queue import (  # noqa: E402
    LATE_S, QUEUE, SERVER, Answer, Client, Fault, Ledger, ServerProcess, count_faults, eventually)

ROUNDS_DIR = os.environ.get("ROUNDS_DIR", "/var/tmp")
SHORT, LONG = 8, 250             # rounds
CLIENTS = 16                     # producers, and as many consumers
SERVING_S = 0.05, 0.6            # how long a round may last
STOP_EVERY = 6                   # one round of so many ends with SIGTERM
DRAIN_EVERY = 20
SMALL = os.path.join(ROOT, ".ci", "small.py")
PROGRAMS = SMALL, SMALL, SMALL, SERVER
EMPTY_BYTES = 512 << 10          # an empty queue's files, with the sizes of small.py
PACES_S = 0.0, 0.0, 0.01, 0.05   # a round's pause after a take: with one, a backlog builds up
EMPTY_S = 0.003                  # a pause after an empty queue's answer
LARGE_EVERY = 100                # one message of so many is large
SMALL_BYTES, LARGE_BYTES = (20, 2_000), (10_000, 200_000)
TIMEOUT_S = 60
BAD_EVENTS = "Traceback", "CRITICAL", "corrupt_record", "compaction_failed"
STOPPING_EVENT = f'compaction_failed queue={QUEUE} error="the server is stopping"'

FILLER = random.Random(0).randbytes(1 << 19)
NAME = re.compile(rb"<(\d+)>")


def message(number: int) -> bytes:
    """Return the message of a number: its name and bytes of its own."""
    name = b"<%d>" % number
    random_bits = zlib.crc32(name)
    low, high = SMALL_BYTES if random_bits % LARGE_EVERY else LARGE_BYTES
    size, start = low + random_bits // LARGE_EVERY % (high - low), random_bits % len(FILLER) // 2
    return name + FILLER[start:start + size]


def name_of(body: bytes) -> bytes:
    """Return the name of a message; what is not as it was put gets another."""
    name = NAME.match(body)
    good = name is not None and message(int(name[1])) == body
    return name[0] if name and good else b"altered: " + body[:100]


class Rounds:
    """The folder, its server, and what is known of the messages.

    `stopping` is set before a server is told to stop: from then on it may answer 503.
    """

    def __init__(self, base: str, seed: int) -> None:
        self.base = base
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self.ledger = Ledger(LATE_S)
        self.kills = self.stops = self.compactions = 0
        self.unexpected: List[str] = []
        self.stopping = False

    # -- the server

    def start(self, program: str = SERVER) -> ServerProcess:
        self.stopping = False
        return ServerProcess(self.base, program=(program,), settings={
            "fsync": "always", "min_free_bytes": 0}).wait_ready()

    def stop(self, server: ServerProcess) -> None:
        """Stop cleanly."""
        self.stopping = True
        self.stops += 1
        if server.stop():
            self.unexpected.append(f"exit {server.process.returncode} after SIGTERM")

    def kill(self, server: ServerProcess) -> None:
        self.kills += 1
        if server.process.poll() is not None:
            self.unexpected.append(f"exit {server.process.returncode} without a reason")
        server.kill()

    def end(self, server: ServerProcess) -> None:
        """The server ended: note that, and what it wrote."""
        self.ledger.fault(power_cut=False)
        text = server.stderr().replace(STOPPING_EVENT, "")
        self.unexpected += [f"{word} on stderr" for word in BAD_EVENTS if word in text]

    def file_bytes(self, server: ServerProcess) -> int:
        """Return how long the segments are, room ahead included."""
        folder, total = os.path.join(server.path, QUEUE), 0
        for name in os.listdir(folder):
            if name.endswith(".log"):        # a torn tail that was saved stays
                with contextlib.suppress(FileNotFoundError):
                    total += os.stat(os.path.join(folder, name)).st_size
        return total

    # -- clients

    def produce(self, client: Client) -> None:
        while True:
            answer = client.put(message(next(self._numbers)))
            if answer.status != 200:
                self._expect_stopping(answer)

    def consume(self, client: Client, pace_s: float) -> None:
        while True:
            answer = client.take()
            if answer.status == 404:
                time.sleep(EMPTY_S)
            elif answer.status != 200:
                self._expect_stopping(answer)
            elif pace_s:
                time.sleep(pace_s)

    def work(self, client: Client, pace_s: float) -> None:
        """Wait for messages, hold each on a lease, ack most and give some back."""
        for number in itertools.count():
            answer = client.lease(600, wait_s=5)
            if answer.status == 200:
                time.sleep(pace_s)
                answer = client.end("ack" if number % 8 else "nack", answer.headers["Lease-Id"])
            if answer.status not in (200, 404):
                self._expect_stopping(answer)

    def compact(self, client: Client) -> None:
        while True:
            answer = client.wire.ask("GET", f"/compact/{QUEUE}")
            if answer.status == 200:
                self.compactions += 1
            else:
                self._expect_stopping(answer)

    def _expect_stopping(self, answer: Answer) -> None:
        if answer.status != 503 or not self.stopping:
            self.unexpected.append(f"answer {answer.status}: {answer.body[:100]!r}")

    def client(self, server: ServerProcess, work: Callable[[Client], None],
               name: str) -> threading.Thread:
        """Start a thread that works on a connection of its own until that ends."""
        def run() -> None:
            try:
                with server.wire(TIMEOUT_S) as wire:
                    work(Client(wire, self.ledger, name, name_of))
            except socket.timeout:
                self.unexpected.append(f"no answer within {TIMEOUT_S} s")
            except OSError:
                pass                         # the server ended
            except Exception:
                self.unexpected.append(traceback.format_exc())
        thread = threading.Thread(target=run)
        thread.start()
        return thread

    # -- rounds

    def run(self) -> None:
        """Serve for a moment, with all clients, and end."""
        server = self.start(self._random.choice(PROGRAMS))
        pace_s = self._random.choice(PACES_S)
        threads = [self.client(server, self.compact, "compact")]
        for number in range(CLIENTS):
            consume = self.work if number % 2 else self.consume
            threads.append(self.client(server, self.produce, f"p{number}"))
            threads.append(self.client(server, functools.partial(consume, pace_s=pace_s),
                                       f"c{number}"))
        time.sleep(self._random.uniform(*SERVING_S))
        (self.kill if self._random.randrange(STOP_EVERY) else self.stop)(server)
        for thread in threads:
            thread.join()
        self.end(server)

    def drain(self) -> List[str]:
        """Take all that is left; return every fault so far."""
        server = self.start(SMALL)
        with server.wire(TIMEOUT_S) as wire:
            Client(wire, self.ledger, key=name_of).drain()
        eventually(lambda: self.file_bytes(server) <= EMPTY_BYTES, TIMEOUT_S,
                   "the files of an empty queue did not go", pause_s=0.05)
        self.stop(server)
        self.end(server)
        return self.faults()

    def faults(self, drained: bool = True) -> List[str]:
        return self.ledger.faults(drained) + [f"unexpected: {line}" for line in self.unexpected]


def run_all(rounds: Rounds, count: int) -> List[str]:
    """Run until a fault is found; return the faults."""
    for number in range(1, count + 1):
        rounds.run()
        found = rounds.faults(drained=False)
        if not found and (number % DRAIN_EVERY == 0 or number == count):
            found = rounds.drain()
            print(f"  {number} rounds: {rounds.ledger}", file=sys.stderr, flush=True)
        if found:
            print(f"FAULT in round {number}")
            return found
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, metavar="N", help=f"by default {SHORT}")
    parser.add_argument("--long", action="store_true", help=f"{LONG} rounds")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    arguments = parser.parse_args()
    count = arguments.rounds or (LONG if arguments.long else SHORT)
    print(f"seed {arguments.seed}", flush=True)
    base = tempfile.mkdtemp(prefix="mq-rounds-", dir=ROUNDS_DIR)
    rounds, found = Rounds(base, arguments.seed), ["unexpected: the harness ended"]
    try:
        found = run_all(rounds, count)
    except Fault as error:
        found = [f"unexpected: {error}"]
    finally:
        ServerProcess.kill_all()
        if not found:
            shutil.rmtree(base)
    for line in found[:20]:
        print(f"    {line}")
    if found:
        print(f"    {len(found)} in all, seed {arguments.seed}; folder {base}")
    print(f"rounds: {rounds.kills} kills, {rounds.stops} clean stops, {rounds.compactions} "
          f"compactions; {rounds.ledger}; {count_faults(found)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
