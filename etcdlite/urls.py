"""URLs of members: http://HOST:PORT, or https:// with TLS, to listen on, to advertise, and in
`initial-cluster`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from etcdlite.log import quoted


def check_url(url: str) -> None:
    """Raises ValueError unless `url` is http://HOST:PORT or https://HOST:PORT."""
    scheme = url.partition("://")[0]
    if scheme in ("unix", "unixs"):
        raise ValueError("not served: connections are by TCP only; write http://HOST:PORT")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    rest = parts.path + parts.query + parts.fragment + (parts.username or "")
    bare = url.isascii() and url.isprintable() and not re.search(r"[\s?#@]", url)
    if scheme not in ("http", "https") or not host or port is None or rest or not bare:
        text = "not a URL that can be used; write http://HOST:PORT and nothing more"
        raise ValueError(f"{text} (a port up to 65535, an IPv6 address in brackets)")


def is_secure(url: str) -> bool:
    """Whether a checked URL is one with TLS."""
    return url.startswith("https:")


def host_port(url: str) -> tuple[str, int]:
    """The host (an IPv6 address without brackets) and port of a checked URL."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None, url
    return parts.hostname, parts.port


def is_address(host: str) -> bool:
    """Whether `host` is an IP address and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def format_address(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_listen_url(url: str) -> None:
    """Raises ValueError unless one can listen on `url`: as in etcd, on an address, not a name."""
    check_url(url)
    host, _ = host_port(url)
    if host != "localhost" and not is_address(host):
        raise ValueError(
            "a host name to listen on; write an IP address of this machine, localhost, "
            "0.0.0.0 for all IPv4 addresses, or [::] for all IPv6 addresses"
        )


def is_wildcard(url: str) -> bool:
    """Whether the host stands for all addresses, which can be listened on but not dialled."""
    try:
        return ipaddress.ip_address(host_port(url)[0]).is_unspecified
    except ValueError:
        return False


def is_local(url: str) -> bool:
    """Whether the host means this machine to whoever dials it."""
    host = host_port(url)[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified


def collide(one: str, other: str) -> bool:
    """Whether two URLs cannot both be listened on. Wildcards are of one IP version each."""
    (host, port), (other_host, other_port) = host_port(one), host_port(other)
    if port != other_port or port == 0:
        return False
    return any(
        a.version == b.version and (a == b or a.is_unspecified or b.is_unspecified)
        for a in _addresses(host)
        for b in _addresses(other_host)
    )


def _addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    hosts = ("127.0.0.1", "::1") if host == "localhost" else (host,)
    return [ipaddress.ip_address(address) for address in hosts]


def parse_initial_cluster(
    items: Sequence[str], name: str, peer_urls: Sequence[str], joins: bool = False
) -> list[tuple[str, str]]:
    """The (name, peer URL) pairs of `NAME=URL` items. The member `name` must be among them, at
    exactly these peer URLs. Raises ValueError with what is wrong and what to do.

    With `joins` the names of the other members do not matter, because the cluster knows them: one
    that was not started yet has none, and one of the same name is given back without it."""
    own = ",".join(f"{name}={url}" for url in peer_urls)
    pairs = []
    for item in items:
        member, equals, url = item.rpartition("=")
        if not (member or (joins and equals)) or not url:
            raise ValueError(f"not a list of NAME=URL; write for example {own}")
        pairs.append((member, url))
    holders: dict[str, str] = {}
    for member, url in pairs:
        try:
            check_url(url)
        except ValueError as error:
            raise ValueError(f"{quoted(url)}: {error}") from None
        if url in holders:
            who = f"{member}, twice" if holders[url] == member else f"{holders[url]} and {member}"
            raise ValueError(f"{url} is the URL of {who}; change one of them")
        holders[url] = member
    if joins and {(name, url) for url in peer_urls} & set(pairs):
        pairs = [(m if m != name or url in peer_urls else "", url) for m, url in pairs]
    urls = {url for member, url in pairs if member == name}
    if not urls:
        names = ", ".join(dict.fromkeys(member for member, _ in pairs if member))
        raise ValueError(
            f"this member's name, {name}, is not in it; set name to one of {names}, or add {own}"
        )
    if urls != set(peer_urls):
        raise ValueError(
            f"it has {name} at {', '.join(sorted(urls))}, but initial-advertise-peer-urls is "
            f"{', '.join(peer_urls)}; make them the same"
        )
    return pairs
