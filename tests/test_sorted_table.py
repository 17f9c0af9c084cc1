"""The sorted map against a dict."""

from __future__ import annotations

import random
from struct import Struct
from typing import Any

import pytest

from etcdlite.storage import sorted_table
from etcdlite.storage.sorted_table import SortedTable

ROW = Struct("<HI")

Row = tuple[int, int]


@pytest.fixture(params=[4, 16, 64])
def small_parts(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_table, "MAX_PART", request.param)


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
    assert table.rank(start) == sum(key < start for key in keys)
    assert table.get(start) == model.get(start) and (start in table) == (start in model)


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


def test_parts_stay_few_and_large() -> None:
    rng = random.Random(3)
    keys = [b"%08d" % number for number in range(20_000)]
    for order in (keys, keys[::-1], rng.sample(keys, len(keys))):
        table = SortedTable(ROW)
        for key in order:
            table[key] = (1, 2)
        least = 20_000 // sorted_table.MAX_PART
        assert least <= len(table.blocks) <= 2.2 * least
        for key in rng.sample(keys, 19_900):
            del table[key]
        assert len(table) == 100 and len(table.blocks) <= 2
