"""The process that writes a large backup in etcd's format: it writes what the server would write,
and its end is noticed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.gateway import Gateway
from rigs.processes import ServerFactory, ServerProcess, wait_until
from rigs.real_etcd import distributed
from rigs.store_rig import DIRECTORY, StoreRig, finish
from test_etcd_backup import run, save

from etcdlite import backup_process, proto
from etcdlite.backup_process import BackupProcess
from etcdlite.errors import EtcdError
from etcdlite.etcd_backup import EtcdImage
from etcdlite.limits import DEFAULT_LIMITS
from etcdlite.storage.disk import Disk

MIB = 1 << 20


@pytest.fixture(autouse=True)
def for_all_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backup_process, "MIN_BYTES", 0)


def real_rig(segment_bytes: int = 4000) -> StoreRig:
    return StoreRig(Disk(), segment_bytes, DEFAULT_LIMITS)  # type: ignore[arg-type]


def large_rig() -> StoreRig:
    """A store of 20 MiB: much more than all buffers between the process and the test."""
    rig = real_rig(4 * MIB)
    for number in range(20):
        rig.put(b"key%d" % number, os.urandom(MIB))
    return rig


@contextlib.contextmanager
def prepared(rig: StoreRig) -> Iterator[EtcdImage]:
    image = EtcdImage(rig.store)
    finish(image.prepare_steps())
    yield image
    image.close()


class Reading:
    """A backup that is read from the process."""

    def __init__(self, image: EtcdImage) -> None:
        self.woken = threading.Event()
        found = backup_process.start(image, self.woken.set)
        assert isinstance(found, BackupProcess)
        self.process = found
        self.parts = self.process.parts(image)

    def next(self) -> bytes | None:
        """The next part; None: it was the last one."""
        while not (part := next(self.parts, b"end")):
            if part is None:
                assert self.woken.wait(60), "the process writes"
                self.woken.clear()
        return None if part == b"end" else part

    def rest(self) -> bytes:
        data = b"".join(iter(self.next, None))
        self.process.close()
        return data


def children(pid: int) -> list[int]:
    """The processes that write a backup for process `pid`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # It has just ended.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"backup_process" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def written_by_both(rig: StoreRig) -> tuple[bytes, bytes]:
    with prepared(rig) as image:
        from_process = Reading(image).rest()
        return from_process, b"".join(image.parts())


@pytest.mark.parametrize("seed", range(4))
def test_it_writes_what_the_server_writes(seed: int) -> None:
    rng = random.Random(seed)
    rig = real_rig()
    for lease in range(1, 600):
        rig.apply(proto.LeaseGrantRequest(ID=lease * 7919 % 4096 + 1, TTL=100))
    for _ in range(400):
        key = b"key%d" % rng.randrange(30)
        if rng.random() < 0.8:
            rig.put(key, rng.randbytes(rng.choice((0, 10, 300))))
        else:
            rig.delete(key)
        if rng.random() < 0.02:
            rig.compact(rng.randrange(rig.store.compacted + 1, rig.store.revision + 1))
            rig.finish_compaction()
            rig.checkpoint()
            rig.clean_all()
    assert rig.store.compacted
    from_process, from_server = written_by_both(rig)
    assert from_process == from_server


def test_a_large_backup_is_written_in_parts() -> None:
    rig = large_rig()
    from_process, from_server = written_by_both(rig)
    assert from_process == from_server
    assert not children(os.getpid())


def test_damage_is_reported_with_its_place() -> None:
    rig = real_rig()
    for number in range(30):
        rig.put(b"key%d" % number, bytes(500))
    with prepared(rig) as image:
        path = sorted(Path(DIRECTORY).glob("*.seg"))[1]
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
        with pytest.raises(OSError, match=rf"{path.name} is damaged at offset \d+"):
            Reading(image).rest()


def test_a_process_that_ends_early_ends_the_backup() -> None:
    with prepared(large_rig()) as image:
        reading = Reading(image)
        reading.next()
        (child,) = children(os.getpid())
        os.kill(child, signal.SIGKILL)
        with pytest.raises(EtcdError, match="has ended"):
            reading.rest()


def test_without_the_process_the_server_writes_the_backup(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = real_rig()
    rig.put(b"a", b"b")
    monkeypatch.setattr("sys.executable", "/bin/false")
    from_process, from_server = written_by_both(rig)
    assert from_process and not from_server  # Both were the same parts.
    monkeypatch.setattr("sys.executable", "/no/such/file")
    with prepared(rig) as image:
        assert backup_process.start(image, lambda: None) is None
    with prepared(StoreRig()) as image:  # Its files are not real.
        assert backup_process.start(image, lambda: None) is None


def test_it_ends_when_nobody_reads_on() -> None:
    with prepared(large_rig()) as image:
        for has_begun in (False, True):
            reading: Any = Reading(image)
            if has_begun:
                reading.next()
            reading.process.close()
            wait_until(lambda: not children(os.getpid()), "the process ends")


@pytest.fixture
def large_server(server: ServerFactory) -> ServerProcess:
    one = server("--max-request-bytes=2097152")
    client = one.client()
    for number in range(40):
        client.put(f"key{number}", os.urandom(MIB // 2).hex())
    return one


def test_etcdctl_takes_a_backup_that_a_process_writes(
    large_server: ServerProcess, tmp_path: Path
) -> None:
    saved = save(Gateway(large_server.endpoint), tmp_path / "backup.db")
    told = run(distributed("etcdctl"), "snapshot", "status", str(saved), "-w=json")
    assert '"revision":41' in told
    assert saved.stat().st_size > 40 * MIB
    process = large_server.process
    assert process is not None
    wait_until(lambda: not children(process.pid), "the process has ended")
    with large_server.connect():
        pass


def test_a_server_goes_on_when_the_client_of_a_backup_leaves(large_server: ServerProcess) -> None:
    grpc = pytest.importorskip("grpc")
    process = large_server.process
    assert process is not None
    for _ in range(3):
        with grpc.insecure_channel(large_server.endpoint) as channel:
            call = channel.unary_stream("/etcdserverpb.Maintenance/Snapshot")(b"", timeout=60)
            assert proto.SnapshotResponse.decode(next(call)).blob
            assert children(process.pid)
            call.cancel()
        wait_until(lambda: not children(process.pid), "the process has ended")
        large_server.client().put("k", "v")
