"""Damage and loss of power: what was acknowledged is there, or the start is refused; never a wrong
value."""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from rigs.faulty_disk import FaultyDisk
from rigs.keys import keyring
from rigs.member_rig import CLUSTER_ID, DATA_DIR, MemberRig, Story
from rigs.plain_model import Requests
from rigs.store_rig import SMALL_LIMITS, StoreRig

from etcdlite import datadir, proto, txn
from etcdlite.datadir import Home
from etcdlite.errors import EtcdError, MayPass
from etcdlite.mvcc import encode_key_value
from etcdlite.proto import varint
from etcdlite.sealing import Keyring
from etcdlite.storage import checkpoint, recovery
from etcdlite.storage.disk import Disk
from etcdlite.storage.layout import POSITION, DataDamaged
from etcdlite.storage.recovery import key_and_numbers
from etcdlite.wal import WALError


def random_write(rng: random.Random, story: Story) -> Any:
    """A write that the front door lets in."""
    draw = Requests(rng, story.model.revision, story.model.compacted)
    while True:
        request = draw.write()
        if type(request) is not proto.TxnRequest:
            return request
        try:
            txn.check_txn(request, 128)
        except EtcdError:
            continue
        return request


# Files that are cut or changed.


class SmallHistory:
    """A member's files after a short life with everything in it; nothing is unsynced."""

    def __init__(self, keys: Keyring | None = None) -> None:
        self.keys = keys
        rig = MemberRig(checkpoint_bytes=1, limits=SMALL_LIMITS, keys=keys)
        rng = random.Random(11)
        rig.settle()
        begun_at = 0
        for lease_id in (1, 2):
            rig.ask(proto.LeaseGrantRequest(ID=lease_id, TTL=100))
        for number in range(66):
            if number in (12, 30, 50):
                rig.ask(proto.CompactionRequest(revision=rig.story.model.revision - 3))
            if number == 15:
                rig.ask(proto.DefragmentRequest())
            if number == 42:
                # Few steps in a turn: the next writes come while a checkpoint is written.
                rig.pace_s = 0.001
                rig.now += 0.1
                rig.member.tick()
                begun_at = rig.member.maintenance.checkpoints
                rig.member.maintenance.checkpoint_bytes = 1 << 40  # No other one after it.
            if number == 56:
                rig.ask(proto.LeaseRevokeRequest(ID=2))
            write = rig.send(random_write(rng, rig.story))
            before = rig.story.acknowledged
            while write not in rig.answers:
                rig.turn()
        rig.pace_s = 0.0
        rig.settle()
        assert rig.member.maintenance.checkpoints > begun_at
        self.story = rig.story
        self.before_last_sync = before
        self.disk = rig.disk.copy()
        self.paths = sorted(
            path for path in self.disk.paths if path.endswith((".wal", ".seg", "checkpoint"))
        )
        self.refused = dict.fromkeys(self.paths, 0)
        self.accepted = dict.fromkeys(self.paths, 0)

    def check_with(self, path: str, content: bytes, what: str) -> None:
        """Start with other content in one file."""
        disk = self.disk.copy()
        disk.content(path)[:] = content
        try:
            rig = MemberRig(disk, limits=SMALL_LIMITS, keys=self.keys)
            rig.settle()
            self.story.check(rig.member.state.store, self.before_last_sync)
        except (DataDamaged, WALError) as refusal:
            where = getattr(refusal, "path", "")
            assert where.startswith(DATA_DIR) and where in str(refusal), f"{what}: {refusal}"
            assert re.search(r"at (offset|byte) \d+|format version|needs etcdlite", str(refusal)), (
                str(refusal)
            )
            self.refused[path] += 1
        except BaseException as failure:
            raise AssertionError(f"{path} {what}") from failure
        else:
            self.accepted[path] += 1


@pytest.fixture(scope="module")
def history() -> SmallHistory:
    return SmallHistory()


@pytest.fixture(scope="module")
def sealed_history() -> SmallHistory:
    return SmallHistory(keyring(1))


def test_the_history_has_everything_that_can_be_damaged(history: SmallHistory) -> None:
    names = [path.rpartition("/")[2] for path in history.paths]
    assert len([name for name in names if name.endswith(".wal")]) >= 3
    assert len([name for name in names if name.endswith(".seg")]) >= 3
    assert "checkpoint" in names
    assert history.story.model.compacted > 20
    assert history.story.model.leases
    path = next(path for path in history.paths if path.endswith("checkpoint"))
    chunks = list(checkpoint.unpack(history.disk, path))
    begin, end = POSITION.unpack_from(chunks[0][1]), POSITION.unpack(chunks[-1][1])
    assert begin < end, "nothing was written while the checkpoint was"
    segments = [name for name in names if name.endswith(".seg")]
    assert f"{begin[0]:016x}.seg" not in (segments[0], segments[-1]), "it is not in the middle"


def test_the_numbers_of_a_record_are_those_that_were_encoded() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        create, mod, version = (rng.getrandbits(rng.randrange(1, 64)) or 1 for _ in range(3))
        lease = rng.choice([0, 1, (1 << 63) - 1])
        key, value = (bytes(rng.choice([0, 1, 127, 128, 200])) for _ in range(2))
        body = encode_key_value(key, varint(create), varint(mod), version, value, lease)
        assert key_and_numbers(body) == (key, create, mod, version, lease)
        cut = body[: rng.randrange(len(body))]
        try:
            found = key_and_numbers(cut)
        except (proto.DecodeError, IndexError):
            continue
        kv = proto.KeyValue.decode(cut)
        assert found == (kv.key, kv.create_revision, kv.mod_revision, kv.version, kv.lease)
    tombstone = proto.KeyValue(key=b"key", mod_revision=1 << 40).encode()
    assert key_and_numbers(tombstone) == (b"key", 0, 1 << 40, 0, 0)


def test_a_segment_shorter_than_the_checkpoint_says_is_not_touched() -> None:
    rig = MemberRig(limits=SMALL_LIMITS)
    rig.settle()
    for key in (b"a", b"b", b"c"):
        rig.ask(proto.PutRequest(key=key, value=b"v"))
    rig.close()
    disk = rig.disk.copy()
    path = f"{DATA_DIR}/member/data/{1:016x}.seg"
    del disk.content(path)[-40:]
    before = bytes(disk.content(path))
    with pytest.raises(DataDamaged) as caught:
        MemberRig(disk, limits=SMALL_LIMITS)
    assert (caught.value.path, caught.value.offset) == (path, len(before))
    assert disk.content(path) == before


def test_files_cut_at_any_byte_lose_nothing_or_are_refused(history: SmallHistory) -> None:
    for path in history.paths:
        content = bytes(history.disk.content(path))
        for size in range(len(content)):
            history.check_with(path, content[:size], f"cut at {size}")


def test_a_scan_in_small_blocks_finds_what_one_in_large_blocks_finds(
    history: SmallHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(9)
    segments = [path for path in history.paths if path.endswith(".seg")]
    for chunk_bytes in (16, 64, 200):
        monkeypatch.setattr(recovery, "SCAN_CHUNK_BYTES", chunk_bytes)
        for path in segments:
            content = bytes(history.disk.content(path))
            accepted = history.accepted[path]
            history.check_with(path, content, f"whole, in blocks of {chunk_bytes}")
            assert history.accepted[path] == accepted + 1
            for size in rng.sample(range(len(content)), 15):
                what = f"cut at {size}, in blocks of {chunk_bytes}"
                history.check_with(path, content[:size], what)


def check_flips(history: SmallHistory, bits: Callable[[int], Iterator[int] | range]) -> None:
    for path in history.paths:
        content = bytes(history.disk.content(path))
        for bit in bits(len(content) * 8):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            history.check_with(path, changed, f"with bit {bit} flipped (byte {bit // 8})")


def test_files_with_any_bit_flipped_lose_nothing_or_are_refused(history: SmallHistory) -> None:
    rng = random.Random(3)
    # One bit of every fourth byte or so; `make test-long` flips them all.
    check_flips(history, lambda count: (b for b in range(rng.randrange(32), count, 29)))


def test_encrypted_files_cut_or_with_a_bit_flipped_lose_nothing_or_are_refused(
    sealed_history: SmallHistory,
) -> None:
    history = sealed_history
    rng = random.Random(5)
    for path in history.paths:
        content = bytes(history.disk.content(path))
        for size in rng.sample(range(len(content)), 40):
            history.check_with(path, content[:size], f"cut at {size}")
    check_flips(history, lambda count: iter(rng.sample(range(count), 60)))
    assert all(history.refused.values()), history.refused


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_encrypted_files_with_every_byte_changed_lose_nothing_or_are_refused(
    sealed_history: SmallHistory,
) -> None:
    check_flips(sealed_history, lambda count: range(3, count, 8))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_files_with_every_bit_flipped_lose_nothing_or_are_refused(history: SmallHistory) -> None:
    check_flips(history, range)


# Loss of power.

READS = ("pread", "read", "open", "size", "list", "lock")
"""The operations of a disk that change nothing."""


class Plug:
    """Pulls the plug before disk operations: opens what the disk could hold then, and continues.

    `lives` is how often it does so in a row: the recovery and the writes of one life are what the
    next one's loss of power takes from.
    """

    def __init__(
        self, rng: random.Random, share: float, lives: int, keys: Keyring | None = None
    ) -> None:
        self.keys = keys
        self.rng = rng
        self.share = share
        self.lives = lives
        self.pulled = 0
        self.went_back = 0
        """Times that a write which was not acknowledged was lost."""
        self.cleaned_segments = 0

    def attach(self, rig_disk: FaultyDisk, story: Story) -> None:
        def watch(operation: str, path: str) -> None:
            # What the disk could hold before a read, it could hold before the next change, too.
            if operation not in READS and self.rng.random() < self.share:
                self.pull(rig_disk, story)

        rig_disk.watcher = watch

    def pull(self, disk: FaultyDisk, story: Story) -> None:
        rng = self.rng
        self.pulled += 1
        kind = rng.choice(("killed", "nothing kept", "some kept", "some kept", "some kept"))
        if kind == "killed":
            found = disk.fork()
        elif kind == "nothing kept":
            found = disk.power_loss()
        else:
            share = rng.choice((0.2, 0.5, 0.9, 1.0))
            names = rng.randint(0, disk.unsynced_names)
            found = disk.power_loss(lambda path, sector: rng.random() < share, names)
        stage = self.check(found.fork(), story)
        if self.lives:
            next_plug = Plug(rng, 0.03, self.lives - 1, self.keys)
            found_story = story.fork(stage)
            # After a kill this may be in the page cache alone. It is not promised until the
            # recovery has made it durable, and a plug pulled before that may take it.
            found_story.acknowledged = story.acknowledged
            next_plug.attach(found, found_story)
            rig = MemberRig(
                found, found_story, checkpoint_bytes=1, limits=SMALL_LIMITS, keys=self.keys
            )
            found_story.acknowledged = stage
            live(rig, rng, 12)
            self.pulled += next_plug.pulled

    def check(self, disk: FaultyDisk, story: Story) -> int:
        rig = MemberRig(disk, story.fork(len(story.stages) - 1), keys=self.keys)
        rig.settle()
        stage = story.check(rig.member.state.store)
        self.went_back += stage < len(story.stages) - 1
        return stage


def live(rig: MemberRig, rng: random.Random, writes: int) -> None:
    """Random writes, some of them together, with ticks that begin checkpoints and cleaning."""
    rig.settle()
    while writes > 0:
        for _ in range(rng.choice((1, 1, 4))):
            rig.send(random_write(rng, rig.story))
            writes -= 1
        for _ in range(rng.choice((1, 2, 100))):
            if not rig.turn():
                break
        if rng.random() < 0.2:
            rig.tick()
        if rng.random() < 0.03:
            rig.send(proto.DefragmentRequest())
    rig.settle()


def pull_plugs(
    seeds: Iterable[int], writes: int, share: float, lives: int, keys: Keyring | None = None
) -> list[Plug]:
    """A random life for each seed. A short one may end before any segment is cleaned."""
    plugs = [_pull_plug(seed, writes, share, lives, keys) for seed in seeds]
    assert any(plug.cleaned_segments for plug in plugs)
    return plugs


def _pull_plug(seed: int, writes: int, share: float, lives: int, keys: Keyring | None) -> Plug:
    rng = random.Random(seed)
    plug = Plug(rng, share, lives, keys)
    rig = MemberRig(checkpoint_bytes=1, limits=SMALL_LIMITS, keys=keys)
    plug.attach(rig.disk, rig.story)
    live(rig, rng, writes)
    rig.disk.watcher = lambda operation, path: None
    rig.story.check(rig.member.state.store)
    housekeeping = rig.member.maintenance
    assert housekeeping.checkpoints > 2
    plug.cleaned_segments = housekeeping.cleaned_segments
    return plug


def test_a_loss_of_power_before_any_disk_operation_loses_nothing_acknowledged() -> None:
    (plug,) = pull_plugs([1], writes=200, share=1.0, lives=0)
    assert plug.pulled > 500
    assert plug.went_back > 20, "it never struck in the middle of a write"


def test_a_loss_of_power_loses_nothing_that_was_acknowledged_of_encrypted_files() -> None:
    (plug,) = pull_plugs([1], writes=120, share=0.3, lives=0, keys=keyring(1))
    assert plug.pulled > 100
    pull_plugs(range(2), writes=100, share=0.05, lives=2, keys=keyring(1))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_losses_of_power_lose_nothing_that_was_acknowledged_of_encrypted_files() -> None:
    pull_plugs(range(100, 115), writes=150, share=0.1, lives=2, keys=keyring(1))


@pytest.mark.parametrize("wal_dir", ["", "logs"])
def test_a_first_start_that_loses_power_leaves_a_member_or_nothing(wal_dir: str) -> None:
    rng = random.Random(1)
    found = []

    def watch(operation: str, path: str) -> None:
        found.append(disk.fork())
        for names in range(disk.unsynced_names + 1):
            share = rng.choice((0.0, 0.5, 1.0))
            found.append(
                disk.power_loss(lambda path, sector: rng.random() < share, names)  # noqa: B023
            )

    disk = FaultyDisk()
    disk.watcher = watch
    MemberRig(disk, limits=SMALL_LIMITS, wal_dir=wal_dir)
    with_member = 0
    for after in found:
        with_member += Home(after, DATA_DIR).exists
        for revision in (2, 3):
            rig = MemberRig(after, limits=SMALL_LIMITS, wal_dir=wal_dir)
            rig.settle()
            assert rig.ask(proto.PutRequest(key=b"a")).header.revision == revision
            after = after.power_loss()
    assert 0 < with_member < len(found)


def founding(member_id: int) -> datadir.Founding:
    return datadir.Founding(CLUSTER_ID, member_id, [proto.Member(ID=member_id)])


def small(disk: FaultyDisk, data_dir: str, wal_dir: str = "") -> Home:
    return Home(disk, data_dir, wal_dir, None, 1 << 14, 1 << 14)


def open_in(home: Home) -> int:
    """Start a member; returns its id."""
    return datadir.open_member(home, min_ttl_s=1, sync_enabled=True).member_id


def test_a_start_leaves_the_new_log_of_another_member_alone() -> None:
    """The first start of b was killed before its log was moved to its place."""
    disk, left = FaultyDisk(), []
    datadir.create(small(disk, "a", "logs-a"), founding(1))

    def watch(operation: str, path: str) -> None:
        if (operation, path) == ("sync_dir", "b") and Home(disk, "b").exists:
            left.append(disk.fork())

    disk.watcher = watch
    datadir.create(small(disk, "b", "logs-b"), founding(2))
    (killed,) = left
    with pytest.raises(MayPass, match="there is no write-ahead log in logs-b"):
        open_in(small(killed, "a", "logs-b"))
    with pytest.raises(MayPass, match="holds the log of a member"):
        datadir.create(small(killed, "c", "logs-b"), founding(3))
    assert open_in(small(killed, "b", "logs-b")) == 2
    assert open_in(small(killed, "b", "logs-b")) == 2
    assert open_in(small(killed, "a", "logs-a")) == 1
    assert not [path for path in killed.paths if ".new" in path]


def test_a_start_syncs_the_name_of_the_data_directory() -> None:
    """The process was killed before it did."""
    disk = FaultyDisk()
    datadir.create(small(disk, "x/a"), founding(1))
    disk.operations.clear()
    open_in(small(disk, "x/a"))
    assert [path for operation, path in disk.operations if operation == "sync_dir"][:2] == [
        "x/a",
        os.path.abspath("x"),
    ]


def test_a_restore_replaces_what_an_interrupted_first_start_left() -> None:
    disk = FaultyDisk()
    disk.make_dir("a/member.tmp/data")
    disk.create("a/member.tmp/data/x", b"half")
    assert datadir.begin(Home(disk, "a"), datadir.RESTORE) == "a/restore.tmp"
    assert not disk.exists("a/member.tmp")


def test_an_interrupted_installation_of_a_snapshot_is_completed() -> None:
    """It removes the old data, of which any part may be left."""
    rig = MemberRig(checkpoint_bytes=1, limits=SMALL_LIMITS)
    live(rig, random.Random(1), 60)
    old = rig.disk.copy()
    live(rig, random.Random(2), 60)
    rig.member.maintenance.close(is_applying=False)
    data = f"{DATA_DIR}/member/data"
    index = checkpoint.applied_index(rig.disk, data)
    rig.wal.mark_snapshot(index, rig.member.raft.term)
    assert checkpoint.applied_index(old, data) < index
    disk = rig.disk.copy()
    disk.rename(data, f"{DATA_DIR}/member/snapshot-{index:016x}")
    names = old.list(data)
    for left in [[], *([name] for name in names), *(names[:n] for n in range(2, len(names) + 1))]:
        after = disk.copy()
        after.make_dir(data)
        for name in left:
            after.create(f"{data}/{name}", old.read(f"{data}/{name}"))
        again = MemberRig(after, rig.story, limits=SMALL_LIMITS)
        rig.story.check(again.member.state.store)


def test_a_snapshot_replaces_data_of_a_lower_layer_of_overlayfs(tmp_path: Path) -> None:
    """As in a container whose image has the data: overlayfs cannot rename its directories."""
    for folder in ("lower/member/data", "upper", "work", "merged"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "lower/member/data/old").write_bytes(b"")
    layers = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    merged = str(tmp_path / "merged")
    mount = ["mount", "-t", "overlay", "-o", layers, "overlay", merged]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount overlayfs: {mounted.stderr.strip()}")
    try:
        disk, data = Disk(), f"{merged}/member/data"
        disk.make_dir(f"{merged}/member/incoming")
        disk.create(f"{merged}/member/incoming/new", b"").close()
        datadir.keep_incoming(disk, data, 7)
        datadir.install_snapshot(disk, data, 7)
        assert disk.list(f"{merged}/member") == ["data"] and disk.list(data) == ["new"]
    finally:
        subprocess.run(["umount", merged], check=True)


def test_files_with_other_names_are_left_alone() -> None:
    rig = MemberRig(limits=SMALL_LIMITS)
    rig.ask(proto.PutRequest(key=b"a"))
    strays = [f"data/{1:016x}.{part}.seg" for part in ("a", "z")]
    strays += ["data/old.seg", "snapshot-of-monday/x", "snapshot-x"]
    rig.disk.make_dir(f"{DATA_DIR}/member/snapshot-of-monday")
    for stray in strays:
        rig.disk.open_new(f"{DATA_DIR}/member/{stray}").pwrite(b"mine", 0)
    rig = MemberRig(rig.disk.fork(), limits=SMALL_LIMITS)
    assert rig.ask(proto.PutRequest(key=b"b")).header.revision == 3
    assert all(f"{DATA_DIR}/member/{stray}" in rig.disk.paths for stray in strays)


@pytest.mark.parametrize("seed", range(3))
def test_losses_of_power_one_after_the_other_lose_nothing_acknowledged(seed: int) -> None:
    pull_plugs([seed], writes=120, share=0.05, lives=2)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_losses_of_power_lose_nothing_acknowledged() -> None:
    pull_plugs(range(100, 130), writes=150, share=0.1, lives=2)


@pytest.mark.parametrize("keys", [None, keyring(1)])
@pytest.mark.parametrize("goes_on", [False, True])
def test_nothing_depends_on_what_a_failed_sync_left_in_the_page_cache(
    keys: Keyring | None, goes_on: bool
) -> None:
    failed = 0
    for fail_at in count(1):
        rig = StoreRig(keys=keys)
        for number in range(60):
            rig.put(b"key%d" % (number % 9), b"v" * 50)
        rig.compact(rig.store.revision)
        rig.finish_compaction()
        rig.checkpoint()
        for number in range(20):
            rig.put(b"new%d" % number, b"v" * 50)
        rig.disk.fail_at = fail_at
        try:
            rig.clean_all()
            rig.checkpoint()
            rig.clean_all()
        except (OSError, DataDamaged):  # The one of a read is damage.
            failed += 1
        else:
            break
        rig.restart()
        if goes_on:
            rig.checkpoint()
            rig.clean_all()
        rig.lose_power()
        rig.check(random.Random(fail_at))
    assert failed > 5


@pytest.mark.parametrize("keys", [None, keyring(1)])
@pytest.mark.parametrize("has_started", [False, True])
def test_nothing_is_lost_when_pages_are_dropped_after_a_failed_sync(
    keys: Keyring | None, has_started: bool
) -> None:
    failed = 0
    for fail_at in count(1):
        rig = StoreRig(keys=keys)
        for number in range(12):
            rig.put(b"key%d" % number, b"v" * 150)
        rig.disk.fail_at = fail_at
        try:
            rig.checkpoint()
        except OSError:
            if rig.disk.operations[-1][0] != "sync":
                continue
            failed += 1
        else:
            break
        if has_started:
            rig.restart()
        rig.disk.evict()
        if not has_started:
            rig.restart()
        rig.checkpoint()
        rig.lose_power()
        rig.check(random.Random(fail_at))
    assert failed > 1
