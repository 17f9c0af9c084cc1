"""The interval tree against a scan of all intervals."""

from __future__ import annotations

import random
from typing import Any

from etcdlite.storage.intervals import Intervals


def test_the_interval_tree_finds_what_a_scan_finds() -> None:
    rng = random.Random(7)
    tree: Intervals[tuple[bytes, bytes]] = Intervals(rng)
    live: list[tuple[bytes, bytes]] = []

    def key() -> bytes:
        return bytes(rng.choices(b"abcd", k=rng.randint(1, 4)))

    for _ in range(2000):
        if live and rng.random() < 0.45:
            tree.remove(*live.pop(rng.randrange(len(live))))
        else:
            start, end = sorted((key(), key()))
            made = start, rng.choice((end + b"\0", b""))
            if made in live:
                assert tree.get(*made) == made
                continue
            assert tree.get(*made) is None
            tree.add(*made, made)
            live.append(made)
        point = key()
        found = tree.holding(point)
        assert [start for start, _ in found] == sorted(start for start, _ in found)
        expected = {(a, b) for a, b in live if a <= point and (not b or point < b)}
        assert set(found) == expected and len(found) == len(expected)
        assert set(tree.values()) == set(live)


def test_ten_thousand_intervals_make_a_shallow_tree() -> None:
    tree: Intervals[int] = Intervals(random.Random(7))
    for n in range(10_000):
        tree.add(b"%06d" % n, b"%06d" % (n + 1), n)

    def depth(node: Any) -> int:
        return 0 if node is None else 1 + max(depth(node.left), depth(node.right))

    assert depth(tree.root) < 60
    assert tree.holding(b"005000") == [5000]
