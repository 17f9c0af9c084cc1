"""The cluster version: when it rises, what it allows, and which programs it refuses."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import pytest
from rigs.lone_member import LoneMember
from rigs.processes import ROOT
from sim.world import Node
from test_cluster import SMALL, Cluster

from etcdlite import bootstrap, datadir, log, proto, versions
from etcdlite.auth import Author
from etcdlite.client.connection import ClientConnection
from etcdlite.errors import EtcdError
from etcdlite.frames import frame
from etcdlite.methods import PUT, SET_CLUSTER_VERSION, SINCE
from etcdlite.proto import DecodeError
from etcdlite.replica.cluster_version import founding_in
from etcdlite.replica.entry import TooNew, check_entry, encode_entry, needed_version
from etcdlite.replica.entry import read_header as read_entry
from etcdlite.snap import SnapshotError, read_header
from etcdlite.storage import checkpoint
from etcdlite.storage.layout import DataVersionError
from etcdlite.versions import CURRENT, SETS_VERSION, V0_1, V0_2, Version


def version_of(node: Node) -> Version:
    return node.member.state.cluster_version.version


def contents(node: Node) -> dict[str, bytes]:
    return {path: bytes(node.disk.content(path)) for path in node.disk.paths}


def restart(cluster: Cluster, node: Node, version: Version) -> None:
    node.crash()
    node.version = version
    node.start()
    cluster.leader = cluster.world.elect()


def until_all_have(cluster: Cluster, version: Version) -> None:
    cluster.world.run_until(lambda: all(version_of(node) == version for node in cluster.nodes))


@pytest.mark.parametrize("text", ["", "0", "0.", "a.b", "0.-1", "0.1 ", "0.٣", "0.99999", "+1.2"])
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a version"):
        versions.parse(text)


def test_a_version_has_no_patch_number() -> None:
    assert versions.parse("0.1") == versions.parse("0.1.7") == V0_1
    assert (str(V0_2), V0_2.full) == ("0.2", "0.2.0")


def test_a_version_may_end_with_the_number_of_a_founding() -> None:
    for text, number in (("0.2.7", 7), (f"0.2.{2**64 - 1}", 2**64 - 1)):
        assert founding_in(text) == number
    for other in ("", "x", "-1", "1.2", "1 ", "٣", str(2**64), "9" * 5000):
        assert founding_in(f"0.2.{other}") == founding_in(other) == 0


def test_programs_of_neighbouring_versions_fit() -> None:
    for at, cluster in enumerate(versions.ALL):
        for number, program in enumerate(versions.ALL):
            fits = at <= number <= at + 1
            assert (versions.incompatibility(program, cluster) == "") == fits, (program, cluster)
    assert "downgrade enable 0.1" in versions.incompatibility(V0_1, V0_2)


def test_a_new_cluster_has_the_newest_version() -> None:
    for count in (1, 3):
        cluster = Cluster(count)
        assert {version_of(node) for node in cluster.nodes} == {CURRENT}
        assert {node.member.state.store.storage_version for node in cluster.nodes} == {CURRENT}


def test_the_version_rises_when_the_last_member_is_updated() -> None:
    cluster = Cluster(version=V0_1, **SMALL)
    cluster.client.put(cluster.leader, b"a")
    for node in cluster.nodes:
        assert {version_of(other) for other in cluster.nodes} == {V0_1}
        assert not cluster.leader.member.state.cluster_version.allows(SETS_VERSION)
        restart(cluster, node, V0_2)
        cluster.client.put(cluster.leader, b"a")
        cluster.world.run(2)
    until_all_have(cluster, V0_2)
    assert cluster.leader.member.state.cluster_version.allows(SETS_VERSION)
    cluster.agree()
    # Each writes a checkpoint, which the older program refuses.
    cluster.world.run_until(
        lambda: all(node.member.state.store.storage_version == V0_2 for node in cluster.nodes)
    )


def test_a_member_that_is_down_keeps_the_version_down() -> None:
    cluster = Cluster(version=V0_1, **SMALL)
    for node in cluster.nodes[:2]:
        restart(cluster, node, V0_2)
    cluster.nodes[2].crash()
    cluster.leader = cluster.world.elect()
    cluster.world.run(10)
    assert {version_of(node) for node in cluster.nodes[:2]} == {V0_1}


def test_an_older_learner_keeps_the_version_down() -> None:
    cluster = Cluster(version=V0_1, **SMALL)
    cluster.world.run(5)
    learner = cluster.add("l1", is_learner=True)
    for node in cluster.nodes:
        restart(cluster, node, V0_2)
    cluster.world.run(10)
    assert {version_of(node) for node in cluster.nodes} == {V0_1}
    restart(cluster, learner, V0_2)
    cluster.nodes.append(learner)
    until_all_have(cluster, V0_2)


def test_a_program_that_is_too_old_does_not_start_and_changes_nothing() -> None:
    cluster = Cluster()
    node = cluster.followers[0]
    node.crash()
    before = contents(node)
    node.version = V0_1
    with pytest.raises(datadir.StartError, match=r"the cluster has version .*Nothing was changed"):
        node.start()
    assert contents(node) == before
    node.version = V0_2
    node.start()
    cluster.leader = cluster.world.elect()
    cluster.agree()


def test_a_program_that_is_too_old_cannot_join(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(log, "warn", lambda message, *limit, **fields: lines.append(str(fields)))
    cluster = Cluster(**SMALL)
    cluster.options = {**SMALL, "version": V0_1}
    cluster.world.run(5)
    old = cluster.add("old", is_learner=True)
    cluster.world.run(5)
    assert old.member.state.store.applied_index == 0
    assert any("etcdlite 0.1 is too old for it" in line for line in lines), lines


def test_an_entry_says_what_it_needs() -> None:
    plain = encode_entry(7, 1, [b""])
    assert plain[:4] == b"\x02\0\0\0"
    assert needed_version(plain) == needed_version(b"") == V0_1
    newer = encode_entry(7, 1, [b"x"], V0_2)
    assert newer[:4] == b"\x03\0\x02\0"
    check_entry(newer)
    assert needed_version(newer) == V0_2
    future = encode_entry(7, 1, [b"x"], Version(CURRENT.major, CURRENT.minor + 1))
    with pytest.raises(TooNew, match=r"needs etcdlite \d+\.\d+ or later, and this is"):
        read_entry(future)
    with pytest.raises(TooNew, match="format version 4"):
        read_entry(b"\x04" + plain[1:])
    for broken in (b"\x03\0\x02\x01" + newer[4:], b"\x02\0\x02\0" + newer[4:], newer[:20]):
        with pytest.raises(DecodeError):
            read_entry(broken)


def test_the_leader_refuses_what_the_version_does_not_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(version=V0_1)
    monkeypatch.setitem(SINCE, PUT, V0_2)
    with pytest.raises(EtcdError, match="the cluster version does not allow this"):
        cluster.client.put(cluster.leader, b"k")
    with pytest.raises(EtcdError, match="the cluster version does not allow this"):
        cluster.client.put(cluster.followers[0], b"k")
    assert cluster.client.get(cluster.leader, b"k") is None


def test_a_lease_with_a_negative_id_waits_for_the_version_that_knows_it() -> None:
    cluster = Cluster(version=V0_1)
    with pytest.raises(EtcdError, match="lease not found"):
        cluster.client.ask(cluster.leader, "Lease.LeaseGrant", ID=-1, TTL=60)


def test_what_was_proposed_before_the_version_went_down_has_no_effect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(version=V0_1)
    member = cluster.leader.member
    request = proto.PutRequest(key=b"k", value=b"v")
    entry = encode_entry(member.identity.member_id, 1, [frame(1, PUT, 0, request.encode())], V0_2)
    member.raft.propose(entry)
    cluster.client.put(cluster.leader, b"other")
    cluster.agree()
    assert cluster.client.get(cluster.leader, b"k") is None


def test_a_late_change_of_the_version_has_no_effect() -> None:
    cluster = Cluster()
    state, writes = cluster.leader.member.state.cluster_version, cluster.leader.member.writes
    first, second = state.change(V0_2, V0_1), state.change(V0_1, None)
    assert writes.propose_once([(SET_CLUSTER_VERSION, first), (SET_CLUSTER_VERSION, second)])
    cluster.world.run(0.4)
    assert state.target == V0_1 or state.version == V0_1
    cluster.agree()


def test_a_checkpoint_says_what_it_needs() -> None:
    cluster = Cluster(1, **SMALL)
    node = cluster.nodes[0]
    path = "data/member/data/checkpoint"
    head = bytes(node.disk.content(path)[:16])
    assert head == b"ETCDLCHK\x03\0\0\0\0\0\x02\0"
    assert checkpoint.needed_version(node.disk, "data/member/data") == V0_2
    node.crash()
    for changed, what in (
        (b"ETCDLCHK\x03\0\0\0\0\0\x63\0", r"needs etcdlite 0\.99 or later, and this is"),
        (b"ETCDLCHK\x04\0\0\0\0\0\x02\0", "format version 4 is newer than this program's"),
    ):
        node.disk.content(path)[:16] = changed
        with pytest.raises(DataVersionError, match=what + ".*Nothing was changed"):
            node.start()


# Going down.


def downgrade(cluster: Cluster, node: Node, action: int, version: str = "") -> str:
    answer = cluster.client.ask(node, "Maintenance.Downgrade", action=action, version=version)
    return str(answer.version)


VALIDATE, ENABLE, CANCEL = range(3)


def until_all_can_be_opened_by(cluster: Cluster, version: Version) -> None:
    cluster.world.run_until(
        lambda: all(node.member.state.store.storage_version == version for node in cluster.nodes)
    )


def test_the_version_does_not_go_down_below_a_lease_that_it_does_not_know() -> None:
    cluster = Cluster()
    assert cluster.client.ask(cluster.leader, "Lease.LeaseGrant", ID=-1, TTL=60).ID == -1
    for action in (VALIDATE, ENABLE):
        with pytest.raises(EtcdError, match="revoke the leases with negative ids first"):
            downgrade(cluster, cluster.leader, action, "0.1")
    cluster.client.ask(cluster.leader, "Lease.LeaseRevoke", ID=-1)
    assert downgrade(cluster, cluster.leader, ENABLE, "0.1") == "0.2"


@pytest.mark.parametrize("later_s", [0.0, 0.001, 0.002, 0.004, 0.006, 0.01, 0.02, 0.05])
@pytest.mark.parametrize("at", [0, 1])
def test_a_lease_that_comes_during_a_downgrade_is_refused_or_keeps_the_version_up(
    at: int, later_s: float
) -> None:
    cluster = Cluster(**SMALL)
    node = [cluster.leader, *cluster.followers][at]
    request = {"action": ENABLE, "version": "0.1"}
    cluster.client.send(cluster.leader, "Maintenance.Downgrade", **request)
    cluster.world.run(later_s)
    granted = cluster.client.send(node, "Lease.LeaseGrant", ID=-1, TTL=600)
    cluster.world.run(5)
    knows = not isinstance(cluster.client.answers[granted], EtcdError)
    assert {version_of(node) for node in cluster.nodes} == {V0_2 if knows else V0_1}
    if knows:
        cluster.client.ask(node, "Lease.LeaseRevoke", ID=-1)
        until_all_have(cluster, V0_1)


def test_a_cluster_goes_down_and_up_again() -> None:
    cluster = Cluster(**SMALL)
    follower = cluster.followers[0]
    assert downgrade(cluster, follower, VALIDATE, "0.1") == "0.2"
    assert downgrade(cluster, follower, ENABLE, "0.1.0") == "0.2"
    assert not cluster.leader.member.state.cluster_version.allows(SETS_VERSION)
    until_all_have(cluster, V0_1)
    until_all_can_be_opened_by(cluster, V0_1)
    status = cluster.client.ask(follower, "Maintenance.Status")
    assert (status.storageVersion, status.downgradeInfo.targetVersion) == ("0.1.0", "0.1.0")
    cluster.world.run(10)
    assert {version_of(node) for node in cluster.nodes} == {V0_1}
    for node in cluster.nodes:
        restart(cluster, node, V0_1)
        cluster.client.put(cluster.leader, b"k")
    cluster.world.run(6)
    cluster.agree()
    # The operator says when the newer one is there to stay.
    for node in cluster.nodes:
        restart(cluster, node, V0_2)
    cluster.world.run(10)
    assert {version_of(node) for node in cluster.nodes} == {V0_1}
    assert downgrade(cluster, cluster.leader, CANCEL) == "0.1"
    until_all_have(cluster, V0_2)
    cluster.agree()


def test_a_downgrade_that_is_cancelled_at_any_moment_is_cancelled() -> None:
    """Also while the leader proposes to lower the version."""
    cluster = Cluster(**SMALL)
    for later_ms in range(0, 1_500, 7):
        assert downgrade(cluster, cluster.leader, ENABLE, "0.1") == "0.2"
        cluster.world.run(later_ms / 1000)
        sent = cluster.client.send(cluster.leader, "Maintenance.Downgrade", action=CANCEL)
        cluster.world.run_until(lambda: sent in cluster.client.answers)  # noqa: B023
        assert not isinstance(cluster.client.answers[sent], EtcdError), (later_ms, sent)
        until_all_have(cluster, V0_2)


def test_the_last_known_user_is_not_said_to_have_made_later_changes() -> None:
    cluster = Cluster(1)
    timeline = cluster.leader.member.state.timeline
    timeline.note_user(cluster.client.put(cluster.leader, b"k"), Author("alice", 1))
    assert timeline.knows_user
    downgrade(cluster, cluster.leader, ENABLE, "0.1")
    assert not timeline.knows_user


def test_a_member_that_is_down_keeps_the_version_up() -> None:
    cluster = Cluster(**SMALL)
    cluster.followers[0].crash()
    downgrade(cluster, cluster.leader, ENABLE, "0.1")
    cluster.world.run(10)
    assert version_of(cluster.leader) == V0_2
    assert not cluster.leader.member.state.cluster_version.allows(SETS_VERSION)
    cluster.followers[0].start()
    until_all_have(cluster, V0_1)


def test_downgrades_that_make_no_sense_are_refused_with_the_texts_of_etcd() -> None:
    cluster = Cluster(1)
    node = cluster.leader

    def refused(action: int, version: str = "") -> str:
        with pytest.raises(EtcdError) as failure:
            downgrade(cluster, node, action, version)
        return failure.value.text

    for action in (VALIDATE, ENABLE):
        for text in ("", "x", "0", "v0.1"):
            assert refused(action, text) == "etcdserver: wrong downgrade target version format"
        for text in ("0.2", "0.3", "3.5", "0.0"):
            assert refused(action, text) == "etcdserver: invalid downgrade target version"
    assert refused(CANCEL) == "etcdserver: no inflight downgrade job"
    assert refused(3) == "etcdserver: unknown method"
    downgrade(cluster, node, ENABLE, "0.1")
    # At once, before the version went down.
    assert refused(ENABLE, "0.1") == "etcdserver: cluster has a downgrade job in progress"
    until_all_have(cluster, V0_1)
    assert refused(ENABLE, "0.1") == "etcdserver: invalid downgrade target version"
    assert downgrade(cluster, node, CANCEL) == "0.1"
    until_all_have(cluster, V0_2)


def test_a_downgrade_is_not_cancelled_while_an_older_program_runs() -> None:
    cluster = Cluster(**SMALL)
    downgrade(cluster, cluster.leader, ENABLE, "0.1")
    until_all_can_be_opened_by(cluster, V0_1)
    restart(cluster, cluster.followers[0], V0_1)
    cluster.world.run(2)
    assert cluster.leader.version == V0_2
    with pytest.raises(EtcdError, match="not all members are connected and run etcdlite"):
        downgrade(cluster, cluster.leader, CANCEL)


# Files of newer formats.


def make_newer(path: Path, at: int, new: bytes) -> None:
    """Change bytes of a file, and the checksum of a header that has one."""
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    if path.suffix == ".wal":
        (header_bytes,) = struct.unpack_from("<I", data, 12)
        data[header_bytes - 4 : header_bytes] = struct.pack("<I", crc32(data[: header_bytes - 4]))
    elif path.suffix == ".seg":
        data[28:32] = struct.pack("<I", crc32(data[:28]))
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "at", "new", "version"),
    [
        ("wal/0000000000000001.wal", 8, b"\x09", "format version 9"),
        ("data/0000000000000001.seg", 8, b"\x09", "format version 9"),
        ("data/checkpoint", 8, b"\x09", "format version 9"),
        ("data/checkpoint", 14, b"\x63", "it needs etcdlite 0.99 or later, and this is"),
    ],
)
def test_a_start_on_newer_files_says_what_to_do_and_changes_nothing(
    tmp_path: Path, name: str, at: int, new: bytes, version: str
) -> None:
    folder = tmp_path / "one"
    lone = LoneMember(folder)
    lone.wal.close()
    lone.member.maintenance.close(False)
    (folder / "lock").touch()
    path = folder / "member" / name
    make_newer(path, at, new)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    flags = [f"--data-dir={folder}", "--listen-client-urls=http://127.0.0.1:0"]
    ended = subprocess.run(
        [sys.executable, "-m", "etcdlite", *flags, "--listen-peer-urls=http://127.0.0.1:0"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 2, ended
    told = ended.stderr.splitlines()[-1]
    assert str(path) in told and version in told and "Nothing was changed" in told, told
    assert "Start that version again. Or: " in told and "etcdlite-ctl snapshot restore" in told
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert after == before


def test_a_backup_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "backup.db"
    path.write_bytes(b"ETCDLSNP\x09\0\0\0\0\0\0\0" + bytes(512 - 16 + 32))
    with pytest.raises(SnapshotError, match=r"backup\.db has format version 9.*newer one"):
        read_header(str(path), path.open("rb"))


def test_a_program_that_is_too_old_is_told_so_when_it_wants_to_join() -> None:
    answered = ClientConnection()
    answered.hello = proto.Hello(cluster_version="0.99")
    with pytest.raises(datadir.StartError, match=r"according to the member at there, the cluster"):
        bootstrap.check_version(answered, "there")
    answered.hello = proto.Hello()
    bootstrap.check_version(answered, "there")
