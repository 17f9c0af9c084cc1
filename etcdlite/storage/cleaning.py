"""Cleaning: what a segment still holds moves to the tail, and the segment goes away.

Cleaning is how space comes back: it runs on its own, needs room for the live records of one segment
and never stops other work. The records of a revision whose history can still be read must stay side
by side. So records are gathered, revision by revision, appended at once, and then the index learns
their new places. All of it runs in steps, except the append, which is one write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from etcdlite.limits import Limits
from etcdlite.storage.data import (
    BUCKET,
    CLEANED,
    MOVED,
    PUT,
    RECORD_HEADER,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER,
    TOMBSTONE,
    U64,
    DataFile,
    Numbering,
    key_and_revision,
    record,
)
from etcdlite.storage.index import Index
from etcdlite.storage.steps import Job

STEPS_PER_BLOCK = 8
"""The records of one block are read, and then entered in the index, in this many steps each."""


class Store(Protocol):
    """What cleaning needs of the store."""

    data: DataFile
    index: Index
    limits: Limits
    applied_index: int
    applied_term: int
    checkpoint_begin: tuple[int, int]
    uncleanable: set[int]

    @property
    def oldest_read(self) -> int:
        """No read needs the history before this revision."""

    def mark(self, index: int, term: int) -> None: ...

    def fill_page(self) -> None: ...

    def set_bucket(self, bucket: int, key: bytes, value: bytes | None) -> None: ...


def segment_to_clean(store: Store, least_garbage: float) -> int | None:
    """The sealed segment with the largest share of garbage, if it is at least `least_garbage`
    (0 to 1).

    A segment that the next start scans does not count: what it says besides keys is in no
    checkpoint yet.
    """
    data = store.data
    shares = [
        (data.garbage[number] / size, number)
        for number, size in data.sizes.items()
        if number < store.checkpoint_begin[0] and number not in store.uncleanable
    ]
    share, number = max(shares, default=(0.0, 0))
    return number if number and share >= least_garbage else None


def clean(store: Store, number: int) -> Job:
    """Move what is still needed of segment `number` to the tail, sync it, remove the segment.
    Raises DataDamaged; then the segment stays, and what was moved before counts from the next
    mark on."""
    data, index = store.data, store.index
    most_records, most_bytes = store.limits.clean_block_records, store.limits.step_bytes
    most_step_records = most_records // STEPS_PER_BLOCK
    block = bytearray()
    last = block_records = step_records = step_bytes = 0
    found, moved = Numbering(), Numbering()
    for location, kind, body in data.records(number, SEGMENT_HEADER.size):
        kind &= ~MOVED
        if kind in (PUT, TOMBSTONE):
            key, mod = key_and_revision(body)
            sub = found.take(mod)
            is_large = block_records >= most_records or len(block) >= most_bytes
            if block and is_large and (mod != last or mod < store.oldest_read):
                yield from _append_moved(store, bytes(block))
                block = bytearray()
                block_records = step_records = step_bytes = 0
                moved.reset()
            last = mod
            if index.is_at(key, mod, location):
                block += moved.set(mod, sub)
                block += record(kind | MOVED, body)
        else:
            found.read_other(kind, body)
        block_records += 1
        step_records += 1
        step_bytes += len(body)
        if step_records > most_step_records or step_bytes >= most_bytes:
            step_records = step_bytes = 0
            yield None
    if block:
        yield from _append_moved(store, bytes(block))
    store.set_bucket(CLEANED, U64.pack(number), b"")
    store.mark(store.applied_index, store.applied_term)
    store.fill_page()
    yield data.take_sync()
    data.drop_segment(number)


def _append_moved(store: Store, block: bytes) -> Iterator[None]:
    """Append copies of records, of whole revisions, and point the index to them."""
    data, index = store.data, store.index
    begin = data.append_block(block)
    number = begin >> 32
    data.garbage[number] += len(block)
    store.mark(store.applied_index, store.applied_term)
    at = step_records = 0
    most_step_records = store.limits.clean_block_records // STEPS_PER_BLOCK
    while at < len(block):
        word = RECORD_HEADER.unpack_from(block, at)[1]
        size = word >> 4
        if word & 15 == BUCKET:  # Of `Numbering`.
            at += size + RECORD_HEADER_BYTES
            continue
        key, mod = key_and_revision(block, at + RECORD_HEADER_BYTES)
        location = begin + at
        old = index.move(key, mod, None, location)
        if old is not None:
            data.add_garbage(old, size)
            data.garbage[number] -= size + RECORD_HEADER_BYTES
            revision = mod - index.first_revision
            if 0 <= revision < len(index.revisions) and index.revisions[revision] == old:
                index.revisions[revision] = location
        at += size + RECORD_HEADER_BYTES
        step_records += 1
        if step_records > most_step_records:
            step_records = 0
            yield None
    yield None
