"""Deliberate bugs: each is switched on alone, and the simulator must find it.

A mutation replaces a piece of the shipping code by a wrong one. `hunt` runs seeds until one fails;
how many that took says how well the checkers see. The seeds are fixed, so the table is too, until
the code changes. A mutation says what a simulation needs for it to matter (a number of members,
some faults), which is what a person who hunts that kind of bug would choose; all else is drawn.

    python -m tests.sim.mutations [--most SEEDS] [name ...]
"""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from etcdlite import (
    auth,
    datadir,
    frames,
    lease,
    member,
    methods,
    mvcc,
    peer,
    peer_frames,
    proto,
    raft,
    raft_log,
    snap,
    tokens,
    txn,
    versions,
    wal,
)
from etcdlite import watch as watches
from etcdlite.errors import error
from etcdlite.methods import LEASE_REVOKE, PUT, RANGE, TXN, WATCH
from etcdlite.raft import Ready
from etcdlite.replica import access, maintenance, rollback, state, version_keeper, writes
from etcdlite.replica import entry as entry_format
from etcdlite.replica import reads as reading
from etcdlite.request import Waiter
from etcdlite.rights import EVERYTHING
from etcdlite.storage import data, index, layout, removal
from etcdlite.storage.layout import AUTH_ROLE
from etcdlite.wire import api
from sim.simulation import STOPPED, Failure, Simulation

MOST_SEEDS = 60
"""Any mutation must be found within this number of seeds."""

MINUTES = 0.25

SLIPS = (
    "TypeError",
    "AttributeError",
    "NameError",
    "ImportError",
    "ValueError: too many values to unpack",
    "ValueError: not enough values to unpack",
)
"""A failure with one of these comes from a patch that no longer fits the code it replaces."""


@dataclass
class Mutation:
    name: str
    switch: Callable[[Patch], None]
    faults: dict[str, float] = field(default_factory=dict)
    """Weights that a simulation is given on top of what it draws."""
    load: dict[str, float] = field(default_factory=dict)
    members: int = 3
    mean_pause_s: float = 0.0
    """Between two faults; 0: as drawn."""
    voter_crashes: float = 0.0
    look_s: float = 0.0
    """How long the work between two looks at the clock takes; 0: as drawn."""
    tunables: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """Of the members; those of consensus are under "raft"."""
    users: bool = False
    """Clients are users, whose rights change."""


class Patch:
    """Replaced attributes, put back at the end."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, Any, Any, bool]] = []

    def set(self, owner: Any, name: str, value: Any) -> Any:
        """Replace an attribute; the old one is returned."""
        old = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
        _check_fits(old, value)
        self._saved.append((owner, name, old, False))
        setattr(owner, name, value)
        return old

    def item(self, owner: dict[Any, Any], key: Any, value: Any) -> Any:
        """Replace an entry of a table."""
        old = owner[key]
        _check_fits(old, value)
        self._saved.append((owner, key, old, True))
        owner[key] = value
        return old

    def undo(self) -> None:
        for owner, name, old, is_item in reversed(self._saved):
            if is_item:
                owner[name] = old
            else:
                setattr(owner, name, old)


def _check_fits(old: Any, new: Any) -> None:
    """Raises TypeError if a function does not take what the one that it replaces takes: a path that
    passes all of it may be rare."""
    if isinstance(old, FunctionType) and isinstance(new, FunctionType):
        parameters = inspect.signature(old).parameters
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        in_order = [name for name, one in parameters.items() if one.kind in kinds]
        by_name = {name: 0 for name, one in parameters.items() if one.kind == one.KEYWORD_ONLY}
        inspect.signature(new).bind(*in_order, **by_name)


MUTATIONS: dict[str, Mutation] = {}


def mutation(**needs: Any) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def add(switch: Callable[[Patch], None]) -> Callable[[Patch], None]:
        name = switch.__name__.strip("_").replace("_", " ")
        MUTATIONS[name] = Mutation(name, switch, **needs)
        return switch

    return add


CRASHES = {"power": 20.0, "kill": 5.0, "trip": 10.0}
SPLITS = {"partition": 15.0, "isolate_leader": 15.0, "one_way": 5.0}

# Consensus.


@mutation(
    faults={"partition": 40.0, "isolate_leader": 60.0, "one_way": 20.0, "power": 20.0},
    load={"put": 1.0},
    mean_pause_s=0.5,
    voter_crashes=0.6,
)
def _vote_and_term_not_persisted(patch: Patch) -> None:
    save = wal.WAL.save

    def forgetful(self: Any, hard_state: Any, entries: Any) -> None:
        if hard_state is not None and not entries:
            hard_state = None
        save(self, hard_state, entries)

    patch.set(wal.WAL, "save", forgetful)


@mutation(faults=SPLITS, mean_pause_s=0.5)
def _two_votes_in_one_term(patch: Patch) -> None:
    on_vote = raft.Raft._on_vote

    def generous(self: Any, message: Any) -> None:
        if message.kind == raft.VOTE:
            self.vote = self.leader = 0
        on_vote(self, message)

    patch.set(raft.Raft, "_on_vote", generous)


@mutation(faults={**SPLITS, **CRASHES})
def _vote_for_a_shorter_log(patch: Patch) -> None:
    on_vote = raft.Raft._on_vote

    def blind(self: Any, message: Any) -> None:
        on_vote(self, message._replace(log_term=1 << 40))

    patch.set(raft.Raft, "_on_vote", blind)


@mutation(faults={**SPLITS, **CRASHES}, members=5)
def _commit_without_a_majority(patch: Patch) -> None:
    _commit_found(patch, lambda self: max(self.progress[node].match for node in self.voters))


def _commit_found(patch: Patch, find: Callable[[Any], int]) -> None:
    """Leaders commit up to the index that `find` returns, if that entry is of their term."""

    def hasty(self: Any) -> bool:
        log = self.log
        found = find(self)
        if found <= log.committed or log.term(found) != self.term:
            return False
        log.commit_to(found)
        self._start_round_if_due()
        return True

    patch.set(raft.Raft, "_maybe_commit", hasty)


@mutation(faults={**SPLITS, **CRASHES}, members=5)
def _commit_of_an_old_terms_entry(patch: Patch) -> None:
    def hasty(self: Any) -> bool:
        log = self.log
        matches = sorted(self.progress[node].match for node in self.voters)
        found = matches[(len(matches) - 1) // 2]
        if found <= log.committed:
            return False
        log.commit_to(found)
        return True

    patch.set(raft.Raft, "_maybe_commit", hasty)
    patch.set(raft.Raft, "_has_committed_in_term", lambda self: True)


@mutation(faults={**SPLITS, "pause": 15.0}, load={"get": 80.0})
def _read_without_a_quorum(patch: Patch) -> None:
    def at_once(self: Any, node: int, context: bytes) -> None:
        self._round_index = self.log.committed
        self._answer_read(node, context)

    patch.set(raft.Raft, "_take_read", at_once)


@mutation(
    faults={"add_member": 60.0, "promote": 0.0, "isolate_with_learners": 60.0},
    load={"get": 80.0, "put": 40.0},
    mean_pause_s=0.4,
    options={"strict_reconfig_check": False},
)
def _learners_confirm_reads(patch: Patch) -> None:
    on_heartbeat_resp = raft.Raft._on_heartbeat_resp

    def finish(self: Any) -> None:
        if len(self._round_acks) > len(self.voters) // 2:
            reads, self._round_reads = self._round_reads, []
            for node, context in reads:
                self._answer_read(node, context)

    def generous(self: Any, message: Any) -> None:
        if self._round_reads and message.context == self._round.to_bytes(8, "little"):
            self._round_acks.add(message.sender)
            finish(self)
        on_heartbeat_resp(self, message)

    patch.item(raft._HANDLERS[raft.LEADER], raft.HEARTBEAT_RESP, generous)


@mutation(
    faults={"add_member": 60.0, "promote": 0.0, "isolate_with_learners": 240.0},
    load={"put": 80.0},
    mean_pause_s=0.4,
    options={"strict_reconfig_check": False},
)
def _learners_count_for_a_commit(patch: Patch) -> None:
    def most(self: Any) -> int:
        matches = sorted((progress.match for progress in self.progress.values()), reverse=True)
        return matches[len(self.voters) // 2]

    _commit_found(patch, most)


@mutation(
    faults={**SPLITS, "pause": 15.0, "move_leader": 20.0}, load={"get": 80.0}, mean_pause_s=0.4
)
def _read_before_the_leader_knows_what_is_committed(patch: Patch) -> None:
    patch.set(raft.Raft, "_has_committed_in_term", lambda self: True)


@mutation(faults={**SPLITS, "slow_disk": 10.0, "slow_way": 10.0}, load={"get": 80.0})
def _follower_reads_without_asking(patch: Patch) -> None:
    read = reading.Reads.read

    def local(self: Any, one: Any, *more: Any) -> None:
        if one[2] == RANGE:
            self.read_now(one)
        else:
            read(self, one, *more)

    patch.set(reading.Reads, "read", local)


@mutation(faults=SPLITS, load={"get": 80.0})
def _read_that_waits_too_long_is_forgotten(patch: Patch) -> None:
    def forgetful(self: Any, now: float) -> Iterator[None]:
        for group in list(self._waiting):
            if group.since <= now - self._request_timeout_s:
                self._empty(group)
        yield

    patch.set(reading.Reads, "expire_steps", forgetful)


@mutation(faults={"slow_disk": 10.0, "slow_way": 10.0}, load={"get": 80.0})
def _read_before_the_read_index_is_applied(patch: Patch) -> None:
    take_ready = member.Member._take_ready

    def hasty(self: Any, ready: raft.Ready) -> None:
        take_ready(self, ready)
        waiting = list(self.reads.ready)
        self.reads.ready.clear()
        self.reads.ready.extend((0, reads, since) for _, reads, since in waiting)

    patch.set(member.Member, "_take_ready", hasty)


@mutation(load={"purge": 60.0, "get": 0.0}, look_s=0.002, tunables={"delete_step_keys": 1})
def _read_beside_an_entry_that_others_have_answered(patch: Patch) -> None:
    beside = reading.Reads.serve_beside

    def hasty(self: Any, last: Any, term: int) -> None:
        waiting = list(self.ready)
        self.ready.clear()
        self.ready.extend((0, reads, since) for _, reads, since in waiting)
        beside(self, last, term)

    patch.set(reading.Reads, "serve_beside", hasty)


@mutation(load={"purge": 60.0}, look_s=0.002, tunables={"delete_step_keys": 1})
def _read_beside_a_delete_sees_part_of_it(patch: Patch) -> None:
    scan = mvcc.Store.scan

    def present(self: Any, start: Any, end: Any, revision: int, *limits: Any) -> Any:
        return scan(self, start, end, revision + (revision == self.revision), *limits)

    patch.set(mvcc.Store, "scan", present)


@mutation(load={"purge": 60.0, "ranges": 0.5}, look_s=0.002, tunables={"delete_step_keys": 1})
def _count_beside_a_delete_leaves_out_what_lies_at_its_ends(patch: Patch) -> None:
    count = removal.Removal.count

    def rough(self: Any, start: bytes, end: bytes | None) -> Any:
        counted = count(self, start, end)
        return counted and (counted[0], [])

    patch.set(removal.Removal, "count", rough)


@mutation(faults={**CRASHES, "power_all": 20.0})
def _follower_acknowledges_before_its_sync(patch: Patch) -> None:
    send = raft.Raft._send_after_sync

    def hasty(self: Any, kind: int, to: int, *more: Any, **fields: Any) -> None:
        send(self, kind, to, *more, **fields)
        if to != self.id:
            self._messages.append(self._messages_after_sync.pop())

    patch.set(raft.Raft, "_send_after_sync", hasty)


@mutation(faults={**CRASHES, "power_all": 10.0})
def _log_is_not_synced(patch: Patch) -> None:
    append = wal.WAL._append

    def unsynced(self: Any, parts: Any) -> None:
        self.sync_enabled, enabled = False, self.sync_enabled
        try:
            append(self, parts)
        finally:
            self.sync_enabled = enabled

    patch.set(wal.WAL, "_append", unsynced)


@mutation(faults={**SPLITS, **CRASHES})
def _conflicting_entries_stay_in_the_log(patch: Patch) -> None:
    def trusting(
        self: Any, previous: int, previous_term: int, entries: Any, committed: int
    ) -> int | None:
        if previous > self.last:
            return None
        for entry in entries:
            if entry.index > self.last:
                self.append(entry)
        self.commit_to(min(committed, previous + len(entries), self.last))
        return previous + len(entries)

    patch.set(raft_log.RaftLog, "maybe_append", trusting)


@mutation(faults={"add_member": 60.0, "remove_member": 60.0}, mean_pause_s=0.3)
def _membership_change_before_the_last_one_is_applied(patch: Patch) -> None:
    propose = raft.Raft.propose_conf_change

    def hasty(self: Any, data: bytes) -> int:
        self._pending_conf_index = 0
        return propose(self, data)

    patch.set(raft.Raft, "propose_conf_change", hasty)


@mutation(
    members=1,
    faults={"add_member": 80.0, "promote": 80.0, "power": 60.0, "power_all": 0.0},
    mean_pause_s=0.3,
    # A member that restarts knows only from its log that there are others.
    options={
        "strict_reconfig_check": False,
        "checkpoint_bytes": 1 << 30,
        "wal_segment_bytes": 1 << 16,
    },
)
def _commit_index_is_not_saved(patch: Patch) -> None:
    save = wal.WAL.save

    def forgetful(self: Any, hard_state: Any, entries: Any) -> None:
        save(self, hard_state and hard_state._replace(commit=0), entries)

    patch.set(wal.WAL, "save", forgetful)


@mutation(
    faults={"away": 40.0, "add_member": 60.0, "remove_member": 20.0},
    load={"put": 60.0},
    mean_pause_s=0.4,
    # Otherwise no member is added while another one is away.
    options={"strict_reconfig_check": False, "raft": {"log_tail_bytes": 2000}},
)
def _members_of_a_snapshot_are_not_taken(patch: Patch) -> None:
    restore = raft.Raft._maybe_restore

    def nostalgic(self: Any, snapshot: Any) -> None:
        if self.voters:
            members = {"voters": tuple(self.voters), "learners": tuple(self.learners)}
            snapshot = snapshot._replace(**members)
        restore(self, snapshot)

    patch.set(raft.Raft, "_maybe_restore", nostalgic)


@mutation(faults={"slow_disk": 30.0})
def _applied_before_it_is_durable_here(patch: Patch) -> None:
    next_committed = raft_log.RaftLog.next_committed

    def hasty(self: Any, max_bytes: int) -> Any:
        stable, self.stable = self.stable, self.last
        entries = next_committed(self, max_bytes)
        self.stable = stable
        return entries

    patch.set(raft_log.RaftLog, "next_committed", hasty)


# Storage and recovery.


@mutation(faults={**CRASHES, "trip": 40.0}, mean_pause_s=0.5)
def _torn_records_are_accepted(patch: Patch) -> None:
    patch.set(data, "crc32", lambda body, crc=0: 0)
    patch.set(wal, "crc32", lambda body, crc=0: 0)


@mutation(faults={**CRASHES, "power_all": 10.0})
def _checkpoint_is_published_before_the_data_is_synced(patch: Patch) -> None:
    def no_sync(self: Any) -> Callable[[], None]:
        self.unsynced.clear()
        return lambda: None

    patch.set(data.DataFile, "take_sync", no_sync)


@mutation(faults={"set_back": 60.0, **SPLITS}, load={"put": 30.0}, mean_pause_s=0.5)
def _old_copy_of_a_data_directory_is_not_noticed(patch: Patch) -> None:
    patch.set(rollback.RollbackCheck, "check", lambda self, node, incarnation, recovered: None)


@mutation(
    faults={"trip": 60.0, "power": 30.0},
    load={"put": 60.0},
    mean_pause_s=0.3,
    options={
        "wal_segment_bytes": 1536,
        "checkpoint_bytes": 10_000,
        "raft": {"log_tail_bytes": 2000},
    },
)
def _log_is_released_too_early(patch: Patch) -> None:
    tick = maintenance.Maintenance.tick

    def hasty(self: Any, now: float) -> None:
        tick(self, now)
        # As soon as the next checkpoint is half due, instead of when it is written.
        if self.logged_bytes > self.checkpoint_bytes // 2:
            store = self._state.store
            self.released = (store.applied_index, store.applied_term)

    patch.set(maintenance.Maintenance, "tick", hasty)


@mutation(faults={**CRASHES})
def _applied_index_is_not_recovered(patch: Patch) -> None:
    open_member = datadir.open_member

    def forgetful(*args: Any, **options: Any) -> Any:
        opened = open_member(*args, **options)
        if opened.entries and opened.store.applied_index > opened.log_index:
            opened.store.applied_index = opened.log_index
        return opened

    patch.set(datadir, "open_member", forgetful)


@mutation(faults={**CRASHES, "away": 20.0, "trip": 40.0})
def _snapshot_is_not_marked_in_the_log(patch: Patch) -> None:
    save_all = wal.WAL.save_all

    def unmarked(self: Any, saves: Any) -> None:
        save_all(
            self, [Ready(s.hard_state, s.entries if s.snapshot is None else ()) for s in saves]
        )

    patch.set(wal.WAL, "save_all", unmarked)


@mutation(faults={"away": 30.0})
def _stale_snapshot_is_applied(patch: Patch) -> None:
    snapshot_received = member.Member.snapshot_received

    def later(self: Any, node: int, offer: Any) -> None:
        store = self.state.store
        directory = os.path.dirname(store.directory)
        name, next_name = (f"{directory}/snapshot-{offer.index + i:016x}" for i in (0, 1))
        store.disk.rename(name, next_name)
        offer.index += 1
        snapshot_received(self, node, offer)

    patch.set(member.Member, "snapshot_received", later)


@mutation(faults={"defragment": 30.0, **CRASHES})
def _cleaning_loses_what_is_still_read(patch: Patch) -> None:
    is_at = index.Index.is_at
    count = [0]

    def wrong(self: Any, key: bytes, mod: int, location: int) -> bool:
        count[0] += 1
        return is_at(self, key, mod, location) and count[0] % 50 != 0

    patch.set(index.Index, "is_at", wrong)


# The state machine.


@mutation()
def _ack_before_commit(patch: Patch) -> None:
    propose = writes.Writes.propose

    def hasty(self: Any, waiter: Any, frame: bytes, *more: Any) -> None:
        session, request_id, method, request = waiter
        if session is not None and method == PUT and not request.prev_kv:
            propose(self, Waiter(None, request_id, method, request), frame, *more)
            state = self._state
            header = state.identity.header(state.store.revision + 1)
            session.reply(request_id, method, header)
        else:
            propose(self, waiter, frame, *more)

    patch.set(writes.Writes, "propose", hasty)


@mutation(faults=SPLITS)
def _forwarded_writes_are_sent_twice(patch: Patch) -> None:
    accept = writes.Writes.accept_forwarded

    def twice(self: Any, node: int, term: int, payload: bytes) -> None:
        accept(self, node, term, payload)
        self._raft.propose(payload)

    patch.set(writes.Writes, "accept_forwarded", twice)


@mutation(faults={"flip_bits": 200.0}, load={"put": 1.0}, mean_pause_s=0.3)
def _checksums_are_not_looked_at(patch: Patch) -> None:
    def blind(self: Any) -> Iterator[Any]:
        data, at = bytes(self._data), 0
        try:
            while len(data) - at >= peer_frames.HEADER_BYTES:
                length, request_id, method, flags = frames.FRAME.unpack_from(data, at)
                begin, end = at + peer_frames.HEADER_BYTES, at + 4 + length
                if end > len(data):
                    break
                at = max(begin, end)
                yield request_id, method, flags, data[begin:end]
        finally:
            self._data = data[at:]

    patch.set(peer_frames.PeerFrameReader, "__iter__", blind)
    patch.set(peer, "check_entry", lambda data: None)
    patch.set(entry_format, "check_entry", lambda data: None)


@mutation(faults={**SPLITS, **CRASHES, "move_leader": 10.0})
def _writes_are_proposed_anew_too_early(patch: Patch) -> None:
    leadership_changed = member.Member._leadership_changed

    def hasty(self: Any, leads: bool, leader: int) -> None:
        leadership_changed(self, leads, leader)
        if leader:
            self.writes.begin_term(self.raft.term)

    patch.set(member.Member, "_leadership_changed", hasty)


@mutation(load={"txn": 30.0})
def _transaction_takes_the_wrong_branch(patch: Patch) -> None:
    holds = txn._holds

    def wrong(compare: Any, kv: Any) -> bool:
        return True if compare.result == 3 else holds(compare, kv)

    patch.set(txn, "_holds", wrong)


@mutation(load={"txn": 60.0, "ranges": 0.4})
def _compare_of_a_range_looks_at_its_first_key_only(patch: Patch) -> None:
    compare_steps = txn._compare_steps

    def partial(store: Any, compare: Any, revision: int) -> Iterator[None]:
        if compare.range_end:
            kept = {name: getattr(compare, name) for name in ("result", "target", "key")}
            value = txn.TARGETS[compare.target]
            kept[value] = getattr(compare, value)
            compare = proto.Compare(**kept)
        return compare_steps(store, compare, revision)

    patch.set(txn, "_compare_steps", partial)


@mutation(load={"delete": 20.0, "put": 40.0})
def _version_survives_a_delete(patch: Patch) -> None:
    encode = mvcc.encode_key_value

    def wrong(
        key: bytes, create: bytes, mod: bytes, version: int, value: bytes, held: int
    ) -> bytes:
        version += version == 1 and create[0] % 40 == 0
        return encode(key, create, mod, version, value, held)

    patch.set(mvcc, "encode_key_value", wrong)


@mutation(load={"compact": 6.0, "past": 20.0})
def _compaction_takes_too_much(patch: Patch) -> None:
    steps = index.Index.compact_steps

    def greedy(self: Any, revision: int, garbage: Any) -> Any:
        return steps(self, revision + 3, garbage)

    patch.set(index.Index, "compact_steps", greedy)


@mutation(load={"compact": 6.0, "past": 20.0})
def _what_is_compacted_can_be_read(patch: Patch) -> None:
    def unchecked(self: Any, revision: int) -> None:
        if revision > self.revision:
            raise error("FutureRev")

    patch.set(mvcc.Store, "check_revision", unchecked)


@mutation()
def _a_member_applies_by_its_own_clock(patch: Patch) -> None:
    put = mvcc.Store.put

    def wrong(self: Any, key: bytes, value: bytes, held: int) -> None:
        if self.revision % 97 == 0 and "m2" in _running_node():
            value = value[:-1]
        put(self, key, value, held)

    patch.set(mvcc.Store, "put", wrong)


# Leases.


@mutation(load={"lease": 60.0}, faults={"isolate_leader": 60.0}, mean_pause_s=1.0)
def _lease_is_revoked_by_who_does_not_lead(patch: Patch) -> None:
    def anyhow(self: Any, requests: Any) -> int:
        for method, request in requests:
            self.propose_own(method, request)
        return 0

    patch.set(writes.Writes, "propose_once", anyhow)


@mutation(load={"lease": 8.0, "lease_put": 8.0}, faults={"move_leader": 15.0, **CRASHES})
def _new_leader_does_not_prolong_leases(patch: Patch) -> None:
    promote = lease.Lessor.promote

    def stingy(self: Any, now: float, extend_s: float = 0.0) -> None:
        promote(self, now - 2.0, 0.0)

    patch.set(lease.Lessor, "promote", stingy)


@mutation(load={"lease": 60.0}, faults={"slow_disk": 60.0, "pause": 20.0}, mean_pause_s=0.5)
def _renewal_without_a_quorum(patch: Patch) -> None:
    keep_alive = api.keep_alive

    def hasty(who: Any, body: bytes, done: Any) -> None:
        if who.state.lessor.promoted:
            done(api._renew(who, *api._read_renewal(body)))
        else:
            keep_alive(who, body, done)

    patch.set(api, "keep_alive", hasty)


@mutation(load={"lease": 8.0})
def _leases_never_end(patch: Patch) -> None:
    patch.set(lease.Lessor, "expired", lambda self, now, limit: [])


@mutation(
    load={"lease": 8.0, "lease_put": 30.0}, faults={"power": 20.0, "kill": 20.0, "away": 10.0}
)
def _keys_of_leases_are_forgotten_by_a_restart(patch: Patch) -> None:
    def forgetful(self: Any) -> None:
        for lease_id, record in self.buckets.get(layout.LEASE, {}).items():
            self.lessor.restore(mvcc.LEASE_KEY.unpack(lease_id)[0], record)

    patch.set(mvcc.Store, "_load_leases", forgetful)


# Watches.


@mutation(load={"watches": 3.0}, faults={"hang_up": 10.0})
def _event_lost_when_a_watch_catches_up(patch: Patch) -> None:
    read = mvcc.Store.event_steps

    def lossy(self: Any, *args: Any) -> Any:
        events = yield from read(self, *args)
        return [event for event in events if event[0] % 31]

    patch.set(mvcc.Store, "event_steps", lossy)


@mutation(load={"watches": 3.0}, faults={"hang_up": 10.0})
def _watch_does_not_start_at_its_revision(patch: Patch) -> None:
    create = watches.WatchStream.create

    def wrong(self: Any, request: Any) -> Any:
        if request.start_revision:
            request.start_revision += 1
        return create(self, request)

    patch.set(watches.WatchStream, "create", wrong)


@mutation(
    load={"watches": 3.0, "slow": 1.0},
    tunables={"high_water_bytes": 2000},
)
def _progress_is_told_though_events_are_missing(patch: Patch) -> None:
    def hasty(self: Any) -> None:
        if len(self):
            self._respond(watches.id_field(watches.INVALID_WATCH_ID))

    patch.set(watches.WatchStream, "progress", hasty)


@mutation(load={"watches": 3.0, "compact": 6.0}, faults={"hang_up": 10.0, "away": 10.0})
def _watch_skips_what_was_compacted(patch: Patch) -> None:
    create = watches.WatchStream.create

    def wrong(self: Any, request: Any) -> Any:
        request.start_revision = max(request.start_revision, self.hub._store.compacted)
        return create(self, request)

    patch.set(watches.WatchStream, "create", wrong)


@mutation(
    faults={"rot": 80.0, "kill": 60.0, "hang_up": 5.0},
    load={"get": 100.0, "past": 60.0, "range": 60.0},
    mean_pause_s=0.3,
)
def _records_are_read_unchecked(patch: Patch) -> None:
    def trusting(self: Any, location: int, size_bytes: int) -> bytes:
        body = self.recent.get(location)
        if body is not None:
            return bytes(body)
        file = self.files[location >> 32]
        offset = (location & layout.OFFSET_MASK) + layout.RECORD_HEADER_BYTES
        return bytes(file.pread(size_bytes, offset))

    patch.set(data.DataFile, "read", trusting)


@mutation(
    faults={"rot_and_send": 120.0},
    # Otherwise the leader finds it and stops.
    load={"put": 60.0, "get": 0.0},
    mean_pause_s=0.5,
    options={"raft": {"log_tail_bytes": 2000}},
)
def _damage_is_handed_on_in_snapshots(patch: Patch) -> None:
    patch.set(snap, "verify", lambda disk, directory: None)


@mutation(load={"watches": 3.0}, faults={"away": 20.0, **SPLITS})
def _watches_do_not_notice_a_snapshot(patch: Patch) -> None:
    def deaf(self: Any, store: Any) -> None:
        self._store = store
        self.revision = store.revision

    patch.set(watches.WatchHub, "restored", deaf)


@mutation(
    faults={"away": 30.0, "add_member": 60.0, "promote": 90.0, "move_leader": 60.0},
    members=3,
    mean_pause_s=0.3,
    # Otherwise no member is added while another one is away.
    options={"strict_reconfig_check": False},
)
def _leader_that_is_not_known_yet_gets_no_answers(patch: Patch) -> None:
    send = peer.Peers.send

    def strict(self: Any, message: Any) -> None:
        if message.to in self.links:
            send(self, message)

    patch.set(peer.Peers, "send", strict)


# Users and roles.


@mutation(users=True)
def _rights_are_checked_at_the_door_only(patch: Patch) -> None:
    check = auth.Auth.check

    def lenient(self: Any, author: Any, *asked: Any, **how: Any) -> None:
        if author is None or author is not self.author:
            check(self, author, *asked, **how)

    patch.set(auth.Auth, "check", lenient)
    patch.set(auth.Auth, "writable", lambda self, author: EVERYTHING)


@mutation(users=True, load={"get": 60.0, "get_serializable": 30.0})
def _the_door_remembers_rights_that_were_taken(patch: Patch) -> None:
    check = access.Access.check

    def nostalgic(self: Any, *asked: Any) -> Any:
        now = self.auth.revision
        self._recent = {token: (now, *known[1:]) for token, known in self._recent.items()}
        return check(self, *asked)

    patch.set(access.Access, "check", nostalgic)
    patch.set(access.Access, "forget", lambda self: None)


@mutation(users=True)
def _puts_are_checked_for_the_author_before(patch: Patch) -> None:
    writable = auth.Auth.writable

    def late(self: Any, author: Any) -> Any:
        found = writable(self, author)
        last, self._last = getattr(self, "_last", found), found
        return last

    patch.set(auth.Auth, "writable", late)


@mutation(users=True)
def _auth_revision_is_not_compared(patch: Patch) -> None:
    rights = auth.Auth.rights

    def lenient(self: Any, author: Any) -> Any:
        if author is not None and author.revision:
            author = author._replace(revision=self.revision)
        return rights(self, author)

    patch.set(auth.Auth, "rights", lenient)


@mutation(users=True)
def _what_users_changed_before_its_place_is_refused(patch: Patch) -> None:
    def fail(self: Any, is_own: bool) -> None:
        outdated, self._state.outdated = self._state.outdated, []
        for (session, request_id, method, _), failure, _ in outdated:
            if session is not None:
                session.fail(request_id, method, failure)

    patch.set(writes.Writes, "propose_outdated", fail)


@mutation(users=True)
def _rights_survive_a_revocation(patch: Patch) -> None:
    commit = auth.Auth._commit

    def forgetful(self: Any) -> None:
        kept = dict(self.known_rights)
        commit(self)
        self.known_rights.update(kept)

    patch.set(auth.Auth, "_commit", forgetful)


@mutation(users=True, load={"txn": 60.0})
def _the_other_branch_of_a_transaction_is_not_checked(patch: Patch) -> None:
    check = auth.CHECKS[TXN]
    assert check is not None

    def partial(self: Any, author: Any, request: Any) -> None:
        half = proto.TxnRequest(compare=request.compare, success=request.success)
        check(self, author, half)

    patch.item(auth.CHECKS, TXN, partial)


@mutation(users=True)
def _previous_values_are_told_to_those_who_may_only_write(patch: Patch) -> None:
    def lenient(self: Any, author: Any, request: Any) -> None:
        self.rights(author).check_write(request.key)

    patch.item(auth.CHECKS, PUT, lenient)


@mutation(users=True, load={"range": 30.0, "delete_range": 10.0})
def _permissions_that_touch_do_not_count_together(patch: Patch) -> None:
    def apart(self: Any, start: bytes, end: bytes) -> None:
        self._starts.append(start)
        self._ends.append(end)

    patch.set(auth.KeySet, "add", apart)


@mutation(users=True, load={"range": 30.0, "delete_range": 10.0})
def _a_gap_between_permissions_is_not_seen(patch: Patch) -> None:
    def holds(self: Any, key: bytes, range_end: bytes = b"") -> bool:
        ends = self._ends
        last = range_end or key + b"\0"
        return any(start <= key for start in self._starts) and any(
            not end or (last != b"\0" and last <= end) for end in ends
        )

    patch.set(auth.KeySet, "holds", holds)


@mutation(users=True, load={"lease": 8.0, "lease_put": 20.0, "revoke": 10.0})
def _a_lease_is_revoked_whoever_owns_its_keys(patch: Patch) -> None:
    lease_puts = state.lease_puts
    patch.set(
        state,
        "lease_puts",
        lambda method, request: [] if method == LEASE_REVOKE else lease_puts(method, request),
    )


@mutation(users=True)
def _enabling_auth_does_not_wait_for_the_log(patch: Patch) -> None:
    number = methods.METHOD_BY_NAME["Auth.AuthEnable"].number
    handle, decode = api.HANDLERS[number]

    def hasty(who: Any, waiter: Any, frame: bytes) -> None:
        handle(who, waiter, frame)
        store = who.state.auth
        root = store.user("root")
        store.enabled |= root is not None and "root" in root.roles and bool(store.key)

    patch.item(api.HANDLERS, number, (hasty, decode))


@mutation(users=True, faults={"away": 60.0, "add_member": 10.0}, mean_pause_s=0.5)
def _users_of_a_snapshot_are_not_taken(patch: Patch) -> None:
    restore = state.State.restore

    def forgetful(self: Any, store: Any) -> None:
        known = self.auth
        before = (known.revision, known.since, known.key, known.enabled)
        restore(self, store)
        known.revision, known.since, known.key, known.enabled = before

    patch.set(state.State, "restore", forgetful)


@mutation(users=True, faults={"away": 60.0, "add_member": 10.0}, mean_pause_s=0.5)
def _snapshots_and_checkpoints_have_no_roles(patch: Patch) -> None:
    def roleless(self: Any, store: Any) -> None:
        store.buckets.pop(AUTH_ROLE, None)
        restore(self, store)

    restore = patch.set(auth.Auth, "restore", roleless)


@mutation(users=True, faults={"away": 60.0, "add_member": 10.0}, mean_pause_s=0.5)
def _roles_survive_a_snapshot(patch: Patch) -> None:
    """As in etcd issue 14571: what the member knew before is not replaced."""

    def forgetful(self: Any, store: Any) -> None:
        known = getattr(self, "_store", None)
        if known is not None:
            store.buckets[AUTH_ROLE] = dict(known.buckets.get(AUTH_ROLE, {}))
        restore(self, store)

    restore = patch.set(auth.Auth, "restore", forgetful)


@mutation(users=True)
def _token_of_a_deleted_user_counts(patch: Patch) -> None:
    author = tokens.SimpleTokens.author

    def lenient(self: Any, auth_store: Any, token: str) -> Any:
        revision, _, known = self._known.get(token) or self._verify(
            auth_store, token, self._clock()
        )
        if revision > auth_store.revision:
            return author(self, auth_store, token)
        return auth.Author(known.name, auth_store.revision)

    patch.set(tokens.SimpleTokens, "author", lenient)


@mutation(users=True)
def _a_new_password_does_not_end_tokens(patch: Patch) -> None:
    change_password = auth.Auth.change_password

    def lenient(self: Any, request: Any) -> None:
        since = self.since.get(request.name)
        change_password(self, request)
        if since is not None:
            self.since[request.name] = since
            key = b"since/" + request.name.encode()
            self._set(key, since.to_bytes(8, "big"))

    patch.item(
        state.APPLIERS,
        methods.METHOD_BY_NAME["Auth.UserChangePassword"].number,
        state._auth(lenient),
    )


@mutation(users=True)
def _members_do_not_say_that_requests_are_their_own(patch: Patch) -> None:
    patch.set(writes, "OWN", auth.Author("", 0))


@mutation(users=True, load={"watches": 3.0}, faults={"hang_up": 20.0})
def _watches_are_not_checked(patch: Patch) -> None:
    patch.item(auth.CHECKS, WATCH, lambda self, author, request: self.rights(author))


@mutation(users=True, load={"get": 60.0, "get_serializable": 30.0})
def _reads_are_not_checked(patch: Patch) -> None:
    patch.item(auth.CHECKS, RANGE, lambda self, author, request: self.rights(author))


@mutation(users=True)
def _a_deleted_role_stays_with_its_users(patch: Patch) -> None:
    def partial(self: Any, request: Any) -> None:
        if self.enabled and request.role == "root":
            raise error("InvalidAuthMgmt")
        self.permissions(request.role)
        self._put(AUTH_ROLE, request.role, None)
        self._commit()

    patch.item(
        state.APPLIERS,
        methods.METHOD_BY_NAME["Auth.RoleDelete"].number,
        state._auth(partial),
    )


def _running_node() -> str:
    """The name of the node whose work is on the stack."""
    frame: Any = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if type(owner).__name__ == "Node":
            return str(owner.name)
        frame = frame.f_back
    return ""


@contextmanager
def switched_on(found: Mutation) -> Iterator[None]:
    patch = Patch()
    try:
        found.switch(patch)
        yield
    finally:
        patch.undo()


MIXED_VERSIONS = Mutation(
    "",
    lambda patch: None,
    faults={"upgrade": 120.0, "go_back": 40.0, "downgrade": 20.0, "kill": 5.0, "add_member": 5.0},
    mean_pause_s=0.6,
    options={"version": versions.V0_1},
)
"""No bug: members of two neighbouring versions, and changes of their programs."""


@mutation(
    faults={"upgrade": 40.0, "go_back": 60.0, "kill": 20.0, "add_member": 5.0},
    mean_pause_s=0.4,
    options=MIXED_VERSIONS.options,
)
def _the_cluster_version_rises_too_early(patch: Patch) -> None:
    patch.set(version_keeper.VersionKeeper, "lowest", property(lambda self: self._own))


def prepare(found: Mutation, seed: int) -> Simulation:
    """A simulation in which the mutation has a chance to matter."""
    simulation = Simulation(seed, found.members)
    simulation.has_users |= found.users
    simulation.tunables.update(found.tunables)
    simulation.look_s = found.look_s or simulation.look_s
    raft_options = {**simulation.options["raft"], **found.options.get("raft", {})}
    simulation.options.update(found.options, raft=raft_options)
    for name, weight in found.load.items():
        if name == "watches":
            simulation.load.watches = int(weight)
        elif name == "ranges":
            simulation.load.range_share = weight
        elif name == "slow":
            simulation.load.is_slow_share = weight
        else:
            simulation.load.weights[name] = weight
    simulation.load.settle()
    simulation.extra_faults = found.faults
    simulation.mean_pause_s = found.mean_pause_s
    simulation.voter_crashes = found.voter_crashes
    return simulation


def hunt(found: Mutation, most: int = MOST_SEEDS) -> tuple[int, str]:
    """The number of seeds that it took to find the mutation, and the violated claim; 0 if none of
    them found it. Raises Failure if the patch itself is broken."""
    for seed in range(1, most + 1):
        simulation = prepare(found, seed)
        with switched_on(found):
            try:
                simulation.run(MINUTES)
            except Failure as failure:
                violation = failure.violation
                if violation.details.startswith(SLIPS):
                    raise
                if violation.claim.startswith(STOPPED):
                    return seed, f"{STOPPED}: {violation.details.splitlines()[0]}"
                return seed, violation.claim
    return 0, ""


def main() -> int:
    arguments = sys.argv[1:]
    most = MOST_SEEDS
    if arguments[:1] == ["--most"]:
        most = int(arguments[1])
        del arguments[:2]
    names = [name for name in MUTATIONS if not arguments or any(a in name for a in arguments)]
    missed = 0
    print(f"{'mutation':52} {'seeds':>5} {'s':>6}  claim")
    for name in names:
        began = time.perf_counter()
        try:
            seeds, claim = hunt(MUTATIONS[name], most)
        except Failure as failure:
            seeds, claim = 0, f"BROKEN PATCH: {failure.violation.details}"
        missed += not seeds
        took_s = time.perf_counter() - began
        print(f"{name:52} {seeds or 'none':>5} {took_s:6.1f}  {claim}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
