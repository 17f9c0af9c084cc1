"""The bytes of watch responses: their fields one by one, which the watches of a key or range share.

A `WatchResponse` is a header, the id of the watch, and either events or what happened to the watch.
The parts are concatenated in this order, which is that of the field numbers.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import chain

from etcdlite.limits import Limits
from etcdlite.proto import varint, varint64
from etcdlite.storage.steps import join_steps

CREATED = b"\x18\x01"
CANCELED = b"\x20\x01"

_HEADER = b"\x0a"
_WATCH_ID = b"\x10"
_COMPACT_REVISION = b"\x28"
_CANCEL_REASON = b"\x32"
_FRAGMENT = b"\x38\x01"
_EVENT = b"\x5a"

# Fields of an Event.
_IS_DELETE = b"\x08\x01"
_KV = b"\x12"
_PREV_KV = b"\x1a"


def header_field(content: bytes) -> bytes:
    return _HEADER + varint(len(content)) + content


def id_field(watch_id: int) -> bytes:
    # A negative int64 is encoded as its two's complement; 0 is left out.
    return _WATCH_ID + varint64(watch_id) if watch_id else b""


def compacted(revision: int) -> bytes:
    """The watch ends because history before `revision` is compacted."""
    return CANCELED + _COMPACT_REVISION + varint(revision)


def canceled(reason: str) -> bytes:
    """The watch ends for this reason."""
    text = reason.encode()
    return CANCELED + _CANCEL_REASON + varint(len(text)) + text


def response_steps(
    prefix: bytes, batch: Sequence[bytes], limit_bytes: int, limits: Limits
) -> Generator[None, None, list[bytes]]:
    """The responses with the events of a large `batch`, in steps. With `limit_bytes`, for a watch
    that asked for fragments, each response is smaller unless one event is not."""
    if not limit_bytes:
        return [(yield from join_steps(chain((prefix,), batch), limits))]
    limit = limit_bytes - len(prefix) - len(_FRAGMENT)
    bodies = []
    begin = size = 0
    for at, encoded in enumerate(batch):
        if at > begin and size + len(encoded) >= limit:
            bodies.append(b"".join((prefix, _FRAGMENT, *batch[begin:at])))
            yield
            begin, size = at, 0
        size += len(encoded)
    bodies.append(b"".join((prefix, *batch[begin:])))
    return bodies


def encode_event(is_delete: bool, kv: bytes, prev_kv: bytes | None) -> bytes:
    """An Event as a field of a WatchResponse."""
    size = len(kv)
    if prev_kv is None and not is_delete and size < len(_PUT_HEADS):
        return _PUT_HEADS[size] + kv
    parts = [_KV, varint(size), kv]
    if is_delete:
        parts.insert(0, _IS_DELETE)
    if prev_kv is not None:
        parts += (_PREV_KV, varint(len(prev_kv)), prev_kv)
    event = b"".join(parts)
    return b"".join((_EVENT, varint(len(event)), event))


def _put_head(size: int) -> bytes:
    head = _KV + varint(size)
    return _EVENT + varint(len(head) + size) + head


_PUT_HEADS = [_put_head(size) for size in range(2048)]
"""What stands before the KeyValue in the event of a put, by the size of the KeyValue."""
