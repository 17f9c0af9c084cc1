"""One cluster member, sans-IO: requests in, replies out, and what must be written in between.

A member joins consensus (`raft.py`), the state machine (`mvcc.py`, `lease.py`, `membership.py`),
the watches (`watch.py`) and the way to the other members (`peer.py`). It owns no socket, file
handle, thread or clock: its owner

- hands it work: `propose` and `read` (from `api.py`), what the connections of `peer.py` receive,
  `persisted`, `tick`, `finished`;
- calls `turn` after each bunch of that, which moves everything forward by about one time slice;
- writes what `take_saves` gives to the write-ahead log, in order, and then calls `persisted`;
- runs the slow disk work that `take_task` gives anywhere, and then calls `finished`;
- keeps the connections that `peers` wants.

A write's way: `propose` collects it; `turn` makes all collected writes one raft entry (or few), so
that consensus costs per batch and not per write; a follower hands the entry to the leader; when it
is durable here and committed, its writes are applied in order, each with its own revision, and
answered by the member that took them.

An entry is proposed for one term: a leader takes what followers hand it only if it leads in that
term. In the log terms never go back, so when an entry of a later term is applied, what was proposed
for an earlier one and is not applied yet never will be, and can be proposed again: no request is
lost or done twice because leadership moved. What is in an entry: `entry.py`.

Invariants: nothing is answered before it is applied, nothing applied before it is committed and
durable; reads never see half of an entry's request; requests of an entry apply the same on every
member (whatever is drawn or measured is drawn before it is proposed).
"""

from __future__ import annotations

import math
import random
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from typing import Any

from etcdlite import datadir, frames, log, methods, proto, txn
from etcdlite.errors import EtcdError, error
from etcdlite.lease import Lessor
from etcdlite.methods import (
    ALARM_METHOD,
    CHECKPOINT,
    COMPACT,
    LEASE_REVOKE,
    MEMBER_CHANGE,
    PUBLISH,
    PUT,
    TXN,
)
from etcdlite.metrics import Metrics
from etcdlite.mvcc import Store
from etcdlite.peer import FORWARD, Peers, encode_forward
from etcdlite.proto import MAX_VARINT_BYTES, DecodeError, varint
from etcdlite.raft import FOLLOWER, LEADER, SNAP, Message, NotLeader, Raft, RequestDropped, Snapshot
from etcdlite.raft_log import ENTRY_CONF_CHANGE, ENTRY_NORMAL, Entry
from etcdlite.replica import membership as cluster
from etcdlite.replica.alarms import Alarms
from etcdlite.replica.corruption import HashCheck
from etcdlite.replica.entry import (
    ENTRY_HEADER,
    ENTRY_VERSION,
    Session,
    Waiter,
    decode_requests,
    needs_space,
)
from etcdlite.replica.maintenance import Housekeeping
from etcdlite.replica.membership import Cluster
from etcdlite.replica.reads import Reads
from etcdlite.replica.state import APPLIERS
from etcdlite.request import Done
from etcdlite.snap import Image, Incoming
from etcdlite.wal import Save
from etcdlite.watch import WatchHub

MAX_ENTRY_BYTES = 1 << 20
"""A batch is cut into entries of about this much (one larger request still goes alone)."""

MAX_PROPOSED_BYTES = 64 << 20
"""Writes taken in and not applied yet; more are answered "too many requests"."""

OVERHEAD_BYTES = 512 << 10
"""What a message may have above `max-request-bytes` (as in etcd)."""

REQUEST_BYTES = 500
"""What a waiting write takes besides its frame, about."""

SLICE_S = 0.002
"""What one turn spends on work that can be continued in the next."""

SHORT_SLICE_S = 0.0005
"""What one turn spends on background work while clients ask: the next request waits for it."""

BUSY_S = 0.01
"""For so long after a request, clients count as asking."""

FEW_WRITES = 64
"""With more than this under way, background work takes its whole slices."""

MAX_HOUSEKEEPING_PAUSE_S = 0.0025
"""Background work waits for a write that is being saved, but no longer than this."""

APPLIES_PER_CHECK = 128
"""Operations applied between two looks at the clock."""

REVOKES_PER_TICK = 1000
"""Expired leases proposed for revocation at once."""

PUBLISH_RETRY_S = 1.0
"""How often a member looks whether the cluster knows its name and URLs."""

NO_LEADER_S = 10.0
"""After this time without a leader the log says what is missing."""

NO_LEADER_PAUSE_S = 60.0
"""Until it says so again."""

CONNECTED_S = 5.0
"""A member must be in contact for so long to count as healthy in a membership change (as etcd)."""

CAMPAIGN_STAGGER_S = 0.03
"""When the leader's process is known to be dead, the others campaign this far apart, so that they
do not split the votes."""

CAMPAIGN_RETRY_S = 0.1
MAX_CAMPAIGNS = 5
"""After this many attempts the election timeout decides."""

CHECKPOINT_LEASES_INTERVAL_S = 300.0
"""How often the leader writes down what is left of long leases (as in etcd)."""

MAX_HELD_ASKS = 10_000
"""Questions that wait for a leader; more are answered "too many requests"."""

CHECKPOINT_LEASES = 1000
"""Leases written down at once."""

# What may take too long, in etcd's words.
APPLY = "apply request"
REQUEST = "request"


class Member:
    """See the module's docstring. `clock` gives seconds, monotonic."""

    def __init__(
        self,
        *,
        member_id: int,
        cluster_id: int,
        store: Store,
        lessor: Lessor,
        raft: Raft,
        clock: Callable[[], float],
        rng: random.Random,
        quota_bytes: int,
        max_request_bytes: int,
        max_txn_ops: int,
        request_timeout_s: float,
        election_timeout_s: float,
        progress_interval_s: float,
        warn_apply_s: float,
        warn_request_s: float,
        checkpoint_bytes: int,
        members: Iterable[Any] = (),
        max_learners: int = 1,
        strict_reconfig_check: bool = True,
        cluster_token: str = "",
        force_new_cluster: bool = False,
    ) -> None:
        self.id = member_id
        self.cluster_id = cluster_id
        self.store = store
        self.lessor = lessor
        self.raft = raft
        self.clock = clock
        self.rng = rng
        self.max_request_bytes = max_request_bytes
        self.max_txn_ops = max_txn_ops
        self.request_timeout_s = request_timeout_s
        self.election_timeout_s = election_timeout_s
        self.warn_apply_s = warn_apply_s
        self.warn_request_s = warn_request_s
        self.hub = WatchHub(
            store,
            self.header_content,
            rng=rng,
            fragment_bytes=max_request_bytes + OVERHEAD_BYTES,
            progress_interval_s=progress_interval_s,
            limits=store.limits,
        )
        # Or the timers of watches that come before the first tick would count from 0.
        self.hub.tick(clock())
        self.metrics = Metrics()
        self.housekeeping = Housekeeping(self, checkpoint_bytes)
        self.cluster = Cluster(store, max_learners)
        self.strict_reconfig_check = strict_reconfig_check
        self.cluster_token = cluster_token
        self.peers = Peers(self)
        self.peers.update(self.cluster.members or {member.ID: member for member in members})
        self.incoming = Incoming(
            store.disk, store.directory, raft, self.run_task, self.snapshot_received
        )
        self.hash_check = HashCheck(self)
        self._forced_index = raft.log.last if force_new_cluster else 0
        """Up to here membership changes of the log do not count: this member was told to be the
        only one, whoever there was."""
        self._is_forcing = force_new_cluster
        self._forced_batch = 0
        """The latest removal of another member that this one has proposed for that."""
        self._forced_until = math.inf
        """Up to here the store must be durable before that is so without being told again."""
        self.attributes: Any = None
        """A `Member` message: the name and client URLs that the cluster shall know of this one."""
        self.removed_since: float | None = None
        """Since when this member knows that it was removed from the cluster, and must stop."""
        self.alarms = Alarms(self, quota_bytes)
        self.reads = Reads(self)
        self.snapshots_sent = 0
        """Backups that are under way."""
        self.leader_changes = 0
        self._known_leader = 0
        self._lost_leader = 0
        """Whose loss is to be told, if there is no other one soon."""
        self._led_at = clock()
        """When a leader was known last."""
        self._missed_at = -math.inf

        self._proposals: list[Waiter] = []
        self._frames: list[bytes] = []
        self._proposed_bytes = 0
        self._batch = rng.getrandbits(32) << 20
        self._waiting: dict[int, tuple[float, list[Waiter], int]] = {}
        """By number of the batch: since when who waits for it, and its weight in bytes."""
        self._forwarded: dict[tuple[int, int], list[Waiter]] = {}
        """The decoded requests of entries that followers handed over, by member and batch."""
        self._held: deque[tuple[int, int, bytes]] = deque()
        """(kind, batch, payload) of entries that could not be proposed yet."""
        self._proposed: dict[int, tuple[int, int, bytes]] = {}
        """By number of the batch: (term, kind, payload) of entries that a leader may have."""
        self._held_asks: deque[tuple[float, int, bytes, Done]] = deque()
        """(until when, method, body, whom to tell) of questions that await a leader."""
        self._saves: list[Save] = []
        self._unsynced: deque[float] = deque()
        """When each save that is not durable yet was handed out."""
        self._handed_over_at = -math.inf
        self._installs: deque[Snapshot] = deque()
        """Snapshots from a leader that are about to take the place of the data."""
        self._installed: Store | None = None
        self.is_installing = False
        self._tasks: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()
        self._task_done: Callable[[], None] | None = None
        self._leader_lost_at = -math.inf
        self._campaign_at = math.inf
        self._campaigns = 0
        self._published_at = -math.inf
        self._transfers: list[tuple[float, int, Waiter]] = []
        """Since when who waits for whom to lead."""
        self._leases_checkpointed_at = clock()
        self._checkpoint_index = 0
        """The entry with the last checkpoint of leases that was proposed here."""
        self._committed: deque[Entry] = deque()
        self._applying: Generator[None, None, None] | None = None
        self._applied_entry: Entry | None = None
        self._applied_term = store.applied_term
        self._deadline = 0.0
        self._asked_at = 0.0
        """When the last request came."""
        self._housekept_at = 0.0
        """When background work was last done."""
        self._ids = b"\x08" + varint(cluster_id) + b"\x10" + varint(member_id) + b"\x18"
        self._header_term = -1
        self._header_prefixes: list[bytes] = []
        self._header_suffix = b""
        self._header_revision = -1
        self._header = b""

    # Input.

    def propose(
        self, session: Session | None, request_id: int, method: int, request: Any, frame: bytes
    ) -> None:
        """Replicate and apply a write; the session gets its answer. Never raises."""
        if self.is_learner and session is not None:
            session.fail(request_id, method, error("NotSupportedForLearner"))
            return
        size = len(frame)
        size += REQUEST_BYTES
        if self._proposed_bytes + size > MAX_PROPOSED_BYTES:
            self.metrics.proposals_failed += 1
            if session is not None:
                session.fail(request_id, method, error("RequestTooManyRequests"))
            return
        self._proposed_bytes += size
        self._proposals.append((session, request_id, method, request))
        self._frames.append(frame)

    def propose_message(
        self, session: Session | None, request_id: int, method: int, request: Any
    ) -> None:
        """As `propose`, for a request that did not come as a frame."""
        self.propose(
            session, request_id, method, request, frames.frame(1, method, 0, request.encode())
        )

    def _propose_own(self, requests: Sequence[tuple[int, Any]]) -> int:
        """Propose what this member has decided as the leader; the index of the entry, 0 if it is
        not taken. Only now and in this term: by what another leader does later, an expired lease
        may be alive again, so this is never proposed anew."""
        self._batch += 1
        encoded = [frames.frame(1, method, 0, request.encode()) for method, request in requests]
        header = ENTRY_HEADER.pack(ENTRY_VERSION, len(encoded), self.id, self._batch)
        try:
            return self.raft.propose(b"".join((header, *encoded)))
        except (NotLeader, RequestDropped):
            return 0

    def read(self, session: Session, request_id: int, method: int, request: Any) -> None:
        """Answer a read once it is linearizable."""
        if self.is_learner:
            session.fail(request_id, method, error("NotSupportedForLearner"))
            return
        self.reads.new.append((session, request_id, method, request))

    def read_now(self, session: Session, request_id: int, method: int, request: Any) -> None:
        """Answer a serializable read from what is applied here."""
        self.reads.ready.append((0, [(session, request_id, method, request)]))

    def change_membership(
        self, session: Session, request_id: int, method: int, change: Any
    ) -> None:
        """Have a `MemberChange` agreed on; for the leader. Raises EtcdError."""
        self._check_change(change)
        self._propose_change((session, request_id, method, change))

    def _propose_change(self, waiter: Waiter) -> None:
        frame = frames.frame(1, MEMBER_CHANGE, 0, waiter[3].encode())
        self._propose_entry(ENTRY_CONF_CHANGE, [waiter], [frame])

    def _check_change(self, change: Any) -> None:
        """Raise the EtcdError that says why the membership may not be changed so now."""
        self.cluster.check(change)
        self.cluster.check_safe(
            change, self.id, self._is_connected, strict=self.strict_reconfig_check
        )
        if change.action == cluster.PROMOTE and not self.raft.learner_is_ready(change.member.ID):
            raise error("LearnerNotReady")

    def move_leader(self, session: Session, request_id: int, method: int, node: int) -> None:
        """Have the voter `node` lead, and answer when it does; for the leader."""
        if node != self.id:
            try:
                self.raft.transfer_leader(node)
            except ValueError:
                raise error("BadLeaderTransferee") from None
        self._transfers.append((self.clock(), node, (session, request_id, method, None)))
        self._answer_transfers()

    def _answer_transfers(self) -> None:
        leader = self.raft.leader
        now = self.clock()
        for transfer in self._transfers[:]:
            since, node, (session, request_id, method, _) = transfer
            if leader == node:
                self._transfers.remove(transfer)
                assert session is not None
                # As etcd's, the response has no header.
                session.reply(request_id, method, b"")
            elif now - since > self.request_timeout_s:
                self._transfers.remove(transfer)
                assert session is not None
                session.fail(request_id, method, error("TimeoutDueToLeaderFail"))

    def _is_connected(self, node: int) -> bool:
        link = self.peers.links.get(node)
        return (
            link is not None and link.since is not None and link.since <= self.clock() - CONNECTED_S
        )

    def ask_leader(self, method: int, body: bytes, done: Done) -> None:
        """Put a question to the leader; asked again if it moves meanwhile. `done` is called once,
        with the answer or an EtcdError."""
        until = self.clock() + self.request_timeout_s

        def answered(answer: bytes | EtcdError) -> None:
            if isinstance(answer, EtcdError) and answer.text == error("NotLeader").text:
                self._held_asks.append((until, method, body, done))
            else:
                done(answer)

        leader = self.raft.leader
        if leader and leader != self.id and self.peers.is_open(leader):
            self.peers.ask(leader, method, body, answered)
        elif len(self._held_asks) < MAX_HELD_ASKS:
            self._held_asks.append((until, method, body, done))
        else:
            done(error("RequestTooManyRequests"))

    # From the other members.

    def step(self, message: Message) -> None:
        """A raft message came."""
        self.raft.step(message)

    def forwarded(self, term: int, data: bytes) -> None:
        """A follower hands over the payload of an entry, for a leader of that term. Raises
        EtcdError if it is not taken, and DecodeError if it is none."""
        if not self.leads or self.raft.term != term:
            raise error("NotLeader")
        if len(data) < ENTRY_HEADER.size or data[0] != ENTRY_VERSION:
            raise DecodeError("a forwarded entry has no payload")
        _, count, member_id, batch = ENTRY_HEADER.unpack_from(data)
        try:
            waiters = decode_requests(data, count)
        except (struct.error, KeyError, AssertionError) as failure:
            raise DecodeError(f"a forwarded entry is not whole ({failure!r})") from failure
        for _, _, method, _ in waiters:
            if method != PUT and method not in APPLIERS:
                raise DecodeError(f"a forwarded entry has method {method:#04x}, which is no write")
        try:
            self.raft.propose(data)
        except (NotLeader, RequestDropped):
            raise error("RequestTooManyRequests") from None
        self._forwarded[member_id, batch] = waiters

    def peer_opened(self, node: int) -> None:
        """Messages can be sent to that member (again)."""
        if node == self.raft.leader:
            self._retry_held()
            self.reads.begin_anew()

    def peer_died(self, node: int) -> None:
        """The process of that member is dead. If it was the leader there is no need to wait for
        the election timeout; the pre-vote still protects a leader that others hear of."""
        if node != self.raft.leader or self.raft.role != FOLLOWER:
            return
        log.warn("the leader's process is gone", leader=f"{node:x}")
        self.raft.forget_leader()
        if self.id in self.raft.voters:
            others = sorted(self.raft.voters - {node})
            self._campaigns = MAX_CAMPAIGNS
            self._campaign_at = self.clock() + others.index(self.id) * CAMPAIGN_STAGGER_S

    def snapshot_received(self, node: int, offer: Any) -> None:
        """The leader's snapshot is on disk, under a name of its own."""
        snapshot = Snapshot(offer.index, offer.term, tuple(offer.voters), tuple(offer.learners))
        self.raft.step(Message(SNAP, self.id, node, offer.leader_term, snapshot=snapshot))
        pending = [snapshot.index for snapshot in self._installs]
        if self.raft.log.offset != offer.index and offer.index not in pending:
            # It came too late: this member has everything that is in it.
            disk, directory = self.store.disk, self.store.directory
            datadir.drop_snapshot(disk, directory, offer.index)

    def was_removed(self) -> None:
        """This member is not in the cluster any more."""
        if self.removed_since is None:
            self.removed_since = self.clock()

    # From the owner.

    def persisted(self, saves: Sequence[Save]) -> None:
        """What `take_saves` gave is durable."""
        for save in saves:
            self._unsynced.popleft()
            if save.snapshot is not None:
                self._installs.append(save.snapshot)
            if save.entries:
                self.raft.persisted(save.entries[-1].index, save.entries[-1].term)
            for message in save.messages:
                self._deliver(message)

    def finished(self) -> None:
        """The task that `take_task` gave is done."""
        done, self._task_done = self._task_done, None
        assert done is not None
        done()

    def run_task(self, task: Callable[[], None], done: Callable[[], None]) -> None:
        """Have slow disk work done away from the loop, before that of `housekeeping`."""
        self._tasks.append((task, done))

    def tick(self) -> None:
        """A heartbeat interval has passed."""
        now = self.clock()
        self.alarms.measure(now)
        self.raft.tick()
        if self.lessor.promoted:
            expired = self.lessor.expired(now, REVOKES_PER_TICK)
            if expired:
                self.metrics.leases_expired += len(expired)
                self._propose_own(
                    [(LEASE_REVOKE, proto.LeaseRevokeRequest(ID=lease_id)) for lease_id in expired]
                )
            self._checkpoint_leases(now)
            self._hand_over_if_slow(now)
        self._publish(now)
        if self._is_forcing:
            self._force_new_cluster()
        self._look_for_leader(now)
        self.hub.tick(now)
        self.hash_check.tick(now)
        if not self.is_installing:
            self.housekeeping.tick(now)
        self._give_up_waiting(now)
        self._retry_held()
        self.reads.tick(now)
        if self._transfers:
            self._answer_transfers()

    def _give_up_waiting(self, now: float) -> None:
        expired = now - self.request_timeout_s
        for batch, (since, _, _) in list(self._waiting.items()):
            if since > expired:
                break
            self._give_up(batch, self._timeout(since))
        while self._held and self._held[0][1] not in self._waiting:
            self._held.popleft()
        while self._held_asks and self._held_asks[0][0] <= now:
            _, _, _, done = self._held_asks.popleft()
            done(self._timeout(now - self.request_timeout_s))

    def _give_up(self, batch: int, failure: EtcdError) -> None:
        _, waiters, size = self._waiting.pop(batch)
        self._proposed.pop(batch, None)
        self._proposed_bytes -= size
        self.metrics.proposals_pending -= len(waiters)
        self.metrics.proposals_failed += len(waiters)
        self._fail(waiters, failure)

    def _timeout(self, since: float) -> EtcdError:
        """What a request that waited `since` then is told, in etcd's words."""
        leader = self.raft.leader
        if since <= self._leader_lost_at:
            return error("TimeoutDueToLeaderFail")
        if leader and leader != self.id and not self.peers.is_open(leader):
            return error("TimeoutDueToConnectionLost")
        return error("Timeout")

    def _publish(self, now: float) -> None:
        """Let the cluster know this member's name and client URLs, if they have changed."""
        wanted = self.attributes
        if wanted is None or now - self._published_at < PUBLISH_RETRY_S or not self.raft.leader:
            return
        self._published_at = now
        known = self.cluster.members.get(self.id)
        if self.id not in self.cluster.removed and (
            known is None
            or known.name != wanted.name
            or list(known.clientURLs) != list(wanted.clientURLs)
        ):
            self.propose_message(None, 0, PUBLISH, wanted)

    def _force_new_cluster(self) -> None:
        """Remove all other members, one after the other, now that this one leads alone."""
        if not self.leads or self.raft.log.applied < self._forced_index:
            return
        if self._forced_batch in self._waiting:
            return
        own = self.cluster.members.get(self.id)
        others = [node for node in self.cluster.members if node != self.id]
        if own is not None and own.isLearner:
            action, node = cluster.PROMOTE, self.id
        elif others:
            action, node = cluster.REMOVE, others[0]
        elif self._forced_until == math.inf:
            self._forced_until = self.store.applied_index
            return
        elif self.housekeeping.checkpoint_index < self._forced_until:
            # Until then the log alone says so, together with changes that do not count.
            self.housekeeping.wants_checkpoint = True
            return
        else:
            self._is_forcing = False
            log.warn(
                "this member is a cluster of its own now; start it without --force-new-cluster "
                "from now on",
                **{"local-member-id": f"{self.id:x}"},
            )
            return
        change = proto.MemberChange(action=action, member=proto.Member(ID=node))
        self._propose_change((None, 0, 0, change))
        self._forced_batch = self._batch

    def _checkpoint_leases(self, now: float) -> None:
        """Write down what is left of long leases, so that a new leader does not start them anew."""
        if now - self._leases_checkpointed_at < CHECKPOINT_LEASES_INTERVAL_S:
            return
        self._leases_checkpointed_at = now
        due = self.lessor.checkpoints(now, CHECKPOINT_LEASES_INTERVAL_S)
        for at in range(0, len(due), CHECKPOINT_LEASES):
            checkpoints = [
                proto.LeaseCheckpoint(ID=lease_id, remaining_TTL=remaining_s)
                for lease_id, remaining_s in due[at : at + CHECKPOINT_LEASES]
            ]
            request = proto.LeaseCheckpointRequest(checkpoints=checkpoints)
            index = self._propose_own([(CHECKPOINT, request)])
            self._checkpoint_index = max(index, self._checkpoint_index)

    def is_checkpointed(self, lease_id: int) -> bool:
        """The next leader would give the lease less than its TTL, or will when what is proposed is
        applied: to be undone before a renewal is promised."""
        return self.lessor.is_checkpointed(lease_id) or (
            self.store.applied_index < self._checkpoint_index
            and self.lessor.exists(lease_id)
            and self.lessor.ttl_s(lease_id) > CHECKPOINT_LEASES_INTERVAL_S
        )

    def _hand_over_if_slow(self, now: float) -> None:
        """A leader whose disk does not answer lets another one lead, if one has the whole log."""
        limit_s = self.election_timeout_s / 2
        if not self._unsynced or now - self._unsynced[0] < limit_s:
            return
        if now - self._handed_over_at < 2 * self.election_timeout_s:
            return
        heir = self._heir()
        if heir:
            self._handed_over_at = now
            log.warn(
                "the disk is slow; handing leadership over",
                took=f"{now - self._unsynced[0]:.2f}s",
                **{"new-leader": f"{heir:x}"},
            )
            self.raft.transfer_leader(heir)

    def _heir(self) -> int:
        """The other voter that has most of the log, 0 if none is in contact."""
        progress = self.raft.progress
        ready = [
            node
            for node in self.raft.voters - {self.id}
            if self.peers.is_open(node) and progress[node].recent_active
        ]
        return max(ready, key=lambda node: (progress[node].match, node), default=0)

    def hand_over(self) -> bool:
        """Before an orderly stop: have another member lead. True if there is something to wait
        for."""
        if self.raft.role != LEADER:
            return False
        heir = self._heir()
        if not heir:
            return False
        if self.clock() - self._handed_over_at > self.election_timeout_s:
            self._handed_over_at = self.clock()
            self.raft.transfer_leader(heir)
        return True

    # Output.

    def take_saves(self) -> list[Save]:
        """What is to be written to the log, in order; each is one Ready's."""
        saves = self._saves
        self._saves = []
        return saves

    def take_task(self) -> Callable[[], None] | None:
        """Slow disk work to run away from the loop, one at a time."""
        if self._task_done is not None:
            return None
        if self._tasks:
            task, self._task_done = self._tasks.popleft()
            return task
        housekeeping_task = self.housekeeping.take_task()
        if housekeeping_task is not None:
            self._task_done = self.housekeeping.finished
        return housekeeping_task

    @property
    def log_begin(self) -> int:
        """Entries up to here are not needed any more, not even for members that are behind."""
        return self.raft.log.offset

    @property
    def wakes_at(self) -> float:
        """When `turn` has something to do, besides `tick`; on the member's clock."""
        return self._campaign_at

    @property
    def has_work(self) -> bool:
        """A further turn has something to do at once."""
        return (
            bool(self._proposals)
            or self.reads.are_under_way
            or self._applying is not None
            or bool(self._committed)
            or self.raft.has_ready()
            or self.hub.has_work
            or (not self.is_installing and self.housekeeping.has_work)
        )

    @property
    def is_saving(self) -> bool:
        """Own proposals wait for the log, and nothing but background work could be done now."""
        return bool(self._waiting) and not (
            self._proposals
            or self.reads.are_under_way
            or self._applying is not None
            or self._committed
        )

    @property
    def leads(self) -> bool:
        """This member is the leader, as far as it knows."""
        return self.raft.role == LEADER

    @property
    def needs_no_round(self) -> bool:
        """This member is the only one that votes, and has applied all that is committed: what it
        knows is true without asking anybody."""
        raft = self.raft
        return (
            raft.role == LEADER
            and len(raft.voters) == 1
            and self.id in raft.voters
            and self.store.applied_index == raft.log.committed
            # Or what was acknowledged before a crash may be committed no more than in the log.
            and self._applied_term == raft.term
        )

    @property
    def is_learner(self) -> bool:
        return self.id in self.raft.learners

    @property
    def is_applying(self) -> bool:
        """An entry is applied in part; the store is between two marks."""
        return self._applying is not None

    @property
    def is_idle(self) -> bool:
        """Nothing that was asked for is unanswered."""
        return not (
            self._proposals
            or self._waiting
            or self.reads.are_waiting
            or self.reads.are_under_way
            or self._applying
            or self._committed
        )

    # A turn.

    def turn(self) -> None:
        """Move everything forward; long work by one slice."""
        now = self.clock()
        reads = self.reads
        self._deadline = now + SLICE_S
        if self._proposals or reads.new or reads.ready:
            self._asked_at = now
        if now >= self._campaign_at:
            self._campaign(now)
        if self._proposals:
            self._propose_batch()
        if reads.new:
            reads.begin_round()
        while self.raft.has_ready():
            self._take_ready()
        if self._applying is not None or self._committed:
            self._apply()
        elif self._installs:
            self._install()
        if (reads.ready or reads.slow) and self._applying is None:
            reads.serve()
        if self.hub.has_work and self._applying is None:
            self.hub.run(self.slice_is_over)

    def housekeep(self) -> None:
        """A slice of background work, after a turn's results were handed out."""
        if self._applying is None and not self.is_installing and self.housekeeping.has_work:
            now = self.clock()
            is_awaited = self.is_saving and self._unsynced
            if is_awaited and now - self._housekept_at < MAX_HOUSEKEEPING_PAUSE_S:
                return
            # Many writes wait for each other rather than for this, and the garbage that they make
            # has to be cleaned up as fast as they make it.
            is_noticed = (
                now - self._asked_at < BUSY_S and self.metrics.proposals_pending <= FEW_WRITES
            )
            self._deadline = now + (SHORT_SLICE_S if is_noticed else SLICE_S)
            self.housekeeping.run(self.slice_is_over)
            self._housekept_at = self.clock()

    def slice_is_over(self) -> bool:
        return self.clock() >= self._deadline

    def _campaign(self, now: float) -> None:
        """The leader is known to be dead: try to follow it."""
        self._campaigns -= 1
        self._campaign_at = now + CAMPAIGN_RETRY_S if self._campaigns else math.inf
        if not self.raft.leader:
            self.raft.campaign()

    def _propose_batch(self) -> None:
        waiters, frames = self._proposals, self._frames
        self._proposals, self._frames = [], []
        if sum(map(len, frames)) <= MAX_ENTRY_BYTES:
            self._propose_entry(ENTRY_NORMAL, waiters, frames)
            return
        start = size = 0
        for at, frame in enumerate(frames):
            if size and size + len(frame) > MAX_ENTRY_BYTES:
                self._propose_entry(ENTRY_NORMAL, waiters[start:at], frames[start:at])
                start, size = at, 0
            size += len(frame)
        self._propose_entry(ENTRY_NORMAL, waiters[start:], frames[start:])

    def _propose_entry(self, kind: int, waiters: list[Waiter], frames: list[bytes]) -> None:
        self._batch += 1
        header = ENTRY_HEADER.pack(ENTRY_VERSION, len(frames), self.id, self._batch)
        data = b"".join((header, *frames))
        size = len(data) - ENTRY_HEADER.size + REQUEST_BYTES * len(frames)
        if kind == ENTRY_CONF_CHANGE:
            self._proposed_bytes += size
        self._waiting[self._batch] = (self.clock(), waiters, size)
        self.metrics.proposals_pending += len(waiters)
        self.metrics.batch_requests.observe(len(waiters))
        self._try_propose(kind, self._batch, data)

    def _try_propose(self, kind: int, batch: int, data: bytes) -> None:
        """Bring an entry into the leader's log, now or, if it surely did not get there, later."""
        term = self.raft.term
        try:
            if kind == ENTRY_CONF_CHANGE:
                self.raft.propose_conf_change(data)
            else:
                self.raft.propose(data)
            self._proposed[batch] = (term, kind, data)
            return
        except NotLeader as failure:
            leader = failure.leader
            # What comes back in a snapshot cannot be answered, so it waits until that is installed.
            gets_snapshot = not self.cluster.members or self.raft.log.applied < self.raft.log.offset
            can_forward = leader and kind == ENTRY_NORMAL and not gets_snapshot
            if can_forward and self.peers.is_open(leader):
                self._proposed[batch] = (term, kind, data)
                body = encode_forward(term, data)
                self.peers.ask(leader, FORWARD, body, partial(self._forwarded_to, batch, term))
                return
        except RequestDropped:
            pass  # For a moment: leadership moves, or much waits already.
        self._held.append((kind, batch, data))

    def _forwarded_to(self, batch: int, term: int, answer: bytes | EtcdError) -> None:
        """A leader has taken an entry, or refused it, or nobody knows."""
        proposed = self._proposed.get(batch)
        if isinstance(answer, EtcdError) and answer.text in _NOT_TAKEN and proposed is not None:
            if proposed[0] == term:
                del self._proposed[batch]
                self._held.append((proposed[1], batch, proposed[2]))

    def _propose_again(self, term: int) -> None:
        """An entry of `term` is applied: what was proposed for an earlier one never will be."""
        for batch, (proposed_term, kind, data) in list(self._proposed.items()):
            if proposed_term < term:
                del self._proposed[batch]
                if batch in self._waiting:
                    self._held.append((kind, batch, data))
        self._retry_held()

    def _retry_held(self) -> None:
        """Propose and ask again what could not be."""
        for _ in range(len(self._held)):
            kind, batch, data = self._held.popleft()
            if batch in self._waiting and not (
                kind == ENTRY_CONF_CHANGE and self.leads and self._is_refused_now(batch)
            ):
                self._try_propose(kind, batch, data)
        leader = self.raft.leader
        if not self._held_asks or not leader:
            return
        if leader == self.id:
            # The question came from here, and is answered here.
            asks, self._held_asks = self._held_asks, deque()
            for _, _, _, done in asks:
                done(error("LeaderChanged"))
        elif self.peers.is_open(leader):
            asks, self._held_asks = self._held_asks, deque()
            for _, method, body, done in asks:
                self.ask_leader(method, body, done)

    def _is_refused_now(self, batch: int) -> bool:
        """A membership change had to wait, and another one came before: may it still be made? If
        not, fail it."""
        session, _, _, change = self._waiting[batch][1][0]
        if session is None:
            return False
        try:
            self._check_change(change)
        except EtcdError as failure:
            self._give_up(batch, failure)
            return True
        return False

    @staticmethod
    def _fail(waiters: list[Waiter], failure: EtcdError) -> None:
        for session, request_id, method, _ in waiters:
            if session is not None:
                session.fail(request_id, method, failure)

    def _take_ready(self) -> None:
        ready = self.raft.ready()
        if ready.soft_state is not None:
            self._leadership_changed(ready.soft_state.role == LEADER, ready.soft_state.leader)
        for message in ready.messages:
            self._send(message)
        has_news = ready.hard_state is not None or ready.entries or ready.snapshot is not None
        if has_news or (ready.messages_after_sync and self._unsynced):
            self._saves.append(
                Save(ready.hard_state, ready.entries, ready.snapshot, ready.messages_after_sync)
            )
            self._unsynced.append(self.clock())
        else:
            for message in ready.messages_after_sync:
                self._deliver(message)
        if ready.committed_entries:
            self._committed.extend(ready.committed_entries)
        for state in ready.read_states:
            self.reads.confirmed(state.context, state.index)

    def _deliver(self, message: Message) -> None:
        if message.to == self.id:
            self.raft.step(message)
        else:
            self.peers.send(message)

    def _send(self, message: Message) -> None:
        if message.kind == SNAP:
            self._send_snapshot(message)
        else:
            self.peers.send(message)

    def _send_snapshot(self, message: Message) -> None:
        """Stream the state as it is now, which is that of the message or a little later."""
        link = self.peers.links.get(message.to)
        snapshot = message.snapshot
        assert snapshot is not None
        if link is None or self.clock() < link.next_snapshot_at:
            self.raft.report_snapshot(message.to, False)
            return
        try:
            image = Image(self.store, self.cluster_id, self.id)
        except OSError as failure:
            log.error("cannot read the snapshot for a member", error=str(failure))
            self.raft.report_snapshot(message.to, False)
            return
        offer = proto.SnapshotOffer(
            index=image.index,
            term=image.term,
            voters=list(snapshot.voters),
            learners=list(snapshot.learners),
            size_bytes=image.size_bytes,
            nonce=self.rng.getrandbits(63),
            leader_term=message.term,
        )
        log.info(
            "sending a snapshot",
            bytes=image.size_bytes,
            **{"snapshot-index": image.index, "remote-peer-id": f"{message.to:x}"},
        )
        link.send_snapshot(image, offer)

    def _leadership_changed(self, leads: bool, leader: int) -> None:
        ids = {"local-member-id": f"{self.id:x}", "term": self.raft.term}
        if leader:
            self._campaign_at = math.inf
            if leader != self._known_leader:
                self.leader_changes += 1
                log.info("elected leader", **ids, leader=f"{leader:x}")
        elif self._known_leader:
            self._leader_lost_at = self.clock()
            self._lost_leader = self._known_leader
        self._known_leader = leader
        if leads and not self.lessor.promoted:
            self.lessor.promote(self.clock(), self.election_timeout_s)
            self._leases_checkpointed_at = self.clock()
        elif not leads and self.lessor.promoted:
            self.lessor.demote()
            self._forwarded.clear()
            for link in self.peers.links.values():
                link.drop_snapshot("another member leads now")
        if self._transfers:
            self._answer_transfers()
        if leader:
            self._published_at = -math.inf
            self._publish(self.clock())
            self._retry_held()
            self.reads.begin_anew()

    def _look_for_leader(self, now: float) -> None:
        """Tell the operator when there is none."""
        if self.raft.leader:
            self._led_at = now
            self._lost_leader = 0
            return
        ids = {"local-member-id": f"{self.id:x}", "term": self.raft.term}
        if self._lost_leader:
            log.warn("lost leader", **ids, leader=f"{self._lost_leader:x}")
            self._lost_leader = 0
        missing = self.missing_voters()
        if missing and now - max(self._led_at, self._missed_at) > NO_LEADER_S:
            self._missed_at = now + NO_LEADER_PAUSE_S
            log.error(
                f"there has been no leader for {now - self._led_at:.0f} s: {missing}. Writes and "
                "linearizable reads fail meanwhile. Start the others; if they are lost, see 'More "
                "than half is lost' in the documentation of clusters",
                **ids,
            )

    def missing_voters(self) -> str:
        """Why there is no leader, in words, if that is for want of voting members."""
        voters = self.raft.voters
        reached = sum(node == self.id or self.peers.is_open(node) for node in voters)
        quorum = len(voters) // 2 + 1
        if reached >= quorum or not voters:
            return ""
        return (
            f"this member reaches {reached} of {len(voters)} voting members, itself included, and "
            f"{quorum} are needed"
        )

    # A snapshot from the leader takes the place of the data.

    def _install(self) -> None:
        """Nothing is being applied, and the log is marked: put the snapshot in place."""
        if self.is_installing or self._task_done is not None:
            return
        self.is_installing = True
        self.housekeeping.stop()
        old = self.store
        snapshot = self._installs[0]

        def task() -> None:
            datadir.install_snapshot(old.disk, old.directory, snapshot.index)
            lessor = Lessor(old.lessor.min_ttl_s, old.limits)
            self._installed = Store.open(
                old.disk, old.directory, lessor, old.data.segment_bytes, old.limits
            )

        self.run_task(task, self._snapshot_installed)

    def _snapshot_installed(self) -> None:
        snapshot, store = self._installs.popleft(), self._installed
        assert store is not None
        assert store.applied_index == snapshot.index, "the snapshot is not what it was offered as"
        self._installed = None
        self.is_installing = False
        self.hub.restored(store)
        self.store.close()
        self.store = store
        self.lessor = store.lessor
        self.alarms.load()
        self.cluster.load(store)
        self.peers.update(self.cluster.members)
        self.housekeeping.restart()
        self.reads.restart()
        # Whether what is waited for is in the snapshot, nobody knows.
        self._proposed.clear()
        self._applied_term = snapshot.term
        self.raft.applied(snapshot.index)
        log.info("installed a snapshot", revision=store.revision, index=snapshot.index)
        self._retry_held()

    # Applying.

    def _apply(self) -> None:
        if self._applying is None:
            self._applying = self._apply_steps()
        for _ in self._applying:
            self.store.data.flush_part()
            if self.slice_is_over():
                return
        self._applying = None
        entry = self._applied_entry
        if entry is None:
            return
        self._applied_entry = None
        store = self.store
        store.mark(entry.index, entry.term)
        if store.events:
            events = store.events
            store.events = []
            self.hub.notify(events)
        self.raft.applied(entry.index)
        self.raft.compact(entry.index)

    def _apply_steps(self) -> Generator[None, None, None]:
        """Apply what is committed now, yielding now and then. What is committed meanwhile has to
        wait, so that reads and watches get their turn."""
        for _ in range(len(self._committed)):
            entry = self._committed.popleft()
            if entry.term != self._applied_term:
                self._applied_term = entry.term
                if self._proposed:
                    self._propose_again(entry.term)
            if entry.data:
                version, count, member_id, batch = ENTRY_HEADER.unpack_from(entry.data)
                assert version == ENTRY_VERSION, f"entry {entry.index} has version {version}"
                waiting = None
                if member_id == self.id:
                    self._proposed.pop(batch, None)
                    waiting = self._waiting.pop(batch, None)
                    if waiting is not None:
                        self.metrics.proposals_pending -= count
                        self._proposed_bytes -= waiting[2]
                self.housekeeping.logged_bytes += len(entry.data)
                self.alarms.took(len(entry.data))
                began = self.clock()
                if entry.kind == ENTRY_CONF_CHANGE:
                    self._apply_membership(entry, waiting[1][0] if waiting else None)
                elif waiting is None:
                    waiters = self._forwarded.pop((member_id, batch), None)
                    if waiters is None:
                        waiters = decode_requests(entry.data, count)
                    yield from self._apply_requests(waiters)
                else:
                    yield from self._apply_requests(waiting[1])
                    self._warn_if_slow(REQUEST, waiting[0], self.warn_request_s, count)
                self._warn_if_slow(APPLY, began, self.warn_apply_s, count)
            self._applied_entry = entry
            yield

    def _apply_membership(self, entry: Entry, waiter: Waiter | None) -> None:
        ((_, _, _, change),) = decode_requests(entry.data, 1)
        session, request_id, method, _ = waiter or (None, 0, 0, None)
        if entry.index <= self._forced_index:
            return
        try:
            self.cluster.check(change)
        except EtcdError as failure:
            log.warn("a membership change makes no sense any more", why=failure.text)
            if session is not None:
                session.fail(request_id, method, failure)
            return
        node = change.member.ID
        peer_urls = (self.cluster.members.get(node) or change.member).peerURLs
        conf_change = self.cluster.apply(change)
        self.store.end_revision()
        if conf_change is not None:
            self.raft.apply_conf_change(conf_change)
        self.peers.update(self.cluster.members)
        log.info(
            f"{_CHANGES[change.action]} member",
            **{
                "member-id": f"{node:x}",
                "peer-urls": ",".join(peer_urls),
                "local-member-id": f"{self.id:x}",
            },
        )
        if node == self.id and change.action == cluster.REMOVE:
            self.was_removed()
        if session is not None:
            response = methods.METHODS[method].response(
                header=self.header_message(), members=list(self.cluster.members.values())
            )
            if change.action == cluster.ADD:
                response.member = change.member  # type: ignore[attr-defined]
            session.reply(request_id, method, response.encode())

    def header_message(self) -> Any:
        """As in etcd, membership has no revision."""
        return proto.ResponseHeader(
            cluster_id=self.cluster_id, member_id=self.id, raft_term=self.raft.term
        )

    def _warn_if_slow(self, what: str, began: float, expected_s: float, count: int) -> None:
        took_s = self.clock() - began
        if took_s <= expected_s:
            return
        if what == APPLY:
            self.metrics.slow_applies += 1
        if not log.limited(what):
            log.warn(
                f"{what} took too long",
                took=f"{took_s * 1000:.0f}ms",
                requests=count,
                **{"expected-duration": f"{expected_s * 1000:.0f}ms"},
            )

    def _apply_requests(self, waiters: list[Waiter]) -> Generator[None, None, None]:
        # The hot path of writes: a plain put costs no generator and no table.
        store = self.store
        metrics = self.metrics
        capped = self.alarms.has_no_space
        corrupt = self.alarms.is_corrupt
        check = APPLIES_PER_CHECK
        for session, request_id, method, request in waiters:
            check -= 1
            if check <= 0:
                check = APPLIES_PER_CHECK
                yield
            try:
                if method == PUT:
                    if corrupt:
                        raise error("Corrupt")
                    if capped:
                        raise error("NoSpace")
                    if (
                        request.lease
                        or request.prev_kv
                        or request.ignore_value
                        or request.ignore_lease
                    ):
                        answer = txn.put(store, request)
                    else:
                        store.put(request.key, request.value, 0)
                        answer = b""
                    metrics.puts += 1
                    revision = store.end_revision()
                else:
                    if corrupt and method not in (ALARM_METHOD, PUBLISH, CHECKPOINT):
                        raise error("Corrupt")
                    if capped and needs_space(method, request):
                        raise error("NoSpace")
                    small = None
                    if method == TXN:
                        check -= len(request.success) + len(request.failure)
                        small = txn.small_txn(store, request)
                    if small is None:
                        answer = yield from APPLIERS[method](self, request)
                    else:
                        answer = small
                    if method == TXN:
                        metrics.count_txn(request, answer.startswith(b"\x10"))
                    revision = store.end_revision()
            except EtcdError as failure:
                assert not store.is_writing, "a request failed after its first change"
                if session is not None:
                    session.fail(request_id, method, failure)
                continue
            except txn.Unanswerable as applied:
                # As on every other member; only the answer is missing.
                store.end_revision()
                if applied.damage is not None and not log.limited("damaged"):
                    log.error(str(applied.damage))
                if session is not None:
                    session.fail(request_id, method, applied.failure)
                continue
            if session is not None:
                if method == COMPACT and request.physical:
                    self.housekeeping.when_compacted(session, request_id, method)
                else:
                    session.reply(request_id, method, self.header(revision) + answer)

    # State that others ask for.

    def unblocked(self, session: Session) -> None:
        """The session's answers are being read again."""
        self.reads.unblocked(session)

    def forget(self, session: Session) -> None:
        """The session is gone, and awaits nothing."""
        self.reads.forget(session)

    def header_content(self, revision: int) -> bytes:
        """The bytes of a ResponseHeader; revision 0: without one."""
        if not revision:
            return self._ids[:-1] + b"\x20" + varint(self.raft.term)
        return self._ids + varint(revision) + b"\x20" + varint(self.raft.term)

    def header(self, revision: int) -> bytes:
        """A ResponseHeader as field 1 of a response. Every answer has one, so what does not depend
        on the revision is kept, by the size of the revision."""
        if self._header_term != self.raft.term:
            self._header_term = self.raft.term
            self._header_revision = -1
            self._header_suffix = b"\x20" + varint(self.raft.term)
            ids = self._ids
            self._header_prefixes = [
                b"\x0a" + varint(len(ids) + size + len(self._header_suffix)) + ids
                for size in range(MAX_VARINT_BYTES + 1)
            ]
        if revision != self._header_revision:
            encoded = varint(revision)
            self._header_revision = revision
            self._header = self._header_prefixes[len(encoded)] + encoded + self._header_suffix
        return self._header

    def members(self) -> dict[int, Any]:
        """The members by id, as `Member` messages."""
        return self.cluster.members


_CHANGES = {
    cluster.ADD: "added",
    cluster.REMOVE: "removed",
    cluster.UPDATE: "updated",
    cluster.PROMOTE: "promoted",
}

_NOT_TAKEN = (error("NotLeader").text, error("RequestTooManyRequests").text)
"""Answers of a leader that has surely not taken an entry."""
