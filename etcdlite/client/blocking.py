"""The blocking shell of the Python client: it runs the scripts in the threads that call.

Any number of threads share one `Client`. It has one connection, to one of its endpoints. A call
queues its frame; a thread that finds no other one sending sends all that is queued; a reader thread
hands out the replies. `Client.stream` opens a connection, with a reader thread, of its own.

Invariants: the reader thread never runs code of the caller; `calls.py` has the others.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from time import monotonic
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar

from etcdlite import proto
from etcdlite.channel import Channel, shake_hands
from etcdlite.client import operations, scripts
from etcdlite.client.calls import Calls, Dial, Script, Start
from etcdlite.client.connection import RECEIVE_BYTES, cause_of
from etcdlite.client.link import NEVER_S, Link, connect
from etcdlite.client.operations import Bytes, Event, KeyValue, Op, WatchBatch, WatchCursor
from etcdlite.client.partial_file import opened

__all__ = ["Client", "Stream", "Watch", "Lease", "Lock", "Election", "Leadership"]

P = ParamSpec("P")
T = TypeVar("T")
PlaceT = TypeVar("PlaceT", bound="_Place")


# Waiting.


class _Signal:
    """A `link.Signal` for threads: a lock is the cheapest thing that a thread can wait for."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        with suppress(RuntimeError):  # It is set already.
            self._lock.release()

    def wait(self, until_s: float) -> bool:
        """Return True when the signal is set, False at `until_s`."""
        seconds = until_s - monotonic()
        if not 0.0 <= seconds <= threading.TIMEOUT_MAX:
            seconds = 0.0 if seconds < 0.0 else threading.TIMEOUT_MAX
        return self._lock.acquire(True, seconds)


def run(script: Script[T]) -> T:
    """Run a script in this thread, and wait wherever it does."""
    step: Callable[[Any], Any] = script.send
    outcome: Any = None
    try:
        while True:
            wanted = step(outcome)
            step = script.send
            try:
                if type(wanted) is tuple:
                    outcome = wanted[0].wait(wanted[1])
                else:
                    outcome = _connect(wanted) if type(wanted) is Dial else _start(wanted)
            except BaseException as error:
                step, outcome = script.throw, error
    except StopIteration as stop:
        return stop.value


def _start(start: Start) -> Callable[[], None]:
    threading.Thread(target=run, args=(start.script,), name=start.name, daemon=True).start()
    return lambda: None


def _connect(dial: Dial) -> Link:
    """Connect and wait for the server's hello. Raises ChannelError and OSError."""
    deadline_s = monotonic() + dial.timeout_s
    sock = connect(dial.server, dial.timeout_s)
    try:
        link = _ThreadLink(dial, sock)
        connection = link.connection
        if dial.channel is None:
            sock.sendall(connection.take_output())
        else:
            _establish(link, sock, dial.channel(), deadline_s)
        while connection.hello is None:
            left_s = deadline_s - monotonic()
            if left_s <= 0:
                raise TimeoutError
            sock.settimeout(left_s)
            try:
                data = sock.recv(RECEIVE_BYTES)
            except ConnectionResetError:
                data = b""
            if failure := link.receive(data):
                raise ConnectionError(failure)
        sock.settimeout(None)
        # Receiving waits without limit. A server that does not take in what is sent is given up.
        seconds, rest = divmod(max(0.001, dial.silence_s), 1)
        limit = struct.pack("ll", int(seconds), int(rest * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    except BaseException:
        sock.close()
        raise
    link.start()
    return link


def _establish(link: Link, sock: socket.socket, channel: Channel, deadline_s: float) -> None:
    """Shake hands, and send the first bytes of the connection. Raises ChannelError and OSError."""
    try:
        first = shake_hands(sock, channel, deadline_s, monotonic)
    except ConnectionResetError:
        channel.receive_end()
        raise
    if first:
        link.receive(first)
    link.channel = channel
    # With TLS 1.3 a server refuses a client after the handshake, and says why: read on.
    with suppress(OSError):
        sock.sendall(link.take_sealed(channel))


class _ThreadLink(Link):
    """A link with a socket, and a thread that reads from it."""

    def __init__(self, dial: Dial, sock: socket.socket) -> None:
        super().__init__(str(dial.server), dial.silence_s, dial.drained)
        self._sock = sock
        self._is_sending = False
        self._is_paused = False
        self._resumed = _Signal()

    def start(self) -> None:
        threading.Thread(target=self._read, name=f"etcdlite {self.endpoint}", daemon=True).start()

    def flush(self) -> None:
        """Send what is queued, unless another thread is sending: it takes this along."""
        with self._lock:
            if self._is_sending:
                return
            self._is_sending = True
        try:
            while True:
                with self._lock:
                    channel = self.channel
                    if channel is None:
                        output = self.connection.take_output()
                    else:
                        output = self.take_sealed(channel)
                    if not output:
                        self._is_sending = False
                        return
                with suppress(BlockingIOError):
                    output = output[self._sock.send(output, socket.MSG_DONTWAIT) :]
                if output:
                    self.is_congested = True
                    threading.Thread(target=self._send_rest, args=(output,), daemon=True).start()
                    return
        except OSError as error:
            self.close(cause_of(error, 0))
        except BaseException:
            # Such as KeyboardInterrupt: half a frame may have left.
            self.close("interrupted while sending")
            raise

    def _send_rest(self, output: bytes) -> None:
        """Send what did not go at once, in a thread: a call would outlive its timeout here."""
        try:
            self._sock.sendall(output)
        except OSError as error:
            self.close(cause_of(error, 0))
        self.is_congested = self._is_sending = False
        self.drained.set()
        self.flush()

    def abort(self) -> None:
        with suppress(OSError):  # The server closed it first.
            # Wakes the reader thread, which closes the socket.
            self._sock.shutdown(socket.SHUT_RDWR)
        self.resume_reading()

    def pause_reading(self) -> None:
        self._is_paused = True

    def resume_reading(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self._resumed.set()

    def _read(self) -> None:
        """The reader thread: take in replies and wake the threads that wait for them."""
        failure = ""
        while not failure:
            if self._is_paused and not self.failure:
                self._resumed.wait(NEVER_S)
            try:
                failure = self.receive(self._sock.recv(RECEIVE_BYTES))
                if not failure and self.channel is not None and self.channel.has_output:
                    self.flush()
            except OSError as error:
                failure = cause_of(error, 0)
        self.close(failure)
        self._sock.close()


# What a client makes.


class _Closing:
    """What is closed at the end of its `with` block."""

    def __enter__(self: T) -> T:
        return self

    def __exit__(self: Any, *_: object) -> None:
        self.close()


class Stream(scripts.StreamBase, _Closing):
    """A stream of messages, on its own connection: iterate to receive, `send` to send.

    One thread iterates; others may `send` and `cancel` at the same time. Iterating raises the
    server's error, and ConnectionFailed when the connection breaks."""

    def __init__(self, calls: Calls, method: str, first: Any, timeout_s: float | None) -> None:
        super().__init__(calls, method, first, timeout_s)
        run(self._begin())

    def send(self, message: Any) -> None:
        """Send a message; do nothing if the stream has ended. Raises ConnectionFailed."""
        run(self._send(message))

    def close_send(self) -> None:
        """Tell the server that no more messages will come."""
        self._close_send()

    close = scripts.StreamBase.cancel

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next message. Raises StopIteration when the server has ended the stream."""
        message = run(self._next())
        if message is None:
            raise StopIteration
        return message


class Watch(scripts.WatchBase, _Closing):
    """An endless iterator of `Event`s; a context manager that ends the watch.

    It outlives connections: when one breaks, the watch goes on at the next endpoint after the last
    revision it has seen, so no event is missed and none comes twice. It raises Compacted if that
    history is gone by then, and the server's errors (WatchCanceled, PermissionDenied, ...). One
    thread iterates; any thread may `close`, which ends the iteration."""

    def __init__(self, calls: Calls, cursor: WatchCursor) -> None:
        super().__init__(calls, cursor)
        run(self._begin())

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        event = self._received_event() or run(self._next_event(NEVER_S))
        if event is None:
            raise StopIteration
        return event

    def next_event(self, timeout_s: float | None = None) -> Event:
        """The next event. Raises Timeout if none comes in time, Closed if the watch is closed."""
        return run(self._awaited_event(timeout_s))

    def batches(self) -> Iterator[WatchBatch]:
        """The same events as they come, a batch for each message, and the progress marks."""
        while (batch := run(self._next_batch())) is not None:
            yield batch


class Lease(scripts.LeaseBase):
    """A lease that lives as long as its `with` block: granted, kept alive by a thread, revoked.

    The object serves wherever a lease's id is wanted: `client.put("k", "v", lease=lease)`."""

    def __enter__(self) -> Lease:
        run(self._begin())
        return self

    def __exit__(self, *_: object) -> None:
        self.revoke()

    def wait_lost(self, timeout_s: float | None = None) -> bool:
        """Wait until the lease is lost, or until it is revoked here. Returns `lost`."""
        return run(self._wait_lost(timeout_s))

    def revoke(self) -> None:
        """End the lease and delete its keys. If no server can be reached, its time runs out."""
        run(self._revoke())


class _Place(scripts.PlaceBase[Lease]):
    def __enter__(self: PlaceT) -> PlaceT:
        self.acquire()
        return self

    def acquire(self, timeout_s: float | None = None) -> None:
        """Stand in line and wait. Raises Timeout (having left the line) and LeaseLost."""
        run(self._acquire(timeout_s))

    def release(self) -> None:
        """Leave the line: the next one's turn."""
        if (lease := self._give_up()) is not None:
            lease.revoke()

    def __exit__(self, *_: object) -> None:
        self.release()


class Lock(_Place):
    """A lock of the whole cluster: `with client.lock("name"):`, or `acquire` and `release`."""


class Leadership(_Place):
    """One candidacy: inside `with`, it leads."""

    def proclaim(self, value: Bytes) -> int:
        """Change the leader's value. Returns the revision. Raises NotElected."""
        return run(self._proclaim(value))

    resign = _Place.release


class Election(scripts.ElectionBase[Lease]):
    """An election: `campaign` to lead, `leader` and `observe` to know the leader."""

    def campaign(self, value: Bytes = b"", *, timeout_s: float | None = None) -> Leadership:
        """Stand for election: `with election.campaign("me") as leadership:` waits to be elected.

        `value` is what the others see of this leader. `timeout_s` bounds the wait (None: forever).
        """
        return Leadership(*self._candidacy(value, timeout_s))

    def leader(self) -> KeyValue | None:
        """The leader's key and value; None if there is no leader."""
        return run(self._leader())

    def observe(self) -> Iterator[KeyValue]:
        """The leader's key and value: now, and at each change. Endless."""
        next_observation = self._observations()
        while True:
            yield run(next_observation())


# The client.


def _operation(build: Callable[P, Op[T]]) -> Callable[Concatenate[Client, P], T]:
    """The method of `Client` that performs the operation of `build`."""

    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run(self._calls.perform(build(*args, **kwargs)))

    return operations.as_method(method, build)


class Client(scripts.ClientBase[Stream, Lease, Lock, Election], _Closing):
    """A blocking client of one cluster, for any number of threads.

    The client connects at the first call, to the first endpoint that accepts, and goes on to the
    next one when a connection cannot be made or breaks. A read is then sent again. A write is sent
    again only if it certainly had not been sent; otherwise it raises UnknownOutcome.

    Every call may raise ConnectionFailed, Timeout, UnknownOutcome (writes), ProtocolViolation,
    Closed, WrongProcess, and the server's errors, all of them EtcdliteErrors."""

    _make_signal = staticmethod(lambda: _Signal)
    _stream = Stream
    _lease = Lease
    _lock = Lock
    _election = Election

    def close(self) -> None:
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

    watch = scripts.watch_method(operations.watch, Watch)

    def snapshot(self, file: str | os.PathLike[str] | BinaryIO) -> int:
        """Save a backup of the member's whole state. Returns its size in bytes.

        A plain file appears under its name, or is replaced, when the backup is complete and synced;
        until then it is written beside it with ".part" added. A device or a pipe is written to. A
        file object is written to and neither synced nor closed."""
        size_bytes = 0
        request = proto.SnapshotRequest()
        with opened(file) as target, self.stream("Maintenance.Snapshot", request) as stream:
            for response in stream:
                target.write(response.blob)
                size_bytes += len(response.blob)
        return size_bytes

    def perform(self, op: Op[T]) -> T:
        """Send a prepared operation, such as `Put("k", "v")`."""
        return run(self._calls.perform(op))

    # The low level: messages in, messages out.

    def call(
        self, method: str, request: Any, *, timeout_s: float | None = None, repeatable: bool = False
    ) -> Any:
        """Send one message to a method ("KV.Put"). Returns the one message that answers it.

        `repeatable`: carrying it out twice is the same as once, so it may be sent again."""
        return run(self._calls.call(method, request, timeout_s, repeatable))
