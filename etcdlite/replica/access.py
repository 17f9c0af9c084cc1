"""The door: who asks, and whether that user may ask for this.

Every request of a client passes `check` on the member that it was sent to, if auth is enabled:
writes before they are proposed, reads when they are served, the other methods before they begin.
The member that applies a write checks it again (`State.apply`), because users and roles may have
changed since.

The user is that of the token that came with the request or, without a token, that of the client's
certificate.

A client may log in at one member and send its next request to another one, which has not applied
yet what the token depends on. Such a request waits until the member's state is current (`retry`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from etcdlite.auth import CHECKS, OWN, Auth, Author, RightsUnknown
from etcdlite.errors import EtcdError
from etcdlite.methods import PUT, RANGE
from etcdlite.replica.state import State
from etcdlite.request import Requester
from etcdlite.rights import Rights
from etcdlite.tokens import TokenAhead, Tokens

MAX_RECENT = 1024
"""So many tokens are remembered, with what they permit, until the next tick."""


class Access:
    """See the module's docstring. Ask `auth.enabled` first: it costs less than a call."""

    when_current: Callable[[Callable[[], None]], None]
    """`when_current(do)` calls `do` once this member has applied all that was committed before, or
    cannot learn what that is. Set by `Reads`."""
    when_known: Callable[[Author, Callable[[], None]], None]
    """`when_known(author, do)` calls `do` once the author's rights are known. Set by `Reads`."""

    def __init__(self, state: State, tokens: Tokens) -> None:
        self.auth: Auth = state.auth
        self._tokens = tokens
        self._recent: dict[str, tuple[int, Author, Rights]] = {}
        """What the tokens of recent requests permit: the auth revision as of which this holds, the
        author, and its rights. A token that has ended counts until `forget` is called."""

    def author(self, session: Requester | None, request_id: int) -> Author | None:
        """For whom a request is; None if it does not say. Raises InvalidAuthToken."""
        if session is None or session.is_member:
            return OWN
        token = session.token(request_id)
        if token:
            return self._tokens.author(self.auth, token)
        name = session.certificate_user
        return Author(name, self.auth.revision) if name else None

    def check(
        self, session: Requester | None, request_id: int, method: int, request: Any
    ) -> Author | None:
        """Raise the EtcdError that refuses a request. Returns its author."""
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

    def retry(self, refused: EtcdError, again: Callable[[], None]) -> bool:
        """Whether a check failed only because this member is behind, or does not know the rights of
        the user yet. Then `again` is called when that is over; it must not call this."""
        if isinstance(refused, TokenAhead):
            self.when_current(again)
        elif isinstance(refused, RightsUnknown):
            self.when_known(refused.author, again)
        else:
            return False
        return True
