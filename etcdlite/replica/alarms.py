"""The alarms of the cluster, and the space whose end raises one of them.

An alarm is a member's: NOSPACE, it is out of space; CORRUPT, its data differs from the others'. It
goes through the log, so that all members have it and heed it, until somebody disarms it.

There are two ends of space: the quota, and the file system, of which a reserve is kept free: to
delete, compact, clean and log needs some itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from etcdlite import log, proto
from etcdlite.methods import ALARM_METHOD
from etcdlite.mvcc import ALARM

if TYPE_CHECKING:
    from etcdlite.member import Member

NOSPACE = 1
CORRUPT = 2

DISK_RESERVE_BYTES = 64 << 20
DISK_RESERVE_SHARE = 0.1
"""With less than the smaller of the two free, a member takes no more writes that need space."""

MEASURE_DISK_S = 1.0

RAISE_AGAIN_S = 10.0
"""An alarm that is not there after this time has got lost, with a leader for example."""


class Alarms:
    """The active alarms, (member id, kind) each, and the space of this member."""

    def __init__(self, member: Member, quota_bytes: int) -> None:
        """`quota_bytes`: of the data; 0 for none."""
        self._member = member
        self.quota_bytes = quota_bytes
        self.space_left = 0
        """Bytes that writes may still take."""
        self._active: set[tuple[int, int]] = set()
        self._raised_at = -math.inf
        """When the log was last given one of this member, which may get lost on its way."""
        self._disk_left = 0
        self._disk_measured_at = -math.inf
        self.load()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._active)

    def __contains__(self, alarm: tuple[int, int]) -> bool:
        return alarm in self._active

    def __len__(self) -> int:
        return len(self._active)

    @property
    def is_corrupt(self) -> bool:
        """An alarm says that members differ: no write is taken any more. (Reads are, as in etcd: it
        is by them that an operator finds out what is true.)"""
        return any(kind == CORRUPT for _, kind in self._active)

    @property
    def has_no_space(self) -> bool:
        """An alarm says that a member is out of space: nothing that needs any is applied."""
        return any(kind == NOSPACE for _, kind in self._active)

    def load(self) -> None:
        """Take over what the store says, and measure its space."""
        self._raised_at = -math.inf
        self._active = {
            (int.from_bytes(key[:8], "big"), key[8])
            for key in self._member.store.buckets.get(ALARM, ())
        }
        self._measure_disk()
        self._measure_left()

    def raise_nospace(self) -> None:
        """Have the cluster know that this member is out of space."""
        member = self._member
        now = member.clock()
        if (member.id, NOSPACE) in self._active or now < self._raised_at + RAISE_AGAIN_S:
            return
        self._raised_at = now
        quota_left = self.quota_bytes - member.store.size_in_use_bytes
        if self.quota_bytes and quota_left <= self._disk_left:
            why, to_do = "the quota is used up", "compact, delete keys or raise the quota"
        else:
            why, to_do = "the file system is almost full", "free space on it"
        log.warn(
            f"{why}; puts are refused",
            next=f"{to_do}, then etcdlite-ctl alarm disarm",
            **{"data-dir": member.store.directory},
        )
        self._raise(member.id, NOSPACE)

    def raise_corrupt(self, node: int) -> None:
        """Have the cluster know that a member differs from the leader."""
        if (node, CORRUPT) not in self._active:
            self._raise(node, CORRUPT)

    def _raise(self, node: int, kind: int) -> None:
        request = proto.AlarmRequest(action=1, memberID=node, alarm=kind)
        self._member.propose_message(None, 0, ALARM_METHOD, request)

    def apply(self, request: Any) -> bytes:
        """An AlarmRequest is committed: the response after its header."""
        member = self._member
        alarm = (request.memberID, request.alarm)
        changed = []
        if request.action == 0:
            changed = [item for item in sorted(self._active) if request.alarm in (0, item[1])]
        elif request.alarm in (NOSPACE, CORRUPT) and request.action == 1:
            if alarm not in self._active:
                _log(log.warn, "alarm raised", alarm)
            self._active.add(alarm)
            member.store.set_bucket(ALARM, _key(alarm), b"")
            changed = [alarm]
        elif request.alarm and request.action == 2 and alarm in self._active:
            _log(log.info, "alarm disarmed", alarm)
            self._active.remove(alarm)
            self._disk_measured_at = -math.inf
            self.measure(member.clock())
            member.store.set_bucket(ALARM, _key(alarm), None)
            self._raised_at = -math.inf
            changed = [alarm]
        members = [proto.AlarmMember(memberID=i, alarm=kind) for i, kind in changed]
        encoded: bytes = proto.AlarmResponse(alarms=members).encode()
        return encoded

    def measure(self, now: float) -> None:
        """Find out what `space_left` is; of the file system, at most once in `MEASURE_DISK_S`. Not
        to be full is the aim, so the alarm is raised early."""
        if now - self._disk_measured_at >= MEASURE_DISK_S:
            self._disk_measured_at = now
            self._measure_disk()
            if self._disk_left <= 0:
                self.raise_nospace()
        self._measure_left()

    def _measure_disk(self) -> None:
        store = self._member.store
        # Its own folder may be about to be replaced by a snapshot.
        free, total = store.disk.space(os.path.dirname(store.directory) or ".")
        self._disk_left = free - min(DISK_RESERVE_BYTES, int(total * DISK_RESERVE_SHARE))

    def _measure_left(self) -> None:
        left = self._disk_left
        if self.quota_bytes:
            left = min(left, self.quota_bytes - self._member.store.size_in_use_bytes)
        self.space_left = left

    def took(self, size_bytes: int) -> None:
        """So much was written, in the log and in the data, since all was measured."""
        self._disk_left -= 2 * size_bytes
        self.space_left = min(self.space_left - size_bytes, self._disk_left)


def alarm_name(kind: int) -> str:
    return {NOSPACE: "NOSPACE", CORRUPT: "CORRUPT"}.get(kind, str(kind))


def _log(write: Callable[..., None], message: str, alarm: tuple[int, int]) -> None:
    write(message, alarm=alarm_name(alarm[1]), **{"member-id": f"{alarm[0]:x}"})


def _key(alarm: tuple[int, int]) -> bytes:
    return alarm[0].to_bytes(8, "big") + bytes((alarm[1],))
