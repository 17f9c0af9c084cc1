"""Counts beside a delete in steps, against a plain list."""

from __future__ import annotations

import random
from struct import Struct

from etcdlite.storage.removal import Removal
from etcdlite.storage.sorted_table import SortedTable


def table(keys: list[bytes]) -> SortedTable:
    made = SortedTable(Struct("B"))
    made.add_run(keys, b"v" * len(keys))
    return made


def test_counts_and_the_ranges_left_to_count_make_up_the_keys_before() -> None:
    rng = random.Random(3)
    names = [b"%02d" % number for number in range(60)]
    asked = left_over = 0
    for _ in range(400):
        before = sorted(rng.sample(names, rng.randint(4, 60)))
        keys = table(before)
        removal = Removal(keys)
        # A range delete takes neighbours; the keys of a lease have others between them.
        gone = before[:: rng.choice((1, 1, 3))]
        first = rng.randrange(len(gone))
        gone = gone[first : first + rng.randint(1, 40)]
        while gone:
            batch, gone = gone[: (size := rng.choice((1, 2, 5)))], gone[size:]
            removal.add(batch)
            keys.pop_run(batch)
            for _ in range(6):
                start = rng.choice(names) + rng.choice((b"", b"\0"))
                end = rng.choice((None, rng.choice(names) + rng.choice((b"", b"\0"))))
                within = [k for k in before if start <= k and (end is None or k < end)]
                counted = removal.count(start, end)
                assert counted is not None
                count, spans = counted
                for low, high in spans:
                    assert high is not None
                    size = sum(low <= key < high for key in before)
                    assert size <= len(within)
                    count += size
                    left_over += size
                assert count == len(within), (before, list(keys), start, end)
                asked += len(within)
    assert left_over < asked / 3, "too many keys are left to count"


def test_a_change_that_also_adds_keys_is_not_counted() -> None:
    keys = table([b"a", b"b", b"c"])
    removal = Removal(keys)
    removal.add([b"b"])
    keys.pop_run([b"b"])
    assert removal.count(b"a", None) == (3, [])
    keys[b"new"] = (7,)
    assert removal.count(b"a", None) is None


def test_batches_out_of_order_are_not_counted() -> None:
    keys = table([b"a", b"b", b"c"])
    removal = Removal(keys)
    for batch in ([b"b"], [b"a"]):
        removal.add(batch)
        keys.pop_run(batch)
    assert removal.count(b"a", None) is None
