"""What the leader does so that the cluster version fits the programs of the members.

It proposes a `ClusterVersion`

- to raise the version, once all other members, learners too, are connected and run programs that
  understand a newer one. The version of a program is in the first frame that it sends.
- to lower it, once a downgrade is enabled. From the moment of enabling nothing newer than the
  target is written; so all that follows the entry that lowers the version can be read by it.
- to end a downgrade, once all members run the target's program.

Such an entry is itself newer than the oldest version. It is only proposed while all members are
connected and understand it, and never again when it is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from etcdlite import proto
from etcdlite.methods import SET_CLUSTER_VERSION
from etcdlite.options import Options
from etcdlite.raft import LEADER, Raft
from etcdlite.replica.state import State
from etcdlite.replica.writes import Writes
from etcdlite.versions import SETS_VERSION, Version

LOOK_S = 0.5
"""How often the leader compares the members' versions."""

RETRY_S = 3.0
"""A proposal that has no effect after this time got lost."""


class VersionKeeper:
    """What the leader does so that the cluster version fits the members' programs."""

    def __init__(
        self,
        state: State,
        raft: Raft,
        writes: Writes,
        versions: Callable[[], list[Version | None]],
        options: Options,
    ) -> None:
        """`versions` gives the versions of the programs of all other members, None for one that is
        not connected."""
        self._state = state.cluster_version
        self._raft = raft
        self._writes = writes
        self._versions = versions
        self._own = options.version
        self._looked_at = -math.inf
        self._proposed_at = -math.inf

    def tick(self, now: float) -> None:
        """Propose another version, if there should be one. `now` is in seconds."""
        if self._raft.role != LEADER or now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        change = self._due()
        if change is not None and now - self._proposed_at >= RETRY_S:
            self._proposed_at = now
            self._writes.propose_once([(SET_CLUSTER_VERSION, change)])

    @property
    def lowest(self) -> Version | None:
        """The lowest version of the members' programs; None if one is not connected."""
        lowest = self._own
        for version in self._versions():
            if version is None:
                return None
            lowest = min(lowest, version)
        return lowest

    def _due(self) -> proto.ClusterVersion | None:
        state, lowest = self._state, self.lowest
        if lowest is None or lowest < SETS_VERSION.since:
            return None
        target = state.target
        if target is not None:
            if target < state.version:
                return state.change(target, target)
            if lowest == target and all(v == target for v in (self._own, *self._versions())):
                return state.change(state.version, None)
            return None
        return state.change(lowest, None) if lowest > state.version else None
