"""Users, roles and permissions: `auth.py`, `passwords.py` and `tokens.py`, and a member that uses
them."""

from __future__ import annotations

import base64
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs.faulty_disk import FaultyDisk
from rigs.users import CHEAP

from etcdlite import auth as auth_module
from etcdlite import flags, jwt_tokens, lease_rights, methods, passwords, proto
from etcdlite import tokens as tokens_module
from etcdlite.auth import MAX_NAME_BYTES, OWN, Auth, Author
from etcdlite.errors import EtcdError
from etcdlite.lease import Lessor
from etcdlite.lease_rights import LeaseRights
from etcdlite.methods import LEASE_REVOKE, METHOD_BY_NAME, PUT, TXN
from etcdlite.mvcc import Store
from etcdlite.plain_txn import PlainTxn, decode_txn
from etcdlite.replica.state import lease_puts
from etcdlite.rights import KeySet, interval_of, rights_steps
from etcdlite.storage.steps import finish
from etcdlite.tokens import SimpleTokens

HASH = passwords.hash_password("secret", CHEAP)
HASHED = base64.b64encode(HASH).decode()
READ, WRITE, BOTH = 0, 1, 2


# Sets of keys.

KEY = st.binary(min_size=1, max_size=2).map(lambda key: bytes(b % 4 for b in key))
RANGES = st.lists(st.tuples(KEY, st.one_of(st.just(b""), KEY)), max_size=8)


@given(RANGES, KEY, st.one_of(st.just(b""), KEY))
@settings(deadline=None)
def test_a_set_holds_what_its_ranges_cover_together(
    ranges: list[tuple[bytes, bytes]], key: bytes, range_end: bytes
) -> None:
    """The plain model: every key of the alphabet, one by one, and a witness between any two."""
    found = KeySet(ranges)
    alphabet = [bytes((a,)) for a in range(5)]
    witnesses = sorted(
        {b"\0", *alphabet, *(a + b for a in alphabet for b in alphabet)}
        | {a + b + b"\0" for a in alphabet for b in alphabet}
        | {b"\xff" * 9}
    )

    def covered(witness: bytes) -> bool:
        return any(start <= witness and (not end or witness < end) for start, end in ranges)

    def asked(witness: bytes) -> bool:
        if not range_end:
            return witness == key
        return key <= witness and (range_end == b"\0" or witness < range_end)

    inside = [witness for witness in witnesses if asked(witness)]
    if inside:
        assert found.holds(key, range_end) == all(map(covered, inside))
    elif found.holds(key, range_end):
        assert covered(key)


@given(st.lists(RANGES, max_size=4), st.data())
def test_roles_are_put_together_in_steps(roles: list[Any], data: st.DataObject) -> None:
    kinds = [data.draw(st.lists(st.sampled_from((READ, WRITE, BOTH)), min_size=len(role)))
             for role in roles]  # fmt: skip
    records, permitted = [], {READ: [], WRITE: []}  # type: ignore[var-annotated]
    for role, kinds_of in zip(roles, kinds, strict=True):
        permissions = []
        for (start, end), kind in zip(role, kinds_of, strict=False):
            permissions.append(proto.Permission(permType=kind, key=start, range_end=end or b"\0"))
            for one in (READ, WRITE) if kind == BOTH else (kind,):
                permitted[one].append(interval_of(start, end or b"\0"))
        records.append(proto.Role(name=b"r", keyPermission=permissions).encode())
    rights = finish(rights_steps(frozenset({"r"}), records))
    assert rights.read.ranges() == KeySet(permitted[READ]).ranges()
    assert rights.write.ranges() == KeySet(permitted[WRITE]).ranges()
    assert not rights.is_root
    root = finish(rights_steps(frozenset({"r", "root"}), records))
    assert root.is_root and root.write.holds(b"b", b"a") and root.read.holds(b"", b"\0")


def test_ranges_that_touch_are_one() -> None:
    found = KeySet([(b"b", b"c"), (b"a", b"b"), (b"x", b"x\0"), (b"d", b"d"), (b"e", b"c")])
    assert found.ranges() == [(b"a", b"c"), (b"x", b"x\0")]
    assert found.holds(b"a", b"c") and not found.holds(b"a", b"d")
    assert not found.holds(b"x", b"\0"), "a single key permits nothing from it on"


# The auth store.


@pytest.fixture
def store() -> Store:
    return Store.create(FaultyDisk(), "data", Lessor(), 1 << 16)


@pytest.fixture
def auth(store: Store) -> Auth:
    return Auth(store)


def add_user(auth: Auth, name: str, **fields: Any) -> None:
    auth.add_user(proto.AuthUserAddRequest(name=name, **{"hashedPassword": HASHED, **fields}))


def add_role(auth: Auth, name: str) -> None:
    auth.add_role(proto.AuthRoleAddRequest(name=name))


def grant(auth: Auth, user: str, role: str) -> None:
    auth.grant_role(proto.AuthUserGrantRoleRequest(user=user, role=role))


def permit(auth: Auth, role: str, kind: int, key: bytes, range_end: bytes = b"") -> None:
    perm = proto.Permission(permType=kind, key=key, range_end=range_end)
    auth.grant_permission(proto.AuthRoleGrantPermissionRequest(name=role, perm=perm))


def delete_role(auth: Auth) -> Callable[[Any], None]:
    return lambda request: finish(auth.delete_role(request))


def enable(auth: Auth) -> None:
    if auth.user("root") is None:
        add_user(auth, "root")
        grant(auth, "root", "root")
    auth.set_key(proto.TokenKey(seed=bytes(32)))
    auth.enable(proto.AuthEnableRequest())


def name_of(do: Callable[[], Any]) -> str:
    """The name of the error that this raises, or ""."""
    try:
        do()
    except EtcdError as failure:
        return failure.name or failure.text
    return ""


def may(auth: Auth, user: str, method: int, request: Any) -> bool:
    refused = name_of(lambda: auth.check(Author(user, auth.revision), method, request))
    assert refused in ("", "PermissionDenied"), refused
    return not refused


def test_the_revision_is_bumped_with_every_change(auth: Auth) -> None:
    assert auth.revision == 1
    add_user(auth, "a")
    add_role(auth, "r")
    grant(auth, "a", "r")
    assert auth.revision == 4
    grant(auth, "a", "r")
    assert auth.revision == 4, "the role is granted already"
    permit(auth, "r", READ, b"k")
    permit(auth, "r", READ, b"k")
    assert auth.revision == 6, "as in etcd, the same permission again counts"
    enable(auth)
    assert auth.revision == 8, "root is added and gets a role; enabling does not count"
    auth.disable(proto.AuthDisableRequest())
    auth.disable(proto.AuthDisableRequest())
    assert auth.revision == 9
    auth.rehash(proto.Rehash(name="a", old=HASH, new=HASH))
    assert auth.revision == 9


def test_errors_have_the_texts_of_etcd(auth: Auth) -> None:
    def refuses(change: Callable[[Any], None], request: Any, error: str) -> None:
        before = auth.revision
        assert name_of(lambda: change(request)) == error
        assert auth.revision == before

    refuses(auth.enable, proto.AuthEnableRequest(), "RootUserNotExist")
    refuses(auth.add_user, proto.AuthUserAddRequest(), "UserEmpty")
    add_user(auth, "root")
    refuses(auth.enable, proto.AuthEnableRequest(), "RootRoleNotExist")
    refuses(auth.add_user, proto.AuthUserAddRequest(name="root"), "UserAlreadyExist")
    refuses(auth.delete_user, proto.AuthUserDeleteRequest(name="x"), "UserNotFound")
    refuses(auth.change_password, proto.AuthUserChangePasswordRequest(name="x"), "UserNotFound")
    refuses(auth.grant_role, proto.AuthUserGrantRoleRequest(user="x", role="r"), "UserNotFound")
    refuses(auth.grant_role, proto.AuthUserGrantRoleRequest(user="root", role="r"), "RoleNotFound")
    refuses(
        auth.revoke_role, proto.AuthUserRevokeRoleRequest(name="root", role="r"), "RoleNotGranted"
    )
    refuses(auth.add_role, proto.AuthRoleAddRequest(), "RoleEmpty")
    add_role(auth, "r")
    refuses(auth.add_role, proto.AuthRoleAddRequest(name="r"), "RoleAlreadyExist")
    refuses(delete_role(auth), proto.AuthRoleDeleteRequest(role="x"), "RoleNotFound")
    perm = proto.Permission(key=b"k")
    refuses(
        auth.grant_permission,
        proto.AuthRoleGrantPermissionRequest(name="x", perm=perm),
        "RoleNotFound",
    )
    refuses(
        auth.grant_permission, proto.AuthRoleGrantPermissionRequest(name="r"), "PermissionNotGiven"
    )
    for key, range_end in ((b"", b""), (b"b", b"a"), (b"b", b"b"), (b"", b"\0")):
        perm = proto.Permission(key=key, range_end=range_end)
        request = proto.AuthRoleGrantPermissionRequest(name="r", perm=perm)
        refuses(auth.grant_permission, request, "InvalidAuthMgmt")
    refuses(
        auth.revoke_permission,
        proto.AuthRoleRevokePermissionRequest(role="r", key=b"k"),
        "PermissionNotGranted",
    )
    refuses(
        auth.revoke_permission,
        proto.AuthRoleRevokePermissionRequest(role="x", key=b"k"),
        "RoleNotFound",
    )


def test_root_cannot_be_locked_out(auth: Auth) -> None:
    add_role(auth, "root")
    enable(auth)
    for change, request in (
        (auth.delete_user, proto.AuthUserDeleteRequest(name="root")),
        (auth.revoke_role, proto.AuthUserRevokeRoleRequest(name="root", role="root")),
        (delete_role(auth), proto.AuthRoleDeleteRequest(role="root")),
    ):
        assert name_of(lambda: change(request)) == "InvalidAuthMgmt"  # noqa: B023
    auth.disable(proto.AuthDisableRequest())
    finish(auth.delete_role(proto.AuthRoleDeleteRequest(role="root")))
    assert name_of(lambda: auth.enable(proto.AuthEnableRequest())) == "RootRoleNotExist"


def test_without_a_key_for_tokens_auth_is_not_enabled(auth: Auth) -> None:
    add_user(auth, "root")
    grant(auth, "root", "root")
    with pytest.raises(EtcdError, match="no key"):
        auth.enable(proto.AuthEnableRequest())


def test_what_is_deleted_is_gone_from_where_it_was_granted(auth: Auth) -> None:
    add_user(auth, "a")
    for role in ("r2", "r10", "r1"):
        add_role(auth, role)
        grant(auth, "a", role)
    user = auth.user("a")
    assert user is not None and user.roles == ["r1", "r10", "r2"], "sorted, as etcd shows them"
    finish(auth.delete_role(proto.AuthRoleDeleteRequest(role="r10")))
    user = auth.user("a")
    assert user is not None and user.roles == ["r1", "r2"]
    auth.revoke_role(proto.AuthUserRevokeRoleRequest(name="a", role="r1"))
    user = auth.user("a")
    assert user is not None and user.roles == ["r2"] and user.password == HASH
    auth.delete_user(proto.AuthUserDeleteRequest(name="a"))
    assert auth.users() == [] and auth.roles() == ["r1", "r2"]


def test_permissions_are_sorted_replaced_and_revoked(auth: Auth) -> None:
    add_role(auth, "r")
    permit(auth, "r", READ, b"b")
    permit(auth, "r", WRITE, b"a", b"\0")
    permit(auth, "r", READ, b"b", b"c")
    permit(auth, "r", BOTH, b"b")

    def granted() -> list[tuple[int, bytes, bytes]]:
        permissions = map(proto.Permission.decode, auth.permissions("r"))
        return [(each.permType, each.key, each.range_end) for each in permissions]

    assert sorted(granted()) == sorted(
        [(WRITE, b"a", b"\0"), (BOTH, b"b", b""), (READ, b"b", b"c")]
    )
    assert [key for _, key, _ in granted()] == [b"a", b"b", b"b"]
    auth.revoke_permission(proto.AuthRoleRevokePermissionRequest(role="r", key=b"b"))
    assert granted() == [(WRITE, b"a", b"\0"), (READ, b"b", b"c")]


def test_one_of_many_permissions_is_granted_without_decoding_the_others(
    auth: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [proto.Permission(key=b"%06d" % n, range_end=b"%06d" % (n + 1)) for n in range(1900)]
    auth._put_role("r", kept)
    decoded = []
    monkeypatch.setattr(proto.Role, "decode", None)
    decode = proto.Permission.decode
    monkeypatch.setattr(proto.Permission, "decode", lambda buf: decoded.append(buf) or decode(buf))
    permit(auth, "r", WRITE, b"000100", b"000101")
    permit(auth, "r", READ, b"0001005")
    shown = auth.permissions("r")
    assert len(decoded) < 30
    kept[100].permType = WRITE
    kept.insert(101, proto.Permission(key=b"0001005"))
    assert list(map(decode, shown)) == kept


def test_all_comes_back_from_the_store(store: Store, auth: Auth) -> None:
    add_user(auth, "a")
    add_user(auth, "nobody", hashedPassword="", options=proto.UserAddOptions(no_password=True))
    add_role(auth, "r")
    permit(auth, "r", READ, b"k", b"l")
    grant(auth, "a", "r")
    enable(auth)
    again = Auth(store)
    for each in (auth, again):
        assert each.enabled and each.key == bytes(32)
        assert each.users() == ["a", "nobody", "root"] and each.roles() == ["r"]
        assert each.since == {"a": 2, "nobody": 3, "root": 7}
        assert may(each, "a", METHOD_BY_NAME["KV.Range"].number, proto.RangeRequest(key=b"k1"))
    assert again.revision == auth.revision


def test_a_name_without_a_password_is_compared_with_that_of_one_user(
    store: Store, auth: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Always the same one, found without a look at the others: the time must not tell."""
    assert auth.decoy("x") == b""
    for n in range(300):
        add_user(auth, f"user{n}", hashedPassword=base64.b64encode(b"%d" % n).decode())
    names = [f"x{n}" for n in range(100)]
    decoys = list(map(auth.decoy, names))
    assert len(set(decoys)) > 40, "each user may be the one"
    assert list(map(Auth(store).decoy, names)) == decoys, "of every member"
    read: list[str] = []
    user = auth.user
    monkeypatch.setattr(auth, "user", lambda name: [read.append(name), user(name)][1])
    monkeypatch.setattr(auth, "since", None)
    assert auth.decoy("x0") == decoys[0] and len(read) == 1
    monkeypatch.undo()
    gone = f"user{int(decoys[0])}"
    auth.delete_user(proto.AuthUserDeleteRequest(name=gone))
    after = list(map(auth.decoy, names))
    changed = [before for before, now in zip(decoys, after, strict=True) if before != now]
    assert set(changed) == {decoys[0]}, "only for names that were compared with it"


def test_limits(auth: Auth, monkeypatch: pytest.MonkeyPatch) -> None:
    add_role(auth, "r")
    monkeypatch.setattr(auth_module, "MAX_RECORD_BYTES", 100)
    permit(auth, "r", READ, b"k" * 50)
    with pytest.raises(EtcdError, match="the role would take more than 100 bytes"):
        permit(auth, "r", READ, b"j" * 50)
    monkeypatch.setattr(auth_module, "MAX_AUTH_BYTES", 3 * 1024)
    add_role(auth, "s")
    with pytest.raises(EtcdError, match="users and roles would take more"):
        add_role(auth, "t")
    finish(auth.delete_role(proto.AuthRoleDeleteRequest(role="r")))
    add_role(auth, "t")


# Who may do what.


@pytest.fixture
def open_house(auth: Auth) -> Auth:
    """The user `a` may read [a, c), by two permissions, and write [b, d) and x."""
    add_role(auth, "r")
    add_role(auth, "w")
    permit(auth, "r", READ, b"a", b"b")
    permit(auth, "w", BOTH, b"b", b"c")
    permit(auth, "w", WRITE, b"c", b"d")
    permit(auth, "w", WRITE, b"x")
    for name in ("a", "b"):
        add_user(auth, name)
    grant(auth, "a", "r")
    grant(auth, "a", "w")
    enable(auth)
    return auth


def request_of(text: str) -> tuple[int, Any]:
    """`Put:key` and so on, by a method's name and the fields of its request."""
    name, _, arguments = text.partition(" ")
    method = METHOD_BY_NAME[name]
    fields = eval(f"dict({arguments})", {"proto": proto, **OPS})
    return method.number, method.request(**fields)


def put(key: bytes, **fields: Any) -> proto.RequestOp:
    return proto.RequestOp(request_put=proto.PutRequest(key=key, **fields))


def get(key: bytes, range_end: bytes = b"") -> proto.RequestOp:
    return proto.RequestOp(request_range=proto.RangeRequest(key=key, range_end=range_end))


def delete(key: bytes, range_end: bytes = b"", **fields: Any) -> proto.RequestOp:
    request = proto.DeleteRangeRequest(key=key, range_end=range_end, **fields)
    return proto.RequestOp(request_delete_range=request)


def nested(**fields: Any) -> proto.RequestOp:
    return proto.RequestOp(request_txn=proto.TxnRequest(**fields))


def compare(key: bytes, range_end: bytes = b"") -> proto.Compare:
    return proto.Compare(key=key, range_end=range_end)


OPS = {"put": put, "get": get, "delete": delete, "nested": nested, "compare": compare}

ALLOWED = """
KV.Range key=b"a"
KV.Range key=b"a", range_end=b"c"
KV.Range key=b"a1", range_end=b"b1"
KV.Put key=b"b", prev_kv=True
KV.Put key=b"c"
KV.Put key=b"x"
KV.DeleteRange key=b"b", range_end=b"d"
KV.DeleteRange key=b"b", range_end=b"c", prev_kv=True
KV.Txn compare=[compare(b"a")], success=[put(b"c")], failure=[get(b"a", b"c")]
KV.Txn success=[nested(success=[delete(b"c")])]
Lease.LeaseGrant TTL=1
Maintenance.Alarm
Maintenance.Status
Cluster.MemberList
Auth.UserGet name="a"
Auth.RoleGet role="r"
"""

DENIED = """
KV.Range key=b"c"
KV.Range key=b"x"
KV.Range key=b"a", range_end=b"c1"
KV.Range key=b"a", range_end=b"\\0"
KV.Range key=b"\\0", range_end=b"\\0"
KV.Put key=b"a"
KV.Put key=b"x\\0"
KV.Put key=b"c", prev_kv=True
KV.DeleteRange key=b"b", range_end=b"\\0"
KV.DeleteRange key=b"b", range_end=b"d", prev_kv=True
KV.Txn compare=[compare(b"c")]
KV.Txn compare=[compare(b"b", b"d")]
KV.Txn failure=[put(b"a")]
KV.Txn success=[put(b"b"), get(b"c")]
KV.Txn success=[put(b"c", prev_kv=True)]
KV.Txn success=[delete(b"c", prev_kv=True)]
KV.Txn success=[nested(failure=[nested(compare=[compare(b"c")])])]
KV.Txn success=[nested(success=[put(b"a")])]
KV.Compact revision=1
Maintenance.Alarm action=1
Maintenance.Defragment
Maintenance.Hash
Maintenance.HashKV
Maintenance.Snapshot
Maintenance.MoveLeader
Cluster.MemberAdd
Cluster.MemberRemove
Cluster.MemberUpdate
Cluster.MemberPromote
Auth.AuthEnable
Auth.AuthDisable
Auth.AuthStatus
Auth.UserAdd name="c"
Auth.UserGet name="b"
Auth.UserList
Auth.UserDelete name="a"
Auth.UserChangePassword name="a"
Auth.UserGrantRole user="a", role="root"
Auth.UserRevokeRole name="a", role="r"
Auth.RoleAdd name="c"
Auth.RoleGet role="root"
Auth.RoleList
Auth.RoleDelete role="r"
Auth.RoleGrantPermission name="r"
Auth.RoleRevokePermission role="r"
Auth.RotateKey
History.Timeline
"""


@pytest.mark.parametrize("text", ALLOWED.strip().splitlines())
def test_allowed(open_house: Auth, text: str) -> None:
    method, request = request_of(text)
    assert may(open_house, "a", method, request)
    assert may(open_house, "root", method, request)


@pytest.mark.parametrize("text", DENIED.strip().splitlines())
def test_denied(open_house: Auth, text: str) -> None:
    method, request = request_of(text)
    assert not may(open_house, "a", method, request)
    assert may(open_house, "root", method, request)
    open_house.check(OWN, method, request)


@pytest.mark.parametrize("value", [b"v", None])
def test_a_swap_is_permitted_to_those_who_may_do_its_parts(auth: Auth, value: bytes | None) -> None:
    key, range_end = b"k", b"l"
    for kind, name in ((READ, "reader"), (WRITE, "writer"), (BOTH, "both")):
        add_user(auth, name)
        add_role(auth, name)
        grant(auth, name, name)
        permit(auth, name, kind, key, range_end)
    enable(auth)
    put = proto.PutRequest(key=key, value=value or b"", lease=5)
    success = proto.RequestOp(request_put=put)
    if value is None:
        success = proto.RequestOp(request_delete_range=proto.DeleteRangeRequest(key=key))
    parts = proto.TxnRequest(
        compare=[proto.Compare(key=key, target=proto.Compare.MOD, mod_revision=3)],
        success=[success],
        failure=[proto.RequestOp(request_range=proto.RangeRequest(key=key))],
    )
    swap = decode_txn(parts.encode())
    assert isinstance(swap, PlainTxn)
    for name in ("reader", "writer", "both", "root"):
        expected = name in ("both", "root")
        assert may(auth, name, TXN, swap) == may(auth, name, TXN, parts) == expected, name
    assert name_of(lambda: auth.check(None, TXN, swap)) == "UserEmpty"
    assert name_of(lambda: auth.check(Author("both", 1), TXN, swap)) == "AuthOldRevision"
    assert lease_puts(TXN, swap) == lease_puts(TXN, parts) == ([(5, key)] if value else [])


def test_each_key_of_a_plain_transaction_needs_its_permission(auth: Auth) -> None:
    """The same as for its messages, and in both branches."""
    for kind, name in ((READ, "r"), (WRITE, "w")):
        add_user(auth, name)
        add_role(auth, name)
        grant(auth, name, name)
        permit(auth, name, BOTH, b"open", b"")
        permit(auth, name, kind, b"part", b"")
    enable(auth)
    ops = [
        lambda key: proto.RequestOp(request_range=proto.RangeRequest(key=key)),
        lambda key: proto.RequestOp(request_put=proto.PutRequest(key=key, value=b"v")),
        lambda key: proto.RequestOp(request_delete_range=proto.DeleteRangeRequest(key=key)),
    ]
    verdicts = set()
    for success, failure in itertools.product(ops, ops[1:]):
        for keys in itertools.product((b"open", b"part", b"none"), repeat=3):
            parts = proto.TxnRequest(
                compare=[
                    proto.Compare(key=keys[0], target=proto.Compare.CREATE, create_revision=0)
                ],
                success=[success(keys[1])],
                failure=[failure(keys[2])],
            )
            plain = decode_txn(parts.encode())
            assert isinstance(plain, PlainTxn)
            for name in ("r", "w", "root"):
                verdict = may(auth, name, TXN, plain)
                assert verdict == may(auth, name, TXN, parts), (name, parts)
                verdicts.add((name, verdict))
    assert len(verdicts) == 5


def test_every_method_is_refused_to_strangers_unless_the_table_says_so(open_house: Auth) -> None:
    allowed = set()
    for row in methods.METHODS.values():
        request = row.request()
        if row.number == methods.WATCH:
            request = proto.WatchCreateRequest()
        refused = name_of(lambda: open_house.check(None, row.number, request))  # noqa: B023
        assert refused in ("", "UserEmpty")
        if not refused:
            allowed.add(row.full)
    assert allowed == {"Maintenance.Status", "Auth.Authenticate"}


def test_an_old_revision_is_refused_where_keys_are_concerned(open_house: Auth) -> None:
    old = Author("root", open_house.revision - 1)
    assert name_of(lambda: open_house.check(old, PUT, proto.PutRequest())) == "AuthOldRevision"
    user_list = METHOD_BY_NAME["Auth.UserList"].number
    open_house.check(old, user_list, proto.AuthUserListRequest())


def test_a_user_that_does_not_exist(open_house: Auth) -> None:
    nobody = Author("nobody", open_house.revision)
    assert name_of(lambda: open_house.check(nobody, PUT, proto.PutRequest())) == "PermissionDenied"
    request = proto.AuthUserListRequest()
    user_list = METHOD_BY_NAME["Auth.UserList"].number
    assert name_of(lambda: open_house.check(nobody, user_list, request)) == "UserNotFound"


def test_a_watch_from_a_key_on_needs_more_than_the_key(open_house: Auth) -> None:
    """GHSA-xg4h-6gfc-h4m8."""
    permit(open_house, "r", READ, b"k")

    def may_watch(key: bytes, range_end: bytes = b"") -> bool:
        request = proto.WatchCreateRequest(key=key, range_end=range_end)
        return may(open_house, "a", methods.WATCH, request)

    assert may_watch(b"k")
    assert not may_watch(b"k", b"\0")
    assert not may_watch(b"k", b"l")
    assert not may_watch(b"", b"\0")
    assert not may_watch(b"")
    assert may_watch(b"a", b"b")


def may_use(auth: Auth, rights: LeaseRights, user: str, method: int, request: Any) -> bool:
    author = Author(user, auth.revision)
    steps = rights.write_steps(author, lease_puts(method, request))
    return not name_of(lambda: finish(steps))


def test_a_lease_belongs_to_those_who_may_write_all_its_keys(open_house: Auth) -> None:
    lessor = Lessor()
    rights = LeaseRights(open_house, lessor)
    for lease in (1, 2, 3):
        lessor.grant(lease, 60, 0)
    lessor.attach(b"b1", 1)
    lessor.attach(b"x", 1)
    lessor.attach(b"b2", 2)
    lessor.attach(b"a", 2)
    for lease, allowed in ((1, True), (2, False), (3, True), (99, True), (0, True)):
        revoke = proto.LeaseRevokeRequest(ID=lease)
        put_with = proto.PutRequest(key=b"b", lease=lease)
        txn = proto.TxnRequest(success=[nested(failure=[put(b"b", lease=lease)])])
        for method, request in ((LEASE_REVOKE, revoke), (PUT, put_with), (TXN, txn)):
            for _ in range(2):  # The second time, it is remembered.
                assert may_use(open_house, rights, "a", method, request) == allowed
            assert may_use(open_house, rights, "root", method, request)
    # What is remembered ends when another user attaches a key, or one is detached.
    assert may_use(open_house, rights, "root", PUT, proto.PutRequest(key=b"foreign", lease=1))
    lessor.attach(b"foreign", 1)
    assert not may_use(open_house, rights, "a", LEASE_REVOKE, proto.LeaseRevokeRequest(ID=1))
    lessor.detach(b"foreign")
    assert may_use(open_house, rights, "a", LEASE_REVOKE, proto.LeaseRevokeRequest(ID=1))
    lessor.detach(b"a")
    assert may_use(open_house, rights, "a", LEASE_REVOKE, proto.LeaseRevokeRequest(ID=2))


def test_a_renewal_amid_a_transaction_does_not_change_who_may_write_a_lease(
    open_house: Auth,
) -> None:
    """Renewals are checked on one member only, so that member would decide otherwise than the
    others."""
    lessor = Lessor()
    rights = LeaseRights(open_house, lessor)
    lessor.grant(1, 60, 0)
    lessor.attach(b"b1", 1)
    assert may_use(open_house, rights, "root", PUT, proto.PutRequest(key=b"foreign", lease=1))
    # The transaction is applied in part: the key is not attached yet.
    finish(rights.write_steps(Author("a", open_house.revision), [(1, None)]))
    lessor.attach(b"foreign", 1)
    assert not may_use(open_house, rights, "a", LEASE_REVOKE, proto.LeaseRevokeRequest(ID=1))


def test_many_small_leases_do_not_have_a_large_one_checked_again(
    open_house: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_rights, "MAX_KNOWN_LEASES", 8)
    lessor = Lessor()
    rights = LeaseRights(open_house, lessor)
    lessor.grant(1, 60, 0)
    for number in range(2 * lease_rights.KEYS_PER_STEP):
        lessor.attach(b"b%d" % number, 1)

    def steps(lease: int) -> int:
        author = Author("a", open_house.revision)
        return sum(1 for _ in rights.write_steps(author, [(lease, None)]))

    assert steps(1) == 2
    for lease in range(2, 100):
        lessor.grant(lease, 60, 0)
        lessor.attach(b"bb%d" % lease, lease)
        assert steps(lease) == steps(1) == 0
    assert len(rights._writers) <= 8


def test_a_slow_check_remembers_nothing_that_changed_meanwhile(open_house: Auth) -> None:
    """Renewals are checked in steps, and keys are attached in between."""
    lessor = Lessor()
    rights = LeaseRights(open_house, lessor)
    lessor.grant(1, 60, 0)
    for number in range(2 * lease_rights.KEYS_PER_STEP):
        lessor.attach(b"b%d" % number, 1)
    author = Author("a", open_house.revision)

    def renewal() -> Any:
        steps = rights.write_steps(author, [(1, None)])
        next(steps)
        return steps

    under_way = [renewal(), renewal()]
    assert may_use(open_house, rights, "root", PUT, proto.PutRequest(key=b"foreign", lease=1))
    lessor.attach(b"foreign", 1)
    for steps in under_way:
        finish(steps)
    assert not may_use(open_house, rights, "a", LEASE_REVOKE, proto.LeaseRevokeRequest(ID=1))
    lessor.detach(b"foreign")
    # Rights change.
    steps = renewal()
    open_house.revoke_role(proto.AuthUserRevokeRoleRequest(name="a", role="w"))
    finish(steps)
    assert not may_use(open_house, rights, "a", LEASE_REVOKE, proto.LeaseRevokeRequest(ID=1))
    assert not rights._scans


def test_a_role_of_many_users_is_deleted_in_steps(auth: Auth) -> None:
    add_role(auth, "r")
    users = [f"u{number}" for number in range(5 * auth_module.USERS_PER_STEP)]
    for user in users:
        add_user(auth, user)
        grant(auth, user, "r")
    revision = auth.revision
    assert sum(1 for _ in auth.delete_role(proto.AuthRoleDeleteRequest(role="r"))) == 5
    assert auth.revision == revision + 1
    assert not any(auth.user(user).roles for user in users)


# Passwords.


def test_hashes() -> None:
    assert passwords.is_right("secret", HASH)
    assert not passwords.is_right("Secret", HASH)
    assert not passwords.is_right("secret", b"") and not passwords.is_right("", b"no hash")
    assert b"m=19456,t=2,p=1" in passwords.hash_password("x")
    assert passwords.hash_password("x", CHEAP) != passwords.hash_password("x", CHEAP)


@pytest.mark.parametrize("prefix", [b"$2a$", b"$2b$", b"$2y$"])
def test_hashes_of_etcd(prefix: bytes) -> None:
    bcrypt = pytest.importorskip("bcrypt")
    stored = prefix + bcrypt.hashpw(b"secret", bcrypt.gensalt(4))[4:]
    assert passwords.is_bcrypt(stored) and passwords.is_hash(stored)
    assert passwords.is_right("secret", stored) and not passwords.is_right("wrong", stored)
    assert not passwords.is_right("secret", prefix + b"04$" + b"." * 53)
    assert not passwords.is_right("a\0b", stored)
    long = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4))
    assert passwords.is_right("x" * 100, long), "as etcd, which reads 72 bytes"


def test_hashes_that_the_libraries_refuse_are_of_no_password() -> None:
    long = b"$argon2id$v=19$m=8192,t=1,p=1$" + b"A" * 22 + b"$" + b"A" * 86
    assert passwords.is_hash(long) and not passwords.is_right("x", long)
    pytest.importorskip("bcrypt")
    no_salt = b"$2a$04$" + b"9" * 53
    assert passwords.is_hash(no_salt) and not passwords.is_right("x\0y", no_salt)


# Tokens.

NOW = 1_800_000_000.0
YEAR_S = 365 * 86_400


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def simple(clock: Clock) -> SimpleTokens:
    return SimpleTokens(8, 300, clock, clock)


def test_a_token_is_good_at_every_member(open_house: Auth, simple: SimpleTokens) -> None:
    token = simple.issue(open_house.key, "a", open_house.revision)
    assert simple.author(open_house, token) == Author("a", open_house.revision)
    other = SimpleTokens(8, 300, Clock(), Clock())
    add_role(open_house, "later")
    assert other.author(open_house, token) == Author("a", open_house.revision)


def test_use_extends_a_token(open_house: Auth, simple: SimpleTokens, clock: Clock) -> None:
    token = simple.issue(open_house.key, "a", open_house.revision)
    for _ in range(4):
        clock.now += 299
        simple.author(open_house, token)
    clock.now += 301
    for _ in range(2):
        assert name_of(lambda: simple.author(open_house, token)) == "InvalidAuthToken"


@pytest.mark.parametrize("step_s", [3600, -3600, 10 * YEAR_S, -10 * YEAR_S])
def test_a_step_of_the_wall_clock_neither_ends_a_token_nor_extends_it(
    open_house: Auth, clock: Clock, step_s: int
) -> None:
    wall = Clock()
    simple = SimpleTokens(8, 300, clock, wall)
    token = simple.issue(open_house.key, "a", open_house.revision)
    simple.author(open_house, token)
    wall.now += step_s
    for _ in range(3):
        clock.now += 299
        assert simple.author(open_house, token) == Author("a", open_house.revision)
    clock.now += 301
    for _ in range(2):
        assert name_of(lambda: simple.author(open_house, token)) == "InvalidAuthToken"


def test_a_token_that_seemed_to_have_ended_is_good_once_the_wall_clock_is_right(
    open_house: Auth, clock: Clock
) -> None:
    wall = Clock()
    token = SimpleTokens(8, 300, clock, wall).issue(open_house.key, "a", open_house.revision)
    other = SimpleTokens(8, 300, clock, wall)
    wall.now += 3600
    assert name_of(lambda: other.author(open_house, token)) == "InvalidAuthToken"
    wall.now -= 3600
    assert other.author(open_house, token) == Author("a", open_house.revision)


def bad_tokens(auth: Auth, tokens: SimpleTokens) -> Iterator[tuple[str, str]]:
    good = tokens.issue(auth.key, "a", auth.revision)
    yield "empty", ""
    yield "cut", good[:-1]
    yield "cut to nothing", good[:4]
    yield "longer", good + "A"
    yield "padded", good + "=="
    yield "text", "root"
    yield "umlaut", "ü" * 100
    yield "huge", "A" * 100_000
    yield "etcd's", "AlvjVLTFdGxZCmcU.49"
    yield "none", base64.urlsafe_b64encode(b'{"alg":"none"}').decode() + ".e30."
    at = len(good) // 2
    yield "changed", good[:at] + ("A" if good[at] != "A" else "B") + good[at + 1 :]
    yield "with a space", good[:at] + " " + good[at:]
    yield (
        "of another cluster",
        SimpleTokens(9, 300, Clock(), Clock()).issue(auth.key, "a", auth.revision),
    )
    yield "of another key", tokens.issue(b"\1" * 32, "a", auth.revision)
    yield "of nobody", tokens.issue(auth.key, "nobody", auth.revision)
    yield "from before the user", tokens.issue(auth.key, "a", 1)
    yield "ahead", tokens.issue(auth.key, "a", auth.revision + 1)
    late = Clock()
    late.now -= 301
    yield "ended", SimpleTokens(8, 300, late, late).issue(auth.key, "a", auth.revision)


def test_bad_tokens(open_house: Auth, simple: SimpleTokens) -> None:
    for what, token in bad_tokens(open_house, simple):
        refused = name_of(lambda: simple.author(open_house, token))  # noqa: B023
        assert refused == "InvalidAuthToken", what


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_no_bytes_are_a_token(content: bytes) -> None:
    auth = Auth(Store.create(FaultyDisk(), "data", Lessor(), 1 << 16))
    enable(auth)
    tokens = SimpleTokens(8, 300, Clock(), Clock())
    text = base64.urlsafe_b64encode(content).rstrip(b"=").decode()
    assert name_of(lambda: tokens.author(auth, text)) == "InvalidAuthToken"


def test_a_token_with_a_later_end_than_the_time_to_live(
    open_house: Auth, simple: SimpleTokens, clock: Clock
) -> None:
    """Of a member that was configured so, or whose clock is ahead."""
    token = SimpleTokens(8, 10_000, Clock(), Clock()).issue(
        open_house.key, "a", open_house.revision
    )
    simple.author(open_house, token)
    clock.now += 301
    assert name_of(lambda: simple.author(open_house, token)) == "InvalidAuthToken"


def test_the_number_of_known_tokens_is_bounded(
    open_house: Auth, simple: SimpleTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "MAX_KNOWN", 3)
    for revision in range(open_house.since["a"], open_house.revision):
        simple.author(open_house, simple.issue(open_house.key, "a", revision))
    assert len(simple._known) <= 3


def test_a_rotated_key_ends_all_tokens(open_house: Auth, simple: SimpleTokens) -> None:
    token = simple.issue(open_house.key, "a", open_house.revision)
    simple.author(open_house, token)
    revision = open_house.revision
    open_house.set_key(proto.TokenKey(seed=b"\2" * 32))
    assert open_house.revision == revision, "auth is enabled, and this is no rotation"
    simple.author(open_house, token)
    open_house.rotate_key(proto.AuthRotateKeyRequest(seed=b"\2" * 32))
    assert open_house.revision == revision + 1
    assert name_of(lambda: simple.author(open_house, token)) == "InvalidAuthToken"


# JSON Web Tokens.


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths of keys: rsa, ec, ed, each with its public one at NAME.pub; and secret."""
    pytest.importorskip("jwt")
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    folder = tmp_path_factory.mktemp("keys")
    found = {}
    for name, key in (
        ("rsa", rsa.generate_private_key(65537, 2048)),
        ("other", rsa.generate_private_key(65537, 2048)),
        ("ec", ec.generate_private_key(ec.SECP256R1())),
        ("ed", ed25519.Ed25519PrivateKey.generate()),
    ):
        found[name] = folder / name
        found[name].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        found[f"{name}.pub"] = folder / f"{name}.pub"
        found[f"{name}.pub"].write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
    found["secret"] = folder / "secret"
    found["secret"].write_bytes(b"s" * 64)
    return found


def jwt_options(keys: dict[str, Path], method: str, **options: str) -> dict[str, str]:
    """Keys are given by their names."""
    given = {name.replace("_", "-"): str(keys.get(value, value)) for name, value in options.items()}
    return {"sign-method": method, **given}


@pytest.mark.parametrize(
    ("method", "key"),
    [("RS256", "rsa"), ("PS512", "rsa"), ("ES256", "ec"), ("EdDSA", "ed"), ("HS256", "secret")],
)
def test_json_web_tokens(open_house: Auth, keys: dict[str, Path], method: str, key: str) -> None:
    tokens = jwt_tokens.load(jwt_options(keys, method, priv_key=key))
    token = tokens.issue(b"", "a", open_house.revision)
    assert tokens.author(open_house, token) == Author("a", open_house.revision)
    assert tokens.author(open_house, token) == Author("a", open_house.revision)
    public = {"HS256": "secret"}.get(method, f"{key}.pub")
    both = jwt_tokens.load(jwt_options(keys, method, priv_key=key, pub_key=public))
    assert both.author(open_house, token).name == "a"
    if method != "HS256":
        checks = jwt_tokens.load(jwt_options(keys, method, pub_key=public))
        assert checks.author(open_house, token).name == "a"
        with pytest.raises(EtcdError, match="names no priv-key"):
            checks.issue(b"", "a", 1)
    # As in etcd, such a token is of its auth revision.
    add_role(open_house, "later")
    author = tokens.author(open_house, token)
    assert name_of(lambda: open_house.check(author, PUT, proto.PutRequest())) == "AuthOldRevision"


def test_the_public_key_of_json_web_tokens_may_be_a_certificate(
    open_house: Auth, keys: dict[str, Path], tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import hashes, serialization

    x509 = pytest.importorskip("cryptography.x509")
    name = x509.Name([])
    for key, method, other in (("rsa", "RS256", "ES256"), ("ec", "ES256", "PS512")):
        private: Any = serialization.load_pem_private_key(keys[key].read_bytes(), None)
        builder = x509.CertificateBuilder(name, name, private.public_key(), 1)
        builder = builder.not_valid_before(datetime(2020, 1, 1))
        builder = builder.not_valid_after(datetime(2020, 1, 2))
        path = tmp_path / key
        certificate = builder.sign(private, hashes.SHA256())
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        both = jwt_tokens.load(jwt_options(keys, method, priv_key=key, pub_key=str(path)))
        checks = jwt_tokens.load(jwt_options(keys, method, pub_key=str(path)))
        token = both.issue(b"", "a", open_house.revision)
        assert checks.author(open_house, token).name == "a"
        for wrong in ({"pub_key": str(path)}, {"priv_key": str(path)}):
            with pytest.raises(ValueError, match=f"does not hold a key in PEM that {other}"):
                jwt_tokens.load(jwt_options(keys, other, **wrong))
    path.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(ValueError, match="does not hold a key in PEM that RS256"):
        jwt_tokens.load(jwt_options(keys, "RS256", pub_key=str(path)))


def test_a_new_password_ends_json_web_tokens(open_house: Auth, keys: dict[str, Path]) -> None:
    tokens = jwt_tokens.load(jwt_options(keys, "HS256", priv_key="secret"))
    token = tokens.issue(b"", "root", open_house.revision)
    add_role(open_house, "later")
    user_list = METHOD_BY_NAME["Auth.UserList"].number
    open_house.check(tokens.author(open_house, token), user_list, proto.AuthUserListRequest())
    changed = proto.AuthUserChangePasswordRequest(name="root", hashedPassword=HASHED)
    open_house.change_password(changed)
    assert name_of(lambda: tokens.author(open_house, token)) == "AuthOldRevision"
    token = tokens.issue(b"", "b", open_house.revision)
    open_house.delete_user(proto.AuthUserDeleteRequest(name="b"))
    add_user(open_house, "b")
    assert name_of(lambda: tokens.author(open_house, token)) == "AuthOldRevision"
    tokens.author(open_house, tokens.issue(b"", "b", open_house.revision))


def test_bad_json_web_tokens(open_house: Auth, keys: dict[str, Path]) -> None:
    jwt = pytest.importorskip("jwt")
    tokens = jwt_tokens.load(jwt_options(keys, "RS256", priv_key="rsa"))
    good = tokens.issue(b"", "root", open_house.revision)
    claims = jwt.decode(good, options={"verify_signature": False})
    private = keys["rsa"].read_bytes()

    def signed(key: Any = private, algorithm: str = "RS256", **changed: Any) -> str:
        content = {
            name: value for name, value in {**claims, **changed}.items() if value is not None
        }
        return str(jwt.encode(content, key, algorithm=algorithm))

    assert tokens.author(open_house, signed()).name == "root"
    for what, token in (
        ("cut", good[:-5]),
        ("none", signed(None, "none")),
        ("of another key", signed(keys["other"].read_bytes())),
        ("another algorithm", signed(algorithm="RS512")),
        ("the public key as a secret", _hs256(good, keys["rsa.pub"].read_bytes())),
        ("ended", signed(exp=1)),
        ("without an end", signed(exp=None)),
        ("without a user", signed(username=None)),
        ("a user that is a number", signed(username=7)),
        ("without a revision", signed(revision=None)),
        ("a revision that is a text", signed(revision="7")),
        ("a revision of more than 64 bits", signed(revision=1 << 64)),
        ("an end of more digits than a float has", signed(exp=10**400)),
        # PyJWT 2.6, which Debian has, raises TypeError for these.
        ("an end that is a list", signed(exp=[1])),
        ("made at a time that is a list", signed(iat=[7])),
        ("not before an object", signed(nbf={})),
        ("half of a surrogate pair in the name", signed(username="\ud800")),
        ("a name that no user can have", signed(username="a" * (MAX_NAME_BYTES + 1))),
        ("not before next year", signed(nbf=int(claims["exp"]) + 10**7)),
        ("simple", "AlvjVLTFdGxZCmcU.49"),
        ("umlaut", "ü.ü.ü"),
        ("nested", base64.urlsafe_b64encode(b'{"alg":' + b"[" * 6000).decode() + ".e30.AAAA"),
        ("huge", "A" * 1_000_000),
    ):
        refused = name_of(lambda: tokens.author(open_house, token))  # noqa: B023
        assert refused == "InvalidAuthToken", what


def _hs256(token: str, secret: bytes) -> str:
    """The token, signed again with a shared secret."""
    import hashlib
    import hmac

    header = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').rstrip(b"=").decode()
    content = f"{header}.{token.split('.')[1]}"
    digest = hmac.new(secret, content.encode(), hashlib.sha256).digest()
    return f"{content}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("none", {"priv_key": "rsa"}, "sign-method must be one of RS256"),
        ("RS256", {}, "needs priv-key=FILE"),
        ("RS256", {"priv_key": "/no/file"}, "cannot read the key /no/file: No such file"),
        ("RS256", {"priv_key": "/"}, "cannot read the key /: it is not a regular file"),
        ("RS256", {"priv_key": "secret"}, "does not hold a key in PEM that RS256 can use"),
        ("RS256", {"priv_key": "ec"}, "does not hold a key in PEM that RS256 can use"),
        ("RS256", {"pub_key": "ec.pub"}, "does not hold a key in PEM that RS256 can use"),
        ("PS512", {"priv_key": "ed"}, "does not hold a key in PEM that PS512 can use"),
        ("ES256", {"priv_key": "rsa"}, "does not hold a key in PEM that ES256 can use"),
        ("EdDSA", {"pub_key": "ec.pub"}, "does not hold a key in PEM that EdDSA can use"),
        ("RS256", {"priv_key": "rsa.pub"}, "holds a public key"),
        ("RS256", {"priv_key": "rsa", "pub_key": "other.pub"}, "is not the public key of"),
        ("RS256", {"priv_key": "rsa", "ttl": "soon"}, "soon"),
    ],
)
def test_settings_that_make_no_tokens(
    keys: dict[str, Path], method: str, options: dict[str, str], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        jwt_tokens.load(jwt_options(keys, method, **options))


def test_keys_of_json_web_tokens_that_others_may_read(
    keys: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in (keys["rsa"], keys["secret"]):
        path.chmod(0o644)
    jwt_tokens.load(jwt_options(keys, "RS256", priv_key="rsa", pub_key="rsa.pub"))
    jwt_tokens.load(jwt_options(keys, "HS256", pub_key="secret"))
    assert capfd.readouterr().err.count("others may read a private key") == 2
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="it is not a regular file"):
        jwt_tokens.load(jwt_options(keys, "RS256", priv_key=str(tmp_path / "pipe")))


def test_what_to_install_for_json_web_tokens(
    keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jwt", None)
    with pytest.raises(ValueError, match="python3-jwt and python3-cryptography"):
        jwt_tokens.load(jwt_options(keys, "RS256", priv_key="rsa"))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("simple", {}),
        ("jwt,sign-method=RS256,priv-key=a", {"sign-method": "RS256", "priv-key": "a"}),
    ],
)
def test_the_flag_auth_token(text: str, options: dict[str, str]) -> None:
    assert flags.FLAGS["auth-token"].kind.parse(text) == options


@pytest.mark.parametrize(
    "text", ["", "simple,x=y", "jwt", "jwt,priv-key=a", "jwt,sign-method=", "jwt,sign-method=a,b=c"]
)
def test_bad_values_of_the_flag_auth_token(text: str) -> None:
    with pytest.raises(ValueError, match="write simple"):
        flags.FLAGS["auth-token"].kind.parse(text)
