"""The handlers of the unary methods: each checks a request and passes it to a part of the member.

Every protocol (native frames, gRPC, JSON) calls one of `HANDLERS` with a decoded request and the
frame that the request has in the native protocol. Writes go through the log; reads wait for
ReadIndex unless they are serializable; other requests are answered from this member's own state or
by the leader. A handler raises EtcdError to refuse the request.

While auth is enabled, a handler of the routes "local" and "leader" runs only if the user may make
the request. Reads are checked where they are served, writes where they are proposed
(`replica/access.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import etcdlite
from etcdlite import methods, proto, txn
from etcdlite.auth import OWN
from etcdlite.errors import INTERNAL, INVALID_ARGUMENT, UNIMPLEMENTED, UNKNOWN, EtcdError, error
from etcdlite.frames import FRAME_HEADER_BYTES
from etcdlite.loading import when_loaded
from etcdlite.member import Member
from etcdlite.plain_txn import decode_txn
from etcdlite.proto import varint, varint64
from etcdlite.ranges import decode_range
from etcdlite.replica import checks, membership
from etcdlite.replica.alarms import MAX_ALARMS, alarm_name
from etcdlite.replica.catch_up import behind_error
from etcdlite.replica.logins import check_size
from etcdlite.replica.state import needs_space
from etcdlite.request import Asked, Done, Waiter, empty_read
from etcdlite.wire.session import ClientSession

HASH_MODULES = ("etcdlite.crc32c", "etcdlite.etcd_hash")
"""What the hash of etcd needs: up to 40 ms."""

MAX_KNOWN_RENEWALS = 8192
MAX_KNOWN_RENEWAL_BYTES = 32
"""Bounds of `_RENEWALS`: entries, and bytes of a message."""

UNREADABLE = (INTERNAL, "etcdlite: the answer of the leader cannot be read; ask another member")
"""The error if it is no message."""

_FEW_OPS = 8
"""The memory of a transaction with no more operations than this is not counted."""

Handler = Callable[[Member, Waiter, bytes], None]
"""(member, the request and who waits for its answer, the same request as a native frame). Of a read
that is answered here, only the length of the frame counts."""


def _put(member: Member, waiter: Waiter, frame: bytes) -> None:
    txn.check_put(waiter.request)
    member.state.alarms.check_space(len(frame))
    member.writes.propose(waiter, frame)


def _range(member: Member, waiter: Waiter, frame: bytes) -> None:
    request = waiter.request
    if len(request.__dict__) > 1 or not request.key:
        txn.check_range(request)  # A key alone needs no check.
    if request.serializable:
        # Hot path: `_read_now`, inlined.
        if member.catch_up.is_behind:
            raise behind_error()
        member.reads.read_now(waiter, len(frame))
    else:
        member.reads.read(waiter, len(frame))


def _delete_range(member: Member, waiter: Waiter, frame: bytes) -> None:
    txn.check_delete_range(waiter.request)
    member.writes.propose(waiter, frame)


def _txn(member: Member, waiter: Waiter, frame: bytes) -> None:
    session, request_id, method, request = waiter
    ops = txn.check_txn(request, member.options.max_txn_ops)
    if ops > _FEW_OPS and isinstance(session, ClientSession):
        session.calls.hold(request_id, ops * txn.OP_BYTES)
    if not txn.is_read_only(request):
        if needs_space(method, request):
            member.state.alarms.check_space(len(frame))
        member.writes.propose(waiter, frame)
    elif txn.is_serializable(request):
        _read_now(member, waiter, frame)
    else:
        member.reads.read(waiter, len(frame))


def _read_now(member: Member, waiter: Waiter, frame: bytes) -> None:
    if member.catch_up.is_behind:
        raise behind_error()
    member.reads.read_now(waiter, len(frame))


def _admit(member: Member, waiter: Waiter, frame: bytes, do: Callable[[], None]) -> None:
    """Call `do`, which may raise EtcdError, if the user may make this request. The error that
    refuses it is the answer."""
    member.access.admit(waiter, waiter.then(do), len(frame))


def _propose(member: Member, waiter: Waiter, frame: bytes) -> None:
    checks.check(waiter.method, waiter.request)
    member.writes.propose(waiter, frame)


def _alarm(member: Member, waiter: Waiter, frame: bytes) -> None:
    alarms, request = member.state.alarms, waiter.request
    if (
        request.action == proto.AlarmRequest.ACTIVATE
        and len(list(alarms)) >= MAX_ALARMS
        and (request.memberID, request.alarm) not in alarms
    ):
        raise error("RequestTooManyRequests")
    _propose(member, waiter, frame)


def _read(member: Member, waiter: Waiter, frame: bytes) -> None:
    member.reads.read(waiter, len(frame))


def _hash_kv(member: Member, waiter: Waiter, frame: bytes) -> None:
    # Members of all versions compare the same hash with each other, clients that of etcd.
    request = waiter.request
    request.of_members = request.of_members or waiter.session.is_member
    if member.catch_up.is_behind:
        raise behind_error()
    read = partial(member.reads.read_now, waiter, len(frame))
    when_loaded(() if request.of_members else HASH_MODULES, member.run_task, read)


def _lease_grant(member: Member, waiter: Waiter, frame: bytes) -> None:
    member.state.alarms.check_space(len(frame))
    request = waiter.request
    if request.ID != 0:
        _propose(member, waiter, frame)
    else:
        # Chosen here, before it is proposed, so that every member applies the same id.
        while request.ID == 0 or member.state.lessor.exists(request.ID):
            request.ID = member.rng.getrandbits(63)
        member.writes.propose_message(waiter)


def _member_list(member: Member, waiter: Waiter, frame: bytes) -> None:
    if waiter.request.linearizable:
        member.reads.read(waiter)
    else:
        member.reads.read_now(waiter, len(frame))


def _status(member: Member, waiter: Waiter, frame: bytes) -> None:
    raft, store = member.raft, member.state.store
    problems = []
    if not raft.leader:
        problems += [str(error("NoLeader")), f"etcdlite: {member.leadership.no_leader_text()}"]
    problems += [
        # As Go prints the message, which leaves out a field that is 0.
        (f"memberID:{alarm_member} " if alarm_member else "") + f"alarm:{alarm_name(kind)} "
        for alarm_member, kind in sorted(member.state.alarms)
    ]
    if member.catch_up.is_behind:
        problems.append(str(behind_error()))
    if store.data.damaged:
        problems.append("etcdlite: this member's disk has damaged data; its log says where")
    response = proto.StatusResponse(
        version=etcdlite.ETCD_API_VERSION,
        dbSize=store.size_bytes,
        leader=raft.leader,
        raftIndex=raft.log.committed,
        raftTerm=raft.term,
        raftAppliedIndex=store.applied_index,
        errors=problems,
        dbSizeInUse=store.size_in_use_bytes,
        isLearner=member.identity.member_id in raft.learners,
        storageVersion=member.state.storage_version.full,
        dbSizeQuota=member.state.alarms.quota_bytes,
    )
    target = member.state.cluster_version.target
    if target is not None:
        response.downgradeInfo = proto.DowngradeInfo(enabled=True, targetVersion=target.full)
    waiter.reply(member.identity.header(store.revision) + response.encode())


def _time_to_live(member: Member, waiter: Waiter, frame: bytes, is_current: bool = False) -> None:
    """`is_current`: what was committed when the request came is applied."""
    if member.state.lessor.promoted:
        if is_current:
            member.reads.read_now(waiter)
        else:  # By then another member may lead.
            current = partial(_time_to_live, member, waiter, frame, True)
            _once_current(member, waiter, frame, current)
        return
    auth = member.state.auth
    ask = partial(_ask_leader, member, waiter, frame, _time_to_live)
    if not auth.enabled:
        ask(waiter.answer)
        return

    def answered(answer: bytes | EtcdError, is_current: bool = False) -> None:
        """The leader does not know the user, so this member checks the keys."""
        session, request_id, _, request = waiter
        try:
            if isinstance(answer, EtcdError):
                waiter.fail(answer)
                return
            author = member.access.author(session, request_id) if auth.enabled else OWN
            if request.keys and not (author is not None and author.is_member):
                rights = auth.rights(author)
                for key in proto.LeaseTimeToLiveResponse.decode(answer).keys:
                    rights.check_read(key)
            waiter.reply(answer)
        except EtcdError as failure:
            if not member.access.retry(session, failure, is_current, partial(answered, answer)):
                waiter.fail(failure)
        except proto.DecodeError:
            waiter.fail(EtcdError(*UNREADABLE))

    _admit(member, waiter, frame, partial(ask, answered))


def _ask_leader(
    member: Member, waiter: Waiter, frame: bytes, handle: Handler, answered: Done
) -> None:
    """Have the leader answer a request. If this member becomes the leader, `handle` does it."""
    if member.is_learner:
        raise error("NotSupportedForLearner")
    again = partial(waiter.then(partial(handle, member, waiter, frame)), None)
    _ask(member, waiter.method, frame[FRAME_HEADER_BYTES:], answered, again)


def _ask(
    member: Member, method: int, body: bytes, answered: Done, again: Callable[[], None]
) -> None:
    """Ask the leader. If this member becomes the leader, `again` is called."""

    def done(answer: bytes | EtcdError) -> None:
        if isinstance(answer, EtcdError) and answer.name == "LeaderChanged":
            again()
        else:
            answered(answer)

    member.questions.ask(method, body, done)


def _on_leader(handle: Handler, member: Member, waiter: Waiter, frame: bytes) -> None:
    """Call `handle` if this member leads; else have the leader answer."""
    if member.leads:
        handle(member, waiter, frame)
    else:
        _ask_leader(member, waiter, frame, partial(_on_leader, handle), waiter.answer)


def _once_current(member: Member, waiter: Waiter, frame: bytes, do: Callable[[], None]) -> None:
    """Call `do`, which may raise EtcdError, once what is committed now is applied, so that the
    answer is not of the past."""
    member.reads.read(empty_read(waiter.then(do)), len(frame))


def _as_of_now(handle: Handler, member: Member, waiter: Waiter, frame: bytes) -> None:
    """Call `handle` once what is committed now is applied and the user's right is checked again:
    another member may have taken it away, and nothing checks it later."""
    do = partial(handle, member, waiter, frame)
    _once_current(member, waiter, frame, partial(_admit, member, waiter, frame, do))


def _member_change(member: Member, waiter: Waiter, frame: bytes) -> None:
    if member.is_learner:
        raise error("NotSupportedForLearner")
    changed, action, request = proto.Member(ID=0), _ACTIONS[waiter.method], waiter.request
    if action == membership.ADD:
        nonce = member.rng.getrandbits(64)
        changed = membership.new_member(
            request.peerURLs, request.isLearner, f"{member.options.cluster_token}{nonce}"
        )
    else:
        changed.ID = request.ID
    if action == membership.UPDATE:
        changed.peerURLs = membership.peer_urls_of(request.peerURLs)
    change = proto.MemberChange(action=action, member=changed)
    checks.check(methods.MEMBER_CHANGE, change)
    if member.leadership.missing_voters():
        member.check_safe(change)  # As in etcd, this needs no quorum.
    _as_of_now(partial(_on_leader, partial(_change_members, change)), member, waiter, frame)


def _change_members(
    change: proto.MemberChange, member: Member, waiter: Waiter, frame: bytes
) -> None:
    do = partial(member.change_membership, waiter._replace(request=change))
    if not member.reachability.is_vital(change):
        do()
        return
    member.check_change(change)
    member.reachability.check(change, waiter.then(do))


def _downgrade(member: Member, waiter: Waiter, frame: bytes) -> None:
    if waiter.request.action not in range(3):
        raise EtcdError(UNKNOWN, "etcdserver: unknown method")
    _as_of_now(partial(_on_leader, _begin_downgrade), member, waiter, frame)


def _begin_downgrade(member: Member, waiter: Waiter, frame: bytes) -> None:
    member.version_keeper.downgrade(waiter.request, waiter.answer)


def _move_leader(member: Member, waiter: Waiter, frame: bytes, is_current: bool = False) -> None:
    if not member.leads:
        raise error("NotLeader")
    if is_current:
        member.leadership.move(waiter.request.targetID, waiter.answer)
    else:
        _as_of_now(partial(_move_leader, is_current=True), member, waiter, frame)


def _authenticate(member: Member, waiter: Waiter, frame: bytes) -> None:
    check_size(waiter.request)
    _once_current(member, waiter, frame, partial(member.logins.log_in, waiter))


def _auth_enable(member: Member, waiter: Waiter, frame: bytes) -> None:
    if not member.state.auth.enabled:
        member.writes.propose_own(methods.TOKEN_KEY, proto.TokenKey(seed=member.tokens.new_seed()))
    member.writes.propose(waiter, frame)


def _rotate_key(member: Member, waiter: Waiter, frame: bytes) -> None:
    rotation = proto.AuthRotateKeyRequest(seed=member.tokens.new_seed())
    member.writes.propose_message(waiter._replace(request=rotation))


def _user_add(member: Member, waiter: Waiter, frame: bytes) -> None:
    request = waiter.request
    has_password = request.options is None or not request.options.no_password
    added = proto.AuthUserAddRequest(name=request.name, options=request.options)
    if not has_password:
        member.writes.propose_message(waiter._replace(request=added))
    elif request.hashedPassword and not request.password:
        _propose(member, waiter, frame)
    else:
        _propose_hashed(member, waiter, frame, added)


def _change_password(member: Member, waiter: Waiter, frame: bytes) -> None:
    request = waiter.request
    if request.password:
        change = proto.AuthUserChangePasswordRequest(name=request.name)
        _propose_hashed(member, waiter, frame, change)
    elif request.hashedPassword:
        _propose(member, waiter, frame)
    else:
        _admit(member, waiter, frame, _refuse_empty_password)


def _refuse_empty_password() -> None:
    text = "etcdlite: an empty password would lock the user out, and root for good; give one"
    raise EtcdError(INVALID_ARGUMENT, text)


def _propose_hashed(
    member: Member,
    waiter: Waiter,
    frame: bytes,
    request: proto.AuthUserAddRequest | proto.AuthUserChangePasswordRequest,
) -> None:
    """Propose `request` with the hash of the password in the request that was received."""

    def hashed(result: str | EtcdError) -> None:
        if isinstance(result, EtcdError):
            waiter.fail(result)
        else:
            request.hashedPassword = result
            member.writes.propose_message(waiter._replace(request=request))

    hash_it = partial(member.logins.hash, waiter, request.name, waiter.request.password, hashed)
    _admit(member, waiter, frame, hash_it)


def read_renewal(body: bytes) -> int:
    """The lease that a message of a LeaseKeepAlive stream renews. Raises DecodeError."""
    return (_RENEWALS.get(body) or _read_renewal(body))[0]


def keep_alive(member: Member, body: bytes, done: Done) -> None:
    """Answer one message of a LeaseKeepAlive stream. Raises DecodeError."""
    renewal = _RENEWALS.get(body) or _read_renewal(body)
    if not member.state.lessor.promoted:
        if member.is_learner:
            done(error("NotSupportedForLearner"))
        else:
            _ask(member, methods.KEEP_ALIVE, body, done, partial(keep_alive, member, body, done))
    elif member.needs_no_round and not member.leases.is_checkpointed(renewal[0]):
        done(_renew(member, *renewal))
    else:
        # A read confirms that this member still leads and has applied all that was acknowledged. A
        # leader that was paused must not renew a lease that another leader has let expire.
        member.reads.read(empty_read(partial(_leadership_confirmed, member, renewal, body, done)))


_RENEWALS: dict[bytes, tuple[int, bytes]] = {}
"""Decoded messages, which clients repeat: body -> (lease id, ID field of the response)."""


def _read_renewal(body: bytes) -> tuple[int, bytes]:
    lease_id = proto.decode_request(proto.LeaseKeepAliveRequest.decode, body).ID
    field = b"\x10" + varint64(lease_id) if lease_id else b""
    if len(_RENEWALS) >= MAX_KNOWN_RENEWALS:
        _RENEWALS.clear()
    if len(body) <= MAX_KNOWN_RENEWAL_BYTES:
        _RENEWALS[body] = (lease_id, field)
    return lease_id, field


def _leadership_confirmed(
    member: Member, renewal: tuple[int, bytes], body: bytes, done: Done, answer: bytes | EtcdError
) -> None:
    if isinstance(answer, EtcdError):
        done(answer)
    elif not member.may_renew_leases:
        keep_alive(member, body, done)  # Another member leads now, or led in the meantime.
    elif member.leases.is_checkpointed(renewal[0]):
        # The next leader must know of the renewal before the client does: a checkpoint without a
        # remaining TTL gives the lease its full TTL again.
        reset = proto.LeaseCheckpointRequest(checkpoints=[proto.LeaseCheckpoint(ID=renewal[0])])
        asked = Asked(partial(_checkpoint_reset, member, body, done))
        member.writes.propose_message(Waiter(asked, 0, methods.CHECKPOINT, reset))
    else:
        done(_renew(member, *renewal))


def _renew(member: Member, lease_id: int, field: bytes) -> bytes | EtcdError:
    try:
        ttl = b"\x18" + varint(member.state.lessor.renew(lease_id, member.clock()))
        member.metrics.leases_renewed += 1
    except EtcdError as failure:
        # As in etcd, a lease that does not exist gets a TTL of 0; the stream goes on.
        if failure.name != "LeaseNotFound":
            return failure
        ttl = b""
    return member.identity.header(member.state.store.revision) + field + ttl


def _checkpoint_reset(member: Member, body: bytes, done: Done, answer: bytes | EtcdError) -> None:
    if isinstance(answer, EtcdError):
        done(answer)
    else:
        keep_alive(member, body, done)


_ACTIONS = {
    methods.METHOD_BY_NAME["Cluster.MemberAdd"].number: membership.ADD,
    methods.METHOD_BY_NAME["Cluster.MemberRemove"].number: membership.REMOVE,
    methods.METHOD_BY_NAME["Cluster.MemberUpdate"].number: membership.UPDATE,
    methods.METHOD_BY_NAME["Cluster.MemberPromote"].number: membership.PROMOTE,
}


def _checked(handle: Handler) -> Handler:
    """`handle`, if the user may make the request."""
    return lambda member, waiter, frame: _admit(
        member, waiter, frame, partial(handle, member, waiter, frame)
    )


def _decoder(number: int) -> Any:
    """The decoder of a method's requests."""
    method = methods.METHODS[number]
    request = method.request
    if number == methods.TXN:
        return decode_txn
    if number == methods.RANGE:
        return decode_range
    if method.full.startswith("KV."):
        return request.decode
    # Generated at first use: to generate all of them takes 30 ms of CPU at the start.
    return lambda *arguments: request.decode(*arguments)


_BY_ROUTE = {methods.Route.WRITE: _propose, methods.Route.READ: _read}
_BY_METHOD: dict[str, Handler] = {
    "KV.Range": _range,
    "KV.Put": _put,
    "KV.DeleteRange": _delete_range,
    "KV.Txn": _txn,
    "Lease.LeaseGrant": _lease_grant,
    "Lease.LeaseTimeToLive": _time_to_live,
    "Cluster.MemberAdd": _member_change,
    "Cluster.MemberRemove": _member_change,
    "Cluster.MemberUpdate": _member_change,
    "Cluster.MemberList": _member_list,
    "Cluster.MemberPromote": _member_change,
    "Maintenance.Alarm": _alarm,
    "Maintenance.Status": _status,
    "Maintenance.Defragment": lambda member, waiter, _: member.maintenance.defragment(
        waiter.answer
    ),
    "Maintenance.Hash": _read_now,
    "Maintenance.HashKV": _hash_kv,
    "Maintenance.MoveLeader": _move_leader,
    "Maintenance.Downgrade": _downgrade,
    "Auth.AuthEnable": _auth_enable,
    "Auth.Authenticate": _authenticate,
    "Auth.UserAdd": _user_add,
    "Auth.UserChangePassword": _change_password,
    "Auth.RotateKey": _rotate_key,
}
"""Those that the handler of their route is not enough for."""


def _handler(number: int) -> Handler:
    method = methods.METHODS[number]
    handle = _BY_METHOD.get(method.full) or _BY_ROUTE[method.route]
    is_checked = method.route in (methods.Route.LOCAL, methods.Route.LEADER)
    return _checked(handle) if is_checked else handle


HANDLERS = {number: (_handler(number), _decoder(number)) for number in methods.UNARY}
"""Unary methods by number: the handler and the decoder of the request, which `proto.decode_request`
bounds for requests above `FEW_BYTES`."""


def unimplemented(method: int) -> EtcdError:
    """The answer to a method that does not exist or is not served."""
    known = methods.METHODS.get(method)
    if known is None:
        return EtcdError(UNIMPLEMENTED, f"unknown method {method:#04x}")
    return EtcdError(
        UNIMPLEMENTED, f"{known.full} is not available in etcdlite {etcdlite.__version__}"
    )


def refusal(failure: EtcdError | proto.DecodeError) -> EtcdError:
    """The error for the client: `failure` itself, or that its request cannot be decoded."""
    if isinstance(failure, EtcdError):
        return failure
    return EtcdError(INVALID_ARGUMENT, f"etcdlite: invalid request: {failure}")
