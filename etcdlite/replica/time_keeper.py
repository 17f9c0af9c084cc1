"""What the leader does so that the times of revisions are known; see `timeline.py`."""

from __future__ import annotations

from collections.abc import Callable

from etcdlite import proto
from etcdlite.methods import TIME
from etcdlite.raft import LEADER, Raft
from etcdlite.replica.state import State
from etcdlite.replica.writes import Writes
from etcdlite.versions import KEEPS_TIMES

INTERVAL_S = 1.0
"""A revision is at least this old when its time is proposed."""


class TimeKeeper:
    """Proposes the time of revisions, on the leader."""

    def __init__(
        self, state: State, raft: Raft, writes: Writes, wall_clock: Callable[[], float]
    ) -> None:
        """`wall_clock` gives the Unix time in seconds."""
        self._state = state
        self._raft = raft
        self._writes = writes
        self._wall_clock = wall_clock
        self._since: float | None = None
        """When the leader saw a revision whose time is not known, or proposed one last."""

    def tick(self, now: float) -> None:
        """Propose the time, if it is due. `now`: monotonic seconds."""
        state = self._state
        revision = state.store.revision
        if self._raft.role != LEADER or revision <= max(1, state.timeline.last_revision):
            self._since = None
        elif self._since is None:
            self._since = now
        elif (
            now - self._since >= INTERVAL_S
            and state.cluster_version.allows(KEEPS_TIMES)
            # Otherwise an entry of an earlier term may lower the version.
            and state.store.applied_term == self._raft.term
        ):
            self._since = now
            self._writes.propose_once([(TIME, proto.Time(unix_s=int(self._wall_clock())))])
