"""`defrag --data-dir` and `hashkv`: work on the files of a member that is stopped."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
from rigs.ctl_runner import run_ctl
from rigs.processes import ServerFactory

from etcdlite import datadir
from etcdlite.cli import offline


def test_a_stopped_member_is_defragmented(
    server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = 64 << 10
    running = server(f"--segment-bytes={small}")
    client = running.client()
    for turn in range(40):
        for key in range(10):
            client.put(f"k{key}", "v" * 1000 + str(turn))
    client.put("last", "1")
    revision = client.get("last").mod_revision
    client.compact(revision, physical=True)
    before = {kv.key: (kv.value, kv.mod_revision) for kv in client.range(prefix=b"")}
    hashed = client.hash_kv().hash
    ended = run_ctl("defrag", "--data-dir", str(running.data_dir))
    assert ended.status == 1 and "is in use by another etcdlite process" in ended.stderr
    running.kill()
    sized = functools.partial(datadir.Home, segment_bytes=small)
    monkeypatch.setattr(offline, "Home", sized)
    folder = running.data_dir / "member" / "data"
    was = sum(path.stat().st_size for path in folder.iterdir())
    ended = run_ctl("defrag", "--data-dir", str(running.data_dir))
    assert ended.status == 0 and " before, " in ended.stderr, ended
    assert sum(path.stat().st_size for path in folder.iterdir()) < was / 2
    assert run_ctl("defrag", "--data-dir", str(running.data_dir)).status == 0
    running.start()
    client = running.client()
    assert before == {kv.key: (kv.value, kv.mod_revision) for kv in client.range(prefix=b"")}
    assert client.hash_kv().hash == hashed


def test_the_data_of_another_user_is_left_alone(
    server: ServerFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    running = server()
    running.stop()
    assert run_ctl("key", "new", str(tmp_path / "keys")).status == 0
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    keys = f"--encryption-key-file={tmp_path / 'keys'}"
    for words in (("defrag",), ("rekey", keys)):
        ended = run_ctl(*words, "--data-dir", str(running.data_dir))
        assert ended.status == 1 and "; run this as that user (as root: runuser -u " in ended.stderr


def test_the_hash_of_a_backup_is_that_of_the_member(server: ServerFactory, tmp_path: Path) -> None:
    running = server()
    client = running.client()
    for n in range(20):
        client.put(f"k{n % 4}", str(n))
    client.delete("k1")
    client.compact(7)
    at, file = f"--endpoints={running.endpoint}", str(tmp_path / "backup.db")
    identity = str(tmp_path / "identity")
    public = run_ctl("key", "identity", identity).stdout.decode().strip()
    assert run_ctl(at, "snapshot", "save", file).status == 0
    assert run_ctl(at, "snapshot", "save", "--encrypt-to", public, f"{file}.age").status == 0
    for rev in (0, 15):
        found = client.hash_kv(rev)
        shown = f"{found.hash}, {rev or 22}, 7\n".encode()
        assert run_ctl("hashkv", file, "--rev", str(rev)) == (0, shown, "")
        words = (f"{file}.age", "--identity", identity)
        assert run_ctl("hashkv", *words, "--rev", str(rev)) == (0, shown, "")
    assert run_ctl("hashkv", file, "-w", "json").stdout.startswith(b'{"hash":')
    for rev, why in ((6, "compacted"), (23, "future revision")):
        ended = run_ctl("hashkv", file, "--rev", str(rev))
        assert ended.status == 1 and why in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "backup.db", "backup.db.age", "identity", "server-0",
    ]  # fmt: skip
    Path(file).write_bytes(b"no backup")
    ended = run_ctl("hashkv", file)
    assert ended.status == 1 and ended.stderr.count("\n") == 1
