"""A connection in use: a `Link` is a sans-IO `ClientConnection`, with a lock, and bytes that move.

The shells subclass it with a socket and a reader thread (`blocking.py`), or with an asyncio
transport (`aio.py`). The scripts talk to this class alone. Any thread may call any method; tickets
are woken outside of the lock. In asyncio the lock is never contended.

Here too are the tickets that keep more than one frame. Memory for what is received and not read is
bounded, in two ways: a watch is cancelled and resumed later, because it shares its connection with
calls; a stream has a connection of its own, and stops reading from it.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from math import inf
from threading import Lock
from time import monotonic
from typing import Any, Protocol

from etcdlite import frames
from etcdlite.channel import Channel, ChannelError
from etcdlite.client.connection import ClientConnection, Delivery, Endpoint, Ticket

MAX_WATCH_QUEUE_BYTES = 4 * 1024 * 1024
MAX_WATCH_QUEUE_MESSAGES = 4096
"""A watch with this much unread is cancelled, and resumed once that has been read."""

MAX_STREAM_QUEUE_BYTES = 1024 * 1024
"""A stream with this much unread stops reading from its connection."""

KEEP_ALIVE_IDLE_S = 10
KEEP_ALIVE_INTERVAL_S = 5
KEEP_ALIVE_PROBES = 3
"""TCP keep-alive: a dead host is noticed after 25 seconds, even if nothing is sent."""


class Broken(Exception):
    """The connection under a request is gone; never leaves the client.

    `sent` tells whether the server may have seen the request."""

    def __init__(self, endpoint: str, cause: str, sent: bool) -> None:
        super().__init__(endpoint, cause, sent)
        self.endpoint = endpoint
        self.cause = cause
        self.sent = sent


class Signal(Protocol):
    """A binary semaphore: each `set` ends one wait, the next one if nothing waits now.

    Setting it twice is the same as once. For a signal with several waiters, each sets it again for
    the next one."""

    def set(self) -> None: ...


class Link:
    """One connection, shared by all threads or tasks of a client."""

    def __init__(self, endpoint: str, silence_s: float, drained: Signal) -> None:
        self.endpoint = endpoint
        self.connection = ClientConnection()
        self.channel: Channel | None = None
        """What encrypts the connection; None: it is plain. Set once it is established."""
        self.drained = drained
        """Set when `is_congested` may have become false."""
        self.is_congested = False
        """Whether to wait before sending more."""
        self._silence_s = silence_s
        self._woken_for_s: float | None = None
        """The `silent_since_s` of which the requests know."""
        self._lock = Lock()
        """Guards the connection."""

    # What a shell implements.

    def flush(self) -> None:
        """Send what is queued, now or soon."""
        raise NotImplementedError

    def abort(self) -> None:
        """End the network connection."""
        raise NotImplementedError

    def pause_reading(self) -> None:
        raise NotImplementedError

    def resume_reading(self) -> None:
        raise NotImplementedError

    # What the shells and the scripts call.

    @property
    def failure(self) -> str:
        """Why the connection is unusable; "" while it is usable."""
        return self.connection.failure

    def usable(self) -> bool:
        """Whether requests may be sent. Closes the link if its server has gone silent."""
        silent_since_s = self.connection.silent_since_s
        if silent_since_s is not None and monotonic() >= silent_since_s + self._silence_s:
            self.close_silent()
        return not self.connection.failure

    def wait_limit_s(self, deadline_s: float) -> float:
        """When a request that waits until `deadline_s` has to look at `usable`."""
        silent_since_s = self.connection.silent_since_s
        if silent_since_s is None:
            return deadline_s
        return min(deadline_s, silent_since_s + self._silence_s)

    def open(self, ticket: Ticket, body: bytes, *, end: bool) -> None:
        """Start a request. Raises Broken, RequestTooLarge and RequestTooManyRequests."""
        with self._lock:
            if self.connection.failure:
                raise Broken(self.endpoint, self.connection.failure, False)
            self.connection.open(ticket, body, end=end)
        self.flush()

    def send(self, ticket: Ticket, body: bytes) -> None:
        """Send a message of a stream, which the first message opens. Raises as `open` does."""
        with self._lock:
            if self.connection.failure:
                raise Broken(self.endpoint, self.connection.failure, ticket.sent)
            if ticket.request_id == 0:
                self.connection.open(ticket, body, end=False)
            else:
                self.connection.send(ticket, body)
        self.flush()

    def close_send(self, ticket: Ticket) -> None:
        with self._lock:
            self.connection.close_send(ticket)
        self.flush()

    def cancel(self, ticket: Ticket) -> bool:
        """Give up a request. False if it had ended."""
        with self._lock:
            cancelled = self.connection.cancel(ticket, monotonic())
        if cancelled:
            self.flush()
        return cancelled

    def expire(self, ticket: Ticket) -> bool:
        """Cancel a request because its time is over. False if it had ended."""
        if is_open := self.cancel(ticket):
            self._wake_all()
        return is_open

    def suspect(self) -> None:
        """The time of a request was over before it could be sent: the server has to send something
        within the time for an answer to a cancel."""
        with self._lock:
            self.connection.silent_since_s = self.connection.silent_since_s or monotonic()
        self._wake_all()

    def _wake_all(self) -> None:
        """After one timeout, the other requests do not wait for theirs on a dead server: they look
        at `wait_limit_s` again, once for each silence."""
        before_s, self._woken_for_s = self._woken_for_s, self.connection.silent_since_s
        if self._woken_for_s != before_s:
            for ticket in self.connection.open_tickets():
                ticket.wake()

    def receive(self, data: bytes) -> str:
        """Take in bytes, b"" at the end, and wake the tickets. Returns `failure`."""
        with self._lock:
            if self.channel is None:
                deliveries = self.connection.receive(data)
            else:
                deliveries = self.receive_sealed(self.channel, data)
        for ticket, flags, body in deliveries:
            if not ticket.deliver(flags, body):
                self.cancel(ticket)
        return self.connection.failure

    def receive_sealed(self, channel: Channel, data: bytes) -> list[Delivery]:
        """As `ClientConnection.receive`. The channel's failure becomes the connection's, too."""
        connection = self.connection
        try:
            plaintext = channel.receive(data)
        except ChannelError as error:
            connection.failure = connection.failure or str(error)
            return []
        return connection.receive(plaintext) if plaintext or not data else []

    def take_sealed(self, channel: Channel) -> bytes:
        """As `ClientConnection.take_output`, with what the channel itself has to send."""
        output = self.connection.take_output()
        try:
            return channel.seal(output) if output or channel.has_output else b""
        except ChannelError as error:
            raise ConnectionError(str(error)) from error

    def close(self, cause: str) -> None:
        """End the connection and lose every open request."""
        with self._lock:
            tickets = self.connection.fail(cause)
        self.abort()
        self.drained.set()
        for ticket in tickets:
            ticket.lose(self.connection.failure)

    def close_silent(self) -> None:
        """Close because the server let a cancel or a ping pass in silence."""
        self.close(f"the server has been silent for {self._silence_s:g} s")


def connect(server: Endpoint, timeout_s: float) -> socket.socket:
    """Connect to an address of the host; all of them have `timeout_s` together. Raises OSError."""
    addresses = socket.getaddrinfo(*server[:2], type=socket.SOCK_STREAM)
    sock = socket.create_connection(server[:2], timeout_s / len(addresses))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_tcp_alive(sock)
    return sock


def keep_tcp_alive(sock: socket.socket) -> None:
    """Let the kernel find out when the server's host is gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_ALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEP_ALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEP_ALIVE_PROBES)


class _QueueTicket(Ticket):
    """A request with many answers: the frames received and not yet read.

    `deliver` and `lose` may run in one thread while `take` runs in another: each counter and flag
    has one writer, and a deque needs no lock."""

    __slots__ = ("over", "_queue", "_received_bytes", "_taken_bytes")

    def __init__(self, method: Any, wake: Callable[[], None]) -> None:
        super().__init__(method, wake)
        self.over = False
        """The queue is complete: nothing more will be added."""
        self._queue: deque[tuple[int, bytes]] = deque()
        self._received_bytes = 0
        self._taken_bytes = 0

    def _add(self, flags: int, body: bytes) -> None:
        self._queue.append((flags, body))
        self._received_bytes += len(body) + frames.FRAME_HEADER_BYTES
        if flags & frames.END:
            self.over = True

    def lose(self, cause: str) -> None:
        self.lost = cause
        self.over = True
        self.wake()

    def take(self) -> tuple[int, bytes] | None:
        """Remove the next frame, (flags, body); None if none is there."""
        if not self._queue:
            return None
        item = self._queue.popleft()
        self._taken_bytes += len(item[1]) + frames.FRAME_HEADER_BYTES
        return item


class WatchTicket(_QueueTicket):
    """The open stream of a watch.

    When the queue is full, the stream is cancelled and later frames are dropped. So the queue
    always holds a gapless beginning of the stream, and its reader opens a new stream behind it."""

    __slots__ = ()

    def deliver(self, flags: int, body: bytes) -> bool:
        if self.over:
            return True
        waiting_bytes = self._received_bytes - self._taken_bytes
        if len(self._queue) >= MAX_WATCH_QUEUE_MESSAGES or (
            self._queue and waiting_bytes + len(body) > MAX_WATCH_QUEUE_BYTES
        ):
            self.over = True
        else:
            self._add(flags, body)
        self.wake()
        return bool(flags & frames.END) or not self.over


class StreamTicket(_QueueTicket):
    """A stream of the low level. When the queue is full, its link stops reading."""

    __slots__ = ("_link",)

    def __init__(self, method: Any, wake: Callable[[], None], link: Link) -> None:
        super().__init__(method, wake)
        self._link = link

    def deliver(self, flags: int, body: bytes) -> bool:
        self._add(flags, body)
        if self._received_bytes - self._taken_bytes > MAX_STREAM_QUEUE_BYTES:
            # The reader resumes when it finds the queue empty; it is woken behind this.
            self._link.pause_reading()
        self.wake()
        return True


NEVER_S = inf
"""A deadline that does not come."""
