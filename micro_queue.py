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

Storage: `<path>/<queue>/data.log` is the truth, `meta.json` only a bookmark into it.

    log     = header record*
    header  = magic version log_id marker next_id crc32
    record  = marker type count id time delay length crc32 payload     (big-endian, see HEAD)
    message    id, time, delay                payload: the message
    settled    id: first of a run of ids      payload: last id, subscriber
    retry      id, count, delay               payload: subscriber
    position   id: settled below, waiting     payload: subscriber   (2^64-1: it left)
               from it on

    A record's crc starts from `log_id` and the record's own offset, so that no payload, copy
    or stale tail is ever taken for a record. A reader skips what is damaged up to the next
    valid record; damage with nothing valid behind it is a torn tail and is cut off.

Every change of state goes one way: validate, append, apply to memory, let go of the lock,
wait until durable, answer. Recovery applies the same records through the same function.

Serving: one thread polls all connections and serves them in rounds, without waiting for
anything. At the end of a round each queue writes what it was told, and each connection gets its
answers. An answer that is late is handed to that thread by whoever has it.

Lock order: Queue._maintenance, Queue.lock, then Log._one_sync, Log._commit, Budget._lock,
Broker._timing; Syncers._lock stands alone. Never two queues' locks at once, and no lock that a
take needs is held while a disk syncs, but for the last step of a compaction.

Contents: Constants and errors, Config, Records, Log, Subscription, Queue, Broker, Metrics,
HTTP messages, Actions, Connection, Server, main.
"""
from __future__ import annotations

import argparse
import base64
import bisect
import collections
import contextlib
import dataclasses
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
from typing import (Any, Callable, Deque, Dict, Generator, Iterable, Iterator, List, Mapping,
                    NamedTuple, NoReturn, Optional, Protocol, Sequence, Set, Tuple, Type, TypeVar,
                    Union)

if __name__ == "__main__":
    # http.server imports http.client, and that ssl, if there is one: 1.2 MiB that serve nobody.
    sys.modules["ssl"] = None  # type: ignore[assignment]
import http.server  # noqa: E402

__version__ = "2.0.0"

# ---- Constants and errors -----------------------------------------------------------------
# Sizes with their reason, and the errors that cross section borders.

KIB, MIB = 1 << 10, 1 << 20
LOG_CHUNK_BYTES = 256 * KIB      # one read of a scan: large enough that reads cost nothing
RECENT_MESSAGES = 1024           # of which it is known where they stand: 40 bytes each
AHEAD_BYTES = 16 * KIB           # what a subscription reads ahead: small, for each has its own
REWRITE_BYTES = MIB              # recovery rewrites the tail in pieces that fit any memory
ID_GAP = 1 << 24                 # more ids than could be lost unseen between two starts
LEFT = (1 << 64) - 1             # position of a subscriber that is no more
BOOKMARK_BYTES = 4 * MIB         # recovery scans about this much after a kill
BOOKMARK_GROWTH = 8              # a bookmark may cost an eighth of what the log grew
COMPACT_DEAD_BYTES = 16 * MIB    # below this, dead bytes are not worth a rewrite
COMPACT_DEAD_LOW_BYTES = 64 * KIB            # the same while the disk is nearly full
COMPACT_LOCKED_BYTES = 256 * KIB # the rest that compaction copies while it holds the lock
COMPACT_SLICE_S = 0.001          # a busy thread starves all others: work this long, then sleep
COMPACT_SYNC_BYTES = MIB         # more at once would keep the disk from those who put
COMPACT_SLEEP_S = 0.002
COMPACT_RETRY_S = 60             # after a failed compaction
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
    """A compaction was given up; the old log is in use and whole."""


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


# ---- Config -------------------------------------------------------------------------------
# JSON to frozen, validated values. A field's check is declared where the field is; one
# function walks them all, so that every refusal names its JSON path.

Check = Callable[[Any], Optional[str]]
FIFO = ""                        # the one subscriber of a fifo queue
QUEUE_NAME = re.compile(r"[-a-zA-Z0-9]{1,50}")
T = TypeVar("T")


def _field(check: Check, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"check": check})


def _flag(value: Any) -> Optional[str]:
    return None if isinstance(value, bool) else "must be true or false"


def _whole(low: int, high: int, *, null: bool = False) -> Check:
    def check(value: Any) -> Optional[str]:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if (null and value is None) or (whole and low <= value <= high):
            return None
        return f"must be a whole number from {low} to {high}" + (" or null" if null else "")
    return check


def _text(pattern: str, what: str, *, null: bool = False) -> Check:
    def check(value: Any) -> Optional[str]:
        if null and value is None:
            return None
        good = isinstance(value, str) and value.isprintable() and re.fullmatch(pattern, value)
        return None if good else f"must be {what}" + (" or null" if null else "")
    return check


def _names(value: Any) -> Optional[str]:
    good = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return None if good else "must be a list of queue names"


def _later(check: Check, default: Any) -> Check:
    """Refuse, for now, anything but the default."""
    return lambda value: check(value) or (None if value == default else "is not supported yet")


_queue_name = _text(QUEUE_NAME.pattern, "1 to 50 letters, digits or hyphens")
_path = _text(r"(?s)[^~].*", "a path; ~ is not expanded")
_address = _text(r"[0-9A-Za-z._-]+|[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Za-z.:%_-]*",
                 "a host name or address, without a port")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for the whole server; times in seconds, sizes in bytes."""

    listen_address: str = _field(_address, "127.0.0.1")
    listen_port: int = _field(_whole(0, 65535), 10000)
    path: str = _field(_path, "/tmp/micro_queue")
    metric_exporter: bool = _field(_flag, False)
    fsync: str = _field(_text("always|everysec|no", '"always", "everysec" or "no"'), "always")
    max_message_bytes: int = _field(_whole(1, MAX_MESSAGE_BYTES), 16 * MIB)
    min_free_bytes: int = _field(_whole(0, 1 << 50), 16 * MIB)
    max_connections: int = _field(_whole(1, 65536), 1024)
    max_inflight_bytes: Optional[int] = _field(_whole(2, 1 << 50, null=True), None)
    request_timeout: int = _field(_whole(1, 3600), 30)
    idle_timeout: int = _field(_whole(1, 86400), 75)
    standby: bool = _field(_later(_flag, False), False)
    tls_cert: Optional[str] = _field(_later(_text(".+", "a path", null=True), None), None)
    tls_key: Optional[str] = _field(_later(_text(".+", "a path", null=True), None), None)

    @property
    def inflight_bytes(self) -> int:
        """What `max_inflight_bytes` is, or is by default."""
        return self.max_inflight_bytes or max(2 * self.max_message_bytes, 256 * MIB)


@dataclasses.dataclass(frozen=True)
class QueueConfig:
    """One queue; `ttl` in seconds."""

    name: str = _field(_queue_name)
    kind: str = _field(_text("fifo|broadcast", '"fifo" or "broadcast"'), "fifo")
    content_type: str = _field(_text(r"[!-~]([ -~]{0,126}[!-~])?", "a media type"),
                               "application/json")
    max_messages: Optional[int] = _field(_whole(1, 1 << 50, null=True), None)
    max_bytes: Optional[int] = _field(_whole(1, 1 << 50, null=True), None)
    ttl: Optional[int] = _field(_whole(1, 1 << 32, null=True), None)
    max_deliveries: Optional[int] = _field(_whole(1, 1 << 31, null=True), None)
    dead_letter: Optional[str] = _field(_text(QUEUE_NAME.pattern, "a queue's name", null=True),
                                        None)


@dataclasses.dataclass(frozen=True)
class Token:
    """Who may do what. `parse_config` keeps of the secret only its sha256."""

    name: str = _field(_text(".{1,100}", "1 to 100 printable characters"))
    token: Optional[str] = _field(
        _text("[!-~]{20,500}", "20 to 500 visible ASCII characters, e.g. a UUID"), None)
    token_sha256: Optional[str] = _field(_text("[0-9a-fA-F]{64}", "64 hex digits"), None)
    post: Sequence[str] = _field(_names, ())
    get: Sequence[str] = _field(_names, ())
    admin: bool = _field(_flag, False)

    @property
    def digest(self) -> bytes:
        if self.token is not None:
            return hashlib.sha256(self.token.encode("ascii")).digest()
        return bytes.fromhex(self.token_sha256 or "")

    def without_secret(self) -> Token:
        return dataclasses.replace(self, token=None, token_sha256=self.digest.hex())

    def may(self, permission: str, queue: str) -> bool:
        if self.admin:
            return True
        return ((permission in ("post", "any") and queue in self.post)
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


class _Object(Dict[str, Any]):
    """A JSON object that remembers a key that came twice."""

    twice: Optional[str] = None

    @classmethod
    def of_pairs(cls, pairs: List[Tuple[str, Any]]) -> _Object:
        found = cls(pairs)
        counts = collections.Counter(key for key, _ in pairs)
        found.twice = next((key for key, count in counts.items() if count > 1), None)
        return found


def load_config(path: str) -> Config:
    """Read and validate the JSON file at `path`. Raises ConfigError with one line."""
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    try:
        value = json.loads(text, object_pairs_hook=_Object.of_pairs)
    except (ValueError, RecursionError) as error:
        advice = "" if text.lstrip().startswith(b"{") else (
            "; YAML is converted with `yq . FILE > config.json` (Debian's yq) or "
            "`yq -o json . FILE > config.json` (mikefarah's)")
        raise ConfigError(f"{path} is not JSON ({error}){advice}") from None
    return parse_config(value)


def parse_config(value: Any) -> Config:
    """Check a parsed JSON document. Raises ConfigError."""
    _check_keys(value, "config", {"settings", "queues", "tokens"})
    settings = _build(Settings, value.get("settings", {}), "settings")
    config = Config(settings, _build_all(QueueConfig, value, "queues"),
                    _build_all(Token, value, "tokens"))
    _check_unique("queues", "name", [queue.name for queue in config.queues])
    _check_unique("tokens", "name", [token.name for token in config.tokens])
    if settings.inflight_bytes < 2 * settings.max_message_bytes:
        raise ConfigError("settings.max_inflight_bytes: must be at least twice max_message_bytes "
                          f"({settings.max_message_bytes}), or null")
    _check_dead_letters(config)
    _check_tokens(config)
    for number, queue in enumerate(config.queues):
        if not config.subscribers(queue):
            raise ConfigError(f"queues[{number}].kind: a broadcast queue needs a subscriber: a "
                              f"token without admin that has {queue.name} in its get")
    tokens = tuple(token.without_secret() for token in config.tokens)
    return dataclasses.replace(config, tokens=tokens)


def _check_keys(value: Any, path: str, known: Iterable[str]) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must be a JSON object")
    if isinstance(value, _Object) and value.twice is not None:
        raise ConfigError(f"{path}.{value.twice}: stands there twice; remove one")
    for key in value:
        if key not in known:
            raise ConfigError(f"{path}.{key}: unknown key; known are {', '.join(sorted(known))}")


def _build(cls: Type[T], value: Any, path: str) -> T:
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    _check_keys(value, path, fields)
    for name, field in fields.items():
        if name in value:
            null = value[name] is None and field.default is None
            problem = None if null else field.metadata["check"](value[name])
            if problem:
                raise ConfigError(f"{path}.{name}: {problem}")
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{path}.{name}: is missing")
    return cls(**{key: tuple(item) if isinstance(item, list) else item
                  for key, item in value.items()})


def _build_all(cls: Type[T], config: Mapping[str, Any], key: str) -> Sequence[T]:
    items = config.get(key)
    if not isinstance(items, list) or not items:
        raise ConfigError(f"{key}: must be a list with at least one entry")
    return tuple(_build(cls, item, f"{key}[{number}]") for number, item in enumerate(items))


def _check_unique(path: str, key: str, values: Sequence[object]) -> None:
    for number, value in enumerate(values):
        first = values.index(value)
        if first != number:
            raise ConfigError(f"{path}[{number}].{key}: is the same as {path}[{first}].{key}")


def _check_dead_letters(config: Config) -> None:
    targets = {queue.name: queue.dead_letter for queue in config.queues}
    for number, queue in enumerate(config.queues):
        path, seen, target = f"queues[{number}].dead_letter", {queue.name}, queue.dead_letter
        while target is not None:
            if target not in targets:
                raise ConfigError(f"{path}: no queue is named {json.dumps(target)}")
            if target in seen:
                raise ConfigError(f"{path}: dead letters would go round in a circle; end it")
            seen.add(target)
            target = targets[target]


def _check_tokens(config: Config) -> None:
    names = {queue.name for queue in config.queues}
    for number, token in enumerate(config.tokens):
        if (token.token is None) == (token.token_sha256 is None):
            raise ConfigError(f"tokens[{number}]: needs exactly one of token and token_sha256")
        for key in ("post", "get"):
            for place, name in enumerate(getattr(token, key)):
                if name not in names:
                    raise ConfigError(
                        f"tokens[{number}].{key}[{place}]: no queue is named {json.dumps(name)}")
    _check_unique("tokens", "token", [token.digest for token in config.tokens])


# ---- Records ------------------------------------------------------------------------------
# Bytes to records and back. Knows no files: an offset is a number that goes into the crc.

MESSAGE, SETTLED, RETRY, POSITION = 1, 2, 3, 4
MAGIC = b"\x89mqlog\r\n"         # the first byte is not zero: a Go server's log starts with one
FORMAT_VERSION = 1
HEADER = struct.Struct(">8sI16s4sQI")        # magic, version, log_id, marker, next id, crc32
HEAD = struct.Struct(">4sBIQQIII")           # marker, type, count, id, time, delay, length, crc32
UNSEALED = struct.Struct(">4sBIQQII")        # HEAD without its crc32
U32, U64 = struct.Struct(">I"), struct.Struct(">Q")


class Record(NamedTuple):
    """One entry of a log. `time_ms` is the queue's clock, `delay_ms` counts from it."""

    type: int
    id: int
    time_ms: int
    payload: bytes
    deliveries: int = 0
    delay_ms: int = 0

    @property
    def due_ms(self) -> int:
        """When the delay is over; 0 without one."""
        return self.time_ms + self.delay_ms if self.delay_ms else 0


Placed = Tuple[int, int, Record]             # a record with its offset and end


def settled(first: int, last: int, subscriber: str, now_ms: int) -> Record:
    return Record(SETTLED, first, now_ms, U64.pack(last) + subscriber.encode())


def retry(message_id: int, count: int, due_ms: int, subscriber: str, now_ms: int) -> Record:
    return Record(RETRY, message_id, now_ms, subscriber.encode(), count, max(0, due_ms - now_ms))


def position(message_id: int, subscriber: str, now_ms: int) -> Record:
    return Record(POSITION, message_id, now_ms, subscriber.encode())


class Codec:
    """Encodes and decodes the records of one log, told apart by `log_id` and `marker`."""

    def __init__(self, log_id: bytes, marker: bytes, next_id: int) -> None:
        self.log_id, self.marker, self.next_id = log_id, marker, next_id
        self._seed = zlib.crc32(log_id)

    @classmethod
    def new(cls, next_id: int) -> Codec:
        marker = b"\0" * 4
        while 0 in marker:       # so that no run of zeros is ever part of a record's start
            marker = secrets.token_bytes(4)
        return cls(secrets.token_bytes(16), marker, next_id)

    def header(self) -> bytes:
        head = HEADER.pack(MAGIC, FORMAT_VERSION, self.log_id, self.marker, self.next_id, 0)
        return head[:-U32.size] + U32.pack(zlib.crc32(head[:-U32.size]))

    @classmethod
    def of_header(cls, data: bytes) -> Optional[Codec]:
        """Return the codec of a valid header, None for anything else."""
        if len(data) < HEADER.size:
            return None
        magic, version, log_id, marker, next_id, crc = HEADER.unpack_from(data)
        good = crc == zlib.crc32(data[:HEADER.size - U32.size])
        return cls(log_id, marker, next_id) if (
            good and magic == MAGIC and version == FORMAT_VERSION) else None

    def encode(self, records: Iterable[Record],
               offset: int) -> Tuple[bytes, List[Tuple[int, int]]]:
        """Return the bytes of records as they stand from `offset` on, and only there; and the
        (offset, size) of each."""
        parts: List[bytes] = []
        places: List[Tuple[int, int]] = []
        marker, seed, crc32 = self.marker, self._seed, zlib.crc32
        for type_, id_, time_ms, payload, count, delay_ms in records:
            head = UNSEALED.pack(marker, type_, count, id_, time_ms, delay_ms, len(payload))
            crc = crc32(payload, crc32(head, crc32(U64.pack(offset), seed)))
            parts += (head, U32.pack(crc), payload)
            size = HEAD.size + len(payload)
            places.append((offset, size))
            offset += size
        return b"".join(parts), places

    def size_of(self, data: bytes) -> int:
        """Return the size of the record that seems to start `data`, 0 if none does."""
        if len(data) < HEAD.size or not data.startswith(self.marker):
            return 0
        length: int = HEAD.unpack_from(data)[6]
        return HEAD.size + length if length <= MAX_MESSAGE_BYTES else 0

    def records(self, data: bytes, at: int, offset: int) -> Iterator[Placed]:
        """Yield the whole and valid records in `data` from `at` on, which stands at `offset` in
        the log, up to the first that is neither."""
        marker, seed, crc32, unpack_from = self.marker, self._seed, zlib.crc32, HEAD.unpack_from
        size, last = HEAD.size, len(data) - HEAD.size
        while at <= last:
            found, type_, count, id_, time_ms, delay_ms, length, crc = unpack_from(data, at)
            body = at + size
            after = body + length
            if found != marker or length > MAX_MESSAGE_BYTES or after > len(data):
                return
            payload = data[body:after]
            start = crc32(data[at:body - U32.size], crc32(U64.pack(offset), seed))
            if crc32(payload, start) != crc:
                return
            end = offset + size + length
            yield offset, end, Record(type_, id_, time_ms, payload, count, delay_ms)
            at, offset = after, end


# ---- Log ----------------------------------------------------------------------------------
# One file: lock, recover, append, wait until durable, replace. Knows nothing of queues.
# All that touches the disk goes through one small object, so that a test can be the disk.

LOG_NAME, META_NAME, TEMPORARY = "data.log", "meta.json", ".tmp"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_open_files: Set[Tuple[int, int]] = set()    # (device, inode): closing a second descriptor of
_open_files_lock = threading.Lock()          # a file would drop the first one's lock


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

    def write_all(self, fd: int, data: bytes, offset: int) -> None:
        """Write all of `data`. Raises OSError(ENOSPC) for a short write."""
        if self.pwrite(fd, data, offset) != len(data):
            raise OSError(errno.ENOSPC, "short write")

    def write_file(self, path: str, data: bytes) -> None:
        """Write a file under its temporary name, sync it, rename it; durable on return."""
        fd = self.open(path + TEMPORARY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            self.write_all(fd, data, 0)
            self.fsync(fd)
        finally:
            self.close(fd)
        self.rename(path + TEMPORARY, path)
        self.fsync_folder(os.path.dirname(path))


class Log:
    """An append-only file of records, locked for as long as it is open.

    Its owner calls all but what stands under "durability" under a lock of its own (the owner's
    lock below). Invariants:
    1. `tail` is the end of the last whole record; nothing is ever written below it.
    2. `appends` and `durable` count appends and only grow; `durable <= appends`.
    3. `fd` changes only under both the owner's lock and `_commit`; a replaced descriptor is
       closed by `close_replaced` once no sync may still use it.
    4. Once `failure` is set nothing is written, synced or answered any more.
    """

    def __init__(self, folder: str, fsync: str = "always",
                 storage: Optional[Storage] = None) -> None:
        self.folder, self.path = folder, os.path.join(folder, LOG_NAME)
        self.storage = storage or Storage()
        self.fsync = fsync
        self.codec = Codec(bytes(16), bytes(4), 1)       # until `load`
        self.fd = -1
        self.tail = HEADER.size
        self.appends = 0
        self.durable = 0
        self.failure: Optional[LogFailed] = None
        self.damaged: Set[int] = set()       # offsets in this log that were reported
        self.corrupt_records = 0
        self.syncs, self.sync_seconds = 0, 0.0
        self._one_sync = threading.Lock()    # held while a descriptor syncs; before `_commit`
        self._commit = threading.Lock()      # guards what follows, `durable` and `fd`
        self._leading = False                # somebody syncs for those who wait
        self._followers: List[Tuple[int, Callable[[Optional[LogFailed]], None]]] = []
        self._retired: List[int] = []        # replaced descriptors, not yet closed

    # -- opening

    def lock(self) -> None:
        """Create an empty file if there is none, and lock it for the life of this object.

        Raises StorageError at once if another process, or this one, holds it.
        """
        self.storage.make_folder(self.folder)
        if os.stat(self.folder).st_uid != os.geteuid():
            raise StorageError(f"{self.folder} belongs to another user; run as that user or "
                               f"change its owner")
        while self.fd < 0:
            fd = self._open_once()
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._close(fd)
                raise self._in_use() from None
            if self._is_path(fd):
                self.fd = fd
            else:                            # replaced between open and lock
                self._close(fd)

    def _open_once(self) -> int:
        with _open_files_lock:
            with contextlib.suppress(FileNotFoundError):
                if _identity(os.stat(self.path)) in _open_files:
                    raise self._in_use()
            fd = self.storage.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            _open_files.add(_identity(os.fstat(fd)))
            return fd

    def _close(self, fd: int) -> None:
        with _open_files_lock:
            _open_files.discard(_identity(os.fstat(fd)))
            self.storage.close(fd)

    def _in_use(self) -> StorageError:
        return StorageError(f"{self.folder} is in use by another micro_queue; stop it first")

    def _is_path(self, fd: int) -> bool:
        try:
            return _identity(os.stat(self.path)) == _identity(os.fstat(fd))
        except OSError:
            return False

    def load(self) -> bool:
        """Read the header; make a new log of an empty file, all zeros or the Go server's.

        Returns whether the log is new. Raises StorageError for anything else.
        """
        for name in (LOG_NAME, META_NAME):
            with contextlib.suppress(FileNotFoundError):
                self.storage.unlink(os.path.join(self.folder, name + TEMPORARY))
        start = self.read_bytes(0, HEADER.size)
        codec = Codec.of_header(start)
        if codec is not None:
            self.codec = codec
            return False
        if self._is_zeros(0, self._size()):
            self._start_new(iter(()))
        elif start[0] == 0 and start[1:len(MAGIC)] != MAGIC[1:]:
            self._take_over()
        else:
            raise StorageError(f"{self.path} is not a log that this version can read; it was "
                               "left as it is: restore it from a backup, or move it away")
        return True

    def _start_new(self, batches: Iterator[List[Record]]) -> None:
        fresh = self.fresh(1)
        for records in batches:
            fresh.append(records)
        self.replace_with(fresh)
        self.close_replaced()

    def _take_over(self) -> None:
        """Rewrite the Go server's folder; both its files are kept as `.legacy`.

        A crash between the steps is repeated without harm: until the rename at the end the
        folder is the Go server's, and the links are found as they were made.
        """
        for name in (LOG_NAME, META_NAME):
            old = os.path.join(self.folder, name)
            if os.path.exists(old) and not _same_file(old, old + ".legacy"):
                try:
                    self.storage.link(old, old + ".legacy")
                except FileExistsError:
                    raise StorageError(f"{old}.legacy is in the way of taking over {old}; "
                                       "move it elsewhere") from None
        self.storage.fsync_folder(self.folder)
        legacy = LegacyLog(self)
        self._start_new(legacy.batches())
        event(logging.WARNING, "took_over", folder=self.folder, messages=legacy.messages,
              kept=LOG_NAME + ".legacy")

    # -- reading

    def _size(self) -> int:
        return os.fstat(self.fd).st_size

    def read_bytes(self, offset: int, size: int) -> bytes:
        """Read `size` bytes, fewer only at the end of the file. Raises LogFailed."""
        data = b""
        while len(data) < size:
            try:
                more = self.storage.pread(self.fd, size - len(data), offset + len(data))
            except OSError as error:
                self._fail("read", error)
            if not more:
                break
            data = data + more if data else more
        return data

    def _is_zeros(self, start: int, end: int) -> bool:
        return not any(self.read_bytes(at, min(LOG_CHUNK_BYTES, end - at)).strip(b"\0")
                       for at in range(start, end, LOG_CHUNK_BYTES))

    def scan(self, start: int, end: int,
             chunk: int = LOG_CHUNK_BYTES) -> Iterator[Tuple[int, int, Optional[Record]]]:
        """Yield (offset, end, record) from `start` on; None instead of a record for damage.

        Damage reaches to the next valid record, or to `end`.
        """
        offset, base, data = start, start, b""
        while offset < end:
            for place in self.codec.records(data, offset - base, offset):
                yield place
                offset = place[1]
            if offset >= end:
                return
            have = len(data) if offset == base else 0    # already tried, and not enough
            want = self.codec.size_of(data) if have else chunk
            more = self.read_bytes(offset, min(want, end - offset)) if want > have else b""
            if len(more) > have:
                base, data = offset, more
            else:
                after = self._next_valid(offset + 1, end)
                yield offset, after, None
                offset = after

    def _next_valid(self, start: int, end: int) -> int:
        """Return where the first valid record at or behind `start` stands, `end` if none."""
        overlap = len(self.codec.marker) - 1
        for base in range(start, end, LOG_CHUNK_BYTES):
            data = self.read_bytes(base, min(LOG_CHUNK_BYTES + overlap, end - base))
            at = data.find(self.codec.marker)
            while at >= 0:
                if self.read(base + at, end):
                    return base + at
                at = data.find(self.codec.marker, at + 1)
        return end

    def read(self, offset: int, end: Optional[int] = None) -> Optional[Record]:
        """Return the record at `offset`, None if no valid one stands there below `end`."""
        end = self.tail if end is None else end
        data = self.read_bytes(offset, min(HEAD.size + AHEAD_BYTES, end - offset))
        size = self.codec.size_of(data)
        if len(data) < size <= end - offset:
            data = self.read_bytes(offset, size)
        place = next(self.codec.records(data, 0, offset), None)
        return place[2] if place else None

    # -- recovery

    def recover(self, start: int, apply: Callable[[Record, int, int], None]) -> None:
        """Apply every record from `start` on, cut a torn tail, make all of it durable.

        What was answered lies before any hole that was not synced, or is itself valid: so
        what is valid behind damage is good, and is used.
        """
        size = self._size()
        self.tail = start
        for offset, end, record in self.scan(start, size):
            if record is not None:
                apply(record, offset, end - offset)
            elif end < size:
                self.set_aside(offset, end)
            else:
                self._cut_tail(offset, size)
                break
            self.tail = end
        for at in range(start, self.tail, REWRITE_BYTES):
            # A sync that failed before a crash leaves pages that are clean but not on disk.
            data = self.read_bytes(at, min(REWRITE_BYTES, self.tail - at))
            self.storage.write_all(self.fd, data, at)
        self.storage.fdatasync(self.fd)
        self.storage.fsync_folder(self.folder)

    def _cut_tail(self, offset: int, end: int) -> None:
        if not self._is_zeros(offset, end):
            self._save(offset, end)
            event(logging.WARNING, "torn_tail", log=self.path, offset=offset, bytes=end - offset)
        self.storage.truncate(self.fd, offset)

    def set_aside(self, offset: int, end: int) -> None:
        """Count, report and save damaged bytes, once for each place."""
        if offset not in self.damaged:
            self.damaged.add(offset)
            self.corrupt_records += 1
            event(logging.ERROR, "corrupt_record", log=self.path, offset=offset,
                  bytes=end - offset)
            self._save(offset, end)

    def _save(self, offset: int, end: int) -> None:
        name = f"{self.path}.corrupt-{self.codec.log_id.hex()}-{offset}"
        try:
            fd = self.storage.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                for at in range(offset, end, REWRITE_BYTES):
                    data = self.read_bytes(at, min(REWRITE_BYTES, end - at))
                    self.storage.write_all(fd, data, at - offset)
                self.storage.fsync(fd)
            finally:
                self.storage.close(fd)
        except OSError as error:             # the bytes are lost anyway; serving goes first
            event(logging.WARNING, "corrupt_record_not_saved", file=name, error=error.strerror)

    # -- appending

    def append(self, records: Sequence[Record],
               apply: Callable[[Record, int, int], None] = lambda *_: None) -> None:
        """Write records at the tail with one pwrite, then apply each, with its offset and size.

        Not durable on return. Raises ApiError 503 when the disk is full, the log being as
        before; LogFailed when it is not known to be, or when memory no longer agrees with it.
        """
        if self.failure:
            raise self.failure
        data, places = self.codec.encode(records, self.tail)
        try:
            self.storage.write_all(self.fd, data, self.tail)
        except OSError as error:
            self._undo_append(error)
        self.tail += len(data)
        self.appends += 1                    # invariant 2: after its write ended
        try:
            for record, (offset, size) in zip(records, places):
                apply(record, offset, size)
        except Exception as error:
            self._fail("apply", error)

    def _undo_append(self, error: OSError) -> NoReturn:
        if error.errno not in NO_SPACE:
            self._fail("write", error)
        try:
            self.storage.truncate(self.fd, self.tail)
        except OSError as again:
            self._fail("truncate", again)
        raise ApiError(503, "The disk is full; nothing was queued, try again later") from None

    def _fail(self, doing: str, error: Exception) -> NoReturn:
        """Poison the log (invariant 4): every waiter and later call raises LogFailed."""
        reason = getattr(error, "strerror", None) or repr(error)
        failure = LogFailed(f"cannot {doing} {self.path}: {reason}")
        with self._commit:
            self.failure = self.failure or failure
            followers, self._followers = self._followers, []
        for _, call in followers:
            call(self.failure)
        raise failure from error

    # -- durability

    def when_durable(self, number: int, call: Callable[[Optional[LogFailed]], None]) -> bool:
        """Have `call(None)` made once append `number` is as durable as `fsync` asks for.

        Does not block; `call` is made at once, or by whoever syncs, with the failure if that
        fails. Returns whether it is the caller's turn to have `lead` called.
        """
        if self.fsync == "always":
            with self._commit:
                if self.failure:
                    raise self.failure
                if self.durable < number:
                    self._followers.append((number, call))
                    turn, self._leading = not self._leading, True
                    return turn
        call(None)
        return False

    def lead(self) -> None:
        """Sync until nobody waits: one sync for all whose writes ended before it began."""
        while self.lead_once():
            pass

    def lead_once(self) -> bool:
        """Sync and tell those whom that serves. Returns whether the caller is to go on."""
        self.sync()
        with self._commit:
            ready = [call for number, call in self._followers if number <= self.durable]
            self._followers = [f for f in self._followers if f[0] > self.durable]
            self._leading = more = bool(self._followers) and self.fd >= 0
        for call in ready:
            call(None)
        return more

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
            if self.fd >= 0 and (number is None or number > self.durable):
                self._sync_once()
        finally:
            self._one_sync.release()

    def _sync_once(self) -> None:
        """Called with `_one_sync` held: of two at once only one would be told of an error."""
        with self._commit:
            target, fd = self.appends, self.fd
        started = time.perf_counter()
        try:
            self.storage.fdatasync(fd)
        except Exception as error:           # whatever it is: the kernel tells it only once
            self._fail("sync", error)
        with self._commit:
            self.syncs += 1
            self.sync_seconds += time.perf_counter() - started
            self.durable = max(self.durable, target)

    def close_replaced(self) -> None:
        """Close descriptors of replaced files; slow, for that frees a whole file's space."""
        with self._one_sync, self._commit:   # so that no sync uses them (invariant 3)
            old, self._retired = self._retired, []
        for fd in old:
            self._close(fd)

    # -- replacing

    def fresh(self, next_id: int) -> Log:
        """Return a new, locked log under the temporary name, to be filled and put in place."""
        fresh = Log(self.folder, self.fsync, self.storage)
        fresh.codec = Codec.new(next_id)
        self.storage.make_folder(self.folder)            # someone may have removed it
        path = self.path + TEMPORARY
        fresh.fd = self.storage.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        with _open_files_lock:
            _open_files.add(_identity(os.fstat(fresh.fd)))
        try:
            fcntl.lockf(fresh.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.storage.write_all(fresh.fd, fresh.codec.header(), 0)
        except OSError as error:
            fresh.discard()
            raise CompactionFailed(f"cannot write {path}: {error.strerror}") from None
        return fresh

    def discard(self) -> None:
        """Remove a fresh log that is not wanted after all."""
        self._close(self.fd)
        with contextlib.suppress(OSError):
            self.storage.unlink(self.path + TEMPORARY)

    def replace_with(self, fresh: Log) -> None:
        """Put `fresh` in this log's place; durable on return. The rename is the commit point.

        Before it any error leaves the old log in use (OSError, CompactionFailed); after it
        any error is the end (LogFailed), for it is not known which file the next start finds.
        """
        if self.failure:
            raise self.failure
        self.storage.fsync(fresh.fd)
        self._check_ownership()
        # Opened before the commit point: a lack of descriptors is no reason to end.
        folder = self.storage.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.storage.rename(self.path + TEMPORARY, self.path)
            try:
                self.storage.fsync(folder)
                fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._fail("replace", error)
        finally:
            self.storage.close(folder)
        with self._commit:                   # invariant 3
            old, self.fd = self.fd, fresh.fd
            self.codec, self.tail, self.damaged = fresh.codec, fresh.tail, set()
            self.durable = self.appends
            self._retired.append(old)

    def _check_ownership(self) -> None:
        """Raise unless the lock still holds and nobody else's log stands at our path.

        On a shared filesystem another node may have taken over; its log is locked.
        """
        fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not self._is_path(self.fd) and os.path.exists(self.path):
            fd = self.storage.open(self.path, os.O_RDWR)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._fail("keep", error)
            finally:
                self.storage.close(fd)

    def is_in_place(self) -> bool:
        """Tell whether the path still leads to this log."""
        return self._is_path(self.fd)

    def close(self) -> None:
        """Let go of the file and its lock, after a sync that is under way. Does not sync; who
        still waits is not answered."""
        self.close_replaced()
        with self._one_sync, self._commit:
            self._followers.clear()
            if self.fd >= 0:
                self._close(self.fd)
                self.fd = -1


def _identity(status: os.stat_result) -> Tuple[int, int]:
    return status.st_dev, status.st_ino


def _same_file(one: str, other: str) -> bool:
    return os.path.exists(other) and os.path.samefile(one, other)


class LegacyLog:
    """The messages that wait in a folder of the Go server.

    Its log is (length u64, bytes)*, its `meta.json` {"head_offset", "tail_offset"}. It never
    syncs, and it compacts by a rename before it saves the offsets of the renamed file.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._size = os.fstat(log.fd).st_size
        self.messages = 0
        self.head, self.tail = self._offsets()

    def _offsets(self) -> Tuple[int, int]:
        try:
            with open(os.path.join(self._log.folder, META_NAME), "rb") as file:
                meta = json.loads(file.read())
            head, tail = int(meta["head_offset"]), int(meta["tail_offset"])
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return 0, self._size
        compacting = tail - head == self._size           # renamed, offsets not yet saved
        if compacting or not 0 <= head <= tail:
            return 0, self._size
        return head, min(tail, self._size)

    def batches(self) -> Iterator[List[Record]]:
        """Yield the waiting messages as records, about a MiB at a time."""
        now_ms, size = int(time.time() * 1000), 0
        batch = [position(0, "", now_ms)]
        for payload in self._payloads():
            self.messages += 1
            batch.append(Record(MESSAGE, self.messages, now_ms, payload))
            size += len(payload)
            if size >= MIB:
                yield batch
                batch, size = [], 0
        yield batch

    def _payloads(self) -> Iterator[bytes]:
        at = 0
        while at < self.tail:
            start = self._log.read_bytes(at, U64.size)
            length = U64.unpack(start)[0] if len(start) == U64.size else self._size
            end = at + U64.size + length
            if end > self._size:
                self._log.set_aside(at, self._size)
                return
            if length > MAX_MESSAGE_BYTES:
                self._log.set_aside(at, end)
            elif end > self.head and length:
                yield self._log.read_bytes(at + U64.size, length)
            at = end


# ---- Subscription -------------------------------------------------------------------------
# Where one consumer group stands. Below its cursor everything is settled but its entries; from
# the cursor on everything waits. What waits beyond the cursor stays in the file.

ENTRY = struct.Struct(">QQII")   # offset, due (ms), size, count: packed, for there may be many
READY, LEASED = 0, (1 << 64) - 1             # a due time that is none
KEY_BITS = 96                                # of a deadline's key: an id, or a lease


class Deadlines:
    """A heap of deadlines (ms), each with a key. One that no longer `holds` is stale: it is
    skipped, and when more than half are, all stale ones are swept. `live` counts the others."""

    def __init__(self, holds: Callable[[int, int], bool], live: Callable[[], int]) -> None:
        self._heap: List[int] = []                       # deadline << KEY_BITS | key: small
        self._holds, self._live = holds, live

    def add(self, deadline_ms: int, key: int) -> None:
        heapq.heappush(self._heap, deadline_ms << KEY_BITS | key)
        if len(self._heap) > 2 * self._live() + 64:
            self._heap = sorted({item for item in self._heap if self._holds(*_split(item))})

    def first(self) -> Optional[Tuple[int, int]]:
        """Return the next (deadline, key), None without any."""
        while self._heap:
            item = _split(self._heap[0])
            if self._holds(*item):
                return item
            heapq.heappop(self._heap)
        return None

    def is_due(self, now_ms: int) -> bool:
        """Tell whether `pop_due` may find any; cheap."""
        return bool(self._heap) and self._heap[0] >> KEY_BITS <= now_ms

    def pop_due(self, now_ms: int) -> Iterator[int]:
        """Take out and yield the keys whose deadline has come."""
        item = self.first()
        while item and item[0] <= now_ms:
            heapq.heappop(self._heap)
            yield item[1]
            item = self.first()

    def keys(self) -> Iterator[int]:
        """Yield the keys of all that hold, in order, each once; they must not change meanwhile."""
        heap, last = self._heap[:], -1
        while heap:
            item = heapq.heappop(heap)
            if item != last and self._holds(*_split(item)):
                yield item & ((1 << KEY_BITS) - 1)
            last = item


def _split(item: int) -> Tuple[int, int]:
    return item >> KEY_BITS, item & ((1 << KEY_BITS) - 1)


class Message(NamedTuple):
    """A message for a consumer, and where it stands; `delivery` is the number of this delivery,
    from 1."""

    id: int
    time_ms: int
    payload: bytes
    delivery: int
    offset: int
    size: int


def as_message(record: Record, offset: int, size: int, count: int) -> Message:
    return Message(record.id, record.time_ms, record.payload, count + 1, offset, size)


class Subscription:
    """The place of one subscriber in a log. Its queue's lock guards all of it.

    1. Below `cursor_id` everything is settled except `entries`; from it on everything waits.
       An entry at or beyond the cursor is a message that was put with a delay.
    2. `passed` messages of the log lie below the cursor, `kept` of them are entries.
    3. An entry's due is READY, LEASED, or when its delay ends. `ready` holds the id of every
       ready entry, all with the deadline READY, and `delayed` that of every delayed one.
    4. Leased or not is memory only: in the log a leased message waits.
    """

    def __init__(self, name: str, state: State) -> None:
        self.name, self._state = name, state
        self._reset()

    def _reset(self) -> None:
        self.entries: Dict[int, bytes] = {}
        self.cursor_id, self.cursor_offset = 0, HEADER.size
        self.passed, self.passed_bytes = 0, 0
        self.kept, self.kept_bytes = 0, 0
        self.leased_count, self.delayed_count = 0, 0
        self.ready = Deadlines(self._is_due, self._ready_entries)
        self.delayed = Deadlines(self._is_due, lambda: self.delayed_count)
        self._ahead: Deque[Placed] = collections.deque()
        self._read_offset = HEADER.size                  # where reading ahead goes on

    # -- looking

    @property
    def held_count(self) -> int:
        """How many messages this subscriber has not settled."""
        return self._state.appended - self.passed + self.kept

    @property
    def held_bytes(self) -> int:
        return self._state.appended_bytes - self.passed_bytes + self.kept_bytes

    @property
    def ready_count(self) -> int:
        return self.held_count - self.leased_count - self.delayed_count

    def holds(self, message_id: int) -> bool:
        return message_id >= self.cursor_id or message_id in self.entries

    def at_cursor(self) -> Optional[Placed]:
        """Return the first message at the cursor, which moves over entries that lie beyond it."""
        while True:
            while self._ahead:
                place = self._ahead[0]
                if place[2].id not in self.entries:
                    return place
                self._pass(keep=True)
            if not self._read_ahead():
                return None

    def _read_ahead(self) -> bool:
        log = self._state.log
        if self.passed >= self._state.appended:          # skip what is no message at all
            self._read_offset = self._state.end
            return False
        start = self._read_offset = self._state.next_message(self._read_offset)
        for offset, end, record in log.scan(start, self._state.end, AHEAD_BYTES):
            if (self._ahead and record and record.type != MESSAGE
                    and self._state.next_message(offset) != offset):
                break                        # rather jump to the next than read up to it
            self._read_offset = end
            if record is None:
                log.set_aside(offset, end)
            elif record.type == MESSAGE and record.id >= self.cursor_id:
                self._ahead.append((offset, end, record))
            elif record.type == MESSAGE:     # a compaction kept it for another subscriber
                self.cursor_offset = end
                self.passed += 1
                self.passed_bytes += end - offset
            if end - start >= AHEAD_BYTES and self._ahead:
                break
        if not self._ahead:                              # the rest was damaged
            self.passed, self.passed_bytes = self._state.appended, self._state.appended_bytes
            self._state.recount()
        return bool(self._ahead)

    def _pass(self, *, keep: bool) -> Placed:
        """Move the cursor over the next message; `keep` if it is, or becomes, an entry."""
        place = offset, end, record = self._ahead.popleft()
        self.cursor_id, self.cursor_offset = record.id + 1, end
        self.passed += 1
        self.passed_bytes += end - offset
        if keep:
            self.kept += 1
            self.kept_bytes += end - offset
        else:
            self._state.let_go(record.id, end - offset)
        return place

    # -- entries

    def _wait_until(self, message_id: int, due_ms: int) -> None:
        """Note that an entry is ready, or when it will be (invariant 3)."""
        if due_ms:
            self.delayed_count += 1
            self.delayed.add(due_ms, message_id)
        else:
            self.ready.add(READY, message_id)

    def _ready_entries(self) -> int:
        return len(self.entries) - self.leased_count - self.delayed_count

    def due(self, message_id: int) -> Optional[int]:
        entry = self.entries.get(message_id)
        return None if entry is None else int(ENTRY.unpack(entry)[1])

    def _is_due(self, due_ms: int, message_id: int) -> bool:
        return self.due(message_id) == due_ms

    def _leave(self, due_ms: int) -> None:
        """Count out an entry that is no longer leased or delayed; its heap item gets stale."""
        if due_ms == LEASED:
            self.leased_count -= 1
        elif due_ms:
            self.delayed_count -= 1

    def _drop(self, message_id: int) -> None:
        entry = self.entries.pop(message_id, None)
        if entry is not None:
            _, due_ms, size, _ = ENTRY.unpack(entry)
            self._leave(due_ms)
            if message_id < self.cursor_id:
                self.kept -= 1
                self.kept_bytes -= size
                self._state.let_go(message_id, size)

    def _advance(self, last: int, drop_from: int) -> None:
        """Move the cursor over every message up to `last`; what is below `drop_from` stays."""
        place = self.at_cursor()
        while place and place[2].id <= last:
            keep = place[2].id < drop_from
            offset, end, record = self._pass(keep=keep)
            if keep:
                self.entries[record.id] = ENTRY.pack(offset, READY, end - offset, record.deliveries)
                self._wait_until(record.id, READY)
            place = self.at_cursor()

    # -- what the log says

    def apply_delayed(self, record: Record, offset: int, size: int) -> None:
        """A message was put with a delay: an entry at once, for the timers to see. Not for one
        who settled it before a compaction kept it for others."""
        if record.id < self.cursor_id:
            return
        self.entries[record.id] = ENTRY.pack(offset, record.due_ms, size, record.deliveries)
        self._wait_until(record.id, record.due_ms)

    def apply_settled(self, first: int, last: int) -> None:
        ids: Iterable[int] = range(first, last + 1)
        if last - first >= len(self.entries):
            ids = [id_ for id_ in self.entries if first <= id_ <= last]
        for message_id in ids:
            self._drop(message_id)
        if last >= self.cursor_id:
            self._advance(last, drop_from=first)

    def apply_retry(self, message_id: int, count: int, due_ms: int) -> None:
        if message_id not in self.entries and message_id >= self.cursor_id:
            self._advance(message_id, drop_from=message_id + 1)
        entry = self.entries.get(message_id)
        if entry is not None:
            offset, old_due_ms, size, _ = ENTRY.unpack(entry)
            self._leave(old_due_ms)
            self.entries[message_id] = ENTRY.pack(offset, due_ms, size, count)
            self._wait_until(message_id, due_ms)

    def apply_position(self, message_id: int) -> None:
        """Forget all: settled below `message_id`, waiting from it on."""
        self._reset()
        self._state.recount()
        log, end = self._state.log, self._state.end
        if message_id >= self._state.next_id:
            self.cursor_id, self.cursor_offset, self._read_offset = message_id, end, end
            self.passed, self.passed_bytes = self._state.appended, self._state.appended_bytes
            return
        self._advance(message_id - 1, drop_from=0)
        self.cursor_id = max(self.cursor_id, message_id)
        for offset, after, record in log.scan(HEADER.size, end):
            if record and record.type == MESSAGE and record.delay_ms and record.id >= message_id:
                self.apply_delayed(record, offset, after - offset)

    def restore(self, place: Place) -> None:
        """Stand, from new on, where a bookmark says."""
        self.cursor_id, self.cursor_offset = place.cursor_id, place.cursor_offset
        self._read_offset = place.cursor_offset
        self.passed, self.passed_bytes = place.passed, place.passed_bytes
        for message_id, entry in place.entries.items():
            _, due_ms, size, _ = ENTRY.unpack(entry)
            self.entries[message_id] = entry
            self._wait_until(message_id, due_ms)
            if message_id < self.cursor_id:
                self.kept += 1
                self.kept_bytes += size

    # -- what only memory knows

    def tick(self, now_ms: int, limit: int) -> None:
        """Make ready what is due, up to `limit` messages."""
        for message_id in itertools.islice(self.delayed.pop_due(now_ms), limit):
            self._set_due(message_id, READY)
            self.delayed_count -= 1
            self._wait_until(message_id, READY)

    def _set_due(self, message_id: int, due_ms: int) -> None:
        offset, _, size, count = ENTRY.unpack(self.entries[message_id])
        self.entries[message_id] = ENTRY.pack(offset, due_ms, size, count)

    def look(self) -> Optional[Message]:
        """Return the lowest ready message. One whose bytes went bad is set aside and gone."""
        while True:
            ready, place = self.ready.first(), self.at_cursor()
            if place and (ready is None or place[2].id < ready[1]):
                offset, end, record = place
                return as_message(record, offset, end - offset, record.deliveries)
            if ready is None:
                return None
            message = self.message(ready[1])
            if message:
                return message

    def message(self, message_id: int) -> Optional[Message]:
        """Return the message of an entry. If its bytes went bad they are set aside, and it is
        gone: None."""
        offset, _, size, count = ENTRY.unpack(self.entries[message_id])
        record = self._state.log.read(offset)
        if record and record.id == message_id:
            return as_message(record, offset, size, count)
        self._state.log.set_aside(offset, offset + size)
        self._drop(message_id)
        return None

    def lease(self, message: Message) -> None:
        """Take out what `look` just found."""
        if message.id not in self.entries:
            self._pass(keep=True)
        self.entries[message.id] = ENTRY.pack(message.offset, LEASED, message.size,
                                              message.delivery - 1)
        self.leased_count += 1

    def lease_id(self, message_id: int) -> None:
        """Take out a message that is ready or delayed, wherever it stands."""
        if message_id not in self.entries:
            self._advance(message_id, drop_from=message_id + 1)
        if message_id in self.entries:
            self._leave(self.due(message_id) or READY)
            self._set_due(message_id, LEASED)
            self.leased_count += 1

    def upcoming(self) -> Iterator[Message]:
        """Yield what is ready, lowest first, without taking it."""
        entries = filter(None, map(self.message, self.ready.keys()))
        return heapq.merge(entries, self._beyond_cursor(), key=lambda message: message.id)

    def _beyond_cursor(self) -> Iterator[Message]:
        log = self._state.log
        for offset, end, record in log.scan(self.cursor_offset, self._state.end, AHEAD_BYTES):
            if (record and record.type == MESSAGE and record.id >= self.cursor_id
                    and record.id not in self.entries):
                yield as_message(record, offset, end - offset, record.deliveries)

    def oldest(self) -> Optional[Record]:
        """Return the first message that is not settled. Looks at every entry."""
        place = self.at_cursor()             # moves the cursor over entries beyond it
        if self.entries and (place is None or min(self.entries) < place[2].id):
            return self._state.log.read(ENTRY.unpack(self.entries[min(self.entries)])[0])
        return place[2] if place else None

    def is_leased(self, message_id: int) -> bool:
        return self.due(message_id) == LEASED

    def leased_ids(self) -> List[int]:
        return [id_ for id_ in self.entries if self.is_leased(id_)] if self.leased_count else []

    def spent_ids(self, max_deliveries: int) -> List[int]:
        """Return the entries that were delivered as often as is allowed. Looks at them all."""
        return [id_ for id_, entry in self.entries.items()
                if ENTRY.unpack(entry)[3] >= max_deliveries]

    def catch_up(self, cursor_id: int, leased_ids: Iterable[int]) -> None:
        """Stand where the same subscriber stands in the log that ours replaces."""
        self._advance(cursor_id - 1, drop_from=cursor_id)
        self.cursor_id = max(self.cursor_id, cursor_id)
        for message_id in leased_ids:
            if message_id in self.entries and not self.is_leased(message_id):
                self.lease_id(message_id)

    def agrees_with(self, live: Subscription) -> bool:
        """Tell whether both hold the same messages, after `catch_up`."""
        # The cursors may differ by entries that lie beyond one of them.
        return (self.held_count == live.held_count and self.leased_count == live.leased_count
                and self.entries.keys() == live.entries.keys())


class State:
    """What a log says: a pure function of its records.

    `end` is that of the last message which was applied: no subscription reads beyond it, for
    what stands there may be on its way. Ids only grow.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.next_id = log.codec.next_id
        self.time_ms = 0                     # the highest time of a record
        self.end = HEADER.size
        self._recent: Deque[int] = collections.deque(maxlen=RECENT_MESSAGES)     # offsets
        self.appended, self.appended_bytes = 0, 0
        self.subscriptions: Dict[str, Subscription] = {}
        self._held: Optional[Tuple[int, int]] = None     # by anyone of several; None: to count

    def apply(self, record: Record, offset: int, size: int) -> None:
        """Apply one record that stands at `offset`; the only way in which a state changes.

        A record that names a message which the log lacks changes only the next id.
        """
        if record.time_ms > self.time_ms:
            self.time_ms = record.time_ms
        if record.type == MESSAGE:
            if record.id >= self.next_id:
                self.next_id = record.id + 1
            self.appended += 1
            self.appended_bytes += size
            if self._held is not None:
                self._held = self._held[0] + 1, self._held[1] + size
            self.end = offset + size
            self._recent.append(offset)
            if record.delay_ms:
                for subscription in self.subscriptions.values():
                    subscription.apply_delayed(record, offset, size)
        elif record.type == SETTLED:
            last = U64.unpack_from(record.payload)[0]
            self.subscription(record.payload[U64.size:]).apply_settled(record.id, last)
            self.next_id = max(self.next_id, last + 1)
        elif record.type == RETRY:
            subscription = self.subscription(record.payload)
            subscription.apply_retry(record.id, record.deliveries, record.due_ms)
            self.next_id = max(self.next_id, record.id + 1)
        elif record.type == POSITION and record.id == LEFT:
            self.subscriptions.pop(record.payload.decode(), None)
            self.recount()
        elif record.type == POSITION:
            self.subscription(record.payload).apply_position(record.id)
            self.next_id = max(self.next_id, record.id)

    def next_message(self, offset: int) -> int:
        """Return where the next message at or behind `offset` stands if that is known, `offset`
        if not: so nobody reads what many subscribers settled."""
        recent = self._recent
        if not recent or offset < recent[0]:
            return offset
        return recent[bisect.bisect_left(recent, offset)] if offset <= recent[-1] else self.end

    def subscription(self, name: bytes) -> Subscription:
        """Return a subscription; one whose position was lost starts where the log does."""
        key = name.decode()
        if key not in self.subscriptions:
            self.subscriptions[key] = Subscription(key, self)
            self.subscriptions[key].apply_position(0)
        return self.subscriptions[key]

    def held(self) -> Tuple[int, int]:
        """Return the number and the bytes of the messages that anyone holds."""
        if len(self.subscriptions) == 1:
            only = next(iter(self.subscriptions.values()))
            return only.held_count, only.held_bytes
        if self._held is None:
            self._held = self._count_held()
        return self._held

    def _count_held(self) -> Tuple[int, int]:
        for subscription in self.subscriptions.values():
            subscription.at_cursor()         # counts what it need not see
        lowest = min(self.subscriptions.values(), key=lambda s: s.cursor_id)
        below = {id_: entry for s in self.subscriptions.values()
                 for id_, entry in s.entries.items() if id_ < lowest.cursor_id}
        return (self.appended - lowest.passed + len(below),
                self.appended_bytes - lowest.passed_bytes
                + sum(ENTRY.unpack(entry)[2] for entry in below.values()))

    def let_go(self, message_id: int, size: int) -> None:
        """Count a message out if the subscriber that settled it was the last to hold it."""
        if self._held is not None and not self.holds(message_id):
            self._held = self._held[0] - 1, self._held[1] - size

    def recount(self) -> None:
        """What is held changed by more than one message."""
        self._held = None

    def all_held(self) -> Iterator[Message]:
        """Yield what anyone holds, in order; reads the log from the first of it on."""
        starts = [ENTRY.unpack(entry)[0] for s in self.subscriptions.values()
                  for entry in s.entries.values()]
        starts += [s.cursor_offset for s in self.subscriptions.values()]
        for offset, end, record in self.log.scan(min(starts), self.end, AHEAD_BYTES):
            if record and record.type == MESSAGE and self.holds(record.id):
                yield as_message(record, offset, end - offset, record.deliveries)

    def holds(self, message_id: int) -> bool:
        """Tell whether any subscriber still needs a message."""
        return any(s.holds(message_id) for s in self.subscriptions.values())

    def snapshot(self) -> Snapshot:
        return Snapshot(self.next_id, self.time_ms, self.log.tail, self.appended,
                        self.appended_bytes, [Place.of(s) for s in self.subscriptions.values()])

    def restore(self, snapshot: Snapshot) -> None:
        """Become what a bookmark says."""
        self.end = snapshot.tail_offset
        self.next_id, self.time_ms = snapshot.next_id, snapshot.time_ms
        self.appended, self.appended_bytes = snapshot.appended, snapshot.appended_bytes
        for place in snapshot.places:
            subscription = self.subscriptions[place.name] = Subscription(place.name, self)
            subscription.restore(place)


class Place(NamedTuple):
    """A copy of what the log says of one subscription."""

    name: str
    cursor_id: int
    cursor_offset: int
    passed: int
    passed_bytes: int
    entries: Dict[int, bytes]

    @classmethod
    def of(cls, subscription: Subscription) -> Place:
        s = subscription
        return cls(s.name, s.cursor_id, s.cursor_offset, s.passed, s.passed_bytes,
                   dict(s.entries))

    @property
    def lowest(self) -> int:
        """The lowest id that is not settled."""
        return min(self.cursor_id, min(self.entries, default=self.cursor_id))

    def holds(self, message_id: int) -> bool:
        return message_id >= self.cursor_id or message_id in self.entries

    @classmethod
    def union(cls, places: Sequence[Place]) -> Place:
        """Return the place of one who needs what any of these needs, as early as any of them,
        and counts as few deliveries."""
        lowest = min(places, key=lambda place: place.cursor_id)
        entries: Dict[int, bytes] = {}
        for message_id in {id_ for place in places for id_ in place.entries}:
            found = [place.entries.get(message_id) for place in places if place.holds(message_id)]
            if None not in found:
                offset, due_ms, size, count = map(
                    min, zip(*(ENTRY.unpack(entry) for entry in found if entry)))
                entries[message_id] = ENTRY.pack(offset, due_ms, size, count)
        return lowest._replace(entries=entries)

    def records(self, name: str, now_ms: int) -> Iterator[Record]:
        """Yield what puts a new subscriber into this place."""
        after = self.lowest
        yield position(after, name, now_ms)
        for message_id in sorted(id_ for id_ in self.entries if id_ < self.cursor_id):
            if message_id > after:
                yield settled(after, message_id - 1, name, now_ms)
            after = message_id + 1
        if after < self.cursor_id:
            yield settled(after, self.cursor_id - 1, name, now_ms)
        yield from self.retries(name, now_ms)

    def retries(self, name: str, now_ms: int) -> Iterator[Record]:
        """Yield what is to be known of entries besides that they wait."""
        for message_id, entry in sorted(self.entries.items()):
            _, due_ms, _, count = ENTRY.unpack(entry)
            due_ms = READY if due_ms == LEASED else due_ms
            if count or due_ms:
                yield retry(message_id, count, due_ms, name, now_ms)

    def to_json(self) -> Dict[str, Any]:
        packed = bytearray()
        for message_id, entry in self.entries.items():
            offset, due_ms, size, count = ENTRY.unpack(entry)
            due_ms = READY if due_ms == LEASED else due_ms
            packed += U64.pack(message_id) + ENTRY.pack(offset, due_ms, size, count)
        return dict(self._asdict(), entries=base64.b64encode(zlib.compress(packed, 1)).decode())

    @classmethod
    def of_json(cls, value: Dict[str, Any]) -> Place:
        packed = zlib.decompress(base64.b64decode(value["entries"]))
        step = U64.size + ENTRY.size
        entries = {U64.unpack_from(packed, at)[0]: packed[at + U64.size:at + step]
                   for at in range(0, len(packed), step)}
        return cls(**{**value, "entries": entries})


class Snapshot(NamedTuple):
    """A copy of a state, made under the lock and used without it."""

    next_id: int
    time_ms: int
    tail_offset: int
    appended: int
    appended_bytes: int
    places: List[Place]

    def to_json(self) -> Dict[str, Any]:
        head = min((place.cursor_offset for place in self.places), default=self.tail_offset)
        return dict(self._asdict(), head_offset=head,
                    places=[place.to_json() for place in self.places])

    @classmethod
    def of_json(cls, value: Dict[str, Any]) -> Snapshot:
        places = [Place.of_json(place) for place in value["places"]]
        return cls(**{**{name: value[name] for name in cls._fields}, "places": places})


# ---- Queue --------------------------------------------------------------------------------
# A lock, a log and its subscriptions. A fifo queue has one subscription, by the empty name.

NEVER = 1 << 62                  # a time (ms) that does not come
MAX_SLEEP_MS = 1 << 31           # what a wait for a condition can bear
AT_ONCE = 1000                   # messages whose time has come that one hold of the lock sees


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
        self._path, self._min_free_bytes = path, min_free_bytes
        self.left = 0

    def free_bytes(self) -> int:
        try:
            status = os.statvfs(self._path)
        except OSError:                      # gone, or a server that does not answer: no room
            return 0
        return status.f_bavail * status.f_frsize

    def look(self) -> None:
        self.left = self.free_bytes() - self._min_free_bytes

    def use(self, size: int) -> None:
        """Count bytes that are about to be written. Raises ApiError 503 if there is no room."""
        self.left -= size
        if self.left < 0:
            self.look()
            self.left -= size
            if self.left < 0:
                raise ApiError(503, "The disk is nearly full (min_free_bytes); try again later")


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


ONE = Wish()


class Delivery(NamedTuple):
    """Messages that go to one consumer; `lease` is the key to settle them by, if any."""

    subscriber: str
    messages: Sequence[Message]
    lease: Optional[int] = None
    as_lines: bool = False
    held: int = 0                            # of the budget: its bytes, or 0 if they are few

    def without_payloads(self) -> Delivery:
        """Return what is enough to settle it."""
        return self._replace(messages=[m._replace(payload=b"") for m in self.messages])


class Lease(NamedTuple):
    """Messages in a consumer's hands until a deadline, in the queue's time."""

    out: Sequence[Tuple[int, int]]           # (id, number of this delivery)
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


class Consumers:
    """Who holds or awaits the messages of one subscriber, and what became of them: memory only.
    The queue's lock guards it."""

    def __init__(self) -> None:
        self.dead_lettered_total = 0
        self.leases: Dict[int, Lease] = {}
        self.waiters: collections.OrderedDict[int, Waiter] = collections.OrderedDict()
        self.lease_deadlines = Deadlines(self._is_leased, lambda: len(self.leases))
        self.waiter_deadlines = Deadlines(self._is_waiting, lambda: len(self.waiters))

    def _is_leased(self, deadline_ms: int, key: int) -> bool:
        lease = self.leases.get(key)
        return lease is not None and lease.deadline_ms == deadline_ms

    def _is_waiting(self, deadline_ms: int, key: int) -> bool:
        return key in self.waiters

    def add_lease(self, key: int, lease: Lease) -> None:
        self.leases[key] = lease
        self.lease_deadlines.add(lease.deadline_ms, key)

    def add_waiter(self, waiter: Waiter) -> None:
        self.waiters[waiter.key] = waiter
        self.waiter_deadlines.add(waiter.deadline_ms, waiter.key)


def is_line(payload: bytes) -> bool:
    """Tell whether a message can travel as a line: its only line break, if any, ends it."""
    return b"\r" not in payload and payload.find(b"\n", 0, -1) < 0 and payload != b"\n"


def choose(ready: Iterable[Message], wish: Wish) -> Iterator[Message]:
    """Yield what of the ready messages makes one delivery; what is no line comes alone."""
    size = 0
    for number, message in enumerate(ready, 1):
        payload = message.payload
        line = wish.lines > 0 and is_line(payload)
        size += len(payload) + 1
        if number > 1 and (not line or size > wish.max_bytes):
            return
        yield message
        if not line or number >= wish.lines:
            return


class Turn:
    """A hold of a queue's lock; at its end, those who waited for what became ready get it."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def __enter__(self) -> None:
        self._queue.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._queue.end_turn()


class Queue:
    """One durable queue.

    `lock` guards the state, the consumers, the log's tail and the counters. `_maintenance`
    keeps bookmark and compaction apart and is taken before `lock`. All methods may be called
    by any thread.
    1. A message is LEASED in its subscription while it is in a lease, in a delivery that the
       server settles, or among the `_dead`. None of these outlives the process.
    2. Nobody waits for what is ready: whoever makes something ready takes a `_turn`, and notes
       in `_touched` for whom.
    3. What is not above `_expired_id` is older than `ttl` and never becomes ready.
    4. What is staged for the end of the round changes nothing until `flush` writes and applies
       it: a message that was settled is LEASED until then.
    """

    def __init__(self, config: QueueConfig, folder: str, *, fsync: str = "always",
                 subscribers: Sequence[str] = (FIFO,), clock: Optional[Clock] = None,
                 storage: Optional[Storage] = None, space: Optional[Space] = None,
                 budget: Optional[Budget] = None, staging: Optional[Set[Queue]] = None,
                 lead: Callable[[Log], None] = Log.lead,
                 wake_at: Callable[[int], None] = lambda _: None) -> None:
        self.config, self.subscribers = config, subscribers
        self._wake_at = wake_at              # is told when (monotonic ms) to call `tick`
        self._lead = lead                    # has a log's `lead` called
        self._staging = staging              # queues to flush; None: each call writes at once
        self.space, self._budget = space or Space(folder, 0), budget or Budget()
        self.lock, self._maintenance = threading.Lock(), threading.Lock()
        self.log = Log(folder, fsync, storage)
        self.state = State(self.log)
        self.in_total = self.out_total = self.redelivered_total = self.compactions_total = 0
        self.expired_total = 0
        self.content_type = b"Content-Type: %b\r\n" % config.content_type.encode()
        self._clock = clock or Clock()
        self._epoch_ms = 0                   # the queue's time when the monotonic clock was 0
        self.unlogged = 0                    # notes that a full disk kept out of the log
        self._closed = False
        self._limited = config.max_messages is not None or config.max_bytes is not None
        self._turn = Turn(self)
        self._consumers = {name: Consumers() for name in subscribers}
        self._awaited: Set[str] = set()      # subscribers with waiters
        self._touched: Set[str] = set()      # those for whom something may have become ready
        self._answers: List[Tuple[Waiter, Optional[Delivery]]] = []
        self._puts: List[Put] = []           # staged; see flush
        self._staged_bytes = self._staged_count = 0
        self._settled: Dict[str, List[int]] = {}         # staged ids by subscriber
        self._dead: Dict[Tuple[str, int], bool] = {}     # to be dead-lettered, in order
        self._expired_id = 0
        self._expiry_offset = HEADER.size    # of the first message that did not expire yet
        self._expiry_ms = 0 if config.ttl else NEVER     # when it does; 0: to be found out
        self._bookmark_tail = self._bookmark_bytes = 0
        self._compact_after_ms = 0
        self._undying_bytes = 0              # what the last compaction wrote besides messages

    # -- life

    def recover(self) -> None:
        """Load the log that `log.lock()` locked, and come to the state that it tells."""
        with self.lock:
            new = self.log.load()
            self.state = State(self.log)
            start, clean = self._load_bookmark()
            self.log.recover(start, self.state.apply)
            if not (new or clean):           # ids of records that are lost may have been seen
                self.state.next_id += ID_GAP
            self._epoch_ms = (max(self._clock.wall_ms(), self.state.time_ms)
                              - self._clock.monotonic_ms())
            try:
                self._meet_subscribers_locked()
            except ApiError:
                raise StorageError(f"{self.log.folder}: the disk is full; free some space, then "
                                   "start again") from None
            self._expel_spent_locked()
        if not self.bookmark():              # a crash from here on is no clean stop
            with contextlib.suppress(FileNotFoundError):
                self.log.storage.unlink(os.path.join(self.log.folder, META_NAME))
            self.log.storage.fsync_folder(self.log.folder)
        event(logging.INFO, "recovered", queue=self.config.name,
              messages=self.state.held()[0], scanned_bytes=self.log.tail - start)

    def _meet_subscribers_locked(self) -> None:
        """Place the subscribers that are new, let go of those that left. A new one starts from
        now on; after damage where the log does, for its position may be what is lost."""
        known, now_ms = self.state.subscriptions, self.now_ms()
        left = [name for name in known if name not in self.subscribers]
        new = [name for name in self.subscribers if name not in known]
        if left and (FIFO in left or FIFO in self.subscribers):
            self._switch_kind_locked(now_ms)
        else:
            start = 0 if self.log.corrupt_records else self.state.next_id
            self._place_locked([position(start, name, now_ms) for name in new])
        self._place_locked([position(LEFT, name, now_ms) for name in left])
        for what, names in (("joined", new), ("left", left)):
            for name in filter(None, names):
                event(logging.INFO, f"subscriber_{what}", queue=self.config.name, subscriber=name)

    def _switch_kind_locked(self, now_ms: int) -> None:
        """Give each subscriber all that anyone had not settled. Durable on return: only then may
        the former ones be forgotten, and while one is there, a start begins this again."""
        known = self.state.subscriptions
        former = [known[FIFO]] if FIFO not in self.subscribers else list(known.values())
        place = Place.union([Place.of(subscription) for subscription in former])
        event(logging.WARNING, "kind_switched", queue=self.config.name, to=self.config.kind,
              messages=self.state.held()[0])
        self._place_locked([record for name in self.subscribers
                            for record in place.records(name, now_ms)])
        self.log.sync()

    def _place_locked(self, records: Sequence[Record]) -> None:
        """Append and apply, or raise ApiError 503: where a subscriber stands is in the log before
        anything is served."""
        if records:
            self.log.append(records, self.state.apply)

    def close(self) -> None:
        """Write a bookmark that marks a clean stop, and let go of the folder."""
        with self.lock:
            self._write_settled_locked()
            self._closed = True
        if self.unlogged:
            with contextlib.suppress(CompactionFailed):
                self.compact()
        self.bookmark(clean=True)
        with self.lock:                      # so that nothing is written to what is closed
            self.log.close()

    def now_ms(self) -> int:
        """The queue's time: the wall clock at start, advanced by the monotonic clock."""
        return self._epoch_ms + self._clock.monotonic_ms()

    # -- rounds

    def flush(self) -> None:
        """End a round: write what was put with one write, what was settled with one record a
        run of ids. Does not wait for a disk."""
        with self._turn:
            puts, self._puts, self._staged_bytes, self._staged_count = self._puts, [], 0, 0
            try:
                self._check_open()
                self._write_settled_locked()
                results: Sequence[Union[int, Exception]] = self._append_locked(puts) if puts else ()
                number = self.log.appends
            except LogFailed:
                raise
            except Exception as error:       # a full disk, or no memory: each is refused
                results, number = [error] * len(puts), 0

        def tell(failure: Optional[LogFailed]) -> None:
            for put, result in zip(puts, results):
                put.done(failure or result)
        if puts:
            self.when_durable(number, tell)

    def when_durable(self, number: int, call: Callable[[Optional[LogFailed]], None]) -> None:
        """Have `call` made as `Log.when_durable` says. Does not block."""
        if self.log.when_durable(number, call):
            self._lead(self.log)

    def _stage_locked(self) -> None:
        if self._staging is None:
            self._write_settled_locked()
        else:
            self._staging.add(self)

    def _write_settled_locked(self) -> None:
        for subscriber, ids in list(self._settled.items()):
            self._note_settled_locked(subscriber, ids)
            self.out_total += len(ids)
            del self._settled[subscriber]

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
        held_count, held_bytes = self.state.held()
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
        with self.lock:
            self._check_room_locked(size, len(put.payloads))
            self._puts.append(put)
            self._staged_bytes += size
            self._staged_count += len(put.payloads)
            self._staging.add(self)
        if self._staged_bytes >= ROUND_BYTES or self._staged_count >= ROUND_MESSAGES:
            self.flush()

    def put(self, payloads: Sequence[bytes], delay_s: int = 0, *, limited: bool = True) -> int:
        """Append messages at once and return the first one's id; durable on return. As `stage`;
        raises LogFailed when it is not known what is queued."""
        with self._turn:
            if limited:
                self._check_room_locked(sum(map(len, payloads)), len(payloads))
            first, = self._append_locked([Put(payloads, delay_s)])
            number = self.log.appends
        self.log.wait_durable(number)
        return first

    def _append_locked(self, puts: Sequence[Put]) -> List[int]:
        """Append what was put with one write, and apply it; return the first id of each."""
        firsts: List[int] = []
        records: List[Record] = []
        next_id, now_ms = self.state.next_id, self.now_ms()
        for put in puts:
            firsts.append(next_id)
            records += [Record(MESSAGE, id_, now_ms, payload, 0, put.delay_s * 1000)
                        for id_, payload in enumerate(put.payloads, next_id)]
            next_id += len(put.payloads)
        self.log.append(records, self.state.apply)
        self.in_total += len(records)
        self._touched.update(self._awaited)
        delays_s = [put.delay_s for put in puts if put.delay_s]
        if delays_s:
            self._wake_locked(now_ms + min(delays_s) * 1000)
        if self.config.ttl and self._expiry_ms == NEVER:
            self._expiry_ms = now_ms + self.config.ttl * 1000
            self._wake_locked(self._expiry_ms)
        return firsts

    # -- taking

    def take(self, subscriber: str = FIFO, wish: Wish = ONE,
             waiter: Optional[Waiter] = None) -> Optional[Delivery]:
        """Take the oldest ready messages; without any return None, and `waiter` waits: then it
        has a deadline. It does so too, if only for that, while more has to expire than one hold
        of the lock may expel.

        Does not wait for a disk. What is leased comes back at its deadline; the rest is to be
        settled or retried by the caller.
        """
        while True:
            with self._turn:
                self._check_open()
                now_ms = self.now_ms()
                self._tick_locked(subscriber, now_ms)
                self._expire_locked(now_ms)
                if self._touched:            # who waits came first
                    self._match_locked()
                if now_ms < self._expiry_ms:
                    fitting = self._fitting_locked(subscriber, wish)
                    delivery = self._take_locked(subscriber, fitting) if fitting else None
                    if delivery is None and waiter and waiter.wait_s:
                        self._wait_locked(subscriber, waiter, now_ms)
                    elif not fitting:
                        raise no_room()
                    return delivery
                if waiter:
                    self._wait_locked(subscriber, waiter, now_ms)
                    return None

    def _check_open(self) -> None:
        if self._closed:
            raise ApiError(503, "The server is stopping; try again")

    def _fitting_locked(self, subscriber: str, wish: Wish) -> Optional[Wish]:
        """Return what of a wish is to be had while clients hold much: only what does not count;
        None if the next message does."""
        if not self._budget.tight:
            return wish
        message = self.state.subscriptions[subscriber].look()
        if message and len(message.payload) > UNCOUNTED_BYTES:
            return None
        return wish._replace(max_bytes=UNCOUNTED_BYTES)

    def _take_locked(self, subscriber: str, wish: Wish) -> Optional[Delivery]:
        subscription, messages = self.state.subscriptions[subscriber], []
        try:
            for message in choose(iter(subscription.look, None), wish):
                subscription.lease(message)
                messages.append(message)
            if not messages:
                return None
            key = secrets.randbits(KEY_BITS) if wish.lease_s else None
            delivery = self._delivery(subscriber, messages, wish, key)
            if key is not None:
                out = [(message.id, message.delivery) for message in messages]
                self._lease_locked(subscriber, key, out, wish.lease_s)
            if delivery.held:
                self._budget.hold(delivery.held)
            return delivery
        except Exception:                    # no memory: nobody has them
            for message in messages:
                subscription.apply_retry(message.id, message.delivery - 1, READY)
            raise

    def _delivery(self, subscriber: str, messages: Sequence[Message], wish: Wish,
                  key: Optional[int] = None) -> Delivery:
        """Return messages as what goes to a consumer."""
        as_lines = wish.lines > 0 and is_line(messages[0].payload)
        size = sum([len(message.payload) for message in messages])
        held = size if size > UNCOUNTED_BYTES else 0
        return Delivery(subscriber, messages, key, as_lines, held)

    def _lease_locked(self, subscriber: str, key: int, out: Sequence[Tuple[int, int]],
                      seconds: int) -> None:
        deadline_ms = self.now_ms() + seconds * 1000
        self._consumers[subscriber].add_lease(key, Lease(out, deadline_ms))
        self._wake_locked(deadline_ms)

    def peek(self, subscriber: Optional[str] = FIFO, wish: Wish = ONE) -> Optional[Delivery]:
        """Return what a take would, without taking it: a peek counts as no delivery. Without a
        subscriber, look at what anyone has not settled."""
        self.tick()
        with self._turn:
            if self.now_ms() >= self._expiry_ms:     # more than one hold of the lock may expel
                raise ApiError(503, "What grew older than ttl is being dropped; try again")
            if self._budget.tight:
                raise no_room()
            state = self.state
            ready = (state.all_held() if subscriber is None
                     else state.subscriptions[subscriber].upcoming())
            messages = [message._replace(delivery=message.delivery - 1)
                        for message in choose(ready, wish)]
            return self._delivery(subscriber or FIFO, messages, wish) if messages else None

    # -- waiting

    def _wait_locked(self, subscriber: str, waiter: Waiter, now_ms: int) -> None:
        waiter.deadline_ms = now_ms + waiter.wait_s * 1000
        self._consumers[subscriber].add_waiter(waiter)
        self._awaited.add(subscriber)
        self._touched.add(subscriber)        # what is ready may only lack room
        self._wake_locked(waiter.deadline_ms)

    def end_turn(self) -> None:
        """Match what became ready with those who wait, let go of the lock, and tell them. Called
        with the lock held, at the end of a `Turn`."""
        try:
            if self._touched:
                self._match_locked()
        except LogFailed:
            raise
        except Exception:                    # no memory: what was done stays done
            log_event.exception("match_failed queue=%s", self.config.name)
            self._wake_locked(self.now_ms() + POLL_S * 1000)
        finally:
            answers, self._answers = self._answers, []
            self.lock.release()
        for waiter, delivery in answers:
            try:
                waiter.answer(delivery)
            except Exception:                # the others must get theirs
                log_event.exception("answer_failed")
                if delivery:
                    self.retry(delivery)

    def _match_locked(self) -> None:
        """Give what is ready to those who wait, first come, first served (invariant 2)."""
        now_ms = self.now_ms()
        self._expire_locked(now_ms)
        if now_ms >= self._expiry_ms:        # more than one hold of the lock may take
            self._wake_locked(now_ms)
            return
        for name in list(self._touched):
            waiters = self._consumers[name].waiters
            while waiters and self.state.subscriptions[name].look():
                waiter = next(iter(waiters.values()))
                fitting = self._fitting_locked(name, waiter.wish)
                if not fitting:              # the budget has `tick` called once there is room
                    break
                delivery = None if waiter.is_gone() else self._take_locked(name, fitting)
                del waiters[waiter.key]
                self._answers.append((waiter, delivery))
            else:
                self._touched.discard(name)
            if not waiters:
                self._awaited.discard(name)

    def stop_waiting(self, subscriber: str, waiter: Waiter) -> None:
        """Answer a waiter with None now, unless it is answered already."""
        with self._turn:
            if self._consumers[subscriber].waiters.pop(waiter.key, None):
                self._answers.append((waiter, None))

    def dismiss(self) -> None:
        """Answer all who wait with None."""
        with self._turn:
            self._dismiss_locked(NEVER)

    def _dismiss_locked(self, now_ms: int) -> None:
        for name in list(self._awaited):
            consumers = self._consumers[name]
            for key in consumers.waiter_deadlines.pop_due(now_ms):
                self._answers.append((consumers.waiters.pop(key), None))

    # -- what was taken

    def settle(self, delivery: Delivery) -> None:
        """A delivery has left: what is not leased is gone. Not durable on return."""
        if delivery.held:
            self._budget.hold(-delivery.held)
        if delivery.lease is None:
            with self.lock:
                self._settle_locked(delivery.subscriber, [m.id for m in delivery.messages])

    def retry(self, delivery: Delivery) -> None:
        """A delivery could not leave: its messages are back at their old place."""
        if delivery.held:
            self._budget.hold(-delivery.held)
        with self._turn:
            leases = self._consumers[delivery.subscriber].leases
            if delivery.lease is not None and leases.pop(delivery.lease, None) is None:
                return
            out = [(m.id, m.delivery) for m in delivery.messages]
            self._retry_locked(delivery.subscriber, out)

    def ack(self, subscriber: str, key: int) -> None:
        """End a lease: its messages are gone. Not durable on return. Raises ApiError 410."""
        with self.lock:
            lease = self._end_lease_locked(subscriber, key)
            self._settle_locked(subscriber, [message_id for message_id, _ in lease.out])

    def nack(self, subscriber: str, key: int, delay_s: int = 0) -> None:
        """End a lease: its messages come back, at once or after a delay. Raises ApiError 410."""
        with self._turn:
            lease = self._end_lease_locked(subscriber, key)
            self._retry_locked(subscriber, lease.out, delay_s)

    def extend(self, subscriber: str, key: int, seconds: int) -> None:
        """Have a lease end in `seconds` from now. Raises ApiError 410."""
        with self.lock:
            lease = self._end_lease_locked(subscriber, key)
            self._lease_locked(subscriber, key, lease.out, seconds)

    def _end_lease_locked(self, subscriber: str, key: int) -> Lease:
        self._check_open()
        leases = self._consumers[subscriber].leases
        lease = leases.get(key)
        if lease is None or lease.deadline_ms <= self.now_ms():
            raise ApiError(410, "No such lease: it expired, is settled, is another queue's or "
                                "token's, or from before a restart; take the message again")
        del leases[key]
        return lease

    def _settle_locked(self, subscriber: str, ids: Iterable[int]) -> None:
        ids = self._out_locked(subscriber, ids)
        self._settled.setdefault(subscriber, []).extend(ids)
        self._stage_locked()

    def _note_settled_locked(self, subscriber: str, ids: Iterable[int]) -> None:
        now_ms = self.now_ms()
        self._note_locked([settled(first, last, subscriber, now_ms)
                           for first, last in _runs(ids)])

    def _retry_locked(self, subscriber: str, out: Sequence[Tuple[int, int]],
                      delay_s: int = 0) -> None:
        now_ms = self.now_ms()
        due_ms = now_ms + delay_s * 1000 if delay_s else READY
        counts, most = dict(out), self.config.max_deliveries
        ids = self._out_locked(subscriber, counts)
        self._note_locked([retry(id_, counts[id_], due_ms, subscriber, now_ms) for id_ in ids])
        expired = [id_ for id_ in ids if id_ <= self._expired_id]
        spent = [id_ for id_ in ids if id_ > self._expired_id and most and counts[id_] >= most]
        self._expel_locked(subscriber, expired, expired=True)
        self._expel_locked(subscriber, spent)
        self.redelivered_total += len(ids) - len(expired) - len(spent)
        self._touched.add(subscriber)
        if due_ms:
            self._wake_locked(due_ms)

    def _out_locked(self, subscriber: str, ids: Iterable[int]) -> List[int]:
        """What of a delivery is still out: a late word on what is gone does nothing."""
        subscription = self.state.subscriptions[subscriber]
        return [] if self._closed else [id_ for id_ in ids if subscription.is_leased(id_)]

    def purge(self) -> Tuple[int, int]:
        """Drop every message and end all leases; return their number and that of the append,
        to wait for. Raises ApiError 503 with nothing changed."""
        with self._turn:
            self._check_open()
            self._write_settled_locked()
            count, now_ms = self.state.held()[0], self.now_ms()
            self._place_locked([position(self.state.next_id, name, now_ms)
                                for name in self._consumers])
            for consumers in self._consumers.values():
                consumers.leases.clear()
            self._dead.clear()
            return count, self.log.appends

    # -- time, expiry and dead letters

    def tick(self) -> int:
        """Do what time brings: ends of leases, delays, waits and lives. Return when (monotonic
        ms) there is more to do. Does not wait for a disk."""
        with self._turn:
            if self._closed:
                return NEVER
            now_ms = self.now_ms()
            self._expire_locked(now_ms)
            for name in self._consumers:
                self._tick_locked(name, now_ms)
            self._match_locked()
            if now_ms < self._expiry_ms:
                self._dismiss_locked(now_ms)
            firsts = [(self._expiry_ms, 0)]
            for name, consumers in self._consumers.items():
                firsts += filter(None, (consumers.lease_deadlines.first(),
                                        consumers.waiter_deadlines.first(),
                                        self.state.subscriptions[name].delayed.first()))
            return min(firsts)[0] - self._epoch_ms

    def _tick_locked(self, subscriber: str, now_ms: int) -> None:
        """Take back what leases had out too long, make ready what was delayed: as much as one
        hold of the lock may."""
        consumers, subscription = self._consumers[subscriber], self.state.subscriptions[subscriber]
        if consumers.lease_deadlines.is_due(now_ms):
            out: List[Tuple[int, int]] = []
            for key in consumers.lease_deadlines.pop_due(now_ms):
                out += consumers.leases.pop(key).out
                if len(out) >= AT_ONCE:
                    break
            self._retry_locked(subscriber, out)
        if subscription.delayed.is_due(now_ms):
            subscription.tick(now_ms, AT_ONCE)
            self._touched.add(subscriber)

    def _wake_locked(self, deadline_ms: int) -> None:
        self._wake_at(deadline_ms - self._epoch_ms)

    def _expire_locked(self, now_ms: int) -> None:
        """Expel what is older than `ttl`, in the order of the log, as far as one hold of the
        lock may take (invariant 3)."""
        if now_ms < self._expiry_ms:
            return
        ttl_ms = (self.config.ttl or 0) * 1000
        doomed: Dict[str, List[int]] = {name: [] for name in self._consumers}
        self._expiry_ms = NEVER
        start = self._expiry_offset
        records = self.log.scan(start, self.log.tail, AHEAD_BYTES)
        for seen, (offset, end, record) in enumerate(records):
            if seen == AT_ONCE or offset - start >= MIB:
                self._expiry_ms = now_ms
                break
            if record and record.type == MESSAGE and self.state.holds(record.id):
                if record.time_ms + ttl_ms > now_ms:
                    self._expiry_ms = record.time_ms + ttl_ms
                    break
                self._expired_id = max(self._expired_id, record.id)
                for name, ids in doomed.items():
                    subscription = self.state.subscriptions[name]
                    if subscription.holds(record.id) and not subscription.is_leased(record.id):
                        ids.append(record.id)
            self._expiry_offset = end
        for name, ids in doomed.items():
            self._expel_locked(name, ids, expired=True)

    def _expel_locked(self, subscriber: str, ids: Sequence[int], *, expired: bool = False) -> None:
        """Take messages that are not leased out of the queue: to be dead-lettered, or gone."""
        if expired:
            self.expired_total += len(ids)
        if self.config.dead_letter:
            for message_id in ids:
                self.state.subscriptions[subscriber].lease_id(message_id)
                self._dead[subscriber, message_id] = True
        else:
            self._note_settled_locked(subscriber, ids)
            if not expired:
                self._consumers[subscriber].dead_lettered_total += len(ids)

    def _expel_spent_locked(self) -> None:
        """After a start, for the limit may be a new one."""
        most = self.config.max_deliveries
        for name in self._consumers if most else ():
            self._expel_locked(name, self.state.subscriptions[name].spent_ids(most or 0))

    def dead_letters(self) -> List[Tuple[str, Message]]:
        """Return the next messages to be dead-lettered, by subscriber; about a MiB at most."""
        found: List[Tuple[str, Message]] = []
        size = 0
        with self.lock:
            for name, message_id in list(itertools.islice(self._dead, AT_ONCE)):
                subscription = self.state.subscriptions[name]
                leased = subscription.is_leased(message_id)
                message = subscription.message(message_id) if leased else None
                if message is None:          # its bytes went bad
                    del self._dead[name, message_id]
                    continue
                found.append((name, message))
                size += len(message.payload)
                if size >= MIB:
                    break
        return found

    def bury(self, letters: Sequence[Tuple[str, Message]]) -> None:
        """Forget dead letters that are safe in their new queue. Not durable on return."""
        with self.lock:
            for name in {name for name, _ in letters}:
                ids = [m.id for owner, m in letters if owner == name
                       and self._dead.pop((name, m.id), False)]
                self._note_settled_locked(name, ids)
                self._consumers[name].dead_lettered_total += len(ids)

    # -- numbers

    def numbers(self) -> Dict[str, Any]:
        """Return what there is to tell, by the names of the metrics; `subscribers` by name."""
        self.tick()
        with self.lock:
            self._write_settled_locked()
            return {"kind": self.config.kind,
                    "subscribers": {name: self._numbers_locked(name) for name in self._consumers},
                    "log_bytes": self.log.tail, "messages_in_total": self.in_total,
                    "messages_out_total": self.out_total,
                    "messages_redelivered_total": self.redelivered_total,
                    "messages_expired_total": self.expired_total,
                    "messages_dead_lettered_total": sum(
                        consumers.dead_lettered_total for consumers in self._consumers.values()),
                    "corrupt_records_total": self.log.corrupt_records,
                    "compactions_total": self.compactions_total}

    def _numbers_locked(self, subscriber: str) -> Dict[str, float]:
        subscription = self.state.subscriptions[subscriber]
        record = subscription.oldest()
        age_ms = max(0, self.now_ms() - record.time_ms) if record else 0
        return {"ready": subscription.ready_count, "leased": subscription.leased_count,
                "delayed": subscription.delayed_count,
                "oldest_message_age_seconds": age_ms / 1000,
                "messages_dead_lettered_total": self._consumers[subscriber].dead_lettered_total}

    def _note_locked(self, records: Sequence[Record]) -> None:
        """Append and apply what must not be refused. On a full disk memory alone knows it,
        until a compaction writes down what memory knows."""
        if not records:
            return
        try:
            self.log.append(records, self.state.apply)
        except ApiError:
            self.unlogged += 1
            for record in records:
                self.state.apply(record, 0, 0)       # only a message needs its place

    # -- bookmark

    def _load_bookmark(self) -> Tuple[int, bool]:
        """Restore the state from meta.json; return where to scan on, and if the stop was clean.

        A bookmark that is missing, damaged or of another log is ignored: it only saves time.
        """
        try:
            with open(os.path.join(self.log.folder, META_NAME), "rb") as file:
                value = json.loads(file.read())
            if value.pop("crc32") != _checksum(value) or value["log_id"] != self._log_id():
                return HEADER.size, False
            snapshot = Snapshot.of_json(value)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return HEADER.size, False
        tail, end = snapshot.tail_offset, os.fstat(self.log.fd).st_size
        if tail != end and not (tail < end and self.log.read(tail, end)):
            return HEADER.size, False
        self.state.restore(snapshot)
        self._bookmark_tail = tail
        return tail, value["clean"] and tail == end

    def _log_id(self) -> str:
        return self.log.codec.log_id.hex()

    def wants_bookmark(self) -> bool:
        """Tell whether the log grew by more than a start should scan; not during compaction,
        for which a bookmark would wait."""
        if self._maintenance.locked():
            return False
        grown = self.log.tail - self._bookmark_tail
        return grown >= max(BOOKMARK_BYTES, BOOKMARK_GROWTH * self._bookmark_bytes)

    def bookmark(self, *, clean: bool = False) -> bool:
        """Write meta.json: where the next start begins to scan. Blocks for several syncs. Return
        whether it was written; if not, the next start takes longer, nothing else."""
        with self._maintenance:
            with self.lock:
                if self.unlogged:           # a bookmark is a function of the log alone
                    return False
                snapshot, log_id = self.state.snapshot(), self._log_id()
            self.log.sync()
            value = dict(snapshot.to_json(), log_id=log_id, clean=clean)
            data = json.dumps(dict(value, crc32=_checksum(value))).encode()
            try:
                self.log.storage.write_file(os.path.join(self.log.folder, META_NAME), data)
            except OSError as error:
                event(logging.WARNING, "bookmark_failed", queue=self.config.name,
                      error=error.strerror)
                return False
            self._bookmark_tail, self._bookmark_bytes = snapshot.tail_offset, len(data)
            return True

    # -- compaction

    def use_locked(self, state: State) -> None:
        """Go on with the state of a new log, which tells all that memory knows."""
        self.state, self.unlogged = state, 0
        self._expiry_offset = HEADER.size
        self._expiry_ms = min(self._expiry_ms, 0 if self.config.ttl else NEVER)

    def wants_compaction(self) -> bool:
        """Tell whether a rewrite is due: for dead bytes, a full disk, or a path that is lost."""
        if self._clock.monotonic_ms() < self._compact_after_ms:
            return False
        with self.lock:
            size, (_, held_bytes) = self.log.tail - HEADER.size, self.state.held()
            enough = COMPACT_DEAD_LOW_BYTES if self.space.left < 0 else COMPACT_DEAD_BYTES
            dead = size - held_bytes - self._undying_bytes
            return (self.unlogged > 0 or not self.log.is_in_place()
                    or (dead >= enough and dead * 2 > size))

    def held_bytes(self) -> int:
        with self.lock:
            return self.state.held()[1]

    def compact(self, pause: Callable[[], None] = lambda: None) -> None:
        """Rewrite the log without dead bytes; durable on return. `pause` is called often.

        Raises CompactionFailed with the old log in use, LogFailed when neither is known good.
        """
        with self._maintenance:
            try:
                Compaction(self, pause).run()
            except (OSError, ApiError, LogFailed, CompactionFailed) as error:
                self._compact_after_ms = self._clock.monotonic_ms() + COMPACT_RETRY_S * 1000
                if self.log.failure:
                    raise self.log.failure from None
                raise CompactionFailed(str(error)) from None
            with self.lock:
                self._undying_bytes = self.log.tail - HEADER.size - self.state.held()[1]
            self._bookmark_tail = 0
            self.compactions_total += 1
        self.log.close_replaced()
        self.bookmark()


class Compaction:
    """One rewrite of a queue's log.

    The new log gets every live message, then what a snapshot of the state says of them, then
    all that the old log got since. A second state follows by applying each record, as a
    recovery would; it must hold what the queue holds before it takes the queue's place.
    """

    def __init__(self, queue: Queue, pause: Callable[[], None]) -> None:
        self._queue, self._pause = queue, pause
        with queue.lock:
            self._snapshot, self._unlogged = queue.state.snapshot(), queue.unlogged
        self._fresh = queue.log.fresh(self._snapshot.next_id)
        self._state = State(self._fresh)
        self._holes: Dict[str, List[List[int]]] = {}     # by subscriber, runs it has settled
        self._lowest = {place.name: place.lowest for place in self._snapshot.places}
        self._damaged = False
        self._last_id = 0                    # of the last message in the new log
        self._synced = 0                     # bytes of the new log that are on disk

    def run(self) -> None:
        try:
            self._copy_live()
            done = self._follow()
            self._catch_up()
            self._fresh.sync()
            with self._queue.lock:
                self._write(self._records(done, self._queue.log.tail))
                self._switch_locked()
        except BaseException:
            if self._queue.log.fd != self._fresh.fd:
                self._fresh.discard()
            raise

    def _copy_live(self) -> None:
        places, now_ms = self._snapshot.places, self._queue.now_ms()
        self._write([position(self._lowest[place.name], place.name, now_ms) for place in places])
        for batch in self._batches(HEADER.size, self._snapshot.tail_offset):
            messages = [record for record in batch if record.type == MESSAGE]
            with self._queue.lock:
                live = [record for record in messages if self._queue.state.holds(record.id)]
            self._write(live)
            self._note_holes(live)
        for place in places:
            records = [settled(first, last, place.name, now_ms)
                       for first, last in self._holes.get(place.name, ()) if first != LEFT]
            records.extend(place.retries(place.name, now_ms))
            for at in range(0, len(records), 500):
                self._write(records[at:at + 500])
                self._pause()

    def _note_holes(self, records: Sequence[Record]) -> None:
        """Of messages that someone still needs, find the runs that a subscriber has settled."""
        for place in self._snapshot.places:
            runs, lowest = self._holes.setdefault(place.name, [[LEFT, 0]]), self._lowest[place.name]
            for record in records:
                if place.holds(record.id):
                    if runs[-1][0] != LEFT:
                        runs.append([LEFT, 0])
                elif record.id >= lowest:
                    runs[-1] = [min(runs[-1][0], record.id), record.id]

    def _follow(self) -> int:
        """Copy what was appended meanwhile until little is left, or what comes is no longer less
        than what was copied; return where the rest starts."""
        done, before = self._snapshot.tail_offset, NEVER
        while True:
            tail = self._queue.log.tail
            if tail - done <= COMPACT_LOCKED_BYTES or tail - done >= before:
                return done
            for batch in self._batches(done, tail):
                self._write(batch)
            self._fresh.sync()
            done, before = tail, tail - done

    def _catch_up(self) -> None:
        """Do without the lock most of what `_switch_locked` has to do with it. What is not copied
        yet has higher ids, and must not be passed."""
        with self._queue.lock:
            places = [(name, live.cursor_id, live.leased_ids())
                      for name, live in self._queue.state.subscriptions.items()]
        for name, cursor_id, leased_ids in places:
            self._state.subscription(name.encode()).catch_up(
                min(cursor_id, self._last_id + 1), leased_ids)
            self._pause()

    def _records(self, start: int, end: int) -> Iterator[Record]:
        for offset, after, record in self._queue.log.scan(start, end):
            if record is None:
                self._damaged = True
                self._queue.log.set_aside(offset, after)
            else:
                yield record

    def _batches(self, start: int, end: int) -> Iterator[List[Record]]:
        batch, size = [], 0
        for record in self._records(start, end):
            batch.append(record)
            size += HEAD.size + len(record.payload)
            if size >= AHEAD_BYTES:
                yield batch
                batch, size = [], 0
                self._pause()
        yield batch

    def _write(self, records: Iterable[Record]) -> None:
        records = list(records)
        if self._fresh.tail - self._synced >= COMPACT_SYNC_BYTES:
            self._synced = self._fresh.tail
            self._fresh.sync()
        if records:
            self._fresh.append(records, self._state.apply)
            self._last_id = max([record.id for record in records if record.type == MESSAGE],
                                default=self._last_id)

    def _switch_locked(self) -> None:
        queue, state = self._queue, self._state
        for name, live in queue.state.subscriptions.items():
            ours = state.subscription(name.encode())
            ours.catch_up(live.cursor_id, live.leased_ids())
            if not (ours.agrees_with(live) or self._damaged):
                raise CompactionFailed("the new log does not tell what memory knows; the old one "
                                       "stays")
        if queue.unlogged != self._unlogged:
            raise CompactionFailed("the disk was full meanwhile; the new log lacks what it refused")
        queue.log.replace_with(self._fresh)
        state.log, state.next_id = queue.log, max(state.next_id, queue.state.next_id)
        queue.use_locked(state)


def _runs(ids: Iterable[int]) -> List[List[int]]:
    """Return the runs [first, last] of neighbours among `ids`."""
    runs: List[List[int]] = []
    for id_ in sorted(ids):
        if runs and id_ == runs[-1][1] + 1:
            runs[-1][1] = id_
        else:
            runs.append([id_, id_])
    return runs


def _checksum(value: Dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


# ---- Broker -------------------------------------------------------------------------------
# All queues and tokens, and the threads that keep them: nothing here knows HTTP.

DRAINING, RECOVERING = "draining", "recovering"


class Job(NamedTuple):
    """A wish for a compaction. `done` is called once, with what went wrong, if anything did."""

    queue: Queue
    done: Callable[[Optional[Exception]], None] = lambda _: None


class Syncers:
    """Threads that sync logs for those who wait: as many as logs that sync at one time.

    `unserved` are logs for which no thread was to be had: who polls syncs them, once a round.
    """

    def __init__(self, on_failure: Callable[[LogFailed], None]) -> None:
        self.unserved: Deque[Log] = collections.deque()
        self._on_failure = on_failure
        self._logs: queues.SimpleQueue[Log] = queues.SimpleQueue()
        self._lock = threading.Lock()        # guards `_idle`
        self._idle = 0                       # threads that have no log, and none on its way
        self._is_short = False               # of threads, when one was last wanted

    def lead(self, log: Log) -> None:
        """Have a thread call `log.lead`. Does not block."""
        with self._lock:
            found, self._idle = self._idle > 0, max(0, self._idle - 1)
        try:
            if not found:
                threading.Thread(target=self._work, daemon=True, name="syncer").start()
        except (RuntimeError, MemoryError) as error:
            self.unserved.append(log)
            was_short, self._is_short = self._is_short, True
            if not was_short:                # or there would be a line each round
                event(logging.ERROR, "cannot_start_thread", error=error)
        else:
            self._is_short = False
            self._logs.put(log)

    def _work(self) -> None:
        while True:
            log = self._logs.get()
            try:
                log.lead()
            except LogFailed as failure:
                self._on_failure(failure)
            except Exception:                # no memory: those who wait still do
                self._logs.put(log)
                log_event.exception("sync_failed log=%s", log.path)
                time.sleep(PAUSE_S)
                continue
            with self._lock:
                self._idle += 1


class Broker:
    """The queues of one data folder.

    `on_failure` is called by whichever thread first meets a failed log; it does not return in
    a server. Threads start with `recover` and end with `close`. `unready` says why the queues
    are not served; None when they are. Who serves clients calls `end_round` after each round.
    """

    def __init__(self, config: Config, on_failure: Callable[[LogFailed], None],
                 clock: Optional[Clock] = None) -> None:
        settings = config.settings
        self.config, self.on_failure = config, on_failure
        self.unready: Optional[str] = RECOVERING
        self.tokens = {token.digest: token for token in config.tokens}
        self.space = Space(settings.path, settings.min_free_bytes)
        self.budget = Budget(settings.inflight_bytes, settings.max_message_bytes,
                             lambda: self._wake_at(0))
        self.syncers = Syncers(on_failure)
        self.staging: Set[Queue] = set()     # queues that have something to write
        self._clock = clock or Clock()
        self._timing = threading.Condition()
        self._tick_ms = 0                    # when (monotonic) the next tick is; see _wake_at
        self.queues = {item.name: Queue(item, os.path.join(settings.path, item.name),
                                        fsync=settings.fsync, clock=clock, space=self.space,
                                        subscribers=config.subscribers(item),
                                        budget=self.budget, staging=self.staging,
                                        lead=self.syncers.lead, wake_at=self._wake_at)
                       for item in config.queues}
        self._low_space = False
        self._stuck: Set[str] = set()        # queues whose dead letters find no space
        self._stopping = threading.Event()
        self._jobs: queues.SimpleQueue[Optional[Job]] = queues.SimpleQueue()
        self._compacting: Set[str] = set()
        self._threads = [threading.Thread(target=self._guard, args=(work,), name=work.__name__,
                                          daemon=True)
                         for work in (self._timers, self._upkeep, self._compactor)]

    def lock(self) -> None:
        """Lock every queue's folder, in sorted order; all or none. Raises StorageError."""
        try:
            for _, queue in sorted(self.queues.items()):
                queue.log.lock()
        except (StorageError, OSError):
            for queue in self.queues.values():
                queue.log.close()
            raise

    def recover(self) -> None:
        """Recover every queue and start the threads. Raises StorageError, OSError."""
        for queue in self.queues.values():
            queue.recover()
        for thread in self._threads:
            thread.start()
        self.unready = None

    def close(self) -> None:
        """Stop the threads and close every queue with a clean bookmark."""
        self._stopping.set()
        self._wake_at(0)
        self._jobs.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for queue in self.queues.values():
            queue.close()

    def compact(self, queue: Queue, done: Callable[[Optional[Exception]], None]) -> None:
        """Have a queue compacted; `done` is called once it was tried."""
        self._jobs.put(Job(queue, done))

    def end_round(self) -> None:
        """Write what the queues were told in this round. Does not wait for a disk, unless there
        are no threads for that."""
        while self.staging:
            self.staging.pop().flush()
        for log in list(self.syncers.unserved):
            if not log.lead_once():
                self.syncers.unserved.remove(log)

    def dismiss(self) -> None:
        """Answer all who wait for a message with None."""
        for queue in self.queues.values():
            queue.dismiss()

    # -- threads

    def _guard(self, work: Callable[[], None]) -> None:
        """Do a thread's work until the end, whatever it meets."""
        while not self._stopping.is_set():
            try:
                work()
            except LogFailed as failure:
                self.on_failure(failure)
                return
            except Exception:                # not for anything that a client or a disk can do
                log_event.exception("thread_failed thread=%s", work.__name__)
                self._stopping.wait(1)

    def _wake_at(self, monotonic_ms: int) -> None:
        """Have the queues ticked no later than then. A queue calls it under its lock, before
        it can be ticked: so what is read here without a lock is never too low for it."""
        if monotonic_ms < self._tick_ms:
            with self._timing:
                self._tick_ms = min(self._tick_ms, monotonic_ms)
                self._timing.notify()

    def _timers(self) -> None:
        while not self._stopping.is_set():
            with self._timing:
                self._tick_ms = NEVER
            for queue in self.queues.values():
                self._wake_at(queue.tick())
            with self._timing:
                while not self._stopping.is_set():
                    left_ms = self._tick_ms - self._clock.monotonic_ms()
                    if left_ms <= 0:
                        break
                    self._timing.wait(min(left_ms, MAX_SLEEP_MS) / 1000)

    def _upkeep(self) -> None:
        while not self._stopping.wait(1):
            self._watch_space()
            for queue in self.queues.values():
                if queue.log.fsync == "everysec":
                    queue.log.sync()
                self._move_dead_letters(queue)
                if queue.wants_bookmark():
                    queue.bookmark()
                if queue.config.name not in self._compacting and queue.wants_compaction():
                    self._compacting.add(queue.config.name)
                    self._jobs.put(Job(queue))

    def _move_dead_letters(self, queue: Queue) -> None:
        """Put dead letters where they belong, then settle them: a crash between repeats them.
        Never holds two queues' locks."""
        for letters in iter(queue.dead_letters, []):
            if self._stopping.is_set():
                return
            target = self.queues[queue.config.dead_letter or ""]
            try:
                target.put([message.payload for _, message in letters], limited=False)
            except ApiError as error:        # they stay where they are, to be tried again
                if queue.config.name not in self._stuck:
                    event(logging.WARNING, "dead_letters_wait", queue=queue.config.name,
                          error=error)
                self._stuck.add(queue.config.name)
                return
            self._stuck.discard(queue.config.name)
            queue.bury(letters)

    def _compactor(self) -> None:
        for job in iter(self._jobs.get, None):
            failed: Optional[Exception] = None
            try:
                self._compact(job.queue)
            except Exception as error:
                failed = error
                event(logging.WARNING, "compaction_failed", queue=job.queue.config.name,
                      error=error)
                if not isinstance(error, (CompactionFailed, OSError)):
                    raise
            finally:
                self._compacting.discard(job.queue.config.name)
                job.done(failed)

    def _compact(self, queue: Queue) -> None:
        settings = self.config.settings
        live, free = queue.held_bytes(), self.space.free_bytes()
        # While puts are refused anyway, a rewrite is what gets the space back.
        spare = settings.min_free_bytes if free >= settings.min_free_bytes else 0
        if live + spare > free:
            raise CompactionFailed(f"needs {live + spare} free bytes, there are {free}")
        before, started = queue.log.tail, time.monotonic()
        queue.compact(self._pacer())
        event(logging.INFO, "compacted", queue=queue.config.name, bytes_before=before,
              bytes_after=queue.log.tail, seconds=round(time.monotonic() - started, 3))

    def _pacer(self) -> Callable[[], None]:
        """Return what compaction calls often: it works for a slice, then sleeps for longer."""
        started = time.perf_counter()

        def pause() -> None:
            nonlocal started
            if self._stopping.is_set():
                raise CompactionFailed("the server is stopping")
            if time.perf_counter() - started >= COMPACT_SLICE_S:
                time.sleep(COMPACT_SLEEP_S)
                started = time.perf_counter()
        return pause

    def _watch_space(self) -> None:
        self.space.look()
        low = self.space.left < 0
        if low != self._low_space:
            self._low_space = low
            event(logging.WARNING, "disk_nearly_full" if low else "disk_has_space",
                  path=self.config.settings.path, left_bytes=self.space.left)


# ---- Metrics ------------------------------------------------------------------------------
# One table, one pure function. The names of the first two are the Go server's.

Sample = Tuple[Mapping[str, str], float]
PREFIX = "oxl_micro_queue_"
METRICS: Sequence[Tuple[str, str, str]] = (
    (PREFIX + "messages_in_total", "counter", "Total number of messages put into a queue"),
    (PREFIX + "messages_out_total", "counter", "Total number of messages taken out of a queue"),
    (PREFIX + "messages", "gauge", "Messages that are ready, leased or delayed"),
    (PREFIX + "oldest_message_age_seconds", "gauge", "Age of the oldest message, 0 when empty"),
    (PREFIX + "log_bytes", "gauge", "Size of a queue's data.log"),
    (PREFIX + "messages_redelivered_total", "counter", "Messages that came back to be taken again"),
    (PREFIX + "messages_expired_total", "counter", "Messages that grew older than ttl"),
    (PREFIX + "messages_dead_lettered_total", "counter",
     "Messages moved to the dead-letter queue, or dropped after max_deliveries for lack of one"),
    (PREFIX + "corrupt_records_total", "counter", "Damaged places found in a queue's log"),
    (PREFIX + "compactions_total", "counter", "Rewrites of a queue's log"),
    (PREFIX + "http_requests_total", "counter", "Answered requests"),
    (PREFIX + "fsync_duration_seconds", "summary", "Time that fdatasync took"),
    (PREFIX + "active", "gauge", "1 while this node serves its queues"),
    (PREFIX + "build_info", "gauge", "Always 1, labelled with the version"),
    ("process_start_time_seconds", "gauge", "Start time of the process since the epoch"),
    ("process_resident_memory_bytes", "gauge", "Resident memory of the process"),
)


def render_metrics(samples: Mapping[str, Sequence[Sample]]) -> bytes:
    """Return the Prometheus text format 0.0.4; a summary's parts are named by its suffixes."""
    lines = []
    for name, kind, help_text in METRICS:
        lines.append(f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n")
        for suffix in ("_sum", "_count") if kind == "summary" else ("",):
            for labels, value in samples.get(name + suffix, ()):
                text = ",".join(f'{key}="{_escape(item)}"' for key, item in labels.items())
                lines.append(f"{name}{suffix}{'{' + text + '}' if text else ''} {value!r}\n")
    return "".join(lines).encode()


def all_samples(broker: Broker, answered: Mapping[Tuple[str, int], int]
                ) -> Mapping[str, Sequence[Sample]]:
    """Return the samples of all metrics; `answered` counts requests by action and status."""
    found = process_samples()
    logs = [queue.log for queue in broker.queues.values()]
    found[PREFIX + "http_requests_total"] = [
        ({"action": action, "code": str(code)}, count)
        for (action, code), count in sorted(answered.items())]
    found[PREFIX + "fsync_duration_seconds_sum"] = [({}, sum(log.sync_seconds for log in logs))]
    found[PREFIX + "fsync_duration_seconds_count"] = [({}, sum(log.syncs for log in logs))]
    found[PREFIX + "active"] = [({}, int(broker.unready is None))]
    found[PREFIX + "build_info"] = [({"version": __version__}, 1)]
    for name, queue in broker.queues.items() if broker.unready is None else ():
        for metric, samples in queue_samples(name, queue.numbers()).items():
            found.setdefault(PREFIX + metric, []).extend(samples)
    return found


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def queue_samples(name: str, numbers: Mapping[str, Any]) -> Dict[str, List[Sample]]:
    """Return what `Queue.numbers` tells as samples, by metric name without its prefix."""
    found: Dict[str, List[Sample]] = {
        key: [({"queue_name": name}, value)] for key, value in numbers.items()
        if key not in ("kind", "subscribers")}
    for subscriber, counts in numbers["subscribers"].items():
        labels = {"queue_name": name, "subscriber": subscriber}
        found.setdefault("oldest_message_age_seconds", []).append(
            (labels, counts["oldest_message_age_seconds"]))
        found.setdefault("messages", []).extend(
            ({**labels, "state": state}, counts[state]) for state in ("ready", "leased", "delayed"))
    return found


def process_samples() -> Dict[str, List[Sample]]:
    """Return the process's own metrics; resident memory where /proc tells it."""
    found: Dict[str, List[Sample]] = {"process_start_time_seconds": [({}, STARTED_S)]}
    with contextlib.suppress(OSError):
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        found["process_resident_memory_bytes"] = [({}, pages * resource.getpagesize())]
    return found


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

    method: str
    action: Optional[str]                    # None: no path of ours; "" is `/`
    queue: Optional[str]
    query: str
    is_asterisk: bool                        # OPTIONS *
    token_digest: Optional[bytes]            # None: no token, or not understood
    has_authorization: bool
    has_body: bool
    length: int
    chunked: bool
    expects: bool                            # the client waits for 100 Continue
    keep_alive: bool
    old: bool                                # HTTP/1.0
    encoding: str
    lines: bool                              # the body is application/x-ndjson
    forwarded: str


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
    length, chunked = parse_framing(fields, old)
    if not HOST.fullmatch(fields.get(b"host", b"" if old else b"?")):
        raise malformed("Send exactly one valid Host header")
    path, _, query = target.partition("?")
    action, queue = _split_path(path)
    bearer = BEARER.fullmatch(fields.get(b"authorization", b""))
    return Request(
        method=method, action=action, queue=queue, query=query, is_asterisk=path == "*",
        token_digest=hashlib.sha256(bearer[1]).digest() if bearer else None,
        has_authorization=b"authorization" in fields,
        has_body=chunked or length > 0, length=length, chunked=chunked,
        expects=parse_expect(fields, old),
        keep_alive=parse_keep_alive(fields, old), old=old,
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


def parse_framing(fields: Mapping[bytes, bytes], old: bool) -> Tuple[int, bool]:
    """Return the body's length and whether it is chunked instead (RFC 9112, 6)."""
    length, coding = fields.get(b"content-length"), fields.get(b"transfer-encoding")
    if coding is not None:
        if length is not None or old or b"," in coding:
            raise malformed("Send one of Content-Length and Transfer-Encoding: chunked, once")
        if coding.lower() != b"chunked":
            raise malformed("The only transfer coding known here is chunked", 501)
        return 0, True
    if length is not None and not CONTENT_LENGTH.fullmatch(length):
        raise malformed("Content-Length must be one number of at most 18 digits")
    return int(length or 0), False


def parse_expect(fields: Mapping[bytes, bytes], old: bool) -> bool:
    expect = fields.get(b"expect")
    if expect is None or old:
        return False
    if expect.lower() != b"100-continue":
        raise malformed("The only expectation known here is 100-continue", 417)
    return True


def parse_keep_alive(fields: Mapping[bytes, bytes], old: bool) -> bool:
    options = {item.strip() for item in fields.get(b"connection", b"").lower().split(b",")}
    return b"close" not in options and (not old or b"keep-alive" in options)


def _split_path(path: str) -> Tuple[Optional[str], Optional[str]]:
    match = PATH.fullmatch(path)
    return (match[1] or "", match[2]) if match else (None, None)


def parse_chunk_line(line: bytes) -> Tuple[int, int]:
    """Return a chunk's length, and how many bytes the extensions behind it are."""
    match = CHUNK_LINE.fullmatch(line)
    if not match:
        raise malformed("A chunk starts with its size in hexadecimal")
    return int(match[1], 16), len(line) - match.end(1)


@functools.lru_cache(maxsize=64)
def start_of_head(status: int, now_s: int) -> bytes:
    """Return an answer's head up to its length; with the date of RFC 9110, 5.6.7, whatever the
    locale."""
    t = time.gmtime(now_s)
    day = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[t.tm_wday]
    month = ("Jan", "Feb", "Mar", "Apr", "May", "Jun",
             "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")[t.tm_mon - 1]
    return (f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nServer: micro-queue\r\n"
            f"Date: {day}, {t.tm_mday:02} {month} {t.tm_year} "
            f"{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} GMT\r\nContent-Length: ").encode()


class Answer(NamedTuple):
    """What to send. `taken` is settled once it left, and put back if it could not; `held` is
    what counts in the budget until then, besides what the queue counts for `taken`."""

    status: int = 200
    body: bytes = b""
    headers: bytes = b""
    taken: Optional[Tuple[Queue, Delivery]] = None
    held: int = 0
    close: bool = False                      # what follows on the connection is not understood


def error_answer(error: Exception) -> Answer:
    """Return what a client is told of an error."""
    if isinstance(error, ApiError):
        return Answer(error.status, error.message.encode() + b"\n", TEXT + error.headers,
                      close=error.close)
    return Answer(500, b"The server failed at this request; its log tells why\n", TEXT, close=True)


def render_head(answer: Answer, *, keep_alive: bool, old: bool) -> bytes:
    """Return the head of an answer, with its empty line."""
    connection = b"" if keep_alive and not old else (
        b"Connection: keep-alive\r\n" if keep_alive else b"Connection: close\r\n")
    return b"%b%d\r\nCache-Control: no-store\r\n%b%b\r\n" % (
        start_of_head(answer.status, int(time.time())), len(answer.body), connection,
        answer.headers)


# ---- Actions ------------------------------------------------------------------------------
# What the API can do. An action is one row in ACTIONS and one function; what a request names is
# looked up and checked once for each head, in one order. Nothing here knows a connection.

PARAMETER = re.compile(r"([a-z]+)=([^=]+)")
NUMBER = re.compile(r"[0-9]{1,8}")
LEASE_ID = re.compile(rf"[0-9a-f]{{{KEY_BITS // 4}}}")


class Client(Protocol):
    """Who asks. `finish_with` gives the answer, or what went wrong: once, from any thread, and
    only if the action returned None."""

    @property
    def peer(self) -> str: ...

    def finish_with(self, result: Union[Answer, Exception]) -> None: ...

    def is_gone(self) -> bool:
        """Tell at once whether the client hung up, or will send no more."""

    def when_gone(self, call: Optional[Callable[[], None]]) -> None:
        """Have `call` made, while the answer is awaited, when the client hangs up."""


class Service:
    """What the actions work on: the broker, and what was answered so far, for the metrics."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.answered: Dict[Tuple[str, int], int] = collections.Counter()
        self.routes: Dict[bytes, Route] = {}     # by the sha256 of a head: it holds no token

    def count(self, action: Optional[str], status: int) -> None:
        self.answered[action if action and action in ACTIONS else "other", status] += 1

    def route(self, head: bytes, client: Client) -> Route:
        """Return where a head leads. Raises ApiError that closes."""
        digest = hashlib.sha256(head).digest()
        route = self.routes.get(digest)
        if route is None:
            request = parse_request(head)
            try:
                route = find_route(self.broker, request, client)
            except ApiError as error:
                return Route(request, OPTIONS, refusal=error)
            # A head with a Lease-Id comes once, and a refusal is to be logged each time.
            if len(head) <= CACHED_HEAD_BYTES and LEASE not in route.action.parameters.values():
                if len(self.routes) >= CACHED_HEADS:
                    del self.routes[next(iter(self.routes))]
                self.routes[digest] = route
        elif route.action.permission and self.broker.unready:
            return route._replace(refusal=unready(self.broker.unready))
        return route


class Route(NamedTuple):
    """Where a request leads, all that depends on its head alone being checked."""

    request: Request
    action: Action
    queue: Optional[Queue] = None
    subscriber: Optional[str] = None         # as whom the token takes from the queue
    token: Optional[Token] = None
    parameters: Mapping[str, int] = {}
    wish: Wish = ONE                         # of a take or a peek
    refusal: Optional[ApiError] = None


class Call(NamedTuple):
    """What an action's function gets."""

    service: Service
    route: Route
    client: Client
    body: bytes = b""

    @property
    def queue(self) -> Queue:
        assert self.route.queue is not None  # find_route looked it up
        return self.route.queue

    @property
    def subscriber(self) -> str:
        assert self.route.subscriber is not None     # authorize saw to it
        return self.route.subscriber

    @property
    def lease(self) -> int:
        return self.route.parameters["lease"]

    def number(self, parameter: str) -> int:
        """Return a parameter's value, 0 if it is not given."""
        return self.route.parameters.get(parameter, 0)


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

    `call` returns the answer, or None if it is late: then the client's `finish_with` is called.
    """

    methods: Sequence[str]
    permission: str                          # post, get, admin, any; "" needs no token
    call: Callable[[Call], Optional[Answer]]
    text: str
    parameters: Mapping[str, Parameter] = {}
    before_body: Optional[Callable[[Route], None]] = None    # refuses early; None: takes no body
    on_queue: Optional[bool] = True          # whether it names a queue; None: it may

    @property
    def allow(self) -> str:
        return ", ".join([*self.methods, "OPTIONS"])


# -- the actions' functions, in the order of their rows

def check_put(route: Route) -> None:
    """Refuse a put before its body is received. Raises ApiError."""
    assert route.queue is not None
    route.queue.check_room(0 if route.request.lines else route.request.length)


def put(call: Call) -> Optional[Answer]:
    lines = call.route.request.lines
    payloads = split_lines(call.body) if lines else [call.body]
    if not payloads or not payloads[0]:
        raise ApiError(400, "A message must not be empty; send it as the request's body")

    def done(result: Union[int, Exception]) -> None:
        if isinstance(result, Exception):
            call.client.finish_with(result)
        else:
            count = b"Message-Count: %d\r\n" % len(payloads) if lines else b""
            finish(call, lambda: Answer(headers=b"Message-Id: %d\r\n%b" % (result, count)))
    call.queue.stage(Put(payloads, call.number("delay"), done))
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
    queue, subscriber, wait_s = call.queue, call.subscriber, call.number("wait")
    if not (wait_s or queue.config.ttl):
        return answer_with(queue, queue.take(subscriber, call.route.wish))

    def answer(delivery: Optional[Delivery]) -> None:
        draining = delivery is None and call.service.broker.unready
        finish(call, lambda: error_answer(unready(draining)) if draining
               else answer_with(queue, delivery))

    if wait_s and call.client.is_gone():
        return answer_with(queue, None)
    waiter = Waiter(call.route.wish, wait_s, answer, call.client.is_gone)
    delivery = queue.take(subscriber, call.route.wish, waiter)
    if delivery or not waiter.deadline_ms:
        return answer_with(queue, delivery)
    call.client.when_gone(lambda: queue.stop_waiting(subscriber, waiter))
    return None


def finish(call: Call, make: Callable[[], Answer]) -> None:
    """Give a late answer, or what went wrong when it was made."""
    try:
        answer: Union[Answer, Exception] = make()
    except Exception as error:
        answer = error
    call.client.finish_with(answer)


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
        first.id, max(0, queue.now_ms() - first.time_ms) // 1000, first.delivery)
    if delivery.as_lines:
        content_type = b"Content-Type: %b\r\n" % NDJSON
        headers += b"Message-Count: %d\r\n" % len(delivery.messages)
        body = b"".join([m.payload if m.payload.endswith(b"\n") else m.payload + b"\n"
                         for m in delivery.messages])
        if delivery.held > SHARE_BYTES:      # not twice in memory
            delivery = delivery.without_payloads()
    if delivery.lease is not None:
        headers += b"Lease-Id: %0*x\r\n" % (KEY_BITS // 4, delivery.lease)
    return Answer(200, body or first.payload, content_type + headers, (queue, delivery))


def ack(call: Call) -> Answer:
    call.queue.ack(call.subscriber, call.lease)
    return Answer()


def nack(call: Call) -> Answer:
    call.queue.nack(call.subscriber, call.lease, call.number("delay"))
    return Answer()


def extend(call: Call) -> Answer:
    call.queue.extend(call.subscriber, call.lease, call.number("seconds"))
    return Answer()


def peek(call: Call) -> Answer:
    delivery = call.queue.peek(call.route.subscriber, call.route.wish)
    return render_delivery(call.queue, delivery)._replace(taken=None)


def compact(call: Call) -> None:
    def done(error: Optional[Exception]) -> None:
        call.client.finish_with(ApiError(503, f"Not compacted: {error}") if error else Answer())
    call.service.broker.compact(call.queue, done)


def purge(call: Call) -> None:
    count, number = call.queue.purge()

    def done(failure: Optional[LogFailed]) -> None:
        call.client.finish_with(failure or Answer(200, b"%d\n" % count, TEXT))
    call.queue.when_durable(number, done)


def show_stats(call: Call) -> Answer:
    """Tell of one queue, or of all that the token may use."""
    token, only = call.route.token, call.route.queue
    stats = {name: stats_of(queue.numbers())
             for name, queue in call.service.broker.queues.items()
             if token and token.may("any", name) and only in (None, queue)}
    value = stats[only.config.name] if only else stats
    return Answer(200, json.dumps(value).encode() + b"\n", b"Content-Type: application/json\r\n")


def stats_of(numbers: Mapping[str, Any]) -> Dict[str, Any]:
    """Return a queue's numbers with those of its subscribers summed up; a broadcast queue's
    name them too."""
    subscribers = numbers["subscribers"].values()
    total = {key: sum(counts[key] for counts in subscribers)
             for key in ("ready", "leased", "delayed")}
    age_s = max(counts["oldest_message_age_seconds"] for counts in subscribers)
    rest = {key: value for key, value in numbers.items()
            if key != "subscribers" or FIFO not in value}
    return {**total, "oldest_message_age_seconds": age_s, **rest}


def show_root(call: Call) -> Answer:
    return Answer(200, b"micro_queue is running\n", TEXT)


def show_ready(call: Call) -> Answer:
    if call.service.broker.unready:
        raise unready(call.service.broker.unready)
    return Answer(200, b"ready\n", TEXT)


def show_metrics(call: Call) -> Answer:
    broker = call.service.broker
    if not broker.config.settings.metric_exporter:
        raise ApiError(404, "Set metric_exporter in the config's settings to have metrics")
    headers = b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
    return Answer(200, render_metrics(all_samples(broker, call.service.answered)), headers)


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
    "peek": Action(GET_OR_HEAD, "peek", peek, "GET: look at the oldest message without taking it",
                   {"max": MAX}),
    "compact": Action(GET_OR_POST, "admin", compact,
                      "GET: rewrite the queue's log without dead bytes"),
    "purge": Action(("POST",), "admin", purge, "POST: drop every message of the queue"),
    "stats": Action(GET_OR_HEAD, "any", show_stats, "GET: numbers of the token's queues as JSON",
                    on_queue=None),
    "": Action(GET_OR_HEAD, "", show_root, "GET: one line that the service runs",
               on_queue=False),
    "healthz": Action(GET_OR_HEAD, "", show_root, "GET: 200 while the process serves",
                      on_queue=False),
    "readyz": Action(GET_OR_HEAD, "", show_ready, "GET: 200 when queues are served",
                     on_queue=False),
    "metrics": Action(GET_OR_HEAD, "", show_metrics, "GET: metrics for Prometheus",
                      on_queue=False),
}
OPTIONS = Action(("OPTIONS",), "", describe, "OPTIONS: what a path takes")
PROBES = ("healthz", "readyz")   # not logged while they succeed


# -- from a head to its action

def find_route(broker: Broker, request: Request, client: Client) -> Route:
    """Check a request in the documented order, as far as its head tells. Raises ApiError."""
    action = find_action(request)
    if request.method == "OPTIONS":
        if action is None and not request.is_asterisk:
            raise no_such_path()
        route = Route(request, OPTIONS)
    elif action is None or action.permission:
        route = authorize(broker, request, action, client)
    else:
        route = Route(request, action)
    if request.method not in route.action.methods:
        raise ApiError(405, f"Use {' or '.join(route.action.methods)} here",
                       headers=b"Allow: %b\r\n" % route.action.allow.encode())
    most = broker.config.settings.max_message_bytes
    if route.action.permission:
        numbers = parse_parameters(request.query, route.action)
        wish = Wish(numbers.get("max", 0), most, numbers.get("lease", 0))
        route = route._replace(parameters=numbers, wish=wish)
    if request.has_body and not route.action.before_body:
        raise ApiError(400, "No body is taken here; parameters belong in the query string")
    if request.length > most:
        raise too_large(broker)
    if route.action.before_body and request.encoding not in ("", "identity"):
        raise ApiError(415, "Send the message without a Content-Encoding")
    return route


def find_action(request: Request) -> Optional[Action]:
    action = ACTIONS.get(request.action) if request.action is not None else None
    names_queue = request.queue is not None
    return action if action and action.on_queue in (names_queue, None) else None


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


def authorize(broker: Broker, request: Request, action: Optional[Action],
              client: Client) -> Route:
    """Return the request's token, the queue that it may use for this action, and as whom."""
    if broker.unready:
        raise unready(broker.unready)
    token = broker.tokens.get(request.token_digest or b"")
    if token is None:
        reason = ("Unknown token" if request.token_digest else "Malformed Authorization header"
                  if request.has_authorization else "Missing Authorization header")
        log_request(logging.WARNING, "unauthorized", request, client, reason=reason)
        raise ApiError(401, f"{reason}; use 'Authorization: Bearer <token>'",
                       headers=b"WWW-Authenticate: Bearer\r\n")
    if action is None:
        raise no_such_path()
    if request.queue is None:
        return Route(request, action, token=token)
    if not token.may(action.permission, request.queue):
        log_request(logging.WARNING, "forbidden", request, client, token=token.name,
                    action=request.action, queue=request.queue)
        raise forbidden(action.permission, request.queue)
    queue = broker.queues.get(request.queue)
    if queue is None:
        raise ApiError(404, f"No queue is named {request.queue}; queues stand in the config")
    own = token.name if token.name in queue.subscribers else None
    subscriber = FIFO if FIFO in queue.subscribers else own
    if subscriber is None and action.permission == "get":
        raise ApiError(403, "An admin token is no subscriber of a broadcast queue; use a token "
                            "without admin that has the queue in its get")
    return Route(request, action, queue, subscriber, token)


def forbidden(permission: str, queue: str) -> ApiError:
    if permission == "admin":
        return ApiError(403, "Only an admin token may do this")
    key = {"peek": "get", "any": "get or post"}.get(permission, permission)
    return ApiError(403, f"This token has no {queue} in its {key}: add it in the config, restart")


def log_request(level: int, name: str, request: Request, client: Client,
                **fields: object) -> None:
    """Log an event of a request; the client is always the peer."""
    forwarded = {"forwarded": request.forwarded} if request.forwarded else {}
    event(level, name, client=client.peer, **forwarded, **fields)


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
EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
HANG_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
Steps = Generator[None, None, T]             # yields when it needs more bytes, or gives way
Piece = Tuple[Union[bytes, memoryview], Optional[Answer]]    # an answer is at its last piece


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection, served a share of a round at a time. Of the base nothing is used but its
    place in the library: its methods wait for the client."""

    _started = 0.0                           # when the request was read; only for its log line

    def __init__(self, request: socket.socket, client_address: Tuple[Any, ...],
                 poll: Poll) -> None:
        # Not the base's, which would serve the whole connection from here.
        self.connection: socket.socket = request
        self.client_address, self.poll = client_address, poll
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
        self.queued = False                  # in the backlog
        self.deadline = poll.now + poll.idle_timeout     # of `state`; see on_deadline
        self._readable = False               # since the last short read: epoll tells once
        self._hung_up = False                # no more input will come than is there
        self._data, self._at = b"", 0        # received; used up to `_at`
        self._checked = 0                    # of the head that is not whole, already looked at
        self._begun = False                  # a request's first byte came, its answer did not go
        self._moved = 0                      # bytes of body or answer since `deadline` was set
        self._route: Optional[Route] = None  # of the request under way
        self._body: Optional[Steps[Any]] = None      # receives its body, or that of the last one
        self._unread = False                 # what nobody will read may still come
        self._held = 0                       # what the body counts in the budget
        self._when_gone: Optional[Callable[[], None]] = None
        self._out: List[Piece] = []          # to be sent
        self._blocked = False                # the client took no more: epoll tells when it does
        self._closing = False                # once all is sent

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
        if not self.queued:
            self.serve()

    def serve(self) -> None:
        """Serve one share of what there is; the rest waits in the backlog."""
        self.queued, self.poll.share = False, SHARE_BYTES
        if self.state == LINGER:
            self._discard_input()
        end = time.monotonic() + SHARE_S
        while self.state == READ and self.poll.share > 0:
            if self._at == len(self._data) and not self._receive():
                return
            moved = self._receive_body() if self._body else self._next_request()
            if not moved and self.poll.share > 0 and not self._receive():
                self._note_begun()
                return
            if time.monotonic() > end:
                break
        self.go_on()

    def go_on(self) -> None:
        """Have what is left served in a later round."""
        if self.state == READ and (self._readable or self._at < len(self._data)):
            self.poll.later(self)

    def finish_with(self, result: Union[Answer, Exception]) -> None:
        """Give the late answer. Called once, by any thread."""
        self.poll.finish(self, result)

    def is_gone(self) -> bool:
        """Tell at once whether the client hung up, or will send no more. Any thread may ask
        while the answer is awaited."""
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
        if self.state == READ and self._begun and (self._route or not self._body):
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
            self.poll.forget(self)
            self.connection.close()
            self._drop_body()
            for _, answer in self._out:
                self.poll.left(answer, sent=False)
            self._out.clear()
            self._hung_up = True
            with contextlib.suppress(MemoryError):       # who matches the waiter finds it gone
                self.when_gone(self._when_gone)

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

    def _note_begun(self) -> None:
        """If a part of a request is here, the rest has to come in time from now on."""
        if not self._begun and self.state == READ and self._has_part():
            self._begun = True
            self._wait_for(self.poll.request_timeout)

    def _has_part(self) -> bool:
        """Tell whether some of a request is here; an empty line before it is none of it."""
        left = len(self._data) - self._at
        return left > 2 or (left > 0 and self._data[self._at:] not in (b"\r", b"\r\n"))

    def _wait_for(self, timeout: int) -> None:
        self.deadline, self._moved = self.poll.now + timeout, 0

    def _await_next(self) -> None:
        """Wait for the next request, a part of which may be here already."""
        self._begun = self._has_part()
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
        """Begin with the next request, if its head is whole; return whether it was."""
        data, at = self._data, self._at
        start = at + 2 if data.startswith(b"\r\n", at) else at       # RFC 9112, 2.2
        end = data.find(b"\r\n\r\n", max(start, at + self._checked - 3))
        try:
            if end < 0:
                check_head(data, start, at + self._checked)
                self._checked = len(data) - at
                return False
            self._at, self._checked = end + 4, 0
            self.poll.share -= SHARE_BYTES // SHARE_REQUESTS
            self._begin(self.poll.service.route(data[start:end], self))
        except ApiError as error:
            self.take_up(error)
        return True

    def _begin(self, route: Route) -> None:
        """Call a request's action, or receive its body first. Raises ApiError."""
        request, self._route, self._unread = route.request, route, route.request.has_body
        if self.poll.debug:
            self._started = self.poll.now
        if route.refusal:
            raise route.refusal
        if not self._unread:
            self._act(route, b"")
        elif not request.chunked and request.length <= len(self._data) - self._at:
            start, self._at = self._at, self._at + request.length
            self._act(route, self._data[start:self._at])
        else:
            self._await_body(route)

    def _act(self, route: Route, body: bytes) -> None:
        """Call an action; its answer is given at once, or late."""
        self.state, self.deadline, self._unread = LATE, math.inf, False
        result: Union[Answer, Exception, None]
        try:
            result = route.action.call(Call(self.poll.service, route, self, body))
        except Exception as error:
            result = error
        if result is not None:
            self.take_up(result)

    # -- bodies that are not here yet

    def _await_body(self, route: Route) -> None:
        """Receive a body, after 100 Continue where the client waits for it."""
        assert route.action.before_body is not None      # find_route refused it
        route.action.before_body(route)
        if route.request.expects and self._at == len(self._data):
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n", None)
        self._begun = True
        self._wait_for(self.poll.request_timeout)
        self._body = (self._chunks() if route.request.chunked
                      else self._exactly(route.request.length, bytearray()))

    def _receive_body(self) -> bool:
        """Use what was received of a body; return whether that completed it."""
        assert self._body is not None
        try:
            next(self._body)
        except StopIteration as end:
            self._body = None
            if self._route:
                self._act(self._route, end.value)
            else:
                self._await_next()
            return True
        except ApiError as error:
            self.take_up(error)
            return True
        return False

    def _exactly(self, size: int, body: bytearray) -> Steps[bytearray]:
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

    def _line(self) -> Steps[bytes]:
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

    def _chunks(self) -> Steps[bytearray]:
        """Receive a chunked body (RFC 9112, 7.1); extensions and trailers are skipped."""
        broker, body, extensions = self.poll.service.broker, bytearray(), 0
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
        size = 0
        while len(trailers) <= REQUEST_FIELDS and size <= REQUEST_HEAD_BYTES:
            line = yield from self._line()
            if not line:
                break
            trailers.append(line)
            size += len(line)
        if size > REQUEST_HEAD_BYTES:
            raise malformed(f"The trailers are longer than {REQUEST_HEAD_BYTES} bytes", 431)
        parse_fields(trailers)
        return body

    def _drop_body(self) -> None:
        self.poll.budget.hold(-self._held)
        self._held, self._body = 0, None

    # -- answers

    def take_up(self, result: Union[Answer, Exception]) -> None:
        """Give the answer to the request under way. Called by the polling thread."""
        answer = result if isinstance(result, Answer) else self._answer_to(result)
        request = self._route.request if self._route else None
        self._route = self._when_gone = None
        if self._held or self._body:
            self._drop_body()
        skip = 0
        if self._unread and request and not (request.chunked or request.expects):
            skip = request.length if request.length <= SKIPPED_BODY_BYTES else 0
        keep_alive = bool(request and request.keep_alive and not answer.close
                          and (skip or not self._unread)
                          and self.poll.service.broker.unready != DRAINING)
        self._unread = answer.close or (self._unread and not (skip and keep_alive))
        try:
            self._render(answer, request, keep_alive)
        except Exception:
            self.poll.left(answer, sent=False)
            raise
        self.poll.service.count(request.action if request else None, answer.status)
        if self.poll.debug:
            self._log(request, answer)
        self.state = READ if keep_alive and not self._blocked else WRITE
        self._closing = not keep_alive
        if keep_alive and skip:
            self._body = self._exactly(skip, bytearray())
        if self.state == READ and not skip:
            self._await_next()
        else:
            self._wait_for(self.poll.request_timeout)

    def _log(self, request: Optional[Request], answer: Answer) -> None:
        if request is None:
            event(logging.DEBUG, "bad_request", client=self.peer, status=answer.status)
        elif request.action not in PROBES or answer.status != 200:
            log_request(logging.DEBUG, "request", request, self, method=request.method,
                        action=request.action, queue=request.queue, status=answer.status,
                        bytes=len(answer.body),
                        ms=round((time.monotonic() - self._started) * 1000, 3))

    def _answer_to(self, error: Exception) -> Answer:
        if isinstance(error, LogFailed):
            self.poll.service.broker.on_failure(error)
        if not isinstance(error, ApiError):  # not for anything that a client or a disk can do
            log_event.error("request_failed client=%s", self.peer, exc_info=error)
        return error_answer(error)

    def _render(self, answer: Answer, request: Optional[Request], keep_alive: bool) -> None:
        head = render_head(answer, keep_alive=keep_alive, old=bool(request and request.old))
        body = b"" if request and request.method == "HEAD" else answer.body
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
        self.state, self._begun, self._data = LINGER, False, b""
        self._wait_for(LINGER_S)
        try:
            if self._unread or self.connection.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT):
                self.connection.shutdown(socket.SHUT_WR)
                self._readable = True
                self._discard_input()
                return
        except OSError:                      # nothing is there, or nobody
            pass
        self.close()

    def _discard_input(self) -> None:
        while self._receive():
            self._data = b""
            if self.poll.share <= 0:
                self.poll.later(self)
                return

    @property
    def peer(self) -> str:
        return f"{self.client_address[0]}:{self.client_address[1]}"


class Poll:
    """The poll of one thread, and what the connections that it serves share. Any thread may call
    `finish` and `ring`; only the polling thread touches anything else."""

    def __init__(self, broker: Broker) -> None:
        settings = broker.config.settings
        self.service, self.budget = Service(broker), broker.budget
        self.request_timeout, self.idle_timeout = settings.request_timeout, settings.idle_timeout
        self.debug = log_event.isEnabledFor(logging.DEBUG)
        self.handlers: Dict[int, Handler] = {}
        self.now = time.monotonic()          # when this round began
        self.share = 0                       # what is left of it for the connection that is served
        self.sending: List[Handler] = []     # those that have something to send in this round
        self._backlog: Deque[Handler] = collections.deque()
        self._done: Deque[Tuple[Handler, Union[Answer, Exception]]] = collections.deque()
        self._sleeping = False               # whoever adds to `_done` has to ring
        self._bell, self._rope = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.epoll = select.epoll()
        self.epoll.register(self._bell, select.EPOLLIN)

    # -- for any thread

    def finish(self, handler: Handler, result: Union[Answer, Exception]) -> None:
        """Have a late answer taken up."""
        self._done.append((handler, result))
        if self._sleeping:
            self.ring()

    def ring(self) -> None:
        """Have the poll wake up."""
        with contextlib.suppress(BlockingIOError):       # it rings already
            os.write(self._rope, b"!")

    # -- for connections

    def add(self, handler: Handler) -> None:
        self.handlers[handler.connection.fileno()] = handler
        self.epoll.register(handler.connection, EVENTS)

    def forget(self, handler: Handler) -> None:
        """Before a connection's descriptor is closed, and may become another's."""
        self.handlers.pop(handler.connection.fileno(), None)

    def later(self, handler: Handler) -> None:
        """Serve a connection again when the others had their share."""
        if not handler.queued:
            self._backlog.append(handler)
            handler.queued = True

    def left(self, answer: Optional[Answer], *, sent: bool) -> None:
        """An answer left, or could not: settle what was taken for it, or put it back."""
        if answer and answer.held:
            self.budget.hold(-answer.held)
        if answer and answer.taken:
            queue, delivery = answer.taken
            (queue.settle if sent else queue.retry)(delivery)

    # -- a round, in its order

    def wait(self, seconds: float) -> List[Tuple[int, int]]:
        """Wait until there is something to do; serve the connections that are ready, and return
        what else the poll saw."""
        self._sleeping = True                # before the look at `_done`
        if self._done or self._backlog or self.sending or self.service.broker.syncers.unserved:
            seconds = 0
        events, others = self.epoll.poll(seconds, POLL_EVENTS), []
        self._sleeping, self.now = False, time.monotonic()
        for fd, flags in events:
            handler = self.handlers.get(fd)
            if handler:
                if time.monotonic() > self.now + EVENTS_S:
                    self.later(handler)
                self._have(handler, handler.on_event, flags)
            elif fd == self._bell:
                os.read(self._bell, RECEIVE_BYTES)
            else:
                others.append((fd, flags))
        return others

    def sweep(self) -> None:
        """End what is over its deadline."""
        for handler in [h for h in self.handlers.values() if h.deadline < self.now]:
            self._have(handler, handler.on_deadline)

    def end_round(self) -> None:
        """Serve some of what was left over; write what the queues were told, and send what tells
        of it; write what left with that."""
        end = time.monotonic() + BACKLOG_S if self._backlog else 0
        for _ in range(len(self._backlog)):
            if time.monotonic() > end:
                break
            handler = self._backlog.popleft()
            self._have(handler, handler.serve)
        broker = self.service.broker
        if broker.staging or broker.syncers.unserved:
            broker.end_round()
        for _ in range(len(self._done)):
            handler, result = self._done.popleft()
            if handler.state == LATE:
                self._have(handler, handler.take_up, result)
                handler.go_on()
            elif isinstance(result, Answer):     # it was closed for what should not happen
                self.left(result, sent=False)
        sending, self.sending = self.sending, []
        for handler in sending:
            self._have(handler, handler.send)
        if broker.staging:
            broker.end_round()

    def _have(self, handler: Handler, act: Callable[..., None], *arguments: object) -> None:
        """Have a connection do something; what goes wrong then ends it, and the others go on."""
        try:
            act(*arguments)
        except LogFailed as failure:
            self.service.broker.on_failure(failure)
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

    def __init__(self, broker: Broker) -> None:
        settings = broker.config.settings
        self.broker, self.poll = broker, Poll(broker)
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
                except LogFailed as failure:
                    self.broker.on_failure(failure)
                except Exception:            # not for anything that a client or a disk can do
                    log_event.exception("serving_failed")
                    time.sleep(PAUSE_S)
        finally:
            self._ended.set()

    def serve_round(self, seconds: float) -> None:
        """Wait for that long at most until there is something to do, and do it."""
        for _ in self.poll.wait(seconds):
            self._accept()
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
            self._add(Handler(connection, address, self.poll))

    def _add(self, handler: Handler) -> None:
        self._refused = {refused for refused in self._refused if refused.state != CLOSED}
        if len(self.poll.handlers) - len(self._refused) < self._max_connections:
            self.poll.add(handler)
        elif len(self._refused) < REFUSED_CONNECTIONS:
            self._refused.add(handler)
            event(logging.WARNING, "too_many_connections", client=handler.peer)
            self.poll.add(handler)
            handler.take_up(ApiError(503, "Too many connections (max_connections); try again",
                                     close=True))
        else:
            handler.connection.close()

    # -- the end

    def drain(self) -> None:
        """Stop accepting, let requests under way end (DRAIN_S at most), close every queue."""
        self.broker.unready = DRAINING
        self._drain_until = time.monotonic() + DRAIN_S
        self.poll.ring()
        self._ended.wait(DRAIN_S + POLL_S)   # in vain if there was no thread to sync in
        self.broker.close()
        self.server_close()

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

    @staticmethod
    def storage_failed(failure: LogFailed) -> NoReturn:
        """End the process at once: what the disk holds is no longer known."""
        event(logging.CRITICAL, "storage_failed", error=failure)
        logging.shutdown()
        os._exit(4)


def _raise_file_limit(max_connections: int, queue_count: int) -> int:
    """Raise the soft limit of open files; return how many connections it allows."""
    spare = 64 + 4 * queue_count             # logs, their rewrites, bookmarks, sockets
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, max_connections + REFUSED_CONNECTIONS + spare)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if limit > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
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
    except ConfigError as error:
        print(f"micro_queue: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        advice = (f"settings.path: cannot use {error.filename}: {error.strerror}; it must be a "
                  f"folder that user {os.geteuid()} may write" if error.filename else str(error))
        print(f"micro_queue: {advice}", file=sys.stderr)
        return 3
    except (StorageError, CompactionFailed, ApiError) as error:
        print(f"micro_queue: {error}", file=sys.stderr)
        return 3
    except LogFailed as error:
        print(f"micro_queue: {error}", file=sys.stderr)
        return 4


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(config: Config) -> int:
    """Serve a config until a signal. Raises ConfigError, StorageError, OSError."""
    debug = os.environ.get("MODE_DEBUG") == "1"
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, stream=sys.stderr,
                        format="%(asctime)s %(levelname)s %(message)s")
    threading.stack_size(THREAD_STACK_BYTES)
    # Before the first thread starts: one that got the signal would not wake this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    broker = Broker(config, Server.storage_failed)
    broker.lock()
    warn_about(config.settings.path)
    server = Server(broker)
    try:
        server.start()
        broker.recover()
    except RuntimeError as error:            # what threading raises for want of a thread
        raise OSError(f"cannot start: {error}") from error
    host, port = server.server_address[:2]
    event(logging.INFO, "serving", address=host, port=port, path=config.settings.path,
          version=__version__)
    while signal.sigwait(SIGNALS) == signal.SIGHUP:
        event(logging.WARNING, "no_reload", advice="restart to use a changed config")
    event(logging.INFO, "draining")
    server.drain()
    event(logging.INFO, "stopped")
    return 0


def warn_about(path: str) -> None:
    """Log a warning for a data folder that does not outlive a reboot."""
    real = os.path.realpath(path)
    kind = ""
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8") as file:
        mounts = [line.split()[1:3] for line in file]
        kind = max((point, kind) for point, kind in mounts
                   if (real + "/").startswith(point.rstrip("/") + "/"))[1]
    if kind == "tmpfs" or (real + "/").startswith("/tmp/"):
        event(logging.WARNING, "path_is_temporary", path=path,
              advice="a reboot or a cleaner of /tmp removes it")


if __name__ == "__main__":
    sys.exit(main())
