"""Cleaning: what a segment still holds moves to the tail, and the segment goes away.

Cleaning is how space comes back: it runs on its own, needs room for the live records of one segment
and never stops other work. The records of a revision whose history can still be read must stay side
by side. So records are gathered, revision by revision, appended at once, and then the index learns
their new places. All of it runs in steps, except the append, which is one write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol
from zlib import crc32

from etcdlite.limits import Limits
from etcdlite.storage.data import (
    CLEANED,
    MARK,
    MOVED,
    PUT,
    RECORD_HEADER,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER,
    SUB,
    TOMBSTONE,
    U64,
    DataFile,
    Numbering,
    key_and_revision,
)
from etcdlite.storage.index import Index
from etcdlite.storage.steps import Job

_CHANGES = {PUT, TOMBSTONE, PUT | MOVED, TOMBSTONE | MOVED}

STEPS_PER_BLOCK = 8
"""The records of one block are read, and then entered in the index, in this many steps each."""

DEAD_PER_LIVE = 4
"""A record that moves counts as this many that stay behind: it takes at least as long."""

_Place = tuple[bytes, int, int, int]
"""A copy in a block: key, mod_revision, offset, size of the body."""


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

    A segment that the next start scans does not count: not all it says is in a checkpoint."""
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
    # Flat, and records that nothing needs are hardly decoded: most are of that kind.
    data, index, limits = store.data, store.index, store.limits
    most_records, most_bytes = limits.clean_block_records, limits.step_bytes
    most_work = most_records // STEPS_PER_BLOCK * DEAD_PER_LIVE
    block = bytearray()
    places: list[_Place] = []
    last = step_work = step_bytes = 0
    found, moved = Numbering(), Numbering()
    dead: list[bytes] = []
    """Records that `found` has not counted yet."""
    offset = SEGMENT_HEADER.size
    while True:
        next_location = number << 32 | offset
        kinds, bodies, offset = data.block(number, offset, limits.event_chunk_bytes)
        if not bodies:
            break
        for kind, body in zip(kinds, bodies, strict=True):
            location = next_location
            size = len(body)
            next_location += RECORD_HEADER_BYTES + size
            step_work += 1
            step_bytes += size
            if kind not in _CHANGES:
                if kind == MARK or body[0] == SUB:
                    dead.clear()  # They have no influence on the next number.
                found.read_other(kind, body)
            else:
                key = body[2 : 2 + body[1]] if body[1] < 128 else key_and_revision(body)[0]
                head = index.heads.get(key)
                if head is not None and head[3] != location:
                    head = None  # It is that of another version.
                if head is None and key not in index.past:
                    dead.append(body)
                else:
                    if dead:
                        _count(found, dead)
                    mod = head[0] if head else key_and_revision(body)[1]
                    sub = found.take(mod)
                    is_large = len(places) >= most_records or len(block) >= most_bytes
                    if block and is_large and (mod != last or mod < store.oldest_read):
                        yield from _append_moved(store, bytes(block), places)
                        block = bytearray()
                        places = []
                        step_work = step_bytes = 0
                        moved.reset()
                    last = mod
                    if head or index.is_at(key, mod, location):
                        block += moved.set(mod, sub)
                        places.append((key, mod, len(block), size))
                        word = size << 4 | kind | MOVED
                        block += RECORD_HEADER.pack(crc32(body, word), word)
                        block += body
                        step_work += DEAD_PER_LIVE
            if step_work > most_work or step_bytes >= most_bytes:
                step_work = step_bytes = 0
                if dead:
                    _count(found, dead)
                yield None
    if block:
        yield from _append_moved(store, bytes(block), places)
    store.set_bucket(CLEANED, U64.pack(number), b"")
    store.mark(store.applied_index, store.applied_term)
    store.fill_page()
    yield data.take_sync()
    data.drop_segment(number)


def _count(found: Numbering, bodies: list[bytes]) -> None:
    """Take the numbers of these records, which follow each other, and forget them. Only those with
    the revision of the last one have influence on the next number."""
    last = key_and_revision(bodies[-1])[1]
    begin = len(bodies) - 1
    while begin and key_and_revision(bodies[begin - 1])[1] == last:
        begin -= 1
    if begin:
        found.reset()
    for _ in range(begin, len(bodies)):
        found.take(last)
    bodies.clear()


def _append_moved(store: Store, block: bytes, places: list[_Place]) -> Iterator[None]:
    """Append copies of records, of whole revisions, and point the index to them."""
    data, index = store.data, store.index
    begin = data.append_block(block)
    number = begin >> 32
    data.garbage[number] += len(block)
    store.mark(store.applied_index, store.applied_term)
    step_records = 1 + store.limits.clean_block_records // STEPS_PER_BLOCK
    for first in range(0, len(places) + 1, step_records):
        for key, mod, at, size in places[first : first + step_records]:
            location = begin + at
            old = index.move(key, mod, location)
            if old is not None:
                data.add_garbage(old, size)
                data.garbage[number] -= size + RECORD_HEADER_BYTES
                revision = mod - index.first_revision
                if 0 <= revision < len(index.revisions) and index.revisions[revision] == old:
                    index.revisions[revision] = location
        yield None
