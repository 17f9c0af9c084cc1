"""Snapshots: a copy of a moment, whatever happens while it is read."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rigs.homes import home
from rigs.member_rig import MemberRig
from rigs.store_rig import SMALL_LIMITS, check_store
from test_cluster import backup_call
from test_recovery import live, random_write

from etcdlite import backup, bootstrap, datadir, proto, snap
from etcdlite.datadir import StartError
from etcdlite.errors import DATA_LOSS, EtcdError
from etcdlite.lease import Lessor
from etcdlite.mvcc import Store
from etcdlite.replica.alarms import NOSPACE
from etcdlite.replica.membership import derive_member_id
from etcdlite.storage.disk import Disk
from etcdlite.storage.layout import ALARM, MEMBER, segment_name
from etcdlite.wire import streams

URLS = "http://127.0.0.1:2380"


def lived(seed: int = 1, writes: int = 120) -> MemberRig:
    rig = MemberRig(checkpoint_bytes=1, limits=SMALL_LIMITS)
    live(rig, random.Random(seed), writes)
    return rig


def parts(rig: MemberRig) -> Any:
    for response in streams.snapshot_parts(rig.member):
        yield proto.SnapshotResponse.decode(response).blob


def opened(data_dir: Path) -> datadir.Opened:
    place = home(data_dir, segment_bytes=1 << 16, wal_segment_bytes=1 << 16)
    return datadir.open_member(place, min_ttl_s=1, sync_enabled=True)


@pytest.mark.parametrize("seed", range(4))
def test_a_restored_member_holds_what_the_snapshot_held(seed: int, tmp_path: Path) -> None:
    rig = lived(seed)
    path = tmp_path / "backup"
    path.write_bytes(b"".join(parts(rig)))
    backup.restore(str(path), home(tmp_path / "restored"))
    again = opened(tmp_path / "restored")
    check_store(again.store, rig.story.model)
    assert not again.notes
    assert again.store.applied_index == rig.member.state.store.applied_index


def test_a_snapshot_is_of_the_moment_its_reading_began(
    tmp_path: Path,
) -> None:
    rig = lived()
    rig.member.state.store.limits = SMALL_LIMITS._replace(snapshot_chunk_bytes=100)
    rng = random.Random(2)
    stage = len(rig.story.stages) - 1
    blob = b""
    for part in parts(rig):
        blob += part
        # Writes, checkpoints, and cleaning that removes the very files that are read.
        rig.ask(random_write(rng, rig.story))
        if rng.random() < 0.1:
            rig.ask(proto.DefragmentRequest())
    path = tmp_path / "backup"
    path.write_bytes(blob)
    backup.restore(str(path), home(tmp_path / "restored"))
    check_store(opened(tmp_path / "restored").store, rig.story.fork(stage).model)


def test_revisions_are_not_bumped_beyond_what_they_can_be(tmp_path: Path) -> None:
    path, restored = tmp_path / "backup", tmp_path / "restored"
    path.write_bytes(b"".join(parts(lived(0))))
    with pytest.raises(snap.SnapshotError, match="bump the revision by less"):
        backup.restore(str(path), home(restored), bump_revision=backup.MAX_REVISION)
    assert not restored.exists()


@pytest.mark.parametrize("seed", range(4))
def test_a_restored_member_goes_on_with_later_revisions(seed: int, tmp_path: Path) -> None:
    rig = lived(seed)
    store = rig.member.state.store
    revision = store.revision
    path = tmp_path / "backup"
    path.write_bytes(b"".join(parts(rig)))
    backup.restore(str(path), home(tmp_path / "restored"), bump_revision=1 << 40)
    again = opened(tmp_path / "restored").store
    assert again.revision == again.compacted == revision + (1 << 40)
    assert again.compaction is None and not again.index.past
    for key in store.index.heads:
        assert again.get(key) == store.get(key), "the keys are the same, with their revisions"
    with pytest.raises(EtcdError, match="compacted"):
        again.check_revision(again.revision - 1)
    again.check_revision(again.revision)
    # What is written then survives a start, and so does its history.
    for value in (b"1", b"2"):
        again.put(b"new", value, 0)
        again.end_revision()
    again.mark(again.applied_index + 1, again.applied_term)
    again.close()
    data = str(tmp_path / "restored" / "member" / "data")
    once_more = Store.open(Disk(), data, Lessor(), 1 << 16)
    assert once_more.revision == revision + (1 << 40) + 2
    steps = once_more.event_steps(once_more.compacted, 1 << 20)
    with pytest.raises(StopIteration) as done:
        while True:
            next(steps)
    values = [proto.KeyValue.decode(body).value for *_, body in done.value.value]
    assert values == [b"1", b"2"]


def test_members_restored_from_different_backups_are_of_different_clusters(tmp_path: Path) -> None:
    """Their logs have other entries at the same places. With one cluster id, a member with more of
    the old history served it in linearizable reads, and acknowledged what it did not have."""
    rig = lived()
    clusters = []
    for number, bump in enumerate((0, 0, 0, 1000, 0)):
        if number == 2:
            rig.ask(proto.PutRequest(key=b"later", value=b"v"))
        elif number == 4:
            rig.ask(proto.LeaseGrantRequest(TTL=60))  # The revision stays.
        rig.settle()
        path, data_dir = tmp_path / f"backup{number}", tmp_path / f"restored{number}"
        path.write_bytes(b"".join(parts(rig)))
        backup.restore(str(path), home(data_dir), initial_cluster_token="t", bump_revision=bump)
        clusters.append(opened(data_dir).cluster_id)
    founded = bootstrap.new_cluster("default", [("default", "http://localhost:2380")], "t")
    assert clusters[0] == clusters[1]
    assert len({*clusters, founded.cluster_id}) == 5, "nor are they of the old one"


def test_a_restored_member_is_one_of_its_own(tmp_path: Path) -> None:
    rig = lived()
    rig.ask(proto.AlarmRequest(action=1, memberID=7, alarm=NOSPACE))
    path = tmp_path / "backup"
    path.write_bytes(b"".join(parts(rig)))
    backup.restore(
        str(path),
        home(tmp_path / "restored"),
        name="new",
        initial_cluster_token="token",
        initial_advertise_peer_urls=URLS,
    )
    again = opened(tmp_path / "restored")
    assert again.member_id == derive_member_id([URLS], "token") != rig.member.identity.member_id
    assert again.cluster_id != rig.member.identity.cluster_id
    (member,) = again.store.buckets[MEMBER].values()
    found = proto.Member.decode(member)
    assert (found.ID, found.name, list(found.peerURLs)) == (again.member_id, "new", [URLS])
    assert not again.store.buckets.get(ALARM), "the alarm of another member was taken along"


def test_the_announced_size_is_the_size(tmp_path: Path) -> None:
    rig = lived()
    left = None
    for response in streams.snapshot_parts(rig.member):
        message = proto.SnapshotResponse.decode(response)
        assert left is None or message.remaining_bytes == left - len(message.blob)
        left = message.remaining_bytes
    assert left == 0


def test_the_status_tells_what_is_in_it(tmp_path: Path) -> None:
    rig = lived()
    blob = b"".join(parts(rig))
    path = tmp_path / "backup"
    path.write_bytes(blob)
    status = backup.status(str(path))
    assert status.revision == rig.story.model.revision
    assert status.total_keys == len(rig.story.model.now)
    assert status.total_size_bytes == len(blob)
    digest = hashlib.sha256(blob[:-32]).digest()
    assert blob[-32:] == digest and (len(blob) - 32) % 512 == 0
    assert status.hash == int.from_bytes(digest[:4], "big")


def test_a_damaged_snapshot_is_refused_and_leaves_no_member(tmp_path: Path) -> None:
    blob = b"".join(parts(lived(writes=40)))
    path = tmp_path / "backup"
    rng = random.Random(5)
    data_dir = tmp_path / "restored"
    for number in range(150):
        if number % 2:
            broken = blob[: rng.randrange(len(blob))]
        else:
            changed = bytearray(blob)
            changed[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
            broken = bytes(changed)
        path.write_bytes(broken)
        for use in (
            lambda: backup.status(str(path)),
            lambda: backup.restore(str(path), home(data_dir)),
        ):
            with pytest.raises(snap.SnapshotError, match="backup"):
                use()
        assert not home(data_dir).exists
    path.write_bytes(blob)
    backup.restore(str(path), home(data_dir))
    assert home(data_dir).exists


def test_a_file_that_cannot_be_read_ends_the_stream_with_data_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "PARTS_PER_SLICE", 1)
    rig = lived()
    call = backup_call(rig)
    call.message(b"")
    call.produce()
    rig.disk.fail_at = 1  # type: ignore[attr-defined]
    with pytest.raises(EtcdError, match="cannot read the data; ask another member") as failed:
        while not call.is_closed:
            call.produce()
    assert failed.value.code == DATA_LOSS
    assert not sum(rig.member.metrics.snapshot_s.counts), "only whole ones count"


def test_the_time_of_a_backup_is_measured() -> None:
    rig = lived()
    call = backup_call(rig)
    call.message(b"")
    while not call.is_closed:
        assert not sum(rig.member.metrics.snapshot_s.counts)
        call.produce()
    assert sum(rig.member.metrics.snapshot_s.counts) == 1


def test_a_directory_that_holds_a_member_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "backup"
    path.write_bytes(b"".join(parts(lived(writes=20))))
    backup.restore(str(path), home(tmp_path / "restored"))
    with pytest.raises(StartError, match="already holds a member"):
        backup.restore(str(path), home(tmp_path / "restored"))
    opened(tmp_path / "restored")


@pytest.mark.parametrize("flag", ["data_dir", "wal_dir"])
def test_a_backup_is_not_restored_among_other_files(tmp_path: Path, flag: str) -> None:
    path = tmp_path / "backup"
    path.write_bytes(b"".join(parts(lived(writes=20))))
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes").touch()
    place = home(tmp_path / "restored")._replace(**{flag: str(used)})
    with pytest.raises(StartError, match="other files: notes"):
        backup.restore(str(path), place)
    assert [found.name for found in used.iterdir()] == ["notes"]
    assert not (tmp_path / "restored").exists()


def test_a_backup_of_a_disk_that_rots_is_not_restored(tmp_path: Path) -> None:
    rig = lived()
    data = rig.member.state.store.data
    number = min(data.sizes)
    content = rig.disk.content(f"{data.directory}/{segment_name(number)}")  # type: ignore[attr-defined]
    content[len(content) // 2] ^= 1
    path = tmp_path / "backup"
    path.write_bytes(b"".join(parts(rig)))
    for use in (backup.status, lambda path: backup.restore(path, home(tmp_path / "restored"))):
        with pytest.raises(snap.SnapshotError, match="the member that made it is failing"):
            use(str(path))
    assert not home(tmp_path / "restored").exists


SEGMENT = segment_name(1)


def header(**changes: Any) -> bytes:
    file = {"name": "checkpoint", "size_bytes": 1}
    fields = {"revision": 1, "applied_index": 1, "total_keys": 1, "files": [file]}
    return json.dumps(fields | changes).encode()


def read_header(header: bytes, tmp_path: Path) -> Any:
    path = tmp_path / "backup"
    head = snap.MAGIC + snap.FORMAT_VERSION.to_bytes(4, "little")
    path.write_bytes(head + len(header).to_bytes(4, "little") + header)
    with path.open("rb") as file:
        return snap.read_header("backup", file)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff",
        b"[]",
        b"[" * 60_000,
        b'{"revision": 1, "total_keys": 1}',
        header(files=[]),
        header(revision="1"),
        header(revision=-1),
        header(revision=1 << 63),
        header(applied_index=None),
        header(applied_index=1 << 64),
        header(files=[{"name": "../x", "size_bytes": 1}]),
        header(files=[{"name": "checkpoint", "size_bytes": -1}]),
        header(files=[{"name": SEGMENT, "size_bytes": 1}]),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(header: bytes, tmp_path: Path) -> None:
    with pytest.raises(snap.SnapshotError, match="damaged header"):
        read_header(header, tmp_path)


def test_a_header_that_makes_sense_is_read(tmp_path: Path) -> None:
    head = header(files=[{"name": name, "size_bytes": 1} for name in (SEGMENT, "checkpoint")])
    assert read_header(head, tmp_path) == (json.loads(head), 16 + len(head))
