#!/usr/bin/env python3
"""A durable HTTP queue server in one file: no packages, no database, no client library.

Run it, then talk to it with curl:

    python3 micro_queue.py -c config.json
    curl -H "Authorization: Bearer $TOKEN" http://127.0.0.1:10000/in/fetcher --data 'hello'
    curl -H "Authorization: Bearer $TOKEN" http://127.0.0.1:10000/out/fetcher

What it guarantees
    A 200 to a put means that the message is on disk (`fsync: "always"`): it survives a kill
    and a power cut. A message leaves the queue only after its answer left, or, taken with a
    lease, after its ack; otherwise it comes back at its old place. First in, first out.
What it does not guarantee
    Exactly-once delivery: a kill between an answer and its note in the log, or a power cut
    soon after it, delivers that message again. Without a lease, sent is not received.

A second node with `"standby": true` on the same folder waits for its locks, and takes over.

Storage, in `<path>/<queue>/`: messages in segments, `data.log`, `data.1.log`, ..., each written
once; progress in marks, `meta.json`. Space comes back by deleting a segment that nobody needs.

    segment = header start message*           (big-endian, see HEADER and HEAD)
    header  = magic version log_id number marker crc32
    start   = next id, and how many messages without a delay, and bytes, were put before
    message = marker crc32 type id time delay length payload
    marks   = snapshot page* mark*            (JSON arrays, one a line, each with its crc32)
    mark    = s, settled: a run of ids, of a subscriber
            | r, retry: a run of ids that came back, their count, when they are due
            | p, position: settled below an id, waiting from it on

    An offset is number << 32 | position, and true for ever. A record's crc starts from `log_id`,
    the number and the position, so that no payload, copy or stale tail is ever taken for a
    record. A reader skips what is damaged up to the next valid record; damage at the end of the
    last segment with nothing valid behind it is a torn tail and is cut off.

Every change of state goes one way: validate, append a message or a mark, apply it to memory, let
go of the lock, wait until durable, answer. Recovery applies the same through the same functions.

Serving: one thread polls all connections and serves them in rounds, without waiting for
anything. At the end of a round each queue writes what it was told, and each connection gets its
answers. An answer that is late is handed to that thread by whoever has it.

Lock order: Log._one_sync, Queue.lock, Log._commit, Budget._lock; Syncers._lock stands alone.
Never two queues' locks at once, and no lock that a take needs is held while a disk syncs.

Contents: Constants and errors, Config, Records, Log, State, Queue, Broker, Metrics, HTTP messages,
Actions, Connection, Server, main.
"""
from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import dataclasses
import email.utils
import errno
import fcntl
import functools
import hashlib
import heapq
import http
import itertools
import json
import logging
import math
import os
import queue as queues
import re
import resource
import secrets
import select
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
import zlib
from typing import (Any, Callable, Collection, Deque, Dict, Generator, Iterable, Iterator, List,
                    Mapping, NamedTuple, NoReturn, Optional, Sequence, Set, Tuple, Type, TypeVar,
                    Union, cast)

if __name__ == "__main__":
    # http.server imports http.client, and that ssl, if there is one: 1.2 MiB that serve nobody.
    sys.modules["ssl"] = None  # type: ignore[assignment]
import http.server  # noqa: E402

__version__ = "3.1.0"

# ---- Constants and errors -----------------------------------------------------------------
# Sizes with their reason, and the errors that cross section borders.

KIB, MIB = 1 << 10, 1 << 20
NEVER = 1 << 62                  # a time (ms) that does not come, an id that is not given
LOG_CHUNK_BYTES = 256 * KIB      # one read of a scan: large enough that reads cost nothing
AHEAD_BYTES = 16 * KIB           # what a subscription reads ahead: small, for each has its own
BLOCK_BYTES = 4 * KIB            # what a disk that cannot read loses at least
ID_GAP = 1 << 24                 # more ids than could be lost unseen between two starts
SEGMENT_BYTES = 16 * MIB         # a segment is sealed at this size, or at a 32nd of what is held
SEGMENT_MOST_BYTES = 1 << 30
SEGMENTS_MOST = 200              # each is a descriptor: with more, nearly full ones are cleaned
READY_BYTES = 4 * KIB            # a larger segment has the next one ready: a full disk has none
ROOM_BYTES, ROOM_LEAST_BYTES = MIB, 64 * KIB     # that a file reaches beyond its tail
PAGE_SHIFT = 10                  # entries stand in pages of 1,024 ids
BUCKET_SHIFT = 10                # deadlines in buckets of 1,024 ms
MARKS_BYTES = 4 * MIB            # of marks that a start reads without a new snapshot
SNAPSHOT_DATA_BYTES = 16 * MIB   # of data, likewise
SNAPSHOT_WORK_S, SNAPSHOT_REST_S = 0.0001, 0.0005    # a thread that never rests starves others
DEAD_BYTES = 16 * MIB            # that the files may hold besides twice what is held
DEAD_LOW_BYTES = 64 * KIB        # the same while the disk is nearly full
SLICE_BYTES, SLICE_MESSAGES = 32 * KIB, 256      # that a cleaning copies in one hold of the lock
GLANCES = 64                     # heads that are looked at for the time of the oldest message
PASSED_OVER = 1 << 16            # entries that a compaction makes for a subscriber
TRUNCATE_BYTES = 2 * MIB         # of a file at a time: more would keep the disk from others
FREE_REST_S, FREE_WORK_REST_S = 0.05, 0.002
DELAYED_LINES = 100_000          # times subscribers: a delayed message is an entry of each
MAX_MESSAGE_BYTES = 256 * MIB    # highest `max_message_bytes`: a message is held in memory
REQUEST_LINE_BYTES = 8 * KIB
REQUEST_HEAD_BYTES = 32 * KIB
REQUEST_FIELDS = 100
RECEIVE_BYTES = 64 * KIB         # one recv: holds the head and body of nearly every request
CACHED_HEADS = 512               # that are not parsed again
CACHED_HEAD_BYTES = KIB          # a longer head always is: bounds the cache's memory
SKIPPED_BODY_BYTES = 64 * KIB    # an unread body up to this is skipped, beyond it we close
LINGER_S = 2                     # how long a closing answer waits for the client to stop sending
SHARE_REQUESTS = 16              # what one connection gets of a round: requests answered at once,
SHARE_BYTES = MIB                # bytes of body or answer,
SHARE_CHUNKS = 256               # chunks of a body,
SHARE_S = 0.001                  # and time; a request that takes longer is the last
EVENTS_S = 0.02                  # of a round, for connections that had nothing left over
ROUND_BYTES, ROUND_MESSAGES = 4 * MIB, 4096  # put in one round: more is written before its end
SENT_PIECES = 512                # of answers, with one call: the system takes 1,024
BACKLOG_S = 0.005                # of a round, for what goes beyond such shares
UNCOUNTED_BYTES = 64 * KIB       # of a body or an answer: so much of each is not worth counting
DRAIN_S = 5                      # how long a stop waits for requests under way
MAX_LINES = 10_000               # messages of one NDJSON body: bounds the hold of the lock
RETRY_AFTER_S = 5                # what 429 and 503 tell the client to wait
REFUSED_CONNECTIONS = 32         # connections above the limit that are told so at one time
LOCK_S = 1                       # no lock of a node that hangs is given away sooner
LET_GO_S = 5                     # what a process that ends may take to close its files
TAKEOVER_S = 0.1                 # how often a standby tries for the locks
POLL_S = 1                       # how often the deadlines of connections are looked through
POLL_EVENTS = 64                 # ready connections of one round
PAUSE_S = 0.01                   # between two looks, or tries, of a thread that may wait
THREAD_STACK_BYTES = 512 * KIB   # the default of 8 MiB is address space for nothing

log_event = logging.getLogger("micro_queue")


def event(level: int, name: str, **fields: object) -> None:
    """Log one line, `name key=value ...`; values with blanks or quotes are written as JSON."""
    if log_event.isEnabledFor(level):
        text = (f"{key}={_plain(str(value))}" for key, value in fields.items())
        log_event.log(level, "%s", " ".join([name, *text]))


def _plain(value: str) -> str:
    return value if re.fullmatch(r"[!#-~]+", value) else json.dumps(value)


class ConfigError(Exception):
    """The config file is wrong; the message names the JSON path and the fix."""


class StorageError(Exception):
    """A data folder cannot be used; nothing in it was changed."""


class LogFailed(Exception):
    """The disk failed under an open log: its content is unknown, the process must end."""


class CompactionFailed(Exception):
    """A compaction was given up; what it freed stays freed, the rest is as it was."""


class ApiError(Exception):
    """An answer other than 200: `status`, one line for the client, and extra header lines.

    May be raised anywhere below a handler; rendered in one place. `close` ends the
    connection, for what follows on it cannot be understood.
    """

    def __init__(self, status: int, message: str, *, headers: bytes = b"",
                 close: bool = False) -> None:
        super().__init__(message)
        self.status, self.message, self.close = status, message, close
        retry = b"Retry-After: %d\r\n" % RETRY_AFTER_S if status in (429, 503) else b""
        self.headers = headers + retry


def no_memory() -> ApiError:
    return ApiError(503, "There is no memory for this now; try again later")


# ---- Config -------------------------------------------------------------------------------
# JSON to frozen, validated values. A field's check is declared where the field is; one
# function walks them all, so that every refusal names its JSON path.

FIFO = ""                        # the one subscriber of a fifo queue
LOCK_NAME = "lock"               # the file of the data folder that the active node holds
QUEUE_NAME = re.compile(r"[-a-zA-Z0-9]{1,50}")
TWICE = object()                 # the value of a JSON key that came twice
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def _must(good: object, path: str, what: str) -> None:
    if not good:
        raise ConfigError(f"{path}: {what}")


def _field(good: Callable[[Any], object], what: str, default: Any = dataclasses.MISSING,
           keep: Callable[[Any], object] = lambda value: value) -> Any:
    """Declare a field: which values are good, how a refusal calls those, and what is kept of
    them. Its default is good, too; with None, null may stand there."""
    def read(value: Any, path: str) -> Any:
        _must(value is not dataclasses.MISSING, path, "is missing")
        _must(value is default or good(value), path,
              f"must be {what}{' or null' if default is None else ''}")
        return value if value is default else keep(value)
    return dataclasses.field(default=default, metadata={"read": read})


def _whole(low: int, high: int, default: Optional[int]) -> Any:
    return _field(lambda value: type(value) is int and low <= value <= high,
                  f"a whole number from {low} to {high}", default)


def _text(pattern: str, what: str, **more: Any) -> Any:
    return _field(lambda value: isinstance(value, str) and value.isprintable()
                  and re.fullmatch(pattern, value), what, **more)


def _flag() -> Any:
    return _field(lambda value: isinstance(value, bool), "true or false", False)


def _names() -> Any:
    return _field(lambda value: isinstance(value, list)
                  and all(isinstance(name, str) for name in value), "a list of queue names",
                  (), tuple)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for the whole server; times in seconds, sizes in bytes."""

    listen_address: str = _text(
        r"[0-9A-Za-z._-]+|[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Za-z.:%_-]*",
        "a host name or address, without a port", default="127.0.0.1")
    listen_port: int = _whole(0, 65535, default=10000)
    path: str = _text(r"(?s)[^~].*", "a path; ~ is not expanded", default="/tmp/micro_queue")
    metric_exporter: bool = _flag()
    fsync: str = _text("always|everysec|no", '"always", "everysec" or "no"', default="always")
    max_message_bytes: int = _whole(1, MAX_MESSAGE_BYTES, default=16 * MIB)
    min_free_bytes: int = _whole(0, 1 << 50, default=16 * MIB)
    max_connections: int = _whole(1, 65536, default=1024)
    max_inflight_bytes: Optional[int] = _whole(2, 1 << 50, default=None)
    request_timeout: int = _whole(1, 3600, default=30)
    idle_timeout: int = _whole(1, 86400, default=75)
    standby: bool = _flag()
    tls_cert: Optional[str] = _text(".+", "a path", default=None)
    tls_key: Optional[str] = _text(".+", "a path", default=None)

    @property
    def inflight_bytes(self) -> int:
        """What `max_inflight_bytes` is, or is by default."""
        return self.max_inflight_bytes or max(2 * self.max_message_bytes, 256 * MIB)


@dataclasses.dataclass(frozen=True)
class QueueConfig:
    """One queue; `ttl` in seconds."""

    name: str = _text(QUEUE_NAME.pattern, "1 to 50 letters, digits or hyphens")
    kind: str = _text("fifo|broadcast", '"fifo" or "broadcast"', default="fifo")
    content_type: str = _text(r"[!-~]([ -~]{0,126}[!-~])?", "a media type",
                              default="application/json")
    max_messages: Optional[int] = _whole(1, 1 << 50, default=None)
    max_bytes: Optional[int] = _whole(1, 1 << 50, default=None)
    ttl: Optional[int] = _whole(1, 1 << 32, default=None)
    max_deliveries: Optional[int] = _whole(1, 1 << 31, default=None)
    dead_letter: Optional[str] = _text(QUEUE_NAME.pattern, "a queue's name", default=None)


@dataclasses.dataclass(frozen=True)
class Token:
    """Who may do what. Of the secret only its sha256 is kept, in hex."""

    name: str = _text(".{1,100}", "1 to 100 printable characters")
    token: Optional[str] = _text(
        "[!-~]{20,500}", "20 to 500 visible ASCII characters, e.g. a UUID", default=None,
        keep=lambda secret: hashlib.sha256(secret.encode("ascii")).hexdigest())
    token_sha256: Optional[str] = _text("[0-9a-fA-F]{64}", "64 hex digits", default=None)
    post: Sequence[str] = _names()
    get: Sequence[str] = _names()
    admin: bool = _flag()

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.token or self.token_sha256 or "")

    def may(self, permission: str, queue: str) -> bool:
        return (self.admin or (permission in ("post", "any") and queue in self.post)
                or (permission in ("get", "peek", "any") and queue in self.get))


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole, valid configuration."""

    settings: Settings
    queues: Sequence[QueueConfig]
    tokens: Sequence[Token]

    def subscribers(self, queue: QueueConfig) -> Sequence[str]:
        """Return who gets each message of a queue: all the difference between the kinds."""
        if queue.kind == "fifo":
            return (FIFO,)
        return tuple(token.name for token in self.tokens
                     if queue.name in token.get and not token.admin)


def _object(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    counts = collections.Counter(key for key, _ in pairs)
    return {key: value if counts[key] == 1 else TWICE for key, value in pairs}


def load_config(path: str) -> Config:
    """Read and validate the JSON file at `path`. Raises ConfigError with one line."""
    try:
        with open(path, "rb") as file:
            text = file.read()
        value = json.loads(text, object_pairs_hook=_object)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        advice = "" if text.lstrip().startswith(b"{") else (
            "; YAML is converted with `yq . FILE > config.json` (Debian's yq) or "
            "`yq -o json . FILE > config.json` (mikefarah's)")
        raise ConfigError(f"{path} is not JSON ({error}){advice}") from None
    return parse_config(value)


def parse_config(value: Any) -> Config:
    """Check a parsed JSON document. Raises ConfigError."""
    _check_keys(value, "config", ("queues", "settings", "tokens"))
    config = Config(_build(Settings, value.get("settings", {}), "settings"),
                    _build_all(QueueConfig, value, "queues"), _build_all(Token, value, "tokens"))
    _check_settings(config.settings)
    _check_queues(config)
    _check_tokens(config)
    return config


def _check_keys(value: Any, path: str, known: Collection[str]) -> None:
    _must(isinstance(value, dict), path, "must be a JSON object")
    for key, item in value.items():
        name = f"{path}.{key}" if key.isprintable() else f"{path}.{json.dumps(key)}"
        _must(item is not TWICE, name, "stands there twice; remove one")
        _must(key in known, name, f"unknown key; known are {', '.join(sorted(known))}")


def _build(cls: Type[T], value: Any, path: str) -> T:
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    _check_keys(value, path, fields)
    return cls(**{name: field.metadata["read"](value.get(name, field.default), f"{path}.{name}")
                  for name, field in fields.items()})


def _build_all(cls: Type[T], config: Mapping[str, Any], key: str) -> Sequence[T]:
    items = config.get(key)
    _must(isinstance(items, list) and items, key, "must be a list with at least one entry")
    return tuple(_build(cls, item, f"{key}[{n}]") for n, item in enumerate(items or ()))


def _check_unique(path: str, key: str, values: Sequence[object]) -> None:
    for number, value in enumerate(values):
        first = values.index(value)
        _must(first == number, f"{path}[{number}].{key}", f"is the same as {path}[{first}].{key}")


def _check_named(name: str, names: Collection[str], path: str) -> None:
    _must(name in names, path, f"no queue is named {json.dumps(name)}")


def _check_settings(settings: Settings) -> None:
    for key in ("tls_cert", "tls_key"):
        _must(not getattr(settings, key), f"settings.{key}", "is not supported yet")
    _must(settings.inflight_bytes >= 2 * settings.max_message_bytes, "settings.max_inflight_bytes",
          f"must be at least twice max_message_bytes ({settings.max_message_bytes}), or null")


def _check_queues(config: Config) -> None:
    _check_unique("queues", "name", [queue.name for queue in config.queues])
    targets = {queue.name: queue.dead_letter for queue in config.queues}
    for number, queue in enumerate(config.queues):
        path, name, seen = f"queues[{number}].dead_letter", queue.dead_letter, {queue.name}
        _must(queue.name != LOCK_NAME, f"queues[{number}].name", "is that of the folder's lock")
        _must(config.subscribers(queue), f"queues[{number}].kind", "a broadcast queue needs a "
              f"subscriber: a token without admin that has {queue.name} in its get")
        while name is not None:
            _check_named(name, targets, path)
            _must(name not in seen, path, "dead letters would go round in a circle; end it")
            seen.add(name)
            name = targets[name]


def _check_tokens(config: Config) -> None:
    _check_unique("tokens", "name", [token.name for token in config.tokens])
    names = {queue.name for queue in config.queues}
    for number, token in enumerate(config.tokens):
        path = f"tokens[{number}]"
        _must((token.token is None) != (token.token_sha256 is None), path,
              "needs exactly one of token and token_sha256")
        for key in ("post", "get"):
            for place, name in enumerate(getattr(token, key)):
                _check_named(name, names, f"{path}.{key}[{place}]")
    _check_unique("tokens", "token", [token.digest for token in config.tokens])


# ---- Records ------------------------------------------------------------------------------
# Bytes to records, lines to marks, and back. Knows no files: an offset is a number that goes
# into a crc.

U64 = struct.Struct(">Q")
MESSAGE, START = 1, 2
MAGIC = b"\x89mqlog\r\n"         # the first byte is not zero: a Go server's log starts with one
FORMAT_VERSION = 2
HEADER = struct.Struct(">8sI16sI4sI")        # magic, version, log_id, number, marker, crc32
HEAD = struct.Struct(">4sIBQQII")            # marker, crc32, type, id, time, delay, length
CHECKED = struct.Struct(">BQQII")            # of HEAD, what the crc is of, with the payload
FIRST = HEADER.size              # where a segment's first record stands
START_PAYLOAD = struct.Struct(">QQ")         # messages and bytes that were put before
START_BYTES = HEAD.size + START_PAYLOAD.size
SEGMENT_SHIFT = 32               # offset = number << 32 | position
POSITION_MASK = (1 << SEGMENT_SHIFT) - 1
ENTRY = struct.Struct(">QQQII")  # id, offset, due (ms, 0: at once), size, count of deliveries


class Message(NamedTuple):
    """A message, and where its record stands. `time_ms` is the queue's clock when it was put."""

    id: int
    time_ms: int
    delay_ms: int                            # from then on
    payload: bytes
    offset: int
    size: int

    @property
    def due_ms(self) -> int:
        """When the delay is over; 0 without one."""
        return self.time_ms + self.delay_ms if self.delay_ms else 0


Unplaced = Tuple[int, int, int, bytes]       # id, time_ms, delay_ms, payload


class Start(NamedTuple):
    """The first record of a segment: the next id, and how many messages without a delay were put
    before it, and their bytes. So nobody has to read a segment to count."""

    next_id: int = 1
    puts: int = 0
    put_bytes: int = 0

    def behind(self, message: Message) -> Start:
        """Return what a segment would begin with behind a message that was put."""
        plain = not message.delay_ms
        return Start(message.id + 1, self.puts + plain, self.put_bytes + plain * message.size)


class Codec:
    """Encodes and decodes the records of one log, told apart by `log_id` and `marker`."""

    def __init__(self, log_id: bytes, marker: bytes) -> None:
        self.log_id, self.marker = log_id, marker

    @classmethod
    def new(cls) -> Codec:
        # Without a zero: no run of zeros is ever part of a record's start.
        return cls(secrets.token_bytes(16), bytes(1 + secrets.randbelow(255) for _ in range(4)))

    def seed(self, number: int) -> int:
        """Return what a record's crc starts from, but for its position: a record is one only in
        its log, its segment and its place."""
        return zlib.crc32(self.log_id, number)

    def header(self, number: int) -> bytes:
        head = HEADER.pack(MAGIC, FORMAT_VERSION, self.log_id, number, self.marker, 0)[:-4]
        return head + zlib.crc32(head).to_bytes(4, "big")

    @classmethod
    def of_header(cls, data: bytes, number: int) -> Optional[Codec]:
        """Return the codec of the valid header of a segment, None for anything else."""
        if len(data) < HEADER.size:
            return None
        _, _, log_id, _, marker, _ = HEADER.unpack_from(data)
        codec = cls(log_id, marker)
        return codec if data.startswith(codec.header(number)) else None

    def encode(self, items: Iterable[Unplaced], offset: int,
               kind: int = MESSAGE) -> Tuple[bytes, List[Message]]:
        """Return the bytes of records as they stand from `offset` on, and only there; and what
        they hold, with its place."""
        parts: List[bytes] = []
        messages: List[Message] = []
        marker, crc32, pack, head_size = self.marker, zlib.crc32, CHECKED.pack, HEAD.size
        base, position = offset & ~POSITION_MASK, offset & POSITION_MASK
        seed = self.seed(offset >> SEGMENT_SHIFT)
        for id_, time_ms, delay_ms, payload in items:
            checked = pack(kind, id_, time_ms, delay_ms, len(payload))
            crc = crc32(payload, crc32(checked, seed ^ position))
            parts += (marker, crc.to_bytes(4, "big"), checked, payload)
            size = head_size + len(payload)
            messages.append(Message(id_, time_ms, delay_ms, payload, base | position, size))
            position += size
        return b"".join(parts), messages

    def encode_start(self, start: Start, number: int) -> bytes:
        payload = START_PAYLOAD.pack(start.puts, start.put_bytes)
        return self.encode([(start.next_id, 0, 0, payload)],
                           number << SEGMENT_SHIFT | FIRST, START)[0]

    def decode_start(self, data: bytes, number: int) -> Optional[Start]:
        """Return the start record that `data`, which stands at FIRST, begins with."""
        if len(data) < START_BYTES:
            return None
        id_: int = HEAD.unpack_from(data)[3]
        start = Start(id_, *START_PAYLOAD.unpack_from(data, HEAD.size))
        return start if data.startswith(self.encode_start(start, number)) else None

    def size_of(self, data: bytes) -> int:
        """Return the size of the record that seems to start `data`, 0 if none does."""
        if len(data) < HEAD.size or not data.startswith(self.marker):
            return 0
        length: int = HEAD.unpack_from(data)[6]
        return HEAD.size + length if length <= MAX_MESSAGE_BYTES else 0

    def decode(self, data: bytes, offset: int, messages: List[Message]) -> int:
        """Append the messages of the whole and valid records that `data`, which stands at
        `offset`, begins with; return where these records end."""
        marker, crc32, unpack_from, size = self.marker, zlib.crc32, HEAD.unpack_from, HEAD.size
        new = tuple.__new__                  # Message(...) takes a sixth longer in all
        position, seed = offset & POSITION_MASK, self.seed(offset >> SEGMENT_SHIFT)
        at, last = 0, len(data) - size
        while at <= last:
            found, crc, kind, id_, time_ms, delay_ms, length = unpack_from(data, at)
            body = at + size
            after = body + length
            if found != marker or after > len(data):
                break
            payload = data[body:after]
            if crc32(payload, crc32(data[at + 8:body], seed ^ (position + at))) != crc:
                break
            if kind == MESSAGE:
                messages.append(new(Message, (id_, time_ms, delay_ms, payload, offset + at,
                                              size + length)))
            at = after
        return offset + at


class Mark(NamedTuple):
    """A line of the marks: what became of the messages from `first` to `last`.

    settled   they are done
    retry     they came back from so many deliveries, to wait until `due_ms`
    position  all below `first` is settled, what is put from it on waits
    """

    kind: bytes
    subscriber: str
    first: int
    last: int
    tail: int                                # of the data when this was so
    deliveries: int = 0
    due_ms: int = 0


SETTLED, RETRY, POSITION = b"s", b"r", b"p"
MARK = re.compile(rb'\["([srp])",([0-9]+),([0-9]+),([0-9]+),(?:([0-9]+),([0-9]+),)?(".*")')


@functools.lru_cache(maxsize=1024)
def _quoted(name: str) -> bytes:
    return json.dumps(name).encode()


@functools.lru_cache(maxsize=1024)
def _unquoted(text: bytes) -> str:
    return str(json.loads(text))


class Marks:
    """Encodes or decodes the lines of one file of marks, one after the other. Each is a JSON array
    that ends with a crc32 of what stands before it, which starts from that of the line before: so
    a line is one only in its file and its place. `crc` is that of the last line."""

    def __init__(self, log_id: bytes) -> None:
        self.crc = zlib.crc32(log_id)

    def line(self, text: bytes) -> bytes:
        """Return a line of an array that lacks its crc and its end."""
        self.crc = zlib.crc32(text, self.crc)
        return b"%b,%d]\n" % (text, self.crc)

    def check(self, line: bytes) -> bytes:
        """Return the text of a line, none if it is damaged."""
        text, _, found = line.rpartition(b",")
        crc = zlib.crc32(text, self.crc)
        if found != b"%d]\n" % crc:
            return b""
        self.crc = crc
        return text

    def encode(self, mark: Mark) -> bytes:
        kind, subscriber, first, last, tail, deliveries, due_ms = mark
        name = _quoted(subscriber)
        more = b"%d,%d," % (deliveries, due_ms) if kind == RETRY else b""
        return self.line(b'["%b",%d,%d,%d,%b%b' % (kind, first, last, tail, more, name))

    def decode(self, line: bytes) -> Optional[Mark]:
        match = MARK.fullmatch(self.check(line))
        if match is None:
            return None
        kind, first, last, tail, count, due_ms, name = match.groups()
        return Mark(kind, _unquoted(name), int(first), int(last), int(tail), int(count or 0),
                    int(due_ms or 0))

    def head(self, value: Mapping[str, Any]) -> bytes:
        return self.line(b'["snapshot",%b' % json.dumps(value).encode())

    def decode_head(self, line: bytes) -> Optional[Dict[str, Any]]:
        _, is_head, text = self.check(line).partition(b'["snapshot",')
        return json.loads(text) if is_head else None

    def page(self, page: Mapping[int, bytes]) -> bytes:
        """Return the line of a page of entries."""
        return self.line(b'["entries","%b"' % base64.b64encode(b"".join(page.values())))

    def decode_page(self, line: bytes) -> Optional[Dict[int, bytes]]:
        _, is_page, text = self.check(line).partition(b'["entries","')
        packed, step = base64.b64decode(text[:-1]), ENTRY.size
        entries = [packed[at:at + step] for at in range(0, len(packed), step)]
        ids = [fields[0] for fields in ENTRY.iter_unpack(packed)]
        return dict(zip(ids, entries)) if is_page else None


# ---- Log ----------------------------------------------------------------------------------
# The segments and the marks of one queue: lock, recover, append, sync, rotate, free. Knows
# nothing of queues. All that touches the disk goes through one small object, so that a test can
# be the disk.

LOG_NAME, META_NAME = "data.log", "meta.json"
SEGMENT_NAME = re.compile(r"data\.([1-9][0-9]{0,8})\.log")
TEMPORARY = re.compile(r"(?:data(?:\.[0-9]+)?\.log|meta\.json)\.[0-9a-f]{16}\.tmp")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ROOM_KINDS = ("ext4", "xfs", "btrfs")        # elsewhere glibc may write zeros instead
MOUNTS = "/proc/self/mountinfo"
LOCKLESS = ("nfs", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "fuse.rclone", "fuse.s3fs",
            "fuse.gcsfuse")      # without locks that end with their node; NFS 4 is "nfs4"
LOCAL_LOCK = re.compile("nolock|local_lock=(?:all|posix)")       # a mount's options
RECOVER_LOST_LOCKS = "/sys/module/nfs/parameters/recover_lost_locks"
Steps = Generator[float, None, T]            # yields how long (s) to rest before the next step
_open_logs: Set[Log] = set()     # closing a second descriptor of a file would drop the first
_open_logs_lock = threading.Lock()           # one's lock


class Storage:
    """The system calls that change or read files, and nothing else."""

    open = staticmethod(os.open)
    close = staticmethod(os.close)
    pwrite = staticmethod(os.pwrite)
    pread = staticmethod(os.pread)
    fdatasync = staticmethod(os.fdatasync)
    fsync = staticmethod(os.fsync)
    rename = staticmethod(os.rename)
    link = staticmethod(os.link)
    truncate = staticmethod(os.ftruncate)
    allocate = staticmethod(os.posix_fallocate)
    unlink = staticmethod(os.unlink)
    mkdir = staticmethod(os.mkdir)

    def fsync_folder(self, path: str) -> None:
        """Make the names in a folder durable."""
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.fsync(fd)
        finally:
            self.close(fd)

    def make_folder(self, path: str) -> None:
        """Create a folder (0700) and its missing parents, durably."""
        if os.path.isdir(path):
            return
        parent = os.path.dirname(os.path.abspath(path))
        self.make_folder(parent)
        with contextlib.suppress(FileExistsError):
            self.mkdir(path, 0o700)
        self.fsync_folder(parent)

    def append(self, file: File, data: bytes) -> None:
        """Write at the end of a file, which moves only once all of `data` is written: a short
        write, which any disk makes beyond 2 GiB, is gone on with."""
        size = self.pwrite(file.fd, data, file.end)
        while size < len(data):
            more = self.pwrite(file.fd, data[size:], file.end + size)
            if more <= 0:
                raise OSError(errno.ENOSPC, "short write")
            size += more
        file.end += size
        if file.room < file.end:
            file.room = file.end


def leads_to(path: str, fd: int) -> bool:
    """Tell whether a path still leads to an open file."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(fd))
    return False


def in_use(folder: str) -> StorageError:
    return StorageError(f"{folder} is in use by another micro_queue; stop it first")


def lock_file(fd: int, folder: str, patience_s: float = 0) -> None:
    """Lock a file for the life of its descriptor, and of every other of the file in this process.
    Raises StorageError if another process holds it, and goes on to."""
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise StorageError(f"{folder} cannot be locked: {error.strerror}") from None
        if time.monotonic() >= until:
            raise in_use(folder)
        time.sleep(PAUSE_S)


class DiskFull(Exception):
    """There is no space for an append; the log is as it was before."""


class File:
    """A file that is appended to."""

    def __init__(self, name: str, fd: int = -1) -> None:
        self.name, self.fd = name, fd
        self.end = 0                         # position behind what was written
        self.room = 0                        # the file's size
        self.synced = 0                      # how much of it a sync covered
        self.users = 0                       # who needs `fd` without the owner's lock
        self.is_gone = False                 # no longer of the log; its last user closes it
        self.is_unreadable = False           # in part: to be kept for whoever can read it


class Segment(File):
    """A file of records. Written while it is the log's current one, and never again."""

    def __init__(self, number: int, fd: int) -> None:
        super().__init__(f"data.{number}.log" if number else LOG_NAME, fd)
        self.number, self.end = number, FIRST
        self.start: Optional[Start] = None   # None: ready to be used, or emptied

    @property
    def base(self) -> int:
        return self.number << SEGMENT_SHIFT


class MarksFile(File):
    """A file of marks: a snapshot, and what was marked since it was frozen."""

    def __init__(self, log_id: bytes, fd: int = -1) -> None:
        super().__init__(META_NAME, fd)
        self.lines = Marks(log_id)
        self.snapshot_bytes = 0              # how much of it is the snapshot


class Log:
    """The segments and marks of one queue, locked for as long as they are open.

    Its owner calls all but what stands under "durability" under a lock of its own (the owner's
    lock below). Invariants:
    1. `tail` is the offset behind the last record. Nothing is ever written below it, nor into
       any segment but `current`: what is not current is never written again.
    2. `appends` and `durable` count appends and only grow; `durable <= appends`.
    3. Only what `_one_sync` is held for syncs a file; a descriptor is closed by its last user, or
       with the log.
    4. Once `failure` is set nothing is written, synced or answered any more. `on_failure` is
       called by whichever thread meets it first; it does not return in a server.
    """

    def __init__(self, folder: str, fsync: str = "always", storage: Optional[Storage] = None,
                 on_failure: Callable[[LogFailed], None] = lambda _: None) -> None:
        self.folder, self.path = folder, os.path.join(folder, LOG_NAME)
        self.storage = storage or Storage()
        self.fsync = fsync
        self.codec, self.marks = Codec(bytes(16), bytes(4)), MarksFile(bytes(16))    # until `load`
        self.segments: Dict[int, Segment] = {}           # by number, in their order
        self.current = Segment(0, -1)
        self.ready: Optional[Segment] = None             # the next one
        self._unused: List[Segment] = []     # that a start found, and is to remove at its end
        self._gone: Set[Segment] = set()     # of the log no more, and not closed yet
        self.highest = 0                     # number that any name, mark or segment ever had
        self._is_recovering = True           # a torn tail may be cut off
        self.appends = 0
        self.durable = 0
        self.failure: Optional[LogFailed] = None
        self._on_failure = on_failure
        self.damaged: Set[int] = set()       # offsets that were reported
        self.corrupt_records = 0
        self.syncs, self.sync_seconds = 0, 0.0
        self._folder_fd = -1                 # after a rename that no sync of the folder followed
        self._has_room = False               # whether files get room ahead of their tail
        self._one_sync = threading.Lock()    # held while files sync; before `_commit`
        self._commit = threading.Lock()      # guards what follows, `durable` and users
        self._leading = False                # somebody syncs for those who wait
        self._followers: List[Tuple[int, bool, Callable[[], None]]] = []

    # -- opening

    def lock(self) -> None:
        """Create an empty log if there is none, and lock it for the life of this object.

        Raises StorageError at once if another process, or this one, holds it.
        """
        self.storage.make_folder(self.folder)
        if os.stat(self.folder).st_uid != os.geteuid():
            raise StorageError(f"{self.folder} belongs to another user; run as that user or "
                               f"change its owner")
        with _open_logs_lock:
            while self.current.fd < 0:
                fd = self._open_first()
                try:
                    lock_file(fd, self.folder)
                    if leads_to(self.path, fd):    # not replaced between open and lock
                        self.current = self.segments[0] = Segment(0, fd)
                        _open_logs.add(self)
                finally:
                    if self.current.fd < 0:
                        self.storage.close(fd)

    def _open_first(self) -> int:
        if any(leads_to(self.path, log.segments[0].fd) for log in list(_open_logs)):
            raise in_use(self.folder)
        names = os.listdir(self.folder)
        others = [name for name in names if SEGMENT_NAME.fullmatch(name) or name == META_NAME]
        if LOG_NAME in names:
            return self.storage.open(self.path, os.O_RDWR)
        if others:
            raise StorageError(f"{self.path} is missing, but {others[0]} is there; nothing was "
                               "touched: restore all files of a backup, or move "
                               f"{self.folder} away")
        return self.storage.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)

    def prove_lock(self) -> None:
        """Make sure that the lock is still ours, or end: another node may have taken over."""
        try:
            fcntl.lockf(self.segments[0].fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._fail("keep the lock of", error)

    def temporary(self, name: str) -> str:
        """Return a path that a file may have before it takes a name; a start removes it."""
        return f"{self.file(name)}.{secrets.token_hex(8)}.tmp"

    @contextlib.contextmanager
    def new_file(self, *paths: str) -> Iterator[int]:
        """Make a file of the first name, locked. If what is done with it fails it goes, whichever
        of the names it has by then."""
        fd = self.storage.open(paths[0], os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            lock_file(fd, self.folder)
            yield fd
        except BaseException:
            for path in paths:
                with contextlib.suppress(OSError):
                    if leads_to(path, fd):
                        self.storage.unlink(path)
            if fd != self.marks.fd:          # which are in use by then
                self.storage.close(fd)
            raise

    def file(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def load(self) -> bool:
        """Open and lock every file; make a new log of an empty file, or of the Go server's.
        Return whether the log is new. Raises StorageError for what is not ours, untouched."""
        names = os.listdir(self.folder)
        self._has_room = mount_of(self.folder).kind in ROOM_KINDS
        is_legacy = LegacyLog.is_under_way(self.folder)
        numbers = sorted(int(match[1]) for match in map(SEGMENT_NAME.fullmatch, names) if match)
        self.highest = max([0, *numbers])
        for number in () if is_legacy else numbers:
            segment = self.segments[number] = Segment(number, -1)
            segment.fd = self.storage.open(self.file(segment.name), os.O_RDWR)
            is_empty = os.fstat(segment.fd).st_size <= FIRST
            try:                             # whoever lets go of our lock lets go of it, too
                lock_file(segment.fd, self.folder, 0 if is_empty else LET_GO_S)
            except StorageError:             # of one that made it ready without our lock
                if not is_empty:
                    raise
                self.storage.unlink(self.file(segment.name))
                self.storage.close(self.segments.pop(number).fd)
        codec = self._find_codec(self._open_marks())
        is_new = codec is None or is_legacy
        if codec is None or is_legacy:
            self._begin(is_legacy)
        else:
            self._use(codec)
        for name in filter(TEMPORARY.fullmatch, names):
            self.storage.unlink(self.file(name))
        before: Optional[Segment] = None
        *_, self.current = self.segments.values()
        for segment in list(self.segments.values()):
            self._measure(segment, before)
            if segment.start or not segment.number:
                before = segment
            else:                            # no message was put before it, nor behind it
                self._unused.append(self.segments.pop(segment.number))
        *_, self.current = self.segments.values()
        return is_new

    def _use(self, codec: Codec) -> None:
        self.codec, self.marks.lines = codec, Marks(codec.log_id)

    def _find_codec(self, of_marks: Optional[Codec]) -> Optional[Codec]:
        """Return what any header, or the marks, tells the log's records by."""
        found: Optional[Codec] = None
        for segment in self.segments.values():
            codec = Codec.of_header(self.read_raw(segment, FIRST, 0), segment.number)
            if codec and found and codec.log_id != found.log_id:
                raise StorageError(f"{self.file(segment.name)} belongs to another queue or "
                                   "backup; nothing was touched: move it away")
            found = found or codec
        return found or of_marks

    def _begin(self, is_under_way: bool) -> None:
        """Make a new log of a file that is not one of this version's."""
        segment = self.segments[0]
        if self.read_raw(segment, FIRST, 0).startswith(MAGIC + b"\0\0\0\1"):
            raise StorageError(f"{self.path} is of version 2.0, which this one does not read; it "
                               "was left as it is: take what waits with 2.0, then move "
                               f"{self.folder} away")
        is_alone, legacy = len(self.segments) == 1, LegacyLog(self)
        if is_alone and self._is_zeros(segment, 0, segment.end):
            self._use(Codec.new())
            self.storage.truncate(segment.fd, 0)
            segment.end = 0
            self.write_first(segment, Start())
        elif is_under_way or (is_alone and legacy.is_proven()):
            self._use(Codec.new())
            legacy.take_over()
        else:
            raise StorageError(f"{self.path} is not a log that this version can read; it was "
                               "left as it is: restore it from a backup, or move it away")

    def write_first(self, segment: Segment, start: Optional[Start]) -> None:
        """Write the header of a new file, and its first record, durably."""
        data = self.codec.header(segment.number)
        if start:
            data += self.codec.encode_start(start, segment.number)
        first = File(segment.name, segment.fd)           # of a file that may go on behind it
        self.storage.append(first, data)
        os.fchmod(segment.fd, 0o600)
        self.storage.fdatasync(segment.fd)
        self.storage.fsync_folder(self.folder)
        segment.start, segment.end = start, max(segment.end, first.end)
        segment.room = max(segment.room, first.end)

    def _measure(self, segment: Segment, before: Optional[Segment]) -> None:
        """Find out what a segment begins with; how far it goes is told by reading it."""
        first = self.read_raw(segment, FIRST + START_BYTES, 0)
        segment.room = os.fstat(segment.fd).st_size
        segment.start = self.codec.decode_start(first[FIRST:], segment.number)
        segment.end = segment.synced = max(FIRST, segment.room)
        is_used = segment.start is not None or segment.number == 0
        if is_used and Codec.of_header(first, segment.number) is None:
            self.set_aside(segment, 0, min(FIRST, segment.room))
        if segment.start is None and not self._is_zeros(segment, FIRST, segment.room):
            self._guess_start(segment, before)

    def _guess_start(self, segment: Segment, before: Optional[Segment]) -> None:
        """A start record that is damaged is missed only if there are messages behind it. It is
        written again: what is wrong about where these stand has them freed too early."""
        after = self._next_valid(segment, FIRST, segment.room)
        if after < segment.room:
            self.set_aside(segment, FIRST, after)
            segment.start = self._start_behind(before) if before else Start()
            if not segment.is_unreadable:    # or the next start would not know
                self.write_first(segment, segment.start)

    def _start_behind(self, segment: Segment) -> Start:
        """Return what a segment behind this one begins with."""
        start = segment.start or Start()
        position, after = -1, segment.base | FIRST
        while after != position:
            position = after
            messages, after = self.read(position, segment.base | segment.end, LOG_CHUNK_BYTES)
            for message in messages:
                if message.id >= start.next_id:          # put here, no copy
                    start = start.behind(message)
        return start

    # -- reading

    def read_raw(self, file: File, size: int, position: int) -> bytes:
        """Read up to `size` bytes, fewer only at the end of the file. What the disk cannot read
        comes as zeros, which are no record: damage like any other. Raises LogFailed."""
        data, is_damaged = b"", False
        while len(data) < size:
            at, step = position + len(data), size - len(data)
            if is_damaged:
                step = min(step, BLOCK_BYTES - at % BLOCK_BYTES)
            try:
                piece = self.storage.pread(file.fd, step, at)
            except OSError as error:
                if error.errno != errno.EIO:
                    self._fail("read", error)
                if not is_damaged:
                    self.prove_lock()
                    is_damaged = file.is_unreadable = True
                    continue
                piece = bytes(min(step, max(0, file.end - at)))
            if not piece:
                break
            data += piece
        return data

    def _is_zeros(self, segment: Segment, start: int, end: int) -> bool:
        return not any(data.strip(b"\0") for data in self._pieces(segment, start, end))

    def _pieces(self, file: File, start: int, end: int) -> Iterator[bytes]:
        """Read a part of a file piece by piece."""
        for at in range(start, end, LOG_CHUNK_BYTES):
            yield self.read_raw(file, min(LOG_CHUNK_BYTES, end - at), at)

    def read(self, offset: int, end: int, size: int = AHEAD_BYTES) -> Tuple[List[Message], int]:
        """Read once from `offset` on, below `end`: return the messages that were found, and
        where to go on; there is no more if that is `offset`. Damage is set aside and skipped."""
        segment = self.segments.get(offset >> SEGMENT_SHIFT)
        position = max(offset & POSITION_MASK, FIRST)
        if segment is None or position >= segment.end:
            following = self.after(offset >> SEGMENT_SHIFT)
            return [], following if following is not None and following < end else offset
        limit = min(segment.end, end - segment.base)
        if position >= limit:
            return [], offset
        messages, after = self._decode(segment, position, limit, size)
        if after == segment.base | position:
            after = segment.base | self._skip_damage(segment, position, limit)
        return messages, after

    def _decode(self, segment: Segment, position: int, end: int,
                size: int) -> Tuple[List[Message], int]:
        """Return the messages in so many bytes, but of one record at least if it ends before
        `end`, and the offset behind them."""
        messages: List[Message] = []
        start = segment.base | position
        data = self.read_raw(segment, min(size, end - position), position)
        after = self.codec.decode(data, start, messages)
        if after == start:
            whole = self.codec.size_of(data)
            if len(data) < whole <= end - position:
                data = self.read_raw(segment, whole, position)
                after = self.codec.decode(data, start, messages)
        return messages, after

    def after(self, number: int) -> Optional[int]:
        """Return where the segment behind one begins, None behind the current one."""
        if number >= self.current.number:
            return None
        following = min([n for n in list(self.segments) if n > number])
        return following << SEGMENT_SHIFT | FIRST

    def message_at(self, offset: int, size: int) -> Optional[Message]:
        """Return the message of the record at `offset`, None if none stands there any more."""
        segment, position = self.segments.get(offset >> SEGMENT_SHIFT), offset & POSITION_MASK
        if segment is None or position + size > segment.end:
            return None
        found, _ = self._decode(segment, position, position + size, size)
        if not found:
            self.set_aside(segment, position, position + size)
        return found[0] if found else None

    def glance(self, offset: int) -> Optional[Message]:
        """Return the first message at or behind `offset`, without payload and unchecked: for who
        only wants to know its time."""
        segment = self.segments.get(offset >> SEGMENT_SHIFT)
        position = max(offset & POSITION_MASK, FIRST)
        if segment is None or position >= segment.end:
            following = self.after(offset >> SEGMENT_SHIFT)
            return None if following is None else self.glance(following)
        data = self.read_raw(segment, HEAD.size, position)
        if len(data) < HEAD.size or not data.startswith(self.codec.marker):
            return None
        _, _, kind, id_, time_ms, delay_ms, length = HEAD.unpack(data)
        if kind == START:
            return self.glance(segment.base | position + HEAD.size + length)
        return Message(id_, time_ms, delay_ms, b"", segment.base | position, HEAD.size + length)

    def _skip_damage(self, segment: Segment, position: int, end: int) -> int:
        """Return where to read on behind damage that begins at `position`. What nothing valid
        follows is a torn tail, or room that was never used: cut off."""
        after = self._next_valid(segment, position + 1, end)
        if after < end:
            self.set_aside(segment, position, after)
        elif end == segment.end and not self._is_zeros(segment, position, end):
            if self._is_recovering:
                self.save(segment, position, end)
                event(logging.WARNING, "torn_tail", log=self.file(segment.name), offset=position,
                      bytes=end - position)
            else:
                self.set_aside(segment, position, end)
        if after == end == segment.end and segment is not self.current:
            segment.end = position
        elif after == end == segment.end and self._is_recovering:
            self.storage.truncate(segment.fd, position)
            segment.end = segment.room = segment.synced = position
            return position
        return after

    def _next_valid(self, segment: Segment, start: int, end: int) -> int:
        """Return where the first valid record at or behind `start` stands, `end` if none."""
        marker = re.compile(b"(?=%b)" % re.escape(self.codec.marker))
        overlap = len(self.codec.marker) - 1
        for base in range(start, end, LOG_CHUNK_BYTES):
            data = self.read_raw(segment, min(LOG_CHUNK_BYTES + overlap, end - base), base)
            for match in marker.finditer(data):
                at = base + match.start()
                if self._decode(segment, at, end, HEAD.size)[1] > segment.base | at:
                    return at
        return end

    def set_aside(self, segment: Segment, position: int, end: int) -> None:
        """Count, report and save damaged bytes, once for each place."""
        if segment.base | position not in self.damaged:
            self.damaged.add(segment.base | position)
            self.corrupt_records += 1
            event(logging.ERROR, "corrupt_record", log=self.file(segment.name), offset=position,
                  bytes=end - position)
            self.save(segment, position, end)

    def save(self, segment: Segment, position: int, end: int, what: str = "corrupt") -> None:
        """Keep bytes that cannot be used in a file of their own."""
        name = f"{self.file(segment.name)}.{what}-{self.codec.log_id.hex()}-{position}"
        self.save_bytes(name, self._pieces(segment, position, end))

    def save_bytes(self, name: str, pieces: Iterable[bytes]) -> None:
        """Keep what cannot be used in a file beside the log, if there is space for it."""
        try:
            file = File(name, self.storage.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
            try:
                for data in pieces:
                    self.storage.append(file, data)
                self.storage.fsync(file.fd)
            finally:
                self.storage.close(file.fd)
        except OSError as error:             # the bytes are lost anyway; serving goes first
            event(logging.WARNING, "corrupt_record_not_saved", file=name, error=error.strerror)

    # -- recovery

    def rewrite(self, start: int) -> None:
        """Write again and sync what stands from `start` on: a sync that failed before a crash
        leaves pages that are clean but not on disk."""
        for segment in self.segments.values():
            copy = File(segment.name, segment.fd)
            copy.end = max(0, start - segment.base)
            if segment.start and copy.end < segment.end:
                for data in self._pieces(segment, copy.end, segment.end):
                    if not segment.is_unreadable:
                        self.storage.append(copy, data)
                self.storage.fdatasync(segment.fd)
        self.storage.fsync_folder(self.folder)

    def begin_anew(self, start: Start) -> None:
        """Go on in a new segment, whose start says so, durably. Raises DiskFull."""
        self.make_ready()
        self.rotate(start)
        self.sync()

    def remove_unused(self) -> None:
        """Remove segments that were made ready before the start and got no record. Called last:
        a start that fails must not forget their numbers."""
        self._is_recovering = False
        while self._unused:
            segment = self._unused.pop()
            segment.is_gone = True
            for _ in self.remove(segment):
                pass

    # -- segments

    @property
    def tail(self) -> int:
        return self.current.base | self.current.end

    @property
    def size(self) -> int:
        """How many bytes all files have, but for room that is not used yet."""
        return sum([s.end for s in list(self.segments.values())]) + self.marks.end

    def make_ready(self) -> None:
        """Make the next segment if there is none, so that a rotation costs no time; durable on
        return, but not yet used. Raises DiskFull, and OSError for want of a descriptor."""
        while not self.ready:
            segment = Segment(self.highest + 1, -1)
            try:
                with self.new_file(self.file(segment.name)) as segment.fd:
                    self.write_first(segment, None)
                    self.prove_lock()
                self.highest, self.ready = segment.number, segment
            except FileExistsError:          # another node's, perhaps
                self.prove_lock()
                self.highest += 1
            except OSError as error:
                if error.errno in NO_SPACE:
                    raise DiskFull from None
                raise

    def forget_ready(self, file: File) -> None:
        """Have another segment made in place of the next one, if that is this one."""
        if self.ready and self.ready is file:
            fd, self.ready = self.ready.fd, None
            with contextlib.suppress(OSError):
                self.storage.close(fd)

    def rotate(self, start: Start) -> None:
        """Go on in the segment that is ready, whose first record tells where it begins. Raises
        DiskFull if there is none, or no space for that record."""
        segment, old = self.ready, self.current
        if segment is None:
            raise DiskFull
        self._write(segment, self.codec.encode_start(start, segment.number))
        segment.start = start
        self.segments = {**self.segments, segment.number: segment}   # who iterates has the old one
        self.current, self.ready = segment, None
        self.give_back(old)

    def give_back(self, segment: Segment) -> bool:
        """Have a file end behind its last record; return whether it went beyond that."""
        has_room = segment.room > segment.end
        if has_room:
            with contextlib.suppress(OSError):
                self.storage.truncate(segment.fd, segment.end)
                segment.room = segment.end
        return has_room

    def forget(self, number: int) -> Segment:
        """Take a sealed segment out of the log: nobody reads it from here on but its users."""
        segment = self.segments[number]
        if number:
            self._gone.add(segment)          # or its lock would outlive a close
            self.segments = {n: s for n, s in self.segments.items() if n != number}
            segment.is_gone = True
        else:                                # its name and its lock stay
            segment.start, segment.end = None, FIRST
        return segment

    def remove(self, segment: Segment) -> Steps[None]:
        """Remove the file of a forgotten segment, a part at a time: freeing much space at once
        keeps a file system from everybody else."""
        path = self.file(segment.name)
        if segment.is_unreadable:            # it may hold messages
            event(logging.WARNING, "unreadable_segment_kept", file=path)
        try:
            while not segment.is_unreadable and segment.room > FIRST and not segment.users:
                segment.room = max(FIRST, segment.room - TRUNCATE_BYTES)
                self.storage.truncate(segment.fd, segment.room)
                yield FREE_REST_S
            if segment.number and leads_to(path, segment.fd):
                if segment.is_unreadable:
                    self.storage.rename(path, f"{path}.unreadable-{self.codec.log_id.hex()}")
                else:
                    self.storage.unlink(path)
        except OSError as error:             # the next start removes it
            event(logging.WARNING, "segment_not_removed", file=path, error=error.strerror)
        if segment.number:
            self.release(segment, 0)

    def hold(self, segments: Iterable[Segment]) -> None:
        """Keep descriptors open until `release`, and their files whole."""
        with self._commit:
            for segment in segments:
                segment.users += 1

    def release(self, segment: Segment, count: int = 1) -> None:
        with self._commit:
            segment.users -= count
            close = segment.is_gone and segment.users == 0 and segment.fd >= 0
            fd, segment.fd = segment.fd, -1 if close else segment.fd
        if close:
            self._gone.discard(segment)
            with contextlib.suppress(OSError):           # of a mount that went: the rest fails too
                self.storage.close(fd)

    # -- appending

    def append(self, items: Iterable[Unplaced],
               apply: Callable[[Sequence[Message]], None] = lambda _: None) -> None:
        """Write messages at the tail with one write, then apply them.

        Not durable on return. Raises DiskFull, or ApiError 503 for want of memory, the log being
        as before; LogFailed when it is not known to be, or when memory no longer agrees with it.
        """
        if self.failure:
            raise self.failure
        segment = self.current
        try:
            data, messages = self.codec.encode(items, segment.base | segment.end)
        except MemoryError:
            raise no_memory() from None
        if segment.end + len(data) > POSITION_MASK:
            raise DiskFull
        if segment.end + len(data) > segment.room and self._has_room:
            self._make_room(segment, len(data))
        self._write(segment, data)
        try:                                 # here: a call may find no memory either
            self.appends += 1                # invariant 2: after its write ended
            apply(messages)
        except BaseException as error:
            self.give_up(error)

    def give_up(self, error: BaseException) -> NoReturn:
        """Memory no longer agrees with the log: only a start helps. Raises LogFailed."""
        self._fail("apply to", error)

    def _write(self, file: File, data: bytes) -> None:
        """Write at the end of a file, all or nothing. Raises DiskFull."""
        for again in (True, False):
            try:
                self.storage.append(file, data)
                return
            except OSError as error:
                self._undo_write(file, error)
                if not (again and self.give_back(self.current)):
                    raise DiskFull from None
            except BaseException as error:
                self._fail("write", error)

    def _undo_write(self, file: File, error: OSError) -> None:
        if error.errno not in NO_SPACE:
            self._fail("write", error)
        try:
            self.storage.truncate(file.fd, file.end)
            file.room = file.end
        except OSError as again:
            if file is not self.marks:       # where the next line comes over what it left
                self._fail("truncate", again)

    def _make_room(self, segment: Segment, size: int) -> None:
        """Have the file reach beyond its tail: a sync within a file is faster than one that
        makes it longer."""
        more = size + min(ROOM_BYTES, max(ROOM_LEAST_BYTES, segment.end))
        try:
            self.storage.allocate(segment.fd, segment.end, more)
            segment.room = segment.end + more
        except OSError:                      # the write itself tells whether the disk is full
            self.give_back(segment)

    def _fail(self, doing: str, error: BaseException) -> NoReturn:
        """Poison the log (invariant 4): this and every later call raises LogFailed."""
        reason = getattr(error, "strerror", None) or repr(error)
        failure = LogFailed(f"cannot {doing} {self.folder}: {reason}")
        if not self.failure:
            self.failure = failure
            self._on_failure(failure)
        raise failure from error

    # -- marks

    def mark(self, marks: Sequence[Mark], apply: Callable[[], None]) -> bool:
        """Write marks, then have them applied; return whether there was space. They are applied
        even if there was none. Raises LogFailed."""
        if self.failure:
            raise self.failure
        lines, written = self.marks.lines, False
        crc = lines.crc
        try:
            self._write(self.marks, b"".join(map(lines.encode, marks)))
            written = True
        except DiskFull:
            pass
        finally:
            if not written:                  # the next line stands in its place
                lines.crc = crc
        try:
            apply()
        except BaseException as error:
            self.give_up(error)
        return written

    def _open_marks(self) -> Optional[Codec]:
        """Open and lock the marks; return what they tell the log's records by, if they begin with
        a whole snapshot's first line."""
        marks = self.marks
        try:
            marks.fd = self.storage.open(self.file(META_NAME), os.O_RDWR)
        except FileNotFoundError:
            return None
        lock_file(marks.fd, self.folder, LET_GO_S)
        marks.end = os.fstat(marks.fd).st_size
        first = next(self._lines(), b"")
        try:
            value = json.loads(first)[1]
            codec = Codec(bytes.fromhex(value["log_id"]), bytes.fromhex(value["marker"]))
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            return None
        return codec if Marks(codec.log_id).decode_head(first) else None

    def _lines(self) -> Iterator[bytes]:
        """Yield the whole lines of the marks."""
        rest = b""
        for data in self._pieces(self.marks, 0, self.marks.end):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line + b"\n"

    def read_marks(self) -> Tuple[Optional[Dict[str, Any]], List[Dict[int, bytes]], List[Mark]]:
        """Return the snapshot, its pages, and the marks behind it. Without a whole snapshot there
        are none: all that the data holds waits again."""
        chain, seen = self.marks.lines, 0
        found: List[Any] = []                # the snapshot's head, its pages, and the marks
        for line in self._lines():
            decode = (chain.decode_head if not found else chain.decode_page
                      if len(found) <= found[0]["pages"] else chain.decode)
            value = decode(line)
            if value is None:
                break
            found.append(value)
            seen += len(line)
        count = found[0]["pages"] + 1 if found else 1
        if len(found) < count:
            found, seen = [], 0
        self._save_rest_of_marks(seen, not found)
        self.marks.end = seen
        if not found:
            return None, [], []
        head, pages, marks = found[0], found[1:count], found[count:]
        self.highest = max([self.highest, head["highest"],
                            *[mark.tail >> SEGMENT_SHIFT for mark in marks]])
        return head, pages, marks

    def _save_rest_of_marks(self, at: int, is_whole: bool) -> None:
        """Keep what could not be understood of the marks, unless it is zeros, or the Go server's,
        which is kept already."""
        rest = self.read_raw(self.marks, min(MARKS_BYTES, self.marks.end - at), at)
        if rest.strip(b"\0") and not LegacyLog.offsets_in(rest):
            if is_whole:
                self.corrupt_records += 1
            event(logging.WARNING, "torn_marks", file=self.file(META_NAME), offset=at,
                  bytes=len(rest.rstrip(b"\0")))
            self.save_bytes(f"{self.file(META_NAME)}.corrupt-{secrets.token_hex(8)}", [rest])

    def write_snapshot(self, lines: Callable[[Marks], Iterator[bytes]], since: int,
                       lock: threading.Lock) -> Steps[bool]:
        """Put a snapshot, which was frozen when the marks ended at `since`, in place of the
        marks, with all that was marked since. Durable when it returns True; False if there was
        no space, the old marks being in use. `lock` is the owner's."""
        self.sync()                          # what is frozen must not be ahead of the data
        new, path = MarksFile(self.codec.log_id), self.temporary(META_NAME)
        try:
            with self.new_file(path) as new.fd:
                yield from self._write_lines(new, lines(new.lines))
                since = self._copy_marks(new, since)
                yield 0
                old_fd = self._switch_marks(new, path, since, lock)
            if old_fd >= 0:
                self.storage.close(old_fd)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._is_recovering:
                raise                        # it is not the disk that a start lacks
            if error.errno not in (*NO_SPACE, errno.EMFILE, errno.ENFILE):
                self._fail("write a snapshot of", error)
            return False
        self.sync_marks()
        return True

    def _write_lines(self, new: MarksFile, lines: Iterator[bytes]) -> Steps[None]:
        for first in lines:
            piece, started = first, time.perf_counter()
            while time.perf_counter() - started < SNAPSHOT_WORK_S:
                piece += next(lines, b"")
            self.storage.append(new, piece)
            if new.end - new.synced >= MIB:              # more would keep the disk from puts
                self.storage.fdatasync(new.fd)
                new.synced = new.end
            yield SNAPSHOT_REST_S
        new.snapshot_bytes = new.end

    def _copy_marks(self, new: MarksFile, since: int) -> int:
        """Copy what was marked since; return where to go on."""
        while since < self.marks.end:
            data = self.storage.pread(self.marks.fd, min(LOG_CHUNK_BYTES, self.marks.end - since),
                                      since)
            lines = data[:data.rfind(b"\n") + 1].splitlines(keepends=True)
            self.storage.append(new, b"".join([new.lines.line(line.rpartition(b",")[0])
                                               for line in lines]))
            since += sum(map(len, lines))
        return since

    def _switch_marks(self, new: MarksFile, path: str, since: int, lock: threading.Lock) -> int:
        """Rename the new marks into place; return the old ones' descriptor. No sync of these may
        end meanwhile: so what is copied last, under the owner's lock, needs none either."""
        with self._one_sync:
            if self.failure:
                raise self.failure
            since = self._copy_marks(new, since)         # perhaps synced
            self.storage.fdatasync(new.fd)
            new.synced = new.end
            if self._folder_fd < 0:          # once the new file has its name none may be lacking
                self._folder_fd = self.storage.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            with lock:
                self._copy_marks(new, since)
                self.prove_lock()
                self.storage.rename(path, self.file(META_NAME))
                old, self.marks = self.marks, new
        return old.fd

    # -- durability

    def when_durable(self, number: int, call: Callable[[], None], *,
                     marks: bool = False) -> bool:
        """Have `call` made once append `number`, and with `marks` all that was marked so far, is
        as durable as `fsync` asks for.

        Does not block; `call` is made at once, or by whoever syncs. Returns whether it is the
        caller's turn to have `lead` called.
        """
        if self.fsync == "always" or (marks and self.fsync == "everysec"):
            with self._commit:
                if self.failure:
                    raise self.failure
                if marks or self.durable < number:
                    self._followers.append((number, marks, call))
                    turn, self._leading = not self._leading, True
                    return turn
        call()
        return False

    def lead(self) -> None:
        """Sync until nobody waits: one sync for all whose writes ended before it began."""
        is_over = False
        while not is_over:
            with self._commit:
                waiting = list(self._followers)
            self.sync()
            if any(marks for _, marks, _ in waiting):
                self.sync_marks()
            with self._commit:
                ready = [f for f in self._followers if f[0] <= self.durable
                         and (not f[1] or f in waiting)]
                self._followers = [f for f in self._followers if f not in ready]
                self._leading = bool(self._followers) and self.current.fd >= 0
                is_over = not self._leading
            try:
                for _, _, call in ready:
                    call()
            except BaseException as error:   # those behind it would wait for ever
                self.give_up(error)

    def wait_durable(self, number: int) -> None:
        """Block until append `number` is as durable as `fsync` asks for; raises LogFailed. Lasts
        for two syncs at most, whatever others append."""
        if self.fsync == "always":
            self.sync(number)

    def sync(self, number: Optional[int] = None) -> None:
        """Block until all appends so far, or those up to `number`, are on disk; raises LogFailed.
        A closed log has nothing to sync."""
        while not self._one_sync.acquire(timeout=PAUSE_S):       # others may get it each time
            if number is not None and number <= self.durable:
                return
        try:
            if self.failure:
                raise self.failure
            if self.current.fd >= 0 and (number is None or number > self.durable):
                self._sync_data()
        finally:
            self._one_sync.release()

    def _sync_data(self) -> None:
        """Sync what was written so far, the oldest segment first. Called with `_one_sync` held:
        of two at once only one would be told of an error."""
        target = self.appends
        with self._commit:
            dirty = [s for s in self.segments.values() if s.synced < s.end]
            for segment in dirty:
                segment.users += 1
        for segment in dirty:
            self._sync_file(segment)
            self.release(segment)
        with self._commit:
            self.durable = max(self.durable, target)

    def _sync_file(self, file: File) -> None:
        end, started = file.end, time.perf_counter()
        try:
            self.storage.fdatasync(file.fd)
        except BaseException as error:       # whatever it is: the kernel tells it only once
            self._fail("sync", error)
        file.synced = end
        lasted_s = time.perf_counter() - started
        self.syncs += 1
        self.sync_seconds += lasted_s
        if lasted_s > LOCK_S:                # another node may have taken over meanwhile
            self.prove_lock()

    def sync_marks(self) -> None:
        """Block until all that was marked so far is on disk; raises LogFailed. A closed log has
        nothing to sync."""
        with self._one_sync:
            if self.failure:
                raise self.failure
            if self.marks.fd >= 0 and self.marks.synced < self.marks.end:
                self._sync_file(self.marks)
            if self._folder_fd >= 0:         # or a power cut brings back the old marks
                fd, self._folder_fd = self._folder_fd, -1
                try:
                    self.storage.fsync(fd)
                except OSError as error:
                    self._fail("sync", error)
                finally:
                    self.storage.close(fd)

    # -- files that somebody removed

    def missing_files(self) -> List[File]:
        """Return those of this log's files to which no name leads any more. Raises LogFailed if
        another file has the name: its owner goes on, we cannot. Other marks may be those of a node
        that lost the lock before it gave them the name: they are written again."""
        ready = self.ready                   # a rotation may take it meanwhile
        files: List[File] = [*self.segments.values(), *([ready] if ready else []), self.marks]
        missing = [file for file in files
                   if file.fd >= 0 and not leads_to(self.file(file.name), file.fd)]
        for file in missing:
            self.prove_lock()
            if file is not self.marks and os.path.lexists(self.file(file.name)):
                self._fail("go on in", OSError(0, f"another file took the place of {file.name}"))
        return missing

    @property
    def owns_marks(self) -> bool:
        """Whether the next start would read these marks."""
        return leads_to(self.file(META_NAME), self.marks.fd)

    def put_back(self, segment: Segment, lock: threading.Lock) -> Steps[None]:
        """Write a segment that is not written any more again, from its descriptor."""
        self.storage.make_folder(self.folder)
        path, name = self.temporary(segment.name), self.file(segment.name)
        new = Segment(segment.number, -1)
        with self.new_file(path, name) as new.fd:
            new.end = 0
            for data in self._pieces(segment, 0, segment.end):
                self.storage.append(new, data)
                yield SNAPSHOT_REST_S
            self.storage.fdatasync(new.fd)
            self.storage.link(path, name)
            self.storage.unlink(path)
            self.storage.fsync_folder(self.folder)
        with self._one_sync, lock:
            new.start, new.is_unreadable = segment.start, segment.is_unreadable
            new.synced = new.end
            self.segments[segment.number], segment.is_gone = new, True
            self._gone.add(segment)
        self.release(segment, 0)             # a backup may read it: its last user closes it

    def close(self) -> None:
        """Let go of the files and their locks, after a sync that is under way. Does not sync; who
        still waits is not answered."""
        with self._one_sync, self._commit:
            self._followers.clear()
            files: List[File] = [self.marks, *([self.ready] if self.ready else []), *self._unused,
                                 *self._gone, *reversed(list(self.segments.values()))]
            for file in files:               # the first segment, whose lock is ours, last
                file.is_gone = True
                if file.fd >= 0:
                    self.storage.close(file.fd)
                    file.fd = -1
            if self._folder_fd >= 0:
                self.storage.close(self._folder_fd)
                self._folder_fd = -1
            self.current = Segment(0, -1)
            _open_logs.discard(self)


class Mount(NamedTuple):
    """Where a file system is mounted, what kind it is of, and how."""

    point: str = ""
    kind: str = ""
    options: Sequence[str] = ()


def mount_of(path: str) -> Mount:
    """Return the mount that a path is on; an empty one where nobody tells."""
    real = os.path.realpath(path) + "/"
    found = Mount()
    with contextlib.suppress(OSError), open(
            MOUNTS, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:                    # only blank, tab, LF and backslash are escaped there
            before, _, behind = line.partition(" - ")
            escaped, options = before.split(" ")[4:6]
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), escaped)
            kind, _, more = behind.split(" ", 2)
            # Of several on one point the last one is seen.
            if real.startswith(point.rstrip("/") + "/") and len(point) >= len(found.point):
                found = Mount(point, kind, f"{options},{more.strip()}".split(","))
    return found


def why_no_standby(path: str) -> Optional[str]:
    """Return why a node may not wait for the locks of this folder: they are known to one node only,
    or stay for ever where one is gone. None if nothing speaks against it."""
    mount = mount_of(path)
    local = [option for option in mount.options if LOCAL_LOCK.fullmatch(option)]
    if mount.kind in LOCKLESS or local:
        what = " ".join([mount.kind, *local])
        return f"{mount.point} is {what}: its locks hold on one node only, or for ever"
    with contextlib.suppress(OSError), open(RECOVER_LOST_LOCKS, encoding="ascii") as file:
        if mount.kind == "nfs4" and file.read().strip() in ("Y", "1"):
            return f"{RECOVER_LOST_LOCKS} is set: a lock that was lost would come back unnoticed"
    return None


class LegacyLog:
    """The messages that wait in a folder of the Go server.

    Its log is (length u64, bytes)*, its `meta.json` {"head_offset", "tail_offset"}. It never
    syncs, and it compacts by a rename before it saves the offsets of the renamed file.
    While `data.log` and `data.log.legacy` are one file a takeover is under way: a start begins
    it again.
    """

    def __init__(self, log: Log) -> None:
        self._log, self._segment = log, log.segments[0]
        self._size = self._segment.end = os.fstat(self._segment.fd).st_size
        self._start = Start()                # of what comes behind the messages taken over
        kept, meta = log.file(META_NAME + ".legacy"), b""
        with contextlib.suppress(OSError), \
                open(kept if os.path.exists(kept) else log.file(META_NAME), "rb") as file:
            meta = file.read(KIB)
        self._offsets = self.offsets_in(meta)
        head, tail = self._offsets or (0, self._size)
        if tail - head == self._size or not 0 <= head <= tail:
            head, tail = 0, self._size       # renamed by a compaction, offsets not yet saved
        self._head, self._tail = head, tail

    @staticmethod
    def is_under_way(folder: str) -> bool:
        path = os.path.join(folder, LOG_NAME)
        return os.path.exists(path + ".legacy") and os.path.samefile(path, path + ".legacy")

    @staticmethod
    def offsets_in(data: bytes) -> Optional[Tuple[int, int]]:
        """Return head and tail if these are the bytes of the Go server's `meta.json`."""
        try:
            meta = json.loads(data)
            return int(meta["head_offset"]), int(meta["tail_offset"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None

    def is_proven(self) -> bool:
        """Tell whether this is the Go server's: by its meta.json, or by lengths that lead from
        message to message up to the end, where the last one may be cut short."""
        found = self._offsets is not None
        for first, end in () if found else self._walk():
            if end - first > MAX_MESSAGE_BYTES:
                return False
            found = found or first < end <= self._size
        return found

    def _walk(self) -> Iterator[Tuple[int, int]]:
        """Yield where the payload of each message begins and ends; the last one may be beyond the
        end of the file."""
        end = 0
        while end < self._size:
            start, first = self._log.read_raw(self._segment, U64.size, end), end + U64.size
            end = first + (U64.unpack(start)[0] if len(start) == U64.size else 0)
            yield first, end

    def take_over(self) -> None:
        """Write what waits into segments of ours; both old files are kept as `.legacy`. A crash
        before the rename at the end is repeated without harm."""
        log = self._log
        os.chmod(log.folder, 0o700)
        for name in filter(SEGMENT_NAME.fullmatch, os.listdir(log.folder)):
            log.storage.unlink(log.file(name))           # of a takeover that was cut short
        for name in (LOG_NAME, META_NAME):
            self._keep(log.file(name))
        log.storage.fsync_folder(log.folder)
        log.begin_anew(self._start)          # nothing may go into the old file
        for _, batch in itertools.groupby(self._waiting(), lambda place: place[0] // MIB):
            log.append([message for _, message in batch], self._count)
            if log.current.end >= SEGMENT_BYTES:
                log.make_ready()
                log.rotate(self._start)
        log.sync()
        path, first = log.temporary(LOG_NAME), Segment(0, -1)
        with log.new_file(path) as first.fd:
            log.write_first(first, None)
            log.prove_lock()
            log.storage.rename(path, log.path)
        log.storage.fsync_folder(log.folder)
        log.storage.close(self._segment.fd)
        log.segments[0] = first
        event(logging.WARNING, "took_over", folder=log.folder, messages=self._start.puts,
              kept=LOG_NAME + ".legacy")

    def _keep(self, old: str) -> None:
        kept = old + ".legacy"
        try:
            self._log.storage.link(old, kept)
        except FileNotFoundError:            # there need not be a meta.json
            return
        except FileExistsError:
            if not os.path.samefile(old, kept):
                raise StorageError(f"{kept} is in the way of taking over {old}; move it "
                                   "elsewhere") from None
        os.chmod(kept, 0o600)

    def _count(self, messages: Sequence[Message]) -> None:
        self._start = functools.reduce(Start.behind, messages, self._start)

    def _waiting(self) -> Iterator[Tuple[int, Unplaced]]:
        """Yield the messages that wait, and where each ends."""
        log, id_, now_ms = self._log, 0, int(time.time() * 1000)
        for first, end in self._walk():
            if first - U64.size >= self._tail:
                return
            if end > self._size:
                log.set_aside(self._segment, first - U64.size, self._size)
            elif end - first > MAX_MESSAGE_BYTES:
                event(logging.ERROR, "message_too_large", log=log.path, offset=first - U64.size,
                      bytes=end - first)
                log.save(self._segment, first, end, "too-large")
            elif end > max(self._head, first):
                id_ += 1
                yield end, (id_, now_ms, 0, log.read_raw(self._segment, end - first, first))


# ---- State --------------------------------------------------------------------------------
# What a log says, a pure function of its records and marks: for each subscriber a cursor, below
# which all is settled but the entries. What waits beyond the cursor stays in the files. Who has a
# message in hand is no part of this: in the log it waits.

Page = Dict[int, bytes]


class Entry(NamedTuple):
    """A message below the cursor that is not settled, or one with a delay."""

    id: int
    offset: int
    due_ms: int                              # when its delay ends; 0: at once
    size: int
    deliveries: int                          # that came back


class Entries:
    """Messages of a subscription by id, packed; in pages of ids, so that a copy costs next to
    nothing: `freeze` copies the table of pages, and a page is copied when it is changed first."""

    def __init__(self, pages: Iterable[Page] = ()) -> None:
        self._pages = {next(iter(page)) >> PAGE_SHIFT: page for page in pages}
        self._ours: Set[int] = set()         # pages that no copy shares
        self.delayed = sum(entry[2] > 0 for entry in self)       # with a due time

    @property
    def count(self) -> int:
        return sum(map(len, self._pages.values()))

    def _own(self, number: int) -> Page:
        """Return a page to be changed; it stays empty if there is no memory for that."""
        if number not in self._ours:
            self._pages[number] = dict(self._pages.get(number, ()))
            self._ours.add(number)
        return self._pages[number]

    def __contains__(self, id_: int) -> bool:
        return id_ in self._pages.get(id_ >> PAGE_SHIFT, ())

    def __getitem__(self, id_: int) -> Entry:
        """Raises KeyError."""
        return Entry(*ENTRY.unpack(self._pages[id_ >> PAGE_SHIFT][id_]))

    def due(self, id_: int) -> Optional[int]:
        """Return when an entry's delay ends, 0 without one; None if it is none."""
        entry = self._pages.get(id_ >> PAGE_SHIFT, {}).get(id_)
        return None if entry is None else int.from_bytes(entry[16:24], "big")

    def put(self, id_: int, offset: int, due_ms: int, size: int, deliveries: int) -> None:
        page = self._own(id_ >> PAGE_SHIFT)
        was_delayed = (self.due(id_) or 0) > 0
        page[id_] = ENTRY.pack(id_, offset, due_ms, size, deliveries)
        self.delayed += (due_ms > 0) - was_delayed

    def add(self, messages: Sequence[Message]) -> None:
        """Make entries of a run of messages without a delay that are none yet."""
        number, page, pack = -1, {}, ENTRY.pack
        for id_, _, _, _, offset, size in messages:
            if id_ >> PAGE_SHIFT != number:
                number = id_ >> PAGE_SHIFT
                page = self._own(number)
            page[id_] = pack(id_, offset, 0, size, 0)

    def pop(self, first: int, last: int) -> List[Tuple[int, ...]]:
        """Take out the entries from `first` to `last`; return the fields of each."""
        gone: List[bytes] = []
        for number, ids in itertools.groupby(self.between(first, last),
                                             lambda id_: id_ >> PAGE_SHIFT):
            page = self._own(number)
            gone += map(page.pop, ids)
            if not page:
                del self._pages[number]
                self._ours.discard(number)
        entries = list(ENTRY.iter_unpack(b"".join(gone)))
        self.delayed -= sum([entry[2] > 0 for entry in entries]) if self.delayed else 0
        return entries

    def between(self, first: int, last: int) -> List[int]:
        """Return the ids from `first` to `last`, in order."""
        run, pages = range(first, last + 1), self._pages
        if first == last:                    # as nearly always
            return [first] if first in self else []
        if len(run) <= 1 << PAGE_SHIFT:
            return [id_ for id_ in run if id_ in pages.get(id_ >> PAGE_SHIFT, ())]
        numbers = range(first >> PAGE_SHIFT, (last >> PAGE_SHIFT) + 1)
        return sorted(id_ for number in pages if number in numbers
                      for id_ in pages[number] if id_ in run)

    def stands_at(self, id_: int, offset: int) -> bool:
        return id_ in self and self[id_].offset == offset

    def lowest(self) -> int:
        """Return the lowest id, NEVER without any."""
        number = min(filter(self._pages.get, self._pages), default=None)
        return NEVER if number is None else min(self._pages[number])

    def freeze(self) -> List[Page]:
        """Return the pages as they are now; they never change from here on."""
        self._ours.clear()
        return list(filter(None, self._pages.values()))

    def __iter__(self) -> Iterator[Tuple[int, ...]]:
        """Yield the fields of each entry: there may be millions."""
        for page in self._pages.values():
            yield from ENTRY.iter_unpack(b"".join(page.values()))


class Subscription:
    """The place of one subscriber in a log. Its queue's lock guards all of it.

    1. Below `cursor_id` everything is settled except `entries`; from it on everything waits,
       but for a message with a delay, which waits only if it is an entry.
    2. All messages with an id below `cursor_id` stand before `cursor`, an offset.
    3. `passed` messages without a delay were put before the cursor.
    """

    def __init__(self, name: str, state: State, cursor: int, start: Start,
                 pages: Iterable[Page] = ()) -> None:
        self.name, self._state = name, state
        self.entries = Entries(pages)
        self.cursor_id = 0
        self.early_id = 0                    # the highest entry that would wait at the cursor, too
        self._ahead: Deque[Message] = collections.deque()        # read, and not passed yet
        self.stand_at(cursor, start)

    @property
    def held_count(self) -> int:
        """How many messages this subscriber has not settled."""
        return self._state.start.puts - self.passed + self.entries.count

    def stand_at(self, offset: int, start: Start) -> None:
        """Put the cursor where a segment, or the log, has so much before it."""
        self.cursor_id = max(self.cursor_id, start.next_id)
        self.cursor = self._read_to = offset             # reading goes on there
        self.passed, self.passed_bytes = start.puts, start.put_bytes
        self._first_id = start.next_id                   # put in the segment that is read
        self._ahead.clear()

    # -- the cursor

    def at_cursor(self, limit: int = 1 << 62) -> Optional[Message]:
        """Return the first message at the cursor, which moves over all that does not wait there.
        Reads about `limit` bytes; `is_behind` tells whether there is more to be read. Raises
        ApiError 503 for want of memory."""
        while True:
            while self._ahead:
                message = self._ahead[0]
                if self._waits(message):
                    return message
                self._pass(message)
            size = self._read_ahead() if limit > 0 else 0
            if not size:
                return None
            limit -= size

    @property
    def is_behind(self) -> bool:
        return not self._ahead and self._read_to < self._state.end

    def _read_ahead(self) -> int:
        """Read the next messages; return about how many bytes that were, 0 at the end."""
        state, start = self._state, self._read_to
        if start >= state.end:
            if self.passed != state.start.puts:
                self._pass_all(start, state.start)
            return 0
        try:
            messages, after = state.log.read(start, state.end)
        except MemoryError:
            raise no_memory() from None
        if after == start:                   # the segments up to the end are gone
            after = state.end
        if after >> SEGMENT_SHIFT > start >> SEGMENT_SHIFT:
            self._pass_all(after, state.start_of(after >> SEGMENT_SHIFT))
        elif not messages:                   # damage is skipped
            self.cursor = after
        self._ahead, self._read_to = collections.deque(messages), after
        return _distance(start, after)

    def _pass_all(self, offset: int, start: Start) -> None:
        """All before an offset is passed; what was not read, or is gone, is counted as well."""
        missed = self.passed != start.puts
        self.stand_at(offset, start)
        if missed:
            self._state.recount()

    def run_at_cursor(self, message: Message, most: int, before: int) -> List[Message]:
        """Return the message that stands at the cursor, and neighbours that wait behind it: up to
        `most` messages, with ids below `before`."""
        run = [message]
        if message.id >= self._first_id:     # what was put here is not counted with a copy
            most = min(most, before - message.id)
            for message in itertools.islice(self._ahead, 1, most):
                id_ = message.id
                if id_ != run[-1].id + 1 or message.delay_ms or id_ in self.entries:
                    break
                run.append(message)
        return run

    def _pass(self, *run: Message) -> None:
        """Move the cursor over a message that is, or becomes, an entry, or does not wait; or over
        a run of those that do."""
        first, last = run[0], run[-1]
        for _ in run:
            self._ahead.popleft()
        if last.id >= self.cursor_id:
            self.cursor_id = last.id + 1
        self.cursor = last.offset + last.size
        if first.id >= self._first_id and not first.delay_ms:        # put here, no copy
            self.passed += len(run)
            self.passed_bytes += self.cursor - first.offset

    def take_in(self, *run: Message) -> None:
        """Make the message, or run, at the cursor entries: the same state, told otherwise."""
        self.entries.add(run)
        self._pass(*run)

    def advance(self, last: int) -> None:
        """Make entries of what waits at the cursor, up to `last`."""
        for message in iter(self.at_cursor, None):
            if message.id > last:
                break
            self.take_in(message)

    # -- what the marks say

    def apply(self, mark: Mark) -> None:
        if mark.kind == POSITION:
            self._state.trash += self.entries.freeze()
            self.entries = Entries()
            self.stand_at(mark.tail, self._state.start)
            self.cursor_id = mark.first
            return
        if mark.last >= self.cursor_id:
            self.advance(mark.last)
        if mark.kind == SETTLED:
            self.drop(mark.first, mark.last)
            if mark.last >= self.cursor_id:  # of a record that is not there
                self.cursor_id = mark.last + 1
            return
        for id_ in self.entries.between(mark.first, mark.last):
            entry = self.entries[id_]
            self.entries.put(id_, entry.offset, mark.due_ms, entry.size, mark.deliveries)

    # -- looking on

    def oldest_ms(self) -> Optional[int]:
        """Return when the first message was put that is not settled; reads a few heads only."""
        lowest = self.entries.lowest()
        offset = self.entries[lowest].offset if lowest < self.cursor_id else self.cursor
        for _ in range(GLANCES if self.held_count else 0):
            message = self._state.log.glance(offset)
            if message is None or self._waits(message) or message.id in self.entries:
                return message.time_ms if message else None
            offset = message.offset + message.size
        return None

    def _waits(self, message: Message) -> bool:
        """Tell whether a message that stands at or behind the cursor waits there."""
        return (message.id >= self.cursor_id and not message.delay_ms
                and message.id not in self.entries)

    def drop(self, first: int, last: int) -> None:
        """Settle the entries from `first` to `last`."""
        self._state.let_go(self.entries.pop(first, last), self)


def _distance(before: int, after: int) -> int:
    """Return how many bytes were read from one offset to another."""
    return after - before if after >> SEGMENT_SHIFT == before >> SEGMENT_SHIFT else 1


class Frozen(NamedTuple):
    """A state as it was at one moment; nothing changes it any more."""

    head: Dict[str, Any]
    pages: List[Page]

    def size(self) -> int:
        """Return how many bytes its lines have, by making them."""
        return sum(map(len, self.lines(Marks(bytes.fromhex(self.head["log_id"])))))

    def lines(self, marks: Marks, *, clean: bool = False) -> Iterator[bytes]:
        yield marks.head({**self.head, "clean": clean, "pages": len(self.pages)})
        for page in self.pages:
            yield marks.page(page)


class State:
    """What a log says.

    `end` is the offset behind the last message that was applied: no subscription reads beyond
    it. `start` is what a segment that began there would say. Ids only grow.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.start = Start()
        self.time_ms = 0                     # the highest time of a message
        self.end = FIRST
        self.subscriptions: Dict[str, Subscription] = {}
        self.held_count = self.held_bytes = 0            # by anyone
        self.live: Dict[int, int] = collections.defaultdict(int)     # of it, bytes by segment
        self.trash: List[Page] = []          # to be let go of one by one: at once would take long
        self._slowest: Sequence[Subscription] = ()       # who holds most, as far as is known
        self.copies: Dict[int, int] = {}     # by segment, where the last copy out of it ends

    @property
    def next_id(self) -> int:
        return self.start.next_id

    def see_id(self, id_: int) -> None:
        """No id up to this one is given from now on."""
        if id_ >= self.start.next_id:
            self.start = self.start._replace(next_id=id_ + 1)

    # -- apply: the only way in which a state changes

    def apply(self, messages: Sequence[Message]) -> None:
        """Apply messages that stand one behind the other."""
        if not messages:
            return
        first, last = messages[0], messages[-1]
        self.time_ms = max(self.time_ms, last.time_ms)
        is_new = first.id >= self.next_id and last.id - first.id == len(messages) - 1
        if is_new and not sum([message.delay_ms for message in messages]):
            size = last.offset + last.size - first.offset
            self.start = Start(last.id + 1, self.start.puts + len(messages),
                               self.start.put_bytes + size)
            self.hold(len(messages), size, first.offset)
        else:
            for message in messages:
                self._apply_one(message)
        self.end = last.offset + last.size

    def _apply_one(self, message: Message) -> None:
        """Apply a message with a delay, which is an entry at once, or a copy of one that has to
        be freed: it moves the entries that there are."""
        id_, is_new = message.id, message.id >= self.next_id
        self.time_ms = max(self.time_ms, message.time_ms)
        if is_new:
            self.start = self.start.behind(message)
            self.hold(1, message.size, message.offset)
            if not message.delay_ms:
                return
        moved = None
        for subscription in self.subscriptions.values():
            if id_ in subscription.entries:
                entry = subscription.entries[id_]
                moved = entry[1]
                subscription.entries.put(id_, message.offset, entry[2], entry[3], entry[4])
            elif id_ >= subscription.cursor_id:
                if not is_new:               # out of a segment that is not passed: of any of them
                    self.copies.update((n, message.offset + message.size)
                                       for n in self.log.segments
                                       if n >= subscription.cursor >> SEGMENT_SHIFT)
                if not message.delay_ms:
                    subscription.early_id = max(id_, subscription.early_id)
                subscription.entries.put(id_, message.offset, message.due_ms, message.size, 0)
        if moved is not None:
            self.copies[moved >> SEGMENT_SHIFT] = message.offset + message.size
            self.live[moved >> SEGMENT_SHIFT] -= message.size
            self.live[message.offset >> SEGMENT_SHIFT] += message.size

    def apply_mark(self, mark: Mark) -> None:
        self.subscriptions[mark.subscriber].apply(mark)
        self.see_id(mark.first - 1 if mark.kind == POSITION else mark.last)

    # -- what is held

    def hold(self, count: int, size: int, offset: int) -> None:
        self.held_count += count
        self.held_bytes += size
        self.live[offset >> SEGMENT_SHIFT] += size

    def let_go(self, entries: Sequence[Tuple[int, ...]], by: Subscription) -> None:
        """Count out what the subscriber that settled it was the last to hold."""
        if len(self.subscriptions) > 1:
            entries = [entry for entry in entries if not self._is_held_by_others(entry[0], by)]
        for _, offset, _, size, _ in entries:
            self.live[offset >> SEGMENT_SHIFT] -= size
            self.held_bytes -= size
        self.held_count -= len(entries)

    def _is_held_by_others(self, id_: int, by: Subscription) -> bool:
        for s in itertools.chain(self._slowest, self.subscriptions.values()):
            if s is not by and (id_ >= s.cursor_id or id_ in s.entries):
                self._slowest = (s,)
                return True
        return False

    def recount(self) -> None:
        """Count what is held, and where it stands; reads nothing, but looks at every entry."""
        self.held_count = self.held_bytes = 0
        self.live, self._slowest = collections.defaultdict(int), ()
        if not self.subscriptions:
            return
        lowest = min(self.subscriptions.values(), key=lambda s: s.cursor)
        seen: Set[int] = set()
        for subscription in self.subscriptions.values():
            for id_, offset, _, size, _ in subscription.entries:
                if (id_ < lowest.cursor_id or subscription is lowest) and id_ not in seen:
                    if len(self.subscriptions) > 1:
                        seen.add(id_)
                    self.live[offset >> SEGMENT_SHIFT] += size
                    self.held_bytes += size
                    self.held_count += 1
        done = lowest.passed, lowest.passed_bytes
        for number in [n for n in self.log.segments if n >= lowest.cursor >> SEGMENT_SHIFT]:
            end = self.start_of(number + 1)
            if end.puts > done[0]:
                self.hold(end.puts - done[0], end.put_bytes - done[1], number << SEGMENT_SHIFT)
                done = end.puts, end.put_bytes

    def start_of(self, number: int) -> Start:
        """Return what was put before a segment; one that a kill left emptied held nothing."""
        starts = (s.start for n, s in self.log.segments.items() if n >= number and s.start)
        return next(starts, self.start)

    # -- the whole

    def freeze(self) -> Frozen:
        """Copy the state; what costs time is left for later."""
        pages: List[Page] = []
        places = []
        for s in self.subscriptions.values():
            own = s.entries.freeze()
            pages += own
            places.append([s.name, s.cursor_id, s.cursor, s.passed, s.passed_bytes, len(own)])
        codec = self.log.codec
        head = {"id": secrets.token_hex(8), "log_id": codec.log_id.hex(),
                "marker": codec.marker.hex(),
                "time_ms": self.time_ms, "tail": self.log.tail, "highest": self.log.highest,
                "start": list(self.start), "subscriptions": places}
        return Frozen(head, pages)

    def restore(self, head: Mapping[str, Any], pages: List[Page]) -> None:
        """Become what a snapshot says."""
        self.end, self.time_ms, self.start = head["tail"], head["time_ms"], Start(*head["start"])
        left = iter(pages)
        for name, cursor_id, cursor, passed, passed_bytes, count in head["subscriptions"]:
            self.subscriptions[name] = Subscription(
                name, self, cursor, Start(cursor_id, passed, passed_bytes),
                itertools.islice(left, count))

    def begin(self, subscribers: Sequence[str], first: int) -> None:
        """Without any marks: everything waits that the data, from `first` on, holds."""
        self.end, self.start = first, self.start_of(first >> SEGMENT_SHIFT)
        for name in subscribers:
            self.subscriptions[name] = Subscription(name, self, first, self.start)
            self.subscriptions[name].cursor_id = 0       # copies of what was put before wait, too

    def is_dead(self, number: int) -> bool:
        """Tell whether nobody needs a segment, ever again: none of it is held, and, which should
        say the same, each cursor has passed all that was put there."""
        puts = self.start_of(number + 1).puts
        return not self.live.get(number) and (puts == self.start_of(number).puts or all(
            s.passed >= puts for s in self.subscriptions.values()))

    @property
    def progress(self) -> List[int]:
        """How many bytes were put, and passed by each subscriber."""
        return [self.start.put_bytes, *(s.passed_bytes for s in self.subscriptions.values())]

    def leave(self, number: int) -> None:
        """Have no cursor in a segment that holds nothing; it is about to go."""
        self.live.pop(number, None)
        self.copies.pop(number, None)
        for s in self.subscriptions.values():
            if s.cursor >> SEGMENT_SHIFT == number:
                s.stand_at(self.log.after(number) or self.end, self.start_of(number + 1))

    def settle_in(self) -> None:
        """Make good, at the end of a recovery, what the files do not hold any more, and count."""
        ends = {number: segment.base | segment.end for number, segment in self.log.segments.items()}
        for subscription in self.subscriptions.values():
            gone = [id_ for id_, offset, _, size, _ in subscription.entries
                    if offset + size > ends.get(offset >> SEGMENT_SHIFT, 0)]
            for id_ in gone:                 # it was settled
                subscription.entries.pop(id_, id_)
            if subscription.cursor > self.end:
                subscription.stand_at(self.end, self.start)
            subscription.advance(subscription.early_id)      # out of segments that are gone, too
        self.recount()

    def place(self, subscribers: Sequence[str]) -> Tuple[List[str], List[str]]:
        """Have these subscribers, and no others; return who joined and who left. A new one starts
        from now on. Where a fifo queue becomes a broadcast queue, or the other way, each gets
        what anyone had not settled."""
        known = self.subscriptions
        new = [name for name in subscribers if name not in known]
        left = [name for name in known if name not in subscribers]
        place = Subscription(FIFO, self, self.end, self.start)
        if left and FIFO in [*left, *new]:
            place = self._union(list(known.values()))
        self.subscriptions = {name: known.get(name) or self._like(place, name)
                              for name in subscribers}
        if new or left:
            self.recount()
        return new, left

    def _like(self, other: Subscription, name: str) -> Subscription:
        return Subscription(name, self, other.cursor, Start(
            other.cursor_id, other.passed, other.passed_bytes), other.entries.freeze())

    def _union(self, subscriptions: Sequence[Subscription]) -> Subscription:
        """Return the place of one who needs what any of these needs, as early as any of them,
        and counts as few deliveries."""
        lowest = min(subscriptions, key=lambda s: s.cursor_id)
        union = self._like(lowest, FIFO)
        for id_, offset, _, size, _ in itertools.chain(*[s.entries for s in subscriptions]):
            if id_ >= union.cursor_id and id_ not in lowest.entries:
                message = self.log.glance(offset)
                if message and not message.delay_ms:     # it waits at the cursor
                    continue
            found = [s.entries[id_] for s in subscriptions if id_ in s.entries]
            if any(id_ >= s.cursor_id and id_ not in s.entries for s in subscriptions):
                found.append(Entry(id_, offset, 0, size, 0))     # it waits at another cursor
            union.entries.put(id_, offset, min(entry.due_ms for entry in found), size,
                              min(entry.deliveries for entry in found))
        return union

    def recover(self, marks: Sequence[Mark], start: int) -> None:
        """Apply what stands behind a snapshot: each mark at the tail of the data it was made at,
        wherever it happens to be read."""
        left, position = collections.deque(marks), start
        while True:
            messages, after = self.log.read(position, self.log.tail, LOG_CHUNK_BYTES)
            if after >> SEGMENT_SHIFT > position >> SEGMENT_SHIFT:
                before, self.start = self.start, self.start_of(after >> SEGMENT_SHIFT)
                self.see_id(before.next_id - 1)
            done = 0
            while left and (left[0].tail <= after or after == position):
                ready = done
                while ready < len(messages) and messages[ready].offset < left[0].tail:
                    ready += 1
                self.apply(messages[done:ready])
                done = ready
                self.apply_mark(left.popleft())
            self.apply(messages[done:])
            if after == position:
                break
            position = after
        self.end = min(max(self.end, position), self.log.tail)       # or readers wait for ever


# ---- Queue --------------------------------------------------------------------------------
# A lock, a log, its state, and what only memory knows: who holds a message, who waits for one.

MAX_SLEEP_MS = 1 << 31           # what a wait for a condition can bear
AT_ONCE = 1000                   # messages whose time has come that one hold of the lock sees
AT_ONCE_LEASES = 16              # a lease may have a thousand messages
KEY_BITS = 96                    # of a lease's key
TAR_BLOCK_BYTES, TAR_END_BYTES = 512, 1024
PIECE_BYTES = 256 * KIB          # of a stream: so much of it is in memory
OLDEST = "oldest_message_age_seconds"
EMPTY_BYTES = FIRST + START_BYTES            # of a segment without messages


class Deadlines:
    """Deadlines (ms), each with a key, in buckets. A bucket that has begun goes into a small heap,
    a bounded number of keys at a time; a deadline is stale, and is dropped then, if `deadline_of`
    its key is another one. So nothing is ever looked through as a whole."""

    def __init__(self, deadline_of: Callable[[int], Optional[int]]) -> None:
        self._deadline_of = deadline_of
        self._buckets: Dict[int, List[int]] = {}
        self._order: List[int] = []          # heap of the buckets' numbers
        self._soon: List[Tuple[int, int]] = []           # heap of (deadline, key)

    def add(self, deadline_ms: int, *keys: int) -> None:
        """Note the deadline of one key, or of several."""
        number = deadline_ms >> BUCKET_SHIFT
        bucket = self._buckets.get(number)
        if bucket is None:
            heapq.heappush(self._order, number)          # first: without it nobody finds the bucket
            bucket = self._buckets[number] = []
        bucket += keys

    def is_due(self, now_ms: int) -> bool:
        """Tell whether `pop_due` may find something; cheap."""
        return bool((self._order and self._order[0] << BUCKET_SHIFT <= now_ms)
                    or (self._soon and self._soon[0][0] <= now_ms))

    def next_ms(self) -> int:
        """Return when there may be something due; NEVER without any."""
        bucket_ms = self._order[0] << BUCKET_SHIFT if self._order else NEVER
        return min(bucket_ms, self._soon[0][0] if self._soon else NEVER)

    def pop_due(self, now_ms: int, limit: int) -> List[int]:
        """Take out and return keys whose deadline has come, looking at `limit` keys or so."""
        due: Dict[int, None] = {}            # a key may stand there twice
        while limit > 0 and self._order and self._order[0] << BUCKET_SHIFT <= now_ms:
            bucket = self._buckets[self._order[0]]
            while bucket and limit > 0:
                key, limit = bucket.pop(), limit - 1
                deadline_ms = self._deadline_of(key)
                if deadline_ms is not None and deadline_ms >> BUCKET_SHIFT == self._order[0]:
                    heapq.heappush(self._soon, (deadline_ms, key))
            if not bucket:
                del self._buckets[heapq.heappop(self._order)]
        while limit > 0 and self._soon and self._soon[0][0] <= now_ms:
            deadline_ms, key = heapq.heappop(self._soon)
            limit -= 1
            if self._deadline_of(key) == deadline_ms:
                due[key] = None
        return list(due)


class Clock:
    """Where time comes from; a test hands in its own."""

    def wall_ms(self) -> int:
        return int(time.time() * 1000)

    def monotonic_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000


class Space:
    """What a disk has left above the bytes that are kept free for takes and compactions.

    Looks at the disk only when what was appended since may have used it up, and when told to.
    """

    def __init__(self, path: str, min_free_bytes: int) -> None:
        self._path, self.min_free_bytes = path, min_free_bytes
        self.left = 0

    def free_bytes(self) -> int:
        try:
            status = os.statvfs(self._path)
        except OSError:                      # gone, or a server that does not answer: no room
            return 0
        return status.f_bavail * status.f_frsize

    def look(self) -> int:
        self.left = self.free_bytes() - self.min_free_bytes
        return self.left

    def use(self, size: int) -> None:
        """Count bytes that are about to be written. Raises ApiError 503 if there is no room."""
        if self.left < size and self.look() < size:
            raise ApiError(503, "The disk is too full for this put (min_free_bytes); nothing "
                                "was queued, try again later")
        self.left -= size


class Budget:
    """What may be held for clients at one time: bytes of bodies that arrive and of answers that
    leave, so that no client fills the memory. What is no larger than UNCOUNTED_BYTES does not
    count. Thread-safe.

    `reserve` is what a message of the largest size takes: it is kept from bodies, so that takes
    go on. Without that much room the budget is `tight`; once it no longer is, `on_room` is called.
    """

    def __init__(self, limit: int = NEVER, reserve: int = 0,
                 on_room: Callable[[], None] = lambda: None) -> None:
        self.held, self.tight = 0, False
        self._limit, self._on_room = limit - reserve, on_room
        self._lock = threading.Lock()

    def has_room(self, size: int) -> bool:
        """Tell whether `size` bytes of a body fit."""
        return self.held + size <= self._limit

    def hold(self, size: int) -> None:
        """Count bytes as held; a negative size lets go of them."""
        with self._lock:
            self.held += size
            was_tight, self.tight = self.tight, self.held > self._limit
        if was_tight and not self.tight:
            self._on_room()


class Put(NamedTuple):
    """Messages that come in one request. `done` is called once, without a lock: with the first
    one's id when they are as durable as `fsync` asks for, or with what refused them."""

    payloads: Sequence[bytes]
    delay_s: int = 0
    done: Callable[[Union[int, Exception]], None] = lambda _: None


class Wish(NamedTuple):
    """What a consumer asks for. Without a lease, the server settles what left."""

    lines: int = 0                           # up to so many messages, one a line; 0: one message
    max_bytes: int = MAX_MESSAGE_BYTES       # of all lines
    lease_s: int = 0
    peek: bool = False                       # to see them only


ONE = Wish()


class Delivery(NamedTuple):
    """Messages that go to one consumer; `lease` is the key to settle them by, if any."""

    subscriber: str
    messages: Sequence[Message]
    counts: Sequence[int]                    # how often each was delivered, with this time
    ids: Sequence[int] = ()                  # that it holds; none if they were only looked at
    lease: Optional[int] = None
    as_lines: bool = False
    held: int = 0                            # of the budget: its bytes, or 0 if they are few


class Lease(NamedTuple):
    """Messages in a consumer's hands until a deadline, in the queue's time."""

    ids: Sequence[int]
    deadline_ms: int


_waiter_keys = itertools.count()


@dataclasses.dataclass(eq=False)
class Waiter:
    """A consumer that waits. `answer` gets a delivery, or None when it waited in vain; it is
    called once, without a lock. `is_gone` tells at once whether the consumer hung up."""

    wish: Wish
    wait_s: int
    answer: Callable[[Optional[Delivery]], None]
    is_gone: Callable[[], bool] = lambda: False
    deadline_ms: int = 0                     # in the queue's time
    key: int = dataclasses.field(default_factory=_waiter_keys.__next__)


def no_room(*, close: bool = False) -> ApiError:
    return ApiError(503, "Too much is under way (max_inflight_bytes); try again later",
                    close=close)


class Stream:
    """A backup under way: a tar of `size` bytes, in pieces, which are read elsewhere than where
    they are sent. `close` it if it is not read to its end.

    `files` are held segments, each up to where it ended; each is released once it was read.
    """

    def __init__(self, queue: Queue, frozen: Frozen, files: Dict[Segment, int]) -> None:
        self._queue, self._log, self._files, self.size = queue, queue.log, files, 0
        self._parts = self._tar(frozen)
        next(self._parts)                    # so that a close, too, releases them

    def __len__(self) -> int:
        return self.size

    def read(self) -> bytes:
        """Return the next piece, PIECE_BYTES at most, b"" at the end. Blocks for the disk."""
        piece = bytearray()
        for part in self._parts:
            piece += part
            if len(piece) > PIECE_BYTES // 2:        # no part is larger than this
                break
        return bytes(piece)

    def close(self) -> None:
        self._parts.close()

    def _tar(self, frozen: Frozen) -> Generator[bytes, None, None]:
        try:
            log_id = self._log.codec.log_id
            marks_bytes = frozen.size()
            self.size = TAR_END_BYTES + sum(TAR_BLOCK_BYTES + size + -size % TAR_BLOCK_BYTES
                                            for size in (marks_bytes, *self._files.values()))
            yield b""
            yield from self._member(META_NAME, marks_bytes, frozen.lines(Marks(log_id)))
            del frozen                       # its pages are copies by and by
            for segment, end in list(self._files.items()):
                yield from self._member(segment.name, end, self._content(segment, end))
                del self._files[segment]
                self._log.release(segment)
            yield bytes(TAR_END_BYTES)
        finally:
            for segment in self._files:
                self._log.release(segment)

    def _member(self, name: str, size: int, content: Iterable[bytes]) -> Iterator[bytes]:
        import tarfile                       # only here: it costs a MiB of memory
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = size, int(time.time()), 0o600
        yield info.tobuf(tarfile.USTAR_FORMAT)
        yield from content
        yield bytes(-size % TAR_BLOCK_BYTES)

    def _content(self, segment: Segment, end: int) -> Iterator[bytes]:
        for at in range(0, end, PIECE_BYTES // 2):
            # What was freed or emptied since it began is there for this alone.
            if self._queue.space.left < 0 and any(s.is_gone or s.end < self._files[s]
                                                  for s in self._files):
                raise CompactionFailed("the disk is nearly full (min_free_bytes)")
            size = min(PIECE_BYTES // 2, end - at)
            data = self._log.read_raw(segment, size, at)
            if len(data) < size:
                raise CompactionFailed(f"{segment.name} is shorter than it was")
            yield data
        if segment.is_unreadable:
            event(logging.ERROR, "backup_lacks_unreadable", queue=self._queue.config.name,
                  file=segment.name)


class Consumers:
    """Who holds or awaits the messages of one subscription: all that only memory knows of it.
    The queue's lock guards it.

    A message that the subscription holds is leased if its id is in `out`; else delayed, if its
    entry has a due time; else ready. What is ready is at or behind the cursor, or in `ready`.
    """

    def __init__(self, subscription: Subscription, *, expires: bool) -> None:
        self.subscription = subscription
        self.dead_lettered_total = 0
        self._look_at_ms = 0 if expires else NEVER
        self.expiry_ms = self._look_at_ms    # when something ready may be older than `ttl`
        self.waiters: collections.OrderedDict[int, Waiter] = collections.OrderedDict()
        self.waiter_deadlines = Deadlines(
            lambda key: self.waiters[key].deadline_ms if key in self.waiters else None)
        self.forget()

    def forget(self) -> None:
        """Nothing is out, and nothing is an entry."""
        self.out: Set[int] = set()           # in someone's hands: leased, on its way, or dying
        self.dying: Dict[int, None] = {}     # ids that are to be dead-lettered, in order
        self.leases: Dict[int, Lease] = {}
        self.lease_deadlines = Deadlines(
            lambda key: self.leases[key].deadline_ms if key in self.leases else None)
        self.ready: List[int] = []           # heap of ids; what went bad may still stand there
        self.delayed = Deadlines(lambda id_: self.entries.due(id_) or None)

    @property
    def entries(self) -> Entries:
        return self.subscription.entries

    def begin(self, most: int) -> List[int]:
        """Note all entries after a start. Return those that were delivered `most` times, which
        are out."""
        spent = [entry[0] for entry in self.entries if entry[4] >= most]
        self.out.update(spent)
        for id_ in spent:
            self.entries.put(*self.entries[id_]._replace(due_ms=0))
        for due_ms, entries in itertools.groupby(self.entries, lambda entry: entry[2]):
            self.note([entry[0] for entry in entries if entry[0] not in self.out], due_ms)
        return spent

    def note(self, ids: Iterable[int], due_ms: int) -> None:
        """Note of entries that are not out that they are ready, or when they will be."""
        if due_ms:
            self.delayed.add(due_ms, *ids)
        else:
            self.expiry_ms = self._look_at_ms
            for id_ in ids:
                heapq.heappush(self.ready, id_)

    def take_out(self, run: Sequence[Message]) -> List[int]:
        """Have the first ready message, or a run at the cursor, in someone's hands. Return how
        often each was delivered, with this time."""
        first_id = run[0].id
        if first_id in self.entries:
            heapq.heappop(self.ready)
            counts = [self.entries[first_id][4] + 1]
        else:
            self.subscription.take_in(*run)
            counts = [1] * len(run)
        self.out.update([message.id for message in run])
        return counts

    def take_back(self, ids: Iterable[int], due_ms: int) -> None:
        """What was out is ready, or delayed, again."""
        self.out.difference_update(ids)
        self.note(ids, due_ms)

    def end_delays(self, now_ms: int) -> None:
        """What was delayed until now is ready; as much as one hold of the lock may."""
        due = self.delayed.pop_due(now_ms, AT_ONCE)
        for id_ in due:
            self.entries.put(*self.entries[id_]._replace(due_ms=0))
        self.note(due, 0)

    def first_ready(self) -> Optional[int]:
        """Return the lowest id of an entry that is ready."""
        while self.ready and self.ready[0] not in self.entries:
            heapq.heappop(self.ready)
        return self.ready[0] if self.ready else None

    @property
    def ready_count(self) -> int:
        return self.subscription.held_count - len(self.out) - self.entries.delayed

    def is_late(self, now_ms: int) -> bool:
        """Tell whether more has to expire, or to be read, before it is known what is ready."""
        id_, subscription = self.first_ready(), self.subscription
        return now_ms >= self.expiry_ms or (
            subscription.is_behind and (id_ is None or id_ >= subscription.cursor_id))

    def next_ms(self) -> int:
        """Return when time brings something next."""
        return min(self.lease_deadlines.next_ms(), self.waiter_deadlines.next_ms(),
                   self.delayed.next_ms(), self.expiry_ms)

    def add_lease(self, key: int, lease: Lease) -> None:
        self.lease_deadlines.add(lease.deadline_ms, key)     # first: none is without an end
        self.leases[key] = lease

    def add_waiter(self, waiter: Waiter, deadline_ms: int) -> None:
        self.waiter_deadlines.add(deadline_ms, waiter.key)
        self.waiters[waiter.key] = waiter
        waiter.deadline_ms = deadline_ms


def is_line(payload: bytes) -> bool:
    """Tell whether a message can travel as a line: its only line break, if any, ends it."""
    return b"\r" not in payload and payload.find(b"\n", 0, -1) < 0 and payload != b"\n"


def lines_in(messages: Sequence[Message], room: int) -> int:
    """Return how many messages, from the first on, can travel as lines within so many bytes."""
    payloads = [message.payload for message in messages]
    joined = b"".join(payloads)
    if len(joined) + len(payloads) <= room and b"\n" not in joined and b"\r" not in joined:
        return len(payloads)                 # nearly always, and quickly told
    for count, payload in enumerate(payloads):
        room -= len(payload) + 1
        if room < 0 or not is_line(payload):
            return count
    return len(payloads)


def turn(method: F) -> F:
    """Have a method of a queue end with a look at those who wait: what became ready is theirs.

    What it raises, unless it is a refusal, which comes before anything is changed, has left
    memory and disk at odds: the log fails, for only a start helps.
    """
    @functools.wraps(method)
    def wrapped(self: Queue, *arguments: Any, **options: Any) -> Any:
        try:
            try:
                result = method(self, *arguments, **options)
            except (ApiError, DiskFull):
                self.end_turn()
                raise
            self.end_turn()
            return result
        except (ApiError, DiskFull, LogFailed):
            raise
        except BaseException as error:
            self.log.give_up(error)
    return cast(F, wrapped)


class Queue:
    """One durable queue.

    `lock` guards the state, the consumers, the log's tail and the counters. All methods may be
    called by any thread, but for those that yield `Steps`: only one thread does those.
    1. A message is in `Consumers.out` while it is in a lease, in a delivery that the server
       settles, or dying. None of these outlives the process.
    2. Nobody waits for what is ready: whoever makes something ready is a `turn`, and notes in
       `_touched` for whom.
    3. What is staged for the end of the round changes nothing until `flush` writes and applies
       it: a message that was settled is out until then.
    """

    def __init__(self, config: QueueConfig, folder: str, *, fsync: str = "always",
                 subscribers: Sequence[str] = (FIFO,), clock: Optional[Clock] = None,
                 storage: Optional[Storage] = None, space: Optional[Space] = None,
                 budget: Optional[Budget] = None, staging: Optional[Set[Queue]] = None,
                 lead: Callable[[Log], None] = Log.lead,
                 on_failure: Callable[[LogFailed], None] = lambda _: None,
                 wake_at: Callable[[int], None] = lambda _: None,
                 call_upkeep: Callable[[], None] = lambda: None) -> None:
        self.config, self.subscribers = config, subscribers
        self._wake_at = wake_at              # is told when (monotonic ms) to call `tick`
        self._call_upkeep = call_upkeep      # is told when the next segment is to be made ready
        self._lead = lead                    # has a log's `lead` called
        self._staging = staging              # queues to flush; None: each call writes at once
        self.space, self._budget = space or Space(folder, 0), budget or Budget()
        self.lock = threading.Lock()
        self.log = Log(folder, fsync, storage, on_failure)
        self.state = State(self.log)
        self.in_total = self.out_total = self.redelivered_total = self.compactions_total = 0
        self.expired_total = 0
        self.content_type = b"Content-Type: %b\r\n" % config.content_type.encode()
        self._clock = clock or Clock()
        self._epoch_ms = 0                   # the queue's time when the monotonic clock was 0
        self.owed = 0                        # marks that a full disk kept out of the log
        self._closed = False
        self._limited = config.max_messages is not None or config.max_bytes is not None
        self._consumers: Dict[str, Consumers] = {}
        self._awaited: Set[str] = set()      # subscribers with waiters
        self._touched: Set[str] = set()      # those for whom something may have become ready
        self._answers: Deque[Tuple[Waiter, Optional[Delivery]]] = collections.deque()
        self._puts: List[Put] = []           # staged; see flush
        self._staged_bytes = self._staged_count = 0
        self._settled: Dict[str, List[int]] = {}         # staged ids by subscriber
        self._ttl_ms = config.ttl * 1000 if config.ttl else NEVER
        self._most = config.max_deliveries or NEVER
        self._covered, self._snapshot_tail = [0], 0      # progress and tail of the last snapshot
        self._is_unready = False             # no next segment could be made

    # -- life

    def recover(self) -> None:
        """Load the log that `log.lock()` locked, and come to the state that it tells."""
        log, state = self.log, self.state
        is_new = log.load()
        head, pages, marks = log.read_marks()
        first = next((s.base for s in log.segments.values() if s.start), 0) | FIRST
        start = head["tail"] if head else first
        if head:
            state.restore(head, pages)
        else:
            state.begin(self.subscribers, first)
        state.recover(marks, start)
        clean = head and head["clean"] and not marks and log.tail == head["tail"]
        state.settle_in()
        self._epoch_ms = max(self._clock.wall_ms(), state.time_ms) - self._clock.monotonic_ms()
        scanned = state.start.put_bytes - (head["start"][2] if head else 0)
        if not (clean or is_new):            # ids of records that are lost may have been seen
            state.see_id(state.next_id + ID_GAP - 1)
            log.rewrite(start)
            self._with_space(lambda: log.begin_anew(state.start))
        self._meet_subscribers()
        # From here on a crash is no clean stop; nothing is served, no id given, before.
        self._with_space(self._snapshot_or_full)
        log.remove_unused()
        with self.lock:
            self._consumers = {name: Consumers(subscription, expires=bool(self.config.ttl))
                               for name, subscription in state.subscriptions.items()}
            for consumers in self._consumers.values():   # the limit may be a new one
                self._expel_locked(consumers, consumers.begin(self._most))
        if not (head or is_new) and state.held_count:
            event(logging.WARNING, "no_marks", queue=self.config.name, advice="meta.json is "
                  "missing or unusable: all that the data files still hold comes again")
        event(logging.INFO, "recovered", queue=self.config.name, messages=state.held_count,
              scanned_bytes=scanned)

    def _with_space(self, work: Callable[[], None]) -> None:
        """Do what a start has to; on a full disk once more, when all that is dead is gone."""
        with contextlib.suppress(DiskFull):
            return work()
        exhaust(self._free_dead_segments())
        try:
            work()
        except DiskFull:
            needed = self.state.freeze().size() + MIB
            raise StorageError(f"{self.log.folder}: the disk is full; free about {needed} bytes, "
                               "then start again") from None

    def _snapshot_or_full(self) -> None:
        if not exhaust(self.snapshot()):
            raise DiskFull

    def _meet_subscribers(self) -> None:
        """Place the subscribers that are new, let go of those that left: part of the start's
        snapshot, all or nothing."""
        joined, left = self.state.place(self.subscribers)
        if left and FIFO in joined + left:
            event(logging.WARNING, "kind_switched", queue=self.config.name, to=self.config.kind,
                  messages=self.state.held_count)
        for what, names in (("joined", joined), ("left", left)):
            for name in filter(None, names):
                event(logging.INFO, f"subscriber_{what}", queue=self.config.name, subscriber=name)

    def close(self) -> bool:
        """Write a snapshot that marks a clean stop, and let go of the folder. Return whether all
        that memory knows is on disk; if not, the next start repeats some messages."""
        with self.lock:
            self._write_settled_locked()
            self._closed = True
            self.log.give_back(self.log.current)
        done = exhaust(self.snapshot(clean=True)) or not self.owed
        self.log.close()
        return done

    def now_ms(self) -> int:
        """The queue's time: the wall clock at start, advanced by the monotonic clock."""
        return self._epoch_ms + self._clock.monotonic_ms()

    # -- rounds

    @turn
    def flush(self) -> None:
        """End a round: write what was put with one write, what was settled with one mark a run
        of ids. Does not wait for a disk."""
        with self.lock:
            if self._staging is not None:
                self._staging.discard(self)
            self._write_settled_locked()
            puts, self._puts, self._staged_bytes, self._staged_count = self._puts, [], 0, 0
            try:
                self._check_open()
                results: Sequence[Union[int, Exception]] = self._append_locked(puts)
                number = self.log.appends
            except (ApiError, DiskFull) as error:
                results, number = [error] * len(puts), 0

        def tell() -> None:
            for put, result in zip(puts, results):
                put.done(result)
        if puts:
            self.when_durable(number, tell)

    def when_durable(self, number: int, call: Callable[[], None], *, marks: bool = False) -> None:
        """Have `call` made as `Log.when_durable` says. Does not block."""
        if self.log.when_durable(number, call, marks=marks):
            self._lead(self.log)

    def _write_settled_locked(self) -> None:
        for subscriber, ids in list(self._settled.items()):
            self._settle_runs_locked(subscriber, ids)
            self.out_total += len(ids)
            del self._settled[subscriber]

    def _settle_runs_locked(self, subscriber: str, ids: Collection[int]) -> None:
        tail, out = self.log.tail, self._consumers[subscriber].out
        self._mark_locked([Mark(SETTLED, subscriber, first, last, tail)
                           for first, last in _runs(ids)], lambda: out.difference_update(ids))

    def _mark_locked(self, marks: Sequence[Mark], then: Callable[[], None]) -> None:
        """Write and apply what must not be refused, and what memory has to know with it. On a
        full disk memory alone knows all of it, until a snapshot writes it down."""
        def apply() -> None:
            for mark in marks:
                self.state.apply_mark(mark)
            then()
        if marks and not self.log.mark(marks, apply):
            self.owed += 1                   # upkeep sees to it within a second

    # -- putting

    def check_room(self, payload_bytes: int = 0) -> None:
        """Raise what a put would be refused with, to be asked before its body is read."""
        with self.lock:
            self._check_room_locked(payload_bytes, 1)

    def _check_room_locked(self, payload_bytes: int, count: int) -> None:
        self._check_open()
        if self._limited:
            self._check_limits_locked(payload_bytes, count)
        self.space.use(payload_bytes + count * HEAD.size)

    def _check_limits_locked(self, payload_bytes: int, count: int) -> None:
        self._write_settled_locked()
        held_count, held_bytes = self.state.held_count, self.state.held_bytes
        held_bytes -= held_count * HEAD.size
        held_count += self._staged_count
        held_bytes += self._staged_bytes
        limits = (("max_messages", self.config.max_messages, held_count, count),
                  ("max_bytes", self.config.max_bytes, held_bytes, payload_bytes))
        for name, limit, _, more in limits:
            if limit is not None and more > limit:
                raise ApiError(413, f"This could never fit {name} of the queue ({limit})")
        for name, limit, held, more in limits:
            if limit is not None and held + more > limit:
                raise ApiError(429, f"The queue is full ({name} {limit}); try again later")

    def stage(self, put: Put) -> None:
        """Have messages appended by the next `flush`, all or none; only a crash may leave the
        first part. Raises ApiError 413, 429 or 503 with nothing queued."""
        assert self._staging is not None
        size = sum(map(len, put.payloads))
        if put.delay_s and len(put.payloads) * len(self.subscribers) > DELAYED_LINES:
            raise ApiError(413, f"More than {DELAYED_LINES // len(self.subscribers)} lines with a "
                                "delay; send them in parts")
        if self._staged_bytes >= ROUND_BYTES or self._staged_count >= ROUND_MESSAGES:
            self.flush()
        with self.lock:
            count = len(put.payloads)
            self._check_room_locked(size, count)
            self._staging.add(self)
            self._staged_bytes += size
            self._staged_count += count
            self._puts.append(put)           # last: what raises is not told again

    @turn
    def put(self, payloads: Sequence[bytes], delay_s: int = 0, *, limited: bool = True) -> int:
        """Append messages at once and return the first one's id; durable on return. As `stage`;
        raises DiskFull, and LogFailed when it is not known what is queued."""
        with self.lock:
            if limited:
                self._check_room_locked(sum(map(len, payloads)), len(payloads))
            first, = self._append_locked([Put(payloads, delay_s)])
            number = self.log.appends
        self.log.wait_durable(number)
        return first

    def _append_locked(self, puts: Sequence[Put]) -> List[int]:
        """Append what was put with one write, and apply it; return the first id of each."""
        if not puts:
            return []
        self._rotate_locked()
        firsts: List[int] = []
        items: List[Unplaced] = []
        next_id, now_ms = self.state.next_id, self.now_ms()
        for payloads, delay_s, _ in puts:
            firsts.append(next_id)
            delay_ms = delay_s * 1000
            items += [(id_, now_ms, delay_ms, payload)
                      for id_, payload in enumerate(payloads, next_id)]
            next_id += len(payloads)

        def apply(messages: Sequence[Message]) -> None:
            self.state.apply(messages)
            for first, (payloads, delay_s, _) in zip(firsts, puts):
                if delay_s:
                    self._delay_locked(range(first, first + len(payloads)),
                                       now_ms + delay_s * 1000)
            self.in_total += len(messages)
            self._touched.update(self._awaited)

        try:
            self.log.append(items, apply)
        except DiskFull:                     # the file alone may be: of its largest size (EFBIG)
            self.log.rotate(self.state.start)
            self.log.append(items, apply)
        return firsts

    def _delay_locked(self, ids: Iterable[int], due_ms: int) -> None:
        for consumers in self._consumers.values():
            consumers.delayed.add(due_ms, *ids)
        self._wake_locked(due_ms)

    def _rotate_locked(self) -> None:
        """Go on in the next segment if this one is full, or have it made ready."""
        end = self.log.current.end
        if self.log.ready is None:
            if end >= READY_BYTES and not self._is_unready:      # sooner than in a second
                self._call_upkeep()
        elif end >= SEGMENT_BYTES and end >= self._segment_bytes():
            with contextlib.suppress(DiskFull):
                self.log.rotate(self.state.start)

    def _segment_bytes(self) -> int:
        return min(SEGMENT_MOST_BYTES, max(SEGMENT_BYTES, self.state.held_bytes // 32))

    # -- taking

    @turn
    def take(self, subscriber: Optional[str] = FIFO, wish: Wish = ONE,
             waiter: Optional[Waiter] = None) -> Optional[Delivery]:
        """Take the oldest ready messages; without any return None, and `waiter` waits: then it
        has a deadline. It does so too, if only for that, while more has to expire, or to be
        read, than one hold of the lock may. Without a subscriber, be the one furthest behind.

        Does not wait for a disk. What is leased comes back at its deadline; the rest is to be
        settled or retried by the caller. Raises ApiError 503 for want of memory.
        """
        while True:
            with self.lock:
                self._check_open()
                now_ms, consumers = self.now_ms(), self._consumers_of_locked(subscriber)
                self._tick_locked(consumers, now_ms)
                if self._touched:            # who waits came first
                    self._match_locked()
                delivery = self._take_locked(consumers, wish, now_ms)
                if delivery:
                    return delivery
                is_late = consumers.is_late(now_ms)
                if waiter and (waiter.wait_s or is_late):
                    self._wait_locked(consumers, waiter, now_ms)
                    return None
                if not is_late and self._next_bytes_locked(consumers):
                    raise no_room()
                if not is_late:
                    return None

    def _consumers_of_locked(self, subscriber: Optional[str]) -> Consumers:
        if subscriber is None:
            return min(self._consumers.values(), key=lambda c: c.subscription.cursor)
        return self._consumers[subscriber]

    def _check_open(self) -> None:
        if self._closed:
            raise ApiError(503, "The server is stopping; try again")

    def _look_locked(self, consumers: Consumers, most: int = 1) -> List[Message]:
        """Return the lowest ready message, and up to `most` with those that come with it for
        next to nothing. One whose bytes went bad is set aside and gone. Raises ApiError 503."""
        subscription = consumers.subscription
        while True:
            id_, place = consumers.first_ready(), None
            if id_ is None or id_ >= subscription.cursor_id:
                place = subscription.at_cursor(MIB)
            if place and (id_ is None or place.id < id_):
                return [place] if most == 1 else subscription.run_at_cursor(
                    place, most, id_ or NEVER)
            if id_ is None or (id_ >= subscription.cursor_id and subscription.is_behind):
                return []
            message = self._message_locked(consumers, id_)
            if message:
                return [message]

    def _next_bytes_locked(self, consumers: Consumers) -> int:
        """Return the size of the lowest ready message's record, 0 without one. Reads no entry: a
        large one that many ask for would keep everybody waiting."""
        id_ = consumers.first_ready()
        if id_ is not None and id_ < consumers.subscription.cursor_id:
            return consumers.entries[id_].size
        return sum([message.size for message in self._look_locked(consumers)])

    def _message_locked(self, consumers: Consumers, id_: int) -> Optional[Message]:
        """Return the message of an entry; if its bytes went bad it is gone, and None. Raises
        ApiError 503."""
        _, offset, _, size, _ = consumers.entries[id_]
        try:
            message = self.log.message_at(offset, size)
        except MemoryError:
            raise no_memory() from None
        if message and message.id == id_:
            return message
        consumers.subscription.drop(id_, id_)
        consumers.out.discard(id_)
        consumers.dying.pop(id_, None)
        return None

    def _take_locked(self, consumers: Consumers, wish: Wish, now_ms: int) -> Optional[Delivery]:
        """Take what makes one delivery; None if nothing is ready, or no room for it now."""
        if now_ms >= consumers.expiry_ms:
            return None
        if self._budget.tight:               # only what does not count
            if self._next_bytes_locked(consumers) > UNCOUNTED_BYTES + HEAD.size:
                return None
            wish = wish._replace(max_bytes=UNCOUNTED_BYTES)
        messages, counts = self._choose_locked(consumers, wish)
        if not messages:
            return None
        as_lines = wish.lines > 0 and is_line(messages[0].payload)
        size = sum([len(message.payload) for message in messages])
        held = size if size > UNCOUNTED_BYTES else 0
        if held:
            self._budget.hold(held)
        ids = [message.id for message in messages]
        if wish.peek:                        # back before anyone sees that it was out
            consumers.take_back(ids, 0)
            ids, counts = [], [count - 1 for count in counts]
        key = secrets.randbits(KEY_BITS) if wish.lease_s else None
        if key is not None:
            self._lease_locked(consumers, key, ids, wish.lease_s)
        return Delivery(consumers.subscription.name, messages, counts, ids, key, as_lines, held)

    def _choose_locked(self, consumers: Consumers, wish: Wish) -> Tuple[List[Message], List[int]]:
        """Take what makes one delivery: what is no line comes alone. Return it, and how often
        each was delivered, with this time."""
        messages: List[Message] = []
        counts: List[int] = []
        most, room = max(1, wish.lines), wish.max_bytes
        while len(messages) < most:
            try:
                run = self._look_locked(consumers, most - len(messages))
            except ApiError:                 # no memory for more
                if messages:
                    break
                raise
            lines = lines_in(run, room) if wish.lines else 0
            if not (lines or (run and not messages)):
                break
            del run[max(1, lines):]
            messages += run
            counts += consumers.take_out(run)
            if not lines:
                break
            room -= sum([len(message.payload) + 1 for message in run])
        return messages, counts

    def _lease_locked(self, consumers: Consumers, key: int, ids: Sequence[int],
                      seconds: int) -> None:
        deadline_ms = self.now_ms() + seconds * 1000
        self._wake_locked(deadline_ms)
        consumers.add_lease(key, Lease(ids, deadline_ms))

    # -- waiting

    def _wait_locked(self, consumers: Consumers, waiter: Waiter, now_ms: int) -> None:
        deadline_ms = now_ms + waiter.wait_s * 1000
        self._awaited.add(consumers.subscription.name)
        self._touched.add(consumers.subscription.name)   # what is ready may only lack room
        self._wake_locked(deadline_ms)
        consumers.add_waiter(waiter, deadline_ms)

    def end_turn(self) -> None:
        """Match what became ready with those who wait, and tell them. See `turn`."""
        if self._touched:
            with self.lock:
                self._match_locked()
        while self._answers:
            try:
                waiter, delivery = self._answers.popleft()
            except IndexError:               # another thread told it
                return
            waiter.answer(delivery)

    def _match_locked(self) -> None:
        """Give what is ready to those who wait, first come, first served (invariant 2)."""
        now_ms = self.now_ms()
        for name in list(self._touched):
            consumers = self._consumers[name]
            try:
                is_done = self._serve_waiters_locked(consumers, now_ms)
            except ApiError:                 # no memory to read it
                self._wake_locked(now_ms + POLL_S * 1000)
                continue
            if is_done:
                self._touched.discard(name)
            if not consumers.waiters:
                self._awaited.discard(name)

    def _serve_waiters_locked(self, consumers: Consumers, now_ms: int) -> bool:
        """Return whether all that is ready found its taker, or every waiter something."""
        waiters = consumers.waiters
        if now_ms >= consumers.expiry_ms:
            self._expire_locked(consumers, now_ms)
        while waiters and now_ms < consumers.expiry_ms and self._next_bytes_locked(consumers):
            waiter = next(iter(waiters.values()))
            is_gone = waiter.is_gone()
            delivery = None if is_gone else self._take_locked(consumers, waiter.wish, now_ms)
            if not (is_gone or delivery):    # the budget has `tick` called once there is room
                return False
            self._answers.append((waiter, delivery))
            del waiters[waiter.key]
        goes_on = bool(waiters) and consumers.is_late(now_ms)
        if goes_on:                          # in the next hold
            self._wake_locked(now_ms)
        return not goes_on

    @turn
    def stop_waiting(self, waiter: Waiter) -> None:
        """Answer a waiter with None now, unless it is answered already."""
        with self.lock:
            for consumers in self._consumers.values():
                if consumers.waiters.pop(waiter.key, None):
                    self._answers.append((waiter, None))

    @turn
    def dismiss(self) -> None:
        """Answer all who wait with None."""
        with self.lock:
            for name in list(self._awaited):
                waiters = self._consumers[name].waiters
                self._answers += [(waiter, None) for waiter in waiters.values()]
                waiters.clear()

    def _dismiss_locked(self, consumers: Consumers, now_ms: int) -> None:
        for key in consumers.waiter_deadlines.pop_due(now_ms, AT_ONCE):
            self._answers.append((consumers.waiters.pop(key), None))

    # -- what was taken

    @turn
    def settle(self, delivery: Delivery) -> None:
        """A delivery has left: what is not leased is gone. Not durable on return."""
        if delivery.held:
            self._budget.hold(-delivery.held)
        if delivery.lease is None and delivery.ids:
            with self.lock:
                self._settle_locked(delivery.subscriber, delivery.ids)

    @turn
    def retry(self, delivery: Delivery) -> None:
        """A delivery could not leave: its messages are back at their old place."""
        if delivery.held:
            self._budget.hold(-delivery.held)
        with self.lock:
            leases = self._consumers[delivery.subscriber].leases
            if delivery.lease is None or delivery.lease in leases:
                self._retry_locked(delivery.subscriber, delivery.ids)
                leases.pop(delivery.lease or 0, None)

    @turn
    def ack(self, subscriber: str, key: int) -> None:
        """End a lease: its messages are gone. Not durable on return. Raises ApiError 410."""
        with self.lock:
            self._settle_locked(subscriber, self._leased_locked(subscriber, key))
            del self._consumers[subscriber].leases[key]

    @turn
    def nack(self, subscriber: str, key: int, delay_s: int = 0) -> None:
        """End a lease: its messages come back, at once or after a delay. Raises ApiError 410."""
        with self.lock:
            self._retry_locked(subscriber, self._leased_locked(subscriber, key), delay_s)
            del self._consumers[subscriber].leases[key]

    @turn
    def extend(self, subscriber: str, key: int, seconds: int) -> None:
        """Have a lease end in `seconds` from now. Raises ApiError 410."""
        with self.lock:
            self._lease_locked(self._consumers[subscriber], key,
                               self._leased_locked(subscriber, key), seconds)

    def _leased_locked(self, subscriber: str, key: int) -> Sequence[int]:
        """Return the ids of a lease. Who ends it deletes it last: nothing is out without one."""
        self._check_open()
        lease = self._consumers[subscriber].leases.get(key)
        if lease is None or lease.deadline_ms <= self.now_ms():
            raise ApiError(410, "No such lease: it expired, is settled, is another queue's or "
                                "token's, or from before a restart; take the message again")
        return lease.ids

    def _settle_locked(self, subscriber: str, ids: Iterable[int]) -> None:
        ids = self._out_locked(subscriber, ids)
        if self._staging is not None:
            self._staging.add(self)
        self._settled.setdefault(subscriber, []).extend(ids)
        if self._staging is None:
            self._write_settled_locked()

    def _retry_locked(self, subscriber: str, ids: Iterable[int], delay_s: int = 0) -> None:
        now_ms, consumers = self.now_ms(), self._consumers[subscriber]
        due_ms, most = now_ms + delay_s * 1000 if delay_s else 0, self._most
        ids, tail = self._out_locked(subscriber, ids), self.log.tail
        counts = {id_: consumers.entries[id_][4] + 1 for id_ in ids}
        back = [id_ for id_ in ids if counts[id_] < most]
        self._mark_locked([Mark(RETRY, subscriber, first, last, tail, count,
                                due_ms if count < most else 0)
                           for count in set(counts.values())
                           for first, last in _runs([i for i in ids if counts[i] == count])],
                          lambda: consumers.take_back(back, due_ms))
        self._expel_locked(consumers, [id_ for id_ in ids if counts[id_] >= most])
        self.redelivered_total += len(back)
        self._touched.add(subscriber)
        if due_ms:
            self._wake_locked(due_ms)

    def _out_locked(self, subscriber: str, ids: Iterable[int]) -> List[int]:
        """What of a delivery is still out: a late word on what is gone does nothing."""
        out = self._consumers[subscriber].out
        return [] if self._closed else [id_ for id_ in ids if id_ in out]

    @turn
    def purge(self) -> int:
        """Drop every message and end all leases; return their number. Not durable on return;
        `when_durable` with `marks` tells, unless marks are owed."""
        self.flush()                         # what was put before is dropped as well
        with self.lock:
            self._check_open()
            state, count = self.state, self.state.held_count
            self._mark_locked([Mark(POSITION, name, state.next_id, state.next_id, self.log.tail)
                               for name in self._consumers], self._forget_locked)
            return count

    def _forget_locked(self) -> None:
        self.state.recount()
        for consumers in self._consumers.values():
            consumers.forget()
        self._settled.clear()

    # -- time, expiry and dead letters

    @turn
    def tick(self) -> int:
        """Do what time brings: ends of leases, delays, waits and lives. Return when (monotonic
        ms) there is more to do. Does not wait for a disk."""
        with self.lock:
            if self._closed:
                return NEVER
            now_ms, next_ms = self.now_ms(), NEVER
            for consumers in self._consumers.values():
                self._tick_locked(consumers, now_ms)
            self._match_locked()
            for name, consumers in self._consumers.items():
                if name not in self._touched or not consumers.is_late(now_ms):
                    self._dismiss_locked(consumers, now_ms)
                    next_ms = min(next_ms, consumers.next_ms())      # else a wake is asked for
            return next_ms - self._epoch_ms

    def _tick_locked(self, consumers: Consumers, now_ms: int) -> None:
        """Take back what leases had out too long, make ready what was delayed, expel what is too
        old: as much as one hold of the lock may."""
        if consumers.lease_deadlines.is_due(now_ms):
            self._end_leases_locked(consumers, now_ms)
        if consumers.delayed.is_due(now_ms):
            consumers.end_delays(now_ms)
            self._touched.add(consumers.subscription.name)
        if now_ms >= consumers.expiry_ms:
            self._expire_locked(consumers, now_ms)

    def _end_leases_locked(self, consumers: Consumers, now_ms: int) -> None:
        over: List[int] = []
        for _ in range(0, AT_ONCE, AT_ONCE_LEASES):
            if len(over) >= AT_ONCE or not consumers.lease_deadlines.is_due(now_ms):
                break
            for key in consumers.lease_deadlines.pop_due(now_ms, AT_ONCE_LEASES):
                over += consumers.leases.pop(key).ids
        self._retry_locked(consumers.subscription.name, over)

    def _wake_locked(self, deadline_ms: int) -> None:
        self._wake_at(deadline_ms - self._epoch_ms)

    def _expire_locked(self, consumers: Consumers, now_ms: int) -> None:
        """Expel what is ready and older than `ttl`: the oldest comes first. What one hold of the
        lock may not do stays due."""
        count, size = max(1, AT_ONCE // len(self._consumers)), MIB
        while now_ms >= consumers.expiry_ms and count > 0 and size > 0:
            try:
                run = self._look_locked(consumers, count)
            except ApiError:                 # no memory to read it
                consumers.expiry_ms = now_ms + POLL_S * 1000
                break
            old = [message for message in run if message.time_ms + self._ttl_ms <= now_ms]
            if old:
                consumers.take_out(old)
                self._expel_locked(consumers, [message.id for message in old], expired=True)
            elif run or not consumers.subscription.is_behind:
                consumers.expiry_ms = (run[0].time_ms if run else now_ms) + self._ttl_ms
            else:
                break
            count -= len(old)
            size -= sum([message.size for message in old])
        self._wake_locked(consumers.expiry_ms)

    def _expel_locked(self, consumers: Consumers, ids: Sequence[int], *,
                      expired: bool = False) -> None:
        """Have messages that are out never come back: to be dead-lettered, or gone."""
        if expired:
            self.expired_total += len(ids)
        if self.config.dead_letter:
            consumers.dying.update(dict.fromkeys(ids))
        elif ids:
            self._settle_runs_locked(consumers.subscription.name, ids)
            consumers.dead_lettered_total += 0 if expired else len(ids)

    @turn
    def dead_letters(self) -> Optional[Delivery]:
        """Return the next messages of a subscriber that are to be dead-lettered; about a MiB."""
        with self.lock:
            for name, consumers in self._consumers.items():
                messages: List[Message] = []
                size = 0
                for id_ in list(itertools.islice(consumers.dying, AT_ONCE)):
                    message = self._message_locked(consumers, id_)
                    messages += [message] if message else []
                    size += len(message.payload) if message else 0
                    if size >= MIB:
                        break
                if messages:
                    return Delivery(name, messages, (), [message.id for message in messages])
        return None

    @turn
    def bury(self, letters: Delivery) -> None:
        """Forget dead letters that are safe in their new queue. Not durable on return."""
        with self.lock:
            consumers = self._consumers[letters.subscriber]
            ids = [id_ for id_ in letters.ids if id_ in consumers.dying]
            self._settle_runs_locked(letters.subscriber, ids)
            for id_ in ids:
                del consumers.dying[id_]
            consumers.dead_lettered_total += len(ids)

    # -- numbers

    def numbers(self) -> Dict[str, Any]:
        """Return what there is to tell, by the names of the metrics: of each of the `subscribers`,
        and of all together."""
        self.tick()
        with self.lock:
            self._write_settled_locked()
            each = {name: self._numbers_locked(name) for name in self._consumers}
            first, *_ = each.values()
            total = {key: (max if key == OLDEST else sum)(n[key] for n in each.values())
                     for key in first}
            return {**total, "kind": self.config.kind, "subscribers": each,
                    "log_bytes": self.log.size, "messages_in_total": self.in_total,
                    "messages_out_total": self.out_total,
                    "messages_redelivered_total": self.redelivered_total,
                    "messages_expired_total": self.expired_total,
                    "corrupt_records_total": self.log.corrupt_records,
                    "compactions_total": self.compactions_total}

    def _numbers_locked(self, subscriber: str) -> Dict[str, float]:
        consumers = self._consumers[subscriber]
        time_ms = consumers.subscription.oldest_ms()
        age_ms = 0 if time_ms is None else max(0, self.now_ms() - time_ms)
        return {"ready": consumers.ready_count, "leased": len(consumers.out),
                "delayed": consumers.entries.delayed, OLDEST: age_ms / 1000,
                "messages_dead_lettered_total": consumers.dead_lettered_total}

    def backup(self) -> Stream:
        """Return a tar of the queue as it is now: a folder of these files is a queue that holds
        just what waits. The files stay open, and whole, until it is read or closed."""
        if self._budget.tight:
            raise no_room()
        with self.lock:
            self._check_open()
            self._write_settled_locked()
            frozen = self.state.freeze()
            files = {segment: segment.end for segment in self.log.segments.values()}
            self.log.hold(files)
        return Stream(self, frozen, files)

    # -- snapshots and space: what upkeep does, in steps

    def prepare(self, *, at_once: bool = False) -> None:
        """Make the next segment ready if the current one needs one soon. Blocks for syncs."""
        try:
            if at_once or self.log.current.end >= READY_BYTES:
                self.log.make_ready()
            self._is_unready = False
        except (DiskFull, StorageError, OSError) as error:       # the current one simply grows
            was_unready, self._is_unready = self._is_unready, True
            if not was_unready:
                event(logging.WARNING, "segment_not_ready", queue=self.config.name,
                      error=str(error) or "the disk is full",
                      advice="until there is a next file, the current one grows")

    def wants_snapshot(self) -> bool:
        """Tell whether a start would have to read too much, or a full disk left marks owed."""
        with self.lock:
            size = self.log.marks.snapshot_bytes
            return (self.owed > 0 or self.log.marks.end - size > max(MARKS_BYTES, size // 2)
                    or any(now - then > max(SNAPSHOT_DATA_BYTES, size)
                           for now, then in zip(self.state.progress, self._covered)))

    def snapshot(self, *, clean: bool = False) -> Steps[bool]:
        """Write what memory knows in place of the marks. Return whether there was space; then it
        is durable."""
        with self.lock:
            self._write_settled_locked()
            frozen, since, owed = self.state.freeze(), self.log.marks.end, self.owed
            covered, tail = self.state.progress, self.log.tail
        done = yield from self.log.write_snapshot(
            lambda marks: frozen.lines(marks, clean=clean), since, self.lock)
        if done:
            with self.lock:
                self.owed -= owed            # what was refused since the freeze still is
                self._covered, self._snapshot_tail = covered, tail
        return done

    def upkeep(self) -> Steps[None]:
        """Do what there is to do now: a snapshot, and space that can be freed."""
        while self.state.trash:
            self.state.trash.pop()
            yield 0
        if self.wants_snapshot():
            yield from self.snapshot()
        yield from self._put_back_files()
        yield from self._free_dead_segments()
        with contextlib.suppress(DiskFull):
            for segment in iter(self._emptiest, None):
                yield from self._clean(segment)
                yield from self._free_dead_segments()
                if self.state.live.get(segment.number):      # a disk that reads now and then
                    break
        if self.owed:                        # what was freed may be enough
            yield from self.snapshot()

    def _put_back_files(self) -> Steps[None]:
        for file in self.log.missing_files():
            path = self.log.file(file.name)
            event(logging.ERROR, "file_is_missing", file=path,
                  advice="somebody deleted it; it is written again")
            segment = next((s for s in self.log.segments.values() if s is file), None)
            if file is self.log.marks:
                yield from self.snapshot()
            elif segment is None:
                with self.lock:
                    self.log.forget_ready(file)
            elif segment is not self.log.current or self._seal():
                try:
                    yield from self.log.put_back(segment, self.lock)
                except OSError as error:     # it is tried again
                    event(logging.WARNING, "file_not_put_back", file=path, error=error.strerror)

    def _seal(self) -> bool:
        """Go on in a new segment; return whether there was space for one."""
        current = self.log.current
        self.prepare(at_once=True)
        with self.lock, contextlib.suppress(DiskFull):
            if self.log.current is current:          # a put may have done it meanwhile
                self.log.rotate(self.state.start)
        return self.log.current is not current

    def _dead_bytes(self, segment: Segment) -> int:
        return segment.end - EMPTY_BYTES - self.state.live.get(segment.number, 0)

    def _emptiest(self) -> Optional[Segment]:
        """Return the segment to be cleaned next, None if that would not be worth it. Where it is
        the current one, that is sealed."""
        is_low = self.owed > 0 or self.space.look() < DEAD_BYTES     # no room for what is dead
        with self.lock:
            current, live, dead = self.log.current, self.state.live, self._dead_bytes
            least, most = self._segment_bytes(), self.state.held_bytes + DEAD_BYTES
            if is_low:
                least = most = DEAD_LOW_BYTES
            kept = [s for s in self.log.segments.values() if live.get(s.number) or s is current]
            if sum(map(dead, kept)) <= most and len(kept) <= SEGMENTS_MOST:
                return None
            cursor = min(s.cursor for s in self.state.subscriptions.values())
            passed = [s for s in kept
                      if s.base | s.end <= cursor and (s is not current or s.end >= least)]
            best = max(passed, key=lambda s: dead(s) / s.end, default=None)
            if best is None or dead(best) < live[best.number]:
                return None
        return best if best is not current or self._seal() else None

    def compact(self) -> Steps[None]:
        """Free the dead bytes of all segments that there are now. Raises CompactionFailed; what
        was freed stays freed."""
        with self.lock:
            self._write_settled_locked()
            segments = [s for s in self.log.segments.values() if self._dead_bytes(s) > 0]
        if self.log.current in segments and not self._seal():
            raise CompactionFailed("there is no space for another segment")
        try:
            for segment in segments:
                if (yield from self._pass_over(segment)):
                    yield from self._clean(segment)
        except DiskFull:
            raise CompactionFailed("the disk is nearly full") from None
        yield from self._free_dead_segments()
        self.compactions_total += 1

    def _pass_over(self, segment: Segment) -> Steps[bool]:
        """Move the cursors that stand in a segment of which half is dead to its end: what waits
        there becomes entries, the same state told otherwise. Return whether all passed it."""
        end, puts = segment.base | segment.end, self.state.start_of(segment.number + 1).puts
        for consumers in self._consumers.values():
            subscription = consumers.subscription
            while subscription.cursor < end:
                if not self._pass_some(consumers, segment, puts):
                    return False
                yield FREE_WORK_REST_S
        return True

    @turn
    def _pass_some(self, consumers: Consumers, segment: Segment, puts: int) -> bool:
        """Move a cursor on within a segment; return whether it may be."""
        subscription = consumers.subscription
        with self.lock:
            if (self._dead_bytes(segment) < self.state.live[segment.number]
                    or puts - subscription.passed > PASSED_OVER
                    or subscription.cursor < segment.base):
                return False
            for _ in range(AT_ONCE):
                message = subscription.at_cursor(MIB)
                if message is None or message.offset > segment.base | segment.end:
                    break
                subscription.take_in(message)
                consumers.note([message.id], 0)
        return True

    def _clean(self, segment: Segment) -> Steps[None]:
        """Append what is still held of a sealed segment again, so that nothing in it is needed.
        Raises DiskFull."""
        position, after = -1, segment.base | FIRST
        while after != position and self.state.live.get(segment.number):
            position, started = after, time.perf_counter()
            messages, after = self.log.read(position, segment.base | segment.end, SLICE_BYTES)
            for at in range(0, len(messages), SLICE_MESSAGES):
                with self.lock:
                    self._copy_locked(messages[at:at + SLICE_MESSAGES])
                yield self._rest_s(time.perf_counter() - started)
                started = time.perf_counter()
        with self.lock:
            for consumers in self._consumers.values() if self.state.live[segment.number] else ():
                for id_, offset, *_ in list(consumers.entries):      # whose bytes went bad
                    if offset >> SEGMENT_SHIFT == segment.number:
                        self._message_locked(consumers, id_)
            self.compactions_total += 1

    def _copy_locked(self, messages: Sequence[Message]) -> None:
        """Append those again that somebody holds. Raises DiskFull."""
        subscriptions = self.state.subscriptions.values()
        held = [m[:4] for m in messages
                if any(s.entries.stands_at(m.id, m.offset) for s in subscriptions)]
        if held:
            if self.space.free_bytes() < self.space.min_free_bytes // 4:
                raise DiskFull
            self._rotate_locked()
            self.log.append(held, self.state.apply)

    def _rest_s(self, worked_s: float) -> float:
        """Rest six times as long as was worked, less as dead bytes outgrow held ones."""
        dead = max(1, self.log.size - self.state.held_bytes)
        return worked_s * 6 * min(1, (self.state.held_bytes + DEAD_BYTES) / dead)

    def _free_dead_segments(self) -> Steps[None]:
        """Remove sealed segments in which nothing is held. One out of which a copy was made goes
        only behind a snapshot that knows the copy."""
        first = self.log.segments[0]         # somebody may have needed it whole
        gone = [first] if first.start is None and not first.is_unreadable else []
        with self.lock:
            dead = [n for n, s in self.log.segments.items()
                    if s.start and s is not self.log.current and self.state.is_dead(n)]
        if not all(map(self._is_covered, dead)):
            yield from self.snapshot()
        if dead:
            self.log.sync()                  # the current one's start tells the next id
        with self.lock:
            for number in filter(self._is_covered, dead):
                self.state.leave(number)
                gone.append(self.log.forget(number))
        for segment in gone:
            yield from self.log.remove(segment)

    def _is_covered(self, number: int) -> bool:
        """Tell whether the snapshot knows all copies that were made out of a segment."""
        return self.state.copies.get(number, 0) <= self._snapshot_tail


def exhaust(steps: Steps[T]) -> T:
    """Do all steps without a rest; return what they give."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def _runs(ids: Collection[int]) -> List[List[int]]:
    """Return the runs [first, last] of neighbours among `ids`."""
    if len(ids) == 1:
        return [[*ids, *ids]]
    runs: List[List[int]] = []
    for id_ in sorted(ids):
        if runs and id_ == runs[-1][1] + 1:
            runs[-1][1] = id_
        else:
            runs.append([id_, id_])
    return runs


# ---- Broker -------------------------------------------------------------------------------
# All queues and tokens, and the threads that keep them: nothing here knows HTTP.

DRAINING, RECOVERING, STANDBY = "draining", "recovering", "standby"
UPKEEP_S = 1                     # how often syncs are made that nobody waits for


class Job(NamedTuple):
    """Steps that upkeep does for a queue; of its compactions it does the first, for all. Whoever
    waits for the end is called with what went wrong, if anything did."""

    queue: Queue
    steps: Steps[object]
    waiting: Iterator[Callable[[Optional[Exception]], None]]     # which tells of each but once
    is_compaction: bool


class Syncers:
    """Threads that sync logs for those who wait: as many as logs that sync at one time. Where none
    is to be had, whoever polls syncs, at the end of a round."""

    def __init__(self) -> None:
        self._logs: queues.SimpleQueue[Log] = queues.SimpleQueue()
        self._lock = threading.Lock()        # guards `_idle`
        self._idle = 0                       # threads that have no log, and none on its way
        self._is_short = False               # of threads, when one was last wanted

    def lead(self, log: Log) -> None:
        """Have a thread call `log.lead`. Does not block, as long as there are threads."""
        with self._lock:
            found, self._idle = self._idle > 0, max(0, self._idle - 1)
        try:
            if not found:
                threading.Thread(target=self._work, daemon=True, name="syncer").start()
        except (RuntimeError, MemoryError) as error:
            was_short, self._is_short = self._is_short, True
            if not was_short:                # or there would be a line each round
                event(logging.ERROR, "cannot_start_thread", error=error)
            log.lead()
        else:
            self._is_short = False
            self._logs.put(log)

    def _work(self) -> None:
        while True:
            log = self._logs.get()
            try:
                log.lead()
            except MemoryError:              # those who wait still do
                self._logs.put(log)
                log_event.exception("sync_failed log=%s", log.path)
                time.sleep(PAUSE_S)
                continue
            except LogFailed:
                return
            with self._lock:
                self._idle += 1


class Broker:
    """The queues of one data folder.

    Threads start with `recover` and end with `close`. `unready` says why the queues are not
    served; None when they are. Who serves clients calls `end_round` after each round.
    """

    def __init__(self, config: Config, on_failure: Callable[[LogFailed], None],
                 clock: Optional[Clock] = None) -> None:
        settings = config.settings
        self.config = config
        self.unready: Optional[str] = STANDBY if settings.standby else RECOVERING
        self._lock_fd = -1
        self.tokens = {token.digest: token for token in config.tokens}
        self.space = Space(settings.path, settings.min_free_bytes)
        self.budget = Budget(settings.inflight_bytes, settings.max_message_bytes,
                             lambda: self._wake_at(0))
        self.staging: Set[Queue] = set()     # queues that have something to write
        self._clock = clock or Clock()
        self._tick_ms = 0                    # when (monotonic) the next tick is; see _wake_at
        self._wakes: queues.SimpleQueue[int] = queues.SimpleQueue()      # that are to be sooner
        self._next_s = 0.0                   # when upkeep's second is over
        self._called = threading.Event()     # it is wanted before
        self._jobs: List[Job] = []           # only upkeep takes one out; a queue's first is begun
        self._reads: queues.SimpleQueue[Optional[Callable[[], None]]] = queues.SimpleQueue()
        self.queues = {item.name: Queue(item, os.path.join(settings.path, item.name),
                                        fsync=settings.fsync, clock=clock, space=self.space,
                                        subscribers=config.subscribers(item),
                                        budget=self.budget, staging=self.staging,
                                        lead=Syncers().lead, on_failure=on_failure,
                                        wake_at=self._wake_at,
                                        call_upkeep=self._called.set)
                       for item in config.queues}
        self._low_space = False
        self._owing: Set[str] = set()        # queues whose marks find no space
        self._stuck: Set[str] = set()        # queues whose dead letters find no space
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._guard, args=(work,), name=work.__name__,
                                          daemon=True)
                         for work in (self._timers, self._upkeep, self._mover, self._reader)]

    def lock(self) -> None:
        """Lock the folder, so that no two configs serve on it, then each queue's, in sorted order;
        all or none. Makes no more than the file of that lock while another holds it. Raises
        StorageError, OSError."""
        path = self.config.settings.path
        if not self.config.settings.standby:     # which would take a missing mount for a new folder
            Storage().make_folder(path)
        self._lock_fd = os.open(os.path.join(path, LOCK_NAME), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            lock_file(self._lock_fd, path)
            for _, queue in sorted(self.queues.items()):
                queue.log.lock()
        except (StorageError, OSError):
            self._unlock()
            raise

    def _unlock(self) -> None:
        for queue in self.queues.values():
            queue.log.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def recover(self) -> None:
        """Recover every queue and start the threads. Raises StorageError, OSError."""
        for queue in self.queues.values():
            try:
                queue.recover()
            except (DiskFull, MemoryError, ApiError) as error:
                what = "space" if isinstance(error, DiskFull) else "memory"
                raise StorageError(f"{queue.log.folder}: no {what} to start with") from None
        for thread in self._threads:
            thread.start()
        self.unready = None

    def close(self) -> bool:
        """Stop the threads and close every queue with a clean snapshot. Return whether all that
        memory knew is on disk."""
        self._stopping.set()
        self._called.set()
        self._wakes.put(0)                   # even if the first tick is still to come
        self._reads.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for job in self._jobs:
            job.steps.close()
        clean = [queue.close() for queue in self.queues.values() if queue.log.current.fd >= 0]
        self._unlock()
        return all(clean)

    def do(self, queue: Queue, steps: Steps[object],
           done: Callable[[Optional[Exception]], None] = lambda _: None, *,
           is_compaction: bool = False) -> None:
        """Have upkeep do steps for a queue, behind those that it does already."""
        self._jobs.append(Job(queue, steps, iter([done]), is_compaction))
        self._called.set()

    def end_round(self) -> None:
        """Write what the queues were told in this round. Does not wait for a disk, unless there
        are no threads for that."""
        for queue in list(self.staging):     # each leaves once all is written
            queue.flush()

    def dismiss(self) -> None:
        """Answer all who wait: for a message with None, for a job that it failed."""
        for queue in self.queues.values():
            queue.dismiss()
        for job in list(self._jobs):
            for done in job.waiting:
                done(CompactionFailed("the server is stopping; what was freed is"))

    def read(self, work: Callable[[], T], done: Callable[[Union[T, Exception]], None]) -> None:
        """Have another thread do what waits for a disk; `done` gets what it gives or raises."""
        def act() -> None:
            try:
                result: Union[T, Exception] = work()
            except Exception as error:
                result = error
            done(result)
        self._reads.put(act)

    # -- threads

    def _guard(self, work: Callable[[], None]) -> None:
        """Do a thread's work again and again until the end, whatever it meets."""
        while not self._stopping.is_set():
            try:
                work()
            except LogFailed:
                return
            except Exception:                # not for anything that a client or a disk can do
                log_event.exception("thread_failed thread=%s", work.__name__)
                self._stopping.wait(1)

    def _wake_at(self, monotonic_ms: int) -> None:
        """Have the queues ticked no later than then. A queue calls it under its lock, before
        it can be ticked: so what is read here is never too low for it."""
        if monotonic_ms < self._tick_ms:
            self._wakes.put(monotonic_ms)

    def _timers(self) -> None:
        self._tick_ms = NEVER
        self._wake_at(min([queue.tick() for queue in self.queues.values()]))
        with contextlib.suppress(queues.Empty):          # its time has come
            while True:
                left_ms = min(self._tick_ms - self._clock.monotonic_ms(), MAX_SLEEP_MS)
                wake_ms = self._wakes.get(timeout=max(0, left_ms) / 1000)
                self._tick_ms = min(self._tick_ms, wake_ms)

    def _upkeep(self) -> None:
        """Each second what has to be done each second; in between the steps of the jobs, one of
        each queue in turn, and a rest for as long as the longest of them wants."""
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + UPKEEP_S
            self._each_second()
            self._called.set()
        if self._called.is_set():
            self._called.clear()
            for queue in self.queues.values():
                queue.prepare()
        firsts = {job.queue: job for job in reversed(self._jobs)}
        rests_s = [self._step(job) for job in firsts.values()]
        left_s = max(0, self._next_s - time.monotonic())
        if rests_s:                          # none may keep the syncs of each second waiting
            self._stopping.wait(min(max(rests_s), left_s))
        else:
            self._called.wait(left_s)

    def _each_second(self) -> None:
        self._watch_space()
        busy = {job.queue for job in self._jobs}
        for queue in self.queues.values():
            if self.config.settings.standby:     # who lost it may have nothing to write
                queue.log.prove_lock()
            if queue.log.fsync == "everysec":
                queue.log.sync()
            if queue.log.fsync != "no":
                queue.log.sync_marks()
            if queue not in busy:
                self.do(queue, queue.upkeep())

    def _step(self, job: Job) -> float:
        """Do a step of a job; return for how long to rest."""
        failed: Optional[Exception] = None
        try:
            return next(job.steps)
        except StopIteration:
            pass
        except CompactionFailed as error:
            failed = error
            event(logging.WARNING, "compaction_failed", queue=job.queue.config.name, error=error)
        except LogFailed:
            raise
        except Exception as error:           # the others go on, and this one's next job
            failed = error
            log_event.exception("upkeep_failed queue=%s", job.queue.config.name)
        for other in list(self._jobs):
            if other is job or (other.queue is job.queue
                                and other.is_compaction and job.is_compaction):
                self._jobs.remove(other)
                for done in other.waiting:
                    done(failed)
        return 0

    def _reader(self) -> None:
        for act in iter(self._reads.get, None):
            act()

    def _mover(self) -> None:
        self._stopping.wait(UPKEEP_S)
        for queue in self.queues.values():
            self._move_dead_letters(queue)

    def _move_dead_letters(self, queue: Queue) -> None:
        """Put dead letters where they belong, then settle them: a crash between repeats them.
        Never holds two queues' locks."""
        while not self._stopping.is_set():
            try:
                letters = queue.dead_letters()
                if letters is None:
                    return
                target = self.queues[queue.config.dead_letter or ""]
                if self.space.free_bytes() < self.space.min_free_bytes // 2:
                    raise DiskFull           # or they would fill it, and nothing could free it
                target.put([message.payload for message in letters.messages], limited=False)
                target.log.sync(target.log.appends)      # whatever `fsync` says: they were durable
            except (ApiError, DiskFull) as error:    # they stay where they are, to be tried again
                if queue.config.name not in self._stuck:
                    event(logging.WARNING, "dead_letters_wait", queue=queue.config.name,
                          error=str(error) or "the disk is full")
                self._stuck.add(queue.config.name)
                return
            self._stuck.discard(queue.config.name)
            queue.bury(letters)

    def _watch_space(self) -> None:
        low = self.space.look() <= 0
        if low != self._low_space:
            self._low_space = low
            event(logging.WARNING, "disk_nearly_full" if low else "disk_has_space",
                  path=self.config.settings.path,
                  free_bytes=self.space.left + self.space.min_free_bytes,
                  min_free_bytes=self.space.min_free_bytes)
        owing = {name for name, queue in self.queues.items() if queue.owed}
        for name in owing - self._owing:
            event(logging.WARNING, "marks_owed", queue=name, advice="the disk is full: takes go "
                  "on, but a restart would repeat them; free some space")
        for name in self._owing - owing:
            event(logging.INFO, "marks_paid", queue=name)
        self._owing = owing


# ---- Metrics ------------------------------------------------------------------------------
# One table, one pure function. The names of the first two are the Go server's.

Sample = Tuple[str, Mapping[str, str], float]            # name, labels, value
PREFIX = "oxl_micro_queue_"
METRICS: Sequence[Tuple[str, str, str]] = (
    (PREFIX + "messages_in_total", "counter", "Total number of messages put into a queue"),
    (PREFIX + "messages_out_total", "counter", "Total number of messages taken out of a queue"),
    (PREFIX + "messages", "gauge", "Messages that are ready, leased or delayed"),
    (PREFIX + OLDEST, "gauge", "Age of the oldest message, 0 when empty"),
    (PREFIX + "log_bytes", "gauge", "Size of a queue's files"),
    (PREFIX + "messages_redelivered_total", "counter", "Messages that came back to be taken again"),
    (PREFIX + "messages_expired_total", "counter", "Messages that grew older than ttl"),
    (PREFIX + "messages_dead_lettered_total", "counter",
     "Messages moved to the dead-letter queue, or dropped after max_deliveries for lack of one"),
    (PREFIX + "corrupt_records_total", "counter", "Damaged places found in a queue's log"),
    (PREFIX + "compactions_total", "counter", "Calls of /compact, and segments that were cleaned"),
    (PREFIX + "http_requests_total", "counter", "Answered requests"),
    (PREFIX + "fsync_duration_seconds", "summary", "Time that fdatasync took"),
    (PREFIX + "active", "gauge", "1 while this node serves its queues"),
    (PREFIX + "build_info", "gauge", "Always 1, labelled with the version"),
    ("process_start_time_seconds", "gauge", "Start time of the process since the epoch"),
    ("process_resident_memory_bytes", "gauge", "Resident memory of the process"),
)


def render_metrics(samples: Iterable[Sample]) -> bytes:
    """Return the Prometheus text format 0.0.4; a summary's parts are named by its suffixes."""
    lines: Dict[str, List[str]] = collections.defaultdict(list)
    for name, labels, value in samples:
        # Printable all of them: JSON escapes what Prometheus wants escaped, and no more.
        pairs = ",".join(f"{key}={json.dumps(item, ensure_ascii=False)}"
                         for key, item in labels.items())
        lines[name].append(f"{name}{'{' + pairs + '}' if pairs else ''} {value!r}\n")
    text = ""
    for name, kind, help_text in METRICS:
        text += f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n"
        text += "".join(lines[name] + lines[name + "_sum"] + lines[name + "_count"])
    return text.encode()


def all_samples(broker: Broker, answered: Mapping[Tuple[str, int], int]) -> Iterator[Sample]:
    """Yield the samples of all metrics; `answered` counts requests by action and status."""
    logs = [queue.log for queue in broker.queues.values()]
    for (action, code), count in sorted(answered.items()):
        yield PREFIX + "http_requests_total", {"action": action, "code": str(code)}, count
    yield PREFIX + "fsync_duration_seconds_sum", {}, sum(log.sync_seconds for log in logs)
    yield PREFIX + "fsync_duration_seconds_count", {}, sum(log.syncs for log in logs)
    yield PREFIX + "active", {}, int(broker.unready is None)
    yield PREFIX + "build_info", {"version": __version__}, 1
    yield "process_start_time_seconds", {}, STARTED_S
    with contextlib.suppress(OSError):       # where there is no /proc
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        yield "process_resident_memory_bytes", {}, pages * resource.getpagesize()
    for name, queue in broker.queues.items() if broker.unready is None else ():
        yield from queue_samples({"queue_name": name}, queue.numbers())


def queue_samples(labels: Mapping[str, str], numbers: Mapping[str, Any]) -> Iterator[Sample]:
    """Yield what `Queue.numbers` tells; of what waits, for each subscriber."""
    for key, value in numbers.items():
        if key == "log_bytes" or key.endswith("_total"):
            yield PREFIX + key, labels, value
    for name, counts in numbers["subscribers"].items():
        mine = {**labels, "subscriber": name}
        yield PREFIX + OLDEST, mine, counts[OLDEST]
        for state in ("ready", "leased", "delayed"):
            yield PREFIX + "messages", {**mine, "state": state}, counts[state]


STARTED_S = round(time.time(), 3)


# ---- HTTP messages ------------------------------------------------------------------------
# Bytes to requests, answers to bytes; pure functions. Whatever a client may send is read in
# linear time: no expression here can match one text in two ways.

TOKEN_CHARACTERS = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rb"(%b) ([!-~]+) (\S+)" % TOKEN_CHARACTERS)
HTTP_VERSION = re.compile(rb"HTTP/([0-9])\.([0-9])")
FIELD_NAME = re.compile(TOKEN_CHARACTERS)
FIELD_VALUE = re.compile(rb"[\t -~\x80-\xff]*")
BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")    # a CR at the end may get its LF yet
CHUNK_LINE = re.compile(                 # a size, then `;name` or `;name=value`: RFC 9112, 7.1.1
    rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*"
    rb'(?:%b|"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"))?)*'
    % (TOKEN_CHARACTERS, TOKEN_CHARACTERS))
CONTENT_LENGTH = re.compile(rb"[0-9]{1,18}")
HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|(?:[0-9A-Za-z._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})*)"
                  rb"(?::[0-9]*)?")      # RFC 9112, 3.2; no comma, which a second line leaves
BEARER = re.compile(rb"(?i:bearer) +([!-~]+)")
PATH = re.compile(r"/(?:([a-z]+)(?:/([-a-zA-Z0-9]{1,50}))?/?)?")
ABSOLUTE_FORM = re.compile(r"\A(?i:https?)://[^/?]*")
NDJSON = b"application/x-ndjson"
TEXT = b"Content-Type: text/plain; charset=utf-8\r\n"


class Request(NamedTuple):
    """A parsed head: all that it tells, and nothing that depends on the server's state. The
    token is here as its sha256 only."""

    method: str = ""
    action: str = "?"                        # no path of ours; "" is `/`, "*" stands alone
    queue: Optional[str] = None
    query: str = ""
    token_digest: Optional[bytes] = None     # None: no Authorization; empty: not understood
    length: Optional[int] = 0                # of the body; None: it is chunked
    expects: bool = False                    # the client waits for 100 Continue
    keep_alive: Optional[bytes] = None       # the field that says so; None: it is to be closed
    encoding: str = ""
    lines: bool = False                      # the body is application/x-ndjson
    forwarded: str = ""

    @property
    def unread(self) -> float:
        """How many bytes of body come though it is refused; inf: nobody knows."""
        return math.inf if self.length is None or self.expects else self.length


def malformed(what: str, status: int = 400) -> ApiError:
    return ApiError(status, what, close=True)


def check_line_ends(data: bytes, start: int, end: int) -> None:
    """Refuse a CR or LF that stands alone; a CR at `end` may get its LF yet."""
    pairs = data.count(b"\r\n", start, end)       # counting is faster than BARE_LINE_END
    good = pairs == data.count(b"\n", start, end) == data.count(b"\r", start, end)
    if not good and BARE_LINE_END.search(data, start, end):
        raise malformed("A line ends in CR LF, and neither stands alone")


def check_head(data: bytes, start: int = 0, checked: int = 0) -> None:
    """Refuse a head that begins at `start`, whole or not, for what no further byte can mend: of
    several such things the first, so that the answer does not depend on how the bytes were
    split. What is before `checked` was looked at already. Raises ApiError that closes."""
    line_limit = start + REQUEST_LINE_BYTES + 2
    head_limit = start + REQUEST_HEAD_BYTES + 4
    end = data.find(b"\r\n\r\n", max(start, checked - 3), head_limit)
    is_long = data.find(b"\r\n", start, line_limit) < 0
    limit = line_limit if is_long else head_limit
    seen = min(limit, len(data) if end < 0 else end + 4)
    if data.startswith(b"\n", start):        # whatever stood before it was another request's
        check_line_ends(b"\n", 0, 1)
    check_line_ends(data, max(start, checked - 1), seen)
    if is_long and seen == limit:
        raise malformed(f"The request line is longer than {REQUEST_LINE_BYTES} bytes", 414)
    if end < 0 and seen == limit:
        raise malformed(f"The request's head is longer than {REQUEST_HEAD_BYTES} bytes", 431)


def parse_request(head: bytes) -> Request:
    """Parse a head, its final empty line left out (RFC 9112). Raises ApiError that closes."""
    check_head(head + b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    method, target, old = parse_request_line(first)
    fields = parse_fields(lines)
    length = parse_framing(fields, old)
    if not HOST.fullmatch(fields.get(b"host", b"" if old else b"?")):
        raise malformed("Send exactly one valid Host header")
    expect = None if old else fields.get(b"expect")
    if expect is not None and expect.lower() != b"100-continue":
        raise malformed("The only expectation known here is 100-continue", 417)
    path, _, query = target.partition("?")
    named = PATH.fullmatch(path)
    authorization = fields.get(b"authorization")
    bearer = BEARER.fullmatch(authorization or b"")
    options = {item.strip() for item in fields.get(b"connection", b"").lower().split(b",")}
    closes = b"close" in options or (old and b"keep-alive" not in options)
    return Request(
        method=method, action=(named[1] or "") if named else "*" if path == "*" else "?",
        queue=named[2] if named else None, query=query,
        token_digest=hashlib.sha256(bearer[1]).digest() if bearer else authorization and b"",
        length=length, expects=expect is not None and length != 0,
        keep_alive=None if closes else b"Connection: keep-alive\r\n" if old else b"",
        encoding=fields.get(b"content-encoding", b"").decode("latin-1").lower(),
        lines=fields.get(b"content-type", b"").split(b";")[0].strip().lower() == NDJSON,
        forwarded=fields.get(b"x-forwarded-for", b"")[:200].decode("latin-1"))


def parse_request_line(line: bytes) -> Tuple[str, str, bool]:
    """Return method, target in origin form, and whether this is HTTP/1.0."""
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise malformed("The first line must be: METHOD /path HTTP/1.1")
    version = HTTP_VERSION.fullmatch(match[3])
    if not version:
        raise malformed("The version must be HTTP/1.1 or HTTP/1.0")
    if version[1] != b"1":
        raise malformed("Use HTTP/1.1 or HTTP/1.0", 505)
    method, target = match[1].decode(), ABSOLUTE_FORM.sub("", match[2].decode(), 1)
    target = "/" + target if target[:1] in ("", "?") else target
    if not (target.startswith("/") or (target == "*" and method == "OPTIONS")):
        raise malformed("The target must be a path that starts with /")
    return method, target, version[2] == b"0"


def parse_fields(lines: Sequence[bytes]) -> Dict[bytes, bytes]:
    """Return the header fields by lower-case name; repeated ones joined by a comma."""
    if len(lines) > REQUEST_FIELDS:
        raise malformed(f"More than {REQUEST_FIELDS} header fields", 431)
    fields: Dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        if not (colon and FIELD_NAME.fullmatch(name) and FIELD_VALUE.fullmatch(value)):
            raise malformed("A header line must be: Name: value")
        fields[name] = fields[name] + b", " + value if name in fields else value
    return fields


def parse_framing(fields: Mapping[bytes, bytes], old: bool) -> Optional[int]:
    """Return the body's length, None if it is chunked (RFC 9112, 6)."""
    length, coding = fields.get(b"content-length"), fields.get(b"transfer-encoding")
    if coding is not None:
        if length is not None or old or b"," in coding:
            raise malformed("Send one of Content-Length and Transfer-Encoding: chunked, once")
        if coding.lower() != b"chunked":
            raise malformed("The only transfer coding known here is chunked", 501)
        return None
    if length is not None and not CONTENT_LENGTH.fullmatch(length):
        raise malformed("Content-Length must be one number of at most 18 digits")
    return int(length or 0)


def parse_chunk_line(line: bytes) -> Tuple[int, int]:
    """Return a chunk's length, and how many bytes the extensions behind it are."""
    match = CHUNK_LINE.fullmatch(line)
    if not match:
        raise malformed("A chunk starts with its size in hexadecimal")
    return int(match[1], 16), len(line) - match.end(1)


@functools.lru_cache(maxsize=64)
def start_of_head(status: int, now_s: int) -> bytes:
    """Return an answer's head up to its length."""
    return (f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nServer: micro-queue\r\n"
            f"Date: {email.utils.formatdate(now_s, usegmt=True)}\r\nContent-Length: ").encode()


class Answer(NamedTuple):
    """What to send. `taken` is settled once it left, and put back if it could not; `held` is
    what counts in the budget until then, besides what the queue counts for `taken`."""

    status: int = 200
    body: Union[bytes, Stream] = b""
    headers: bytes = b""
    taken: Optional[Tuple[Queue, Delivery]] = None
    held: int = 0
    close: bool = False                      # what follows on the connection is not understood


def error_answer(error: Exception) -> Answer:
    """Return what a client is told of an error."""
    if isinstance(error, DiskFull):
        error = ApiError(503, "The disk is full; nothing was queued, try again later")
    if isinstance(error, ApiError):
        return Answer(error.status, error.message.encode() + b"\n", TEXT + error.headers,
                      close=error.close)
    return Answer(500, b"The server failed at this request; its log tells why\n", TEXT, close=True)


def render_head(answer: Answer, keep_alive: Optional[bytes]) -> bytes:
    """Return the head of an answer, with its empty line."""
    return b"%b%d\r\nCache-Control: no-store\r\n%b%b\r\n" % (
        start_of_head(answer.status, int(time.time())), len(answer.body),
        b"Connection: close\r\n" if keep_alive is None else keep_alive, answer.headers)


# ---- Actions ------------------------------------------------------------------------------
# What the API can do. An action is one row in ACTIONS and one function; what a request names is
# looked up and checked once for each head, in one order. Nothing here knows a connection.

PARAMETER = re.compile(r"([a-z]+)=([^=]+)")
NUMBER = re.compile(r"[0-9]{1,8}")
LEASE_ID = re.compile(rf"[0-9a-f]{{{KEY_BITS // 4}}}")


class Route(NamedTuple):
    """Where a request leads, all that depends on its head alone being checked."""

    request: Request
    action: Action
    queue: Optional[Queue] = None
    subscriber: Optional[str] = None         # as whom the token takes from the queue
    token: Optional[Token] = None
    parameters: Mapping[str, int] = {}
    wish: Wish = ONE                         # of a take or a peek


class Call:
    """A request under way, as its action's function sees it; a client has one at a time.

    `finish_with` gives the answer, or what went wrong, or a piece of the answer's stream: once
    each, from any thread, and only if the action returned None. `is_gone` tells at once, in any
    thread, whether the client hung up or will send no more. `when_gone` has something called
    when it hangs up while the answer is awaited.
    """

    broker: Broker
    answered: Dict[Tuple[str, int], int]     # so far, by action and status: for the metrics
    peer: str                                # who asks
    route: Route
    body: bytes
    finish_with: Callable[[Union[Answer, bytes, Exception]], None]
    is_gone: Callable[[], bool]
    when_gone: Callable[[Optional[Callable[[], None]]], None]

    @property
    def queue(self) -> Queue:
        assert self.route.queue is not None  # find_route looked it up
        return self.route.queue

    @property
    def subscriber(self) -> str:
        assert self.route.subscriber is not None     # authorize saw to it
        return self.route.subscriber

    def late(self, make: Callable[[T], Answer]) -> Callable[[Union[T, Exception]], None]:
        """Return what is to be called with the result, once it is there: the answer is what is
        made of it, or what went wrong."""
        def done(result: Union[T, Exception]) -> None:
            try:
                answer = result if isinstance(result, Exception) else make(result)
            except Exception as error:
                answer = error
            self.finish_with(answer)
        return done

    def number(self, parameter: str) -> int:
        """Return a parameter's value, 0 if it is not given."""
        return self.route.parameters.get(parameter, 0)

    def log(self, level: int, name: str, **fields: object) -> None:
        """Log an event of the request; the client is always the peer."""
        forwarded = self.route.request.forwarded
        event(level, name, client=self.peer, **{"forwarded": forwarded} if forwarded else {},
              **fields)


class Parameter(NamedTuple):
    """A number of a query, or a Lease-Id where `high` is 0."""

    low: int = 0
    high: int = 0
    required: bool = False

    def parse(self, text: str) -> Optional[int]:
        if not self.high:
            return int(text, 16) if LEASE_ID.fullmatch(text) else None
        good = NUMBER.fullmatch(text) and self.low <= int(text) <= self.high
        return int(text) if good else None

    @property
    def text(self) -> str:
        return (f"a whole number from {self.low} to {self.high}" if self.high
                else "the Lease-Id that /out answered")


class Action(NamedTuple):
    """A row of the API: 404, 405, Allow, OPTIONS, permission and metric follow from it.

    `call` returns the answer, or None if it is late: then `finish_with` is called.
    """

    methods: Sequence[str]
    permission: str                          # post, get, peek, admin; "any" may name a queue, and
                                             # "" names none and needs no token
    call: Callable[[Call], Optional[Answer]]
    text: str
    parameters: Mapping[str, Parameter] = {}
    before_body: Optional[Callable[[Call], None]] = None     # refuses early; None: takes no body

    @property
    def allow(self) -> str:
        return ", ".join([*self.methods, "OPTIONS"])


# -- the actions' functions, in the order of their rows

def check_put(call: Call) -> None:
    """Refuse a put before its body is received. Raises ApiError."""
    request = call.route.request
    call.queue.check_room(0 if request.lines else request.length or 0)


def put(call: Call) -> Optional[Answer]:
    lines = call.route.request.lines
    payloads = split_lines(call.body) if lines else [call.body]
    if not payloads or not payloads[0]:
        raise ApiError(400, "A message must not be empty; send it as the request's body")

    count = b"Message-Count: %d\r\n" % len(payloads) if lines else b""
    call.queue.stage(Put(payloads, call.number("delay"), call.late(
        lambda first: Answer(headers=b"Message-Id: %d\r\n%b" % (first, count)))))
    return None


def split_lines(body: bytes) -> List[bytes]:
    """Return the messages of an NDJSON body. Raises ApiError 413."""
    *lines, rest = body.split(b"\n", MAX_LINES)
    if rest.strip(b"\r\n"):
        if len(lines) == MAX_LINES:
            raise ApiError(413, f"More than {MAX_LINES} lines; send them in parts")
        lines.append(rest)
    lines = [line[:-1] if line.endswith(b"\r") else line for line in lines]
    return [line for line in lines if line]


def take(call: Call) -> Optional[Answer]:
    queue, subscriber, wait_s = call.queue, call.route.subscriber, call.number("wait")
    if wait_s and call.is_gone():
        return answer_with(queue, None)

    def answer(delivery: Optional[Delivery]) -> Answer:
        if delivery is None and call.broker.unready:
            raise unready(call.broker.unready)
        return answer_with(queue, delivery)

    waiter = Waiter(call.route.wish, wait_s, call.late(answer))
    if not call.route.wish.peek:             # which loses nothing
        waiter.is_gone = call.is_gone
    delivery = queue.take(subscriber, call.route.wish, waiter)
    if delivery or not waiter.deadline_ms:
        return answer_with(queue, delivery)
    if not call.route.wish.peek:
        call.when_gone(lambda: queue.stop_waiting(waiter))
    return None


def answer_with(queue: Queue, delivery: Optional[Delivery]) -> Answer:
    """Return what was taken as an answer; if that fails, it is put back."""
    try:
        return render_delivery(queue, delivery)
    except Exception:
        if delivery:
            queue.retry(delivery)
        raise


def render_delivery(queue: Queue, delivery: Optional[Delivery]) -> Answer:
    """Return a delivery as an answer: one message as it is, or lines."""
    if delivery is None:
        return Answer(404, b"Queue is empty\n", TEXT + b"Message-Count: 0\r\n")
    first, body, content_type = delivery.messages[0], b"", queue.content_type
    headers = b"Message-Id: %d\r\nMessage-Age: %d\r\nDelivery-Count: %d\r\n" % (
        first.id, max(0, queue.now_ms() - first.time_ms) // 1000, delivery.counts[0])
    if delivery.as_lines:
        content_type = b"Content-Type: %b\r\n" % NDJSON
        headers += b"Message-Count: %d\r\n" % len(delivery.messages)
        body = b"".join([m.payload if m.payload.endswith(b"\n") else m.payload + b"\n"
                         for m in delivery.messages])
        if delivery.held > SHARE_BYTES:      # not twice in memory
            delivery = delivery._replace(messages=())
    if delivery.lease is not None:
        headers += b"Lease-Id: %0*x\r\n" % (KEY_BITS // 4, delivery.lease)
    return Answer(200, body or first.payload, content_type + headers, (queue, delivery))


def ack(call: Call) -> Answer:
    call.queue.ack(call.subscriber, call.number("lease"))
    return Answer()


def nack(call: Call) -> Answer:
    call.queue.nack(call.subscriber, call.number("lease"), call.number("delay"))
    return Answer()


def extend(call: Call) -> Answer:
    call.queue.extend(call.subscriber, call.number("lease"), call.number("seconds"))
    return Answer()


def compact(call: Call) -> None:
    call.broker.do(call.queue, call.queue.compact(), lambda error: call.finish_with(
        ApiError(503, f"Not compacted: {error}") if error else Answer()), is_compaction=True)


def backup(call: Call) -> None:
    headers = b"Content-Type: application/x-tar\r\n"
    call.broker.read(lambda: Answer(200, call.queue.backup(), headers), call.finish_with)


def purge(call: Call) -> None:
    queue, count = call.queue, call.queue.purge()

    def done(failure: Optional[Exception] = None) -> None:
        owed = ApiError(503, "Dropped, but the disk has no space to note it: a restart brings it "
                             "back; free some space, purge again") if queue.owed else None
        call.finish_with(owed or failure or Answer(200, b"%d\n" % count, TEXT))

    def check() -> None:
        if queue.owed or not queue.log.owns_marks:       # upkeep writes it down
            call.broker.do(queue, queue.upkeep(), done)
        else:
            done()
    if queue.owed:                           # it frees what was dropped, too
        check()
    else:
        queue.when_durable(queue.log.appends, check, marks=True)


def show_stats(call: Call) -> Answer:
    """Tell of one queue, or of all that the token may use."""
    token, only = call.route.token, call.route.queue
    served = {} if call.broker.unready else call.broker.queues
    stats = {name: queue.numbers() for name, queue in served.items()
             if token and token.may("any", name) and only in (None, queue)}
    for numbers in stats.values():
        if FIFO in numbers["subscribers"]:   # who is the only one
            del numbers["subscribers"]
    value = stats[only.config.name] if only else stats
    return Answer(200, json.dumps(value).encode() + b"\n", b"Content-Type: application/json\r\n")


def show_root(call: Call) -> Answer:
    return Answer(200, b"micro_queue is running\n", TEXT)


def show_ready(call: Call) -> Answer:
    broker = call.broker
    if broker.unready:
        raise unready(broker.unready)
    owes = any(queue.owed for queue in broker.queues.values())
    return Answer(200, b"ready; marks owed\n" if owes else b"ready\n", TEXT)


def show_metrics(call: Call) -> Answer:
    broker = call.broker
    if not broker.config.settings.metric_exporter:
        raise ApiError(404, "Set metric_exporter in the config's settings to have metrics")
    headers = b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
    return Answer(200, render_metrics(all_samples(broker, call.answered)), headers)


def describe(call: Call) -> Answer:
    """Answer OPTIONS, which needs no token and tells nothing about queues."""
    action = find_action(call.route.request)
    if action is None:                       # *
        action = Action(("GET", "HEAD", "POST"), "", describe,
                        f"Use /<action>/<queue>; actions: {_actions()}")
    headers = TEXT + b"Allow: %b\r\n" % action.allow.encode()
    return Answer(200, action.text.encode() + b"\n", headers)


GET_OR_POST, GET_OR_HEAD = ("GET", "POST"), ("GET", "HEAD")
LEASE = Parameter(required=True)
DELAY = Parameter(0, 30 * 24 * 3600)
LEASE_SECONDS = Parameter(1, 12 * 3600)
MAX = Parameter(1, 1000)

ACTIONS: Mapping[str, Action] = {
    "in": Action(("POST",), "post", put,
                 "POST: put the body into the queue as a message, or as one a line (NDJSON)",
                 {"delay": DELAY}, before_body=check_put),
    "out": Action(GET_OR_POST, "get", take, "GET: take the oldest message out of the queue",
                  {"wait": Parameter(0, 300), "lease": LEASE_SECONDS, "max": MAX}),
    "ack": Action(("POST",), "get", ack, "POST: the messages of a lease are done",
                  {"lease": LEASE}),
    "nack": Action(("POST",), "get", nack, "POST: the messages of a lease come back",
                   {"lease": LEASE, "delay": DELAY}),
    "extend": Action(("POST",), "get", extend, "POST: a lease ends in so many seconds from now",
                     {"lease": LEASE, "seconds": LEASE_SECONDS._replace(required=True)}),
    "peek": Action(GET_OR_HEAD, "peek", take, "GET: look at the oldest message without taking it",
                   {"max": MAX}),
    "compact": Action(GET_OR_POST, "admin", compact,
                      "GET: free the space of what is done"),
    "backup": Action(("GET",), "admin", backup,
                     "GET: a tar of the queue as it is now; unpacked, its folder"),
    "purge": Action(("POST",), "admin", purge, "POST: drop every message of the queue"),
    "stats": Action(GET_OR_HEAD, "any", show_stats, "GET: numbers of the token's queues as JSON"),
    "": Action(GET_OR_HEAD, "", show_root, "GET: one line that the service runs"),
    "healthz": Action(GET_OR_HEAD, "", show_root, "GET: 200 while the process serves"),
    "readyz": Action(GET_OR_HEAD, "", show_ready, "GET: 200 when queues are served"),
    "metrics": Action(GET_OR_HEAD, "", show_metrics, "GET: metrics for Prometheus"),
}
OPTIONS = Action(("OPTIONS",), "", describe, "OPTIONS: what a path takes")
NO_ROUTE = Route(Request(), OPTIONS)     # while no request is understood
PROBES = ("healthz", "readyz")   # not logged while they succeed


# -- from a head to its action

def give_route(call: Call, head: bytes, routes: Dict[bytes, Route]) -> None:
    """Give a call its route, which its head tells; `routes` are those of earlier heads, by their
    sha256, so that no token is kept. Raises ApiError; one that does not close refuses a request
    that is understood."""
    digest = hashlib.sha256(head).digest()
    route = routes.get(digest)
    if route is None:
        call.route = Route(parse_request(head), OPTIONS)
        route = find_route(call)
        # A head with a Lease-Id comes once, and a refusal is to be logged each time.
        if len(head) <= CACHED_HEAD_BYTES and LEASE not in route.action.parameters.values():
            if len(routes) >= CACHED_HEADS:
                del routes[next(iter(routes))]
            routes[digest] = route
    call.route = route
    if route.action.permission:
        check_ready(call.broker, route.action, route.queue)


def find_route(call: Call) -> Route:
    """Check a request in the documented order, as far as its head tells. Raises ApiError."""
    request, broker = call.route.request, call.broker
    action = find_action(request)
    if request.method == "OPTIONS":
        if action is None and request.action != "*":
            raise no_such_path()
        route = call.route
    elif action is None or action.permission:
        route = authorize(call, action)
    else:
        route = Route(request, action)
    if request.method not in route.action.methods:
        raise ApiError(405, f"Use {' or '.join(route.action.methods)} here",
                       headers=b"Allow: %b\r\n" % route.action.allow.encode())
    most = broker.config.settings.max_message_bytes
    if route.action.permission:
        numbers = parse_parameters(request.query, route.action)
        wish = Wish(numbers.get("max", 0), most, numbers.get("lease", 0),
                    route.action.permission == "peek")
        route = route._replace(parameters=numbers, wish=wish)
    if request.length != 0 and not route.action.before_body:
        raise ApiError(400, "No body is taken here; parameters belong in the query string")
    if (request.length or 0) > most:
        raise too_large(broker)
    if route.action.before_body and request.encoding not in ("", "identity"):
        raise ApiError(415, "Send the message without a Content-Encoding")
    return route


def find_action(request: Request) -> Optional[Action]:
    action = ACTIONS.get(request.action)
    on_queue = request.queue is not None
    good = action and (action.permission == "any" or bool(action.permission) == on_queue)
    return action if good else None


def _actions() -> str:
    return ", ".join(name for name, action in ACTIONS.items() if action.permission)


def no_such_path() -> ApiError:
    return ApiError(404, f"No such path; use /<action>/<queue> with an action of {_actions()}; a "
                         "queue's name is 1 to 50 letters, digits or hyphens")


def too_large(broker: Broker) -> ApiError:
    limit = broker.config.settings.max_message_bytes
    return ApiError(413, f"The body is larger than max_message_bytes ({limit})")


def unready(reason: str) -> ApiError:
    return ApiError(503, f"Not ready: {reason}; try again")


def check_ready(broker: Broker, action: Optional[Action], queue: object) -> None:
    """Refuse what is about queues while none is served; /stats tells that there are none."""
    if broker.unready and not (action and action.permission == "any" and queue is None):
        raise unready(broker.unready)


def authorize(call: Call, action: Optional[Action]) -> Route:
    """Return the request's token, the queue that it may use for this action, and as whom."""
    request, broker = call.route.request, call.broker
    check_ready(broker, action, request.queue)
    token = broker.tokens.get(request.token_digest or b"")
    if token is None:
        reason = ("Missing Authorization header" if request.token_digest is None else
                  "Unknown token" if request.token_digest else "Malformed Authorization header")
        call.log(logging.WARNING, "unauthorized", reason=reason)
        raise ApiError(401, f"{reason}; use 'Authorization: Bearer <token>'",
                       headers=b"WWW-Authenticate: Bearer\r\n")
    if action is None:
        raise no_such_path()
    if request.queue is None:
        return Route(request, action, token=token)
    if not token.may(action.permission, request.queue):
        call.log(logging.WARNING, "forbidden", token=token.name, action=request.action,
                 queue=request.queue)
        raise forbidden(action.permission, request.queue)
    queue = broker.queues.get(request.queue)
    if queue is None:
        raise ApiError(404, f"No queue is named {request.queue}; queues stand in the config")
    subscriber = next((name for name in (FIFO, token.name) if name in queue.subscribers), None)
    if subscriber is None and action.permission == "get":
        raise ApiError(403, "An admin token is no subscriber of a broadcast queue; use a token "
                            "without admin that has the queue in its get")
    return Route(request, action, queue, subscriber, token)


def forbidden(permission: str, queue: str) -> ApiError:
    if permission == "admin":
        return ApiError(403, "Only an admin token may do this")
    key = {"peek": "get", "any": "get or post"}.get(permission, permission)
    return ApiError(403, f"This token has no {queue} in its {key}: add it in the config, restart")


def parse_parameters(query: str, action: Action) -> Mapping[str, int]:
    """Return the query's parameters, each known to the action, given once and in its range."""
    found: Dict[str, int] = {}
    for part in query.split("&") if query else ():
        match = PARAMETER.fullmatch(part)
        parameter = action.parameters.get(match[1]) if match else None
        if match is None or parameter is None or match[1] in found:
            known = ", ".join(action.parameters) or "none"
            raise ApiError(400, f"Parameter {json.dumps(part[:80])} is unknown, empty, repeated "
                                f"or malformed; known here: {known}")
        value = parameter.parse(match[2])
        if value is None:
            raise ApiError(400, f"Parameter {match[1]} must be {parameter.text}")
        found[match[1]] = value
    for name, parameter in action.parameters.items():
        if parameter.required and name not in found:
            raise ApiError(400, f"Parameter {name} is missing in the URL's query; it is "
                                f"{parameter.text}")
    return found


# ---- Connection ---------------------------------------------------------------------------
# One client's bytes, in and out. Only the polling thread touches a connection, so nothing here
# needs a lock; what another thread has to say goes through `finish_with`.

READ, LATE, WRITE, LINGER, CLOSED = "read", "late", "write", "linger", "closed"
READING = READ, LINGER
EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
HANG_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
Received = Generator[None, None, T]          # yields when it needs more bytes, or gives way
Piece = Tuple[Union[bytes, memoryview], Optional[Answer]]    # an answer is at its last piece


class Handler(Call, http.server.BaseHTTPRequestHandler):
    """One connection, served a share of a round at a time. Of the base in the library nothing is
    used but its place there: its methods wait for the client."""

    def __init__(self, request: socket.socket, client_address: Tuple[Any, ...],
                 poll: Poll) -> None:
        # Not the base's, which would serve the whole connection from here.
        self.connection: socket.socket = request
        self.peer = f"{client_address[0]}:{client_address[1]}"
        self.poll, self.broker, self.answered = poll, poll.broker, poll.answered
        # state   event                                            next
        # READ    a whole request, answered at once                READ; WRITE if not all was sent
        # READ    its answer needs the round, a sync, a message    LATE, set before the action runs
        # READ    its share of the round is used up                READ, in the backlog
        # LATE    readable, or hung up                             LATE, only noted
        # LATE    an earlier answer is not taken: error, deadline  CLOSED
        # LATE    finished, taken up by the poll                   READ, WRITE
        # WRITE   all sent                                         READ, LINGER, CLOSED
        # LINGER  end of input                                     CLOSED
        # others: error, deadline                                  CLOSED; WRITE with a 408
        self.state = READ
        self.deadline = poll.now + poll.idle_timeout     # of `state`; see on_deadline
        self._readable = False               # since the last short read: epoll tells once
        self._hung_up = False                # no more input will come than is there
        self._data, self._at = b"", 0        # received; used up to `_at`
        self._checked = 0                    # of the head that is not whole, already looked at
        self._begun = False                  # a request's first byte came, its answer did not go
        self._moved = 0                      # bytes of body or answer since `deadline` was set
        self.route, self.body = NO_ROUTE, b""        # of the request under way
        self._started = 0.0                  # when that was read, for its log line
        self._body: Optional[Received[None]] = None  # receives its body; or skips what comes
        self._unread: float = 0              # bytes that nobody asked for; inf: who knows
        self._held = 0                       # what the body counts in the budget
        self._when_gone: Optional[Callable[[], None]] = None
        self._out: List[Piece] = []          # to be sent
        self._blocked = False                # the client took no more: epoll tells when it does
        self._closing = False                # once all is sent
        self._stream: Optional[Stream] = None        # of the answer under way, not yet at its end
        self._left_s = 0.0                   # of `deadline`: none while a piece of it is read
        poll.handlers[request.fileno()] = self
        poll.epoll.register(request, EVENTS)

    # -- what the poll and the actions call

    def on_event(self, events: int) -> None:
        """Note what the poll saw, and serve it unless something else comes first."""
        if events & ~select.EPOLLOUT:
            self._readable = True
        if events & HANG_UP:
            self._hung_up = True
            self.when_gone(self._when_gone)
        if self._blocked and events & select.EPOLLOUT:
            self._blocked = False
            self.poll.sending.append(self)
        if self not in self.poll.backlog:
            self.serve()

    def look_again(self) -> None:
        """Have it served in the next round as if there were something to read, and to send."""
        self._readable = True
        if self._out and not self._blocked:
            self.poll.sending.append(self)
        self.poll.backlog[self] = None

    def serve(self) -> None:
        """Serve one share of what there is; the rest waits in the backlog."""
        self.poll.share = SHARE_BYTES
        end = time.monotonic() + SHARE_S
        while self.state in READING and self.poll.share > 0:
            if self._at == len(self._data) and not self._receive():
                return
            try:
                moved = next(self._body, True) if self._body else self._next_request()
            except ApiError as error:
                moved = True
                self.take_up(error)
            if not moved and self.poll.share > 0 and not self._receive():
                if self.state == READ and not (self._begun or self._body):
                    self._await_next()
                return
            if time.monotonic() > end:
                break
        self.go_on()

    def go_on(self) -> None:
        """Have what is left served in a later round."""
        if self.state in READING and (self._readable or self._at < len(self._data)):
            self.poll.backlog[self] = None

    def finish_with(self, result: Union[Answer, bytes, Exception]) -> None:
        self.poll.finish(self, result)

    def is_gone(self) -> bool:
        fd = self.connection.fileno()
        if fd < 0:                           # closed for an earlier answer that was not taken
            return True
        poll = select.poll()
        poll.register(fd, select.POLLRDHUP)
        return bool(poll.poll(0))

    def when_gone(self, call: Optional[Callable[[], None]]) -> None:
        self._when_gone = call
        if self._hung_up and call:
            call()

    def on_deadline(self) -> None:
        """End what took too long; called by the sweep."""
        if self.state == READ and self._begun:
            timeout = self.poll.request_timeout
            self.take_up(malformed(f"The request did not arrive within {timeout} s", 408))
        else:
            self.close()

    @property
    def busy(self) -> bool:
        """Tell whether a request is under way, or an answer."""
        return self.state in (LATE, WRITE) or self._begun or bool(self._out)

    def close(self) -> None:
        """Close now. What could not leave is put back."""
        if self.state != CLOSED:
            self.state = CLOSED
            self.poll.handlers.pop(self.connection.fileno(), None)   # may be another's from now on
            self.connection.close()
            self._drop_body()
            for _, answer in self._out:
                self.drop(answer)
            self._out.clear()
            self.drop(self._stream)
            self._hung_up = True
            with contextlib.suppress(MemoryError):       # who matches the waiter finds it gone
                self.when_gone(self._when_gone)

    def drop(self, result: object) -> None:
        """Let go of an answer that does not leave. Its stream is closed where it is read: behind
        a piece that may be under way, and because closing a file that is freed takes long."""
        if isinstance(result, Answer):
            self.poll.left(result, sent=False)
            self.drop(result.body)
        elif isinstance(result, Stream):
            self.broker.read(result.close, lambda _: None)

    # -- requests

    def _receive(self) -> bool:
        """Receive once, if there may be something; return whether there was."""
        if not self._readable:
            return False
        try:
            received = self.connection.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._readable = False
            return False
        except OSError:
            received = b""
        if not received:
            self._end_input()
            return False
        size = len(received)
        self._readable = size == RECEIVE_BYTES or self._hung_up
        self._data = self._data[self._at:] + received if self._at < len(self._data) else received
        self._at = 0
        self.poll.share -= size
        self._moved += size
        if self._moved >= MIB and self.state == READ:
            self._wait_for(self.poll.request_timeout)
        return True

    def _wait_for(self, timeout: int) -> None:
        self.deadline, self._moved = self.poll.now + timeout, 0

    def _await_next(self) -> None:
        """Wait for the next request: if a part is here, the rest has to come in time from now on.
        An empty line before it is none of it."""
        left = len(self._data) - self._at
        self._begun = left > 2 or (left > 0 and self._data[self._at:] not in (b"\r", b"\r\n"))
        self._wait_for(self.poll.request_timeout if self._begun else self.poll.idle_timeout)

    def _end_input(self) -> None:
        """The client will send no more: answer what it sent, then close."""
        self._readable = self._begun = False
        self._data, self._at = b"", 0
        if self._out:
            self.state, self._closing = WRITE, True
        else:
            self.close()

    def _next_request(self) -> bool:
        """Call the next request's action, or receive its body first, if its head is whole; return
        whether it was. Raises ApiError."""
        data, at = self._data, self._at
        start = at + 2 if data.startswith(b"\r\n", at) else at       # RFC 9112, 2.2
        end = data.find(b"\r\n\r\n", max(start, at + self._checked - 3))
        if end < 0:
            check_head(data, start, at + self._checked)
            self._checked = len(data) - at
            return False
        self._at, self._checked = end + 4, 0
        self.poll.share -= SHARE_BYTES // SHARE_REQUESTS
        self._started = self.poll.now
        give_route(self, data[start:end], self.poll.routes)
        length = self.route.request.length
        if length is None or length > len(data) - self._at:
            self._body = self._receive_body(length)
            next(self._body, None)           # what is here may be all of it
        else:
            start, self._at = self._at, self._at + length
            self._act(data[start:self._at])
        return True

    def _act(self, body: bytes) -> None:
        """Call an action; its answer is given at once, or late."""
        self.body, self.state, self.deadline = body, LATE, math.inf
        result: Union[Answer, Exception, None]
        try:
            result = self.route.action.call(self)
        except Exception as error:
            result = error
        if result is not None:
            self.take_up(result)

    # -- bodies that are not here yet

    def _receive_body(self, length: Optional[int]) -> Received[None]:
        """Receive a body, after 100 Continue where the client waits for it, then call the
        action. Raises ApiError."""
        assert self.route.action.before_body is not None     # find_route refused it
        self.route.action.before_body(self)
        if self.route.request.expects and self._at == len(self._data):
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n", None)
        self._begun = True
        self._wait_for(self.poll.request_timeout)
        body: Any = yield from (self._chunks() if length is None
                                else self._exactly(length, bytearray()))
        self._act(body)                      # a bytearray is as good as bytes

    def _skip(self, size: float) -> Received[None]:
        """Let go of so many bytes, then wait for the next request."""
        while size > len(self._data) - self._at:
            size -= len(self._data) - self._at
            self._at = len(self._data)
            yield
        self._at += int(size)
        self._body = None
        self._await_next()

    def _exactly(self, size: int, body: bytearray) -> Received[bytearray]:
        """Append `size` bytes to `body`. Raises ApiError 503 when clients hold too much."""
        while True:
            start, self._at = self._at, min(self._at + size, len(self._data))
            body += self._data[start:self._at]
            size -= self._at - start
            more = len(body) - self._held
            if more > UNCOUNTED_BYTES:
                if not self.poll.budget.has_room(more):
                    raise no_room(close=True)
                self.poll.budget.hold(more)
                self._held += more
            if not size:
                return body
            yield

    def _line(self) -> Received[bytes]:
        """Return a line of a chunked body's framing, without its CR LF."""
        checked = 0
        while True:
            end = self._data.find(b"\n", self._at + checked)
            checked = (end + 1 if end >= 0 else len(self._data)) - self._at
            if checked > REQUEST_LINE_BYTES:
                raise malformed("A line of the chunked body is too long")
            if end >= 0:
                line, self._at = self._data[self._at:end + 1], end + 1
                check_line_ends(line, 0, len(line))
                return line[:-2]
            yield

    def _chunks(self) -> Received[bytearray]:
        """Receive a chunked body (RFC 9112, 7.1); extensions and trailers are skipped."""
        broker, body, extensions = self.broker, bytearray(), 0
        while True:
            length, extension = parse_chunk_line((yield from self._line()))
            extensions += extension
            if extensions > REQUEST_LINE_BYTES:
                raise malformed("The extensions of the chunked body are too long")
            if len(body) + length > broker.config.settings.max_message_bytes:
                raise too_large(broker)
            if not length:
                break
            yield from self._exactly(length, body)
            if (yield from self._exactly(2, bytearray())) != b"\r\n":
                raise malformed("A chunk ends in CR LF")
            self.poll.share -= SHARE_BYTES // SHARE_CHUNKS
            if self.poll.share <= 0:
                yield
        trailers: List[bytes] = []
        while len(trailers) <= REQUEST_FIELDS:
            line = yield from self._line()
            if not line:
                break
            trailers.append(line)
            if sum(map(len, trailers)) > REQUEST_HEAD_BYTES:
                raise malformed(f"The trailers are longer than {REQUEST_HEAD_BYTES} bytes", 431)
        parse_fields(trailers)
        return body

    def _drop_body(self) -> None:
        self.poll.budget.hold(-self._held)
        self._held, self._body = 0, None

    # -- answers

    def take_up(self, result: Union[Answer, bytes, Exception]) -> None:
        """Give the answer to the request under way. Called by the polling thread."""
        if self._stream:
            self._take_up_piece(result)
            return
        try:
            assert not isinstance(result, bytes)
            answer = result if isinstance(result, Answer) else self._answer_to(result)
            request, self._when_gone, self.body = self.route.request, None, b""
            if self._held or self._body:
                self._drop_body()
            self._unread = (math.inf if answer.close else 0 if self.state == LATE
                            else request.unread)
            ends = self._unread > SKIPPED_BODY_BYTES or self.broker.unready == DRAINING
            keep_alive = None if ends else request.keep_alive
            self._render(answer, request.method, keep_alive)
        except Exception:                    # what was taken for it is put back
            self.drop(result)
            raise
        action = request.action if request.action and request.action in ACTIONS else "other"
        self.answered[action, answer.status] += 1
        if self.poll.debug:
            self._log(request, answer)
        self.route = NO_ROUTE
        self._begun, self._closing = False, keep_alive is None
        if self._unread and not self._closing:
            self._body = self._skip(self._unread)
        self.state = (LATE if self._stream else      # for its pieces
                      WRITE if self._closing or self._blocked else READ)
        if self.state == READ and not self._body:
            self._await_next()
        else:
            self._wait_for(self.poll.request_timeout)

    def _take_up_piece(self, result: object) -> None:
        """Have the next piece of a stream sent. The last one ends the answer; one that could not
        be read ends the connection, so that the client sees that something is missing."""
        assert self._stream
        self.deadline = self.poll.now + self._left_s
        if not isinstance(result, bytes):
            event(logging.WARNING, "stream_cut_off", client=self.peer, error=result)
            self.close()
        elif result:
            self.poll.budget.hold(len(result))
            self._write(result, Answer(held=len(result)))
        else:
            self._stream, self.state = None, WRITE
            self.poll.sending.append(self)

    def _log(self, request: Request, answer: Answer) -> None:
        if not request.method:
            event(logging.DEBUG, "bad_request", client=self.peer, status=answer.status)
        elif request.action not in PROBES or answer.status != 200:
            self.log(logging.DEBUG, "request", method=request.method, action=request.action,
                     queue=request.queue, status=answer.status, bytes=len(answer.body),
                     ms=round((time.monotonic() - self._started) * 1000, 3))

    def _answer_to(self, error: Exception) -> Answer:
        if not isinstance(error, (ApiError, DiskFull, LogFailed)):       # what no client can do
            log_event.error("request_failed client=%s", self.peer, exc_info=error)
        return error_answer(error)

    def _render(self, answer: Answer, method: str, keep_alive: Optional[bytes]) -> None:
        head = render_head(answer, keep_alive)
        body = b"" if method == "HEAD" else answer.body
        if isinstance(body, Stream):
            self._stream, body = body, b""
        size = len(body)
        if size + sum([len(piece) for piece, _ in self._out]) > UNCOUNTED_BYTES:
            if not (answer.taken and answer.taken[1].held):
                answer = answer._replace(held=size)
                self.poll.budget.hold(size)
            if self.poll.budget.tight:       # no more for this client until it takes these
                self.poll.share = 0
        if size > UNCOUNTED_BYTES:           # not copied
            self._write(head, None)
            self._write(body, answer)
        else:
            self._write(head + body, answer)
        self.poll.share -= size

    def _write(self, data: bytes, answer: Optional[Answer]) -> None:
        """Have data sent at the end of the round; `answer` left when this has."""
        if not self._out:
            self.poll.sending.append(self)
        self._out.append((data, answer))

    def send(self) -> None:
        """Send until all is sent, or the client takes no more, or a share is used up. Called at
        the end of a round, when what the answers tell is written."""
        left, out = SHARE_BYTES, self._out
        try:
            while out and left > 0:
                if len(out) == 1:            # as nearly always
                    size = self.connection.send(out[0][0], socket.MSG_DONTWAIT)
                else:
                    size = self.connection.sendmsg([piece for piece, _ in out[:SENT_PIECES]], [],
                                                   socket.MSG_DONTWAIT)
                left -= size
                self._note_sent(size)
        except BlockingIOError:
            self._blocked = True
        except OSError:
            self.close()
            return
        if out:
            self._go_on_sending()
        elif self.state == LATE:
            if self._stream and self.deadline < math.inf:
                self._left_s = self.deadline - self.poll.now
                self.broker.read(self._stream.read, self.finish_with)
            self.deadline = math.inf
        elif self.state == WRITE and self._closing:
            self._end()
        elif self.state == WRITE:
            self.state = READ
            if not self._body:
                self._await_next()
            self.go_on()

    def _note_sent(self, size: int) -> None:
        self._moved += size
        out = self._out
        while out and size >= len(out[0][0]):
            piece, answer = out[0]
            if answer and (answer.taken or answer.held):
                self.poll.left(answer, sent=True)
            del out[0]
            size -= len(piece)
        if size:
            out[0] = memoryview(out[0][0])[size:], out[0][1]

    def _go_on_sending(self) -> None:
        """Send the rest in a later round: when the client takes more, if it did not now."""
        if self.state == READ or self.deadline == math.inf or self._moved >= MIB:
            self._wait_for(self.poll.request_timeout)
        if self.state == READ:
            self.state = WRITE
        if not self._blocked:
            self.poll.sending.append(self)

    # -- the end

    def _end(self) -> None:
        """Close once the client has stopped sending, so that a reset does not overtake the
        answer; what still comes is never looked at."""
        self.state, self._body = LINGER, self._skip(math.inf)
        self._wait_for(LINGER_S)
        try:
            if self._unread or self.connection.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT):
                self.connection.shutdown(socket.SHUT_WR)
                self._readable = True
                self.go_on()
                return
        except OSError:                      # nothing is there, or nobody
            pass
        self.close()


class Poll:
    """The poll of one thread, and what the connections that it serves share. Any thread may call
    `finish` and `ring`; only the polling thread touches anything else."""

    def __init__(self, broker: Broker, accept: Callable[[], None]) -> None:
        settings = broker.config.settings
        self.broker, self.budget, self._accept = broker, broker.budget, accept
        self.answered: Dict[Tuple[str, int], int] = collections.Counter()
        self.routes: Dict[bytes, Route] = {}     # see `lead`
        self.request_timeout, self.idle_timeout = settings.request_timeout, settings.idle_timeout
        self.debug = log_event.isEnabledFor(logging.DEBUG)
        self.handlers: Dict[int, Handler] = {}
        self.now = time.monotonic()          # when this round began
        self.share = 0                       # what is left of it for the connection that is served
        self.sending: List[Handler] = []     # those that have something to send in this round
        # Those that are to be served again when the others had their share, in this order.
        self.backlog: collections.OrderedDict[Handler, None] = collections.OrderedDict()
        self._done: Deque[Tuple[Handler, Union[Answer, bytes, Exception]]] = collections.deque()
        self._sleeping = False               # whoever adds to `_done` has to ring
        self._bell, self._rope = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.epoll = select.epoll()
        self.epoll.register(self._bell, select.EPOLLIN)

    # -- for any thread

    def finish(self, handler: Handler, result: Union[Answer, bytes, Exception]) -> None:
        """Have a late answer taken up."""
        self._done.append((handler, result))
        if self._sleeping:
            self.ring()

    def ring(self) -> None:
        """Have the poll wake up."""
        with contextlib.suppress(BlockingIOError):       # it rings already
            os.write(self._rope, b"!")

    # -- for connections

    def left(self, answer: Optional[Answer], *, sent: bool) -> None:
        """An answer left, or could not: settle what was taken for it, or put it back."""
        if answer and answer.held:
            self.budget.hold(-answer.held)
        if answer and answer.taken:
            queue, delivery = answer.taken
            try:
                (queue.settle if sent else queue.retry)(delivery)
            except BaseException as error:   # no memory: it would be out for ever
                queue.log.give_up(error)

    # -- a round, in its order

    def wait(self, seconds: float) -> None:
        """Wait until there is something to do; serve the connections that are ready."""
        self._sleeping = True                # before the look at `_done`
        if self._done or self.backlog or self.sending:
            seconds = 0
        events = self.epoll.poll(seconds, POLL_EVENTS)
        self._sleeping, self.now = False, time.monotonic()
        for fd, flags in events:
            handler = self.handlers.get(fd)
            if handler:
                if time.monotonic() > self.now + EVENTS_S:
                    self.backlog[handler] = None
                self._have(handler, handler.on_event, flags)
            elif fd == self._bell:
                os.read(self._bell, RECEIVE_BYTES)
            else:
                self._accept()

    def look_again(self) -> None:
        """After a round that was cut off: no event comes twice, so each connection may have had
        one, or something to send."""
        for handler in list(self.handlers.values()):
            handler.look_again()

    def sweep(self) -> None:
        """End what is over its deadline."""
        for handler in [h for h in self.handlers.values() if h.deadline < self.now]:
            self._have(handler, handler.on_deadline)

    def end_round(self) -> None:
        """Serve some of what was left over; write what the queues were told, and send what tells
        of it; write what left with that."""
        end = time.monotonic() + BACKLOG_S if self.backlog else 0
        for _ in range(len(self.backlog)):
            if time.monotonic() > end:
                break
            handler, _ = self.backlog.popitem(last=False)
            self._have(handler, handler.serve)
        broker = self.broker
        if broker.staging:
            broker.end_round()
        for _ in range(len(self._done)):
            handler, result = self._done.popleft()
            if handler.state == LATE:
                self._have(handler, handler.take_up, result)
                handler.go_on()
            else:                            # it was closed meanwhile
                handler.drop(result)
        sending, self.sending = self.sending, []
        for handler in sending:
            self._have(handler, handler.send)
        if broker.staging:
            broker.end_round()

    def _have(self, handler: Handler, act: Callable[..., None], *arguments: object) -> None:
        """Have a connection do something; what goes wrong then ends it, and the others go on."""
        try:
            act(*arguments)
        except LogFailed:                    # the process is about to end
            handler.close()
        except Exception:                    # not for anything that a client or a disk can do
            log_event.exception("connection_failed client=%s", handler.peer)
            handler.close()


# ---- Server -------------------------------------------------------------------------------
# One thread polls all connections and serves those that are ready, a round at a time; it waits
# for nothing else. So a request costs no switch of threads, and an idle connection no thread.

class Server(http.server.ThreadingHTTPServer):
    """Listens from the start on; the broker says whether its queues are served yet.

    Of ThreadingHTTPServer this uses how it binds and listens; not its thread for each
    connection, which would cost a switch of threads a request and a stack a client, nor the
    methods of BaseHTTPRequestHandler, which wait for one client.
    """

    request_queue_size = 1024
    _ending = threading.Lock()

    def __init__(self, broker: Broker) -> None:
        settings = broker.config.settings
        self.broker, self.poll = broker, Poll(broker, self._accept)
        self._refused: Set[Handler] = set()  # connections above the limit
        self._next_sweep = 0.0
        self._drain_until = math.inf         # a stop was asked for; when it has to be over
        self._ended = threading.Event()
        self._max_connections = _raise_file_limit(settings.max_connections, len(broker.queues))
        if ":" in settings.listen_address:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((settings.listen_address, settings.listen_port),
                             Handler)  # type: ignore[arg-type]
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            key = "listen_port" if isinstance(error, PermissionError) or getattr(
                error, "errno", 0) == errno.EADDRINUSE else "listen_address"
            raise ConfigError(f"settings.{key}: cannot listen on {settings.listen_address} "
                              f"port {settings.listen_port}: {reason}") from None
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)    # is inherited
        self.poll.epoll.register(self.socket, select.EPOLLIN)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the resolver for a name that nobody reads.
        socketserver.TCPServer.server_bind(self)

    def start(self) -> None:
        """Serve from now on, in a thread of its own. Raises RuntimeError if there is none."""
        threading.Thread(target=self.serve_forever, name="poll", daemon=True).start()

    def serve_forever(self, poll_interval: float = POLL_S) -> None:
        """Serve, in this thread, until `drain` was called and nothing is under way."""
        try:
            while self._drain_until == math.inf or not self._is_drained():
                try:
                    self.serve_round(poll_interval)
                except LogFailed:            # the process is about to end
                    time.sleep(PAUSE_S)
                except Exception:            # not for anything that a client or a disk can do
                    self.poll.look_again()
                    log_event.exception("serving_failed")
                    time.sleep(PAUSE_S)
        finally:
            self._ended.set()

    def serve_round(self, seconds: float) -> None:
        """Wait for that long at most until there is something to do, and do it."""
        self.poll.wait(seconds)
        if self.poll.now >= self._next_sweep:
            self._next_sweep = self.poll.now + POLL_S
            self.poll.sweep()
            if self._drain_until == math.inf:        # accept again after a pause
                self.poll.epoll.modify(self.socket, select.EPOLLIN)
        self.poll.end_round()

    # -- connections

    def _accept(self) -> None:
        """Accept what is there to accept, up to a round's worth."""
        for _ in range(POLL_EVENTS):
            try:
                connection, address = self.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    event(logging.ERROR, "cannot_accept", error=error.strerror)
                    self.poll.epoll.modify(self.socket, 0)   # a pause, not a spin
                return
            self._add(connection, address)

    def _add(self, connection: socket.socket, address: Tuple[Any, ...]) -> None:
        self._refused = {refused for refused in self._refused if refused.state != CLOSED}
        is_full = len(self.poll.handlers) - len(self._refused) >= self._max_connections
        if is_full and len(self._refused) >= REFUSED_CONNECTIONS:
            connection.close()
            return
        handler = Handler(connection, address, self.poll)
        if is_full:
            self._refused.add(handler)
            event(logging.WARNING, "too_many_connections", client=handler.peer)
            handler.take_up(ApiError(503, "Too many connections (max_connections); try again",
                                     close=True))

    # -- the end

    def drain(self) -> bool:
        """Stop accepting, let requests under way end (DRAIN_S at most), close every queue. Return
        whether all that memory knew is on disk."""
        self.broker.unready = DRAINING
        self._drain_until = time.monotonic() + DRAIN_S
        self.poll.ring()
        self._ended.wait(DRAIN_S + POLL_S)   # in vain if there was no thread to sync in
        done = self.broker.close()
        self.server_close()
        return done

    def _is_drained(self) -> bool:
        """Tell whether nothing is under way any more; called once a stop was asked for."""
        if self.socket.fileno() >= 0:
            self.poll.epoll.unregister(self.socket)
            self.socket.close()              # new clients are refused at once, not left to wait
            self.broker.dismiss()
        late = time.monotonic() > self._drain_until
        if late:
            event(logging.WARNING, "requests_cut_off")
        return late or not any(handler.busy for handler in self.poll.handlers.values())

    @classmethod
    def storage_failed(cls, failure: LogFailed) -> NoReturn:
        """End the process at once: what the disk holds is no longer known."""
        cls._ending.acquire()                # who comes second waits for the end
        event(logging.CRITICAL, "storage_failed", error=failure)
        logging.shutdown()
        os._exit(4)


def _raise_file_limit(max_connections: int, queue_count: int) -> int:
    """Raise the soft limit of open files to the hard one, which Linux knows no infinity of;
    return how many connections it allows."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    spare = 64 + 16 * queue_count            # segments, marks, sockets
    allowed = min(max_connections, max(1, limit - REFUSED_CONNECTIONS - spare))
    if allowed < max_connections:
        event(logging.WARNING, "max_connections_lowered", to=allowed, open_files_limit=limit)
    return allowed


# ---- main ---------------------------------------------------------------------------------
# argv, signals, exit codes: 0 drained, 1 config, 2 usage, 3 folder, 4 storage failed.

def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the server until SIGTERM or SIGINT; return the exit code."""
    parser = argparse.ArgumentParser(prog="micro_queue", description="A durable HTTP queue.")
    parser.add_argument("-c", "--config", required=True, help="path of the JSON config")
    parser.add_argument("--check", action="store_true", help="validate the config and exit")
    parser.add_argument("--version", action="version", version=__version__)
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config)
        if arguments.check:
            print(f"{arguments.config} is good")
            return 0
        return run(config)
    except (ConfigError, OSError, StorageError, LogFailed) as error:
        text = str(error)
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            text = f"{error.strerror}: raise their limit (ulimit -n, LimitNOFILE in systemd)"
        elif isinstance(error, OSError) and error.filename:
            text = (f"settings.path: cannot use {error.filename}: {error.strerror}; user "
                    f"{os.geteuid()} must own the queue folders and the files in them")
        print(f"micro_queue: {text}", file=sys.stderr)
        return 1 if isinstance(error, ConfigError) else 4 if isinstance(error, LogFailed) else 3


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(config: Config) -> int:
    """Serve a config until a signal. Raises ConfigError, StorageError, OSError."""
    debug = os.environ.get("MODE_DEBUG") == "1"
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, stream=sys.stderr,
                        format="%(asctime)s %(levelname)s %(message)s")
    threading.stack_size(THREAD_STACK_BYTES)
    # Before the first thread starts: one that got the signal would not wake this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    path, standby = config.settings.path, config.settings.standby
    reason = why_no_standby(path) if standby else None
    if reason:
        raise ConfigError(f"settings.standby: {reason}")
    broker = Broker(config, Server.storage_failed)
    if not standby:
        broker.lock()
    if mount_of(path).kind == "tmpfs" or os.path.realpath(path).startswith("/tmp/"):
        event(logging.WARNING, "path_is_temporary", path=path,
              advice="a reboot or a cleaner of /tmp removes it")
    server = Server(broker)
    try:
        server.start()
        if not standby or stand_by(broker):
            broker.recover()
            event(logging.INFO, "serving", address=server.server_address[0],
                  port=server.server_address[1], path=path, version=__version__)
            while not asked_to_stop(MAX_SLEEP_MS / 1000):
                pass
    except RuntimeError as error:            # what threading raises for want of a thread
        raise OSError(f"cannot start: {error}") from error
    event(logging.INFO, "draining")
    if not server.drain():
        event(logging.ERROR, "marks_owed", advice="the disk is full: some messages that were "
              "settled come back at the next start")
        return 4
    event(logging.INFO, "stopped")
    return 0


def stand_by(broker: Broker) -> bool:
    """Wait until all locks are ours; return False if a stop was asked for before."""
    known = ""
    while True:
        try:
            broker.lock()
            broker.unready = RECOVERING
            event(logging.INFO, "takes_over", path=broker.config.settings.path)
            return True
        except (StorageError, OSError) as error:
            if str(error) != known:
                event(logging.INFO, "standby", reason=error)
            known = str(error)
        if asked_to_stop(TAKEOVER_S):
            return False


def asked_to_stop(seconds: float) -> bool:
    """Wait for a signal; return whether one to stop came."""
    found = signal.sigtimedwait(SIGNALS, seconds)
    if found and found.si_signo == signal.SIGHUP:
        event(logging.WARNING, "no_reload", advice="restart to use a changed config")
    return found is not None and found.si_signo != signal.SIGHUP


if __name__ == "__main__":
    sys.exit(main())
