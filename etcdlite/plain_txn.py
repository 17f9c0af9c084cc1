"""Transactions that only put values: `Puts`, and its quick decoder."""

from __future__ import annotations

import struct
from functools import cached_property
from typing import Any

from etcdlite import proto

MAX_PUTS = 1_000
"""More are left to the general decoder, which counts fields."""


def _success(txn: Puts) -> list[proto.Message]:
    return [
        proto.RequestOp(request_put=proto.PutRequest(key=key, value=value))
        for key, value, _ in txn.puts
    ]


class Puts(proto.TxnRequest):
    """A TxnRequest of this kind. The messages of its operations are made only when something asks
    for them, which is rare."""

    success: Any = cached_property(_success)

    def __init__(self, puts: list[tuple[bytes, bytes, int]]) -> None:
        """As for `Store.put_all`: key, value, and 0 for no lease."""
        self.puts = puts


def decode_puts(buf: bytes, pos: int, end: int) -> Puts | None:
    """As `TxnRequest.decode`, where `buf[pos]` is 0x12; None if there is anything but puts of keys
    of up to 127 bytes and values of up to 16 KB without options. Raises IndexError if the bytes end
    early.

    Flat: it takes a tenth of the time of the general decoder. Most puts have a key and a value as
    long as those of the put before. Then the bytes before the key (`head`) and those between key
    and value (`middle`) are the same, too, and a run of such puts is an array of structs."""
    puts: list[tuple[bytes, bytes, int]] = []
    at = pos
    # success { request_put { key value } }. A length has a second byte if the first one is above
    # 127, and more if that is, too.
    while at < end and len(puts) < MAX_PUTS:
        size = buf[at + 1]
        inner = at + 2
        if size > 127:
            size += (buf[inner] << 7) - 128
            inner += 1
            if buf[inner - 1] > 127:
                return None
        if buf[at] != 0x12 or buf[inner] != 0x12:
            return None
        put_end = inner + size
        size = buf[inner + 1]
        key_tag = inner + 2
        if size > 127:
            size += (buf[key_tag] << 7) - 128
            key_tag += 1
            if buf[key_tag - 1] > 127:
                return None
        key_size = buf[key_tag + 1]
        if key_tag + size != put_end or buf[key_tag] != 0x0A or key_size > 127:
            return None
        value_tag = key_tag + 2 + key_size
        value_size = buf[value_tag + 1]
        value_at = value_tag + 2
        if value_size > 127:
            value_size += (buf[value_at] << 7) - 128
            value_at += 1
            if buf[value_at - 1] > 127:
                return None
        if buf[value_tag] != 0x12 or value_at + value_size != put_end or put_end > end:
            return None
        head = buf[at : key_tag + 2]
        if not buf.startswith(head, put_end):
            puts.append((buf[key_tag + 2 : value_tag], buf[value_at:put_end], 0))
            at = put_end
            continue
        middle = buf[value_tag:value_at]
        size = put_end - at
        count = min((end - at) // size, MAX_PUTS - len(puts))
        layout = f"{len(head)}s{key_size}s{len(middle)}s{value_size}s"
        run = memoryview(buf)[at : at + count * size]
        for before, key, between, value in struct.iter_unpack(layout, run):
            if before != head or between != middle:
                break
            puts.append((key, value, 0))
            at += size
    return Puts(puts) if at == end and puts else None
