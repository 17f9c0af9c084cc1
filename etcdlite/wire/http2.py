"""The server's side of an HTTP/2 connection (RFC 9113), sans-IO. `grpc.py` builds on it.

A subclass implements requests with the hooks at the end of `Connection`, and answers with
`send_headers`, `send_data` and `finish`. A fault of the peer ends the stream (RST_STREAM) or the
connection (GOAWAY, then `is_closing`), as the RFC prescribes; `receive` raises nothing.

The states are in `http2_state.py`, the output held back by flow control in `http2_flow.py`, the
limits on what a peer may send besides requests in `http2_conduct.py`.

Most requests are a HEADERS frame with the same block as an earlier request, and one DATA frame. So
the decoded meaning of a header block is cached by its bytes, as long as the dynamic table of the
compression does not change. Then each of the two frames costs a lookup and a call.

Received data is consumed at once, or soon (`is_unread`), so the windows that we grant bound little
more than the data in flight. A window is renewed when half of it is used; a stream's only while its
request lasts.

The acknowledgement of a PING waits for the answer to a request, if one is open, for one tick at
most: grpc-go sends a PING with most requests of a client that has one at a time.

A stream stays in `streams` until its answer is sent. If the peer cancels a request that is being
worked on, `GHOST` takes its place until the answer arrives and is dropped. So the work that a peer
causes at a time is bounded by its number of streams.

Limits: each constant below names the error for exceeding it.
"""

from __future__ import annotations

import re
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.session import MAX_UNSENT_BYTES, Session
from etcdlite.wire import hpack, http2_flow
from etcdlite.wire.hpack import Headers
from etcdlite.wire.http2_conduct import NOISE_PER_RESET, Conduct
from etcdlite.wire.http2_flow import FRAME_HEADER
from etcdlite.wire.http2_state import (
    COMPRESSION_ERROR,
    CONNECTION_TABLE,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    NO_ERROR,
    PREFACE,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    STREAM_TABLE,
    ConnectionEvent,
    ConnectionFault,
    ConnectionState,
    Fault,
    Ignore,
    StreamEvent,
    StreamFault,
    StreamState,
)

MAX_FRAME_BYTES = 16_384
"""The largest frame that is accepted (FRAME_SIZE_ERROR); the RFC's default, so not announced."""

MAX_BLOCK_BYTES = 5 * hpack.MAX_LIST_BYTES // 2
BLOCK_BYTES_PER_NOISE = 256
"""The size of a compressed header block (ENHANCE_YOUR_CALM); the worst takes 70 ms. Exceeding
`MAX_LIST_BYTES` after decompression resets the stream (FRAME_SIZE_ERROR), and counts as noise by
the size of the block."""

MAX_CONTINUATIONS = 32
"""CONTINUATION frames of one header block (ENHANCE_YOUR_CALM)."""

MAX_KNOWN_BLOCKS = 1024
MAX_KNOWN_BYTES = 2048
"""Header blocks that are cached, and the most that the decoded fields of one may take: one byte of
a block can refer to kilobytes in the dynamic table."""

CONNECTION_WINDOW_BYTES = 16 << 20
STREAM_WINDOW_BYTES = 1 << 20
"""The windows that we grant (FLOW_CONTROL_ERROR)."""

MAX_STREAMS = 65_536
"""Streams open at once, unless configured lower (REFUSED_STREAM)."""

MAX_QUIET_STREAMS = 1024
"""Streams that we ended early, whose frames in flight are ignored."""

MAX_STREAM_ID = 2**31 - 1

# Looking up a member of an enum takes half a microsecond before Python 3.12, so the paths of frames
# use these names.
AT_PREFACE, FRAMES = ConnectionState.PREFACE, ConnectionState.FRAMES
ON_PREFACE, ON_SETTINGS, BLOCK_BEGINS, BLOCK_CONTINUES, BLOCK_ENDS, OTHER = ConnectionEvent
IDLE, SKIPPED, FRESH, OPEN, HALF_CLOSED, ANSWERED, ABANDONED, QUIET, CLOSED = StreamState
ON_HEADERS, ON_DATA, ON_END, ON_RESET, ON_WINDOW_UPDATE, ANSWER_WAITS, ANSWER_ENDS = StreamEvent

# Frame types.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE = range(9)
CONTINUATION = 9

# Flags.
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
HAS_PRIORITY = 0x20

# Settings.
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = range(1, 5)
MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = 5, 6

FRAME_HEADER_BYTES = FRAME_HEADER.size

_RECEIVED = struct.Struct(">BHHi")
"""The header of a frame, read at once: length (high byte, low 16 bits), type and flags as one
number, stream id. With the reserved bit set, the id is negative, and matches no stream."""

# Type and flags of the frames of most requests.
_LAST_DATA = DATA << 8 | END_STREAM
_WHOLE_HEADERS = HEADERS << 8 | END_HEADERS
_UPDATE = WINDOW_UPDATE << 8

_PING_HEADER = FRAME_HEADER.pack(8 << 8 | PING, 0, 0)
_PONG_HEADER = FRAME_HEADER.pack(8 << 8 | PING, ACK, 0)
_PING_BYTES = FRAME_HEADER_BYTES + 8

_SETTING = struct.Struct(">HI")
_INT = struct.Struct(">I")
_PAIR = struct.Struct(">II")

# Of a request (RFC 9113, 8.2.2, 8.3.1).
_PSEUDO_HEADERS = (b":method", b":scheme", b":path", b":authority")
_CONNECTION_HEADERS = {
    b"connection",
    b"keep-alive",
    b"proxy-connection",
    b"transfer-encoding",
    b"upgrade",
}
_COMMON_NAMES = {b"content-type", b"user-agent", b"grpc-timeout", b"grpc-accept-encoding"}
"""Headers that need no further check; most requests have no others."""
_NAME = re.compile(rb"[!-9;-@[-~]+")
"""Of a field that is no pseudo-header: visible ASCII but ":" and upper case (8.2.1)."""
_VALUE = re.compile(rb"(?![ \t])[^\0\r\n]*(?<![ \t])")


class Stream:
    """A request and its answer. Defaults are the class's: most streams never differ from them."""

    state = FRESH
    credit = 0
    """Our send window without the peer's SETTINGS_INITIAL_WINDOW_SIZE, which may change."""
    window = STREAM_WINDOW_BYTES
    """What the peer may still send."""
    headers_sent = False
    is_unread = False
    """Some of its input waits to be processed: its window is not renewed."""
    held: deque[memoryview | bytearray] | None = None
    held_bytes = 0
    tail = b""
    """The header block that ends it, while it waits behind `held`."""

    def __init__(self, stream_id: int, request: Any, content_length: int | None = None) -> None:
        self.id = stream_id
        self.request = request
        """What `read_request` made of the header block."""
        self.content_length = content_length
        """The bytes of the body that are still to come, if a content-length announced them."""

    @property
    def is_ended(self) -> bool:
        """The peer has sent all of it."""
        return self.state in (HALF_CLOSED, ABANDONED)


GHOST = Stream(0, None)
"""Takes the place of a cancelled stream until its answer arrives and is dropped."""
GHOST.state = ABANDONED


NO_TRAILERS = b"no trailers"
"""In the place of a header block: the answer ends with its data."""


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return FRAME_HEADER.pack(len(payload) << 8 | kind, flags, stream_id) + payload


def is_well_formed(headers: Headers) -> bool:
    """Whether this is the header of a request that the RFC (8.1 to 8.3) allows."""
    pseudo: dict[bytes, bytes] = {}
    is_past_pseudo = False
    for field in headers:
        name, value = field
        if name[:1] == b":":
            if is_past_pseudo or name not in _PSEUDO_HEADERS or name in pseudo:
                return False
            if not _VALUE.fullmatch(value):
                return False
            pseudo[name] = value
            continue
        is_past_pseudo = True
        if not _is_well_formed_field(field):
            return False
    return all(pseudo.get(name) for name in (b":method", b":scheme", b":path"))


def _is_well_formed_field(field: hpack.Field) -> bool:
    name, value = field
    if not _VALUE.fullmatch(value):
        return False
    if name in _COMMON_NAMES:
        return True
    if name in _CONNECTION_HEADERS or not _NAME.fullmatch(name):
        return False
    return name != b"te" or value == b"trailers"


class Connection(Session):
    """One connection. It is open once the preface and the first SETTINGS arrived."""

    # CPython gives an object with more than 29 attributes a dict of its own, which is slower. A
    # session of gRPC has 40, so all are in slots.
    __slots__ = (
        "_block", "_clock", "_farewell_id", "_gap", "_known", "_last_id", "_max_streams",
        "_must_unblock", "_quiet", "_receive_window", "_released", "_state", "_unpacker", "conduct",
        "flow", "is_draining", "streams", "table_update",
    )  # fmt: skip

    stream_class: type[Stream] = Stream

    def __init__(
        self,
        on_output: Callable[[Any], None],
        clock: Callable[[], float],
        limits: Limits = DEFAULT_LIMITS,
        *,
        max_streams: int = MAX_STREAMS,
        ping_min_s: float = 5.0,
        keepalive_interval_s: float = 7200.0,
        keepalive_timeout_s: float = 20.0,
    ) -> None:
        """`max_streams`: open at once. `ping_min_s`: the shortest time between pings of the peer.
        After `keepalive_interval_s` of silence the peer is pinged; if it stays silent for
        `keepalive_timeout_s`, the connection is closed."""
        super().__init__(on_output, clock, limits)
        self.is_draining = False
        """GOAWAY was sent: open streams are finished, new ones are refused."""
        self.streams: dict[int, Stream] = {}
        self._clock = clock
        self._max_streams = min(max_streams, MAX_STREAMS)
        self.conduct = Conduct(clock(), ping_min_s, keepalive_interval_s, keepalive_timeout_s)
        self.flow = http2_flow.Flow(self.outbox, MAX_FRAME_BYTES)
        # Input.
        self._state = AT_PREFACE
        self._unpacker = hpack.Unpacker()
        self._known: dict[bytes, Any] = {}  # Request and content-length by header block.
        self.table_update = b""
        """The prefix of the next header block that is sent: after the peer has asked for a smaller
        dynamic table (RFC 7541, 4.2), an update that sets the table's size to 0; else empty."""
        self._block: tuple[int, int, list[bytes], bool] | None = None
        """An incomplete header block: stream id, flags, pieces, whether it depends on itself."""
        self._last_id = 0
        self._farewell_id = MAX_STREAM_ID
        """The last stream accepted, according to the first GOAWAY."""
        self._gap = (0, 0)
        """The last range of stream ids that the peer skipped."""
        self._quiet: dict[int, None] = {}
        self._receive_window = CONNECTION_WINDOW_BYTES
        # Hooks that the next turn calls: `released` of these streams, and `unblocked`, unless the
        # connection is blocked again.
        self._released: list[Stream] = []
        self._must_unblock = False

    # Input.

    def receive(self, data: bytes) -> None:
        """Process bytes from the peer."""
        if self.is_closing:
            return
        self.conduct.was_heard = True
        self.flow.frames_left = http2_flow.FRAMES_PER_SLICE
        if self.inbox.waiting_bytes:
            data = self.inbox.join(data)
            if not data:
                return
        try:
            at = 0
            if self._state is AT_PREFACE:
                if not PREFACE.startswith(data[: len(PREFACE)]):
                    self._step(OTHER)
                if len(data) < len(PREFACE):
                    self.inbox.keep(data, len(PREFACE))
                    return
                at = len(PREFACE)
                self._begin()
            self._read_frames(data, at)
        except ConnectionFault as fault:
            self.break_off(fault)
        if self._receive_window < CONNECTION_WINDOW_BYTES // 2 and not self.is_closing:
            grant = CONNECTION_WINDOW_BYTES - self._receive_window
            self._receive_window = CONNECTION_WINDOW_BYTES
            self.outbox.append(frame(WINDOW_UPDATE, 0, 0, _INT.pack(grant)))
        if self.outbox.parts and not self.owes_an_answer:
            self.outbox.flush_late()

    @property
    def owes_an_answer(self) -> bool:
        """An answer is about to be sent."""
        return bool(self.streams)

    def _begin(self) -> None:
        self._step(ON_PREFACE)
        settings = (
            _SETTING.pack(MAX_CONCURRENT_STREAMS, self._max_streams),
            _SETTING.pack(INITIAL_WINDOW_SIZE, STREAM_WINDOW_BYTES),
            _SETTING.pack(MAX_HEADER_LIST_SIZE, hpack.MAX_LIST_BYTES),
        )
        grant = CONNECTION_WINDOW_BYTES - http2_flow.DEFAULT_WINDOW_BYTES
        self.outbox.append(frame(SETTINGS, 0, 0, b"".join(settings)))
        self.outbox.append(frame(WINDOW_UPDATE, 0, 0, _INT.pack(grant)))

    def _read_frames(self, data: bytes, at: int) -> None:
        # The hot path of every request: a known HEADERS frame and its only DATA frame. Between them
        # comes what grpc-go sends after an answer: WINDOW_UPDATE of the connection, then PING.
        end = len(data)
        unpack_from = _RECEIVED.unpack_from
        known, streams, max_streams = self._known, self.streams, self._max_streams
        in_frames = self._state is FRAMES
        while end - at >= FRAME_HEADER_BYTES:
            high, size, kind, stream_id = unpack_from(data, at)
            start = at + FRAME_HEADER_BYTES
            stop = start + size
            if high or size > MAX_FRAME_BYTES:
                raise ConnectionFault(FRAME_SIZE_ERROR, f"a frame has {high << 16 | size} bytes")
            if stop > end:
                self.inbox.keep(data[at:], stop - at)
                return
            at = stop
            if kind == _LAST_DATA and in_frames:
                stream = streams.get(stream_id)
                if (
                    stream is not None
                    and stream.state is FRESH
                    and size <= self._receive_window
                    and stream.content_length in (None, size)
                ):
                    self._receive_window -= size
                    stream.state = HALF_CLOSED
                    self.completed(stream, data, start, stop)
                    continue
            elif kind == _WHOLE_HEADERS and stream_id == self._last_id + 2 and in_frames:
                hit = known.get(data[start:stop])
                if hit is not None and len(streams) < max_streams and not self.is_draining:
                    # `_advance` and `_open`, inlined. Where a block is known, `_last_id` is odd.
                    self._last_id = stream_id
                    stream = streams[stream_id] = self.stream_class(stream_id, *hit)
                    self.opened(stream)
                    continue
            elif kind == _UPDATE and size == 4 and not stream_id and in_frames:
                self._widen(_INT.unpack_from(data, start)[0] & http2_flow.MAX_WINDOW)
                if data.startswith(_PING_HEADER, at) and end - at >= _PING_BYTES:
                    start, at = at + FRAME_HEADER_BYTES, at + _PING_BYTES
                    self._pinged(data[start:at])
                continue
            try:
                stream_id &= MAX_STREAM_ID
                if kind < 1 << 8 and in_frames:  # DATA, with these flags.
                    self._read_data(kind, stream_id, data, start, stop)
                elif kind >> 8 == RST_STREAM and in_frames:
                    self._read_rst_stream(stream_id, size)
                else:
                    self._read_frame(kind >> 8, kind & 0xFF, stream_id, data, start, stop)
            except StreamFault as fault:
                self.reset_stream(fault.stream_id, fault.code)
                # A provoked reset counts like one sent by the peer (CVE-2025-8671).
                self.conduct.count_noise(NOISE_PER_RESET)
            if self.is_closing:
                return
            in_frames = self._state is FRAMES
        if at < end:
            self.inbox.keep(data[at:], FRAME_HEADER_BYTES)

    def _read_frame(
        self, kind: int, flags: int, stream_id: int, data: bytes, at: int, stop: int
    ) -> None:
        """Process a frame. DATA and RST_STREAM come here only in a state that does not allow them.
        Raises ConnectionFault, StreamFault."""
        event = OTHER
        if kind == CONTINUATION:
            if self._block is None or stream_id == self._block[0]:
                event = BLOCK_ENDS if flags & END_HEADERS else BLOCK_CONTINUES
        elif kind == HEADERS and not flags & END_HEADERS:
            event = BLOCK_BEGINS
        elif kind == SETTINGS and not flags & ACK:
            event = ON_SETTINGS
        if event is not OTHER or self._state is not FRAMES:
            self._step(event)
        self.is_open = True
        if kind == HEADERS:
            self._read_headers(flags, stream_id, data, at, stop)
        elif kind == CONTINUATION:
            self._read_continuation(flags, stream_id, data[at:stop])
        else:
            if kind not in (WINDOW_UPDATE, PING):  # Their readers count.
                self.conduct.count_noise(1)
            reader = _READERS.get(kind)
            if reader is not None:  # Frames of unknown types are ignored.
                reader(self, flags, stream_id, data[at:stop])

    def _step(self, event: ConnectionEvent) -> None:
        """Change the state of the connection. Raises ConnectionFault."""
        entry = CONNECTION_TABLE[self._state][event]
        if isinstance(entry, Fault):
            raise ConnectionFault(entry.code, entry.text)
        self._state = entry

    def state_of(self, stream_id: int) -> StreamState:
        stream = self.streams.get(stream_id)
        if stream is not None and stream is not GHOST:
            return stream.state
        if stream_id in self._quiet:
            return QUIET
        if stream is GHOST:
            return ABANDONED
        if not stream_id & 1 or stream_id > self._last_id:
            return IDLE
        low, high = self._gap
        return SKIPPED if low <= stream_id <= high else CLOSED

    def _next_state(self, stream_id: int, event: StreamEvent) -> StreamState | None:
        """None if the event is ignored. Raises ConnectionFault, StreamFault."""
        entry = STREAM_TABLE[self.state_of(stream_id)][event]
        if isinstance(entry, Fault):
            if entry.costs_connection:
                raise ConnectionFault(entry.code, f"{entry.text} ({stream_id})")
            raise StreamFault(stream_id, entry.code)
        return None if isinstance(entry, Ignore) else entry

    def _step_stream(self, stream_id: int, event: StreamEvent) -> Stream | None:
        """Change the state of a stream and return it. An event that is ignored returns None and
        counts as noise. Raises ConnectionFault, StreamFault."""
        state = self._next_state(stream_id, event)
        if state is None:
            self.conduct.count_noise(1)
            return None
        stream = self.streams[stream_id]
        stream.state = state
        return stream

    def _read_data(self, flags: int, stream_id: int, data: bytes, at: int, stop: int) -> None:
        size = stop - at
        if size > self._receive_window:
            raise ConnectionFault(FLOW_CONTROL_ERROR, "more than the connection's window")
        self._receive_window -= size
        if flags & PADDED:
            at, stop = _unpad(data, at, stop)
        stream = self.streams.get(stream_id)
        # Where the state is FRESH or OPEN, what follows has the entries of `STREAM_TABLE`.
        if stream is None or (stream.state is not FRESH and stream.state is not OPEN):
            stream = self._step_stream(stream_id, ON_DATA)
            if stream is None:
                return
        window = stream.window = stream.window - size
        if window < 0:
            raise StreamFault(stream_id, FLOW_CONTROL_ERROR)
        if stream.content_length is not None:
            stream.content_length -= stop - at
            if stream.content_length < 0 or (flags & END_STREAM and stream.content_length):
                raise StreamFault(stream_id, PROTOCOL_ERROR)
        if flags & END_STREAM:
            stream.state = HALF_CLOSED
            if at < stop:
                self.completed(stream, data, at, stop)
            else:
                self.ended(stream)
            return
        stream.state = OPEN
        if at < stop:
            self.received(stream, data[at:stop])
        else:
            self.conduct.count_noise(1)
        if window < STREAM_WINDOW_BYTES // 2 and self.streams.get(stream_id) is stream:
            self.renew_window(stream)

    def renew_window(self, stream: Stream) -> None:
        """Let the peer send more of a stream, if half of the window is used and no input waits."""
        grant = STREAM_WINDOW_BYTES - stream.window
        if grant > STREAM_WINDOW_BYTES // 2 and not stream.is_unread:
            stream.window = STREAM_WINDOW_BYTES
            self.outbox.append(frame(WINDOW_UPDATE, 0, stream.id, _INT.pack(grant)))

    def _read_headers(self, flags: int, stream_id: int, data: bytes, at: int, stop: int) -> None:
        if not stream_id & 1:
            raise ConnectionFault(PROTOCOL_ERROR, f"stream {stream_id} is not a client's")
        if flags & PADDED:
            at, stop = _unpad(data, at, stop)
        depends_on_itself = False
        if flags & HAS_PRIORITY:
            if stop - at < 5:
                raise ConnectionFault(FRAME_SIZE_ERROR, "a HEADERS frame is too short")
            depends_on_itself = _INT.unpack_from(data, at)[0] & MAX_STREAM_ID == stream_id
            at += 5
        if flags & END_HEADERS:
            self._read_block(stream_id, flags, data[at:stop], depends_on_itself)
        else:
            self._block = (stream_id, flags, [data[at:stop]], depends_on_itself)

    def _read_continuation(self, flags: int, stream_id: int, piece: bytes) -> None:
        assert self._block is not None
        _, first_flags, pieces, depends_on_itself = self._block
        pieces.append(piece)
        if len(pieces) > MAX_CONTINUATIONS or sum(map(len, pieces)) > MAX_BLOCK_BYTES:
            raise ConnectionFault(ENHANCE_YOUR_CALM, "a header block is too long")
        if flags & END_HEADERS:
            self._block = None
            self._read_block(stream_id, first_flags, b"".join(pieces), depends_on_itself)

    def _read_block(
        self, stream_id: int, flags: int, block: bytes, depends_on_itself: bool
    ) -> None:
        """Process a complete header block. Even a refused one must update the dynamic table."""
        request, content_length = self._known.get(block, (None, None))
        headers = None
        is_changed = False
        if request is None:
            try:
                headers, is_changed = self._unpack(block)
            except hpack.HeadersTooLarge:
                self._advance(max(stream_id, self._last_id))
                self.conduct.count_noise(len(block) // BLOCK_BYTES_PER_NOISE)
                # As in grpc-go.
                raise StreamFault(stream_id, FRAME_SIZE_ERROR) from None
        if stream_id <= self._last_id:
            self._read_trailers(stream_id, flags, headers)
            return
        self._advance(stream_id)
        if self.is_draining:
            self.conduct.count_noise(1)
            self._be_quiet_about(stream_id)
            return
        if len(self.streams) >= self._max_streams:
            raise StreamFault(stream_id, REFUSED_STREAM)
        if depends_on_itself:
            raise StreamFault(stream_id, PROTOCOL_ERROR)
        if headers is not None and (request := self.recall(headers)) is None:
            if not is_well_formed(headers):
                raise StreamFault(stream_id, PROTOCOL_ERROR)
            request = self.read_request(headers)
            lengths = {value for name, value in headers if name == b"content-length"}
            for value in lengths:
                if len(lengths) > 1 or not value.isdigit() or len(value) > 19:
                    raise StreamFault(stream_id, PROTOCOL_ERROR)
                content_length = int(value)
            if not is_changed and hpack.list_bytes(headers) <= MAX_KNOWN_BYTES:
                if len(self._known) >= MAX_KNOWN_BLOCKS:
                    self._known.clear()
                self._known[block] = (request, content_length)
        self._open(stream_id, request, content_length, bool(flags & END_STREAM))

    def _advance(self, stream_id: int) -> None:
        """Note that the peer used this stream id, which closes all earlier idle ones."""
        if stream_id > self._last_id + 2:
            self._gap = (self._last_id + 2, stream_id - 2)
        self._last_id = stream_id

    def _open(
        self, stream_id: int, request: Any, content_length: int | None, is_ended: bool
    ) -> None:
        """Begin a request."""
        if is_ended and content_length:
            raise StreamFault(stream_id, PROTOCOL_ERROR)
        stream = self.streams[stream_id] = self.stream_class(stream_id, request, content_length)
        if is_ended:
            stream.state = HALF_CLOSED
        self.opened(stream)
        if is_ended and self.streams.get(stream_id) is stream:
            self.ended(stream)

    def _unpack(self, block: bytes) -> tuple[Headers, bool]:
        """Fields, and whether they changed the table. Raises HeadersTooLarge, ConnectionFault."""
        try:
            headers, is_changed = self._unpacker.unpack(block)
        except hpack.HeadersTooLarge:
            self._known.clear()
            raise
        except hpack.HeaderFault as fault:
            is_flood = isinstance(fault, hpack.TooManyFields)
            code = ENHANCE_YOUR_CALM if is_flood else COMPRESSION_ERROR
            raise ConnectionFault(code, str(fault)) from None
        if is_changed:
            self._known.clear()
        return headers, is_changed

    def _read_trailers(self, stream_id: int, flags: int, headers: Headers | None) -> None:
        stream = self._step_stream(stream_id, ON_HEADERS)
        if stream is None:
            return
        # A cached block is that of a request, with pseudo-headers, so it cannot be trailers.
        is_whole = flags & END_STREAM and not stream.content_length
        if not is_whole or headers is None or not all(map(_is_well_formed_field, headers)):
            raise StreamFault(stream_id, PROTOCOL_ERROR)
        self._step_stream(stream_id, ON_END)
        self.ended(stream)

    def _read_rst_stream(self, stream_id: int, size: int) -> None:
        if size != 4:
            raise ConnectionFault(FRAME_SIZE_ERROR, "RST_STREAM does not have 4 bytes")
        stream = self.streams.get(stream_id)
        # Flat: of the states in `STREAM_TABLE`, only IDLE has a fault for it.
        if stream is not None and stream is not GHOST:
            self.conduct.count_noise(2 if stream.headers_sent else 1 + NOISE_PER_RESET)
            self._forget(stream)
        else:
            if stream_id > self._last_id or not stream_id & 1:
                self._next_state(stream_id, ON_RESET)
            self.conduct.count_noise(1)

    def _pinged(self, payload: bytes) -> None:
        """Acknowledge a PING. Raises ConnectionFault."""
        self.outbox.append_late(_PONG_HEADER + payload)
        self.conduct.count_ping(self._clock(), bool(self.streams))

    def _read_window_update(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(FRAME_SIZE_ERROR, "WINDOW_UPDATE does not have 4 bytes")
        grant = _INT.unpack(payload)[0] & http2_flow.MAX_WINDOW
        if not stream_id:
            self._widen(grant)
            return
        self.conduct.count_window_update()
        if self._next_state(stream_id, ON_WINDOW_UPDATE) is None:
            return
        stream = self.streams[stream_id]
        if not grant:
            raise StreamFault(stream_id, PROTOCOL_ERROR)
        if not self.flow.grant(stream, grant):
            raise StreamFault(stream_id, FLOW_CONTROL_ERROR)
        if stream.held:
            self._send_held()

    def _widen(self, grant: int) -> None:
        """Enlarge the connection's send window. Raises ConnectionFault."""
        self.conduct.count_window_update()
        if not grant:
            raise ConnectionFault(PROTOCOL_ERROR, "WINDOW_UPDATE by 0")
        flow = self.flow
        flow.window += grant
        if flow.window > http2_flow.MAX_WINDOW:
            raise ConnectionFault(FLOW_CONTROL_ERROR, "the connection's window is too large")
        if flow.ready:
            self._send_held()

    # Output.

    def send_headers(self, stream: Stream, block: bytes) -> None:
        stream.headers_sent = True
        block, self.table_update = self.table_update + block, b""
        self.outbox.append(frame(HEADERS, END_HEADERS, stream.id, block))

    def send_data(self, stream: Stream, head: bytes, body: bytes) -> None:
        """Send a piece of the answer: `head` and `body`."""
        size = len(head) + len(body)
        self.conduct.answers += 1
        flow = self.flow
        if flow.has_room(stream, size):
            flow.spend(stream, size)
            self.outbox.append(FRAME_HEADER.pack(size << 8, 0, stream.id) + head)
            self.outbox.append(body)
            return
        flow.hold(stream, head, body)
        if flow.has_more:
            # The caller is in the middle of something, so the hooks are called in the next turn.
            self._send_held(calls_hooks=False)
            if not flow.frames_left:
                self.outbox.wake()
        if self.outbox.waiting_bytes - size > MAX_UNSENT_BYTES:
            self.abort("it asks for more without reading its answers")

    def finish(self, stream: Stream, block: bytes) -> None:
        """End the answer with this header block or `NO_TRAILERS`, after everything that is held."""
        self.conduct.answers += 1
        if stream.held:
            stream.tail = block
            self.streams[stream.id] = stream
            self._step_stream(stream.id, ANSWER_WAITS)
        else:
            self._finish(stream, block)

    def _finish(self, stream: Stream, block: bytes) -> None:
        if block is NO_TRAILERS:
            tail = frame(DATA, END_STREAM, stream.id)
        else:
            block, self.table_update = self.table_update + block, b""
            tail = frame(HEADERS, END_HEADERS | END_STREAM, stream.id, block)
        if stream.state is not HALF_CLOSED:
            # The rest of the request is not needed (RFC 9113, 8.1).
            tail += frame(RST_STREAM, 0, stream.id, _INT.pack(NO_ERROR))
            self._be_quiet_about(stream.id)
        self.outbox.append(tail)

    @property
    def has_more(self) -> bool:
        return bool(self.flow.has_more or self._released or self._must_unblock) or super().has_more

    def produce(self) -> None:
        self.flow.frames_left = http2_flow.FRAMES_PER_SLICE
        self._send_held()
        super().produce()

    def _send_held(self, calls_hooks: bool = True) -> None:
        """Send held output that the windows allow, for one slice. Without `calls_hooks`, the hooks
        are called in the next turn."""
        was_blocked = self.is_blocked or self._must_unblock
        emptied, answers = self.flow.flush()
        self.conduct.answers += answers
        for stream in emptied:
            if stream.tail:
                del self.streams[stream.id]
                self._finish(stream, stream.tail)
            else:
                self._released.append(stream)
        self._must_unblock = was_blocked and not calls_hooks
        if calls_hooks:  # Last, because the hooks may send more.
            released, self._released = self._released, []
            for stream in released:
                self.released(stream)
            self.check_unblocked(was_blocked)

    def reset_stream(self, stream_id: int, code: int) -> None:
        """Reset a stream with an HTTP/2 error code."""
        self.outbox.append(frame(RST_STREAM, 0, stream_id, _INT.pack(code)))
        stream = self.streams.get(stream_id)
        if stream is not None and stream is not GHOST:
            self._forget(stream)
        if stream_id & 1 and stream_id <= self._last_id:
            self._be_quiet_about(stream_id)

    def _forget(self, stream: Stream) -> None:
        """Drop a stream whose answer is not sent."""
        was_blocked = self.is_blocked
        self.flow.drop(stream)
        if self.canceled(stream):
            self.streams[stream.id] = GHOST
        else:
            self.streams.pop(stream.id, None)
        self.check_unblocked(was_blocked)

    def _be_quiet_about(self, stream_id: int) -> None:
        quiet = self._quiet
        quiet[stream_id] = None
        if len(quiet) > MAX_QUIET_STREAMS:
            del quiet[next(iter(quiet))]

    def break_off(self, fault: ConnectionFault) -> None:
        """Process no more input, and close the connection when the peer has been told why."""
        self.outbox.flush_late()
        self.go_away(fault.code, fault.text)
        self.is_closing = True

    def go_away(self, code: int, text: str = "") -> None:
        """Send GOAWAY: new streams are refused from now on."""
        self.is_draining = True
        # Streams opened after an earlier GOAWAY were refused.
        self._farewell_id = min(self._farewell_id, self._last_id)
        self.outbox.append(frame(GOAWAY, 0, 0, _PAIR.pack(self._farewell_id, code) + text.encode()))

    # Time.

    def tick(self, now: float) -> None:
        super().tick(now)
        conduct = self.conduct
        if conduct.tick(now):
            if conduct.is_gone(now):
                self.abort("it does not answer pings")
            elif self.is_open and not conduct.is_probing:
                conduct.probed(now)
                self.outbox.append(frame(PING, 0, 0, bytes(8)))

    # Hooks.

    def read_request(self, headers: Headers) -> Any:
        """Decode the header of a request. Streams with the same header share the result."""
        raise NotImplementedError

    def recall(self, headers: Headers) -> Any:
        """What `read_request` returns, if it has read a header like this one before; else None. The
        result belongs to this stream only and has no content-length."""
        return None

    def opened(self, stream: Stream) -> None:
        """A request begins."""
        raise NotImplementedError

    def received(self, stream: Stream, piece: bytes) -> None:
        """A piece of a request's body arrived; it is not the last one."""
        raise NotImplementedError

    def completed(self, stream: Stream, data: bytes, at: int, end: int) -> None:
        """A request is complete; the last piece of its body is `data[at:end]`."""
        raise NotImplementedError

    def ended(self, stream: Stream) -> None:
        """A request is complete, and what ended it has no piece of its body."""
        raise NotImplementedError

    def canceled(self, stream: Stream) -> bool:
        """A stream was reset before its answer; True if an answer is still to come."""
        raise NotImplementedError

    def released(self, stream: Stream) -> None:
        """All held output of a stream is sent."""
        raise NotImplementedError


def _unpad(data: bytes, at: int, stop: int) -> tuple[int, int]:
    """The range of a padded frame's content. Raises ConnectionFault."""
    if at == stop or at + 1 + data[at] > stop:
        raise ConnectionFault(PROTOCOL_ERROR, "a frame has more padding than content")
    return at + 1, stop - data[at]


def _read_priority(connection: Connection, flags: int, stream_id: int, payload: bytes) -> None:
    if not stream_id:
        raise ConnectionFault(PROTOCOL_ERROR, "PRIORITY without a stream")
    if len(payload) != 5:
        raise StreamFault(stream_id, FRAME_SIZE_ERROR)
    if _INT.unpack_from(payload)[0] & MAX_STREAM_ID == stream_id:
        raise StreamFault(stream_id, PROTOCOL_ERROR)


def _read_settings(connection: Connection, flags: int, stream_id: int, payload: bytes) -> None:
    if stream_id:
        raise ConnectionFault(PROTOCOL_ERROR, "SETTINGS on a stream")
    if len(payload) % 6 or (flags & ACK and payload):
        raise ConnectionFault(FRAME_SIZE_ERROR, "SETTINGS has a wrong size")
    if flags & ACK:
        return
    window = connection.flow.initial
    for setting, value in _SETTING.iter_unpack(payload):
        if setting == ENABLE_PUSH and value > 1:
            raise ConnectionFault(PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")
        if setting == INITIAL_WINDOW_SIZE:
            if value > http2_flow.MAX_WINDOW:
                raise ConnectionFault(FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE is too large")
            window = value
        elif setting == MAX_FRAME_SIZE:
            if not 16_384 <= value < 1 << 24:
                raise ConnectionFault(PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of range")
            connection.flow.max_frame = min(value, http2_flow.MAX_SENT_FRAME_BYTES)
        elif setting == HEADER_TABLE_SIZE and value < hpack.TABLE_BYTES:
            connection.table_update = b"\x20"
    if window != connection.flow.initial:
        # Each of these streams may become ready for a frame.
        connection.conduct.count_noise(connection.flow.shut_streams >> 3)
        if not connection.flow.set_initial(window, connection.streams):
            raise ConnectionFault(FLOW_CONTROL_ERROR, "a window is too large")
    connection.outbox.append(frame(SETTINGS, ACK, 0))
    connection._send_held()


def _read_ping(connection: Connection, flags: int, stream_id: int, payload: bytes) -> None:
    if stream_id:
        raise ConnectionFault(PROTOCOL_ERROR, "PING on a stream")
    if len(payload) != 8:
        raise ConnectionFault(FRAME_SIZE_ERROR, "PING does not have 8 bytes")
    if flags & ACK:
        connection.conduct.count_noise(1)
        return
    connection._pinged(payload)


def _read_goaway(connection: Connection, flags: int, stream_id: int, payload: bytes) -> None:
    if stream_id or len(payload) < 8:
        code = PROTOCOL_ERROR if stream_id else FRAME_SIZE_ERROR
        raise ConnectionFault(code, "GOAWAY on a stream, or too short")


def _read_push_promise(connection: Connection, flags: int, stream_id: int, payload: bytes) -> None:
    raise ConnectionFault(PROTOCOL_ERROR, "a client cannot push")


_READERS: dict[int, Callable[[Connection, int, int, bytes], None]] = {
    PRIORITY: _read_priority,
    SETTINGS: _read_settings,
    PUSH_PROMISE: _read_push_promise,
    PING: _read_ping,
    GOAWAY: _read_goaway,
    WINDOW_UPDATE: Connection._read_window_update,
}
