"""gRPC over HTTP/2 (`http2.py`), sans-IO: the protocol of etcd and its clients.

A unary request becomes the frame that it would be in the native protocol, because the log holds
such frames, and is handled by `api.HANDLERS`. Every other request is a `Call` (`calls.py`). The
headers of requests are read by `grpc_request.py`.

On the wire a message is 1 byte (1: compressed), its length in 4 bytes, big-endian, and its content.
An answer is a HEADERS frame, messages, and a HEADERS frame with the status; an immediate error is a
single HEADERS frame. No header block that is sent changes the peer's dynamic table, so the blocks
of a successful answer are constants.

Codes and texts are those of grpc-go, on which etcd is built.

Limits: a message has at most `max_request_bytes` + 512 KiB, before and after decompression; at most
`MAX_PARTIAL_BYTES` of incomplete requests are held per connection, for a limited time.
"""

from __future__ import annotations

import copy
import struct
import zlib
from collections.abc import Callable
from itertools import islice
from typing import Any
from urllib.parse import quote_from_bytes

from etcdlite import frames, proto
from etcdlite.errors import (
    CANCELED,
    DEADLINE_EXCEEDED,
    INTERNAL,
    RESOURCE_EXHAUSTED,
    UNAVAILABLE,
    UNIMPLEMENTED,
    EtcdError,
    error,
)
from etcdlite.frames import FRAME, MIN_FRAME_LENGTH
from etcdlite.member import OVERHEAD_BYTES, Member
from etcdlite.methods import RANGE
from etcdlite.proto import FEW_BYTES, DecodeError, decode_request
from etcdlite.ranges import AnswerTooLarge
from etcdlite.replica.reads import LARGE_BYTES
from etcdlite.request import Waiter
from etcdlite.session import MAX_UNSENT_BYTES, partial_timeout_s
from etcdlite.wire import http2
from etcdlite.wire.calls import CLOSED_PER_SLICE, REQUEST_BYTES, Call, Calls
from etcdlite.wire.grpc_request import (
    MIN_TIMEOUT_S,
    NO_TIMEOUT,
    NOWHERE,
    Request,
    count_routes,
    read_request,
    read_timeout,
    without_timeout,
)
from etcdlite.wire.hpack import Field, Headers, pack
from etcdlite.wire.http2 import GHOST, Stream
from etcdlite.wire.http2_state import CANCEL, ConnectionFault
from etcdlite.wire.session import INVALID_TOKEN, ClientSession, LeaderLoss
from etcdlite.wire.streams import LargeRangeCall

MAX_PARTIAL_BYTES = 32 << 20
"""Incomplete requests held per connection; a request that exceeds it is refused."""

STALLED_BYTES = 64 << 10
"""A call makes no more output while this much of it is held."""

MAX_ERROR_TEXT_BYTES = 2048
"""The text of an error in a header, after its encoding; longer ones are cut."""

_UNQUOTED = bytes(range(0x20, 0x7F)).replace(b"%", b"")

MAX_RECALLED = 64
"""The headers of requests with deadlines that a connection remembers, none of them larger than
`MAX_KNOWN_BYTES`."""

HEADER_BYTES = 1024
"""The memory that a remembered header occupies, approximately, for `kept_bytes`."""

MAX_SENT_MESSAGE_BYTES = (1 << 32) - 1
"""The length of a message has 32 bits."""

FAILED_PER_SLICE = 64
"""Streams that fail at once for the same reason, such as a lost leader. Each takes about 20 us."""

READ_BYTES = 8 << 10
MESSAGE_BYTES = 16
"""How much of a DATA frame is processed at once, and what each message counts beside its unpacked
bytes. The other messages follow in the next turns."""

MAX_GZIP_MEMBERS = 64
"""The gzip members of one message. Each costs as much as many kilobytes of data."""

FREE_GZIP_BYTES = 64 << 10
MAX_GZIP_RATIO = 100
GZIP_BYTES_PER_NOISE = 32 << 10
"""Unpacked bytes beyond the first limit and this multiple of the packed ones count as noise
(`http2_conduct.py`): a few bytes must not cause much work."""

PREFIX = struct.Struct(">BI")
"""The prefix of a message: compressed, length."""
PREFIX_BYTES = PREFIX.size

_CONTENT_TYPE = (b"content-type", b"application/grpc")
_ENCODINGS = (b"grpc-accept-encoding", b"gzip")
_HEADER_BLOCK = b"\x88" + pack([_CONTENT_TYPE])
"""`:status 200` is entry 8 of the static table."""
_OK_BLOCK = pack([(b"grpc-status", b"0")])

# HEADERS, then DATA up to the message: length, type and flags; stream id; block; length and type,
# flags, stream id; message prefix.
_ANSWER = struct.Struct(f">5sI{len(_HEADER_BLOCK)}sIBIBI")
_ANSWER_START = bytes((0, 0, len(_HEADER_BLOCK), http2.HEADERS, http2.END_HEADERS))
_END = struct.Struct(f">5sI{len(_OK_BLOCK)}s")
_END_START = bytes((0, 0, len(_OK_BLOCK), http2.HEADERS, http2.END_HEADERS | http2.END_STREAM))
_MESSAGE = struct.Struct(">IBIBI")
_ENVELOPE_BYTES = _ANSWER.size + _END.size


def percent_encode(text: str) -> bytes:
    """Encode a status message: printable ASCII except "%" stays, the rest becomes %XX."""
    plain = text[:MAX_ERROR_TEXT_BYTES].encode("utf-8", "replace")
    encoded = quote_from_bytes(plain, _UNQUOTED).encode()
    if len(encoded) <= MAX_ERROR_TEXT_BYTES:
        return encoded
    encoded = encoded[:MAX_ERROR_TEXT_BYTES]
    return encoded[:-2] + encoded[-2:].partition(b"%")[0]


def gunzip(packed: bytes, max_bytes: int) -> bytes:
    """Decompress gzip data, which may have several members (RFC 1952, 2.2). Raises EtcdError."""
    unpacked = b""
    for _ in range(MAX_GZIP_MEMBERS):
        inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
        try:
            unpacked += inflater.decompress(packed, max_bytes + 1 - len(unpacked))
        except zlib.error as failure:
            raise EtcdError(
                INTERNAL, f"grpc: failed to decompress the received message: {failure}"
            ) from None
        if len(unpacked) > max_bytes:
            raise EtcdError(
                RESOURCE_EXHAUSTED,
                f"grpc: received message after decompression larger than max {max_bytes}",
            )
        packed = inflater.unused_data
        if not inflater.eof:
            break
        if not packed:
            return unpacked
    raise EtcdError(INTERNAL, "grpc: failed to decompress the received message: unexpected EOF")


class GrpcStream(Stream):
    began = 0.0
    """The member's clock when the header came, in seconds."""
    partial: bytearray | None = None
    """The beginning of an incomplete message. A list of its pieces would take many times the memory
    if they are small."""
    needed_bytes = PREFIX_BYTES
    message: bytes | None = None
    """The message of a request that is not a stream."""
    call: Call
    """Of a stream of requests."""
    is_late = False
    """The request or message was incomplete at the last check, too."""


class GrpcSession(http2.Connection, ClientSession):
    __slots__ = (
        "_are_due", "_check_interval_s", "_deadlines", "_is_ending", "_leader_loss", "_leaving",
        "_max_message_bytes", "_need_leader", "_next_check", "_partial_bytes", "_recalled",
        "_unread", "calls", "member",
    )  # fmt: skip

    protocol = "grpc"
    streams_ranges = True
    is_served_to_the_end = True
    """Answers may wait for window updates from the client."""

    stream_class = GrpcStream
    streams: dict[int, GrpcStream]  # type: ignore[assignment]

    def __init__(
        self, member: Member, on_output: Callable[[GrpcSession], None], **options: Any
    ) -> None:
        """`options`: see `http2.Connection`."""
        super().__init__(on_output, member.clock, member.state.store.limits, **options)
        self.member = member
        if NOWHERE.number not in member.metrics.rpcs:
            count_routes(member.metrics)
        self.calls = Calls(member, self)
        self._max_message_bytes = member.options.max_request_bytes + OVERHEAD_BYTES
        self._leaving: dict[int, GrpcStream] = {}
        """Streams that were open when the connection was closed, and are not counted yet."""
        self._partial_bytes = 0
        self._unread: dict[int, GrpcStream] = {}
        """Streams with `is_unread`, in the order of their turns."""
        self._recalled: dict[tuple[Field, ...], Request] = {}
        """Requests with a deadline, by their headers `without_timeout`."""
        self._deadlines: dict[int, float] = {}
        self._need_leader: set[int] = set()
        self._are_due = False
        """More than `FAILED_PER_SLICE` streams are due to fail."""
        self._is_ending = False
        """The server stops, and more than `FAILED_PER_SLICE` streams are still to end."""
        self._leader_loss = LeaderLoss(member)
        self._check_interval_s = partial_timeout_s(self._max_message_bytes)
        """The interval between checks for incomplete requests."""
        self._next_check = self.member.clock() + self._check_interval_s

    def read_request(self, headers: Headers) -> Request:
        request = read_request(headers)
        metrics = self.member.metrics
        request.rpc = metrics.rpcs[request.number]
        request.client = metrics.client(request.api_version)
        if request.timeout_s is not None and request.failure is None:
            key = without_timeout(headers)
            is_small = request.size_bytes <= http2.MAX_KNOWN_BYTES
            if is_small and key.count(NO_TIMEOUT) == 1 and b"content-length" not in dict(key):
                if len(self._recalled) >= MAX_RECALLED:
                    self._recalled.clear()
                self._recalled[key] = copy.copy(request)
        return request

    def recall(self, headers: Headers) -> Request | None:
        # A client with deadlines sends another grpc-timeout with each request: only that is read.
        key = without_timeout(headers)
        request = self._recalled.get(key)
        if request is None or read_timeout(request, headers[key.index(NO_TIMEOUT)][1]) is not None:
            return None
        return request

    # Requests.

    def completed(  # type: ignore[override]
        self, stream: GrpcStream, data: bytes, at: int, end: int
    ) -> None:
        # The hot path of every unary request. Unusual ones take the slow path.
        request: Request = stream.request
        if stream.partial is not None:
            data = self._take_partial(stream, data[at:end])
            at, end = 0, len(data)
        start = at + PREFIX_BYTES
        size = end - start
        member = self.member
        if (
            not request.is_plain
            or size < 0
            or stream.message is not None
            or PREFIX.unpack_from(data, at) != (0, size)
            or size > member.options.max_request_bytes
        ):
            if end > at:
                self._read_messages(stream, data[at:end])
            if self.streams.get(stream.id) is stream:
                self.ended(stream)
            return
        number = request.number
        request.rpc.received_bytes += size
        if size > REQUEST_BYTES:
            self.calls.hold(stream.id, size)
        try:
            if size <= FEW_BYTES:
                body = request.decode(data, start, end)  # type: ignore[misc]
            else:
                body = decode_request(request.decode, data, start, end)  # type: ignore[arg-type]
            frame = b""
            # Of a range only the size of its frame counts, and only if it is large.
            if number != RANGE or size > LARGE_BYTES:
                frame = FRAME.pack(size + MIN_FRAME_LENGTH, stream.id, number, 0) + data[start:end]
            request.handle(member, Waiter(self, stream.id, number, body), frame)  # type: ignore[misc]
        except (EtcdError, DecodeError) as failure:
            self.fail(stream.id, number, _refusal(failure))

    def opened(self, stream: GrpcStream) -> None:  # type: ignore[override]
        request: Request = stream.request
        rpc = request.rpc
        rpc.started += 1
        stream.began = now = self.member.clock()
        if request.timeout_s is not None:
            if request.timeout_s < MIN_TIMEOUT_S:
                self.fail(stream.id, request.number, error("DeadlineExceeded"))
                return
            self._deadlines[stream.id] = now + request.timeout_s
        if request.is_plain:
            request.client.unary += 1
            return
        if request.size_bytes > http2.MAX_KNOWN_BYTES:
            self.calls.hold(stream.id, request.size_bytes)
        if rpc.kind == "unary":
            request.client.unary += 1
        else:
            request.client.streams += 1
        if request.failure is not None:
            self.fail(stream.id, request.number, request.failure)
        elif request.has_leader and not self.member.raft.leader:
            self.fail(stream.id, request.number, error("NoLeader"))
        elif request.call is not None and request.is_client_stream:
            self._open_call(stream)

    def _open_call(self, stream: GrpcStream) -> None:
        request: Request = stream.request
        assert request.call is not None
        stream.call = self.calls.open(stream.id, request.number, request.call)
        if request.has_leader:
            if not self._need_leader:
                self._leader_loss = LeaderLoss(self.member)
            self._need_leader.add(stream.id)

    def received(self, stream: GrpcStream, piece: bytes) -> None:  # type: ignore[override]
        if stream.partial is None:
            self._read_messages(stream, piece)
        elif len(stream.partial) + len(piece) >= stream.needed_bytes and not stream.is_unread:
            self._read_messages(stream, self._take_partial(stream, piece))
        else:
            stream.partial += piece
            self._partial_bytes += len(piece)
            if self._partial_bytes > MAX_PARTIAL_BYTES:
                self.fail(stream.id, stream.request.number, error("RequestTooManyRequests"))

    def _read_on(self) -> None:
        """Process further messages of the next stream that is unread."""
        stream = next(iter(self._unread.values()))
        try:
            self._read_messages(stream, self._take_partial(stream, b""))
        except ConnectionFault as fault:
            self._unread.clear()
            self.break_off(fault)
            return
        is_open = self.streams.get(stream.id) is stream
        if is_open and stream.is_ended:
            self.ended(stream)
        elif is_open:
            self.renew_window(stream)

    def _take_partial(self, stream: GrpcStream, piece: bytes) -> bytes:
        """Return the input that the stream keeps, followed by `piece`, and keep it no longer."""
        assert stream.partial is not None
        data = b"".join((stream.partial, piece))
        self._partial_bytes -= len(stream.partial)
        stream.partial = None
        stream.is_unread = stream.is_late = False
        self._unread.pop(stream.id, None)
        return data

    def _read_messages(self, stream: GrpcStream, data: bytes) -> None:
        # The hot path of keep-alives, which arrive many at a time.
        request: Request = stream.request
        at = 0
        end = len(data)
        needed_bytes = PREFIX_BYTES
        left = READ_BYTES
        try:
            while end - at >= PREFIX_BYTES:
                if left <= 0:
                    stream.is_unread = True
                    self._unread[stream.id] = stream
                    break
                packed, size = PREFIX.unpack_from(data, at)
                start = at + PREFIX_BYTES
                if size > self._max_message_bytes:
                    raise EtcdError(
                        RESOURCE_EXHAUSTED,
                        "grpc: received message larger than max "
                        f"({size} vs. {self._max_message_bytes})",
                    )
                if end - start < size:
                    needed_bytes += size
                    break
                at = start + size
                message = data[start:at]
                if packed:
                    message = self._unpack_message(request, packed, message)
                left -= len(message) + MESSAGE_BYTES
                rpc = request.rpc
                rpc.received += 1
                rpc.received_bytes += len(message)
                if request.is_client_stream:
                    stream.call.message(message)
                elif stream.message is None:
                    stream.message = message
                    self.count_partial(len(message))
                else:
                    raise EtcdError(INTERNAL, "grpc: more than one message in a unary request")
                if at == end or stream.tail or self.streams.get(stream.id) is not stream:
                    return
            stream.partial = bytearray(data[at:])
            stream.needed_bytes = needed_bytes
            self.count_partial(end - at)
        except (EtcdError, DecodeError) as failure:
            self.fail(stream.id, request.number, _refusal(failure))

    def count_partial(self, size_bytes: int) -> None:
        """Count input that is kept, or no longer (negative). Raises EtcdError above the limit."""
        self._partial_bytes += size_bytes
        if size_bytes > 0 and self._partial_bytes > MAX_PARTIAL_BYTES:
            raise error("RequestTooManyRequests")

    def _unpack_message(self, request: Request, packed: int, message: bytes) -> bytes:
        if packed > 1:
            raise EtcdError(INTERNAL, f"grpc: received unexpected payload format {packed}")
        if not request.is_packed:
            raise EtcdError(INTERNAL, "grpc: compressed flag set with identity or empty encoding")
        unpacked = gunzip(message, self._max_message_bytes)
        excess = len(unpacked) - max(FREE_GZIP_BYTES, MAX_GZIP_RATIO * len(message))
        if excess > 0:
            self.conduct.count_noise(excess // GZIP_BYTES_PER_NOISE)
        return unpacked

    def ended(self, stream: GrpcStream) -> None:  # type: ignore[override]
        request: Request = stream.request
        if stream.is_unread:
            return  # `_read_on` ends it.
        if request.is_client_stream and not stream.partial:
            self.calls.finish(stream.id)
        elif stream.message is not None and not stream.partial:
            self._run(stream, request, stream.message)
        else:
            what = "ends within a message" if stream.partial else "has no message"
            self.fail(stream.id, request.number, EtcdError(INTERNAL, f"grpc: the request {what}"))

    def _run(self, stream: GrpcStream, request: Request, message: bytes) -> None:
        number = request.number
        stream.message = None
        self._partial_bytes -= len(message)
        self.calls.hold(stream.id, len(message))
        try:
            if request.call is not None:
                self._open_call(stream)
                stream.call.message(message)
                self.calls.finish(stream.id)
                return
            if len(message) > self.member.options.max_request_bytes:
                raise error("RequestTooLarge")
            assert request.handle is not None and request.decode is not None
            body = decode_request(request.decode, message)
            frame = frames.frame(stream.id, number, 0, message)
            request.handle(self.member, Waiter(self, stream.id, number, body), frame)
        except (EtcdError, DecodeError) as failure:
            self.fail(stream.id, number, _refusal(failure))

    def token(self, request_id: int) -> str:
        """The auth token of an open request, "" if it has none. For a closed request a token that
        is not valid: with "", it would be a request of the certificate's user."""
        stream = self.streams.get(request_id, GHOST)
        return INVALID_TOKEN if stream is GHOST else stream.request.token

    # Answers.

    def awaits(self, request_id: int) -> bool:
        """Whether the request is open, and neither cancelled nor past its deadline."""
        return self.streams.get(request_id, GHOST) is not GHOST

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        """Answer a unary request; dropped if it is no longer open."""
        # A hot path. If the windows have room for it, the answer is three pieces of bytes.
        stream = self.streams.pop(request_id, None)
        if stream is None or stream is GHOST:
            return
        if self._deadlines:
            self._deadlines.pop(request_id, None)
        rpc = stream.request.rpc
        rpc.handling_s.observe(self.member.clock() - stream.began)
        length = len(body)
        rpc.sent_bytes += length
        size = length + PREFIX_BYTES
        flow = self.flow
        if (
            size > flow.window
            or size > flow.initial + stream.credit
            or size > flow.max_frame
            or self.table_update
        ):
            self.send_headers(stream, _HEADER_BLOCK)
            self.send_data(stream, PREFIX.pack(0, len(body)), body)
            self.finish(stream, _OK_BLOCK)
            return
        flow.window -= size
        self.conduct.answers += 1
        outbox = self.outbox
        if outbox.unsent_bytes + outbox.held_bytes > MAX_UNSENT_BYTES:
            self.abort("it asks for more without reading its answers")
            return
        if not outbox.is_queued:
            outbox.wake()
        outbox.parts += (
            _ANSWER.pack(
                _ANSWER_START, request_id, _HEADER_BLOCK, size << 8, 0, request_id, 0, length
            ),
            body,
            _END.pack(_END_START, request_id, _OK_BLOCK),
        )
        outbox.unsent_bytes += _ENVELOPE_BYTES + length

    def _stream_range(self, request_id: int, request: proto.RangeRequest) -> None:
        """Send the answer to a range as it is read."""
        try:
            call = self.calls.open(request_id, RANGE, LargeRangeCall)
            assert isinstance(call, LargeRangeCall)
            call.begin(request)
        except EtcdError as failure:
            self.fail(request_id, RANGE, failure)

    def send_piece(self, request_id: int, piece: bytes | int) -> None:
        """Send the length of a message, or a piece of it."""
        stream = self.streams[request_id]
        if isinstance(piece, int):
            if piece > MAX_SENT_MESSAGE_BYTES:
                raise AnswerTooLarge(MAX_SENT_MESSAGE_BYTES)
            stream.request.rpc.sent_bytes += piece
            self.send_headers(stream, _HEADER_BLOCK)
            piece = PREFIX.pack(0, piece)
        self.send_data(stream, b"", piece)

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        """Answer a unary request, or end a stream, with an error."""
        if type(failure) is AnswerTooLarge and failure.request and self.awaits(request_id):
            self._stream_range(request_id, failure.request)
            return
        stream = self._close(request_id)
        if stream is None:
            return
        code, version = failure.code, stream.request.api_version
        if failure.name == "NotSupportedForLearner" and version in ("3.4", "3.5"):
            code = UNAVAILABLE  # Only with this code do these clients go on to another endpoint.
        self._count_failed(stream, code)
        status = [(b"grpc-status", b"%d" % code)]
        if failure.text:
            status.append((b"grpc-message", percent_encode(failure.text)))
        if stream.headers_sent:
            self.finish(stream, pack(status))
            return
        fields = [(b":status", b"%d" % stream.request.http_status), _CONTENT_TYPE]
        if code == UNIMPLEMENTED:
            status.append(_ENCODINGS)
        self.finish(stream, pack(fields + status))

    def _count_failed(self, stream: GrpcStream, code: int) -> None:
        stream.request.rpc.fail(code, self.member.clock() - stream.began)

    def send_message(self, request_id: int, method: int, body: bytes) -> None:
        # The hot path of watches. Same as `send_data`, in one piece.
        stream = self.streams.get(request_id)
        if stream is None or stream is GHOST:
            return
        rpc = stream.request.rpc
        rpc.sent += 1
        length = len(body)
        rpc.sent_bytes += length
        size = length + PREFIX_BYTES
        flow = self.flow
        if (
            size > flow.window
            or size > flow.initial + stream.credit
            or size > flow.max_frame
            or stream.held
            or self.table_update
        ):
            if not stream.headers_sent:
                self.send_headers(stream, _HEADER_BLOCK)
            self.send_data(stream, PREFIX.pack(0, length), body)
            return
        flow.window -= size
        stream.credit -= size
        self.conduct.answers += 1
        outbox = self.outbox
        if not outbox.is_queued:
            outbox.wake()
        if stream.headers_sent:
            head = _MESSAGE.pack(size << 8, 0, request_id, 0, length)
        else:
            stream.headers_sent = True
            head = _ANSWER.pack(
                _ANSWER_START, request_id, _HEADER_BLOCK, size << 8, 0, request_id, 0, length
            )
        outbox.parts += (head, body)
        outbox.unsent_bytes += len(head) + length

    def end_call(self, request_id: int, method: int) -> None:
        stream = self._close(request_id)
        if stream is None:
            return
        stream.request.rpc.handling_s.observe(self.member.clock() - stream.began)
        if not stream.headers_sent:
            self.send_headers(stream, _HEADER_BLOCK)
        self.finish(stream, _OK_BLOCK)

    def _close(self, request_id: int) -> GrpcStream | None:
        """Close a stream and return it; None if it is not open."""
        stream = self.streams.pop(request_id, None)
        if stream is None or stream is GHOST:
            return None
        self._let_go(stream)
        return stream

    def _let_go(self, stream: GrpcStream) -> bool:
        """Release what belongs to a stream; True if the member is about to answer it."""
        is_asked = stream.is_ended and not (stream.is_unread or stream.tail)
        self._deadlines.pop(stream.id, None)
        self._need_leader.discard(stream.id)
        if stream.partial is not None:
            self._take_partial(stream, b"")
        if stream.message is not None:
            self._partial_bytes -= len(stream.message)
            stream.message = None
        return not self.calls.close(stream.id) and is_asked

    def canceled(self, stream: Stream) -> bool:
        assert isinstance(stream, GrpcStream)
        if not stream.tail:
            self._count_failed(stream, CANCELED)
        return self._let_go(stream)

    def is_stalled(self, request_id: int) -> bool:
        """The client does not read the output of this stream."""
        # The hot path of watches, like `send_message`.
        outbox = self.outbox
        if not outbox.held_bytes:
            return outbox.unsent_bytes > outbox.high_water_bytes
        if self.is_blocked:
            return True
        stream = self.streams.get(request_id)
        return stream is not None and stream.held_bytes > STALLED_BYTES

    def released(self, stream: Stream) -> None:
        self.calls.wake(stream.id)

    @property
    def kept_bytes(self) -> int:
        headers_bytes = HEADER_BYTES * (len(self._known) + len(self._recalled))
        if self._block is not None:
            headers_bytes += sum(map(len, self._block[2]))
        requests_bytes = self.calls.requests_bytes(self.streams) + self._partial_bytes
        return super().kept_bytes + headers_bytes + requests_bytes

    @property
    def owes_an_answer(self) -> bool:
        return len(self.streams) > len(self.calls)

    @property
    def is_idle(self) -> bool:
        """No unary request is unanswered and no output is unsent."""
        return (
            super().is_idle
            and not self._is_ending
            and all(map(self.calls.has_stream, self.streams))
        )

    def closed(self) -> None:
        """The connection is closed: drop its requests."""
        self._leaving, self.streams = self.streams, {}
        self._partial_bytes = 0
        self._unread.clear()
        self._are_due = False
        self.flow.clear()
        super().closed()
        self._leave()

    def _leave(self) -> None:
        """Count the next open streams of the closed connection as cancelled."""
        leaving = self._leaving
        for _ in range(min(CLOSED_PER_SLICE, len(leaving))):
            _, stream = leaving.popitem()
            if stream is not GHOST and not stream.tail:
                self._count_failed(stream, CANCELED)

    @property
    def has_more(self) -> bool:
        # Flat, because every request asks this twice.
        return bool(
            self._leaving
            or self._are_due
            or (self._unread and not self.is_full)
            or self._released
            or self._must_unblock
            or (self.calls.ready and self.calls.have_more)
            or (self.flow.ready and self.flow.has_more)
        )

    def produce(self) -> None:
        if self._leaving:
            self._leave()
        if self._are_due:
            self._fail_due(self.member.clock())
        if self._unread and not self.is_full:
            self._read_on()
        super().produce()

    def shut_down(self) -> None:
        """The server stops: refuse new requests, end the streams, answer the rest."""
        if not self.is_draining and self.is_open:
            self.go_away(http2.NO_ERROR)
        ending = [
            stream
            for stream in self.streams.values()
            if not stream.tail and (not stream.is_ended or self.calls.has_stream(stream.id))
        ]
        for stream in ending[:FAILED_PER_SLICE]:
            self.fail(stream.id, stream.request.number, error("Stopped"))
        self._is_ending = len(ending) > FAILED_PER_SLICE

    # Time.

    @property
    def may_rest(self) -> bool:
        is_due = self._deadlines or self._need_leader or self.conduct.is_probing
        return super().may_rest and not is_due

    def tick(self, now: float) -> None:
        super().tick(now)
        self._fail_due(now)
        if now >= self._next_check:
            self._fail_incomplete(now)

    def _fail_due(self, now: float) -> None:
        """Fail the next streams whose time is over, or that need a leader when there is none."""
        self._are_due = False
        if self._deadlines:
            self._expire(now)
        if self._need_leader and self._leader_loss.is_over(now):
            for stream_id in list(islice(self._need_leader, FAILED_PER_SLICE)):
                self.fail(stream_id, self.streams[stream_id].request.number, error("NoLeader"))
            self._are_due = self._are_due or bool(self._need_leader)

    def _expire(self, now: float) -> None:
        late = error("DeadlineExceeded")
        was_blocked = self.is_blocked
        due = [stream_id for stream_id, deadline in self._deadlines.items() if now >= deadline]
        self._are_due = len(due) > FAILED_PER_SLICE
        for stream_id in due[:FAILED_PER_SLICE]:
            stream = self.streams[stream_id]
            if stream.held:  # Behind a part of a message no status would be read.
                self.reset_stream(stream_id, CANCEL)
                continue
            is_asked = self._let_go(stream)
            self.fail(stream_id, stream.request.number, late)
            if is_asked:
                # Its answer is still to come, and must be dropped.
                self.streams[stream_id] = GHOST  # type: ignore[assignment]
        self.check_unblocked(was_blocked)

    def _fail_incomplete(self, now: float) -> None:
        """Fail requests that have been incomplete since the last check."""
        failure = EtcdError(DEADLINE_EXCEEDED, "etcdlite: the request did not arrive whole in time")
        incomplete = [
            stream
            for stream in self.streams.values()
            if not (stream.is_ended or stream.tail)
            and (stream.partial is not None or not stream.request.is_client_stream)
        ]
        late = [stream for stream in incomplete if stream.is_late]
        for stream in late[:FAILED_PER_SLICE]:
            self.fail(stream.id, stream.request.number, failure)
        if len(late) <= FAILED_PER_SLICE:  # Otherwise the next tick continues.
            for stream in incomplete:
                stream.is_late = True
            self._next_check = now + self._check_interval_s


def _refusal(failure: EtcdError | DecodeError) -> EtcdError:
    if isinstance(failure, EtcdError):
        return failure
    return EtcdError(INTERNAL, f"grpc: error unmarshalling request: {failure}")
