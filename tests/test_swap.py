"""A compare-and-swap means what its messages mean: decoded, checked, counted and applied."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rigs.member_rig import MemberRig
from rigs.store_rig import StoreRig

from etcdlite import proto, txn
from etcdlite.errors import EtcdError, error
from etcdlite.frames import frame
from etcdlite.methods import TXN
from etcdlite.metrics import Metrics
from etcdlite.plain_txn import PlainTxn, decode_txn
from etcdlite.proto import DecodeError
from etcdlite.replica.state import needs_space
from etcdlite.request import Waiter

THOROUGH = settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)


def op(name: str, request: Any) -> Any:
    return proto.RequestOp(**{name: request})


def swap(key: bytes, revision: int, value: bytes | None, lease: int = 0, gets: bool = True) -> Any:
    """The TxnRequest that a client sends."""
    compare = proto.Compare(key=key, target=proto.Compare.MOD, mod_revision=revision)
    success = op("request_delete_range", proto.DeleteRangeRequest(key=key))
    if value is not None:
        success = op("request_put", proto.PutRequest(key=key, value=value, lease=lease))
    get = op("request_range", proto.RangeRequest(key=key))
    return proto.TxnRequest(compare=[compare], success=[success], failure=[get] if gets else [])


keys = st.sampled_from([b"a", b"b", b"k" * 100, b"k" * 121, b"k" * 127, b"k" * 128, b"k" * 300])
values = st.none() | st.sampled_from([b"", b"v", b"v" * 127, b"v" * 200, b"v" * 20_000])
numbers = st.sampled_from([0, 1, 5, 127, 128, 20_000, 1 << 28, (1 << 63) - 1, -1])
swaps = st.builds(swap, keys, numbers, values, numbers, st.booleans())


@st.composite
def variations(draw: Any) -> Any:
    """A TxnRequest of this kind, with one thing that may be different."""
    request = draw(swaps)
    (compare,), (success,) = request.compare, request.success
    part = draw(st.sampled_from([compare, request, success, success.request_put or compare, None]))
    if part is not None:
        field = draw(st.sampled_from(part.FIELDS))
        value = {
            "bytes": draw(keys),
            "enum": draw(st.integers(0, 3)),
            "int64": draw(numbers),
            "bool": True,
            "message": [],
        }[field.kind]
        if field.kind == "message":
            if field.repeated:
                setattr(part, field.name, getattr(part, field.name) * draw(st.integers(0, 2)))
        elif not field.oneof:
            setattr(part, field.name, value)
    return request


def decoded(decode: Any, data: bytes, begin: int, end: int) -> Any:
    try:
        request = decode(data, begin, end)
    except DecodeError:
        return "invalid"
    return [list(getattr(request, field.name)) for field in request.FIELDS], request.encode()


@THOROUGH
@given(variations(), st.data())
def test_every_request_is_decoded_as_the_general_decoder_does(request: Any, data: Any) -> None:
    whole = bytearray(request.encode())
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, min(len(whole) - 1, 60)) if whole else st.just(0))
        whole[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    raw = b"pre" + bytes(whole) + data.draw(st.binary(max_size=3))
    end = len(raw) - data.draw(st.integers(0, 5))
    right = decoded(proto.TxnRequest.decode, raw, 3, end)
    assert decoded(decode_txn, raw, 3, end) == right


@pytest.mark.parametrize("value", [None, b"", b"v", b"v" * 2000, b"v" * 16_000])
@pytest.mark.parametrize("key", [b"k", b"k" * 60, b"k" * 200])
def test_what_an_api_server_writes_is_a_plain_transaction(key: bytes, value: bytes | None) -> None:
    for gets in (False, True):
        for revision in (0, 7, 1 << 40):
            request = swap(key, revision, value, gets=gets)
            assert type(decode_txn(request.encode())) is PlainTxn


def test_the_rules_see_what_a_swap_means() -> None:
    put, delete = (decode_txn(swap(b"k", 0, value).encode()) for value in (b"v", None))
    for request in (put, delete):
        assert type(request) is PlainTxn
        txn.check_txn(request, 1)
        assert not txn.is_read_only(request)
    assert needs_space(TXN, put) and not needs_space(TXN, delete)
    with pytest.raises(EtcdError) as refused:
        txn.check_txn(put, 0)
    assert refused.value.text == error("TooManyOps").text


@pytest.mark.parametrize("succeeded", [True, False])
@pytest.mark.parametrize(
    "request_", [swap(b"k", 1, b"v"), swap(b"k", 1, None), swap(b"k", 1, b"", gets=False)]
)
def test_a_swap_is_counted_as_its_operation(request_: Any, succeeded: bool) -> None:
    counts = []
    for request in (request_, decode_txn(request_.encode())):
        metrics = Metrics()
        metrics.count_txn(request, succeeded)
        counts.append((metrics.puts, metrics.deletes, metrics.ranges, metrics.txns))
    assert counts[0] == counts[1]


@settings(THOROUGH, max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"a", b"b", b"c"]),
            st.integers(-3, 0) | st.just(None),
            st.sampled_from([None, b"", b"v", b"v" * 300]),
            st.sampled_from([0, 0, 0, 7, 8]),
            st.booleans(),
        ),
        max_size=20,
    )
)
def test_a_swap_changes_what_its_transaction_changes(steps: Any) -> None:
    """`StoreRig.apply` compares the answer and the state with the plain model."""
    rig = StoreRig()
    rig.apply(proto.LeaseGrantRequest(ID=7, TTL=100))
    for key, since, value, lease, gets in steps:
        revision = 0
        if since is not None and (record := rig.store.get(key)) is not None:
            revision = max(0, proto.KeyValue.decode(record).mod_revision + min(0, since + 2))
        rig.small_txns = 1  # The next transaction is a small one.
        rig.apply(swap(key, revision, value, lease, gets))
    rig.check()
    rig.restart()
    rig.check()


def test_a_length_with_a_third_byte_is_not_one_of_two() -> None:
    def field(tag: bytes, body: bytes) -> bytes:
        """The two bytes of the length both say that another one follows."""
        return tag + bytes((len(body) & 127 | 128, len(body) >> 7 & 127 | 128)) + body

    compare = b"\x0a\x08\x10\x02\x1a\x01k\x30\x05"
    put = field(b"\x12", field(b"\x12", b"\x0a\x01k" + field(b"\x12", b"v" * 16_400)))
    assert decoded(decode_txn, compare + put, 0, len(compare + put)) == "invalid"


def test_what_follows_a_compare_without_a_revision_is_not_part_of_it() -> None:
    request = b"\x0a\x05\x10\x02\x1a\x01k"
    raw = request + b"\x30" + bytes(8)
    right = decoded(proto.TxnRequest.decode, raw, 0, len(request))
    assert decoded(decode_txn, raw, 0, len(request)) == right != "invalid"


@pytest.mark.parametrize("value", [b"v", None])
def test_a_swap_is_applied_without_its_messages(value: bytes | None) -> None:
    rig = MemberRig(warn_apply_s=1e9, warn_request_s=1e9)  # The name of a slow one takes them.
    rig.settle()
    raw = swap(b"k", 0, value).encode()
    request = decode_txn(raw)
    rig.member.writes.propose(Waiter(None, 0, TXN, request), frame(1, TXN, 0, raw))
    rig.settle()
    assert rig.member.state.metrics.puts + rig.member.state.metrics.deletes == 1
    assert not vars(request).keys() & {"compare", "success", "failure"}
