"""A sorted map from keys to rows of one `struct` format. Rows are packed, so none is an object.

The keys are in parts: lists of up to `MAX_PART` keys. The rows of a part are in a bytearray, in the
order of its keys. So a row is read and changed in place, the rows of neighbouring keys are read
together, and adding or removing a key moves the rest of one part only. Runs of neighbouring keys
are added and removed as slices.

A look-up in a small table first tries the place where the key was found last (`known`). That is
only a guess: the key at the place decides, so changes need not correct it.

Invariants: no part is empty; keys ascend within and between parts; `_lasts` has the last key of
each part.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, MutableMapping
from itertools import accumulate, chain
from operator import lt
from struct import Struct
from typing import Any

MAX_PART = 512
"""A part with more keys than this is cut into parts that are about half full."""

SMALL_PARTS = 64
"""A table of up to this many parts, so of about 20,000 keys, remembers where keys were found, which
takes up to 4 MB. In a large one that would cost more than a search: the cache of a CPU is small."""

Row = tuple[Any, ...]


class SortedTable(MutableMapping[bytes, Row]):
    """A map from keys to rows."""

    __slots__ = ("_lasts", "_parts", "_ranks", "_row", "blocks", "known")

    def __init__(self, row: Struct) -> None:
        self._row = row
        self._lasts: list[bytes] = []
        self._parts: list[list[bytes]] = []
        self.blocks: list[bytearray] = []
        """The packed rows of each part."""
        self.known: dict[bytes, tuple[int, int, bool]] = {}
        """What `find` returned for keys that are there."""
        self._ranks: list[int] | None = None
        """The number of keys before each part, and of all keys at the end; None after a change."""

    def __len__(self) -> int:
        return self._part_ranks()[-1]

    def __iter__(self) -> Iterator[bytes]:
        return chain.from_iterable(self._parts)

    def _part_ranks(self) -> list[int]:
        """`_ranks`, counted if necessary."""
        if self._ranks is None:
            self._ranks = list(accumulate(map(len, self._parts), initial=0))
        return self._ranks

    @property
    def key_bytes(self) -> int:
        """About the size of all keys: the last one of each part stands for the others."""
        return sum(map(len, self._lasts)) * len(self) // max(1, len(self._lasts))

    def lists(self) -> list[Any]:
        """All that it consists of, for `steps.discard`."""
        return [*self._parts, self._parts, self._lasts, self.blocks]

    # Look-ups of one key.

    def find(self, key: bytes) -> tuple[int, int, bool]:
        """Where a key is or belongs: (part, keys of it below this one, whether it is there). Above
        all keys, `part` is the number of parts. Valid until a key is added or removed."""
        # Flat: each put and each read of one key begins here.
        known = self.known
        place = known.get(key)
        if place is not None:
            at, below, _ = place
            try:
                if self._parts[at][below] == key:
                    return place
            except IndexError:
                pass  # The part has fewer keys now.
        at = bisect_left(self._lasts, key)
        if at == len(self._lasts):
            return at, 0, False
        part = self._parts[at]
        below = bisect_left(part, key)
        if part[below] != key:
            return at, below, False
        place = at, below, True
        if len(self._parts) <= SMALL_PARTS:
            known[part[below]] = place
        return place

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self.find(key)[2]

    def __getitem__(self, key: bytes) -> Row:
        row: Row | None = self.get(key)
        if row is None:
            raise KeyError(key)
        return row

    def get(self, key: bytes, default: Any = None) -> Any:
        at, below, is_there = self.find(key)
        if not is_there:
            return default
        return self._row.unpack_from(self.blocks[at], below * self._row.size)

    # Ranges: [start, end); end None: no upper bound.

    def count(self, start: bytes, end: bytes | None) -> int:
        first, begin, _ = self.find(start)
        last, stop = (len(self._parts), 0) if end is None else self.find(end)[:2]
        if last - first > 16:
            ranks = self._part_ranks()  # After a change it visits all parts.
            return ranks[last] + stop - ranks[first] - begin
        return max(0, sum(map(len, self._parts[first:last])) + stop - begin) if first <= last else 0

    def _spans(
        self, start: bytes, end: bytes | None, descends: bool = False
    ) -> Iterator[tuple[int, int, int]]:
        """The places of a range: (part, begin, end)."""
        first, begin, _ = self.find(start)
        last, stop = (len(self._parts), 0) if end is None else self.find(end)[:2]
        parts = range(first, min(last + 1, len(self._parts)))
        for at in reversed(parts) if descends else parts:
            low = begin if at == first else 0
            high = stop if at == last else len(self._parts[at])
            if low < high:
                yield at, low, high

    def first(
        self, start: bytes, end: bytes | None, limit: int, descends: bool = False
    ) -> list[bytes]:
        """Up to `limit` keys of a range: the first, ascending, or the last, descending."""
        found: list[bytes] = []
        for at, low, high in self._spans(start, end, descends):
            room = limit - len(found)
            if descends:
                found += self._parts[at][max(low, high - room) : high][::-1]
            else:
                found += self._parts[at][low : min(high, low + room)]
            if len(found) >= limit:
                break
        return found

    def packed(self, start: bytes, end: bytes | None) -> Iterator[bytearray]:
        """The packed rows of a range, in pieces. Between them no key may be added or removed."""
        size = self._row.size
        for at, begin, stop in self._spans(start, end):
            yield self.blocks[at][begin * size : stop * size]

    def rows(self, start: bytes, end: bytes | None) -> Iterator[Row]:
        """The rows of a range, under the condition of `packed`."""
        return chain.from_iterable(map(self._row.iter_unpack, self.packed(start, end)))

    # Changes.

    def __setitem__(self, key: bytes, row: Row) -> None:
        at, below, is_there = self.find(key)
        if is_there:
            self._row.pack_into(self.blocks[at], below * self._row.size, *row)
        else:
            self.insert(at, below, [key], self._row.pack(*row))

    def insert(self, at: int, below: int, keys: list[bytes], packed: bytes) -> None:
        """Add keys that are not there, at the place that `find` returns for the first. They are in
        order, and no other key is between them. `packed`: their rows."""
        if at == len(self._parts):
            if not at:
                self._replace(slice(0), keys, packed)
                return
            at -= 1
            below = len(self._parts[at])
            self._lasts[at] = keys[-1]
        self._ranks = None
        part, block, begin = self._parts[at], self.blocks[at], below * self._row.size
        part[below:below] = keys
        block[begin:begin] = packed
        if len(part) > MAX_PART:
            self._replace(slice(at, at + 1), part, block)

    def add_run(self, keys: list[bytes], packed: bytes) -> bool:
        """As `insert`, at the right place. Returns False, and adds nothing, if the keys are not in
        order, or one is there, or another key is between them."""
        if keys:
            at, below, _ = self.find(keys[0])
            is_free = at == len(self._parts) or keys[-1] < self._parts[at][below]
            if not (is_free and all(map(lt, keys, keys[1:]))):
                return False
            self.insert(at, below, keys, packed)
        return True

    def __delitem__(self, key: bytes) -> None:
        self.pop_run([key])

    def pop_run(self, keys: list[bytes]) -> list[Row]:
        """Remove keys that are in order; returns their rows. Raises KeyError if one is not there;
        some of the others are removed then."""
        size = self._row.size
        popped: list[Row] = []
        done = 0
        while done < len(keys):
            at, begin, is_there = self.find(keys[done])
            if not is_there:
                raise KeyError(keys[done])
            part, block = self._parts[at], self.blocks[at]
            run = keys[done : bisect_right(keys, self._lasts[at], done)]
            done += len(run)
            stop = begin + len(run)
            if part[begin:stop] == run:
                popped += self._row.iter_unpack(block[begin * size : stop * size])
                del part[begin:stop], block[begin * size : stop * size]
            else:
                places = [bisect_left(part, key, begin) for key in run]
                if [part[place] for place in places] != run:
                    raise KeyError("one of the keys is not there")
                popped += [self._row.unpack_from(block, place * size) for place in places]
                for place in reversed(places):
                    del part[place], block[place * size : place * size + size]
            for key in run if self.known else ():
                self.known.pop(key, None)
            self._tidy(at)
        return popped

    def _tidy(self, at: int) -> None:
        """Restore the invariants after keys of a part were removed."""
        self._ranks = None
        part = self._parts[at]
        if not part:
            del self._parts[at], self.blocks[at], self._lasts[at]
        else:
            self._lasts[at] = part[-1]
        if len(part) < MAX_PART // 8:
            # Small neighbours join, so that there are never many of them.
            for first in range(max(at - 1, 0), min(at + 1, len(self._parts) - 1)):
                here = slice(first, first + 2)
                if sum(map(len, self._parts[here])) <= MAX_PART // 2:
                    keys = list(chain.from_iterable(self._parts[here]))
                    self._replace(here, keys, b"".join(self.blocks[here]))
                    break

    def _replace(self, here: slice, keys: list[bytes], packed: bytes | bytearray) -> None:
        """Replace parts by one with these keys, or by several of about `MAX_PART` / 2 keys."""
        self._ranks = None
        count = len(keys)
        step = count if count <= MAX_PART else -(-count // (2 * count // MAX_PART))
        size = step * self._row.size
        parts = [keys[at : at + step] for at in range(0, count, step)]
        self._parts[here] = parts
        self._lasts[here] = [part[-1] for part in parts]
        cuts = range(0, len(packed), size)
        self.blocks[here] = [bytearray(packed[at : at + size]) for at in cuts]
        if len(self._parts) > SMALL_PARTS:
            self.known.clear()
