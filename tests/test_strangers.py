"""Strangers on the peer port: every way to be taken for a member is tried and refused."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rigs.processes import wait_until
from test_cluster_live import LiveCluster
from test_peer import Caller

from etcdlite import __version__, addresses, methods, peer_frames, proto
from etcdlite.addresses import Addresses
from etcdlite.client import Client
from etcdlite.frames import ERROR, HANDSHAKE, MAGIC, PING
from etcdlite.peer import FORWARD, INTRODUCE, MAX_UNKNOWN_FRAME_BYTES, RAFT, encode_message
from etcdlite.peer_frames import PeerFrameReader
from etcdlite.raft import HEARTBEAT, Message
from etcdlite.wire.peer_session import Accepted


class FixedAddresses:
    """Says yes to one address, when it is asked or later."""

    def __init__(self, right: str, is_slow: bool = False) -> None:
        self.right = right
        self.is_slow = is_slow
        self.waiting: list[Any] = []
        self.urls: list[list[str]] = []

    def check(self, address: str, urls: Any, done: Any) -> None:
        self.urls.append(list(urls))
        self.waiting.append((done, address == self.right))
        if not self.is_slow:
            self.answer()

    def answer(self) -> None:
        done, is_right = self.waiting.pop()
        done(is_right)


def from_address(caller: Caller, address: str, known: FixedAddresses) -> None:
    """The caller calls again, from this address."""
    caller.session = Accepted(caller.member, lambda session: None, address, known)
    caller.shaken = None
    caller._reader = PeerFrameReader(1 << 26)


def test_a_stranger_does_not_take_the_place_of_a_member_that_is_down() -> None:
    caller = Caller(members=3)
    victim = caller.nodes[2]
    victim.crash()
    caller.world.run(5)
    known = FixedAddresses("10.0.0.3")
    from_address(caller, "10.0.0.66", known)
    text = caller.refusal(member_id=victim.member_id, life=5)
    assert "10.0.0.66 is not an address of member" in text and "http://m3:2380" in text
    assert "peer-address-check=false" in text
    assert known.urls == [["http://m3:2380"]]
    assert caller.session.node == 0
    # It hears nothing, and nothing of it is heard.
    raft = caller.member.raft
    state = raft.hard_state
    bad = Message(HEARTBEAT, raft.id, victim.member_id, raft.term + 5)
    assert caller.ask(RAFT, encode_message(bad)) == []
    assert raft.hard_state == state
    from_address(caller, "10.0.0.3", known)
    caller.shake()
    caller.introduce(member_id=victim.member_id, life=6)
    assert caller.session.node == victim.member_id


def test_a_name_that_is_looked_up_keeps_a_member_waiting_and_nobody_else() -> None:
    caller = Caller(members=3)
    victim = caller.nodes[2]
    victim.crash()
    caller.world.run(5)
    known = FixedAddresses("10.0.0.3", is_slow=True)
    from_address(caller, "10.0.0.3", known)
    caller.shake()
    assert caller.introduce(member_id=victim.member_id, life=6) == []
    assert caller.session.node == 0 and not caller.session.is_closing
    known.answer()
    assert caller.session.node == victim.member_id
    # One that does not wait, or has gone meanwhile.
    for body in (b"", None):
        from_address(caller, "10.0.0.3", known)
        caller.shake()
        caller.introduce(member_id=victim.member_id, life=6)
        if body is None:
            caller.session.closed()
        else:
            caller.ask(FORWARD, body)
            assert caller.session.is_closing
        known.answer()
        assert caller.session.node == 0


def test_an_unknown_id_is_refused_while_there_is_no_leader() -> None:
    caller = Caller(members=3)
    for node in caller.nodes[1:]:
        node.crash()
    caller.world.run(5)
    assert caller.member.raft.leader == 0
    term = caller.member.raft.term
    assert "is not known here" in caller.refusal()
    heartbeat = Message(HEARTBEAT, caller.member.raft.id, 77, term + 1)
    caller.ask(RAFT, encode_message(heartbeat))
    assert caller.member.raft.term == term and caller.member.raft.leader == 0


@pytest.mark.parametrize("method", [RAFT, FORWARD, PING, methods.KEEP_ALIVE, methods.HASH_KV])
def test_who_is_not_introduced_is_not_listened_to(method: int) -> None:
    caller = Caller(members=3)
    raft = caller.member.raft
    state = raft.hard_state
    caller.shake()
    heartbeat = Message(HEARTBEAT, raft.id, caller.nodes[1].member_id, raft.term + 9)
    assert caller.ask(method, encode_message(heartbeat)) == []
    assert caller.session.is_closing
    assert raft.hard_state == state


def test_a_stranger_asks_once_and_not_for_long() -> None:
    caller = Caller(members=3)
    caller.shake()
    assert caller.ask(methods.MEMBER_LIST, b"")
    assert caller.ask(methods.MEMBER_LIST, b"", 2) == []
    assert caller.session.is_closing
    caller.session = Accepted(caller.member, lambda session: None)
    caller.shaken = None
    caller.shake()
    now = caller.member.clock()
    for at in range(20):
        caller.session.heard_at = now + at  # It sends a byte now and then.
        caller.session.tick(now + at)
    assert caller.session.is_aborted


def test_a_stranger_cannot_have_large_frames_held() -> None:
    caller = Caller(members=3)
    caller.shake()
    large = peer_frames.frame(1, INTRODUCE, 0, bytes(MAX_UNKNOWN_FRAME_BYTES + 1))
    caller.send(large[: peer_frames.HEADER_BYTES])
    assert caller.session.is_closing


def test_a_member_that_is_new_is_accepted_once_another_one_vouches_for_it() -> None:
    caller = Caller(members=3)
    assert "is not known here (yet)" in caller.refusal()
    caller.world.run(1)
    from_address(caller, "", FixedAddresses(""))
    assert "is not known here (yet)" in caller.refusal(), "nobody knows it"
    caller.world.run(1)
    new = proto.Member(ID=77, peerURLs=["http://m7:2380"])
    caller.nodes[1].member.state.membership.members[77] = new
    known = FixedAddresses("10.0.0.7")
    from_address(caller, "10.0.0.7", known)
    assert "is not known here (yet)" in caller.refusal()
    caller.world.run(1)
    from_address(caller, "10.0.0.8", known)
    assert "is not an address of member" in caller.refusal()
    from_address(caller, "10.0.0.7", known)
    caller.shake()
    caller.introduce()
    assert caller.session.node == 77
    assert known.urls[-1] == ["http://m7:2380"]


# Addresses.


class Names:
    """What names resolve to, instead of DNS."""

    def __init__(self, monkeypatch: Any) -> None:
        self.names: dict[str, list[str]] = {}
        self.answers = True
        self.asked: list[str] = []
        self.reported: list[Callable[[], None]] = []
        self.now = 100.0
        monkeypatch.setattr(addresses.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(addresses.socket, "getaddrinfo", self.look_up)
        self.addresses = Addresses(self.reported.append)

    def look_up(self, host: str, *_: Any, **__: Any) -> list[Any]:
        self.asked.append(host)
        if not self.answers:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        if host not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(0, 0, 0, "", (address, 0)) for address in self.names[host]]

    def check(self, address: str, *hosts: str) -> bool:
        answers: list[bool] = []
        self.addresses.check(address, [f"http://{host}:2380" for host in hosts], answers.append)
        while not answers:
            wait_until(lambda: self.reported, "a name is resolved")
            self.reported.pop()()
        return answers[0]


def test_an_address_is_compared_with_the_hosts_of_the_urls(monkeypatch: Any) -> None:
    names = Names(monkeypatch)
    assert names.check("10.0.0.1", "10.0.0.1")
    assert names.check("::ffff:10.0.0.1", "10.0.0.2", "10.0.0.1")
    assert names.check("fe80::1%eth0", "[fe80:0::1]")
    assert not names.check("10.0.0.1", "10.0.0.2")
    assert not names.check("10.0.0.1")
    assert names.check("127.0.0.1", "127.0.0.5"), "the system chooses it"
    assert not names.check("127.0.0.6", "127.0.0.5")
    assert not names.check("127.0.0.1", "10.0.0.1")
    assert names.asked == []


def test_a_name_is_resolved_away_from_the_loop_and_kept_for_a_while(monkeypatch: Any) -> None:
    names = Names(monkeypatch)
    names.names = {"one": ["10.0.0.1", "10.0.0.2"], "two": ["10.0.0.3"]}
    assert names.check("10.0.0.2", "one")
    assert names.check("10.0.0.1", "one")
    assert names.asked == ["one"]
    assert not names.check("10.0.0.9", "one"), "it was just resolved"
    names.now += 2
    names.names["one"] = ["10.0.0.9"]
    assert names.check("10.0.0.9", "one"), "it has moved"
    assert names.check("10.0.0.3", "one", "two")
    names.now += 100
    del names.names["one"]
    assert not names.check("10.0.0.9", "one"), "that was long ago"


def test_what_a_name_resolved_to_stays_while_no_name_server_answers(monkeypatch: Any) -> None:
    names = Names(monkeypatch)
    names.names = {"one": ["10.0.0.1"]}
    assert names.check("10.0.0.1", "one")
    names.answers = False
    for _ in range(3):
        names.now += 100
        assert not names.check("10.0.0.2", "one")
        assert names.check("10.0.0.1", "one")
    names.answers = True
    names.now += 2
    names.names["one"] = ["10.0.0.2"]
    assert names.check("10.0.0.2", "one")
    assert not names.check("10.0.0.1", "one")


def test_the_hosts_of_former_members_are_forgotten(monkeypatch: Any) -> None:
    monkeypatch.setattr(addresses, "MAX_HOSTS", 3, raising=False)
    names = Names(monkeypatch)

    def asked_for(*numbers: int) -> list[str]:
        """The names that are resolved when members with these numbers connect."""
        names.asked.clear()
        for number in numbers:
            names.names[f"m{number}"] = [f"10.0.0.{number}"]
            assert names.check(f"10.0.0.{number}", f"m{number}")
        return names.asked.copy()

    assert len(asked_for(1, 2, 3, 4, 5, 6)) == 6
    assert asked_for(6, 5, 4) == [], "the latest ones are remembered"
    assert asked_for(1) == ["m1"], "this one was dropped for others"
    names.now += 100
    assert asked_for(5, 7, 8, 5) == ["m5", "m7", "m8"], "what is in use stays"


def test_names_that_are_slow_to_resolve_are_resolved_once_for_a_check(monkeypatch: Any) -> None:
    names = Names(monkeypatch)
    look_up = names.look_up

    def slow(host: str, *more: Any, **options: Any) -> list[Any]:
        names.now += 5
        assert len(names.asked) < 3, "a check has names resolved for ever"
        return look_up(host, *more, **options)

    monkeypatch.setattr(addresses.socket, "getaddrinfo", slow)
    assert not names.check("10.0.0.9", "one", "two", "three")
    assert sorted(names.asked) == ["one", "three", "two"]


# Live.


def call_as(port: int, source: str, cluster_id: int, member_id: int, to: int) -> str:
    """Introduce oneself at a peer port; the refusal, or nothing."""
    with socket.create_connection(("127.0.0.1", port), 5, (source, 0)) as sock:
        introduction = proto.Introduction(
            cluster_id=cluster_id,
            member_id=member_id,
            to=to,
            life=time.monotonic_ns(),
            version=__version__,
        )
        frame = peer_frames.frame(1, INTRODUCE, 0, introduction.encode())
        sock.sendall(HANDSHAKE.pack(MAGIC, 2, 2) + frame)
        reader = PeerFrameReader(1 << 20)
        greeting = b""
        while len(greeting) < HANDSHAKE.size:
            greeting += sock.recv(1 << 16)
        reader.feed(greeting[HANDSHAKE.size :])
        while True:
            for request_id, _, flags, body in reader:
                if request_id == 1:
                    return proto.Error.decode(body).message if flags & ERROR else ""
            reader.feed(sock.recv(1 << 16))


@pytest.mark.parametrize("is_checked", [True, False])
def test_a_process_elsewhere_does_not_take_the_id_of_a_member(
    tmp_path: Path, is_checked: bool
) -> None:
    flag = f"--peer-address-check={str(is_checked).lower()}"
    cluster = LiveCluster(tmp_path, 3, flag)
    try:
        leader = cluster.leader
        victim = cluster.follower()
        victim_id = cluster.id_of(victim)
        with Client(leader.endpoint) as client:
            header = client.call("Maintenance.Status", proto.StatusRequest()).header
        victim.kill()
        name = next(name for name, member in cluster.members.items() if member is leader)
        port = cluster._peer_ports[name]

        def introduce(member_id: int) -> str:
            return call_as(port, "127.0.0.9", header.cluster_id, member_id, header.member_id)

        assert "is not known here" in introduce(0xBAD)
        refusal = wait_until(
            lambda: (
                (answer := introduce(victim_id)) is not None
                and "another process" not in answer
                and (answer or "welcome")
            ),
            "the victim is known to be dead",
        )
        if is_checked:
            assert "127.0.0.9 is not an address of member" in refusal
        else:
            assert refusal == "welcome"
        victim.start()
        cluster.call("KV.Put", proto.PutRequest(key=b"k", value=b"v"))
        assert cluster.id_of(victim) == victim_id
    finally:
        for member in cluster.running:
            member.kill()
