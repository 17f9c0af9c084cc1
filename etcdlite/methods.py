"""The table of methods: one row for each method of the API and of the log.

The protocols (native, gRPC, JSON), the metrics, reflection and the clients read this table. The
functions that carry a method out are in their layers: handlers in `wire/api.py`, calls in
`wire/streams.py`, readers in `replica/reads.py`, appliers in `replica/state.py`. Each layer asserts
at import that it has a function for exactly the methods of its route (`by_number`).
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping, Set
from typing import NamedTuple, TypeVar

from etcdlite.proto import MESSAGES, Message
from etcdlite.versions import ALL, OLDEST, Version

T = TypeVar("T")

# A line per method, continued by indented lines: number, name, routes, permission, traits, paths of
# the JSON gateway, and the messages. "-" is none. A path is below /v3/<service>/; one that begins
# with "/" is below /v3. The messages are left out where the names say them: Put takes PutRequest
# and gives PutResponse, and of the Auth service UserAdd takes AuthUserAddRequest. "*" marks a
# stream of messages. The trait "v0.2" marks what only the log of a cluster of that version, or a
# later one, may hold.
TABLE = """
service etcdserverpb.KV
0x01 Range       read       keys learner,retry       range
0x06 RangeStream stream     keys learner             - RangeRequest -> *RangeStreamResponse
0x02 Put         write      keys -                   put
0x03 DeleteRange write      keys -                   deleterange
0x04 Txn         write,read keys learner,retry_reads txn
0x05 Compact     write      root -                   compaction
    CompactionRequest -> CompactionResponse
service etcdserverpb.Watch
0x10 Watch stream keys learner /watch *WatchRequest -> *WatchResponse
service etcdserverpb.Lease
0x20 LeaseGrant      write              user  -     grant
0x21 LeaseRevoke     write              lease -     revoke /kv/lease/revoke
0x22 LeaseKeepAlive  stream,leader,read lease retry keepalive
    *LeaseKeepAliveRequest -> *LeaseKeepAliveResponse
0x23 LeaseTimeToLive leader,read        lease retry timetolive /kv/lease/timetolive
0x24 LeaseLeases     read               lease retry leases /kv/lease/leases
service etcdserverpb.Cluster
0x30 MemberAdd     leader root -                   member/add
0x31 MemberRemove  leader root -                   member/remove
0x32 MemberUpdate  leader root -                   member/update
0x33 MemberList    read   user learner,retry,peers member/list
0x34 MemberPromote leader root -                   member/promote
service etcdserverpb.Maintenance
0x40 Alarm      write        alarm retry_reads         alarm
0x41 Status     local        -     learner,retry       status
0x42 Defragment local        root  learner             defragment
0x43 Hash       serializable root  learner,retry       hash
0x44 HashKV     serializable root  learner,retry,peers hashkv
0x45 Snapshot   stream       root  learner             snapshot
    SnapshotRequest -> *SnapshotResponse
0x46 MoveLeader local        root  -                   transfer-leadership
0x47 Downgrade  leader       root  -                   downgrade
service etcdserverpb.Auth
0x50 AuthEnable           write root -     enable AuthEnableRequest -> AuthEnableResponse
0x51 AuthDisable          write root -     disable AuthDisableRequest -> AuthDisableResponse
0x52 AuthStatus           read  root retry status AuthStatusRequest -> AuthStatusResponse
0x53 Authenticate         local -    retry authenticate AuthenticateRequest -> AuthenticateResponse
0x54 UserAdd              write root -     user/add
0x55 UserGet              read  self retry user/get
0x56 UserList             read  root retry user/list
0x57 UserDelete           write root -     user/delete
0x58 UserChangePassword   write root -     user/changepw
0x59 UserGrantRole        write root -     user/grant
0x5A UserRevokeRole       write root -     user/revoke
0x5B RoleAdd              write root -     role/add
0x5C RoleGet              read  self retry role/get
0x5D RoleList             read  root retry role/list
0x5E RoleDelete           write root -     role/delete
0x5F RoleGrantPermission  write root -     role/grant
0x60 RoleRevokePermission write root -     role/revoke
0x61 RotateKey            write root -     rotatekey
service v3lockpb.Lock
0x70 Lock   stream keys - lock
0x71 Unlock stream keys - unlock
service v3electionpb.Election
0x78 Campaign stream keys -     campaign
0x79 Proclaim stream keys -     proclaim
0x7A Leader   stream keys retry leader
0x7B Observe  stream keys -     observe LeaderRequest -> *LeaderResponse
0x7C Resign   stream keys -     resign
service etcdlite.Log
0xE1 Publish      write      member - - Member -> -
0xE2 MemberChange membership member - - MemberChange -> -
0xE3 Checkpoint   write      member - - LeaseCheckpointRequest -> -
0xE4 Author       write      member - - Author -> -
0xE5 TokenKey     write      member - - TokenKey -> -
0xE6 Rehash       write      member - - Rehash -> -
0xE7 ClusterVersion write    member v0.2 - ClusterVersion -> -
0xE8 Time         write      member v0.2 - Time -> -
service etcdlite.History
0x90 Timeline read root retry -
"""


class Route(enum.Flag):
    """How the requests of a method are served; a method without a route is not served."""

    WRITE = enum.auto()
    """Through the log; `replica/state.py` applies it on every member."""
    READ = enum.auto()
    """Answered by `replica/reads.py` from a state that is linearizable, or at once if the request
    asks for no more than a serializable answer."""
    SERIALIZABLE = enum.auto()
    """Answered by `replica/reads.py` at once."""
    LEADER = enum.auto()
    """Answered by the leader; the other members pass it on."""
    LOCAL = enum.auto()
    """Answered by this member about itself."""
    STREAM = enum.auto()
    """A call of `wire/streams.py`: more than one message, or an answer that waits for events."""
    MEMBERSHIP = enum.auto()
    """Through the log, in an entry of its own kind that changes the membership."""


class Permission(enum.Enum):
    """What the requesting user needs once authentication is enabled (`auth.py`), by the rules of
    etcd 3.5 with the corrections of its security advisories up to 3.5.30."""

    ANYONE = "-"
    USER = "user"
    """To be a user."""
    KEYS = "keys"
    """To read or write the keys that the request names."""
    LEASE = "lease"
    """To be a user, and to read (TimeToLive with keys, LeaseLeases) or write (Revoke, KeepAlive)
    all keys of the leases."""
    ALARM = "alarm"
    """To be a user; to change alarms, the role root."""
    SELF = "self"
    """The role root, or to be that user or have that role."""
    ROOT = "root"
    """The role root."""
    MEMBER = "member"
    """Only members propose it. Clients cannot request it."""


class Retry(enum.Enum):
    """Whether a client may repeat a request that may have been carried out already."""

    NEVER = "-"
    IF_READ = "retry_reads"
    """Only if the request changes nothing."""
    ALWAYS = "retry"
    """It is idempotent."""


class Method(NamedTuple):
    """One row. `number` is that of the native protocol; `full` is "KV.Put", for example."""

    number: int
    service: str
    name: str
    full: str
    grpc_path: str
    request: type[Message]
    response: type[Message]
    client_stream: bool = False
    server_stream: bool = False
    http_paths: tuple[str, ...] = ()
    route: Route = Route(0)
    permission: Permission = Permission.ANYONE
    learner: bool = False
    """A learner serves it; if it has the route READ, only what may be serializable."""
    retry: Retry = Retry.NEVER
    peers: bool = False
    """Members send it to each other."""
    since: Version = OLDEST
    """The first version whose log may hold it."""


@functools.cache
def _route(words: str) -> Route:
    return functools.reduce(Route.__or__, (Route[word.upper()] for word in words.split(",")))


def _row(service: str, line: str) -> Method:
    number, name, routes, permission, words, *rest = line.split()
    route = Route(0) if routes == "-" else _route(routes)
    short = service.partition(".")[2]
    stem = f"Auth{name}" if short == "Auth" else name
    request, response = f"{stem}Request", f"{stem}Response"
    if "->" in rest:
        *rest, request, _, response = rest
    traits = set(words.split(","))
    since = {f"v{version}": version for version in ALL}
    assert traits <= {"-", "learner", "retry", "retry_reads", "peers", *since}, line
    return Method(
        number=int(number, 16),
        service=service,
        name=name,
        full=f"{short}.{name}",
        grpc_path=f"/{service}/{name}",
        request=MESSAGES[request.lstrip("*")],
        response=Message if response == "-" else MESSAGES[response.lstrip("*")],
        client_stream=request.startswith("*"),
        server_stream=response.startswith("*"),
        http_paths=tuple(
            f"/v3{path}" if path.startswith("/") else f"/v3/{short.lower()}/{path}"
            for path in rest
            if path != "-"
        ),
        route=route,
        permission=Permission(permission),
        learner="learner" in traits,
        retry=next((retry for retry in Retry if retry.value in traits), Retry.NEVER),
        peers="peers" in traits or Route.LEADER in route,
        since=max((since[word] for word in traits & since.keys()), default=OLDEST),
    )


def _read_table() -> list[Method]:
    rows = []
    service = ""
    for line in TABLE.replace("\n    ", " ").strip().splitlines():
        if line.startswith("service "):
            service = line.partition(" ")[2]
        else:
            rows.append(_row(service, line))
    return rows


ROWS = tuple(_read_table())

METHODS = {row.number: row for row in ROWS if row.permission is not Permission.MEMBER}
"""The methods that clients can request, by number, in the order of the table."""

METHOD_BY_NAME = {row.full: row for row in METHODS.values()}
"""The same by full name, "KV.Put"."""

NAMES = {row.number: row.full for row in ROWS}
REQUESTS = {row.number: row.request for row in ROWS}
"""The full name, and the class of the request, by number, for all methods."""

PEER_METHODS = frozenset(row.number for row in ROWS if row.peers)
"""The methods that members send to each other."""

SINCE = {row.number: row.since for row in ROWS if row.since > OLDEST}
"""The methods that only the log of a newer cluster may hold, and the version that brought each."""

UNARY = frozenset(n for n, row in METHODS.items() if row.route and Route.STREAM not in row.route)
"""The methods with one request message and one response that clients can request."""


def numbers(route: Route) -> frozenset[int]:
    """The methods that can take one of these routes."""
    return frozenset(row.number for row in ROWS if row.route & route)


def by_number(methods: Set[int], functions: Mapping[str, T]) -> dict[int, T]:
    """Key `functions` by number instead of full name. Raises AssertionError unless they are exactly
    those of `methods`."""
    found = {_NUMBER[full]: function for full, function in functions.items()}
    assert found.keys() == methods, [m for m in _NUMBER if _NUMBER[m] in found.keys() ^ methods]
    return found


_NUMBER = {row.full: row.number for row in ROWS}

RANGE = _NUMBER["KV.Range"]
PUT = _NUMBER["KV.Put"]
DELETE_RANGE = _NUMBER["KV.DeleteRange"]
TXN = _NUMBER["KV.Txn"]
COMPACT = _NUMBER["KV.Compact"]
WATCH = _NUMBER["Watch.Watch"]
LEASE_GRANT = _NUMBER["Lease.LeaseGrant"]
LEASE_REVOKE = _NUMBER["Lease.LeaseRevoke"]
KEEP_ALIVE = _NUMBER["Lease.LeaseKeepAlive"]
TIME_TO_LIVE = _NUMBER["Lease.LeaseTimeToLive"]
LEASE_LEASES = _NUMBER["Lease.LeaseLeases"]
MEMBER_LIST = _NUMBER["Cluster.MemberList"]
ALARM_METHOD = _NUMBER["Maintenance.Alarm"]
SNAPSHOT = _NUMBER["Maintenance.Snapshot"]
HASH = _NUMBER["Maintenance.Hash"]
HASH_KV = _NUMBER["Maintenance.HashKV"]
PUBLISH = _NUMBER["Log.Publish"]
"""Sets the name and client URLs of a member."""
MEMBER_CHANGE = _NUMBER["Log.MemberChange"]
CHECKPOINT = _NUMBER["Log.Checkpoint"]
"""Sets the remaining TTLs of leases to those that the leader measured."""
AUTHOR = _NUMBER["Log.Author"]
"""Names the user of the requests that follow, up to the next one or the end of the entry."""
TOKEN_KEY = _NUMBER["Log.TokenKey"]
"""Sets the key that signs tokens."""
REHASH = _NUMBER["Log.Rehash"]
"""Replaces the hash of a password by another one of the same password."""
TIME = _NUMBER["Log.Time"]
"""Says what time it was at the last revision before it."""
SET_CLUSTER_VERSION = _NUMBER["Log.ClusterVersion"]
"""Sets the cluster version."""
