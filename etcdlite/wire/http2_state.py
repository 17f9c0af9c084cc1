"""The states of an HTTP/2 connection and of its streams, as a server sees them (RFC 9113, 3.4, 4.3
and 5.1), and the tables of transitions.

The states of a stream are the RFC's, with these distinctions:

- FRESH is an open stream with nothing but its header. The hot path of unary requests (HEADERS, then
  one DATA frame) checks only for this state.
- Frames that the peer sent before it learned that we ended a stream are ignored. So a stream that
  we ended first is ANSWERED while its answer waits for windows, and then QUIET. The oldest QUIET
  streams are forgotten, and then CLOSED.
- A request that the peer cancelled while it was worked on is ABANDONED until its answer arrives. It
  counts as open until then, which bounds the work that a peer causes at a time.

      IDLE --HEADERS--> FRESH --HEADERS, DATA--> OPEN --END_STREAM--> HALF_CLOSED
                          |                        |                       |
                          +----our answer ends-----+                       |
                                      v                             our answer ends
                          ANSWERED --> QUIET --> CLOSED <------------------+

A stream id that the peer skipped when it opened a later stream is SKIPPED (5.1.1).

A stream that we reset becomes QUIET, from any state.

`STREAM_TABLE` and `CONNECTION_TABLE` have an entry for every state and event: the next state,
`IGNORE`, or a `Fault`.
"""

from __future__ import annotations

from enum import Enum, IntEnum, auto
from typing import NamedTuple

# Error codes (RFC 9113, 7).
NO_ERROR = 0x0
PROTOCOL_ERROR = 0x1
FLOW_CONTROL_ERROR = 0x3
STREAM_CLOSED = 0x5
FRAME_SIZE_ERROR = 0x6
REFUSED_STREAM = 0x7
CANCEL = 0x8
COMPRESSION_ERROR = 0x9
ENHANCE_YOUR_CALM = 0xB


class StreamState(IntEnum):
    IDLE = auto()
    SKIPPED = auto()
    FRESH = auto()
    OPEN = auto()
    HALF_CLOSED = auto()
    """The request is complete: the RFC's half-closed (remote)."""
    ANSWERED = auto()
    ABANDONED = auto()
    QUIET = auto()
    CLOSED = auto()


class StreamEvent(IntEnum):
    HEADERS = auto()
    """A header block: of a request if the stream is idle, otherwise trailers."""
    DATA = auto()
    END_STREAM = auto()
    """The flag on HEADERS or DATA; applied after the frame."""
    RST_STREAM = auto()
    WINDOW_UPDATE = auto()
    ANSWER_WAITS = auto()
    """Our answer is complete, but some of it waits for windows."""
    ANSWER_ENDS = auto()
    """All of our answer is sent."""


class ConnectionState(IntEnum):
    PREFACE = auto()
    """Before the client's preface."""
    SETTINGS = auto()
    """Before the first frame."""
    FRAMES = auto()
    BLOCK = auto()
    """In a header block: only its CONTINUATION frames are allowed."""


class ConnectionEvent(IntEnum):
    PREFACE = auto()
    SETTINGS = auto()
    """Not an acknowledgement."""
    BLOCK_BEGINS = auto()
    """HEADERS without END_HEADERS."""
    BLOCK_CONTINUES = auto()
    BLOCK_ENDS = auto()
    """CONTINUATION with END_HEADERS."""
    OTHER = auto()


class ConnectionFault(Exception):
    """The peer broke the protocol; the connection ends with this error code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text


class StreamFault(Exception):
    """The peer broke the protocol on one stream, which ends with this error code."""

    def __init__(self, stream_id: int, code: int) -> None:
        super().__init__(stream_id, code)
        self.stream_id = stream_id
        self.code = code


class Fault(NamedTuple):
    """An error of the peer, which ends the stream or the connection."""

    code: int
    text: str = ""
    costs_connection: bool = False


class Ignore(Enum):
    """The input has no effect, for example because it was in flight."""

    IGNORE = auto()


IGNORE = Ignore.IGNORE

StreamEntry = StreamState | Ignore | Fault
ConnectionEntry = ConnectionState | Fault

_NOT_OPEN = Fault(PROTOCOL_ERROR, "the stream is not open", costs_connection=True)
_CLOSED = Fault(STREAM_CLOSED)
_CLOSED_FOR_GOOD = Fault(STREAM_CLOSED, "the stream is closed", costs_connection=True)


def _stream_table() -> dict[StreamState, dict[StreamEvent, StreamEntry]]:
    state = StreamState
    never = Fault(NO_ERROR)  # Does not occur.
    # In the order of the events.
    rows: dict[StreamState, tuple[StreamEntry, ...]] = {
        state.IDLE: (state.FRESH, _NOT_OPEN, never, _NOT_OPEN, _NOT_OPEN, never, never),
        state.SKIPPED: (_NOT_OPEN, _CLOSED, never, IGNORE, IGNORE, never, never),
        state.FRESH: (
            state.OPEN, state.OPEN, state.HALF_CLOSED, state.CLOSED, state.FRESH,
            state.ANSWERED, state.QUIET,
        ),
        state.OPEN: (
            state.OPEN, state.OPEN, state.HALF_CLOSED, state.CLOSED, state.OPEN,
            state.ANSWERED, state.QUIET,
        ),
        state.HALF_CLOSED: (
            _CLOSED, _CLOSED, never, state.ABANDONED, state.HALF_CLOSED,
            state.HALF_CLOSED, state.CLOSED,
        ),
        state.ANSWERED: (IGNORE, IGNORE, never, state.CLOSED, state.ANSWERED, never, state.QUIET),
        state.ABANDONED: (_CLOSED_FOR_GOOD, _CLOSED, never, IGNORE, IGNORE, never, state.CLOSED),
        state.QUIET: (IGNORE, IGNORE, never, IGNORE, IGNORE, never, state.QUIET),
        state.CLOSED: (_CLOSED_FOR_GOOD, _CLOSED, never, IGNORE, IGNORE, never, never),
    }  # fmt: skip
    return {state: dict(zip(StreamEvent, row, strict=True)) for state, row in rows.items()}


STREAM_TABLE = _stream_table()

_FIRST = Fault(PROTOCOL_ERROR, "the first frame is not SETTINGS", costs_connection=True)
_NOT_HTTP2 = Fault(PROTOCOL_ERROR, "this is not HTTP/2", costs_connection=True)
_NO_BLOCK = Fault(PROTOCOL_ERROR, "CONTINUATION without HEADERS", costs_connection=True)
_INTERRUPTED = Fault(PROTOCOL_ERROR, "a header block is interrupted", costs_connection=True)


def _connection_table() -> dict[ConnectionState, dict[ConnectionEvent, ConnectionEntry]]:
    state = ConnectionState
    # In the order of the events.
    rows: dict[ConnectionState, tuple[ConnectionEntry, ...]] = {
        state.PREFACE: (state.SETTINGS, _NOT_HTTP2, _NOT_HTTP2, _NOT_HTTP2, _NOT_HTTP2, _NOT_HTTP2),
        state.SETTINGS: (_FIRST, state.FRAMES, _FIRST, _FIRST, _FIRST, _FIRST),
        state.FRAMES: (_NOT_HTTP2, state.FRAMES, state.BLOCK, _NO_BLOCK, _NO_BLOCK, state.FRAMES),
        state.BLOCK: (
            _INTERRUPTED, _INTERRUPTED, _INTERRUPTED, state.BLOCK, state.FRAMES, _INTERRUPTED,
        ),
    }  # fmt: skip
    return {state: dict(zip(ConnectionEvent, row, strict=True)) for state, row in rows.items()}


CONNECTION_TABLE = _connection_table()
