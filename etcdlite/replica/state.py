"""The replicated state machine: store, leases, membership, alarms, users, cluster version, and how
requests change them.

`apply` carries out the requests of one entry in order, each with a revision of its own, and answers
the sessions that wait for them. `change_membership` applies an entry that changes the membership.
`restore` replaces the store by that of a snapshot from the leader.

Invariants: the same requests in the same order lead to the same state on every member. So nothing
here depends on chance, on what other members can be reached, or on a clock (the clock only starts
the timers of leases, on the leader). A request either fails before its first change or is carried
out completely. `refuse` alone decides which writes an active alarm forbids.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from etcdlite import log, methods, proto, txn
from etcdlite.auth import Auth, Author
from etcdlite.errors import EtcdError, error
from etcdlite.identity import Identity
from etcdlite.lease import KEY as LEASE_KEY
from etcdlite.lease_rights import LeaseRights
from etcdlite.metrics import Metrics
from etcdlite.mvcc import Store
from etcdlite.options import Options
from etcdlite.plain_txn import PlainTxn
from etcdlite.proto import varint, varint64
from etcdlite.raft import ConfChange
from etcdlite.raft_log import Entry
from etcdlite.replica.alarms import CORRUPT, NOSPACE, Alarms
from etcdlite.replica.cluster_version import ClusterVersion
from etcdlite.replica.membership import CHANGES, Membership
from etcdlite.replica.timeline import Timeline
from etcdlite.request import Steps, Waiter
from etcdlite.rights import KeySet
from etcdlite.storage.disk import NO_SPACE
from etcdlite.storage.layout import LEASE
from etcdlite.storage.steps import join_steps
from etcdlite.versions import KEEPS_TIMES, NEGATIVE_LEASES, Version

_EVEN_IF_CORRUPT = {methods.ALARM_METHOD} | {
    row.number for row in methods.ROWS if row.service in ("etcdserverpb.Auth", "etcdlite.Log")
}
"""Methods that the alarm CORRUPT does not forbid."""

_OUTDATED = ("UserEmpty", "AuthOldRevision")
"""Errors of requests that were checked before auth was enabled, or before users changed."""


class State:
    """The replicated state, as of the last entry that this member applied."""

    def __init__(
        self,
        store: Store,
        identity: Identity,
        metrics: Metrics,
        clock: Callable[[], float],
        propose: Callable[[int, proto.Message], None],
        options: Options,
    ) -> None:
        """`clock` returns monotonic seconds. `propose(method, request)` proposes a request of this
        member itself."""
        self.identity = identity
        self.metrics = metrics
        self.clock = clock
        self.store = store
        self.lessor = store.lessor
        self.auth = Auth(store)
        self.lease_rights = LeaseRights(self.auth, self.lessor)
        self.membership = Membership(store, options.max_learners)
        self.alarms = Alarms(store, identity.member_id, propose, clock, options)
        self.cluster_version = ClusterVersion(store)
        self.timeline = Timeline(store, self.cluster_version)
        self.awaiting_compaction: list[Waiter] = []
        """Physical compactions, to be answered when the superseded versions are dropped."""
        self.late_answers: deque[tuple[Steps, Waiter]] = deque()
        """Writes that are applied; the steps read the answers. They are begun already, so that what
        they need is pinned."""
        self.outdated: list[tuple[Waiter, EtcdError, Author | None]] = []
        """(waiter, error, author) of requests of the last entry that failed because users changed
        after the member that received them checked them. `Writes.propose_outdated` takes them."""
        self.awaits_space = False
        """There was no space for what was applied. Nothing is applied until a tick resets this."""

    def restore(self, store: Store) -> None:
        """Replace the store, and close the old one."""
        self.store.close()
        self.store = store
        self.lessor = store.lessor
        self.auth.restore(store)
        self.lease_rights = LeaseRights(self.auth, self.lessor)
        self.alarms.restore(store)
        self.membership.restore(store)
        self.cluster_version.restore(store)
        self.timeline.restore(store)

    @property
    def storage_version(self) -> Version:
        """The oldest etcdlite that can open the data directory. (Until the checkpoint that follows
        a rise of the cluster version, the log has what an older one cannot read.)"""
        return max(self.store.storage_version, self.cluster_version.version)

    @property
    def header(self) -> bytes:
        """A ResponseHeader with the current revision, as field 1 of a response."""
        return self.identity.header(self.store.revision)

    # Applying.

    def write_applied(self, last: Entry | None) -> bool:
        """Write changes to the data file: all of them and a mark if they end with the entry `last`,
        else only if they are large. Returns False if there is no space: the changes are kept, and
        the next call writes them."""
        try:
            if last is None:
                self.store.data.flush_part()
                self.store.shed_events()
            else:
                self.store.mark(last.index, last.term)
        except OSError as failure:
            if failure.errno not in NO_SPACE:
                raise
            self.awaits_space = True
            what = "no space for applied changes; trying again"
            log.error(what, "no space to apply", 0.1, error=str(failure))
            self.alarms.raise_nospace(failure)
        return not self.awaits_space

    def apply(self, requests: list[Waiter]) -> Generator[None, None, list[int]]:
        """Carry out the requests of an entry, in steps. Returns the methods of the failed ones."""
        # The hot path of writes: plain puts that follow each other are carried out together.
        store = self.store
        header = self.identity.header
        alarms = self.alarms.kinds
        auth = self.auth
        auth.author = None
        step_ops = step_left = store.limits.apply_step_ops
        failed: list[int] = []
        noted = store.revision
        """The last revision that the timeline has an author for. Plain puts after it have the same
        author."""
        writable: KeySet | None = None
        """What the author may write, as of the last plain put."""
        plain_puts: list[Waiter] = []
        """Those without a lease or an option that precede `waiter` and are not carried out yet."""
        for waiter in requests:
            session, request_id, method, request = waiter
            is_plain_put = method == methods.PUT and not (
                request.lease or request.prev_kv or request.ignore_value or request.ignore_lease
            )
            step_left -= 1
            if plain_puts and (step_left <= 0 or not is_plain_put):
                self._put(plain_puts)
                plain_puts = []
            if step_left <= 0:
                step_left = step_ops
                yield
            try:
                if auth.enabled:
                    if is_plain_put:  # Such a put changes neither the author nor its rights.
                        if writable is None:
                            yield from auth.learn_steps(auth.author)
                            writable = auth.writable(auth.author)
                        if not writable.holds(request.key):
                            raise error("PermissionDenied")
                    else:
                        writable = None
                        if store.revision != noted:
                            self.timeline.note_user(noted + 1, auth.author)
                            noted = store.revision
                        yield from self._check_author_steps(method, request)
                if alarms:
                    refuse(alarms, method, request)
                if is_plain_put:
                    plain_puts.append(waiter)
                    continue
                answer: bytes | None = None
                if method == methods.PUT:
                    answer = txn.put(store, request)
                    self.metrics.puts += 1
                    if request.ignore_value:
                        step_left = 0  # It has written a value, which may be large.
                elif method == methods.TXN:
                    if isinstance(request, PlainTxn):
                        step_left -= request.count
                        answer = txn.small_txn(store, request, session is not None)
                    else:
                        step_left -= len(request.success) + len(request.failure)
                    if answer is None:
                        answer = yield from self._txn_steps(waiter)
                    else:
                        self.metrics.count_txn(request, answer.startswith(b"\x10"))  # succeeded
                else:
                    step_left = 0  # Some take milliseconds.
                    answer = yield from self._applier_steps(waiter)
                if answer is None:
                    continue  # It is one of `late_answers`.
                revision = store.end_revision()
            except EtcdError as failure:
                assert not store.is_writing, "a request failed after its first change"
                failed.append(method)
                if auth.enabled and failure.name in _OUTDATED:
                    self.outdated.append((waiter, failure, auth.author))
                else:
                    waiter.fail(failure)
                continue
            except txn.Unanswerable as missing:
                # Applied as on every other member; only the answer is missing.
                store.end_revision()
                waiter.fail(missing.report())
                continue
            if session is None:
                continue
            if method == methods.COMPACT and request.physical:
                self.awaiting_compaction.append(waiter)
            else:
                session.reply(request_id, method, header(revision) + answer)
        if plain_puts:
            self._put(plain_puts)
        if (auth.enabled or self.timeline.knows_user) and store.revision != noted:
            self.timeline.note_user(noted + 1, auth.author)
        return failed

    def _check_author_steps(self, method: int, request: Any) -> Generator[None, None, None]:
        """Raise EtcdError unless the author may make the request."""
        auth = self.auth
        yield from auth.learn_steps(auth.author)
        auth.check(auth.author, method, request, is_applied=True)
        if puts := lease_puts(method, request):
            yield from self.lease_rights.write_steps(auth.author, puts)

    def _txn_steps(self, waiter: Waiter) -> Generator[None, None, bytes | None]:
        """Carry out a transaction. Returns the response without its header; None if that takes
        several steps: then it is one of `late_answers`."""
        store, (session, _, _, request) = self.store, waiter
        applied = yield from txn.apply_steps(store, request, session is not None)
        self.metrics.count_txn(request, applied.succeeded)
        if session is None:
            return b""
        if applied.can_answer_now(store.limits.step_bytes):
            return (yield from applied.answer_steps(store))
        steps = _late_steps(applied, store, self.identity.header(store.end_revision()))
        next(steps)
        self.late_answers.append((steps, waiter))
        return None

    def _applier_steps(self, waiter: Waiter) -> Generator[None, None, bytes | None]:
        """Carry out a request of a method in `APPLIERS`. Returns as `_txn_steps`."""
        session, _, method, request = waiter
        done = APPLIERS[method](self, request) or b""
        answer = done if isinstance(done, bytes) else (yield from done) or b""
        limits = self.store.limits
        if session is None or len(answer) <= limits.step_bytes:
            return answer
        header = self.identity.header(self.store.end_revision())
        self.late_answers.append((join_steps((header, answer), limits), waiter))
        return None

    def _put(self, waiters: list[Waiter]) -> None:
        """Carry out plain puts, and answer them."""
        revision, header = self.store.revision, self.identity.header
        puts = [(request.key, request.value, 0) for _, _, _, request in waiters]
        self.store.put_all(puts, own_revisions=True)
        self.metrics.puts += len(puts)
        for session, request_id, method, _ in waiters:
            revision += 1
            if session is not None:
                session.reply(request_id, method, header(revision))

    def change_membership(self, change: Any) -> ConfChange | None:
        """Apply a `MemberChange`. Returns the change for `Raft.apply_conf_change`, if consensus is
        concerned. Raises EtcdError, before any change, if the membership does not allow it."""
        self.membership.check(change)
        node = change.member.ID
        member = self.membership.members.get(node) or change.member
        conf_change = self.membership.apply(change)
        self.store.end_revision()
        log.info(
            f"{CHANGES[change.action]} member",
            member_id=f"{node:x}",
            peer_urls=",".join(member.peerURLs),
            local_member_id=f"{self.identity.member_id:x}",
        )
        return conf_change


def _late_steps(applied: txn.Applied, store: Store, header: bytes) -> Steps:
    """The answer to a transaction that is applied. Raises EtcdError."""
    try:
        return (yield from applied.answer_steps(store, header, is_late=True))
    except txn.Unanswerable as missing:
        raise missing.report() from None


def refuse(alarms: frozenset[int], method: int, request: Any) -> None:
    """Raise EtcdError for a write that active alarms of these kinds forbid."""
    if CORRUPT in alarms and method not in _EVEN_IF_CORRUPT:
        raise error("Corrupt")
    if NOSPACE in alarms and needs_space(method, request):
        raise error("NoSpace")


def needs_space(method: int, request: Any) -> bool:
    """Whether the alarm NOSPACE forbids a write: it forbids puts and leases, but not deletes."""
    if method != methods.TXN:
        return method in (methods.PUT, methods.LEASE_GRANT)
    if isinstance(request, PlainTxn):
        return request.put_count > 0
    return any(op.request_put is not None for op in txn.all_ops(request))


def lease_puts(method: int, request: Any) -> list[tuple[int, bytes | None]]:
    """Leases that the request attaches a key to, or revokes, as (lease, key or None if it is
    revoked). The author must be permitted to write all keys of these leases."""
    if method == methods.PUT:
        return [(request.lease, request.key)] if request.lease else []
    if isinstance(request, PlainTxn):
        return [(lease, key) for key, _, lease in request.puts if lease]
    if method == methods.TXN:
        puts = (op.request_put for op in txn.all_ops(request))
        return [(put.lease, put.key) for put in puts if put is not None and put.lease]
    return [(request.ID, None)] if method == methods.LEASE_REVOKE else []


# Appliers: one per method, except puts and transactions, which `State.apply` carries out itself.
# Each returns the response without its header (None: empty), or steps that return it. Errors are
# raised before the first change.

Applying = Steps | Generator[None, None, None] | bytes | None
"""What an applier returns."""


def _delete_range(state: State, request: proto.DeleteRangeRequest) -> Steps:
    state.metrics.deletes += 1
    return txn.delete_range_steps(state.store, request)


def _compact(state: State, request: proto.CompactionRequest) -> Generator[None, None, None]:
    state.store.compact(request.revision)
    yield from state.timeline.compact_steps(request.revision)


def _lease_grant(state: State, request: proto.LeaseGrantRequest) -> bytes:
    lessor = state.lessor
    if request.ID < 0 and not state.cluster_version.allows(NEGATIVE_LEASES):
        raise error("LeaseNotFound")
    ttl_s = lessor.grant(request.ID, request.TTL, state.clock())
    state.metrics.leases_granted += 1
    state.metrics.lease_ttl_s.observe(ttl_s)
    state.store.set_bucket(LEASE, LEASE_KEY.pack(request.ID), lessor.encode(request.ID))
    return b"\x10" + varint64(request.ID) + b"\x18" + varint(ttl_s)


def _lease_revoke(state: State, request: proto.LeaseRevokeRequest) -> Generator[None, None, None]:
    keys = yield from state.lessor.key_steps(request.ID)
    step_keys = state.store.limits.delete_step_keys
    if len(keys) > step_keys:
        state.store.begin_removal()
    for begin in range(0, len(keys), step_keys):
        if begin:
            yield
        state.store.delete(keys[begin : begin + step_keys])
    state.metrics.deletes += len(keys)
    state.lessor.revoke(request.ID)
    state.store.set_bucket(LEASE, LEASE_KEY.pack(request.ID), None)
    state.metrics.leases_revoked += 1


def _lease_checkpoint(state: State, request: proto.LeaseCheckpointRequest) -> None:
    lessor = state.lessor
    for checkpoint in request.checkpoints:
        if lessor.exists(checkpoint.ID):
            lessor.checkpoint(checkpoint.ID, checkpoint.remaining_TTL)
            key = LEASE_KEY.pack(checkpoint.ID)
            state.store.set_bucket(LEASE, key, lessor.encode(checkpoint.ID))


def _author(state: State, request: proto.Author) -> None:
    state.auth.author = Author(request.name, request.revision, request.is_member)


def _auth(change: Callable[[Auth, Any], Applying]) -> Callable[[State, Any], Applying]:
    """The applier of a method that changes users or roles."""
    return lambda state, request: change(state.auth, request)


def _cluster_version(state: State, request: proto.ClusterVersion) -> None:
    kept_times = state.cluster_version.allows(KEEPS_TIMES)
    state.cluster_version.apply(request)
    if kept_times and not state.cluster_version.allows(KEEPS_TIMES):
        state.timeline.stop()


WRITES = methods.numbers(methods.Route.WRITE)
"""The methods that an entry may hold, membership changes apart."""

APPLIERS: dict[int, Callable[[State, Any], Applying]] = methods.by_number(
    WRITES - {methods.PUT, methods.TXN},
    {
        "KV.DeleteRange": _delete_range,
        "KV.Compact": _compact,
        "Lease.LeaseGrant": _lease_grant,
        "Lease.LeaseRevoke": _lease_revoke,
        "Maintenance.Alarm": lambda state, request: state.alarms.apply(request),
        "Auth.AuthEnable": _auth(Auth.enable),
        "Auth.AuthDisable": _auth(Auth.disable),
        "Auth.UserAdd": _auth(Auth.add_user),
        "Auth.UserDelete": _auth(Auth.delete_user),
        "Auth.UserChangePassword": _auth(Auth.change_password),
        "Auth.UserGrantRole": _auth(Auth.grant_role),
        "Auth.UserRevokeRole": _auth(Auth.revoke_role),
        "Auth.RoleAdd": _auth(Auth.add_role),
        "Auth.RoleDelete": _auth(Auth.delete_role),
        "Auth.RoleGrantPermission": _auth(Auth.grant_permission),
        "Auth.RoleRevokePermission": _auth(Auth.revoke_permission),
        "Auth.RotateKey": _auth(Auth.rotate_key),
        "Log.Publish": lambda state, request: state.membership.publish(request),
        "Log.Checkpoint": _lease_checkpoint,
        "Log.Author": _author,
        "Log.Time": lambda state, request: state.timeline.time_steps(request.unix_s),
        "Log.TokenKey": _auth(Auth.set_key),
        "Log.Rehash": _auth(Auth.rehash),
        "Log.ClusterVersion": _cluster_version,
    },
)
