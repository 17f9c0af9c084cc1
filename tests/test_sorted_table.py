"""The sorted map against a dict."""

from __future__ import annotations

import operator
import random
import sys
from itertools import pairwise
from struct import Struct
from typing import Any

import pytest

from etcdlite.storage import sorted_table
from etcdlite.storage.past import PAST_BYTES, Past
from etcdlite.storage.sorted_table import SortedTable
from etcdlite.storage.steps import discard

ROW = Struct("<HI")

Row = tuple[int, int]


@pytest.fixture(params=[4, 16, 64])
def small_parts(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_table, "MAX_PART", request.param)
    monkeypatch.setattr(sorted_table, "SMALL_PARTS", 16)


def some_key(rng: random.Random) -> bytes:
    length = rng.choice((0, 1, 2, 3, 3, 3, 40, 500))
    return bytes(rng.choice(b"\0\0\1a\xff") for _ in range(length))


def some_row(rng: random.Random) -> Row:
    return rng.randrange(1 << 16), rng.randrange(1 << 32)


def check(table: SortedTable, model: dict[bytes, Row], rng: random.Random) -> None:
    keys = sorted(model)
    assert list(table.items()) == [(key, model[key]) for key in keys]
    assert len(table) == len(model) and bool(table) == bool(model)
    start, end = some_key(rng), rng.choice((None, some_key(rng)))
    within = [key for key in keys if start <= key and (end is None or key < end)]
    limit = rng.choice((0, 1, 2, 7, 1000, 1 << 62))
    assert table.first(start, end, limit) == within[:limit]
    assert table.first(start, end, limit, descends=True) == within[::-1][:limit]
    assert list(table.rows(start, end)) == [model[key] for key in within]
    assert table.count(start, end) == len(within)
    assert table.get(start) == model.get(start) and (start in table) == (start in model)
    is_small = len(table.blocks) <= sorted_table.SMALL_PARTS
    assert table.known.keys() <= (model.keys() if is_small else set())


@pytest.mark.usefixtures("small_parts")
def test_random_changes_agree_with_a_dict() -> None:
    rng = random.Random(7)
    for _ in range(12):
        table, model = SortedTable(ROW), dict[bytes, Row]()
        for _ in range(150):
            change = rng.randrange(5)
            if change == 0:
                key = some_key(rng)
                table[key] = model[key] = some_row(rng)
            elif change == 1 and model:
                key = rng.choice(list(model))
                assert table.pop(key) == model.pop(key)
            elif change == 2:
                keys = list({some_key(rng) for _ in range(rng.choice((0, 1, 5, 90)))})
                if rng.random() < 0.8:
                    keys.sort()
                if rng.random() < 0.5:
                    keys = [max(model, default=b"") + key for key in keys if key]  # Behind all.
                new = {key: some_row(rng) for key in keys}
                among = [key for key in model if key >= keys[0] and key <= keys[-1]] if keys else []
                packed = b"".join(ROW.pack(*row) for row in new.values())
                is_run = keys == sorted(keys) and not among
                assert table.add_run(keys, packed) == is_run
                model.update(new if is_run else {})
            elif change == 3 and model:
                begin = rng.randrange(len(model))
                run = sorted(model)[begin : begin + rng.choice((1, 5, 90))][:: rng.choice((1, 3))]
                assert table.pop_run(run) == list(map(model.pop, run))
            check(table, model, rng)


@pytest.mark.usefixtures("small_parts")
def test_a_key_that_is_not_there_cannot_be_removed() -> None:
    table = SortedTable(ROW)
    with pytest.raises(KeyError):
        table.pop_run([b"a"])
    table.add_run([b"a", b"c", b"cc"], bytes(3 * ROW.size))
    for missing in ([b"b"], [b"a", b"b"], [b"c", b"d"]):
        with pytest.raises(KeyError):
            table.pop_run(missing)
    assert b"cc" in table and 7 not in table


def test_a_change_of_one_key_moves_no_other_part_and_makes_no_new_one() -> None:
    table = SortedTable(ROW)
    table.add_run([b"%08d" % number for number in range(5000)], bytes(5000 * ROW.size))
    blocks = list(table.blocks)
    for number in range(0, 5000, 100):
        table.pop_run([b"%08d" % number])
        assert table.add_run([b"%08d" % number], bytes(ROW.size))
    assert all(map(operator.is_, table.blocks, blocks))


def test_a_key_is_found_without_a_search_until_keys_before_it_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = SortedTable(ROW)
    keys = [b"%08d" % number for number in range(5000)]
    table.add_run(keys, b"".join(ROW.pack(7, number) for number in range(5000)))
    assert [table[key] for key in keys] == [(7, number) for number in range(5000)]
    del table[keys[0]]
    monkeypatch.delattr(sorted_table, "bisect_left")
    table[keys[4999]] = (8, 4999)
    assert [table[key] for key in keys[2500:]] == [(7, number) for number in range(2500, 4999)] + [
        (8, 4999)
    ]
    with pytest.raises(NameError):
        table.get(keys[1])


def test_counting_in_few_parts_after_a_change_visits_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = SortedTable(ROW)
    table.add_run([b"%08d" % number for number in range(50_000)], bytes(50_000 * ROW.size))
    table[b"new"] = (1, 2)
    monkeypatch.delattr(SortedTable, "_part_ranks")
    assert table.count(b"%08d" % 20_000, b"%08d" % 23_000) == 3000
    assert table.count(b"%08d" % 49_000, None) == 1001
    assert table.count(b"z", b"a") == table.count(b"%08d" % 23_000, b"%08d" % 20_000) == 0


def test_a_table_is_freed_in_steps() -> None:
    table, past = SortedTable(ROW), Past()
    for number in range(3000):
        table[b"%08d" % number] = (1, 2)
        past[b"%08d" % number] = bytes([1]) * PAST_BYTES * (1 + number % 4)
    lists = table.lists() + past.lists()
    left = [sum(map(len, lists))]
    for _ in discard(lists):
        left.append(sum(map(len, lists)))
    assert left[0] > 7500 and left[-1] == 0 and not table.blocks and not past.blocks
    assert max(before - after for before, after in pairwise(left)) <= 1000


def test_the_map_of_long_pasts_does_not_keep_the_memory_of_its_largest_size() -> None:
    past = Past()
    keys = [b"%08d" % number for number in range(50_000)]
    for key in keys:
        past[key] = bytes([1]) * PAST_BYTES * 3
    most = max(map(sys.getsizeof, past.lists()))
    for begin in range(0, 50_000, 100):
        past.pop_run(keys[begin : begin + 99])
    assert len(past) == 500 and max(map(sys.getsizeof, past.lists())) < most / 10


def test_parts_stay_few_and_large() -> None:
    rng = random.Random(3)
    keys = [b"%08d" % number for number in range(20_000)]
    for order in (keys, keys[::-1], rng.sample(keys, len(keys))):
        table = SortedTable(ROW)
        for key in order:
            table[key] = (1, 2)
        least = 20_000 // sorted_table.MAX_PART
        assert least <= len(table.blocks) <= 2.2 * least
        gone = [key for key in order if int(key) % 200]
        for key in gone:
            del table[key]
        assert len(table) == 100 and len(table.blocks) <= 2


def test_small_parts_join_when_what_was_between_them_goes() -> None:
    table = SortedTable(ROW)
    table.add_run([b"%08d" % number for number in range(78 * 257)], bytes(78 * 257 * ROW.size))
    parts = [list(part) for part in table.lists()[: len(table.blocks)]]
    for part in parts[::2]:
        table.pop_run(part[1:])
    assert len(table.blocks) == len(parts)
    for part in parts[1::2]:
        table.pop_run(part)
    assert list(table) == [part[0] for part in parts[::2]] and len(table.blocks) == 1
