"""The server's side of the native protocol (`docs/protocol.md`), sans-IO.

A `NativeSession` decodes the frames of one connection, calls the member, and encodes the answers.
A `ProtocolError` of the peer is reported to it; then the connection is closed.

Limits: a frame has at most `max_request_bytes` + 512 KiB; `MAX_OPEN_REQUESTS` and, for those that
the member answers soon, `MAX_UNANSWERED`; unsent output and deadlines as in `session.py`.

Users: frames have no place for a token. The token in the answer to Auth.Authenticate counts for the
connection: for all its requests from then on, open streams included, until the next answer to one.
Requests that came before that answer keep the token that they came with.
A client that has a token already, from another connection or member, sends it as the password, with
an empty name; it costs no hash, and the answer holds the same token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from etcdlite import __version__, proto
from etcdlite.errors import RESOURCE_EXHAUSTED, EtcdError, error
from etcdlite.frames import (
    CANCEL,
    END,
    ERROR,
    FRAME,
    FRAME_HEADER_BYTES,
    HANDSHAKE,
    HELLO,
    MAGIC,
    MIN_FRAME_LENGTH,
    PING,
    PROTOCOL_VERSION,
    ProtocolError,
)
from etcdlite.member import OVERHEAD_BYTES, Member
from etcdlite.proto import DecodeError, decode_request
from etcdlite.request import Waiter
from etcdlite.session import MAX_UNSENT_BYTES
from etcdlite.wire import api
from etcdlite.wire.calls import MAX_UNANSWERED, REQUEST_BYTES, Calls
from etcdlite.wire.session import ClientSession
from etcdlite.wire.streams import CALLS

MAX_OPEN_REQUESTS = 65_536
MAX_PING_BYTES = 64

_CANCELED = -1
"""In `_requests`: the request was answered as cancelled, and its result is dropped."""


class _Earlier(int):
    """In `_requests`: the method of a request that came before the last login, and its token."""

    token = ""
    """Counts for a unary request. A stream uses the latest token of the connection."""


class NativeSession(ClientSession):
    """One connection. It is open once the handshake is complete."""

    __slots__ = ("_max_frame_length", "_requests", "_token", "calls", "member")

    protocol = "native"

    def __init__(self, member: Member, on_output: Callable[[Any], None]) -> None:
        super().__init__(on_output, member.clock, member.state.store.limits)
        self.member = member
        self._max_frame_length = member.options.max_request_bytes + OVERHEAD_BYTES
        self._requests: dict[int, int] = {}
        """The method of each open request, by request id; or `_CANCELED`."""
        self.calls = Calls(member, self)
        self._token = ""
        """The token of the last successful Authenticate on this connection."""

    # Input.

    def receive(self, data: bytes) -> None:
        """Process bytes from the peer."""
        if self.is_closing:
            return
        if self.inbox.waiting_bytes:
            data = self.inbox.join(data)
            if not data:
                return
        try:
            at = 0
            if not self.is_open:
                if len(data) < HANDSHAKE.size:
                    self.inbox.keep(data, HANDSHAKE.size)
                    return
                self._open(data)
                at = HANDSHAKE.size
            self._read_frames(data, at)
        except ProtocolError as fault:
            if self.is_open:
                body = proto.Error(code=RESOURCE_EXHAUSTED, message=f"etcdlite: {fault}").encode()
                self.send(0, HELLO, END | ERROR, body)
            self.is_closing = True

    def _open(self, data: bytes) -> None:
        magic, lowest, highest = HANDSHAKE.unpack_from(data)
        if magic != MAGIC:
            raise ProtocolError("this is not the native protocol")
        if not lowest <= PROTOCOL_VERSION <= highest:
            self.outbox.append(HANDSHAKE.pack(MAGIC, 0, 0))
            raise ProtocolError(f"this server speaks protocol version {PROTOCOL_VERSION} only")
        self.is_open = True
        self.outbox.append(HANDSHAKE.pack(MAGIC, PROTOCOL_VERSION, 0))
        hello = proto.Hello(
            cluster_id=self.member.identity.cluster_id,
            member_id=self.member.identity.member_id,
            version=__version__,
            max_request_bytes=self.member.options.max_request_bytes,
        )
        self.send(0, HELLO, 0, hello.encode())

    def _read_frames(self, data: bytes, at: int) -> None:
        # The hot path of every request.
        end = len(data)
        unpack_from = FRAME.unpack_from
        handlers = api.HANDLERS
        member = self.member
        requests = self._requests
        longest = member.options.max_request_bytes + MIN_FRAME_LENGTH
        while end - at >= FRAME_HEADER_BYTES:
            length, request_id, method, flags = unpack_from(data, at)
            if not MIN_FRAME_LENGTH <= length <= self._max_frame_length:
                raise ProtocolError(f"a frame of length {length} is not accepted")
            stop = at + 4 + length
            if stop > end:
                self.inbox.keep(data[at:], stop - at)
                return
            handler = handlers.get(method)
            if handler is None or flags & CANCEL or request_id in requests or not request_id:
                self._handle_other(request_id, method, flags, data[at + FRAME_HEADER_BYTES : stop])
            elif length > longest:
                self._begin(request_id, method)
                self.fail(request_id, method, error("RequestTooLarge"))
            else:
                handle, decode = handler
                requests[request_id] = method
                try:
                    if length <= REQUEST_BYTES:
                        request = decode(data, at + FRAME_HEADER_BYTES, stop)
                    else:
                        self.calls.hold(request_id, length)
                        request = decode_request(decode, data, at + FRAME_HEADER_BYTES, stop)
                    handle(member, Waiter(self, request_id, method, request), data[at:stop])
                except (EtcdError, DecodeError) as failure:
                    self.fail(request_id, method, api.refusal(failure))
            at = stop
        if at < end:
            self.inbox.keep(data[at:], FRAME_HEADER_BYTES)

    def _begin(self, request_id: int, method: int) -> None:
        self._requests[request_id] = method
        if len(self._requests) > MAX_OPEN_REQUESTS:
            raise ProtocolError(f"more than {MAX_OPEN_REQUESTS} requests are open")

    def _handle_other(self, request_id: int, method: int, flags: int, body: bytes) -> None:
        """Process a frame that is not the first one of a unary request."""
        if not request_id:
            raise ProtocolError("a request has the id 0")
        opened = self._requests.get(request_id)
        if flags & CANCEL:
            if opened is not None and opened != _CANCELED:
                self.fail(request_id, opened, error("Canceled"))
                if opened not in CALLS:
                    # Its result is still to come, and must not answer a later request.
                    self._requests[request_id] = _CANCELED
            return
        if opened is not None and (opened != method or method not in CALLS):
            raise ProtocolError(f"request id {request_id} is in use already")
        if method == PING:
            if len(body) > MAX_PING_BYTES:
                raise ProtocolError(f"a ping has more than {MAX_PING_BYTES} bytes")
            self._begin(request_id, method)
            self.reply(request_id, method, body)
            return
        if method not in CALLS:
            self._begin(request_id, method)
            self.fail(request_id, method, api.unimplemented(method))
            return
        try:
            if opened is None:
                self._begin(request_id, method)
                self.calls.open(request_id, method, CALLS[method])
                if len(body) > REQUEST_BYTES:
                    self.calls.hold(request_id, len(body))
            if body or opened is None:
                self.calls.message(request_id, body)
            if flags & END:
                self.calls.finish(request_id)
        except (EtcdError, DecodeError) as failure:
            self.fail(request_id, method, api.refusal(failure))

    def token(self, request_id: int) -> str:
        opened = self._requests.get(request_id)
        if opened.__class__ is _Earlier and opened not in CALLS:
            return opened.token  # type: ignore[union-attr]
        return self._token

    def logged_in(self, token: str) -> None:
        requests, marked = self._requests, dict[int, _Earlier]()
        for request_id, method in reversed(requests.items()):
            if method.__class__ is _Earlier:
                break  # All before it came before an earlier login.
            if method not in marked:
                marked[method] = _Earlier(method)
                marked[method].token = self._token
            requests[request_id] = marked[method]
        self._token = token

    # Output.

    def awaits(self, request_id: int) -> bool:
        """Whether the request is open and not cancelled."""
        return self._requests.get(request_id, _CANCELED) != _CANCELED

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        """Answer a unary request; dropped if the request was cancelled."""
        if self._requests.pop(request_id, _CANCELED) == _CANCELED:
            self.outbox.wake()  # Input may wait for this.
            return
        outbox = self.outbox
        if outbox.unsent_bytes > MAX_UNSENT_BYTES:
            self.abort("it asks for more without reading its answers")
            return
        if not outbox.is_queued:
            outbox.wake()
        outbox.parts += (FRAME.pack(len(body) + MIN_FRAME_LENGTH, request_id, method, END), body)
        outbox.unsent_bytes += len(body) + FRAME_HEADER_BYTES

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        """Answer a unary request, or end a stream, with an error."""
        if self._requests.pop(request_id, _CANCELED) == _CANCELED:
            self.outbox.wake()
            return
        self.calls.close(request_id)
        body = proto.Error(code=failure.code, message=failure.text).encode()
        self.send(request_id, method, END | ERROR, body)

    def send_message(self, request_id: int, method: int, body: bytes) -> None:
        # The hot path of watches.
        outbox = self.outbox
        if not outbox.is_queued:
            outbox.wake()
        size = len(body)
        outbox.parts += (FRAME.pack(size + MIN_FRAME_LENGTH, request_id, method, 0), body)
        outbox.unsent_bytes += size + FRAME_HEADER_BYTES

    def end_call(self, request_id: int, method: int) -> None:
        if self._requests.pop(request_id, None) is not None:
            self.calls.close(request_id)
            self.send(request_id, method, END, b"")

    def send(self, request_id: int, method: int, flags: int, body: bytes) -> None:
        head = FRAME.pack(len(body) + MIN_FRAME_LENGTH, request_id, method, flags)
        self.outbox.append(head + body)

    def is_stalled(self, request_id: int) -> bool:
        """Same as `Session.is_blocked`: native streams have no flow control of their own."""
        outbox = self.outbox
        return outbox.unsent_bytes > outbox.high_water_bytes

    @property
    def is_full(self) -> bool:
        calls = self.calls
        return len(self._requests) - len(calls) + calls.unanswered >= MAX_UNANSWERED

    @property
    def kept_bytes(self) -> int:
        return super().kept_bytes + self.calls.requests_bytes(self._requests)

    @property
    def is_idle(self) -> bool:
        """No unary request is unanswered and no output is unsent."""
        return super().is_idle and all(m in CALLS for m in self._requests.values())

    def closed(self) -> None:
        """The connection is closed: drop its requests."""
        self._requests.clear()
        super().closed()

    def shut_down(self) -> None:
        """The server stops: end the streams."""
        stopped = error("Stopped")
        for request_id, method in list(self._requests.items()):
            if method in CALLS:
                self.fail(request_id, method, stopped)
