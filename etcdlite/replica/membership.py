"""The replicated membership of the cluster, and the rules for changing it.

The membership is part of the state machine: a `Member` message per member, and the ids of those
that were removed, in two buckets of the store. It changes only when an entry is applied, so it is
the same on every member at the same index. `apply` returns the change for consensus.

A change is checked twice, as in etcd. Before it is proposed, `check_safe` lets the leader refuse a
change that endangers the quorum. When it is applied, `check` refuses a change that contradicts the
membership. `check` depends only on the replicated state, so the result is the same on every member;
only `check_safe` may use a clock, the configuration or the connections.

The rules are those of etcd 3.6 (server/etcdserver/api/membership/cluster.go, mayAddMember and
mayRemoveMember of server/etcdserver/server.go).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from etcdlite import proto
from etcdlite.errors import FAILED_PRECONDITION, EtcdError, error
from etcdlite.mvcc import Store
from etcdlite.raft import ADD_LEARNER, ADD_VOTER, ConfChange
from etcdlite.raft import REMOVE as REMOVE_NODE
from etcdlite.replica.checks import ADD, PROMOTE, REMOVE, UPDATE, check_peer_urls
from etcdlite.storage.layout import MEMBER, REMOVED
from etcdlite.urls import check_url, host_port, is_local, is_wildcard

HEALTHY_S = 5.0
"""A member counts as healthy after this time in contact (as in etcd)."""

CHANGES = {ADD: "added", REMOVE: "removed", UPDATE: "updated", PROMOTE: "promoted"}
"""The actions, as log lines name them."""


class Membership:
    """The membership as applied. `members` by id, as `Member` messages; read only."""

    def __init__(self, store: Store, max_learners: int) -> None:
        self.max_learners = max_learners
        self.restore(store)

    def restore(self, store: Store) -> None:
        """Take the membership of a store."""
        self._store = store
        self.members: dict[int, proto.Member] = {
            int.from_bytes(key, "big"): proto.Member.decode(value)
            for key, value in sorted(store.buckets.get(MEMBER, {}).items())
        }
        self.removed = {int.from_bytes(key, "big") for key in store.buckets.get(REMOVED, {})}

    @property
    def voters(self) -> list[int]:
        return [i for i, member in self.members.items() if not member.isLearner]

    @property
    def learners(self) -> list[int]:
        return [i for i, member in self.members.items() if member.isLearner]

    # Applying.

    def check(self, change: Any) -> None:
        """Raise EtcdError if a `MemberChange` contradicts the membership."""
        member = change.member
        known = self.members.get(member.ID)
        if member.ID in self.removed:
            raise error("MemberNotFound")
        if change.action == ADD:
            if known is not None:
                raise error("MemberExist")
            self._check_urls_are_new(member)
            return
        if known is None:
            raise error("MemberNotFound")
        if change.action == UPDATE:
            self._check_urls_are_new(member)
        elif change.action == PROMOTE and not known.isLearner:
            raise error("MemberNotLearner")
        elif change.action == REMOVE and self.voters == [member.ID]:
            raise error("MemberNotEnoughStarted")

    def _check_urls_are_new(self, member: proto.Member) -> None:
        taken = {url for m in self.members.values() if m.ID != member.ID for url in m.peerURLs}
        if not taken.isdisjoint(member.peerURLs):
            raise error("PeerURLExist")

    def apply(self, change: Any) -> ConfChange | None:
        """Carry out a change that passed `check`. Returns the change for consensus, if any."""
        action, member = change.action, change.member
        if action == ADD:
            self._put(member)
            return ConfChange(ADD_LEARNER if member.isLearner else ADD_VOTER, member.ID)
        if action == REMOVE:
            del self.members[member.ID]
            self.removed.add(member.ID)
            key = member.ID.to_bytes(8, "big")
            self._store.set_bucket(MEMBER, key, None)
            self._store.set_bucket(REMOVED, key, b"")
            return ConfChange(REMOVE_NODE, member.ID)
        known = self.members[member.ID]
        if action == UPDATE:
            known.peerURLs = list(member.peerURLs)
            self._put(known)
            return None
        known.isLearner = False
        self._put(known)
        return ConfChange(ADD_VOTER, member.ID)

    def publish(self, attributes: proto.Member) -> None:
        """Set the name and client URLs of a member, unless it was removed."""
        member = self.members.get(attributes.ID)
        if member is not None:
            member.name = attributes.name
            member.clientURLs = list(attributes.clientURLs)
            self._put(member)

    def _put(self, member: proto.Member) -> None:
        self.members[member.ID] = member
        self.members = dict(sorted(self.members.items()))
        self._store.set_bucket(MEMBER, member.ID.to_bytes(8, "big"), member.encode())

    # The leader, before it proposes.

    def check_safe(
        self, change: Any, own_id: int, contact_s: Callable[[int], float], strict: bool
    ) -> None:
        """Raise EtcdError if a change might cost the cluster its quorum, or exceeds the configured
        number of learners.

        `contact_s` gives the seconds for which another member has been in contact without a gap, or
        a negative number if it is not. `strict` is etcd's strict-reconfig-check."""
        member = change.member
        if change.action == ADD and member.isLearner and len(self.learners) >= self.max_learners:
            raise error("TooManyLearners")
        if not strict:
            return
        if change.action == ADD:
            if not member.isLearner:
                if not self._enough_started_with_one_more(0):
                    raise error("MemberNotEnoughStarted")
                self._check_can_be_reached(member)
            count = len(self.voters)  # The new member may not come up: a quorum must do without.
            if count > 1 and self._healthy_voters(own_id, contact_s) < (count + 1) // 2 + 1:
                raise error("Unhealthy")
        elif change.action == PROMOTE:
            if not self._enough_started_with_one_more(1):
                raise error("MemberNotEnoughStarted")
        elif change.action == REMOVE:
            self._check_safe_removal(member.ID, own_id, contact_s)

    def _check_can_be_reached(self, added: proto.Member) -> None:
        """Refuse a voter on another machine, if a voter advertises only this machine's loopback.
        A sole voter is checked more closely (`Reachability`)."""
        if len(self.voters) == 1 or all(map(is_local, added.peerURLs)):
            return
        for voter in map(self.members.__getitem__, self.voters):
            if voter.peerURLs and all(map(is_local, voter.peerURLs)):
                raise EtcdError(
                    FAILED_PRECONDITION,
                    "etcdlite: the new member would count for the quorum and could not reach "
                    f"{voter.name}: to it, {', '.join(voter.peerURLs)} is its own machine. Correct "
                    f"that with 'etcdlite-ctl member update {voter.ID:x} --peer-urls=...'; or if "
                    "all members are on one machine, add it with --learner and promote it",
                )

    def _healthy_voters(self, own_id: int, contact_s: Callable[[int], float]) -> int:
        return sum(i == own_id or contact_s(i) > HEALTHY_S for i in self.voters)

    def _started(self, members: Iterable[int]) -> int:
        return sum(bool(self.members[i].name) for i in members)

    def _enough_started_with_one_more(self, started: int) -> bool:
        voters = self.voters
        started += self._started(voters)
        count = len(voters) + 1
        # With one member there is no other way to grow than over a quorum of two.
        return (started == 1 and count == 2) or started >= count // 2 + 1

    def _check_safe_removal(
        self, member_id: int, own_id: int, contact_s: Callable[[int], float]
    ) -> None:
        removed = self.members.get(member_id)
        if removed is None or removed.isLearner:
            return
        rest = [i for i in self.voters if i != member_id]
        if not rest or self._started(rest) < len(rest) // 2 + 1:
            raise error("MemberNotEnoughStarted")
        if member_id != own_id and contact_s(member_id) < 0:
            return  # It is not in contact, so the quorum does not need it.
        if self._healthy_voters(own_id, contact_s) - 1 < len(rest) // 2 + 1:
            raise error("Unhealthy")


def new_member(peer_urls: Iterable[str], is_learner: bool, token: str) -> proto.Member:
    """The `Member` of a MemberAddRequest. `token` is new every time, so that a machine that comes
    back under the same URLs is another member. Raises EtcdError."""
    urls = peer_urls_of(peer_urls)
    return proto.Member(ID=derive_member_id(urls, token), peerURLs=urls, isLearner=is_learner)


def peer_urls_of(peer_urls: Iterable[str]) -> list[str]:
    """The peer URLs that a client asked for, sorted and each of them once. Raises EtcdError unless
    the member can start with them and the others can dial them."""
    urls = sorted(set(peer_urls))
    check_peer_urls(urls)
    for url in urls:
        try:
            check_url(url)
            if is_wildcard(url) or not host_port(url)[1]:
                raise ValueError("not an address that others can dial")
        except ValueError as why:
            refused = error("MemberBadURLs")
            raise EtcdError(refused.code, f"{refused.text}: {url}: {why}") from None
    return urls


def derive_member_id(peer_urls: Iterable[str], token: str) -> int:
    return _id_of(("".join(sorted(peer_urls)) + token).encode("utf-8", "surrogateescape"))


def derive_cluster_id(member_ids: Iterable[int]) -> int:
    return _id_of(b"".join(member_id.to_bytes(8, "big") for member_id in sorted(member_ids)))


def _id_of(data: bytes) -> int:
    try:
        # hashlib itself loads OpenSSL, which takes 3.5 MB.
        from _sha1 import sha1  # type: ignore[import-not-found]
    except ImportError:
        from hashlib import sha1
    return int.from_bytes(sha1(data).digest()[:8], "big")
