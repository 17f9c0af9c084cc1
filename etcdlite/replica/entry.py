"""What the log holds: the payload of an entry and the requests in it.

The payload of an entry, all integers little-endian:

    0   1  format version, 1
    1   3  zero
    4   4  number of requests
    8   8  id of the member that proposed it
    16  8  number of the batch at that member, by which it finds the sessions that wait
    24     the requests, each as a frame of the native protocol: the bytes that the client sent
           (the request id in it means nothing here), or of a method that only members propose

A membership change is an entry of its own kind, with one request, a `MemberChange`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from etcdlite.frames import FRAME, FRAME_HEADER_BYTES
from etcdlite.methods import REQUESTS
from etcdlite.proto import DecodeError
from etcdlite.request import Waiter

ENTRY_VERSION = 1
ENTRY_HEADER = struct.Struct("<B3xIQQ")


class EntryHeader(NamedTuple):
    requests: int
    """How many there are."""
    member_id: int
    """The member that proposed the entry."""
    batch: int


def encode_entry(member_id: int, batch: int, frames: Sequence[bytes]) -> bytes:
    """The payload of an entry with these requests."""
    return b"".join((ENTRY_HEADER.pack(ENTRY_VERSION, len(frames), member_id, batch), *frames))


def read_header(data: bytes) -> EntryHeader:
    """Raises DecodeError."""
    if len(data) < ENTRY_HEADER.size or data[0] != ENTRY_VERSION:
        raise DecodeError(f"an entry's payload does not begin as version {ENTRY_VERSION} does")
    return EntryHeader(*ENTRY_HEADER.unpack_from(data)[1:])


def decode_requests(data: bytes) -> list[Waiter]:
    """The requests of an entry's payload, without the sessions that wait for them. Raises
    DecodeError: the bytes may come from another member."""
    count = read_header(data).requests
    waiters: list[Waiter] = []
    at = ENTRY_HEADER.size
    try:
        for _ in range(count):
            length, request_id, method, _ = FRAME.unpack_from(data, at)
            end = at + 4 + length
            if end > len(data) or end < at + FRAME_HEADER_BYTES:
                raise DecodeError("a request of an entry is cut off")
            request = REQUESTS[method].decode(data, at + FRAME_HEADER_BYTES, end)
            waiters.append((None, request_id, method, request))
            at = end
    except struct.error as failure:
        raise DecodeError("an entry has fewer requests than it says") from failure
    except KeyError as failure:
        raise DecodeError(f"a request of an entry has the unknown method {failure}") from failure
    if at != len(data):
        raise DecodeError("an entry's payload has bytes after its requests")
    return waiters
