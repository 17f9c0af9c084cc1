"""Encryption at rest and of backups with real processes: what is on the disk tells nothing."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.ctl_runner import Ended, run_ctl
from rigs.processes import PATIENCE_S, SMALL_FILES, ServerProcess, wait_until
from test_cluster_live import LiveCluster

from etcdlite import proto, sealing
from etcdlite.client import Client

pytest.importorskip("nacl", reason="pynacl is not installed")

KEY = b"distinctive-key-"
VALUE = b"distinctive-value-"


def new_key_file(path: Path) -> Path:
    ended = run_ctl("key", "new", str(path))
    assert ended.status == 0, ended
    return path


def fill(client: Client, count: int, value_bytes: int = 500) -> None:
    for number in range(count):
        value = VALUE + b"%d " % number
        client.put(KEY + b"%d" % (number % 40), value * (value_bytes // len(value)))


def readable(folder: Path) -> list[str]:
    """The files that show keys or values."""
    found = []
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            content = path.read_bytes()
            if KEY in content or VALUE in content:
                found.append(path.name)
    return found


def kinds(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def live_through(running: ServerProcess) -> set[str]:
    """Writes, checkpoints, compaction, defragmentation, and ends of all kinds. Returns the kinds of
    files that showed something at any moment."""
    shown: set[str] = set()
    with running.client() as client:
        fill(client, 150)
        shown |= kinds(readable(running.data_dir))
        revision = client.get(KEY + b"0").mod_revision
        client.call("KV.Compact", proto.CompactionRequest(revision=revision, physical=True))
        client.call("Maintenance.Defragment", proto.DefragmentRequest())
        fill(client, 60)
        shown |= kinds(readable(running.data_dir))
    running.kill()
    shown |= kinds(readable(running.data_dir))
    running.start()
    with running.client() as client:
        fill(client, 30)
    running.stop()
    return shown | kinds(readable(running.data_dir))


def test_the_data_directory_shows_no_key_and_no_value(server: Any, tmp_path: Path) -> None:
    plain = server(*SMALL_FILES)
    # A kill may leave a file that was being written, too.
    found = live_through(plain) - {"tmp"}
    assert found == {"wal", "seg", "checkpoint"}, "the search does not find them"
    keys = new_key_file(tmp_path / "keys")
    sealed = server(*SMALL_FILES, f"--encryption-key-file={keys}")
    assert live_through(sealed) == set()
    sealed.start()
    with sealed.client() as client:
        assert client.get(KEY + b"7").value.startswith(VALUE)


class KeyedCluster(LiveCluster):
    """m1 and m2 have keys of their own, m3 has none."""

    def _make(self, name: str, url: str, initial: str, state: str) -> ServerProcess:
        member = super()._make(name, url, initial, state)
        if name != "m3":
            path = new_key_file(self.folder / f"{name}.keys")
            member.environ["ETCDLITE_ENCRYPTION_KEY_FILE"] = str(path)
        return member


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[KeyedCluster]:
    made = KeyedCluster(tmp_path, 3, *SMALL_FILES)
    yield made
    made.close()


def test_members_with_different_keys_or_none_send_each_other_snapshots(keyed: KeyedCluster) -> None:
    for name in ("m2", "m3"):
        away = keyed.members[name]
        away.kill()
        with Client(keyed.endpoints, timeout_s=PATIENCE_S) as client:
            fill(client, 60)
            for number in range(24):
                client.put(KEY + b"ballast%d" % number, VALUE + bytes(1 << 20))
        away.spawn()
        wait_until(lambda: away.logged("receiving a snapshot"), f"it comes; {away.tail()}")  # noqa: B023
        wait_until(lambda: away.logged("installed a snapshot"), f"it is taken; {away.tail()}")  # noqa: B023
        wait_until(lambda: away.endpoint, f"it serves; {away.tail()}")  # noqa: B023
    request = proto.RangeRequest(key=KEY, serializable=True)
    revision = keyed.call("KV.Range", proto.RangeRequest(key=KEY)).header.revision
    hashes = set()
    for name, member in keyed.members.items():
        with Client(member.endpoint, timeout_s=PATIENCE_S) as client:
            wait_until(
                lambda c=client: c.call("KV.Range", request).header.revision >= revision,
                f"{name} has all",
            )
            hashes.add(
                client.call("Maintenance.HashKV", proto.HashKVRequest(revision=revision)).hash
            )
    assert len(hashes) == 1
    for name, member in keyed.members.items():
        assert bool(readable(member.data_dir)) == (name == "m3"), name
    for member in keyed.members.values():
        member.kill()
    for name, member in keyed.members.items():
        assert bool(readable(member.data_dir)) == (name == "m3"), name
    for member in keyed.members.values():
        member.spawn()
    wait_until(lambda: keyed.endpoints, "a member serves")
    keyed.call("KV.Put", proto.PutRequest(key=b"after", value=b"all"))


def refused(running: ServerProcess, *flags: str, status: int = 2) -> str:
    running.spawn(*flags)
    assert running.wait() == status, running.tail()
    return running.lines[-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_keys_are_added_replaced_and_removed(server: Any, tmp_path: Path) -> None:
    running: ServerProcess = server(*SMALL_FILES)
    with running.client() as client:
        fill(client, 60)
    running.stop()
    keys = new_key_file(tmp_path / "keys")
    first = sealing.read(str(keys)).first.id.hex()
    flag = f"--encryption-key-file={keys}"
    # A plain directory gets a key: it must be encrypted first.
    before = contents(running.data_dir)
    assert "are not encrypted" in refused(running, flag)
    assert f"rekey --data-dir {running.data_dir} --encryption-key-file {keys}" in running.lines[-1]
    checked_start = subprocess.run(
        [*running.program, f"--data-dir={running.data_dir}", flag, "--check-config"],
        capture_output=True,
        text=True,
    )
    assert checked_start.returncode == 2 and "are not encrypted" in checked_start.stderr
    assert contents(running.data_dir) == before

    def rekey(*words: str, file: Path = keys) -> Ended:
        return run_ctl(
            "rekey", f"--data-dir={running.data_dir}", f"--encryption-key-file={file}", *words
        )

    checked = rekey("--check")
    assert checked.status == 1 and b"none (plain)" in checked.stdout
    assert readable(running.data_dir)
    assert "files rewritten" in rekey().stderr
    assert not readable(running.data_dir)
    assert rekey("--check") == (0, rekey("--check").stdout, "")
    running.start(flag)
    with running.client() as client:
        assert client.get(KEY + b"3").value.startswith(VALUE)
        fill(client, 20)
    assert rekey().status == 1 and "in use by another" in rekey().stderr
    running.stop()
    assert not readable(running.data_dir)
    # Someone puts an old, plain file back.
    plain = next(name for name in before if name.endswith(".seg"))
    sealed = Path(plain).read_bytes() if Path(plain).exists() else None
    Path(plain).write_bytes(before[plain])
    assert "someone replaced them" in refused(running, flag)
    if sealed is None:
        Path(plain).unlink()
    else:
        Path(plain).write_bytes(sealed)
    # Missing and wrong keys are refused, and nothing changes.
    before = contents(running.data_dir)
    other = new_key_file(tmp_path / "other")
    assert first in refused(running) and "no key was given" in running.lines[-1]
    assert "has " + sealing.read(str(other)).first.id.hex() in refused(
        running, f"--encryption-key-file={other}"
    )
    other.chmod(0o644)
    assert "chmod 600" in refused(running, f"--encryption-key-file={other}", status=1)
    assert "cannot read" in refused(running, "--encryption-key-file=/nonexistent", status=1)
    assert rekey(file=tmp_path / "none").status == 1
    assert contents(running.data_dir) == before
    # A new key comes first; after rekey the old one can go.
    keys.chmod(0o400)
    assert run_ctl("key", "add", str(keys)).status == 0
    assert keys.stat().st_mode & 0o777 == 0o400, "it may be 0640, for the group of the service"
    keys.chmod(0o600)
    ring = sealing.read(str(keys))
    assert len(ring.ids) == 2 and ring.ids[1].hex() == first
    running.start(flag)
    with running.client() as client:
        fill(client, 40)
    running.kill()
    assert rekey("--check").status == 1 and first in rekey("--check").stderr
    assert rekey().status == 0
    assert rekey("--check").stdout.startswith(b"key " + ring.ids[0].hex().encode())
    keys.write_text("".join(keys.read_text().splitlines(keepends=True)[:2]))
    assert sealing.read(str(keys)).ids == ring.ids[:1]
    running.start(flag)
    with running.client() as client:
        assert client.get(KEY + b"3").value.startswith(VALUE)
        assert client.get(KEY + b"39").value.startswith(VALUE + b"39 ")
    running.stop()
    assert not readable(running.data_dir)


def test_backups_are_encrypted_to_a_public_key(server: Any, tmp_path: Path) -> None:
    running: ServerProcess = server()
    with running.client() as client:
        fill(client, 60, 4000)
    endpoint = f"--endpoints={running.endpoint}"
    identity, backup = tmp_path / "identity", tmp_path / "backup.age"
    made = run_ctl("key", "identity", str(identity))
    public = made.stdout.decode().strip()
    assert made.status == 0 and public.startswith("age1")
    assert identity.stat().st_mode & 0o777 == 0o600
    assert run_ctl("key", "identity", str(identity)).status == 1, "it was overwritten"
    saved = run_ctl("snapshot", "save", endpoint, f"--encrypt-to={public}", str(backup))
    assert saved.status == 0, saved
    content = backup.read_bytes()
    assert content.startswith(b"age-encryption.org/v1\n") and len(content) > 200_000
    assert KEY not in content and VALUE not in content
    # Without the identity, with another one, cut, or changed.
    wrong = tmp_path / "wrong"
    run_ctl("key", "identity", str(wrong))
    use, data_dir = f"--identity={identity}", tmp_path / "restored"

    def why(path: Path, *words: str) -> str:
        texts = set()
        for command in (("status",), ("restore", f"--data-dir={data_dir}", "--skip-hash-check")):
            ended = run_ctl("snapshot", command[0], str(path), *command[1:], *words)
            assert (ended.status, ended.stdout) == (1, b""), ended
            assert not data_dir.exists() or not list(data_dir.glob("member*"))
            texts.add(ended.stderr)
        (text,) = texts
        return text

    assert "is encrypted; give the file with the identity" in why(backup)
    assert "other public keys" in why(backup, f"--identity={wrong}")
    assert "cannot read" in why(backup, "--identity=/nonexistent")
    assert "no identity" in why(backup, f"--identity={backup_as_private(backup, tmp_path)}")
    damaged = tmp_path / "damaged"
    damaged.write_bytes(content[:-1])
    assert "cut off" in why(damaged, use)
    chunk = 65536 + 16
    begin = content.index(b"\n--- ") + 5 + 43 + 1 + 16
    swapped = content[begin + chunk : begin + 2 * chunk] + content[begin : begin + chunk]
    damaged.write_bytes(content[:begin] + swapped + content[begin + 2 * chunk :])
    assert "chunk 0 of" in why(damaged, use)
    damaged.write_bytes(content[:begin] + content[begin + chunk :])
    assert "chunk" in why(damaged, use)
    plain = tmp_path / "plain"
    assert run_ctl("snapshot", "save", endpoint, str(plain)).status == 0
    assert "is not encrypted" in why(plain, use)
    # With it, into an encrypted data directory.
    status = run_ctl("snapshot", "status", str(backup), use, "-w", "json")
    assert status.status == 0 and b'"totalKey":40' in status.stdout
    keys = new_key_file(tmp_path / "keys")
    flags = (use, f"--data-dir={data_dir}", f"--encryption-key-file={keys}")
    restored = run_ctl("snapshot", "restore", str(backup), *flags)
    assert restored.status == 0 and f"--encryption-key-file {keys}" in restored.stderr
    assert not readable(data_dir)
    again = server(f"--encryption-key-file={keys}", data_dir=data_dir)
    with again.client() as client, running.client() as old:
        request = proto.RangeRequest(key=KEY, range_end=KEY[:-1] + b".")
        ours = client.call("KV.Range", request).kvs
        assert ours == old.call("KV.Range", request).kvs and len(ours) == 40


def backup_as_private(path: Path, folder: Path) -> Path:
    """A file that is no file of identities, with the right mode."""
    copy = folder / "no-identity"
    copy.write_bytes(b"# " + path.read_bytes()[:21].replace(b"\n", b""))
    copy.chmod(0o600)
    return copy


def test_bad_recipients_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    for text in ("age1", "AGE-SECRET-KEY-1QQ", "me"):
        ended = run_ctl("snapshot", "save", f"--encrypt-to={text}", str(tmp_path / "x"))
        assert ended.status == 128 and "--encrypt-to" in ended.stderr, ended
        assert "SECRET-KEY-1QQ" not in ended.stderr, "a log may keep it"
    assert not os.listdir(tmp_path)
