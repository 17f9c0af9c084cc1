"""The methods: how each request is checked and which way it takes through the member.

Every way in (native frames, later gRPC and JSON) ends in `handle`: one decoded request and the
frame it would have in the native protocol. Writes go through the log, reads wait for ReadIndex
unless they are serializable, the rest is answered from this member's own state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import etcdlite
from etcdlite import proto, txn
from etcdlite.errors import INVALID_ARGUMENT, UNIMPLEMENTED, EtcdError, error
from etcdlite.member import Member, Session, alarm_name, needs_space

Handler = Callable[[Member, Session, int, int, Any, bytes], None]
"""(member, session, request id, method, request, the request as a native frame)"""


def _put(
    member: Member, session: Session, request_id: int, method: int, request: Any, frame: bytes
) -> None:
    txn.check_put(request)
    _check_space(member, frame)
    member.propose(session, request_id, method, request, frame)


def _range(
    member: Member, session: Session, request_id: int, method: int, request: Any, frame: bytes
) -> None:
    txn.check_range(request)
    if request.serializable:
        member.read_now(session, request_id, method, request)
    else:
        member.read(session, request_id, method, request)


def _delete_range(
    member: Member, session: Session, request_id: int, method: int, request: Any, frame: bytes
) -> None:
    txn.check_delete_range(request)
    member.propose(session, request_id, method, request, frame)


def _txn(
    member: Member, session: Session, request_id: int, method: int, request: Any, frame: bytes
) -> None:
    txn.check_txn(request, member.max_txn_ops)
    if not txn.is_read_only(request):
        if needs_space(method, request):
            _check_space(member, frame)
        member.propose(session, request_id, method, request, frame)
    elif txn.is_serializable(request):
        member.read_now(session, request_id, method, request)
    else:
        member.read(session, request_id, method, request)


def _propose(
    member: Member, session: Session, request_id: int, method: int, request: Any, frame: bytes
) -> None:
    member.propose(session, request_id, method, request, frame)


def _read(
    member: Member, session: Session, request_id: int, method: int, request: Any, frame: bytes
) -> None:
    member.read(session, request_id, method, request)


def _read_now(
    member: Member, session: Session, request_id: int, method: int, request: Any, frame: bytes
) -> None:
    member.read_now(session, request_id, method, request)


def _lease_grant(
    member: Member, session: Session, request_id: int, method: int, request: Any, frame: bytes
) -> None:
    _check_space(member, frame)
    if request.ID == 0:
        # Drawn here, once, so that every member applies the same.
        request.ID = member.lessor.generate_id(member.rng)
        member.propose_message(session, request_id, method, request)
    else:
        member.propose(session, request_id, method, request, frame)


def _member_list(
    member: Member, session: Session, request_id: int, method: int, request: Any, frame: bytes
) -> None:
    if request.linearizable:
        member.read(session, request_id, method, request)
    else:
        member.read_now(session, request_id, method, request)


def _status(
    member: Member, session: Session, request_id: int, method: int, request: Any, frame: bytes
) -> None:
    raft, store = member.raft, member.store
    problems = [] if raft.leader else [str(error("NoLeader"))]
    problems += [
        f"memberID:{alarm_member} alarm:{alarm_name(kind)} "
        for alarm_member, kind in sorted(member.alarms)
    ]
    response = proto.StatusResponse(
        version=etcdlite.ETCD_API_VERSION,
        dbSize=store.size_bytes,
        leader=raft.leader,
        raftIndex=raft.log.committed,
        raftTerm=raft.term,
        raftAppliedIndex=store.applied_index,
        errors=problems,
        dbSizeInUse=store.size_in_use_bytes,
        isLearner=member.id in raft.learners,
        storageVersion=etcdlite.ETCD_API_VERSION,
        dbSizeQuota=member.quota_bytes,
    )
    session.reply(request_id, method, member.header(store.revision) + response.encode())


def _defragment(
    member: Member, session: Session, request_id: int, method: int, request: Any, frame: bytes
) -> None:
    member.housekeeping.defragment(session, request_id, method)


def _check_space(member: Member, frame: bytes) -> None:
    if len(frame) > member.space_left:
        member.raise_nospace()
        raise error("NoSpace")


def keep_alive(member: Member, body: bytes) -> bytes:
    """Answer one message of a LeaseKeepAlive stream. Raises EtcdError, DecodeError."""
    request = proto.LeaseKeepAliveRequest.decode(body)
    response = proto.LeaseKeepAliveResponse(ID=request.ID)
    try:
        response.TTL = member.lessor.renew(request.ID, member.clock())
        member.metrics.leases_renewed += 1
    except EtcdError as failure:
        # A lease that is gone is an answer, with a TTL of 0, and not the end of the stream.
        if failure.text != str(error("LeaseNotFound")):
            raise
    encoded: bytes = response.encode()
    return member.header(member.store.revision) + encoded


_HANDLERS: dict[str, Handler] = {
    "KV.Range": _range,
    "KV.Put": _put,
    "KV.DeleteRange": _delete_range,
    "KV.Txn": _txn,
    "KV.Compact": _propose,
    "Lease.LeaseGrant": _lease_grant,
    "Lease.LeaseRevoke": _propose,
    "Lease.LeaseTimeToLive": _read,
    "Lease.LeaseLeases": _read,
    "Cluster.MemberList": _member_list,
    "Maintenance.Alarm": _propose,
    "Maintenance.Status": _status,
    "Maintenance.Defragment": _defragment,
    "Maintenance.Hash": _read_now,
    "Maintenance.HashKV": _read_now,
}

HANDLERS: dict[int, tuple[Handler, Any]] = {
    proto.METHOD_BY_NAME[name].number: (handler, proto.METHOD_BY_NAME[name].request.decode)
    for name, handler in _HANDLERS.items()
}
"""Unary methods by number: the handler and the decoder of the request."""


def unimplemented(method: int) -> EtcdError:
    """The answer to a method that does not exist or is not served."""
    known = proto.METHODS.get(method)
    if known is None:
        return EtcdError(UNIMPLEMENTED, f"unknown method {method:#04x}")
    return EtcdError(
        UNIMPLEMENTED, f"{known.full} is not available in etcdlite {etcdlite.__version__}"
    )


def invalid(method: int, failure: proto.DecodeError) -> EtcdError:
    """The answer to a body that is not the method's request."""
    return EtcdError(INVALID_ARGUMENT, f"etcdlite: invalid request: {failure}")
