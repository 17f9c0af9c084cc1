"""Leadership: what a member does when a leader is elected, lost or dead, or hands over.

Consensus elects (`raft.py`). This part logs the changes, campaigns at once when the leader's
process is dead, when the leader is silent (`suspicion.py`), and soon after a start if there is no
leader, and transfers leadership: for MoveLeader, before an orderly stop, and away from a slow disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from typing import Any

from etcdlite import log
from etcdlite.errors import EtcdError, error
from etcdlite.identity import Identity
from etcdlite.options import Options
from etcdlite.raft import FOLLOWER, LEADER, Raft
from etcdlite.replica.suspicion import Suspicion
from etcdlite.request import Done

COMMIT_DELAY_S = 0.002
"""A leader tells the others what is committed with its next append, or after this time: so with one
client at a time each member wakes up half as often. Watches and serializable reads on the others
see a write later by this. Nobody waits for it: entries that another member forwarded, and
membership changes, are told at once, and the round of a linearizable read tells it, too."""

NO_LEADER_S = 10.0
"""After this time without a leader the log says what is missing."""

NO_LEADER_PAUSE_S = 60.0
"""Added to `NO_LEADER_S` before the warning is repeated."""

CAMPAIGN_STAGGER_S = 0.03
"""When the leader's process is dead, the other voters campaign this far apart, so that they do not
split the votes."""

START_WAIT_S = 0.1
"""After a start, a leader that is alive has this time to make itself known."""

CAMPAIGN_RETRY_S = 0.1
CANDIDACY_S = 0.5
"""A candidate waits this long for the votes, also from members that are far away, and longer by
half of it for each voter before it, so that they do not split the votes again."""

MAX_TRANSFERS = 64
"""Transfers that wait for their end; each tick looks at all of them."""

MAX_CAMPAIGNS = 5
"""A voter campaigns this often at once, then it waits for the election timeout."""

SUSPICION_PAUSE_S = 0.01
"""Pause between the suspicion and the first campaign, in which others come to suspect the leader. A
tick also plans a suspicion at least this far ahead: what arrived while this member was paused is
read before."""


class Leadership:
    """The leader as this member knows it."""

    def __init__(
        self,
        raft: Raft,
        identity: Identity,
        clock: Callable[[], float],
        is_open: Callable[[int], bool],
        hear: Callable[[int], tuple[float, float]],
        options: Options,
    ) -> None:
        """`is_open` and `hear` are those of `peer.Peers`."""
        self._raft = raft
        self._identity = identity
        self._clock = clock
        self._is_open = is_open
        self._hear = hear
        self._request_timeout_s = options.request_timeout_s
        self._election_timeout_s = options.election_timeout_s
        self.changes = 0
        """The number of leaders seen, for the metrics. A leader that this member loses and hears
        from again in the same term counts once."""
        self._counted = (0, 0)
        """The last leader that was counted, and its term."""
        self._heartbeat_s = options.election_timeout_s / raft.config.election_ticks
        self._suspicion = Suspicion(self._heartbeat_s, options.election_timeout_s)
        self._listens_to = (0, 0)
        """Which leader `_suspicion` observes, as (ID, term)."""
        self.suspect_at = math.inf
        """When the leader is suspected, unless it is heard from before."""
        self.campaign_at = math.inf
        """When this member campaigns: the leader's process is dead, or it is silent, or all have
        just started."""
        self.send_commit_at = math.inf
        """When the others are told what is committed, unless an append does it before."""
        self._known = 0
        """The leader that `changed` was last called with; 0 for none."""
        self._lost = 0
        """The leader just lost; logged unless a new one is elected soon."""
        self._lost_at = -math.inf
        self._leader_seen_at = clock()
        """When there last was a leader."""
        self._quiet_until = -math.inf
        """The next warning comes `NO_LEADER_S` after this, if there is still no leader."""
        self._campaigns_left = 0
        self._place = 0
        """That of this member among the voters that campaign."""
        self._vote_before = (0, 0)
        """The term and the vote when this member campaigned last, or planned to."""
        self._is_starting = raft.config.pre_vote
        """No leader was heard of since the start, and no quorum could be reached."""
        self._handed_over_at = -math.inf
        """When this member last began a transfer of its own accord."""
        self._transfers: list[tuple[float, int, Done]] = []
        """Pending transfers: (start time, target, whom to answer)."""

    def changed(self, leader: int) -> None:
        """Consensus has a new leader; 0 for none."""
        if leader:
            self.campaign_at = math.inf
            if leader != self._known:
                self.changes += (leader, self._raft.term) != self._counted
                self._counted = (leader, self._raft.term)
                log.info("elected leader", **self._ids(), leader=f"{leader:x}")
        elif self._known:
            self._lost_at = self._clock()
            self._lost = self._known
        self._known = leader
        self.answer_transfers()

    def tick(self, now: float) -> None:
        """A heartbeat interval has passed."""
        self._listen(now)
        self._log_if_no_leader(now)
        self.answer_transfers()

    def timeout_error(self, since: float) -> EtcdError:
        """The error for a request that has waited since that time, in etcd's words."""
        leader = self._raft.leader
        if since <= self._lost_at:
            return error("TimeoutDueToLeaderFail")
        if leader and leader != self._identity.member_id and not self._is_open(leader):
            return error("TimeoutDueToConnectionLost")
        return error("Timeout")

    # Without a leader.

    def _log_if_no_leader(self, now: float) -> None:
        """Log the loss of a leader, and at intervals which voters are missing."""
        if self._raft.leader:
            self._leader_seen_at = now
            self._lost = 0
            return
        if self._lost:
            log.warn("lost leader", **self._ids(), leader=f"{self._lost:x}")
            self._lost = 0
        missing = self.missing_voters()
        if missing and now - max(self._leader_seen_at, self._quiet_until) > NO_LEADER_S:
            self._quiet_until = now + NO_LEADER_PAUSE_S
            log.error(
                f"there has been no leader for {now - self._leader_seen_at:.0f} s: {missing}. "
                "Writes and linearizable reads fail here meanwhile. If the log says that a peer "
                "refused this member, see why there; else start the others, or mend the network. "
                "If they are lost, see 'More than half is lost' in the documentation",
                **self._ids(),
            )

    def no_leader_text(self) -> str:
        """Since when there is no leader, and how many voting members can be reached."""
        without_s = self._clock() - self._leader_seen_at
        members = f"{self._reached()} of {len(self._raft.voters)} voting members reachable"
        return f"no leader since {without_s:.0f} s; {members}"

    def _reached(self) -> int:
        """The number of voters that this member reaches, itself included."""
        own_id = self._identity.member_id
        return sum(node == own_id or self._is_open(node) for node in self._raft.voters)

    def missing_voters(self) -> str:
        """Why there is no leader, in words, if voting members cannot be reached; else empty."""
        voters = self._raft.voters
        reached, quorum = self._reached(), len(voters) // 2 + 1
        if reached >= quorum or not voters:
            return ""
        return (
            f"this member reaches {reached} of {len(voters)} voting members, itself included, and "
            f"{quorum} are needed"
        )

    def peer_died(self, node: int) -> None:
        """The process of that member is dead. If it led, campaign without waiting for the election
        timeout. The pre-vote protects a leader that other members still hear from."""
        raft = self._raft
        if node != raft.leader or raft.role != FOLLOWER:
            return
        log.warn("the leader's process is gone", leader=f"{node:x}")
        raft.forget_leader()
        self._plan_campaigns(self._clock(), raft.voters - {node})

    def _listen(self, now: float) -> None:
        """Measure how long the leader is silent, and plan to suspect it before the next tick if
        that is due."""
        self.suspect_at = math.inf
        raft = self._raft
        leader, voters = raft.leader, raft.voters
        if not leader or raft.role != FOLLOWER or self._identity.member_id not in voters:
            return
        if len(voters - {leader}) <= len(voters) // 2 or not raft.config.pre_vote:
            return  # The others alone cannot elect.
        suspect_at = self._silence_ends_at(leader, now)
        if suspect_at < now + 2 * self._heartbeat_s:
            self.suspect_at = max(suspect_at, now + SUSPICION_PAUSE_S)

    def _silence_ends_at(self, leader: int, now: float) -> float:
        """When the leader is suspected if nothing is heard from it until then."""
        heard_at, longest_s = self._hear(leader)
        before, self._listens_to = self._listens_to, (leader, self._raft.term)
        if self._listens_to == before:  # What it sent before it led came at longer intervals.
            self._suspicion.observe(longest_s, now)
        return heard_at + self._suspicion.limit_s

    def _suspect(self, now: float) -> None:
        """Campaign if the leader is still silent. The pre-vote protects a leader that other members
        hear from."""
        self.suspect_at = math.inf
        raft, leader = self._raft, self._raft.leader
        if not leader or raft.role != FOLLOWER or now < self._silence_ends_at(leader, now):
            return
        limit_s = self._suspicion.limit_s
        log.warn("the leader is silent", leader=f"{leader:x}", since=f"{limit_s:.2f}s")
        raft.forget_leader()
        # Others that do not suspect the leader grant after an election timeout: try until then.
        campaigns = math.ceil(self._election_timeout_s / CAMPAIGN_RETRY_S)
        self._plan_campaigns(now + SUSPICION_PAUSE_S, raft.voters - {leader}, campaigns)

    def begin(self, now: float) -> None:
        """A member that has just started, and may take part, campaigns once it reaches a quorum, if
        it hears of no leader. The pre-vote protects a leader that others hear from."""
        if not self._is_starting:
            return
        raft, own_id = self._raft, self._identity.member_id
        if raft.leader or raft.role != FOLLOWER or own_id not in raft.voters:
            self._is_starting = False
        elif not self.missing_voters():
            self._is_starting = False
            self._plan_campaigns(now + START_WAIT_S, raft.voters)

    def _plan_campaigns(
        self, first_at: float, voters: Set[int], campaigns: int = MAX_CAMPAIGNS
    ) -> None:
        """Campaign when it is this member's turn among these voters, the first of which campaigns
        at `first_at`. Does nothing if it is none of them (any more)."""
        if self._identity.member_id not in voters:
            return
        self._campaigns_left = campaigns
        self._vote_before = (self._raft.term, self._raft.vote)
        self._place = sorted(voters).index(self._identity.member_id)
        self.campaign_at = first_at + self._place * CAMPAIGN_STAGGER_S

    @property
    def wakes_at(self) -> float:
        """When `act` has something to do."""
        return min(self.campaign_at, self.send_commit_at, self.suspect_at)

    def send_commit_later(self, now: float) -> None:
        """Tell the others what is committed, at most `COMMIT_DELAY_S` from now."""
        self.send_commit_at = min(self.send_commit_at, now + COMMIT_DELAY_S)

    def act(self, now: float) -> None:
        """Send what is committed at `send_commit_at`, suspect the leader at `suspect_at`, and
        campaign at `campaign_at`."""
        if now >= self.send_commit_at:
            self.send_commit_at = math.inf
            self._raft.send_commit()
        if now >= self.suspect_at:
            self._suspect(now)
        if now < self.campaign_at:
            return
        raft = self._raft
        self._campaigns_left -= 1
        self.campaign_at = now + CAMPAIGN_RETRY_S if self._campaigns_left else math.inf
        before, self._vote_before = self._vote_before, (raft.term, raft.vote)
        if raft.vote and self._vote_before != before:
            # The votes for this member are on their way. Another candidate may lead already.
            is_own = raft.vote == self._identity.member_id
            wait_s = CANDIDACY_S * (1 + self._place / 2)
            self.campaign_at = now + wait_s if is_own and self._campaigns_left else math.inf
        elif not raft.leader:
            raft.campaign()

    # Transfers.

    def move(self, node: int, done: Done) -> None:
        """Transfer leadership to the voter `node`, and answer when it leads. Only the leader calls
        this. Raises BadLeaderTransferee, RequestTooManyRequests."""
        if len(self._transfers) >= MAX_TRANSFERS:
            raise error("RequestTooManyRequests")
        if node != self._identity.member_id:
            try:
                self._raft.transfer_leader(node)
            except ValueError:
                raise error("BadLeaderTransferee") from None
        self._transfers.append((self._clock(), node, done))
        self.answer_transfers()

    def answer_transfers(self) -> None:
        """Answer the transfers that are done, and fail those that take too long."""
        now = self._clock()
        for transfer in self._transfers[:]:
            since, node, done = transfer
            if self._raft.leader == node:
                self._transfers.remove(transfer)
                # As in etcd, the response has no header.
                done(b"")
            elif now - since > self._request_timeout_s:
                self._transfers.remove(transfer)
                done(error("TimeoutDueToLeaderFail"))

    def hand_over_if_slow(self, now: float, unsynced_since: float) -> None:
        """If a write to this disk has been pending, since `unsynced_since`, for half an election
        timeout, hand over to a reachable voter that has it on disk already. Only on the leader."""
        is_slow = now - unsynced_since >= self._election_timeout_s / 2
        if not is_slow or now - self._handed_over_at < 2 * self._election_timeout_s:
            return
        transferee = self._best_transferee()
        if transferee and self._raft.progress[transferee].match > self._raft.log.stable:
            self._handed_over_at = now
            log.warn(
                "the disk is slow; handing leadership over",
                took=f"{now - unsynced_since:.2f}s",
                new_leader=f"{transferee:x}",
            )
            self._raft.transfer_leader(transferee)

    def hand_over(self) -> bool:
        """Hand over before an orderly stop, or without space for what is applied. Returns whether
        the transfer is still to be waited for."""
        transferee = self._best_transferee() if self._raft.role == LEADER else 0
        if not transferee:
            return False
        if self._clock() - self._handed_over_at > self._election_timeout_s:
            self._handed_over_at = self._clock()
            self._raft.transfer_leader(transferee)
        return True

    def _best_transferee(self) -> int:
        """The other voter in contact with the most of the log; 0 if there is none."""
        progress = self._raft.progress
        ready = [
            # One that is silent since the last check of the quorum may be dead: it comes last.
            (progress[node].recent_active, progress[node].match, node)
            for node in self._raft.voters - {self._identity.member_id}
            if self._is_open(node) and progress[node].is_active
        ]
        return max(ready, default=(False, 0, 0))[2]

    def _ids(self) -> dict[str, Any]:
        return {"local-member-id": f"{self._identity.member_id:x}", "term": self._raft.term}
