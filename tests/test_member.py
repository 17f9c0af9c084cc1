"""A member, driven by hand: what is answered when, what is limited, and what nobody sees half."""

from __future__ import annotations

import errno
import os
import random
from typing import Any

import pytest
from rigs.faulty_disk import FaultyDisk
from rigs.homes import home
from rigs.lone_member import turn
from rigs.member_rig import DATA_DIR, MEMBER_ID, MemberRig
from rigs.store_rig import read_events
from test_recovery import live

from etcdlite import backup, log, methods, proto, ranges, txn
from etcdlite.errors import error
from etcdlite.lease import Lessor
from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.member import Member
from etcdlite.mvcc import Store
from etcdlite.raft import Snapshot
from etcdlite.ranges import AnswerTooLarge
from etcdlite.replica import alarms, background
from etcdlite.replica import reads as reading
from etcdlite.replica import writes as writing
from etcdlite.request import Waiter
from etcdlite.server import may_rest
from etcdlite.storage.data import DataFile
from etcdlite.storage.layout import OFFSET_MASK, DataDamaged, segment_name
from etcdlite.storage.past import PAST
from etcdlite.wire import streams

PutRequest, RangeRequest = proto.PutRequest, proto.RangeRequest
EVERYTHING = RangeRequest(key=b"\0", range_end=b"\0")
COUNT = RangeRequest(key=b"\0", range_end=b"\0", count_only=True)


@pytest.fixture
def rig() -> MemberRig:
    return started()


def started(**options: Any) -> MemberRig:
    rig = MemberRig(**options)
    rig.settle()
    return rig


class BigSegments(MemberRig):
    segment_bytes = 1 << 24
    wal_segment_bytes = 1 << 20


def filled(keys: int, value: bytes = b"v", **options: Any) -> MemberRig:
    """A member with that many keys; the model is not told of them."""
    rig = BigSegments(**options)
    rig.settle()
    number = methods.PUT
    for key in range(keys):
        request = PutRequest(key=b"key%07d" % key, value=value)
        rig.member.writes.propose_message(Waiter(None, 0, number, request))
    rig.settle()
    assert rig.member.state.store.index.heads.count(b"key", b"kez") == keys
    return rig


class Sink:
    """Takes the responses of watches."""

    blocked = False

    def __init__(self) -> None:
        self.responses: list[Any] = []

    def send(self, body: bytes) -> None:
        self.responses.append(proto.WatchResponse.decode(body))


# Writes.


def test_a_write_is_answered_when_it_is_durable_and_not_before(rig: MemberRig) -> None:
    write = rig.send(PutRequest(key=b"a", value=b"1"))
    turn(rig.member)
    assert write not in rig.answers
    saves = rig.member.take_saves()
    turn(rig.member)
    assert write not in rig.answers and rig.member.state.store.get(b"a") is None
    rig.wal.save_all(saves)
    rig.member.persisted(saves)
    turn(rig.member)
    assert rig.answers[write].header.revision == 2


def test_a_write_can_be_saved_before_the_one_before_it_is_applied(rig: MemberRig) -> None:
    """The other members wait for what is saved, and hardly ever for what is applied."""
    first = rig.send(PutRequest(key=b"a", value=b"1"))
    turn(rig.member)
    saves = rig.member.take_saves()
    rig.wal.save_all(saves)
    rig.member.persisted(saves)
    rig.send(PutRequest(key=b"a", value=b"2"))
    rig.member.begin_turn(rig.now)
    assert rig.member.take_saves() and first not in rig.answers
    rig.member.proceed(rig.now)
    assert rig.answers[first].header.revision == 2


def test_writes_that_come_together_are_one_entry_and_a_revision_each(rig: MemberRig) -> None:
    last = rig.member.raft.log.last
    writes = [rig.send(PutRequest(key=b"a", value=b"%d" % n)) for n in range(5)]
    rig.settle()
    assert rig.member.raft.log.last == last + 1
    assert [rig.answers[write].header.revision for write in writes] == [2, 3, 4, 5, 6]


def test_a_large_batch_is_cut_into_entries(rig: MemberRig) -> None:
    last = rig.member.raft.log.last
    value = bytes(400_000)
    for number in range(6):
        rig.send(PutRequest(key=b"%d" % number, value=value))
    rig.settle()
    assert rig.member.raft.log.last == last + 3
    assert rig.ask(COUNT).count == 6


def test_a_refused_write_between_others_changes_nothing(rig: MemberRig) -> None:
    before = rig.send(PutRequest(key=b"a"))
    refused = rig.send(PutRequest(key=b"b", lease=404))
    after = rig.send(PutRequest(key=b"c"))
    rig.settle()
    assert rig.answers[refused] == error("LeaseNotFound").text
    assert [rig.answers[i].header.revision for i in (before, after)] == [2, 3]


def test_a_linearizable_read_sees_the_writes_before_it(rig: MemberRig) -> None:
    rig.ask(PutRequest(key=b"a", value=b"1"))
    read = rig.send(RangeRequest(key=b"a"))
    rig.settle()
    assert rig.answers[read].kvs[0].value == b"1"


# Limits.


def test_writes_beyond_the_limit_are_too_many_and_the_rest_is_done(
    rig: MemberRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 10 * (1000 + writing.REQUEST_BYTES)
    monkeypatch.setattr(writing, "MAX_PROPOSED_BYTES", limit)
    writes = [rig.send(PutRequest(key=b"%d" % n, value=bytes(1000))) for n in range(20)]
    rig.settle()
    refused = [i for i in writes if rig.answers[i] == error("RequestTooManyRequests").text]
    assert 8 <= len(refused) <= 12
    assert rig.member.state.store.index.heads.count(b"\0", None) == 20 - len(refused)
    # Everything is given back: the same number again is taken.
    again = [rig.send(PutRequest(key=b"%d" % n, value=bytes(1000))) for n in range(9)]
    rig.settle()
    assert not [i for i in again if isinstance(rig.answers[i], str)]


def test_large_reads_that_wait_for_a_leader_hold_little_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = started(request_timeout_s=5.0)
    monkeypatch.setattr(reading, "MAX_LARGE_BYTES", 10_500)
    too_many = error("RequestTooManyRequests").text

    def send() -> list[int]:
        return [rig.send(RangeRequest(key=bytes(1000))) for _ in range(20)]

    for is_confirmed in (True, False, True):
        ids = send()
        small = rig.send(RangeRequest(key=b"a"))
        with monkeypatch.context() as patch:
            if not is_confirmed:
                patch.setattr(Member, "needs_no_round", False)
                patch.setattr(rig.member.raft, "read_index", lambda context: None)
            rig.settle()
            assert sum(rig.answers.get(each) == too_many for each in ids) == 10
            if not is_confirmed:
                rig.now += 5.1
                rig.tick()
        assert rig.answers[small] == (
            rig.answers[ids[0]] if is_confirmed else error("Timeout").text
        )


def test_a_write_that_takes_too_long_is_answered_and_may_still_happen() -> None:
    rig = started(request_timeout_s=5.0)
    write = rig.send(PutRequest(key=b"a", value=b"1"))
    turn(rig.member)
    saves = rig.member.take_saves()
    rig.now += 4.9
    rig.member.tick()
    assert write not in rig.answers
    rig.now += 0.2
    rig.member.tick()
    assert rig.answers[write] == error("Timeout").text
    rig.wal.save_all(saves)
    rig.member.persisted(saves)
    rig.settle()
    assert rig.ask(RangeRequest(key=b"a")).kvs[0].value == b"1"
    assert rig.member.is_idle


# Space.


def test_no_space_refuses_what_takes_space_until_the_alarm_is_disarmed() -> None:
    rig = BigSegments(quota_bytes=40_000)
    rig.settle()
    rig.ask(proto.LeaseGrantRequest(ID=1, TTL=100))
    answer: Any = None
    writes = 0
    while not isinstance(answer, str):
        answer = rig.ask(PutRequest(key=b"key%d" % writes, value=bytes(2000)))
        writes += 1
        assert writes < 50
    assert answer == error("NoSpace").text
    (alarm,) = rig.ask(proto.AlarmRequest()).alarms
    assert (alarm.memberID, alarm.alarm) == (MEMBER_ID, alarms.NOSPACE)
    assert rig.ask(PutRequest(key=b"small")) == error("NoSpace").text
    assert rig.ask(proto.LeaseGrantRequest(ID=2, TTL=100)) == error("NoSpace").text
    put = proto.RequestOp(request_put=PutRequest(key=b"small"))
    assert rig.ask(proto.TxnRequest(failure=[put])) == error("NoSpace").text
    # What gives space back, and reads, are served.
    assert rig.ask(proto.DeleteRangeRequest(key=b"\0", range_end=b"\0")).deleted == writes - 1
    assert rig.ask(proto.LeaseRevokeRequest(ID=1)).header
    revision = rig.member.state.store.revision
    assert rig.ask(proto.CompactionRequest(revision=revision, physical=True)).header
    assert rig.ask(proto.DefragmentRequest()) == proto.DefragmentResponse()
    assert rig.ask(PutRequest(key=b"small")) == error("NoSpace").text
    disarm = proto.AlarmRequest(action=2, memberID=MEMBER_ID, alarm=alarms.NOSPACE)
    assert rig.ask(disarm).alarms
    assert rig.ask(PutRequest(key=b"small")).header
    assert not rig.ask(proto.AlarmRequest()).alarms


def test_an_alarm_is_still_there_after_a_restart() -> None:
    rig = started()
    rig.ask(proto.AlarmRequest(action=1, memberID=MEMBER_ID, alarm=alarms.NOSPACE))
    rig.close()
    rig = MemberRig(rig.disk)
    rig.settle()
    assert rig.ask(PutRequest(key=b"a")) == error("NoSpace").text


def test_compaction_gives_space_back_without_defragmentation() -> None:
    rig = BigSegments()
    rig.settle()
    for number in range(40):
        rig.ask(PutRequest(key=b"key", value=bytes([number]) * 1000))
    before = rig.member.state.store.size_in_use_bytes
    rig.ask(proto.CompactionRequest(revision=rig.member.state.store.revision, physical=True))
    assert rig.member.state.store.size_in_use_bytes < before / 4


def test_status_names_the_members_of_alarms_as_etcd_prints_them(rig: MemberRig) -> None:
    for member_id in (0, 5):
        rig.ask(proto.AlarmRequest(action=1, memberID=member_id, alarm=alarms.CORRUPT))
    errors = ["alarm:CORRUPT ", "memberID:5 alarm:CORRUPT "]
    assert rig.ask(proto.StatusRequest()).errors == errors


# Housekeeping.


def test_the_first_compaction_may_be_at_revision_0_as_in_etcd(rig: MemberRig) -> None:
    hash_kv = proto.HashKVRequest()
    assert rig.ask(hash_kv).compact_revision == -1
    assert rig.ask(proto.CompactionRequest(revision=-1)) == error("Compacted").text
    assert rig.ask(proto.CompactionRequest()).header.revision == 1
    assert rig.ask(hash_kv).compact_revision == 0
    rig.close()
    rig = MemberRig(rig.disk, rig.story)
    rig.settle()
    assert rig.ask(hash_kv).compact_revision == 0
    assert rig.ask(proto.CompactionRequest()) == error("Compacted").text


def test_a_watch_from_before_the_first_tick_waits_for_its_progress_like_all_others() -> None:
    sink = Sink()
    rig = MemberRig()
    request = proto.WatchCreateRequest(key=b"a", progress_notify=True)
    rig.member.hub.open(sink).create(request)
    for waited_s, responses in ((0.0, 1), (599.0, 1), (100.0, 2)):
        rig.now += waited_s
        rig.member.tick()
        assert len(sink.responses) == responses, sink.responses


def test_a_physical_compaction_is_answered_when_the_work_is_done() -> None:
    rig = filled(3000)
    rig.ask(proto.DeleteRangeRequest(key=b"key", range_end=b"kez"))
    assert len(rig.member.state.store.index.past) == 3000
    rig.pace_s = 0.001
    compaction = rig.send(
        proto.CompactionRequest(revision=rig.member.state.store.revision, physical=True)
    )
    turns = 0
    while compaction not in rig.answers:
        assert len(rig.member.state.store.index.past) > 0
        rig.turn()
        turns += 1
    assert turns > 3, "it was done at one go"
    assert rig.answers[compaction].header.revision == rig.member.state.store.revision


def test_background_work_lets_a_write_be_saved_first() -> None:
    rig = filled(6000)
    for number in range(6000):
        request = PutRequest(key=b"key%07d" % number)
        rig.member.writes.propose_message(Waiter(None, 0, methods.PUT, request))
    rig.settle()
    rig.member.state.store.compact(rig.member.state.store.revision)
    past = rig.member.state.store.index.past
    rig.pace_s = 0.0001

    def housekeep() -> int:
        before = len(past)
        rig.member.maintain()
        return before - len(past)

    rig.now += 1.0
    at_leisure = housekeep()
    rig.send(PutRequest(key=b"a"))
    turn(rig.member)
    assert rig.member.is_saving
    assert housekeep() == 0
    rig.now += 1.3 * background.REST * background.SLICE_S
    assert 0 < housekeep() <= at_leisure
    assert housekeep() == 0, "the client may ask again soon"
    rig.now += 1.0
    assert housekeep() == at_leisure


def compacting(keys: int) -> MemberRig:
    """A member that has dropped nothing yet of a compaction of this many versions."""
    rig = filled(keys)
    rig.ask(proto.DeleteRangeRequest(key=b"key", range_end=b"kez"))
    rig.settle()
    rig.ask(PutRequest(key=b"a"))
    rig.member.state.store.compact(rig.member.state.store.revision)
    rig.pace_s = 0.0001
    rig.now += 1.0
    return rig


def test_background_work_ends_when_input_arrives() -> None:
    rig = compacting(1000)
    past = rig.member.state.store.index.past
    before = len(past)
    rig.member.maintain(lambda: True)
    assert before - len(past) == rig.member.state.store.limits.compact_step_keys


def test_background_work_takes_a_quarter_of_the_time_while_clients_are_active() -> None:
    rig = compacting(6000)
    spent_s, began = 0.0, rig.now
    while rig.member.state.store.index.past:
        rig.member.background.asked_at = at = rig.now
        rig.member.maintain()
        took_s = rig.now - at
        if took_s > 5 * rig.pace_s:
            assert took_s < 2 * background.SLICE_S
            spent_s += took_s
        rig.now += 0.0003
    assert 0.1 < spent_s / (rig.now - began) < 0.3


def test_background_work_goes_on_while_writes_wait_for_other_members() -> None:
    rig = filled(1000)
    rig.ask(proto.DeleteRangeRequest(key=b"key", range_end=b"kez"))
    rig.ask(proto.MemberAddRequest(peerURLs=["http://127.0.0.1:1"]))
    write = rig.send(PutRequest(key=b"a"))
    rig.settle()
    assert write not in rig.answers and rig.member.is_saving
    for revision in (rig.member.state.store.revision - 1, rig.member.state.store.revision):
        rig.member.state.store.compact(revision)
        rig.settle()
        assert rig.member.state.store.compaction is None


def test_a_compaction_that_is_not_physical_is_answered_at_once() -> None:
    rig = filled(3000)
    rig.ask(proto.DeleteRangeRequest(key=b"key", range_end=b"kez"))
    rig.pace_s = 0.001
    compaction = rig.send(proto.CompactionRequest(revision=rig.member.state.store.revision))
    while compaction not in rig.answers:
        rig.turn()
    assert len(rig.member.state.store.index.past) > 1000


def with_damaged_segment(is_readable: bool) -> MemberRig:
    rig = started()
    for number in range(60):
        rig.ask(PutRequest(key=b"key%d" % (number % 7), value=b"%d" % number * 20))
    rig.ask(proto.CompactionRequest(revision=rig.member.state.store.revision - 30, physical=True))
    rig.settle()
    path = f"{DATA_DIR}/member/data/{3:016x}.seg"
    disk = rig.disk
    assert isinstance(disk, FaultyDisk)
    if is_readable:
        disk._names[path].data[-80] ^= 1
    else:
        disk.unreadable[path] = len(disk.read(path)) - 80
    return rig


SORTED = proto.RangeRequest(
    key=b"k", range_end=b"l", sort_target=proto.RangeRequest.MOD, sort_order=1, serializable=True
)


def with_keys(count: int) -> MemberRig:
    """A member that frees ten items of a list in a step."""
    rig = MemberRig(limits=Limits(range_step_keys=5, sort_step_items=10, merge_step_items=10))
    for number in range(count):
        rig.ask(PutRequest(key=b"k%d" % number, value=b"v"))
    return rig


def test_sorted_ranges_do_not_fill_the_memory_while_the_disk_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then there is no maintenance, which frees what they leave."""
    rig = with_keys(50)
    store = rig.member.state.store

    def mark(index: int, term: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(store, "mark", mark)
        rig.send(PutRequest(key=b"more", value=b"v"))
        for _ in range(20):
            assert len(rig.ask(SORTED).kvs) == 50
            assert rig.member.state.awaits_space
            assert sum(map(len, store.leftovers)) <= 50
    rig.tick()
    assert store.leftovers == []


def test_what_a_read_of_a_replaced_store_leaves_is_freed_in_steps() -> None:
    rig, other = with_keys(50), with_keys(50)
    old, new = rig.member.state.store, other.member.state.store
    rig.pace_s = 1.0  # So a turn is a step.
    request_id = rig.send(SORTED)
    for _ in range(12):
        turn(rig.member)
    assert old.pinned and request_id not in rig.answers
    rig.member._restored(Snapshot(new.applied_index, new.applied_term, (MEMBER_ID,), ()), new)
    rig.pace_s = 0.0
    (left,) = old.leftovers
    assert len(left) == 50
    rig.settle()
    assert left == [] and len(rig.answers[request_id].kvs) == 50


@pytest.mark.parametrize("is_readable", [True, False])
def test_a_damaged_segment_is_kept_and_the_others_are_cleaned(is_readable: bool) -> None:
    rig = with_damaged_segment(is_readable)
    for _ in range(2):
        assert rig.ask(proto.DefragmentRequest()) == proto.DefragmentResponse()
    assert rig.member.state.store.uncleanable == {3}
    assert rig.ask(PutRequest(key=b"after", value=b"it")).header
    rig.ask(proto.DefragmentRequest())
    again = MemberRig(rig.disk.fork())
    assert 3 in again.member.state.store.data.files


def test_a_damaged_segment_is_kept_when_the_disk_is_full_by_then() -> None:
    rig = with_damaged_segment(is_readable=True)
    disk, store = rig.disk, rig.member.state.store
    assert isinstance(disk, FaultyDisk)

    def fill(operation: str, path: str) -> None:
        if store.uncleanable and operation == "pwrite" and path.endswith(".seg"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    disk.watcher = fill
    assert rig.ask(proto.DefragmentRequest()) == "etcdserver: mvcc: database space exceeded"
    disk.watcher = lambda operation, path: None
    rig.tick(2.0)
    assert rig.ask(proto.DefragmentRequest()) == proto.DefragmentResponse()
    assert store.uncleanable == {3}


# Damaged data. What is written does not depend on it, so no member may write anything else.


def damage(rig: MemberRig, key: bytes) -> str:
    """Change a byte of the key's record behind the member's back; where it stands."""
    data = rig.member.state.store.data
    location = rig.member.state.store.index.heads[key][3]
    path, offset = f"{DATA_DIR}/member/data/{segment_name(location >> 32)}", location & OFFSET_MASK
    disk = rig.disk
    assert isinstance(disk, FaultyDisk)
    disk.content(path)[offset + 12] ^= 1
    data.recent.clear()
    data.older.clear()
    return f"{path} is damaged at offset {offset}"


def test_a_read_that_the_disk_fails_is_an_answer_and_not_the_end() -> None:
    rig = started()
    for key in (b"k1", b"k2"):
        rig.ask(PutRequest(key=key, value=b"v" * 100))
    disk, store = rig.disk, rig.member.state.store
    assert isinstance(disk, FaultyDisk)
    location = store.index.heads[b"k1"][3]
    disk.unreadable[store.data.path(location >> 32)] = location & OFFSET_MASK
    store.data.drop_recent()
    for end in (b"", b"l"):
        answer = rig.ask(RangeRequest(key=b"k1", range_end=end))
        assert answer == "etcdserver: corrupt cluster"
    assert rig.ask(RangeRequest(key=b"k2")).kvs[0].value == b"v" * 100


def op(**operation: Any) -> Any:
    return proto.RequestOp(**{f"request_{name}": value for name, value in operation.items()})


def state(rig: MemberRig) -> Any:
    """All but where the records stand."""
    store = rig.member.state.store
    heads = dict(store.index.heads)
    return (
        store.revision,
        len(store.index.revisions),
        {key: (*head[:3], *head[4:]) for key, head in heads.items()},
        {
            key: [(mod, length) for mod, _, length in PAST.iter_unpack(entries)]
            for key, entries in store.index.past.items()
        },
    )


ALL_K = proto.DeleteRangeRequest(key=b"k", range_end=b"l", prev_kv=True)
READ_K = RangeRequest(key=b"k", range_end=b"l")
VERSION_1 = proto.Compare(key=b"k1", target=proto.Compare.VERSION, version=1)


@pytest.mark.parametrize(
    "request_",
    [
        PutRequest(key=b"k1", value=b"new", prev_kv=True),
        PutRequest(key=b"k1", value=b"new", prev_kv=True, ignore_lease=True),
        ALL_K,
        proto.TxnRequest(
            success=[
                op(put=PutRequest(key=b"a")),
                op(put=PutRequest(key=b"k1", prev_kv=True)),
                op(put=PutRequest(key=b"z")),
            ]
        ),
        proto.TxnRequest(
            compare=[VERSION_1],
            success=[op(range=READ_K), op(delete_range=ALL_K), op(put=PutRequest(key=b"z"))],
        ),
        proto.TxnRequest(
            success=[
                op(txn=proto.TxnRequest(success=[op(range=READ_K)])),
                op(txn=proto.TxnRequest(success=[op(put=PutRequest(key=b"z"))])),
            ]
        ),
        proto.TxnRequest(
            success=[
                op(range=RangeRequest(key=b"k", range_end=b"l", sort_order=2, sort_target=4)),
                op(delete_range=proto.DeleteRangeRequest(key=b"no such key")),
            ]
        ),
    ],
    ids=["put", "put of the value", "delete", "puts", "reads", "nested", "nothing written"],
)
def test_a_write_is_applied_though_what_it_should_answer_is_damaged(
    request_: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, other = started(), started()
    for both in (rig, other):
        for number in range(4):
            both.ask(PutRequest(key=b"k%d" % number, value=b"v" * 20))
    where = damage(rig, b"k1")
    logged: list[str] = []
    monkeypatch.setattr(log, "error", lambda text, limit: logged.append(text))
    assert rig.ask(request_) == error("Corrupt").text
    assert [line for line in logged if where in line]
    assert len(rig.member.state.store.data.damaged) == 1
    assert "damaged data" in rig.ask(proto.StatusRequest()).errors[0]
    assert not isinstance(other.ask(request_), str)
    assert state(rig) == state(other)
    rig.ask(PutRequest(key=b"after"))
    other.ask(PutRequest(key=b"after"))
    # Neither the restart is in its way, which applies it again, nor another member's.
    again = MemberRig(rig.disk, rig.story)
    again.settle()
    assert state(again) == state(other)


def test_comparing_all_but_values_needs_no_record() -> None:
    rig = started()
    rig.ask(PutRequest(key=b"k1"))
    damage(rig, b"k1")
    compares = [
        VERSION_1,
        proto.Compare(key=b"k", range_end=b"l", target=proto.Compare.MOD, mod_revision=2),
        proto.Compare(key=b"k1", target=proto.Compare.CREATE, create_revision=2),
        proto.Compare(key=b"k1", target=proto.Compare.LEASE),
    ]
    answer = rig.ask(proto.TxnRequest(compare=compares, success=[op(put=PutRequest(key=b"a"))]))
    assert answer.succeeded


@pytest.mark.parametrize(
    "request_",
    [
        PutRequest(key=b"k1", ignore_value=True),
        proto.TxnRequest(
            compare=[proto.Compare(key=b"k1", target=proto.Compare.VALUE, value=b"v")],
            failure=[op(put=PutRequest(key=b"a"))],
        ),
    ],
    ids=["kept value", "compared value"],
)
def test_a_write_that_depends_on_a_damaged_value_is_not_guessed(request_: Any) -> None:
    rig = started()
    rig.ask(PutRequest(key=b"k1", value=b"v" * 20))
    where = damage(rig, b"k1")
    revision = rig.member.state.store.revision
    with pytest.raises(DataDamaged, match=where):
        rig.ask(request_)
    assert rig.member.state.store.revision == revision and not rig.member.state.store.is_writing


# Large answers.

SMALL_ANSWERS = Limits(max_answer_bytes=10_000)


def test_an_answer_that_is_too_large_is_refused() -> None:
    rig = filled(200, b"v" * 100)
    rig.member.state.store.limits = SMALL_ANSWERS
    every = {"key": b"key", "range_end": b"kez"}
    inner = op(range=RangeRequest(**every, limit=30))
    for request in (
        RangeRequest(**every),
        RangeRequest(**every, sort_order=2),
        RangeRequest(**every, sort_order=2, sort_target=4, limit=1),
        RangeRequest(**every, min_mod_revision=1),
        proto.TxnRequest(success=[op(range=RangeRequest(**every))]),
        proto.TxnRequest(success=[op(txn=proto.TxnRequest(success=[inner])), inner, inner]),
    ):
        answer = rig.ask(request)
        assert answer == AnswerTooLarge(10_000).text and "use limit" in answer, request
    for request in (
        RangeRequest(**every, limit=50),
        RangeRequest(**every, keys_only=True),
        RangeRequest(**every, count_only=True),
        RangeRequest(**every, sort_order=2, sort_target=3, limit=50),
        RangeRequest(**every, min_mod_revision=1, limit=50),
        RangeRequest(**every, min_mod_revision=200),
        proto.TxnRequest(success=[inner, inner]),
    ):
        assert not isinstance(rig.ask(request), str), request


@pytest.mark.parametrize(
    "request_",
    [
        ALL_K,
        proto.TxnRequest(success=[op(range=READ_K), op(put=PutRequest(key=b"a"))]),
        proto.TxnRequest(success=[op(put=PutRequest(key=b"a")), op(delete_range=ALL_K)]),
        proto.TxnRequest(
            success=[op(put=PutRequest(key=b"key%07d" % n, prev_kv=True)) for n in range(90)]
        ),
    ],
    ids=["delete", "range", "deletes in a transaction", "puts"],
)
def test_a_write_whose_answer_is_known_to_be_too_large_changes_nothing(
    request_: Any,
) -> None:
    rig = filled(100, b"v" * 100)
    rig.member.state.store.limits = SMALL_ANSWERS
    before = rig.member.state.store.revision
    # A member that cannot read its data refuses the same.
    damage(rig, b"key0000001")
    assert rig.ask(request_) == AnswerTooLarge(10_000).text
    assert rig.member.state.store.revision == before


def test_a_write_whose_answer_proves_too_large_is_applied_whole() -> None:
    rig = filled(100, b"v" * 100)
    rig.member.state.store.limits = SMALL_ANSWERS
    ops = [op(put=PutRequest(key=b"a")), op(range=READ_K), op(put=PutRequest(key=b"b"))]
    answer = rig.ask(proto.TxnRequest(success=ops))
    assert answer.startswith(AnswerTooLarge(10_000).text) and "was applied" in answer
    for key in (b"a", b"b"):
        assert rig.ask(RangeRequest(key=key)).kvs[0].mod_revision == rig.member.state.store.revision


def test_a_large_write_reaches_the_file_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = filled(2000, limits=Limits(flush_bytes=2000))
    data = rig.member.state.store.data
    marks: list[int] = []
    real = data.append_mark
    monkeypatch.setattr(
        data, "append_mark", lambda *mark: (marks.append(data.offset - data.flushed), real(*mark))
    )
    rig.ask(proto.DeleteRangeRequest(key=b"k", range_end=b"l"))
    assert len(marks) == 1 and marks[0] < 2000 + 200 * DEFAULT_LIMITS.apply_step_ops, marks
    rig = MemberRig(rig.disk.power_loss() if isinstance(rig.disk, FaultyDisk) else None)
    rig.settle()
    assert rig.member.state.store.index.heads.count(b"\0", None) == 0


def test_defragmentations_of_an_idle_member_leave_nothing_behind() -> None:
    rig = started()
    for number in range(20):
        rig.ask(PutRequest(key=b"key%d" % number, value=b"v" * 50))
    rig.ask(proto.DefragmentRequest())
    files = len(rig.member.state.store.data.files)
    for _ in range(20):
        rig.ask(proto.DefragmentRequest())
    assert len(rig.member.state.store.data.files) <= files + 2


# Slices.


def test_nobody_sees_half_of_a_large_delete() -> None:
    rig = filled(5000)
    rig.pace_s = 0.0005
    delete = rig.send(proto.DeleteRangeRequest(key=b"key", range_end=b"kez"))
    answers: list[int] = []
    turns = 0
    while delete not in rig.answers:
        for count_only in (False, True):
            for serializable in (False, True):
                request = RangeRequest(key=b"\0", range_end=b"\0")
                request.count_only, request.serializable = count_only, serializable
                answers.append(rig.send(request))
        answers.append(rig.send(proto.TxnRequest(success=[proto.RequestOp(request_range=COUNT)])))
        rig.turn()
        turns += 1
    rig.settle()
    assert turns > 5, "it was done at one go"
    counts = set()
    for answer in answers:
        response = rig.answers[answer]
        if response.NAME == "TxnResponse":
            response = response.responses[0].response_range
        counts.add(response.count)
        assert len(response.kvs) in (0, response.count)
    assert counts <= {0, 5000}


def test_reads_go_on_beside_a_large_delete_as_of_the_revision_before() -> None:
    rig = filled(5000, limits=Limits(delete_step_keys=40))
    rig.pace_s = 0.0005
    before = rig.member.state.store.revision
    delete = rig.send(proto.DeleteRangeRequest(key=b"key", range_end=b"kez"))
    while not rig.member.is_applying:
        rig.turn()
    first = RangeRequest(key=b"key0000000")
    some = RangeRequest(key=b"key", range_end=b"kez", limit=3)
    in_txn = proto.TxnRequest(success=[proto.RequestOp(request_range=COUNT)])
    asked = 0
    while rig.member.is_applying:
        reads = [rig.send(request) for request in (first, some, COUNT, in_txn)]
        hash_ = rig.send(proto.HashKVRequest())
        for _ in range(3):
            rig.turn()
        if not rig.member.is_applying:
            break
        assert delete not in rig.answers and hash_ not in rig.answers
        found = [rig.answers[read] for read in reads]
        assert [answer.header.revision for answer in found] == [before] * 4
        assert found[0].kvs[0].key == b"key0000000"
        assert (found[1].count, len(found[1].kvs)) == (5000, 3)
        assert found[2].count == found[3].responses[0].response_range.count == 5000
        asked += 1
    assert asked > 3, "the delete was too quick to tell"
    rig.settle()
    assert rig.answers[delete].deleted == 5000
    assert rig.answers[hash_].hash_revision == before + 1
    assert rig.ask(COUNT).count == 0


def test_a_member_may_rest_only_when_it_is_alone_and_idle() -> None:
    rig = filled(3)
    assert may_rest(rig.member)
    put = rig.send(PutRequest(key=b"k"))
    assert not may_rest(rig.member)
    rig.settle()
    assert put in rig.answers and may_rest(rig.member)
    rig.member.raft.learners.add(7)
    assert not may_rest(rig.member), "it has heartbeats to send"


def test_gets_and_writes_go_before_hashes() -> None:
    rig = filled(3000, limits=Limits(max_background_reads=5))
    rig.pace_s = 0.0002
    first = RangeRequest(key=b"key0000000", serializable=True)
    before = rig.member.state.store.revision
    hashes = [rig.send(proto.HashKVRequest(revision=before)) for _ in range(6)]
    turns = 0
    while not all(hash_ in rig.answers for hash_ in hashes):
        put = rig.send(PutRequest(key=b"other"))
        reads = [rig.send(first) for _ in range(3)]
        rig.turn()
        assert all(read in rig.answers for read in reads)
        rig.turn()
        assert put in rig.answers
        turns += 1
    assert turns > 20, "the hashes were too quick to tell"
    assert rig.answers[hashes[5]] == error("RequestTooManyRequests").text
    values = {rig.answers[hash_].hash for hash_ in hashes[:5]}
    assert len(values) == 1 and rig.answers[hashes[0]].hash_revision == before
    assert not rig.member.reads.background and not rig.member.state.store.pinned


def test_a_hash_whose_client_is_gone_holds_nothing() -> None:
    rig = filled(3000)
    rig.pace_s = 0.0005
    hash_ = rig.send(proto.HashKVRequest())
    while not rig.member.state.store.pinned:
        rig.turn()
    assert hash_ not in rig.answers
    rig.cancelled.add(hash_)
    rig.now += background.BUSY_S
    rig.turn()
    assert not rig.member.reads.background and not rig.member.state.store.pinned


def test_a_member_that_is_alone_does_not_hash_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = filled(100)
    hashed: list[int] = []
    hash_steps = Store.hash_steps
    monkeypatch.setattr(
        Store,
        "hash_steps",
        lambda store, revision: hashed.append(revision) or hash_steps(store, revision),
    )
    rig.member.hash_check.after_compaction_s = 1.0
    rig.member.hash_check.interval_s = 3.0
    rig.ask(proto.CompactionRequest(revision=50, physical=True))
    for _ in range(60):
        rig.tick()
    assert not hashed
    rig.ask(proto.HashKVRequest(of_members=True))
    assert hashed


def test_a_read_beside_a_delete_sees_the_writes_that_are_answered() -> None:
    rig = filled(3000, limits=Limits(delete_step_keys=40))
    rig.pace_s = 0.0005
    put = rig.send(PutRequest(key=b"before", value=b"it"))
    delete = rig.send(proto.DeleteRangeRequest(key=b"key", range_end=b"kez"))
    while put not in rig.answers:
        rig.turn()
    assert delete not in rig.answers
    read = rig.send(RangeRequest(key=b"before"))
    while read not in rig.answers:
        rig.turn()
    assert delete not in rig.answers
    assert rig.answers[read].kvs[0].value == b"it"
    rig.settle()


def test_a_read_waits_for_a_delete_that_may_have_been_answered_before_a_crash() -> None:
    rig = filled(3000)
    rig.ask(proto.DeleteRangeRequest(key=b"key", range_end=b"kez"))
    rig = BigSegments(rig.disk.power_loss())  # type: ignore[attr-defined]
    rig.pace_s = 0.0005
    counts: list[int] = []
    has_replayed = False
    while rig.turn() or not counts:
        counts.append(rig.send(COUNT))
        has_replayed |= rig.member.is_applying
        if not rig.member.leads:
            rig.now += 0.1
            rig.member.tick()
    rig.settle()
    assert has_replayed, "nothing was applied in steps"
    found = [rig.answers[count] for count in counts]
    assert found and all(isinstance(answer, str) or answer.count == 0 for answer in found), found


def test_a_read_waits_for_a_delete_that_another_member_may_have_answered() -> None:
    rig = filled(3000, limits=Limits(delete_step_keys=40))
    rig.pace_s = 0.0005
    rig.member.raft.learners.add(99)
    delete = rig.send(proto.DeleteRangeRequest(key=b"key", range_end=b"kez"))
    while not rig.member.is_applying:
        rig.turn()
    read = rig.send(COUNT)
    stale = rig.send(RangeRequest(key=b"\0", range_end=b"\0", count_only=True, serializable=True))
    for _ in range(3):
        rig.turn()
    assert rig.answers[stale].count == 3000
    assert read not in rig.answers and delete not in rig.answers
    rig.settle()
    assert rig.answers[read].count == 0


def test_a_watch_gets_all_events_of_a_large_delete_though_few_are_kept() -> None:
    rig = filled(1000, limits=Limits(max_events_at_once=50, delete_step_keys=20))
    sink = Sink()
    rig.member.hub.open(sink).create(proto.WatchCreateRequest(key=b"key", range_end=b"kez"))
    rig.pace_s = 0.0005
    delete = rig.send(proto.DeleteRangeRequest(key=b"key", range_end=b"kez"))
    put = rig.send(PutRequest(key=b"key-after"))
    kept = 0
    while put not in rig.answers:
        rig.turn()
        kept = max(kept, len(rig.member.state.store.events))
    rig.settle()
    assert rig.answers[delete].deleted == 1000
    assert 50 < kept < 100, kept
    keys = [event.kv.key for response in sink.responses for event in response.events]
    assert keys == [b"key%07d" % number for number in range(1000)] + [b"key-after"]


@pytest.mark.parametrize("in_txn", [False, True])
def test_puts_that_keep_large_values_hold_few_of_them_in_memory(
    in_txn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(
        step_bytes=4096,
        flush_bytes=4096,
        pack_bytes=4096,
        slice_bytes=4096,
        history_chunk_bytes=4096,
        event_chunk_bytes=4096,
        max_event_bytes_at_once=20_000,
    )
    rig = filled(100, bytes(2000), limits=limits)
    sink = Sink()
    rig.member.hub.open(sink).create(proto.WatchCreateRequest(key=b"key", range_end=b"kez"))
    flushed_bytes, kept_bytes = [], []
    flush = DataFile.flush

    def measured(data: DataFile) -> None:
        flushed_bytes.append(data.offset - data.flushed)
        kept_bytes.append(sum(len(event[3]) for event in rig.member.state.store.events))
        flush(data)

    monkeypatch.setattr(DataFile, "flush", measured)
    puts = [PutRequest(key=b"key%07d" % n, ignore_value=True) for n in range(100)]
    ops = [proto.RequestOp(request_put=put) for put in puts]
    requests = [proto.TxnRequest(success=ops)] if in_txn else puts
    for request in requests:
        rig.send(request)
    rig.settle()
    assert max(flushed_bytes) < 4096 + 2500
    assert max(kept_bytes) < 20_000 + 4096 + 2500
    events = [event for response in sink.responses for event in response.events]
    assert [event.kv.key for event in events] == [put.key for put in puts]
    assert {event.kv.value for event in events} == {bytes(2000)}


@pytest.mark.parametrize("in_txn", [False, True])
def test_the_large_answer_to_a_write_is_made_when_the_write_is_over(in_txn: bool) -> None:
    rig = filled(100, bytes(2000), limits=Limits(step_bytes=4096))
    rig.pace_s = 0.001
    request: Any = proto.DeleteRangeRequest(key=b"key", range_end=b"kez", prev_kv=True)
    if in_txn:
        request = proto.TxnRequest(success=[proto.RequestOp(request_delete_range=request)])
    delete = rig.send(request)
    while rig.member.is_applying or rig.member.state.store.index.heads.count(b"key", b"kez"):
        assert delete not in rig.answers
        rig.turn()
    put = rig.send(PutRequest(key=b"another"))
    while put not in rig.answers:
        rig.turn()
    assert delete not in rig.answers
    rig.settle()
    answer = rig.answers[delete]
    if in_txn:
        (answer,) = (response.response_delete_range for response in answer.responses)
    assert [len(kv.value) for kv in answer.prev_kvs] == [2000] * 100


def test_a_snapshot_taken_within_a_large_write_is_whole(tmp_path: Any) -> None:
    rig = filled(3000)
    rig.pace_s = 0.0005
    rig.send(PutRequest(key=b"before", value=b"it"))
    rig.send(proto.DeleteRangeRequest(key=b"key", range_end=b"kez"))
    while not rig.member.is_applying:
        rig.turn()
    rig.turn()
    assert rig.member.is_applying
    path = tmp_path / "snapshot"
    with open(path, "wb") as file:
        for response in streams.snapshot_parts(rig.member):
            file.write(proto.SnapshotResponse.decode(response).blob)
    backup.restore(str(path), home(tmp_path / "restored"))


def test_a_snapshot_frees_the_data_that_it_replaces_in_steps(rig: MemberRig) -> None:
    for lease_id in range(1, 3001):
        rig.send(proto.LeaseGrantRequest(ID=lease_id, TTL=600))
    for number in range(1000):
        rig.send(PutRequest(key=b"%d" % (number % 600), value=b""))
    rig.settle()
    old, raft = rig.member.state.store, rig.member.raft
    assert len(old.index.heads.blocks) > 1 and old.index.past.blocks
    lessor = Lessor()
    new = Store.create(rig.disk, "new", lessor, 1 << 20)
    new.skip_revisions(old.revision)
    rig.member._restored(Snapshot(raft.log.applied, raft.term, (MEMBER_ID,), ()), new)
    leases = [len(old.lessor)]
    while leases[-1]:
        rig.member.maintenance.run(lambda: True)
        leases.append(len(old.lessor))
    assert leases[0] == 3000 and len(set(leases)) == 4
    assert rig.member.state.lessor is lessor
    rig.settle()
    assert not old.index.heads.blocks and not old.index.past.blocks


def test_what_a_read_leaves_is_freed_in_steps(rig: MemberRig) -> None:
    store = rig.member.state.store
    few, many = [b""] * 10, [b""] * 5000
    store.leave(few)
    store.leave(many)
    assert store.leftovers == [many], "few are freed at once"
    left = [len(many)]
    while left[-1]:
        rig.member.maintenance.run(lambda: True)
        left.append(len(many))
    assert len(set(left)) == 6 and store.leftovers == []


def test_what_reads_leave_is_freed_while_a_job_waits_for_the_disk(rig: MemberRig) -> None:
    """On a slow disk a job takes minutes, in which reads leave hundreds of megabytes."""
    store, maintenance = rig.member.state.store, rig.member.maintenance
    maintenance.wants_checkpoint = True
    maintenance.tick(rig.now)
    while maintenance.has_work:
        maintenance.run(lambda: True)
    assert maintenance.checkpoints == 0, "its file is being written"
    for _ in range(3):
        store.leave([b""] * 5000)
        assert maintenance.has_work
        while maintenance.has_work:
            maintenance.run(lambda: True)
        assert store.leftovers == []
    rig.settle()
    assert maintenance.checkpoints == 1


def test_reads_are_served_while_writes_never_cease() -> None:
    rig = BigSegments()
    rig.settle()
    rig.pace_s = 0.0005
    open_writes: list[int] = []
    read = None
    for number in range(300):
        while len(open_writes) < 1000:
            open_writes.append(rig.send(PutRequest(key=b"k%d" % len(open_writes), value=b"v")))
        if number == 100:
            read = rig.send(RangeRequest(key=b"k1"))
        rig.turn()
        open_writes = [i for i in open_writes if i not in rig.answers]
        if read in rig.answers:
            return
    raise AssertionError("a read waited for 200 turns")


# Leases.


def test_an_expired_lease_takes_its_keys_in_one_revision(rig: MemberRig) -> None:
    for lease_id, ttl_s in ((1, 5), (2, 5), (3, 50)):
        rig.ask(proto.LeaseGrantRequest(ID=lease_id, TTL=ttl_s))
        for key in (b"a", b"b"):
            rig.ask(PutRequest(key=key + b"%d" % lease_id, lease=lease_id))
    revision = rig.member.state.store.revision
    rig.tick(4.5)
    assert rig.member.state.store.revision == revision
    rig.tick(2.0)
    assert rig.member.state.store.revision == revision + 2
    events = [
        (at, key, gone)
        for at, key, gone, _ in read_events(rig.member.state.store, revision + 1, 999)
    ]
    assert events == [
        (revision + 1, b"a1", True),
        (revision + 1, b"b1", True),
        (revision + 2, b"a2", True),
        (revision + 2, b"b2", True),
    ]
    assert rig.ask(proto.LeaseTimeToLiveRequest(ID=1)).TTL == -1
    assert rig.ask(proto.LeaseTimeToLiveRequest(ID=3)).TTL > 40


def test_leases_expire_after_a_restart_and_not_before_their_time() -> None:
    rig = started()
    rig.ask(proto.LeaseGrantRequest(ID=1, TTL=5))
    rig.ask(PutRequest(key=b"a", lease=1))
    rig.tick(4.0)
    rig = MemberRig(rig.disk)
    rig.settle()
    rig.tick(4.9)
    assert rig.ask(RangeRequest(key=b"a")).count == 1
    rig.tick(2.0)
    assert rig.ask(RangeRequest(key=b"a")).count == 0


@pytest.mark.timeout(120)
def test_a_hundred_thousand_leases_expire_in_turns_of_bounded_work() -> None:
    leases = 100_000
    rig = BigSegments()
    rig.settle()
    grant = methods.METHOD_BY_NAME["Lease.LeaseGrant"].number
    for lease_id in range(1, leases + 1):
        request = proto.LeaseGrantRequest(ID=lease_id, TTL=10)
        rig.member.writes.propose_message(Waiter(None, 0, grant, request))
        request = PutRequest(key=b"key%07d" % lease_id, lease=lease_id)
        rig.member.writes.propose_message(Waiter(None, 0, methods.PUT, request))
        if lease_id % 5000 == 0:
            rig.settle()
    store = rig.member.state.store
    revision = store.revision
    assert store.index.heads.count(b"\0", None) == leases
    # A look at the clock stands for a step: no turn takes more of them than fit a slice.
    rig.pace_s = 0.0001
    rig.now += 12.0
    most_deleted = most_looks = 0
    while store.index.heads.count(b"\0", None):
        rig.now += 0.1
        rig.member.tick()
        for _ in range(100):
            keys, looks = store.index.heads.count(b"\0", None), rig.looks
            more = rig.turn()
            most_deleted = max(most_deleted, keys - store.index.heads.count(b"\0", None))
            most_looks = max(most_looks, rig.looks - looks)
            if not more:
                break
    assert store.revision == revision + leases, "one revision for each lease"
    assert len(rig.member.state.lessor) == 0
    assert most_deleted <= 21 * DEFAULT_LIMITS.apply_step_ops
    assert most_looks < 500


def test_the_rest_of_a_batch_goes_on_when_one_request_is_large() -> None:
    rig = filled(2000)
    rig.pace_s = 0.0005
    writes = [
        rig.send(request)
        for request in (
            PutRequest(key=b"a"),
            proto.DeleteRangeRequest(key=b"key", range_end=b"kez", prev_kv=True),
            PutRequest(key=b"b"),
        )
    ]
    rig.settle()
    assert [rig.answers[i].header.revision for i in writes] == [2002, 2003, 2004]
    assert len(rig.answers[writes[1]].prev_kvs) == 2000


def test_random_life_is_told_the_same_after_every_restart() -> None:
    rng = random.Random(11)
    rig = MemberRig(checkpoint_bytes=1)
    for _ in range(12):
        live(rig, rng, 40)
        rig.story.check(rig.member.state.store)
        if rng.random() < 0.5:
            rig.close()
        rig = MemberRig(rig.disk, rig.story, checkpoint_bytes=1)
        rig.settle()
        rig.story.check(rig.member.state.store)


def test_an_answer_without_memory_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One client's large range must not end the process."""
    limits = DEFAULT_LIMITS._replace(whole_answer_bytes=DEFAULT_LIMITS.step_bytes)
    rig = filled(300, bytes(3000), limits=limits)
    everything = proto.RangeRequest(key=b"\0", range_end=b"\0")

    def join(*_: Any) -> Any:
        raise MemoryError
        yield

    with monkeypatch.context() as patch:
        for module in (ranges, reading, txn):
            patch.setattr(module, "join_steps", join)
        assert rig.ask(everything) == reading.NO_MEMORY.text
        assert rig.ask(proto.PutRequest(key=b"more")).header.revision == 302
        # Its branches are read after the write is applied.
        late = proto.TxnRequest(
            success=[
                proto.RequestOp(request_put=proto.PutRequest(key=b"last")),
                proto.RequestOp(request_range=everything),
            ]
        )
        assert rig.ask(late) == reading.NO_MEMORY.text
    assert rig.ask(everything).count == 302


def test_reads_that_nobody_waits_for_any_more_are_left_out() -> None:
    rig = filled(3000)
    rig.pace_s = 0.0005
    everything = proto.RangeRequest(key=b"\0", range_end=b"\0", serializable=True)
    reads = [rig.send(everything) for _ in range(3 * DEFAULT_LIMITS.max_slow_reads)]
    rig.turn()
    rig.turn()
    assert not rig.member.is_idle
    rig.cancelled.update(reads[1:])
    looks = rig.looks
    rig.settle()
    one = rig.looks - looks
    assert rig.member.is_idle
    assert len(rig.answers[reads[0]].kvs) == 3000
    assert all(not rig.answers[read].kvs for read in reads[1:])
    looks = rig.looks
    rig.ask(everything)
    assert one < 2 * (rig.looks - looks) + 10 * len(reads)


def test_a_new_leader_revokes_no_lease_before_it_has_applied_the_entries_of_earlier_terms(
    rig: MemberRig,
) -> None:
    rig.ask(proto.LeaseGrantRequest(ID=1, TTL=5))
    rig = MemberRig(rig.disk)
    turn(rig.member)
    lessor = rig.member.state.lessor
    assert lessor.promoted and lessor.exists(1)
    # Its log is being synced. A renewal that was answered may be among what it has not applied.
    last = rig.member.raft.log.last
    rig.now += 30
    rig.member.tick()
    turn(rig.member)
    assert rig.member.raft.log.last == last
    rig.settle()
    rig.member.tick()
    rig.settle()
    assert not rig.member.state.lessor.exists(1)
