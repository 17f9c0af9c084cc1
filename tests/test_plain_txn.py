"""The quick decoder of transactions gives what the general one gives, for every input."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rigs.store_rig import StoreRig

from etcdlite import plain_txn, proto, txn
from etcdlite.errors import EtcdError
from etcdlite.methods import TXN
from etcdlite.metrics import Metrics
from etcdlite.plain_txn import PlainTxn, decode_txn
from etcdlite.proto import DecodeError, PutRequest, RangeRequest, RequestOp, TxnRequest
from etcdlite.ranges import decode_range
from etcdlite.replica.state import lease_puts, needs_space


def outcome(decode, data: bytes, pos: int, end: int) -> object:
    try:
        message = decode(data, pos, end)
    except DecodeError:
        return DecodeError
    # A `PlainTxn` has the fields of the TxnRequest, but is of another class.
    return [getattr(message, field.name) for field in message.FIELDS], message.encode()


def assert_same(data: bytes, pos: int = 0, end: int | None = None) -> None:
    end = len(data) if end is None else end
    expected = outcome(TxnRequest.decode, data, pos, end)
    assert outcome(decode_txn, data, pos, end) == expected, (data.hex(), pos, end)


def puts(*pairs: tuple[bytes, bytes]) -> bytes:
    ops = [RequestOp(request_put=PutRequest(key=key, value=value)) for key, value in pairs]
    return TxnRequest(success=ops).encode()


SIZES = (0, 1, 2, 100, 119, 120, 121, 126, 127, 128, 129, 16_000, 16_370, 16_383, 16_384, 20_000)
LARGE = (33_000, (1 << 21) - 20, (1 << 21) - 1, 1 << 21)


@pytest.mark.parametrize("size", SIZES + LARGE)
def test_lengths_of_one_to_four_bytes(size):
    assert_same(puts((b"k", bytes(size))))
    assert_same(puts((b"k" * size, b"value")))
    assert_same(puts((b"a", b"1"), (b"b", bytes(size)), (b"c", b"3")))


def test_what_is_before_and_behind_the_message_does_not_matter():
    data = puts((b"a", b"1"), (b"b", bytes(300)))
    for more in (b"", b"\x12", b"\x12\x00", data):
        assert_same(more + data + more, len(more), len(more) + len(data))


def test_a_message_that_is_cut_off_or_has_an_altered_byte():
    data = puts((b"ab", b"1"), (b"c", bytes(130)), (b"d", b"2"))
    for end in range(len(data)):
        assert_same(data[:end])
        assert_same(data, 0, end)
    rng = random.Random(1)
    for _ in range(4000):
        altered = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            altered[rng.randrange(40)] = rng.choice((0, 1, 2, 10, 18, 127, 128, 129, 255))
        assert_same(bytes(altered))


def test_a_long_key_or_value_has_an_altered_byte():
    assert type(decode_txn(puts((b"ab", bytes(40_000))))) is PlainTxn
    rng = random.Random(3)
    for data in (
        puts((b"ab", bytes(20_000)), (b"c", b"2")),
        puts((b"ab", b"\x12\x03\x18" * 6_000)),
        puts((b"\x01\x12\x00\x18" * 5_000, b"\x12\x01" * 9_000)),
    ):
        for _ in range(1000):
            altered = bytearray(data)
            for _ in range(rng.randint(1, 3)):
                altered[rng.randrange(24)] = rng.choice((0, 1, 2, 10, 18, 24, 127, 128, 129, 255))
            assert_same(bytes(altered))


def test_random_bytes_of_the_tags():
    rng = random.Random(2)
    for _ in range(4000):
        values = (0x12, 0x12, 0x12, 0x0A, 0, 1, 2, 4, 6, 8, 0x80, 0x81, 0x1A)
        assert_same(bytes(rng.choice(values) for _ in range(rng.randrange(24))))


def test_other_operations_are_left_to_the_general_decoder():
    put = RequestOp(request_put=PutRequest(key=b"a", value=b"b"))
    for op in (
        RequestOp(request_put=PutRequest(key=b"a", value=b"b", lease=7)),
        RequestOp(request_put=PutRequest(key=b"a", prev_kv=True)),
        RequestOp(request_range=proto.RangeRequest(key=b"a")),
        RequestOp(request_delete_range=proto.DeleteRangeRequest(key=b"a")),
        RequestOp(request_txn=TxnRequest(success=[put])),
    ):
        for request in (TxnRequest(success=[put, op]), TxnRequest(success=[op, put])):
            assert_same(request.encode())
            request.compare = [proto.Compare(key=b"a")]
            assert_same(request.encode())
        assert_same(TxnRequest(success=[put], failure=[op]).encode())


def test_very_many_puts_are_counted_by_the_general_decoder(monkeypatch):
    data = puts(*[(b"%d" % n, b"v") for n in range(plain_txn.MAX_OPS + 1)])
    general = []
    decode = TxnRequest.decode
    monkeypatch.setattr(TxnRequest, "decode", lambda *args: general.append(args) or decode(*args))
    assert decode_txn(data) == decode(data) and len(general) == 1
    decode_txn(puts((b"a", b"b")))
    assert len(general) == 1, "a plain one is decoded without it"


def test_no_more_puts_are_decoded_than_are_taken():
    class Counted(bytes):
        reads = 0

        def __getitem__(self, at):
            Counted.reads += 1
            return super().__getitem__(at)

    data = Counted(puts(*[(b"a", b"")] * 5_000))
    Counted.reads = 0
    with pytest.raises(LookupError):
        plain_txn._decode_plain(data, 0, len(data))
    assert Counted.reads < 20 * plain_txn.MAX_OPS
    whole = puts(*[(b"a", b"1")] * plain_txn.MAX_OPS)
    assert len(plain_txn._decode_plain(whole, 0, len(whole)).success) == plain_txn.MAX_OPS


def test_the_quick_decoder_of_ranges_gives_what_the_general_one_gives() -> None:
    rng = random.Random(1)
    for size in (0, 1, 2, 126, 127, 128, 300):
        whole = RangeRequest(key=b"k" * size).encode()
        more = RangeRequest(key=b"k" * size, serializable=True).encode()
        changed = bytearray(whole or b"\n\0")
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        for body in (whole, more, b"\n\0", whole[:-1], whole + b"\n\0", bytes(changed)):
            data = b"xx" + body + b"xx"
            for pos, end in ((2, 2 + len(body)), (2, 3), (2, 2)):
                quick = outcome(decode_range, data, pos, end)
                general = outcome(RangeRequest.decode, data, pos, end)
                assert quick == general, (data.hex(), pos, end)
                assert getattr(quick, "__dict__", None) == getattr(general, "__dict__", None)
    assert decode_range(RangeRequest(key=b"k").encode()).key == b"k"


LEASES = (b"", b"\x18\0", b"\x18\x80\0", b"\x18\x07", b"\x18\x87\0", b"\x18\0\x18\0", b"\x18")


@pytest.mark.parametrize("tag", [b"\x12", b"\x1a"])
def test_fields_that_say_nothing_in_runs_of_puts(tag: bytes) -> None:
    """Encoders leave out a value that is empty and a lease of 0, but a client may send both."""
    ops = []
    for value in (b"", b"\x12\0", b"\x12\x80\0", b"\x12\1v", b"\x12\x81\0v"):
        for lease in LEASES:
            put = b"\n\1k" + value + lease
            ops.append(b"%s%c\x12%c%s" % (tag, len(put) + 2, len(put), put))
    for first in ops:
        for count in range(1, 9):
            assert_same(first * count)
        for second in ops:
            assert_same(first + second + first + first)


@pytest.mark.parametrize("keys", [b"ab", b"a", b"aa", b"a\0", b"\0", b"abc", b"abb"])
def test_the_rules_see_what_plain_puts_mean(keys: bytes) -> None:
    """A byte 0 stands for the empty key."""
    data = b""
    for key in keys:
        body = b"\x0a\0" if key == 0 else b"\x0a\1%c" % key
        put = b"%s\x12\1v" % body
        data += b"\x12%c\x12%c%s" % (len(put) + 2, len(put), put)
    general, quick = TxnRequest.decode(data), decode_txn(data)
    assert type(quick) is (TxnRequest if b"\0" in keys else PlainTxn), "a PlainTxn has no empty key"
    results = []
    for request in (general, quick):
        try:
            txn.check_txn(request, 2)
            results.append("")
        except EtcdError as failure:
            results.append(failure.text)
        metrics = Metrics()
        metrics.count_txn(request, True)
        results.append((metrics.puts, metrics.deletes, metrics.ranges, metrics.txns))
        results.append((txn.is_read_only(request), needs_space(TXN, request)))
    assert results[:3] == results[3:]


keys = st.sampled_from([b"a", b"b", b"c", b"k" * 100, b"k" * 124, b"k" * 130])
numbers = st.sampled_from([0, 1, 2, 3, 127, 128, 1 << 40])
TARGETS = ("version", "create_revision", "mod_revision", "lease")


@st.composite
def compares(draw: Any) -> Any:
    name = draw(st.sampled_from(TARGETS))
    target = plain_txn.TARGETS.index(name)
    result = draw(st.integers(0, 3))
    return proto.Compare(key=draw(keys), target=target, result=result, **{name: draw(numbers)})


values = st.sampled_from([b"", b"v", b"w", b"v" * 200, b"v" * 17_000])
put_ops = st.builds(
    lambda key, value, lease: RequestOp(request_put=PutRequest(key=key, value=value, lease=lease)),
    keys,
    values,
    st.sampled_from([0, 0, 0, 7, 8]),
)
one_op = keys.map(lambda key: [RequestOp(request_range=RangeRequest(key=key))]) | keys.map(
    lambda key: [RequestOp(request_delete_range=proto.DeleteRangeRequest(key=key))]
)
branches = st.lists(put_ops, max_size=4) | one_op
plain_txns = st.builds(
    lambda compare, success, failure: TxnRequest(compare=compare, success=success, failure=failure),
    st.lists(compares(), max_size=3),
    branches,
    branches,
)
THOROUGH = settings(
    max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)


@THOROUGH
@given(plain_txns, st.data())
def test_every_plain_transaction_is_decoded_as_the_general_decoder_does(
    request_: Any, data: Any
) -> None:
    raw = request_.encode()
    assert_same(raw)
    if raw and not txn.is_read_only(TxnRequest.decode(raw)):
        assert type(decode_txn(raw)) is PlainTxn
    altered = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, min(len(altered), 80)))
        altered[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    whole = b"pre" + bytes(altered) + data.draw(st.binary(max_size=7))
    assert_same(whole, 3, max(3, len(whole) - data.draw(st.integers(0, 9))))


@THOROUGH
@given(plain_txns, st.integers(0, 4), st.booleans())
def test_the_rules_see_what_a_plain_transaction_means(
    request_: Any, max_ops: int, succeeded: bool
) -> None:
    raw = request_.encode()
    results = []
    for request in (TxnRequest.decode(raw), decode_txn(raw)):
        try:
            verdict: object = txn.check_txn(request, max_ops)
        except EtcdError as failure:
            verdict = failure.text
        metrics = Metrics()
        metrics.count_txn(request, succeeded)
        counts = (metrics.puts, metrics.deletes, metrics.ranges, metrics.txns)
        rules = txn.is_read_only(request), needs_space(TXN, request), lease_puts(TXN, request)
        results.append((verdict, counts, rules))
    assert results[0] == results[1]


@settings(THOROUGH, max_examples=100)
@given(st.lists(plain_txns, max_size=12))
def test_a_plain_transaction_changes_what_its_messages_say(requests: Any) -> None:
    """`StoreRig.apply` compares the answer and the state with the plain model."""
    rig = StoreRig()
    rig.apply(proto.LeaseGrantRequest(ID=7, TTL=100))
    for request in requests:
        try:
            txn.check_txn(request, 128)
        except EtcdError:
            continue
        rig.small_txns = 1  # The next transaction is a small one.
        rig.apply(request)
    rig.check()
    rig.restart()
    rig.check()
