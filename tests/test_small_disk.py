"""A file system that gets full: the alarm comes first, and the process goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.faulty_disk import FaultyDisk
from rigs.member_rig import DATA_DIR, MemberRig
from rigs.processes import ServerProcess, wait_until

from etcdlite import proto
from etcdlite.client import EtcdliteError, NoSpace, Put
from etcdlite.replica.alarms import NOSPACE
from etcdlite.storage.steps import run

VALUE = b"x" * 1_000_000


@pytest.fixture(params=["40m", "48m"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def with_small_log(small_disk: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    log = f"--wal-dir={small_disk / 'wal'}"
    process = ServerProcess(tmp_path / "data", [log], (sys.executable, "-m", "etcdlite"))
    yield process.start()
    process.close()
    print(*process.lines[-5:], sep="\n")


@pytest.fixture
def running(small_disk: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(small_disk / "data", [], (sys.executable, "-m", "etcdlite"))
    yield process.start()
    process.close()
    print(*process.lines[-5:], sep="\n")


def fill(running: ServerProcess, clients: int) -> int:
    """Put until the disk is full, all clients at once. Returns the number of puts."""
    counts = []

    def put(number: int) -> None:
        count = 0
        with contextlib.suppress(EtcdliteError), running.client() as client:
            while True:
                client.put(f"k/{number}/{count}", VALUE)
                count += 1
        counts.append(count)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts)


def test_a_small_disk_fills_up_and_is_emptied_again(running: ServerProcess) -> None:
    for clients in (1, 8, 8):
        assert fill(running, clients) >= 5, running.tail()
        with running.client() as client:
            (alarm,) = wait_until(client.alarms, "the alarm is raised")
            assert alarm.name == "NOSPACE"
            client.delete(prefix="k/")
            client.compact(client.status().revision, physical=True)
            client.defragment()
            client.disarm(alarm)
    running.restart()


def test_a_disk_full_of_keys_is_emptied_again(running: ServerProcess) -> None:
    """The checkpoint takes as much space as the data."""
    count, head = 0, "k" * 1000
    with running.client() as client, contextlib.suppress(NoSpace):
        while True:
            client.txn(success=[Put(f"{head}{count + n:06d}", b"") for n in range(100)])
            count += 100
    for part in range(8):
        running.restart()  # The stop writes a checkpoint.
        with running.client() as client:
            (alarm,) = wait_until(client.alarms, "the alarm is raised")
            client.delete(head, range_end=f"{head}{count * (part + 1) // 8:06d}")
            client.compact(client.status().revision, physical=True)
            client.defragment()
    with running.client() as client:
        client.disarm(alarm)
        client.put("k", "v")


def test_a_checkpoint_without_space_is_discarded_and_tried_again() -> None:
    disk = FaultyDisk()
    rig = MemberRig(disk, checkpoint_bytes=1)
    member, path = rig.member, f"{DATA_DIR}/member/data/checkpoint.tmp"

    def fill(operation: str, where: str) -> None:
        if (operation, where) == ("pwrite", path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)

    disk.watcher = fill
    rig.tick()
    rig.ask(proto.PutRequest(key=b"k"))
    rig.tick()
    assert not disk.exists(path) and not member.maintenance.checkpoints
    assert (member.identity.member_id, NOSPACE) in member.state.alarms
    assert rig.ask(proto.DeleteRangeRequest(key=b"k")).deleted == 1
    assert rig.ask(proto.DefragmentRequest()) == "etcdserver: mvcc: database space exceeded"
    asked = len(disk.operations)
    rig.tick()
    assert ("create", path) not in disk.operations[asked:], "it waits before it tries again"
    copy = disk.copy()
    rig.close()  # It ends without one, too.
    MemberRig(copy)
    disk.watcher = lambda operation, path: None
    rig = MemberRig(disk, checkpoint_bytes=1)
    rig.tick()
    rig.tick()
    assert rig.member.maintenance.checkpoints
    assert isinstance(rig.ask(proto.DefragmentRequest()), proto.DefragmentResponse)


def test_the_reserve_covers_the_next_checkpoints() -> None:
    disk = FaultyDisk()
    rig = MemberRig(disk)
    for number in range(600):
        rig.ask(proto.PutRequest(key=b"%03d" % number * 100))
    store = rig.member.state.store
    disk.free_bytes = (64 << 20) + 100_000
    rig.tick(10)
    assert rig.ask(proto.PutRequest(key=b"k")) == "etcdserver: mvcc: database space exceeded"
    before, task, job = store.checkpoint_space, None, store.checkpoint()
    while task is None:
        task = next(job)
        written = len(disk.content(f"{DATA_DIR}/member/data/checkpoint.tmp"))
        assert store.checkpoint_space == before - written, "what is written has its space"
    task()
    run(job)
    size = len(disk.read(f"{DATA_DIR}/member/data/checkpoint"))
    assert 0.9 * size < store.checkpoint_space < 1.1 * size
    for end in (b"5", b"z"):  # A tombstone goes with the compaction after the next change.
        rig.ask(proto.DeleteRangeRequest(key=b"0", range_end=end))
        rig.ask(proto.CompactionRequest(revision=store.revision, physical=True))
    assert store.checkpoint_space < 0.8 * size


def test_the_reserve_covers_leases_without_keys() -> None:
    disk = FaultyDisk()
    rig = MemberRig(disk)
    store = rig.member.state.store
    for number in range(1, 1001):
        assert rig.ask(proto.LeaseGrantRequest(ID=number << 50, TTL=60)).ID
    assert store.checkpoint_space > 40_000, "there is no checkpoint yet: two are counted"
    run(store.checkpoint())
    size = len(disk.read(f"{DATA_DIR}/member/data/checkpoint"))
    assert size < store.checkpoint_space < 1.4 * size


def test_a_full_file_system_of_the_log_raises_the_alarm(
    with_small_log: ServerProcess, small_disk: Path
) -> None:
    running = with_small_log
    ballast = small_disk / "ballast"
    with running.client() as client:
        client.put("k", "v")
        with ballast.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        wait_until(lambda: [alarm.name for alarm in client.alarms()] == ["NOSPACE"], "the alarm")
        with pytest.raises(EtcdliteError, match="database space exceeded"):
            client.put("k", "v")
        running.wait_for_log(str(small_disk / "wal"))
        ballast.unlink()
        client.disarm(client.alarms()[0])
        client.put("k", "v")


def test_what_is_proposed_counts_before_it_is_written() -> None:
    disk = FaultyDisk()
    rig = MemberRig(disk)
    alarms = rig.member.state.alarms
    disk.free_bytes = (64 << 20) + 1000
    alarms.measure(rig.now + 10)
    alarms.check_space(500)
    alarms.proposed_bytes = 100
    with pytest.raises(Exception, match="database space exceeded"):
        alarms.check_space(500)


def test_the_reserve_covers_the_next_segments() -> None:
    disk = FaultyDisk()
    rig = MemberRig(disk, segment_bytes=100 << 20)
    disk.free_bytes = 99 << 20
    rig.member.state.alarms.measure(rig.now + 10)
    rig.ask(proto.PutRequest(key=b"k"))
    assert (rig.member.identity.member_id, NOSPACE) in rig.member.state.alarms
