"""The asyncio shell of the Python client; `blocking.py` is the blocking one, and says more.

Any number of tasks share one `AsyncClient`. It has one connection, to one of its endpoints; the
frames that one turn of the event loop queues are sent with one write. Streams of the low level
(`AsyncClient.stream`) have a connection each, so that TCP slows down a server whose stream nobody
reads. A call that is cancelled (as by `asyncio.timeout`) is cancelled on the server too.

The invariants are those of `blocking.py`.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
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
    Broken,
    Connection,
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
    "AsyncClient",
    "AsyncStream",
    "AsyncWatch",
    "AsyncLease",
    "AsyncLock",
    "AsyncElection",
    "AsyncLeadership",
]

P = ParamSpec("P")
T = TypeVar("T")

SWEEP_INTERVAL_S = 0.02
"""How late a call may find out that its time is over."""

MAX_STREAM_QUEUE_BYTES = 1024 * 1024
"""A stream of the low level stops reading from its connection while this much is unread."""


def _operation(build: Callable[P, Op[T]]) -> Callable[Concatenate[Any, P], Awaitable[T]]:
    """The method of `AsyncClient` that performs what `build` builds."""

    def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        return self.perform(build(*args, **kwargs))

    return calls.as_method(method, build)


class AsyncClient:
    """An asyncio client of one cluster, for any number of tasks of one event loop.

    Arguments, failover and what is raised are those of `client.Client`; what blocks there is
    awaited here, and context managers and iterators are `async with` and `async for`.
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
        self._connect_lock = asyncio.Lock()
        self._failed_at_s = -1.0
        self._failure_causes: dict[str, str] = {}
        self._closed = False

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Calls that wait, and later ones, raise Closed."""
        self._closed = True
        async with self._connect_lock:
            if self._connection is not None:
                self._connection.close(Closed.text)

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
    ) -> AsyncWatch:
        """Watch keys, from `start_revision` (0: from now) on.

        The watch begins with `async with` (or with the iteration, if there is none): once inside,
        no later change will be missed.
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
        return AsyncWatch(self, cursor)

    def lease(self, ttl: int, *, id: int = 0) -> AsyncLease:
        """A lease of `ttl` seconds, kept alive inside `async with`, revoked at its end."""
        return AsyncLease(self, ttl, id)

    def lock(self, name: Bytes, *, ttl: int = 10, timeout_s: float | None = None) -> AsyncLock:
        """The lock `name`, held inside `async with`."""
        return AsyncLock(self, name, ttl, timeout_s)

    def election(self, name: Bytes, *, ttl: int = 10) -> AsyncElection:
        """The election `name`."""
        return AsyncElection(self, name, ttl)

    async def snapshot(self, file: str | os.PathLike[str] | BinaryIO) -> int:
        """Save a backup, as `client.Client.snapshot`; the file is written in threads."""
        if not isinstance(file, (str, os.PathLike)):
            return await self._copy_snapshot(file)
        partial = calls.PartialFile(os.fspath(file))
        size_bytes = 0
        with partial as target:
            size_bytes = await self._copy_snapshot(target)
            await asyncio.to_thread(partial.sync)
        return size_bytes

    async def _copy_snapshot(self, file: BinaryIO) -> int:
        size_bytes = 0
        async with self.stream("Maintenance.Snapshot", proto.SnapshotRequest()) as stream:
            async for response in stream:
                await asyncio.to_thread(file.write, response.blob)
                size_bytes += len(response.blob)
        return size_bytes

    async def perform(self, op: Op[T]) -> T:
        """Send a prepared operation, such as `Put("k", "v")`."""
        response = await self.call(
            op.method, op.request, timeout_s=op.timeout_s, repeatable=op.repeatable
        )
        return op.result(response)

    # The low level: messages in, messages out.

    async def call(
        self,
        method: str,
        request: Any,
        *,
        timeout_s: float | None = None,
        repeatable: bool = False,
    ) -> Any:
        """Send one message to a method ("KV.Put") and give the one message it answers with."""
        rpc = methods.METHOD_BY_NAME[method]
        body = request.encode()
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        resend = repeatable or is_read(method, request)
        attempts_left = len(self._endpoints)
        backoff_s = BACKOFF_FIRST_S
        while True:
            connection = self._connection
            if connection is None or not connection.usable():
                connection = await self._connected(deadline_s, method, timeout_s)
            try:
                flags, reply = await connection.exchange(rpc, body, deadline_s, timeout_s)
                return unary_reply(rpc, flags, reply, connection.endpoint)
            except Broken as broken:
                after_break(broken, method, resend, attempts_left)
                attempts_left -= 1
            except Unavailable:
                if not resend or connection.loop.time() + backoff_s >= deadline_s:
                    raise
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    def stream(
        self, method: str, first: Any = None, *, timeout_s: float | None = None
    ) -> AsyncStream:
        """A stream ("Watch.Watch") on a connection of its own, opened by `async with`.

        With `first` that message is sent, and nothing more will be. `timeout_s` bounds the wait
        for each message (None: forever). A stream is not resumed when its connection breaks.
        """
        return AsyncStream(self, methods.METHOD_BY_NAME[method], first, timeout_s)

    # Connecting.

    async def _connected(self, deadline_s: float, method: str, timeout_s: float) -> _Connection:
        """The connection, made anew if need be. Raises ConnectionFailed, Timeout and Closed."""
        asked_at_s = asyncio.get_running_loop().time()
        try:
            await asyncio.wait_for(self._connect_lock.acquire(), deadline_s - asked_at_s)
        except asyncio.TimeoutError:
            raise timeout_error(self.endpoint, method, timeout_s) from None
        try:
            connection = self._connection
            if connection is not None and connection.usable():
                return connection
            if connection is not None:
                self._connection = None
                self._next_endpoint = (self._next_endpoint + 1) % len(self._endpoints)
            if self._failed_at_s > asked_at_s:
                # Somebody else tried every endpoint while this call waited for the lock.
                raise connect_error(self._failure_causes)
            self._connection = await self._dial(deadline_s)
            return self._connection
        finally:
            self._connect_lock.release()

    async def _dial(self, deadline_s: float) -> _Connection:
        """Try each endpoint once, beginning with the next one."""
        loop = asyncio.get_running_loop()
        causes: dict[str, str] = {}
        for _ in self._endpoints:
            if self._closed:
                raise Closed()
            host, port = self._endpoints[self._next_endpoint]
            endpoint = format_endpoint(host, port)
            limit_s = min(self.dial_timeout_s, max(0.001, deadline_s - loop.time()))
            connection = _Connection(endpoint, loop, self.dial_timeout_s)
            try:
                await asyncio.wait_for(self._greeted(connection, host, port), limit_s)
                return connection
            except asyncio.TimeoutError:
                causes[endpoint] = cause_of(TimeoutError(), limit_s)
            except OSError as error:
                causes[endpoint] = cause_of(error, limit_s)
            except BaseException:
                connection.close("cancelled while connecting")
                raise
            connection.close(causes[endpoint])
            self._next_endpoint = (self._next_endpoint + 1) % len(self._endpoints)
        self._failed_at_s = loop.time()
        self._failure_causes = causes
        raise connect_error(causes)

    async def _greeted(self, connection: _Connection, host: str, port: int) -> None:
        await connection.loop.create_connection(lambda: connection, host, port)
        await connection.greeted

    async def _run(
        self,
        script: recipes.Script[T],
        deadline_s: float | None = None,
        lease: AsyncLease | None = None,
    ) -> T:
        """Run a recipe to its end; its waiting ends at the deadline, or with the lease."""
        try:
            step = next(script)
            while True:
                try:
                    outcome = await self._do(step, deadline_s, lease)
                except EtcdliteError as error:
                    step = script.throw(error)
                else:
                    step = script.send(outcome)
        except StopIteration as stop:
            return stop.value

    async def _do(self, step: Any, deadline_s: float | None, lease: AsyncLease | None) -> Any:
        if isinstance(step, Op):
            return await self.perform(step)
        clock = asyncio.get_running_loop().time
        async with self.watch(**step.arguments()) as watch:
            while True:
                limit_s = LEASE_CHECK_INTERVAL_S if lease is not None else None
                if deadline_s is not None:
                    left_s = max(0.0, deadline_s - clock())
                    limit_s = left_s if limit_s is None else min(limit_s, left_s)
                try:
                    return await watch.next_event(timeout_s=limit_s)
                except Timeout:
                    if lease is not None and lease.lost:
                        raise LeaseLost() from None
                    if deadline_s is not None and clock() >= deadline_s:
                        raise step.timeout(self.endpoint) from None


class _CallTicket(Ticket):
    """A request with one reply, and the future that its task awaits."""

    __slots__ = ("future", "deadline_s", "reply")

    def __init__(self, method: Any, future: asyncio.Future[None], deadline_s: float) -> None:
        super().__init__(method)
        self.future = future
        """Done when there is a reply, or when it is lost, or when its time is over."""
        self.deadline_s = deadline_s
        self.reply: tuple[int, bytes] | None = None
        self.lost = ""

    def deliver(self, flags: int, body: bytes) -> bool:
        if self.reply is None:
            self.reply = flags, body
            self.finish()
        return True

    def lose(self, cause: str) -> None:
        self.lost = cause
        self.finish()

    def finish(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class _Connection(asyncio.Protocol):
    """One connection that all tasks of a client share."""

    def __init__(self, endpoint: str, loop: asyncio.AbstractEventLoop, silence_s: float) -> None:
        self.endpoint = endpoint
        self.loop = loop
        self.core = Connection()
        self.greeted: asyncio.Future[None] = loop.create_future()
        self._silence_s = silence_s
        self._transport: asyncio.Transport | None = None
        self._flushing = False
        self._calls: set[_CallTicket] = set()
        self._sweeping = False
        self._writable = asyncio.Event()
        self._writable.set()

    # Called by asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self.core.failure:
            # Given up before it came about.
            transport.abort()
            return
        keep_tcp_alive(transport.get_extra_info("socket"))
        transport.write(self.core.take_output())

    def data_received(self, data: bytes) -> None:
        core = self.core
        for ticket, flags, body in core.receive(data):
            if not ticket.deliver(flags, body):
                self.cancel(ticket)
        if core.failure:
            self.close(core.failure)
        elif core.hello is not None and not self.greeted.done():
            self.greeted.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if isinstance(error, OSError):
            self.close(cause_of(error, 0))
        else:
            self.close("the server closed the connection")

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # Called by the client.

    async def exchange(
        self, method: Any, body: bytes, deadline_s: float, timeout_s: float
    ) -> tuple[int, bytes]:
        """One request and its reply: (flags, body). Raises Broken and Timeout."""
        ticket = _CallTicket(method, self.loop.create_future(), deadline_s)
        try:
            if not self._writable.is_set():
                await self.writable(deadline_s)
            self.open(ticket, body, end=True)
            self._calls.add(ticket)
            if not self._sweeping:
                self._sweeping = True
                self.loop.call_later(SWEEP_INTERVAL_S, self._sweep)
            await ticket.future
        finally:
            self._calls.discard(ticket)
            self.cancel(ticket)
        if ticket.reply is not None:
            return ticket.reply
        if ticket.lost:
            raise Broken(self.endpoint, ticket.lost, ticket.sent)
        raise timeout_error(self.endpoint, method.full, timeout_s)

    def usable(self) -> bool:
        """Whether requests may be sent on it. Closes it if its server has gone silent."""
        silent_since_s = self.core.silent_since_s
        if silent_since_s is not None and self.loop.time() >= silent_since_s + self._silence_s:
            self.close(silence(self._silence_s))
        return not self.core.failure

    def _sweep(self) -> None:
        """End the calls whose time is over: one timer for all, one for each costs 15 % more."""
        now_s = self.loop.time()
        # After one timeout, the others do not wait out theirs on a dead server.
        self.usable()
        for ticket in self._calls:
            if now_s >= ticket.deadline_s:
                ticket.finish()
        self._sweeping = bool(self._calls)
        if self._sweeping:
            self.loop.call_later(SWEEP_INTERVAL_S, self._sweep)

    async def ping(self) -> None:
        """Make sure that the server is there; the connection is closed if it is not."""
        try:
            await self.exchange(PING, b"", self.loop.time() + self._silence_s, self._silence_s)
        except Timeout:
            self.close(silence(self._silence_s))
        except Broken:
            pass  # Whoever waits on the connection has been told.

    async def writable(self, deadline_s: float) -> None:
        """Wait until the server takes in what was sent. At the deadline, give it up."""
        try:
            await asyncio.wait_for(self._writable.wait(), deadline_s - self.loop.time())
        except asyncio.TimeoutError:
            self.close(cause_of(BlockingIOError(), 0))

    def open(self, ticket: Ticket, body: bytes, *, end: bool) -> None:
        """Begin a request. Raises Broken if the connection is over."""
        if self.core.failure:
            raise Broken(self.endpoint, self.core.failure, False)
        self.core.open(ticket, body, end=end)
        self.flush_soon()

    def send(self, ticket: Ticket, body: bytes) -> None:
        self.core.send(ticket, body)
        self.flush_soon()

    def cancel(self, ticket: Ticket) -> None:
        """Nothing if the request has ended."""
        if self.core.cancel(ticket, self.loop.time()):
            self.flush_soon()

    def flush_soon(self) -> None:
        """Send, in one write, what this turn of the event loop queues."""
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        self._flushing = False
        if self._transport is not None and (output := self.core.take_output()):
            self._transport.write(output)

    def pause_reading(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def close(self, cause: str) -> None:
        """Lose every open request."""
        tickets = self.core.fail(cause)
        if not self.greeted.done():
            self.greeted.set_exception(ConnectionError(cause))
            self.greeted.exception()  # Marks it as seen: who connects may have given up.
        if self._transport is not None:
            self._transport.abort()
        self._writable.set()
        for ticket in tickets:
            ticket.lose(self.core.failure)


class _StreamTicket(Ticket):
    """What a stream has received; `MAX_STREAM_QUEUE_BYTES` of it, then TCP holds the server up."""

    __slots__ = ("frames", "event", "_connection", "_waiting_bytes")

    def __init__(self, method: Any, connection: _Connection) -> None:
        super().__init__(method)
        self.frames: deque[tuple[int, bytes]] = deque()
        self.lost = ""
        self.event = asyncio.Event()
        self._connection = connection
        self._waiting_bytes = 0

    def deliver(self, flags: int, body: bytes) -> bool:
        self.frames.append((flags, body))
        if self._waiting_bytes <= MAX_STREAM_QUEUE_BYTES < self._waiting_bytes + len(body):
            self._connection.pause_reading()
        self._waiting_bytes += len(body)
        self.event.set()
        return True

    def take(self) -> tuple[int, bytes]:
        flags, body = self.frames.popleft()
        if self._waiting_bytes - len(body) <= MAX_STREAM_QUEUE_BYTES < self._waiting_bytes:
            self._connection.resume_reading()
        self._waiting_bytes -= len(body)
        return flags, body

    def lose(self, cause: str) -> None:
        self.lost = cause
        self.event.set()


class AsyncStream:
    """A stream of messages, on its own connection: `async for` to receive, `send` to send.

    Iterating raises what the server answers, and ConnectionFailed when the connection breaks.
    """

    def __init__(
        self, client: AsyncClient, method: Any, first: Any, timeout_s: float | None
    ) -> None:
        self._client = client
        self._method = method
        self._first = first
        self._timeout_s = timeout_s
        self._connection: _Connection | None = None
        self._ticket: _StreamTicket | None = None
        self._over = False

    async def __aenter__(self) -> AsyncStream:
        client = self._client
        async with client._connect_lock:
            connection = await client._dial(asyncio.get_running_loop().time() + client.timeout_s)
        self._connection = connection
        self._ticket = _StreamTicket(self._method, connection)
        if self._first is not None:
            connection.open(self._ticket, self._first.encode(), end=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    @property
    def endpoint(self) -> str:
        return self._opened()[0].endpoint

    def _opened(self) -> tuple[_Connection, _StreamTicket]:
        if self._connection is None or self._ticket is None:
            raise RuntimeError("a stream is opened by `async with`")
        return self._connection, self._ticket

    async def send(self, message: Any) -> None:
        """Send a message; nothing if the stream has ended."""
        connection, ticket = self._opened()
        body = message.encode()
        await connection.writable(connection.loop.time() + self._client.timeout_s)
        if connection.core.failure:
            raise broken_error(connection.endpoint, connection.core.failure)
        if ticket.request_id == 0:
            connection.open(ticket, body, end=False)
        else:
            connection.send(ticket, body)

    async def close_send(self) -> None:
        """Tell the server that no more messages will come."""
        connection, ticket = self._opened()
        connection.core.close_send(ticket)
        connection.flush_soon()

    def cancel(self) -> None:
        """End the stream and free its connection; the iteration ends too."""
        connection, ticket = self._opened()
        self._over = True
        connection.cancel(ticket)
        connection.close("the stream was cancelled")
        ticket.event.set()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        """The next message. Raises StopAsyncIteration when the server has ended the stream."""
        connection, ticket = self._opened()
        while not self._over and not ticket.frames:
            if ticket.lost or connection.core.failure:
                raise broken_error(connection.endpoint, ticket.lost or connection.core.failure)
            ticket.event.clear()
            try:
                await asyncio.wait_for(ticket.event.wait(), self._timeout_s)
            except asyncio.TimeoutError:
                assert self._timeout_s is not None
                raise timeout_error(
                    connection.endpoint, self._method.full, self._timeout_s
                ) from None
        if self._over:
            raise StopAsyncIteration
        flags, body = ticket.take()
        if flags & frames.END:
            self._over = True
            reply_body(flags, body, connection.endpoint)
            raise StopAsyncIteration
        return decode_reply(self._method, body, connection.endpoint)


class AsyncWatch:
    """An endless async iterator of `Event`s, begun and ended by `async with`.

    It outlives connections as `client.Watch` does and raises the same. One task iterates.
    """

    def __init__(self, client: AsyncClient, cursor: WatchCursor) -> None:
        self._client = client
        self._cursor = cursor
        self._method = methods.METHOD_BY_NAME["Watch.Watch"]
        self._wake = asyncio.Event()
        self._closed = False
        self._connection: _Connection | None = None
        self._ticket: WatchTicket | None = None
        self._pause_s = 0.0
        """How long to wait before the next attempt to open the stream."""
        self._events: deque[Event] = deque()

    async def __aenter__(self) -> AsyncWatch:
        deadline_s = asyncio.get_running_loop().time() + self._client.timeout_s
        try:
            while not self._cursor.created:
                if self._ticket is None:
                    await self._open(deadline_s, patient=False)
                else:
                    await self._step(deadline_s)
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the watch, and the iteration in whatever task it runs."""
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

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        event = await self._next_event(None)
        if event is None:
            raise StopAsyncIteration
        return event

    async def next_event(self, timeout_s: float | None = None) -> Event:
        """The next event. Raises Timeout if none comes in time, Closed if the watch is closed."""
        event = await self._next_event(timeout_s)
        if event is None:
            raise Closed(text="the watch is closed")
        return event

    async def batches(self) -> AsyncIterator[WatchBatch]:
        """The same events as they come, a batch for each message, and the progress marks."""
        while (batch := await self._next_batch(None)) is not None:
            yield batch

    async def _next_event(self, timeout_s: float | None) -> Event | None:
        deadline_s = None
        if timeout_s is not None:
            deadline_s = asyncio.get_running_loop().time() + timeout_s
        while not self._events:
            batch = await self._next_batch(deadline_s)
            if batch is None:
                return None
            self._events.extend(batch.events)
        return self._events.popleft()

    async def _next_batch(self, deadline_s: float | None) -> WatchBatch | None:
        """None when the watch is closed."""
        while not self._closed:
            if self._ticket is None:
                await self._open(deadline_s, patient=True)
            else:
                batch = await self._step(deadline_s)
                if batch is not None:
                    return batch
        return None

    async def _step(self, deadline_s: float | None) -> WatchBatch | None:
        """Take in one message. None: it held nothing, or there will be none; see `_ticket`."""
        ticket, connection = self._ticket, self._connection
        assert ticket is not None and connection is not None
        while (item := ticket.take()) is None:
            if ticket.over:
                # The connection was lost; or this reader was too slow, and has now caught up.
                self._pause_s = BACKOFF_FIRST_S if ticket.lost else 0.0
                self._ticket = None
            if ticket.over or self._closed:
                return None
            await self._wait(connection, deadline_s)
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

    async def _wait(self, connection: _Connection, deadline_s: float | None) -> None:
        """Wait until something comes, or `close`. Raises Timeout at the deadline."""
        left_s = PING_AFTER_S
        if deadline_s is not None:
            left_s = min(left_s, deadline_s - connection.loop.time())
            if left_s <= 0:
                raise Timeout(
                    text=f"{connection.endpoint}: nothing came from the watch in time",
                    endpoint=connection.endpoint,
                )
        self._wake.clear()
        try:
            await asyncio.wait_for(self._wake.wait(), left_s)
        except asyncio.TimeoutError:
            if left_s == PING_AFTER_S:
                await connection.ping()

    async def _open(self, deadline_s: float | None, *, patient: bool) -> None:
        """Open a stream where the watch stands, after the pause that is due.

        Without patience raises ConnectionFailed if that fails; with it, the pause gets longer.
        """
        client = self._client
        clock = asyncio.get_running_loop().time
        if self._pause_s:
            left_s = self._pause_s
            if deadline_s is not None:
                left_s = min(left_s, deadline_s - clock())
                if left_s <= 0:
                    raise Timeout(text=f"{client.endpoint}: the watch is not connected")
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), left_s)
            except asyncio.TimeoutError:
                pass  # The pause is over.
        if self._closed:
            return
        try:
            connection = await client._connected(
                clock() + client.timeout_s, "Watch.Watch", client.timeout_s
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


class AsyncLease:
    """A lease that lives as long as its `async with` block: granted, kept alive, revoked.

    Where a lease's id is wanted, the object will do: `client.put("k", "v", lease=lease)`.
    """

    def __init__(self, client: AsyncClient, ttl: int, id: int) -> None:
        self._client = client
        self._asked = (ttl, id)
        self._clock: LeaseClock | None = None
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.id = 0
        self.ttl = ttl
        """Seconds, as granted."""

    def __int__(self) -> int:
        return self.id

    async def __aenter__(self) -> AsyncLease:
        if self.id:
            raise RuntimeError("a lease object serves for one lease")
        ttl, id = self._asked
        loop = asyncio.get_running_loop()
        asked_at_s = loop.time()
        grant = await self._client.lease_grant(ttl, id=id)
        self.id, self.ttl = grant.id, grant.ttl
        clock = self._clock = LeaseClock(asked_at_s, grant.ttl)
        self._task = loop.create_task(self._keep_alive(clock))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.revoke()

    @property
    def lost(self) -> bool:
        """Whether the lease may have ended on the server; see `client.Lease.lost`."""
        clock = self._clock
        return clock is None or clock.lost(asyncio.get_running_loop().time())

    async def wait_lost(self) -> bool:
        """Wait until the lease is lost, or until it is revoked here; gives `lost`."""
        await self._lost.wait()
        return self.lost

    async def revoke(self) -> None:
        """End the lease and delete its keys; if no server can be reached, it runs out by itself."""
        if self._task is not None:
            self._task.cancel()
        self._lost.set()
        try:
            await self._client.lease_revoke(self.id)
        except (LeaseNotFound, ConnectionFailed, UnknownOutcome, Timeout, Unavailable, Closed):
            pass  # Gone already, or going when its time is over.

    async def _keep_alive(self, clock: LeaseClock) -> None:
        loop = asyncio.get_running_loop()
        wait_s = self.ttl / 3
        while not self.lost:
            await asyncio.sleep(wait_s)
            asked_at_s = loop.time()
            try:
                ttl = await self._client.lease_keep_alive_once(
                    self.id, timeout_s=max(MIN_KEEP_ALIVE_INTERVAL_S, self.ttl / 3)
                )
            except (LeaseNotFound, Closed):
                clock.end()
            except EtcdliteError:
                # Whatever it is, it may pass before the lease's time is over.
                wait_s = max(MIN_KEEP_ALIVE_INTERVAL_S, self.ttl / 20)
            else:
                wait_s = ttl / 3
                clock.renew(asked_at_s, ttl, loop.time())
        self._lost.set()


class _Place:
    """A place in line, with a lease of its own: what a lock and a leadership have in common."""

    def __init__(self, client: AsyncClient, name: Bytes, ttl: int, timeout_s: float | None) -> None:
        self._client = client
        self._prefix = recipes.line(name)
        self._ttl = ttl
        self._timeout_s = timeout_s
        self._value = b""
        self._lease: AsyncLease | None = None
        self._held: recipes.Held | None = None

    async def acquire(self, timeout_s: float | None = None) -> None:
        """Stand in line and wait. Raises Timeout (having left the line) and LeaseLost."""
        if self._lease is not None:
            raise RuntimeError("held already")
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline_s = None
        if timeout_s is not None:
            deadline_s = asyncio.get_running_loop().time() + timeout_s
        lease = await self._client.lease(self._ttl).__aenter__()
        try:
            script = recipes.stand_in_line(self._prefix, lease.id, self._value)
            self._held = await self._client._run(script, deadline_s, lease)
        except BaseException:
            # The key goes with the lease.
            await lease.revoke()
            raise
        self._lease = lease

    async def release(self) -> None:
        """Leave the line: the next one's turn."""
        lease, self._lease, self._held = self._lease, None, None
        if lease is not None:
            await lease.revoke()

    async def __aexit__(self, *_: object) -> None:
        await self.release()

    def _checked(self) -> recipes.Held:
        if self._held is None:
            raise RuntimeError("not held")
        return self._held

    @property
    def lost(self) -> bool:
        """Whether the place may be somebody else's: its lease ended, or it was given up."""
        return self._lease is None or self._lease.lost

    @property
    def lease(self) -> AsyncLease:
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


class AsyncLock(_Place):
    """A lock of the whole cluster: `async with client.lock("name"):`."""

    async def __aenter__(self) -> AsyncLock:
        await self.acquire()
        return self


class AsyncLeadership(_Place):
    """One candidacy: inside `async with`, this one leads."""

    def __init__(
        self, client: AsyncClient, name: Bytes, ttl: int, timeout_s: float | None, value: bytes
    ) -> None:
        super().__init__(client, name, ttl, timeout_s)
        self._value = value

    async def __aenter__(self) -> AsyncLeadership:
        await self.acquire()
        return self

    async def proclaim(self, value: Bytes) -> int:
        """Change what the leader tells of himself. Gives the revision. Raises NotElected."""
        script = recipes.proclaim(self._checked(), calls.to_bytes(value))
        return await self._client._run(script)

    resign = _Place.release


class AsyncElection:
    """An election: `campaign` to lead, `leader` and `observe` to know who does."""

    def __init__(self, client: AsyncClient, name: Bytes, ttl: int) -> None:
        self._client = client
        self._name = name
        self._ttl = ttl

    def campaign(self, value: Bytes = b"", *, timeout_s: float | None = None) -> AsyncLeadership:
        """Stand for election: `async with election.campaign("me") as leadership:`."""
        value = calls.to_bytes(value)
        return AsyncLeadership(self._client, self._name, self._ttl, timeout_s, value)

    async def leader(self) -> KeyValue | None:
        """The leader's key and value; None if nobody leads."""
        return await self._client._run(recipes.leader(recipes.line(self._name)))

    async def observe(self) -> AsyncIterator[KeyValue]:
        """The leader's key and value: now, and at each change. Endless."""
        script = recipes.observe(recipes.line(self._name))
        step = next(script)
        while True:
            if isinstance(step, KeyValue):
                yield step
                step = next(script)
                continue
            try:
                outcome = await self._client._do(step, None, None)
            except EtcdliteError as error:
                step = script.throw(error)
            else:
                step = script.send(outcome)
