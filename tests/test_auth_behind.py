"""Users and a member that is behind: it has not yet applied what a client changed at another
member, when the next request comes. The client must not notice."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from rigs.users import CHEAP, User, add_users
from test_cluster import SMALL, Cluster

from etcdlite import lease_rights, proto
from etcdlite.errors import EtcdError
from etcdlite.member import Member
from etcdlite.methods import SNAPSHOT
from etcdlite.proto import DecodeError
from etcdlite.replica import access
from etcdlite.wire import http2, streams
from etcdlite.wire.grpc import GrpcSession
from etcdlite.wire.hpack import pack

ROUND_S = 0.1
"""Seconds. A request and its answer take less, unless a link is blocked. Several rounds are shorter
than an election timeout."""

OLD = "revision of auth store is old"


class At:
    """A node, for `User`."""

    def __init__(self, cluster: Cluster, node: Any) -> None:
        self._cluster = cluster
        self._node = node

    @property
    def member(self) -> Member:
        member: Member = self._node.member
        return member

    def settle(self) -> None:
        self._node.turn()
        self._cluster.world.run_until(lambda: self.member.is_idle)


class House:
    """A cluster with the users root and ann. `hold` makes one member, `behind`, fall behind."""

    def __init__(self) -> None:
        self.cluster = Cluster(**SMALL, password_cost=CHEAP)
        leader, self.behind = self.cluster.leader, self.cluster.followers[0]
        self.ahead = At(self.cluster, leader)
        self.way = (leader.name, self.behind.name)
        add_users(self.ahead)
        self.root = User(self.ahead)
        self.root.log_in("root")
        self.done("Lease.LeaseGrant", ID=9, TTL=60)

    def done(self, name: str, /, **fields: Any) -> None:
        """root asks the leader."""
        answer = self.root.ask(name, **fields)
        assert not isinstance(answer, str), (name, answer)

    def log_in(self, name: str) -> str:
        """The token that a user gets from the leader."""
        return User(self.ahead).log_in(name).current_token

    def late(self, token: str = "") -> User:
        """A client of the member that is behind."""
        return User(At(self.cluster, self.behind), token)

    def hold(self, changes: Callable[[], Any]) -> Any:
        """Call `changes`, which asks the leader. `behind` does not apply them until `release`."""
        world = self.cluster.world
        world.run(3 * ROUND_S)
        here, there = self.ahead.member.state.auth, self.behind.member.state.auth
        assert (here.revision, here.enabled) == (there.revision, there.enabled)
        world.blocked = {self.way}
        made = changes()
        assert (here.revision, here.enabled) != (there.revision, there.enabled)
        return made

    def release(self) -> None:
        self.cluster.world.heal()
        self.cluster.world.run(5 * ROUND_S)

    def enable(self) -> str:
        """Enable auth; the token of root."""
        return self.change_and_log_in("Auth.AuthEnable")

    def change_and_log_in(self, name: str) -> str:
        self.done(name)
        self.root.current_token = self.log_in("root")
        return self.root.current_token

    def disable(self) -> None:
        self.root.current_token = self.log_in("root")
        self.done("Auth.AuthDisable")


@pytest.fixture(scope="module")
def house() -> House:
    return House()


@pytest.fixture(autouse=True)
def released(house: House) -> Iterator[None]:
    yield
    house.release()


Asked = tuple[str, dict[str, Any]]

PUT = proto.RequestOp(request_put=proto.PutRequest(key=b"a", value=b"t"))
SWAP = {
    "compare": [proto.Compare(key=b"a", target=proto.Compare.MOD, mod_revision=1)],
    "success": [PUT],
    "failure": [proto.RequestOp(request_range=proto.RangeRequest(key=b"a"))],
}

ASKED: list[Asked] = [
    ("KV.Put", {"key": b"a", "value": b"v"}),
    ("KV.Put", {"key": b"a", "lease": 9, "prev_kv": True}),
    ("KV.Range", {"key": b"a"}),
    ("KV.Range", {"key": b"a", "range_end": b"c"}),
    ("KV.RangeStream", {"key": b"a", "range_end": b"c"}),
    ("KV.RangeStream", {"key": b"a", "limit": 1}),
    ("KV.DeleteRange", {"key": b"a"}),
    ("KV.Txn", {"success": [PUT]}),
    ("KV.Txn", SWAP),
    ("KV.Compact", {"revision": 2}),
    ("Lease.LeaseGrant", {"TTL": 60}),
    ("Lease.LeaseGrant", {"ID": 10, "TTL": 60}),
    ("Lease.LeaseRevoke", {"ID": 10}),
    ("Lease.LeaseKeepAlive", {"ID": 9}),
    ("Lease.LeaseTimeToLive", {"ID": 9}),
    ("Lease.LeaseTimeToLive", {"ID": 9, "keys": True}),
    ("Lease.LeaseLeases", {}),
    ("Cluster.MemberList", {"linearizable": True}),
    ("Maintenance.Alarm", {}),
    ("Maintenance.Defragment", {}),
    ("Maintenance.Snapshot", {}),
    ("Auth.AuthStatus", {}),
    ("Watch.Watch", {"create_request": proto.WatchCreateRequest(key=b"a")}),
    ("Lock.Lock", {"name": b"a", "lease": 9}),
    ("Lock.Unlock", {"key": b"a"}),
    ("Election.Campaign", {"name": b"b", "lease": 9, "value": b"v"}),
    ("Election.Observe", {"name": b"b"}),
]
CHANGES: list[Asked] = [
    ("Auth.UserAdd", {"name": "eve", "password": "eve"}),
    ("Auth.UserChangePassword", {"name": "eve", "password": "other"}),
    ("Auth.UserGrantRole", {"user": "eve", "role": "r"}),
    ("Auth.UserRevokeRole", {"name": "eve", "role": "r"}),
    ("Auth.UserGet", {"name": "eve"}),
    ("Auth.UserList", {}),
    ("Auth.UserDelete", {"name": "eve"}),
    ("Auth.RoleAdd", {"name": "s"}),
    ("Auth.RoleGrantPermission", {"name": "s", "perm": proto.Permission(key=b"x")}),
    ("Auth.RoleRevokePermission", {"role": "s", "key": b"x"}),
    ("Auth.RoleGet", {"role": "s"}),
    ("Auth.RoleList", {}),
    ("Auth.RoleDelete", {"role": "s"}),
]
"""Apart from `ASKED`, because a stream that is under way ends when users change, as in etcd."""

REFUSALS = {"user name is empty", "invalid auth token", "permission denied", OLD}


def ask_all(house: House, requests: list[Asked], *tokens: str) -> dict[str, Any]:
    """Send each request with each token to the member that is behind, let it catch up, and return
    its answers."""
    users = [house.late(token) for token in tokens for _ in requests]
    asked = [
        (user, user.send(name, **fields), f"{name} {fields} {user.current_token!r}")
        for user, (name, fields) in zip(users, requests * len(tokens), strict=True)
    ]
    assert not any(user.answers for user, _, _ in asked)
    house.release()
    for _ in range(20):
        for user in users:
            while user.calls.have_more:
                user.calls.produce()
        house.cluster.world.run(ROUND_S)
    return {
        text: user.answers.get(request_id, user.messages.get(request_id))
        for user, request_id, text in asked
    }


def is_refused(answer: Any) -> bool:
    """Or not answered."""
    if isinstance(answer, list):
        return not answer or any(getattr(message, "canceled", False) for message in answer)
    return answer is None or (isinstance(answer, str) and answer in REFUSALS)


def refused(answers: dict[str, Any]) -> dict[str, Any]:
    return {text: answer for text, answer in answers.items() if is_refused(answer)}


@pytest.mark.parametrize("requests", [ASKED, CHANGES], ids=["asked", "changes"])
def test_auth_was_enabled_elsewhere(house: House, requests: list[Asked]) -> None:
    """A client enables auth at one member and logs in, and asks another one."""
    house.disable()
    token = house.hold(house.enable)
    assert not house.behind.member.state.auth.enabled
    assert not refused(ask_all(house, requests, token))


@pytest.mark.parametrize("requests", [ASKED, CHANGES], ids=["asked", "changes"])
def test_auth_was_disabled_elsewhere(house: House, requests: list[Asked]) -> None:
    house.hold(house.disable)
    assert house.behind.member.state.auth.enabled
    answers = ask_all(house, requests, "", "a token of an earlier cluster")
    house.enable()
    assert not refused(answers)


def test_users_changed_elsewhere(house: House) -> None:
    """The user may do what its last request was refused, and what it asks for was checked under
    older rules."""
    token = house.log_in("ann")
    user = house.late(token)
    assert user.ask("KV.Put", key=b"x") == "permission denied"
    permission = proto.Permission(permType=proto.Permission.READWRITE, key=b"x")
    house.hold(partial(house.done, "Auth.RoleGrantPermission", name="r", perm=permission))
    asked = [("KV.Put", {"key": key}) for key in (b"a", b"x")]
    asked += [("KV.Range", {"key": b"x", "serializable": True}), ("KV.RangeStream", {"key": b"x"})]
    asked += [("Watch.Watch", {"create_request": proto.WatchCreateRequest(key=b"x")})]
    assert not refused(ask_all(house, asked, token))
    taken = partial(house.done, "Auth.RoleRevokePermission", role="r", key=b"x")
    house.hold(taken)
    answers = list(ask_all(house, asked[:2], token).values())
    assert not isinstance(answers[0], str) and answers[1] == "permission denied"


def test_the_cluster_is_not_changed_by_a_user_who_lost_the_right_elsewhere(house: House) -> None:
    house.done("Auth.UserAdd", name="max", password="max")
    house.done("Auth.UserGrantRole", user="max", role="root")
    token = house.log_in("max")
    house.hold(partial(house.done, "Auth.UserRevokeRole", name="max", role="root"))
    members = house.ahead.member.state.membership.members
    ids = set(members)
    asked: list[Asked] = [
        ("Cluster.MemberAdd", {"peerURLs": ["http://m9:2380"], "isLearner": True}),
        ("Cluster.MemberUpdate", {"ID": min(ids), "peerURLs": ["http://m9:2380"]}),
        ("Cluster.MemberRemove", {"ID": min(ids)}),
        ("Maintenance.Downgrade", {"action": 1, "version": "0.1.0"}),
    ]
    answers = ask_all(house, asked, token)
    assert list(answers.values()) == ["permission denied"] * len(asked)
    assert set(members) == ids and all(
        not m.peerURLs[0].endswith("m9:2380") for m in members.values()
    )


@pytest.mark.parametrize("token", ["", "a token of an earlier cluster"])
def test_what_is_refused_for_good_is_told_once_the_member_is_current(
    house: House, token: str
) -> None:
    house.disable()
    house.hold(house.enable)
    answers = ask_all(house, [*ASKED, *CHANGES], token)
    permitted = [text.split()[0] for text, answer in answers.items() if not is_refused(answer)]
    # As in etcd, what only this member checks is answered by the rules that it knows.
    assert set(permitted) == {
        "Lease.LeaseKeepAlive", "Lease.LeaseTimeToLive", "Maintenance.Defragment",
        "Maintenance.Snapshot", "Watch.Watch",
    }  # fmt: skip


def test_a_request_is_carried_out_once(house: House) -> None:
    """A put that was refused before its place in the log, and not after it."""
    house.disable()
    before = house.behind.member.state.store.revision
    token = house.hold(house.enable)
    answers = ask_all(house, [("KV.Put", {"key": b"a"})] * 3, token)
    assert not refused(answers)
    assert house.behind.member.state.store.revision == before + 3


def test_without_a_leader_a_request_is_refused_at_once(house: House) -> None:
    user = house.late()
    house.behind.member.raft.leader, leader = 0, house.behind.member.raft.leader
    request_id = user.send("KV.Put", key=b"a")
    house.behind.member.raft.leader = leader
    assert user.answers[request_id] == "user name is empty"


def test_few_refused_requests_wait(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MAX_RECHECKS", 3)
    user = house.late("wrong")
    for _ in range(2):
        ids = [user.send("Maintenance.Defragment") for _ in range(4)]
        assert [request_id in user.answers for request_id in ids] == [False, False, False, True]
        house.release()
        assert {user.answers[request_id] for request_id in ids} == {"invalid auth token"}


def test_connections_share_the_places_of_refused_requests(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fills them all leaves places to the next ones."""
    monkeypatch.setattr(access, "MAX_RECHECKS", 6)
    users = [house.late("wrong") for _ in range(8)]
    waiting = []
    for user in users:
        ids = [user.send("Maintenance.Defragment") for _ in range(8)]
        waiting.append(len(ids) - len(user.answers))
    assert waiting == [6, 3, 2, 1, 1, 1, 1, 1]
    house.release()
    assert all(len(user.answers) == 8 for user in users)
    again = [users[0].send("Maintenance.Defragment") for _ in range(8)]
    assert len([each for each in again if each not in users[0].answers]) == 6
    house.release()


def test_a_watch_that_waits_outlives_the_end_of_its_requests(house: House) -> None:
    user = house.late(house.hold(partial(house.change_and_log_in, "Auth.RotateKey")))
    request_id = user.send("Watch.Watch", create_request=proto.WatchCreateRequest(key=b"a"))
    user.calls.finish(request_id)
    house.release()
    [created] = user.messages[request_id]
    assert created.created and request_id in user.calls


def watch(**fields: Any) -> bytes:
    return proto.WatchRequest(**fields).encode()


def create(key: bytes) -> bytes:
    return watch(create_request=proto.WatchCreateRequest(key=key))


def grpc_request(path: str, message: proto.Message, token: str = "") -> bytes:
    """The first bytes of a gRPC client."""
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode())]
    fields += [(b"content-type", b"application/grpc")]
    fields += [(b"token", token.encode())] if token else []
    body = message.encode()
    return (
        http2.PREFACE
        + http2.frame(http2.SETTINGS, 0, 0)
        + http2.frame(http2.HEADERS, http2.END_HEADERS, 1, pack(fields))
        + http2.frame(http2.DATA, http2.END_STREAM, 1, struct.pack(">BI", 0, len(body)) + body)
    )


def log_in_ahead(house: House) -> str:
    """A token that the member that is behind cannot judge."""
    house.done("Auth.RoleAdd", name="later")
    return house.log_in("root")


def test_messages_of_a_watch_stream_are_answered_in_order(house: House) -> None:
    """Clients take the next answer for that of the watch that they created first."""
    user = house.late(house.log_in("ann"))
    request_id = user.send("Watch.Watch", create_request=proto.WatchCreateRequest(key=b"x"))
    cancel = watch(cancel_request=proto.WatchCancelRequest(watch_id=0))
    for body in (cancel, create(b"a"), cancel, create(b"y"), cancel, create(b"b"), cancel):
        user.calls.message(request_id, body)
    user.calls.finish(request_id)
    house.release()
    told = [(message.created, message.canceled) for message in user.messages[request_id]]
    assert told == [(True, True), (True, False), (False, True), (True, True), (True, False)]
    assert request_id in user.calls  # The last watch goes on.


def test_few_messages_of_a_stream_wait(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_HELD", 100)
    user = house.late(house.hold(partial(log_in_ahead, house)))
    watcher = user.send("Watch.Watch", create_request=proto.WatchCreateRequest(key=b"a"))
    for _ in range(streams.MAX_HELD):
        user.calls.message(watcher, create(b"a"))
    with pytest.raises(EtcdError, match="too many requests"):
        user.calls.message(watcher, create(b"a"))
    assert user.calls.held[watcher] == streams.MAX_HELD * len(create(b"a")), "it counts as memory"
    renewer = user.send("Lease.LeaseKeepAlive", ID=9)
    renewal = proto.LeaseKeepAliveRequest(ID=9).encode()
    for _ in range(streams.MAX_UNCHECKED_RENEWALS - 1):
        user.calls.message(renewer, renewal)
    with pytest.raises(EtcdError, match="too many requests"):
        user.calls.message(renewer, renewal)
    with pytest.raises(EtcdError, match="too large"):
        user.calls.message(renewer, renewal + b"\x12\xff\x07" + bytes(1023))  # An unknown field.
    house.release()
    assert len(user.messages[watcher]) == streams.MAX_HELD + 1
    assert user.calls.held[watcher] == 0
    assert len(user.messages[renewer]) == streams.MAX_UNCHECKED_RENEWALS
    house.done("Auth.RoleDelete", role="later")


def test_a_backup_is_asked_for_in_a_message_that_can_be_read(house: House) -> None:
    """It is decoded at once. After a wait, the error would be raised in the member's reads."""
    user = house.late()
    user.messages[1] = []
    call = user.calls.open(1, SNAPSHOT, streams.SnapshotCall)
    with pytest.raises(DecodeError):
        call.message(b"\xff")


def test_large_reads_that_wait_are_counted(house: House) -> None:
    reads, root = house.behind.member.reads, house.late(house.log_in("root"))
    house.cluster.world.run(ROUND_S)
    user = house.late()
    user.send("KV.Range", key=bytes(1000), serializable=True)
    assert 1000 < reads._large_bytes < 2000
    session = GrpcSession(house.behind.member, lambda _: None)
    session.receive(grpc_request("/etcdserverpb.KV/Range", proto.RangeRequest(key=bytes(1000))))
    assert 2000 < reads._large_bytes < 3000
    root.send("Cluster.MemberUpdate", ID=77, peerURLs=["http://" + "m" * 1000 + ":1"])
    assert 3000 < reads._large_bytes < 4000
    house.release()
    assert not reads._large_bytes


@pytest.mark.parametrize("key", [b"a", b"x"], ids=["outdated", "refused"])
def test_a_cancelled_request_is_not_that_of_the_certificate_s_user(
    house: House, key: bytes
) -> None:
    """A proxy has a certificate, and passes on the tokens of its clients."""
    store = house.behind.member.state.store
    session = GrpcSession(house.behind.member, lambda _: None)
    session.certificate_user = "root"
    token = house.log_in("ann")
    house.hold(partial(house.done, "Auth.RoleAdd", name=f"other {key!r}"))
    before = store.revision
    session.receive(grpc_request("/etcdserverpb.KV/Put", proto.PutRequest(key=key), token))
    session.receive(http2.frame(http2.RST_STREAM, 0, 1, struct.pack(">I", 8)))
    assert not session.is_closing
    house.release()
    assert store.revision == before
    house.done("Auth.RoleDelete", role=f"other {key!r}")


def test_the_renewal_of_a_lease_with_many_keys_is_checked_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys are looked at in steps, after the first check."""
    monkeypatch.setattr(lease_rights, "KEYS_PER_STEP", 2)
    house.done("Lease.LeaseGrant", ID=11, TTL=60)
    for key in (b"a1", b"a2", b"a3", b"y"):
        house.done("KV.Put", key=key, lease=11)
    permission = proto.Permission(permType=proto.Permission.READWRITE, key=b"y")
    granted = partial(house.done, "Auth.RoleGrantPermission", name="r", perm=permission)
    token = house.log_in("ann")
    house.hold(granted)
    renewals = [("Lease.LeaseKeepAlive", {"ID": 11})] * 2
    assert not refused(ask_all(house, renewals, token))
    house.done("Auth.RoleRevokePermission", role="r", key=b"y")
    house.release()
    user = house.late(token)
    request_id = user.send("Lease.LeaseKeepAlive", ID=11)
    user.calls.message(request_id, proto.LeaseKeepAliveRequest(ID=11).encode())
    house.release()
    assert user.answers[request_id] == "permission denied"
