"""Extracts: the keys of a cluster, or some of them, as of one revision, in a file.

An extract is a backup without history: `snapshot save --rev` or `--prefix` makes one. Its keys
become new keys where they are restored.

The file, all integers little-endian:

    0   8  magic "ETCDLXTR"
    8   4  format version, 1
    12  4  length of the header
    16  n  header: JSON with cluster_id (hexadecimal), revision, prefixes (base64; that of all keys
           is empty) and etcdlite_version
    then records, each
        0  1  type
        1  4  length of the body
        5  n  body
    type 1  mvccpb.KeyValue, as it was; keys ascend
    type 2  a lease that keys of the file have: its id i64, its granted TTL in seconds u64, or 0 if
            it has ended
    type 3  the end: number of keys u64, then the SHA-256 of everything before this record

Nothing of a file is used before all of it was checked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from etcdlite import __version__, proto
from etcdlite.errors import Explained
from etcdlite.proto import DecodeError

MAGIC = b"ETCDLXTR"
FORMAT_VERSION = 1

MAX_HEADER_BYTES = 4 << 20
MAX_RECORD_BYTES = 256 << 20
MAX_PREFIXES = 1_000

_START = struct.Struct("<8sII")
_RECORD = struct.Struct("<BI")
_PAIR = struct.Struct("<qQ")
_U64 = struct.Struct("<Q")
KEY, LEASE, END = 1, 2, 3


class ExtractError(Explained):
    """The file cannot be used. The text says why and what to do."""


class Header(NamedTuple):
    """What an extract says about itself."""

    cluster_id: int
    revision: int
    prefixes: tuple[bytes, ...]
    """Sorted; none is the beginning of another one."""


class Content(NamedTuple):
    """An extract that was checked."""

    header: Header
    leases: dict[int, int]
    """TTL in seconds by id; 0 if the lease has ended."""
    total_keys: int
    size_bytes: int
    digest: bytes


def plain_prefixes(prefixes: Iterable[bytes]) -> tuple[bytes, ...]:
    """The prefixes, sorted, without those that another one covers."""
    found: list[bytes] = []
    for prefix in sorted(prefixes):
        if not found or not prefix.startswith(found[-1]):
            found.append(prefix)
    return tuple(found)


class Writer:
    """Writes an extract to a file that has `write`."""

    def __init__(self, file: Any, header: Header) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.total_keys = 0
        text = json.dumps(
            {
                "cluster_id": f"{header.cluster_id:x}",
                "revision": header.revision,
                "prefixes": [base64.b64encode(prefix).decode() for prefix in header.prefixes],
                "etcdlite_version": __version__,
            }
        ).encode()
        self._write(_START.pack(MAGIC, FORMAT_VERSION, len(text)) + text)

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def add(self, kv: proto.KeyValue) -> None:
        """Add a key. Keys ascend."""
        body = kv.encode()
        self._write(_RECORD.pack(KEY, len(body)) + body)
        self.total_keys += 1

    def finish(self, leases: Iterable[tuple[int, int]]) -> None:
        """Add the leases, (id, TTL in seconds) each, and the end."""
        for lease_id, ttl_s in leases:
            self._write(_RECORD.pack(LEASE, _PAIR.size) + _PAIR.pack(lease_id, ttl_s))
        body = _U64.pack(self.total_keys) + self._digest.digest()
        self._file.write(_RECORD.pack(END, len(body)) + body)


def check(path: str, file: Any) -> Content:
    """Check a whole file, from its beginning. Raises ExtractError, OSError."""
    digest = hashlib.sha256()
    leases: dict[int, int] = {}
    total_keys = size = 0
    last = b""
    header: Header | None = None
    for kind, data, body in _pieces(path, file):
        size += len(data)
        if kind == END:
            if body != _U64.pack(total_keys) + digest.digest():
                raise _damaged(path, "its SHA-256 does not match its content")
            assert header is not None
            return Content(header, leases, total_keys, size, digest.digest())
        digest.update(data)
        if kind == 0:
            header = _read_header(path, body)
        elif kind == LEASE:
            lease_id, ttl_s = _pair(path, body)
            leases[lease_id] = ttl_s
        else:
            kv = _key_value(path, body)
            assert header is not None
            if kv.key <= last or not 0 < kv.mod_revision <= header.revision:
                raise _damaged(path, "its keys are out of order")
            last = kv.key
            total_keys += 1
    raise _damaged(path, "it is cut off")


def key_values(path: str, file: Any) -> Iterator[Any]:
    """The `KeyValue`s of a file, from its beginning, in order. Raises ExtractError, OSError."""
    for kind, _, body in _pieces(path, file):
        if kind == KEY:
            yield _key_value(path, body)


def _pieces(path: str, file: Any) -> Iterator[tuple[int, bytes, bytes]]:
    """(type, bytes, body) of the header, with type 0, and of each record up to the end."""
    file.seek(0)
    start = file.read(_START.size)
    if len(start) < _START.size or not start.startswith(MAGIC):
        raise ExtractError(f"{path} is not an extract of etcdlite")
    _, version, length = _START.unpack(start)
    if version != FORMAT_VERSION:
        raise ExtractError(
            f"extract {path} has format version {version}, but this etcdlite reads version "
            f"{FORMAT_VERSION}. Use the etcdlite that made it, or a newer one"
        )
    text = file.read(min(length, MAX_HEADER_BYTES))
    if len(text) != length:
        raise _damaged(path, "its header is cut off")
    yield 0, start + text, text
    while True:
        head = file.read(_RECORD.size)
        if len(head) < _RECORD.size:
            raise _damaged(path, "it is cut off")
        kind, size = _RECORD.unpack(head)
        if kind not in (KEY, LEASE, END) or size > MAX_RECORD_BYTES:
            raise _damaged(path, f"it has a record of type {kind} and {size} bytes")
        body = file.read(size)
        if len(body) < size:
            raise _damaged(path, "it is cut off")
        if kind == END and file.read(1):
            raise _damaged(path, "something follows its end")
        yield kind, head + body, body
        if kind == END:
            return


def _damaged(path: str, why: str) -> ExtractError:
    return ExtractError(f"extract {path} is damaged: {why}. Use another one")


def _read_header(path: str, text: bytes) -> Header:
    try:
        found = json.loads(text)
        cluster_id, revision = int(found["cluster_id"], 16), found["revision"]
        prefixes = [base64.b64decode(prefix, validate=True) for prefix in found["prefixes"]]
        if type(revision) is not int or not 0 < revision < 1 << 63 or not 0 <= cluster_id < 1 << 64:
            raise ValueError
        if not 0 < len(prefixes) <= MAX_PREFIXES or tuple(prefixes) != plain_prefixes(prefixes):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged(path, "its header has a value that is not allowed") from None
    return Header(cluster_id, revision, tuple(prefixes))


def _key_value(path: str, body: bytes) -> Any:
    try:
        return proto.KeyValue.decode(body)
    except DecodeError as failure:
        raise _damaged(path, str(failure)) from None


def _pair(path: str, body: bytes) -> tuple[int, int]:
    if len(body) != _PAIR.size:
        raise _damaged(path, "a lease has the wrong length")
    first, second = _PAIR.unpack(body)
    if not first or second >= 1 << 63:
        raise _damaged(path, "the id or TTL of a lease is out of range")
    return first, second


def in_prefixes(key: bytes, prefixes: Sequence[bytes]) -> bool:
    return any(key.startswith(prefix) for prefix in prefixes)
