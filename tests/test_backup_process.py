"""The process that writes a large backup in etcd's format: it writes what the server would write,
and its end is noticed."""

from __future__ import annotations

import contextlib
import marshal
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from rigs.gateway import Gateway
from rigs.processes import ServerFactory, ServerProcess, wait_until
from rigs.real_etcd import distributed
from rigs.store_rig import DIRECTORY, StoreRig
from test_etcd_backup import run, save

from etcdlite import backup_process, etcd_file, proto
from etcdlite.backup_process import BackupProcess
from etcdlite.errors import EtcdError
from etcdlite.etcd_backup import EtcdImage
from etcdlite.limits import DEFAULT_LIMITS
from etcdlite.storage.disk import Disk
from etcdlite.storage.history import History
from etcdlite.storage.steps import finish

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
        try:
            return b"".join(iter(self.next, None))
        finally:
            self.process.close()


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
    with prepared(rig) as image, monkeypatch.context() as patch:
        patch.setattr(backup_process, "_CAN_START", False)
        assert backup_process.start(image, lambda: None) is None
    for found in ("/bin/false", "/bin/true"):
        monkeypatch.setattr("sys.executable", found)
        from_process, from_server = written_by_both(rig)
        assert from_process and not from_server  # Both were the same parts.
    for missing in ("/no/such/file", "", None):
        monkeypatch.setattr("sys.executable", missing)
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


def test_it_ends_when_it_does_not_write_and_nobody_reads_on() -> None:
    with prepared(large_rig()) as image:
        reading = Reading(image)
        reading.next()
        (child,) = children(os.getpid())
        os.kill(child, signal.SIGSTOP)
        reading.process.close()
        wait_until(lambda: not children(os.getpid()), "the process ends")


def test_it_ends_without_the_server_even_if_it_has_nothing_to_write() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        with pytest.raises(EOFError):
            next(backup_process._joined(repeat(b""), theirs.fileno()))


def test_a_pause_of_the_process_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal ends a write to the socket early. The service has this variable."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    with prepared(large_rig()) as image:
        reading = Reading(image)
        parts = [reading.next()]
        (child,) = children(os.getpid())
        for _ in range(8):
            wait_until(lambda: state(child) == "S", "it waits until the socket takes more")
            os.kill(child, signal.SIGSTOP)
            wait_until(lambda: state(child) == "T", "it stops")
            os.kill(child, signal.SIGCONT)
            parts.append(reading.next())
        made = b"".join(part for part in parts if part) + reading.rest()
        assert made == b"".join(image.parts())


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_another_version_does_not_write_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It was installed, but the server was not started again."""
    rig = real_rig()
    rig.put(b"a", b"b")
    monkeypatch.setattr("etcdlite.__version__", "0.0.1")
    from_process, from_server = written_by_both(rig)
    assert from_process and not from_server
    assert "version 0.0.1 still runs" in capfd.readouterr().err


def test_a_backup_ends_where_the_system_forgets_children() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        from_process, from_server = written_by_both(large_rig())
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert from_process == from_server


def test_without_a_thread_there_is_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    rig = real_rig()
    rig.put(b"a", b"b")
    with prepared(rig) as image:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            assert backup_process.start(image, lambda: None) is None
        assert not children(os.getpid())


def test_clients_that_leave_at_once_do_not_start_many_processes() -> None:
    rig = real_rig()
    rig.put(b"a", b"b")
    with prepared(rig) as image:
        started = [backup_process.start(image, lambda: None) for _ in range(9)]
        assert len(children(os.getpid())) == backup_process.MAX_PROCESSES
        for one in filter(None, started):
            one.close()
        wait_until(lambda: not backup_process._running, "the processes end")
        assert Reading(image).rest()


def test_the_process_is_ended_before_the_server_where_memory_is_short() -> None:
    code = "open('/proc/self/oom_score_adj', 'w').write('1000')"
    if subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode:
        pytest.skip("the system does not let processes lower their own protection")
    with prepared(large_rig()) as image:
        reading = Reading(image)
        reading.next()
        (child,) = children(os.getpid())
        assert Path(f"/proc/{child}/oom_score_adj").read_text() == "1000\n"
        reading.process.close()


def test_what_is_handed_over_is_in_small_values() -> None:
    """The loop waits while one is written."""
    flags, runs = bytes(10 * MIB), [bytes(96 << 10)] * 30
    given = iter([("", [], (1, 1, 0, 0)), flags, None, *runs, None])
    values = list(etcd_file.hand_over(History.take_over(lambda: next(given)), []))
    assert max(len(marshal.dumps(value)) for value in values) < 100 << 10
    again, _ = etcd_file.take_over(partial(next, iter(values)))
    assert (again._flags, again._runs) == (flags, runs)


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


def test_the_process_ends_when_the_server_is_killed(large_server: ServerProcess) -> None:
    grpc = pytest.importorskip("grpc")
    process = large_server.process
    assert process is not None
    with grpc.insecure_channel(large_server.endpoint) as channel:
        call = channel.unary_stream("/etcdserverpb.Maintenance/Snapshot")(b"", timeout=60)
        assert proto.SnapshotResponse.decode(next(call)).blob
        (child,) = children(process.pid)
        process.kill()

        def has_ended() -> bool:
            with contextlib.suppress(OSError):
                return state(child) == "Z"
            return True

        wait_until(has_ended, "the process ends")
