"""The payload of an entry of the log: a header and requests.

The payload of an entry, all integers little-endian:

    0   1  format version, 2 or 3
    1   1  in version 3: major and
    2   1    minor number of the oldest etcdlite that can apply the entry; else zero
    3   1  zero
    4   4  CRC-32 (as in zlib) of everything behind it
    8   8  id of the member that proposed it
    16  8  number of the batch at that member, by which it finds the sessions that wait
    24     the requests, up to the end. Each is a frame of the native protocol: the bytes that a
           client sent (its request id has no meaning here), or a request that a member made

Version 1, which is still read, has the number of requests in place of the CRC. Version 3 is for
entries that not every program can apply (`versions.py`): a program that is too old for one stops.

The member that proposes an entry computes the CRC. It is checked when the leader accepts a
forwarded entry, when a follower receives an append, and when the entry is decoded. So no member
stores an entry that was damaged in the memory of another member or on the way. (In addition, the
files of the log have checksums of their own.)

A membership change is an entry of its own kind, with one request, a `MemberChange`.

While auth is enabled, a request `Author` (method 0xE4) says for whom the requests behind it are, up
to the next one or the end of the entry: the name of the user and the auth revision under which they
were prepared; or that a member asks for itself. Without one they are for nobody. An entry that is
made while auth is not enabled has none.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

from etcdlite.frames import FRAME, FRAME_HEADER_BYTES
from etcdlite.methods import REQUESTS, TXN
from etcdlite.plain_txn import decode_txn
from etcdlite.proto import DecodeError
from etcdlite.request import Waiter
from etcdlite.versions import CURRENT, OLDEST, Version

ENTRY_VERSION = 2
NEWER_ENTRY_VERSION = 3
ENTRY_HEADER = struct.Struct("<B3xIQQ")
_BEGIN = struct.Struct("<BBBxI")
_PROPOSER = struct.Struct("<QQ")


class EntryHeader(NamedTuple):
    version: int
    checksum: int
    """In version 1: the number of requests."""
    member_id: int
    """The member that proposed the entry."""
    batch: int


class TooNew(DecodeError):
    """An entry needs a newer etcdlite than this one."""


def encode_entry(
    member_id: int, batch: int, frames: Sequence[bytes], needs: Version = OLDEST
) -> bytes:
    """The payload of an entry with these requests. `needs`: the oldest etcdlite that can apply all
    of them."""
    content = b"".join((_PROPOSER.pack(member_id, batch), *frames))
    if needs > OLDEST:
        return _BEGIN.pack(NEWER_ENTRY_VERSION, *needs, crc32(content)) + content
    return _BEGIN.pack(ENTRY_VERSION, 0, 0, crc32(content)) + content


def needed_version(data: bytes) -> Version:
    """The oldest etcdlite that can apply the entry with the payload `data`."""
    return Version(data[1], data[2]) if data and data[0] == NEWER_ENTRY_VERSION else OLDEST


def proposer(data: bytes) -> tuple[int, int]:
    """The member that proposed the entry, and the batch, unchecked; (0, 0) if there is neither."""
    return _PROPOSER.unpack_from(data, 8) if len(data) >= ENTRY_HEADER.size else (0, 0)


def read_header(data: bytes) -> EntryHeader:
    """Raises DecodeError, and TooNew as one."""
    if len(data) < ENTRY_HEADER.size or not 1 <= data[0] <= ENTRY_VERSION or any(data[1:4]):
        _check_newer(data)
    return EntryHeader(*ENTRY_HEADER.unpack_from(data))


def _check_newer(data: bytes) -> None:
    """Raise DecodeError unless an entry begins as version 3 does."""
    if len(data) < ENTRY_HEADER.size or data[0] < NEWER_ENTRY_VERSION or data[3]:
        raise DecodeError(f"an entry's payload does not begin as version {ENTRY_VERSION} does")
    if data[0] > NEWER_ENTRY_VERSION:
        raise TooNew(
            f"it has format version {data[0]}, and etcdlite {CURRENT} reads up to version 3"
        )
    if needed_version(data) <= OLDEST:
        # A flipped bit: the checksum does not cover the version, and this one is never written so.
        raise DecodeError(f"an entry of version 3 needs no etcdlite {OLDEST}")
    if needed_version(data) > CURRENT:
        raise TooNew(f"it needs etcdlite {needed_version(data)} or later, and this is {CURRENT}")


def check_entry(data: bytes) -> None:
    """Raises DecodeError if the payload of an entry fails its checksum. A payload of version 1, and
    the empty one of the first entry of a term, have none."""
    if data:
        _checked_header(data)


def _checked_header(data: bytes) -> EntryHeader:
    header = read_header(data)
    if header.version > 1 and crc32(memoryview(data)[_BEGIN.size :]) != header.checksum:
        raise DecodeError("an entry fails its checksum")
    return header


def decode_requests(data: bytes) -> list[Waiter]:
    """The requests of an entry's payload, without the sessions that wait for them. Raises
    DecodeError: the bytes may come from another member."""
    header = _checked_header(data)
    waiters: list[Waiter] = []
    at = ENTRY_HEADER.size
    try:
        while at < len(data):
            length, request_id, method, _ = FRAME.unpack_from(data, at)
            end = at + 4 + length
            if end > len(data) or end < at + FRAME_HEADER_BYTES:
                raise DecodeError("a request of an entry is cut off")
            decode = decode_txn if method == TXN else REQUESTS[method].decode
            request = decode(data, at + FRAME_HEADER_BYTES, end)
            waiters.append(Waiter(None, request_id, method, request))
            at = end
    except struct.error as failure:
        raise DecodeError("a request of an entry is cut off") from failure
    except KeyError as failure:
        raise DecodeError(f"a request of an entry has the unknown method {failure}") from failure
    if header.version == 1 and len(waiters) != header.checksum:
        raise DecodeError(f"an entry has {len(waiters)} requests instead of {header.checksum}")
    return waiters
