"""Requests from a command's arguments, and the language of `txn` and `watch -i`, in which each line
looks like a command.

Nothing here talks to a server or prints. Bad input raises Failure with etcdctl's exit status and
text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etcdlite import proto
from etcdlite.cli.failures import EXIT_BAD_FEATURE, EXIT_BAD_INPUT, BadArguments, Failure
from etcdlite.cli.flags import Flag, parse_flags
from etcdlite.cli.table import DEL_FLAGS, GET_FLAGS, PUT_FLAGS
from etcdlite.client.operations import prefix_range
from etcdlite.notation import parse_int, unquote

_SORT_TARGETS = {name: name for name in ("CREATE", "KEY", "VALUE", "VERSION")} | {"MODIFY": "MOD"}


def key_range(name: str, arguments: Sequence[str], flags: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """The (key, range_end) of a get or del."""
    if flags["prefix"] and flags["from-key"]:
        raise BadArguments("`--prefix` and `--from-key` cannot be set at the same time, choose one")
    if not arguments:
        raise BadArguments(
            f"{name} command needs one argument as key and an optional argument as range_end"
        )
    if len(arguments) > 1 and (flags["prefix"] or flags["from-key"]):
        raise BadArguments(
            "too many arguments, only accept one argument when `--prefix` or `--from-key` is set"
        )
    key = os.fsencode(arguments[0])
    if flags["prefix"]:
        return prefix_range(key)
    if flags["from-key"]:
        return key or b"\0", b"\0"
    return key, os.fsencode(arguments[1]) if len(arguments) > 1 else b""


def put_request(
    arguments: Sequence[str],
    flags: Mapping[str, Any],
    read_value: Callable[[], bytes] = lambda: b"",
) -> Any:
    """`read_value` gives the value if the arguments do not."""
    usage = "put command needs 1 argument and input from stdin or 2 arguments"
    if not arguments:
        raise BadArguments(usage)
    if flags["ignore-value"]:
        if len(arguments) > 1:
            raise BadArguments("put command needs only 1 argument when 'ignore-value' is set")
        value = b""
    elif len(arguments) > 1:
        value = os.fsencode(arguments[1])
    elif not (value := read_value()):
        raise BadArguments(usage)
    try:
        lease = parse_int(flags["lease"], 16)
    except ValueError as error:
        raise BadArguments(f"bad lease ID ({error}), expecting ID in Hex") from None
    return proto.PutRequest(
        key=os.fsencode(arguments[0]),
        value=value,
        lease=lease,
        prev_kv=flags["prev-kv"],
        ignore_value=flags["ignore-value"],
        ignore_lease=flags["ignore-lease"],
    )


def range_request(arguments: Sequence[str], flags: Mapping[str, Any]) -> proto.RangeRequest:
    key, range_end = key_range("get", arguments, flags)
    if flags["keys-only"] and flags["count-only"]:
        raise BadArguments(
            "`--keys-only` and `--count-only` cannot be set at the same time, choose one"
        )
    if flags["consistency"] not in ("l", "s"):
        raise Failure(f'unknown consistency flag "{flags["consistency"]}"', EXIT_BAD_FEATURE)
    order = flags["order"].upper() or "NONE"
    if order not in ("ASCEND", "DESCEND") and flags["order"]:
        raise Failure(f"bad sort order {flags['order']}", EXIT_BAD_FEATURE)
    target = flags["sort-by"].upper() or "KEY"
    if target not in _SORT_TARGETS:
        raise Failure(f"bad sort target {flags['sort-by']}", EXIT_BAD_FEATURE)
    return proto.RangeRequest(
        key=key,
        range_end=range_end,
        limit=flags["limit"],
        revision=flags["rev"],
        sort_order=proto.ENUMS["RangeRequest.SortOrder"][order],
        sort_target=proto.ENUMS["RangeRequest.SortTarget"][_SORT_TARGETS[target]],
        serializable=flags["consistency"] == "s",
        keys_only=flags["keys-only"],
        count_only=flags["count-only"],
        min_mod_revision=flags["min-mod-rev"],
        max_mod_revision=flags["max-mod-rev"],
        min_create_revision=flags["min-create-rev"],
        max_create_revision=flags["max-create-rev"],
    )


def delete_request(arguments: Sequence[str], flags: Mapping[str, Any]) -> proto.DeleteRangeRequest:
    if len(arguments) > 2:
        arguments = ()  # etcdctl says the same as for none
    key, range_end = key_range("del", arguments, flags)
    if flags["range"] and (flags["prefix"] or flags["from-key"] or len(arguments) < 2):
        text = "`--range` needs a key and a range_end, and neither `--prefix` nor `--from-key`"
        raise BadArguments(text)
    return proto.DeleteRangeRequest(key=key, range_end=range_end, prev_kv=flags["prev-kv"])


# The language of `txn` and `watch -i`.

_WORD = r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([^'"\s]\S*))"""


def split_words(line: str) -> list[str]:
    """The words of a line: bare, in single quotes, or in double quotes with Go's escapes.

    Raises ValueError for a quote that is not closed, or a bad escape."""
    words = []
    position = 0
    line = line.rstrip()
    while position < len(line):
        match = re.match(_WORD, line[position:])
        if match is None:
            raise ValueError("unclosed quote")
        double, single, bare = match.groups()
        words.append(os.fsdecode(unquote(double)) if double is not None else single or bare or "")
        position += match.end()
    return words


_COMPARE = r"""(?s)\s*"((?:[^"\\]|\\.)*)"\)\s+(\S+)\s+"((?:[^"\\]|\\.)*)\""""
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


def parse_compare(line: str) -> proto.Compare:
    """A Compare from `target("key") op "value"`; a lease is in hexadecimal. Raises Failure."""
    line = line.strip()
    malformed = f"malformed comparison: {line}"
    hint = 'expected target("key") op "value", for example mod("foo") > "0"'
    name, parenthesis, rest = line.partition("(")
    match = re.match(_COMPARE, rest)
    if not parenthesis or match is None:
        raise Failure(f"{malformed}; {hint}", EXIT_BAD_INPUT)
    if name not in _COMPARE_TARGETS:
        raise Failure(f"{malformed} (unknown target {name})", EXIT_BAD_INPUT)
    key_text, operator, value_text = match.groups()
    if operator not in _COMPARE_RESULTS:
        raise Failure(f"{malformed} (unknown operator {operator})", EXIT_BAD_INPUT)
    target, field = _COMPARE_TARGETS[name]
    try:
        key = unquote(key_text)
        value: Any = unquote(value_text)
        if target != "VALUE":
            value = parse_int(os.fsdecode(unquote(value_text)), 16 if target == "LEASE" else 10)
    except ValueError:
        raise Failure(f"invalid txn compare request: {line}", EXIT_BAD_INPUT) from None
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


def parse_request(line: str) -> proto.RequestOp:
    """A RequestOp from a line like the commands: `put key "a value" --prev-kv`. Raises Failure."""
    line = line.strip()
    try:
        words = split_words(line)
        if len(words) < 2:
            raise Failure(f"invalid txn compare request: {line}", EXIT_BAD_INPUT)
        if words[0] not in _TXN_OPERATIONS:
            raise Failure(f"invalid txn request: {line}", EXIT_BAD_INPUT)
        flags, request, field = _TXN_OPERATIONS[words[0]]
        arguments, _, given = parse_flags(words[1:], flags)
    except ValueError as error:
        raise Failure(f"invalid txn request: {line} ({error})", EXIT_BAD_INPUT) from None
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
        "EOF: a transaction is three blocks of lines (compares, requests on success, requests "
        "on failure), each ended by an empty line",
        EXIT_BAD_INPUT,
    )


_SECTIONS = ("compare", "success", "failure")
_LABEL = re.compile(r"(compare|success|failure)s?( requests?)?( *\([a-z, ]*\))? *:?\s*", re.I)


def section_of(line: bytes) -> str:
    """The section that a line is the label of ("compares:", "success requests (get, put, del):"),
    or empty. Tutorials show these labels, which are prompts of etcdctl."""
    found = _LABEL.fullmatch(os.fsdecode(line))
    return found[1].lower() if found else ""


def read_sections(lines: Iterator[bytes]) -> list[list[Any]]:
    """The three blocks of a transaction whose sections have labels, in any order, up to the end of
    the input. Empty lines do not count. Raises Failure."""
    blocks: dict[str, list[Any]] = {name: [] for name in _SECTIONS}
    seen: list[str] = []
    for line in lines:
        name = section_of(line)
        if name in seen:
            raise Failure(f"the transaction has two sections {name}", EXIT_BAD_INPUT)
        text = os.fsdecode(line)
        if name:
            seen.append(name)
        elif text.strip():
            parse = parse_compare if seen[-1] == "compare" else parse_request
            blocks[seen[-1]].append(parse(text))
    return list(blocks.values())
