#!/usr/bin/env python3
"""Two nodes on a replicated file system: break one, and prove that the other loses nothing.

    python3 .ci/failover.py                          # two faults, for CI: some seconds
    python3 .ci/failover.py --fault cut --rounds 5 --seed 7
    python3 .ci/failover.py --long                   # 20 rounds of every fault: 15 minutes
    python3 .ci/failover.py --control                # no strict locks, no proofs: must go wrong
    python3 .ci/failover.py --nfs                    # the same on NFSv4: says what is missing

All parts are real: three GlusterFS bricks that replicate, each on a host of its own; two nodes
with a FUSE mount and a server that has `"standby": true` and the sizes of small.py; HAProxy in
front, which asks for /readyz. A host is a network namespace on a bridge. All of it runs in
private namespaces on a tmpfs, so that the kernel cleans up, however this ends.

Clients work through HAProxy without end: on one queue producers, and consumers with leases and
acks; on another one a producer, and consumers that just take. In each round a fault (FAULTS)
hits them; then what ended is started again, until one node serves and the other one waits.
Beside them each node is asked directly, from its own host, for /readyz and a durable put.

Proves: a put that was answered 200 is there in the end, whole; what was acked does not come
again; the times in which two nodes answer puts with 200 never overlap; a node that lost its
locks ends by itself, with status 4 and a line, and what it wrote afterwards damaged nothing.
A proxied request without an answer, or with 502, 503 or 504, may have been done or not. So a
plain take that broke may have taken a message that nobody saw: these are counted apart, as are
messages that came again because their lease or their take was not settled.

Needs Linux, root, and the packages glusterfs-server, glusterfs-client, haproxy and iproute2,
which it installs. What is left of a fault is kept in BENCH_DIR (default /var/tmp). Exit code:
0 good or skipped; 1 a fault, or a control that went well; 2 usage.
"""
import argparse
import contextlib
import functools
import itertools
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from typing import (
    AbstractSet, Any, Callable, Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Set, Tuple)

from cluster import (FOLDER, PRIVATE, PROXY, PROXY_PORT, READY_S, Cluster, Node, go_to, install,
                     known_filesystems, look_for_kernel)
from power_cuts import Skipped, is_stopped, need, run
from rounds import message, name_of
from test_micro_queue import (
    LATE_S, QUEUE, Answer, Client, Fault, Ledger, Wire, count_faults, eventually)

LEASED, PLAIN = QUEUE, "manager-reload"      # the queues of leases and of plain takes
SHORT, LONG_ROUNDS = ("kill", "cut"), 20
CONTROL, CONTROL_ROUNDS = ("pause",), 5      # what shows that locks are not strict, and how soon
PRODUCERS, WORKERS, TAKERS = 2, 3, 2
PUT_PAUSE_S, EMPTY_PAUSE_S, BROKEN_PAUSE_S, PROBE_PAUSE_S = 0.01, 0.02, 0.02, 0.01
LEASE_S, POLL_S = 600, 1
PURGE_EVERY = 20                             # puts, while segments are freed
CLIENT_S, PUT_S = 30, 1                      # timeouts of clients, and of direct puts
LOCK_S = 4                                   # no lock outlives the link to its node for longer
HEALTHY_S = 40                               # how soon one must serve and the other one wait
SHOWN_FAULTS = 20
KEPT_DIR = os.environ.get("BENCH_DIR", "/var/tmp")
KILLED, FAILED = -signal.SIGKILL, 4          # exit codes


# ---- Clients ------------------------------------------------------------------------------

class Unanswered(OSError):
    """The proxy answered instead of a node, or a node that is about to end."""


class ProxyWire(Wire):
    """A connection to the proxy. Raises OSError where nobody knows what became of a request."""

    def __init__(self, queue: str) -> None:
        super().__init__(PROXY_PORT, CLIENT_S, PROXY)
        self._queue = queue

    def ask(self, *request: Any, **options: Any) -> Answer:
        answer = super().ask(*request, **options)
        if answer.status in (502, 503, 504):
            raise Unanswered(answer.body)
        return answer

    def put(self, body: bytes, query: str = "", queue: str = "") -> Answer:
        return super().put(body, query, queue or self._queue)


class Deliveries(Ledger):
    """A Ledger of several nodes. One that takes over knows no leases and counts anew: whatever
    is not settled may come again, also as if for the first time; and in any order."""

    def __init__(self) -> None:
        super().__init__(LATE_S)
        self._seen: Set[bytes] = set()
        self.repeated = 0

    def delivered(self, consumer: str, payload: bytes, message_id: int, count: int = 1) -> None:
        self.repeated += payload in self._seen
        self._seen.add(payload)
        super().delivered(consumer, payload, message_id, max(2, count))


class Clients:
    """Threads, each of which works on one connection after the other until `end`."""

    def __init__(self, numbers: Iterator[int], found: List[str]) -> None:
        self.numbers, self.found = numbers, found
        self.over, self.lock = threading.Event(), threading.Lock()
        self._threads: List[threading.Thread] = []

    def start(self, work: Callable[[Any], None], connect: Callable[[], Wire],
              host: str = "") -> None:
        def keep() -> None:
            if host:
                go_to(host)
            while not self.over.is_set():
                try:
                    with connect() as wire:
                        work(wire)
                except OSError:
                    time.sleep(BROKEN_PAUSE_S)
                except Exception:
                    self.found.append(f"unexpected: {traceback.format_exc()}")
                    return
        self._threads.append(threading.Thread(target=keep, daemon=True))
        self._threads[-1].start()

    def end(self) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join()

    def put(self, wire: Wire, ledger: Ledger, *statuses: int) -> Answer:
        answer = Client(wire, ledger, key=name_of).put(message(next(self.numbers)))
        return self.expect(answer, *statuses)

    def expect(self, answer: Answer, *statuses: int) -> Answer:
        if answer.status not in statuses:
            self.found.append(f"unexpected: answered {answer.status}: {answer.body[:200]!r}")
        return answer


class Load(Clients):
    """Those that work through the proxy; `freeing` has them compact and purge."""

    def __init__(self, leased: Ledger, plain: Ledger, numbers: Iterator[int], found: List[str],
                 consume: bool) -> None:
        super().__init__(numbers, found)
        self._leased, self._plain, self._names = leased, plain, itertools.count()
        self.freeing = threading.Event()
        self.last_answer, self._longest_s = time.monotonic(), 0.0
        self.broken_takes = self.purges = 0
        works = [(self._produce, LEASED)] * PRODUCERS + [(self._produce_and_purge, PLAIN)]
        if consume:
            works += [(self._work, LEASED)] * WORKERS + [(self._take, PLAIN)] * TAKERS
            works += [(self._compact, LEASED)]
        for work, queue in works:
            self.start(work, functools.partial(self._connect, queue))

    def _connect(self, queue: str) -> ProxyWire:
        """Return a connection behind which a node serves: so few requests break in vain."""
        wire = ProxyWire(queue)
        wire.ask("GET", "/readyz")
        return wire

    def _put(self, wire: ProxyWire, ledger: Ledger) -> None:
        self.put(wire, ledger, 200)
        with self.lock:
            now = time.monotonic()
            self._longest_s = max(self._longest_s, now - self.last_answer)
            self.last_answer = now

    def longest_s(self) -> float:
        """Return the longest time between two answers to puts since this was asked last."""
        with self.lock:
            longest_s, self._longest_s = self._longest_s, 0.0
            return longest_s

    def _produce(self, wire: ProxyWire) -> None:
        while not self.over.wait(PUT_PAUSE_S):
            self._put(wire, self._leased)

    def _produce_and_purge(self, wire: ProxyWire) -> None:
        """Put, and purge now and then: nobody else puts to this queue. A purge that was not
        answered may be done later, so it begins with one, which is done behind that."""
        for number in itertools.count():
            if self.freeing.is_set() and number % PURGE_EVERY == 0:
                self._plain.dropping()
                self.expect(wire.ask("POST", f"/purge/{PLAIN}"), 200)
                self.purges += 1
            if self.over.wait(PUT_PAUSE_S):
                return
            self._put(wire, self._plain)

    def _work(self, wire: ProxyWire) -> None:
        worker = Client(wire, self._leased, f"worker {next(self._names)}", name_of)
        while not self.over.is_set():
            answer = self.expect(worker.lease(LEASE_S, POLL_S), 200, 404)
            if answer.status == 200:
                self.expect(worker.end("ack", answer.headers["Lease-Id"]), 200, 410)

    def _take(self, wire: ProxyWire) -> None:
        """Take; that a node answers says that what it gave to this connection is settled."""
        node = ""
        while not self.over.is_set():
            try:
                answer = self.expect(wire.take(queue=PLAIN), 200, 404)
            except OSError:
                self.broken_takes += 1
                raise
            if answer.headers["Node"] != node:
                node, name = answer.headers["Node"], f"taker {next(self._names)}"
            self._plain.settled(name)
            if answer.status == 200:
                self._plain.delivered(name, name_of(answer.body), answer.id, answer.count)
            else:
                time.sleep(EMPTY_PAUSE_S)

    def _compact(self, wire: ProxyWire) -> None:
        while not self.over.wait(PUT_PAUSE_S):
            if self.freeing.is_set():
                for queue in (LEASED, PLAIN):
                    self.expect(wire.ask("POST", f"/compact/{queue}"), 200)


class Watch(Clients):
    """Those that ask each node directly, from its own host: who says that it serves, who does."""

    def __init__(self, nodes: List[Node], ledger: Ledger, numbers: Iterator[int],
                 found: List[str]) -> None:
        super().__init__(numbers, found)
        self._ledger = ledger
        self._ready: Dict[Node, float] = {}          # since when it says so
        self.both_ready_s = 0.0
        self._served: Dict[Tuple[Node, int], List[float]] = {}   # server: first answer, last put
        for node in nodes:
            for work, timeout_s in ((self._put, PUT_S), (self._ask, READY_S)):
                self.start(functools.partial(work, node),
                           lambda node=node, timeout_s=timeout_s: node.server.wire(timeout_s),
                           node.host)

    def _put(self, node: Node, wire: Wire) -> None:
        server = node.server                         # no other one has this connection
        while not self.over.wait(PROBE_PAUSE_S):
            sent = time.monotonic()
            if self.put(wire, self._ledger, 200, 503).status == 200:
                with self.lock:
                    times = self._served.setdefault((node, server.pid), [time.monotonic(), sent])
                    times[1] = sent

    def _ask(self, node: Node, wire: Wire) -> None:
        try:
            while not self.over.wait(PROBE_PAUSE_S):
                sent = time.monotonic()
                is_ready = wire.ask("GET", "/readyz").status == 200
                with self.lock:
                    if not is_ready:
                        self._ready.pop(node, None)
                        continue
                    self._ready.setdefault(node, time.monotonic())
                    if max(self._ready.values()) < sent and len(self._ready) > 1:
                        self.both_ready_s += time.monotonic() - sent + PROBE_PAUSE_S
        finally:
            with self.lock:
                self._ready.pop(node, None)

    @property
    def takeovers(self) -> int:
        return max(0, len(self._served) - 1)

    def faults(self) -> List[str]:
        """Return which servers answered puts at the same time. Each holds its locks once, from
        before its first answer until after its last such put was sent, at least."""
        with self.lock:
            served = sorted((*times, key) for key, times in self._served.items())
        return [f"double write: {one} answered 200 to a put that was sent {last - first:.3f} s "
                f"after {other} had answered one"
                for (_, last, one), (first, _, other) in itertools.combinations(served, 2)
                if last > first]


# ---- Faults -------------------------------------------------------------------------------

class Series:
    """Rounds of one fault under load, and what is known of the messages."""

    def __init__(self, cluster: Cluster, name: str, rng: random.Random,
                 numbers: Iterator[int]) -> None:
        self.cluster, self.rng, self._kind, self._name = cluster, rng, FAULTS[name], name
        self.found: List[str] = []
        self._leased, self._plain = Deliveries(), Deliveries()
        self._unseen = 0
        self._times_s: List[float] = []          # for how long nobody answered, in each round
        for node in cluster.nodes:
            node.start()
        self._wait_healthy({})
        self.load = Load(self._leased, self._plain, numbers, self.found, not cluster.is_control)
        self._watch = Watch(cluster.nodes, self._leased, numbers, self.found)

    def run(self, rounds: int) -> List[str]:
        """Return what went wrong."""
        is_drained = False
        try:
            while len(self._times_s) < rounds and not (self.found or self._watch.faults()):
                self._times_s.append(self._round())
            self._end()
            is_drained = not self.found and self._drain()
        except (Fault, OSError) as error:
            self.found.append(f"unexpected: {error}")
            self._end()
        plain = self._plain.faults(is_drained)
        unseen = [line for line in plain if line.startswith("lost")]
        if len(unseen) <= self.load.broken_takes:    # each may have had one
            plain = [line for line in plain if line not in unseen]
            self._unseen = len(unseen)
        self.found += plain + self._leased.faults(is_drained)
        return self.found

    def _round(self) -> float:
        """Return for how long nobody answered."""
        active = self._wait_healthy({})
        standby = next(node for node in self.cluster.nodes if node is not active)
        time.sleep(self.rng.uniform(0.2, 0.8))
        self.load.longest_s()
        self._kind.happen(self, active, standby)
        if self._watch.faults():
            return self.load.longest_s()
        self._wait_healthy({active: self._kind.active, standby: self._kind.standby})
        healthy = time.monotonic()
        eventually(lambda: self.load.last_answer > healthy, HEALTHY_S, "nobody answers")
        return self.load.longest_s()

    def _wait_healthy(self, statuses: Dict[Node, AbstractSet[int]]) -> Node:
        """Start again what ended with one of its statuses, until all is well; return the active
        node."""
        def active() -> Optional[Node]:
            for node in self.cluster.nodes:
                if node.server.process.poll() is not None:
                    self._look(node, statuses.get(node, set()))
                    node.start()
            return self.cluster.active()
        return eventually(active, HEALTHY_S, f"no active node and standby after {self._name}",
                          pause_s=0.02)

    def _look(self, node: Node, statuses: AbstractSet[int]) -> None:
        """Look at a server that ended."""
        status, text = node.server.process.poll(), node.server.stderr()
        if status not in statuses:
            raise Fault(f"{node} ended with {status} and said {text[-2000:]}")
        if "Traceback" in text:
            self.found.append(f"unexpected: {node} ended with {status} and said {text[-2000:]}")
        if text.count(" CRITICAL ") != (status == FAILED):
            self.found.append(f"unexpected: {node} ended with {status} and not a line: {text}")
        if "corrupt_record" in text:
            self.found.append(f"double write: {node} found what it cannot read: {text[-2000:]}")

    def _end(self) -> None:
        self.load.end()
        self._watch.end()
        self.found += [line for line in self._watch.faults() if line not in self.found]

    def _drain(self) -> bool:
        """Stop both nodes, start one, take all that is left. Return that this is done."""
        first, second = self.cluster.nodes
        self._stop(second)
        self._stop(first)
        first.start()
        first.server.wait_ready()
        for queue, ledger in ((LEASED, self._leased), (PLAIN, self._plain)):
            ledger.fault()
            with first.server.wire() as wire:
                self._take_all(wire, queue, ledger)
        self._stop(first)
        return True

    def _stop(self, node: Node) -> None:
        node.server.stop()
        self._look(node, {0})

    def _take_all(self, wire: Wire, queue: str, ledger: Ledger) -> None:
        while True:
            answer = wire.take(queue=queue)
            ledger.settled("drain")
            if answer.status != 200:
                return
            ledger.delivered("drain", name_of(answer.body), answer.id, answer.count)

    def wait_end(self, node: Node) -> None:
        """What has lost its locks must end by itself, before it answers a put."""
        eventually(lambda: node.server.process.poll() is not None or self._watch.faults(),
                   HEALTHY_S, f"{node} lost its locks and did not end", pause_s=0.02)

    def __str__(self) -> str:
        ledgers, times_s = (self._leased, self._plain), self._times_s or [0.0]
        return (f"{self._name}: {len(self._times_s)} times, {self._watch.takeovers} took over; "
                f"nobody answered for {statistics.median(times_s):.2f} s (median), "
                f"{max(times_s):.2f} s (longest); two were ready for "
                f"{self._watch.both_ready_s:.2f} s; "
                f"{sum(ledger.answered_count for ledger in ledgers)} answered, "
                f"{sum(ledger.repeated for ledger in ledgers)} came again, {self._unseen} went "
                f"with {self.load.broken_takes} broken takes, {self.load.purges} purges; slowest "
                f"answer {max(ledger.latest_s for ledger in ledgers):.2f} s; "
                f"{count_faults(self.found)}")


def kill(series: Series, active: Node, _: Node) -> None:
    """The active server is killed."""
    active.server.kill()


def upgrade(series: Series, active: Node, _: Node) -> None:
    """The active server is told to stop."""
    active.server.stop()


def hang(series: Series, active: Node, standby: Node) -> None:
    """The active server alone stops for a while: its mount keeps the locks, so nobody serves."""
    active.server.process.send_signal(signal.SIGSTOP)
    time.sleep(LOCK_S)
    if "standby" not in standby.state():
        series.found.append(f"unexpected: {standby} says {standby.state()} beside a lock")
    active.server.process.send_signal(signal.SIGCONT)


def pause(series: Series, active: Node, standby: Node) -> None:
    """The active host stops, as a virtual machine does, and wakes up when the other one serves."""
    is_control = series.cluster.is_control
    active.server.process.send_signal(signal.SIGSTOP)
    if is_control or series.rng.random() < 0.5:      # else in the midst of a write
        eventually(lambda: is_stopped(active.server.pid), what="the server did not stop")
    active.link("down")
    active.mounted.process.send_signal(signal.SIGSTOP)
    eventually(lambda: standby.is_ready, HEALTHY_S, "the other node did not take over")
    time.sleep(series.rng.uniform(0, 1))
    active.link("up")
    active.mounted.process.send_signal(signal.SIGCONT)       # has its bricks again within LOCK_S
    time.sleep(LOCK_S if is_control else series.rng.choice((0, 1, LOCK_S)))
    active.server.process.send_signal(signal.SIGCONT)
    series.wait_end(active)


def kill_mount(series: Series, active: Node, _: Node) -> None:
    """The active node's mount is killed."""
    active.mounted.kill()
    series.wait_end(active)


def cut(series: Series, active: Node, _: Node) -> None:
    """The active node's link is cut, for a moment, or for longer than its locks live."""
    active.link("down")
    time.sleep(series.rng.uniform(*series.rng.choice(((0.1, 3), (3, 7)))))
    active.link("up")
    time.sleep(1)


def kill_brick(series: Series, *_: Node) -> None:
    """A brick is killed and comes back. A server that then cannot prove its locks ends."""
    brick = series.rng.choice(series.cluster.bricks)
    brick.kill()
    time.sleep(series.rng.uniform(0.1, 3))
    brick.start()
    eventually(lambda: not any(one.has_pending() for one in series.cluster.bricks), HEALTHY_S,
               "the bricks did not become the same again", pause_s=0.1)


def kill_both(series: Series, *nodes: Node) -> None:
    """Both servers are killed and started at once."""
    for node in nodes:
        node.server.kill()
    for node in nodes:
        node.start()


def kill_taker(series: Series, active: Node, standby: Node) -> None:
    """The active server is killed, and then the one that takes over."""
    active.server.kill()
    time.sleep(series.rng.uniform(0, 0.6))
    standby.server.kill()


def free(series: Series, active: Node, standby: Node) -> None:
    """Some of these happen while segments are freed, by compactions and purges."""
    series.load.freeing.set()
    time.sleep(series.rng.uniform(0.3, 1))
    try:
        series.rng.choice((kill, kill_mount, cut, pause))(series, active, standby)
    finally:
        series.load.freeing.clear()


class Kind(NamedTuple):
    """A row of what may happen, and with which statuses the nodes may end by it."""

    happen: Callable[..., None]
    active: FrozenSet[int] = frozenset()
    standby: FrozenSet[int] = frozenset()


FAULTS = {
    "kill": Kind(kill, frozenset({KILLED})),
    "upgrade": Kind(upgrade, frozenset({0})),
    "hang": Kind(hang),
    "pause": Kind(pause, frozenset({FAILED})),
    "mount": Kind(kill_mount, frozenset({FAILED})),
    "cut": Kind(cut, frozenset({FAILED})),
    "brick": Kind(kill_brick, frozenset({FAILED})),
    "both": Kind(kill_both),
    "taker": Kind(kill_taker, frozenset({KILLED}), frozenset({KILLED})),
    "free": Kind(free, frozenset({KILLED, FAILED})),
}


# ---- Main ---------------------------------------------------------------------------------

def inside(options: argparse.Namespace) -> int:
    """Be the first process of namespaces of our own."""
    names = options.fault or (FAULTS if options.long else CONTROL if options.control else SHORT)
    rounds = options.rounds or (LONG_ROUNDS if options.long else
                                CONTROL_ROUNDS if options.control else 1)
    cluster, numbers, found = Cluster(options.control), itertools.count(), []
    for name in names:
        rng = random.Random(f"{options.seed}-{name}")
        try:
            series = Series(cluster, name, rng, numbers)
            found = series.run(rounds)
            print(f"  {series}", flush=True)
        except (Fault, OSError) as error:
            found = [f"unexpected: {name}: {error}"]
        if found:
            break
    for line in found[:1 if options.control else SHOWN_FAULTS]:
        print(f"    {line}")
    if options.control:
        is_found = any(line.startswith(("lost", "double write")) for line in found)
        print("failover: without strict locks a loss or a double write was "
              f"{'found, as it must be' if is_found else 'NOT found'}")
        return 0 if is_found else 1
    if found:
        kept = tempfile.mkdtemp(prefix="failover-", dir=KEPT_DIR)
        run("sh", "-c", f"cp -a {FOLDER}/*.* {FOLDER}/s? {FOLDER}/server-* {kept}")
        print(f"    {len(found)} in all, seed {options.seed}; kept: {kept}")
    print(f"failover: {count_faults(found)}")
    return 1 if found else 0


def look_for_nfs() -> None:
    """Raises Skipped if the kernel cannot serve and mount NFSv4, or if it can."""
    for module in ("nfsd", "nfsv4"):
        with contextlib.suppress(OSError):
            run("modprobe", module)
    missing = {"nfsd", "nfs4"} - known_filesystems()
    raise Skipped(f"the kernel has no {' and no '.join(sorted(missing))}" if missing
                  else "there is no such proof yet")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fault", action="append", choices=FAULTS, help="repeatable")
    parser.add_argument("--rounds", type=int, metavar="N", help="of each fault")
    parser.add_argument("--long", action="store_true", help=f"{LONG_ROUNDS} rounds of each")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--control", action="store_true",
                        help="locks that are not strict: 0 if a loss or a double write is found")
    parser.add_argument("--nfs", action="store_true", help="on NFSv4 instead")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside(options)
    try:
        need()
        if options.nfs:
            look_for_nfs()
        install()
        look_for_kernel()
    except Skipped as reason:
        print(f"skipped: {'nfs' if options.nfs else 'failover'}: {reason}")
        return 0
    print(f"failover: seed {options.seed}", flush=True)
    return os.execvp(PRIVATE[0], [*PRIVATE, sys.executable, __file__, *sys.argv[1:],
                                  "--inside", "--seed", str(options.seed)])


if __name__ == "__main__":
    sys.exit(main())
