"""etcdlite-ctl: the command line client, with etcdctl 3.5's commands, arguments and output.

Parts, in this order: flags (how the command line and the environment are read), requests (how
arguments become messages; shared by the commands and the lines of `txn`), the session (the
connection and where output goes), one function per command, the table of commands, help and shell
completion, `main`. Formats are in ctl_output.py.

Exit status, as etcdctl's: 0 done; 1 the server, the network or the command failed; 2 a lease to
keep alive is not there; 3 input (a transaction, an interactive watch) does not parse; 4 an option
value or an output format that does not exist; 5 a watch was ended by the server, or a snapshot
could not be saved; 128 wrong arguments. `lock NAME COMMAND` ends as the command does. Ended by a
signal, it ends by that signal.

Invariants: standard output holds nothing but results, in etcdctl's bytes; every failure is one
line on standard error that names the cause and, when a server was involved, the endpoint;
progress is shown only on a terminal; a flag that cannot be honoured is refused, never ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from . import ETCD_API_VERSION, __version__, proto
from .client import AsyncClient, Client, EtcdliteError
from .client_calls import PartialFile, prefix_end
from .ctl_output import (
    DEFAULT_FORMAT,
    PRINTERS,
    EndpointResponse,
    Health,
    Printer,
    UnsupportedFormat,
    go_quote,
    size_text,
    unhealthy_lines,
)
from .errors import ERRORS, NOT_FOUND, PERMISSION_DENIED, UNAVAILABLE

PROGRAM = "etcdlite-ctl"

EXIT_FAILED = 1
EXIT_BAD_CONNECTION = 2
EXIT_BAD_INPUT = 3
EXIT_BAD_FEATURE = 4
EXIT_INTERRUPTED = 5
EXIT_BAD_ARGUMENTS = 128

DEFAULT_SESSION_TTL_S = 60
"""The lease of an election, and of a lock whose --ttl is not positive."""

RECONNECT_FIRST_S = 0.1
RECONNECT_MAX_S = 2.0
"""Waits between attempts to take up a watch or a keep-alive again: doubling."""

PROGRESS_INTERVAL_S = 0.2


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
    Flag("insecure-discovery", "bool", True, "accepted; there is no discovery"),
    Flag("cacert", "string", "", "refused: no TLS in this version"),
    Flag("cert", "string", "", "refused: no TLS in this version"),
    Flag("key", "string", "", "refused: no TLS in this version"),
    Flag("user", "string", "", "refused: no users in this version"),
    Flag("password", "string", "", "refused: no users in this version"),
    Flag("discovery-srv", "string", "", "refused: no DNS discovery in this version", "d"),
    Flag("discovery-srv-name", "string", "", "refused: no DNS discovery in this version"),
)

ENVIRONMENT_PREFIXES = ("ETCDLITE_CTL_", "ETCDCTL_")
"""Global flags from the environment; the first that is set counts, a flag beats both."""

REFUSED_FLAGS = {
    "insecure-transport": "TLS is not available in this version",
    "cacert": "TLS is not available in this version",
    "cert": "TLS is not available in this version",
    "key": "TLS is not available in this version",
    "user": "users and passwords are not available in this version",
    "password": "users and passwords are not available in this version",
    "discovery-srv": "DNS discovery is not available in this version",
    "discovery-srv-name": "DNS discovery is not available in this version",
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


def parse_int(text: str, base: int = 10) -> int:
    """A 64-bit integer as Go's ParseInt reads it, with its error texts. Base 0: by prefix."""
    digits = text.lstrip("+-") if text[:1] in ("+", "-") else text
    try:
        if len(text) - len(digits) > 1 or digits != digits.strip():
            raise ValueError
        if base == 0:
            number = int(digits, 8 if re.fullmatch("0[0-7_]+", digits) else 0)
        elif digits.isalnum() and not digits[:2].lower() == "0x":
            number = int(digits, base)
        else:
            raise ValueError
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
                raise BadFlag(f"unknown flag: --{name}{_did_you_mean(name, by_name, '--')}")
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


def _did_you_mean(name: str, known: Mapping[str, Any] | Sequence[str], prefix: str = "") -> str:
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


_COMPARE = re.compile(
    r"""\s*"((?:[^"\\]|\\.)*)"\)\s+(\S+)\s+"((?:[^"\\]|\\.)*)\"""", re.DOTALL
)
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
    block = []
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


# The session.


class Session:
    """What a command works with: its arguments and flags, the connection, the output."""

    def __init__(
        self, arguments: list[str], before_dashes: int, flags: Mapping[str, Any]
    ) -> None:
        self.arguments = arguments
        self.before_dashes = before_dashes
        self.flags = flags
        self.timeout_s: float = flags["command-timeout"]
        self.printer: Printer = PRINTERS[flags["write-out"]](
            hex_strings=flags["hex"], values_only=bool(flags.get("print-value-only"))
        )
        self._client: Client | None = None

    @property
    def endpoints(self) -> tuple[str, ...]:
        endpoints: tuple[str, ...] = self.flags["endpoints"]
        return endpoints

    def client(self) -> Client:
        """The connection to whichever endpoint answers, made when it is first needed."""
        if self._client is None:
            self._client = self.client_for(self.endpoints)
        return self._client

    def client_for(self, endpoints: Sequence[str]) -> Client:
        if self.timeout_s <= 0 or self.flags["dial-timeout"] <= 0:
            text = "context deadline exceeded (--command-timeout or --dial-timeout is not above 0)"
            raise Failure(EXIT_FAILED, text)
        try:
            return Client(
                list(endpoints),
                timeout_s=self.timeout_s,
                dial_timeout_s=self.flags["dial-timeout"],
            )
        except ValueError as error:
            raise Failure(EXIT_BAD_ARGUMENTS, str(error)) from None

    def call(self, method: str, request: Any, client: Client | None = None) -> Any:
        """One request and its response. Raises EtcdliteError."""
        client = client or self.client()
        started_s = time.monotonic()
        try:
            return client.call(method, request)
        finally:
            if self.flags["debug"]:
                took_ms = (time.monotonic() - started_s) * 1000
                say(f"debug: {method} to {client.endpoint or 'nobody'}, {took_ms:.1f} ms: {request}")

    def write(self, output: bytes) -> None:
        sys.stdout.buffer.write(output)
        sys.stdout.buffer.flush()

    def need(self, count: int, text: str) -> None:
        """Refuse anything but `count` arguments."""
        if len(self.arguments) != count:
            raise Failure(EXIT_BAD_ARGUMENTS, text)

    def lease_argument(self, name: str) -> int:
        if len(self.arguments) != 1:
            what = "1 argument" if name == "revoke" else "lease ID as argument"
            raise Failure(EXIT_BAD_ARGUMENTS, f"lease {name} command needs {what}")
        try:
            return parse_int(self.arguments[0], 16)
        except ValueError as error:
            text = f"bad lease ID arg ({error}), expecting ID in Hex"
            raise Failure(EXIT_BAD_ARGUMENTS, text) from None

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def say(line: str) -> None:
    """One line on standard error."""
    print(line, file=sys.stderr, flush=True)


def describe(error: EtcdliteError, endpoint: str = "") -> str:
    """The error in one line that names the endpoint."""
    endpoint = error.endpoint or endpoint
    if not endpoint or endpoint in error.text:
        return error.text
    return f"{error.text} (endpoint {endpoint})"


class Progress:
    """A line on standard error about long work, drawn only on a terminal."""

    def __init__(self, label: str, show: Callable[[float], str] = lambda n: f"{n:.0f}") -> None:
        self._label = label
        self._show = show
        self._wanted = sys.stderr.isatty()
        self._next_s = 0.0

    def update(self, done: float, total: float) -> None:
        """`total` 0: not known."""
        now_s = time.monotonic()
        if not self._wanted or now_s < self._next_s:
            return
        self._next_s = now_s + PROGRESS_INTERVAL_S
        text = f"{self._label}: {self._show(done)}"
        if total:
            text += f" / {self._show(total)}  {100 * done / total:.0f}%"
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        """Take the line away."""
        if self._wanted:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# Keys.


def put(session: Session) -> int:
    request = put_request(session.arguments, session.flags, sys.stdin.buffer.read)
    session.write(session.printer.put(session.call("KV.Put", request)))
    return 0


def get(session: Session) -> int:
    request = range_request(session.arguments, session.flags)
    if session.flags["print-value-only"] and session.printer.name != "simple":
        text = "print-value-only is only for `--write-out=simple`"
        raise Failure(EXIT_BAD_ARGUMENTS, text)
    if session.flags["count-only"] and session.printer.name != "fields":
        raise Failure(EXIT_BAD_ARGUMENTS, "--count-only is only for `--write-out=fields`")
    session.write(session.printer.get(session.call("KV.Range", request)))
    return 0


def delete(session: Session) -> int:
    request = delete_request(session.arguments, session.flags)
    session.write(session.printer.delete(session.call("KV.DeleteRange", request)))
    return 0


def txn(session: Session) -> int:
    session.need(0, "txn command does not accept argument")
    blocks = []
    lines = iter(sys.stdin.buffer.readline, b"")
    for prompt, parse in (
        ("compares:", parse_compare),
        ("success requests (get, put, del):", parse_request),
        ("failure requests (get, put, del):", parse_request),
    ):
        if session.flags["interactive"]:
            session.write(prompt.encode() + b"\n")
        blocks.append(read_block(lines, parse))
    compare, success, failure = blocks
    request = proto.TxnRequest(compare=compare, success=success, failure=failure)
    session.write(session.printer.txn(session.call("KV.Txn", request)))
    return 0


def compaction(session: Session) -> int:
    session.need(1, "compaction command needs 1 argument")
    try:
        revision = parse_int(session.arguments[0])
    except ValueError as error:
        raise Failure(EXIT_FAILED, str(error)) from None
    request = proto.CompactionRequest(revision=revision, physical=session.flags["physical"])
    session.call("KV.Compact", request)
    session.write(b"compacted revision %d\n" % revision)
    return 0


# Watch.

WATCH_FLAGS = (
    Flag("prefix", "bool", False, "watch all keys that start with <key>"),
    Flag("prev-kv", "bool", False, "show the key and value from before each event"),
    Flag("rev", "int", 0, "start at this revision (0: now)"),
    Flag("progress-notify", "bool", False, "let the server say from time to time how far it is"),
)


class Watch:
    """One watch on the stream: what was asked for, and where to go on after a broken connection."""

    def __init__(self, request: Any, command: Sequence[str]) -> None:
        self.request = request
        self.command = command

    def advance(self, response: Any) -> None:
        if response.events:
            self.request.start_revision = response.events[-1].kv.mod_revision + 1
        elif self.request.start_revision == 0 and response.header is not None:
            self.request.start_revision = response.header.revision + 1


def parse_watch(
    arguments: Sequence[str],
    before_dashes: int,
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
) -> Watch:
    """`[key [range_end]] [-- command ...]`; the key may come from the environment."""
    command: Sequence[str] = ()
    if before_dashes >= 0:
        arguments, command = arguments[:before_dashes], arguments[before_dashes:]
        if not command:
            raise Failure(EXIT_BAD_ARGUMENTS, "bad number of arguments (no command after --)")
    given = {}
    for name in ("KEY", "RANGE_END"):
        for prefix in ENVIRONMENT_PREFIXES:
            if environment.get(f"{prefix}WATCH_{name}"):
                given.setdefault(name, environment[f"{prefix}WATCH_{name}"])
    if "KEY" in given:
        if arguments:
            text = "bad number of arguments (found conflicting environment key)"
            raise Failure(EXIT_BAD_ARGUMENTS, text)
        arguments = list(given.values())
    if not 1 <= len(arguments) <= 2 or (len(arguments) == 2 and flags["prefix"]):
        raise Failure(EXIT_BAD_ARGUMENTS, "bad number of arguments")
    key = os.fsencode(arguments[0])
    range_end = os.fsencode(arguments[1]) if len(arguments) == 2 else b""
    if flags["prefix"]:
        key, range_end = key or b"\0", prefix_end(key)
    request = proto.WatchCreateRequest(
        key=key,
        range_end=range_end,
        start_revision=flags["rev"],
        prev_kv=flags["prev-kv"],
        progress_notify=flags["progress-notify"],
    )
    return Watch(request, command)


class Watcher:
    """All watches of a `watch` command: one stream, taken up again when its connection breaks."""

    def __init__(self, session: Session, is_interactive: bool) -> None:
        self._session = session
        self._is_interactive = is_interactive
        self._lock = threading.Lock()
        self._watches: dict[int, Watch] = {}
        self._last_id = 0
        self._stream: Any = None

    def add(self, watch: Watch) -> None:
        with self._lock:
            self._last_id += 1
            watch.request.watch_id = self._last_id
            self._watches[self._last_id] = watch
            if self._stream is not None:
                self._send(proto.WatchRequest(create_request=watch.request))

    def ask_progress(self) -> None:
        with self._lock:
            if self._stream is not None:
                self._send(proto.WatchRequest(progress_request=proto.WatchProgressRequest()))

    def _send(self, request: Any) -> None:
        # If the connection is gone the reader learns of it too, and opens all watches again.
        with contextlib.suppress(EtcdliteError):
            self._stream.send(request)

    def run(self) -> None:
        """Print what comes until a watch is canceled. Raises EtcdliteError if it cannot start."""
        wait_s = RECONNECT_FIRST_S
        has_worked = False
        while True:
            try:
                with self._lock:
                    stream = self._session.client().stream("Watch.Watch")
                    self._stream = stream
                    for watch in self._watches.values():
                        stream.send(proto.WatchRequest(create_request=watch.request))
                for response in stream:
                    has_worked = True
                    wait_s = RECONNECT_FIRST_S
                    self._take(response)
            except EtcdliteError as error:
                if not has_worked or error.code != UNAVAILABLE:
                    raise
                if wait_s == RECONNECT_FIRST_S:
                    say(f"watch: {describe(error, self._session.client().endpoint)}; reconnecting")
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, RECONNECT_MAX_S)

    def _take(self, response: Any) -> None:
        session = self._session
        # A progress answer that was asked for concerns no single watch: its watch_id is -1.
        watch = self._watches.get(response.watch_id)
        if response.created and not response.canceled:
            if watch is not None:
                watch.advance(response)
            return
        if response.canceled or response.compact_revision:
            if session.printer.name != "simple":
                session.write(session.printer.watch(response))
            reason = response.cancel_reason or "watch canceled"
            if response.compact_revision:
                reason = ERRORS["Compacted"][1]
            text = f"watch is canceled by the server: {reason}"
            endpoint = session.client().endpoint
            if not self._is_interactive:
                raise Failure(EXIT_INTERRUPTED, f"{text} (endpoint {endpoint})")
            say(f"Error: {text} (endpoint {endpoint})")
            with self._lock:
                self._watches.pop(response.watch_id, None)
            return
        if not response.events:
            session.write(b"progress notify: %d\n" % response.header.revision)
        if watch is not None:
            watch.advance(response)
        session.write(session.printer.watch(response))
        if watch is not None and watch.command:
            for event in response.events:
                self._run_command(watch.command, event, response.header.revision)

    def _run_command(self, command: Sequence[str], event: Any, revision: int) -> None:
        is_delete = event.type == proto.ENUMS["Event.EventType"]["DELETE"]
        environment = {
            **os.environ,
            "ETCD_WATCH_REVISION": str(revision),
            "ETCD_WATCH_EVENT_TYPE": '"DELETE"' if is_delete else '"PUT"',
            "ETCD_WATCH_KEY": go_quote(event.kv.key),
            "ETCD_WATCH_VALUE": go_quote(event.kv.value),
        }
        try:
            status = subprocess.run(command, env=environment, check=False).returncode
            cause = f"exit status {status}" if status else ""
        except OSError as error:
            cause = f"exec {command[0]}: {error.strerror}"
        if cause:
            words = " ".join(go_quote(os.fsencode(word)) for word in command)
            raise Failure(EXIT_FAILED, f"command [{words}] error ({cause})")


def watch(session: Session) -> int:
    watcher = Watcher(session, session.flags["interactive"])
    if session.flags["interactive"]:
        return _watch_interactively(watcher)
    parsed = parse_watch(session.arguments, session.before_dashes, session.flags, os.environ)
    watcher.add(parsed)
    watcher.run()
    return 0


def _watch_interactively(watcher: Watcher) -> int:
    """Lines of `watch [flags] key [range_end] [-- command]` or `progress` from standard input."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            watcher.run()
        except (Failure, EtcdliteError, UnsupportedFormat, BrokenPipeError) as error:
            failed.append(error)
            # The main thread sits in a read that only a signal ends.
            os.kill(os.getpid(), signal.SIGINT)

    defaults = {flag.name: flag.default for flag in WATCH_FLAGS}
    reader: threading.Thread | None = None
    try:
        for line in iter(sys.stdin.buffer.readline, b""):
            text = os.fsdecode(line).strip()
            try:
                words = split_words(text)
                if words[:1] == ["progress"]:
                    watcher.ask_progress()
                    continue
                if words[:1] != ["watch"]:
                    raise ValueError("watch and progress supported")
                arguments, before_dashes, given = parse_flags(words[1:], WATCH_FLAGS)
                watcher.add(parse_watch(arguments, before_dashes, defaults | given, os.environ))
            except ValueError as error:
                say(f"Invalid command {text} ({error})")
                continue
            except Failure as failure:
                say(f"Invalid command {text} ({failure.text})")
                continue
            if reader is None:
                reader = threading.Thread(target=run, daemon=True)
                reader.start()
    except KeyboardInterrupt:
        if failed:
            raise failed[0] from None
        raise
    raise Failure(EXIT_BAD_INPUT, "error reading watch request line: EOF")


# Leases.


def lease_grant(session: Session) -> int:
    session.need(1, "lease grant command needs TTL argument")
    try:
        ttl = parse_int(session.arguments[0])
    except ValueError as error:
        raise Failure(EXIT_BAD_ARGUMENTS, f"bad TTL ({error})") from None
    try:
        response = session.call("Lease.LeaseGrant", proto.LeaseGrantRequest(TTL=ttl))
    except EtcdliteError as error:
        raise _wrapped("failed to grant lease", error, session) from None
    session.write(session.printer.lease_grant(response))
    return 0


def _wrapped(what: str, error: EtcdliteError, session: Session) -> Failure:
    endpoint = error.endpoint or session.client().endpoint
    text = f"{what} ({error.text})"
    return Failure(
        EXIT_FAILED, text if endpoint in text else f"{text} (endpoint {endpoint})"
    )


def lease_revoke(session: Session) -> int:
    lease = session.lease_argument("revoke")
    try:
        response = session.call("Lease.LeaseRevoke", proto.LeaseRevokeRequest(ID=lease))
    except EtcdliteError as error:
        raise _wrapped("failed to revoke lease", error, session) from None
    session.write(session.printer.lease_revoke(response, lease))
    return 0


def lease_time_to_live(session: Session) -> int:
    request = proto.LeaseTimeToLiveRequest(
        ID=session.lease_argument("timetolive"), keys=session.flags["keys"]
    )
    response = session.call("Lease.LeaseTimeToLive", request)
    session.write(session.printer.lease_time_to_live(response, session.flags["keys"]))
    return 0


def lease_list(session: Session) -> int:
    response = session.call("Lease.LeaseLeases", proto.LeaseLeasesRequest())
    session.write(session.printer.lease_list(response))
    return 0


def lease_keep_alive(session: Session) -> int:
    lease = session.lease_argument("keep-alive")
    request = proto.LeaseKeepAliveRequest(ID=lease)
    expires_s = -math.inf
    while True:
        sent_s = time.monotonic()
        try:
            response = session.call("Lease.LeaseKeepAlive", request)
        except EtcdliteError as error:
            if error.code == UNAVAILABLE and time.monotonic() < expires_s:
                time.sleep(RECONNECT_FIRST_S)
                continue
            if error.code != NOT_FOUND:
                raise
            response = proto.LeaseKeepAliveResponse(ID=lease)
        if response.TTL <= 0:
            if session.flags["once"]:
                text = f"{ERRORS['LeaseNotFound'][1]} (endpoint {session.client().endpoint})"
                raise Failure(EXIT_BAD_CONNECTION, text)
            if session.printer.name == "simple":
                session.write(b"lease %016x expired or revoked.\n" % lease)
            return 0
        session.write(session.printer.lease_keep_alive(response))
        if session.flags["once"]:
            return 0
        expires_s = sent_s + response.TTL
        time.sleep(response.TTL / 3)


# Cluster and maintenance.


def member_list(session: Session) -> int:
    response = session.call("Cluster.MemberList", proto.MemberListRequest(linearizable=True))
    session.write(session.printer.member_list(response))
    return 0


def alarm_list(session: Session) -> int:
    session.need(0, "alarm list command accepts no arguments")
    session.write(session.printer.alarm(session.call("Maintenance.Alarm", proto.AlarmRequest())))
    return 0


def alarm_disarm(session: Session) -> int:
    session.need(0, "alarm disarm command accepts no arguments")
    disarmed: list[Any] = []
    for alarm in session.call("Maintenance.Alarm", proto.AlarmRequest()).alarms:
        request = proto.AlarmRequest(
            action=proto.ENUMS["AlarmRequest.AlarmAction"]["DEACTIVATE"],
            memberID=alarm.memberID,
            alarm=alarm.alarm,
        )
        disarmed.extend(session.call("Maintenance.Alarm", request).alarms)
    session.write(session.printer.alarm(proto.AlarmResponse(alarms=disarmed)))
    return 0


def _each_endpoint(session: Session) -> list[str]:
    """The endpoints that a command asks one by one; with --cluster those of all members."""
    if not session.flags["cluster"]:
        return list(session.endpoints)
    try:
        response = session.call("Cluster.MemberList", proto.MemberListRequest(linearizable=True))
    except EtcdliteError as error:
        text = f"failed to fetch endpoints from etcd cluster member list: {describe(error)}"
        raise Failure(EXIT_FAILED, text) from None
    return [url for member in response.members for url in member.clientURLs]


def defrag(session: Session) -> int:
    if session.flags["data-dir"]:
        text = "--data-dir: a data directory is defragmented by its own server, while it runs"
        raise Failure(EXIT_BAD_FEATURE, text)
    status = 0
    for endpoint in _each_endpoint(session):
        try:
            with session.client_for([endpoint]) as client:
                session.call("Maintenance.Defragment", proto.DefragmentRequest(), client)
        except EtcdliteError as error:
            say(f"Failed to defragment etcd member[{endpoint}] ({error.text})")
            status = EXIT_FAILED
        else:
            session.write(f"Finished defragmenting etcd member[{endpoint}]\n".encode())
    return status


def endpoint_health(session: Session) -> int:
    found = [_health_of(session, endpoint) for endpoint in _each_endpoint(session)]
    session.write(session.printer.endpoint_health(found))
    if session.printer.name == "simple":
        for line in unhealthy_lines(found):
            say(line)
    if all(health.healthy for health in found):
        return 0
    if session.printer.name != "simple":
        say("Error: unhealthy cluster: " + ", ".join(h.endpoint for h in found if not h.healthy))
    return EXIT_FAILED


def _health_of(session: Session, endpoint: str) -> Health:
    """Healthy is who serves a linearizable read, though perhaps not to us, and has no alarm."""
    started_ns = time.monotonic_ns()
    error_text = ""
    took_ns = 0
    try:
        with session.client_for([endpoint]) as client:
            try:
                session.call("KV.Range", proto.RangeRequest(key=b"health"), client)
            except EtcdliteError as error:
                if error.code != PERMISSION_DENIED:
                    raise
            took_ns = time.monotonic_ns() - started_ns
            alarms = session.call("Maintenance.Alarm", proto.AlarmRequest(), client).alarms
            if alarms:
                names = {number: name for name, number in proto.ENUMS["AlarmType"].items()}
                shown = "".join(f"{names.get(alarm.alarm, alarm.alarm)} " for alarm in alarms)
                error_text = f"Active Alarm(s): {shown}"
    except EtcdliteError as error:
        error_text = error.text
    took_ns = took_ns or time.monotonic_ns() - started_ns
    return Health(endpoint, not error_text, took_ns, error_text)


def _ask_each(
    session: Session, what: str, method: str, request: Any
) -> tuple[list[EndpointResponse], int]:
    answers = []
    status = 0
    for endpoint in _each_endpoint(session):
        try:
            with session.client_for([endpoint]) as client:
                answers.append(EndpointResponse(endpoint, session.call(method, request, client)))
        except EtcdliteError as error:
            say(f"Failed to get the {what} of endpoint {endpoint} ({error.text})")
            status = EXIT_FAILED
    return answers, status


def endpoint_status(session: Session) -> int:
    answers, status = _ask_each(session, "status", "Maintenance.Status", proto.StatusRequest())
    session.write(session.printer.endpoint_status(answers))
    return status


def endpoint_hashkv(session: Session) -> int:
    request = proto.HashKVRequest(revision=session.flags["rev"])
    answers, status = _ask_each(session, "hash", "Maintenance.HashKV", request)
    session.write(session.printer.endpoint_hashkv(answers))
    return status


def version(session: Session) -> int:
    api = ".".join(ETCD_API_VERSION.split(".")[:2])
    session.write(f"{PROGRAM} version: {__version__}\nAPI version: {api}\n".encode())
    return 0


# Snapshots.


def _os_error(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{(error.strerror or str(error)).lower()}"


def snapshot_save(session: Session) -> int:
    session.need(1, "snapshot save expects one argument")
    if len(session.endpoints) != 1:
        text = (
            "snapshot must be requested to one selected node, not multiple "
            f"[{' '.join(session.endpoints)}]"
        )
        raise Failure(EXIT_INTERRUPTED, text)
    path = session.arguments[0]
    os.umask(0o077)  # The file holds every value of the store.
    try:
        with PartialFile(path) as file:
            _receive_snapshot(session, file)
    except OSError as error:
        raise Failure(EXIT_INTERRUPTED, f"could not save to {_os_error(error)}") from None
    except EtcdliteError as error:
        text = describe(error, session.client().endpoint)
        raise Failure(EXIT_INTERRUPTED, f"snapshot failed: {text}") from None
    session.write(b"Snapshot saved at " + os.fsencode(path) + b"\n")
    return 0


def _receive_snapshot(session: Session, file: Any) -> None:
    progress = Progress(f"snapshot of {session.endpoints[0]}", lambda size: size_text(int(size)))
    received_bytes = remaining_bytes = 0
    try:
        with session.client().stream("Maintenance.Snapshot", proto.SnapshotRequest()) as stream:
            for response in stream:
                file.write(response.blob)
                received_bytes += len(response.blob)
                remaining_bytes = response.remaining_bytes
                progress.update(received_bytes, received_bytes + remaining_bytes)
    finally:
        progress.done()
    if remaining_bytes or not received_bytes:
        text = (
            f"the snapshot ended {remaining_bytes} bytes early "
            f"(endpoint {session.client().endpoint})"
        )
        raise Failure(EXIT_INTERRUPTED, text)


def snapshot_status(session: Session) -> int:
    from . import snap

    session.need(1, "snapshot status requires exactly one argument")
    try:
        status = snap.status(session.arguments[0])
    except snap.SnapshotError as error:
        raise Failure(EXIT_FAILED, str(error)) from None
    except OSError as error:
        raise Failure(EXIT_FAILED, _os_error(error)) from None
    session.write(session.printer.snapshot_status(status))
    return 0


def snapshot_restore(session: Session) -> int:
    from . import snap

    session.need(1, "snapshot restore requires exactly one argument")
    path = session.arguments[0]
    flags = session.flags
    data_dir = flags["data-dir"] or flags["name"] + ".etcdlite"
    progress = Progress(f"restoring to {data_dir}", lambda size: size_text(int(size)))
    try:
        snap.restore(
            path,
            data_dir,
            name=flags["name"],
            initial_cluster=flags["initial-cluster"],
            initial_cluster_token=flags["initial-cluster-token"],
            initial_advertise_peer_urls=flags["initial-advertise-peer-urls"],
            wal_dir=flags["wal-dir"],
            skip_hash_check=flags["skip-hash-check"],
            progress=progress.update,
        )
    except snap.SnapshotError as error:
        raise Failure(EXIT_FAILED, str(error)) from None
    except OSError as error:
        raise Failure(EXIT_FAILED, _os_error(error)) from None
    finally:
        progress.done()
    say(f"restored {path}; start the server with: etcdlite --data-dir {shlex.quote(data_dir)}")
    return 0


# Locks and elections.


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does, so that what is held is given back."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _hold(session: Session, place: Any, command: Sequence[str]) -> int:
    """Wait for a lock or a leadership, keep it until a signal or the end of `command`."""
    with _terminated_as_interrupted():
        try:
            place.acquire()
        except KeyboardInterrupt:
            raise Failure(EXIT_FAILED, "context canceled") from None
        try:
            if command:
                return _run_holding(place, command)
            response = session.call("KV.Range", proto.RangeRequest(key=place.key))
            session.write(session.printer.get(response))
            place.lease.wait_lost()
        except KeyboardInterrupt:
            return 0
        finally:
            place.release()
    raise Failure(EXIT_FAILED, f"session expired (endpoint {session.client().endpoint})")


def _run_holding(place: Any, command: Sequence[str]) -> int:
    environment = {
        **os.environ,
        "ETCD_LOCK_KEY": os.fsdecode(place.key),
        "ETCD_LOCK_REV": str(place.revision),
    }
    try:
        process = subprocess.Popen(command, env=environment)
    except FileNotFoundError:
        text = f"exec: {go_quote(os.fsencode(command[0]))}: executable file not found in $PATH"
        raise Failure(EXIT_FAILED, text) from None
    except OSError as error:
        raise Failure(EXIT_FAILED, f"exec {_os_error(error)}") from None
    while process.returncode is None:
        # The lock is held until the command has ended, whatever signal comes.
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
    if place.lost:
        say("Warning: the lock was lost before the command ended")
    status = process.returncode
    if status < 0:
        raise Failure(128 - status, f"signal: {signal.strsignal(-status)}")
    if status:
        raise Failure(status, f"exit status {status}")
    return 0


def lock(session: Session) -> int:
    if not session.arguments:
        text = "lock takes a lock name argument and an optional command to execute"
        raise Failure(EXIT_BAD_ARGUMENTS, text)
    ttl = session.flags["ttl"] if session.flags["ttl"] > 0 else DEFAULT_SESSION_TTL_S
    place = session.client().lock(os.fsencode(session.arguments[0]), ttl=ttl)
    return _hold(session, place, session.arguments[1:])


def elect(session: Session) -> int:
    if not 1 <= len(session.arguments) <= 2:
        text = "elect takes one election name argument and an optional proposal argument"
        raise Failure(EXIT_BAD_ARGUMENTS, text)
    name, *proposal = map(os.fsencode, session.arguments)
    if session.flags["listen"] and proposal:
        raise Failure(EXIT_BAD_ARGUMENTS, "proposal given but -l is set")
    if not session.flags["listen"] and not proposal:
        raise Failure(EXIT_BAD_ARGUMENTS, "no proposal argument but -l not set")
    election = session.client().election(name, ttl=DEFAULT_SESSION_TTL_S)
    if proposal:
        return _hold(session, election.campaign(proposal[0]), ())
    with _terminated_as_interrupted(), contextlib.suppress(KeyboardInterrupt):
        for leader in election.observe():
            # The answer has the header; the key and value are those observed, without a count.
            response = session.call("KV.Range", proto.RangeRequest(key=leader.key))
            kv = proto.KeyValue(
                key=leader.key,
                create_revision=leader.create_revision,
                mod_revision=leader.mod_revision,
                version=leader.version,
                value=leader.value,
                lease=leader.lease,
            )
            shown = proto.RangeResponse(header=response.header, kvs=[kv])
            session.write(session.printer.get(shown))
    return 0


# Checks.


class PerfLoad(NamedTuple):
    """`rate`: puts per second."""

    rate: int
    clients: int


PERF_LOADS = {
    "s": PerfLoad(150, 50),
    "m": PerfLoad(1000, 200),
    "l": PerfLoad(8000, 500),
    "xl": PerfLoad(15000, 1000),
}


class ScaleLoad(NamedTuple):
    keys: int
    clients: int


SCALE_LOADS = {
    "s": ScaleLoad(10_000, 50),
    "m": ScaleLoad(100_000, 100),
    "l": ScaleLoad(1_000_000, 500),
    "xl": ScaleLoad(3_000_000, 1000),
}

LOAD_NAMES = {"small": "s", "medium": "m", "large": "l", "xLarge": "xl"}

CHECK_SECONDS = 60
CHECK_KEY_BYTES = 256
CHECK_VALUE_BYTES = 1024

MIN_RATE_SHARE = 0.9
MAX_SLOWEST_S = 0.5
MAX_DEVIATION_S = 0.1
"""What `check perf` lets pass, as etcdctl's does."""

METRICS_TIMEOUT_S = 5.0


class Puts:
    """What became of the puts of a check. Times in seconds."""

    def __init__(self) -> None:
        self.took_s: list[float] = []
        self.errors: Counter[str] = Counter()
        self.elapsed_s = 0.0


async def run_puts(
    session: Session, prefix: bytes, clients: int, count: int, rate: float, progress: Progress
) -> Puts:
    """Put `count` random keys under `prefix`, `clients` at a time, at most `rate` a second.

    All share one connection, as the clients of a program would. `rate` 0: as fast as it goes.
    """
    puts = Puts()
    numbers = iter(range(count))
    value = os.urandom(CHECK_VALUE_BYTES)
    clock = time.monotonic
    started_s = clock()

    async def work(client: AsyncClient) -> None:
        for number in numbers:
            if rate:
                await asyncio.sleep(max(0.0, started_s + number / rate - clock()))
            key = prefix + os.urandom(CHECK_KEY_BYTES - len(prefix) % CHECK_KEY_BYTES)
            sent_s = clock()
            try:
                await client.call("KV.Put", proto.PutRequest(key=key, value=value))
            except EtcdliteError as error:
                puts.errors[describe(error, client.endpoint)] += 1
            else:
                puts.took_s.append(clock() - sent_s)
            progress.update(number + 1, count)

    client = AsyncClient(
        list(session.endpoints),
        timeout_s=session.timeout_s,
        dial_timeout_s=session.flags["dial-timeout"],
    )
    async with client:
        await asyncio.gather(*(work(client) for _ in range(clients)))
    puts.elapsed_s = clock() - started_s
    return puts


def _load_of(session: Session, loads: Mapping[str, Any]) -> Any:
    name = session.flags["load"]
    load = loads.get(LOAD_NAMES.get(name, name))
    if load is None:
        raise Failure(EXIT_BAD_FEATURE, f"unknown load option {name}")
    return load


def _check_prefix(session: Session) -> bytes:
    """The prefix for a check's keys. Raises Failure if there are keys under it."""
    name = session.flags["prefix"]
    prefix = os.fsencode(name)
    span = {"key": prefix or b"\0", "range_end": prefix_end(prefix)}
    if session.call("KV.Range", proto.RangeRequest(**span, limit=1)).kvs:
        text = f'prefix "{name}" has keys. Delete with \'{PROGRAM} del --prefix {name}\' first'
        raise Failure(EXIT_BAD_INPUT, text)
    return prefix


def _clean_up(session: Session, prefix: bytes) -> None:
    """Delete the keys of a check; compact and defragment if that was asked for."""
    request = proto.DeleteRangeRequest(key=prefix or b"\0", range_end=prefix_end(prefix))
    revision = session.call("KV.DeleteRange", request).header.revision
    if session.flags["auto-compact"]:
        session.write(b"Compacting with revision %d\n" % revision)
        session.call("KV.Compact", proto.CompactionRequest(revision=revision, physical=True))
        session.write(b"Compacted with revision %d\n" % revision)
    if session.flags["auto-defrag"]:
        for endpoint in session.endpoints:
            name = go_quote(endpoint)
            session.write(f"Defragmenting {name}\n".encode())
            with session.client_for([endpoint]) as client:
                session.call("Maintenance.Defragment", proto.DefragmentRequest(), client)
            session.write(f"Defragmented {name}\n".encode())


def perf_verdict(puts: Puts, rate: int) -> tuple[list[str], bool]:
    """(etcdctl's lines, whether all is well) for a `check perf` that meant `rate` puts a second."""
    lines = []
    passed = not puts.errors
    if puts.errors:
        lines.append("FAIL: too many errors")
        for text, count in puts.errors.items():
            lines.append(f"FAIL: ERROR({text}) -> {count}")
    per_second = len(puts.took_s) / puts.elapsed_s if puts.elapsed_s else 0.0
    slowest_s = max(puts.took_s, default=0.0)
    deviation_s = statistics.pstdev(puts.took_s) if puts.took_s else 0.0
    if per_second <= rate * MIN_RATE_SHARE:
        lines.append(f"FAIL: Throughput too low: {int(per_second) + 1} writes/s")
        passed = False
    else:
        lines.append(f"PASS: Throughput is {int(per_second) + 1} writes/s")
    if slowest_s > MAX_SLOWEST_S:
        lines.append(f"Slowest request took too long: {slowest_s:f}s")
        passed = False
    else:
        lines.append(f"PASS: Slowest request took {slowest_s:f}s")
    if deviation_s > MAX_DEVIATION_S:
        lines.append(f"Stddev too high: {deviation_s:f}s")
        passed = False
    else:
        lines.append(f"PASS: Stddev is {deviation_s:f}s")
    lines.append("PASS" if passed else "FAIL")
    return lines, passed


def check_perf(session: Session) -> int:
    load: PerfLoad = _load_of(session, PERF_LOADS)
    prefix = _check_prefix(session)
    progress = Progress("puts")
    try:
        puts = asyncio.run(
            run_puts(
                session, prefix, load.clients, load.rate * CHECK_SECONDS, load.rate, progress
            )
        )
    finally:
        progress.done()
    _clean_up(session, prefix)
    lines, passed = perf_verdict(puts, load.rate)
    session.write("".join(line + "\n" for line in lines).encode())
    return 0 if passed else EXIT_FAILED


def _resident_bytes(session: Session, when: str) -> float:
    endpoint = session.endpoints[0]
    url = (endpoint if "://" in endpoint else f"http://{endpoint}").rstrip("/") + "/metrics"
    name = "process_resident_memory_bytes"
    try:
        with urllib.request.urlopen(url, timeout=METRICS_TIMEOUT_S) as answer:
            for line in answer:
                if line.startswith(name.encode() + b" "):
                    return float(line.split()[1])
        cause = "it is not among the metrics"
    except (OSError, ValueError) as error:
        cause = str(getattr(error, "reason", error))
    text = f"Could not read {name} {when} the put operations from {url}: {cause}"
    raise Failure(EXIT_FAILED, text)


def check_datascale(session: Session) -> int:
    load: ScaleLoad = _load_of(session, SCALE_LOADS)
    prefix = _check_prefix(session)
    before_bytes = _resident_bytes(session, "before")
    session.write(
        f"Start data scale check for work load [{load.keys} key-value pairs, {CHECK_VALUE_BYTES} "
        f"bytes per key-value, {load.clients} concurrent clients].\n".encode()
    )
    progress = Progress("puts")
    try:
        puts = asyncio.run(run_puts(session, prefix, load.clients, load.keys, 0, progress))
    finally:
        progress.done()
    used_bytes = _resident_bytes(session, "after") - before_bytes
    _clean_up(session, prefix)
    if puts.errors:
        lines = ["FAIL: too many errors"]
        lines += [f"FAIL: ERROR({text}) -> {count}" for text, count in puts.errors.items()]
        session.write("".join(line + "\n" for line in lines).encode())
        return EXIT_FAILED
    used_mb = used_bytes / (1 << 20)
    session.write(f"PASS: Approximate system memory used : {used_mb:.2f} MB.\n".encode())
    return 0


# The table of commands.


class Command(NamedTuple):
    """`name` is one word or two. `prints` is the printer's method that must exist, if any."""

    name: str
    usage: str
    help: str
    run: Callable[[Session], int]
    flags: tuple[Flag, ...] = ()
    prints: str = ""
    description: str = ""
    examples: tuple[str, ...] = ()


_CLUSTER_FLAG = Flag("cluster", "bool", False, "ask all members of the cluster, not --endpoints")


def completion(session: Session) -> int:
    session.need(1, "completion needs the name of the shell: bash or zsh")
    if session.arguments[0] not in ("bash", "zsh"):
        raise Failure(EXIT_BAD_ARGUMENTS, f"unknown shell {session.arguments[0]}: bash or zsh")
    session.write(completion_script(session.arguments[0]).encode())
    return 0


def _check_flags(name: str) -> tuple[Flag, ...]:
    return (
        Flag("load", "string", "s", "s(mall), m(edium), l(arge) or xl"),
        Flag("prefix", "string", f"/etcdctl-check-{name}/", "where the check's keys go"),
        Flag("auto-compact", "bool", False, "compact the history afterwards"),
        Flag("auto-defrag", "bool", False, "defragment the endpoints afterwards"),
    )


COMMANDS = (
    Command(
        "put",
        "put [options] <key> <value>  (the value comes from standard input if not given)",
        "Puts the given key into the store",
        put,
        PUT_FLAGS,
        "put",
        "A value that begins with '-' has to stand behind '--'.",
        ("put greeting hello", "put -- offset -5", "put config < config.json"),
    ),
    Command(
        "get",
        "get [options] <key> [range_end]",
        "Gets the key or a range of keys",
        get,
        GET_FLAGS,
        "get",
        "With range_end: key <= k < range_end.",
        (
            "get greeting",
            "get /config/ --prefix --keys-only",
            "get '' --prefix --limit 10 -w json",
            "get greeting --rev 5",
            "get /config/ --prefix --count-only -w fields",
        ),
    ),
    Command(
        "del",
        "del [options] <key> [range_end]",
        "Removes the specified key or range of keys [key, range_end)",
        delete,
        DEL_FLAGS,
        "delete",
        "Prints how many keys were deleted.",
        ("del greeting", "del /config/ --prefix --prev-kv"),
    ),
    Command(
        "txn",
        "txn [options]",
        "Txn processes all the requests in one transaction",
        txn,
        (Flag("interactive", "bool", False, "say what is to be typed", "i"),),
        "txn",
        "Reads three blocks of lines from standard input, each ended by an empty line:\n"
        'comparisons, requests if all hold, requests if not. A comparison is target("key") op\n'
        '"value"; targets: mod, create, version, value, lease; ops: = != < >. A request is a\n'
        "put, get or del as on the command line; words in double quotes may hold Go's escapes.",
        (
            "txn <<'END'\nmod(\"greeting\") > \"0\"\n\nput greeting \"hello again\"\n\n"
            "put greeting hello\nget greeting\n\nEND",
        ),
    ),
    Command(
        "watch",
        "watch [options] [key] [range_end] [-- command [argument ...]]",
        "Watches events stream on keys or prefixes",
        watch,
        (
            *WATCH_FLAGS,
            Flag("interactive", "bool", False, "read watch and progress lines from stdin", "i"),
        ),
        "watch",
        "The command is run for each event, with ETCD_WATCH_REVISION, ETCD_WATCH_EVENT_TYPE,\n"
        "ETCD_WATCH_KEY and ETCD_WATCH_VALUE in its environment. The key may come from\n"
        "ETCDLITE_CTL_WATCH_KEY (and _RANGE_END). A broken connection is taken up again where it\n"
        "ended.",
        (
            "watch greeting",
            "watch /config/ --prefix --rev 1",
            "watch /config/ --prefix -- sh -c 'echo $ETCD_WATCH_KEY'",
        ),
    ),
    Command(
        "compaction",
        "compaction [options] <revision>",
        "Compacts the event history in etcd",
        compaction,
        (Flag("physical", "bool", False, "wait until the history is gone from the disk"),),
        description="History before the revision cannot be read or watched any more.",
        examples=("compaction 1234",),
    ),
    Command(
        "defrag",
        "defrag [options]",
        "Defragments the storage of the etcd members with given endpoints",
        defrag,
        (_CLUSTER_FLAG, Flag("data-dir", "string", "", "refused: servers do it themselves")),
        description="Gives space back to the disk while the member goes on serving.",
        examples=("defrag", "defrag --cluster"),
    ),
    Command(
        "lease grant",
        "lease grant <ttl in seconds>",
        "Creates leases",
        lease_grant,
        prints="lease_grant",
        examples=("lease grant 60", "put --lease 694d77aa9e38260f key value"),
    ),
    Command(
        "lease revoke",
        "lease revoke <leaseID>",
        "Revokes leases",
        lease_revoke,
        prints="lease_revoke",
        description="The keys that are attached to it are deleted.",
    ),
    Command(
        "lease timetolive",
        "lease timetolive <leaseID> [options]",
        "Get lease information",
        lease_time_to_live,
        (Flag("keys", "bool", False, "show the keys that are attached to it"),),
        "lease_time_to_live",
    ),
    Command("lease list", "lease list", "List all active leases", lease_list, prints="lease_list"),
    Command(
        "lease keep-alive",
        "lease keep-alive [options] <leaseID>",
        "Keeps leases alive (renew)",
        lease_keep_alive,
        (Flag("once", "bool", False, "renew it once and end"),),
        "lease_keep_alive",
        "Renews the lease at a third of its time, until it is revoked or a signal comes.",
    ),
    Command("alarm list", "alarm list", "Lists all alarms", alarm_list, prints="alarm"),
    Command(
        "alarm disarm",
        "alarm disarm",
        "Disarms all alarms",
        alarm_disarm,
        prints="alarm",
        description="NOSPACE comes back unless space is made: compaction, then defrag.",
    ),
    Command(
        "endpoint health",
        "endpoint health [options]",
        "Checks the healthiness of endpoints specified in `--endpoints` flag",
        endpoint_health,
        (_CLUSTER_FLAG,),
        "endpoint_health",
        "Healthy is who serves a linearizable read and has no alarm.",
        ("endpoint health --cluster -w table",),
    ),
    Command(
        "endpoint status",
        "endpoint status [options]",
        "Prints out the status of endpoints specified in `--endpoints` flag",
        endpoint_status,
        (_CLUSTER_FLAG,),
        "endpoint_status",
        "In the simple format: endpoint, ID, version, db size, is leader, is learner, raft term,\n"
        "raft index, raft applied index, errors.",
        ("endpoint status --cluster -w table",),
    ),
    Command(
        "endpoint hashkv",
        "endpoint hashkv [options]",
        "Prints the KV history hash for each endpoint in --endpoints",
        endpoint_hashkv,
        (_CLUSTER_FLAG, Flag("rev", "int", 0, "up to this revision (0: all)")),
        "endpoint_hashkv",
    ),
    Command(
        "member list",
        "member list",
        "Lists all members in the cluster",
        member_list,
        prints="member_list",
        description="In the simple format: ID, status, name, peer addresses, client addresses,\n"
        "is learner.",
    ),
    Command(
        "snapshot save",
        "snapshot save <filename>",
        "Stores an etcd node backend snapshot to a given file",
        snapshot_save,
        description="The file is complete and synced when it appears under its name.",
        examples=("snapshot save backup.db",),
    ),
    Command(
        "snapshot status",
        "snapshot status <filename>",
        "Gets backend snapshot status of a given file",
        snapshot_status,
        prints="snapshot_status",
        description="In the simple format: hash, revision, total keys, total size.",
    ),
    Command(
        "snapshot restore",
        "snapshot restore <filename> [options]",
        "Restores an etcd member snapshot to an etcd directory",
        snapshot_restore,
        (
            Flag("data-dir", "string", "", "where to (default: the name + .etcdlite)"),
            Flag("wal-dir", "string", "", "where the log goes (default: in the data directory)"),
            Flag("name", "string", "default", "the member's name"),
            Flag(
                "initial-cluster",
                "string",
                "default=http://localhost:2380",
                "all members: name=peer URL, separated by commas",
            ),
            Flag("initial-cluster-token", "string", "etcd-cluster", "name of the new cluster"),
            Flag(
                "initial-advertise-peer-urls",
                "string",
                "http://localhost:2380",
                "this member's peer URLs",
            ),
            Flag("skip-hash-check", "bool", False, "restore even if the checksum is wrong"),
        ),
        description="Works on local files; no server is needed. The directory must be empty or\n"
        "not exist.",
        examples=("snapshot restore backup.db --data-dir new.etcdlite",),
    ),
    Command(
        "lock",
        "lock [options] <lockname> [command [argument ...]]",
        "Acquires a named lock",
        lock,
        (Flag("ttl", "int", 10, "seconds until the lock is free if this process dies"),),
        "get",
        "Prints the lock's key when the lock is held and keeps it until a signal comes; or runs\n"
        "the command, with ETCD_LOCK_KEY and ETCD_LOCK_REV in its environment, and ends as it\n"
        "does. Flags of the command stand behind '--'.",
        ("lock nightly", "lock nightly -- rsync -a data/ backup:"),
    ),
    Command(
        "elect",
        "elect [options] <election-name> [proposal]",
        "Observes and participates in leader election",
        elect,
        (Flag("listen", "bool", False, "only show who leads", "l"),),
        "get",
        examples=("elect scheduler $(hostname)", "elect -l scheduler"),
    ),
    Command(
        "check perf",
        "check perf [options]",
        "Check the performance of the etcd cluster",
        check_perf,
        _check_flags("perf"),
        description="Puts 1 KiB values for a minute and judges rate and latency. Loads: s 150/s,\n"
        "m 1000/s, l 8000/s, xl 15000/s. Deletes its keys afterwards.",
    ),
    Command(
        "check datascale",
        "check datascale [options]",
        "Check the memory usage of holding data for different workloads on a given server endpoint.",
        check_datascale,
        _check_flags("datascale"),
        description="Loads: s 10,000, m 100,000, l 1,000,000, xl 3,000,000 keys of 1 KiB. Needs\n"
        "the first endpoint's /metrics. Deletes its keys afterwards.",
    ),
    Command("version", "version", f"Prints the version of {PROGRAM}", version),
    Command(
        "completion",
        "completion <bash|zsh>",
        "Prints the completion script for a shell",
        completion,
        examples=("completion bash > /etc/bash_completion.d/etcdlite-ctl",),
    ),
)

COMMAND_BY_NAME = {command.name: command for command in COMMANDS}
GROUPS = {
    "lease": "Lease related commands",
    "alarm": "Alarm related commands",
    "endpoint": "Endpoint related commands",
    "member": "Membership related commands",
    "snapshot": "Manages etcd node snapshots",
    "check": "commands for checking properties of the etcd cluster",
}

NOT_YET = (
    "auth",
    "downgrade",
    "make-mirror",
    "member add",
    "member promote",
    "member remove",
    "member update",
    "move-leader",
    "role",
    "user",
)
"""etcdctl's commands whose features are still to come."""


# Help.


def _flag_table(flags: Sequence[Flag]) -> str:
    rows = []
    for flag in flags:
        names = f"-{flag.short}, --{flag.name}" if flag.short else f"    --{flag.name}"
        default = flag.default
        if flag.kind == "duration":
            default = f"{default:g}s"
        elif flag.kind == "list":
            default = ",".join(default)
        shown = "" if flag.kind == "bool" and not default else f"={str(default).lower()}"
        if flag.kind == "string":
            shown = f'="{default}"'
        rows.append((names + shown, flag.help))
    width = max(len(row[0]) for row in rows)
    return "".join(f"  {names.ljust(width)}  {text}\n" for names, text in rows)


def _command_table(commands: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in commands)
    return "".join(f"  {name.ljust(width)}  {text}\n" for name, text in commands)


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" if line else "\n" for line in text.splitlines())


def command_help(command: Command) -> str:
    parts = [f"NAME:\n  {command.name} - {command.help}\n"]
    parts.append(f"USAGE:\n  {PROGRAM} {command.usage}\n")
    if command.description:
        parts.append("DESCRIPTION:\n" + _indented(command.description))
    if command.examples:
        examples = "".join(_indented(f"{PROGRAM} {example}") for example in command.examples)
        parts.append("EXAMPLES:\n" + examples)
    parts.append("OPTIONS:\n" + _flag_table((*command.flags, HELP_FLAG)))
    parts.append("GLOBAL OPTIONS:\n" + _flag_table(GLOBAL_FLAGS))
    return "\n".join(parts)


def group_help(group: str) -> str:
    commands = [
        (command.name.split()[1], command.help)
        for command in COMMANDS
        if command.name.startswith(group + " ")
    ]
    return (
        f"NAME:\n  {group} - {GROUPS[group]}\n\nUSAGE:\n  {PROGRAM} {group} <subcommand>\n\n"
        f"COMMANDS:\n{_command_table(commands)}\n"
        f"More: {PROGRAM} {group} <subcommand> --help\n"
    )


def program_help() -> str:
    commands = sorted((command.name, command.help) for command in COMMANDS)
    return (
        f"NAME:\n  {PROGRAM} - the command line client of etcdlite\n\n"
        f"USAGE:\n  {PROGRAM} [global options] <command> [options] [arguments]\n\n"
        f"VERSION:\n  {__version__}\n\n"
        f"COMMANDS:\n{_command_table(commands)}\n"
        f"GLOBAL OPTIONS:\n{_flag_table((*GLOBAL_FLAGS, HELP_FLAG))}\n"
        f"Global options can stand in the environment, as {ENVIRONMENT_PREFIXES[0]}ENDPOINTS\n"
        f"(or {ENVIRONMENT_PREFIXES[1]}ENDPOINTS) and so on.\n\n"
        f"FIRST AID:\n"
        f"  {PROGRAM} endpoint status --cluster -w table   who is there, who leads, how large\n"
        f"  {PROGRAM} endpoint health --cluster            who can serve\n"
        f"  {PROGRAM} alarm list                           NOSPACE: compact, defrag, disarm\n"
        f"  {PROGRAM} snapshot save backup.db              before anything else is tried\n\n"
        f"More about a command: {PROGRAM} <command> --help\n"
    )


_BASH_COMPLETION = """# etcdlite-ctl completion for {shell}
{prelude}_etcdlite_ctl() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" names="" i
    for ((i = 1; i < COMP_CWORD; i++)); do
        [[ "${{COMP_WORDS[i]}}" == -* ]] || names+="${{names:+ }}${{COMP_WORDS[i]}}"
    done
    local choices=""
    case "$names" in
{cases}    esac
    if [[ "$word" == -* ]]; then
        choices+=" {global_flags}"
    elif [[ "$choices" != *" words"* ]]; then
        choices=""
    fi
    COMPREPLY=($(compgen -W "${{choices/ words/}}" -- "$word"))
    if [[ "$word" == --*= || ${{#COMPREPLY[@]}} -eq 0 ]]; then
        compopt -o default 2>/dev/null
    fi
}}
complete -F _etcdlite_ctl etcdlite-ctl
"""


def completion_script(shell: str) -> str:
    """The script for bash; zsh runs it too, behind its bashcompinit."""

    def words(flags: Sequence[Flag]) -> str:
        return " ".join(f"--{flag.name}" for flag in flags)

    cases = []
    top = " ".join(sorted({command.name.split()[0] for command in COMMANDS}))
    cases.append(f'        "") choices="{top} words" ;;\n')
    for group in GROUPS:
        inner = [c.name.split()[1] for c in COMMANDS if c.name.startswith(group + " ")]
        cases.append(f'        "{group}") choices="{" ".join(inner)} words" ;;\n')
    for command in COMMANDS:
        if command.name == "completion":
            cases.append('        "completion") choices="bash zsh words" ;;\n')
        elif command.flags:
            name = command.name
            cases.append(f'        "{name}"|"{name} "*) choices="{words(command.flags)}" ;;\n')
    return _BASH_COMPLETION.format(
        shell=shell,
        prelude="autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "",
        cases="".join(cases),
        global_flags=words((*GLOBAL_FLAGS, HELP_FLAG)),
    )


# main.


def _command_words(words: Sequence[str]) -> list[int]:
    """Where the first two words that are neither flags nor values of flags stand."""
    takes_value = {
        name
        for command in COMMANDS
        for flag in (*command.flags, *GLOBAL_FLAGS)
        if flag.kind != "bool"
        for name in (f"--{flag.name}", f"-{flag.short}")
    }
    found: list[int] = []
    position = 0
    while position < len(words) and len(found) < 2 and words[position] != "--":
        if words[position].startswith("-") and len(words[position]) > 1:
            position += words[position] in takes_value
        else:
            found.append(position)
        position += 1
    return found


def find_command(words: Sequence[str]) -> tuple[Command | str | None, list[str]]:
    """(the command, a group's name, or None for the program itself; the other words).

    Raises Failure for a command that does not exist.
    """
    positions = _command_words(words)
    names = [words[position] for position in positions]
    for count in (2, 1):
        name = " ".join(names[:count])
        if len(names) >= count and name in COMMAND_BY_NAME:
            taken = positions[:count]
            others = [word for index, word in enumerate(words) if index not in taken]
            return COMMAND_BY_NAME[name], others
    if not names:
        return None, list(words)
    if names[0] == "help":
        found, _ = find_command(names[1:])
        return found, ["--help"]
    if " ".join(names) in NOT_YET or names[0] in NOT_YET:
        name = " ".join(names) if " ".join(names) in NOT_YET else names[0]
        text = f"{name} is not available in this version of {PROGRAM}"
        raise Failure(EXIT_BAD_FEATURE, text)
    if names[0] in GROUPS and len(names) == 1:
        return names[0], [word for index, word in enumerate(words) if index not in positions]
    known = list(COMMAND_BY_NAME) + list(GROUPS)
    name = " ".join(names) if names[0] in GROUPS else names[0]
    hint = _did_you_mean(name, known) or f" (see {PROGRAM} --help)"
    raise Failure(EXIT_FAILED, f'unknown command "{name}" for "{PROGRAM}"{hint}')


def _flags_of(command: Command, given: Mapping[str, Any]) -> dict[str, Any]:
    """All flags' values: given, from the environment, default. Raises Failure for refused ones."""
    flags = (*GLOBAL_FLAGS, *command.flags)
    values = {flag.name: flag.default for flag in flags}
    values |= environment_flags(os.environ)
    values |= given
    for flag in GLOBAL_FLAGS:
        if flag.name in REFUSED_FLAGS and values[flag.name] != flag.default:
            text = f"--{flag.name} is refused: {REFUSED_FLAGS[flag.name]} of etcdlite"
            raise Failure(EXIT_BAD_ARGUMENTS, text)
    if values["write-out"] not in PRINTERS:
        text = f"unsupported output format {values['write-out']} (known: {', '.join(PRINTERS)})"
        raise Failure(EXIT_BAD_FEATURE, text)
    if not values["endpoints"]:
        raise Failure(EXIT_BAD_ARGUMENTS, "--endpoints names no endpoint")
    return values


def run(words: Sequence[str]) -> int:
    """Run a command line. Raises Failure and what a command raises."""
    command, others = find_command(words)
    if not isinstance(command, Command):
        given = parse_flags(others, GLOBAL_FLAGS)[2]
        help_text = program_help() if command is None else group_help(command)
        sys.stdout.write(help_text)
        return 0 if given.get("help") or not others else EXIT_FAILED
    try:
        arguments, before_dashes, given = parse_flags(others, (*GLOBAL_FLAGS, *command.flags))
    except BadFlag as error:
        raise Failure(EXIT_FAILED, f"{error}; see {PROGRAM} {command.name} --help") from None
    if given.get("help"):
        sys.stdout.write(command_help(command))
        return 0
    session = Session(arguments, before_dashes, _flags_of(command, given))
    if command.prints and not session.printer.supports(command.prints):
        text = f"{session.printer.name} not supported as output format"
        raise Failure(EXIT_BAD_FEATURE, f"{text} of {command.name}")
    try:
        return command.run(session)
    except EtcdliteError as error:
        raise Failure(
            EXIT_FAILED, describe(error, session.client().endpoint)
        ) from None
    finally:
        session.close()


def main(argv: Sequence[str] | None = None) -> int:
    """The `etcdlite-ctl` command; gives its exit status."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except Failure as failure:
        if failure.text:
            say(f"Error: {failure.text}")
        return failure.status
    except BadFlag as error:
        say(f"Error: {error}; see {PROGRAM} --help")
        return EXIT_FAILED
    except BrokenPipeError:
        # Whoever read standard output has gone; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        # The shell wants to know that it was the signal.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
