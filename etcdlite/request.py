"""A request that waits for its answer, and the session that the answer goes to.

Sessions are the connections of `wire/`, and `Asked` for requests that the program makes itself.
Everything below `wire/` knows a session only by the protocol here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, Protocol

from etcdlite import log
from etcdlite.errors import EtcdError
from etcdlite.methods import AUTHOR, KEEP_ALIVE, NAMES


class Requester(Protocol):
    __slots__ = ()

    @property
    def is_member(self) -> bool:
        """A member asks, for itself or for a client whose rights it has checked."""

    @property
    def certificate_user(self) -> str:
        """The user whom the client's certificate names, for requests without a token; or ""."""

    @abstractmethod
    def token(self, request_id: int) -> str:
        """The auth token of an open request, or ""."""


class Session(Requester, Protocol):
    """Where a request came from and where its answer goes."""

    __slots__ = ()

    @property
    @abstractmethod
    def is_blocked(self) -> bool:
        """The client does not read its answers: hold back long answers."""

    def logged_in(self, token: str) -> None:
        """Auth.Authenticate is answered with this token."""

    @abstractmethod
    def awaits(self, request_id: int) -> bool:
        """Whether the client still waits for the answer. If not, skip the work and `reply` with
        anything, so that the session forgets the request."""

    @abstractmethod
    def reply(self, request_id: int, method: int, body: bytes) -> None:
        """Answer a unary request."""

    @abstractmethod
    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        """Answer a unary request, or end a stream, with an error."""


class Waiter(NamedTuple):
    """A request, and the session that waits for its answer."""

    session: Any
    """A `Session`, or None if no client of this member waits. For a check of rights, a
    `Requester` is enough."""
    request_id: int
    method: int
    request: Any
    """The decoded message."""

    @property
    def is_awaited(self) -> bool:
        return self.session.awaits(self.request_id)  # type: ignore[no-any-return]

    def reply(self, body: bytes) -> None:
        self.session.reply(self.request_id, self.method, body)

    def fail(self, failure: EtcdError) -> None:
        """Answer with an error, if somebody waits."""
        if self.session is not None:
            self.session.fail(self.request_id, self.method, failure)

    def answer(self, answer: bytes | EtcdError) -> None:
        """Answer with an encoded response or an error."""
        if isinstance(answer, EtcdError):
            self.fail(answer)
        else:
            self.reply(answer)

    def then(self, do: Callable[[], None]) -> Callable[[object], None]:
        """A callback that calls `do`, which may raise EtcdError, unless it gets an EtcdError. An
        error is the answer."""

        def done(outcome: object) -> None:
            if isinstance(outcome, EtcdError):
                self.fail(outcome)
                return
            try:
                do()
            except EtcdError as failure:
                self.fail(failure)

        return done


Steps = Generator[None, None, bytes]
"""Work in steps that returns an encoded response; that of an applier lacks its header."""

Done = Callable[["bytes | EtcdError"], None]
"""Called once with the answer to a question: the encoded response, or why there is none."""


def connection(session: Any) -> Any:
    """The session of the connection that a request came over: calls (`wire/calls.py`) are sessions
    of their own, with that one as their `owner`."""
    return getattr(session, "owner", session)


class Shares(dict[Any, int]):
    """How many places of a limited kind each connection has. Those that have some may have equal
    shares of all places, at least one."""

    def take(self, session: Any, places: int) -> bool:
        """Take one of `places`; False if the connection of the session has its share."""
        owner = connection(session)
        taken = self.get(owner, 0)
        if taken >= max(1, places // (len(self) + (not taken))):
            return False
        self[owner] = taken + 1
        return True

    def free(self, session: Any) -> None:
        owner = connection(session)
        self[owner] -= 1
        if not self[owner]:
            del self[owner]


class OwnRequester:
    """What is the same in all sessions of requests that members make themselves."""

    is_member = True
    certificate_user = ""

    def token(self, request_id: int) -> str:
        return ""

    def logged_in(self, token: str) -> None:
        pass


class Asked(OwnRequester):
    """The session of a request that the program makes to its own member."""

    is_blocked = False

    def __init__(self, done: Done) -> None:
        self._done = done

    def awaits(self, request_id: int) -> bool:
        return True

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        self._done(body)

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        self._done(failure)


def empty_read(done: Done) -> Waiter:
    """A read that needs no data: `done` is called in its turn."""
    return Waiter(Asked(done), 0, KEEP_ALIVE, None)


SHOWN_KEY_BYTES = 32
"""The log shows this much of a key."""


def about(waiter: Waiter) -> dict[str, str]:
    """Method, beginning of the key, and client of a request, for the log; what is known of them."""
    session, _, method, request = waiter
    ops = (*getattr(request, "success", ()), *getattr(request, "failure", ()))
    parts = (op.request_put or op.request_range or op.request_delete_range for op in ops)
    for inner in (request, *getattr(request, "compare", ()), *parts):
        if key := getattr(inner, "key", b""):
            break
    known = {
        "method": NAMES[method],
        "key": key[:SHOWN_KEY_BYTES].decode("utf-8", "backslashreplace") if key else "",
        "client": getattr(session, "client", ""),
    }
    return {name: value for name, value in known.items() if value}


def warn_slow(what: str, took_s: float, expected_s: float, requests: Sequence[Waiter]) -> None:
    """Log that something took longer than expected, with the first request that it was for."""
    if not log.limited(what):
        requests = [waiter for waiter in requests if waiter.method != AUTHOR]
        log.warn(
            f"{what} took too long",
            took=f"{took_s * 1000:.0f}ms",
            requests=len(requests),
            expected_duration=f"{expected_s * 1000:.0f}ms",
            **(about(requests[0]) if requests else {}),
        )
