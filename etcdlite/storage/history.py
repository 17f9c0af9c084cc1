"""The versions that a store keeps, in the order of their revisions, as of one moment.

Etcd keeps its history in this order, so its backups and its hash need it. The data file has it,
except for what cleaning moved to the tail. So a reading has two parts:

1. `scan_steps` reads all segments once. It asks the index which records up to the compact revision
   are still needed, and notes the place of each record that cleaning moved. It pins the compact
   revision until it ends.
2. `records` reads the segments again and merges the two orders. It does not use the store: it may
   wait for a slow client for hours, and keeps only files open.

The segments are opened at the beginning and read up to their length then, as for a snapshot
(`snap.py`). A record that is moved later is still at its old place in them. A record that was being
moved at that moment may be there twice; it is given once.

Memory: a byte per record up to the compact revision, and 24 bytes per moved one.

A data file that an earlier version cleaned does not tell the sub-revisions of changes whose
revision is compacted and lost other changes. They are numbered in order.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator
from heapq import merge
from itertools import chain
from typing import Protocol

from etcdlite.limits import Limits
from etcdlite.storage.data import (
    MOVED,
    OFFSET_MASK,
    PUT,
    SEGMENT_HEADER,
    TOMBSTONE,
    DataDamaged,
    DataFile,
    Numbering,
    key_and_revision,
    segment_name,
)
from etcdlite.storage.disk import Disk
from etcdlite.storage.index import Index

_PLACE = struct.Struct(">QIQI")
"""Of a moved record: revision, sub-revision, location, size. Big-endian, so that bytes sort."""
_DEAD = 1 << 31
"""A bit of the size: the record is a tombstone."""

CHUNK_BYTES = 64 << 10

READ_RECORDS = 64
"""Moved records that are read at once."""

Change = tuple[int, int, bytes, bool, bytes]
"""(revision, sub-revision, key, is a delete, encoded KeyValue)"""

_END: Change = (1 << 64, 0, b"", False, b"")


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
        """Known after the scan: as many changes as `records` gives, or a few more."""
        self.size_bytes = 0
        """Likewise, of their encoded KeyValues."""
        self._store: Store | None = store
        self._limits = store.limits
        self._flags = bytearray()
        """Of the records that were not moved, up to the compact revision: 1 if needed."""
        self._runs: list[bytes] = []
        """Sorted runs of `_PLACE`s."""
        live = store.data
        self._data = data = DataFile(store.disk, store.directory, 0, store.limits)
        try:
            for number in sorted(live.files):
                path = f"{store.directory}/{segment_name(number)}"
                data.files[number] = store.disk.open_read(path)
                is_active = number == live.active
                data.sizes[number] = live.flushed if is_active else live.sizes[number]
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        self._data.close()
        self._store = None

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
        limits = self._limits
        most_records, most_bytes = limits.history_step_records, limits.step_bytes
        compacted, flags, data = self.compacted, self._flags, self._data
        numbering = Numbering()
        places: list[bytes] = []
        is_above = False
        count = size = step_records = step_bytes = 0
        for number in sorted(data.files):
            numbering.reset()
            records = data.records(number, SEGMENT_HEADER.size, CHUNK_BYTES)
            for location, kind, body in records:
                length = len(body)
                step_records += 1
                step_bytes += length
                if kind in (PUT, TOMBSTONE):
                    if not is_above:
                        key, mod = key_and_revision(body)
                        is_above = mod > compacted
                        if not is_above:
                            is_kept = index.keeps(key, mod, compacted)
                            flags.append(is_kept)
                    if is_above or is_kept:
                        count += 1
                        size += length
                elif kind & MOVED:
                    key, mod = key_and_revision(body)
                    sub = numbering.take(mod)
                    if mod > compacted or index.keeps(key, mod, compacted):
                        count += 1
                        size += length
                        word = length | _DEAD if kind == TOMBSTONE | MOVED else length
                        places.append(_PLACE.pack(mod, sub, location, word))
                else:
                    numbering.read_other(kind, body)
                if step_records == most_records or step_bytes >= most_bytes:
                    step_records = step_bytes = 0
                    yield
                    if len(places) >= limits.sort_step_items:
                        self._runs.append(b"".join(sorted(places)))
                        places = []
                        yield
        if places:
            self._runs.append(b"".join(sorted(places)))
        self.count, self.size_bytes = count, size

    def records(self) -> Iterator[Change | None]:
        """The changes in ascending order of (revision, sub-revision). None ends a step in which
        there was none. After the scan. Raises DataDamaged, OSError."""
        return self._merged() if self._runs else self._unmoved()

    def _unmoved(self) -> Iterator[Change | None]:
        # Flat, as `_scan`.
        compacted, revision, flags = self.compacted, self.revision, self._flags
        at = last = visited = visited_bytes = 0
        limits = self._limits
        step_records, step_bytes = limits.history_step_records, limits.step_bytes
        numbering = Numbering()
        for number in sorted(self._data.files):
            numbering.reset()
            for location, kind, body in self._data.records(
                number, SEGMENT_HEADER.size, CHUNK_BYTES
            ):
                if kind in (PUT, TOMBSTONE):
                    key, mod = key_and_revision(body)
                    if mod > revision:
                        return  # A change that was not complete when the reading began.
                    if mod < last or (mod <= compacted and at == len(flags)):
                        path = self._data.path(number)
                        raise DataDamaged(
                            path, location & OFFSET_MASK, "revisions are not in order"
                        )
                    last = mod
                    sub = numbering.take(mod)
                    if mod > compacted:
                        yield mod, sub, key, kind == TOMBSTONE, body
                        continue
                    at += 1
                    if flags[at - 1]:
                        yield mod, sub, key, kind == TOMBSTONE, body
                        continue
                elif not kind & MOVED:
                    numbering.read_other(kind, body)
                visited += 1
                visited_bytes += len(body)
                if visited == step_records or visited_bytes >= step_bytes:
                    visited = visited_bytes = 0
                    yield None

    def _moved(self) -> Iterator[Change]:
        # Cleaning moves records in order, so those of many places take one read of the disk.
        data = self._data
        waiting: list[tuple[int, int, int, int]] = []
        size = 0
        for place in chain(merge(*map(_cut, self._runs)), (b"",)):
            if place:
                waiting.append(_PLACE.unpack(place))
                size += waiting[-1][3] & ~_DEAD
                if len(waiting) < READ_RECORDS and size < CHUNK_BYTES:
                    continue
            for (mod, sub, _, word), body in zip(
                waiting,
                data.read_all([(location, word & ~_DEAD) for _, _, location, word in waiting]),
                strict=True,
            ):
                body = bytes(body)
                yield mod, sub, key_and_revision(body)[0], word & _DEAD != 0, body
            waiting.clear()
            size = 0

    def _merged(self) -> Iterator[Change | None]:
        moved = self._moved()
        ahead = next(moved, None)
        last_mod = last_sub = -1
        keys: set[bytes] = set()
        """Those given of this revision: below the compact revision, an earlier version may have
        given copies of a change different numbers."""
        for first in chain(self._unmoved(), (_END,)):
            if first is None:
                yield None
                continue
            while ahead is not None or first is not _END:
                change = first
                if ahead is not None and ahead[:2] < first[:2]:
                    change = ahead
                    ahead = next(moved, None)
                mod, sub, key, is_delete, body = change
                if mod != last_mod:
                    last_mod, last_sub = mod, -1
                    keys.clear()
                is_copy = key in keys if mod < self.compacted else sub <= last_sub
                if not is_copy:
                    last_sub = max(sub, last_sub + 1)
                    if mod < self.compacted:
                        keys.add(key)
                    yield mod, last_sub, key, is_delete, body
                if change is first:
                    break


def _cut(run: bytes) -> Iterator[bytes]:
    size = _PLACE.size
    return (run[at : at + size] for at in range(0, len(run), size))
