"""Writes: from the request to the entry that is applied.

Writes wait for the next turn of the loop, which makes one raft entry of all of them, or a few, so
that consensus costs once per batch and not per write. A follower forwards the entry to the leader.
The member that received the writes answers them when it applies the entry.

An entry is proposed for one term: a leader accepts a forwarded entry only if it leads in that term.
Terms never decrease along the log. So once an entry of a later term is applied, an entry that was
proposed for an earlier term and is not applied yet never will be. It is then proposed again: no
request is lost or applied twice because the leader changed.

Invariants: the committed bytes are applied; requests that were decoded before are used instead only
if their bytes are the same. A write is answered at most once. Every request that is applied has
passed `checks.py`: those of this member's clients before `propose`, those that another member
forwards in `accept_forwarded`, and those that are decoded from an entry in `take`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from etcdlite import log, methods, proto, txn
from etcdlite.auth import OWN, Author
from etcdlite.errors import INVALID_ARGUMENT, EtcdError, error
from etcdlite.frames import frame as native_frame
from etcdlite.options import Options
from etcdlite.proto import DecodeError
from etcdlite.raft import LEADER, NotLeader, Raft, RequestDropped
from etcdlite.raft_log import ENTRY_CONF_CHANGE, ENTRY_NORMAL, Entry
from etcdlite.replica.access import Access
from etcdlite.replica.alarms import NOSPACE
from etcdlite.replica.checks import CHECKS, check
from etcdlite.replica.entry import (
    ENTRY_HEADER,
    ENTRY_VERSION,
    TooNew,
    decode_requests,
    encode_entry,
    needed_version,
    proposer,
    read_header,
)
from etcdlite.replica.state import State, needs_space
from etcdlite.replica.write_lines import Waiting, WriteLines
from etcdlite.request import Done, Session, Shares, Waiter, connection
from etcdlite.versions import OLDEST

MAX_PROPOSED_BYTES = 64 << 20
"""Writes accepted and not applied yet; more are answered "too many requests"."""

MAX_CHANGES = 32
"""Membership changes that wait, one of which is proposed at a time. Each connection has an equal
share, at least one. The others are answered "too many requests"."""

MAX_IN_FLIGHT = 1_024
MAX_IN_FLIGHT_BYTES = 16 << 20
"""Writes proposed and not applied yet; beyond this the sessions take turns to propose more."""

REQUEST_BYTES = 500
"""The approximate memory of a waiting write besides its frame."""

MAX_FORWARDED_BYTES = 40 << 20
"""The largest entry accepted from another member. The largest request has 32 MiB."""

_NOT_TAKEN = ("NotLeader", "RequestTooManyRequests")
"""Names of the errors of a leader that did not accept an entry, but may accept it later."""

_CHECKS = {
    kind: {method: CHECKS[method] for method in methods.numbers(route)}
    for kind, route in (
        (ENTRY_NORMAL, methods.Route.WRITE),
        (ENTRY_CONF_CHANGE, methods.Route.MEMBERSHIP),
    )
}
"""The methods that an entry of each kind may hold, and their checks."""


class Batch:
    """The writes of one entry that wait for it to be applied."""

    __slots__ = ("data", "kept_bytes", "kind", "since", "size_bytes", "term", "waiters")

    def __init__(
        self, kind: int, data: bytes, waiters: list[Waiter], since: float, size_bytes: int
    ) -> None:
        self.kind = kind
        self.data = data
        self.waiters = waiters
        self.since = since
        self.size_bytes = size_bytes
        self.kept_bytes = 0  # As `Writes._kept_bytes`.
        self.term = 0
        """The term for which it was proposed; 0 if no leader can have it."""


class Writes:
    """The writes of a member that are not applied yet."""

    def __init__(
        self,
        state: State,
        raft: Raft,
        rng: random.Random,
        options: Options,
        forward: Callable[[int, int, bytes, Done], bool],
        check_change: Callable[[proto.MemberChange], None],
        timeout_error: Callable[[float], EtcdError],
        access: Access,
    ) -> None:
        """`forward(leader, term, data, done)` sends an entry to the leader; it returns False if the
        leader cannot be reached now. `check_change` raises EtcdError unless a `MemberChange` may be
        proposed now. `timeout_error(since)` is the error for a request that waits since then."""
        self._state = state
        self._access = access
        self._raft = raft
        self._forward = forward
        self._check_change = check_change
        self._timeout_error = timeout_error
        self._request_timeout_s = options.request_timeout_s
        self._new: list[Waiter] = []
        self._new_frames: list[bytes] = []
        """The writes for the next turn, and their native frames."""
        self._author: Author | None = None
        """The author that the entry of the new writes names last."""
        self._has_newer = False
        """A method that not every cluster version allows was proposed."""
        self._may_keep = False  # A write was proposed that may write the value of a key again.
        self._lines = WriteLines()
        """What waits because enough is in flight."""
        self._in_flight_bytes = 0
        self._exceeding: set[Any] = set()
        """Connections with a write accepted beyond `MAX_PROPOSED_BYTES` in this turn."""
        self._alarms = state.alarms
        self._metrics = state.metrics
        # Random, so that an entry of an earlier incarnation is never taken for one of this one.
        self.latest_batch = rng.getrandbits(32) << 20
        self._waiting: dict[int, Batch] = {}
        """Batches that are not applied, by number, the oldest first."""
        self._forwarded: dict[int, dict[int, tuple[bytes, list[Waiter]]]] = {}
        """Entries that other members forwarded, and their requests, by member id and batch."""
        self._held: deque[int] = deque()
        """Numbers of the batches that `retry` proposes."""
        self._changes = Shares()
        """Membership changes that wait, of clients."""

    @property
    def can_propose(self) -> bool:
        """`propose_new` has something to do: there are new writes, or room for those in lines."""
        if self._new or not self._lines:
            return bool(self._new)
        has_room = self._metrics.proposals_pending < MAX_IN_FLIGHT
        return has_room and self._in_flight_bytes < MAX_IN_FLIGHT_BYTES

    @property
    def are_waiting(self) -> bool:
        """Writes are not applied yet."""
        return bool(self._waiting or self._lines)

    def is_waiting(self, batch: int) -> bool:
        """Whether the batch is neither applied nor given up."""
        return batch in self._waiting

    # Accepting writes.

    def propose(self, waiter: Waiter, frame: bytes, is_current: bool = False) -> None:
        """Replicate and apply a write; `frame` is the request as a native frame. The session gets
        the answer. `is_current`: see `Access.retry`. Never raises."""
        session, _, method, request = waiter
        learners = self._raft.learners
        if learners and session is not None and self._state.identity.member_id in learners:
            waiter.fail(error("NotSupportedForLearner"))
            return
        if method in methods.SINCE:
            self._has_newer = True
        self._may_keep |= method == methods.TXN or (method == methods.PUT and request.ignore_value)
        size = len(frame) + REQUEST_BYTES
        proposed_bytes = self._alarms.proposed_bytes + size
        if proposed_bytes > MAX_PROPOSED_BYTES and not self._exceed_limit(session, proposed_bytes):
            self._metrics.proposals_failed += 1
            waiter.fail(error("RequestTooManyRequests"))
            return
        if self._author is not None or self._state.auth.enabled or self._alarms.kinds:
            try:
                author = None
                if self._state.auth.enabled:
                    author = self._access.check(waiter)
                if NOSPACE in self._alarms.kinds and needs_space(method, request):
                    raise error("NoSpace")  # So that the log does not grow by refused writes.
            except EtcdError as refused:
                assert session is not None, "a member may do everything"
                again = partial(self.propose, waiter, frame)
                if not self._access.retry(session, refused, is_current, again, len(frame)):
                    waiter.fail(refused)
                return
            if author is not self._author and author != self._author:
                self._name_author(author)
        self._alarms.proposed_bytes += size
        self._new.append(waiter)
        self._new_frames.append(frame)

    def _name_author(self, author: Author | None) -> None:
        """Add a frame to the entry that names the author of the writes after it."""
        self._author = author
        waiter, frame = _author_request(author)
        self._alarms.proposed_bytes += len(frame) + REQUEST_BYTES
        self._new.append(waiter)
        self._new_frames.append(frame)

    def _exceed_limit(self, session: Session | None, proposed_bytes: int) -> bool:
        """Returns whether a write may exceed the limit, and notes that: one per turn for a
        connection without other writes, so that the others cannot keep it from writing."""
        owner = connection(session)
        if (
            owner in self._lines
            or owner in self._exceeding
            or proposed_bytes > 2 * MAX_PROPOSED_BYTES
        ):
            return False
        self._exceeding.add(owner)
        return True

    def propose_message(self, waiter: Waiter) -> None:
        """As `propose`, for a request without a frame. Checks it, and fails it if it is invalid.
        Its frame has the id of the request, so that the log tells whose it was."""
        session, request_id, method, request = waiter
        try:
            check(method, request)
        except EtcdError as failure:
            waiter.fail(failure)
            if session is None and not log.limited("invalid write"):
                log.error("a request made by this member itself is invalid", why=failure.text)
            return
        frame = native_frame(request_id & 0xFFFFFFFF or 1, method, 0, request.encode())
        self.propose(waiter, frame)

    def propose_outdated(self, is_own: bool) -> None:
        """Take all requests from `State.outdated`. A request fails if its author has not changed.
        The others are proposed again for their author as of now. `is_own`: this member received the
        requests; if not, it leaves that to the member that did."""
        outdated, self._state.outdated = self._state.outdated, []
        if not is_own:
            return
        for waiter, failure, author in outdated:
            try:
                is_same = author == self._access.author(waiter.session, waiter.request_id)
            except EtcdError:
                is_same = False  # `propose_message` refuses it with the reason.
            if is_same:
                waiter.fail(failure)
            else:
                self.propose_message(waiter)

    def propose_own(self, method: int, request: proto.Message) -> None:
        """As `propose`, for a request of this member itself."""
        self.propose_message(Waiter(None, 0, method, request))

    def propose_once(self, requests: Sequence[tuple[int, proto.Message]]) -> int:
        """Propose requests that this member made as the leader. Returns the index of the entry; 0
        if it is dropped. It is never proposed again: under another leader a lease that expired
        here may be alive."""
        self.latest_batch += 1
        frames = [native_frame(1, method, 0, request.encode()) for method, request in requests]
        if self._state.auth.enabled:
            frames.insert(0, _author_request(OWN)[1])
        needs = max(methods.SINCE.get(method, OLDEST) for method, _ in requests)
        data = encode_entry(self._state.identity.member_id, self.latest_batch, frames, needs)
        try:
            return self._raft.propose(data)
        except (NotLeader, RequestDropped):
            return 0

    def propose_change(self, waiter: Waiter) -> None:
        """Propose the `MemberChange` of a waiter. Only the leader calls this. Raises EtcdError."""
        session = waiter.session
        if session is not None and not self._changes.take(session, MAX_CHANGES):
            raise error("RequestTooManyRequests")
        frame = native_frame(1, methods.MEMBER_CHANGE, 0, waiter.request.encode())
        self._propose_entry(ENTRY_CONF_CHANGE, [waiter], [frame], self._state.clock())

    def accept_forwarded(self, node: int, term: int, data: bytes) -> None:
        """Propose the payload of an entry that the member `node` forwards to the leader of `term`.
        Raises EtcdError if it is not accepted, DecodeError if it is no payload."""
        raft = self._raft
        if raft.role != LEADER or raft.term != term:
            raise error("NotLeader")
        header = read_header(data)
        waiters = decode_requests(data)
        if header.member_id != node:
            raise EtcdError(INVALID_ARGUMENT, f"etcdlite: this entry is not {node:x}'s own")
        if len(data) > MAX_FORWARDED_BYTES:
            raise error("RequestTooLarge")
        for _, _, method, request in waiters:
            _check(ENTRY_NORMAL, method, request)
        self._check_version(data)
        forwarded = self._forwarded.setdefault(node, {})
        try:
            # Each has at least one write, and a number of its own.
            if len(forwarded) >= MAX_IN_FLIGHT or header.batch in forwarded:
                raise RequestDropped
            raft.propose(data)
        except (NotLeader, RequestDropped):
            raise error("RequestTooManyRequests") from None
        forwarded[header.batch] = (data, waiters)

    def _check_version(self, data: bytes) -> None:
        """Raise EtcdError unless the leader may propose an entry under the cluster version."""
        needs = needed_version(data)
        if needs == OLDEST:
            return
        if self._state.store.applied_term != self._raft.term:
            raise error("NotLeader")  # An entry of an earlier term may lower the version.
        if needs > self._state.cluster_version.allowed:
            raise _not_allowed()

    # Proposing entries.

    def propose_new(self) -> None:
        """Make entries of the writes that arrived since the last turn, as far as there is room."""
        waiters, frames = self._new, self._new_frames
        self._new, self._new_frames = [], []
        self._author = None
        since = self._state.clock()
        size = sum(map(len, frames))
        if (
            self._lines
            or self._metrics.proposals_pending + len(waiters) > MAX_IN_FLIGHT
            or self._in_flight_bytes + size + self._kept_bytes(*waiters) > MAX_IN_FLIGHT_BYTES
        ):
            waiters, frames = self._take_turns(since, waiters, frames)
            if not waiters:
                return
            size = sum(map(len, frames))
        entry_bytes = self._state.store.limits.entry_bytes
        if size <= entry_bytes:
            self._propose_entry(ENTRY_NORMAL, waiters, frames, since)
            return
        some: list[Waiter] = []
        some_frames: list[bytes] = []
        author: tuple[Waiter, bytes] | None = None
        size = 0
        for waiter, frame in zip(waiters, frames, strict=True):
            if size and size + len(frame) > entry_bytes:
                self._propose_entry(ENTRY_NORMAL, some, some_frames, since)
                some, some_frames, size = [], [], 0
                if author is not None and waiter.method != methods.AUTHOR:
                    # Each entry begins without an author.
                    self._alarms.proposed_bytes += len(author[1]) + REQUEST_BYTES
                    some, some_frames = [author[0]], [author[1]]
            if waiter.method == methods.AUTHOR:
                author = (waiter, frame)
            some.append(waiter)
            some_frames.append(frame)
            size += len(frame)
        self._propose_entry(ENTRY_NORMAL, some, some_frames, since)

    def _take_turns(
        self, now: float, waiters: list[Waiter], frames: list[bytes]
    ) -> tuple[list[Waiter], list[bytes]]:
        """Put writes into lines, and take those for which there is room. The timeout of all of them
        begins `now`, so that one that waited long does not shorten that of the others."""
        self._exceeding.clear()
        author = None
        for waiter, frame in zip(waiters, frames, strict=True):
            if waiter.method == methods.AUTHOR:
                author = (waiter, frame)
                self._alarms.proposed_bytes -= len(frame) + REQUEST_BYTES
            else:
                self._lines.add(Waiting(now, author, waiter, frame))
        waiters, frames, author = [], [], None
        for write in self._lines.take(
            MAX_IN_FLIGHT - self._metrics.proposals_pending,
            MAX_IN_FLIGHT_BYTES - self._in_flight_bytes,
            self._kept_bytes,
        ):
            if write.author != author:
                author = write.author
                waiter, frame = author or _author_request(None)
                self._alarms.proposed_bytes += len(frame) + REQUEST_BYTES
                waiters.append(waiter)
                frames.append(frame)
            waiters.append(write.waiter)
            frames.append(write.frame)
        return waiters, frames

    def _kept_bytes(self, *waiters: Waiter) -> int:
        """The size of the values that these writes will write again (`ignore_value`)."""
        return sum(txn.kept_bytes(self._state.store, w.request) for w in waiters if self._may_keep)

    def _propose_entry(
        self, kind: int, waiters: list[Waiter], frames: list[bytes], since: float
    ) -> None:
        self.latest_batch = number = self.latest_batch + 1
        needs = OLDEST
        if self._has_newer:
            needs = max(methods.SINCE.get(waiter.method, OLDEST) for waiter in waiters)
        data = encode_entry(self._state.identity.member_id, number, frames, needs)
        size = len(data) - ENTRY_HEADER.size + REQUEST_BYTES * len(frames)
        if kind == ENTRY_CONF_CHANGE:
            self._alarms.proposed_bytes += size
        batch = Batch(kind, data, waiters, since, size)
        batch.kept_bytes = self._kept_bytes(*waiters)
        self._in_flight_bytes += size + batch.kept_bytes
        self._waiting[number] = batch
        count = len(waiters)
        self._metrics.proposals_pending += count
        if self._state.auth.enabled:
            count -= [waiter.method for waiter in waiters].count(methods.AUTHOR)
        self._metrics.batch_requests.observe(count)
        self._try_propose(number, batch)

    def _try_propose(self, number: int, batch: Batch) -> None:
        """Propose or forward an entry; hold it for `retry` if no leader can have it."""
        raft = self._raft
        term = raft.term
        try:
            if batch.kind == ENTRY_CONF_CHANGE:
                raft.propose_conf_change(batch.data)
            else:
                if batch.data[0] != ENTRY_VERSION and raft.role == LEADER:
                    self._check_version(batch.data)
                raft.propose(batch.data, commit_may_wait=True)
            batch.term = term
            return
        except NotLeader as failure:
            leader = failure.leader
            # A write that reaches this member within a snapshot, and not as an entry, cannot be
            # answered. So writes wait until the snapshot is installed.
            gets_snapshot = not self._state.membership.members or raft.log.applied < raft.log.offset
            if leader and batch.kind == ENTRY_NORMAL and not gets_snapshot:
                done = partial(self._forward_answered, number, term)
                batch.term = term
                if self._forward(leader, term, batch.data, done):
                    return
                batch.term = 0
        except RequestDropped:
            pass  # Leadership is being transferred, or too much is uncommitted.
        except EtcdError as failure:
            if failure.name != "NotLeader":
                self._give_up(number, failure)
                return
        self._held.append(number)

    def _forward_answered(self, number: int, term: int, answer: bytes | EtcdError) -> None:
        """The leader accepted a forwarded entry or refused it, or its answer is lost."""
        batch = self._waiting.get(number)
        if batch is None or batch.term != term or not isinstance(answer, EtcdError):
            return
        if answer.name in _NOT_TAKEN:
            batch.term = 0
            self._held.append(number)
        elif answer.code == INVALID_ARGUMENT:
            self._give_up(number, answer)

    def retry(self) -> None:
        """Propose the batches that could not be proposed before."""
        for _ in range(len(self._held)):
            number = self._held.popleft()
            batch = self._waiting.get(number)
            if batch is not None and not self._give_up_if_forbidden(number, batch):
                self._try_propose(number, batch)

    def _give_up_if_forbidden(self, number: int, batch: Batch) -> bool:
        """Check a held membership change again, because another one may have been applied since.
        Returns True if it was given up."""
        session, _, _, change = batch.waiters[0]
        if batch.kind != ENTRY_CONF_CHANGE or session is None or self._raft.role != LEADER:
            return False
        try:
            self._check_change(change)
        except EtcdError as failure:
            self._give_up(number, failure)
            return True
        return False

    # Applying entries.

    def begin_term(self, term: int) -> None:
        """The first entry of `term` is about to be applied: entries that were proposed for earlier
        terms never will be, so they are proposed again. What was forwarded here is forgotten."""
        self._forwarded.clear()
        for number, batch in self._waiting.items():
            if 0 < batch.term < term:
                batch.term = 0
                self._held.append(number)
        self.retry()

    def take(self, entry: Entry) -> tuple[list[Waiter], float | None]:
        """The requests of a committed entry, with the sessions that wait here for their answers,
        and when they began to wait; None if no session waits here."""
        data = entry.data
        # The hot path: an entry with these bytes waits here.
        member_id, number = proposer(data)
        if member_id == self._state.identity.member_id:
            batch = self._waiting.get(number)
            if batch is not None and batch.data == data:
                self._drop(number)
                waiters, since = batch.waiters, batch.since
            else:
                waiters, since = self._decoded(entry), None
        else:
            forwarded = self._forwarded.get(member_id, {})
            known, waiters = forwarded.pop(number, (b"", []))
            if not forwarded:
                self._forwarded.pop(member_id, None)
            since = None
            if known != data:
                waiters = self._decoded(entry)
        if data[0] != ENTRY_VERSION and needed_version(data) > self._state.cluster_version.allowed:
            # It was proposed before the version went down. Every member skips it.
            for waiter in waiters:
                if waiter.method in methods.SINCE:
                    waiter.fail(_not_allowed())
            waiters = [w for w in waiters if w.method == methods.SET_CLUSTER_VERSION]
        return waiters, since

    def _decoded(self, entry: Entry) -> list[Waiter]:
        try:
            return _valid(entry, decode_requests(entry.data))
        except TooNew as failure:
            raise AssertionError(f"entry {entry.index} cannot be applied: {failure}") from None
        except DecodeError as failure:
            # The bytes are the same on every member, so every member skips the entry.
            log.error(
                "an entry of the log is invalid and has no effect",
                index=entry.index,
                why=str(failure),
            )
            return []

    def _drop(self, number: int) -> Batch:
        batch = self._waiting.pop(number)
        self._alarms.proposed_bytes -= batch.size_bytes
        self._in_flight_bytes -= batch.size_bytes + batch.kept_bytes
        self._metrics.proposals_pending -= len(batch.waiters)
        if batch.kind == ENTRY_CONF_CHANGE and (session := batch.waiters[0].session) is not None:
            self._changes.free(session)
        return batch

    # Giving up.

    def expire_steps(self, now: float) -> Iterator[None]:
        """Fail the writes that have waited too long, some in each step."""
        expired = now - self._request_timeout_s
        while (first := next(iter(self._waiting), 0)) and self._waiting[first].since <= expired:
            self._give_up(first, self._timeout_error(self._waiting[first].since))
            yield
        while some := self._lines.expire(expired, MAX_IN_FLIGHT):
            for write in some:
                self._alarms.proposed_bytes -= len(write.frame) + REQUEST_BYTES
                self._metrics.proposals_failed += 1
                write.waiter.fail(self._timeout_error(write.since))
                yield

    def _give_up(self, number: int, failure: EtcdError) -> None:
        waiters = self._drop(number).waiters
        self._metrics.proposals_failed += sum(waiter.method != methods.AUTHOR for waiter in waiters)
        for waiter in waiters:
            waiter.fail(failure)

    def restored(self) -> None:
        """A snapshot replaced the state. It may hold any entry that was proposed before, so none of
        them is proposed again."""
        for batch in self._waiting.values():
            batch.term = 0


def _not_allowed() -> EtcdError:
    return EtcdError(
        INVALID_ARGUMENT,
        "etcdlite: the cluster version does not allow this. Update all members; if a downgrade is "
        "enabled, end it with 'etcdlite-ctl downgrade cancel'",
    )


def _author_request(author: Author | None) -> tuple[Waiter, bytes]:
    """The request that names the author of those after it in an entry, and its frame."""
    name, revision, is_member = author or ("", 0, False)
    request = proto.Author(name=name, revision=revision, is_member=is_member)
    waiter = Waiter(None, 0, methods.AUTHOR, request)
    return waiter, native_frame(1, methods.AUTHOR, 0, request.encode())


def _check(kind: int, method: int, request: Any) -> None:
    """Raise EtcdError unless an entry of this kind may hold the request."""
    check = _CHECKS[kind].get(method)
    if check is None:
        raise EtcdError(
            INVALID_ARGUMENT, f"etcdlite: method {method:#04x} in an entry of kind {kind}"
        )
    check(request)


def _valid(entry: Entry, waiters: list[Waiter]) -> list[Waiter]:
    """The valid requests of an entry, which are the same on every member."""
    # Hot path of a member that does not know the requests already.
    checks = _CHECKS[entry.kind]
    try:
        for _, _, method, request in waiters:
            checks[method](request)
    except (EtcdError, KeyError):
        return [waiter for waiter in waiters if _has_effect(entry, waiter.method, waiter.request)]
    return waiters


def _has_effect(entry: Entry, method: int, request: Any) -> bool:
    try:
        _check(entry.kind, method, request)
    except EtcdError as failure:
        log.error(
            "a request in the log is invalid and has no effect",
            index=entry.index,
            method=methods.NAMES.get(method, f"{method:#04x}"),
            why=failure.text,
        )
        return False
    return True
