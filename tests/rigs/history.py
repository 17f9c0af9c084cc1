"""What clients asked and were answered, and whether that can be the history of one store.

etcd's revisions make the check simple: they are the order in which the writes happened, and a
watch from revision 1 tells all of them. So a history is linearizable if

- every write that was acknowledged is in the watched history, at the revision it was told, with the
  value it wrote; every write that was refused is not there; one whose outcome is unknown is there
  at most once; nothing else is there;
- a write has a higher revision than every write that was answered before it began;
- a linearizable read was answered from a revision that is not below that of any write answered, or
  any read's, before it began, and with the value that its key had at that revision.

Each written value is unique, so that it names its write.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from etcdlite.client import (
    ConnectionFailed,
    EtcdliteError,
    Timeout,
    Unavailable,
    UnknownOutcome,
)


@dataclass
class Operation:
    began: float
    kind: str
    """"put" or "get"."""
    key: bytes
    value: bytes | None
    """What was written, or read."""
    ended: float = float("inf")
    outcome: str = "unknown"
    """"done", "refused" (it surely did not happen) or "unknown"."""
    revision: int = 0
    """Of the answer's header."""


@dataclass
class History:
    operations: list[Operation] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, operation: Operation, ask: Callable[[], tuple[int, bytes | None]]) -> None:
        """Carry out an operation; `ask` returns the revision of its answer and what was read."""
        try:
            operation.revision, value = ask()
            if operation.kind == "get":
                operation.value = value
            operation.outcome = "done"
        except (ConnectionFailed, Timeout, UnknownOutcome, Unavailable):
            pass
        except EtcdliteError:
            operation.outcome = "refused"
        operation.ended = time.monotonic()
        with self._lock:
            self.operations.append(operation)

    @property
    def done(self) -> int:
        """Operations that were answered."""
        with self._lock:
            return sum(operation.outcome == "done" for operation in self.operations)

    def check(self, events: list[Any]) -> None:
        """`events` are all that a watch from revision 1 told. Raises AssertionError."""
        written: dict[bytes, int] = {}
        versions: dict[bytes, list[tuple[int, bytes]]] = {}
        last = 0
        for event in events:
            kv = event.kv
            assert kv.mod_revision > last, f"revision {kv.mod_revision} comes after {last}"
            last = kv.mod_revision
            assert kv.value not in written, f"{kv.value!r} was written twice"
            written[kv.value] = last
            versions.setdefault(kv.key, []).append((last, kv.value))
        puts = [operation for operation in self.operations if operation.kind == "put"]
        known = {operation.value for operation in puts}
        foreign = set(written) - known
        assert not foreign, f"nobody wrote {foreign}"
        for put in puts:
            assert put.value is not None
            found = written.get(put.value)
            if put.outcome == "done":
                assert found == put.revision, (
                    f"{put.value!r} was acknowledged at revision {put.revision}, but is at {found}"
                )
            elif put.outcome == "refused":
                assert found is None, f"{put.value!r} was refused, but is at revision {found}"
        self._check_order()
        for get in self.operations:
            if get.kind == "get" and get.outcome == "done":
                found_versions = versions.get(get.key, [])
                at = bisect_right(found_versions, (get.revision, b"\xff" * 64)) - 1
                expected = found_versions[at][1] if at >= 0 else None
                assert get.value == expected, (
                    f"at revision {get.revision} {get.key!r} was read as {get.value!r}, "
                    f"but it was {expected!r}"
                )

    def _check_order(self) -> None:
        """Nothing answered later than what was answered before it began."""
        done = [operation for operation in self.operations if operation.outcome == "done"]
        ends = sorted((operation.ended, operation.revision) for operation in done)
        highest = 0
        at = 0
        for operation in sorted(done, key=lambda operation: operation.began):
            while at < len(ends) and ends[at][0] < operation.began:
                highest = max(highest, ends[at][1])
                at += 1
            least = highest + (operation.kind == "put")
            assert operation.revision >= least, (
                f"a {operation.kind} that began after revision {highest} was told was answered "
                f"from revision {operation.revision}"
            )
