"""Background work beside clients that never pause."""

from __future__ import annotations

from types import SimpleNamespace as Stub
from typing import Any

import pytest

from etcdlite.replica.background import SHORT_SLICE_S, Background

STEP_S = 0.0001


def worked_s(turn_s: float, seconds: float, has_input: Any) -> float:
    """The time that background work gets, if each turn serves clients for `turn_s`."""
    now = worked = 0.0

    def run(is_over: Any) -> None:
        nonlocal now, worked
        while True:
            now += STEP_S
            worked += STEP_S
            if is_over():
                return

    maintenance = Stub(has_work=True, run=run)
    reads, metrics = Stub(background=[]), Stub(proposals_pending=20)
    background = Background(reads, maintenance, metrics, lambda: now)  # type: ignore[arg-type]
    while now < seconds:
        now += turn_s
        background.asked_at = now
        background.run(False, has_input)
    return worked


@pytest.mark.parametrize("turn_s", [0.001, 0.002, 0.004, 0.008])
def test_input_that_never_ends_does_not_keep_work_from_its_share(turn_s: float) -> None:
    share = worked_s(turn_s, 2.0, lambda: True) / 2.0
    assert share > 0.7 * min(0.25, SHORT_SLICE_S / turn_s)


def test_input_ends_most_slices_of_short_turns() -> None:
    assert worked_s(0.0005, 2.0, lambda: True) < worked_s(0.0005, 2.0, lambda: False)
