"""--force-new-cluster: one member of a cluster that lost its quorum becomes a cluster of its own.

The member starts without voters, whatever the membership in its store says. If it hears no leader
for some time (`rollback.py`), it becomes the only voter. Membership changes that its log already
holds have no effect. It then removes all other members one by one through the log. The work is done
when a checkpoint of the store holds the result, so that a later start without the flag finds a
cluster of one.

The others hear from it that they were removed. If it was a mistake, and their quorum is alive, they
must go on (`Removal`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from etcdlite import log, proto
from etcdlite.methods import MEMBER_CHANGE
from etcdlite.options import Options
from etcdlite.raft import ADD_VOTER, LEADER, ConfChange, Raft
from etcdlite.replica import membership
from etcdlite.replica.maintenance import Maintenance
from etcdlite.replica.rollback import LEADER_TIMEOUTS
from etcdlite.replica.state import State
from etcdlite.replica.writes import Writes
from etcdlite.request import Waiter


class ForcedCluster:
    """The work of --force-new-cluster. Without the flag it is done from the start."""

    def __init__(
        self, state: State, raft: Raft, writes: Writes, maintenance: Maintenance, options: Options
    ) -> None:
        self._state = state
        self._raft = raft
        self._writes = writes
        self._maintenance = maintenance
        self.is_done = not options.force_new_cluster
        self.ignored_index = 0 if self.is_done else raft.log.last
        """Membership changes up to this entry have no effect."""
        self._batch = 0
        """The number of the latest batch that was proposed."""
        self._durable_index = math.inf
        """A checkpoint must cover this index."""

    def tick(self) -> None:
        """Become the only voter; then propose the next step when the one before is applied."""
        raft, state = self._raft, self._state
        own_id = state.identity.member_id
        if not self.is_done and not raft.voters:
            raft.apply_conf_change(ConfChange(ADD_VOTER, own_id))
            raft.campaign()
        if self.is_done or raft.role != LEADER or raft.log.applied < self.ignored_index:
            return
        if self._writes.is_waiting(self._batch):
            return
        own = state.membership.members.get(own_id)
        others = [node for node in state.membership.members if node != own_id]
        if own is not None and own.isLearner:
            self._propose(membership.PROMOTE, own_id)
        elif others:
            self._propose(membership.REMOVE, others[0])
        elif self._durable_index == math.inf:
            self._durable_index = state.store.applied_index
        elif self._maintenance.checkpoint_index < self._durable_index:
            # Before the checkpoint only the log has the result, after changes that are ignored.
            self._maintenance.wants_checkpoint = True
        else:
            self.is_done = True
            log.warn(
                "this member is a cluster of its own now; start it without --force-new-cluster "
                "from now on",
                local_member_id=f"{own_id:x}",
            )

    def _propose(self, action: int, node: int) -> None:
        change = proto.MemberChange(action=action, member=proto.Member(ID=node))
        self._writes.propose_change(Waiter(None, 0, MEMBER_CHANGE, change))
        self._batch = self._writes.latest_batch


class Removal:
    """Whether this member was removed from the cluster: it has applied that, or others say so.

    A quorum of the others is right. Fewer may be right, too: the rest may be down, or removed."""

    def __init__(
        self, state: State, raft: Raft, is_open: Callable[[int], bool], options: Options
    ) -> None:
        """`is_open` tells whether another member takes messages of this one."""
        self._state = state
        self._raft = raft
        self._is_open = is_open
        self._patience_s = LEADER_TIMEOUTS * options.election_timeout_s
        self._patience_ticks = LEADER_TIMEOUTS * raft.config.election_ticks
        self.since: float | None = None
        """When this member learned it; its owner must stop it then. It may be in the future."""
        self._claims: dict[int, int] = {}
        """Who says so, and for how many ticks in a row a leader was heard since. A leader without a
        quorum steps down before `_patience_ticks`: after these, a second cluster said so."""

    def claimed(self, node: int) -> None:
        """Another member says that this one was removed."""
        voters, now = self._raft.voters, self._state.clock()
        self._claims.setdefault(node, 0)
        believed = {one for one, ticks in self._claims.items() if ticks < self._patience_ticks}
        if 2 * len(voters - believed) <= len(voters):
            self.since = min(self.since or math.inf, now)
        elif node not in believed or self._raft.has_live_leader:
            what = "a member says that this one was removed; this one had a leader and goes on"
            log.warn(what, f"removed by {node:x}", 0.1, remote_peer_id=f"{node:x}")
        elif self.since is None:
            self.since = now + self._patience_s

    def tick(self) -> None:
        """While a leader is heard, or a quorum takes this member's messages, so that there will be
        one, it goes on, unless it has applied its removal."""
        own_id, members = self._state.identity.member_id, self._state.membership.members
        has_leader = self._raft.has_live_leader and own_id in members
        voters = self._raft.voters
        taking = sum(node == own_id or self._is_open(node) for node in voters)
        if has_leader or (own_id in members and 2 * taking > len(voters)):
            self.since = None
        for node, ticks in self._claims.items():
            if ticks < self._patience_ticks:
                self._claims[node] = has_leader * (ticks + 1)
