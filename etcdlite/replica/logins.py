"""Passwords: checked and hashed off the loop, by the member that receives them.

Computing a hash takes tens of milliseconds and `Cost.memory_bytes` of memory. So the owner of the
member runs the jobs of `take` in threads, `MAX_RUNNING` at a time. The hosts of clients take turns,
and for each host the user names. Many attempts from one host, or for one name, delay only those.
A name that does not exist is treated like the others. Hashes differ in cost, so its password is
compared with the hash of an existing user, for each name always the same one. So the time does not
tell which users exist.

A password is never proposed, stored or logged: entries, files and other members see only hashes.
"""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Callable
from typing import Any

from etcdlite import log, passwords, proto
from etcdlite.auth import MAX_NAME_BYTES
from etcdlite.errors import CANCELED, INVALID_ARGUMENT, UNAVAILABLE, EtcdError, error
from etcdlite.methods import REHASH, TOKEN_KEY
from etcdlite.passwords import MAX_PASSWORD_BYTES, Cost
from etcdlite.proto import varint
from etcdlite.replica.state import State
from etcdlite.request import Waiter
from etcdlite.tokens import Tokens

MAX_RUNNING = 2
"""Jobs that run at the same time."""

MAX_PER_NAME = 16
MAX_PER_HOST = 128
MAX_WAITING = 512
"""Jobs that wait for their turn: of a host for one user name, of a host, and in all. A further one
is answered "too many requests"."""


MAX_TOKEN_BYTES = 16 << 10
"""Of a token that a client sends as a password."""


def check_size(request: proto.AuthenticateRequest) -> None:
    """Raise EtcdError if no login can be so large. Call it before the request waits for anything:
    its sender need not be a user, and many may wait."""
    if len(request.name.encode()) > MAX_NAME_BYTES:
        raise error("AuthFailed")
    if len(request.password.encode()) > (MAX_PASSWORD_BYTES if request.name else MAX_TOKEN_BYTES):
        text = f"etcdlite: a password has at most {MAX_PASSWORD_BYTES} bytes"
        raise EtcdError(INVALID_ARGUMENT, text)


class Job:
    """A computation for a thread."""

    def __init__(
        self, waiter: Waiter, compute: Callable[[], Any], done: Callable[[Any], None]
    ) -> None:
        """`done` is called in the loop with the result of `compute`, or with an EtcdError."""
        self._waiter = waiter
        self._compute = compute
        self._done = done
        self._result: Any = None

    @property
    def host(self) -> str:
        """Where the client is; empty if that is not known."""
        return str(getattr(self._waiter.session, "client", "")).rpartition(":")[0]

    @property
    def is_awaited(self) -> bool:
        """The client still waits for the answer."""
        return self._waiter.is_awaited

    def drop(self) -> None:
        """Do not run: nobody waits for the answer."""
        self._done(error("Canceled"))

    def run(self) -> None:
        """Compute. Called in a thread."""
        try:
            self._result = self._compute()
        except EtcdError as failure:
            self._result = failure.with_traceback(None)
        except (MemoryError, RuntimeError) as failure:  # libsodium finds no memory.
            self.fail(failure)
        except Exception as failure:
            # A client may have caused it. It must not keep one of the `MAX_RUNNING` places.
            log.error("a fault in a login; please report it", error=type(failure).__name__)
            self._result = EtcdError(UNAVAILABLE, "etcdlite: a fault in this member; see its log")

    def fail(self, failure: Exception) -> None:
        """Note that there is no memory, or no thread, to compute it."""
        text = f"etcdlite: cannot compute the hash of a password: {failure}"
        self._result = EtcdError(UNAVAILABLE, text)

    def finish(self) -> None:
        """Hand the result on. Called in the loop."""
        self._done(self._result)


class Logins:
    """The passwords that are being checked or hashed."""

    def __init__(
        self,
        state: State,
        tokens: Tokens,
        propose: Callable[[int, proto.Message], None],
        cost: Cost,
    ) -> None:
        """`propose(method, request)` proposes a request of this member itself. New hashes have this
        `cost`."""
        self._state = state
        self._tokens = tokens
        self._propose = propose
        self._cost = cost
        self._lines: dict[str, dict[str, deque[Job]]] = {}
        """Jobs that wait, by host and user name, in the order of their turns. None is empty."""
        self._waiting = 0
        self._running = 0

    # For the owner.

    def take(self) -> Job | None:
        """The next job to run in a thread; None if there is none, or enough run."""
        while self._running < MAX_RUNNING and self._lines:
            host = next(iter(self._lines))
            names = self._lines.pop(host)
            name = next(iter(names))
            line = names.pop(name)
            job = line.popleft()
            if line:
                names[name] = line
            if names:
                self._lines[host] = names
            self._waiting -= 1
            if job.is_awaited:
                self._running += 1
                return job
            job.drop()
        return None

    def finished(self, job: Job) -> None:
        self._running -= 1
        job.finish()

    @property
    def are_under_way(self) -> bool:
        """Some passwords are not checked or hashed yet."""
        return bool(self._running or self._waiting)

    # For the handlers.

    def hash(
        self, waiter: Waiter, name: str, password: str, done: Callable[[str | EtcdError], None]
    ) -> None:
        """Hash a password of this user; `done` gets the hash as requests hold it, in base64. Raises
        EtcdError."""

        def compute() -> str:
            return base64.b64encode(passwords.hash_password(password, self._cost)).decode()

        self._add(name, password, Job(waiter, compute, done))

    def log_in(self, waiter: Waiter) -> None:
        """Answer an AuthenticateRequest, from a state that is linearizable. Raises EtcdError."""
        request, auth = waiter.request, self._state.auth
        if not auth.enabled:
            raise error("AuthNotEnabled")
        if not auth.key and not self.are_under_way:
            # The users came from etcd, which has no such key. It is applied by the time that the
            # password is checked.
            self._propose(TOKEN_KEY, proto.TokenKey(seed=self._tokens.new_seed()))
        name, password = request.name, request.password
        if not name:
            # A token instead of a password; see `wire/native.py`.
            if not password:
                raise error("AuthFailed")
            self._tokens.author(auth, password)
            self._answer(waiter, password)
            return
        user = auth.user(name)
        has_password = user is not None and not (user.options and user.options.no_password)
        stored = user.password if user is not None and has_password else b""
        decoy = auth.decoy(name)  # Also for a name that needs none: see above.
        revision, key, cost, tokens = auth.revision, auth.key, self._cost, self._tokens

        def compute() -> tuple[str, bytes]:
            """A token, and the hash to replace a bcrypt hash, if it is one."""
            is_right = _compare(password, stored or decoy, name, cost)
            if not (is_right and stored):
                raise error("AuthFailed")
            new = passwords.hash_password(password, cost) if passwords.is_bcrypt(stored) else b""
            # The key may have been rotated during the check. The new one signs no older logins.
            seed = key or (auth.key if auth.revision == revision else b"")
            if not seed:
                text = "etcdlite: the key that signs tokens is being made; try again"
                raise EtcdError(UNAVAILABLE, text)
            return tokens.issue(seed, name, revision), new

        def done(result: tuple[str, bytes] | EtcdError) -> None:
            if isinstance(result, EtcdError):
                if result.code != CANCELED:  # The client may just have given up.
                    known = {"user_name": name, "client": getattr(waiter.session, "client", "")}
                    log.warn("a login failed", "failed login", why=result.text, **known)
                waiter.fail(result)
                return
            token, new = result
            if new:
                self._propose(REHASH, proto.Rehash(name=name, old=stored, new=new))
            self._answer(waiter, token)

        self._add(name, password, Job(waiter, compute, done))

    def _answer(self, waiter: Waiter, token: str) -> None:
        waiter.session.logged_in(token)
        body = token.encode()
        waiter.reply(self._state.header + b"\x12" + varint(len(body)) + body)

    def _add(self, name: str, password: str, job: Job) -> None:
        if len(password.encode()) > MAX_PASSWORD_BYTES:
            text = f"etcdlite: a password has at most {MAX_PASSWORD_BYTES} bytes"
            raise EtcdError(INVALID_ARGUMENT, text)
        names = self._lines.get(job.host, {})
        line = names.get(name, deque())
        if (
            self._waiting >= MAX_WAITING
            or len(line) >= MAX_PER_NAME
            or sum(map(len, names.values())) >= MAX_PER_HOST
        ):
            raise error("RequestTooManyRequests")
        line.append(job)
        names[name] = line
        self._lines[job.host] = names
        self._waiting += 1


def _compare(password: str, stored: bytes, name: str, cost: Cost) -> bool:
    """Whether `stored` is a hash of the password. Takes long in any case."""
    if stored:
        try:
            return passwords.is_right(password, stored)
        except EtcdError as unreadable:
            # The client must not learn from the answer, or its time, that the user exists.
            log.warn(unreadable.text, "unreadable password", user_name=name)
    passwords.hash_password(password, cost)
    return False
