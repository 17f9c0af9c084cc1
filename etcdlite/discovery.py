"""Finding servers by DNS: the SRV records (RFC 2782) of a domain.

    _etcd-server._tcp.DOMAIN      the members of a cluster, at their peer ports (discovery-srv)
    _etcd-client._tcp.DOMAIN      their client ports (etcdlite-ctl --discovery-srv)

Those of ports with TLS are _etcd-server-ssl._tcp and _etcd-client-ssl._tcp. With a service name N,
they are _etcd-server-N._tcp, _etcd-server-ssl-N._tcp and so on.

The result is sorted, because a DNS answer has no order. A member's URL is that of its record,
`http://TARGET:PORT`, or https for a port with TLS; all members must use the same one, because IDs
are derived from it. A member finds itself as in etcd: the record's target and one of its own peer
URLs of the same scheme resolve to the same address. The others get the names "0", "1", ... until
they publish their own.

The queries use dnspython, because Python has none for SRV records, and block. A member queries DNS
at its first start only: later, its data names the members.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from etcdlite.addresses import look_up
from etcdlite.errors import MayPass
from etcdlite.urls import host_port

TIMEOUT_S = 5.0
"""For all tries of one DNS query."""


class DiscoveryError(MayPass):
    """DNS does not name the servers. The text says why and what to do."""


def initial_cluster(
    domain: str, service_name: str, name: str, peer_urls: Sequence[str], resolver: Any = None
) -> list[tuple[str, str]]:
    """(name, peer URL) of the members of a cluster. The member `name` must be among them, at one of
    `peer_urls`. `resolver`: a dns.resolver.Resolver, if not the system's. Raises DiscoveryError."""
    found = _servers("etcd-server", domain, service_name, resolver)
    own = {address for url in peer_urls for address in _addresses(url)}
    numbers = itertools.count()
    pairs = [(name if own & _addresses(url) else str(next(numbers)), url) for url in found]
    count = sum(member == name for member, _ in pairs)
    # A name that stands for several members would make a cluster of its own of each of them.
    if not 0 < count <= len(peer_urls):
        raise DiscoveryError(
            f"{count or 'none'} of the members in the SRV records of {domain} "
            f"{'are' if count else 'is'} this one: they are at {', '.join(found)}, and initial-"
            f"advertise-peer-urls is {', '.join(peer_urls)}. Correct one of them: a URL must stand "
            "for one member alone"
        )
    return pairs


def client_endpoints(domain: str, service_name: str, resolver: Any = None) -> list[str]:
    """The URLs at which a cluster serves clients, those with TLS first. Raises DiscoveryError."""
    return _servers("etcd-client", domain, service_name, resolver)


def _servers(service: str, domain: str, name: str, resolver: Any) -> list[str]:
    """URLs, sorted, those with TLS first."""
    suffix = f"-{name}._tcp.{domain}" if name else f"._tcp.{domain}"
    plain, secure = f"_{service}{suffix}", f"_{service}-ssl{suffix}"
    found = [
        f"{scheme}://{host}:{port}"
        for scheme, query in (("https", secure), ("http", plain))
        for host, port in _lookup(query, resolver)
    ]
    if not found:
        raise DiscoveryError(
            f"DNS has no SRV records {plain} or {secure}. Add one for each server, or name the "
            "servers yourself"
        )
    return found


def _lookup(query: str, resolver: Any) -> list[tuple[str, int]]:
    """The targets of SRV records, if there are any."""
    try:
        import dns.exception
        import dns.resolver
    except ImportError as failure:
        raise DiscoveryError(
            "finding servers by DNS needs the Python package dnspython. Install it, on Debian "
            "with 'apt install python3-dnspython'"
        ) from failure
    try:
        resolver = resolver or dns.resolver.Resolver()
        answer = resolver.resolve(query, "SRV", search=False, lifetime=TIMEOUT_S)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return []
    except (dns.exception.DNSException, OSError) as failure:
        why = " ".join(str(failure).split()) or type(failure).__name__
        raise DiscoveryError(f"DNS does not answer the query for {query}: {why}") from failure
    # RFC 2782: the target "." means that there is no such service.
    found = {(record.target.to_text(omit_final_dot=True).lower(), record.port) for record in answer}
    return sorted((host, port) for host, port in found if host != ".")


def _addresses(url: str) -> set[tuple[str, str, int]]:
    """The names of a server: its scheme, its host as it is written and the addresses of that, and
    its port."""
    host, port = host_port(url)
    scheme = url.partition("://")[0]
    return {(scheme, name, port) for name in (host.rstrip(".").lower(), *(look_up(host) or ()))}
