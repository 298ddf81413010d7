#!/usr/bin/env python3
"""Two nodes on a replicated file system: break one, and prove that the other loses nothing.

    python3 .ci/failover.py                          # two faults, for CI: under a minute
    python3 .ci/failover.py --fault cut --rounds 5 --seed 7
    python3 .ci/failover.py --long                   # 20 rounds of every fault
    python3 .ci/failover.py --control                # without strict locks: must go wrong
    python3 .ci/failover.py --nfs                    # the same on NFSv4, where the kernel has it

All parts are real: three GlusterFS bricks that replicate, each on a host of its own; two nodes
with a FUSE mount and a server that has `"standby": true`, and the sizes of small.py; HAProxy in
front, which asks for /readyz. A host is a network namespace on a bridge. All of it runs in
private namespaces on a tmpfs, so that the kernel cleans up, however this ends.

Clients work through HAProxy without end: on one queue producers, and consumers with leases and
acks; on another one a producer, and consumers that just take. In each round a fault (see FAULTS)
hits them; then what ended is started again, until one node serves and the other one waits.
Beside them each node is asked directly, from its own namespace, for /readyz and a durable put.

Proves: a put that was answered 200 is there in the end, whole; what was acked does not come
again; what a node did under a lock that it no longer has was answered to nobody: the times
in which two nodes answered puts with 200 do not overlap; the old node ends with status 4.
A proxied request without an answer, or with 502, 503 or 504, may have been done or not. So a
plain take that broke may have taken a message that nobody saw: these are counted apart, as are
messages that came again because their lease or their take was not settled.

Needs Linux, root, and the packages glusterfs-server, glusterfs-client, haproxy and iproute2,
which it installs. Exit code: 0 good or skipped; 1 a fault, logs and bricks are kept; 2 usage.
"""
import argparse
import contextlib
import ctypes
import itertools
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set, Tuple

from power_cuts import SMALL, Skipped, is_stopped, need, run
from rounds import message, name_of
from test_micro_queue import (
    LATE_S, QUEUE, SERVER, Answer, Client, Fault, Ledger, ServerProcess, Wire, count_faults,
    eventually)

PLAIN = "manager-reload"                     # the queue of plain takes; QUEUE is that of leases
SHORT, LONG = ("kill", "cut"), 20            # faults of the short mode; rounds of each
CONTROL, TRIES = ("pause",), 5               # what shows that locks are not strict, and how soon
PRIVATE = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
RUN = "/run"                                 # gets a tmpfs, as `ip netns` has its names there
FOLDER = os.path.join(RUN, "failover")
KEPT_DIR = os.environ.get("BENCH_DIR", "/var/tmp")
PACKAGES = {"glusterfsd": "glusterfs-server", "glusterfs": "glusterfs-client",
            "haproxy": "haproxy", "ip": "iproute2"}
NETWORK, PROXY, PROXY_PORT, PORT, BRICK_PORT = "10.77.0.", "10.77.0.1", 8080, 10000, 24100
NODES = {"n1": 21, "n2": 22}                 # host: last byte of its address
BRICKS = {"s1": 11, "s2": 12, "s3": 13}
CLONE_NEWNET = 0x40000000
PRODUCERS, WORKERS, TAKERS = 2, 3, 2
PUT_PAUSE_S, EMPTY_PAUSE_S, BROKEN_PAUSE_S, PROBE_PAUSE_S = 0.01, 0.02, 0.02, 0.01
LEASE_S, POLL_S = 600, 1
PURGE_EVERY = 20                             # puts, while segments are to be freed
ANSWER_S, PROBE_S, READY_S = 30, 1, 0.25     # timeouts: of clients, of direct puts, of /readyz
LOCK_S = 4                                   # no lock outlives the link to its node for longer
HEALTHY_S = 40                               # how soon one must serve and the other one wait
SHOWN_FAULTS = 20
KILLED = -signal.SIGKILL


# ---- The file system ----------------------------------------------------------------------

def volume(name: str, kind: str, *below: str, **options: object) -> str:
    """Return one translator of a volume file; a name's `__` stands for a dot."""
    lines = [f"volume {name}", f"    type {kind}"]
    lines += [f"    option {key.replace('__', '.').replace('_', '-')} {value}"
              for key, value in options.items()]
    lines += [f"    subvolumes {' '.join(below)}"] if below else []
    return "\n".join([*lines, "end-volume\n"])


KEEPALIVE = {"transport__tcp_user_timeout": 3, "transport__socket__keepalive_time": 1,
             "transport__socket__keepalive_interval": 1, "transport__socket__keepalive_count": 3}


def brick_volume(path: str, address: str) -> str:
    indices = os.path.join(path, ".glusterfs", "indices")
    return "".join([
        volume("posix", "storage/posix", directory=path),
        volume("locks", "features/locks", "posix"),
        volume("threads", "performance/io-threads", "locks"),
        volume("index", "features/index", "threads", index_base=indices,
               xattrop_dirty_watchlist="trusted.afr.dirty",
               xattrop_pending_watchlist="trusted.afr.brick-"),
        volume("brick", "debug/io-stats", "index"),
        volume("server", "protocol/server", "brick", transport_type="tcp",
               transport__address_family="inet", transport__socket__bind_address=address,
               transport__socket__listen_port=BRICK_PORT, transport__socket__keepalive=1,
               auth__addr__brick__allow=NETWORK + "*", **KEEPALIVE)])


def client_volume(strict: bool, **replicate: object) -> str:
    """The three bricks as one file system, without any cache: each write and lock is a
    matter of two bricks of three."""
    names = [f"brick-{number}" for number in range(len(BRICKS))]
    bricks = [volume(name, "protocol/client", transport_type="tcp",
                     transport__address_family="inet", remote_host=f"{NETWORK}{byte}",
                     remote_port=BRICK_PORT, remote_subvolume="brick", ping_timeout=3,
                     strict_locks="on" if strict else "off", send_gids="true", **KEEPALIVE)
              for name, byte in zip(names, BRICKS.values())]
    return "".join([*bricks, volume("replicate", "cluster/replicate", *names, quorum_type="auto",
                                    afr_pending_xattr=",".join(names), **replicate)])


HEADERS = "Content-Length", "Connection", "Message-Id", "Delivery-Count", "Lease-Id", "Node"
ADJUST = "\n".join(f"    h1-case-adjust {name.lower()} {name}" for name in HEADERS)  # for Wire
HAPROXY = f"""
global
{ADJUST}
    nbthread 1
    hard-stop-after 2s
defaults
    mode http
    option h1-case-adjust-bogus-client
    timeout connect 500ms
    timeout client 60s
    timeout server 60s
    timeout check 800ms
    retries 8
    option redispatch 1
    retry-on conn-failure
    default-server check inter 200ms fastinter 100ms downinter 200ms rise 1 fall 2
    default-server on-marked-down shutdown-sessions
    default-server observe layer4 error-limit 1 on-error mark-down
frontend clients
    bind {PROXY}:{PROXY_PORT}
    default_backend nodes
backend nodes
    option httpchk
    http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host proxy
    http-check expect status 200
    http-response set-header Node %s
    server n1 {NETWORK}{NODES['n1']}:{PORT}
    server n2 {NETWORK}{NODES['n2']}:{PORT}
"""


def on_host(host: str, *command: str) -> List[str]:
    """Return a command that runs on a host; not by `ip netns exec`, which hides the mounts."""
    return ["nsenter", f"--net={RUN}/netns/{host}", *command]


def go_to(host: str) -> None:
    """Let what this thread connects from now on come from a host."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"{RUN}/netns/{host}", "rb") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def make_network() -> None:
    """A bridge on which we and the proxy are, and a host for each brick and node."""
    os.mkdir(f"{RUN}/netns")
    lines = ["link set lo up", "link add bridge type bridge", "link set bridge up",
             f"addr add {PROXY}/24 dev bridge"]
    for host in (*BRICKS, *NODES):
        run("ip", "netns", "add", host)
        lines += [f"link add {host} type veth peer name eth0 netns {host}",
                  f"link set {host} master bridge up"]
        run("ip", "-n", host, "link", "set", "lo", "up")
    with open(f"{FOLDER}/network", "w", encoding="ascii") as file:
        file.write("\n".join(lines))
    run("ip", "-batch", file.name)
    for host, byte in {**BRICKS, **NODES}.items():
        run("ip", "-n", host, "addr", "add", f"{NETWORK}{byte}/24", "dev", "eth0")
        run("ip", "-n", host, "link", "set", "eth0", "up")


class Daemon:
    """A program that stays in the foreground, on a host."""

    def __init__(self, name: str, host: str, *command: str) -> None:
        self._name, self._command = name, on_host(host, *command) if host else list(command)
        self.start()

    def start(self) -> None:
        with open(f"{FOLDER}/{self._name}.out", "ab") as file:
            self.process = subprocess.Popen(self._command, stdout=file, stderr=file)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Brick(Daemon):
    """One of three copies."""

    def __init__(self, host: str) -> None:
        self.path, self._address = f"{FOLDER}/{host}", f"{NETWORK}{BRICKS[host]}"
        os.makedirs(f"{self.path}/.glusterfs/indices")
        write(f"{FOLDER}/{host}.vol", brick_volume(self.path, self._address))
        super().__init__(host, host, "glusterfsd", "-N", "-f", f"{FOLDER}/{host}.vol",
                         "-l", f"{FOLDER}/{host}.log")

    def wait_ready(self) -> None:
        def connects() -> bool:
            with contextlib.suppress(OSError):
                Wire(BRICK_PORT, 1, self._address).close()
                return True
            return False
        eventually(connects, HEALTHY_S, "a brick did not start", pause_s=0.02)

    def has_pending(self) -> bool:
        """Tell whether it knows of a file that another brick does not have as it is."""
        with contextlib.suppress(FileNotFoundError):
            names = os.listdir(f"{self.path}/.glusterfs/indices/xattrop")
            return any(not name.startswith("xattrop-") for name in names)
        return False


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


class Node:
    """A host with a mount, and with a server on it."""

    def __init__(self, host: str, program: str) -> None:
        self.host, self.address, self.path = host, f"{NETWORK}{NODES[host]}", f"{FOLDER}/{host}"
        self._program = program
        os.mkdir(self.path)
        self.mount()

    def __repr__(self) -> str:
        return self.host

    def mount(self) -> None:
        self.mounted = Daemon(
            f"mount-{self.host}", self.host, "glusterfs", "-N", "--process-name", "fuse",
            "-f", f"{FOLDER}/client.vol", "-l", f"{FOLDER}/mount-{self.host}.log",
            "--attribute-timeout=0", "--entry-timeout=0", "--direct-io-mode=enable", self.path)
        eventually(self._is_mounted, HEALTHY_S, f"{self.host} did not mount", pause_s=0.02)

    def _is_mounted(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.ismount(self.path) and os.statvfs(self.path).f_blocks > 0
        return False

    def start(self) -> None:
        if not self.mounted.is_running:
            run("umount", "-l", self.path)
            self.mount()
        self.server = ServerProcess(
            f"{FOLDER}/server-{self.host}", f"{self.path}/queues", host=self.address,
            program=(self._program,), wrapper=on_host(self.host), settings={
                "standby": True, "fsync": "always", "min_free_bytes": 0,
                "listen_address": self.address, "listen_port": PORT})

    @property
    def is_running(self) -> bool:
        return self.server.process.poll() is None

    def link(self, state: str) -> None:
        """Set its link up or down."""
        run("ip", "link", "set", self.host, state)

    def ready(self) -> Optional[str]:
        """Return what it answers to /readyz, None if nothing."""
        with contextlib.suppress(OSError):
            return self.server.ask("GET", "/readyz", timeout=READY_S).body.decode()
        return None


# ---- Clients ------------------------------------------------------------------------------

class Unanswered(OSError):
    """The proxy answered instead of a node, or a node that is about to end."""


class ProxyWire(Wire):
    """A connection to the proxy. Raises OSError where nobody knows what became of a request."""

    def __init__(self, queue: str) -> None:
        super().__init__(PROXY_PORT, ANSWER_S, PROXY)
        self._queue = queue

    def ask(self, *request: Any, **options: Any) -> Answer:
        answer = super().ask(*request, **options)
        if answer.status in (502, 503, 504):
            raise Unanswered(answer.body)
        return answer

    def put(self, body: bytes, query: str = "", queue: str = "") -> Answer:
        return super().put(body, query, queue or self._queue)

    def take(self, query: str = "", queue: str = "") -> Answer:
        return super().take(query, queue or self._queue)


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


class Load:
    """Clients that work through the proxy until `end`."""

    def __init__(self, leased: Ledger, plain: Ledger, numbers: "itertools.count[int]",
                 found: List[str], consume: bool) -> None:
        self._leased, self._plain, self._numbers, self._found = leased, plain, numbers, found
        self._names = itertools.count()
        self._over, self.freeing = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._last, self._longest = time.monotonic(), 0.0
        self.broken_takes = self.purges = 0
        works = [(self._produce, QUEUE)] * PRODUCERS + [(self._produce_and_purge, PLAIN)]
        if consume:
            works += [(self._work, QUEUE)] * WORKERS + [(self._take, PLAIN)] * TAKERS
            works += [(self._compact, QUEUE)]
        self._threads = [threading.Thread(target=self._keep, args=work, daemon=True)
                         for work in works]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    # -- how long nobody answers

    def mark(self) -> None:
        """From now on, look for the longest time between two answers to puts."""
        with self._lock:
            self._last, self._longest = time.monotonic(), 0.0

    def longest_s(self) -> float:
        with self._lock:
            return max(self._longest, time.monotonic() - self._last)

    def last_answer(self) -> float:
        return self._last

    def _answered(self) -> None:
        with self._lock:
            now = time.monotonic()
            self._longest, self._last = max(self._longest, now - self._last), now

    # -- what they do

    def _keep(self, work: Callable[[ProxyWire], None], queue: str) -> None:
        """Work on one connection after the other, while there is a node that serves."""
        while not self._over.is_set():
            try:
                with ProxyWire(queue) as wire:
                    wire.ask("GET", "/readyz")
                    work(wire)
            except OSError:
                time.sleep(BROKEN_PAUSE_S)
            except Exception:
                self._found.append(f"unexpected: {traceback.format_exc()}")
                return

    def _produce(self, wire: ProxyWire) -> None:
        producer = Client(wire, self._leased, key=name_of)
        while not self._over.wait(PUT_PAUSE_S):
            self._put(producer)

    def _put(self, producer: Client) -> None:
        self._expect(producer.put(message(next(self._numbers))), 200)
        self._answered()

    def _work(self, wire: ProxyWire) -> None:
        worker = Client(wire, self._leased, f"worker {next(self._names)}", name_of)
        while not self._over.is_set():
            answer = worker.lease(LEASE_S, POLL_S)
            self._expect(answer, 200, 404)
            if answer.status == 200:
                self._expect(worker.end("ack", answer.headers["Lease-Id"]), 200, 410)

    def _take(self, wire: ProxyWire) -> None:
        """Take; that a node answers says that what it gave to this connection is settled."""
        node = ""
        while not self._over.is_set():
            try:
                answer = wire.take()
            except OSError:
                self.broken_takes += 1
                raise
            self._expect(answer, 200, 404)
            if answer.headers["Node"] != node:
                node, name = answer.headers["Node"], f"taker {next(self._names)}"
            self._plain.settled(name)
            if answer.status == 200:
                self._plain.delivered(name, name_of(answer.body), answer.id, answer.count)
            else:
                time.sleep(EMPTY_PAUSE_S)

    def _produce_and_purge(self, wire: ProxyWire) -> None:
        """Put, and purge now and then what was put: nobody else puts to this queue. One that was
        not answered may come later; so this begins with another one, which then comes behind."""
        producer = Client(wire, self._plain, key=name_of)
        if self.freeing.is_set():
            self._purge(wire)
        for number in itertools.count(1):
            if self._over.wait(PUT_PAUSE_S):
                return
            self._put(producer)
            if self.freeing.is_set() and number % PURGE_EVERY == 0:
                self._purge(wire)

    def _purge(self, wire: ProxyWire) -> None:
        self._plain.dropping()
        self._expect(wire.ask("GET", f"/purge/{PLAIN}"), 200)
        self.purges += 1

    def _compact(self, wire: ProxyWire) -> None:
        while not self._over.wait(0.05):
            if self.freeing.is_set():
                for queue in (QUEUE, PLAIN):
                    self._expect(wire.ask("GET", f"/compact/{queue}"), 200)

    def _expect(self, answer: Answer, *statuses: int) -> None:
        if answer.status not in statuses:
            self._found.append(f"unexpected: answered {answer.status}: {answer.body[:200]!r}")


class Watch:
    """Asks each node directly, from its own host: who says that it serves, and who does."""

    def __init__(self, nodes: List[Node], ledger: Ledger, numbers: "itertools.count[int]",
                 found: List[str]) -> None:
        self._ledger, self._numbers, self._found = ledger, numbers, found
        self._over, self._lock = threading.Event(), threading.Lock()
        self._ready = {node.host: 0.0 for node in nodes}         # when it last said so
        self.both_ready_s = 0.0
        self._served: Dict[Tuple[str, int], List[float]] = {}    # server: first answer, last put
        self._threads = [threading.Thread(target=self._keep, args=(work, node), daemon=True)
                         for node in nodes for work in (self._put, self._ask)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _keep(self, work: Callable[[Node, Wire, int], None], node: Node) -> None:
        go_to(node.host)
        timeout_s = PROBE_S if work == self._put else READY_S
        while not self._over.is_set():
            try:
                server = node.server
                with server.wire(timeout_s) as wire:
                    while node.server is server and not self._over.wait(PROBE_PAUSE_S):
                        work(node, wire, server.pid)
            except OSError:
                time.sleep(PROBE_PAUSE_S)
            except Exception:
                self._found.append(f"unexpected: {traceback.format_exc()}")
                return

    def _put(self, node: Node, wire: Wire, pid: int) -> None:
        sent = time.monotonic()
        answer = Client(wire, self._ledger, key=name_of).put(message(next(self._numbers)))
        if answer.status == 200:
            with self._lock:
                served = self._served.setdefault((node.host, pid), [time.monotonic(), sent])
                served[1] = sent
        elif answer.status != 503:
            self._found.append(f"unexpected: {node} answered {answer.status}: {answer.body[:99]!r}")

    def _ask(self, node: Node, wire: Wire, pid: int) -> None:
        last, is_ready = self._ready[node.host], wire.ask("GET", "/readyz").status == 200
        with self._lock:
            now = time.monotonic()
            self._ready[node.host] = now if is_ready else 0.0
            others = [when for host, when in self._ready.items() if host != node.host]
            if is_ready and last and max(others) > now - READY_S:
                self.both_ready_s += now - last

    def faults(self) -> List[str]:
        """Return which servers answered puts at the same time. Each holds its locks once, from
        before its first answer until after its last such put was sent, at least."""
        with self._lock:
            served = sorted((first, last, host, pid)
                            for (host, pid), (first, last) in self._served.items())
        return [f"double write: {one[2:]} answered 200 to a put {one[1] - other[0]:.3f} s after "
                f"{other[2:]} had answered one"
                for one, other in itertools.combinations(served, 2) if one[1] > other[0]]


# ---- Faults -------------------------------------------------------------------------------

class Cluster:
    """All parts, and what is known of the messages."""

    def __init__(self, rng: random.Random, is_control: bool) -> None:
        self.rng, self.is_control, strict = rng, is_control, not is_control
        self.numbers = itertools.count()
        self.leased, self.plain = Deliveries(), Deliveries()
        self.found: List[str] = []
        self.broken_takes = self.unseen = self.purges = 0
        make_network()
        write(f"{FOLDER}/client.vol", client_volume(strict))
        write(f"{FOLDER}/haproxy.cfg", HAPROXY)
        self.bricks = [Brick(host) for host in BRICKS]
        for brick in self.bricks:
            brick.wait_ready()
        write(f"{FOLDER}/heal.vol", client_volume(
            strict, iam_self_heal_daemon="yes", self_heal_daemon="on", heal_timeout=5,
            background_self_heal_count=0, data_self_heal="on", metadata_self_heal="on",
            entry_self_heal="on"))
        self.healer = Daemon("heal", "", "glusterfs", "-N", "--process-name", "glustershd",
                             "--client-pid=-6", "-f", f"{FOLDER}/heal.vol",
                             "-l", f"{FOLDER}/heal.log")
        self.nodes = [Node(host, SERVER if is_control else SMALL) for host in NODES]
        os.mkdir(f"{self.nodes[0].path}/queues", 0o700)
        self.proxy = Daemon("haproxy", "", "haproxy", "-db", "-f", f"{FOLDER}/haproxy.cfg")

    # -- the state

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        self.wait_healthy()
        self.load = Load(self.leased, self.plain, self.numbers, self.found,
                         not self.is_control)
        self.watch = Watch(self.nodes, self.leased, self.numbers, self.found)

    def active(self) -> Optional[Node]:
        """Return the node that serves, once the other one waits."""
        states = {node: node.ready() or "" for node in self.nodes}
        serving = [node for node, state in states.items() if state.startswith("ready")]
        waiting = [node for node, state in states.items() if "standby" in state]
        return serving[0] if len(serving) == len(waiting) == 1 else None

    def wait_healthy(self, may_end: Optional[Dict[Node, Set[int]]] = None) -> Node:
        """Start what ended, until all is well again; return the active node."""
        def is_well() -> Optional[Node]:
            for node in self.nodes:
                if not node.is_running:
                    self._ended(node, (may_end or {}).get(node, set()))
                    node.start()
            return self.active()
        try:
            return eventually(is_well, HEALTHY_S, "not one active node and one standby", 0.02)
        except Fault as error:
            raise Fault(f"{error}; {self.nodes} say {[node.ready() for node in self.nodes]}"
                        ) from None

    def _ended(self, node: Node, statuses: Set[int]) -> None:
        status = node.server.process.poll()
        if status not in statuses:
            raise Fault(f"{node} ended with {status}: {node.server.stderr()[-500:]}")
        self._read(node)

    def _read(self, node: Node) -> None:
        """Look at what a server wrote until it ended."""
        text = node.server.stderr()
        if "corrupt_record" in text:
            self.found.append(f"double write: {node} found what it cannot read: {text[-2000:]}")
        if "Traceback" in text:
            self.found.append(f"unexpected: {node}: {text[-2000:]}")

    def end_load(self) -> None:
        self.load.end()
        self.watch.end()
        self.broken_takes += self.load.broken_takes
        self.purges += self.load.purges
        self.found += self.watch.faults()

    def drain(self) -> List[str]:
        """Stop both nodes, then take all that is left; return what went wrong so far."""
        self.end_load()
        for node in reversed(self.nodes):
            node.server.stop()
            self._ended(node, {0})
        node = self.nodes[0]
        node.start()
        node.server.wait_ready()
        for queue, ledger in ((QUEUE, self.leased), (PLAIN, self.plain)):
            ledger.fault()
            with Wire(PORT, ANSWER_S, node.address) as wire:
                wire.take = lambda query="", queue=queue, take=wire.take: take(query, queue)
                Client(wire, ledger, key=name_of).drain()
        node.server.stop()
        self._ended(node, {0})
        unseen = [line for line in self.plain.faults() if line.startswith("lost")]
        if len(unseen) > self.broken_takes:
            self.found += unseen
        self.unseen = len(unseen)
        self.found += [line for line in self.plain.faults() if line not in unseen]
        return self.found + self.leased.faults()

    # -- rounds

    def round(self, name: str) -> float:
        """Let a fault happen; return for how long nobody answered."""
        active = self.wait_healthy()
        standby = next(node for node in self.nodes if node is not active)
        time.sleep(self.rng.uniform(0.2, 0.8))
        self.load.mark()
        may_end = FAULTS[name].happen(self, active, standby)
        self.wait_healthy(may_end)
        begun = time.monotonic()
        eventually(lambda: self.load.last_answer() > begun, HEALTHY_S, "nobody answers")
        return self.load.longest_s()


Statuses = Dict[Node, Set[int]]              # with which a node may end


def kill(cluster: Cluster, active: Node, standby: Node) -> Statuses:
    active.server.kill()
    return {active: {KILLED}}


def upgrade(cluster: Cluster, active: Node, standby: Node) -> Statuses:
    active.server.stop()
    return {active: {0}}


def hang(cluster: Cluster, active: Node, standby: Node) -> Statuses:
    """The mount goes on and keeps the lock: nobody else may serve."""
    active.server.process.send_signal(signal.SIGSTOP)
    time.sleep(LOCK_S)
    if "standby" not in (standby.ready() or ""):
        cluster.found.append(f"unexpected: {standby} says {standby.ready()} beside a lock")
    active.server.process.send_signal(signal.SIGCONT)
    return {}


def pause(cluster: Cluster, active: Node, standby: Node) -> Statuses:
    """The host stops, as a virtual machine does, and wakes up when another one serves."""
    active.server.process.send_signal(signal.SIGSTOP)
    if cluster.rng.random() < 0.5 or cluster.is_control:     # else in the midst of a write
        eventually(lambda: is_stopped(active.server.pid), what="the server did not stop")
    active.link("down")
    active.mounted.process.send_signal(signal.SIGSTOP)
    eventually(lambda: (standby.ready() or "").startswith("ready"), HEALTHY_S,
               "the other node did not take over", 0.02)
    time.sleep(cluster.rng.uniform(0, 1))
    active.link("up")
    active.mounted.process.send_signal(signal.SIGCONT)
    time.sleep(LOCK_S if cluster.is_control else cluster.rng.choice((0, 1, LOCK_S)))
    active.server.process.send_signal(signal.SIGCONT)
    end(active)
    return {active: {4}}


def end(node: Node) -> None:
    """What has lost its locks must end by itself."""
    if node.server.wait_end(HEALTHY_S) is None:
        raise Fault(f"{node} goes on without a lock")


def kill_mount(cluster: Cluster, active: Node, standby: Node) -> Statuses:
    active.mounted.kill()
    end(active)
    return {active: {4}}


def cut(cluster: Cluster, active: Node, standby: Node) -> Statuses:
    """For a moment, or for longer than the locks live; the load goes on."""
    active.link("down")
    time.sleep(cluster.rng.choice((cluster.rng.uniform(0.1, 3), cluster.rng.uniform(3, 7))))
    active.link("up")
    time.sleep(1)
    return {active: {4}}


def kill_brick(cluster: Cluster, active: Node, standby: Node) -> Statuses:
    brick = cluster.rng.choice(cluster.bricks)
    brick.kill()
    time.sleep(cluster.rng.uniform(0.1, 3))
    brick.start()
    brick.wait_ready()
    eventually(lambda: not any(one.has_pending() for one in cluster.bricks), HEALTHY_S,
               "the bricks did not become the same again", 0.1)
    return {active: {4}}


def kill_both(cluster: Cluster, active: Node, standby: Node) -> Statuses:
    for node in (active, standby):
        node.server.kill()
    for node in (active, standby):
        node.start()
    return {}


def kill_taker(cluster: Cluster, active: Node, standby: Node) -> Statuses:
    """The standby ends while it takes over."""
    active.server.kill()
    time.sleep(cluster.rng.uniform(0, 0.6))
    standby.server.kill()
    return {active: {KILLED}, standby: {KILLED}}


def free(cluster: Cluster, active: Node, standby: Node) -> Statuses:
    """One of the other faults while segments are freed."""
    cluster.load.freeing.set()
    time.sleep(cluster.rng.uniform(0.3, 1))
    try:
        return cluster.rng.choice((kill, cut, kill_mount, pause))(cluster, active, standby)
    finally:
        cluster.load.freeing.clear()


class Kind(NamedTuple):
    """A row of what is tried."""

    happen: Callable[[Cluster, Node, Node], Statuses]
    what: str


FAULTS = {
    "kill": Kind(kill, "kill -9 of the active server"),
    "upgrade": Kind(upgrade, "SIGTERM of the active server"),
    "hang": Kind(hang, "SIGSTOP of the active server alone"),
    "pause": Kind(pause, "SIGSTOP of the active host, until another one serves"),
    "mount": Kind(kill_mount, "kill -9 of the active node's mount"),
    "cut": Kind(cut, "link of the active node cut and healed"),
    "brick": Kind(kill_brick, "kill -9 of a brick, and its return"),
    "both": Kind(kill_both, "kill -9 of both servers, both started at once"),
    "taker": Kind(kill_taker, "kill -9 of the active server, and of the one that takes over"),
    "free": Kind(free, "one of these while segments are freed"),
}


def play(cluster: Cluster, rounds: Dict[str, int]) -> List[str]:
    """Let each fault happen so often, print its times; return what went wrong."""
    cluster.start()
    for name, count in rounds.items():
        times_s: List[float] = []
        cluster.watch.both_ready_s = 0.0
        try:
            for _ in range(count):
                times_s.append(cluster.round(name))
                if cluster.found or cluster.watch.faults():
                    break
        except (Fault, OSError) as error:
            cluster.found.append(f"unexpected: {name}: {error}")
        if times_s:
            print(f"  {name:8} {len(times_s):3} times; nobody answered for "
                  f"{statistics.median(times_s):6.2f} s (median), {max(times_s):6.2f} s (longest);"
                  f" two said ready for {cluster.watch.both_ready_s:.2f} s", flush=True)
        if cluster.found or cluster.watch.faults():
            cluster.end_load()
            return cluster.found + cluster.leased.faults(False) + cluster.plain.faults(False)
    return cluster.drain()


def inside(options: argparse.Namespace) -> int:
    """Be the first process of namespaces of our own. A tmpfs that only we see goes with us."""
    run("mount", "-t", "tmpfs", "tmpfs", RUN)
    os.mkdir(FOLDER)
    names = options.fault or (FAULTS if options.long else CONTROL if options.control else SHORT)
    count = options.rounds or (LONG if options.long else TRIES if options.control else 1)
    cluster = Cluster(random.Random(options.seed), options.control)
    try:
        found = play(cluster, dict.fromkeys(names, count))
    except (Fault, OSError):
        found = [f"unexpected: {traceback.format_exc()}"]
    for line in found[:SHOWN_FAULTS]:
        print(f"    {line}")
    print(f"failover: leases: {cluster.leased}; {cluster.leased.repeated} came again; takes: "
          f"{cluster.plain}; {cluster.plain.repeated} came again, {cluster.unseen} went with "
          f"{cluster.broken_takes} broken takes; {cluster.purges} purges; {count_faults(found)}")
    if options.control:
        is_found = any(line.startswith(("lost", "double write")) for line in found)
        print("failover: without strict locks a loss or a double write was "
              + ("found, as it must" if is_found else "not found"))
        return 0 if is_found else 1
    if found:
        kept = tempfile.mkdtemp(prefix="failover-", dir=KEPT_DIR)
        run("sh", "-c", f"cp -a {FOLDER}/*.* {FOLDER}/s? {FOLDER}/server-* {kept}")
        print(f"    {len(found)} in all, seed {options.seed}; kept: {kept}")
    return 1 if found else 0


# ---- Main ---------------------------------------------------------------------------------

def install() -> None:
    """Install the packages that are missing. Raises Skipped."""
    missing = [package for command, package in PACKAGES.items() if not shutil.which(command)]
    if missing:
        try:
            run("apt-get", "-qq", "update")
            run("apt-get", "-qq", "install", "-y", "--no-install-recommends", *missing)
        except OSError as error:
            raise Skipped(f"could not install {' '.join(missing)}: {error}") from None


def look_for_kernel() -> None:
    """Raises Skipped if the kernel lacks something."""
    with open("/proc/filesystems", encoding="ascii") as file:
        if "\tfuse\n" not in file.read() or not os.path.exists("/dev/fuse"):
            raise Skipped("the kernel has no FUSE")
    try:
        run(*PRIVATE, "sh", "-c",
            "ip link add one type bridge && ip link add two type veth peer name three")
    except OSError as error:
        raise Skipped(f"the kernel has no namespaces, bridges or veth pairs: {error}") from None


def look_for_nfs() -> None:
    """Raises Skipped if the kernel cannot serve and mount NFSv4."""
    for module in ("nfsd", "nfsv4"):
        with contextlib.suppress(OSError):
            run("modprobe", module)
    with open("/proc/filesystems", encoding="ascii") as file:
        kinds = file.read().split()
    missing = [kind for kind in ("nfsd", "nfs4") if kind not in kinds]
    raise Skipped(f"the kernel has no {' and no '.join(missing)}" if missing
                  else "the proof on NFSv4 is not written")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fault", action="append", choices=FAULTS, help="repeatable")
    parser.add_argument("--rounds", type=int, metavar="N", help="of each fault")
    parser.add_argument("--long", action="store_true", help=f"{LONG} rounds of every fault")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--control", action="store_true",
                        help="without strict locks: 0 if a loss or a double write is found")
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
