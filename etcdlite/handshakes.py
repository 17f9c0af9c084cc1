"""Threads for TLS handshakes: a signature with RSA 4096 takes 5 to 20 ms, too long for the loop.
There are two threads, one for clients and one for members, so clients never delay members.

A connection has at most one step in a thread, and reads nothing more from its socket until that is
done. Steps wait by address: the addresses take turns, and of one address the newest comes first. So
a crowd that the thread cannot keep up with delays itself; a client that comes alone hardly waits.
No handshake begins for a connection that the other side has closed; one that goes on may be half
closed, and its request be complete.

A handshake that has begun holds about 50 KiB. So the number of those is limited, and the oldest one
of the address with the most gives way: an honest one ends within a few round trips.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from etcdlite import log
from etcdlite.channel import ChannelError
from etcdlite.loading import start_thread

MAX_HANDSHAKES = 256
"""Handshakes of clients that have begun and are not complete, and as many of members."""


class Stepped(NamedTuple):
    """The result of a step."""

    connection: Any
    plaintext: bytes
    """What followed the end of the handshake."""
    failure: ChannelError | None


class _Line:
    """Steps that wait for a thread."""

    def __init__(self) -> None:
        self._by_host: dict[str, list[tuple[Any, bytes]]] = {}
        self._changed = threading.Condition()

    def put(self, connection: Any, data: bytes) -> None:
        with self._changed:
            self._by_host.setdefault(connection.host, []).append((connection, data))
            self._changed.notify()

    def take(self) -> tuple[Any, bytes]:
        """Wait for a step, and take the newest one of the next address."""
        with self._changed:
            while not self._by_host:
                self._changed.wait()
            host = next(iter(self._by_host))
            items = self._by_host.pop(host)
            item = items.pop()
            if items:
                self._by_host[host] = items
            return item


class Handshakes:
    """The handshakes that have begun and are not complete, and the threads that take their steps.

    A connection has a `channel`, which belongs to the thread from `step` until the result is
    reported, a `host`, `is_member`, `is_closed` and `is_abandoned`."""

    def __init__(self, report: Callable[[Any], None]) -> None:
        """`report` is called in a thread with a `Stepped`."""
        self._report = report
        self._begun: dict[bool, dict[Any, None]] = {False: {}, True: {}}
        """The connections of clients (False) and members, the oldest handshake first."""
        self._lines: dict[bool, _Line] = {}
        """Made with their threads, for the first handshake."""

    def step(self, connection: Any, data: bytes) -> None:
        """Take the next step of a handshake, with these bytes from the other side."""
        line = self._lines.get(connection.is_member)
        if line is None:
            line = _Line()
            run = partial(self._run, line, self._begun[connection.is_member])
            if failure := start_thread("handshakes", run):
                self._report(Stepped(connection, b"", ChannelError(str(failure))))
                return
            self._lines[connection.is_member] = line
        line.put(connection, data)

    def begun(self, connection: Any) -> Any:
        """A step is done, and the handshake is not complete. Returns the connection that must be
        closed for it, or None."""
        begun = self._begun[connection.is_member]
        begun[connection] = None
        if len(begun) <= MAX_HANDSHAKES:
            return None
        ((host, _),) = Counter(one.host for one in begun).most_common(1)
        return next(one for one in begun if one.host == host)

    def end(self, connection: Any) -> None:
        """The handshake is complete, or the connection is closed."""
        self._begun[connection.is_member].pop(connection, None)

    def _run(self, line: _Line, begun: dict[Any, None]) -> None:
        while True:
            connection, data = line.take()
            if connection.is_closed:
                continue
            plaintext, failure = b"", None
            try:
                if connection not in begun and connection.is_abandoned:
                    raise ChannelError("it closed the connection during the handshake")
                plaintext = connection.channel.receive(data)
            except ChannelError as error:
                failure = error
            except Exception as error:
                # The other side may have caused it, so it costs the connection and no more.
                log.error("a fault in a handshake; please report it", error=repr(error))
                failure = ChannelError("a fault in etcdlite")
            self._report(Stepped(connection, plaintext, failure))
