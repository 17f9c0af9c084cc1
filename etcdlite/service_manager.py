"""Notifications to systemd, or to another manager of services with its protocol (sd_notify(3)): a
datagram of lines NAME=VALUE to the socket that the environment names. Without the variable nothing
is sent.
"""

from __future__ import annotations

import math
import os
import socket

from etcdlite import log

PATIENCE_USEC = 30_000_000
"""While a start waits for other members, each request extends its timeout by this."""


def notify(state: str) -> None:
    """Send lines. A failure is a warning, because the service itself is fine."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    if path[0] == "@":
        path = "\0" + path[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(state.encode(), path)
    except OSError as failure:
        log.warn("cannot notify the service manager", error=str(failure))


def extend_start(why: str) -> None:
    """Ask for more time until this member is ready."""
    notify(f"EXTEND_TIMEOUT_USEC={PATIENCE_USEC}\nSTATUS={why}")


class Watchdog:
    """Tells the service manager that the loop runs, if it wants to know (WatchdogSec=): it restarts
    a service that is silent for too long (sd_watchdog_enabled(3))."""

    def __init__(self) -> None:
        usec = os.environ.get("WATCHDOG_USEC", "")
        is_wanted = usec.isdecimal() and int(usec) > 0
        is_meant = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._interval_s = int(usec) / 3e6 if is_wanted and is_meant else math.inf
        self._next = 0.0 if self._interval_s < math.inf else math.inf

    def feed(self, now: float) -> None:
        """Notify, three times in the allowed time. `now`: monotonic, in seconds."""
        if now >= self._next:
            self._next = now + self._interval_s
            notify("WATCHDOG=1")
