"""Distributed locks and leader election, sans-IO: etcd's own scheme, key by key.

The layout is that of etcd's `client/v3/concurrency`, so its locks and elections and these exclude
each other. Under a name, each candidate puts the key

    <name>/<lease id in hexadecimal>

attached to its lease, with an empty value (lock) or its own (election). The line is ordered by
create_revision: the oldest key holds the lock, or leads. Every other candidate waits until the key
just before its own is deleted, so a release wakes one waiter and not all. A candidate that leaves,
or dies and lets its lease run out, leaves the line: the key goes with the lease.

A recipe is a generator that yields what it needs (an `Op` to perform, a `WatchCursor` to await the
first event of, a `KeyValue` to report) and is sent the outcome. `scripts.follow` runs it.

A holder whose lease has run out may not know it yet. `Held.guard` is the comparison that makes a
transaction take effect only while the place is still held.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

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
    RangeResult,
    get,
    range_,
    to_bytes,
    txn,
    watch,
)

T = TypeVar("T")


Recipe = Generator[Any, Any, T]
"""Yields Op, WatchCursor and KeyValue; is sent the result, the Event, and None; returns T."""


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
        success=[Put(key, value, lease=lease), _first(prefix)],
        failure=[Get(key), _first(prefix)],
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
            yield watch(before.kvs[0].key, start_revision=before.revision + 1, no_put=True)


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
                yield watch(prefix=prefix, start_revision=first.revision + 1, no_delete=True)
                continue
            leading = first.kvs[0]
            revision = first.revision
            while True:
                yield leading
                event: Event = yield watch(leading.key, start_revision=revision + 1)
                if event.is_delete:
                    break
                leading = event.kv
                revision = event.revision
        except Compacted:
            pass  # As above.
