"""What the client protocols share beyond `etcdlite/session.py`, and the detection of the protocol
that a new connection speaks."""

from __future__ import annotations

from collections.abc import Callable

from etcdlite import log, request
from etcdlite.frames import MAGIC, SECRET_MAGIC, SECRET_REFUSAL
from etcdlite.member import Member
from etcdlite.session import Session
from etcdlite.wire.calls import MAX_UNANSWERED, Calls
from etcdlite.wire.http2_state import PREFACE

NO_LEADER_ELECTIONS = 3
"""Election timeouts without a leader that a stream with `hasleader` survives, as in etcd."""

INVALID_TOKEN = " "
"""Represents an empty token, which is not valid. "" means that a request has no token."""

_AGREED = {"etcdlite": "native", "h2": "grpc", "http/1.1": "http"}
"""By the name in the handshake of TLS (RFC 7301)."""

TLS_REFUSAL = b"\x15\x03\x01\x00\x02\x02\x28"
"""A fatal alert of TLS: handshake failure."""

SNIFF_BYTES = 4
"""The number of bytes that distinguish gRPC ("PRI ") from HTTP/1.1 ("PUT ")."""


class ClientSession(Session, request.Session):
    """A session that passes requests to a member; a subclass sets both attributes."""

    __slots__ = ()

    member: Member
    calls: Calls

    def logged_in(self, token: str) -> None:
        """Does nothing if each request brings its token."""

    @property
    def is_full(self) -> bool:
        return self.calls.unanswered >= MAX_UNANSWERED

    @property
    def has_more(self) -> bool:
        return self.calls.have_more

    def produce(self) -> None:
        self.calls.produce()

    def resume(self, request_id: int) -> None:
        """A call has something to produce."""
        self.calls.resume(request_id)
        self.outbox.wake()

    def unblocked(self) -> None:
        self.member.reads.wake(self)
        self.calls.wake_all()

    @property
    def may_rest(self) -> bool:
        waiting_bytes = self.outbox.waiting_bytes + self.inbox.waiting_bytes
        return self.is_open and not (waiting_bytes or self.calls.ticking)

    def tick(self, now: float) -> None:
        super().tick(now)
        self.calls.tick(now)

    def closed(self) -> None:
        super().closed()
        self.member.reads.wake(self)
        self.calls.disown()


class LeaderLoss:
    """Whether streams that need a leader must end: after three election timeouts without one."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._since: float | None = None

    def is_over(self, now: float) -> bool:
        """Call it several times a second."""
        member = self._member
        if member.raft.leader:
            self._since = None
        elif self._since is None:
            self._since = now
        return (
            self._since is not None
            and now - self._since > NO_LEADER_ELECTIONS * member.options.election_timeout_s
        )


class Opening(Session):
    """Stands in for a session until the first bytes identify the protocol."""

    def __init__(
        self,
        on_output: Callable[[Session], None],
        clock: Callable[[], float],
        only_http: bool = False,
        wants_secret: bool = False,
    ) -> None:
        """`wants_secret`: the native protocol must come through the channel of a secret."""
        super().__init__(on_output, clock)
        self.first = b""
        """The bytes received so far."""
        self.found = ""
        """The protocol, once it is clear: native, grpc or http; or secret, for a channel."""
        self._only_http = only_http
        self._wants_secret = wants_secret
        self._is_inside = False
        """What is received is the plaintext of a secret's channel."""
        self.agreed = ""
        """The protocol agreed on in the handshake of TLS; empty: the first bytes tell."""

    def enter_channel(self) -> bytes:
        """The channel of a secret begins with the bytes that this returns; what `receive` gets from
        now on is its plaintext."""
        self._is_inside = True
        return self.begin_again()

    def begin_again(self) -> bytes:
        """Wait for the first bytes again. Returns what was received so far."""
        data, self.first, self.found = self.first, b"", ""
        return data

    def receive(self, data: bytes) -> None:
        first = self.first = self.first + data
        if not first:
            return
        if self.agreed in _AGREED:
            self.found = _AGREED[self.agreed]
        elif MAGIC.startswith(first[: len(MAGIC)]) and not self._only_http:
            if self._wants_secret and not self._is_inside:
                why = "the client has no secret, this server wants one: name the client-secret-file"
                about = {"why": why, "remote_addr": self.client}
                log.warn("refused a client", "client without a secret", **about)
                self.outbox.append(SECRET_REFUSAL)  # It tells the client what is missing.
                self.is_closing = True
            else:
                self.found = "native"
        elif self._is_inside:
            self.abort("the channel of a secret is for the native protocol only")
        elif SECRET_MAGIC.startswith(first[: len(SECRET_MAGIC)]) and not self._only_http:
            if self._wants_secret:
                self.found = "secret"
            else:
                self.abort("the client has a secret, this server has none: set client-secret-file")
        elif first[:1] == b"\x16":
            self.outbox.append(TLS_REFUSAL)
            self.is_closing = True
            self.why_aborted = "TLS on a plain port: the client's endpoint must begin with http://"
            what, key = "closed a connection", "TLS on a plain port"
            log.warn(what, key, why=self.why_aborted, remote_addr=self.client)
        elif not first[:1].isupper():
            self.abort(f"it does not speak a known protocol: {first[:16].hex()}")
        elif self._only_http:
            self.found = "http"
        elif len(first) >= SNIFF_BYTES:
            self.found = "grpc" if PREFACE.startswith(first[: len(PREFACE)]) else "http"
