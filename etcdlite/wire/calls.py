"""Calls that are not one request with one answer: streams, and requests that wait.

A session keeps a `Calls` and passes it each message of such a call; a `Call` answers through the
session whenever it has something to send. `streams.py` maps methods to kinds of calls.

A call may act as a session towards the member, to issue reads and writes of its own.

Invariants: a closed call sends nothing; a call holds back while it is `blocked` and resumes when it
is woken, so that a client that does not read occupies no memory.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import Protocol

from etcdlite.errors import EtcdError
from etcdlite.member import Member
from etcdlite.request import Session
from etcdlite.session import Outbox
from etcdlite.watch import Quota

PIECES_PER_SLICE = 2
"""Pieces of answers that one call of `Calls.produce` makes."""

CLOSED_PER_SLICE = 256
"""Calls of a closed session that are closed at once; `produce` closes the rest."""


MAX_UNANSWERED = 4096
"""What a connection may have asked the member without an answer yet, also in calls that it has
closed. With more, its input waits. What waits for other clients, as watches do, does not count."""

REQUEST_BYTES = 512
"""The memory that an open request occupies, approximately, unless `hold` says that it is more."""


class CallOwner(Session, Protocol):
    """The session, as its calls see it."""

    calls: Calls
    outbox: Outbox

    @property
    def protocol(self) -> str:
        """ "native", "grpc" or "http", for example."""

    def send_message(self, request_id: int, method: int, body: bytes) -> None:
        """Send one message of the answer."""

    def end_call(self, request_id: int, method: int) -> None:
        """End the answer."""

    def is_stalled(self, request_id: int) -> bool:
        """The client does not read the output of this call."""

    def resume(self, request_id: int) -> None:
        """This call has something to produce."""


class Call:
    is_closed = False
    """`close` was called, or is about to be."""
    is_ready = False
    """`produce` has work to do. `resume` makes it true."""
    wakes = False
    """Call `wake` when the client reads any of its output again."""
    ticks = False
    """Call `tick` several times a second."""
    is_stream = True
    """A server that stops ends it, and does not wait for its end."""

    def __init__(self, member: Member, owner: CallOwner, request_id: int, method: int) -> None:
        self.member = member
        self.owner = owner
        self.request_id = request_id
        self.method = method
        self.opened()

    def opened(self) -> None:
        """Begin. A subclass sets its attributes here; it has no `__init__`. Raises EtcdError if the
        client may not open such a call."""

    def message(self, body: bytes) -> None:
        """Process a message of the client. Raises EtcdError, DecodeError; the call then fails."""

    def finish(self) -> None:
        """The client closed its sending side."""

    def resume(self) -> None:
        """Have `produce` called, a piece at a time, until the call is closed or `is_ready` is set
        to False. Does nothing once it is closed."""
        if not self.is_closed:
            self.is_ready = True
            self.owner.resume(self.request_id)

    def produce(self) -> None:
        """Send a piece. Not called while the call is blocked. Raises EtcdError."""

    def wake(self) -> None:
        """The client reads again."""

    def tick(self, now: float) -> None:
        """Do what depends on time; `now` is the member's clock."""

    def close(self) -> None:
        """The call is over: release its resources."""

    # For the member, when the call is the session of requests of its own.

    def answered(self) -> None:
        """The member has answered something that `Calls.unanswered` counts."""
        self.owner.calls.unanswered -= 1
        if not self.owner.outbox.is_queued:
            self.owner.outbox.wake()  # Input may wait for this.

    is_member = False

    @property
    def certificate_user(self) -> str:
        return self.owner.certificate_user

    def token(self, request_id: int) -> str:
        return self.owner.token(self.request_id)

    def logged_in(self, token: str) -> None:
        pass

    # The interface of a Sink (watch.py).

    @property
    def blocked(self) -> bool:
        return self.owner.is_stalled(self.request_id)

    def send(self, body: bytes) -> None:
        self.owner.send_message(self.request_id, self.method, body)

    def end(self) -> None:
        self.owner.end_call(self.request_id, self.method)


class Calls:
    """The calls of one session.

    Calls that produce take turns. One that the client does not read leaves the rotation until it is
    woken, so that open calls cost nothing while they wait."""

    def __init__(self, member: Member, owner: CallOwner) -> None:
        self.quota = Quota()
        self.held: dict[int, int] = {}
        """What requests hold beyond `REQUEST_BYTES`, by their ids."""
        self.unanswered = 0
        """What calls, open or closed, have asked the member and is not answered yet."""
        self.checks = 0
        """Renewals that had to wait for a check."""
        self._member = member
        self._owner = owner
        self._open: dict[int, Call] = {}
        self.ready: dict[int, Call] = {}
        """Calls with something to produce, in turn; all of them once the session is closed."""
        self._waking: dict[int, Call] = {}
        self.ticking: dict[int, Call] = {}
        self._is_disowned = False

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._open

    def __len__(self) -> int:
        return len(self._open)

    def hold(self, request_id: int, size_bytes: int) -> None:
        """Count what an open request, or its call, holds beyond `REQUEST_BYTES`."""
        self.held[request_id] = self.held.get(request_id, 0) + size_bytes

    def requests_bytes(self, open_ids: Collection[int]) -> int:
        """The memory that open requests occupy, approximately. Forgets what closed ones held."""
        self.held = {n: size for n, size in self.held.items() if n in open_ids}
        return REQUEST_BYTES * (len(open_ids) + self.unanswered) + sum(self.held.values())

    def open(self, request_id: int, method: int, kind: type[Call]) -> Call:
        """Raises EtcdError if the client may not open such a call."""
        call = kind(self._member, self._owner, request_id, method)
        self._open[request_id] = call
        if call.wakes:
            self._waking[request_id] = call
        if call.ticks:
            self.ticking[request_id] = call
        return call

    def message(self, request_id: int, body: bytes) -> None:
        """Raises EtcdError, DecodeError."""
        self._open[request_id].message(body)

    def finish(self, request_id: int) -> None:
        """The client closed its sending side of this call, if it is still open."""
        call = self._open.get(request_id)
        if call is not None:
            call.finish()

    def has_stream(self, request_id: int) -> bool:
        """Whether this is an open call that `is_stream`."""
        call = self._open.get(request_id)
        return call is not None and call.is_stream

    def close(self, request_id: int) -> bool:
        """Close a call; False if it is not open."""
        call = self._open.pop(request_id, None)
        if call is None:
            return False
        self.ready.pop(request_id, None)
        if call.wakes:
            self._waking.pop(request_id, None)
        if call.ticks:
            self.ticking.pop(request_id, None)
        call.is_closed = True
        call.close()
        return True

    def resume(self, request_id: int) -> None:
        """A call has something to produce."""
        self.ready[request_id] = self._open[request_id]

    def wake(self, request_id: int) -> None:
        """The client reads the output of this call again."""
        call = self._open.get(request_id)
        if call is not None:
            if call.is_ready:
                self.ready[request_id] = call
            call.wake()

    def wake_all(self) -> None:
        """The client reads again."""
        for call in list(self._waking.values()):
            call.wake()

    @property
    def have_more(self) -> bool:
        """`produce` has work to do now."""
        return bool(self.ready) and (self._is_disowned or not self._owner.is_blocked)

    def produce(self) -> None:
        """Let the next ready calls send a piece of their answers each."""
        if self._is_disowned:
            for request_id in list(islice(self._open, CLOSED_PER_SLICE)):
                self.close(request_id)
            return
        ready = self.ready
        for _ in range(min(PIECES_PER_SLICE, len(ready))):
            if self._owner.is_blocked:
                return
            request_id, call = next(iter(ready.items()))
            del ready[request_id]
            if call.blocked:
                continue
            try:
                call.produce()
            except EtcdError as failure:
                self._owner.fail(request_id, call.method, failure)
            if call.is_ready and request_id in self._open:
                ready[request_id] = call

    def disown(self) -> None:
        """The session is closed: close the calls, and break the reference cycle with it."""
        del self._owner
        self._is_disowned = True
        self.ready = self._open
        self.produce()

    def tick(self, now: float) -> None:
        for call in list(self.ticking.values()):
            call.tick(now)
