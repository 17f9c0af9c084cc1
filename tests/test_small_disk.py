"""A file system that gets full: the alarm comes first, and the process goes on. So it does without
free inodes or file descriptors."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from rigs.faulty_disk import FaultyDisk
from rigs.keys import keyring
from rigs.member_rig import DATA_DIR, MemberRig, Story
from rigs.processes import SMALL_FILES, ServerProcess, wait_until
from rigs.store_rig import SMALL_LIMITS

from etcdlite import proto
from etcdlite.client import EtcdliteError, NoSpace, Put
from etcdlite.lease import Lessor
from etcdlite.mvcc import Store
from etcdlite.raft_log import Entry
from etcdlite.replica.alarms import NOSPACE
from etcdlite.sealing import Keyring
from etcdlite.storage import cleaning
from etcdlite.storage import disk as disk_layer
from etcdlite.storage.disk import Disk
from etcdlite.storage.steps import run
from etcdlite.wal import WAL

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


# Anything may be used up, at any time.


def lacks(error: int, operation: str, path: str) -> bool:
    """Whether an operation on the data can find this error. The loop itself writes the data; a
    thread waits."""
    needs = ("create", "pwrite") if error == errno.ENOSPC else ("create",)
    return operation in needs and path.startswith(f"{DATA_DIR}/member/data/")


def busy_life(rig: MemberRig) -> None:
    rng = random.Random(3)
    for number in range(50):
        if number % 12 == 11:
            rig.send(proto.CompactionRequest(revision=rig.story.model.revision - 3))
        if number in (15, 40):
            rig.send(proto.DefragmentRequest())
        key, value = b"%d" % rng.randrange(9), rng.randbytes(rng.choice((3, 90)))
        rig.send(proto.PutRequest(key=key, value=value))
        rig.send(proto.DeleteRangeRequest(key=b"%d" % rng.randrange(9)))
        rig.settle()
        rig.tick(2.0)


@pytest.mark.parametrize("keys", [None, keyring(1)])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EMFILE, errno.EACCES])
@pytest.mark.parametrize("attempts", [1, 9])
def test_a_member_goes_on_when_the_data_finds_no_space_or_no_descriptor_or_is_closed(
    error: int, attempts: int, keys: Keyring | None
) -> None:
    for first in count(0, 19):
        disk, seen = FaultyDisk(), 0
        rig = MemberRig(disk, checkpoint_bytes=1, limits=SMALL_LIMITS, keys=keys)
        rig.member.state.alarms.raise_nospace = lambda failure: None  # Puts are not refused.
        rig.settle()

        def fill(operation: str, path: str) -> None:
            nonlocal seen
            if lacks(error, operation, path):
                seen += 1
                if first < seen <= first + attempts:  # noqa: B023
                    raise OSError(error, os.strerror(error), path)

        disk.watcher = fill
        busy_life(rig)
        disk.watcher = lambda operation, path: None
        for _ in range(3):
            rig.tick(20.0)
        assert len(rig.story.stages) - 1 == rig.story.acknowledged, "every write is answered"
        rig.story.check(rig.member.state.store)
        for left in (disk.fork(), disk.power_loss()):
            after = MemberRig(left, rig.story, SMALL_LIMITS, keys)
            after.settle()
            rig.story.check(after.member.state.store)
        if seen <= first:
            break
    assert first > 50


def test_a_member_goes_on_while_its_directory_belongs_to_another_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The files that are open stay usable. No segment is cleaned: it could not be removed."""
    disk, story = FaultyDisk(), Story()
    rig = MemberRig(disk, story, limits=SMALL_LIMITS, checkpoint_bytes=1)
    busy_life(rig)
    before, cleaned = rig.member.maintenance.cleaned_segments, {}
    real, is_closed = disk.space, True

    def space(path: str) -> tuple[int, int]:
        if is_closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    monkeypatch.setattr(disk, "space", space)
    for is_closed in (True, False):
        rig.tick(2.0)
        for _ in range(30):
            rig.ask(proto.PutRequest(key=b"k", value=bytes(90)))
        rig.ask(proto.CompactionRequest(revision=story.model.revision))
        for _ in range(9):
            rig.tick(20.0)
        cleaned[is_closed] = rig.member.maintenance.cleaned_segments
    assert cleaned[True] == before < cleaned[False]
    MemberRig(disk.fork(), story, SMALL_LIMITS)


@pytest.mark.parametrize("keys", [None, keyring(1)])
def test_a_part_of_a_write_that_finds_no_space_is_not_left_behind_in_a_segment(
    keys: Keyring | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The segment may be completed before as much is written to it. A start knows its size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MemberRig, "segment_bytes", 1 << 16)
    rig = MemberRig(Disk(), keys=keys)
    rig.member.state.alarms.raise_nospace = lambda failure: None  # Puts are not refused.
    rig.settle()
    for number in (*range(200), *range(0, 200, 2)):
        rig.ask(proto.PutRequest(key=b"%d" % number, value=bytes(1000)))
    rig.ask(proto.CompactionRequest(revision=rig.story.model.revision))
    real, is_full = os.pwrite, False

    def write(fd: int, data: bytes, offset: int) -> int:
        """Into a file system that gets full in the middle of the first large write."""
        nonlocal is_full
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        is_full = len(data) > 10_000
        return real(fd, data[:9_000], offset) if is_full else real(fd, data, offset)

    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", write)
        assert rig.ask(proto.DefragmentRequest()) == "etcdserver: mvcc: database space exceeded"
    assert is_full
    rig.ask(proto.PutRequest(key=b"k", value=bytes(1000)))
    rig.ask(proto.DefragmentRequest())
    assert rig.member.maintenance.cleaned_segments > 1, "the one before it is complete"
    MemberRig(Disk(), rig.story, keys=keys)


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_cannot_reserve_space_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: int
) -> None:
    """As on NFS with musl, or in a sandbox that lacks the call. A log there waits when a write
    finds no space."""

    def refuse(*_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(disk_layer.os, "posix_fallocate", refuse)
    wal = WAL.create(Disk(), str(tmp_path), b"", 4096)
    entry = Entry(1, 1, 0, bytes(900))
    wal.save(None, [entry])
    wal.close()
    assert WAL.open(Disk(), str(tmp_path), 4096)[1].entries == [entry]


def test_a_thread_waits_for_access(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk_layer, "PAUSE_S", 0.01)
    real, tries = os.open, count(1)

    def refuse(path: str, *rest: int) -> int:
        if next(tries) < 4:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *rest)

    monkeypatch.setattr(disk_layer.os, "open", refuse)
    path = str(tmp_path / "file")
    with pytest.raises(PermissionError):
        Disk().open_new(path)  # The main thread must not wait.
    thread = threading.Thread(target=Disk().open_new, args=(path,))
    thread.start()
    thread.join()
    assert os.path.exists(path) and next(tries) == 5


@pytest.mark.parametrize("call", ["rename", "unlink"])
def test_a_thread_waits_for_access_to_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    monkeypatch.setattr(disk_layer, "PAUSE_S", 0.01)
    real, tries = getattr(os, call), count(1)

    def refuse(*paths: str) -> None:
        if next(tries) < 4:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), *paths)
        real(*paths)

    path = tmp_path / "file"
    path.touch()
    paths = [str(path), str(tmp_path / "other")][: 1 + (call == "rename")]
    monkeypatch.setattr(disk_layer.os, call, refuse)
    with pytest.raises(PermissionError):
        getattr(Disk(), call)(*paths)  # The main thread must not wait.
    thread = threading.Thread(target=getattr(Disk(), call), args=paths)
    thread.start()
    thread.join()
    assert not path.exists() and next(tries) == 5


def test_reads_go_on_while_what_is_applied_cannot_be_written() -> None:
    disk = FaultyDisk()
    rig = MemberRig(disk)
    rig.settle()
    segment = f"{DATA_DIR}/member/data/{1:016x}.seg"

    def fill(operation: str, path: str) -> None:
        if (operation, path) == ("pwrite", segment):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    disk.watcher, disk.free_bytes = fill, 0
    assert rig.ask(proto.PutRequest(key=b"k", value=b"v")).header.revision == 2, "the log has it"
    assert not rig.member.has_work, "it tries again with the next tick"
    assert rig.ask(proto.RangeRequest(key=b"k")).kvs[0].value == b"v"
    rig.tick(2.0)
    assert rig.ask(proto.PutRequest(key=b"k")) == "etcdserver: mvcc: database space exceeded"
    later = rig.send(proto.DeleteRangeRequest(key=b"k"))
    rig.tick()
    assert later not in rig.answers
    disk.watcher = lambda operation, path: None
    rig.tick()
    assert rig.answers[later].deleted == 1
    MemberRig(disk.fork(), rig.story)


@pytest.mark.parametrize(
    ("filled", "segment_bytes"), [("create", 1024), ("allocate", 1024), ("pwrite", 4096)]
)
def test_the_log_waits_for_space_in_its_thread(
    monkeypatch: pytest.MonkeyPatch, filled: str, segment_bytes: int
) -> None:
    """For a new segment, its inode, and a frame, where a file system reserves nothing."""
    monkeypatch.setattr(disk_layer, "PAUSE_S", 0.01)
    disk = FaultyDisk()
    wal = WAL.create(disk, "wal", b"", segment_bytes)
    refused, is_full, outcomes = threading.Event(), True, list[bool]()

    def fill(operation: str, path: str) -> None:
        if operation == filled:
            outcomes.append(not is_full)
            if not outcomes[-1]:
                refused.set()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    disk.watcher = fill
    entry = Entry(1, 1, 0, bytes(900))
    thread = threading.Thread(target=wal.save, args=(None, [entry]))
    thread.start()
    assert refused.wait(60)
    assert wal.last_index == 0
    is_full = False
    thread.join()
    assert wal.last_index == 1
    assert outcomes.count(True) == 1
    assert WAL.open(disk, "wal", segment_bytes)[1].entries == [entry]


@pytest.mark.parametrize("keys", [None, keyring(1)])
def test_a_part_of_a_frame_that_finds_no_space_does_not_end_a_segment(
    keys: Keyring | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file system copies on write. The loop leaves the save to the log thread, which may
    save more at once than the segment has room for, and must wait here, too."""
    monkeypatch.setattr(disk_layer, "PAUSE_S", 0.01)
    disk = FaultyDisk()
    wal = WAL.create(disk, "wal", b"", 8192, keys=keys)
    disk.error, disk.fail_at = errno.ENOSPC, 1
    entries = [Entry(1, 1, 0, b"x" * 3000), Entry(1, 2, 0, b"x" * 9000)]
    with pytest.raises(OSError, match="No space"):
        wal.save(None, entries[:1])
    disk.fail_at = 1
    thread = threading.Thread(target=wal.save, args=(None, entries))
    thread.start()
    thread.join()
    assert len(wal.segments) == 2
    for later in (disk.fork(), disk.power_loss()):
        assert WAL.open(later, "wal", 8192, keys=keys)[1].entries == entries


@pytest.mark.parametrize("size_bytes", [10, 500_000])
def test_a_process_whose_reserved_space_cannot_be_written_goes_on(
    tmp_path: Path, size_bytes: int
) -> None:
    """As on a full Btrfs. Here it is the limit of the size of a file."""
    process = ServerProcess(tmp_path / "data", [], (sys.executable, "-m", "etcdlite")).start()
    try:
        with process.client(timeout_s=2) as client:
            for number in range(20):
                client.put(f"{number}", "v")
            _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, hard))
            with pytest.raises(EtcdliteError):
                client.put("waits", VALUE[:size_bytes])
            process.wait_for_log("allows no file of this size: raise the limit")
            assert len(client.range(prefix="", serializable=True)) == 20
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        with process.client() as client:
            for alarm in client.alarms():
                client.disarm(alarm)
            client.put("last", "v")
        process.restart()
        with process.client() as client:
            assert len(client.range(prefix="")) == 22
    finally:
        process.close()


@pytest.mark.parametrize("flags", [[], ["--wal-segment-bytes=67108864"]])
def test_a_process_without_a_free_descriptor_goes_on(tmp_path: Path, flags: list[str]) -> None:
    """With a large segment of the log nothing but the background work needs one."""
    program = (sys.executable, "-m", "etcdlite")
    process = ServerProcess(tmp_path / "data", [*SMALL_FILES, *flags], program).start()
    try:
        written = []
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        with process.client(timeout_s=2) as client:
            client.put("first", "v")
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, hard))
            with contextlib.suppress(EtcdliteError):
                for number in range(40):
                    client.put(f"{number}", VALUE[:2000])
                    written.append(f"{number}")
            assert (len(written) == 40) == bool(flags)
            process.wait_for_log("Too many open files")
            assert client.get("first", serializable=True).value == b"v"
            if flags:
                with pytest.raises(EtcdliteError, match="Too many open files"):
                    client.defragment()
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        with process.client() as client:
            client.put("last", "v")
            assert [key for key in written if client.get(key) is None] == []
            client.defragment()
        process.restart()
        with process.client() as client:
            assert [key for key in (*written, "last") if client.get(key) is None] == []
    finally:
        process.close()


def test_a_file_system_without_inodes_is_used_on(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m,nr_inodes=40", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system")
    program = (sys.executable, "-m", "etcdlite")
    process = ServerProcess(folder / "data", ["--checkpoint-bytes=16384"], program).start()
    try:
        with contextlib.suppress(OSError):
            for number in range(40):
                (folder / f"{number}").touch()
        with process.client() as client:
            client.put("k", VALUE[:20_000])
            process.wait_for_log("cannot write a checkpoint")
            (alarm,) = wait_until(client.alarms, "the alarm is raised")
            with pytest.raises(NoSpace):
                client.defragment()
            assert not process.logged("finished defragmenting")
            client.delete("k")
            for path in folder.glob("[0-9]*"):
                path.unlink()
            client.defragment()
            client.disarm(alarm)
            client.put("k", "v")
        process.restart()
    finally:
        process.close()
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("keys", [None, keyring(1)])
@pytest.mark.parametrize("has_member", [False, True])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EMFILE])
def test_a_start_that_finds_no_space_or_no_descriptor_fails_with_that_error(
    error: int, has_member: bool, keys: Keyring | None
) -> None:
    begun = FaultyDisk()
    if has_member:
        rig = MemberRig(begun, keys=keys)
        busy_life(rig)
        begun, story = begun.power_loss(), rig.story
    for fail_at in count(1):
        disk = begun.fork()
        disk.fail_at, disk.error = fail_at, error
        try:
            MemberRig(disk, keys=keys).settle()
        except OSError as failure:
            assert failure.errno == error, "another error than the one of the disk"
        else:
            if disk.fail_at is not None:
                break
        disk.fail_at = None
        after = MemberRig(disk.fork(), keys=keys)
        after.settle()
        if has_member:
            story.check(after.member.state.store)
    assert fail_at > 20


def held(folder: Path) -> list[str]:
    """The removed files of a folder that this process still holds open, so that they take space."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [link for link in links if link.startswith(str(folder)) and link.endswith("(deleted)")]


def test_the_space_of_what_is_cleaned_or_unfinished_is_free_at_once(tmp_path: Path) -> None:
    disk, directory, segment_bytes = Disk(), str(tmp_path / "data"), 3 << 20
    store = Store.create(disk, directory, Lessor(), segment_bytes)
    for number in range(1, 5):
        store.put(b"k", bytes(1 << 20), 0)
        store.end_revision()
        store.mark(number, 1)
    store.compact(store.revision)
    store.mark(5, 1)
    while store.compaction is not None:
        store.compact_step()
    run(store.checkpoint())
    segment = cleaning.segment_to_clean(store, 0.5)
    assert segment is not None
    run(cleaning.clean(store, segment))
    disk.wait_for_space()
    assert not held(tmp_path)
    store.close()
    (tmp_path / "data" / "checkpoint.tmp").write_bytes(bytes(segment_bytes))
    Store.open(disk, directory, Lessor(), segment_bytes).close()
    disk.wait_for_space()
    assert not held(tmp_path)
