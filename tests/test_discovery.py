"""Finding servers by DNS, with a DNS server of the test's own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import dns.message
import dns.rcode
import dns.resolver
import dns.rrset
import pytest
from rigs.ctl_runner import run_ctl
from rigs.fake_server import FakeServer

from etcdlite import discovery
from etcdlite.discovery import DiscoveryError


class FakeDns:
    """Answers SRV queries on loopback from `records`: name to "priority weight port target" lines.
    A name in `failing` gets SERVFAIL; every other one does not exist."""

    def __init__(self) -> None:
        self.records: dict[str, list[str]] = {}
        self.failing: set[str] = set()
        self.asked: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.resolver = dns.resolver.Resolver(configure=False)
        self.resolver.nameservers = ["127.0.0.1"]
        self.resolver.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                data, client = self._socket.recvfrom(4096)
            except OSError:
                return
            if not data:
                return
            query = dns.message.from_wire(data)
            name = query.question[0].name.to_text(omit_final_dot=True)
            self.asked.append(name)
            answer = dns.message.make_response(query)
            if name in self.records:
                records = dns.rrset.from_text_list(
                    query.question[0].name, 60, "IN", "SRV", self.records[name]
                )
                answer.answer.append(records)
            else:
                is_failing = name in self.failing
                answer.set_rcode(dns.rcode.SERVFAIL if is_failing else dns.rcode.NXDOMAIN)
            self._socket.sendto(answer.to_wire(), client)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self._socket.getsockname())


@pytest.fixture
def fake_dns() -> Iterator[FakeDns]:
    server = FakeDns()
    yield server
    server.close()


NOT_HERE = ["0 0 0 ."]
MEMBERS = ["0 0 2380 b.example.invalid.", "0 0 2380 a.example.invalid.", "9 1 2381 127.0.0.1."]


def found(fake_dns: FakeDns, own_url: str, service_name: str = "") -> Any:
    return discovery.initial_cluster(
        "example.invalid", service_name, "me", [own_url], fake_dns.resolver
    )


def test_the_members_are_those_of_the_srv_records_and_this_one_is_known_by_its_url(
    fake_dns: FakeDns,
) -> None:
    fake_dns.records["_etcd-server._tcp.example.invalid"] = MEMBERS
    assert found(fake_dns, "http://b.example.invalid:2380") == [
        ("0", "http://127.0.0.1:2381"),
        ("1", "http://a.example.invalid:2380"),
        ("me", "http://b.example.invalid:2380"),
    ]


def test_this_member_is_known_by_the_address_that_a_name_stands_for(fake_dns: FakeDns) -> None:
    fake_dns.records["_etcd-server._tcp.example.invalid"] = MEMBERS
    assert ("me", "http://127.0.0.1:2381") in found(fake_dns, "http://localhost:2381")


def test_a_service_name_is_part_of_what_is_asked_for(fake_dns: FakeDns) -> None:
    fake_dns.records["_etcd-server-lab._tcp.example.invalid"] = MEMBERS[:1]
    assert found(fake_dns, "http://b.example.invalid:2380", "lab") == [
        ("me", "http://b.example.invalid:2380")
    ]
    assert fake_dns.asked == [
        "_etcd-server-ssl-lab._tcp.example.invalid",
        "_etcd-server-lab._tcp.example.invalid",
    ]


def test_records_without_this_member_are_refused(fake_dns: FakeDns) -> None:
    fake_dns.records["_etcd-server._tcp.example.invalid"] = MEMBERS
    # The address is right, but the port is not.
    with pytest.raises(DiscoveryError, match=r"none of the members .* is this one.*:2381.*:2382"):
        found(fake_dns, "http://localhost:2382")


def test_a_name_that_stands_for_several_members_is_refused(
    fake_dns: FakeDns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them would take all records for its own, and be a cluster of one."""
    fake_dns.records["_etcd-server._tcp.example.invalid"] = MEMBERS[:2]
    known = {"a.example.invalid": {"10.0.0.1"}, "b.example.invalid": {"10.0.0.2"}}
    known["all.example.invalid"] = {"10.0.0.1", "10.0.0.2"}
    monkeypatch.setattr(discovery, "look_up", known.get)
    assert dict(found(fake_dns, "http://a.example.invalid:2380")).keys() == {"me", "0"}
    with pytest.raises(
        DiscoveryError, match=r"2 of the members .* are this one.* one member alone"
    ):
        found(fake_dns, "http://all.example.invalid:2380")


def test_without_records_it_says_which_are_missing(fake_dns: FakeDns) -> None:
    with pytest.raises(DiscoveryError, match=r"no SRV records _etcd-server\._tcp\.example"):
        found(fake_dns, "http://localhost:2380")


def test_a_record_that_says_there_is_no_such_service_counts_as_none(fake_dns: FakeDns) -> None:
    fake_dns.records["_etcd-server._tcp.example.invalid"] = NOT_HERE
    with pytest.raises(DiscoveryError, match="no SRV records"):
        found(fake_dns, "http://localhost:2380")


def test_members_with_tls_have_records_of_their_own(fake_dns: FakeDns) -> None:
    fake_dns.records["_etcd-server-ssl._tcp.example.invalid"] = MEMBERS
    assert found(fake_dns, "https://b.example.invalid:2380") == [
        ("0", "https://127.0.0.1:2381"),
        ("1", "https://a.example.invalid:2380"),
        ("me", "https://b.example.invalid:2380"),
    ]
    # A member with the same host and port, but without TLS, is not the one of the record.
    with pytest.raises(DiscoveryError, match=r"none of the members .* is this one.*https://b"):
        found(fake_dns, "http://b.example.invalid:2380")


def test_a_dns_server_that_fails_is_not_taken_for_missing_records(
    fake_dns: FakeDns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "TIMEOUT_S", 0.5)
    fake_dns.failing.add("_etcd-server._tcp.example.invalid")
    with pytest.raises(DiscoveryError, match="does not answer the query for _etcd-server"):
        found(fake_dns, "http://localhost:2380")


def test_clients_find_the_endpoints_of_a_cluster(fake_dns: FakeDns) -> None:
    fake_dns.records["_etcd-client._tcp.example.invalid"] = MEMBERS
    assert discovery.client_endpoints("example.invalid", "", fake_dns.resolver) == [
        "http://127.0.0.1:2381",
        "http://a.example.invalid:2380",
        "http://b.example.invalid:2380",
    ]


def test_etcdlite_ctl_finds_its_endpoints(
    fake_dns: FakeDns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns.resolver, "Resolver", lambda: fake_dns.resolver)
    with FakeServer() as server:
        server.store.put(b"k", b"v")
        record = f"0 0 {server.port} 127.0.0.1."
        fake_dns.records["_etcd-client._tcp.example.invalid"] = [record]
        fake_dns.records["_etcd-client-lab._tcp.example.invalid"] = [record]
        assert run_ctl("-d", "example.invalid", "get", "k") == (0, b"k\nv\n", "")
        by_environment = {"ETCDCTL_DISCOVERY_SRV": "example.invalid"}
        named = ("--discovery-srv-name=lab", "get", "k")
        assert run_ctl(*named, environ=by_environment) == (0, b"k\nv\n", "")
    ended = run_ctl("-d", "nowhere.invalid", "get", "k")
    assert ended.status == 1
    assert "no SRV records _etcd-client._tcp.nowhere.invalid" in ended.stderr
