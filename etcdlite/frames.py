"""etcdlite's native frames (docs/protocol.md).

A frame is, unsigned and little-endian: length (4 bytes, counts what follows it: 6 + size of the
body), request id (4), method (1), flags (1), body. `FrameReader` takes frames from a stream of
bytes and holds at most one incomplete frame.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

MAGIC = b"\x89ETCDLT\n"
SECRET_MAGIC = b"\x8aETCDLS\n"
"""Begins the channel of a shared secret (`secret.py`), in which the native protocol then runs."""
SECRET_REFUSAL = SECRET_MAGIC + b"\1\0\4\0"
"""The answer to a side that has no secret but needs one."""
PROTOCOL_VERSION = 1
HANDSHAKE = struct.Struct("<8sHH")
"""Magic and two versions. Client: lowest and highest it speaks. Server: the chosen one and 0."""

FRAME = struct.Struct("<IIBB")
"""Length, request id, method, flags."""

FRAME_HEADER_BYTES = FRAME.size
FRAME_LENGTH_BYTES = 4
MIN_FRAME_LENGTH = FRAME_HEADER_BYTES - FRAME_LENGTH_BYTES
"""The smallest value of the length field: an empty body."""

END = 0x01
"""Flag: the sender's last frame of this request."""
ERROR = 0x02
"""Flag, server to client: the body is an `Error`."""
CANCEL = 0x02
"""Flag, client to server: drop the request."""

HELLO = 0x00
"""Method: the server's first frame, with the id 0 and a `Hello`."""
PING = 0xF0
"""Method: answered with its own body."""


class ProtocolError(ValueError):
    """The sender's fault: the rest of the stream of frames cannot be read."""


def frame(request_id: int, method: int, flags: int, body: bytes) -> bytes:
    return FRAME.pack(len(body) + MIN_FRAME_LENGTH, request_id, method, flags) + body


class FrameReader:
    """Cuts a stream of bytes into frames: `feed` what was received, then iterate.

    Iteration yields `(request_id, method, flags, body)` for each complete frame and, after the
    frames before it, raises ProtocolError at a length that is too small or too large. At most
    `max_frame_bytes` and one received piece are held of an incomplete frame. Each byte is copied a
    fixed number of times, however small the pieces are."""

    def __init__(self, max_frame_bytes: int) -> None:
        self.max_frame_bytes = max_frame_bytes
        """The largest value of the length field that is accepted."""
        self._data: bytes | bytearray = b""
        self._pos = 0
        self._needed_bytes = 0

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        held = self._data
        if self._pos == len(held):
            self._data = data
        elif type(held) is bytearray and self._pos == 0:
            held += data
            return
        else:
            self._data = bytearray(held[self._pos :]) + data
        self._pos = 0

    def __iter__(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Hot path: one pass over the data, one copy of each body."""
        if len(self._data) < self._needed_bytes:
            return
        data = self._data = bytes(self._data)
        size_bytes = len(data)
        pos = self._pos
        unpack_from = FRAME.unpack_from
        max_frame_bytes = self.max_frame_bytes
        self._needed_bytes = 0
        while size_bytes - pos >= 10:
            length, request_id, method, flags = unpack_from(data, pos)
            if not 6 <= length <= max_frame_bytes:
                raise ProtocolError(f"frame length {length} is not in 6 to {max_frame_bytes}")
            stop = pos + 4 + length
            if stop > size_bytes:
                self._needed_bytes = stop - pos
                return
            body = data[pos + 10 : stop]
            self._pos = pos = stop
            yield request_id, method, flags, body
        self._needed_bytes = FRAME_HEADER_BYTES if pos < size_bytes else 0
