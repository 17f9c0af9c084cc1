"""One cluster member, sans-IO: it drives consensus and applies committed entries.

A member joins consensus (`raft.py`), the state machine (`replica/`), the watches (`watch.py`) and
the connections to the other members (`peer.py`). It owns no socket, file handle, thread or clock.
Its owner

- gives it input: requests (through `wire/api.py`), bytes from other members (through `peer.py`),
  and a `tick` per heartbeat interval;
- then calls `begin_turn`, which proposes, `proceed`, which applies and answers for about one time
  slice, and `maintain`, which does a slice of background work;
- appends the result of `take_saves` to the write-ahead log, in order, and then calls `persisted`;
- runs the result of `take_task`, in a thread if it likes, and then calls `finished`;
- runs the results of `logins.take` in threads, and then calls `logins.finished`;
- opens the connections that the links of `peers` want.

A write goes to `writes`, through consensus and into the log; it is applied once it is committed,
and then answered. A read goes to `reads`.

Invariants: nothing is answered before it is applied, nothing applied before it is committed and
durable; a read never sees the effect of part of a request.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from etcdlite import log, methods, proto
from etcdlite.errors import EtcdError, error
from etcdlite.identity import Identity
from etcdlite.methods import PUBLISH
from etcdlite.metrics import Metrics
from etcdlite.mvcc import Store
from etcdlite.options import Options
from etcdlite.peer import FORWARD, Local, Peers, encode_forward
from etcdlite.raft import LEADER, SNAP, Message, MessageRejected, Raft, Ready, Snapshot
from etcdlite.raft_log import ENTRY_CONF_CHANGE, Entry
from etcdlite.replica import membership
from etcdlite.replica.access import Access
from etcdlite.replica.background import SLICE_S, Background
from etcdlite.replica.catch_up import CatchUp
from etcdlite.replica.corruption import HashCheck
from etcdlite.replica.forced import ForcedCluster, Removal
from etcdlite.replica.leadership import Leadership
from etcdlite.replica.leases import LeaseKeeper
from etcdlite.replica.logins import Logins
from etcdlite.replica.maintenance import Maintenance
from etcdlite.replica.questions import Questions
from etcdlite.replica.reachability import Reachability
from etcdlite.replica.reads import Reads
from etcdlite.replica.restoring import Restoring
from etcdlite.replica.rollback import RollbackCheck
from etcdlite.replica.state import State
from etcdlite.replica.time_keeper import TimeKeeper
from etcdlite.replica.version_keeper import VersionKeeper
from etcdlite.replica.writes import Writes
from etcdlite.request import Done, Waiter, warn_slow
from etcdlite.snap import Image, Incoming
from etcdlite.tokens import SimpleTokens, Tokens
from etcdlite.watch import WatchHub

OVERHEAD_BYTES = 512 << 10
"""How much a message may exceed `max-request-bytes` (as in etcd)."""

EXPIRE_STEP_REQUESTS = 64
"""Requests that have waited too long: this many fail between two looks at the clock."""

PUBLISH_RETRY_S = 1.0
"""How often a member checks whether the cluster knows its name and URLs."""

# Subjects of the warning that something took too long, in etcd's words.
APPLY = "apply request"
REQUEST = "request"


class Member:
    """See the module's docstring."""

    _background_at = 0.0
    """When the next slice of background work is due."""
    _expiry: Iterator[None] | None = None
    """The steps that fail requests that have waited too long."""
    _published_at = -math.inf

    def __init__(
        self,
        *,
        cluster_id: int,
        member_id: int,
        store: Store,
        raft: Raft,
        clock: Callable[[], float],
        rng: random.Random,
        options: Options,
        members: Iterable[proto.Member] = (),
        tokens: Tokens | None = None,
    ) -> None:
        """`clock` returns monotonic seconds. `members` are those of the cluster that this member
        joins; they are used until the store knows the membership. `tokens` are simple ones unless
        given."""
        self.raft = raft
        self.clock = clock
        self.rng = rng
        self.options = options
        self.metrics = Metrics()
        self.identity = Identity(cluster_id, member_id, rng.getrandbits(64), raft)
        self.hub = self._make_hub(store)
        state = State(store, self.identity, self.metrics, clock, self._propose_own, options)
        self.state = state
        self.tokens = tokens or SimpleTokens(cluster_id, options.token_ttl_s)
        self.maintenance = Maintenance(state, self._propose_own, self.run_task, options)
        self.rollback = RollbackCheck(
            state, raft, self.run_task, lambda node: self.hash_check.returned(node), options
        )
        self.peers = Peers(Local(state, self, self.rollback, options))
        self.peers.update(state.membership.members or {other.ID: other for other in members})
        directory, received = store.directory, self.snapshot_received
        self.incoming = Incoming(store.disk, directory, raft, self.run_task, received, self.metrics)
        is_open, hear = self.peers.is_open, self.peers.hear
        self.leadership = Leadership(raft, self.identity, clock, is_open, hear, options)
        access = self.access = Access(state, self.tokens, raft)
        self.reads = Reads(state, raft, rng, self.slice_is_over, options, access)
        timeout_error, check = self.leadership.timeout_error, self.check_change
        self.writes = Writes(state, raft, rng, options, self._forward, check, timeout_error, access)
        self.logins = Logins(state, self.tokens, self._propose_own, options.password_cost)
        self.questions = Questions(raft, self.identity, clock, options, self._ask, timeout_error)
        self.leases = LeaseKeeper(state, self.writes)
        self.background = Background(self.reads, self.maintenance, self.leases, self.metrics, clock)
        self.hash_check = HashCheck(state, raft, self.peers, self.reads.read_now)
        self.forced = ForcedCluster(state, raft, self.writes, self.maintenance, options)
        self.removal = Removal(state, raft, self.peers.is_open, options)
        self.reachability = Reachability(state, options, self.peers.is_called_by, self.run_task)
        self.catch_up = CatchUp(state, raft, self.identity)
        self.restoring = Restoring(state, self.run_task, self._restored)
        self.version_keeper = VersionKeeper(state, raft, self.writes, self.peers.versions, options)
        self.time_keeper = TimeKeeper(state, raft, self.writes, options.wall_clock)
        self.attributes: proto.Member | None = None
        """The name and client URLs of this member, which `tick` publishes to the cluster."""
        self.backups_under_way = 0
        """Backups that are being sent now."""
        self.start_writer: Callable[[Any, Callable[[], None]], Any] | None = None
        """`backup_process.start`, which calls back in the loop; None: there are no processes."""
        self._saves: list[Ready] = []
        self._unsynced: deque[float] = deque()
        """When each save that is not durable yet was made."""
        self._tasks: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()
        self._task_done: Callable[[], None] | None = None
        """What to call when the task under way is done; None if there is none."""
        self._committed: deque[Entry] = deque()
        self._applying: Generator[None, None, None] | None = None
        self._applied_entry: Entry | None = None
        """The last entry that `_applying` applied; the store is marked with it at the end."""
        self._applied_term = store.applied_term
        self._slice_ends_at = 0.0

    def _make_hub(self, store: Store) -> WatchHub:
        hub = WatchHub(
            store,
            self.identity.header_content,
            rng=self.rng,
            fragment_bytes=self.options.max_request_bytes + OVERHEAD_BYTES,
            progress_interval_s=self.options.progress_interval_s,
            limits=store.limits,
        )
        # Otherwise the timers of watches that come before the first tick would count from 0.
        hub.tick(self.clock())
        return hub

    # Membership changes, on the leader.

    def change_membership(self, waiter: Waiter) -> None:
        """Check and propose a `MemberChange`. Only the leader calls this. Raises EtcdError."""
        self.check_change(waiter.request)
        self.writes.propose_change(waiter)

    def check_change(self, change: Any) -> None:
        """Raise EtcdError unless the leader may propose this `MemberChange` now."""
        self.state.membership.check(change)
        self.check_safe(change)
        if change.action == membership.PROMOTE and not self.raft.learner_is_ready(change.member.ID):
            raise error("LearnerNotReady")

    def check_safe(self, change: Any) -> None:
        """Raise EtcdError if a `MemberChange` might cost the cluster its quorum."""
        own_id, strict = self.identity.member_id, self.options.strict_reconfig_check
        self.state.membership.check_safe(change, own_id, self.peers.contact_s, strict=strict)

    # To the leader.

    def _propose_own(self, method: int, request: proto.Message) -> None:
        # For the parts that are constructed before `writes` exists.
        self.writes.propose_own(method, request)

    def _forward(self, leader: int, term: int, data: bytes, done: Done) -> bool:
        return self._ask(leader, FORWARD, encode_forward(term, data), done)

    def _ask(self, leader: int, method: int, body: bytes, done: Done) -> bool:
        if not self.peers.is_open(leader):
            return False
        self.peers.ask(leader, method, body, done)
        return True

    def _retry(self) -> None:
        """Propose and ask again what no leader could take before."""
        self.writes.retry()
        self.questions.retry(self.peers.is_open)

    # From the other members: `PeerEvents`.

    def on_message(self, message: Message) -> None:
        # A member that is being forced to be a cluster of its own has no others any more.
        if self.rollback.is_over and self.forced.is_done:
            self.raft.step(message)
        else:
            self.rollback.heard(message)

    def on_peer_opened(self, node: int) -> None:
        if self.rollback.is_over:
            self.leadership.begin(self.clock())
        if node == self.raft.leader:
            self._retry()
            self.reads.retry()

    def on_peer_died(self, node: int) -> None:
        self.leadership.peer_died(node)

    def on_unreachable(self, node: int) -> None:
        self.raft.report_unreachable(node)

    def on_snapshot_sent(self, node: int, is_taken: bool) -> None:
        self.raft.report_snapshot(node, is_taken)

    def on_removed(self, node: int) -> None:
        self.removal.claimed(node)

    def snapshot_received(self, node: int, offer: proto.SnapshotOffer) -> None:
        """A snapshot from the leader is complete on disk, beside the data that it will replace."""
        snapshot = Snapshot(offer.index, offer.term, tuple(offer.voters), tuple(offer.learners))
        message = Message(SNAP, self.identity.member_id, node, offer.leader_term, snapshot=snapshot)
        try:
            if self.forced.is_done:
                self.raft.step(message)
        except MessageRejected as fault:
            log.warn("rejected a snapshot", why=str(fault), remote_peer_id=f"{node:x}")
        if self.raft.log.offset != offer.index:
            self.restoring.drop_unless_needed(offer.index)

    # From the owner.

    def persisted(self, saves: Sequence[Ready]) -> None:
        """These saves are durable. Call this in the order in which `take_saves` returned them."""
        for save in saves:
            self._unsynced.popleft()
            if save.snapshot is not None:
                self.restoring.waiting.append(save.snapshot)
            if save.hard_state is not None:
                self.rollback.durable_term = save.hard_state.term
            if save.entries:
                term, index, _, _ = save.entries[-1]
                self.raft.persisted(index, term)
            for message in save.messages_after_sync:
                self._deliver(message)

    def finished(self) -> None:
        """The task that `take_task` returned is done."""
        done, self._task_done = self._task_done, None
        assert done is not None
        done()

    def run_task(self, task: Callable[[], None], done: Callable[[], None]) -> None:
        """Queue slow disk work for `take_task`."""
        self._tasks.append((task, done))

    def tick(self) -> None:
        """A heartbeat interval has passed."""
        now = self.clock()
        if self.state.awaits_space:
            self.leadership.hand_over()
        self.state.awaits_space = False
        is_behind = self.raft.log.offset > self.state.store.applied_index
        read = self.reads.read_own if self.raft.leader else None
        self.state.alarms.tick(now, is_behind or self.incoming.offer is not None, read)
        self.rollback.tick(now)
        self.removal.tick()
        if self.rollback.is_over:
            self.forced.tick()
            self.raft.tick()
            self.leadership.begin(now)
        if self._applied_term == self.raft.term:  # No renewal of an earlier term is left to apply.
            self.leases.tick(now)
        if self.state.lessor.promoted and self._unsynced:
            self.leadership.hand_over_if_slow(now, self._unsynced[0])
        self._publish(now)
        self.version_keeper.tick(now)
        self.time_keeper.tick(now)
        self.leadership.tick(now)
        self.hub.tick(now)
        self.hash_check.tick(now)
        if not self.restoring.is_under_way:
            self.maintenance.tick(now)
        self.access.forget()
        self._expiry = self._expiry or self._expire_steps(now)
        self._expire(now)
        self._retry()
        self.reads.tick(now)
        self.catch_up.ask(now)
        self.incoming.tick()

    def _expire_steps(self, now: float) -> Iterator[None]:
        parts = (self.writes, self.questions, self.reads)
        return chain.from_iterable(part.expire_steps(now) for part in parts)

    def give_up(self) -> None:
        """Fail all requests that wait. This member was removed: no leader will answer them."""
        self._expiry = chain(self._expiry or (), self._expire_steps(math.inf))

    def _expire(self, now: float) -> None:
        """Fail requests that have waited too long, for one slice."""
        self._slice_ends_at = now + SLICE_S
        for count, _ in enumerate(self._expiry or (), 1):
            if count % EXPIRE_STEP_REQUESTS == 0 and self.slice_is_over():
                return
        self._expiry = None

    def _publish(self, now: float) -> None:
        """Propose this member's name and client URLs if the cluster does not know them."""
        wanted = self.attributes
        if wanted is None or now - self._published_at < PUBLISH_RETRY_S or not self.raft.leader:
            return
        self._published_at = now
        own_id, members = self.identity.member_id, self.state.membership
        known = members.members.get(own_id)
        if own_id not in members.removed and (
            known is None
            or known.name != wanted.name
            or list(known.clientURLs) != list(wanted.clientURLs)
        ):
            self._propose_own(PUBLISH, wanted)

    # Output.

    def take_saves(self) -> list[Ready]:
        """What consensus wants saved in the log, in order."""
        saves, self._saves = self._saves, []
        return saves

    def take_task(self) -> Callable[[], None] | None:
        """The next slow disk task; None while one runs or if there is none."""
        if self._task_done is not None or not self._tasks:
            return None
        task, self._task_done = self._tasks.popleft()
        return task

    @property
    def log_begin(self) -> int:
        """Entries up to this index are not needed, not even for members that are behind."""
        return self.raft.log.applied if self.raft.is_alone else self.raft.log.offset

    @property
    def has_work(self) -> bool:
        """The next turn has work that waits for no event."""
        return self.has_urgent_work or (self._may_maintain and self.background.has_work)

    @property
    def _may_maintain(self) -> bool:
        return not (self.restoring.is_under_way or self.state.awaits_space)

    @property
    def has_urgent_work(self) -> bool:
        """The next turn has work that is not background work."""
        return self.raft.has_ready or self._has_requests_to_do or self.hub.has_work

    @property
    def rests_until(self) -> float:
        """When the next turn has something to do, if there is no urgent work and no input: a
        campaign, a progress notification, or background work, which gives way to clients."""
        return min(self.leadership.wakes_at, self.hub.next_tick(), self._background_at)

    @property
    def _has_requests_to_do(self) -> bool:
        reads = self.reads
        return (
            ((self._applying is not None or bool(self._committed)) and not self.state.awaits_space)
            or self._expiry is not None
            or bool(reads.new)
            or self.writes.can_propose
            or (reads.can_serve and reads.has_work)
        )

    @property
    def is_saving(self) -> bool:
        """Own writes wait to be saved and committed, and only background work is left to do."""
        return self.writes.are_waiting and not self._has_requests_to_do

    @property
    def leads(self) -> bool:
        """This member is the leader, as far as it knows."""
        return self.raft.role == LEADER

    @property
    def needs_no_round(self) -> bool:
        """This member is the only voter and has applied all that is committed, so its state is
        linearizable without a ReadIndex round."""
        raft = self.raft
        return (
            raft.is_sole_voter
            and self.state.store.applied_index == raft.log.committed
            # Otherwise entries acknowledged before a crash may be in the log but not committed yet.
            and self._applied_term == raft.term
        )

    @property
    def may_renew_leases(self) -> bool:
        """This member leads, and has applied what earlier leaders did with the leases."""
        return self.state.lessor.promoted and self._applied_term == self.raft.term

    @property
    def is_learner(self) -> bool:
        return self.identity.member_id in self.raft.learners

    @property
    def is_applying(self) -> bool:
        """Entries are being applied; the store is between two marks."""
        return self._applying is not None

    @property
    def is_idle(self) -> bool:
        """Every request is answered."""
        return not (
            self._has_requests_to_do
            or self.writes.are_waiting
            or self.reads.are_waiting
            or self.reads.background
            or self.logins.are_under_way
        )

    # A turn.

    def begin_turn(self, now: float) -> None:
        """Propose, and take what consensus has ready, to be saved and sent before `proceed`."""
        reads = self.reads
        if now >= self.leadership.wakes_at:
            self.leadership.act(now)
        if self._expiry is not None:
            self._expire(now)
        if (can_propose := self.writes.can_propose) or reads.new or reads.ready:
            self.background.asked_at = now
        if can_propose:
            self.writes.propose_new()
            self.leadership.send_commit_at = math.inf
        if reads.new:
            reads.begin_round(self.needs_no_round)
        while self.raft.has_ready:
            self._take_ready(self.raft.ready())

    def proceed(self, now: float) -> None:
        """Apply and answer what is committed and durable; long work advances by one slice."""
        self._slice_ends_at = now + SLICE_S
        raft = self.raft
        while raft.has_ready:
            self._take_ready(raft.ready())
        if raft.commit_is_unsent:
            self.leadership.send_commit_later(now)
        if self._committed or self._applying is not None:
            self._apply()
        elif self.restoring.waiting and not (self._task_done or self._tasks):
            # Nothing is being applied, and the snapshot's mark in the log is durable.
            self.maintenance.stop()
            self.restoring.begin()
        if not self.catch_up.is_settled:
            self.catch_up.check_applied(now)
        reads = self.reads
        if reads.can_serve:
            if self._applying is None:
                reads.serve()
            else:
                self._slice_ends_at = self.clock() + SLICE_S
                reads.serve_beside(self._applied_entry, self._applied_term)
        if self.hub.has_work:
            self.hub.run(self.slice_is_over)

    def maintain(self, has_input: Callable[[], bool] = lambda: False) -> None:
        """Do a slice of background work. Called after the output of the turn was sent. `has_input`:
        clients or members have sent something."""
        background = self.background
        self._background_at = math.inf
        if background.has_work and self._applying is None and self._may_maintain:
            background.run(bool(self.is_saving and self._unsynced), has_input)
            self._background_at = background.next_at(self.is_saving)

    def slice_is_over(self) -> bool:
        """Whether the current slice has used up its time."""
        return self.clock() >= self._slice_ends_at

    def _take_ready(self, ready: Ready) -> None:
        hard_state, entries, committed, messages, later, reads, soft_state, snapshot = ready
        if soft_state is not None:
            self._leadership_changed(soft_state.role == LEADER, soft_state.leader)
        for message in messages:
            if message.kind == SNAP:
                self._send_snapshot(message)
            else:
                self.peers.send(message)
        if entries or hard_state is not None or snapshot is not None or (later and self._unsynced):
            self._saves.append(ready)
            self._unsynced.append(self.clock())
        else:
            for message in later:
                self._deliver(message)
        if committed:
            self._committed += committed
        for index, context in reads:
            self.reads.confirmed(context, index)
            self.catch_up.confirmed(context, index)

    def _deliver(self, message: Message) -> None:
        if message.to == self.identity.member_id:
            self.raft.step(message)
        else:
            self.peers.send(message)

    def _send_snapshot(self, message: Message) -> None:
        """Send the current state, which is at the index of the message or after it. So the members
        are those of now, too: the receiver applies no change that the state contains."""
        link = self.peers.links.get(message.to)
        if link is None or self.clock() < link.next_snapshot_at:
            self.raft.report_snapshot(message.to, False)
            return
        try:
            image = Image(self.state.store, self.identity.cluster_id, self.identity.member_id)
        except OSError as failure:
            log.error("cannot read the snapshot for a member", error=str(failure))
            self.raft.report_snapshot(message.to, False)
            return
        offer = proto.SnapshotOffer(
            index=image.index,
            term=image.term,
            voters=sorted(self.raft.voters),
            learners=sorted(self.raft.learners),
            size_bytes=image.size_bytes,
            nonce=self.rng.getrandbits(63),
            leader_term=message.term,
        )
        log.info(
            "sending a snapshot",
            bytes=image.size_bytes,
            snapshot_index=image.index,
            remote_peer_id=f"{message.to:x}",
        )
        link.send_snapshot(image, offer)

    def _leadership_changed(self, leads: bool, leader: int) -> None:
        self.leadership.changed(leader)
        promoted = self.state.lessor.promoted
        if leads and not promoted:
            self.leases.promote(self.clock(), self.options.election_timeout_s)
        elif not leads and promoted:
            self.state.lessor.demote()
            for link in self.peers.links.values():
                link.drop_snapshot("another member leads now")
        if leader:
            self._published_at = -math.inf
            self._publish(self.clock())
            self._retry()
            self.reads.retry()
            self.catch_up.ask(self.clock())

    def _restored(self, snapshot: Snapshot, store: Store) -> None:
        """Replace the store by that of a snapshot from the leader."""
        old = self.state.store
        self.hub.restored(store)
        self.state.restore(store)
        self.peers.update(self.state.membership.members)
        self.reads.restart()
        self.maintenance.restart(old)
        self.writes.restored()
        self._applied_term = snapshot.term
        self.raft.applied(snapshot.index)
        log.info("installed a snapshot", revision=store.revision, index=snapshot.index)
        self._retry()

    # Applying.

    def _apply(self) -> None:
        store = self.state.store
        if self.state.awaits_space:
            return
        if self._applying is None:
            self._applying = self._apply_steps()
        for _ in self._applying:
            if not self.state.write_applied(None) or self.slice_is_over():
                return
        entry = self._applied_entry
        assert entry is not None, "there was one to apply"
        if not self.state.write_applied(entry):
            return
        self._applying = self._applied_entry = None
        if store.events:
            events = store.events
            store.events = []
            self.hub.notify(events, store.revision)
        self.raft.applied(entry.index)
        self.raft.compact(entry.index)

    def _apply_steps(self) -> Generator[None, None, None]:
        """Apply the entries that are committed now, in slices. Entries that are committed later
        wait for the next call, so that reads and watches get their turn."""
        for left in range(len(self._committed) - 1, -1, -1):
            entry = self._committed.popleft()
            if entry.term != self._applied_term:
                self._applied_term = entry.term
                self.writes.begin_term(entry.term)
            if entry.data:
                requests, since = self.writes.take(entry)
                self.maintenance.logged_bytes += len(entry.data)
                self.state.alarms.record_write(len(entry.data))
                began = self.clock()
                failed: list[int] = []
                if entry.kind == ENTRY_CONF_CHANGE:
                    self._change_members(entry, requests)
                else:
                    failed = yield from self.state.apply(requests)
                    if self.state.outdated:
                        self.writes.propose_outdated(is_own=since is not None)
                options, now = self.options, self.clock()
                if since is not None and now - since > options.warn_request_s:
                    warn_slow(REQUEST, now - since, options.warn_request_s, requests)
                took_s = now - began
                if took_s > options.warn_apply_s:
                    self.metrics.slow_applies += 1
                    warn_slow(APPLY, took_s, options.warn_apply_s, requests)
                self.metrics.count_applied(requests, failed, took_s)
            self._applied_entry = entry
            if left:
                yield

    def _change_members(self, entry: Entry, requests: list[Waiter]) -> None:
        if entry.index <= self.forced.ignored_index:
            return  # --force-new-cluster leaves the old membership behind.
        for waiter in requests:
            change = waiter.request
            try:
                conf_change = self.state.change_membership(change)
            except EtcdError as failure:
                what = "a membership change no longer applies; it has no effect"
                log.warn(what, why=failure.text)
                waiter.fail(failure)
                continue
            if conf_change is not None:
                self.raft.apply_conf_change(conf_change)
                self.reads.members_since = self.raft.log.last
            if change.action == membership.PROMOTE and self.leads:
                self.metrics.learners_promoted += 1
            members = self.state.membership.members
            self.peers.update(members)
            if change.action == membership.REMOVE and self.identity.member_id == change.member.ID:
                self.removal.since = self.clock()
            if waiter.session is not None:
                response = methods.METHODS[waiter.method].response(
                    header=self.identity.header_message(), members=list(members.values())
                )
                if change.action == membership.ADD:
                    response.member = change.member  # type: ignore[attr-defined]
                waiter.reply(response.encode())
