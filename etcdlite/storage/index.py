"""The index: where each version of each key is in the data file.

There are two sorted maps. `heads` has every key that exists now: mod_revision, create_revision,
version, location (u64 each), lease (i64) and length (u32) of its current record. `past` has every
key with superseded versions or a tombstone (`storage/past.py`). So a range or a count at the
current revision never meets deleted keys, and a compaction visits only keys with something to drop.

`revisions[n]` is the location of the first record of revision `first_revision + n`: watches read
history by it.

Invariant: the revisions in the past of a key ascend and stay below the head's.
"""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, islice, pairwise
from operator import itemgetter

from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.storage.past import DEAD, PAST, PAST_BYTES, Past
from etcdlite.storage.sorted_table import Row, SortedTable

HEAD = struct.Struct("<QQQQqI")
_PLACE = struct.Struct("<24xQ8xI")
"""Location and length in a row of `heads`."""
NO_HEAD = (1 << 65, 1 << 65, 0, 0, 0, 0)
"""The head of a key that does not exist: its mod_revision is above every revision."""
_TOMBSTONE = (0, 0, DEAD)

Numbered = tuple[bytes, "tuple[int, int, int, int] | None", int, int]
"""(key, numbers, location, length). The numbers are mod_revision, create_revision, version and
lease; None if the version is superseded, so only the record has them."""


class Index:
    """Current and superseded versions by key, and revisions by number."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self.heads = SortedTable(HEAD)
        self.past = Past()
        self.revisions = array("Q")
        self.first_revision = 1

    # Changes that a start, a restore or cleaning makes. `Store` makes those of requests itself.

    def supersede(self, key: bytes, mod: int, location: int, length: int) -> None:
        """Add a version that is no longer current (`length | DEAD` for a tombstone).

        Does nothing if a version as new as this one is there already: a scan after a crash meets
        records that are in the checkpoint."""
        entries = self.past.get(key)
        if entries is None or PAST.unpack_from(entries, len(entries) - PAST_BYTES)[0] < mod:
            self.past.add(key, PAST.pack(mod, location, length))

    def move(self, key: bytes, mod: int, new: int) -> int | None:
        """Point version `mod` of `key` to `new`. Returns where it was; None if there is none."""
        head_mod, create, version, location, lease, length = self.heads.get(key, NO_HEAD)
        if head_mod == mod:
            self.heads[key] = (mod, create, version, new, lease, length)
            return int(location)
        entries = self.past.get(key, b"")
        at = self._search(entries, mod)
        found, location, length = PAST.unpack_from(entries, at) if at >= 0 else _TOMBSTONE
        if found != mod:
            return None
        moved = entries if isinstance(entries, bytearray) else bytearray(entries)
        PAST.pack_into(moved, at, mod, new, length)
        if moved is not entries:
            self.past[key] = moved
        return int(location)

    # Look-ups.

    def is_at(self, key: bytes, mod: int, location: int) -> bool:
        """The index has version `mod` of `key`, at `location`."""
        head = self.heads.get(key, NO_HEAD)
        if head[0] == mod:
            return bool(head[3] == location)
        entries = self.past.get(key, b"")
        at = self._search(entries, mod)
        return at >= 0 and PAST.unpack_from(entries, at)[:2] == (mod, location)

    @staticmethod
    def _search(entries: bytes | bytearray, revision: int) -> int:
        """The offset of the newest entry at or below `revision`; below 0 if there is none."""
        places = range(0, len(entries), PAST_BYTES)
        at = bisect_right(places, revision, key=lambda place: PAST.unpack_from(entries, place)[0])
        return (at - 1) * PAST_BYTES

    def at(self, key: bytes, revision: int) -> tuple[int, int] | None:
        """(location, length) of the key's record as of `revision`; None if it did not exist."""
        mod, _, _, location, _, length = self.heads.get(key, NO_HEAD)
        if mod <= revision:
            return location, length
        entries = self.past.get(key, b"")
        at = self._search(entries, revision)
        _, location, length = PAST.unpack_from(entries, at) if at >= 0 else _TOMBSTONE
        return None if length & DEAD else (location, length)

    def count_some(
        self, start: bytes, end: bytes | None, revision: int
    ) -> tuple[int, bytes | None]:
        """How many of the first keys of [start, end) existed as of `revision`, and the key to
        continue from, None at the end of the range. Visits up to `count_step_keys` current keys
        and `scan_step_keys` others."""
        limits = self._limits
        now = self.heads.first(start, end, limits.count_step_keys)
        past = self.past.first(start, end, limits.scan_step_keys)
        # Both must end at the same key: the index may change between two calls.
        last = [now[-1]] if len(now) == limits.count_step_keys else []
        last += [past[-1]] if len(past) == limits.scan_step_keys else []
        cursor = None
        if last:
            cursor = min(last) + b"\0"
            del now[bisect_left(now, cursor) :], past[bisect_left(past, cursor) :]
        heads = self.heads
        count = sum(head[1] <= revision for _, head in zip(now, heads.rows(start, end)))  # noqa: B905
        for key in past:
            if heads.get(key, NO_HEAD)[1] > revision:
                count += self.at(key, revision) is not None
        return count, cursor

    def visits(self, start: bytes, end: bytes | None) -> int:
        """How many keys `count_some` visits to count [start, end)."""
        return self.heads.count(start, end) + self.past.count(start, end)

    def scan(
        self,
        start: bytes,
        end: bytes | None,
        revision: int | None,
        limit: int,
        limit_bytes: int = 1 << 62,
    ) -> tuple[list[tuple[int, int]], bytes | None]:
        """The first records of [start, end) as of `revision` (None: now), in key order: up to
        `limit`, and up to the one that reaches `limit_bytes`.

        Returns (location, length) each and the key to continue from, None at the end of the range.
        At an old revision one call visits `scan_step_keys` keys, so it may find less."""
        if revision is None:
            keys = self.heads.first(start, end, limit)
            packed = self.heads.packed(start, end)
            found = list(islice(chain.from_iterable(map(_PLACE.iter_unpack, packed)), len(keys)))
            sizes = list(accumulate(map(itemgetter(1), found)))
            most = min(limit, bisect_left(sizes, limit_bytes) + 1)
            return found[:most], keys[most - 1] + b"\0" if most <= len(keys) else None
        entries, cursor = self.scan_numbers(start, end, revision, limit, limit_bytes)
        return [entry[2:] for entry in entries], cursor

    def scan_numbers(
        self,
        start: bytes,
        end: bytes | None,
        revision: int | None,
        limit: int,
        limit_bytes: int,
        descends: bool = False,
    ) -> tuple[list[Numbered], bytes | None]:
        """As `scan`, with the numbers of each version. `descends`: the last keys of the range, in
        descending order; the key returned is the end of the rest of the range."""
        found: list[Numbered] = []
        size = 0
        step_keys = limit if revision is None else self._limits.scan_step_keys
        heads = self._heads(start, end, step_keys, descends)
        keys = list(heads)
        if revision is None:
            revision = 1 << 64
        else:
            keys = self._with_past(keys, start, end, step_keys, descends)
        for visited, key in enumerate(keys, 1):
            mod, create, version, location, lease, length = heads.get(key, NO_HEAD)
            if mod <= revision:
                found.append((key, (mod, create, version, lease), location, length))
                size += length
            else:
                record = self.at(key, revision)
                if record is not None:
                    found.append((key, None, *record))
                    size += record[1]
            if visited == step_keys or len(found) == limit or size >= limit_bytes:
                return found, key if descends else key + b"\0"
        return found, None

    def _heads(
        self, start: bytes, end: bytes | None, limit: int, descends: bool
    ) -> dict[bytes, Row]:
        """The first (or last) current keys in [start, end), in order, and their rows."""
        keys = self.heads.first(start, end, limit, descends)
        if descends and keys:
            start, end = keys[-1], keys[0] + b"\0"
        rows: Iterable[Row] = self.heads.rows(start, end)
        return dict(zip(keys, reversed(list(rows)) if descends else rows))  # noqa: B905

    def all_keys(self, start: bytes, end: bytes | None, limit: int) -> list[bytes]:
        """The first keys in [start, end) with a version in the index, in order."""
        return self._with_past(self.heads.first(start, end, limit), start, end, limit, False)

    def _with_past(
        self, keys: list[bytes], start: bytes, end: bytes | None, limit: int, descends: bool
    ) -> list[bytes]:
        """As `all_keys`, or the last ones, given the first (or last) current ones."""
        gone = set(self.past.first(start, end, limit, descends)).difference(keys)
        return sorted([*keys, *gone], reverse=descends)[:limit] if gone else keys

    def versions(
        self, key: bytes, compacted: int, revision: int, above: int = 0, limit: int = 1 << 62
    ) -> list[tuple[int, int, int]]:
        """(mod_revision, location, length) of the versions that a store compacted at `compacted`
        keeps, with `above` < mod_revision <= `revision`: ascending, the first `limit`."""
        found: list[tuple[int, int, int]] = []
        head = self.heads.get(key, NO_HEAD)
        entries = self.past.get(key, b"")
        at = self._first_kept(entries, head, compacted)
        known = self._search(entries, above) if above else -1
        if known >= 0:
            at = max(at, known + PAST_BYTES)
        while at < len(entries) and len(found) < limit:
            mod, location, length = PAST.unpack_from(entries, at)
            if mod > revision:
                return found
            found.append((mod, location, length & ~DEAD))
            at += PAST_BYTES
        mod, _, _, location, _, length = head
        if len(found) < limit and above < mod <= revision:
            found.append((mod, location, length))
        return found

    # Compaction.

    def keeps(self, key: bytes, mod: int, compacted: int) -> bool:
        """Version `mod` of `key` is here, and a compaction at `compacted` keeps it."""
        if key not in self.past:
            return bool(self.heads.get(key, NO_HEAD)[0] == mod)
        return bool(self.versions(key, compacted, mod, mod - 1))

    def _first_kept(self, entries: bytes | bytearray, head: Row, compacted: int) -> int:
        """The offset of the first past entry that compaction at `compacted` keeps.

        It keeps what a read at `compacted` or later sees, and what a watch from `compacted` on
        needs: so a tombstone of exactly that revision stays until the next compaction."""
        at = self._search(entries, compacted)
        if at < 0:
            return 0
        mod, _, length = PAST.unpack_from(entries, at)
        if mod == compacted:
            return at
        superseded = at + PAST_BYTES == len(entries) and head[0] <= compacted
        return at + PAST_BYTES if length & DEAD or superseded else at

    def compact_steps(self, compacted: int, garbage: dict[int, int]) -> Iterator[int]:
        """Drop what a compaction at `compacted` does not keep. A step visits up to
        `compact_step_keys` keys and drops up to `compact_step_versions` versions.

        Yields the number of versions dropped in each step, and adds the bytes they occupied to
        `garbage` by segment. The index may change between the steps."""
        # Flat, because puts wait for a step: less than 2 us per key.
        unpack_from = PAST.unpack_from
        step_keys = self._limits.compact_step_keys
        step_versions = self._limits.compact_step_versions
        cursor: bytes | None = b""
        while cursor is not None:
            past, heads = self.past, self.heads
            items = past.first_items(cursor, step_keys)
            cursor = items[-1][0] + b"\0" if len(items) == step_keys else None
            dropped = 0
            emptied: list[bytes] = []
            for key, entries in items:
                size = len(entries)
                mod, location, length = unpack_from(entries, size - PAST_BYTES)
                if mod >= compacted:
                    kept = self._first_kept(entries, heads.get(key, NO_HEAD), compacted)
                    if not kept:
                        continue
                elif length & DEAD or heads.get(key, NO_HEAD)[0] <= compacted:
                    kept = size
                else:
                    kept = size - PAST_BYTES
                    if not kept:
                        continue
                room = step_versions - dropped
                if kept > room * PAST_BYTES:
                    # The next step continues with the same key.
                    kept = room * PAST_BYTES
                    cursor = key
                for _, location, length in PAST.iter_unpack(entries[:kept]):
                    number = location >> 32
                    if number in garbage:
                        garbage[number] += (length & ~DEAD) + 8
                dropped += kept // PAST_BYTES
                if kept == size:
                    emptied.append(key)
                elif isinstance(entries, bytes) or size - kept <= 2 * PAST_BYTES:
                    past[key] = entries[kept:]
                else:
                    del entries[:kept]
                if cursor == key:
                    break
            past.pop_run(emptied)
            yield dropped
        gone = compacted - self.first_revision
        if gone > 0:
            del self.revisions[:gone]
            self.first_revision = compacted

    def skip_revisions(self, revision: int) -> None:
        """Forget the locations of the revisions up to this one."""
        self.revisions = array("Q")
        self.first_revision = revision + 1

    # Packing, for checkpoints.
    #
    # A chunk of keys is: count u32, key lengths u32 each, values (HEAD each; or lengths u32 each
    # and then past entries), keys. The pieces of one entry follow each other, in order.

    def pack_heads(self) -> Iterator[bytes]:
        """The heads as chunks. A key that changes between chunks is in its old or new state."""
        heads = self.heads
        for keys in self._batches(heads):
            yield b"".join((_lengths(keys), *heads.packed(keys[0], keys[-1] + b"\0"), *keys))

    def pack_past(self) -> Iterator[bytes]:
        """The past as chunks. The entry of a key with many versions is cut into several pieces.
        No compaction may run before the last chunk is taken."""
        past = self.past
        pack_bytes = self._limits.pack_bytes
        piece_bytes = pack_bytes // PAST_BYTES * PAST_BYTES
        for keys in self._batches(past):
            batch: list[bytes] = []
            values: list[bytes] = []
            size = 0
            for key in keys:
                entry = past[key]
                at = 0
                while at < len(entry):
                    if size >= pack_bytes:
                        yield b"".join((_lengths(batch), _lengths(values), *values, *batch))
                        batch, values, size = [], [], 0
                    piece = bytes(entry[at : at + piece_bytes])
                    batch.append(key)
                    values.append(piece)
                    at += len(piece)
                    size += len(piece)
            yield b"".join((_lengths(batch), _lengths(values), *values, *batch))

    def pack_revisions(self) -> Iterator[bytes]:
        """`revisions` as it is when the first chunk is taken: per chunk the number of its first
        revision, u64, then locations, u64 each. One chunk at least."""
        first = self.first_revision
        revisions = self.revisions[:]
        count = self._limits.pack_revisions
        for at in range(0, len(revisions) or 1, count):
            part = revisions[at : at + count]
            part.insert(0, first + at)
            if sys.byteorder == "big":
                part.byteswap()
            yield part.tobytes()

    def _batches(self, keys: SortedTable) -> Iterator[list[bytes]]:
        pack_keys, pack_bytes = self._limits.pack_keys, self._limits.pack_bytes
        cursor = b""
        while True:
            batch = keys.first(cursor, None, pack_keys)
            is_last = len(batch) < pack_keys
            ends = accumulate(map(len, batch))
            count = next((n for n, end in enumerate(ends, 1) if end >= pack_bytes), len(batch))
            if count < len(batch):
                del batch[count:]
                is_last = False
            if batch:
                yield batch
            if is_last:
                return
            cursor = batch[-1] + b"\0"

    def load_heads(self, chunk: bytes) -> None:
        """Load a chunk of `pack_heads`."""
        lengths, at = _read_lengths(chunk, 0)
        end = at + HEAD.size * len(lengths)
        if not self.heads.add_run(_slices(chunk, end, lengths), chunk[at:end]):
            raise ValueError("the keys are not in order")

    def load_past(self, chunk: bytes) -> None:
        """Load a chunk of `pack_past`."""
        lengths, at = _read_lengths(chunk, 0)
        sizes, at = _read_lengths(chunk, at)
        keys, pieces = _slices(chunk, at + sum(sizes), lengths), _slices(chunk, at, sizes)
        if len(pieces) != len(keys) or any(
            len(piece) % PAST_BYTES or not any(piece[:8]) for piece in pieces
        ):
            raise ValueError("the past of a key is cut off")
        self.past.add_all(keys, pieces)

    def load_revisions(self, chunk: bytes) -> None:
        """Load a chunk of `pack_revisions`."""
        numbers = array("Q", chunk)
        if sys.byteorder == "big":
            numbers.byteswap()
        if not self.revisions:
            self.first_revision = numbers[0]
        self.revisions += numbers[1:]


def _lengths(items: list[bytes]) -> bytes:
    # `struct.pack` would keep an object for each number of items.
    return b"".join([n.to_bytes(4, "little") for n in (len(items), *map(len, items))])


def _read_lengths(chunk: bytes, at: int) -> tuple[tuple[int, ...], int]:
    count = int.from_bytes(chunk[at : at + 4], "little")
    at += 4
    return struct.unpack_from(f"<{count}I", chunk, at), at + 4 * count


def _slices(chunk: bytes, at: int, lengths: tuple[int, ...]) -> list[bytes]:
    ends = list(accumulate(lengths, initial=at))
    if ends[-1] > len(chunk):
        raise ValueError("a chunk of the index is cut off")
    return [chunk[a:b] for a, b in pairwise(ends)]
