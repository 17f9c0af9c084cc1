"""Distributed locks and leader election, sans-IO: etcd's own scheme, key by key.

The layout is that of etcd's `client/v3/concurrency`, so its locks and elections and these exclude
each other. Under a name, everyone who wants in puts the key

    <name>/<lease id in hexadecimal>

attached to his lease, the value empty (lock) or his own (election). The line is ordered by
create_revision: the oldest key holds the lock, or leads. Everyone else waits until the key just
before his own is deleted, so that a release wakes one waiter and not all. Who leaves, or dies and
lets his lease run out, leaves the line by it: the key goes with the lease.

A recipe is a script: a generator that yields what it needs (an `Op` to perform, a `WatchFor` to
wait for, a `KeyValue` to report) and is sent the outcome. The blocking and the asyncio client run
the same scripts.

A holder whose lease has run out may not know it yet. `Held.guard` is the comparison that makes a
transaction take effect only while the place is still held.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from etcdlite.client.errors import Compacted, LeaseLost, NotElected, Timeout
from etcdlite.client.operations import (
    Bytes,
    Comparison,
    CreateRevision,
    Event,
    Get,
    KeyValue,
    Op,
    Put,
    Range,
    RangeResult,
    get,
    range_,
    to_bytes,
    txn,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WatchFor:
    """Wait for the first event on `key`, or on the keys that start with it, from a revision on."""

    key: bytes
    is_prefix: bool
    start_revision: int
    wanted: Literal["PUT", "DELETE"] | None
    """Which events count; None: both."""

    def arguments(self) -> dict[str, Any]:
        """The arguments of `watch`."""
        return {
            "prefix" if self.is_prefix else "key": self.key,
            "start_revision": self.start_revision,
            "no_put": self.wanted == "DELETE",
            "no_delete": self.wanted == "PUT",
        }

    def timeout(self, endpoint: str) -> Timeout:
        """What is raised when the wait took too long."""
        key = self.key.decode(errors="replace")
        return Timeout(text=f"{endpoint}: still waiting for {key}", endpoint=endpoint)


Script = Generator[Any, Any, T]
"""Yields Op, WatchFor and KeyValue; is sent the op's result, the Event, and None; returns T."""


@dataclass(frozen=True, slots=True)
class Held:
    """A place at the head of a line."""

    key: bytes
    revision: int
    """The create_revision of the key: a fencing token that grows from holder to holder."""
    lease: int

    @property
    def guard(self) -> Comparison:
        """Holds as long as the place is held."""
        return CreateRevision(self.key) == self.revision


def line(name: Bytes) -> bytes:
    """The prefix of all keys of a lock or an election."""
    return to_bytes(name) + b"/"


def _first(prefix: bytes) -> Op[RangeResult]:
    return range_(prefix=prefix, sort_by="create", limit=1)


def stand_in_line(prefix: bytes, lease: int, value: bytes) -> Script[Held]:
    """Put the key of `lease` and return when it is the oldest one.

    Raises LeaseLost if the key has gone by then.
    """
    key = prefix + b"%x" % lease
    # Sent again it finds the key that it put the first time, so it may be.
    placed = yield txn(
        compare=[CreateRevision(key) == 0],
        success=[Put(key, value, lease=lease), Range(prefix=prefix, sort_by="create", limit=1)],
        failure=[Get(key), Range(prefix=prefix, sort_by="create", limit=1)],
        repeatable=True,
    )
    mine, head = placed.results
    revision = placed.revision if placed.succeeded else mine.create_revision
    if head.kvs and head.kvs[0].create_revision != revision:
        yield from _wait_turn(prefix, revision)
        if (kv := (yield get(key))) is None or kv.create_revision != revision:
            raise LeaseLost()
    return Held(key, revision, lease)


def _wait_turn(prefix: bytes, revision: int) -> Script[None]:
    """Return when no key in the line is older than `revision`."""
    while True:
        before = yield range_(
            prefix=prefix,
            sort_by="create",
            descending=True,
            limit=1,
            max_create_revision=revision - 1,
        )
        if not before.kvs:
            return
        try:
            yield WatchFor(before.kvs[0].key, False, before.revision + 1, "DELETE")
        except Compacted:
            pass  # The history went while nobody was connected: look again.


def proclaim(held: Held, value: bytes) -> Script[int]:
    """Change the leader's value. Gives the revision. Raises NotElected."""
    result = yield txn(compare=[held.guard], success=[Put(held.key, value, lease=held.lease)])
    if not result.succeeded:
        raise NotElected()
    return result.revision


def leader(prefix: bytes) -> Script[KeyValue | None]:
    """The key of who leads now, with his value; None if nobody does."""
    first = yield _first(prefix)
    return first.kvs[0] if first.kvs else None


def observe(prefix: bytes) -> Script[None]:
    """Report who leads: now, and after each change of leader or of his value. Never ends."""
    while True:
        first = yield _first(prefix)
        try:
            if not first.kvs:
                yield WatchFor(prefix, True, first.revision + 1, "PUT")
                continue
            leading = first.kvs[0]
            revision = first.revision
            while True:
                yield leading
                event: Event = yield WatchFor(leading.key, False, revision + 1, None)
                if event.is_delete:
                    break
                leading = event.kv
                revision = event.revision
        except Compacted:
            pass  # As above.
