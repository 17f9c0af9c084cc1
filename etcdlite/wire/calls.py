"""Calls that are more than one request and one answer: streams, and what waits.

A session (`native.py`, `grpc.py`) keeps a `Calls` and tells it of each message that belongs to such
a call; a `Call` answers through the session whenever it has something. `streams.py` says which
method is which kind of call.

A call may itself be what the member takes for a session, and so ask it for reads and writes.

Invariants: a call that is closed, by either side, sends nothing any more; a call holds back while
it is `blocked`, and goes on when it is woken, so that a client that does not read holds no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from etcdlite.errors import EtcdError
from etcdlite.member import Member


class CallOwner(Protocol):
    """The session, as its calls see it."""

    def send_message(self, request_id: int, method: int, body: bytes) -> None:
        """One message of the answer."""

    def end_call(self, request_id: int, method: int) -> None:
        """The answer is complete."""

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        """The call failed."""

    def is_stalled(self, request_id: int) -> bool:
        """What was sent on this call waits for the client to read."""


class Call:
    """One call in progress."""

    produces = False
    """`produce` is to be called whenever there is time and `is_ready`."""
    is_ready = True
    """`produce` has something to do. What makes it true sends something, too."""
    ticks = False
    """`tick` is to be called several times a second."""

    def __init__(self, member: Member, owner: CallOwner, request_id: int, method: int) -> None:
        self.member = member
        self.owner = owner
        self.request_id = request_id
        self.method = method

    def message(self, body: bytes) -> None:
        """The client sent a message. Raises EtcdError, DecodeError: the call has failed."""

    def finish(self) -> None:
        """The client sends no more messages."""

    def produce(self) -> None:
        """Send a piece; not called while the call is stalled. Raises EtcdError."""

    def wake(self) -> None:
        """The call is not stalled any more."""

    def tick(self, now: float) -> None:
        """Time has passed; `now` is the member's clock."""

    def close(self) -> None:
        """The call is over: forget what it holds."""

    # What a Sink (watch.py) has.

    @property
    def blocked(self) -> bool:
        return self.owner.is_stalled(self.request_id)

    def send(self, body: bytes) -> None:
        self.owner.send_message(self.request_id, self.method, body)

    def end(self) -> None:
        self.owner.end_call(self.request_id, self.method)


class Calls:
    """The calls of one session."""

    def __init__(self, member: Member, owner: CallOwner) -> None:
        self._member = member
        self._owner = owner
        self._open: dict[int, Call] = {}
        self._producing: dict[int, Call] = {}
        self._ticking: dict[int, Call] = {}

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._open

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Call]:
        """The open calls; they may be closed meanwhile."""
        return iter(list(self._open.values()))

    def open(self, request_id: int, method: int, kind: type[Call]) -> None:
        call = kind(self._member, self._owner, request_id, method)
        self._open[request_id] = call
        if call.produces:
            self._producing[request_id] = call
        if call.ticks:
            self._ticking[request_id] = call

    def message(self, request_id: int, body: bytes) -> None:
        """Raises EtcdError, DecodeError."""
        self._open[request_id].message(body)

    def finish(self, request_id: int) -> None:
        """The client sends no more on this call, if it is still open."""
        call = self._open.get(request_id)
        if call is not None:
            call.finish()

    def close(self, request_id: int) -> bool:
        """Forget a call; False if there is none."""
        call = self._open.pop(request_id, None)
        if call is None:
            return False
        self._producing.pop(request_id, None)
        self._ticking.pop(request_id, None)
        call.close()
        return True

    def wake(self, request_id: int) -> None:
        call = self._open.get(request_id)
        if call is not None:
            call.wake()

    @property
    def have_more(self) -> bool:
        """`produce` would send something."""
        return any(call.is_ready and not call.blocked for call in self._producing.values())

    def produce(self) -> None:
        """Let each call that can send a piece of its answer."""
        for request_id, call in list(self._producing.items()):
            if not call.is_ready or call.blocked:
                continue
            try:
                call.produce()
            except EtcdError as failure:
                self._owner.fail(request_id, call.method, failure)

    def disown(self) -> None:
        """The session is gone, and all calls are closed: do not hold it."""
        del self._owner

    def tick(self, now: float) -> None:
        for call in list(self._ticking.values()):
            call.tick(now)
