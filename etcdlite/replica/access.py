"""The door: who asks, and whether that user may ask for this.

Every request of a client passes `check` on the member that it was sent to, if auth is enabled:
writes before they are proposed, reads when they are served, the other methods before they begin.
The member that applies a write checks it again (`State.apply`), because users and roles may have
changed since.

The user is that of the token that came with the request or, without a token, that of the client's
certificate.
"""

from __future__ import annotations

from typing import Any

from etcdlite.auth import OPEN, OWN, Auth, Author
from etcdlite.replica.state import State
from etcdlite.request import Requester
from etcdlite.tokens import Tokens


class Access:
    """See the module's docstring. Ask `auth.enabled` first: it costs less than a call."""

    def __init__(self, state: State, tokens: Tokens) -> None:
        self.auth: Auth = state.auth
        self._tokens = tokens

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
        if method in OPEN:
            return None  # Even with a token that is not valid.
        author = self.author(session, request_id)
        self.auth.check(author, method, request)
        return author
