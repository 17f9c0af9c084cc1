"""Finding servers by DNS: the SRV records (RFC 2782) of a domain.

    _etcd-server._tcp.DOMAIN      the members of a cluster, at their peer ports (discovery-srv)
    _etcd-client._tcp.DOMAIN      their client ports (etcdlite-ctl --discovery-srv)

With a service name N, these are _etcd-server-N._tcp and _etcd-client-N._tcp. Client ports with TLS
have the records _etcd-client-ssl._tcp and _etcd-client-ssl-N._tcp. etcd's records for peer ports
with TLS, _etcd-server-ssl._tcp, are queried only to report that they cannot be used.

The result is sorted, because a DNS answer has no order. A member's URL is that of its record,
`http://TARGET:PORT`; all members must use the same one, because IDs are derived from it. A member
finds itself as in etcd: the record's target and one of its own peer URLs resolve to the same
address. The others get the names "0", "1", ... until they publish their own.

The queries use dnspython, because Python has none for SRV records, and block. A member queries DNS
at its first start only: later, its data names the members.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterable, Sequence
from typing import Any

from etcdlite.urls import host_port

TIMEOUT_S = 5.0
"""For all tries of one DNS query."""


class DiscoveryError(Exception):
    """DNS does not name the servers. The text says why and what to do."""


def initial_cluster(
    domain: str,
    service_name: str,
    name: str,
    peer_urls: Sequence[str],
    resolver: Any = None,
) -> list[tuple[str, str]]:
    """(name, peer URL) of the members of a cluster. The member `name` must be among them, at one of
    `peer_urls`. `resolver`: a dns.resolver.Resolver, if not the system's. Raises DiscoveryError.
    """
    found = _servers("etcd-server", domain, service_name, resolver)
    own = {address for url in peer_urls for address in _addresses(*host_port(url))}
    numbers = itertools.count()
    pairs = [
        (name if own & _addresses(host, port) else str(next(numbers)), _url(host, port))
        for host, port in found
    ]
    if all(member != name for member, _ in pairs):
        raise DiscoveryError(
            f"none of the members in the SRV records of {domain} is this one: they are at "
            f"{', '.join(url for _, url in pairs)}, and initial-advertise-peer-urls is "
            f"{', '.join(peer_urls)}. Correct one of them"
        )
    return pairs


def client_endpoints(domain: str, service_name: str, resolver: Any = None) -> list[str]:
    """The URLs at which a cluster serves clients, those with TLS first. Raises DiscoveryError."""
    suffix = f"-{service_name}" if service_name else ""
    names = {
        "https": f"_etcd-client-ssl{suffix}._tcp.{domain}",
        "http": f"_etcd-client{suffix}._tcp.{domain}",
    }
    found = [
        f"{scheme}://{host}:{port}"
        for scheme, query in names.items()
        for host, port in _lookup(query, resolver)
    ]
    if not found:
        raise DiscoveryError(
            f"DNS has no SRV records {names['http']} or {names['https']}. Add one for each "
            "server, or name the servers yourself"
        )
    return found


def _servers(service: str, domain: str, name: str, resolver: Any) -> list[tuple[str, int]]:
    """(host, port), sorted."""
    suffix = f"-{name}" if name else ""
    query = f"_{service}{suffix}._tcp.{domain}"
    found = _lookup(query, resolver)
    if found:
        return found
    with_tls = f"_{service}-ssl{suffix}._tcp.{domain}"
    if _lookup(with_tls, resolver):
        raise DiscoveryError(
            f"DNS has {with_tls}, for servers with TLS, which comes with a later version, but no "
            f"{query}. Add SRV records of that name"
        )
    raise DiscoveryError(
        f"DNS has no SRV records {query}. Add one for each server, or name the servers yourself"
    )


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
    found = {(_host(record.target), record.port) for record in answer}
    return sorted((host, port) for host, port in found if host != ".")


def _host(target: Any) -> str:
    return str(target.to_text(omit_final_dot=True)).lower()


def _url(host: str, port: int) -> str:
    return f"http://{host}:{port}"


def _addresses(host: str, port: int) -> set[tuple[str, int]]:
    """The names of a server: its host as it is written, and the addresses of the host."""
    return {(host.rstrip(".").lower(), port), *((a, port) for a in _resolved(host))}


def _resolved(host: str) -> Iterable[str]:
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return ()  # The server may be known by another URL.
