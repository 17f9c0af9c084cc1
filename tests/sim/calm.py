"""A cluster in ordinary operation, with small disturbances: no leader may be deposed.

The disturbances are within what the defaults allow for. Members stall for up to `MAX_STALL_S`,
alone or all together, as on a host that runs other machines. Garbage is collected. Disks take up to
`MAX_SYNC_S` for a sync; a leader may hand over because of that. The link from the leader to one
follower is slow, or dead for a while, so that this follower hears nothing.

Disturbances come every few seconds. Followers forget a silence after seconds, too, instead of
minutes (`RECENT_S`). So each disturbance meets followers that saw none lately, as rare ones would.

    python -m tests.sim.calm --seed 1 --hours 3
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from etcdlite import frames, methods, proto
from etcdlite.replica import suspicion
from etcdlite.request import Waiter
from etcdlite.wire import api
from sim.world import Node, World

MAX_STALL_S = 0.3
MAX_SYNC_S = 0.4
PUTS_PER_S = 1.0
RECENT_S = 1.0
PAUSES_S = (0.3, 10.0)
"""The pause between the beginnings of two disturbances; some last longer than it."""


class _Client:
    """Puts keys and forgets the answers."""

    is_member = is_blocked = False

    def __init__(self) -> None:
        self.answers = 0

    def awaits(self, request_id: int) -> bool:
        return True

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        self.answers += 1

    def fail(self, request_id: int, method: int, failure: Exception) -> None:
        raise failure


class Calm:
    """A cluster of `members` in ordinary operation."""

    def __init__(self, seed: int, members: int = 3) -> None:
        self.world = world = World(seed)
        world.latency_s = world.rng.choice(((0.0001, 0.0005), (0.0002, 0.005), (0.001, 0.02)))
        world.sync_s = (0.0005, 0.005)
        world.hashes_bytes = False
        self.nodes = world.found(members)
        self.leader = world.elect()
        world.run(2.0)
        self.term = self.leader.member.raft.term
        self.disturbances = self.suspicions = self.handed_over = 0
        world.trace = self._count
        self.client = _Client()
        self._puts = 0

    def _count(self, line: str) -> None:
        self.suspicions += "the leader is silent" in line
        self.handed_over += "handing leadership over" in line

    @property
    def is_deposed(self) -> bool:
        """The leader lost its leadership without handing it over."""
        term = max(node.member.raft.term for node in self.nodes)
        return term - self.term > self.handed_over

    def run(self, seconds: float) -> None:
        """Let time pass, until the leader is deposed."""
        world = self.world
        self._put()
        self._collect()
        self._disturb()
        until = world.now + seconds
        recent_s, suspicion.RECENT_S = suspicion.RECENT_S, RECENT_S
        try:
            with world.isolated():
                while world.now < until and not self.is_deposed:
                    world.run(min(10.0, until - world.now))
        finally:
            suspicion.RECENT_S = recent_s

    def _put(self) -> None:
        world = self.world
        world.at(world.rng.expovariate(PUTS_PER_S), self._put)
        node = world.rng.choice(self.nodes)
        if not node.is_paused:
            self.put(node)

    def put(self, node: Node) -> None:
        """Let a client of this member put a key."""
        self._puts += 1
        method = methods.METHOD_BY_NAME["KV.Put"]
        request = proto.PutRequest(key=b"k%d" % (self._puts % 50), value=b"v" * 50)
        frame = frames.frame(self._puts, method.number, 0, request.encode())
        handle = api.HANDLERS[method.number][0]
        handle(node.member, Waiter(self.client, self._puts, method.number, request), frame)
        node.turn()

    def _stall(self, node: Node, seconds: float) -> None:
        if not node.is_paused:
            node.pause()
            self.world.at(seconds, node.resume)

    def _collect(self) -> None:
        """A collection of garbage, or a long turn of the loop."""
        rng = self.world.rng
        self.world.at(rng.expovariate(0.1), self._collect)
        self._stall(rng.choice(self.nodes), rng.uniform(0.0, 0.03))

    def _disturb(self) -> None:
        world, rng = self.world, self.world.rng
        world.at(rng.uniform(*PAUSES_S), self._disturb)
        what = rng.choice(("stall", "stall", "stall", "all", "disk", "slow link", "dead link"))
        leader = self.world.leader or self.leader
        node = rng.choice((leader, rng.choice(self.nodes)))
        stall_s = rng.choice((MAX_STALL_S, rng.uniform(0.05, MAX_STALL_S)))
        self.disturbances += 1
        if what == "stall":
            self._stall(node, stall_s)
        elif what == "all":
            for node in self.nodes:
                self._stall(node, stall_s - 0.001 * rng.random())
        elif what == "disk":
            node.sync_factor = rng.uniform(2.0, MAX_SYNC_S / world.sync_s[1])
            world.at(rng.uniform(0.5, 20.0), lambda: setattr(node, "sync_factor", 1.0))
        elif node is not leader:
            link = (leader.name, node.name)
            if what == "slow link":
                world.slow[link] = rng.uniform(0.01, 0.2)
                world.at(rng.uniform(0.5, 20.0), lambda: world.slow.pop(link, None) and None)
            else:
                world.blocked.add(link)
                world.at(rng.uniform(0.1, 2.0), lambda: world.blocked.discard(link))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.calm", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hours", type=float, default=1.0, help="of virtual time, of each seed")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--members", type=int, default=3)
    options: Any = parser.parse_args()
    deposed, began = 0, time.perf_counter()
    for seed in range(options.seed, options.seed + options.seeds):
        calm = Calm(seed, options.members)
        calm.run(options.hours * 3600)
        deposed += calm.is_deposed
        print(
            f"seed {seed}: {calm.world.now / 3600:.2f} h, {calm.disturbances} disturbances, "
            f"{calm.client.answers} puts, {calm.suspicions} suspicions, {calm.handed_over} handed "
            f"over, {deposed} leaders deposed; {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return bool(deposed)


if __name__ == "__main__":
    sys.exit(main())
