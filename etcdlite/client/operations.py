"""The requests and the typed results of the Python client's calls, and the position of a watch.

Nothing here does input or output. Each operation is a function that builds an `Op`: the method's
name, the request message, and a function that makes the typed result from the response. The shells
(`blocking.py`, `aio.py`) turn each into a method of the client. Under their capitalised names
(`Put`, `Get`, `Range`, `Delete`, `Txn`) the operations are the branches of a transaction.

Keys and values are given as bytes or str (encoded as UTF-8) and returned as bytes. An operation, or
a comparison of a transaction, names its keys in one of three ways:

- `key`: that key;
- `key, range_end=end`: key <= k < end; an end of b"\\0" means every key from `key` on;
- `prefix=p`: every key that starts with p; `prefix=""` means every key.

Invariants: results are immutable; revisions, versions and leases are plain ints; a result's
`revision` is the store's revision when the request was served.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Literal, NamedTuple, SupportsInt, TypeVar

from etcdlite import proto
from etcdlite.client.errors import Compacted, LeaseNotFound, WatchCanceled, error_for, part
from etcdlite.errors import CANCELED, INTERNAL

__all__ = [
    "Alarm",
    "Bytes",
    "Comparison",
    "CreateRevision",
    "Delete",
    "DeleteResult",
    "Event",
    "Get",
    "HashKV",
    "KeyValue",
    "LeaseGrant",
    "LeaseInfo",
    "LeaseOf",
    "Member",
    "ModRevision",
    "Op",
    "Put",
    "PutResult",
    "Range",
    "RangeResult",
    "Status",
    "Txn",
    "TxnResult",
    "Value",
    "Version",
    "WatchBatch",
    "prefix_end",
]

T_co = TypeVar("T_co", covariant=True)

Bytes = bytes | bytearray | memoryview | str
"""What a key or a value may be given as; str is encoded as UTF-8."""

SortBy = Literal["key", "version", "create", "mod", "value"]

MAX_SHOWN = 3
"""Keys of a range that its `repr` shows."""

_SORT_TARGET = proto.ENUMS["RangeRequest.SortTarget"]
_COMPARE_RESULT = proto.ENUMS["Compare.CompareResult"]
_COMPARE_TARGET = proto.ENUMS["Compare.CompareTarget"]
_ALARM_TYPE = proto.ENUMS["AlarmType"]
_ALARM_NAME = {number: name for name, number in _ALARM_TYPE.items()}


def to_bytes(data: Bytes) -> bytes:
    """`data` as bytes. Raises TypeError for anything but bytes-like objects and str."""
    if type(data) is bytes:
        return data
    if isinstance(data, str):
        return data.encode()
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    raise TypeError(f"bytes or str expected, not {type(data).__name__}")


def prefix_end(prefix: bytes) -> bytes:
    """The smallest key above every key with `prefix`: what etcd takes as range_end for it.

    b"\\0", "to the end", where no such key exists (an empty prefix, or only 0xff bytes)."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes((kept[-1] + 1,)) if kept else b"\0"


def prefix_range(prefix: bytes) -> tuple[bytes, bytes]:
    """The (key, range_end) of a request for all keys with `prefix`; if it is empty, all keys."""
    return prefix or b"\0", prefix_end(prefix)


def key_range(
    key: Bytes | None, range_end: Bytes | None, prefix: Bytes | None
) -> tuple[bytes, bytes]:
    """The (key, range_end) of a request. Raises TypeError unless exactly one way was chosen."""
    if prefix is not None:
        if key is not None or range_end is not None:
            raise TypeError("prefix excludes key and range_end")
        return prefix_range(to_bytes(prefix))
    if key is None:
        raise TypeError("a key or a prefix is needed")
    return to_bytes(key), to_bytes(range_end) if range_end is not None else b""


# Results.


class KeyValue(NamedTuple):
    """A key as it was at one revision. `version` counts its puts since it was created."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int
    """The id of the lease it is attached to; 0: none."""


class RangeResult:
    """The keys of a range, also as a sequence: `for kv in result`, `len(result)`, `result[0]`.

    A `KeyValue` is made when it is read, so a large range takes less memory and time."""

    __slots__ = ("revision", "count", "more", "_messages", "_kvs")

    revision: int
    count: int
    """How many keys are in the range, also beyond `limit`."""
    more: bool
    """Whether `limit` left out keys."""
    _messages: Sequence[Any]
    _kvs: tuple[KeyValue, ...] | None

    def __init__(self, revision: int, kvs: Sequence[Any], count: int, more: bool) -> None:
        """`kvs`: messages, or anything else with the attributes of a KeyValue."""
        put = super().__setattr__
        put("revision", revision)
        put("count", count)
        put("more", more)
        put("_messages", kvs)
        put("_kvs", None)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a result cannot be changed")

    @property
    def kvs(self) -> tuple[KeyValue, ...]:
        kvs = self._kvs
        if kvs is None:
            kvs = tuple(self)
            super().__setattr__("_kvs", kvs)
        return kvs

    def __iter__(self) -> Iterator[KeyValue]:
        return map(_key_value, self._messages)

    def __len__(self) -> int:
        return len(self._messages)

    def __getitem__(self, index: int) -> KeyValue:
        return _key_value(self._messages[index])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeResult):
            return NotImplemented
        return self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())

    def _parts(self) -> tuple[int, tuple[KeyValue, ...], int, bool]:
        return self.revision, self.kvs, self.count, self.more

    def __repr__(self) -> str:
        shown = [repr(self[i]) for i in range(min(len(self), MAX_SHOWN))]
        if len(self) > MAX_SHOWN:
            shown.append(f"... {len(self) - MAX_SHOWN} more")
        return (
            f"RangeResult(revision={self.revision}, kvs=({', '.join(shown)}), "
            f"count={self.count}, more={self.more})"
        )


class PutResult(NamedTuple):
    revision: int
    prev_kv: KeyValue | None
    """What the key held before, if that was asked for and it existed."""


class DeleteResult(NamedTuple):
    revision: int
    deleted: int
    """How many keys were deleted."""
    prev_kvs: tuple[KeyValue, ...]
    """What they held, if that was asked for."""


class TxnResult(NamedTuple):
    """`results` has one typed result for each operation of the branch that ran, in order."""

    revision: int
    succeeded: bool
    results: tuple[Any, ...]


class Event(NamedTuple):
    """One change of one key."""

    type: Literal["PUT", "DELETE"]
    kv: KeyValue
    """For a DELETE: the key, and as mod_revision the revision that deleted it."""
    prev_kv: KeyValue | None

    @property
    def key(self) -> bytes:
        return self.kv.key

    @property
    def value(self) -> bytes:
        return self.kv.value

    @property
    def revision(self) -> int:
        return self.kv.mod_revision

    @property
    def is_delete(self) -> bool:
        return self.type == "DELETE"


class WatchBatch(NamedTuple):
    """The events of one message: whole revisions, in order. Without events: a progress mark."""

    revision: int
    """Every event up to this revision has been delivered."""
    events: tuple[Event, ...]


class LeaseGrant(NamedTuple):
    """A lease, just granted. It serves wherever a lease's id is wanted."""

    id: int
    ttl: int
    """Seconds, as granted: the server may give more than was asked for."""

    def __int__(self) -> int:
        return self.id


class LeaseInfo(NamedTuple):
    """A lease. It serves wherever a lease's id is wanted."""

    id: int
    ttl: int
    """Seconds left."""
    granted_ttl: int
    """Seconds it was granted for."""
    keys: tuple[bytes, ...]
    """The keys attached to it, if they were asked for."""

    def __int__(self) -> int:
        return self.id


class Status(NamedTuple):
    """The member that answered. Sizes in bytes."""

    version: str
    member_id: int
    cluster_id: int
    revision: int
    leader: int
    is_learner: bool
    raft_term: int
    raft_index: int
    raft_applied_index: int
    db_size: int
    db_size_in_use: int
    db_size_quota: int
    errors: tuple[str, ...]


class Alarm(NamedTuple):
    member_id: int
    name: str
    """"NOSPACE" or "CORRUPT"."""


class HashKV(NamedTuple):
    hash: int
    compact_revision: int
    hash_revision: int


class Member(NamedTuple):
    id: int
    name: str
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]
    is_learner: bool


def _revision(response: Any) -> int:
    return response.header.revision if response.header is not None else 0


def _key_value(kv: proto.KeyValue) -> KeyValue:
    return KeyValue(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


def _optional_key_value(kv: proto.KeyValue | None) -> KeyValue | None:
    return None if kv is None else _key_value(kv)


def _event(event: proto.Event) -> Event:
    kv = event.kv if event.kv is not None else proto.KeyValue()
    before = _optional_key_value(event.prev_kv)
    return Event("DELETE" if event.type == proto.Event.DELETE else "PUT", _key_value(kv), before)


def _member(member: proto.Member) -> Member:
    return Member(
        member.ID, member.name, tuple(member.peerURLs), tuple(member.clientURLs), member.isLearner
    )


def as_method(
    method: Callable[..., Any], build: Callable[..., Any], result: str = ""
) -> Callable[..., Any]:
    """Give a shell's method the name, documentation and signature of the function `build`.

    `result` names what the method returns; by default the T of `build`'s "Op[T]"."""
    signature = inspect.signature(build)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    result = result or str(signature.return_annotation).removeprefix("Op[").removesuffix("]")
    method.__name__ = build.__name__.rstrip("_")
    method.__qualname__ = f"Client.{method.__name__}"
    method.__doc__ = build.__doc__
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[this, *signature.parameters.values()], return_annotation=result
    )
    return method


# Operations. Every `timeout_s` is in seconds; None means the client's own.


class Op(Generic[T_co]):
    """One request, ready to send: `client.perform(op)`, or a branch of a transaction."""

    __slots__ = ("method", "request", "result", "timeout_s", "repeatable")

    def __init__(
        self,
        method: str,
        request: Any,
        result: Callable[[Any], T_co],
        timeout_s: float | None = None,
        repeatable: bool = False,
    ) -> None:
        self.method = method
        """As in `client.call`: "KV.Put"."""
        self.request = request
        self.result = result
        """Makes the typed result from the response message."""
        self.timeout_s = timeout_s
        self.repeatable = repeatable
        """Whether carrying it out twice is the same as once, so that it may be sent again."""

    def __repr__(self) -> str:
        return f"Op({self.method!r}, {self.request!r})"


def put(
    key: Bytes,
    value: Bytes = b"",
    *,
    lease: SupportsInt = 0,
    prev_kv: bool = False,
    ignore_value: bool = False,
    ignore_lease: bool = False,
    timeout_s: float | None = None,
) -> Op[PutResult]:
    """Store `value` under `key`, attached to `lease` (an id or a lease object; 0: none).

    `ignore_value` keeps the value that is there and `ignore_lease` the lease: the key must exist
    (KeyNotFound). `prev_kv` asks for what was there."""
    request = proto.PutRequest(
        key=to_bytes(key),
        value=to_bytes(value),
        lease=int(lease),
        prev_kv=prev_kv,
        ignore_value=ignore_value,
        ignore_lease=ignore_lease,
    )
    return Op("KV.Put", request, _put_result, timeout_s)


def _put_result(response: proto.PutResponse) -> PutResult:
    return PutResult(_revision(response), _optional_key_value(response.prev_kv))


def get(
    key: Bytes, *, revision: int = 0, serializable: bool = False, timeout_s: float | None = None
) -> Op[KeyValue | None]:
    """What `key` holds, or None; at `revision` if one is given (0: now).

    `serializable` lets the member answer from what it has, which may be stale, without asking the
    others. Raises Compacted and FutureRev."""
    request = proto.RangeRequest(key=to_bytes(key), revision=revision, serializable=serializable)
    return Op("KV.Range", request, lambda r: _key_value(r.kvs[0]) if r.kvs else None, timeout_s)


def range_(
    key: Bytes | None = None,
    *,
    range_end: Bytes | None = None,
    prefix: Bytes | None = None,
    limit: int = 0,
    revision: int = 0,
    sort_by: SortBy | None = None,
    descending: bool = False,
    serializable: bool = False,
    keys_only: bool = False,
    count_only: bool = False,
    min_mod_revision: int = 0,
    max_mod_revision: int = 0,
    min_create_revision: int = 0,
    max_create_revision: int = 0,
    timeout_s: float | None = None,
) -> Op[RangeResult]:
    """The keys of a range, in the order of the keys unless `sort_by` or `descending` is given.

    At most `limit` of them (0: all); as they were at `revision` (0: now); only those whose
    mod_revision and create_revision lie within the bounds, inclusive (0: no bound). `keys_only`
    leaves the values out, `count_only` everything but the count. Raises Compacted and FutureRev."""
    start, end = key_range(key, range_end, prefix)
    request = proto.RangeRequest(
        key=start,
        range_end=end,
        limit=limit,
        revision=revision,
        serializable=serializable,
        keys_only=keys_only,
        count_only=count_only,
        min_mod_revision=min_mod_revision,
        max_mod_revision=max_mod_revision,
        min_create_revision=min_create_revision,
        max_create_revision=max_create_revision,
    )
    if sort_by is not None or descending:
        orders = proto.RangeRequest
        request.sort_order = orders.DESCEND if descending else orders.ASCEND
        target = (sort_by or "key").upper()
        if target not in _SORT_TARGET:
            known = ", ".join(map(str.lower, _SORT_TARGET))
            raise ValueError(f"sort_by={sort_by!r}: write one of {known}")
        request.sort_target = _SORT_TARGET[target]
    return Op("KV.Range", request, _range_result, timeout_s)


def _range_result(response: proto.RangeResponse) -> RangeResult:
    return RangeResult(_revision(response), response.kvs, response.count, response.more)


def delete(
    key: Bytes | None = None,
    *,
    range_end: Bytes | None = None,
    prefix: Bytes | None = None,
    prev_kv: bool = False,
    timeout_s: float | None = None,
) -> Op[DeleteResult]:
    """Delete the keys of a range. `prev_kv` asks for what they held."""
    start, end = key_range(key, range_end, prefix)
    request = proto.DeleteRangeRequest(key=start, range_end=end, prev_kv=prev_kv)
    return Op("KV.DeleteRange", request, _delete_result, timeout_s)


def _delete_result(response: proto.DeleteRangeResponse) -> DeleteResult:
    prev_kvs = tuple(map(_key_value, response.prev_kvs))
    return DeleteResult(_revision(response), response.deleted, prev_kvs)


# Transactions.


class Comparison:
    """A condition of a transaction, made by comparing a `Value`, `Version`, ... with `==` etc."""

    __slots__ = ("message",)

    def __init__(self, message: proto.Compare) -> None:
        self.message = message

    def __bool__(self) -> bool:
        raise TypeError("the server evaluates this comparison: pass it to txn(compare=[...])")


class _Operand:
    """A property of a key, or of every key of a range, to compare: ==, !=, <, >.

    A comparison of a range holds if it holds for every key in it. A key that does not exist has
    version, revisions and lease 0, and no value: no comparison of its value holds."""

    __slots__ = ("_key", "_range_end")
    __hash__ = None  # type: ignore[assignment]  # == does not tell equality
    _target: int
    _field: str

    def __init_subclass__(cls, target: str, field: str) -> None:
        cls._target, cls._field = _COMPARE_TARGET[target], field

    def __init__(
        self,
        key: Bytes | None = None,
        *,
        range_end: Bytes | None = None,
        prefix: Bytes | None = None,
    ) -> None:
        self._key, self._range_end = key_range(key, range_end, prefix)

    def _compare(self, result: str, operand: Any) -> Comparison:
        message = proto.Compare(
            result=_COMPARE_RESULT[result],
            target=self._target,
            key=self._key,
            range_end=self._range_end,
        )
        setattr(message, self._field, self._checked(operand))
        return Comparison(message)

    def _checked(self, operand: Any) -> Any:
        if not isinstance(operand, int):
            raise TypeError(f"{type(self).__name__} compares with an int, not {operand!r}")
        return operand

    def __eq__(self, operand: object) -> Comparison:  # type: ignore[override]
        return self._compare("EQUAL", operand)

    def __ne__(self, operand: object) -> Comparison:  # type: ignore[override]
        return self._compare("NOT_EQUAL", operand)

    def __lt__(self, operand: Any) -> Comparison:
        return self._compare("LESS", operand)

    def __gt__(self, operand: Any) -> Comparison:
        return self._compare("GREATER", operand)


class Value(_Operand, target="VALUE", field="value"):
    __slots__ = ()

    def _checked(self, operand: Any) -> Any:
        return to_bytes(operand)


class Version(_Operand, target="VERSION", field="version"):
    __slots__ = ()


class CreateRevision(_Operand, target="CREATE", field="create_revision"):
    __slots__ = ()


class ModRevision(_Operand, target="MOD", field="mod_revision"):
    __slots__ = ()


class LeaseOf(_Operand, target="LEASE", field="lease"):
    __slots__ = ()


_TXN_FIELDS = {
    "KV.Range": ("request_range", "response_range"),
    "KV.Put": ("request_put", "response_put"),
    "KV.DeleteRange": ("request_delete_range", "response_delete_range"),
    "KV.Txn": ("request_txn", "response_txn"),
}


def txn(
    compare: Sequence[Comparison] = (),
    success: Sequence[Op[Any]] = (),
    failure: Sequence[Op[Any]] = (),
    *,
    timeout_s: float | None = None,
    repeatable: bool = False,
) -> Op[TxnResult]:
    """Carry out `success` if every comparison holds, else `failure`, in one revision.

    The branches are lists of `Put`, `Get`, `Range`, `Delete` and `Txn`. Every comparison, also in
    an inner transaction, sees the store as it was before. `repeatable`: the comparisons make a
    second run harmless, so the transaction may be sent again if a connection breaks. Raises
    TooManyOps, and DuplicateKey when one branch puts a key twice."""
    for comparison in compare:
        if not isinstance(comparison, Comparison):
            raise TypeError(
                f'compare holds comparisons such as Value("key") == "value", not {comparison!r}'
            )
    request = proto.TxnRequest(
        compare=[comparison.message for comparison in compare],
        success=[_request_op(op) for op in success],
        failure=[_request_op(op) for op in failure],
    )

    def result(response: proto.TxnResponse) -> TxnResult:
        ops = success if response.succeeded else failure
        fields = [_TXN_FIELDS[op.method][1] for op in ops]
        if [answer.which("response") for answer in response.responses] != fields:
            raise error_for(INTERNAL, "the reply to KV.Txn does not fit its operations")
        results = tuple(
            op.result(getattr(answer, field))
            for op, field, answer in zip(ops, fields, response.responses, strict=True)
        )
        return TxnResult(_revision(response), response.succeeded, results)

    return Op("KV.Txn", request, result, timeout_s, repeatable)


def _request_op(op: Op[Any]) -> proto.RequestOp:
    if not isinstance(op, Op) or op.method not in _TXN_FIELDS:
        raise TypeError(f"a transaction holds Put, Get, Range, Delete and Txn, not {op!r}")
    return proto.RequestOp(**{_TXN_FIELDS[op.method][0]: op.request})


Put = put
Get = get
Range = range_
Delete = delete
Txn = txn


def compact(revision: int, *, physical: bool = False, timeout_s: float | None = None) -> Op[int]:
    """Drop the history before `revision`; `physical` waits until it is removed from the disk.

    Returns the store's revision. Raises Compacted if that was done already, FutureRev."""
    request = proto.CompactionRequest(revision=revision, physical=physical)
    return Op("KV.Compact", request, _revision, timeout_s)


# Leases.


def lease_grant(ttl: int, *, id: int = 0, timeout_s: float | None = None) -> Op[LeaseGrant]:
    """A lease of `ttl` seconds; the server chooses the id unless one is given (LeaseExist)."""

    def result(response: proto.LeaseGrantResponse) -> LeaseGrant:
        if response.TTL <= 0 or not response.ID:
            raise LeaseNotFound()
        return LeaseGrant(response.ID, response.TTL)

    return Op("Lease.LeaseGrant", proto.LeaseGrantRequest(TTL=ttl, ID=id), result, timeout_s)


def lease_revoke(lease: SupportsInt, *, timeout_s: float | None = None) -> Op[int]:
    """End the lease and delete its keys. Returns the revision. Raises LeaseNotFound."""
    return Op("Lease.LeaseRevoke", proto.LeaseRevokeRequest(ID=int(lease)), _revision, timeout_s)


def lease_keep_alive_once(lease: SupportsInt, *, timeout_s: float | None = None) -> Op[int]:
    """Renew the lease. Returns its TTL in seconds. Raises LeaseNotFound."""

    def result(response: proto.LeaseKeepAliveResponse) -> int:
        # etcd's answer for a lease that is gone is a TTL of 0. Another ID renews another lease.
        if response.TTL <= 0 or response.ID != request.ID:
            raise LeaseNotFound()
        return response.TTL

    request = proto.LeaseKeepAliveRequest(ID=int(lease))
    return Op("Lease.LeaseKeepAlive", request, result, timeout_s)


def lease_time_to_live(
    lease: SupportsInt, *, keys: bool = False, timeout_s: float | None = None
) -> Op[LeaseInfo]:
    """The time that the lease has left, and its keys if asked for. Raises LeaseNotFound."""

    def result(response: proto.LeaseTimeToLiveResponse) -> LeaseInfo:
        # etcd's answer for a lease that is gone is a TTL of -1.
        if response.TTL < 0:
            raise LeaseNotFound()
        return LeaseInfo(response.ID, response.TTL, response.grantedTTL, tuple(response.keys))

    request = proto.LeaseTimeToLiveRequest(ID=int(lease), keys=keys)
    return Op("Lease.LeaseTimeToLive", request, result, timeout_s)


def leases(*, timeout_s: float | None = None) -> Op[tuple[int, ...]]:
    """The ids of all leases."""
    request = proto.LeaseLeasesRequest()
    return Op("Lease.LeaseLeases", request, lambda r: tuple(one.ID for one in r.leases), timeout_s)


# Maintenance and members.


def status(*, timeout_s: float | None = None) -> Op[Status]:
    """The state of the member that answers (the one at `client.endpoint`)."""
    return Op("Maintenance.Status", proto.StatusRequest(), _status, timeout_s)


def _status(response: proto.StatusResponse) -> Status:
    header = response.header or proto.ResponseHeader()
    return Status(
        version=response.version,
        member_id=header.member_id,
        cluster_id=header.cluster_id,
        revision=header.revision,
        leader=response.leader,
        is_learner=response.isLearner,
        raft_term=response.raftTerm,
        raft_index=response.raftIndex,
        raft_applied_index=response.raftAppliedIndex,
        db_size=response.dbSize,
        db_size_in_use=response.dbSizeInUse,
        db_size_quota=response.dbSizeQuota,
        errors=tuple(response.errors),
    )


def alarms(*, timeout_s: float | None = None) -> Op[tuple[Alarm, ...]]:
    """The alarms that are raised."""
    request = proto.AlarmRequest(action=proto.AlarmRequest.GET)
    return Op("Maintenance.Alarm", request, _alarms, timeout_s)


def disarm(alarm: Alarm, *, timeout_s: float | None = None) -> Op[tuple[Alarm, ...]]:
    """Clear one of the alarms that `alarms` returned. Returns the alarms that were cleared."""
    request = proto.AlarmRequest(
        action=proto.AlarmRequest.DEACTIVATE,
        memberID=alarm.member_id,
        alarm=_ALARM_TYPE[alarm.name],
    )
    return Op("Maintenance.Alarm", request, _alarms, timeout_s)


def _alarms(response: proto.AlarmResponse) -> tuple[Alarm, ...]:
    return tuple(
        Alarm(alarm.memberID, _ALARM_NAME.get(alarm.alarm, str(alarm.alarm)))
        for alarm in response.alarms
    )


def defragment(*, timeout_s: float | None = None) -> Op[None]:
    """Free the disk space of compacted history, on the member that answers."""
    return Op("Maintenance.Defragment", proto.DefragmentRequest(), lambda _: None, timeout_s)


def hash_kv(revision: int = 0, *, timeout_s: float | None = None) -> Op[HashKV]:
    """The hash of all keys and their history up to `revision` (0: now), to compare members."""

    def result(response: proto.HashKVResponse) -> HashKV:
        return HashKV(response.hash, response.compact_revision, response.hash_revision)

    return Op("Maintenance.HashKV", proto.HashKVRequest(revision=revision), result, timeout_s)


def move_leader(member_id: int, *, timeout_s: float | None = None) -> Op[None]:
    """Make another member the leader; only the leader does this (NotLeader)."""
    request = proto.MoveLeaderRequest(targetID=member_id)
    return Op("Maintenance.MoveLeader", request, lambda _: None, timeout_s)


def _members(response: Any) -> tuple[Member, ...]:
    return tuple(map(_member, response.members))


def members(*, linearizable: bool = True, timeout_s: float | None = None) -> Op[tuple[Member, ...]]:
    """The members of the cluster."""
    request = proto.MemberListRequest(linearizable=linearizable)
    return Op("Cluster.MemberList", request, _members, timeout_s)


def member_add(
    peer_urls: Sequence[str], *, learner: bool = False, timeout_s: float | None = None
) -> Op[Member]:
    """Add a member. Returns it, with its id. Raises PeerURLExist, MemberBadURLs."""
    request = proto.MemberAddRequest(peerURLs=list(peer_urls), isLearner=learner)
    return Op("Cluster.MemberAdd", request, lambda r: _member(part(r, "member")), timeout_s)


def member_remove(member_id: int, *, timeout_s: float | None = None) -> Op[tuple[Member, ...]]:
    """Remove a member. Returns the members that remain. Raises MemberNotFound."""
    return Op("Cluster.MemberRemove", proto.MemberRemoveRequest(ID=member_id), _members, timeout_s)


def member_update(
    member_id: int, peer_urls: Sequence[str], *, timeout_s: float | None = None
) -> Op[tuple[Member, ...]]:
    """Change a member's peer URLs. Returns all members."""
    request = proto.MemberUpdateRequest(ID=member_id, peerURLs=list(peer_urls))
    return Op("Cluster.MemberUpdate", request, _members, timeout_s)


def member_promote(member_id: int, *, timeout_s: float | None = None) -> Op[tuple[Member, ...]]:
    """Make a learner a voter. Returns all members. Raises LearnerNotReady, MemberNotLearner."""
    request = proto.MemberPromoteRequest(ID=member_id)
    return Op("Cluster.MemberPromote", request, _members, timeout_s)


# Watches.


def watch(
    key: Bytes | None = None,
    *,
    range_end: Bytes | None = None,
    prefix: Bytes | None = None,
    start_revision: int = 0,
    prev_kv: bool = False,
    no_put: bool = False,
    no_delete: bool = False,
    progress_notify: bool = False,
    timeout_s: float | None = None,
) -> WatchCursor:
    """Watch keys, from `start_revision` (0: from now) on.

    A watch begins when this returns (`Client`), or with `async with` (`AsyncClient`; without it,
    with the iteration): from then on no later change is missed. `prev_kv` asks for what a key held
    before, `progress_notify` for a progress mark now and then while nothing changes; `no_put` and
    `no_delete` leave events out. `timeout_s` bounds the time until the server has confirmed the
    watch; the iteration waits as long as it takes."""
    start, end = key_range(key, range_end, prefix)
    filters = proto.WatchCreateRequest
    create = proto.WatchCreateRequest(
        key=start,
        range_end=end,
        start_revision=start_revision,
        prev_kv=prev_kv,
        filters=[filters.NOPUT] * no_put + [filters.NODELETE] * no_delete,
        progress_notify=progress_notify,
    )
    return WatchCursor(create, timeout_s)


class WatchCursor:
    """The request of a watch and its position: what is needed to resume it elsewhere.

    `next_revision` is where a new stream has to start so that nothing is missed and nothing comes
    twice. It moves only over whole revisions: the request does not allow fragments, so a message
    holds all events of each revision it touches."""

    def __init__(self, create: Any, timeout_s: float | None = None) -> None:
        self._create = create
        self.timeout_s = timeout_s
        self.created = False
        """Whether the server has confirmed the watch before."""
        self.next_revision: int = create.start_revision
        """0 until the server has said what "now" is."""

    def __str__(self) -> str:
        return self._create.key.decode(errors="replace")

    def request(self) -> proto.WatchRequest:
        """The message that opens a stream where this watch stands."""
        self._create.start_revision = self.next_revision
        return proto.WatchRequest(create_request=self._create)

    def feed(self, response: proto.WatchResponse) -> WatchBatch | None:
        """Take in one response. Returns None if it only confirms that the watch was created.

        Raises Compacted when the history it needs is gone, and the server's reason (WatchCanceled
        if that is not one of etcd's errors) when the server ends the watch otherwise."""
        if response.compact_revision:
            raise Compacted(compact_revision=response.compact_revision)
        if response.canceled:
            raise error_for(CANCELED, response.cancel_reason or WatchCanceled.text)
        revision = _revision(response)
        if response.created:
            self.created = True
            if self.next_revision == 0:
                self.next_revision = revision + 1
            return None
        events = tuple(map(_event, response.events))
        # A response with events promises nothing beyond them; one without is a progress mark.
        revision = events[-1].kv.mod_revision if events else revision
        self.next_revision = max(self.next_revision, revision + 1)
        return WatchBatch(revision, events)
