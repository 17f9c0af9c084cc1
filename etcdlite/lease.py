"""Leases: which exist and which keys are attached (replicated), and when they expire (leader only).

The replicated part changes only when the log is applied, so it is the same on every member:
`grant`, `revoke`, `attach`, `detach`, `checkpoint`, `restore`. The time part exists on the leader
between `promote` and `demote`: a deadline per lease, moved by `renew`. Deadlines are never
replicated. A new leader gives every lease its full TTL again (or what a checkpoint left of it), so
a lease may live longer than its TTL, but never shorter. The clock never removes a lease: `expired`
returns the leases that are due, and the leader then replicates a revoke of each.

Invariants: `key_lease[key]` is the lease of `key`, and the key is among that lease's keys; every
key of every lease is in `key_lease`. While promoted, each lease with a deadline has one valid heap
entry, at the time in `scheduled`, which is not after its deadline until `expired` has returned the
lease. Other entries, of revoked leases or an earlier promotion, are dropped by `expired`.

Nothing here reads a clock: time is an argument, in seconds as a float, from any fixed origin, never
going back. No deadline changes the replicated part.

Record of a lease in the data file: the protobuf message that etcd calls leasepb.Lease

    1 ID            int64 varint, not 0
    2 TTL           int64 varint, seconds
    3 RemainingTTL  int64 varint, seconds; absent or 0: no checkpoint

with absent fields zero, as in proto3. It does not hold the keys: each KeyValue names its lease.
"""

from __future__ import annotations

from collections.abc import Generator
from heapq import heappop, heappush, heapreplace
from math import ceil
from struct import Struct

from etcdlite import errors
from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.proto import read_varint, varint, varint64
from etcdlite.storage.steps import shrunk, sort_steps

KEY = Struct(">q")
"""The key of a lease in its bucket."""

MAX_TTL_S = 9_000_000_000
"""etcd's limit for a TTL."""

REVOKE_RATE_PER_S = 750
"""A new leader spreads leases that would expire together to this rate, as etcd does."""

SPREAD_FROM_LEASES = 1_000
"""With fewer leases than this, a new leader does not spread their deadlines."""

RETRY_S = 3.0
"""`expired` returns a lease again if it is still not revoked after this time, as in etcd."""

SCHEDULE_AHEAD_S = 60.0
"""Heap entries are at most this far ahead, so that those of revoked leases are dropped soon."""


class _Lease:
    # 100,000 of these must be small: the single key that most leases hold is stored without a dict.
    __slots__ = ("ttl_s", "remaining_ttl_s", "deadline", "scheduled", "promotion", "keys")

    def __init__(self, ttl_s: int) -> None:
        self.ttl_s = ttl_s
        self.remaining_ttl_s = 0
        self.deadline = 0.0
        self.scheduled = 0.0
        self.promotion = 0
        """The lessor's `_promotion` when the lease got its deadline."""
        self.keys: bytes | dict[bytes, None] | None = None


class Lessor:
    """All leases of the state machine. `key_lease` may be read directly; only Lessor writes it."""

    def __init__(self, min_ttl_s: int = 1, limits: Limits = DEFAULT_LIMITS) -> None:
        """`min_ttl_s`: shorter TTLs are raised to it (etcd: 1.5 election timeouts, rounded up). It
        must be the same on all members, since a grant stores the raised TTL."""
        self.min_ttl_s = min_ttl_s
        self._limits = limits
        self.promoted = False
        self.key_lease: dict[bytes, int] = {}
        self._leases: dict[int, _Lease] = {}
        self._heap: list[tuple[float, int]] = []
        self._start = 0.0
        self._promotion = 0
        """Counts the calls of `promote` and `demote`. A lease with a lower number has no valid
        deadline yet; its TTL began at `_start`."""

    # The replicated part.

    def grant(self, lease_id: int, ttl_s: int, now: float) -> int:
        """Create a lease and return its TTL in seconds. `now` matters only while promoted.

        Raises LeaseTTLTooLarge, LeaseExist, and LeaseNotFound for the id 0."""
        if lease_id == 0:
            raise errors.error("LeaseNotFound")
        if ttl_s > MAX_TTL_S:
            raise errors.error("LeaseTTLTooLarge")
        if lease_id in self._leases:
            raise errors.error("LeaseExist")
        lease = self._leases[lease_id] = _Lease(max(ttl_s, self.min_ttl_s))
        if self.promoted:
            self._place(lease_id, lease, now + lease.ttl_s, now)
        return lease.ttl_s

    def revoke(self, lease_id: int) -> list[bytes]:
        """Remove a lease and return its keys, sorted, for the store to delete.

        Raises LeaseNotFound."""
        keys = self.keys(lease_id)
        del self._leases[lease_id]
        for key in keys:
            del self.key_lease[key]
        return keys

    def attach(self, key: bytes, lease_id: int) -> None:
        """Attach `key` to a lease, and detach it from the previous one. Raises LeaseNotFound."""
        lease = self._lease(lease_id)
        if self.key_lease.get(key) == lease_id:
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
        lease_id = self.key_lease.pop(key, None)
        if lease_id is None:
            return
        lease = self._leases[lease_id]
        if isinstance(lease.keys, dict) and len(lease.keys) > 1:
            del lease.keys[key]
        else:
            lease.keys = None

    def shrink(self) -> None:
        """Give back the memory of many leases and keys that are gone."""
        self._leases, self.key_lease = shrunk(self._leases), shrunk(self.key_lease)

    def checkpoint(self, lease_id: int, remaining_ttl_s: int) -> None:
        """Record the remaining TTL of a lease for the next leader; 0 means its full TTL.

        Ignores an unknown lease: it was revoked after the checkpoint was proposed."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            lease.remaining_ttl_s = remaining_ttl_s
            # The previous leader may have told a client that it has this time. But `expired` has
            # returned a lease that is scheduled after its deadline: its revoke is on its way.
            if self.promoted and self._timed(lease_id).scheduled <= lease.deadline:
                lease.deadline = max(lease.deadline, self._start + (remaining_ttl_s or lease.ttl_s))

    def encode(self, lease_id: int) -> bytes:
        """The lease's record for the data file. Raises LeaseNotFound."""
        lease = self._lease(lease_id)
        parts = [b"\x08", varint64(lease_id), b"\x10", varint(lease.ttl_s)]
        if lease.remaining_ttl_s:
            parts += (b"\x18", varint(lease.remaining_ttl_s))
        return b"".join(parts)

    def restore(self, lease_id: int, record: bytes | None) -> None:
        """Take over the record of a lease in the data file; None: it was revoked. A second time
        makes no difference. A lease that is new here has no keys and no deadline.

        Raises ValueError if `encode` does not make such a record."""
        if record is None:
            if lease_id in self._leases:
                self.revoke(lease_id)
            return
        fields: dict[int, int] = {}
        at = 0
        while at < len(record):
            tag, at = read_varint(record, at, len(record))
            fields[tag], at = read_varint(record, at, len(record))
        if fields.get(0x08) != lease_id % (1 << 64) or not fields.keys() <= {0x08, 0x10, 0x18}:
            raise ValueError(f"not the record of lease {lease_id}: {record.hex()}")
        lease = self._leases.get(lease_id)
        if lease is None:
            assert not self.promoted, "a lease without a grant has no deadline"
            lease = self._leases[lease_id] = _Lease(0)
        lease.ttl_s = fields.get(0x10, 0)
        lease.remaining_ttl_s = fields.get(0x18, 0)

    # Reads that any member can answer.

    def __len__(self) -> int:
        return len(self._leases)

    def exists(self, lease_id: int) -> bool:
        return lease_id in self._leases

    def has_negative_ids(self) -> bool:
        return any(lease_id < 0 for lease_id in self._leases)

    def ttl_s(self, lease_id: int) -> int:
        """The granted TTL in seconds. Raises LeaseNotFound."""
        return self._lease(lease_id).ttl_s

    def keys(self, lease_id: int) -> list[bytes]:
        """The keys of a lease, sorted. Raises LeaseNotFound."""
        self._lease(lease_id)
        return sorted(self.attached(lease_id))

    def attached(self, lease_id: int) -> list[bytes]:
        """As `keys`, in any order; empty for a lease that does not exist."""
        lease = self._leases.get(lease_id)
        keys = None if lease is None else lease.keys
        if keys is None:
            return []
        return [keys] if isinstance(keys, bytes) else list(keys)

    def key_steps(self, lease_id: int) -> Generator[None, None, list[bytes]]:
        """As `keys`, in steps: the keys that the lease has at the first step."""
        self._lease(lease_id)
        return (yield from sort_steps(self.attached(lease_id), limits=self._limits))

    def lease_steps(self) -> Generator[None, None, list[int]]:
        """All ids, in steps: on the leader by deadline, elsewhere by id."""
        key = self._deadline if self.promoted else None
        order = yield from sort_steps(list(self._leases), key, limits=self._limits)
        ids: list[int] = []
        for at in range(0, len(order), self._limits.sort_step_items):
            if at:
                yield
            some = order[at : at + self._limits.sort_step_items]
            ids += [lease_id for lease_id in some if lease_id in self._leases]
        return ids

    def _deadline(self, lease_id: int) -> tuple[float, int]:
        # It may change while the leases are sorted. Then the order is only roughly right.
        lease = self._leases.get(lease_id)
        return (0.0 if lease is None else lease.deadline, lease_id)

    # The time part: the leader's.

    def promote(self, now: float, extend_s: float = 0.0) -> Generator[None, None, None]:
        """Start to keep deadlines: the TTL (or what a checkpoint left) plus `extend_s`, the time
        without a leader (etcd: the election timeout). The steps returned here set them; until then
        a lease does not expire. With many leases, deadlines are spread to `REVOKE_RATE_PER_S`."""
        self.promoted = True
        self._promotion += 1
        self._start = now + extend_s
        return self._place_steps(now)

    def _place_steps(self, now: float) -> Generator[None, None, None]:
        promotion = self._promotion
        order = yield from sort_steps(list(self._leases), self._left_s, limits=self._limits)
        gap_s = 1.0 / REVOKE_RATE_PER_S if len(order) >= SPREAD_FROM_LEASES else 0.0
        earliest = now
        for count, lease_id in enumerate(order, 1):
            lease = self._leases.get(lease_id)
            if lease is not None and lease.promotion < promotion == self._promotion:
                deadline = max(self._start + self._left_s(lease_id), earliest)
                earliest = deadline + gap_s
                self._place(lease_id, lease, deadline, self._start)
            if count % self._limits.merge_step_items == 0:
                yield

    def _left_s(self, lease_id: int) -> int:
        # Only a checkpoint changes it, and also sets the deadline. So the order stays right.
        lease = self._leases.get(lease_id)
        return 0 if lease is None else lease.remaining_ttl_s or lease.ttl_s

    def _place(self, lease_id: int, lease: _Lease, deadline: float, now: float) -> None:
        lease.promotion = self._promotion
        lease.deadline = deadline
        lease.scheduled = min(deadline, now + SCHEDULE_AHEAD_S)
        heappush(self._heap, (lease.scheduled, lease_id))

    def demote(self) -> None:
        """Forget the deadlines: another member is the leader now, or none is."""
        self.promoted = False
        self._promotion += 1
        self.trim()

    def trim(self) -> None:
        """Drop a part of the heap. Only while not promoted: its entries are not valid any more."""
        del self._heap[-4 * self._limits.expire_step_leases :]

    def renew(self, lease_id: int, now: float) -> int:
        """Restart the lease's TTL and return it, in seconds.

        Raises NotLeader, and LeaseNotFound also for a lease that is overdue: its revoke is proposed
        already or soon will be."""
        lease = self._timed(lease_id)
        if lease.deadline <= now:
            raise errors.error("LeaseNotFound")
        lease.deadline = deadline = now + lease.ttl_s
        if deadline < lease.scheduled:
            # Possible after a promote that has spread the deadlines.
            self._place(lease_id, lease, deadline, now)
        return lease.ttl_s

    def postpone(self, since: float, by_s: float) -> None:
        """Nobody could renew a lease for `by_s` from `since` on. One that was overdue then, or that
        `expired` has returned, stays overdue: see `checkpoint`."""
        self._start += by_s
        for lease in self._leases.values():
            if lease.deadline > since and lease.scheduled <= lease.deadline:
                lease.deadline += by_s

    def remaining_s(self, lease_id: int, now: float) -> float:
        """Seconds until the lease expires, negative if it is overdue.

        Raises NotLeader and LeaseNotFound."""
        return self._timed(lease_id).deadline - now

    def checkpoints(
        self, ids: list[int], now: float, longer_than_s: float
    ) -> list[tuple[int, int]]:
        """(id, seconds left) of those leases with a TTL above `longer_than_s`, for checkpoints."""
        known = ((i, self._leases[i]) for i in ids if i in self._leases)
        timed = ((i, lease) for i, lease in known if lease.promotion == self._promotion)
        return [
            (lease_id, max(1, ceil(lease.deadline - now)))
            for lease_id, lease in timed
            if lease.ttl_s > longer_than_s and lease.deadline - now < lease.ttl_s
        ]

    def is_checkpointed(self, lease_id: int) -> bool:
        """A checkpoint has recorded a remaining TTL of the lease."""
        lease = self._leases.get(lease_id)
        return lease is not None and lease.remaining_ttl_s > 0

    def has_due(self, now: float) -> bool:
        """`expired` has something to do: it may return a lease, or only drop left-over entries."""
        return bool(self._heap) and self._heap[0][0] <= now

    def expired(self, now: float, limit: int) -> list[int]:
        """Ids of leases that are due, until `limit` is reached: a lease counts as much as it has
        keys, at least 1. The caller proposes a revoke of each.

        Since a proposal can be lost, an id is returned again after `RETRY_S`, as long as the lease
        exists. A call examines up to `expire_step_leases` heap entries."""
        heap, leases = self._heap, self._leases
        due: list[int] = []
        for _ in range(self._limits.expire_step_leases):
            if not heap or heap[0][0] > now or limit <= 0:
                break
            scheduled, lease_id = heap[0]
            lease = leases.get(lease_id)
            if lease is None or (lease.scheduled, lease.promotion) != (scheduled, self._promotion):
                heappop(heap)
                continue
            if lease.deadline <= now:
                due.append(lease_id)
                limit -= len(lease.keys) if isinstance(lease.keys, dict) else 1
                lease.scheduled = now + RETRY_S
            else:
                lease.scheduled = min(lease.deadline, now + SCHEDULE_AHEAD_S)
            heapreplace(heap, (lease.scheduled, lease_id))
        return due

    def _timed(self, lease_id: int) -> _Lease:
        """As `_lease`, with a deadline. Raises NotLeader."""
        if not self.promoted:
            raise errors.error("NotLeader")
        lease = self._lease(lease_id)
        if lease.promotion != self._promotion:
            self._place(lease_id, lease, self._start + self._left_s(lease_id), self._start)
        return lease

    def _lease(self, lease_id: int) -> _Lease:
        lease = self._leases.get(lease_id)
        if lease is None:
            raise errors.error("LeaseNotFound")
        return lease
