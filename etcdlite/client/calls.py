"""Calls over a client's connection to its cluster: failover, retries, deadlines.

This is the lower half of the scripts, and says what a script is; `scripts.py` is the other half.

A script is a generator that does everything but wait. It yields what it needs and is sent the
outcome:

    (signal, until_s)        True when the signal was set, False when that time had come
    Dial(server, ...)        a connected Link; or raises OSError or ChannelError
    Start(script, name)      a function that stops the script, which runs beside this one

A shell runs scripts (`blocking.run` in the calling thread, `aio.run` in the calling task) and does
little else.

Rules that hold for every script:
- a write is sent once: if its connection breaks after that, the caller gets `UnknownOutcome`.
  A read is sent again, to the next endpoint;
- a call waits no longer than its timeout, whatever the server does;
- what is received and not read is bounded, see `link.py`.

Times ending in `_s` that are moments, such as a deadline, are on the clock `time.monotonic`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, NamedTuple, TypeVar

from etcdlite import methods, proto
from etcdlite.channel import Channel, ChannelError
from etcdlite.client import errors
from etcdlite.client.connection import PING, Endpoint, Ticket, cause_of, unary_reply
from etcdlite.client.link import NEVER_S, Broken, Link, Signal
from etcdlite.client.operations import Op
from etcdlite.methods import KEEP_ALIVE, METHOD_BY_NAME, Retry

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 5.0
DEFAULT_DIAL_TIMEOUT_S = 2.0

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0
"""Pauses between attempts (of watches, and of reads without a leader): doubling."""

Script = Generator[Any, Any, T]
"""Yields (signal, until_s), Dial and Start; returns T."""


class Dial(NamedTuple):
    """Connect to a server and wait for its greeting."""

    server: Endpoint
    timeout_s: float
    silence_s: float
    drained: Any
    """`silence_s` and `drained` are for the `Link`."""
    channel: Callable[[], Channel] | None
    """Makes what encrypts the connection; None: it is plain. Raises ChannelError."""


class Login:
    """Who a client is: name, password, and the token that it got for them."""

    def __init__(self, user: str, password: str) -> None:
        self.user = user
        self.password = password
        self.token = ""

    def requests(self) -> list[Any]:
        """The attempts to log in on a new connection. The token stands for the password at every
        member, and costs no hash."""
        with_password = proto.AuthenticateRequest(name=self.user, password=self.password)
        if not self.token:
            return [with_password]
        return [proto.AuthenticateRequest(password=self.token), with_password]


STALE_LOGIN = (errors.InvalidAuthToken, errors.AuthOldRevision, errors.UserEmpty)
"""The request was not carried out, and would be after another login. The last: users were enabled
after this client had connected."""


class Start(NamedTuple):
    """Run a script in the background."""

    script: Script[None]
    name: str


def is_read(method: str, request: Any) -> bool:
    """Whether carrying out the request twice is the same as once, so that it may be sent again."""
    retry = METHOD_BY_NAME[method].retry
    return retry is Retry.ALWAYS or (retry is Retry.IF_READ and _CHANGES_NOTHING[method](request))


def _only_ranges(txn: Any) -> bool:
    ops = (*txn.success, *txn.failure)
    return all(op.request_range or (op.request_txn and _only_ranges(op.request_txn)) for op in ops)


_CHANGES_NOTHING: dict[str, Callable[[Any], bool]] = {
    "KV.Txn": _only_ranges,
    "Maintenance.Alarm": lambda request: request.action == proto.AlarmRequest.GET,
}
assert _CHANGES_NOTHING.keys() == {m.full for m in methods.ROWS if m.retry is Retry.IF_READ}


def error_at(kind: type[errors.EtcdliteError], endpoint: str, text: str) -> errors.EtcdliteError:
    """An error that concerns a server, and says which one."""
    return kind(text=f"{endpoint}: {text}", endpoint=endpoint)


_forks = 0
"""How many forks lie between this process and the first one that imported this module."""


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Calls:
    """A client's connection to its cluster, and the calls over it: failover, retries, deadlines."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        timeout_s: float,
        dial_timeout_s: float,
        make_signal: Callable[[], Signal],
        channel_for: Callable[[Endpoint], Callable[[], Channel] | None],
        login: Login | None = None,
    ) -> None:
        """`login` is None for a client without a user."""
        self.timeout_s = timeout_s
        self.dial_timeout_s = dial_timeout_s
        self.make_signal = make_signal
        self._channel_for = channel_for
        self.login = login
        self._endpoints = endpoints
        self._next_endpoint = 0
        self._link: Link | None = None
        self._left: set[Link] = set()
        """Links that serve only what is open on them."""
        self._process = os.getpid()
        self._forks = _forks
        self._is_closed = False
        self._closing = make_signal()
        """Set for good when the client is closed."""
        self._may_connect = make_signal()
        """The right to connect: one script at a time has it."""
        self._may_connect.set()
        self._failed_at_s = -1.0
        """When every endpoint last failed."""
        self._causes: dict[str, str] = {}

    @property
    def endpoint(self) -> str:
        link = self._link
        if link is not None and not link.failure:
            return link.endpoint
        return str(self._endpoints[self._next_endpoint])

    @property
    def channel(self) -> Channel | None:
        """What encrypts the connection in use; None if it is plain, or there is none."""
        link = self._link
        return None if link is None or link.failure else link.channel

    @property
    def is_foreign(self) -> bool:
        """Whether this process is a fork of the one that made the client.

        Its connection and its leases belong to that one."""
        return self._forks != _forks

    def check_process(self) -> None:
        """Raise WrongProcess in a fork of the process that made the client."""
        if self._forks != _forks:
            raise errors.WrongProcess(
                text=f"this client was made in another process ({self._process}), from which this "
                f"one ({os.getpid()}) was forked: make a client in each process"
            )

    def close(self) -> None:
        """Lose the calls that wait, and refuse later ones."""
        if self.is_foreign:
            return
        self._is_closed = True
        self._closing.set()
        for link in filter(None, (self._link, *self._left)):
            link.close(errors.Closed.text)

    def perform(self, op: Op[T]) -> Script[T]:
        return self.call(op.method, op.request, op.timeout_s, op.repeatable, op.result)

    def call(
        self,
        method: str,
        request: Any,
        timeout_s: float | None = None,
        repeatable: bool = False,
        result: Callable[[Any], Any] = lambda response: response,
    ) -> Script[Any]:
        """Send one message and return `result` of the one that answers it; see `Client.call`.

        Hot: a call that succeeds at once takes this one generator and no other (2 % of a call)."""
        if self._forks != _forks:
            self.check_process()
        rpc = METHOD_BY_NAME[method]
        body = request.encode()
        if timeout_s is None:
            timeout_s = self.timeout_s
        deadline_s = monotonic() + timeout_s
        attempts_left = len(self._endpoints)
        logins_left = 0 if self.login is None else 1
        backoff_s = BACKOFF_FIRST_S
        while True:
            link = self._link
            if link is None or (
                (link.connection.failure or link.connection.silent_since_s is not None)
                and not link.usable()
            ):
                link = yield from self.connected(deadline_s, method, timeout_s)
            if link.is_congested and not (yield from self.drained(link, deadline_s)):
                link.suspect()
                text = f"{method} was not sent within {timeout_s:g} s: others are still being sent"
                raise error_at(errors.Timeout, link.endpoint, text)
            signal = self.make_signal()
            ticket = Ticket(rpc, signal.set)
            try:
                link.open(ticket, body, end=True)
                is_silent = link.connection.silent_since_s is not None
                yield signal, link.wait_limit_s(deadline_s) if is_silent else deadline_s
                if (answer := ticket.answer) is None:
                    answer = yield from self._answer(link, ticket, signal, deadline_s, timeout_s)
                return result(unary_reply(rpc, *answer, link.endpoint))
            except Broken as broken:
                if broken.sent and not (repeatable or is_read(method, request)):
                    text = f"{method} was sent but not answered: {broken.cause}"
                    raise error_at(errors.UnknownOutcome, broken.endpoint, text) from None
                if attempts_left <= 0:
                    raise error_at(errors.ConnectionFailed, broken.endpoint, broken.cause) from None
                attempts_left -= 1
                continue
            except STALE_LOGIN:
                if not logins_left:
                    raise
                logins_left -= 1
                yield from self.log_in_again(link, deadline_s)
                continue
            except errors.NotSupportedForLearner:
                if attempts_left <= 1:
                    raise
                attempts_left -= 1
                self.leave(link)
            except errors.Unavailable:
                is_final = monotonic() + backoff_s >= deadline_s
                self.leave(link)
                if is_final or not (repeatable or is_read(method, request)):
                    raise
            except BaseException:
                link.cancel(ticket)
                raise
            yield from self.pause(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    def _answer(
        self, link: Link, ticket: Ticket, signal: Signal, deadline_s: float, timeout_s: float
    ) -> Script[tuple[int, bytes]]:
        """Wait for the answer of an open request. Raises Broken and Timeout."""
        while ticket.answer is None:
            if ticket.lost:
                raise Broken(link.endpoint, ticket.lost, ticket.sent)
            if monotonic() < deadline_s:
                link.usable()
            elif link.expire(ticket):
                if timeout_s >= self.dial_timeout_s or ticket.method.number == KEEP_ALIVE:
                    self.leave(link)  # It may be cut off from its cluster, and the lease be short.
                text = f"{ticket.method.full} was not answered within {timeout_s:g} s"
                raise error_at(errors.Timeout, link.endpoint, text)
            else:
                # The reader thread is about to say how it ended.
                deadline_s = NEVER_S
            yield signal, link.wait_limit_s(deadline_s)
        return ticket.answer

    def ping(self, link: Link) -> Script[None]:
        """Make sure that the server is there; close the link if it is not."""
        timeout_s = self.dial_timeout_s
        signal = self.make_signal()
        ticket = Ticket(PING, signal.set)
        try:
            link.open(ticket, b"", end=True)
            yield from self._answer(link, ticket, signal, monotonic() + timeout_s, timeout_s)
        except errors.Timeout:
            link.close_silent()
        except Broken:
            pass  # The link is closed, and each of its tickets knows it.
        except BaseException:
            link.cancel(ticket)
            raise

    def drained(self, link: Link, deadline_s: float) -> Script[bool]:
        """Wait until the server takes in what was sent; False if the deadline comes first."""
        while link.is_congested and link.usable():
            is_drained = yield link.drained, link.wait_limit_s(deadline_s)
            if not is_drained and monotonic() >= deadline_s:
                return False
        link.drained.set()  # for the next one that waits
        return True

    def pause(self, seconds: float) -> Script[None]:
        """Wait, but not longer than until the client is closed."""
        if (yield self._closing, monotonic() + seconds):
            self._closing.set()  # for the next one that waits

    def connected(self, deadline_s: float, method: str, timeout_s: float) -> Script[Link]:
        """The link in use, or a new one. Raises ConnectionFailed, Timeout and Closed."""
        self.check_process()
        asked_at_s = monotonic()
        if not (yield self._may_connect, deadline_s):
            what = f"{method} was not answered within {timeout_s:g} s"
            raise error_at(errors.Timeout, self.endpoint, what)
        try:
            link = self._link
            if link is not None:
                if link.usable():
                    return link
                self._link = None
                self._try_next()
            if self._failed_at_s > asked_at_s:
                # Another call tried every endpoint while this one waited.
                raise self._connect_error()
            link = self._link = yield from self._dial(deadline_s)
            if self._is_closed:
                link.close(errors.Closed.text)
                raise errors.Closed()
            return link
        finally:
            self._may_connect.set()

    def connect_apart(self, deadline_s: float) -> Script[Link]:
        """A link for one stream. Raises ConnectionFailed, Timeout and Closed."""
        self.check_process()
        if not (yield self._may_connect, deadline_s):
            raise error_at(errors.Timeout, self.endpoint, "no connection in time")
        try:
            return (yield from self._dial(deadline_s))
        finally:
            self._may_connect.set()

    def _dial(self, deadline_s: float) -> Script[Link]:
        """Try each endpoint once, beginning with the next one."""
        causes: dict[str, str] = {}
        for left in range(len(self._endpoints), 0, -1):
            if self._is_closed:
                raise errors.Closed()
            server = self._endpoints[self._next_endpoint]
            endpoint = str(server)
            # A server that does not answer leaves time for those after it.
            now_s = monotonic()
            limit_s = min(self.dial_timeout_s, max(0.001, deadline_s - now_s) / left)
            drained = self.make_signal()
            try:
                channel = self._channel_for(server)
                link: Link = yield Dial(server, limit_s, self.dial_timeout_s, drained, channel)
                if self.login is not None:
                    yield from self._log_in(link, self.login, now_s + limit_s)
                return link
            except (Broken, errors.Timeout, errors.Unavailable) as failure:
                # Of the login: another member may be able to check it.
                cause = failure.cause if isinstance(failure, Broken) else failure.text
                causes[endpoint] = cause.removeprefix(f"{endpoint}: ")
            except ChannelError as error:
                causes[endpoint] = str(error)
            except OSError as error:
                causes[endpoint] = cause_of(error, limit_s)
            self._try_next()
        self._failed_at_s, self._causes = monotonic(), causes
        raise self._connect_error()

    def _log_in(self, link: Link, login: Login, deadline_s: float) -> Script[None]:
        """Make the connection that of the user; closes it if that fails. Raises what a login
        raises, AuthFailed for example, and Broken."""
        timeout_s = max(0.001, deadline_s - monotonic())
        rpc = METHOD_BY_NAME["Auth.Authenticate"]
        try:
            for request in login.requests():
                signal = self.make_signal()
                ticket = Ticket(rpc, signal.set)
                link.open(ticket, request.encode(), end=True)
                answer = yield from self._answer(link, ticket, signal, deadline_s, timeout_s)
                try:
                    login.token = unary_reply(rpc, *answer, link.endpoint).token
                    return
                except errors.AuthNotEnabled:
                    return
                except STALE_LOGIN:
                    if request.name:
                        raise
        except BaseException as failure:
            link.close(f"the login failed: {failure}")
            raise

    def log_in_again(self, link: Link, deadline_s: float) -> Script[None]:
        """After one of `STALE_LOGIN`. If another call has just logged in, its token is used."""
        if self.login is not None and not link.failure:
            with suppress(Broken):  # The caller finds the link closed.
                yield from self._log_in(link, self.login, deadline_s)

    def leave(self, link: Link) -> None:
        """Use the next endpoint from now on. What is open on the link stays there."""
        if link is self._link and len(self._endpoints) > 1:
            self._left.add(link)
            self._link = None
            self._try_next()
        for idle in [each for each in tuple(self._left) if not each.connection.open_tickets()]:
            self._left.discard(idle)
            idle.close("another endpoint is in use")

    def _try_next(self) -> None:
        self._next_endpoint = (self._next_endpoint + 1) % len(self._endpoints)

    def _connect_error(self) -> errors.ConnectionFailed:
        """The error that names, for each endpoint, the cause."""
        text = "; ".join(f"{endpoint}: {cause}" for endpoint, cause in self._causes.items())
        return errors.ConnectionFailed(text=text, endpoint=next(reversed(self._causes), ""))
