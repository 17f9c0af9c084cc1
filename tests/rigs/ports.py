"""Ports for the servers that tests start."""

from __future__ import annotations

import random
import socket


def free_ports(count: int) -> list[int]:
    """Ports that nothing uses now, below those that the system gives to clients.

    They are chosen at random, so that tests that run side by side rarely choose the same.
    """
    rng = random.Random()
    ports: list[int] = []
    while len(ports) < count:
        port = rng.randrange(12_000, 32_000)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports
