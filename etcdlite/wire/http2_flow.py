"""The sending side of HTTP/2 flow control (RFC 9113, 5.2).

A piece of an answer is sent at once if the windows of its stream and of the connection have room
for it, and nothing of that stream is held. Otherwise it is held. Held streams take turns, a frame
each, as windows open. A stream whose own window is exhausted leaves the rotation until that window
grows, so a larger window of the connection costs nothing for it.

Limits: in one slice, `flush` sends at most `FRAMES_PER_SLICE` frames, and no more while
`high_water_bytes` are unsent; the rest follows in the next turns of the loop. Otherwise a single
frame that opens the windows of thousands of streams by a byte each would stall the loop.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Any, Protocol

from etcdlite.session import Outbox

DEFAULT_WINDOW_BYTES = 65_535
MAX_WINDOW = 2**31 - 1

MAX_SENT_FRAME_BYTES = 65_536
"""Larger ones are not sent even if the peer takes them: streams take turns."""

SMALL_PIECE_BYTES = 4096
"""Held pieces up to this are joined."""

FRAMES_PER_SLICE = 512

PRICED_BYTES = 64
"""Smaller pieces of an unfinished answer do not count as answers: they earn no noise allowance."""

FRAME_HEADER = struct.Struct(">IBI")
"""Length (24 bits) and type, flags, stream id. The type of DATA is 0."""


class Outgoing(Protocol):
    """A stream, as flow control sees it."""

    id: int
    credit: int
    """The stream's window, above the peer's SETTINGS_INITIAL_WINDOW_SIZE."""
    held: deque[memoryview | bytearray] | None
    """Output that waits for windows. If the last piece is a bytearray, it grows."""
    held_bytes: int


class Flow:
    """The windows of one connection."""

    __slots__ = (
        "_max_credit", "_outbox", "_shut", "frames_left", "initial", "max_frame", "ready", "window",
    )  # fmt: skip

    def __init__(self, outbox: Outbox, max_frame: int) -> None:
        self.window = DEFAULT_WINDOW_BYTES
        """The connection's send window. Hot paths check and reduce it in place."""
        self.initial = DEFAULT_WINDOW_BYTES
        """The initial window of each stream, to which the stream's credit is added."""
        self.max_frame = max_frame
        self.frames_left = FRAMES_PER_SLICE
        """What `flush` may still send in this slice."""
        self._outbox = outbox
        self.ready: dict[int, Any] = {}
        """Held streams whose own windows are open, in turn."""
        self._shut: dict[int, Any] = {}
        """Held streams whose own windows are exhausted."""
        self._max_credit = 0
        """An upper bound of all credits."""

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
        size = len(head) + len(body)
        if stream.held is None:
            stream.held = deque()
        if size > SMALL_PIECE_BYTES:
            stream.held += (memoryview(head), memoryview(body))
        elif stream.held and type(stream.held[-1]) is bytearray:
            # Join small messages, so that their overhead does not exceed their counted size.
            stream.held[-1] += head + body
        else:
            stream.held.append(bytearray(head + body))
        stream.held_bytes += size
        self._outbox.hold(size)
        if stream.id not in self._shut:
            self.ready[stream.id] = stream

    def drop(self, stream: Outgoing) -> None:
        if (self.ready.pop(stream.id, None) or self._shut.pop(stream.id, None)) is not None:
            self._outbox.drop(stream.held_bytes)
            stream.held = None
            stream.held_bytes = 0

    def clear(self) -> None:
        self.ready.clear()
        self._shut.clear()

    @property
    def shut_streams(self) -> int:
        """The number of streams that wait for their own windows."""
        return len(self._shut)

    @property
    def has_more(self) -> bool:
        """`flush` has something to send now."""
        outbox = self._outbox
        return (
            bool(self.ready) and self.window > 0 and outbox.unsent_bytes <= outbox.high_water_bytes
        )

    def grant(self, stream: Outgoing, size_bytes: int) -> bool:
        """Enlarge a stream's window; False if it exceeds the RFC's limit."""
        stream.credit += size_bytes
        self._max_credit = max(self._max_credit, stream.credit)
        if self._shut.pop(stream.id, None) is not None:
            self.ready[stream.id] = stream
        return self.initial + stream.credit <= MAX_WINDOW

    def set_initial(self, size_bytes: int, streams: dict[int, Any]) -> bool:
        """Change the initial window; False if a stream's window exceeds the RFC's limit."""
        grows = size_bytes > self.initial
        self.initial = size_bytes
        if self._max_credit + size_bytes > MAX_WINDOW:
            self._max_credit = max((stream.credit for stream in streams.values()), default=0)
            if self._max_credit + size_bytes > MAX_WINDOW:
                return False
        if grows and self._shut:
            if self.ready:
                self.ready.update(self._shut)
                self._shut.clear()
            else:
                self.ready, self._shut = self._shut, self.ready
        return True

    def flush(self) -> tuple[list[Any], int]:
        """Send held output that the windows allow, a frame per stream at a time. Returns the
        emptied streams, and the number of frames that count as answers."""
        ready = self.ready
        emptied: list[Any] = []
        answers = 0
        while self.frames_left > 0 and self.has_more:
            self.frames_left -= 1
            stream_id, stream = next(iter(ready.items()))
            del ready[stream_id]
            room = min(self.window, self.initial + stream.credit, self.max_frame)
            if room <= 0:
                self._shut[stream_id] = stream
                continue
            if not ready and room == self.max_frame:
                # No other stream waits for its turn.
                frames = self._send_frames(stream)
                self.frames_left -= frames
                answers += frames
            size = self._send_some(stream, min(room, self.window, self.initial + stream.credit))
            if stream.held:
                ready[stream_id] = stream
                answers += size >= PRICED_BYTES
            else:
                emptied.append(stream)
                answers += 1
        return emptied, answers

    def _send_frames(self, stream: Outgoing) -> int:
        """Send frames of the largest size from the first held piece, and leave a part of it and of
        the windows; returns their number."""
        held = stream.held
        assert held
        outbox, most = self._outbox, self.max_frame
        view = memoryview(held[0])
        room = min(
            len(view),
            self.window,
            self.initial + stream.credit,
            outbox.high_water_bytes - outbox.unsent_bytes,
        )
        frames = min((room - 1) // most, self.frames_left)
        if frames <= 0:
            return 0
        size = frames * most
        held[0] = view[size:]
        self.spend(stream, size)
        stream.held_bytes -= size
        outbox.release(size)
        header = FRAME_HEADER.pack(most << 8, 0, stream.id)
        outbox.append(header)
        parts = outbox.parts
        parts.append(view[:most])
        for at in range(most, size, most):
            parts += (header, view[at : at + most])
        outbox.unsent_bytes += size + (frames - 1) * len(header)
        return frames

    def _send_some(self, stream: Outgoing, room: int) -> int:
        """Send a frame of at most `room` held bytes; returns its size."""
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
