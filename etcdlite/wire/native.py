"""The server's side of the native protocol (`docs/protocol.md`), sans-IO.

A `NativeSession` takes the bytes of one connection and calls the member; answers gather in `out`
until the owner sends them. A fault of the peer is a `ProtocolError`: the session says so, and the
owner closes the connection once that is sent.

Limits: a frame has at most `max_request_bytes` + 512 KiB; `MAX_OPEN_REQUESTS` wait for an answer at
once; while more than `HIGH_WATER_BYTES` wait to be sent the owner reads no more from the peer and
streams hold back.
"""

from __future__ import annotations

from collections.abc import Callable

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
from etcdlite.proto import DecodeError
from etcdlite.wire import api
from etcdlite.wire.calls import Calls
from etcdlite.wire.streams import CALLS

MAX_OPEN_REQUESTS = 65_536
MAX_PING_BYTES = 64
HIGH_WATER_BYTES = 1 << 20
MAX_UNSENT_BYTES = 64 << 20
"""With more than this waiting to be sent, a client that is owed yet another answer is dropped: it
goes on asking without reading."""

_CANCELED = -1
"""In place of the method: the request was answered as cancelled and its result will be dropped."""


class NativeSession:
    """One connection. `on_output` is called when `out` gets its first bytes."""

    def __init__(self, member: Member, on_output: Callable[[NativeSession], None]) -> None:
        self.member = member
        self.out: list[bytes] = []
        self.unsent_bytes = 0
        """Bytes in `out` and those that the owner took but could not send yet."""
        self.is_open = False
        """The handshake is done."""
        self.is_closing = False
        """Nothing is read any more; close when everything is sent."""
        self.is_aborted = False
        """Close at once: the peer does not read."""
        self._on_output = on_output
        self._tail: list[bytes] = []
        self._tail_bytes = 0
        self._needed_bytes = HANDSHAKE.size
        self._max_frame_length = member.options.max_request_bytes + OVERHEAD_BYTES
        self._requests: dict[int, int] = {}
        self.calls = Calls(member, self)

    # Input.

    def receive(self, data: bytes) -> None:
        """Take what the peer sent."""
        if self.is_closing:
            return
        if self._tail:
            self._tail.append(data)
            self._tail_bytes += len(data)
            if self._tail_bytes < self._needed_bytes:
                return
            data = b"".join(self._tail)
            self._tail.clear()
        try:
            at = 0
            if not self.is_open:
                if len(data) < HANDSHAKE.size:
                    self._keep(data, 0, HANDSHAKE.size)
                    return
                self._open(data)
                at = HANDSHAKE.size
            self._read_frames(data, at)
        except ProtocolError as fault:
            self.fail_connection(EtcdError(RESOURCE_EXHAUSTED, f"etcdlite: {fault}"))

    def _keep(self, data: bytes, at: int, needed_bytes: int) -> None:
        self._tail.append(data[at:])
        self._tail_bytes = len(data) - at
        self._needed_bytes = needed_bytes

    def _open(self, data: bytes) -> None:
        magic, lowest, highest = HANDSHAKE.unpack_from(data)
        if magic != MAGIC:
            raise ProtocolError("this is not the native protocol")
        if not lowest <= PROTOCOL_VERSION <= highest:
            self._append(HANDSHAKE.pack(MAGIC, 0, 0))
            raise ProtocolError(f"this server speaks protocol version {PROTOCOL_VERSION} only")
        self.is_open = True
        self._append(HANDSHAKE.pack(MAGIC, PROTOCOL_VERSION, 0))
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
                self._keep(data, at, stop - at)
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
                    request = decode(data, at + FRAME_HEADER_BYTES, stop)
                    handle(member, self, request_id, method, request, data[at:stop])
                except EtcdError as failure:
                    self.fail(request_id, method, failure)
                except DecodeError as failure:
                    self.fail(request_id, method, api.invalid(method, failure))
                if len(requests) > MAX_OPEN_REQUESTS:
                    raise ProtocolError(f"more than {MAX_OPEN_REQUESTS} requests are open")
            at = stop
        if at < end:
            self._keep(data, at, FRAME_HEADER_BYTES)

    def _begin(self, request_id: int, method: int) -> None:
        self._requests[request_id] = method
        if len(self._requests) > MAX_OPEN_REQUESTS:
            raise ProtocolError(f"more than {MAX_OPEN_REQUESTS} requests are open")

    def _handle_other(self, request_id: int, method: int, flags: int, body: bytes) -> None:
        """Frames that are not the first of a unary request."""
        if not request_id:
            raise ProtocolError("a request has the id 0")
        opened = self._requests.get(request_id)
        if flags & CANCEL:
            if opened is not None and opened != _CANCELED:
                self.fail(request_id, opened, error("Canceled"))
                if opened not in CALLS:
                    # Its result is still to come, and must not answer another request.
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
            if body or opened is None:
                self.calls.message(request_id, body)
            if flags & END:
                self.calls.finish(request_id)
        except EtcdError as failure:
            self.fail(request_id, method, failure)
            return
        except DecodeError as failure:
            self.fail(request_id, method, api.invalid(method, failure))

    # Output.

    def awaits(self, request_id: int) -> bool:
        """The request is open, and not cancelled."""
        return self._requests.get(request_id, _CANCELED) != _CANCELED

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        """The answer to a unary request; dropped if the request was cancelled."""
        if self._requests.pop(request_id, _CANCELED) == _CANCELED:
            return
        if self.unsent_bytes > MAX_UNSENT_BYTES:
            self._abort()
            return
        out = self.out
        if not out:
            self._on_output(self)
        out.append(FRAME.pack(len(body) + MIN_FRAME_LENGTH, request_id, method, END))
        out.append(body)
        self.unsent_bytes += len(body) + FRAME_HEADER_BYTES

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        """The answer to a request, or the end of a stream, that failed."""
        if self._requests.pop(request_id, _CANCELED) == _CANCELED:
            return
        self.calls.close(request_id)
        body = proto.Error(code=failure.code, message=failure.text).encode()
        self.send(request_id, method, END | ERROR, body)

    def send_message(self, request_id: int, method: int, body: bytes) -> None:
        """One message of a stream."""
        # The hot path of watches.
        if not self.out:
            self._on_output(self)
        self.out += (FRAME.pack(len(body) + MIN_FRAME_LENGTH, request_id, method, 0), body)
        self.unsent_bytes += len(body) + FRAME_HEADER_BYTES

    def end_call(self, request_id: int, method: int) -> None:
        """The end of a stream."""
        if self._requests.pop(request_id, None) is not None:
            self.calls.close(request_id)
            self.send(request_id, method, END, b"")

    def send(self, request_id: int, method: int, flags: int, body: bytes) -> None:
        """One frame."""
        self._append(FRAME.pack(len(body) + MIN_FRAME_LENGTH, request_id, method, flags))
        self.out.append(body)
        self.unsent_bytes += len(body)

    def _append(self, data: bytes) -> None:
        if not self.out:
            self._on_output(self)
        self.out.append(data)
        self.unsent_bytes += len(data)

    def _abort(self) -> None:
        """The peer asks without reading: hold nothing for it any more, and tell the owner."""
        self.is_aborted = self.is_closing = True
        self.out.clear()
        self._on_output(self)

    def fail_connection(self, failure: EtcdError) -> None:
        """Tell the peer why the connection ends, and end it."""
        if self.is_open:
            body = proto.Error(code=failure.code, message=failure.text).encode()
            self.send(0, HELLO, END | ERROR, body)
        self.is_closing = True

    @property
    def is_new(self) -> bool:
        """Nothing has come yet."""
        return not (self.is_open or self._tail)

    @property
    def is_blocked(self) -> bool:
        """The peer does not read what it was sent: streams hold back."""
        return self.unsent_bytes > HIGH_WATER_BYTES

    @property
    def is_full(self) -> bool:
        """Never: requests are taken as they come, up to `MAX_OPEN_REQUESTS`."""
        return False

    def is_stalled(self, request_id: int) -> bool:
        """As `is_blocked`: the streams of a connection have no windows of their own."""
        return self.unsent_bytes > HIGH_WATER_BYTES

    @property
    def is_idle(self) -> bool:
        """No unary request is unanswered and nothing waits to be sent."""
        return not self.unsent_bytes and all(m in CALLS for m in self._requests.values())

    @property
    def has_more(self) -> bool:
        """`produce` would give something now."""
        return self.calls.have_more

    def produce(self) -> None:
        """Send the next piece of each stream that is made in pieces."""
        self.calls.produce()

    def tick(self, now: float) -> None:
        """`now` is the member's clock."""
        self.calls.tick(now)

    def unblocked(self) -> None:
        """The peer reads again."""
        self.member.unblocked(self)
        for call in self.calls:
            call.wake()

    def closed(self) -> None:
        """The connection is gone: forget everything that was asked for."""
        self.is_closing = True
        for request_id in list(self._requests):
            self.calls.close(request_id)
        self._requests.clear()
        self._tail.clear()
        self.out.clear()
        self.member.forget(self)
        self.calls.disown()

    def shut_down(self) -> None:
        """The server stops: end the streams."""
        stopped = error("Stopped")
        for request_id, method in list(self._requests.items()):
            if method in CALLS:
                self.fail(request_id, method, stopped)
