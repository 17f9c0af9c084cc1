"""What the peer's flow control lets an HTTP/2 connection send (RFC 9113, 5.2), and what it keeps
back.

A piece of an answer goes out at once if the windows of its stream and of the connection have room
for all of it, and nothing of that stream waits. Otherwise it is held. Held streams take turns, a
frame each, as windows open. A stream whose own window is shut is out of the round until that window
grows, so a window of the connection costs nothing for it.

Limits: `flush` sends at most `FRAMES_PER_SLICE` frames, and no more while `HIGH_WATER_BYTES` are
unsent; the rest follows in the next turns of the loop. Otherwise one frame of the peer that opens
the windows of thousands of streams by a byte each would hold up everyone else.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Any, Protocol

from etcdlite.session import HIGH_WATER_BYTES, Outbox

DEFAULT_WINDOW_BYTES = 65_535
MAX_WINDOW = 2**31 - 1

MAX_SENT_FRAME_BYTES = 65_536
"""Larger ones are not sent even if the peer takes them: streams take turns."""

SMALL_PIECE_BYTES = 4096
"""Held pieces up to this are joined."""

FRAMES_PER_SLICE = 512

PRICED_BYTES = 64
"""A peer that takes an answer in smaller pieces than this makes work, and does not read answers."""

FRAME_HEADER = struct.Struct(">IBI")
"""Length (24 bits) and type, flags, stream id. The type of DATA is 0."""


class Outgoing(Protocol):
    """A stream, as far as flow control is concerned."""

    id: int
    credit: int
    """The stream's window, above the peer's SETTINGS_INITIAL_WINDOW_SIZE."""
    held: deque[memoryview | bytearray] | None
    """What of the answer waits for windows. The last piece grows if it is a bytearray."""
    held_bytes: int


class Flow:
    """The windows of one connection."""

    __slots__ = ("_max_credit", "_outbox", "_ready", "_shut", "initial", "max_frame", "window")

    def __init__(self, outbox: Outbox, max_frame: int) -> None:
        self.window = DEFAULT_WINDOW_BYTES
        """The connection's. A hot path that checks it and sends in place takes its bytes off."""
        self.initial = DEFAULT_WINDOW_BYTES
        """Of each stream, to which its credit is added."""
        self.max_frame = max_frame
        self._outbox = outbox
        self._ready: dict[int, Any] = {}
        """Held streams whose own windows are open, in turn."""
        self._shut: dict[int, Any] = {}
        """Held streams whose own windows are shut."""
        self._max_credit = 0
        """No stream has more."""

    def has_room(self, stream: Outgoing, size_bytes: int) -> bool:
        return (
            size_bytes <= self.window
            and size_bytes <= self.initial + stream.credit
            and size_bytes <= self.max_frame
            and not stream.held
        )

    def spend(self, stream: Outgoing, size_bytes: int) -> None:
        self.window -= size_bytes
        stream.credit -= size_bytes

    def hold(self, stream: Outgoing, head: bytes, body: bytes) -> None:
        """`head` and `body` wait."""
        size = len(head) + len(body)
        if stream.held is None:
            stream.held = deque()
        if size > SMALL_PIECE_BYTES:
            stream.held += (memoryview(head), memoryview(body))
        elif stream.held and type(stream.held[-1]) is bytearray:
            # Thousands of small messages must not take more memory than they count.
            stream.held[-1] += head + body
        else:
            stream.held.append(bytearray(head + body))
        stream.held_bytes += size
        self._outbox.hold(size)
        if stream.id not in self._shut:
            self._ready[stream.id] = stream

    def drop(self, stream: Outgoing) -> None:
        """Do not send what is held of a stream."""
        if (self._ready.pop(stream.id, None) or self._shut.pop(stream.id, None)) is not None:
            self._outbox.drop(stream.held_bytes)
            stream.held = None
            stream.held_bytes = 0

    def clear(self) -> None:
        self._ready.clear()
        self._shut.clear()

    @property
    def shut_streams(self) -> int:
        """How many streams wait for their own windows."""
        return len(self._shut)

    @property
    def has_more(self) -> bool:
        """`flush` would send something."""
        return (
            bool(self._ready) and self.window > 0 and self._outbox.unsent_bytes <= HIGH_WATER_BYTES
        )

    def grant(self, stream: Outgoing, size_bytes: int) -> bool:
        """The peer opens a stream's window further; False if it becomes too large."""
        stream.credit += size_bytes
        self._max_credit = max(self._max_credit, stream.credit)
        if self._shut.pop(stream.id, None) is not None:
            self._ready[stream.id] = stream
        return self.initial + stream.credit <= MAX_WINDOW

    def set_initial(self, size_bytes: int, streams: dict[int, Any]) -> bool:
        """The peer changes all windows; False if one of them becomes too large."""
        grows = size_bytes > self.initial
        self.initial = size_bytes
        if self._max_credit + size_bytes > MAX_WINDOW:
            self._max_credit = max((stream.credit for stream in streams.values()), default=0)
            if self._max_credit + size_bytes > MAX_WINDOW:
                return False
        if grows and self._shut:
            if self._ready:
                self._ready.update(self._shut)
                self._shut.clear()
            else:
                self._ready, self._shut = self._shut, self._ready
        return True

    def flush(self) -> tuple[list[Any], int]:
        """Send what the windows allow of what is held, a frame per stream at a time. The streams of
        which nothing is left, and how many of the frames count as answers."""
        ready = self._ready
        emptied: list[Any] = []
        answers = 0
        for _ in range(FRAMES_PER_SLICE):
            if not self.has_more:
                break
            stream_id, stream = next(iter(ready.items()))
            del ready[stream_id]
            room = min(self.window, self.initial + stream.credit, self.max_frame)
            if room <= 0:
                self._shut[stream_id] = stream
                continue
            size = self._send_some(stream, room)
            if stream.held:
                ready[stream_id] = stream
                answers += size >= PRICED_BYTES
            else:
                emptied.append(stream)
                answers += 1
        return emptied, answers

    def _send_some(self, stream: Outgoing, room: int) -> int:
        """Send a frame of at most `room` bytes of what is held; how many bytes it has."""
        held = stream.held
        assert held
        size = 0
        pieces: list[memoryview] = []
        while held and size < room:
            piece = memoryview(held.popleft())
            if len(piece) > room - size:
                held.appendleft(piece[room - size :])
                piece = piece[: room - size]
            pieces.append(piece)
            size += len(piece)
        self.spend(stream, size)
        stream.held_bytes -= size
        outbox = self._outbox
        outbox.release(size)
        outbox.append(FRAME_HEADER.pack(size << 8, 0, stream.id))
        outbox.parts += pieces
        outbox.unsent_bytes += size
        return size
