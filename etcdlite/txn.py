"""What the KV requests mean: validation, put, delete and transactions over a `Store`.

The rules are etcd's. A request is validated once, where it comes in (`check_*`); what depends on
the state of the store is checked again when it is applied, before anything is written, so that a
refused transaction leaves no trace. The compares of a transaction, nested ones included, see the
state before it; its reads see what it wrote so far.

One rule is stricter than etcd's: a key may appear in one write of a transaction only. etcd says so,
too, but overlooks it when a nested transaction puts the key and a later one deletes it, and when
the delete is one of all keys from some key on (range_end "\\0"); it then makes two events of one
key with the same revision.

What a write changes never depends on what it reads only to answer (`prev_kv`, ranges). So when that
is damaged here, or is too large for an answer, the write is applied as on every other member, and
then answered with an error: `Unanswerable`. What is too large is refused before the first change if
the index alone, which is the same on all members, can tell.

Answers are encoded as they will travel, without the header, which is the first field and is put in
front by whoever answers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import islice
from typing import Any

from sortedcontainers import SortedDict, SortedList

from etcdlite import proto
from etcdlite.errors import EtcdError, error
from etcdlite.mvcc import Store
from etcdlite.proto import varint
from etcdlite.ranges import AnswerTooLarge, is_plain, key_range, range_steps, size_steps
from etcdlite.storage.data import DataDamaged
from etcdlite.storage.index import HEAD
from etcdlite.storage.steps import join_steps

MAX_TOTAL_OPS = 8192
"""Compares and operations of a transaction with all nested ones. etcd, which limits each list and
the depth, has no such limit; without one a request could keep the member busy for seconds."""

MAX_SMALL_OPS = 16
"""Compares, and puts, of a transaction that is applied in one step."""


class Unanswerable(Exception):
    """A write was applied, whole; `failure` is its answer, and `damage` why, if that is why."""

    def __init__(self, why: EtcdError | DataDamaged) -> None:
        super().__init__(str(why))
        self.damage = why if isinstance(why, DataDamaged) else None
        self.failure = (
            error("Corrupt")
            if isinstance(why, DataDamaged)
            else EtcdError(why.code, f"{why.text}. What was to be written is written")
        )


# Validation, without the store. Each raises EtcdError.


def check_range(request: proto.RangeRequest) -> None:
    if not request.key:
        raise error("EmptyKey")
    if not (0 <= request.sort_order <= 2 and 0 <= request.sort_target <= 4):
        raise error("InvalidSortOption")


def check_put(request: proto.PutRequest) -> None:
    if not request.key:
        raise error("EmptyKey")
    if request.ignore_value and request.value:
        raise error("ValueProvided")
    if request.ignore_lease and request.lease:
        raise error("LeaseProvided")


def check_delete_range(request: proto.DeleteRangeRequest) -> None:
    if not request.key:
        raise error("EmptyKey")


def check_txn(request: proto.TxnRequest, max_ops: int) -> None:
    if _check_ops(request, max_ops) > max(MAX_TOTAL_OPS, max_ops):
        raise error("TooManyOps")
    for ops in (request.success, request.failure):
        if not ops or (len(ops) == 1 and ops[0].request_txn is None):
            continue
        if any(op.request_delete_range or op.request_txn for op in ops):
            _check_duplicates(ops)
        else:
            # Most transactions: puts and ranges alone need no sorted structures.
            keys = [op.request_put.key for op in ops if op.request_put is not None]
            if len(set(keys)) < len(keys):
                raise error("DuplicateKey")


def _check_ops(request: proto.TxnRequest, max_ops: int) -> int:
    """etcd's count: the longest of the three lists, and what nested lists add to it. Returns how
    many compares and operations there are in all."""
    total = len(request.compare) + len(request.success) + len(request.failure)
    ops = max(len(request.compare), len(request.success), len(request.failure))
    if ops > max_ops:
        raise error("TooManyOps")
    for compare in request.compare:
        if not compare.key:
            raise error("EmptyKey")
    for op in (*request.success, *request.failure):
        if op.request_put is not None:
            check_put(op.request_put)
        elif op.request_range is not None:
            check_range(op.request_range)
        elif op.request_delete_range is not None:
            check_delete_range(op.request_delete_range)
        elif op.request_txn is not None:
            total += _check_ops(op.request_txn, max_ops - ops)
        else:
            raise error("KeyNotFound")
    return total


class _Writes:
    """What one branch may write: keys put, and disjoint ranges deleted. Both are sorted, because a
    request of a megabyte holds tens of thousands of them."""

    def __init__(self) -> None:
        self.puts: SortedList[bytes] = SortedList()
        self.keys: set[bytes] = set()
        self.deletes: SortedDict[bytes, bytes | None] = SortedDict()
        """Start -> end (None: no upper bound)."""

    def put(self, key: bytes) -> None:
        self.meet_put(key)
        self.keys.add(key)
        self.puts.add(key)

    def delete(self, start: bytes, end: bytes | None) -> None:
        if end is not None and start >= end:
            return  # Nothing is in it.
        self.meet_delete(start, end)
        self.cover(start, end)

    def meet_put(self, key: bytes) -> None:
        """Raise DuplicateKey if what is written here includes the key."""
        at = self.deletes.bisect_right(key) - 1
        if at >= 0:
            end = self.deletes.peekitem(at)[1]
            if end is None or key < end:
                raise error("DuplicateKey")
        if key in self.keys:
            raise error("DuplicateKey")

    def meet_delete(self, start: bytes, end: bytes | None) -> None:
        """Raise DuplicateKey if a key of the range is put here."""
        if next(self.puts.irange(start, end, (True, False)), None) is not None:
            raise error("DuplicateKey")

    def cover(self, start: bytes, end: bytes | None) -> None:
        """Add a range to those deleted."""
        deletes = self.deletes
        at = deletes.bisect_right(start)
        if at:
            first, last = deletes.peekitem(at - 1)
            if last is None or last >= start:
                start, at = first, at - 1
        while at < len(deletes):
            first, last = deletes.peekitem(at)
            if end is not None and first > end:
                break
            del deletes[first]
            if last is None or (end is not None and last > end):
                end = last
        deletes[start] = end

    def add(self, other: _Writes) -> _Writes:
        """Both together; the smaller goes into the larger."""
        into, more = self, other
        if len(self.keys) + len(self.deletes) < len(other.keys) + len(other.deletes):
            into, more = other, self
        for key in more.puts:
            into.put(key)
        for start, end in more.deletes.items():
            into.delete(start, end)
        return into


def _check_duplicates(ops: Any) -> _Writes:
    """What a branch may write. Raises DuplicateKey if it could write a key twice.

    The two branches of a nested transaction exclude each other, so they may share keys; and a range
    may be deleted more than once.
    """
    writes = _Writes()
    for op in ops:
        if op.request_put is not None:
            writes.put(op.request_put.key)
        elif op.request_delete_range is not None:
            request = op.request_delete_range
            writes.delete(*key_range(request.key, request.range_end))
    for op in ops:
        if op.request_txn is not None:
            taken = _check_duplicates(op.request_txn.success)
            other = _check_duplicates(op.request_txn.failure)
            # Either of them happens: what one of them writes is written, and neither meets the
            # other. So they join without a check against each other.
            writes = _joined(writes, taken, other)
    return writes


def _joined(writes: _Writes, taken: _Writes, other: _Writes) -> _Writes:
    for key in other.puts:
        writes.meet_put(key)
    for start, end in other.deletes.items():
        writes.meet_delete(start, end)
    writes = writes.add(taken)
    for key in other.puts:
        if key not in writes.keys:
            writes.keys.add(key)
            writes.puts.add(key)
    for start, end in other.deletes.items():
        writes.cover(start, end)
    return writes


def is_read_only(request: proto.TxnRequest) -> bool:
    """A transaction that cannot write needs no place in the log."""
    for op in (*request.success, *request.failure):
        if op.request_range is None and (
            op.request_txn is None or not is_read_only(op.request_txn)
        ):
            return False
    return True


def is_serializable(request: proto.TxnRequest) -> bool:
    """All reads of a read-only transaction allow a local answer."""
    return all(
        op.request_range.serializable
        if op.request_range is not None
        else op.request_txn is not None and is_serializable(op.request_txn)
        for op in (*request.success, *request.failure)
    )


# Applying. Each function writes into the revision that the caller ends.


def put(store: Store, request: proto.PutRequest) -> bytes:
    """Apply a PutRequest; the response after its header. Raises EtcdError before any change."""
    if request.lease:
        _check_lease(store, request)
    if request.ignore_value or request.ignore_lease:
        _check_exists(store, request)
    return write_put(store, request)


def _check_lease(store: Store, request: proto.PutRequest) -> None:
    if request.lease and not store.lessor.exists(request.lease):
        raise error("LeaseNotFound")


def _check_exists(store: Store, request: proto.PutRequest) -> None:
    if (request.ignore_value or request.ignore_lease) and request.key not in store.index.heads:
        raise error("KeyNotFound")


def write_put(store: Store, request: proto.PutRequest) -> bytes:
    """Raises Unanswerable; DataDamaged if what is to be written is a value that is damaged."""
    key = request.key
    value = request.value
    lease = request.lease
    answer = b""
    damage = None
    if request.prev_kv or request.ignore_value:
        try:
            previous = store.get(key)
        except DataDamaged as found:
            if request.ignore_value:
                raise
            previous, damage = None, found
        if previous is not None:
            if request.prev_kv:
                answer = b"\x12" + varint(len(previous)) + previous
            if request.ignore_value:
                value = proto.KeyValue.decode(previous).value
    if request.ignore_lease:
        lease = HEAD.unpack(store.index.heads[key])[4]
    store.put(key, value, lease)
    if damage is not None:
        raise Unanswerable(damage)
    return answer


def delete_range_steps(
    store: Store, request: proto.DeleteRangeRequest
) -> Generator[None, None, bytes]:
    """Apply a DeleteRangeRequest: returns the response after its header. Raises EtcdError before
    any change; Unanswerable."""
    start, end = key_range(request.key, request.range_end)
    if request.prev_kv:
        most = store.limits.max_answer_bytes
        if (yield from size_steps(store, start, end, store.revision, 0, most + 1)) > most:
            raise AnswerTooLarge(most)
    reading = _Reading(store.limits.max_answer_bytes)
    parts = yield from _delete_steps(store, request, reading)
    reading.end()
    return (yield from join_steps(parts, store.limits))


class _Reading:
    """What a transaction reads for its answer."""

    def __init__(self, limit_bytes: int, is_read_only: bool = False) -> None:
        self.limit_bytes = limit_bytes
        self.read_bytes = 0
        self.step_bytes = 0
        """Read, and written, in this step."""
        self.failure: EtcdError | DataDamaged | None = None
        self._is_read_only = is_read_only

    def count(self, size_bytes: int) -> None:
        """So much more is read."""
        self.step_bytes += size_bytes
        self.read_bytes += size_bytes
        if self.read_bytes > self.limit_bytes:
            self.fail(AnswerTooLarge(self.limit_bytes))

    def fail(self, why: EtcdError | DataDamaged) -> None:
        """There will be no answer: read no more, but write all there is to write."""
        if self._is_read_only:
            raise why
        if self.failure is None:
            self.failure = why

    def end(self) -> None:
        if self.failure is not None:
            raise Unanswerable(self.failure)


def _delete_steps(
    store: Store, request: Any, reading: _Reading
) -> Generator[None, None, list[bytes]]:
    start, end = key_range(request.key, request.range_end)
    count = store.index.count(start, end)
    parts = [b"\x10" + varint(count)] if count else []
    if request.prev_kv and count:
        step_keys, step_bytes = store.limits.read_step_keys, store.limits.step_bytes
        cursor: bytes | None = start
        while cursor is not None and reading.failure is None:
            records, cursor = store.index.scan(cursor, end, None, step_keys, step_bytes)
            try:
                for location, length in records:
                    parts += (b"\x1a" + varint(length), store.data.read(location, length))
                    reading.count(length)
            except DataDamaged as damage:
                reading.fail(damage)
            yield
    yield from store.delete_steps(start, end)
    return parts


def small_txn(store: Store, request: proto.TxnRequest) -> bytes | None:
    """Apply a TxnRequest at once if it is of the commonest kind, one that compares numbers of keys
    and then puts values: returns the response after its header. None, and nothing is done, if it is
    of another kind: `txn_steps` applies all. Raises EtcdError before any change."""
    if len(request.compare) > MAX_SMALL_OPS:
        return None
    taken = True
    heads = store.index.heads
    for compare in request.compare:
        target = compare.target
        if compare.range_end or not 0 <= target < len(_TARGETS) or target == proto.Compare.VALUE:
            return None
        head = heads.get(compare.key)
        found = HEAD.unpack(head)[_HEAD_PLACES[target]] if head is not None else 0
        if not _is_so(found, compare.result, getattr(compare, _TARGETS[target]) or 0):
            taken = False
            break
    ops = request.success if taken else request.failure
    if len(ops) > MAX_SMALL_OPS:
        return None
    puts = []
    for op in ops:
        put = op.request_put
        if put is None or put.prev_kv or put.ignore_value or put.ignore_lease:
            return None
        puts.append(put)
    for put in puts:
        _check_lease(store, put)
    for put in puts:
        store.put(put.key, put.value, put.lease)
    header = _header(store, store.revision)
    inner = b"\x12" + varint(len(header)) + header
    answers = (b"\x1a" + varint(len(inner)) + inner) * len(ops)
    return b"\x10\x01" + answers if taken else answers


def txn_steps(
    store: Store, request: proto.TxnRequest, head: bytes = b""
) -> Generator[None, None, bytes]:
    """Apply a TxnRequest: returns `head` and the response after its header.

    Raises EtcdError, before any change, if an operation on the way taken cannot be done;
    Unanswerable; DataDamaged if a value is damaged that is compared or, by `ignore_value`, written
    again. One that only reads raises just EtcdError and DataDamaged.
    """
    # What a transaction that only reads sees must not change between its steps.
    began = store.revision
    store.pinned.append(began)
    try:
        path: list[bool] = []
        yield from _choose(store, request, path, began)
        _check_applies(store, request, iter(path), began)
        reading = _Reading(store.limits.max_answer_bytes, is_read_only(request))
        yield from _check_size(store, request, iter(path), began)
        parts = [head]
        yield from _execute(store, request, iter(path), began, reading, parts)
        reading.end()
        if reading.read_bytes < store.limits.step_bytes:
            return b"".join(parts)
        return (yield from join_steps(parts, store.limits))
    finally:
        store.pinned.remove(began)


def _choose(
    store: Store, request: Any, path: list[bool], began: int
) -> Generator[None, None, None]:
    """Add to `path` which branch the transaction and, in order, the nested ones on its way take."""
    taken = True
    for compare in request.compare:
        taken = yield from _compare_steps(store, compare, began)
        if not taken:
            break
    path.append(taken)
    for op in request.success if taken else request.failure:
        if op.request_txn is not None:
            yield from _choose(store, op.request_txn, path, began)


def _check_applies(
    store: Store, request: proto.TxnRequest, path: Iterator[bool], began: int
) -> None:
    """Raise what etcd raises: for the first put that cannot be done, else for the first range."""
    ranges = []
    for op in _taken(request, path):
        if op.request_put is not None:
            _check_exists(store, op.request_put)
            _check_lease(store, op.request_put)
        elif op.request_range is not None and op.request_range.revision:
            ranges.append(op.request_range.revision)
    for revision in ranges:
        if revision > began:
            raise error("FutureRev")
        # A revision before -1 means "now" in a plain range only.
        if revision < store.compact_revision:
            raise error("Compacted")


def _taken(request: proto.TxnRequest, path: Iterator[bool]) -> Iterator[Any]:
    """The operations on the way taken, those of nested transactions in their places."""
    for op in request.success if next(path) else request.failure:
        if op.request_txn is not None:
            yield from _taken(op.request_txn, path)
        else:
            yield op


def _check_size(
    store: Store, request: Any, path: Iterator[bool], began: int
) -> Generator[None, None, None]:
    """Raise AnswerTooLarge if the answer will surely be: by what is to be deleted, and by ranges
    that no write of this transaction comes before."""
    left = store.limits.max_answer_bytes
    has_written = False
    for op in _taken(request, path):
        limit, revision, range_end = 0, began, b""
        if op.request_range is not None:
            asked = op.request_range
            if has_written or not is_plain(asked):
                continue
            limit, range_end = max(0, asked.limit), asked.range_end
            if asked.revision > 0:
                revision = asked.revision
        elif op.request_put is not None:
            has_written = True
            asked = op.request_put
            if not asked.prev_kv:
                continue
        else:
            has_written = True
            asked = op.request_delete_range
            if not asked.prev_kv:
                continue
            range_end = asked.range_end
        if range_end:
            start, end = key_range(asked.key, range_end)
            left -= yield from size_steps(store, start, end, revision, limit, left + 1)
        else:
            record = store.index.at(asked.key, revision)
            left -= record[1] if record is not None else 0
        if left < 0:
            raise AnswerTooLarge(store.limits.max_answer_bytes)


def _execute(
    store: Store,
    request: Any,
    path: Iterator[bool],
    began: int,
    reading: _Reading,
    parts: list[bytes],
) -> Generator[None, None, int]:
    """Add the response, after its header, to `parts`; returns its size in bytes."""
    limits = store.limits
    taken = next(path)
    size = 0
    if taken:
        parts.append(b"\x10\x01")
        size = 2
    for count, op in enumerate(request.success if taken else request.failure, 1):
        if count % limits.execute_step_ops == 0 or reading.step_bytes >= limits.step_bytes:
            reading.step_bytes = 0
            yield
        # A ResponseOp holds one of four responses; each of them begins with a header that has
        # the revision only, and that of a nested transaction has not even that. The lengths in
        # front are known when all is there.
        place = len(parts)
        parts += (b"", b"")
        length = 0
        if op.request_range is not None:
            header = _header(store, began)
            tag = b"\x0a"
            if reading.failure is None:
                try:
                    body = yield from range_steps(
                        store,
                        op.request_range,
                        began + store.is_writing,
                        limit_bytes=reading.limit_bytes - reading.read_bytes,
                    )
                except (AnswerTooLarge, DataDamaged) as why:
                    reading.fail(why)
                else:
                    reading.count(len(body))
                    parts.append(body)
                    length = len(body)
        elif op.request_put is not None:
            tag = b"\x12"
            reading.step_bytes += len(op.request_put.value)
            try:
                body = write_put(store, op.request_put)
            except Unanswerable as applied:
                assert applied.damage is not None
                reading.fail(applied.damage)
            else:
                reading.count(len(body))
                parts.append(body)
                length = len(body)
            header = _header(store, began)
        elif op.request_delete_range is not None:
            tag = b"\x1a"
            body_parts = yield from _delete_steps(store, op.request_delete_range, reading)
            parts += body_parts
            length = sum(map(len, body_parts))
            header = _header(store, began)
        else:
            tag = b"\x22"
            length = yield from _execute(store, op.request_txn, path, began, reading, parts)
            header = b"\x0a\x00"
        if reading.failure is not None:
            parts.clear()
            continue
        length += len(header)
        inner = tag + varint(length)
        parts[place] = b"\x1a" + varint(len(inner) + length) + inner
        parts[place + 1] = header
        size += len(parts[place]) + length
    return size


def _header(store: Store, began: int) -> bytes:
    revision = b"\x18" + varint(began + store.is_writing)
    return b"\x0a" + varint(len(revision)) + revision


_TARGETS = ("version", "create_revision", "mod_revision", "value", "lease")
_HEAD_PLACES = (2, 1, 0, -1, 4)
"""Where the index has them."""


def _compare_steps(
    store: Store, compare: proto.Compare, revision: int
) -> Generator[None, None, bool]:
    target = compare.target
    if not compare.range_end:
        kv = _compared(store, compare, compare.key, revision)
        if kv is not None:
            return _holds(compare, kv)
    else:
        cursor: bytes | None
        cursor, end = key_range(compare.key, compare.range_end)
        exists = False
        index = store.index
        step_keys, step_bytes = store.limits.compare_step_keys, store.limits.step_bytes
        while cursor is not None:
            if revision == store.revision:
                found = index.keys.irange(cursor, end, (True, False))
            else:
                found = index.all_keys(cursor, end)
            keys = list(islice(found, step_keys))
            size = 0
            for key in keys:
                kv = _compared(store, compare, key, revision)
                if kv is None:
                    continue
                exists = True
                if not _holds(compare, kv):
                    return False
                size += len(kv.value)
                if size >= step_bytes:
                    size = 0
                    yield
            cursor = keys[-1] + b"\0" if len(keys) == step_keys else None
            if cursor is not None:
                yield
        if exists:
            return True
    # A value that does not exist equals nothing; the numbers of an absent key are 0.
    return target != proto.Compare.VALUE and _holds(compare, proto.KeyValue())


def _compared(store: Store, compare: proto.Compare, key: bytes, revision: int) -> Any:
    """What is compared of a key: its KeyValue, without a value if that does not matter. (The index
    is enough then, so the outcome is sure even if the record is damaged.)"""
    head = store.index.heads.get(key)
    if head is not None and compare.target != proto.Compare.VALUE:
        mod, create, version, _, lease, _ = HEAD.unpack(head)
        if mod <= revision:
            kv = proto.KeyValue()
            kv.create_revision, kv.mod_revision = create, mod
            kv.version, kv.lease = version, lease
            return kv
    record = store.get(key, revision)
    return None if record is None else proto.KeyValue.decode(record)


def _holds(compare: proto.Compare, kv: proto.KeyValue) -> bool:
    found = given = 0
    if 0 <= compare.target < len(_TARGETS):
        field = _TARGETS[compare.target]
        found = getattr(kv, field)
        given = getattr(compare, field) or type(found)()
    return _is_so(found, compare.result, given)


def _is_so(found: Any, result: int, given: Any) -> bool:
    if result == 0:
        return bool(found == given)
    if result == 1:
        return bool(found > given)
    if result == 2:
        return bool(found < given)
    if result == 3:
        return bool(found != given)
    return True
