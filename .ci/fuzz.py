#!/usr/bin/env python3
"""Put odd requests before the server and before two other parsers; judge where each request ends.

    python3 .ci/fuzz.py                              # some hundred requests: a look
    python3 .ci/fuzz.py --count 5000 --seed 7
    python3 .ci/fuzz.py --long                       # 57,000 requests

A grammar with oddities (line ends, blanks, lengths, codings, chunks, versions, hosts) makes inputs
of one to three pipelined requests, most of them puts, whose bodies are then taken out again. The
references are h11 and Node's http (llhttp). Judged, because the opposite is request smuggling or
luck with the network:

- Where a request ends. What the server and a reference both accept has the same requests with the
  same bodies. To refuse what a reference accepts is right; to accept what both references refuse
  is not, unless DIFFERENCES gives the section of an RFC that allows it.
- Splits. An input sent at once, in random parts, and a byte at a time gets the same statuses, and
  the same bodies are stored.

CONNECT and Upgrade are left out: what follows them is no HTTP. An input that fails is made smaller
and printed as a Python literal; `--input LITERAL` tries one again.

Needs Python 3.9, `node`, and h11 from PyPI in the Python that runs this; without them it says so
and does nothing. Exit code: 0 all good, or skipped; 1 a fault; 2 usage.
"""
import argparse
import collections
import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Counter, Dict, Iterator, List, NamedTuple, Optional, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from test_micro_queue import ADMIN, Fault, ServerProcess  # noqa: E402

try:
    import h11
except ImportError:
    h11 = None                   # main says so

SHORT, LONG = 600, 57_000        # requests
TIMEOUT_S = 10
SINGLE_BYTES = 700               # a longer input is not sent byte by byte: it takes too long
PAUSE_S = 0.0015                 # between parts: the server receives each alone
LINE_BYTES, HEAD_BYTES = 8 << 10, 32 << 10       # the server's limits: lengths about them
PRINTED = 8                      # faults that are made smaller and printed
MINIMISE_S = 20                  # for each of them
STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d\d\d) ")
LENGTH = re.compile(rb"\r\nContent-Length: (\d+)")
MESSAGE_ID = re.compile(rb"\r\nMessage-Id: (\d+)")

# What an answer that closes says of the request: it was no request, or where it ends is unknown.
REFUSALS = {400, 413, 414, 417, 431, 501, 505}
REFUSED, CLOSED, WAITS = "refused", "closed", "waits for more"


class Seen(NamedTuple):
    """What a parser made of an input: the body of each request, None if unknown, and whether it
    refused the rest, wanted to close, or waits for more."""

    bodies: List[Optional[bytes]]
    end: str
    why: str = ""                # what a reference calls its reason to refuse
    statuses: Tuple[int, ...] = ()           # of ours


class Difference(NamedTuple):
    """Something that the server accepts on purpose though both references do not: an input that
    has the pattern, or one that Node refuses with this error."""

    reason: str
    pattern: Optional["re.Pattern[bytes]"] = None
    why: str = "none"


DIFFERENCES = (
    Difference("RFC 9110, 2.5: a minor version that is not known is taken as the highest known",
               re.compile(rb"HTTP/1\.[2-9]")),
    Difference("RFC 9112, 7.1.1: blanks may stand before and behind an extension's semicolon",
               re.compile(rb"\n[0-9A-Fa-f]+(?:[ \t]+;|;[ \t]+)")),
    Difference("RFC 9110, 5.6.3: a tab is a blank, too; Node takes none behind these values",
               re.compile(rb"(?i)\n(?:content-length|transfer-encoding):[ \t]*\w+ *\t")),
    Difference("RFC 9110, 9.1: any token may be a method", why="HPE_INVALID_METHOD"),
)


# ---- Inputs -------------------------------------------------------------------------------
# Each piece is one of many forms: the good ones, or, at an oddity, any of the odd ones.

class Grammar:
    """Makes inputs. `_left` is how many oddities may still come: a pile of them is refused at
    the first, and says nothing of the others."""

    def __init__(self, rng: random.Random, token: str) -> None:
        self._rng, self._token, self._left = rng, token.encode(), 0

    def input(self) -> Tuple[bytes, int]:
        """Return an input and the number of requests that were meant."""
        self._left = self._rng.choice((0, 1, 1, 1, 2, 3))
        count = self._rng.choice((1, 1, 2, 2, 3))
        data = b"".join(self.request() for _ in range(count))
        if self._left and self._rng.random() < 0.3:
            data = self._change_a_byte(data)
        return data, count

    def request(self) -> bytes:
        before = self._one_of([b""], [b"\r\n", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b" ", b"\x00"],
                              0.04)
        body, framing = self._body()
        fields = [self._host(), self._authorization(), *framing, *self._others()]
        self._rng.shuffle(fields)
        first_line, lines = self._first_line(), b"".join(fields)
        if self._rng.random() < 0.02:        # about as long as is allowed
            length = LINE_BYTES + self._rng.randrange(-2, 3) - len(first_line.rstrip(b"\r\n"))
            first_line = first_line.replace(b" HTTP", b"?" + b"x" * (length - 1) + b" HTTP", 1)
        if self._rng.random() < 0.02:
            length = HEAD_BYTES + self._rng.randrange(-2, 6) - len(first_line) - len(lines)
            lines += b"Filler: " + b"x" * (length - 8) + b"\r\n"
        return b"".join((before, first_line, lines, self._line_end(), body))

    def _one_of(self, good: List[bytes], odd: List[bytes], chance: float = 0.08) -> bytes:
        if self._left and self._rng.random() < chance:
            self._left -= 1
            return self._rng.choice(odd)
        return self._rng.choice(good)

    def _line_end(self) -> bytes:
        return self._one_of([b"\r\n"], [b"\n", b"\r", b"\r\r\n", b"\n\r", b"", b" \r\n",
                                        b"\r\n\r\n", b"\x0b\r\n", b"\x85", b"\r\n\t\r\n"], 0.015)

    def _first_line(self) -> bytes:
        method = self._one_of(
            [b"POST"] * 8 + [b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"],
            [b"post", b"P@ST", b"", b"POST\t", b"BREW", b"\x80", b"PO\x00ST"], 0.02)
        target = self._one_of(
            [b"/in/fuzz"] * 8 + [b"/in/fuzz/", b"http://x/in/fuzz", b"/healthz", b"/in/other"],
            [b"*", b"", b"in/fuzz", b"/in/fu zz", b"/in/fuzz#x", b"//in/fuzz", b"/in/%66uzz",
             b"/\x80", b"/in/fuzz?\x7f", b"/" + b"x" * 9000,
             b"http://a@x/in/fuzz", b"x:80", b"HTTP://x:1/in/fuzz?"], 0.05)
        version = self._one_of(
            [b"HTTP/1.1"] * 9 + [b"HTTP/1.0"],
            [b"HTTP/1.2", b"HTTP/1.9", b"HTTP/2.0", b"HTTP/0.9", b"http/1.1", b"HTTP/1,1",
             b"HTTP/01.1", b"HTTP/1.10", b"", b"HTTP/1.1 ", b"HTTP/1", b"HTTP/1.1\x0b"], 0.05)
        blank = self._one_of([b" "], [b"  ", b"\t", b"", b"\x0b", b"\xa0"], 0.02)
        return method + blank + target + b" " + version + self._line_end()

    def _field(self, name: bytes, value: bytes) -> bytes:
        colon = self._one_of([b": "] * 5 + [b":", b":\t", b":  "],
                             [b" :", b"\t: ", b"", b" ", b"=", b":\x00", b":\r\n ", b":\n"], 0.01)
        blank = self._one_of([b""] * 5 + [b" ", b"\t "], [b"\r", b"\x00", b"\x0b", b"\r\n "], 0.01)
        return name + colon + value + blank + self._line_end()

    def _host(self) -> bytes:
        value = self._one_of([b"x", b"x:80", b"127.0.0.1", b"[::1]:80", b""],
                             [b"x:80:80", b"[::1", b"a@b", b"a,b", b"a/b", b"a#b", b"a?b", b"a b",
                              b"x:port", b"\x80"], 0.04)
        line = self._field(self._rng.choice((b"Host", b"host", b"HOST")), value)
        return self._one_of([line], [b"", line + line, line + b"Host: y\r\n"], 0.03)

    def _authorization(self) -> bytes:
        value = self._one_of([b"Bearer " + self._token], [b"Bearer", b"Basic eDp5", b""], 0.03)
        return self._field(b"Authorization", value)

    def _others(self) -> Iterator[bytes]:
        if self._rng.random() < 0.2:
            yield self._field(b"Connection", self._one_of(
                [b"keep-alive", b"Keep-Alive", b"x", b"close"],
                [b"close, keep-alive", b",close,", b"clo se", b"", b"keep-alive\x00"]))
        if self._rng.random() < 0.1:
            yield self._field(b"Expect", self._one_of([b"100-continue", b"100-Continue"],
                                                      [b"", b"x", b"100-continue, x"]))
        if self._rng.random() < 0.3:
            yield self._field(self._one_of(
                [b"X", b"A-b", b"!#$%&'*+.^_`|~"],
                [b"", b"a b", b"a(b", b"\x80", b" X", b"\tX", b"X\x00", b"X\r\n"]), self._one_of(
                [b"", b"v", b"a  b", b"\x80\xff", b"x" * 300],
                [b"\x01", b"a\x00b", b"\x7f", b"a\r\n b", b"a\rb", b"a\nb", b"a\r\n\tb"]))

    # -- bodies

    def _payload(self) -> bytes:
        if self._rng.random() < 0.1:         # what a parser that lost its place would take up
            return self._rng.choice((b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
                                     b"\r\n\r\n", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
                                     b"5\r\nabcde\r\n0\r\n\r\n"))
        return bytes(self._rng.choices(b"abcdef\r\n0 \x00\xff", k=self._rng.randrange(1, 30)))

    def _body(self) -> Tuple[bytes, List[bytes]]:
        """Return a body and the lines that frame it."""
        payload, kind = self._payload(), self._rng.random()
        if kind < 0.1:
            return b"", []
        if kind < 0.5:
            return payload, self._length(len(payload))
        lines = self._coding()
        if self._left and self._rng.random() < 0.06:
            self._left -= 1
            lines += self._length(self._rng.choice((0, 3, len(payload))))
        return self._chunks(payload), lines

    def _length(self, length: int) -> List[bytes]:
        number = b"%d" % length
        value = self._one_of([number] * 4 + [b"0" + number], [
            b"+" + number, b"-" + number, b"0x" + number, number + b", " + number, number + b",",
            b"", number + b" 0", number + b";", b"1" + b"0" * 18 + number, b"0" * 30 + number,
            b"%d" % (length + 1), b"%d" % max(0, length - 1), number + b".0", b"\xb2"], 0.15)
        line = self._field(self._rng.choice((b"Content-Length", b"content-length")), value)
        again = self._one_of([b""], [line, self._field(b"Content-Length", b"%d" % (length + 1))],
                             0.06)
        return [line, again]

    def _coding(self) -> List[bytes]:
        value = self._one_of([b"chunked"] * 4 + [b"Chunked", b"CHUNKED"], [
            b"gzip, chunked", b"chunked, chunked", b"identity", b"chunked;q=1", b"\x0bchunked",
            b"xchunked", b"chunked,", b", chunked", b"", b"chunked gzip", b"\"chunked\"",
            b"chunked, identity", b"chun\xebed"], 0.12)
        line = self._field(b"Transfer-Encoding", value)
        again = self._one_of([b""], [line, b"Transfer-Encoding: identity\r\n",
                                     b"Transfer_Encoding: x\r\n"], 0.04)
        return [line, again]

    def _chunks(self, payload: bytes) -> bytes:
        parts, at = [], 0
        while at < len(payload):
            size = self._rng.randrange(1, len(payload) - at + 1)
            parts.append(self._size(size) + self._line_end() + payload[at:at + size])
            parts.append(self._one_of([b"\r\n"], [b"\n", b"\r", b"", b"x\r\n", b"\r\n\r\n"], 0.03))
            at += size
        last = self._one_of([b"0", b"0", b"00"], [b"", b"-0", b"0x0", b"0 ", b" 0", b"0\x00"], 0.04)
        return b"".join((*parts, last, self._extension(), self._line_end(), *self._trailers(),
                         self._line_end()))

    def _size(self, size: int) -> bytes:
        number = b"%x" % size
        return self._one_of([number, number, b"%X" % size, b"000" + number], [
            b"0x" + number, b"+" + number, b" " + number, number + b" ", number + b"\t", b"", b"g",
            b"F" * 16 + number, b"-" + number, number + b"h", b"%d_0" % size, b"\n" + number],
            0.05) + self._extension()

    def _extension(self) -> bytes:
        if self._rng.random() > 0.25:
            return b""
        return self._one_of([b";a", b";a=b", b";a=\"q r\"", b";a;b=c"], [
            b";", b"; a", b" ;a", b";a=", b";a=\"x", b";a=\x01", b"\ta", b";a\n", b";a\r",
            b";a=\"\r\n\"", b";=b", b";a b", b",a", b";a=\"\\\"\"", b";\x80"], 0.4)

    def _trailers(self) -> Iterator[bytes]:
        if self._rng.random() < 0.15:
            yield self._one_of([b"Trail: er\r\n", b"A: b\r\nC: d\r\n"], [
                b"no colon\r\n", b"Content-Length: 5\r\n", b"A: b\r\n c\r\n", b"A: b\n",
                b"A : b\r\n", b"Transfer-Encoding: chunked\r\n", b" A: b\r\n", b"A: \x00\r\n"], 0.4)

    def _change_a_byte(self, data: bytes) -> bytes:
        at, new = self._rng.randrange(len(data)), bytes([self._rng.choice(
            b"\r\n\t :;,0\x00\x0b\x0c\x85\xa0\xff")])
        return self._rng.choice((data[:at] + new + data[at:], data[:at] + data[at + 1:],
                                 data[:at] + new + data[at + 1:],
                                 data[:at] + data[at:at + 1] + data[at:], data[:at]))


def random_parts(data: bytes, rng: random.Random) -> List[bytes]:
    """Cut at some places, most of them at or within a line end: there parsers go wrong."""
    ends = [match.start() for match in re.finditer(rb"\n", data)] or [0]
    cuts = sorted({0, len(data), *(
        min(len(data), rng.choice(ends) + rng.randrange(-1, 2)) if rng.random() < 0.7
        else rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 4)))} - {-1})
    return [data[start:end] for start, end in zip(cuts, cuts[1:])]


def single_bytes(data: bytes) -> List[bytes]:
    return [data[at:at + 1] for at in range(len(data))]


# ---- Parsers ------------------------------------------------------------------------------

def exchange(port: int, parts: List[bytes], pause_s: float = 0) -> bytes:
    """Send parts, then the end of the stream, on a connection of its own; return what comes.
    With a pause, each part but the last is received alone."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):   # it may close before the end
            for part in parts:
                connection.sendall(part)
                if pause_s and part is not parts[-1]:
                    time.sleep(pause_s)
            connection.shutdown(socket.SHUT_WR)
        received = []
        with contextlib.suppress(ConnectionResetError):
            for data in iter(lambda: connection.recv(1 << 16), b""):
                received.append(data)
        return b"".join(received)


class Ours:
    """The server under test. Reads a queue empty after each input, so that what was stored is
    known to belong to it."""

    def __init__(self, server: ServerProcess) -> None:
        self._port, self._wire = server.port, server.wire()

    def see(self, parts: List[bytes], pause_s: float = 0) -> Seen:
        answers = list(self._answers(exchange(self._port, parts, pause_s)))
        stored = dict(self._stored())
        bodies = [stored.pop(answer.message_id, None) for answer in answers]
        if stored:
            raise Fault(f"stored, but not answered 200: {stored}; {parts} got {answers}")
        end = WAITS
        if answers and answers[-1].closes:
            end = REFUSED if answers[-1].status in REFUSALS else CLOSED
            if bodies[-1] is None:           # refused, or its body was not looked at
                bodies.pop()
        return Seen(bodies, end, "", tuple(answer.status for answer in answers))

    @staticmethod
    def _answers(data: bytes) -> Iterator["Told"]:
        """Split what came into answers. Those to HEAD have a length and no body; ours never
        begins like a status line. 100 Continue depends on what has arrived: it is left out."""
        while data:
            head, end, data = data.partition(b"\r\n\r\n")
            match = STATUS_LINE.match(head)
            if not (match and end):
                raise Fault(f"no whole answer: {head[:300]!r}")
            length, message_id = LENGTH.search(head), MESSAGE_ID.search(head)
            if length and not STATUS_LINE.match(data):
                data = data[int(length[1]):]
            if match[1] != b"100":
                yield Told(int(match[1]), b"\r\nConnection: close" in head,
                           int(message_id[1]) if message_id else 0)

    def _stored(self) -> Iterator[Tuple[int, bytes]]:
        while True:
            answer = self._wire.take(queue="fuzz")
            if answer.status == 404:
                return
            if answer.status != 200:
                raise Fault(f"a take was answered {answer}")
            yield answer.id, answer.body


class Told(NamedTuple):
    """An answer of the server, as far as it matters here."""

    status: int
    closes: bool
    message_id: int


def see_as_h11(data: bytes) -> Seen:
    """Serve the input with h11, as far as it will. Each request gets a parser of its own, so that
    an empty line before it can be skipped, which RFC 9112, 2.2 asks for and h11 does not do."""
    bodies: List[Optional[bytes]] = []
    while data:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=2 * HEAD_BYTES)
        data = data[2:] if data.startswith(b"\r\n") else data
        if not data:                         # which would mean the end of the stream to h11
            break
        connection.receive_data(data)
        try:
            body = body_by_h11(connection)
        except h11.RemoteProtocolError:
            return Seen(bodies, REFUSED)
        if body is None:
            return Seen(bodies, WAITS)
        bodies.append(body)
        connection.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
        connection.send(h11.EndOfMessage())
        if connection.our_state is not h11.DONE:
            return Seen(bodies, CLOSED)
        data = connection.trailing_data[0]
    return Seen(bodies, WAITS)


def body_by_h11(connection: Any) -> Optional[bytes]:
    """Return the body of the request that a connection was given, None if it is not whole."""
    body = []
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            return None
        if isinstance(event, h11.Data):
            body.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            return b"".join(body)


# Tells the bodies that it saw, at its first error or once the client has sent all. It never
# answers a request itself: then what was parsed does not depend on when an answer is sent.
NODE_SERVER = """
const server = require('http').createServer({requireHostHeader: false, maxHeaderSize: 65536});
function record(request) {
  const parts = [];
  request.on('data', data => parts.push(data));
  request.on('end', () => request.socket.bodies.push(Buffer.concat(parts).toString('hex')));
}
for (const name of ['request', 'checkContinue', 'checkExpectation']) server.on(name, record);
function tell(client, fault) {
  if (client.fault !== undefined) return;
  client.fault = fault;
  setImmediate(() => setImmediate(() =>
    client.reallyEnd(JSON.stringify({bodies: client.bodies, fault: client.fault}))));
}
server.on('clientError', (error, client) => { tell(client, error.code); client.resume(); });
server.httpAllowHalfOpen = true;
server.on('connection', client => {
  client.bodies = [];
  client.reallyEnd = client.end;
  client.end = () => client;
  client.on('end', () => tell(client, ''));
});
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
process.stdin.on('end', () => process.exit()).resume();
"""


class Node:
    """A Node process that parses; it ends with this one, for its stdin does."""

    def __enter__(self) -> "Node":
        self._process = subprocess.Popen(["node", "-e", NODE_SERVER], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE)
        assert self._process.stdout
        self._port = int(self._process.stdout.readline())
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.communicate()

    def see(self, data: bytes) -> Seen:
        told = json.loads(exchange(self._port, [data]))
        bodies = [bytes.fromhex(body) for body in told["bodies"]]
        if told["fault"] == "HPE_CLOSED_CONNECTION":
            return Seen(bodies, CLOSED)
        cut = told["fault"] in ("", "HPE_INVALID_EOF_STATE")
        return Seen(bodies, WAITS if cut else REFUSED, told["fault"])


# ---- Judgement ----------------------------------------------------------------------------

class Finding(NamedTuple):
    kind: str                    # what minimising keeps
    details: str


def disagreement(ours: Seen, name: str, theirs: Seen) -> Optional[Finding]:
    """Compare as far as both accepted."""
    for number, (mine, other) in enumerate(zip(ours.bodies, theirs.bodies), 1):
        if mine not in (None, other):
            return Finding(f"another body than {name}",
                           f"request {number}: {mine!r}, and {name} has {other!r}")
    mine, other = len(ours.bodies), len(theirs.bodies)
    # An error is answered before the body has come: only a stored body, or a next request, tells
    # that we know where it ends.
    if mine - (ours.bodies[-1:] == [None]) > other and theirs.end == WAITS:
        return Finding(f"a request ends where {name} waits for more", f"{mine} against {other}")
    if mine < other and ours.end == WAITS:
        return Finding(f"waits for more where for {name} a request ends", f"{mine} against {other}")
    return None


def laxer(data: bytes, ours: Seen, references: Dict[str, Seen]) -> Optional[Finding]:
    """Say whether all references refused what the server accepted."""
    node = references["Node"]
    refused = all(len(ours.bodies) > len(theirs.bodies) and theirs.end == REFUSED
                  for theirs in references.values())
    if not refused or any((row.pattern and row.pattern.search(data)) or row.why == node.why
                          for row in DIFFERENCES):
        return None
    return Finding("accepts what both references refuse",
                   f"{len(ours.bodies)} requests, statuses {ours.statuses}; the references "
                   f"{[len(theirs.bodies) for theirs in references.values()]}")


class Judge:
    """Shows inputs to all parsers."""

    def __init__(self, ours: Ours, node: Node) -> None:
        self._ours, self._node = ours, node

    def judge(self, data: bytes) -> Optional[Finding]:
        """Return the first thing that is wrong with an input, if there is one."""
        ours = self._ours.see([data])
        references = {"h11": see_as_h11(data), "Node": self._node.see(data)}
        for name, theirs in references.items():
            found = disagreement(ours, name, theirs)
            if found:
                return found
        return laxer(data, ours, references) or self._judge_splits(data, ours)

    def _judge_splits(self, data: bytes, whole: Seen) -> Optional[Finding]:
        # The parts depend on nothing but the input: a smaller one is judged alike each time.
        splits = [(random_parts(data, random.Random(data)), PAUSE_S)]
        if len(data) <= SINGLE_BYTES:
            splits.append((single_bytes(data), 0))
        for parts, pause_s in splits:
            seen = self._ours.see(parts, pause_s)
            if seen != whole:
                how = f"in parts of {list(map(len, parts))}" if pause_s else "byte by byte"
                return Finding(f"a split changes {whole.statuses} into {seen.statuses}",
                               f"at once {whole}; {how} {seen}")
        return None


def minimise(data: bytes, still_fails: Callable[[bytes], bool]) -> bytes:
    """Return a smaller input that fails alike: pieces are left out as long as it does."""
    deadline, size = time.monotonic() + MINIMISE_S, len(data) // 2
    while size:
        at = 0
        while at < len(data) and time.monotonic() < deadline:
            smaller = data[:at] + data[at + size:]
            if still_fails(smaller):
                data = smaller
            else:
                at += size
        size //= 2
    return data


def literal(data: bytes) -> str:
    """Return a Python expression of bytes in which runs are short."""
    parts, at = [], 0
    for run in re.finditer(rb"(.)\1{40,}", data, re.DOTALL):
        parts += [repr(data[at:run.start()]), f"{run[1]!r} * {len(run[0])}"]
        at = run.end()
    return " + ".join([*parts, repr(data[at:])])


def evaluated(text: str) -> bytes:
    """Return what `literal` wrote."""
    return bytes(eval(text, {"__builtins__": {}}))


# ---- Runs ---------------------------------------------------------------------------------

class Run:
    """Makes and judges inputs, and keeps count."""

    def __init__(self, judge: Judge, seed: int, token: str) -> None:
        self._judge, self._seed = judge, seed
        self._grammar = Grammar(random.Random(seed), token)
        self.requests = self.inputs = self.compared = 0
        self.found: Counter[str] = collections.Counter()

    def until(self, count: int) -> None:
        while self.requests < count:
            data, requests = self._grammar.input()
            self.inputs += 1
            self.requests += requests
            self.try_one(data)

    def try_one(self, data: bytes) -> None:
        finding = self._judge.judge(data)
        if finding is None:
            return
        self.found[finding.kind] += 1
        if self.found[finding.kind] == 1 and len(self.found) <= PRINTED:
            kind = finding.kind
            small = minimise(data, lambda smaller: self._kind(smaller) == kind)
            again = self._judge.judge(small)
            print(f"FAULT: {kind}: {again.details if again else finding.details}\n"
                  f"  seed {self._seed}, input {self.inputs}, made smaller:\n  {literal(small)}",
                  flush=True)

    def _kind(self, data: bytes) -> str:
        finding = self._judge.judge(data)
        return finding.kind if finding else ""


def configure(config: Dict[str, Any]) -> None:
    """Have one queue to put into, and one that the token may not use."""
    config["queues"] = [{"name": "fuzz"}, {"name": "other"}]
    config["tokens"] = [{"name": "fuzz", "token": ADMIN, "post": ["fuzz"], "get": ["fuzz"]}]


def run_all(seed: int, count: int, single: Optional[bytes]) -> Run:
    """Judge so many requests, or a single input, and how the server ends."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, Node() as node, \
            ServerProcess(folder, settings={"fsync": "no", "min_free_bytes": 0},
                          change=configure) as server:
        server.wait_ready()
        run = Run(Judge(Ours(server), node), seed, ADMIN)
        try:
            if single is None:
                run.until(count)
            else:
                run.try_one(single)
            if server.stop() != 0:
                raise Fault(f"the server ended with {server.process.returncode}")
            server.check_log()
        except (Fault, OSError) as fault:
            run.found[f"{fault!r}, at input {run.inputs}"] += 1
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, metavar="N", help=f"requests, by default {SHORT}")
    parser.add_argument("--long", action="store_true", help=f"{LONG} requests")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--input", type=evaluated, metavar="LITERAL",
                        help="judge this input alone")
    arguments = parser.parse_args()
    missing = "h11 (pip install h11)" if h11 is None else "" if shutil.which("node") else "node"
    if missing:
        print(f"skipped: fuzz: needs {missing}")
        return 0
    started, count = time.monotonic(), arguments.count or (LONG if arguments.long else SHORT)
    print(f"fuzz: seed {arguments.seed}", flush=True)
    run = run_all(arguments.seed, count, arguments.input)
    faults = sum(run.found.values())
    for kind, number in run.found.items():
        print(f"  {number} times: {kind}")
    print(f"fuzz: {run.requests} requests in {run.inputs} inputs, {time.monotonic() - started:.0f} "
          f"s; faults {faults}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
