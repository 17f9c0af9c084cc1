"""Whether a connection to the peer port comes from where the member that it names is.

The address of the other side must be one that the hosts of the member's peer URLs resolve to. An
IP address resolves to itself, a name in a thread, because that may take seconds. What a name
resolved to is used for `FRESH_S`; an address that is not in it has the name resolved again, but not
more often than every `AGAIN_S`. While no name server answers, the last addresses stay in use.

A machine calls its own addresses 127.x.x.x from 127.0.0.1, so a member with such a URL may come
from there.
"""

from __future__ import annotations

import ipaddress
import math
import socket
import time
from collections.abc import Callable, Iterable
from functools import partial

from etcdlite.loading import start_thread
from etcdlite.urls import host_port

FRESH_S = 60.0
AGAIN_S = 1.0
MAX_WAITING = 1000
"""Connections that wait for a name to be resolved; more are refused."""
MAX_HOSTS = 1000
"""Addresses of this many hosts are remembered; then those resolved longest ago are dropped."""

UNKNOWN = (socket.EAI_NONAME, socket.EAI_NODATA)
"""The errors of a name that does not exist, or has no addresses."""

LOOPBACK = ("127.0.0.1", "::1")

Done = Callable[[bool], None]


class Addresses:
    """What the hosts of peer URLs resolve to."""

    def __init__(self, do_in_loop: Callable[[Callable[[], None]], None]) -> None:
        """`do_in_loop` is called in a thread, with what the loop is to call."""
        self._do_in_loop = do_in_loop
        self._found: dict[str, tuple[float, frozenset[str]]] = {}
        """By host: when it was resolved, and the addresses."""
        self._waiting: dict[str, list[Callable[[], None]]] = {}
        """By host that is being resolved: the checks that wait for it."""

    def check(
        self, address: str, urls: Iterable[str], done: Done, tried: frozenset[str] = frozenset()
    ) -> None:
        """Call `done` with whether `address` is one of a member with these peer URLs, now or once
        the names in them are resolved. Hosts in `tried` are not resolved for this check again."""
        address = _plain(address)
        hosts = {host_port(url)[0] for url in urls}
        allowed: set[str] = set()
        unknown = set()
        now = time.monotonic()
        for host in hosts:
            own = _plain(host)
            if own:
                allowed.add(own)
                continue
            resolved_at, found = self._found.get(host, (-math.inf, frozenset()))
            if now - resolved_at <= FRESH_S:
                allowed |= found
            if now - resolved_at > (FRESH_S if address in found else AGAIN_S):
                unknown.add(host)
        unknown -= tried
        if any(ipaddress.ip_address(own).is_loopback for own in allowed):
            allowed.update(LOOPBACK)
        if address in allowed or not unknown:
            done(address in allowed)
            return
        if sum(map(len, self._waiting.values())) >= MAX_WAITING:
            done(False)
            return
        # One after the other: the next check finds this one resolved.
        host = min(unknown)
        if host not in self._waiting:
            self._waiting[host] = []
            if start_thread("resolve", partial(self._look_up, host)) is not None:
                self._do_in_loop(partial(self._resolved, host, None))
        self._waiting[host].append(partial(self.check, address, tuple(urls), done, tried | {host}))

    def _look_up(self, host: str) -> None:
        self._do_in_loop(partial(self._resolved, host, look_up(host)))

    def _resolved(self, host: str, addresses: frozenset[str] | None) -> None:
        """Take what `look_up` returned, and make the checks that wait for it."""
        _, before = self._found.pop(host, (0.0, frozenset[str]()))
        if len(self._found) >= MAX_HOSTS:
            del self._found[next(iter(self._found))]  # That of a former member, most likely.
        self._found[host] = (time.monotonic(), before if addresses is None else addresses)
        for check in self._waiting.pop(host, ()):
            check()


def look_up(host: str) -> frozenset[str] | None:
    """The IP addresses of a host: empty if there is no such name, None if no name server answers.
    Blocks for some ten seconds at most."""
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError:
        return frozenset()
    except Exception as failure:  # Without a result (MemoryError) the checks would wait for ever.
        return frozenset() if getattr(failure, "errno", None) in UNKNOWN else None
    return frozenset(_plain(str(answer[4][0])) for answer in answers)


def _plain(host: str) -> str:
    """An IP address in its usual form, an IPv4 address also where it is written as IPv6; empty for
    a name."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    return str(getattr(address, "ipv4_mapped", None) or address)
