"""What the protocols of clients share beyond `etcdlite/session.py`: the member and its calls; and
what stands in place of a session until the first bytes tell which one it is."""

from __future__ import annotations

from collections.abc import Callable

from etcdlite.errors import EtcdError
from etcdlite.member import Member
from etcdlite.session import Session
from etcdlite.wire.calls import Calls


class ClientSession(Session):
    """A session that asks a member; a subclass sets both attributes."""

    member: Member
    calls: Calls

    def awaits(self, request_id: int) -> bool:
        """The request is open, and not cancelled."""
        raise NotImplementedError

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        """The answer to a unary request; dropped if the request was cancelled."""
        raise NotImplementedError

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        """The answer to a request, or the end of a stream, that failed."""
        raise NotImplementedError

    @property
    def has_more(self) -> bool:
        return self.calls.have_more

    def produce(self) -> None:
        self.calls.produce()

    def unblocked(self) -> None:
        self.member.unblocked(self)
        for call in self.calls:
            call.wake()

    def tick(self, now: float) -> None:
        super().tick(now)
        self.calls.tick(now)

    def closed(self) -> None:
        super().closed()
        self.member.forget(self)
        self.calls.disown()


class Opening(Session):
    """Gathers the first bytes of a connection."""

    def __init__(self, on_output: Callable[[Session], None], clock: Callable[[], float]) -> None:
        super().__init__(on_output, clock)
        self.first = b""

    def receive(self, data: bytes) -> None:
        self.first += data
