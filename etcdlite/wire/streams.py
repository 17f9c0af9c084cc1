"""The streams of the API, and the table of all calls that are not one request with one answer.

Each class is one kind of call (`calls.py`). To add a kind, add a class to `CALLS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

from etcdlite import ETCD_API_VERSION, log, proto, txn
from etcdlite.auth import Auth
from etcdlite.errors import CODE_NAMES, DATA_LOSS, INVALID_ARGUMENT, UNAVAILABLE, EtcdError, error
from etcdlite.loading import when_loaded
from etcdlite.member import Member
from etcdlite.methods import KEEP_ALIVE, RANGE, SNAPSHOT, WATCH, Route, by_number, numbers
from etcdlite.proto import varint
from etcdlite.ranges import filters, piece, streamed
from etcdlite.replica.background import SAVING_PAUSE_S
from etcdlite.replica.catch_up import behind_error
from etcdlite.request import Waiter, empty_read
from etcdlite.session import STALLED_TIMEOUT_S
from etcdlite.snap import Image
from etcdlite.storage.layout import DataDamaged
from etcdlite.wire import api, locks
from etcdlite.wire.calls import Call

MAX_SNAPSHOTS = 4
"""Backups sent at the same time, one per connection. Each keeps files open that take space."""

PARTS_PER_SLICE = 64
"""The most parts of a backup that are sent at once. Some parts are empty: pauses."""

SNAPSHOT_PERIOD_S = 30.0
MIN_SNAPSHOT_BYTES_PER_S = 32 << 10
"""In each period, the client of a backup must read this much on average. Otherwise the backup ends,
because others may wait for its place."""

RENEWALS_PER_CHECK = 1000
MAX_UNREAD_CHECKS = 10
"""A keep-alive stream checks after every `RENEWALS_PER_CHECK` messages whether its client reads the
answers. It fails after more than `MAX_UNREAD_CHECKS` checks in a row that found it blocked."""

MAX_HELD = 1000
MAX_HELD_BYTES = 512
"""Messages of a watch stream that wait while the user of the one before them is checked: how many,
and the size of each. A lease renewal has the same limit of size."""

MAX_UNCHECKED_RENEWALS = 64
"""Renewals of a stream that wait until it is known whether the user may make them."""

_REPLACED = "etcdlite: this member replaced its data by a snapshot of the leader; ask again"

RANGE_CHUNK_BYTES = 256 << 10
"""The approximate size of a message of a RangeStream."""


class WatchCall(Call):
    wakes = True

    def opened(self) -> None:
        self._stream = self.member.hub.open(self, self.owner.calls.quota)
        self._is_waiting = False
        """A message waits: its turn, or until it is known whether the user may create a watch."""
        self._held: list[bytes] = []
        """The messages after that one, which are processed later, in order. Decoded, they would
        take many times the memory."""
        self._is_finished = False

    def message(self, body: bytes) -> None:
        request = proto.decode_request(proto.WatchRequest.decode, body)
        if not self._is_waiting:
            self._process(request, len(body))
        elif len(self._held) < MAX_HELD and len(body) <= MAX_HELD_BYTES:
            self._held.append(body)
            self.owner.calls.hold(self.request_id, len(body))
        else:
            raise error("RequestTooManyRequests")

    def _process(self, request: proto.WatchRequest, size_bytes: int = 0) -> None:
        if request.create_request is not None:
            if self.member.catch_up.is_behind:
                raise behind_error()
            self._is_waiting = True
            waiter = Waiter(self, self.request_id, WATCH, request.create_request)
            created = partial(self._create, request.create_request)
            self.member.access.admit(waiter, created, size_bytes)
        elif request.cancel_request is not None:
            self._stream.cancel(request.cancel_request.watch_id)
        elif request.progress_request is not None:
            self._stream.progress()

    def _create(self, create: proto.WatchCreateRequest, refused: EtcdError | None) -> None:
        self._is_waiting = False
        if self.is_closed:
            return
        if refused is not None:
            # The form of etcd's server: its Go client logs in again on some of these reasons.
            code = CODE_NAMES[refused.code]
            self._stream.refuse(f"rpc error: code = {code} desc = {refused.text}")
        else:
            self._stream.create(create)
        self._process_later()

    def _process_later(self) -> None:
        """Process the next held message in the next turn: a thousand at once would take long."""
        if self._held:
            self._is_waiting = True
            self.member.reads.read_now(empty_read(self._process_next))
        elif self._is_finished:
            self.finish()

    def _process_next(self, answer: bytes | EtcdError) -> None:
        self._is_waiting = False
        if self.is_closed:
            return
        body = self._held.pop(0)
        self.owner.calls.hold(self.request_id, -len(body))
        try:
            self._process(proto.WatchRequest.decode(body))
        except EtcdError as failure:
            self.owner.fail(self.request_id, self.method, failure)
        if not (self._is_waiting or self.is_closed):
            self._process_later()

    def finish(self) -> None:
        self._is_finished = True
        # As in etcd, open watches go on.
        if not (len(self._stream) or self._is_waiting):
            self.end()

    def wake(self) -> None:
        self._stream.wake()

    def close(self) -> None:
        self._stream.close()


class KeepAliveCall(Call):
    is_blocked = False
    """For the member: the checks of renewals have no answers."""
    is_member = True
    """For the member: `owner` says who the caller is, so this session is not asked."""
    # The class has the defaults, because some clients open a stream for each renewal.
    _asked = _unanswered = _unread_checks = _last_check = 0
    _is_finished = False
    _unchecked: dict[int, tuple[bytes, bool]] = {}
    """Renewals that wait for a check, by number: (message, `is_current` of `Access.retry`)."""

    def message(self, body: bytes) -> None:
        self._asked += 1
        if self._asked % RENEWALS_PER_CHECK == 0:
            self._unread_checks = self._unread_checks + 1 if self.blocked else 0
            if self._unread_checks > MAX_UNREAD_CHECKS:
                raise error("RequestTooManyRequests")
        self._unanswered += 1
        if len(body) > MAX_HELD_BYTES:
            raise error("RequestTooLarge")
        if self.member.state.auth.enabled:
            api.read_renewal(body)  # A malformed message fails first.
            self._unchecked = self._unchecked or {}  # Not that of the class.
            if len(self._unchecked) >= MAX_UNCHECKED_RENEWALS:
                raise error("RequestTooManyRequests")
            self._renew_if_permitted(self._asked, body)
        else:
            api.keep_alive(self.member, body, self._done)
        self.owner.calls.unanswered += 1

    def _renew_if_permitted(self, number: int, body: bytes, is_current: bool = False) -> None:
        """Renew the lease, if need be after a later check. Raises EtcdError."""
        member, auth = self.member, self.member.state.auth
        try:
            if auth.enabled:
                author = member.access.check(Waiter(self.owner, self.request_id, KEEP_ALIVE, None))
                lease_id = api.read_renewal(body)
                steps = member.state.lease_rights.write_steps(author, [(lease_id, None)])
                for _ in steps:  # The lease has many keys.
                    steps.close()
                    self._unchecked[number] = (body, is_current)
                    self.owner.calls.checks += 1
                    self._last_check = self.owner.calls.checks
                    member.reads.check_renewal(self, number, author, lease_id)
                    return
        except EtcdError as refused:
            if not self._retry(refused, number, body, is_current):
                raise
        else:
            api.keep_alive(member, body, self._done)

    def _retry(self, refused: EtcdError, number: int, body: bytes, is_current: bool) -> bool:
        """As `Access.retry`."""
        self._unchecked[number] = (body, is_current)
        again = partial(self._try_again, number, body)
        if self.member.access.retry(self, refused, is_current, again, len(body)):
            return True
        del self._unchecked[number]
        return False

    def _try_again(self, number: int, body: bytes, is_current: bool) -> None:
        del self._unchecked[number]
        if self.is_closed:
            self.answered()
            return
        try:
            self._renew_if_permitted(number, body, is_current)
        except EtcdError as refused:
            self._done(refused)

    # The session of `Reads.check_renewal`.

    def awaits(self, number: int) -> bool:
        # Once it is known, the next stream need not wait for it, until that has checks of its own.
        return not self.is_closed or self._last_check == self.owner.calls.checks

    def reply(self, number: int, method: int, answer: bytes) -> None:
        """The user may renew this lease."""
        body, _ = self._unchecked.pop(number)
        if self.is_closed:
            self._done(answer)
        else:
            api.keep_alive(self.member, body, self._done)

    def fail(self, number: int, method: int, failure: EtcdError) -> None:
        """The user may not, as far as is known here."""
        body, is_current = self._unchecked.pop(number)
        if self.is_closed or not self._retry(failure, number, body, is_current):
            self._done(failure)

    def _done(self, answer: bytes | EtcdError) -> None:
        self.answered()
        if self.is_closed:
            return
        self._unanswered -= 1
        if isinstance(answer, EtcdError):
            self.owner.fail(self.request_id, self.method, answer)
            return
        self.owner.send_message(self.request_id, self.method, answer)
        if self._is_finished and not self._unanswered:
            self.end()

    def finish(self) -> None:
        self._is_finished = True
        if not self._unanswered:
            self.end()


def _responses(
    header: bytes, version: str, left_bytes: int, parts: Iterable[bytes | None]
) -> Iterator[bytes | None]:
    """The encoded SnapshotResponses with these parts; an empty one and None are passed on."""
    for part in parts:
        if not part:
            yield part
            continue
        left_bytes -= len(part)
        response = proto.SnapshotResponse(remaining_bytes=left_bytes, blob=part, version=version)
        yield header + response.encode()


def snapshot_parts(member: Member) -> Iterator[bytes | None]:
    """The snapshot as encoded SnapshotResponses. Raises OSError and DataDamaged."""
    identity, store = member.identity, member.state.store
    header = identity.header(store.revision)
    with closing(Image(store, identity.cluster_id, identity.member_id)) as image:
        yield from _responses(header, ETCD_API_VERSION, image.size_bytes, image.parts())


def etcd_backup_parts(member: Member, resume: Callable[[], None]) -> Iterator[bytes | None]:
    """The backup in etcd's format as encoded SnapshotResponses; an empty one is a pause. After
    None, go on when `resume` was called. Raises OSError, DataDamaged, and EtcdError Unavailable if
    the store was replaced."""
    from etcdlite.etcd_backup import VERSION, EtcdImage

    while member.is_applying:
        yield b""
    store = member.state.store
    header = member.identity.header(store.marked_revision)
    with ExitStack() as opened:
        image = EtcdImage(store)
        opened.callback(image.close)
        writer: Any = member.start_writer and member.start_writer(image, resume)
        if writer is not None:
            opened.callback(writer.close)
        for _ in image.prepare_steps():
            yield b""
            if member.state.store is not store:
                raise EtcdError(UNAVAILABLE, _REPLACED)
        if image.users_without_bcrypt:
            log.warn(
                "users in a backup for etcd cannot log in there",
                users=image.users_without_bcrypt,
                why="etcd does not know the argon2id hashes of their passwords",
                next="set their passwords again in etcd; see docs/etcd-backups.md",
            )
        parts = image.parts() if writer is None else writer.parts(image)
        yield from _responses(header, VERSION, image.size_bytes, parts)


BACKUP_MODULES = ("hashlib", "etcdlite.etcd_backup", "etcdlite.backup_process")
"""What a backup for etcd needs. OpenSSL, of the first, takes 10 ms."""

_END: Any = object()

Making = Callable[[Member, Callable[[], None]], Iterator["bytes | None"]]
"""Makes the messages of a backup, see `etcd_backup_parts`."""


class SnapshotCall(Call):
    """A backup: in the own format over the native protocol, otherwise in that of etcd, unless the
    request names one."""

    ticks = True

    def opened(self) -> None:
        self._parts: Generator[bytes | None, None, None] | None = None
        self._is_asked = False
        self._has_place = False
        """It counts as one of the backups under way."""
        self._produced_at = -math.inf
        """When the last slice ended."""
        self._period_began = self.member.clock()
        self._period_bytes = 0
        self._has_begun = False
        """Something was sent. A backup for etcd is measured first."""

    def message(self, body: bytes) -> None:
        if not self._is_asked:
            self._is_asked = True
            admitted = partial(self._admitted, self._format(body))
            self.member.access.admit(Waiter(self, self.request_id, SNAPSHOT, None), admitted)

    def _admitted(self, make: Making, refused: EtcdError | None) -> None:
        if self.is_closed:
            return
        quota = self.owner.calls.quota
        if self.member.backups_under_way >= MAX_SNAPSHOTS or quota.sends_snapshot:
            refused = refused or error("RequestTooManyRequests")
        if refused is not None:
            self.owner.fail(self.request_id, self.method, refused)
            return
        quota.sends_snapshot = self._has_place = True
        self.member.backups_under_way += 1
        begin = partial(self._begin, make)
        when_loaded(
            BACKUP_MODULES if make is etcd_backup_parts else (), self.member.run_task, begin
        )

    def _begin(self, make: Making) -> None:
        if not self.is_closed:
            self._parts = make(self.member, self.resume)  # type: ignore[assignment]
            self._began_at = self.member.clock()
            self.resume()

    def _format(self, body: bytes) -> Making:
        if self.member.catch_up.is_behind:
            raise behind_error()
        wanted = proto.decode_request(proto.SnapshotRequest.decode, body).format
        if wanted not in (proto.SnapshotRequest.DEFAULT, *_FORMATS):
            text = f"etcdlite: no snapshot has the format {wanted}: leave it out for the default"
            raise EtcdError(INVALID_ARGUMENT, text)
        formats = proto.SnapshotRequest
        is_native = self.owner.protocol == "native"
        return _FORMATS[wanted or (formats.ETCDLITE if is_native else formats.ETCD)]

    def produce(self) -> None:
        assert self._parts is not None
        member = self.member
        began = now = member.clock()
        if member.is_saving and began - self._produced_at < SAVING_PAUSE_S:
            return  # A slice would delay the log thread, which needs the interpreter.
        ends_at = began + member.background.slice_s
        for _ in range(PARTS_PER_SLICE):
            try:
                part = next(self._parts, _END)
            except (OSError, DataDamaged) as failure:
                text = f"etcdlite: cannot read the data; ask another member: {failure}"
                raise EtcdError(DATA_LOSS, text) from failure
            if part is _END:
                member.metrics.snapshot_s.observe(member.clock() - self._began_at)
                self.end()
                return
            if part is None:
                self.is_ready = False  # Until it is resumed.
                break
            if part:
                self._has_begun = True
                self._period_bytes += len(part)
                self.send(part)
            now = member.clock()
            if now >= ends_at or self.is_closed or self.blocked:
                break
        self._produced_at = now

    def tick(self, now: float) -> None:
        period_s = now - self._period_began
        if self._parts is None or period_s < SNAPSHOT_PERIOD_S:
            return
        if self._has_begun and self._period_bytes < MIN_SNAPSHOT_BYTES_PER_S * period_s:
            text = "etcdlite: the backup was ended because its client reads it too slowly"
            self.owner.fail(self.request_id, self.method, EtcdError(UNAVAILABLE, text))
            return
        self._period_began = now
        self._period_bytes = 0

    def close(self) -> None:
        if self._has_place:
            self._has_place = self.owner.calls.quota.sends_snapshot = False
            self.member.backups_under_way -= 1
        if self._parts is not None:
            self._parts.close()
            self._parts = None


_FORMATS: dict[int, Making] = {
    proto.SnapshotRequest.ETCDLITE: lambda member, _: snapshot_parts(member),
    proto.SnapshotRequest.ETCD: etcd_backup_parts,
}


class RangeStreamCall(Call):
    """A range in pieces of one revision. Merged, they are the response of KV.Range.

    A small first read determines a linearizable revision. If that is compacted before the end, the
    call fails, as in etcd. A range that is limited, filtered or counted is sent in one piece."""

    is_blocked = False
    """For the member: the reads of this call are small."""

    def opened(self) -> None:
        self.line_owner = self.owner
        """For `Reads`: the streams of a connection wait in one line."""
        self._request: Any = None
        self._is_whole = False
        self._revision = 0
        self._checked_under = (False, 0)
        self._count = 0

    def message(self, body: bytes) -> None:
        if self._request is not None:
            return
        request = proto.decode_request(proto.RangeRequest.decode, body)
        txn.check_range(request)
        if request.sort_target or request.sort_order not in (
            proto.RangeRequest.NONE,
            proto.RangeRequest.ASCEND,
        ):
            raise error("InvalidSortOption")
        self._request = request
        self._is_whole = bool(request.limit or request.count_only or filters(request))
        first = request
        if not self._is_whole:
            first = proto.RangeRequest(key=request.key, serializable=request.serializable)
        handle, _ = api.HANDLERS[RANGE]
        handle(self.member, Waiter(self, self.request_id, RANGE, first), body)
        self.owner.calls.unanswered += 1

    def awaits(self, request_id: int) -> bool:
        return not self.is_closed

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        """Process the member's answer to the first read."""
        self.answered()
        if self.is_closed:
            return
        if self._is_whole:
            self._send(body)
            self.end()
            return
        # The first read checked only the first key.
        read = Waiter(self, self.request_id, RANGE, self._request)
        self.member.access.admit(read, self._begin, is_current=True)

    def _begin(self, refused: EtcdError | None) -> None:
        if self.is_closed:
            return
        if refused is not None:
            self.owner.fail(self.request_id, self.method, refused)
            return
        self._checked_under = _rules(self.member.state.auth)
        store = self.member.state.store
        self._revision = max(0, self._request.revision) or store.revision
        self.resume()
        self._send(self.member.identity.header(store.revision))

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        """The first read failed."""
        self.answered()
        if not self.is_closed:
            self.owner.fail(self.request_id, self.method, failure)

    def produce(self) -> None:
        _check_same(self.member.state.auth, self._checked_under)
        store, request = self.member.state.store, self._request
        store.check_revision(self._revision)
        try:
            fields, self._count, key = piece(
                store, request, self._revision, RANGE_CHUNK_BYTES, self._count
            )
        except DataDamaged as damage:
            raise damage.report() from damage
        if fields:
            self._send(fields)
        if key is None:
            self.end()
        else:
            request.key, request.range_end = key, request.range_end or key  # One key has no rest.

    def _send(self, response: bytes) -> None:
        self.send(b"\x0a" + varint(len(response)) + response)

    def close(self) -> None:
        self.member.reads.wake(self)


class LargeRangeCall(Call):
    """The answer to a KV.Range that is too large to be held, sent as it is read."""

    ticks = True
    _pieces: Iterator[bytes | int] | None = None

    def opened(self) -> None:
        store = self._store = self.member.state.store
        if not self.member.reads.streamed.take(self.owner, store.limits.max_streamed_answers):
            raise error("RequestTooManyRequests")
        self._checked_under = _rules(self.member.state.auth)

    def begin(self, request: proto.RangeRequest) -> None:
        store = self._store
        self._revision = request.revision if request.revision > 0 else store.revision
        store.pinned.append(self._revision)  # The client may not read for a while.
        head = self.member.identity.header(store.revision)
        self._pieces = streamed(store, request, self._revision, head, RANGE_CHUNK_BYTES)
        self._read_at = self.member.clock()
        self.member.metrics.ranges += 1
        self.resume()

    def produce(self) -> None:
        assert self._pieces is not None
        if self._store is not self.member.state.store:
            raise EtcdError(UNAVAILABLE, _REPLACED)
        _check_same(self.member.state.auth, self._checked_under)
        self._read_at = self.member.clock()
        try:
            piece = next(self._pieces, None)
        except DataDamaged as damage:
            raise damage.report() from damage
        if piece is None:
            self.end()
        elif piece:
            self.owner.send_piece(self.request_id, piece)  # type: ignore[attr-defined]

    def tick(self, now: float) -> None:
        if now - self._read_at > STALLED_TIMEOUT_S:
            text = "etcdlite: this answer was ended because its client does not read it"
            self.owner.fail(self.request_id, self.method, EtcdError(UNAVAILABLE, text))

    def close(self) -> None:
        self.member.reads.streamed.free(self)
        if self._pieces is not None:
            self._pieces = None
            self._store.pinned.remove(self._revision)


def _rules(auth: Auth) -> tuple[bool, int]:
    """What an answer is checked under. Enabling auth does not change its revision."""
    return auth.enabled, auth.revision


def _check_same(auth: Auth, checked_under: tuple[bool, int]) -> None:
    """Raise AuthOldRevision if users or roles have changed since an answer began, or auth was
    enabled: what is still to be read may not be permitted any more."""
    if auth.enabled and _rules(auth) != checked_under:
        raise error("AuthOldRevision")


CALLS: dict[int, type[Call]] = by_number(
    numbers(Route.STREAM),
    {
        "KV.RangeStream": RangeStreamCall,
        "Watch.Watch": WatchCall,
        "Lease.LeaseKeepAlive": KeepAliveCall,
        "Maintenance.Snapshot": SnapshotCall,
        **locks.CALLS,
    },
)
"""By the method's number."""
