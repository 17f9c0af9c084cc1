"""Ports for the servers that tests start."""

from __future__ import annotations

import itertools
import os
import random
import socket

FIRST, LAST = 12_000, 32_000
"""Below the ports that the system gives to clients."""

SHARES = 8

_share = (LAST - FIRST) // SHARES
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % SHARES
_turns = itertools.count(random.randrange(_share))


def free_ports(count: int) -> list[int]:
    """Ports that nothing uses now, and that nobody else gets before they are used, or while their
    server is down: tests that run side by side have a share of the ports each, and all of it is
    given out before a port is given out again."""
    ports: list[int] = []
    while len(ports) < count:
        port = FIRST + _worker * _share + next(_turns) % _share
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
    return ports
