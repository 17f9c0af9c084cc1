"""Background work beside clients that never pause."""

from __future__ import annotations

from types import SimpleNamespace as Stub
from typing import Any

import pytest

from etcdlite.replica.background import SLICE_S, Background

STEP_S = 0.0001


def slices_s(turn_s: float, seconds: float, has_input: Any) -> list[float]:
    """How long background work takes after each turn, if turns serve clients for `turn_s`."""
    now = 0.0
    took: list[float] = []

    def run(is_over: Any) -> None:
        nonlocal now
        while True:
            now += STEP_S
            if is_over():
                return

    maintenance = Stub(has_work=True, run=run)
    reads, metrics = Stub(background=[]), Stub(proposals_pending=20)
    leases: Any = Stub(has_work=False)
    background = Background(reads, maintenance, leases, metrics, lambda: now)  # type: ignore[arg-type]
    while now < seconds:
        now += turn_s
        background.asked_at = began = now
        background.run(False, has_input)
        took.append(now - began)
    return took


@pytest.mark.parametrize("turn_s", [0.001, 0.002, 0.004, 0.008])
def test_input_that_never_ends_does_not_keep_work_from_its_share(turn_s: float) -> None:
    share = sum(slices_s(turn_s, 2.0, lambda: True)) / 2.0
    assert share > 0.7 * min(0.25, SLICE_S / turn_s)


def test_few_of_the_requests_of_one_client_wait_for_background_work() -> None:
    took = slices_s(0.0003, 2.0, lambda: True)
    waits = [each for each in took if each > 0.0]
    assert len(waits) < len(took) / 10
    assert max(waits) < SLICE_S + 2 * STEP_S
