"""Watches: every event once and in order to every watch, at any speed of reading."""

from __future__ import annotations

import gc
import itertools
import math
import random
import sys
from collections import Counter
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from etcdlite import proto, watch
from etcdlite.limits import Limits
from etcdlite.storage.layout import DataDamaged
from etcdlite.storage.steps import finish
from etcdlite.watch import WatchHub, _Index
from etcdlite.watch_responses import encode_event

NOPUT = proto.WatchCreateRequest.NOPUT
NODELETE = proto.WatchCreateRequest.NODELETE
DELETE = proto.Event.DELETE


class ModelStore:
    """A store with its whole history in a list; asks for compacted history are a failure."""

    def __init__(self) -> None:
        self.revision = 1
        self.compacted = 0
        self.history: list[tuple[int, bytes, bool, bytes]] = []
        self.reads = 0
        self.with_previous: bool | None = None
        """How history was read last."""
        self.pauses = 0
        """Steps in which history is read, besides the last."""
        self.damage: int | None = None
        """The revision that cannot be read."""

    def write(self, *changes: tuple[bytes, bytes | None]) -> list[tuple[int, bytes, bool, bytes]]:
        """One revision of changes; a value of None deletes."""
        self.revision += 1
        events = []
        for key, value in changes:
            if value is None:
                kv = proto.KeyValue(key=key, mod_revision=self.revision)
            else:
                kv = proto.KeyValue(
                    key=key, create_revision=1, mod_revision=self.revision, version=1, value=value
                )
            events.append((self.revision, key, value is None, kv.encode()))
        self.history += events
        return events

    def read_events(self, start_revision: int, limit_bytes: int):
        assert start_revision >= self.compacted, "read of compacted history"
        self.reads += 1
        events: list[tuple[int, bytes, bool, bytes]] = []
        size = 0
        for event in self.history:
            if event[0] < start_revision:
                continue
            if size >= limit_bytes and event[0] != events[-1][0]:
                break
            events.append(event)
            size += len(event[3])
        return events

    def event_steps(self, start_revision: int, limit_bytes: int, with_previous: bool):
        """As the store does: what is being read is not given up."""
        self.with_previous = with_previous
        events = self.read_events(start_revision, limit_bytes)
        for _ in range(self.pauses):
            yield
        if self.damage is not None and start_revision <= self.damage:
            raise DataDamaged("data/0000000000000001.data", 77, "a test says so")
        return events

    def previous(self, key: bytes, revision: int) -> bytes | None:
        if revision == self.damage:
            raise DataDamaged("data/0000000000000001.data", 77, "a test says so")
        return None if revision <= self.compacted else self.before(key, revision)

    def before(self, key: bytes, revision: int) -> bytes | None:
        found = None
        for at, its_key, is_delete, kv in self.history:
            if at < revision and its_key == key:
                found = None if is_delete else kv
        return found


class Inbox:
    """A sink that decodes what it is sent."""

    def __init__(self) -> None:
        self.blocked = False
        self.bodies: list[bytes] = []

    def send(self, body: bytes) -> None:
        self.bodies.append(body)

    def take(self) -> list[Any]:
        responses = [proto.WatchResponse.decode(body) for body in self.bodies]
        self.bodies = []
        return responses

    def take_one(self) -> Any:
        (response,) = self.take()
        return response


def header(revision: int) -> bytes:
    return proto.ResponseHeader(cluster_id=1, member_id=2, revision=revision, raft_term=3).encode()


def wanted(key: bytes, range_end: bytes = b"", **fields: Any) -> Any:
    return proto.WatchCreateRequest(key=key, range_end=range_end, **fields)


class Member:
    """A store and a hub on it."""

    def __init__(self, **options: Any) -> None:
        self.store = ModelStore()
        self.hub = WatchHub(self.store, header, rng=random.Random(1), **options)

    def open(self) -> tuple[Any, Inbox]:
        inbox = Inbox()
        return self.hub.open(inbox), inbox

    def write(self, *changes: tuple[bytes, bytes | None]) -> None:
        self.hub.notify(self.store.write(*changes))

    def put(self, *keys: bytes) -> None:
        """A revision per key."""
        for key in keys:
            self.write((key, b"v"))

    def settle(self) -> None:
        while self.hub.run(lambda: True):
            pass


def refers(owner: Any, thing: Any) -> bool:
    """`owner` holds on to `thing`, directly or not."""
    seen: set[int] = set()
    todo = [owner]
    while todo:
        for found in gc.get_referents(todo.pop()):
            if found is thing:
                return True
            if id(found) not in seen and not isinstance(found, (type, ModuleType, FunctionType)):
                seen.add(id(found))
                todo.append(found)
    return False


@pytest.fixture
def member() -> Member:
    return Member()


def seen(responses: list[Any]) -> list[tuple[int, bytes]]:
    """(mod_revision, key) of all events in some responses."""
    return [(e.kv.mod_revision, e.kv.key) for r in responses for e in r.events]


# Creating and cancelling.


def test_a_created_response_tells_the_revision_and_a_watch_begins_after_it(member):
    member.put(b"k")
    stream, inbox = member.open()
    stream.create(wanted(b"k"))
    created = inbox.take_one()
    assert (created.created, created.watch_id, created.canceled) == (True, 0, False)
    assert created.header == proto.ResponseHeader(
        cluster_id=1, member_id=2, revision=2, raft_term=3
    )
    member.put(b"k")
    response = inbox.take_one()
    assert seen([response]) == [(3, b"k")]
    assert response.header.revision == 3


def test_ids_count_up_from_zero_and_pass_over_those_in_use(member):
    stream, _ = member.open()
    given = [stream.create(wanted(b"k", watch_id=n)) for n in (0, 2, 1, 0, 0, -7)]
    assert given == [0, 2, 1, 3, 4, -7]
    other, _ = member.open()
    assert other.create(wanted(b"k")) == 0


def test_an_id_in_use_is_refused_in_etcds_words(member):
    stream, inbox = member.open()
    stream.create(wanted(b"k", watch_id=3))
    assert stream.create(wanted(b"k", watch_id=3)) == -1
    refused = inbox.take()[1]
    assert (refused.watch_id, refused.created, refused.canceled) == (-1, True, True)
    assert refused.cancel_reason == "mvcc: duplicate watch ID provided on the WatchStream"


@pytest.mark.parametrize("range_end", [b"a", b"b"])
def test_an_empty_range_is_refused_in_etcds_words(member, range_end):
    stream, inbox = member.open()
    assert stream.create(wanted(b"b", range_end)) == -1
    refused = inbox.take_one()
    assert (refused.watch_id, refused.created, refused.canceled) == (-1, True, True)
    assert refused.cancel_reason == "mvcc: watcher range is empty"


def test_a_negative_start_revision_is_refused_as_compacted(member):
    stream, inbox = member.open()
    assert stream.create(wanted(b"k", start_revision=-1)) == -1
    reason = inbox.take_one().cancel_reason
    assert reason == "etcdserver: mvcc: required revision has been compacted"


def test_a_refusal_of_the_caller_is_passed_on(member):
    stream, inbox = member.open()
    stream.refuse("etcdserver: permission denied")
    refused = inbox.take_one()
    assert (refused.watch_id, refused.created, refused.canceled) == (-1, True, True)
    assert refused.cancel_reason == "etcdserver: permission denied"


def test_too_many_watches_or_key_bytes_of_a_stream_are_refused():
    member = Member(limits=Limits(max_watches_per_stream=2, max_key_bytes_per_stream=10))
    stream, inbox = member.open()
    assert stream.create(wanted(b"123456")) == 0
    assert stream.create(wanted(b"12345")) == -1
    assert stream.create(wanted(b"1234")) == 1
    stream.cancel(0)
    assert stream.create(wanted(b"a")) == 2
    assert stream.create(wanted(b"b")) == -1
    assert inbox.take()[-1].cancel_reason == "etcdserver: too many requests"


def test_a_cancelled_watch_is_confirmed_and_silent(member):
    stream, inbox = member.open()
    stream.create(wanted(b"k"))
    inbox.take()
    stream.cancel(0)
    cancelled = inbox.take_one()
    assert (cancelled.watch_id, cancelled.created, cancelled.canceled) == (0, False, True)
    assert (cancelled.compact_revision, cancelled.cancel_reason) == (0, "")
    member.put(b"k")
    assert inbox.take() == []
    assert member.hub.watches == 0


def test_cancelling_an_unknown_watch_is_passed_over(member):
    stream, inbox = member.open()
    stream.cancel(5)
    assert inbox.take() == []


def test_a_closed_stream_leaves_nothing_behind(member):
    member.put(b"k", b"k")
    stream, inbox = member.open()
    for start, end in ((2, b""), (0, b""), (99, b""), (0, b"z"), (2, b"z")):
        stream.create(wanted(b"k", end, start_revision=start, progress_notify=True))
    inbox.blocked = True
    member.settle()
    stream.progress()
    stream.close()
    stream.close()
    inbox.take()
    hub = member.hub
    assert (hub.streams, hub.watches, hub.slow_watches, hub.next_tick()) == (0, 0, 0, math.inf)
    assert not refers(hub, stream)
    member.put(b"k")
    assert inbox.take() == []


# What is watched.


@pytest.mark.parametrize(
    ("key", "range_end", "matching"),
    [
        (b"b", b"", [b"b"]),
        (b"b", b"c", [b"b", b"b\0", b"bb"]),
        (b"b", b"\0", [b"b", b"b\0", b"bb", b"c", b"\xff"]),
        (b"\0", b"\0", [b"\0", b"a", b"b", b"b\0", b"bb", b"c", b"\xff"]),
        (b"", b"\0", [b"\0", b"a", b"b", b"b\0", b"bb", b"c", b"\xff"]),
        (b"", b"", [b"\0"]),
        (b"", b"b", [b"\0", b"a"]),
    ],
)
def test_range_conventions_are_etcds(member, key, range_end, matching):
    stream, inbox = member.open()
    stream.create(wanted(key, range_end))
    inbox.take()
    member.put(b"\0", b"a", b"b", b"b\0", b"bb", b"c", b"\xff")
    assert [key for _, key in seen(inbox.take())] == matching


def test_filters_leave_out_puts_or_deletes_or_both(member):
    stream, inbox = member.open()
    for filters in ((), (NOPUT,), (NODELETE,), (NOPUT, NODELETE)):
        stream.create(wanted(b"k", filters=filters))
    inbox.take()
    member.put(b"k")
    member.write((b"k", None))
    got = [(r.watch_id, e.type == DELETE) for r in inbox.take() for e in r.events]
    assert sorted(got) == [(0, False), (0, True), (1, True), (2, False)]


def test_a_delete_carries_key_and_revision_only(member):
    member.put(b"k")
    stream, inbox = member.open()
    stream.create(wanted(b"k", start_revision=2))
    member.write((b"k", None))
    member.settle()
    event = inbox.take()[-1].events[-1]
    assert event.type == DELETE
    assert event.kv == proto.KeyValue(key=b"k", mod_revision=3)


@pytest.mark.parametrize("start_revision", [0, 2])
def test_prev_kv_is_what_the_key_was_before_the_event(member, start_revision):
    stream, inbox = member.open()
    if not start_revision:
        stream.create(wanted(b"k", prev_kv=True))
        stream.create(wanted(b"k"))
    member.write((b"k", b"one"))
    member.write((b"k", b"two"))
    member.write((b"k", None))
    member.write((b"k", b"three"))
    if start_revision:
        stream.create(wanted(b"k", prev_kv=True, start_revision=2))
        stream.create(wanted(b"k", start_revision=2))
        member.settle()
    events = {0: [], 1: []}
    for response in inbox.take():
        events[response.watch_id] += response.events
    assert [e.prev_kv and e.prev_kv.value for e in events[0]] == [None, b"one", b"two", None]
    assert [e.prev_kv for e in events[1]] == [None] * 4


def test_an_event_is_encoded_once_for_all_who_watch_it(member):
    inboxes = []
    for n in range(20):
        stream, inbox = member.open()
        stream.create(wanted(b"k", b"l" if n % 2 else b""))
        inbox.take()
        inboxes.append(inbox)
    with mock.patch.object(watch, "encode_event", wraps=watch.encode_event) as encode:
        member.put(b"k")
    assert encode.call_count == 1
    assert len({inbox.bodies[0] for inbox in inboxes}) == 1


def test_a_put_reads_nothing_of_watches_of_other_keys(member):
    stream, inbox = member.open()
    for n in range(1000):
        stream.create(wanted(b"/%04d" % n))
        stream.create(wanted(b"/%04d/" % n, b"/%04d0" % n))
    inbox.take()
    with mock.patch.object(watch, "encode_event") as encode:
        member.put(b"other", b"/0500.")
    assert not encode.called
    assert inbox.bodies == []


# Batches.


def test_the_events_of_a_batch_come_in_one_response(member):
    stream, inbox = member.open()
    stream.create(wanted(b"k"))
    inbox.take()
    store = member.store
    member.hub.notify([*store.write((b"k", b"1")), *store.write((b"x", b"2"), (b"k", b"3"))])
    response = inbox.take_one()
    assert seen([response]) == [(2, b"k"), (3, b"k")]
    assert response.header.revision == 3


def test_a_large_batch_is_cut_between_revisions():
    member = Member(limits=Limits(response_bytes=50))
    stream, inbox = member.open()
    stream.create(wanted(b"", b"\0"))
    inbox.take()
    events = []
    for _ in range(10):
        events += member.store.write(*((b"k%d" % n, b"0123456789") for n in range(4)))
    member.hub.notify(events)
    responses = inbox.take()
    assert len(responses) == 10
    for response in responses:
        (revision,) = {e.kv.mod_revision for e in response.events}
        assert response.header.revision == revision
        assert len(response.events) == 4


def test_a_response_with_old_events_tells_the_revision_up_to_which_the_watch_has_all():
    # The grpc-proxy of etcd goes on after it, with another watch.
    member = Member(limits=Limits(slice_bytes=50))
    for _ in range(10):
        member.write((b"a", b"0123456789"), (b"b", b"0123456789"))
        member.put(b"other")
    stream, inbox = member.open()
    stream.create(wanted(b"a", b"c", start_revision=2))
    member.settle()
    created, *responses = inbox.take()
    assert created.header.revision == 21 and len(responses) > 1
    for response, after in itertools.pairwise(responses):
        assert response.header.revision < after.events[0].kv.mod_revision
    assert len(seen(responses)) == 20


@pytest.mark.parametrize("start_revision", [0, 2])
def test_fragments_are_smaller_than_the_limit_and_the_last_one_says_so(start_revision):
    member = Member(fragment_bytes=400)
    stream, inbox = member.open()
    write = lambda: member.write(*((b"k%02d" % n, b"x" * 100) for n in range(10)))  # noqa: E731
    if start_revision:
        write()
    stream.create(wanted(b"", b"\0", fragment=True, start_revision=start_revision))
    stream.create(wanted(b"", b"\0", start_revision=start_revision))
    inbox.take()
    if not start_revision:
        write()
    member.settle()
    sizes = [len(body) for body in inbox.bodies]
    responses = inbox.take()
    parts = [r for r in responses if r.watch_id == 0]
    assert [r.fragment for r in parts] == [True] * (len(parts) - 1) + [False]
    assert len(parts) > 2
    assert seen(parts) == [(2, b"k%02d" % n) for n in range(10)]
    assert all(size < 400 for size, r in zip(sizes, responses, strict=True) if r.watch_id == 0)
    (whole,) = [r for r in responses if r.watch_id == 1]
    assert len(whole.events) == 10
    assert not whole.fragment


def test_an_event_larger_than_a_fragment_is_sent_whole():
    member = Member(fragment_bytes=400)
    stream, inbox = member.open()
    stream.create(wanted(b"", b"\0", fragment=True))
    inbox.take()
    member.write((b"a", b"x" * 1000), (b"b", b"x" * 1000))
    assert [(len(r.events), r.fragment) for r in inbox.take()] == [(1, True), (1, False)]


# The past and the future.


def test_a_watch_from_the_past_gets_history_and_then_what_comes(member):
    member.put(b"k", b"x", b"k")
    stream, inbox = member.open()
    stream.create(wanted(b"k", start_revision=2))
    assert inbox.take_one().created
    member.put(b"k")
    assert inbox.take() == [], "history first"
    member.settle()
    member.put(b"k")
    assert seen(inbox.take()) == [(2, b"k"), (4, b"k"), (5, b"k"), (6, b"k")]


def test_a_watch_from_the_future_gets_nothing_below_its_start(member):
    stream, inbox = member.open()
    stream.create(wanted(b"k", start_revision=4))
    stream.create(wanted(b"k", start_revision=(1 << 63) - 3))
    inbox.take()
    for _ in range(4):
        member.put(b"k")
        member.settle()
    responses = inbox.take()
    assert seen(responses) == [(4, b"k"), (5, b"k")]
    assert {r.watch_id for r in responses} == {0}


def test_a_compacted_start_is_created_and_then_cancelled_with_the_compact_revision(member):
    member.put(b"k", b"k", b"k")
    member.store.compacted = 3
    stream, inbox = member.open()
    stream.create(wanted(b"k", start_revision=2))
    member.settle()
    created, cancelled = inbox.take()
    assert (created.watch_id, created.created, created.canceled) == (0, True, False)
    assert (cancelled.watch_id, cancelled.created, cancelled.canceled) == (0, False, True)
    assert (cancelled.compact_revision, cancelled.cancel_reason) == (3, "")
    assert (created.header.revision, cancelled.header.revision) == (4, 0)
    assert member.hub.watches == 0


def test_a_watch_from_the_compact_revision_itself_is_served(member):
    member.put(b"k", b"k")
    member.write((b"k", None))
    member.store.compacted = 4
    stream, inbox = member.open()
    stream.create(wanted(b"k", start_revision=4))
    member.settle()
    assert seen(inbox.take()) == [(4, b"k")]


def test_a_revision_without_events_hides_none_that_come_later():
    """The revision that a restored backup was raised to has none, and is the compacted one."""
    member = Member(limits=Limits(move_step_watches=2))
    member.store.revision = member.store.compacted = member.hub.revision = 10
    inboxes = []
    for _ in range(12):
        stream, inbox = member.open()
        stream.create(wanted(b"k", start_revision=10))
        inboxes.append(inbox)
    for turn in range(1, 8):
        member.hub.run(lambda: True)
        if turn in (3, 5, 7):
            member.put(b"k")
        if turn == 6:
            stream, inbox = member.open()
            stream.create(wanted(b"k", start_revision=10))
            inboxes.append(inbox)
    member.settle()
    for inbox in inboxes:
        assert seen(inbox.take()) == [(11, b"k"), (12, b"k"), (13, b"k")]


def test_what_comes_while_an_empty_revision_is_read_is_not_passed_over(member):
    member.store.pauses = 2
    stream, inbox = member.open()
    stream.create(wanted(b"k", start_revision=1))
    member.hub.run(lambda: True)
    member.hub.run(lambda: True)
    member.put(b"k")
    member.settle()
    assert seen(inbox.take()) == [(2, b"k")]


def test_a_compaction_that_overtakes_a_catch_up_cancels_it():
    member = Member(limits=Limits(slice_bytes=1))
    member.put(*[b"k"] * 10)
    stream, inbox = member.open()
    stream.create(wanted(b"k", start_revision=2))
    member.hub.run(lambda: True)
    member.hub.run(lambda: True)
    member.store.compacted = 8
    member.settle()
    responses = inbox.take()
    assert seen(responses) == [(2, b"k"), (3, b"k")]
    assert responses[-1].compact_revision == 8


def test_a_compaction_does_not_touch_a_watch_that_is_level(member):
    stream, inbox = member.open()
    stream.create(wanted(b"k"))
    inbox.take()
    member.put(b"k", b"k")
    member.store.compacted = 3
    member.settle()
    member.put(b"k")
    assert seen(inbox.take()) == [(2, b"k"), (3, b"k"), (4, b"k")]


def test_watches_from_different_revisions_merge_into_one_reading():
    member = Member(limits=Limits(slice_bytes=1000))
    member.put(*[b"k"] * 500)
    stream, inbox = member.open()
    for start in range(2, 202):
        stream.create(wanted(b"k", start_revision=start))
    inbox.take()
    member.store.reads = 0
    member.settle()
    one_reading = 500 * len(member.store.history[-1][3]) // 1000 + 1
    assert member.store.reads <= one_reading + 1
    counts = dict.fromkeys(range(200), 0)
    for response in inbox.take():
        counts[response.watch_id] += len(response.events)
    assert counts == {n: 500 - n for n in range(200)}


def readings(member: Member, slice_bytes: int) -> float:
    """How many times all of history was read, if each slice had `slice_bytes`."""
    return member.store.reads * slice_bytes / sum(len(event[3]) for event in member.store.history)


def test_watches_of_many_keys_and_ranges_share_one_reading():
    member = Member(limits=Limits(slice_bytes=1000))
    keys = [b"k%04d" % n for n in range(1000)]
    member.put(*keys)
    stream, inbox = member.open()
    for at, key in enumerate(keys):
        stream.create(wanted(key, b"" if at % 2 else key + b"x", start_revision=2))
    inbox.take()
    member.settle()
    assert readings(member, 1000) < 1.2
    assert seen(inbox.take()) == [(n + 2, key) for n, key in enumerate(keys)]


def test_a_watch_that_a_sweep_has_passed_waits_for_the_next_one_and_not_for_its_own():
    member = Member(limits=Limits(slice_bytes=50))
    member.put(*[b"k"] * 500)
    stream, inbox = member.open()
    for _ in range(100):
        stream.create(wanted(b"k", start_revision=2))
        member.hub.run(lambda: True)
    member.settle()
    assert readings(member, 50) < 4
    counts = Counter()
    for response in inbox.take():
        counts[response.watch_id] += len(response.events)
    assert counts == dict.fromkeys(range(100), 500)


def test_a_watch_that_is_a_little_behind_does_not_wait_for_one_that_reads_all_history():
    member = Member(limits=Limits(slice_bytes=100, near_revisions=10))
    member.put(*[b"k"] * 1000)
    far, _ = member.open()
    far.create(wanted(b"k", start_revision=2))
    member.hub.run(lambda: True)
    near, inbox = member.open()
    near.create(wanted(b"k", start_revision=998))
    inbox.take()
    for _ in range(8):
        member.hub.run(lambda: True)
    assert seen(inbox.take()) == [(n, b"k") for n in range(998, 1002)]
    assert far.unsynced and not near.unsynced


def test_a_large_batch_costs_by_its_events_and_not_by_the_watches_that_wait():
    member = Member(limits=Limits(max_events_at_once=100))
    stream, inbox = member.open()
    for n in range(5000):
        stream.create(wanted(b"k%04d" % n))
    inbox.take()
    store = member.store
    member.hub.notify([e for n in range(200) for e in store.write((b"k%04d" % n, b"v"))])
    assert member.hub.slow_watches == 5000
    assert steps(member.hub) <= 3
    assert seen(inbox.take()) == [(n + 2, b"k%04d" % n) for n in range(200)]
    assert member.hub.slow_watches == 0


def test_catching_up_stops_when_the_time_is_up_and_goes_on_later():
    member = Member(limits=Limits(slice_bytes=1))
    member.put(*[b"k"] * 5)
    stream, inbox = member.open()
    stream.create(wanted(b"k", start_revision=2))
    inbox.take()
    assert member.hub.run(lambda: True) is True
    assert seen(inbox.take()) == [(2, b"k")]
    assert member.hub.run(lambda: False) is False
    assert seen(inbox.take()) == [(n, b"k") for n in range(3, 7)]


def steps(hub: WatchHub) -> int:
    """How many steps it takes until there is nothing to do."""
    count = 1
    while hub.run(lambda: True):
        count += 1
    return count


def test_a_revision_with_very_many_events_is_one_response_in_many_steps(member):
    wide, inbox = member.open()
    wide.create(wanted(b"k", b"l"))
    idle, other = member.open()
    idle.create(wanted(b"z"))
    idle.create(wanted(b"z"))
    inbox.take(), other.take()
    member.write(*[(b"k%05d" % n, b"v") for n in range(20_000)])
    assert inbox.bodies == []
    idle.progress()
    member.put(b"k", b"z")
    assert other.bodies == [], "a watch may not get a revision while it lacks another"
    assert steps(member.hub) >= 20 + 15 + 15, "events are encoded and then freed, both in steps"
    first, second = inbox.take()
    assert len(first.events) == 20_000
    assert seen([second]) == [(3, b"k")]
    responses = other.take()
    assert seen(responses) == [(4, b"z"), (4, b"z")]
    assert responses[-1].watch_id == -1 and responses[-1].header.revision == 4
    member.put(b"k", b"z")
    assert seen(inbox.take()) == [(5, b"k")]
    assert seen(other.take()) == [(6, b"z"), (6, b"z")]


@pytest.mark.parametrize("fragment", [False, True])
def test_the_previous_values_of_a_revision_are_encoded_and_joined_in_steps(fragment):
    limits = Limits(max_events_at_once=60, match_step_events=20, step_bytes=10_000)
    member = Member(limits=limits, fragment_bytes=20_000)
    keys = [b"k%02d" % n for n in range(30)]
    member.write(*[(key, bytes(5000)) for key in keys])
    stream, inbox = member.open()
    stream.create(wanted(b"k", b"l", prev_kv=True, fragment=fragment))
    inbox.take()
    encoded_bytes = [0]

    def encode(*parts: Any) -> bytes:
        event = encode_event(*parts)
        encoded_bytes[0] += len(event)
        return event

    most = 0
    with mock.patch.object(watch, "encode_event", encode):
        member.write(*[(key, None) for key in keys])
        assert inbox.bodies == [] and encoded_bytes[0] <= 50_000, "more than is matched at once"
        is_left, count = True, 0
        while is_left:
            before = encoded_bytes[0]
            is_left = member.hub.run(lambda: True)
            most = max(most, encoded_bytes[0] - before)
            count += 1
    assert 0 < most < 20_000
    assert count > 10 + (9 if fragment else 15), "it is encoded in ten steps, and joined in others"
    responses = inbox.take()
    assert len(responses) == (10 if fragment else 1)
    events = [event for response in responses for event in response.events]
    assert [event.kv.key for event in events] == keys
    assert all(len(event.prev_kv.value) == 5000 for event in events)
    member.put(b"k")
    assert seen(inbox.take()) == [(4, b"k")]


@pytest.mark.parametrize("prev_kv", [False, True])
def test_no_step_frees_much_of_a_large_revision(prev_kv):
    """Nor between the ranges that it is sent to, one after the other."""
    member = Member(limits=Limits(max_events_at_once=1000, slice_matches=1000))
    keys = [b"k%05d" % n for n in range(10_000)]
    member.write(*[(key, b"v") for key in keys])
    values = {event[1]: event[3] for event in member.store.history}
    stream, inbox = member.open()
    for start in (b"a", b"b", b"c"):
        stream.create(wanted(start, b"z", prev_kv=prev_kv))
    most, is_left = 0, True
    gc.collect()
    gc.disable()  # What other tests left would count.
    try:
        with mock.patch.object(member.store, "previous", lambda key, revision: values[key]):
            member.write(*[(key, None) for key in keys])
            while is_left:
                before = sys.getallocatedblocks()
                is_left = member.hub.run(lambda: True)
                most = max(most, before - sys.getallocatedblocks())
    finally:
        gc.enable()
    assert [len(response.events) for response in inbox.take()[3:]] == [10_000] * 3
    assert most < 5000


def with_watches_of_one_key(count: int, max_sends_at_once: int):
    """A member, and the inbox of a stream with this many watches of `k`."""
    member = Member(limits=Limits(max_sends_at_once=max_sends_at_once))
    stream, inbox = member.open()
    for _ in range(count):
        stream.create(wanted(b"k"))
    inbox.take()
    return member, inbox


def test_large_events_are_put_into_few_responses_at_once():
    member, inbox = with_watches_of_one_key(8, max_sends_at_once=60)
    member.write((b"k", bytes(100_000)))
    assert len(inbox.bodies) == 3, "each has its own id, so it is a copy"
    member.settle()
    assert sorted(response.watch_id for response in inbox.take()) == list(range(8))


def test_watches_that_come_and_go_while_a_large_revision_is_sent_see_it_once_or_not(member):
    streams = []
    for _ in range(3):
        stream, inbox = member.open()
        stream.create(wanted(b"k", b"l"))
        inbox.take()
        streams.append((stream, inbox))
    member.write(*[(b"k%05d" % n, b"v") for n in range(6000)])
    member.hub.run(lambda: True)
    member.hub.run(lambda: True)
    late, inbox = member.open()
    late.create(wanted(b"k", b"l"))
    inbox.take()
    streams[0][0].cancel(0)
    streams[1][0].close()
    member.settle()
    assert [len(r.events) for r in streams[0][1].take()] == [0]
    assert streams[1][1].take() == []
    assert [len(r.events) for r in streams[2][1].take()] == [6000]
    assert inbox.take() == []
    member.put(b"k")
    assert seen(inbox.take()) == seen(streams[2][1].take()) == [(3, b"k")]


def test_an_event_for_very_many_watches_is_sent_to_some_at_once_and_to_all_in_steps():
    member, inbox = with_watches_of_one_key(25, max_sends_at_once=10)
    member.put(b"k")
    assert len(inbox.bodies) == 10
    member.put(b"k")
    member.settle()
    counts = Counter()
    for response in inbox.take():
        assert [e.kv.mod_revision for e in response.events] in ([2], [3], [2, 3])
        counts[response.watch_id] += len(response.events)
    assert counts == dict.fromkeys(range(25), 2)


def test_an_event_for_more_watches_than_are_moved_at_once_moves_none(monkeypatch):
    """To move a hundred thousand watches out of their index at a put would take seconds."""
    removed = []
    remove = _Index.remove
    monkeypatch.setattr(
        _Index, "remove", lambda index, watch: removed.append(watch) or remove(index, watch)
    )
    for count, moved in ((30, 20), (31, 0)):
        member = Member(limits=Limits(max_sends_at_once=10, max_moves_at_once=40))
        stream, inbox = member.open()
        for _ in range(count):
            stream.create(wanted(b"k"))
        inbox.take()
        removed.clear()
        member.put(b"k")
        assert len(removed) == moved
        member.settle()
        assert len(inbox.take()) == count
        assert member.hub.slow_watches == 0


def test_events_in_many_ranges_are_matched_in_steps():
    """A thousand ranges that hold each of a thousand keys would be a million matches at once."""
    for count, at_once in ((10, 20), (11, 0)):
        member = Member(limits=Limits(max_events_at_once=60, match_step_events=20))
        stream, inbox = member.open()
        for n in range(20):
            stream.create(wanted(b"a%02d" % n, b"z"))
        inbox.take()
        member.write(*[(b"k%02d" % n, b"v") for n in range(count)])
        assert len(inbox.bodies) == at_once
        member.settle()
        assert [len(response.events) for response in inbox.take()] == [count] * 20


class OneAnswer(Inbox):
    """A sink that is blocked by each response, until it is read."""

    def send(self, body: bytes) -> None:
        super().send(body)
        self.blocked = True


def test_watches_of_one_key_from_many_revisions_share_steps_and_memory():
    """A group for each of them, with all events from its start on, would be a quadratic number."""
    count = 300
    member = Member(limits=Limits(match_step_events=20, slice_bytes=1 << 20))
    member.put(*[b"k"] * count)
    stream, inbox = member.open()
    for n in range(count):
        stream.create(wanted(b"k", start_revision=2 + n))
    inbox.take()
    held: list[int] = []
    send_steps = WatchHub._send_steps

    def counted(hub: Any, batches: Any, *rest: Any) -> Any:
        held.append(sum(map(len, batches.values())))
        return send_steps(hub, batches, *rest)

    with mock.patch.object(WatchHub, "_send_steps", counted):
        assert steps(member.hub) > sum(held) // 20 // watch.MATCHES_PER_EVENT
    assert max(held) <= (watch.MAX_STARTS + 2) ** 2
    assert member.store.reads == 1, "what follows a slice that ends early is kept"
    got: dict[int, list[int]] = {n: [] for n in range(count)}
    for response in inbox.take():
        got[response.watch_id] += [event.kv.mod_revision for event in response.events]
    assert got == {n: list(range(2 + n, count + 2)) for n in range(count)}


def test_a_large_revision_is_not_read_again_for_each_few_revisions_before_it():
    member = Member(limits=Limits(max_events_at_once=300, slice_bytes=1 << 20))
    member.put(*[b"k"] * 300)
    member.write(*[(b"k%03d" % n, b"v") for n in range(400)])
    stream, inbox = member.open()
    for n in range(300):
        stream.create(wanted(b"k", b"l", start_revision=2 + n))
    inbox.take()
    member.settle()
    assert member.store.reads == 2, "once to its end, and once from it on"
    got: Counter[int] = Counter()
    for response in inbox.take():
        got[response.watch_id] += len(response.events)
    assert got == {n: 700 - n for n in range(300)}


def test_a_watch_that_begins_in_a_slice_that_has_many_starts_already_misses_nothing():
    """It arrives between two steps in which the others join."""
    member = Member(limits=Limits(move_step_watches=1, slice_bytes=1 << 20))
    member.put(*[b"k"] * 100)
    stream, inbox = member.open()
    for n in range(50):
        stream.create(wanted(b"k", start_revision=2 + 2 * n))
    for _ in range(60):
        member.hub.run(lambda: True)
    late, other = member.open()
    for n in range(50):
        late.create(wanted(b"k", start_revision=3 + 2 * n))
    member.settle()
    for box, first in ((inbox, 2), (other, 3)):
        got: dict[int, list[int]] = {n: [] for n in range(50)}
        for response in box.take():
            got[response.watch_id] += [event.kv.mod_revision for event in response.events]
        assert got == {n: list(range(first + 2 * n, 102)) for n in range(50)}


def test_the_matches_of_a_large_revision_are_counted_in_steps():
    member = Member(limits=Limits(max_events_at_once=50, match_step_events=20, slice_matches=100))
    stream, inbox = member.open()
    for n in range(15):
        stream.create(wanted(b"a%02d" % n, b"z"))
    inbox.take()
    member.write(*[(b"k%02d" % n, b"v") for n in range(60)])
    index = member.hub.synced
    count = sum(
        1 for _ in index.part_steps(member.store.history, member.hub.limits, random.Random(1))
    )
    assert count >= 60 // 2, "two events in 15 ranges fill a step"
    member.settle()
    assert [len(response.events) for response in inbox.take()] == [60] * 15


def test_nothing_is_matched_for_a_client_that_does_not_read():
    """Nor for one that is gone: a large revision in many ranges would go on for minutes."""
    member = Member(limits=Limits(max_events_at_once=50, slice_matches=100, move_step_watches=3))
    inbox = OneAnswer()
    stream = member.hub.open(inbox)
    for n in range(40):
        stream.create(wanted(b"a%02d" % n, b"z"))
    inbox.take()
    inbox.blocked = False
    with mock.patch.object(watch, "encode_event", mock.Mock(wraps=encode_event)) as encode:
        member.write(*[(b"k%02d" % n, b"v") for n in range(60)])
        member.settle()
        assert encode.call_count == 60
        (first,) = inbox.take()
        assert len(first.events) == 60
    ids = [first.watch_id]
    while member.hub.slow_watches:
        inbox.blocked = False
        stream.wake()
        member.settle()
        ids += [response.watch_id for response in inbox.take() if len(response.events) == 60]
    assert sorted(ids) == list(range(40))


def test_groups_that_are_not_sent_to_and_events_that_are_joined_fill_steps_too():
    member = Member(limits=Limits(max_events_at_once=50, send_step_watches=10))
    inbox = OneAnswer()
    stream = member.hub.open(inbox)
    for n in range(100):
        stream.create(wanted(b"k%03d" % n))
    inbox.take()
    batches = member.hub._match_steps(
        member.hub.synced, member.store.write(*[(b"k%03d" % n, b"v") for n in range(100)])
    )
    groups = finish(batches)
    assert len(groups) == 100
    inbox.blocked = True
    assert sum(1 for _ in member.hub._send_steps(groups, 2, 1000)) >= 100 // 10 - 1
    inbox.blocked = False
    many = {group: batch * 10 * watch.EVENTS_PER_SEND for group, batch in groups.items()}
    assert sum(1 for _ in member.hub._send_steps(many, 2, 1000)) >= 99


def test_the_watches_of_many_streams_are_woken_in_steps(member):
    inboxes = []
    streams = []
    for _ in range(1000):
        stream, inbox = member.open()
        stream.create(wanted(b"k"))
        inbox.blocked = True
        streams.append(stream)
        inboxes.append(inbox)
    member.put(b"k")
    member.settle()
    for stream, inbox in zip(streams, inboxes, strict=True):
        inbox.blocked = False
        stream.wake()
    left = [1000]
    while left[-1]:
        member.hub.run(lambda: True)
        left.append(sum(len(stream.parked) for stream in streams))
        assert left[-2] - left[-1] <= member.hub.limits.move_step_watches
    member.settle()
    assert all(seen(inbox.take()[1:]) == [(2, b"k")] for inbox in inboxes)


def test_streams_that_are_woken_do_not_hold_up_other_chores():
    member = Member(limits=Limits(slice_bytes=100))
    parked = []
    for _ in range(10):
        inbox = OneAnswer()
        stream = member.hub.open(inbox)
        stream.create(wanted(b"k"))
        parked.append((stream, inbox))
    member.put(*[b"k"] * 20)
    member.settle()
    late, box = member.open()
    late.create(wanted(b"k", start_revision=2))
    assert box.take_one().created
    member.store.compacted = 10
    for stream, inbox in parked:
        inbox.blocked = False
        stream.wake()
        member.hub.run(lambda: True)
    assert box.take_one().compact_revision == 10


def test_a_stream_with_many_watches_is_closed_in_steps(member):
    stream, inbox = member.open()
    for n in range(2000):
        stream.create(wanted(b"k%d" % n))
    inbox.take()
    stream.close()
    assert member.hub.watches > 0
    member.put(b"k1", b"k1999")
    assert steps(member.hub) >= 2000 // member.hub.limits.move_step_watches
    assert inbox.bodies == []
    assert (member.hub.watches, member.hub.key_bytes, member.hub.slow_watches) == (0, 0, 0)
    assert not refers(member.hub, stream)


def test_all_streams_together_have_a_limit():
    member = Member(limits=Limits(max_watches=3, max_key_bytes=10))
    streams = [member.open() for _ in range(4)]
    ids = [stream.create(wanted(b"k")) for stream, _ in streams]
    assert ids == [0, 0, 0, -1]
    refused = streams[3][1].take_one()
    assert (refused.canceled, refused.cancel_reason) == (True, "etcdserver: too many requests")
    streams[0][0].close()
    assert streams[3][0].create(wanted(b"k" * 9)) == -1
    assert streams[3][0].create(wanted(b"k" * 8)) == 0


def test_previous_values_count_only_while_a_watch_needs_them(member):
    """They are looked up for each event, which nearly doubles the time to read history."""
    store, streams = member.store, [member.open()[0] for _ in range(2)]
    for _ in range(3):
        member.put(b"k")
    for prev_kv in (False, True):
        streams[0].create(wanted(b"k", start_revision=2, prev_kv=prev_kv))
        member.settle()
        assert store.with_previous is prev_kv
    streams[1].create(wanted(b"k", start_revision=2, prev_kv=True))
    streams[0].cancel(1)
    streams[0].create(wanted(b"k", start_revision=2))
    member.settle()
    assert store.with_previous
    streams[1].close()
    member.settle()
    streams[0].create(wanted(b"k", start_revision=2))
    member.settle()
    assert not store.with_previous


def test_a_damaged_record_ends_the_watches_that_need_it_and_no_others(member):
    needs, inbox = member.open()
    needs.create(wanted(b"k", prev_kv=True))
    needs.create(wanted(b"k"))
    inbox.take()
    member.store.damage = 2
    member.put(b"k")
    ended, served = sorted(inbox.take(), key=lambda response: response.watch_id)
    assert (ended.canceled, ended.cancel_reason) == (True, "etcdserver: corrupt cluster")
    assert seen([served]) == [(2, b"k")]
    late, other = member.open()
    late.create(wanted(b"k", start_revision=2))
    late.create(wanted(b"k", start_revision=3))
    other.take()
    member.put(b"k")
    member.settle()
    ended, served = sorted(other.take(), key=lambda response: response.watch_id)
    assert (ended.watch_id, ended.cancel_reason) == (0, "etcdserver: corrupt cluster")
    assert seen([served]) == [(3, b"k")]
    assert member.hub.watches == 2


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_watch_that_ends_for_a_damaged_record_brings_no_progress_before_events(member, size):
    stream, inbox = member.open()
    stream.create(wanted(b"k", prev_kv=True))
    stream.create(wanted(b"k"))
    inbox.take()
    inbox.blocked = True
    stream.progress()
    inbox.blocked = False  # It is not woken yet.
    member.store.damage = 2
    events = [event for _ in range(3) for event in member.store.write((b"k", b"v" * size))]
    member.hub.notify(events)
    member.settle()
    *served, progress = (body for body in inbox.take() if not body.canceled)
    assert [revision for revision, _ in seen(served)] == [2, 3, 4]
    assert (progress.watch_id, progress.header.revision) == (-1, 4)


def test_what_is_applied_but_not_notified_yet_comes_once(member):
    member.put(b"k")
    stream, inbox = member.open()
    stream.create(wanted(b"k", start_revision=2))
    later = member.store.write((b"k", b"later"))
    member.settle()
    member.hub.notify(later)
    assert seen(inbox.take()) == [(2, b"k"), (3, b"k")]


def test_a_snapshot_in_place_of_the_log_is_caught_up_with(member):
    stream, inbox = member.open()
    stream.create(wanted(b"k"))
    stream.create(wanted(b"k", start_revision=4))
    inbox.take()
    member.put(b"k")
    member.store.write((b"k", b"v"))
    member.store.write((b"k", b"v"))
    member.hub.restored(member.store)
    member.settle()
    member.put(b"k")
    got = [(r.watch_id, e.kv.mod_revision) for r in inbox.take() for e in r.events]
    assert sorted(got) == [(0, 2), (0, 3), (0, 4), (0, 5), (1, 4), (1, 5)]


def test_a_snapshot_that_has_compacted_what_was_missed_cancels(member):
    stream, inbox = member.open()
    stream.create(wanted(b"k"))
    inbox.take()
    member.store.write((b"k", b"v"))
    member.store.write((b"k", b"v"))
    member.store.compacted = 3
    member.hub.restored(member.store)
    member.settle()
    assert inbox.take_one().compact_revision == 3


# Slow readers.


def test_a_batch_that_meets_a_blocked_reader_is_read_from_its_first_revision(member):
    stream, inbox = member.open()
    stream.create(wanted(b"k"))
    inbox.take()
    inbox.blocked = True
    store = member.store
    member.hub.notify([e for _ in range(3) for e in store.write((b"k", b"v"))])
    inbox.blocked = False
    stream.wake()
    member.settle()
    assert seen(inbox.take()) == [(2, b"k"), (3, b"k"), (4, b"k")]


def test_a_slow_reader_holds_no_events_and_misses_none(member):
    slow, inbox = member.open()
    slow.create(wanted(b"k"))
    fast, other = member.open()
    fast.create(wanted(b"k"))
    inbox.take(), other.take()
    member.put(b"k")
    inbox.blocked = True
    member.put(b"k", b"k", b"k")
    assert member.hub.run(lambda: False) is False, "a blocked reader is no work"
    assert len(inbox.bodies) == 1
    assert member.hub.slow_watches == 1
    inbox.blocked = False
    slow.wake()
    member.settle()
    member.put(b"k")
    everything = [(n, b"k") for n in range(2, 7)]
    assert seen(inbox.take()) == everything
    assert seen(other.take()) == everything
    assert member.hub.slow_watches == 0


def test_a_reader_that_blocks_while_catching_up_stops_there():
    member = Member(limits=Limits(slice_bytes=1))
    member.put(*[b"k"] * 5)
    stream, inbox = member.open()
    stream.create(wanted(b"k", start_revision=2))
    member.hub.run(lambda: True)
    inbox.blocked = True
    assert member.hub.run(lambda: False) is False
    assert seen(inbox.take()) == [(2, b"k")]
    stream.wake()
    assert member.hub.run(lambda: False) is False, "still blocked"
    inbox.blocked = False
    stream.wake()
    member.settle()
    assert seen(inbox.take()) == [(n, b"k") for n in range(3, 7)]


def test_a_slow_reader_that_a_compaction_overtakes_is_cancelled(member):
    stream, inbox = member.open()
    stream.create(wanted(b"k"))
    inbox.take()
    inbox.blocked = True
    member.put(b"k", b"k", b"k")
    member.store.compacted = 3
    member.settle()
    assert inbox.take() == []
    inbox.blocked = False
    stream.wake()
    member.settle()
    assert inbox.take_one().compact_revision == 3


# Progress.


def test_progress_is_told_for_all_watches_of_a_stream(member):
    stream, inbox = member.open()
    stream.create(wanted(b"k"))
    stream.create(wanted(b"x"))
    member.put(b"other")
    inbox.take()
    stream.progress()
    told = inbox.take_one()
    assert (told.watch_id, told.header.revision, len(told.events)) == (-1, 2, 0)


def test_progress_of_a_stream_without_watches_is_not_told(member):
    stream, inbox = member.open()
    stream.progress()
    assert inbox.take() == []
    stream.create(wanted(b"k"))
    assert inbox.take_one().created, "the request is not remembered either"


def test_progress_waits_for_the_watches_that_are_behind():
    member = Member(limits=Limits(slice_bytes=1))
    member.put(b"k", b"x", b"k")
    stream, inbox = member.open()
    stream.create(wanted(b"k", start_revision=2))
    stream.create(wanted(b"x", start_revision=3))
    stream.progress()
    member.settle()
    stream.progress()
    responses = inbox.take()[2:]
    assert [r.watch_id for r in responses] == [0, 1, 0, -1, -1]
    assert responses[-1].header.revision == 4


def test_progress_waits_for_a_watch_that_catches_up_with_those_that_lag():
    member = Member(limits=Limits(max_events_at_once=5, match_step_events=5, slice_bytes=200))
    other, _ = member.open()
    other.create(wanted(b"k", b"l"))
    stream, inbox = member.open()
    member.write(*[(b"k%d" % n, b"v") for n in range(10)])
    member.put(*[b"k1"] * 20)
    assert member.hub.lag is not None
    stream.create(wanted(b"k", b"l", start_revision=10))
    stream.progress()
    member.settle()
    created, *events, progress = inbox.take()
    assert created.created and len(seen(events)) == 13
    assert (progress.watch_id, progress.header.revision) == (-1, member.store.revision)


def test_progress_waits_for_the_reader(member):
    stream, inbox = member.open()
    stream.create(wanted(b"k"))
    inbox.take()
    inbox.blocked = True
    stream.progress()
    member.put(b"k")
    assert inbox.take() == []
    inbox.blocked = False
    stream.wake()
    member.settle()
    assert [(r.watch_id, r.header.revision) for r in inbox.take()] == [(0, 2), (-1, 2)]


def test_progress_waits_no_longer_for_a_watch_that_is_cancelled(member):
    stream, inbox = member.open()
    stream.create(wanted(b"k"))
    stream.create(wanted(b"k", start_revision=100))
    inbox.take()
    stream.progress()
    assert inbox.take() == [], "told of a lower revision, a client would resume from there"
    stream.cancel(1)
    assert [(r.watch_id, r.canceled) for r in inbox.take()] == [(1, True), (-1, False)]


def test_periodic_progress_comes_to_idle_watches_that_asked_for_it():
    member = Member(progress_interval_s=10.0)
    hub = member.hub
    stream, inbox = member.open()
    hub.tick(100.0)
    stream.create(wanted(b"k", progress_notify=True))
    stream.create(wanted(b"k"))
    inbox.take()
    due = hub.next_tick()
    assert 110.0 <= due <= 111.0
    hub.tick(109.0)
    assert inbox.take() == []
    member.put(b"other")
    hub.tick(due)
    told = inbox.take_one()
    assert (told.watch_id, told.header.revision, len(told.events)) == (0, 2, 0)
    member.put(b"k")
    inbox.take()
    due = hub.next_tick()
    hub.tick(due)
    assert inbox.take() == [], "events were sent since"
    hub.tick(hub.next_tick())
    assert inbox.take_one().watch_id == 0


def test_periodic_progress_is_not_told_to_those_who_are_not_level():
    member = Member(progress_interval_s=10.0)
    member.put(b"k")
    stream, inbox = member.open()
    stream.create(wanted(b"k", start_revision=2, progress_notify=True))
    stream.create(wanted(b"k", start_revision=9, progress_notify=True))
    inbox.take()
    member.hub.tick(1000.0)
    assert inbox.take() == []


def test_one_tick_serves_a_bounded_number_of_timers():
    member = Member(progress_interval_s=10.0, limits=Limits(tick_timers=3))
    stream, inbox = member.open()
    for _ in range(7):
        stream.create(wanted(b"k", progress_notify=True))
    inbox.take()
    told = []
    while member.hub.next_tick() <= 20.0:
        member.hub.tick(20.0)
        told.append(len(inbox.take()))
    assert told == [3, 3, 1]


# Memory.


def test_watches_that_ended_leave_no_cycles_behind():
    """In a server no run of the garbage collector visits old objects, so nothing frees a cycle."""
    member = Member(progress_interval_s=10.0)
    member.put(b"k", b"k")
    gc.collect()
    gc.disable()
    try:
        stream, inbox = member.open()
        inbox.stream = stream
        for n in range(300):
            start_revision = (0, 2, 99)[n % 3]
            end = b"l" if n % 2 else b""
            request = wanted(b"k", end, start_revision=start_revision, progress_notify=True)
            stream.create(request)
        member.settle()
        for watch_id in range(200):
            stream.cancel(watch_id)
        stream.close()
        member.settle()
        assert member.hub.watches == 0
        del stream, inbox, request
        assert gc.collect() == 0, "unreachable objects"
    finally:
        gc.enable()


# Everything at once, against the plain history.

KEYS = [b"a", b"b", b"ba", b"c"]
RANGES = [(b"a", b""), (b"b", b""), (b"b", b"c"), (b"a", b"c"), (b"b", b"\0"), (b"\0", b"\0")]


class Expectation:
    """What one watch asked for, and how far it has been told."""

    def __init__(self, request: Any, start: int) -> None:
        self.request = request
        self.start = start
        self.got = 0
        self.open_fragment = False

    def events(self, history: list[tuple[int, bytes, bool, bytes]]):
        request = self.request
        key, end = request.key, request.range_end
        skip = DELETE if NODELETE in request.filters else None
        for event in history:
            at, its_key, is_delete, _ = event
            if end == b"\0":
                matches = its_key >= key
            else:
                matches = key <= its_key < end if end else its_key == key
            if not matches or at < self.start:
                continue
            if NOPUT in request.filters and not is_delete:
                continue
            if skip is not None and is_delete:
                continue
            yield event


class Client:
    """Reads a stream and checks every response against the history."""

    def __init__(self, machine: Watching) -> None:
        self.store = machine.member.store
        self.hub = machine.member.hub
        self.stream, self.inbox = machine.member.open()
        self.asked: list[Any] = []
        self.cancelling: set[int] = set()
        self.live: dict[int, Expectation] = {}

    def read(self) -> None:
        for response in self.inbox.take():
            if response.created:
                request = self.asked.pop(0)
                if not response.canceled:
                    assert response.watch_id not in self.live
                    start = request.start_revision or response.header.revision + 1
                    self.live[response.watch_id] = Expectation(request, start)
            elif response.canceled:
                watching = self.live.pop(response.watch_id)
                assert not watching.open_fragment
                if response.compact_revision:
                    assert response.compact_revision <= self.store.compacted
                    assert watching.start < response.compact_revision
                else:
                    self.cancelling.remove(response.watch_id)
            elif response.events:
                self.read_events(self.live[response.watch_id], response)
            else:
                told = self.live.values()
                if response.watch_id != -1:
                    told = [self.live[response.watch_id]]
                for watching in told:
                    self.check_complete(watching, response.header.revision)

    def read_events(self, watching: Expectation, response: Any) -> None:
        expected = list(watching.events(self.store.history))
        assert response.header.revision >= response.events[-1].kv.mod_revision
        for event in response.events:
            assert watching.got < len(expected), "an event that was not asked for"
            at, key, is_delete, kv = expected[watching.got]
            watching.got += 1
            assert event.kv.encode() == kv, (event, at, key)
            assert (event.type == DELETE) == is_delete
            if event.prev_kv is not None:
                assert watching.request.prev_kv
                assert event.prev_kv.encode() == self.store.before(key, at)
            elif watching.request.prev_kv and at > self.store.compacted:
                assert self.store.before(key, at) is None
        watching.open_fragment = response.fragment
        assert watching.request.fragment or not response.fragment
        if not response.fragment:
            self.check_complete(watching, response.header.revision)

    def check_complete(self, watching: Expectation, revision: int) -> None:
        due = [event for event in watching.events(self.store.history) if event[0] <= revision]
        assert watching.got >= len(due), "told of a revision before its events"


class Watching(RuleBasedStateMachine):
    """Writes, readers of all kinds, compactions and snapshots in any order."""

    clients = st.integers(0, 2)
    changes = st.lists(
        st.dictionaries(st.sampled_from(KEYS), st.sampled_from([None, b"", b"x" * 40]), min_size=1),
        min_size=1,
        max_size=5,
    )
    requests = st.builds(
        lambda watched, **fields: {"key": watched[0], "range_end": watched[1], **fields},
        watched=st.sampled_from(RANGES),
        # Relative to the store's revision; 0: from now on.
        start_revision=st.sampled_from([0, 0, 0, -6, -5, -4, -3, -2, -1, 1, 3]),
        watch_id=st.sampled_from([0, 0, 0, 1, 5, -3]),
        filters=st.sampled_from([(), (), (NOPUT,), (NODELETE,)]),
        prev_kv=st.booleans(),
        fragment=st.booleans(),
        progress_notify=st.booleans(),
    )

    @initialize(
        fragment_bytes=st.sampled_from([150, 100_000]), slice_bytes=st.sampled_from([60, 400])
    )
    def begin(self, fragment_bytes: int, slice_bytes: int) -> None:
        limits = Limits(
            slice_bytes=slice_bytes,
            slice_matches=3,
            near_revisions=4,
            max_events_at_once=4,
            max_sends_at_once=2,
            match_step_events=2,
            send_step_watches=1,
            move_step_watches=2,
            response_bytes=100,
            tick_timers=2,
        )
        self.few_starts = mock.patch.object(watch, "MAX_STARTS", 1)
        self.few_starts.start()
        self.member = Member(fragment_bytes=fragment_bytes, progress_interval_s=1.0, limits=limits)
        self.member.store.pauses = 1
        self.waiting: list[Any] = []
        self.readers = [Client(self) for _ in range(3)]
        self.now = 0.0

    def teardown(self) -> None:
        if not hasattr(self, "readers"):
            return
        try:
            self.check_end()
        finally:
            self.few_starts.stop()

    def check_end(self) -> None:
        self.notify()
        for client in self.readers:
            client.inbox.blocked = False
            client.stream.wake()
        self.member.settle()
        for client in self.readers:
            client.read()
            assert not client.asked and not client.cancelling
            assert not client.stream._wants_progress or client.stream.unsynced
            for watching in client.live.values():
                assert watching.got == len(list(watching.events(client.store.history)))
            client.stream.progress()
            future = any(w.start > self.member.hub.revision + 1 for w in client.live.values())
            assert len(client.inbox.take()) == (1 if client.live and not future else 0)
        assert self.member.hub.slow_watches == 0

    @rule(batch=changes)
    def write(self, batch: list[dict[bytes, bytes | None]]) -> None:
        self.write_unnoticed(batch)
        self.notify()

    @rule(batch=changes)
    def write_to_blocked_readers(self, batch: list[dict[bytes, bytes | None]]) -> None:
        for reader in self.readers[:2]:
            reader.inbox.blocked = True
        self.write(batch)

    @rule(batch=changes)
    def write_unnoticed(self, batch: list[dict[bytes, bytes | None]]) -> None:
        for change in batch:
            self.waiting += self.member.store.write(*change.items())

    @rule(is_snapshot=st.sampled_from([False, False, False, True]))
    def notify(self, is_snapshot: bool = False) -> None:
        waiting, self.waiting = self.waiting, []
        if is_snapshot:
            self.member.hub.restored(self.member.store)
        else:
            self.member.hub.notify(waiting)

    @rule(requests=st.lists(st.tuples(clients, requests), min_size=1, max_size=6))
    def create(self, requests: list[tuple[int, dict[str, Any]]]) -> None:
        for client, fields in requests:
            request = wanted(**fields)
            if request.start_revision:
                relative = self.member.store.revision + request.start_revision
                request.start_revision = max(1, relative)
            self.readers[client].asked.append(request)
            self.readers[client].stream.create(request)

    @rule(client=clients, which=st.integers(0, 5))
    def cancel(self, client: int, which: int) -> None:
        reader = self.readers[client]
        reader.read()
        if which < len(reader.live):
            watch_id = sorted(reader.live)[which]
            reader.cancelling.add(watch_id)
            reader.stream.cancel(watch_id)

    @rule(client=clients, seconds=st.sampled_from([0.5, 1.2]))
    def ask_for_progress(self, client: int, seconds: float) -> None:
        self.readers[client].stream.progress()
        self.now += seconds
        self.member.hub.tick(self.now)

    @rule(client=clients, blocked=st.booleans())
    def block(self, client: int, blocked: bool) -> None:
        self.readers[client].inbox.blocked = blocked
        self.readers[client].stream.wake()

    @rule(client=clients, slices=st.integers(0, 4))
    def run_slices(self, client: int, slices: int) -> None:
        """The more of them, the likelier is it that some reader blocks in between."""
        for at in range(slices):
            self.member.hub.run(lambda: True)
            self.readers[client].inbox.blocked |= at == 2

    @rule(client=st.integers(0, 8), back=st.integers(1, 8))
    def disturb(self, client: int, back: int) -> None:
        """A client reconnects, or history is compacted."""
        if client < len(self.readers):
            reader = self.readers[client]
            reader.read()
            reader.stream.close()
            assert reader.inbox.take() == []
            self.readers[client] = Client(self)
        else:
            store = self.member.store
            store.compacted = max(store.compacted, store.revision - back)

    @invariant()
    def responses_are_as_promised(self) -> None:
        for reader in getattr(self, "readers", ()):
            reader.read()
            if not reader.inbox.blocked and reader.stream.parked:
                assert reader.stream in self.member.hub.waking

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "readers"):
            hub = self.member.hub
            streams = [*(reader.stream for reader in self.readers), *hub.closing]
            assert hub.watches == sum(map(len, streams))
            assert hub.synced.watches == len(hub.synced.first(1000)) <= hub.watches


TestWatchesAgainstTheHistory = Watching.TestCase
TestWatchesAgainstTheHistory.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, derandomize=True
)
