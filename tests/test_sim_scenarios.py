"""What went wrong in etcd's own history, reproduced, and shown not to happen here.

Each test names the issue of etcd-io/etcd. Some are told step by step; where the cause was a crash
or a race at a moment that matters, a simulation is aimed at it: its load and its faults meet there
again and again, and all checkers look on.
"""

from __future__ import annotations

from typing import Any

import pytest
from sim.calm import Calm
from sim.mutations import Mutation, prepare
from sim.simulation import Failure
from test_cluster import SMALL, Asker, Cluster, state

from etcdlite import proto, raft
from etcdlite.errors import EtcdError
from etcdlite.replica import suspicion
from etcdlite.snap import SnapshotError
from etcdlite.wire import api

CRASHES = {"kill": 20.0, "power": 20.0, "trip": 40.0}
MINUTES = 0.1


def aim(seeds: int = 3, **needs: Any) -> None:
    """Simulations of this kind find nothing."""
    for seed in range(1, seeds + 1):
        simulation = prepare(Mutation("", lambda patch: None, **needs), seed)
        try:
            simulation.run(MINUTES)
        except Failure as failure:
            pytest.fail(str(failure), pytrace=False)


def operation(**request: Any) -> Any:
    return proto.RequestOp(**request)


def test_13766_revisions_agree_after_a_crash_under_load() -> None:
    aim(load={"put": 80.0, "txn": 20.0}, faults={"kill": 60.0, "trip": 40.0}, mean_pause_s=0.5)


def test_14370_a_single_member_loses_no_acknowledged_write_in_a_crash() -> None:
    for moment in range(30):
        cluster = Cluster(1, seed=moment)
        client, world, node = cluster.client, cluster.world, cluster.leader
        asked = [client.send(node, "KV.Put", key=b"k%d" % i, value=b"v") for i in range(10)]
        world.run(0.0003 * moment)
        told = [i for i, request in enumerate(asked) if request in client.answers]
        node.crash(lambda path, sector: False)
        node.start()
        cluster.leader = world.elect()
        for i in told:
            assert client.get(node, b"k%d" % i) == b"v"


def test_14685_a_crash_during_defragmentation_leaves_members_equal() -> None:
    aim(
        load={"put": 40.0, "delete": 20.0, "compact": 6.0},
        faults={"defragment": 60.0, "trip": 60.0, "power": 20.0},
        mean_pause_s=0.3,
    )


def test_15220_progress_is_not_told_ahead_of_the_events() -> None:
    aim(
        load={"watches": 3, "slow": 1.0, "put": 80.0},
        faults={"hang_up": 30.0},
        tunables={
            "high_water_bytes": 2000,
            "slice_bytes": 200,
        },
    )


def test_15271_a_watch_does_not_go_back_in_time_after_a_partition() -> None:
    aim(load={"watches": 3}, faults={"partition": 40.0, "one_way": 20.0}, mean_pause_s=0.5)


class Sink:
    blocked = False

    def __init__(self) -> None:
        self.responses: list[Any] = []

    def send(self, body: bytes) -> None:
        self.responses.append(proto.WatchResponse.decode(body))

    @property
    def events(self) -> list[tuple[int, bytes, int]]:
        return [
            (event.kv.mod_revision, event.kv.key, event.type)
            for response in self.responses
            for event in response.events
        ]


def test_17247_a_transaction_gives_each_of_its_events_once() -> None:
    cluster = Cluster(**SMALL)
    client, world = cluster.client, cluster.world
    sinks = []
    for node in cluster.nodes:
        sink = Sink()
        node.member.hub.open(sink).create(proto.WatchCreateRequest(key=b"a", range_end=b"z"))
        sinks.append(sink)
    puts = [
        operation(request_put=proto.PutRequest(key=b"k%d" % i, value=b"v" * 300)) for i in range(9)
    ]
    for _ in range(3):
        client.ask(cluster.followers[0], "KV.Txn", success=puts)
    client.ask(
        cluster.leader,
        "KV.Txn",
        success=[
            operation(request_delete_range=proto.DeleteRangeRequest(key=b"k0", range_end=b"k5")),
            operation(request_put=proto.PutRequest(key=b"k7", value=b"")),
        ],
    )
    world.run(1)
    expected = [(r, b"k%d" % i, 0) for r in (2, 3, 4) for i in range(9)]
    expected += [(5, b"k%d" % i, 1) for i in range(5)] + [(5, b"k7", 0)]
    assert [sink.events for sink in sinks] == [expected] * 3


def test_17529_a_starved_stream_loses_no_event() -> None:
    aim(
        load={"watches": 3, "slow": 1.0, "put": 80.0, "delete": 20.0},
        faults={"away": 20.0, "slow_way": 20.0},
        tunables={"high_water_bytes": 2000},
    )


def test_17780_the_revision_does_not_go_back_after_a_crash_during_compaction() -> None:
    aim(load={"put": 40.0, "compact": 20.0}, faults=CRASHES, mean_pause_s=0.3)


def test_18089_and_19179_compacting_at_a_delete_drops_no_event() -> None:
    aim(
        load={"delete": 60.0, "put": 60.0, "compact": 20.0, "watches": 3},
        faults={"hang_up": 30.0, "kill": 20.0},
    )
    cluster = Cluster(**SMALL)
    client = cluster.client
    client.put(cluster.leader, b"k")
    client.put(cluster.leader, b"other")
    client.ask(cluster.leader, "KV.DeleteRange", key=b"k")
    client.ask(cluster.leader, "KV.Compact", revision=4, physical=True)
    sink = Sink()
    cluster.leader.member.hub.open(sink).create(
        proto.WatchCreateRequest(key=b"k", start_revision=4)
    )
    cluster.world.run(1)
    assert sink.events == [(4, b"k", 1)]


def test_18055_two_snapshots_in_a_row_do_not_stop_a_member() -> None:
    aim(
        members=5,
        load={"put": 80.0},
        faults={"away": 40.0, "move_leader": 40.0, "kill": 10.0, "slow_disk": 20.0},
        mean_pause_s=0.5,
    )


class UserAsker(Asker):
    """A client with a certificate."""

    is_member = False

    def __init__(self, world: Any, name: str) -> None:
        super().__init__(world)
        self.certificate_user = name
        self._next_id = 1 << 20

    def token(self, request_id: int) -> str:
        return ""


@pytest.mark.parametrize("comes_by", ["snapshot", "join", "restart"])
def test_14571_enabling_auth_leaves_members_equal(comes_by: str) -> None:
    """A member that gets users by a snapshot or from its disk must know what they may do. In etcd
    it refused what the others applied."""
    cluster = Cluster(**SMALL)
    nobody, world = UserAsker(cluster.world, ""), cluster.world
    root, ann = UserAsker(world, "root"), UserAsker(world, "ann")
    late = cluster.followers[0]
    permission = proto.Permission(permType=2, key=b"k", range_end=b"l")
    no_password = proto.UserAddOptions(no_password=True)
    for name, fields in (
        ("UserAdd", {"name": "root", "options": no_password}),
        ("UserGrantRole", {"user": "root", "role": "root"}),
        ("UserAdd", {"name": "ann", "options": no_password}),
        ("RoleAdd", {"name": "r"}),
        ("RoleGrantPermission", {"name": "r", "perm": permission}),
        ("AuthEnable", {}),
    ):
        nobody.ask(cluster.leader, f"Auth.{name}", **fields)
    cluster.agree()
    for node in cluster.nodes:
        with pytest.raises(EtcdError, match="permission denied"):
            ann.put(node, b"k")
    if comes_by == "snapshot":
        # It goes on with what it remembers.
        world.partition([late.name], [node.name for node in cluster.nodes if node is not late])
    root.ask(cluster.leader, "Auth.UserGrantRole", user="ann", role="r")
    with pytest.raises(EtcdError, match="user name is empty"):
        nobody.put(cluster.leader, b"k")
    for number in range(150):
        ann.put(cluster.leader, b"k%d" % (number % 20), b"v" * 100)
    store = late.member.state.store
    if comes_by == "snapshot":
        world.run(20)  # Its connections break, and what was sent on them is lost.
        ann.put(cluster.leader, b"k")
        world.heal()
        world.run_until(lambda: late.member.state.store is not store)
    elif comes_by == "restart":
        world.run(1)
        late.crash()
        late.start()
    else:
        world.run(6)
        cluster.client = root
        late = cluster.add("m4", is_learner=False)
        world.run_until(lambda: late.member.catch_up.is_over and late.member.raft.leader > 0)
    world.run_until(lambda: late.member.raft.leader > 0)
    # Now it applies entries of a user.
    ann.put(cluster.leader, b"k", b"new")
    cluster.agree(*cluster.nodes, late)
    assert ann.get(late, b"k") == b"new"
    ann.put(late, b"k", b"newer")
    assert ann.get(cluster.leader, b"k") == b"newer"
    for node in (cluster.leader, late):
        with pytest.raises(EtcdError, match="permission denied"):
            ann.put(node, b"other")
    cluster.agree(*cluster.nodes, late)


def test_14571_users_whose_rights_change_leave_members_equal() -> None:
    aim(seeds=2, users=True, faults={"away": 40.0, "kill": 20.0}, mean_pause_s=0.5)


def test_a_snapshot_that_is_offered_while_another_is_stored_waits_for_it() -> None:
    cluster = Cluster(**SMALL)
    client, world = cluster.client, cluster.world
    away = cluster.followers[0]
    away.crash()
    for number in range(150):
        client.put(cluster.leader, b"k%d" % (number % 20), b"v" * 100)
    away.start()
    incoming = away.member.incoming
    away.sync_factor = 100.0
    world.run_until(lambda: incoming.is_storing)
    term = away.member.raft.term
    other = proto.SnapshotOffer(index=10_000, term=9, leader_term=term, size_bytes=77, nonce=5)
    with pytest.raises(SnapshotError, match="being stored"):
        incoming.begin(incoming.connection, other)  # type: ignore[arg-type]
    # The same one again, over another connection, is only waited for.
    assert incoming.begin(incoming.connection, incoming.offer) == incoming.offset  # type: ignore[arg-type]
    away.sync_factor = 1.0
    cluster.agree()


def test_18667_a_compacted_revision_read_in_a_transaction_leaves_members_equal() -> None:
    cluster = Cluster(**SMALL)
    client, world = cluster.client, cluster.world
    for _ in range(5):
        client.put(cluster.leader, b"k")
    request = [
        operation(request_put=proto.PutRequest(key=b"k", value=b"new")),
        operation(request_range=proto.RangeRequest(key=b"k", revision=3)),
    ]
    # Members compact at their own pace; what a transaction reads must not depend on it.
    client.send(cluster.leader, "KV.Compact", revision=5)
    asked = client.send(cluster.followers[0], "KV.Txn", success=request)
    world.run_until(lambda: asked in client.answers)
    answer = client.answers[asked]
    assert isinstance(answer, EtcdError) and "compacted" in answer.text
    for node in cluster.nodes:
        node.crash()
        node.start()
    cluster.leader = world.elect()
    cluster.agree()
    assert client.get(cluster.leader, b"k") == b"v"


def test_20221_a_watch_on_a_future_revision_is_told_nothing_before() -> None:
    cluster = Cluster(**SMALL)
    client, world = cluster.client, cluster.world
    sinks = []
    for node in cluster.nodes:
        sink = Sink()
        stream = node.member.hub.open(sink)
        stream.create(proto.WatchCreateRequest(key=b"k", start_revision=6))
        stream.progress()
        sinks.append(sink)
    for _ in range(8):
        client.put(cluster.followers[0], b"k")
    world.run(1)
    for sink in sinks:
        assert [revision for revision, _, _ in sink.events] == [6, 7, 8, 9]
        told = [r.header.revision for r in sink.responses if r.watch_id == -1]
        assert all(revision >= 5 for revision in told)


def test_20418_a_paused_leader_gives_no_stale_read_and_renews_no_dead_lease() -> None:
    for pause_s in (0.5, 2.0, 10.0):
        cluster = Cluster(seed=3)
        client, world, old = cluster.client, cluster.world, cluster.leader
        client.put(old, b"k", b"1")
        lease = client.ask(old, "Lease.LeaseGrant", TTL=60).ID
        old.pause()
        world.run(pause_s)
        others = [node for node in cluster.nodes if node is not old]
        leading = [node for node in others if node.member.leads]
        if leading:
            client.put(leading[0], b"k", b"2")
            client.ask(leading[0], "Lease.LeaseRevoke", ID=lease)
        reader = Asker(world)
        read = reader.send(old, "KV.Range", key=b"k")
        renewals: list[Any] = []
        body = proto.LeaseKeepAliveRequest(ID=lease).encode()
        api.keep_alive(old.member, body, renewals.append)
        old.resume()
        world.run_until(lambda r=reader, i=read: i in r.answers)
        assert reader.answers[read].kvs[0].value == (b"2" if leading else b"1")
        if leading:
            world.run_until(lambda told=renewals: bool(told))
            assert proto.LeaseKeepAliveResponse.decode(renewals[0]).TTL == 0
        cluster.agree()


def test_an_expired_lease_is_revoked_only_in_the_term_that_let_it_expire() -> None:
    """A deposed leader's revoke must not reach the next leader, which has promised more."""
    cluster = Cluster(seed=5)
    client, world, old = cluster.client, cluster.world, cluster.leader
    rest = [node for node in cluster.nodes if node is not old]
    lease = client.ask(old, "Lease.LeaseGrant", TTL=2).ID
    world.run(1.5)
    world.partition([old.name], [node.name for node in rest])
    world.run_until(lambda: any(node.member.leads for node in rest))
    new = next(node for node in rest if node.member.leads)
    assert client.keep_alive(new, lease).TTL == 2
    world.heal()
    world.run(1.5)
    assert client.keep_alive(new, lease).TTL == 2
    assert {state(node)[2] for node in rest} == {state(new)[2]}


@pytest.mark.parametrize(("seed", "members"), [(1, 3), (2, 5)])
def test_no_leader_is_deposed_on_ordinary_days(seed: int, members: int) -> None:
    calm = Calm(seed, members)
    calm.run(60.0)
    assert not calm.is_deposed and calm.disturbances > 5


def test_a_leader_hands_over_only_to_a_faster_disk() -> None:
    """When all disks are equally slow, a handover only costs time."""
    calm = Calm(1)
    world = calm.world
    world.sync_s, world.quick_saves = (0.7, 0.7), 0.0
    with world.isolated():
        for _ in range(5):
            for node in calm.nodes:
                calm.put(node)
                world.run(2.8)
        # Another disk is faster when it syncs two entries together by chance.
        assert calm.handed_over <= 3 and calm.client.answers == 15
        before, leader = calm.handed_over, world.leader
        for node in calm.nodes:
            node.sync_factor = 1.0 if node is leader else 0.001
        calm.put(leader)
        world.run(2.8)
    assert calm.handed_over == before + 1 and world.leader not in (leader, None)


def test_a_shorter_margin_would_depose_leaders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspicion, "MARGIN_S", 0.2)
    monkeypatch.setattr(suspicion, "MARGIN_HEARTBEATS", 2.0)
    assert _deposes()


def test_a_suspicion_without_a_pre_vote_would_depose_leaders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One follower that hears nothing for a while would end the term by itself."""
    monkeypatch.setattr(raft.Raft, "campaign", lambda self: self._campaign(raft.VOTE, b""))
    assert _deposes()


def _deposes() -> bool:
    for seed in (4, 6, 7, 9):
        calm = Calm(seed)
        calm.run(60.0)
        if calm.is_deposed:
            return True
    return False
