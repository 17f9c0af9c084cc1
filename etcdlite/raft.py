"""Consensus as a pure state machine: no clock, no socket, no file, no global random.

Names, roles and rules follow Ongaro's Raft thesis and etcd's raft library: `step` takes a message,
`tick` a unit of time, `ready` gives what must be written, sent and applied. etcd's `advance` comes
in its asynchronous form, as two calls: `persisted` and `applied`. Work is pipelined: `ready` may be
taken again while earlier Readys are still on their way to the disk.

What the owner does with a `Ready`, in this order:

1. `messages` may leave at once, before anything is durable (thesis 10.2.1).
2. `snapshot`, `hard_state` and `entries` are written, hard state not later than the entries.
   Readys are made durable in the order in which they were taken. Entries replace all entries of
   the same and higher indexes that were written before.
3. When they are durable, and those of all earlier Readys too: `messages_after_sync` leave (those
   addressed to this member itself go to `step`), and `persisted(index, term)` is called with the
   last of `entries`, once for every Ready that has entries, in order.
4. `committed_entries` are applied in order, then `applied(index)` is called. They are durable
   already. For a conf change entry that is accepted, `apply_conf_change` comes before `applied`.
   A `snapshot` is installed and synced before later entries; `applied(snapshot.index)` says so.
5. `read_states` are answered once `applied` has reached their index.

Invariants, checked while running and fatal when broken (`RaftInvariantError`):

- at most one leader in a term; a leader never drops or changes entries of its own log;
- applied <= applying <= committed <= last, stable <= offered <= last, and offset <= applied except
  while a snapshot is being installed (`RaftLog` says what these are);
- an entry is applied only when it is committed and durable on this member;
- a member becomes leader only when its own vote is durable. (Otherwise it could forget, crash, be
  elected again in the same term, and put another entry at the same index and term.) The only
  exception is a member that is alone: its hard state is written with the entries that need it.

The commit index rides along in the hard state whenever entries are written, but is never a reason
to write: Raft does not need it durable (thesis 3.8), and the state machine keeps its applied index.
What it must do it does: a leader appends a membership change only when the one before is committed,
so a log on disk has at most one change beyond the commit index beside it, and a restarted member,
which does not campaign before it has applied the others, is at most one change behind.

What this part must never do: look at `data` of an entry, know about keys or members' addresses, or
hold more than the named limits allow.

Membership changes are one at a time (thesis 4.1, without joint consensus), take effect when they
are applied (as in etcd), and are proposed only when the leader has committed an entry of its term.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from etcdlite.raft_log import (
    ENTRY_CONF_CHANGE,
    ENTRY_NORMAL,
    ENTRY_OVERHEAD_BYTES,
    Entry,
    RaftInvariantError,
    RaftLog,
)

MAX_APPEND_BYTES = 1 << 20
"""Entries in one append message; a single larger entry still goes alone."""

MAX_APPLY_BYTES = 1 << 20
"""Entries in one Ready to apply, so that a turn stays short; a larger entry goes alone."""

MAX_INFLIGHT_MESSAGES = 256
MAX_INFLIGHT_BYTES = 16 << 20
"""Appends sent to one follower and not yet acknowledged by it."""

MAX_LOG_TAILS = 4
"""The log is kept for those who get a snapshot up to so many times its tail."""

MAX_UNCOMMITTED_BYTES = 64 << 20
"""Entries that a leader accepts beyond the commit index."""

MAX_WAITING_READS = 4096
"""Read requests that wait at the leader for a round of heartbeats."""

LOG_TAIL_BYTES = 16 << 20
"""Applied entries that compaction keeps in memory for slow followers."""

FOLLOWER, PRE_CANDIDATE, CANDIDATE, LEADER = range(4)
ROLE_NAMES = ("follower", "pre-candidate", "candidate", "leader")

PROBE, REPLICATE, SNAPSHOT = range(3)
PROGRESS_NAMES = ("probe", "replicate", "snapshot")

(
    APP,
    APP_RESP,
    HEARTBEAT,
    HEARTBEAT_RESP,
    VOTE,
    VOTE_RESP,
    PRE_VOTE,
    PRE_VOTE_RESP,
    SNAP,
    READ_INDEX,
    READ_INDEX_RESP,
    TIMEOUT_NOW,
) = range(1, 13)

MESSAGE_NAMES = {
    APP: "App",
    APP_RESP: "AppResp",
    HEARTBEAT: "Heartbeat",
    HEARTBEAT_RESP: "HeartbeatResp",
    VOTE: "Vote",
    VOTE_RESP: "VoteResp",
    PRE_VOTE: "PreVote",
    PRE_VOTE_RESP: "PreVoteResp",
    SNAP: "Snap",
    READ_INDEX: "ReadIndex",
    READ_INDEX_RESP: "ReadIndexResp",
    TIMEOUT_NOW: "TimeoutNow",
}

ADD_VOTER, ADD_LEARNER, REMOVE = range(3)

CAMPAIGN_TRANSFER = b"transfer"
"""Context of a vote request that a leader asked for: it overrides the lease of that leader."""


class NotLeader(Exception):
    """This member cannot take the request; `leader` is the id of who can, 0 if unknown."""

    def __init__(self, leader: int) -> None:
        super().__init__(leader)
        self.leader = leader


class RequestDropped(Exception):
    """The request was not taken, for a passing reason that the text names. Try again later."""


class HardState(NamedTuple):
    """What must be durable before a vote or an acknowledgement leaves."""

    term: int = 0
    vote: int = 0
    commit: int = 0


NO_HARD_STATE = HardState()
"""That of a member that never ran."""


class SoftState(NamedTuple):
    """Who leads (0 if unknown) and the role of this member."""

    leader: int
    role: int


class Snapshot(NamedTuple):
    """What a snapshot replaces: the log up to `index`, and the membership there."""

    index: int  # type: ignore[assignment]  # tuple.index is not missed
    term: int
    voters: tuple[int, ...]
    learners: tuple[int, ...]


class ReadState(NamedTuple):
    """The read request `context` may be answered once `index` is applied."""

    index: int  # type: ignore[assignment]  # tuple.index is not missed
    context: bytes


class ConfChange(NamedTuple):
    """ADD_VOTER (also promotes a learner), ADD_LEARNER or REMOVE, of the member `node`."""

    action: int
    node: int


class Message(NamedTuple):
    """One message between members. Fields that a kind does not name are left at their defaults.

    =============  ================================================================================
    App            index, log_term: the entry before `entries`; commit: the leader's commit index
    AppResp        index: the last entry that matches. With reject: index of the refused App, and
                   hint, log_term: the last entry of the sender that may match
    Heartbeat      commit: what the receiver may commit; context: the round of reads it confirms
    HeartbeatResp  context: as received; commit: the sender's commit index
    Vote, PreVote  index, log_term: the candidate's last entry; context: CAMPAIGN_TRANSFER or empty
    VoteResp       reject, and with it commit, log_term: the last entry that the sender knows to be
                   committed. PreVoteResp too
    Snap           snapshot: what the state machine that goes with this message contains
    ReadIndex      context: the request, as the follower knows it
    ReadIndexResp  context: as received; index: the read index
    TimeoutNow     nothing: the receiver shall campaign at once
    =============  ================================================================================
    """

    kind: int
    to: int
    sender: int
    term: int
    index: int = 0  # type: ignore[assignment]  # tuple.index is not missed
    log_term: int = 0
    commit: int = 0
    entries: Sequence[Entry] = ()
    reject: bool = False
    hint: int = 0
    snapshot: Snapshot | None = None
    context: bytes = b""


class Ready(NamedTuple):
    """What there is to do; the module docstring says in which order. Empty fields: nothing."""

    hard_state: HardState | None = None
    entries: Sequence[Entry] = ()
    committed_entries: Sequence[Entry] = ()
    messages: Sequence[Message] = ()
    messages_after_sync: Sequence[Message] = ()
    read_states: Sequence[ReadState] = ()
    soft_state: SoftState | None = None
    snapshot: Snapshot | None = None


NOTHING_READY = Ready()
"""What `Raft.ready` returns when there is nothing to do: always this object."""


@dataclass(frozen=True)
class Config:
    """One member's settings. Times are in ticks, whose length the owner chooses.

    `id` is this member's, not 0. A follower campaigns after `election_ticks` to twice that without
    a leader; a leader sends heartbeats every `heartbeat_ticks`.
    """

    id: int
    election_ticks: int = 10
    heartbeat_ticks: int = 1
    pre_vote: bool = True
    max_append_bytes: int = MAX_APPEND_BYTES
    max_apply_bytes: int = MAX_APPLY_BYTES
    max_inflight_messages: int = MAX_INFLIGHT_MESSAGES
    max_inflight_bytes: int = MAX_INFLIGHT_BYTES
    max_uncommitted_bytes: int = MAX_UNCOMMITTED_BYTES
    log_tail_bytes: int = LOG_TAIL_BYTES


class Raft:
    """One member's part in the consensus.

    The log as recovered is given at the start: `entries` follow the entry (`snapshot_index`,
    `snapshot_term`) without a gap; `applied` is what the state machine already contains, and
    `voters` and `learners` the membership there. A member that is the only voter campaigns at once.

    The first members of a cluster start with the same membership and an empty log, as it is not in
    the log. Who joins later starts with neither, and learns both from the leader. An id must never
    be used again after its member was removed.

    Public attributes are for reading: `id term vote role leader voters learners progress log`.
    """

    def __init__(
        self,
        config: Config,
        rng: random.Random,
        *,
        voters: Iterable[int],
        learners: Iterable[int] = (),
        hard_state: HardState = NO_HARD_STATE,
        snapshot_index: int = 0,
        snapshot_term: int = 0,
        entries: Sequence[Entry] = (),
        applied: int = 0,
    ) -> None:
        if not config.id:
            raise ValueError("a member's id must not be 0")
        if not 0 < config.heartbeat_ticks < config.election_ticks:
            raise ValueError("heartbeat_ticks must be positive and below election_ticks")
        self.config = config
        self.id = config.id
        self.voters = set(voters)
        self.learners = set(learners)
        self.log = RaftLog(snapshot_index, snapshot_term, entries)
        self.log.recover(hard_state.commit, applied)
        self.term = hard_state.term
        self.vote = hard_state.vote
        last_term = self.log.term(self.log.last)
        if last_term > self.term:
            # Entries reached the disk and the hard state written with them did not: then no vote
            # of that term was given either.
            self.term = last_term
            self.vote = 0
        self.role = FOLLOWER
        self.leader = 0
        self.progress: dict[int, Progress] = {}
        self._rng = rng
        self._saved = hard_state
        self._shown = SoftState(0, FOLLOWER)
        self._messages: list[Message] = []
        self._messages_after_sync: list[Message] = []
        self._read_states: list[ReadState] = []
        self._snapshot: Snapshot | None = None
        self._election_elapsed = 0
        self._election_timeout = 0
        self._heartbeat_elapsed = 0
        self._votes: dict[int, bool] = {}
        # The leader's: who shall lead next, the last conf change that may be unapplied, the weight
        # of its uncommitted entries, and the commit index that the others must know before it may
        # go, if it is removed.
        self._transferee = 0
        self._pending_conf_index = 0
        self._uncommitted_bytes = 0
        self._removal_index = 0
        # Reads as (who asks, context): those that wait, and those of the round under way.
        self._reads_waiting: list[tuple[int, bytes]] = []
        self._round_reads: list[tuple[int, bytes]] = []
        self._round = 0
        self._round_index = 0
        self._round_acks: set[int] = set()
        self._reset(self.term)
        self._campaign_if_sole_voter()

    # Input and output.

    def has_ready(self) -> bool:
        """Whether `ready` would give anything. Cheap: for every turn of the loop."""
        log = self.log
        return (
            log.offered != log.last
            or log.has_next_committed()
            or bool(self._messages or self._messages_after_sync or self._read_states)
            or self.term != self._saved.term
            or self.vote != self._saved.vote
            or self.role != self._shown.role
            or self.leader != self._shown.leader
            or self._snapshot is not None
        )

    def ready(self) -> Ready:
        """What there is to do now; each thing is handed out once."""
        if not self.has_ready():
            return NOTHING_READY
        log = self.log
        entries = log.offer()
        hard_state = None
        if (
            self.term != self._saved.term
            or self.vote != self._saved.vote
            or ((entries or self._snapshot) and log.committed != self._saved.commit)
        ):
            hard_state = self._saved = self.hard_state
        soft_state = None
        if self.role != self._shown.role or self.leader != self._shown.leader:
            soft_state = self._shown = SoftState(self.leader, self.role)
        ready = Ready(
            hard_state,
            entries,
            log.next_committed(self.config.max_apply_bytes),
            self._messages,
            self._messages_after_sync,
            self._read_states,
            soft_state,
            self._snapshot,
        )
        # New lists even for empty ones: the owner holds on to the old.
        self._messages = []
        self._messages_after_sync = []
        self._read_states = []
        self._snapshot = None
        return ready

    @property
    def hard_state(self) -> HardState:
        """The hard state now, commit index included."""
        return HardState(self.term, self.vote, self.log.committed)

    def persisted(self, index: int, term: int) -> None:
        """The entries of the Ready that ended with (index, term), and all before, are durable.

        Call it for every Ready that had entries, in order. Entries that were overwritten in the
        meantime do not count.
        """
        self.log.stable_to(index, term)
        own = self.progress.get(self.id)
        if self.role == LEADER and own is not None and self.log.stable > own.match:
            own.match = self.log.stable
            if self._maybe_commit():
                self._broadcast_append()

    def applied(self, index: int) -> None:
        """The state machine contains everything up to `index`."""
        self.log.applied_to(index)
        self._campaign_if_sole_voter()

    def step(self, message: Message) -> None:
        """Take one message. Stale and unexpected ones are ignored, as Raft requires.

        Raises RaftInvariantError if it proves that another leader has this term.
        """
        kind = message.kind
        term = message.term
        if term > self.term:
            if kind in (VOTE, PRE_VOTE):
                in_lease = self.leader and self._election_elapsed < self.config.election_ticks
                if in_lease and message.context != CAMPAIGN_TRANSFER:
                    return  # Thesis 4.2.3: who hears from a leader helps nobody to disturb it.
            # A pre-vote changes nobody's term, nor does the grant of one, which bears the term
            # that the candidate would have.
            if kind != PRE_VOTE and (kind != PRE_VOTE_RESP or message.reject):
                from_leader = kind in (APP, HEARTBEAT, SNAP)
                self._become_follower(term, message.sender if from_leader else 0)
        elif term < self.term:
            if kind in (APP, HEARTBEAT):
                # A deposed leader, or one that a pre-vote keeps from hearing of our higher term,
                # learns it from the answer. Without pre-vote it would learn it by a vote request.
                self._send_after_sync(APP_RESP, message.sender)
            elif kind == PRE_VOTE:
                self._send(PRE_VOTE_RESP, message.sender, **self._vote_refusal())
            return
        if kind in (VOTE, PRE_VOTE):
            self._on_vote(message)
            return
        handler = _HANDLERS[self.role].get(kind)
        if handler is not None:
            handler(self, message)

    def tick(self) -> None:
        """One unit of time has passed."""
        config = self.config
        self._election_elapsed += 1
        if self.role != LEADER:
            if self._election_elapsed >= self._election_timeout and self._is_promotable():
                self._election_elapsed = 0
                self.campaign()
            return
        if self._election_elapsed >= config.election_ticks:
            self._election_elapsed = 0
            self._transferee = 0  # It had its time; proposals are taken again.
            self._check_quorum()
            if self.role != LEADER:
                return
        self._heartbeat_elapsed += 1
        if self._heartbeat_elapsed >= config.heartbeat_ticks:
            self._heartbeat_elapsed = 0
            self._broadcast_heartbeat()

    # Requests.

    def propose(self, data: bytes) -> int:
        """Append an entry to the leader's log and return its index. It may still get lost.

        Raises NotLeader; RequestDropped while leadership is handed over or when more than
        `max_uncommitted_bytes` wait to be committed.
        """
        self._check_can_propose()
        size = len(data) + ENTRY_OVERHEAD_BYTES
        if (
            self._uncommitted_bytes
            and self._uncommitted_bytes + size > self.config.max_uncommitted_bytes
        ):
            raise RequestDropped("too many uncommitted entries")
        return self._append(ENTRY_NORMAL, data)

    def propose_conf_change(self, data: bytes) -> int:
        """Append a membership change, which the owner encodes in `data`; return its index.

        Raises NotLeader; RequestDropped as `propose` does, and while an earlier change may be
        unapplied or nothing of the leader's term is committed yet (thesis 4.1, with the
        correction of 2015).
        """
        self._check_can_propose()
        if self._pending_conf_index > self.log.applied:
            raise RequestDropped("another membership change is in progress")
        if not self._has_committed_in_term():
            raise RequestDropped("the leader has not committed an entry of its term yet")
        self._pending_conf_index = self._append(ENTRY_CONF_CHANGE, data)
        return self._pending_conf_index

    def read_index(self, context: bytes) -> None:
        """Ask for a ReadState for a linearizable read (thesis 6.4); `context` names it.

        A sole voter answers with the next Ready, others after a round of heartbeats, all as soon
        as an entry of the term is committed. The answer may never come (a lost message, a lost
        leadership): ask again after a timeout or when the soft state changes. Raises NotLeader(0)
        when no leader is known, RequestDropped when MAX_WAITING_READS wait already.
        """
        if self.role == LEADER:
            if len(self._reads_waiting) >= MAX_WAITING_READS:
                raise RequestDropped("too many waiting reads")
            self._take_read(self.id, context)
        elif self.leader:
            self._send(READ_INDEX, self.leader, context=context)
        else:
            raise NotLeader(0)

    def campaign(self) -> None:
        """Start an election now (a pre-vote first, unless `pre_vote` is off). No-op for a leader,
        for a learner, and while a committed membership change is not applied."""
        if self._may_campaign():
            if self.config.pre_vote and not self._is_sole_voter():
                self._campaign(PRE_VOTE, b"")
            else:
                self._campaign(VOTE, b"")

    def forget_leader(self) -> None:
        """The leader is known to be gone: stop refusing to vote for others because of it.

        For a follower whose connection to the leader was reset and then refused (the process is
        dead). A leader that lives after all is found again with its next message.
        """
        if self.role == FOLLOWER:
            self.leader = 0

    def transfer_leader(self, node: int) -> None:
        """Hand leadership to the voter `node` once it has the whole log (thesis 3.10).

        Until then, for at most an election timeout, proposals are dropped. Raises NotLeader, and
        ValueError if `node` is not another voter.
        """
        if self.role != LEADER:
            raise NotLeader(self.leader)
        if node == self.id or node not in self.voters:
            raise ValueError(f"{node:x} is not another voter")
        self._transferee = node
        self._election_elapsed = 0
        if self.progress[node].match == self.log.last:
            self._send(TIMEOUT_NOW, node)
        else:
            self._send_append(node)

    def apply_conf_change(self, change: ConfChange) -> None:
        """Change the membership: the conf change entry is being applied.

        A change that makes no sense (to demote a voter, to remove the last one) changes nothing,
        so that all members agree whatever the log contains.

        A leader that is removed takes no more proposals and leads on until a quorum of the others
        knows that the change is committed; it should not stop before its role has changed.
        """
        action, node = change
        if action == ADD_VOTER and node not in self.voters:
            self.learners.discard(node)
            self.voters.add(node)
        elif action == ADD_LEARNER and node not in self.voters and node not in self.learners:
            self.learners.add(node)
        elif action == REMOVE and node in self.learners:
            self.learners.remove(node)
        elif action == REMOVE and node in self.voters and len(self.voters) > 1:
            self.voters.remove(node)
        else:
            return
        self._membership_changed()

    def compact(self, index: int) -> None:
        """Drop entries up to `index`, which is applied, from memory, except for a tail.

        The tail (`log_tail_bytes`) spares followers that are a little behind a snapshot; a member
        that is alone keeps none. Files are not touched.
        """
        tail_bytes = self.config.log_tail_bytes
        if self.role == LEADER:
            index = self._keep_for_late(index)
        self.log.compact(index, 0 if self._is_alone() else tail_bytes)

    def _keep_for_late(self, index: int) -> int:
        """Up to where the log may be dropped: who gets a snapshot goes on from there, or it would
        need the next one at once."""
        is_large = self.log.size_bytes >= MAX_LOG_TAILS * self.config.log_tail_bytes
        first = index
        for progress in self.progress.values():
            if progress.kept_index:
                is_over = is_large or progress.match >= index
                progress.kept_index = 0 if is_over else max(progress.kept_index, progress.match)
                first = min(first, progress.kept_index or index)
        return first

    def report_unreachable(self, node: int) -> None:
        """Messages to `node` were lost: stop streaming to it and find out what it has."""
        progress = self.progress.get(node)
        if self.role == LEADER and progress is not None and progress.state == REPLICATE:
            progress.become_probe()

    def report_snapshot(self, node: int, delivered: bool) -> None:
        """The snapshot for `node` was handed over, or sending it failed.

        One of the two must be reported for every Snap message: until then, or until the node itself
        says that it has it, nothing else is sent to it.
        """
        progress = self.progress.get(node)
        if self.role == LEADER and progress is not None and progress.state == SNAPSHOT:
            if not delivered:
                progress.pending_snapshot = progress.kept_index = 0
            progress.become_probe()
            # Wait for its answer, or for a heartbeat's, before the next try.
            progress.paused = True

    def learner_is_ready(self, node: int) -> bool:
        """Whether the learner `node` was heard of lately and has nine tenths of the log (the rule
        by which etcd lets a learner be promoted)."""
        progress = self.progress.get(node)
        return (
            self.role == LEADER
            and progress is not None
            and progress.recent_active
            and progress.match * 10 >= self.log.committed * 9
        )

    # Roles.

    def _reset(self, term: int) -> None:
        if term != self.term:
            if term < self.term:
                raise RaftInvariantError(f"term went back from {self.term} to {term}")
            self.term = term
            self.vote = 0
        self.leader = 0
        self._election_elapsed = 0
        self._heartbeat_elapsed = 0
        ticks = self.config.election_ticks
        self._election_timeout = self._rng.randrange(ticks, 2 * ticks)
        self._votes = {}
        self._transferee = 0
        self._pending_conf_index = 0
        self._uncommitted_bytes = 0
        self._removal_index = 0
        self._reads_waiting = []
        self._round_reads = []
        self._round = 0
        self.progress = {}
        self._track_members()

    def _become_follower(self, term: int, leader: int) -> None:
        self._reset(term)
        self.role = FOLLOWER
        self.leader = leader

    def _become_leader(self) -> None:
        self._reset(self.term)
        self.role = LEADER
        self.leader = self.id
        own = self.progress[self.id]
        own.become_replicate()
        own.match = self.log.stable
        # Earlier conf changes may be among the unapplied entries; only when all of them are applied
        # is it certain that no other is pending.
        self._pending_conf_index = self.log.last
        self._append(ENTRY_NORMAL, b"")

    def _is_promotable(self) -> bool:
        return self.id in self.voters and self.log.applied >= self.log.offset

    def _is_sole_voter(self) -> bool:
        return len(self.voters) == 1 and self.id in self.voters

    def _is_alone(self) -> bool:
        return self._is_sole_voter() and not self.learners

    def _may_campaign(self) -> bool:
        return (
            self.role != LEADER
            and self._is_promotable()
            and not self.log.has_unapplied_conf_change()
        )

    def _campaign_if_sole_voter(self) -> None:
        if self.role == FOLLOWER and self._is_sole_voter():
            self.campaign()

    def _campaign(self, kind: int, context: bytes) -> None:
        log = self.log
        if kind == PRE_VOTE:
            self._reset(self.term)
            self.role = PRE_CANDIDATE
            term = self.term + 1
            self._votes[self.id] = True
        else:
            self._reset(self.term + 1)
            self.role = CANDIDATE
            term = self.term
            self.vote = self.id
            if self._is_alone():
                self._become_leader()
                return
            self._send_after_sync(VOTE_RESP, self.id)
        last_term = log.term(log.last)
        for node in sorted(self.voters):
            if node != self.id:
                self._send(
                    kind, node, term=term, index=log.last, log_term=last_term, context=context
                )

    def _on_vote(self, message: Message) -> None:
        log = self.log
        pre = message.kind == PRE_VOTE
        can_vote = (
            self.vote == message.sender
            or (self.vote == 0 and self.leader == 0)
            or (pre and message.term > self.term)
        )
        last_term = log.term(log.last)
        up_to_date = (message.log_term, message.index) >= (last_term, log.last)
        granted = can_vote and up_to_date
        if granted and not pre:
            self.vote = message.sender
            self._election_elapsed = 0
        # The grant of a pre-vote carries the term that was asked for, or the candidate would take
        # it for a stale message; a refusal carries ours, so that it learns of a higher one.
        answer = {"term": message.term} if granted else self._vote_refusal()
        if pre:
            self._send(PRE_VOTE_RESP, message.sender, **answer)
        else:
            self._send_after_sync(VOTE_RESP, message.sender, **answer)

    def _vote_refusal(self) -> dict[str, Any]:
        committed = self.log.committed
        return {"commit": committed, "log_term": self.log.term(committed), "reject": True}

    def _on_vote_resp(self, message: Message) -> None:
        if message.reject and self.log.term(message.commit) == message.log_term:
            # What we have and did not know to be committed may be the membership change after which
            # we do not need the sender's vote, which it will never give: its log is longer. (A
            # leader that removed itself from two members; the remedy is that of TiKV's raft-rs.)
            self.log.commit_to(message.commit)
        # Only the first answer counts: a repeated message must not change a vote.
        self._votes.setdefault(message.sender, not message.reject)
        quorum = len(self.voters) // 2 + 1
        granted = sum(self._votes.get(node, False) for node in self.voters)
        refused = sum(not self._votes.get(node, True) for node in self.voters)
        if refused > len(self.voters) - quorum:
            self._become_follower(self.term, 0)
        elif granted >= quorum and self._votes.get(self.id):
            if self.role == PRE_CANDIDATE:
                self._campaign(VOTE, b"")
            else:
                self._become_leader()

    def _on_timeout_now(self, message: Message) -> None:
        if self._may_campaign():
            self._campaign(VOTE, CAMPAIGN_TRANSFER)

    def _check_quorum(self) -> None:
        """Step down if no quorum was heard of for an election timeout (thesis 6.2)."""
        active = sum(self.progress[node].recent_active for node in self.voters - {self.id})
        if active + (self.id in self.voters) < len(self.voters) // 2 + 1:
            self._become_follower(self.term, 0)
            return
        for progress in self.progress.values():
            progress.recent_active = False

    # Membership.

    def _go_if_removal_is_known(self) -> None:
        known = sum(self.progress[node].committed >= self._removal_index for node in self.voters)
        if known > len(self.voters) // 2:
            self._become_follower(self.term, 0)

    def _others(self) -> list[int]:
        return sorted(node for node in self.progress if node != self.id)

    def _track_members(self) -> None:
        for node in self.voters | self.learners:
            if node not in self.progress:
                self.progress[node] = Progress(self.log.last + 1, self.config)

    def _membership_changed(self) -> None:
        for node in self.progress.keys() - self.voters - self.learners:
            del self.progress[node]
        known = self.progress.keys() | set()
        self._track_members()
        if self.role != LEADER:
            if self.role != FOLLOWER and self.id not in self.voters:
                self._become_follower(self.term, 0)
            return
        for node in self.progress.keys() - known:
            self.progress[node].recent_active = True  # It gets a full election timeout to show up.
        if self.id not in self.voters:
            self._removal_index = self.log.committed
            self._broadcast_heartbeat()
        if self._transferee not in self.voters:
            self._transferee = 0
        # A smaller quorum may commit more, and confirm reads.
        if self._maybe_commit():
            self._broadcast_append()
        else:
            for node in self._others():
                self._maybe_send_append(node, even_if_empty=False)
        self._finish_round_if_confirmed()
        self._start_round_if_due()

    # The leader: replication.

    def _check_can_propose(self) -> None:
        if self.role != LEADER:
            raise NotLeader(self.leader)
        if self._transferee:
            raise RequestDropped("leadership is being transferred")
        if self._removal_index:
            raise RequestDropped("the leader is removed from the cluster")

    def _append(self, kind: int, data: bytes) -> int:
        log = self.log
        index = log.last + 1
        log.append(Entry(self.term, index, kind, data))
        self._uncommitted_bytes += len(data) + ENTRY_OVERHEAD_BYTES
        self._broadcast_append()
        return index

    def _has_committed_in_term(self) -> bool:
        return self.log.term(self.log.committed) == self.term

    def _maybe_commit(self) -> bool:
        """Commit what a quorum has, if it is of this term (thesis 3.6.2)."""
        log = self.log
        if len(self.voters) == 1:
            (node,) = self.voters
            index = self.progress[node].match
        else:
            matches = sorted(self.progress[node].match for node in self.voters)
            index = matches[(len(matches) - 1) // 2]
        if index <= log.committed or log.term(index) != self.term:
            return False
        self._uncommitted_bytes = max(
            0, self._uncommitted_bytes - log.size_between(log.committed, index)
        )
        log.commit_to(index)
        self._start_round_if_due()
        return True

    def _broadcast_append(self) -> None:
        for node in self._others():
            self._send_append(node)

    def _send_append(self, node: int) -> None:
        self._maybe_send_append(node, even_if_empty=True)

    def _maybe_send_append(self, node: int, even_if_empty: bool) -> bool:
        """Send the next entries to a follower, or a snapshot if they are gone, unless it is paused.

        An append without entries is worth sending only for the commit index that it carries.
        """
        progress = self.progress[node]
        if progress.is_paused():
            return False
        log = self.log
        previous = progress.next - 1
        if previous < log.offset or (previous == 0 and log.applied):
            # Also to who has nothing at all: the first membership is not in the log. (While nothing
            # is applied, only those know this leader who were given the same membership.)
            return self._maybe_send_snapshot(node, progress)
        entries: Sequence[Entry] = ()
        if progress.state != REPLICATE or not progress.inflight_is_full():
            entries = log.slice(progress.next, log.last, self.config.max_append_bytes)
        if not entries and not even_if_empty:
            return False
        self._send(
            APP,
            node,
            index=previous,
            log_term=log.term(previous),
            commit=log.committed,
            entries=entries,
        )
        progress.sent(entries)
        progress.sent_commit = min(log.committed, previous + len(entries))
        return True

    def _maybe_send_snapshot(self, node: int, progress: Progress) -> bool:
        if not progress.recent_active:
            return False  # It would not even notice; its first sign of life brings us here again.
        log = self.log
        if log.applied < log.offset:
            return False  # This leader is itself still installing one.
        snapshot = Snapshot(
            log.applied,
            log.term(log.applied),
            tuple(sorted(self.voters)),
            tuple(sorted(self.learners)),
        )
        progress.become_snapshot(snapshot.index)
        self._send(SNAP, node, snapshot=snapshot)
        return True

    def _on_app_resp(self, message: Message) -> None:
        node = message.sender
        progress = self.progress.get(node)
        if progress is None:
            return
        progress.recent_active = True
        log = self.log
        index = message.index
        if message.reject:
            hint = message.hint
            if message.log_term:
                hint = log.last_index_not_above(hint, message.log_term)
            if progress.maybe_decrease(index, hint):
                if progress.state == REPLICATE:
                    progress.become_probe()
                self._send_append(node)
            return
        if index > log.last:
            raise RaftInvariantError(f"{node:x} has entry {index}, the leader only {log.last}")
        if not progress.maybe_update(index) and not (
            progress.state == PROBE and progress.match == index
        ):
            return
        if progress.state == PROBE or (progress.state == SNAPSHOT and progress.match >= log.offset):
            progress.become_replicate()
        elif progress.state == SNAPSHOT and progress.match >= progress.pending_snapshot:
            progress.become_probe()  # It has it, but the log was compacted further meanwhile.
        elif progress.state == REPLICATE:
            progress.free_inflight(index)
        if node in self.voters and self._maybe_commit():
            self._broadcast_append()
        elif progress.sent_commit < min(log.committed, progress.next - 1):
            self._send_append(node)
        while self._maybe_send_append(node, even_if_empty=False):
            pass
        if node == self._transferee and progress.match == log.last:
            self._send(TIMEOUT_NOW, node)

    # The leader: heartbeats and reads.

    def _broadcast_heartbeat(self) -> None:
        # A round of reads whose heartbeats got lost is asked for again with every heartbeat.
        context = self._round.to_bytes(8, "little") if self._round_reads else b""
        for node in self._others():
            commit = min(self.progress[node].match, self.log.committed)
            self._send(HEARTBEAT, node, commit=commit, context=context)

    def _on_heartbeat_resp(self, message: Message) -> None:
        progress = self.progress.get(message.sender)
        if progress is None:
            return
        progress.recent_active = True
        progress.paused = False
        if progress.match < self.log.last or progress.state == PROBE:
            # Also when the window is full: this append is then empty and finds out what was lost.
            self._send_append(message.sender)
        if (
            self._round_reads
            and message.sender in self.voters
            and message.context == self._round.to_bytes(8, "little")
        ):
            self._round_acks.add(message.sender)
            self._finish_round_if_confirmed()
            self._start_round_if_due()
        progress.committed = max(progress.committed, message.commit)
        if self._removal_index:
            self._go_if_removal_is_known()

    def _on_read_index(self, message: Message) -> None:
        if len(self._reads_waiting) < MAX_WAITING_READS:
            self._take_read(message.sender, message.context)

    def _take_read(self, node: int, context: bytes) -> None:
        self._reads_waiting.append((node, context))
        self._start_round_if_due()

    def _start_round_if_due(self) -> None:
        """One round at a time: it confirms all reads that wait when it begins."""
        if not self._reads_waiting or self._round_reads or not self._has_committed_in_term():
            return
        self._round += 1
        self._round_reads = self._reads_waiting
        self._reads_waiting = []
        self._round_index = self.log.committed
        self._round_acks = {self.id}
        if self._is_sole_voter():
            self._finish_round_if_confirmed()
        else:
            self._broadcast_heartbeat()

    def _finish_round_if_confirmed(self) -> None:
        if len(self._round_acks & self.voters) < len(self.voters) // 2 + 1:
            return
        reads, self._round_reads = self._round_reads, []
        for node, context in reads:
            self._answer_read(node, context)

    def _answer_read(self, node: int, context: bytes) -> None:
        index = self._round_index
        if node == self.id:
            self._read_states.append(ReadState(index, context))
        else:
            self._send(READ_INDEX_RESP, node, index=index, context=context)

    # The follower.

    def _follow(self, message: Message) -> None:
        if self.role != FOLLOWER:
            self._become_follower(self.term, message.sender)
        elif self.leader != message.sender:
            if self.leader:
                raise RaftInvariantError(
                    f"term {self.term} has two leaders: {self.leader:x} and {message.sender:x}"
                )
            self.leader = message.sender
        self._election_elapsed = 0

    def _on_second_leader(self, message: Message) -> None:
        raise RaftInvariantError(
            f"term {self.term} has two leaders: {self.id:x} and {message.sender:x}"
        )

    def _on_app(self, message: Message) -> None:
        self._follow(message)
        log = self.log
        leader = message.sender
        if message.index < log.committed:
            self._send_after_sync(APP_RESP, leader, index=log.committed)
            return
        last_new = log.maybe_append(
            message.index, message.log_term, message.entries, message.commit
        )
        if last_new is not None:
            self._send_after_sync(APP_RESP, leader, index=last_new)
            return
        # Tell the leader where to look next: below the refused entry, and not at entries of a term
        # above that entry's, which cannot match (as etcd does; thesis 3.5).
        hint = log.last_index_not_above(min(message.index, log.last), message.log_term)
        self._send_after_sync(
            APP_RESP,
            leader,
            index=message.index,
            log_term=max(0, log.term(hint)),
            reject=True,
            hint=hint,
        )

    def _on_heartbeat(self, message: Message) -> None:
        self._follow(message)
        self.log.commit_to(message.commit)
        self._send(
            HEARTBEAT_RESP, message.sender, commit=self.log.committed, context=message.context
        )

    def _on_snap(self, message: Message) -> None:
        self._follow(message)
        if message.snapshot is None:
            raise RaftInvariantError("a Snap message without a snapshot")
        self._maybe_restore(message.snapshot)
        self._send_after_sync(APP_RESP, message.sender, index=self.log.committed)

    def _maybe_restore(self, snapshot: Snapshot) -> None:
        """Replace log and membership by the snapshot, unless the log has all of it already."""
        log = self.log
        if snapshot.index <= log.committed:
            return
        if log.term(snapshot.index) == snapshot.term:
            log.commit_to(snapshot.index)
            return
        log.restore(snapshot.index, snapshot.term)
        self.voters = set(snapshot.voters)
        self.learners = set(snapshot.learners)
        self.progress = {}
        self._track_members()
        self._snapshot = snapshot

    def _on_read_index_resp(self, message: Message) -> None:
        self._read_states.append(ReadState(message.index, message.context))

    # Sending.

    def _send(self, kind: int, to: int, **fields: Any) -> None:
        """Send a message that may leave before anything is durable."""
        self._messages.append(self._message(kind, to, **fields))

    def _send_after_sync(self, kind: int, to: int, **fields: Any) -> None:
        """Send a message that must not leave before the next Ready is durable."""
        self._messages_after_sync.append(self._message(kind, to, **fields))

    def _message(self, kind: int, to: int, term: int | None = None, **fields: Any) -> Message:
        return Message(kind, to, self.id, self.term if term is None else term, **fields)


_FROM_LEADER: dict[int, Callable[[Raft, Message], None]] = {
    APP: Raft._on_app,
    HEARTBEAT: Raft._on_heartbeat,
    SNAP: Raft._on_snap,
}

_HANDLERS: dict[int, dict[int, Callable[[Raft, Message], None]]] = {
    FOLLOWER: {
        **_FROM_LEADER,
        TIMEOUT_NOW: Raft._on_timeout_now,
        READ_INDEX_RESP: Raft._on_read_index_resp,
    },
    PRE_CANDIDATE: {**_FROM_LEADER, PRE_VOTE_RESP: Raft._on_vote_resp},
    CANDIDATE: {**_FROM_LEADER, VOTE_RESP: Raft._on_vote_resp},
    LEADER: {
        APP: Raft._on_second_leader,
        HEARTBEAT: Raft._on_second_leader,
        SNAP: Raft._on_second_leader,
        APP_RESP: Raft._on_app_resp,
        HEARTBEAT_RESP: Raft._on_heartbeat_resp,
        READ_INDEX: Raft._on_read_index,
    },
}
"""What a member in a role does with a message of its own term; what is not here is ignored."""


class Progress:
    """What a leader knows about one member's log, and how it sends to it.

    match      the last entry that the member is known to have
    next       the next entry to send
    committed  what the member is known to know as committed
    probe      one append at a time, until an answer shows where the logs agree
    replicate  appends are streamed ahead of the answers, within a window
    snapshot   no appends: `pending_snapshot` is on its way
    kept_index the log is kept from here on until the member has caught up after a snapshot; or 0
    """

    __slots__ = (
        "_inflight",
        "_inflight_bytes",
        "_max_bytes",
        "_max_messages",
        "committed",
        "kept_index",
        "match",
        "next",
        "paused",
        "pending_snapshot",
        "recent_active",
        "sent_commit",
        "state",
    )

    def __init__(self, next: int, config: Config) -> None:
        self.state = PROBE
        self.match = 0
        self.next = next
        self.paused = False
        self.recent_active = False
        self.pending_snapshot = 0
        self.kept_index = 0
        self.sent_commit = 0
        self.committed = 0
        self._max_messages = config.max_inflight_messages
        self._max_bytes = config.max_inflight_bytes
        self._inflight: deque[tuple[int, int]] = deque()
        self._inflight_bytes = 0

    def become_probe(self) -> None:
        after_snapshot = self.pending_snapshot if self.state == SNAPSHOT else 0
        self._become(PROBE)
        self.next = max(self.match, after_snapshot) + 1

    def become_replicate(self) -> None:
        self._become(REPLICATE)
        self.next = self.match + 1

    def become_snapshot(self, index: int) -> None:
        self._become(SNAPSHOT)
        self.pending_snapshot = self.kept_index = index
        self.next = index + 1

    def _become(self, state: int) -> None:
        self.state = state
        self.paused = False
        self.pending_snapshot = 0
        self.sent_commit = 0
        self._inflight.clear()
        self._inflight_bytes = 0

    def is_paused(self) -> bool:
        return self.paused or self.state == SNAPSHOT

    def inflight_is_full(self) -> bool:
        return len(self._inflight) >= self._max_messages or self._inflight_bytes >= self._max_bytes

    def inflight_messages(self) -> int:
        return len(self._inflight)

    def sent(self, entries: Sequence[Entry]) -> None:
        """An append with these entries was sent."""
        if self.state == PROBE:
            self.paused = bool(entries)
            return
        if entries:
            size = sum(len(entry.data) for entry in entries)
            size += ENTRY_OVERHEAD_BYTES * len(entries)
            self.next += len(entries)
            self._inflight.append((self.next - 1, size))
            self._inflight_bytes += size
        # The append that fills the window, or that finds it full, is a probe: wait for an answer.
        self.paused = self.inflight_is_full()

    def free_inflight(self, index: int) -> None:
        while self._inflight and self._inflight[0][0] <= index:
            self._inflight_bytes -= self._inflight.popleft()[1]

    def maybe_update(self, index: int) -> bool:
        """The member has everything up to `index`; False if that is no news."""
        if index <= self.match:
            return False
        self.match = index
        self.next = max(self.next, index + 1)
        self.paused = False
        return True

    def maybe_decrease(self, rejected: int, hint: int) -> bool:
        """The member refused the append after `rejected`; False if that answer is out of date."""
        if self.state == REPLICATE:
            return rejected > self.match
        if self.next - 1 != rejected:
            return False
        self.next = max(min(rejected, hint + 1), self.match + 1)
        self.paused = False
        return True
