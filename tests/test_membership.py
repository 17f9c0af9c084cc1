"""Which changes of the membership are refused before they are proposed: etcd's rules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from test_cluster import SMALL, Cluster

from etcdlite import proto
from etcdlite.errors import EtcdError
from etcdlite.replica import membership
from etcdlite.replica.membership import ADD, PROMOTE, REMOVE, Membership

OWN = 1
DOWN, YOUNG, HEALTHY = -1.0, 1.0, 6.0
"""How long a member has been in contact, in seconds."""


class Store:
    buckets: dict[int, Any] = {}


def members(count: int, *, unstarted: int = 0, learners: int = 0) -> Membership:
    found = Membership(Store(), 2)  # type: ignore[arg-type]
    for i in range(1, count + unstarted + learners + 1):
        name = "" if count < i <= count + unstarted else f"m{i}"
        found.members[i] = proto.Member(ID=i, name=name, isLearner=i > count + unstarted)
    return found


def verdict(found: Membership, action: int, member: proto.Member, **contact: float) -> str:
    """Empty if the change is allowed; `contact` of members by "m" and id, else healthy."""
    seconds: Callable[[int], float] = lambda i: contact.get(f"m{i}", HEALTHY)  # noqa: E731
    change = proto.MemberChange(action=action, member=member)
    try:
        found.check_safe(change, OWN, seconds, strict=True)
    except EtcdError as failure:
        return failure.name
    return ""


VOTER, LEARNER = proto.Member(ID=9), proto.Member(ID=9, isLearner=True)


@pytest.mark.parametrize("added", [VOTER, LEARNER])
def test_nothing_is_added_to_three_unless_all_have_been_in_contact_for_a_while(added: Any) -> None:
    assert verdict(members(3), ADD, added) == ""
    assert verdict(members(3), ADD, added, m2=DOWN) == "Unhealthy"
    assert verdict(members(3), ADD, added, m2=YOUNG) == "Unhealthy"
    # A learner that is away does no harm.
    assert verdict(members(3, learners=1), ADD, added, m4=DOWN) == ""


def test_no_voter_elsewhere_is_added_while_one_advertises_loopback_only() -> None:
    found = members(2)
    here, there = ["http://127.0.0.1:2380", "http://localhost:2380"], ["http://192.0.2.9:2380"]
    found.members[1].peerURLs = there
    found.members[2].peerURLs = here
    change = proto.MemberChange(action=ADD, member=proto.Member(ID=9, peerURLs=there))

    def refused(change: Any) -> str:
        try:
            found.check_safe(change, OWN, lambda i: HEALTHY, strict=True)
        except EtcdError as failure:
            return failure.text
        return ""

    assert "could not reach m2: to it, http://127.0.0.1:2380, http" in refused(change)
    found.check_safe(change, OWN, lambda i: HEALTHY, strict=False)
    change.member.isLearner = True
    assert refused(change) == ""
    change.member.isLearner = False
    change.member.peerURLs = here
    assert refused(change) == ""
    change.member.peerURLs = there
    found.members[2].peerURLs = [*here, *there]
    assert refused(change) == ""


def test_a_voter_is_added_if_enough_are_started() -> None:
    assert verdict(members(1), ADD, VOTER) == ""
    assert verdict(members(1, unstarted=1), ADD, VOTER) == "MemberNotEnoughStarted"
    assert verdict(members(2, unstarted=1), ADD, VOTER) == "MemberNotEnoughStarted"
    assert verdict(members(3, unstarted=1), ADD, VOTER) == ""
    assert verdict(members(2, unstarted=1), ADD, LEARNER, m3=DOWN) == "Unhealthy"


def test_a_member_is_added_if_the_others_have_a_quorum_without_it() -> None:
    """As in etcd since 3.5.30: also while a member is down, if there are enough others."""
    for count, spare in ((1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 2), (7, 2)):
        down = {f"m{i}": DOWN for i in range(2, 2 + spare)}
        for added in (VOTER, LEARNER):
            assert verdict(members(count), ADD, added, **down) == "", count
            if count > 1:
                too_many = down | {f"m{count}": YOUNG}
                assert verdict(members(count), ADD, added, **too_many) == "Unhealthy", count


def test_a_member_is_removed_if_a_healthy_majority_of_the_rest_remains() -> None:
    three = members(3)
    gone, other = three.members[2], three.members[3]
    assert verdict(three, REMOVE, gone) == ""
    # One that is down is no part of the majority.
    assert verdict(three, REMOVE, gone, m2=DOWN) == ""
    assert verdict(three, REMOVE, other, m2=DOWN) == "Unhealthy"
    assert verdict(three, REMOVE, three.members[OWN], m2=DOWN) == "Unhealthy"
    # Within five seconds of the start nothing is sure.
    assert verdict(three, REMOVE, gone, m2=YOUNG) == "Unhealthy"
    assert verdict(three, REMOVE, gone, m3=YOUNG) == "Unhealthy"
    five = members(5)
    assert verdict(five, REMOVE, five.members[2], m2=YOUNG) == ""
    assert verdict(five, REMOVE, five.members[2], m2=YOUNG, m3=YOUNG) == "Unhealthy"
    with_learner = members(3, learners=1)
    assert verdict(with_learner, REMOVE, with_learner.members[4], m2=DOWN, m3=DOWN) == ""


def test_the_last_ones_that_are_started_are_not_removed() -> None:
    two = members(1, unstarted=1)
    assert verdict(two, REMOVE, two.members[1]) == "MemberNotEnoughStarted"
    assert verdict(two, REMOVE, two.members[2], m2=DOWN) == ""
    alone = members(1)
    assert verdict(alone, REMOVE, alone.members[1]) == "MemberNotEnoughStarted"


def test_a_learner_is_promoted_if_enough_are_started() -> None:
    assert verdict(members(1, learners=1), PROMOTE, proto.Member(ID=2)) == ""
    found = members(1, unstarted=2, learners=1)
    assert verdict(found, PROMOTE, proto.Member(ID=4)) == "MemberNotEnoughStarted"


def test_right_after_the_start_nothing_is_changed() -> None:
    cluster = Cluster(**SMALL)
    client, leader = cluster.client, cluster.leader
    with pytest.raises(EtcdError, match="unhealthy cluster"):
        client.ask(leader, "Cluster.MemberRemove", ID=cluster.followers[0].member_id)
    for is_learner in (False, True):
        with pytest.raises(EtcdError, match="unhealthy cluster"):
            client.ask(
                leader, "Cluster.MemberAdd", peerURLs=["http://m4:2380"], isLearner=is_learner
            )
    cluster.world.run(5)
    cluster.add("m4", is_learner=True)


def test_a_url_counts_once_and_must_be_one_that_others_can_dial() -> None:
    url = "http://10.0.0.4:2380"
    assert membership.new_member([url, url], False, "t").peerURLs == [url]
    assert membership.peer_urls_of([url, "http://b:1", url]) == [url, "http://b:1"]
    for bad, why in (
        ("b:2380", "^etcdserver: given member URLs are invalid$"),
        ("http://0.0.0.0:2380", "invalid: http://0.0.0.0:2380: not an address that others can"),
        ("http://[::]:2380", "not an address that others can dial"),
        ("http://10.0.0.4:0", "not an address that others can dial"),
        ("unixs://10.0.0.4:2380", "^etcdserver: given member URLs are invalid$"),
    ):
        with pytest.raises(EtcdError, match=why.replace("[", r"\[")):
            membership.peer_urls_of([url, bad])


def test_a_token_of_any_bytes_counts_as_its_bytes() -> None:
    """The command line may have what is not UTF-8. etcd hashes the bytes of the token."""
    url = "http://127.0.0.1:2380"
    token = b"caf\xe9".decode("utf-8", "surrogateescape")
    digest = hashlib.sha1(url.encode() + b"caf\xe9").digest()
    assert membership.derive_member_id([url], token) == int.from_bytes(digest[:8], "big")
