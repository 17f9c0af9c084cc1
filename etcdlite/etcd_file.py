"""The file of a backup in etcd's format, written from what `etcd_backup.py` took of a store.

It needs no store, only the open data files, so another process can write it (`backup_process.py`).
That process gets plain values, which `marshal` can write, and imports this module, so this module
imports little.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

from etcdlite import bolt
from etcdlite.proto import read_varint
from etcdlite.storage.history import Changes, History
from etcdlite.storage.layout import TOMBSTONE

DIGEST_BYTES = 32
BLOCK_BYTES = 512

REVISION = struct.Struct(">QsQ")
REVISION_BYTES = REVISION.size
_TOMBSTONE = b"t"

STEP_ITEMS = 256
"""Items of one step."""


class Records(NamedTuple):
    """A bucket of what the store has in memory, sorted."""

    name: bytes
    keys: list[bytes]
    values: list[bytes]
    size_bytes: int
    most_key_bytes: int


def contents(history: History, buckets: Iterable[Records]) -> tuple[int, Iterator[bytes]]:
    """The size of the backup, and its bytes, to be taken once. An empty part is a pause. `history`
    was scanned. Raises DataDamaged, OSError while the bytes are taken."""
    most_key_bytes = REVISION_BYTES + len(_TOMBSTONE)
    size = history.size_bytes + history.count * most_key_bytes
    items = map(items_of, history.changes())
    keys = bolt.Bucket(b"key", items, history.count, size, most_key_bytes)
    others = [
        bolt.Bucket(b.name, _items(b.keys, b.values), len(b.keys), b.size_bytes, b.most_key_bytes)
        for b in buckets
    ]
    size_bytes, parts = bolt.write([keys, *others])
    return size_bytes + DIGEST_BYTES, _with_digest(parts)


def _with_digest(parts: Iterator[bytes]) -> Iterator[bytes]:
    import hashlib  # It loads OpenSSL, which takes 3.5 MB and 5 ms; HashKV does without.

    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
        yield part
    yield digest.digest()


def _items(keys: list[bytes], values: list[bytes]) -> Iterator[bolt.Items]:
    for at in range(0, len(keys), STEP_ITEMS):
        yield keys[at : at + STEP_ITEMS], values[at : at + STEP_ITEMS]


def hand_over(history: History, buckets: Sequence[Records]) -> Iterator[Any]:
    """What another process needs for `contents`: small values, because the interpreter does nothing
    else while it writes one."""
    return chain(history.hand_over(), [len(buckets)], *map(_hand_over, buckets))


def _hand_over(bucket: Records) -> Iterator[Any]:
    yield bucket.name, bucket.size_bytes, bucket.most_key_bytes
    yield from _items(bucket.keys, bucket.values)
    yield None


def take_over(take: Callable[[], Any]) -> tuple[History, list[Records]]:
    """The arguments of `contents` in that process. `take` returns the next value of `hand_over`."""
    history = History.take_over(take)
    buckets = []
    for _ in range(take()):
        name, size_bytes, most_key_bytes = take()
        bucket = Records(name, [], [], size_bytes, most_key_bytes)
        for keys, values in iter(take, None):
            bucket.keys.extend(keys)
            bucket.values.extend(values)
        buckets.append(bucket)
    return history, buckets


def items_of(changes: Changes) -> tuple[list[bytes], Sequence[bytes]]:
    """Keys and values of changes in the bucket `key`."""
    revisions, subs, kinds, bodies = changes
    keys = list(map(REVISION.pack, revisions, repeat(b"_"), subs))
    if TOMBSTONE not in kinds:
        return keys, bodies
    values = list(bodies)
    for at, kind in enumerate(kinds):
        if kind == TOMBSTONE:
            keys[at] += _TOMBSTONE
            size, begin = read_varint(values[at], 1, len(values[at]))
            values[at] = values[at][: begin + size]  # The key, which is the first field.
    return keys, values
