#!/usr/bin/env python3
"""A durable HTTP queue server in one file: no packages, no database, no client library.

Run it, then talk to it with curl:

    python3 micro_queue.py -c config.json
    curl -H "Authorization: Bearer $TOKEN" http://127.0.0.1:10000/in/fetcher --data 'hello'
    curl -H "Authorization: Bearer $TOKEN" http://127.0.0.1:10000/out/fetcher

What it guarantees
    A 200 to a put means that the message is on disk (`fsync: "always"`): it survives a kill
    and a power cut. A message leaves the queue only after its answer left; a take that did
    not end well puts the message back at its old place. Order is first in, first out.
What it does not guarantee
    Exactly-once delivery: a kill between an answer and its note in the log, or a power cut
    soon after it, delivers that message again. Sent is not received.

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

Lock order: Queue._maintenance, Queue.lock, Log._one_sync, Log._commit; Server._pool stands
alone. Never two queues' locks at once, and no lock that a take needs is held while a disk
syncs, but for the last step of a compaction.

Contents: Constants and errors, Config, Records, Log, Subscription, Queue, Broker, Metrics,
HTTP, Server, main.
"""
from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import heapq
import http
import http.server
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

__version__ = "2.0.0"

# ---- Constants and errors -----------------------------------------------------------------
# Sizes with their reason, and the errors that cross section borders.

KIB, MIB = 1 << 10, 1 << 20
LOG_CHUNK_BYTES = 256 * KIB      # one read of a scan: large enough that reads cost nothing
AHEAD_BYTES = 16 * KIB           # what a subscription reads ahead: small, for each has its own
REWRITE_BYTES = MIB              # recovery rewrites the tail in pieces that fit any memory
ID_GAP = 1 << 24                 # more ids than could be lost unseen between two starts
LEFT = (1 << 64) - 1             # position of a subscriber that is no more
BOOKMARK_BYTES = 4 * MIB         # recovery scans about this much after a kill
BOOKMARK_GROWTH = 8              # a bookmark may cost an eighth of what the log grew
COMPACT_DEAD_BYTES = 16 * MIB    # below this, dead bytes are not worth a rewrite
COMPACT_DEAD_LOW_BYTES = 64 * KIB            # the same while the disk is nearly full
COMPACT_LOCKED_BYTES = MIB       # the rest that compaction copies while it holds the lock
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
RETRY_AFTER_S = 5                # what 429 and 503 tell the client to wait
REFUSED_CONNECTIONS = 32         # connections above the limit that are told so at one time
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
_path = _text(r"(?s).+", "a path")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for the whole server; times in seconds, sizes in bytes."""

    listen_address: str = _field(_text(r"[0-9A-Za-z.:_%-]+", "a host name or address"),
                                 "127.0.0.1")
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
    kind: str = _field(_later(_text("fifo|broadcast", '"fifo" or "broadcast"'), "fifo"), "fifo")
    content_type: str = _field(_text(r"[!-~]([ -~]{0,126}[!-~])?", "a media type"),
                               "application/json")
    max_messages: Optional[int] = _field(_later(_whole(1, 1 << 50, null=True), None), None)
    max_bytes: Optional[int] = _field(_later(_whole(1, 1 << 50, null=True), None), None)
    ttl: Optional[int] = _field(_later(_whole(1, 1 << 32, null=True), None), None)
    max_deliveries: Optional[int] = _field(_later(_whole(1, 1 << 31, null=True), None), None)
    dead_letter: Optional[str] = _field(
        _later(_text(QUEUE_NAME.pattern, "a queue's name", null=True), None), None)


@dataclasses.dataclass(frozen=True)
class Token:
    """Who may do what. Only the sha256 of the secret is kept after loading."""

    name: str = _field(_text(".{1,100}", "1 to 100 printable characters"))
    token: Optional[str] = _field(
        _text("[!-~]{20,500}", "20 to 500 visible ASCII characters, e.g. from `uuidgen`"), None)
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
        granted = {"post": self.post, "get": self.get}.get(permission, ())
        return self.admin or queue in granted


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole, valid configuration."""

    settings: Settings
    queues: Sequence[QueueConfig]
    tokens: Sequence[Token]


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
        raise ConfigError(
            f"{path} is not JSON ({error}); a YAML config of the Go server is converted with: "
            "yq -o json . config.yml > config.json") from None
    return parse_config(value)


def parse_config(value: Any) -> Config:
    """Check a parsed JSON document (objects as `_Object`). Raises ConfigError."""
    _check_keys(value, "config", {"settings", "queues", "tokens"})
    settings = _build(Settings, value.get("settings", _Object()), "settings")
    config = Config(settings, _build_all(QueueConfig, value, "queues"),
                    _build_all(Token, value, "tokens"))
    _check_unique("queues", "name", [queue.name for queue in config.queues])
    _check_unique("tokens", "name", [token.name for token in config.tokens])
    _check_tokens(config)
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

    def encode(self, record: Record, offset: int) -> bytes:
        """Return the bytes of `record` as they stand at `offset`, and only there."""
        type_, id_, time_ms, payload, count, delay_ms = record
        head = UNSEALED.pack(self.marker, type_, count, id_, time_ms, delay_ms, len(payload))
        seed = zlib.crc32(U64.pack(offset), self._seed)
        return b"".join((head, U32.pack(zlib.crc32(payload, zlib.crc32(head, seed))), payload))

    def size_at(self, data: bytes, at: int) -> Optional[int]:
        """Return the size of the record that seems to start at `data[at]`, None if none does.

        Needs HEAD.size bytes from `at` on.
        """
        if not data.startswith(self.marker, at):
            return None
        length: int = HEAD.unpack_from(data, at)[6]
        return HEAD.size + length if length <= MAX_MESSAGE_BYTES else None

    def decode(self, data: bytes, at: int, size: int, offset: int) -> Optional[Record]:
        """Return the record in `data[at:at + size]` if it is one of this log at `offset`."""
        _, type_, count, id_, time_ms, delay_ms, _, crc = HEAD.unpack_from(data, at)
        body = at + HEAD.size
        payload = data[body:at + size]
        seed = zlib.crc32(data[at:body - U32.size], zlib.crc32(U64.pack(offset), self._seed))
        if zlib.crc32(payload, seed) != crc:
            return None
        return Record(type_, id_, time_ms, payload, count, delay_ms)


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
            at = offset - base
            size = self.codec.size_at(data, at) if len(data) - at >= HEAD.size else HEAD.size
            if size and at + size > len(data) and offset + size <= end:
                base, at = offset, 0
                data = self._read(offset, min(max(size, chunk), end - offset))
                size = self.codec.size_at(data, 0)
                if size and size > len(data):
                    data = self._read(offset, min(size, end - offset))
            whole = size and at + size <= len(data)
            record = self.codec.decode(data, at, size, offset) if whole and size else None
            after = offset + size if record and size else self._next_valid(offset + 1, end)
            yield offset, after, record
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
        size = self.codec.size_at(data, 0) if len(data) >= HEAD.size else None
        if size is None or offset + size > end:
            return None
        if size > len(data):
            data = self._read(offset, size)
        return self.codec.decode(data, 0, size, offset) if size <= len(data) else None

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
        offset, parts, places = self.tail, [], []
        for record in records:
            part = self.codec.encode(record, offset)
            parts.append(part)
            places.append((offset, len(part)))
            offset += len(part)
        try:
            self.storage.write_all(self.fd, parts[0] if len(parts) == 1 else b"".join(parts),
                                   self.tail)
        except OSError as error:
            self._undo_append(error)
        self.tail = offset
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
ID_BITS = 64


class Message(NamedTuple):
    """A message in a consumer's hands; `delivery` is the number of this delivery, from 1."""

    id: int
    time_ms: int
    payload: bytes
    delivery: int


class Subscription:
    """The place of one subscriber in a log. Its queue's lock guards all of it.

    1. Below `cursor_id` everything is settled except `entries`; from it on everything waits.
       An entry at or beyond the cursor is a message that was put with a delay.
    2. `passed` messages of the log lie below the cursor, `kept` of them are entries.
    3. An entry's due is READY, LEASED, or when its delay ends. `ready` holds the id of every
       ready entry and `delayed` the due and id of every delayed one; both may hold stale items.
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
        self.ready: List[int] = []                       # heap of ids
        self.delayed: List[int] = []                     # heap of due_ms << ID_BITS | id
        self._ahead: Deque[Tuple[int, int, Record]] = collections.deque()
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

    def _next(self) -> Optional[Tuple[int, int, Record]]:
        """Return (offset, end, record) of the first message at the cursor, which moves over
        entries that lie beyond it."""
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
        start = self._read_offset
        for offset, end, record in log.scan(start, self._state.end, AHEAD_BYTES):
            self._read_offset = end
            if record is None:
                log.set_aside(offset, end)
            elif record.type == MESSAGE and record.id >= self.cursor_id:
                self._ahead.append((offset, end, record))
            if end - start >= AHEAD_BYTES and self._ahead:
                break
        if not self._ahead:                              # the rest was damaged
            self.passed, self.passed_bytes = self._state.appended, self._state.appended_bytes
        return bool(self._ahead)

    def _pass(self, *, keep: bool) -> Tuple[int, int, Record]:
        """Move the cursor over the next message; `keep` if it is, or becomes, an entry."""
        place = offset, end, record = self._ahead.popleft()
        self.cursor_id, self.cursor_offset = record.id + 1, end
        self.passed += 1
        self.passed_bytes += end - offset
        if keep:
            self.kept += 1
            self.kept_bytes += end - offset
        return place

    # -- entries

    def _wait_until(self, message_id: int, due_ms: int) -> None:
        """Note in a heap that an entry is ready, or when it will be (invariant 3)."""
        if due_ms:
            self.delayed_count += 1
            heapq.heappush(self.delayed, due_ms << ID_BITS | message_id)
            if len(self.delayed) > 2 * self.delayed_count + 64:
                self.delayed = [item for item in self.delayed if self._is_due_item(item)]
                heapq.heapify(self.delayed)
        else:
            heapq.heappush(self.ready, message_id)
            live = len(self.entries) - self.leased_count - self.delayed_count
            if len(self.ready) > 2 * live + 64:
                self.ready = sorted({id_ for id_ in self.ready if self._due(id_) == READY})

    def _due(self, message_id: int) -> Optional[int]:
        entry = self.entries.get(message_id)
        return None if entry is None else int(ENTRY.unpack(entry)[1])

    def _is_due_item(self, item: int) -> bool:
        return self._due(item & LEFT) == item >> ID_BITS

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
        """A message was put with a delay: an entry at once, for the timers to see."""
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

    def tick(self, now_ms: int) -> None:
        """Make ready what is due."""
        while self.delayed and self.delayed[0] >> ID_BITS <= now_ms:
            item = heapq.heappop(self.delayed)
            if self._is_due_item(item):
                offset, due_ms, size, count = ENTRY.unpack(self.entries[item & LEFT])
                self._leave(due_ms)
                self.entries[item & LEFT] = ENTRY.pack(offset, READY, size, count)
                self._wait_until(item & LEFT, READY)

    def lowest(self) -> Optional[Tuple[int, int, Optional[Record]]]:
        """Return (id, offset, record) of the lowest ready message; the record of an entry is
        not read yet."""
        while self.ready and self._due(self.ready[0]) != READY:
            heapq.heappop(self.ready)
        place = self._next()
        if self.ready and (place is None or self.ready[0] < place[2].id):
            return self.ready[0], ENTRY.unpack(self.entries[self.ready[0]])[0], None
        return (place[2].id, place[0], place[2]) if place else None

    def take(self) -> Optional[Message]:
        """Lease the lowest ready message. One whose bytes went bad is set aside, not given."""
        found = self.lowest()
        while found:
            message_id, offset, record = found
            if record:
                _, end, _ = self._pass(keep=True)
                size, count = end - offset, record.deliveries
            else:
                _, _, size, count = ENTRY.unpack(self.entries[heapq.heappop(self.ready)])
                record = self._state.log.read(offset)
            self.entries[message_id] = ENTRY.pack(offset, LEASED, size, count)
            self.leased_count += 1
            if record and record.id == message_id:
                return Message(message_id, record.time_ms, record.payload, count + 1)
            self._state.log.set_aside(offset, offset + size)
            self._drop(message_id)
            found = self.lowest()
        return None

    def oldest(self) -> Optional[Record]:
        """Return the first message that is not settled. Looks at every entry."""
        if self.entries:
            lowest = min(self.entries)
            if lowest < self.cursor_id:
                return self._state.log.read(ENTRY.unpack(self.entries[lowest])[0])
        place = self._next()
        return place[2] if place else None

    def is_leased(self, message_id: int) -> bool:
        return self._due(message_id) == LEASED

    def leased_ids(self) -> List[int]:
        return [id_ for id_ in self.entries if self.is_leased(id_)] if self.leased_count else []

    def catch_up(self, live: Subscription) -> bool:
        """Lease what is leased in `live`, the same subscriber in the log that ours replaces.

        Returns whether both hold the same messages.
        """
        self._advance(live.cursor_id - 1, drop_from=live.cursor_id)
        self.cursor_id = max(self.cursor_id, live.cursor_id)
        for message_id in live.leased_ids():
            if message_id in self.entries:
                offset, due_ms, size, count = ENTRY.unpack(self.entries[message_id])
                self._leave(due_ms)
                self.entries[message_id] = ENTRY.pack(offset, LEASED, size, count)
                self.leased_count += 1
        # The cursors may differ by entries that lie beyond one of them.
        return (self.held_count == live.held_count
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
        self.appended, self.appended_bytes = 0, 0
        self.subscriptions: Dict[str, Subscription] = {}

    def apply(self, record: Record, offset: int, size: int) -> None:
        """Apply one record that stands at `offset`; the only way in which a state changes.

        A record that names a message which the log lacks changes only the next id.
        """
        self.time_ms = max(self.time_ms, record.time_ms)
        if record.type == MESSAGE:
            self.next_id = max(self.next_id, record.id + 1)
            self.appended += 1
            self.appended_bytes += size
            self.end = offset + size
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
        elif record.type == POSITION:
            self.subscription(record.payload).apply_position(record.id)
            self.next_id = max(self.next_id, record.id)

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
        lowest = min(self.subscriptions.values(), key=lambda s: s.cursor_id)
        below = {id_: entry for s in self.subscriptions.values()
                 for id_, entry in s.entries.items() if id_ < lowest.cursor_id}
        return (self.appended - lowest.passed + len(below),
                self.appended_bytes - lowest.passed_bytes
                + sum(ENTRY.unpack(entry)[2] for entry in below.values()))

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

    def retries(self, now_ms: int) -> Iterator[Record]:
        """Yield what is to be known of entries besides that they wait."""
        for message_id, entry in sorted(self.entries.items()):
            _, due_ms, _, count = ENTRY.unpack(entry)
            due_ms = READY if due_ms == LEASED else due_ms
            if count or due_ms:
                yield retry(message_id, count, due_ms, self.name, now_ms)

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

FIFO = ""                        # the subscriber of a fifo queue


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


class Delivery(NamedTuple):
    """Messages that are leased to one consumer."""

    subscriber: str
    messages: List[Message]


class Queue:
    """One durable queue.

    `lock` guards the state, the log's tail and the counters. `_maintenance` keeps bookmark and
    compaction apart and is taken before `lock`. All methods may be called by any thread.
    """

    def __init__(self, config: QueueConfig, folder: str, *, fsync: str = "always",
                 subscribers: Sequence[str] = (FIFO,), clock: Optional[Clock] = None,
                 storage: Optional[Storage] = None, space: Optional[Space] = None) -> None:
        self.config, self.subscribers = config, subscribers
        self.space = space or Space(folder, 0)
        self.lock, self._maintenance = threading.Lock(), threading.Lock()
        self.log = Log(folder, fsync, storage)
        self.state = State(self.log)
        self.in_total = self.out_total = self.redelivered_total = self.compactions_total = 0
        self.content_type = b"Content-Type: %b\r\n" % config.content_type.encode()
        self._clock = clock or Clock()
        self._epoch_ms = 0                   # the queue's time when the monotonic clock was 0
        self._unlogged = False               # a full disk kept a settlement out of the log
        self._closed = False
        self._bookmark_tail = self._bookmark_bytes = 0
        self._compact_after_ms = 0

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
            self._meet_subscribers_locked()
        self.bookmark()                      # a crash from here on is no clean stop
        event(logging.INFO, "recovered", queue=self.config.name,
              messages=self.state.held()[0], scanned_bytes=self.log.tail - start)

    def _meet_subscribers_locked(self) -> None:
        known, now_ms = set(self.state.subscriptions), self.now_ms()
        start = 0 if self.log.corrupt_records else self.state.next_id
        self._note_locked([position(start, name, now_ms)
                           for name in self.subscribers if name not in known]
                          + [position(LEFT, name, now_ms)
                             for name in sorted(known.difference(self.subscribers))])

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

    # -- messages

    def check_room(self, size: int = 0) -> None:
        """Raise what a put of `size` bytes would be refused with, before its body is read."""
        if self._closed:
            raise ApiError(503, "The server is stopping; try again")
        self.space.use(size)

    def put(self, payloads: Sequence[bytes], delay_s: int = 0) -> int:
        """Append messages and return the first one's id; durable on return. Errors as `append`."""
        first, number = self.append(payloads, delay_s)
        self.log.wait_durable(number)
        return first

    def append(self, payloads: Sequence[bytes], delay_s: int = 0) -> Tuple[int, int]:
        """Append messages with one write; return the first one's id and the log's number of
        this append, to wait for.

        Raises ApiError 503 with nothing queued, LogFailed when that is not known.
        """
        with self.lock:
            self.check_room(sum(map(len, payloads)) + HEAD.size * len(payloads))
            first, now_ms = self.state.next_id, self.now_ms()
            records = [Record(MESSAGE, first + number, now_ms, payload, 0, delay_s * 1000)
                       for number, payload in enumerate(payloads)]
            for record, (offset, size) in zip(records, self.log.append(records)):
                self.state.apply(record, offset, size)
            self.in_total += len(records)
            return first, self.log.appends

    def take(self, subscriber: str = FIFO) -> Optional[Delivery]:
        """Lease the oldest ready message; None if there is none. Does not wait for a disk."""
        with self.lock:
            if self._closed:
                raise ApiError(503, "The server is stopping; try again")
            subscription = self.state.subscriptions[subscriber]
            subscription.tick(self.now_ms())
            message = subscription.take()
        return Delivery(subscriber, [message]) if message else None

    def settle(self, delivery: Delivery) -> None:
        """The consumer is done: the messages are gone. Not durable on return."""
        with self.lock:
            now_ms = self.now_ms()
            ids = [message.id for message in self._out_locked(delivery)]
            self._note_locked([settled(first, last, delivery.subscriber, now_ms)
                               for first, last in _runs(ids)])
            self.out_total += len(ids)

    def retry(self, delivery: Delivery, delay_s: int = 0) -> None:
        """Put messages back at their old place, at once or after `delay_s`."""
        with self.lock:
            now_ms = self.now_ms()
            due_ms = now_ms + delay_s * 1000 if delay_s else READY
            messages = self._out_locked(delivery)
            self._note_locked([retry(m.id, m.delivery, due_ms, delivery.subscriber, now_ms)
                               for m in messages])
            self.redelivered_total += len(messages)

    def _out_locked(self, delivery: Delivery) -> List[Message]:
        """What of a delivery is still out: a late word on what is gone does nothing."""
        subscription = self.state.subscriptions.get(delivery.subscriber)
        if self._closed or subscription is None:
            return []
        return [m for m in delivery.messages if subscription.is_leased(m.id)]

    def counts_locked(self, subscription: Subscription) -> Dict[str, int]:
        """Return how many messages are in each state."""
        subscription.tick(self.now_ms())
        return {"ready": subscription.ready_count, "leased": subscription.leased_count,
                "delayed": subscription.delayed_count}

    def oldest_age_s_locked(self, subscription: Subscription) -> float:
        """Return the age of the oldest message that is not settled, 0 if there is none."""
        record = subscription.oldest()
        return max(0, self.now_ms() - record.time_ms) / 1000 if record else 0.0

    def _note_locked(self, records: Sequence[Record]) -> None:
        """Append and apply what must not be refused. On a full disk memory alone knows it,
        until a compaction writes down what memory knows."""
        if not records:
            return
        try:
            self.log.append(records)
        except ApiError:
            self._unlogged = True
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

    def bookmark(self, *, clean: bool = False) -> None:
        """Write meta.json: where the next start begins to scan. Blocks for several syncs."""
        with self._maintenance:
            with self.lock:
                if self._unlogged:           # a bookmark is a function of the log alone
                    return
                snapshot, log_id = self.state.snapshot(), self._log_id()
            self.log.sync()
            value = dict(snapshot.to_json(), log_id=log_id, clean=clean)
            data = json.dumps(dict(value, crc32=_checksum(value))).encode()
            try:
                self.log.storage.write_file(os.path.join(self.log.folder, META_NAME), data)
            except OSError as error:         # the next start takes longer, nothing else
                event(logging.WARNING, "bookmark_failed", queue=self.config.name,
                      error=error.strerror)
                return
            self._bookmark_tail, self._bookmark_bytes = snapshot.tail_offset, len(data)

    # -- compaction

    def wants_compaction(self) -> bool:
        """Tell whether a rewrite is due: for dead bytes, a full disk, or a path that is lost."""
        if self._clock.monotonic_ms() < self._compact_after_ms:
            return False
        with self.lock:
            size, (_, held_bytes) = self.log.tail - HEADER.size, self.state.held()
            enough = COMPACT_DEAD_LOW_BYTES if self.space.left < 0 else COMPACT_DEAD_BYTES
            dead = size - held_bytes
            return (self._unlogged or not self.log.is_in_place()
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
            self._snapshot = queue.state.snapshot()
        self._fresh = queue.log.fresh(self._snapshot.next_id)
        self._state = State(self._fresh)
        self._holes: Dict[str, List[List[int]]] = {}     # by subscriber, runs it has settled
        self._damaged = False
        self._synced = 0                     # bytes of the new log that are on disk

    def run(self) -> None:
        try:
            self._copy_live()
            done = self._follow()
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
        self._write([position(place.lowest, place.name, now_ms) for place in places])
        for batch in self._batches(HEADER.size, self._snapshot.tail_offset):
            messages = [record for record in batch if record.type == MESSAGE]
            with self._queue.lock:
                live = [record for record in messages if self._queue.state.holds(record.id)]
            self._write(live)
            self._note_holes(live)
        for place in places:
            records = [settled(first, last, place.name, now_ms)
                       for first, last in self._holes.get(place.name, ()) if first != LEFT]
            records.extend(place.retries(now_ms))
            for at in range(0, len(records), 500):
                self._write(records[at:at + 500])
                self._pause()

    def _note_holes(self, records: Sequence[Record]) -> None:
        """Of messages that someone still needs, find the runs that a subscriber has settled."""
        for place in self._snapshot.places:
            runs = self._holes.setdefault(place.name, [[LEFT, 0]])
            for record in records:
                if place.holds(record.id):
                    if runs[-1][0] != LEFT:
                        runs.append([LEFT, 0])
                elif record.id >= place.lowest:
                    runs[-1] = [min(runs[-1][0], record.id), record.id]

    def _follow(self) -> int:
        """Copy what was appended meanwhile until little is left; return where that starts."""
        done = self._snapshot.tail_offset
        while True:
            tail = self._queue.log.tail
            if tail - done <= COMPACT_LOCKED_BYTES:
                return done
            for batch in self._batches(done, tail):
                self._write(batch)
            self._fresh.sync()
            done = tail

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

    def _switch_locked(self) -> None:
        queue, state = self._queue, self._state
        same = [state.subscription(name.encode()).catch_up(live)
                for name, live in queue.state.subscriptions.items()]
        if not (all(same) or self._damaged):
            raise CompactionFailed("the new log does not tell what memory knows; the old one stays")
        queue.log.replace_with(self._fresh)
        state.log, state.next_id = queue.log, max(state.next_id, queue.state.next_id)
        queue.state, queue._unlogged = state, False


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
        self.queues = {item.name: Queue(item, os.path.join(settings.path, item.name),
                                        fsync=settings.fsync, clock=clock, space=self.space)
                       for item in config.queues}
        self._low_space = False
        self._stopping = threading.Event()
        self._jobs: queues.SimpleQueue[Optional[Job]] = queues.SimpleQueue()
        self._compacting: Set[str] = set()
        self._threads = [threading.Thread(target=self._guard, args=(work,), name=work.__name__,
                                          daemon=True)
                         for work in (self._upkeep, self._compactor)]

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
        try:
            work()
        except LogFailed as failure:
            self.on_failure(failure)

    def _upkeep(self) -> None:
        while not self._stopping.wait(1):
            self._watch_space()
            for queue in self.queues.values():
                if queue.log.fsync == "everysec":
                    queue.log.sync()
                if queue.wants_bookmark():
                    queue.bookmark()
                if queue.config.name not in self._compacting and queue.wants_compaction():
                    self._compacting.add(queue.config.name)
                    self._jobs.put(Job(queue))

    def _compactor(self) -> None:
        for job in iter(self._jobs.get, None):
            try:
                self._compact(job.queue)
            except (CompactionFailed, LogFailed, OSError) as error:
                job.error = error
                event(logging.WARNING, "compaction_failed", queue=job.queue.config.name,
                      error=error)
            self._compacting.discard(job.queue.config.name)
            job.done.set()
            if isinstance(job.error, LogFailed):
                raise job.error

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


def queue_samples(queue: Queue) -> Dict[str, List[Sample]]:
    """Return what there is to tell of one queue, by metric name without its prefix."""
    name = {"queue_name": queue.config.name}
    with queue.lock:
        found: Dict[str, List[Sample]] = {
            "messages_in_total": [(name, queue.in_total)],
            "messages_out_total": [(name, queue.out_total)],
            "log_bytes": [(name, queue.log.tail)],
            "messages_redelivered_total": [(name, queue.redelivered_total)],
            "corrupt_records_total": [(name, queue.log.corrupt_records)],
            "compactions_total": [(name, queue.compactions_total)],
            "messages": [], "oldest_message_age_seconds": []}
        for subscriber, subscription in queue.state.subscriptions.items():
            labels = {**name, "subscriber": subscriber}
            found["messages"] += [({**labels, "state": state}, count)
                                  for state, count in queue.counts_locked(subscription).items()]
            age_s = queue.oldest_age_s_locked(subscription)
            found["oldest_message_age_seconds"].append((labels, age_s))
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
ABSOLUTE_FORM = re.compile(r"(?i:https?)://[^/?]*")
PARAMETER = re.compile(r"([a-z]+)=([-_A-Za-z0-9]+)")
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
    forwarded: str

    @property
    def has_body(self) -> bool:
        return self.chunked or self.length > 0


class Answer(NamedTuple):
    """What to send. `delivery` is settled once it was sent, and put back if that failed;
    `append` (a log and the number of an append) must be durable before."""

    status: int = 200
    body: bytes = b""
    headers: bytes = b""
    delivery: Optional[Tuple[Queue, Delivery]] = None
    append: Optional[Tuple[Log, int]] = None


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
        fields.get(b"content-encoding", b"").decode("latin-1"),
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
    queue: Optional[Queue]
    parameters: Mapping[str, str]
    read_body: Callable[[], bytes]
    before_blocking: Callable[[], None]      # to be called before anything that waits


class Action(NamedTuple):
    """A row of the API: 404, 405, Allow, OPTIONS, permission and metric follow from it."""

    methods: Sequence[str]
    permission: str                          # post, get, admin; "" needs no token
    call: Callable[[Call], Answer]
    text: str
    parameters: Sequence[str] = ()
    takes_body: bool = False

    @property
    def allow(self) -> str:
        return ", ".join([*self.methods, "OPTIONS"])


def put(call: Call) -> Answer:
    queue = _queue(call)
    if call.request.encoding not in ("", "identity"):
        raise ApiError(415, "Send the message without a Content-Encoding")
    queue.check_room()
    payload = call.read_body()
    if not payload:
        raise ApiError(400, "A message must not be empty; send it as the request's body")
    first, number = queue.append((payload,))
    return Answer(headers=b"Message-Id: %d\r\n" % first, append=(queue.log, number))


def take(call: Call) -> Answer:
    queue = _queue(call)
    delivery = queue.take()
    if delivery is None:
        return Answer(404, b"Queue is empty\n", TEXT + b"Message-Count: 0\r\n")
    message = delivery.messages[0]
    age_s = max(0, queue.now_ms() - message.time_ms) // 1000
    headers = b"%bMessage-Id: %d\r\nMessage-Age: %d\r\nDelivery-Count: %d\r\n" % (
        queue.content_type, message.id, age_s, message.delivery)
    return Answer(200, message.payload, headers, (queue, delivery))


def compact(call: Call) -> Answer:
    call.before_blocking()
    call.server.broker.compact(_queue(call))
    return Answer()


def _queue(call: Call) -> Queue:
    assert call.queue is not None            # dispatch looked it up
    return call.queue


def show_root(call: Call) -> Answer:
    return Answer(200, b"micro_queue is running\n", TEXT)


def show_ready(call: Call) -> Answer:
    reason = call.server.unready
    if reason:
        raise ApiError(503, f"Not ready: {reason}")
    return Answer(200, b"ready\n", TEXT)


def show_metrics(call: Call) -> Answer:
    if not call.server.config.settings.metric_exporter:
        raise ApiError(404, "Set metric_exporter in the config's settings to have metrics")
    headers = b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
    return Answer(200, render_metrics(call.server.samples()), headers)


ACTIONS: Mapping[str, Action] = {
    "in": Action(("POST",), "post", put,
                 "POST: put the request's body into the queue as one message", takes_body=True),
    "out": Action(("GET", "POST"), "get", take,
                  "GET: take the oldest message out of the queue"),
    "compact": Action(("GET", "POST"), "admin", compact,
                      "GET: rewrite the queue's log without dead bytes"),
    "": Action(("GET", "HEAD"), "", show_root, "GET: one line that the service runs"),
    "healthz": Action(("GET", "HEAD"), "", show_root, "GET: 200 while the process serves"),
    "readyz": Action(("GET", "HEAD"), "", show_ready, "GET: 200 when queues are served"),
    "metrics": Action(("GET", "HEAD"), "", show_metrics, "GET: metrics for Prometheus"),
}


PROBES = ("healthz", "readyz")   # not logged while they succeed


def dispatch(handler: Handler, request: Request) -> Answer:
    """Check a request in the documented order and call its action. Raises ApiError."""
    server = handler.server
    action = ACTIONS.get(request.action) if request.action is not None else None
    if action and bool(request.queue) != bool(action.permission):
        action = None
    if request.method == "OPTIONS":
        return describe(request, action)
    queue, parameters = None, {}             # type: Tuple[Optional[Queue], Mapping[str, str]]
    if action is None or action.permission:
        queue = authorize(server, request, action, handler.client_address)
    assert action is not None                # authorize raised
    if request.method not in action.methods:
        raise ApiError(405, f"Use {' or '.join(action.methods)} here",
                       headers=b"Allow: %b\r\n" % action.allow.encode())
    if request.query and action.permission:
        parameters = parse_parameters(request.query, action)
    if request.has_body and not action.takes_body:
        raise ApiError(400, "No body is taken here; parameters belong in the query string")
    if request.length > server.config.settings.max_message_bytes:
        raise too_large(server)
    return action.call(Call(server, request, queue, parameters, handler.read_body,
                            handler.before_blocking))


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
    return ApiError(404, f"No such path; use /<action>/<queue> with an action of: {_actions()}")


def too_large(server: Server) -> ApiError:
    limit = server.config.settings.max_message_bytes
    return ApiError(413, f"The body is larger than max_message_bytes ({limit})")


def authorize(server: Server, request: Request, action: Optional[Action],
              client: Tuple[Any, ...]) -> Queue:
    """Return the queue that the request's token may use for this action."""
    if server.unready:
        raise ApiError(503, f"Not ready: {server.unready}")
    token = server.broker.tokens.get(request.token_digest or b"")
    if token is None:
        reason = ("Unknown token" if request.token_digest else "Malformed Authorization header"
                  if request.has_authorization else "Missing Authorization header")
        log_request(logging.WARNING, "unauthorized", request, client, reason=reason)
        raise ApiError(401, f"{reason}; use 'Authorization: Bearer <token>'",
                       headers=b"WWW-Authenticate: Bearer\r\n")
    if action is None or request.queue is None:
        raise no_such_path()
    if not token.may(action.permission, request.queue):
        log_request(logging.WARNING, "forbidden", request, client, token=token.name,
                    action=request.action, queue=request.queue)
        raise ApiError(403, f"This token lacks the permission '{action.permission}' here; "
                            "the config's tokens grant it")
    queue = server.broker.queues.get(request.queue)
    if queue is None:
        raise ApiError(404, f"No queue is named {request.queue}; queues stand in the config")
    return queue


def log_request(level: int, name: str, request: Request, client: Tuple[Any, ...],
                **fields: object) -> None:
    """Log an event of a request; the client is always the peer."""
    forwarded = {"forwarded": request.forwarded} if request.forwarded else {}
    event(level, name, client=f"{client[0]}:{client[1]}", **forwarded, **fields)


def parse_parameters(query: str, action: Action) -> Mapping[str, str]:
    """Return the query's parameters, each known to the action, given once and not empty."""
    parameters: Dict[str, str] = {}
    for part in query.split("&"):
        match = PARAMETER.fullmatch(part)
        name = match[1] if match else None
        if match is None or name not in action.parameters or name in parameters:
            known = ", ".join(action.parameters) or "none"
            raise ApiError(400, f"Parameter {json.dumps(part[:80])} is unknown, empty, repeated "
                                f"or malformed; known here: {known}")
        parameters[match[1]] = match[2]
    return parameters


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
        reply = self._reply(request, answer, close, started)
        if answer.append is None:
            return reply.send(None)
        log, number = answer.append
        if self._data:                       # more requests came with this one: in order
            self.before_blocking()
            log.wait_durable(number)
            return reply.send(None)
        self.parked = True
        if log.when_durable(number, reply.send_parked):
            self.server.lead(log)
        return False

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

    def _send(self, data: bytes) -> None:
        """Send all of `data`. Raises OSError if the client is gone or takes nothing for
        `request_timeout`."""
        sent = self._send_some(data)
        if sent < len(data):
            rest = memoryview(data)[sent:]
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

    def send(self, failure: Optional[LogFailed]) -> bool:
        """Send; return whether the connection goes on. Raises OSError."""
        handler, server, delivery = self.handler, self.handler.server, self.answer.delivery
        if failure:
            server.storage_failed(failure)
        sent = False
        try:
            handler._send(self.data)
            sent = True
        finally:
            if delivery:
                server.settle(*delivery, sent=sent)
        server.count(self.request.action if self.request else None, self.answer.status)
        if server.debug:
            self._log()
        if self.linger:
            handler._linger()
        elif not self.keep_alive:
            handler.close()
        elif self.skip:
            handler._read_exactly(self.skip)
        return self.keep_alive

    def send_parked(self, failure: Optional[LogFailed]) -> None:
        """Send from the thread that led the sync, which others wait for: raises nothing."""
        try:
            if self.send(failure):
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
            raise ConfigError(f"settings.listen_address: cannot listen on "
                              f"{settings.listen_address} port {settings.listen_port}: "
                              f"{error}") from None
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
                    self._epoll.modify(self.socket, 0)   # a pause, not a spin: see _sweep
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
        if handler.parked:
            with self._pool:
                if handler.parked:           # what comes meanwhile is served afterwards
                    self._epoll.unregister(fd)
                    handler.polled = False
                    return
        try:
            handler.on_readable()
        except Exception:                    # not for anything that a client or a disk can do
            log_event.exception("connection_failed client=%s", handler.client_address[0])
            handler.close()

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

    def forget(self, handler: Handler) -> None:
        """Before a connection's descriptor is closed, and may become another's."""
        with self._pool:
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
        for queue in self.broker.queues.values() if self.unready is None else ():
            for name, samples in queue_samples(queue).items():
                found.setdefault(PREFIX + name, []).extend(samples)
        return found

    # -- the end

    def drain(self) -> None:
        """Stop accepting, let requests under way end (DRAIN_S at most), close every queue."""
        self.unready = DRAINING
        self._epoll.modify(self.socket, 0)
        deadline = time.monotonic() + DRAIN_S
        while any(handler.busy for handler in list(self.handlers.values())):
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
    except (StorageError, CompactionFailed, ApiError, OSError) as error:
        print(f"micro_queue: {error}", file=sys.stderr)
        return 3
    except LogFailed as error:
        print(f"micro_queue: {error}", file=sys.stderr)
        return 4


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(config: Config) -> int:
    """Serve a config until a signal. Raises ConfigError, StorageError, OSError."""
    debug = os.environ.get("MODE_DEBUG") == "1"
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, stream=sys.stderr,
                        format="%(asctime)s %(levelname)s %(message)s")
    threading.stack_size(THREAD_STACK_BYTES)
    # Before the first thread starts: one that got the signal would not wake this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
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
    signal.sigwait(STOP_SIGNALS)
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
