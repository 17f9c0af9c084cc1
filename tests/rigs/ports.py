"""Ports for the servers that tests start.

Tests of several processes run side by side, and a server may start long after its port is chosen,
or be down for a while. So each process has blocks of ports to itself, by locks on files, which end
with the process. It gives out a port again only when it has given out all of them.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Iterator

PORTS = range(12_000, 32_000)
"""Below the ports that the system gives to clients."""

BLOCK = 50

_locks: dict[int, int] = {}
"""The first port of each block of this process, and the descriptor of its locked file."""


def _is_own(first: int) -> bool:
    """Whether this process has the block. It takes a block that no process has."""
    if first not in _locks:
        folder = os.path.join(tempfile.gettempdir(), f"etcdlite-test-ports-{os.getuid()}")
        os.makedirs(folder, 0o700, exist_ok=True)
        lock = os.open(f"{folder}/{first}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        _locks[first] = lock
    return True


def _own_ports() -> Iterator[int]:
    blocks = list(PORTS[::BLOCK])
    random.Random().shuffle(blocks)
    while True:
        for first in filter(_is_own, blocks):
            yield from range(first, first + BLOCK)


_own = _own_ports()


def free_ports(count: int) -> list[int]:
    """Ports that nothing uses now."""
    ports: list[int] = []
    while len(ports) < count:
        port = next(_own)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
    return ports
