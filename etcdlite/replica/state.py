"""What each kind of committed request does to the state: the table `APPLIERS`.

Puts and small transactions, which are most, `member.py` applies by itself. Each function works in
slices and gives the response without its header; it raises EtcdError before any change. The same
requests in the same order must lead to the same state on every member.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from etcdlite import txn
from etcdlite.methods import PUT, Route, by_number, numbers
from etcdlite.mvcc import LEASE
from etcdlite.proto import varint
from etcdlite.replica.entry import Steps

if TYPE_CHECKING:
    from etcdlite.member import Member

DELETES_PER_STEP = 128
"""Keys of a lease deleted in a slice."""


def _delete_range(member: Member, request: Any) -> Steps:
    member.metrics.deletes += 1
    return txn.delete_range_steps(member.store, request)


def _txn(member: Member, request: Any) -> Steps:
    return txn.txn_steps(member.store, request)


def _compact(member: Member, request: Any) -> Steps:
    member.store.compact(request.revision)
    return b""
    yield


def _lease_grant(member: Member, request: Any) -> Steps:
    lessor = member.lessor
    ttl_s = lessor.grant(request.ID, request.TTL, member.clock())
    member.metrics.leases_granted += 1
    member.metrics.lease_ttl_s.observe(ttl_s)
    member.store.set_bucket(LEASE, _lease_key(request.ID), lessor.encode(request.ID))
    return b"\x10" + varint(request.ID) + b"\x18" + varint(ttl_s)
    yield


def _lease_revoke(member: Member, request: Any) -> Steps:
    keys = yield from member.lessor.key_steps(request.ID)
    for count, key in enumerate(keys, 1):
        member.store.delete(key)
        member.metrics.deletes += 1
        if count % DELETES_PER_STEP == 0:
            yield
    member.lessor.revoke(request.ID)
    member.store.set_bucket(LEASE, _lease_key(request.ID), None)
    member.metrics.leases_revoked += 1
    return b""


def _alarm(member: Member, request: Any) -> Steps:
    return member.alarms.apply(request)
    yield


def _publish(member: Member, request: Any) -> Steps:
    member.cluster.publish(request)
    return b""
    yield


def _checkpoint(member: Member, request: Any) -> Steps:
    lessor = member.lessor
    for checkpoint in request.checkpoints:
        if lessor.exists(checkpoint.ID):
            lessor.checkpoint(checkpoint.ID, checkpoint.remaining_TTL)
            member.store.set_bucket(LEASE, _lease_key(checkpoint.ID), lessor.encode(checkpoint.ID))
    return b""
    yield


def _lease_key(lease_id: int) -> bytes:
    return lease_id.to_bytes(8, "big")


APPLIERS: dict[int, Callable[[Member, Any], Steps]] = by_number(
    numbers(Route.WRITE) - {PUT},
    {
        "KV.DeleteRange": _delete_range,
        "KV.Txn": _txn,
        "KV.Compact": _compact,
        "Lease.LeaseGrant": _lease_grant,
        "Lease.LeaseRevoke": _lease_revoke,
        "Maintenance.Alarm": _alarm,
        "Log.Publish": _publish,
        "Log.Checkpoint": _checkpoint,
    },
)
