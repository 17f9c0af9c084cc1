"""The frames of protocol version 2, which members speak to each other: those of `frames.py` with
checksums. TCP's own checksum misses one damaged packet in 65,536, and damage in memory always.

A frame, all integers unsigned and little-endian:

    0   4  length: the number of bytes behind this field, 14 and the size of the body
    4   4  request id
    8   1  method
    9   1  flags
    10  4  CRC-32 (as in zlib) of bytes 0 to 9
    14  4  CRC-32 of bytes 0 to 9 and the body
    18     body

The first checksum is looked at as soon as the header is there. Without it a receiver would believe
a damaged length, and wait for up to 64 MiB that do not come.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from zlib import crc32

from etcdlite.frames import FRAME, FRAME_LENGTH_BYTES, FrameReader, ProtocolError

VERSION = 2
"""In the handshake."""

CHECKSUMS = Struct("<II")
_HEADER = Struct("<IIBBII")
HEADER_BYTES = _HEADER.size
_PLAIN_BYTES = FRAME.size
MIN_LENGTH = HEADER_BYTES - FRAME_LENGTH_BYTES


def header(request_id: int, method: int, flags: int, body: bytes) -> bytes:
    """What goes before a body."""
    plain = FRAME.pack(len(body) + MIN_LENGTH, request_id, method, flags)
    checksum = crc32(plain)
    return plain + CHECKSUMS.pack(checksum, crc32(body, checksum))


def frame(request_id: int, method: int, flags: int, body: bytes) -> bytes:
    return header(request_id, method, flags, body) + body


class PeerFrameReader(FrameReader):
    """As `FrameReader`. A header or a frame that fails its checksum is a ProtocolError, too."""

    def __iter__(self) -> Iterator[tuple[int, int, int, bytes]]:
        if len(self._data) < self._needed_bytes:
            return
        data = self._data = bytes(self._data)
        at = self._pos
        self._needed_bytes = 0
        unpack_from = _HEADER.unpack_from
        while len(data) - at >= HEADER_BYTES:
            length, request_id, method, flags, of_header, of_frame = unpack_from(data, at)
            checksum = crc32(data[at : at + _PLAIN_BYTES])
            if checksum != of_header:
                raise ProtocolError("the header of a frame fails its checksum")
            if not MIN_LENGTH <= length <= self.max_frame_bytes:
                raise ProtocolError(
                    f"frame length {length} is not in {MIN_LENGTH} to {self.max_frame_bytes}"
                )
            end = at + FRAME_LENGTH_BYTES + length
            if end > len(data):
                self._needed_bytes = end - at
                return
            body = data[at + HEADER_BYTES : end]
            if crc32(body, checksum) != of_frame:
                raise ProtocolError("a frame fails its checksum")
            self._pos = at = end
            yield request_id, method, flags, body
        self._needed_bytes = HEADER_BYTES if at < len(data) else 0
