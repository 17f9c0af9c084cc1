"""Members of a cluster in one process, under virtual time: the clock, the wires and the disks.

A `World` runs the shipping `Member` with everything below it. What `server.py` does with threads
and sockets, a `Node` does as events in one queue: bytes arrive after a delay, a save is durable
after a delay, a tick comes every heartbeat. One `random.Random` decides all delays, so the same
seed gives the same history, to the byte: `digest` covers every byte that arrived anywhere and every
line that was noted.

A crash forgets what was not synced, sector by sector, as `faulty_disk.py` says. A connection keeps
order and loses nothing until it breaks, as TCP does; what is on its way when it breaks is lost or
comes late, beside what a new connection brings.

No wall clock, thread, socket or global random is used here. What the shipping code takes from the
operating system (`os.urandom`, the clock of the log) `isolated` replaces.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from heapq import heappop, heappush
from typing import Any

from rigs.faulty_disk import FaultyDisk
from rigs.lone_member import ALWAYS_SLOW_S

import etcdlite.etcd_hash  # noqa: F401  Otherwise the first HashKV of a process takes a task more.
from etcdlite import datadir, frames, log, passwords, proto
from etcdlite.channel import Channel, ChannelError
from etcdlite.frames import HANDSHAKE, MAGIC, ProtocolError
from etcdlite.limits import DEFAULT_LIMITS
from etcdlite.member import Member
from etcdlite.options import Options
from etcdlite.passwords import Cost
from etcdlite.peer import (
    FORWARD,
    RAFT,
    Dial,
    PeerConnection,
    decode_message,
    encode_message,
)
from etcdlite.peer_frames import PeerFrameReader
from etcdlite.proto import DecodeError
from etcdlite.raft import Config, Raft
from etcdlite.replica.entry import decode_requests
from etcdlite.replica.logins import Job
from etcdlite.replica.membership import derive_cluster_id, derive_member_id
from etcdlite.sealing import Key, Keyring
from etcdlite.secret import PEER, InitiatorChannel, ResponderChannel
from etcdlite.secret_file import Secrets
from etcdlite.storage.layout import SEGMENT_HEADER, DataDamaged, segment_name
from etcdlite.storage.sealed import BLOCK_BYTES, SealedDisk
from etcdlite.tokens import SimpleTokens
from etcdlite.versions import CURRENT, Version
from etcdlite.wal import WALError
from etcdlite.wire.peer_session import Accepted
from sim.plain_auth import hashed, is_right

DATA_DIR = "data"
TICK_S = 0.1
SESSION_TICK_S = 0.25
ELECTION_TICKS = 10
TOKEN = "etcd-cluster"
KEPT_LINES = 30_000
"""Lines of the trace that are kept in memory, for the tail that a failing run shows."""
REMOVED_S = 1.0
"""How long a removed member still answers, as in `server.py`."""

LOGIN_S = (0.001, 0.1)
"""Shortest and longest time of the thread that computes the hash of a password."""

EPOCH_S = 1_700_000_000.0
"""The wall clock at the beginning."""

WRITING = frozenset(("pwrite", "sync", "allocate", "create", "rename", "sync_dir", "truncate"))
"""Disk operations that an injected error may meet."""


class PowerLoss(BaseException):
    """The machine of a node lost its power in the middle of a disk operation."""


class SimDisk(FaultyDisk):
    """A faulty disk that counts instead of remembering, and fails by itself when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.trip_at = 0
        """At this step the power goes; 0: never."""
        self.error_at = 0
        """From this step on the next writing operation fails with `error`; 0: never."""
        self.has_failed = False
        """An injected error was met."""

    def _step(self, operation: str, path: str, half_done: Callable[[], None] | None = None) -> None:
        self.steps += 1
        if self.steps == self.trip_at:
            raise PowerLoss
        if self.error_at and self.steps >= self.error_at and operation in WRITING:
            self.error_at = 0
            self.has_failed = True
            if half_done is not None:
                half_done()
            raise OSError(self.error, os.strerror(self.error), path)
        self.watcher(operation, path)

    @contextmanager
    def observed(self) -> Iterator[None]:
        """What is read meanwhile does not count: somebody looks from outside."""
        saved = self.steps, self.trip_at, self.error_at
        self.trip_at = self.error_at = 0
        try:
            yield
        finally:
            self.steps, self.trip_at, self.error_at = saved


class World:
    """The clock, the queue of events, the nodes and what lies between them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 0.0
        self.nodes: dict[str, Node] = {}
        self.latency_s = (0.0002, 0.002)
        """Shortest and longest time of a message on its way."""
        self.sync_s = (0.0005, 0.003)
        """Shortest and longest time of a sync."""
        self.quick_saves = 0.0
        """The share of saves that the loop makes itself, where nothing else is to be done."""
        self.quick_rng = random.Random(f"quick saves {seed}")
        self.wake_s = (0.0, 0.0)
        """Shortest and longest time until a loop looks at what came: what comes meanwhile is one
        bunch. Zero: at once, one by one."""
        self.blocked: set[tuple[str, str]] = set()
        """(from, to) between which no bytes get through; connections stay and wait."""
        self.slow: dict[tuple[str, str], float] = {}
        """(from, to): seconds that every message takes longer."""
        self.clock_lead_s = 0.0
        """The longest turn so far, on the clock of its node; it takes no time here."""
        self.message_faults = (0.0, 0.0, 0.0)
        """Shares of raft messages that are dropped, doubled, and held back for a while."""
        self.flips = 0.0
        """Share of the chunks of bytes between members in which a bit flips on the way."""
        self.secret: Secrets | None = None
        """The members have it in common: what they say to each other goes through its channel."""
        self.token_ttl_s = 300.0
        """How long the tokens of users live."""
        self.hashes_bytes = True
        """What comes through a wire is part of `digest`, which costs a fifth of the time."""
        self.voter_crashes = 0.0
        """Share of votes after which the machine of the voter loses its power at once."""
        self.trace: Callable[[str], None] | None = None
        self.lines: deque[tuple[float, str]] = deque(maxlen=KEPT_LINES)
        self.events = 0
        self.observer: Any = None
        """Told of every start of a member, see `checkers.py`."""
        self._hash = hashlib.blake2b(digest_size=16)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0

    @property
    def digest(self) -> str:
        """The hash of the trace: all lines, and all bytes that came through a wire."""
        return self._hash.copy().hexdigest()

    def at(self, delay_s: float, event: Callable[[], None]) -> None:
        self.at_time(self.now + delay_s, event)

    def at_time(self, when: float, event: Callable[[], None]) -> None:
        """Call `event` at this time, after the events of the same time that were added before."""
        self._sequence += 1
        heappush(self._queue, (when, self._sequence, event))

    def delay(self, bounds: tuple[float, float]) -> float:
        low, high = bounds
        return low + (high - low) * self.rng.random()

    def run(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        queue = self._queue
        while queue and queue[0][0] <= until:
            self.now, _, event = heappop(queue)
            self.events += 1
            event()
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
        self.events += 1
        event()

    def note(self, text: str) -> None:
        """A line of the trace."""
        line = f"{self.now:10.4f} {text}"
        self._hash.update(line.encode())
        self.lines.append((self.now, text))
        if self.trace is not None:
            self.trace(line)

    def passed(self, data: bytes) -> None:
        """Bytes arrived: they are part of the trace."""
        self._hash.update(data)

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """The shipping code's ways to the operating system end here: the log goes to the trace.
        Hashes of passwords have salts from libsodium's own entropy, so they are replaced, too."""
        saved = os.urandom, log._write, log.limited
        saved_passwords = passwords.hash_password, passwords.is_right
        entropy = random.Random(self.rng.getrandbits(64))

        def write(level: int, message: str, fields: dict[str, Any]) -> None:
            text = " ".join(f"{name.replace('_', '-')}={value}" for name, value in fields.items())
            self.note(f"  log {('debug', 'info', 'warn', 'error')[level]}: {message} {text}")

        os.urandom = entropy.randbytes
        log._write = write
        log.limited = lambda key, per_s=1.0: False
        passwords.hash_password = lambda password, cost=CHEAP: hashed(
            password, os.urandom(8).hex().encode()
        )
        passwords.is_right = is_right
        try:
            yield
        finally:
            os.urandom, log._write, log.limited = saved
            passwords.hash_password, passwords.is_right = saved_passwords

    # Nodes.

    def found(self, count: int, **options: Any) -> list[Node]:
        """A new cluster of `count` nodes, started."""
        names = [f"m{number}" for number in range(1, count + 1)]
        members = [_member(name) for name in names]
        cluster_id = derive_cluster_id([member.ID for member in members])
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
        node.url = member.peerURLs[0]
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


CHEAP = Cost(8 << 10, 1)


def url(name: str, moves: int = 0) -> str:
    """The peer URL of a node that has moved so often."""
    return f"http://{name}:{2380 + moves}"


def node_name(peer_url: str) -> str:
    return peer_url.removeprefix("http://").split(":")[0]


def moves(peer_url: str) -> int:
    """How often the node has moved that has this peer URL."""
    return int(peer_url.split(":")[2]) - 2380


def _member(name: str) -> Any:
    urls = [url(name)]
    member_id = derive_member_id(urls, TOKEN)
    return proto.Member(ID=member_id, name=name, peerURLs=urls)


def unsealed(data: bytes) -> bytes:
    """What one member sends to another, as version 1 of the protocol had it, without checksums. The
    trace is of what members say, so that it stays the same when only the way of saying changes."""
    parts = []
    at = 0
    if data.startswith(MAGIC):
        _, lowest, highest = HANDSHAKE.unpack_from(data)
        parts.append(HANDSHAKE.pack(MAGIC, min(lowest, 1), min(highest, 1)))
        at = HANDSHAKE.size
    for request_id, method, flags, body in _frames_in(data[at:]):
        if method == FORWARD and not flags:
            body = body[:8] + _old_entry(body[8:])
        elif method == RAFT:
            message = decode_message(body, 0, 0)
            entries = [entry._replace(data=_old_entry(entry.data)) for entry in message.entries]
            body = encode_message(message._replace(entries=entries))
        parts.append(frames.frame(request_id, method, flags, body))
    return b"".join(parts)


def _frames_in(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Up to the first one that is damaged."""
    reader = PeerFrameReader(1 << 30)
    reader.feed(data)
    with suppress(ProtocolError):
        yield from reader


def _old_entry(data: bytes) -> bytes:
    """The payload of an entry in version 1."""
    if not data or data[0] == 1:
        return data
    try:
        count = len(decode_requests(data))
    except DecodeError:
        count = 0
    return b"\1\0\0\0" + count.to_bytes(4, "little") + data[8:]


class Wire:
    """One direction of a connection. `target` is a `Node`, or whatever has its `receive`."""

    __slots__ = ("_free_at", "_waiting", "is_cut", "node", "session", "source", "target", "world")

    def __init__(self, world: World, source: str, target: str) -> None:
        self.world = world
        self.source = source
        self.target = target
        self.session: Any = None
        """Who receives."""
        self.node: Any = None
        self.is_cut = False
        self._free_at = 0.0
        self._waiting: list[bytes] = []

    def send(self, data: bytes) -> None:
        world = self.world
        way = (self.source, self.target)
        if self._waiting or way in world.blocked:
            self._waiting.append(data)
            if len(self._waiting) == 1:
                world.at(0.05, self._retry)
            return
        arrives = world.now + world.delay(world.latency_s) + world.slow.get(way, 0.0)
        # In order: not before what was sent earlier.
        arrives = max(arrives, self._free_at)
        self._free_at = arrives
        # Not by a delay: that is rounded, and two pieces could change places.
        world.at_time(arrives, lambda: self._arrive(data))

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
        world = self.world
        if not world.hashes_bytes:
            pass
        elif not isinstance(self.session, PeerConnection):
            world.passed(data)
        else:
            world.passed(unsealed(data) if self.session.channel is None else data)
            if world.flips and world.rng.random() < world.flips:
                data = self._flipped(data)
        node.receive(self, data)

    def _flipped(self, data: bytes) -> bytes:
        """The same with one bit changed."""
        damaged = bytearray(data)
        at = self.world.rng.randrange(8 * len(data))
        damaged[at // 8] ^= 1 << at % 8
        self.world.note(f"bit {at} of {len(data)} bytes from {self.source} to {self.target} flips")
        return bytes(damaged)

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
            node.ended(self.session)


class Node:
    """One process: a member, its disk, its connections."""

    def __init__(self, world: World, name: str, cluster_id: int, options: dict[str, Any]) -> None:
        self.world = world
        self.name = name
        self.cluster_id = cluster_id
        self.member_id = _member(name).ID
        self.url = url(name)
        """Where other members reach it."""
        self.disk = SimDisk()
        self.options = options
        self.is_up = False
        self.is_paused = False
        self.is_gone = False
        """It was removed from the cluster and has stopped for ever."""
        self.is_rotten = False
        """Its disk gives back something else than what was written."""
        self.is_old_copy = False
        """Its disk was set back to an earlier time, and the other members can know it."""
        self.is_refused = False
        """The others have found that; it must be replaced."""
        self.inbox: list[Callable[[], None]] = []
        self.clock_offset_s = 1000.0 * len(world.nodes)
        self.clock_rate = 1.0
        self.look_s = 0.0
        """How long the work between two looks at the clock takes, as far as the node can tell."""
        self.sync_factor = 1.0
        """How many times slower its disk is."""
        self.lives = 0
        self.version: Version = options.get("version", CURRENT)
        """The version of its program."""
        self.key_seeds: list[int] = []
        """Of its encryption keys; the first one writes."""
        self.member: Member
        self.on_stop: Callable[[Node], None] = lambda node: None
        """Called when the process ended by itself: an injected disk error, or its removal."""
        self._clock_last = 0.0
        self._looks = 0
        self._remotes: list[Any] = []
        self._life = 0
        self._wires: dict[Any, tuple[Wire, Wire]] = {}
        """By session: the wire to send on and the one it receives from."""
        self._producing: list[Any] = []
        """Those that may have more to send than answers."""
        self._dirty: list[Any] = []
        self._saves: list[Any] = []
        self._is_syncing = False
        self._turn_is_due = self._tick_is_due = False
        self._wakes_at = 0.0

    # Starting and stopping.

    def create(self, members: list[Any], remotes: Iterable[Any] = ()) -> None:
        """Lay out the member's folder; without `members` for one that joins `remotes`."""
        self._remotes = list(remotes)
        founding = datadir.Founding(self.cluster_id, self.member_id, members)
        datadir.create(self._home(), founding, version=self.version)

    def _home(self) -> datadir.Home:
        sizes = (self.options.get(f"{name}segment_bytes", 1 << 16) for name in ("", "wal_"))
        return datadir.Home(self.disk, DATA_DIR, "", self._keys(), *sizes)

    def _keys(self) -> Keyring | None:
        """The keys of the node, if the cluster has some: of two nodes in three, and once in a while
        another one is put first. They leave the random choices of the world alone."""
        if not self.options.get("is_encrypted"):
            return None
        rng = random.Random(f"keys {self.world.seed} {self.name} {self.lives}")
        if not self.lives:
            self.key_seeds = [rng.getrandbits(32)] if rng.random() < 0.67 else []
        elif rng.random() < 0.1:
            self.key_seeds.insert(0, rng.getrandbits(32))
        if not self.key_seeds:
            return None
        secrets = [random.Random(seed).randbytes(32) for seed in self.key_seeds]
        return Keyring(Key(secret, rng.randbytes) for secret in secrets)

    def start(self, force_new_cluster: bool = False) -> None:
        """Start the process on what its disk holds. Raises as `datadir.open_member`."""
        world, options = self.world, self.options
        self._life += 1
        self.lives += 1
        opened = datadir.open_member(
            self._home(),
            min_ttl_s=2,
            sync_enabled=True,
            limits=options.get("limits", DEFAULT_LIMITS),
            version=self.version,
        )
        self.wal = opened.wal
        rng = random.Random(world.rng.getrandbits(64))
        store = opened.store
        members = datadir.membership(store, self.member_id)
        raft = Raft(
            Config(
                id=opened.member_id,
                election_ticks=ELECTION_TICKS,
                **options.get("raft", {}),
            ),
            rng,
            voters=[m.ID for m in members if not m.isLearner and not force_new_cluster],
            learners=[m.ID for m in members if m.isLearner and not force_new_cluster],
            hard_state=opened.hard_state,
            snapshot_index=opened.log_index,
            snapshot_term=opened.log_term,
            entries=opened.entries,
            applied=store.applied_index,
        )
        if world.observer is not None:
            world.observer.recovered(self, opened, raft)
        self.member = Member(
            member_id=opened.member_id,
            cluster_id=opened.cluster_id,
            store=store,
            raft=raft,
            clock=self.clock,
            rng=rng,
            members=self._remotes,
            options=Options(
                quota_bytes=options.get("quota_bytes", 1 << 31),
                request_timeout_s=options.get("request_timeout_s", 7.0),
                election_timeout_s=TICK_S * ELECTION_TICKS,
                progress_interval_s=options.get("progress_interval_s", 600.0),
                warn_apply_s=ALWAYS_SLOW_S,
                warn_request_s=ALWAYS_SLOW_S,
                checkpoint_bytes=options.get("checkpoint_bytes", 1 << 40),
                cluster_token=TOKEN,
                strict_reconfig_check=options.get("strict_reconfig_check", True),
                force_new_cluster=force_new_cluster,
                password_cost=CHEAP,
                version=self.version,
                wall_clock=self.wall_clock,
            ),
            tokens=SimpleTokens(
                opened.cluster_id,
                world.token_ttl_s,
                self.clock,
                self.wall_clock,
                random.Random(f"{world.seed} {self.name} {self.lives}").randbytes,
            ),
        )
        self.member.attributes = proto.Member(
            ID=self.member_id, name=self.name, clientURLs=[f"http://{self.name}:2379"]
        )
        self.is_up = True
        self.is_paused = False
        self._is_syncing = False
        self._turn_is_due = self._tick_is_due = False
        self._wakes_at = 0.0
        self._saves = []
        self._wires = {}
        self._producing = []
        self._dirty = []
        self.inbox = []
        world.note(f"{self.name} starts")
        if world.observer is not None:
            world.observer.started(self)
        life = self._life
        world.at(world.rng.uniform(0, TICK_S), lambda: self._tick(life))
        world.at(world.rng.uniform(0, SESSION_TICK_S), lambda: self._tick_sessions(life))
        self.turn()

    def crash(self, keep: Callable[[str, int], bool] | None = None, names: int | None = 0) -> None:
        """The power goes, or with `keep` None the process is killed and the kernel lives. `names`:
        how many of the latest creations, renames and removals are on the disk."""
        self.world.note(f"{self.name} {'is killed' if keep is None else 'loses power'}")
        self.is_up = False
        for session in list(self._wires):
            self._cut(session, tells=keep is None)
        self._life += 1
        disk = self.disk
        self.disk = disk.fork() if keep is None else disk.power_loss(keep, names or 0)
        self.disk.free_bytes = disk.free_bytes

    def lose_power(self) -> None:
        """The power goes; of what was not synced any part is there afterwards."""
        rng = self.world.rng
        share = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        names = rng.randint(0, self.disk.unsynced_names)
        self.crash(lambda path, sector: rng.random() < share, names)

    def image(self) -> SimDisk:
        """What the disk holds if the power goes now: a copy of the data directory."""
        rng = self.world.rng
        share = rng.choice((0.0, 0.5, 1.0))
        names = rng.randint(0, self.disk.unsynced_names)
        image = self.disk.power_loss(lambda path, sector: rng.random() < share, names)
        assert isinstance(image, SimDisk)
        return image

    def set_back(self, image: SimDisk) -> None:
        """Stop the process if it runs, and put the disk back to that copy."""
        if self.is_up:
            self.crash()
        self.world.note(f"{self.name} is set back to an old copy")
        image.free_bytes = self.disk.free_bytes
        self.disk = image

    def do(self, work: Callable[[], None]) -> None:
        """Run a part of the process; what ends it ends here."""
        disk = self.disk
        try:
            work()
        except PowerLoss:
            self.lose_power()
            self.on_stop(self)
        except (OSError, WALError) as failure:
            if not disk.has_failed:
                raise
            self.world.note(f"{self.name} stops: {failure}")
            self.crash()
            self.on_stop(self)
        except DataDamaged as damage:
            if not self.is_rotten:
                raise
            self.world.note(f"{self.name} stops: {damage}")
            self.crash()
            self.on_stop(self)

    def rot(self, revision: int) -> bool:
        """Bits of what was written before `revision` change. False if there is nothing old
        enough."""
        rng = self.world.rng
        data, index = self.member.state.store.data, self.member.state.store.index
        at = revision - index.first_revision
        first_kept = index.revisions[at] >> 32 if 0 <= at < len(index.revisions) else data.active
        paths = [
            (f"{data.directory}/{segment_name(number)}", size)
            for number, size in sorted(data.sizes.items())
            if size > SEGMENT_HEADER.size and number < first_kept
        ]
        paths = [item for item in paths if self.disk.is_synced(item[0])]
        if not paths:
            return False
        for _ in range(rng.choice((1, 3, 30))):
            path, size = rng.choice(paths)
            offset = rng.randrange(SEGMENT_HEADER.size, size)
            if isinstance(data.disk, SealedDisk):
                offset += BLOCK_BYTES  # Behind its header.
            content, bit = self.disk.content(path), 1 << rng.randrange(8)
            if offset < len(content):  # The end of a sealed file may wait in memory.
                content[offset] ^= bit
                self.world.note(f"{self.name} has rot in {path} at {offset}")
        self.is_rotten = True
        return True

    def pause(self) -> None:
        """SIGSTOP."""
        self.world.note(f"{self.name} is paused")
        self.is_paused = True

    def resume(self) -> None:
        """SIGCONT: everything that waited comes at once."""
        if not self.is_up or not self.is_paused:
            return
        self.world.note(f"{self.name} goes on")
        self.is_paused = False
        inbox, self.inbox = self.inbox, []
        life = self._life

        def work() -> None:
            for event in inbox:
                if self._life == life:
                    event()
            if self._tick_is_due and self._life == life:
                self._tick_is_due = False
                self._tick_now()
            self.turn()

        self.do(work)

    def clock(self) -> float:
        self._looks += 1
        lead_s = self._looks * self.look_s
        if lead_s > self.world.clock_lead_s:
            self.world.clock_lead_s = lead_s
        now = self.world.now * self.clock_rate + self.clock_offset_s + lead_s
        if now > self._clock_last:
            self._clock_last = now
        return self._clock_last

    def wall_clock(self) -> float:
        return EPOCH_S + self.world.now * self.clock_rate

    # What the loop does.

    def _tick(self, life: int) -> None:
        if life != self._life:
            return
        self.world.at(TICK_S / self.clock_rate, lambda: self._tick(life))
        if self.is_paused:
            self._tick_is_due = True
        else:
            self._looks = 0
            self.do(self._tick_now)

    def _tick_now(self) -> None:
        self.member.tick()
        self.turn()
        if self.member.rollback.refusal:
            self.world.note(f"{self.name} stops: {self.member.rollback.refusal}")
            self.crash()
            self.is_refused = True
            self.on_stop(self)
            return
        removed = self.member.removal.since
        if removed is not None and self.clock() - removed > REMOVED_S:
            self.world.note(f"{self.name} was removed and stops")
            self.crash()
            self.is_gone = True
            self.on_stop(self)

    def _tick_sessions(self, life: int) -> None:
        if life != self._life:
            return
        self.world.at(SESSION_TICK_S, lambda: self._tick_sessions(life))
        if not self.is_paused:
            self.do(self._tick_sessions_now)

    def _tick_sessions_now(self) -> None:
        now = self.clock()
        for session in list(self._wires):
            session.tick(now)
        self.turn()

    def wake(self) -> None:
        """Something came: a turn of the loop is due."""
        world = self.world
        if world.wake_s[1] <= 0.0:
            self.do(self.turn)
        elif not self._turn_is_due and self.is_up:
            self._turn_is_due = True
            life = self._life
            world.at(world.delay(world.wake_s), lambda: self._due_turn(life))

    def turn(self) -> None:
        """One turn of the loop, and more as long as there is work."""
        if not self.is_up or self.is_paused:
            return
        self._looks = 0
        member = self.member
        now = member.clock()
        member.begin_turn(now)
        saves = member.take_saves()
        if saves and self._is_quick(saves):
            if self._dirty:
                self._flush()  # The other members save in the meantime.
            self.wal.save_all(saves)
            member.persisted(saves)
            if self._dirty:
                self._flush()
            saves, now = [], member.clock()
        member.proceed(now)
        saves += member.take_saves()
        if saves:
            self._saves += saves
            self._sync()
        task = member.take_task()
        if task is not None:
            life = self._life
            delay_s = self.world.delay(self.world.sync_s) * self.sync_factor
            self.world.at(delay_s, lambda: self._run_task(life, task))
        while (job := member.logins.take()) is not None:
            self._start_login(job)
        self._dial()
        producing = self._producing
        for session in producing[:]:
            if session.has_more:
                session.produce()
        if self._dirty:
            self._flush()
        member.maintain()
        released = member.maintenance.released
        if released is not None:
            member.maintenance.released = None
            self.wal.cover(*released, min(released[0], member.log_begin))
        if not self._turn_is_due and (
            member.has_work or any([session.has_more for session in producing])
        ):
            self._turn_is_due = True
            life = self._life
            self.world.at(0.0001, lambda: self._due_turn(life))
        wakes_at = member.leadership.wakes_at
        if wakes_at != self._wakes_at:
            self._wakes_at = wakes_at
            if wakes_at < float("inf"):
                life = self._life
                delay_s = max(0.0, wakes_at - self.clock()) / self.clock_rate + 1e-6
                self.world.at(delay_s, lambda: self._due_turn(life))

    def _is_quick(self, saves: list[Any]) -> bool:
        """Whether the loop saves by itself, as `Server` does: what is saved before is durable."""
        world = self.world
        return (
            not self._saves
            and not self._is_syncing
            and not self.member.is_applying
            and all(save.snapshot is None for save in saves)
            and world.quick_rng.random() < world.quick_saves
        )

    def _due_turn(self, life: int) -> None:
        if life == self._life:
            self._turn_is_due = False
            if not self.is_paused:
                self.do(self.turn)

    def _sync(self) -> None:
        if self._is_syncing or not self._saves:
            return
        self._is_syncing = True
        saves, self._saves = self._saves, []
        life = self._life
        delay_s = self.world.delay(self.world.sync_s) * self.sync_factor
        self.world.at(delay_s, lambda: self._synced(life, saves))

    def _synced(self, life: int, saves: list[Any]) -> None:
        if life != self._life:
            return
        if self.is_paused:
            self.inbox.append(lambda: self._synced(life, saves))
            return
        self.do(lambda: self._synced_now(saves))

    def _synced_now(self, saves: list[Any]) -> None:
        self.wal.save_all(saves)
        self._is_syncing = False
        self.member.persisted(saves)
        self._sync()
        self.wake()

    def _run_task(self, life: int, task: Callable[[], None]) -> None:
        if life != self._life:
            return
        if self.is_paused:
            self.inbox.append(lambda: self._run_task(life, task))
            return
        self.do(lambda: self._run_task_now(task))

    def _run_task_now(self, task: Callable[[], None]) -> None:
        task()
        self.member.finished()
        self.wake()

    def _start_login(self, job: Job) -> None:
        """The hash of a password is computed, in a thread of its own."""
        life = self._life
        self.world.at(self.world.delay(LOGIN_S), lambda: self._run_login(life, job))

    def _run_login(self, life: int, job: Job) -> None:
        if life != self._life:
            return
        if self.is_paused:
            self.inbox.append(lambda: self._run_login(life, job))
            return

        def work() -> None:
            job.run()
            self.member.logins.finished(job)

        self.do(work)
        self.wake()

    # Connections.

    def receive(self, wire: Wire, data: bytes) -> None:
        """Bytes came over a wire."""
        if self.is_paused:
            self.inbox.append(lambda: wire._arrive(data))
            return
        self._looks = 0
        self.do(lambda: self._receive_now(wire.session, data))

    def _receive_now(self, session: Any, data: bytes) -> None:
        if isinstance(session, PeerConnection) and session.channel is not None:
            data = self._unseal(session, session.channel, data)
        if data:
            session.receive(data)
        self.wake()

    def _unseal(self, session: PeerConnection, channel: Channel, data: bytes) -> bytes:
        """As `Connections` does it."""
        was_established = channel.is_established
        try:
            data = channel.receive(data)
        except ChannelError as failure:
            self.world.note(f"  {self.name} closes a connection: {failure}")
            if isinstance(session, Dial) and not session.is_open:
                session.link.unreachable(session, str(failure), False)
            self._cut(session)
            return b""
        if channel.is_established and not was_established and isinstance(session, Dial):
            session.connected()
        if channel.has_output:
            self.new_output(session)
        return data

    def ended(self, session: Any) -> None:
        """The other side of a connection closed it."""
        if self.is_paused:
            self.inbox.append(lambda: self.ended(session))
        elif session in self._wires:
            self._detach(session)
            self.do(session.closed)
            self.wake()

    def attach(self, session: Any, there: Wire, back: Wire) -> None:
        """A connection: `there` takes what the session sends, `back` brings what it receives."""
        self._wires[session] = (there, back)
        if type(session) not in (Dial, Accepted):
            self._producing.append(session)

    def holds(self, session: Any) -> bool:
        """The session is one of this life's, and its connection is not closed."""
        return session in self._wires

    def _detach(self, session: Any) -> tuple[Wire, Wire]:
        if type(session) not in (Dial, Accepted):
            self._producing.remove(session)
        return self._wires.pop(session)

    def new_output(self, session: Any) -> None:
        """For sessions: there is something to send."""
        self._dirty.append(session)

    def break_connections(self, choose: Callable[[str], bool]) -> int:
        """Cut those to whom `choose` says, by the name of the other end, on both sides at once: a
        reset. Returns how many."""
        count = 0
        for session, (there, _) in list(self._wires.items()):
            if session in self._wires and choose(there.target):
                count += 1
                other, other_session = there.node, there.session
                self._cut(session, tells=False)
                there.is_cut = True
                if other is not None and other.is_up:
                    other.ended(other_session)
        if count:
            self.wake()
        return count

    def _dial(self) -> None:
        now = self.clock()
        for link in list(self.member.peers.links.values()):
            for dial in link.dials(now, self.new_output):
                self._connect(dial, link.url)

    def _connect(self, dial: Dial, to: str) -> None:
        world = self.world
        name = node_name(to)
        life = self._life

        def arrive() -> None:
            if life != self._life:
                return
            target = world.nodes.get(name)
            if (self.name, name) in world.blocked or (name, self.name) in world.blocked:
                world.at(1.0, lambda: self._unreachable(life, dial, False))
            elif target is None or not target.is_up or target.url != to:
                self._unreachable(life, dial, True)
            else:
                self._accepted(dial, target)

        world.at(world.delay(world.latency_s) * 2, arrive)

    def _unreachable(self, life: int, dial: Dial, is_refused: bool) -> None:
        if life != self._life:
            return
        if self.is_paused:
            self.inbox.append(lambda: self._unreachable(life, dial, is_refused))
            return
        self.do(lambda: dial.link.unreachable(dial, "connection refused", is_refused))
        self.wake()

    def _accepted(self, dial: Dial, target: Node) -> None:
        world = self.world
        there, back = Wire(world, self.name, target.name), Wire(world, target.name, self.name)
        accepted = Accepted(target.member, target.new_output)
        if world.secret is not None:
            own, other = self.member.identity, target.member.identity
            dial.channel = InitiatorChannel(
                world.secret, PEER, own.cluster_id, own.member_id, dial.link.node
            )
            accepted.channel = ResponderChannel(
                world.secret, PEER, other.cluster_id, other.member_id
            )
        there.session, there.node = accepted, target
        back.session, back.node = dial, self
        self.attach(dial, there, back)
        target.attach(accepted, back, there)
        if self.is_paused:
            life = self._life
            self.inbox.append(lambda: self._connected(life, dial))
        else:
            self._connected(self._life, dial)

    def _connected(self, life: int, dial: Dial) -> None:
        if life == self._life and dial in self._wires and not dial.is_closing:
            if dial.channel is None:
                dial.connected()
            else:
                self.new_output(dial)
            self.wake()

    def _flush(self) -> None:
        dirty = self._dirty
        at = 0
        while at < len(dirty):
            session = dirty[at]
            at += 1
            wires = self._wires.get(session)
            if wires is None:
                continue
            session.outbox.is_queued = False
            out = session.outbox.parts
            channel = session.channel if isinstance(session, PeerConnection) else None
            if out or (channel is not None and channel.has_output):
                data = b"".join(out)
                if channel is not None:
                    data = channel.seal(data) if channel.is_established else channel.output()
                out.clear()
                there = wires[0]
                drain_s = there.node.drain_s(len(data)) if type(there.node) is not Node else 0.0
                if drain_s > 0.0:
                    # The other side reads slowly: it takes a while until this is off our hands.
                    size = len(data)
                    self.world.at(drain_s, lambda s=session, n=size: self._drained(s, n))
                else:
                    was_blocked = session.is_blocked
                    session.outbox.unsent_bytes = 0
                    if was_blocked:
                        session.unblocked()
                        self.world.at(0.0001, self.wake)
                there.send(data)
            if session.is_closing or session.is_aborted:
                self._cut(session)
        dirty.clear()

    def _drained(self, session: Any, size_bytes: int) -> None:
        if session not in self._wires:
            return
        was_blocked = session.is_blocked
        outbox = session.outbox
        outbox.unsent_bytes = max(0, outbox.unsent_bytes - size_bytes)
        if was_blocked and not session.is_blocked:
            session.unblocked()
            self.wake()

    def _cut(self, session: Any, tells: bool = True) -> None:
        """This side closes a connection."""
        there, back = self._detach(session)
        back.is_cut = True
        if tells:
            there.close()
        if self.is_up:
            session.closed()
