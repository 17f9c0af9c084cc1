"""HTTP/1.1 for operators, scripts and browsers, sans-IO: health checks, metrics, the JSON gateway
and a read-only page.

An `HttpSession` parses the requests of one connection with `h11`, calls the member, and writes the
answers. The connections of a listener share a `Site` (`site.py`). Paths:

    /                            the page (page.html)
    /health                      {"health":"true","reason":""}; ?serializable=true, ?exclude=NOSPACE
    /livez /readyz               etcd's checks; ?verbose, ?exclude=CHECK; /readyz/CHECK runs one
    /version /metrics /debug/vars
    /v3/... /v3beta/... /v3alpha/...     every method of the API, as etcd's gateway (gateway.py)

A connection's requests are served one after the other. Requests sent ahead wait, and above a limit
the server stops reading (`is_full`). A request runs once its body is complete, except a client
stream (watch, lease keep-alive), whose messages run as they arrive. Large answers (a range, a
snapshot) are converted to JSON in slices, by `produce`.

A malformed request gets an error response; then the connection is closed, because the start of the
next request is unknown (for example with both Content-Length and Transfer-Encoding). Input is
discarded until the client closes its side, so that the client can read the response.

A path never names a file: it is looked up in a table.

Limits: `MAX_HEAD_BYTES`, a body as large as the largest request in base64 (`max_body_bytes`),
`MAX_WAITING_BYTES`, those of `session.py`, and the timeouts below. Input closes at most its own
connection: `receive` raises nothing.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any
from urllib.parse import parse_qs, unquote

import h11

from etcdlite import errors, frames, json_mapping, log, methods
from etcdlite.errors import EtcdError, error
from etcdlite.member import Member
from etcdlite.methods import RANGE, WATCH
from etcdlite.metrics import Metrics, Rpc
from etcdlite.proto import DecodeError
from etcdlite.request import Asked, Waiter
from etcdlite.session import MIN_RECEIVED_BYTES_PER_S
from etcdlite.wire import api, exposition, gateway, health
from etcdlite.wire.calls import Calls
from etcdlite.wire.carried import Carried
from etcdlite.wire.grpc_request import MIN_TIMEOUT_S, read_timeout_s
from etcdlite.wire.health import NOSNIFF, Header
from etcdlite.wire.session import INVALID_TOKEN, ClientSession, LeaderLoss
from etcdlite.wire.site import Site, debug_vars, host_name, page, versions
from etcdlite.wire.streams import CALLS

MAX_HEAD_BYTES = 32 * 1024
"""The limit on a request's first line and headers (or trailers) together."""

MAX_HEAD_LINES = 256
"""More header lines are refused: the parser takes 4 us for each, and reads them all at once."""

PIECE_BYTES = 2 * 1024
"""The parser gets input in pieces of this size."""

EVENTS_PER_TURN = 64
"""Requests and pieces of bodies that one call processes."""

PIECES_PER_TURN = 4
"""Pieces of large answers that one call produces."""

INLINE_BYTES = json_mapping.PIECE_BYTES
"""An encoded response up to this size is converted to JSON at once."""

MAX_WAITING_BYTES = 64 * 1024
"""With more waiting input than this, `is_full` is true."""

MAX_UNREAD_BYTES = 1 << 20
"""With more waiting input than this, the connection is closed."""

HEAD_TIMEOUT_S = 10.0
"""From a request's first byte to the end of its headers."""

BODY_TIMEOUT_S = 60.0
"""From the end of the headers to the end of the body, besides the time that its size takes; of a
client stream, to its first message."""

IDLE_TIMEOUT_S = 300.0
"""Between two requests."""

LINGER_S = 2.0
"""A refused client may take this long to read the response and close its side."""

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
HTML = "text/html; charset=utf-8"

_GRPC = ("Grpc-Metadata-Content-Type", "application/grpc")
_LATE = (errors.DEADLINE_EXCEEDED, "context deadline exceeded")


class _Request:
    """The request that a session serves."""

    def __init__(self, request_id: int) -> None:
        self.id = request_id
        self.verb = ""
        self.path = ""
        self.query = ""
        self.headers: dict[str, str] = {}
        """By their names in lower case."""
        self.host = ""
        self.origin = ""
        self.refusal: tuple[int, str] | None = None
        """The status and the reason if its origin may not use the API."""
        self.leader_loss: LeaderLoss | None = None
        """Ends a stream whose client asked for a leader."""
        self.is_welcome = False
        """The host of the request is on the whitelist."""
        self.method: methods.Method | None = None
        """The method of the API, if the path is one."""
        self.body = bytearray()
        self.values: gateway.Values | None = None
        """The messages in the body of a client stream."""
        self.is_complete = False
        """The body is complete."""
        self.has_head = False
        """The head of the answer is sent."""
        self.answer: bytes | None = None
        """The answer of a call with one answer, until the call ends."""
        self.deadline: float | None = None
        self.rpc: Rpc | None = None
        """The metrics of the method, until the request ends."""
        self.began = 0.0
        """The member's clock when the request was counted, in seconds."""
        self.script: health.Script | None = None
        """The health check that is running."""

    def read_headers(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """`h11` gives the names in lower case. Of several with one name, the first counts."""
        for name, value in headers:
            self.headers.setdefault(name.decode("ascii"), value.decode("latin-1"))
        self.host = self.headers.get("host", "")
        self.origin = self.headers.get("origin", "")

    @property
    def token(self) -> str:
        """The auth token, or ""."""
        names = ("grpc-metadata-token", "grpc-metadata-authorization", "authorization")
        token = next((self.headers[name] for name in names if name in self.headers), None)
        return "" if token is None else token or INVALID_TOKEN

    def check_metadata(self, member: Member) -> None:
        """Apply the metadata in the headers. Raises EtcdError."""
        if timeout := self.headers.get("grpc-timeout"):
            timeout_s = read_timeout_s(timeout.encode("latin-1"))
            if timeout_s is None:
                raise EtcdError(errors.INVALID_ARGUMENT, f"invalid grpc-timeout: {timeout}")
            if 0 < timeout_s < MIN_TIMEOUT_S:
                raise EtcdError(*_LATE)
            if timeout_s:
                self.deadline = member.clock() + timeout_s
        if self.headers.get("grpc-metadata-hasleader") == "true":
            if not member.raft.leader:
                raise error("NoLeader")
            if self.method is not None and self.method.number in CALLS:
                self.leader_loss = LeaderLoss(member)

    def count(self, metrics: Metrics, method: methods.Method, now: float) -> Rpc:
        """Count the request as gRPC's: in etcd, the gateway is a client of gRPC."""
        rpc = self.rpc = metrics.rpcs[method.number]
        self.began = now
        rpc.started += 1
        client = metrics.client(self.headers.get("grpc-metadata-client-api-version", ""))
        if rpc.kind == "unary":
            client.unary += 1
        else:
            client.streams += 1
        return rpc

    def count_end(self, now: float, code: int = errors.OK) -> None:
        rpc, self.rpc = self.rpc, None
        if rpc is not None and code == errors.OK:
            rpc.handling_s.observe(now - self.began)
        elif rpc is not None:
            rpc.fail(code, now - self.began)


class HttpSession(ClientSession):
    """One connection. It is open once the head of a request is complete. `on_output` is also called
    when the session can take more input."""

    protocol = "http"

    def __init__(
        self, member: Member, on_output: Callable[[Any], None], site: Site, is_local: bool = False
    ) -> None:
        """`is_local`: the client connected to a loopback address."""
        super().__init__(on_output, member.clock, member.state.store.limits)
        self.member = member
        self.site = site
        self._is_local = is_local
        self._conn = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._has_rest = False
        """The parser may return an event without more input."""
        self._request: _Request | None = None
        self._events_left = 0
        self._next_id = 0
        self.calls = Calls(member, self)
        self._jobs: deque[tuple[Iterator[str], int]] = deque()
        """Answers to convert to JSON in slices, in order, with their sizes."""
        self._jobs_bytes = 0
        self._ends = False
        """The answer ends after the jobs."""
        self._discards = False
        """The client is refused; its further input is discarded."""
        self._is_stopping = False
        self._has_begun_head = False
        self.inbox.expect(IDLE_TIMEOUT_S)

    # Input.

    def receive(self, data: bytes) -> None:
        """Process bytes from the client."""
        if self.is_closing or self._discards:
            return
        if self._request is None and not self._has_begun_head:
            self._has_begun_head = True
            self.inbox.expect(HEAD_TIMEOUT_S)
        self.inbox.put(data)
        self._advance()
        request = self._request
        is_behind_a_stream = request and request.is_complete and request.id in self.calls
        if self.inbox.waiting_bytes > MAX_UNREAD_BYTES or (self.is_full and is_behind_a_stream):
            # Requests behind a stream wait until it ends, which may be never.
            self.abort("it sends too much ahead")

    def _advance(self) -> None:
        """Process received input, for about one slice."""
        conn = self._conn
        self._has_rest = True
        self._events_left = EVENTS_PER_TURN
        while self._events_left > 0:
            if self.is_closing or self._discards or self._is_waiting or self.is_blocked:
                return
            self._events_left -= 1
            try:
                try:
                    event = conn.next_event()
                except ValueError:  # h11 before 0.16: a Content-Length of thousands of digits.
                    self._respond(400, TEXT, "")  # Without a body, because the verb may be HEAD.
                    return
                if event is h11.NEED_DATA:
                    if not self.inbox.waiting_bytes:
                        self._has_rest = False
                        return
                    # A head or trailers: of a body, nothing is left but the line before a chunk.
                    if conn.trailing_data[0].count(b"\n") > MAX_HEAD_LINES:
                        raise h11.RemoteProtocolError("too many header lines", 431)
                    conn.receive_data(self.inbox.take(PIECE_BYTES))
                elif type(event) is h11.Request:
                    self._begin(event)
                elif type(event) is h11.Data:
                    self._take(event.data)
                elif type(event) is h11.EndOfMessage:
                    self._complete()
                else:
                    return
            except h11.RemoteProtocolError as fault:
                fault.__traceback__ = None  # It has a frame of h11 that has the error: a cycle.
                self._refuse(fault.error_status_hint, str(fault))
                return

    def _begin(self, event: h11.Request) -> None:
        self.is_open = True
        self._has_begun_head = False
        self._next_id += 1
        request = self._request = _Request(self._next_id)
        request.verb = event.method.decode("ascii")
        request.path, request.query, host = _split_target(event.target.decode("ascii"))
        request.read_headers(event.headers)
        site, headers = self.site, request.headers
        if host:
            request.host = host  # It takes precedence over the Host header (RFC 9112, 3.2.2).
        request.is_welcome = site.allows_host(request.host, self._is_local)
        is_chunked = "transfer-encoding" in headers
        if is_chunked and ("content-length" in headers or event.http_version < b"1.1"):
            # A proxy in between may see other requests in these bytes.
            self._refuse(400, "the length of the body is given in two ways")
            return
        if not event.http_version.startswith(b"1."):
            self._refuse(505, "this server speaks HTTP/1.1")
            return
        if request.verb == "CONNECT":  # A status of success would make the connection a tunnel.
            self._refuse(405, "this server is no proxy")
            return
        length = int(headers.get("content-length", 0))
        if length > site.max_body_bytes:
            self._refuse_body()
            return
        self.inbox.expect(BODY_TIMEOUT_S + length / MIN_RECEIVED_BYTES_PER_S)
        has_gateway = site.serves_gateway and not site.only_metrics
        if request.is_welcome and has_gateway and request.verb == "POST":
            method = request.method = gateway.METHODS.get(request.path)
            if method is not None:
                content_type = headers.get("content-type", "")
                request.refusal = site.refusal(request.origin, request.host, content_type)
            if request.refusal is not None:
                request.method = None
            elif method is not None and method.client_stream:
                request.values = gateway.Values(site.max_body_bytes)
                request.count(self.member.metrics, method, self.member.clock())
                try:
                    request.check_metadata(self.member)
                except EtcdError as failure:
                    self.fail(request.id, method.number, failure)
                    return
        if self._conn.they_are_waiting_for_100_continue:
            self._send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue"))

    def _take(self, data: bytes) -> None:
        """Process a piece of the request's body."""
        request = self._request
        assert request is not None
        if request.values is None:
            request.body += data
            if len(request.body) > self.site.max_body_bytes:
                self._refuse_body()
            return
        try:
            for value in request.values.feed(bytes(data)):
                self.inbox.expect(math.inf)
                self._events_left -= 1
                self._take_message(request, value)
                if self._request is not request:
                    return
        except (EtcdError, DecodeError) as failure:
            self._fail(request, api.refusal(failure))

    def _complete(self) -> None:
        """Process the end of the request."""
        request = self._request
        assert request is not None
        request.is_complete = True
        self.inbox.expect(math.inf)
        if request.values is None:
            self._serve(request)
        elif len(request.values):
            self._fail(request, EtcdError(errors.INVALID_ARGUMENT, "unexpected EOF"))
        elif request.id not in self.calls:
            self._end_call(request)
        elif request.method is None or request.method.number != WATCH:
            # A watch lasts until its connection is closed, as in etcd.
            self.calls.finish(request.id)

    # Serving a request.

    def _serve(self, request: _Request) -> None:
        if not request.is_welcome:
            what = "refused a request by an unknown name"
            log.warn(what, "host-whitelist", host=request.host[:100])
            text = _UNKNOWN_HOST % host_name(request.host)[:100]
            self._respond(421, TEXT, text, NOSNIFF)
        elif request.verb == "OPTIONS":
            self._respond(200, "", "")
        elif request.refusal is not None:
            status, text = request.refusal
            origin = request.origin[:100]
            log.warn("refused a request of a web page", "origin", why=text, origin=origin)
            self._respond(status, TEXT, f"{text}\n", NOSNIFF)
        elif request.method is not None:
            self._call(request, request.method)
        elif request.path.startswith(gateway.PREFIXES) and not self.site.only_metrics:
            self._refuse_call(request)
        else:
            self._serve_plain(request)

    def _refuse_call(self, request: _Request) -> None:
        if not self.site.serves_gateway:
            text = "The JSON gateway is switched off (enable-grpc-gateway).\n"
            self._respond(404, TEXT, text, NOSNIFF)
        elif request.path in gateway.METHODS:
            self._respond(405, TEXT, "Method Not Allowed\n", NOSNIFF, ("Allow", "POST"))
        else:
            self._respond(404, JSON, gateway.error_json(EtcdError(errors.NOT_FOUND, "Not Found")))

    def _call(self, request: _Request, method: methods.Method) -> None:
        """Run a request of one message."""
        member = self.member
        rpc = request.count(self.member.metrics, method, self.member.clock())
        try:
            request.check_metadata(self.member)
            message = gateway.read_request(
                method.request, bytes(request.body), self.site.max_values
            )
            request.body.clear()
            body = message.encode()
            rpc.received += 1
            rpc.received_bytes += len(body)
            if len(body) > member.options.max_request_bytes:
                raise error("RequestTooLarge")
            if method.number in CALLS:
                self.calls.open(request.id, method.number, CALLS[method.number])
                self.calls.message(request.id, body)
                self.calls.finish(request.id)
            elif method.number in api.HANDLERS:
                frame = frames.frame(1, method.number, 0, body)
                handle, decode = api.HANDLERS[method.number]
                handle(member, Waiter(self, request.id, method.number, decode(body)), frame)
            else:
                raise api.unimplemented(method.number)
        except (EtcdError, DecodeError) as failure:
            self._fail(request, api.refusal(failure))

    def _take_message(self, request: _Request, value: bytes) -> None:
        """Run a message of a client stream. Raises EtcdError, DecodeError."""
        method = request.method
        assert method is not None
        message = gateway.read_request(method.request, value, self.site.max_values)
        if request.id not in self.calls:
            self.calls.open(request.id, method.number, CALLS[method.number])
        body = message.encode()
        if request.rpc is not None:
            request.rpc.received += 1
            request.rpc.received_bytes += len(body)
        self.calls.message(request.id, body)

    def _serve_plain(self, request: _Request) -> None:
        """Serve a path outside the API."""
        self._events_left = 0  # Some take 2 ms, so what was sent ahead has to wait.
        site, member, path = self.site, self.member, request.path
        query = parse_qs(request.query, keep_blank_values=True)
        serve: Callable[[], None] | None = None
        if path == "/metrics" and site.metrics is not None:
            self._respond(200, exposition.CONTENT_TYPE, site.metrics())
            return
        if path == "/health":
            request.script = health.serve_health(member, site, query)
        elif health.is_check(path):
            request.script = health.serve_checks(member, site, path, query)
        elif not site.only_metrics:
            serve = {
                "/": lambda: self._respond(200, HTML, *page()),
                "/version": lambda: self._respond(200, JSON, versions(member)),
                "/debug/vars": lambda: self._respond(200, JSON, debug_vars(member)),
            }.get(path)
        if serve is None and request.script is None:
            self._respond(404, TEXT, "404 page not found\n", NOSNIFF)
        elif request.verb not in ("GET", "HEAD"):
            self._respond(405, TEXT, "Method Not Allowed\n", NOSNIFF, ("Allow", "GET"))
        elif serve is not None:
            serve()
        else:
            self._go_on(request, None)

    # Health.

    def _go_on(self, request: _Request, failure: EtcdError | None) -> None:
        """Start a health check, or resume it after a read."""
        assert request.script is not None
        try:
            is_serializable = request.script.send(failure)
        except StopIteration as stop:
            request.script = None
            status, text, *headers = stop.value
            self._respond(status, TEXT, text, *headers)
            return
        # A new id, so that a late answer to the previous read is not mistaken for this one's.
        self._next_id += 1
        request.id = self._next_id
        # The member asks itself: a health check is for no user.
        probed = Asked(partial(self._probed, request.id))
        if is_serializable:
            self.member.reads.read_now(Waiter(probed, 0, RANGE, health.PROBE))
        else:
            request.deadline = self.member.clock() + self.member.options.request_timeout_s
            # Not `read`, which a learner refuses: as in etcd, it is healthy while it could read.
            self.member.reads.read_own(Waiter(probed, 0, RANGE, health.PROBE))

    def _probed(self, request_id: int, answer: bytes | EtcdError) -> None:
        if request := self._served(request_id):
            self._go_on(request, answer if isinstance(answer, EtcdError) else None)

    # Output.

    def _served(self, request_id: int) -> _Request | None:
        """The request with this id, if it is still being served."""
        request = self._request
        return request if request is not None and request.id == request_id else None

    def awaits(self, request_id: int) -> bool:
        return self._served(request_id) is not None

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        if request := self._served(request_id):
            try:
                self._answer(request, body)
            except DecodeError:
                self._fail(request, EtcdError(*api.UNREADABLE))

    def _answer(self, request: _Request, body: bytes) -> None:
        """Send an answer of one message."""
        assert request.method is not None
        if request.rpc is not None:
            request.rpc.sent_bytes += len(body)
        request.count_end(self.member.clock())
        cls = request.method.response
        if len(body) <= INLINE_BYTES:
            self._respond(200, JSON, "".join(json_mapping.pieces(cls, body)), _GRPC)
        else:
            self._begin_answer(request, 200, JSON, _GRPC)
            self._add_job(json_mapping.pieces(cls, body), len(body))
            self._ends = True

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        if request := self._served(request_id):
            self._fail(request, failure)

    def _fail(self, request: _Request, failure: EtcdError) -> None:
        self.calls.close(request.id)
        request.count_end(self.member.clock(), failure.code)
        if request.script is not None:
            self._go_on(request, failure)
        elif self._ends:
            pass  # It is answered or failed already, and waits to be sent.
        elif request.has_head:
            self._add_job(iter((gateway.stream_error_json(failure),)), 0)
            self._ends = True
            self._make()
        else:
            self._respond(gateway.HTTP_STATUS[failure.code], JSON, gateway.error_json(failure))

    def send_message(self, request_id: int, method: int, body: bytes) -> None:
        request = self._served(request_id)
        if request is None or self._ends:
            return
        assert request.method is not None
        if not request.method.server_stream:
            request.answer = body
            return
        if request.rpc is not None:
            request.rpc.sent += 1
            request.rpc.sent_bytes += len(body)
        if not request.has_head:
            self._begin_answer(request, 200, JSON, _GRPC)
        line = chain(('{"result":',), json_mapping.pieces(request.method.response, body), ("}\n",))
        if self._jobs or len(body) > INLINE_BYTES:
            self._add_job(line, len(body))
            return
        try:
            self._send(h11.Data(data="".join(line).encode()))
        except DecodeError:
            self._fail(request, EtcdError(*api.UNREADABLE))

    def end_call(self, request_id: int, method: int) -> None:
        if request := self._served(request_id):
            self.calls.close(request_id)
            self._end_call(request)

    def _end_call(self, request: _Request) -> None:
        if request.answer is not None:
            self._answer(request, request.answer)
            return
        request.count_end(self.member.clock())
        if not request.has_head:
            self._begin_answer(request, 200, JSON, _GRPC)
        self._ends = True
        self._make()

    def is_stalled(self, request_id: int) -> bool:
        """Same as `is_blocked`: there is one call at a time."""
        return self.is_blocked

    def _add_job(self, job: Iterator[str], size_bytes: int) -> None:
        if not self._jobs:
            self.outbox.wake()
        self._jobs.append((job, size_bytes))
        self._jobs_bytes += size_bytes

    def _make(self) -> None:
        """Convert the next pieces of a large answer to JSON."""
        for _ in range(PIECES_PER_TURN):
            if not self._jobs or self.outbox.unsent_bytes > self.outbox.high_water_bytes:
                break
            job, size_bytes = self._jobs[0]
            try:
                text = next(job, None)
            except DecodeError:
                self.abort(api.UNREADABLE[1])
                return
            if text is None:
                self._jobs.popleft()
                self._jobs_bytes -= size_bytes
            elif text:
                self._send(h11.Data(data=text.encode()))
        if self._ends and not self._jobs:
            self._end_answer()

    def _begin_answer(
        self, request: _Request | None, status: int, content_type: str, *headers: Header
    ) -> None:
        everything: list[Header] = []
        if request is not None:
            request.has_head = True
            if request.is_welcome and not self.site.only_metrics:
                everything += self.site.cors_headers(request.origin)
        if content_type:
            everything.append(("Content-Type", content_type))
        everything += headers
        if self._is_stopping:
            everything.append(("Connection", "close"))
        reason = gateway.REASONS.get(status, "")
        self._send(h11.Response(status_code=status, headers=everything, reason=reason))

    def _respond(self, status: int, content_type: str, text: str | bytes, *headers: Header) -> None:
        """Send a complete response. If the request is incomplete, it is the connection's last."""
        body = text.encode("utf-8", "replace") if isinstance(text, str) else text
        request = self._request
        if (request is None or not request.is_complete) and not self._is_stopping:
            headers += (("Connection", "close"),)
        self._begin_answer(
            request, status, content_type, *headers, ("Content-Length", str(len(body)))
        )
        if body and (request is None or request.verb != "HEAD"):
            self._send(h11.Data(data=body))
        self._end_answer()

    def _end_answer(self) -> None:
        conn = self._conn
        self._send(h11.EndOfMessage())
        self._forget_request()
        if conn.our_state is h11.DONE and conn.their_state is h11.DONE and not self._is_stopping:
            has_rest = bool(self.inbox.waiting_bytes or conn.trailing_data[0])
            self._has_rest = self._has_begun_head = has_rest
            self.inbox.expect(HEAD_TIMEOUT_S if has_rest else IDLE_TIMEOUT_S)
            conn.start_next_cycle()
        elif conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED):
            self._close()
        else:
            # Wait for the client to close its side. Closing first would reset the connection, and
            # the client could lose the response.
            self._discards = True
            self._drop_input()
            self.inbox.expect(LINGER_S)

    def _refuse_body(self) -> None:
        self._respond(413, JSON, gateway.error_json(error("RequestTooLarge")))

    def _refuse(self, status: int, why: str) -> None:
        """Refuse a request whose end is unknown."""
        if self._conn.our_state is h11.SEND_BODY:
            # In the middle of a response, cutting it off is the only way to report an error.
            self._forget_request()
            self._close()
            return
        reason = gateway.REASONS.get(status, "Bad Request")
        # h11 quotes the client's bytes after the colon.
        self._respond(status, TEXT, f"{status} {reason}: {why.partition(':')[0]}\n", NOSNIFF)

    def _send(self, event: Any) -> None:
        data = self._conn.send(event)
        if data:
            self.outbox.append(data)

    # The connection.

    def _close(self) -> None:
        self.is_closing = True
        self._drop_input()
        self.outbox.wake()

    def abort(self, why: str) -> None:
        self._forget_request()
        self._drop_input()
        super().abort(why)

    def _drop_input(self) -> None:
        self.inbox.clear()
        self._has_rest = False

    def _forget_request(self) -> None:
        request, self._request = self._request, None
        if request is not None:
            self.calls.close(request.id)
            request.count_end(self.member.clock(), errors.CANCELED)
        self._jobs.clear()
        self._jobs_bytes = 0
        self._ends = False

    may_rest = False  # A request may have a deadline, and the next one must come in time.

    def tick(self, now: float) -> None:
        super().tick(now)
        request = self._request
        if request is None:
            return
        loss = request.leader_loss
        if loss is not None and loss.is_over(now):
            request.leader_loss = None
            self._fail(request, error("NoLeader"))
        elif request.deadline is not None and now >= request.deadline:
            request.deadline = None
            self._fail(request, EtcdError(*_LATE) if request.script is None else error("Timeout"))

    def input_is_late(self) -> None:
        if self._request is None or self._discards:
            self._close()
        else:
            self._refuse(408, "the body did not come in time")

    def token(self, request_id: int) -> str:
        """The auth token of an open request, or ""."""
        request = self._served(request_id)
        return "" if request is None else request.token

    @property
    def is_full(self) -> bool:
        """Enough input waits: read no more for now."""
        return self.inbox.waiting_bytes > MAX_WAITING_BYTES

    @property
    def is_blocked(self) -> bool:
        """The client does not read its output: streams hold back."""
        outbox = self.outbox
        return outbox.unsent_bytes + self._jobs_bytes > outbox.high_water_bytes

    @property
    def _is_waiting(self) -> bool:
        """What was asked must be answered before more of the input is processed."""
        is_complete = self._request is not None and self._request.is_complete
        return is_complete or super().is_full

    @property
    def kept_bytes(self) -> int:
        size = super().kept_bytes + self._jobs_bytes
        if (request := self._request) is not None:
            size += len(request.body) + len(request.values or b"")
            size += self.calls.requests_bytes((request.id,))
        return size

    @property
    def is_idle(self) -> bool:
        """No unary request is unanswered and no output is unsent."""
        request = self._request
        is_answered = request is None or not request.is_complete or request.id in self.calls
        return super().is_idle and not self._jobs and is_answered

    @property
    def has_more(self) -> bool:
        """`produce` has work to do now."""
        if self.outbox.unsent_bytes > self.outbox.high_water_bytes or self.is_closing:
            return False
        return bool(self._jobs) or (self._has_rest and not self._is_waiting) or super().has_more

    def produce(self) -> None:
        """Continue a large answer, or requests that were sent ahead."""
        was_blocked, was_full = self.is_blocked, self.is_full
        if self._jobs:
            self._make()
        elif self.calls:
            self.calls.produce()
        if self._has_rest and not self._is_waiting:
            self._advance()
        self.check_unblocked(was_blocked)
        if was_full and not self.is_full:
            self.outbox.wake()

    def closed(self) -> None:
        """The connection is closed: drop its requests."""
        self._forget_request()
        self._has_rest = False
        super().closed()

    def shut_down(self) -> None:
        """The server stops: end the streams, serve no further request."""
        self._is_stopping = True
        request = self._request
        if request is None or not request.is_complete:
            self._drop_input()
        if request is not None and request.id in self.calls:
            self._fail(request, error("Stopped"))


class StreamSession(HttpSession):
    """Serves the one request of a stream of HTTP/2 (`carried.py`)."""

    def __init__(self, carried: Carried, site: Site, is_local: bool) -> None:
        super().__init__(carried.member, lambda session: carried.resume(), site, is_local)
        self._carried = carried

    @property
    def is_blocked(self) -> bool:
        return self._carried.blocked or super().is_blocked

    def input_is_late(self) -> None:
        if not self._carried.input:  # What waits for its turn came in time.
            super().input_is_late()

    def _send(self, event: Any) -> None:
        self._conn.send(event)
        if type(event) is h11.Data:
            self._carried.send_data(event.data)
        elif type(event) is h11.EndOfMessage:
            self._carried.is_over = True
            self._carried.resume()
        else:
            self._carried.send_head(event.status_code, event.headers)


_UNKNOWN_HOST = (
    "This server does not answer to the name %r. If it should, start it with that name in "
    "--host-whitelist. (The list is a protection against DNS rebinding, CVE-2018-5702.)\n"
)

_ABSOLUTE = re.compile(r"https?://(?:[^/?#]*@)?([^/?#]*)", re.IGNORECASE)


def _split_target(target: str) -> tuple[str, str, str]:
    """Path (unquoted), query and host (if present) of a request's target."""
    host = ""
    found = _ABSOLUTE.match(target)
    if found is not None:
        host = found[1]
        target = target[found.end() :] or "/"
    path, _, query = target.partition("?")
    return unquote(path), query, host
