"""Streams, watches, leases, locks and elections: what both clients do, once, as generators.

`calls.py` says what a script is. Each class here holds what needs no waiting, and the scripts of
its methods; the shells subclass it and run them.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from etcdlite import frames, proto
from etcdlite.channel import Channel
from etcdlite.client import connection, operations, recipes
from etcdlite.client.calls import (
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    DEFAULT_DIAL_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    STALE_LOGIN,
    Calls,
    Login,
    Script,
    Start,
    error_at,
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
from etcdlite.client.link import NEVER_S, Broken, Link, Signal, StreamTicket, WatchTicket
from etcdlite.methods import METHOD_BY_NAME

P = ParamSpec("P")
T = TypeVar("T")

PING_AFTER_S = 15.0
"""A watch that received nothing for this long pings the server."""

MIN_KEEP_ALIVE_INTERVAL_S = 0.1

LEASE_CHECK_INTERVAL_S = 1.0
"""How soon a candidate in line notices that its own lease is lost."""


# Streams.


class StreamBase:
    """A stream of messages on a connection of its own."""

    def __init__(self, calls: Calls, method: str, first: Any, timeout_s: float | None) -> None:
        self._calls = calls
        self._method = METHOD_BY_NAME[method]
        self._first = first
        self._timeout_s = timeout_s
        self._wake = calls.make_signal()
        self._opened: tuple[Link, StreamTicket] | None = None
        self._is_over = False

    def __repr__(self) -> str:
        where = self._opened[0].endpoint if self._opened else "nowhere yet"
        return f"<{type(self).__name__} {self._method.full} to {where}>"

    @property
    def endpoint(self) -> str:
        """The server that the stream comes from."""
        return self._parts()[0].endpoint

    def _parts(self) -> tuple[Link, StreamTicket]:
        if self._opened is None:
            raise RuntimeError("a stream is opened by `async with`")
        return self._opened

    def _begin(self) -> Script[None]:
        link = yield from self._calls.connect_apart(monotonic() + self._calls.timeout_s)
        ticket = StreamTicket(self._method, self._wake.set, link)
        self._opened = link, ticket
        if self._first is not None:
            try:
                with contextlib.suppress(Broken):  # The iteration finds it broken.
                    link.open(ticket, self._first.encode(), end=True)
            except Exception:
                self.cancel()  # The caller gets no stream to close.
                raise

    def _send(self, message: Any) -> Script[None]:
        link, ticket = self._parts()
        body = message.encode()
        until_s = monotonic() + self._calls.timeout_s
        if link.is_congested and not (yield from self._calls.drained(link, until_s)):
            link.close(connection.cause_of(BlockingIOError(), 0))
        with contextlib.suppress(Broken):
            link.send(ticket, body)
        if link.failure:
            raise error_at(ConnectionFailed, link.endpoint, link.failure)

    def _close_send(self) -> None:
        link, ticket = self._parts()
        link.close_send(ticket)

    def cancel(self) -> None:
        """End the stream and free its connection. The iteration ends too."""
        link, ticket = self._parts()
        if self._calls.is_foreign:
            return
        self._is_over = True
        link.cancel(ticket)
        link.close("the stream was cancelled")
        self._wake.set()

    def _next(self) -> Script[Any]:
        """The next message; None at the end."""
        link, ticket = self._parts()
        self._calls.check_process()
        while (item := None if self._is_over else ticket.take()) is None:
            if self._is_over:
                return None
            if ticket.lost or link.failure:
                raise error_at(ConnectionFailed, link.endpoint, ticket.lost or link.failure)
            link.resume_reading()
            until_s = NEVER_S if self._timeout_s is None else monotonic() + self._timeout_s
            if not (yield self._wake, until_s):
                what = f"{self._method.full} was not answered within {self._timeout_s:g} s"
                raise error_at(Timeout, link.endpoint, what)
        flags, body = item
        if flags & frames.END:
            self._is_over = True
            connection.reply_body(flags, body, link.endpoint)
            return None
        return connection.decode_reply(self._method, body, link.endpoint)


# Watches.


class WatchBase:
    """A watch that outlives its connections.

    A watch has a stream (a ticket on a link) or none. `_take` takes messages from the stream until
    it is over; `_open` opens one where the cursor stands, after the pause that is due."""

    def __init__(self, calls: Calls, cursor: operations.WatchCursor) -> None:
        self._calls = calls
        self._cursor = cursor
        self._method = METHOD_BY_NAME["Watch.Watch"]
        self._wake = calls.make_signal()
        self._is_closed = False
        self._stream: tuple[Link, WatchTicket] | None = None
        self._pause_s = self._opens_at_s = self._pings_at_s = 0.0
        """The last pause before opening a stream; when the next opening and the ping are due."""
        self._is_login_stale = False
        """The next attempt logs in again first. A second stale login in a row is an error."""
        self._events: deque[operations.Event] = deque()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"revision {self.revision}"
        return f"<{type(self).__name__} of {self._cursor}, {state}>"

    def close(self) -> None:
        """End the watch. The iteration ends too, in whatever thread or task it runs."""
        self._is_closed = True
        self._wake.set()
        if self._stream is not None and not self._calls.is_foreign:
            link, ticket = self._stream
            link.cancel(ticket)

    @property
    def revision(self) -> int:
        """Every event up to this revision has been received."""
        return self._cursor.next_revision - 1

    def request_progress(self) -> None:
        """Ask for a progress mark: a batch without events that follows all events so far."""
        if self._stream is not None:
            link, ticket = self._stream
            message = proto.WatchRequest(progress_request=proto.WatchProgressRequest())
            with contextlib.suppress(Broken):  # The watch resumes elsewhere.
                link.send(ticket, message.encode())

    def _begin(self) -> Script[None]:
        """Return when the server has confirmed the watch."""
        timeout_s = self._cursor.timeout_s
        deadline_s = monotonic() + (self._calls.timeout_s if timeout_s is None else timeout_s)
        try:
            while not self._cursor.created:
                if self._is_closed:
                    raise Closed(text="the watch is closed")
                if self._stream is None:
                    yield from self._open(deadline_s, patient=False)
                elif (batch := self._take()) is not None:
                    self._events.extend(batch.events)
                elif not self._cursor.created:
                    yield from self._wait(deadline_s)
        except BaseException:
            self.close()
            raise

    def first_event(self, deadline_s: float, lease: LeaseBase | None) -> Script[operations.Event]:
        """Begin, wait for an event, and close; see `follow`."""
        try:
            yield from self._begin()
            while True:
                until_s = deadline_s
                if lease is not None:
                    until_s = min(until_s, monotonic() + LEASE_CHECK_INTERVAL_S)
                try:
                    event = yield from self._next_event(until_s)
                except Timeout:
                    if lease is not None and lease.lost:
                        raise LeaseLost() from None
                    if monotonic() >= deadline_s:
                        what = f"still waiting for {self._cursor}"
                        raise error_at(Timeout, self._calls.endpoint, what) from None
                else:
                    assert event is not None, "only this script closes this watch"
                    return event
        finally:
            self.close()

    def _received_event(self) -> operations.Event | None:
        """The next event, if it is here. Hot: where events come fast, none takes a script."""
        events = self._events
        while not events:
            if (batch := self._take()) is None:
                return None
            events.extend(batch.events)
        return events.popleft()

    def _next_event(self, deadline_s: float) -> Script[operations.Event | None]:
        """None when the watch is closed."""
        while (event := self._received_event()) is None:
            batch = yield from self._next_batch(deadline_s)
            if batch is None:
                return None
            self._events.extend(batch.events)
        return event

    def _awaited_event(self, timeout_s: float | None) -> Script[operations.Event]:
        """Raises Timeout if no event comes in time, Closed if the watch is closed."""
        until_s = NEVER_S if timeout_s is None else monotonic() + timeout_s
        if (event := (yield from self._next_event(until_s))) is None:
            raise Closed(text="the watch is closed")
        return event

    def _next_batch(self, deadline_s: float = NEVER_S) -> Script[operations.WatchBatch | None]:
        """None when the watch is closed."""
        self._calls.check_process()
        if self._events and not self._is_closed:
            # They arrived with the confirmation of the watch, or are left of another batch.
            events = tuple(self._events)
            self._events.clear()
            return operations.WatchBatch(self.revision, events)
        while not self._is_closed:
            if self._stream is None:
                yield from self._open(deadline_s, patient=True)
            elif (batch := self._take()) is not None:
                return batch
            else:
                yield from self._wait(deadline_s)
        return None

    def _take(self) -> operations.WatchBatch | None:
        """Take a batch from the stream. None: none is here; or the stream is over."""
        if self._stream is None:
            return None
        link, ticket = self._stream
        while not self._is_closed:
            is_over = ticket.over
            item = ticket.take()
            if item is None:
                if is_over:
                    # The link was lost; or this reader was too slow, and has now caught up.
                    self._stream = None
                    self._pause(BACKOFF_FIRST_S if ticket.lost else 0.0)
                return None
            flags, body = item
            try:
                if flags & frames.END:
                    connection.reply_body(flags, body, link.endpoint)
                    raise Unavailable()
                batch = self._cursor.feed(
                    connection.decode_reply(self._method, body, link.endpoint)
                )
            except EtcdliteError as failure:
                # The server may keep the stream open, without the watch.
                self._stream = None
                if not self._calls.is_foreign:
                    link.cancel(ticket)
                if isinstance(failure, Unavailable):
                    self._calls.leave(link)
                    self._back_off()
                    return None
                may_log_in = self._calls.login is not None and not self._is_login_stale
                if may_log_in and isinstance(failure, STALE_LOGIN):
                    self._is_login_stale = True
                    return None
                self.close()
                raise
            self._pause_s = 0.0
            self._pings_at_s = monotonic() + PING_AFTER_S
            self._is_login_stale = False
            if batch is not None:
                return batch
        return None

    def _wait(self, deadline_s: float) -> Script[None]:
        """Wait until a message has come, or the stream is over."""
        if self._stream is None:
            return
        link, _ = self._stream
        until_s = min(deadline_s, self._pings_at_s)
        if (yield self._wake, link.wait_limit_s(until_s)) or not link.usable():
            return
        now_s = monotonic()
        if now_s >= self._pings_at_s:
            self._pings_at_s = now_s + PING_AFTER_S
            yield from self._calls.ping(link)
        elif now_s >= deadline_s:
            raise error_at(Timeout, link.endpoint, "nothing came from the watch in time")

    def _open(self, deadline_s: float, *, patient: bool) -> Script[None]:
        """Open a stream at the position of the watch, after the pause that is due.

        Raises ConnectionFailed if that fails; if `patient`, makes the next pause longer instead."""
        if monotonic() < self._opens_at_s:
            yield self._wake, min(deadline_s, self._opens_at_s)
            if deadline_s <= monotonic() < self._opens_at_s:
                raise error_at(Timeout, self._calls.endpoint, "the watch is not connected")
        if self._is_closed:
            return
        limit_s = self._calls.timeout_s
        try:
            link = yield from self._calls.connected(monotonic() + limit_s, "Watch.Watch", limit_s)
            if self._is_login_stale:
                yield from self._calls.log_in_again(link, monotonic() + limit_s)
            ticket = WatchTicket(self._method, self._wake.set)
            link.open(ticket, self._cursor.request().encode(), end=False)
        except (ConnectionFailed, Timeout, Unavailable, Broken) as failure:
            if not patient and not isinstance(failure, Broken):
                raise
            self._back_off()
            return
        self._stream = link, ticket
        self._pings_at_s = monotonic() + PING_AFTER_S
        if self._is_closed:
            link.cancel(ticket)

    def _back_off(self) -> None:
        self._pause(min(2 * self._pause_s, BACKOFF_MAX_S) or BACKOFF_FIRST_S)

    def _pause(self, pause_s: float) -> None:
        """Open no stream for `pause_s`."""
        self._pause_s = pause_s
        self._opens_at_s = monotonic() + pause_s


# Recipes.


def follow(
    calls: Calls,
    recipe: recipes.Recipe[T],
    deadline_s: float = NEVER_S,
    lease: LeaseBase | None = None,
) -> Script[Any]:
    """Run a recipe until it reports a KeyValue, or to its end; returns that, or its result.

    Its waiting ends at the deadline with Timeout, or with the lease, with LeaseLost."""
    step: Callable[[Any], Any] = recipe.send
    outcome: Any = None
    try:
        while not isinstance(wanted := step(outcome), operations.KeyValue):
            step = recipe.send
            try:
                if isinstance(wanted, operations.Op):
                    outcome = yield from calls.perform(wanted)
                else:
                    outcome = yield from WatchBase(calls, wanted).first_event(deadline_s, lease)
            except EtcdliteError as error:
                step, outcome = recipe.throw, error
        return wanted
    except StopIteration as stop:
        return stop.value


# Leases.


class LeaseClock:
    """Until when a lease certainly lives, as its holder sees it.

    The server counts a lease's time from when it handles the request. Here it is counted from
    before the request is sent, so this clock runs out first. A lease once lost stays lost, even if
    a late answer says that it was renewed: its holder may have acted on the loss."""

    def __init__(self, asked_at_s: float, ttl_s: float) -> None:
        self._ends_at_s = asked_at_s + ttl_s
        self._is_lost = False

    def renew(self, asked_at_s: float, ttl_s: float, now_s: float) -> None:
        """The server, asked at that moment, has renewed the lease."""
        if not self.lost(now_s):
            self._ends_at_s = asked_at_s + ttl_s

    def end(self) -> None:
        """The server says that the lease is gone."""
        self._is_lost = True

    def lost(self, now_s: float) -> bool:
        """Whether the lease may be gone. May run in several threads: it only ever becomes true."""
        if now_s >= self._ends_at_s:
            self._is_lost = True
        return self._is_lost


class LeaseBase:
    """A lease that is granted, kept alive in the background, and revoked."""

    def __init__(self, calls: Calls, ttl: int, id: int) -> None:
        self._calls = calls
        self._asked = (ttl, id)
        self._clock: LeaseClock | None = None
        self._is_revoked = False
        self._stop = calls.make_signal()
        """Set when the lease is revoked here."""
        self._ended = calls.make_signal()
        """Set for good when the lease is lost, or revoked here."""
        self._stop_keep_alive: Callable[[], None] = lambda: None
        self.id = 0
        self.ttl = ttl
        """Seconds, as granted."""

    def __int__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        state = "lost" if self.lost else "alive"
        return f"<{type(self).__name__} {self.id:x}, ttl {self.ttl} s, {state}>"

    @property
    def lost(self) -> bool:
        """Whether the lease may have ended on the server: revoked, or not renewed within its time.

        Judged by this process's clock, on the safe side. Once true it stays true."""
        return self._clock is None or self._clock.lost(monotonic())

    def holding(self, recipe: Callable[[int], recipes.Recipe[T]], deadline_s: float) -> Script[T]:
        """Begin, and follow the recipe made for the lease's id; if it fails, revoke the lease."""
        yield from self._begin()
        try:
            outcome = yield from follow(self._calls, recipe(self.id), deadline_s, self)
            if self.lost:  # The answers took longer than the lease.
                raise LeaseLost()
            return outcome
        except BaseException:
            # The key goes with the lease.
            yield from self._revoke()
            raise

    def _begin(self) -> Script[None]:
        if self.id:
            raise RuntimeError("a lease object serves for one lease")
        ttl, id = self._asked
        asked_at_s = monotonic()
        grant = yield from self._calls.perform(operations.lease_grant(ttl, id=id))
        self.id, self.ttl = grant.id, grant.ttl
        self._clock = LeaseClock(asked_at_s, grant.ttl)
        keep_alive = self._keep_alive(self._clock)
        self._stop_keep_alive = yield Start(keep_alive, f"etcdlite lease {self.id:x}")

    def _wait_lost(self, timeout_s: float | None) -> Script[bool]:
        if (yield self._ended, NEVER_S if timeout_s is None else monotonic() + timeout_s):
            self._ended.set()  # for the next one that waits
        return self.lost

    def _revoke(self) -> Script[None]:
        self._is_revoked = True
        self._stop.set()
        self._stop_keep_alive()
        self._ended.set()
        gone = LeaseNotFound, ConnectionFailed, UnknownOutcome, Timeout, Unavailable, Closed
        with contextlib.suppress(*gone):  # Or it will be when its time is over.
            yield from self._calls.perform(operations.lease_revoke(self.id))

    def _keep_alive(self, clock: LeaseClock) -> Script[None]:
        wait_s = self.ttl / 3
        while not self.lost:
            yield self._stop, monotonic() + wait_s
            if self._is_revoked:
                return
            asked_at_s = monotonic()
            timeout_s = max(MIN_KEEP_ALIVE_INTERVAL_S, self.ttl / 3)
            try:
                ttl = yield from self._calls.perform(
                    operations.lease_keep_alive_once(self.id, timeout_s=timeout_s)
                )
            except (LeaseNotFound, Closed):
                clock.end()
            except EtcdliteError:
                # Retry: the cause may pass before the lease's time is over.
                wait_s = max(MIN_KEEP_ALIVE_INTERVAL_S, self.ttl / 20)
            else:
                wait_s = ttl / 3
                clock.renew(asked_at_s, ttl, monotonic())
        self._ended.set()


# Locks and elections.


LeaseT = TypeVar("LeaseT", bound=LeaseBase)


class PlaceBase(Generic[LeaseT]):
    """A place in line, with a lease of its own: what a lock and a leadership have in common."""

    def __init__(
        self,
        calls: Calls,
        make_lease: Callable[[int], LeaseT],
        name: operations.Bytes,
        ttl: int,
        timeout_s: float | None,
        value: bytes = b"",
    ) -> None:
        self._calls = calls
        self._make_lease = make_lease
        self._prefix = recipes.line(name)
        self._ttl = ttl
        self._timeout_s = timeout_s
        self._value = value
        self._lease: LeaseT | None = None
        self._held: recipes.Held | None = None

    def __repr__(self) -> str:
        state = "not held" if self._lease is None else "lost" if self.lost else "held"
        return f"<{type(self).__name__} {self._prefix[:-1]!r}, {state}>"

    @property
    def lost(self) -> bool:
        """Whether the place may belong to another: its lease ended, or it was given up."""
        return self._lease is None or self._lease.lost

    @property
    def lease(self) -> LeaseT:
        """The lease that holds the place."""
        if self._lease is None:
            raise RuntimeError("not held")
        return self._lease

    @property
    def key(self) -> bytes:
        """The key that stands for the place."""
        return self._checked().key

    @property
    def revision(self) -> int:
        """A number that grows from holder to holder: a fencing token."""
        return self._checked().revision

    @property
    def guard(self) -> operations.Comparison:
        """For `txn(compare=[lock.guard], ...)`: takes effect only while this place is held."""
        return self._checked().guard

    def _checked(self) -> recipes.Held:
        if self._held is None:
            raise RuntimeError("not held")
        return self._held

    def _acquire(self, timeout_s: float | None) -> Script[None]:
        if self._lease is not None:
            raise RuntimeError("held already")
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline_s = NEVER_S if timeout_s is None else monotonic() + timeout_s
        lease = self._make_lease(self._ttl)

        def recipe(id: int) -> recipes.Recipe[recipes.Held]:
            return recipes.stand_in_line(self._prefix, id, self._value)

        self._held = yield from lease.holding(recipe, deadline_s)
        self._lease = lease

    def _give_up(self) -> LeaseT | None:
        """Forget the place. Returns the lease to be revoked."""
        lease, self._lease, self._held = self._lease, None, None
        return lease

    def _proclaim(self, value: operations.Bytes) -> Script[int]:
        return follow(self._calls, recipes.proclaim(self._checked(), operations.to_bytes(value)))


class ElectionBase(Generic[LeaseT]):
    """An election, by the prefix of its keys."""

    def __init__(
        self, calls: Calls, make_lease: Callable[[int], LeaseT], name: operations.Bytes, ttl: int
    ) -> None:
        self._calls = calls
        self._make_lease = make_lease
        self._name = name
        self._ttl = ttl

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {operations.to_bytes(self._name)!r}>"

    def _candidacy(self, value: operations.Bytes, timeout_s: float | None) -> tuple[Any, ...]:
        """The arguments of a `PlaceBase`."""
        value = operations.to_bytes(value)
        return self._calls, self._make_lease, self._name, self._ttl, timeout_s, value

    def _leader(self) -> Script[operations.KeyValue | None]:
        return follow(self._calls, recipes.leader(recipes.line(self._name)))

    def _observations(self) -> Callable[[], Script[operations.KeyValue]]:
        """A function that makes the script of the next observation."""
        recipe = recipes.observe(recipes.line(self._name))
        return lambda: follow(self._calls, recipe)


# The client.


StreamT = TypeVar("StreamT", bound=StreamBase)
LockT = TypeVar("LockT", bound=PlaceBase[Any])
ElectionT = TypeVar("ElectionT", bound=ElectionBase[Any])


def watch_method(
    build: Callable[P, operations.WatchCursor], kind: Callable[[Calls, operations.WatchCursor], T]
) -> Callable[Concatenate[Any, P], T]:
    """The method of a client that makes a watch of this kind."""

    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return kind(self._calls, build(*args, **kwargs))

    return operations.as_method(method, build, kind.__name__)


def _plain(_: connection.Endpoint) -> None:
    """The channel of a plain connection is none."""


class ClientBase(Generic[StreamT, LeaseT, LockT, ElectionT]):
    """What both clients have in common. Each says by its attributes what it makes."""

    _make_signal: Callable[[], Callable[[], Signal]]
    """Makes a maker of signals for one client."""
    _stream: Callable[[Calls, str, Any, float | None], StreamT]
    _lease: Callable[[Calls, int, int], LeaseT]
    _lock: Callable[[Calls, Callable[[int], LeaseT], operations.Bytes, int, float | None], LockT]
    _election: Callable[[Calls, Callable[[int], LeaseT], operations.Bytes, int], ElectionT]

    def __init__(
        self,
        endpoints: str | Sequence[str] = (connection.DEFAULT_ENDPOINT,),
        timeout_s: float = DEFAULT_TIMEOUT_S,
        dial_timeout_s: float = DEFAULT_DIAL_TIMEOUT_S,
        *,
        cacert: str | os.PathLike[str] = "",
        cert: str | os.PathLike[str] = "",
        key: str | os.PathLike[str] = "",
        insecure_skip_tls_verify: bool = False,
        server_name: str = "",
        secret_file: str = "",
        user: str = "",
        password: str = "",
    ) -> None:
        """Raises ValueError for an endpoint that is not understood, or a file that cannot be used.

        `endpoints`: one or several of "127.0.0.1:2379" or "https://127.0.0.1:2379". `timeout_s` is
        how long a call may take, unless it says otherwise. `dial_timeout_s` is how long connecting
        to one endpoint may take, and how long a server may stay silent after a call has timed out.

        TLS is used for https://, and for an endpoint without a scheme if one of the paths is given.
        `cacert`: certificates of the CAs that the server's must be from (default: this system's).
        `cert` and `key`: this client's certificate and key. `insecure_skip_tls_verify` accepts any
        certificate. `server_name` is what the certificate must be for, if not the endpoint's host.

        `secret_file`: a copy of the servers' client-secret-file. It encrypts the connections and
        proves both sides to each other, without TLS.

        `user` and `password`: whom to log in, on each connection, and again when the token has
        ended. While the cluster has no users enabled, they mean nothing. Without TLS or a secret
        they are sent as they are."""
        servers = connection.parse_endpoints(endpoints)
        if cacert or cert or key:
            servers = tuple(one._replace(scheme=one.scheme or "https") for one in servers)
        channel_for: Callable[[connection.Endpoint], Callable[[], Channel] | None] = _plain
        if any(server.scheme == "https" for server in servers):
            from etcdlite.client import tls

            settings = tls.Settings(
                cacert=os.fspath(cacert),
                cert=os.fspath(cert),
                key=os.fspath(key),
                insecure_skip_tls_verify=insecure_skip_tls_verify,
                server_name=server_name,
            )
            channel_for = tls.Dialer(settings).channel_for
        if secret_file:
            if any(server.scheme == "https" for server in servers):
                raise ValueError("secret_file is for endpoints without TLS: use one of the two")
            from etcdlite.client import secret

            channel_for = secret.make_channel_for(secret_file)
        login = Login(user, password) if user else None
        self._calls = Calls(
            servers, timeout_s, dial_timeout_s, self._make_signal(), channel_for, login
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.endpoint}>"

    @property
    def endpoint(self) -> str:
        """The server in use ("127.0.0.1:2379"), or the next one to be tried if there is none."""
        return self._calls.endpoint

    @property
    def certificate_ends_s(self) -> float | None:
        """When the certificate of the server in use ends (Unix time); None without a connection or
        without TLS."""
        return getattr(self._calls.channel, "ends_s", None)

    @property
    def timeout_s(self) -> float:
        """How long a call may take, unless it says otherwise."""
        return self._calls.timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._calls.timeout_s = seconds

    @property
    def dial_timeout_s(self) -> float:
        """How long connecting to one endpoint may take."""
        return self._calls.dial_timeout_s

    @dial_timeout_s.setter
    def dial_timeout_s(self, seconds: float) -> None:
        self._calls.dial_timeout_s = seconds

    def lease(self, ttl: int, *, id: int = 0) -> LeaseT:
        """A lease of `ttl` seconds, kept alive inside its `with` block, revoked at its end."""
        return type(self)._lease(self._calls, ttl, id)

    def lock(
        self, name: operations.Bytes, *, ttl: int = 10, timeout_s: float | None = None
    ) -> LockT:
        """The lock `name`, held inside its `with` block.

        If the holder dies, the lock is free `ttl` seconds later. `timeout_s` bounds the wait for it
        (None: forever; 0: take it now or not at all)."""
        return type(self)._lock(self._calls, self.lease, name, ttl, timeout_s)

    def election(self, name: operations.Bytes, *, ttl: int = 10) -> ElectionT:
        """The election `name`. If the leader dies, the next one leads `ttl` seconds later."""
        return type(self)._election(self._calls, self.lease, name, ttl)

    def stream(self, method: str, first: Any = None, *, timeout_s: float | None = None) -> StreamT:
        """A stream ("Watch.Watch") on a connection of its own.

        It is open when this returns (`Client`), or inside of `async with` (`AsyncClient`). `first`,
        if given, is the only message sent. `timeout_s` bounds the wait for each message (None:
        forever). A stream is not resumed when its connection breaks."""
        return type(self)._stream(self._calls, method, first, timeout_s)
