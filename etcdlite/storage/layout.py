"""The layout of the data file (segments, records, buckets), and the errors for damaged files.

On disk, all integers little-endian. `data/%016x.seg`, the number being the segment's:

    segment header, 32 bytes
        0   8  magic "ETCDLSEG"
        8   4  format version, 1
        12  8  segment number
        20  8  end of the segment before it; 0 in the first
        28  4  CRC-32 of bytes 0 to 27
    then records, each
        0   4  CRC-32 of the body, with the next field as initial value
        4   4  length of the body << 4 | type; so a body has less than 256 MiB
        8   n  body

    type 1 PUT        body: mvccpb.KeyValue
    type 2 TOMBSTONE  body: mvccpb.KeyValue with key and mod_revision only
    type 3 BUCKET     body: bucket u8, present u8, key length u16, key, value. The latest record of
                      a bucket and key wins; present = 0 removes the key.
    type 4 MARK       body: applied raft index u64, its term u64, store revision u64. Records
                      count only once a mark follows them.
    type 9, 10        PUT and TOMBSTONE moved here from an older segment by cleaning

The changes of one revision are numbered from 0: these are the sub-revisions of etcd. A PUT or
TOMBSTONE right after one of the same revision, without a MARK in between, has the next number, any
other one has 0, unless a BUCKET record of `SUB` before it says otherwise (`Numbering`). Compaction
leaves gaps, which cleaning and imports state this way.

A location is segment number << 32 | offset of the record.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from zlib import crc32

from etcdlite import log
from etcdlite.errors import REPLACE, EtcdError, Explained, error
from etcdlite.proto import read_varint
from etcdlite.versions import CURRENT, OLDEST, Version, parse

PUT = 1
TOMBSTONE = 2
BUCKET = 3
MARK = 4
MOVED = 8
"""Added to PUT or TOMBSTONE: a copy made by cleaning."""

FORMAT_VERSION = 1
SEALED_VERSION = 2
"""In the header of a sealed file; see `sealed.py`."""
MAGIC = b"ETCDLSEG"
SEGMENT_HEADER = struct.Struct("<8sIQQI")
RECORD_HEADER = struct.Struct("<II")
RECORD_HEADER_BYTES = RECORD_HEADER.size
MARK_BODY = struct.Struct("<QQQ")
BUCKET_BODY = struct.Struct("<BBH")
_SUB_BODY = struct.Struct("<BBHI")

U64 = struct.Struct("<Q")
POSITION = struct.Struct("<QQ")
"""Segment, offset."""

COMPACTED = 1
"""Bucket of key b"": the compact revision, u64."""
LEASE = 2
"""Bucket of leases by id, i64 big-endian; see `lease.py`."""
MEMBER = 3
"""Bucket of `Member` messages by member id, u64 big-endian."""
ALARM = 4
"""Bucket of active alarms. Key: member id, u64 big-endian, and kind, u8. The value is empty."""
CLEANED = 5
"""Bucket of the numbers, u64, of segments that cleaning has emptied and removed."""
REMOVED = 6
"""Bucket of ids, u64 big-endian, of members that were removed for ever."""
AUTH = 7
AUTH_USER = 8
AUTH_ROLE = 9
"""Buckets of the settings, users and roles; see `auth.py`."""
CLUSTER = 10
"""Bucket of the cluster version; see `replica/cluster_version.py`."""
CLUSTER_VERSION = b"version"
DOWNGRADE_TARGET = b"target"
"""The keys of the bucket `CLUSTER`; values: "0.2", or "0.2.71" with the number of the founding."""
TIMES = 12
USERS = 13
"""Buckets of times and users by revision; see `replica/timeline.py`."""
SUB = 11
"""Not a bucket: a BUCKET record that removes the key n, u32, from it says that the next record has
sub-revision n. Programs that do not know this see the removal of a key that does not exist."""

MAX_BODY_BYTES = (1 << 28) - 1

OFFSET_MASK = (1 << 32) - 1


class DataDamaged(Explained):
    """A file under `data/` does not hold what was written to it.

    `path` and `offset` say where; the text says what was found and what to do."""

    def __init__(self, path: str, offset: int, why: str, text: str = "") -> None:
        super().__init__(
            text
            or f"{path} is damaged at offset {offset}: {why}. Do not delete single files. {REPLACE}"
        )
        self.path = path
        self.offset = offset
        self.why = why

    def report(self) -> EtcdError:
        """Log it, but not for each of many requests. Returns the error for the client."""
        log.error(str(self), "damaged")
        return error("Corrupt")


class DataRefused(DataDamaged):
    """A file under `data/` holds what no crash leaves there, so it is not cut off or repaired."""


class DataAltered(DataRefused):
    """A sealed file holds something other than what was written to it, and not by accident."""


class KeyMissing(DataRefused):
    """A file under `data/` is sealed with the key `key_id`, which is not among those with the
    ids `given`."""

    def __init__(self, path: str, key_id: bytes, given: Iterable[bytes] = ()) -> None:
        why = f"it is encrypted with key {key_id.hex()}"
        ids = ", ".join(found.hex() for found in given) or "none"
        text = f"{path}: {why}, but the keys given are: {ids}. Nothing was changed. Name the file "
        super().__init__(path, 20, why, text + "with that key as --encryption-key-file")


class DataVersionError(DataRefused):
    """A file under `data/` was written by a newer etcdlite, in format `version`; or it needs the
    etcdlite `needs`."""

    def __init__(self, path: str, version: int, needs: Version | None = None) -> None:
        why = f"format version {version} is newer than this program's"
        if needs is not None:
            why = f"it needs etcdlite {needs} or later, and this is {CURRENT}"
        text = (
            f"{path}: {why}, so a newer etcdlite wrote it. Nothing was changed. Start that version "
            f"again. Or: {REPLACE}"
        )
        super().__init__(path, 8, why, text)


class Numbering:
    """The sub-revisions of records that are read, or written, one after the other."""

    __slots__ = ("_next", "_revision")

    def __init__(self) -> None:
        self._revision = 0
        """`_next` is the number of the next record of this revision. 0: of no revision. -1: of the
        next record, whatever its revision is; a `SUB` came before it."""
        self._next = 0

    def reset(self) -> None:
        """A segment or a block of records begins, or a MARK was met."""
        self._revision = 0

    def take(self, revision: int) -> int:
        """The number of the next record, a PUT or TOMBSTONE of `revision`."""
        number = self._next if self._revision in (revision, -1) else 0
        self._revision = revision
        self._next = number + 1
        return number

    def read_other(self, kind: int, body: bytes) -> None:
        """A record of another type was met."""
        if kind == MARK:
            self._revision = 0
        elif kind == BUCKET and body[0] == SUB and len(body) == _SUB_BODY.size:
            self._revision = -1
            self._next = _SUB_BODY.unpack(body)[3]

    def set(self, revision: int, number: int) -> bytes:
        """What to write before the record with this number: a BUCKET record, or nothing."""
        expected = self.take(revision)
        self._next = number + 1
        return b"" if number == expected else record(BUCKET, _SUB_BODY.pack(SUB, 0, 4, number))


def record(kind: int, body: bytes) -> bytes:
    word = len(body) << 4 | kind
    return RECORD_HEADER.pack(crc32(body, word), word) + body


def key_and_revision(body: bytes) -> tuple[bytes, int]:
    """Key and mod_revision of an encoded KeyValue. Only for one that `Store` encoded: key first,
    fields in order."""
    # Flat: this is half of the cost of reading an event from history.
    size, at = body[1], 2
    if size > 127:
        size, at = read_varint(body, 1, len(body))
    key = body[at : at + size]
    at += size
    if body[at] == 0x10:
        at += 1
        while body[at] > 127:
            at += 1
        at += 1
    byte = body[at + 1]
    at += 2
    revision = byte & 127
    shift = 0
    while byte > 127:
        byte = body[at]
        at += 1
        shift += 7
        revision |= (byte & 127) << shift
    return key, revision


def cluster_version(buckets: Mapping[int, Mapping[bytes, bytes]]) -> Version:
    """The cluster version in these buckets: the oldest etcdlite that may open the data. Raises
    ValueError if it makes no sense."""
    stored = buckets.get(CLUSTER, {}).get(CLUSTER_VERSION)
    return OLDEST if stored is None else parse(stored.decode())


def downgrade_target(buckets: Mapping[int, Mapping[bytes, bytes]]) -> Version | None:
    """The version that the cluster goes down to; None if no downgrade is enabled. Raises
    ValueError if it makes no sense."""
    stored = buckets.get(CLUSTER, {}).get(DOWNGRADE_TARGET)
    return None if stored is None else parse(stored.decode())


def segment_name(number: int) -> str:
    return f"{number:016x}.seg"
