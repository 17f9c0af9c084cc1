"""Distinct keys in order: the first or last ones of a range, and how many are below a key.

The keys stand in lists of at most `MAX_PART` keys. A change moves at most one list of references.
Runs of neighbours are added and removed as slices, so a large delete costs little per key.

Invariants: no part is empty; keys ascend within and between parts; `_lasts` has the last key of
each part.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain

MAX_PART = 2048
"""A part with more keys than this is split into two."""

MAX_SPREAD = 8
"""Keys of a part are removed together if the part has at most this many times as many keys from the
first to the last of them."""


class SortedKeys:
    """A set of keys. Adding a key that is there, or removing one that is not, is an error."""

    __slots__ = ("_lasts", "_parts", "_ranks")

    def __init__(self, keys: Iterable[bytes] = ()) -> None:
        ordered = sorted(keys)
        size = MAX_PART // 2
        self._parts = [ordered[at : at + size] for at in range(0, len(ordered), size)]
        self._lasts = [part[-1] for part in self._parts]
        self._ranks: list[int] | None = None
        """How many keys stand before each part, and how many there are; None after a change."""

    def __len__(self) -> int:
        return self._counted()[-1]

    def __iter__(self) -> Iterator[bytes]:
        """All keys. They must not change before the last one is taken."""
        return chain.from_iterable(self._parts)

    def _counted(self) -> list[int]:
        ranks = self._ranks
        if ranks is None:
            ranks = self._ranks = list(accumulate(map(len, self._parts), initial=0))
        return ranks

    # Changes.

    def add(self, key: bytes) -> None:
        lasts = self._lasts
        self._ranks = None
        at = bisect_left(lasts, key)
        if at < len(lasts):
            part = self._parts[at]
            insort(part, key)
        elif lasts:
            part = self._parts[at := at - 1]
            part.append(key)
            lasts[at] = key
        else:
            self._parts.append([key])
            lasts.append(key)
            return
        if len(part) > MAX_PART:
            self._split(at)

    def remove(self, key: bytes) -> None:
        at = bisect_left(self._lasts, key)
        part = self._parts[at]
        place = bisect_left(part, key)
        assert part[place] == key
        self._cut(at, place, place + 1)

    def add_run(self, keys: list[bytes]) -> None:
        """Add keys that are in order."""
        if not keys:
            return
        lasts = self._lasts
        at = bisect_left(lasts, keys[0])
        if lasts and at == len(lasts):
            at -= 1
        if len(keys) > MAX_PART // 2 or not lasts:
            for key in keys:
                self.add(key)
            return
        part = self._parts[at]
        place = bisect_left(part, keys[0])
        if place < len(part) and part[place] < keys[-1]:
            for key in keys:  # They do not stand side by side.
                self.add(key)
            return
        part[place:place] = keys
        lasts[at] = part[-1]
        self._ranks = None
        if len(part) > MAX_PART:
            self._split(at)

    def remove_run(self, keys: list[bytes]) -> None:
        """Remove keys that are in order."""
        begin = 0
        while begin < len(keys):
            at = bisect_left(self._lasts, keys[begin])
            part = self._parts[at]
            end = bisect_right(keys, part[-1], begin)
            place = bisect_left(part, keys[begin])
            stop = bisect_left(part, keys[end - 1], place) + 1
            if stop - place > MAX_SPREAD * (end - begin):
                end, stop = begin + 1, place + 1
            assert part[place] == keys[begin] and part[stop - 1] == keys[end - 1]
            others: list[bytes] = []
            if stop - place > end - begin:
                gone = set(keys[begin:end])
                others = [key for key in part[place:stop] if key not in gone]
            assert stop - place == end - begin + len(others)
            part[place : place + len(others)] = others
            self._cut(at, place + len(others), stop)
            begin = end

    def _cut(self, at: int, begin: int, end: int) -> None:
        part = self._parts[at]
        self._ranks = None
        del part[begin:end]
        if not part:
            del self._parts[at], self._lasts[at]
            return
        self._lasts[at] = part[-1]
        # A small part joins its neighbour, so that there are never many of them.
        if len(part) < MAX_PART // 8 and len(self._parts) > 1:
            first = at - 1 if at else 0
            if len(self._parts[first]) + len(self._parts[first + 1]) <= MAX_PART // 2:
                self._parts[first] += self._parts.pop(first + 1)
                self._lasts[first] = self._lasts.pop(first + 1)

    def _split(self, at: int) -> None:
        part = self._parts[at]
        half = len(part) // 2
        self._parts.insert(at + 1, part[half:])
        del part[half:]
        self._lasts.insert(at, part[-1])

    # Look-ups. The range is [start, end); end None: no upper bound.

    def rank(self, key: bytes) -> int:
        """How many keys are below `key`."""
        at = bisect_left(self._lasts, key)
        below = self._counted()[at]
        return below + bisect_left(self._parts[at], key) if at < len(self._lasts) else below

    def first(self, start: bytes, end: bytes | None, limit: int) -> list[bytes]:
        """The first keys of a range, ascending."""
        found: list[bytes] = []
        at = bisect_left(self._lasts, start)
        if at == len(self._lasts):
            return found
        place = bisect_left(self._parts[at], start)
        while at < len(self._lasts) and len(found) < limit:
            part = self._parts[at]
            if end is not None and self._lasts[at] >= end:
                stop = bisect_left(part, end)
                found += part[place : min(stop, place + limit - len(found))]
                break
            found += part[place : place + limit - len(found)]
            at += 1
            place = 0
        return found

    def last(self, start: bytes, end: bytes | None, limit: int) -> list[bytes]:
        """The last keys of a range, descending."""
        found: list[bytes] = []
        at = len(self._lasts) - 1 if end is None else bisect_left(self._lasts, end)
        if at >= len(self._lasts):
            at -= 1
        while at >= 0 and len(found) < limit:
            part = self._parts[at]
            stop = len(part) if end is None else bisect_left(part, end)
            begin = max(stop - (limit - len(found)), 0)
            if part[0] < start:
                begin = max(begin, bisect_left(part, start))
            found += part[begin:stop][::-1]
            if part[0] < start:
                break
            at -= 1
        return found
