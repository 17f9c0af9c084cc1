"""The Lock and Election services, driven in process: what they answer, what they leave behind, and
that they stand in the same lines as the client's recipes."""

from __future__ import annotations

import gc
import random
import tracemalloc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rigs.held_memory import held_bytes
from rigs.lone_member import LoneMember, turn
from sim.world import Node
from test_cluster import Cluster

from etcdlite import errors, frames, methods, proto
from etcdlite.client import operations as client_calls
from etcdlite.client import recipes
from etcdlite.errors import UNKNOWN, EtcdError
from etcdlite.replica import reads
from etcdlite.request import Waiter
from etcdlite.storage.steps import finish
from etcdlite.wire import locks as concurrency
from etcdlite.wire.calls import PIECES_PER_SLICE, Call, Calls

ENDED = "ended"
EVERYTHING = proto.RangeRequest(key=b"\0", range_end=b"\0")


class Caller:
    """One client's connection: opens calls and keeps what comes back, by request id."""

    def __init__(self, lone: LoneMember | Node) -> None:
        self.lone = lone
        self.calls = Calls(lone.member, self)
        self.received: dict[int, list[Any]] = {}
        self.opened: list[weakref.ref[Call]] = []
        self.is_reading = True

    certificate_user = ""
    outbox = SimpleNamespace(is_queued=True)

    def token(self, request_id: int) -> str:
        return ""

    def begin(self, method: str, **fields: Any) -> int:
        """Start a call, and let the member do what it can do of it."""
        request_id = self.send(method, **fields)
        self.lone.settle()
        return request_id

    def send(self, method: str, **fields: Any) -> int:
        """Start a call only: what it asks the member for is not carried out yet."""
        about = methods.METHOD_BY_NAME[method]
        request_id = len(self.received) + 1
        self.received[request_id] = []
        call = self.calls.open(request_id, about.number, concurrency.CALLS[about.full])
        self.opened.append(weakref.ref(call))
        self.calls.message(request_id, about.request(**fields).encode())
        while self.calls.have_more:
            self.calls.produce()
        return request_id

    def ask(self, method: str, **fields: Any) -> Any:
        """The one answer of a call that does not wait."""
        return self.answer(self.begin(method, **fields))

    def answer(self, request_id: int) -> Any:
        received = self.received[request_id]
        assert len(received) == 2 and received[1] == ENDED, received
        return received[0]

    def failure(self, method: str, **fields: Any) -> tuple[int, str]:
        (failure,) = self.received[self.begin(method, **fields)]
        assert isinstance(failure, EtcdError), failure
        return failure.code, failure.text

    def cancel(self, request_id: int) -> None:
        assert self.calls.close(request_id)
        self.lone.settle()

    def disconnect(self) -> None:
        for request_id in self.received:
            self.calls.close(request_id)
        self.lone.settle()

    # What a call answers through.

    is_blocked = False

    def resume(self, request_id: int) -> None:
        self.calls.resume(request_id)

    def send_message(self, request_id: int, method: int, body: bytes) -> None:
        assert request_id in self.calls, "an answer after the call was closed"
        self.received[request_id].append(methods.METHODS[method].response.decode(body))

    def end_call(self, request_id: int, method: int) -> None:
        assert self.calls.close(request_id), "the call ended twice"
        self.received[request_id].append(ENDED)

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        assert self.calls.close(request_id), "a failure after the call was closed"
        self.received[request_id].append(failure)

    def is_stalled(self, request_id: int) -> bool:
        return not self.is_reading


class Asker:
    """A session for plain requests."""

    is_blocked = False

    def awaits(self, request_id: int) -> bool:
        return True

    def __init__(self) -> None:
        self.outcome: Any = None

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        self.outcome = methods.METHODS[method].response.decode(body)

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        self.outcome = failure


@pytest.fixture
def caller(lone: LoneMember) -> Caller:
    return Caller(lone)


def write(lone: LoneMember, method: str, **fields: Any) -> Any:
    about = methods.METHOD_BY_NAME[method]
    asker = Asker()
    lone.member.writes.propose_message(Waiter(asker, 1, about.number, about.request(**fields)))
    lone.settle()
    return asker.outcome


def read(lone: LoneMember, request: Any) -> Any:
    asker = Asker()
    lone.member.reads.read(Waiter(asker, 1, methods.METHOD_BY_NAME["KV.Range"].number, request))
    lone.settle()
    return asker.outcome


def grant(lone: LoneMember, lease: int, ttl_s: int = 60) -> int:
    write(lone, "Lease.LeaseGrant", ID=lease, TTL=ttl_s)
    return lease


def keys(lone: LoneMember) -> list[bytes]:
    return [kv.key for kv in read(lone, EVERYTHING).kvs]


# Locks.


def test_a_free_lock_is_granted_at_once(lone: LoneMember, caller: Caller) -> None:
    answer = caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 0xAB))
    (kv,) = read(lone, EVERYTHING).kvs
    assert answer.key == b"door/ab" == kv.key
    assert (kv.value, kv.lease) == (b"", 0xAB)
    assert answer.header.revision == kv.create_revision


def test_without_a_lease_the_server_makes_one_of_a_minute(lone: LoneMember, caller: Caller) -> None:
    answer = caller.ask("Lock.Lock", name=b"door")
    (lease,) = finish(lone.member.state.lessor.lease_steps())
    assert answer.key == b"door/%x" % lease
    assert lone.member.state.lessor.ttl_s(lease) == 60
    assert lone.member.state.lessor.keys(lease) == [answer.key]


def test_an_empty_name_is_a_name(lone: LoneMember, caller: Caller) -> None:
    assert caller.ask("Lock.Lock", lease=grant(lone, 1)).key == b"/1"


def test_locking_again_with_the_lease_that_holds_it_answers_the_same(
    lone: LoneMember, caller: Caller
) -> None:
    grant(lone, 5)
    first = caller.ask("Lock.Lock", name=b"door", lease=5)
    assert caller.ask("Lock.Lock", name=b"door", lease=5) == first


def test_a_release_grants_the_lock_to_the_next_in_line_only(
    lone: LoneMember, caller: Caller
) -> None:
    held = caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 9))
    second = caller.begin("Lock.Lock", name=b"door", lease=grant(lone, 8))
    third = caller.begin("Lock.Lock", name=b"door", lease=grant(lone, 7))
    assert not caller.received[second]
    done = caller.ask("Lock.Unlock", key=held.key)
    assert done.header.revision == held.header.revision + 3
    assert caller.answer(second).key == b"door/8"
    assert caller.answer(second).header.revision == done.header.revision
    assert not caller.received[third]
    caller.ask("Lock.Unlock", key=b"door/8")
    assert caller.answer(third).key == b"door/7"


def test_a_waiter_that_leaves_the_middle_of_the_queue_lets_no_other_in(
    lone: LoneMember, caller: Caller
) -> None:
    caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 1))
    middle = caller.begin("Lock.Lock", name=b"door", lease=grant(lone, 2))
    last = caller.begin("Lock.Lock", name=b"door", lease=grant(lone, 3))
    caller.cancel(middle)
    assert keys(lone) == [b"door/1", b"door/3"]
    assert not caller.received[middle] and not caller.received[last]
    caller.ask("Lock.Unlock", key=b"door/1")
    assert caller.answer(last).key == b"door/3"


def test_the_end_of_the_holders_lease_grants_the_lock(lone: LoneMember, caller: Caller) -> None:
    caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 1, ttl_s=5))
    waiting = caller.begin("Lock.Lock", name=b"door", lease=grant(lone, 2, ttl_s=500))
    lone.tick(10.0)
    lone.tick(0.1)
    assert caller.answer(waiting).key == b"door/2"


def test_a_waiter_whose_lease_ended_is_told_so(lone: LoneMember, caller: Caller) -> None:
    caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 1))
    waiting = caller.begin("Lock.Lock", name=b"door", lease=grant(lone, 2))
    write(lone, "Lease.LeaseRevoke", ID=2)
    caller.ask("Lock.Unlock", key=b"door/1")
    (failure,) = caller.received[waiting]
    assert (failure.code, failure.text) == (UNKNOWN, "mutex: session is expired")


@pytest.mark.parametrize("lease", [5, -1])
def test_a_lease_that_does_not_exist_is_refused(caller: Caller, lease: int) -> None:
    refused = (UNKNOWN, "etcdserver: requested lease not found")
    assert caller.failure("Lock.Lock", name=b"door", lease=lease) == refused
    assert caller.failure("Election.Campaign", name=b"x", lease=lease) == refused


def test_unlocking_what_is_not_there_is_fine_but_no_key_is_not(caller: Caller) -> None:
    assert caller.ask("Lock.Unlock", key=b"nothing").header.revision == 1
    assert caller.failure("Lock.Unlock") == (UNKNOWN, "etcdserver: key is not provided")


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    lone = LoneMember(tmp_path, max_request_bytes=1000)
    caller = Caller(lone)
    grant(lone, 1)
    failure = caller.failure("Lock.Lock", name=b"n" * 900, lease=1)
    assert failure == (UNKNOWN, "etcdserver: request is too large")
    assert keys(lone) == []


def test_a_full_store_takes_no_locks_but_lets_them_go(tmp_path: Path) -> None:
    lone = LoneMember(tmp_path)
    caller = Caller(lone)
    held = caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 1))
    write(lone, "Maintenance.Alarm", action=1, memberID=7, alarm=1)
    full = (UNKNOWN, "etcdserver: mvcc: database space exceeded")
    assert caller.failure("Lock.Lock", name=b"door", lease=1) == full
    assert caller.failure("Lock.Lock", name=b"door") == full
    caller.ask("Lock.Unlock", key=held.key)
    assert keys(lone) == []


def test_a_member_with_too_much_to_do_says_so_at_once(
    lone: LoneMember, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("etcdlite.replica.writes.MAX_PROPOSED_BYTES", 0)
    (failure,) = caller.received[caller.send("Lock.Lock", name=b"door")]
    assert (failure.code, failure.text) == (UNKNOWN, "etcdserver: too many requests")


# Giving up.


@pytest.mark.parametrize("method", ["Lock.Lock", "Election.Campaign"])
def test_a_cancelled_waiter_leaves_the_line_and_is_not_answered(
    lone: LoneMember, caller: Caller, method: str
) -> None:
    caller.ask(method, name=b"door", lease=grant(lone, 1))
    waiting = caller.begin(method, name=b"door", lease=grant(lone, 2))
    caller.cancel(waiting)
    assert keys(lone) == [b"door/1"]
    write(lone, "KV.DeleteRange", key=b"door/1")
    assert caller.received[waiting] == []
    assert (lone.member.hub.streams, lone.member.hub.watches) == (0, 0)


@pytest.mark.parametrize("method", ["Lock.Lock", "Election.Campaign"])
def test_what_a_lost_connection_waited_for_is_forgotten(
    lone: LoneMember, caller: Caller, method: str
) -> None:
    caller.ask(method, name=b"door", lease=grant(lone, 1))
    gone = Caller(lone)
    gone.begin(method, name=b"door", lease=grant(lone, 2))
    gone.begin(method, name=b"door")
    gone.begin("Election.Observe", name=b"door")
    gone.disconnect()
    assert keys(lone) == [b"door/1"]
    assert finish(lone.member.state.lessor.lease_steps()) == [1, 2], (
        "the lease that the server made is left"
    )
    assert lone.member.hub.streams == 0


def test_a_call_given_up_before_its_key_is_written_takes_the_key_away(
    lone: LoneMember, caller: Caller
) -> None:
    request_id = caller.send("Lock.Lock", name=b"door", lease=grant(lone, 2))
    caller.cancel(request_id)
    assert caller.received[request_id] == []
    assert keys(lone) == []
    assert read(lone, EVERYTHING).header.revision == 3, "the key was never put"


def test_a_call_given_up_before_its_lease_is_made_leaves_no_lease(
    lone: LoneMember, caller: Caller
) -> None:
    caller.cancel(caller.send("Lock.Lock", name=b"door"))
    assert finish(lone.member.state.lessor.lease_steps()) == []
    assert read(lone, EVERYTHING).header.revision == 1, "a key was put"


def test_giving_up_a_second_lock_call_of_the_holder_keeps_the_lock(
    lone: LoneMember, caller: Caller
) -> None:
    caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 1))
    caller.cancel(caller.send("Lock.Lock", name=b"door", lease=1))
    assert keys(lone) == [b"door/1"]
    caller.begin("Lock.Lock", name=b"door", lease=grant(lone, 2))
    caller.cancel(caller.send("Lock.Lock", name=b"door", lease=1))
    assert keys(lone) == [b"door/1", b"door/2"]


def test_giving_up_a_second_call_that_waits_leaves_the_place_to_the_first(
    lone: LoneMember, caller: Caller
) -> None:
    caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 1))
    first = caller.begin("Lock.Lock", name=b"door", lease=grant(lone, 2))
    caller.cancel(caller.begin("Lock.Lock", name=b"door", lease=2))
    assert keys(lone) == [b"door/1", b"door/2"]
    write(lone, "KV.DeleteRange", key=b"door/1")
    assert caller.answer(first).key == b"door/2"


@pytest.mark.parametrize("method", ["Lock.Lock", "Election.Campaign"])
@pytest.mark.parametrize("others", [0, 1])
def test_a_call_that_is_given_up_leaves_the_key_to_the_next_call_of_its_lease(
    lone: LoneMember, caller: Caller, method: str, others: int
) -> None:
    """A client gives up and tries again at once, while the first call is being carried out."""
    if others:
        caller.ask(method, name=b"door", lease=grant(lone, 1))
    grant(lone, 2)
    first = caller.send(method, name=b"door", lease=2)
    assert caller.calls.close(first)
    second = caller.send(method, name=b"door", lease=2)
    lone.settle()
    assert keys(lone)[-1:] == [b"door/2"]
    third = caller.send(method, name=b"door", lease=2)
    if others:
        caller.cancel(second)
        write(lone, "KV.DeleteRange", key=b"door/1")
    lone.settle()
    assert caller.answer(third).key if method == "Lock.Lock" else caller.answer(third).leader
    assert keys(lone) == [b"door/2"]


@pytest.mark.parametrize("method", ["Lock.Lock", "Election.Campaign"])
def test_a_member_that_learns_late_that_a_call_is_given_up_leaves_the_key_to_another_member(
    method: str,
) -> None:
    cluster = Cluster()
    world, client, (late, other) = cluster.world, cluster.client, cluster.followers
    for lease in (1, 2):
        client.ask(other, "Lease.LeaseGrant", ID=lease, TTL=600)
    caller = Caller(late)
    first = caller.send(method, name=b"door", lease=1)
    world.run_until(lambda: bool(caller.received[first]))
    waiting = caller.send(method, name=b"door", lease=2)
    world.run(1)
    world.partition([late.name], [node.name for node in cluster.nodes if node is not late])
    assert caller.calls.close(waiting)
    late.turn()
    there = Caller(other)
    again = there.send(method, name=b"door", lease=2)
    client.ask(other, "KV.DeleteRange", key=b"door/1")
    world.run_until(lambda: bool(there.received[again]))
    world.heal()
    world.run(2)
    assert there.answer(again)
    assert client.get(other, b"door/2") is not None


@pytest.mark.parametrize("method", ["Lock.Lock", "Election.Campaign"])
def test_the_last_call_given_up_deletes_the_key_though_it_failed_itself(
    lone: LoneMember, caller: Caller, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller.ask(method, name=b"door", lease=grant(lone, 1))
    first = caller.begin(method, name=b"door", lease=grant(lone, 2))
    with monkeypatch.context() as patch:
        patch.setattr(lone.member.writes, "propose", lambda *_: None)
        second = caller.send(method, name=b"door", lease=2)
    caller.cancel(first)
    assert keys(lone) == [b"door/1", b"door/2"]
    for ref in caller.opened[-1:]:
        call = ref()
        assert call is not None
        call.fail(1, methods.TXN, errors.error("NoLeader"))  # type: ignore[attr-defined]
    lone.settle()
    assert isinstance(caller.received[second][0], EtcdError)
    assert keys(lone) == [b"door/1"]


def test_a_granted_lock_outlives_its_call_and_connection(lone: LoneMember, caller: Caller) -> None:
    caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 1))
    caller.disconnect()
    assert keys(lone) == [b"door/1"]


def test_a_key_that_another_client_recreated_is_not_deleted(
    lone: LoneMember, caller: Caller
) -> None:
    caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 1))
    waiting = caller.begin("Lock.Lock", name=b"door", lease=grant(lone, 2))
    write(lone, "KV.DeleteRange", key=b"door/2")
    write(lone, "KV.Put", key=b"door/2", lease=2)
    caller.cancel(waiting)
    assert keys(lone) == [b"door/1", b"door/2"]


def test_a_failed_wait_leaves_the_line(
    lone: LoneMember, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 1))
    waiting = caller.begin("Lock.Lock", name=b"door", lease=grant(lone, 2))
    assert keys(lone) == [b"door/1", b"door/2"]
    with monkeypatch.context() as patch:
        no_leader = errors.error("NoLeader")
        patch.setattr(lone.member.reads, "read", lambda read, *_: read[0].fail(1, 0, no_leader))
        write(lone, "KV.DeleteRange", key=b"door/1")
    (failure,) = caller.received[waiting]
    assert (failure.code, failure.text) == (UNKNOWN, "etcdserver: no leader")
    assert keys(lone) == []


def test_waiters_that_come_and_go_are_forgotten_while_others_wait(
    lone: LoneMember, caller: Caller
) -> None:
    for lease in range(1, 6):
        grant(lone, lease)
    caller.ask("Lock.Lock", name=b"door", lease=1)
    patient = caller.begin("Lock.Lock", name=b"door", lease=2)
    for _ in range(200):
        caller.cancel(caller.begin("Lock.Lock", name=b"door", lease=3))
    last = caller.begin("Lock.Lock", name=b"door", lease=4)
    gc.collect()
    alive = sum(ref() is not None for ref in caller.opened)
    assert alive < 100, "calls that have left are kept"
    write(lone, "KV.DeleteRange", key=b"door/1")
    assert caller.answer(patient).key == b"door/2" and not caller.received[last]
    write(lone, "KV.DeleteRange", key=b"door/2")
    assert caller.answer(last).key == b"door/4"


def test_a_long_line_is_read_once_and_moves_in_order(
    lone: LoneMember, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_now = lone.member.reads.read_now
    whole: list[Any] = []

    def counted(read: Any) -> None:
        whole.append(read[3])
        read_now(read)

    monkeypatch.setattr(lone.member.reads, "read_now", counted)
    caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 1))
    waiting = [caller.begin("Lock.Lock", name=b"door", lease=grant(lone, n)) for n in range(2, 202)]
    assert len(whole) == 1, "every waiting call reads the whole line"
    # One in the middle gives up; the others move on one by one.
    caller.cancel(waiting.pop(100))
    held = b"door/1"
    for call in waiting:
        assert not caller.received.get(call)
        write(lone, "KV.DeleteRange", key=held)
        held = caller.answer(call).key
    assert len(whole) == 1 and keys(lone) == [held]


def test_turns_that_come_at_once_come_in_pages(
    lone: LoneMember, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrency, "PAGE_KEYS", 3)
    caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 1))
    waiting = [caller.begin("Lock.Lock", name=b"door", lease=grant(lone, n)) for n in range(2, 12)]
    reads: list[int] = []
    read_now = lone.member.reads.read_now
    monkeypatch.setattr(
        lone.member.reads, "read_now", lambda read: (reads.append(read[1]), read_now(read))[1]
    )
    write(lone, "KV.DeleteRange", key=b"door/", range_end=b"door0")
    assert all(caller.received[call] for call in waiting), "a turn was forgotten"
    assert len(reads) == 3, "three turns at a time"


def test_a_line_that_cannot_be_read_fails_all_who_wait(
    lone: LoneMember, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrency, "PAGE_KEYS", 3)
    caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 1))
    read_now = lone.member.reads.read_now
    kept: list[Any] = []
    monkeypatch.setattr(lone.member.reads, "read_now", kept.append)
    waiting = [caller.begin("Lock.Lock", name=b"door", lease=grant(lone, n)) for n in range(2, 12)]
    monkeypatch.setattr(lone.member.reads, "read_now", read_now)
    (read,) = kept
    read.fail(errors.error("RequestTooManyRequests"))
    lone.settle()
    assert {caller.received[call][0].text for call in waiting} == {"etcdserver: too many requests"}
    # The next one reads it again.
    late = caller.begin("Lock.Lock", name=b"door", lease=grant(lone, 99))
    write(lone, "KV.DeleteRange", key=b"door/1")
    assert caller.answer(late).key == b"door/63"


# Elections.


def test_the_first_candidate_leads(lone: LoneMember, caller: Caller) -> None:
    won = caller.ask("Election.Campaign", name=b"boss", lease=grant(lone, 0xAB), value=b"me")
    (kv,) = read(lone, EVERYTHING).kvs
    assert won.leader == proto.LeaderKey(
        name=b"boss", key=b"boss/ab", rev=kv.create_revision, lease=0xAB
    )
    assert (kv.value, kv.lease, kv.create_revision) == (b"me", 0xAB, won.header.revision)
    assert caller.ask("Election.Leader", name=b"boss").kv == kv


def test_candidates_lead_in_the_order_they_came(lone: LoneMember, caller: Caller) -> None:
    first = caller.ask("Election.Campaign", name=b"boss", lease=grant(lone, 2), value=b"one")
    second = caller.begin("Election.Campaign", name=b"boss", lease=grant(lone, 1), value=b"two")
    assert not caller.received[second]
    assert caller.ask("Election.Leader", name=b"boss").kv.value == b"one"
    caller.ask("Election.Resign", leader=first.leader)
    won = caller.answer(second)
    assert won.leader.key == b"boss/1"
    assert won.header.revision == won.leader.rev, "the header is that of the candidacy, as in etcd"
    assert caller.ask("Election.Leader", name=b"boss").kv.value == b"two"


def test_a_leader_that_campaigns_again_changes_its_value(lone: LoneMember, caller: Caller) -> None:
    first = caller.ask("Election.Campaign", name=b"boss", lease=grant(lone, 1), value=b"one")
    again = caller.ask("Election.Campaign", name=b"boss", lease=1, value=b"two")
    assert again.leader == first.leader
    assert again.header.revision == first.header.revision
    kv = caller.ask("Election.Leader", name=b"boss").kv
    assert (kv.value, kv.version) == (b"two", 2)


def test_a_leader_proclaims_a_new_value(lone: LoneMember, caller: Caller) -> None:
    won = caller.ask("Election.Campaign", name=b"boss", lease=grant(lone, 1), value=b"one")
    done = caller.ask("Election.Proclaim", leader=won.leader, value=b"two")
    kv = caller.ask("Election.Leader", name=b"boss").kv
    assert (kv.value, kv.lease, kv.mod_revision) == (b"two", 1, done.header.revision)


def test_only_the_leader_proclaims(lone: LoneMember, caller: Caller) -> None:
    won = caller.ask("Election.Campaign", name=b"boss", lease=grant(lone, 1), value=b"one")
    won.leader.rev -= 1
    failure = caller.failure("Election.Proclaim", leader=won.leader, value=b"two")
    assert failure == (UNKNOWN, "election: not leader")
    won.leader.rev += 1
    won.leader.lease = 99
    failure = caller.failure("Election.Proclaim", leader=won.leader, value=b"two")
    assert failure == (UNKNOWN, "etcdserver: requested lease not found")


def test_a_proclamation_without_a_lease_gets_one(lone: LoneMember, caller: Caller) -> None:
    won = caller.ask("Election.Campaign", name=b"boss", lease=grant(lone, 1), value=b"one")
    won.leader.lease = 0
    caller.ask("Election.Proclaim", leader=won.leader, value=b"two")
    (made,) = (lease for lease in finish(lone.member.state.lessor.lease_steps()) if lease != 1)
    assert caller.ask("Election.Leader", name=b"boss").kv.lease == made


def test_resigning_from_a_place_one_does_not_have_changes_nothing(
    lone: LoneMember, caller: Caller
) -> None:
    won = caller.ask("Election.Campaign", name=b"boss", lease=grant(lone, 1), value=b"one")
    won.leader.rev -= 1
    assert caller.ask("Election.Resign", leader=won.leader).header.revision == won.header.revision
    assert keys(lone) == [b"boss/1"]


def test_requests_that_name_no_leader_are_refused(caller: Caller) -> None:
    missing = (UNKNOWN, '"leader" field must be provided')
    no_key = (UNKNOWN, "etcdserver: key is not provided")
    for method in ("Election.Proclaim", "Election.Resign"):
        assert caller.failure(method) == missing
        assert caller.failure(method, leader=proto.LeaderKey()) == no_key
    assert caller.failure("Election.Leader", name=b"x") == (UNKNOWN, "election: no leader")


def test_a_candidate_whose_key_went_does_not_win(lone: LoneMember, caller: Caller) -> None:
    won = caller.ask("Election.Campaign", name=b"boss", lease=grant(lone, 1))
    waiting = caller.begin("Election.Campaign", name=b"boss", lease=grant(lone, 2))
    write(lone, "Lease.LeaseRevoke", ID=2)
    caller.ask("Election.Resign", leader=won.leader)
    (failure,) = caller.received[waiting]
    assert (failure.code, failure.text) == (UNKNOWN, "election: not leader")


# Observing.


def seen(caller: Caller, request_id: int) -> list[tuple[bytes, bytes, int]]:
    return [(r.kv.key, r.kv.value, r.header.revision) for r in caller.received[request_id]]


def test_an_observer_sees_each_leader_and_what_he_proclaims(
    lone: LoneMember, caller: Caller
) -> None:
    observer = caller.begin("Election.Observe", name=b"boss")
    assert seen(caller, observer) == []
    one = caller.ask("Election.Campaign", name=b"boss", lease=grant(lone, 1), value=b"one")
    caller.begin("Election.Campaign", name=b"boss", lease=grant(lone, 2), value=b"two")
    caller.ask("Election.Proclaim", leader=one.leader, value=b"uno")
    caller.ask("Election.Resign", leader=one.leader)
    late = caller.begin("Election.Observe", name=b"boss")
    assert seen(caller, observer) == [
        (b"boss/1", b"one", 2),
        (b"boss/1", b"uno", 4),
        (b"boss/2", b"two", 5),
    ]
    assert seen(caller, late) == [(b"boss/2", b"two", 5)]
    caller.cancel(observer)
    caller.cancel(late)
    assert lone.member.hub.streams == 0


def test_the_first_of_several_candidates_in_one_event_leads(
    lone: LoneMember, caller: Caller
) -> None:
    observer = caller.begin("Election.Observe", name=b"boss")
    grant(lone, 1)
    grant(lone, 2)
    caller.send("Election.Campaign", name=b"boss", lease=2, value=b"two")
    caller.send("Election.Campaign", name=b"boss", lease=1, value=b"one")
    lone.settle()
    assert seen(caller, observer) == [(b"boss/2", b"two", 2)]


def test_a_leader_whose_rise_and_fall_come_together_is_followed_by_the_next(
    lone: LoneMember, caller: Caller
) -> None:
    observer = caller.begin("Election.Observe", name=b"boss")
    grant(lone, 1)
    caller.send("Election.Campaign", name=b"boss", lease=1, value=b"one")
    revoke = methods.METHOD_BY_NAME["Lease.LeaseRevoke"].number
    lone.member.writes.propose_message(Waiter(None, 0, revoke, proto.LeaseRevokeRequest(ID=1)))
    lone.settle()
    caller.ask("Election.Campaign", name=b"boss", lease=grant(lone, 2), value=b"two")
    assert seen(caller, observer) == [(b"boss/1", b"one", 2), (b"boss/2", b"two", 4)]


def test_an_observer_that_does_not_read_is_sent_nothing_and_misses_nothing(
    lone: LoneMember, caller: Caller
) -> None:
    won = caller.ask("Election.Campaign", name=b"boss", lease=grant(lone, 1), value=b"0")
    observer = caller.begin("Election.Observe", name=b"boss")
    other = Caller(lone)
    caller.is_reading = False
    for value in (b"1", b"2", b"3"):
        other.ask("Election.Proclaim", leader=won.leader, value=value)
    assert [value for _, value, _ in seen(caller, observer)] == [b"0"]
    caller.is_reading = True
    caller.calls.wake(observer)
    lone.settle()
    assert [value for _, value, _ in seen(caller, observer)] == [b"0", b"1", b"2", b"3"]


def test_an_observer_whose_history_is_compacted_continues_with_the_current_leader(
    lone: LoneMember, caller: Caller
) -> None:
    won = caller.ask("Election.Campaign", name=b"boss", lease=grant(lone, 1), value=b"0")
    observer = caller.begin("Election.Observe", name=b"boss")
    caller.is_reading = False
    other = Caller(lone)
    for value in (b"1", b"2", b"3"):
        other.ask("Election.Proclaim", leader=won.leader, value=value)
    write(lone, "KV.Compact", revision=5)
    caller.is_reading = True
    caller.calls.wake(observer)
    lone.settle()
    assert [value for _, value, _ in seen(caller, observer)] == [b"0", b"3"]
    other.ask("Election.Proclaim", leader=won.leader, value=b"4")
    assert [value for _, value, _ in seen(caller, observer)] == [b"0", b"3", b"4"]


@pytest.mark.parametrize(("waits_here", "learns"), [(False, True), (True, True), (True, False)])
def test_observers_do_not_sort_the_line_at_each_change(
    lone: LoneMember,
    caller: Caller,
    monkeypatch: pytest.MonkeyPatch,
    waits_here: bool,
    learns: bool,
) -> None:
    """With 20,000 in line, each of them did so for 13 ms."""
    changes = 3 if learns else 1
    for number in range(1100):
        write(lone, "KV.Put", key=b"boss/%04d" % number)
    if waits_here:
        caller.begin("Election.Campaign", name=b"boss", lease=grant(lone, 2))
    observers = [caller.begin("Election.Observe", name=b"boss") for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(concurrency, "_oldest", None)
        if not learns:
            patch.setattr(concurrency._Queue, "send", lambda *_: None)
        for number in range(changes):
            write(lone, "KV.DeleteRange", key=b"boss/%04d" % number)
    for observer in observers:
        assert [key for key, _, _ in seen(caller, observer)] == [
            b"boss/%04d" % number for number in range(changes + 1)
        ]
    assert list(concurrency._shared(lone.member).queues) == ([b"boss/"] if waits_here else [])
    caller.disconnect()
    assert (lone.member.hub.streams, lone.member.hub.watches) == (0, 0)
    assert not concurrency._shared(lone.member).queues


@pytest.mark.parametrize("seed", range(8))
def test_an_observer_ends_up_with_the_oldest_key_whatever_changes_at_once(
    lone: LoneMember, caller: Caller, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """With odd seeds, what the observers share learns of all changes later than they do."""
    rng = random.Random(seed)
    late: list[tuple[Any, bytes]] = []
    learn = concurrency._Queue.send
    if seed % 2:
        monkeypatch.setattr(concurrency._Queue, "send", lambda *sent: late.append(sent))
    grant(lone, 9)
    observers: list[int] = []
    for _ in range(100):
        if rng.random() < 0.05:
            observers.append(caller.begin("Election.Observe", name=b"boss"))
        if rng.random() < 0.5:
            caller.begin("Election.Campaign", name=b"boss", lease=9)
        for _ in range(rng.randrange(1, 16)):
            about = methods.METHOD_BY_NAME[rng.choice(["KV.Put", "KV.DeleteRange"])]
            one = about.request(key=b"boss/%d" % rng.choice([0, 1, 2, 3, 9]))
            lone.member.writes.propose_message(Waiter(Asker(), 1, about.number, one))
            if rng.random() < 0.3:
                turn(lone.member)
        lone.settle()
        for queue, body in late:
            learn(queue, body)
        late.clear()
        lone.settle()
        first = read(lone, concurrency._oldest(b"boss/")).kvs
        for observer in observers if first else []:
            last = caller.received[observer][-1].kv
            assert (last.key, last.create_revision) == (first[0].key, first[0].create_revision)


def compacted_past(caller: Caller, leader: proto.LeaderKey) -> None:
    other = Caller(caller.lone)
    for value in (b"1", b"2", b"3"):
        other.ask("Election.Proclaim", leader=leader, value=value)
    write(caller.lone, "KV.Compact", revision=5)


def resigned(caller: Caller, leader: proto.LeaderKey) -> None:
    Caller(caller.lone).ask("Election.Resign", leader=leader)


@pytest.mark.parametrize("happened", [compacted_past, resigned])
def test_an_observer_that_may_not_read_again_at_once_fails_alone(
    lone: LoneMember, caller: Caller, monkeypatch: pytest.MonkeyPatch, happened: Any
) -> None:
    """The answer comes while the hub reports the event."""
    name = b"b" * 600
    won = caller.ask("Election.Campaign", name=name, lease=grant(lone, 1), value=b"0")
    observer = caller.begin("Election.Observe", name=name)
    caller.is_reading = False
    happened(caller, won.leader)
    caller.is_reading = True
    with monkeypatch.context() as patch:
        patch.setattr(reads, "MAX_LARGE_BYTES", 0)
        caller.calls.wake(observer)
        lone.settle()
    assert caller.received[observer][-1].text == "etcdserver: too many requests"
    assert (lone.member.hub.streams, lone.member.hub.watches) == (0, 0)
    late = caller.begin("Election.Observe", name=name)
    assert len(seen(caller, late)) == (happened is compacted_past)


def test_a_waiter_whose_turn_has_come_when_its_queue_was_read_may_fail_at_once(
    lone: LoneMember, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = b"d" * 600
    held = caller.ask("Lock.Lock", name=name, lease=grant(lone, 1))
    grant(lone, 2)
    waiting = caller.send("Lock.Lock", name=name, lease=2)
    with monkeypatch.context() as patch:
        patch.setattr(reads, "MAX_LARGE_BYTES", 0)
        write(lone, "KV.DeleteRange", key=held.key)
    assert caller.received[waiting][-1].text == "etcdserver: too many requests"
    hub = lone.member.hub
    assert (hub.streams, hub.watches, hub.synced.watches) == (0, 0, 0)
    assert keys(lone) == []


def test_a_call_that_needs_one_watch_too_many_fails(lone: LoneMember, caller: Caller) -> None:
    won = caller.ask("Election.Campaign", name=b"boss", lease=grant(lone, 1), value=b"one")
    held = caller.ask("Lock.Lock", name=b"door", lease=1)
    hub = lone.member.hub
    before, hub.limits = hub.limits, hub.limits._replace(max_watches=0)
    observer = caller.begin("Election.Observe", name=b"boss")
    waiting = caller.begin("Lock.Lock", name=b"door", lease=grant(lone, 2))
    for call in (observer, waiting):
        assert caller.received[call][-1].text == "etcdserver: too many requests"
    assert (hub.streams, hub.watches) == (0, 0)
    hub.limits = before
    observer = caller.begin("Election.Observe", name=b"boss")
    waiting = caller.begin("Lock.Lock", name=b"door", lease=2)
    caller.ask("Election.Proclaim", leader=won.leader, value=b"uno")
    assert [value for _, value, _ in seen(caller, observer)] == [b"one", b"uno"]
    write(lone, "KV.DeleteRange", key=held.key)
    assert caller.answer(waiting).key == b"door/2"


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("Lock.Lock", {"lease": 2}),
        ("Election.Campaign", {"lease": 2, "value": b"v"}),
        ("Election.Observe", {}),
    ],
    ids=["lock", "campaign", "observe"],
)
def test_what_waiting_calls_hold_counts_for_their_connection(
    lone: LoneMember, caller: Caller, method: str, fields: dict[str, Any]
) -> None:
    caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 1))
    grant(lone, 2)
    caller.begin(method, name=b"door", **fields)
    count, requests = 300, dict(caller.received)
    before = caller.calls.requests_bytes(requests)
    tracemalloc.start()
    try:
        for _ in range(count):
            requests[caller.send(method, name=b"door", **fields)] = []
        lone.settle()
        held = held_bytes(
            "*/wire/locks.py", "*/wire/calls.py", "*/watch.py", "*/proto.py", "<generated by *"
        )
    finally:
        tracemalloc.stop()
    assert held < 1.3 * (caller.calls.requests_bytes(requests) - before) < 2 * held


# Together with the recipes.


def advance(lone: LoneMember, script: Any, outcome: Any = None) -> Any:
    """Run a recipe's script up to its end or to the first thing that it waits for."""
    try:
        while True:
            step = script.send(outcome)
            if isinstance(step, client_calls.WatchCursor):
                return step
            assert isinstance(step, client_calls.Op)
            method = methods.METHOD_BY_NAME[step.method]
            asker = Asker()
            frame = frames.frame(1, method.number, 0, step.request.encode())
            handle = concurrency.api.HANDLERS[method.number][0]
            handle(lone.member, Waiter(asker, 1, method.number, step.request), frame)
            lone.settle()
            outcome = step.result(asker.outcome)
    except StopIteration as done:
        return done.value


@pytest.mark.parametrize("method", sorted(concurrency.CALLS))
def test_calls_that_come_in_one_read_begin_a_few_at_a_time(
    method: str, lone: LoneMember, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 KiB hold hundreds, and each costs far more than the bytes that ask for it."""
    begun: list[Any] = []
    monkeypatch.setattr(concurrency._ScriptedCall, "_ask", lambda call, ask: begun.append(ask))
    about = methods.METHOD_BY_NAME[method]
    leader = {"leader": proto.LeaderKey(name=b"n", key=b"n/1", lease=1, rev=1)}
    named = method in ("Election.Proclaim", "Election.Resign")
    body = about.request(**leader if named else {}).encode()
    for request_id in range(1, 101):
        caller.calls.open(request_id, about.number, concurrency.CALLS[method])
        caller.calls.message(request_id, body)
    assert not begun
    caller.calls.produce()
    assert len(begun) == PIECES_PER_SLICE
    while caller.calls.have_more:
        caller.calls.produce()
    assert len(begun) == 100


def test_a_recipe_waits_for_a_lock_of_the_service(lone: LoneMember, caller: Caller) -> None:
    held = caller.ask("Lock.Lock", name=b"door", lease=grant(lone, 1))
    script = recipes.stand_in_line(recipes.line(b"door"), grant(lone, 0x2F), b"")
    waits = advance(lone, script)
    create = waits.request().create_request
    assert (create.key, list(create.filters)) == (held.key, [proto.WatchCreateRequest.NOPUT])
    caller.ask("Lock.Unlock", key=held.key)
    got = advance(lone, script)
    assert (got.key, got.lease) == (b"door/2f", 0x2F)


def test_the_service_waits_for_a_lock_of_a_recipe(lone: LoneMember, caller: Caller) -> None:
    held = advance(lone, recipes.stand_in_line(recipes.line(b"door"), grant(lone, 0x2F), b""))
    waiting = caller.begin("Lock.Lock", name=b"door", lease=grant(lone, 1))
    assert not caller.received[waiting]
    write(lone, "KV.DeleteRange", key=held.key)
    assert caller.answer(waiting).key == b"door/1"


def test_recipe_and_service_give_one_lease_one_place(lone: LoneMember, caller: Caller) -> None:
    grant(lone, 0x2F)
    held = advance(lone, recipes.stand_in_line(recipes.line(b"boss"), 0x2F, b"me"))
    won = caller.ask("Election.Campaign", name=b"boss", lease=0x2F, value=b"me")
    assert (won.leader.key, won.leader.rev) == (held.key, held.revision)
    assert advance(lone, recipes.proclaim(held, b"still me")) == won.header.revision + 1
    assert advance(lone, recipes.leader(recipes.line(b"boss"))).value == b"still me"


def test_a_long_line_is_served_in_order(lone: LoneMember, caller: Caller) -> None:
    waiting = [
        caller.begin("Lock.Lock", name=b"door", lease=grant(lone, 100 - at)) for at in range(40)
    ]
    for request_id in waiting:
        answer = caller.answer(request_id)
        caller.ask("Lock.Unlock", key=answer.key)
    assert [caller.answer(request_id).key for request_id in waiting] == [
        b"door/%x" % (100 - at) for at in range(40)
    ]
    assert keys(lone) == []
    assert lone.member.hub.streams == 0
