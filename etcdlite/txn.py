"""The KV requests over a `Store`: validation, put, delete and transactions.

The rules are etcd's. The server validates a request once, when it arrives (`check_*`). What depends
on the state of the store is checked again when the request is applied, before anything is written,
so a refused transaction leaves no trace. The compares of a transaction, nested ones included, see
the state before it. Its reads see what it wrote before them.

One rule is stricter than etcd's: a transaction may write a key only once. etcd has the same rule,
but misses two cases: a nested transaction puts the key and a later one deletes it; and the delete
is of all keys from some key on (range_end "\\0"). It then makes two events of one key with the same
revision.

What a write changes never depends on what it reads only to answer (`prev_kv`, ranges). If such a
record is damaged here, or the answer gets too large, the write is still applied, as on every other
member, and then answered with an error: `Unanswerable`. An answer that is known to be too large
from the index alone, which is the same on all members, is refused before the first change.

What a transaction may do in apply is bounded: `MAX_VISITED_KEYS` and `MAX_VISITED_RECORDS`, checked
before the first change from the request and the state alone, so all members decide alike. A range
before or after all writes of its transaction, or at a given revision, is read later, outside apply,
and only by the member that has the session of the client.

Answers are encoded as they travel, without the header, which is the first field. The caller puts
it in front.
"""

from __future__ import annotations

import operator
from collections.abc import Generator, Iterator, Sequence
from operator import itemgetter
from typing import Any

from sortedcontainers import SortedDict, SortedSet

from etcdlite import proto
from etcdlite.errors import INVALID_ARGUMENT, EtcdError, error
from etcdlite.mvcc import Store
from etcdlite.plain_txn import GET, TARGETS, PlainTxn
from etcdlite.proto import varint
from etcdlite.ranges import AnswerTooLarge, is_plain, is_quick, key_range, range_steps, size_steps
from etcdlite.storage.index import NO_HEAD
from etcdlite.storage.layout import DataDamaged
from etcdlite.storage.steps import join_steps

MAX_TOTAL_OPS = 8192
"""Compares and operations of a transaction with all nested ones. etcd limits each list and the
depth, but not the total. Without this limit one request could keep a member busy for seconds."""

OP_BYTES = 256
"""The memory of a decoded compare or operation, approximately."""

MAX_SMALL_PUTS = 128
"""Of a transaction that `small_txn` applies in one step."""

MAX_VISITED_KEYS = 50_000
"""Keys that the compares and ranges of a transaction may visit in the index, in apply."""

MAX_VISITED_RECORDS = 5_000
"""Records that they may read there: to compare a value, or for a range between two writes."""


class TooManyKeys(EtcdError):
    """The compares or ranges of a transaction would visit too many keys while it is applied."""

    def __init__(self) -> None:
        super().__init__(
            INVALID_ARGUMENT,
            "etcdlite: the compares and ranges of a transaction visit too many keys: a transaction "
            f"that writes may visit {MAX_VISITED_KEYS} keys, and compare or read "
            f"{MAX_VISITED_RECORDS} values between its writes",
        )


class Unanswerable(Exception):
    """A write was applied completely, but has no answer."""

    def __init__(self, why: EtcdError | DataDamaged) -> None:
        super().__init__(str(why))
        self.why = why

    def report(self) -> EtcdError:
        """The error to answer with. If the reason is a damaged record, that is logged."""
        if isinstance(self.why, DataDamaged):
            return self.why.report()
        return EtcdError(self.why.code, f"{self.why.text}. The write was applied")


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


def check_txn(request: proto.TxnRequest, max_ops: int) -> int:
    """Returns the number of compares and operations, nested ones included. Raises EtcdError."""
    if isinstance(request, PlainTxn) and max(request.count, len(request.compares)) <= max_ops:
        if request.put_count > 1:
            for branch in request.branches:
                if isinstance(branch, list) and len(set(map(itemgetter(0), branch))) < len(branch):
                    raise error("DuplicateKey")
        return len(request.compares) + request.count
    total = _check_ops(request, max_ops)
    if total > max(MAX_TOTAL_OPS, max_ops):
        raise error("TooManyOps")
    for ops in (request.success, request.failure):
        if not ops or (len(ops) == 1 and ops[0].request_txn is None):
            continue
        if any(op.request_put is None and op.request_range is None for op in ops):
            _check_duplicates(ops)
            continue
        # Most transactions: puts and ranges alone need no sorted structures.
        put_keys = [op.request_put.key for op in ops if op.request_put is not None]
        if len(set(put_keys)) < len(put_keys):
            raise error("DuplicateKey")
    return total


def _check_ops(request: proto.TxnRequest, max_ops: int) -> int:
    """Raise TooManyOps by etcd's count: the longest of the three lists, plus that of each nested
    level. Returns the number of all compares and operations."""
    total = len(request.compare) + len(request.success) + len(request.failure)
    ops = max(len(request.compare), len(request.success), len(request.failure))
    if ops > max_ops:
        raise error("TooManyOps")
    if not all(compare.key for compare in request.compare):
        raise error("EmptyKey")
    for op in (*request.success, *request.failure):
        put = op.request_put
        if put is not None:
            if not put.key or put.ignore_value or put.ignore_lease:  # Other puts pass.
                check_put(put)
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
        self.puts: SortedSet[bytes] = SortedSet()
        self.deletes: SortedDict[bytes, bytes | None] = SortedDict()
        """Start -> end (None: no upper bound)."""

    def __len__(self) -> int:
        return len(self.puts) + len(self.deletes)

    def check_put(self, key: bytes) -> None:
        """Raise DuplicateKey if this branch writes the key already."""
        at = self.deletes.bisect_right(key) - 1
        if at >= 0:
            end = self.deletes.peekitem(at)[1]
            if end is None or key < end:
                raise error("DuplicateKey")
        if key in self.puts:
            raise error("DuplicateKey")

    def check_delete(self, start: bytes, end: bytes | None) -> None:
        """Raise DuplicateKey if this branch puts a key of the range."""
        if next(self.puts.irange(start, end, (True, False)), None) is not None:
            raise error("DuplicateKey")

    def delete(self, start: bytes, end: bytes | None) -> None:
        """Add a range that is not empty to those deleted."""
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

    def check(self, other: _Writes) -> None:
        """Raise DuplicateKey if both together write a key twice."""
        few, many = sorted((self, other), key=len)
        for key in few.puts:
            many.check_put(key)
        for start, end in few.deletes.items():
            many.check_delete(start, end)

    def joined(self, other: _Writes) -> _Writes:
        """Both; the smaller one goes into the larger one, which is returned."""
        few, many = sorted((self, other), key=len)
        many.puts.update(few.puts)
        for start, end in few.deletes.items():
            many.delete(start, end)
        return many


def _check_duplicates(ops: Any) -> _Writes:
    """What a branch may write. Raises DuplicateKey if it could write a key twice.

    The two branches of a nested transaction exclude each other, so they may share keys; and a range
    may be deleted more than once."""
    writes = _Writes()
    for op in ops:
        if op.request_put is not None:
            writes.check_put(op.request_put.key)
            writes.puts.add(op.request_put.key)
        elif op.request_delete_range is not None:
            request = op.request_delete_range
            start, end = key_range(request.key, request.range_end)
            if end is None or start < end:
                writes.check_delete(start, end)
                writes.delete(start, end)
    for op in ops:
        if op.request_txn is not None:
            nested = op.request_txn
            branches = [_check_duplicates(branch) for branch in (nested.success, nested.failure)]
            for branch in branches:
                writes.check(branch)
            for branch in branches:
                writes = writes.joined(branch)
    return writes


def all_ops(request: proto.TxnRequest) -> Iterator[proto.RequestOp]:
    """The operations of both branches, and then those of the transactions among them."""
    transactions = [request]
    for transaction in transactions:  # It grows. Generators in each other would be resumed, too.
        for op in (*transaction.success, *transaction.failure):
            yield op
            if op.request_txn is not None:
                transactions.append(op.request_txn)


def is_read_only(request: proto.TxnRequest) -> bool:
    """The transaction cannot write, so it needs no entry in the log."""
    return not isinstance(request, PlainTxn) and all(
        op.request_range is not None or op.request_txn is not None for op in all_ops(request)
    )


def is_serializable(request: proto.TxnRequest) -> bool:
    """All reads of a read-only transaction allow a local answer."""
    ranges = (op.request_range for op in all_ops(request))
    return all(asked is None or asked.serializable for asked in ranges)


# Applying. Each function writes into the revision that the caller ends.


def put(store: Store, request: proto.PutRequest) -> bytes:
    """Apply a PutRequest; returns the response after its header. Raises EtcdError before any
    change; as `write_put`."""
    _check_lease(store, request)
    _check_exists(store, request)
    return write_put(store, request)


def _check_lease(store: Store, request: proto.PutRequest) -> None:
    if request.lease and not store.lessor.exists(request.lease):
        raise error("LeaseNotFound")


def _check_exists(store: Store, request: proto.PutRequest) -> None:
    if (request.ignore_value or request.ignore_lease) and request.key not in store.index.heads:
        raise error("KeyNotFound")


def write_put(store: Store, request: proto.PutRequest) -> bytes:
    """Write without checks; returns the response after its header. Raises Unanswerable;
    DataDamaged, before any change, if the value to write again (`ignore_value`) is damaged."""
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
        lease = store.index.heads[key][4]
    store.put(key, value, lease)
    if damage is not None:
        raise Unanswerable(damage)
    return answer


def kept_bytes(store: Store, request: Any) -> int:
    """The size of the values that a request of any method writes again (`ignore_value`)."""
    if isinstance(request, proto.PutRequest):
        return store.index.heads.get(request.key, NO_HEAD)[5] if request.ignore_value else 0
    if isinstance(request, PlainTxn) or not isinstance(request, proto.TxnRequest):
        return 0
    ops = (*request.success, *request.failure)
    return sum(kept_bytes(store, op.request_put or op.request_txn) for op in ops)


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

    def __init__(self, limit_bytes: int, is_read_only: bool = False, is_asked: bool = True) -> None:
        """`is_asked`: somebody waits for the answer."""
        self.limit_bytes = limit_bytes
        self.is_asked = is_asked
        self.read_bytes = 0
        self.step_bytes = 0
        """Bytes read and written in this step."""
        self.failure: EtcdError | DataDamaged | None = None
        self._is_read_only = is_read_only

    def count(self, size_bytes: int) -> None:
        self.step_bytes += size_bytes
        self.read_bytes += size_bytes
        if self.read_bytes > self.limit_bytes:
            self.fail(AnswerTooLarge(self.limit_bytes))

    def fail(self, why: EtcdError | DataDamaged) -> None:
        """Give up the answer: read no more, but write everything."""
        if self._is_read_only:
            try:
                raise why
            finally:
                del why  # The traceback has this frame: a cycle would hold all that was read.
        if self.failure is None:
            self.failure = why.with_traceback(None)

    @property
    def goes_on(self) -> bool:
        """There will be an answer, as far as is known."""
        return self.is_asked and self.failure is None

    def end(self) -> None:
        if self.failure is not None:
            raise Unanswerable(self.failure)


def _delete_steps(
    store: Store, request: Any, reading: _Reading
) -> Generator[None, None, list[bytes]]:
    start, end = key_range(request.key, request.range_end)
    count = store.index.heads.count(start, end)
    parts = [b"\x10" + varint(count)] if count else []
    if request.prev_kv and count:
        step_keys, step_bytes = store.limits.read_step_keys, store.limits.step_bytes
        cursor: bytes | None = start
        while cursor is not None and reading.goes_on:
            records, cursor = store.index.scan(cursor, end, None, step_keys, step_bytes)
            try:
                kvs = store.data.read_all(records)
                parts.append(b"".join([b"\x1a" + varint(len(kv)) + kv for kv in kvs]))
                reading.count(sum(map(len, kvs)))
            except DataDamaged as damage:
                reading.fail(damage)
            yield
    yield from store.delete_steps(start, end)
    return parts


def small_txn(store: Store, request: PlainTxn, is_asked: bool = True) -> bytes | None:
    """Apply a transaction of the most common kind in one step. Returns the response after its
    header; None, without any change, if its changes or its answer are too large for a step
    (`txn_steps` applies every transaction). Raises EtcdError before any change. `is_asked`:
    somebody waits for the answer."""
    # Flat: nearly all writes of a Kubernetes API server come here.
    heads = store.index.heads
    branch, start = request.on_success, b"\x10\x01"  # The field `succeeded`.
    for key, target, result, number in request.compares:
        row = heads.get(key)
        if not _RESULTS[result](row[_HEAD_PLACES[target]] if row else 0, number):
            branch, start = request.on_failure, b""
            break
    if isinstance(branch, tuple):
        kind, key = branch
        if kind != GET:
            return start + _delete(store, key)
        answer = _get(store, key) if is_asked else b""
        return None if answer is None else start + answer
    if len(branch) > MAX_SMALL_PUTS:
        return None
    if not all(map(store.lessor.exists, filter(None, map(itemgetter(2), branch)))):
        raise error("LeaseNotFound")
    store.put_all(branch)
    revision = b"\x18" + varint(store.revision + 1)
    return start + (_PUT_HEADS[len(revision)] + revision) * len(branch)


_PUT_HEADS = [bytes((0x1A, n + 4, 0x12, n + 2, 0x0A, n)) for n in range(12)]
"""The bytes before the revision in the response to one put of a transaction, by the size of that
field."""


def _delete(store: Store, key: bytes) -> bytes:
    body = b""
    if key in store.index.heads:
        store.delete([key])
        body = b"\x10\x01"
    return _response(b"\x1a", _header(store.revision + store.is_writing), body)


def _get(store: Store, key: bytes) -> bytes | None:
    body = b""
    try:
        record = store.get(key)
    except DataDamaged:
        return None
    if record is not None:
        if len(record) > store.limits.step_bytes:
            return None
        body = b"\x12" + varint(len(record)) + record + b"\x20\x01"
    return _response(b"\x0a", _header(store.revision), body)


def _answer_gets(store: Store, request: proto.TxnRequest) -> bytes | None:
    """The response, after its header, to a transaction that only gets keys as they are now, as
    etcd's Go library reads. None for another one, and for one that takes several steps."""
    size, answers = 0, [b"\x10\x01"]  # It succeeds.
    if store.is_writing or request.compare or len(request.success) > store.limits.execute_step_ops:
        return None
    for op in request.success:
        asked = op.request_range
        if asked is None or len(asked.__dict__) != 1 + asked.serializable:
            return None  # Of a get only the key is set, and a message stores what was set.
        answer = _get(store, asked.key)
        if answer is None or (size := size + len(answer)) > store.limits.step_bytes:
            return None
        answers.append(answer)
    return b"".join(answers)


def _response(tag: bytes, header: bytes, body: bytes) -> bytes:
    """A response of one operation, as a field of the transaction's response."""
    length = len(header) + len(body)
    inner = tag + varint(length)
    return b"\x1a" + varint(len(inner) + length) + inner + header + body


class _Budget:
    """What the compares and ranges of a transaction may still visit in apply."""

    def __init__(self) -> None:
        self.keys = MAX_VISITED_KEYS
        self.records = MAX_VISITED_RECORDS

    def take(self, keys: int, records: int) -> None:
        self.keys -= keys
        self.records -= records
        if self.keys < 0 or self.records < 0:
            raise TooManyKeys


class _Result:
    """The answer to one operation: a field `tag` with a header and a body."""

    __slots__ = ("asked", "body", "header", "revision", "tag")

    def __init__(
        self,
        tag: bytes,
        header: bytes,
        body: Sequence[bytes],
        asked: proto.RangeRequest | None = None,
        revision: int = 0,
    ) -> None:
        self.tag = tag
        self.header = header
        self.body = body
        self.asked = asked
        """If given, the body is not read yet, but will be, as of `revision`."""
        self.revision = revision


class Applied:
    """A transaction that is applied. The answer to it may have to be read yet."""

    def __init__(
        self, request: proto.TxnRequest, path: list[bool], results: list[_Result], reading: _Reading
    ) -> None:
        self.succeeded = path[0]
        self._request = request
        self._path = path
        self._results = results
        self._reading = reading

    def can_answer_now(self, step_bytes: int) -> bool:
        """The answer is small and complete: `answer_steps` reads nothing and joins little."""
        is_small = self._reading.read_bytes < step_bytes
        return is_small and all(result.asked is None for result in self._results)

    def answer_steps(
        self, store: Store, head: bytes = b"", is_late: bool = False
    ) -> Generator[None, None, bytes]:
        """Returns `head` and the response after its header. Raises Unanswerable. What is still to
        be read is pinned in the first step; `is_late`: that step does nothing else."""
        reading = self._reading
        pins = [result.revision for result in self._results if result.asked is not None]
        store.pinned += pins
        try:
            if is_late:
                yield
            for result in self._results:
                if result.asked is not None and reading.failure is None:
                    yield from _read(store, result, reading)
        finally:
            for pin in pins:
                store.pinned.remove(pin)
        reading.end()
        parts = [head]
        yield from _encode(self._request, iter(self._path), iter(self._results), store, parts)
        if reading.read_bytes < store.limits.step_bytes:
            return b"".join(parts)
        return (yield from join_steps(parts, store.limits))


def txn_steps(
    store: Store, request: proto.TxnRequest, head: bytes = b""
) -> Generator[None, None, bytes]:
    """Carry out a TxnRequest: returns `head` and the response after its header.

    Raises EtcdError, before any change, if an operation of a taken branch cannot be done;
    Unanswerable; DataDamaged if a value to compare, or to write again by `ignore_value`, is
    damaged. A transaction that only reads raises EtcdError and DataDamaged."""
    if (gets := _answer_gets(store, request)) is not None:
        return head + gets
    applied = yield from apply_steps(store, request)
    return (yield from applied.answer_steps(store, head))


def apply_steps(
    store: Store, request: proto.TxnRequest, is_asked: bool = True
) -> Generator[None, None, Applied]:
    """Apply a TxnRequest. Raises as `txn_steps`, without Unanswerable; TooManyKeys, if it can
    write. `is_asked`: somebody waits for the answer; otherwise nothing is read for it."""
    # A transaction that only reads sees one state in all its steps.
    began = store.revision
    store.pinned.append(began)
    try:
        reads_only = is_read_only(request)
        budget = None if reads_only else _Budget()
        path: list[bool] = []
        yield from _choose(store, request, path, began, budget)
        ops = _taken(request, iter(path))
        _check_applies(store, ops, began)
        writes = [at for at, op in enumerate(ops) if op.request_range is None]
        first, last = (writes[0], writes[-1]) if writes else (len(ops), -1)
        if budget is not None:
            _check_visits(store, ops, first, last, budget)
        yield from _check_size(store, ops, began)
        reading = _Reading(store.limits.max_answer_bytes, reads_only, is_asked)
        results: list[_Result] = []
        for at, op in enumerate(ops, 1):
            if at % store.limits.execute_step_ops == 0 or (
                reading.step_bytes >= store.limits.step_bytes
            ):
                reading.step_bytes = 0
                yield
            # If this request only reads, the writes under way are those of another one.
            now = began + (store.is_writing and not reads_only)
            if op.request_range is None:
                results.append((yield from _write_steps(store, op, began, reading)))
            elif reading.is_asked:
                asked = op.request_range
                result = _Result(b"\x0a", _header(now), (), asked, now)
                is_between = first < at - 1 < last and asked.revision <= 0
                if is_between or not asked.range_end or is_quick(asked):
                    yield from _read(store, result, reading)
                results.append(result)
        return Applied(request, path, results, reading)
    finally:
        store.pinned.remove(began)


def _choose(
    store: Store, request: Any, path: list[bool], began: int, budget: _Budget | None
) -> Generator[None, None, None]:
    """Add to `path` the branch that the transaction takes (True: success) and, in order, those of
    the nested transactions in it."""
    taken = True
    for compare in request.compare:
        if budget is not None and compare.range_end:
            count = store.index.heads.count(*key_range(compare.key, compare.range_end))
            budget.take(count, count if compare.target == proto.Compare.VALUE else 0)
        taken = yield from _compare_steps(store, compare, began)
        if not taken:
            break
    path.append(taken)
    for op in request.success if taken else request.failure:
        if op.request_txn is not None:
            yield
            yield from _choose(store, op.request_txn, path, began, budget)


def _check_visits(store: Store, ops: Sequence[Any], first: int, last: int, budget: _Budget) -> None:
    """Raise TooManyKeys if the ranges would visit too many keys in apply: to know the size of those
    before the first write, or to read those between the first and the last one."""
    for at, op in enumerate(ops):
        asked = op.request_range
        if asked is None or not asked.range_end or asked.revision > 0 or at > last:
            continue
        is_between = at > first
        if asked.count_only or (not is_between and not is_plain(asked)):
            continue
        count = store.index.heads.count(*key_range(asked.key, asked.range_end))
        if asked.limit > 0 and is_plain(asked):
            count = min(count, asked.limit)
        budget.take(count, count if is_between else 0)


def _check_applies(store: Store, ops: Sequence[Any], began: int) -> None:
    """Raise etcd's error for the first put that cannot be done, else for the first range."""
    ranges = []
    for op in ops:
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


def _taken(request: proto.TxnRequest, path: Iterator[bool]) -> list[Any]:
    """The operations of the taken branches, those of nested transactions in their places."""
    ops: list[Any] = []
    for op in request.success if next(path) else request.failure:
        ops += [op] if op.request_txn is None else _taken(op.request_txn, path)
    return ops


def _check_size(store: Store, ops: Sequence[Any], began: int) -> Generator[None, None, None]:
    """Raise AnswerTooLarge if the index shows that the answer will be: counts previous values, and
    ranges before the first write of this transaction."""
    left = store.limits.max_answer_bytes
    has_written = False
    for op in ops:
        limit = 0
        if (asked := op.request_range) is not None:
            # At an old revision the number of keys that a range visits differs between members.
            if has_written or not is_plain(asked) or asked.revision > 0:
                continue
            limit = max(0, asked.limit)
        else:
            asked = op.request_put or op.request_delete_range
            has_written = True
            if not asked.prev_kv:
                continue
        if op.request_put is None and asked.range_end:
            start, end = key_range(asked.key, asked.range_end)
            left -= yield from size_steps(store, start, end, began, limit, left + 1)
            yield
        else:
            record = store.index.at(asked.key, began)
            left -= record[1] if record is not None else 0
        if left < 0:
            raise AnswerTooLarge(store.limits.max_answer_bytes)


def _write_steps(
    store: Store, op: proto.RequestOp, began: int, reading: _Reading
) -> Generator[None, None, _Result]:
    if op.request_put is not None:
        begin, body = store.data.offset, b""
        try:
            body = write_put(store, op.request_put)
        except Unanswerable as applied:
            reading.fail(applied.why)
        reading.step_bytes += store.data.offset - begin  # `ignore_value` may write a large value.
        reading.count(len(body))
        return _Result(b"\x12", _header(began + store.is_writing), (body,))
    parts = yield from _delete_steps(store, op.request_delete_range, reading)
    return _Result(b"\x1a", _header(began + store.is_writing), parts)


def _read(store: Store, result: _Result, reading: _Reading) -> Generator[None, None, None]:
    """Read the body of a result that is still to be read, if there will be an answer."""
    asked, result.asked = result.asked, None
    assert asked is not None
    if not reading.goes_on:
        return
    left_bytes = reading.limit_bytes - reading.read_bytes
    try:
        body = yield from range_steps(store, asked, result.revision, limit_bytes=left_bytes)
    except (AnswerTooLarge, DataDamaged) as why:
        reading.fail(why)
        return
    result.body = (body,)
    reading.count(len(body))
    if asked.range_end or reading.step_bytes >= store.limits.step_bytes:
        reading.step_bytes = 0
        yield


def _header(revision: int) -> bytes:
    field = b"\x18" + varint(revision)
    return b"\x0a" + varint(len(field)) + field


def _encode(
    request: Any, path: Iterator[bool], results: Iterator[_Result], store: Store, parts: list[bytes]
) -> Generator[None, None, int]:
    """Add the response, after its header, to `parts`; returns its size in bytes."""
    taken = next(path)
    size = 0
    if taken:
        parts.append(b"\x10\x01")
        size = 2
    for count, op in enumerate(request.success if taken else request.failure, 1):
        if count % store.limits.execute_step_ops == 0:
            yield
        # A ResponseOp holds one of four responses. Each begins with a header that has only the
        # revision; that of a nested transaction is empty. The lengths in front are known at the
        # end.
        place = len(parts)
        parts += (b"", b"")
        if op.request_txn is not None:
            tag, header = b"\x22", b"\x0a\x00"
            length = yield from _encode(op.request_txn, path, results, store, parts)
        else:
            result = next(results)
            tag, header = result.tag, result.header
            parts += result.body
            length = sum(map(len, result.body))
        length += len(header)
        inner = tag + varint(length)
        parts[place] = b"\x1a" + varint(len(inner) + length) + inner
        parts[place + 1] = header
        size += len(parts[place]) + length
    return size


_RESULTS = (operator.eq, operator.gt, operator.lt, operator.ne)
"""By the `result` of a `Compare`. An unknown result always holds."""

_HEAD_PLACES = (2, 1, 0, -1, 4)
"""The places of `TARGETS` in a head of the index; -1: the value is not there."""


def _compare_steps(
    store: Store, compare: proto.Compare, revision: int
) -> Generator[None, None, bool]:
    target = compare.target
    if not compare.range_end:
        found, _ = _compared(store, compare, compare.key, revision)
        if found is not None:
            return _holds(compare, found)
    else:
        cursor: bytes | None
        cursor, end = key_range(compare.key, compare.range_end)
        exists = False
        index = store.index
        step_keys, step_bytes = store.limits.compare_step_keys, store.limits.step_bytes
        while cursor is not None:
            if revision == store.revision and not store.is_writing:
                keys = index.heads.first(cursor, end, step_keys)
            else:
                keys = index.all_keys(cursor, end, step_keys)
            size = 0
            for key in keys:
                found, read_bytes = _compared(store, compare, key, revision)
                if found is None:
                    continue
                exists = True
                if not _holds(compare, found):
                    return False
                size += read_bytes
                if size >= step_bytes:
                    size = 0
                    yield
            cursor = keys[-1] + b"\0" if len(keys) == step_keys else None
            yield  # Even after few keys: many such compares may follow.
        if exists:
            return True
    # A value that does not exist equals nothing; the numbers of an absent key are 0.
    return target != proto.Compare.VALUE and _holds(compare, 0)


def _compared(store: Store, compare: proto.Compare, key: bytes, revision: int) -> tuple[Any, int]:
    """What a key has in the field to compare, None if it does not exist, and the bytes read for it.
    For all but the value the index is enough, so a damaged record does not change the outcome."""
    target = compare.target
    is_known = 0 <= target < len(TARGETS)
    head = store.index.heads.get(key)
    if head is not None and head[0] <= revision and target != proto.Compare.VALUE:
        return head[_HEAD_PLACES[target]] if is_known else 0, 0
    if (record := store.get(key, revision)) is None:
        return None, 0
    return getattr(proto.KeyValue.decode(record), TARGETS[target]) if is_known else 0, len(record)


def _holds(compare: proto.Compare, found: Any) -> bool:
    is_known = 0 <= compare.target < len(TARGETS)
    given = (getattr(compare, TARGETS[compare.target]) if is_known else None) or type(found)()
    is_known = 0 <= compare.result < len(_RESULTS)
    return not is_known or bool(_RESULTS[compare.result](found, given))
