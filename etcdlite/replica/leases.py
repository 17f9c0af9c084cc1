"""The leader's work for leases: it revokes expired ones, and at intervals it proposes checkpoints
of the remaining TTLs, so that a new leader does not give every lease its full TTL again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from etcdlite import proto
from etcdlite.methods import CHECKPOINT, LEASE_REVOKE
from etcdlite.replica.state import State
from etcdlite.replica.writes import Writes

ENTRIES_PER_TICK = 5
"""The most entries of revokes that one tick begins to propose."""

STEP_LEASES = 200
"""Leases in one entry of revokes (fewer if they have many keys), or of checkpoints. An entry is
proposed when the one before it is applied, so a write waits for one at most, about 6 ms."""


class LeaseKeeper:
    """The leader's work for leases."""

    def __init__(self, state: State, writes: Writes) -> None:
        self._state = state
        self._writes = writes
        self._checkpoint_interval_s = state.store.limits.lease_checkpoint_interval_s
        self._checkpointed_at = state.clock()
        self._steps: Iterator[None] | None = None
        """The work under way: setting deadlines, or proposing revokes or checkpoints."""
        self._proposed_index = 0
        """The index of the last entry that this member proposed as the present leader."""
        self._checkpoint_index = 0
        """The index of the last checkpoint that this member proposed."""

    def promote(self, now: float, extend_s: float) -> None:
        """This member leads now: start the timers of all leases, each with `extend_s` added."""
        self._checkpointed_at = now
        self._proposed_index = 0  # Another leader may have replaced that entry.
        self._begin(self._state.lessor.promote(now, extend_s))

    def _begin(self, steps: Iterator[None]) -> None:
        self._steps = steps
        self.run(lambda: True)  # One step is enough for few leases.

    @property
    def has_work(self) -> bool:
        """There are steps to do now."""
        return self._steps is not None and self._may_propose

    @property
    def _may_propose(self) -> bool:
        """The last entry that was proposed here is applied."""
        return self._state.store.applied_index >= self._proposed_index

    def run(self, is_over: Callable[[], bool]) -> None:
        """Do one step, if there is any, and more until `is_over`."""
        while self._steps is not None and self._may_propose:
            if next(self._steps, self) is self:
                self._steps = None
            if is_over():
                return

    def tick(self, now: float) -> None:
        """A heartbeat interval has passed: the leader revokes, and begins checkpoints."""
        if not self._state.lessor.promoted:
            self._state.lessor.trim()
        elif self._may_propose:
            revokes = self._revoke_steps(now)
            is_over = next(revokes, self) is self
            if self._steps is None and now - self._checkpointed_at >= self._checkpoint_interval_s:
                self._checkpointed_at = now
                self._begin(self._checkpoint_steps(now))
            elif self._steps is None and not is_over:
                self._steps = revokes

    def _revoke_steps(self, now: float) -> Generator[None, None, None]:
        lessor = self._state.lessor
        for _ in range(ENTRIES_PER_TICK):
            if expired := lessor.expired(now, STEP_LEASES):
                self._state.metrics.leases_expired += len(expired)
                self._proposed_index = self._writes.propose_once(
                    [(LEASE_REVOKE, proto.LeaseRevokeRequest(ID=lease_id)) for lease_id in expired]
                )
            if not lessor.has_due(now):
                return
            yield

    def _checkpoint_steps(self, now: float) -> Generator[None, None, None]:
        lessor, interval_s = self._state.lessor, self._checkpoint_interval_s
        ids = yield from lessor.lease_steps()
        for at in range(0, len(ids), STEP_LEASES):
            some = sorted(ids[at : at + STEP_LEASES])
            checkpoints = [
                proto.LeaseCheckpoint(ID=lease_id, remaining_TTL=remaining_s)
                for lease_id, remaining_s in lessor.checkpoints(some, now, interval_s)
            ]
            if checkpoints and lessor.promoted:
                request = proto.LeaseCheckpointRequest(checkpoints=checkpoints)
                self._proposed_index = self._writes.propose_once([(CHECKPOINT, request)])
                self._checkpoint_index = max(self._proposed_index, self._checkpoint_index)
            yield

    def is_checkpointed(self, lease_id: int) -> bool:
        """Whether the next leader would give the lease less than its full TTL, now or once a
        proposed checkpoint is applied. If so, the checkpoint must be reset before a renewal is
        answered."""
        lessor = self._state.lessor
        return lessor.is_checkpointed(lease_id) or (
            self._state.store.applied_index < self._checkpoint_index
            and lessor.exists(lease_id)
            and lessor.ttl_s(lease_id) > self._checkpoint_interval_s
        )
