"""When revisions were made, and by whom: the records, and what the commands show of them."""

from __future__ import annotations

import random
import time
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from rigs.ctl_runner import run_ctl
from rigs.processes import ServerFactory, wait_until
from test_cluster import Cluster

from etcdlite import proto
from etcdlite.auth import OWN, Author
from etcdlite.cli.differences import parse_time, revision_at
from etcdlite.cli.failures import BadArguments, Failure
from etcdlite.lease import Lessor
from etcdlite.mvcc import Store
from etcdlite.replica import timeline
from etcdlite.replica.cluster_version import ClusterVersion
from etcdlite.replica.timeline import Timeline
from etcdlite.storage.disk import Disk
from etcdlite.storage.layout import CLUSTER, CLUSTER_VERSION
from etcdlite.versions import V0_1, V0_2


class Kept:
    """A store and its timeline."""

    def __init__(self, folder: Path) -> None:
        self.store = Store.create(Disk(), str(folder / "data"), Lessor(), 1 << 20)
        self.store.set_bucket(CLUSTER, CLUSTER_VERSION, b"0.2")
        self.timeline = Timeline(self.store, ClusterVersion(self.store))

    def change(self, unix_s: int | None = None, author: Author | None = None) -> int:
        self.store.put(b"k", b"v", 0)
        revision = self.store.end_revision()
        if author is not None or self.timeline.knows_user:
            self.timeline.note_user(revision, author)
        if unix_s is not None:
            list(self.timeline.time_steps(unix_s))
        return revision

    def answer(self) -> Any:
        return proto.TimelineResponse.decode(b"".join(self.timeline.answer_steps(b"")))

    def times(self) -> list[tuple[int, int]]:
        found = [(one.revision, one.unix_s) for one in self.answer().times]
        again = Timeline(self.store, ClusterVersion(self.store))
        assert b"".join(again.answer_steps(b"")) == b"".join(self.timeline.answer_steps(b""))
        return found


def test_old_times_are_thinned_out(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    rng = random.Random(4)
    truth = []
    now = 1_800_000_000
    for _ in range(6_000):
        now += rng.choice((1, 1, 2, 30, 300, 3_000))
        truth.append((kept.change(now), now))
    found = kept.times()
    limit = timeline.RECENT + timeline.MINUTES + timeline.HOURS
    assert len(found) <= limit and found[-timeline.RECENT :] == truth[-timeline.RECENT :]
    assert set(found) <= set(truth) and found == sorted(found)
    minutes = [at // 60 for _, at in found[-timeline.RECENT - timeline.MINUTES : -timeline.RECENT]]
    assert len(set(minutes)) == len(minutes)
    hours = [at // 3600 for _, at in found[: -timeline.RECENT - timeline.MINUTES]]
    assert len(set(hours)) == len(hours)
    # A time is found to the minute, or the hour: never a later revision than the right one.
    for _ in range(300):
        at = rng.randrange(found[0][1], now)
        right = revision_at(truth, at)
        assert truth[0][0] <= revision_at(found, at) <= right
    with pytest.raises(Failure, match="the first one known is"):
        revision_at(found, found[0][1] - 1)


def test_a_clock_that_goes_back_drops_the_times_after_it(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    revisions = [kept.change(1000 + n) for n in range(5)]
    last = kept.change(1002)
    assert kept.times() == [*zip(revisions[:3], (1000, 1001, 1002), strict=True), (last, 1002)]
    list(kept.timeline.time_steps(2000))
    assert kept.times()[-1] == (last, 1002), "a time without a new revision changes nothing"


def test_compaction_drops_what_is_not_needed(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    users = [Author(f"user {n % 3}", 1) for n in range(700)]
    revisions = [kept.change(1000 + n, user) for n, user in enumerate(users)]
    list(kept.timeline.compact_steps(revisions[600]))
    assert kept.times() == [(rev, 1000 + n + 600) for n, rev in enumerate(revisions[600:])]
    runs = kept.answer().users
    assert [run.revision for run in runs] == revisions[600:]
    list(kept.timeline.compact_steps(revisions[-1]))
    assert len(kept.times()) == 1 and len(kept.answer().users) == 1


@pytest.mark.parametrize("before", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_an_answer_and_a_compaction_take_turns(tmp_path: Path, before: int, pieces: int) -> None:
    """A reading goes on, or begins, while an entry is applied in part."""
    kept = Kept(tmp_path)
    users = [Author(f"user {n % 3}", 1) for n in range(700)]
    revisions = [kept.change(1000 + n, user) for n, user in enumerate(users)]
    compaction = kept.timeline.compact_steps(revisions[-1])
    for _ in range(before):
        next(compaction)
    whole = b"".join(kept.timeline.answer_steps(b""))
    answer = kept.timeline.answer_steps(b"")
    begun = list(islice(answer, pieces))
    list(compaction)
    assert b"".join([*begun, *answer]) == whole
    assert len(kept.times()) == len(kept.answer().users) == 1


def test_users_are_runs(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    alice, bob = Author("alice", 1), Author("bob", 2)
    for author in (None, alice, alice, bob, OWN, None, None, alice):
        kept.change(None, author)
    shown = [(run.revision, run.user, run.is_member) for run in kept.answer().users]
    assert shown == [
        (3, "alice", False), (5, "bob", False), (6, "", True), (7, "", False), (9, "alice", False),
    ]  # fmt: skip
    for n in range(2 * timeline.MAX_RUNS):
        kept.change(None, (alice, bob)[n % 2])
    assert len(kept.answer().users) == timeline.MAX_RUNS
    kept.times()


def test_nothing_is_kept_before_the_cluster_version_allows_it(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.store.set_bucket(CLUSTER, CLUSTER_VERSION, b"0.1")
    kept.timeline = Timeline(kept.store, ClusterVersion(kept.store))
    kept.timeline.note_user(kept.change(), Author("alice", 1))
    assert not kept.answer().users


def test_who_made_changes_while_no_records_were_allowed_is_not_known(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    version = ClusterVersion(kept.store)
    kept.timeline = Timeline(kept.store, version)
    alice, bob = Author("alice", 1), Author("bob", 2)
    by_alice = kept.change(None, alice)
    for author in (bob, None):
        version.apply(version.change(V0_2, V0_1))
        kept.timeline.stop()
        changed = kept.change(None, author) if author else kept.store.revision
        version.apply(version.change(V0_2, None))
        last = kept.change(None, alice)
    shown = [(run.revision, run.user) for run in kept.answer().users]
    # `shown` is as it was: nothing changed between the two readings.
    assert shown == [(by_alice, "alice"), (by_alice + 1, ""), (changed, "alice"), (last, "alice")]
    kept.times()


def test_a_new_leader_tells_no_time_before_it_has_applied_what_it_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster()
    cluster.client.put(cluster.leader, b"k")
    member = cluster.leader.member
    store, keeper, now = member.state.store, member.time_keeper, cluster.leader.clock()
    last = member.raft.log.last
    with monkeypatch.context() as patch:
        patch.setattr(store, "applied_term", store.applied_term - 1)
        for later in range(5):
            keeper.tick(now + later)
        assert member.raft.log.last == last, "the version may have gone down in between"
    keeper.tick(now + 5)
    assert member.raft.log.last == last + 1


def test_nothing_is_written_while_nothing_changes() -> None:
    cluster = Cluster()
    cluster.client.put(cluster.leader, b"k")
    cluster.world.run(3)
    known = {node.name: node.member.raft.log.last for node in cluster.nodes}
    assert len(set(known.values())) == 1
    cluster.world.run(300)
    assert {node.name: node.member.raft.log.last for node in cluster.nodes} == known


def test_times_are_written_in_several_ways() -> None:
    at = int(datetime(2026, 11, 24, 10, 0, 5, tzinfo=timezone.utc).timestamp())
    for text in ("2026-11-24T10:00:05Z", "2026-11-24 11:00:05+01:00", str(at)):
        assert parse_time(text) == at
    assert abs(parse_time("90m") - (time.time() - 5400)) < 5
    assert parse_time("2026-11-24 10:00") == datetime(2026, 11, 24, 10, 0).timestamp()
    for text in ("", "yesterday", "2026-13-01", "9" * 40, "m"):
        with pytest.raises(BadArguments):
            parse_time(text)


def test_the_state_at_a_time_and_who_changed_it(server: ServerFactory, tmp_path: Path) -> None:
    running = server()
    client = running.client()
    at = f"--endpoints={running.endpoint}"
    first = client.put("a", "1").revision

    def known() -> list[Any]:
        return list(client.call("History.Timeline", proto.TimelineRequest()).times)

    wait_until(lambda: known() and known()[-1].revision >= first, "the time is known")
    then = known()[-1].unix_s
    assert abs(then - time.time()) < 60
    wait_until(lambda: int(time.time()) > then, "a second passes")
    client.delete("a")
    client.put("b", "2")
    wait_until(lambda: known()[-1].revision == first + 2, "the time is known")
    whole, saved = str(tmp_path / "whole.db"), str(tmp_path / "saved.xtr")
    assert run_ctl(at, "snapshot", "save", whole).status == 0
    assert run_ctl(at, "snapshot", "save", "--at", str(then), saved).status == 0
    for file, flags in ((whole, ("--at", str(then))), (saved, ())):
        ended = run_ctl(at, "snapshot", "restore", file, *flags, "--into-cluster", "--dry-run")
        assert (ended.status, ended.stdout) == (0, b'+ "a" = "1"\n- "b" = "2"\n'), ended
    ended = run_ctl(at, "snapshot", "save", "--at", str(then - 86_400), saved)
    assert ended.status == 1 and "no revision is known at" in ended.stderr
    # Users.
    client.call("Auth.UserAdd", proto.AuthUserAddRequest(name="root", password="p"))
    client.call("Auth.UserGrantRole", proto.AuthUserGrantRoleRequest(user="root", role="root"))
    client.call("Auth.AuthEnable", proto.AuthEnableRequest())
    root = (at, "--user", "root:p")
    assert run_ctl(*root, "put", "a", "3").status == 0
    shown = run_ctl(*root, "history", "a").stdout.decode().splitlines()
    assert [line.split("  ")[0] for line in shown] == ['+ "a" = "1"', '- "a" = "1"', '+ "a" = "3"']
    assert f"revision {first}  time 20" in shown[0] and "user" not in shown[0]
    assert shown[2].endswith("user root")
    shown = run_ctl(*root, "diff", "--rev", f"{first}..", "-w", "json").stdout.decode()
    assert '"user":"root"' in shown and shown.count("\n") == 2
    running.kill()
    running.start()
    root = (f"--endpoints={running.endpoint}", *root[1:])
    assert "user root" in run_ctl(*root, "history", "a").stdout.decode()
