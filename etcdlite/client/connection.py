"""One client connection of the native protocol, sans-IO.

`Connection` turns requests into bytes to send and received bytes into deliveries. It owns no
socket, thread or clock (`socket` is imported for the names of its options): the blocking and the
asyncio client drive the same class. A request is represented by a `Ticket`, which gets its answer.

Life of a request: `open` gives it an id and queues its first frame; `take_output` hands the bytes
to the shell and marks their tickets as sent; `receive` returns (ticket, flags, body) for each frame
that came, until one with END closes it. `cancel` forgets the ticket at once; the id stays reserved
until the server's last frame for it has come.

Invariants:
- a ticket that `fail` returns with `sent` false has had no byte handed to the network: its request
  certainly was not carried out and may be sent again, whatever it is;
- each open ticket ends exactly once: by a delivery with END, by `cancel`, or in `fail`;
- nothing that a server sends raises: what breaks the protocol sets `failure`, and whatever was
  complete before it is still delivered;
- memory is bounded: by one reply of `MAX_REPLY_BYTES` and `MAX_OPEN_REQUESTS` requests.

What may be sent again when a connection breaks is decided here too (`is_read`), so that both
shells decide alike: a read always; a write only if it was not sent, because a server that received
it may have carried it out.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from etcdlite import frames, methods, proto
from etcdlite.client.errors import (
    ConnectionFailed,
    ProtocolViolation,
    RequestTooLarge,
    RequestTooManyRequests,
    Timeout,
    Unavailable,
    UnknownOutcome,
    error_for,
)
from etcdlite.methods import Retry

DEFAULT_ENDPOINT = "127.0.0.1:2379"
DEFAULT_PORT = 2379
DEFAULT_TIMEOUT_S = 5.0
DEFAULT_DIAL_TIMEOUT_S = 2.0

MAX_REPLY_BYTES = 1 << 30
"""The largest frame taken from a server: a range of everything can be large."""

MAX_OPEN_REQUESTS = 65_536
"""The server's limit on one connection."""

RECEIVE_BYTES = 256 * 1024
"""How much is read from a socket at once."""

KEEP_ALIVE_IDLE_S = 10
KEEP_ALIVE_INTERVAL_S = 5
KEEP_ALIVE_PROBES = 3
"""TCP keep-alive: a host that is gone is noticed after 25 seconds, even if nothing is sent."""

MAX_WATCH_QUEUE_BYTES = 4 * 1024 * 1024
MAX_WATCH_QUEUE_MESSAGES = 4096
"""A watch that has this much unread is cancelled, and taken up again once it has been read."""

PING_AFTER_S = 15.0
"""A watch to which nothing came for this long asks whether the server is still there."""

MIN_KEEP_ALIVE_INTERVAL_S = 0.1

LEASE_CHECK_INTERVAL_S = 1.0
"""How soon one who waits in line notices that his own lease is lost."""

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0
"""Waits between attempts (of watches, keep-alives, reads without a leader): doubling."""


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


class Broken(Exception):
    """The connection under a request is gone; never leaves the client.

    `sent` tells whether the server may have seen the request.
    """

    def __init__(self, endpoint: str, cause: str, sent: bool) -> None:
        super().__init__(endpoint, cause, sent)
        self.endpoint = endpoint
        self.cause = cause
        self.sent = sent


def is_read(method: str, request: Any) -> bool:
    """Whether carrying the request out twice is the same as once, so that it may be sent again."""
    retry = methods.METHOD_BY_NAME[method].retry
    return retry is Retry.ALWAYS or (retry is Retry.IF_READ and _CHANGES_NOTHING[method](request))


def _only_ranges(txn: Any) -> bool:
    return all(
        op.request_range is not None
        or (op.request_txn is not None and _only_ranges(op.request_txn))
        for branch in (txn.success, txn.failure)
        for op in branch
    )


_CHANGES_NOTHING: dict[str, Callable[[Any], bool]] = {
    "KV.Txn": _only_ranges,
    "Maintenance.Alarm": lambda request: request.action == proto.AlarmRequest.GET,
}
assert _CHANGES_NOTHING.keys() == {m.full for m in methods.ROWS if m.retry is Retry.IF_READ}


def after_break(broken: Broken, method: str, resend: bool, attempts_left: int) -> None:
    """Return if a request whose connection broke is to be sent again; else raise why not."""
    if broken.sent and not resend:
        raise UnknownOutcome(
            text=f"{broken.endpoint}: {method} was sent but not answered: {broken.cause}",
            endpoint=broken.endpoint,
        )
    if attempts_left <= 0:
        raise broken_error(broken.endpoint, broken.cause)


def broken_error(endpoint: str, cause: str) -> ConnectionFailed:
    return ConnectionFailed(text=f"{endpoint}: {cause}", endpoint=endpoint)


def timeout_error(endpoint: str, method: str, timeout_s: float) -> Timeout:
    return Timeout(
        text=f"{endpoint}: {method} was not answered within {timeout_s:g} s", endpoint=endpoint
    )


def silence(seconds: float) -> str:
    """Why a connection is given up whose server lets a cancel and a ping pass in silence."""
    return f"the server has been silent for {seconds:g} s"


def connect_error(causes: dict[str, str]) -> ConnectionFailed:
    """The error that says why each endpoint could not be reached."""
    return ConnectionFailed(
        text="; ".join(f"{endpoint}: {cause}" for endpoint, cause in causes.items()),
        endpoint=next(reversed(causes), ""),
    )


def cause_of(error: OSError, timeout_s: float) -> str:
    """An OSError in words for people: "connection refused"."""
    if isinstance(error, TimeoutError):
        return f"no connection within {timeout_s:g} s"
    if isinstance(error, BlockingIOError):
        return "the server does not take in what is sent"
    # asyncio puts words of its own into strerror; a negative number is a name that was not found.
    number = error.errno or 0
    words = os.strerror(number) if number > 0 else error.strerror
    text = words or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """("127.0.0.1", 2379) from "127.0.0.1:2379", "http://127.0.0.1:2379", "[::1]:2379" or "host".

    Raises ValueError for anything else, TLS included.
    """
    rest = endpoint.strip().rstrip("/")
    scheme, separator, tail = rest.partition("://")
    if separator:
        if scheme == "https":
            raise ValueError(f"endpoint {endpoint!r}: TLS is not supported")
        if scheme != "http":
            raise ValueError(f"endpoint {endpoint!r}: unknown scheme {scheme!r}")
        rest = tail
    if rest.startswith("["):
        host, _, port_text = rest[1:].partition("]")
        if port_text and not port_text.startswith(":"):
            raise ValueError(f"endpoint {endpoint!r}: expected [address]:port")
        port_text = port_text[1:]
    elif rest.count(":") > 1:
        raise ValueError(f"endpoint {endpoint!r}: an IPv6 address stands in brackets")
    else:
        host, _, port_text = rest.partition(":")
    if not host or "/" in rest:
        raise ValueError(f"endpoint {endpoint!r}: expected host:port")
    if not port_text:
        return host, DEFAULT_PORT
    if not (port_text.isascii() and port_text.isdigit() and 0 < int(port_text) < 65_536):
        raise ValueError(f"endpoint {endpoint!r}: {port_text!r} is not a port")
    return host, int(port_text)


def format_endpoint(host: str, port: int) -> str:
    """ "127.0.0.1:2379": how messages and `client.endpoint` name a server."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_endpoints(endpoints: str | Sequence[str]) -> tuple[tuple[str, int], ...]:
    """What a client was given, a single one or several. Raises ValueError."""
    given = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints)
    if not given:
        raise ValueError("at least one endpoint is needed")
    return tuple(map(parse_endpoint, given))


def keep_tcp_alive(sock: socket.socket) -> None:
    """Let the kernel find out that the server's host is gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_ALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEP_ALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEP_ALIVE_PROBES)


class LeaseClock:
    """Until when a lease certainly lives, seen from its holder.

    The server counts a lease's time from when it handles the request; here it is counted from
    before the request is sent, so this clock runs out first. Once lost, a lease stays lost, even
    if a late answer says that it was renewed: its holder may have acted on the loss.
    """

    def __init__(self, asked_at_s: float, ttl_s: float) -> None:
        self._ends_at_s = asked_at_s + ttl_s
        self._lost = False

    def renew(self, asked_at_s: float, ttl_s: float, now_s: float) -> None:
        """The server, asked at that moment, has renewed it."""
        if not self.lost(now_s):
            self._ends_at_s = asked_at_s + ttl_s

    def end(self) -> None:
        self._lost = True

    def lost(self, now_s: float) -> bool:
        if now_s >= self._ends_at_s:
            self._lost = True
        return self._lost


# The connection.


class Ticket:
    """One open request and the answer to it.

    The connection hands out what it receives as deliveries; whoever reads the socket calls
    `deliver` for each, outside of any lock, and `lose` for what `Connection.fail` returns.
    Subclasses keep more than one answer.
    """

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
        """Called when there is an answer, or will be none."""

    def deliver(self, flags: int, body: bytes) -> bool:
        """Take in a frame. False: cancel the request."""
        if self.answer is None:
            self.answer = flags, body
            self.wake()
        return True

    def lose(self, cause: str) -> None:
        """Take note that the connection ended."""
        if self.answer is None:
            self.lost = cause
            self.wake()


class WatchTicket(Ticket):
    """The open stream of a watch: what was received and not read yet, within limits.

    `deliver` and `lose` may run in one thread while `take` runs in another: each counter and flag
    has one writer, and a deque needs no lock. When the queue is full the stream is cancelled and
    later messages are dropped, so the queue is always a gapless beginning of the stream; its reader
    opens a new one behind it.
    """

    __slots__ = ("over", "_queue", "_received_bytes", "_taken_bytes")

    def __init__(self, method: Any, wake: Callable[[], None]) -> None:
        super().__init__(method, wake)
        self.over = False
        """Nothing will be added to the queue any more."""
        self._queue: deque[tuple[int, bytes]] = deque()
        self._received_bytes = 0
        self._taken_bytes = 0

    def deliver(self, flags: int, body: bytes) -> bool:
        if self.over:
            return True
        waiting_bytes = self._received_bytes - self._taken_bytes
        if len(self._queue) >= MAX_WATCH_QUEUE_MESSAGES or (
            self._queue and waiting_bytes + len(body) > MAX_WATCH_QUEUE_BYTES
        ):
            self.over = True
        else:
            self._queue.append((flags, body))
            self._received_bytes += len(body)
            if flags & frames.END:
                self.over = True
        self.wake()
        return bool(flags & frames.END) or not self.over

    def lose(self, cause: str) -> None:
        self.lost = cause
        self.over = True
        self.wake()

    @property
    def ready(self) -> bool:
        """Whether there is something to take, or there will be nothing more."""
        return bool(self._queue) or self.over

    def take(self) -> tuple[int, bytes] | None:
        """The next (flags, body), or None if there is none now."""
        if not self._queue:
            return None
        item = self._queue.popleft()
        self._taken_bytes += len(item[1])
        return item


Delivery = tuple[Ticket, int, bytes]


class Connection:
    """The client's side of one connection; see the module's docstring."""

    def __init__(self) -> None:
        self.hello: Any = None
        """The server's Hello; None until it has come."""
        self.failure = ""
        """Why the connection is unusable; "" while it is usable."""
        self.silent_since_s: float | None = None
        """When the first cancel was sent that the server has let pass without sending anything."""
        self._open: dict[int, Ticket] = {}
        self._cancelled: set[int] = set()
        self._last_id = 0
        self._output: list[bytes] = [
            frames.HANDSHAKE.pack(frames.MAGIC, frames.PROTOCOL_VERSION, frames.PROTOCOL_VERSION)
        ]
        self._unsent: list[Ticket] = []
        self._greeting: bytearray | None = bytearray()
        self._frames = frames.FrameReader(MAX_REPLY_BYTES)

    @property
    def open_count(self) -> int:
        return len(self._open)

    def open(self, ticket: Ticket, body: bytes, *, end: bool) -> None:
        """Begin a request. `end`: no further message will follow on it.

        Raises RequestTooLarge (the server would drop the connection) and RequestTooManyRequests.
        """
        assert ticket.request_id == 0 and not self.failure
        if self.hello is not None and len(body) > self.hello.max_request_bytes > 0:
            raise RequestTooLarge()
        if len(self._open) + len(self._cancelled) >= MAX_OPEN_REQUESTS:
            raise RequestTooManyRequests()
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
        """A further message of a stream; nothing if it has ended."""
        self._add(ticket, 0, body)

    def close_send(self, ticket: Ticket) -> None:
        """No more messages will be sent on the stream."""
        self._add(ticket, frames.END, b"")

    def _add(self, ticket: Ticket, flags: int, body: bytes) -> None:
        if self._open.get(ticket.request_id) is ticket:
            frame = frames.frame(ticket.request_id, ticket.method.number, flags, body)
            self._output.append(frame)

    def cancel(self, ticket: Ticket, now_s: float) -> bool:
        """Give a request up. False if its end was received already."""
        if self._open.get(ticket.request_id) is not ticket:
            return False
        del self._open[ticket.request_id]
        self._cancelled.add(ticket.request_id)
        self._output.append(
            frames.frame(ticket.request_id, ticket.method.number, frames.CANCEL, b"")
        )
        if self.silent_since_s is None:
            self.silent_since_s = now_s
        return True

    def take_output(self) -> bytes:
        """The bytes to send now; b"" if there are none."""
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

        Check `failure` afterwards: if it is set, hand out what was returned, then call `fail`.
        """
        deliveries: list[Delivery] = []
        if not data:
            self.failure = self.failure or "the server closed the connection"
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
        """Check the server's 12 bytes as far as they have come; gives what follows them."""
        magic = frames.MAGIC
        if greeting[: len(magic)] != magic[: len(greeting)]:
            self.failure = "the server does not speak etcdlite's native protocol"
            return b""
        if len(greeting) < frames.HANDSHAKE.size:
            return b""
        version = frames.HANDSHAKE.unpack_from(greeting)[1]
        if version != frames.PROTOCOL_VERSION:
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
            self.failure = "a frame with request id 0 that is no hello"

    def fail(self, cause: str) -> list[Ticket]:
        """The connection is over: every open ticket, for the shell to call `lose` on."""
        self.failure = self.failure or cause
        lost = list(self._open.values())
        self._open.clear()
        self._cancelled.clear()
        self._output.clear()
        self._unsent.clear()
        return lost


def unary_reply(method: Any, flags: int, body: bytes, endpoint: str) -> Any:
    """The response message of a request that takes one. Raises the server's error instead."""
    body = reply_body(flags, body, endpoint)
    if method.server_stream and flags & frames.END:
        # The stream of a keep-alive ended without its answer: the server is going down.
        raise Unavailable(
            text=f"{endpoint}: {method.full} ended without a reply", endpoint=endpoint
        )
    return decode_reply(method, body, endpoint)


def reply_body(flags: int, body: bytes, endpoint: str) -> bytes:
    """The message bytes of a frame. Raises the server's answer if the frame is an ERROR."""
    if flags & frames.ERROR:
        try:
            error = proto.Error.decode(body)
        except proto.DecodeError as fault:
            raise garbled(endpoint, "an error", fault) from None
        raise error_for(error.code, error.message, endpoint)
    return body


def decode_reply(method: Any, body: bytes, endpoint: str) -> Any:
    """The response message. Raises ProtocolViolation if the bytes are none."""
    try:
        return method.response.decode(body)
    except proto.DecodeError as fault:
        raise garbled(endpoint, method.full, fault) from None


def garbled(endpoint: str, what: str, fault: Exception) -> ProtocolViolation:
    return ProtocolViolation(
        text=f"{endpoint}: the reply to {what} cannot be read: {fault}", endpoint=endpoint
    )
