#!/usr/bin/env python3
"""Kill a busy server again and again; prove that no message is lost, made up or given twice.

    python3 .ci/rounds.py                            # some rounds: a look, for CI
    python3 .ci/rounds.py --rounds 100 --seed 7
    python3 .ci/rounds.py --long                     # 500 rounds

A round starts the server on the folder that the last one left, lets 16 producers and 16
consumers at it while it compacts without end, and ends it within 0.6 s: with SIGKILL, now and
then with SIGTERM. What the clients saw goes into the tests' Ledger; every 20 rounds, and at the
end, one consumer takes all that is left and the Ledger judges. An answer to a consumer tells
that what the same connection was given before is settled; what a broken connection was given
may be settled or come again; a put without an answer may be in the queue or not.

Needs Python 3.9. The folder is made in ROUNDS_DIR (default /var/tmp, which should be a disk).
The seed fixes sizes, moments and ends of the rounds, not how threads take turns. Exit code:
0 all good; 1 a fault, the folder is kept; 2 usage.
"""
import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from typing import Callable, Dict, List, NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from bench import ADMIN, CHILDREN, CONFIG, GET, POST, QUEUE, SERVER, Child, free_port  # noqa: E402
from test_micro_queue import Ledger  # noqa: E402

ROUNDS_DIR = os.environ.get("ROUNDS_DIR", "/var/tmp")
SHORT, LONG = 8, 650             # rounds
CLIENTS = 16                     # producers, and as many consumers
SERVING_S = 0.05, 0.6            # how long a round may last
STOP_EVERY = 6                   # one round of so many ends with SIGTERM
DRAIN_EVERY = 20
PACES_S = 0.0, 0.0, 0.01, 0.05   # a round's pause after a take: with one, a backlog builds up
EMPTY_S = 0.003                  # a pause after an empty queue's answer
LARGE_EVERY = 100                # one message of so many is large
SMALL_BYTES, LARGE_BYTES = (20, 2_000), (10_000, 200_000)
TIMEOUT_S = 60
BAD_EVENTS = "Traceback", "CRITICAL", "corrupt_record", "compaction_failed"
STOPPING_EVENT = f'compaction_failed queue={QUEUE} error="the server is stopping"'

FILLER = random.Random(0).randbytes(1 << 19)
NAME = re.compile(rb"<(\d+)>")
FIELD = re.compile(rb"\r\n([-\w]+): ([^\r]*)")


def message(number: int) -> bytes:
    """Return the message of a number: its name and bytes of its own."""
    name = b"<%d>" % number
    random_bits = zlib.crc32(name)
    low, high = SMALL_BYTES if random_bits % LARGE_EVERY else LARGE_BYTES
    size, start = low + random_bits // LARGE_EVERY % (high - low), random_bits % len(FILLER) // 2
    return name + FILLER[start:start + size]


class Answer(NamedTuple):
    status: int
    fields: Dict[bytes, bytes]
    body: bytes


class Wire:
    """A keep-alive connection. Raises OSError once the server is gone."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._data = b""

    def call(self, method: str, path: str, token: str, body: bytes = b"") -> Answer:
        head = (f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n")
        self._socket.sendall(head.encode() + body)
        while b"\r\n\r\n" not in self._data:
            self._receive()
        answer_head, _, self._data = self._data.partition(b"\r\n\r\n")
        fields = dict(FIELD.findall(answer_head))
        length = int(fields[b"Content-Length"])
        while len(self._data) < length:
            self._receive()
        answer_body, self._data = self._data[:length], self._data[length:]
        return Answer(int(answer_head.split(b" ", 2)[1]), fields, answer_body)

    def _receive(self) -> None:
        data = self._socket.recv(1 << 18)
        if not data:
            raise ConnectionResetError("the server closed")
        self._data += data

    def close(self) -> None:
        self._socket.close()


class Rounds:
    """The folder, its server, and what is known of the messages.

    `stopping` is set before a server is told to stop: from then on it may answer 503.
    """

    def __init__(self, base: str, seed: int) -> None:
        self.base = base
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self.ledger = Ledger()
        self.kills = self.stops = self.compactions = 0
        self.unexpected: List[str] = []
        self.stopping = False

    # -- the server

    def start(self, number: int) -> Child:
        self.stopping = False
        port, config = free_port(), os.path.join(self.base, "config.json")
        settings = dict(CONFIG["settings"], path=os.path.join(self.base, "data"),
                        listen_port=port, fsync="always", min_free_bytes=0)
        with open(config, "w", encoding="utf-8") as file:
            json.dump(dict(CONFIG, settings=settings), file)
        child = Child([SERVER, "-c", config], port, self.stderr(number))
        child.wait_ready("/readyz")
        return child

    def stderr(self, number: int) -> str:
        return os.path.join(self.base, f"stderr{number}")

    def stop(self, child: Child) -> None:
        """Stop cleanly."""
        self.stopping = True
        self.stops += 1
        child.stop(signal.SIGTERM)
        if child.process.returncode:
            self.unexpected.append(f"exit {child.process.returncode} after SIGTERM")

    def kill(self, child: Child) -> None:
        self.kills += 1
        if child.process.poll() is not None:
            self.unexpected.append(f"exit {child.process.returncode} without a reason")
        child.stop(signal.SIGKILL)

    def check_stderr(self, number: int) -> None:
        with open(self.stderr(number), encoding="utf-8", errors="replace") as file:
            text = file.read().replace(STOPPING_EVENT, "")
        self.unexpected += [f"{word} in {file.name}" for word in BAD_EVENTS if word in text]
        if not self.unexpected:
            os.unlink(file.name)

    # -- clients

    def produce(self, wire: Wire) -> None:
        while True:
            number = next(self._numbers)
            name = b"<%d>" % number
            self.ledger.sending(name)
            answer = wire.call("POST", f"/in/{QUEUE}", POST, message(number))
            if answer.status == 200:
                self.ledger.accepted(name, int(answer.fields[b"Message-Id"]))
            else:
                self.ledger.refused(name)
                self._expect_stopping(answer)

    def consume(self, wire: Wire, consumer: str, pace_s: float) -> None:
        while True:
            if not self.take(wire, consumer):
                time.sleep(EMPTY_S)
            elif pace_s:
                time.sleep(pace_s)

    def take(self, wire: Wire, consumer: str) -> bool:
        """Take a message; return whether there was one."""
        answer = wire.call("GET", f"/out/{QUEUE}", GET)
        self.ledger.settled(consumer)        # what this connection was given before
        return self._note_taken(consumer, answer)

    def _note_taken(self, consumer: str, answer: Answer) -> bool:
        if answer.status == 200:
            name = NAME.match(answer.body)
            good = name is not None and message(int(name[1])) == answer.body
            self.ledger.delivered(consumer, name[0] if good else answer.body[:100],
                                  int(answer.fields[b"Message-Id"]),
                                  int(answer.fields[b"Delivery-Count"]))
        elif answer.status != 404:
            self._expect_stopping(answer)
        return answer.status == 200

    def work(self, wire: Wire, consumer: str, pace_s: float) -> None:
        """Wait for messages, hold each on a lease, ack most and give some back."""
        for number in itertools.count():
            answer = wire.call("GET", f"/out/{QUEUE}?wait=5&lease=600", GET)
            if not self._note_taken(consumer, answer):
                continue
            time.sleep(pace_s)
            action, done = (("ack", self.ledger.settled) if number % 8 else
                            ("nack", self.ledger.returned))
            lease = answer.fields[b"Lease-Id"].decode()
            answer = wire.call("POST", f"/{action}/{QUEUE}?lease={lease}", GET)
            if answer.status != 200:         # the message is back after the start
                done = self.ledger.returned
                self._expect_stopping(answer)
            done(consumer)

    def compact(self, wire: Wire) -> None:
        while True:
            answer = wire.call("GET", f"/compact/{QUEUE}", ADMIN)
            if answer.status == 200:
                self.compactions += 1
            else:
                self._expect_stopping(answer)

    def _expect_stopping(self, answer: Answer) -> None:
        if answer.status != 503 or not self.stopping:
            self.unexpected.append(f"answer {answer.status}: {answer.body[:100]!r}")

    def client(self, port: int, work: Callable[[Wire], None]) -> threading.Thread:
        """Start a thread that works on a connection of its own until that ends."""
        def run() -> None:
            try:
                wire = Wire(port)
                try:
                    work(wire)
                finally:
                    wire.close()
            except OSError as error:
                if isinstance(error, socket.timeout):
                    self.unexpected.append(f"no answer within {TIMEOUT_S} s")
            except Exception:
                self.unexpected.append(traceback.format_exc())
        thread = threading.Thread(target=run)
        thread.start()
        return thread

    # -- rounds

    def run(self, number: int) -> None:
        """Serve for a moment, with all clients, and end."""
        child = self.start(number)
        pace_s = self._random.choice(PACES_S)
        threads = [self.client(child.port, self.produce) for _ in range(CLIENTS)]
        for name in range(CLIENTS):
            consume = self.work if name % 2 else self.consume
            threads.append(self.client(
                child.port, lambda wire, name=name, consume=consume: consume(
                    wire, f"c{name}", pace_s)))
        threads.append(self.client(child.port, self.compact))
        time.sleep(self._random.uniform(*SERVING_S))
        (self.kill if self._random.randrange(STOP_EVERY) else self.stop)(child)
        for thread in threads:
            thread.join()
        self.ledger.fault(power_cut=False)
        self.check_stderr(number)

    def drain(self, number: int) -> List[str]:
        """Take all that is left; return every fault so far."""
        child = self.start(number)
        wire = Wire(child.port)
        while self.take(wire, "drain"):
            pass
        wire.close()
        self.stop(child)
        self.ledger.fault(power_cut=False)
        self.check_stderr(number)
        return self.faults()

    def faults(self, drained: bool = True) -> List[str]:
        return self.ledger.faults(drained) + [f"unexpected: {line}" for line in self.unexpected]


def run_all(rounds: Rounds, count: int) -> List[str]:
    """Run until a fault is found; return the faults."""
    for number in range(1, count + 1):
        rounds.run(number)
        found = rounds.faults(drained=False)
        if not found and (number % DRAIN_EVERY == 0 or number == count):
            found = rounds.drain(-number)
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
    except subprocess.TimeoutExpired as error:
        found = [f"unexpected: {error}"]
    finally:
        for child in list(CHILDREN):
            child.stop()
        if not found:
            shutil.rmtree(base)
    for line in found[:20]:
        print(f"    {line}")
    if found:
        print(f"    {len(found)} in all, seed {arguments.seed}; folder {base}")
    kinds = [sum(line.startswith(kind) for line in found) for kind in ("lost", "duplicated")]
    print(f"rounds: {rounds.kills} kills, {rounds.stops} clean stops, {rounds.compactions} "
          f"compactions; {rounds.ledger}; lost {kinds[0]}, "
          f"unexpected {len(found) - sum(kinds)}, duplicated {kinds[1]}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
