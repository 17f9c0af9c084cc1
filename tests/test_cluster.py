"""Members together, under virtual time: elections, replication, snapshots, membership, reads."""

from __future__ import annotations

import errno
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from rigs.wire import take_output
from sim.world import Node, World

from etcdlite import datadir, frames, log, methods, proto, snap
from etcdlite.errors import EtcdError, error
from etcdlite.limits import Limits
from etcdlite.raft import HEARTBEAT, HEARTBEAT_RESP, Message
from etcdlite.raft_log import ENTRY_CONF_CHANGE
from etcdlite.replica import rollback
from etcdlite.replica.alarms import CORRUPT, DISK_RESERVE_BYTES, NOSPACE
from etcdlite.replica.background import Background
from etcdlite.replica.leadership import MAX_TRANSFERS
from etcdlite.replica.suspicion import RECENT_S, Suspicion
from etcdlite.replica.writes import MAX_CHANGES
from etcdlite.request import Waiter
from etcdlite.storage.steps import finish
from etcdlite.watch import Quota
from etcdlite.wire import api, streams
from etcdlite.wire.http import HttpSession
from etcdlite.wire.site import Site

SMALL: dict[str, Any] = {
    "raft": {"log_tail_bytes": 2000},
    "checkpoint_bytes": 8000,
    "segment_bytes": 4096,
    "wal_segment_bytes": 4096,
}
"""Files so small that a member that was away for a hundred writes needs a snapshot."""


class Asker:
    """A client of every node, and what it was answered."""

    is_member = False
    is_blocked = False

    def __init__(self, world: World) -> None:
        self.world = world
        self.answers: dict[int, Any] = {}
        self._next_id = 0

    def awaits(self, request_id: int) -> bool:
        return True

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        assert request_id not in self.answers, "answered twice"
        self.answers[request_id] = methods.METHODS[method].response.decode(body)

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        assert request_id not in self.answers, "answered twice"
        self.answers[request_id] = failure

    def send(self, node: Node, name: str, /, **fields: Any) -> int:
        self._next_id += 1
        method = methods.METHOD_BY_NAME[name]
        request = method.request(**fields)
        frame = frames.frame(self._next_id, method.number, 0, request.encode())
        handle = api.HANDLERS[method.number][0]
        try:
            handle(node.member, Waiter(self, self._next_id, method.number, request), frame)
        except EtcdError as failure:
            self.fail(self._next_id, method.number, failure)
        node.turn()
        return self._next_id

    def ask(self, node: Node, name: str, /, **fields: Any) -> Any:
        """The response. Raises EtcdError."""
        request_id = self.send(node, name, **fields)
        self.world.run_until(lambda: request_id in self.answers)
        answer = self.answers[request_id]
        if isinstance(answer, EtcdError):
            raise answer
        return answer

    def put(self, node: Node, key: bytes, value: bytes = b"v") -> int:
        return int(self.ask(node, "KV.Put", key=key, value=value).header.revision)

    def get(self, node: Node, key: bytes, **fields: Any) -> bytes | None:
        kvs = self.ask(node, "KV.Range", key=key, **fields).kvs
        return kvs[0].value if kvs else None

    def keep_alive(self, node: Node, lease_id: int) -> Any:
        answers: list[Any] = []
        body = proto.LeaseKeepAliveRequest(ID=lease_id).encode()
        api.keep_alive(node.member, body, answers.append)
        node.turn()
        self.world.run_until(lambda: bool(answers))
        (answer,) = answers
        return (
            answer if isinstance(answer, EtcdError) else proto.LeaseKeepAliveResponse.decode(answer)
        )


class Cluster:
    def __init__(self, count: int = 3, seed: int = 1, **options: Any) -> None:
        self.world = World(seed)
        self.nodes = self.world.found(count, **options)
        self.client = Asker(self.world)
        self.options = options
        self.leader = self.world.elect()
        self.world.run(1)

    @property
    def followers(self) -> list[Node]:
        return [node for node in self.nodes if node is not self.leader]

    def agree(self, *nodes: Node) -> None:
        """Wait until all have applied the same, and compare it."""
        nodes = nodes or tuple(self.nodes)
        applied: Callable[[Node], int] = lambda node: node.member.state.store.applied_index  # noqa: E731
        self.world.run_until(lambda: len({applied(node) for node in nodes}) == 1)
        assert len({state(node) for node in nodes}) == 1

    def add(self, name: str, is_learner: bool) -> Node:
        added = self.client.ask(
            self.leader, "Cluster.MemberAdd", peerURLs=[f"http://{name}:2380"], isLearner=is_learner
        )
        others = [member for member in added.members if member.ID != added.member.ID]
        return self.world.join(name, added.member, others, **self.options)


def state(node: Node) -> tuple[Any, ...]:
    """What must be the same on every member that has applied the same entries."""
    store = node.member.state.store
    buckets = {bucket: items for bucket, items in store.buckets.items() if bucket != 5}
    found = finish(store.hash_steps(store.revision))
    return (store.revision, store.compacted, str(sorted(buckets.items())), found)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(**SMALL)


def test_every_member_takes_writes_and_reads(cluster: Cluster) -> None:
    client = cluster.client
    for number, node in enumerate(cluster.nodes):
        assert client.put(node, b"k", node.name.encode()) == number + 2
    for node in cluster.nodes:
        assert client.get(node, b"k") == cluster.nodes[-1].name.encode()
    cluster.agree()


def test_a_killed_leader_is_replaced_without_waiting_for_the_election_timeout(
    cluster: Cluster,
) -> None:
    world, old = cluster.world, cluster.leader
    old.crash()
    began = world.now
    cluster.leader = world.elect()
    assert world.now - began < 0.15
    cluster.client.put(cluster.leader, b"k")
    old.start()
    cluster.agree()


@pytest.mark.parametrize("how", ["paused", "cut off"])
@pytest.mark.parametrize("members", [3, 5])
def test_a_silent_leader_is_replaced_in_half_a_second(how: str, members: int) -> None:
    times = []
    for seed in range(7):
        cluster = Cluster(members, seed=seed)
        world, old, rest = cluster.world, cluster.leader, cluster.followers
        world.run(world.rng.random())
        if how == "paused":
            old.pause()
        else:
            world.partition([old.name], [node.name for node in rest])
        began = world.now
        cluster.client.put(rest[0], b"k")
        times.append(world.now - began)
        world.heal()
        old.resume()
        cluster.agree()
    assert sorted(times)[len(times) // 2] < 0.5 and max(times) < 0.6, times


def test_a_follower_that_alone_hears_nothing_from_the_leader_deposes_nobody(
    cluster: Cluster,
) -> None:
    world, leader = cluster.world, cluster.leader
    term, deaf = leader.member.raft.term, cluster.followers[0]
    changes = deaf.member.leadership.changes
    world.blocked = {(leader.name, deaf.name)}
    world.run(0.9)
    assert not deaf.member.raft.leader
    world.run(1.0)
    world.heal()
    world.run(0.2)
    assert leader.member.leads and leader.member.raft.term == term
    assert deaf.member.raft.leader == leader.member_id
    assert deaf.member.leadership.changes == changes
    cluster.client.put(deaf, b"k")
    cluster.agree()


def test_silences_before_a_leader_led_do_not_count() -> None:
    """Members that lead in turn: each pauses while it leads, and hears only pings before."""
    cluster = Cluster(seed=2)
    world = cluster.world
    for _ in range(6):
        old, rest = world.elect(), [n for n in cluster.nodes if n is not world.leader]
        old.pause()
        began = world.now
        cluster.client.put(rest[0], b"k")
        assert world.now - began < 0.6
        world.run(0.05)
        old.resume()
        world.run(1.5)


def test_a_follower_that_saw_the_leader_pause_waits_longer() -> None:
    suspicion = Suspicion(0.1, 1.0)
    assert suspicion.limit_s == pytest.approx(0.45)
    suspicion.observe(0.3, 10.0)
    assert suspicion.limit_s == pytest.approx(0.65)
    for now, limit_s in ((11.0, 0.65), (10.0 + RECENT_S, 0.65), (11.0 + 2 * RECENT_S, 0.45)):
        suspicion.observe(0.1, now)
        assert suspicion.limit_s == pytest.approx(limit_s)
    suspicion.observe(0.7, 200.0)
    assert suspicion.limit_s == math.inf
    assert Suspicion(0.05, 0.3).limit_s == math.inf


@pytest.mark.parametrize("seed", range(6))
def test_members_that_start_together_elect_soon_after_they_reach_each_other(seed: int) -> None:
    cluster = Cluster(seed=seed)
    world = cluster.world
    for number in range(5):
        cluster.client.put(cluster.nodes[number % 3], b"k%d" % number)
    for node in cluster.nodes:
        node.crash()
    world.run(world.rng.random())
    for node in cluster.nodes:
        node.start()
        world.run(world.rng.choice((0.0, 0.05, 0.2)))
    began = world.now
    cluster.leader = world.elect()
    assert world.now - began < 0.5
    cluster.agree()


@pytest.mark.parametrize("latency_s", [(0.02, 0.03), (0.05, 0.06)])
def test_members_far_apart_that_start_together_do_not_depose_whom_they_elect(
    latency_s: tuple[float, float],
) -> None:
    for seed in range(6):
        cluster = Cluster(seed=seed)
        world = cluster.world
        world.latency_s = latency_s
        for node in cluster.nodes:
            node.crash()
        for node in cluster.nodes:
            node.start()
        began = world.now
        first = world.elect()
        raft = first.member.raft
        term = raft.term
        assert world.now - began < 1.5
        world.run(2.0)
        assert first.member.leads and raft.term == term


def test_a_member_that_returns_leaves_the_leader_alone(cluster: Cluster) -> None:
    world, leader = cluster.world, cluster.leader
    term = leader.member.raft.term
    for _ in range(5):
        for node in cluster.followers:
            node.crash()
            world.run(0.3)
            node.start()
            world.run(1.0)
            assert leader.member.leads and leader.member.raft.term == term
    cluster.agree()


def test_two_of_three_that_start_do_not_wait_for_the_election_timeout(cluster: Cluster) -> None:
    world = cluster.world
    for node in cluster.nodes:
        node.crash()
    for node in cluster.nodes[1:]:
        node.start()
    began = world.now
    cluster.leader = world.elect()
    # One election timeout passes until they take part without the third (`replica/rollback.py`).
    assert world.now - began < 1.5


def test_a_write_in_flight_to_a_killed_leader_is_answered_or_given_up_in_time() -> None:
    for seed in range(20):
        cluster = Cluster(seed=seed)
        client, world = cluster.client, cluster.world
        asked = [
            client.send(node, "KV.Put", key=b"k%d" % i) for i, node in enumerate(cluster.nodes)
        ]
        world.run(0.0004 * (seed % 10))
        cluster.leader.crash()
        lost = asked[cluster.nodes.index(cluster.leader)]
        began = world.now
        world.run_until(lambda a=asked, x=lost, c=client: set(a) - {x} <= c.answers.keys())
        assert world.now - began < 7.2
        for request_id in set(asked) - {lost}:
            answer = client.answers[request_id]
            if isinstance(answer, EtcdError):
                assert answer.text == error("TimeoutDueToLeaderFail").text
        cluster.leader.start()
        cluster.leader = world.elect()
        for request_id, key in zip(asked, (b"k0", b"k1", b"k2"), strict=True):
            answer = client.answers.get(request_id)
            if answer is not None and not isinstance(answer, EtcdError):
                found = client.ask(cluster.leader, "KV.Range", key=key).kvs
                assert [kv.mod_revision for kv in found] == [answer.header.revision]


def test_a_follower_that_was_away_for_long_gets_a_snapshot(cluster: Cluster) -> None:
    client = cluster.client
    away = cluster.followers[0]
    away.crash()
    for number in range(150):
        client.put(cluster.leader, b"k%d" % (number % 20), b"v" * 100)
    away.start()
    cluster.agree()
    assert away.member.raft.log.offset > 100
    assert client.put(away, b"more") == 152
    cluster.agree()


def test_a_snapshot_survives_a_crash_of_its_receiver_at_any_disk_operation() -> None:
    for stop_at in range(1, 400, 7):
        cluster = Cluster(seed=stop_at, **SMALL)
        client, world = cluster.client, cluster.world
        away = cluster.followers[0]
        away.crash()
        for number in range(120):
            client.put(cluster.leader, b"k%d" % (number % 20), b"v" * 100)
        away.start()
        count = 0

        class Stop(Exception):
            pass

        def watch(operation: str, path: str) -> None:
            nonlocal count
            count += 1
            if count == stop_at:  # noqa: B023
                raise Stop

        away.disk.watcher = watch
        try:
            world.run(2)
        except Stop:
            rng = world.rng
            away.crash(lambda path, sector, rng=rng: rng.random() < 0.5)  # type: ignore[misc]
            away.start()
        else:
            away.disk.watcher = lambda operation, path: None
            cluster.agree()
            break
        cluster.agree()
        assert client.put(away, b"more") == 122
    else:
        pytest.fail("the snapshot took more disk operations than were tried")
    assert stop_at > 50


def test_a_learner_serves_what_the_table_of_methods_says(cluster: Cluster) -> None:
    get = proto.RangeRequest(key=b"k", serializable=True)
    put, delete = proto.PutRequest(key=b"k"), proto.DeleteRangeRequest(key=b"k")
    read = proto.TxnRequest(success=[proto.RequestOp(request_range=get)])
    password = proto.AuthUserChangePasswordRequest(name="u", password="p")
    requests = {"KV.Range": get, "KV.Put": put, "KV.DeleteRange": delete, "KV.Txn": read}
    requests["Auth.UserChangePassword"] = password  # An empty one is refused by any member.
    refusals = {str(error("NotSupportedForLearner")), str(error("NotLeader"))}
    cluster.world.run(6)
    learner = cluster.add("m4", is_learner=True)
    cluster.agree(*cluster.nodes, learner)
    for number in methods.UNARY:
        row = methods.METHODS[number]
        fields = vars(requests[row.full]) if row.full in requests else {}
        try:
            answer = cluster.client.ask(learner, row.full, **fields)
            is_served = True
        except EtcdError as failure:
            answer = str(failure)
            is_served = answer not in refusals
        assert is_served == row.learner, (row.full, answer)


def test_a_learner_is_healthy_while_it_could_read(cluster: Cluster) -> None:
    world = cluster.world
    world.run(6)
    learner = cluster.add("m4", is_learner=True)
    cluster.agree(*cluster.nodes, learner)

    def answer(path: str) -> bytes:
        session = HttpSession(learner.member, lambda session: None, Site(learner.member), False)
        session.receive(f"GET {path} HTTP/1.1\r\nHost: m4\r\n\r\n".encode())
        learner.turn()
        world.run_until(lambda: bool(session.outbox.parts))
        return take_output(session)

    assert b'{"health":"true","reason":""}' in answer("/health")
    listed = b"[+]linearizable_read ok\n[-]non_learner failed: not supported for learner\n"
    assert listed in answer("/readyz")
    assert answer("/readyz?exclude=non_learner").endswith(b"\r\n\r\nok\n")
    world.partition(["m4"], [node.name for node in cluster.nodes])
    assert b"RANGE ERROR:etcdserver: request timed out" in answer("/health")


def test_a_member_joins_as_learner_and_is_promoted(cluster: Cluster) -> None:
    client, world = cluster.client, cluster.world
    client.put(cluster.leader, b"k")
    world.run(6)
    joined = cluster.add("m4", is_learner=True)
    cluster.agree(*cluster.nodes, joined)
    with pytest.raises(EtcdError, match="rpc not supported for learner"):
        client.put(joined, b"k")
    assert client.get(joined, b"k", serializable=True) == b"v"
    with pytest.raises(EtcdError, match="too many learner members"):
        client.ask(cluster.leader, "Cluster.MemberAdd", peerURLs=["http://m5:2380"], isLearner=True)
    client.ask(cluster.followers[0], "Cluster.MemberPromote", ID=joined.member_id)
    cluster.agree(*cluster.nodes, joined)
    assert client.put(joined, b"k") > 2
    assert joined.member.raft.voters == {node.member_id for node in (*cluster.nodes, joined)}


def test_a_write_through_a_member_that_has_just_joined_is_answered() -> None:
    for seed in range(10):
        cluster = Cluster(seed=seed, **SMALL)
        client, world = cluster.client, cluster.world
        world.run(6)
        joined = cluster.add("m4", is_learner=False)
        world.run_until(lambda joined=joined: joined.member.raft.leader > 0)  # type: ignore[misc]
        began = world.now
        client.put(joined, b"k")
        assert world.now - began < 3


def test_a_leader_that_is_removed_through_a_follower_tells_of_it() -> None:
    for seed in range(30):
        cluster = Cluster(seed=seed, **SMALL)
        world, leader = cluster.world, cluster.leader
        # What is committed is often known before the answer comes, as on a busy machine.
        world.latency_s = (0.0001, 0.05)
        world.run(6)
        answer = cluster.client.ask(
            cluster.followers[0], "Cluster.MemberRemove", ID=leader.member_id
        )
        assert leader.member_id not in {member.ID for member in answer.members}


def test_a_removed_leader_hands_over_and_knows_that_it_is_removed(cluster: Cluster) -> None:
    client, world, old = cluster.client, cluster.world, cluster.leader
    world.run(6)
    removed = client.ask(old, "Cluster.MemberRemove", ID=old.member_id)
    assert len(removed.members) == 2
    world.run_until(lambda: old.member.removal.since is not None)
    asked = [client.send(old, name, key=b"k") for name in ("KV.Put", "KV.Range", "KV.Put")]
    lease = client.send(old, "Lease.LeaseTimeToLive", ID=1)
    world.run(1)
    assert not client.answers.keys() & {*asked, lease}, "no leader will answer"
    old.member.give_up()
    world.run(0.1)
    assert all(isinstance(client.answers[one], EtcdError) for one in (*asked, lease))
    assert old.member.is_idle, "nothing keeps it from stopping"
    old.crash()
    cluster.nodes.remove(old)
    cluster.leader = world.elect()
    for node in cluster.nodes:
        client.put(node, b"k")
    cluster.agree()


@pytest.mark.parametrize("forced", [False, True])
def test_a_member_removed_while_it_was_down_learns_it_when_it_comes_back(
    cluster: Cluster, forced: bool
) -> None:
    client, world = cluster.client, cluster.world
    away = cluster.followers[0]
    away.crash()
    world.run(6)
    client.ask(cluster.leader, "Cluster.MemberRemove", ID=away.member_id)
    away.start(force_new_cluster=forced)
    world.run_until(lambda: away.member.removal.since is not None)
    world.run_until(lambda: not away.is_up, 2)
    assert not away.member.leads, "it made no cluster of its own"


@pytest.mark.parametrize(("count", "needed"), [(2, 1), (3, 2), (4, 2), (5, 3)])
def test_a_member_believes_a_quorum_of_the_others_that_it_was_removed(
    count: int, needed: int
) -> None:
    """Without these the cluster that it knows has no quorum."""
    cluster = Cluster(count)
    member = cluster.followers[0].member
    others = [node for node in cluster.nodes if node.member is not member]
    for number, node in enumerate(others, 1):
        member.on_removed(node.member_id)
        assert (member.removal.since is not None) == (number >= needed)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_member_removed_while_it_was_paused_stops_though_few_can_say_so(
    cluster: Cluster, is_replaced: bool
) -> None:
    """When it goes on, its leader of before seems to live, and one of those it knows is gone."""
    client, world = cluster.client, cluster.world
    away, other = cluster.followers
    away.pause()
    world.run(6)
    client.ask(cluster.leader, "Cluster.MemberRemove", ID=away.member_id)
    if is_replaced:
        joined = cluster.add("m4", is_learner=True)
        cluster.agree(cluster.leader, other, joined)
        world.run(6)
        client.ask(cluster.leader, "Cluster.MemberPromote", ID=joined.member_id)
        world.run(6)
        client.ask(cluster.leader, "Cluster.MemberRemove", ID=other.member_id)
        world.run_until(lambda: not other.is_up)
    else:
        other.crash()
    away.resume()
    world.run_until(lambda: not away.is_up)


def test_a_claim_that_is_known_to_be_wrong_is_not_counted(cluster: Cluster) -> None:
    world, leader = cluster.world, cluster.leader
    member, wrong = cluster.followers[0].member, cluster.followers[1]
    member.on_removed(wrong.member_id)
    world.run(5)  # A leader without a quorum would not last so long.
    wrong.crash()
    leader.crash()
    world.run(3)
    member.on_removed(wrong.member_id)
    assert member.removal.since is None
    member.on_removed(leader.member_id)
    assert member.removal.since > member.clock() + 2, "only one says it that may be right"


def test_members_that_are_replaced_again_and_again_leave_nothing_behind(cluster: Cluster) -> None:
    client, world = cluster.client, cluster.world
    world.run(6)
    removed: set[int] = set()
    for number in range(4, 9):
        joined = cluster.add(f"m{number}", is_learner=True)
        cluster.agree(*cluster.nodes, joined)
        joined.crash()
        world.run(2)
        joined.start()
        world.run(8)
        client.ask(cluster.leader, "Cluster.MemberRemove", ID=joined.member_id)
        world.run_until(lambda node=joined: node.member.removal.since is not None)
        joined.crash()
        removed.add(joined.member_id)
        world.run(rollback.SAVE_INTERVAL_S + 2)
    kept = {
        path
        for node in cluster.nodes
        for path, numbers in tables(node.member)
        if len(numbers & removed) > 1
    }
    assert kept == {".state.membership.removed"}, "the rest keeps the latest at most"


def tables(member: Any) -> Iterator[tuple[str, set[int]]]:
    """The numbers in every collection that a member and the parts of it hold, and those that are
    keys of a dict."""
    seen: set[int] = set()
    parts: deque[tuple[str, Any]] = deque([("", member)])
    while parts:
        path, part = parts.popleft()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, (dict, list, set, tuple, deque)):
            yield path, {one for one in part if isinstance(one, int)}
            parts += (
                (f"{path}[]", one) for one in (part.values() if isinstance(part, dict) else part)
            )
        elif type(part).__module__.startswith("etcdlite"):
            parts += (
                (f"{path}.{name}", one) for name, one in getattr(part, "__dict__", {}).items()
            )


def test_a_member_that_missed_its_removal_learns_it_though_its_connections_stand(
    cluster: Cluster,
) -> None:
    client, world = cluster.client, cluster.world
    world.run(6)
    away = cluster.followers[0]
    # It hears nothing, but its own connections to the others are not broken.
    world.blocked = {(node.name, away.name) for node in cluster.nodes if node is not away}
    client.ask(cluster.leader, "Cluster.MemberRemove", ID=away.member_id)
    world.run(0.2)
    world.heal()
    world.run_until(lambda: away.member.removal.since is not None, 5)


def test_a_member_that_learns_of_its_removal_while_it_suspects_the_leader_ends_well() -> None:
    world = World(3)
    nodes = world.found(3)
    leader = world.elect()
    world.run(7)
    gone = next(node for node in nodes if node is not leader)
    raft, leadership = gone.member.raft, gone.member.leadership
    gone._is_syncing = True  # Its disk hangs, so it does not apply the removal.
    Asker(world).send(leader, "Cluster.MemberRemove", ID=gone.member_id)
    world.run_until(raft.log.has_unapplied_conf_change)
    world.blocked = {(leader.name, gone.name)}
    world.run_until(lambda: leadership.suspect_at < gone.clock() + 0.05)
    gone._is_syncing = False
    gone._sync()
    world.run_until(lambda: gone.is_gone)


def test_a_change_that_would_cost_the_quorum_is_refused(cluster: Cluster) -> None:
    client, world = cluster.client, cluster.world
    world.run(6)
    cluster.followers[0].crash()
    world.run(1)
    with pytest.raises(EtcdError, match="unhealthy cluster"):
        client.ask(cluster.leader, "Cluster.MemberRemove", ID=cluster.leader.member_id)
    with pytest.raises(EtcdError, match="unhealthy cluster"):
        client.ask(cluster.leader, "Cluster.MemberAdd", peerURLs=["http://m4:2380"])
    with pytest.raises(EtcdError, match="Peer URLs already exists"):
        client.ask(cluster.leader, "Cluster.MemberAdd", peerURLs=["http://m1:2380"])
    with pytest.raises(EtcdError, match="member not found"):
        client.ask(cluster.leader, "Cluster.MemberRemove", ID=77)
    with pytest.raises(EtcdError, match="given member URLs are invalid"):
        client.ask(cluster.leader, "Cluster.MemberAdd", peerURLs=["m4"])


def test_a_change_of_members_is_refused_also_where_there_is_no_quorum_any_more(
    cluster: Cluster,
) -> None:
    """As in etcd, by what this member knows of the others: at once, and without a leader, too."""
    client, world, old = cluster.client, cluster.world, cluster.leader
    world.run(6)
    for node in cluster.followers:
        node.crash()
    world.run_until(lambda: bool(old.member.leadership.missing_voters()))
    for leads in (True, False):
        world.run_until(lambda: old.member.leads == leads)  # noqa: B023
        for name, fields, refusal in (
            ("MemberRemove", {"ID": old.member_id}, "unhealthy cluster"),
            ("MemberAdd", {"peerURLs": ["http://m4:2380"]}, "unhealthy cluster"),
            ("MemberAdd", {"peerURLs": ["m4"]}, "given member URLs are invalid"),
        ):
            asked = client.send(old, f"Cluster.{name}", **fields)
            assert refusal in str(client.answers.get(asked)), (leads, name)
    for node in cluster.followers:
        node.start()
    client.put(old, b"k")
    assert len(old.member.state.membership.members) == 3


@pytest.mark.parametrize("asks_leader", [True, False])
def test_a_time_to_live_that_waits_for_a_deposed_leader_is_answered(asks_leader: bool) -> None:
    cluster = Cluster()
    client, world, old = cluster.client, cluster.world, cluster.leader
    lease = client.ask(old, "Lease.LeaseGrant", TTL=60).ID
    if asks_leader:
        asker = old
        world.partition([old.name], [node.name for node in cluster.followers])
    else:
        asker = cluster.followers[0]
        old.pause()
    asked = client.send(asker, "Lease.LeaseTimeToLive", ID=lease)
    world.run(3)
    assert world.leader is not old
    world.heal()
    world.run_until(lambda: asked in client.answers)
    assert client.answers[asked].grantedTTL == 60, client.answers[asked]


def test_a_change_of_members_that_waits_for_a_deposed_leader_is_carried_out() -> None:
    cluster = Cluster()
    client, world, old = cluster.client, cluster.world, cluster.leader
    world.run(6)
    new = cluster.followers[0]
    old.pause()
    world.run_until(lambda: new.member.raft.leader == 0 or new.member.leads)
    asked = client.send(new, "Cluster.MemberAdd", peerURLs=["http://m4:2380"], isLearner=True)
    world.run_until(lambda: asked in client.answers)
    old.resume()
    assert len(client.answers[asked].members) == 4, client.answers[asked]


def test_leadership_moves_on_request(cluster: Cluster) -> None:
    client, old, new = cluster.client, cluster.leader, cluster.followers[1]
    with pytest.raises(EtcdError, match="not leader"):
        client.ask(new, "Maintenance.MoveLeader", targetID=new.member_id)
    with pytest.raises(EtcdError, match="bad leader transferee"):
        client.ask(old, "Maintenance.MoveLeader", targetID=77)
    client.ask(old, "Maintenance.MoveLeader", targetID=new.member_id)
    assert cluster.world.leader is new
    client.put(old, b"k")


def test_leadership_moves_only_if_the_user_may_do_that_as_of_now(cluster: Cluster) -> None:
    client, old, new = cluster.client, cluster.leader, cluster.followers[1]
    cluster.world.partition([old.name], [node.name for node in cluster.followers])
    asked = client.send(old, "Maintenance.MoveLeader", targetID=new.member_id)
    cluster.world.run(0.5)
    assert old.member.leads and not old.member.raft._transferee
    cluster.world.heal()
    cluster.world.run_until(lambda: asked in client.answers)


@pytest.mark.parametrize("count", [5, 500])
def test_few_transfers_and_changes_of_members_wait_at_once(cluster: Cluster, count: int) -> None:
    """They are looked at with every tick, and the changes take the places of other writes."""
    client, leader, target = cluster.client, cluster.leader, cluster.followers[1]
    target.pause()
    asked = [
        client.send(leader, "Maintenance.MoveLeader", targetID=target.member_id)
        for _ in range(count)
    ]
    update = {"ID": target.member_id, "peerURLs": ["http://else:2380"]}
    asked += [client.send(leader, "Cluster.MemberUpdate", **update) for _ in range(count)]
    cluster.world.run(1)
    assert len(leader.member.leadership._transfers) == min(count, MAX_TRANSFERS)
    assert leader.member.metrics.proposals_pending <= min(count, MAX_CHANGES)
    target.resume()
    cluster.world.run_until(lambda: client.answers.keys() >= set(asked))
    refused = [one for one in map(client.answers.get, asked) if "too many" in str(one)]
    assert len(refused) == 2 * count - min(count, MAX_TRANSFERS) - min(count, MAX_CHANGES)
    client.put(cluster.world.leader, b"k")


def test_a_paused_leader_serves_no_stale_read(cluster: Cluster) -> None:
    client, world, old = cluster.client, cluster.world, cluster.leader
    client.put(old, b"k", b"1")
    old.pause()
    world.run(10)
    other = next(node for node in cluster.followers if node.member.leads)
    client.put(other, b"k", b"2")
    asked = client.send(old, "KV.Range", key=b"k")
    old.resume()
    world.run_until(lambda: asked in client.answers)
    assert client.answers[asked].kvs[0].value == b"2"


def test_a_leader_without_a_quorum_answers_no_write_and_no_read(cluster: Cluster) -> None:
    client, world, old = cluster.client, cluster.world, cluster.leader
    rest = [node.name for node in cluster.followers]
    world.partition([old.name], rest)
    write = client.send(old, "KV.Put", key=b"k", value=b"lost")
    read = client.send(old, "KV.Range", key=b"k")
    world.run(3)
    other = next(node for node in cluster.followers if node.member.leads)
    client.put(other, b"k", b"kept")
    world.run(6)
    assert isinstance(client.answers[write], EtcdError)
    assert isinstance(client.answers[read], EtcdError)
    world.heal()
    world.run(5)
    assert client.get(old, b"k") == b"kept"
    cluster.agree()


def test_leases_are_kept_alive_through_any_member_and_end_by_the_leader(cluster: Cluster) -> None:
    client, world = cluster.client, cluster.world
    lease = client.ask(cluster.followers[0], "Lease.LeaseGrant", TTL=5).ID
    client.ask(cluster.leader, "KV.Put", key=b"k", value=b"v", lease=lease)
    for _ in range(4):
        for node in cluster.nodes:
            world.run(2)
            assert client.keep_alive(node, lease).TTL == 5
            left = client.ask(node, "Lease.LeaseTimeToLive", ID=lease, keys=True)
            assert left.keys == [b"k"] and left.TTL >= 4
    cluster.leader.crash()
    cluster.leader = world.elect()
    assert client.get(cluster.leader, b"k") == b"v"
    world.run(4.5)
    assert client.keep_alive(cluster.leader, lease).TTL == 5
    world.run(6)
    assert client.get(cluster.leader, b"k") is None
    assert client.keep_alive(cluster.leader, lease).TTL == 0


def test_what_is_left_of_a_long_lease_is_known_to_the_next_leader(cluster: Cluster) -> None:
    client, world = cluster.client, cluster.world
    lease = client.ask(cluster.leader, "Lease.LeaseGrant", TTL=700).ID
    world.run(610)
    cluster.leader.crash()
    cluster.leader = world.elect()
    left = client.ask(cluster.leader, "Lease.LeaseTimeToLive", ID=lease)
    assert left.TTL < 105 and left.grantedTTL == 700
    # A renewal counts for whoever leads next.
    assert client.keep_alive(cluster.leader, lease).TTL == 700
    old = next(node for node in cluster.nodes if not node.is_up)
    old.start()
    world.run(5)
    cluster.leader.crash()
    cluster.leader = world.elect()
    assert client.ask(cluster.leader, "Lease.LeaseTimeToLive", ID=lease).TTL > 690


@pytest.mark.parametrize("leads", [False, True])
def test_the_member_that_differs_from_the_majority_is_found(cluster: Cluster, leads: bool) -> None:
    client, world = cluster.client, cluster.world
    client.put(cluster.leader, b"k", b"right")
    cluster.agree()
    for node in cluster.nodes:
        node.member.hash_check.interval_s = 10.0
    world.run(25)
    assert cluster.leader.member.hash_check.comparisons >= 4
    assert not list(cluster.leader.member.state.alarms)
    bad = cluster.leader if leads else cluster.followers[0]
    store = bad.member.state.store
    location, length = store.index.scan(b"k", b"l", None, 1)[0][0]
    file = store.data.files[location >> 32]
    body = store.data.read(location, length).replace(b"right", b"wrong")
    inode = file._inode  # type: ignore[union-attr]
    at = bytes(inode.data).rindex(b"right")
    inode.data[at : at + 5] = b"wrong"
    store.data.read = lambda *_: body  # type: ignore[method-assign]
    world.run(15)
    assert list(cluster.leader.member.state.alarms) == [(bad.member_id, CORRUPT)]
    with pytest.raises(EtcdError, match="corrupt cluster"):
        client.put(cluster.leader, b"k")


@pytest.mark.parametrize("leads", [False, True])
def test_without_a_majority_no_member_is_called_wrong(
    cluster: Cluster, leads: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of two members has wrong data, but nothing shows which one. If the alarm named one of
    them, an operator might replace the good one."""
    cluster.client.put(cluster.leader, b"k", b"right")
    cluster.agree()
    down, other = cluster.followers
    down.crash()
    bad = cluster.leader if leads else other
    bad.member.state.store.data.read = _misread(bad.member.state.store.data.read)
    cluster.leader.member.hash_check.interval_s = 10.0
    cluster.world.run(15)
    assert list(cluster.leader.member.state.alarms) == [(0, CORRUPT)]
    lines = capfd.readouterr().err.splitlines()
    line = next(line for line in lines if "found data inconsistency" in line)
    assert all(f" at {node.member_id:x}" in line for node in (cluster.leader, other))


@pytest.mark.parametrize("leads", [False, True])
def test_a_difference_from_one_that_returned_is_judged_by_all(
    cluster: Cluster, leads: bool
) -> None:
    cluster.client.put(cluster.leader, b"k", b"right")
    cluster.agree()
    returned = cluster.followers[0]
    returned.crash()
    cluster.world.run(3)
    returned.start()
    bad = cluster.leader if leads else returned
    bad.member.state.store.data.read = _misread(bad.member.state.store.data.read)
    cluster.world.run(8)
    assert list(cluster.leader.member.state.alarms) == [(bad.member_id, CORRUPT)]


def test_a_member_that_differs_is_named_though_it_is_gone_when_the_others_have_answered(
    cluster: Cluster,
) -> None:
    cluster.client.put(cluster.leader, b"k", b"right")
    cluster.agree()
    bad, check = cluster.followers[0], cluster.leader.member.hash_check
    bad.crash()
    cluster.world.run(3)
    bad.start()
    bad.member.state.store.data.read = _misread(bad.member.state.store.data.read)
    cluster.world.run_until(lambda: check.comparisons > 0)
    bad.crash()
    cluster.world.run(8)
    assert list(cluster.leader.member.state.alarms) == [(bad.member_id, CORRUPT)]


def test_a_member_that_is_removed_while_a_check_waits_is_not_compared(cluster: Cluster) -> None:
    cluster.client.put(cluster.leader, b"k", b"right")
    cluster.agree()
    cluster.world.run(6)
    (bad, slow), check = cluster.followers, cluster.leader.member.hash_check
    bad.member.state.store.data.read = _misread(bad.member.state.store.data.read)
    waiting: list[Any] = []
    ask = check._others.ask
    check._others.ask = lambda node, *rest: (  # type: ignore[method-assign]
        waiting.append(rest[2]) if node == slow.member_id else ask(node, *rest)
    )
    check.interval_s = 1.0
    cluster.world.run_until(lambda: check.comparisons > 0)
    cluster.client.ask(cluster.leader, "Cluster.MemberRemove", ID=bad.member_id)
    for done in waiting:
        done(error("Timeout"))
    cluster.world.run(5)
    assert not list(cluster.leader.member.state.alarms)


def _misread(read: Callable[..., bytes]) -> Callable[..., bytes]:
    return lambda *where: read(*where).replace(b"right", b"wrong")


def test_a_member_whose_disk_fails_does_not_stop_the_writes_of_the_cluster(
    cluster: Cluster,
) -> None:
    client, world = cluster.client, cluster.world
    client.put(cluster.leader, b"k", b"right")
    cluster.agree()
    bad = cluster.followers[0]
    store = bad.member.state.store
    location, _ = store.index.scan(b"k", b"l", None, 1)[0][0]
    inode = store.data.files[location >> 32]._inode  # type: ignore[union-attr]
    at = bytes(inode.data).rindex(b"right")
    inode.data[at : at + 5] = b"wrong"
    store.data.recent.clear()
    cluster.leader.member.hash_check.interval_s = 10.0
    world.run(25)
    assert cluster.leader.member.hash_check.comparisons >= 1, "the good member was compared"
    assert store.data.damaged, "the bad one has noticed it"
    assert not list(cluster.leader.member.state.alarms)
    client.put(cluster.leader, b"k", b"new")


def test_a_member_that_starts_with_other_data_finds_it_out(cluster: Cluster) -> None:
    client, world = cluster.client, cluster.world
    client.put(cluster.leader, b"k", b"right")
    cluster.agree()
    for node, wrong in zip(cluster.followers, (True, False), strict=True):
        node.crash()
        node.start()
        store = node.member.state.store
        location, length = store.index.scan(b"k", b"l", None, 1)[0][0]
        if wrong:
            body = store.data.read(location, length).replace(b"right", b"wrong")
            store.data.read = lambda *_, body=body: body  # type: ignore[method-assign,misc]
        check = node.member.hash_check.initial
        check.begin(node.clock())
        assert not check.is_over
        world.run_until(lambda check=check: check.is_over)  # type: ignore[misc]
        assert bool(check.difference) == wrong
        assert ("endpoint hashkv --cluster" in check.difference) == wrong, "which of two is wrong?"
        if wrong:
            node.crash()
            node.start()


def test_a_member_that_applies_a_compaction_before_it_could_hash_its_data_starts(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, world, node = cluster.client, cluster.world, cluster.followers[0]
    client.put(cluster.leader, b"k")
    cluster.agree()
    node.crash()
    for _ in range(3):
        client.put(cluster.leader, b"k")
    client.ask(cluster.leader, "KV.Compact", revision=5)
    node.start()
    check, store = node.member.hash_check.initial, node.member.state.store
    check.begin(node.clock())
    assert store.revision < 5
    with monkeypatch.context() as patch:
        # Background work waits while entries are applied.
        patch.setattr(Background, "run", lambda *_: None)
        world.run_until(lambda: store.compacted == 5)
    world.run_until(lambda: check.is_over)
    assert not check.difference
    assert sum(cluster.leader.member.metrics.hash_rev_s.counts) == 1, "it compared nothing"


def test_a_member_whose_disk_is_almost_full_stops_writes_of_all(cluster: Cluster) -> None:
    client, world = cluster.client, cluster.world
    cluster.followers[0].disk.free_bytes = 1 << 20
    world.run(3)
    assert (cluster.followers[0].member_id, NOSPACE) in cluster.leader.member.state.alarms
    with pytest.raises(EtcdError, match="database space exceeded"):
        client.put(cluster.leader, b"k")
    assert client.ask(cluster.leader, "KV.DeleteRange", key=b"k").deleted == 0
    cluster.followers[0].disk.free_bytes = 1 << 40
    client.ask(
        cluster.leader, "Maintenance.Alarm", action=2, memberID=cluster.followers[0].member_id,
        alarm=NOSPACE,
    )  # fmt: skip
    client.put(cluster.leader, b"k")


def test_a_member_that_exceeds_its_quota_by_the_writes_of_others_stops_them(
    cluster: Cluster,
) -> None:
    client, world, small = cluster.client, cluster.world, cluster.followers[0]
    small.member.state.alarms.quota_bytes = 50_000
    client.put(cluster.leader, b"k", bytes(60_000))
    world.run(1)
    with pytest.raises(EtcdError, match="database space exceeded"):
        client.put(cluster.leader, b"k")
    assert (small.member_id, NOSPACE) in cluster.leader.member.state.alarms


def test_a_member_that_was_away_while_its_cluster_exceeded_the_quota_raises_no_alarm() -> None:
    cluster = Cluster(quota_bytes=50_000)
    client, world, leader = cluster.client, cluster.world, cluster.leader
    away = cluster.followers[0]
    away.crash()
    for _ in range(6):
        client.send(leader, "KV.Put", key=b"k", value=bytes(10_000))
    world.run(1)
    alarms = leader.member.state.alarms
    raised = sorted(alarms)
    assert {kind for _, kind in raised} == {NOSPACE}
    client.ask(leader, "KV.Compact", revision=leader.member.state.store.revision)
    for node, kind in raised:
        client.ask(leader, "Maintenance.Alarm", action=2, memberID=node, alarm=kind)
    world.run(1)
    assert not alarms.kinds, "by a compaction that goes on"
    away.start()
    caught_up(cluster, away)
    world.run(1)
    assert not alarms.kinds


def test_a_learner_that_exceeds_its_quota_by_the_writes_of_others_stops_them(
    cluster: Cluster,
) -> None:
    client, world, leader = cluster.client, cluster.world, cluster.leader
    world.run(6)
    small = cluster.add("m4", is_learner=True)
    cluster.agree(*cluster.nodes, small)
    small.member.state.alarms.quota_bytes = 20_000
    for _ in range(3):
        client.put(leader, b"k", bytes(10_000))
    world.run(1)
    assert (small.member_id, NOSPACE) in leader.member.state.alarms


def test_a_put_through_a_member_with_a_past_state_is_not_refused_for_the_quota() -> None:
    cluster = Cluster(quota_bytes=50_000)
    client, world, leader = cluster.client, cluster.world, cluster.leader
    for _ in range(4):
        client.put(leader, b"k", bytes(10_000))
    cluster.agree()
    away = cluster.followers[0]
    away.crash()
    client.ask(leader, "KV.Compact", revision=leader.member.state.store.revision)
    away.start()
    away.member.catch_up.begin()
    assert client.put(away, b"k", bytes(12_000))
    world.run(1)
    assert not leader.member.state.alarms.kinds


def test_a_write_after_an_alarm_is_disarmed_is_not_refused_by_a_member_behind(
    cluster: Cluster,
) -> None:
    client, behind = cluster.client, cluster.followers[0]
    for _ in range(5):
        alarm = {"memberID": cluster.leader.member_id, "alarm": NOSPACE}
        client.ask(cluster.leader, "Maintenance.Alarm", action=1, **alarm)
        with pytest.raises(EtcdError, match="database space exceeded"):
            client.put(behind, b"k")
        client.ask(cluster.leader, "Maintenance.Alarm", action=2, **alarm)
        assert behind.member.state.alarms.kinds, "it has not heard of that yet"
        client.put(behind, b"k")


def test_a_leader_with_a_slow_disk_hands_over(cluster: Cluster) -> None:
    client, world, old = cluster.client, cluster.world, cluster.leader
    sync = old._synced
    old._synced = lambda life, saves: world.at(5.0, lambda: sync(life, saves))  # type: ignore
    asked = client.send(cluster.followers[0], "KV.Put", key=b"k")
    world.run(2)
    assert world.leader is not old
    assert asked in client.answers and not isinstance(client.answers[asked], EtcdError)


def test_a_leader_that_cannot_write_what_it_applied_hands_over(cluster: Cluster) -> None:
    client, world, old = cluster.client, cluster.world, cluster.leader

    def fill(operation: str, path: str) -> None:
        if operation == "pwrite" and path.endswith(".seg"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    before, old.disk.watcher = old.disk.watcher, fill
    client.send(cluster.followers[0], "KV.DeleteRange", key=b"k")
    world.run(2)
    assert world.leader not in (None, old)
    old.disk.watcher = before
    world.run(2)
    cluster.agree()


def test_all_members_restart_and_know_everything(cluster: Cluster) -> None:
    client, world = cluster.client, cluster.world
    for number in range(30):
        client.put(cluster.nodes[number % 3], b"k%d" % number)
    for node in cluster.nodes:
        node.crash(lambda path, sector: world.rng.random() < 0.5)
    for node in cluster.nodes:
        node.start()
    cluster.leader = world.elect()
    for number in range(30):
        assert client.get(cluster.nodes[number % 3], b"k%d" % number) == b"v"
    cluster.agree()


def test_a_member_that_is_forced_to_be_a_cluster_of_its_own_keeps_what_it_has(
    cluster: Cluster,
) -> None:
    client, world = cluster.client, cluster.world
    for number in range(10):
        client.put(cluster.leader, b"k%d" % number)
    cluster.agree()
    for node in cluster.nodes:
        node.crash()
    lone = cluster.followers[0]
    lone.start(force_new_cluster=True)
    world.run(5)
    assert list(lone.member.state.membership.members) == [lone.member_id]
    assert client.get(lone, b"k9") == b"v"
    client.put(lone, b"more")
    lone.crash()
    lone.start()
    world.run(2)
    assert client.get(lone, b"more") == b"v"


def test_a_member_that_is_forced_beside_a_living_majority_hears_no_leader_but_itself(
    cluster: Cluster,
) -> None:
    """It is a mistake to do this. But the two logs must not mix: what one of the clusters commits
    would count for the other."""
    world, forced, leader = cluster.world, cluster.followers[0], cluster.leader
    forced.crash()
    cluster.client.put(leader, b"k")
    world.partition([node.name for node in cluster.nodes if node is not forced], [forced.name])
    forced.start(force_new_cluster=True)
    world.run_until(lambda: forced.member.rollback.is_over)
    own_id = forced.member_id
    assert not forced.member.forced.is_done
    for term in (leader.member.raft.term, 9):
        forced.member.on_message(Message(HEARTBEAT, own_id, leader.member_id, term))
    assert forced.member.raft.term < 9
    # A snapshot that the leader was about to send.
    voters = sorted(leader.member.raft.voters)
    offer = proto.SnapshotOffer(index=1000, term=9, voters=voters, leader_term=9)
    forced.member.snapshot_received(leader.member_id, offer)
    assert forced.member.raft.voters == {own_id}
    world.run_until(lambda: forced.member.forced.is_done)
    assert forced.member.leads and forced.member.raft.voters == {own_id}
    world.heal()
    world.run(10)
    assert cluster.leader is leader and leader.member.leads, "the quorum goes on"
    assert all(node.is_up and node.member.removal.since is None for node in cluster.nodes)
    cluster.client.put(leader, b"k")
    quorum = [node for node in cluster.nodes if node is not forced]
    for node in quorum:  # None of them has a leader for a moment.
        node.crash()
        world.run(1.5)
        node.start()
        world.run(10)
        assert all(node.is_up and node.member.removal.since is None for node in quorum)
    cluster.leader = world.elect()
    world.run(5)
    (follower,) = (node for node in quorum if not node.member.leads)
    world.partition([cluster.leader.name], [follower.name, forced.name])
    world.run(10)
    assert follower.is_up, "the claim of the one that it still reaches is known to be wrong"
    world.heal()
    cluster.leader = world.elect()
    cluster.client.put(cluster.leader, b"k")


@pytest.mark.parametrize("down_s", [3.0, 3.4, 3.8])
def test_a_quorum_beside_a_forced_member_goes_on_though_its_leader_restarts_at_once(
    cluster: Cluster, down_s: float
) -> None:
    """There was no time to see that the claim of the forced one is wrong."""
    world, leader = cluster.world, cluster.leader
    forced, other = cluster.followers
    world.partition([leader.name, other.name], [forced.name])
    forced.crash()
    forced.start(force_new_cluster=True)
    world.run_until(lambda: forced.member.forced.is_done)
    world.heal()
    world.run(0.5)
    leader.crash()
    world.run(down_s)
    leader.start()
    world.run(10)
    assert leader.is_up and other.is_up
    world.run_until(lambda: leader.member.leads or other.member.leads)


@pytest.mark.parametrize("led", [True, False])
def test_a_member_that_is_forced_while_a_leader_lives_changes_nothing_and_stops(
    cluster: Cluster, led: bool
) -> None:
    world = cluster.world
    forced = cluster.leader if led else cluster.followers[0]
    forced.crash()
    forced.start(force_new_cluster=True)
    world.run_until(lambda: not forced.is_up)
    assert "the other members are not lost" in forced.member.rollback.refusal
    world.run(5)
    forced.start()
    world.run(5)
    cluster.leader = world.elect()
    cluster.client.put(forced, b"k")
    cluster.agree()


def test_a_member_that_is_forced_listens_as_long_if_it_is_paused_meanwhile(
    cluster: Cluster,
) -> None:
    world, forced = cluster.world, cluster.followers[0]
    forced.crash()
    forced.start(force_new_cluster=True)
    forced.pause()
    world.run(10)
    forced.resume()
    world.run_until(lambda: not forced.is_up)
    assert "the other members are not lost" in forced.member.rollback.refusal


def test_a_leader_whose_disk_rots_does_not_hand_that_on() -> None:
    cluster = Cluster(**SMALL)
    client, world = cluster.client, cluster.world
    for number in range(60):
        client.put(cluster.leader, b"k%d" % number, b"v" * 200)
    leader = cluster.leader
    while len(leader.member.state.store.data.sizes) < 2:
        client.put(leader, b"more", b"v" * 500)
    world.run(6)
    assert leader.rot(leader.member.state.store.revision)
    joined = cluster.add("m4", is_learner=True)
    world.run(10)
    assert not joined.member.state.membership.members, "it took what is damaged"
    sound = cluster.followers[0]
    client.ask(leader, "Maintenance.MoveLeader", targetID=sound.member_id)
    world.run_until(lambda: bool(joined.member.state.membership.members))
    world.run_until(
        lambda: joined.member.state.store.applied_index == sound.member.state.store.applied_index
    )
    assert state(joined) == state(sound)


# --- In the middle of something --------------------------------------------------------------


def behind(seed: int = 1, **options: Any) -> tuple[Cluster, Node, Node]:
    """A cluster with megabytes of data, its leader, and a follower that is down and so far behind
    that it needs a snapshot."""
    cluster = Cluster(seed=seed, **SMALL, **options)
    leader, away = cluster.leader, cluster.followers[0]
    fall_behind(cluster, away)
    return cluster, leader, away


def fall_behind(cluster: Cluster, away: Node) -> None:
    """Write megabytes, crash a follower, and write more than the log of a `SMALL` member keeps."""
    client, leader = cluster.client, cluster.leader
    for number in range(1000):
        client.send(leader, "KV.Put", key=b"k%04d" % number, value=b"v" * 1000)
    cluster.world.run(2)
    away.crash()
    for number in range(200):
        client.put(leader, b"k%d" % (number % 20), b"v" * 100)


def caught_up(cluster: Cluster, away: Node) -> None:
    world = cluster.world

    def is_level() -> bool:
        leader = world.leader
        return leader is not None and (
            away.member.state.store.applied_index == leader.member.state.store.applied_index
        )

    world.run_until(is_level)
    cluster.agree()


def test_the_receiver_of_a_snapshot_knows_the_members_that_it_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Consensus asks for a snapshot while entries are applied, and the next of them adds a member.
    The receiver never applies that entry: it is in the snapshot."""
    cluster, leader, away = behind(strict_reconfig_check=False)
    member = leader.member
    raft, change_membership = member.raft, member.state.change_membership

    def asked_before(change: Any) -> Any:
        raft.step(Message(HEARTBEAT_RESP, leader.member_id, away.member_id, raft.term))
        return change_membership(change)

    monkeypatch.setattr(member.state, "change_membership", asked_before)
    added = cluster.add("m4", is_learner=True)
    cluster.world.run(0.1)
    shipment = member.peers.links[away.member_id].shipment
    assert shipment is not None and shipment.image.index == raft.log.applied
    monkeypatch.undo()
    away.start()
    caught_up(cluster, away)
    assert away.member.raft.learners == {added.member_id}


def test_a_snapshot_goes_on_over_another_connection() -> None:
    cluster, leader, away = behind()
    world = cluster.world
    world.slow = {(leader.name, away.name): 0.03}
    away.start()
    incoming = away.member.incoming
    world.run_until(lambda: incoming.offset > 200_000)
    got, nonce = incoming.offset, incoming.offer.nonce
    leader.break_connections(lambda name: name == away.name)
    world.run_until(lambda: incoming.connection is not None and incoming.connection.is_open)
    world.run(0.7)
    assert incoming.offer.nonce == nonce and incoming.offset >= got
    caught_up(cluster, away)


def test_a_part_of_a_snapshot_is_removed_once_the_log_has_brought_the_member_as_far() -> None:
    cluster = Cluster(**SMALL)
    world, leader = cluster.world, cluster.leader
    away, other = cluster.followers
    raft = other.member.raft
    raft.config = raft.config._replace(log_tail_bytes=1 << 30)
    fall_behind(cluster, away)
    world.slow = {(leader.name, away.name): 0.03}
    away.start()
    incoming = away.member.incoming
    world.run_until(lambda: incoming.offset > 100_000)
    world.partition([leader.name], [away.name, other.name])
    leader.break_connections(lambda name: True)
    leader.crash()
    assert incoming.offer is not None, "it arrived in part"
    assert world.elect() is other
    cluster.agree(away, other)
    world.run(1)
    assert incoming.offer is None
    assert not away.disk.exists(datadir.incoming_directory(away.member.state.store.directory))
    world.heal()
    leader.start()
    cluster.agree()


def refused_offer(cluster: Cluster, away: Node) -> int:
    """Start the member that is behind, which refuses the first snapshot that it is offered; it is
    offered again. Returns the snapshot's size in bytes."""
    away.start()
    incoming = away.member.incoming
    cluster.world.run_until(lambda: incoming.offer is not None)
    size_bytes: int = incoming.offer.size_bytes
    incoming._refuse("it is offered again")
    return size_bytes


@pytest.mark.parametrize("fits", [False, True])
def test_a_snapshot_for_which_there_is_little_space_stops_no_writes(
    fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, leader, away = behind(limits=Limits(snapshot_bytes_per_s=128 << 10))
    world, disk = cluster.world, away.disk
    size_bytes = refused_offer(cluster, away)
    incoming = away.member.incoming
    room = disk.used_bytes + int((1.2 if fits else 0.9) * size_bytes)
    monkeypatch.setattr(disk, "space", lambda path: (room - disk.used_bytes, 4 * size_bytes))
    parts: list[int] = []
    for number in range(40):
        world.run(0.5)
        parts.append(incoming.offset)
        cluster.client.put(leader, b"meanwhile%d" % number)
    if not fits:
        assert max(parts) == 0
        assert away.member.catch_up.is_behind
        monkeypatch.undo()
    caught_up(cluster, away)


def test_a_snapshot_that_would_leave_no_space_for_writes_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With it in place of the data, the member would raise NOSPACE for all."""
    cluster, leader, away = behind(limits=Limits(snapshot_bytes_per_s=128 << 10))
    world, disk = cluster.world, away.disk
    size_bytes = refused_offer(cluster, away)
    store = away.member.state.store
    grows_bytes = size_bytes - store.size_bytes
    assert grows_bytes > 50_000
    # Now there is space for writes, and beside the data for the snapshot.
    room = disk.used_bytes + DISK_RESERVE_BYTES + store.checkpoint_space + grows_bytes // 2
    monkeypatch.setattr(disk, "space", lambda path: (room - disk.used_bytes, 1 << 40))
    for number in range(40):
        world.run(0.5)
        cluster.client.put(leader, b"meanwhile%d" % number)
    assert away.member.catch_up.is_behind and not leader.member.state.alarms.kinds
    monkeypatch.undo()
    caught_up(cluster, away)


def test_a_small_disk_for_the_log_does_not_keep_a_snapshot_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster, _, away = behind()

    def space(path: str) -> tuple[int, int]:
        return (DISK_RESERVE_BYTES + 20_000 if path == "/log" else 1 << 40), 1 << 40

    monkeypatch.setattr(away.disk, "space", space)
    away.start()
    away.member.state.alarms._wal_dir = "/log"
    caught_up(cluster, away)
    assert not away.member.state.alarms.kinds


def test_a_job_without_space_beside_a_snapshot_stops_no_writes() -> None:
    cluster, leader, away = behind(limits=Limits(snapshot_bytes_per_s=128 << 10))
    world = cluster.world
    away.start()
    world.run_until(lambda: away.member.incoming.offset > 100_000)
    answers: list[Any] = []

    def fill(operation: str, path: str) -> None:
        if operation in ("create", "pwrite") and path.startswith("data/member/data/"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(away.disk, "watcher", fill)
        away.member.maintenance.defragment(answers.append)
        world.run(1)
    assert [answer.name for answer in answers] == ["NoSpace"]
    cluster.client.put(leader, b"k")
    assert not leader.member.state.alarms.kinds
    caught_up(cluster, away)


def test_a_snapshot_that_cannot_be_read_does_not_end_the_leader() -> None:
    cluster, leader, away = behind()
    world, store = cluster.world, leader.member.state.store
    link = leader.member.peers.links[away.member_id]
    path = store.data.path(min(store.data.files))
    leader.disk.unreadable[path] = 500
    away.start()
    world.run_until(lambda: link.next_snapshot_at > world.now)
    assert link.shipment is None and leader.is_up and cluster.world.leader is leader
    del leader.disk.unreadable[path]
    caught_up(cluster, away)


def test_a_snapshot_that_nobody_fetches_is_given_up() -> None:
    cluster, leader, away = behind()
    world = cluster.world
    away.start()
    link = leader.member.peers.links[away.member_id]
    world.run_until(lambda: away.member.incoming.offset > 0)
    away.crash()
    world.run(30)
    assert link.shipment is not None
    world.run(45)
    assert link.shipment is None, "it keeps no files open for who does not come back"
    away.start()
    caught_up(cluster, away)


@pytest.mark.parametrize("what", ["the disk fails", "the receiver skips a part"])
def test_a_snapshot_that_cannot_be_read_ends_its_sending_and_not_the_leader(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, leader, away = behind()

    def read(image: snap.Image, offset: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    if what == "the disk fails":
        monkeypatch.setattr(snap.Image, "read", read)
    away.start()
    if what != "the disk fails":
        monkeypatch.setattr(away.member.incoming, "begin", lambda connection, offer: 200_000)
    link = leader.member.peers.links[away.member_id]
    cluster.world.run_until(lambda: link.next_snapshot_at > 0)
    assert link.shipment is None
    monkeypatch.undo()
    caught_up(cluster, away)


def test_leadership_that_leaves_and_returns_ends_the_snapshot_that_is_sent() -> None:
    for seed in range(6):
        cluster, leader, away = behind(seed, limits=Limits(snapshot_bytes_per_s=1 << 20))
        world, client = cluster.world, cluster.client
        other = next(node for node in cluster.followers if node is not away)
        away.start()
        for target, former in ((other, leader), (leader, other)):
            world.run_until(lambda a=away: a.member.incoming.offset > 0)  # type: ignore[misc]
            client.ask(former, "Maintenance.MoveLeader", targetID=target.member_id)
            link = former.member.peers.links[away.member_id]
            assert link.shipment is None
        caught_up(cluster, away)


def test_the_offer_of_an_earlier_leader_does_not_replace_that_of_the_leader() -> None:
    cluster, first, away = behind()
    world, client = cluster.world, cluster.client
    second = next(node for node in cluster.followers if node is not away)
    world.slow = {(second.name, away.name): 0.3}
    away.start()
    world.run_until(lambda: first.member.peers.links[away.member_id].shipment is not None)
    world.blocked = {(first.name, away.name)}
    client.ask(first, "Maintenance.MoveLeader", targetID=second.member_id)
    incoming = away.member.incoming
    world.run_until(lambda: incoming.connection is not None and incoming.offset > 0)
    world.heal()
    world.slow = {}
    caught_up(cluster, away)


def test_a_rotten_checkpoint_is_not_taken_over() -> None:
    cluster, leader, away = behind()
    world = cluster.world
    store = leader.member.state.store
    path = f"{store.directory}/checkpoint"
    content = leader.disk.content(path)
    content[len(content) // 2] ^= 1
    away.start()
    world.run(20)
    applied = away.member.state.store.applied_index
    assert applied < store.applied_index
    away.crash()
    away.start()
    assert away.member.state.store.applied_index == applied, "what it had is still there"


def test_a_lease_whose_revoke_is_only_in_the_log_is_not_renewed() -> None:
    world = World(1)
    (node,) = world.found(1)
    world.elect()
    world.run(1)
    client = Asker(world)
    lease = client.ask(node, "Lease.LeaseGrant", TTL=60).ID
    client.ask(node, "KV.Put", key=b"k", value=b"v", lease=lease)
    client.ask(node, "Lease.LeaseRevoke", ID=lease)
    node.crash(lambda path, sector: False)
    node.start()
    answers: list[Any] = []
    body = proto.LeaseKeepAliveRequest(ID=lease).encode()
    api.keep_alive(node.member, body, answers.append)
    world.run(1)
    assert [proto.LeaseKeepAliveResponse.decode(answer).TTL for answer in answers] == [0]


def test_a_leader_that_was_removed_does_not_renew_what_the_other_has_revoked() -> None:
    world = World(3)
    nodes = world.found(2)
    world.elect()
    world.run(7)
    client, old = Asker(world), world.leader
    assert old is not None
    other = next(node for node in nodes if node is not old)
    lease = client.ask(old, "Lease.LeaseGrant", TTL=60).ID
    client.send(old, "Cluster.MemberRemove", ID=old.member_id)
    world.run_until(lambda: old.member_id not in old.member.raft.voters)
    world.blocked = {(other.name, old.name)}
    world.run_until(lambda: other.member.leads, 5)
    client.ask(other, "Lease.LeaseRevoke", ID=lease)
    answers: list[Any] = []
    body = proto.LeaseKeepAliveRequest(ID=lease).encode()
    if old.is_up:
        api.keep_alive(old.member, body, answers.append)
        world.run(1)
    assert not [a for a in answers if isinstance(a, bytes)]


def test_a_lease_is_not_renewed_for_what_another_leader_confirmed() -> None:
    """The read of a renewal is confirmed by the next leader, which then lets the lease end. The
    first one is elected again before it has applied that."""
    world = World(3)
    nodes = world.found(3)
    old = world.elect()
    world.run(7)
    client = Asker(world)
    lease = client.ask(old, "Lease.LeaseGrant", TTL=2).ID
    client.ask(old, "KV.Put", key=b"k", value=b"v", lease=lease)
    world.partition([old.name], [node.name for node in nodes if node is not old])
    answers: list[Any] = []
    api.keep_alive(old.member, proto.LeaseKeepAliveRequest(ID=lease).encode(), answers.append)
    old.turn()
    raft = old.member.raft
    ask, raft.read_index = raft.read_index, lambda context: None  # type: ignore[method-assign]
    world.run_until(lambda: world.leader not in (None, old))
    other = world.elect()
    world.heal()
    world.run_until(lambda: raft.log.applied == other.member.raft.log.applied)
    old._is_syncing = True  # Its disk hangs: it applies nothing more, and its vote does not count.
    client.put(other, b"a")
    raft.read_index = ask  # type: ignore[method-assign]
    world.run_until(lambda: bool(old.member.reads.ready))
    revoke = other.member.leases
    world.run_until(lambda: 0 < revoke._proposed_index <= raft.log.last)
    world.blocked = {(other.name, old.name)}
    world.run_until(lambda: not other.member.state.lessor.exists(lease))
    other.crash()
    voter = next(node for node in nodes if node not in (old, other)).member.raft
    voter.campaign = lambda: None  # type: ignore[method-assign]
    voter.forget_leader()  # A refusal would tell what is committed.
    world.run_until(lambda: raft.vote == old.member_id and bool(raft._votes))
    assert old.member.state.lessor.exists(lease) and not answers
    old._is_syncing = False
    old._sync()
    world.run_until(lambda: bool(answers))
    assert old.member.leads
    assert [proto.LeaseKeepAliveResponse.decode(answer).TTL for answer in answers] == [0]


def test_a_lease_whose_revoke_is_proposed_is_not_renewed_by_the_reset_of_its_checkpoint() -> None:
    world = World(1)
    (node,) = world.found(1)
    world.elect()
    client = Asker(world)
    lease = client.ask(node, "Lease.LeaseGrant", TTL=700).ID
    world.run(610)
    node.crash()
    node.start()
    world.elect()
    world.run(node.member.state.lessor.remaining_s(lease, node.clock()) - 0.05)
    world.sync_s = (0.3, 0.3)
    assert client.keep_alive(node, lease).TTL == 0
    world.run(1)
    assert not node.member.state.lessor.exists(lease)


def test_an_alarm_that_was_lost_on_its_way_is_raised_again() -> None:
    cluster = Cluster(**SMALL)
    world, full = cluster.world, cluster.followers[0]
    others = [node.name for node in cluster.nodes if node is not full]
    world.partition([full.name], others)
    world.run(3)
    full.disk.free_bytes = 1 << 20
    world.run(12)
    world.heal()
    world.run(20)
    leader = world.leader
    assert leader is not None and (full.member_id, NOSPACE) in leader.member.state.alarms


def test_a_read_whose_round_is_lost_is_answered_though_others_come() -> None:
    cluster = Cluster(**SMALL)
    client, world, node = cluster.client, cluster.world, cluster.followers[0]
    client.put(cluster.leader, b"k")
    lost = client.send(node, "KV.Range", key=b"k")
    node.break_connections(lambda name: name == cluster.leader.name)
    began = world.now
    while lost not in client.answers and world.now < began + 5:
        world.run(0.2)
        client.send(node, "KV.Range", key=b"k")
    assert world.now < began + 2 and not isinstance(client.answers[lost], EtcdError)


def backup_call(node: Any) -> streams.SnapshotCall:
    """A snapshot call that raises its errors, instead of sending them to a client."""

    def fail(request_id: int, method: int, failure: EtcdError) -> None:
        raise failure

    owner: Any = SimpleNamespace(
        calls=SimpleNamespace(quota=Quota()),
        protocol="native",
        resume=lambda _: None,
        send_message=lambda *_: None,
        is_blocked=False,
        is_stalled=lambda _: False,
        end_call=lambda *_: setattr(call, "is_closed", True),
        fail=fail,
    )
    call = streams.SnapshotCall(node.member, owner, 1, methods.SNAPSHOT)
    return call


def test_no_backup_is_taken_while_a_snapshot_is_installed() -> None:
    cluster, _, away = behind()
    world = cluster.world
    away.start()
    world.run_until(lambda: away.member.restoring.is_under_way)
    unknown = proto.SnapshotRequest(format=99).encode()
    for body in (b"", unknown):
        for _ in range(streams.MAX_SNAPSHOTS + 1):
            refused = backup_call(away)
            with pytest.raises(EtcdError, match="has not caught up"):
                refused.message(body)
            refused.close()
    caught_up(cluster, away)
    for _ in range(streams.MAX_SNAPSHOTS + 1):
        refused = backup_call(away)
        with pytest.raises(EtcdError, match="no snapshot has the format 99"):
            refused.message(unknown)
        refused.close()
    taken = backup_call(away)
    taken.message(b"")
    assert away.member.backups_under_way == 1, "refused ones do not count"
    taken.close()
    assert away.member.backups_under_way == 0
    assert next(streams.snapshot_parts(away.member))


def test_a_forced_cluster_stays_one_after_a_loss_of_power() -> None:
    cluster = Cluster(**SMALL, strict_reconfig_check=False)
    client, world = cluster.client, cluster.world
    for number in range(10):
        client.put(cluster.leader, b"k%d" % number)
    world.run(6)
    node, gone = cluster.followers
    gone.crash()
    entries = cluster.leader.member.raft.log
    last = entries.last + 1
    client.send(cluster.leader, "Cluster.MemberAdd", peerURLs=["http://m4:2380"])
    world.run_until(lambda: node.wal.last_index >= last)
    assert entries.last == last and entries.entries[-1].kind == ENTRY_CONF_CHANGE
    for other in cluster.nodes:
        if other.is_up:
            other.crash()
    node.start(force_new_cluster=True)
    world.run_until(lambda: node.member.forced.is_done)
    node.crash(lambda path, sector: False)
    node.start()
    world.run(5)
    assert list(node.member.state.membership.members) == [node.member_id]
    assert client.put(node, b"more") > 0


# --- A member that knows less than the others, and requests that wait ------------------------


def test_a_member_that_missed_the_addition_of_the_leader_catches_up() -> None:
    """It has no connection of its own to a member that it does not know; it answers over that
    member's."""
    for writes in (3, 200):
        cluster = Cluster(**SMALL, strict_reconfig_check=False)
        world, client, first = cluster.world, cluster.client, cluster.leader
        world.run(6)
        away, replaced = cluster.followers
        away.crash()
        joined = cluster.add("m4", is_learner=True)
        world.run(3)
        client.ask(first, "Cluster.MemberPromote", ID=joined.member_id)
        for number in range(writes):
            client.put(first, b"k%d" % (number % 20), b"v" * 100)
        world.run(6)
        client.ask(first, "Maintenance.MoveLeader", targetID=joined.member_id)
        world.run(6)
        client.ask(joined, "Cluster.MemberRemove", ID=replaced.member_id)
        away.start()
        world.run_until(lambda a=away, j=joined: in_step(a, j))  # type: ignore[misc]
        first.crash()
        assert client.put(joined, b"k") and client.get(away, b"k") == b"v"


def in_step(node: Node, other: Node) -> bool:
    return bool(node.member.state.store.applied_index == other.member.state.store.applied_index)


def test_a_member_that_moved_while_another_was_away_is_answered() -> None:
    """The leader has new URLs, and the one that comes back dials the old ones."""
    cluster = Cluster(**SMALL)
    world, client, leader = cluster.world, cluster.client, cluster.leader
    world.run(6)
    away = cluster.followers[0]
    away.crash()
    client.ask(leader, "Cluster.MemberUpdate", ID=leader.member_id, peerURLs=["http://else:2380"])
    away.start()
    away.member.peers.links[leader.member_id].urls = ["http://nowhere:2380"]
    world.run_until(lambda: in_step(away, leader))
    assert client.put(away, b"k")


def test_membership_changes_that_wait_for_each_other_are_checked_again() -> None:
    cluster = Cluster()
    world, client, leader = cluster.world, cluster.client, cluster.leader
    world.run(6)
    urls = [[f"http://n{number}:2380"] for number in range(4)]
    asked = [client.send(leader, "Cluster.MemberAdd", peerURLs=u, isLearner=True) for u in urls]
    world.run(3)
    refusals = [client.answers[request_id] for request_id in asked[1:]]
    assert [refusal.text for refusal in refusals] == [error("TooManyLearners").text] * 3
    assert len(leader.member.state.membership.learners) == 1
    asked = [client.send(leader, "Cluster.MemberAdd", peerURLs=u) for u in urls[1:]]
    world.run(3)
    assert client.answers[asked[2]].text == error("MemberNotEnoughStarted").text
    assert len(leader.member.state.membership.voters) == 5, "two that have not started, as in etcd"
    assert leader.member.metrics.proposals_pending == 0
    assert client.put(leader, b"k")


def test_reads_without_a_quorum_are_each_answered_once() -> None:
    cluster = Cluster()
    world, client = cluster.world, cluster.client
    node = cluster.followers[0]
    world.partition([node.name], [other.name for other in cluster.nodes if other is not node])
    world.run(3)
    asked = []
    for _ in range(200):
        asked.append(client.send(node, "KV.Range", key=b"k"))
        world.run(0.05)
    world.heal()
    world.run(10)
    answers = [client.answers[request_id] for request_id in asked]
    late = [answer for answer in answers if isinstance(answer, EtcdError)]
    assert 0 < len(late) < len(answers)
    assert {answer.text for answer in late} == {error("Timeout").text}
    assert not node.member.reads.are_waiting and not node.member.reads._rounds


@pytest.mark.parametrize("latency_s", [0.05, 0.16, 0.3])
def test_a_follower_far_away_reads(latency_s: float) -> None:
    """Over two round trips, which may take longer than a round is waited for."""
    cluster = Cluster()
    world, client = cluster.world, cluster.client
    client.put(cluster.leader, b"k")
    world.latency_s = (latency_s, latency_s + 0.002)
    world.run(5)
    began = world.now
    assert client.get(cluster.followers[0], b"k") == b"v"
    assert world.now - began < 4 * (latency_s + 0.002) + 0.2


def test_a_forced_cluster_is_done_under_load() -> None:
    cluster = Cluster()
    world, client, node = cluster.world, cluster.client, cluster.followers[0]
    world.run(1)
    for other in cluster.nodes:
        other.crash()
    node.start(force_new_cluster=True)
    asked = [client.send(node, "KV.Put", key=b"k%d" % number, value=b"v") for number in range(8)]

    def is_done() -> bool:
        for at, request_id in enumerate(asked):
            if request_id in client.answers:
                asked[at] = client.send(node, "KV.Put", key=b"k%d" % at, value=b"v")
        return node.member.forced.is_done

    world.run_until(is_done)
    assert len(node.member.state.membership.members) == 1
    node.crash(lambda path, sector: False)
    node.start()
    world.run(3)
    assert client.put(node, b"k"), "it needs nobody else any more"


def test_a_snapshot_that_is_being_stored_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster, leader, away = behind()
    world, client = cluster.world, cluster.client
    away.start()
    incoming = away.member.incoming
    world.run_until(lambda: incoming.offset > 0)
    away.sync_factor = 1000
    world.run_until(lambda: incoming.is_storing)
    leader.break_connections(lambda name: name == away.name)
    link = leader.member.peers.links[away.member_id]
    offers: list[Any] = []
    monkeypatch.setattr(link, "send_snapshot", lambda image, offer: offers.append(offer))
    while incoming.is_storing:
        client.put(leader, b"x", b"v" * 200)
        world.run(0.4)
    away.sync_factor = 1
    caught_up(cluster, away)
    assert not offers


def test_a_dead_leader_is_noticed_at_the_second_call_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    node = cluster.followers[0]
    link = node.member.peers.links[cluster.leader.member_id]
    died: list[int] = []
    monkeypatch.setattr(node.member, "on_peer_died", died.append)

    def call() -> Any:
        (dial,) = link.dials(node.member.clock() + 10, lambda session: None)
        return dial

    assert link.dial is not None
    link.lost(link.dial)
    link.unreachable(call(), "timed out", False)
    assert not died
    link.unreachable(call(), "connection refused", True)
    assert died == [cluster.leader.member_id]
    link.unreachable(call(), "connection refused", True)
    assert len(died) == 1


# --- What the operator is told ---------------------------------------------------------------


def test_a_lost_quorum_is_told_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    world = cluster.world
    left = cluster.followers[0]
    assert not left.member.leadership.missing_voters()
    told: list[str] = []
    monkeypatch.setattr(log, "error", lambda text, *limit, **fields: told.append(text))
    for node in cluster.nodes:
        if node is not left:
            node.crash()
    world.run(20)
    (line,) = told
    assert "no leader for 1" in line and "reaches 1 of 3 voting members" in line
    assert "2 are needed" in line
    assert "If the log says that a peer refused this member, see why there; else start" in line
    cluster.leader.start()
    world.elect()
    world.run(20)
    assert told == [line] and not left.member.leadership.missing_voters()


def test_a_planned_change_of_the_leader_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    world, client = cluster.world, cluster.client
    warned: list[str] = []
    monkeypatch.setattr(log, "warn", lambda text, *limit, **fields: warned.append(text))
    target = cluster.followers[0]
    client.ask(cluster.leader, "Maintenance.MoveLeader", targetID=target.member_id)
    world.run(2)
    assert not warned
    target.crash()
    world.run(5)
    assert "lost leader" in warned or "the leader's process is gone" in warned


def test_a_change_of_members_is_logged_with_the_urls_that_it_leaves_or_takes_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(1)
    node, client = cluster.leader, cluster.client
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(
        log, "info", lambda text, *limit, **fields: told.append((text, fields.get("peer_urls", "")))
    )
    added = client.ask(node, "Cluster.MemberAdd", peerURLs=["http://a:1"], isLearner=True).member
    client.ask(node, "Cluster.MemberUpdate", ID=added.ID, peerURLs=["http://b:2"])
    client.ask(node, "Cluster.MemberRemove", ID=added.ID)
    assert [line for line in told if line[1]] == [
        ("added member", "http://a:1"),
        ("updated member", "http://b:2"),
        ("removed member", "http://b:2"),
    ]
