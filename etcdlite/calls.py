"""The API's calls that are more than one request and one answer: streams, and what waits.

A session (`native.py`, `grpc.py`) keeps a `Calls` and tells it of each message that belongs to such
a call; a `Call` answers through the session whenever it has something. `CALLS` names the class for
each method's number; a further kind of call is a further class there.

A call may itself be what the member takes for a session, and so ask it for reads and writes.

Invariants: a call that is closed, by either side, sends nothing any more; a call holds back while
`is_stalled`, and goes on when it is woken, so that a client that does not read holds no memory.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

from etcdlite import api, log, proto, snap, txn
from etcdlite.data import DataDamaged
from etcdlite.errors import EtcdError, error
from etcdlite.member import RANGE, Member
from etcdlite.mvcc import RANGE_STEP_KEYS, key_range, without_value
from etcdlite.proto import varint

RANGE_CHUNK_BYTES = 256 << 10
"""About the size of a message of a RangeStream."""


class CallOwner(Protocol):
    """The session, as its calls see it."""

    def send_message(self, request_id: int, method: int, body: bytes) -> None:
        """One message of the answer."""

    def end_call(self, request_id: int, method: int) -> None:
        """The answer is complete."""

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        """The call failed."""

    def is_stalled(self, request_id: int) -> bool:
        """What was sent on this call waits for the client to read."""


class Call:
    """One call in progress."""

    produces = False
    """`produce` is to be called whenever there is time."""
    ticks = False
    """`tick` is to be called several times a second."""

    def __init__(self, member: Member, owner: CallOwner, request_id: int, method: int) -> None:
        self.member = member
        self.owner = owner
        self.request_id = request_id
        self.method = method

    def message(self, body: bytes) -> None:
        """The client sent a message. Raises EtcdError, DecodeError: the call has failed."""

    def finish(self) -> None:
        """The client sends no more messages."""

    def produce(self) -> None:
        """Send a piece; not called while the call is stalled. Raises EtcdError."""

    def wake(self) -> None:
        """The call is not stalled any more."""

    def tick(self, now: float) -> None:
        """Time has passed; `now` is the member's clock."""

    def close(self) -> None:
        """The call is over: forget what it holds."""

    # What a Sink (watch.py) has.

    @property
    def blocked(self) -> bool:
        return self.owner.is_stalled(self.request_id)

    def send(self, body: bytes) -> None:
        self.owner.send_message(self.request_id, self.method, body)

    def end(self) -> None:
        self.owner.end_call(self.request_id, self.method)


class WatchCall(Call):
    def __init__(self, member: Member, owner: CallOwner, request_id: int, method: int) -> None:
        super().__init__(member, owner, request_id, method)
        self._stream = member.hub.open(self)

    def message(self, body: bytes) -> None:
        request = proto.WatchRequest.decode(body)
        if request.create_request is not None:
            self._stream.create(request.create_request)
        elif request.cancel_request is not None:
            self._stream.cancel(request.cancel_request.watch_id)
        elif request.progress_request is not None:
            self._stream.progress()

    def finish(self) -> None:
        self.end()

    def wake(self) -> None:
        self._stream.wake()

    def close(self) -> None:
        self._stream.close()


class KeepAliveCall(Call):
    def message(self, body: bytes) -> None:
        self.send(api.keep_alive(self.member, body))

    def finish(self) -> None:
        self.end()


class SnapshotCall(Call):
    produces = True

    def __init__(self, member: Member, owner: CallOwner, request_id: int, method: int) -> None:
        super().__init__(member, owner, request_id, method)
        self._parts: Generator[bytes, None, None] | None = None

    def message(self, body: bytes) -> None:
        if self._parts is None:
            self._parts = snap.stream(self.member)  # type: ignore[assignment]

    def produce(self) -> None:
        if self._parts is None:
            return
        part = next(self._parts, None)
        if part is None:
            self.end()
        else:
            self.send(part)

    def close(self) -> None:
        if self._parts is not None:
            self._parts.close()


class RangeStreamCall(Call):
    """A range in pieces, all of one revision, that merge to what KV.Range answers.

    A first small read finds out which revision is linearizable. If that is compacted before the end
    the call fails, as in etcd. A range that is limited, filtered or counted is sent in one piece.
    """

    produces = True
    is_blocked = False
    """For the member: this call's own reads are small, or wait for nobody."""

    def __init__(self, member: Member, owner: CallOwner, request_id: int, method: int) -> None:
        super().__init__(member, owner, request_id, method)
        self._request: Any = None
        self._is_whole = False
        self._cursor: bytes | None = None
        self._end: bytes | None = None
        self._revision = 0
        self._count = 0
        self._header = b""
        self._is_closed = False

    def message(self, body: bytes) -> None:
        if self._request is not None:
            return
        request = proto.RangeRequest.decode(body)
        txn.check_range(request)
        if request.sort_target or request.sort_order not in (
            proto.RangeRequest.NONE,
            proto.RangeRequest.ASCEND,
        ):
            raise error("InvalidSortOption")
        self._request = request
        self._is_whole = bool(
            request.limit
            or request.count_only
            or request.min_mod_revision
            or request.max_mod_revision
            or request.min_create_revision
            or request.max_create_revision
        )
        first = request if self._is_whole else proto.RangeRequest(key=request.key)
        if request.serializable:
            self.member.read_now(self, self.request_id, RANGE, first)
        else:
            self.member.read(self, self.request_id, RANGE, first)

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        """The member's answer to the first read."""
        if self._is_closed:
            return
        if self._is_whole:
            self._send(body)
            self.end()
            return
        store = self.member.store
        request = self._request
        self._header = self.member.header(store.revision)
        self._revision = request.revision if request.revision > 0 else store.revision
        self._cursor, self._end = key_range(request.key, request.range_end)

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        """The member could not answer the first read."""
        if not self._is_closed:
            self.owner.fail(self.request_id, self.method, failure)

    def produce(self) -> None:
        if self._cursor is None:
            return
        store = self.member.store
        store.check_revision(self._revision)
        records, cursor = store.index.scan(
            self._cursor, self._end, self._revision, RANGE_STEP_KEYS
        )
        parts = [self._header]
        size = 0
        try:
            for location, length in records:
                kv = store.data.read(location, length)
                if size > RANGE_CHUNK_BYTES:
                    cursor = proto.KeyValue.decode(kv).key
                    break
                self._count += 1
                if self._request.keys_only:
                    kv = without_value(kv)
                parts += (b"\x12", varint(len(kv)), kv)
                size += len(kv)
        except DataDamaged as damage:
            if not log.limited("damaged"):
                log.error(str(damage))
            raise error("Corrupt") from damage
        self._header = b""
        self._cursor = cursor
        if cursor is None and self._count:
            parts += (b"\x20", varint(self._count))
        self._send(b"".join(parts))
        if cursor is None:
            self.end()

    def _send(self, response: bytes) -> None:
        self.send(b"\x0a" + varint(len(response)) + response)

    def close(self) -> None:
        self._is_closed = True
        self._cursor = None
        self.member.forget(self)


CALLS: dict[int, type[Call]] = {
    proto.METHOD_BY_NAME[name].number: kind
    for name, kind in {
        "KV.RangeStream": RangeStreamCall,
        "Watch.Watch": WatchCall,
        "Lease.LeaseKeepAlive": KeepAliveCall,
        "Maintenance.Snapshot": SnapshotCall,
    }.items()
}
"""By the method's number."""


class Calls:
    """The calls of one session."""

    def __init__(self, member: Member, owner: CallOwner) -> None:
        self._member = member
        self._owner = owner
        self._open: dict[int, Call] = {}
        self._producing: dict[int, Call] = {}
        self._ticking: dict[int, Call] = {}

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._open

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Any:
        """The open calls; they may be closed meanwhile."""
        return iter(list(self._open.values()))

    def open(self, request_id: int, method: int, kind: type[Call]) -> None:
        call = kind(self._member, self._owner, request_id, method)
        self._open[request_id] = call
        if call.produces:
            self._producing[request_id] = call
        if call.ticks:
            self._ticking[request_id] = call

    def message(self, request_id: int, body: bytes) -> None:
        """Raises EtcdError, DecodeError."""
        self._open[request_id].message(body)

    def finish(self, request_id: int) -> None:
        """The client sends no more on this call, if it is still open."""
        call = self._open.get(request_id)
        if call is not None:
            call.finish()

    def close(self, request_id: int) -> bool:
        """Forget a call; False if there is none."""
        call = self._open.pop(request_id, None)
        if call is None:
            return False
        self._producing.pop(request_id, None)
        self._ticking.pop(request_id, None)
        call.close()
        return True

    def wake(self, request_id: int) -> None:
        call = self._open.get(request_id)
        if call is not None:
            call.wake()

    @property
    def have_more(self) -> bool:
        """`produce` may have something to send."""
        return bool(self._producing)

    def produce(self) -> None:
        """Let each call that can send a piece of its answer."""
        for request_id, call in list(self._producing.items()):
            if call.blocked:
                continue
            try:
                call.produce()
            except EtcdError as failure:
                self._owner.fail(request_id, call.method, failure)

    def tick(self, now: float) -> None:
        for call in list(self._ticking.values()):
            call.tick(now)
