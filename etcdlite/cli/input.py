"""What the user wrote, made into values and messages: flags, environment, arguments, `txn` lines.

From the bottom up: Go's notation of numbers and durations, flags (`parse_flags`), the environment,
requests from a command's arguments, and the little language of `txn` and `watch -i`, whose lines
look like commands.

Invariants: nothing here talks to a server or prints; what is wrong raises Failure with etcdctl's
exit status and text, or BadFlag; bytes that are not UTF-8 come through unharmed (they travel in
str as surrogates, as Python's command line has them).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etcdlite import proto
from etcdlite.cli.output import DEFAULT_FORMAT, PRINTERS, go_quote
from etcdlite.client.operations import prefix_end

PROGRAM = "etcdlite-ctl"

EXIT_FAILED = 1
EXIT_BAD_CONNECTION = 2
EXIT_BAD_INPUT = 3
EXIT_BAD_FEATURE = 4
EXIT_INTERRUPTED = 5
EXIT_BAD_ARGUMENTS = 128


class Failure(Exception):
    """The command ends with `status` and one line on standard error (none if `text` is empty)."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text


# Flags.


class BadFlag(ValueError):
    """A flag that does not exist, has no value, or a wrong one."""


class Flag(NamedTuple):
    """`kind`: bool, int (64 bits), duration (seconds as float) or string."""

    name: str
    kind: str
    default: Any
    help: str
    short: str = ""


GLOBAL_FLAGS = (
    Flag("endpoints", "list", ("127.0.0.1:2379",), "servers to talk to, separated by commas"),
    Flag("write-out", "string", DEFAULT_FORMAT, f"output format ({', '.join(PRINTERS)})", "w"),
    Flag("hex", "bool", False, "print keys and values as \\x66\\x6f"),
    Flag("command-timeout", "duration", 5.0, "how long to wait for an answer"),
    Flag("dial-timeout", "duration", 2.0, "how long to wait for a connection"),
    Flag("debug", "bool", False, "log each request to standard error"),
    Flag("keepalive-time", "duration", 2.0, "accepted; TCP keep-alive is always on"),
    Flag("keepalive-timeout", "duration", 6.0, "accepted; TCP keep-alive is always on"),
    Flag("insecure-transport", "bool", True, "no TLS (the only choice in this version)"),
    Flag("insecure-skip-tls-verify", "bool", False, "accepted; there is no TLS to verify"),
    Flag("insecure-discovery", "bool", True, "take endpoints without TLS (the only choice)"),
    Flag("cacert", "string", "", "refused: no TLS in this version"),
    Flag("cert", "string", "", "refused: no TLS in this version"),
    Flag("key", "string", "", "refused: no TLS in this version"),
    Flag("user", "string", "", "refused: no users in this version"),
    Flag("password", "string", "", "refused: no users in this version"),
    Flag("discovery-srv", "string", "", "domain whose SRV records name the endpoints", "d"),
    Flag("discovery-srv-name", "string", "", "ask for the records _etcd-client-NAME._tcp"),
)

ENVIRONMENT_PREFIXES = ("ETCDLITE_CTL_", "ETCDCTL_")
"""Global flags from the environment; the first that is set counts, a flag beats both."""

REFUSED_FLAGS = {
    "insecure-transport": "TLS is not available in this version",
    "insecure-discovery": "TLS is not available in this version",
    "cacert": "TLS is not available in this version",
    "cert": "TLS is not available in this version",
    "key": "TLS is not available in this version",
    "user": "users and passwords are not available in this version",
    "password": "users and passwords are not available in this version",
}

_TRUE = ("1", "t", "T", "TRUE", "true", "True")
_FALSE = ("0", "f", "F", "FALSE", "false", "False")
_DURATION_PART = re.compile(r"(\d+\.?\d*|\.\d+)([^\d.]*)")
_DURATION_UNITS_S = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}


def parse_duration(text: str) -> float:
    """Seconds from Go's notation: "300ms", "1m30s", "0". Raises ValueError with Go's text."""
    quoted = go_quote(text)
    rest = text[1:] if text[:1] in ("-", "+") else text
    if rest == "0":
        return 0.0
    seconds = 0.0
    position = 0
    while position < len(rest) or not rest:
        match = _DURATION_PART.match(rest, position)
        if match is None:
            raise ValueError(f"time: invalid duration {quoted}")
        number, unit = match.groups()
        if not unit:
            raise ValueError(f"time: missing unit in duration {quoted}")
        if unit not in _DURATION_UNITS_S:
            raise ValueError(f"time: unknown unit {go_quote(unit)} in duration {quoted}")
        seconds += float(number) * _DURATION_UNITS_S[unit]
        position = match.end()
    return -seconds if text.startswith("-") else seconds


def parse_unsigned(text: str, base: int = 10) -> int:
    """A 64-bit integer as Go's ParseUint reads it, with its error texts."""
    if not re.fullmatch("[0-9a-fA-F]+" if base == 16 else "[0-9]+", text):
        raise ValueError(f"strconv.ParseUint: parsing {go_quote(text)}: invalid syntax")
    number = int(text, base)
    if number >= 1 << 64:
        raise ValueError(f"strconv.ParseUint: parsing {go_quote(text)}: value out of range")
    return number


def parse_int(text: str, base: int = 10) -> int:
    """A 64-bit integer as Go's ParseInt reads it, with its error texts. Base 0: by prefix."""
    digits = text[1:] if text[:1] in ("+", "-") else text
    try:
        # int() takes more than Go does: spaces, a prefix or "_" in any base, other scripts' digits.
        if not re.fullmatch("[0-9a-zA-Z]+" if base else "[0-9][0-9a-zA-Z_]*", digits):
            raise ValueError
        if base == 16 and digits[:2] in ("0x", "0X"):
            raise ValueError
        number = int(digits, 8 if base == 0 and re.fullmatch("0[0-7_]+", digits) else base)
    except ValueError:
        raise ValueError(f"strconv.ParseInt: parsing {go_quote(text)}: invalid syntax") from None
    number = -number if text.startswith("-") else number
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"strconv.ParseInt: parsing {go_quote(text)}: value out of range")
    return number


def _flag_value(flag: Flag, text: str) -> Any:
    if flag.kind == "bool":
        if text not in (*_TRUE, *_FALSE):
            raise ValueError(f"strconv.ParseBool: parsing {go_quote(text)}: invalid syntax")
        return text in _TRUE
    if flag.kind == "int":
        return parse_int(text, 0)
    if flag.kind == "duration":
        return parse_duration(text)
    if flag.kind == "list":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def _set_flag(values: dict[str, Any], flag: Flag, text: str, shown: str) -> None:
    try:
        value = _flag_value(flag, text)
    except ValueError as error:
        raise BadFlag(f'invalid argument "{text}" for "{shown}" flag: {error}') from None
    if flag.kind == "list" and flag.name in values:
        value = values[flag.name] + value
    values[flag.name] = value


HELP_FLAG = Flag("help", "bool", False, "show this help", "h")


def parse_flags(
    words: Sequence[str], flags: Sequence[Flag]
) -> tuple[list[str], int, dict[str, Any]]:
    """(arguments, how many of them stood before "--" or -1, flags that were given).

    Flags may stand anywhere, as --name value, --name=value, -n value, -nvalue; after "--" all
    words are arguments. Names are not abbreviated. Raises BadFlag.
    """
    by_name = {flag.name: flag for flag in (*flags, HELP_FLAG)}
    by_short = {flag.short: flag for flag in (*flags, HELP_FLAG) if flag.short}
    arguments: list[str] = []
    values: dict[str, Any] = {}
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            return [*arguments, *words[position:]], len(arguments), values
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            if name not in by_name:
                raise BadFlag(f"unknown flag: --{name}{did_you_mean(name, by_name, '--')}")
            flag, shown, missing = by_name[name], f"--{name}", f"--{name}"
        elif word.startswith("-") and len(word) > 1:
            letter, text = word[1], word[2:]
            if letter not in by_short:
                raise BadFlag(f"unknown shorthand flag: '{letter}' in {word}")
            flag = by_short[letter]
            shown, missing = f"-{letter}, --{flag.name}", f"'{letter}' in {word}"
            if flag.kind == "bool" and text and not text.startswith("="):
                # -ih is -i -h.
                values[flag.name] = True
                position -= 1
                words = [*words[:position], "-" + text, *words[position + 1 :]]
                continue
            equals = "=" if text else ""
            text = text.removeprefix("=")
        else:
            arguments.append(word)
            continue
        if not equals:
            if flag.kind == "bool":
                values[flag.name] = True
                continue
            if position == len(words):
                raise BadFlag(f"flag needs an argument: {missing}")
            text = words[position]
            position += 1
        _set_flag(values, flag, text, shown)
    return arguments, -1, values


def did_you_mean(name: str, known: Mapping[str, Any] | Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def environment_flags(environment: Mapping[str, str]) -> dict[str, Any]:
    """Global flags that the environment sets. Raises Failure for a value that does not parse."""
    values: dict[str, Any] = {}
    for flag in GLOBAL_FLAGS:
        for prefix in ENVIRONMENT_PREFIXES:
            variable = prefix + flag.name.upper().replace("-", "_")
            if variable in environment:
                try:
                    values[flag.name] = _flag_value(flag, environment[variable])
                except ValueError as error:
                    text = f"invalid value for environment variable {variable}: {error}"
                    raise Failure(EXIT_BAD_ARGUMENTS, text) from None
                break
    return values


# Requests, from arguments.

_SORT_TARGETS = {"CREATE": "CREATE", "KEY": "KEY", "MODIFY": "MOD", "VALUE": "VALUE"}
_SORT_TARGETS["VERSION"] = "VERSION"

PUT_FLAGS = (
    Flag("lease", "string", "0", "id (hexadecimal) of the lease to attach the key to"),
    Flag("prev-kv", "bool", False, "show the key and value from before"),
    Flag("ignore-value", "bool", False, "keep the key's value, change its lease"),
    Flag("ignore-lease", "bool", False, "keep the key's lease, change its value"),
)
GET_FLAGS = (
    Flag("prefix", "bool", False, "all keys that start with <key>"),
    Flag("from-key", "bool", False, "all keys from <key> on, in byte order"),
    Flag("limit", "int", 0, "at most this many keys (0: all)"),
    Flag("rev", "int", 0, "as of this revision (0: now)"),
    Flag("order", "string", "", "ASCEND or DESCEND (default ASCEND)"),
    Flag("sort-by", "string", "", "CREATE, KEY, MODIFY, VALUE or VERSION"),
    Flag("keys-only", "bool", False, "leave out the values"),
    Flag("count-only", "bool", False, "only count (with -w fields or in a transaction)"),
    Flag("print-value-only", "bool", False, "print only the values (with -w simple)"),
    Flag("consistency", "string", "l", "l: linearizable; s: serializable, perhaps stale"),
)
DEL_FLAGS = (
    Flag("prefix", "bool", False, "all keys that start with <key>"),
    Flag("from-key", "bool", False, "all keys from <key> on, in byte order"),
    Flag("range", "bool", False, "[key, range_end), the default when range_end is given"),
    Flag("prev-kv", "bool", False, "show the deleted keys and values"),
)


def key_range(name: str, arguments: Sequence[str], flags: Mapping[str, Any]) -> dict[str, bytes]:
    """The fields key and range_end of a get or del."""
    if flags["prefix"] and flags["from-key"]:
        raise Failure(
            EXIT_BAD_ARGUMENTS,
            "`--prefix` and `--from-key` cannot be set at the same time, choose one",
        )
    if not arguments:
        raise Failure(
            EXIT_BAD_ARGUMENTS,
            f"{name} command needs one argument as key and an optional argument as range_end",
        )
    if len(arguments) > 1 and (flags["prefix"] or flags["from-key"]):
        raise Failure(
            EXIT_BAD_ARGUMENTS,
            "too many arguments, only accept one argument when `--prefix` or `--from-key` is set",
        )
    key = os.fsencode(arguments[0])
    if flags["prefix"]:
        return {"key": key or b"\0", "range_end": prefix_end(key)}
    if flags["from-key"]:
        return {"key": key or b"\0", "range_end": b"\0"}
    if len(arguments) > 1:
        return {"key": key, "range_end": os.fsencode(arguments[1])}
    return {"key": key}


def put_request(
    arguments: Sequence[str],
    flags: Mapping[str, Any],
    read_value: Callable[[], bytes] = lambda: b"",
) -> Any:
    """`read_value` gives the value if the arguments do not."""
    usage = "put command needs 1 argument and input from stdin or 2 arguments"
    if not arguments:
        raise Failure(EXIT_BAD_ARGUMENTS, usage)
    if flags["ignore-value"]:
        if len(arguments) > 1:
            text = "put command needs only 1 argument when 'ignore-value' is set"
            raise Failure(EXIT_BAD_ARGUMENTS, text)
        value = b""
    elif len(arguments) > 1:
        value = os.fsencode(arguments[1])
    elif not (value := read_value()):
        raise Failure(EXIT_BAD_ARGUMENTS, usage)
    try:
        lease = parse_int(flags["lease"], 16)
    except ValueError as error:
        text = f"bad lease ID ({error}), expecting ID in Hex"
        raise Failure(EXIT_BAD_ARGUMENTS, text) from None
    return proto.PutRequest(
        key=os.fsencode(arguments[0]),
        value=value,
        lease=lease,
        prev_kv=flags["prev-kv"],
        ignore_value=flags["ignore-value"],
        ignore_lease=flags["ignore-lease"],
    )


def range_request(arguments: Sequence[str], flags: Mapping[str, Any]) -> Any:
    span = key_range("get", arguments, flags)
    if flags["keys-only"] and flags["count-only"]:
        raise Failure(
            EXIT_BAD_ARGUMENTS,
            "`--keys-only` and `--count-only` cannot be set at the same time, choose one",
        )
    if flags["consistency"] not in ("l", "s"):
        text = f'unknown consistency flag "{flags["consistency"]}"'
        raise Failure(EXIT_BAD_FEATURE, text)
    order = flags["order"].upper() or "NONE"
    if order not in ("ASCEND", "DESCEND") and flags["order"]:
        raise Failure(EXIT_BAD_FEATURE, f"bad sort order {flags['order']}")
    target = flags["sort-by"].upper() or "KEY"
    if target not in _SORT_TARGETS:
        raise Failure(EXIT_BAD_FEATURE, f"bad sort target {flags['sort-by']}")
    return proto.RangeRequest(
        **span,
        limit=flags["limit"],
        revision=flags["rev"],
        sort_order=proto.ENUMS["RangeRequest.SortOrder"][order],
        sort_target=proto.ENUMS["RangeRequest.SortTarget"][_SORT_TARGETS[target]],
        serializable=flags["consistency"] == "s",
        keys_only=flags["keys-only"],
        count_only=flags["count-only"],
    )


def delete_request(arguments: Sequence[str], flags: Mapping[str, Any]) -> Any:
    if len(arguments) > 2:
        arguments = ()  # etcdctl says the same as for none
    span = key_range("del", arguments, flags)
    if flags["range"] and (flags["prefix"] or flags["from-key"] or len(arguments) < 2):
        text = "`--range` needs a key and a range_end, and neither `--prefix` nor `--from-key`"
        raise Failure(EXIT_BAD_ARGUMENTS, text)
    return proto.DeleteRangeRequest(**span, prev_kv=flags["prev-kv"])


# The language of `txn` and `watch -i`.

_WORD = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([^'"\s]\S*))""")
_GO_ESCAPE = re.compile(
    r"""\\(?:([abfnrtv\\"'])|x([0-9a-fA-F]{2})|([0-7]{3})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|)"""
)
_ESCAPED = dict(zip("abfnrtv\\\"'", b"\a\b\f\n\r\t\v\\\"'", strict=True))


def go_unquote(inside: str) -> bytes:
    """What Go's quoted string holds, given without its quotes. Raises ValueError."""
    parts: list[bytes] = []
    position = 0
    for match in _GO_ESCAPE.finditer(inside):
        parts.append(os.fsencode(inside[position : match.start()]))
        position = match.end()
        char, byte_hex, byte_octal, short, long = match.groups()
        if char:
            parts.append(bytes((_ESCAPED[char],)))
        elif byte_hex or byte_octal:
            number = int(byte_hex, 16) if byte_hex else int(byte_octal, 8)
            if number > 0xFF:
                raise ValueError(f"bad escape {match.group()}")
            parts.append(bytes((number,)))
        elif short or long:
            number = int(short or long, 16)
            if number > 0x10FFFF or 0xD800 <= number < 0xE000:
                raise ValueError(f"bad escape {match.group()}")
            parts.append(chr(number).encode())
        else:
            raise ValueError(f"bad escape {inside[match.start() : match.start() + 2]}")
    return b"".join(parts) + os.fsencode(inside[position:])


def split_words(line: str) -> list[str]:
    """The words of a line: bare, in single quotes, or in double quotes with Go's escapes.

    Raises ValueError for a quote that is not closed, or a bad escape.
    """
    words = []
    position = 0
    line = line.rstrip()
    while position < len(line):
        match = _WORD.match(line, position)
        if match is None:
            raise ValueError("unclosed quote")
        double, single, bare = match.groups()
        words.append(
            os.fsdecode(go_unquote(double)) if double is not None else single or bare or ""
        )
        position = match.end()
    return words


_COMPARE = re.compile(r"""\s*"((?:[^"\\]|\\.)*)"\)\s+(\S+)\s+"((?:[^"\\]|\\.)*)\"""", re.DOTALL)
_COMPARE_TARGETS = {
    "ver": ("VERSION", "version"),
    "version": ("VERSION", "version"),
    "c": ("CREATE", "create_revision"),
    "create": ("CREATE", "create_revision"),
    "m": ("MOD", "mod_revision"),
    "mod": ("MOD", "mod_revision"),
    "val": ("VALUE", "value"),
    "value": ("VALUE", "value"),
    "lease": ("LEASE", "lease"),
}
_COMPARE_RESULTS = {"=": "EQUAL", "!=": "NOT_EQUAL", ">": "GREATER", "<": "LESS"}


def parse_compare(line: str) -> Any:
    """A Compare from `target("key") op "value"`; a lease is in hexadecimal. Raises Failure."""
    line = line.strip()
    malformed = f"malformed comparison: {line}"
    hint = 'expected target("key") op "value", for example mod("foo") > "0"'
    name, parenthesis, rest = line.partition("(")
    match = _COMPARE.match(rest)
    if not parenthesis or match is None:
        raise Failure(EXIT_BAD_INPUT, f"{malformed}; {hint}")
    if name not in _COMPARE_TARGETS:
        raise Failure(EXIT_BAD_INPUT, f"{malformed} (unknown target {name})")
    key_text, operator, value_text = match.groups()
    if operator not in _COMPARE_RESULTS:
        raise Failure(EXIT_BAD_INPUT, f"{malformed} (unknown operator {operator})")
    target, field = _COMPARE_TARGETS[name]
    try:
        key = go_unquote(key_text)
        value: int | bytes = go_unquote(value_text)
        if target != "VALUE":
            value = parse_int(os.fsdecode(go_unquote(value_text)), 16 if target == "LEASE" else 10)
    except ValueError:
        raise Failure(EXIT_BAD_INPUT, f"invalid txn compare request: {line}") from None
    return proto.Compare(
        target=proto.ENUMS["Compare.CompareTarget"][target],
        result=proto.ENUMS["Compare.CompareResult"][_COMPARE_RESULTS[operator]],
        key=key,
        **{field: value},
    )


_TXN_OPERATIONS: dict[str, tuple[Sequence[Flag], Callable[..., Any], str]] = {
    "put": (PUT_FLAGS, put_request, "request_put"),
    "get": (GET_FLAGS, range_request, "request_range"),
    "del": (DEL_FLAGS, delete_request, "request_delete_range"),
}


def parse_request(line: str) -> Any:
    """A RequestOp from a line like the commands: `put key "a value" --prev-kv`. Raises Failure."""
    line = line.strip()
    try:
        words = split_words(line)
        if len(words) < 2:
            raise Failure(EXIT_BAD_INPUT, f"invalid txn compare request: {line}")
        if words[0] not in _TXN_OPERATIONS:
            raise Failure(EXIT_BAD_INPUT, f"invalid txn request: {line}")
        flags, request, field = _TXN_OPERATIONS[words[0]]
        arguments, _, given = parse_flags(words[1:], flags)
    except ValueError as error:
        raise Failure(EXIT_BAD_INPUT, f"invalid txn request: {line} ({error})") from None
    values = {flag.name: flag.default for flag in flags} | given
    return proto.RequestOp(**{field: request(arguments, values)})


def read_block(lines: Iterator[bytes], parse: Callable[[str], Any]) -> list[Any]:
    """What `parse` makes of each line up to an empty one. Raises Failure if the input ends."""
    block: list[Any] = []
    for line in lines:
        text = os.fsdecode(line)
        if not text.strip():
            return block
        block.append(parse(text))
    raise Failure(
        EXIT_BAD_INPUT,
        "EOF: a transaction is three blocks of lines (compares, requests on success, requests "
        "on failure), each ended by an empty line",
    )
