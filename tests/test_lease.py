"""Leases: what is replicated, and what only the leader knows."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from rigs.lone_member import LoneMember, turn
from rigs.users import User

from etcdlite import lease, proto
from etcdlite.errors import EtcdError
from etcdlite.lease import MAX_TTL_S, RETRY_S, Lessor
from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.methods import LEASE_GRANT, PUT
from etcdlite.replica import leases
from etcdlite.storage.steps import finish


def refused(text: str):
    return pytest.raises(EtcdError, match=f"^etcdserver: {text}$")


def leader(min_ttl_s: int = 1, now: float = 0.0, limits: Limits = DEFAULT_LIMITS) -> Lessor:
    lessor = Lessor(min_ttl_s, limits)
    finish(lessor.promote(now))
    return lessor


def next_deadline(lessor: Lessor) -> float | None:
    return lessor._heap[0][0] if lessor._heap else None


def drain(lessor: Lessor, now: float, limit: int = 10**9) -> list[int]:
    """All that is due, however many calls that takes."""
    due = []
    while (when := next_deadline(lessor)) is not None and when <= now:
        due += lessor.expired(now, limit)
    return due


# Granting and revoking.


def test_a_short_ttl_is_raised_to_the_minimum():
    lessor = Lessor(min_ttl_s=2)
    assert [lessor.grant(n, ttl, 0.0) for n, ttl in ((1, 60), (2, 1), (3, 0), (4, -3))] == [
        60,
        2,
        2,
        2,
    ]
    assert lessor.ttl_s(2) == 2


def test_the_largest_ttl_is_etcds():
    lessor = leader()
    assert lessor.grant(1, MAX_TTL_S, 0.0) == 9_000_000_000
    with refused("too large lease TTL"):
        lessor.grant(2, MAX_TTL_S + 1, 0.0)


def test_an_id_can_be_granted_once():
    lessor = Lessor()
    lessor.grant(7, 10, 0.0)
    with refused("lease already exists"):
        lessor.grant(7, 10, 0.0)
    lessor.revoke(7)
    assert lessor.grant(7, 20, 0.0) == 20


def test_the_id_0_is_refused():
    with refused("requested lease not found"):
        Lessor().grant(0, 10, 0.0)


def test_a_generated_id_is_positive_and_unused(tmp_path):
    lone = LoneMember(tmp_path)
    user = User(lone)
    user.ask("Lease.LeaseGrant", ID=5, TTL=60)
    bits = iter([0, 5, 7])
    lone.member.rng = SimpleNamespace(getrandbits=lambda count: next(bits))
    assert user.ask("Lease.LeaseGrant", TTL=60).ID == 7
    lone.close()


def test_everything_about_an_unknown_lease_is_refused():
    lessor = leader()
    for ask in (
        lambda: lessor.revoke(1),
        lambda: lessor.attach(b"k", 1),
        lambda: lessor.keys(1),
        lambda: lessor.ttl_s(1),
        lambda: lessor.encode(1),
        lambda: lessor.renew(1, 0.0),
        lambda: lessor.remaining_s(1, 0.0),
    ):
        with refused("requested lease not found"):
            ask()
    assert lessor.key_lease == {}


# Keys.


def test_revoking_gives_the_keys_in_order_and_frees_them():
    lessor = Lessor()
    lessor.grant(1, 10, 0.0)
    for key in (b"b", b"c", b"a"):
        lessor.attach(key, 1)
    assert lessor.keys(1) == [b"a", b"b", b"c"]
    assert lessor.revoke(1) == [b"a", b"b", b"c"]
    assert b"a" not in lessor.key_lease
    assert not lessor.exists(1)


def test_a_key_hangs_on_one_lease_only():
    lessor = Lessor()
    lessor.grant(1, 10, 0.0)
    lessor.grant(2, 10, 0.0)
    lessor.attach(b"k", 1)
    lessor.attach(b"k", 2)
    lessor.attach(b"k", 2)
    assert (lessor.keys(1), lessor.keys(2), lessor.key_lease[b"k"]) == ([], [b"k"], 2)


def test_a_key_that_is_attached_to_no_lease_stays_where_it_was_when_refused():
    lessor = Lessor()
    lessor.grant(1, 10, 0.0)
    lessor.attach(b"k", 1)
    with refused("requested lease not found"):
        lessor.attach(b"k", 2)
    assert lessor.key_lease[b"k"] == 1


def test_detaching_a_key_without_a_lease_changes_nothing():
    lessor = Lessor()
    lessor.grant(1, 10, 0.0)
    lessor.attach(b"k", 1)
    lessor.detach(b"other")
    lessor.detach(b"k")
    lessor.detach(b"k")
    assert lessor.keys(1) == []


# Records.


def test_a_record_is_etcds_lease_message():
    lessor = Lessor()
    lessor.grant(5, 300, 0.0)
    assert lessor.encode(5).hex() == "0805" + "10ac02"
    lessor.checkpoint(5, 7)
    assert lessor.encode(5).hex() == "0805" + "10ac02" + "1807"


def test_a_restored_lease_is_the_same_lease():
    before, after = Lessor(), Lessor()
    for lease_id in (1, 1 << 62, (1 << 63) - 1, -1, -(1 << 63)):
        before.grant(lease_id, 60, 0.0)
        before.checkpoint(lease_id, 9)
        after.restore(lease_id, before.encode(lease_id))
    ids = finish(after.lease_steps())
    assert ids == finish(before.lease_steps())
    assert [after.encode(i) for i in ids] == [before.encode(i) for i in ids]


def test_restoring_a_record_again_keeps_the_keys():
    lessor = Lessor()
    lessor.grant(1, 60, 0.0)
    lessor.attach(b"k", 1)
    lessor.restore(1, lessor.encode(1))
    assert lessor.keys(1) == [b"k"]


def test_restoring_a_removal_forgets_the_lease_and_its_keys_even_twice():
    lessor = Lessor()
    lessor.grant(1, 60, 0.0)
    lessor.attach(b"k", 1)
    lessor.restore(1, None)
    lessor.restore(1, None)
    assert (len(lessor), lessor.key_lease) == (0, {})


@pytest.mark.parametrize("record", ["", "08", "0802", "0801103c2001", "08011a00", "0801ff"])
def test_a_damaged_record_is_refused(record):
    with pytest.raises(ValueError):
        Lessor().restore(1, bytes.fromhex(record))


# Time.


def test_a_lease_is_due_at_its_ttl_and_not_before():
    lessor = leader()
    lessor.grant(1, 10, 5.0)
    assert next_deadline(lessor) == 15.0
    assert lessor.expired(14.9, 10) == []
    assert lessor.remaining_s(1, 14.0) == 1.0
    assert lessor.expired(15.0, 10) == [1]


def test_a_renewed_lease_lives_on():
    lessor = leader()
    lessor.grant(1, 10, 0.0)
    assert lessor.renew(1, 9.0) == 10
    assert drain(lessor, 18.9) == []
    assert drain(lessor, 19.0) == [1]


def test_an_overdue_lease_cannot_be_renewed():
    lessor = leader()
    lessor.grant(1, 10, 0.0)
    with refused("requested lease not found"):
        lessor.renew(1, 10.0)


def test_a_lease_that_is_not_revoked_is_named_again_after_a_while():
    lessor = leader()
    lessor.grant(1, 10, 0.0)
    assert drain(lessor, 10.0) == [1]
    assert drain(lessor, 10.0 + RETRY_S - 0.1) == []
    assert drain(lessor, 10.0 + RETRY_S) == [1]
    lessor.revoke(1)
    assert drain(lessor, 100.0) == []
    assert next_deadline(lessor) is None


def test_a_revoked_and_granted_again_id_has_its_own_deadline():
    lessor = leader()
    lessor.grant(1, 10, 0.0)
    lessor.revoke(1)
    lessor.grant(1, 10, 0.0)
    lessor.revoke(1)
    lessor.grant(1, 30, 1.0)
    assert drain(lessor, 30.9) == []
    assert drain(lessor, 31.0) == [1]


def test_a_lease_of_many_years_is_due_in_the_end():
    lessor = leader()
    lessor.grant(1, MAX_TTL_S, 0.0)
    assert drain(lessor, 1000.0) == []
    assert drain(lessor, float(MAX_TTL_S)) == [1]


def test_leases_are_named_in_the_order_of_their_deadlines_and_within_the_limit():
    lessor = leader()
    for lease_id, ttl_s in ((1, 30), (2, 10), (3, 20)):
        lessor.grant(lease_id, ttl_s, 0.0)
    assert finish(lessor.lease_steps()) == [2, 3, 1]
    assert [lessor.expired(60.0, 1) for _ in range(4)] == [[2], [3], [1], []]


def test_a_follower_has_no_deadlines():
    lessor = Lessor()
    lessor.grant(2, 10, 0.0)
    lessor.grant(1, 20, 0.0)
    assert next_deadline(lessor) is None
    assert lessor.expired(1e12, 10) == []
    assert finish(lessor.lease_steps()) == [1, 2]
    for ask in (lessor.renew, lessor.remaining_s):
        with refused("not leader"):
            ask(1, 0.0)


def test_a_new_leader_gives_every_lease_its_full_ttl_and_the_extension():
    lessor = Lessor()
    lessor.grant(1, 10, 0.0)
    finish(lessor.promote(1000.0, extend_s=1.0))
    assert lessor.remaining_s(1, 1000.0) == 11.0
    assert drain(lessor, 1010.9) == []
    assert drain(lessor, 1011.0) == [1]


def test_a_new_leader_goes_on_from_a_checkpoint():
    lessor = Lessor()
    lessor.grant(1, 600, 0.0)
    lessor.grant(2, 600, 0.0)
    lessor.checkpoint(1, 50)
    lessor.checkpoint(3, 50)
    finish(lessor.promote(0.0))
    assert drain(lessor, 50.0) == [1]
    lessor.demote()
    lessor.checkpoint(1, 0)
    finish(lessor.promote(100.0))
    assert drain(lessor, 699.0) == []


def test_a_demoted_leader_names_nothing():
    lessor = leader()
    lessor.grant(1, 10, 0.0)
    lessor.demote()
    assert next_deadline(lessor) is None
    assert lessor.expired(1e12, 10) == []


def test_a_demoted_leader_forgets_many_deadlines_a_part_at_a_time():
    lessor = Lessor(limits=Limits(expire_step_leases=25))
    for lease_id in range(1, 1001):
        lessor.grant(lease_id, 100 + lease_id, 0.0)
    finish(lessor.promote(0.0))
    lessor.demote()
    parts = 1
    while next_deadline(lessor) is not None:
        lessor.trim()
        parts += 1
    assert parts == 10


@pytest.mark.parametrize("parts", [0, 1, 2, 50])
def test_a_leader_that_is_elected_again_ignores_its_earlier_deadlines(parts):
    """Also those of leases that have no new deadline yet, however many are still in the heap."""
    limits = Limits(sort_step_items=10, merge_step_items=10, expire_step_leases=10)
    lessor = Lessor(limits=limits)
    for lease_id in range(1, 101):
        lessor.grant(lease_id, 10, 0.0)
    finish(lessor.promote(0.0))
    lessor.demote()
    for _ in range(parts):
        lessor.trim()
    steps = lessor.promote(100.0)
    next(steps)
    assert drain(lessor, 100.0) == []
    lessor.renew(100, 105.0)
    finish(steps)
    assert drain(lessor, 109.9) == []
    assert drain(lessor, 110.0) == list(range(1, 100))
    assert drain(lessor, 112.9) == []
    assert drain(lessor, 113.0) == list(range(1, 100)), "a second time, until they are revoked"
    assert drain(lessor, 115.0) == [100]


def recorded_revokes(member, monkeypatch):
    """The entries of revokes that the member proposes from now on: the index and the leases of
    each."""
    propose_once, entries = member.writes.propose_once, []

    def recorded(requests):
        index = propose_once(requests)
        entries.append((index, [request.ID for _, request in requests]))
        return index

    monkeypatch.setattr(member.writes, "propose_once", recorded)
    return entries


def with_leases(tmp_path, leases, keys):
    lone = LoneMember(tmp_path)
    lone.settle()
    for lease_id in range(1, leases + 1):
        lone.member.writes.propose_own(LEASE_GRANT, proto.LeaseGrantRequest(ID=lease_id, TTL=10))
        for n in range(keys):
            put = proto.PutRequest(key=b"%d/%d" % (lease_id, n), lease=lease_id)
            lone.member.writes.propose_own(PUT, put)
    lone.settle()
    return lone


def test_many_expired_leases_are_revoked_a_few_at_a_time(tmp_path, monkeypatch):
    lone = with_leases(tmp_path, 2500, 0)
    member = lone.member
    proposed = recorded_revokes(member, monkeypatch)
    lone.now += 11.0
    per_tick = []
    while len(member.state.lessor):
        proposed.clear()
        member.tick()
        assert len(proposed) <= 1
        lone.settle()
        assert max(len(some) for _, some in proposed) <= leases.STEP_LEASES
        per_tick.append(sum(len(some) for _, some in proposed))
        lone.now += 0.1
    assert per_tick == [1000, 1000, 500]
    lone.close()


def test_a_write_waits_for_one_entry_of_revokes_at_most(tmp_path, monkeypatch):
    lone = with_leases(tmp_path, 1500, 0)
    member, log = lone.member, lone.member.raft.log
    proposed = recorded_revokes(member, monkeypatch)
    lone.now += 11.0
    rounds = 0
    while len(member.state.lessor):
        if rounds % 7 == 0:  # The disk is slow: a save takes longer than some ticks.
            lone.now += 0.1
            member.tick()
        turn(member)
        member.maintain()
        waiting = [some for index, some in proposed if index > log.applied]
        assert len(waiting) <= 1
        rounds += 1
        if rounds % 11 == 0:
            saves = member.take_saves()
            lone.wal.save_all(saves)
            member.persisted(saves)
        assert rounds < 5000, "a lease is left"
    ids = [lease_id for _, some in proposed for lease_id in some]
    assert sorted(ids) == list(range(1, 1501)), "a lease is revoked twice"
    lone.close()


def test_an_entry_revokes_fewer_leases_if_they_have_many_keys(tmp_path, monkeypatch):
    lone = with_leases(tmp_path, 12, leases.STEP_LEASES // 4)
    proposed = recorded_revokes(lone.member, monkeypatch)
    lone.now += 11.0
    lone.member.tick()
    lone.settle()
    assert [len(some) for _, some in proposed] == [4, 4, 4]
    assert len(lone.member.state.lessor) == 0
    lone.close()


def test_a_new_leader_does_not_wait_for_revokes_that_were_lost(tmp_path):
    """Another leader may have replaced them: the log may never become as long again."""
    lone = with_leases(tmp_path, 300, 0)
    keeper, lessor = lone.member.leases, lone.member.state.lessor
    keeper._proposed_index = 1 << 40
    lone.now += 11.0
    lone.member.tick()
    lone.settle()
    assert len(lessor) == 300
    lessor.demote()
    keeper.promote(lone.now, 0.0)
    lone.now += 11.0
    lone.member.tick()
    lone.settle()
    assert len(lessor) == 0
    lone.close()


def test_leases_that_would_end_together_under_a_new_leader_are_drawn_apart():
    lessor = Lessor()
    for lease_id in range(1, 10_001):
        lessor.grant(lease_id, 60, 0.0)
    finish(lessor.promote(0.0))
    assert drain(lessor, 59.9) == []
    most = 0
    seen = []
    for second in range(60, 80):
        due = drain(lessor, float(second))
        most = max(most, len(due))
        seen += due
        for lease_id in due:
            lessor.revoke(lease_id)
    assert sorted(seen) == list(range(1, 10_001))
    assert most <= lease.REVOKE_RATE_PER_S + 1


def test_a_new_leader_sets_the_deadlines_of_many_leases_in_steps():
    lessor = Lessor(limits=Limits(sort_step_items=100, merge_step_items=100))
    for lease_id in range(1, 1001):
        lessor.grant(lease_id, 10, 0.0)
    steps = lessor.promote(100.0, extend_s=1.0)
    next(steps)
    # What happens to a lease before its turn.
    lessor.renew(1000, 103.0)
    assert lessor.remaining_s(999, 103.0) == 8.0
    lessor.revoke(998)
    lessor.revoke(997)
    lessor.grant(997, 30, 103.0)
    assert not {998, 997, 996} & set(drain(lessor, 110.9))
    lessor.postpone(102.0, 5.0)
    assert lessor.checkpoints([995], 103.0, 1.0) == []
    assert sum(1 for _ in steps) > 10
    assert lessor.remaining_s(1, 103.0) == 13.0
    assert 998 not in lessor._leases and lessor.remaining_s(997, 103.0) == 35.0
    assert set(drain(lessor, 130.0)) == set(range(1, 1001)) - {997, 998}
    # Another term does not go on with the steps of this one.
    steps = lessor.promote(200.0)
    next(steps)
    lessor.demote()
    assert sum(1 for _ in steps) > 10 and next_deadline(lessor) is None


def test_a_lease_renewed_while_deadlines_are_set_does_not_delay_those_after_it():
    lessor = Lessor(limits=Limits(sort_step_items=100, merge_step_items=100))
    for lease_id in range(1, 1001):
        lessor.grant(lease_id, 100_000, 0.0)
        lessor.checkpoint(lease_id, 10)
    steps = lessor.promote(0.0)
    next(steps)
    for lease_id in 1, 500:
        # The reset of its checkpoint is applied before the renewal itself.
        lessor.checkpoint(lease_id, 0)
    finish(steps)
    assert set(drain(lessor, 12.0)) == set(range(1, 1001)) - {1, 500}
    assert lessor.remaining_s(500, 0.0) == 100_000


def test_a_new_leader_that_learns_of_a_renewal_late_gives_the_full_ttl():
    lessor = Lessor()
    lessor.grant(1, 1000, 0.0)
    lessor.checkpoint(1, 5)
    finish(lessor.promote(0.0))
    assert lessor.remaining_s(1, 0.0) == 5.0
    # The entry of the leader before, which answered the renewal, is applied only now.
    lessor.checkpoint(1, 0)
    assert lessor.remaining_s(1, 0.0) == 1000.0
    assert drain(lessor, 999.0) == [] and drain(lessor, 1000.0) == [1]
    # A checkpoint of its own takes nothing away.
    lessor.grant(2, 1000, 500.0)
    lessor.checkpoint(2, 300)
    assert lessor.remaining_s(2, 500.0) == 1000.0


def test_a_lease_renewed_after_being_drawn_apart_is_due_at_its_ttl():
    lessor = Lessor()
    for lease_id in range(1, 10_001):
        lessor.grant(lease_id, 5, 0.0)
    finish(lessor.promote(0.0))
    last = finish(lessor.lease_steps())[-1]
    assert lessor.remaining_s(last, 0.0) > 15.0
    lessor.renew(last, 1.0)
    assert last in drain(lessor, 6.0)


def test_one_call_looks_at_a_bounded_number_of_leases():
    lessor = leader(limits=Limits(expire_step_leases=10))
    for lease_id in range(1, 101):
        lessor.grant(lease_id, 10, 0.0)
        lessor.renew(lease_id, 5.0)
    assert lessor.expired(10.0, 1000) == []
    when = next_deadline(lessor)
    assert when is not None and when <= 10.0, "the caller must know that more waits"
    assert sorted(drain(lessor, 15.0)) == list(range(1, 101))


def test_what_revoked_leases_leave_behind_goes_within_a_minute():
    lessor = leader()
    for lease_id in range(1, 1001):
        lessor.grant(lease_id, MAX_TTL_S, 0.0)
        lessor.revoke(lease_id)
    assert drain(lessor, lease.SCHEDULE_AHEAD_S) == []
    assert next_deadline(lessor) is None


def test_a_hundred_thousand_leases_are_small_and_end_in_bounded_calls():
    lessor = leader()
    for lease_id in range(1, 100_001):
        lessor.grant(lease_id, 60, 0.0)
        lessor.attach(b"/registry/lease/%d" % lease_id, lease_id)
    one = lessor._leases[100_000]
    parts = (one, one.deadline, lessor._heap[-1])
    assert sum(map(sys.getsizeof, parts)) < 200, "bytes per lease, without keys and dicts"
    ended = 0
    while due := lessor.expired(60.0, 500):
        assert len(due) <= 500
        for lease_id in due:
            ended += len(lessor.revoke(lease_id))
    assert ended == 100_000
    assert lessor.key_lease == {}


class Leases(RuleBasedStateMachine):
    """Against plain dicts: a lease is named when it is due and at no other time."""

    ids = st.integers(1, 5)
    keys = st.sampled_from([b"a", b"b", b"c"])

    def __init__(self) -> None:
        super().__init__()
        self.lessor = Lessor(2)
        self.now = 0.0
        self.ttls: dict[int, int] = {}
        self.holders: dict[bytes, int] = {}
        self.deadlines: dict[int, float] = {}
        self.named: dict[int, float] = {}

    @rule(lease_id=ids, ttl_s=st.integers(1, 200))
    def grant(self, lease_id: int, ttl_s: int) -> None:
        if lease_id in self.ttls:
            return
        ttl_s = self.ttls[lease_id] = self.lessor.grant(lease_id, ttl_s, self.now)
        if self.lessor.promoted:
            self.deadlines[lease_id] = self.now + ttl_s

    @rule(lease_id=ids)
    def revoke(self, lease_id: int) -> None:
        if lease_id not in self.ttls:
            return
        keys = sorted(key for key, holder in self.holders.items() if holder == lease_id)
        assert self.lessor.revoke(lease_id) == keys
        for key in keys:
            del self.holders[key]
        del self.ttls[lease_id]
        self.deadlines.pop(lease_id, None)
        self.named.pop(lease_id, None)

    @rule(key=keys, lease_id=ids)
    def attach(self, key: bytes, lease_id: int) -> None:
        if lease_id in self.ttls:
            self.lessor.attach(key, lease_id)
            self.holders[key] = lease_id

    @rule(key=keys)
    def detach(self, key: bytes) -> None:
        self.lessor.detach(key)
        self.holders.pop(key, None)

    @rule()
    def change_leader(self) -> None:
        self.named.clear()
        self.deadlines.clear()
        if self.lessor.promoted:
            self.lessor.demote()
        else:
            finish(self.lessor.promote(self.now))
            self.deadlines = {i: self.now + ttl for i, ttl in self.ttls.items()}

    @precondition(lambda self: self.lessor.promoted)
    @rule(lease_id=ids)
    def renew(self, lease_id: int) -> None:
        deadline = self.deadlines.get(lease_id)
        if deadline is None or deadline <= self.now:
            with refused("requested lease not found"):
                self.lessor.renew(lease_id, self.now)
        else:
            self.lessor.renew(lease_id, self.now)
            self.deadlines[lease_id] = self.now + self.ttls[lease_id]

    @rule(seconds=st.sampled_from([0.5, 2.0, 30.0, 100.0]), limit=st.sampled_from([1, 100]))
    def wait(self, seconds: float, limit: int) -> None:
        self.now += seconds
        waiting = {
            lease_id
            for lease_id, deadline in self.deadlines.items()
            if deadline <= self.now and self.named.get(lease_id, -1e9) + RETRY_S <= self.now
        }
        due = drain(self.lessor, self.now, limit)
        assert len(due) == len(set(due))
        assert set(due) == waiting
        self.named.update(dict.fromkeys(due, self.now))

    @invariant()
    def keys_agree(self) -> None:
        assert self.lessor.key_lease == self.holders
        for lease_id in self.ttls:
            assert self.lessor.keys(lease_id) == sorted(
                key for key, holder in self.holders.items() if holder == lease_id
            )
        for lease_id, deadline in self.deadlines.items():
            assert self.lessor.remaining_s(lease_id, self.now) == deadline - self.now


TestLeasesAgainstAModel = Leases.TestCase
TestLeasesAgainstAModel.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)


def test_a_lease_that_expired_after_a_stall_is_not_given_the_time_of_it():
    """Its revoke is proposed: a renewal that succeeds would be followed by it."""
    lessor = Lessor()
    finish(lessor.promote(0.0))
    lessor.grant(1, 10, 0.0)
    lessor.grant(2, 20, 0.0)
    assert drain(lessor, 12.0) == [1]
    lessor.postpone(9.0, 3.0)  # The loop saw only afterwards that it stood still.
    with pytest.raises(EtcdError):
        lessor.renew(1, 12.0)
    assert lessor.remaining_s(2, 12.0) == 11.0
