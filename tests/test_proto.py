"""Claims about etcdlite.proto, most of them checked against the protobuf library.

The library's classes are built from the schema table itself: a mistake in a codec shows here as a
difference, a mistake in the table does not. The table is checked by the tests that let etcd's own
client and server talk to etcdlite, and its methods by the protocol page.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import re
import sys
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf import message as protobuf_message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from etcdlite import frames, json_mapping, methods, proto

NAMES = sorted(proto.MESSAGES)
NUMBERS = {"bool", "int64", "uint64", "int32", "uint32", "enum"}

THOROUGH = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
FUZZ = settings(THOROUGH, max_examples=1500)
BRIEF = settings(THOROUGH, max_examples=300)


# --- The types of the messages ------------------------------------------------------------------

STUBS = pathlib.Path(proto.__file__).with_name("messages.pyi")
STUBS_HEAD = '''"""The types of the messages, made from the schema by `make stubs`. Do not edit."""

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import dataclass_transform

from etcdlite.proto import Message

@dataclass_transform(kw_only_default=True)
class _Typed(Message): ...
'''


def stubs() -> str:
    """The types as Python source, formatted as ruff does."""
    text = STUBS_HEAD
    for name in [name for name in proto.ENUMS if "." not in name] + list(proto.MESSAGES):
        base = "(_Typed)" if name in proto.MESSAGES else ""
        enums = [e for e in proto.ENUMS if e == name or e.startswith(name + ".")]
        lines = [f"    {value}: ClassVar[int]\n" for e in enums for value in proto.ENUMS[e]]
        if base:
            lines += [f"    {f.name}: {type_of(f)} = ...\n" for f in proto.MESSAGES[name].FIELDS]
        text += f"\nclass {name}{base}:" + ("\n" + "".join(lines) if lines else " ...\n")
    # No blank lines between classes without fields.
    return re.sub(r"(?<=: \.\.\.\n)\n(?=class \w+\(_Typed\): \.\.\.)", "", text)


def type_of(field: proto.Field) -> str:
    names = {"bytes": "bytes", "string": "str", "bool": "bool", "message": field.type_name}
    one = names.get(field.kind, "int")
    if field.repeated:
        return f"Sequence[{one}]"
    return f"{one} | None" if field.default is None else one


def test_the_types_of_the_messages_are_those_of_the_schema() -> None:
    if os.environ.get("REWRITE"):
        STUBS.write_text(stubs())
    assert STUBS.read_text() == stubs(), "`make stubs` writes them"


# --- The same schema in the protobuf library ---------------------------------------------------


def library_classes() -> dict[str, Any]:
    F = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="t.proto", package="t", syntax="proto3")
    places: dict[str, Any] = {}
    for name, cls in proto.MESSAGES.items():
        message = places[name] = file.message_type.add(name=name)
        for field in cls.FIELDS:
            made = message.field.add(name=field.name, number=field.number)
            made.label = F.LABEL_REPEATED if field.repeated else F.LABEL_OPTIONAL
            made.type = getattr(F, "TYPE_" + field.kind.upper())
            if field.kind in ("message", "enum"):
                made.type_name = ".t." + field.type_name
            if field.oneof:
                if not message.oneof_decl:
                    message.oneof_decl.add(name=field.oneof)
                assert message.oneof_decl[0].name == field.oneof
                made.oneof_index = 0
    for name, values in proto.ENUMS.items():
        parent, _, last = name.rpartition(".")
        enum = (places[parent] if parent else file).enum_type.add(name=last)
        for key, number in values.items():
            enum.value.add(name=key, number=number)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName("t." + name))
        for name in proto.MESSAGES
    }


LIBRARY = library_classes()


def library_bytes(name: str, data: bytes) -> bytes | None:
    """What the library makes of `data`, without unknown fields; None if it refuses it."""
    theirs = LIBRARY[name]()
    try:
        theirs.ParseFromString(data)
    except protobuf_message.DecodeError:
        return None
    theirs.DiscardUnknownFields()
    return theirs.SerializeToString(deterministic=True)


def assert_read_as_the_library_does(name: str, data: bytes) -> None:
    theirs = library_bytes(name, data)
    try:
        ours = proto.MESSAGES[name].decode(data).encode()
    except proto.DecodeError as error:
        # The library lets field number 0 pass in messages that have no fields; here it never does.
        if "field number 0" in str(error):
            return
        ours = None
    assert ours == theirs, data.hex()


# --- Strategies --------------------------------------------------------------------------------


def near(*edges: int) -> st.SearchStrategy[int]:
    return st.builds(lambda edge, by: edge + by, st.sampled_from(edges), st.integers(-2, 2))


def within(low: int, high: int) -> st.SearchStrategy[int]:
    edges = near(0, 127, 16383, 2**21, 2**28, 2**31, 2**32, low, high)
    return st.one_of(edges.filter(lambda n: low <= n <= high), st.integers(low, high))


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "bytes": st.binary(max_size=8) | st.sampled_from([b"v" * 127, b"v" * 128, b"k" * 300]),
    "string": st.text(max_size=8),
    "bool": st.booleans(),
    "int64": within(-(2**63), 2**63 - 1),
    "uint64": within(0, 2**64 - 1),
    "int32": within(-(2**31), 2**31 - 1),
    "uint32": within(0, 2**32 - 1),
    "enum": st.one_of(st.integers(0, 5), within(-(2**31), 2**31 - 1)),
}


@st.composite
def messages(draw: st.DrawFn, name: str, depth: int = 3) -> Any:
    """A message with any of its fields set, sub-messages to a small depth."""
    fields = proto.MESSAGES[name].FIELDS
    chosen: dict[str, Any] = {}
    taken = set()
    for field in fields:
        if field.oneof in taken or not draw(st.booleans()):
            continue
        if field.oneof:
            taken.add(field.oneof)
        if field.kind == "message":
            if not depth:
                continue
            value = messages(field.type_name, depth - 1)
        else:
            value = VALUES[field.kind]
        chosen[field.name] = draw(st.lists(value, max_size=3) if field.repeated else value)
    return proto.MESSAGES[name](**chosen)


def to_library(message: Any) -> Any:
    theirs = LIBRARY[message.NAME]()
    for field, value in message.present():
        if field.kind == "message" and field.repeated:
            for item in value:
                getattr(theirs, field.name).add().CopyFrom(to_library(item))
        elif field.kind == "message":
            getattr(theirs, field.name).CopyFrom(to_library(value))
        elif field.repeated:
            getattr(theirs, field.name).extend(value)
        else:
            setattr(theirs, field.name, value)
    return theirs


def overlong(n: int, extra: int) -> bytes:
    """A varint with `extra` bytes that are not needed."""
    plain = proto.varint(n)
    if not extra:
        return plain
    return plain[:-1] + bytes((plain[-1] | 128,)) + b"\x80" * (extra - 1) + b"\0"


@st.composite
def wire(draw: st.DrawFn, name: str | None, depth: int = 3) -> bytes:
    """Fields in any order, of the message and not, in right and wrong forms."""
    out = b""
    fields = proto.MESSAGES[name].FIELDS if name else ()
    for _ in range(draw(st.integers(0, 4))):
        field = draw(st.sampled_from(fields)) if fields and draw(st.integers(0, 4)) else None
        number = field.number if field else draw(near(1, 15, 64, 1000, 2**29 - 1))
        right = 2
        if field and field.kind in NUMBERS:
            right = draw(st.sampled_from([0, 2])) if field.repeated else 0
        wire_type = right if draw(st.integers(0, 6)) else draw(st.integers(0, 7))
        stretch = draw(st.sampled_from([0] * 8 + [1, 3, 4]))
        out += overlong(max(number, 0) << 3 | wire_type, stretch)
        if wire_type == 0:
            value = draw(within(0, 2**64 - 1))
            extra = draw(st.sampled_from([0, 0, 0, 0, 1, 2]))
            out += overlong(value, extra)
        elif wire_type == 2:
            if field and field.kind == "message" and depth:
                body = draw(wire(field.type_name, depth - 1))
            elif field and field.repeated and field.kind in NUMBERS:
                body = b"".join(map(proto.varint, draw(st.lists(within(0, 2**64 - 1), max_size=3))))
            else:
                body = draw(st.one_of(st.binary(max_size=4), st.text(max_size=3).map(str.encode)))
            out += overlong(len(body), draw(st.sampled_from([0] * 8 + [1, 4, 5]))) + body
        elif wire_type == 3 and depth:
            out += draw(wire(None, depth - 1)) + proto.varint(max(number, 0) << 3 | 4)
        else:
            out += draw(st.binary(max_size=8))
    return out


def damage(draw: st.DrawFn, data: bytes) -> bytes:
    at = draw(st.integers(0, len(data)))
    how = draw(st.sampled_from(["cut", "flip", "insert", "keep"]))
    if how == "cut":
        return data[:at]
    if how == "flip" and at < len(data):
        return data[:at] + bytes((data[at] ^ 1 << draw(st.integers(0, 7)),)) + data[at + 1 :]
    if how == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=3)) + data[at:]
    return data


# --- Encoding and decoding ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_message_has_the_librarys_bytes_and_comes_back_from_them(name: str) -> None:
    @THOROUGH
    @given(messages(name))
    def claim(message: Any) -> None:
        data = message.encode()
        assert data == to_library(message).SerializeToString(deterministic=True)
        assert proto.MESSAGES[name].decode(data) == message
        padded = b"\x0a" + data + b"\x0a\x05"
        assert proto.MESSAGES[name].decode(padded, 1, 1 + len(data)) == message

    claim()


@pytest.mark.parametrize("name", NAMES)
def test_every_decoder_accepts_and_refuses_what_the_library_does(name: str) -> None:
    @THOROUGH
    @given(st.data())
    def claim(data: st.DataObject) -> None:
        sent = data.draw(wire(name))
        assert_read_as_the_library_does(name, sent)

    claim()


@FUZZ
@given(st.data())
def test_damaged_messages_are_refused_or_read_as_the_library_does(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    valid = data.draw(messages(name)).encode()
    sent = data.draw(st.composite(damage)(valid))
    assert_read_as_the_library_does(name, sent)


@FUZZ
@given(st.sampled_from(NAMES), st.binary(max_size=60))
def test_random_bytes_are_refused_or_read_as_the_library_does(name: str, sent: bytes) -> None:
    assert_read_as_the_library_does(name, sent)


@pytest.mark.parametrize(
    ("name", "sent", "meaning"),
    [
        ("PutRequest", b"\x12\x01v\x0a\x01k", b"\x0a\x01k\x12\x01v"),  # out of order
        ("PutRequest", b"\x18\x05\x18\x07", b"\x18\x07"),  # the last scalar wins
        ("PutRequest", b"\x18\x05\x18\x00", b""),  # even if it is the default
        ("PutRequest", b"\x8a\x00\x01k", b"\x0a\x01k"),  # a tag longer than need be
        ("PutRequest", b"\x0a\x81\x00k", b"\x0a\x01k"),  # a length longer than need be
        ("PutRequest", b"\x20\x80\x02", b"\x20\x01"),  # a bool of 256
        ("PutRequest", b"\x08\x05\x0a\x01k", b"\x0a\x01k"),  # a known number, a foreign type
        ("HashResponse", b"\x10\xff\xff\xff\xff\xff\x01", b"\x10\xff\xff\xff\xff\x0f"),  # uint32
        ("Error", b"\x08\xff\xff\xff\xff\x0f", b"\x08" + b"\xff" * 9 + b"\x01"),  # int32: -1
        ("PutRequest", b"\x53\x5b\x0d1234\x5c\x54\x0a\x01k", b"\x0a\x01k"),  # unknown groups
        ("WatchCreateRequest", b"\x28\x01\x2a\x02\x00\x01\x28\x00", b"\x2a\x04\x01\x00\x01\x00"),
        ("PutResponse", b"\x0a\x02\x18\x05\x0a\x02\x20\x06", b"\x0a\x04\x18\x05\x20\x06"),  # merged
        ("PutResponse", b"\x0a\x02\x18\x05\x0a\x02\x18\x00", b"\x0a\x00"),  # merged to the default
        ("Compare", b"\x20\x05\x28\x00", b"\x28\x00"),  # the last member of a oneof, though 0
        ("Compare", b"\x20\x05\xa8\x00\x06", b"\x28\x06"),  # the same by the slow way
        ("Compare", b"\x82\x04\x01z\x10\x07", b"\x10\x07\x82\x04\x01z"),  # an unknown enum value
        ("RequestOp", b"\x12\x00\x0a\x02\x18\x01\x0a\x02\x20\x02", b"\x0a\x04\x18\x01\x20\x02"),
    ],
)
def test_a_rule_of_protobuf_holds(name: str, sent: bytes, meaning: bytes) -> None:
    assert library_bytes(name, sent) == meaning, "the example itself is wrong"
    assert_read_as_the_library_does(name, sent)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"\x0a", "truncated"),
        (b"\x0a\x05abc", "truncated"),
        (b"\x0a\xff\xff\xff\xff\x07abc", "truncated"),
        (b"\x18\x80", "truncated"),
        (b"\x18" + b"\x80" * 10 + b"\x00", "more than 10 bytes"),
        (b"\x0a\x81\x80\x80\x80\x80\x00k", "out of range"),
        (b"\x00\x00", "field number 0"),
        (b"\x0e", "wire type 6"),
        (b"\x0f", "wire type 7"),
        (b"\x54", "wire type 4"),
        (b"\x53\x5c", "wire type 4"),
        (b"\x53", "truncated"),
        (b"\x49\x00", "truncated"),
    ],
)
def test_a_broken_message_is_refused_with_the_reason(sent: bytes, why: str) -> None:
    assert library_bytes("PutRequest", sent) is None
    with pytest.raises(proto.DecodeError, match=why):
        proto.PutRequest.decode(sent)


def test_a_string_that_is_not_utf8_is_refused() -> None:
    for text in (b"\xff", b"\xed\xa0\x80", b"\xc0\x80"):
        with pytest.raises(proto.DecodeError, match="UTF-8"):
            proto.MemberAddRequest.decode(b"\x0a" + proto.varint(len(text)) + text)


def test_a_message_is_not_read_beyond_its_end() -> None:
    buf = b"\x0a\x03abc\x18\x81\x01\x12\x01v"
    for end in range(len(buf)):
        whole = end in (0, 5, 8)
        assert (library_bytes("PutRequest", buf[:end]) is not None) == whole
        if whole:
            assert proto.PutRequest.decode(buf, 0, end) == proto.PutRequest.decode(buf[:end])
        else:
            with pytest.raises(proto.DecodeError):
                proto.PutRequest.decode(buf, 0, end)


@pytest.mark.parametrize("levels", [proto.MAX_DEPTH, proto.MAX_DEPTH + 1])
def test_nesting_is_limited_as_in_the_library(levels: int) -> None:
    nested = b""
    for level in range(levels, 0, -1):  # TxnRequest.success, RequestOp.request_txn, and so on
        nested = (b"\x12" if level % 2 else b"\x22") + proto.varint(len(nested)) + nested
    groups = b"\x53" * levels + b"\x54" * levels
    for name, sent in [("TxnRequest", nested), ("TxnRequest", groups), ("HashRequest", groups)]:
        assert (library_bytes(name, sent) is None) == (levels > proto.MAX_DEPTH)
        assert_read_as_the_library_does(name, sent)


def test_a_message_far_too_deep_is_refused_and_nothing_else() -> None:
    for sent in (b"\x53" * 100_000, b"\x12\x80\x80\x40" * 100_000):
        with pytest.raises(proto.DecodeError):
            proto.TxnRequest.decode(sent)
    # Each level claims more than the level around it has: must not be read again per level.
    sent = b"\x12\xff\x7f\x22\xff\x7f" * 3_000
    with pytest.raises(proto.DecodeError):
        proto.TxnRequest.decode(sent)


@BRIEF
@given(st.sampled_from(NAMES), st.data())
def test_two_messages_in_a_row_are_their_merge(name: str, data: st.DataObject) -> None:
    first, second = data.draw(messages(name)), data.draw(messages(name))
    assert_read_as_the_library_does(name, first.encode() + second.encode())


def test_a_long_message_of_tiny_parts_takes_linear_time() -> None:
    # Enough occurrences that quadratic time would run into the time limit of the test run.
    many = 200_000
    filters = proto.WatchCreateRequest.decode(b"\x28\x01" * many).filters
    assert len(filters) == many
    assert len(proto.MemberListResponse.decode(b"\x92\x00\x00" * many).members) == many
    assert proto.PutResponse.decode(b"\x0a\x02\x18\x05" * many).header.revision == 5
    assert proto.Compare.decode(b"\x20\x05\x28\x06" * many).version is None
    assert proto.HashRequest.decode(b"\x53\x54\x58\x01" * many) == proto.HashRequest()


# --- Messages as Python objects ----------------------------------------------------------------


def test_an_unset_field_reads_as_its_default_and_takes_no_room() -> None:
    request = proto.RangeRequest.decode(b"\x0a\x01k")
    assert vars(request) == {"key": b"k"}
    assert (request.range_end, request.limit, request.keys_only) == (b"", 0, False)
    assert proto.RangeResponse().header is None
    assert proto.RangeResponse().kvs == ()
    assert proto.Compare().version is None


@pytest.mark.skipif(sys.version_info < (3, 11), reason="instances have a dict before Python 3.11")
@pytest.mark.parametrize("name", sorted(proto.MESSAGES))
def test_a_message_takes_the_same_room_whatever_came_before_it(name: str) -> None:
    cls = proto.MESSAGES[name]
    for _ in range(100):
        cls.decode(b"")
    message = object.__new__(cls)
    for field in cls.FIELDS:
        setattr(message, field.name, field.default)
    assert not any(type(part) is dict for part in gc.get_referents(message))


def test_messages_are_equal_when_their_wire_forms_are() -> None:
    assert proto.PutRequest(key=b"k", lease=0) == proto.PutRequest(key=b"k")
    assert proto.RangeResponse(kvs=[]) == proto.RangeResponse()
    assert proto.Compare(version=0) != proto.Compare()
    assert proto.PutResponse(header=proto.ResponseHeader()) != proto.PutResponse()
    assert proto.LeaseRevokeRequest(ID=1) != proto.LeaseStatus(ID=1)


def test_repr_shows_what_is_set() -> None:
    request = proto.TxnRequest(success=[proto.RequestOp(request_put=proto.PutRequest(key=b"k"))])
    assert repr(request) == "TxnRequest(success=[RequestOp(request_put=PutRequest(key=b'k'))])"


def test_which_names_the_member_of_a_oneof() -> None:
    assert proto.RequestOp().which("request") is None
    op = proto.RequestOp.decode(b"\x12\x00\x1a\x00")
    assert op.which("request") == "request_delete_range"


def test_values_of_enums_are_attributes() -> None:
    assert proto.Compare.NOT_EQUAL == proto.ENUMS["Compare.CompareResult"]["NOT_EQUAL"] == 3
    assert proto.AlarmType.CORRUPT == 2


def test_a_sub_message_may_be_given_encoded() -> None:
    kv = proto.KeyValue(key=b"k", mod_revision=7)
    header = proto.ResponseHeader(revision=9)
    whole = proto.RangeResponse(header=header, kvs=[kv, kv], count=2)
    parts = proto.RangeResponse(header=header.encode(), kvs=[kv.encode(), kv], count=2)
    assert parts.encode() == whole.encode()


def test_an_unknown_field_name_is_refused() -> None:
    with pytest.raises(TypeError, match="PutRequest has no field kye"):
        proto.PutRequest(kye=b"k")


@pytest.mark.parametrize(
    ("message", "error", "text"),
    [
        (proto.PutRequest(lease=2**63), ValueError, "PutRequest.lease"),
        (proto.PutRequest(lease=-(2**63) - 1), ValueError, "PutRequest.lease"),
        (proto.PutRequest(lease=1.5), TypeError, "PutRequest.lease"),
        (proto.PutRequest(lease=2.0**40), TypeError, "PutRequest.lease"),
        (proto.PutRequest(lease="5"), TypeError, "PutRequest.lease"),
        (proto.PutRequest(prev_kv="no"), TypeError, "PutRequest.prev_kv"),
        (proto.PutRequest(key="text"), TypeError, "PutRequest.key"),
        (proto.PutRequest(key=5), TypeError, "PutRequest.key"),
        (proto.ResponseHeader(member_id=-1), ValueError, "ResponseHeader.member_id"),
        (proto.ResponseHeader(member_id=2**64), ValueError, "ResponseHeader.member_id"),
        (proto.HashResponse(hash=2**32), ValueError, "HashResponse.hash"),
        (proto.Error(code=2**31), ValueError, "Error.code"),
        (proto.RangeRequest(sort_order=2**31), ValueError, "RangeRequest.sort_order"),
        (proto.RangeRequest(sort_order="ASCEND"), TypeError, "RangeRequest.sort_order"),
        (proto.AuthenticateRequest(name=b"root"), TypeError, "AuthenticateRequest.name"),
        (proto.AuthenticateRequest(name="\ud800"), ValueError, "AuthenticateRequest.name"),
        (proto.PutResponse(header="x"), TypeError, "PutResponse.header"),
        (proto.PutResponse(header=proto.KeyValue()), TypeError, "PutResponse.header"),
        (proto.RangeResponse(kvs=[b"", None]), TypeError, "RangeResponse.kvs"),
        (proto.RangeResponse(kvs=None), TypeError, "RangeResponse.kvs"),
        (proto.MemberAddRequest(peerURLs="http"), TypeError, "MemberAddRequest.peerURLs"),
        (proto.WatchCreateRequest(filters=[1, "NOPUT"]), TypeError, "WatchCreateRequest.filters"),
        (proto.Compare(version=1, lease=0), ValueError, "only one of version, lease"),
        (
            proto.TxnRequest(compare=[proto.Compare(version="1")]),
            TypeError,
            "^Compare.version",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(
    message: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        message.encode()


# --- Varints -----------------------------------------------------------------------------------


@BRIEF
@given(within(0, 2**64 - 1), st.binary(max_size=2), st.binary(max_size=2))
def test_a_varint_comes_back(n: int, before: bytes, after: bytes) -> None:
    data = proto.varint(n)
    end = len(before) + len(data)
    assert proto.read_varint(before + data + after, len(before), end) == (n, end)
    for cut in range(len(before), end):
        with pytest.raises(proto.DecodeError):
            proto.read_varint(before + data + after, len(before), cut)


def test_a_number_that_fits_no_varint_is_refused() -> None:
    for n in (-1, 2**64):
        with pytest.raises(ValueError, match="varint"):
            proto.varint(n)


# --- JSON --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_message_has_the_librarys_json_and_comes_back_from_it(name: str) -> None:
    @THOROUGH
    @given(messages(name))
    def claim(message: Any) -> None:
        theirs = to_library(message)
        cls = proto.MESSAGES[name]
        ours = json.loads(json_mapping.text(message))
        assert ours == json_format.MessageToDict(theirs, preserving_proto_field_name=True)
        for camel in (True, False):
            text = json_format.MessageToJson(theirs, preserving_proto_field_name=not camel)
            assert json_mapping.from_json(cls, json.loads(text)) == message
        assert json_format.ParseDict(ours, LIBRARY[name]()) == theirs

    claim()


@pytest.mark.parametrize(
    ("given_json", "meaning"),
    [
        ({"key": "a2V5", "lease": "5"}, proto.PutRequest(key=b"key", lease=5)),
        ({"key": "_-8="}, proto.PutRequest(key=b"\xff\xef")),
        ({"key": "/+8"}, proto.PutRequest(key=b"\xff\xef")),
        ({"key": ""}, proto.PutRequest()),
        ({"key": None, "lease": None}, proto.PutRequest()),
        ({"lease": 5}, proto.PutRequest(lease=5)),
        ({"lease": 5.0}, proto.PutRequest(lease=5)),
        ({"lease": "5e3"}, proto.PutRequest(lease=5000)),
        ({"lease": "-9223372036854775808"}, proto.PutRequest(lease=-(2**63))),
        ({"prevKv": True}, proto.PutRequest(prev_kv=True)),
        ({"prev_kv": True}, proto.PutRequest(prev_kv=True)),
        ({"nothing_known": [1]}, proto.PutRequest()),
    ],
)
def test_json_is_read_as_the_gateway_does(given_json: Any, meaning: Any) -> None:
    assert json_mapping.from_json(proto.PutRequest, given_json) == meaning


def test_json_enums_are_read_by_name_and_number() -> None:
    for target in ("MOD", 2):
        compare = json_mapping.from_json(proto.Compare, {"target": target, "mod_revision": "0"})
        assert compare == proto.Compare(target=2, mod_revision=0)
    assert json_mapping.text(proto.Compare(target=9)) == '{"target":9}'


def test_json_keeps_the_default_of_a_oneof_member() -> None:
    assert json_mapping.text(proto.Compare(version=0)) == '{"version":"0"}'
    op = proto.RequestOp(request_put=proto.PutRequest())
    assert json_mapping.text(op) == '{"request_put":{}}'
    assert json_mapping.from_json(proto.RequestOp, {"request_put": {}}) == op


@pytest.mark.parametrize(
    ("cls", "given_json"),
    [
        (proto.PutRequest, []),
        (proto.PutRequest, None),
        (proto.PutRequest, {"key": 5}),
        (proto.PutRequest, {"key": "a"}),
        (proto.PutRequest, {"key": "a2V5*"}),
        (proto.PutRequest, {"key": "a2V5="}),
        (proto.PutRequest, {"key": "QQ==QQ=="}),
        (proto.PutRequest, {"key": "=QQ"}),
        (proto.PutRequest, {"key": "\u00e9"}),
        (proto.PutRequest, {"lease": "1_000"}),
        (proto.PutRequest, {"lease": " 5"}),
        (proto.PutRequest, {"lease": ""}),
        (proto.PutRequest, {"lease": "0x5"}),
        (proto.PutRequest, {"lease": "1" * 5000}),
        (proto.PutRequest, {"lease": 5.5}),
        (proto.PutRequest, {"lease": float("inf")}),
        (proto.PutRequest, {"lease": float("nan")}),
        (proto.PutRequest, {"lease": True}),
        (proto.PutRequest, {"lease": 2**63}),
        (proto.PutRequest, {"lease": "1e999"}),
        (proto.PutRequest, {"lease": "1-1"}),
        (proto.PutRequest, {"prev_kv": "true"}),
        (proto.PutRequest, {"prev_kv": True, "prevKv": True}),
        (proto.Compare, {"target": "NAME"}),
        (proto.Compare, {"target": 2**31}),
        (proto.Compare, {"version": 1, "lease": 2}),
        (proto.PutResponse, {"header": []}),
        (proto.TxnRequest, {"compare": {}}),
        (proto.TxnRequest, {"compare": [None]}),
        (proto.MemberAddRequest, {"peerURLs": [5]}),
        (proto.MemberAddRequest, {"peerURLs": ["\ud800"]}),
    ],
)
def test_bad_json_is_refused(cls: Any, given_json: Any) -> None:
    with pytest.raises(proto.DecodeError):
        json_mapping.from_json(cls, given_json)


def test_json_nested_too_deep_is_refused() -> None:
    nested: Any = {}
    for _ in range(proto.MAX_DEPTH):
        nested = {"success": [{"request_txn": nested}]}
    with pytest.raises(proto.DecodeError, match="deeper"):
        json_mapping.from_json(proto.TxnRequest, nested)


JSON_KEYS = st.sampled_from(sorted({f.name for m in proto.MESSAGES.values() for f in m.FIELDS}))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_KEYS, inner, max_size=3),
    max_leaves=6,
)


@BRIEF
@given(st.sampled_from(NAMES), st.data())
def test_any_json_is_a_message_or_a_decode_error(name: str, data: st.DataObject) -> None:
    cls = proto.MESSAGES[name]
    obj = data.draw(st.fixed_dictionaries({}, optional={f.name: JSON for f in cls.FIELDS}))
    try:
        message = json_mapping.from_json(cls, obj)
    except proto.DecodeError:
        return
    assert cls.decode(message.encode()) == message


# --- Methods and frames ------------------------------------------------------------------------


def test_the_methods_are_those_of_the_protocol_page() -> None:
    page = pathlib.Path(__file__).parent.parent / "docs" / "protocol.md"
    row = re.compile(r"^\| (0x\w\w) \| (\w+\.\w+) \| (stream )?(\w+) \| (stream )?(\w+) \|$", re.M)
    described = {
        int(number, 16): (name, request, response, bool(client), bool(server))
        for number, name, client, request, server, response in row.findall(page.read_text())
    }
    assert described == {
        number: (m.full, m.request.NAME, m.response.NAME, m.client_stream, m.server_stream)
        for number, m in methods.METHODS.items()
    }


def test_a_method_is_found_by_number_and_by_name() -> None:
    put = methods.METHODS[0x02]
    assert put is methods.METHOD_BY_NAME["KV.Put"]
    assert put.grpc_path == "/etcdserverpb.KV/Put"
    assert put.request is proto.PutRequest
    assert methods.METHOD_BY_NAME["Lock.Unlock"].service == "v3lockpb.Lock"
    revoke = methods.METHOD_BY_NAME["Lease.LeaseRevoke"]
    assert revoke.http_paths == ("/v3/lease/revoke", "/v3/kv/lease/revoke")
    # Those of etcd, and RotateKey.
    assert len({path for m in methods.METHODS.values() for path in m.http_paths}) == 51 + 1


FRAMES = st.lists(
    st.tuples(
        st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(0, 255), st.binary(max_size=40)
    ),
    max_size=6,
)


@BRIEF
@given(FRAMES, st.data())
def test_frames_come_back_however_the_stream_is_cut(
    sent: list[tuple[int, int, int, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(frames.frame(*frame) for frame in sent)
    reader = frames.FrameReader(max_frame_bytes=64)
    got = []
    pos = 0
    while pos < len(stream):
        size_bytes = data.draw(st.integers(1, 30))
        reader.feed(stream[pos : pos + size_bytes])
        pos += size_bytes
        for frame in reader:
            assert type(frame[3]) is bytes
            got.append(frame)
            if data.draw(st.booleans()):
                break  # The rest must still be there later.
    got.extend(reader)
    assert got == sent


@pytest.mark.parametrize("length", [0, 5, 65, 2**32 - 1])
def test_a_frame_of_a_bad_length_is_refused_after_the_frames_before_it(length: int) -> None:
    reader = frames.FrameReader(max_frame_bytes=64)
    bad = frames.FRAME.pack(length, 2, 2, 0)
    reader.feed(frames.frame(1, 2, 0, b"x") + bad)
    received = iter(reader)
    assert next(received) == (1, 2, 0, b"x")
    with pytest.raises(frames.ProtocolError, match=str(length)):
        next(received)


def test_a_frame_of_the_largest_length_passes() -> None:
    reader = frames.FrameReader(max_frame_bytes=64)
    reader.feed(frames.frame(1, 2, 0, b"x" * 58))
    assert list(reader) == [(1, 2, 0, b"x" * 58)]


def test_a_large_frame_in_small_pieces_is_assembled_once() -> None:
    body = bytes(range(256)) * 4096
    stream = frames.frame(7, 2, 1, body)
    reader = frames.FrameReader(max_frame_bytes=2 << 20)
    got = []
    for pos in range(0, len(stream), 16):
        reader.feed(stream[pos : pos + 16])
        got += reader
    assert got == [(7, 2, 1, body)]


def test_the_handshake_is_twelve_bytes() -> None:
    assert frames.HANDSHAKE.pack(frames.MAGIC, 1, frames.PROTOCOL_VERSION) == (
        b"\x89ETCDLT\n\x01\x00\x01\x00"
    )


def test_a_request_of_very_many_empty_items_is_refused() -> None:
    body = b"\x0a\x00" * (proto.MAX_REQUEST_ITEMS + 1)
    assert len(proto.TxnRequest.decode(body[:-2]).compare) == proto.MAX_REQUEST_ITEMS
    with pytest.raises(proto.DecodeError, match="more than 100000 compare"):
        proto.TxnRequest.decode(body)
    kvs = b"\x12\x00" * (proto.MAX_REQUEST_ITEMS + 1)
    assert len(proto.RangeResponse.decode(kvs).kvs) == proto.MAX_REQUEST_ITEMS + 1


# The limit on fields.


def sized(number: int, content: bytes) -> bytes:
    """A field of bytes, or a message."""
    return proto.varint(number << 3 | 2) + proto.varint(len(content)) + content


ITEMS_OF_ITEMS = sized(2, sized(4, b"\x12\x00" * 50)) * 1000
MANY_FIELDS = {
    "packed numbers": (proto.WatchRequest, sized(1, sized(5, bytes(1_000_000)))),
    "items": (proto.TxnRequest, b"\x12\x00" * 1_000_000),
    "unknown fields": (proto.TxnRequest, b"\x78\x01" * 1_000_000),
    "repetitions": (proto.PutRequest, b"\x2a\x00" * 1_000_000),
    "a group": (proto.TxnRequest, b"\x7b" + b"\x08\x01" * 1_000_000 + b"\x7c"),
    "items of items": (proto.TxnRequest, ITEMS_OF_ITEMS),
}
"""About a megabyte each, of fields of a byte or two."""


@pytest.mark.parametrize(("cls", "body"), MANY_FIELDS.values(), ids=list(MANY_FIELDS))
def test_a_request_with_too_many_fields_is_refused_early(cls: Any, body: bytes) -> None:
    steps = [0]

    def count(frame: Any, event: str, arg: Any) -> None:
        steps[0] += event == "call"

    sys.setprofile(count)
    try:
        with pytest.raises(proto.DecodeError, match="more than 10000 fields"):
            proto.decode_request(cls.decode, body)
    finally:
        sys.setprofile(None)
    assert steps[0] <= 10 * proto.MAX_FIELDS


def test_what_is_in_the_log_may_have_any_number_of_fields() -> None:
    body = b"\x12\x00" * (proto.MAX_FIELDS + 1)
    with pytest.raises(proto.DecodeError):
        proto.decode_request(proto.TxnRequest.decode, body)
    assert len(proto.TxnRequest.decode(body).success) == proto.MAX_FIELDS + 1


def test_a_large_value_counts_as_one_field() -> None:
    body = proto.PutRequest(key=b"k", value=bytes(1 << 20)).encode()
    assert len(proto.decode_request(proto.PutRequest.decode, body).value) == 1 << 20


def test_a_configured_number_of_operations_allows_for_their_fields() -> None:
    body = b"\x12\x00" * 30_000
    proto.allow_fields(100_000)
    try:
        assert len(proto.decode_request(proto.TxnRequest.decode, body).success) == 30_000
    finally:
        proto.allow_fields(0)
