"""Distributed locks and leader election, sans-IO: etcd's own scheme, key by key.

The layout is that of etcd's `client/v3/concurrency`, so its locks and elections and these exclude
each other. Under a name, each candidate puts the key

    <name>/<lease id in hexadecimal>

attached to its lease, with an empty value (lock) or its own (election). The line is ordered by
create_revision: the oldest key holds the lock, or leads. Every other candidate waits until the key
just before its own is deleted, so a release wakes one waiter and not all. A candidate that leaves,
or dies and lets its lease run out, leaves the line: the key goes with the lease.

A recipe is a generator that yields what it needs (an `Op` to perform, a `WatchFor` to wait for, a
`KeyValue` to report) and is sent the outcome. `scripts.follow` runs it.

A holder whose lease has run out may not know it yet. `Held.guard` is the comparison that makes a
transaction take effect only while the place is still held.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from typing import Any, Literal, NamedTuple, TypeVar

from etcdlite.client.errors import Compacted, LeaseLost, NotElected
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
    WatchCursor,
    get,
    range_,
    to_bytes,
    txn,
    watch,
)

T = TypeVar("T")


class WatchFor(NamedTuple):
    """Wait for the first event on `key`, or on the keys that start with it, from a revision on."""

    key: bytes
    is_prefix: bool
    start_revision: int
    wanted: Literal["PUT", "DELETE"] | None
    """Which events count; None: both."""

    def cursor(self) -> WatchCursor:
        """The watch to begin."""
        return watch(
            None if self.is_prefix else self.key,
            prefix=self.key if self.is_prefix else None,
            start_revision=self.start_revision,
            no_put=self.wanted == "DELETE",
            no_delete=self.wanted == "PUT",
        )


Recipe = Generator[Any, Any, T]
"""Yields Op, WatchFor and KeyValue; is sent the result, the Event, and None; returns T."""


class Held(NamedTuple):
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


def stand_in_line(prefix: bytes, lease: int, value: bytes) -> Recipe[Held]:
    """Put the key of `lease` and return when it is the oldest one.

    Raises LeaseLost if the key is gone by then."""
    key = prefix + b"%x" % lease
    # If sent twice, the second one finds the key of the first.
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


def _wait_turn(prefix: bytes, revision: int) -> Recipe[None]:
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
        # If the history was compacted while the watch was not connected: look again.
        with suppress(Compacted):
            yield WatchFor(before.kvs[0].key, False, before.revision + 1, "DELETE")


def proclaim(held: Held, value: bytes) -> Recipe[int]:
    """Change the leader's value. Returns the revision. Raises NotElected."""
    result = yield txn(compare=[held.guard], success=[Put(held.key, value, lease=held.lease)])
    if not result.succeeded:
        raise NotElected()
    return result.revision


def leader(prefix: bytes) -> Recipe[KeyValue | None]:
    """The key of the leader, with its value; None if there is no leader."""
    first = yield _first(prefix)
    return first.kvs[0] if first.kvs else None


def observe(prefix: bytes) -> Recipe[None]:
    """Report the leader's key: now, and after each change of leader or of its value. Endless."""
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
