"""A quick decoder of transactions that only put values."""

from __future__ import annotations

from typing import Any

from etcdlite import proto

MAX_PUTS = 1_000
"""More are left to the general decoder, which counts fields."""


def decode_puts(buf: bytes, pos: int, end: int) -> Any:
    """As `TxnRequest.decode`, where `buf[pos]` is 0x12; None if there is anything but puts of keys
    of up to 127 bytes and values of up to 16 KB without options. Raises IndexError if the bytes end
    early.

    One flat loop: it takes a fifth of the time of the general decoder. Most puts have a key and a
    value as long as those of the put before. Then the bytes before the key (`head`) and those
    between key and value (`middle`) are the same, too, and need not be decoded.
    """
    new, put_class, op_class = object.__new__, proto.PutRequest, proto.RequestOp
    ops: list[Any] = []
    at = pos
    head = middle = b"\xff"  # Matches no put.
    key_size = value_size = 0
    # success { request_put { key value } }. A length has a second byte if the first one is above
    # 127, and more if that is, too.
    while at < end and len(ops) < MAX_PUTS:
        key_at = at + len(head)
        value_tag = key_at + key_size
        if buf.startswith(head, at) and buf.startswith(middle, value_tag):
            value_at = value_tag + len(middle)
            put = new(put_class)
            put.key = buf[key_at:value_tag]
            at = value_at + value_size
            put.value = buf[value_at:at]
            op = new(op_class)
            op.request_put = put
            ops.append(op)
            continue
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
        if buf[value_tag] != 0x12 or value_at + value_size != put_end:
            return None
        # The next turn of the loop takes this put with them.
        head, middle = buf[at : key_tag + 2], buf[value_tag:value_at]
    if at != end or not ops:
        return None
    txn = new(proto.TxnRequest)
    txn.success = ops
    return txn
