"""An old copy of a data directory does not take part again; nothing else is taken for one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rigs.faulty_disk import FaultyDisk
from rigs.processes import PATIENCE_S, ROOT, ServerProcess, wait_until
from sim.world import Node
from test_cluster import SMALL, Cluster
from test_cluster_live import cluster as live_clusters

from etcdlite import log, proto
from etcdlite.errors import DATA_LOSS, EtcdError
from etcdlite.methods import SET_CLUSTER_VERSION
from etcdlite.options import Options
from etcdlite.replica import corruption, rollback
from etcdlite.replica.alarms import CORRUPT
from etcdlite.versions import CURRENT, OLDEST

live = live_clusters


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(**SMALL)


def write(cluster: Cluster, count: int = 30, through: Node | None = None) -> None:
    for number in range(count):
        cluster.client.put(through or cluster.leader, b"k%d" % (number % 10), b"v" * 50)
    cluster.agree(*(node for node in cluster.nodes if node.is_up))


def is_refused(cluster: Cluster, node: Node, others: list[Node] | None = None) -> bool:
    """Start a member on an old copy; whether it is told so, before it has changed anything."""
    before = [n.member.raft.term for n in others or []]
    node.start()
    cluster.world.run(5)
    assert node.is_refused != node.is_up
    if node.is_refused:
        assert [n.member.raft.term for n in others or []] == before
    return node.is_refused


def test_a_follower_that_is_set_back_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(
        log, "warn", lambda text, *limit, **fields: told.append((text, fields.get("why", "")))
    )
    node, other = cluster.followers
    write(cluster, 5)
    image = node.image()
    write(cluster)
    cluster.world.run(1)
    node.set_back(image)
    assert is_refused(cluster, node, [cluster.leader, other])
    text = node.member.rollback.refusal
    assert "is an older copy" in text and f"member remove {node.member_id:x}" in text
    assert "member add m" in text and "--learner --peer-urls=http://m" in text
    what = text.split(", according to")[0]
    assert any(line == "refused a peer" and why.startswith(what) for line, why in told)
    write(cluster)


def test_the_advice_that_is_logged_mends_the_cluster(cluster: Cluster) -> None:
    cluster.world.run(5)  # Until the members count as healthy.
    node = cluster.followers[0]
    image = node.image()
    write(cluster)
    cluster.world.run(1)
    node.set_back(image)
    assert is_refused(cluster, node)
    client = cluster.client
    client.ask(cluster.leader, "Cluster.MemberRemove", ID=node.member_id)
    cluster.nodes.remove(node)
    cluster.world.run(1)
    new = cluster.add("m4", True)
    cluster.nodes.append(new)
    cluster.agree()
    client.ask(cluster.leader, "Cluster.MemberPromote", ID=new.member_id)
    write(cluster)


def test_a_leader_that_is_set_back_is_refused(cluster: Cluster) -> None:
    """Only it knew what it had on its own disk, but it has told the others."""
    node = cluster.leader
    image = node.image()
    write(cluster)
    cluster.world.run(1)
    node.set_back(image)
    cluster.world.run(5)
    cluster.leader = cluster.world.elect()
    assert cluster.leader is not node
    assert is_refused(cluster, node)
    write(cluster)


@pytest.mark.parametrize("is_checked", [True, False])
def test_an_acknowledged_write_is_kept_because_of_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, is_checked: bool
) -> None:
    """The write is on two of three members. One of them is set back while the other is down."""
    if not is_checked:
        monkeypatch.setattr(rollback.RollbackCheck, "check", lambda *_: None)
    world, leader = cluster.world, cluster.leader
    node, slow = cluster.followers
    write(cluster, 3)
    image = node.image()
    world.blocked = {(leader.name, slow.name), (slow.name, leader.name)}
    cluster.client.put(leader, b"key", b"acknowledged")
    world.run(2)
    node.set_back(image)
    world.run(2)
    leader.crash()
    world.heal()
    node.start()
    world.run(5)
    leader.start()
    world.run(3)
    kept = cluster.client.get(world.elect(), b"key") == b"acknowledged"
    assert kept == is_checked == node.is_refused


def test_an_empty_data_directory_of_a_member_is_refused(cluster: Cluster) -> None:
    node = cluster.followers[0]
    write(cluster)
    cluster.world.run(1)
    members = list(node.member.state.membership.members.values())
    node.crash()
    node.disk = type(node.disk)()
    node.create([m for m in members])
    assert is_refused(cluster, node)


@pytest.mark.parametrize("is_behind", [False, True])
def test_a_member_that_is_left_of_an_earlier_cluster_stays_outside(
    cluster: Cluster, is_behind: bool
) -> None:
    """It knows higher positions of the others, or the same ones while its log has other entries
    at the same places: it must not stop them, nor take part."""
    world, left = cluster.world, cluster.followers[0]
    new = [node for node in cluster.nodes if node is not left]
    write(cluster, 5)
    world.run(1)
    members = list(left.member.state.membership.members.values())
    for node in cluster.nodes:
        node.crash()
    for node in new:
        node.disk = type(node.disk)()
        node.create(members)
        node.start()
    cluster.leader = world.elect()
    for node in new * is_behind:
        write(cluster, 20)
        world.run(1)
        node.crash()
        node.start()
        cluster.leader = world.elect()
    world.run(1)
    left.start()
    world.run(5)
    assert all(node.is_up for node in new)
    assert not left.member.raft.leader
    cluster.client.put(cluster.leader, b"k", b"new")
    cluster.agree(*new)
    left.crash()
    left.disk = type(left.disk)()
    left.create(members)
    left.start()
    cluster.agree()


def test_a_founding_keeps_its_number(cluster: Cluster) -> None:
    def numbers() -> set[int]:
        return {node.member.state.cluster_version.founding for node in cluster.nodes}

    (number,) = before = numbers()
    assert number
    for node in cluster.nodes:
        node.crash()
        node.start()
        cluster.world.run(1)
        cluster.leader = cluster.world.elect()
    change = cluster.leader.member.state.cluster_version.change(OLDEST, OLDEST, 7)
    assert change.version == f"{OLDEST}.{number}"
    change = proto.ClusterVersion(version=str(CURRENT), old_version=str(CURRENT))
    assert cluster.leader.member.writes.propose_once([(SET_CLUSTER_VERSION, change)])
    write(cluster)
    assert numbers() == before


@pytest.mark.parametrize("has_file", [True, False])
def test_what_is_known_survives_a_restart_of_all_others(cluster: Cluster, has_file: bool) -> None:
    node, *others = cluster.followers[0], cluster.leader, cluster.followers[1]
    image = node.image()
    write(cluster)
    cluster.world.run(1)
    node.set_back(image)
    cluster.world.run(3)
    for other in others:
        other.crash(lambda path, sector: False)
        assert other.disk.exists("data/member/positions")
        if not has_file:
            other.disk.unlink("data/member/positions")
    for other in others:
        other.start()
    assert is_refused(cluster, node) == has_file


def test_a_third_member_is_heard_before_a_member_takes_part(cluster: Cluster) -> None:
    """The one that it meets first knows nothing."""
    node, ignorant, knowing = *cluster.followers, cluster.leader
    image = node.image()
    write(cluster)
    cluster.world.run(1)
    node.set_back(image)
    cluster.world.run(3)
    ignorant.crash()
    if ignorant.disk.exists("data/member/positions"):
        ignorant.disk.unlink("data/member/positions")
    knowing.crash()
    cluster.world.run(1)
    ignorant.start()
    node.start()
    cluster.world.run(0.5)
    assert not node.member.rollback.is_over and not node.member.raft.leader
    knowing.start()
    cluster.world.run(1)
    assert node.is_refused


def test_a_member_takes_part_when_a_third_one_stays_away(cluster: Cluster) -> None:
    node, other, dead = *cluster.followers, cluster.leader
    write(cluster)
    dead.crash()
    node.crash()
    cluster.world.run(3)
    node.start()
    began = cluster.world.now
    cluster.world.run_until(lambda: cluster.world.leader is not None)
    assert cluster.world.now - began < 6
    cluster.leader = cluster.world.elect()
    cluster.client.put(other, b"k")


@pytest.mark.parametrize("count", [3, 5])
def test_a_whole_cluster_that_is_set_back_to_one_moment_starts(count: int) -> None:
    cluster = Cluster(count, **SMALL)
    write(cluster)
    cluster.nodes[0].crash()  # So that each has written what it knows.
    cluster.world.run(3)
    cluster.nodes[0].start()
    cluster.world.run(5)
    images = [node.image() for node in cluster.nodes]
    cluster.leader = cluster.world.elect()
    revision = cluster.client.ask(cluster.leader, "KV.Range", key=b"k").header.revision
    write(cluster)
    for node, image in zip(cluster.nodes, images, strict=True):
        node.set_back(image)
    for node in cluster.nodes:
        node.start()
    cluster.world.run(5)
    cluster.leader = cluster.world.elect()
    assert all(node.is_up for node in cluster.nodes)
    after = cluster.client.ask(cluster.leader, "KV.Range", key=b"k").header.revision
    assert after == revision
    write(cluster)


def test_a_single_member_that_is_set_back_starts() -> None:
    cluster = Cluster(1, **SMALL)
    image = cluster.leader.image()
    write(cluster)
    cluster.leader.set_back(image)
    assert not is_refused(cluster, cluster.leader)
    write(cluster)


def test_a_learner_that_is_set_back_is_refused(cluster: Cluster) -> None:
    cluster.world.run(5)
    learner = cluster.add("m4", True)
    cluster.nodes.append(learner)
    cluster.agree()
    image = learner.image()
    write(cluster)
    cluster.world.run(1)
    learner.set_back(image)
    assert is_refused(cluster, learner)


def test_a_forced_cluster_of_one_ignores_what_the_others_know(cluster: Cluster) -> None:
    node = cluster.followers[0]
    image = node.image()
    write(cluster)
    cluster.world.run(1)
    node.set_back(image)
    node.start(force_new_cluster=True)
    cluster.world.run(5)
    assert node.is_up and node.member.forced.is_done


def test_a_start_in_a_whole_cluster_takes_no_extra_time(cluster: Cluster) -> None:
    node = cluster.followers[0]
    write(cluster)
    node.crash()
    cluster.world.run(2)
    node.start()
    assert not node.member.rollback.is_over
    cluster.world.run(0.2)
    assert node.member.rollback.is_over


def test_restarts_and_losses_of_power_are_no_rollback(cluster: Cluster) -> None:
    rng, world = cluster.world.rng, cluster.world
    for _ in range(30):
        node = rng.choice([n for n in cluster.nodes if n.is_up])
        for number in range(rng.randrange(6)):
            cluster.client.send(node, "KV.Put", key=b"k%d" % number, value=b"v")
        world.run(rng.choice((0.0, 0.001, 0.01, 0.3)))
        victims = rng.sample(cluster.nodes, rng.choice((1, 1, 2, 3)))
        for victim in victims:
            victim.lose_power()
        world.run(rng.choice((0.01, 1.0)))
        for victim in victims:
            victim.start()
        world.run_until(lambda: world.leader is not None)
        assert all(n.is_up for n in cluster.nodes), world.lines[-1]


def test_a_member_that_returns_is_compared_with_the_leader(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corruption, "RETURNED_PAUSE_S", 5.0)
    leader = cluster.leader.member
    cluster.client.put(cluster.leader, b"k", b"right")
    cluster.agree()
    for node, is_wrong in zip(cluster.followers, (False, True), strict=True):
        node.crash()
        cluster.world.run(3)
        write(cluster, 3)
        node.start()
        store = node.member.state.store
        if is_wrong:
            read = store.data.read
            store.data.read = lambda *where, read=read: (  # type: ignore[method-assign,misc]
                read(*where).replace(b"right", b"wrong")
            )
        cluster.world.run(8)
        # A difference is judged by all.
        assert leader.hash_check.comparisons == (3 if is_wrong else 1)
        assert leader.state.alarms.is_corrupt == is_wrong
    assert (node.member_id, CORRUPT) in leader.state.alarms


# Processes.


def copy(member: ServerProcess) -> Path:
    saved = member.data_dir.with_suffix(".copy")
    shutil.copytree(member.data_dir, saved)
    return saved


def set_back(member: ServerProcess, saved: Path) -> None:
    shutil.rmtree(member.data_dir)
    saved.rename(member.data_dir)


def ctl(member: ServerProcess, command: str) -> str:
    program = [sys.executable, "-m", "etcdlite.ctl", f"--endpoints={member.endpoint}"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [*program, *shlex.split(command)]
    run = subprocess.run(arguments, capture_output=True, text=True, env=environ, timeout=PATIENCE_S)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_printed_advice_makes_the_cluster_whole_again(live: Any) -> None:
    three = live()
    member, other = three.follower(), three.leader
    client = other.client()
    client.put(b"k", b"old")
    member.kill()
    saved = copy(member)
    member.start()
    for number in range(20):
        client.put(b"k", b"new%d" % number)
    own = member.client()

    def value() -> bytes | None:
        found = own.get(b"k", serializable=True)
        return found.value if found else None

    wait_until(lambda: value() == b"new19", "it has everything")
    member.kill()
    set_back(member, saved)
    member.spawn()
    assert member.wait() == 2
    line = member.lines[-1]
    assert "FATAL" in line and "is an older copy" in line, member.tail()
    latest = "\n".join(member.lines).rpartition("starting etcdlite server")[2]
    assert "serving client traffic" not in latest
    wait_until(
        lambda: any(one.logged("is an older copy") for one in three.running),
        f"it is logged there too; {other.tail()}",
    )
    client.put(b"k", b"newer")
    # As it says.
    remove, add = re.findall(r"'etcdlite-ctl ([^']*)'", line)
    ctl(other, remove)
    shutil.rmtree(member.data_dir)
    member.data_dir.mkdir()
    wait_until(lambda: "added to cluster" in _try(ctl, other, add), "it is added again")
    member.start("--initial-cluster-state=existing")
    promote = f"member promote {three.id_of(member):x}"
    wait_until(lambda: "promoted" in _try(ctl, other, promote), "it votes again")
    own = member.client()
    wait_until(lambda: not own.status().is_learner, "it knows that it votes")
    assert own.get(b"k").value == b"newer"
    for one in three.members.values():
        one.client().put(b"k", b"newest")


def _try(run: Callable[..., str], *arguments: Any) -> str:
    try:
        return run(*arguments)
    except AssertionError as failure:
        return str(failure)


def test_a_cluster_of_which_all_disks_are_set_back_starts(live: Any) -> None:
    three = live()
    members = list(three.members.values())
    with_old = three.leader.client().put(b"k", b"old")
    assert with_old is not None
    for member in members:
        member.kill()
    saved = [copy(member) for member in members]
    for member in members:
        member.spawn()
    wait_until(lambda: all(member.endpoint for member in members), "all serve")
    three.leader.client().put(b"k", b"new")
    for member in members:
        member.stop()
    for member, old in zip(members, saved, strict=True):
        set_back(member, old)
        member.spawn()
    wait_until(lambda: all(member.endpoint for member in members), "all serve")
    for member in members:
        assert member.client().get(b"k").value == b"old"
        member.client().put(b"j", b"newest")


# The check alone.


class _Progress:
    match = 0


class _Raft:
    """What the check sees of consensus."""

    def __init__(self) -> None:
        self.recovered = (5, 100)
        self.voters = {1, 2, 3}
        self.role = 0
        self.term = 5
        self.progress: dict[int, Any] = {}
        self.log = type("Log", (), {"applied": 90})()
        self.config = type("Config", (), {"election_ticks": 10})()


def make(disk: FaultyDisk, raft: Any = None, now: Callable[[], float] = lambda: 0.0) -> Any:
    store = type("Store", (), {"disk": disk, "directory": "member/data"})()
    members = type("Membership", (), {"members": {}, "removed": {9}})()
    identity = type("Identity", (), {"member_id": 1})()
    version = type("ClusterVersion", (), {"founding": 0})()
    fields = {
        "store": store,
        "membership": members,
        "identity": identity,
        "cluster_version": version,
        "clock": staticmethod(now),
    }

    def run(task: Callable[[], None], done: Callable[[], None]) -> None:
        task()
        done()

    disk.make_dir("member")
    state: Any = type("State", (), fields)()
    return rollback.RollbackCheck(state, raft or _Raft(), run, lambda node: None, Options())


def at(term: int, index: int) -> proto.LogPosition:
    return proto.LogPosition(term=term, index=index)


def test_positions_are_compared_by_term_first() -> None:
    check = make(FaultyDisk())
    assert check.check(2, 11, at(5, 0)) is None
    check.reported(2, rollback._REPORT.pack(7, 50))
    assert check.check(2, 12, at(8, 10)) is None, "in a later term a log may be shorter"
    check.reported(2, rollback._REPORT.pack(8, 60))
    for term, index in ((8, 59), (7, 99), (0, 0)):
        failure = check.check(2, 13, at(term, index))
        assert isinstance(failure, EtcdError) and failure.code == DATA_LOSS
    assert check.check(2, 12, at(8, 10)) is None, "a process that passed is not compared again"
    assert check.check(2, 14, None) is None, "an older version does not tell"
    assert check.check(2, 14, at(8, 60)) is None


def test_a_report_of_another_length_says_nothing() -> None:
    check = make(FaultyDisk())
    for body in (b"", b"x" * 15, b"x" * 17):
        check.reported(2, body)
    assert check.check(2, 11, at(0, 0)) is None


def test_the_file_is_read_again_and_a_damaged_one_is_ignored() -> None:
    disk = FaultyDisk()
    check = make(disk)
    assert check.check(2, 11, at(3, 7)) is None
    check.reported(2, rollback._REPORT.pack(4, 70))
    check.reported(9, rollback._REPORT.pack(4, 70))
    check.save()
    again = make(disk)
    assert again.check(2, 11, at(3, 7)) is None, "it ran on while this member restarted"
    assert again.check(2, 12, at(4, 69)) is not None
    assert again.check(9, 12, at(0, 0)) is None, "removed members are forgotten"
    content = bytes(disk.content("member/positions"))
    assert len(content) == 16 + 56 + 4
    for size in range(len(content)):
        disk.content("member/positions")[:] = content[:size]
        assert make(disk).check(2, 12, at(0, 0)) is None
    for position in range(len(content)):
        disk.content("member/positions")[:] = content
        disk.content("member/positions")[position] ^= 1
        assert make(disk).check(2, 12, at(0, 0)) is None


def test_a_disk_that_cannot_be_written_does_no_harm() -> None:
    disk = FaultyDisk()
    check = make(disk)
    check.reported(2, rollback._REPORT.pack(4, 70))
    disk.fail_at = 1
    check.save()
    check.save()
    assert make(disk).check(2, 12, at(0, 0)) is not None


def test_writes_to_the_file_are_rare() -> None:
    disk, now = FaultyDisk(), 0.0
    check = make(disk, now=lambda: now)
    writes = 0
    for step in range(1200):
        now = step / 10
        check.reported(2, rollback._REPORT.pack(4, step))
        disk.operations.clear()
        check.tick(now)
        writes += any(path == "member/positions" for _, path in disk.operations)
    assert writes <= 2
    check.lost(now)
    now += 1
    check.tick(now)
    assert make(disk).check(2, 12, at(4, 1198)) is not None
