"""The index against the list of all versions, and its packed form."""

from __future__ import annotations

import random
import struct

import pytest

from etcdlite.limits import Limits
from etcdlite.storage.index import HEAD, Index
from etcdlite.storage.past import DEAD, PAST, PAST_BYTES

Version = tuple[int, int, int, bool]
"""(revision, location, length, is a tombstone)"""


SMALL = Limits(pack_keys=3, scan_step_keys=3, compact_step_keys=3)


def grown(seed: int, changes: int = 200) -> tuple[Index, dict[bytes, list[Version]]]:
    """An index after random puts and deletes, and what was done."""
    rng = random.Random(seed)
    index = Index(SMALL)
    index.first_revision = 2
    done: dict[bytes, list[Version]] = {}
    for mod in range(2, 2 + changes):
        key = b"key%d" % rng.randrange(25)
        versions = done.setdefault(key, [])
        location = (mod % 3 + 1) << 32 | mod * 100
        length = rng.randrange(10, 90)
        index.revisions.append(location)
        last = versions[-1] if versions and not versions[-1][3] else None
        if last is not None:
            index.supersede(key, last[0], last[1], last[2])
            if rng.random() < 0.3:
                del index.heads[key]
                index.supersede(key, mod, location, length | DEAD)
                versions.append((mod, location, length, True))
                continue
        index.heads[key] = (mod, mod, 1, location, 0, length)
        versions.append((mod, location, length, False))
    return index, done


def as_of(done: dict[bytes, list[Version]], revision: int) -> dict[bytes, tuple[int, int]]:
    found = {}
    for key, versions in sorted(done.items()):
        newest = [version for version in versions if version[0] <= revision][-1:]
        if newest and not newest[0][3]:
            found[key] = newest[0][1:3]
    return found


def scanned(
    index: Index, start: bytes, end: bytes | None, revision: int | None, limit: int
) -> list[tuple[int, int]]:
    records: list[tuple[int, int]] = []
    cursor: bytes | None = start
    while cursor is not None:
        part, cursor = index.scan(cursor, end, revision, limit)
        assert len(part) <= limit
        records += part
    return records


@pytest.mark.parametrize("seed", range(5))
def test_every_version_is_found_at_every_revision(seed: int) -> None:
    index, done = grown(seed)
    for revision in range(1, 203):
        right = as_of(done, revision)
        for key in done:
            assert index.at(key, revision) == right.get(key)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 100])
def test_a_scan_in_parts_gives_each_key_once_and_in_order(limit: int) -> None:
    index, done = grown(1)
    for revision in (None, 1, 50, 120, 201):
        right = as_of(done, 201 if revision is None else revision)
        assert scanned(index, b"", None, revision, limit) == list(right.values())
        some = [record for key, record in right.items() if b"key1" <= key < b"key2"]
        assert scanned(index, b"key1", b"key2", revision, limit) == some
        assert scanned(index, b"key2", b"key1", revision, limit) == []


def test_counting_the_present_needs_no_scan() -> None:
    index, done = grown(2)
    now = as_of(done, 201)
    assert index.heads.count(b"", None) == len(now)
    assert index.heads.count(b"key1", b"key2") == len(
        [key for key in now if b"key1" <= key < b"key2"]
    )
    assert index.heads.count(b"key2", b"key1") == 0


@pytest.mark.parametrize("compacted", [2, 3, 60, 150, 201])
def test_compaction_keeps_what_a_later_read_or_watch_needs_and_nothing_else(
    compacted: int,
) -> None:
    index, done = grown(3)
    garbage = dict.fromkeys((1, 2, 3), 0)
    before = {key: index.versions(key, compacted, 201) for key in done}
    dropped = sum(index.compact_steps(compacted, garbage))
    kept = 0
    for key, versions in done.items():
        # The state as of `compacted`, and every change from that revision on.
        needed = [version for version in versions if version[0] >= compacted]
        older = [version for version in versions if version[0] < compacted][-1:]
        if older and not older[0][3] and not (needed and needed[0][0] == compacted):
            needed = older + needed
        found = index.versions(key, compacted, 201)
        assert found == [version[:3] for version in needed]
        assert versions_in_parts(index, key, compacted) == found
        assert found == before[key], "what is to be dropped shows before it is"
        kept += len(needed)
    total = sum(map(len, done.values()))
    assert dropped == total - kept
    lengths = sum(version[2] + 8 for versions in done.values() for version in versions)
    needed_bytes = sum(length + 8 for key in done for _, _, length in index.versions(key, 0, 201))
    assert sum(garbage.values()) == lengths - needed_bytes
    assert index.first_revision == compacted
    assert len(index.revisions) == 202 - compacted


def versions_in_parts(index: Index, key: bytes, compacted: int) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    while part := index.versions(key, compacted, 201, found[-1][0] if found else 0, 2):
        assert len(part) <= 2
        found += part
    return found


def test_compaction_forgets_deleted_keys() -> None:
    index, _ = grown(4)
    for key in list(index.heads):
        index.supersede(key, 202, 1 << 32, 10 | DEAD)
        del index.heads[key]
    for _ in index.compact_steps(300, {}):
        pass
    assert not index.past and not index.heads


def test_a_moved_version_is_found_at_its_new_place_and_others_stay() -> None:
    index, done = grown(5)
    for key, versions in done.items():
        for mod, location, length, is_dead in versions:
            assert index.is_at(key, mod, location) and not index.is_at(key, mod, location + 1)
            assert not index.is_at(key, mod + 1000, location)
            assert index.move(key, mod, location + 7) == location
            if not is_dead:
                assert index.at(key, mod) == (location + 7, length)
    assert index.move(b"key1", 9999, 1) is None
    assert index.move(b"no such key", 2, 1) is None


def test_the_packed_index_is_the_index() -> None:
    index, _ = grown(6)
    loaded = Index(SMALL)
    for chunk in index.pack_heads():
        loaded.load_heads(chunk)
    for chunk in index.pack_past():
        loaded.load_past(chunk)
    assert loaded.heads == index.heads
    assert loaded.past == index.past


def test_a_chunk_of_the_index_that_makes_no_sense_is_refused() -> None:
    one, two = PAST.pack(2, 3, 4), PAST.pack(5, 6, 7)

    def chunk(keys: list[bytes], values: list[bytes]) -> bytes:
        lengths = [len(keys), *map(len, keys), len(values), *map(len, values)]
        return b"".join((struct.pack(f"<{len(lengths)}I", *lengths), *values, *keys))

    index = Index(SMALL)
    index.load_past(chunk([b"a", b"b"], [one, one + two]))
    for keys, values in (
        ([b"c", b"d"], [one]),
        ([b"c"], [one, two]),
        ([b"c"], [b""]),
        ([b"c"], [one[:-1]]),
        ([b"c"], [one + two[:7]]),
        ([b"c"], [bytes(2 * PAST_BYTES)]),
    ):
        with pytest.raises(ValueError):
            index.load_past(chunk(keys, values))
    with pytest.raises(ValueError):
        index.load_past(chunk([b"c"], [one])[:-1])
    heads = struct.pack("<3I", 2, 1, 1) + bytes(2 * HEAD.size)
    for last in (b"ba", b"aa", b"a"):
        with pytest.raises(ValueError):
            index.load_heads(heads + last)
    assert list(index.past) == [b"a", b"b"] and not index.heads


def test_a_version_that_is_known_is_not_remembered_twice() -> None:
    index = Index(SMALL)
    index.supersede(b"a", 5, 100, 10)
    index.supersede(b"a", 7, 200, 10)
    before = bytes(index.past[b"a"])
    index.supersede(b"a", 5, 100, 10)
    index.supersede(b"a", 7, 200, 10)
    assert index.past[b"a"] == before
