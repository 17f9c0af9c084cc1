"""A `Store` with what it needs to be tested alone: a disk, a log of all applied entries, and a
plain model that applies the same requests.

The log takes the place of the write-ahead log. It is always durable, and holds the entries that the
last finished checkpoint does not cover. So whatever a crash takes from the data file, opening the
store and applying the rest of the log again must lead to exactly the state of the model.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from types import SimpleNamespace
from typing import Any

from etcdlite import etcd_hash, methods, proto, txn
from etcdlite.errors import EtcdError
from etcdlite.lease import Lessor
from etcdlite.limits import Limits
from etcdlite.metrics import Metrics
from etcdlite.mvcc import Event, Store
from etcdlite.plain_txn import PlainTxn, decode_txn
from etcdlite.ranges import range_steps
from etcdlite.replica.state import APPLIERS
from etcdlite.replica.timeline import Timeline
from etcdlite.sealing import Keyring
from etcdlite.storage.cleaning import clean
from etcdlite.storage.disk import Disk
from etcdlite.storage.history import Changes, History
from etcdlite.storage.layout import (
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER,
    TOMBSTONE,
    key_and_revision,
)
from etcdlite.storage.past import DEAD, PAST
from etcdlite.storage.sealed import SealedDisk
from etcdlite.storage.steps import finish
from rigs.faulty_disk import FaultyDisk
from rigs.plain_model import PlainStore

DIRECTORY = "data"
EVERYTHING = proto.RangeRequest(key=b"\x00", range_end=b"\x00")

_NUMBERS = {
    method.request.NAME: number
    for number, method in methods.METHODS.items()
    if method.full in ("KV.Put", *("KV.DeleteRange", "KV.Txn", "KV.Compact"))
    or method.full in ("Lease.LeaseGrant", "Lease.LeaseRevoke")
}


SMALL_LIMITS = Limits(
    pack_keys=3,
    pack_bytes=60,
    pack_revisions=5,
    scan_step_keys=3,
    count_step_keys=4,
    kept_key_changes=4,
    compact_step_keys=2,
    compact_step_versions=3,
    clean_step_records=3,
    range_step_keys=3,
    history_chunk_bytes=64,
    event_step_events=3,
    event_chunk_bytes=64,
    delete_step_keys=2,
    hash_step_versions=3,
    hash_part_versions=2,
    read_step_keys=2,
    compare_step_keys=2,
    execute_step_ops=2,
    sort_step_items=3,
    merge_step_items=2,
    join_step_pieces=4,
    recent_bytes=512,
)
"""Long work yields every few keys, and caches are small: a few keys meet every limit."""


def outcome(act: Callable[[], Any]) -> Any:
    """The encoded answer, or the text of the EtcdError."""
    try:
        answer = act()
    except EtcdError as failure:
        return failure.text
    return answer if isinstance(answer, bytes) else answer.encode()


class StoreRig:
    def __init__(
        self,
        disk: FaultyDisk | None = None,
        segment_bytes: int = 600,
        limits: Limits = SMALL_LIMITS,
        keys: Keyring | None = None,
    ) -> None:
        self.keys = keys
        self.disk = FaultyDisk() if disk is None else disk
        self.segment_bytes = segment_bytes
        self.limits = limits
        self.model = PlainStore()
        self.metrics = Metrics()
        self.small_txns = 0
        self.log: list[tuple[int, list[Any]]] = []
        self.released = 0
        self.index = 0
        self.lessor = Lessor(1, self.limits)
        self.store = Store.create(self._sealed(), DIRECTORY, self.lessor, segment_bytes, limits)
        self.entry: Generator[None, None, list[Any]] | None = None
        """The entry that is being applied in steps."""
        self._untold: list[Any] = []
        """Its requests that the model does not know yet."""
        self.job: Iterator[Callable[[], None] | None] | None = None
        self.task: Callable[[], None] | None = None
        """The disk work that the job waits for."""
        self._job_index = 0

    def _sealed(self) -> Disk:
        return self.disk if self.keys is None else SealedDisk(self.disk, self.keys)

    # Writing.

    def apply(self, *requests: Any) -> list[Any]:
        """Apply requests as one entry, to the store and to the model, and compare the answers."""
        self.finish_entry()
        self.begin_entry(*requests)
        return self.finish_entry()

    def begin_entry(self, *requests: Any) -> None:
        """As `apply`, but in steps. Between them the model is at the store's revision."""
        assert self.entry is None
        self.index += 1
        self.log.append((self.index, list(requests)))
        self._untold = list(requests)
        self.entry = self._entry_steps(self.index, requests, self.model)

    def go_on_applying(self) -> None:
        """One step of the entry that is being applied, if there is one."""
        if self.entry is not None and next(self.entry, self) is self:
            self.entry = None

    def finish_entry(self) -> list[Any]:
        """The answers to the entry that is being applied."""
        entry, self.entry = self.entry, None
        return [] if entry is None else finish(entry)

    def _entry_steps(
        self, index: int, requests: Any, model: PlainStore | None
    ) -> Generator[None, None, list[Any]]:
        state: Any = SimpleNamespace(
            store=self.store,
            lessor=self.lessor,
            clock=lambda: 0.0,
            metrics=self.metrics,
            cluster_version=SimpleNamespace(allows=lambda feature: True),
            timeline=Timeline(self.store, SimpleNamespace()),  # type: ignore[arg-type]
        )
        answers: list[Any] = []
        for request in requests:
            if type(request) is proto.PutRequest:
                answers.append(outcome(lambda request=request: txn.put(self.store, request)))
            elif type(request) is not proto.TxnRequest or not self._is_small(request, answers):
                try:
                    if type(request) is proto.TxnRequest:
                        done = txn.txn_steps(self.store, request)
                    else:
                        done = APPLIERS[_NUMBERS[type(request).NAME]](state, request)
                        done = done or b""
                    answers.append(done if isinstance(done, bytes) else (yield from done) or b"")
                except EtcdError as failure:
                    answers.append(failure.text)
            if isinstance(answers[-1], str):
                assert not self.store.is_writing, "a request failed after its first change"
            self.store.end_revision()
            if model is not None:
                self._untold.remove(request)
                answer, right = answers[-1], outcome(lambda request=request: model.apply(request))
                assert answer == right, f"{request}\n is answered {answer!r}\n instead of {right!r}"
                assert self.store.revision == model.revision
            self.store.data.flush_part()
            yield
        self.store.mark(index, 1)
        self.store.events.clear()
        return answers

    def _is_small(self, request: Any, answers: list[Any]) -> bool:
        """Whether it is applied as a small transaction, decoded from its bytes. Every second one
        takes the general way, so that both ways are compared with the model."""
        self.small_txns += 1
        if self.small_txns % 2:
            return False
        decoded = decode_txn(request.encode())
        if not isinstance(decoded, PlainTxn):
            return False
        try:
            answer = txn.small_txn(self.store, decoded)
        except EtcdError as failure:
            answers.append(failure.text)
            return True
        if answer is not None:
            answers.append(answer)
        return answer is not None

    def put(self, key: bytes, value: bytes = b"", **fields: Any) -> None:
        self.apply(proto.PutRequest(key=key, value=value, **fields))

    def delete(self, key: bytes, range_end: bytes = b"") -> None:
        self.apply(proto.DeleteRangeRequest(key=key, range_end=range_end))

    def compact(self, revision: int) -> None:
        """Apply the request; `finish_compaction` does the work."""
        self.apply(proto.CompactionRequest(revision=revision))

    def finish_compaction(self) -> None:
        while self.store.compaction is not None and not self.store.compaction_is_held:
            self.store.compact_step()

    def read(self, steps: Any) -> Any:
        """The outcome of a read, run to its end."""
        return outcome(lambda: finish(steps))

    # Background jobs.

    def begin_checkpoint(self) -> None:
        assert self.job is None
        self.job = self._checkpoint()

    def _checkpoint(self) -> Iterator[Callable[[], None] | None]:
        index = self.store.applied_index
        yield from self.store.checkpoint()
        self.released = index
        self.log = [entry for entry in self.log if entry[0] > index]

    def begin_cleaning(self, number: int) -> None:
        assert self.job is None
        self.job = clean(self.store, number)

    def advance(self) -> bool:
        """One step of the job, or the disk work that the last step asked for; False at the end."""
        assert self.job is not None
        if self.task is not None:
            self.task()
            self.task = None
            return True
        try:
            self.task = next(self.job)
        except StopIteration:
            self.job = None
            return False
        return True

    def finish_job(self) -> None:
        while self.job is not None:
            self.advance()

    def checkpoint(self) -> None:
        self.begin_checkpoint()
        self.finish_job()

    def cleanable(self) -> list[int]:
        return [n for n in sorted(self.store.data.sizes) if n < self.store.checkpoint_begin[0]]

    def clean_all(self) -> None:
        for number in self.cleanable():
            self.begin_cleaning(number)
            self.finish_job()

    # Ends and new beginnings.

    def restart(self) -> None:
        """Kill the process and start it again; nothing is lost."""
        self.reopen(self.disk)

    def lose_power(self, rng: random.Random | None = None) -> None:
        """What was not synced is lost; with `rng`, some of it, sector by sector."""
        if rng is None:
            self.reopen(self.disk.power_loss())
            return
        share = rng.choice((0.1, 0.5, 0.9, 1.0))
        names = rng.randint(0, self.disk.unsynced_names)
        self.reopen(self.disk.power_loss(lambda path, sector: rng.random() < share, names))

    def reopen(self, disk: FaultyDisk) -> None:
        if self.entry is not None:
            # The log has it, so the next start applies it.
            self.entry = None
            for request in self._untold:
                outcome(lambda request=request: self.model.apply(request))
        self.job = self.task = None
        self.disk = disk
        self.lessor = Lessor(1, self.limits)
        disk_of_store = self._sealed()
        self.store = Store.open(
            disk_of_store, DIRECTORY, self.lessor, self.segment_bytes, self.limits
        )
        assert self.released <= self.store.applied_index <= self.index
        for entry_index, requests in self.log:
            if entry_index > self.store.applied_index:
                finish(self._entry_steps(entry_index, requests, None))

    # Comparing.

    def check(self, rng: random.Random | None = None) -> None:
        """The store holds what the model holds, at all revisions; with `rng`, at some of them."""
        check_store(self.store, self.model, rng)


def check_store(store: Store, model: PlainStore, rng: random.Random | None = None) -> None:
    """The store holds what the model holds, at all revisions; with `rng`, at some of them."""
    assert (store.revision, store.compact_revision) == (model.revision, model.compacted)
    first = max(1, model.compacted)
    revisions = list(range(first, model.revision + 1))
    if rng is not None and len(revisions) > 4:
        revisions = [first, *rng.sample(revisions, 2), model.revision]
    for revision in (0, *revisions):
        request = proto.RangeRequest(key=b"\x00", range_end=b"\x00", revision=revision)
        assert finish(range_steps(store, request)) == model.range(request).encode(), revision
    since = first if rng is None else rng.choice(revisions)
    assert events_since(store, since) == model.events_since(since)
    upto = model.revision if rng is None else rng.choice(revisions)
    assert finish(store.hash_steps(upto)) == model.hash(upto)
    if rng is None or rng.random() < 0.2:
        assert finish(read_history(store)) == model.history()
        assert finish(etcd_hash.hash_steps(store, upto)) == model.etcd_hash(upto)
    assert {i: store.lessor.ttl_s(i) for i in finish(store.lessor.lease_steps())} == model.leases
    for lease_id in model.leases:
        keys = sorted(key for key, kv in model.states[-1].items() if kv.lease == lease_id)
        assert store.lessor.keys(lease_id) == keys
    check_index(store)


def read_events(
    store: Store, start_revision: int, limit_bytes: int, with_previous: bool = False
) -> list[Event]:
    """All of `event_steps` at once."""
    steps = store.event_steps(start_revision, limit_bytes, with_previous)
    return finish(steps)  # type: ignore[no-any-return]


Change = tuple[int, int, bytes, bool, bytes]
"""(revision, sub-revision, key, is a delete, encoded KeyValue)"""


def changes_of(changes: Changes) -> Iterator[Change]:
    for revision, sub, kind, body in zip(*changes, strict=True):
        yield revision, sub, key_and_revision(body)[0], kind == TOMBSTONE, body


def read_history(store: Store) -> Generator[None, None, tuple[Change, ...]]:
    """All of a reading of history, in steps."""
    history = History(store)
    try:
        yield from history.scan_steps()
        changes: list[Change] = []
        for some in history.changes():
            changes += changes_of(some)
            yield
        assert len(changes) <= history.count
        assert sum(len(body) for *_, body in changes) <= history.size_bytes
        return tuple(changes)
    finally:
        history.close()


def events_since(store: Store, revision: int) -> list[Event]:
    """All events, read piece by piece. (Revision 1 is that of the empty store.)"""
    events: list[Event] = []
    revision = max(revision, 2)
    while revision <= store.revision:
        part = read_events(store, revision, 200)
        assert part, f"no events from revision {revision} on"
        events += part
        revision = part[-1][0] + 1
    return events


def check_index(store: Store) -> None:
    """The invariants of the index hold, and everything without an entry in it counts as garbage."""
    index, data = store.index, store.data
    assert list(index.heads) == sorted(index.heads)
    assert list(index.past) == sorted(index.past)
    live: Counter[int] = Counter()
    for head in index.heads.values():
        _, _, _, location, _, length = head
        live[location >> 32] += length + RECORD_HEADER_BYTES
    for entries in index.past.values():
        for _, location, length in PAST.iter_unpack(entries):
            live[location >> 32] += (length & ~DEAD) + RECORD_HEADER_BYTES
    for number in data.files:
        size = data.sizes.get(number, data.offset)
        needed = live[number] + SEGMENT_HEADER.size
        assert needed == size - data.garbage[number], f"segment {number}"
