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

Lock order: Queue._maintenance, Queue.lock, then Log._one_sync, Log._commit, Broker._timing;
Server._pool stands alone. Never two queues' locks at once, and no lock that a take needs is
held while a disk syncs, but for the last step of a compaction.

Contents: Constants and errors, Config, Records, Log, Subscription, Queue, Broker, Metrics,
HTTP, Server, main.
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
from typing import (Any, Callable, Deque, Dict, Iterable, Iterator, List, Mapping, NamedTuple,
                    NoReturn, Optional, Sequence, Set, Tuple, Type, TypeVar)

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
CACHED_HEAD_BYTES = KIB          # a longer head is parsed each time: bounds the cache's memory
SKIPPED_BODY_BYTES = 64 * KIB    # an unread body up to this is skipped, beyond it we close
LINGER_S = 2                     # how long a closing answer waits for the client to stop sending
DRAIN_S = 5                      # how long a stop waits for requests under way
MAX_LINES = 10_000               # messages of one NDJSON body: bounds the hold of the lock
RETRY_AFTER_S = 5                # what 429 and 503 tell the client to wait
REFUSED_CONNECTIONS = 32         # connections above the limit that are told so at one time
LOOK_S = 2                       # how often a thread that waits looks whether its client is there
POLL_S = 1                       # how often idle connections are looked through
POLL_EVENTS = 64                 # ready connections of one poll
PAUSE_S = 0.01                   # between looks at something that another thread is about to end
SPARE_THREADS = 8                # threads that are kept while they have nothing to do
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
    request_timeout: int = _field(_whole(1, 3600), 30)
    idle_timeout: int = _field(_whole(1, 86400), 75)
    standby: bool = _field(_later(_flag, False), False)
    tls_cert: Optional[str] = _field(_later(_text(".+", "a path", null=True), None), None)
    tls_key: Optional[str] = _field(_later(_text(".+", "a path", null=True), None), None)


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
    """Who may do what. Only the sha256 of the secret is kept after loading."""

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
    """Check a parsed JSON document (objects as `_Object`). Raises ConfigError."""
    _check_keys(value, "config", {"settings", "queues", "tokens"})
    settings = _build(Settings, value.get("settings", _Object()), "settings")
    config = Config(settings, _build_all(QueueConfig, value, "queues"),
                    _build_all(Token, value, "tokens"))
    _check_unique("queues", "name", [queue.name for queue in config.queues])
    _check_unique("tokens", "name", [token.name for token in config.tokens])
    _check_dead_letters(config)
    _check_tokens(config)
    for number, queue in enumerate(config.queues):
        if not config.subscribers(queue):
            raise ConfigError(f"queues[{number}].kind: a broadcast queue needs a subscriber: a "
                              f"token without admin that has {queue.name} in its get")
    return config


def _check_keys(value: Any, path: str, known: Iterable[str]) -> None:
    if not isinstance(value, _Object):
        raise ConfigError(f"{path}: must be a JSON object")
    if value.twice is not None:
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
        self._one_sync = threading.Lock()    # taken before `_commit`
        self._commit = threading.Lock()      # guards what follows, `durable`, `appends`, `fd`
        self._leading = False                # a thread syncs for those who wait
        self._followers: List[Tuple[int, Callable[[Optional[LogFailed]], None]]] = []
        self._syncing = 0                    # threads in fdatasync
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
        start = self._read(0, HEADER.size)
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

    def _read(self, offset: int, size: int) -> bytes:
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
        return not any(self._read(at, min(LOG_CHUNK_BYTES, end - at)).strip(b"\0")
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
            more = self._read(offset, min(want, end - offset)) if want > have else b""
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
            data = self._read(base, min(LOG_CHUNK_BYTES + overlap, end - base))
            at = data.find(self.codec.marker)
            while at >= 0:
                if self.read(base + at, end):
                    return base + at
                at = data.find(self.codec.marker, at + 1)
        return end

    def read(self, offset: int, end: Optional[int] = None) -> Optional[Record]:
        """Return the record at `offset`, None if no valid one stands there below `end`."""
        end = self.tail if end is None else end
        data = self._read(offset, min(HEAD.size + AHEAD_BYTES, end - offset))
        size = self.codec.size_of(data)
        if len(data) < size <= end - offset:
            data = self._read(offset, size)
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
            self.storage.write_all(self.fd, self._read(at, min(REWRITE_BYTES, self.tail - at)), at)
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
                    data = self._read(at, min(REWRITE_BYTES, end - at))
                    self.storage.write_all(fd, data, at - offset)
                self.storage.fsync(fd)
            finally:
                self.storage.close(fd)
        except OSError as error:             # the bytes are lost anyway; serving goes first
            event(logging.WARNING, "corrupt_record_not_saved", file=name, error=error.strerror)

    # -- appending

    def append(self, records: Sequence[Record]) -> List[Tuple[int, int]]:
        """Write records at the tail with one pwrite; return (offset, size) of each.

        Not durable on return. Raises ApiError 503 when the disk is full, the log being as
        before; LogFailed when it is not known to be.
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
        return places

    def _undo_append(self, error: OSError) -> NoReturn:
        if error.errno not in NO_SPACE:
            self._fail("write", error)
        try:
            self.storage.truncate(self.fd, self.tail)
        except OSError as again:
            self._fail("truncate", again)
        raise ApiError(503, "The disk is full; nothing was queued, try again later") from None

    def _fail(self, doing: str, error: OSError) -> NoReturn:
        """Poison the log (invariant 4): every waiter and later call raises LogFailed."""
        failure = LogFailed(f"cannot {doing} {self.path}: {error.strerror}")
        with self._commit:
            self.failure = self.failure or failure
            followers, self._followers = self._followers, []
        for _, call in followers:
            call(self.failure)
        raise failure from error

    # -- durability

    def when_durable(self, number: int, call: Callable[[Optional[LogFailed]], None]) -> bool:
        """Have `call(None)` made once append `number` is as durable as `fsync` asks for.

        Does not block; `call` is made at once, or by the thread that leads the sync, with the
        failure if it fails. Returns whether it is the caller's turn to `lead`.
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
        waiting = True
        while waiting:
            self.sync()
            with self._commit:
                ready = [call for number, call in self._followers if number <= self.durable]
                self._followers = [f for f in self._followers if f[0] > self.durable]
                waiting = self._leading = bool(self._followers)
            for call in ready:
                call(None)

    def wait_durable(self, number: int) -> None:
        """Block until append `number` is durable; raises LogFailed."""
        turn = threading.Lock()
        turn.acquire()
        if self.when_durable(number, lambda _: turn.release()):
            self.lead()
        turn.acquire()
        if self.failure:
            raise self.failure

    def sync(self) -> None:
        """Block until all appends so far are on disk; raises LogFailed."""
        with self._one_sync:                 # of two at once only one would be told of an error
            with self._commit:
                if self.failure:
                    raise self.failure
                target, fd = self.appends, self.fd
                self._syncing += 1
            started = time.perf_counter()
            try:
                self.storage.fdatasync(fd)
            except OSError as error:
                self._fail("sync", error)
            with self._commit:
                self.syncs += 1
                self.sync_seconds += time.perf_counter() - started
                self.durable = max(self.durable, target)
                self._syncing -= 1

    def close_replaced(self) -> None:
        """Close descriptors of replaced files; slow, for that frees a whole file's space."""
        while self._retired:
            with self._commit:
                old = [] if self._syncing else self._retired
                self._retired = self._retired if self._syncing else []
            for fd in old:
                self._close(fd)
            if self._retired:
                time.sleep(PAUSE_S)          # a sync may still use it (invariant 3)

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
        """Let go of the file and its lock. Does not sync."""
        self.close_replaced()
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
            start = self._log._read(at, U64.size)
            length = U64.unpack(start)[0] if len(start) == U64.size else self._size
            end = at + U64.size + length
            if end > self._size:
                self._log.set_aside(at, self._size)
                return
            if length > MAX_MESSAGE_BYTES:
                self._log.set_aside(at, end)
            elif end > self.head and length:
                yield self._log._read(at + U64.size, length)
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

    def _next(self) -> Optional[Placed]:
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
        place = self._next()
        while place and place[2].id <= last:
            keep = place[2].id < drop_from
            offset, end, record = self._pass(keep=keep)
            if keep:
                self.entries[record.id] = ENTRY.pack(offset, READY, end - offset, record.deliveries)
                self._wait_until(record.id, READY)
            place = self._next()

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
            ready, place = self.ready.first(), self._next()
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
        place = self._next()                 # moves the cursor over entries beyond it
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
            subscription._next()             # counts what it need not see
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
            place.restore(subscription)


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

    def restore(self, subscription: Subscription) -> None:
        s = subscription
        s.cursor_id, s.cursor_offset = self.cursor_id, self.cursor_offset
        s._read_offset = self.cursor_offset
        s.passed, s.passed_bytes = self.passed, self.passed_bytes
        for message_id, entry in self.entries.items():
            _, due_ms, size, _ = ENTRY.unpack(entry)
            s.entries[message_id] = entry
            s._wait_until(message_id, due_ms)
            if message_id < s.cursor_id:
                s.kept += 1
                s.kept_bytes += size

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
        queue = self._queue
        try:
            if queue._touched:
                queue._match_locked()
        finally:
            answers, queue._answers = queue._answers, []
            queue.lock.release()
        for waiter, delivery in answers:
            try:
                waiter.answer(delivery)
            except Exception:                # the others must get theirs
                log_event.exception("answer_failed")
                if delivery:
                    queue.retry(delivery)


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
    """

    def __init__(self, config: QueueConfig, folder: str, *, fsync: str = "always",
                 subscribers: Sequence[str] = (FIFO,), clock: Optional[Clock] = None,
                 storage: Optional[Storage] = None, space: Optional[Space] = None,
                 wake_at: Callable[[int], None] = lambda _: None) -> None:
        self.config, self.subscribers = config, subscribers
        self._wake_at = wake_at              # is told when (monotonic ms) to call `tick`
        self.space = space or Space(folder, 0)
        self.lock, self._maintenance = threading.Lock(), threading.Lock()
        self.log = Log(folder, fsync, storage)
        self.state = State(self.log)
        self.in_total = self.out_total = self.redelivered_total = self.compactions_total = 0
        self.expired_total = 0
        self.content_type = b"Content-Type: %b\r\n" % config.content_type.encode()
        self._clock = clock or Clock()
        self._epoch_ms = 0                   # the queue's time when the monotonic clock was 0
        self._unlogged = 0                   # notes that a full disk kept out of the log
        self._closed = False
        self._limited = config.max_messages is not None or config.max_bytes is not None
        self._turn = Turn(self)
        self._consumers = {name: Consumers() for name in subscribers}
        self._awaited: Set[str] = set()      # subscribers with waiters
        self._touched: Set[str] = set()      # those for whom something may have become ready
        self._answers: List[Tuple[Waiter, Optional[Delivery]]] = []
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
            self.log.append(records)
        for record in records:
            self.state.apply(record, 0, 0)   # only a message needs its place

    def close(self) -> None:
        """Write a bookmark that marks a clean stop, and let go of the folder."""
        with self.lock:
            self._closed = True
        if self._unlogged:
            with contextlib.suppress(CompactionFailed):
                self.compact()
        self.bookmark(clean=True)
        self.log.close()

    def now_ms(self) -> int:
        """The queue's time: the wall clock at start, advanced by the monotonic clock."""
        return self._epoch_ms + self._clock.monotonic_ms()

    # -- putting

    def check_room(self, payload_bytes: int = 0) -> None:
        """Raise what a put would be refused with, to be asked before its body is read."""
        with self.lock:
            self._check_room_locked(payload_bytes, 1)

    def _check_room_locked(self, payload_bytes: int, count: int) -> None:
        self._check_open()
        if self._limited:
            self._check_limits(payload_bytes, count)
        self.space.use(payload_bytes + count * HEAD.size)

    def _check_limits(self, payload_bytes: int, count: int) -> None:
        held_count, held_bytes = self.state.held()
        limits = (("max_messages", self.config.max_messages, held_count, count),
                  ("max_bytes", self.config.max_bytes, held_bytes - held_count * HEAD.size,
                   payload_bytes))
        for name, limit, _, more in limits:
            if limit is not None and more > limit:
                raise ApiError(413, f"This could never fit {name} of the queue ({limit})")
        for name, limit, held, more in limits:
            if limit is not None and held + more > limit:
                raise ApiError(429, f"The queue is full ({name} {limit}); try again later")

    def put(self, payloads: Sequence[bytes], delay_s: int = 0, *, limited: bool = True) -> int:
        """Append messages and return the first one's id; durable on return. As `append`."""
        first, number = self.append(payloads, delay_s, limited=limited)
        self.log.wait_durable(number)
        return first

    def append(self, payloads: Sequence[bytes], delay_s: int = 0, *,
               limited: bool = True) -> Tuple[int, int]:
        """Append messages with one write; return the first one's id and the log's number of
        this append, to wait for. All or none; only a crash may leave the first part.

        Raises ApiError 413, 429 or 503 with nothing queued, LogFailed when that is not known.
        """
        with self._turn:
            if limited:
                self._check_room_locked(sum(map(len, payloads)), len(payloads))
            first, now_ms = self.state.next_id, self.now_ms()
            records = [Record(MESSAGE, first + number, now_ms, payload, 0, delay_s * 1000)
                       for number, payload in enumerate(payloads)]
            for record, (offset, size) in zip(records, self.log.append(records)):
                self.state.apply(record, offset, size)
            self.in_total += len(records)
            self._touched.update(self._awaited)
            if delay_s:
                self._wake_locked(now_ms + delay_s * 1000)
            if self.config.ttl and self._expiry_ms == NEVER:
                self._expiry_ms = now_ms + self.config.ttl * 1000
                self._wake_locked(self._expiry_ms)
            return first, self.log.appends

    # -- taking

    def take(self, subscriber: str = FIFO, wish: Wish = ONE,
             waiter: Optional[Waiter] = None) -> Optional[Delivery]:
        """Take the oldest ready messages; without any return None, and `waiter` waits.

        Does not wait for a disk. What is leased comes back at its deadline; the rest is to be
        settled or retried by the caller.
        """
        while True:
            with self._turn:
                self._check_open()
                now_ms = self.now_ms()
                self._tick_locked(subscriber, now_ms)
                if self._touched:            # who waits came first
                    self._match_locked()
                if now_ms < self._expiry_ms:
                    delivery = self._take_locked(subscriber, wish)
                    if delivery is None and waiter:
                        self._wait_locked(subscriber, waiter, now_ms)
                    return delivery
                self._expire_locked(now_ms)

    def _check_open(self) -> None:
        if self._closed:
            raise ApiError(503, "The server is stopping; try again")

    def _take_locked(self, subscriber: str, wish: Wish) -> Optional[Delivery]:
        subscription, messages = self.state.subscriptions[subscriber], []
        for message in choose(iter(subscription.look, None), wish):
            subscription.lease(message)
            messages.append(message)
        if not messages:
            return None
        key = secrets.randbits(KEY_BITS) if wish.lease_s else None
        if key is not None:
            out = [(message.id, message.delivery) for message in messages]
            self._lease_locked(subscriber, key, out, wish.lease_s)
        return Delivery(subscriber, messages, key, wish.lines > 0 and is_line(messages[0].payload))

    def _lease_locked(self, subscriber: str, key: int, out: Sequence[Tuple[int, int]],
                      seconds: int) -> None:
        deadline_ms = self.now_ms() + seconds * 1000
        self._consumers[subscriber].add_lease(key, Lease(out, deadline_ms))
        self._wake_locked(deadline_ms)

    def peek(self, subscriber: Optional[str] = FIFO, wish: Wish = ONE) -> Optional[Delivery]:
        """Return what a take would, without taking it: a peek counts as no delivery. Without a
        subscriber, look at what anyone has not settled."""
        while self.tick() <= self._clock.monotonic_ms():
            pass
        with self._turn:
            state = self.state
            ready = (state.all_held() if subscriber is None
                     else state.subscriptions[subscriber].upcoming())
            messages = [message._replace(delivery=message.delivery - 1)
                        for message in choose(ready, wish)]
        return Delivery(subscriber or FIFO, messages, None, wish.lines > 0
                        and is_line(messages[0].payload)) if messages else None

    # -- waiting

    def _wait_locked(self, subscriber: str, waiter: Waiter, now_ms: int) -> None:
        waiter.deadline_ms = now_ms + waiter.wait_s * 1000
        self._consumers[subscriber].add_waiter(waiter)
        self._awaited.add(subscriber)
        self._wake_locked(waiter.deadline_ms)

    def _match_locked(self) -> None:
        """Give what is ready to those who wait, first come, first served (invariant 2)."""
        now_ms = self.now_ms()
        self._expire_locked(now_ms)
        if now_ms >= self._expiry_ms:        # more than one hold of the lock may take
            self._wake_locked(now_ms)
            return
        while self._touched:
            name = self._touched.pop()
            waiters = self._consumers[name].waiters
            while waiters and self.state.subscriptions[name].look():
                _, waiter = waiters.popitem(last=False)
                gone = waiter.is_gone()
                self._answers.append((waiter, None if gone
                                      else self._take_locked(name, waiter.wish)))
            if not waiters:
                self._awaited.discard(name)

    def stop_waiting(self, subscriber: str, waiter: Waiter) -> bool:
        """Forget a waiter that is not to be answered; False if it is too late for that."""
        with self.lock:
            return self._consumers[subscriber].waiters.pop(waiter.key, None) is not None

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
        if delivery.lease is None:
            with self.lock:
                self._settle_locked(delivery.subscriber, [m.id for m in delivery.messages])

    def retry(self, delivery: Delivery) -> None:
        """A delivery could not leave: its messages are back at their old place."""
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
        self._note_settled_locked(subscriber, ids)
        self.out_total += len(ids)

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
            self.log.append(records)
        except ApiError:
            self._unlogged += 1
        for record in records:
            self.state.apply(record, 0, 0)   # only a message needs its place

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
                if self._unlogged:           # a bookmark is a function of the log alone
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
        self.state, self._unlogged = state, 0
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
            return (self._unlogged > 0 or not self.log.is_in_place()
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
            self._snapshot, self._unlogged = queue.state.snapshot(), queue._unlogged
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
            for record, (offset, size) in zip(records, self._fresh.append(records)):
                self._state.apply(record, offset, size)
                if record.type == MESSAGE:
                    self._last_id = record.id

    def _switch_locked(self) -> None:
        queue, state = self._queue, self._state
        for name, live in queue.state.subscriptions.items():
            ours = state.subscription(name.encode())
            ours.catch_up(live.cursor_id, live.leased_ids())
            if not (ours.agrees_with(live) or self._damaged):
                raise CompactionFailed("the new log does not tell what memory knows; the old one "
                                       "stays")
        if queue._unlogged != self._unlogged:
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

class Job:
    """A wish for a compaction; `done` is set when it was tried, `error` tells how it went."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.done = queue, threading.Event()
        self.error: Optional[Exception] = None


class Broker:
    """The queues of one data folder.

    `on_failure` is called by whichever thread first meets a failed log; it does not return in
    a server. Threads start with `recover` and end with `close`.
    """

    def __init__(self, config: Config, on_failure: Callable[[LogFailed], None],
                 clock: Optional[Clock] = None) -> None:
        settings = config.settings
        self.config, self.on_failure = config, on_failure
        self.tokens = {token.digest: token for token in config.tokens}
        self.space = Space(settings.path, settings.min_free_bytes)
        self._clock = clock or Clock()
        self._timing = threading.Condition()
        self._tick_ms = 0                    # when (monotonic) the next tick is; see _wake_at
        self.queues = {item.name: Queue(item, os.path.join(settings.path, item.name),
                                        fsync=settings.fsync, clock=clock, space=self.space,
                                        subscribers=config.subscribers(item), wake_at=self._wake_at)
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

    def compact(self, queue: Queue) -> None:
        """Have a queue compacted and wait for it. Raises ApiError 503 when it failed."""
        job = Job(queue)
        self._jobs.put(job)
        while not job.done.wait(1):
            if self._stopping.is_set():
                raise ApiError(503, "The server is stopping; try again")
        if job.error:
            raise ApiError(503, f"Not compacted: {job.error}")

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
            try:
                self._compact(job.queue)
            except Exception as error:
                job.error = error
                event(logging.WARNING, "compaction_failed", queue=job.queue.config.name,
                      error=error)
                if not isinstance(error, (CompactionFailed, OSError)):
                    raise
            finally:
                self._compacting.discard(job.queue.config.name)
                job.done.set()

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


# ---- HTTP ---------------------------------------------------------------------------------
# HTTP to calls and back, nothing else. A request's head is parsed by a pure function, so that
# a client that repeats itself is parsed once. An action is one row in ACTIONS and one function.

TOKEN_CHARACTERS = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rb"(%b) ([!-~]+) (\S+)" % TOKEN_CHARACTERS)
HTTP_VERSION = re.compile(rb"HTTP/([0-9])\.([0-9])")
FIELD = re.compile(rb"(%b):[ \t]*([\t -~\x80-\xff]*?)[ \t]*" % TOKEN_CHARACTERS)
BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n)")
BARE_LINE_END_SO_FAR = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t -~\x80-\xff]*)?")
CONTENT_LENGTH = re.compile(rb"[0-9]{1,18}")
HOST = re.compile(rb"[!-+\--.0-~]*")                     # no comma, slash or blank
BEARER = re.compile(rb"(?i:bearer) +([!-~]+)")
PATH = re.compile(r"/(?:([a-z]+)(?:/([-a-zA-Z0-9]{1,50}))?/?)?")
ABSOLUTE_FORM = re.compile(r"\A(?i:https?)://[^/?]*")
PARAMETER = re.compile(r"([a-z]+)=([^=]+)")
NUMBER = re.compile(r"[0-9]{1,8}")
LEASE_ID = re.compile(rf"[0-9a-f]{{{KEY_BITS // 4}}}")
NDJSON = b"application/x-ndjson"
STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\nServer: micro-queue\r\nDate: "
                % (status.value, status.phrase.encode()) for status in http.HTTPStatus}
TEXT = b"Content-Type: text/plain; charset=utf-8\r\n"


class Request(NamedTuple):
    """A parsed head: all that it tells, and nothing that depends on the server's state."""

    method: str
    action: Optional[str]                    # None: no path of ours; "" is `/`
    queue: Optional[str]
    query: str
    token_digest: Optional[bytes]            # None: no token, or not understood
    has_authorization: bool
    length: int
    chunked: bool
    expects: bool                            # the client waits for 100 Continue
    keep_alive: bool
    old: bool                                # HTTP/1.0
    encoding: str
    lines: bool                              # the body is application/x-ndjson
    forwarded: str

    @property
    def has_body(self) -> bool:
        return self.chunked or self.length > 0


class Pending(NamedTuple):
    """An answer that is not there yet. `start(finish)` has `finish(answer)` called once, from
    any thread; `stop` undoes that for a client that is gone, False if it is too late."""

    start: Callable[[Callable[[Answer], None]], None]
    stop: Callable[[], bool]


class Answer(NamedTuple):
    """What to send. `append` (a log and the number of an append) must be durable before.
    `delivery` is settled once it was sent, and put back if that failed. With `pending`, it is
    another answer that is sent, later."""

    status: int = 200
    body: bytes = b""
    headers: bytes = b""
    delivery: Optional[Tuple[Queue, Delivery]] = None
    append: Optional[Tuple[Log, int]] = None
    pending: Optional[Pending] = None


def malformed(what: str, status: int = 400) -> ApiError:
    return ApiError(status, what, close=True)


@functools.lru_cache(maxsize=512)
def parse_cached(head: bytes) -> Request:
    return parse_request(head)


def parse_request(head: bytes) -> Request:
    """Parse a head, its final empty line left out (RFC 9112). Raises ApiError that closes."""
    check_head_size(head)
    if BARE_LINE_END.search(head):
        raise malformed("A line ends in CR LF, and neither stands alone")
    first, *lines = head.split(b"\r\n")
    method, target, old = parse_request_line(first)
    fields = parse_fields(lines)
    length, chunked = parse_framing(fields, old)
    if not old and (b"host" not in fields or not HOST.fullmatch(fields[b"host"])):
        raise malformed("Send exactly one valid Host header")
    path, _, query = target.partition("?")
    route = (None, None) if path == "*" else _route(path)
    bearer = BEARER.fullmatch(fields.get(b"authorization", b""))
    return Request(
        method, *route, query, hashlib.sha256(bearer[1]).digest() if bearer else None,
        b"authorization" in fields, length, chunked, parse_expect(fields, old),
        parse_keep_alive(fields, old), old,
        fields.get(b"content-encoding", b"").decode("latin-1").lower(),
        fields.get(b"content-type", b"").split(b";")[0].strip().lower() == NDJSON,
        fields.get(b"x-forwarded-for", b"")[:200].decode("latin-1"))


def check_head_size(head: bytes) -> None:
    """Refuse a head, whole or not, that is larger than we are ready to read."""
    line_end = head.find(b"\r\n", 0, REQUEST_LINE_BYTES + 2)
    if line_end < 0 and len(head) > REQUEST_LINE_BYTES:
        raise malformed(f"The request line is longer than {REQUEST_LINE_BYTES} bytes", 414)
    if len(head) > REQUEST_HEAD_BYTES:
        raise malformed(f"The request's head is longer than {REQUEST_HEAD_BYTES} bytes", 431)


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
        match = FIELD.fullmatch(line)
        if not match:
            raise malformed("A header line must be: Name: value")
        name = match[1].lower()
        fields[name] = fields[name] + b", " + match[2] if name in fields else match[2]
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
        raise malformed("Content-Length must be one number")
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


def _route(path: str) -> Tuple[Optional[str], Optional[str]]:
    match = PATH.fullmatch(path)
    return (match[1] or "", match[2]) if match else (None, None)


@functools.lru_cache(maxsize=2)
def http_date(now_s: int) -> bytes:
    """Return the Date header's value (RFC 9110, 5.6.7), whatever the locale."""
    t = time.gmtime(now_s)
    day = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[t.tm_wday]
    month = ("Jan", "Feb", "Mar", "Apr", "May", "Jun",
             "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")[t.tm_mon - 1]
    return (f"{day}, {t.tm_mday:02} {month} {t.tm_year} "
            f"{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} GMT").encode()


def render_answer(answer: Answer, *, keep_alive: bool, old: bool, head_only: bool) -> bytes:
    """Return the bytes of an answer, to be sent at once."""
    connection = b"" if keep_alive and not old else (
        b"Connection: keep-alive\r\n" if keep_alive else b"Connection: close\r\n")
    return b"".join((
        STATUS_LINES[answer.status], http_date(int(time.time())),
        b"\r\nContent-Length: %d\r\nCache-Control: no-store\r\n" % len(answer.body),
        connection, answer.headers, b"\r\n", b"" if head_only else answer.body))


class Call(NamedTuple):
    """What an action's function gets. `read_body` reads the request's body, blocking."""

    server: Server
    request: Request
    token: Optional[Token]
    queue: Optional[Queue]
    subscriber: Optional[str]                # as whom the token takes from the queue
    parameters: Mapping[str, int]
    body_is_here: bool                       # a body was received with its head
    read_body: Callable[[], bytes]
    before_blocking: Callable[[], None]      # to be called before anything that waits
    is_gone: Callable[[], bool]              # whether the client hung up


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
    """A row of the API: 404, 405, Allow, OPTIONS, permission and metric follow from it."""

    methods: Sequence[str]
    permission: str                          # post, get, admin, any; "" needs no token
    call: Callable[[Call], Answer]
    text: str
    parameters: Mapping[str, Parameter] = {}
    takes_body: bool = False
    on_queue: Optional[bool] = True          # whether it names a queue; None: it may

    @property
    def allow(self) -> str:
        return ", ".join([*self.methods, "OPTIONS"])


def put(call: Call) -> Answer:
    queue, request = _queue(call), call.request
    if request.encoding not in ("", "identity"):
        raise ApiError(415, "Send the message without a Content-Encoding")
    if not call.body_is_here:                # or else `append` refuses it as soon
        queue.check_room(0 if request.lines else request.length)
    body = call.read_body()
    payloads = split_lines(body) if request.lines else [body]
    if not payloads or not payloads[0]:
        raise ApiError(400, "A message must not be empty; send it as the request's body")
    first, number = queue.append(payloads, call.parameters.get("delay", 0))
    count = b"Message-Count: %d\r\n" % len(payloads) if request.lines else b""
    return Answer(headers=b"Message-Id: %d\r\n%b" % (first, count), append=(queue.log, number))


def split_lines(body: bytes) -> List[bytes]:
    """Return the messages of an NDJSON body. Raises ApiError 413."""
    lines = [line for line in body.replace(b"\r\n", b"\n").split(b"\n") if line]
    if len(lines) > MAX_LINES:
        raise ApiError(413, f"More than {MAX_LINES} lines; send them in parts")
    return lines


def take(call: Call) -> Answer:
    queue, subscriber, wish = _queue(call), _subscriber(call), _wish(call)
    wait_s = call.parameters.get("wait", 0)
    if not wait_s:
        return answer_with(queue, queue.take(subscriber, wish))
    answers: List[Callable[[Answer], None]] = []

    def answer(delivery: Optional[Delivery]) -> None:
        late = delivery is None and call.server.unready
        answers[0](error_answer(unready(call.server)) if late else answer_with(queue, delivery))

    waiter = Waiter(wish, wait_s, answer, call.is_gone)

    def start(finish: Callable[[Answer], None]) -> None:
        answers.append(finish)
        if call.is_gone():
            raise ConnectionResetError("closed before its answer")
        delivery = queue.take(subscriber, wish, waiter)
        if delivery:
            answer(delivery)
    return Answer(pending=Pending(start, lambda: queue.stop_waiting(subscriber, waiter)))


def _wish(call: Call) -> Wish:
    return Wish(call.parameters.get("max", 0), call.server.config.settings.max_message_bytes,
                call.parameters.get("lease", 0))


def answer_with(queue: Queue, delivery: Optional[Delivery]) -> Answer:
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
    if delivery.lease is not None:
        headers += b"Lease-Id: %0*x\r\n" % (KEY_BITS // 4, delivery.lease)
    return Answer(200, body or first.payload, content_type + headers, (queue, delivery))


def ack(call: Call) -> Answer:
    _queue(call).ack(_subscriber(call), call.parameters["lease"])
    return Answer()


def nack(call: Call) -> Answer:
    _queue(call).nack(_subscriber(call), call.parameters["lease"], call.parameters.get("delay", 0))
    return Answer()


def extend(call: Call) -> Answer:
    _queue(call).extend(_subscriber(call), call.parameters["lease"], call.parameters["seconds"])
    return Answer()


def peek(call: Call) -> Answer:
    queue = _queue(call)
    return answer_with(queue, queue.peek(call.subscriber, _wish(call)))._replace(delivery=None)


def compact(call: Call) -> Answer:
    call.before_blocking()
    call.server.broker.compact(_queue(call))
    return Answer()


def purge(call: Call) -> Answer:
    queue = _queue(call)
    count, number = queue.purge()
    return Answer(200, b"%d\n" % count, TEXT, append=(queue.log, number))


def _queue(call: Call) -> Queue:
    assert call.queue is not None            # dispatch looked it up
    return call.queue


def _subscriber(call: Call) -> str:
    assert call.subscriber is not None       # authorize saw to it
    return call.subscriber


def show_stats(call: Call) -> Answer:
    """Tell of one queue, or of all that the token may use."""
    queues = {name: queue for name, queue in call.server.broker.queues.items()
              if call.token and call.token.may("any", name)}
    stats = {name: stats_of(queue.numbers()) for name, queue in queues.items()
             if call.queue in (None, queue)}
    value = stats if call.queue is None else stats[call.queue.config.name]
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


def unready(server: Server) -> ApiError:
    return ApiError(503, f"Not ready: {server.unready}; try again")


def show_root(call: Call) -> Answer:
    return Answer(200, b"micro_queue is running\n", TEXT)


def show_ready(call: Call) -> Answer:
    if call.server.unready:
        raise unready(call.server)
    return Answer(200, b"ready\n", TEXT)


def show_metrics(call: Call) -> Answer:
    if not call.server.config.settings.metric_exporter:
        raise ApiError(404, "Set metric_exporter in the config's settings to have metrics")
    headers = b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
    return Answer(200, render_metrics(call.server.samples()), headers)


GET_OR_POST, GET_OR_HEAD = ("GET", "POST"), ("GET", "HEAD")
LEASE = Parameter(required=True)
DELAY = Parameter(0, 30 * 24 * 3600)
LEASE_SECONDS = Parameter(1, 12 * 3600)
MAX = Parameter(1, 1000)

ACTIONS: Mapping[str, Action] = {
    "in": Action(("POST",), "post", put,
                 "POST: put the body into the queue as a message, or as one a line (NDJSON)",
                 {"delay": DELAY}, takes_body=True),
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


PROBES = ("healthz", "readyz")   # not logged while they succeed


def dispatch(handler: Handler, request: Request) -> Answer:
    """Check a request in the documented order and call its action. Raises ApiError."""
    server, action = handler.server, find_action(request)
    if request.method == "OPTIONS":
        return describe(request, action)
    token: Optional[Token] = None
    queue: Optional[Queue] = None
    subscriber: Optional[str] = None
    if action is None or action.permission:
        token, queue, subscriber = authorize(server, request, action, handler.client_address)
    assert action is not None                # authorize raised
    if request.method not in action.methods:
        raise ApiError(405, f"Use {' or '.join(action.methods)} here",
                       headers=b"Allow: %b\r\n" % action.allow.encode())
    parameters = parse_parameters(request.query, request.action) if action.permission else {}
    if request.has_body and not action.takes_body:
        raise ApiError(400, "No body is taken here; parameters belong in the query string")
    if request.length > server.config.settings.max_message_bytes:
        raise too_large(server)
    return action.call(Call(server, request, token, queue, subscriber, parameters,
                            handler.has_body(), handler.read_body, handler.before_blocking,
                            handler.is_gone))


def find_action(request: Request) -> Optional[Action]:
    action = ACTIONS.get(request.action) if request.action is not None else None
    names_queue = request.queue is not None
    return action if action and action.on_queue in (names_queue, None) else None


def describe(request: Request, action: Optional[Action]) -> Answer:
    """Answer OPTIONS, which needs no token and tells nothing about queues."""
    if action:
        allow, text = action.allow, action.text
    elif request.action is None and request.queue is None and request.method == "OPTIONS":
        allow, text = "GET, HEAD, POST, OPTIONS", "Use /<action>/<queue>; actions: " + _actions()
    else:
        raise no_such_path()
    return Answer(200, text.encode() + b"\n", TEXT + b"Allow: %b\r\n" % allow.encode())


def _actions() -> str:
    return ", ".join(name for name, action in ACTIONS.items() if action.permission)


def no_such_path() -> ApiError:
    return ApiError(404, f"No such path; use /<action>/<queue> with an action of {_actions()}; a "
                         "queue's name is 1 to 50 letters, digits or hyphens")


def too_large(server: Server) -> ApiError:
    limit = server.config.settings.max_message_bytes
    return ApiError(413, f"The body is larger than max_message_bytes ({limit})")


def authorize(server: Server, request: Request, action: Optional[Action],
              client: Tuple[Any, ...]) -> Tuple[Token, Optional[Queue], Optional[str]]:
    """Return the request's token, the queue that it may use for this action, and as whom."""
    if server.unready:
        raise unready(server)
    token = server.broker.tokens.get(request.token_digest or b"")
    if token is None:
        reason = ("Unknown token" if request.token_digest else "Malformed Authorization header"
                  if request.has_authorization else "Missing Authorization header")
        log_request(logging.WARNING, "unauthorized", request, client, reason=reason)
        raise ApiError(401, f"{reason}; use 'Authorization: Bearer <token>'",
                       headers=b"WWW-Authenticate: Bearer\r\n")
    if action is None:
        raise no_such_path()
    if request.queue is None:
        return token, None, None
    if not token.may(action.permission, request.queue):
        log_request(logging.WARNING, "forbidden", request, client, token=token.name,
                    action=request.action, queue=request.queue)
        raise forbidden(action.permission, request.queue)
    queue = server.broker.queues.get(request.queue)
    if queue is None:
        raise ApiError(404, f"No queue is named {request.queue}; queues stand in the config")
    own = token.name if token.name in queue.subscribers else None
    subscriber = FIFO if FIFO in queue.subscribers else own
    if subscriber is None and action.permission == "get":
        raise ApiError(403, "An admin token is no subscriber of a broadcast queue; use a token "
                            "without admin that has the queue in its get")
    return token, queue, subscriber


def forbidden(permission: str, queue: str) -> ApiError:
    if permission == "admin":
        return ApiError(403, "Only an admin token may do this")
    key = {"peek": "get", "any": "get or post"}.get(permission, permission)
    return ApiError(403, f"This token has no {queue} in its {key}: add it in the config, restart")


def log_request(level: int, name: str, request: Request, client: Tuple[Any, ...],
                **fields: object) -> None:
    """Log an event of a request; the client is always the peer."""
    forwarded = {"forwarded": request.forwarded} if request.forwarded else {}
    event(level, name, client=f"{client[0]}:{client[1]}", **forwarded, **fields)


@functools.lru_cache(maxsize=512)
def parse_parameters(query: str, action_name: Optional[str]) -> Mapping[str, int]:
    """Return the query's parameters, each known to the action, given once and in its range."""
    action, found = ACTIONS[action_name or ""], {}  # type: Tuple[Action, Dict[str, int]]
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


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. Reads with one recv and answers with one send where that suffices.

    Between requests no thread belongs to it: the server calls `on_readable`. A method that is
    about to wait calls `before_blocking` first. `busy` and `parked` are set and read by the
    thread that serves the connection and, under its lock, by the server.
    """

    server: Server

    def __init__(self, request: socket.socket, client_address: Tuple[Any, ...],
                 server: Server) -> None:
        # Not the base's, which would serve the whole connection from here.
        self.connection: socket.socket = request
        self.client_address, self.server = client_address, server
        self.busy = False                    # between a request's first byte and its answer
        self.parked = False                  # the answer waits for a sync
        self.polled = False                  # the server's poll looks at this connection
        self.muted = False                   # it does so for a hang-up only
        self.stop_waiting: Optional[Callable[[], bool]] = None   # of a parked answer
        self.deadline = 0.0                  # when an idle or lingering connection is closed
        self._lingering = False
        self._data = b""                     # received, not yet used
        self._arrival_deadline = 0.0         # of the request's head or next MiB; 0: not set
        self._arrived = 0                    # bytes since it was set

    # -- the connection

    def on_readable(self) -> None:
        """Serve what has arrived. Called by the server's polling thread."""
        try:
            data = self.connection.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
        elif not self._lingering:
            self.busy = True
            self._data = data
            self._serve()

    def _serve(self) -> None:
        """Answer the requests that were received, then wait for more, or close."""
        try:
            while self._data:
                if not self._serve_one():
                    return                   # parked, lingering or closed
        except (OSError, ApiError):          # the client is gone, or late with a body that
            self.close()                     # was refused already: nothing to tell it
            return
        except LogFailed as failure:
            self.server.storage_failed(failure)
        self.server.resume(self)

    def close(self) -> None:
        self.server.forget(self)
        self.connection.close()

    def refuse(self, error: ApiError) -> None:
        """Answer before a request was read, and close."""
        self.server.count(None, error.status)
        try:
            self._send(render_answer(error_answer(error), keep_alive=False, old=False,
                                     head_only=False))
            self._linger()
        except OSError:
            self.close()

    def _linger(self) -> None:
        """Close once the client has stopped sending, so that a reset does not overtake the
        answer; what still comes is never looked at."""
        self.connection.shutdown(socket.SHUT_WR)
        self._lingering, self._data = True, b""
        self.server.resume(self, LINGER_S)

    def is_gone(self) -> bool:
        """Tell at once whether the client hung up, or will send no more."""
        fd = self.connection.fileno()
        if fd < 0:
            return True
        poll = select.poll()
        poll.register(fd, select.POLLRDHUP)
        return bool(poll.poll(0))

    def has_more(self) -> bool:
        """Tell at once whether the client sent what was not received yet."""
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def before_blocking(self) -> None:
        """Let another thread serve the other connections while this one waits."""
        self.server.step_down(self)

    # -- one request

    def _serve_one(self) -> bool:
        """Answer one request; return whether the connection goes on in this thread."""
        request: Optional[Request] = None
        self._unread = close = False
        started = time.perf_counter() if self.server.debug else 0.0
        try:
            head = self._read_head()
            parse = parse_cached if len(head) <= CACHED_HEAD_BYTES else parse_request
            self._current = request = parse(head)
            self._unread = request.has_body
            answer = dispatch(self, request)
        except ApiError as error:
            close, answer = error.close, error_answer(error)
        except LogFailed as failure:
            self.server.storage_failed(failure)
        if answer.append or answer.pending:
            return self._serve_later(request, answer, close, started)
        return self._reply(request, answer, close, started).send()

    def _serve_later(self, request: Optional[Request], answer: Answer, close: bool,
                     started: float) -> bool:
        """Answer when it is time to: parked, unless more requests came with this one."""
        if self._data:
            answer = self._wait_for(answer)
            return self._reply(request, answer, close, started).send()
        self.parked = True
        if answer.append:
            self.stop_waiting, (log, number) = None, answer.append
            reply = self._reply(request, answer, close, started)
            if log.when_durable(number, reply.send_parked):
                self.server.lead(log)
        elif answer.pending:
            self.stop_waiting = answer.pending.stop
            self._start(answer.pending, lambda final: self._reply(
                request, final, close, started).send_parked(None))
            self.server.watch(self)
        return False

    def _start(self, pending: Pending, finish: Callable[[Answer], None]) -> None:
        """Have `finish` called with what a pending answer becomes; it may be already."""
        try:
            pending.start(finish)
        except ApiError as error:
            finish(error_answer(error))
        except LogFailed as failure:
            self.server.storage_failed(failure)

    def _wait_for(self, answer: Answer) -> Answer:
        """Block until an answer may be sent. Raises OSError if the client hung up meanwhile."""
        self.before_blocking()
        if answer.append:
            log, number = answer.append
            log.wait_durable(number)
        if answer.pending is None:
            return answer
        final: queues.SimpleQueue[Answer] = queues.SimpleQueue()
        self._start(answer.pending, final.put)
        while True:
            with contextlib.suppress(queues.Empty):
                return final.get(timeout=LOOK_S)
            if self.is_gone() and answer.pending.stop():
                raise ConnectionResetError("closed while it waited")

    def _reply(self, request: Optional[Request], answer: Answer, close: bool,
               started: float) -> Reply:
        skip = 0
        if request and self._unread and not (request.chunked or request.expects):
            skip = request.length if request.length <= SKIPPED_BODY_BYTES else 0
        unread = self._unread and not skip
        close = close or unread
        keep_alive = bool(request and request.keep_alive and not close
                          and self.server.unready != DRAINING)
        data = render_answer(answer, keep_alive=keep_alive, old=bool(request and request.old),
                             head_only=bool(request and request.method == "HEAD"))
        return Reply(self, request, answer, data, keep_alive, close, skip, started)

    # -- reading

    def _read_head(self) -> bytes:
        """Return the next head without its empty line."""
        self._arrival_deadline = 0.0
        data, checked = self._data, 0
        while True:
            start = 2 if data.startswith(b"\r\n") else 0     # RFC 9112, 2.2
            end = data.find(b"\r\n\r\n", max(start, checked - 3))
            if end >= 0:
                self._data = data[end + 4:]
                return data[start:end]
            check_head_size(data[start:])
            if BARE_LINE_END_SO_FAR.search(data, max(0, checked - 1)):
                raise malformed("A line ends in CR LF, and neither stands alone")
            checked = len(data)
            data += self._receive()

    def _receive(self) -> bytes:
        """Receive more of a request that has begun. Raises ApiError 408, OSError."""
        timeout = self.server.config.settings.request_timeout
        now = time.monotonic()
        if not self._arrival_deadline or self._arrived >= MIB:
            self._arrival_deadline, self._arrived = now + timeout, 0
        if not self._wait(select.POLLIN, self._arrival_deadline - now):
            raise ApiError(408, f"The request did not arrive within {timeout} s", close=True)
        data = self.connection.recv(RECEIVE_BYTES)
        if not data:
            raise ConnectionResetError("closed within a request")
        self._arrived += len(data)
        return data

    def _wait(self, events: int, seconds: float) -> bool:
        self.before_blocking()
        poll = select.poll()
        poll.register(self.connection, events)
        return bool(seconds > 0 and poll.poll(seconds * 1000))

    def has_body(self) -> bool:
        """Tell whether the request's body, which is not empty, was received already."""
        return 0 < self._current.length <= len(self._data)

    def read_body(self) -> bytes:
        """Read the request's body, after 100 Continue where the client waits for it."""
        request = self._current
        if request.expects and not self._data:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._arrival_deadline = 0.0
        body = self._read_chunks() if request.chunked else self._read_exactly(request.length)
        self._unread = False
        return body

    def _read_exactly(self, size: int) -> bytes:
        data = self._data
        if len(data) < size:
            parts, have = [data], len(data)
            while have < size:
                parts.append(self._receive())
                have += len(parts[-1])
            data = b"".join(parts)
        self._data = data[size:]
        return data[:size]

    def _read_line(self) -> bytes:
        """Read a line of a chunked body's framing, without its CR LF."""
        while True:
            end = self._data.find(b"\n")
            if end >= 0:
                line, self._data = self._data[:end + 1], self._data[end + 1:]
                if not line.endswith(b"\r\n") or BARE_LINE_END.search(line):
                    raise malformed("A line ends in CR LF, and neither stands alone")
                return line[:-2]
            if len(self._data) > REQUEST_LINE_BYTES:
                raise malformed("A line of the chunked body is too long")
            self._data += self._receive()

    def _read_chunks(self) -> bytes:
        """Read a chunked body (RFC 9112, 7.1); extensions and trailers are skipped."""
        limit, size, parts = self.server.config.settings.max_message_bytes, 0, []
        while True:
            match = CHUNK_LINE.fullmatch(self._read_line())
            if not match:
                raise malformed("A chunk starts with its size in hexadecimal")
            length = int(match[1], 16)
            size += length
            if size > limit:
                raise too_large(self.server)
            if length == 0:
                break
            parts.append(self._read_exactly(length))
            if self._read_exactly(2) != b"\r\n":
                raise malformed("A chunk ends in CR LF")
        lines: List[bytes] = []
        for line in iter(self._read_line, b""):
            lines.append(line)
            if len(lines) > REQUEST_FIELDS:
                break
        parse_fields(lines)
        return b"".join(parts)

    # -- writing

    def _send(self, data: bytes, start: int = 0) -> None:
        """Send `data` from `start` on. Raises OSError if the client is gone or takes nothing
        for `request_timeout`."""
        start += self._send_some(data) if not start else 0
        rest = memoryview(data)[start:]
        while rest:
            if not self._wait(select.POLLOUT, self.server.config.settings.request_timeout):
                raise TimeoutError("the client does not take its answer")
            rest = rest[self._send_some(rest):]

    def _send_some(self, data: Any) -> int:
        try:
            return self.connection.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0


class Reply(NamedTuple):
    """A rendered answer on its way, and what is to be done once it left."""

    handler: Handler
    request: Optional[Request]
    answer: Answer
    data: bytes
    keep_alive: bool
    linger: bool                             # the client may still send what nobody reads
    skip: int                                # bytes of an unread body
    started: float

    def send(self, start: int = 0) -> bool:
        """Send from `start` on; return whether the connection goes on. Raises OSError."""
        handler, server, delivery = self.handler, self.handler.server, self.answer.delivery
        sent = False
        try:
            if start < len(self.data):
                handler._send(self.data, start)
            sent = True
        finally:
            if delivery:
                server.settle(*delivery, sent=sent)
        server.count(self.request.action if self.request else None, self.answer.status)
        if server.debug:
            self._log()
        if self.linger or not (self.keep_alive or self._may_close()):
            handler._linger()
        elif not self.keep_alive:
            handler.close()
        elif self.skip:
            handler._read_exactly(self.skip)
        return self.keep_alive

    def _may_close(self) -> bool:
        """Tell whether nothing unread is left, for which a close would reset the connection and
        take the answer with it."""
        return not (self.skip or self.handler.has_more())

    def send_parked(self, failure: Optional[LogFailed]) -> None:
        """Send from a thread that has more to do: raises nothing, and waits for no client."""
        if failure:
            self.handler.server.storage_failed(failure)
        try:
            start = self.handler._send_some(self.data)
        except OSError:                      # as it will again
            self._finish(0)
            return
        if start == len(self.data):
            self._finish(start)
            return
        try:
            threading.Thread(target=self._finish, args=(start,), daemon=True).start()
        except RuntimeError as error:        # others cannot wait for this client
            event(logging.ERROR, "cannot_start_thread", error=error)
            if self.answer.delivery:
                self.handler.server.settle(*self.answer.delivery, sent=False)
            self.handler.close()

    def _finish(self, start: int) -> None:
        try:
            if self.send(start):
                self.handler.server.resume(self.handler)
        except OSError:
            self.handler.close()
        except Exception:                    # not for anything that a client or a disk can do
            log_event.exception("connection_failed client=%s", self.handler.client_address[0])
            self.handler.close()

    def _log(self) -> None:
        request, status = self.request, self.answer.status
        if request is None:
            event(logging.DEBUG, "bad_request", client=self.handler.client_address[0],
                  status=status)
        elif request.action not in PROBES or status != 200:
            log_request(logging.DEBUG, "request", request, self.handler.client_address,
                        method=request.method, action=request.action, queue=request.queue,
                        status=status, bytes=len(self.answer.body),
                        ms=round((time.perf_counter() - self.started) * 1000, 3))


def error_answer(error: ApiError) -> Answer:
    return Answer(error.status, error.message.encode() + b"\n", TEXT + error.headers)


# ---- Server -------------------------------------------------------------------------------
# Threads, limits and the end. One thread at a time polls all connections and serves those that
# are ready; before it waits for anything else, it makes another thread the poller. So a
# request that waits for nothing costs no switch of threads, and an idle connection no thread.

DRAINING, RECOVERING = "draining", "recovering"


class Server(http.server.ThreadingHTTPServer):
    """Listens from the start on; answers 503 until `unready` is None.

    1. Who holds `_polling` is the poller: its thread id is `_poller`.
    2. A connection is served by one thread: by the poller while it is `polled`, or by a
       thread that stepped down with it, or, while `parked`, by the thread that leads a sync.
    `_pool` guards the sets of connections and threads, `polled` and `parked`, and the request
    counters. It is never held while anything is waited for.
    """

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, config: Config, broker: Broker) -> None:
        settings = config.settings
        self.config, self.broker = config, broker
        self.unready: Optional[str] = RECOVERING
        self.debug = log_event.isEnabledFor(logging.DEBUG)
        self.handlers: Dict[int, Handler] = {}
        self._refused: Set[Handler] = set()  # of them, those above the limit
        self.requests: Dict[Tuple[str, int], int] = collections.Counter()
        self._pool = threading.Lock()
        self._polling = threading.Lock()
        self._poller = 0
        self._waiting = 0                    # threads that wait to be the poller
        self._to_lead: List[Log] = []        # logs that the poller has to sync
        self._stopped = threading.Event()
        self._max_connections = _raise_file_limit(settings.max_connections, len(broker.queues))
        if ":" in settings.listen_address:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((settings.listen_address, settings.listen_port), Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"settings.listen_port: cannot listen on {settings.listen_address} "
                              f"port {settings.listen_port}: {reason}") from None
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)    # is inherited
        self._epoll = select.epoll()
        self._epoll.register(self.socket, select.EPOLLIN)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the resolver for a name that nobody reads.
        socketserver.TCPServer.server_bind(self)

    # -- threads

    def serve_forever(self, poll_interval: float = POLL_S) -> None:
        """Serve until `shutdown` is called."""
        self.start()
        self._stopped.wait()

    def start(self) -> None:
        """Serve from now on, in threads of its own. Raises RuntimeError if there is none."""
        self._start_thread()

    def shutdown(self) -> None:
        """Have `serve_forever` return; connections are served until `server_close`."""
        self._stopped.set()

    def _start_thread(self) -> None:
        with self._pool:
            self._waiting += 1
        try:
            threading.Thread(target=self._work, daemon=True).start()
        except RuntimeError:
            with self._pool:
                self._waiting -= 1
            raise

    def _work(self) -> None:
        """Be the poller when it is this thread's turn, until too many threads wait for it."""
        while True:
            self._polling.acquire()
            with self._pool:
                self._waiting -= 1
                self._poller = threading.get_ident()
            try:
                self._poll()
            except Exception:                # not for anything that a client or a disk can do
                log_event.exception("serving_failed")
            if self._is_poller():
                self._release_polling()
            with self._pool:
                if self._waiting >= SPARE_THREADS:
                    return
                self._waiting += 1

    def _is_poller(self) -> bool:
        return self._poller == threading.get_ident()

    def _release_polling(self) -> None:
        self._poller = 0
        self._polling.release()

    def _poll(self) -> None:
        """Serve what is ready until this thread is no longer the poller, or has to sync."""
        next_sweep = time.monotonic() + POLL_S
        listener = self.socket.fileno()
        while not self._to_lead:
            for fd, _ in self._epoll.poll(POLL_S, POLL_EVENTS):
                if fd == listener:
                    self._handle_request_noblock()
                else:
                    self._serve_connection(fd)
                if not self._is_poller():
                    return
            if time.monotonic() >= next_sweep:
                next_sweep = time.monotonic() + POLL_S
                self._sweep()
        logs, self._to_lead = self._to_lead, []
        self.step_down(None)
        for log in logs:
            try:
                log.lead()
            except LogFailed as failure:
                self.storage_failed(failure)

    def step_down(self, handler: Optional[Handler]) -> None:
        """Make another thread the poller, if this one is; `handler` stays with this thread.

        Without a thread to be had this one stays the poller: all wait for what it waits for.
        """
        if not self._is_poller():
            return
        try:
            if not self._waiting:
                self._start_thread()
        except RuntimeError as error:
            event(logging.ERROR, "cannot_start_thread", error=error)
            return
        if handler and handler.polled:
            with self._pool:
                self._epoll.unregister(handler.connection)
                handler.polled = False
        self._release_polling()

    def lead(self, log: Log) -> None:
        """Sync a log for those who wait: the poller after it served what is ready."""
        if self._is_poller():
            self._to_lead.append(log)
        else:
            log.lead()

    # -- connections

    def _handle_request_noblock(self) -> None:
        """Accept what is there to accept, up to a poll's worth."""
        for _ in range(POLL_EVENTS):
            try:
                connection, address = self.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    event(logging.ERROR, "cannot_accept", error=error.strerror)
                    with self._pool:
                        if self.unready != DRAINING:     # a pause, not a spin: see _sweep
                            self._epoll.modify(self.socket, 0)
                return
            self._add(Handler(connection, address, self))

    def _add(self, handler: Handler) -> None:
        refuse = len(self.handlers) - len(self._refused) >= self._max_connections
        if refuse and len(self._refused) >= REFUSED_CONNECTIONS:
            handler.connection.close()
            return
        with self._pool:
            self.handlers[handler.connection.fileno()] = handler
            if refuse:
                self._refused.add(handler)
        if refuse:
            event(logging.WARNING, "too_many_connections", client=handler.client_address[0])
            handler.refuse(ApiError(503, "Too many connections (max_connections); try again"))
        else:
            self.resume(handler)

    def _serve_connection(self, fd: int) -> None:
        handler = self.handlers.get(fd)
        if handler is None:
            return
        if handler.parked and self._look_at_parked(handler):
            return
        try:
            handler.on_readable()
        except Exception:                    # not for anything that a client or a disk can do
            log_event.exception("connection_failed client=%s", handler.client_address[0])
            handler.close()

    def watch(self, handler: Handler) -> None:
        """Have a parked connection looked at again, if its thread stepped down with it."""
        with self._pool:
            if handler.parked and not handler.polled:
                handler.polled = True
                self._epoll.register(handler.connection, select.EPOLLIN)

    def _look_at_parked(self, handler: Handler) -> bool:
        """What comes while an answer is awaited is served afterwards; a client that hung up
        waits no longer. Return whether the answer is still awaited."""
        stop = handler.stop_waiting
        gone = stop is None or handler.is_gone()
        if gone and stop and stop():
            handler.close()
            return True
        with self._pool:
            if not handler.parked:
                return False
            if gone:                         # or the answer is on its way: nothing to look for
                self._epoll.unregister(handler.connection)
                handler.polled = False
            else:
                self._epoll.modify(handler.connection, select.EPOLLRDHUP)
                handler.muted = True
        return True

    def resume(self, handler: Handler, seconds: Optional[float] = None) -> None:
        """Look at a connection again, for `seconds`; by default for `idle_timeout`."""
        if seconds is None:
            seconds = self.config.settings.idle_timeout
        handler.deadline = time.monotonic() + seconds
        if handler.polled and not handler.parked:        # the poller's own
            handler.busy = False
            return
        with self._pool:
            handler.busy = handler.parked = False
            if not handler.polled:
                handler.polled = True
                self._epoll.register(handler.connection, select.EPOLLIN)
            elif handler.muted:
                self._epoll.modify(handler.connection, select.EPOLLIN)
            handler.muted = False

    def forget(self, handler: Handler) -> None:
        """Before a connection's descriptor is closed, and may become another's."""
        with self._pool:
            handler.parked = False
            self.handlers.pop(handler.connection.fileno(), None)
            self._refused.discard(handler)

    def settle(self, queue: Queue, delivery: Delivery, *, sent: bool) -> None:
        """The answer with a delivery left, or did not."""
        try:
            (queue.settle if sent else queue.retry)(delivery)
        except LogFailed as failure:
            self.storage_failed(failure)

    def _sweep(self) -> None:
        """Close what was idle for too long; accept again after a pause."""
        now = time.monotonic()
        with self._pool:
            late = [h for h in self.handlers.values() if not h.busy and h.deadline < now]
        for handler in late:
            handler.close()
        with self._pool:
            if self.unready != DRAINING:
                self._epoll.modify(self.socket, select.EPOLLIN)

    # -- numbers

    def count(self, action: Optional[str], status: int) -> None:
        key = (action if action in ACTIONS else None) or "other", status
        with self._pool:
            self.requests[key] += 1

    def samples(self) -> Mapping[str, Sequence[Sample]]:
        """Return the samples of all metrics."""
        found: Dict[str, List[Sample]] = process_samples()
        logs = [queue.log for queue in self.broker.queues.values()]
        with self._pool:
            requests = sorted(self.requests.items())
        found[PREFIX + "http_requests_total"] = [
            ({"action": action, "code": str(code)}, count) for (action, code), count in requests]
        found[PREFIX + "fsync_duration_seconds_sum"] = [({}, sum(log.sync_seconds for log in logs))]
        found[PREFIX + "fsync_duration_seconds_count"] = [({}, sum(log.syncs for log in logs))]
        found[PREFIX + "active"] = [({}, int(self.unready is None))]
        found[PREFIX + "build_info"] = [({"version": __version__}, 1)]
        for name, queue in self.broker.queues.items() if self.unready is None else ():
            for metric, samples in queue_samples(name, queue.numbers()).items():
                found.setdefault(PREFIX + metric, []).extend(samples)
        return found

    # -- the end

    def drain(self) -> None:
        """Stop accepting, let requests under way end (DRAIN_S at most), close every queue."""
        with self._pool:
            self.unready = DRAINING
            self._epoll.unregister(self.socket)
        self.socket.close()                  # new clients are refused at once, not left to wait
        deadline = time.monotonic() + DRAIN_S
        while any(handler.busy for handler in list(self.handlers.values())):
            for queue in self.broker.queues.values():
                queue.dismiss()              # again: some may just have begun to wait
            if time.monotonic() > deadline:
                event(logging.WARNING, "requests_cut_off")
                break
            time.sleep(0.01)
        self.broker.close()
        self.server_close()

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
    server = Server(config, broker)
    try:
        server.start()
        broker.recover()
    except RuntimeError as error:            # what threading raises for want of a thread
        raise OSError(f"cannot start: {error}") from error
    server.unready = None
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
