"""The set of keys in order, against a plain sorted list."""

from __future__ import annotations

import random
from typing import Any

import pytest

from etcdlite.storage import sorted_keys
from etcdlite.storage.sorted_keys import SortedKeys


@pytest.fixture(params=[4, 16, 64])
def small_parts(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_keys, "MAX_PART", request.param)


def check(keys: SortedKeys, model: list[bytes], rng: random.Random) -> None:
    assert list(keys) == model
    assert len(keys) == len(model)
    start = b"%03d" % rng.randrange(420)
    end = rng.choice((None, b"%03d" % rng.randrange(420), start + b"\0"))
    within = [key for key in model if start <= key and (end is None or key < end)]
    limit = rng.choice((0, 1, 2, 7, 1000, 1 << 62))
    assert keys.first(start, end, limit) == within[:limit]
    assert keys.last(start, end, limit) == within[::-1][:limit]
    assert keys.rank(start) == sum(key < start for key in model)


@pytest.mark.usefixtures("small_parts")
def test_random_changes_agree_with_a_sorted_list() -> None:
    rng = random.Random(7)
    names = [b"%03d" % number for number in range(400)]
    for _ in range(15):
        model = sorted(rng.sample(names, rng.choice((0, 1, 30, 300))))
        keys = SortedKeys(rng.sample(model, len(model)))
        for _ in range(120):
            absent = sorted(set(names) - set(model))
            change = rng.randrange(4)
            if change == 0 and absent:
                keys.add(key := rng.choice(absent))
                model = sorted([*model, key])
            elif change == 1 and model:
                keys.remove(key := rng.choice(model))
                model.remove(key)
            elif change == 2:
                begin = rng.randrange(400)
                run = [key for key in absent if key >= names[begin]][: rng.choice((0, 1, 5, 90))]
                run = run[:: rng.choice((1, 1, 3))]
                keys.add_run(run)
                model = sorted([*model, *run])
            elif change == 3 and model:
                begin = rng.randrange(len(model))
                run = model[begin : begin + rng.choice((1, 5, 90))][:: rng.choice((1, 1, 3))]
                keys.remove_run(run)
                model = [key for key in model if key not in run]
            check(keys, model, rng)


def test_a_key_that_is_not_there_cannot_be_removed() -> None:
    keys = SortedKeys([b"a", b"c"])
    for missing in ([b"b"], [b"a", b"b"]):
        with pytest.raises(AssertionError):
            keys.remove_run(list(missing))
