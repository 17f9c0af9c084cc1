"""What the server drives: the protocol of one connection, sans-IO."""

from __future__ import annotations

from typing import Any, Protocol


class Session(Protocol):
    """One connection's protocol, sans-IO: `native.py`, `grpc.py`, `http.py`."""

    out: list[Any]
    """Bytes to send; the session says so (`on_output`) when it gets the first."""
    unsent_bytes: int
    """Bytes in `out` and those that were taken from it but could not be sent yet."""
    is_open: bool
    """The client has said what it must before it may be idle."""
    is_closing: bool
    """Nothing is read any more; close when everything is sent."""
    is_aborted: bool
    """Close at once."""

    @property
    def is_full(self) -> bool:
        """Read no more for now: enough input waits."""

    @property
    def is_blocked(self) -> bool:
        """The client does not read: streams hold back, until `unblocked`."""

    @property
    def is_idle(self) -> bool:
        """Nothing that was asked for is unanswered or unsent, streams apart."""

    @property
    def has_more(self) -> bool:
        """`produce` would give something now."""

    def receive(self, data: bytes) -> None: ...

    def produce(self) -> None: ...

    def unblocked(self) -> None: ...

    def tick(self, now: float) -> None:
        """To be called several times a second."""

    def shut_down(self) -> None:
        """The server stops: end the streams. May be called again and again."""

    def closed(self) -> None:
        """The connection is gone."""


class Opening:
    """In place of a session until the first bytes tell which one it is."""

    def __init__(self) -> None:
        self.first = b""
        self.out: list[Any] = []
        self.unsent_bytes = 0
        self.is_open = False
        self.is_closing = False
        self.is_aborted = False
        self.is_full = False
        self.is_blocked = False
        self.is_idle = True
        self.has_more = False

    def receive(self, data: bytes) -> None:
        self.first += data

    def produce(self) -> None: ...

    def unblocked(self) -> None: ...

    def tick(self, now: float) -> None: ...

    def shut_down(self) -> None: ...

    def closed(self) -> None: ...
