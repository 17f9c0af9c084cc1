"""No step of long work does more than a bounded amount, however large what it works on is: counted
in keys, versions and bytes, since a test does not time anything."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from rigs.faulty_disk import FaultyDisk
from rigs.store_rig import DIRECTORY, check_index, read_events

from etcdlite import proto, txn
from etcdlite.lease import Lessor
from etcdlite.limits import DEFAULT_LIMITS as LIMITS
from etcdlite.mvcc import Store
from etcdlite.ranges import AnswerTooLarge, range_steps
from etcdlite.storage import index
from etcdlite.storage.cleaning import clean
from etcdlite.storage.data import DataFile
from etcdlite.storage.steps import discard, finish, join_steps, shrunk, sort_steps

RangeRequest = proto.RangeRequest
BIG = {"key": b"big", "range_end": b"bih"}
BIG_BYTES = 100_000


def new() -> Store:
    return Store.create(FaultyDisk(), DIRECTORY, Lessor(), 1 << 24)


def with_big_values() -> Store:
    """30 records of 100 kB."""
    store = new()
    for number in range(30):
        store.put(b"big%02d" % number, b"v" * BIG_BYTES, 0)
        store.end_revision()
    store.mark(1, 1)
    return store


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes of records were read, by `read`, `read_all` or `records`."""
    total = [0]
    read, read_all, records = DataFile.read, DataFile.read_all, DataFile.records

    def counted_read(self: DataFile, location: int, size_bytes: int) -> bytes:
        total[0] += size_bytes
        return read(self, location, size_bytes)

    def counted_read_all(self: DataFile, places: Any) -> Any:
        before = total[0]
        bodies = read_all(self, places)
        total[0] = before + sum(size_bytes for _, size_bytes in places)
        return bodies

    def counted_records(self: DataFile, *args: Any) -> Iterator[tuple[int, int, bytes]]:
        for item in records(self, *args):
            total[0] += len(item[2])
            yield item

    monkeypatch.setattr(DataFile, "read", counted_read)
    monkeypatch.setattr(DataFile, "read_all", counted_read_all)
    monkeypatch.setattr(DataFile, "records", counted_records)
    return total


def most_per_step(work: Iterator[Any], measure: Callable[[], int]) -> int:
    most, before = 0, measure()
    while True:
        task = next(work, 0)
        now = measure()
        most, before = max(most, now - before), now
        if task == 0:
            return most
        if task is not None:
            task()


PUTS = [
    proto.RequestOp(request_put=proto.PutRequest(key=b"big%02d" % n, prev_kv=True))
    for n in range(30)
]


@pytest.mark.parametrize(
    "work",
    [
        lambda store: range_steps(store, RangeRequest(**BIG)),
        lambda store: range_steps(store, RangeRequest(**BIG, sort_order=2, sort_target=3)),
        lambda store: range_steps(store, RangeRequest(**BIG, sort_order=1, sort_target=4)),
        lambda store: range_steps(store, RangeRequest(**BIG, revision=25)),
        lambda store: range_steps(store, RangeRequest(**BIG, min_mod_revision=1)),
        lambda store: store.hash_steps(store.revision),
        lambda store: store.event_steps(2, 1 << 30),
        lambda store: txn.delete_range_steps(store, proto.DeleteRangeRequest(**BIG, prev_kv=True)),
        lambda store: txn.txn_steps(
            store,
            proto.TxnRequest(
                compare=[proto.Compare(**BIG, target=proto.Compare.VALUE, result=3, value=b"other")]
            ),
        ),
    ],
    ids=[
        "range",
        "sorted by revision",
        "sorted by value",
        "in the past",
        "filtered",
        "hash",
        "events",
        "delete",
        "compare",
    ],
)
def test_a_step_reads_few_large_values(work: Any, read_bytes: list[int]) -> None:
    store = with_big_values()
    assert most_per_step(work(store), lambda: read_bytes[0]) <= LIMITS.step_bytes + BIG_BYTES + 100
    assert read_bytes[0] >= 24 * BIG_BYTES


@pytest.mark.parametrize("fields", [{}, {"limit": 3}, {"sort_order": 2}, {"sort_target": 3}])
def test_a_range_without_values_reads_no_record(
    fields: dict[str, int], read_bytes: list[int]
) -> None:
    store = with_big_values()
    finish(range_steps(store, RangeRequest(**BIG, **fields, keys_only=True)))
    assert read_bytes[0] == 0


def test_a_dict_that_was_large_gives_back_its_memory() -> None:
    table = dict.fromkeys(range(100_000), "")
    assert shrunk(table) is table
    for key in range(99_990):
        del table[key]
    before = sys.getsizeof(table)
    smaller = shrunk(table)
    assert smaller == table and sys.getsizeof(smaller) < before / 100
    assert shrunk(smaller) is smaller


def test_a_long_delete_gives_back_memory_while_others_go_through_the_index() -> None:
    store = new()
    keys = [b"%05d" % number for number in range(6000)]
    for key in (*keys, *keys[::2]):
        store.put(key, b"", 0)
        store.end_revision()
    before = sum(map(sys.getsizeof, store.index.heads.blocks))
    store.compact(store.revision - 1)
    chunks = store.index.pack_heads()
    loaded = index.Index()
    loaded.load_heads(next(chunks))
    assert store.compact_step() and len(loaded.heads) < len(keys)
    for _ in store.delete_steps(keys[5], keys[-5]):
        pass
    store.end_revision()
    assert sum(map(sys.getsizeof, store.index.heads.blocks)) < before / 100
    store.put(b"a new key", b"", 0)
    store.put(keys[-1], b"new", 0)
    for chunk in chunks:
        loaded.load_heads(chunk)
    assert loaded.heads.keys() >= store.index.heads.keys()
    store.end_revision()
    store.mark(1, 1)
    while store.compaction is not None:
        store.compact_step()
    assert store.index.at(keys[-1], store.compacted), "a read as of then needs it"
    check_index(store)
    store.compact(store.revision)
    while store.compaction is not None:
        store.compact_step()
    assert not store.index.past
    check_index(store)


def test_a_step_of_a_transaction_reads_few_large_values(read_bytes: list[int]) -> None:
    store = with_big_values()
    work = txn.txn_steps(store, proto.TxnRequest(success=PUTS))
    assert most_per_step(work, lambda: read_bytes[0]) <= LIMITS.step_bytes + BIG_BYTES + 100
    assert read_bytes[0] >= 30 * BIG_BYTES


def test_a_step_of_cleaning_moves_few_large_values(read_bytes: list[int]) -> None:
    store = with_big_values()
    store.data.roll()
    assert not any(task and task() for task in store.checkpoint())
    most = most_per_step(clean(store, 1), lambda: read_bytes[0])
    # It must look at the next record to know that a revision ends.
    assert most <= LIMITS.step_bytes + 2 * BIG_BYTES + 100
    assert store.data.files.keys() == {2}
    check_index(store)


# One key with a long history.

VERSIONS = 30_000


@pytest.fixture(scope="module")
def hot() -> Store:
    store = new()
    for _ in range(VERSIONS):
        store.put(b"hot", b"v", 0)
        store.end_revision()
    store.mark(1, 1)
    return store


def test_a_step_of_a_hash_reads_few_versions(hot: Store, read_bytes: list[int]) -> None:
    record_bytes = len(hot.get(b"hot") or b"")
    most = most_per_step(hot.hash_steps(hot.revision), lambda: read_bytes[0])
    assert most <= (LIMITS.hash_step_versions + LIMITS.hash_part_versions) * record_bytes


def test_a_checkpoint_writes_a_long_history_in_parts(hot: Store) -> None:
    assert max(map(len, hot.index.pack_past())) < 2 * LIMITS.pack_bytes + 100
    loaded = index.Index()
    for chunk in hot.index.pack_past():
        loaded.load_past(chunk)
    assert loaded.past == hot.index.past


def test_a_step_of_compaction_drops_few_versions_and_the_next_goes_on(hot: Store) -> None:
    hot.compact(hot.revision)
    dropped = []
    while hot.compaction is not None:
        dropped.append(hot.compact_step() or 0)
    assert max(dropped) <= LIMITS.compact_step_versions
    assert sum(dropped) == VERSIONS - 1
    assert not hot.index.past
    check_index(hot)


# One revision with many keys.

KEYS = 5000


def with_many_keys_at_once() -> Store:
    store = new()
    for number in range(KEYS):
        store.put(b"key%04d" % number, b"", 0)
    store.end_revision()
    store.mark(1, 1)
    return store


@pytest.mark.parametrize("compaction", ["none", "pending", "done"])
def test_a_step_of_cleaning_moves_few_records_of_a_large_revision(
    compaction: str, read_bytes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = with_many_keys_at_once()
    record_bytes = len(store.get(b"key0000") or b"")
    store.data.roll()
    assert not any(task and task() for task in store.checkpoint())
    if compaction != "none":
        store.put(b"other", b"", 0)
        store.end_revision()
        store.compact(3)
        store.mark(2, 1)
    while compaction == "done" and store.compaction is not None:
        store.compact_step()
    moves = [0]
    move = store.index.move

    def counted(*args: Any) -> Any:
        moves[0] += 1
        return move(*args)

    monkeypatch.setattr(store.index, "move", counted)

    before = store.size_bytes

    def work_done() -> int:
        if compaction == "done":
            return (store.size_bytes - before) // record_bytes
        # The whole revision is one write.
        return max(moves[0], read_bytes[0] // record_bytes)

    assert most_per_step(clean(store, 1), work_done) <= 2 * LIMITS.clean_step_records + 2
    assert moves[0] == (0 if compaction == "done" else KEYS) and 1 not in store.data.files
    check_index(store)
    if compaction == "none":
        assert [event[1] for event in read_events(store, 2, 1)] == sorted(store.index.heads)


def test_a_step_of_history_reads_few_records_of_a_large_revision(read_bytes: list[int]) -> None:
    store = with_many_keys_at_once()
    record_bytes = len(store.get(b"key0000") or b"")
    most = most_per_step(store.event_steps(2, 1), lambda: read_bytes[0])
    assert most <= (LIMITS.event_step_events + 1) * record_bytes


# Lists.


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("count", [0, 1, 4096, 4097, 20_000])
def test_sorting_in_steps_is_sorting(count: int, reverse: bool) -> None:
    rng = random.Random(count)
    items = [(rng.randrange(100), number) for number in range(count)]
    looks = [0]

    def key(item: tuple[int, int]) -> int:
        looks[0] += 1
        return item[0]

    sorting = sort_steps(items, key, reverse)
    right = sorted(items, key=lambda item: item[0], reverse=reverse)
    done: list[Any] = []

    def work() -> Iterator[None]:
        done.append((yield from sorting))

    most = most_per_step(work(), lambda: looks[0])
    assert done == [right], "equal items stay in order"
    assert most <= LIMITS.sort_step_items + LIMITS.merge_step_items + 10


@pytest.fixture
def no_collector() -> Iterator[None]:
    """A step in which the collector frees what other tests left would seem to free it."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("end", ["read", "sorted", "appended", "too large", "complete"])
@pytest.mark.parametrize("target", [RangeRequest.MOD, RangeRequest.VALUE])
def test_no_step_of_a_sorted_range_frees_much_however_it_ends(target: int, end: str) -> None:
    """Nor does giving it up. Millions of ranks took a third of a second."""
    store, count = new(), 12_000
    for number in range(count):
        store.put(b"k%05d" % number, b"%05d" % (count - number), 0)
        store.end_revision()
    limit_bytes = 150_000 if end == "too large" else 60 << 20
    request = RangeRequest(key=b"k", range_end=b"l", sort_target=target, sort_order=2)
    steps = range_steps(store, request, limit_bytes=limit_bytes)
    most = 0

    def step(do: Callable[[], Any]) -> bool:
        nonlocal most
        before = sys.getallocatedblocks()
        try:
            do()
        except (StopIteration, AnswerTooLarge):
            return False
        finally:
            most = max(most, before - sys.getallocatedblocks())
        return True

    given_up = {
        "read": count // 256 - 2,
        "sorted": count // 256 + 20,
        "appended": count // 256 + 60,
    }
    is_left, done = True, 0
    while is_left and done != given_up.get(end):
        is_left = step(lambda: next(steps))
        done += 1
    assert is_left == (end in given_up)
    step(steps.close)
    assert store.pinned == []
    assert sum(map(len, store.leftovers)) >= (1 if end == "complete" else count // 4)
    freeing = discard(store.leftovers)
    while step(lambda: next(freeing)):
        pass
    assert not any(store.leftovers)
    assert most < 2 * LIMITS.sort_step_items


def test_the_previous_values_of_a_large_delete_are_joined_as_they_are_read() -> None:
    """So its end does not free two pieces for each key."""
    store = new()
    for number in range(5000):
        store.put(b"k%05d" % number, b"v", 0)
    store.end_revision()
    request = proto.DeleteRangeRequest(key=b"k", range_end=b"l", prev_kv=True)
    steps, most, answer = txn.delete_range_steps(store, request), 0, None
    while answer is None:
        before = sys.getallocatedblocks()
        try:
            next(steps)
        except StopIteration as done:
            answer = done.value
        most = max(most, before - sys.getallocatedblocks())
    response = proto.DeleteRangeResponse.decode(answer)
    assert [kv.key for kv in response.prev_kvs] == [b"k%05d" % number for number in range(5000)]
    assert most < 2000


def test_joining_in_steps_is_joining() -> None:
    large = [b"a" * LIMITS.step_bytes] * 3
    for pieces in ([], [b"a"], large, [b"ab"] * 5000, [b"", b"x" * 9, b""]):
        assert finish(join_steps(pieces)) == b"".join(pieces)
    assert sum(1 for _ in join_steps(large)) == 2 + 3, "each is looked at and copied in a step"
    assert sum(1 for _ in join_steps([b"head", b"".join(large)])) == 1 + 1 + 3


def test_discarded_tables_are_emptied_in_steps() -> None:
    table = {number: b"" for number in range(10_500)}
    items = list(range(10_500))
    left = [len(table) + len(items)]
    for _ in discard([7, table, None, items]):
        left.append(len(table) + len(items))
    assert left[-1] == 0
    assert max(before - after for before, after in pairwise(left)) <= 1000


def test_many_leases_and_keys_of_a_lease_are_listed_in_order() -> None:
    lessor = Lessor()
    rng = random.Random(2)
    for lease_id in rng.sample(range(1, 30_000), 10_000):
        lessor.grant(lease_id, 10, 0.0)
    assert finish(lessor.lease_steps()) == sorted(finish(lessor.lease_steps()))
    keys = [b"%d" % rng.getrandbits(40) for _ in range(10_000)]
    lease_id = finish(lessor.lease_steps())[0]
    for name in keys:
        lessor.attach(name, lease_id)
    assert sum(1 for _ in lessor.key_steps(lease_id)) > 2
    assert finish(lessor.key_steps(lease_id)) == sorted(set(keys)) == lessor.keys(lease_id)
    finish(lessor.promote(0.0))
    listing = lessor.lease_steps()
    next(listing)
    gone = finish(lessor.lease_steps())[-1]
    lessor.revoke(gone)
    found = finish(listing)
    assert sorted([*found, gone]) == sorted([*finish(lessor.lease_steps()), gone])
