"""Real work from end to end: this machine's own /etc as keys and values, through everything that a
store goes through in its life."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from rigs.homes import home
from rigs.processes import PATIENCE_S

from etcdlite import backup, proto, snap
from etcdlite.client import Compacted, Put
from etcdlite.datadir import StartError

TREE = "/etc"
MAX_FILE_BYTES = 200_000
MAX_TREE_BYTES = 8_000_000
"""Enough to be real, small enough to be quick."""

FLAGS = ("--checkpoint-bytes=1MiB", "--segment-bytes=512KiB", "--wal-segment-bytes=1MiB")


def configuration_tree() -> dict[bytes, bytes]:
    """Path -> content of the readable files of /etc, symbolic links as their target."""
    tree: dict[bytes, bytes] = {}
    size_bytes = 0
    for folder, folders, names in os.walk(os.fsencode(TREE)):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(folder, name)
            try:
                mode = os.lstat(path).st_mode
                if stat.S_ISLNK(mode):
                    content = os.readlink(path)
                elif stat.S_ISREG(mode):
                    content = Path(os.fsdecode(path)).read_bytes()
                else:
                    continue
            except OSError:
                continue  # Not readable for this user, or already removed.
            size_bytes += len(content)
            if len(content) <= MAX_FILE_BYTES and size_bytes <= MAX_TREE_BYTES:
                tree[path] = content
    return tree


def contents(client, **options) -> dict[bytes, bytes]:
    return {kv.key: kv.value for kv in client.range(prefix=TREE, **options)}


def load(client, tree: dict[bytes, bytes]) -> None:
    """In transactions of as many files as fit."""
    batch: list = []
    room_bytes = 1_000_000
    for key, value in tree.items():
        if len(batch) == 100 or len(key) + len(value) > room_bytes:
            client.txn(success=batch)
            batch, room_bytes = [], 1_000_000
        batch.append(Put(key, value))
        room_bytes -= len(key) + len(value) + 100
    client.txn(success=batch)


def test_a_configuration_tree_lives_through_everything(server, tmp_path):
    tree = configuration_tree()
    assert tree, f"nothing in {TREE} can be read"
    running = server(*FLAGS)
    client = running.client()

    # Load it, and read it back: whole, page by page, counted, file by file.
    load(client, tree)
    first = client.status().revision
    assert contents(client) == tree
    paged: dict[bytes, bytes] = {}
    start = TREE.encode()
    while True:
        page = client.range(start, range_end=b"/etd", limit=37)
        paged.update((kv.key, kv.value) for kv in page)
        if not page.more:
            break
        start = page[-1].key + b"\0"
    assert paged == tree
    assert client.range(prefix=TREE, count_only=True).count == len(tree)
    some = sorted(tree)[:: max(1, len(tree) // 50)]
    for key in some:
        assert client.get(key).value == tree[key]

    # Watch it from the past while it changes.
    now = dict(tree)
    expected = [(key, value) for key, value in tree.items()]
    with client.watch(prefix=TREE, start_revision=1) as watch:
        for number, key in enumerate(some):
            if number % 3:
                now[key] = b"# changed\n" + tree[key]
                client.put(key, now[key])
            else:
                assert client.delete(key, prev_kv=True).prev_kvs[0].value == tree[key]
                del now[key]
            expected.append((key, now.get(key)))
        events = [next(watch) for _ in expected]
    seen = [(event.key, None if event.is_delete else event.value) for event in events]
    assert sorted(seen[: len(tree)]) == sorted(expected[: len(tree)])
    assert seen[len(tree) :] == expected[len(tree) :]
    changed = client.status().revision
    assert changed == first + len(some)

    # Both states can be read, and still can after an unclean end.
    assert contents(client) == now
    assert contents(client, revision=first) == tree
    hash_before = client.hash_kv(changed)
    running.kill()
    running.start()
    client = running.client()
    assert contents(client) == now
    assert contents(client, revision=first) == tree
    assert client.hash_kv(changed) == hash_before

    # Give up the past, and the space it took.
    for _ in range(3):
        for key in some:
            client.put(key, tree[key] + b"# again\n")
            now[key] = tree[key] + b"# again\n"
    size_before = client.status().db_size
    client.compact(client.status().revision, physical=True)
    with pytest.raises(Compacted):
        contents(client, revision=first)
    client.defragment(timeout_s=PATIENCE_S)
    assert contents(client) == now
    assert client.status().db_size < size_before

    # Save it while it is being written to.
    copy = tmp_path / "backup.db"
    saved = client.status().revision
    client.snapshot(copy)
    client.put(TREE + "/after-the-backup", b"lost")
    status = backup.status(str(copy))
    assert (status.revision, status.total_keys) == (saved, len(now))
    hash_saved = client.hash_kv(saved)

    # Restore it as another member, and compare.
    backup.restore(str(copy), home(tmp_path / "restored"), name="restored")
    other = server(*FLAGS, "--name=restored", data_dir=tmp_path / "restored")
    restored = other.client()
    assert contents(restored) == now
    assert restored.status().revision == saved
    assert [member.name for member in restored.members()] == ["restored"]
    assert restored.hash_kv(saved).hash == hash_saved.hash
    with restored.watch(prefix=TREE) as watch:
        assert restored.put(TREE + "/new", b"1").revision == saved + 1
        assert next(watch).key == b"/etc/new"
    other.restart()
    assert contents(other.client()) == {**now, b"/etc/new": b"1"}


def test_a_snapshot_is_of_one_moment_while_everything_moves(server, tmp_path):
    running = server("--checkpoint-bytes=65536", "--segment-bytes=32768")
    client = running.client()
    with running.client() as other:
        for number in range(300):
            client.txn(success=[Put(f"pair/{number % 40}/{half}", f"{number}") for half in "ab"])
        backups = []
        for turn in range(4):
            backups.append(tmp_path / f"backup-{turn}")
            with client.stream("Maintenance.Snapshot", proto.SnapshotRequest()) as stream:
                parts = [next(stream).blob]
                # What happens from here on is not in it.
                client.txn(success=[Put(f"pair/{turn}/{half}", f"late {turn}") for half in "ab"])
                client.compact(client.status().revision, physical=True)
                other.defragment(timeout_s=PATIENCE_S)
                parts += [part.blob for part in stream]
            backups[-1].write_bytes(b"".join(parts))
    for turn, copy in enumerate(backups):
        data_dir = tmp_path / f"restored-{turn}"
        backup.restore(str(copy), home(data_dir))
        restored = server(data_dir=data_dir).client()
        pairs = {kv.key: kv.value for kv in restored.range(prefix="pair/")}
        assert len(pairs) == 80
        for number in range(40):
            half, other_half = (pairs[b"pair/%d/%b" % (number, half)] for half in (b"a", b"b"))
            assert half == other_half
        late = {value for value in pairs.values() if value.startswith(b"late")}
        assert late == {b"late %d" % earlier for earlier in range(turn)}


def test_a_damaged_or_cut_backup_is_refused_and_leaves_nothing(server, tmp_path):
    running = server()
    client = running.client()
    for number in range(50):
        client.put(f"k{number}", b"v" * 100)
    copy = tmp_path / "backup"
    client.snapshot(copy)
    whole = copy.read_bytes()
    middle = len(whole) // 2
    for damaged in (
        whole[:-1],
        whole[:-512],
        whole[:middle] + bytes((whole[middle] ^ 1,)) + whole[middle + 1 :],
        b"",
        b"not a snapshot" * 100,
    ):
        copy.write_bytes(damaged)
        with pytest.raises(snap.SnapshotError):
            backup.restore(str(copy), home(tmp_path / "restored"))
        assert not (tmp_path / "restored" / "member").exists()
    copy.write_bytes(whole)
    backup.restore(str(copy), home(tmp_path / "restored"))
    assert (tmp_path / "restored" / "member").exists()
    with pytest.raises(StartError, match="already holds a member"):
        backup.restore(str(copy), home(tmp_path / "restored"))


def test_the_store_works_from_the_command_line(server, tmp_path):
    """One short session of the kind that a README shows."""
    running = server()

    def ctl(*arguments: str, given: str = "") -> str:
        done = subprocess.run(
            [sys.executable, "-m", "etcdlite.ctl", "--endpoints", running.endpoint, *arguments],
            input=given,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert ctl("put", "greeting", "hello") == "OK\n"
    assert ctl("get", "greeting") == "greeting\nhello\n"
    copy = str(tmp_path / "backup")
    ctl("snapshot", "save", copy)
    assert ctl("del", "greeting") == "1\n"
    ctl("snapshot", "restore", copy, "--data-dir", str(tmp_path / "restored"))
    restored = server(data_dir=tmp_path / "restored")
    assert restored.client().get("greeting").value == b"hello"
