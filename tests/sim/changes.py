"""Random changes of users and roles, aimed at what is there."""

from __future__ import annotations

import random
from typing import Any

from etcdlite import proto
from sim.plain_auth import READ, READWRITE, ROOT, WRITE, PlainAuth

USERS = (ROOT, "u1", "u2", "u3")
ROLES = ("r1", "r2", "r3")
NONSENSE_SHARE = 0.15
"""Of the changes, those that do not look at what is there."""


def change(rng: random.Random, oracle: Any, keys: list[bytes]) -> tuple[str, Any]:
    """A change that makes sense, mostly: the name of the method and the request."""
    auth = oracle.auth.now
    kinds = [
        _add_user, _delete_user, _change_password, _grant_role, _grant_role, _revoke_role,
        _add_role, _add_role, _delete_role, _grant, _grant, _grant, _revoke, _toggle,
        _rotate_key,
    ]  # fmt: skip
    if rng.random() < NONSENSE_SHARE:
        auth = PlainAuth(users=dict.fromkeys(USERS), roles={name: {} for name in ROLES})
    found = None
    while found is None:
        found = rng.choice(kinds)(rng, auth, oracle, keys)
    return found


def founding(rng: random.Random, oracle: Any, keys: list[bytes]) -> tuple[str, Any] | None:
    """The next change on the way to a cluster with users; None at its end."""
    auth = oracle.auth.now
    if ROOT not in auth.users:
        return _user(ROOT, oracle)
    if ROOT not in auth.users[ROOT].roles:
        return _role_of(ROOT, ROOT)
    for name in ROLES:
        if name not in auth.roles:
            return "Auth.RoleAdd", proto.AuthRoleAddRequest(name=name)
        if not auth.roles[name]:
            return _grant(rng, auth, oracle, keys, name)
    for name in USERS:
        if name not in auth.users:
            return _user(name, oracle)
        if not auth.users[name].roles:
            return _role_of(name, rng.choice(ROLES))
    return None if auth.enabled else ("Auth.AuthEnable", proto.AuthEnableRequest())


def _user(name: str, oracle: Any) -> tuple[str, Any]:
    password = oracle.new_password()
    return "Auth.UserAdd", proto.AuthUserAddRequest(name=name, password=password)


def _role_of(name: str, role: str) -> tuple[str, Any]:
    return "Auth.UserGrantRole", proto.AuthUserGrantRoleRequest(user=name, role=role)


_Change = "tuple[str, Any] | None"


def _add_user(rng: random.Random, auth: PlainAuth, oracle: Any, keys: list[bytes]) -> _Change:
    missing = [name for name in USERS if name not in auth.users] or list(USERS[1:])
    name = rng.choice(missing)
    if name == ROOT or rng.random() < 0.8:
        return _user(name, oracle)
    options = proto.UserAddOptions(no_password=True)
    return "Auth.UserAdd", proto.AuthUserAddRequest(name=name, options=options)


def _delete_user(rng: random.Random, auth: PlainAuth, oracle: Any, keys: list[bytes]) -> _Change:
    name = rng.choice(USERS)
    return "Auth.UserDelete", proto.AuthUserDeleteRequest(name=name)


def _change_password(
    rng: random.Random, auth: PlainAuth, oracle: Any, keys: list[bytes]
) -> _Change:
    request = proto.AuthUserChangePasswordRequest(name=rng.choice(USERS))
    request.password = oracle.new_password()
    return "Auth.UserChangePassword", request


def _grant_role(rng: random.Random, auth: PlainAuth, oracle: Any, keys: list[bytes]) -> _Change:
    role = ROOT if rng.random() < 0.05 else rng.choice(ROLES)
    return _role_of(rng.choice(USERS[1:]), role)


def _revoke_role(rng: random.Random, auth: PlainAuth, oracle: Any, keys: list[bytes]) -> _Change:
    having = [(n, r) for n, user in auth.users.items() if user for r in sorted(user.roles)]
    name, role = rng.choice(having) if having else (rng.choice(USERS), rng.choice(ROLES))
    return "Auth.UserRevokeRole", proto.AuthUserRevokeRoleRequest(name=name, role=role)


def _add_role(rng: random.Random, auth: PlainAuth, oracle: Any, keys: list[bytes]) -> _Change:
    missing = [name for name in ROLES if name not in auth.roles]
    return ("Auth.RoleAdd", proto.AuthRoleAddRequest(name=rng.choice(missing))) if missing else None


def _delete_role(rng: random.Random, auth: PlainAuth, oracle: Any, keys: list[bytes]) -> _Change:
    return "Auth.RoleDelete", proto.AuthRoleDeleteRequest(role=rng.choice(ROLES))


def _grant(
    rng: random.Random, auth: PlainAuth, oracle: Any, keys: list[bytes], role: str = ""
) -> _Change:
    role = role or rng.choice(ROLES)
    key, range_end = rng.choice(keys), b""
    luck = rng.random()
    granted = list(auth.roles.get(role, ()))
    if luck < 0.2:
        key, range_end = b"k", b"l"
    elif luck < 0.3:
        range_end = b"\0"
    elif luck < 0.4 and granted:
        # Beside another one.
        key, range_end = rng.choice(granted)[1] or key, b"l"
        key = key.replace(b"\0", b"k")
    elif luck < 0.55:
        key, range_end = b"k", key + b"\0"
    elif luck < 0.7:
        range_end = b"l"
    elif luck < 0.85:
        range_end = rng.choice(keys) + b"\0"
    kind = rng.choice((READ, WRITE, READWRITE, READWRITE))
    permission = proto.Permission(permType=kind, key=key, range_end=range_end)
    request = proto.AuthRoleGrantPermissionRequest(name=role, perm=permission)
    return "Auth.RoleGrantPermission", request


def _revoke(rng: random.Random, auth: PlainAuth, oracle: Any, keys: list[bytes]) -> _Change:
    having = [(role, place) for role, places in sorted(auth.roles.items()) for place in places]
    role, (key, end) = rng.choice(having) if having else ("r1", (rng.choice(keys), b""))
    request = proto.AuthRoleRevokePermissionRequest(role=role, key=key, range_end=end)
    return "Auth.RoleRevokePermission", request


def _toggle(rng: random.Random, auth: PlainAuth, oracle: Any, keys: list[bytes]) -> _Change:
    if auth.enabled and rng.random() < 0.5:
        return "Auth.AuthDisable", proto.AuthDisableRequest()
    return "Auth.AuthEnable", proto.AuthEnableRequest()


def _rotate_key(rng: random.Random, auth: PlainAuth, oracle: Any, keys: list[bytes]) -> _Change:
    return "Auth.RotateKey", proto.AuthRotateKeyRequest()
