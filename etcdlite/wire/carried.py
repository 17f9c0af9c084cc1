"""HTTP requests that come over HTTP/2 and are not gRPC: health checks, metrics, the JSON gateway
and the page, for clients that agree on `h2` in the handshake of TLS, as curl and browsers do.

HTTP/2 carries what HTTP/1.1 means (RFC 9113, 8). So each request has an `http.StreamSession`, which
gets it as HTTP/1.1 and serves nothing else. The events of its answer become frames.

Input counts against the limit of the connection, and waits for the turn of the call: an answer such
as /metrics takes milliseconds, and hundreds of requests may arrive at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from etcdlite.errors import UNAVAILABLE, EtcdError, error
from etcdlite.loading import when_loaded
from etcdlite.member import Member
from etcdlite.metrics import ClientRequests
from etcdlite.wire.calls import Call
from etcdlite.wire.grpc import GrpcSession, GrpcStream
from etcdlite.wire.grpc_request import NOWHERE, Request
from etcdlite.wire.hpack import Field, Headers, list_bytes, pack
from etcdlite.wire.http2 import MAX_FRAME_BYTES, NO_TRAILERS, Stream
from etcdlite.wire.http2_state import INTERNAL_ERROR

MAX_CARRIED = 250
"""Requests of one connection at once; one more is answered with status 503."""

CARRIED_BYTES = 8 << 10
"""The memory that a request takes besides what it received, approximately."""

HTTP_MODULES = ("h11", "etcdlite.wire.http")
"""Imported for the first client of HTTP: they take 30 ms and 2 MB."""


def head_of(headers: Headers) -> bytes:
    """The head of the request in HTTP/1.1, up to the field that delimits its body. It has
    no line break (`http2.py`); the parser of HTTP/1.1 refuses whatever else is forbidden."""
    fields = dict(headers)
    host = fields.get(b":authority") or fields.get(b"host", b"")
    lines = [b"%b %b HTTP/1.1" % (fields[b":method"], fields[b":path"]), b"host: " + host]
    others = [field for field in headers if field[0][:1] != b":" and field[0] != b"host"]
    lines += [b"%b: %b" % field for field in others]
    return b"\r\n".join(lines) + b"\r\n"


class Carried(Call):
    """One HTTP request."""

    owner: CarryingSession
    wakes = True
    ticks = True

    @property
    def is_stream(self) -> bool:  # type: ignore[override]
        """Its session serves a watch, for example."""
        return self.http is not None and len(self.http.calls) > 0

    def opened(self) -> None:
        self.http: Any = None
        """Its `StreamSession`, once the module is imported."""
        self.input = bytearray()  # HTTP/1.1 that its session has not taken yet.
        self._counted_bytes = 0  # By `count_partial`.
        self.is_over = False
        """The answer is complete."""

    def begin(self, stream: GrpcStream) -> None:
        self._stream = stream
        self._is_chunked = not stream.is_ended and stream.content_length is None
        framing = b"transfer-encoding: chunked\r\n\r\n" if self._is_chunked else b"\r\n"
        self.input += stream.request.http_head + framing
        when_loaded(HTTP_MODULES, self.member.run_task, self._loaded)

    def _loaded(self) -> None:
        if not self.is_closed:
            self.http = self.owner.make_http(self)
            self.http.client = self.owner.client
            self.http.calls.quota = self.owner.calls.quota
            self.resume()

    # Input.

    def message(self, body: bytes) -> None:
        self._receive(b"%x\r\n%b\r\n" % (len(body), body) if self._is_chunked else body)
        self._count()

    def finish(self) -> None:
        if self._is_chunked:
            self._receive(b"0\r\n\r\n")

    def _receive(self, data: bytes) -> None:
        self.input += data
        if self.http is not None:
            self.resume()

    def _count(self) -> None:
        kept_bytes = len(self.input) + (0 if self.http is None else self.http.kept_bytes)
        change, self._counted_bytes = kept_bytes - self._counted_bytes, kept_bytes
        self.owner.count_partial(change)

    def produce(self) -> None:
        http, received = self.http, self.input
        if received and not http.is_full:
            piece = bytes(received[:MAX_FRAME_BYTES])
            del received[:MAX_FRAME_BYTES]
            http.receive(piece)
        if http.has_more:
            http.produce()
        self._count()
        self.is_ready = http.has_more or (bool(received) and not http.is_full)
        if self.is_over:
            self.owner.end_http(self._stream)
        elif http.is_closing:  # It gave up without an answer.
            raise EtcdError(UNAVAILABLE, http.why_aborted)
        elif not self._stream.is_ended:
            self.owner.renew_window(self._stream)

    def wake(self) -> None:
        if self.http is not None:
            self.http.unblocked()
            self.resume()

    def tick(self, now: float) -> None:
        if self.http is not None:
            self.http.tick(now)

    def close(self) -> None:
        self.owner.count_partial(-self._counted_bytes)
        self.owner.carried.pop(self.request_id, None)
        if self.http is not None:
            self.http.closed()
            self.http = None
        del self._stream

    # Output.

    def send_head(self, status: int, fields: Iterable[Field]) -> None:
        block = [(b":status", b"%d" % status)]
        block += [(name.lower(), value) for name, value in fields if name.lower() != b"connection"]
        self.owner.send_headers(self._stream, pack(block))
        self._stream.headers_sent = status >= 200

    def send_data(self, data: bytes) -> None:
        if not self._stream.request.http_head.startswith(b"HEAD "):
            self.owner.send_data(self._stream, b"", data)


class CarryingSession(GrpcSession):
    """A connection with requests of gRPC and of HTTP."""

    __slots__ = ("carried", "make_http")

    def __init__(
        self,
        member: Member,
        on_output: Callable[[GrpcSession], None],
        make_http: Callable[[Carried], Any],
        **options: Any,
    ) -> None:
        """`make_http` makes the `StreamSession` of a request. `options`: see `GrpcSession`."""
        super().__init__(member, on_output, **options)
        self.make_http = make_http
        self.carried: dict[int, Carried] = {}
        """The requests of HTTP, by their streams."""

    def read_request(self, headers: Headers) -> Request:
        if b"application/grpc" in dict(headers).get(b"content-type", b""):  # As in etcd.
            return super().read_request(headers)
        request = Request(NOWHERE._replace(call=Carried, is_client_stream=True))
        request.http_head = head_of(headers)
        request.http_status = 503  # If it fails before its session answers.
        request.size_bytes = CARRIED_BYTES + 2 * list_bytes(headers)
        # Counters that are not shown: its `StreamSession` counts the request.
        request.rpc, request.client = self.member.metrics.rpcs[NOWHERE.number], ClientRequests()
        return request

    def _open_call(self, stream: GrpcStream) -> None:
        if not stream.request.http_head:
            super()._open_call(stream)
        elif len(self.carried) >= MAX_CARRIED:
            self.fail(stream.id, NOWHERE.number, error("RequestTooManyRequests"))
        else:
            call = self.calls.open(stream.id, NOWHERE.number, Carried)
            assert isinstance(call, Carried)
            stream.call = self.carried[stream.id] = call
            call.begin(stream)

    def _read_messages(self, stream: GrpcStream, data: bytes) -> None:
        if not stream.request.http_head:
            super()._read_messages(stream, data)
            return
        try:
            stream.call.message(data)
        except EtcdError as failure:
            self.fail(stream.id, NOWHERE.number, failure)

    def end_http(self, stream: GrpcStream) -> None:
        """End the complete answer to a request of HTTP."""
        self._close(stream.id)
        self.finish(stream, NO_TRAILERS)

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        call = self.carried.get(request_id)
        if call is None or not self.streams[request_id].headers_sent:
            super().fail(request_id, method, failure)
        elif call.is_over:
            self.end_http(self.streams[request_id])
        else:
            self.reset_stream(request_id, INTERNAL_ERROR)  # The answer must not look complete.

    def renew_window(self, stream: Stream) -> None:
        call = self.carried.get(stream.id)
        if call is None or not call.input:
            super().renew_window(stream)

    def shut_down(self) -> None:
        for call in self.carried.values():
            if call.is_stream:
                call.http.shut_down()
        super().shut_down()
