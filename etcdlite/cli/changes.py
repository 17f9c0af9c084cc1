"""Which prefixes of keys change most: counts that fade, and the watch that feeds them.

The watch gets all changes with their values, so it may be too much for this machine: after
`MAX_EVENTS` or `MAX_BYTES` in an interval it stops until the next one, and the rates are those of
the time in which it ran. Memory is bounded: at most `2 * MAX_PREFIXES` counts of prefixes, of at
most `MAX_PREFIX_BYTES` each. When they are more, those that changed least are dropped, so a prefix
with less than about one of `MAX_PREFIXES` changes may be missing or be counted low.
"""

from __future__ import annotations

import heapq
import threading
import time
from typing import Any, NamedTuple

from etcdlite.cli.session import cause
from etcdlite.client import Client, EtcdliteError, PermissionDenied, Timeout

MAX_PREFIXES = 1000
MAX_PREFIX_BYTES = 200

SHOWN_PREFIXES = 15

MAX_EVENTS = 2000
MAX_BYTES = 4 << 20
"""Of one interval. The client may hold as much again that has come and is not counted."""

FADE = 0.7
"""What an interval leaves of the counts of those before: they show about three intervals."""

MIN_COUNT = 0.1
"""A count that has faded below this is dropped."""

RETRY_S = 1.0

POLL_S = 0.2
"""The watch looks for the end of its interval at least this often."""


def prefix_of(key: bytes, depth: int) -> bytes:
    """The key up to its `depth`-th "/", which is not the first byte; all of it with less of them,
    or if `depth` is 0."""
    position = 0
    for _ in range(depth):
        position = key.find(b"/", position + 1 if position == 0 else position) + 1
        if not position:
            return key[:MAX_PREFIX_BYTES]
    return key[: position or None][:MAX_PREFIX_BYTES]


class Changes(NamedTuple):
    """The prefixes that change most."""

    rates: tuple[tuple[bytes, float], ...] = ()
    """(prefix, changes per second), the fastest first; at most `SHOWN_PREFIXES`."""
    share: float = 0.0
    """The part of the time that was watched, from 0 to 1. Below 1 the rates are a sample's."""
    error: str = ""
    """Why the changes cannot be watched; else empty."""


class Counts:
    """Changes by prefix, of which the older ones count less."""

    def __init__(self, depth: int) -> None:
        """`depth`: parts of a key, separated by "/", that make a prefix; 0: whole keys."""
        self._depth = depth
        self._counts: dict[bytes, float] = {}
        self._watched_s = 0.0
        self._elapsed_s = 0.0

    def add(self, key: bytes) -> None:
        prefix = prefix_of(key, self._depth)
        self._counts[prefix] = self._counts.get(prefix, 0.0) + 1.0
        if len(self._counts) > 2 * MAX_PREFIXES:
            self._counts = dict(self._largest(MAX_PREFIXES))

    def begin_interval(self) -> None:
        self._counts = {p: n * FADE for p, n in self._counts.items() if n * FADE > MIN_COUNT}

    def end_interval(self, watched_s: float, elapsed_s: float) -> Changes:
        """The interval of `elapsed_s` is over, of which `watched_s` were watched."""
        self._watched_s = self._watched_s * FADE + watched_s
        self._elapsed_s = self._elapsed_s * FADE + elapsed_s
        largest = self._largest(SHOWN_PREFIXES)
        rates = [(prefix, count / self._watched_s) for prefix, count in largest]
        return Changes(tuple(rates), min(1.0, self._watched_s / self._elapsed_s))

    def _largest(self, count: int) -> list[tuple[bytes, float]]:
        return heapq.nlargest(count, self._counts.items(), key=lambda item: item[1])


class ChangeWatch:
    """Feeds `Counts` from a thread. Close it after use."""

    def __init__(self, client: Client, depth: int, interval_s: float) -> None:
        """`client` belongs to the thread from now on."""
        self._client = client
        self._counts = Counts(depth)
        self._interval_s = interval_s
        self._is_closed = threading.Event()
        self.seen = Changes()
        """The result of the last interval; replaced as a whole."""
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._is_closed.set()
        self._client.close()

    def _run(self) -> None:
        while not self._is_closed.is_set():
            try:
                self._watch_interval()
            except PermissionDenied:
                self.seen = Changes(error="this needs a user who may read all keys")
                return
            except Exception as error:  # Of any kind: this thread must go on.
                text = cause(error) if isinstance(error, EtcdliteError) else str(error)
                self.seen = Changes(error=text)
                self._is_closed.wait(RETRY_S)

    def _watch_interval(self) -> None:
        """Watch for an interval, or for the part of it in which the watch may get more."""
        with self._client.watch(prefix=b"", timeout_s=self._client.timeout_s) as watch:
            while not self._is_closed.is_set():
                began = time.monotonic()
                self._counts.begin_interval()
                is_complete = self._count(watch, began + self._interval_s)
                watched_s = time.monotonic() - began
                if not is_complete:
                    break
                self.seen = self._counts.end_interval(watched_s, watched_s)
        if not self._is_closed.is_set():
            self._is_closed.wait(began + self._interval_s - time.monotonic())
            self.seen = self._counts.end_interval(watched_s, max(self._interval_s, watched_s))

    def _count(self, watch: Any, ends: float) -> bool:
        """Count events until this time. False if they are too many."""
        events = size_bytes = 0
        while (left_s := ends - time.monotonic()) > 0 and not self._is_closed.is_set():
            try:
                event = watch.next_event(min(left_s, POLL_S))
            except Timeout:
                continue
            events += 1
            size_bytes += len(event.key) + len(event.value)
            self._counts.add(event.key)
            if events >= MAX_EVENTS or size_bytes >= MAX_BYTES:
                return False
        return True
