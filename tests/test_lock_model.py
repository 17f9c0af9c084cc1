"""Locks and elections of several members, at random, against a model of who holds what.

Each client has a lease and may have several calls open, at one member or at any. It gives calls up,
asks again, releases, proclaims, and loses its lease. The network is slow or cut in between.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from sim.world import Node
from test_cluster import SMALL, Cluster
from test_concurrency import Caller

from etcdlite import proto
from etcdlite.errors import EtcdError
from etcdlite.storage.steps import finish
from etcdlite.wire import locks

METHODS = {b"door": "Lock.Lock", b"post": "Election.Campaign"}


class Contender:
    """A client with one lease at a time."""

    def __init__(self, number: int) -> None:
        self.lease = number
        self.name = b""
        self.ttl_s = 0
        self.is_alive = False
        self.home: Caller | None = None
        """The only member that it asks; None: it asks any, and waits at one at a time."""
        self.calls: list[tuple[Caller, int]] = []
        self.held: proto.LeaderKey | None = None
        """What it was told that it holds, until it releases it or loses its lease."""


class Story:
    def __init__(self, seed: int, members: int, roams: bool) -> None:
        self.rng = random.Random(seed)
        self.roams = roams
        self.cluster = Cluster(members, seed=seed, **SMALL)
        self.world = self.cluster.world
        self.callers = [Caller(node) for node in self.cluster.nodes]
        self.contenders = [Contender(number) for number in range(1, 5)]
        self.grants = 0

    def freshest(self) -> Node:
        """The node that has applied most."""
        return max(self.cluster.nodes, key=lambda node: node.member.state.store.applied_index)

    def send(self, caller: Caller, method: str, **fields: Any) -> int:
        request_id = caller.send(method, **fields)
        self.node(caller).turn()
        return request_id

    def node(self, caller: Caller) -> Node:
        assert isinstance(caller.lone, Node)
        return caller.lone

    def begin(self, one: Contender) -> None:
        """Ask for the lock, or to lead."""
        if self.roams:
            self.give_up(one, len(one.calls))
        caller = self.rng.choice(self.callers) if one.home is None or self.roams else one.home
        one.home = caller
        fields: dict[str, Any] = {"name": one.name, "lease": one.lease}
        if one.name == b"post":
            fields["value"] = self.rng.choice((b"a", b"b"))
        one.calls.append((caller, self.send(caller, METHODS[one.name], **fields)))

    def give_up(self, one: Contender, count: int) -> None:
        for _ in range(count):
            caller, request_id = one.calls.pop(self.rng.randrange(len(one.calls)))
            caller.calls.close(request_id)
            self.node(caller).turn()

    def release(self, one: Contender) -> None:
        """Give up the calls, too: the client wants the lock no more."""
        held, one.held = one.held, None
        assert held is not None and one.home is not None
        self.give_up(one, len(one.calls))
        if one.name == b"door":
            request_id = self.send(one.home, "Lock.Unlock", key=held.key)
        else:
            request_id = self.send(one.home, "Election.Resign", leader=held)
        received = one.home.received[request_id]
        self.world.run_until(lambda: bool(received))
        if isinstance(received[0], EtcdError):
            self.lose(one)  # The key may be deleted later.

    def lose(self, one: Contender) -> None:
        one.is_alive, one.held = False, None
        node = self.rng.choice(self.cluster.nodes)
        self.cluster.client.send(node, "Lease.LeaseRevoke", ID=one.lease)

    def revive(self, one: Contender) -> None:
        self.give_up(one, len(one.calls))
        self.grants += 1
        one.lease, one.home = 100 + self.grants, None
        one.name, one.ttl_s = self.rng.choice((b"door", b"post")), self.rng.choice((3, 600, 600))
        leader = self.world.leader or self.freshest()
        fields = {"ID": one.lease, "TTL": one.ttl_s}
        try:
            self.cluster.client.ask(leader, "Lease.LeaseGrant", **fields)
            one.is_alive = True
        except EtcdError:
            pass  # No leader.

    def step(self) -> None:
        one, dice = self.rng.choice(self.contenders), self.rng.random()
        if not one.is_alive:
            self.revive(one)
        elif dice < 0.02:
            self.lose(one)
        elif one.held is None and (dice < 0.5 or not one.calls) and len(one.calls) < 3:
            self.begin(one)
        elif one.held is None and one.calls:
            self.give_up(one, 1)
            if self.rng.random() < 0.6:
                self.begin(one)  # At once.
        elif dice < 0.3:
            self.begin(one)
            self.world.run(self.rng.choice((0, 0.002, 0.005)))
            if self.rng.random() < 0.7:
                self.give_up(one, 1)
        elif dice < 0.4 and one.name == b"post":
            assert one.home is not None
            self.send(one.home, "Election.Proclaim", leader=one.held, value=b"p")
        elif dice < 0.8 and one.held is not None:
            self.release(one)

    def disturb(self) -> None:
        names = [node.name for node in self.cluster.nodes]
        dice = self.rng.random()
        if dice < 0.4:
            one, other = self.rng.sample(names, 2)
            self.world.slow = {(one, other): self.rng.choice((0.05, 0.3))}
        elif dice < 0.6:
            name = self.rng.choice(names)
            self.world.partition([name], [other for other in names if other != name])
        else:
            self.world.slow = {}
            self.world.heal()

    def check(self) -> None:
        """Take in the answers. Of each name, one contender holds it, and its key is there."""
        store = self.freshest().member.state.store
        leases = set(finish(store.lessor.lease_steps()))
        for one in self.contenders:
            for caller, request_id in one.calls[:]:
                received = caller.received[request_id]
                if not received:
                    continue
                one.calls.remove((caller, request_id))
                if not isinstance(received[0], EtcdError) and one.is_alive:
                    answer = received[0]
                    told = (
                        proto.LeaderKey(name=one.name, key=answer.key, lease=one.lease)
                        if one.name == b"door"
                        else answer.leader
                    )
                    one.held = one.held or told
            if one.is_alive and one.ttl_s == 3 and one.lease not in leases:
                one.is_alive, one.held = False, None
        for name in METHODS:
            holding = [one.lease for one in self.contenders if one.held and one.name == name]
            assert len(holding) <= 1, f"{holding} hold {name!r} at {self.world.now}"
        for one in self.contenders:
            if one.held is not None and one.lease in leases:
                assert one.held.key in store.index.heads, f"{one.held} is gone"

    def end(self, is_calm: bool) -> None:
        """All that waits gets its turn, and nothing is left behind."""
        self.world.slow = {}
        self.world.heal()
        self.world.run(10)
        self.check()
        for _ in range(20):
            for one in self.contenders:
                if one.held is not None:
                    self.release(one)
            self.world.run(0.5)
            self.check()
        if is_calm:
            assert not any(one.calls for one in self.contenders), "a call waits for ever"
        for one in self.contenders:
            self.give_up(one, len(one.calls))
        self.world.run(1)
        heads = self.freshest().member.state.store.index.heads
        if is_calm and not self.roams:
            assert not [key for key in heads if key[:5] in (b"door/", b"post/")]
        for caller in self.callers:
            member = self.node(caller).member
            assert not locks._shared(member).places and not locks._shared(member).queues
            assert not len(caller.calls)


@pytest.mark.parametrize(
    ("roams", "is_calm"), [(False, True), (True, True), (False, False), (True, False)]
)
@pytest.mark.parametrize("seed", range(3))
def test_one_holds_what_the_services_give_and_all_get_their_turn(
    seed: int, roams: bool, is_calm: bool
) -> None:
    story = Story(seed, 3, roams)
    for _ in range(200):
        story.step()
        if not is_calm and story.rng.random() < 0.05:
            story.disturb()
        story.world.run(story.rng.choice((0, 0, 0.0003, 0.001, 0.003, 0.02, 0.2)))
        story.check()
    story.end(is_calm)
