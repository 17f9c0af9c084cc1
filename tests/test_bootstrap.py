"""How a member without data founds or joins a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from etcdlite import backup, bootstrap, datadir, proto
from etcdlite.bootstrap import NoAnswer
from etcdlite.datadir import Founding, StartError
from etcdlite.storage.layout import MEMBER, REMOVED
from etcdlite.urls import parse_initial_cluster

A, B, C = ("http://10.0.0.1:2380", "http://10.0.0.2:2380", "http://10.0.0.3:2380")
PAIRS = [("a", A), ("b", B), ("c", C)]
Fetch = Callable[[str], "tuple[int, list[Any]]"]


def founding(name: str = "a", token: str = "t") -> Founding:
    return bootstrap.new_cluster(name, PAIRS, token)


def cluster(**changes: Any) -> Founding:
    """The cluster of `PAIRS` with the client URLs and names that `changes` says, by URL's letter:
    a name, or None for a member that never ran."""
    given = founding()
    for member in given.members:
        name = changes.get(member.name, member.name)
        member.clientURLs = [f"http://{name}:2379"] if name else []
        member.name = name or ""
    return given


def answering(answer: Founding, *silent: str) -> Fetch:
    def fetch(url: str) -> tuple[int, list[Any]]:
        if url in silent:
            raise NoAnswer("connection refused")
        return answer.cluster_id, answer.members

    return fetch


# ------------------------------------------------------------------------------------ a new one


def test_the_ids_are_those_of_etcd() -> None:
    # As an etcd 3.5 gives them for this configuration.
    alone = bootstrap.new_cluster("default", [("default", "http://localhost:2380")], "etcd-cluster")
    assert f"{alone.member_id:x} {alone.cluster_id:x}" == "8e9e05c52164694d cdf818194e3a8c32"


def test_all_members_begin_with_the_same_cluster() -> None:
    a, b = founding("a"), bootstrap.new_cluster("b", reversed(PAIRS), "t")
    assert a.cluster_id == b.cluster_id and a.member_id != b.member_id
    assert sorted(m.encode() for m in a.members) == sorted(m.encode() for m in b.members)
    assert founding(token="other").cluster_id != a.cluster_id


def test_a_cluster_is_founded_while_no_other_member_runs() -> None:
    bootstrap.check_is_new(founding(), "a", PAIRS, answering(cluster(), B, C))


def test_a_member_that_has_not_run_yet_may_found_the_cluster_that_others_have_begun() -> None:
    bootstrap.check_is_new(founding(), "a", PAIRS, answering(cluster(a=None)))
    bootstrap.check_is_new(founding(), "a", PAIRS, answering(cluster(a=None), B))


def test_a_member_that_lost_its_data_does_not_found_its_cluster_again() -> None:
    with pytest.raises(StartError, match=r"has already been bootstrapped.*member remove") as raised:
        bootstrap.check_is_new(founding(), "a", PAIRS, answering(cluster(), B))
    assert f"{founding().member_id:x}" in str(raised.value)


def test_a_member_of_a_restored_cluster_that_lost_its_data_does_not_found_an_empty_one() -> None:
    """Its cluster has an id of its own. Two of three that lost their data had the majority."""
    restored = backup.of_backup(cluster(), revision=5, index=9)
    assert restored.cluster_id != founding().cluster_id
    with pytest.raises(StartError, match=r"has already been bootstrapped.*member remove"):
        bootstrap.check_is_new(founding(), "a", PAIRS, answering(restored, B))


def test_a_member_that_was_removed_does_not_found_the_cluster_again() -> None:
    rest = cluster()
    rest.members[:] = [member for member in rest.members if member.name != "a"]
    with pytest.raises(StartError, match=r"is not in the cluster any more.*member add"):
        bootstrap.check_is_new(founding(), "a", PAIRS, answering(rest))


def test_two_configurations_that_make_different_clusters_are_explained() -> None:
    with pytest.raises(StartError, match="the same on all members"):
        bootstrap.check_is_new(founding(token="typo"), "a", PAIRS, answering(cluster(a=None)))


def test_a_member_without_a_membership_decides_nothing() -> None:
    bootstrap.check_is_new(founding(), "a", PAIRS, answering(Founding(1, 2, [])))


def test_a_cluster_takes_the_place_of_another_one_member_by_member() -> None:
    new, old = founding(token="new"), cluster()

    def fetch(url: str) -> tuple[int, list[Any]]:
        if url not in answers:
            raise NoAnswer("connection refused")
        return answers[url].cluster_id, answers[url].members

    # The first one waits for a second one, the second one for nobody.
    answers = {B: old, C: old}
    with pytest.raises(bootstrap.OtherCluster, match="is to replace that one"):
        bootstrap.check_is_new(new, "a", PAIRS, fetch)
    answers = {C: old}
    bootstrap.check_is_new(new, "b", PAIRS, fetch)
    started = founding(token="new")
    for member in started.members:
        member.clientURLs = []
    answers = {B: old, C: started}
    bootstrap.check_is_new(new, "a", PAIRS, fetch)
    # But a member of the new cluster that lost its data is found out.
    for member in started.members:
        member.clientURLs = ["http://10.0.0.1:2379"]
    with pytest.raises(StartError, match="has already been bootstrapped"):
        bootstrap.check_is_new(new, "a", PAIRS, fetch)


# ------------------------------------------------------------------------------------ joining


def test_an_added_member_is_recognized_by_its_peer_urls() -> None:
    running = cluster(c=None)
    joined = bootstrap.join_cluster("c", PAIRS, answering(running, A))
    (own,) = (member for member in running.members if member.peerURLs == [C])
    assert joined == Founding(running.cluster_id, own.ID, running.members)


def test_no_answer_is_distinct_from_no_member_to_ask() -> None:
    with pytest.raises(NoAnswer, match=f"{A}: connection refused; {B}: connection refused"):
        bootstrap.join_cluster("c", PAIRS, answering(cluster(), A, B))
    with pytest.raises(StartError, match="it names no other member") as raised:
        bootstrap.join_cluster("c", [("c", C)], answering(cluster()))
    assert not isinstance(raised.value, NoAnswer)


def test_a_member_that_was_not_added_is_told_to_be_added() -> None:
    pairs = [("a", A), ("d", "http://10.0.0.4:2380")]
    with pytest.raises(StartError, match=r"member add d --peer-urls=http://10\.0\.0\.4:2380"):
        bootstrap.join_cluster("d", pairs, answering(cluster()))


def test_an_initial_cluster_that_differs_from_the_cluster_is_refused_with_the_difference() -> None:
    pairs = [("a", A), ("x", "http://10.0.0.9:2380"), ("c", C)]
    with pytest.raises(
        StartError, match=rf"Missing peer URLs: {B}; peer URLs that are not .*: http://10\.0\.0\.9"
    ):
        bootstrap.join_cluster("c", pairs, answering(cluster(c=None)))


def test_a_member_that_lost_its_data_does_not_join_as_if_it_had_none() -> None:
    with pytest.raises(StartError, match="has already been bootstrapped"):
        bootstrap.join_cluster("c", PAIRS, answering(cluster()))
    # But it asks again when it was stopped before the leader had sent anything.
    assert bootstrap.join_cluster("c", PAIRS, answering(cluster()), has_data=True).members


def test_a_member_cannot_join_with_the_urls_of_another_name() -> None:
    pairs = [("a", A), ("b", B), ("z", C)]
    with pytest.raises(StartError, match="is c, not z"):
        bootstrap.join_cluster("z", pairs, answering(cluster()))


def test_a_member_that_knows_nobody_yet_is_no_answer_to_one_that_joins() -> None:
    with pytest.raises(NoAnswer, match="has not received the members yet"):
        bootstrap.join_cluster("c", PAIRS, answering(Founding(1, 2, [])))


def test_an_outdated_answer_does_not_keep_a_member_from_joining() -> None:
    current, outdated = cluster(c=None), cluster(c=None)
    outdated.members[:] = [member for member in outdated.members if member.peerURLs != [C]]

    def fetch(url: str) -> tuple[int, list[Any]]:
        return current.cluster_id, (outdated if url == A else current).members

    assert bootstrap.join_cluster("c", PAIRS, fetch).members == current.members


def test_a_member_is_refused_only_by_one_that_is_in_contact_with_a_leader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = cluster(c=None)
    added = list(running.members)
    running.members[:] = [member for member in added if member.peerURLs != [C]]
    has_leader = False
    waits: list[str] = []

    def fetch(url: str, linearizable: bool = True, dialing: Any = None) -> tuple[int, list[Any]]:
        if linearizable and not has_leader:
            raise NoAnswer("no leader")
        return running.cluster_id, running.members

    def wait(why: str) -> None:
        nonlocal has_leader
        waits.append(why)
        if len(waits) == 2:
            has_leader = True
        if len(waits) == 3:
            running.members[:] = added

    monkeypatch.setattr(bootstrap, "fetch_members", fetch)
    monkeypatch.setattr(bootstrap, "JOIN_RETRY_S", 0.0)
    with pytest.raises(StartError, match="has no member with the peer URLs"):
        bootstrap._join("c", PAIRS, wait, False, lambda url, target_id: None)
    assert len(waits) == 2 and "may be outdated" in waits[0]
    has_leader, running.members[:] = False, added
    assert bootstrap._join("c", PAIRS, wait, False, lambda url, target_id: None).members == added


def test_what_member_add_prints_is_accepted_whoever_else_is_there() -> None:
    # An unstarted member has no name, a learner has one, and another member has this one's name.
    running = cluster(b=None)
    (own,) = (member for member in running.members if member.peerURLs == [C])
    own.name = ""
    own.clientURLs = []
    running.members[0].isLearner = True
    printed = [f"c={A}", f"={B}", f"c={C}"]
    with pytest.raises(ValueError, match="not a list of NAME=URL"):
        parse_initial_cluster(printed, "c", [C])
    pairs = parse_initial_cluster(printed, "c", [C], joins=True)
    assert pairs == [("", A), ("", B), ("c", C)]
    assert bootstrap.join_cluster("c", pairs, answering(running)).member_id == own.ID


def test_a_member_that_joins_at_other_urls_than_it_advertises_is_told_both() -> None:
    with pytest.raises(ValueError, match=rf"it has c at {B}, but .* is {C}; make them the same"):
        parse_initial_cluster([f"a={A}", f"c={B}"], "c", [C], joins=True)
    with pytest.raises(ValueError, match="this member's name, c, is not in it"):
        parse_initial_cluster([f"a={A}", f"b={B}"], "c", [C], joins=True)


def test_a_removed_member_is_told_how_to_join_again() -> None:
    class Store:
        buckets = {REMOVED: {(7).to_bytes(8, "big"): b""}}

    with pytest.raises(StartError, match=r"was removed.*remove the data directory"):
        datadir.membership(Store(), 7)  # type: ignore[arg-type]


def test_the_members_of_a_store_are_its_membership() -> None:
    member = proto.Member(ID=7, name="a", peerURLs=[A])

    class Store:
        buckets = {MEMBER: {(7).to_bytes(8, "big"): member.encode()}}

    assert datadir.membership(Store(), 7) == [member]  # type: ignore[arg-type]
