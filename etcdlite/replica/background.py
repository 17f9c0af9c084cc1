"""When a member does its background work, and how much at once.

There are two kinds, which take turns: maintenance, and reads that nobody waits for (hashes). Both
are done in steps of about 0.1 ms, and a slice is a number of steps.

While clients are active, slices take about a quarter of the time at most. A slice ends early when
input arrives, but soon one is whole again: cleaning has to keep up with the garbage that clients
make. With many writes pending, each waits longer for the others than for a whole slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from etcdlite.metrics import Metrics
from etcdlite.replica.maintenance import Maintenance
from etcdlite.replica.reads import Reads

SLICE_S = 0.002
"""A slice, while no client waits for it."""

SHORT_SLICE_S = 0.0005
"""The longest slice while clients are active."""

REST = 3.0
"""While clients are active, a slice is followed by a pause of this many times its duration."""

GIVES_WAY_S = 0.002
"""Slices end early, because input arrives, for this long. Then one is whole."""

BUSY_S = 0.01
"""Clients count as active for this long after a request."""

FEW_WRITES = 64
"""With more proposals pending than this, slices are whole."""

MAX_SAVING_WAIT_S = 0.0025
"""Background work waits at most this long for a write that is being saved."""


class Background:
    """The slices of background work."""

    def __init__(
        self, reads: Reads, maintenance: Maintenance, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self.asked_at = -math.inf
        """When the last request arrived."""
        self._reads = reads
        self._maintenance = maintenance
        self._metrics = metrics
        self._clock = clock
        self._ended_at = -math.inf
        self._took_s = 0.0
        """The end and the duration of the last slice."""
        self._cut_since = math.inf
        """Since when slices end early: the end of the last whole one, or the beginning of the first
        one; infinite without work."""
        self._was_for_reads = True

    @property
    def has_work(self) -> bool:
        return self._maintenance.has_work or bool(self._reads.background)

    @property
    def slice_s(self) -> float:
        """How long a slice of work may take that does not rest, such as sending a backup."""
        return SHORT_SLICE_S if self._clients_are_active(self._clock()) else SLICE_S

    @property
    def rest_s(self) -> float:
        """How long until the next slice, if clients are active."""
        now = self._clock()
        if not self._clients_are_active(now):
            return 0.0
        return max(0.0, min(self._rest_ends_at, self.asked_at + BUSY_S) - now)

    @property
    def _rest_ends_at(self) -> float:
        return self._ended_at + REST * self._took_s

    def _clients_are_active(self, now: float) -> bool:
        return now - self.asked_at < BUSY_S and self._metrics.proposals_pending <= FEW_WRITES

    def run(self, is_saving: bool, has_input: Callable[[], bool]) -> None:
        """Do a slice, if there is work and it is time. `is_saving`: own writes are being saved, and
        nothing else is left to do. `has_input`: clients or members have sent something."""
        if not self.has_work:
            return
        clock = self._clock
        began = clock()
        if is_saving and began - self._ended_at < MAX_SAVING_WAIT_S:
            return
        if self._clients_are_active(began):
            if began < self._rest_ends_at:
                return
            # The pause before a slice is also at least `REST` times as long.
            slice_s = min(SHORT_SLICE_S, (began - self._ended_at) / REST)
        else:
            slice_s = SLICE_S
        pending = self._metrics.proposals_pending
        if pending > FEW_WRITES or began - self._cut_since >= GIVES_WAY_S:
            has_input = _never
        ends_at = began + slice_s

        def is_over() -> bool:
            return clock() > ends_at or has_input()

        reads = self._reads
        self._was_for_reads = bool(reads.background) and not (
            self._was_for_reads and self._maintenance.has_work
        )
        run = reads.run_background if self._was_for_reads else self._maintenance.run
        run(is_over)
        self._ended_at = clock()
        self._took_s = self._ended_at - began
        if not self.has_work:
            self._cut_since = math.inf
        elif self._ended_at > ends_at:
            self._cut_since = self._ended_at
        else:
            self._cut_since = min(self._cut_since, began)


def _never() -> bool:
    return False
