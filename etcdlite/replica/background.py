"""When a member does its background work, and how much at once.

There are two kinds, which take turns: maintenance, and reads that nobody waits for (hashes). Work
for many leases comes first. All work is done in steps of about 0.1 ms; a slice has many steps.

While clients are active, slices take about a quarter of the time, and each runs to its end. Then
few requests wait for a whole slice; if input ended slices early, most requests would wait for a
short one. While no client is active, a slice ends early when input arrives, and the next one runs
to its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from etcdlite.metrics import Metrics
from etcdlite.replica.leases import LeaseKeeper
from etcdlite.replica.maintenance import Maintenance
from etcdlite.replica.reads import Reads

SLICE_S = 0.002
"""The length of a slice."""

SHORT_SLICE_S = 0.0005
"""While clients are active, the length of a slice of work that makes no pauses."""

REST = 3.0
"""While clients are active, a slice is followed by a pause of this many times its duration."""

BUSY_S = 0.01
"""Clients count as active for this long after a request."""

FEW_WRITES = 64
"""With more proposals pending than this, slices run to their end, without pauses."""

SAVING_PAUSE_S = 0.002
"""Background work waits at most this long for a write that is being saved: the log thread needs the
interpreter a few times, and a busy loop would delay it each time."""


class Background:
    def __init__(
        self,
        reads: Reads,
        maintenance: Maintenance,
        leases: LeaseKeeper,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.asked_at = -math.inf
        """When the last request arrived."""
        self._reads = reads
        self._maintenance = maintenance
        self._leases = leases
        self._metrics = metrics
        self._clock = clock
        self._ended_at = -math.inf
        self._took_s = 0.0
        """The end and the duration of the last slice."""
        self._was_cut = False
        """The last slice ended early."""
        self._was_for_reads = True

    @property
    def has_work(self) -> bool:
        return self._maintenance.has_work or bool(self._reads.background) or self._leases.has_work

    @property
    def slice_s(self) -> float:
        """The length of a slice of work that makes no pauses, such as sending a backup."""
        return SHORT_SLICE_S if self._clients_are_active(self._clock()) else SLICE_S

    def next_at(self, is_saving: bool) -> float:
        """When the next slice begins; `is_saving` as for `run`."""
        if not self.has_work:
            return math.inf
        now = self._clock()
        if is_saving:
            return now + SAVING_PAUSE_S
        is_active = self._clients_are_active(now)
        return min(self._rest_ends_at, self.asked_at + BUSY_S) if is_active else now

    @property
    def _rest_ends_at(self) -> float:
        return self._ended_at + REST * self._took_s

    def _clients_are_active(self, now: float) -> bool:
        return now - self.asked_at < BUSY_S and self._metrics.proposals_pending <= FEW_WRITES

    def run(self, is_saving: bool, has_input: Callable[[], bool]) -> None:
        """Do a slice of the work that there is, if it is time. `is_saving`: own writes are being
        saved, and nothing else is left to do. `has_input`: clients or members have sent something.
        """
        clock = self._clock
        began = clock()
        if is_saving and began - self._ended_at < SAVING_PAUSE_S:
            return
        is_active = self._clients_are_active(began)
        if is_active and began < self._rest_ends_at:
            return
        gives_way = not (is_active or self._was_cut or self._metrics.proposals_pending > FEW_WRITES)
        ends_at = began + SLICE_S

        def is_over() -> bool:
            return clock() > ends_at or (gives_way and has_input())

        reads = self._reads
        self._was_for_reads = bool(reads.background) and not (
            self._was_for_reads and self._maintenance.has_work
        )
        run = reads.run_background if self._was_for_reads else self._maintenance.run
        if self._leases.has_work:
            run = self._leases.run
        run(is_over)
        self._ended_at = clock()
        self._took_s = self._ended_at - began
        self._was_cut = self.has_work and self._ended_at <= ends_at
