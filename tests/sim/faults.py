"""What goes wrong in a simulation, and how often: all of it drawn from the seed.

A `Nemesis` does one thing after the other at random times, and undoes it after a while: members
crash or lose power in the middle of a disk operation, are paused, get slow, failing, full or rotten
disks; connections break, bits flip on their way between members, networks split, in one direction
too; members join, leave, are promoted; leadership is moved; backups and defragmentations run. When
told to stop it mends everything.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any

from etcdlite import proto
from etcdlite.datadir import StartError
from etcdlite.errors import EtcdError
from etcdlite.versions import CURRENT, Version
from sim.checkers import Op, Oracle
from sim.client import Client, Load
from sim.world import Node, World, moves, node_name, url

MAX_MEMBERS = 7

SET_BACK_S = 2.0
"""A member tells the others within this time how far it has come."""
KEPT_S = 1.5
"""The others have written that to their disks within this time after its end."""

OLD_SEEDS = 1000
"""Seeds below this have no faults that were added later, unless these are asked for."""


class Nemesis:
    """Breaks things in `world`, and mends them."""

    def __init__(
        self, world: World, oracle: Oracle, clients: list[Client], options: dict[str, Any]
    ) -> None:
        rng = world.rng
        self.world = world
        self.oracle = oracle
        self.clients = clients
        self.is_active = False
        self.faults = 0
        self.counts: dict[str, int] = {}
        self._rng = rng
        self._options = options
        self.admin = Client(world, oracle, Load(rng), "admin")
        self.admin.is_busy = False
        self._next_name = len(world.nodes) + 1
        self._replaced_at = 0.0
        self._quiet_until = 0.0
        """Nothing else happens before this time."""
        self._is_setting_back = False
        self._left: set[int] = set()
        """Members that another one has replaced."""
        self.mean_pause_s = rng.choice((0.3, 1.0, 3.0))
        self.weights = {
            "kill": rng.choice((0, 3, 10)),
            "power": rng.choice((0, 3, 10)),
            "power_all": rng.choice((0, 0, 2)),
            "trip": rng.choice((0, 5, 15)),
            "disk_error": rng.choice((0, 0, 3)),
            "pause": rng.choice((0, 4)),
            "partition": rng.choice((0, 4, 8)),
            "isolate_leader": rng.choice((0, 4)),
            "one_way": rng.choice((0, 4)),
            "break_connections": rng.choice((0, 5, 15)),
            "slow_way": rng.choice((0, 3)),
            "slow_disk": rng.choice((0, 3)),
            "full_disk": rng.choice((0, 0, 1)),
            "move_leader": rng.choice((0, 5)),
            "add_member": rng.choice((0, 3, 6)),
            "remove_member": rng.choice((0, 2, 4)),
            "promote": rng.choice((4, 8)),
            "back_up": rng.choice((0, 2)),
            "defragment": rng.choice((0, 2, 6)),
            "hang_up": rng.choice((0, 4)),
            "away": rng.choice((0, 3)),
            "rot": rng.choice((0, 0, 2)),
        }
        self.weights = {name: weight for name, weight in self.weights.items() if weight}
        if not self.weights:
            self.weights["kill"] = 1
        if world.seed >= OLD_SEEDS:
            # Drawn beside the rest, so that the traces of the old seeds stay as they are.
            flips = random.Random(world.seed).choice((0, 3, 10))
            self.weights.update({"flip_bits": flips} if flips else {})
            set_back = random.Random(f"{world.seed} set back").choice((0, 0, 10))
            self.weights.update({"set_back": set_back} if set_back else {})
            if "isolate_leader" in self.weights:
                self.weights["isolate_with_learners"] = self.weights["isolate_leader"]
            for name in ("move", "rejoin", "rot_and_send"):
                weight = random.Random(f"{world.seed} {name}").choice((0, 2, 6))
                self.weights.update({name: weight} if weight else {})
        # Of the wires as a whole.
        if rng.random() < 0.3:
            world.message_faults = (
                rng.choice((0.0, 0.01, 0.1)),
                rng.choice((0.0, 0.02, 0.2)),
                rng.choice((0.0, 0.02, 0.2)),
            )
        self.voter_crashes = rng.choice((0.0, 0.0, 0.3))
        self._message_faults = world.message_faults
        for node in world.nodes.values():
            self._adopt(node)

    def start(self) -> None:
        self.admin.start()
        self.resume()

    def resume(self) -> None:
        """Begin to break things (again)."""
        self.is_active = True
        self.world.message_faults = self._message_faults
        self.world.voter_crashes = self.voter_crashes
        self._schedule()

    def _schedule(self) -> None:
        self.world.at(self._rng.expovariate(1.0 / self.mean_pause_s), self._act)

    def _act(self) -> None:
        if not self.is_active:
            return
        if self.world.now < self._quiet_until:
            self._schedule()
            return
        names = list(self.weights)
        (name,) = self._rng.choices(names, list(self.weights.values()))
        if getattr(self, f"_do_{name}")():
            self.faults += 1
            self.counts[name] = self.counts.get(name, 0) + 1
        self._reconcile()
        self._schedule()

    def _adopt(self, node: Node) -> None:
        node.on_stop = self._stopped

    def _later(self, low: float, high: float, undo: Callable[[], None]) -> None:
        self.world.at(self._rng.uniform(low, high), undo)

    def _note(self, text: str) -> bool:
        self.world.note(f"-- {text}")
        return True

    @property
    def _up(self) -> list[Node]:
        return [node for node in self.world.nodes.values() if node.is_up]

    def _pick(self) -> Node | None:
        up = self._up
        if not up:
            return None
        leader = self.world.leader
        if leader is not None and self._rng.random() < 0.35:
            return leader
        return self._rng.choice(up)

    # Processes.

    def _stopped(self, node: Node) -> None:
        """A process ended by itself."""
        if not node.is_gone:
            self._later(0.1, 3.0, lambda: self.restart(node))

    def restart(self, node: Node) -> None:
        """Start a process again, on what its disk holds."""
        if node.is_up or node.is_gone:
            return
        disk = node.disk
        disk.error_at = disk.trip_at = 0
        disk.has_failed = False
        if self.is_active and self._rng.random() < 0.2:
            # It may not survive its recovery, or the first moments after that.
            disk.trip_at = disk.steps + self._rng.randint(1, 60)
        try:
            node.do(node.start)
        except StartError as failure:
            if "was removed from the cluster" not in str(failure):
                raise
            self._note(f"{node.name} finds that it was removed")
            node.is_gone = True

    def _do_kill(self) -> bool:
        node = self._pick()
        if node is None:
            return False
        node.crash()
        self._stopped(node)
        return True

    def _do_power(self) -> bool:
        node = self._pick()
        if node is None:
            return False
        node.lose_power()
        self._stopped(node)
        return True

    def _do_power_all(self) -> bool:
        for node in self._up:
            node.lose_power()
            self._stopped(node)
        return True

    def _do_trip(self) -> bool:
        """The power will go in the middle of a disk operation."""
        node = self._pick()
        if node is None:
            return False
        node.disk.trip_at = node.disk.steps + self._rng.randint(1, self._rng.choice((3, 30, 300)))
        return True

    def _do_disk_error(self) -> bool:
        node = self._pick()
        if node is None:
            return False
        node.disk.error = self._rng.choice((errno.EIO, errno.ENOSPC))
        node.disk.error_at = node.disk.steps + self._rng.randint(1, 30)
        return self._note(f"{node.name} will have a disk error")

    def _do_away(self) -> bool:
        """A member is down for so long that it may need a snapshot."""
        node = self._pick()
        if node is None:
            return False
        node.crash()
        self._later(4.0, 12.0, lambda: self.restart(node))
        return True

    def _do_pause(self) -> bool:
        node = self._pick()
        if node is None or node.is_paused:
            return False
        node.pause()
        life = node._life
        self._later(0.05, 6.0, lambda: node.resume() if node._life == life else None)
        return True

    # Wires.

    def _do_flip_bits(self) -> bool:
        """What members say to each other is damaged on the way, now and then."""
        world = self.world
        if world.flips:
            return False
        world.flips = self._rng.choice((0.01, 0.1))
        self._note(f"bits flip in {world.flips:.0%} of what members send")

        def mend() -> None:
            world.flips = 0.0

        self._later(0.5, 5.0, mend)
        return True

    def _block(self, ways: set[tuple[str, str]], low: float, high: float) -> bool:
        world = self.world
        new = ways - world.blocked
        if not new:
            return False
        world.blocked |= new
        self._note("blocked: " + " ".join(f"{a}>{b}" for a, b in sorted(new)))

        def heal() -> None:
            world.blocked = world.blocked - new
            self._note("healed: " + " ".join(f"{a}>{b}" for a, b in sorted(new)))

        self._later(low, high, heal)
        return True

    def _do_partition(self) -> bool:
        names = [node.name for node in self.world.nodes.values() if not node.is_gone]
        side = {name: self._rng.random() < 0.5 for name in names}
        ways = {(a, b) for a in names for b in names if side[a] != side[b]}
        return self._block(ways, 0.2, 6.0)

    def _do_isolate_leader(self) -> bool:
        leader = self.world.leader
        if leader is None:
            return False
        names = [node.name for node in self.world.nodes.values() if node is not leader]
        ways = {(leader.name, name) for name in names} | {(name, leader.name) for name in names}
        return self._block(ways, 0.5, 5.0)

    def _do_isolate_with_learners(self) -> bool:
        """A leader reaches only those that do not vote: they must not stand in for a quorum."""
        leader = self.world.leader
        if leader is None or not leader.member.raft.learners:
            return False
        ids = {leader.member_id, *leader.member.raft.learners}
        side = {node.name: node.member_id in ids for node in self.world.nodes.values()}
        return self._block({(a, b) for a in side for b in side if side[a] != side[b]}, 0.5, 5.0)

    def _do_one_way(self) -> bool:
        names = [node.name for node in self.world.nodes.values() if not node.is_gone]
        if len(names) < 2:
            return False
        a, b = self._rng.sample(names, 2)
        ways = {(a, b)}
        if self._rng.random() < 0.3:
            ways = {(a, other) for other in names if other != a}
        return self._block(ways, 0.2, 6.0)

    def _do_break_connections(self) -> bool:
        node = self._pick()
        if node is None or node.is_paused:
            return False
        share = self._rng.choice((0.3, 1.0))
        rng = self._rng
        count = 0

        def work() -> None:
            nonlocal count
            count = node.break_connections(lambda other: rng.random() < share)

        node.do(work)
        return bool(count) and self._note(f"{count} connections of {node.name} broke")

    def _do_slow_way(self) -> bool:
        names = [node.name for node in self.world.nodes.values() if not node.is_gone]
        if len(names) < 2:
            return False
        a, b = self._rng.sample(names, 2)
        slow = self.world.slow
        slow[a, b] = self._rng.choice((0.01, 0.1, 0.5))
        self._later(0.5, 5.0, lambda: slow.pop((a, b), None) and None)
        return True

    def _do_hang_up(self) -> bool:
        self._rng.choice(self.clients).hang_up()
        return True

    # Disks.

    def _do_slow_disk(self) -> bool:
        node = self._pick()
        if node is None:
            return False
        node.sync_factor = self._rng.choice((10.0, 100.0, 1000.0))
        self._note(f"the disk of {node.name} is {node.sync_factor:.0f} times slower")

        def mend() -> None:
            node.sync_factor = 1.0

        self._later(0.5, 5.0, mend)
        return True

    def _do_full_disk(self) -> bool:
        node = self._pick()
        if node is None:
            return False
        node.disk.free_bytes = 1 << 20
        self._note(f"the disk of {node.name} is almost full")

        def mend() -> None:
            node.disk.free_bytes = 1 << 40

        self._later(1.0, 4.0, mend)
        return True

    def _do_rot(self) -> bool:
        """One member at a time, so that the others have what it loses."""
        node = self._pick()
        # What rots must be on all others.
        others = self._other_voters(node)
        return (
            node is not None
            and bool(others)
            and node.rot(min(n.member.state.store.revision for n in others))
        )

    def _do_rot_and_send(self) -> bool:
        """The leader's disk rots while another voter is away, which then needs a snapshot of it.
        The rest have what it loses."""
        leader, others = self.world.leader, self._other_voters(self.world.leader)
        if leader is None or not others or self._is_setting_back or self.admin.is_asking:
            return False
        away = self._rng.choice(others)
        last, life, away_life = away.member.raft.log.last, leader._life, away._life + 1
        away.crash()

        def look(attempts: int) -> None:
            may = self.is_active and leader.is_up and leader._life == life and leader.member.leads
            if not may or not attempts or away._life != away_life:
                self.restart(away)
            elif leader.member.raft.log.offset <= last:
                self._later(0.3, 0.6, lambda: look(attempts - 1))
            else:
                others = self._other_voters(leader, away)
                if others and not any(node.is_old_copy for node in others):
                    leader.rot(min(n.member.state.store.revision for n in others))
                self.restart(away)

        look(20)
        return True

    def _other_voters(self, node: Node | None, away: Node | None = None) -> list[Node]:
        """The voters beside `node`, which is one of three or more, and beside `away`; none if one
        of them is down, or a disk is lost already."""
        leader = self.world.leader
        if leader is None or node is None or not self.is_whole:
            return []
        voters = leader.member.state.membership.voters
        others = [n for n in self._up if n.member_id in voters and n not in (node, away)]
        missing = len(voters) - len({node, away} - {None}) - len(others)
        return others if node.member_id in voters and len(voters) >= 3 and not missing else []

    def _do_set_back(self) -> bool:
        """A member's disk goes back to a copy of some seconds ago. That takes a while, in which
        nothing else happens: the others must know how far the member had come, and only one member
        at a time may have lost what it promised."""
        node = self._pick()
        if node is None or self._is_setting_back:
            return False
        image, last, life = node.image(), node.member.raft.log.last, node._life
        self._is_setting_back = True

        def may() -> bool:
            return self.is_active and node._life == life and self._may_set_back(node)

        def begin(attempts: int) -> None:
            if may() and node.member.raft.log.applied > last:
                self._keep_quiet(SET_BACK_S + KEPT_S)
                self.world.at(SET_BACK_S, set_back)
            elif attempts and node._life == life:
                self._later(0.3, 0.6, lambda: begin(attempts - 1))
            else:
                self._is_setting_back = False

        def set_back() -> None:
            self._is_setting_back = False
            if may():
                node.set_back(image)
                node.is_old_copy = True
                self._later(KEPT_S, 4 * KEPT_S, lambda: self.restart(node))

        self._later(0.5, 4.0, lambda: begin(10))
        return self._note(f"the disk of {node.name} is copied")

    def _keep_quiet(self, seconds: float) -> None:
        """For so long no fault begins."""
        world = self.world
        self._quiet_until = world.now + seconds
        world.message_faults, world.voter_crashes = (0.0, 0.0, 0.0), 0.0

        def end() -> None:
            if self.is_active:
                world.message_faults = self._message_faults
                world.voter_crashes = self.voter_crashes

        world.at(seconds, end)

    def _may_set_back(self, node: Node) -> bool:
        """Whether all is well, the member is one of a majority, and it is in contact with all."""
        world, others = self.world, self._other_voters(node)
        return (
            bool(others)
            and all(node.member.peers.is_open(n.member_id) for n in others)
            and not (world.blocked or world.slow or world.flips)
            and not any(
                n.is_paused
                or n.sync_factor > 1.0
                or n.disk.error_at
                or n.disk.trip_at > n.disk.steps
                for n in [node, *others]
            )
        )

    # The cluster.

    def _admin_ask(self, name: str, request: Any, is_write: bool = False) -> None:
        if is_write:
            self.admin.ask(name, request, is_write=True)
        else:
            self.admin.ask(name, request, then=self._admin_told)
        self.admin.flush()

    def _admin_told(self, op: Op, answer: Any) -> None:
        if isinstance(answer, EtcdError):
            self._note(f"{op.name}: {answer}")
            if answer.name == "InvalidAuthToken":
                self._replaced_at = 0.0  # Soon again: the new token may not live longer than that.

    def _do_move_leader(self) -> bool:
        leader = self.world.leader
        if leader is None:
            return False
        voters = sorted(leader.member.raft.voters)
        self._connect_to(leader)
        request = proto.MoveLeaderRequest(targetID=self._rng.choice(voters))
        self._admin_ask("Maintenance.MoveLeader", request)
        return True

    # Other versions of the program: for simulations whose option "version" is an older one.

    def _restart_as(self, node: Node, version: Version) -> bool:
        self._note(f"{node.name} becomes version {version}")
        node.crash()
        node.version = version
        self._stopped(node)
        return True

    def _do_upgrade(self) -> bool:
        old = [node for node in self._up if node.version != CURRENT]
        return bool(old) and self._restart_as(self._rng.choice(old), CURRENT)

    def _do_go_back(self) -> bool:
        """An older program is started where the documentation allows it."""
        older = self._options["version"]
        others_are_older = any(
            node.version == older and not node.is_gone for node in self.world.nodes.values()
        )
        fit = []
        for node in self._up:
            state = node.member.state
            is_fit = state.storage_version == older and node.version != older
            if is_fit and (others_are_older or state.cluster_version.target == older):
                fit.append(node)
        return bool(fit) and self._restart_as(self._rng.choice(fit), older)

    def _do_downgrade(self) -> bool:
        leader = self.world.leader
        if leader is None:
            return False
        self._connect_to(leader)
        target = leader.member.state.cluster_version.target
        action = 1 if target is None else 2
        request = proto.DowngradeRequest(action=action, version=str(self._options["version"]))
        self._admin_ask("Maintenance.Downgrade", request)
        return True

    def _update_the_old(self) -> None:
        """A program that is too old for the cluster is replaced, as its log says."""
        up = [node.member.state.cluster_version.version for node in self._up]
        for node in self.world.nodes.values():
            if up and not node.is_gone and node.version < max(up):
                if node.is_up:
                    node.crash()
                node.version = CURRENT

    def _connect_to(self, node: Node) -> None:
        """Have the administrator's connection go to that member."""
        admin = self.admin
        if admin.node is not node:
            admin.preferred = node.name
            admin.hang_up()

    def _do_add_member(self) -> bool:
        leader = self.world.leader
        if leader is None or len(leader.member.state.membership.members) >= MAX_MEMBERS:
            return False
        if sum(not node.is_gone for node in self.world.nodes.values()) >= MAX_MEMBERS:
            return False
        name = f"m{self._next_name}"
        self._next_name += 1
        request = proto.MemberAddRequest(peerURLs=[url(name)], isLearner=self._rng.random() < 0.7)
        self._admin_ask("Cluster.MemberAdd", request)
        if self._rng.random() < 0.2:
            self._do_remove_member()  # Two at once.
        return True

    def _do_remove_member(self) -> bool:
        leader = self.world.leader
        if leader is None or len(leader.member.state.membership.members) <= 2 or not self.is_whole:
            return False
        member_id = self._rng.choice(sorted(leader.member.state.membership.members))
        self._admin_ask("Cluster.MemberRemove", proto.MemberRemoveRequest(ID=member_id))
        return True

    def _do_rejoin(self) -> bool:
        """A member is added at the address of one that was removed, which may run still."""
        leader = self.world.leader
        if leader is None or len(leader.member.state.membership.members) >= MAX_MEMBERS:
            return False
        members = leader.member.state.membership.members
        gone = [node for node in self.world.nodes.values() if node.member_id not in members]
        if not gone:
            return False
        urls, is_learner = [self._rng.choice(gone).url], self._rng.random() < 0.7
        self._admin_ask(
            "Cluster.MemberAdd", proto.MemberAddRequest(peerURLs=urls, isLearner=is_learner)
        )
        return True

    def _do_move(self) -> bool:
        """A member gets another address."""
        node = self._pick()
        if node is None or self.world.leader is None:
            return False
        urls = [url(node.name, moves(node.url) + 1)]
        self._admin_ask(
            "Cluster.MemberUpdate", proto.MemberUpdateRequest(ID=node.member_id, peerURLs=urls)
        )
        return True

    def _do_promote(self) -> bool:
        leader = self.world.leader
        if leader is None or not leader.member.state.membership.learners:
            return False
        member_id = leader.member.state.membership.learners[0]
        self._admin_ask("Cluster.MemberPromote", proto.MemberPromoteRequest(ID=member_id))
        return True

    def _reconcile(self) -> None:
        """Start the machines of members that were added, and those that moved at their new
        addresses, as an administrator would."""
        nodes = self.world.nodes
        # There may be no leader before the new one is there.
        first = max(
            self._up,
            key=lambda node: (node.member.state.store.applied_index, node.name),
            default=None,
        )
        if first is None:
            return
        members = list(first.member.state.membership.members.values())
        for member in members:
            name = node_name(member.peerURLs[0])
            known = nodes.get(name)
            if known is not None and known.member_id != member.ID and member.ID not in self._left:
                self._left.add(known.member_id)
                known.is_gone = True
                if known.is_up:
                    known.crash()
                del nodes[name]
            elif known is not None and moves(known.url) < moves(member.peerURLs[0]):
                self._note(f"{name} moves to {member.peerURLs[0]}")
                known.url = member.peerURLs[0]
                if known.is_up:
                    known.crash()
                    self._stopped(known)
            if name not in nodes:
                others = [m for m in members if m.ID != member.ID]
                self._note(f"{name} joins as {member.ID:x}")
                options = dict(self._options)
                if "version" in options:
                    needed = [other.member.state.storage_version for other in self._up]
                    options["version"] = max([options["version"], *needed])
                node = self.world.join(name, member, others, **options)
                self._adopt(node)

    def _do_back_up(self) -> bool:
        self._rng.choice(self.clients).back_up()
        return True

    def _do_defragment(self) -> bool:
        self._rng.choice(self.clients).defragment()
        return True

    # The end.

    def stop(self) -> None:
        """Mend everything: from now on the cluster must work."""
        self.is_active = False
        world = self.world
        self._note("all faults are mended")
        world.blocked = set()
        world.slow.clear()
        world.message_faults = (0.0, 0.0, 0.0)
        world.flips = world.voter_crashes = 0.0
        for node in list(world.nodes.values()):
            node.sync_factor = 1.0
            node.disk.free_bytes = 1 << 40
            node.disk.trip_at = node.disk.error_at = 0
            if node.is_paused:
                node.resume()
        self._update_the_old()
        for node in list(world.nodes.values()):
            self.restart(node)

    @property
    def is_whole(self) -> bool:
        """No member's disk is rotten or an old copy."""
        return all(node.is_gone for node in self.world.nodes.values() if _is_lost(node))

    def replace_lost(self) -> None:
        """Remove the member whose disk is rotten or an old copy. If it is the leader, leadership is
        moved to another member first, as the log advises."""
        leader = self.world.leader
        for node in list(self.world.nodes.values()):
            if not _is_lost(node) or node.is_gone or leader is None:
                continue
            if node.member_id not in leader.member.state.membership.members:
                node.is_gone = not node.is_up
            elif self.world.now - self._replaced_at > 2.0:
                self._replaced_at = self.world.now
                self._connect_to(leader)
                voters = leader.member.raft.voters
                others = [n for n in self._up if n.member_id in voters and not _is_lost(n)]
                if node is leader and others:
                    # It cannot bring those up to date that are needed to remove it.
                    furthest = max(others, key=lambda other: other.member.raft.log.last)
                    to_other = proto.MoveLeaderRequest(targetID=furthest.member_id)
                    self._admin_ask("Maintenance.MoveLeader", to_other)
                    continue
                request = proto.MemberRemoveRequest(ID=node.member_id)
                self._admin_ask("Cluster.MemberRemove", request)

    def mend_alarms(self) -> None:
        """Tell the cluster that there is space again."""
        leader = self.world.leader
        if leader is not None and self.oracle.alarms:
            self._connect_to(leader)
        for member_id, kind in sorted(self.oracle.alarms):
            request = proto.AlarmRequest(action=2, memberID=member_id, alarm=kind)
            self._admin_ask("Maintenance.Alarm", request, is_write=True)

    def keep_up(self) -> None:
        """While the cluster settles: what an administrator does by and by."""
        self._reconcile()
        self.mend_alarms()
        self.replace_lost()
        for node in list(self.world.nodes.values()):
            self.restart(node)


def _is_lost(node: Node) -> bool:
    """The member cannot go on with its disk."""
    return node.is_rotten or node.is_refused
