"""A member answers from its own state only when that is not the past of another life."""

from __future__ import annotations

from typing import Any

import pytest
from rigs.processes import SMALL_FILES
from sim.world import Node
from test_cluster import SMALL, Cluster, backup_call, behind
from test_cluster_live import cluster as live_clusters

from etcdlite import proto
from etcdlite.errors import UNAVAILABLE, EtcdError
from etcdlite.wire import health

cluster_live = live_clusters


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(**SMALL)


def read(cluster: Cluster, node: Node) -> int:
    """The revision of a serializable read, 0 if it is refused."""
    try:
        answer = cluster.client.ask(node, "KV.Range", key=b"k", serializable=True)
    except EtcdError as failure:
        assert failure.code == UNAVAILABLE and "has not caught up" in failure.text
        return 0
    return int(answer.header.revision)


@pytest.mark.parametrize("is_learner", [True, False])
def test_a_member_that_joins_serves_when_it_has_what_was_committed(
    cluster: Cluster, is_learner: bool
) -> None:
    client, world = cluster.client, cluster.world
    world.run(5)  # Until the members count as healthy.
    for number in range(150):
        client.put(cluster.leader, b"k%d" % (number % 20), b"v" * 100)
    joining = cluster.add("m4", is_learner)
    catch_up = joining.member.catch_up
    catch_up.begin()
    assert catch_up.is_joining and read(cluster, joining) == 0
    assert health.status(joining.member, "") == proto.HealthCheckResponse.NOT_SERVING
    with pytest.raises(EtcdError, match="has not caught up"):
        backup_call(joining).message(b"")
    assert any(
        "has not caught up" in text for text in client.ask(joining, "Maintenance.Status").errors
    )
    world.run_until(lambda: catch_up.is_over)
    assert read(cluster, joining) >= 151 and not catch_up.is_joining
    assert health.status(joining.member, "") == proto.HealthCheckResponse.SERVING
    assert not client.ask(joining, "Maintenance.Status").errors
    if is_learner:
        client.ask(cluster.leader, "Cluster.MemberPromote", ID=joining.member_id)


def test_a_first_member_that_starts_late_is_behind_too(cluster: Cluster) -> None:
    late = cluster.followers[0]
    late.member.attributes = None
    world = cluster.world
    late.crash()
    late.start()
    catch_up = late.member.catch_up
    # As if it had never been there: its cluster does not know its client URLs.
    late.member.state.membership.members[late.member_id].clientURLs = []
    catch_up.begin()
    assert catch_up.is_behind and not catch_up.is_joining and read(cluster, late) == 0
    world.run_until(lambda: catch_up.is_over)
    assert read(cluster, late) and not catch_up.is_behind


def test_a_member_that_was_away_serves_its_state_but_is_not_ready(cluster: Cluster) -> None:
    client, world, away = cluster.client, cluster.world, cluster.followers[0]
    client.put(cluster.leader, b"k")
    cluster.agree()
    away.crash()
    client.put(cluster.leader, b"k")
    away.start()
    away.member.catch_up.begin()
    assert read(cluster, away) == 2 and not away.member.catch_up.is_over
    world.run_until(lambda: away.member.catch_up.is_over)
    assert read(cluster, away) == 3


@pytest.mark.parametrize("latency_s", [0.15, 0.3])
def test_a_member_far_from_the_leader_catches_up(cluster: Cluster, latency_s: float) -> None:
    """A round takes two round trips, which is longer than it is waited for."""
    world, far = cluster.world, cluster.followers[0]
    world.latency_s = (latency_s, latency_s + 0.002)
    far.member.catch_up.begin()
    world.run_until(lambda: far.member.catch_up.is_over, 20)


def test_a_member_that_was_alone_is_ready_without_the_others(cluster: Cluster) -> None:
    """Without a leader nobody can tell whether it is behind."""
    away = cluster.followers[0]
    cluster.client.put(cluster.leader, b"k")
    cluster.agree()
    for node in cluster.nodes:
        node.crash()
    away.start()
    away.member.catch_up.begin()
    cluster.world.run(20)
    assert read(cluster, away) == 2 and not away.member.catch_up.is_over


def test_a_member_that_receives_a_snapshot_refuses_to_serve_its_old_state() -> None:
    cluster, _, away = behind()
    world = cluster.world
    away.start()
    away.member.catch_up.begin()
    seen = [read(cluster, away)]

    def is_over() -> bool:
        seen.append(0 if away.member.catch_up.is_behind else away.member.state.store.revision)
        return away.member.catch_up.is_over

    world.run_until(is_over)
    seen.append(read(cluster, away))
    assert seen[0] == 1001 and seen[-1] == 1201
    # Its old state, then nothing, then what the leader has.
    assert set(seen) == {1001, 0, 1201} and sorted(seen, key=bool) != seen
    served = [revision for revision in seen if revision]
    assert served == sorted(served)


def answer(script: health.Script) -> int:
    """The status of a health check whose reads succeed."""
    try:
        next(script)
        while True:
            script.send(None)
    except StopIteration as done:
        return int(done.value[0])


def test_checks_keep_clients_away_but_do_not_have_a_member_restarted(cluster: Cluster) -> None:
    member = cluster.followers[0].member
    counts = health.HealthCounts()

    def status() -> list[int]:
        this_one = {"serializable": ["true"]}
        return [
            answer(health.serve_health(member, counts, this_one)),
            answer(health.serve_checks(member, counts, "/livez", {})),
            answer(health.serve_checks(member, counts, "/readyz", {})),
        ]

    assert status() == [200, 200, 200]
    member.catch_up.await_snapshot(1 << 40)
    assert status() == [200, 200, 503]
    # It has never had the data of its cluster.
    member.catch_up.is_over = False
    assert status() == [503, 200, 503]


def test_a_learner_that_is_ready_has_everything_and_can_be_promoted(cluster_live: Any) -> None:
    one = cluster_live(1, *SMALL_FILES)
    with one.members["m1"].client() as client:
        for number in range(300):
            client.put(f"k{number:03}", b"v" * 5000)
        learner = one.add("m2", is_learner=True)
        with learner.client() as other:
            assert other.range(prefix="k", serializable=True).count == 300
            assert other.status().revision == 301
        learner.wait_for_log("ready to serve client requests")
        client.member_promote(one.id_of(learner))


def test_a_forced_cluster_that_serves_has_one_member(cluster_live: Any) -> None:
    three = cluster_live(3)
    left = three.follower()
    for member in three.members.values():
        member.kill()
    left.start("--force-new-cluster")
    with left.client() as client:
        assert len(client.members(linearizable=False)) == 1
    left.kill()
    left.start()
    left.wait_for_log("ready to serve client requests")
    with left.client() as client:
        assert len(client.members()) == 1
