"""The data file: what is appended is read back, and nothing else ever is."""

from __future__ import annotations

import errno
import os
import random
import struct
from pathlib import Path
from zlib import crc32

import pytest
from rigs.faulty_disk import FaultyDisk, FaultyFile

from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.storage.data import DataFile
from etcdlite.storage.disk import Disk
from etcdlite.storage.layout import (
    BUCKET,
    MARK,
    OFFSET_MASK,
    PUT,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER,
    TOMBSTONE,
    DataDamaged,
    DataRefused,
    segment_name,
)

DIRECTORY = "data"
FIRST = f"{DIRECTORY}/{segment_name(1)}"


def new(
    segment_bytes: int = 1 << 20,
    disk: FaultyDisk | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> DataFile:
    disk = FaultyDisk() if disk is None else disk
    disk.make_dir(DIRECTORY)
    data = DataFile(disk, DIRECTORY, segment_bytes, limits)
    data.roll()
    return data


def reopened(data: DataFile) -> DataFile:
    other = DataFile(data.disk, DIRECTORY, data.segment_bytes)
    other.open_segments()
    return other


def test_records_are_read_by_location_before_and_after_they_are_written() -> None:
    data = new()
    bodies = [random.Random(n).randbytes(n * 37 % 5000) for n in range(1, 60)]
    locations = [data.append(PUT, body) for body in bodies]
    for _ in range(2):
        for location, body in zip(locations, bodies, strict=True):
            assert data.read(location, len(body)) == body
        data.flush()
    cold = reopened(data)
    for location, body in zip(locations, bodies, strict=True):
        assert cold.read(location, len(body)) == body


@pytest.mark.parametrize("chunk_bytes", [16, 100, 4096, 1 << 20])
def test_records_are_listed_as_they_were_appended(chunk_bytes: int) -> None:
    data = new()
    rng = random.Random(4)
    right = []
    for _ in range(50):
        body = rng.randbytes(rng.choice((1, 50, 2000)))
        kind = rng.choice((PUT, TOMBSTONE))
        right.append((data.append(kind, body), kind, body))
        if rng.random() < 0.2:
            data.append_mark(1, 2, 3)
            right.append((right[-1][0] + len(body) + 8, MARK, struct.pack("<QQQ", 1, 2, 3)))
    assert list(data.records(1, SEGMENT_HEADER.size)) == [], "they are not flushed yet"
    data.flush()
    assert list(data.records(1, SEGMENT_HEADER.size, chunk_bytes)) == right
    some = right[20]
    assert list(data.records(1, some[0] & OFFSET_MASK, chunk_bytes)) == right[20:]


def test_a_second_reader_can_be_written_from_the_docstring() -> None:
    data = new()
    data.append(PUT, b"body")
    data.append_bucket(2, b"key", b"value")
    data.append_bucket(2, b"key", None)
    data.flush()
    data.roll()
    content = bytes(data.disk.read(FIRST))
    assert content[:20] == b"ETCDLSEG" + struct.pack("<IQ", 1, 1)
    assert content[20:32] == struct.pack("<QI", 0, crc32(content[:28]))
    at = 32
    found = []
    while at < len(content):
        crc, word = struct.unpack_from("<II", content, at)
        body = content[at + 8 : at + 8 + (word >> 4)]
        assert crc32(body, word) == crc
        found.append((word & 15, body))
        at += 8 + len(body)
    assert found == [
        (PUT, b"body"),
        (BUCKET, b"\x02\x01\x03\x00keyvalue"),
        (BUCKET, b"\x02\x00\x03\x00key"),
    ]
    second = data.disk.read(f"{DIRECTORY}/{segment_name(2)}")
    assert struct.unpack_from("<QQ", second, 12) == (2, len(content))


def test_a_damaged_record_is_an_error_that_says_where() -> None:
    data = new()
    data.append(PUT, b"first")
    location = data.append(PUT, b"second")
    data.append(PUT, b"third")
    data.flush()
    offset = location & OFFSET_MASK
    for byte in range(RECORD_HEADER_BYTES + len(b"second")):
        disk = data.disk.copy()  # type: ignore[attr-defined]
        disk.content(FIRST)[offset + byte] ^= 0x10
        broken = DataFile(disk, DIRECTORY, 1 << 20)
        broken.open_segments()
        for read in (
            lambda: broken.read(location, 6),  # noqa: B023 - called at once
            lambda: list(broken.records(1, SEGMENT_HEADER.size)),  # noqa: B023
        ):
            with pytest.raises(DataDamaged) as caught:
                read()
            assert (caught.value.path, caught.value.offset) == (FIRST, offset)


def test_what_the_disk_cannot_read_is_damaged_and_the_rest_is_not() -> None:
    data = new()
    records = [(data.append(PUT, bytes([n]) * 100), 100) for n in range(9)]
    data.flush()
    whole = [bytes([n]) * 100 for n in range(9)]
    cold = reopened(data)
    bad = records[4][0]
    data.disk.unreadable[FIRST] = (bad & OFFSET_MASK) + 50  # type: ignore[attr-defined]
    # These are read at once, or in one piece with the one that cannot be read.
    assert bodies_of(cold, records[:4]) == whole[:4]
    assert bodies_of(cold, records[5:]) == whole[5:]
    for read in (
        lambda: cold.read(*records[4]),
        lambda: cold.read_all(records),
        lambda: list(cold.records(1, SEGMENT_HEADER.size, 100)),
        lambda: cold.block(1, bad & OFFSET_MASK, 1 << 20),
    ):
        with pytest.raises(DataRefused, match=r"the disk cannot read it \(Input/output error\)"):
            read()  # type: ignore[no-untyped-call]
    assert bad in cold.damaged
    data.disk.fail_at, data.disk.error = 1, errno.EBADF  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="Bad file descriptor"):
        cold.read(*records[8])


def test_the_error_of_a_read_names_the_file(tmp_path: Path) -> None:
    file = Disk().open_new(str(tmp_path / "x"))
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        file.pread(1, 0)
    assert caught.value.filename == file.path


def test_zeros_are_no_records() -> None:
    data = new()
    data.append(PUT, b"body")
    data.flush()
    data.files[1].truncate(data.offset + 512)
    with pytest.raises(DataDamaged):
        list(reopened(data).records(1, SEGMENT_HEADER.size))


def test_reading_does_not_keep_more_than_its_limit() -> None:
    data = new(limits=Limits(recent_bytes=10_000))
    locations = []
    for number in range(100):
        locations.append(data.append(PUT, bytes([number]) * 1000))
        data.flush()
    for location in locations * 2:
        data.read(location, 1000)
        kept = sum(map(len, {**data.older, **data.recent}.values()))
        assert kept <= 2 * 10_000 + 1000


def test_garbage_is_counted_by_segment() -> None:
    data = new()
    location = data.append(PUT, b"x" * 92)
    data.append_mark(1, 1, 1)
    assert data.garbage_bytes == 32
    data.flush()
    data.roll()
    data.add_garbage(location, 92)
    assert data.garbage == {1: 132, 2: 0}
    assert data.size_bytes == 32 + 100 + 32 + 32
    data.drop_segment(1)
    assert data.garbage_bytes == 0
    data.add_garbage(location, 92)
    assert data.garbage_bytes == 0, "a segment that is gone has none"


def bodies_of(data: DataFile, records: list[tuple[int, int]]) -> list[bytes]:
    return [bytes(body) for body in data.read_all(records)]


@pytest.mark.parametrize("seed", range(5))
def test_many_records_are_read_at_once_wherever_they_are(seed: int) -> None:
    rng = random.Random(seed)
    data = new(limits=Limits(recent_bytes=2000))
    right: dict[tuple[int, int], bytes] = {}
    for number in range(300):
        body = rng.randbytes(rng.choice((0, 1, 50, 2000, 60_000)))
        right[data.append(PUT, body), len(body)] = body
        if rng.random() < 0.3:
            data.append_mark(1, 2, 3)
        if rng.random() < 0.1 and number < 290:
            data.flush()
        if number in (100, 200):
            data.flush()
            data.roll()
    records = list(right)
    wanted = [records, records[::-1], records[::7], rng.sample(records, 100)]
    wanted += [[record for record in records if rng.random() < share] for share in (0.5, 0.9)]
    for some in wanted:
        assert bodies_of(data, some) == [right[record] for record in some]
    data.flush()
    cold = reopened(data)
    for some in wanted:
        assert bodies_of(cold, some) == [right[record] for record in some]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read of a file asks for, from now on."""
    sizes: list[int] = []
    pread = FaultyFile.pread

    def counted(file: FaultyFile, size_bytes: int, offset: int) -> bytes:
        sizes.append(size_bytes)
        return pread(file, size_bytes, offset)

    monkeypatch.setattr(FaultyFile, "pread", counted)
    return sizes


def test_records_side_by_side_take_one_read_and_are_not_kept(reads: list[int]) -> None:
    data = new()
    records = [(data.append(PUT, bytes([n]) * 100), 100) for n in range(100)]
    data.flush()
    cold = reopened(data)
    reads.clear()
    assert bodies_of(cold, records) == [bytes([n]) * 100 for n in range(100)]
    assert reads == [100 * 108]
    assert not cold.recent


def test_a_list_that_fits_into_memory_is_read_once(reads: list[int]) -> None:
    """Also if only the recent and the older records together have room for it."""
    limits = Limits(recent_bytes=30_000)
    data = new(limits=limits)
    scattered = [(data.append(PUT, bytes([n]) * 100), 100) for n in range(200)][::-1]
    data.flush()
    cold = DataFile(data.disk, DIRECTORY, 1 << 20, limits)
    cold.open_segments()
    for _ in range(3):
        assert bodies_of(cold, scattered) == [bytes([n]) * 100 for n in reversed(range(200))]
    assert cold.older and len(reads) == 200


def test_a_damaged_record_among_many_is_an_error_that_says_where() -> None:
    data = new()
    first = data.append(PUT, b"first")
    data.append_mark(1, 2, 3)
    second = data.append(PUT, b"second")
    third = data.append(PUT, b"third")
    data.flush()
    records = [(first, 5), (second, 6), (third, 5)]
    for offset in range(first & OFFSET_MASK, data.offset):
        disk = data.disk.copy()  # type: ignore[attr-defined]
        disk.content(FIRST)[offset] ^= 0x10
        broken = DataFile(disk, DIRECTORY, 1 << 20)
        broken.open_segments()
        damaged = [r for r in records if 0 <= offset - (r[0] & OFFSET_MASK) < r[1] + 8]
        if not damaged:  # What stands between the records is not read.
            assert bodies_of(broken, records) == [b"first", b"second", b"third"]
            continue
        with pytest.raises(DataDamaged) as caught:
            broken.read_all(records)
        assert caught.value.offset == damaged[0][0] & OFFSET_MASK
    data.files[1].truncate(data.offset - 1)
    cold = reopened(data)
    assert bodies_of(cold, records[:2]) == [b"first", b"second"]
    with pytest.raises(DataDamaged):
        cold.read_all(records)
    with pytest.raises(DataDamaged):
        cold.read_all([(location + (7 << 32), size) for location, size in records])


def test_a_file_is_erased_only_when_its_removal_is_durable(tmp_path: Path) -> None:
    disk, size_bytes = Disk(), 3 << 20
    for name in ("a", "b"):
        disk.make_dir(str(tmp_path / name))
    file = disk.create(str(tmp_path / "a" / "x"), bytes(size_bytes))
    watching = os.open(file.path, os.O_RDONLY)
    file.close()
    disk.unlink(file.path)
    disk.sync_dir(str(tmp_path / "b"))
    disk.wait_for_space()
    assert os.fstat(watching).st_size == size_bytes
    disk.sync_dir(str(tmp_path / "a"))
    disk.wait_for_space()
    assert os.fstat(watching).st_size == 0
    os.close(watching)


def test_a_reservation_that_finds_too_little_space_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On ext4 it has taken what there was; a file that is removed holds it until it is closed."""

    def take_what_there_is(fd: int, offset: int, size_bytes: int) -> None:
        os.ftruncate(fd, 3 << 20)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", take_what_there_is)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="No space"):
        Disk().create(str(tmp_path / "x"), b"", 64 << 20)
    assert os.listdir("/proc/self/fd") == before
    assert not os.listdir(tmp_path)
