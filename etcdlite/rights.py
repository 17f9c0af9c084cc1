"""What a user may do: the keys that all its permissions together let it read and write.

Permissions that touch or overlap count as one range. A user may have a hundred thousand of them, so
they are put together in steps (`rights_steps`).
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Generator, Iterable

from etcdlite import proto
from etcdlite.errors import error

ROOT = "root"
"""The name of the user and of the role that may do everything."""

PERMISSIONS_PER_STEP = 512


class KeySet:
    """A set of keys, built from ranges that may touch and overlap, and kept as sorted ranges that
    do neither. It takes the place of the interval tree of etcd's `adt` package."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[tuple[bytes, bytes]]) -> None:
        """The union of these ranges [start, end); the end b"" means that there is no upper
        bound."""
        self._starts: list[bytes] = []
        self._ends: list[bytes] = []
        for start, end in sorted(ranges):
            self.add(start, end)

    def add(self, start: bytes, end: bytes) -> None:
        """Add a range that begins where the last one added does, or later."""
        ends = self._ends
        if end and end <= start:
            return
        if ends and (not ends[-1] or ends[-1] >= start):
            if ends[-1] and (not end or end > ends[-1]):
                ends[-1] = end
        else:
            self._starts.append(start)
            ends.append(end)

    def ranges(self) -> list[tuple[bytes, bytes]]:
        """The ranges of the union, in order."""
        return list(zip(self._starts, self._ends, strict=True))

    def holds(self, key: bytes, range_end: bytes = b"") -> bool:
        """Whether the set has all keys that a request with this key and range end names."""
        at = bisect_right(self._starts, key) - 1
        if at < 0:
            return False
        end = self._ends[at]
        if not range_end:
            return not end or key < end
        if range_end == b"\0":
            return not end
        return self._starts[at] < range_end and (not end or (key < end and range_end <= end))


EVERYTHING = KeySet([(b"", b"")])
"""All keys, and all ranges, even empty ones."""


class Rights:
    __slots__ = ("is_root", "read", "write")

    def __init__(self, roles: frozenset[str], read: KeySet, write: KeySet) -> None:
        """`read` and `write`: the keys of the permissions of all these roles."""
        self.is_root = ROOT in roles
        self.read = EVERYTHING if self.is_root else read
        self.write = EVERYTHING if self.is_root else write

    def check_read(self, key: bytes, range_end: bytes = b"") -> None:
        """Raises PermissionDenied unless the user may read all these keys."""
        if not self.read.holds(key, range_end):
            raise error("PermissionDenied")

    def check_write(self, key: bytes, range_end: bytes = b"") -> None:
        """Raises PermissionDenied unless the user may write all these keys."""
        if not self.write.holds(key, range_end):
            raise error("PermissionDenied")


def rights_steps(roles: frozenset[str], records: Iterable[bytes]) -> Generator[None, None, Rights]:
    """What these roles permit together, in steps. `records`: their authpb.Role."""
    kinds = proto.Permission
    runs: dict[int, list[list[tuple[bytes, bytes]]]] = {kinds.READ: [], kinds.WRITE: []}
    count = 0
    for record in records if ROOT not in roles else ():
        permissions = proto.Role.decode(record).keyPermission
        for kind, ranges in runs.items():
            permitted = (one for one in permissions if one.permType in (kind, kinds.READWRITE))
            ranges.append(sorted(interval_of(one.key, one.range_end) for one in permitted))
        count += 1 + len(permissions)
        if count >= PERMISSIONS_PER_STEP:
            count = 0
            yield
    sets = {kind: KeySet(()) for kind in runs}
    for kind, ranges in runs.items():
        for start, end in heapq.merge(*ranges):
            sets[kind].add(start, end)
            count += 1
            if count >= PERMISSIONS_PER_STEP:
                count = 0
                yield
    return Rights(roles, sets[kinds.READ], sets[kinds.WRITE])


def interval_of(key: bytes, range_end: bytes) -> tuple[bytes, bytes]:
    """The interval of the keys that key and range end name; the end b"" means no upper bound."""
    if not range_end:
        return key, key + b"\0"
    return key, b"" if range_end == b"\0" else range_end
