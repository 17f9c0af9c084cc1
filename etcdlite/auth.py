"""Users, roles and permissions: the part of the replicated state that says who may do what.

`Auth` is the auth store of etcd (`server/auth/store.go`), with its rules, texts and messages. Its
methods are of two kinds. Those that change it carry out a request of the log, on every member.
Those that check decide whether an `Author` may do what a request asks for. They depend on nothing
but the state and the request, so every member decides the same when it applies the request. The
member that a client talks to decides the same way before it proposes (`replica/access.py`).

A user may do what its roles permit together (`rights.py`). The user who has the role `root` may do
everything. The role `root` need not exist.

The auth revision counts the changes, and is bumped exactly when etcd bumps it: with every change
except `enable`, and except `set_key` and `rehash`, which etcd does not have. A request that was
prepared under an older revision is refused with AuthOldRevision, because what its author was
permitted may have changed; its member then checks and proposes it again.

Invariants: a request fails before its first change or is carried out completely. No password is
here, only hashes (`passwords.py`). While auth is enabled, the user root exists and has the role
root.

Records, in three buckets of the data file (`storage/layout.py`):

    AUTH       "enabled"        b"\\1" or b"\\0"; absent: not enabled
               "revision"       the auth revision, u64 big-endian; absent: 1
               "key"            the Ed25519 seed that signs tokens, 32 bytes
               "since/" + name  the auth revision, u64 big-endian, at which the user got its
                                password; absent: 0. Tokens of earlier revisions are not valid.
    AUTH_USER  name             authpb.User, roles sorted
    AUTH_ROLE  name             authpb.Role, permissions sorted by key
"""

from __future__ import annotations

import base64
from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple
from zlib import crc32

from sortedcontainers import SortedSet

from etcdlite import log, proto
from etcdlite.errors import INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNAVAILABLE, EtcdError, error
from etcdlite.methods import COMPACT, ROWS, Permission
from etcdlite.mvcc import Store
from etcdlite.plain_txn import GET, PlainTxn
from etcdlite.rights import EVERYTHING, ROOT, KeySet, Rights, rights_steps
from etcdlite.storage.layout import AUTH, AUTH_ROLE, AUTH_USER

MAX_NAME_BYTES = 4096
"""The longest name of a user or a role, in UTF-8."""

MAX_RECORD_BYTES = 64 << 10
"""The largest record of a user or a role: about 2,000 permissions."""

MAX_AUTH_BYTES = 16 << 20
RECORD_BYTES = 1024
"""All users and roles together, counted as their records plus `RECORD_BYTES` each: at most 16,384
of them."""

SEED_BYTES = 32

USERS_PER_STEP = 64
"""Users that one step may change."""

_ENABLED = b"enabled"
_REVISION = b"revision"
_KEY = b"key"
_SINCE = b"since/"


class Author(NamedTuple):
    """The user who makes a request."""

    name: str
    revision: int
    """The auth revision under which the request was prepared."""
    is_member: bool = False
    """A member made the request itself, and may do everything."""


OWN = Author("", 0, True)
"""The author of what a member asks for itself."""


class RightsUnknown(EtcdError):
    """The rights of the author are not known yet; `Auth.learn_steps` computes them."""

    def __init__(self, author: Author) -> None:
        super().__init__(UNAVAILABLE, "etcdlite: your permissions are being read; try again")
        self.author = author


class Auth:
    """The users and roles of a store."""

    def __init__(self, store: Store) -> None:
        self.author: Author | None = None
        """The user whose request is applied now; None if the entry names no user."""
        self.known_rights: dict[str, Rights | None] = {}
        """By user, computed when needed. None for a user that does not exist."""
        self._learning: dict[str, Generator[None, None, None]] = {}
        """By user: the generator that computes the rights, between two steps."""
        self.restore(store)

    def restore(self, store: Store) -> None:
        """Take the users and roles of a store. Raises DecodeError if a record is none."""
        self._store = store
        self.enabled = False
        """Whether requests are checked. The hot paths read this."""
        settings = store.buckets.get(AUTH, {})
        self.revision = int.from_bytes(settings.get(_REVISION, b"\1"), "big")
        self.key = settings.get(_KEY, b"")
        """The seed that signs tokens; empty before auth is enabled for the first time."""
        self.since = {
            name[len(_SINCE) :].decode(): int.from_bytes(value, "big")
            for name, value in settings.items()
            if name.startswith(_SINCE)
        }
        """By user: tokens of earlier auth revisions are not valid."""
        for user in store.buckets.get(AUTH_USER, ()):
            self.since.setdefault(user.decode(), 0)
        self._ring = SortedSet(self.since, key=lambda user: crc32(user.encode()))
        self._forget()
        self._size_bytes = 0
        for bucket, decode in ((AUTH_USER, proto.User.decode), (AUTH_ROLE, proto.Role.decode)):
            for name, record in store.buckets.get(bucket, {}).items():
                decode(record)
                self._size_bytes += len(name) + len(record) + RECORD_BYTES
        self.enabled = settings.get(_ENABLED) == b"\1"

    # Who may do what.

    def rights(self, author: Author | None) -> Rights:
        """What the author of a request may do. Raises UserEmpty, AuthOldRevision, RightsUnknown,
        and PermissionDenied for a user that does not exist."""
        if author is None or not author.revision:
            raise error("UserEmpty")
        if author.revision < self.revision:
            raise error("AuthOldRevision")
        if author.name not in self.known_rights:
            for _ in self.learn_steps(author):  # Few permissions take no second step.
                raise RightsUnknown(author)
        rights = self.known_rights[author.name]
        if rights is None:
            raise error("PermissionDenied")
        return rights

    def writable(self, author: Author | None) -> KeySet:
        """The keys that the author of a request may write. Raises as `rights`."""
        if author is not None and author.is_member:
            return EVERYTHING
        return self.rights(author).write

    def learn_steps(self, author: Author | None) -> Generator[None, None, None]:
        """Compute the rights of the author, so that no check raises RightsUnknown until users or
        roles change. In steps; all that wait for the same user share one computation."""
        while not (author is None or author.is_member or author.name in self.known_rights):
            steps = self._learning.pop(author.name, None) or self._learn_steps(author.name)
            for _ in steps:
                self._learning[author.name] = steps  # Not if it failed: it has no more steps.
                yield
                break

    def _learn_steps(self, name: str) -> Generator[None, None, None]:
        user, rights = self.user(name), None
        if user is not None:
            roles = self._store.buckets.get(AUTH_ROLE, {})
            records = [roles[role.encode()] for role in user.roles if role.encode() in roles]
            rights = yield from rights_steps(frozenset(user.roles), records)
        if len(self.known_rights) >= MAX_AUTH_BYTES // RECORD_BYTES:
            self.known_rights.clear()  # Names that do not exist come from certificates.
        self.known_rights[name] = rights

    def check(
        self, author: Author | None, method: int, request: Any, is_applied: bool = False
    ) -> None:
        """Raise the EtcdError that refuses a request to its author, as far as it does not depend on
        the keys of leases (`lease_rights.py`). `is_applied`: the request is in the log."""
        # Compact needs the role root only where it is received, as in etcd: members that run an
        # earlier program, which only wants a user, must agree on what is applied.
        check = _check_user if is_applied and method == COMPACT else CHECKS[method]
        if check is not None and (author is None or not author.is_member):
            check(self, author, request)

    # What is there.

    def user(self, name: str) -> proto.User | None:
        record = self._store.buckets.get(AUTH_USER, {}).get(name.encode())
        return None if record is None else proto.User.decode(record)

    def decoy(self, name: str) -> bytes:
        """The hash of an existing user's password, if there is one, for a name that has none. Which
        user it is depends on the name in a way that clients do not know, and changes for few names
        when users come and go. It takes no time that tells. (`_ring`: all users, shuffled.)"""
        at = self._ring.bisect_key_left(crc32(self.key + name.encode()))
        user = self.user(self._ring[at % len(self._ring)]) if self._ring else None
        return b"" if user is None else user.password

    def users(self) -> list[str]:
        """All names, sorted."""
        return [name.decode() for name in sorted(self._store.buckets.get(AUTH_USER, ()))]

    def roles(self) -> list[str]:
        """All names, sorted."""
        return [name.decode() for name in sorted(self._store.buckets.get(AUTH_ROLE, ()))]

    # Changes: each carries out a request of the log.

    def enable(self, request: proto.AuthEnableRequest) -> None:
        if self.enabled:
            return
        root = self.user(ROOT)
        if root is None:
            raise error("RootUserNotExist")
        if ROOT not in root.roles:
            raise error("RootRoleNotExist")
        if not self.key:
            raise EtcdError(
                INVALID_ARGUMENT, "etcdlite: there is no key that signs tokens; enable auth again"
            )
        self._set(_ENABLED, b"\1")
        self.enabled = True
        log.info("enabled authentication")

    def disable(self, request: proto.AuthDisableRequest) -> None:
        if not self.enabled:
            return
        self._set(_ENABLED, b"\0")
        self.enabled = False
        self._commit()
        log.info("disabled authentication")

    def set_key(self, request: proto.TokenKey) -> None:
        """Take a new key for tokens, for when auth is enabled next. Does nothing if it is, unless
        the users came without a key, with a backup of etcd."""
        if not (self.enabled and self.key):
            self.key = request.seed
            self._set(_KEY, self.key)

    def rotate_key(self, request: proto.AuthRotateKeyRequest) -> None:
        """Take a new key for tokens: those of the old key are not valid any more."""
        self.key = request.seed
        self._set(_KEY, self.key)
        self._commit()

    def add_user(self, request: proto.AuthUserAddRequest) -> None:
        name = request.name
        if not name:
            raise error("UserEmpty")
        if self.user(name) is not None:
            raise error("UserAlreadyExist")
        has_password = request.options is None or not request.options.no_password
        user = proto.User(
            name=name.encode(),
            password=base64.b64decode(request.hashedPassword) if has_password else b"",
            options=proto.UserAddOptions(no_password=not has_password),
        )
        self._put(AUTH_USER, name, user)
        self._commit()
        self._set_since(name)
        log.info("added a user", user_name=name)

    def delete_user(self, request: proto.AuthUserDeleteRequest) -> None:
        name = request.name
        if self.enabled and name == ROOT:
            raise error("InvalidAuthMgmt")
        self.existing_user(name)
        self._put(AUTH_USER, name, None)
        self._set(_SINCE + name.encode(), None)
        self.since.pop(name, None)
        self._ring.discard(name)
        self._commit()
        log.info("deleted a user", user_name=name)

    def change_password(self, request: proto.AuthUserChangePasswordRequest) -> None:
        user = self.existing_user(request.name)
        if user.options is None or not user.options.no_password:
            user.password = base64.b64decode(request.hashedPassword)
        self._put(AUTH_USER, request.name, user)
        self._commit()
        self._set_since(request.name)
        log.info("changed a password of a user", user_name=request.name)

    def rehash(self, request: proto.Rehash) -> None:
        """Replace the hash of a password by another one of the same password, if it is still the
        one. Tokens stay valid."""
        user = self.user(request.name)
        if user is not None and user.password == request.old:
            user.password = request.new
            self._put(AUTH_USER, request.name, user)

    def grant_role(self, request: proto.AuthUserGrantRoleRequest) -> None:
        user = self.existing_user(request.user)
        if request.role != ROOT:
            self.permissions(request.role)
        if request.role in user.roles:
            return
        user.roles = sorted([*user.roles, request.role], key=str.encode)
        self._put(AUTH_USER, request.user, user)
        self._commit()

    def revoke_role(self, request: proto.AuthUserRevokeRoleRequest) -> None:
        if self.enabled and request.name == ROOT and request.role == ROOT:
            raise error("InvalidAuthMgmt")
        user = self.existing_user(request.name)
        if request.role not in user.roles:
            raise error("RoleNotGranted")
        user.roles = [role for role in user.roles if role != request.role]
        self._put(AUTH_USER, request.name, user)
        self._commit()

    def add_role(self, request: proto.AuthRoleAddRequest) -> None:
        if not request.name:
            raise error("RoleEmpty")
        if request.name.encode() in self._store.buckets.get(AUTH_ROLE, {}):
            raise error("RoleAlreadyExist")
        self._put_role(request.name, [])

    def delete_role(self, request: proto.AuthRoleDeleteRequest) -> Generator[None, None, None]:
        """In steps, because all users may have the role."""
        if self.enabled and request.role == ROOT:
            raise error("InvalidAuthMgmt")
        self.permissions(request.role)
        self._put(AUTH_ROLE, request.role, None)
        name = request.role.encode()
        users = list(self._store.buckets.get(AUTH_USER, {}).items())
        for count, (user_name, record) in enumerate(users, 1):
            if count % USERS_PER_STEP == 0:
                yield
            if name in record:
                user = proto.User.decode(record)
                if request.role in user.roles:
                    user.roles = [role for role in user.roles if role != request.role]
                    self._put(AUTH_USER, user_name.decode(), user)
        self._commit()

    def grant_permission(self, request: proto.AuthRoleGrantPermissionRequest) -> None:
        permission = request.perm
        if permission is None:
            raise error("PermissionNotGiven")
        key, end = permission.key, permission.range_end
        if not key or (end not in (b"", b"\0") and key >= end):
            raise error("InvalidAuthMgmt")
        granted = self.permissions(request.name)
        decode = proto.Permission.decode
        at = bisect_left(granted, key, key=lambda each: decode(each).key)
        while at < len(granted) and (other := decode(granted[at])).key == key:
            if other.range_end == end:
                del granted[at]
                break
            at += 1
        granted.insert(at, permission.encode())
        self._put_role(request.name, granted)

    def revoke_permission(self, request: proto.AuthRoleRevokePermissionRequest) -> None:
        granted = self.permissions(request.role)
        decode, range_of = proto.Permission.decode, attrgetter("key", "range_end")
        left = [each for each in granted if range_of(decode(each)) != range_of(request)]
        if len(left) == len(granted):
            raise error("PermissionNotGranted")
        self._put_role(request.role, left)

    def _put_role(self, name: str, permissions: Sequence[Any]) -> None:
        self._put(AUTH_ROLE, name, proto.Role(name=name.encode(), keyPermission=permissions))
        self._commit()

    def existing_user(self, name: str) -> proto.User:
        """Raises UserNotFound."""
        if (user := self.user(name)) is None:
            raise error("UserNotFound")
        return user

    def permissions(self, role: str) -> list[Any]:
        """The permissions of a role by key, encoded: there may be 2,000. Raises RoleNotFound."""
        record = self._store.buckets.get(AUTH_ROLE, {}).get(role.encode())
        if record is None:
            raise error("RoleNotFound")
        found, at = [], 0
        while at < len(record):
            is_permission = record[at] >> 3 == 2
            size, at = proto.read_varint(record, at + 1, len(record))
            if is_permission:
                found.append(record[at : at + size])
            at += size
        return found

    def _put(self, bucket: int, name: str, message: proto.User | proto.Role | None) -> None:
        """Set or remove a record. Raises EtcdError if it is too large, or if all are; call it
        before any other change."""
        key = name.encode()
        old = self._store.buckets.get(bucket, {}).get(key)
        record = None if message is None else message.encode()
        grown = 0 if old is None else -len(key) - len(old) - RECORD_BYTES
        if record is not None:
            grown += len(key) + len(record) + RECORD_BYTES
            if len(record) > MAX_RECORD_BYTES:
                what = "user" if bucket == AUTH_USER else "role"
                raise EtcdError(
                    RESOURCE_EXHAUSTED,
                    f"etcdlite: the {what} would take more than {MAX_RECORD_BYTES} bytes; give "
                    "a user several roles instead",
                )
            if grown > 0 and self._size_bytes + grown > MAX_AUTH_BYTES:
                raise EtcdError(
                    RESOURCE_EXHAUSTED,
                    f"etcdlite: users and roles would take more than {MAX_AUTH_BYTES} bytes; "
                    "delete those that are not needed",
                )
        self._size_bytes += grown
        self._store.set_bucket(bucket, key, record)

    def _set(self, key: bytes, value: bytes | None) -> None:
        self._store.set_bucket(AUTH, key, value)

    def _set_since(self, name: str) -> None:
        self.since[name] = self.revision
        self._ring.add(name)
        self._set(_SINCE + name.encode(), self.revision.to_bytes(8, "big"))

    def _commit(self) -> None:
        """Bump the auth revision."""
        self.revision += 1
        self._set(_REVISION, self.revision.to_bytes(8, "big"))
        self._forget()

    def _forget(self) -> None:
        """Users and roles changed, so what is remembered may be wrong now."""
        self.known_rights.clear()
        self._learning.clear()


# Checks, by method. Each raises EtcdError.

_Check = Callable[[Auth, "Author | None", Any], None]


def _check_put(auth: Auth, author: Author | None, request: Any) -> None:
    rights = auth.rights(author)
    rights.check_write(request.key)
    if request.prev_kv:
        rights.check_read(request.key)


def _check_range(auth: Auth, author: Author | None, request: Any) -> None:
    auth.rights(author).check_read(request.key, request.range_end)


def _check_delete_range(auth: Auth, author: Author | None, request: Any) -> None:
    rights = auth.rights(author)
    rights.check_write(request.key, request.range_end)
    if request.prev_kv:
        rights.check_read(request.key, request.range_end)


def _check_txn(auth: Auth, author: Author | None, request: Any) -> None:
    """Both branches count, whichever will be carried out; so do nested transactions, and the
    previous values of puts."""
    rights = auth.rights(author)
    if rights.is_root:
        return
    if isinstance(request, PlainTxn):
        # The same checks as below, without making the messages.
        for key, *_ in request.compares:
            rights.check_read(key)
        for branch in request.branches:
            if isinstance(branch, tuple):
                (rights.check_read if branch[0] == GET else rights.check_write)(branch[1])
        for key, *_ in request.puts:
            rights.check_write(key)
        return
    for compare in request.compare:
        _check_range(auth, author, compare)
    for op in (*request.success, *request.failure):
        if op.request_put is not None:
            _check_put(auth, author, op.request_put)
        elif op.request_range is not None:
            _check_range(auth, author, op.request_range)
        elif op.request_delete_range is not None:
            _check_delete_range(auth, author, op.request_delete_range)
        elif op.request_txn is not None:
            _check_txn(auth, author, op.request_txn)


def _check_user(auth: Auth, author: Author | None, request: Any) -> None:
    if author is None or not author.name:
        raise error("UserEmpty")
    if author.name not in auth.since:
        raise error("PermissionDenied")


def _check_root(auth: Auth, author: Author | None, request: Any) -> None:
    if author is None or not author.name:
        raise error("UserEmpty")
    if ROOT not in auth.existing_user(author.name).roles:
        raise error("PermissionDenied")


def _check_alarm(auth: Auth, author: Author | None, request: Any) -> None:
    """Every user may read the alarms."""
    check = _check_user if request.action == proto.AlarmRequest.GET else _check_root
    check(auth, author, request)


def _check_own_user(auth: Auth, author: Author | None, request: Any) -> None:
    if author is None or author.name != request.name:
        _check_root(auth, author, request)


def _check_own_role(auth: Auth, author: Author | None, request: Any) -> None:
    user = None if author is None else auth.user(author.name)
    if user is None or request.role not in user.roles:
        _check_root(auth, author, request)


def _check_watch(auth: Auth, author: Author | None, request: Any) -> None:
    """`request` is a WatchCreateRequest. Its range end b"\0" must reach the check as it is: a
    watch from a key on needs more than that key (etcd advisory GHSA-xg4h-6gfc-h4m8)."""
    auth.rights(author).check_read(request.key or b"\0", request.range_end)


_BY_PERMISSION: dict[Permission, _Check | None] = {
    Permission.ANYONE: None,
    Permission.MEMBER: None,
    # Of the calls that read and write keys by requests of their own, such as Lock.
    Permission.KEYS: _check_user,
    Permission.USER: _check_user,
    Permission.LEASE: _check_user,
    Permission.ALARM: _check_alarm,
    Permission.ROOT: _check_root,
}

_BY_METHOD: dict[str, _Check] = {
    "KV.Put": _check_put,
    "KV.Range": _check_range,
    "KV.DeleteRange": _check_delete_range,
    "KV.Txn": _check_txn,
    "Watch.Watch": _check_watch,
    "Auth.UserGet": _check_own_user,
    "Auth.RoleGet": _check_own_role,
}

CHECKS: dict[int, _Check | None] = {
    row.number: _BY_METHOD.get(row.full) or _BY_PERMISSION[row.permission] for row in ROWS
}
"""By method; None if it needs no author."""
