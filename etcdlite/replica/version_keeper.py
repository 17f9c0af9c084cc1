"""What the leader does so that the cluster version fits the programs of the members.

It proposes a `ClusterVersion`

- to raise the version, once all other members, learners too, are connected and run programs that
  understand a newer one. The version of a program is in the first frame that it sends.
- to lower it, once a downgrade is enabled. From the moment of enabling nothing newer than the
  target is written; so all that follows the entry that lowers the version can be read by it.
- to end a downgrade, once all members run the program of the target version.
- to give the founding of a cluster of several members its number.

`downgrade` carries out Maintenance.Downgrade as etcd 3.6 does (server/etcdserver/v3_server.go,
version/manager.go), with versions of etcdlite.

Such an entry is itself newer than the oldest version. It is only proposed while all members are
connected and understand it. A proposal that is lost is not repeated: if a change is still due, the
leader makes a new one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from etcdlite import log, proto
from etcdlite.errors import FAILED_PRECONDITION, EtcdError, error
from etcdlite.methods import SET_CLUSTER_VERSION
from etcdlite.options import Options
from etcdlite.raft import LEADER, Raft
from etcdlite.replica.state import State
from etcdlite.replica.writes import Writes
from etcdlite.request import Done
from etcdlite.versions import NEGATIVE_LEASES, SETS_VERSION, Version, parse, previous

ACTIONS = proto.ENUMS["DowngradeRequest.DowngradeAction"]

CANCEL_ADVICE = "'etcdlite-ctl downgrade cancel' lets it rise again"

COMPARE_INTERVAL_S = 0.5
"""The leader compares the members' versions this often."""

WARN_PER_S = 1 / 600
"""Warnings per second that a downgrade keeps the cluster version down."""

RETRY_S = 3.0
"""A proposal without an effect after this time counts as lost, and another one may follow."""


class VersionKeeper:
    """What the leader does so that the cluster version fits the members' programs."""

    def __init__(
        self,
        state: State,
        raft: Raft,
        writes: Writes,
        versions: Callable[[], list[Version | None]],
        options: Options,
    ) -> None:
        """`versions` gives the versions of the programs of all other members, None for one that is
        not connected."""
        self._state = state
        self._storage_version = state.storage_version
        self._cluster_version = state.cluster_version
        self._raft = raft
        self._writes = writes
        self._versions = versions
        self._own = options.version
        self._compared_at = -math.inf
        self._proposed_at = -math.inf
        self._clock = state.clock
        self._timeout_s = options.request_timeout_s
        self._waiting: list[tuple[float, proto.DowngradeRequest, proto.ClusterVersion, Done]] = []
        """Requests that wait until their change is applied: (deadline, request, change, done)."""

    def tick(self, now: float) -> None:
        """Propose another version, if there should be one. `now` is in seconds."""
        if self._waiting:
            self._answer(now)
        before, self._storage_version = self._storage_version, self._state.storage_version
        if self._storage_version < before:
            # A member that joins with the older program gets a snapshot instead of newer entries.
            self._raft.compact(self._raft.log.applied, keeps_tail=False)
        if self._raft.role != LEADER or now - self._compared_at < COMPARE_INTERVAL_S:
            return
        self._compared_at = now
        change = self._next_change()
        if change is not None and now - self._proposed_at >= RETRY_S:
            self._proposed_at = now
            self._writes.propose_once([(SET_CLUSTER_VERSION, change)])
        target = self._cluster_version.target
        if target is not None and target == self._cluster_version.version < (self.lowest or target):
            what, why = "the cluster version stays down", f"a downgrade to {target} is enabled"
            log.warn(what, "downgrade", WARN_PER_S, why=why, next=CANCEL_ADVICE)

    def downgrade(self, request: proto.DowngradeRequest, done: Done) -> None:
        """Carry out a `DowngradeRequest` on the leader. `done` gets the response or an EtcdError.
        Raises EtcdError."""
        self._begin(self._clock() + self._timeout_s, request, done)

    def _begin(self, deadline: float, request: proto.DowngradeRequest, done: Done) -> None:
        cluster_version = self._cluster_version
        if request.action == ACTIONS["CANCEL"]:
            if cluster_version.target is None:
                raise error("NoInflightDowngrade")
            if cluster_version.version < SETS_VERSION > (self.lowest or cluster_version.version):
                raise EtcdError(
                    FAILED_PRECONDITION,
                    "etcdlite: not all members are connected and run etcdlite "
                    f"{SETS_VERSION} or later. Start it on all members, then try again",
                )
            target = None
        else:
            try:
                target = parse(request.version)
            except ValueError:
                raise error("WrongDowngradeVersionFormat") from None
            if target != previous(cluster_version.version):
                raise error("InvalidDowngradeTargetVersion")
            if cluster_version.target is not None:
                raise error("DowngradeInProcess")
            if self._keeps_up(target):
                text = "etcdlite: revoke the leases with negative ids first"
                raise EtcdError(FAILED_PRECONDITION, text)
            if request.action == ACTIONS["VALIDATE"]:
                done(self._response())
                return
        change = cluster_version.change(cluster_version.version, target)
        if not self._writes.propose_once([(SET_CLUSTER_VERSION, change)]):
            raise error("LeaderChanged")
        self._waiting.append((deadline, request, change, done))

    def _keeps_up(self, target: Version) -> bool:
        """The state has something that members of version `target` do not know."""
        return target < NEGATIVE_LEASES and self._state.lessor.has_negative_ids()

    def _answer(self, now: float) -> None:
        waiting, self._waiting = self._waiting, []
        for deadline, request, change, done in waiting:
            if self._cluster_version.has_target_of(change):
                done(self._response())
            elif now >= deadline:
                done(error("Timeout"))
            elif self._cluster_version.may_apply(change):
                self._waiting.append((deadline, request, change, done))
            else:  # Another change came first, so this one has no effect.
                try:
                    self._begin(deadline, request, done)
                except EtcdError as failure:
                    done(failure)

    def _response(self) -> bytes:
        response = proto.DowngradeResponse(version=str(self._cluster_version.version))
        return self._state.header + response.encode()

    @property
    def lowest(self) -> Version | None:
        """The lowest version of the members' programs; None if one is not connected."""
        versions = self._versions()
        known = [version for version in versions if version is not None]
        return min([self._own, *known]) if len(known) == len(versions) else None

    def _next_change(self) -> proto.ClusterVersion | None:
        cluster_version, lowest = self._cluster_version, self.lowest
        if (
            not cluster_version.founding
            and cluster_version.allows(SETS_VERSION)
            and len(self._state.membership.members) > 1
            # Otherwise an entry of an earlier term may give it another number.
            and self._state.store.applied_term == self._raft.term
        ):
            number = self._state.identity.incarnation
            return cluster_version.change(cluster_version.version, cluster_version.target, number)
        if lowest is None or lowest < SETS_VERSION:
            return None
        target = cluster_version.target
        if target is not None:
            if target < cluster_version.version:
                # A lease may have been granted while the downgrade was being enabled.
                return None if self._keeps_up(target) else cluster_version.change(target, target)
            if lowest == target and all(v == target for v in (self._own, *self._versions())):
                return cluster_version.change(cluster_version.version, None)
            return None
        return cluster_version.change(lowest, None) if lowest > cluster_version.version else None
