"""The other end of a session, in process."""

from __future__ import annotations

from etcdlite.session import Session


def take_output(session: Session) -> bytes:
    """All that the session has told its owner to send, as if it were sent."""
    was_blocked = session.is_blocked
    outbox = session.outbox
    assert sum(map(len, outbox.parts)) == outbox.unsent_bytes, "it counts what waits to be sent"
    data = b""
    while outbox.is_queued or outbox.is_stuck:
        piece = bytes(outbox.take())
        outbox.sent(len(piece))
        data += piece
        outbox.is_queued = bool(outbox.parts)
    if was_blocked and not session.is_blocked:
        session.unblocked()
    return data
