"""The alarms of the cluster, and the check of this member's free space, which raises NOSPACE.

An alarm belongs to a member: NOSPACE says that it is out of space, CORRUPT that its data differs
from the other members'. Alarms go through the log, so that all members have them and obey them,
until an operator disarms them.

Two limits end the space: the quota, and the file system (or two, if the log has one of its own), of
which a reserve stays free: deletes, compaction, cleaning, the next segments of log and data and the
next checkpoint need some space themselves.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator

from etcdlite import log, proto
from etcdlite.errors import EtcdError, error
from etcdlite.methods import ALARM_METHOD
from etcdlite.mvcc import Store
from etcdlite.options import Options
from etcdlite.permissions import remedy
from etcdlite.request import Waiter, empty_read
from etcdlite.storage.disk import FILE_SIZE_REMEDY
from etcdlite.storage.layout import ALARM

NOSPACE = 1
CORRUPT = 2

DISK_RESERVE_BYTES = 64 << 20
DISK_RESERVE_SHARE = 0.1
"""With less than the first free, a member takes no more writes that need space; on a small file
system with less than this share of it and the next segments."""

MEASURE_DISK_S = 1.0
MEASURE_BYTES = 1 << 20
"""The file system is measured after this time, or after writes of this size: a checkpoint grows
with the keys."""

MAX_ALARMS = 128
"""Clients may raise alarms until there are this many, of whatever members: each costs a little time
with every alarm and every request for the status."""

RAISE_AGAIN_S = 10.0
"""An alarm that is not active after this time got lost, for example with a leader."""


class Alarms:
    """The active alarms, (member id, kind) each, and the space of this member."""

    def __init__(
        self,
        store: Store,
        member_id: int,
        propose: Callable[[int, proto.Message], None],
        clock: Callable[[], float],
        options: Options,
    ) -> None:
        """`propose` brings a method and its request into the log."""
        self._member_id = member_id
        self._propose = propose
        self._clock = clock
        self.quota_bytes = options.quota_bytes
        self._segment_bytes = options.segment_bytes
        self._wal_dir = options.wal_dir
        self._wal_segment_bytes = options.wal_segment_bytes
        self._awaits_snapshot = False
        """A snapshot lies beside the data that it will replace. Until then no alarm is raised."""
        self.state_is_past = False
        """This member has not caught up: the cluster's present state may keep the quota even if
        this one, which is older, exceeds it."""
        self._checks_quota = False
        self.has_access = True
        """Whether the directories could be looked at. If not, no file in them can be opened."""
        self.proposed_bytes = 0
        """Writes of this member that are proposed and not applied yet."""
        self.space_left = 0
        """Bytes that writes may still take."""
        self.disk_left_bytes = 0
        """Free space of the file system beyond the reserve; negative if that is used."""
        self._fullest = ""
        """The directory for which that is the space left."""
        self._disk_measured_at = -math.inf
        self.restore(store)

    def restore(self, store: Store) -> None:
        """Take the alarms of a store, and measure its space."""
        self._store = store
        self._raised_at = -math.inf
        """When this member last proposed an alarm of its own, which may get lost on its way."""
        self._active = {
            (int.from_bytes(key[:8], "big"), key[8]) for key in store.buckets.get(ALARM, ())
        }
        self._note_kinds()
        self._measure_disk()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._active)

    def __contains__(self, alarm: tuple[int, int]) -> bool:
        return alarm in self._active

    @property
    def is_corrupt(self) -> bool:
        """Members differ. Writes are refused. Reads are served, as in etcd: they show the operator
        which member is right."""
        return CORRUPT in self.kinds

    def _note_kinds(self) -> None:
        self.kinds = frozenset(kind for _, kind in self._active)
        """The kinds of the active alarms."""
        self._has_nospace = (self._member_id, NOSPACE) in self._active

    def check_space(self, size_bytes: int) -> None:
        """Raise NoSpace if this member has none for a write of this size. Asked before a write is
        proposed, so that the log does not grow by writes that will be refused."""
        if (
            (size_bytes > self.space_left and not self.state_is_past)
            or 2 * (size_bytes + self.proposed_bytes) > self.disk_left_bytes  # In log and data.
        ):
            self.raise_nospace()
            raise error("NoSpace")

    def raise_nospace(self, failure: OSError | None = None) -> None:
        """Tell the cluster that this member is out of space; `failure` showed it."""
        now = self._clock()
        if self._awaits_snapshot or self._has_nospace or now < self._raised_at + RAISE_AGAIN_S:
            return
        self._raised_at = now
        quota_left = self.quota_bytes - self._store.size_in_use_bytes
        if failure is not None:
            why, to_do = str(failure), "free space on that file system"
            if failure.errno == errno.EFBIG:
                to_do = FILE_SIZE_REMEDY
        elif self.quota_bytes and quota_left <= self.disk_left_bytes:
            why, to_do = "the quota is used up", "compact, delete keys or raise the quota"
        else:
            why, to_do = f"the file system of {self._fullest} is almost full", "free space on it"
        log.warn(
            f"{why}; puts are refused",
            next=f"{to_do}, then etcdlite-ctl alarm disarm",
            data_dir=self._store.directory,
        )
        self.raise_alarm(self._member_id, NOSPACE)

    def raise_alarm(self, node: int, kind: int) -> None:
        """Tell the cluster of a member's alarm, NOSPACE or CORRUPT, unless it is raised."""
        if (node, kind) not in self._active:
            self._propose(ALARM_METHOD, proto.AlarmRequest(action=1, memberID=node, alarm=kind))

    def apply(self, request: proto.AlarmRequest) -> bytes:
        """Apply an AlarmRequest. Returns the response without its header."""
        alarm = (request.memberID, request.alarm)
        changed = []
        if request.action == 0:
            changed = [item for item in sorted(self._active) if request.alarm in (0, item[1])]
        elif request.alarm in (NOSPACE, CORRUPT) and request.action == 1:
            if alarm not in self._active:
                _log(log.warn, "alarm raised", alarm)
            self._active.add(alarm)
            self._note_kinds()
            self._store.set_bucket(ALARM, _key(alarm), b"")
            changed = [alarm]
        elif request.alarm and request.action == 2 and alarm in self._active:
            _log(log.info, "alarm disarmed", alarm)
            self._active.remove(alarm)
            self._note_kinds()
            self._disk_measured_at = -math.inf
            self.measure(self._clock())
            self._store.set_bucket(ALARM, _key(alarm), None)
            self._raised_at = -math.inf
            changed = [alarm]
        members = [proto.AlarmMember(memberID=i, alarm=kind) for i, kind in changed]
        encoded: bytes = proto.AlarmResponse(alarms=members).encode()
        return encoded

    def tick(
        self, now: float, awaits_snapshot: bool, read: Callable[[Waiter], None] | None
    ) -> None:
        """Measure the space unless a snapshot takes some until it replaces the data. `read`:
        `Reads.read_own`; None if there is no leader."""
        self._awaits_snapshot = awaits_snapshot
        if awaits_snapshot:
            return
        self.measure(now)
        if read is not None and self._exceeds_quota and not self._checks_quota:
            self._checks_quota = True  # Writes that other members took may have exceeded it.
            read(empty_read(self._check_quota))

    @property
    def _exceeds_quota(self) -> bool:
        """No compaction is about to free space, and the alarm is not raised yet."""
        return self.space_left <= 0 and not self._has_nospace and self._store.compaction is None

    def _check_quota(self, answer: object) -> None:
        """Raise the alarm if the present state exceeds the quota, not only one of the past."""
        self._checks_quota = False
        if not isinstance(answer, EtcdError) and self._exceeds_quota:
            self.raise_nospace()

    def measure(self, now: float) -> None:
        """Bring `space_left` up to date; the file system is asked at most once in `MEASURE_DISK_S`.
        The alarm is raised early, before the file system is full. Raises OSError if a directory was
        removed: what is written to open files would be lost with them."""
        if now - self._disk_measured_at >= MEASURE_DISK_S:
            self._disk_measured_at = now
            self._measure_disk()
        self._measure_left()
        if self.disk_left_bytes <= 0:
            self.raise_nospace()

    def _measure_disk(self) -> None:
        """Without access to the directories, what was measured before stays."""
        self._unmeasured_bytes = 0
        # The parent folder: a snapshot may be about to replace the store's own.
        parent = os.path.dirname(self._store.directory) or "."
        wal_dir, wal_bytes = self._wal_dir or f"{parent}/wal", self._wal_segment_bytes
        try:
            self.disk_left_bytes, self._fullest = min(
                (self._data_left_at(parent), parent),
                (self._left_at(wal_dir, wal_bytes if self._wal_dir else 0), wal_dir),
            )
            self.has_access = True
        except PermissionError as failure:
            self.has_access = False
            what = "the data is closed to this process, which ends when it must open a file"
            to_do = remedy(failure, str(failure.filename))
            log.error(what, "access", 0.1, error=str(failure), next=to_do)
        self._measure_left()

    def _data_left_at(self, parent: str) -> int:
        return self._left_at(parent, self._segment_bytes) - self._store.checkpoint_space

    def _left_at(self, path: str, segment_bytes: int) -> int:
        """Free space beyond the reserve, for segments that take this much at once."""
        free, total = self._store.disk.space(path)
        reserve = min(DISK_RESERVE_BYTES, int(total * DISK_RESERVE_SHARE) + segment_bytes)
        return free - max(reserve, segment_bytes)

    def _measure_left(self) -> None:
        left = self.disk_left_bytes
        if self.quota_bytes:
            left = min(left, self.quota_bytes - self._store.size_in_use_bytes)
        self.space_left = left

    def snapshot_room(self, parent: str) -> int:
        """The largest snapshot that leaves space for writes once it has replaced the data, in this
        folder. The log may lie on another file system. Raises OSError."""
        return self._data_left_at(parent) + self._store.size_bytes

    def record_write(self, size_bytes: int) -> None:
        """These bytes were written, to the log and to the data, since the last measurement."""
        self.disk_left_bytes -= 2 * size_bytes
        self.space_left = min(self.space_left - size_bytes, self.disk_left_bytes)
        self._unmeasured_bytes += size_bytes
        if self._unmeasured_bytes > MEASURE_BYTES:
            self._measure_disk()


def alarm_name(kind: int) -> str:
    return {NOSPACE: "NOSPACE", CORRUPT: "CORRUPT"}.get(kind, str(kind))


def _log(write: Callable[..., None], message: str, alarm: tuple[int, int]) -> None:
    write(message, alarm=alarm_name(alarm[1]), member_id=f"{alarm[0]:x}")


def _key(alarm: tuple[int, int]) -> bytes:
    return alarm[0].to_bytes(8, "big") + bytes((alarm[1],))
