"""What must always hold, checked while a simulated cluster runs, by somebody who sees everything.

`Safety` looks into all members. It is told of every `Ready` of consensus, and so of every entry
that reaches a log, a commit index or a state machine:

- election safety: at most one leader in a term;
- log matching: entries with the same index and term are the same, and so are those before them;
- leader completeness: a new leader's log has everything that was ever committed;
- state machine safety: all members apply the same entry at an index.

The committed log is the order in which writes happened. `Oracle` carries it out on a store that is
a dict per revision (`plain_model.py`) and shares no code with the package. Every request carries an
id of its own in the whole simulation, and the log holds the bytes that clients sent; so for each
write it is known whether, where and how often it took effect, even if nobody was told. The cluster
is strictly serializable if

- every write that was answered is in the log, once, and was answered what the model answers; one
  that was refused is not there; one with an unknown outcome is there at most once;
- what was answered before a write began lies before it in the log and has a lower revision;
- a read is what the model reads at the revision in its answer, and that is not below any revision
  that was answered before it began (a serializable one: not below what its connection was told).

Watches get every event that they should, each once, in order, revisions whole; progress is told
only when it is true. A lease does not end before its TTL after the last renewal that was answered,
and nobody is told of a renewal of a lease that has ended.

Users and roles are part of the state. `plain_auth.py` follows the log with them; each entry says
for whom its requests are. A write does what the rules say at its place in the log, be it that it is
refused. A read that was answered was permitted in the state that its revision belongs to; a watch
that was begun, and other requests, in a state that a member had while they were asked. The same
goes for the reason of each refusal: it was true then, or as of the entry that the asked member had
applied when the request began. A token counts only while it is valid.
"""

from __future__ import annotations

import struct
import zlib
from functools import partial
from typing import Any
from zlib import crc32

from rigs.plain_model import PlainStore, within

from etcdlite import frames, methods, proto
from etcdlite.errors import EtcdError, error
from etcdlite.methods import AUTHOR, REHASH, SET_CLUSTER_VERSION, TIME, TOKEN_KEY
from etcdlite.raft import LEADER, NOTHING_READY, VOTE_RESP
from etcdlite.raft_log import ENTRY_CONF_CHANGE
from etcdlite.replica.catch_up import behind_error
from etcdlite.replica.entry import needed_version
from sim.plain_auth import (
    Author,
    Certificate,
    History,
    PlainAuth,
    Token,
    comparable,
    is_right,
    leases_of,
    text_of,
)

FIRST_OP = 1000
"""Ids below are those of requests that members make themselves."""

STATES_KEPT_S = 60.0
"""For how long the state at a compacted revision is remembered."""

MIN_TTL_S = 2
"""What `World` configures."""

_ENTRY_HEADER = struct.Struct("<BBBxIQQ")
_PUBLISH, _MEMBER_CHANGE, _CHECKPOINT = 0xE1, 0xE2, 0xE3
_NUMBER = {name: method.number for name, method in methods.METHOD_BY_NAME.items()}
_PUT = _NUMBER["KV.Put"]
_REVOKE = _NUMBER["Lease.LeaseRevoke"]
_GRANT = _NUMBER["Lease.LeaseGrant"]
_TXN = _NUMBER["KV.Txn"]
_ALARM = _NUMBER["Maintenance.Alarm"]
_COMPACT = _NUMBER["KV.Compact"]
_NAME = {number: name for name, number in _NUMBER.items()}
_AUTH = {number: name for number, name in _NAME.items() if name.startswith("Auth.")} | {
    TOKEN_KEY: "Log.TokenKey"
}
_DECODE = {AUTHOR: proto.Author.decode, TOKEN_KEY: proto.TokenKey.decode} | {
    number: method.request.decode for number, method in methods.METHODS.items()
}

NOT_KNOWN = frozenset(
    error(name).text
    for name in (
        "Timeout",
        "TimeoutDueToLeaderFail",
        "TimeoutDueToConnectionLost",
        "LeaderChanged",
        "Stopped",
        "Canceled",
    )
)
"""Errors that leave open whether a write took effect."""

REFUSED = frozenset(
    error(name).text
    for name in (
        "RequestTooManyRequests",
        "NotSupportedForLearner",
        "NoLeader",
        "NotLeader",
        "NoSpace",
    )
)
"""Errors that a member may give to a write that it has not proposed."""


REFUSALS = frozenset(
    error(name).text
    for name in (
        "PermissionDenied",
        "UserEmpty",
        "AuthOldRevision",
        "InvalidAuthToken",
        "UserNotFound",
        "RoleNotFound",
        "AuthFailed",
        "AuthNotEnabled",
    )
)
"""What a request is told that may not be, or that users and roles do not allow."""

_OLD_REVISION = error("AuthOldRevision").text
_OUTDATED = frozenset((error("UserEmpty").text, _OLD_REVISION))
"""Errors of a write that was checked before users or roles changed, and applied afterwards."""
_INVALID_TOKEN = error("InvalidAuthToken").text
_DENIED = error("PermissionDenied").text

EXPIRY_SLACK_S = 2.0
"""Clocks differ, and the end of a token is in whole seconds."""


class Violation(Exception):
    """A claim does not hold. `about`: words that lines of the trace which matter have in them."""

    def __init__(self, claim: str, details: str = "", about: tuple[Any, ...] = ()) -> None:
        super().__init__(claim, details)
        self.claim = claim
        self.details = details
        self.about = tuple(str(word) for word in about)

    def __str__(self) -> str:
        return f"{self.claim}: {self.details}" if self.details else self.claim


class Op:
    """A request of a client and all that is known of it."""

    __slots__ = (
        "answered", "at", "author", "began", "client", "floor_at", "floor_auth", "floor_compacted",
        "floor_revision", "floor_told", "id", "identities", "is_refused", "is_write", "name",
        "number", "request", "result", "revision",
    )  # fmt: skip

    def __init__(self, op_id: int, name: str, request: Any, client: Any, began: float) -> None:
        self.id = op_id
        self.name = name
        self.number = _NUMBER[name]
        self.request = request
        self.client = client
        self.began = began
        self.is_write = False
        self.answered = False
        self.is_refused = False
        self.at: tuple[int, int] | None = None
        """(index, place in the entry) in the log."""
        self.result: Any = None
        """What the model answers."""
        self.revision = 0
        """The store's, when it was carried out."""
        self.author: Author | None = None
        """For whom it is, as the log has it."""
        self.identities: list[Token | Certificate | None] = getattr(client, "identities", [None])
        """Whom the connection may have stood for meanwhile; None: nobody."""
        self.floor_auth = 0
        """The version of users and roles that the asked member had when it began."""
        # What clients had been told when it began.
        self.floor_at = (0, 0)
        self.floor_revision = 0
        self.floor_compacted = 0
        self.floor_told = 0

    def __str__(self) -> str:
        return f"#{self.id} {self.name}"


class Lease:
    def __init__(self, ttl_s: int, now: float) -> None:
        self.ttl_s = ttl_s
        self.granted_at = now
        self.known_since = float("inf")
        """When the client was told of it."""
        self.promised_until = 0.0
        """The client may rely on it until then."""
        self.ended_at: float | None = None
        self.ended_by = ""
        self.asked_at = now
        """When somebody last tried to renew it."""


class Oracle(PlainStore):
    """The store as it must be, and what clients were told."""

    def __init__(self, world: Any, skew: float, slack_s: float) -> None:
        super().__init__()
        self.world = world
        self.skew = skew
        """By how much, at most, a member's clock is faster than another one's."""
        self.slack_s = slack_s
        """By how much it may be ahead in the middle of some work."""
        self.times = [0.0, 0.0]
        """When each revision was made."""
        self.ops: dict[int, Op] = {}
        """Writes that were not answered yet, or that nobody will be told of."""
        self.applied = bytearray(FIRST_OP)
        """By id: whether a write took effect."""
        self.next_id = FIRST_OP
        self.alarms: set[tuple[int, int]] = set()
        self.lease_book: dict[int, Lease] = {}
        self.auth = History()
        self._passwords: list[str] = []
        self.wall_clock_s = 0.0
        """What the wall clock showed at the beginning."""
        self.answered_at = (0, 0)
        """The last place in the log of a write that was answered."""
        self.answered_revision = 1
        """The highest revision that anybody was told."""
        self.compaction_answered = 0
        self.hashes: dict[tuple[str, int, int], tuple[int, str]] = {}
        self.counts: dict[str, int] = {}
        self.answers = 0
        self.unknown = 0
        self._forgotten = 0
        """States and events below are pruned."""

    # The log.

    def carry_out(self, index: int, data: bytes) -> None:
        """The next committed entry."""
        version, _, _, checksum, _, _ = _ENTRY_HEADER.unpack_from(data)
        if version not in (2, 3) or zlib.crc32(data[8:]) != checksum:
            raise Violation("an entry is as it was proposed", f"entry {index}: {data[:24].hex()}")
        capped = any(kind == 1 for _, kind in self.alarms)
        corrupt = any(kind == 2 for _, kind in self.alarms)
        author: Author | None = None
        at = _ENTRY_HEADER.size
        place = -1
        while at < len(data):
            place += 1
            length, request_id, method, _ = frames.FRAME.unpack_from(data, at)
            end = at + 4 + length
            body_at = at + frames.FRAME_HEADER_BYTES
            at = end
            if method in (_PUBLISH, _MEMBER_CHANGE, _CHECKPOINT, REHASH, SET_CLUSTER_VERSION, TIME):
                continue
            request = _DECODE[method](data, body_at, end)
            if method == AUTHOR:
                author = self._author(index, request)
                continue
            op = None
            if request_id >= FIRST_OP:
                op = self.ops.get(request_id)
                self._take_effect(request_id, op, (index, place))
            try:
                name = _AUTH.get(method, "")
                if self.auth.now.enabled and method != TOKEN_KEY:
                    self.auth.now.check(author, _NAME[method], request, self.keys_of)
                if corrupt and method != _ALARM and not name:
                    raise error("Corrupt")
                if capped and _needs_space(method, request):
                    raise error("NoSpace")
                if name:
                    self._check_secret(name, request, op)
                    result = self.auth.apply(index, self.revision, name, request, author)
                else:
                    result = self._carry_out(method, request, request_id)
            except EtcdError as failure:
                result = failure
            if op is not None:
                op.result = result
                op.revision = self.revision
                op.author = author
                if isinstance(result, EtcdError) and result.text in _OUTDATED:
                    # Nothing took effect. It may come again, with a later auth revision.
                    self.applied[request_id] = 0
                    op.at = None

    def _author(self, index: int, frame: Any) -> Author | None:
        """For whom the next requests of an entry are."""
        if frame.revision > self.auth.now.revision:
            raise Violation(
                "requests are prepared under users and roles that were there",
                f"entry {index} names {frame.name!r} at auth revision {frame.revision}, the last "
                f"one is {self.auth.now.revision}",
            )
        named = frame.name or frame.revision or frame.is_member
        return Author(frame.name, frame.revision, frame.is_member) if named else None

    def keys_of(self, lease_id: int) -> list[bytes]:
        """The keys that are attached to a lease now."""
        return [key for key, kv in self.now.items() if kv.lease == lease_id]

    def _check_secret(self, name: str, request: Any, op: Op | None) -> None:
        if name not in ("Auth.UserAdd", "Auth.UserChangePassword"):
            return
        password = getattr(op.request, "password", "") if op is not None else ""
        if request.password or (password and password.encode() in request.encode()):
            raise Violation("no password is in the log", f"{op} {request!r}")

    def _take_effect(self, request_id: int, op: Op | None, at: tuple[int, int]) -> None:
        if self.applied[request_id]:
            raise Violation(
                "a request takes effect at most once",
                f"request #{request_id} is in the log a second time, at {at}",
                (f"#{request_id}",),
            )
        self.applied[request_id] = 1
        if op is None:
            return
        if op.is_refused:
            raise Violation(
                "a request that was refused does not take effect",
                f"{op} is in the log at {at}, but the client was told that it was refused",
                (f"#{op.id}",),
            )
        op.at = at

    def _carry_out(self, method: int, request: Any, request_id: int) -> Any:
        if method == _ALARM:
            return self._alarm(request)
        if method == _REVOKE:
            lease = self.lease_book.get(request.ID)
            result = self.apply(request)
            if lease is not None and lease.ended_at is None:
                self._end_lease(request.ID, lease, is_expiry=request_id < FIRST_OP)
        else:
            result = self.apply(request)
        while len(self.times) <= self.revision:
            self.times.append(self.world.now)
        if method == _COMPACT:
            self._forget()
        return result

    def _grant(self, request: Any) -> Any:
        response = super()._grant(request)
        response.TTL = max(request.TTL, MIN_TTL_S)
        self.lease_book[request.ID] = Lease(response.TTL, self.world.now)
        return response

    APPLY = {**PlainStore.APPLY, "LeaseGrantRequest": _grant}

    def _alarm(self, request: Any) -> Any:
        if request.action == 1:
            self.alarms.add((request.memberID, request.alarm))
        elif request.action == 2:
            self.alarms.discard((request.memberID, request.alarm))
        return None

    def _end_lease(self, lease_id: int, lease: Lease, is_expiry: bool) -> None:
        now = self.world.now
        lease.ended_at = now
        lease.ended_by = "expiry" if is_expiry else "a client"
        if is_expiry and now < lease.promised_until - self._early_s:
            raise Violation(
                "a lease does not end before its TTL",
                f"lease {lease_id:x} was revoked {lease.promised_until - now:.3f} s before "
                "the end of what the last renewal promised",
                (f"lease {lease_id:x}", "elected"),
            )

    def _forget(self) -> None:
        until = self.world.now - STATES_KEPT_S
        at = self._forgotten
        while at < self.compacted and self.times[at] < until:
            self.states[at] = None
            at += 1
        self._forgotten = at

    # Clients.

    def begin(self, name: str, request: Any, client: Any, is_write: bool) -> Op:
        op = Op(self.next_id, name, request, client, self.world.now)
        self.next_id += 1
        self.applied.append(0)
        op.is_write = is_write
        op.floor_at = self.answered_at
        op.floor_revision = self.answered_revision
        op.floor_compacted = self.compaction_answered
        op.floor_told = client.told_revision
        self.note_auth(op)
        if is_write:
            self.ops[op.id] = op
        return op

    def note_auth(self, op: Op) -> None:
        """A request begins: note which users and roles its member knows."""
        node = op.client.node
        if self.auth.latest and node is not None and node.is_up:
            op.floor_auth = self.auth.number_at(node.member.state.store.applied_index)

    def lose(self, op: Op) -> None:
        """Nobody will be told what became of it."""
        op.answered = True
        self.unknown += 1

    def answer(self, op: Op, answer: Any) -> None:
        """The client was told `answer`: a response or an EtcdError."""
        op.answered = True
        self.answers += 1
        self.counts[op.name] = self.counts.get(op.name, 0) + 1
        if isinstance(answer, EtcdError):
            self._failed(op, answer)
        elif op.is_write:
            self._written(op, answer)
        else:
            self._read(op, answer)

    def _failed(self, op: Op, failure: EtcdError) -> None:
        text = failure.text
        if text in NOT_KNOWN:
            self.unknown += 1
            return
        if not op.is_write:
            self._read_failed(op, text)
            return
        if op.at is None:
            if text in REFUSALS:
                self._check_refusal(op, text)
            elif text not in REFUSED:
                raise Violation(
                    "an answer is given only when the request is committed",
                    f"{op} was answered {text!r}, but is not in the log",
                    (f"#{op.id}",),
                )
            op.is_refused = True
            return
        if not isinstance(op.result, EtcdError) or op.result.text != text:
            raise Violation(
                "a write is answered what it did",
                f"{op} at {op.at} was answered {text!r} instead of {op.result!r}",
                (f"#{op.id}",),
            )
        del self.ops[op.id]
        self._check_author(op)
        self._is_told(op, op.revision, f"{text}")

    def _written(self, op: Op, response: Any) -> None:
        if op.at is None:
            raise Violation(
                "a write is answered only when it is committed",
                f"{op} was answered {response!r}, but is not in the log",
                (f"#{op.id}",),
            )
        del self.ops[op.id]
        self._check_author(op)
        expected = op.result
        header = response.header
        response.header = None
        if isinstance(expected, EtcdError) or (expected is not None and response != expected):
            raise Violation(
                "a write is answered what it did",
                f"{op} {op.request!r} at {op.at} was answered {response!r} instead of {expected!r}",
                (f"#{op.id}",),
            )
        # A compaction that is physical is answered when it is done, with the revision then.
        late = op.number == _COMPACT and header.revision >= op.revision
        if op.number != _ALARM and header.revision != op.revision and not late:
            raise Violation(
                "a write is answered with its revision",
                f"{op} at {op.at} was answered with revision {header.revision} instead of "
                f"{op.revision}",
                (f"#{op.id}",),
            )
        if op.number == _GRANT:
            lease = self.lease_book[op.request.ID]
            lease.known_since = self.world.now
            self._promise(op.request.ID, lease, op.began)
        elif op.number == _COMPACT:
            self.compaction_answered = max(self.compaction_answered, op.request.revision)
        self._is_told(op, op.revision, "")

    def _is_told(self, op: Op, revision: int, why: str) -> None:
        assert op.at is not None
        if op.at < op.floor_at or revision < op.floor_revision:
            raise Violation(
                "writes take effect in real-time order",
                f"{op} is at {op.at}, revision {revision}, in the log, but when it began a client "
                f"had been told of {op.floor_at}, revision {op.floor_revision}",
                (f"#{op.id}",),
            )
        self.answered_at = max(self.answered_at, op.at)
        self.answered_revision = max(self.answered_revision, revision)

    # Reads.

    def _read(self, op: Op, response: Any) -> None:
        header = response.header
        response.header = None
        revision = header.revision
        request = op.request
        serializable = _is_serializable(op)
        floor = op.floor_told if serializable else op.floor_revision
        if revision < floor:
            raise Violation(
                "a read is not answered from the past",
                f"{op} was answered from revision {revision}, but when it began revision {floor} "
                "had been told" + (" on this connection" if serializable else ""),
                (f"#{op.id}",),
            )
        if revision > self.revision:
            raise Violation(
                "a read is answered from what is committed",
                f"{op} was answered from revision {revision}, the last one is {self.revision}",
                (f"#{op.id}",),
            )
        self._check_permitted(op, self.auth.of_revision(revision) if self.auth.latest else ())
        if not serializable:
            self.answered_revision = max(self.answered_revision, revision)
        if op.number == _TXN:
            expected = self._txn_at(request, revision)
        else:
            state = self.states[request.revision or revision]
            expected = None if state is None else self.select(state, request)
            if request.revision and not serializable and request.revision < op.floor_compacted:
                raise Violation(
                    "what is compacted cannot be read",
                    f"{op} of revision {request.revision} was answered",
                    (f"#{op.id}",),
                )
        if expected is not None and response != expected:
            raise Violation(
                "a read is answered what stands there",
                f"{op} {request!r} was answered from revision {revision}: {response!r} instead of "
                f"{expected!r}",
                (f"#{op.id}",),
            )

    def _txn_at(self, request: Any, revision: int) -> Any:
        state = self.states[revision]
        if state is None:
            return None
        view = PlainStore()
        view.states = _Upto(self.states, revision)  # type: ignore[assignment]
        view.compacted = self.compacted if self.compacted <= revision else 0
        try:
            return view.txn(request)
        except EtcdError:
            return None

    def _read_failed(self, op: Op, text: str) -> None:
        if text in REFUSED:
            return
        if text in REFUSALS:
            self._check_refusal(op, text)
            return
        asked = getattr(op.request, "revision", 0)
        if text == error("Compacted").text and (0 < asked < self.compacted or op.number == _TXN):
            return
        if text == error("FutureRev").text and (asked > op.floor_revision or _is_serializable(op)):
            return
        if text == behind_error().text and _is_serializable(op):
            return
        raise Violation(
            "a read that can be answered is", f"{op} {op.request!r}: {text!r}", (f"#{op.id}",)
        )

    # Users.

    def _check_author(self, op: Op) -> None:
        """A write that was answered: the log says for whom it is."""
        author = op.author
        if author is None:
            return
        valid = any(
            identity is not None and identity.name == author.name and identity.is_valid(auth)
            for identity in op.identities
            for auth in self.auth.of_auth_revision(author.revision)
        )
        if author.is_member or not valid:
            raise Violation(
                "a request is for the user whose valid token it came with",
                f"{op} is for {author} in the log, and came with {_names(op)}",
                (f"#{op.id}",),
            )

    def judge(self, op: Op, answer: Any) -> None:
        """A request that is no write, and that `answer` is not told, was answered."""
        if op.name == "Auth.Authenticate":
            pass  # See `logged_in`.
        elif isinstance(answer, EtcdError):
            if answer.text in REFUSALS:
                self._check_refusal(op, answer.text)
        elif op.name.startswith("Auth."):
            self._check_told(op, comparable(op.name, answer))
        else:
            self._check_permitted(op, range(op.floor_auth, self.auth.latest + 1))
            if op.name == "Lease.LeaseTimeToLive":
                for key in answer.keys:
                    get = Op(op.id, "KV.Range", proto.RangeRequest(key=key), op.client, op.began)
                    get.identities = op.identities
                    self._check_permitted(get, range(op.floor_auth, self.auth.latest + 1))

    def _outcomes(self, op: Op, number: int) -> set[str]:
        """What a member in that state may say of a request: the text of an error, or "" if it is
        permitted."""
        auth = self.auth.versions[number].auth
        return {self._outcome(op, auth, identity) for identity in op.identities}

    def _outcome(self, op: Op, auth: PlainAuth, identity: Token | Certificate | None) -> str:
        if not auth.enabled or op.name == "Maintenance.Status":
            return ""  # Anybody may ask for the status, even with a token that is not valid.
        author = None
        if identity is not None:
            if not identity.is_valid(auth):
                return _INVALID_TOKEN
            author = Author(identity.name, auth.revision)
        try:
            auth.check(author, op.name, op.request, None)
        except EtcdError as refused:
            return refused.text
        return ""

    def _check_permitted(self, op: Op, numbers: Any) -> None:
        """One of these versions permits what was done."""
        if self.auth.latest and not any("" in self._outcomes(op, number) for number in numbers):
            raise Violation(
                "what is done was permitted",
                f"{op} {op.request!r} of {_names(op)} was answered, but "
                + "; ".join(
                    f"auth revision {self.auth.versions[number].auth.revision}: "
                    f"{sorted(self._outcomes(op, number))}"
                    for number in numbers
                ),
                (f"#{op.id}", "Auth."),
            )

    def _check_told(self, op: Op, told: Any) -> None:
        """A read of users and roles: permitted, and what was there then."""
        for number in range(op.floor_auth, self.auth.latest + 1):
            auth = self.auth.versions[number].auth
            try:
                if "" in self._outcomes(op, number) and auth.read(op.name, op.request) == told:
                    return
            except EtcdError:
                pass
        raise Violation(
            "users and roles are told as they are, and to those who may know",
            f"{op} {op.request!r} of {_names(op)} was answered {told!r}",
            (f"#{op.id}", "Auth."),
        )

    def _check_refusal(self, op: Op, text: str) -> None:
        """A request was refused before it could be carried out: for a reason that was true."""
        op.is_refused = True
        versions = self.auth.versions[op.floor_auth :]
        if any(self._would_refuse(op, version.auth, text) for version in versions):
            return
        if text == _INVALID_TOKEN and self._may_have_expired(op):
            return
        # A read that takes a while is refused if users or roles change beside it.
        if not op.is_write and text == _OLD_REVISION and len(versions) > 1:
            return
        raise Violation(
            "a request is refused only for a reason that is true",
            f"{op} {op.request!r} of {_names(op)} was refused with {text!r}, at the auth revisions "
            f"{versions[0].auth.revision} to {versions[-1].auth.revision}",
            (f"#{op.id}", "Auth."),
        )

    def _would_refuse(self, op: Op, auth: PlainAuth, text: str) -> bool:
        if any(self._outcome(op, auth, identity) == text for identity in op.identities):
            return True
        if text == _DENIED and auth.enabled:
            # Keys of a lease are checked besides; which ones there were is not known here.
            has_lease = bool(list(leases_of(op.name, op.request))) or getattr(
                op.request, "keys", False
            )
            return has_lease and any(
                identity is not None and "root" not in auth.users[identity.name].roles
                for identity in op.identities
                if identity is not None and identity.name in auth.users
            )
        if op.name.startswith("Auth.") and not op.is_write:
            try:
                auth.read(op.name, op.request)
            except EtcdError as failure:
                return failure.text == text
        return False

    def _may_have_expired(self, op: Op) -> bool:
        now = self.wall_clock_s + self.world.now + EXPIRY_SLACK_S
        return any(identity is not None and identity.ends < now for identity in op.identities)

    # Logins.

    def logged_in(self, op: Op, text: str) -> Token:
        """A client was given a token."""
        request = op.request
        numbers = range(op.floor_auth, self.auth.latest + 1)
        auths = [self.auth.versions[number].auth for number in numbers]
        if not request.name:
            known = next((t for t in op.client.tokens if t.text == request.password), None)
            if text != request.password or known is None:
                raise Violation("a token counts as it is", f"{op} was given another one")
            if not any(auth.enabled and known.is_valid(auth) for auth in auths):
                raise Violation(
                    "a token counts only while it is valid",
                    f"{op}: the token of {known.name!r}, of auth revision {known.revision}",
                    (f"#{op.id}", "Auth."),
                )
            return known
        token = Token(text)
        # It is of the state in which the login began.
        token.keys = frozenset(auth.key for auth in auths if auth.revision == token.revision)
        if token.name != request.name or not any(
            auth.enabled and auth.revision == token.revision and self._is_right(auth, request)
            for auth in auths
        ):
            raise Violation(
                "a token is given only for the right password",
                f"{op}: {request!r}, token of {token.name!r} and auth revision {token.revision}",
                (f"#{op.id}", "Auth."),
            )
        return token

    def login_failed(self, op: Op, failure: EtcdError) -> None:
        """A client was not given one."""
        text, request = failure.text, op.request
        if text not in REFUSALS:
            return
        for number in range(op.floor_auth, self.auth.latest + 1):
            auth = self.auth.versions[number].auth
            if not auth.enabled:
                why = "AuthNotEnabled"
            elif request.name:
                why = "" if self._is_right(auth, request) else "AuthFailed"
            else:
                token = next(t for t in op.client.tokens if t.text == request.password)
                why = "" if token.is_valid(auth) else "InvalidAuthToken"
                if token.ends < self.wall_clock_s + self.world.now + EXPIRY_SLACK_S:
                    why = "InvalidAuthToken"
            if why and error(why).text == text:
                return
        raise Violation(
            "a login is refused only for a reason that is true",
            f"{op} {request!r} was refused with {text!r}",
            (f"#{op.id}", "Auth."),
        )

    @staticmethod
    def _is_right(auth: PlainAuth, request: Any) -> bool:
        user = auth.users.get(request.name)
        return user is not None and user.has_password and is_right(request.password, user.password)

    def new_password(self) -> str:
        """One that no other user ever had."""
        self._passwords.append(f"password {len(self._passwords)}")
        return self._passwords[-1]

    def password_of(self, name: str) -> str:
        """What a user would know."""
        user = self.auth.now.users.get(name)
        if user is None or not user.password:
            return "none"
        return next(p for p in reversed(self._passwords) if is_right(p, user.password))

    def compare_auth(self, who: str, index: int, auth: Any) -> None:
        """A member's users and roles after entry `index`."""
        expected = self.auth.versions[self.auth.number_at(index)].auth.text()
        found = text_of(auth)
        if found != expected:
            raise Violation(
                "members have equal users and roles at equal places of the log",
                f"after entry {index} {who} has {found} instead of {expected}",
                (who, "Auth."),
            )

    # Leases.

    def _promise(self, lease_id: int, lease: Lease, since: float) -> None:
        until = since + lease.ttl_s * (1 - self.skew)
        if lease.ended_at is not None and lease.ended_at < (
            until - self._early_s if lease.ended_by == "expiry" else since
        ):
            raise Violation(
                "a renewal is answered only if the lease lives on",
                f"lease {lease_id:x} was revoked by {lease.ended_by} at {lease.ended_at:.3f}, but "
                f"what was asked at {since:.3f} was answered with a TTL of {lease.ttl_s} s",
                (f"lease {lease_id:x}", "elected"),
            )
        lease.promised_until = max(lease.promised_until, until)

    @property
    def _early_s(self) -> float:
        """How much earlier a lease may end, as its leader's clock is ahead within a turn."""
        return max(self.slack_s, self.world.clock_lead_s)

    def renewed(self, lease_id: int, asked_at: float, response: Any) -> None:
        """A client was told of a renewal that it asked for at `asked_at`."""
        lease = self.lease_book.get(lease_id)
        if response.TTL > 0:
            if lease is None:
                raise Violation("only leases that exist are renewed", f"lease {lease_id:x}")
            if lease.ttl_s != response.TTL:
                raise Violation(
                    "a renewal gives the granted TTL",
                    f"lease {lease_id:x}: {response.TTL} instead of {lease.ttl_s}",
                )
            self._promise(lease_id, lease, asked_at)
        elif lease is not None and lease.ended_at is None:
            end = lease.promised_until - self._early_s
            if lease.known_since < asked_at and self.world.now < end:
                raise Violation(
                    "a lease that lives is renewed",
                    f"lease {lease_id:x} was reported gone "
                    f"{lease.promised_until - self.world.now:.3f} s before its end",
                    (f"lease {lease_id:x}",),
                )

    def time_to_live(self, op: Op, response: Any) -> None:
        """A linearizable question about a lease was answered."""
        self.answers += 1
        lease = self.lease_book.get(op.request.ID)
        if response.TTL >= 0:
            if lease is None or (lease.ended_at is not None and lease.ended_at < op.began):
                raise Violation(
                    "a lease that ended is not reported alive", f"{op} {op.request.ID:x}"
                )
        elif lease is not None and lease.ended_at is None:
            raise Violation("a lease that lives is reported", f"{op} {op.request.ID:x}")

    # Hashes.

    def hashed(self, kind: str, who: str, revision: int, compacted: int, value: int) -> None:
        """A member's hash at a revision. `kind`: etcd's, or the one that members compare."""
        known = self.hashes.setdefault((kind, revision, compacted), (value, who))
        if known[0] != value:
            raise Violation(
                "members have equal hashes at equal revisions",
                f"at revision {revision}, compacted at {compacted}, {who} has {value:x} and "
                f"{known[1]} {known[0]:x}",
                (who, known[1]),
            )


def _names(op: Op) -> str:
    names = [f"{i.name!r}" if i is not None else "nobody" for i in op.identities]
    return " or ".join(names)


class _Upto:
    """The states up to a revision, as a list."""

    def __init__(self, states: list[Any], revision: int) -> None:
        self._states = states
        self._revision = revision

    def __len__(self) -> int:
        return self._revision + 1

    def __getitem__(self, at: int) -> Any:
        return self._states[self._revision if at == -1 else at]


def _is_serializable(op: Op) -> bool:
    if op.number != _TXN:
        return bool(getattr(op.request, "serializable", False))
    return _all_serializable(op.request)


def _all_serializable(request: Any) -> bool:
    return all(
        o.request_range.serializable
        if o.request_range is not None
        else _all_serializable(o.request_txn)
        for o in (*request.success, *request.failure)
    )


def _needs_space(method: int, request: Any) -> bool:
    if method == _TXN:
        return any(
            op.request_put is not None
            or (op.request_txn is not None and _needs_space(_TXN, op.request_txn))
            for op in (*request.success, *request.failure)
        )
    return method in (_PUT, _GRANT)


def _check_understood(node: Any, entry: Any) -> None:
    if needed_version(entry.data) > node.version:
        raise Violation(
            "a program gets only entries that it understands",
            f"{node.name} is etcdlite {node.version}, and entry {entry.index} needs "
            f"{needed_version(entry.data)}",
            (node.name, "version"),
        )


class Safety:
    """Looks into all members; feeds the oracle with what is committed."""

    def __init__(self, world: Any, oracle: Oracle) -> None:
        self.world = world
        self.oracle = oracle
        self.leaders: dict[int, str] = {}
        """By term."""
        self.entries: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)]
        """(term, kind, size, crc) of what is applied somewhere, by index."""
        self.revisions = [oracle.revision]
        """The revision after each of these entries, by index."""
        self.committed: list[int] = [0]
        """The term of what is known to be committed somewhere, by index."""
        self.logged: dict[tuple[int, int], tuple[int, int]] = {}
        """(index, term) of every entry that was ever in a log: (term of the one before, crc)."""
        self.votes: dict[tuple[int, int], int] = {}
        """By (member, term): for whom it voted."""
        self.elections = 0
        self.snapshots = 0
        self.changes = 0

    def recovered(self, node: Any, opened: Any, raft: Any) -> None:
        """A member has read its disk, and is about to run on it."""
        applied = opened.store.applied_index
        for entry in opened.entries:
            if entry.index > applied:
                _check_understood(node, entry)
        if applied < len(self.entries) and applied:
            term = self.entries[applied][0]
            if opened.store.applied_term != term:
                raise Violation(
                    "a member recovers a state that was committed",
                    f"{node.name} has applied entry {applied} of term {opened.store.applied_term}, "
                    f"which is of term {term}",
                    (node.name,),
                )

    def started(self, node: Any) -> None:
        """Look at all that consensus hands out from now on."""
        raft = node.member.raft
        ready, save = raft.ready, node.wal.save
        seen = [raft.log.applied]
        durable = {entry.index: entry.term for entry in raft.log.entries}

        def looked_at() -> Any:
            found = ready()
            if found is not NOTHING_READY:
                self._look(node, raft, found, seen)
                for entry in found.committed_entries:
                    if durable.get(entry.index) != entry.term:
                        raise Violation(
                            "nothing is applied before it is durable",
                            f"{node.name} applies entry {entry.index} of term {entry.term}, and "
                            f"its disk has that of term {durable.get(entry.index)}",
                            (node.name, "elected"),
                        )
            return found

        def saved(hard_state: Any, entries: Any) -> None:
            save(hard_state, entries)
            durable.update((entry.index, entry.term) for entry in entries)

        raft.ready, node.wal.save = looked_at, saved
        step = node.member.on_message
        world = self.world

        def faulty_step(message: Any) -> None:
            if message.kind == VOTE_RESP and not message.reject:
                self._voted(message)
            dropped, doubled, held = world.message_faults
            luck = world.rng.random()
            if luck < dropped:
                return
            if luck < dropped + held:
                life = node._life

                def late() -> None:
                    if node._life == life and not node.is_paused:
                        step(message)
                        node.wake()

                world.at(world.rng.uniform(0.001, 0.5), late)
                return
            step(message)
            if luck < dropped + held + doubled:
                step(message)

        node.member.on_message = faulty_step

    def _look(self, node: Any, raft: Any, ready: Any, seen: list[int]) -> None:
        if ready.entries and not raft.is_alone:
            # Who is alone may lose what it has not synced, and use the same term again.
            self._logged(node, raft, ready.entries)
        log = raft.log
        if log.committed > seen[0]:
            self._committed(node, log, seen)
        if ready.soft_state is not None and ready.soft_state.role == LEADER:
            self._elected(node, raft)
        if ready.snapshot is not None:
            self.snapshots += 1
        if ready.committed_entries:
            self._applied(node, ready.committed_entries)

    def _voted(self, message: Any) -> None:
        other = self.votes.setdefault((message.sender, message.term), message.to)
        if other != message.to:
            raise Violation(
                "a member votes once in a term (election safety)",
                f"{message.sender:x} has voted for {other:x} and for {message.to:x} in term "
                f"{message.term}",
            )
        if self.world.voter_crashes and self.world.rng.random() < self.world.voter_crashes:
            voters = [n for n in self.world.nodes.values() if n.member_id == message.sender]
            for voter in voters:  # None if another member is in its place since.
                self.world.at(0.0, partial(self._crash, voter))

    @staticmethod
    def _crash(node: Any) -> None:
        if node.is_up:
            node.lose_power()
            node.on_stop(node)

    def _logged(self, node: Any, raft: Any, entries: Any) -> None:
        logged = self.logged
        before = raft.log.term(entries[0].index - 1)
        for entry in entries:
            if entry.kind != ENTRY_CONF_CHANGE:
                _check_understood(node, entry)
            what = (before, crc32(entry.data))
            known = logged.setdefault((entry.index, entry.term), what)
            if known != what and known[0] != -1 and before != -1:
                raise Violation(
                    "logs with the same entry at an index are the same up to it (log matching)",
                    f"{node.name} has another entry {entry.index} of term {entry.term}, or another "
                    "one before it",
                    (node.name, "elected"),
                )
            before = entry.term
            if entry.kind == ENTRY_CONF_CHANGE and raft.role == LEADER:
                self._changing(node, raft.log)

    def _changing(self, node: Any, log: Any) -> None:
        first = max(log.applied, log.offset) - log.offset
        changes = [e.index for e in log.entries[first:] if e.kind == ENTRY_CONF_CHANGE]
        if len(changes) > 1:
            raise Violation(
                "one membership change at a time",
                f"{node.name} has {changes} in its log and has applied {log.applied}",
                (node.name, "joins"),
            )

    def _committed(self, node: Any, log: Any, seen: list[int]) -> None:
        committed = self.committed
        for index in range(max(seen[0], log.offset) + 1, log.committed + 1):
            term = log.term(index)
            while len(committed) <= index:
                committed.append(-1)
            if committed[index] == -1:
                committed[index] = term
            elif committed[index] != term:
                raise Violation(
                    "what is committed stays (state machine safety)",
                    f"{node.name} takes entry {index} of term {term} for committed, elsewhere it "
                    f"is the one of term {committed[index]}",
                    (node.name, "elected"),
                )
        seen[0] = log.committed

    def _elected(self, node: Any, raft: Any) -> None:
        self.elections += 1
        self.world.note(f"{node.name} leads in term {raft.term}")
        other = self.leaders.setdefault(raft.term, node.name)
        if other != node.name:
            raise Violation(
                "a term has at most one leader (election safety)",
                f"in term {raft.term} both {other} and {node.name} were elected",
                (other, node.name),
            )
        log = raft.log
        for index in range(len(self.committed) - 1, log.offset, -1):
            term = self.committed[index]
            # Who was elected long ago and learns of it only now may lack what came later.
            if term <= raft.term and term != -1 and log.term(index) != term:
                raise Violation(
                    "a leader has everything that was committed (leader completeness)",
                    f"{node.name} leads in term {raft.term} without entry {index} of term {term}",
                    (node.name, "elected", "loses power"),
                )

    def _applied(self, node: Any, entries: Any) -> None:
        known = self.entries
        for entry in entries:
            index = entry.index
            what = (entry.term, entry.kind, len(entry.data), crc32(entry.data))
            if index < len(known):
                if known[index] != what:
                    raise Violation(
                        "all members apply the same entry at an index (state machine safety)",
                        f"{node.name} applies another entry {index}, of term {entry.term}",
                        (node.name, "elected"),
                    )
                continue
            if index != len(known):
                raise Violation(
                    "entries are applied without a gap",
                    f"{node.name} applies entry {index}, the last one anywhere is {len(known) - 1}",
                    (node.name,),
                )
            known.append(what)
            if entry.kind == ENTRY_CONF_CHANGE:
                self.changes += 1
            if entry.data:
                self.oracle.carry_out(index, entry.data)
            self.revisions.append(self.oracle.revision)


class Watched:
    """What one watch must be told next."""

    def __init__(self, oracle: Oracle, name: str, key: bytes, range_end: bytes) -> None:
        self.oracle = oracle
        self.name = name
        self.key = key
        self.range_end = range_end
        self.wants_puts = True
        self.wants_deletes = True
        self.prev_kv = False
        self.next = 0
        """The first revision that it was not told of; 0: not known yet."""
        self.events = 0
        self._place = 0
        """How many events of that revision it was told."""

    def created(self, revision: int, start: int) -> None:
        """The server has begun the watch, when it was at `revision`."""
        self._place = 0
        if not start:
            self.next = revision + 1

    def told(self, response: Any) -> None:
        """Events came."""
        oracle = self.oracle
        for event in response.events:
            kv = event.kv
            revision = kv.mod_revision
            while True:
                if self.next > oracle.revision:
                    self._wrong("told of nothing that did not happen", event)
                expected = self._matching(self.next)
                if self._place < len(expected):
                    break
                self.next += 1
                self._place = 0
            key, is_delete, expected_kv = expected[self._place]
            if revision != self.next or kv.key != key:
                if revision < self.next:
                    self._wrong("told each event once and in order", event)
                self._wrong("told every event", event, f"{key!r} at revision {self.next}")
            if (event.type == 1) != is_delete or kv != expected_kv:
                self._wrong("told what happened", event, f"{expected_kv!r}")
            if self.prev_kv:
                self._check_previous(event, revision, key)
            self._place += 1
            self.events += 1
        if response.events and not response.fragment:
            if self._place < len(self._matching(self.next)):
                self._wrong("told the events of a revision together", response.events[-1])
            self.next += 1
            self._place = 0
            if response.header.revision < response.events[-1].kv.mod_revision:
                self._wrong("told a revision that it has reached", response.events[-1])

    def progressed(self, revision: int) -> None:
        """It was told that nothing up to `revision` is missing."""
        while self.next <= min(revision, self.oracle.revision):
            expected = self._matching(self.next)
            if self._place < len(expected):
                raise Violation(
                    "a watch is told of progress only when it is true (bookmarkable)",
                    f"{self.name} was told of revision {revision}, but not of "
                    f"{expected[self._place][0]!r} at revision {self.next}",
                    (self.name,),
                )
            self.next += 1
            self._place = 0

    def compacted(self, revision: int) -> None:
        """It was cancelled, because what comes next is compacted."""
        if not self.next < revision <= self.oracle.compacted:
            raise Violation(
                "a watch is cancelled by a compaction only if it has missed something",
                f"{self.name}, next revision {self.next}, compacted at {revision}, in fact "
                f"{self.oracle.compacted}",
                (self.name,),
            )
        self.next = revision
        self._place = 0

    def check_complete(self) -> None:
        """Nothing happens any more, and everything must have come."""
        place = self._place
        for revision in range(self.next, self.oracle.revision + 1):
            expected = self._matching(revision)
            if place < len(expected):
                raise Violation(
                    "a watch is told every event (reliable)",
                    f"{self.name} was never told of {expected[place][0]!r} at revision {revision}",
                    (self.name,),
                )
            place = 0

    def _matching(self, revision: int) -> list[tuple[bytes, bool, Any]]:
        return [
            event
            for event in self.oracle.events[revision]
            if within(event[0], self.key, self.range_end)
            and (self.wants_deletes if event[1] else self.wants_puts)
        ]

    def _check_previous(self, event: Any, revision: int, key: bytes) -> None:
        state = self.oracle.states[revision - 1]
        expected = None if state is None else state.get(key)
        if event.prev_kv is None and (revision - 1 < self.oracle.compacted or state is None):
            return
        if state is not None and event.prev_kv != expected:
            self._wrong("told the value before", event, f"{expected!r}")

    def _wrong(self, claim: str, event: Any, expected: str = "") -> None:
        raise Violation(
            f"a watch is {claim}",
            f"{self.name}, next revision {self.next}, was told of {event!r}"
            + (f" instead of {expected}" if expected else ""),
            (self.name,),
        )
