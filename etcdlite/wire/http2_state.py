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

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""The first bytes of every client."""

# Error codes (RFC 9113, 7).
NO_ERROR = 0x0
PROTOCOL_ERROR = 0x1
INTERNAL_ERROR = 0x2
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
_IS_CLOSED = Fault(STREAM_CLOSED)
_IS_CLOSED_FOR_GOOD = Fault(STREAM_CLOSED, "the stream is closed", costs_connection=True)
_NEVER = Fault(NO_ERROR)  # Does not occur.

IDLE, SKIPPED, FRESH, OPEN, HALF_CLOSED, ANSWERED, ABANDONED, QUIET, CLOSED = StreamState

# The columns are the events, in their order: HEADERS, DATA, END_STREAM, RST_STREAM, WINDOW_UPDATE,
# ANSWER_WAITS, ANSWER_ENDS.
_STREAM_ROWS: dict[StreamState, tuple[StreamEntry, ...]] = {
    IDLE: (FRESH, _NOT_OPEN, _NEVER, _NOT_OPEN, _NOT_OPEN, _NEVER, _NEVER),
    SKIPPED: (_NOT_OPEN, _IS_CLOSED, _NEVER, IGNORE, IGNORE, _NEVER, _NEVER),
    FRESH: (OPEN, OPEN, HALF_CLOSED, CLOSED, FRESH, ANSWERED, QUIET),
    OPEN: (OPEN, OPEN, HALF_CLOSED, CLOSED, OPEN, ANSWERED, QUIET),
    HALF_CLOSED: (_IS_CLOSED, _IS_CLOSED, _NEVER, ABANDONED, HALF_CLOSED, HALF_CLOSED, CLOSED),
    ANSWERED: (IGNORE, IGNORE, _NEVER, CLOSED, ANSWERED, _NEVER, QUIET),
    ABANDONED: (_IS_CLOSED_FOR_GOOD, _IS_CLOSED, _NEVER, IGNORE, IGNORE, _NEVER, CLOSED),
    QUIET: (IGNORE, IGNORE, _NEVER, IGNORE, IGNORE, _NEVER, QUIET),
    CLOSED: (_IS_CLOSED_FOR_GOOD, _IS_CLOSED, _NEVER, IGNORE, IGNORE, _NEVER, _NEVER),
}

STREAM_TABLE = {
    state: dict(zip(StreamEvent, row, strict=True)) for state, row in _STREAM_ROWS.items()
}

_FIRST = Fault(PROTOCOL_ERROR, "the first frame is not SETTINGS", costs_connection=True)
_NOT_HTTP2 = Fault(PROTOCOL_ERROR, "this is not HTTP/2", costs_connection=True)
_NO_BLOCK = Fault(PROTOCOL_ERROR, "CONTINUATION without HEADERS", costs_connection=True)
_INTERRUPTED = Fault(PROTOCOL_ERROR, "a header block is interrupted", costs_connection=True)


AT_PREFACE, AT_SETTINGS, FRAMES, BLOCK = ConnectionState

# The columns: PREFACE, SETTINGS, BLOCK_BEGINS, BLOCK_CONTINUES, BLOCK_ENDS, OTHER.
_CONNECTION_ROWS: dict[ConnectionState, tuple[ConnectionEntry, ...]] = {
    AT_PREFACE: (AT_SETTINGS, _NOT_HTTP2, _NOT_HTTP2, _NOT_HTTP2, _NOT_HTTP2, _NOT_HTTP2),
    AT_SETTINGS: (_FIRST, FRAMES, _FIRST, _FIRST, _FIRST, _FIRST),
    FRAMES: (_NOT_HTTP2, FRAMES, BLOCK, _NO_BLOCK, _NO_BLOCK, FRAMES),
    BLOCK: (_INTERRUPTED, _INTERRUPTED, _INTERRUPTED, BLOCK, FRAMES, _INTERRUPTED),
}

CONNECTION_TABLE = {
    state: dict(zip(ConnectionEvent, row, strict=True)) for state, row in _CONNECTION_ROWS.items()
}
