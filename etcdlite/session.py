"""What every connection shares, sans-IO: an `Outbox`, an `Inbox`, and the base class `Session`.

The server owns the socket. It gives a session the bytes it received, sends the outbox, and ticks
the session. This module decides, once for all protocols, how much a connection may hold, how long
it may take, and when a slow one is closed. It is a module of the core because both the connections
between members (`peer.py`) and those of clients (`wire/`) use it.

To implement a protocol, derive from `Session` and call its `__init__`.

- Input: `receive(data)` begins with `data = self.inbox.join(data)` and returns if that is empty.
  The bytes after the last whole frame go back with `self.inbox.keep(rest, needed_bytes)`.
  A protocol that takes its input in pieces uses `put` and `take` instead.
- Output: `self.outbox.append(data)`. A hot path does the same in place: it calls `outbox.wake()`
  unless `outbox.is_queued`, extends `outbox.parts`, and adds to `outbox.unsent_bytes`.
- What nobody waits for goes to `self.outbox.append_late(data)`: it leaves with the next output, or
  at the next tick.
- Output that flow control holds back stays with the protocol, which reports it with `hold`,
  `release` and `drop`.
- `is_open = True` ends the time for the handshake.
- `abort(why)` ends the connection at once; `is_closing = True` when everything is sent.

Invariants: while `parts` has more than late output, the owner is told; kept input is copied once,
however small the pieces are in which it arrives.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from itertools import accumulate, islice
from typing import Any

from etcdlite.channel import Channel
from etcdlite.limits import DEFAULT_LIMITS, Limits

MAX_HELD_BYTES = 16 << 20
"""Above this much output held back by flow control, streams hold back."""

MAX_UNSENT_BYTES = 64 << 20
"""Above this much waiting output, a client that asks for more is dropped."""

TAKEN_BYTES = 1 << 20
TAKEN_PARTS = 10_000
"""About this much output of a connection is copied and sent in one turn: bytes and pieces."""

SEALED_BYTES = 256 << 10
"""At most this much output of a connection is sealed at once. It takes less than 2 ms."""

HANDSHAKE_TIMEOUT_S = 10.0
"""A peer must open the protocol within this time."""

STALLED_TIMEOUT_S = 60.0
"""A peer is dropped when none of its waiting output moves for this long."""

RATE_PERIOD_S = 60.0
MIN_SENT_BYTES_PER_S = 1024
"""Output that waits for a whole period must move at least this fast."""

MAX_PIECES = 1024
"""Received pieces that wait in an inbox. More are joined: a tiny one takes many times its size."""

MAX_LATE_BYTES = 256
"""The most output that waits for more output to leave with it."""

PARTIAL_TIMEOUT_S = 60.0
MIN_RECEIVED_BYTES_PER_S = 64 << 10
"""A frame must be complete within the timeout plus its size divided by the rate."""


def partial_timeout_s(size_bytes: int) -> float:
    """The time that a frame of this size may take, from its first byte to its last."""
    return PARTIAL_TIMEOUT_S + size_bytes / MIN_RECEIVED_BYTES_PER_S


class Outbox:
    __slots__ = (
        "_clock", "_held_moved_at", "_moved_at", "_on_output", "_period_began", "_period_bytes",
        "_rest", "_session", "held_bytes", "high_water_bytes", "is_queued", "is_stuck",
        "min_bytes_per_s", "parts", "unsent_bytes",
    )  # fmt: skip

    def __init__(
        self,
        session: Any,
        on_output: Callable[[Any], None],
        clock: Callable[[], float],
        high_water_bytes: int,
    ) -> None:
        """`on_output` is called with `session`."""
        self.parts: list[bytes | memoryview] = []
        self.unsent_bytes = 0
        """Bytes in `parts`, and bytes taken but not sent yet."""
        self.held_bytes = 0
        """Bytes held back by flow control; not part of `unsent_bytes`."""
        self.high_water_bytes = high_water_bytes
        """Above this much in `unsent_bytes`, streams hold back."""
        self.min_bytes_per_s = MIN_SENT_BYTES_PER_S
        self._session = session
        self._on_output = on_output
        self._clock = clock
        self.is_queued = False
        """The owner was told to look at the session, and has not yet taken the output."""
        self._rest: bytes | memoryview | None = None
        self.is_stuck = False
        """The kernel did not accept everything; the selector reports when it has room."""
        # While `_rest` waits: when some of it was last sent; when the current period of the minimum
        # rate began, and how much was sent in it.
        self._moved_at = self._period_began = 0.0
        self._period_bytes = 0
        self._held_moved_at = 0.0
        """When flow control last released something, while more than `high_water_bytes` is held."""

    # For the protocol.

    def append(self, data: bytes) -> None:
        if not self.is_queued:
            self.wake()
        self.parts.append(data)
        self.unsent_bytes += len(data)

    def append_late(self, data: bytes) -> None:
        """Queue what may wait for the next output, or for `flush_late`. It saves a system call, and
        the other side a wake-up. More than `MAX_LATE_BYTES` do not wait."""
        self.parts.append(data)
        self.unsent_bytes += len(data)
        if self.unsent_bytes > MAX_LATE_BYTES:
            self.flush_late()

    def flush_late(self) -> None:
        """Queue what `append_late` was given, without waiting any longer."""
        if self.parts and not self.is_queued:
            self.wake()

    def wake(self) -> None:
        """Tell the owner to look at the session in this turn."""
        self.is_queued = True
        self._on_output(self._session)

    def hold(self, size_bytes: int) -> None:
        """Count output that flow control holds back."""
        if self.held_bytes <= self.high_water_bytes:
            self._held_moved_at = self._clock()
            if not self.held_bytes:
                self._on_output(self._session)  # Its deadline is due from now on.
        self.held_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Flow control lets this much out."""
        self.held_bytes -= size_bytes
        self._held_moved_at = self._clock()

    def drop(self, size_bytes: int) -> None:
        """This much was held back and will not be sent."""
        self.held_bytes -= size_bytes

    @property
    def waiting_bytes(self) -> int:
        """All that waits."""
        return self.unsent_bytes + self.held_bytes

    @property
    def is_blocked(self) -> bool:
        """The peer does not read its output: streams hold back."""
        return self.unsent_bytes > self.high_water_bytes or self.held_bytes > MAX_HELD_BYTES

    # For the owner.

    def take(self) -> bytes | memoryview:
        """The bytes to send now. Call `sent` with the number that went out, and `take` again."""
        self.is_queued = False
        rest = self._rest
        if rest is None:
            parts = self.parts
            if self.unsent_bytes > TAKEN_BYTES and len(parts) > 1:
                rest = self._take_some(TAKEN_BYTES)
            else:
                rest = b"".join(parts)
                parts.clear()
            self._rest = rest
        return rest

    def take_sealed(self, channel: Channel) -> bytes | memoryview:
        """As `take`, but the bytes are ciphertext, and count as such until they are sent. Before
        the channel is established they are its handshake, and the output waits. Raises
        ChannelError."""
        self.is_queued = False
        rest = self._rest
        if rest is None:
            plaintext: bytes | memoryview = b""
            if not channel.is_established:
                rest = channel.output()
            else:
                parts = self.parts
                if parts and len(parts[0]) > SEALED_BYTES:
                    view = memoryview(parts[0])
                    plaintext, parts[0] = view[:SEALED_BYTES], view[SEALED_BYTES:]
                elif parts:
                    plaintext = self._take_some(SEALED_BYTES)
                rest = channel.seal(plaintext)
            self.unsent_bytes += len(rest) - len(plaintext)
            self._rest = rest
        return rest

    def _take_some(self, most_bytes: int) -> bytes:
        """About `most_bytes` of the output, at least one part."""
        parts = self.parts
        if self.unsent_bytes <= most_bytes:
            taken = b"".join(parts)
            parts.clear()
            return taken
        ends = list(accumulate(map(len, islice(parts, TAKEN_PARTS))))
        count = bisect_right(ends, most_bytes) or 1
        taken = b"".join(parts[:count])
        del parts[:count]
        return taken

    def sent(self, size_bytes: int) -> None:
        """The kernel accepted this many of the bytes that `take` returned."""
        rest = self._rest
        assert rest is not None
        self.unsent_bytes -= size_bytes
        if size_bytes == len(rest):
            self._rest = None
            self.is_stuck = False
            return
        self._rest = memoryview(rest)[size_bytes:]
        now = self._clock()
        if not self.is_stuck:
            self.is_stuck = True
            self._moved_at = self._period_began = now
            self._period_bytes = 0
        elif size_bytes:
            self._moved_at = now
            self._period_bytes += size_bytes

    def problem(self, now: float) -> str:
        """Why the connection must be closed; empty if the peer is fast enough."""
        if (
            self.held_bytes > self.high_water_bytes
            and now - self._held_moved_at > STALLED_TIMEOUT_S
        ):
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
        """The connection is closed: drop all output."""
        self.parts.clear()
        self.held_bytes = 0
        self._rest = None
        self.is_stuck = False
        # Break the reference cycle: the garbage collector does not visit old objects.
        self._session = None
        self._on_output = _ignore


class Inbox:
    """The input of one connection that is not processed yet."""

    __slots__ = (
        "_clock", "_pieces", "deadline", "needed_bytes", "starts_deadline", "waiting_bytes",
    )  # fmt: skip

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pieces: deque[memoryview] = deque()
        self.waiting_bytes = 0
        self.needed_bytes = 0
        """`join` returns nothing until this many bytes wait."""
        self.deadline = math.inf
        """The time by which the awaited input must be complete."""
        self.starts_deadline = False
        """Input was kept since the last tick. Its time starts at the next tick, so that receiving
        does not read the clock."""

    def join(self, data: bytes) -> bytes:
        """The waiting input followed by `data`; empty while that is less than `needed_bytes`."""
        pieces = self._pieces
        if not pieces:
            return data
        self.put(data)
        if self.waiting_bytes < self.needed_bytes:
            return b""
        data = b"".join(pieces)
        self.clear()
        return data

    def keep(self, rest: bytes, needed_bytes: int) -> None:
        """Keep `rest`, the start of a frame of at least `needed_bytes`."""
        self.put(rest)
        self.needed_bytes = needed_bytes
        self.starts_deadline = True

    def put(self, data: bytes) -> None:
        """Queue `data` for `take`."""
        pieces = self._pieces
        pieces.append(memoryview(data))
        self.waiting_bytes += len(data)
        if len(pieces) > MAX_PIECES:
            joined = b"".join(pieces)
            pieces.clear()
            pieces.append(memoryview(joined))

    def take(self, size_bytes: int) -> bytes:
        """The next piece, of at most this size. Some input must be waiting."""
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
        """Set the deadline for the awaited input."""
        self.deadline = self._clock() + timeout_s

    def clear(self) -> None:
        self._pieces.clear()
        self.waiting_bytes = 0
        self.starts_deadline = False
        self.deadline = math.inf


class Session:
    """One connection's protocol, sans-IO."""

    __slots__ = (
        "__weakref__", "certificate_user", "client", "inbox", "is_aborted", "is_closing", "is_open",
        "open_by", "outbox", "why_aborted",
    )  # fmt: skip

    protocol = "none"
    """For the metrics."""
    reads_always = False
    """The input consists of answers: read it even while much output is unsent."""
    is_served_to_the_end = False
    """Read input while the server stops."""
    is_member = False
    """The other side is a member, which has checked the rights of its clients."""

    def __init__(
        self,
        on_output: Callable[[Any], None],
        clock: Callable[[], float],
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """`on_output` is called with the session when it has output or must be closed. `clock`
        returns monotonic seconds."""
        self.client = ""
        """The address of the other side, for the log."""
        self.certificate_user = ""
        """The user named in the other side's verified certificate; "" if that logs nobody in."""
        self.outbox = Outbox(self, on_output, clock, limits.high_water_bytes)
        self.inbox = Inbox(clock)
        self.is_open = False
        """The peer opened the protocol, and may be idle from now on."""
        self.open_by = 0.0
        """The deadline for `is_open`; 0 until the first tick."""
        self.is_closing = False
        """Read nothing more; close once everything is sent."""
        self.is_aborted = False
        """Close at once."""
        self.why_aborted = ""

    def receive(self, data: bytes) -> None:
        """Process bytes from the peer. Its faults close the connection; nothing is raised."""
        raise NotImplementedError

    @property
    def kept_bytes(self) -> int:
        """The memory that its input and output occupy, approximately."""
        return self.outbox.waiting_bytes + self.inbox.waiting_bytes

    @property
    def is_full(self) -> bool:
        """Enough input waits: read no more for now."""
        return False

    @property
    def is_blocked(self) -> bool:
        """The peer does not read its output: streams hold back until `unblocked`."""
        # Inlined from `Outbox.is_blocked`, because every range asks.
        outbox = self.outbox
        return outbox.unsent_bytes > outbox.high_water_bytes or outbox.held_bytes > MAX_HELD_BYTES

    @property
    def may_rest(self) -> bool:
        """Nothing is due soon: `tick` may come seconds late until there is input or output."""
        return False

    @property
    def is_idle(self) -> bool:
        """Every request except streams is answered, and all output is sent."""
        return not self.outbox.waiting_bytes

    @property
    def has_more(self) -> bool:
        """`produce` has work to do now."""
        return False

    def produce(self) -> None:
        """Produce the next piece of long answers."""

    def unblocked(self) -> None:
        """The peer reads again: resume what held back."""

    def check_unblocked(self, was_blocked: bool) -> None:
        """Call `unblocked` if `is_blocked` became false."""
        if was_blocked and not self.is_blocked:
            self.unblocked()

    def tick(self, now: float) -> None:
        """Enforce the deadlines. Called several times a second with the clock's time."""
        outbox = self.outbox
        inbox = self.inbox
        outbox.flush_late()
        if outbox.unsent_bytes or outbox.held_bytes:
            if why := outbox.problem(now):
                self.abort(why)
                return
            if (
                outbox.unsent_bytes > outbox.high_water_bytes
                and inbox.needed_bytes
                and not self.reads_always
            ):
                # The rest of the frame is not read until this output is sent.
                inbox.starts_deadline = bool(inbox.waiting_bytes)
        if inbox.starts_deadline:
            inbox.deadline = now + partial_timeout_s(inbox.needed_bytes)
            inbox.starts_deadline = False
        elif now > inbox.deadline or (not self.is_open and self._opens_late(now)):
            self.input_is_late()

    def _opens_late(self, now: float) -> bool:
        if not self.open_by:
            self.open_by = now + HANDSHAKE_TIMEOUT_S
        return now > self.open_by

    def input_is_late(self) -> None:
        """The awaited input missed its deadline."""
        if self.is_open:
            self.abort("it did not finish what it began to send")
        else:
            self.abort("it did not open the protocol in time")

    def abort(self, why: str) -> None:
        """Close the connection at once; `why` is logged."""
        self.is_aborted = self.is_closing = True
        self.why_aborted = why
        self.outbox.wake()

    def shut_down(self) -> None:
        """The server stops: end the streams. May be called repeatedly."""

    def closed(self) -> None:
        """The connection is closed: drop its requests. While `has_more`, `produce` drops some."""
        self.is_closing = True
        self.inbox.clear()
        self.outbox.close()


def _ignore(session: Any) -> None:
    """The `on_output` of a closed connection."""
