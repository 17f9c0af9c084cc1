"""kill -9: every acknowledged write is there afterwards, none appears in part, no revision goes
back.

Writers keep namespaces of their own and do one thing after another, so what each of them must find
is known but for its last operation, whose answer the kill may have swallowed: that one may have
happened or not, but only as a whole. `History` compares everything the restarted server can tell
with that: the events since revision 1, the keys now and at an old revision, leases, compaction.

Kills come at random moments (seeded) while each kind of write is under way, and, with a disk layer
that kills its own process, at each kind of disk operation.
"""

from __future__ import annotations

import copy
import random
import shutil
import signal
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import pytest
from rigs.processes import PATIENCE_S, SMALL_FILES, ServerProcess, wait_until

from etcdlite.client import (
    Client,
    Compacted,
    ConnectionFailed,
    Delete,
    EtcdliteError,
    Put,
    UnknownOutcome,
)

WRITERS = 4
KEYS_PER_WRITER = 12
VALUE_BYTES = 200
LEASE_S = 100_000
"""Long enough not to expire in any test."""

KINDS = ("put", "delete range", "txn", "lease", "compaction", "defragment")
KEPT_BY_KEEPER = ("compaction", "defragment")

Changes = dict[bytes, "bytes | None"]
"""What one revision does: values by key, None for a delete."""


@dataclass
class Operation:
    kind: str
    changes: Changes
    grants: int = 0
    revokes: int = 0
    compacts: int = 0
    revision: int = 0
    """As acknowledged; 0 while it is not, or where it has none."""


class Key(NamedTuple):
    value: bytes
    create: int
    mod: int
    version: int


class History:
    """What the store must hold, as far as it is certain."""

    def __init__(self) -> None:
        self.revision = 1
        """Verified up to here."""
        self.revisions: dict[int, Changes] = {}
        self.keys: dict[bytes, Key] = {}
        self.leases: set[int] = set()
        self.compacted = 0

    def verify(
        self, client: Client, rng: random.Random, acked: list[Operation], open_: list[Operation]
    ) -> None:
        """Compare with the server after a restart, and take in what it has of `open_`."""
        revision = client.range("x").revision  # a linearizable read, unlike the status
        newest = max((op.revision for op in acked), default=0)
        assert revision >= max(newest, self.revision), "revisions went back"
        self._verify_compaction(client, acked, open_)
        seen = _watched(client, self.compacted + 1, revision)
        for number in range(self.compacted + 1, self.revision + 1):
            assert seen.get(number) == self.revisions.get(number), f"revision {number} changed"
        self._take_in(seen, revision, acked, open_)
        self._verify_keys(client, rng, revision)
        self._verify_leases(client, acked, open_)

    def _verify_compaction(
        self, client: Client, acked: list[Operation], open_: list[Operation]
    ) -> None:
        least = max((self.compacted, *(op.compacts for op in acked)))
        most = max((least, *(op.compacts for op in open_)))
        found = max(0, client.hash_kv().compact_revision)
        assert least <= found <= most, "an acknowledged compaction is gone"
        self.compacted = found
        if found > 1:
            with pytest.raises(Compacted), client.watch(prefix="", start_revision=1) as watch:
                next(watch)
        for number in [n for n in self.revisions if n <= found]:
            del self.revisions[number]

    def _take_in(
        self,
        seen: dict[int, Changes],
        revision: int,
        acked: list[Operation],
        open_: list[Operation],
    ) -> None:
        by_revision = {op.revision: op for op in acked if op.changes}
        waiting = [op for op in open_ if op.changes]
        for number in range(self.revision + 1, revision + 1):
            changes = seen.get(number)
            assert changes, f"revision {number} has no events"
            op = by_revision.pop(number, None)
            if op is None:
                op = next((one for one in waiting if one.changes == changes), None)
                assert op is not None, f"no request made revision {number}: {changes}"
                waiting.remove(op)
            assert changes == op.changes, f"revision {number} is not what was acknowledged"
            self.revisions[number] = changes
            self._apply(number, changes)
        assert not by_revision, f"acknowledged revisions are lost: {sorted(by_revision)}"
        self.revision = revision

    def _apply(self, revision: int, changes: Changes) -> None:
        for key, value in changes.items():
            if value is None:
                del self.keys[key]
                continue
            old = self.keys.get(key)
            create, version = (old.create, old.version + 1) if old else (revision, 1)
            self.keys[key] = Key(value, create, revision, version)

    def _verify_keys(self, client: Client, rng: random.Random, revision: int) -> None:
        found = {
            kv.key: Key(kv.value, kv.create_revision, kv.mod_revision, kv.version)
            for kv in client.range(prefix="")
        }
        assert found == self.keys
        past = rng.randint(max(self.compacted, 1), revision)
        then = {kv.key: kv.value for kv in client.range(prefix="", revision=past)}
        expected = {key: kept.value for key, kept in self.keys.items()}
        for number in range(revision, past, -1):
            for key in self.revisions[number]:
                expected.pop(key, None)
        for key, kept in then.items():
            expected.setdefault(key, kept)
        assert then == expected, f"the keys as of revision {past} differ"

    def _verify_leases(
        self, client: Client, acked: list[Operation], open_: list[Operation]
    ) -> None:
        for op in acked:
            self.leases.add(op.grants)
            self.leases.discard(op.revokes)
        self.leases.discard(0)
        found = set(client.leases())
        maybe = {lease for op in open_ for lease in (op.grants, op.revokes)}
        assert self.leases - maybe <= found <= self.leases | maybe
        self.leases = found


def _watched(client: Client, since: int, revision: int) -> dict[int, Changes]:
    """The events from `since` to `revision`, by revision, each of which must come in one piece."""
    seen: dict[int, Changes] = {}
    if since > revision:
        return seen
    last = 0
    with client.watch(prefix="", start_revision=since) as watch:
        for batch in watch.batches():
            for event in batch.events:
                assert event.revision >= last, "events came out of order"
                last = event.revision
                changes = seen.setdefault(last, {})
                assert event.key not in changes, "a key changed twice in one revision"
                changes[event.key] = None if event.is_delete else event.value
            if last >= revision:
                return seen
    raise AssertionError("the watch ended")


class Load:
    """Writers, and a keeper that compacts and defragments, until the server dies."""

    def __init__(self, running: ServerProcess, history: History, seed: str, kind: str) -> None:
        self.acked: list[Operation] = []
        self.open: list[Operation] = []
        self.counts: Counter[str] = Counter()
        self.failures: list[BaseException] = []
        self._running = running
        self._history = history
        self._seed = seed
        self._kind = kind
        self._stop = threading.Event()
        runs = [lambda number=n: self._write(number) for n in range(WRITERS)] + [self._keep]
        self._threads = [threading.Thread(target=self._run, args=(run,)) for run in runs]
        for thread in self._threads:
            thread.start()

    def wait_for(self, count: int) -> None:
        """Return when `count` operations of the kind in question are acknowledged."""
        wait_until(
            lambda: self.counts[self._kind] >= count or self.failures,
            f"{count} times {self._kind}; {self._running.tail()}",
        )

    def stop(self) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a client hangs"
        if self.failures:
            raise self.failures[0]

    def _run(self, run) -> None:
        try:
            run()
        except BaseException as failure:
            self.failures.append(failure)

    def _do(self, op: Operation, call) -> bool:
        """Carry it out; False when the server is gone or the load is to stop."""
        try:
            result = call()
        except (UnknownOutcome, ConnectionFailed):
            self.open.append(op)
            return False
        op.revision = result if isinstance(result, int) else getattr(result, "revision", 0)
        self.acked.append(op)
        self.counts[op.kind] += 1
        return not self._stop.is_set()

    def _write(self, number: int) -> None:
        rng = random.Random(f"{self._seed}/{number}")
        prefix = b"w%d/" % number
        names = [prefix + b"%02d" % n for n in range(KEYS_PER_WRITER)]
        here = {key for key in self._history.keys if key.startswith(prefix)}
        leased: dict[int, set[bytes]] = {}
        serial = 0
        mine = self._kind if self._kind not in KEPT_BY_KEEPER else "put"
        with Client(self._running.endpoint, timeout_s=PATIENCE_S) as client:
            while True:
                serial += 1
                value = b"%s %d %d " % (self._seed.encode(), number, serial)
                value += b"." * rng.randrange(VALUE_BYTES)
                kind = mine if rng.random() < 0.6 else rng.choice(KINDS[:4])
                if kind == "put":
                    key = rng.choice(names)
                    op = Operation("put", {key: value})
                    ok = self._do(op, lambda: client.put(key, value))  # noqa: B023
                    here.add(key)
                elif kind == "delete range":
                    start, end = sorted(rng.sample([*names, prefix + b"99"], 2))
                    gone = {key for key in here if start <= key < end}
                    op = Operation(kind, dict.fromkeys(gone))
                    ok = self._do(op, lambda: client.delete(start, range_end=end))  # noqa: B023
                    here -= gone
                elif kind == "txn":
                    keys = rng.sample(names, 5)
                    changes: Changes = {key: value + key for key in keys[:4]}
                    steps = [Put(key, new) for key, new in changes.items()] + [Delete(keys[4])]
                    if keys[4] in here:
                        changes[keys[4]] = None
                    op = Operation(kind, changes)
                    ok = self._do(op, lambda: client.txn(success=steps))  # noqa: B023
                    here = (here | set(keys)) - {keys[4]}
                elif leased and rng.random() < 0.6:
                    lease, keys_of_it = leased.popitem()
                    op = Operation(kind, dict.fromkeys(keys_of_it), revokes=lease)
                    ok = self._do(op, lambda: client.lease_revoke(lease))  # noqa: B023
                else:
                    lease = rng.getrandbits(62) + 1
                    op = Operation("grant", {}, grants=lease)
                    ok = self._do(op, lambda: client.lease_grant(LEASE_S, id=lease))  # noqa: B023
                    if not ok:
                        return
                    bound = {prefix + b"lease/%d/%d" % (lease, n) for n in range(3)}
                    steps = [Put(key, value, lease=lease) for key in bound]
                    op = Operation("put", dict.fromkeys(bound, value))
                    ok = self._do(op, lambda: client.txn(success=steps))  # noqa: B023
                    leased[lease] = bound
                if not ok:
                    return

    def _keep(self) -> None:
        """Compact, up to what was verified before, and defragment."""
        rng = random.Random(f"{self._seed}/keeper")
        history = self._history
        compacted = history.compacted
        with Client(self._running.endpoint, timeout_s=PATIENCE_S) as client:
            while not self._stop.is_set():
                room = history.revision - compacted
                if room and (self._kind == "compaction" or rng.random() < 0.3):
                    # Small steps, so that there is something left for the next one.
                    compacted += rng.randint(1, max(1, room // 20))
                    physical = rng.random() < 0.5
                    op = Operation("compaction", {}, compacts=compacted)
                    if not self._do(op, lambda: client.compact(compacted, physical=physical)):  # noqa: B023
                        return
                op = Operation("defragment", {})
                if not self._do(op, lambda: client.defragment(timeout_s=PATIENCE_S)):
                    return


def kill_many_times(running: ServerProcess, times: int, seed: int) -> None:
    history = History()
    for turn in range(times):
        kind = KINDS[turn % len(KINDS)]
        rng = random.Random(f"{seed}/{turn}")
        if rng.random() < 0.2:
            # Also while it recovers, or has barely done so.
            running.spawn()
            threading.Event().wait(rng.uniform(0.0, 0.5))
            running.kill()
        running.start()
        load = Load(running, history, f"{seed}.{turn}", kind)
        # In the first turn there is nothing yet that may be compacted.
        load.wait_for(rng.randint(1, 8) if kind in KEPT_BY_KEEPER else rng.randint(5, 60))
        threading.Event().wait(rng.uniform(0.0, 0.02))
        running.kill()
        load.join()
        running.start()
        try:
            with Client(running.endpoint, timeout_s=PATIENCE_S) as client:
                history.verify(client, rng, load.acked, load.open)
        except (AssertionError, EtcdliteError) as failure:
            folder = f"{running.data_dir}.failed"
            shutil.copytree(running.data_dir, folder, dirs_exist_ok=True)
            raise AssertionError(
                f"after kill {turn} (seed {seed}, under {kind}); its data is in {folder}"
            ) from failure
        running.stop()


def test_twenty_kills_lose_nothing_that_was_acknowledged(server):
    kill_many_times(server(*SMALL_FILES, start=False), 20, seed=1)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(2, 12))
def test_two_hundred_kills_lose_nothing_that_was_acknowledged(server, seed):
    kill_many_times(server(*SMALL_FILES, start=False), 20, seed)


# Kills at each kind of disk operation.

DYING_SERVER = """
import os, signal, sys
from etcdlite.storage import disk
from etcdlite.__main__ import main

operation, path_part, left = sys.argv[1], sys.argv[2], int(sys.argv[3])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def is_due(path):
    global left
    if path_part in path:
        left -= 1
    return left == 0 and path_part in path

def dying(cls, name):
    method = getattr(cls, name)
    def instead(self, *args, **kwargs):
        path = getattr(self, "path", None) or getattr(self, "_path", None) or str(args[0])
        # Of the files that are opened only new ones count.
        if (name == "open" and not kwargs) or not is_due(path):
            return method(self, *args, **kwargs)
        if name == "pwrite":
            # Linux gives up between two pages, so also between two sectors.
            data, offset = args
            middle = (offset + len(data) // 2) // 512 * 512
            method(self, data[:max(0, middle - offset)], offset)
        elif operation.endswith("-after"):
            method(self, *args, **kwargs)
        die()
    setattr(cls, name, instead)

cls, name = operation.removesuffix("-after").split(".")
dying(getattr(disk, cls), name)
sys.exit(main(sys.argv[4:]))
"""
"""etcdlite that kills itself at the n-th operation on a path with a given part in it: instead of
it, in its middle if it is a write, or right after it."""

MOMENTS = [
    ("File.pwrite", ".wal", 40),
    ("File.sync", ".wal", 60),
    ("File.sync-after", ".wal", 80),
    ("File.pwrite", ".seg", 50),
    ("File.sync", ".seg", 5),
    ("File.sync-after", ".seg", 9),
    ("File.allocate", ".wal", 3),
    ("Disk.open_new", ".seg", 2),
    ("Disk.open_new-after", ".seg", 3),
    ("Disk.rename", ".wal", 2),
    ("Disk.rename-after", ".wal", 4),
    ("Disk.unlink", ".wal", 2),
    ("Disk.unlink-after", ".wal", 3),
    ("Disk.unlink", ".seg", 1),
    ("Disk.unlink-after", ".seg", 3),
    ("Staged.write", "checkpoint", 15),
    ("Staged.publish", "checkpoint", 2),
    ("Staged.publish-after", "checkpoint", 3),
    ("Disk.rename", "checkpoint", 3),
    ("Disk.rename-after", "checkpoint", 4),
    ("Disk.sync_dir", "data", 4),
    ("Disk.sync_dir", "wal", 3),
]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A data directory with history, and that history."""
    folder = tmp_path_factory.mktemp("filled") / "data"
    running = ServerProcess(folder, SMALL_FILES, (sys.executable, "-m", "etcdlite"))
    try:
        running.start()
        history = History()
        load = Load(running, history, "filling", "put")
        load.wait_for(400)
        load.stop()
        with Client(running.endpoint, timeout_s=PATIENCE_S) as client:
            history.verify(client, random.Random(0), load.acked, load.open)
        running.stop()
    finally:
        running.close()
    return folder, history


def kill_at(server, filled, data_dir, operation, path_part, count):
    folder, past = filled
    shutil.copytree(folder, data_dir)
    history = copy.deepcopy(past)
    program = (sys.executable, "-c", DYING_SERVER, operation, path_part, str(count))
    dying = server(*SMALL_FILES, data_dir=data_dir, program=program, start=False)
    dying.spawn()
    wait_until(lambda: dying.endpoint or not dying.is_running, "the server serves or dies")
    load = None
    if dying.endpoint:
        load = Load(dying, history, "dying", "compaction")
        load.join()
    assert dying.wait() == -signal.SIGKILL, dying.tail()
    after = server(*SMALL_FILES, data_dir=data_dir)
    acked, open_ = (load.acked, load.open) if load else ([], [])
    history.verify(after.client(), random.Random(1), acked, open_)


@pytest.mark.parametrize("operation, path_part, count", MOMENTS)
def test_a_kill_at_any_disk_operation_loses_nothing(
    server, filled, tmp_path, operation, path_part, count
):
    kill_at(server, filled, tmp_path / "data", operation, path_part, count)


@pytest.mark.long
@pytest.mark.parametrize("operation, path_part", [moment[:2] for moment in MOMENTS])
def test_a_kill_at_the_first_of_each_disk_operation_loses_nothing(
    server, filled, tmp_path, operation, path_part
):
    for count in range(1, 11):
        kill_at(server, filled, tmp_path / str(count), operation, path_part, count)
