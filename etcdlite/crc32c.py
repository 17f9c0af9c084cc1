"""CRC-32C (Castagnoli), the checksum in etcd's hashes.

The package crc32c (Debian: python3-crc32c) computes it. Without it a table does, in Python, which
takes 10 s for 100 MB.
"""

from __future__ import annotations

import functools

_POLYNOMIAL = 0x82F63B78


@functools.cache
def _table() -> list[int]:
    table = []
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return table


def by_table(data: bytes, crc: int = 0) -> int:
    """Continue the checksum `crc` with `data`, by the table."""
    table = _table()
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


STEP_BYTES = 1 << 20
"""The bytes that `update` computes in about a millisecond."""

try:
    from crc32c import crc32c as update  # The arguments are those of `by_table`.
except ImportError:
    update, STEP_BYTES = by_table, 16 << 10  # type: ignore[assignment]
