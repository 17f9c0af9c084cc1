"""The versions that a store keeps, in the order of their revisions, as of one moment.

Etcd keeps its history in this order, so its backups and its hash need it. The data file has it,
except for what cleaning moved to the tail. So a reading has two parts:

1. `scan_steps` reads all segments once. It asks the index which records up to the compact revision
   are still needed, and notes the place of each record that cleaning moved. It pins the compact
   revision until it ends.
2. `changes` reads the segments again and merges the two orders. It does not use the store: it may
   wait for a slow client for hours, and keeps only files open.

Both read blocks of records, because to decode a record in Python takes longer than to read it.
Above the compact revision no revision is missing, and the records of a revision that were not moved
stand in one segment. So if the last revision of a block minus that of the block before is the
number of changes in the block, there is one change per revision, and only the last one is decoded.

The segments are opened at the beginning and read up to their length then, as for a snapshot
(`snap.py`). A record that is moved later is still at its old place in them. A record that was being
moved at that moment may be there twice; it is given once.

Memory: a byte per record up to the compact revision, and 24 bytes per moved one.

A data file that an earlier version cleaned does not tell the sub-revisions of changes whose
revision is compacted and lost other changes. They are numbered in order.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from heapq import merge
from itertools import chain
from typing import Any, NamedTuple, Protocol

from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.storage import layout
from etcdlite.storage.data import DataFile
from etcdlite.storage.disk import Disk, File
from etcdlite.storage.index import Index
from etcdlite.storage.layout import MOVED, PUT, RECORD_HEADER_BYTES, TOMBSTONE, key_and_revision

_PLACE = struct.Struct(">QIQI")
"""Of a moved record: revision, sub-revision, location, size. Big-endian, so that bytes sort."""
_DEAD = 1 << 31
"""A bit of the size: the record is a tombstone."""

_FAR = 127
"""The largest difference of revisions in a flag. It stands for larger ones, too."""

READ_RECORDS = 256
"""The most moved records that are read at once."""

_CHANGES = frozenset((PUT, TOMBSTONE))
_CHANGES_AND_MARKS = frozenset((PUT, TOMBSTONE, layout.MARK))


class Changes(NamedTuple):
    """Some changes, in ascending order of (revision, sub-revision). There may be none."""

    revisions: Sequence[int]
    subs: Sequence[int]
    kinds: Sequence[int]
    """PUT or TOMBSTONE."""
    bodies: Sequence[bytes]
    """Encoded KeyValues."""


class Store(Protocol):
    """What a reading needs of the store."""

    disk: Disk
    directory: str
    data: DataFile
    index: Index
    limits: Limits
    compacted: int
    marked_revision: int
    pinned: list[int]


class History:
    """One reading of the versions of a store, as of its last mark."""

    def __init__(self, store: Store) -> None:
        """Open the segments; `close` closes them. Raises OSError."""
        self.revision = store.marked_revision
        self.compacted = store.compacted
        self.count = 0
        """Known after the scan: as many changes as `changes` gives, or a few more."""
        self.size_bytes = 0
        """Likewise, of their encoded KeyValues."""
        self._store: Store | None = store
        self._limits = store.limits
        self._flags = bytearray()
        """A byte for each record up to the compact revision that was not moved. Bit 0: needed. The
        other bits: its revision minus that of the record before, or `_FAR`."""
        self._runs: list[bytes] = []
        """Sorted runs of `_PLACE`s."""
        live = store.data
        self._data = data = DataFile(store.disk, store.directory, 0, store.limits)
        try:
            for number in sorted(live.files):
                path = f"{store.directory}/{layout.segment_name(number)}"
                data.files[number] = store.disk.open_read(path)
                data.sizes[number] = live.flushed if number == live.active else live.sizes[number]
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        self._data.close()
        self._store = None

    def hand_over(self) -> Iterator[Any]:
        """After the scan: what a process that inherits the files needs for `changes`, in pieces."""
        data, flags, step = self._data, self._flags, self._limits.history_chunk_bytes
        files = [(n, file.fileno(), data.sizes[n]) for n, file in data.files.items()]
        counts = self.revision, self.compacted, self.count, self.size_bytes
        pieces = (flags[at : at + step] for at in range(0, len(flags), step))
        return chain([(data.directory, files, counts)], pieces, [None], self._runs, [None])

    @classmethod
    def take_over(cls, take: Callable[[], Any]) -> History:
        """In the other process, where `take` returns the next value of `hand_over`."""
        self = cls.__new__(cls)
        directory, files, counts = take()
        self.revision, self.compacted, self.count, self.size_bytes = counts
        self._flags = bytearray().join(iter(take, None))
        self._runs = list(iter(take, None))
        self._limits = DEFAULT_LIMITS
        self._data = DataFile(Disk(), directory, 0)
        for number, fd, size_bytes in files:
            self._data.files[number] = File(self._data.path(number), fd)
            self._data.sizes[number] = size_bytes
        return self

    @property
    def fds(self) -> list[int] | None:
        """The open files that another process must inherit; None if it could not read them."""
        files = self._data.files.values()
        return [file.fileno() for file in files] if all(type(f) is File for f in files) else None

    @property
    def data_bytes(self) -> int:
        """The size of those files."""
        return sum(self._data.sizes.values())

    def scan_steps(self) -> Generator[None, None, None]:
        """The first reading, in steps. Raises DataDamaged, OSError."""
        store = self._store
        assert store is not None
        store.pinned.append(self.compacted)
        try:
            yield from self._scan(store.index)
        finally:
            store.pinned.remove(self.compacted)
            self._store = None

    def _scan(self, index: Index) -> Generator[None, None, None]:
        # Flat: a large store has millions of records.
        limits, compacted, flags, data = self._limits, self.compacted, self._flags, self._data
        numbering = layout.Numbering()
        places: list[bytes] = []
        is_above = False
        count = size = last = 0
        for number in sorted(data.files):
            numbering.reset()
            offset = layout.SEGMENT_HEADER.size
            while True:
                if is_above:
                    # The counts need only the headers. The second reading checks the records.
                    words, end = data.words(number, offset, limits.history_chunk_bytes)
                    kinds = [word & 15 for word in words]
                    if words and _CHANGES_AND_MARKS.issuperset(kinds):
                        marks = kinds.count(layout.MARK)
                        count += len(kinds) - marks
                        size += (sum(words) - sum(kinds) >> 4) - marks * layout.MARK_BODY.size
                        numbering.reset()
                        offset = end
                        yield
                        continue
                location = number << 32 | offset
                kinds, bodies, offset = data.block(number, offset, limits.history_chunk_bytes)
                if not kinds:
                    break
                for kind, body in zip(kinds, bodies, strict=True):
                    if kind in _CHANGES:
                        if not is_above:
                            key, mod = key_and_revision(body)
                            is_above = mod > compacted
                            if not is_above:
                                is_kept = index.keeps(key, mod, compacted)
                                above = mod - last
                                flags.append((above if 0 <= above < _FAR else _FAR) << 1 | is_kept)
                                last = mod
                        if is_above or is_kept:
                            count += 1
                            size += len(body)
                    elif kind & MOVED:
                        key, mod = key_and_revision(body)
                        sub = numbering.take(mod)
                        if mod > compacted or index.keeps(key, mod, compacted):
                            count += 1
                            size += len(body)
                            word = len(body) | _DEAD if kind == TOMBSTONE | MOVED else len(body)
                            places.append(_PLACE.pack(mod, sub, location, word))
                    else:
                        numbering.read_other(kind, body)
                    location += len(body) + RECORD_HEADER_BYTES
                yield
                if len(places) >= limits.sort_step_items:
                    self._runs.append(b"".join(sorted(places)))
                    places = []
                    yield
        if places:
            self._runs.append(b"".join(sorted(places)))
        self.count, self.size_bytes = count, size

    def changes(self) -> Iterator[Changes]:
        """All changes in ascending order, in steps. Call it after the scan. Raises DataDamaged,
        OSError."""
        if not self._runs:
            return self._unmoved()
        return _without_copies(_merged(self._unmoved(), self._moved()), self.compacted)

    def _unmoved(self) -> Iterator[Changes]:
        # Flat, as `_scan`.
        compacted, newest, flags, data = self.compacted, self.revision, self._flags, self._data
        numbering = layout.Numbering()
        at = last = 0
        for number in sorted(data.files):
            numbering.reset()
            has_changes = False
            end = layout.SEGMENT_HEADER.size
            while True:
                offset = end
                kinds, bodies, end = data.block(number, offset, self._limits.history_chunk_bytes)
                if not kinds:
                    break
                if has_changes and last >= compacted:
                    found = _one_per_revision(last, newest, kinds, bodies)
                    if found is not None:
                        last = found.revisions[-1]
                        numbering.reset()
                        numbering.take(last)
                        yield found
                        continue
                revisions: list[int] = []
                subs: list[int] = []
                chosen: list[int] = []
                for which, kind in enumerate(kinds):
                    if kind in _CHANGES:
                        is_needed, above = 1, _FAR
                        if at < len(flags):
                            above, is_needed = flags[at] >> 1, flags[at] & 1
                            at += 1
                        if above == _FAR:
                            above = key_and_revision(bodies[which])[1] - last
                        if above < 0:
                            why = f"revisions from here to offset {end} are not in order"
                            raise layout.DataDamaged(data.path(number), offset, why)
                        last += above
                        if last > newest:
                            break  # It was not complete when the reading began.
                        has_changes = True
                        sub = numbering.take(last)
                        if is_needed:
                            revisions.append(last)
                            subs.append(sub)
                            chosen.append(which)
                    elif not kind & MOVED:
                        numbering.read_other(kind, bodies[which])
                has_changes = has_changes and kinds[-1] != layout.BUCKET  # It may be a `SUB`.
                needed = [kinds[n] for n in chosen], [bodies[n] for n in chosen]
                yield Changes(revisions, subs, *needed)
                if last > newest:
                    return

    def _moved(self) -> Iterator[Changes]:
        # Cleaning moves records in order, so those of many places take one read of the disk.
        data = self._data
        waiting: list[tuple[Any, ...]] = []
        size = 0
        for place in chain(merge(*map(_PLACE.iter_unpack, self._runs)), ((),)):
            if place:
                waiting.append(place)
                size += waiting[-1][3] & ~_DEAD
                if len(waiting) < READ_RECORDS and size < self._limits.history_chunk_bytes:
                    continue
            if waiting:
                revisions, subs, locations, words = zip(*waiting, strict=True)
                sizes = [word & ~_DEAD for word in words]
                yield Changes(
                    revisions,
                    subs,
                    [TOMBSTONE if word & _DEAD else PUT for word in words],
                    [bytes(b) for b in data.read_all(list(zip(locations, sizes, strict=True)))],
                )
            waiting.clear()
            size = 0


def _one_per_revision(
    last: int, newest: int, kinds: Sequence[int], bodies: Sequence[bytes]
) -> Changes | None:
    """The changes of a block if there is exactly one of each revision from `last` + 1 on, and none
    above `newest`. `last`: the revision before the block, in the same segment and not compacted."""
    if layout.BUCKET in kinds and layout.SUB in (
        b[0] for b, k in zip(bodies, kinds, strict=True) if k == layout.BUCKET
    ):
        return None  # An imported history may state numbers here.
    if kinds.count(PUT) < len(kinds):
        pairs = [pair for pair in zip(kinds, bodies, strict=True) if pair[0] in _CHANGES]
        if not pairs:
            return None
        kinds, bodies = zip(*pairs, strict=True)
    revision = key_and_revision(bodies[-1])[1]
    if revision - last != len(bodies) or revision > newest:
        return None
    return Changes(range(last + 1, revision + 1), bytes(len(bodies)), kinds, bodies)


def _merged(left: Iterator[Changes], right: Iterator[Changes]) -> Iterator[Changes]:
    """Merge two ascending streams. Where parts of both overlap, their changes are sorted."""
    one, other = next(left, None), next(right, None)
    while one is not None and other is not None:
        if not one.bodies or (other.bodies and _place(one, -1) < _place(other, 0)):
            yield one
            one = next(left, None)
        elif not other.bodies or _place(other, -1) < _place(one, 0):
            yield other
            other = next(right, None)
        else:
            end = min(_place(one, -1), _place(other, -1))
            early_left, one = _split(one, end)
            early_right, other = _split(other, end)
            rows = sorted(chain(zip(*early_left, strict=True), zip(*early_right, strict=True)))
            yield Changes(*zip(*rows, strict=True))
    for rest, stream in ((one, left), (other, right)):
        if rest is not None:
            yield rest
            yield from stream


def _place(changes: Changes, at: int) -> tuple[int, int]:
    return changes.revisions[at], changes.subs[at]


def _split(changes: Changes, end: tuple[int, int]) -> tuple[Changes, Changes]:
    """The changes up to this revision and sub-revision, and the others."""
    at = bisect_right(list(zip(changes.revisions, changes.subs, strict=True)), end)
    revisions, subs, kinds, bodies = changes
    return (
        Changes(revisions[:at], subs[:at], kinds[:at], bodies[:at]),
        Changes(revisions[at:], subs[at:], kinds[at:], bodies[at:]),
    )


def _without_copies(stream: Iterator[Changes], compacted: int) -> Iterator[Changes]:
    """Drop the second copy of each change that was being moved when the reading began."""
    last = last_sub = -1
    keys: set[bytes] = set()
    """Those of revision `last` so far. Below the compact revision the copies of a change are found
    by its key: a file of an earlier version may number them differently."""
    for changes in stream:
        revisions = changes.revisions
        if revisions and revisions[0] > last and len(set(revisions)) == len(revisions):
            yield changes
            last, last_sub = revisions[-1], changes.subs[-1]
            keys = {key_and_revision(changes.bodies[-1])[0]}
            continue
        kept: list[tuple[int, int, int, bytes]] = []
        for revision, sub, kind, body in zip(*changes, strict=True):
            if revision != last:
                last, last_sub = revision, -1
                keys.clear()
            key = key_and_revision(body)[0] if revision < compacted else b""
            if key in keys if key else sub <= last_sub:
                continue
            keys.add(key)
            last_sub = max(sub, last_sub + 1)
            kept.append((revision, last_sub, kind, body))
        yield Changes(*zip(*kept, strict=True)) if kept else Changes((), (), (), ())
