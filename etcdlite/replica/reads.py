"""Reads: from the request to the answer.

A linearizable read waits for a ReadIndex round (Raft thesis, 6.4), and then for the state machine
to reach that index. One round serves all reads that waited when it began. If it is not confirmed
within `READ_RETRY_S`, another round is begun for the same reads, and the first one that is
confirmed serves them. A serializable read is ready at once; so is any read on a member that is
alone and has applied all that is committed.

A read that is more than a look-up of one key is done in steps. Each session has a line of such
reads, and the lines take turns, so a session waits for one turn of each other session and not for
all of their reads. The first read of a line gets a few steps at its turn. If they are not enough,
it needs a slot, because it may hold a large unfinished answer: without a free slot it is stopped,
and begins again when it gets one. With a slot it gets one step per turn. A session has at most one
slot. The number of waiting reads is limited, per session and in all. Hashes are background work.

A late answer is that of a write which is applied, but whose answer is too large for one step. It is
read in a line like any other, except that it cannot begin again.

While an entry is applied in part, ranges and transactions are answered as of the store's revision:
the state after the last request that is carried out completely.

The line of a client that does not read its answers is held until it reads again. A read that was
cancelled is dropped.

While auth is enabled, a read is checked when it begins, against users and roles as of then. A read
in steps fails if they change before its end, as in etcd: what it has read may not be permitted any
more.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

from etcdlite import log, methods, proto, ranges, txn
from etcdlite.auth import Auth, Author, RightsUnknown
from etcdlite.errors import RESOURCE_EXHAUSTED, UNAVAILABLE, EtcdError, error
from etcdlite.options import Options
from etcdlite.proto import varint, varint64
from etcdlite.raft import NotLeader, Raft, RequestDropped
from etcdlite.raft_log import Entry
from etcdlite.replica.access import Access
from etcdlite.replica.state import State
from etcdlite.request import Asked, Session, Shares, Steps, Waiter, empty_read, warn_slow
from etcdlite.storage.layout import DataDamaged
from etcdlite.storage.steps import join_steps

READ_RETRY_S = 0.5
"""A round that is not confirmed after this time is followed by another for the same reads."""

LARGE_BYTES = 512
MAX_LARGE_BYTES = 64 << 20
"""Reads with more than `LARGE_BYTES` may have this many together while they wait for a round. The
others are bounded by their number, like all open requests of a connection."""

MAX_TXN_STEPS = 1_000
"""A transaction that takes more steps than this fails while other reads wait for its slot: it may
visit all keys thousands of times. A step that compares values takes 4 ms."""

DROPPED_PER_STEP = 256
"""Cancelled reads that a line drops at one turn."""


class Group:
    """The reads that waited when a round began."""

    __slots__ = ("asked_at", "large_bytes", "reads", "since")

    def __init__(self, since: float, reads: list[Waiter], large_bytes: int) -> None:
        self.since = since
        self.large_bytes = large_bytes
        """The size of those with more than `LARGE_BYTES`."""
        self.asked_at = since
        """When the latest round for them began."""
        self.reads = reads
        """Emptied when a round for them is confirmed."""


ANSWER_LOST = EtcdError(
    UNAVAILABLE,
    "etcdlite: the answer to this write is lost: a snapshot replaced the state. The write was "
    "applied",
)

NO_MEMORY = EtcdError(
    RESOURCE_EXHAUSTED,
    "etcdlite: this member has no memory for the answer: ask for a smaller one. If the request "
    "was a write, it was applied",
)

READS_TOO_MUCH = EtcdError(
    RESOURCE_EXHAUSTED,
    "etcdlite: this transaction reads too much, and others wait: ask for less at a time. If it "
    "writes, it was applied",
)

SERVED_BESIDE = frozenset((methods.RANGE, methods.TXN, methods.KEEP_ALIVE))
"""Methods whose reads may be begun while an entry is applied in part: they take what they answer
from the revision before, or from nothing that changes in steps."""

BACKGROUND = frozenset((methods.HASH, methods.HASH_KV))
"""Methods whose reads visit the whole store and are not urgent: they are done one after the
other, as background work."""


def _line_owner(session: Any) -> Any:
    """The session whose line takes the reads of `session`: itself, or its connection."""
    return getattr(session, "line_owner", session)


class _Line:
    """The reads of a session that are done in steps."""

    __slots__ = (
        "has_slot", "is_held", "is_late", "read", "reads", "resumed_at", "session", "since",
        "spent_steps", "steps",
    )  # fmt: skip

    def __init__(self, session: Session) -> None:
        self.session = session
        self.reads: deque[tuple[Steps | None, Waiter, float]] = deque()
        """(steps, read, since): reads that wait, and since when. Only late answers have steps."""
        self.steps: Steps | None = None
        self.read: Waiter | None = None
        """The read under way."""
        self.since = 0.0
        """When it began to wait."""
        self.resumed_at = 0.0
        """When the session was last unblocked."""
        self.is_late = False
        """The read under way is the late answer to a write, so it cannot be begun again."""
        self.spent_steps = 0
        """Steps of the first read; from `read_trial_steps` on it needs a slot."""
        self.has_slot = False
        self.is_held = False
        """The session is blocked, so the line has no turns."""


class Reads:
    """The reads of a member that are not answered yet."""

    def __init__(
        self,
        state: State,
        raft: Raft,
        rng: random.Random,
        slice_is_over: Callable[[], bool],
        options: Options,
        access: Access,
    ) -> None:
        self.streamed = Shares()
        """Answers that are being sent while they are read."""
        self.new: list[Waiter] = []
        """Reads for the next round."""
        self._new_large_bytes = 0
        """The size of those with more than `LARGE_BYTES`."""
        self._large_bytes = 0
        """The size of all reads with more than `LARGE_BYTES` that wait for a round, new or not."""
        self.ready: deque[tuple[int, list[Waiter], float]] = deque()
        """(index, reads, since): reads that may be answered once this index is applied, and when
        they began to wait; 0 if they did not have to."""
        self._since = 0.0
        """When the reads that are being served began to wait; 0 if they did not have to."""
        self._warn_s = options.warn_apply_s
        self.slow: deque[_Line] = deque()
        """Lines in the order of their turns, without those that are held or wait for a slot."""
        self.background: deque[Waiter] = deque()
        """Reads in `BACKGROUND`. The first one is under way."""
        self._background_shares = Shares()
        self._background_steps: Steps | None = None
        self._state = state
        self._raft = raft
        self._access = access
        access.when_current = lambda do, size: self.read(empty_read(lambda _: do()), size)
        access.when_known = lambda author, do: self.check_renewal(
            Asked(lambda answer: do()), 0, author, 0
        )
        self._slice_is_over = slice_is_over
        self._request_timeout_s = options.request_timeout_s
        self._late_answers = state.late_answers
        self._waiting: deque[Group] = deque()
        """Groups whose rounds are not confirmed, the oldest first. The first one has reads."""
        self._rounds: dict[bytes, list[Group]] = {}
        """The groups that each round is for, by its context."""
        # Random, so that an answer to an earlier incarnation is never taken for one to this one.
        self._round = rng.getrandbits(32) << 20
        self._lines: dict[Session, _Line] = {}
        """All lines, none of them empty."""
        self._awaiting_slot: deque[_Line] = deque()
        """Lines that wait for a slot, because all slots are taken."""
        self._slots_taken = 0
        self._waiting_count = 0
        self._as_of: int | None = None
        """The store's revision while an entry is applied in part."""
        self.members_since = 0
        """Entries after this index were proposed to present members only."""

    @property
    def can_serve(self) -> bool:
        return bool(self.ready or self.slow or self._late_answers)

    @property
    def has_work(self) -> bool:
        """`serve` has something to do, though nothing more is applied: reads that are ready may
        wait for an entry that this member does not have yet."""
        if self.slow or self._late_answers:
            return True
        applied = self._state.store.applied_index
        return any(read[0] <= applied for read in self.ready)

    @property
    def are_waiting(self) -> bool:
        """Some reads wait for a round to be confirmed."""
        return bool(self._waiting)

    # Accepting reads.

    def read(self, read: Waiter, size_bytes: int = 0) -> None:
        """Answer a read once it is linearizable. `size_bytes`: of a request that may be large."""
        learners = self._raft.learners
        if learners and self._state.identity.member_id in learners:
            read.fail(error("NotSupportedForLearner"))
            return
        if size_bytes > LARGE_BYTES:
            if self._large_bytes + size_bytes > MAX_LARGE_BYTES:
                read.fail(error("RequestTooManyRequests"))
                return
            self._large_bytes += size_bytes
            self._new_large_bytes += size_bytes
        self.new.append(read)

    def read_own(self, read: Waiter) -> None:
        """As `read`, for this member itself, even if it is a learner."""
        self.new.append(read)

    def read_now(self, read: Waiter, size_bytes: int = 0) -> None:
        """Answer a serializable read from what is applied here. If that does not permit the read,
        it waits until the state is current. `size_bytes` as for `read`."""
        group: tuple[int, list[Waiter], float] = (0, [read], 0.0)
        if self._state.auth.enabled:
            # A read that is refused is refused again when it is served.
            ready = self.ready
            self._access.admit(read, lambda _: ready.append(group), size_bytes)
        else:
            self.ready.append(group)

    def check_renewal(
        self, session: Session, request_id: int, author: Author | None, lease_id: int
    ) -> None:
        """Answer b"" if the author may write all keys of the lease, as of what is applied here."""
        read = Waiter(session, request_id, methods.KEEP_ALIVE, (author, lease_id))
        self.ready.append((0, [read], 0.0))

    # ReadIndex rounds.

    def begin_round(self, is_needless: bool) -> None:
        """Begin a round for the new reads. If it is needless, they are ready at once."""
        now, reads, large_bytes = self._state.clock(), self.new, self._new_large_bytes
        self.new, self._new_large_bytes = [], 0
        if is_needless:
            self._large_bytes -= large_bytes
            self.ready.append((0, reads, now))
            return
        group = Group(now, reads, large_bytes)
        self._waiting.append(group)
        self._ask([group], now)

    def _ask(self, groups: list[Group], now: float) -> None:
        """Begin a round for these groups, the first one or another."""
        for group in groups:
            group.asked_at = now
        self._round += 1
        context = self._round.to_bytes(8, "big")
        self._rounds[context] = groups
        with suppress(NotLeader, RequestDropped):  # `tick` or `retry` begins another round.
            self._raft.read_index(context)

    def retry(self) -> None:
        """A leader was elected or can be reached again: begin another round at once."""
        if self._waiting:
            self._ask(list(self._waiting), self._state.clock())

    def confirmed(self, context: bytes, index: int) -> None:
        """A round is confirmed: its reads are linearizable once `index` is applied."""
        for group in self._rounds.pop(context, ()):
            if group.reads:
                self.ready.append((index, group.reads, group.since))
                self._empty(group)

    def _empty(self, group: Group) -> None:
        """The reads of a group do not wait any more. Drop the empty groups at the front."""
        group.reads = []
        self._large_bytes -= group.large_bytes
        group.large_bytes = 0
        while self._waiting and not self._waiting[0].reads:
            self._waiting.popleft()

    def expire_steps(self, now: float) -> Iterator[None]:
        """Fail the reads that have waited too long, one in each step."""
        while self._waiting and self._waiting[0].since <= now - self._request_timeout_s:
            group = self._waiting[0]
            self._state.metrics.read_rounds_failed += 1
            self._state.metrics.slow_read_rounds += 1
            reads = group.reads
            self._empty(group)
            for read in reads:
                read.fail(error("Timeout"))
                yield

    def tick(self, now: float) -> None:
        """Ask again for reads whose read index has not been confirmed in time."""
        self._rounds = {c: g for c, g in self._rounds.items() if any(x.reads for x in g)}
        due = [x for x in self._waiting if x.reads and now - x.asked_at > READ_RETRY_S]
        if due:
            self._state.metrics.slow_read_rounds += 1
            self._ask(due, now)

    # Answering.

    def serve(self) -> None:
        """Answer ready reads, for one slice. While an entry is applied in part: `serve_beside`."""
        self._as_of = None
        self._serve_slice(self._state.store.applied_index)

    def serve_beside(self, last: Entry | None, term: int) -> None:
        """Answer reads while an entry of `term` is applied in part: those that need nothing of it.
        `last` is the last entry since the store's mark that is applied whole.

        A read with a lower index than the entry needs nothing of it. Others must wait: another
        member may have applied the entry and answered it. A member that is alone, and was when it
        proposed the entry, knows that nobody saw what it has not applied yet, so it may place a
        read before that. An entry of an earlier term may have been answered before a crash."""
        raft, store = self._raft, self._state.store
        index = store.applied_index if last is None else last.index
        if (
            raft.is_sole_voter
            and not raft.learners
            and raft.term == term
            and index >= self.members_since
        ):
            index = raft.log.committed
        self._as_of = store.revision
        self._serve_slice(index)

    def _serve_slice(self, readable: int) -> None:
        if self.ready:
            self._serve_ready(readable)
        self._take_late()
        waiting = 0
        while waiting < len(self.slow):
            waiting = 0 if self._take_turn(self.slow.popleft()) else waiting + 1
            if self._slice_is_over():
                return

    def _warn_if_slow(self, since: float, reads: list[Waiter]) -> None:
        took_s = self._state.clock() - since
        if took_s > self._warn_s and reads[0].method in (methods.RANGE, methods.TXN):
            self._state.metrics.slow_applies += 1
            warn_slow("read", took_s, self._warn_s, reads)

    def _take_late(self) -> None:
        self._since = 0.0
        late = self._late_answers
        while late:
            steps, read = late.popleft()
            self._enqueue(read, steps)

    def _serve_ready(self, readable: int) -> None:
        """`readable`: the index up to which reads may be answered."""
        step_reads = self._state.store.limits.serve_step_reads
        for _ in range(len(self.ready)):
            index, reads, since = self.ready.popleft()
            if index > readable:
                self.ready.append((index, reads, since))
                continue
            self._since = since
            if self._as_of is not None and not all(read.method in SERVED_BESIDE for read in reads):
                others = [read for read in reads if read.method not in SERVED_BESIDE]
                self.ready.append((index, others, since))
                reads = [read for read in reads if read.method in SERVED_BESIDE]
            for at, read in enumerate(reads, 1):
                if (not self._serve(read) or at % step_reads == 0) and self._slice_is_over():
                    if at < len(reads):
                        self.ready.appendleft((0, reads[at:], since))
                    return
            if since and reads:
                self._warn_if_slow(since, reads)

    def _serve(self, read: Waiter) -> bool:
        """Answer a read, begin it or enqueue it. Returns False if it did a step of a long read."""
        session, request_id, method, request = read
        state = self._state
        if session.is_blocked and method not in BACKGROUND and session.awaits(request_id):
            self._enqueue(read)
            return True
        try:
            if (
                method == methods.RANGE
                # Only the key is set: a message stores only the fields that were set.
                and len(request.__dict__) == 1 + request.serializable
            ):
                # The hot path of reads: one key, now.
                if state.auth.enabled and not self._access.may_read(
                    session, request_id, request.key
                ):
                    self._access.check(read)
                store = state.store
                state.metrics.ranges += 1
                kv = store.get(request.key, self._as_of)
                answer = b"\x12" + varint(len(kv)) + kv + b"\x20\x01" if kv is not None else b""
                session.reply(request_id, method, state.identity.header(store.revision) + answer)
                return True
        except DataDamaged as damage:
            read.fail(damage.report())
            return True
        except RightsUnknown:
            pass
        except EtcdError as refused:
            read.fail(refused)
            return True
        if not read.is_awaited:
            read.reply(b"")
            return True
        if method in BACKGROUND:
            if self._background_shares.take(session, state.store.limits.max_background_reads):
                self.background.append(read)
            else:
                read.fail(error("RequestTooManyRequests"))
            return True
        if self._lines:
            self._enqueue(read)
            return True
        steps = self._steps(read)
        if not _advance(steps, read):
            owner = _line_owner(session)
            line = self._lines[owner] = _Line(owner)
            line.steps, line.read, line.spent_steps = steps, read, 1
            line.since = self._since or self._state.clock()
            self.slow.append(line)
        return False

    def _steps(self, read: Waiter) -> Steps:
        session, _, method, request = read
        if method == methods.RANGE and getattr(session, "streams_ranges", False):
            steps = _streamable_range(self._state, request)
        else:
            steps = READERS[method](self._state, request)
        return self._checked(read, steps) if self._state.auth.enabled else steps

    def _checked(self, read: Waiter, steps: Steps) -> Steps:
        """`steps`, if the user may make this read. Raises EtcdError."""
        _, _, method, request = read
        auth = self._state.auth
        try:
            author = self._access.check(read)
        except RightsUnknown as unknown:
            yield from auth.learn_steps(unknown.author)
            author = self._access.check(read)
        revision = auth.revision
        if method == methods.LEASE_LEASES or (method == methods.TIME_TO_LIVE and request.keys):
            lease_id = None if method == methods.LEASE_LEASES else request.ID
            yield from self._state.lease_rights.read_steps(author, lease_id)
        try:
            answer = yield from steps
        except ranges.AnswerTooLarge:
            # The session may send the answer in another way, without a further check.
            if auth.revision != revision:
                raise error("AuthOldRevision") from None
            raise
        if auth.revision != revision:
            raise error("AuthOldRevision")
        return answer

    def _enqueue(self, read: Waiter, steps: Steps | None = None) -> None:
        owner = _line_owner(read.session)
        line = self._lines.get(owner)
        if line is None:
            line = self._lines[owner] = _Line(owner)
            self.slow.append(line)
        elif steps is None and (
            len(line.reads) >= self._state.store.limits.max_waiting_reads_per_session
            or self._waiting_count >= self._state.store.limits.max_waiting_reads
        ):
            read.fail(error("RequestTooManyRequests"))
            return
        line.reads.append((steps, read, self._since or self._state.clock()))
        self._waiting_count += 1

    def _take_turn(self, line: _Line) -> bool:
        """Do a step of a line's first read, and put the line where it has its next turn. Returns
        False if the read must wait until the entry is applied."""
        if line.steps is None and not self._begin(line):
            # A line that is not held and still has reads waits for the entry, if one is applied.
            return line.is_held or not line.reads or self._as_of is None
        steps, read = line.steps, line.read
        assert steps is not None and read is not None
        if not read.is_awaited:
            steps.close()
            read.reply(b"")
            self._end(line)
        elif (
            read.method == methods.TXN and line.spent_steps > MAX_TXN_STEPS and self._awaiting_slot
        ):
            steps.close()
            read.fail(READS_TOO_MUCH)
            self._end(line)
        elif _advance(steps, read):
            self._warn_if_slow(max(line.since, line.resumed_at), [read])
            self._end(line)
        elif line.has_slot:
            line.spent_steps += 1
            self.slow.append(line)
        else:
            limits = self._state.store.limits
            line.spent_steps += 1
            if line.spent_steps < limits.read_trial_steps:
                self.slow.appendleft(line)
            elif self._slots_taken < limits.max_slow_reads:
                self._give_slot(line)
            else:
                self._stop(line)
                self._awaiting_slot.append(line)
        return True

    def _begin(self, line: _Line) -> bool:
        """Begin the first read of a line that was not cancelled. Returns False if there is none, if
        the line is held, or if the read must wait for another turn."""
        dropped = 0
        while line.reads:
            steps, read, since = line.reads[0]
            # A late answer to a write was begun before, so that what it needs is pinned.
            if self._as_of is not None and steps is None and read.method not in SERVED_BESIDE:
                self.slow.append(line)
                return False
            is_awaited = read.is_awaited
            if is_awaited and read.session.is_blocked:
                line.is_held = True
                self._free_slot(line)
                return False
            line.reads.popleft()
            self._waiting_count -= 1
            if steps is None and not is_awaited:
                read.reply(b"")
                dropped += 1
                if dropped >= DROPPED_PER_STEP and line.reads:
                    self.slow.append(line)
                    return False
                continue
            line.is_late = steps is not None
            line.steps = self._steps(read) if steps is None else steps
            line.read = read
            line.since = since
            return True
        self._free_slot(line)
        del self._lines[line.session]
        return False

    def _stop(self, line: _Line) -> None:
        """Put the read under way back to the front of its line, unless it is a late answer."""
        if line.steps is not None and not line.is_late:
            assert line.read is not None
            line.steps.close()
            line.reads.appendleft((None, line.read, line.since))
            self._waiting_count += 1
            line.steps = line.read = None

    def _end(self, line: _Line) -> None:
        """The read under way is answered."""
        line.steps = line.read = None
        line.spent_steps = 0
        self._free_slot(line)
        if line.reads:
            self.slow.append(line)
        else:
            del self._lines[line.session]

    def _give_slot(self, line: _Line) -> None:
        line.has_slot = True
        self._slots_taken += 1
        self.slow.append(line)

    def _free_slot(self, line: _Line) -> None:
        if line.has_slot:
            line.has_slot = False
            self._slots_taken -= 1
            if self._awaiting_slot:
                self._give_slot(self._awaiting_slot.popleft())

    def run_background(self, is_over: Callable[[], bool]) -> None:
        """Do steps of reads in `BACKGROUND` until `is_over`. No entry may be applied in part."""
        while self.background:
            read = self.background[0]
            steps = self._background_steps
            if steps is None:
                steps = self._background_steps = self._steps(read)
            is_awaited = read.is_awaited
            if not is_awaited:
                steps.close()
                read.reply(b"")
            if not is_awaited or _advance(steps, read):
                self._background_steps = None
                self.background.popleft()
                self._background_shares.free(read.session)
            if is_over():
                return

    def restart(self) -> None:
        """The store was replaced: stop the reads under way, which are to begin again. The late
        answers to writes are lost."""
        if self._background_steps is not None:
            self._background_steps.close()
            self._background_steps = None
        self._take_late()
        for line in self._lines.values():
            self._stop(line)
            late = [read for steps, read, _ in line.reads if steps is not None]
            if line.steps is not None:
                assert line.read is not None
                late.append(line.read)
                line.steps = line.read = None
            line.reads = deque(item for item in line.reads if item[0] is None)
            for read in late:
                read.fail(ANSWER_LOST)
        self._waiting_count = sum(len(line.reads) for line in self._lines.values())

    def wake(self, session: Session) -> None:
        """The client reads its answers again, or its session is closed: let its line run again. The
        line then drops the reads of a closed session."""
        line = self._lines.get(_line_owner(session))
        if line is not None and line.is_held:
            line.is_held = False
            line.resumed_at = self._state.clock()
            self.slow.append(line)


def _advance(steps: Steps, read: Waiter) -> bool:
    """Do one step of a read. Returns whether it is answered."""
    try:
        next(steps)
    except StopIteration as done:
        read.reply(done.value)
    except EtcdError as failure:
        read.fail(failure)
    except DataDamaged as damage:
        read.fail(damage.report())
    except MemoryError:
        # A read changes nothing, and what it had is free now. In other work this ends the process.
        log.error(NO_MEMORY.text, "no memory for an answer", 0.1)
        read.fail(NO_MEMORY)
    else:
        return False
    return True


# Readers: one per method. Each is a generator that returns the response with its header.


def _in_one_step(answer: Callable[[State, Any], bytes]) -> Callable[[State, Any], Steps]:
    """Make a reader from a function that returns the whole response at once."""

    def steps(state: State, request: Any) -> Steps:
        return answer(state, request)
        yield  # Never reached: it makes this function a generator.

    return steps


def _range(state: State, request: proto.RangeRequest) -> Steps:
    answer = yield from ranges.range_steps(state.store, request, head=state.header)
    state.metrics.ranges += 1
    return answer


def _streamable_range(state: State, request: proto.RangeRequest) -> Steps:
    """As `_range`, for a session that sends a large answer while it is read."""
    if not ranges.can_stream(request):
        return (yield from _range(state, request))
    most = state.store.limits.whole_answer_bytes
    try:
        state.store.check_revision(request.revision)
        if ranges.is_surely_large(state.store, request, most):
            raise ranges.AnswerTooLarge(most)
        answer = yield from ranges.range_steps(state.store, request, None, state.header, most)
    except ranges.AnswerTooLarge as failure:
        failure.request = request
        raise
    state.metrics.ranges += 1
    return answer


def _txn(state: State, request: proto.TxnRequest) -> Steps:
    header = state.header
    answer = yield from txn.txn_steps(state.store, request, header)
    state.metrics.count_txn(request, answer.startswith(b"\x10", len(header)))
    return answer


def _time_to_live(state: State, request: proto.LeaseTimeToLiveRequest) -> Steps:
    lessor = state.lessor
    header = state.header
    response = proto.LeaseTimeToLiveResponse(ID=request.ID)
    keys: list[bytes] = []
    if not lessor.promoted:
        raise error("LeaderChanged")
    if lessor.exists(request.ID):
        response.TTL = max(0, int(lessor.remaining_s(request.ID, state.clock())))
        response.grantedTTL = lessor.ttl_s(request.ID)
        if request.keys:
            keys = yield from lessor.key_steps(request.ID)
    else:
        response.TTL = -1
    parts = (b"\x2a" + varint(len(key)) + key for key in keys)
    return (yield from join_steps(chain((header, response.encode()), parts)))


def _leases(state: State, request: proto.LeaseLeasesRequest) -> Steps:
    header = state.header
    ids = yield from state.lessor.lease_steps()
    statuses = (b"\x08" + varint64(lease_id) for lease_id in ids)
    parts = (b"\x12" + varint(len(status)) + status for status in statuses)
    return (yield from join_steps(chain((header,), parts)))


def _renewal(state: State, request: tuple[Author | None, int] | None) -> Steps:
    """An empty answer: that this member leads, or that this author may renew the lease (0: none).
    Raises PermissionDenied."""
    if request is not None:
        author, lease_id = request
        yield from state.lease_rights.write_steps(author, [(lease_id, None)])
    return b""


@_in_one_step
def _members(state: State, request: proto.MemberListRequest) -> bytes:
    header, members = state.identity.header_message(), list(state.membership.members.values())
    return proto.MemberListResponse(header=header, members=members).encode()


def _hash(state: State, request: proto.HashRequest) -> Steps:
    store = state.store
    header = state.identity.header(store.revision)
    began = state.clock()
    value = yield from store.hash_steps(store.revision)
    state.metrics.hash_s.observe(state.clock() - began)
    return header + proto.HashResponse(hash=value).encode()


def _hash_kv(state: State, request: proto.HashKVRequest) -> Steps:
    store = state.store
    store.check_revision(request.revision)
    revision = request.revision or store.revision
    response = proto.HashKVResponse(compact_revision=store.compact_revision, hash_revision=revision)
    header = state.identity.header(store.revision)
    began = state.clock()
    if request.of_members:
        response.hash = yield from store.hash_steps(revision)
    else:
        from etcdlite.etcd_hash import hash_steps  # Few members are asked for it.

        response.hash = yield from hash_steps(store, revision)
    state.metrics.hash_rev_s.observe(state.clock() - began)
    return header + response.encode()


def _timeline(state: State, request: proto.TimelineRequest) -> Steps:
    pieces = []
    for piece in state.timeline.answer_steps(state.header):
        pieces.append(piece)
        yield
    return b"".join(pieces)


def _of_auth(answer: Callable[[Auth, Any], proto.Message]) -> Callable[[State, Any], Steps]:
    """The reader of a method that shows users or roles."""
    return _in_one_step(lambda state, request: state.header + answer(state.auth, request).encode())


READERS: dict[int, Callable[[State, Any], Steps]] = methods.by_number(
    methods.numbers(methods.Route.READ | methods.Route.SERIALIZABLE),
    {
        "KV.Range": _range,
        "KV.Txn": _txn,
        "Lease.LeaseKeepAlive": _renewal,
        "Lease.LeaseTimeToLive": _time_to_live,
        "Lease.LeaseLeases": _leases,
        "Cluster.MemberList": _members,
        "Maintenance.Hash": _hash,
        "Maintenance.HashKV": _hash_kv,
        "Auth.AuthStatus": _of_auth(
            lambda auth, _: proto.AuthStatusResponse(
                enabled=auth.enabled, authRevision=auth.revision
            )
        ),
        "History.Timeline": _timeline,
        "Auth.UserGet": _of_auth(
            lambda auth, asked: proto.AuthUserGetResponse(
                roles=auth.existing_user(asked.name).roles
            )
        ),
        "Auth.UserList": _of_auth(lambda auth, _: proto.AuthUserListResponse(users=auth.users())),
        "Auth.RoleGet": _of_auth(
            lambda auth, asked: proto.AuthRoleGetResponse(perm=auth.permissions(asked.role))
        ),
        "Auth.RoleList": _of_auth(lambda auth, _: proto.AuthRoleListResponse(roles=auth.roles())),
    },
)
