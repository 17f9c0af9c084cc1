"""Handshakes whose steps take long: a signature with RSA 4096 takes 5 to 20 ms, which the loop must
not wait for. They run in two threads, one for clients and one for members, so that a crowd of
clients never delays members.

A connection has at most one step in a thread, and reads nothing more from its socket until that is
done. A handshake holds about 50 KiB. So the number of unfinished ones is limited, and the oldest
gives way: an honest one ends within some round trips, long before it is the oldest.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from etcdlite import log
from etcdlite.channel import ChannelError

MAX_HANDSHAKES = 256
"""Unfinished handshakes of clients, and as many of members."""


class Stepped(NamedTuple):
    """The result of a step."""

    connection: Any
    plaintext: bytes
    """What followed the end of the handshake."""
    failure: ChannelError | None


class Handshakes:
    """The unfinished handshakes, and the threads that take their steps."""

    def __init__(self, report: Callable[[Any], None]) -> None:
        """`report` is called in a thread with a `Stepped`."""
        self._report = report
        self._unfinished: dict[bool, dict[Any, None]] = {False: {}, True: {}}
        """By whether they are of members, the oldest first."""
        self._queues: dict[bool, queue.SimpleQueue[tuple[Any, bytes]]] = {}
        """Made with their threads, for the first handshake."""
        self.failed = {False: 0, True: 0}
        """Handshakes that failed so far, by whether they were of members."""

    def step(self, connection: Any, data: bytes, is_member: bool) -> Any:
        """Take the next step of a handshake, with these bytes from the other side. Returns the
        connection that must be closed for it, or None.

        `connection` has a `channel`, which belongs to the thread until the result is reported."""
        unfinished = self._unfinished[is_member]
        unfinished[connection] = None
        waiting = self._queues.get(is_member)
        if waiting is None:
            waiting = self._queues[is_member] = queue.SimpleQueue()
            threading.Thread(
                target=self._run, args=(waiting,), name="handshakes", daemon=True
            ).start()
        waiting.put((connection, data))
        return next(iter(unfinished)) if len(unfinished) > MAX_HANDSHAKES else None

    def end(self, connection: Any, is_member: bool) -> None:
        """The handshake is complete, or the connection is closed."""
        self._unfinished[is_member].pop(connection, None)

    def _run(self, waiting: queue.SimpleQueue[tuple[Any, bytes]]) -> None:
        while True:
            connection, data = waiting.get()
            if connection.is_closed:
                continue
            plaintext, failure = b"", None
            try:
                plaintext = connection.channel.receive(data)
            except ChannelError as error:
                failure = error
            except Exception as error:
                # The other side may have caused it, so it costs the connection and no more.
                log.error("a fault in a handshake; please report it", error=repr(error))
                failure = ChannelError("a fault in etcdlite")
            self._report(Stepped(connection, plaintext, failure))
