"""One cluster member, sans-IO: requests in, replies out, and what must be written in between.

A member joins consensus (`raft.py`), the state machine (`mvcc.py`, `lease.py`) and the watches
(`watch.py`). It owns no socket, file handle, thread or clock: its owner

- hands it work: `propose` and `read` (from `api.py`), `persisted`, `tick`, `finished`;
- calls `turn` after each bunch of that, which moves everything forward by about one time slice;
- writes what `take_saves` gives to the write-ahead log, in order, and then calls `persisted`;
- runs the slow disk work that `take_task` gives anywhere, and then calls `finished`.

A write's way: `propose` collects it; `turn` makes all collected writes one raft entry (or few), so
that consensus costs per batch and not per write; when the entry is durable and committed, its
writes are applied in order, each with its own revision, and answered.

The payload of an entry, all integers little-endian:

    0   1  format version, 1
    1   3  zero
    4   4  number of requests
    8   8  id of the member that proposed it
    16  8  number of the batch at that member, so that it finds who waits for the answers
    24     the requests, each as a frame of the native protocol: the very bytes the client sent
           (the request id in it means nothing here)

A linearizable read waits for a ReadIndex and for the state machine to reach it; one round serves
all reads that waited when it began.

Invariants: nothing is answered before it is applied, nothing applied before it is committed and
durable; reads never see half of an entry's request; requests of an entry apply the same on every
member (whatever is drawn or measured is drawn before it is proposed).
"""

from __future__ import annotations

import random
import struct
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

from etcdlite import log, proto, txn
from etcdlite.data import DataDamaged
from etcdlite.errors import EtcdError, error
from etcdlite.housekeeping import Housekeeping
from etcdlite.lease import Lessor
from etcdlite.metrics import Metrics
from etcdlite.mvcc import ALARM, LEASE, MEMBER, Store
from etcdlite.proto import FRAME, FRAME_HEADER_BYTES, MAX_VARINT_BYTES, varint
from etcdlite.raft import LEADER, Entry, HardState, NotLeader, Raft, RequestDropped
from etcdlite.watch import WatchHub

ENTRY_VERSION = 1
ENTRY_HEADER = struct.Struct("<B3xIQQ")

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

APPLIES_PER_CHECK = 128
"""Operations applied between two looks at the clock."""

READS_PER_CHECK = 128
"""Quick reads answered between two looks at the clock."""

MAX_SLOW_READS = 4
"""Reads in slices that are under way at once; each may hold a large answer in the making."""

REVOKES_PER_TICK = 1000
"""Expired leases proposed for revocation at once."""

RANGE = proto.METHOD_BY_NAME["KV.Range"].number
PUT = proto.METHOD_BY_NAME["KV.Put"].number
DELETE_RANGE = proto.METHOD_BY_NAME["KV.DeleteRange"].number
TXN = proto.METHOD_BY_NAME["KV.Txn"].number
COMPACT = proto.METHOD_BY_NAME["KV.Compact"].number
LEASE_GRANT = proto.METHOD_BY_NAME["Lease.LeaseGrant"].number
LEASE_REVOKE = proto.METHOD_BY_NAME["Lease.LeaseRevoke"].number
ALARM_METHOD = proto.METHOD_BY_NAME["Maintenance.Alarm"].number
PUBLISH = 0xE1
"""Internal: a `Member` message; its name and client URLs become those of that member."""

NOSPACE = 1
CORRUPT = 2

# What may take too long, in etcd's words.
APPLY = "apply request"
REQUEST = "request"


class Session(Protocol):
    """Who asked, and where answers go. `native.py` is one."""

    @property
    def is_blocked(self) -> bool:
        """Its answers are not being read: give it no more of those that can wait."""

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        """The answer to a unary request."""

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        """The answer to a unary request, or the end of a stream, that failed."""


Waiter = tuple["Session | None", int, int, Any]
"""(session or None, request id, method, decoded request)"""

Steps = Generator[None, None, bytes]
"""Work in slices whose result is the encoded response without its header."""


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
    ) -> None:
        self.id = member_id
        self.cluster_id = cluster_id
        self.store = store
        self.lessor = lessor
        self.raft = raft
        self.clock = clock
        self.rng = rng
        self.quota_bytes = quota_bytes
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
        )
        self.metrics = Metrics()
        self.housekeeping = Housekeeping(self, checkpoint_bytes)
        self.alarms: set[tuple[int, int]] = set()
        self._is_raising = False
        """An alarm of this member is on its way through the log."""
        self._load_alarms()
        self.space_left = 0
        self._measure_space()
        self.leader_changes = 0

        self._proposals: list[Waiter] = []
        self._frames: list[bytes] = []
        self._proposed_bytes = 0
        self._batch = rng.getrandbits(32) << 20
        self._waiting: dict[int, tuple[float, list[Waiter]]] = {}
        self._saves: list[tuple[HardState | None, Sequence[Entry]]] = []
        self._committed: deque[Entry] = deque()
        self._applying: Generator[None, None, None] | None = None
        self._applied_entry: Entry | None = None
        self._reads: list[Waiter] = []
        self._read_rounds: dict[bytes, list[Waiter]] = {}
        self._ready_reads: deque[tuple[int, list[Waiter]]] = deque()
        self._slow_reads: deque[tuple[Steps, Waiter]] = deque()
        self._unstarted_reads: deque[Waiter] = deque()
        self._held_reads: dict[Session, list[Waiter]] = {}
        self._round = 0
        self._catching_up = False
        self._deadline = 0.0
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
            session, request_id, method, request, proto.frame(1, method, 0, request.encode())
        )

    def read(self, session: Session, request_id: int, method: int, request: Any) -> None:
        """Answer a read once it is linearizable."""
        self._reads.append((session, request_id, method, request))

    def read_now(self, session: Session, request_id: int, method: int, request: Any) -> None:
        """Answer a serializable read from what is applied here."""
        self._ready_reads.append((0, [(session, request_id, method, request)]))

    def persisted(self, saves: Sequence[tuple[HardState | None, Sequence[Entry]]]) -> None:
        """What `take_saves` gave is durable."""
        for _, entries in saves:
            if entries:
                self.raft.persisted(entries[-1].index, entries[-1].term)

    def finished(self) -> None:
        """The task that `take_task` gave is done."""
        self.housekeeping.finished()

    def tick(self) -> None:
        """A heartbeat interval has passed."""
        now = self.clock()
        self._measure_space()
        self.raft.tick()
        if self.lessor.promoted:
            for lease_id in self.lessor.expired(now, REVOKES_PER_TICK):
                log.debug("lease expired", lease=f"{lease_id:016x}")
                self.metrics.leases_expired += 1
                self.propose_message(None, 0, LEASE_REVOKE, proto.LeaseRevokeRequest(ID=lease_id))
        self.hub.tick(now)
        self.housekeeping.tick(now)
        self._give_up_waiting(now)

    def _give_up_waiting(self, now: float) -> None:
        expired = now - self.request_timeout_s
        for batch, (since, waiters) in list(self._waiting.items()):
            if since > expired:
                break
            del self._waiting[batch]
            self.metrics.proposals_pending -= len(waiters)
            self.metrics.proposals_failed += len(waiters)
            self._fail(waiters, error("Timeout"))

    # Output.

    def take_saves(self) -> list[tuple[HardState | None, Sequence[Entry]]]:
        """What is to be written to the log, in order; each pair is one Ready's."""
        saves = self._saves
        self._saves = []
        return saves

    def take_task(self) -> Callable[[], None] | None:
        """Slow disk work to run away from the loop, one at a time."""
        return self.housekeeping.take_task()

    @property
    def has_work(self) -> bool:
        """A further turn has something to do at once."""
        return (
            bool(self._proposals or self._reads or self._ready_reads or self._slow_reads)
            or self._applying is not None
            or bool(self._committed)
            or self.raft.has_ready()
            or self._catching_up
            or self.housekeeping.has_work
        )

    @property
    def is_saving(self) -> bool:
        """Own proposals wait for the log, and nothing but background work could be done now."""
        return bool(self._waiting) and not (
            self._proposals
            or self._reads
            or self._ready_reads
            or self._slow_reads
            or self._applying is not None
            or self._committed
        )

    @property
    def is_corrupt(self) -> bool:
        """An alarm says that members differ: no write is taken any more. (Reads are, as in etcd: it
        is by them that an operator finds out what is true.)"""
        return any(kind == CORRUPT for _, kind in self.alarms)

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
            or self._reads
            or self._read_rounds
            or self._ready_reads
            or self._slow_reads
            or self._applying
            or self._committed
        )

    # A turn.

    def turn(self) -> None:
        """Move everything forward; long work by one slice."""
        self._deadline = self.clock() + SLICE_S
        if self._proposals:
            self._propose_batch()
        if self._reads:
            self._begin_read_round()
        while self.raft.has_ready():
            self._take_ready()
        if self._applying is not None or self._committed:
            self._apply()
        if self._ready_reads and self._applying is None:
            self._serve_reads()
        if self._slow_reads and self._applying is None:
            self._continue_slow_reads()
        if self.hub.slow_watches and self._applying is None:
            self._catching_up = self.hub.run(self.slice_is_over)

    def housekeep(self) -> None:
        """A slice of background work, after a turn's results were handed out."""
        if self._applying is None and self.housekeeping.has_work:
            self._deadline = self.clock() + SLICE_S
            self.housekeeping.run(self.slice_is_over)

    def slice_is_over(self) -> bool:
        return self.clock() >= self._deadline

    def _propose_batch(self) -> None:
        waiters, frames = self._proposals, self._frames
        self._proposals, self._frames = [], []
        if sum(map(len, frames)) <= MAX_ENTRY_BYTES:
            self._propose_entry(waiters, frames)
            return
        start = size = 0
        for at, frame in enumerate(frames):
            if size and size + len(frame) > MAX_ENTRY_BYTES:
                self._propose_entry(waiters[start:at], frames[start:at])
                start, size = at, 0
            size += len(frame)
        self._propose_entry(waiters[start:], frames[start:])

    def _propose_entry(self, waiters: list[Waiter], frames: list[bytes]) -> None:
        self._batch += 1
        header = ENTRY_HEADER.pack(ENTRY_VERSION, len(frames), self.id, self._batch)
        data = b"".join((header, *frames))
        try:
            self.raft.propose(data)
        except NotLeader:
            self._fail(waiters, error("NoLeader"))
        except RequestDropped:
            self._fail(waiters, error("RequestTooManyRequests"))
        else:
            self._waiting[self._batch] = (self.clock(), waiters)
            self.metrics.proposals_pending += len(waiters)
            self.metrics.batch_requests.observe(len(waiters))
            return
        self.metrics.proposals_failed += len(waiters)
        self._proposed_bytes -= len(data) - ENTRY_HEADER.size + REQUEST_BYTES * len(frames)

    @staticmethod
    def _fail(waiters: list[Waiter], failure: EtcdError) -> None:
        for session, request_id, method, _ in waiters:
            if session is not None:
                session.fail(request_id, method, failure)

    def _begin_read_round(self) -> None:
        reads = self._reads
        self._reads = []
        self._round += 1
        context = self._round.to_bytes(8, "big")
        try:
            self.raft.read_index(context)
        except NotLeader:
            self._fail(reads, error("NoLeader"))
        except RequestDropped:
            self._fail(reads, error("RequestTooManyRequests"))
        else:
            self._read_rounds[context] = reads
            return
        self.metrics.read_rounds_failed += 1

    def _take_ready(self) -> None:
        ready = self.raft.ready()
        if ready.soft_state is not None:
            self._leadership_changed(ready.soft_state.role == LEADER, ready.soft_state.leader)
        if ready.hard_state is not None or ready.entries:
            self._saves.append((ready.hard_state, ready.entries))
        if ready.committed_entries:
            self._committed.extend(ready.committed_entries)
        for state in ready.read_states:
            reads = self._read_rounds.pop(state.context, None)
            if reads:
                self._ready_reads.append((state.index, reads))

    def _leadership_changed(self, leads: bool, leader: int) -> None:
        if leads and not self.lessor.promoted:
            self.leader_changes += 1
            log.info(
                "elected leader",
                **{
                    "local-member-id": f"{self.id:x}",
                    "term": self.raft.term,
                    "leader": f"{leader:x}",
                },
            )
            self.lessor.promote(self.clock(), self.election_timeout_s)
        elif not leads and self.lessor.promoted:
            self.lessor.demote()

    # Applying.

    def _apply(self) -> None:
        if self._applying is None:
            self._applying = self._apply_steps()
        for _ in self._applying:
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
        self._measure_space()

    def _apply_steps(self) -> Generator[None, None, None]:
        """Apply what is committed now, yielding now and then. What is committed meanwhile has to
        wait, so that reads and watches get their turn."""
        for _ in range(len(self._committed)):
            entry = self._committed.popleft()
            if entry.data:
                version, count, member_id, batch = ENTRY_HEADER.unpack_from(entry.data)
                assert version == ENTRY_VERSION, f"entry {entry.index} has version {version}"
                waiting = None
                if member_id == self.id:
                    waiting = self._waiting.pop(batch, None)
                    if waiting is not None:
                        self.metrics.proposals_pending -= count
                    size = len(entry.data) - ENTRY_HEADER.size + REQUEST_BYTES * count
                    self._proposed_bytes = max(0, self._proposed_bytes - size)
                self.housekeeping.logged_bytes += len(entry.data)
                began = self.clock()
                if waiting is None:
                    yield from self._apply_requests(decode_requests(entry.data, count))
                else:
                    yield from self._apply_requests(waiting[1])
                    self._warn_if_slow(REQUEST, waiting[0], self.warn_request_s, count)
                self._warn_if_slow(APPLY, began, self.warn_apply_s, count)
            self._applied_entry = entry
            yield

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
        capped = any(alarm == NOSPACE for _, alarm in self.alarms)
        corrupt = self.is_corrupt
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
                    if corrupt and method not in (ALARM_METHOD, PUBLISH):
                        raise error("Corrupt")
                    if capped and needs_space(method, request):
                        raise error("NoSpace")
                    if method == TXN:
                        check -= len(request.success) + len(request.failure)
                    answer = yield from APPLIERS[method](self, request)
                    revision = store.end_revision()
            except EtcdError as failure:
                assert not store.is_writing, "a request failed after its first change"
                if session is not None:
                    session.fail(request_id, method, failure)
                continue
            if session is not None:
                if method == COMPACT and request.physical:
                    self.housekeeping.when_compacted(session, request_id, method)
                else:
                    session.reply(request_id, method, self.header(revision) + answer)

    def _apply_delete_range(self, request: Any) -> Steps:
        self.metrics.deletes += 1
        return txn.delete_range_steps(self.store, request)

    def _apply_txn(self, request: Any) -> Steps:
        answer = yield from txn.txn_steps(self.store, request)
        self.metrics.count_txn(request, answer.startswith(b"\x10"))
        return answer

    def _apply_compact(self, request: Any) -> Steps:
        self.store.compact(request.revision)
        return b""
        yield

    def _apply_lease_grant(self, request: Any) -> Steps:
        ttl_s = self.lessor.grant(request.ID, request.TTL, self.clock())
        self.metrics.leases_granted += 1
        self.metrics.lease_ttl_s.observe(ttl_s)
        self.store.set_bucket(LEASE, request.ID.to_bytes(8, "big"), self.lessor.encode(request.ID))
        return b"\x10" + varint(request.ID) + b"\x18" + varint(ttl_s)
        yield

    def _apply_lease_revoke(self, request: Any) -> Steps:
        for count, key in enumerate(self.lessor.revoke(request.ID), 1):
            self.store.delete(key)
            self.metrics.deletes += 1
            if count % APPLIES_PER_CHECK == 0:
                yield
        self.store.set_bucket(LEASE, request.ID.to_bytes(8, "big"), None)
        self.metrics.leases_revoked += 1
        return b""

    def _apply_alarm(self, request: Any) -> Steps:
        alarm = (request.memberID, request.alarm)
        if request.memberID == self.id:
            self._is_raising = False
        changed = []
        if request.action == 0:
            changed = [
                (member_id, kind)
                for member_id, kind in sorted(self.alarms)
                if request.alarm in (0, kind)
            ]
        elif request.alarm in (NOSPACE, CORRUPT) and request.action == 1:
            if alarm not in self.alarms:
                self._log_alarm(log.warn, "alarm raised", alarm)
            self.alarms.add(alarm)
            self.store.set_bucket(ALARM, _alarm_key(alarm), b"")
            changed = [alarm]
        elif request.alarm and request.action == 2 and alarm in self.alarms:
            self._log_alarm(log.info, "alarm disarmed", alarm)
            self.alarms.remove(alarm)
            self.store.set_bucket(ALARM, _alarm_key(alarm), None)
            changed = [alarm]
        members = [proto.AlarmMember(memberID=i, alarm=kind) for i, kind in changed]
        encoded: bytes = proto.AlarmResponse(alarms=members).encode()
        return encoded
        yield

    @staticmethod
    def _log_alarm(write: Callable[..., None], message: str, alarm: tuple[int, int]) -> None:
        write(message, alarm=alarm_name(alarm[1]), **{"member-id": f"{alarm[0]:x}"})

    def _apply_publish(self, request: Any) -> Steps:
        member = self.members().get(request.ID)
        if member is not None:
            member.name = request.name
            member.clientURLs = list(request.clientURLs)
            self.store.set_bucket(MEMBER, request.ID.to_bytes(8, "big"), member.encode())
        return b""
        yield

    # Reading.

    def _serve_reads(self) -> None:
        applied = self.store.applied_index
        for _ in range(len(self._ready_reads)):
            index, reads = self._ready_reads.popleft()
            if index > applied:
                self._ready_reads.append((index, reads))
                continue
            for at, read in enumerate(reads, 1):
                quick = self._serve_read(read)
                if (not quick or at % READS_PER_CHECK == 0) and self.slice_is_over():
                    if at < len(reads):
                        self._ready_reads.appendleft((0, reads[at:]))
                    return

    def _serve_read(self, read: Waiter) -> bool:
        """Answer a read or begin to; True if that took no time to speak of."""
        session, request_id, method, request = read
        assert session is not None
        store = self.store
        if session.is_blocked:
            self._held_reads.setdefault(session, []).append(read)
            return True
        try:
            if (
                method == RANGE
                # Nothing is set but the key: an instance holds only what was set.
                and len(request.__dict__) == 1 + request.serializable
            ):
                # The hot path of reads: one key, now.
                self.metrics.ranges += 1
                kv = store.get(request.key)
                answer = b"\x12" + varint(len(kv)) + kv + b"\x20\x01" if kv is not None else b""
                session.reply(request_id, method, self.header(store.revision) + answer)
                return True
        except DataDamaged as damage:
            self._fail_damaged(read, damage)
            return True
        steps = READERS[method](self, request)
        if not self._advance_read(steps, read):
            if len(self._slow_reads) < MAX_SLOW_READS:
                self._slow_reads.append((steps, read))
            else:
                steps.close()
                self._unstarted_reads.append(read)
        return False

    def _advance_read(self, steps: Steps, read: Waiter) -> bool:
        """Do a step of a read; True if it is answered."""
        session, request_id, method, _ = read
        assert session is not None
        try:
            next(steps)
        except StopIteration as done:
            session.reply(request_id, method, done.value)
        except EtcdError as failure:
            session.fail(request_id, method, failure)
        except DataDamaged as damage:
            self._fail_damaged(read, damage)
        else:
            return False
        return True

    def _fail_damaged(self, read: Waiter, damage: DataDamaged) -> None:
        """A record that was asked for is damaged: refuse that read, serve the others."""
        session, request_id, method, _ = read
        assert session is not None
        if not log.limited("damaged"):
            log.error(str(damage))
        session.fail(request_id, method, error("Corrupt"))

    def _continue_slow_reads(self) -> None:
        while self._slow_reads:
            steps, read = self._slow_reads.popleft()
            if not self._advance_read(steps, read):
                self._slow_reads.append((steps, read))
            self._start_reads()
            if self.slice_is_over():
                return

    def _start_reads(self) -> None:
        while self._unstarted_reads and len(self._slow_reads) < MAX_SLOW_READS:
            self._serve_read(self._unstarted_reads.popleft())

    def unblocked(self, session: Session) -> None:
        """The session's answers are being read again: go on with its reads."""
        reads = self._held_reads.pop(session, None)
        if reads:
            self._ready_reads.append((0, reads))

    def forget(self, session: Session) -> None:
        """The session is gone: do no more work for its reads."""
        self._held_reads.pop(session, None)
        if not self._slow_reads:
            return
        self._unstarted_reads = deque(
            read for read in self._unstarted_reads if read[0] is not session
        )
        for item in list(self._slow_reads):
            if item[1][0] is session:
                self._slow_reads.remove(item)
                item[0].close()
        self._start_reads()

    def _read_range(self, request: Any) -> Steps:
        header = self.header(self.store.revision)
        answer = yield from self.store.range_steps(request)
        self.metrics.ranges += 1
        return header + answer

    def _read_txn(self, request: Any) -> Steps:
        header = self.header(self.store.revision)
        answer = yield from txn.txn_steps(self.store, request)
        self.metrics.count_txn(request, answer.startswith(b"\x10"))
        return header + answer

    def _read_time_to_live(self, request: Any) -> Steps:
        response = proto.LeaseTimeToLiveResponse(ID=request.ID)
        if self.lessor.exists(request.ID):
            remaining_s = self.lessor.remaining_s(request.ID, self.clock())
            response.TTL = max(0, int(remaining_s))
            response.grantedTTL = self.lessor.ttl_s(request.ID)
            if request.keys:
                response.keys = self.lessor.keys(request.ID)
        else:
            response.TTL = -1
        return self.header(self.store.revision) + response.encode()
        yield

    def _read_leases(self, request: Any) -> Steps:
        ids = self.lessor.leases()
        response = proto.LeaseLeasesResponse(leases=[proto.LeaseStatus(ID=i) for i in ids])
        return self.header(self.store.revision) + response.encode()
        yield

    def _read_members(self, request: Any) -> Steps:
        members = list(self.members().values())
        # As in etcd, membership has no revision.
        header = proto.ResponseHeader(
            cluster_id=self.cluster_id, member_id=self.id, raft_term=self.raft.term
        )
        encoded: bytes = proto.MemberListResponse(header=header, members=members).encode()
        return encoded
        yield

    def _read_hash(self, request: Any) -> Steps:
        store = self.store
        header = self.header(store.revision)
        began = self.clock()
        value = yield from store.hash_steps(store.revision)
        self.metrics.hash_s.observe(self.clock() - began)
        return header + proto.HashResponse(hash=value).encode()

    def _read_hash_kv(self, request: Any) -> Steps:
        store = self.store
        store.check_revision(request.revision)
        revision = request.revision or store.revision
        response = proto.HashKVResponse(
            compact_revision=store.compacted or -1, hash_revision=revision
        )
        header = self.header(store.revision)
        began = self.clock()
        response.hash = yield from store.hash_steps(revision)
        self.metrics.hash_rev_s.observe(self.clock() - began)
        return header + response.encode()

    # State that others ask for.

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
        return {
            int.from_bytes(key, "big"): proto.Member.decode(value)
            for key, value in sorted(self.store.buckets.get(MEMBER, {}).items())
        }

    def raise_nospace(self) -> None:
        """Have the cluster know that this member is out of space."""
        if (self.id, NOSPACE) not in self.alarms and not self._is_raising:
            self._is_raising = True
            self.propose_message(
                None,
                0,
                ALARM_METHOD,
                proto.AlarmRequest(action=1, memberID=self.id, alarm=NOSPACE),
            )

    def _measure_space(self) -> None:
        if self.quota_bytes:
            self.space_left = self.quota_bytes - self.store.size_in_use_bytes
        else:
            self.space_left = 1 << 62

    def _load_alarms(self) -> None:
        for key in self.store.buckets.get(ALARM, ()):
            self.alarms.add((int.from_bytes(key[:8], "big"), key[8]))


APPLIERS: dict[int, Callable[[Member, Any], Steps]] = {
    DELETE_RANGE: Member._apply_delete_range,
    TXN: Member._apply_txn,
    COMPACT: Member._apply_compact,
    LEASE_GRANT: Member._apply_lease_grant,
    LEASE_REVOKE: Member._apply_lease_revoke,
    ALARM_METHOD: Member._apply_alarm,
    PUBLISH: Member._apply_publish,
}

READERS: dict[int, Callable[[Member, Any], Steps]] = {
    RANGE: Member._read_range,
    TXN: Member._read_txn,
    proto.METHOD_BY_NAME["Lease.LeaseTimeToLive"].number: Member._read_time_to_live,
    proto.METHOD_BY_NAME["Lease.LeaseLeases"].number: Member._read_leases,
    proto.METHOD_BY_NAME["Cluster.MemberList"].number: Member._read_members,
    proto.METHOD_BY_NAME["Maintenance.Hash"].number: Member._read_hash,
    proto.METHOD_BY_NAME["Maintenance.HashKV"].number: Member._read_hash_kv,
}

_REQUESTS = {number: method.request for number, method in proto.METHODS.items()}
_REQUESTS[PUBLISH] = proto.Member


def decode_requests(data: bytes, count: int) -> list[Waiter]:
    """The requests of an entry's payload that nobody here waits for."""
    waiters: list[Waiter] = []
    at = ENTRY_HEADER.size
    for _ in range(count):
        length, request_id, method, _ = FRAME.unpack_from(data, at)
        end = at + 4 + length
        request = _REQUESTS[method].decode(data, at + FRAME_HEADER_BYTES, end)
        waiters.append((None, request_id, method, request))
        at = end
    assert at == len(data), "an entry's payload has bytes after its requests"
    return waiters


def needs_space(method: int, request: Any) -> bool:
    """Whether a write is refused while there is no space: puts and leases, not deletes."""
    if method == TXN:
        return any(
            op.request_put is not None
            or (op.request_txn is not None and needs_space(TXN, op.request_txn))
            for op in (*request.success, *request.failure)
        )
    return method in (PUT, LEASE_GRANT)


def alarm_name(kind: int) -> str:
    return {NOSPACE: "NOSPACE", CORRUPT: "CORRUPT"}.get(kind, str(kind))


def _alarm_key(alarm: tuple[int, int]) -> bytes:
    return alarm[0].to_bytes(8, "big") + bytes((alarm[1],))
