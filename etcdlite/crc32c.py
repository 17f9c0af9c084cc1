"""CRC-32C (Castagnoli), the checksum in etcd's hashes.

The package crc32c (Debian: python3-crc32c) computes it. Without it a table does, in Python, which
takes 10 s for 100 MB. `load` returns the faster one that is installed, and the size of a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

_POLYNOMIAL = 0x82F63B78

TABLE_STEP_BYTES = 16 << 10
LIBRARY_STEP_BYTES = 1 << 20
"""The bytes that each computes in about a millisecond."""


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


def load() -> tuple[Callable[[bytes, int], int], int]:
    """(function, step): a function with the arguments of `by_table`, and the most bytes to give it
    in one step of the loop."""
    try:
        from crc32c import crc32c  # Imported only here: few members are asked for such a hash.
    except ImportError:
        return by_table, TABLE_STEP_BYTES
    return crc32c, LIBRARY_STEP_BYTES
