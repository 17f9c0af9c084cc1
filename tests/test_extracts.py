"""The state of any kept revision, and of prefixes: saved, restored, shown and compared with a plain
model."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rigs.ctl_runner import Ended, run_ctl
from rigs.processes import ServerFactory, ServerProcess

from etcdlite import extract, proto
from etcdlite.cli import differences
from etcdlite.client import Client, Delete, Put
from etcdlite.lease import Lessor
from etcdlite.mvcc import Store
from etcdlite.storage.disk import Disk

Keys = dict[bytes, bytes]


class History:
    """A random history: the server that has it, and the plain state at each revision."""

    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.server = server
        self.client = server.client()
        self.states: dict[int, Keys] = {1: {}}
        rng = random.Random(seed)
        for number in range(150):
            names = rng.sample([f"{area}/{n}" for area in "abc" for n in range(5)], 3)
            ops: list[Any] = []
            state = dict(self.states[max(self.states)])
            for name in names[: rng.choice((1, 1, 2, 3))]:
                if rng.random() < 0.3 and name.encode() in state:
                    ops.append(Delete(name))
                    del state[name.encode()]
                else:
                    ops.append(Put(name, f"v{number}"))
                    state[name.encode()] = f"v{number}".encode()
            revision = self.client.txn([], ops).revision
            assert revision == max(self.states) + 1
            self.states[revision] = state
        self.last = max(self.states)
        self.compacted = 40
        self.client.compact(self.compacted)

    def run(self, *words: str) -> Ended:
        return run_ctl(f"--endpoints={self.server.endpoint}", *words)


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import sys

    folder = tmp_path_factory.mktemp("past")
    server = ServerProcess(folder / "data", [], [sys.executable, "-m", "etcdlite"]).start()
    yield History(server, 5)
    server.close()


def keys_in(data_dir: Path) -> tuple[Keys, Store]:
    """What a restored data directory has."""
    store = Store.open(Disk(), str(data_dir / "member" / "data"), Lessor(), 16 << 20)
    found, _ = store.scan(b"", None, store.revision, 10_000)
    kvs = [proto.KeyValue.decode(store.data.read(*place)) for place in found]
    store.close()
    return {kv.key: kv.value for kv in kvs}, store


def of_prefixes(state: Keys, *prefixes: bytes) -> Keys:
    return {key: value for key, value in state.items() if key.startswith(prefixes)}


def test_the_state_of_any_kept_revision_is_restored(past: History, tmp_path: Path) -> None:
    whole = tmp_path / "whole.db"
    assert past.run("snapshot", "save", str(whole)).status == 0
    rng = random.Random(1)
    chosen = [past.compacted, past.last, *rng.sample(range(past.compacted + 1, past.last), 6)]
    for revision in chosen:
        saved = tmp_path / f"{revision}.xtr"
        assert past.run("snapshot", "save", "--rev", str(revision), str(saved)).status == 0
        for number, file in enumerate((whole, saved)):
            target = tmp_path / f"{revision}-{number}"
            words = ("snapshot", "restore", str(file), "--data-dir", str(target))
            ended = run_ctl(*words, "--rev", str(revision))
            assert ended.status == 0, ended
            found, store = keys_in(target)
            assert found == past.states[revision], f"revision {revision} differs"
            assert (store.revision, store.applied_index) == (1 + len(found), 1)
    for revision, why in ((past.compacted - 1, "compacted"), (past.last + 1, "future revision")):
        ended = past.run("snapshot", "save", "--rev", str(revision), str(tmp_path / "none"))
        assert ended.status != 0 and why in ended.stderr and not (tmp_path / "none").exists()
        words = ("snapshot", "restore", str(whole), "--data-dir", str(tmp_path / "none"))
        ended = run_ctl(*words, "--rev", str(revision))
        assert ended.status == 1 and f"{past.compacted} to {past.last}" in ended.stderr
        assert not (tmp_path / "none" / "member").exists()


def test_a_restored_revision_serves_and_takes_members(
    past: History, tmp_path: Path, server: ServerFactory
) -> None:
    saved, target = tmp_path / "saved.xtr", tmp_path / "target"
    assert past.run("snapshot", "save", "--rev", "60", str(saved)).status == 0
    flags = ("--bump-revision", "1000", "--mark-compacted", "--data-dir", str(target))
    assert run_ctl("snapshot", "restore", str(saved), *flags).status == 0
    restored = server(data_dir=target)
    client = restored.client()
    assert {kv.key: kv.value for kv in client.range(prefix=b"")} == past.states[60]
    assert client.put("more", "1").revision == 1000 + 2 + len(past.states[60])
    restored.kill()
    restored.start()
    assert restored.client().get("more") is not None


def test_prefixes_are_saved_together_and_restored(past: History, tmp_path: Path) -> None:
    saved = tmp_path / "saved.xtr"
    words = ("snapshot", "save", "--prefix", "c/", "--prefix", "a/", "--prefix", "a/1", str(saved))
    assert past.run(*words).status == 0
    wanted = of_prefixes(past.states[past.last], b"a/", b"c/")
    shown = run_ctl("snapshot", "status", str(saved)).stdout.decode()
    assert shown.split(", ")[1:3] == [str(past.last), str(len(wanted))]
    assert run_ctl("snapshot", "restore", str(saved), "--data-dir", str(tmp_path / "1")).status == 0
    assert keys_in(tmp_path / "1")[0] == wanted
    words = ("snapshot", "restore", str(saved), "--data-dir", str(tmp_path / "2"))
    assert run_ctl(*words, "--prefix", "a/").status == 0
    assert keys_in(tmp_path / "2")[0] == of_prefixes(wanted, b"a/")
    ended = run_ctl(*words, "--prefix", "b/")
    assert ended.status == 1 and "b/: the file does not have all these keys" in ended.stderr


def test_a_running_cluster_gets_what_a_dry_run_shows(
    past: History, tmp_path: Path, server: ServerFactory
) -> None:
    running = server()
    client = running.client()
    client.txn([], [Put("a/0", "old"), Put("a/9", "extra"), Put("z", "other")])
    whole = tmp_path / "whole.db"
    assert past.run("snapshot", "save", str(whole)).status == 0
    words = (f"--endpoints={running.endpoint}", "snapshot", "restore", str(whole), "--into-cluster")
    for revision in (50, 90, past.last):
        flags = ("--rev", str(revision), "--prefix", "a/", "--prefix", "b/")
        before = {kv.key: kv.value for kv in client.range(prefix=b"")}
        wanted = of_prefixes(past.states[revision], b"a/", b"b/")
        shown = run_ctl(*words, *flags, "--dry-run")
        lines = []
        for key in sorted({*of_prefixes(before, b"a/", b"b/"), *wanted}):
            old, new = before.get(key), wanted.get(key)
            if old != new:
                sign = "+" if old is None else "-" if new is None else "~"
                values = " -> ".join(f'"{v.decode()}"' for v in (old, new) if v is not None)
                lines.append(f'{sign} "{key.decode()}" = {values}\n')
        assert (shown.status, shown.stdout.decode()) == (0, "".join(lines))
        assert {kv.key: kv.value for kv in client.range(prefix=b"")} == before
        ended = run_ctl(*words, *flags)
        assert ended.status == 0 and f"restored: {len(lines)} keys changed" in ended.stderr
        assert {kv.key: kv.value for kv in client.range(prefix=b"")} == {**wanted, b"z": b"other"}
    assert run_ctl(*words, *flags, "--dry-run") == (0, b"", "")


def test_leases_are_kept_dropped_or_refused(tmp_path: Path, server: ServerFactory) -> None:
    running, other = server(), server()
    client = running.client()
    lease, ended_lease = client.lease_grant(1000).id, client.lease_grant(1000).id
    client.put("a/1", "1", lease=lease)
    client.put("a/2", "2")
    before = client.put("a/3", "3", lease=ended_lease).revision
    client.lease_revoke(ended_lease)
    at, into = f"--endpoints={running.endpoint}", f"--endpoints={other.endpoint}"
    saved, older = str(tmp_path / "saved.xtr"), str(tmp_path / "older.xtr")
    assert run_ctl(at, "snapshot", "save", "--prefix", "a/", saved).status == 0
    assert run_ctl(at, "snapshot", "save", "--rev", str(before), older).status == 0
    for target in (("--into-cluster",), ("--data-dir", str(tmp_path / "refused"))):
        ended = run_ctl(into, "snapshot", "restore", saved, *target)
        assert ended.status == 1 and "Say --leases keep" in ended.stderr
        ended = run_ctl(into, "snapshot", "restore", older, *target, "--leases", "keep")
        assert ended.status == 1 and f"lease {ended_lease:x} had ended" in ended.stderr
    assert not list(other.client().range(prefix=b"")) and not (tmp_path / "refused/member").exists()
    words = (into, "snapshot", "restore", saved, "--into-cluster", "--leases")
    assert run_ctl(*words, "drop").status == 0
    assert [kv.lease for kv in other.client().range(prefix=b"")] == [0, 0]
    for _ in range(2):
        assert run_ctl(*words, "keep").status == 0
        assert [kv.lease for kv in other.client().range(prefix=b"")] == [lease, 0]
    assert other.client().lease_time_to_live(lease).granted_ttl == 1000
    assert run_ctl(*words, "bogus").status == 128
    words = ("snapshot", "restore", saved, "--data-dir", str(tmp_path / "new"), "--leases", "keep")
    assert run_ctl(*words).status == 0
    third = server(data_dir=tmp_path / "new").client()
    assert [kv.lease for kv in third.range(prefix=b"")] == [lease, 0]
    assert third.lease_time_to_live(lease).granted_ttl == 1000


def test_a_change_at_the_same_time_is_not_lost(tmp_path: Path, server: ServerFactory) -> None:
    client = Client  # The transaction compares with what the differences were made of.
    running = server()
    client = running.client()
    client.put("a", "1")
    at, saved = f"--endpoints={running.endpoint}", str(tmp_path / "saved.xtr")
    assert run_ctl(at, "snapshot", "save", "--prefix", "a", saved).status == 0
    client.put("a", "2")
    from unittest import mock

    from etcdlite.cli import extracts

    def interfere(text: str) -> None:
        client.put("a", "3")

    with mock.patch.object(extracts, "say", interfere):
        ended = run_ctl(at, "snapshot", "restore", saved, "--into-cluster")
    assert ended.status == 1 and "0 of 1 keys are changed. Run it again" in ended.stderr
    assert client.get("a").value == b"3"


def test_history_and_diff_show_what_changed(past: History) -> None:
    first, last = past.compacted, past.last
    shown = past.run("history", "a/1").stdout.decode().splitlines()
    values = []
    for revision in range(first, last + 1):
        value = past.states[revision].get(b"a/1")
        if not values or values[-1] != value:
            values.append(value)
    steps = list(zip([None, *values], values, strict=False))
    signs = [
        "+" if old is None else "-" if new is None else "~" for old, new in steps if old != new
    ]
    assert [line[0] for line in shown] == signs
    for a, b in ((first, last), (60, 61), (70, 120), (last, last)):
        old, new = past.states[a], past.states[b]
        changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        shown = past.run("diff", "--rev", f"{a}..{b}").stdout.decode().splitlines()
        assert [line.split(" ")[1] for line in shown] == [f'"{key.decode()}"' for key in changed]
        shown = past.run("diff", "--rev", f"{a}..{b}", "b/").stdout.decode().splitlines()
        assert len(shown) == len([key for key in changed if key.startswith(b"b/")])
    assert past.run("diff", "--rev", "5..60").status == 1
    for text in ("", "x..1", "9..8", f"1..{last + 1}", "0..3"):
        assert past.run("diff", "--rev", text).status == 128


def test_flags_that_do_not_fit_are_refused(past: History, tmp_path: Path) -> None:
    file, target = str(tmp_path / "file"), ("--data-dir", str(tmp_path / "target"))
    assert past.run("snapshot", "save", file).status == 0
    restore = ("snapshot", "restore", file)
    for words, why in (
        (("snapshot", "save", "--format", "etcd", "--rev", "50", file), "the whole history"),
        ((*restore, *target, "--dry-run"), "only for --into-cluster"),
        ((*restore, *target, "--leases", "drop"), "keeps all leases"),
        ((*restore, *target, "--leases", "bogus", "--rev", "50"), "keep, drop, refuse"),
    ):
        ended = past.run(*words)
        assert ended.status == 128 and why in ended.stderr, ended
    assert not (tmp_path / "target").exists()


# The file.


def written(tmp_path: Path) -> Path:
    path = tmp_path / "file.xtr"
    with open(path, "wb") as file:
        writer = extract.Writer(file, extract.Header(7, 99, (b"a", b"b")))
        for n in range(3):
            kv = proto.KeyValue(key=b"a%d" % n, value=b"v", mod_revision=n + 2, lease=n)
            writer.add(kv)
        writer.finish([(1, 60), (2, 0)])
    return path


def test_a_damaged_or_cut_extract_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    data = path.read_bytes()
    with open(path, "rb") as file:
        content = extract.check("x", file)
        assert content.header == (7, 99, (b"a", b"b"))
        assert (content.leases, content.total_keys) == ({1: 60, 2: 0}, 3)
        assert [kv.key for kv in extract.key_values("x", file)] == [b"a0", b"a1", b"a2"]
    broken = tmp_path / "broken.xtr"
    rng = random.Random(2)
    cases = [data[:size] for size in range(len(data))]
    for at in range(len(data)):
        cases.append(data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :])
    cases += [data + b"x", rng.randbytes(500), extract.MAGIC + rng.randbytes(500)]
    for case in cases:
        broken.write_bytes(case)
        with open(broken, "rb") as file, pytest.raises(extract.ExtractError):
            extract.check("x", file)
    broken.write_bytes(data[:-1])
    for words in (("status",), ("restore", "--data-dir", str(tmp_path / "no"))):
        ended = run_ctl("snapshot", words[0], str(broken), *words[1:])
        assert ended.status == 1 and "is damaged" in ended.stderr
    assert not (tmp_path / "no" / "member").exists()


def test_diff_holds_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """It held those of all keys that changed: 0.6 GB for a million small ones."""
    keys = [b"%04d" % number for number in range(500)]

    def changed(*_: Any) -> Iterator[proto.Event]:
        for revision, key in enumerate(keys, 11):
            yield proto.Event(
                kv=proto.KeyValue(key=key, value=bytes(10_000), mod_revision=revision)
            )

    def call(method: str, request: Any) -> Any:
        if method == "KV.Range":
            assert request.count_only
            return proto.RangeResponse(header=proto.ResponseHeader(revision=1000))
        answers = []
        for one in (op.request_range for op in request.success):
            value = bytes(10_000) + b"%d" % one.revision
            kv = proto.KeyValue(key=one.key, value=value, mod_revision=one.revision)
            answers.append(proto.ResponseOp(response_range=proto.RangeResponse(kvs=[kv])))
        return proto.TxnResponse(responses=answers)

    shown: list[tuple[bytes, int]] = []
    session: Any = SimpleNamespace(
        client=lambda: SimpleNamespace(call=call),
        optional=lambda _: None,
        flags={"rev": "10..900"},
        show=lambda _, found, more: shown.append((found.new.key, more["revision"])),
    )
    monkeypatch.setattr(differences, "events", changed)
    monkeypatch.setattr(differences, "_timeline", lambda _: proto.TimelineResponse())
    tracemalloc.start()
    try:
        differences.diff(session)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert shown == [(key, revision) for revision, key in enumerate(keys, 11)]
    assert peak_bytes < 1 << 20
