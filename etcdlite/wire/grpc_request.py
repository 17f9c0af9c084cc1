"""The header of a gRPC request: the method and what else it asks for, or why it is refused.

Codes and texts of refusals are those of grpc-go, on which etcd is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from etcdlite import methods
from etcdlite.errors import INTERNAL, INVALID_ARGUMENT, UNIMPLEMENTED, EtcdError, error
from etcdlite.metrics import ClientRequests, Metrics, Rpc
from etcdlite.wire import api, health, http2, reflection
from etcdlite.wire.api import Handler
from etcdlite.wire.calls import Call
from etcdlite.wire.hpack import Field, Headers, list_bytes
from etcdlite.wire.session import INVALID_TOKEN
from etcdlite.wire.streams import CALLS

MAX_TIMEOUT_DIGITS = 8
_TIMEOUT_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}

MIN_TIMEOUT_S = 1e-4
"""A request with a shorter timeout fails when it arrives."""

NO_TIMEOUT: Field = (b"grpc-timeout", b"")
"""In the place of the header field with a timeout."""


class Route(NamedTuple):
    """A known method. Without `handle` and `call` it is unimplemented."""

    number: int
    handle: Handler | None
    decode: Callable[[bytes, int, int], Any] | None
    call: type[Call] | None
    is_client_stream: bool


def _routes() -> dict[bytes, Route]:
    routes = {}
    for number, method in methods.METHODS.items():
        handle, decode = api.HANDLERS.get(number, (None, None))
        routes[method.grpc_path.encode()] = Route(
            number, handle, decode, CALLS.get(number), method.client_stream
        )
    # Numbers above those of frames, because these methods never go through the log.
    routes[f"/{health.SERVICE}/Check".encode()] = Route(0x100, None, None, health.Check, False)
    routes[f"/{health.SERVICE}/Watch".encode()] = Route(0x101, None, None, health.Watch, False)
    for service in reflection.SERVICES:
        path = f"/{service}/ServerReflectionInfo".encode()
        routes[path] = Route(0x102, None, None, reflection.Reflect, True)
    return routes


ROUTES = _routes()
"""The routes by path."""


def count_routes(metrics: Metrics) -> None:
    """Add counters for the methods outside etcd's API, and a hidden one for unknown methods."""
    for path, route in ROUTES.items():
        answers_a_stream = route.call not in (None, health.Check)
        metrics.add_rpc(route.number, path.decode(), route.is_client_stream, answers_a_stream)
    metrics.add_rpc(NOWHERE.number, "", False, False)


_SERVICES = {path.split(b"/")[1] for path in ROUTES}


class Request:
    """The decoded header of a request."""

    __slots__ = (
        "api_version", "call", "client", "decode", "failure", "handle", "has_leader", "http_head",
        "http_status", "is_client_stream", "is_packed", "is_plain", "number", "rpc", "size_bytes",
        "timeout_s", "token",
    )  # fmt: skip

    def __init__(self, route: Route) -> None:
        self.number = route.number
        self.handle = route.handle
        self.is_plain = False
        """The method is unary, and the headers are small and need no further check."""
        self.decode = route.decode
        self.call = route.call
        self.is_client_stream = route.is_client_stream
        self.size_bytes = 0
        """Of the decoded header."""
        self.timeout_s: float | None = None
        self.is_packed = False
        """Messages may be compressed with gzip."""
        self.token = ""
        """The token from Auth.Authenticate."""
        self.has_leader = False
        """The client sent `hasleader`: fail if there is no leader."""
        self.api_version = ""
        self.failure: EtcdError | None = None
        """Set if the request is refused because of its header."""
        self.http_head = b""
        """Of a request that is not gRPC (`carried.py`)."""
        self.http_status = 200
        self.rpc: Rpc
        self.client: ClientRequests
        """The counters of the client's API version."""


NOWHERE = Route(0, None, None, None, False)
"""The route of a request for an unknown method, or of one that is not gRPC."""


def read_request(headers: Headers) -> Request:
    """Decode the header of a request; `failure` is set if it must be refused."""
    values = metadata = dict(headers)
    if len(values) < len(headers):
        metadata = dict(reversed(headers))  # Of these the first counts, as in etcd.
    path = values[b":path"]
    route = ROUTES.get(path)
    request = Request(route or NOWHERE)
    encoding = _shown(values.get(b"grpc-encoding", b""))
    request.is_packed = encoding == "gzip"
    token = metadata.get(b"token", metadata.get(b"authorization"))
    if token is not None:
        # Latin-1 keeps one byte per character; decoded as UTF-8, one emoji widens all to four.
        request.token = token.decode("latin-1") or INVALID_TOKEN
    request.has_leader = metadata.get(b"hasleader") == b"true"
    method = values[b":method"]
    content_type = values.get(b"content-type", b"")
    version = metadata.get(b"client-api-version", b"")
    if method != b"POST":
        text = f"Received a HEADERS frame with :method {_quoted(method)} which should be POST"
        request.http_status = 405
        request.failure = EtcdError(INTERNAL, text)
    elif content_type != b"application/grpc" and not content_type.lower().startswith(
        (b"application/grpc+", b"application/grpc;")
    ):
        request.http_status = 415
        request.failure = EtcdError(
            INVALID_ARGUMENT, f"invalid gRPC request content-type {_quoted(content_type)}"
        )
    else:
        request.failure = read_timeout(request, values.get(b"grpc-timeout"))
        if request.failure is not None:
            request.http_status = 400
        elif route is None:
            request.failure = _unknown(path)
        elif encoding not in ("", "identity", "gzip"):
            request.failure = EtcdError(
                UNIMPLEMENTED, f'grpc: Decompressor is not installed for grpc-encoding "{encoding}"'
            )
        elif route.handle is None and route.call is None:
            request.failure = api.unimplemented(route.number)
        try:
            request.api_version = version.decode()
        except UnicodeDecodeError:
            request.failure = request.failure or error("InvalidClientAPIVersion")
    size = request.size_bytes = list_bytes(headers)
    is_simple = size <= http2.MAX_KNOWN_BYTES and not (request.failure or request.has_leader)
    request.is_plain = request.handle is not None and is_simple
    return request


def without_timeout(headers: Headers) -> tuple[Field, ...]:
    """The headers with `NO_TIMEOUT`, the same for all requests of a client to one method."""
    return tuple([NO_TIMEOUT if field[0] == b"grpc-timeout" else field for field in headers])


def read_timeout(request: Request, value: bytes | None) -> EtcdError | None:
    """Set the timeout of a request. Returns the error if it is malformed."""
    if value is not None:
        request.timeout_s = read_timeout_s(value)
        if request.timeout_s is None:
            return EtcdError(INTERNAL, f"malformed grpc-timeout: {_quoted(value)}")
    return None


def read_timeout_s(value: bytes) -> float | None:
    """The value of a grpc-timeout header; None if it is malformed."""
    digits, unit_s = value[:-1], _TIMEOUT_UNITS_S.get(value[-1:])
    if unit_s is None or not (digits.isdigit() and len(digits) <= MAX_TIMEOUT_DIGITS):
        return None
    return int(digits) * unit_s


def _unknown(path: bytes) -> EtcdError:
    service, slash, method = path[1:].rpartition(b"/")
    if path[:1] != b"/" or not slash:
        return EtcdError(UNIMPLEMENTED, f"malformed method name: {_quoted(path)}")
    if service not in _SERVICES:
        return EtcdError(UNIMPLEMENTED, f"unknown service {_shown(service)}")
    return EtcdError(
        UNIMPLEMENTED, f"unknown method {_shown(method)} for service {_shown(service)}"
    )


def _shown(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _quoted(value: bytes) -> str:
    return '"' + _shown(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
