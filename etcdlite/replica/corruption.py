"""Members that differ: the leader compares the hashes of all members at equal revisions.

What is applied is the same on every member, so two members that differ mean a fault of the program,
of the memory or of a disk. The member that differs from a majority is named in a CORRUPT alarm,
which stops writes until an operator decides (as in etcd). Without a majority of all members, which
of them is wrong cannot be told, and the alarm is that of member 0, the whole cluster. A member that
cannot read its own data is named in the log alone: its checksums keep the damage from others.

A check takes the leader's revision, hashes its state there, and asks every other member for its
hash at that revision. Answers that cannot be compared say nothing: the member is behind, or has
compacted differently. One check at a time; it is background work. A member that is alone has
nothing to compare with, and hashes nothing.

A member whose process returns is compared once it has caught up: it may have been away for long,
and its disk may hold something other than before. If it differs, the others are asked, too.

The rules are those of etcd 3.6 (server/etcdserver/corrupt.go).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Protocol

from etcdlite import log, proto
from etcdlite.errors import EtcdError
from etcdlite.methods import HASH_KV
from etcdlite.raft import LEADER, Raft
from etcdlite.replica.alarms import CORRUPT
from etcdlite.replica.state import State
from etcdlite.request import Asked, Done, Waiter

ANSWER_TIMEOUT_S = 300.0
"""A large state takes long to hash."""

RETURNED_S = 2.0
"""A member that returned has this time to apply what the leader has applied."""

RETURNED_PAUSE_S = 60.0
"""The pause between two checks of members that returned: each hashes the whole state."""

_UNKNOWN = "unknown"
"""In the place of a hash that cannot be compared."""

INITIAL_S = 5.0
"""How long a member that starts waits for the others' hashes."""


class Others(Protocol):
    """The other members, as a check needs them."""

    @property
    def nodes(self) -> Collection[int]: ...

    def is_open(self, node: int) -> bool: ...

    def ask(
        self, node: int, method: int, body: bytes, done: Done, timeout_s: float = ...
    ) -> None: ...


class HashCheck:
    """Compares the members every `interval_s` (0: never) and, if `after_compaction_s` is not 0,
    within that time after each compaction."""

    def __init__(
        self, state: State, raft: Raft, others: Others, read_now: Callable[[Waiter], None]
    ) -> None:
        """`read_now` answers a read from the state of this member."""
        self._state = state
        self._raft = raft
        self._others = others
        self._read_now = read_now
        self.interval_s = 0.0
        self.after_compaction_s = 0.0
        self._next_at = math.inf
        self._compacted = state.store.compacted
        self._is_running = False
        self._returned: dict[int, int] = {}
        """Members that returned, and the index that was committed then."""
        self._due: tuple[float, int, list[int]] | None = None
        """The next check of members that returned: its time, the revision and the members."""
        self._checked_at = -math.inf
        """When members that returned were last compared."""
        self.comparisons = 0
        """How many hashes of other members were compared with this member's."""
        self.initial = InitialCheck(state, others, self._hash)

    def returned(self, node: int) -> None:
        """That member runs in a new process: compare it once it has caught up."""
        removed = self._state.membership.removed
        self._returned = {one: at for one, at in self._returned.items() if one not in removed}
        self._returned[node] = self._raft.log.committed

    def _check_returned(self, now: float) -> None:
        if self._due is None and now >= self._checked_at + RETURNED_PAUSE_S:
            progress = self._raft.progress
            ready = [
                node
                for node, index in self._returned.items()
                if node in progress and progress[node].match >= index
            ]
            if ready:
                self._due = (now + RETURNED_S, self._state.store.revision, ready)
        elif self._due is not None and now >= self._due[0] and not self._is_running:
            _, revision, nodes = self._due
            self._due = None
            self._checked_at = now
            for node in nodes:
                self._returned.pop(node, None)
            self._begin(revision, nodes)

    def tick(self, now: float) -> None:
        """Begin a check if one is due."""
        if not self.initial.is_over:
            self.initial.tick(now)
        state = self._state
        before, self._compacted = self._compacted, state.store.compacted
        if self._raft.role != LEADER:
            self._next_at, self._due = math.inf, None
            return
        if self.interval_s and self._next_at == math.inf:
            self._next_at = now + self.interval_s
        if self.after_compaction_s and self._compacted > before:
            self._next_at = min(self._next_at, now + self.after_compaction_s)
        if state.alarms.is_corrupt:
            return
        if now >= self._next_at and not self._is_running:
            self._next_at = now + (self.interval_s or math.inf)
            if nodes := [node for node in self._others.nodes if node not in self._raft.learners]:
                self._begin(state.store.revision, nodes)
        if self._returned:
            self._check_returned(now)

    def _hash(self, revision: int, done: Done) -> None:
        request = proto.HashKVRequest(revision=revision, of_members=True)
        self._read_now(Waiter(Asked(done), 0, HASH_KV, request))

    def _begin(self, revision: int, nodes: list[int]) -> None:
        """Compare these members with this one."""
        self._is_running = True
        self._hash(revision, partial(self._hashed, nodes))

    def _hashed(self, nodes: list[int], answer: bytes | EtcdError) -> None:
        self._is_running = False
        if isinstance(answer, EtcdError):
            return
        own = proto.HashKVResponse.decode(answer)
        self._ask(own, {self._state.identity.member_id: own.hash}, nodes)

    def _ask(self, own: Any, hashes: dict[int, Any], nodes: Collection[int]) -> None:
        """`hashes`: by member; None: it has not answered yet; `_UNKNOWN`: that says nothing."""
        body = proto.HashKVRequest(revision=own.hash_revision).encode()
        nodes = [node for node in nodes if node in self._others.nodes]
        hashes.update(dict.fromkeys(nodes))
        for node in nodes:
            done = partial(self._compare, own, hashes, node)
            self._others.ask(node, HASH_KV, body, done, ANSWER_TIMEOUT_S)

    def _compare(self, own: Any, hashes: dict[int, Any], node: int, answer: Any) -> None:
        """Compare when all have answered."""
        hashes[node] = _UNKNOWN
        if not isinstance(answer, EtcdError):
            self.comparisons += 1
            other = proto.HashKVResponse.decode(answer)
            if other.compact_revision == own.compact_revision:
                hashes[node] = other.hash
        elif answer.name == "Corrupt":  # Its damage does not spread: the others may write.
            what = "a member cannot read its own data; see 'A disk returns wrong data' in the "
            log.error(what + "documentation", remote_peer_id=f"{node:x}")
        if None in hashes.values():
            return
        members = [self._state.identity.member_id, *self._others.nodes]
        hashes = {one: found for one, found in hashes.items() if one in members}
        votes = Counter(found for found in hashes.values() if found != _UNKNOWN)
        if len(votes) < 2:
            return
        ((right, count),) = votes.most_common(1)
        differing = [one for one, found in hashes.items() if found not in (right, _UNKNOWN)]
        if 2 * count <= len(members):
            if rest := [one for one in members if one not in hashes]:  # It may be a majority.
                self._ask(own, hashes, rest)
                return
            differing = [0]
        shown = ", ".join(f"{found} at {one:x}" for one, found in hashes.items())
        what = "found data inconsistency with peers; see 'Members that differ' in the documentation"
        log.error(what, why=f"the hashes of revision {own.hash_revision} are {shown}")
        if self._raft.role == LEADER:
            for node in differing:
                self._state.alarms.raise_alarm(node, CORRUPT)


class InitialCheck:
    """Compares a member that starts with all others that can be reached within `INITIAL_S`."""

    def __init__(self, state: State, others: Others, hash_at: Callable[[int, Done], None]) -> None:
        """`hash_at` hashes the state of this member at a revision."""
        self._state = state
        self._others = others
        self._hash_at = hash_at
        self.is_over = True
        """It is done, or was not asked for: this member may serve clients."""
        self.difference = ""
        """The difference that it found, which forbids this member to serve; "" if none."""
        self._until = 0.0
        self._own: Any = None
        self._asked: set[int] = set()
        self._answered: set[int] = set()

    def begin(self, now: float) -> None:
        if self._others.nodes:
            self.is_over = False
            self._until = now + INITIAL_S
            self._hash_at(self._state.store.revision, self._hashed)

    def _hashed(self, answer: bytes | EtcdError) -> None:
        if not isinstance(answer, EtcdError):
            self._own = proto.HashKVResponse.decode(answer)
        elif answer.name == "Corrupt":
            self.difference = f"its own data cannot be read: {answer.text}"
        elif not self.is_over:  # That revision is compacted by what was applied since.
            self._hash_at(self._state.store.revision, self._hashed)

    def tick(self, now: float) -> None:
        nodes = self._others.nodes
        if self._own is not None:
            body = proto.HashKVRequest(revision=self._own.hash_revision).encode()
            for node in list(nodes):
                if node not in self._asked and self._others.is_open(node):
                    self._asked.add(node)
                    self._others.ask(node, HASH_KV, body, partial(self._compare, node))
        if self.difference or now >= self._until or self._answered.issuperset(nodes):
            self.is_over = True
            log.info("compared the data with the other members", members=len(self._answered))

    def _compare(self, node: int, answer: bytes | EtcdError) -> None:
        self._answered.add(node)
        if isinstance(answer, EtcdError):
            return  # It is behind, or has compacted differently: nothing can be said.
        other, own = proto.HashKVResponse.decode(answer), self._own
        # After different compactions, nothing can be said.
        if other.compact_revision == own.compact_revision and other.hash != own.hash:
            self.difference = (
                f"at revision {own.hash_revision} its hash is {own.hash}, that of member {node:x} "
                f"{other.hash} ('etcdlite-ctl endpoint hashkv --cluster' shows if the others agree)"
            )
