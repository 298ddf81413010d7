#!/usr/bin/env python3
"""Measure micro_queue side by side with what it is to be compared to; print a markdown table.

    python3 .ci/bench.py                             # all rows but the long ones
    python3 .ci/bench.py --rounds 1 --seconds 1      # a first look
    python3 .ci/bench.py --row sync --row idle       # some rows: see ROWS at the end
    python3 .ci/bench.py --long                      # also those that take minutes: see LONG
    python3 .ci/bench.py --against OLD.py            # put and take rows for another server too
    python3 .ci/bench.py --calls                     # system calls of a request, by name

Needs Python 3.9 and Linux. `wrk`, `redis-server`, `webdis` and `strace` are installed with
apt-get where they are missing and this is root on a Debian (which may start the services of the
packages); else what needs them is skipped and says so. Data folders are made in BENCH_DIR
(default /var/tmp, which should be a disk) and removed at the end. Every number is the median of
alternated rounds; a round with an unexpected HTTP status or an emptied queue does not count, and
a round that waits for the disk is done again if a bare fdatasync took SLOW_DISK_US around it.
Exit code: 0 all ok or skipped, 1 a MISS or a server that fails, 2 usage.
"""
import argparse
import contextlib
import functools
import gc
import http.client
import http.server
import json
import os
import re
import resource
import selectors
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import (
    Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypeVar, Union)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from test_micro_queue import (  # noqa: E402
    GET, POST, QUEUE, SERVER, Answer, Fault, ServerProcess, Wire, ask, eventually, free_port,
    request, together)

SECOND_QUEUE = "manager-reload"              # of config.example.json, as QUEUE
MESSAGE = b"m" * 100
MILLIONS, MANY, FEW = 5_000_000, 1_000_000, 1_000
BATCH = 1000                                 # messages of a batch
WAITERS, WAKES = 1000, 500                   # long polls, and puts that wake one each
IDLERS, SWEEPS_S = 5000, 4                   # idle connections; for how long another one asks
TAKES_A_SECOND = 100_000                     # more than any server here gives one at a time
BATCHED_TAKES_A_SECOND = 700_000             # and in batches
SLOW_DISK_US = 4000                          # a median fdatasync of a disk that others load
PROBE_S, PATIENCE_S = 0.5, 300               # a look at it; how long a run waits for it in all
REPEATS = 3                                  # of a round on it
STEADY_BATCH, STEADY_RATE, STEADY_S = 100, 720, 60       # messages, batches a second each way
CPU_CALLS = 20_000                           # requests: the system counts hundredths of seconds
CALLS, CALL_CONNECTIONS = 1000, (1, 8, 64)   # requests under strace, and over how many at a time
PATHS = {"put": f"/in/{QUEUE}", "take": f"/out/{QUEUE}", "mix": "/", "lease": "/",
         "batch-put": f"/in/{QUEUE}", "batch-take": f"/out/{QUEUE}?max={BATCH}", "batch-mix": "/",
         "redis-put": f"/LPUSH/{QUEUE}", "redis-take": f"/RPOP/{QUEUE}"}
EMPTY = 404                                  # what a take of an empty queue is answered
MIB = 1 << 20
START_TIMEOUT_S = 120
QUIET_S = 2                                  # before and after an upgrade
Result = TypeVar("Result")

PUT_REQUEST = request("POST", PATHS["put"], MESSAGE, POST)
TAKE_REQUEST = request("GET", PATHS["take"], token=GET)
POLL_REQUEST = request("GET", PATHS["take"] + "?wait=300", token=GET)


class Skipped(Exception):
    """What rows need is not here; the text says what."""


class Row(NamedTuple):
    """A line of the table; a round that does not count left None. Without a limit it is told,
    not judged."""

    what: str
    limit: Optional[float]
    values: List[Optional[float]]
    form: str = "{:.2f}x"
    at_least: bool = True

    def render(self) -> Tuple[str, bool]:
        counted = [value for value in self.values if value is not None]
        wanted, verdict = "", ""
        if self.limit is not None:
            wanted = ("" if self.at_least else "at most ") + self.form.format(self.limit)
            good = bool(counted) and self._reaches(statistics.median(counted))
            verdict = "ok" if good else "MISS"
        measured = "no round counted"
        if counted:
            measured = self.form.format(statistics.median(counted))
            if len(counted) < len(self.values):
                measured += f" ({len(counted)} of {len(self.values)} rounds)"
        return f"| {self.what} | {wanted} | {measured} | {verdict} |", verdict != "MISS"

    def _reaches(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


class Load(NamedTuple):
    """What wrk tells of one call; `bad` counts unexpected statuses, and what else makes the call
    not count."""

    rate: float
    median_us: int
    p99_us: int
    max_us: int
    bad: int


UNCOUNTED = Load(0, 0, 0, 0, 1)


# ---- What it is compared to ---------------------------------------------------------------

class StockHandler(http.server.BaseHTTPRequestHandler):
    """What the standard library gives without further work."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bytes) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(MESSAGE)


class StockServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024                # with 5 the kernel would drop connections

    def handle_error(self, *_: object) -> None:
        pass


def serve_stock(config: str) -> None:
    """Serve at the port that a config of the kit tells."""
    with open(config, encoding="utf-8") as file:
        port = json.load(file)["settings"]["listen_port"]
    StockServer(("127.0.0.1", port), StockHandler).serve_forever()


class Redis:
    """A redis-server whose log is never rewritten, and at `port` the webdis that speaks HTTP for
    it, as packaged. They know nothing of a server's config, so the kit cannot start them. Both
    end with the block."""

    def __init__(self, folder: str, fsync: str) -> None:
        self.port, self._base_port = free_port(), free_port()
        self._folder, self._fsync = folder, fsync
        self._processes: List[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Redis":
        config = os.path.join(self._folder, "webdis.json")
        with open(config, "w", encoding="utf-8") as file:
            json.dump({"redis_host": "127.0.0.1", "redis_port": self._base_port,
                       "http_host": "127.0.0.1", "http_port": self.port, "threads": 2,
                       "daemonize": False, "database": 0, "verbosity": 0,
                       "logfile": os.path.join(self._folder, "webdis.log")}, file)
        try:
            self._start(lambda: Wire(self._base_port).close(), "redis-server",
                        "--port", str(self._base_port), "--dir", self._folder, "--save", "",
                        "--appendonly", "yes", "--appendfsync", self._fsync,
                        "--auto-aof-rewrite-percentage", "0")
            self._start(lambda: served(ask(self.port, "GET", "/PING", token="")),
                        "webdis", config)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()

    def _start(self, probe: Callable[[], object], *command: str) -> None:
        """Start a program and wait until the probe finds that it listens. Raises Fault."""
        log = os.path.join(self._folder, command[0] + ".txt")
        with open(log, "wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file)
        self._processes.append(process)

        def listens() -> bool:
            if process.poll() is not None:
                with open(log, encoding="utf-8", errors="replace") as said:
                    raise Fault(f"{command[0]} did not start: {said.read()[-2000:]}")
            with contextlib.suppress(OSError):
                probe()
                return True
            return False
        eventually(listens, START_TIMEOUT_S, f"{command[0]} did not start")

    def command(self, *words: bytes) -> int:
        """Have Redis itself run a command, and return the number that it answers: webdis may give
        an answer that a client did not wait for to the next one."""
        text = b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
        with Wire(self._base_port, 60) as wire:
            answer = wire.send(b"*%d\r\n%s" % (len(words), text)).socket.recv(1000)
        if not answer.startswith(b":"):
            raise Fault(f"redis answered {answer.decode()}")
        return int(answer[1:])

    def count(self) -> int:
        return self.command(b"LLEN", QUEUE.encode())

    def fill(self, count: int) -> None:
        """Push until the list has `count` messages."""
        while self.count() < count:
            self.command(b"LPUSH", QUEUE.encode(), *[MESSAGE] * BATCH)


# ---- Bench --------------------------------------------------------------------------------

class Bench:
    """The temporary folder, its servers and wrk. `servers` are the files measured: this one and,
    with --against, another, called old in the table."""

    def __init__(self, folder: str, rounds: int, seconds: int,
                 servers: Sequence[str] = (SERVER,)) -> None:
        self.folder, self.rounds, self.seconds = folder, rounds, seconds
        self.servers = servers
        self.sync_us = 0.0                   # a bare fdatasync around the last durable round
        self._number, self._patience_s = 0, float(PATIENCE_S)
        for name in PATHS:
            for close in (False, True):
                with open(self._script(name, close), "w", encoding="ascii") as file:
                    file.write(lua(name, close))

    def _script(self, name: str, close: bool) -> str:
        return os.path.join(self.folder, f"{name}{'-close' if close else ''}.lua")

    def new_folder(self) -> str:
        self._number += 1
        path = os.path.join(self.folder, str(self._number))
        os.mkdir(path)
        return path

    def start(self, fsync: str = "no", path: str = "", subscribers: int = 0, server: str = "",
              **more: int) -> ServerProcess:
        """Start a server on a data folder and wait until it is ready; with subscribers, its
        queue is a broadcast queue; `more` are other settings."""
        def change(config: Dict[str, Any]) -> None:
            if subscribers:
                config["queues"] = [{"name": QUEUE, "kind": "broadcast"}]
                config["tokens"] = [{"name": "sender", "token": POST, "post": [QUEUE]}]
                config["tokens"] += [{"name": f"s{number}", "token": f"{number:030}",
                                      "get": [QUEUE]} for number in range(subscribers)]
        path = path or self.new_folder()
        child = ServerProcess(path + "-server", path, program=(server or self.servers[0],),
                              settings={"fsync": fsync, **more}, change=change)
        return child.wait_ready(START_TIMEOUT_S)

    def start_each(self, fsync: str) -> List[ServerProcess]:
        """Start each of the servers that are compared."""
        return [self.start(fsync, server=server) for server in self.servers]

    def start_stock(self) -> ServerProcess:
        return ServerProcess(self.new_folder(), program=(os.path.abspath(__file__), "--stock"),
                             ).wait_ready(START_TIMEOUT_S)

    def load(self, child: Union[ServerProcess, Redis], name: str, connections: int, *,
             close: bool = False, path: str = "",
             left: Optional[Callable[[], int]] = None) -> Load:
        """Run wrk. Takes that emptied their queue took nothing in the end and do not count: `left`
        tells how many messages there are after it, by default the server does."""
        command = ["wrk", "-t1", f"-c{connections}", f"-d{self.seconds}s", "--latency",
                   "-s", self._script(name, close),
                   f"http://127.0.0.1:{child.port}{path or PATHS[name]}"]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
        found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)", output)
        if not found:
            raise Fault(f"cannot understand wrk:\n{output}")
        requests, duration_us, median_us, p99_us, max_us, bad = map(int, found.groups())
        if left is None and name in ("take", "batch-take"):
            left = functools.partial(ready_count, child)
        return Load(requests * 1e6 / duration_us, median_us, p99_us, max_us,
                    bad + (not requests) + (left is not None and not left()))

    def load_together(self, child: ServerProcess, queues: Sequence[str]) -> Load:
        """Put over 8 connections to each of the queues at the same time: the sum of the rates,
        the latencies of the slowest."""
        loads = together(*(functools.partial(self.load, child, "put", 8, path=f"/in/{queue}")
                           for queue in queues))
        rates, *latencies, bad = zip(*loads)
        return Load(sum(rates), *map(max, latencies), sum(bad))

    def alternated(self, number: int, *calls: Callable[[], Load]) -> List[Load]:
        """Run all; who is first changes with the round."""
        loads = {index: calls[index]() for index in
                 ((number + step) % len(calls) for step in range(len(calls)))}
        return [loads[index] for index in range(len(calls))]

    def durable(self, number: int, *calls: Callable[[], Load]) -> List[Load]:
        """Run all while the disk is what it is without its other users."""
        loads = self.on_calm_disk(lambda: self.alternated(number, *calls))
        return loads or [UNCOUNTED] * len(calls)

    def on_calm_disk(self, measure: Callable[[], Result]) -> Optional[Result]:
        """Measure, again if the disk was slow around it; None if it was slow each time."""
        for _ in range(REPEATS):
            before_us = self._await_calm()
            result = measure()
            after_us = fdatasync_us(self)
            self.sync_us = (before_us + after_us) / 2
            if max(before_us, after_us) < SLOW_DISK_US:
                return result
            print(f"  slow disk: fdatasync {before_us:.0f} us before, {after_us:.0f} us after",
                  file=sys.stderr)
        return None

    def _await_calm(self) -> float:
        """Wait for a disk that is not slow, while there is patience; return its fdatasync."""
        sync_us = fdatasync_us(self)
        while sync_us >= SLOW_DISK_US and self._patience_s > 0:
            self._patience_s -= 1 + PROBE_S
            time.sleep(1)
            sync_us = fdatasync_us(self)
        return sync_us


class Figure:
    """What is told of the server: a row, and with --against the old server's and how they
    compare, from the same rounds."""

    def __init__(self, bench: Bench, what: str, limit: float, form: str = "{:.2f}x",
                 at_least: bool = True) -> None:
        self.rows = [Row(what, limit, [], form, at_least)]
        if len(bench.servers) > 1:
            self.rows += [Row(f"{what}: old", None, [], form),
                          Row(f"{what}: new against old", None, [])]

    def add(self, values: Sequence[Optional[float]]) -> None:
        """Add a round: a value of each server."""
        for row, value in zip(self.rows, values):
            row.values.append(value)
        if len(values) == 2:
            new, old = values
            self.rows[2].values.append(new / old if new and old else None)


def rows_of(figures: Sequence[Figure]) -> List[Row]:
    return [row for figure in figures for row in figure.rows]


def need(*programs: str) -> None:
    """Install what is missing, where that can be done. Raises Skipped."""
    missing = [program for program in programs if not shutil.which(program)]
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        for command in (["update"], ["install", "-y", *missing]):
            subprocess.run(["apt-get", "-qq", *command], env=environment, check=False,
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=sys.stderr)
        missing = [program for program in missing if not shutil.which(program)]
    if missing:
        raise Skipped(f"no {', no '.join(missing)}: apt-get install -y {' '.join(missing)}")


def need_files(count: int) -> None:
    """Allow this process and the servers that it starts `count` open files. Raises Skipped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    with contextlib.suppress(ValueError, OSError):
        most = hard if hard == resource.RLIM_INFINITY else max(hard, count)
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, most))
        return
    raise Skipped(f"{count} open files are needed, {hard} allowed: ulimit -n")


DONE = """done = function(summary, latency)
  io.write(string.format("RESULT %d %d %d %d %d %d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), latency.max, summary.errors.status))
end
"""


def lua(name: str, close: bool) -> str:
    """Return wrk's script: static requests, puts and takes in turn, or leases and acks."""
    def headers(token: str) -> str:
        extra = ', ["Connection"] = "close"' if close else ""
        extra += ', ["Content-Type"] = "application/x-ndjson"' if "batch-" in name else ""
        return f'{{["Authorization"] = "Bearer {token}"{extra}}}'
    body = MESSAGE.decode()
    if name.startswith("redis-"):
        return (f'wrk.method = "PUT"\nwrk.body = "{body}"\n' if name == "redis-put" else "") + DONE
    if name in ("put", "batch-put"):
        what = f'"{body}"' if name == "put" else f'string.rep("{body}\\n", {BATCH})'
        return f'wrk.method = "POST"\nwrk.body = {what}\nwrk.headers = {headers(POST)}\n' + DONE
    if name == "lease":
        return (f'local take, leases = nil, {{}}\ninit = function()\n'
                f'  take = wrk.format("GET", "/out/{QUEUE}?lease=60", {headers(GET)})\nend\n'
                f'request = function()\n  local lease = table.remove(leases)\n'
                f'  return lease and wrk.format("POST", "/ack/{QUEUE}?lease=" .. lease, '
                f'{headers(GET)}) or take\nend\n'
                f'response = function(status, headers)\n'
                f'  table.insert(leases, headers["Lease-Id"])\nend\n') + DONE
    if name in ("take", "batch-take"):
        return f'wrk.headers = {headers(GET)}\n' + DONE
    batch = name == "batch-mix"
    what = f'string.rep("{body}\\n", {BATCH})' if batch else f'"{body}"'
    query = f"?max={BATCH}" if batch else ""
    return (f'local count, put, take = 0\ninit = function()\n'
            f'  put = wrk.format("POST", "/in/{QUEUE}", {headers(POST)}, {what})\n'
            f'  take = wrk.format("GET", "/out/{QUEUE}{query}", {headers(GET)})\nend\n'
            f'request = function()\n  count = count + 1\n'
            f'  return count % 2 == 1 and put or take\nend\n') + DONE


def served(answer: Optional[Answer], *statuses: int) -> Answer:
    """Return an answer that has one of the statuses, by default 200. Raises Fault."""
    if answer is None:
        raise Fault("a server closed a connection")
    if answer.status not in (statuses or (200,)):
        raise Fault(f"a request was answered {answer.status}: {answer.body[:200].decode()}")
    return answer


def metric(child: ServerProcess, name: str, labels: str = "") -> int:
    """Return a number of the queue, 0 if it is not told."""
    text = served(child.ask("GET", "/metrics")).body.decode()
    found = re.search(rf'_{name}{{queue_name="{QUEUE}"{labels}}} (\d+)', text)
    return int(found[1]) if found else 0


def ready_count(child: ServerProcess) -> int:
    return metric(child, "messages", ',[^}]*state="ready"')


def ratio(one: Load, other: Load) -> Optional[float]:
    print(f"  {one.rate:.0f} against {other.rate:.0f} requests a second"
          f"{', does not count' if one.bad or other.bad else ''}", file=sys.stderr)
    return None if one.bad or other.bad else one.rate / other.rate


def ratios(loads: Sequence[Load], other: Load) -> List[Optional[float]]:
    return [ratio(load, other) for load in loads]


def fill(child: ServerProcess, count: int) -> None:
    """Put until `count` messages are ready."""
    missing = count - ready_count(child)
    if missing > 0:
        put_batches(child, missing)


def put_batches(child: ServerProcess, count: int, payload: bytes = MESSAGE,
                query: str = "") -> None:
    """Put `count` messages."""
    with child.wire(600) as wire:
        for start in range(0, count, BATCH):
            served(wire.ask("POST", f"/in/{QUEUE}{query}",
                            (payload + b"\n") * min(BATCH, count - start), POST,
                            ("Content-Type: application/x-ndjson",)))


def take_parts(child: ServerProcess, share: float) -> None:
    """Take so much of each batch, in the order of the queue; the rest stays until a restart."""
    taken = round(BATCH * share)
    with child.wire(600) as wire:
        while True:
            for query in (f"?max={taken}", f"?max={BATCH - taken}&lease=3600"):
                if served(wire.ask("GET", PATHS["take"] + query, token=GET), 200,
                          EMPTY).status == EMPTY:
                    return


def prefill(bench: Bench, count: int, payload: bytes = MESSAGE, taken: float = 0,
            query: str = "") -> str:
    """Return a data folder into which `count` messages were put; of any thousand that stand
    together the share `taken` is gone."""
    folder = bench.new_folder()
    child = bench.start(path=folder)
    put_batches(child, count, payload, query)
    if taken:
        take_parts(child, taken)
    child.stop()
    return folder


# ---- Rows ---------------------------------------------------------------------------------

# Connections, whether each serves one request only, and what is wanted against stock.
CASES = {"put": ((1, False, 1.35), (8, False, 5.5), (64, False, 6.0), (8, True, 4.7)),
         "take": ((1, False, 1.7), (8, False, 4.8), (64, False, 5.0), (8, True, 4.0))}


def with_connections(connections: int) -> str:
    return f"{connections} connection{'s' if connections > 1 else ''}"


def stock_rows(bench: Bench) -> List[Row]:
    """Put and take without syncs against the standard library's server: what its HTTP alone
    costs."""
    figures = {(name, connections, close): Figure(
        bench, f"{name}, fsync no, {with_connections(connections)}, against stock"
        + (", no keep-alive" if close else ""), limit)
        for name, cases in CASES.items() for connections, close, limit in cases}
    stock = bench.start_stock()
    for number in range(bench.rounds):
        servers = bench.start_each("no")
        for (name, connections, close), figure in figures.items():
            if name == "take":
                for child in servers:
                    fill(child, TAKES_A_SECOND * bench.seconds)
            load = functools.partial(bench.load, name=name, connections=connections, close=close)
            *ours, other = bench.alternated(
                number, *(functools.partial(load, child) for child in servers),
                functools.partial(load, stock, left=lambda: 1))
            figure.add(ratios(ours, other))
        for child in servers:
            child.kill()
    stock.kill()
    return rows_of([*figures.values()])


def fdatasync_us(bench: Bench) -> float:
    """Return the median of an fdatasync after 150 appended bytes, and nothing else."""
    path, times, offset = os.path.join(bench.folder, "sync"), [], 0
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        end = time.monotonic() + PROBE_S
        while time.monotonic() < end or not times:
            offset += os.pwrite(fd, b"s" * 150, offset)
            start = time.perf_counter()
            os.fdatasync(fd)
            times.append(time.perf_counter() - start)
    finally:
        os.close(fd)
    return statistics.median(times) * 1e6


def sync_rows(bench: Bench) -> List[Row]:
    """What a sync for each put costs a client that is alone, told in two ways."""
    what = "put, fsync always, 1 connection, median latency"
    share = Figure(bench, what + ', against "no" + 1.3 fdatasync', 1, at_least=False)
    syncs = Figure(bench, what + ' over that of "no", in fdatasyncs that make a file longer', 1,
                   "{:.2f}", at_least=False)
    servers = [*bench.start_each("always"), *bench.start_each("no")]
    for number in range(bench.rounds):
        loads = bench.durable(number, *(functools.partial(bench.load, child, "put", 1)
                                        for child in servers))
        half = len(servers) // 2
        pairs = [(one.median_us, other.median_us) if not one.bad and not other.bad else None
                 for one, other in zip(loads[:half], loads[half:])]
        print(f"  sync: always and no {pairs} us, fdatasync {bench.sync_us:.0f} us",
              file=sys.stderr)
        share.add([pair and pair[0] / (pair[1] + 1.3 * bench.sync_us) for pair in pairs])
        syncs.add([pair and (pair[0] - pair[1]) / bench.sync_us for pair in pairs])
    for child in servers:
        child.kill()
    return rows_of([share, syncs])


def group_rows(bench: Bench) -> List[Row]:
    """What group commit makes of many clients."""
    figure = Figure(bench, 'put, fsync always, 64 connections, against "no"', 0.75)
    servers = [*bench.start_each("always"), *bench.start_each("no")]
    for number in range(bench.rounds):
        loads = bench.durable(number, *(functools.partial(bench.load, child, "put", 64)
                                        for child in servers))
        half = len(servers) // 2
        figure.add([ratio(one, other) for one, other in zip(loads[:half], loads[half:])])
    for child in servers:
        child.kill()
    return figure.rows


def two_queue_rows(bench: Bench) -> List[Row]:
    """Whether the syncs of two queues go on at the same time, and none waits for the other. In
    both cases two wrk of 8 connections each put."""
    what = "put to two queues, fsync always, 8 connections each"
    rate = Figure(bench, what + ", against one queue with 16", 1.2)
    tail = Figure(bench, what + ", 99th percentile of the slower queue", 5, "{:.1f} ms",
                  at_least=False)
    servers = bench.start_each("always")
    for number in range(bench.rounds):
        loads = bench.durable(number, *(
            functools.partial(bench.load_together, child, (QUEUE, second))
            for second in (SECOND_QUEUE, QUEUE) for child in servers))
        two, one = loads[:len(servers)], loads[len(servers):]
        rate.add([ratio(load, single) for load, single in zip(two, one)])
        tail.add([None if load.bad else load.p99_us / 1000 for load in two])
    for child in servers:
        child.kill()
    return rows_of([rate, tail])


def redis_rows(bench: Bench) -> List[Row]:
    """A put and a take against what people otherwise put behind curl: webdis and Redis. A put is
    synced by both. Takes wait for no sync by default here, and with everysec there."""
    need("redis-server", "webdis")
    return [*redis_figures(bench, "put", "always", {1: 1.0, 8: 1.3, 64: 1.1}),
            *redis_figures(bench, "take", "everysec", {1: 1.7, 8: 1.3, 64: 1.0})]


def redis_figures(bench: Bench, name: str, fsync: str, limits: Dict[int, float]) -> List[Row]:
    """Put or take against Redis with `appendfsync` as told; both hold enough for the round."""
    figures = {connections: Figure(
        bench, f"{name}, fsync always, {with_connections(connections)}, "
        f"against Redis with appendfsync {fsync}", limit) for connections, limit in limits.items()}
    rounds = bench.durable if name == "put" else bench.alternated
    servers = bench.start_each("always")
    with Redis(bench.new_folder(), fsync) as redis:
        for number in range(bench.rounds):
            for connections, figure in figures.items():
                if name == "take":
                    redis.fill(TAKES_A_SECOND * bench.seconds)
                    for child in servers:
                        fill(child, TAKES_A_SECOND * bench.seconds)
                *ours, other = rounds(number, *(
                    functools.partial(bench.load, child, name, connections) for child in servers),
                    functools.partial(bench.load, redis, "redis-" + name, connections,
                                      left=redis.count))
                figure.add(ratios(ours, other))
    for child in servers:
        child.kill()
    return rows_of([*figures.values()])


def waiting_rows(bench: Bench) -> List[Row]:
    """Put and take in turn, so that the number of waiting messages stays what it is."""
    speed = Row("put and take with 1,000,000 waiting, against 1,000", 0.95, [])
    memory = Row("resident memory with 1,000,000 waiting, more than with 1,000", 8, [],
                 "{:.1f} MiB", at_least=False)
    many_folder = prefill(bench, MANY)
    many, few = bench.start(path=many_folder), bench.start(path=prefill(bench, FEW))
    for number in range(bench.rounds):
        speed.values.append(ratio(*bench.alternated(
            number, lambda: bench.load(many, "mix", 8), lambda: bench.load(few, "mix", 8))))
        memory.values.append((many.resident_bytes() - few.resident_bytes()) / MIB)
    many.kill()
    few.kill()
    shutil.rmtree(many_folder)
    return [speed, memory]


def start_rows(bench: Bench) -> List[Row]:
    """From the start of the process to the first 200 of /readyz."""
    killed, delayed, clean = (
        Row(f"start after {what}", limit, [], "{:.2f} s", at_least=False)
        for what, limit in (("kill -9 with 1,000,000 waiting", 0.3),
                            ("kill -9 with 1,000,000 delayed", 1.5),
                            ("a clean stop with 1,000,000 waiting", 0.3)))
    folder, delayed_folder = prefill(bench, MANY), prefill(bench, MANY, query="?delay=86400")
    for _ in range(bench.rounds):
        child = bench.start("always", folder)
        bad = bench.load(child, "put", 64).bad
        for row, number in ((killed, signal.SIGKILL), (clean, signal.SIGTERM)):
            child.stop(number)
            start = time.monotonic()
            child = bench.start("always", folder)
            row.values.append(None if bad else time.monotonic() - start)
        if ready_count(child) < MANY:
            raise Fault("messages were lost")
        child.kill()
        child = bench.start("always", delayed_folder)
        put_batches(child, FEW, query="?delay=86400")
        child.kill()
        start = time.monotonic()
        bench.start("always", delayed_folder).kill()
        delayed.values.append(time.monotonic() - start)
    shutil.rmtree(folder)
    shutil.rmtree(delayed_folder)
    return [killed, delayed, clean]


HAPROXY = """
defaults
    mode http
    timeout connect 100ms
    timeout client 60s
    timeout server 60s
    retries 30
    option redispatch 1
    retry-on conn-failure
    option httpchk GET /readyz
    http-check expect status 200
    default-server check inter 100ms rise 1 fall 1 on-marked-down shutdown-sessions
listen nodes
    bind 127.0.0.1:{}
    server n1 127.0.0.1:{}
    server n2 127.0.0.1:{}
"""


def upgrade_rows(bench: Bench) -> List[Row]:
    """Two nodes on one folder behind a proxy, with 10,000 messages waiting; the active one is
    stopped, as for an upgrade, while clients put."""
    need("haproxy")
    silent, latest = (Row(f"an upgrade of one of two nodes, {what}", limit, [], "{:.0f} ms",
                          at_least=False)
                      for what, limit in (("longest time without a 200", 500),
                                          ("latest answer without an upgrade", 100)))
    for number in range(bench.rounds):
        path, ports = bench.new_folder(), [free_port() for _ in range(3)]
        active, standby = (ServerProcess(f"{path}-n{port}", path, settings={
            "standby": True, "listen_port": port}) for port in ports[1:])
        eventually(lambda active=active, standby=standby: any(map(serves, (active, standby))))
        if serves(standby):
            active, standby = standby, active
        put_batches(active, 10_000)
        config = os.path.join(bench.folder, f"haproxy{number}.cfg")
        with open(config, "w", encoding="ascii") as file:
            file.write(HAPROXY.format(*ports))
        with subprocess.Popen(["haproxy", "-db", "-f", config], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as proxy:
            try:
                answers = putting(ports[0], active.stop)
            finally:
                proxy.kill()
        standby.kill()
        silent.values.append(max(b - a for (_, a), (_, b) in zip(answers, answers[1:])) * 1000)
        calm = [end - start for start, end in answers if end < answers[0][0] + QUIET_S]
        latest.values.append(max(calm) * 1000)
    return [silent, latest]


def serves(node: ServerProcess) -> bool:
    with contextlib.suppress(OSError):
        return served(node.ask("GET", "/readyz"), 200, 503).status == 200
    return False


def putting(port: int, act: Callable[[], object]) -> List[Tuple[float, float]]:
    """Put through the proxy, on four connections, and act in the middle; return when each put
    that got a 200 began and ended, in the order of their ends."""
    answers: List[Tuple[float, float]] = []
    over = threading.Event()

    def put() -> None:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)    # connects again
        while not over.is_set():
            start, status = time.monotonic(), 0
            try:
                client.request("POST", PATHS["put"], MESSAGE, {"Authorization": f"Bearer {POST}"})
                with client.getresponse() as answer:
                    answer.read()
                    status = answer.status
            except (OSError, http.client.HTTPException):
                client.close()
            if status == 200:
                answers.append((start, time.monotonic()))
            time.sleep(0.001)                # a client of many, not a load

    threads = [threading.Thread(target=put) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(QUIET_S + 1)
    act()
    acted = time.monotonic()
    time.sleep(QUIET_S)
    over.set()
    for thread in threads:
        thread.join()
    if acted > max(answers)[0]:
        raise Fault("no put was answered behind it")
    return sorted(answers, key=lambda answer: answer[1])


def batch_rows(bench: Bench) -> List[Row]:
    """Messages a second in batches, against one at a time, and taken against put; each round on
    a new folder."""
    rows = {name: Row(f"{name}, fsync always, 8 connections, batches of {BATCH}, messages a second "
                      "against single ones", 30, [], "{:.0f}x")
            for name in ("put", "take", "put and take in turn")}
    taken = Row(f"batches of {BATCH}, fsync always, 8 connections, messages a second, take "
                "against put", 0.8, [])
    for number in range(bench.rounds):
        child, batched = bench.start("always"), {}
        for name, row in rows.items():
            if name == "take":
                fill(child, BATCHED_TAKES_A_SECOND * bench.seconds)
            kind = name if name in PATHS else "mix"
            many, one = bench.durable(number, functools.partial(bench.load, child, "batch-" + kind,
                                                                8),
                                      functools.partial(bench.load, child, kind, 8))
            print(f"  {name}: {many.rate * BATCH:.0f} messages a second in batches, "
                  f"{one.rate:.0f} alone", file=sys.stderr)
            row.values.append(None if one.bad or many.bad else many.rate * BATCH / one.rate)
            batched[name] = many
        taken.values.append(ratio(batched["take"], batched["put"]))
        child.kill()
    return [*rows.values(), taken]


def broadcast_rows(bench: Bench) -> List[Row]:
    """A put has one copy and one record, however many subscribers there are."""
    rows = {count: Row(f"put, fsync no, 8 connections, {count} subscribers, against 1", 0.9, [])
            for count in (10, 50)}
    children = {count: bench.start(subscribers=count) for count in (1, *rows)}
    for number in range(bench.rounds):
        for count, row in rows.items():
            row.values.append(ratio(*bench.alternated(
                number, lambda: bench.load(children[count], "put", 8),  # noqa: B023
                lambda: bench.load(children[1], "put", 8))))
    for child in children.values():
        child.kill()
    return list(rows.values())


def lease_rows(bench: Bench) -> List[Row]:
    """Lease and ack as a pair against a plain take."""
    row = Row("lease + ack as a pair, fsync always, 8 connections, against a plain take", 0.33, [])
    child = bench.start("always")
    for number in range(bench.rounds):
        fill(child, 2 * TAKES_A_SECOND * bench.seconds)
        pair, plain = bench.durable(number, lambda: bench.load(child, "lease", 8),
                                    lambda: bench.load(child, "take", 8))
        row.values.append(ratio(pair._replace(rate=pair.rate / 2), plain))
    child.kill()
    return [row]


def consumer_rows(bench: Bench) -> List[Row]:
    """From a put to the answer of one of many long polls, which then polls again."""
    rows = [Row(f"a put to one of {WAITERS:,} waiting consumers, {what}", limit, [], form,
                at_least=False)
            for what, limit, form in (("median", 0.4, "{:.1f} ms"), ("p99", 1, "{:.1f} ms"),
                                      ("resident memory", 36, "{:.1f} MiB"))]
    need_files(WAITERS + 200)
    child = bench.start("always")
    selector = selectors.DefaultSelector()
    for _ in range(WAITERS):
        selector.register(child.wire(60).send(POLL_REQUEST), selectors.EVENT_READ)
    time.sleep(1)
    for _ in range(bench.rounds):
        times = bench.on_calm_disk(lambda: sorted(wake_one(child, selector) * 1000
                                                  for _ in range(WAKES)))
        values = (statistics.median(times), times[int(WAKES * 0.99)]) if times else (None, None)
        for row, value in zip(rows, (*values, child.resident_bytes() / MIB)):
            row.values.append(value)
    child.kill()
    for key in list(selector.get_map().values()):
        key.fileobj.close()
    return rows


def wake_one(child: ServerProcess, selector: selectors.BaseSelector) -> float:
    """Put a message from a thread of its own; return the seconds until a consumer has it."""
    thread = threading.Thread(target=functools.partial(
        child.ask, "POST", PATHS["put"], MESSAGE, POST, timeout=60))
    start = time.perf_counter()
    thread.start()
    wire: Wire = selector.select(60)[0][0].fileobj       # type: ignore[assignment]
    took = time.perf_counter() - start
    served(wire.answer())
    wire.send(POLL_REQUEST)
    thread.join()
    return took


def idler_rows(bench: Bench) -> List[Row]:
    """What many clients that keep a connection and ask nothing cost: memory, and time of one that
    does ask, while the server looks through the idle ones. It takes of an empty queue: the disk
    has no part in it. What it waits without them is the machine's share."""
    memory, longest, alone = (
        Row(f"{IDLERS:,} idle connections, {what}", limit, [], form, at_least=False)
        for what, limit, form in (("resident memory each", 0.6, "{:.2f} KiB"),
                                  ("longest answer to another", 1, "{:.1f} ms"),
                                  ("the same before they come", None, "{:.1f} ms")))
    need_files(IDLERS + 500)
    for _ in range(bench.rounds):
        child = bench.start(max_connections=IDLERS + 100, idle_timeout=3600)
        honest = child.wire(60)
        alone.values.append(longest_answer_ms(honest, SWEEPS_S))
        before = child.resident_bytes()
        idlers = [child.wire(60) for _ in range(IDLERS)]
        for idler in idlers:
            served(idler.send(TAKE_REQUEST).answer(), EMPTY)
        memory.values.append((child.resident_bytes() - before) / IDLERS / 1024)
        longest.values.append(longest_answer_ms(honest, SWEEPS_S))
        child.kill()
        for wire in (honest, *idlers):
            wire.close()
    return [memory, longest, alone]


def longest_answer_ms(wire: Wire, seconds: float) -> float:
    """Ask without a pause; the collector of this process is not to be what is measured."""
    longest, now = 0.0, time.perf_counter()
    end = now + seconds
    gc.disable()
    while now < end:
        start = time.perf_counter()
        answer = wire.send(TAKE_REQUEST).answer()
        now = time.perf_counter()
        longest = max(longest, now - start)
        served(answer, EMPTY)
    gc.enable()
    return longest * 1000


def idle_rows(bench: Bench) -> List[Row]:
    """A server that has nothing to do: one round, for it has nobody to alternate with."""
    child = bench.start("always")
    time.sleep(2)
    before, start = child.cpu_seconds(), time.monotonic()
    time.sleep(10)
    share = (child.cpu_seconds() - before) / (time.monotonic() - start) * 100
    resident = child.resident_bytes() / MIB
    child.kill()
    return [Row("idle, resident memory", 32, [resident], "{:.1f} MiB", at_least=False),
            Row("idle, of a core", 0.1, [share], "{:.3f} %", at_least=False)]


def cpu_rows(bench: Bench) -> List[Row]:
    """What of a core a request takes: with as much waiting that nothing may be looked through."""
    rows = {name: Row(f"CPU of a {name} with {MILLIONS:,} waiting, against {FEW:,}", limit, [],
                      at_least=False) for name, limit in (("put", 1.1), ("take", 1.2))}
    folder = prefill(bench, MILLIONS)
    children = [bench.start(path=folder), bench.start(path=prefill(bench, FEW))]
    for number in range(bench.rounds):
        for name, row in rows.items():
            text, used = PUT_REQUEST if name == "put" else TAKE_REQUEST, [0.0, 0.0]
            for index in (number % 2, 1 - number % 2):
                wires = [children[index].wire(60) for _ in range(8)]
                before = children[index].cpu_seconds()
                exchange(wires, text, CPU_CALLS)
                used[index] = children[index].cpu_seconds() - before
                for wire in wires:
                    wire.close()
            row.values.append(used[0] / used[1])
    for child in children:
        child.kill()
    shutil.rmtree(folder)
    return [*rows.values()]


def disk_rows(bench: Bench) -> List[Row]:
    """What the server writes into its files for a request."""
    rows = []
    for name, connections, limit in (("put", 1, 134), ("take", 1, 50), ("take", 64, 2)):
        row = Row(f"disk written for a {name} of 100 bytes, {with_connections(connections)}",
                  limit, [], "{:.0f} B", at_least=False)
        for _ in range(bench.rounds):
            child = bench.start("no")
            if name == "take":
                fill(child, TAKES_A_SECOND * bench.seconds)
            total = f"messages_{'in' if name == 'put' else 'out'}_total"
            count, size = metric(child, total), written_bytes(child)
            bad = bench.load(child, name, connections).bad
            size = written_bytes(child) - size
            row.values.append(None if bad else size / (metric(child, total) - count))
            child.kill()
        rows.append(row)
    return rows


def written_bytes(child: ServerProcess) -> int:
    """Return what it wrote so far; what it sends is not counted."""
    with open(f"/proc/{child.pid}/io", encoding="ascii") as file:
        return int(dict(line.split(": ") for line in file)["wchar"])


def steady_rows(bench: Bench) -> List[Row]:
    """Much comes and goes, little waits: what is dead has to be freed as fast. One round."""
    what = (f"steady {STEADY_BATCH * STEADY_RATE:,} messages a second in batches of "
            f"{STEADY_BATCH}, {FEW:,} waiting, {STEADY_S} s: ")
    rows = [Row(what + name, limit, [], form, at_least=False) for name, limit, form in (
        ("latest answer", 0.05, "{:.3f} s"), ("folder above what is held", 48, "{:.0f} MiB"),
        ("resident memory", 48, "{:.0f} MiB"))]
    child = bench.start("always")
    fill(child, FEW)
    with LongestSync(bench, 0.1) as syncs:
        rate, *values = steady(child)
    print(f"  steady: {rate:.0f} batches a second, latest answer {values[0] * 1000:.0f} ms, "
          f"fdatasync {syncs.longest_ms:.0f} ms", file=sys.stderr)
    for row, value in zip(rows, values):
        row.values.append(value if rate > STEADY_RATE * 0.98 else None)
    child.kill()
    return rows


def steady(child: ServerProcess) -> Tuple[float, float, float, float]:
    """Put and take batches over 8 connections each, as many a second as wanted. Return how many
    there were, the latest answer (s), the folder's and the memory's largest size (MiB)."""
    put = request("POST", PATHS["put"], (MESSAGE + b"\n") * STEADY_BATCH, POST,
                  ("Content-Type: application/x-ndjson",))
    take = request("GET", f"{PATHS['take']}?max={STEADY_BATCH}", token=GET)
    idle = {text: [child.wire(60) for _ in range(8)] for text in (put, take)}
    under_way: Dict[Wire, Tuple[bytes, float]] = {}
    selector = selectors.DefaultSelector()
    for wire in idle[put] + idle[take]:
        selector.register(wire, selectors.EVENT_READ)
    start = now = time.perf_counter()
    count, sampled, latest, folder, resident = 0, now, 0.0, 0, 0
    while now < start + STEADY_S:
        while count < (now - start) * STEADY_RATE and all(idle.values()):
            for text, wires in idle.items():
                under_way[wires[-1]] = text, time.perf_counter()
                wires.pop().send(text)
            count += 1
        for key, _ in selector.select(0.001):
            wire: Wire = key.fileobj         # type: ignore[assignment]
            served(wire.answer(), 200, EMPTY)
            text, sent = under_way.pop(wire)
            latest = max(latest, time.perf_counter() - sent)
            idle[text].append(wire)
        now = time.perf_counter()
        if now > sampled + 0.5:
            sampled, resident = now, max(resident, child.resident_bytes())
            folder = max(folder, folder_bytes(os.path.join(child.path, QUEUE)))
    selector.close()
    for wire in [*under_way, *idle[put], *idle[take]]:
        wire.close()
    held = ready_count(child) * (len(MESSAGE) + 34)
    return count / STEADY_S, latest, (folder - held) / MIB, resident / MIB


def folder_bytes(path: str) -> int:
    """Return what the files take of the disk."""
    size = 0
    for name in os.listdir(path):
        with contextlib.suppress(FileNotFoundError):
            size += os.stat(os.path.join(path, name)).st_blocks * 512
    return size


def compact_rows(bench: Bench) -> List[Row]:
    """Put and take before and while a log of 1 GiB is freed of what is dead: a bit less than
    half, everywhere, so that nothing begins by itself and all that is held is copied."""
    rows = {name: Row(f"{name} while 1 GiB is compacted, against before", 0.8, [])
            for name in ("put", "take")}
    latest = Row("latest answer while 1 GiB is compacted, besides the longest fdatasync", 50, [],
                 "{:.0f} ms", at_least=False)
    full = prefill(bench, (1 << 30) // 1058, b"m" * 1024, 0.45)  # bytes of a record
    for _ in range(bench.rounds):
        folder = bench.new_folder()
        shutil.copytree(full, folder, dirs_exist_ok=True)
        os.sync()
        compact_round(bench, folder, rows, latest)
        shutil.rmtree(folder)
    return [*rows.values(), latest]


def compact_round(bench: Bench, folder: str, rows: Dict[str, Row], latest: Row) -> None:
    """Add one round to the rows; what outlasted the compaction does not count."""
    child = bench.start("always", folder)
    before = {name: bench.load(child, name, 8) for name in rows}
    statuses: List[int] = []
    thread = threading.Thread(target=lambda: statuses.append(
        child.ask("GET", f"/compact/{QUEUE}", timeout=600).status))
    start = time.monotonic()
    thread.start()
    loads = []
    with LongestSync(bench) as syncs:
        time.sleep(0.1)
        for name, row in rows.items():
            loads.append(bench.load(child, name, 8))
            row.values.append(ratio(loads[-1], before[name]) if thread.is_alive() else None)
        while thread.is_alive():
            loads.append(bench.load(child, "put", 8))
    thread.join()
    slowest_ms = max(load.max_us for load in loads) / 1000
    print(f"  compact: took {time.monotonic() - start:.1f} s, latest answer {slowest_ms:.0f} ms, "
          f"fdatasync {syncs.longest_ms:.0f} ms, before "
          f"{max(load.max_us for load in before.values()) / 1000:.0f} ms", file=sys.stderr)
    counts = statuses == [200] and not any(load.bad for load in loads)
    latest.values.append(max(0.0, slowest_ms - syncs.longest_ms) if counts else None)
    child.kill()


class LongestSync:
    """Sync a file of its own every now and then, to tell the disk's share of a late answer."""

    def __init__(self, bench: Bench, pause_s: float = 0.01) -> None:
        self.longest_ms, self._pause_s = 0.0, pause_s
        self._path, self._over = os.path.join(bench.folder, "longest"), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "LongestSync":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with open(self._path, "wb", buffering=0) as file:
            while not self._over.wait(self._pause_s):
                file.write(b"s" * 150)
                start = time.perf_counter()
                os.fdatasync(file.fileno())
                self.longest_ms = max(self.longest_ms, (time.perf_counter() - start) * 1000)


# ---- Calls --------------------------------------------------------------------------------

def print_calls(bench: Bench) -> None:
    """Print, for each server, how often a request makes which system call."""
    need("strace")
    for server in bench.servers:
        columns: Dict[str, Dict[str, float]] = {}
        for fsync in ("no", "always"):
            child = bench.start(fsync, server=server)
            for name in ("put", "take"):
                for connections in CALL_CONNECTIONS:
                    columns[f"{name} {fsync} {connections}"] = calls_of(bench, child, name,
                                                                        connections)
            child.kill()
        print(f"\nSystem calls of a request, {server}, {CALLS:,} requests, by connections:\n")
        print_table(columns)


def print_table(columns: Dict[str, Dict[str, float]]) -> None:
    """Print the calls as rows, the most frequent first; what made none in 200 is left out."""
    sums: Dict[str, float] = {}
    for column in columns.values():
        for call, count in column.items():
            sums[call] = sums.get(call, 0) + count
    print(f"| call | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for call in sorted(sums, key=lambda call: -sums[call]):
        cells = [f"{column.get(call, 0):.2f}" for column in columns.values()]
        if any(cell > "0.00" for cell in cells):
            print(f"| {call} | {' | '.join(cell if cell > '0.00' else '' for cell in cells)} |")
    print(f"| all | {' | '.join(f'{sum(column.values()):.2f}' for column in columns.values())} |")


def calls_of(bench: Bench, child: ServerProcess, name: str, connections: int) -> Dict[str, float]:
    """Count the server's system calls for CALLS requests, by name, per request. Connections are
    open and served once before, so that none of their opening is counted."""
    if name == "take":
        fill(child, CALLS + 2 * connections)
    text = PUT_REQUEST if name == "put" else TAKE_REQUEST
    wires = [child.wire(60) for _ in range(connections)]
    exchange(wires, text, connections)
    output = os.path.join(bench.folder, "calls")
    command = ["strace", "-f", "-c", "-o", output, "-p", str(child.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
        said = tracer.stderr.readline()
        if b"attached" not in said:
            raise Skipped(f"strace: {said.decode().strip()}")
        exchange(wires, text, CALLS)
        tracer.send_signal(signal.SIGINT)
        tracer.stderr.read()
    for wire in wires:
        wire.close()
    with open(output, encoding="ascii") as file:   # share, seconds, us a call, calls, errors, name
        found = re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) +(?:\d+ +)?([a-z]\w*)$", file.read(),
                           re.MULTILINE)
    return {call: int(count) / CALLS for count, call in found if call != "total"}


def exchange(wires: List[Wire], text: bytes, count: int) -> None:
    """Have `count` requests answered with 200; each wire asks again once it was answered."""
    selector = selectors.DefaultSelector()
    for wire in wires:
        selector.register(wire.send(text), selectors.EVENT_READ)
    sent, answered = len(wires), 0
    while answered < count:
        for key, _ in selector.select(60):
            served(key.fileobj.answer())     # type: ignore[union-attr]
            answered += 1
            if sent < count:
                key.fileobj.send(text)       # type: ignore[union-attr]
                sent += 1
    selector.close()


# ---- main ---------------------------------------------------------------------------------

# What --row knows; the long ones only if they are asked for.
ROWS: Dict[str, Callable[[Bench], List[Row]]] = {
    "stock": stock_rows, "sync": sync_rows, "group": group_rows, "two": two_queue_rows,
    "redis": redis_rows, "waiting": waiting_rows,
    "start": start_rows, "upgrade": upgrade_rows, "batch": batch_rows, "lease": lease_rows,
    "broadcast": broadcast_rows, "consumers": consumer_rows,
    "idlers": idler_rows, "idle": idle_rows, "disk": disk_rows, "cpu": cpu_rows,
    "steady": steady_rows, "compact": compact_rows}
LONG = ("cpu", "steady", "compact")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure micro_queue with wrk.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2, help="of each call of wrk")
    parser.add_argument("--row", action="append", choices=ROWS, help="only this; repeatable")
    parser.add_argument("--long", action="store_true", help="also " + ", ".join(LONG))
    parser.add_argument("--server", default=SERVER, help="the micro_queue.py to measure")
    parser.add_argument("--against", help="another micro_queue.py, in the same rounds")
    parser.add_argument("--calls", action="store_true", help="count system calls instead")
    parser.add_argument("--stock", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-c", dest="config", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stock:
        serve_stock(options.config)
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds and --seconds must be at least 1")
    servers = [path for path in (options.server, options.against) if path]
    for path in servers:
        if not os.path.isfile(path):
            parser.error(f"no file {path}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = options.row or [name for name in ROWS if name not in LONG or options.long]
    folder = tempfile.mkdtemp(prefix="bench-", dir=os.environ.get("BENCH_DIR", "/var/tmp"))
    try:
        bench = Bench(folder, options.rounds, options.seconds, servers)
        if options.calls:
            print_calls(bench)
            return 0
        need("wrk")
        return report(bench, names)
    except Skipped as reason:
        print(f"bench: {reason}", file=sys.stderr)
        return 2
    except Fault as fault:
        sys.exit(f"bench: {fault}")
    finally:
        ServerProcess.kill_all()
        shutil.rmtree(folder, ignore_errors=True)


def report(bench: Bench, names: List[str]) -> int:
    """Run the rows and print the table, each row once it is measured."""
    missed = False
    print("| what | wanted | measured | |\n|---|---|---|---|", flush=True)
    for name in names:
        print(f"bench: {name}", file=sys.stderr, flush=True)
        try:
            lines = [row.render() for row in ROWS[name](bench)]
        except Skipped as reason:
            lines = [(f"| {name} | | skipped: {reason} | |", True)]
        print("\n".join(text for text, _ in lines), flush=True)
        missed = missed or not all(good for _, good in lines)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
