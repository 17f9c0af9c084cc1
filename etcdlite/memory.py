"""The memory that connections may hold together, the garbage collector, and how freed memory gets
back to the system.

What waits to be sent or to be processed, and what TLS takes, is counted over all connections,
several times a second. Above the limit, the connections that hold the most are closed until the
rest fits.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

SHARE = 2
"""By default the limit is this fraction of the memory, less what the process holds at the start."""

MIN_LIMIT_BYTES = 64 << 20
"""The least default limit: one large answer must fit."""

SMALL_BYTES = 64 << 10
"""Connections that hold less than this are not closed for the others."""

COLLECT_OBJECTS = 5_000
"""The garbage collector runs after this many new objects that it tracks. A run takes about 1 ms."""

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_CGROUPS = "/sys/fs/cgroup"


def cgroup_limits(groups: str, top: str = _CGROUPS) -> list[str]:
    """The files that limit the memory of a process, of its control group and of all above it (v2,
    v1). `groups` is the content of its /proc/PID/cgroup."""
    found = []
    for line in groups.splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not path:
            continue
        if not controllers:
            folder, names = top, ["memory.max", "memory.high"]
        elif "memory" in controllers.split(","):
            folder, names = f"{top}/memory", ["memory.limit_in_bytes"]
        else:
            continue
        for part in ("", *filter(None, path.split("/"))):
            folder += part and f"/{part}"
            found += [f"{folder}/{name}" for name in names]
    return found


def _own_limits() -> list[str]:
    with suppress(OSError, UnicodeDecodeError), open("/proc/self/cgroup") as file:
        return cgroup_limits(file.read())
    return []


def total_bytes(limits: Iterable[str] | None = None) -> int:
    """The memory that this process may use: the machine's, or that of its control groups if that is
    less. `limits` are the files that say so."""
    total = os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES
    for path in _own_limits() if limits is None else limits:
        with suppress(OSError, ValueError), open(path) as file:
            total = min(total, int(file.read()))  # A ValueError: "max".
    return total


def process_bytes() -> tuple[int, int]:
    """What this process holds now: (address space, memory). Raises OSError without /proc."""
    with open("/proc/self/statm") as file:
        pages = file.read().split()
    return int(pages[0]) * PAGE_BYTES, int(pages[1]) * PAGE_BYTES


def default_limit_bytes() -> int:
    held = process_bytes()[1] if os.path.exists("/proc/self/statm") else 0
    return max(MIN_LIMIT_BYTES, total_bytes() // SHARE - held)


def collect_only_new_objects() -> None:
    """Set the garbage collector up to visit an object only while it is new, at most twice. A visit
    of 200,000 leases would take 30 ms. So a reference cycle that survives is never freed: whatever
    lives long must not be in one. An error that is kept loses its traceback: that has frames, with
    the variables of all callers."""
    gc.freeze()
    gc.set_threshold(COLLECT_OBJECTS, 0, 1 << 30)
    if gc.get_threshold()[2]:  # Else see `collect_new`.
        gc.enable()


def collect_new() -> None:
    """Collect new objects if the collector is off. That of Python 3.14.0 to 3.14.4 is incremental:
    it has no third threshold, and would visit all objects again and again. To be called often."""
    if not gc.isenabled() and gc.get_count()[0] > COLLECT_OBJECTS:
        gc.collect()
        gc.freeze()


def release() -> None:
    """Give freed memory back to the system. Takes some milliseconds: only after much was freed.
    Python's allocator and glibc's both keep what lies between things that are still there."""
    gc.freeze()  # No collection visits what exists now.
    gc.collect()  # It frees what Python keeps for new tuples, lists, dicts and floats.
    import ctypes  # The standard library has no other way.

    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # Only glibc has it; `int` does nothing.


class Budget:
    """The limit, and the last count."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.shed = 0
        """Connections closed so far."""

    def excess(self, connections: Iterable[Any]) -> list[Any]:
        """Count what the connections hold. Returns those of clients that must be closed, the
        largest first."""
        held = [(connection.kept_bytes, connection) for connection in connections]
        self.held_bytes = sum(size for size, _ in held)
        closed: list[Any] = []
        for size, connection in sorted(held, key=lambda pair: -pair[0]):
            if self.held_bytes <= self.limit_bytes or size < SMALL_BYTES:
                break
            if not connection.is_member:
                self.held_bytes -= size
                closed.append(connection)
        self.shed += len(closed)
        return closed
