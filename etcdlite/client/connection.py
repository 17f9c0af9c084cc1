"""One client connection of the native protocol, sans-IO.

A `ClientConnection` turns requests into bytes to send and received bytes into deliveries. It owns
no socket, thread or clock. The shells (`blocking.py`, `aio.py`) move its bytes; one request and its
answer need no shell:

    connection, ticket = ClientConnection(), Ticket(method)
    connection.open(ticket, request.encode(), end=True)
    sock.sendall(connection.take_output())
    while ticket.answer is None and not connection.failure:
        for to, flags, body in connection.receive(sock.recv(RECEIVE_BYTES)):
            to.deliver(flags, body)

Life of a request: `open` gives it an id and queues its first frame; `take_output` hands out the
bytes and marks their tickets as sent; `receive` returns (ticket, flags, body) for each frame that
came, until one with END closes it. `cancel` forgets the ticket at once; the id stays reserved until
the server's last frame for it has come.

Invariants:
- no byte of a ticket that `fail` returns with `sent` false was handed to the network: the request
  certainly was not carried out and may be sent again, whatever it is;
- each open ticket ends exactly once: by a delivery with END, by `cancel`, or in `fail`;
- nothing that a server sends raises: a violation of the protocol sets `failure`, and what was
  complete before it is still delivered;
- memory is bounded: by one reply of `MAX_REPLY_BYTES` and `MAX_OPEN_REQUESTS` requests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etcdlite import frames, methods, proto
from etcdlite.client import errors

DEFAULT_ENDPOINT = "127.0.0.1:2379"
DEFAULT_PORT = 2379

MAX_REPLY_BYTES = 1 << 30
"""The largest frame accepted from a server: a range of everything can be large."""

MAX_OPEN_REQUESTS = 65_536
"""The server's limit on one connection."""

RECEIVE_BYTES = 256 * 1024
"""Read from a socket at once."""

WANTS_SECRET = (
    "the server wants a shared secret: name a copy of its client-secret-file as secret-file; "
    "between members, set peer-secret-file"
)
"""Why a connection without a channel fails where there must be one."""

PING = methods.Method(
    number=frames.PING,
    service="",
    name="Ping",
    full="Ping",
    grpc_path="",
    request=proto.Message,
    response=proto.Message,
)
"""The native protocol's own method; its bodies are not messages."""


def cause_of(error: OSError, timeout_s: float) -> str:
    """Describe an OSError for people: "connection refused"."""
    if isinstance(error, TimeoutError):
        return f"no connection within {timeout_s:.3g} s"
    if isinstance(error, BlockingIOError):
        return "the server does not take in what is sent"
    # asyncio replaces strerror by a text of its own. A negative errno is a failed name look-up.
    number = error.errno or 0
    words = os.strerror(number) if number > 0 else error.strerror
    text = words or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]


class Endpoint(NamedTuple):
    """Where a server listens."""

    host: str
    port: int
    scheme: str = ""
    """http, https, or empty if it was not given: then TLS is used if the client has settings of
    TLS."""

    def __str__(self) -> str:
        """Its name in messages and in `client.endpoint`: "127.0.0.1:2379", with https:// if TLS is
        used."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https://' if self.scheme == 'https' else ''}{host}:{self.port}"


def parse_endpoint(endpoint: str) -> Endpoint:
    """("127.0.0.1", 2379, "") from "127.0.0.1:2379"; the scheme may be http or https, an IPv6
    address is in brackets, and the port may be missing. Raises ValueError for anything else."""
    scheme, separator, rest = endpoint.strip().rstrip("/").rpartition("://")
    if "@" in rest:  # The endpoint is not shown: it may have a password.
        raise ValueError("an endpoint has no user: leave out all up to the @, and give user apart")
    if len(rest.replace(",", " ").split()) > 1:
        hint = "separate endpoints by commas; in Python give a list of them"
        raise ValueError(f"endpoint {endpoint!r}: {hint}")
    if separator and scheme not in ("http", "https"):
        raise ValueError(f"endpoint {endpoint!r}: write http:// or https://, not {scheme}://")
    if rest.startswith("["):
        host, _, port_text = rest[1:].partition("]")
        if port_text and not port_text.startswith(":"):
            raise ValueError(f"endpoint {endpoint!r}: expected [address]:port")
        port_text = port_text[1:]
    elif rest.count(":") > 1:
        raise ValueError(f"endpoint {endpoint!r}: write an IPv6 address in brackets")
    else:
        host, _, port_text = rest.partition(":")
    if not host or "/" in rest or "\0" in rest:
        raise ValueError(f"endpoint {endpoint!r}: expected host:port")
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError(f"endpoint {endpoint!r}: {host!r} is not a host name") from None
    if not port_text:
        return Endpoint(host, DEFAULT_PORT, scheme)
    if not (port_text.isascii() and port_text.isdigit() and 0 < int(port_text) < 65_536):
        raise ValueError(f"endpoint {endpoint!r}: {port_text!r} is not a port")
    return Endpoint(host, int(port_text), scheme)


def parse_endpoints(endpoints: str | Sequence[str]) -> tuple[Endpoint, ...]:
    """Parse one endpoint, or several. Raises ValueError."""
    given = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints)
    if not given:
        raise ValueError("at least one endpoint is needed")
    return tuple(map(parse_endpoint, given))


# The connection.


class Ticket:
    """One open request and its answer.

    The code that reads the socket calls `deliver` for each delivery, outside of any lock, and
    `lose` for each ticket that `ClientConnection.fail` returns. Subclasses keep more than one
    answer."""

    __slots__ = ("request_id", "method", "sent", "answer", "lost", "wake")

    def __init__(self, method: Any, wake: Callable[[], None] = lambda: None) -> None:
        self.method = method
        self.request_id = 0
        """0: not open."""
        self.sent = False
        """Whether bytes of it may have left this process."""
        self.answer: tuple[int, bytes] | None = None
        """The flags and the body of the reply; `unary_reply` makes a message of them."""
        self.lost = ""
        """Why the connection ended before the answer came; "" if it did not."""
        self.wake = wake
        """Called when the answer has come, or when none will come."""

    def deliver(self, flags: int, body: bytes) -> bool:
        """Take in a frame. False: cancel the request."""
        if self.answer is None:
            self.answer = flags, body
            self.wake()
        return True

    def lose(self, cause: str) -> None:
        """Record that the connection ended."""
        if self.answer is None:
            self.lost = cause
            self.wake()


Delivery = tuple[Ticket, int, bytes]


class ClientConnection:
    """The client's side of one connection; see the module's docstring."""

    def __init__(self) -> None:
        self.hello: Any = None
        """The server's Hello; None until it has come."""
        self.failure = ""
        """Why the connection is unusable; "" while it is usable."""
        self.silent_since_s: float | None = None
        """When the oldest cancel was sent since which the server has sent nothing."""
        self._open: dict[int, Ticket] = {}
        self._cancelled: set[int] = set()
        self._last_id = 0
        self._output: list[bytes] = [
            frames.HANDSHAKE.pack(frames.MAGIC, frames.PROTOCOL_VERSION, frames.PROTOCOL_VERSION)
        ]
        self._unsent: list[Ticket] = []
        self._greeting: bytearray | None = bytearray()
        self._frames = frames.FrameReader(MAX_REPLY_BYTES)

    def open_tickets(self) -> list[Ticket]:
        return list(self._open.values())

    def open(self, ticket: Ticket, body: bytes, *, end: bool) -> None:
        """Start a request. `end`: it has no further message.

        Raises RequestTooLarge (the server would drop the connection) and RequestTooManyRequests."""
        assert ticket.request_id == 0 and not self.failure
        if self.hello is not None and len(body) > self.hello.max_request_bytes > 0:
            raise errors.RequestTooLarge()
        if len(self._open) + len(self._cancelled) >= MAX_OPEN_REQUESTS:
            raise errors.RequestTooManyRequests()
        request_id = self._last_id
        while True:
            request_id = request_id + 1 & 0xFFFFFFFF or 1
            if request_id not in self._open and request_id not in self._cancelled:
                break
        self._last_id = ticket.request_id = request_id
        self._open[request_id] = ticket
        self._unsent.append(ticket)
        flags = frames.END if end else 0
        self._output.append(frames.frame(request_id, ticket.method.number, flags, body))

    def send(self, ticket: Ticket, body: bytes) -> None:
        """Queue a further message of a stream; do nothing if the stream has ended."""
        self._add(ticket, 0, body)

    def close_send(self, ticket: Ticket) -> None:
        """Tell the server that the stream gets no more messages."""
        self._add(ticket, frames.END, b"")

    def _add(self, ticket: Ticket, flags: int, body: bytes) -> None:
        if self._open.get(ticket.request_id) is ticket:
            self._output.append(frames.frame(ticket.request_id, ticket.method.number, flags, body))

    def cancel(self, ticket: Ticket, now_s: float) -> bool:
        """Give up a request. False if its end has been received already."""
        if self._open.get(ticket.request_id) is not ticket:
            return False
        self._add(ticket, frames.CANCEL, b"")
        del self._open[ticket.request_id]
        self._cancelled.add(ticket.request_id)
        if self.silent_since_s is None:
            self.silent_since_s = now_s
        return True

    def take_output(self) -> bytes:
        """Remove the bytes to send now; b"" if there are none."""
        if not self._output:
            return b""
        output = self._output[0] if len(self._output) == 1 else b"".join(self._output)
        self._output.clear()
        for ticket in self._unsent:
            ticket.sent = True
        self._unsent.clear()
        return output

    def receive(self, data: bytes) -> list[Delivery]:
        """Take in bytes from the server; b"" is the end of the connection.

        Check `failure` afterwards: if it is set, deliver what was returned, then call `fail`."""
        deliveries: list[Delivery] = []
        if not data:
            ended = "the server closed the connection"
            if self._greeting is not None and not self._greeting:
                ended += (
                    " before a greeting: it may be etcd, which speaks gRPC only, or want TLS "
                    "(https://), or have refused this address: its log says why"
                )
            elif self.hello is None:
                ended += " before its hello: it may be a port for peers"
            elif self.hello.cluster_version:
                ended += ": it is a port for the other members; use a client URL"
            self.failure = self.failure or ended
        if self.failure:
            return deliveries
        self.silent_since_s = None
        if self._greeting is not None:
            self._greeting += data
            data = self._greet(self._greeting)
        try:
            # Every reply passes here: a flat loop over local names.
            tickets = self._open
            self._frames.feed(data)
            for request_id, method, flags, body in self._frames:
                ticket = tickets.get(request_id)
                if ticket is not None and ticket.method.number == method:
                    if flags & frames.END:
                        del tickets[request_id]
                    elif not ticket.method.server_stream:
                        self.failure = f"{ticket.method.full}: a reply without an end"
                        break
                    deliveries.append((ticket, flags, body))
                elif request_id in self._cancelled:
                    if flags & frames.END:
                        self._cancelled.discard(request_id)
                elif request_id == 0:
                    self._about_connection(method, flags, body)
                else:
                    self.failure = f"a reply to request {request_id}, which is not open"
                if self.failure:
                    break
        except (frames.ProtocolError, proto.DecodeError) as error:
            self.failure = f"not the native protocol: {error}"
        return deliveries

    def _greet(self, greeting: bytearray) -> bytes:
        """Check as much of the server's 12 bytes as has come. Returns what follows them."""
        magic = frames.MAGIC
        if greeting[: len(magic)] != magic[: len(greeting)]:
            self.failure = "the server does not speak etcdlite's native protocol"
            if greeting.startswith(frames.SECRET_MAGIC[: len(greeting)]):
                self.failure = WANTS_SECRET
            elif greeting[:1] == b"\x15":  # An alert.
                self.failure = "the server speaks TLS: use https://, and name its CA as cacert"
            elif bytes(greeting[3:4]) == b"\x04" or greeting.startswith(b"HTTP/"):
                self.failure += ": it speaks gRPC or HTTP only, as etcd does"
            return b""
        if len(greeting) < frames.HANDSHAKE.size:
            return b""
        if frames.HANDSHAKE.unpack_from(greeting)[1] != frames.PROTOCOL_VERSION:
            self.failure = f"the server does not speak protocol version {frames.PROTOCOL_VERSION}"
            return b""
        self._greeting = None
        return bytes(greeting[frames.HANDSHAKE.size :])

    def _about_connection(self, method: int, flags: int, body: bytes) -> None:
        if flags & frames.ERROR:
            self.failure = f"the server closes the connection: {proto.Error.decode(body).message}"
        elif method == frames.HELLO and self.hello is None:
            self.hello = proto.Hello.decode(body)
        else:
            self.failure = "a frame with request id 0 that is not a hello"

    def fail(self, cause: str) -> list[Ticket]:
        """End the connection. Returns every open ticket, for the caller to call `lose` on."""
        self.failure = self.failure or cause
        lost = list(self._open.values())
        self._open.clear()
        self._cancelled.clear()
        self._output.clear()
        self._unsent.clear()
        return lost


def unary_reply(method: Any, flags: int, body: bytes, endpoint: str) -> Any:
    """Decode the answer of a request with one response. Raises the server's error instead."""
    body = reply_body(flags, body, endpoint)
    if method.server_stream and flags & frames.END:
        # A keep-alive stream ended without its answer: the server is going down.
        raise errors.Unavailable(
            text=f"{endpoint}: {method.full} ended without a reply", endpoint=endpoint
        )
    return decode_reply(method, body, endpoint)


def reply_body(flags: int, body: bytes, endpoint: str) -> bytes:
    """The message in a frame, encoded. Raises the server's error if the frame is an ERROR."""
    if flags & frames.ERROR:
        try:
            error = proto.Error.decode(body)
        except proto.DecodeError as fault:
            raise _garbled(endpoint, "an error", fault) from None
        raise errors.error_for(error.code, error.message, endpoint)
    return body


def decode_reply(method: Any, body: bytes, endpoint: str) -> Any:
    """Decode a response message. Raises ProtocolViolation if that fails."""
    try:
        return method.response.decode(body)
    except proto.DecodeError as fault:
        raise _garbled(endpoint, method.full, fault) from None


def _garbled(endpoint: str, what: str, fault: Exception) -> errors.ProtocolViolation:
    return errors.ProtocolViolation(
        text=f"{endpoint}: the reply to {what} cannot be decoded: {fault}", endpoint=endpoint
    )
