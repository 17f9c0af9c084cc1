"""Members of a cluster in one process, under virtual time: the clock, the wires and the disks.

A `World` runs the shipping `Member` with everything below it. What `server.py` does with threads
and sockets, a `Node` does as events in one queue: bytes arrive after a delay, a save is durable
after a delay, a tick comes every heartbeat. One `random.Random` decides all delays, so the same
seed gives the same history.

A crash forgets what was not synced, sector by sector, as `faulty_disk.py` says. A connection keeps
order and loses nothing until it breaks, as TCP does; what is on its way when it breaks is lost.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import Any

from faulty_disk import FaultyDisk

from etcdlite import bootstrap, proto
from etcdlite.member import Member
from etcdlite.peer import Dial
from etcdlite.peer_session import Accepted
from etcdlite.raft import Config, Raft

DATA_DIR = "data"
TICK_S = 0.1
SESSION_TICK_S = 0.25
ELECTION_TICKS = 10
TOKEN = "etcd-cluster"


class World:
    """The clock, the queue of events, the nodes and what lies between them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.nodes: dict[str, Node] = {}
        self.latency_s = (0.0002, 0.002)
        """Shortest and longest time of a message on its way."""
        self.sync_s = (0.0005, 0.003)
        """Shortest and longest time of a sync."""
        self.blocked: set[tuple[str, str]] = set()
        """(from, to) between which no bytes get through; connections stay and wait."""
        self.trace: Callable[[str], None] | None = None
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0

    def at(self, delay_s: float, event: Callable[[], None]) -> None:
        self._sequence += 1
        heappush(self._queue, (self.now + delay_s, self._sequence, event))

    def delay(self, bounds: tuple[float, float]) -> float:
        return self.rng.uniform(*bounds)

    def run(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        while self._queue and self._queue[0][0] <= until:
            self.step()
        self.now = until

    def run_until(self, condition: Callable[[], bool], limit_s: float = 60.0) -> None:
        """Let time pass until `condition` holds. Raises AssertionError after `limit_s`."""
        until = self.now + limit_s
        while not condition():
            assert self._queue and self.now <= until, f"not within {limit_s} s of virtual time"
            self.step()

    def step(self) -> None:
        """The next event."""
        self.now, _, event = heappop(self._queue)
        event()

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.now:10.4f} {text}")

    # Nodes.

    def found(self, count: int, **options: Any) -> list[Node]:
        """A new cluster of `count` nodes, started."""
        names = [f"m{number}" for number in range(1, count + 1)]
        members = [_member(name) for name in names]
        cluster_id = bootstrap.derive_cluster_id([member.ID for member in members])
        for name in names:
            node = self.nodes[name] = Node(self, name, cluster_id, options)
            node.create(members)
            node.start()
        return list(self.nodes.values())

    def join(self, name: str, member: Any, members: Iterable[Any], **options: Any) -> Node:
        """Start a node that was added as `member` to the cluster of `members`."""
        node = self.nodes[name] = Node(
            self, name, next(iter(self.nodes.values())).cluster_id, options
        )
        node.member_id = member.ID
        node.create([], [*members, member])
        node.start()
        return node

    def partition(self, *groups: Iterable[str]) -> None:
        """Only nodes of the same group reach each other."""
        side = {name: number for number, group in enumerate(groups) for name in group}
        self.blocked = {
            (a, b) for a in self.nodes for b in self.nodes if a != b and side.get(a) != side.get(b)
        }

    def heal(self) -> None:
        self.blocked = set()

    @property
    def leader(self) -> Node | None:
        """The node that leads in the highest term, if a majority of those that are up follow it."""
        leading = [n for n in self.nodes.values() if n.is_up and n.member.leads]
        return max(leading, key=lambda node: node.member.raft.term, default=None)

    def elect(self) -> Node:
        """Wait for a leader that all nodes which are up and reachable know."""
        self.run_until(lambda: self.leader is not None)
        leader = self.leader
        assert leader is not None
        return leader


def url(name: str) -> str:
    return f"http://{name}:2380"


def _member(name: str) -> Any:
    urls = [url(name)]
    member_id = bootstrap.derive_member_id(urls, TOKEN)
    return proto.Member(ID=member_id, name=name, peerURLs=urls)


class Wire:
    """One direction of a connection."""

    def __init__(self, world: World, source: str, target: str) -> None:
        self.world = world
        self.source = source
        self.target = target
        self.session: Any = None
        """Who receives."""
        self.node: Node | None = None
        self.is_cut = False
        self._free_at = 0.0
        self._waiting: list[bytes] = []

    def send(self, data: bytes) -> None:
        world = self.world
        if (self.source, self.target) in world.blocked or self._waiting:
            self._waiting.append(data)
            if len(self._waiting) == 1:
                world.at(0.05, self._retry)
            return
        # In order: not before what was sent earlier.
        arrives = max(world.now + world.delay(world.latency_s), self._free_at)
        self._free_at = arrives
        world.at(arrives - world.now, lambda: self._arrive(data))

    def _retry(self) -> None:
        if self.is_cut or not self._waiting:
            return
        if (self.source, self.target) in self.world.blocked:
            self.world.at(0.05, self._retry)
            return
        waiting, self._waiting = self._waiting, []
        self.send(b"".join(waiting))

    def _arrive(self, data: bytes) -> None:
        node = self.node
        if self.is_cut or node is None or not node.is_up:
            return
        if node.is_paused:
            node.inbox.append(lambda: self._arrive(data))
            return
        self.session.receive(data)
        node.turn()

    def close(self) -> None:
        """Tell the other side that this one closed, behind what was sent."""
        delay_s = self.world.delay(self.world.latency_s)
        self.world.at(max(delay_s, self._free_at - self.world.now), self.end)

    def end(self) -> None:
        """The other side has closed: this side learns it, unless the way is blocked."""
        if self.is_cut:
            return
        if (self.source, self.target) in self.world.blocked:
            self.world.at(0.1, self.end)
            return
        node = self.node
        self.is_cut = True
        if node is not None and node.is_up:
            if node.is_paused:
                node.inbox.append(lambda: node.lose(self.session))
            else:
                node.lose(self.session)
                node.turn()


class Node:
    """One process: a member, its disk, its connections."""

    def __init__(self, world: World, name: str, cluster_id: int, options: dict[str, Any]) -> None:
        self.world = world
        self.name = name
        self.cluster_id = cluster_id
        self.member_id = _member(name).ID
        self.disk = FaultyDisk()
        self.options = options
        self.is_up = False
        self.is_paused = False
        self.inbox: list[Callable[[], None]] = []
        self.clock_offset_s = 1000.0 * len(world.nodes)
        self.member: Member
        self._remotes: list[Any] = []
        self._life = 0
        self._wires: dict[Any, tuple[Wire, Wire]] = {}
        """By session: the wire to send on and the one it receives from."""
        self._dirty: list[Any] = []
        self._saves: list[Any] = []
        self._is_syncing = False
        self._turn_is_due = False

    # Starting and stopping.

    def create(self, members: list[Any], remotes: Iterable[Any] = ()) -> None:
        """Lay out the member's folder; without `members` for one that joins `remotes`."""
        self._remotes = list(remotes)
        bootstrap.create(
            self.disk,
            DATA_DIR,
            "",
            bootstrap.Founding(self.cluster_id, self.member_id, members),
            segment_bytes=self.options.get("segment_bytes", 1 << 16),
            wal_segment_bytes=self.options.get("wal_segment_bytes", 1 << 16),
        )

    def start(self, force_new_cluster: bool = False) -> None:
        """Start the process on what its disk holds. Raises as `bootstrap.open_member`."""
        world, options = self.world, self.options
        self._life += 1
        opened = bootstrap.open_member(
            self.disk,
            DATA_DIR,
            "",
            min_ttl_s=2,
            segment_bytes=options.get("segment_bytes", 1 << 16),
            wal_segment_bytes=options.get("wal_segment_bytes", 1 << 16),
            sync_enabled=True,
        )
        self.wal = opened.wal
        rng = random.Random(world.rng.getrandbits(64))
        store = opened.store
        members = bootstrap.membership(store, self.member_id)
        raft = Raft(
            Config(
                id=opened.member_id,
                election_ticks=ELECTION_TICKS,
                **options.get("raft", {}),
            ),
            rng,
            voters=[opened.member_id]
            if force_new_cluster
            else [m.ID for m in members if not m.isLearner],
            learners=[m.ID for m in members if m.isLearner and not force_new_cluster],
            hard_state=opened.hard_state,
            snapshot_index=opened.log_index,
            snapshot_term=opened.log_term,
            entries=opened.entries,
            applied=store.applied_index,
        )
        self.member = Member(
            member_id=opened.member_id,
            cluster_id=opened.cluster_id,
            store=store,
            lessor=opened.lessor,
            raft=raft,
            clock=self.clock,
            rng=rng,
            quota_bytes=options.get("quota_bytes", 1 << 31),
            max_request_bytes=1_572_864,
            max_txn_ops=128,
            request_timeout_s=7.0,
            election_timeout_s=TICK_S * ELECTION_TICKS,
            progress_interval_s=options.get("progress_interval_s", 600.0),
            warn_apply_s=1e9,
            warn_request_s=1e9,
            checkpoint_bytes=options.get("checkpoint_bytes", 1 << 40),
            members=self._remotes,
            cluster_token=TOKEN,
            force_new_cluster=force_new_cluster,
        )
        self.member.attributes = proto.Member(
            ID=self.member_id, name=self.name, clientURLs=[f"http://{self.name}:2379"]
        )
        self.is_up = True
        self.is_paused = False
        self._is_syncing = False
        self._turn_is_due = False
        self._saves = []
        self._wires = {}
        self._dirty = []
        self.inbox = []
        world.note(f"{self.name} starts")
        life = self._life
        world.at(world.rng.uniform(0, TICK_S), lambda: self._tick(life))
        world.at(world.rng.uniform(0, SESSION_TICK_S), lambda: self._tick_sessions(life))
        self.turn()

    def crash(self, keep: Callable[[str, int], bool] | None = None) -> None:
        """The power goes, or with `keep` None the process is killed and the kernel lives."""
        self.world.note(f"{self.name} crashes")
        self.is_up = False
        for session in list(self._wires):
            self._cut(session, tells=keep is None)
        self._life += 1
        self.disk = self.disk.copy() if keep is None else self.disk.power_loss(keep, 0)

    def pause(self) -> None:
        """SIGSTOP."""
        self.is_paused = True

    def resume(self) -> None:
        """SIGCONT: everything that waited comes at once."""
        self.is_paused = False
        inbox, self.inbox = self.inbox, []
        for event in inbox:
            event()
        self.turn()

    def clock(self) -> float:
        return self.world.now + self.clock_offset_s

    # What the loop does.

    def _tick(self, life: int) -> None:
        if life != self._life:
            return
        self.world.at(TICK_S, lambda: self._tick(life))
        if not self.is_paused:
            self.member.tick()
            self.turn()

    def _tick_sessions(self, life: int) -> None:
        if life != self._life:
            return
        self.world.at(SESSION_TICK_S, lambda: self._tick_sessions(life))
        if not self.is_paused:
            for session in list(self._wires):
                session.tick(self.clock())
            self.turn()

    def turn(self) -> None:
        """One turn of the loop, and more as long as there is work."""
        if not self.is_up or self.is_paused:
            return
        member = self.member
        member.turn()
        saves = member.take_saves()
        if saves:
            self._saves += saves
            self._sync()
        task = member.take_task()
        if task is not None:
            life = self._life
            self.world.at(self.world.delay(self.world.sync_s), lambda: self._run_task(life, task))
        for session in list(self._wires):
            if session.has_more:
                session.produce()
        self._flush()
        member.housekeep()
        released = member.housekeeping.released
        if released is not None:
            member.housekeeping.released = None
            self.wal.cover(*released, min(released[0], member.log_begin))
        self._dial()
        if member.has_work and not self._turn_is_due:
            self._turn_is_due = True
            life = self._life
            self.world.at(0.0001, lambda: self._due_turn(life))
        if member.wakes_at < float("inf"):
            life = self._life
            self.world.at(max(0.0, member.wakes_at - self.clock()), lambda: self._due_turn(life))

    def _due_turn(self, life: int) -> None:
        self._turn_is_due = False
        if life == self._life:
            self.turn()

    def _sync(self) -> None:
        if self._is_syncing or not self._saves:
            return
        self._is_syncing = True
        saves, self._saves = self._saves, []
        life = self._life
        self.world.at(self.world.delay(self.world.sync_s), lambda: self._synced(life, saves))

    def _synced(self, life: int, saves: list[Any]) -> None:
        if life != self._life:
            return
        if self.is_paused:
            self.inbox.append(lambda: self._synced(life, saves))
            return
        self.wal.save_all(saves)
        self._is_syncing = False
        self.member.persisted(saves)
        self._sync()
        self.turn()

    def _run_task(self, life: int, task: Callable[[], None]) -> None:
        if life != self._life:
            return
        if self.is_paused:
            self.inbox.append(lambda: self._run_task(life, task))
            return
        task()
        self.member.finished()
        self.turn()

    # Connections.

    def _dial(self) -> None:
        for link in list(self.member.peers.links.values()):
            for make in link.wants(self.clock()):
                self._connect(make(self._dirty.append), link.url)

    def _connect(self, dial: Dial, to: str) -> None:
        world = self.world
        name = to.removeprefix("http://").removesuffix(":2380")
        life = self._life

        def arrive() -> None:
            if life != self._life:
                return
            target = world.nodes.get(name)
            if (self.name, name) in world.blocked or (name, self.name) in world.blocked:
                world.at(1.0, lambda: self._unreachable(life, dial, False))
            elif target is None or not target.is_up:
                self._unreachable(life, dial, True)
            else:
                self._accepted(dial, target)

        world.at(world.delay(world.latency_s) * 2, arrive)

    def _unreachable(self, life: int, dial: Dial, is_refused: bool) -> None:
        if life == self._life:
            dial.link.unreachable(dial, "connection refused", is_refused)
            self.turn()

    def _accepted(self, dial: Dial, target: Node) -> None:
        world = self.world
        there, back = Wire(world, self.name, target.name), Wire(world, target.name, self.name)
        accepted = Accepted(target.member, target._dirty.append)
        there.session, there.node = accepted, target
        back.session, back.node = dial, self
        self._wires[dial] = (there, back)
        target._wires[accepted] = (back, there)
        dial.connected()
        self.turn()

    def _flush(self) -> None:
        while self._dirty:
            session = self._dirty.pop(0)
            wires = self._wires.get(session)
            if wires is None:
                continue
            if session.out:
                data = b"".join(session.out)
                session.out.clear()
                session.unsent_bytes = 0
                wires[0].send(data)
            if session.is_closing or session.is_aborted:
                self._cut(session)

    def _cut(self, session: Any, tells: bool = True) -> None:
        """This side closes a connection."""
        there, back = self._wires.pop(session)
        back.is_cut = True
        if tells:
            there.close()
        if self.is_up:
            session.closed()

    def lose(self, session: Any) -> None:
        """The other side closed."""
        if session in self._wires:
            self._wires.pop(session)
            session.closed()
