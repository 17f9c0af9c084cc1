"""The asyncio shell of the Python client: it runs the scripts in the tasks that call.

Any number of tasks of one event loop share one `AsyncClient`. It has one connection, to one of its
endpoints; the frames that one turn of the event loop queues are sent with one write.
`AsyncClient.stream` opens a connection of its own. A call that is cancelled (as by
`asyncio.timeout`) is cancelled on the server too.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from math import inf
from time import monotonic
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar

from etcdlite import proto
from etcdlite.channel import Channel, ChannelError
from etcdlite.client import operations, scripts
from etcdlite.client.calls import Dial, Script, Start
from etcdlite.client.connection import Ticket, cause_of
from etcdlite.client.link import NEVER_S, Broken, Link, keep_tcp_alive
from etcdlite.client.operations import Bytes, Event, KeyValue, Op, WatchBatch
from etcdlite.client.partial_file import PartialFile, opened

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
PlaceT = TypeVar("PlaceT", bound="_AsyncPlace")


# Waiting.


class _Timer:
    """Ends the waits of a client at their deadlines. A timer for each wait would make a call 15 %
    slower."""

    def __init__(self) -> None:
        self.waits: dict[asyncio.Future[bool], float] = {}
        """Until when each future waits."""
        self._handle: asyncio.TimerHandle | None = None
        self.fires_at_s = inf
        """No later than the first of the waits ends."""

    def start(self, fires_at_s: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self.fires_at_s = fires_at_s
        delay_s = max(0.0, fires_at_s - monotonic())
        self._handle = asyncio.get_running_loop().call_later(delay_s, self._fire)

    def _fire(self) -> None:
        now_s = monotonic()
        first_s = inf
        for future, until_s in list(self.waits.items()):
            if until_s > now_s:
                first_s = min(first_s, until_s)
            else:
                del self.waits[future]
                if not future.done():
                    future.set_result(False)
        self._handle = None
        self.fires_at_s = inf
        if first_s < inf:
            self.start(first_s)


class _Signal:
    """A `link.Signal` for tasks."""

    __slots__ = ("_timer", "_is_set", "_futures")

    def __init__(self, timer: _Timer) -> None:
        self._timer = timer
        self._is_set = False
        self._futures: tuple[asyncio.Future[bool], ...] = ()

    def set(self) -> None:
        for future in self._futures:
            if not future.done():
                future.set_result(True)
                return
        self._is_set = True

    def wait(self, until_s: float) -> asyncio.Future[bool]:
        """A future that is True when the signal is set, False at `until_s`."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self._is_set:
            self._is_set = False
            future.set_result(True)
        self._futures += (future,)
        timer = self._timer
        timer.waits[future] = until_s
        if until_s < timer.fires_at_s:
            timer.start(until_s)
        return future

    def end(self, future: asyncio.Future[bool]) -> None:
        """Forget a wait."""
        self._timer.waits.pop(future, None)
        if len(self._futures) == 1:
            self._futures = ()
        else:
            self._futures = tuple(other for other in self._futures if other is not future)

    def pass_on(self, future: asyncio.Future[bool]) -> None:
        """If a cancelled wait has taken the signal, set it again."""
        if not future.cancelled() and future.result():
            self.set()


async def run(script: Script[T]) -> T:
    """Run a script in this task, and wait wherever it does."""
    step: Callable[[Any], Any] = script.send
    outcome: Any = None
    try:
        while True:
            wanted = step(outcome)
            step = script.send
            try:
                if type(wanted) is tuple:
                    signal, until_s = wanted
                    future = signal.wait(until_s)
                    try:
                        outcome = await future
                    except asyncio.CancelledError:
                        signal.pass_on(future)
                        raise
                    finally:
                        signal.end(future)
                elif type(wanted) is Dial:
                    outcome = await _connect(wanted)
                else:
                    outcome = _start(wanted)
            except BaseException as error:
                step, outcome = script.throw, error
    except StopIteration as stop:
        return stop.value


def _start(start: Start) -> Callable[[], object]:
    return asyncio.get_running_loop().create_task(run(start.script), name=start.name).cancel


async def _connect(dial: Dial) -> Link:
    """Connect and wait for the server's hello. Raises ChannelError and OSError."""
    loop = asyncio.get_running_loop()
    link = _TaskLink(dial, loop)

    async def greeted() -> None:
        connect = partial(loop.create_connection, lambda: link, *dial.server[:2])
        try:
            # An address that does not answer leaves time for the others of its host.
            connecting = connect(happy_eyeballs_delay=dial.timeout_s / 8)
        except TypeError:
            connecting = connect()  # uvloop has no such delay.
        await connecting
        await link.greeted

    greeting = loop.create_task(greeted())
    try:
        # Not `wait_for`: before Python 3.12, it ignores a cancellation that comes with the result.
        if not (await asyncio.wait({greeting}, timeout=dial.timeout_s))[0]:
            raise TimeoutError
        greeting.result()
    except BaseException:
        greeting.cancel()
        link.close("the connection was not made")
        raise
    return link


class _TaskLink(Link, asyncio.Protocol):
    """A link over a transport of asyncio."""

    def __init__(self, dial: Dial, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(str(dial.server), dial.silence_s, dial.drained)
        self.greeted: asyncio.Future[None] = loop.create_future()
        self._handshake = None if dial.channel is None else dial.channel()
        """The channel, until it is established."""
        self._loop = loop
        self._transport: Any = None
        self._will_flush = False

    # Called by asyncio.

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        if self.failure:
            # Closed before the connection was made.
            transport.abort()
            return
        keep_tcp_alive(transport.get_extra_info("socket"))
        if self._handshake is None:
            self._flush_now()
        else:
            transport.write(self._handshake.output())

    def data_received(self, data: bytes) -> None:
        if self._handshake is None:
            self.receive(data)
        else:
            self._shake(self._handshake, data)
        if self.failure:
            self.close(self.failure)
        elif not self.greeted.done() and self.connection.hello is not None:
            self.greeted.set_result(None)

    def _shake(self, channel: Channel, data: bytes) -> None:
        """Take a step of the handshake."""
        try:
            plaintext = channel.receive(data)
        except ChannelError as error:
            self.connection.failure = str(error)
            plaintext = b""
        if channel.is_established:
            self._handshake = None
            if plaintext:
                self.receive(plaintext)
            self.channel = channel
            # In one write with the end of the handshake. If the server refuses that, a second write
            # would fail before the reason is read.
            self._flush_now()
        elif self._transport is not None:
            self._transport.write(channel.output())

    def connection_lost(self, error: Exception | None) -> None:
        if isinstance(error, OSError) and not isinstance(error, ConnectionResetError):
            cause = cause_of(error, 0)
        elif self._handshake is not None:
            try:
                self._handshake.receive_end()
                cause = "the server closed the connection"
            except ChannelError as failure:
                cause = str(failure)
        else:
            cause = self.receive(b"")
        self.close(cause)

    def pause_writing(self) -> None:
        self.is_congested = True

    def resume_writing(self) -> None:
        self.is_congested = False
        self.drained.set()

    # Called by the scripts.

    def open(self, ticket: Ticket, body: bytes, *, end: bool) -> None:
        # `open` and `receive` do without the lock: in one event loop there is no contention, and
        # locking costs 2 % of a call.
        if self.connection.failure:
            raise Broken(self.endpoint, self.connection.failure, False)
        self.connection.open(ticket, body, end=end)
        self.flush()

    def receive(self, data: bytes) -> str:
        channel = self.channel
        if channel is None:
            deliveries = self.connection.receive(data)
        else:
            deliveries = self.receive_sealed(channel, data)
            if channel.has_output:
                self.flush()
        for ticket, flags, body in deliveries:
            if not ticket.deliver(flags, body):
                self.cancel(ticket)
        return self.connection.failure

    def flush(self) -> None:
        """Send, in one write, what this turn of the event loop queues."""
        if not self._will_flush:
            self._will_flush = True
            self._loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._will_flush = False
        if self._transport is None:
            return
        channel = self.channel
        if output := self.connection.take_output() if channel is None else self._sealed(channel):
            self._transport.write(output)

    def _sealed(self, channel: Channel) -> bytes:
        try:
            return self.take_sealed(channel)
        except ConnectionError as error:
            self.close(str(error))
            return b""

    def abort(self) -> None:
        if not self.greeted.done():
            self.greeted.set_exception(ConnectionError(self.failure))
            self.greeted.exception()  # Marks it as retrieved: the task that connects may be gone.
        transport, self._transport = self._transport, None
        if transport is not None:
            # A process that was forked may have the socket open, too. uvloop's has no `shutdown`.
            with suppress(OSError), transport.get_extra_info("socket").dup() as sock:
                sock.shutdown(socket.SHUT_RDWR)
            transport.abort()

    def pause_reading(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()


# What a client makes.


class _Begun:
    """What begins with its `async with` block."""

    async def __aenter__(self: T) -> T:
        await run(self._begin())  # type: ignore[attr-defined]
        return self


class AsyncStream(scripts.StreamBase, _Begun):
    """A stream of messages, on its own connection: `async for` to receive, `send` to send.

    Iterating raises the server's error, and ConnectionFailed when the connection breaks."""

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    async def send(self, message: Any) -> None:
        """Send a message; do nothing if the stream has ended. Raises ConnectionFailed."""
        await run(self._send(message))

    async def close_send(self) -> None:
        """Tell the server that no more messages will come."""
        self._close_send()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        """The next message. Raises StopAsyncIteration when the server has ended the stream."""
        message = await run(self._next())
        if message is None:
            raise StopAsyncIteration
        return message


class AsyncWatch(scripts.WatchBase, _Begun):
    """An endless async iterator of `Event`s, begun and ended by `async with`.

    It outlives connections as `Watch` does and raises the same. One task iterates."""

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        event = self._received_event() or await run(self._next_event(NEVER_S))
        if event is None:
            raise StopAsyncIteration
        return event

    async def next_event(self, timeout_s: float | None = None) -> Event:
        """The next event. Raises Timeout if none comes in time, Closed if the watch is closed."""
        return await run(self._awaited_event(timeout_s))

    async def batches(self) -> AsyncIterator[WatchBatch]:
        """The same events as they come, a batch for each message, and the progress marks."""
        while (batch := await run(self._next_batch())) is not None:
            yield batch


class AsyncLease(scripts.LeaseBase, _Begun):
    """A lease that lives as long as its `async with` block, as that of `Lease` does."""

    async def __aexit__(self, *_: object) -> None:
        await self.revoke()

    async def wait_lost(self, timeout_s: float | None = None) -> bool:
        """Wait until the lease is lost, or until it is revoked here. Returns `lost`."""
        return await run(self._wait_lost(timeout_s))

    async def revoke(self) -> None:
        """End the lease and delete its keys. If no server can be reached, its time runs out."""
        await run(self._revoke())


class _AsyncPlace(scripts.PlaceBase[AsyncLease]):
    async def __aenter__(self: PlaceT) -> PlaceT:
        await self.acquire()
        return self

    async def acquire(self, timeout_s: float | None = None) -> None:
        """Stand in line and wait. Raises Timeout (having left the line) and LeaseLost."""
        await run(self._acquire(timeout_s))

    async def release(self) -> None:
        """Leave the line: the next one's turn."""
        if (lease := self._give_up()) is not None:
            await lease.revoke()

    async def __aexit__(self, *_: object) -> None:
        await self.release()


class AsyncLock(_AsyncPlace):
    """A lock of the whole cluster: `async with client.lock("name"):`."""


class AsyncLeadership(_AsyncPlace):
    """One candidacy: inside `async with`, it leads."""

    async def proclaim(self, value: Bytes) -> int:
        """Change the leader's value. Returns the revision. Raises NotElected."""
        return await run(self._proclaim(value))

    resign = _AsyncPlace.release


class AsyncElection(scripts.ElectionBase[AsyncLease]):
    """An election: `campaign` to lead, `leader` and `observe` to know the leader."""

    def campaign(self, value: Bytes = b"", *, timeout_s: float | None = None) -> AsyncLeadership:
        """Stand for election: `async with election.campaign("me") as leadership:`."""
        return AsyncLeadership(*self._candidacy(value, timeout_s))

    async def leader(self) -> KeyValue | None:
        """The leader's key and value; None if there is no leader."""
        return await run(self._leader())

    async def observe(self) -> AsyncIterator[KeyValue]:
        """The leader's key and value: now, and at each change. Endless."""
        next_observation = self._observations()
        while True:
            yield await run(next_observation())


# The client.


def _operation(build: Callable[P, Op[T]]) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    """The method of `AsyncClient` that performs the operation of `build`."""

    def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        return run(self._calls.perform(build(*args, **kwargs)))

    return operations.as_method(method, build)


class AsyncClient(scripts.ClientBase[AsyncStream, AsyncLease, AsyncLock, AsyncElection]):
    """An asyncio client of one cluster, for any number of tasks of one event loop.

    Arguments, failover and errors are those of `Client`. What blocks there is awaited here, and
    context managers and iterators are `async with` and `async for`."""

    _make_signal = staticmethod(lambda: partial(_Signal, _Timer()))
    _stream = AsyncStream
    _lease = AsyncLease
    _lock = AsyncLock
    _election = AsyncElection

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Calls that wait, and later ones, raise Closed."""
        self._calls.close()

    put = _operation(operations.put)
    get = _operation(operations.get)
    range = _operation(operations.range_)
    delete = _operation(operations.delete)
    txn = _operation(operations.txn)
    compact = _operation(operations.compact)
    lease_grant = _operation(operations.lease_grant)
    lease_revoke = _operation(operations.lease_revoke)
    lease_keep_alive_once = _operation(operations.lease_keep_alive_once)
    lease_time_to_live = _operation(operations.lease_time_to_live)
    leases = _operation(operations.leases)
    status = _operation(operations.status)
    alarms = _operation(operations.alarms)
    disarm = _operation(operations.disarm)
    defragment = _operation(operations.defragment)
    hash_kv = _operation(operations.hash_kv)
    move_leader = _operation(operations.move_leader)
    members = _operation(operations.members)
    member_add = _operation(operations.member_add)
    member_remove = _operation(operations.member_remove)
    member_update = _operation(operations.member_update)
    member_promote = _operation(operations.member_promote)
    watch = scripts.watch_method(operations.watch, AsyncWatch)

    async def snapshot(self, file: str | os.PathLike[str] | BinaryIO) -> int:
        """Save a backup, as `Client.snapshot` does; the file is written in threads."""
        size_bytes = 0
        request = proto.SnapshotRequest()
        with (backup := opened(file)) as target:
            async with self.stream("Maintenance.Snapshot", request) as stream:
                async for response in stream:
                    await asyncio.to_thread(target.write, response.blob)
                    size_bytes += len(response.blob)
            if isinstance(backup, PartialFile):
                await asyncio.to_thread(backup.sync)
        return size_bytes

    def perform(self, op: Op[T]) -> Awaitable[T]:
        """Send a prepared operation, such as `Put("k", "v")`."""
        return run(self._calls.perform(op))

    # The low level: messages in, messages out.

    def call(
        self, method: str, request: Any, *, timeout_s: float | None = None, repeatable: bool = False
    ) -> Awaitable[Any]:
        """Send one message to a method ("KV.Put"). Returns the one message that answers it.

        `repeatable`: carrying it out twice is the same as once, so it may be sent again."""
        return run(self._calls.call(method, request, timeout_s, repeatable))
