"""What the HTTP/1.1 connections of a listener share, and the content of the page, the versions and
the debug variables."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import etcdlite
from etcdlite.member import OVERHEAD_BYTES, Member
from etcdlite.raft import ROLE_NAMES
from etcdlite.replica.alarms import alarm_name
from etcdlite.urls import is_address
from etcdlite.versions import etcd_version
from etcdlite.wire import gateway
from etcdlite.wire.health import NOSNIFF, Header, HealthCounts

_CORS = (
    ("Access-Control-Allow-Headers", "accept, content-type, authorization"),
    ("Access-Control-Allow-Methods", "POST, GET, OPTIONS, PUT, DELETE"),
)


class Site(HealthCounts):
    """The settings and counters that the HTTP connections of a listener share."""

    def __init__(
        self,
        member: Member,
        *,
        metrics: Callable[[], bytes] | None = None,
        cors: Collection[str] = ("*",),
        host_whitelist: Collection[str] = ("*",),
        own_hosts: Collection[str] = (),
        serves_gateway: bool = True,
        only_metrics: bool = False,
    ) -> None:
        """`metrics` renders /metrics. `cors`: origins whose pages may use the API, beside the
        server's own. `host_whitelist`: host names under which clients may call this server; empty:
        any, but at a loopback address only `own_hosts`. For both, "*" means any. `only_metrics`:
        serve only health and metrics (--listen-metrics-urls)."""
        super().__init__()
        if not only_metrics:
            _read_page()  # An installation without it should not get as far as a browser's request.
        self.member = member
        self.metrics = metrics
        self.serves_gateway = serves_gateway
        self.only_metrics = only_metrics
        self.max_body_bytes = member.options.max_request_bytes * 4 // 3 + OVERHEAD_BYTES
        self.max_values = gateway.max_values(member.options.max_txn_ops)
        self._allows_any_origin = "*" in cors
        self._cors = frozenset(cors)
        self._allows_any_host = "*" in host_whitelist
        self._hosts = frozenset(map(str.lower, host_whitelist))
        self._own_hosts = frozenset(map(str.lower, own_hosts))

    def allows_host(self, host: str, is_local: bool) -> bool:
        """Whether a Host header names this server. `is_local`: the client connected to a loopback
        address.

        A page can give its own host name the address 127.0.0.1 (DNS rebinding), and is then of the
        same origin as a server there. So at such an address the name must be known. An IP address
        as the host is no such name, and what sends no host is no browser."""
        if self._allows_any_host:
            return True
        name = host_name(host).lower().rstrip(".")
        if self._hosts:
            return name in self._hosts
        if not is_local or not name or name in self._own_hosts:
            return True
        return name == "localhost" or name.endswith(".localhost") or is_address(name)

    def refusal(self, origin: str, host: str, content_type: str) -> tuple[int, str] | None:
        """The status and the reason if the page of `origin` may not call the API; None if it may,
        or if the client is no page. A browser sends plain text to any server without asking it;
        for JSON it asks first (CORS)."""
        if not origin:
            return None
        is_own = host != "" and origin.partition("://")[2].lower() == host.lower()
        if not (is_own or self._allows_any_origin or origin in self._cors):
            return 403, "pages of this origin may not use the API; see the setting cors"
        if content_type.partition(";")[0].strip().lower() != "application/json":
            return 415, "a web page must send the content type application/json"
        return None

    def cors_headers(self, origin: str) -> tuple[Header, ...]:
        if self._allows_any_origin:
            origin = "*"
        elif origin not in self._cors:
            return ()
        return (*_CORS, ("Access-Control-Allow-Origin", origin))


def host_name(host: str) -> str:
    """A Host header without the port, and an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def versions(member: Member) -> str:
    """The versions: of etcd, as the API and the cluster present it; of etcdlite, those of the data
    on disk, the program and the cluster."""
    cluster = member.state.cluster_version.version
    found = {
        "etcdserver": etcdlite.ETCD_API_VERSION,
        "etcdcluster": etcd_version(cluster),
        "storage": member.state.storage_version.full,
        "etcdlite": etcdlite.__version__,
        "etcdlitecluster": cluster.full,
    }
    return json.dumps(found, separators=(",", ":"))


def debug_vars(member: Member) -> str:
    """The internal state of the member, without keys and values."""
    raft, store, hub = member.raft, member.state.store, member.hub
    found: dict[str, Any] = {
        "etcdlite": {"version": etcdlite.__version__, "api_version": etcdlite.ETCD_API_VERSION},
        "raft.status": {
            "id": f"{member.identity.member_id:x}",
            "term": raft.term,
            "vote": f"{raft.vote:x}",
            "commit": raft.log.committed,
            "lead": f"{raft.leader:x}",
            "raftState": "State" + ROLE_NAMES[raft.role].title().replace("-", ""),
            "applied": store.applied_index,
            "leader_changes": member.leadership.changes,
        },
        "connected": {
            f"{node:x}": link.since is not None for node, link in member.peers.links.items()
        },
        "store": {
            "revision": store.revision,
            "compact_revision": store.compacted,
            "keys": len(store.index.heads),
            "size_bytes": store.size_bytes,
            "size_in_use_bytes": store.size_in_use_bytes,
            "quota_bytes": member.state.alarms.quota_bytes,
        },
        "alarms": [
            {"member": f"{member_id:x}", "alarm": alarm_name(kind)}
            for member_id, kind in sorted(member.state.alarms)
        ],
        "leases": len(member.state.lessor),
        "watch": {
            "streams": hub.streams,
            "watches": hub.watches,
            "slow_watches": hub.slow_watches,
            "events_sent": hub.events_sent,
        },
    }
    return json.dumps(found, indent=1) + "\n"


@cache
def _read_page() -> str:
    # It may be in a zip file.
    loader: Any = globals()["__loader__"]
    data: bytes = loader.get_data(os.path.join(os.path.dirname(__file__), "page.html"))
    return data.decode()


@cache
def page() -> tuple[Any, ...]:
    """The page, and its headers: the Content-Security-Policy allows only its own script and
    requests to this server."""
    import hashlib  # It loads OpenSSL, which takes 3.5 MB. Few members are asked for the page.

    html = _read_page()
    hashes = {}
    for element in ("script", "style"):
        content = html.partition(f"<{element}>")[2].partition(f"</{element}>")[0]
        digest = hashlib.sha256(content.encode()).digest()
        hashes[element] = f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return (
        html,
        NOSNIFF,
        ("Cache-Control", "no-cache"),
        ("Content-Security-Policy", policy),
        ("Referrer-Policy", "no-referrer"),
    )
