"""What a change in steps has removed so far: the number of keys by place.

Reads go on beside the change, as of the revision before it. A count of a large range then takes the
keys that are left, and these numbers; it looks at single keys only within the batches in which the
range begins and ends.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from etcdlite.storage.sorted_table import SortedTable

Span = tuple[bytes, "bytes | None"]


class Removal:
    """The keys that a change has removed in ascending batches."""

    def __init__(self, keys: SortedTable) -> None:
        """`keys`: the current ones, before the change."""
        self._keys = keys
        self._keys_before = len(keys)
        self._borders: list[bytes] = []
        """The first key, and what follows the last key of each batch."""
        self._counts: list[int] = []
        """How many keys below each border are removed."""
        self._is_ordered = True

    def add(self, batch: list[bytes]) -> None:
        """Count keys that are about to be removed; they are in order."""
        if not self._borders:
            self._borders.append(batch[0])
            self._counts.append(0)
        self._is_ordered &= batch[0] >= self._borders[-1]
        self._borders.append(batch[-1] + b"\0")
        self._counts.append(self._counts[-1] + len(batch))

    def count(self, start: bytes, end: bytes | None) -> tuple[int, list[Span]] | None:
        """How many keys of [start, end) there were before the change, except those in the ranges
        returned, which the caller must count. None if the change did more than remove keys in
        ascending order."""
        keys, borders, counts = self._keys, self._borders, self._counts
        if not borders or not self._is_ordered or self._keys_before - len(keys) != counts[-1]:
            return None
        spans: list[Span] = []
        at = bisect_left(borders, start)
        lower, removed = start, counts[min(at, len(counts) - 1)]
        if 0 < at < len(borders) and borders[at] != start:
            lower = borders[at]
            spans.append((start, lower))
        if end is None:
            return keys.count(lower, None) + counts[-1] - removed, spans
        at = max(bisect_right(borders, end) - 1, 0)
        upper = end
        if at < len(borders) - 1 and borders[0] < end != borders[at]:
            upper = borders[at]
            spans.append((upper, end))
        if lower >= upper:
            return 0, [(start, end)]
        return max(0, keys.count(lower, upper) + counts[at] - removed), spans
