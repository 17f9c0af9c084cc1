"""Who may connect: how many connections there may be of clients, of members, and of one address.

Clients and members have separate limits, so that idle clients never cut members off. A connection
that has not opened its protocol may lose its place to a new one.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import Any

MAX_MEMBER_CONNECTIONS = 256
"""Connections at the peer port, and those to other members. Seven members need about 30."""

MAX_UNOPENED = 1024
"""Connections of clients that have not opened their protocol. With more, the oldest is closed."""

SWEEP_EVERY = 64
"""Beyond the limit, the list is cleared of opened connections once per this many new ones."""

ADDRESS_SHARE = 4
"""By default, one address may have this fraction of all connections of clients."""


class Places:
    """The open connections, by kind."""

    def __init__(self, max_clients: int, max_per_address: int) -> None:
        """`max_per_address` 0: a quarter of `max_clients`, and no limit for loopback addresses, at
        which a proxy for many clients may be."""
        self.max_clients = max_clients
        self._exempts_loopback = not max_per_address
        self.max_per_address = max_per_address or max(1, max_clients // ADDRESS_SHARE)
        self._taken = {False: 0, True: 0}
        """The number of connections of clients (False) and of members (True)."""
        self._by_host: Counter[str] = Counter()
        self._until_sweep = 0
        self._unopened: dict[bool, dict[Any, None]] = {False: {}, True: {}}

    def refusal(self, host: str, is_member: bool) -> str:
        """Why a connection from this address must be refused; empty if it may be accepted."""
        if is_member:
            if self._taken[True] >= MAX_MEMBER_CONNECTIONS and not self._oldest(True):
                return "connection limit of the peer port reached"
            return ""
        if self._taken[False] >= self.max_clients:
            return "connection limit reached"
        if self._by_host[host] >= self.max_per_address and not self._is_exempt(host):
            return "connection limit of its address reached"
        return ""

    def _is_exempt(self, host: str) -> bool:
        return self._exempts_loopback and ipaddress.ip_address(host.partition("%")[0]).is_loopback

    def take(self, connection: Any) -> Any:
        """Count a new connection. Returns the connection that must be closed for it, or None.

        `connection` has a `session` (`session.py`), a `host` and `is_member`."""
        is_member = connection.is_member
        self._taken[is_member] += 1
        unopened = self._unopened[is_member]
        unopened[connection] = None
        if is_member:
            return self._oldest(True) if self._taken[True] > MAX_MEMBER_CONNECTIONS else None
        self._by_host[connection.host] += 1
        return self._oldest(False) if len(unopened) > MAX_UNOPENED else None

    def _oldest(self, is_member: bool) -> Any:
        """The oldest unopened connection, or None if there are not too many."""
        unopened = self._unopened[is_member]
        most = 0 if is_member else MAX_UNOPENED
        self._until_sweep -= 1
        if self._until_sweep < 0:
            self._until_sweep = SWEEP_EVERY
            for connection in [one for one in unopened if one.session.is_open]:
                del unopened[connection]
        while len(unopened) > most:
            connection = next(iter(unopened))
            if not connection.session.is_open:
                return connection
            del unopened[connection]
        return None

    def free(self, connection: Any) -> None:
        """A connection is closed."""
        host, is_member = connection.host, connection.is_member
        self._taken[is_member] -= 1
        self._unopened[is_member].pop(connection, None)
        if not is_member:
            self._by_host[host] -= 1
            if not self._by_host[host]:
                del self._by_host[host]
