"""Intervals of keys, and which of them hold a given key.

The tree is a treap: a binary search tree by start of the interval, and a heap by random priority,
so its expected depth is logarithmic whatever the order of insertions. Each node knows the largest
end below it (`reach`), so a search skips the subtrees that end before the key (Cormen et al.,
"Introduction to Algorithms", interval trees).

Intervals are [start, end). The end b"" means that there is no upper bound.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Generic, TypeVar

V = TypeVar("V")


class Interval(Generic[V]):
    """A node of the tree: an interval and its value."""

    __slots__ = ("start", "end", "value", "order", "priority", "left", "right", "reach")

    def __init__(
        self, start: bytes, end: bytes, value: V, order: tuple[bytes, int], priority: float
    ) -> None:
        self.start = start
        self.end = end
        self.value = value
        self.order = order
        self.priority = priority
        self.left: Interval[V] | None = None
        self.right: Interval[V] | None = None
        self.reach = end


class Intervals(Generic[V]):
    """A map from intervals to values that also finds the intervals that hold a key."""

    __slots__ = ("root", "_nodes", "_rng", "_number")

    def __init__(self, rng: random.Random) -> None:
        """Whoever chooses the intervals must not be able to predict `rng`: that would allow a tree
        as deep as a list."""
        self.root: Interval[V] | None = None
        self._nodes: dict[tuple[bytes, bytes], Interval[V]] = {}
        self._rng = rng
        self._number = 0

    def get(self, start: bytes, end: bytes) -> V | None:
        node = self._nodes.get((start, end))
        return None if node is None else node.value

    def add(self, start: bytes, end: bytes, value: V) -> None:
        """Add an interval that is not in the map."""
        self._number += 1
        node = Interval(start, end, value, (start, self._number), self._rng.random())
        self._nodes[start, end] = node
        self.root = _insert(self.root, node)

    def remove(self, start: bytes, end: bytes) -> None:
        """Remove an interval that is in the map."""
        self.root = _delete(self.root, self._nodes.pop((start, end)))

    def values(self) -> Iterator[V]:
        """The values in the order in which they were added."""
        return (node.value for node in self._nodes.values())

    def holding(self, key: bytes) -> list[V]:
        """The values of the intervals that hold `key`, by start: O(log n + found)."""
        found: list[V] = []
        above: list[Interval[V]] = []
        node = self.root
        while True:
            while node is not None and (not node.reach or node.reach > key):
                above.append(node)
                node = node.left
            if not above:
                return found
            node = above.pop()
            if node.start <= key:
                if not node.end or node.end > key:
                    found.append(node.value)
                node = node.right
            else:
                node = None


# Expected depth is logarithmic, so recursion is safe for any number of intervals.


def _refresh(node: Interval[V]) -> Interval[V]:
    reach = node.end
    for child in (node.left, node.right):
        if reach and child is not None and (not child.reach or child.reach > reach):
            reach = child.reach
    node.reach = reach
    return node


def _insert(root: Interval[V] | None, node: Interval[V]) -> Interval[V]:
    if root is None:
        return node
    if node.priority > root.priority:
        node.left, node.right = _split(root, node)
        return _refresh(node)
    if node.order < root.order:
        root.left = _insert(root.left, node)
    else:
        root.right = _insert(root.right, node)
    return _refresh(root)


def _split(
    root: Interval[V] | None, at: Interval[V]
) -> tuple[Interval[V] | None, Interval[V] | None]:
    if root is None:
        return None, None
    if root.order < at.order:
        root.right, above = _split(root.right, at)
        return _refresh(root), above
    below, root.left = _split(root.left, at)
    return below, _refresh(root)


def _delete(root: Interval[V] | None, node: Interval[V]) -> Interval[V] | None:
    assert root is not None
    if root is node:
        return _join(root.left, root.right)
    if node.order < root.order:
        root.left = _delete(root.left, node)
    else:
        root.right = _delete(root.right, node)
    return _refresh(root)


def _join(below: Interval[V] | None, above: Interval[V] | None) -> Interval[V] | None:
    if below is None or above is None:
        return below or above
    if below.priority > above.priority:
        below.right = _join(below.right, above)
        return _refresh(below)
    above.left = _join(below, above.left)
    return _refresh(above)
