"""A member with users: what comes through its door, what its entries hold, and what it keeps."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.lone_member import LoneMember, turn
from rigs.users import CHEAP, User, add_users

from etcdlite import auth as auth_module
from etcdlite import frames, lease_rights, log, methods, passwords, proto, rights
from etcdlite.auth import Auth
from etcdlite.errors import EtcdError
from etcdlite.methods import METHOD_BY_NAME
from etcdlite.ranges import SAMPLE_KEYS
from etcdlite.replica import access, logins, reads, writes
from etcdlite.replica.entry import decode_requests
from etcdlite.request import Asked, Waiter
from etcdlite.storage import layout
from etcdlite.wire import exposition, streams
from etcdlite.wire.native import NativeSession

DENIED = "permission denied"
EMPTY = "user name is empty"
INVALID = "invalid auth token"
OLD = "revision of auth store is old"
REVOKE: list[tuple[str, dict[str, Any]]] = [
    ("Auth.RoleRevokePermission", {"role": "r", "key": b"a", "range_end": b"c"})
]
USER_REVOKE_ROLE = METHOD_BY_NAME["Auth.UserRevokeRole"].number


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[LoneMember]:
    lone = LoneMember(tmp_path / "member", password_cost=CHEAP)
    yield lone
    lone.close()


@pytest.fixture
def house(lone: LoneMember) -> LoneMember:
    add_users(lone)
    return lone


@pytest.fixture
def root(house: LoneMember) -> User:
    return User(house).log_in("root")


@pytest.fixture
def ann(house: LoneMember) -> User:
    return User(house).log_in("ann")


def record_entries(lone: LoneMember) -> list[tuple[int, Any]]:
    """A list to which (method, request) of all further requests of entries are added."""
    found: list[tuple[int, Any]] = []
    save_all = lone.wal.save_all

    def recording(saves: Any) -> None:
        for entry in (entry for save in saves for entry in save.entries):
            found.extend((method, request) for _, _, method, request in decode_requests(entry.data))
        save_all(saves)

    lone.wal.save_all = recording  # type: ignore[method-assign]
    return found


# Who asks.


def test_requests_need_a_user_once_auth_is_enabled(house: LoneMember) -> None:
    nobody = User(house)
    for name, fields in (
        ("KV.Range", {"key": b"a"}),
        ("KV.Range", {"key": b"a", "serializable": True}),
        ("KV.Range", {"key": b"a", "range_end": b"b"}),
        ("KV.RangeStream", {"key": b"a"}),
        ("KV.Put", {"key": b"a"}),
        ("KV.DeleteRange", {"key": b"a"}),
        ("KV.Txn", {}),
        ("KV.Compact", {"revision": 1}),
        ("Lease.LeaseGrant", {"ID": 1, "TTL": 9}),
        ("Lease.LeaseRevoke", {"ID": 1}),
        ("Lease.LeaseKeepAlive", {"ID": 1}),
        ("Lease.LeaseTimeToLive", {"ID": 1}),
        ("Lease.LeaseLeases", {}),
        ("Cluster.MemberList", {}),
        ("Cluster.MemberAdd", {"peerURLs": ["http://127.0.0.1:1"]}),
        ("Cluster.MemberRemove", {"ID": 7}),
        ("Maintenance.Alarm", {}),
        ("Maintenance.Defragment", {}),
        ("Maintenance.Hash", {}),
        ("Maintenance.HashKV", {}),
        ("Maintenance.Snapshot", {}),
        ("Maintenance.MoveLeader", {"targetID": 7}),
        ("Auth.AuthDisable", {}),
        ("Auth.AuthEnable", {}),
        ("Auth.AuthStatus", {}),
        ("Auth.UserAdd", {"name": "eve", "password": "eve"}),
        ("Auth.UserChangePassword", {"name": "root", "password": "eve"}),
        ("Auth.UserGet", {"name": "ann"}),
        ("Auth.RoleList", {}),
        ("v3", None),
    ):
        if fields is not None:
            assert nobody.ask(name, **fields) == EMPTY, name
    for name in ("Lock.Lock", "Election.Campaign", "Election.Leader", "Election.Observe"):
        assert nobody.ask(name, name=b"a") == EMPTY, name
    assert nobody.ask("Maintenance.Status").leader == 7
    wrong = User(house, "wrong")
    assert wrong.ask("KV.Range", key=b"a") == INVALID
    assert wrong.ask("KV.Put", key=b"a") == INVALID
    assert wrong.ask("Maintenance.Status").leader == 7


def test_the_user_of_a_certificate_counts_if_there_is_no_token(
    house: LoneMember, ann: User
) -> None:
    someone = User(house)
    someone.certificate_user = "ann"
    assert someone.ask("KV.Put", key=b"a").header.revision == 2
    assert someone.ask("KV.Put", key=b"x") == DENIED
    someone.certificate_user = "eve"
    assert someone.ask("KV.Put", key=b"a") == DENIED
    assert someone.ask("Auth.UserList") == "user name not found"
    someone.current_token = ann.current_token
    assert someone.ask("KV.Put", key=b"a").header.revision == 3


def test_a_user_does_what_it_may(ann: User, root: User) -> None:
    assert ann.ask("KV.Put", key=b"a", value=b"1").header.revision == 2
    assert ann.ask("KV.Range", key=b"a").kvs[0].value == b"1"
    assert ann.ask("KV.Range", key=b"a", range_end=b"c").count == 1
    assert ann.ask("KV.Range", key=b"a", range_end=b"d") == DENIED
    assert ann.ask("KV.Range", key=b"a", range_end=b"d", serializable=True) == DENIED
    assert ann.ask("KV.RangeStream", key=b"a", range_end=b"c")
    assert ann.ask("KV.RangeStream", key=b"a", range_end=b"\0") == DENIED
    assert ann.ask("KV.Put", key=b"c") == DENIED
    assert ann.ask("Auth.UserGet", name="ann").roles == ["r"]
    assert ann.ask("Auth.UserGet", name="root") == DENIED
    assert ann.ask("Auth.RoleGet", role="r").perm[0].key == b"a"
    assert ann.ask("Auth.RoleGet", role="root") == DENIED
    assert ann.ask("Auth.UserChangePassword", name="ann", password="x") == DENIED
    assert ann.ask("Maintenance.Snapshot") == DENIED
    assert ann.ask("Maintenance.Alarm").alarms == ()
    assert ann.ask("Maintenance.Alarm", action=1, alarm=1) == DENIED
    assert root.ask("Auth.AuthStatus").enabled
    assert root.ask("Auth.UserList").users == ["ann", "root"]
    assert root.ask("Auth.RoleList").roles == ["r"]
    assert root.ask("Maintenance.Snapshot")


def test_locks_and_elections_are_requests_of_their_caller(ann: User, root: User) -> None:
    [locked] = ann.ask("Lock.Lock", name=b"a")
    assert locked.key.startswith(b"a/")
    assert ann.ask("Lock.Lock", name=b"x") == DENIED
    assert ann.ask("Election.Leader", name=b"x") == DENIED
    assert ann.ask("Lock.Unlock", key=b"x/1") == DENIED
    assert ann.ask("Lock.Unlock", key=locked.key)
    # One that is cancelled while it waits takes its key back, although its request is gone.
    [held] = root.ask("Lock.Lock", name=b"a")
    waiting = ann.send("Lock.Lock", name=b"a")
    ann.house.settle()
    ann.calls.close(waiting)
    ann.house.settle()
    left = root.ask("KV.Range", key=b"a/", range_end=b"a0").kvs
    assert [kv.key for kv in left] == [held.key]


# Watches.


def create(**fields: Any) -> Any:
    return proto.WatchCreateRequest(**fields)


def as_status(code: str, text: str) -> str:
    """The reason of a refused watch, in the form that etcd's Go client knows."""
    return f"rpc error: code = {code} desc = etcdserver: {text}"


def test_a_watch_is_checked_when_it_is_created(ann: User) -> None:
    """As in etcd, in band; and GHSA-xg4h-6gfc-h4m8."""
    for key, range_end, refused in (
        (b"k", b"", ""),
        (b"a", b"c", ""),
        (b"k", b"\0", DENIED),
        (b"", b"\0", DENIED),
        (b"a", b"d", DENIED),
        (b"x", b"", DENIED),
    ):
        [answer] = ann.ask("Watch.Watch", create_request=create(key=key, range_end=range_end))
        assert answer.created
        assert answer.canceled == bool(refused)
        assert answer.cancel_reason == (refused and as_status("PermissionDenied", refused))
        assert (answer.watch_id == -1) == bool(refused)
    [answer] = User(ann.house).ask("Watch.Watch", create_request=create(key=b"k"))
    assert answer.canceled and answer.cancel_reason == as_status("InvalidArgument", EMPTY)


def test_a_watch_goes_on_after_its_user_has_lost_the_right_as_in_etcd(
    ann: User, root: User
) -> None:
    watching = ann.send("Watch.Watch", create_request=create(key=b"k"))
    ann.house.settle()
    root.ask("Auth.UserRevokeRole", name="ann", role="r")
    root.ask("Auth.UserDelete", name="ann")
    root.ask("KV.Put", key=b"k")
    root.ask("KV.Put", key=b"k1")
    _, event = ann.messages[watching]
    assert [each.kv.key for each in event.events] == [b"k"]
    [answer] = ann.ask("Watch.Watch", create_request=create(key=b"k"))
    assert answer.cancel_reason == as_status("Unauthenticated", INVALID)


# Leases.


def test_leases(ann: User, root: User) -> None:
    assert ann.ask("Lease.LeaseGrant", ID=1, TTL=60).ID == 1
    assert ann.ask("KV.Put", key=b"a", lease=1).header.revision == 2
    [renewed] = ann.ask("Lease.LeaseKeepAlive", ID=1)
    assert renewed.TTL == 60
    assert ann.ask("Lease.LeaseTimeToLive", ID=1, keys=True).keys == [b"a"]
    assert [lease.ID for lease in ann.ask("Lease.LeaseLeases").leases] == [1]
    root.ask("KV.Put", key=b"x", lease=1)
    assert ann.ask("KV.Put", key=b"b", lease=1) == DENIED
    put = proto.RequestOp(request_put=proto.PutRequest(key=b"b", lease=1))
    assert ann.ask("KV.Txn", success=[put]) == DENIED
    assert ann.ask("Lease.LeaseRevoke", ID=1) == DENIED
    assert ann.ask("Lease.LeaseKeepAlive", ID=1) == DENIED
    assert ann.ask("Lease.LeaseTimeToLive", ID=1, keys=True) == DENIED
    assert ann.ask("Lease.LeaseTimeToLive", ID=1).TTL > 0
    assert ann.ask("Lease.LeaseLeases") == DENIED
    assert root.ask("KV.Range", key=b"a", range_end=b"z").count == 2
    root.ask("KV.DeleteRange", key=b"x")
    assert not isinstance(ann.ask("Lease.LeaseRevoke", ID=1), str)


def test_the_leader_revokes_what_expires(ann: User, root: User) -> None:
    """For itself, whoever owns the lease and its keys."""
    root.ask("Lease.LeaseGrant", ID=1, TTL=2)
    root.ask("KV.Put", key=b"x", lease=1)
    for _ in range(40):
        ann.house.tick()
    assert root.ask("KV.Range", key=b"x").count == 0


# When it is applied.


def test_what_was_permitted_at_the_door_is_checked_again_if_users_change_before_it_is_applied(
    ann: User, root: User
) -> None:
    """The writes and the change are in one entry. etcd's clients try again themselves."""
    first = ann.send("KV.Put", key=b"a")
    changed = root.send("Auth.UserRevokeRole", name="ann", role="r")
    second = ann.send("KV.Put", key=b"a")
    third = root.send("KV.Put", key=b"a")
    ann.house.settle()
    assert ann.answers[first].header.revision == 2
    assert not isinstance(root.answers[changed], str)
    assert ann.answers[second] == DENIED
    assert root.answers[third].header.revision == 3


@pytest.mark.parametrize(
    ("asked", "others", "expected"),
    [
        # Outdated when it is applied, because users change before it: it is checked again.
        (("KV.Put", {"key": b"a"}), REVOKE, DENIED),
        (("KV.DeleteRange", {"key": b"a"}), REVOKE, DENIED),
        (("Lock.Unlock", {"key": b"a"}), REVOKE, DENIED),
        # Checked only when it is served.
        (("KV.Range", {"key": b"x"}), [], DENIED),
        (("KV.Range", {"key": b"a", "range_end": b"z"}), [], DENIED),
        (("Auth.UserList", {}), [], DENIED),
        (("KV.Put", {"key": b"a"}), [], None),
    ],
)
def test_a_request_is_of_the_user_that_asked_for_it_whoever_logs_in_after_it(
    house: LoneMember,
    root: User,
    ann: User,
    asked: tuple[str, dict[str, Any]],
    others: list[tuple[str, dict[str, Any]]],
    expected: str | None,
) -> None:
    session = NativeSession(house.member, lambda session: None)

    def send(number: int, name: str, **fields: Any) -> None:
        method = METHOD_BY_NAME[name]
        body = method.request(**fields).encode()
        session.receive(frames.frame(number, method.number, frames.END, body))

    session.receive(frames.HANDSHAKE.pack(frames.MAGIC, 1, 1))
    send(1, "Auth.Authenticate", password=ann.current_token)
    house.settle()
    for name, fields in others:
        root.send(name, **fields)
    send(3, asked[0], **asked[1])
    session.logged_in(root.current_token)  # As if a login was answered now.
    while session.has_more:  # A lock's call begins only now.
        session.produce()
    house.settle()
    send(3, "Auth.UserList")  # The id may be used again, and is of the new user then.
    house.settle()
    reader = frames.FrameReader(1 << 20)
    reader.feed(bytes(session.outbox.take())[frames.HANDSHAKE.size :])
    answers = [
        proto.Error.decode(body).message.removeprefix("etcdserver: ")
        if flags & frames.ERROR
        else None
        for number, _, flags, body in reader
        if number == 3
    ]
    assert answers == [expected, None]


def test_a_compaction_in_the_log_needs_a_user_and_no_role(
    house: LoneMember, ann: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member with an earlier program takes it from any user, and all members must agree."""
    for _ in range(3):
        ann.ask("KV.Put", key=b"a")
    assert ann.ask("KV.Compact", revision=2) == DENIED
    monkeypatch.setattr(access.Access, "check", lambda self, asked: self.author(*asked[:2]))
    assert not isinstance(ann.ask("KV.Compact", revision=2), str)
    assert house.member.state.store.compact_revision == 2


def test_each_put_of_an_entry_is_checked_for_its_own_author(
    house: LoneMember, ann: User, root: User
) -> None:
    """As if the member that proposed the entry had checked nothing."""
    revision = house.member.state.auth.revision
    by_ann, by_root, by_nobody = (
        proto.Author(name="ann", revision=revision),
        proto.Author(name="root", revision=revision),
        proto.Author(),
    )
    old = proto.Author(name="ann", revision=revision - 1)
    mine, other = proto.PutRequest(key=b"a"), proto.PutRequest(key=b"x")
    previous = proto.PutRequest(key=b"x", prev_kv=True)
    revoked = proto.AuthUserRevokeRoleRequest(name="ann", role="r")
    expected: list[tuple[Any, str]] = [
        (mine, EMPTY), (by_ann, ""), (mine, ""), (other, DENIED), (mine, ""), (by_root, ""),
        (other, ""), (previous, ""), (by_ann, ""), (other, DENIED), (previous, DENIED), (mine, ""),
        (by_nobody, ""), (mine, EMPTY), (old, ""), (mine, OLD), (proto.Author(is_member=True), ""),
        (other, ""), (revoked, ""), (other, ""), (by_ann, ""), (mine, OLD), (by_root, ""),
        (other, OLD), (proto.Author(name="ann", revision=revision + 1), ""), (mine, DENIED),
        (proto.Author(name="root", revision=revision + 1), ""), (mine, ""),
    ]  # fmt: skip
    numbers = {proto.Author: methods.AUTHOR, proto.PutRequest: methods.PUT}
    waiters: list[Any] = []
    for at, (request, _) in enumerate(expected):
        number = numbers.get(type(request), USER_REVOKE_ROLE)
        waiters.append(
            Waiter(None if number == methods.AUTHOR else ann, 1000 + at, number, request)
        )
    list(house.member.state.apply(waiters))
    outdated = {waiter[1]: failure.text for waiter, failure, _ in house.member.state.outdated}
    house.member.state.outdated.clear()
    for at, (request, refused) in enumerate(expected):
        answer = ann.answers.get(1000 + at)
        assert (answer if isinstance(answer, str) else "") == (
            refused if refused == DENIED else ""
        ), (at, request)
        left = outdated.get(1000 + at, "").removeprefix("etcdserver: ")
        assert left == ("" if refused == DENIED else refused), (at, request)
    assert not isinstance(root.ask("KV.Put", key=b"a"), str)


def test_the_door_knows_nothing_older_than_the_auth_revision_and_a_tick(
    house: LoneMember, ann: User, root: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = house.member.tokens
    looked_at: list[str] = []
    author = tokens.author

    def looking(auth: Any, token: str) -> Any:
        looked_at.append(token)
        return author(auth, token)

    monkeypatch.setattr(tokens, "author", looking)

    def look_ups(name: str, **fields: Any) -> int:
        del looked_at[:]
        assert not isinstance(ann.ask(name, **fields), str)
        return len(looked_at)

    assert look_ups("KV.Range", key=b"a") == 1
    assert look_ups("KV.Range", key=b"a", range_end=b"c") == look_ups("KV.Put", key=b"b") == 0
    assert look_ups("KV.Put", key=b"b", prev_kv=True) == 1
    house.tick()
    assert look_ups("KV.Put", key=b"b") == 1
    assert look_ups("KV.Put", key=b"b") == look_ups("KV.Range", key=b"k") == 0
    # What is not permitted, or not to this user, in the same tick.
    assert ann.ask("KV.Put", key=b"k") == ann.ask("KV.Range", key=b"a", range_end=b"\0") == DENIED
    assert ann.ask("KV.Put", key=b"x", prev_kv=True) == DENIED
    assert User(house).ask("KV.Range", key=b"a") == EMPTY
    root.ask("Auth.RoleRevokePermission", role="r", key=b"a", range_end=b"c")
    assert ann.ask("KV.Range", key=b"a") == ann.ask("KV.Put", key=b"a") == DENIED
    assert look_ups("KV.Range", key=b"k") == 1 and look_ups("KV.Range", key=b"k") == 0
    # A token that ends counts until the next tick.
    monkeypatch.setattr(tokens, "_clock", lambda: 1e12)
    assert look_ups("KV.Range", key=b"k") == 0
    house.tick()
    assert ann.ask("KV.Range", key=b"k") == INVALID


def test_the_door_remembers_few_tokens(
    house: LoneMember, ann: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "MAX_RECENT", 2)
    for _ in range(5):
        other = User(house).log_in("ann")
        for user in (other, ann):
            assert not isinstance(user.ask("KV.Put", key=b"a"), str)
            assert user.ask("KV.Put", key=b"x") == DENIED


@pytest.fixture
def overloaded(lone: LoneMember, monkeypatch: pytest.MonkeyPatch) -> tuple[User, User, list[str]]:
    """The users root and max, and a list with an item for each time that the permissions of max
    were put together, which takes many steps."""
    monkeypatch.setattr(rights, "PERMISSIONS_PER_STEP", 8)
    add_users(lone)
    root = User(lone).log_in("root")
    root.ask("Auth.UserAdd", name="max", password="max")
    for role in range(6):
        root.ask("Auth.RoleAdd", name=f"r{role}")
        root.ask("Auth.UserGrantRole", user="max", role=f"r{role}")
        for number in range(role, 60, 6):
            key, end = b"a%02d" % number, b"a%02d" % (number + 1)
            perm = proto.Permission(permType=proto.Permission.READWRITE, key=key, range_end=end)
            root.ask("Auth.RoleGrantPermission", name=f"r{role}", perm=perm)
    learned: list[str] = []
    learn_steps = Auth._learn_steps

    def learn(self: Auth, name: str) -> Iterator[None]:
        if name == "max":
            learned.append(name)
        return learn_steps(self, name)

    monkeypatch.setattr(Auth, "_learn_steps", learn)
    return root, User(lone).log_in("max"), learned


def test_permissions_for_which_there_was_no_memory_are_put_together_again(
    overloaded: tuple[User, User, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, user, _ = overloaded
    root.ask("Auth.RoleAdd", name="one more")  # What is known ends with any change.

    def too_large(*_: Any) -> Iterator[None]:
        yield
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(auth_module, "rights_steps", too_large)
        assert user.ask("KV.Range", key=b"a00", range_end=b"a60") == reads.NO_MEMORY.text
    assert not isinstance(user.ask("KV.Range", key=b"a00", range_end=b"a60"), str)


ASKED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("KV.Put", {"key": b"a05"}),
    ("KV.Range", {"key": b"a05"}),
    ("KV.Range", {"key": b"a05", "serializable": True}),
    ("KV.Range", {"key": b"a00", "range_end": b"a60"}),
    ("KV.RangeStream", {"key": b"a00", "range_end": b"a60"}),
    ("KV.DeleteRange", {"key": b"a10", "range_end": b"a20"}),
    ("KV.Txn", {"success": [proto.RequestOp(request_put=proto.PutRequest(key=b"a1"))]}),
    ("Lease.LeaseRevoke", {"ID": 1}),
    ("Lease.LeaseKeepAlive", {"ID": 2}),
    ("Lease.LeaseTimeToLive", {"ID": 3, "keys": True}),
    ("Lease.LeaseLeases", {}),
    ("Lock.Lock", {"name": b"a03"}),
    ("Watch.Watch", {"create_request": proto.WatchCreateRequest(key=b"a00", range_end=b"a60")}),
)


@pytest.mark.parametrize(("name", "fields"), ASKED)
def test_many_permissions_are_put_together_in_steps(
    overloaded: tuple[User, User, list[str]], name: str, fields: dict[str, Any]
) -> None:
    root, user, learned = overloaded
    for lease in (1, 2, 3):
        root.ask("Lease.LeaseGrant", ID=lease, TTL=60)
        root.ask("KV.Put", key=b"a3%d" % lease, lease=lease)
    root.ask("Auth.RoleAdd", name="one more")  # What is known ends with any change.
    del learned[:]
    answer = user.ask(name, **fields)
    assert not isinstance(answer, str), answer
    if name == "Watch.Watch":
        assert answer[0].created and not answer[0].canceled
    assert learned == ["max"]
    assert (
        user.ask("KV.Put", key=b"a60") == user.ask("KV.Range", key=b"a", range_end=b"b") == DENIED
    )
    assert learned == ["max"]


def test_requests_that_wait_for_the_same_permissions_share_the_work(
    overloaded: tuple[User, User, list[str]],
) -> None:
    root, user, learned = overloaded
    for changes in (0, 1):
        root.ask("Auth.RoleAdd", name=f"another {changes}")
        del learned[:]
        ids = [user.send("KV.Put", key=b"a07") for _ in range(20)]
        ids += [user.send("KV.Range", key=b"a07") for _ in range(20)]
        ids += [user.send("KV.Range", key=b"a07", range_end=b"a3") for _ in range(20)]
        if changes:
            root.send("Auth.RoleAdd", name="amid")
        user.house.settle()
        refused = {answer for answer in map(user.answers.get, ids) if isinstance(answer, str)}
        assert refused <= ({OLD} if changes else set())
        assert learned == ["max"] * (1 + changes)


def test_a_write_from_before_auth_was_enabled(house: LoneMember, root: User) -> None:
    root.ask("Auth.AuthDisable")
    nobody = User(house)
    enabled = nobody.send("Auth.AuthEnable")
    written = nobody.send("KV.Put", key=b"a")
    house.settle()
    assert not isinstance(nobody.answers[enabled], str)
    assert nobody.answers[written] == EMPTY


def test_reads_in_steps_fail_if_rights_change_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lone = LoneMember(tmp_path / "member", password_cost=CHEAP)
    add_users(lone)
    ann, root = User(lone).log_in("ann"), User(lone).log_in("root")
    for number in range(2000):
        root.send("KV.Put", key=b"a%06d" % number)
    lone.settle()
    monkeypatch.setattr(lone.member.reads, "_slice_is_over", lambda: True)
    reading = ann.send("KV.Range", key=b"a", range_end=b"b", serializable=True)
    turn(lone.member)
    assert reading not in ann.answers
    root.send("Auth.RoleAdd", name="other")
    lone.settle()
    assert ann.answers[reading] == OLD
    assert ann.ask("KV.Range", key=b"a", range_end=b"b").count == 2000
    lone.close()


def test_a_read_that_turns_out_too_large_is_not_sent_in_another_way_if_rights_change(
    house: LoneMember, ann: User, root: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        # The first records do not show how large the answer is.
        size_bytes = 0 if number < SAMPLE_KEYS else 100
        root.send("KV.Put", key=b"a%06d" % number, value=bytes(size_bytes))
    house.settle()
    store = house.member.state.store
    store.limits = store.limits._replace(range_step_keys=2, step_bytes=200, whole_answer_bytes=2000)
    ann.streams_ranges = True  # type: ignore[attr-defined]
    fields = {"key": b"a", "range_end": b"b", "serializable": True}
    assert "the answer has more than" in ann.ask("KV.Range", **fields)
    monkeypatch.setattr(house.member.reads, "_slice_is_over", lambda: True)
    reading = ann.send("KV.Range", **fields)
    turn(house.member)
    assert reading not in ann.answers
    root.send("Auth.RoleAdd", name="other")
    house.settle()
    assert ann.answers[reading] == OLD


def test_a_stream_that_was_asked_for_before_auth_was_enabled_is_checked(
    house: LoneMember, ann: User, root: User
) -> None:
    root.ask("KV.Put", key=b"z", value=b"secret")
    root.ask("Auth.AuthDisable")
    reading = ann.send("KV.RangeStream", key=b"a", range_end=b"\0")
    # Enabled before the read is confirmed. Its first key is one that the user may read.
    house.member.state.auth.enabled = True
    house.settle()
    while ann.calls.have_more:
        ann.calls.produce()
    assert ann.answers[reading] == DENIED
    assert b"secret" not in b"".join(each.encode() for each in ann.messages[reading])


# Entries.


def test_entries_name_their_author_only_while_auth_is_enabled(lone: LoneMember) -> None:
    written = record_entries(lone)
    nobody = User(lone)
    nobody.ask("KV.Put", key=b"a")
    add_users(lone)
    assert methods.AUTHOR not in {method for method, _ in written}
    ann, root = User(lone).log_in("ann"), User(lone).log_in("root")
    written.clear()
    for _ in range(2):
        for user in (ann, ann, root):
            user.send("KV.Put", key=b"a")
    lone.settle()
    names = [request.name if method == methods.AUTHOR else "-" for method, request in written]
    assert names == ["ann", "-", "-", "root", "-"] * 2
    revision = lone.member.state.auth.revision
    assert {r.revision for method, r in written if method == methods.AUTHOR} == {revision}
    root.ask("Auth.AuthDisable")
    written.clear()
    ann.ask("KV.Put", key=b"a")
    assert [method for method, _ in written] == [methods.PUT]


def test_each_entry_of_a_large_batch_names_its_author(
    house: LoneMember, ann: User, root: User
) -> None:
    requests = [
        user.send("KV.Put", key=b"a", value=bytes(400_000))
        for user in (ann, root)
        for _ in range(9)
    ]
    house.settle()
    for user, request_id in zip((ann,) * 9 + (root,) * 9, requests, strict=True):
        assert not isinstance(user.answers[request_id], str)
    assert house.member.state.alarms.proposed_bytes == 0


def test_writes_that_wait_in_lines_keep_their_authors(
    house: LoneMember, ann: User, root: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writes, "MAX_IN_FLIGHT", 4)
    asked = [
        (user, user.send("KV.Put", key=key))
        for _ in range(20)
        for user, key in ((ann, b"a"), (root, b"z"))
    ]
    house.settle()
    for user, request_id in asked:
        assert not isinstance(user.answers[request_id], str)
    assert house.member.state.alarms.proposed_bytes == 0


def test_no_password_is_written_anywhere(house: LoneMember, root: User, tmp_path: Path) -> None:
    for name, fields in (
        ("Auth.UserAdd", {"name": "bob", "password": "hunter-two"}),
        ("Auth.UserChangePassword", {"name": "bob", "password": "hunter-three"}),
        (
            "Auth.UserAdd",
            {
                "name": "dog",
                "password": "hunter-four",
                "options": proto.UserAddOptions(no_password=True),
            },
        ),
    ):
        assert not isinstance(root.ask(name, **fields), str)
    User(house).log_in("bob", "hunter-three")
    house.close()
    for path in (tmp_path / "member").rglob("*"):
        if path.is_file():
            assert b"hunter" not in path.read_bytes(), path


# Passwords.


def test_logins(house: LoneMember, root: User) -> None:
    someone = User(house)
    failed = "authentication failed, invalid user ID or password"
    for name, password in (("ann", "wrong"), ("ann", ""), ("eve", "eve"), ("", ""), ("ann", "Ann")):
        assert someone.ask("Auth.Authenticate", name=name, password=password) == failed
    options = proto.UserAddOptions(no_password=True)
    root.ask("Auth.UserAdd", name="cert", options=options)
    assert someone.ask("Auth.Authenticate", name="cert", password="x") == failed
    assert someone.ask("Auth.Authenticate", name="cert") == failed
    root.ask("Auth.UserAdd", name="given", hashedPassword=encoded("secret"))
    someone.log_in("given", "secret")
    assert someone.ask("KV.Put", key=b"a") == DENIED
    assert someone.ask("Auth.Authenticate", name="a", password="x" * 5000).startswith("etcdlite")
    root.ask("Auth.AuthDisable")
    assert someone.ask("Auth.Authenticate", name="ann", password="ann") == (
        "authentication is not enabled"
    )


def test_a_name_that_does_not_exist_costs_what_one_of_a_user_does(
    house: LoneMember, root: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes cost more or less, above all those that came from etcd."""
    bcrypt = b"$2a$10$" + b"a" * 53
    for number in range(8):
        hashed = base64.b64encode(bcrypt).decode()
        root.ask("Auth.UserAdd", name=f"old{number}", hashedPassword=hashed)
    compared: list[bytes] = []

    def is_right(password: str, stored: bytes) -> bool:
        compared.append(stored)
        return True

    monkeypatch.setattr(passwords, "is_right", is_right)
    hashes = []
    for number in range(100):
        for _ in range(3):
            answer = User(house).ask("Auth.Authenticate", name=f"no{number}", password="x")
            assert answer.startswith("authentication failed")
        assert len(compared) == 3 and len(set(compared)) == 1
        hashes.append(compared[0])
        del compared[:]
    assert 0 < hashes.count(bcrypt) < 100


def encoded(password: str) -> str:
    return base64.b64encode(passwords.hash_password(password, CHEAP)).decode()


@pytest.mark.parametrize(
    "hashed",
    [
        b"plain",
        b"$argon2id$v=19$m=1048576,t=2,p=1$c2FsdHNhbHRzYWx0$aGFzaGhhc2hoYXNoaGFzaGhhc2hoYXNo",
        b"$argon2id$v=19$m=8,t=99,p=1$c2FsdHNhbHRzYWx0$aGFzaGhhc2hoYXNoaGFzaGhhc2hoYXNo",
        b"$2a$31$" + b"a" * 53,
        b"",
    ],
)
def test_a_hash_that_is_none_or_costs_too_much_is_refused(lone: LoneMember, hashed: bytes) -> None:
    text = base64.b64encode(hashed).decode() or "?"
    answer = User(lone).ask("Auth.UserAdd", name="a", hashedPassword=text)
    assert "affordable" in answer
    assert lone.member.state.auth.users() == []


def test_bcrypt_hashes_are_replaced_at_the_next_login(house: LoneMember, root: User) -> None:
    bcrypt = pytest.importorskip("bcrypt")
    old = bcrypt.hashpw(b"secret", bcrypt.gensalt(4))
    root.ask("Auth.UserAdd", name="old", hashedPassword=base64.b64encode(old).decode())
    auth = house.member.state.auth
    revision = auth.revision
    failed = User(house).ask("Auth.Authenticate", name="old", password="wrong")
    assert failed.startswith("authentication failed")
    assert auth.user("old").password == old
    user = User(house).log_in("old", "secret")
    house.settle()
    assert auth.user("old").password.startswith(b"$argon2id$")
    assert auth.revision == revision
    assert user.ask("Auth.UserGet", name="old").roles == ()
    User(house).log_in("old", "secret")


def test_without_the_package_bcrypt_a_login_fails_and_the_log_says_why(
    house: LoneMember,
    root: User,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The answer is that for a user who does not exist."""
    import sys

    hashed = base64.b64encode(b"$2a$10$" + b"a" * 53).decode()
    root.ask("Auth.UserAdd", name="old", hashedPassword=hashed)
    monkeypatch.setitem(sys.modules, "bcrypt", None)
    answers = [
        User(house).ask("Auth.Authenticate", name=name, password="secret") for name in ("old", "no")
    ]
    assert answers[0] == answers[1] and answers[0].startswith("authentication failed")
    assert "install python3-bcrypt" in capfd.readouterr().err


def test_no_password_becomes_empty(house: LoneMember, root: User, ann: User) -> None:
    """Nobody could log in as root any more."""
    for name in ("root", "ann"):
        assert "lock the user out" in root.ask("Auth.UserChangePassword", name=name, password="")
        User(house).log_in(name)
    assert ann.ask("Auth.UserChangePassword", name="root", password="") == DENIED


def grant_with_keys(root: User, keys: dict[int, int]) -> None:
    """Grant leases, each with so many keys that ann may write."""
    for lease, count in keys.items():
        root.ask("Lease.LeaseGrant", ID=lease, TTL=60)
        for number in range(count):
            root.ask("KV.Put", key=b"a%d/%d" % (lease, number), lease=lease)


def test_a_renewal_of_a_lease_with_many_keys_is_checked_in_steps(
    house: LoneMember, root: User, ann: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_rights, "KEYS_PER_STEP", 4)
    grant_with_keys(root, {1: 100, 2: 2, 3: 100})
    request_id = ann.send("Lease.LeaseKeepAlive", ID=1)
    for lease in (1, 3, 2):
        ann.calls.message(request_id, proto.LeaseKeepAliveRequest(ID=lease).encode())
    house.settle()
    assert [answer.ID for answer in ann.messages[request_id]] == [2, 1, 1, 3]
    assert request_id not in ann.answers
    # A key of another user: refused, and so it stays.
    root.ask("KV.Put", key=b"x", lease=3)
    root.ask("Auth.RoleAdd", name="another")  # What is remembered ends with any change.
    assert ann.ask("Lease.LeaseKeepAlive", ID=3) == DENIED
    # Many of them on one stream.
    root.ask("Auth.RoleAdd", name="one more")
    request_id = ann.send("Lease.LeaseKeepAlive", ID=1)
    with pytest.raises(EtcdError, match="too many"):
        for _ in range(streams.MAX_UNCHECKED_RENEWALS):
            ann.calls.message(request_id, proto.LeaseKeepAliveRequest(ID=1).encode())
    ann.calls.close(request_id)
    house.settle()
    assert not ann.messages[request_id]


def test_more_large_leases_than_a_stream_may_renew_at_once_are_known_soon(
    house: LoneMember, ann: User, root: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client with one stream for all its leases renews them in one go, again and again."""
    monkeypatch.setattr(lease_rights, "KEYS_PER_STEP", 4)
    monkeypatch.setattr(streams, "MAX_UNCHECKED_RENEWALS", 3)
    leases = range(1, 9)
    grant_with_keys(root, dict.fromkeys(leases, 6))
    token = ann.current_token
    # As over gRPC: a stream that has ended has no token any more.
    monkeypatch.setattr(ann, "token", lambda request_id: token if request_id in ann.calls else " ")
    for _ in range(4):
        request_id = ann.send("Lease.LeaseKeepAlive", ID=1)
        with contextlib.suppress(EtcdError):
            for lease in leases[1:]:
                ann.calls.message(request_id, proto.LeaseKeepAliveRequest(ID=lease).encode())
        renewed = list(ann.messages[request_id])
        ann.calls.close(request_id)
        house.settle()
    assert [answer.ID for answer in renewed] == list(leases)


def test_renewals_of_streams_that_were_closed_do_not_pile_up(
    house: LoneMember, ann: User, root: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_rights, "KEYS_PER_STEP", 1)
    leases = range(1, 4)
    grant_with_keys(root, dict.fromkeys(leases, 100))
    with monkeypatch.context() as patch:
        patch.setattr(house.member.reads, "_slice_is_over", lambda: True)  # A slow machine.
        for _ in range(20):
            request_id = ann.send("Lease.LeaseKeepAlive", ID=1)
            for lease in leases[1:]:
                ann.calls.message(request_id, proto.LeaseKeepAliveRequest(ID=lease).encode())
            ann.calls.close(request_id)
            for _ in range(4):
                turn(house.member)
        assert len(house.member.reads._lines) < 10
    house.settle()


def test_logins_wait_in_lines_that_take_turns(house: LoneMember) -> None:
    member = house.member
    someone = User(house)
    many = [someone.send("Auth.Authenticate", name="x", password="x") for _ in range(50)]
    one = someone.send("Auth.Authenticate", name="ann", password="ann")
    turn(member)  # Confirms that the state is linearizable.
    refused = [each for each in many if someone.answers.get(each) == "too many requests"]
    assert len(refused) == 50 - logins.MAX_PER_NAME
    jobs = [member.logins.take(), member.logins.take()]
    assert member.logins.take() is None, "two at a time"
    assert not member.is_idle
    for job in jobs:
        assert job is not None
        job.run()
        member.logins.finished(job)
    assert one in someone.answers, "it does not wait for the others"


def test_hosts_that_guess_delay_no_other_host(house: LoneMember) -> None:
    guessing, other = User(house), User(house)
    guessing.client, other.client = "10.0.0.1:7", "10.0.0.2:7"  # type: ignore[attr-defined]
    for number in range(2 * logins.MAX_WAITING):
        name = "ann" if number % 2 else f"x{number}"
        guessing.send("Auth.Authenticate", name=name, password="x")
    turn(house.member)
    one = other.send("Auth.Authenticate", name="ann", password="ann")
    turn(house.member)
    assert one not in other.answers
    for _ in range(2):
        job = house.member.logins.take()
        assert job is not None
        job.run()
        house.member.logins.finished(job)
    assert not isinstance(other.answers[one], str)


def test_nobody_waits_so_nothing_is_computed(house: LoneMember) -> None:
    someone = User(house)
    request_id = someone.send("Auth.Authenticate", name="x", password="x")
    turn(house.member)
    someone.answers[request_id] = "cancelled"
    assert house.member.logins.take() is None
    assert not house.member.logins.are_under_way


def test_a_login_that_waits_holds_little_memory(house: LoneMember) -> None:
    someone = User(house)
    large = "x" * 1_000_000
    ids = [
        someone.send("Auth.Authenticate", name=name, password=password)
        for name, password in ((large, "x"), ("x", large), ("", large))
    ]
    assert set(ids) <= someone.answers.keys(), "they are refused before they wait"
    assert someone.answers[ids[0]].startswith("authentication failed")


def test_the_log_tells_failed_logins_and_not_those_that_were_given_up(
    house: LoneMember, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "limited", lambda key, per_s=1.0: False)
    ann, guesser = User(house), User(house)
    given_up = ann.send("Auth.Authenticate", name="ann", password="ann")
    ann.answers[given_up] = "given up"
    guesser.send("Auth.Authenticate", name="ann", password="bob")
    house.settle()
    lines = [line for line in capfd.readouterr().err.splitlines() if "a login failed" in line]
    assert len(lines) == 1 and "invalid user ID or password" in lines[0], lines


def test_a_fault_in_a_login_takes_no_place_of_the_next_ones(
    house: LoneMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(password: str, stored: bytes) -> bool:
        raise KeyError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(passwords, "is_right", fails)
        for _ in range(logins.MAX_RUNNING):
            answer = User(house).ask("Auth.Authenticate", name="ann", password="ann")
            assert "fault" in answer and "secret" not in answer
    User(house).log_in("ann")


# Tokens.


def test_tokens_end_with_what_they_stand_for(house: LoneMember, root: User) -> None:
    ann = User(house).log_in("ann")
    root.ask("Auth.RoleAdd", name="other")
    assert not isinstance(ann.ask("KV.Put", key=b"a"), str), "other changes do not matter"
    root.ask("Auth.UserChangePassword", name="ann", password="new")
    assert ann.ask("KV.Put", key=b"a") == INVALID
    assert ann.ask("KV.Range", key=b"a") == INVALID
    ann.log_in("ann", "new")
    root.ask("Auth.UserDelete", name="ann")
    assert ann.ask("KV.Put", key=b"a") == INVALID
    root.ask("Auth.UserAdd", name="ann", password="new")
    assert ann.ask("KV.Put", key=b"a") == INVALID, "another user of the same name"
    ann.log_in("ann", "new")
    assert ann.ask("KV.Put", key=b"a") == DENIED
    root.ask("Auth.AuthDisable")
    User(house).ask("Auth.AuthEnable")
    assert ann.ask("KV.Put", key=b"a") == INVALID, "a new key"
    assert root.ask("Auth.UserList") == INVALID


def test_the_key_of_tokens_is_rotated(house: LoneMember, ann: User, root: User) -> None:
    key = house.member.state.auth.key
    assert ann.ask("Auth.RotateKey") == DENIED
    assert not isinstance(root.ask("Auth.RotateKey", seed=bytes(32)), str)
    assert house.member.state.auth.key not in (key, bytes(32))
    assert ann.ask("KV.Put", key=b"a") == root.ask("KV.Put", key=b"a") == INVALID
    assert not isinstance(ann.log_in("ann").ask("KV.Put", key=b"a"), str)


def test_a_token_instead_of_a_password(house: LoneMember, ann: User) -> None:
    other = User(house)
    answer = other.ask("Auth.Authenticate", name="", password=ann.current_token)
    assert answer.token == ann.current_token
    assert not isinstance(other.ask("KV.Put", key=b"a"), str)
    assert User(house).ask("Auth.Authenticate", name="", password="no token") == INVALID


def test_tokens_and_users_outlive_a_restart(
    house: LoneMember, ann: User, root: User, tmp_path: Path
) -> None:
    root.ask("KV.Put", key=b"x", value=bytes(70_000))  # A checkpoint is due.
    for _ in range(20):
        house.tick()
    house.close()
    again = LoneMember(tmp_path / "member", password_cost=CHEAP)
    same = User(again, ann.current_token)
    assert not isinstance(same.ask("KV.Put", key=b"a"), str)
    assert same.ask("KV.Put", key=b"x") == DENIED
    assert User(again).ask("KV.Put", key=b"a") == EMPTY
    assert again.member.state.auth.revision == house.member.state.auth.revision
    again.close()


def test_a_member_asks_for_itself(house: LoneMember) -> None:
    """The leader answers a question of another member, which has checked the rights."""
    answers: list[Any] = []
    method = METHOD_BY_NAME["Maintenance.HashKV"].number
    house.member.reads.read_now(Waiter(Asked(answers.append), 1, method, proto.HashKVRequest()))
    house.settle()
    assert isinstance(answers[0], bytes)


def test_metrics(house: LoneMember, ann: User, root: User) -> None:
    ann.ask("KV.Put", key=b"a")
    root.ask("Auth.UserAdd", name="bob", password="bob")
    text = exposition.Scrape(house.member, {"native": 2}).render().decode()
    assert "etcd_debugging_auth_revision 9" in text
    assert 'op="AuthUserAdd",success="true"' in text and 'op="Put"' in text
    assert "Author" not in text


@pytest.mark.parametrize("catches_up", [True, False])
def test_a_token_that_is_ahead_waits_for_the_member(
    house: LoneMember, ann: User, catches_up: bool
) -> None:
    """As at a member that is behind the one at which the user logged in."""
    auth = house.member.state.auth
    revision = auth.revision
    auth.revision -= 1
    written = ann.send("KV.Put", key=b"a")
    watched = ann.send("Watch.Watch", create_request=create(key=b"k"))
    asked = ann.send("Maintenance.Defragment")
    assert not ann.answers.keys() & {written, watched, asked} and not ann.messages[watched]
    if catches_up:
        auth.revision = revision
    house.settle()
    [created] = ann.messages[watched]
    if catches_up:
        assert ann.answers[written].header.revision == 2
        assert not created.canceled
        assert ann.answers[asked] == DENIED
    else:
        assert ann.answers[written] == ann.answers[asked] == INVALID
        assert created.cancel_reason == as_status("Unauthenticated", INVALID)


def test_users_that_came_from_etcd(lone: LoneMember) -> None:
    """Without what only etcdlite stores: the key of tokens, and since when passwords are."""
    add_users(lone)
    store = lone.member.state.store
    for key in [key for key in store.buckets[layout.AUTH] if key[:5] in (b"key", b"since")]:
        store.set_bucket(layout.AUTH, key, None)
    auth = lone.member.state.auth
    auth.restore(store)
    assert auth.enabled and not auth.key
    ann = User(lone, "AlvjVLTFdGxZCmcU.49")
    assert ann.ask("KV.Put", key=b"a") == INVALID
    assert "try again" in ann.ask("Auth.Authenticate", name="ann", password="ann")
    lone.settle()
    key = auth.key
    assert len(key) == 32
    ann.log_in("ann")
    assert not isinstance(ann.ask("KV.Put", key=b"a"), str)
    lone.member.writes.propose_own(methods.TOKEN_KEY, proto.TokenKey(seed=bytes(32)))
    lone.settle()
    assert auth.key == key


# What members have in common.


def state_of(lone: LoneMember) -> tuple[Any, ...]:
    """Everything that must be the same on all members."""
    store = lone.member.state.store
    buckets = {
        name: {key: value for key, value in store.buckets.get(name, {}).items() if key != b"key"}
        for name in (layout.AUTH, layout.AUTH_USER, layout.AUTH_ROLE, layout.LEASE)
    }
    keys = [store.get(key) for key in sorted(store.index.heads)]
    return store.revision, buckets, keys


def test_members_that_restart_at_any_time_do_not_differ(tmp_path: Path) -> None:
    """etcd issue 14571: after a restart, or when it took over a snapshot, a member did not know the
    permissions yet, and refused what the others applied. So do wrong what is remembered about
    rights and leases."""
    hashed = encoded("x")
    prefix = proto.Permission(permType=2, key=b"a", range_end=b"b")
    wider = proto.Permission(permType=2, key=b"b", range_end=b"c")
    both = [proto.RequestOp(request_put=proto.PutRequest(key=key)) for key in (b"a3", b"b3")]
    script: list[tuple[str, str, dict[str, Any]]] = [
        ("", "Auth.UserAdd", {"name": "root", "hashedPassword": hashed}),
        ("", "Auth.UserGrantRole", {"user": "root", "role": "root"}),
        ("", "Auth.UserAdd", {"name": "ann", "hashedPassword": hashed}),
        ("", "Auth.RoleAdd", {"name": "r"}),
        ("", "Auth.RoleGrantPermission", {"name": "r", "perm": prefix}),
        ("", "Auth.UserGrantRole", {"user": "ann", "role": "r"}),
        ("", "Lease.LeaseGrant", {"ID": 1, "TTL": 1000}),
        ("", "Auth.AuthEnable", {}),
        ("ann", "KV.Put", {"key": b"a1", "lease": 1}),
        ("ann", "KV.Put", {"key": b"b1"}),
        ("root", "KV.Put", {"key": b"b1", "lease": 1}),
        ("ann", "KV.Put", {"key": b"a2", "lease": 1}),
        ("ann", "KV.Txn", {"success": both}),
        ("root", "Auth.RoleGrantPermission", {"name": "r", "perm": wider}),
        ("ann", "KV.Put", {"key": b"a2", "lease": 1}),
        ("ann", "KV.Txn", {"success": both}),
        ("root", "Auth.UserRevokeRole", {"name": "ann", "role": "r"}),
        ("ann", "KV.Put", {"key": b"a4"}),
        ("root", "Auth.AuthDisable", {}),
        ("", "KV.Put", {"key": b"z", "lease": 1}),
        ("", "Auth.UserGrantRole", {"user": "ann", "role": "r"}),
        ("", "Auth.AuthEnable", {}),
        ("ann", "Lease.LeaseRevoke", {"ID": 1}),
        ("root", "Lease.LeaseRevoke", {"ID": 1}),
    ]
    steady = LoneMember(tmp_path / "steady", password_cost=CHEAP)
    other = LoneMember(tmp_path / "other", password_cost=CHEAP)
    for step, (name, method, fields) in enumerate(script):
        answers = []
        for lone in (steady, other):
            user = User(lone)
            user.certificate_user = name
            answer = user.ask(method, **fields)
            answers.append(answer if isinstance(answer, str) else "")
        assert answers[0] == answers[1], (step, method)
        assert state_of(steady) == state_of(other), (step, method)
        other.close()
        other = LoneMember(tmp_path / "other", password_cost=CHEAP)
        assert state_of(steady) == state_of(other), (step, method)
    assert steady.member.state.store.revision > 5
    steady.close()
    other.close()


def test_another_store_brings_its_users(house: LoneMember, ann: User, tmp_path: Path) -> None:
    """As a snapshot from the leader: what is remembered of the old one does not count."""
    assert not isinstance(ann.ask("KV.Put", key=b"a"), str)
    other = LoneMember(tmp_path / "other", password_cost=CHEAP)
    other.member.state.auth.restore(house.member.state.store)
    assert other.member.state.auth.enabled
    auth = house.member.state.auth
    auth.restore(LoneMember(tmp_path / "empty").member.state.store)
    assert not auth.enabled and auth.revision == 1 and auth.users() == []
    other.close()
