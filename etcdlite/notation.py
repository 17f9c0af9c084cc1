"""How values are written in flags, files and output: Go's integers, booleans, durations and quoted
strings, and sizes with binary units.

Parsers raise ValueError with the text of Go's own error, which etcdctl shows. They accept exactly
what Go accepts: no spaces, no digits of other scripts, no underscores unless the base is 0.

Regular expressions are compiled when they are first used: most starts of etcdlite-ctl need none.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

_MAX_INT64 = (1 << 63) - 1

# Files.


def load_toml(data: bytes) -> dict[str, Any]:
    """What a TOML file holds. Raises ValueError or RecursionError if it is none."""
    # Processes without such a file need not load the parser.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    # A file that an editor on Windows saved begins with a byte order mark.
    return tomllib.loads(data.decode("utf-8-sig"))


def toml_text(value: Any, native: type | None) -> str:
    """A TOML string, or a value of type `native`, as command line text. Raises ValueError."""
    texts = value if isinstance(value, list) else [value]
    if any(isinstance(text, str) and "\0" in text for text in texts):
        raise ValueError("a NUL (\\u0000) is in it; remove that")
    if isinstance(value, str):
        return value
    if native is bool and isinstance(value, bool):
        return "true" if value else "false"
    if native is int and type(value) is int:
        return str(value)
    if native is list and isinstance(value, list):
        if all(isinstance(item, str) and "," not in item for item in value):
            return ",".join(value)
    wanted: dict[type | None, str] = {
        bool: "true or false",
        int: "a whole number or a string",
        list: "a list of strings without commas",
    }
    raise ValueError("wrong type; write " + wanted.get(native, "a string"))


# Quoted strings.

_LETTER_BY_CHAR = dict(zip('\a\b\f\n\r\t\v"\\', 'abfnrtv"\\', strict=True))
_CHAR_BY_LETTER = {letter: ord(char) for char, letter in _LETTER_BY_CHAR.items()} | {"'": 0x27}
_ESCAPE = (
    r"""\\(?:([abfnrtv\\"'])|x([0-9a-fA-F]{2})|([0-7]{3})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|)"""
)


def quote(data: bytes | str) -> str:
    """`data` as Go's `%q` (strconv.Quote) writes it."""
    raw = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    parts = []
    for char in raw.decode("utf-8", "surrogateescape"):
        code = ord(char)
        if char in _LETTER_BY_CHAR:
            parts.append("\\" + _LETTER_BY_CHAR[char])
        elif 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
            parts.append(f"\\x{code - 0xDC00:02x}")
        elif char.isprintable():
            parts.append(char)
        elif code < 0x20 or code == 0x7F:
            parts.append(f"\\x{code:02x}")
        else:
            parts.append(f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
    return '"' + "".join(parts) + '"'


def unquote(inside: str) -> bytes:
    """The bytes that a quoted Go string stands for. `inside` is without the quotes."""
    parts: list[bytes] = []
    position = 0
    for match in re.finditer(_ESCAPE, inside):
        parts.append(os.fsencode(inside[position : match.start()]))
        position = match.end()
        letter, byte_hex, byte_octal, short, long = match.groups()
        if letter:
            parts.append(bytes((_CHAR_BY_LETTER[letter],)))
            continue
        digits, base = (byte_octal, 8) if byte_octal else (byte_hex or short or long, 16)
        if not digits:
            raise ValueError(f"bad escape {inside[match.start() : match.start() + 2]}")
        number = int(digits, base)
        is_byte = bool(byte_hex or byte_octal)
        if number > (0xFF if is_byte else 0x10FFFF) or 0xD800 <= number < 0xE000:
            raise ValueError(f"bad escape {match.group()}")
        parts.append(bytes((number,)) if is_byte else chr(number).encode())
    return b"".join(parts) + os.fsencode(inside[position:])


# Integers and booleans.


def parse_hexadecimal(text: str) -> int:
    """A 64-bit integer as Go's ParseUint reads it with base 16."""
    if not re.fullmatch("[0-9a-fA-F]+", text):
        raise _refused("ParseUint", text, "invalid syntax")
    number = int(text, 16)
    if number >= 1 << 64:
        raise _refused("ParseUint", text, "value out of range")
    return number


def parse_int(text: str, base: int = 10) -> int:
    """A 64-bit integer as Go's ParseInt reads it. Base 0 means that a prefix tells the base."""
    digits = text[1:] if text[:1] in ("+", "-") else text
    try:
        # int() accepts more than Go does.
        if not re.fullmatch("[0-9a-zA-Z]+" if base else "[0-9][0-9a-zA-Z_]*", digits):
            raise ValueError
        if base == 16 and digits[:2] in ("0x", "0X"):
            raise ValueError
        number = int(digits, 8 if base == 0 and re.fullmatch("0[0-7_]+", digits) else base)
    except ValueError:
        raise _refused("ParseInt", text, "invalid syntax") from None
    number = -number if text.startswith("-") else number
    if not -_MAX_INT64 - 1 <= number <= _MAX_INT64:
        raise _refused("ParseInt", text, "value out of range")
    return number


def parse_bool(text: str) -> bool:
    if text in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if text in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise _refused("ParseBool", text, "invalid syntax")


def _refused(function: str, text: str, why: str) -> ValueError:
    return ValueError(f"strconv.{function}: parsing {quote(text)}: {why}")


# Durations.

_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER_AND_UNIT = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([^0-9.]*)")
_MAX_DURATION_S = _MAX_INT64 / 1e9


def parse_duration_s(text: str) -> float:
    """Seconds from numbers with units, one after the other: "300ms", "1h30m", "-1.5s", "0". As in
    Go, at most 292 years."""
    rest = text[1:] if text[:1] in ("-", "+") else text
    if rest == "0":
        return 0.0
    seconds, position = 0.0, 0
    while position < len(rest) or not rest:
        match = _NUMBER_AND_UNIT.match(rest, position)
        if match is None:
            raise ValueError(f"time: invalid duration {quote(text)}")
        number, unit = match.groups()
        if unit not in _UNITS_S:
            why = f"unknown unit {quote(unit)}" if unit else "missing unit"
            raise ValueError(f"time: {why} in duration {quote(text)}")
        seconds += float(number) * _UNITS_S[unit]
        position = match.end()
    if seconds > _MAX_DURATION_S:
        raise ValueError(f"time: invalid duration {quote(text)}")
    return -seconds if text.startswith("-") else seconds


def format_duration(duration_ns: int) -> str:
    """Nanoseconds as Go's time.Duration prints them: "1.5ms", "1m0.25s", "0s"."""
    if duration_ns == 0:
        return "0s"
    sign, rest = ("-", -duration_ns) if duration_ns < 0 else ("", duration_ns)
    for unit, size in (("ns", 1), ("µs", 1_000), ("ms", 1_000_000)):
        if rest < size * 1000:
            return sign + _decimal(rest, size) + unit
    minutes, rest = divmod(rest, 60_000_000_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return sign + text + _decimal(rest, 1_000_000_000) + "s"


def _decimal(number: int, unit: int) -> str:
    whole, rest = divmod(number, unit)
    digits = str(rest).zfill(len(str(unit)) - 1).rstrip("0") if rest else ""
    return f"{whole}.{digits}" if digits else str(whole)


# Sizes.

_UNITS_BYTES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = r"(-?[0-9]{1,19}) ?([A-Za-z]*)"


def parse_size_bytes(text: str) -> int:
    """Bytes from "1048576", "64KiB", "8GiB". Raises ValueError."""
    match = re.fullmatch(_SIZE, text)
    if match is None or match[2] not in _UNITS_BYTES:
        raise ValueError("not a size; write bytes, or for example 64KiB, 16MiB, 8GiB")
    return int(match[1]) * _UNITS_BYTES[match[2]]


def format_size(size_bytes: int) -> str:
    """A size in powers of 1000, two digits, as etcdctl shows it: "512 B", "20 kB", "1.5 MB"."""
    if size_bytes < 10:
        return f"{size_bytes} B"
    exponent = (len(str(size_bytes)) - 1) // 3
    unit = ("B", "kB", "MB", "GB", "TB", "PB", "EB")[exponent]
    value = int(size_bytes / 1000**exponent * 10 + 0.5) / 10
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
