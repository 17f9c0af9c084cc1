"""What the log holds: the payload of an entry, the requests in it, and who waits for their answers.

The payload of an entry, all integers little-endian:

    0   1  format version, 1
    1   3  zero
    4   4  number of requests
    8   8  id of the member that proposed it
    16  8  number of the batch at that member, so that it finds who waits for the answers
    24     the requests, each as a frame of the native protocol: the very bytes the client sent
           (the request id in it means nothing here), or of a method that only members propose

A membership change is an entry of its own kind, with one request, a `MemberChange`.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from typing import Any, Protocol

from etcdlite.errors import EtcdError
from etcdlite.frames import FRAME, FRAME_HEADER_BYTES
from etcdlite.methods import LEASE_GRANT, PUT, REQUESTS, TXN

ENTRY_VERSION = 1
ENTRY_HEADER = struct.Struct("<B3xIQQ")


class Session(Protocol):
    """Who asked, and where answers go. `native.py` is one."""

    @property
    def is_blocked(self) -> bool:
        """Its answers are not being read: give it no more of those that can wait."""

    def awaits(self, request_id: int) -> bool:
        """Somebody still waits for the answer to that request. If not, work for it is left out, and
        any `reply` lets the session forget it."""

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        """The answer to a unary request."""

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        """The answer to a unary request, or the end of a stream, that failed."""


Waiter = tuple["Session | None", int, int, Any]
"""(session or None, request id, method, decoded request)"""

Steps = Generator[None, None, bytes]
"""Work in slices whose result is the encoded response without its header."""


def decode_requests(data: bytes, count: int) -> list[Waiter]:
    """The requests of an entry's payload that nobody here waits for."""
    waiters: list[Waiter] = []
    at = ENTRY_HEADER.size
    for _ in range(count):
        length, request_id, method, _ = FRAME.unpack_from(data, at)
        end = at + 4 + length
        request = REQUESTS[method].decode(data, at + FRAME_HEADER_BYTES, end)
        waiters.append((None, request_id, method, request))
        at = end
    assert at == len(data), "an entry's payload has bytes after its requests"
    return waiters


def needs_space(method: int, request: Any) -> bool:
    """Whether a write is refused while there is no space: puts and leases, not deletes."""
    if method != TXN:
        return method in (PUT, LEASE_GRANT)
    for op in (*request.success, *request.failure):
        if op.request_put is not None or (
            op.request_txn is not None and needs_space(TXN, op.request_txn)
        ):
            return True
    return False
