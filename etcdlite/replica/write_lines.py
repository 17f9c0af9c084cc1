"""The writes that wait because enough are in flight: a line for each connection, in turn.

So a write waits for one write of each other connection, and not for all that came before it. The
order of the writes of one connection is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from etcdlite.request import Waiter, connection


class Waiting(NamedTuple):
    """A write in a line."""

    since: float
    """When it came, on the member's clock."""
    author: Any
    """What `add` was given."""
    waiter: Waiter
    frame: bytes


class WriteLines(dict[Any, "deque[Waiting]"]):
    """The lines, by connection. No line is empty."""

    def add(self, write: Waiting) -> None:
        self.setdefault(connection(write.waiter.session), deque()).append(write)

    def take(self, count: int, size_bytes: int, kept: Callable[[Waiter], int]) -> Iterator[Waiting]:
        """The next writes in turn: at most this many, and about this many bytes, with `kept`."""
        while self and count > 0 and size_bytes > 0:
            session, line = next(iter(self.items()))
            del self[session]
            write = line.popleft()
            if line:
                self[session] = line
            count -= 1
            size_bytes -= len(write.frame) + kept(write.waiter)
            yield write

    def expire(self, since: float, limit: int) -> list[Waiting]:
        """Take out writes that came before this time, up to `limit`."""
        expired: list[Waiting] = []
        for session, line in list(self.items()):
            while line and line[0].since <= since and len(expired) < limit:
                expired.append(line.popleft())
            if not line:
                del self[session]
        return expired
