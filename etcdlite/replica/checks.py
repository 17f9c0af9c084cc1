"""What a valid write is, method by method, as far as the request alone can tell.

An entry of the log that cannot be applied would stop every member at every start. So a request is
checked by these functions before it is proposed (`wire/api.py`, together with the configured
limits), when another member forwards it, and when an entry is decoded from its bytes. An invalid
request in an entry has no effect.

Invariant: the verdict depends on nothing but the request: not on the state, the clock or the
configuration. So it is the same on every member, and after every restart. A rule may become
stricter only for requests that had no effect before.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from etcdlite import passwords, txn
from etcdlite.auth import MAX_NAME_BYTES, MAX_RECORD_BYTES, SEED_BYTES
from etcdlite.errors import INVALID_ARGUMENT, EtcdError, error
from etcdlite.lease import MAX_TTL_S
from etcdlite.methods import Route, by_number, numbers
from etcdlite.proto import MAX_REQUEST_ITEMS
from etcdlite.versions import parse

MAX_MEMBER_BYTES = 64 << 10
"""The name and URLs of a member, encoded."""

MAX_CHECKPOINTS = 10_000
"""Leases in one checkpoint. They are applied in one slice."""

MEMBER_ACTIONS = range(4)
ADD, REMOVE, UPDATE, PROMOTE = MEMBER_ACTIONS
"""The actions of a `MemberChange`."""


def check(method: int, request: Any) -> None:
    """Raise the EtcdError that says why a request must not be in the log."""
    CHECKS[method](request)


def check_txn(request: Any) -> None:
    """Raises EtcdError unless it is a valid transaction that may write."""
    txn.check_txn(request, MAX_REQUEST_ITEMS)
    if txn.is_read_only(request):
        raise _invalid("a transaction that only reads does not belong into the log")


def _check_nothing(request: Any) -> None:
    """What these requests ask for depends on the state, or is ignored if it is unknown."""


def _check_lease_grant(request: Any) -> None:
    if request.ID == 0:
        raise error("LeaseNotFound")
    if request.TTL > MAX_TTL_S:
        raise error("LeaseTTLTooLarge")


def _check_checkpoint(request: Any) -> None:
    if len(request.checkpoints) > MAX_CHECKPOINTS:
        raise _invalid(f"a checkpoint of more than {MAX_CHECKPOINTS} leases")
    for checkpoint in request.checkpoints:
        if not 0 <= checkpoint.remaining_TTL <= MAX_TTL_S:
            raise _invalid(f"a lease with {checkpoint.remaining_TTL} seconds left")


def check_member(member: Any) -> None:
    """Raises EtcdError unless these can be the attributes of a member."""
    if member.ID == 0:
        raise error("MemberNotFound")
    size_bytes = len(member.name.encode()) + sum(
        len(url.encode()) + 8 for url in (*member.peerURLs, *member.clientURLs)
    )
    if size_bytes > MAX_MEMBER_BYTES:
        raise _invalid(f"the name and URLs of a member take more than {MAX_MEMBER_BYTES} bytes")


def _check_member_change(change: Any) -> None:
    if change.action not in MEMBER_ACTIONS or change.member is None:
        raise _invalid(f"a membership change with action {change.action}")
    check_member(change.member)
    if change.action in (ADD, UPDATE):
        check_peer_urls(change.member.peerURLs)


def check_peer_urls(urls: list[str]) -> None:
    """Raise MemberBadURLs unless these can be a member's peer URLs."""
    if not urls or not all(map(_is_peer_url, urls)):
        raise error("MemberBadURLs")


def _is_peer_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        has_port = parts.port is not None
    except ValueError:
        return False
    return (
        parts.scheme in ("http", "https") and bool(parts.hostname) and has_port and not parts.path
    )


def _check_token_key(request: Any) -> None:
    if len(request.seed) != SEED_BYTES:
        raise _invalid(f"a key for tokens has {SEED_BYTES} bytes")


def _check_rehash(request: Any) -> None:
    _check_name(request.name)
    if not passwords.is_hash(request.new):
        raise _invalid("this is not the hash of a password")


def _check_cluster_version(request: Any) -> None:
    for text in (request.version, request.target, request.old_version, request.old_target):
        try:
            _ = text and parse(text)
        except ValueError as why:
            raise _invalid(str(why)) from None
    if not (request.version and request.old_version):
        raise _invalid("a cluster version is missing")


def check_user_add(request: Any) -> None:
    """Raises EtcdError unless it is a valid request to add a user, with a hash instead of the
    password."""
    _check_name(request.name)
    if request.options is None or not request.options.no_password:
        _check_hashed(request)
    elif request.password:
        raise _invalid("a user without a password has none")


def check_change_password(request: Any) -> None:
    """As `check_user_add`. As in etcd, without a hash nobody can log in as the user any more."""
    _check_name(request.name)
    if request.password or request.hashedPassword:
        _check_hashed(request)


def _check_hashed(request: Any) -> None:
    if request.password:
        raise _invalid("a password does not belong into the log")
    try:
        stored = base64.b64decode(request.hashedPassword, validate=True)
    except (binascii.Error, ValueError):
        stored = b""
    if not passwords.is_hash(stored):
        raise _invalid(
            "hashedPassword must be the base64 of an argon2id or bcrypt hash of an affordable cost"
        )


def _check_time(request: Any) -> None:
    if not 0 <= request.unix_s < 1 << 40:
        raise _invalid(f"unix_s is {request.unix_s}")


def _check_permission(request: Any) -> None:
    permission = request.perm
    if (
        permission is not None
        and len(permission.key) + len(permission.range_end) > MAX_RECORD_BYTES
    ):
        raise _invalid(f"a permission has more than {MAX_RECORD_BYTES} bytes")


def _check_name(name: str) -> None:
    if len(name.encode()) > MAX_NAME_BYTES:
        raise _invalid(f"a name has more than {MAX_NAME_BYTES} bytes")


def _invalid(why: str) -> EtcdError:
    return EtcdError(INVALID_ARGUMENT, f"etcdlite: invalid request: {why}")


CHECKS: dict[int, Callable[[Any], None]] = by_number(
    numbers(Route.WRITE | Route.MEMBERSHIP),
    {
        "KV.Put": txn.check_put,
        "KV.DeleteRange": txn.check_delete_range,
        "KV.Txn": check_txn,
        "KV.Compact": _check_nothing,
        "Lease.LeaseGrant": _check_lease_grant,
        "Lease.LeaseRevoke": _check_nothing,
        "Maintenance.Alarm": _check_nothing,
        "Auth.AuthEnable": _check_nothing,
        "Auth.AuthDisable": _check_nothing,
        "Auth.UserAdd": check_user_add,
        "Auth.UserDelete": _check_nothing,
        "Auth.UserChangePassword": check_change_password,
        "Auth.UserGrantRole": lambda request: _check_name(request.role),
        "Auth.UserRevokeRole": _check_nothing,
        "Auth.RoleAdd": lambda request: _check_name(request.name),
        "Auth.RoleDelete": _check_nothing,
        "Auth.RoleGrantPermission": _check_permission,
        "Auth.RoleRevokePermission": _check_nothing,
        "Auth.RotateKey": _check_token_key,
        "Log.Publish": check_member,
        "Log.MemberChange": _check_member_change,
        "Log.Checkpoint": _check_checkpoint,
        "Log.Author": lambda request: _check_name(request.name),
        "Log.TokenKey": _check_token_key,
        "Log.Rehash": _check_rehash,
        "Log.ClusterVersion": _check_cluster_version,
        "Log.Time": _check_time,
    },
)
"""By method. Each raises EtcdError."""
