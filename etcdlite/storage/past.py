"""The superseded versions and tombstones of each key, sorted by key.

The past of a key is an entry for each version, ascending: mod_revision and location (u64 each) and
length (u32, top bit set: tombstone). One or two entries, which most keys have, are a row of the
table. More of them are in a bytearray of the key's own; its row is zeros.
"""

from __future__ import annotations

import struct
from typing import Any

from etcdlite.storage.sorted_table import SortedTable
from etcdlite.storage.steps import shrunk

PAST = struct.Struct("<QQI")
PAST_BYTES = PAST.size
PAST_AND_TOMBSTONE = struct.Struct("<QQIQQI")
"""Two entries: the version that a delete supersedes, and its tombstone."""
DEAD = 1 << 31
"""In the length of an entry: the record is a tombstone."""

_ROW = struct.Struct(f"{2 * PAST_BYTES}s")
"""Two entries, or one and zeros."""
_LONG = bytes(_ROW.size)
"""What the row of a key contains if its entries are in `long`."""
_NONE = bytes(8)
"""In place of the second mod_revision: there is no second entry."""


class Past(SortedTable):
    """A map from keys to their entries, joined. A bytearray may be changed in place."""

    __slots__ = ("long",)

    def __init__(self) -> None:
        super().__init__(_ROW)
        self.long: dict[bytes, bytearray] = {}
        """The entries of keys that have more than two. `Store.put_all` appends to them itself."""

    def _entries(self, key: bytes, row: bytes) -> bytes | bytearray:
        if row == _LONG:
            return self.long[key]
        return row[:PAST_BYTES] if row[PAST_BYTES : PAST_BYTES + 8] == _NONE else row

    def get(self, key: bytes, default: Any = None) -> Any:
        row = super().get(key)
        return default if row is None else self._entries(key, row[0])

    def first_items(self, start: bytes, limit: int) -> list[tuple[bytes, bytes | bytearray]]:
        """Up to `limit` keys from `start` on, with their entries."""
        rows = zip(self.first(start, None, limit), self.rows(start, None))  # noqa: B905
        return [(key, self._entries(key, row)) for key, (row,) in rows]

    def add(self, key: bytes, added: bytes) -> None:
        """Append entries to those of a key."""
        if (long := self.long.get(key)) is not None:
            long += added
            return
        at, below, is_there = self.find(key)
        if is_there and len(added) == PAST_BYTES:
            block, begin = self.blocks[at], below * _ROW.size
            second, end = begin + PAST_BYTES, begin + _ROW.size
            if block.startswith(_NONE, second):
                block[second:end] = added
            else:
                self.long[self._parts[at][below]] = block[begin:end] + added
                block[begin:end] = _LONG
        elif not is_there and len(added) <= _ROW.size:
            self.insert(at, below, [key], _ROW.pack(added))
        else:
            self[key] = self.get(key, b"") + added

    def add_all(self, keys: list[bytes], entries: list[bytes]) -> None:
        """As `add`, for several keys. Fast if `add_run` accepts the keys."""
        is_run = len(keys) > 1 and max(map(len, entries)) <= _ROW.size
        if not (is_run and self.add_run(keys, b"".join(map(_ROW.pack, entries)))):
            for key, added in zip(keys, entries, strict=True):
                self.add(key, added)

    def __setitem__(self, key: bytes, entries: Any) -> None:
        if len(entries) <= _ROW.size:
            self.long.pop(key, None)
            super().__setitem__(key, (entries,))
        else:
            super().__setitem__(key, (_LONG,))
            self.long[key] = bytearray(entries)

    def lists(self) -> list[Any]:
        return [self.long, *super().lists()]

    def pop_run(self, keys: list[bytes]) -> list[tuple[Any, ...]]:
        rows = super().pop_run(keys)
        for key in keys if self.long else ():
            self.long.pop(key, None)
        self.long = shrunk(self.long)
        return rows
