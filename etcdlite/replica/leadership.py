"""Who leads: what a member does when a leader comes, goes, dies, or is to be another one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from etcdlite import log
from etcdlite.errors import EtcdError, error
from etcdlite.identity import Identity
from etcdlite.options import Options
from etcdlite.raft import FOLLOWER, LEADER, Raft
from etcdlite.request import Session

NO_LEADER_S = 10.0
"""After this time without a leader the log says what is missing."""

NO_LEADER_PAUSE_S = 60.0
"""Pause before the warning is repeated."""

CAMPAIGN_STAGGER_S = 0.03
"""When the leader's process is known to be dead, the others campaign this far apart, so that they
do not split the votes."""

CAMPAIGN_RETRY_S = 0.1
MAX_CAMPAIGNS = 5
"""After this many attempts the election timeout decides."""


class Leadership:
    """The leader as this member knows it."""

    def __init__(
        self,
        raft: Raft,
        identity: Identity,
        clock: Callable[[], float],
        is_open: Callable[[int], bool],
        options: Options,
    ) -> None:
        """`is_open` tells whether messages can be sent to a member now."""
        self._raft = raft
        self._identity = identity
        self._clock = clock
        self._is_open = is_open
        self._request_timeout_s = options.request_timeout_s
        self._election_timeout_s = options.election_timeout_s
        self.changes = 0
        """How often another leader was elected."""
        self.campaign_at = math.inf
        """When `campaign_if_due` has something to do; on the member's clock."""
        self._known = 0
        self._lost = 0
        """The leader just lost; logged unless a new one is elected soon."""
        self._lost_at = -math.inf
        self._led_at = clock()
        """When there last was a leader."""
        self._told_at = -math.inf
        self._campaigns = 0
        self._handed_over_at = -math.inf
        self._transfers: list[tuple[float, int, Session, int, int]] = []
        """Pending transfers: (start time, target, session, request id, method)."""

    def changed(self, leader: int) -> None:
        """Consensus knows another leader now; 0 for none."""
        if leader:
            self.campaign_at = math.inf
            if leader != self._known:
                self.changes += 1
                log.info("elected leader", **self._ids(), leader=f"{leader:x}")
        elif self._known:
            self._lost_at = self._clock()
            self._lost = self._known
        self._known = leader
        self.answer_transfers()

    def timeout_error(self, since: float) -> EtcdError:
        """The error for a request that has waited since then, in etcd's words."""
        leader = self._raft.leader
        if since <= self._lost_at:
            return error("TimeoutDueToLeaderFail")
        if leader and leader != self._identity.member_id and not self._is_open(leader):
            return error("TimeoutDueToConnectionLost")
        return error("Timeout")

    # Without a leader.

    def look(self, now: float) -> None:
        """Tell the operator when there is no leader."""
        if self._raft.leader:
            self._led_at = now
            self._lost = 0
            return
        if self._lost:
            log.warn("lost leader", **self._ids(), leader=f"{self._lost:x}")
            self._lost = 0
        missing = self.missing_voters()
        if missing and now - max(self._led_at, self._told_at) > NO_LEADER_S:
            self._told_at = now + NO_LEADER_PAUSE_S
            log.error(
                f"there has been no leader for {now - self._led_at:.0f} s: {missing}. Writes and "
                "linearizable reads fail until there is one. Start the other members; if they are "
                "lost, see 'More than half is lost' in the documentation of clusters",
                **self._ids(),
            )

    def missing_voters(self) -> str:
        """Why there is no leader, in words, if voting members cannot be reached; else empty."""
        voters = self._raft.voters
        own_id = self._identity.member_id
        reached = sum(node == own_id or self._is_open(node) for node in voters)
        quorum = len(voters) // 2 + 1
        if reached >= quorum or not voters:
            return ""
        return (
            f"this member reaches {reached} of {len(voters)} voting members, itself included, and "
            f"{quorum} are needed"
        )

    def peer_died(self, node: int) -> None:
        """The process of that member is dead. If it was the leader there is no need to wait for
        the election timeout; the pre-vote still protects a leader that others hear from."""
        raft = self._raft
        if node != raft.leader or raft.role != FOLLOWER:
            return
        log.warn("the leader's process is gone", leader=f"{node:x}")
        raft.forget_leader()
        if self._identity.member_id in raft.voters:
            others = sorted(raft.voters - {node})
            self._campaigns = MAX_CAMPAIGNS
            place = others.index(self._identity.member_id)
            self.campaign_at = self._clock() + place * CAMPAIGN_STAGGER_S

    def campaign_if_due(self, now: float) -> None:
        """The leader is known to be dead: try to follow it."""
        if now < self.campaign_at:
            return
        self._campaigns -= 1
        self.campaign_at = now + CAMPAIGN_RETRY_S if self._campaigns else math.inf
        if not self._raft.leader:
            self._raft.campaign()

    # Another leader.

    def move(self, session: Session, request_id: int, method: int, node: int) -> None:
        """Have the voter `node` lead, and answer when it does; for the leader. Raises
        BadLeaderTransferee."""
        if node != self._identity.member_id:
            try:
                self._raft.transfer_leader(node)
            except ValueError:
                raise error("BadLeaderTransferee") from None
        self._transfers.append((self._clock(), node, session, request_id, method))
        self.answer_transfers()

    def answer_transfers(self) -> None:
        """Answer the transfers that are done, and fail those that take too long."""
        if not self._transfers:
            return
        now = self._clock()
        for transfer in self._transfers[:]:
            since, node, session, request_id, method = transfer
            if self._raft.leader == node:
                self._transfers.remove(transfer)
                # As etcd's, the response has no header.
                session.reply(request_id, method, b"")
            elif now - since > self._request_timeout_s:
                self._transfers.remove(transfer)
                session.fail(request_id, method, error("TimeoutDueToLeaderFail"))

    def hand_over_if_slow(self, now: float, unsynced_since: float) -> None:
        """A leader with a disk that does not answer lets another member lead, if one has the whole
        log."""
        if now - unsynced_since < self._election_timeout_s / 2:
            return
        if now - self._handed_over_at < 2 * self._election_timeout_s:
            return
        heir = self._heir()
        if heir:
            self._handed_over_at = now
            log.warn(
                "the disk is slow; handing leadership over",
                took=f"{now - unsynced_since:.2f}s",
                **{"new-leader": f"{heir:x}"},
            )
            self._raft.transfer_leader(heir)

    def hand_over(self) -> bool:
        """Before an orderly stop: have another member lead. True if there is something to wait
        for."""
        if self._raft.role != LEADER:
            return False
        heir = self._heir()
        if not heir:
            return False
        if self._clock() - self._handed_over_at > self._election_timeout_s:
            self._handed_over_at = self._clock()
            self._raft.transfer_leader(heir)
        return True

    def _heir(self) -> int:
        """The other voter that has most of the log, 0 if none is in contact."""
        progress = self._raft.progress
        ready = [
            node
            for node in self._raft.voters - {self._identity.member_id}
            if self._is_open(node) and progress[node].recent_active
        ]
        return max(ready, key=lambda node: (progress[node].match, node), default=0)

    def _ids(self) -> dict[str, Any]:
        return {"local-member-id": f"{self._identity.member_id:x}", "term": self._raft.term}
