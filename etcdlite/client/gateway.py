"""A client of etcd's JSON gateway, for the servers that do not speak the native protocol: etcd.

`Gateway` has the `call` and `stream` of `blocking.Client`, with the same messages and errors, over
HTTP/1.1 and the standard library. It is for one thread, plus one for each stream. A call is a POST
on a connection that is kept. A stream is a POST on a connection of its own: it sends one message
and receives lines.

A read is sent again, to the next endpoint, when the connection breaks. A write is sent again only
if no connection could be made; otherwise it raises UnknownOutcome.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from etcdlite import json_mapping, proto
from etcdlite.client import errors
from etcdlite.client.calls import STALE_LOGIN, error_at
from etcdlite.client.connection import cause_of, parse_endpoint
from etcdlite.client.errors import ProtocolViolation
from etcdlite.client.link import connect
from etcdlite.errors import UNKNOWN
from etcdlite.methods import METHOD_BY_NAME, Retry

MAX_BODY_BYTES = 1 << 30
"""The largest response, and the largest message of a stream."""

MAX_VERSION_BYTES = 64 << 10
"""The largest answer to the question for the version."""

FAILURES = (OSError, ValueError, http.client.HTTPException)
"""What `http.client` raises for a connection that breaks, and for what is not HTTP."""


class Gateway:
    """A client of one cluster."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        user: str = "",
        password: str = "",
        timeout_s: float = 5.0,
        dial_timeout_s: float = 2.0,
        cacert: str = "",
        cert: str = "",
        key: str = "",
        insecure_skip_tls_verify: bool = False,
        server_name: str = "",
    ) -> None:
        """As `Client`. Raises ValueError."""
        is_tls = bool(cacert or cert or key or insecure_skip_tls_verify)
        self._endpoints = [
            found if found.scheme or not is_tls else found._replace(scheme="https")
            for found in map(parse_endpoint, endpoints)
        ]
        self._timeout_s = timeout_s
        self._dial_timeout_s = dial_timeout_s
        self._user = user
        self._password = password
        self._token: str | None = None
        """None: a login is due; empty: the server knows no users."""
        self._at = 0
        """The endpoint in use."""
        self._connection: http.client.HTTPConnection | None = None
        self._context: Any = None
        self._server_name = server_name
        if any(endpoint.scheme == "https" for endpoint in self._endpoints):
            from etcdlite.client import tls

            settings = tls.Settings(cacert, cert, key, insecure_skip_tls_verify, server_name)
            self._context = tls.context(settings, "http/1.1")

    @property
    def endpoint(self) -> str:
        """The endpoint in use, "HOST:PORT"."""
        return str(self._endpoints[self._at])

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def version(self) -> dict[str, Any]:
        """The answer of the first endpoint that answers to /version. Raises EtcdliteError."""
        status, body = self._exchange("GET", "/version", b"", True, MAX_VERSION_BYTES)
        return self._parsed(body if status == 200 else b"", status)

    def call(self, method: str, request: Any) -> Any:
        """Send one message to a method ("KV.Put"). Returns its response. Raises EtcdliteError."""
        row = METHOD_BY_NAME[method]
        is_read = row.retry is Retry.ALWAYS
        body = json_mapping.text(request).encode()
        for attempt in range(2):
            if self._user and self._token is None and method != "Auth.Authenticate":
                self._log_in()
            status, answer = self._exchange("POST", row.http_paths[0], body, is_read)
            value = self._parsed(answer, status)
            if status == 200:
                return self._message(row.response, value)
            failure = self._error(value)
            if not isinstance(failure, STALE_LOGIN) or attempt:
                raise failure
            self._token = None  # Tokens end, also when a member restarts.
        raise AssertionError

    def stream(self, method: str, request: Any) -> GatewayStream:
        """The messages that answer `request`, on a connection of its own. Raises EtcdliteError."""
        if self._user:
            self._log_in()  # A watch is refused a stale token in the stream, not by an HTTP status.
        row = METHOD_BY_NAME[method]
        body = json_mapping.text(request).encode()
        deadline_s = monotonic() + self._timeout_s
        connection = self._connect_any(deadline_s)
        sock = connection.sock
        try:
            with self._limited(sock, deadline_s):
                connection.request("POST", row.http_paths[0], body, self._headers())
                response = connection.getresponse()
                answer = b"" if response.status == 200 else response.read(MAX_BODY_BYTES)
            if response.status != 200:
                raise self._error(self._parsed(answer, response.status))
        except errors.EtcdliteError:
            connection.close()
            raise
        return GatewayStream(self, sock, response, row.response)

    # One exchange.

    @contextmanager
    def _limited(self, sock: socket.socket, deadline_s: float) -> Iterator[None]:
        """End what is done with the socket at the deadline: its own timeout would begin again with
        each byte. Raises ConnectionFailed and Timeout."""
        # Not the `shutdown` of a TLS socket, which would go on without encryption.
        end, left_s = socket.socket.shutdown, deadline_s - monotonic()
        timer = threading.Timer(left_s, end, (sock, socket.SHUT_RDWR))
        timer.start()
        try:
            yield
            if monotonic() >= deadline_s:
                raise TimeoutError  # The end of what was read may not be there.
        except FAILURES as failure:
            raise self._broken(TimeoutError() if monotonic() >= deadline_s else failure) from None
        finally:
            timer.cancel()

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = self._token
        return headers

    def _log_in(self) -> None:
        request = proto.AuthenticateRequest(name=self._user, password=self._password)
        try:
            self._token = self.call("Auth.Authenticate", request).token
        except errors.AuthNotEnabled:  # As in other clients, the user does not count there.
            self._token = ""

    def _connected(self, timeout_s: float) -> http.client.HTTPConnection:
        """A new connection to the endpoint in use. Raises OSError."""
        endpoint = self._endpoints[self._at]
        sock = connect(endpoint, timeout_s)
        if endpoint.scheme == "https":
            host = self._server_name or endpoint.host
            sock = self._context.wrap_socket(sock, server_hostname=host)
        sock.settimeout(None)
        connection = http.client.HTTPConnection(endpoint.host, endpoint.port)
        connection.sock = sock
        connection.auto_open = 0
        return connection

    def _connect_any(self, deadline_s: float) -> http.client.HTTPConnection:
        """A new connection to the first endpoint that accepts one, beginning with the current one.
        Raises ConnectionFailed."""
        for left in range(len(self._endpoints), 0, -1):
            limit_s = min(self._dial_timeout_s, max(0.001, deadline_s - monotonic()) / left)
            try:
                return self._connected(limit_s)
            except OSError as failure:
                why = cause_of(failure, limit_s)
                unreachable = error_at(errors.ConnectionFailed, self.endpoint, why)
            self._next_endpoint()
        raise unreachable

    def _next_endpoint(self) -> None:
        self.close()
        self._at = (self._at + 1) % len(self._endpoints)

    def _exchange(
        self, verb: str, path: str, body: bytes, is_read: bool, limit: int = MAX_BODY_BYTES
    ) -> tuple[int, bytes]:
        """(status, body) of the answer. If the connection breaks, a read is retried, at most as
        many times as there are endpoints."""
        left = len(self._endpoints)
        deadline_s = monotonic() + self._timeout_s
        while True:
            if self._connection is None:
                self._connection = self._connect_any(deadline_s)
            try:
                with self._limited(self._connection.sock, deadline_s):
                    self._connection.request(verb, path, body, self._headers())
                    response = self._connection.getresponse()
                    answer = response.read(limit)
                    if response.length and len(answer) < limit:
                        raise http.client.IncompleteRead(answer)
                if not response.isclosed():
                    self.close()
                    text = f"a response of more than {limit} bytes"
                    raise error_at(ProtocolViolation, self.endpoint, text)
                if response.will_close:
                    self.close()
                return response.status, answer
            except (errors.ConnectionFailed, errors.Timeout) as broken:
                self._next_endpoint()
                if not is_read and not isinstance(broken, errors.Timeout):
                    text = "the connection broke, the request may have been served"
                    raise error_at(errors.UnknownOutcome, broken.endpoint, text) from None
                if not left or isinstance(broken, errors.Timeout):
                    raise
                left -= 1

    # Answers, which may be anything.

    def _parsed(self, body: bytes, status: int) -> dict[str, Any]:
        with suppress(ValueError, RecursionError):
            if isinstance(value := json.loads(body), dict):
                return value
        text = f"the answer has HTTP status {status} and no JSON object. Is the JSON gateway on"
        raise error_at(ProtocolViolation, self.endpoint, f"{text} (--enable-grpc-gateway)?")

    def _message(self, cls: type[proto.Message], value: Any) -> Any:
        try:
            return json_mapping.from_json(cls, value)
        except proto.DecodeError as failure:
            text = f"the answer is not a {cls.NAME}: {failure}"
            raise error_at(ProtocolViolation, self.endpoint, text) from None

    def _error(self, value: dict[str, Any]) -> errors.EtcdliteError:
        text = value.get("message") or value.get("error")
        codes = (value.get("code"), value.get("grpc_code"))
        code = next((code for code in codes if isinstance(code, int)), UNKNOWN)
        return errors.error_for(code, str(text)[:4096], self.endpoint)

    def _broken(self, failure: Exception) -> errors.EtcdliteError:
        if isinstance(failure, TimeoutError):
            return error_at(errors.Timeout, self.endpoint, f"no answer in {self._timeout_s:g} s")
        why = cause_of(failure, 0) if isinstance(failure, OSError) else "the answer is cut off"
        return error_at(errors.ConnectionFailed, self.endpoint, why)


@dataclass
class GatewayStream:
    """The messages of a stream: iterate; a context manager that ends it."""

    _gateway: Gateway
    _socket: socket.socket
    _response: http.client.HTTPResponse
    _class: type[proto.Message]

    def __enter__(self) -> GatewayStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._response.close()
        self._socket.close()

    def cancel(self) -> None:
        """End the stream. Any thread may call this."""
        with suppress(OSError):  # The server closed it first.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # Wakes the thread that reads.

    def __iter__(self) -> Iterator[Any]:
        """The messages, until the server ends the stream. Raises EtcdliteError."""
        gateway = self._gateway
        while True:
            try:
                line = self._response.readline(MAX_BODY_BYTES)
            except FAILURES as failure:
                raise gateway._broken(failure) from None
            if not line:
                return
            value = gateway._parsed(line, 200)
            if "error" in value:
                error = value["error"]
                raise gateway._error(error if isinstance(error, dict) else value)
            yield gateway._message(self._class, value.get("result"))
