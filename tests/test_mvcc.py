"""The store against a plain model of it: every operation, every interleaving, every crash."""

from __future__ import annotations

import random
import tracemalloc
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    rule,
    run_state_machine_as_test,
)
from rigs.keys import keyring
from rigs.plain_model import EMPTY_HASH, LEASES, Requests
from rigs.store_rig import (
    DIRECTORY,
    EVERYTHING,
    StoreRig,
    outcome,
    read_events,
    read_history,
)

from etcdlite import etcd_hash, memory, proto, txn
from etcdlite.errors import EtcdError, error
from etcdlite.lease import Lessor
from etcdlite.limits import DEFAULT_LIMITS
from etcdlite.mvcc import Store
from etcdlite.ranges import range_steps
from etcdlite.sealing import Keyring
from etcdlite.storage.layout import DataDamaged
from etcdlite.storage.past import PAST_BYTES
from etcdlite.storage.sealed import PAGE_BYTES
from etcdlite.storage.steps import finish

SEEDS = st.integers(0, 1 << 32)


class StoreMachine(RuleBasedStateMachine):
    """Random operations on a `StoreRig`. What is random within a rule comes from its seed."""

    steps_done = 0

    def __init__(self) -> None:
        super().__init__()
        self.rig = StoreRig()
        self.reads: list[tuple[Any, Any, Any]] = []  # (request, steps, right answer)
        self.step = 0

    @rule(seed=SEEDS, count=st.integers(10, 60))
    def live(self, seed: int, count: int) -> None:
        """Writes and reads, with long work going on beside them."""
        rng = random.Random(f"{seed} {self.step}")
        acts, shares = zip(*self.DAY, strict=True)
        for act in rng.choices(acts, shares, k=count):
            if act not in self.BESIDE:
                self.rig.finish_entry()
            act(self, Requests(rng, self.rig.model.revision, self.rig.model.compacted))
            self.step += 1
            StoreMachine.steps_done += 1

    @rule(seed=SEEDS, kind=st.sampled_from(("killed", "all lost", "some lost")))
    def end_and_begin_again(self, seed: int, kind: str) -> None:
        for _, steps, _ in self.reads:
            steps.close()
        self.reads.clear()
        if kind == "killed":
            self.rig.restart()
        elif kind == "all lost":
            self.rig.lose_power()
        else:
            self.rig.lose_power(random.Random(f"{seed} {self.step}"))
        self.rig.check()

    @rule(cleaned=st.booleans())
    def defragment(self, cleaned: bool) -> None:
        self.rig.finish_entry()
        self.rig.finish_job()
        self.rig.store.data.roll()
        self.rig.checkpoint()
        if cleaned:
            self.rig.clean_all()
        self.rig.check(random.Random(self.step))

    def write(self, requests: Requests) -> None:
        drawn = [requests.write() for _ in range(requests.rng.choice((1, 1, 1, 3)))]
        self.rig.apply(*filter(is_valid, drawn))

    def begin_to_write(self, requests: Requests) -> None:
        """A large write, perhaps between others in its entry. Reads go on beside it."""
        rng = requests.rng
        everything = proto.DeleteRangeRequest(
            key=b"\x00", range_end=b"\x00", prev_kv=rng.random() < 0.2
        )
        large = (
            everything,
            proto.DeleteRangeRequest(key=requests.key(), range_end=b"\x00"),
            proto.LeaseRevokeRequest(ID=rng.choice(LEASES)),
            proto.TxnRequest(
                success=[
                    proto.RequestOp(request_put=proto.PutRequest(key=b"\x00")),
                    proto.RequestOp(request_delete_range=everything_but_first()),
                ]
            ),
        )
        around = [request for request in (requests.write(), requests.write()) if is_valid(request)]
        self.rig.begin_entry(*around[:1], rng.choice(large), *around[1:])

    def go_on_writing(self, requests: Requests) -> None:
        for _ in range(requests.rng.choice((1, 1, 2, 4))):
            self.rig.go_on_applying()

    def read(self, requests: Requests) -> None:
        request = requests.range()
        right = outcome(lambda: self.rig.model.range(request))
        answer = outcome(lambda: finish(range_steps(self.rig.store, request)))
        assert answer == right, f"{request}\n is answered {answer!r}\n instead of {right!r}"

    def begin_a_long_read(self, requests: Requests) -> None:
        if len(self.reads) == 4:
            return
        kinds = ("range", "txn", "hash", "etcd hash", "history", "events")
        kind = requests.rng.choice(kinds)
        store, model = self.rig.store, self.rig.model
        request: Any
        if kind in ("hash", "etcd hash", "history") and self.rig.entry is not None:
            return  # The member does not begin these beside an entry.
        if kind == "range":
            request = requests.range()
            steps = range_steps(store, request)
            right = outcome(lambda: model.range(request))
        elif kind == "txn":
            request = requests.read_only_txn()
            steps = txn.txn_steps(store, request)
            right = outcome(lambda: model.txn(request))
        elif kind == "hash":
            request = requests.rng.randint(max(1, model.compacted), model.revision)
            steps = store.hash_steps(request)
            right = model.hash(request)
        elif kind == "etcd hash":
            request = requests.rng.randint(max(1, model.compacted), model.revision)
            steps = etcd_hash.hash_steps(store, request)
            right = model.etcd_hash(request)
        elif kind == "history":
            request = kind
            steps = read_history(store)
            right = model.history()
        else:
            request = requests.rng.randint(max(1, model.compacted), model.revision)
            steps = store.event_steps(request, 200)
            right = [e for e in model.events_since(request) if e[0] <= store.marked_revision]
        self.reads.append((request, steps, right))
        self.go_on_reading(len(self.reads) - 1)

    def continue_a_read(self, requests: Requests) -> None:
        if self.reads:
            self.go_on_reading(requests.rng.randrange(len(self.reads)))

    def go_on_reading(self, at: int) -> None:
        request, steps, right = self.reads[at]
        try:
            next(steps)
        except StopIteration as done:
            answer = done.value
        except EtcdError as failure:
            answer = failure.text
        else:
            return
        del self.reads[at]
        if isinstance(answer, list):
            # What happened since it began may be told, too.
            assert answer[: len(right)] == right[: len(answer)], f"events from {request} on"
            assert answer or not right
            return
        if answer == error("Compacted").text:
            # A transaction may find that a revision it names was compacted after it began.
            assert answer == right or type(request) is proto.TxnRequest
        else:
            assert answer == right, f"{request}\n is answered {answer!r}\n instead of {right!r}"

    def give_up_a_read(self, requests: Requests) -> None:
        if self.reads:
            _, steps, _ = self.reads.pop(requests.rng.randrange(len(self.reads)))
            steps.close()

    def go_on_compacting(self, requests: Requests) -> None:
        if self.rig.store.compaction is not None and not self.rig.store.compaction_is_held:
            self.rig.store.compact_step()

    def begin_a_checkpoint(self, requests: Requests) -> None:
        if self.rig.job is None:
            self.rig.begin_checkpoint()

    def begin_cleaning(self, requests: Requests) -> None:
        if self.rig.job is None and self.rig.cleanable():
            self.rig.begin_cleaning(requests.rng.choice(self.rig.cleanable()))

    def go_on_with_the_job(self, requests: Requests) -> None:
        for _ in range(requests.rng.choice((1, 1, 2, 20))):
            if self.rig.job is not None:
                self.rig.advance()

    def check(self, requests: Requests) -> None:
        self.rig.check(requests.rng)

    DAY = (
        (write, 40),
        (begin_to_write, 4),
        (go_on_writing, 15),
        (read, 15),
        (begin_a_long_read, 5),
        (continue_a_read, 10),
        (give_up_a_read, 1),
        (go_on_compacting, 5),
        (begin_a_checkpoint, 3),
        (begin_cleaning, 4),
        (go_on_with_the_job, 15),
        (check, 2),
    )

    BESIDE = (read, begin_a_long_read, continue_a_read, give_up_a_read, go_on_writing)
    """What goes on beside an entry that is applied in steps."""

    def teardown(self) -> None:
        self.rig.finish_entry()
        self.rig.check()


def everything_but_first() -> Any:
    return proto.DeleteRangeRequest(key=b"\x00\x00", range_end=b"\x00")


def is_valid(request: Any) -> bool:
    """Whether the front door lets a request in."""
    if type(request) is not proto.TxnRequest:
        return True
    try:
        txn.check_txn(request, 128)
    except EtcdError:
        return False
    return True


def run_machine(examples: int, steps: int, machine: type[StoreMachine] = StoreMachine) -> int:
    StoreMachine.steps_done = 0
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            phases=(Phase.generate,),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return StoreMachine.steps_done


@pytest.mark.timeout(900)
def test_fifty_thousand_random_operations_agree_with_a_plain_model() -> None:
    assert run_machine(examples=300, steps=30) >= 50_000


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_millions_of_random_operations_agree_with_a_plain_model() -> None:
    assert run_machine(examples=6_000, steps=30) >= 1_500_000


class SealedMachine(StoreMachine):
    """The same with encrypted files, some of one page and some of several."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = StoreRig(segment_bytes=600, keys=keyring(1))

    @rule(pages=st.integers(0, 3))
    def change_the_size_of_segments(self, pages: int) -> None:
        self.rig.segment_bytes = self.rig.store.data.segment_bytes = 600 + pages * PAGE_BYTES


def test_thousands_of_random_operations_on_encrypted_files_agree_with_a_plain_model() -> None:
    assert run_machine(examples=25, steps=30, machine=SealedMachine) >= 3_000


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_millions_of_random_operations_on_encrypted_files_agree_with_a_plain_model() -> None:
    assert run_machine(examples=6_000, steps=30, machine=SealedMachine) >= 1_000_000


# Checkpoints and cleaning, while everything changes.


def grown_rig(keys: Keyring | None = None) -> StoreRig:
    """A store with current, superseded and deleted keys, leases, and several segments."""
    rig = StoreRig(keys=keys)
    # Encrypted segments are larger.
    filling = b"." * 2000 if keys else b""
    for lease_id in (1, 2):
        rig.apply(proto.LeaseGrantRequest(ID=lease_id, TTL=100))
    for round_ in range(4):
        for number in range(8):
            rig.put(b"key%d" % number, b"%d" % round_ + filling, lease=number % 3)
        rig.delete(b"key5", b"key7")
    rig.compact(rig.store.revision - 9)
    return rig


def change_everything(rig: StoreRig) -> None:
    """One change of every kind: of old keys, of new ones, of leases, of history."""
    revision = rig.store.revision
    rig.put(b"key0", b"new value")
    rig.put(b"key5", b"is back")
    rig.put(b"another%d" % revision, b"is new", lease=2)
    rig.put(b"key0", b"newer value", lease=1)
    rig.delete(b"key3", b"key5")
    rig.put(b"brief", b"")
    rig.delete(b"brief")
    rig.put(b"key3", ignore_lease=False)
    rig.apply(proto.LeaseRevokeRequest(ID=1))
    rig.apply(proto.LeaseGrantRequest(ID=1, TTL=200))
    rig.compact(revision + 2)
    if not rig.store.compaction_is_held:
        rig.store.compact_step()


@pytest.mark.parametrize("loses_power", [False, True])
@pytest.mark.parametrize("ends", ["within the job", "after the job"])
@pytest.mark.parametrize("job", ["checkpoint", "cleaning"])
@pytest.mark.parametrize("is_sealed", [False, True])
def test_changes_between_any_two_steps_of_a_job_are_not_lost(
    job: str, ends: str, loses_power: bool, is_sealed: bool
) -> None:
    at = 0
    is_over = False
    while not is_over:
        rig = grown_rig(keyring(1) if is_sealed else None)
        rig.checkpoint()
        if job == "checkpoint":
            rig.begin_checkpoint()
        else:
            rig.begin_cleaning(rig.cleanable()[at % len(rig.cleanable())])
        for _ in range(at):
            is_over = not rig.advance()
            if is_over:
                break
        change_everything(rig)
        if ends == "after the job":
            rig.finish_job()
        rig.check()
        if loses_power:
            rig.lose_power()
        else:
            rig.restart()
        rig.check()
        change_everything(rig)
        rig.finish_compaction()
        rig.checkpoint()
        rig.clean_all()
        rig.lose_power()
        rig.check()
        at += 1
    assert at > (4 if is_sealed else 6), "the job was too short to be disturbed"


def test_data_that_a_checkpoint_counts_on_must_be_there() -> None:
    rig = StoreRig(segment_bytes=1 << 16)
    rig.put(b"a", b"1")
    rig.begin_checkpoint()
    rig.advance()
    begin = rig.store.data.offset
    rig.put(b"a", b"2")
    rig.finish_job()
    disk = rig.disk.copy()
    del disk.content(f"{DIRECTORY}/{1:016x}.seg")[begin:]
    with pytest.raises(DataDamaged, match="checkpoint counts on"):
        rig.reopen(disk)


def test_a_tail_that_was_cut_does_not_come_back_behind_what_is_written_there_now() -> None:
    rig = StoreRig(segment_bytes=1 << 16)
    store = rig.store
    key = b"k" * 16  # A put of it without a value takes 32 bytes, as a mark does.

    def write(store: Store, entries: range, per_mark: int) -> None:
        for number in entries:
            txn.put(store, proto.PutRequest(key=key))
            store.end_revision()
            if number % per_mark == 0:
                store.mark(number, 1)

    # 15 slots of 32 bytes are left in the first sector: 10 entries, each 2 with a mark.
    write(store, range(1, 13), 2)
    assert store.data.offset == 32 + 18 * 32
    # The first sector is lost, the second is not.
    lost = rig.disk.power_loss(lambda path, sector: sector != 0, rig.disk.unsynced_names)
    store = Store.open(lost, DIRECTORY, Lessor(), 1 << 16)
    assert store.applied_index == 0
    # The same again, but with more marks: 15 slots end behind the 7th entry.
    write(store, range(1, 8), 1)
    store.mark(7, 1)
    assert store.data.offset == 512
    again = lost.power_loss(lambda path, sector: sector == 0)
    store = Store.open(again, DIRECTORY, Lessor(), 1 << 16)
    revisions = [event[0] for event in read_events(store, 2, 1 << 20)]
    assert revisions == list(range(2, store.applied_index + 2)), "some are missing in the middle"


def test_a_sector_of_zeros_within_the_tail_ends_it() -> None:
    rig = StoreRig(segment_bytes=1 << 16)
    key = b"k" * 16
    for _ in range(40):  # 64 bytes each, with their mark
        rig.put(key)
    lost = rig.disk.power_loss(lambda path, sector: sector != 2, rig.disk.unsynced_names)
    rig.reopen(lost)
    assert rig.store.cut is not None
    rig.check()


def test_a_segment_without_its_end_is_not_followed_by_the_next() -> None:
    rig = StoreRig()
    while rig.store.data.active < 3:
        rig.put(b"key%d" % rig.store.revision, b"v" * 50)
    first = f"{DIRECTORY}/{1:016x}.seg"
    lost = rig.disk.power_loss(lambda path, sector: path != first, rig.disk.unsynced_names)
    rig.reopen(lost)
    rig.check()


def test_what_a_killed_process_left_unsynced_is_synced_by_the_next_checkpoint() -> None:
    rig = StoreRig()
    while rig.store.data.active < 3:
        rig.put(b"key%d" % rig.store.revision, b"v" * 50)
    rig.restart()
    rig.checkpoint()
    rig.lose_power()
    rig.check()


def test_a_cleaned_segment_goes_only_when_its_records_are_durable_elsewhere() -> None:
    rig = grown_rig()
    rig.checkpoint()
    rig.begin_cleaning(rig.cleanable()[0])
    while rig.advance() and rig.task is None:
        pass
    # All is moved and nothing synced: killed, opened again, and then the power goes. The removal
    # of the segment may be durable all the same.
    rig.restart()
    rig.reopen(rig.disk.power_loss(names=rig.disk.unsynced_names))
    rig.check()


# Reads in steps.


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"limit": 5},
        {"limit": 100},
        {"count_only": True},
        {"keys_only": True},
        {"sort_order": 2},
        {"sort_order": 1, "sort_target": 3, "limit": 7},
        {"min_mod_revision": 20},
        {"revision": 30},
        {"revision": 30, "limit": 4},
        {"revision": 30, "count_only": True},
    ],
)
def test_a_long_read_gives_the_state_it_began_at(fields: dict[str, Any]) -> None:
    request = proto.RangeRequest(key=b"\0", range_end=b"\0", **fields)
    for disturbed_at in range(1, 12):
        rig = grown_rig()
        right = rig.model.range(request).encode()
        steps = range_steps(rig.store, request)
        answer = None
        step = 0
        while answer is None:
            try:
                next(steps)
            except StopIteration as done:
                answer = done.value
            step += 1
            if step == disturbed_at:
                change_everything(rig)
                rig.delete(b"\0", b"\0")
                rig.compact(rig.store.revision)
                rig.finish_compaction()
                rig.checkpoint()
                rig.clean_all()
        assert answer == right, f"changed behind step {disturbed_at}"
        rig.finish_compaction()
        assert rig.store.compaction is None, "the read that ended still holds the compaction"
        rig.check()


def put_many(rig: StoreRig) -> None:
    """A revision of 30 changes."""
    puts = [proto.PutRequest(key=b"many%02d" % n, value=b"v" * 20) for n in range(30)]
    rig.apply(proto.TxnRequest(success=[proto.RequestOp(request_put=put) for put in puts]))


def test_puts_that_end_a_revision_each_write_what_single_puts_write() -> None:
    rng = random.Random(5)
    together, apart = (StoreRig().store for _ in range(2))
    for index in range(1, 100):
        keys = rng.choices([b"key%02d" % n for n in range(20)], k=rng.choice((1, 2, 5, 9)))
        puts = [(key, b"v" * rng.randrange(40), 0) for key in keys]
        together.put_all(puts, own_revisions=True)
        for key, value, lease in puts:
            apart.put(key, value, lease)
            apart.end_revision()
        for store in (together, apart):
            if index % 3 == 0:
                store.put_all([(key, b"", 0) for key in sorted(set(keys))])
                store.end_revision()
            if index % 5 == 0:
                store.begin_removal()
                store.delete([keys[-1]])
                store.end_revision()
        assert not together.is_writing
        assert b"".join(together.data.out) == b"".join(apart.data.out)
        for store in (together, apart):
            store.mark(index, 1)
    for seen in (
        lambda store: store.events,
        lambda store: (store.revision, store.index.first_revision, store.index.revisions),
        lambda store: list(store.index.heads.items()),
        lambda store: list(store.index.past.items()),
        lambda store: (store.data.recent, store.data.recent_bytes, store.data.offset),
        lambda store: [store.count(b"", None, at) for at in range(1, store.revision + 1)],
    ):
        assert seen(together) == seen(apart)


def test_events_are_read_in_steps_within_a_revision_too() -> None:
    rig = grown_rig()
    first = rig.store.revision + 1
    put_many(rig)
    rig.put(b"after")
    steps = rig.store.event_steps(first, 1 << 20)
    assert sum(1 for _ in steps) == 31 // rig.store.limits.event_step_events
    rig.store.limits = rig.limits._replace(event_step_events=1000, step_bytes=100)
    steps = rig.store.event_steps(first, 1 << 20)
    assert sum(1 for _ in steps) > 7, "bytes make steps, too"
    assert read_events(rig.store, first, 1 << 20) == rig.model.events_since(first)
    part = read_events(rig.store, first, 1)
    assert [event[0] for event in part] == [first] * 30, "revisions are read whole"


@pytest.mark.parametrize("is_delete", [True, False])
def test_few_events_that_end_large_values_are_read_at_once(is_delete: bool) -> None:
    """A watch with previous values needs those, too."""
    rig = grown_rig()
    keys = [b"large%02d" % n for n in range(30)]
    for key in keys:
        rig.put(key, bytes(16_000))
    first = rig.store.revision + 1
    for key in keys:
        if is_delete:
            rig.delete(key)
        else:
            rig.put(key, b"small")
    events: list[Any] = []
    while len(events) < len(keys):
        part = read_events(rig.store, first + len(events), 5000, True)
        assert len(part) <= 5
        events += part
    assert events == rig.model.events_since(first)


def test_events_are_read_whole_whatever_happens_between_the_steps() -> None:
    for disturbed_at in range(1, 30):
        rig = grown_rig()
        put_many(rig)
        first = rig.store.compacted
        right = rig.model.events_since(first)
        steps = rig.store.event_steps(first, 1 << 20)
        events = None
        step = 0
        while events is None:
            try:
                next(steps)
            except StopIteration as done:
                events = done.value
            step += 1
            if step == disturbed_at:
                change_everything(rig)
                rig.delete(b"\0", b"\0")
                rig.compact(rig.store.revision)
                rig.finish_compaction()
                rig.store.data.roll()
                rig.checkpoint()
                rig.clean_all()
                if step == 3:
                    assert events is None and rig.store.compaction_is_held
        assert events[: len(right)] == right, f"changed behind step {disturbed_at}"
        assert not rig.store.pinned
        rig.finish_compaction()
        rig.check()
    assert step < disturbed_at, "the read was not disturbed at every step"


def test_a_revision_without_a_change_is_damage() -> None:
    rig = grown_rig()
    index = rig.store.index
    revision = rig.store.revision
    index.revisions[revision - index.first_revision] = index.revisions[-2]
    with pytest.raises(DataDamaged, match=f"no change of revision {revision}"):
        read_events(rig.store, revision, 1)


def test_the_hash_of_an_empty_store_is_that_of_etcd() -> None:
    store = StoreRig().store
    assert finish(store.hash_steps(store.revision)) == EMPTY_HASH


def test_a_read_that_is_given_up_holds_nothing() -> None:
    rig = grown_rig()
    for steps in (
        rig.store.event_steps(rig.store.compacted, 1 << 20),
        range_steps(rig.store, EVERYTHING),
        rig.store.hash_steps(rig.store.revision),
        txn.txn_steps(rig.store, proto.TxnRequest(compare=[], success=[])),
    ):
        next(steps, None)
        steps.close()
    rig.compact(rig.store.revision)
    assert not rig.store.pinned
    assert not rig.store.compaction_is_held


def test_a_compaction_waits_for_the_reads_of_what_it_takes_and_for_no_others() -> None:
    rig = grown_rig()
    old = range_steps(rig.store, EVERYTHING)
    next(old)
    rig.put(b"key1", b"changed")
    rig.compact(rig.store.revision - 1)
    assert not rig.store.compaction_is_held, "it keeps what the read needs"
    rig.finish_compaction()
    rig.compact(rig.store.revision)
    assert rig.store.compaction_is_held
    rig.finish_compaction()
    assert rig.store.compaction is not None
    finish(old)
    rig.finish_compaction()
    assert rig.store.compaction is None
    rig.check()


def test_a_compaction_under_way_goes_on_when_the_next_one_comes() -> None:
    rig = grown_rig()
    rig.put(b"last", b"old")
    for number in range(100):
        rig.put(b"last", b"new %d" % number)
    revision = rig.store.revision - 90
    for number in range(200):  # Their history stays, so each compaction visits them.
        rig.put(b"busy%02d" % (number % 100), b"")
    past = rig.store.index.past
    size = len(past[b"last"])
    for _ in range(80):
        revision += 1
        rig.compact(revision)
        rig.store.compact_step()
    assert len(past[b"last"]) < size
    rig.finish_compaction()
    rig.check()


def test_a_compaction_that_comes_before_the_last_step_of_another_is_carried_out() -> None:
    rig = StoreRig()
    for number in range(20):
        rig.put(b"key", b"%d" % number)
    rig.compact(rig.store.revision - 10)
    while len(rig.store.index.past[b"key"]) > 10 * PAST_BYTES:
        rig.store.compact_step()
    assert rig.store.compaction is not None
    rig.compact(rig.store.revision)
    rig.finish_compaction()
    assert not rig.store.index.past
    rig.check()


# Space.


def test_memory_goes_back_to_the_system_when_superseded_versions_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released: list[int] = []
    rig = StoreRig(limits=DEFAULT_LIMITS)
    monkeypatch.setattr(memory, "release", lambda: released.append(len(rig.store.index.past)))
    for value in (b"old", b"new"):
        for number in range(5000):
            rig.store.put(b"%d" % number, value, 0)
        rig.store.end_revision()
    rig.store.put(b"1", b"newest", 0)
    rig.store.end_revision()
    for revision, expected in ((2, []), (3, [1])):
        rig.store.compact(revision)
        rig.finish_compaction()
        assert released == expected and len(rig.store.index.heads) == 5000


def test_defragmentation_gives_back_what_compaction_gave_up() -> None:
    rig = grown_rig()
    rig.store.limits = rig.limits._replace(clean_step_records=128)
    for _ in range(50):
        for number in range(8):
            rig.put(b"key%d" % number, b"v" * 60)
    rig.compact(rig.store.revision)
    rig.finish_compaction()
    before = rig.store.size_bytes
    rig.store.data.roll()
    rig.checkpoint()
    rig.clean_all()
    assert rig.store.size_bytes < before / 4
    rig.check()
    rig.lose_power()
    rig.check()


@pytest.mark.parametrize("seed", range(4))
def test_versions_keep_their_numbers_when_cleaning_passes_over_many_others(seed: int) -> None:
    rng = random.Random(seed)
    rig = StoreRig(segment_bytes=16_000, limits=DEFAULT_LIMITS)
    store = rig.store
    keys = [b"%d" % number for number in range(300)]
    entries = count(1)
    for kept in rng.choice((0, 3)), 9, 0:  # Later rounds meet copies, and copies of copies.
        for _ in range(11):
            for _ in range(rng.choice((1, 3, 9))):
                for key in rng.sample(keys, rng.choice((1, 1, 2, 9, 99))):
                    store.put(key, b"v" * 20, 0)
                store.end_revision()
            store.mark(next(entries), 1)
            store.events.clear()
        store.compact(store.revision - kept)
        store.mark(next(entries), 1)
        rig.finish_compaction()
        before = finish(read_history(store))
        store.data.roll()
        rig.checkpoint()
        assert rig.cleanable()
        rig.clean_all()
        assert finish(read_history(store)) == before


def test_cleaning_keeps_no_more_than_a_step_of_large_dead_records_in_memory() -> None:
    rig = StoreRig(segment_bytes=6 << 20, limits=DEFAULT_LIMITS)
    store = rig.store
    for number in range(10, 34):
        store.put(b"key", b"%d" % number * (100 << 10), 0)
        store.end_revision()
    store.mark(1, 1)
    store.events.clear()
    store.compact(store.revision)
    store.mark(2, 1)
    rig.finish_compaction()
    store.data.roll()
    rig.checkpoint()
    (segment,) = rig.cleanable()
    tracemalloc.start()
    try:
        rig.begin_cleaning(segment)
        rig.finish_job()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 << 20
