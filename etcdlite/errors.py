"""The errors that etcd v3 clients match on: a gRPC status code and an exact text each.

An `EtcdError` is an answer to the caller: its request fails, and nothing else happens. Faults of
the server (a broken invariant, a failing disk) are other exceptions and end the process.
"""

from __future__ import annotations

OK = 0
CANCELED = 1
UNKNOWN = 2
INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
NOT_FOUND = 5
ALREADY_EXISTS = 6
PERMISSION_DENIED = 7
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
ABORTED = 10
OUT_OF_RANGE = 11
UNIMPLEMENTED = 12
INTERNAL = 13
UNAVAILABLE = 14
DATA_LOSS = 15
UNAUTHENTICATED = 16

CODE_NAMES = dict(
    enumerate((
        "OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound",
        "AlreadyExists", "PermissionDenied", "ResourceExhausted", "FailedPrecondition", "Aborted",
        "OutOfRange", "Unimplemented", "Internal", "Unavailable", "DataLoss", "Unauthenticated",
    ))
)  # fmt: skip
"""gRPC's names of the codes above."""

REPLACE = (
    "In a cluster, remove this member with 'etcdlite-ctl member remove', empty its data directory, "
    "and add it again with 'etcdlite-ctl member add'; alone, it needs a backup and 'etcdlite-ctl "
    "snapshot restore'"
)
"""What to do about a member whose data cannot be used."""


class Explained(Exception):
    """Something cannot be done, and the text tells the user why, and where it helps what to do. It
    ends a command of etcdlite-ctl, or the server, with that text."""


class MayPass(Explained):
    """What is in the way may go by itself: the same may succeed later."""


class EtcdError(Exception):
    """A request that is answered with an error: `code` is a gRPC status code, `text` etcd's own."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text

    @property
    def name(self) -> str:
        """etcd's name of the error, a key of `ERRORS`; empty for a text that is not etcd's. Also
        known of an error that came over a connection, where only code and text travel."""
        return _NAMES.get(self.text, "")

    def __str__(self) -> str:
        return self.text


_TABLE = """
EmptyKey                   3  key is not provided
KeyNotFound                3  key not found
ValueProvided              3  value is provided
LeaseProvided              3  lease is provided
TooManyOps                 3  too many operations in txn request
DuplicateKey               3  duplicate key given in txn request
InvalidClientAPIVersion    3  invalid client api version
InvalidSortOption          3  invalid sort option
Compacted                 11  mvcc: required revision has been compacted
FutureRev                 11  mvcc: required revision is a future revision
NoSpace                    8  mvcc: database space exceeded
LeaseNotFound              5  requested lease not found
LeaseExist                 9  lease already exists
LeaseTTLTooLarge          11  too large lease TTL
WatchCanceled              1  watch canceled
MemberExist                9  member ID already exist
PeerURLExist               9  Peer URLs already exists
MemberNotEnoughStarted     9  re-configuration failed due to not enough started members
MemberBadURLs              3  given member URLs are invalid
MemberNotFound             5  member not found
MemberNotLearner           9  can only promote a learner member
LearnerNotReady            9  can only promote a learner member which is in sync with leader
TooManyLearners            9  too many learner members in cluster
ClusterIDMismatch          9  cluster ID mismatch
RequestTooLarge            3  request is too large
RequestTooManyRequests     8  too many requests
RootUserNotExist           9  root user does not exist
RootRoleNotExist           9  root user does not have root role
UserAlreadyExist           9  user name already exists
UserEmpty                  3  user name is empty
UserNotFound               9  user name not found
RoleAlreadyExist           9  role name already exists
RoleNotFound               9  role name not found
RoleEmpty                  3  role name is empty
AuthFailed                 3  authentication failed, invalid user ID or password
PermissionNotGiven         3  permission not given
PermissionDenied           7  permission denied
RoleNotGranted             9  role is not granted to the user
PermissionNotGranted       9  permission is not granted to the role
AuthNotEnabled             9  authentication is not enabled
InvalidAuthToken          16  invalid auth token
InvalidAuthMgmt            3  invalid auth management
AuthOldRevision            3  revision of auth store is old
NoLeader                  14  no leader
NotLeader                  9  not leader
LeaderChanged             14  leader changed
NotCapable                 9  not capable
Stopped                   14  server stopped
Timeout                   14  request timed out
TimeoutDueToLeaderFail    14  request timed out, possibly due to previous leader failure
TimeoutDueToConnectionLost 14 request timed out, possibly due to connection lost
TimeoutWaitAppliedIndex   14  request timed out, waiting for the applied index took too long
Unhealthy                 14  unhealthy cluster
Corrupt                   15  corrupt cluster
NotSupportedForLearner     9  rpc not supported for learner
BadLeaderTransferee        9  bad leader transferee
WrongDowngradeVersionFormat 3 wrong downgrade target version format
InvalidDowngradeTargetVersion 3 invalid downgrade target version
ClusterVersionUnavailable  9  cluster version not found during downgrade
DowngradeInProcess         9  cluster has a downgrade job in progress
NoInflightDowngrade        9  no inflight downgrade job
Canceled                   1  request canceled
DeadlineExceeded           4  context deadline exceeded
"""

ERRORS: dict[str, tuple[int, str]] = {}
"""Name -> (gRPC status code, full text)."""

for _line in _TABLE.strip().splitlines():
    _name, _code, _text = _line.split(None, 2)
    ERRORS[_name] = (int(_code), "etcdserver: " + _text)

_OWN = {
    "MemberRemoved": (
        FAILED_PRECONDITION,
        "etcdlite: the member has been permanently removed from the cluster",
    )
}
"""Errors that etcd does not have, between members."""

_NAMES = {text: name for name, (_, text) in (ERRORS | _OWN).items()}


def error(name: str) -> EtcdError:
    """The error that etcd calls `name` (a key of `ERRORS`), ready to raise or to answer with."""
    return EtcdError(*(ERRORS.get(name) or _OWN[name]))
