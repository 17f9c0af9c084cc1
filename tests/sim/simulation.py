"""A whole simulation from one seed: cluster, clients, faults and checkers.

    simulation = Simulation(seed)
    simulation.run(minutes=1.0)

A run goes in rounds: some seconds of faults, then everything is mended and the cluster must settle
within `SETTLE_S`: serve every member's clients, bring all members to the same state, tell every
watch everything and end every lease that nobody renews. `Failure` says what did not hold and how to
see it again.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from typing import Any

from etcdlite import frames, proto
from etcdlite.errors import EtcdError
from etcdlite.limits import Limits
from etcdlite.request import Waiter
from etcdlite.storage.layout import CLEANED
from etcdlite.storage.sealed import SealedDisk
from etcdlite.storage.steps import finish
from sim.backup import check_state
from sim.checkers import Oracle, Safety, Violation
from sim.client import MAX_TTL_S, Client, Load
from sim.faults import OLD_SEEDS, Nemesis
from sim.plain_auth import Certificate
from sim.users import Administrator, has_users
from sim.world import Node, World

ROUND_S = (4.0, 15.0)
"""Shortest and longest time of faults before they are mended."""

SETTLE_S = 40.0
"""A cluster without faults is whole again after this time at the latest."""

LOADED_S = 2.0
"""So long clients go on as before when all is mended; then they only look on."""

LEASES_END_S = MAX_TTL_S + 12.0
"""A lease that nobody renews is gone so long after there is a leader."""

STOPPED = "a member never stops by an error of the program"
"""The claim that any exception violates."""

HASH_INTERVAL_S = 1.0
TAIL_LINES = 40

TUNABLES: dict[str, tuple[Any, ...]] = {
    "apply_step_ops": (1, 2, 128),
    "serve_step_reads": (1, 128),
    "entry_bytes": (300, 1 << 20),
    "lease_checkpoint_interval_s": (2.0, 300.0),
    "max_slow_reads": (1, 4),
    "range_step_keys": (1, 3, 256),
    "event_step_events": (1, 256),
    "clean_step_records": (1, 4, 128),
    "delete_step_keys": (1, 2, 128),
    "hash_step_versions": (2, 256),
    "execute_step_ops": (1, 16),
    "slice_bytes": (200, 64 * 1024),
    "slice_matches": (1, 20_000),
    "near_revisions": (20, 10_000),
    "response_bytes": (300, 1 << 20),
    "high_water_bytes": (2000, 1 << 20),
    "snapshot_chunk_bytes": (700, 8000, 128 * 1024),
    "snapshot_bytes_per_s": (1_000_000, 64 << 20),
    "checkpoint_bytes_per_key": (1, 64),
    "clean_share": (0.2, 0.5),
}
"""Fields of `Limits` that are made small, so that what they bound happens often, and the values to
choose from. The order is that of the draws: another one changes every trace."""


class Failure(Exception):
    """A simulation found something. The text is for a person."""

    def __init__(self, simulation: Simulation, violation: Violation) -> None:
        self.simulation = simulation
        self.violation = violation
        super().__init__(simulation.report(violation))


class Simulation:
    """See the module's docstring."""

    def __init__(self, seed: int, members: int = 0, clients: int = 0) -> None:
        """`members` and `clients`: 0 to draw them from the seed."""
        self.seed = seed
        self.asked_members = members
        self.asked_clients = clients
        self.minutes = 0.0
        self.world = world = World(seed)
        rng = world.rng
        self.member_count = members or rng.choice((1, 2, 3, 3, 3, 3, 4, 5, 5, 7))
        client_count = clients or rng.choice((3, 6, 12))
        world.latency_s = rng.choice(((0.0001, 0.0005), (0.0002, 0.005), (0.001, 0.04)))
        world.sync_s = rng.choice(((0.0002, 0.001), (0.0005, 0.01)))
        world.wake_s = rng.choice(((0.0, 0.0), (0.0, 0.0003), (0.0, 0.002)))
        world.quick_saves = world.quick_rng.choice((0.0, 0.5, 1.0))
        self.skew = rng.choice((0.0, 0.001, 0.01))
        self.look_s = rng.choice((0.0, 0.00005, 0.0005))
        is_slow = world.latency_s[1] > 0.01
        self.options: dict[str, Any] = {
            "segment_bytes": rng.choice((1000, 4000, 16_000)),
            "wal_segment_bytes": rng.choice((1536, 4096, 16_384)),
            "checkpoint_bytes": rng.choice((2000, 10_000, 50_000)),
            "progress_interval_s": rng.choice((0.5, 5.0, 600.0)),
            "request_timeout_s": rng.choice((0.7, 2.0, 7.0)),
            "raft": {
                "log_tail_bytes": rng.choice((2000, 8000, 40_000)),
                "max_append_bytes": rng.choice((300, 2000, 1 << 20)),
                # Over slow wires, two small messages at a time would not keep up with the clients.
                "max_inflight_messages": rng.choice((2, 8, 256, 256)[2 * is_slow :]),
                "max_apply_bytes": rng.choice((300, 1 << 20)),
            },
        }
        self.tunables = {name: rng.choice(values) for name, values in TUNABLES.items()}
        self.load = Load(rng)
        if seed >= OLD_SEEDS:
            # Drawn beside the rest, so that the traces of the old seeds stay as they are.
            self.load.range_share = random.Random(f"{seed} ranges").choice((0.0, 0.1, 0.4))
        self.oracle = Oracle(world, 2 * self.skew, 500 * self.look_s)
        self.safety = Safety(world, self.oracle)
        world.observer = self
        self.clients = [
            Client(world, self.oracle, self.load, f"c{number + 1}")
            for number in range(client_count)
        ]
        self.has_users = has_users(seed)
        self.administrator: Administrator | None = None
        self.nemesis: Nemesis
        self.extra_faults: dict[str, float] = {}
        """Weights on top of those that are drawn."""
        self.voter_crashes = 0.0
        self.mean_pause_s = 0.0
        """Between two faults; 0: as drawn."""
        self.rounds = 0
        self._probed: dict[str, float] = {}
        self.until_s = 0.0
        self.progress: Callable[[Simulation], None] = lambda simulation: None

    # For the world.

    def recovered(self, node: Node, opened: Any, raft: Any) -> None:
        rng = self.world.rng
        if node.lives == 1:
            node.clock_rate = 1.0 + rng.uniform(-self.skew, self.skew)
            node.look_s = self.look_s
        else:
            # The clock is of the process or of the machine; nothing may depend on where it begins.
            node.clock_offset_s += rng.choice((0.0, 5000.0))
        self.safety.recovered(node, opened, raft)

    def started(self, node: Node) -> None:
        self.safety.started(node)

    # Running.

    def run(self, minutes: float = 0.5) -> None:
        """Raises Failure."""
        self.minutes = minutes
        self.options["limits"] = Limits(**self.tunables)
        self.options["is_encrypted"] = self.seed % 5 == 4
        with self.world.isolated():
            try:
                self._run(minutes * 60)
            except Violation as violation:
                raise Failure(self, violation) from None
            except Exception as failure:
                where = "".join(traceback.format_exc())
                violation = Violation(
                    STOPPED,
                    f"{type(failure).__name__}: {failure}\n{where}",
                    ("  log ",),
                )
                raise Failure(self, violation) from failure

    def _run(self, seconds: float) -> None:
        world = self.world
        rng = world.rng
        if self.has_users:
            # Before the members start: it sets how long their tokens live.
            self.administrator = Administrator(world, self.oracle, self.load, self.clients)
        world.found(self.member_count, **self.options)
        self.nemesis = Nemesis(world, self.oracle, self.clients, self.options)
        self.nemesis.weights.update(self.extra_faults)
        self.nemesis.voter_crashes = self.voter_crashes or self.nemesis.voter_crashes
        self.nemesis.mean_pause_s = self.mean_pause_s or self.nemesis.mean_pause_s
        if self.administrator is not None:
            self.administrator.log_in(self.nemesis.admin, "root")
        for client in self.clients:
            client.start()
        self.nemesis.start()
        if self.administrator is not None:
            self.administrator.start()
        world.at(HASH_INTERVAL_S, self._compare_hashes)
        self.until_s = seconds
        while True:
            length = min(rng.uniform(*ROUND_S), seconds)
            end = world.now + length
            while world.now < end:
                world.run(min(1.0, end - world.now))
                self.progress(self)
            self.rounds += 1
            self._settle()
            if world.now >= seconds:
                return
            for client in self.clients:
                client.is_busy = True
            self.nemesis.resume()
            if self.administrator is not None:
                self.administrator.is_active = True

    def _compare_hashes(self) -> None:
        """Members at one place in the log have equal states, with the revision of the second store,
        and no alarm CORRUPT is raised."""
        self.world.at(HASH_INTERVAL_S, self._compare_hashes)
        for node in self.world.nodes.values():
            if node.is_up and node.member.state.alarms.is_corrupt:
                raise Violation(f"{node.name} has the alarm CORRUPT, which stops all writes")
        stores = [
            (node.name, node.member.state.store)
            for node in self.world.nodes.values()
            if node.is_up
            and not node.is_rotten
            and not node.member.is_applying
            and not node.member.restoring.is_under_way
        ]
        if not stores:
            return
        for name, store in stores:
            expected = self.safety.revisions[store.applied_index]
            if store.revision != expected:
                raise Violation(
                    "members have equal revisions at equal places of the log",
                    f"after entry {store.applied_index} {name} is at revision {store.revision} "
                    f"instead of {expected}",
                    (name, "lease"),
                )
        revision = min(store.revision for _, store in stores)
        for name, store in stores:
            if store.compacted <= revision:
                self.oracle.hashed(
                    "members", name, revision, store.compacted or -1, hash_of(store, revision)
                )
        self._compare_users()

    def _compare_users(self) -> None:
        for node in self.world.nodes.values() if self.has_users else ():
            if (
                node.is_up
                and not node.is_old_copy
                and not node.member.is_applying
                and not node.member.restoring.is_under_way
            ):
                state = node.member.state
                self.oracle.compare_auth(node.name, state.store.applied_index, state.auth)

    # Liveness and convergence.

    def _settle(self) -> None:
        world, oracle, nemesis = self.world, self.oracle, self.nemesis
        nemesis.stop()
        if self.administrator is not None:
            self.administrator.is_active = False
        began = world.now
        served: set[str] = set()
        for client in self.clients:
            client.is_patient = True
        while True:
            if world.now - began > LOADED_S:
                # With a tail of the log this small, who is behind may never catch up under load.
                for client in self.clients:
                    client.is_busy = False
            nemesis.keep_up()
            world.run(0.25)
            self.progress(self)
            missing = self._ask_all(served)
            if not missing and nemesis.is_whole:
                break
            if world.now - began > SETTLE_S:
                silent = ", ".join(missing) or "who should be removed"
                raise Violation(
                    "without faults the cluster serves again within a bound (liveness)",
                    f"{SETTLE_S:.0f} s after all faults were mended, a put through {silent} is "
                    "not answered; leader: "
                    f"{world.leader.name if world.leader else 'none'}",
                    ("-- ", "elected", *missing),
                )
        for node in world.nodes.values():
            if not node.is_old_copy or node.is_refused or node.is_gone:
                continue
            # A member that was removed is refused as removed, and may not know it yet.
            leader = world.leader
            if leader is None or node.member_id in leader.member.state.membership.members:
                raise Violation(
                    "an old copy of a data directory does not take part",
                    f"{node.name} is one and was not refused",
                    (node.name, "elected"),
                )
        for client in self.clients:
            client.is_busy = False
        self._wait_until_quiet()
        world.run(1.0)
        self._check_all_told()
        self._wait_until_quiet()
        self._check_members_equal()
        self._check_leases()
        # What the end of the leases deleted must be gone everywhere.
        self._wait_until_quiet()
        self._check_members_equal()
        world.note(f"settled at revision {oracle.revision}, {oracle.answers} answers")

    def _wait_until_quiet(self) -> None:
        """All members have applied the same, and nobody waits for anything."""
        until = self.world.now + SETTLE_S
        while not self._is_quiet():
            self.nemesis.keep_up()  # A member may still be added, by a request made before.
            self.world.run(0.25)
            self.progress(self)
            if self.world.now > until:
                raise Violation(
                    "without faults all members converge within a bound (liveness)",
                    self._difference(),
                    ("-- ", "elected", "snapshot"),
                )

    def _ask_all(self, served: set[str]) -> list[str]:
        """Put a key through every voter; who has not answered since the faults were mended."""
        voters = [
            node
            for node in self.world.nodes.values()
            if not node.is_gone
            and node.is_up
            and not node.member.is_learner
            and node.member_id in node.member.state.membership.members
        ]
        if not voters or self.world.leader is None:
            return ["anybody"]
        members = self.world.leader.member.state.membership.members
        for node in voters:
            is_waiting = self._probed.get(node.name, 0.0) > self.world.now
            if node.name not in served and node.member_id in members and not is_waiting:
                self._probed[node.name] = self.world.now + 2.0
                _Probe(self.oracle, node, served)
        return [n.name for n in voters if n.name not in served and n.member_id in members]

    def _is_quiet(self) -> bool:
        nodes = self._members()
        leader = self.world.leader
        if leader is None or not nodes:
            return False
        applied = leader.member.state.store.applied_index
        return (
            all(
                node.is_up
                and node.member.state.store.applied_index == applied
                and not node.member.is_applying
                and not node.member.restoring.waiting
                for node in nodes
            )
            and len(self.safety.entries) == applied + 1
            and leader.member.raft.log.last == applied
            and all(client.is_quiet for client in self.clients)
        )

    def _members(self) -> list[Node]:
        """The nodes that are in the cluster, as its leader knows it."""
        leader = self.world.leader
        if leader is None:
            return []
        members = leader.member.state.membership.members
        return [node for node in self.world.nodes.values() if node.member_id in members]

    def _difference(self) -> str:
        leader = self.world.leader
        parts = [f"leader: {leader.name if leader else 'none'}"]
        for node in self._members():
            if node.is_up:
                member = node.member
                parts.append(
                    f"{node.name} applied {member.state.store.applied_index}, log up to "
                    f"{member.raft.log.last}, term {member.raft.term}"
                )
            else:
                parts.append(f"{node.name} is down")
        for client in self.clients:
            if client._open_ops or client._session is None:
                parts.append(
                    f"{client.name} waits for {[str(o) for o in client._open_ops.values()]}"
                )
            elif not client.is_quiet:
                parts.append(f"{client.name} has no watches")
        return "; ".join(parts)

    def _check_all_told(self) -> None:
        for client in self.clients:
            for watched in client.watches:
                limit = self.world.now + SETTLE_S
                while True:
                    try:
                        if watched.next and client.has_watch(watched):
                            watched.check_complete()
                        break
                    except Violation:
                        if self.world.now > limit:
                            raise
                        self.world.run(0.25)

    def _check_members_equal(self) -> None:
        states = {}
        for node in self._members():
            store = node.member.state.store
            if store.revision != self.oracle.revision:
                raise Violation(
                    "members agree on the revision",
                    f"{node.name} is at {store.revision}, it must be {self.oracle.revision}",
                    (node.name,),
                )
            with node.disk.observed():
                check_state(self.oracle, store, node.name)
            raft, membership = node.member.raft, node.member.state.membership
            known = sorted(raft.voters), sorted(raft.learners)
            if known != (membership.voters, membership.learners):
                raise Violation(
                    "consensus counts the members that the state has",
                    f"{node.name} counts {known} instead of "
                    f"{(membership.voters, membership.learners)}",
                    (node.name, "joins"),
                )
            states[node.name] = (
                store.compacted,
                hash_of(store, store.revision),
                buckets_text(store),
            )
            leases = finish(node.member.state.lessor.lease_steps())
            if set(leases) != set(self.oracle.leases):
                raise Violation(
                    "members agree on the leases",
                    f"{node.name} has {sorted(leases)} instead of {sorted(self.oracle.leases)}",
                    (node.name,),
                )
        self._compare_users()
        (first, expected), *others = states.items()
        for name, state in others:
            for at, what in enumerate(("compacted", "hash", "buckets")):
                if state[at] != expected[at]:
                    raise Violation(
                        "all members converge to one state",
                        f"{what}: {name} has {state[at]}, {first} {expected[at]}",
                        (name, first),
                    )

    def _check_leases(self) -> None:
        """Leases that nobody renews any more end within a bound."""
        for client in self.clients:
            client.leases.clear()
        until = self.world.now + LEASES_END_S
        oracle = self.oracle
        while oracle.leases:
            self.world.run(0.25)
            self.progress(self)
            if self.world.now > until:
                left = ", ".join(f"lease {i:x}" for i in sorted(oracle.leases))
                raise Violation(
                    "a lease does not outlive its TTL by more than a bound",
                    f"{left}: not renewed for {LEASES_END_S:.0f} s",
                    ("lease", "elected"),
                )

    # Reports.

    @property
    def command(self) -> str:
        parts = ["python -m tests.sim", f"--seed {self.seed}"]
        if self.asked_members:
            parts.append(f"--members {self.asked_members}")
        if self.asked_clients:
            parts.append(f"--clients {self.asked_clients}")
        if self.has_users and not has_users(self.seed):
            parts.append("--users")
        parts.append(f"--minutes {self.minutes:g}")
        return " ".join(parts)

    def report(self, violation: Violation) -> str:
        """What a person wants to know of a failing run."""
        lines = [
            f"seed {self.seed} fails at {self.world.now:.4f} s of virtual time",
            f"violated: {violation.claim}",
        ]
        if violation.details:
            lines.append(f"  {violation.details}")
        lines += ["the trace that matters:", *self.tail(violation.about)]
        lines += ["replay:", f"  {self.command} --trace out.txt"]
        return "\n".join(lines)

    def tail(self, about: tuple[str, ...]) -> list[str]:
        """The last lines that have to do with it: those that name what it is about, and those
        that say what went wrong with members meanwhile."""
        always = ("-- ", " loses power", " is killed", " starts", " leads in", " stops")
        kept = []
        for now, text in reversed(self.world.lines):
            if not about or any(word in text for word in (*about, *always)):
                kept.append(f"  {now:10.4f} {text}")
                if len(kept) == TAIL_LINES:
                    break
        return kept[::-1]


class _Probe:
    """A put of a node's own, to see that it serves."""

    is_blocked = False
    is_member = False
    told_revision = 0
    certificate_user = "root"

    def __init__(self, oracle: Oracle, node: Node, served: set[str]) -> None:
        self.identities = [Certificate("root")]
        self._oracle = oracle
        self._node = self.node = node
        self._served = served
        self.name = "probe"
        request = proto.PutRequest(key=b"probe", value=b"%d" % oracle.next_id)
        self._op = oracle.begin("KV.Put", request, self, True)
        number = self._op.number
        frame = frames.frame(self._op.id, number, 0, request.encode())
        from etcdlite.wire import api

        def work() -> None:
            try:
                api.HANDLERS[number][0](
                    node.member, Waiter(self, self._op.id, number, request), frame
                )
            except EtcdError as failure:
                self.fail(self._op.id, number, failure)
            node.turn()

        node.do(work)

    def awaits(self, request_id: int) -> bool:
        return True

    def token(self, request_id: int) -> str:
        return ""

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        self._served.add(self._node.name)
        self._oracle.answer(self._op, proto.PutResponse.decode(body))

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        self._oracle.answer(self._op, failure)


def buckets_text(store: Any) -> str:
    """The small state, but for what a member has cleaned up, which is its own matter."""
    return "; ".join(
        f"{bucket} {key.hex()}={value.hex()}"
        for bucket, items in sorted(store.buckets.items())
        for key, value in sorted(items.items())
        if bucket != CLEANED
    )


def hash_of(store: Any, revision: int) -> int:
    disk = store.disk.inner if isinstance(store.disk, SealedDisk) else store.disk
    with disk.observed():
        return int(finish(store.hash_steps(revision)))


def fresh_seed() -> int:
    return random.SystemRandom().getrandbits(31)
