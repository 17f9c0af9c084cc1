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

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from etcdlite import txn
from etcdlite.errors import INVALID_ARGUMENT, EtcdError, error
from etcdlite.lease import MAX_TTL_S, NO_LEASE
from etcdlite.methods import (
    Route,
    by_number,
    numbers,
)
from etcdlite.proto import MAX_REQUEST_ITEMS

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
    if request.ID <= NO_LEASE:
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
        "Log.Publish": check_member,
        "Log.MemberChange": _check_member_change,
        "Log.Checkpoint": _check_checkpoint,
    },
)
"""By method. Each raises EtcdError."""
