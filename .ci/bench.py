#!/usr/bin/env python3
"""Measure micro_queue side by side with what it is to be compared to; print a markdown table.

    python3 .ci/bench.py                             # all rows but the long one
    python3 .ci/bench.py --rounds 1 --seconds 1      # a first look
    python3 .ci/bench.py --row sync --row idle       # some rows: see ROWS at the end
    python3 .ci/bench.py --long                      # also while a log of 1 GiB is compacted

Needs Python 3.9, Linux and `wrk`. Data folders are made in BENCH_DIR (default /var/tmp, which
should be a disk) and removed at the end. Every number is the median of alternated rounds; a
round with an unexpected HTTP status does not count. Exit code: 0 all ok, 1 a MISS, 2 usage.
"""
import argparse
import functools
import http.server
import json
import logging
import os
import re
import selectors
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import micro_queue as mq  # noqa: E402
from test_micro_queue import (  # noqa: E402
    GET, POST, QUEUE, Fault, ServerProcess, Wire, ask, request)

MESSAGE = b"m" * 100
MANY, FEW = 1_000_000, 1_000
BATCH = 1000                                 # messages of a batch
WAITERS, WAKES = 1000, 500                   # long polls, and puts that wake one each
PATHS = {"put": f"/in/{QUEUE}", "take": f"/out/{QUEUE}", "mix": "/", "lease": "/",
         "batch-put": f"/in/{QUEUE}", "batch-take": f"/out/{QUEUE}?max={BATCH}", "batch-mix": "/"}
MIB = 1 << 20
START_TIMEOUT_S = 120


class Row(NamedTuple):
    """A line of the table; a round that does not count left None."""

    what: str
    limit: float
    values: List[Optional[float]]
    form: str = "{:.2f}x"
    at_least: bool = True

    def render(self) -> Tuple[str, bool]:
        counted = [value for value in self.values if value is not None]
        if not counted:
            measured, good = "no round counted", False
        else:
            value = statistics.median(counted)
            good = value >= self.limit if self.at_least else value <= self.limit
            measured = self.form.format(value)
            if len(counted) < len(self.values):
                measured += f" ({len(counted)} of {len(self.values)} rounds)"
        wanted = ("" if self.at_least else "at most ") + self.form.format(self.limit)
        return f"| {self.what} | {wanted} | {measured} | {'ok' if good else 'MISS'} |", good


class Load(NamedTuple):
    """What wrk tells of one call; `bad` counts unexpected statuses."""

    rate: float
    median_us: int
    max_us: int
    bad: int


# ---- The standard library's server --------------------------------------------------------

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


# ---- Bench --------------------------------------------------------------------------------

class Bench:
    """The temporary folder, its servers and wrk."""

    def __init__(self, folder: str, rounds: int, seconds: int) -> None:
        self.folder, self.rounds, self.seconds = folder, rounds, seconds
        self._number = 0
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

    def start(self, fsync: str = "no", path: str = "", subscribers: int = 0) -> ServerProcess:
        """Start a server on a data folder and wait until it is ready; with subscribers, its
        queue is a broadcast queue."""
        def change(config: Dict[str, Any]) -> None:
            if subscribers:
                config["queues"] = [{"name": QUEUE, "kind": "broadcast"}]
                config["tokens"] = [{"name": "sender", "token": POST, "post": [QUEUE]}]
                config["tokens"] += [{"name": f"s{number}", "token": f"{number:030}",
                                      "get": [QUEUE]} for number in range(subscribers)]
        path = path or self.new_folder()
        server = ServerProcess(path + "-server", path, settings={"fsync": fsync}, change=change)
        return server.wait_ready(START_TIMEOUT_S)

    def start_stock(self) -> ServerProcess:
        return ServerProcess(self.new_folder(), program=(os.path.abspath(__file__), "--stock"),
                             ).wait_ready()

    def load(self, child: ServerProcess, name: str, connections: int, *, close: bool = False,
             seconds: int = 0) -> Load:
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds or self.seconds}s", "--latency",
                   "-s", self._script(name, close), f"http://127.0.0.1:{child.port}{PATHS[name]}"]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
        found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+)", output)
        if not found:
            sys.exit(f"bench: cannot understand wrk:\n{output}")
        requests, duration_us, median_us, max_us, bad = map(int, found.groups())
        return Load(requests * 1e6 / duration_us, median_us, max_us,
                    bad if requests else 1)

    def fill(self, child: ServerProcess, count: float, name: str = "put") -> None:
        """Put until `count` messages are ready."""
        while ready_count(child) < count:
            if self.load(child, name, 8, seconds=1).bad:
                sys.exit("bench: a put was refused; is the disk full?")

    def alternated(self, number: int, one: Callable[[], Load],
                   other: Callable[[], Load]) -> Tuple[Load, Load]:
        """Run both; who is first changes with the round."""
        if number % 2:
            second = other()
            return one(), second
        first = one()
        return first, other()


def lua(name: str, close: bool) -> str:
    """Return wrk's script: static requests, puts and takes in turn, or leases and acks."""
    def headers(token: str) -> str:
        extra = ', ["Connection"] = "close"' if close else ""
        extra += ', ["Content-Type"] = "application/x-ndjson"' if "batch-" in name else ""
        return f'{{["Authorization"] = "Bearer {token}"{extra}}}'
    body = MESSAGE.decode()
    done = ('done = function(summary, latency)\n  io.write(string.format("RESULT %d %d %d %d %d\\n"'
            ', summary.requests, summary.duration, latency:percentile(50), latency.max, '
            'summary.errors.status))\nend\n')
    if name in ("put", "batch-put"):
        what = f'"{body}"' if name == "put" else f'string.rep("{body}\\n", {BATCH})'
        return f'wrk.method = "POST"\nwrk.body = {what}\nwrk.headers = {headers(POST)}\n' + done
    if name == "lease":
        return (f'local take, leases = nil, {{}}\ninit = function()\n'
                f'  take = wrk.format("GET", "/out/{QUEUE}?lease=60", {headers(GET)})\nend\n'
                f'request = function()\n  local lease = table.remove(leases)\n'
                f'  return lease and wrk.format("POST", "/ack/{QUEUE}?lease=" .. lease, '
                f'{headers(GET)}) or take\nend\n'
                f'response = function(status, headers)\n'
                f'  table.insert(leases, headers["Lease-Id"])\nend\n') + done
    if name in ("take", "batch-take"):
        return f'wrk.headers = {headers(GET)}\n' + done
    batch = name == "batch-mix"
    what = f'string.rep("{body}\\n", {BATCH})' if batch else f'"{body}"'
    query = f"?max={BATCH}" if batch else ""
    return (f'local count, put, take = 0\ninit = function()\n'
            f'  put = wrk.format("POST", "/in/{QUEUE}", {headers(POST)}, {what})\n'
            f'  take = wrk.format("GET", "/out/{QUEUE}{query}", {headers(GET)})\nend\n'
            f'request = function()\n  count = count + 1\n'
            f'  return count % 2 == 1 and put or take\nend\n') + done


def ready_count(child: ServerProcess) -> int:
    text = child.ask("GET", "/metrics").body.decode()
    found = re.search(rf'_messages{{queue_name="{QUEUE}",[^}}]*state="ready"}} (\d+)', text)
    return int(found[1]) if found else 0


def ratio(one: Load, other: Load) -> Optional[float]:
    print(f"  {one.rate:.0f} against {other.rate:.0f} requests a second"
          f"{', does not count' if one.bad or other.bad else ''}", file=sys.stderr)
    return None if one.bad or other.bad else one.rate / other.rate


def prefill(path: str, count: int, payload: bytes = MESSAGE, settle: int = 0) -> None:
    """Make a data folder with `count` messages, of which the first `settle` are settled."""
    queue = mq.Queue(mq.QueueConfig(name=QUEUE), os.path.join(path, QUEUE), fsync="no")
    queue.log.lock()
    queue.recover()
    for start in range(0, count, 1000):
        queue.append([payload] * min(1000, count - start))
    for start in range(0, settle, 1000):
        taken = [queue.take() for _ in range(min(1000, settle - start))]
        messages = [message for delivery in taken if delivery for message in delivery.messages]
        queue.settle(mq.Delivery(mq.FIFO, messages))
    queue.close()


# ---- Rows ---------------------------------------------------------------------------------

CASES = ((1, False, 1.4), (8, False, 1.6), (64, False, 1.5), (8, True, 1.5))


def stock_rows(bench: Bench) -> List[Row]:
    """Put and take without syncs against the standard library's server."""
    rows: Dict[Tuple[str, int, bool], Row] = {}
    for name in ("put", "take"):
        for connections, close, limit in CASES:
            plural = "s" if connections > 1 else ""
            what = f"{name}, fsync no, {connections} connection{plural}, against stock"
            rows[name, connections, close] = Row(what + (", no keep-alive" if close else ""),
                                                 limit, [])
    stock, fastest = bench.start_stock(), 0.0
    for number in range(bench.rounds):
        ours = bench.start()
        for connections, close, _ in CASES:
            for name in ("put", "take"):
                if name == "take":
                    bench.fill(ours, 1.5 * fastest * bench.seconds + FEW)
                one, other = bench.alternated(
                    number, lambda: bench.load(ours, name, connections, close=close),  # noqa: B023
                    lambda: bench.load(stock, name, connections, close=close))  # noqa: B023
                rows[name, connections, close].values.append(ratio(one, other))
                fastest = max(fastest, one.rate)
        ours.kill()
    stock.kill()
    return list(rows.values())


def fdatasync_us(bench: Bench) -> float:
    """Return the median of an fdatasync after 150 appended bytes, and nothing else."""
    path, times, offset = os.path.join(bench.folder, "sync"), [], 0
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        end = time.monotonic() + bench.seconds
        while time.monotonic() < end or not times:
            offset += os.pwrite(fd, b"s" * 150, offset)
            start = time.perf_counter()
            os.fdatasync(fd)
            times.append(time.perf_counter() - start)
    finally:
        os.close(fd)
    return statistics.median(times) * 1e6


def sync_rows(bench: Bench) -> List[Row]:
    """What a sync for each put costs a client that is alone."""
    row = Row('put, fsync always, 1 connection, median latency, against "no" + 1.3 fdatasync', 1,
              [], at_least=False)
    always, without = bench.start("always"), bench.start()
    for number in range(bench.rounds):
        one, other = bench.alternated(number, lambda: bench.load(always, "put", 1),
                                      lambda: bench.load(without, "put", 1))
        sync_us = fdatasync_us(bench)
        print(f"  sync: always {one.median_us} us, no {other.median_us} us, "
              f"fdatasync {sync_us:.0f} us", file=sys.stderr)
        row.values.append(None if one.bad or other.bad
                          else one.median_us / (other.median_us + 1.3 * sync_us))
    always.kill()
    without.kill()
    return [row]


def group_rows(bench: Bench) -> List[Row]:
    """What group commit makes of many clients."""
    row = Row('put, fsync always, 64 connections, against "no"', 0.65, [])
    always, without = bench.start("always"), bench.start()
    for number in range(bench.rounds):
        row.values.append(ratio(*bench.alternated(
            number, lambda: bench.load(always, "put", 64), lambda: bench.load(without, "put", 64))))
    always.kill()
    without.kill()
    return [row]


def waiting_rows(bench: Bench) -> List[Row]:
    """Put and take in turn, so that the number of waiting messages stays what it is."""
    speed = Row("put and take with 1,000,000 waiting, against 1,000", 0.9, [])
    memory = Row("resident memory with 1,000,000 waiting, more than with 1,000", 8, [],
                 "{:.1f} MiB", at_least=False)
    many_folder, few_folder = bench.new_folder(), bench.new_folder()
    prefill(many_folder, MANY)
    prefill(few_folder, FEW)
    many, few = bench.start(path=many_folder), bench.start(path=few_folder)
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
    killed = Row("start after kill -9 with 1,000,000 waiting", 1.5, [], "{:.2f} s", at_least=False)
    clean = Row("start after a clean stop with 1,000,000 waiting", 0.3, [], "{:.2f} s",
                at_least=False)
    folder = bench.new_folder()
    prefill(folder, MANY)
    for _ in range(bench.rounds):
        child = bench.start("always", folder)
        bad = bench.load(child, "put", 64).bad
        for row, number in ((killed, signal.SIGKILL), (clean, signal.SIGTERM)):
            child.stop(number)
            start = time.monotonic()
            child = bench.start("always", folder)
            row.values.append(None if bad else time.monotonic() - start)
        if ready_count(child) < MANY:
            sys.exit("bench: messages were lost")
        child.kill()
    shutil.rmtree(folder)
    return [killed, clean]


def batch_rows(bench: Bench) -> List[Row]:
    """Messages a second in batches, against one at a time; each round on a new folder."""
    rows = {name: Row(f"{name}, fsync always, 8 connections, batches of {BATCH}, messages a second "
                      "against single ones", 30, [], "{:.0f}x")
            for name in ("put", "take", "put and take in turn")}
    for _ in range(bench.rounds):
        child = bench.start("always")
        for name, row in rows.items():
            if name == "take":
                bench.fill(child, 500_000 * bench.seconds, "batch-put")
            kind = name if name in PATHS else "mix"
            one = bench.load(child, kind, 8)
            many = bench.load(child, "batch-" + kind, 8)
            print(f"  {name}: {many.rate * BATCH:.0f} messages a second in batches, "
                  f"{one.rate:.0f} alone", file=sys.stderr)
            row.values.append(None if one.bad or many.bad else many.rate * BATCH / one.rate)
        child.kill()
    return list(rows.values())


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
        bench.fill(child, 30_000 * bench.seconds, "batch-put")
        pair, plain = bench.alternated(number, lambda: bench.load(child, "lease", 8),
                                       lambda: bench.load(child, "take", 8))
        row.values.append(ratio(pair._replace(rate=pair.rate / 2), plain))
    child.kill()
    return [row]


POLL = request("GET", f"/out/{QUEUE}?wait=300", token=GET)


def consumer_rows(bench: Bench) -> List[Row]:
    """From a put to the answer of one of many long polls, which then polls again."""
    rows = [Row(f"a put to one of {WAITERS:,} waiting consumers, {what}", limit, [], form,
                at_least=False)
            for what, limit, form in (("median", 10, "{:.1f} ms"), ("p99", 50, "{:.1f} ms"),
                                      ("resident memory", 100, "{:.1f} MiB"))]
    child = bench.start("always")
    selector = selectors.DefaultSelector()
    for _ in range(WAITERS):
        selector.register(child.wire(60).send(POLL), selectors.EVENT_READ)
    time.sleep(1)
    for _ in range(bench.rounds):
        times = sorted(wake_one(child, selector) * 1000 for _ in range(WAKES))
        for row, value in zip(rows, (statistics.median(times), times[int(WAKES * 0.99)],
                                     child.resident_bytes() / MIB)):
            row.values.append(value)
    child.kill()
    return rows


def wake_one(child: ServerProcess, selector: selectors.BaseSelector) -> float:
    """Put a message from a thread of its own; return the seconds until a consumer has it."""
    thread = threading.Thread(target=functools.partial(
        ask, child.port, "POST", f"/in/{QUEUE}", MESSAGE, POST))
    start = time.perf_counter()
    thread.start()
    wire: Wire = selector.select(60)[0][0].fileobj       # type: ignore[assignment]
    took = time.perf_counter() - start
    wire.answer()
    wire.send(POLL)
    thread.join()
    return took


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


def compact_rows(bench: Bench) -> List[Row]:
    """Put and take before and while a log of 1 GiB is rewritten; just under half is dead, so
    that no compaction begins by itself."""
    rows = {name: Row(f"{name} while 1 GiB is compacted, against before", 0.5, [])
            for name in ("put", "take")}
    latest = Row("latest answer while 1 GiB is compacted", 250, [], "{:.0f} ms", at_least=False)
    count = (1 << 30) // (1024 + mq.HEAD.size)
    full = bench.new_folder()
    prefill(full, count, b"m" * 1024, int(count * 0.45))
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
    time.sleep(0.1)
    loads = []
    for name, row in rows.items():
        loads.append(bench.load(child, name, 8))
        row.values.append(ratio(loads[-1], before[name]) if thread.is_alive() else None)
    while thread.is_alive():                 # the switch to the new log is the hard part
        loads.append(bench.load(child, "put", 8))
    thread.join()
    slowest_ms = max(load.max_us for load in loads) / 1000
    print(f"  compact: took {time.monotonic() - start:.1f} s, latest answer {slowest_ms:.0f} ms, "
          f"before {max(load.max_us for load in before.values()) / 1000:.0f} ms", file=sys.stderr)
    counts = statuses == [200] and not any(load.bad for load in loads)
    latest.values.append(slowest_ms if counts else None)
    child.kill()


# What --row knows. The long one is last.
ROWS: Dict[str, Callable[[Bench], List[Row]]] = {
    "stock": stock_rows, "sync": sync_rows, "group": group_rows, "waiting": waiting_rows,
    "start": start_rows, "batch": batch_rows, "lease": lease_rows,
    "broadcast": broadcast_rows, "consumers": consumer_rows,
    "idle": idle_rows, "compact": compact_rows}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure micro_queue with wrk.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2, help="of each call of wrk")
    parser.add_argument("--row", action="append", choices=ROWS, help="only this; repeatable")
    parser.add_argument("--long", action="store_true", help="also the row `compact`")
    parser.add_argument("--stock", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-c", "--config", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stock:
        with open(options.config, encoding="utf-8") as file:
            port = json.load(file)["settings"]["listen_port"]
        StockServer(("127.0.0.1", port), StockHandler).serve_forever()
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds and --seconds must be at least 1")
    if not shutil.which("wrk"):
        print("bench: wrk is missing: apt-get install -y wrk", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    logging.disable(logging.CRITICAL)
    names = options.row or [name for name in ROWS if name != "compact" or options.long]
    folder = tempfile.mkdtemp(prefix="bench-", dir=os.environ.get("BENCH_DIR", "/var/tmp"))
    try:
        return report(Bench(folder, options.rounds, options.seconds), names)
    except Fault as fault:
        sys.exit(f"bench: {fault}")
    finally:
        ServerProcess.kill_all()
        shutil.rmtree(folder, ignore_errors=True)


def report(bench: Bench, names: List[str]) -> int:
    """Run the rows and print the table."""
    rows: List[Row] = []
    for name in names:
        print(f"bench: {name}", file=sys.stderr, flush=True)
        rows += ROWS[name](bench)
    print("| what | wanted at least | measured | |\n|---|---|---|---|")
    lines = [row.render() for row in rows]
    print("\n".join(text for text, _ in lines))
    return 0 if all(good for _, good in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
