"""How many connections there may be, and how much memory they may hold together."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from etcdlite import memory, places
from etcdlite.listeners import raise_file_limit
from etcdlite.memory import SMALL_BYTES, Budget
from etcdlite.places import MAX_MEMBER_CONNECTIONS, MAX_UNOPENED, Places


class Conn:
    """A connection, and its session."""

    def __init__(
        self,
        is_open: bool = True,
        kept_bytes: int = 0,
        host: str = "10.0.0.1",
        is_member: bool = False,
    ) -> None:
        self.session = self
        self.is_open = is_open
        self.kept_bytes = kept_bytes
        self.host = host
        self.is_member = is_member


def test_clients_never_take_the_places_of_members() -> None:
    it = Places(max_clients=100, max_per_address=0)
    for _ in range(100):
        assert not it.refusal("127.0.0.1", False)
        it.take(Conn(host="127.0.0.1"))
    assert it.refusal("127.0.0.1", False) == "connection limit reached"
    assert not it.refusal("127.0.0.1", True)


def test_an_address_has_a_quarter_of_the_places() -> None:
    it = Places(max_clients=100, max_per_address=0)
    connections = [Conn() for _ in range(25)]
    for connection in connections:
        it.take(connection)
    assert it.refusal("10.0.0.1", False) == "connection limit of its address reached"
    assert not it.refusal("10.0.0.2", False)
    it.free(connections[0])
    assert not it.refusal("10.0.0.1", False)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "127.8.9.1"])
def test_this_machine_may_have_all_places_unless_a_limit_is_configured(host: str) -> None:
    by_default, configured = Places(8, 0), Places(8, 2)
    for _ in range(2):
        by_default.take(Conn(host=host))
        configured.take(Conn(host=host))
    assert not by_default.refusal(host, False)
    assert configured.refusal(host, False) == "connection limit of its address reached"


def test_the_oldest_connection_that_says_nothing_makes_room() -> None:
    it = Places(max_clients=10_000, max_per_address=0)
    silent = [Conn(is_open=False) for _ in range(MAX_UNOPENED)]
    for connection in silent:
        assert it.take(connection) is None
    silent[0].is_open = True
    assert it.take(Conn()) is None
    assert it.take(Conn(is_open=False)) is None
    assert it.take(Conn(is_open=False)) is silent[1]
    it.free(silent[1])
    assert it.take(Conn(is_open=False)) is silent[2]


def test_strangers_at_the_peer_port_make_room_for_members() -> None:
    it = Places(max_clients=10, max_per_address=0)
    strangers = [Conn(is_open=False, is_member=True) for _ in range(MAX_MEMBER_CONNECTIONS)]
    for stranger in strangers:
        it.take(stranger)
    assert not it.refusal("10.0.0.2", True)
    assert it.take(Conn(host="10.0.0.2", is_member=True)) is strangers[0]


def test_members_that_are_too_many_are_refused() -> None:
    it = Places(max_clients=10, max_per_address=0)
    for _ in range(places.MAX_MEMBER_CONNECTIONS):
        it.take(Conn(is_member=True))
    assert it.refusal("10.0.0.1", True) == "connection limit of the peer port reached"


# Memory.

MIB = 1 << 20


def test_the_largest_holders_go_first_until_the_rest_fits() -> None:
    budget = Budget(100 * MIB)
    clients = [Conn(kept_bytes=size * MIB) for size in (10, 40, 50, 30, 1)]
    members = [Conn(kept_bytes=20 * MIB, is_member=True)]
    assert budget.excess([*members, *clients]) == [clients[2], clients[1]]
    assert budget.held_bytes == 61 * MIB and budget.shed == 2
    del clients[1:3]
    assert not budget.excess([*members, *clients])


def test_members_are_not_closed_for_what_they_hold() -> None:
    members = [Conn(kept_bytes=80 * MIB, is_member=True) for _ in range(2)]
    clients = [Conn(kept_bytes=size * MIB) for size in (1, 2)]
    assert Budget(100 * MIB).excess([*members, *clients]) == [clients[1], clients[0]]


def test_those_that_hold_little_stay() -> None:
    budget = Budget(10 * MIB)
    clients = [Conn(kept_bytes=SMALL_BYTES - 1)] * 1000
    assert not budget.excess(clients)


def test_the_limits_are_those_of_the_own_control_group_and_of_all_above_it() -> None:
    v2 = memory.cgroup_limits("0::/system.slice/etcdlite.service\n", "/cg")
    assert v2 == [
        "/cg/memory.max",
        "/cg/memory.high",
        "/cg/system.slice/memory.max",
        "/cg/system.slice/memory.high",
        "/cg/system.slice/etcdlite.service/memory.max",
        "/cg/system.slice/etcdlite.service/memory.high",
    ]
    v1 = memory.cgroup_limits("5:cpu,cpuacct:/a\n4:memory:/box\n0::/\n", "/cg")
    assert v1 == [
        "/cg/memory/memory.limit_in_bytes",
        "/cg/memory/box/memory.limit_in_bytes",
        "/cg/memory.max",
        "/cg/memory.high",
    ]
    assert memory.cgroup_limits("junk") == memory.cgroup_limits("") == []


def test_the_memory_of_the_control_group_counts(tmp_path: Path) -> None:
    whole = memory.total_bytes([str(tmp_path / "missing")])
    (tmp_path / "unlimited").write_text("max\n")
    (tmp_path / "limited").write_text(f"{64 * MIB}\n")
    (tmp_path / "junk").write_bytes(b"\xff")
    assert memory.total_bytes([str(tmp_path / "junk")]) == whole
    assert memory.total_bytes([str(tmp_path / "unlimited")]) == whole > 64 * MIB
    assert memory.total_bytes([str(tmp_path / "limited")]) == 64 * MIB


def test_a_limit_of_open_files_that_the_kernel_no_longer_allows_is_not_raised_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """setrlimit(2): a hard limit above fs.nr_open, which was lowered later, cannot be set again."""

    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 1 << 30))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_file_limit() == 1024
