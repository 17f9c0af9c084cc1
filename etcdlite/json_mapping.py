"""Messages as JSON. Two dialects exist, and both are written from the encoded bytes by one walker:

| | `GATEWAY` (proto3 JSON, as etcd's gateway 3.5) | `GO` (encoding/json, as etcdctl -w json) |
|---|---|---|
| 64-bit integers | strings | numbers |
| enums | names | numbers |
| members of a oneof | beside the other fields | of a ResponseOp: inside `"Response":{...}` |

Both write fields in the schema's order under their own names, leave defaults out, write bytes as
base64, and escape `<`, `>`, `&` and the two line separators in strings.

`pieces` never builds a message: it walks the encoded bytes once and yields JSON as it goes, so that
a response of any size can be written in slices. `from_json` reads the gateway's dialect. Its input
is hostile: anything gives a message or a DecodeError, in time linear in the size of the input.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from typing import Any

from etcdlite import proto
from etcdlite.proto import DecodeError

PIECE_BYTES = 32 * 1024
PIECE_PARTS = 2_000
"""`pieces` yields after this many bytes or parts of JSON: half a millisecond of work."""

MAX_NUMBER_CHARS = 64
"""The longest number that is read from a JSON string."""

# Strings.

_UNSAFE = re.compile('[\x00-\x1f"\\\\<>&\u2028\u2029]')
_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def string(text: str) -> str:
    """A JSON string as Go's encoder writes it: safe inside HTML, too."""
    escaped = _UNSAFE.sub(lambda at: _SHORT.get(at[0]) or f"\\u{ord(at[0]):04x}", text)
    return f'"{escaped}"'


def base64(data: bytes) -> str:
    """`data` as a JSON string."""
    return f'"{binascii.b2a_base64(data, newline=False).decode("ascii")}"'


# Writing.

_VARINT_KINDS = ("int64", "uint64", "int32", "uint32", "bool", "enum")

_Table = dict[int, tuple[str, str, bool, bool, Any]]
"""Tag -> how a field is written (a plain tuple, which unpacks faster than a named one):

- `"name":`;
- the form: a scalar's kind, "message", "wrapped" (a message in an object of its own), "signed" and
  "unsigned" (plain numbers), or "packed";
- whether it is repeated;
- whether a zero is a default, and left out;
- the table of a message, the names of an enum, or form and names of packed items."""


class Dialect:
    """The rules of one JSON form, and the tables that were made from them."""

    def __init__(self, forms: dict[str, str], wrappers: dict[str, str]) -> None:
        """`forms`: field kind -> form, where they differ. `wrappers`: message -> the name of the
        object that holds its only member."""
        self._forms = forms
        self._wrappers = wrappers
        self._tables: dict[str, _Table] = {}

    def table(self, cls: type[proto.Message]) -> _Table:
        table = self._tables.get(cls.NAME)
        if table is None:
            table = self._tables[cls.NAME] = {}
            wrapper = self._wrappers.get(cls.NAME)
            for field in cls.FIELDS:
                form = self._forms.get(field.kind, field.kind)
                name = f'"{field.name}":'
                is_implicit = field.oneof is None and field.kind != "message"
                detail: Any = None
                if field.kind == "message":
                    detail = self.table(proto.MESSAGES[field.type_name])
                    if wrapper:
                        form, name = "wrapped", f'"{wrapper}":{{{name}'
                elif form == "enum":
                    detail = {n: name for name, n in proto.ENUMS[field.type_name].items()}
                is_varint = field.kind in _VARINT_KINDS
                if is_varint and field.repeated:
                    form, detail, is_varint = "packed", (form, detail), False
                tag = field.number << 3 | (0 if is_varint else 2)
                table[tag] = (name, form, field.repeated, is_implicit, detail)
        return table


GATEWAY = Dialect({"int32": "signed", "uint32": "unsigned"}, {})
GO = Dialect(
    {
        "int64": "signed",
        "int32": "signed",
        "enum": "signed",
        "uint64": "unsigned",
        "uint32": "unsigned",
    },
    {"ResponseOp": "Response"},
)


def text(message: proto.Message, dialect: Dialect = GATEWAY) -> str:
    """The JSON of a message."""
    return "".join(pieces(type(message), message.encode(), dialect))


def pieces(cls: type[proto.Message], body: bytes, dialect: Dialect = GATEWAY) -> Iterator[str]:
    """The JSON of an encoded message, in order, in pieces of roughly `PIECE_BYTES`; at least one.

    `body` must be as an encoder writes it: the fields of one number together. Those that the schema
    does not have are left out: another member, of a newer version, may have written it. Raises
    DecodeError if it is no message."""
    out: list[str] = []
    try:
        for _ in _write(out, dialect.table(cls), body, 0, len(body)):
            yield "".join(out)
            out.clear()
    except (IndexError, UnicodeDecodeError):
        raise DecodeError(f"{cls.NAME}: not a message") from None
    yield "".join(out)


def _write(out: list[str], table: _Table, buf: bytes, pos: int, end: int) -> Iterator[None]:
    # The hot path of responses: flat, and a third of the time of decoding and walking a message.
    read_varint = proto.read_varint
    array = 0
    """The tag of the repeated field that is being written."""
    comma = ""
    stopped_at = pos
    out.append("{")
    while pos < end:
        tag = buf[pos]
        pos += 1
        if tag > 127:
            tag, pos = read_varint(buf, pos - 1, end)
        if tag not in table:
            pos = proto.skip(buf, pos, end, tag)
            continue
        name, form, is_repeated, is_implicit, detail = table[tag]
        value = buf[pos]
        pos += 1
        if value > 127:
            value, pos = read_varint(buf, pos - 1, end)
        if tag == array:
            out.append(",")
        else:
            if array:
                out.append("]")
                array = 0
            if is_repeated:
                array = tag
                out.append(f"{comma}{name}[")
            elif not value and is_implicit:
                continue
            else:
                out.append(comma + name)
            comma = ","
        if form == "bytes":
            stop = pos + value
            out.append(f'"{binascii.b2a_base64(buf[pos:stop], newline=False).decode("ascii")}"')
            pos = stop
        elif form == "int64":
            out.append(f'"{value - (1 << 64) if value >> 63 else value}"')
        elif form == "uint64":
            out.append(f'"{value}"')
        elif form == "message":
            stop = pos + value
            yield from _write(out, detail, buf, pos, stop)
            pos = stop
            if len(out) > PIECE_PARTS:
                yield
        elif form == "string":
            stop = pos + value
            out.append(string(str(buf[pos:stop], "utf-8")))
            pos = stop
        elif form == "wrapped":
            stop = pos + value
            yield from _write(out, detail, buf, pos, stop)
            out.append("}")
            pos = stop
        elif form == "packed":
            stop = pos + value
            out.append(",".join(_packed(buf, pos, stop, *detail)))
            pos = stop
        else:
            out.append(_number(form, detail, value))
        if pos - stopped_at > PIECE_BYTES:
            stopped_at = pos
            yield
    if pos != end:
        raise IndexError
    out.append("]}" if array else "}")


def _number(form: str, names: Any, value: int) -> str:
    """A varint that is not a 64-bit integer of the gateway's dialect."""
    if form == "bool":
        return "true" if value else "false"
    if form == "enum" and value in names:
        return f'"{names[value]}"'
    if form == "unsigned":
        return str(value)
    return str(value - (1 << 64) if value >> 63 else value)


def _packed(buf: bytes, pos: int, end: int, form: str, names: Any) -> Iterator[str]:
    quote = '"' if form in ("int64", "uint64") else ""
    while pos < end:
        value, pos = proto.read_varint(buf, pos, end)
        number = _number("unsigned" if form == "uint64" else form, names, value)
        yield f"{quote}{number}{quote}"


# Reading.

_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def from_json(cls: type[proto.Message], obj: Any, depth: int = proto.MAX_DEPTH) -> Any:
    """The message of class `cls` from its parsed JSON form `obj`. Raises DecodeError.

    Accepts what etcd's gateway accepts: field names in either spelling, numbers as numbers or
    strings, enums by name or number, base64 in either alphabet, padded or not, null for an absent
    value. Unknown names are ignored."""
    if not isinstance(obj, dict):
        raise DecodeError(f"{cls.NAME}: not a JSON object")
    if depth < 0:
        raise DecodeError(f"nested deeper than {proto.MAX_DEPTH}")
    message = cls()
    for field in cls.FIELDS:
        value = obj.get(field.name)
        if field.json_name != field.name and field.json_name in obj:
            if field.name in obj:
                raise DecodeError(f"{cls.NAME}.{field.name}: given twice")
            value = obj[field.json_name]
        if value is None:
            continue
        where = f"{cls.NAME}.{field.name}"
        if field.oneof and message.which(field.oneof) is not None:
            raise DecodeError(f"{where}: another member of {field.oneof} is set already")
        if not field.repeated:
            setattr(message, field.name, _value_from_json(where, field, value, depth))
        elif isinstance(value, list):
            items = [_value_from_json(where, field, item, depth) for item in value]
            setattr(message, field.name, items)
        else:
            raise DecodeError(f"{where}: not a JSON array")
    return message


def _value_from_json(where: str, field: proto.Field, value: Any, depth: int) -> Any:
    kind = field.kind
    if kind == "message":
        return from_json(proto.MESSAGES[field.type_name], value, depth - 1)
    if kind == "bool":
        if isinstance(value, bool):
            return value
    elif kind == "string":
        if isinstance(value, str):
            return _checked_string(where, value)
    elif kind == "bytes":
        if isinstance(value, str):
            return _bytes_from_json(where, value)
    elif kind == "enum" and isinstance(value, str):
        names = proto.ENUMS[field.type_name]
        if value in names:
            return names[value]
    else:
        number = _number_from_json(value)
        low, high = proto.RANGES[kind]
        if number is not None and low <= number <= high:
            return number
    raise DecodeError(f"{where}: not a valid {kind}")


def _number_from_json(value: Any) -> int | None:
    """An integer given as a number or as a string of one ("5", 5, 5.0, 5e3); None if it is not."""
    if isinstance(value, str):
        # int() and float() alone also take spaces, underscores, "nan" and other scripts' digits.
        if len(value) > MAX_NUMBER_CHARS or not value or value.strip("+-.eE0123456789"):
            return None
        try:
            value = float(value) if value.strip("-0123456789") else int(value)
        except ValueError:
            return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _checked_string(where: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DecodeError(f"{where}: half of a surrogate pair") from None
    return value


def _bytes_from_json(where: str, text: str) -> bytes:
    # As in Go, line ends may stand anywhere: `base64` prints some.
    text = text.replace("\n", "").replace("\r", "")
    digits = text.rstrip("=").replace("-", "+").replace("_", "/").encode("ascii", "replace")
    padding = b"=" * (-len(digits) % 4)
    given = len(text) - len(digits)
    # a2b_base64 alone would skip characters outside the alphabet.
    if digits.translate(None, _BASE64) or len(padding) > 2 or given not in (0, len(padding)):
        raise DecodeError(f"{where}: not base64")
    return binascii.a2b_base64(digits + padding)
