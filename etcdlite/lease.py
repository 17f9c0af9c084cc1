"""Leases: which exist and which keys hang on them (replicated), and when they end (leader only).

The replicated part changes only when the log is applied, so it is the same on every member:
`grant`, `revoke`, `attach`, `detach`, `checkpoint`, `restore`. The time part lives on the leader
between `promote` and `demote`: a deadline per lease, moved by `renew`. Deadlines are never
replicated; a new leader gives every lease its full TTL again (or what a checkpoint left of it), so
a lease may live longer than its TTL, never shorter. Nothing here removes a lease because of the
clock: `expired` only names those that are due, and the leader then replicates a revoke.

Invariants: `key_lease[key]` is the lease that holds `key`, and the key is among that lease's keys;
every key of every lease is in `key_lease`. While promoted, each lease has exactly one valid heap
entry, at the time in `scheduled`: not after its deadline, until it was named as due. Other entries
are leftovers of revoked leases and fall out when they come up.

It must never read a clock (time is an argument: seconds as a float, from any fixed origin, never
going back) and never let a deadline change the replicated part.

Record of a lease in the data file: the protobuf message that etcd calls leasepb.Lease

    1 ID            int64 varint, 1 to 2**63-1
    2 TTL           int64 varint, seconds
    3 RemainingTTL  int64 varint, seconds; absent or 0: no checkpoint

with absent fields zero, as in proto3. The keys are not in it: they name their lease themselves.
(etcd also takes negative ids; here they are refused, like 0.)
"""

from __future__ import annotations

import random
from collections.abc import Generator
from heapq import heappop, heappush, heapreplace
from math import ceil
from typing import Any

from etcdlite import errors
from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.proto import read_varint, varint
from etcdlite.storage.steps import finish, sort_steps

NO_LEASE = 0

MAX_TTL_S = 9_000_000_000
"""etcd's limit for a TTL."""

REVOKE_RATE_PER_S = 750
"""How fast a new leader lets leases run out that would all end at once (etcd aims at the same)."""

SPREAD_FROM_LEASES = 1_000
"""With fewer leases than this, a new leader need not spread their ends."""

RETRY_S = 3.0
"""After this long, a lease that is due but still not revoked is named again (as in etcd)."""

SCHEDULE_AHEAD_S = 60.0
"""Heap entries lie at most this far ahead, so that what a revoked lease leaves there goes soon."""


class _Lease:
    # 100,000 of these must be small: the single key that most leases hold is stored without a set.
    __slots__ = ("ttl_s", "remaining_ttl_s", "deadline", "scheduled", "keys")

    def __init__(self, ttl_s: int, remaining_ttl_s: int) -> None:
        self.ttl_s = ttl_s
        self.remaining_ttl_s = remaining_ttl_s
        self.deadline = 0.0
        self.scheduled = 0.0
        self.keys: bytes | dict[bytes, None] | None = None


class Lessor:
    """All leases of the state machine. `key_lease` may be read directly; only Lessor writes it."""

    def __init__(self, min_ttl_s: int = 1, limits: Limits = DEFAULT_LIMITS) -> None:
        """`min_ttl_s`: shorter TTLs are raised to it (etcd: 1.5 election timeouts, rounded up).

        It must be the same on all members, since it decides what a grant stores.
        """
        self.min_ttl_s = min_ttl_s
        self._limits = limits
        self.promoted = False
        self.key_lease: dict[bytes, int] = {}
        self._leases: dict[int, _Lease] = {}
        self._heap: list[tuple[float, int]] = []

    # The replicated part.

    def grant(self, lease_id: int, ttl_s: int, now: float) -> int:
        """Create a lease and return its TTL in seconds. `now` counts only while promoted.

        `lease_id` is 1 to 2**63-1 (see `generate_id`). Raises LeaseTTLTooLarge, LeaseExist, and
        LeaseNotFound for an id that cannot be.
        """
        if lease_id <= NO_LEASE:
            raise errors.error("LeaseNotFound")
        if ttl_s > MAX_TTL_S:
            raise errors.error("LeaseTTLTooLarge")
        if lease_id in self._leases:
            raise errors.error("LeaseExist")
        lease = self._leases[lease_id] = _Lease(max(ttl_s, self.min_ttl_s), 0)
        if self.promoted:
            lease.deadline = now + lease.ttl_s
            self._schedule(lease_id, lease, now)
        return lease.ttl_s

    def revoke(self, lease_id: int) -> list[bytes]:
        """Forget a lease and return its keys, sorted, for the store to delete.

        Raises LeaseNotFound.
        """
        keys = self.keys(lease_id)
        del self._leases[lease_id]
        for key in keys:
            del self.key_lease[key]
        return keys

    def attach(self, key: bytes, lease_id: int) -> None:
        """Hang `key` on a lease, off the one that had it before. Raises LeaseNotFound."""
        lease = self._lease(lease_id)
        previous = self.key_lease.get(key)
        if previous is not None:
            if previous == lease_id:
                return
            self.detach(key)
        self.key_lease[key] = lease_id
        keys = lease.keys
        if keys is None:
            lease.keys = key
        elif isinstance(keys, bytes):
            lease.keys = {keys: None, key: None}
        else:
            keys[key] = None

    def detach(self, key: bytes) -> None:
        """Take `key` off its lease, if it has one."""
        lease_id = self.key_lease.pop(key, None)
        if lease_id is None:
            return
        lease = self._leases[lease_id]
        if isinstance(lease.keys, dict):
            del lease.keys[key]
        else:
            lease.keys = None

    def checkpoint(self, lease_id: int, remaining_ttl_s: int) -> None:
        """Remember what is left of a lease for the next leader; 0 means its full TTL again.

        An unknown lease is passed over: it was revoked while the checkpoint was on its way.
        """
        lease = self._leases.get(lease_id)
        if lease is not None:
            lease.remaining_ttl_s = remaining_ttl_s

    def encode(self, lease_id: int) -> bytes:
        """The lease's record for the data file. Raises LeaseNotFound."""
        lease = self._lease(lease_id)
        parts = [b"\x08", varint(lease_id), b"\x10", varint(lease.ttl_s)]
        if lease.remaining_ttl_s:
            parts += (b"\x18", varint(lease.remaining_ttl_s))
        return b"".join(parts)

    def restore(self, lease_id: int, record: bytes | None) -> None:
        """Take in what the data file says of a lease; None: it was revoked. Once or more often
        makes no difference. A lease that is new here has no keys and no deadline yet.

        Raises ValueError if the record is not one that `encode` makes.
        """
        if record is None:
            if lease_id in self._leases:
                self.revoke(lease_id)
            return
        fields: dict[int, int] = {}
        at = 0
        while at < len(record):
            tag, at = read_varint(record, at, len(record))
            fields[tag], at = read_varint(record, at, len(record))
        if fields.get(0x08) != lease_id or not fields.keys() <= {0x08, 0x10, 0x18}:
            raise ValueError(f"not the record of lease {lease_id}: {record.hex()}")
        lease = self._leases.get(lease_id)
        if lease is None:
            assert not self.promoted, "a lease that appears without a grant has no deadline"
            lease = self._leases[lease_id] = _Lease(0, 0)
        lease.ttl_s = fields.get(0x10, 0)
        lease.remaining_ttl_s = fields.get(0x18, 0)

    # Questions that every member can answer.

    def __len__(self) -> int:
        return len(self._leases)

    def exists(self, lease_id: int) -> bool:
        return lease_id in self._leases

    def ttl_s(self, lease_id: int) -> int:
        """The granted TTL in seconds. Raises LeaseNotFound."""
        return self._lease(lease_id).ttl_s

    def keys(self, lease_id: int) -> list[bytes]:
        """The keys of a lease, sorted. Raises LeaseNotFound."""
        keys = self._lease(lease_id).keys
        if keys is None:
            return []
        return [keys] if isinstance(keys, bytes) else sorted(keys)

    def key_steps(self, lease_id: int) -> Generator[None, None, list[bytes]]:
        """As `keys`, in steps. The lease may not change meanwhile, or those are the keys it had."""
        keys = self._lease(lease_id).keys
        if keys is None:
            return []
        return (yield from self._sort_steps([keys] if isinstance(keys, bytes) else list(keys)))

    def leases(self) -> list[int]:
        """All ids: on the leader those that end first come first, elsewhere in order of id."""
        return finish(self.lease_steps())

    def lease_steps(self) -> Generator[None, None, list[int]]:
        """As `leases`, in steps: those there were when it began, and still are."""
        if not self.promoted:
            return (yield from self._sort_steps(list(self._leases)))
        ids = list(self._leases)
        order = []
        for count, lease_id in enumerate(ids, 1):
            lease = self._leases.get(lease_id)
            if lease is not None:
                order.append((lease.deadline, lease_id))
            if count % self._limits.sort_step_items == 0:
                yield
        order = yield from self._sort_steps(order)
        return [lease_id for _, lease_id in order]

    def generate_id(self, rng: random.Random) -> int:
        """An unused id for a grant that asks for 0; chosen before the grant is replicated."""
        while True:
            lease_id = rng.getrandbits(63)
            if lease_id != NO_LEASE and lease_id not in self._leases:
                return lease_id

    # The time part: the leader's.

    def promote(self, now: float, extend_s: float = 0.0) -> None:
        """Start to keep deadlines: every lease gets its TTL anew, plus `extend_s`.

        `extend_s` is for the time without a leader (etcd adds the election timeout). When there are
        many leases, those that would end together are drawn apart to `REVOKE_RATE_PER_S`.
        """
        self.promoted = True
        leases = self._leases
        order = sorted((lease.remaining_ttl_s or lease.ttl_s, i) for i, lease in leases.items())
        gap_s = 1.0 / REVOKE_RATE_PER_S if len(order) >= SPREAD_FROM_LEASES else 0.0
        start = now + extend_s
        horizon = now + SCHEDULE_AHEAD_S
        earliest = now
        heap = []
        for ttl_s, lease_id in order:
            lease = leases[lease_id]
            deadline = start + ttl_s
            if deadline < earliest:
                deadline = earliest
            earliest = deadline + gap_s
            lease.deadline = deadline
            lease.scheduled = scheduled = deadline if deadline < horizon else horizon
            heap.append((scheduled, lease_id))
        # Sorted by time, and so a heap already, but for ids among those at the horizon.
        heap.sort()
        self._heap = heap

    def demote(self) -> None:
        """Forget the deadlines: another member is the leader now, or none is."""
        self.promoted = False
        self._heap = []

    def renew(self, lease_id: int, now: float) -> int:
        """Start the lease's TTL again and return it, in seconds.

        Raises NotLeader, and LeaseNotFound also for a lease that is overdue: its revoke is on its
        way or about to be, so it is not to be relied on any more.
        """
        if not self.promoted:
            raise errors.error("NotLeader")
        lease = self._lease(lease_id)
        if lease.deadline <= now:
            raise errors.error("LeaseNotFound")
        lease.deadline = deadline = now + lease.ttl_s
        if deadline < lease.scheduled:
            # Possible after a promote that had drawn the ends apart.
            self._schedule(lease_id, lease, now)
        return lease.ttl_s

    def remaining_s(self, lease_id: int, now: float) -> float:
        """Seconds until the lease ends, negative if it is overdue.

        Raises NotLeader and LeaseNotFound.
        """
        if not self.promoted:
            raise errors.error("NotLeader")
        return self._lease(lease_id).deadline - now

    def checkpoints(self, now: float, longer_than_s: float) -> list[tuple[int, int]]:
        """(id, seconds left) of leases with a TTL above `longer_than_s`, for the next leader."""
        return [
            (lease_id, max(1, ceil(lease.deadline - now)))
            for lease_id, lease in sorted(self._leases.items())
            if lease.ttl_s > longer_than_s and lease.deadline - now < lease.ttl_s
        ]

    def is_checkpointed(self, lease_id: int) -> bool:
        """The next leader would give the lease less than its TTL."""
        lease = self._leases.get(lease_id)
        return lease is not None and lease.remaining_ttl_s > 0

    def expired(self, now: float, limit: int) -> list[int]:
        """At most `limit` ids of leases that are due: the caller replicates a revoke of each.

        An id is named again after `RETRY_S` for as long as the lease exists, since a proposal can
        be lost. Looks at no more than `expire_step_leases` entries; if more wait, `next_deadline`
        is not after `now`.
        """
        heap = self._heap
        leases = self._leases
        due: list[int] = []
        for _ in range(self._limits.expire_step_leases):
            if not heap or heap[0][0] > now or len(due) >= limit:
                break
            scheduled, lease_id = heap[0]
            lease = leases.get(lease_id)
            if lease is None or lease.scheduled != scheduled:
                heappop(heap)
                continue
            if lease.deadline <= now:
                due.append(lease_id)
                lease.scheduled = now + RETRY_S
            else:
                lease.scheduled = min(lease.deadline, now + SCHEDULE_AHEAD_S)
            heapreplace(heap, (lease.scheduled, lease_id))
        return due

    def next_deadline(self) -> float | None:
        """When `expired` should be called next; None: not before another method was."""
        return self._heap[0][0] if self._heap else None

    def _sort_steps(self, items: list[Any]) -> Generator[None, None, list[Any]]:
        return sort_steps(items, limits=self._limits)

    def _schedule(self, lease_id: int, lease: _Lease, now: float) -> None:
        lease.scheduled = min(lease.deadline, now + SCHEDULE_AHEAD_S)
        heappush(self._heap, (lease.scheduled, lease_id))

    def _lease(self, lease_id: int) -> _Lease:
        lease = self._leases.get(lease_id)
        if lease is None:
            raise errors.error("LeaseNotFound")
        return lease
