"""The JSON gateway's mapping: paths to methods, request bodies to messages, errors to statuses.
`http.py` carries it; `json_mapping.py` writes responses.

Its output is, byte for byte, that of etcd's gateway (3.5, grpc-gateway v1):

- an error is `{"error":text,"code":number,"message":text}` with the status of `HTTP_STATUS`;
- in a stream every message is a line `{"result":{...}}`, and an error is the last line,
  `{"error":{"grpc_code":...,"http_code":...,"message":...,"http_status":...}}`.

Requests are the other side's: any bytes give a message or an EtcdError, in time that grows with
their number only. The JSON parser builds what it reads before anyone can look at it, so the number
of values is bounded first (`max_values`).
"""

from __future__ import annotations

import json
import re
from typing import Any

from etcdlite import errors, json_mapping, methods, proto
from etcdlite.errors import INVALID_ARGUMENT, EtcdError

PREFIXES = ("/v3/", "/v3beta/", "/v3alpha/")

METHODS: dict[str, methods.Method] = {
    prefix + path.removeprefix("/v3/"): method
    for method in methods.METHODS.values()
    for path in method.http_paths
    for prefix in PREFIXES
}
"""By path."""

HTTP_STATUS = {
    errors.OK: 200,
    errors.CANCELED: 408,
    errors.UNKNOWN: 500,
    errors.INVALID_ARGUMENT: 400,
    errors.DEADLINE_EXCEEDED: 504,
    errors.NOT_FOUND: 404,
    errors.ALREADY_EXISTS: 409,
    errors.PERMISSION_DENIED: 403,
    errors.RESOURCE_EXHAUSTED: 429,
    errors.FAILED_PRECONDITION: 400,
    errors.ABORTED: 409,
    errors.OUT_OF_RANGE: 400,
    errors.UNIMPLEMENTED: 501,
    errors.INTERNAL: 500,
    errors.UNAVAILABLE: 503,
    errors.DATA_LOSS: 500,
    errors.UNAUTHENTICATED: 401,
}
"""gRPC status code -> HTTP status, as grpc-gateway maps them."""

REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Request Entity Too Large",
    415: "Unsupported Media Type",
    421: "Misdirected Request",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
}
"""The names of the statuses in use; clients see some of them in `http_status`."""

FEWEST_VALUES = 1_000
VALUES_PER_OP = 100

MAX_DEPTH = 500
"""Levels of objects and arrays in a request. Every supported version of Python can parse this many;
the depth at which its parser gives up differs between versions."""

_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"{}[]")


# --- Requests ----------------------------------------------------------------------------------


def max_values(max_txn_ops: int) -> int:
    """How many JSON values a request may have: a transaction as large as is allowed fits."""
    return FEWEST_VALUES + VALUES_PER_OP * max_txn_ops


def read_request(cls: type[proto.Message], body: bytes, limit: int) -> Any:
    """The message whose JSON form is the first value in `body`; an empty body is an empty message.
    At most `limit` values. Raises EtcdError InvalidArgument."""
    opened = body.count(b"{") + body.count(b"[")
    if opened + body.count(b",") > limit:
        raise _invalid(f"the request has more than {limit} JSON values")
    if opened > MAX_DEPTH and _depth(body) > MAX_DEPTH:
        raise _invalid("the JSON is nested too deeply")
    text = body.decode("utf-8", "replace").lstrip(" \t\r\n")
    if not text:
        return cls()
    try:
        # Like etcd, ignore what follows the value.
        value, _ = _DECODER.raw_decode(text)
        return cls() if value is None else json_mapping.from_json(cls, value)
    except proto.DecodeError as failure:
        raise _invalid(str(failure)) from None
    except json.JSONDecodeError as failure:
        rest = text[failure.pos :].strip(" \t\r\n")
        if not rest or failure.msg.startswith("Unterminated string"):
            raise EtcdError(INVALID_ARGUMENT, "unexpected EOF") from None
        raise _invalid(f"{failure.msg} at character {failure.pos} of the JSON") from None
    except RecursionError:
        raise _invalid("the JSON is nested too deeply") from None


def _depth(body: bytes) -> int:
    """The number of objects and arrays around the most deeply nested value."""
    outside_strings = b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    depth = deepest = 0
    for byte in outside_strings.translate(None, _NO_BRACKETS):
        if byte in b"{[":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
    return deepest


def _invalid(what: str) -> EtcdError:
    return EtcdError(INVALID_ARGUMENT, f"etcdlite: invalid request: {what}")


def _read_integer(text: str) -> int:
    # int() takes quadratic time, which Python bounds itself from 3.11 on only.
    if len(text) > json_mapping.MAX_NUMBER_CHARS:
        raise proto.DecodeError(f"a number of more than {json_mapping.MAX_NUMBER_CHARS} digits")
    return int(text)


def _refuse_constant(text: str) -> None:
    raise proto.DecodeError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(parse_int=_read_integer, parse_constant=_refuse_constant)


class Values:
    """Cuts a stream of JSON objects, which come in any pieces, into one object each.

    Looks at every byte once and holds at most one incomplete object."""

    _MARKS = re.compile(rb'["\\{}\[\]]')
    _START = re.compile(rb"[^ \t\r\n]")

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: of one object."""
        self._max_bytes = max_bytes
        self._held = bytearray()
        self._depth = 0
        self._in_string = False
        self._escapes = False
        """The piece before ended with a backslash in a string."""

    def __len__(self) -> int:
        """The bytes of the object that is incomplete."""
        return len(self._held)

    def feed(self, data: bytes) -> list[bytes]:
        """The objects that `data` completes. Raises EtcdError InvalidArgument."""
        found: list[bytes] = []
        begin = 0
        """Of what is not in `_held` or `found`."""
        skip = 0 if self._escapes else -1
        self._escapes = False
        if not self._held:
            begin = self._find_start(data, 0)
        for mark in self._MARKS.finditer(data, begin):
            at = mark.start()
            if at == skip or at < begin:
                continue
            char = data[at]
            if self._in_string:
                if char == 0x5C:
                    skip = at + 1
                elif char == 0x22:
                    self._in_string = False
            elif char == 0x22:
                self._in_string = True
            elif char in b"{[":
                self._depth += 1
            elif char in b"}]":
                self._depth -= 1
                if self._depth <= 0:
                    found.append(bytes(self._held) + data[begin : at + 1])
                    self._held.clear()
                    self._depth = 0
                    begin = self._find_start(data, at + 1)
        self._escapes = skip == len(data)
        self._held += data[begin:]
        if len(self._held) > self._max_bytes or any(len(v) > self._max_bytes for v in found):
            raise errors.error("RequestTooLarge")
        return found

    def _find_start(self, data: bytes, at: int) -> int:
        """Where the next object begins; the end of `data` if it does not begin there."""
        found = self._START.search(data, at)
        if found is None:
            return len(data)
        if found[0] != b"{":
            raise _invalid("a message of the stream is not a JSON object")
        return found.start()


# --- Responses ---------------------------------------------------------------------------------


def error_json(failure: EtcdError) -> str:
    """The body of a response that is an error."""
    text = json_mapping.string(failure.text)
    return f'{{"error":{text},"code":{failure.code},"message":{text}}}'


def stream_error_json(failure: EtcdError) -> str:
    """The last line of a stream that an error ends."""
    status = HTTP_STATUS[failure.code]
    return (
        f'{{"error":{{"grpc_code":{failure.code},"http_code":{status},'
        f'"message":{json_mapping.string(failure.text)},"http_status":"{REASONS[status]}"}}}}\n'
    )
