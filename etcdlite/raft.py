"""Consensus as a pure state machine: no clock, socket, file or global random.

Names, roles and rules follow Ongaro's Raft thesis and etcd's raft library: `step` takes a message,
`tick` a unit of time, `ready` returns what must be written, sent and applied. etcd's `advance`
comes in its asynchronous form, as two calls: `persisted` and `applied`. Work is pipelined: `ready`
may be called again while earlier Readys are still being written.

The owner handles a `Ready` in this order:

1. `messages` may leave at once, before anything is durable (thesis 10.2.1).
2. `snapshot`, `hard_state` and `entries` are written, the hard state not later than the entries.
   Readys become durable in the order in which they were taken. Entries replace everything that
   was written before at the same and at higher indexes.
3. When this Ready and all earlier ones are durable, `messages_after_sync` leave (those addressed
   to this member itself go to `step`), and `persisted(index, term)` is called with the last of
   `entries`: once for every Ready that has entries, in order.
4. `committed_entries`, which are durable already, are applied in order; then `applied(index)` is
   called. For an accepted conf change entry, `apply_conf_change` is called before `applied`. A
   `snapshot` is installed and synced before later entries; then `applied(snapshot.index)`.
5. `read_states` are answered once `applied` has reached their index.

Invariants, checked while running and fatal when broken (`RaftInvariantError`):

- a leader never drops or changes entries of its own log;
- applied <= applying <= committed <= last, stable <= offered <= last, and offset <= applied except
  while a snapshot is being installed (`RaftLog` defines these marks);
- an entry is applied only when it is committed and durable on this member;
- a member becomes leader only when its own vote is durable. Otherwise it could forget the vote in
  a crash, be elected again in the same term, and write another entry at the same index and term.
  The exception is a member that is alone: its hard state is written with the entries that need it.

No message breaks an invariant: `step` raises MessageRejected for one that contradicts what this
member knows, before it changes anything.

The commit index is part of the hard state whenever entries are written, but is never a reason to
write: Raft does not need it durable (thesis 3.8), and the state machine keeps its applied index.
Membership does need it. A leader appends a membership change only when the previous one is
committed, so a log on disk has at most one change beyond its commit index. A restarted member
does not campaign before it has applied the others, so it is at most one change behind.

This part never looks at the `data` of an entry, knows nothing of keys and addresses, and holds no
more than the named limits allow.

Membership changes are one at a time (thesis 4.1, no joint consensus), take effect when they are
applied (as in etcd), and are proposed only once the leader has committed an entry of its term.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from etcdlite.raft_log import (
    ENTRY_CONF_CHANGE,
    ENTRY_NORMAL,
    ENTRY_OVERHEAD_BYTES,
    Entry,
    RaftInvariantError,
    RaftLog,
)
from etcdlite.raft_progress import PROBE, REPLICATE, SNAPSHOT, Progress

MAX_APPEND_BYTES = 1 << 20
"""Entries in one append message; a single larger entry still goes alone."""

MAX_APPLY_BYTES = 1 << 20
"""Entries in one Ready to apply, so that a turn stays short; a larger entry goes alone."""

MAX_INFLIGHT_MESSAGES = 256
MAX_INFLIGHT_BYTES = 16 << 20
"""Appends sent to one follower and not yet acknowledged by it."""

MAX_LOG_TAILS = 4
"""For members that receive a snapshot the log is kept up to this multiple of `log_tail_bytes`."""

MAX_UNCOMMITTED_BYTES = 64 << 20
"""Uncommitted entries that a leader accepts; more are refused."""

MAX_WAITING_READS = 4096
"""Read requests that wait at the leader for a round of heartbeats."""

MAX_TERM_STEP = 1 << 32
"""A message's term is at most this far above ours. One election per second takes 136 years."""

LOG_TAIL_BYTES = 16 << 20
"""Applied entries that compaction keeps in memory for slow followers."""

DROPS_PER_TAIL = 64
"""A member that is alone drops its entries when they fill this fraction (1/64) of the tail."""

FOLLOWER, PRE_CANDIDATE, CANDIDATE, LEADER = range(4)
ROLE_NAMES = ("follower", "pre-candidate", "candidate", "leader")

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

ADD_VOTER, ADD_LEARNER, REMOVE = range(3)

CAMPAIGN_TRANSFER = b"transfer"
"""Context of a vote request that a leadership transfer caused: granted beside a live leader."""


class MessageRejected(ValueError):
    """The sender's fault: the message contradicts what this member knows. Nothing was changed."""


class NotLeader(Exception):
    """Only the leader can take the request; `leader` is its id, 0 if unknown."""

    def __init__(self, leader: int) -> None:
        super().__init__(leader)
        self.leader = leader


class RequestDropped(Exception):
    """The request was refused for a temporary reason, which the text names. Try again later."""


class HardState(NamedTuple):
    """What must be durable before a vote or an acknowledgement leaves."""

    term: int = 0
    vote: int = 0
    commit: int = 0


NO_HARD_STATE = HardState()
"""The hard state of a member that never ran."""


class SoftState(NamedTuple):
    """The id of the leader (0 if unknown) and the role of this member."""

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
    TimeoutNow     nothing: the receiver campaigns at once
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
    """What there is to do, in the order of the module docstring. Empty fields mean nothing."""

    hard_state: HardState | None = None
    entries: Sequence[Entry] = ()
    committed_entries: Sequence[Entry] = ()
    messages: Sequence[Message] = ()
    messages_after_sync: Sequence[Message] = ()
    read_states: Sequence[ReadState] = ()
    soft_state: SoftState | None = None
    snapshot: Snapshot | None = None


NOTHING_READY = Ready()
"""`Raft.ready` returns this very object when there is nothing to do."""


class Config(NamedTuple):
    """One member's settings. Times are in ticks; the owner chooses their length.

    `id` is this member's and not 0. A follower that hears from no leader campaigns after a random
    time of `election_ticks` to twice that; a leader sends heartbeats every `heartbeat_ticks`."""

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

    It starts from the recovered log: `entries` follow the entry (`snapshot_index`, `snapshot_term`)
    without a gap, `applied` is the last entry that the state machine contains, and `voters` and
    `learners` are the membership at that entry. A member that is the only voter campaigns at once.

    The first members of a cluster start with the same membership, which is not in the log, and an
    empty log. A member that joins later starts with neither and learns both from the leader. An id
    must never be used again after its member was removed.

    Public attributes are for reading: `id term vote role leader voters learners progress log`,
    `recovered`, the term and the last index with which it started, and `has_ready`: `ready` may
    return something. Every method that can give it something sets this."""

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
            # The entries reached the disk and the hard state written with them did not. So no vote
            # of that term was given either.
            self.term = last_term
            self.vote = 0
        self.recovered = (self.term, self.log.last)
        self.role = FOLLOWER
        self._rng = rng
        self._saved = hard_state
        self._given = (hard_state.term, hard_state.vote, 0, FOLLOWER)  # In the last Ready.
        self.has_ready = True
        self._messages: list[Message] = []
        self._messages_after_sync: list[Message] = []
        self._read_states: list[ReadState] = []
        self._snapshot: Snapshot | None = None
        self._acknowledged = (0, 0)  # By the last answer: (leader's term, index).
        self._reset(self.term)
        self._campaign_if_sole_voter()

    def _reset(self, term: int) -> None:
        """Begin a term, or another role in it, and forget what belongs to the last one."""
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
        self._votes: dict[int, bool] = {}
        # Used by a leader: the member that leadership is being transferred to, the last conf change
        # that may be unapplied, the size of the uncommitted entries, and, if this leader is
        # removed, the commit index that a quorum must know before it steps down.
        self._transferee = 0
        self._pending_conf_index = 0
        self._uncommitted_bytes = 0
        self._removal_index = 0
        # Whether the others lack the commit index (the next append or `send_commit` tells them);
        # the last entry of which they are told as soon as it is committed.
        self.commit_is_unsent, self._awaited_index = False, 0
        # Reads as (member that asked, context): waiting for a round, and in the current round.
        self._reads_waiting: list[tuple[int, bytes]] = []
        self._round_reads: list[tuple[int, bytes]] = []
        self._round = self._round_index = 0
        self._round_acks: set[int] = set()
        self.progress: dict[int, Progress] = {}
        self._track_members()

    # Input and output.

    def ready(self) -> Ready:
        """What there is to do now. Each message, entry and state is returned once."""
        if not self.has_ready:
            return NOTHING_READY
        log = self.log
        entries = log.offer() if log.offered < log.last else ()
        committed: Sequence[Entry] = ()
        self.has_ready = False
        if log.applying < log.committed:
            committed = log.next_committed(self.config.max_apply_bytes)
            if committed and log.applying < log.committed:
                self.has_ready = log.has_next_committed()
        # The owner keeps the lists.
        messages: Sequence[Message] = ()
        later: Sequence[Message] = ()
        reads: Sequence[ReadState] = ()
        if self._messages:
            messages, self._messages = self._messages, []
        if self._messages_after_sync:
            later, self._messages_after_sync = self._messages_after_sync, []
        if self._read_states:
            reads, self._read_states = self._read_states, []
        snapshot, self._snapshot = self._snapshot, None
        hard_state = soft_state = None
        given = (self.term, self.vote, self.leader, self.role)
        if given != self._given:
            if given[2:] != self._given[2:]:
                soft_state = SoftState(self.leader, self.role)
            if given[:2] != self._given[:2]:
                hard_state = self._saved = self.hard_state
            self._given = given
        elif not (entries or committed or messages or later or reads or snapshot):
            return NOTHING_READY
        if (entries or snapshot) and log.committed != self._saved.commit:
            hard_state = self._saved = self.hard_state
        return Ready(hard_state, entries, committed, messages, later, reads, soft_state, snapshot)

    @property
    def hard_state(self) -> HardState:
        """The hard state now, commit index included."""
        return HardState(self.term, self.vote, self.log.committed)

    def persisted(self, index: int, term: int) -> None:
        """The entries of the Ready that ended with (index, term) are durable, and all before.

        Call it for every Ready that has entries, in order. Entries that were overwritten since do
        not count."""
        log = self.log
        log.stable_to(index, term)
        own = self.progress.get(self.id)
        if self.role == LEADER and own is not None and log.stable > own.match:
            own.match = log.stable
            if self._maybe_commit() and not self.commit_is_unsent:
                self._broadcast_append()
        if log.applying < log.committed:
            self.has_ready = True

    def applied(self, index: int) -> None:
        """The state machine contains everything up to `index`."""
        log = self.log
        log.applied_to(index)
        # What is committed may follow a snapshot, which is installed now.
        if log.applying < log.committed and log.has_next_committed():
            self.has_ready = True
        self._campaign_if_sole_voter()

    def step(self, message: Message) -> None:
        """Take one message. Stale and unexpected ones are ignored, as Raft requires.

        Raises MessageRejected, before anything changes, for one that no correct member sends."""
        self.has_ready = True
        kind = message.kind
        term = message.term
        if term > self.term:
            if term - self.term > MAX_TERM_STEP:
                raise MessageRejected(f"term {term} is far above this member's, {self.term}")
            if kind in _CHECKS:  # Its handler checks it again, but only after a change of term.
                _CHECKS[kind](self, message)
            if kind in (VOTE, PRE_VOTE):
                if self.has_live_leader and message.context != CAMPAIGN_TRANSFER:
                    return  # Ignore vote requests while a leader is live (thesis 4.2.3).
            # A pre-vote changes no term. Neither does its grant, which carries the term that the
            # candidate would have.
            if kind != PRE_VOTE and (kind != PRE_VOTE_RESP or message.reject):
                self._become_follower(term, message.sender if kind in (APP, HEARTBEAT, SNAP) else 0)
        elif term < self.term:
            if kind in (APP, HEARTBEAT):
                # A deposed leader learns the higher term from the answer. Vote requests would tell
                # it too, but with pre-vote there may be none.
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
        self._election_elapsed += 1
        if self.role != LEADER:
            if self._election_elapsed >= self._election_timeout and self._is_promotable():
                self._election_elapsed = 0
                self.campaign()
            return
        if self._election_elapsed >= self.config.election_ticks:
            self._election_elapsed = 0
            self._transferee = 0  # It had its time; proposals are taken again.
            self._check_quorum()
            if self.role != LEADER:
                return
        self._heartbeat_elapsed += 1
        if self._heartbeat_elapsed >= self.config.heartbeat_ticks:
            self._heartbeat_elapsed = 0
            self._broadcast_heartbeat()

    # Requests.

    def propose(self, data: bytes, commit_may_wait: bool = False) -> int:
        """Append an entry to the leader's log and return its index. It may still be lost.

        `commit_may_wait`: no other member waits for it, so the others may learn only with the next
        append that it is committed.
        Raises NotLeader; RequestDropped while leadership is being transferred, and when more than
        `max_uncommitted_bytes` are uncommitted."""
        self._check_can_propose()
        size = len(data) + ENTRY_OVERHEAD_BYTES
        if (
            self._uncommitted_bytes
            and self._uncommitted_bytes + size > self.config.max_uncommitted_bytes
        ):
            raise RequestDropped("too many uncommitted entries")
        return self._append(ENTRY_NORMAL, data, commit_may_wait)

    def send_commit(self) -> None:
        """Tell the others what is committed, if `commit_is_unsent`."""
        if self.commit_is_unsent:
            self.has_ready = True
            self._broadcast_append()

    def propose_conf_change(self, data: bytes) -> int:
        """Append a membership change, encoded by the owner in `data`, and return its index.

        Raises NotLeader; RequestDropped as `propose` does, while an earlier change may be
        unapplied, and while nothing of the leader's term is committed (thesis 4.1, with the
        correction of 2015)."""
        self._check_can_propose()
        if self._pending_conf_index > self.log.applied:
            raise RequestDropped("another membership change is in progress")
        if not self._has_committed_in_term():
            raise RequestDropped("the leader has not committed an entry of its term yet")
        self._pending_conf_index = self._append(ENTRY_CONF_CHANGE, data)
        return self._pending_conf_index

    def read_index(self, context: bytes) -> None:
        """Ask for the ReadState of a linearizable read (thesis 6.4); `context` identifies it.

        A sole voter answers with the next Ready, others after a round of heartbeats, and all of
        them only once an entry of the term is committed. The answer is lost with a message or with
        leadership: ask again after a timeout or when the soft state changes. Raises NotLeader(0)
        when no leader is known, RequestDropped when MAX_WAITING_READS are waiting."""
        self.has_ready = True
        if self.role == LEADER:
            if len(self._reads_waiting) >= MAX_WAITING_READS:
                raise RequestDropped("too many waiting reads")
            self._take_read(self.id, context)
        elif self.leader:
            self._send(READ_INDEX, self.leader, context=context)
        else:
            raise NotLeader(0)

    def campaign(self) -> None:
        """Start an election, with a pre-vote first unless `pre_vote` is off. Does nothing on a
        leader, on a learner, and while a committed membership change is not applied."""
        if self._may_campaign():
            self.has_ready = True
            if self.config.pre_vote and self.voters != {self.id}:
                self._campaign(PRE_VOTE, b"")
            else:
                self._campaign(VOTE, b"")

    def forget_leader(self) -> None:
        """The leader is known to be dead: stop refusing votes because of it.

        For a follower whose connection to the leader was reset and then refused. If the leader
        lives after all, its next message restores it."""
        if self.role == FOLLOWER:
            self.has_ready = True
            self.leader = 0

    def transfer_leader(self, node: int) -> None:
        """Hand leadership to the voter `node` once it has the whole log (thesis 3.10).

        Until then, for at most an election timeout, proposals are dropped. Raises NotLeader, and
        ValueError if `node` is not another voter."""
        if self.role != LEADER:
            raise NotLeader(self.leader)
        if node == self.id or node not in self.voters:
            raise ValueError(f"{node:x} is not another voter")
        self.has_ready = True
        self._transferee = node
        self._election_elapsed = 0
        if self.progress[node].match == self.log.last:
            self._send(TIMEOUT_NOW, node)
        else:
            self._maybe_send_append(node)

    @property
    def is_sole_voter(self) -> bool:
        """This node leads, and no other one votes."""
        return self.role == LEADER and self.voters == {self.id}

    def apply_conf_change(self, change: ConfChange) -> None:
        """Change the membership as the conf change entry that is being applied says.

        An impossible change (demoting a voter, removing the last one) does nothing, so that all
        members agree whatever the log contains.

        A leader that is removed takes no more proposals. It leads until a quorum of the others
        knows that the change is committed, and should not stop before its role has changed."""
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

    def compact(self, index: int, keeps_tail: bool = True) -> None:
        """Drop entries up to `index`, which is applied, from memory, except for a tail.

        Followers that are a little behind need no snapshot thanks to the tail (`log_tail_bytes`).
        A member that is alone keeps none. Many entries are dropped at once, so most calls do
        nothing. Files are not touched."""
        tail_bytes = self.config.log_tail_bytes if keeps_tail else 0
        if self.log.size_bytes < tail_bytes // DROPS_PER_TAIL:
            return
        if self.is_alone:
            tail_bytes = 0
        if self.log.size_bytes < tail_bytes + tail_bytes // 4:
            return  # Dropping moves the whole tail, so wait until a quarter of it can go.
        if self.role == LEADER:
            # A member that receives a snapshot needs the entries after it. Otherwise it would need
            # the next snapshot at once.
            is_large = self.log.size_bytes >= MAX_LOG_TAILS * self.config.log_tail_bytes
            goal = index
            for progress in self.progress.values():
                if progress.kept_index:
                    is_over = is_large or progress.match >= goal
                    progress.kept_index = 0 if is_over else max(progress.kept_index, progress.match)
                    index = min(index, progress.kept_index or goal)
        self.log.compact(index, tail_bytes)

    def report_unreachable(self, node: int) -> None:
        """Messages to `node` were lost: stop streaming to it and probe what it has."""
        progress = self.progress.get(node)
        if self.role == LEADER and progress is not None and progress.state == REPLICATE:
            progress.become_probe()

    def report_snapshot(self, node: int, delivered: bool) -> None:
        """The snapshot for `node` was delivered, or sending it failed.

        Every Snap message needs this report. Until it comes, or until the node acknowledges the
        snapshot, nothing else is sent to the node."""
        progress = self.progress.get(node)
        if self.role == LEADER and progress is not None and progress.state == SNAPSHOT:
            if not delivered:
                progress.pending_snapshot = progress.kept_index = 0
            progress.become_probe()
            # Before the next attempt, wait until it answers this or a heartbeat.
            progress.paused = True

    def learner_is_ready(self, node: int) -> bool:
        """Whether the learner `node` is active and has nine tenths of the committed log. etcd
        promotes a learner by the second rule alone."""
        progress = self.progress.get(node)
        return (
            self.role == LEADER
            and progress is not None
            and progress.is_active
            and progress.match * 10 >= self.log.committed * 9
        )

    # Roles.

    def _become_follower(self, term: int, leader: int) -> None:
        self.has_ready = True
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
        # Any unapplied entry may be a conf change. Only when all are applied is none pending.
        self._pending_conf_index = self.log.last
        self._append(ENTRY_NORMAL, b"")

    def _is_promotable(self) -> bool:
        return self.id in self.voters and self.log.applied >= self.log.offset

    @property
    def has_live_leader(self) -> bool:
        return self.leader > 0 and self._election_elapsed < self.config.election_ticks

    @property
    def is_alone(self) -> bool:
        return self.voters == {self.id} and not self.learners

    def _may_campaign(self) -> bool:
        return (
            self.role != LEADER
            and self._is_promotable()
            and not self.log.has_unapplied_conf_change()
        )

    def _campaign_if_sole_voter(self) -> None:
        if self.role == FOLLOWER and self.voters == {self.id}:
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
            if self.is_alone:
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
        is_pre_vote = message.kind == PRE_VOTE
        can_vote = (
            self.vote == message.sender
            or (self.vote == 0 and self.leader == 0)
            or (is_pre_vote and message.term > self.term)
        )
        up_to_date = (message.log_term, message.index) >= (log.term(log.last), log.last)
        granted = can_vote and up_to_date
        if granted and not is_pre_vote:
            self.vote = message.sender
            self._election_elapsed = 0
        answer = {} if granted else self._vote_refusal()
        if not is_pre_vote:
            self._send_after_sync(VOTE_RESP, message.sender, **answer)
            return
        # The grant of a pre-vote carries the term that was asked for, or the candidate would take
        # it for a stale message; a refusal carries ours, so that it learns of a higher one.
        term = message.term if granted else self.term
        self._send(PRE_VOTE_RESP, message.sender, term=term, **answer)

    def _vote_refusal(self) -> dict[str, Any]:
        committed = self.log.committed
        return {"commit": committed, "log_term": self.log.term(committed), "reject": True}

    def _on_vote_resp(self, message: Message) -> None:
        if message.reject and self.log.term(message.commit) == message.log_term:
            # The sender's log is longer, so it will never vote for this member. But among the
            # entries that it knows to be committed may be the membership change that removes it,
            # after which its vote is not needed. (A leader that removed itself from a cluster of
            # two; TiKV's raft-rs does the same.)
            self.log.commit_to(message.commit)
        # Only the first answer counts: a repeated message does not change a vote.
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
        self._check_leader(message)
        if self._may_campaign():
            self._campaign(VOTE, CAMPAIGN_TRANSFER)

    def _check_quorum(self) -> None:
        """Step down if no quorum was active for an election timeout (thesis 6.2)."""
        others = self.voters - {self.id}
        active = sum(self.progress[node].recent_active for node in others)
        if active + (self.id in self.voters) < len(self.voters) // 2 + 1:
            # Where only the answers are lost, the others would wait for another election timeout.
            self._send(TIMEOUT_NOW, max(others, key=lambda node: self.progress[node].match))
            self._become_follower(self.term, 0)
            return
        for progress in self.progress.values():
            progress.was_active, progress.recent_active = progress.recent_active, False

    # Membership.

    def _track_members(self) -> None:
        for node in self.voters | self.learners:
            if node not in self.progress:
                self.progress[node] = Progress(
                    self.log.last + 1,
                    self.config.max_inflight_messages,
                    self.config.max_inflight_bytes,
                )
        self._others = sorted(node for node in self.progress if node != self.id)

    def _membership_changed(self) -> None:
        self.has_ready = True
        for node in self.progress.keys() - self.voters - self.learners:
            del self.progress[node]
        known = self.progress.keys() | set()
        self._track_members()
        if self.role != LEADER:
            if self.role != FOLLOWER and self.id not in self.voters:
                self._become_follower(self.term, 0)
            return
        for node in self.progress.keys() - known:
            self.progress[node].recent_active = True  # It has an election timeout to connect.
        if self.id not in self.voters:
            self._removal_index = self.log.committed
            self._broadcast_heartbeat()
        if self._transferee not in self.voters:
            self._transferee = 0
        # A smaller quorum may commit more entries and confirm reads.
        if self._maybe_commit():
            self._broadcast_append()
        else:
            for node in self._others:
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

    def _append(self, kind: int, data: bytes, commit_may_wait: bool = False) -> int:
        self.has_ready = True
        log = self.log
        index = log.last + 1
        if not commit_may_wait:
            self._awaited_index = index
        log.append(Entry(self.term, index, kind, data))
        self._uncommitted_bytes += len(data) + ENTRY_OVERHEAD_BYTES
        self._broadcast_append()
        return index

    def _has_committed_in_term(self) -> bool:
        return self.log.term(self.log.committed) == self.term

    def _maybe_commit(self) -> bool:
        """Commit what a quorum has if it is of this term (thesis 3.6.2). Returns whether it did."""
        log = self.log
        matches = sorted([self.progress[node].match for node in self.voters])
        index = matches[(len(matches) - 1) // 2]
        if index <= log.committed or log.term(index) != self.term:
            return False
        left_bytes = 0
        if index < log.last:
            left_bytes = self._uncommitted_bytes - log.size_between(log.committed, index)
        self._uncommitted_bytes = max(0, left_bytes)
        self.commit_is_unsent = bool(self._others) and self._awaited_index <= log.committed
        log.commit_to(index)
        self._start_round_if_due()
        return True

    def _broadcast_append(self) -> None:
        self.commit_is_unsent = False
        for node in self._others:
            self._maybe_send_append(node)

    def _maybe_send_append(self, node: int, even_if_empty: bool = True) -> bool:
        """Send a follower the next entries, or a snapshot if the log no longer has them.

        Nothing is sent while the follower is paused. An append without entries is useful only for
        its commit index. Returns whether something was sent."""
        progress = self.progress[node]
        if progress.is_paused():
            return False
        log = self.log
        previous = progress.next - 1
        if previous < log.offset or (previous == 0 and log.applied):
            # A member without any entry needs a snapshot too: the first membership is not in the
            # log. (While nothing is applied, this leader is known only to members that were started
            # with the same membership.)
            return self._maybe_send_snapshot(node, progress)
        entries: Sequence[Entry] = ()
        if previous < log.last and (progress.state != REPLICATE or not progress.inflight_is_full()):
            entries = log.slice(progress.next, log.last, self.config.max_append_bytes)
        if not entries and not even_if_empty:
            return False
        # The hot path of writes, so without `_send`, which costs a microsecond more.
        index, log_term = previous, log.term(previous)
        self._messages.append(
            Message(APP, node, self.id, self.term, index, log_term, log.committed, entries)
        )
        progress.sent(entries)
        progress.sent_commit = min(log.committed, previous + len(entries))
        return True

    def _maybe_send_snapshot(self, node: int, progress: Progress) -> bool:
        if not progress.recent_active:
            return False  # The follower is down. Its first message leads to another attempt.
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
        log = self.log
        index = message.index
        if index > log.last and not message.reject:
            raise MessageRejected(f"{node:x} has entry {index}, the leader only {log.last}")
        progress = self.progress.get(node)
        if progress is None:
            return
        progress.recent_active = True
        if message.reject:
            hint = message.hint
            if message.log_term:
                hint = log.last_index_not_above(hint, message.log_term)
            if progress.maybe_decrease(index, hint):
                if progress.state == REPLICATE:
                    progress.become_probe()
                self._maybe_send_append(node)
            return
        if not progress.maybe_update(index) and not (
            progress.state == PROBE and progress.match == index
        ):
            return
        if progress.state == PROBE or (progress.state == SNAPSHOT and progress.match >= log.offset):
            progress.become_replicate()
        elif progress.state == SNAPSHOT and progress.match >= progress.pending_snapshot:
            progress.become_probe()  # The log was compacted further since the snapshot.
        elif progress.state == REPLICATE:
            progress.free_inflight(index)
        wanted = 0 if self.commit_is_unsent else min(log.committed, progress.next - 1)
        if index > log.committed and node in self.voters and self._maybe_commit():
            if not self.commit_is_unsent:
                self._broadcast_append()
        elif progress.sent_commit < wanted:
            self._maybe_send_append(node)
        while progress.next <= log.last and self._maybe_send_append(node, even_if_empty=False):
            pass
        if node == self._transferee and progress.match == log.last:
            self._send(TIMEOUT_NOW, node)

    # The leader: heartbeats and reads.

    def _broadcast_heartbeat(self) -> None:
        # Every heartbeat repeats the round of reads, because earlier ones may be lost.
        context = self._round.to_bytes(8, "little") if self._round_reads else b""
        for node in self._others:
            commit = min(self.progress[node].match, self.log.committed)
            self._send(HEARTBEAT, node, commit=commit, context=context)

    def _on_heartbeat_resp(self, message: Message) -> None:
        progress = self.progress.get(message.sender)
        if progress is None:
            return
        progress.recent_active = True
        progress.paused = False
        if progress.match < self.log.last or progress.state == PROBE:
            # If the window is full this append is empty; its answer shows what was lost.
            self._maybe_send_append(message.sender)
        if (
            self._round_reads
            and message.sender in self.voters
            and message.context == self._round.to_bytes(8, "little")
        ):
            self._round_acks.add(message.sender)
            self._finish_round_if_confirmed()
            self._start_round_if_due()
        progress.committed = max(progress.committed, message.commit)
        if self._removal_index:  # The removal of this leader: it steps down once that is known.
            indices = [self.progress[voter].committed for voter in self.voters]
            if sum(index >= self._removal_index for index in indices) > len(indices) // 2:
                self._become_follower(self.term, 0)

    def _on_read_index(self, message: Message) -> None:
        if len(self._reads_waiting) < MAX_WAITING_READS:
            self._take_read(message.sender, message.context)

    def _take_read(self, node: int, context: bytes) -> None:
        self._reads_waiting.append((node, context))
        self._start_round_if_due()

    def _start_round_if_due(self) -> None:
        """Start a round for all waiting reads, unless one is running."""
        if not self._reads_waiting or self._round_reads or not self._has_committed_in_term():
            return
        self._round += 1
        self._round_reads = self._reads_waiting
        self._reads_waiting = []
        self._round_index = self.log.committed
        self._round_acks = {self.id}
        if self.voters == {self.id}:
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

    # The follower. Each handler checks its message before it changes anything.

    def _check_leader(self, message: Message) -> None:
        leader = self.id if self.role == LEADER else self.leader
        if leader not in (0, message.sender):
            raise MessageRejected(
                f"term {self.term} has two leaders: {leader:x} and {message.sender:x}"
            )

    def _check_entries(self, message: Message) -> None:
        """The entries must be such as a leader of the message's term can have."""
        index, term = message.index, message.log_term
        for entry in message.entries:
            index += 1
            if entry.index != index or entry.term < term or entry.kind > ENTRY_CONF_CHANGE:
                raise MessageRejected(
                    f"an append has entry {entry.index} of term {entry.term} and kind {entry.kind}"
                    f" where entry {index} of term {term} or later must be"
                )
            term = entry.term
        if term > message.term:
            raise MessageRejected(f"a leader of term {message.term} has an entry of term {term}")

    def _check_commit(self, message: Message) -> None:
        if message.commit > self.log.last:
            raise MessageRejected(
                f"entry {message.commit} is committed, but the log ends with {self.log.last}"
            )

    def _check_snapshot(self, message: Message) -> None:
        snapshot = message.snapshot
        if snapshot is None or not snapshot.voters or snapshot.term > message.term:
            raise MessageRejected(f"a Snap message with {snapshot}")

    def _follow(self, message: Message) -> None:
        if self.leader != message.sender:
            self._check_leader(message)
            if self.role != FOLLOWER:
                self._become_follower(self.term, message.sender)
            self.leader = message.sender
        self._election_elapsed = 0

    def _on_app(self, message: Message) -> None:
        if message.entries:
            self._check_entries(message)
        self._follow(message)
        log = self.log
        leader = message.sender
        if message.index < log.committed:
            self._send_after_sync(APP_RESP, leader, index=log.committed)
            return
        committed = log.committed
        last_new = log.maybe_append(
            message.index, message.log_term, message.entries, message.commit
        )
        if last_new is not None:
            acknowledged = (self.term, last_new)
            if message.entries or log.committed == committed or self._acknowledged != acknowledged:
                self._acknowledged = acknowledged
                self._send_after_sync(APP_RESP, leader, index=last_new)
            # Otherwise only the commit index is new. If the answer was lost, it is asked for again.
            return
        # The hint tells the leader where to look next: below the refused entry, and below entries
        # of a higher term than that entry's, which cannot match (as in etcd; thesis 3.5).
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
        self._check_commit(message)
        self._follow(message)
        self.log.commit_to(message.commit)
        self._send(
            HEARTBEAT_RESP, message.sender, commit=self.log.committed, context=message.context
        )

    def _on_snap(self, message: Message) -> None:
        self._check_snapshot(message)
        self._follow(message)
        assert message.snapshot is not None
        self._maybe_restore(message.snapshot)
        self._send_after_sync(APP_RESP, message.sender, index=self.log.committed)

    def _maybe_restore(self, snapshot: Snapshot) -> None:
        """Replace log and membership by the snapshot, unless the log contains it already."""
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
        self._check_leader(message)
        self._read_states.append(ReadState(message.index, message.context))

    # Sending.

    def _send(self, kind: int, to: int, **fields: Any) -> None:
        """Send a message that may leave before anything is durable."""
        self.has_ready = True
        self._messages.append(Message(kind, to, self.id, fields.pop("term", self.term), **fields))

    def _send_after_sync(
        self,
        kind: int,
        to: int,
        index: int = 0,
        log_term: int = 0,
        commit: int = 0,
        reject: bool = False,
        hint: int = 0,
    ) -> None:
        """Send a message that must not leave before the next Ready is durable."""
        self._messages_after_sync.append(
            Message(kind, to, self.id, self.term, index, log_term, commit, (), reject, hint)
        )


_CHECKS: dict[int, Callable[[Raft, Message], None]] = {
    APP: Raft._check_entries,
    HEARTBEAT: Raft._check_commit,
    SNAP: Raft._check_snapshot,
}

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
        APP: Raft._check_leader,
        HEARTBEAT: Raft._check_leader,
        SNAP: Raft._check_leader,
        APP_RESP: Raft._on_app_resp,
        HEARTBEAT_RESP: Raft._on_heartbeat_resp,
        READ_INDEX: Raft._on_read_index,
    },
}
"""The handler of a message of the current term, by role and kind; without one it is ignored."""
