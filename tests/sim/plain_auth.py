"""The meaning of etcd's users, roles and permissions in the plainest form, for the simulator.

`PlainAuth` is what users and roles must be as of one place in the log. It shares no code with the
package except the message classes and the error texts: where the package joins ranges, this looks
at every point where a range begins or ends. A `History` keeps each state that there ever was, with
the place in the log where it began. So it is known what a request might have been answered by any
member between its call and its return.
"""

from __future__ import annotations

import base64
import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from etcdlite import proto
from etcdlite.errors import error

READ, WRITE, READWRITE = 0, 1, 2
"""Kinds of permissions, by their numbers."""

ROOT = "root"

_ROOT_ONLY = frozenset(
    (
        "Cluster.MemberAdd", "Cluster.MemberRemove", "Cluster.MemberUpdate",
        "Cluster.MemberPromote", "Maintenance.Defragment", "Maintenance.Hash",
        "Maintenance.HashKV", "Maintenance.Snapshot", "Maintenance.MoveLeader",
        "Maintenance.Alarm", "Auth.AuthEnable", "Auth.AuthDisable", "Auth.AuthStatus",
        "Auth.UserAdd", "Auth.UserList", "Auth.UserDelete", "Auth.UserChangePassword",
        "Auth.UserGrantRole", "Auth.UserRevokeRole", "Auth.RoleAdd", "Auth.RoleList",
        "Auth.RoleDelete", "Auth.RoleGrantPermission", "Auth.RoleRevokePermission",
        "Auth.RotateKey",
    )
)  # fmt: skip
_EVERY_USER = frozenset(
    (
        "KV.Compact", "Lease.LeaseGrant", "Lease.LeaseRevoke", "Lease.LeaseKeepAlive",
        "Lease.LeaseTimeToLive", "Cluster.MemberList",
    )
)  # fmt: skip


@dataclass(frozen=True)
class User:
    password: bytes
    has_password: bool
    since: int
    """The auth revision at which it got its password."""
    roles: frozenset[str] = frozenset()


class Author(NamedTuple):
    """For whom a request is, as the log has it."""

    name: str
    revision: int
    is_member: bool = False


@dataclass
class PlainAuth:
    """One state. It is not changed any more when it is in a `History`."""

    enabled: bool = False
    revision: int = 1
    key: bytes = b""
    users: dict[str, User] = field(default_factory=dict)
    roles: dict[str, dict[tuple[bytes, bytes], int]] = field(default_factory=dict)
    """The kind of each permission, by role and (key, range end)."""

    def draft(self) -> PlainAuth:
        """A copy to change."""
        other = copy(self)
        other.users = dict(self.users)
        other.roles = {name: dict(permissions) for name, permissions in self.roles.items()}
        return other

    # Who may do what. Each raises EtcdError.

    def check(
        self,
        author: Author | None,
        method: str,
        request: Any,
        keys_of: Callable[[int], list[bytes]] | None,
    ) -> None:
        """`keys_of` returns the keys of a lease; None, before the request is in the log."""
        if author is not None and author.is_member:
            return
        if method in ("KV.Put", "KV.Range", "KV.DeleteRange", "KV.Txn"):
            self._check_keys(author, method, request)
        elif method == "Watch.Watch":
            self._known(author)
            self._may(author, READ, request.key or b"\0", request.range_end)
        elif self._asks_for_itself(author, method, request):
            pass
        elif (
            method in ("Auth.UserGet", "Auth.RoleGet")
            or (
                method in _ROOT_ONLY and not (method == "Maintenance.Alarm" and request.action == 0)
            )
            or (method == "KV.Compact" and keys_of is None)
        ):
            self._check_root(author)
        elif method in _EVERY_USER or method == "Maintenance.Alarm":
            if author is None or not author.name:
                raise error("UserEmpty")
            if author.name not in self.users:
                raise error("PermissionDenied")
        if keys_of is not None:
            self._check_leases(author, method, request, keys_of)

    def _asks_for_itself(self, author: Author | None, method: str, request: Any) -> bool:
        """A user may see itself and its roles."""
        if method == "Auth.UserGet":
            return author is not None and author.name == request.name
        return method == "Auth.RoleGet" and request.role in self._roles_of(author)

    def _check_root(self, author: Author | None) -> None:
        if author is None or not author.name:
            raise error("UserEmpty")
        if author.name not in self.users:
            raise error("UserNotFound")
        if ROOT not in self._roles_of(author):
            raise error("PermissionDenied")

    def _known(self, author: Author | None) -> None:
        if author is None or author.revision == 0:
            raise error("UserEmpty")
        if author.revision < self.revision:
            raise error("AuthOldRevision")
        if author.name not in self.users:
            raise error("PermissionDenied")

    def _check_keys(self, author: Author | None, method: str, request: Any) -> None:
        self._known(author)
        if method == "KV.Range":
            self._may(author, READ, request.key, request.range_end)
        elif method == "KV.Put":
            self._may(author, WRITE, request.key)
            if request.prev_kv:
                self._may(author, READ, request.key)
        elif method == "KV.DeleteRange":
            self._may(author, WRITE, request.key, request.range_end)
            if request.prev_kv:
                self._may(author, READ, request.key, request.range_end)
        else:
            for compare in request.compare:
                self._may(author, READ, compare.key, compare.range_end)
            for name, part in parts(request):
                self._check_keys(author, name, part)

    def _check_leases(
        self,
        author: Author | None,
        method: str,
        request: Any,
        keys_of: Callable[[int], list[bytes]],
    ) -> None:
        leases = set(leases_of(method, request))
        if leases:
            self._known(author)
        for lease_id in leases:
            for key in keys_of(lease_id):
                self._may(author, WRITE, key)

    def _roles_of(self, author: Author | None) -> frozenset[str]:
        user = None if author is None else self.users.get(author.name)
        return frozenset() if user is None else user.roles

    def _may(self, author: Author | None, kind: int, key: bytes, range_end: bytes = b"") -> None:
        if not self.may(author, kind, key, range_end):
            raise error("PermissionDenied")

    def may(self, author: Author | None, kind: int, key: bytes, range_end: bytes = b"") -> bool:
        """Whether the user may read or write all these keys: at each point of the range where a
        permission begins or ends, some permission goes on."""
        roles = self._roles_of(author)
        if ROOT in roles:
            return True
        granted = [
            _interval(*place)
            for role in roles
            for place, permitted in self.roles.get(role, {}).items()
            if permitted in (kind, READWRITE)
        ]
        start, end = _interval(key, range_end)
        points = {start}
        for low, high in granted:
            points.update(
                point
                for point in (low, high)
                if point is not None and point > start and (end is None or point < end)
            )
        return all(
            any(low <= point and (high is None or point < high) for low, high in granted)
            for point in points
        )

    # Changes: requests of the log. Each raises EtcdError, and then nothing has changed.

    def apply(self, method: str, request: Any, author: Author | None) -> None:
        self.APPLY[method](self, request, author)

    def _enable(self, request: Any, author: Author | None) -> None:
        if self.enabled:
            return
        if ROOT not in self.users:
            raise error("RootUserNotExist")
        if ROOT not in self.users[ROOT].roles:
            raise error("RootRoleNotExist")
        self.enabled = True

    def _disable(self, request: Any, author: Author | None) -> None:
        if self.enabled:
            self.enabled = False
            self.revision += 1

    def _set_key(self, request: Any, author: Author | None) -> None:
        if not self.enabled:
            self.key = request.seed

    def _rotate_key(self, request: Any, author: Author | None) -> None:
        self.key = request.seed
        self.revision += 1

    def _add_user(self, request: Any, author: Author | None) -> None:
        if not request.name:
            raise error("UserEmpty")
        if request.name in self.users:
            raise error("UserAlreadyExist")
        has_password = not (request.options is not None and request.options.no_password)
        stored = base64.b64decode(request.hashedPassword) if has_password else b""
        self.users[request.name] = User(stored, has_password, self.revision + 1)
        self.revision += 1

    def _delete_user(self, request: Any, author: Author | None) -> None:
        if self.enabled and request.name == ROOT:
            raise error("InvalidAuthMgmt")
        self._existing(request.name)
        del self.users[request.name]
        self.revision += 1

    def _change_password(self, request: Any, author: Author | None) -> None:
        user = self._existing(request.name)
        self.revision += 1
        stored = base64.b64decode(request.hashedPassword) if user.has_password else b""
        self.users[request.name] = replace(user, password=stored, since=self.revision)

    def _grant_role(self, request: Any, author: Author | None) -> None:
        user = self._existing(request.user)
        if request.role != ROOT and request.role not in self.roles:
            raise error("RoleNotFound")
        if request.role not in user.roles:
            self.users[request.user] = replace(user, roles=user.roles | {request.role})
            self.revision += 1

    def _revoke_role(self, request: Any, author: Author | None) -> None:
        if self.enabled and request.name == ROOT and request.role == ROOT:
            raise error("InvalidAuthMgmt")
        user = self._existing(request.name)
        if request.role not in user.roles:
            raise error("RoleNotGranted")
        self.users[request.name] = replace(user, roles=user.roles - {request.role})
        self.revision += 1

    def _add_role(self, request: Any, author: Author | None) -> None:
        if not request.name:
            raise error("RoleEmpty")
        if request.name in self.roles:
            raise error("RoleAlreadyExist")
        self.roles[request.name] = {}
        self.revision += 1

    def _delete_role(self, request: Any, author: Author | None) -> None:
        if self.enabled and request.role == ROOT:
            raise error("InvalidAuthMgmt")
        if request.role not in self.roles:
            raise error("RoleNotFound")
        del self.roles[request.role]
        for name, user in self.users.items():
            self.users[name] = replace(user, roles=user.roles - {request.role})
        self.revision += 1

    def _grant_permission(self, request: Any, author: Author | None) -> None:
        permission = request.perm
        if permission is None:
            raise error("PermissionNotGiven")
        key, range_end = permission.key, permission.range_end
        if not key or (range_end not in (b"", b"\0") and key >= range_end):
            raise error("InvalidAuthMgmt")
        if request.name not in self.roles:
            raise error("RoleNotFound")
        self.roles[request.name][key, range_end] = permission.permType
        self.revision += 1

    def _revoke_permission(self, request: Any, author: Author | None) -> None:
        if request.role not in self.roles:
            raise error("RoleNotFound")
        if (request.key, request.range_end) not in self.roles[request.role]:
            raise error("PermissionNotGranted")
        del self.roles[request.role][request.key, request.range_end]
        self.revision += 1

    def _existing(self, name: str) -> User:
        if name not in self.users:
            raise error("UserNotFound")
        return self.users[name]

    APPLY = {
        "Auth.AuthEnable": _enable,
        "Auth.AuthDisable": _disable,
        "Auth.UserAdd": _add_user,
        "Auth.UserDelete": _delete_user,
        "Auth.UserChangePassword": _change_password,
        "Auth.UserGrantRole": _grant_role,
        "Auth.UserRevokeRole": _revoke_role,
        "Auth.RoleAdd": _add_role,
        "Auth.RoleDelete": _delete_role,
        "Auth.RoleGrantPermission": _grant_permission,
        "Auth.RoleRevokePermission": _revoke_permission,
        "Auth.RotateKey": _rotate_key,
        "Log.TokenKey": _set_key,
    }

    # Reads.

    def read(self, method: str, request: Any) -> Any:
        """The response to a read of users and roles, as `comparable`. Raises EtcdError."""
        if method == "Auth.AuthStatus":
            return proto.AuthStatusResponse(enabled=self.enabled, authRevision=self.revision)
        if method == "Auth.UserList":
            return proto.AuthUserListResponse(users=sorted(self.users))
        if method == "Auth.RoleList":
            return proto.AuthRoleListResponse(roles=sorted(self.roles))
        if method == "Auth.UserGet":
            return proto.AuthUserGetResponse(roles=sorted(self._existing(request.name).roles))
        if request.role not in self.roles:
            raise error("RoleNotFound")
        return self.roles[request.role]

    # What a member has.

    def text(self) -> str:
        """All of it, to compare."""
        users = {
            name: (user.password, user.has_password, user.since, sorted(user.roles))
            for name, user in sorted(self.users.items())
        }
        roles = {name: sorted(places.items()) for name, places in sorted(self.roles.items())}
        return f"{self.enabled} {self.revision} {self.key.hex()} {users} {roles}"


def text_of(auth: Any) -> str:
    """The same of a member's `Auth`: what it has in memory, and its records."""
    users = {}
    for name in auth.users():
        user = auth.user(name)
        has_password = not (user.options is not None and user.options.no_password)
        users[name] = (user.password, has_password, auth.since.get(name), sorted(user.roles))
    roles = {
        name: sorted(
            ((p.key, p.range_end), p.permType)
            for p in map(proto.Permission.decode, auth.permissions(name))
        )
        for name in auth.roles()
    }
    return f"{auth.enabled} {auth.revision} {auth.key.hex()} {users} {roles}"


def comparable(method: str, response: Any) -> Any:
    """A response without its header; of RoleGet the permissions, as the order is open."""
    if method == "Auth.RoleGet":
        return {(p.key, p.range_end): p.permType for p in response.perm}
    return type(response)(**{f.name: v for f, v in response.present() if f.name != "header"})


def parts(request: Any) -> Iterator[tuple[str, Any]]:
    """The operations of both branches of a transaction, each with the name of its method."""
    for op in (*request.success, *request.failure):
        if op.request_put is not None:
            yield "KV.Put", op.request_put
        elif op.request_range is not None:
            yield "KV.Range", op.request_range
        elif op.request_delete_range is not None:
            yield "KV.DeleteRange", op.request_delete_range
        elif op.request_txn is not None:
            yield "KV.Txn", op.request_txn


def leases_of(method: str, request: Any) -> Iterator[int]:
    """The leases whose keys a write concerns."""
    if method == "KV.Put" and request.lease:
        yield request.lease
    elif method == "Lease.LeaseRevoke":
        yield request.ID
    elif method == "KV.Txn":
        for name, part in parts(request):
            yield from leases_of(name, part)


def _interval(key: bytes, range_end: bytes) -> tuple[bytes, bytes | None]:
    """None: no upper bound."""
    if not range_end:
        return key, key + b"\0"
    return key, None if range_end == b"\0" else range_end


def hashed(password: str, salt: bytes) -> bytes:
    """What stands for the hash of a password: it looks like one of argon2id."""
    digest = hashlib.blake2b(salt + password.encode(), digest_size=16).hexdigest()
    return b"$argon2id$v=19$m=8,t=1,p=1$%s$%s" % (salt, digest.encode())


def is_right(password: str, stored: bytes) -> bool:
    """Whether `stored` is such a hash of the password."""
    salt = stored.split(b"$")[4] if stored.count(b"$") == 5 else b""
    return stored == hashed(password, salt)


class Token:
    """What a client was given for a password."""

    def __init__(self, text: str) -> None:
        content = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))[:-64]
        self.text = text
        self.keys: frozenset[bytes] = frozenset()
        """One of them signed it."""
        self.revision = int.from_bytes(content[1:9], "big")
        self.ends = int.from_bytes(content[9:17], "big")
        self.name = content[17:].decode()

    def is_valid(self, auth: PlainAuth) -> bool:
        """As far as it does not depend on the time."""
        user = auth.users.get(self.name)
        return (
            user is not None
            and user.since <= self.revision <= auth.revision
            and auth.key in self.keys
        )


class Certificate:
    """A client's certificate names the user."""

    ends = 1 << 62

    def __init__(self, name: str) -> None:
        self.name = name

    def is_valid(self, auth: PlainAuth) -> bool:
        return True


@dataclass
class Version:
    index: int
    """The entry that led to it."""
    revision: int
    """The store's revision then."""
    auth: PlainAuth


class History:
    """All states of users and roles."""

    def __init__(self) -> None:
        self.versions = [Version(0, 0, PlainAuth())]

    @property
    def now(self) -> PlainAuth:
        return self.versions[-1].auth

    @property
    def latest(self) -> int:
        """The number of the present version."""
        return len(self.versions) - 1

    def apply(
        self, index: int, revision: int, method: str, request: Any, author: Author | None
    ) -> None:
        """Carry out a request of entry `index`. Raises EtcdError."""
        draft = self.now.draft()
        draft.apply(method, request, author)
        if draft != self.now:
            self.versions.append(Version(index, revision, draft))

    def number_at(self, index: int) -> int:
        """The number of the version after entry `index`."""
        return bisect_right(self.versions, index, key=lambda version: version.index) - 1

    def of_auth_revision(self, revision: int) -> list[PlainAuth]:
        """The states that had this auth revision."""
        versions = self.versions
        first = bisect_left(versions, revision, key=lambda version: version.auth.revision)
        last = bisect_right(versions, revision, key=lambda version: version.auth.revision)
        return [version.auth for version in versions[first:last]]

    def of_revision(self, revision: int) -> range:
        """The numbers of the versions that there were at this revision of the store."""
        versions = self.versions
        last = bisect_right(versions, revision, key=lambda version: version.revision) - 1
        first = last
        while first > 0 and versions[first].revision == revision:
            first -= 1
        return range(max(0, first), last + 1)
