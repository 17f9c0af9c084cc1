"""Ranges: the answer to a RangeRequest, and what it will take, read from a `Store` in steps.

The rules are etcd's. An answer is as of one revision, however the store changes between the steps:
while it is read, that revision is pinned. Records go into the answer as they stand in the data
file. Answers without values, filters and sorting by numbers need only the index; records are
decoded to sort by value, or where the index has no numbers: for superseded versions.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from operator import itemgetter
from typing import Any

from etcdlite import proto
from etcdlite.errors import RESOURCE_EXHAUSTED, EtcdError
from etcdlite.limits import Limits
from etcdlite.mvcc import Store, encode_key_value
from etcdlite.proto import varint
from etcdlite.storage.index import Numbered
from etcdlite.storage.steps import join_steps, sort_steps

MAX_REVISION = (1 << 63) - 1
_NO_LIMIT = 1 << 62
SAMPLE_KEYS = 32
"""The size of an answer is estimated from its first records, this many at most."""

MAX_COUNTED = 64
"""Counts that are remembered (`Store.counted`)."""
MAX_COUNTED_BYTES = 4096
"""A count is remembered if the keys that bound it have no more bytes."""

_SORT_FIELDS = ("key", "version", "create_revision", "mod_revision", "value")


class _Fields(dict[int, bytes]):
    """The tag and the length before a record in a RangeResponse, by the size of the record."""

    def __missing__(self, size_bytes: int) -> bytes:
        return b"\x12" + varint(size_bytes)


_FIELDS = _Fields((size, b"\x12" + varint(size)) for size in range(1024))


class AnswerTooLarge(EtcdError):
    """The answer would have more than `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            RESOURCE_EXHAUSTED,
            f"etcdlite: the answer has more than {limit_bytes} bytes: use limit to get it in parts",
        )
        self.request: proto.RangeRequest | None = None
        """The request, if its session can answer it with `streamed`."""


def decode_range(buf: bytes, pos: int = 0, end: int | None = None) -> proto.RangeRequest:
    """The RangeRequest in `buf[pos:end]`. Raises DecodeError."""
    # Hot path: a key of up to 127 bytes and nothing else. The general decoder takes 1 us more.
    if end is not None:
        size = end - pos - 2
        if 0 < size < 128 and buf[pos] == 0x0A and buf[pos + 1] == size:
            request: proto.RangeRequest = object.__new__(proto.RangeRequest)
            request.key = buf[pos + 2 : end]
            return request
    return proto.RangeRequest.decode(buf, pos, end)


class _Answer:
    """An answer that is being read. Its records may have `limit_bytes` at most."""

    __slots__ = ("_limit_bytes", "_limits", "pieces", "ranked", "size_bytes")

    def __init__(self, head: bytes, limit_bytes: int, limits: Limits) -> None:
        self.pieces = [head]
        self.ranked: list[tuple[Any, bytes]] = []
        """(rank, key) of what is to be sorted."""
        self.size_bytes = 0
        """Of the records."""
        self._limit_bytes = limit_bytes
        self._limits = limits

    def add(self, kvs: Sequence[bytes | memoryview]) -> None:
        """Append records. Raises AnswerTooLarge."""
        piece = b"".join(_with_fields(kvs))
        self.pieces.append(piece)
        self.size_bytes += len(piece)
        self.check(0)

    def check(self, more_bytes: int) -> None:
        """Raise AnswerTooLarge if there is no room for `more_bytes` of records."""
        if self.size_bytes + more_bytes > self._limit_bytes:
            raise AnswerTooLarge(self._limits.max_answer_bytes)


def key_range(key: bytes, range_end: bytes) -> tuple[bytes, bytes | None]:
    """etcd's range as [start, end). No range_end means one key, b"\\0" means no upper bound."""
    if not range_end:
        return key, key + b"\0"
    if range_end == b"\0":
        return key, None
    return key, range_end


def is_plain(request: proto.RangeRequest) -> bool:
    """The answer to a RangeRequest is the first records of the range, unchanged."""
    return not (
        request.keys_only
        or request.count_only
        or filters(request)
        or (request.limit > 0 and _order(request))
    )


def is_quick(request: proto.RangeRequest) -> bool:
    """The index of the present has the answer, however large the range is: its count or first key.
    Later it is of the past, and to count that takes longer with each change."""
    is_few = request.count_only or request.limit == 1
    return is_few and request.revision <= 0 and not (filters(request) or _order(request))


def can_stream(request: proto.RangeRequest) -> bool:
    """The records of the answer stand in the order of keys, so it can be measured and then sent
    piece by piece. (A sorted one must be held until it is sorted.)"""
    return not request.count_only and _order(request) in ("", "key")


def is_surely_large(store: Store, request: proto.RangeRequest, size_bytes: int) -> bool:
    """Whether the answer is estimated, from its first records, at more than `size_bytes`: then it
    is not worth beginning to read it as a whole."""
    start, end = key_range(request.key, request.range_end)
    count = store.index.heads.count(start, end)
    if request.limit > 0:
        count = min(count, request.limit)
    if count <= store.limits.range_step_keys or not is_plain(request):
        return False
    sample, _ = store.index.scan(start, end, None, SAMPLE_KEYS)
    return count * sum([length for _, length in sample]) > size_bytes * len(sample)


def streamed(
    store: Store, request: proto.RangeRequest, revision: int, head: bytes, piece_bytes: int
) -> Iterator[bytes | int]:
    """The answer to a request that `can_stream`, as of `revision`, which is pinned, in bounded
    memory: empty pieces while it is measured; then its length; then pieces of about `piece_bytes`,
    which begin with `head`. Raises DataDamaged."""
    limit = request.limit if request.limit > 0 else _NO_LIMIT
    count = found = 0
    size = len(head)
    for seen, records, _ in _pages(store, request, revision, store.limits.step_bytes):
        lengths = [length for _, length in records[: max(0, limit - found)]]
        size += sum(lengths) + sum([len(_FIELDS[length]) for length in lengths])
        count += seen
        found += len(records)
        yield b""
    tail = _tail(found > limit, count)
    yield size + len(tail)
    left = min(found, limit)
    for _, records, _ in _pages(store, request, revision, piece_bytes):
        kvs = _read(store, request, records[:left])
        left -= len(kvs)
        yield b"".join([head, *_with_fields(kvs), b"" if left else tail])
        head = b""
        if not left:
            return


def piece(
    store: Store, request: proto.RangeRequest, revision: int, piece_bytes: int, before: int
) -> tuple[bytes, int, bytes | None]:
    """About `piece_bytes` of the answer to a request for a whole range, as of `revision`, after
    `before` keys in earlier pieces: the piece, which is a RangeResponse without header, the number
    of keys so far, and the key of the next piece; None: this is the last. Raises DataDamaged."""
    seen, records, rest = next(_pages(store, request, revision, piece_bytes))
    count = before + seen
    tail = b"" if rest else _tail(False, count)
    return b"".join([*_with_fields(_read(store, request, records)), tail]), count, rest and rest[0]


def _pages(
    store: Store, request: proto.RangeRequest, revision: int, page_bytes: int, room: int = _NO_LIMIT
) -> Iterator[tuple[int, list[tuple[Any, int]], tuple[bytes, bytes | None] | None]]:
    """Pages of about `page_bytes` of the first `room` keys of the range, ascending or descending:
    (number of keys, records, rest). The records are those that pass the filters: (location in the
    data, length), or (record, length) without values. `rest` is the range after a page, or None."""
    start, end = key_range(request.key, request.range_end)
    bounds = filters(request)
    descends = bool(_order(request))
    keys_only = request.keys_only
    records: list[tuple[Any, int]]
    while room > 0:
        most = min(store.limits.range_step_keys, room)
        if bounds or keys_only or descends:
            entries: list[Any]
            entries, cursor = store.scan_numbers(start, end, revision, most, page_bytes, descends)
            seen = len(entries)
            if bounds or keys_only:
                entries = _within(_numbered(store, entries), bounds)
            if keys_only:
                records = [(kv, len(kv)) for kv in _without_values(entries)]
            else:
                records = [entry[2:] for entry in entries]
        else:
            records, cursor = store.scan(start, end, revision, most, page_bytes)
            seen = len(records)
        if cursor is None:
            yield seen, records, None
            return
        start, end = (start, cursor) if descends else (cursor, end)
        room -= seen
        yield seen, records, (start, end)


def _read(
    store: Store, request: proto.RangeRequest, records: list[tuple[Any, int]]
) -> list[bytes | memoryview]:
    """The records of a page, as they stand in the answer."""
    return [kv for kv, _ in records] if request.keys_only else store.data.read_all(records)


def range_steps(
    store: Store,
    request: proto.RangeRequest,
    revision: int | None = None,
    head: bytes = b"",
    limit_bytes: int | None = None,
) -> Generator[None, None, bytes]:
    """Answer a RangeRequest: returns `head` and the encoded RangeResponse without its header.

    The answer is as of the revision that the request names, else `revision`, else the store's when
    the first step runs. Raises EtcdError Compacted or FutureRev; AnswerTooLarge if its records have
    more than `limit_bytes` (None: `max_answer_bytes`); DataDamaged."""
    store.check_revision(request.revision)
    if request.revision > 0:
        revision = request.revision
    elif revision is None:
        revision = store.revision
    if limit_bytes is None:
        limit_bytes = store.limits.max_answer_bytes
    answer = _Answer(head, limit_bytes, store.limits)
    store.pinned.append(revision)
    try:
        if request.count_only:
            whole = key_range(request.key, request.range_end)
            count = yield from _count_steps(store, *whole, revision)
            return head + _tail(False, count)
        read = _listed_steps if _order(request) in ("", "key") else _sorted_steps
        count, found = yield from read(store, request, revision, answer)
        answer.pieces.append(_tail(0 < request.limit < found, count))
        if answer.size_bytes > store.limits.whole_answer_bytes:
            return (yield from join_steps(answer.pieces, store.limits))
        return b"".join(answer.pieces)
    finally:
        store.pinned.remove(revision)
        store.leave(answer.ranked)


def size_steps(
    store: Store, start: bytes, end: bytes | None, revision: int, limit: int, enough_bytes: int
) -> Generator[None, None, int]:
    """Bytes of the first `limit` (0: of all) records in [start, end) as of `revision`. Stops at
    `enough_bytes`. Reads only the index."""
    size = 0
    left = limit or _NO_LIMIT
    step_keys = store.limits.range_step_keys
    cursor: bytes | None = start
    while cursor is not None and left and size < enough_bytes:
        records, cursor = store.scan(cursor, end, revision, min(step_keys, left), enough_bytes)
        left -= len(records)
        size += sum(length for _, length in records)
        if cursor is not None:
            yield
    return size


def _listed_steps(
    store: Store, request: proto.RangeRequest, revision: int, answer: _Answer
) -> Generator[None, None, tuple[int, int]]:
    """Append the records in the order of their keys, ascending or descending. Returns how many keys
    are in the range, and how many of them, up to one more than the limit, pass the filters."""
    limit = request.limit if request.limit > 0 else _NO_LIMIT
    room = _NO_LIMIT if filters(request) else limit + 1
    count = found = 0
    for seen, records, rest in _pages(store, request, revision, store.limits.step_bytes, room):
        answer.add(_read(store, request, records[: max(0, limit - found)]))
        count += seen
        found += len(records)
        if rest is None:
            break
        yield
        if count >= room or found > limit:
            # Enough is read. What is left is to count the rest of the range.
            count += yield from _count_steps(store, *rest, revision)
            break
    return count, found


def _sorted_steps(
    store: Store, request: proto.RangeRequest, revision: int, answer: _Answer
) -> Generator[None, None, tuple[int, int]]:
    """Append the records in another order; see `_listed_steps`."""
    limits = store.limits
    bounds = filters(request)
    order = _order(request)
    limit = request.limit if request.limit > 0 else _NO_LIMIT
    # As in etcd, a sort target without a direction sorts only what the limit lets through.
    room = _NO_LIMIT if bounds or request.sort_order else limit + 1
    count = found = ranked_bytes = 0
    ranked = answer.ranked
    entries: list[Any]
    cursor: bytes | None
    cursor, end = key_range(request.key, request.range_end)
    while cursor is not None:
        if count >= room:
            count += yield from _count_steps(store, cursor, end, revision)
            break
        most = min(limits.range_step_keys, room - count)
        if order != "value":
            entries, cursor = store.scan_numbers(cursor, end, revision, most, limits.step_bytes)
            count += len(entries)
            entries = _within(_numbered(store, entries), bounds)
            found += len(entries)
            ranked += [(entry[1][_NUMBERS[order]], entry[0]) for entry in entries]
        else:
            records, cursor = store.scan(cursor, end, revision, most)
            count += len(records)
            for location, length in records:
                message = proto.KeyValue.decode(store.data.read(location, length))
                if all(low <= getattr(message, name) <= high for name, low, high in bounds):
                    ranked.append((message.value, message.key))
                    ranked_bytes += length
                    found += 1
        if limit <= limits.sort_step_items and len(ranked) >= 2 * limit + limits.sort_step_items:
            # No more than the limit counts. The sort is stable, so equal ranks stay in key order.
            descends = request.sort_order == proto.RangeRequest.DESCEND
            ranked[:] = sorted(ranked, key=itemgetter(0), reverse=descends)[:limit]
        answer.check(ranked_bytes)
        store.free_some()  # Maintenance may have to wait, for space on the disk for example.
        if cursor is not None:
            yield
    yield from _append_ranked(store, request, revision, answer)
    return count, found


_NUMBERS = {"mod_revision": 0, "create_revision": 1, "version": 2}
"""The places of the fields in the numbers of `Store.scan_numbers`."""


def _numbered(store: Store, entries: list[Numbered]) -> list[Any]:
    """The entries of `Store.scan_numbers`, with the numbers of superseded versions, too."""
    return [entry if entry[1] is not None else _decoded(store, *entry) for entry in entries]


def _decoded(store: Store, key: bytes, _: Any, location: int, length: int) -> Numbered:
    kv = proto.KeyValue.decode(store.data.read(location, length))
    return key, (kv.mod_revision, kv.create_revision, kv.version, kv.lease), location, length


def _within(entries: list[Any], bounds: list[tuple[str, int, int]]) -> list[Any]:
    """The entries whose numbers pass the filters."""
    if not bounds:
        return entries
    places = [(_NUMBERS[name], low, high) for name, low, high in bounds]
    return [
        entry
        for entry in entries
        if all(low <= entry[1][place] <= high for place, low, high in places)
    ]


def _without_values(entries: list[Any]) -> list[bytes]:
    """The records of numbered entries, without their values."""
    return [
        encode_key_value(key, varint(create), varint(mod), version, b"", lease)
        for key, (mod, create, version, lease), _, _ in entries
    ]


def _append_ranked(
    store: Store, request: proto.RangeRequest, revision: int, answer: _Answer
) -> Generator[None, None, None]:
    """Sort what is ranked, and append the records, up to the limit."""
    limits = store.limits
    limit = request.limit if request.limit > 0 else _NO_LIMIT
    descends = request.sort_order == proto.RangeRequest.DESCEND
    ordered = yield from sort_steps(answer.ranked, itemgetter(0), descends, limits)
    store.leave(answer.ranked)
    answer.ranked = ordered
    ordered.reverse()
    kvs: list[bytes] = []
    size = 0
    for step in range(1, min(limit, len(ordered)) + 1):
        _, key = ordered.pop()
        if request.keys_only:
            entries, _ = store.scan_numbers(key, key + b"\0", revision, 1, 1)
            kvs += _without_values(_numbered(store, entries))
        else:
            record = store.get(key, revision)
            assert record is not None, "the range was read a moment ago"
            kvs.append(record)
        size += len(kvs[-1])
        if step % limits.range_step_keys == 0 or size >= limits.step_bytes:
            size = 0
            answer.add(kvs)
            kvs.clear()
            yield
    answer.add(kvs)


def _count_steps(
    store: Store, start: bytes, end: bytes | None, revision: int
) -> Generator[None, None, int]:
    count, spans = store.count(start, end, revision)
    for span in spans:
        count += yield from _span_steps(store, *span, revision)
    return count


def _span_steps(
    store: Store, start: bytes, end: bytes | None, revision: int
) -> Generator[None, None, int]:
    """Count the keys of [start, end) one by one, as of `revision`; or those between the start of an
    earlier count and `start`, if they are fewer. So the pages of a list count a page each."""
    index, counted = store.index, store.counted
    earlier, known = counted.get((revision, end), (start, -1))
    is_near = known >= 0 and earlier <= start
    is_near = is_near and index.visits(earlier, start) < index.visits(start, end)
    low, high = (earlier, start) if is_near else (start, end)
    total = 0
    cursor: bytes | None = low
    while cursor is not None:
        some, cursor = index.count_some(cursor, high, revision)
        total += some
        if cursor is not None:
            yield
    if is_near:
        total = known - total
    # The revision that is being written may still change.
    if revision <= store.revision and len(start) + len(end or b"") <= MAX_COUNTED_BYTES:
        counted.pop((revision, end), None)
        counted[revision, end] = start, total
        if len(counted) > MAX_COUNTED:
            del counted[next(iter(counted))]
    return total


def _with_fields(kvs: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """Records with their tags and lengths, as parts of a RangeResponse."""
    parts: list[bytes | memoryview] = [b""] * (2 * len(kvs))
    parts[::2] = map(_FIELDS.__getitem__, map(len, kvs))
    parts[1::2] = kvs
    return parts


def _tail(more: bool, count: int) -> bytes:
    """`more` and `count` of a RangeResponse."""
    return (b"\x18\x01" if more else b"") + (b"\x20" + varint(count) if count else b"")


def filters(request: proto.RangeRequest) -> list[tuple[str, int, int]]:
    """(field, lowest, highest) of the filters that a RangeRequest sets."""
    bounds = (
        ("mod_revision", request.min_mod_revision, request.max_mod_revision or MAX_REVISION),
        (
            "create_revision",
            request.min_create_revision,
            request.max_create_revision or MAX_REVISION,
        ),
    )
    return [bound for bound in bounds if bound[1] or bound[2] != MAX_REVISION]


def _order(request: proto.RangeRequest) -> str:
    """The field to sort by; "" if the order is that of the keys, ascending."""
    descends = request.sort_order == proto.RangeRequest.DESCEND
    return _SORT_FIELDS[request.sort_target] if request.sort_target or descends else ""
