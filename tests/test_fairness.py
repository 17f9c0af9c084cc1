"""One client's work must not stop the others: what waits its turn, and what it may cost in apply.

Work is counted, in steps, turns and records read; nothing here is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rigs.lone_member import LoneMember, turn
from sim.world import World

from etcdlite import member, proto, txn
from etcdlite.errors import EtcdError
from etcdlite.frames import CANCEL, END, HANDSHAKE, MAGIC, frame
from etcdlite.methods import METHOD_BY_NAME, PUT, RANGE, TXN
from etcdlite.ranges import range_steps
from etcdlite.replica import reads, writes
from etcdlite.replica.alarms import MAX_ALARMS
from etcdlite.replica.entry import encode_entry
from etcdlite.replica.writes import MAX_IN_FLIGHT
from etcdlite.request import Waiter
from etcdlite.storage.data import DataFile
from etcdlite.storage.sorted_table import SortedTable
from etcdlite.storage.steps import finish
from etcdlite.wire.api import HANDLERS
from etcdlite.wire.calls import MAX_UNANSWERED
from etcdlite.wire.native import NativeSession

EVERYTHING = {"key": b"\0", "range_end": b"\0"}
SORTED = proto.RangeRequest(**EVERYTHING, sort_order=2, sort_target=4)
BY_VALUE = proto.Compare.VALUE


class Paced(LoneMember):
    """The clock moves a millisecond at each look, so a turn has few steps."""

    looks = 0

    @property
    def now(self) -> float:
        self.looks += 1
        return self.looks * 0.001

    @now.setter
    def now(self, value: float) -> None: ...


class Client:
    """A session that keeps its answers."""

    is_blocked = False
    client = "192.0.2.1:1234"

    def __init__(self) -> None:
        self.answers: dict[int, bytes] = {}
        self.failures: dict[int, EtcdError] = {}
        self.gone: set[int] = set()

    def awaits(self, request_id: int) -> bool:
        return request_id not in self.gone

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        self.answers[request_id] = body

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        self.failures[request_id] = failure


def propose(lone: LoneMember, session: Any, request_id: int, method: int, request: Any) -> None:
    data = frame(1, method, 0, request.encode())
    lone.member.writes.propose(Waiter(session, request_id, method, request), data)


def turns_until_answered(lone: Paced, client: Client) -> None:
    while not client.answers:
        turn(lone.member)
        saves = lone.member.take_saves()
        lone.wal.save_all(saves)
        lone.member.persisted(saves)


def test_a_write_does_not_wait_for_all_writes_of_another_session(lone: Paced) -> None:
    flooder, client = Client(), Client()
    for n in range(3 * MAX_IN_FLIGHT):
        propose(lone, flooder, n + 1, PUT, proto.PutRequest(key=b"f%d" % n))
    turn(lone.member)
    propose(lone, client, 1, PUT, proto.PutRequest(key=b"c"))
    turns_until_answered(lone, client)
    assert len(flooder.answers) <= 2 * MAX_IN_FLIGHT
    lone.settle()
    assert list(flooder.answers) == list(range(1, 3 * MAX_IN_FLIGHT + 1))  # Its order is kept.


def test_a_write_has_room_although_another_session_uses_all(
    lone: Paced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writes, "MAX_PROPOSED_BYTES", 1 << 20)
    monkeypatch.setattr(writes, "MAX_IN_FLIGHT_BYTES", 1 << 18)
    flooder, client = Client(), Client()
    for n in range(100):
        propose(lone, flooder, n + 1, PUT, proto.PutRequest(key=b"f", value=bytes(1 << 16)))
    turn(lone.member)
    for n in range(100, 120):
        propose(lone, flooder, n + 1, PUT, proto.PutRequest(key=b"f", value=bytes(1 << 16)))
    propose(lone, client, 1, PUT, proto.PutRequest(key=b"c", value=bytes(1 << 16)))
    lone.settle()
    assert client.answers and not client.failures
    assert len(flooder.answers) + len(flooder.failures) == 120
    assert {failure.name for failure in flooder.failures.values()} == {"RequestTooManyRequests"}
    assert lone.member.state.alarms.proposed_bytes == 0 and not lone.member.writes.are_waiting


def test_a_member_does_not_fill_the_log_with_what_it_forwards() -> None:
    """No member has more writes in flight, so only a faulty one has more entries in the log."""
    world = World(1)
    nodes = world.found(3)
    leader = world.elect().member
    greedy, other = (node.member_id for node in nodes if node.member is not leader)
    accept = leader.writes.accept_forwarded
    put = frame(1, PUT, 0, proto.PutRequest(key=b"k").encode())

    def forward(node: int, count: int) -> None:
        for _ in range(count):
            accept(node, leader.raft.term, encode_entry(node, world.rng.getrandbits(60), [put]))

    forward(greedy, MAX_IN_FLIGHT)
    with pytest.raises(EtcdError, match="too many requests"):
        forward(greedy, 1)
    forward(other, 1)
    for _ in range(2):
        with pytest.raises(EtcdError, match="too many requests"):
            for _ in range(2):
                accept(other, leader.raft.term, encode_entry(other, 7, [put]))
    world.run(2)
    assert leader.state.store.revision >= MAX_IN_FLIGHT + 2
    forward(greedy, 1)


@pytest.mark.parametrize("in_txn", [False, True])
def test_a_write_does_not_wait_for_many_that_keep_a_large_value(
    lone: Paced, in_txn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writes, "MAX_IN_FLIGHT_BYTES", 1 << 18)
    flooder, client = Client(), Client()
    propose(lone, flooder, 1, PUT, proto.PutRequest(key=b"f", value=bytes(1 << 16)))
    lone.settle()
    keeping: Any = proto.PutRequest(key=b"f", ignore_value=True)
    if in_txn:
        ops = [proto.RequestOp(request_put=keeping)]
        nested = proto.TxnRequest(failure=ops, compare=[proto.Compare(key=b"f")])
        keeping = proto.TxnRequest(success=[proto.RequestOp(request_txn=nested)])
    for n in range(100):
        propose(lone, flooder, n + 2, TXN if in_txn else PUT, keeping)
    propose(lone, client, 1, PUT, proto.PutRequest(key=b"c"))
    turns_until_answered(lone, client)
    assert len(flooder.answers) < 20
    lone.settle()
    assert len(flooder.answers) == 101 and not flooder.failures
    assert lone.member.writes._in_flight_bytes == 0


def test_writes_in_line_time_out(lone: Paced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writes, "MAX_IN_FLIGHT", 2)
    client = Client()
    for n in range(10):
        propose(lone, client, n + 1, PUT, proto.PutRequest(key=b"k"))
    lone.member.writes.propose_new()
    for _ in lone.member.writes.expire_steps(lone.now + 100.0):
        pass
    assert len(client.failures) == 10
    assert lone.member.state.alarms.proposed_bytes == 0 and not lone.member.writes.are_waiting


def test_a_write_that_waited_long_does_not_shorten_the_timeout_of_others(
    lone: Paced, monkeypatch: pytest.MonkeyPatch
) -> None:
    flooder, client = Client(), Client()
    most, timeout_s = writes.MAX_IN_FLIGHT, lone.member.options.request_timeout_s
    monkeypatch.setattr(writes, "MAX_IN_FLIGHT", 0)
    for n in range(10):
        propose(lone, flooder, n + 1, PUT, proto.PutRequest(key=b"f"))
    lone.member.writes.propose_new()
    monkeypatch.setattr(writes, "MAX_IN_FLIGHT", most)
    lone.looks += int(900 * timeout_s)
    propose(lone, client, 1, PUT, proto.PutRequest(key=b"c"))
    lone.member.writes.propose_new()
    for _ in lone.member.writes.expire_steps(lone.now + 0.5 * timeout_s):
        pass
    assert not client.failures
    lone.settle()
    assert client.answers and len(flooder.answers) == 10


@pytest.mark.parametrize("kind", ["writes", "reads"])
def test_requests_that_time_out_together_are_answered_in_parts(
    lone: Paced, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(writes, "MAX_IN_FLIGHT", 2)
    monkeypatch.setattr(member, "EXPIRE_STEP_REQUESTS", 4)
    monkeypatch.setattr(lone.member.raft, "read_index", lambda context: None)
    client = Client()
    for n in range(50):
        if kind == "writes":
            propose(lone, client, n + 1, PUT, proto.PutRequest(key=b"k"))
        else:
            lone.member.reads.read(Waiter(client, n + 1, RANGE, proto.RangeRequest(key=b"k")))
            lone.member.reads.begin_round(False)
    turn(lone.member)
    failed = []
    while len(client.failures) < 50:
        lone.looks += 100_000
        lone.member.tick()
        while lone.member.has_urgent_work and not lone.member.raft.has_ready:
            failed.append(len(client.failures))
            turn(lone.member)
        failed.append(len(client.failures))
        lone.member.raft.ready()
    assert len(failed) > 5
    assert max(after - before for before, after in pairwise(failed)) <= 12
    assert lone.member.state.alarms.proposed_bytes == 0


def test_cancelled_reads_are_dropped_in_steps(lone: Paced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "DROPPED_PER_STEP", 4)
    flooder, client = Client(), Client()
    flooder.is_blocked = True
    for n in range(100):
        lone.member.reads.read_now(Waiter(flooder, n, RANGE, proto.RangeRequest(**EVERYTHING)))
    lone.settle()
    flooder.gone, flooder.is_blocked = set(range(100)), False
    lone.member.reads.wake(flooder)
    lone.member.reads.read_now(Waiter(client, 1, RANGE, proto.RangeRequest(**EVERYTHING)))
    while not client.answers:
        turn(lone.member)
    assert len(flooder.answers) < 100
    lone.settle()
    assert len(flooder.answers) == 100 and not lone.member.reads.can_serve


def test_a_read_that_waits_for_an_entry_lets_the_loop_sleep(lone: Paced) -> None:
    """A follower may know which entry a read needs long before it gets the entry."""
    lone.settle()
    client, request = Client(), proto.RangeRequest(key=b"k")
    needed = lone.member.state.store.applied_index + 1
    lone.member.reads.ready.append((needed, [Waiter(client, 1, RANGE, request)], 0.0))
    turn(lone.member)
    assert not lone.member.has_urgent_work and not client.answers
    propose(lone, client, 2, PUT, proto.PutRequest(key=b"k"))
    assert lone.member.has_urgent_work
    lone.settle()
    assert set(client.answers) == {1, 2}


def test_a_slow_read_is_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lone = filled(tmp_path, 2000, warn_apply_s=0.005)
    lone.member.reads.read(Waiter(Client(), 1, RANGE, proto.RangeRequest(key=b"k00001")))
    lone.settle()
    capfd.readouterr()
    counted = lone.member.metrics.slow_applies
    request = proto.RangeRequest(key=b"k", range_end=b"l", sort_order=2)
    lone.member.reads.read(Waiter(Client(), 1, RANGE, request))
    lone.settle()
    line = capfd.readouterr().err
    for known in ("read took too long", "KV.Range", "key=k", "192.0.2.1:1234", "expected-duration"):
        assert known in line, line
    assert lone.member.metrics.slow_applies == counted + 1


def filled(tmp_path: Path, count: int, **options: Any) -> Paced:
    lone = Paced(tmp_path / "member", checkpoint_bytes=1 << 40, **options)
    for n in range(count):
        put = proto.PutRequest(key=b"k%05d" % n, value=b"%d" % (count - n))
        propose(lone, None, 0, PUT, put)
    lone.settle()
    return lone


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[Paced]:
    member = filled(tmp_path, 2000)
    yield member
    member.close()


def turns_until(lone: LoneMember, is_done: Any) -> int:
    turns = 0
    while not is_done():
        turns += 1
        assert turns < 1000, "it is never done"
        turn(lone.member)
    return turns


# Reads.


def test_a_session_with_many_slow_reads_delays_another_by_a_few_steps(lone: Paced) -> None:
    greedy, modest = Client(), Client()
    for n in range(50):
        lone.member.reads.read_now(Waiter(greedy, n, RANGE, SORTED))
    turn(lone.member)
    few = proto.RangeRequest(key=b"k00100", range_end=b"k00600")
    lone.member.reads.read_now(Waiter(modest, 1, RANGE, few))
    assert turns_until(lone, lambda: modest.answers) <= 10
    assert len(greedy.answers) <= 3
    assert len(proto.RangeResponse.decode(modest.answers[1]).kvs) == 500
    lone.settle()
    assert len(greedy.answers) == 50


def test_short_reads_need_no_place_and_long_ones_of_many_sessions_share_few(lone: Paced) -> None:
    greedy = [Client() for _ in range(12)]
    for client in greedy:
        for n in range(2):
            lone.member.reads.read_now(Waiter(client, n, RANGE, SORTED))
    reads = lone.member.reads
    for _ in range(30):
        turn(lone.member)
        lines = list(reads._lines.values())
        assert sum(line.has_slot for line in lines) <= lone.member.state.store.limits.max_slow_reads
        begun = [line for line in lines if line.steps is not None and not line.has_slot]
        assert len(begun) <= 1, "without a place, one read at a time is under way"
    modest = Client()
    few = proto.RangeRequest(key=b"k00100", range_end=b"k00600")
    lone.member.reads.read_now(Waiter(modest, 1, RANGE, few))
    assert turns_until(lone, lambda: modest.answers) <= 10 + 5 * len(greedy)
    lone.settle()
    assert all(len(client.answers) == 2 for client in greedy)
    assert not reads._lines and not reads._slots_taken and not reads._waiting_count


def test_the_range_streams_of_a_connection_wait_in_one_line(lone: Paced) -> None:
    greedy, modest = NativeSession(lone.member, lambda session: None), Client()
    greedy.receive(HANDSHAKE.pack(MAGIC, 1, 1))
    nothing = proto.RangeRequest(**EVERYTHING, min_mod_revision=1 << 40, serializable=True)
    stream = METHOD_BY_NAME["KV.RangeStream"].number
    for n in range(1, 51):
        greedy.receive(frame(n, stream, END, nothing.encode()))
    turn(lone.member)
    few = proto.RangeRequest(key=b"k00100", range_end=b"k00600")
    lone.member.reads.read_now(Waiter(modest, 1, RANGE, few))
    assert turns_until(lone, lambda: modest.answers) <= 10
    assert len(greedy.calls) > 40
    lone.settle()
    assert not len(greedy.calls) and not lone.member.reads._lines


def test_a_transaction_that_reads_too_much_fails_when_others_wait_for_its_slot(
    lone: Paced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "MAX_TXN_STEPS", 40)
    compare = proto.Compare(**EVERYTHING, target=BY_VALUE, result=3, value=b"x")
    endless = proto.TxnRequest(compare=[compare] * 100)
    greedy, modest = [Client() for _ in range(4)], Client()
    for client in greedy:
        lone.member.reads.read_now(Waiter(client, 1, TXN, endless))
    for _ in range(300):
        turn(lone.member)
    assert not any(client.failures for client in greedy), "nobody waits"
    lone.member.reads.read_now(Waiter(modest, 1, RANGE, SORTED))
    assert turns_until(lone, lambda: modest.answers) <= 40
    failed = [client.failures[1] for client in greedy if client.failures]
    assert 1 <= len(failed) < 4 and all("reads too much" in why.text for why in failed)
    lone.settle()
    assert sum(bool(client.answers) for client in greedy) == 4 - len(failed)
    assert not lone.member.reads._lines and not lone.member.reads._slots_taken


def test_what_waits_is_limited_for_a_session_and_in_all(lone: Paced) -> None:
    store = lone.member.state.store
    store.limits = store.limits._replace(max_waiting_reads_per_session=3, max_waiting_reads=5)
    first, second = Client(), Client()
    for client in (first, second):
        for n in range(10):
            lone.member.reads.read_now(Waiter(client, n, RANGE, SORTED))
    lone.settle()
    for client, most in ((first, 4), (second, 3)):
        assert len(client.answers) <= most
        assert len(client.answers) + len(client.failures) == 10
        assert {f.name for f in client.failures.values()} == {"RequestTooManyRequests"}


def test_a_line_is_held_while_its_client_does_not_read_and_ends_with_it(lone: Paced) -> None:
    slow, gone = Client(), Client()
    slow.is_blocked = gone.is_blocked = True
    for client in (slow, gone):
        for n in range(3):
            lone.member.reads.read_now(Waiter(client, n, RANGE, SORTED))
    lone.settle()
    assert not slow.answers and not gone.answers
    gone.gone.update(range(3))
    lone.member.reads.wake(gone)
    slow.is_blocked = False
    lone.member.reads.wake(slow)
    lone.settle()
    assert all(len(proto.RangeResponse.decode(body).kvs) == 2000 for body in slow.answers.values())
    assert set(gone.answers.values()) == {b""}
    assert not lone.member.reads._lines


# Transactions.


def op(**request: Any) -> Any:
    ((name, value),) = request.items()
    return proto.RequestOp(**{f"request_{name}": value})


def put(key: bytes, value: bytes = b"new") -> Any:
    return op(put=proto.PutRequest(key=key, value=value))


HOSTILE = proto.TxnRequest(success=[put(b"k00000"), *[op(range=SORTED)] * 127])


@pytest.fixture
def records_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    count = [0]
    read, read_all = DataFile.read, DataFile.read_all

    def counting(self: Any, location: int, size_bytes: int) -> bytes:
        count[0] += 1
        return read(self, location, size_bytes)

    def counting_all(self: Any, records: Any) -> Any:
        before = count[0]
        bodies = read_all(self, records)
        count[0] = before + len(records)
        return bodies

    monkeypatch.setattr(DataFile, "read", counting)
    monkeypatch.setattr(DataFile, "read_all", counting_all)
    return count


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"sort_order": 2, "sort_target": 0, "limit": 3}, 3),
        ({"sort_order": 1, "sort_target": 2, "limit": 3}, 3),
        ({"sort_order": 2, "sort_target": 3, "limit": 1}, 1),
        ({"sort_order": 1, "sort_target": 1, "limit": 3}, 3),
        ({"min_mod_revision": 1000, "limit": 5}, 5),
        ({"max_create_revision": 11}, 10),
        ({"min_create_revision": 1999, "sort_order": 2, "sort_target": 3}, 3),
        ({"count_only": True}, 0),
    ],
    ids=str,
)
def test_a_range_reads_no_more_records_than_it_answers(
    lone: Paced, records_read: list[int], fields: dict[str, Any], most: int
) -> None:
    store = lone.member.state.store
    answer = finish(range_steps(store, proto.RangeRequest(**EVERYTHING, **fields)))
    response = proto.RangeResponse.decode(answer)
    assert (len(response.kvs), records_read[0], response.count) == (most, most, 2000)


def test_the_ranges_of_a_transaction_are_read_after_it_is_applied(
    lone: Paced, records_read: list[int]
) -> None:
    store = lone.member.state.store
    request = proto.TxnRequest(success=[op(range=SORTED), put(b"a"), op(range=SORTED)])
    applied = finish(txn.apply_steps(store, request))
    assert records_read == [0]
    before = store.end_revision() - 1
    answer = applied.answer_steps(store, is_late=True)
    next(answer)
    assert sorted(store.pinned) == [before, before + 1]
    store.put(b"b", b"", 0)
    store.end_revision()
    response = proto.TxnResponse.decode(finish(answer))
    counts = [r.response_range.count for r in response.responses if r.response_range]
    assert counts == [2000, 2001] and not store.pinned
    store.mark(store.applied_index, store.applied_term)


def test_a_transaction_without_a_session_reads_nothing_for_an_answer(
    lone: Paced, records_read: list[int]
) -> None:
    propose(lone, None, 0, TXN, HOSTILE)
    lone.settle()
    assert records_read == [0]
    assert lone.member.state.store.revision == 2002


def test_hostile_transactions_do_not_stop_writes(lone: Paced) -> None:
    greedy, modest = Client(), Client()
    for n in range(40):
        propose(lone, greedy, n, TXN, HOSTILE)
    turn(lone.member)
    propose(lone, modest, 1, PUT, proto.PutRequest(key=b"k", value=b"v"))
    turns = 0
    while not modest.answers:
        turn(lone.member)
        saves = lone.member.take_saves()
        lone.wal.save_all(saves)
        lone.member.persisted(saves)
        turns += 1
        assert turns < 100
    assert not greedy.answers


@pytest.mark.parametrize(
    "request_",
    [
        proto.TxnRequest(
            compare=[proto.Compare(**EVERYTHING, target=BY_VALUE, result=3, value=b"x")] * 3,
            success=[put(b"a")],
        ),
        proto.TxnRequest(success=[put(b"a"), *[op(range=SORTED)] * 3, put(b"b")]),
        proto.TxnRequest(success=[*[op(range=proto.RangeRequest(**EVERYTHING))] * 30, put(b"a")]),
    ],
    ids=["compares", "ranges between writes", "ranges before a write"],
)
def test_what_a_transaction_visits_in_apply_is_limited_on_every_member_alike(
    lone: Paced, request_: Any
) -> None:
    store = lone.member.state.store
    for is_asked in (True, False):
        with pytest.raises(txn.TooManyKeys, match="visit too many keys"):
            finish(txn.apply_steps(store, request_, is_asked))
        assert not store.is_writing and not store.pinned


def test_an_entry_of_changes_to_a_large_role_is_applied_in_steps(lone: Paced) -> None:
    """To grant one of two thousand permissions takes 5 ms."""
    state = lone.member.state
    state.auth.add_role(proto.AuthRoleAddRequest(name="r"))
    grant = METHOD_BY_NAME["Auth.RoleGrantPermission"].number
    permissions = [proto.Permission(key=b"%d" % n) for n in range(20)]
    waiters = [
        Waiter(None, 0, grant, proto.AuthRoleGrantPermissionRequest(name="r", perm=permission))
        for permission in permissions
    ]
    assert sum(1 for _ in state.apply(waiters)) >= len(waiters) - 1
    assert len(state.auth.permissions("r")) == 20
    state.store.mark(state.store.applied_index, state.store.applied_term)


def test_clients_raise_a_bounded_number_of_alarms(lone: Paced) -> None:
    client, number = Client(), METHOD_BY_NAME["Maintenance.Alarm"].number
    alarms = lone.member.state.alarms

    def ask(action: int, node: int) -> None:
        request = proto.AlarmRequest(action=action, memberID=node, alarm=2)
        handle, _ = HANDLERS[number]
        data = frame(node, number, 0, request.encode())
        handle(lone.member, Waiter(client, node, number, request), data)
        lone.settle()

    for node in range(1, MAX_ALARMS + 1):
        ask(1, node)
    assert len(list(alarms)) == MAX_ALARMS == len(client.answers)
    with pytest.raises(EtcdError, match="too many requests"):
        ask(1, 1000)
    ask(1, 1)
    ask(2, 5)
    ask(1, 1000)
    assert len(list(alarms)) == MAX_ALARMS and (1000, 2) in alarms and not client.failures


FEW = {"key": b"k00000", "range_end": b"k00250"}
FEW_AND_NONE_ANSWERED = op(range=proto.RangeRequest(**FEW, min_mod_revision=1 << 40))
COMPARE_FEW = proto.Compare(**FEW, target=BY_VALUE, result=3, value=b"x")
COMPARE_ONE = proto.Compare(key=b"k00000", target=BY_VALUE, result=3, value=b"x")


def nested(*ops: Any, compare: Any = ()) -> Any:
    return op(txn=proto.TxnRequest(compare=compare, success=ops))


@pytest.mark.parametrize(
    "request_",
    [
        proto.TxnRequest(compare=[COMPARE_FEW] * 100),
        proto.TxnRequest(success=[nested(compare=[COMPARE_FEW] * 20)] * 20),
        proto.TxnRequest(success=[nested(compare=[COMPARE_ONE] * 100)] * 20),
        proto.TxnRequest(compare=[COMPARE_FEW] * 20, success=[put(b"a")]),
        proto.TxnRequest(success=[FEW_AND_NONE_ANSWERED] * 100),
        proto.TxnRequest(success=[nested(*[FEW_AND_NONE_ANSWERED] * 20)] * 20),
        proto.TxnRequest(success=[*[op(range=proto.RangeRequest(**FEW))] * 100, put(b"a")]),
    ],
    ids=[
        "compares",
        "nested compares of ranges",
        "nested compares of a key",
        "compares before a write",
        "ranges",
        "nested ranges",
        "ranges before a write",
    ],
)
def test_many_small_parts_of_a_transaction_are_not_one_step(
    lone: Paced, monkeypatch: pytest.MonkeyPatch, request_: Any
) -> None:
    """A step visits the keys of about one small range, however many there are in the request."""
    store, visited = lone.member.state.store, [0]
    first, get = SortedTable.first, SortedTable.get

    def counting_first(self: Any, *arguments: Any) -> Any:
        keys = first(self, *arguments)
        visited[-1] += len(keys)
        return keys

    def counting_get(self: Any, *arguments: Any) -> Any:
        visited[-1] += 1
        return get(self, *arguments)

    monkeypatch.setattr(SortedTable, "first", counting_first)
    monkeypatch.setattr(SortedTable, "get", counting_get)
    for _ in txn.txn_steps(store, request_):
        visited.append(0)
    store.end_revision()
    store.mark(store.applied_index, store.applied_term)
    assert max(visited) <= 4 * 256 and sum(visited) >= 20 * 100


# What waits for the other members.

PIECE_BYTES = 8192
FLOOD = 3 * MAX_UNANSWERED
KEEP_ALIVES = METHOD_BY_NAME["Lease.LeaseKeepAlive"].number
TIME_TO_LIVE = METHOD_BY_NAME["Lease.LeaseTimeToLive"].number
RANGE_STREAM = METHOD_BY_NAME["KV.RangeStream"].number
RENEWAL = proto.LeaseKeepAliveRequest(ID=5).encode()
KEY = proto.RangeRequest(key=b"k").encode()

FLOODS = {
    "renewals": frame(1, KEEP_ALIVES, 0, RENEWAL) * FLOOD,
    "streams": (frame(1, KEEP_ALIVES, 0, RENEWAL) + frame(1, KEEP_ALIVES, CANCEL, b"")) * FLOOD,
    "parts": (frame(1, RANGE_STREAM, 0, KEY) + frame(1, RANGE_STREAM, CANCEL, b"")) * FLOOD,
    "ranges": b"".join(frame(n, RANGE, 0, KEY) for n in range(1, FLOOD)),
    "cancelled": b"".join(
        frame(n, RANGE, 0, KEY) + frame(n, RANGE, CANCEL, b"") for n in range(1, FLOOD)
    ),
    "leases": b"".join(frame(n, TIME_TO_LIVE, 0, RENEWAL) for n in range(1, FLOOD)),
}


@pytest.mark.parametrize("of_leader", [True, False], ids=["leader", "follower"])
@pytest.mark.parametrize("kind", FLOODS)
def test_a_connection_waits_while_much_that_it_asked_has_no_answer(
    kind: str, of_leader: bool
) -> None:
    """It is read from again as soon as some requests are answered, also if all of them are of a
    stream that was closed, whose answers are not sent."""
    world = World(1)
    world.found(3)
    leader = world.elect()
    node = next(node for node in world.nodes.values() if (node is leader) is of_leader)
    woken: list[Any] = []
    session = NativeSession(node.member, woken.append)
    session.receive(HANDSHAKE.pack(MAGIC, 1, 1))
    flood = FLOODS[kind]
    for other in world.nodes:
        world.partition([other], [name for name in world.nodes if name != other])
    at = 0
    while not session.is_full:
        assert at < len(flood), "everything was read"
        session.receive(flood[at : at + PIECE_BYTES])
        at += PIECE_BYTES
    assert session.kept_bytes > MAX_UNANSWERED * 512  # The limit of memory counts it.
    session.outbox.is_queued = False
    session.outbox.parts.clear()
    woken.clear()
    world.heal()
    world.run_until(lambda: not session.is_full)
    assert woken
    world.run_until(lambda: not session.calls.unanswered)
