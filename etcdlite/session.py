"""The frame that every connection shares, sans-IO: an `Outbox`, an `Inbox`, and a `Session`.

The server owns the socket and knows nothing else: it gives a session what it received, sends what
its outbox has, and ticks it. What a connection may hold, how long it may take and what becomes of
one that is too slow is decided here, once for all protocols. It stands below both users, the
connections between members (`peer.py`) and those of clients (`wire/`).

How a protocol uses it: derive from `Session` and call its `__init__`.

- Input: `receive(data)` begins with `data = self.inbox.join(data)` and returns if that is empty.
  What is left behind the last whole frame goes back with `self.inbox.keep(rest, needed_bytes)`.
  A protocol that takes its input in pieces uses `put` and `take` instead.
- Output: `self.outbox.append(data)`. A hot path does the same in place: it calls `outbox.wake()` if
  `outbox.parts` is empty, extends `outbox.parts`, and adds to `outbox.unsent_bytes`.
- Output that flow control keeps back stays with the protocol; it counts with `hold` and `release`.
- `is_open = True` ends the time for the handshake.
- `abort(why)` ends the connection at once; `is_closing = True` when everything is sent.

Invariants: `wake` is called whenever `parts` gets its first piece, and so once per turn; what is
kept of the input is copied once, however small the pieces are that it comes in.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

HIGH_WATER_BYTES = 1 << 20
"""With more than this unsent the peer is not read from, and streams hold back."""

MAX_HELD_BYTES = 16 << 20
"""With more than this kept back by flow control, streams hold back."""

MAX_UNSENT_BYTES = 64 << 20
"""With more than this waiting, a client that asks for yet more is dropped."""

HANDSHAKE_TIMEOUT_S = 10.0
"""For the peer to open the protocol."""

STALLED_TIMEOUT_S = 60.0
"""For output that waits, without any of it moving."""

RATE_PERIOD_S = 60.0
MIN_SENT_BYTES_PER_S = 1024
"""Output that waits for a whole period moves at least this fast."""

PARTIAL_TIMEOUT_S = 60.0
MIN_RECEIVED_BYTES_PER_S = 64 << 10
"""A frame comes whole within the one, and what its size takes at the other."""


def partial_timeout_s(size_bytes: int) -> float:
    """How long something of this size may take to come whole, from its first byte."""
    return PARTIAL_TIMEOUT_S + size_bytes / MIN_RECEIVED_BYTES_PER_S


class Outbox:
    """What is to be sent on one connection."""

    __slots__ = (
        "_clock", "_held_moved_at", "_moved_at", "_on_output", "_period_began", "_period_bytes",
        "_rest", "_session", "held_bytes", "min_bytes_per_s", "parts", "unsent_bytes",
    )  # fmt: skip

    def __init__(
        self, session: Any, on_output: Callable[[Any], None], clock: Callable[[], float]
    ) -> None:
        """`on_output` is called with `session`."""
        self.parts: list[bytes | memoryview] = []
        self.unsent_bytes = 0
        """Bytes in `parts`, and those taken and not sent yet."""
        self.held_bytes = 0
        """Bytes that flow control keeps back; not in `unsent_bytes`."""
        self.min_bytes_per_s = MIN_SENT_BYTES_PER_S
        self._session = session
        self._on_output = on_output
        self._clock = clock
        self._rest: memoryview | None = None
        # While `_rest` waits: when some of it was sent last; and when the period of the minimum
        # rate began, and how much was sent since.
        self._moved_at = self._period_began = 0.0
        self._period_bytes = 0
        self._held_moved_at = 0.0
        """When flow control let go of something last, with more than `HIGH_WATER_BYTES` held."""

    # For the protocol.

    def append(self, data: bytes) -> None:
        if not self.parts:
            self._on_output(self._session)
        self.parts.append(data)
        self.unsent_bytes += len(data)

    def wake(self) -> None:
        """Have the owner look at the session in this turn."""
        self._on_output(self._session)

    def hold(self, size_bytes: int) -> None:
        """Flow control keeps this back."""
        if self.held_bytes <= HIGH_WATER_BYTES:
            self._held_moved_at = self._clock()
        self.held_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Flow control lets this go."""
        self.held_bytes -= size_bytes
        self._held_moved_at = self._clock()

    def drop(self, size_bytes: int) -> None:
        """This was kept back and will not be sent."""
        self.held_bytes -= size_bytes

    @property
    def waiting_bytes(self) -> int:
        """All that waits."""
        return self.unsent_bytes + self.held_bytes

    @property
    def is_blocked(self) -> bool:
        """The peer does not read what it is sent: what can wait holds back."""
        return self.unsent_bytes > HIGH_WATER_BYTES or self.held_bytes > MAX_HELD_BYTES

    # For the owner.

    @property
    def is_stuck(self) -> bool:
        """The kernel did not take all that was taken; it tells when it has room."""
        return self._rest is not None

    def take(self) -> memoryview:
        """What to send now. `sent` says how much of it went out; the rest is taken again."""
        rest = self._rest
        if rest is None:
            rest = self._rest = memoryview(b"".join(self.parts))
            self.parts.clear()
            self._period_began = 0.0
        return rest

    def sent(self, size_bytes: int) -> None:
        """The kernel took this much of what `take` gave."""
        rest = self._rest
        assert rest is not None
        self.unsent_bytes -= size_bytes
        if size_bytes == len(rest):
            self._rest = None
            return
        self._rest = rest[size_bytes:]
        now = self._clock()
        if not self._period_began:
            self._moved_at = self._period_began = now
            self._period_bytes = 0
        elif size_bytes:
            self._moved_at = now
            self._period_bytes += size_bytes

    def problem(self, now: float) -> str:
        """Why the peer is too slow; empty if it is not."""
        if self.held_bytes > HIGH_WATER_BYTES and now - self._held_moved_at > STALLED_TIMEOUT_S:
            return "it does not read its answers"
        if self._rest is None:
            return ""
        if now - self._moved_at > STALLED_TIMEOUT_S:
            return "it does not read its answers"
        period_s = now - self._period_began
        if period_s > RATE_PERIOD_S:
            if self._period_bytes < self.min_bytes_per_s * period_s:
                return "it reads its answers too slowly"
            self._period_began = now
            self._period_bytes = 0
        return ""

    def close(self) -> None:
        """The connection is gone: hold nothing for it."""
        self.parts.clear()
        self.held_bytes = 0
        self._rest = None
        # Otherwise the two hold each other until the cyclic collector comes by.
        self._session = None
        self._on_output = _ignore


class Inbox:
    """What was received on one connection and is not used yet."""

    __slots__ = ("_clock", "_pieces", "_timeout_s", "deadline", "needed_bytes", "waiting_bytes")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pieces: deque[bytes | memoryview] = deque()
        self.waiting_bytes = 0
        self.needed_bytes = 0
        """How much must wait before it is of use."""
        self.deadline = math.inf
        """When what is awaited must have come."""
        self._timeout_s = 0.0
        """Of what was kept since the last tick, from which the time counts: what is received costs
        no look at the clock."""

    def join(self, data: bytes) -> bytes:
        """What waits, and `data` behind it; empty while that is less than `needed_bytes`."""
        pieces = self._pieces
        if not pieces:
            return data
        pieces.append(data)
        self.waiting_bytes += len(data)
        if self.waiting_bytes < self.needed_bytes:
            return b""
        data = b"".join(pieces)
        self.clear()
        return data

    def keep(self, rest: bytes, needed_bytes: int) -> None:
        """`rest` is the beginning of something of at least `needed_bytes`."""
        self._pieces.append(rest)
        self.waiting_bytes += len(rest)
        self.needed_bytes = needed_bytes
        self._timeout_s = partial_timeout_s(needed_bytes)

    def put(self, data: bytes) -> None:
        """`data` waits for `take`."""
        self._pieces.append(memoryview(data))
        self.waiting_bytes += len(data)

    def take(self, size_bytes: int) -> bytes:
        """The next piece, of at most this size; something must wait."""
        pieces = self._pieces
        piece = pieces[0]
        if len(piece) > size_bytes:
            pieces[0] = piece[size_bytes:]
            piece = piece[:size_bytes]
        else:
            pieces.popleft()
        self.waiting_bytes -= len(piece)
        return bytes(piece)

    def expect(self, timeout_s: float) -> None:
        """What is awaited must come within this time."""
        self.deadline = self._clock() + timeout_s

    def is_late(self, now: float) -> bool:
        """What is awaited did not come in time. Called several times a second."""
        if self._timeout_s:
            self.deadline = now + self._timeout_s
            self._timeout_s = 0.0
        return now > self.deadline

    def clear(self) -> None:
        self._pieces.clear()
        self.waiting_bytes = 0
        self._timeout_s = 0.0
        self.deadline = math.inf


class Session:
    """One connection's protocol, sans-IO."""

    protocol = "none"
    """For the metrics."""
    reads_always = False
    """Its input is answers: read it even while its own output waits."""
    is_served_to_the_end = False
    """Its input is read while the server stops."""

    def __init__(self, on_output: Callable[[Any], None], clock: Callable[[], float]) -> None:
        """`on_output` is called with the session when it has something to send, or is to be
        closed. `clock` gives seconds, monotonic."""
        self.outbox = Outbox(self, on_output, clock)
        self.inbox = Inbox(clock)
        self.is_open = False
        """The peer has said what it must before it may be idle."""
        self.open_by = 0.0
        """When `is_open` must be true; 0 until the first tick."""
        self.is_closing = False
        """Nothing is read any more; close when everything is sent."""
        self.is_aborted = False
        """Close at once."""
        self.why_aborted = ""

    def receive(self, data: bytes) -> None:
        """Take what the peer sent. Raises nothing: a fault of the peer costs it the connection."""
        raise NotImplementedError

    @property
    def is_full(self) -> bool:
        """Read no more for now: enough input waits."""
        return False

    @property
    def is_blocked(self) -> bool:
        """The peer does not read: streams hold back, until `unblocked`."""
        # As `Outbox.is_blocked`, but one call less: every range asks.
        outbox = self.outbox
        return outbox.unsent_bytes > HIGH_WATER_BYTES or outbox.held_bytes > MAX_HELD_BYTES

    @property
    def is_idle(self) -> bool:
        """Nothing that was asked for is unanswered or unsent, streams apart."""
        return not self.outbox.waiting_bytes

    @property
    def has_more(self) -> bool:
        """`produce` would give something now."""
        return False

    def produce(self) -> None:
        """Make the next piece of what is made in pieces."""

    def unblocked(self) -> None:
        """`is_blocked` is not true any more."""

    def tick(self, now: float) -> None:
        """Enforce the deadlines; to be called several times a second with the clock's time."""
        outbox = self.outbox
        if (outbox.unsent_bytes or outbox.held_bytes) and (why := outbox.problem(now)):
            self.abort(why)
        elif self.inbox.is_late(now) or (not self.is_open and self._opens_late(now)):
            self.input_is_late()

    def _opens_late(self, now: float) -> bool:
        if not self.open_by:
            self.open_by = now + HANDSHAKE_TIMEOUT_S
        return now > self.open_by

    def input_is_late(self) -> None:
        """What is awaited did not come in time."""
        if self.is_open:
            self.abort("it did not finish what it began to send")
        else:
            self.abort("it did not open the protocol in time")

    def abort(self, why: str) -> None:
        """Have the connection closed at once."""
        self.is_aborted = self.is_closing = True
        self.why_aborted = why
        self.outbox.wake()

    def shut_down(self) -> None:
        """The server stops: end the streams. May be called again and again."""

    def closed(self) -> None:
        """The connection is gone: forget everything that was asked for."""
        self.is_closing = True
        self.inbox.clear()
        self.outbox.close()


def _ignore(session: Any) -> None:
    """In place of a closed connection's `on_output`."""
