"""The codec of the messages: classes, encoders and decoders, made from the table in `schema.py`.

- Each message is a plain class: `PutRequest(key=b"k")`. Class attributes are the defaults; an
  instance holds only what was set. The default of a message field and of a member of a oneof is
  None ("absent"), that of a repeated field `()`. Enum values are ints, unknown ones included. The
  values of a nested enum are attributes of its message: `Compare.EQUAL`.
- `PutRequest(...).encode()` and `PutRequest.decode(buf)` are functions written for that message.
  They are generated as Python source at first use (a few ms; `prepare` does it early).

A decoder accepts what the protobuf library accepts and decodes it to the same message: fields in
any order; unknown fields and groups are skipped; repeated numbers packed or not; the last scalar
wins; repeated occurrences of a singular message merge; the last member of a oneof wins; numbers are
cut to their width. Everything else raises DecodeError: input that ends early, a varint of more than
10 bytes, field number 0, wire types 6 and 7, an unmatched group, a string that is not UTF-8,
messages nested deeper than `MAX_DEPTH`. No input raises anything else, takes more than linear time,
or gets bytes from outside `buf[pos:end]` into the result.

An encoder writes fields in the order of the table and omits defaults. A message field may hold the
encoded bytes of the message instead; they are copied unchanged. A value of a wrong type or out of
range raises TypeError or ValueError and names the field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from etcdlite.schema import SCHEMA

if TYPE_CHECKING:
    from etcdlite.messages import *  # noqa: F403  # The types of what `_load_schema` makes.

MAX_REQUEST_ITEMS = 100_000
"""Comparisons or operations in one request, whatever `max-txn-ops` says."""

MAX_FIELDS = 10_000
"""Fields, nested ones included, in a request that `decode_request` decodes. This number takes about
10 ms. `allow_fields` raises it."""

FEW_BYTES = MAX_FIELDS // 2
"""A request up to this size has fewer fields than the limit: the smallest takes two bytes. The
exception, packed numbers, takes one byte each."""

MAX_DEPTH = 100
"""The deepest nesting of messages and unknown groups, as in the protobuf library."""

MAX_VARINT_BYTES = 10
MAX_LENGTH_VARINT_BYTES = 5
"""The longest tag or length, as in the protobuf library."""


class DecodeError(ValueError):
    """The sender's fault: the bytes, or the JSON, are not the expected message."""


class Field(NamedTuple):
    """One line of a message. `kind` is a scalar type's name, "enum" or "message"."""

    number: int
    name: str
    kind: str
    type_name: str
    repeated: bool
    oneof: str | None
    default: Any
    json_name: str


SECRETS = frozenset({"password", "hashedPassword", "token", "seed"})
"""Fields that `repr` does not show: it ends up in logs and on terminals."""

M = TypeVar("M", bound="Message")


class _Generated:
    """A placeholder that generates a message's codec at first use, which then replaces it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, message: Message | None, cls: type[Message]) -> Any:
        if cls is Message:
            return self
        prepare(cls)
        return getattr(cls if message is None else message, self.name)


class Message:
    NAME = ""
    FIELDS: ClassVar[tuple[Field, ...]] = ()
    FIELD_BY_NUMBER: ClassVar[dict[int, Field]] = {}
    FIELD_BY_NAME: ClassVar[dict[str, Field]] = {}

    __hash__ = None  # type: ignore[assignment]

    if TYPE_CHECKING:

        @classmethod
        def decode(cls: type[M], buf: bytes, pos: int = 0, end: int | None = None) -> M:
            """The message in `buf[pos:end]`. Raises DecodeError."""

        def encode(self) -> bytes:
            """The wire form. Raises TypeError or ValueError for a value that does not fit."""

    else:
        decode = _Generated("decode")
        encode = _Generated("encode")

    def __init__(self, **values: Any) -> None:
        fields = self.FIELD_BY_NAME
        for name in values:
            if name not in fields:
                raise TypeError(f"{self.NAME} has no field {name}")
        self.__dict__ = values

    def which(self, oneof: str) -> str | None:
        """The name of the member of `oneof` that is set."""
        for field in self.FIELDS:
            if field.oneof == oneof and getattr(self, field.name) is not None:
                return field.name
        return None

    def present(self) -> Iterator[tuple[Field, Any]]:
        """The fields that the wire form contains, with their values, in the table's order."""
        for field in self.FIELDS:
            value = getattr(self, field.name)
            if value is not None and (value or field.default is None):
                yield field, value

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return _comparable(self) == _comparable(other)

    def __repr__(self) -> str:
        inner = (
            f"{field.name}={'<redacted>' if field.name in SECRETS else repr(value)}"
            for field, value in self.present()
        )
        return f"{self.NAME}({', '.join(inner)})"


def _comparable(message: Message) -> dict[str, Any]:
    return {
        field.name: list(value) if field.repeated else value for field, value in message.present()
    }


# --- Classes from the schema ---------------------------------------------------------------------

_DEFAULTS: dict[str, Any] = {
    "bytes": b"",
    "string": "",
    "bool": False,
    "int64": 0,
    "uint64": 0,
    "int32": 0,
    "uint32": 0,
    "enum": 0,
    "message": None,
}

MESSAGES: dict[str, type[Message]] = {}
"""Every message class by its name."""

ENUMS: dict[str, dict[str, int]] = {}
"""Enum -> value's name -> value. A nested enum is called "Compare.CompareResult"."""


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in rest)


def _field(text: str) -> Field:
    number, name, type_name, *oneof = text.split()
    repeated = type_name.startswith("*")
    type_name = type_name.lstrip("*")
    kind = type_name
    if kind not in _DEFAULTS:
        kind = "enum" if type_name in ENUMS else "message"
    default = () if repeated else None if oneof else _DEFAULTS[kind]
    member_of = oneof[0].lstrip("|") if oneof else None
    return Field(int(number), name, kind, type_name, repeated, member_of, default, _camel(name))


def _load_schema() -> None:
    for line in SCHEMA.replace("\n    ", " ").strip().splitlines():
        keyword, _, rest = line.partition(" ")
        name, _, items = rest.partition(":")
        if keyword == "enum":
            pairs = (item.strip().split("=") for item in items.split(","))
            ENUMS[name] = {key: int(number) for key, number in pairs}
        elif keyword == "message":
            fields = tuple(_field(item) for item in items.split(",") if item)
            members: dict[str, Any] = {field.name: field.default for field in fields}
            for enum, values in ENUMS.items():
                if enum.startswith(name + "."):
                    members.update(values)
            members.update(__module__=__name__, NAME=name, FIELDS=fields)
            members["FIELD_BY_NUMBER"] = {field.number: field for field in fields}
            members["FIELD_BY_NAME"] = {field.name: field for field in fields}
            MESSAGES[name] = type(name, (Message,), members)
            # CPython takes the attributes of the first instances for those of all: a message with
            # another one has a dict of its own, and twice the size.
            first = object.__new__(MESSAGES[name])
            for field in fields:
                setattr(first, field.name, field.default)


_load_schema()
globals().update(MESSAGES, AlarmType=type("AlarmType", (), dict(ENUMS["AlarmType"])))

# --- Varints -----------------------------------------------------------------------------------

_LAST = [bytes((n,)) for n in range(128)]
_MORE = [bytes((n | 128,)) for n in range(128)]
VARINTS = _LAST + [low + high for high in _LAST[1:] for low in _MORE]
_TABLED = len(VARINTS)
# The same 14 bits when more bytes follow. The tables take 1.5 MB and halve the time of a revision.
_CONTINUED = [low + high for high in _MORE for low in _MORE]


def varint(n: int) -> bytes:
    """`n`, 0 to 2**64-1, as a varint. Raises ValueError or TypeError."""
    if 0 <= n < 16384:
        return VARINTS[n]
    if 0 < n < 1 << 28:
        return _CONTINUED[n & 16383] + VARINTS[n >> 14]
    if not 0 <= n < 1 << 64:
        raise ValueError(f"{n} does not fit a varint")
    out = b""
    while n > 16383:
        out += _CONTINUED[n & 16383]
        n >>= 14
    return out + VARINTS[n]


def varint64(n: int) -> bytes:
    """As `varint`, of an int64, which may be negative."""
    return varint(n & 0xFFFFFFFFFFFFFFFF)


def read_varint(buf: bytes, pos: int, end: int) -> tuple[int, int]:
    """The varint at `pos`, cut to 64 bits, and the position after it. Raises DecodeError."""
    try:
        value, pos = _read_uint64(buf, pos)
    except IndexError:
        pos = end + 1
    if pos > end:
        raise DecodeError("truncated varint")
    return value, pos


# The readers below check only the end of `buf`, by IndexError. The caller checks that the position
# they return is not beyond the end of the message.

# Per byte of a varint after the first: its shift, and the sum of the continuation bits before it.
_STEPS = [(7 * i, sum(128 << 7 * j for j in range(i))) for i in range(1, MAX_VARINT_BYTES)]


def _read_uint64(buf: bytes, pos: int) -> tuple[int, int]:
    value = buf[pos]
    pos += 1
    if value < 128:
        return value, pos
    for shift, bias in _STEPS:
        byte = buf[pos]
        pos += 1
        value += byte << shift
        if byte < 128:
            return (value - bias) & 0xFFFFFFFFFFFFFFFF, pos
    raise DecodeError(f"varint of more than {MAX_VARINT_BYTES} bytes")


def _read_int64(buf: bytes, pos: int) -> tuple[int, int]:
    value, pos = _read_uint64(buf, pos)
    return value - (1 << 64) if value >> 63 else value, pos


def _read_uint32(buf: bytes, pos: int) -> tuple[int, int]:
    value, pos = _read_uint64(buf, pos)
    return value & 0xFFFFFFFF, pos


def _read_int32(buf: bytes, pos: int) -> tuple[int, int]:
    value, pos = _read_uint64(buf, pos)
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000, pos


def _read_bool(buf: bytes, pos: int) -> tuple[bool, int]:
    value, pos = _read_uint64(buf, pos)
    return value != 0, pos


def _read_short(buf: bytes, pos: int, largest: int) -> tuple[int, int]:
    """A tag or a length: a varint of at most 5 bytes."""
    value, after = _read_uint64(buf, pos)
    if after - pos > MAX_LENGTH_VARINT_BYTES or value > largest:
        raise DecodeError("tag or length out of range")
    return value, after


def _read_length(buf: bytes, pos: int) -> tuple[int, int]:
    return _read_short(buf, pos, 0x7FFFFFFF)


def _read_tag(buf: bytes, pos: int) -> tuple[int, int]:
    return _read_short(buf, pos, 0xFFFFFFFF)


_READERS: dict[str, Callable[[bytes, int], tuple[int, int]]] = {
    "bool": _read_bool,
    "int64": _read_int64,
    "uint64": _read_uint64,
    "int32": _read_int32,
    "uint32": _read_uint32,
    "enum": _read_int32,
}

RANGES = {
    "int64": (-(1 << 63), (1 << 63) - 1),
    "uint64": (0, (1 << 64) - 1),
    "int32": (-(1 << 31), (1 << 31) - 1),
    "uint32": (0, (1 << 32) - 1),
    "enum": (-(1 << 31), (1 << 31) - 1),
}
"""The least and the greatest number of each kind."""


def _writer(kind: str) -> Callable[[int], bytes]:
    low, high = RANGES[kind]

    def write(n: int) -> bytes:
        if not low <= n <= high:
            raise ValueError(n)
        return varint64(n)

    return write


_WRITERS = {kind: _writer(kind) for kind in RANGES}


# --- Generated codecs --------------------------------------------------------------------------
#
# Hot path, so flat: five times as fast as interpreting the schema. A decoder is a loop over a chain
# of "if this is the tag" in ascending order of the field numbers, so a message whose fields are in
# order, as every encoder writes them, takes one pass. A position beyond the end is detected once,
# after the loop, instead of per field: slices and small reads beyond the end are harmless until
# then. Rare input (tags of several bytes, packed numbers, unknown fields) goes to `_decode_other`,
# which interprets the schema.

_NAMESPACE: dict[str, Any] = {}

_fields_left: list[float] = [math.inf]
"""What the request that is being decoded may still have; infinite for everything else."""

_max_fields = MAX_FIELDS


def allow_fields(count: int) -> None:
    """Let requests have this many fields, if that is more than `MAX_FIELDS`."""
    global _max_fields
    _max_fields = max(MAX_FIELDS, count)


def decode_request(
    decode: Callable[[bytes, int, int], M], buf: bytes, pos: int = 0, end: int | None = None
) -> M:
    """Decode a request of a client, with limits on its fields. Raises DecodeError.

    What is in the log is decoded without, because every member must apply it."""
    stop = len(buf) if end is None else end
    if stop - pos <= FEW_BYTES:
        return decode(buf, pos, stop)
    _fields_left[0] = _max_fields
    try:
        return decode(buf, pos, stop)
    finally:
        _fields_left[0] = math.inf


def _count_fields(count: int) -> None:
    _fields_left[0] -= count
    if _fields_left[0] < 0:
        raise DecodeError(f"more than {_max_fields} fields")


_LENGTH = """
n = buf[pos + 1]
if n < 128:
    pos += 2
elif (high := buf[pos + 2]) < 128:
    n += (high << 7) - 128
    pos += 3
else:
    n, pos = _read_length(buf, pos + 1)
stop = pos + n
"""

_NUMBER = """
v = buf[pos + 1]
if v < 128:
    pos += 2
else:
    v, pos = {reader}(buf, pos + 1)
"""

_NEXT = """
if pos >= end:
    break
tag = buf[pos]
"""

_COUNT = """
left[0] -= 1
if left[0] < 0:
    count_fields(0)
"""

_VALUES = {"bytes": "buf[pos:stop]", "string": 'str(buf[pos:stop], "utf-8")', "bool": "v != 0"}


def _indent(text: str, spaces: int) -> str:
    return "".join(f"{' ' * spaces}{line}\n" for line in text.strip().splitlines())


def _is_packed(field: Field) -> bool:
    return field.repeated and field.kind in _READERS


def _tag(field: Field) -> int:
    return field.number << 3 | (2 if _is_packed(field) or field.kind not in _READERS else 0)


def _decoder_source(cls: type[Message]) -> str:
    body = ""
    oneofs = {field.oneof for field in cls.FIELDS if field.oneof}
    assert len(oneofs) <= 1, f"{cls.NAME}: more than one oneof"
    fast = [field for field in cls.FIELDS if field.number < 16 and not _is_packed(field)]
    for field in fast:
        name, kind = field.name, field.kind
        if kind == "int64":  # Inline, because revisions mostly take several bytes.
            read = _NUMBER.format(reader="_read_uint64") + "    if v >> 63:\n        v -= 1 << 64\n"
        elif kind in _READERS:
            read = _NUMBER.format(reader=_READERS[kind].__name__)
        else:
            read = _LENGTH
        value = _VALUES.get(kind, "v")
        if kind == "message":
            value = f"decode_{field.type_name}(buf, pos, stop, depth - 1)"
        step = "" if kind in _READERS else "pos = stop\n"
        if field.repeated:
            text = f"if tag == {_tag(field)}:\n    items = m.{name}\n    if not items:\n"
            text += f"        items = m.{name} = []\n    while tag == {_tag(field)}:\n"
            if cls in _IN_REQUESTS:
                text += _indent(_COUNT, 8)
            if kind == "message" and cls.NAME.endswith("Request"):
                # An empty item is two bytes on the wire and a thousand times that in memory.
                text += f"        if len(items) >= {MAX_REQUEST_ITEMS}:\n"
                text += f"            raise DecodeError('more than {MAX_REQUEST_ITEMS} {name}')\n"
            text += _indent(f"{read}\nitems.append({value})\n{step}{_NEXT}", 8)
        else:
            text = f"if tag == {_tag(field)}:\n" + _indent(read, 4)
            if field.oneof:
                text += f"    if one != {name!r}:\n        if one is not None:\n"
                text += f"            delattr(m, one)\n        one = {name!r}\n"
            if kind == "message":
                text += f"    v = {value}\n    if m.{name} is None:\n        m.{name} = v\n"
                text += f"    else:\n        _merge(m.{name}, v)\n"
            else:
                text += f"    m.{name} = {value}\n"
            text += _indent(step + _NEXT, 4)
        body += text
    tags = bytes(_tag(field) for field in fast)
    body += f"if tag not in {tags!r}:\n    pos = _decode_other(m, buf, pos, end, depth)\n"
    for oneof in oneofs:
        body += f"    one = m.which({oneof!r})\n"
    inner = [MESSAGES[f.type_name] for f in cls.FIELDS if f.kind == "message"]
    recurses = any(cls in _parts(message) for message in inner)
    return (
        f"def decode_{cls.NAME}(buf, pos=0, end=None, depth={MAX_DEPTH}):\n"
        f"    m = new({cls.NAME})\n"
        "    if end is None:\n        end = len(buf)\n"
        + ("    one = None\n" if oneofs else "")
        + ("    if depth < 0:\n        raise too_deep()\n" if recurses else "")
        + "    try:\n        while pos < end:\n            tag = buf[pos]\n"
        + (_indent(_COUNT, 12) if cls in _IN_REQUESTS else "")
        + _indent(body, 12)
        + "    except IndexError:\n        pos = end + 1\n"
        "    except UnicodeDecodeError:\n"
        f"        raise DecodeError('{cls.NAME}: a string is not UTF-8') from None\n"
        "    if pos != end:\n"
        f"        raise DecodeError('{cls.NAME}: truncated')\n"
        "    return m\n"
    )


def _encoder_source(cls: type[Message]) -> str:
    body = ""
    oneofs = {field.oneof for field in cls.FIELDS if field.oneof}
    for field in cls.FIELDS:
        tag, kind, name = varint(_tag(field)), field.kind, field.name
        sized = f"n = len(v)\nout += {tag!r}, VARINTS[n] if n < {_TABLED} else varint(n), v\n"
        if kind == "message":
            sized = f"if v.__class__ is not bytes:\n    v = encode_{field.type_name}(v)\n" + sized
        elif kind == "string":
            sized = "v = v.encode()\n" + sized
        number = f"VARINTS[v] if 0 <= v < {_TABLED} else _write_{kind}(v)"
        if field.repeated and kind in _READERS:
            text = f"if m.{name}:\n    v = b''.join([{number} for v in m.{name}])\n"
            body += text + _indent(sized, 4)
            continue
        if field.repeated:
            if kind == "string":  # A str would be encoded letter by letter.
                body += f"if m.{name}.__class__ is str:\n    raise TypeError\n"
            body += f"for v in m.{name}:\n" + _indent(sized, 4)
            continue
        if field.oneof:
            text = f"v = m.{name}\nif v is not None:\n    if one:\n        raise ValueError\n"
            text += "    one = True\n"
        elif kind == "message":
            text = f"v = m.{name}\nif v is not None:\n"
        else:
            text = f"v = m.{name}\nif v:\n"
        if kind == "bool":
            true = tag + b"\x01"
            text += f"    if v is not True:\n        raise TypeError\n    out.append({true!r})\n"
        elif kind in _READERS:
            text += f"    out.append({tag!r})\n    out.append({number})\n"
        else:
            text += _indent(sized, 4)
        body += text
    return (
        f"def encode_{cls.NAME}(m):\n    out = []\n"
        + ("    one = False\n" if oneofs else "")
        + "    try:\n"
        + _indent(body or "pass", 8)
        + "        return b''.join(out)\n"
        "    except (TypeError, ValueError, AttributeError):\n"
        f"        _complain({cls.NAME}, m)\n        raise\n"
    )


def _parts(cls: type[Message]) -> list[type[Message]]:
    """The message and all messages that it can contain."""
    found = [cls]
    for message in found:
        for field in message.FIELDS:
            if field.kind == "message" and MESSAGES[field.type_name] not in found:
                found.append(MESSAGES[field.type_name])
    return found


_IN_REQUESTS: set[type[Message]] = set()
"""The messages that requests consist of. Their decoders count fields."""


def prepare(*classes: type[Message]) -> None:
    """Generate the codecs of these messages, and of all that they contain, before first use."""
    missing = {part for cls in classes for part in _parts(cls) if "decode" not in vars(part)}
    source = "".join(_decoder_source(cls) + _encoder_source(cls) for cls in missing)
    exec(compile(source, "<generated by etcdlite.proto>", "exec"), _NAMESPACE)
    # Only now, when all parts exist, so that no other thread sees half a codec.
    for cls in missing:
        cls.decode = staticmethod(_NAMESPACE["decode_" + cls.NAME])  # type: ignore[method-assign]
        cls.encode = _NAMESPACE["encode_" + cls.NAME]  # type: ignore[method-assign]


def _too_deep() -> DecodeError:
    return DecodeError(f"nested deeper than {MAX_DEPTH}")


def _decode_other(m: Message, buf: bytes, pos: int, end: int, depth: int) -> int:
    """Decode one field by interpreting the schema: what the generated decoders leave out."""
    tag, pos = _read_tag(buf, pos)
    wire_type = tag & 7
    field = m.FIELD_BY_NUMBER.get(tag >> 3)
    if field is None:
        return skip(buf, pos, end, tag, depth)
    reader = _READERS.get(field.kind)
    if wire_type == 0 and reader is not None:
        value, pos = reader(buf, pos)
        _put(m, field, [value] if field.repeated else value)
        return pos
    if wire_type == 2 and (reader is None or field.repeated):
        size_bytes, pos = _read_length(buf, pos)
        stop = pos + size_bytes
        if stop > end:
            raise IndexError
        if reader is None:
            value = _decode_sized(field, buf, pos, stop, depth)
            _put(m, field, [value] if field.repeated else value)
            return stop
        values = []
        _count_fields(stop - pos)
        while pos < stop:
            value, pos = reader(buf, pos)
            values.append(value)
        if pos > stop:
            raise IndexError
        _put(m, field, values)
        return stop
    return skip(buf, pos, end, tag, depth)


def _decode_sized(field: Field, buf: bytes, pos: int, stop: int, depth: int) -> Any:
    if field.kind == "message":
        return _NAMESPACE["decode_" + field.type_name](buf, pos, stop, depth - 1)
    value = buf[pos:stop]
    return value if field.kind == "bytes" else str(value, "utf-8")


def _put(m: Message, field: Field, value: Any) -> None:
    """Apply one more occurrence of a field: append, merge or replace."""
    name = field.name
    old = getattr(m, name)
    if field.repeated:
        if old:
            old += value  # In place: a new list per occurrence would take quadratic time.
        else:
            setattr(m, name, value)
    elif field.kind == "message" and old is not None:
        _merge(old, value)
    else:
        if field.oneof:
            other = m.which(field.oneof)
            if other is not None:
                delattr(m, other)
        setattr(m, name, value)


def _merge(into: Message, new: Message) -> None:
    for name, value in vars(new).items():
        _put(into, into.FIELD_BY_NAME[name], value)


def skip(buf: bytes, pos: int, end: int, tag: int, depth: int = MAX_DEPTH) -> int:
    """Where the field ends whose tag was read up to `pos`. Raises IndexError, DecodeError."""
    wire_type = tag & 7
    if tag >> 3 == 0:
        raise DecodeError("field number 0")
    if wire_type == 0:
        pos = _read_uint64(buf, pos)[1]
    elif wire_type == 1:
        pos += 8
    elif wire_type == 2:
        size_bytes, pos = _read_length(buf, pos)
        pos += size_bytes
    elif wire_type == 5:
        pos += 4
    elif wire_type == 3:
        if depth <= 0:
            raise _too_deep()
        while pos < end:
            _count_fields(1)
            inner, pos = _read_tag(buf, pos)
            if inner == tag + 1:
                return pos
            pos = skip(buf, pos, end, inner, depth - 1)
        raise IndexError
    else:
        raise DecodeError(f"wire type {wire_type} out of place")
    return pos


def _complain(cls: type[Message], m: Any) -> None:
    """Raise the error that names the field that cannot be encoded, if it is at this level."""
    if not isinstance(m, cls):
        raise TypeError(f"{m!r} is not a {cls.NAME}") from None
    members = [field.name for field, _ in m.present() if field.oneof]
    if len(members) > 1:
        raise ValueError(f"{cls.NAME}: only one of {', '.join(members)} can be set") from None
    for field in cls.FIELDS:
        value = getattr(m, field.name)
        if field.repeated and not isinstance(value, (list, tuple)):
            raise TypeError(f"{cls.NAME}.{field.name}: {value!r} is not a list") from None
        for item in value if field.repeated else (value,) if value else ():
            _check(cls, field, item)


def _check(cls: type[Message], field: Field, value: Any) -> None:
    where = f"{cls.NAME}.{field.name}"
    kind = field.kind
    if kind in RANGES:
        if not isinstance(value, int):
            raise TypeError(f"{where}: {value!r} is not an int") from None
        low, high = RANGES[kind]
        if not low <= value <= high:
            raise ValueError(f"{where}: {value} does not fit {kind}") from None
    elif kind == "bool" and not isinstance(value, bool):
        raise TypeError(f"{where}: {value!r} is not a bool") from None
    elif kind == "string":
        if not isinstance(value, str):
            raise TypeError(f"{where}: {value!r} is not a str") from None
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UnicodeError(f"{where}: {value!r} cannot be encoded as UTF-8") from None
    elif kind == "bytes" and not isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError(f"{where}: {value!r} is not bytes") from None
    elif kind == "message" and not isinstance(value, (bytes, MESSAGES[field.type_name])):
        raise TypeError(f"{where}: {value!r} is not a {field.type_name}") from None


for _request in [cls for name, cls in MESSAGES.items() if name.endswith("Request")]:
    _IN_REQUESTS.update(_parts(_request))
_NAMESPACE.update(MESSAGES)
_NAMESPACE.update({reader.__name__: reader for reader in _READERS.values()})
_NAMESPACE.update({f"_write_{kind}": writer for kind, writer in _WRITERS.items()})
_NAMESPACE.update(
    VARINTS=VARINTS,
    DecodeError=DecodeError,
    count_fields=_count_fields,
    left=_fields_left,
    new=object.__new__,
    too_deep=_too_deep,
    varint=varint,
    _complain=_complain,
    _decode_other=_decode_other,
    _merge=_merge,
    _read_length=_read_length,
)
