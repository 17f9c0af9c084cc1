"""The checkpoint: the packed index and the buckets, so that a start need not scan all data.

The store changes while a checkpoint is written. That is sound because a start loads the checkpoint
and then scans the data file from where it ended when the checkpoint *began*. The scan meets every
change that the checkpoint caught only in part, and taking a record in twice changes nothing
(`recovery.py`). The checkpoint is published only after the data file was synced up to where it
ended when the checkpoint *ended*, so nothing in it points past the end of the data.

On disk: `data/checkpoint`, replaced as a whole by rename. All integers little-endian.

    0   8  magic "ETCDLCHK"
    8   4  format version: 1, or 3 if the cluster version is not the oldest (`versions.py`)
    12  2  in version 3: major and
    14  2    minor number of the cluster version; an older program must not open the data
    (With keys, all of this is sealed; see `sealed.py`.)
    then chunks, each
        0   4  CRC-32 of kind, length and body, with the previous chunk's CRC as initial value
        4   1  kind
        5   4  length of the body
        9   n  body
    META       where to scan from: segment u64, offset u64; then u64 each: applied index, its term,
               revision, compact revision; then (segment, bytes, garbage bytes) u64 of each segment.
               The first chunk.
    BUCKET     bucket u8, 1 u8, key length u16, key, value
    HEADS      a chunk of `Index.pack_heads`
    PAST       a chunk of `Index.pack_past`
    REVISIONS  a chunk of `Index.pack_revisions`
    END        segment u64, offset u64: the data file reached at least here. The last chunk.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing
from zlib import crc32

from etcdlite.storage import layout
from etcdlite.storage.data import DataFile
from etcdlite.storage.disk import Disk, File
from etcdlite.storage.index import Index
from etcdlite.storage.layout import DataDamaged
from etcdlite.versions import CURRENT, OLDEST, Version

MAGIC = b"ETCDLCHK"
FORMAT_VERSION = 1
NEWER_VERSION = 3
FILE_HEADER = struct.Struct("<8sI")
NEEDS = struct.Struct("<HH")
CHUNK_HEADER = struct.Struct("<IBI")

META = 1
BUCKET = 2
HEADS = 3
PAST = 4
REVISIONS = 5
END = 6

NAME = "checkpoint"


class Discarded(OSError):
    """There is no space or no descriptor for a checkpoint. Nothing else has changed."""


def meta(
    begin: tuple[int, int], applied: tuple[int, int], revision: int, compacted: int, data: DataFile
) -> bytes:
    """The META chunk: the state where the checkpoint begins; `applied` is (index, term)."""
    fields = [*begin, *applied, revision, compacted]
    for number in sorted(data.files):
        size = data.offset if number == data.active else data.sizes[number]
        fields += [number, size, data.garbage[number]]
    return b"".join(map(layout.U64.pack, fields))


def chunks(
    meta: bytes, buckets: dict[int, dict[bytes, bytes]], index: Index, data: DataFile
) -> Iterator[tuple[int, bytes]]:
    """All chunks, as (kind, body). Between two of them writes may go on, but no compaction."""
    yield META, meta
    for bucket, items in sorted(buckets.items()):
        for key, value in items.copy().items():
            yield BUCKET, layout.BUCKET_BODY.pack(bucket, 1, len(key)) + key + value
    for chunk in index.pack_heads():
        yield HEADS, chunk
    for chunk in index.pack_past():
        yield PAST, chunk
    for chunk in index.pack_revisions():
        yield REVISIONS, chunk
    yield END, layout.POSITION.pack(data.active, data.offset)


def pack(chunks: Iterator[tuple[int, bytes]], needs: Version = OLDEST) -> Iterator[bytes]:
    """The bytes of a checkpoint file, piece by piece, from (kind, body) chunks. `needs`: the oldest
    etcdlite that may open the data."""
    if needs > OLDEST:
        yield FILE_HEADER.pack(MAGIC, NEWER_VERSION) + NEEDS.pack(*needs)
    else:
        yield FILE_HEADER.pack(MAGIC, FORMAT_VERSION)
    crc = 0
    for kind, body in chunks:
        header = CHUNK_HEADER.pack(0, kind, len(body))[4:]
        crc = crc32(body, crc32(header, crc))
        yield crc.to_bytes(4, "little") + header
        yield body


def unpack(disk: Disk, path: str) -> Iterator[tuple[int, bytes]]:
    """The (kind, body) chunks of a checkpoint file. Raises DataDamaged at what fails its check."""
    with closing(disk.open_read(path)) as file:
        offset = _read_header(file, path)[0]
        crc = 0
        size = file.size()
        while True:
            header = file.pread(CHUNK_HEADER.size, offset)
            if len(header) < CHUNK_HEADER.size:
                raise DataDamaged(path, offset, file.fault or "the checkpoint has no end")
            expected, kind, length = CHUNK_HEADER.unpack(header)
            if offset + len(header) + length > size:
                raise DataDamaged(path, offset, "a chunk reaches past the end of the file")
            body = file.pread(length, offset + len(header))
            crc = crc32(body, crc32(header[4:], crc))
            if crc != expected:
                raise DataDamaged(path, offset, file.fault or "a chunk does not match its checksum")
            offset += len(header) + length
            if kind == END and offset != size:
                raise DataDamaged(path, offset, "bytes follow the end of the checkpoint")
            yield kind, body
            if kind == END:
                return


def _read_header(file: File, path: str) -> tuple[int, Version]:
    """The offset of the first chunk, and the oldest etcdlite that may open the data. Raises
    DataDamaged."""
    header = file.pread(FILE_HEADER.size, 0)
    if len(header) < FILE_HEADER.size or header[:8] != MAGIC:
        raise DataDamaged(path, 0, file.fault or "this is not a checkpoint")
    version = FILE_HEADER.unpack(header)[1]
    if version == layout.SEALED_VERSION:
        raise layout.KeyMissing(path, file.pread(8, 20))
    if version > NEWER_VERSION:
        raise layout.DataVersionError(path, version)
    if version == FORMAT_VERSION:
        return FILE_HEADER.size, OLDEST
    if version != NEWER_VERSION:
        raise DataDamaged(path, 8, f"there is no format version {version}")
    numbers = file.pread(NEEDS.size, FILE_HEADER.size)
    if len(numbers) < NEEDS.size:
        raise DataDamaged(path, FILE_HEADER.size, file.fault or "the header is cut off")
    needs = Version(*NEEDS.unpack(numbers))
    if needs > CURRENT:
        raise layout.DataVersionError(path, version, needs)
    return FILE_HEADER.size + NEEDS.size, needs


def needed_version(disk: Disk, directory: str) -> Version:
    """The oldest etcdlite that may open the data in a data folder. Raises DataDamaged, OSError."""
    path = f"{directory}/{NAME}"
    with closing(disk.open_read(path)) as file:
        return _read_header(file, path)[1]


def applied_index(disk: Disk, directory: str) -> int:
    """The applied index of the checkpoint in a data folder. Raises DataDamaged, OSError."""
    for kind, body in unpack(disk, f"{directory}/{NAME}"):
        if kind == META:
            return int(layout.U64.unpack_from(body, 16)[0])
    raise DataDamaged(f"{directory}/{NAME}", 0, "the checkpoint has no META chunk")
