"""Cleaning: what a segment still holds moves to the tail, and the segment goes away.

Cleaning is how space comes back: it runs on its own, needs room for the live records of one segment
and never stops other work. A step reads some records, appends copies of those that are needed, and
points the index to them. But the records of a revision whose history can still be read must stay
side by side: they are gathered, appended in one write, and then entered in the index.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from zlib import crc32

from etcdlite.mvcc import Store
from etcdlite.storage import layout
from etcdlite.storage.index import HEAD
from etcdlite.storage.layout import MOVED, OFFSET_MASK, RECORD_HEADER_BYTES, key_and_revision
from etcdlite.storage.steps import Job

_CHANGES = {layout.PUT, layout.TOMBSTONE, layout.PUT | MOVED, layout.TOMBSTONE | MOVED}

_MOD_AND_LOCATION = Struct("<Q16xQ")
_LOCATION_AT = 24  # In a row of `Index.heads`.


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
    Raises DataDamaged, and OSError of `NO_SPACE`; then the segment stays, and so does what was
    moved before."""
    # Flat: a large store has millions of records.
    data, index, limits = store.data, store.index, store.limits
    find, parts, past = index.heads.find, index.heads.blocks, index.past
    unpack = _MOD_AND_LOCATION.unpack_from
    found = layout.Numbering()
    dead: list[bytes] = []
    """Records that `found` has not counted yet."""
    gathered = _Copies()
    """Copies of readable history: whole revisions, gathered over as many steps as they take."""
    next_location = number << 32 | layout.SEGMENT_HEADER.size
    while True:
        kinds, bodies, _ = data.block(
            number, next_location & OFFSET_MASK, limits.event_chunk_bytes, limits.clean_step_records
        )
        if not bodies:
            break
        oldest_readable = min(store.compacted, *store.pinned, index.first_revision)
        copies = _Copies()
        full = []
        for kind, body in zip(kinds, bodies, strict=True):
            location = next_location
            next_location += RECORD_HEADER_BYTES + len(body)
            if kind not in _CHANGES:
                if kind == layout.MARK or body[0] == layout.SUB:
                    dead.clear()  # They have no influence on the next number.
                found.read_other(kind, body)
                continue
            key = body[2 : 2 + body[1]] if body[1] < 128 else key_and_revision(body)[0]
            part, below, is_head = find(key)
            row = below * HEAD.size
            mod, current = unpack(parts[part], row) if is_head else (0, 0)
            is_head = current == location
            if not is_head:
                if key not in past:
                    dead.append(body)
                    continue
                mod = key_and_revision(body)[1]
            if dead:
                _count(found, dead, mod)
            sub = found.take(mod)
            if not (is_head or index.is_at(key, mod, location)):
                continue
            target = copies
            if mod >= oldest_readable:
                is_large = len(gathered.versions) >= limits.clean_step_records
                is_large |= len(gathered.block) >= limits.step_bytes
                if mod != gathered.revision and is_large:
                    full.append(gathered)
                    gathered = _Copies()
                target = gathered
            at = target.add(mod, sub, kind, body)
            if is_head and mod < oldest_readable:
                copies.rows.append((parts[part], row, at, len(body)))
            else:
                target.versions.append((key, mod, at, len(body)))
        if dead:
            _count(found, dead, key_and_revision(dead[-1])[1])
        for batch in copies, *full:
            yield from batch.append(store, number)
    yield from gathered.append(store, number)
    store.set_bucket(layout.CLEANED, layout.U64.pack(number), b"")
    store.mark(store.applied_index, store.applied_term)
    store.fill_page()
    yield data.take_sync()
    data.drop_segment(number)
    yield data.take_sync()  # Only a durable removal gives the space back.


def _count(found: layout.Numbering, bodies: list[bytes], revision: int) -> None:
    """Count these adjacent records in `found`, and clear the list. The next number depends only on
    the last ones, as far as they are of `revision`."""
    begin = len(bodies)
    while begin and key_and_revision(bodies[begin - 1])[1] == revision:
        begin -= 1
    if begin:
        found.reset()
    for _ in range(begin, len(bodies)):
        found.take(revision)
    bodies.clear()


class _Copies:
    """Copies of records that are appended in one write."""

    def __init__(self) -> None:
        self.revision = 0
        """That of the last copy."""
        self.rows: list[tuple[bytearray, int, int, int]] = []
        """Current versions, within a step: block and offset of the index's row; then as below."""
        self.versions: list[tuple[bytes, int, int, int]] = []
        """Other versions: key, mod_revision, offset of the copy, size of the body."""
        self.block = bytearray()
        self._numbering = layout.Numbering()

    def add(self, revision: int, sub: int, kind: int, body: bytes) -> int:
        """Copy a record with the number `sub` in its revision. Returns the offset of the copy."""
        block = self.block
        block += self._numbering.set(revision, sub)
        self.revision = revision
        at = len(block)
        word = len(body) << 4 | kind | MOVED
        block += layout.RECORD_HEADER.pack(crc32(body, word), word)
        block += body
        return at

    def append(self, store: Store, source: int) -> Iterator[None]:
        """Append the copies to the data, and point the index from segment `source` to them."""
        data, index = store.data, store.index
        if self.block:
            begin = data.append_block(bytes(self.block))
            number = begin >> 32
            data.garbage[number] += len(self.block)
            # First: without space for the copies, the index must not point to them.
            store.mark(store.applied_index, store.applied_term)
            for block, row, at, _ in self.rows:
                layout.U64.pack_into(block, row + _LOCATION_AT, begin + at)
            moved_bytes = sum([size + RECORD_HEADER_BYTES for *_, size in self.rows])
            data.garbage[source] += moved_bytes
            data.garbage[number] -= moved_bytes
        step_records = store.limits.clean_step_records
        for first in range(0, len(self.versions) + 1, step_records):
            for key, mod, at, size in self.versions[first : first + step_records]:
                old = index.move(key, mod, begin + at)
                if old is not None:
                    data.add_garbage(old, size)
                    data.garbage[number] -= size + RECORD_HEADER_BYTES
                    revision = mod - index.first_revision
                    if 0 <= revision < len(index.revisions) and index.revisions[revision] == old:
                        index.revisions[revision] = begin + at
            yield None
