"""Access control: the user of a request, and whether that user may make it.

Every request of a client passes `check` on the member that it was sent to, if auth is enabled:
writes before they are proposed, reads when they are served, the other methods before they begin.
The member that applies a write checks it again (`State.apply`), because users and roles may have
changed since.

The user is that of the token that came with the request or, without a token, that of the client's
certificate.

A client may change users at one member, or log in there, and send its next request to another one,
which has not applied that yet. So a request that is refused here is checked again once the member's
state is current (`retry`). Conversely, a write may pass this check and be refused when it is
applied, because users changed before its place in the log. Nothing of it is carried out then, and
`Writes.propose_outdated` proposes it again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from etcdlite.auth import CHECKS, OWN, Auth, Author, RightsUnknown
from etcdlite.errors import EtcdError
from etcdlite.methods import PUT, RANGE
from etcdlite.raft import Raft
from etcdlite.replica.state import State
from etcdlite.request import Requester, Shares, Waiter
from etcdlite.rights import Rights
from etcdlite.tokens import TokenAhead, Tokens

MAX_RECENT = 1024
"""Tokens that are remembered, with what they permit, until the next tick."""

MAX_RECHECKS = 1024
"""Refused requests that wait until the state is current (`Shares`); more are refused at once.
Requests with a token that is ahead of the state do not count: its signature shows that a user
logged in."""


class Access:
    """See the module's docstring. Ask `auth.enabled` first: it costs less than a call."""

    when_current: Callable[[Callable[[], None], int], None]
    """`when_current(do, size_bytes)` calls `do` once this member has applied all that was committed
    before, or cannot learn what that is; `size_bytes`: what the request holds. Set by `Reads`."""
    when_known: Callable[[Author, Callable[[], None]], None]
    """`when_known(author, do)` calls `do` once the author's rights are known. Set by `Reads`."""

    def __init__(self, state: State, tokens: Tokens, raft: Raft) -> None:
        self.auth: Auth = state.auth
        self._raft = raft
        self._rechecks = Shares()
        self._tokens = tokens
        self._recent: dict[str, tuple[int, Author, Rights]] = {}
        """What the tokens of recent requests permit: the auth revision as of which this holds, the
        author, and its rights. A token that has ended is valid until `forget` is called. (etcd
        drops ended tokens once a second.)"""

    def author(self, session: Requester | None, request_id: int) -> Author | None:
        """For whom a request is; None if it does not say. Raises InvalidAuthToken."""
        if session is None or session.is_member:
            return OWN
        token = session.token(request_id)
        if token:
            return self._tokens.author(self.auth, token)
        name = session.certificate_user
        return Author(name, self.auth.revision) if name else None

    def may_read(self, session: Requester, request_id: int, key: bytes) -> bool:
        """True if a read of one key is permitted, False if `check` must decide."""
        # Hot path: the users of most reads have just read something.
        recent = self._recent.get(session.token(request_id))
        return recent is not None and recent[0] == self.auth.revision and recent[2].read.holds(key)

    def check(self, waiter: Waiter) -> Author | None:
        """Raise the EtcdError that refuses a request. Returns its author."""
        session, request_id, method, request = waiter
        # Hot path: puts and ranges that are permitted. All others take the slow path.
        if session is not None:
            recent = self._recent.get(session.token(request_id))
            if recent is not None and recent[0] == self.auth.revision:
                if method == RANGE:
                    if recent[2].read.holds(request.key, request.range_end):
                        return recent[1]
                elif method == PUT:
                    if recent[2].write.holds(request.key) and not request.prev_kv:
                        return recent[1]
        if CHECKS[method] is None:
            return None  # Even with a token that is not valid.
        author = self.author(session, request_id)
        self.auth.check(author, method, request)
        if method in (PUT, RANGE):
            self._remember(session, request_id, author)
        return author

    def _remember(self, session: Requester | None, request_id: int, author: Author | None) -> None:
        """Remember what a token permits that has just been checked."""
        if session is None or author is None or author.is_member:
            return
        token = session.token(request_id)
        if token:
            if len(self._recent) >= MAX_RECENT:
                self._recent.clear()
            self._recent[token] = (self.auth.revision, author, self.auth.rights(author))

    def forget(self) -> None:
        """Look at tokens again. Call it several times a second."""
        self._recent.clear()

    def admit(
        self,
        waiter: Waiter,
        then: Callable[[EtcdError | None], None],
        size_bytes: int = 0,
        is_current: bool = False,
    ) -> None:
        """Check a request, if need be again later (`retry`), and call `then` with the error that
        refuses it, or None. `size_bytes`: of the request, if that may be large."""
        if self.auth.enabled:
            try:
                self.check(waiter)
            except EtcdError as refused:
                again = partial(self.admit, waiter, then, size_bytes)
                if not self.retry(waiter.session, refused, is_current, again, size_bytes):
                    then(refused)
                return
        then(None)

    def retry(
        self,
        session: Requester | None,
        refused: EtcdError,
        is_current: bool,
        again: Callable[[bool], None],
        size_bytes: int = 0,
    ) -> bool:
        """Whether a check that failed is repeated: then `again(is_current)` is called later, once
        the rights of the user are known, or once the state is current. False if the refusal is
        final. `is_current`: the check that failed saw a current state. Without a leader, a refusal
        is final unless the token is ahead of the state."""
        if isinstance(refused, RightsUnknown):
            self.when_known(refused.author, partial(again, is_current))
        elif is_current:
            return False
        elif isinstance(refused, TokenAhead):
            self.when_current(partial(again, True), size_bytes)
        elif self._raft.leader and self._rechecks.take(session, MAX_RECHECKS):
            self.when_current(partial(self._recheck, session, again), size_bytes)
        else:
            return False
        return True

    def _recheck(self, session: Requester | None, again: Callable[[bool], None]) -> None:
        self._rechecks.free(session)
        again(True)
