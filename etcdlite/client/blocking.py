"""The Python client: `Client` for threads, `AsyncClient` for asyncio, over one sans-IO core.

    with Client("127.0.0.1:2379") as client:
        client.put("greeting", "hello")
        client.get("greeting").value                  # b"hello"
        for event in client.watch(prefix="config/"):
            ...
        with client.lock("job", ttl=10):
            ...

docs/python-client.md is the guide. The parts: `connection.py` is the connection,
`errors.py` what can go wrong, `operations.py` requests and results, `scripts.py` locks and
elections, `aio.py` the asyncio shell; this file is the blocking shell and the place to
import everything from.

Any number of threads share one `Client`. It has one connection, to one of its endpoints: each call
queues its frame, whoever finds nobody sending sends all that is queued, and a reader thread hands
the replies to the threads that wait. Streams of the low level (`Client.stream`) have a connection
each, read by the thread that iterates, so that TCP slows down a server whose stream nobody reads.

Invariants:
- a write is sent once: if its connection breaks after that, the caller gets `UnknownOutcome`;
- a call waits no longer than its timeout, whatever the server does;
- what is received and not read is bounded: for a watch by the limits of `WatchTicket`;
- the reader thread never runs code of the caller.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from types import TracebackType
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar

from etcdlite import frames, methods, proto
from etcdlite.client import operations as calls
from etcdlite.client import recipes
from etcdlite.client.connection import (
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    DEFAULT_DIAL_TIMEOUT_S,
    DEFAULT_ENDPOINT,
    DEFAULT_TIMEOUT_S,
    LEASE_CHECK_INTERVAL_S,
    MIN_KEEP_ALIVE_INTERVAL_S,
    PING,
    PING_AFTER_S,
    RECEIVE_BYTES,
    Broken,
    Connection,
    Delivery,
    LeaseClock,
    Ticket,
    WatchTicket,
    after_break,
    broken_error,
    cause_of,
    connect_error,
    decode_reply,
    format_endpoint,
    is_read,
    keep_tcp_alive,
    parse_endpoints,
    reply_body,
    silence,
    timeout_error,
    unary_reply,
)
from etcdlite.client.errors import (
    Closed,
    ConnectionFailed,
    EtcdliteError,
    LeaseLost,
    LeaseNotFound,
    Timeout,
    Unavailable,
    UnknownOutcome,
)
from etcdlite.client.operations import (
    Bytes,
    Comparison,
    Event,
    KeyValue,
    Op,
    WatchBatch,
    WatchCursor,
)

__all__ = [
    "Client",
    "Stream",
    "Watch",
    "Lease",
    "Lock",
    "Election",
    "Leadership",
]

P = ParamSpec("P")
T = TypeVar("T")


def _operation(build: Callable[P, Op[T]]) -> Callable[Concatenate[Any, P], T]:
    """The method of `Client` that performs what `build` builds."""

    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.perform(build(*args, **kwargs))

    return calls.as_method(method, build)


class Client:
    """A blocking client of one cluster, for any number of threads.

    `endpoints`: one or several of "127.0.0.1:2379" or "http://127.0.0.1:2379". It connects at the
    first call, to the first endpoint that accepts, and goes round to the next when a connection
    cannot be made or breaks. A read is then sent again. A write is only if it certainly had not
    been sent; otherwise it raises UnknownOutcome.

    `timeout_s` is how long a call may take, unless it says otherwise; `dial_timeout_s` how long
    connecting to one endpoint may take, and how long a server may stay silent after a call has
    timed out. Raises ValueError for an endpoint that cannot be understood.

    Every call may raise ConnectionFailed, Timeout, UnknownOutcome (writes), ProtocolViolation,
    Closed, and what the server answers, all of them EtcdliteErrors.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str] = (DEFAULT_ENDPOINT,),
        timeout_s: float = DEFAULT_TIMEOUT_S,
        dial_timeout_s: float = DEFAULT_DIAL_TIMEOUT_S,
    ) -> None:
        self._endpoints = parse_endpoints(endpoints)
        self.timeout_s = timeout_s
        self.dial_timeout_s = dial_timeout_s
        self._next_endpoint = 0
        self._connection: _Connection | None = None
        self._connect_lock = threading.Lock()
        self._failed_at_s = -1.0
        self._failure_causes: dict[str, str] = {}
        self._closed = threading.Event()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Calls that wait, and later ones, raise Closed."""
        self._closed.set()
        with self._connect_lock:
            connection = self._connection
        if connection is not None:
            connection.close(Closed.text)

    @property
    def endpoint(self) -> str:
        """The server in use ("127.0.0.1:2379"); the next one to be tried if there is none."""
        connection = self._connection
        if connection is not None and not connection.core.failure:
            return connection.endpoint
        return format_endpoint(*self._endpoints[self._next_endpoint])

    put = _operation(calls.put)
    get = _operation(calls.get)
    range = _operation(calls.range_)
    delete = _operation(calls.delete)
    txn = _operation(calls.txn)
    compact = _operation(calls.compact)
    lease_grant = _operation(calls.lease_grant)
    lease_revoke = _operation(calls.lease_revoke)
    lease_keep_alive_once = _operation(calls.lease_keep_alive_once)
    lease_time_to_live = _operation(calls.lease_time_to_live)
    leases = _operation(calls.leases)
    status = _operation(calls.status)
    alarms = _operation(calls.alarms)
    disarm = _operation(calls.disarm)
    defragment = _operation(calls.defragment)
    hash_kv = _operation(calls.hash_kv)
    move_leader = _operation(calls.move_leader)
    members = _operation(calls.members)
    member_add = _operation(calls.member_add)
    member_remove = _operation(calls.member_remove)
    member_update = _operation(calls.member_update)
    member_promote = _operation(calls.member_promote)

    def watch(
        self,
        key: Bytes | None = None,
        *,
        range_end: Bytes | None = None,
        prefix: Bytes | None = None,
        start_revision: int = 0,
        prev_kv: bool = False,
        no_put: bool = False,
        no_delete: bool = False,
        progress_notify: bool = False,
        timeout_s: float | None = None,
    ) -> Watch:
        """Watch keys, from `start_revision` (0: from now) on.

        When this returns, the server has the watch: no later change will be missed.
        `progress_notify` asks for a progress mark now and then while nothing changes.
        `timeout_s` is for setting the watch up; the iteration waits as long as it takes.
        """
        cursor = WatchCursor(
            key,
            range_end=range_end,
            prefix=prefix,
            start_revision=start_revision,
            prev_kv=prev_kv,
            no_put=no_put,
            no_delete=no_delete,
            progress_notify=progress_notify,
        )
        return Watch(self, cursor, timeout_s)

    def lease(self, ttl: int, *, id: int = 0) -> Lease:
        """A lease of `ttl` seconds, kept alive inside `with`, revoked at its end."""
        return Lease(self, ttl, id)

    def lock(self, name: Bytes, *, ttl: int = 10, timeout_s: float | None = None) -> Lock:
        """The lock `name`, held inside `with`.

        If the holder dies, it is free `ttl` seconds later. `timeout_s` bounds the wait for it
        (None: forever; 0: take it now or not at all).
        """
        return Lock(self, name, ttl, timeout_s)

    def election(self, name: Bytes, *, ttl: int = 10) -> Election:
        """The election `name`. If the leader dies, the next one leads `ttl` seconds later."""
        return Election(self, name, ttl)

    def snapshot(self, file: str | os.PathLike[str] | BinaryIO) -> int:
        """Save a backup of the member's whole state; gives its size in bytes.

        A path appears, or is replaced, when the backup is complete and synced; until then it is
        written beside it with ".part" added. A file object is written to and neither synced nor
        closed.
        """
        if not isinstance(file, (str, os.PathLike)):
            return self._copy_snapshot(file)
        path = os.fspath(file)
        with calls.PartialFile(path) as partial:
            return self._copy_snapshot(partial)

    def _copy_snapshot(self, file: BinaryIO) -> int:
        size_bytes = 0
        with self.stream("Maintenance.Snapshot", proto.SnapshotRequest()) as stream:
            for response in stream:
                file.write(response.blob)
                size_bytes += len(response.blob)
        return size_bytes

    def perform(self, op: Op[T]) -> T:
        """Send a prepared operation, such as `Put("k", "v")`."""
        response = self.call(
            op.method, op.request, timeout_s=op.timeout_s, repeatable=op.repeatable
        )
        return op.result(response)

    # The low level: messages in, messages out.

    def call(
        self,
        method: str,
        request: Any,
        *,
        timeout_s: float | None = None,
        repeatable: bool = False,
    ) -> Any:
        """Send one message to a method ("KV.Put") and give the one message it answers with.

        `repeatable`: carrying it out twice is the same as once, so it may be sent again.
        """
        rpc = methods.METHOD_BY_NAME[method]
        body = request.encode()
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline_s = monotonic() + timeout_s
        resend = repeatable or is_read(method, request)
        attempts_left = len(self._endpoints)
        backoff_s = BACKOFF_FIRST_S
        while True:
            connection = self._connected(deadline_s, method, timeout_s)
            try:
                flags, reply = connection.exchange(rpc, body, deadline_s, timeout_s)
                return unary_reply(rpc, flags, reply, connection.endpoint)
            except Broken as broken:
                after_break(broken, method, resend, attempts_left)
                attempts_left -= 1
            except Unavailable:
                if not resend or monotonic() + backoff_s >= deadline_s:
                    raise
                self._closed.wait(backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    def stream(self, method: str, first: Any = None, *, timeout_s: float | None = None) -> Stream:
        """Open a stream ("Watch.Watch") on a connection of its own.

        With `first` that message is sent, and nothing more will be. `timeout_s` bounds the wait
        for each message (None: forever). A stream is not resumed when its connection breaks.
        """
        rpc = methods.METHOD_BY_NAME[method]
        deadline_s = monotonic() + self.timeout_s
        with self._connect_lock:
            endpoint, sock, core = self._dial(deadline_s)
        return Stream(rpc, endpoint, sock, core, first, timeout_s)

    # Connecting.

    def _connected(self, deadline_s: float, method: str, timeout_s: float) -> _Connection:
        """The connection, made anew if need be. Raises ConnectionFailed, Timeout and Closed."""
        connection = self._connection
        if connection is not None and connection.usable():
            return connection
        asked_at_s = monotonic()
        if not self._connect_lock.acquire(timeout=max(0.0, _waitable(deadline_s - asked_at_s))):
            raise timeout_error(self.endpoint, method, timeout_s)
        try:
            connection = self._connection
            if connection is not None and not connection.core.failure:
                return connection
            if connection is not None:
                self._connection = None
                self._next_endpoint = (self._next_endpoint + 1) % len(self._endpoints)
            if self._failed_at_s > asked_at_s:
                # Somebody else tried every endpoint while this call waited for the lock.
                raise connect_error(self._failure_causes)
            self._connection = _Connection(*self._dial(deadline_s), self.dial_timeout_s)
            return self._connection
        finally:
            self._connect_lock.release()

    def _dial(self, deadline_s: float) -> tuple[str, socket.socket, Connection]:
        """Try each endpoint once, beginning with the next one."""
        causes: dict[str, str] = {}
        for _ in self._endpoints:
            if self._closed.is_set():
                raise Closed()
            host, port = self._endpoints[self._next_endpoint]
            endpoint = format_endpoint(host, port)
            limit_s = min(self.dial_timeout_s, max(0.001, deadline_s - monotonic()))
            try:
                sock, core = _dial(host, port, limit_s)
                # Reading waits as long as it takes; what the server does not take in ends it.
                seconds, rest = divmod(max(0.001, self.dial_timeout_s), 1)
                send_timeout = struct.pack("ll", int(seconds), int(rest * 1e6))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, send_timeout)
                return endpoint, sock, core
            except OSError as error:
                causes[endpoint] = cause_of(error, limit_s)
                self._next_endpoint = (self._next_endpoint + 1) % len(self._endpoints)
        self._failed_at_s = monotonic()
        self._failure_causes = causes
        raise connect_error(causes)

    def _run(
        self,
        script: recipes.Script[T],
        deadline_s: float | None = None,
        lease: Lease | None = None,
    ) -> T:
        """Run a recipe to its end; its waiting ends at the deadline, or with the lease."""
        try:
            step = next(script)
            while True:
                try:
                    outcome = self._do(step, deadline_s, lease)
                except EtcdliteError as error:
                    step = script.throw(error)
                else:
                    step = script.send(outcome)
        except StopIteration as stop:
            return stop.value

    def _do(self, step: Any, deadline_s: float | None, lease: Lease | None) -> Any:
        if isinstance(step, Op):
            return self.perform(step)
        with self.watch(**step.arguments()) as watch:
            while True:
                limit_s = LEASE_CHECK_INTERVAL_S if lease is not None else None
                if deadline_s is not None:
                    left_s = max(0.0, deadline_s - monotonic())
                    limit_s = left_s if limit_s is None else min(limit_s, left_s)
                try:
                    return watch.next_event(timeout_s=limit_s)
                except Timeout:
                    if lease is not None and lease.lost:
                        raise LeaseLost() from None
                    if deadline_s is not None and monotonic() >= deadline_s:
                        raise step.timeout(self.endpoint) from None


def _waitable(seconds: float) -> float:
    """`seconds` as the waits of `threading` take it."""
    return min(seconds, threading.TIMEOUT_MAX)


def _dial(host: str, port: int, timeout_s: float) -> tuple[socket.socket, Connection]:
    """Connect and wait for the server's hello. Raises OSError."""
    deadline_s = monotonic() + timeout_s
    sock = socket.create_connection((host, port), timeout_s)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_tcp_alive(sock)
        core = Connection()
        sock.sendall(core.take_output())
        while core.hello is None:
            left_s = deadline_s - monotonic()
            if left_s <= 0:
                raise TimeoutError
            sock.settimeout(left_s)
            core.receive(sock.recv(RECEIVE_BYTES))
            if core.failure:
                raise ConnectionError(core.failure)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock, core


class _CallTicket(Ticket):
    """A request with one reply, and the lock that its thread waits on (the cheapest there is)."""

    __slots__ = ("flags", "body", "_answered")

    def __init__(self, method: Any) -> None:
        super().__init__(method)
        self.flags = 0
        self.body: bytes | None = None
        self.lost = ""
        self._answered = threading.Lock()
        self._answered.acquire()

    def deliver(self, flags: int, body: bytes) -> bool:
        if self.body is None:
            self.flags = flags
            self.body = body
            self._answered.release()
        return True

    def lose(self, cause: str) -> None:
        if self.body is None:
            self.lost = cause
            self._answered.release()

    def wait(self, seconds: float) -> bool:
        return self._answered.acquire(timeout=max(0.0, _waitable(seconds)))


class _Connection:
    """One connection that all threads of a client share, and its reader thread."""

    def __init__(
        self, endpoint: str, sock: socket.socket, core: Connection, silence_s: float
    ) -> None:
        self.endpoint = endpoint
        self.core = core
        self._sock = sock
        self._silence_s = silence_s
        self._lock = threading.Lock()
        """Guards the core and `_sending`."""
        self._sending = False
        threading.Thread(target=self._read, name=f"etcdlite {endpoint}", daemon=True).start()

    def exchange(
        self, method: Any, body: bytes, deadline_s: float, timeout_s: float
    ) -> tuple[int, bytes]:
        """One request and its reply: (flags, body). Raises Broken and Timeout."""
        ticket = _CallTicket(method)
        try:
            self.open(ticket, body, end=True)
            answered = self._wait(ticket, deadline_s)
        except BaseException:
            self.cancel(ticket)
            raise
        if not answered:
            if self.cancel(ticket):
                raise timeout_error(self.endpoint, method.full, timeout_s)
            # It is over: the reader thread is about to say how.
            ticket.wait(threading.TIMEOUT_MAX)
        if ticket.body is None:
            raise Broken(self.endpoint, ticket.lost, ticket.sent)
        return ticket.flags, ticket.body

    def _wait(self, ticket: _CallTicket, deadline_s: float) -> bool:
        while True:
            now_s = monotonic()
            limit_s = deadline_s
            silent_since_s = self.core.silent_since_s
            if silent_since_s is not None:
                # After one timeout, the others do not wait out theirs on a dead server.
                limit_s = min(deadline_s, silent_since_s + self._silence_s)
            if ticket.wait(limit_s - now_s):
                return True
            if now_s >= deadline_s:
                return False
            if now_s >= limit_s:
                self.close(silence(self._silence_s))

    def usable(self) -> bool:
        """Whether requests may be sent on it. Closes it if its server has gone silent."""
        silent_since_s = self.core.silent_since_s
        if silent_since_s is not None and monotonic() >= silent_since_s + self._silence_s:
            self.close(silence(self._silence_s))
        return not self.core.failure

    def ping(self) -> None:
        """Make sure that the server is there; the connection is closed if it is not."""
        deadline_s = monotonic() + self._silence_s
        try:
            self.exchange(PING, b"", deadline_s, self._silence_s)
        except Timeout:
            self.close(silence(self._silence_s))
        except Broken:
            pass  # Whoever waits on the connection has been told.

    def open(self, ticket: Ticket, body: bytes, *, end: bool) -> None:
        """Begin a request. Raises Broken if the connection is over."""
        with self._lock:
            if self.core.failure:
                raise Broken(self.endpoint, self.core.failure, False)
            self.core.open(ticket, body, end=end)
        self._flush()

    def send(self, ticket: Ticket, body: bytes) -> None:
        with self._lock:
            self.core.send(ticket, body)
        self._flush()

    def cancel(self, ticket: Ticket) -> bool:
        """False if the request had ended."""
        with self._lock:
            cancelled = self.core.cancel(ticket, monotonic())
        if cancelled:
            self._flush()
        return cancelled

    def close(self, cause: str) -> None:
        """Lose every open request."""
        with self._lock:
            tickets = self.core.fail(cause)
        try:
            # Wakes the reader thread, which closes the socket.
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # The other side was first.
        for ticket in tickets:
            ticket.lose(self.core.failure)

    def _flush(self) -> None:
        """Send what is queued, unless another thread is sending: it takes this along."""
        with self._lock:
            if self._sending:
                return
            self._sending = True
        try:
            while True:
                with self._lock:
                    output = self.core.take_output()
                    if not output:
                        self._sending = False
                        return
                self._sock.sendall(output)
        except OSError as error:
            self.close(cause_of(error, 0))
        except BaseException:
            # Such as KeyboardInterrupt: half a frame may have left.
            self.close("interrupted while sending")
            raise

    def _read(self) -> None:
        """The reader thread: take in replies and wake those who wait for them."""
        core = self.core
        cause = ""
        while not cause:
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except OSError as error:
                data = b""
                cause = cause_of(error, 0)
            with self._lock:
                if cause:
                    core.failure = core.failure or cause
                deliveries: list[Delivery] = core.receive(data)
                cause = core.failure
            for ticket, flags, body in deliveries:
                if not ticket.deliver(flags, body):
                    self.cancel(ticket)
        self.close(cause)
        self._sock.close()


class _StreamTicket(Ticket):
    __slots__ = ("frames",)

    def __init__(self, method: Any) -> None:
        super().__init__(method)
        self.frames: deque[tuple[int, bytes]] = deque()

    def deliver(self, flags: int, body: bytes) -> bool:
        self.frames.append((flags, body))
        return True


class Stream:
    """A stream of messages, on its own connection: iterate to receive, `send` to send.

    One thread iterates; others may `send` and `cancel` meanwhile. Iterating raises what the server
    answers, and ConnectionFailed when the connection breaks.
    """

    def __init__(
        self,
        method: Any,
        endpoint: str,
        sock: socket.socket,
        core: Connection,
        first: Any,
        timeout_s: float | None,
    ) -> None:
        self.endpoint = endpoint
        self._method = method
        self._sock = sock
        self._core = core
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        """Guards the core, and keeps frames whole."""
        self._ticket = _StreamTicket(method)
        self._over = False
        if timeout_s is not None:
            sock.settimeout(timeout_s)
        if first is not None:
            core.open(self._ticket, first.encode(), end=True)
            self._flush()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, message: Any) -> None:
        """Send a message; nothing if the stream has ended."""
        body = message.encode()
        with self._lock:
            if self._ticket.request_id == 0:
                self._core.open(self._ticket, body, end=False)
            else:
                self._core.send(self._ticket, body)
            self._flush()

    def close_send(self) -> None:
        """Tell the server that no more messages will come."""
        with self._lock:
            self._core.close_send(self._ticket)
            self._flush()

    def cancel(self) -> None:
        """End the stream; the iteration ends too."""
        self._over = True
        try:
            with self._lock:
                self._core.cancel(self._ticket, monotonic())
                self._flush()
            self._sock.shutdown(socket.SHUT_RDWR)
        except (OSError, ConnectionFailed):
            pass  # It is over already.

    def close(self) -> None:
        """End the stream and free its connection."""
        self.cancel()
        self._sock.close()

    def _flush(self) -> None:
        """Send what is queued, under the lock. Raises ConnectionFailed."""
        try:
            self._sock.sendall(self._core.take_output())
        except OSError as error:
            raise broken_error(self.endpoint, cause_of(error, 0)) from None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next message. Raises StopIteration when the server has ended the stream."""
        received = self._ticket.frames
        while not self._over and not received:
            if self._core.failure:
                raise broken_error(self.endpoint, self._core.failure)
            self._receive()
        if self._over:
            raise StopIteration
        flags, body = received.popleft()
        if flags & frames.END:
            self._over = True
            reply_body(flags, body, self.endpoint)
            raise StopIteration
        return decode_reply(self._method, body, self.endpoint)

    def _receive(self) -> None:
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except TimeoutError:
            assert self._timeout_s is not None
            raise timeout_error(self.endpoint, self._method.full, self._timeout_s) from None
        except OSError as error:
            if self._over:
                return
            raise broken_error(self.endpoint, cause_of(error, 0)) from None
        with self._lock:
            deliveries = self._core.receive(data)
        for ticket, flags, body in deliveries:
            ticket.deliver(flags, body)


class Watch:
    """An endless iterator of `Event`s; a context manager that ends the watch.

    It outlives connections: when one breaks, the watch goes on at the next endpoint behind the last
    revision it has seen, so nothing is missed and nothing comes twice. It raises Compacted if that
    history is gone by then, and what the server answers (WatchCanceled, PermissionDenied, ...). One
    thread iterates; any may `close`, which ends the iteration.
    """

    def __init__(self, client: Client, cursor: WatchCursor, timeout_s: float | None) -> None:
        self._client = client
        self._cursor = cursor
        self._method = methods.METHOD_BY_NAME["Watch.Watch"]
        self._wake = threading.Event()
        self._closed = False
        self._connection: _Connection | None = None
        self._ticket: WatchTicket | None = None
        self._pause_s = 0.0
        """How long to wait before the next attempt to open the stream."""
        self._events: deque[Event] = deque()
        deadline_s = monotonic() + (client.timeout_s if timeout_s is None else timeout_s)
        try:
            while not cursor.created:
                if self._ticket is None:
                    self._open(deadline_s, patient=False)
                else:
                    self._step(deadline_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the watch, and the iteration in whatever thread it runs."""
        self._closed = True
        self._wake.set()
        if self._ticket is not None and self._connection is not None:
            self._connection.cancel(self._ticket)

    @property
    def revision(self) -> int:
        """Every event up to this revision has been received."""
        return self._cursor.next_revision - 1

    def request_progress(self) -> None:
        """Ask for a progress mark: a batch without events, once everything so far has come."""
        if self._ticket is not None and self._connection is not None:
            message = proto.WatchRequest(progress_request=proto.WatchProgressRequest())
            self._connection.send(self._ticket, message.encode())

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        event = self._next_event(None)
        if event is None:
            raise StopIteration
        return event

    def next_event(self, timeout_s: float | None = None) -> Event:
        """The next event. Raises Timeout if none comes in time, Closed if the watch is closed."""
        event = self._next_event(timeout_s)
        if event is None:
            raise Closed(text="the watch is closed")
        return event

    def batches(self) -> Iterator[WatchBatch]:
        """The same events as they come, a batch for each message, and the progress marks."""
        while (batch := self._next_batch(None)) is not None:
            yield batch

    def _next_event(self, timeout_s: float | None) -> Event | None:
        deadline_s = None if timeout_s is None else monotonic() + timeout_s
        while not self._events:
            batch = self._next_batch(deadline_s)
            if batch is None:
                return None
            self._events.extend(batch.events)
        return self._events.popleft()

    def _next_batch(self, deadline_s: float | None) -> WatchBatch | None:
        """None when the watch is closed."""
        while not self._closed:
            if self._ticket is None:
                self._open(deadline_s, patient=True)
            else:
                batch = self._step(deadline_s)
                if batch is not None:
                    return batch
        return None

    def _step(self, deadline_s: float | None) -> WatchBatch | None:
        """Take in one message. None: it held nothing, or there will be none; see `_ticket`."""
        ticket, connection = self._ticket, self._connection
        assert ticket is not None and connection is not None
        while True:
            over = ticket.over
            item = ticket.take()
            if item is not None:
                break
            if over:
                # The connection was lost; or this reader was too slow, and has now caught up.
                self._pause_s = BACKOFF_FIRST_S if ticket.lost else 0.0
                self._ticket = None
            if over or self._closed:
                return None
            self._wait(ticket, connection, deadline_s)
        flags, body = item
        try:
            if flags & frames.END:
                self._ticket = None
                reply_body(flags, body, connection.endpoint)
                raise Unavailable()
            batch = self._cursor.feed(decode_reply(self._method, body, connection.endpoint))
        except Unavailable:
            self._pause_s = min(2 * self._pause_s, BACKOFF_MAX_S) or BACKOFF_FIRST_S
            return None
        except EtcdliteError:
            self.close()
            raise
        self._pause_s = 0.0
        return batch

    def _wait(self, ticket: WatchTicket, connection: _Connection, deadline_s: float | None) -> None:
        """Wait until something comes, or `close`. Raises Timeout at the deadline."""
        self._wake.clear()
        if ticket.ready or self._closed:
            return
        left_s = PING_AFTER_S
        if deadline_s is not None:
            left_s = min(left_s, deadline_s - monotonic())
            if left_s <= 0:
                raise Timeout(
                    text=f"{connection.endpoint}: nothing came from the watch in time",
                    endpoint=connection.endpoint,
                )
        if not self._wake.wait(left_s) and left_s == PING_AFTER_S:
            connection.ping()

    def _open(self, deadline_s: float | None, *, patient: bool) -> None:
        """Open a stream where the watch stands, after the pause that is due.

        Without patience raises ConnectionFailed if that fails; with it, the pause gets longer.
        """
        if self._pause_s:
            self._wake.clear()
            left_s = self._pause_s
            if deadline_s is not None:
                left_s = min(left_s, deadline_s - monotonic())
                if left_s <= 0:
                    raise Timeout(text=f"{self._client.endpoint}: the watch is not connected")
            if not self._closed:
                self._wake.wait(left_s)
        if self._closed:
            return
        client = self._client
        try:
            connection = client._connected(
                monotonic() + client.timeout_s, "Watch.Watch", client.timeout_s
            )
            ticket = WatchTicket(self._method, self._wake.set)
            connection.open(ticket, self._cursor.request().encode(), end=False)
        except (ConnectionFailed, Timeout, Broken) as error:
            if not patient and not isinstance(error, Broken):
                raise
            self._pause_s = min(2 * self._pause_s, BACKOFF_MAX_S) or BACKOFF_FIRST_S
            return
        self._connection, self._ticket = connection, ticket
        if self._closed:
            connection.cancel(ticket)


class Lease:
    """A lease that lives as long as its `with` block: granted, kept alive by a thread, revoked.

    Where a lease's id is wanted, the object will do: `client.put("k", "v", lease=lease)`.
    """

    def __init__(self, client: Client, ttl: int, id: int) -> None:
        self._client = client
        self._asked = (ttl, id)
        self._clock: LeaseClock | None = None
        self._lock = threading.Lock()
        """Guards the clock."""
        self._stop = threading.Event()
        self._lost = threading.Event()
        self.id = 0
        self.ttl = ttl
        """Seconds, as granted."""

    def __int__(self) -> int:
        return self.id

    def __enter__(self) -> Lease:
        if self.id:
            raise RuntimeError("a lease object serves for one lease")
        ttl, id = self._asked
        asked_at_s = monotonic()
        grant = self._client.lease_grant(ttl, id=id)
        self.id, self.ttl = grant.id, grant.ttl
        clock = self._clock = LeaseClock(asked_at_s, grant.ttl)
        name = f"etcdlite lease {self.id:x}"
        threading.Thread(target=self._keep_alive, args=(clock,), name=name, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.revoke()

    @property
    def lost(self) -> bool:
        """Whether the lease may have ended on the server: revoked, or not renewed within its time.

        Judged by this process's clock, on the safe side; once true it stays so.
        """
        with self._lock:
            return self._clock is None or self._clock.lost(monotonic())

    def wait_lost(self, timeout_s: float | None = None) -> bool:
        """Wait until the lease is lost, or until it is revoked here; gives `lost`."""
        self._lost.wait(timeout_s)
        return self.lost

    def revoke(self) -> None:
        """End the lease and delete its keys; if no server can be reached, it runs out by itself."""
        self._stop.set()
        self._lost.set()
        try:
            self._client.lease_revoke(self.id)
        except (LeaseNotFound, ConnectionFailed, UnknownOutcome, Timeout, Unavailable, Closed):
            pass  # Gone already, or going when its time is over.

    def _keep_alive(self, clock: LeaseClock) -> None:
        wait_s = self.ttl / 3
        while not self._stop.wait(wait_s):
            asked_at_s = monotonic()
            try:
                ttl = self._client.lease_keep_alive_once(
                    self.id, timeout_s=max(MIN_KEEP_ALIVE_INTERVAL_S, self.ttl / 3)
                )
            except (LeaseNotFound, Closed):
                with self._lock:
                    clock.end()
            except EtcdliteError:
                # Whatever it is, it may pass before the lease's time is over.
                wait_s = max(MIN_KEEP_ALIVE_INTERVAL_S, self.ttl / 20)
            else:
                wait_s = ttl / 3
                with self._lock:
                    clock.renew(asked_at_s, ttl, monotonic())
            if self.lost:
                self._lost.set()
                return


class _Place:
    """A place in line, with a lease of its own: what a lock and a leadership have in common."""

    def __init__(self, client: Client, name: Bytes, ttl: int, timeout_s: float | None) -> None:
        self._client = client
        self._prefix = recipes.line(name)
        self._ttl = ttl
        self._timeout_s = timeout_s
        self._value = b""
        self._lease: Lease | None = None
        self._held: recipes.Held | None = None

    def acquire(self, timeout_s: float | None = None) -> None:
        """Stand in line and wait. Raises Timeout (having left the line) and LeaseLost."""
        if self._lease is not None:
            raise RuntimeError("held already")
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline_s = None if timeout_s is None else monotonic() + timeout_s
        lease = self._client.lease(self._ttl).__enter__()
        try:
            script = recipes.stand_in_line(self._prefix, lease.id, self._value)
            self._held = self._client._run(script, deadline_s, lease)
        except BaseException:
            # The key goes with the lease.
            lease.revoke()
            raise
        self._lease = lease

    def release(self) -> None:
        """Leave the line: the next one's turn."""
        lease, self._lease, self._held = self._lease, None, None
        if lease is not None:
            lease.revoke()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _checked(self) -> recipes.Held:
        if self._held is None:
            raise RuntimeError("not held")
        return self._held

    @property
    def lost(self) -> bool:
        """Whether the place may be somebody else's: its lease ended, or it was given up."""
        return self._lease is None or self._lease.lost

    @property
    def lease(self) -> Lease:
        """The lease it is held by."""
        if self._lease is None:
            raise RuntimeError("not held")
        return self._lease

    @property
    def key(self) -> bytes:
        return self._checked().key

    @property
    def revision(self) -> int:
        """A number that grows from holder to holder: a fencing token."""
        return self._checked().revision

    @property
    def guard(self) -> Comparison:
        """For `txn(compare=[lock.guard], ...)`: takes effect only while this place is held."""
        return self._checked().guard


class Lock(_Place):
    """A lock of the whole cluster: `with client.lock("name"):`, or `acquire` and `release`."""

    def __enter__(self) -> Lock:
        self.acquire()
        return self


class Leadership(_Place):
    """One candidacy: inside `with`, this one leads."""

    def __init__(
        self, client: Client, name: Bytes, ttl: int, timeout_s: float | None, value: bytes
    ) -> None:
        super().__init__(client, name, ttl, timeout_s)
        self._value = value

    def __enter__(self) -> Leadership:
        self.acquire()
        return self

    def proclaim(self, value: Bytes) -> int:
        """Change what the leader tells of himself. Gives the revision. Raises NotElected."""
        return self._client._run(recipes.proclaim(self._checked(), calls.to_bytes(value)))

    resign = _Place.release


class Election:
    """An election: `campaign` to lead, `leader` and `observe` to know who does."""

    def __init__(self, client: Client, name: Bytes, ttl: int) -> None:
        self._client = client
        self._name = name
        self._ttl = ttl

    def campaign(self, value: Bytes = b"", *, timeout_s: float | None = None) -> Leadership:
        """Stand for election: `with election.campaign("me") as leadership:` waits to be elected.

        `value` is what the others are told of this leader. `timeout_s` bounds the wait (None:
        forever).
        """
        value = calls.to_bytes(value)
        return Leadership(self._client, self._name, self._ttl, timeout_s, value)

    def leader(self) -> KeyValue | None:
        """The leader's key and value; None if nobody leads."""
        return self._client._run(recipes.leader(recipes.line(self._name)))

    def observe(self) -> Iterator[KeyValue]:
        """The leader's key and value: now, and at each change. Endless."""
        script = recipes.observe(recipes.line(self._name))
        step = next(script)
        while True:
            if isinstance(step, KeyValue):
                yield step
                step = next(script)
                continue
            try:
                outcome = self._client._do(step, None, None)
            except EtcdliteError as error:
                step = script.throw(error)
            else:
                step = script.send(outcome)
