"""The data file: every record of the state machine, appended to segments, read by location.

A write does not sync the data file; the write-ahead log covers it. A checkpoint (`checkpoint.py`)
makes it durable: it syncs the segments, and then old segments of the log can go. After a crash,
recovery scans what follows the checkpoint, cuts it at the first record that fails its check, and
writes the rest again from the log. `layout.py` says what the segments look like.

Invariants:

- Bytes before `offset` of the active segment, and all bytes of the others, never change. A segment
  goes away as a whole, after its live records were copied to the tail and synced (`cleaning.py`).
- The records of one revision, unless it is compacted, are side by side in one segment.
- Every read checks the record's checksum. A damaged record is an error, never a value.

With keys, the files are sealed page by page (`sealed.py`); here they look the same, with the same
offsets. Only the end differs: a page is written when it is full, so `fill_page` fills it before a
sync that counts, with a BUCKET record that removes a key that does not exist, and a mark.
"""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from zlib import crc32

from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.storage import layout
from etcdlite.storage.disk import TRANSIENT, Disk, File
from etcdlite.storage.layout import OFFSET_MASK, RECORD_HEADER, RECORD_HEADER_BYTES, DataDamaged

RECENT_OVERHEAD_BYTES = 160
"""What a recent record takes in memory besides its body: two objects and a place in a dict."""

MAX_DAMAGED = 10_000
"""Damaged records that are counted."""

SCAN_CHUNK_BYTES = 256 * 1024
"""Segments are scanned in pieces of this size."""

READ_BYTES = 512 << 10
"""Records side by side are read from the disk in pieces of up to this size."""

READ_GAP_BYTES = 4096
"""Reading this much that is not asked for takes less time than another read."""

MIN_SEGMENT_PAGES = 8
"""Cleaning a segment that is half garbage must free more pages than are filled (`fill_page`) by
the cleaning and by the checkpoint after it."""

MAX_SEGMENT_BYTES = 1 << 31
"""Beyond this size a segment cannot go on if the next one cannot be made: an offset has 32 bits."""

_NAME = re.compile(r"[0-9a-f]{16}\.seg")
_LEAST_FILL_BYTES = 2 * RECORD_HEADER_BYTES + layout.BUCKET_BODY.size + layout.MARK_BODY.size
"""The size of the two records of `DataFile.fill_page`, without anything that fills."""
_RECORD_WORD = struct.Struct("<4xI")


class DataFile:
    """Appends records to the active segment and reads them back by location."""

    def __init__(
        self, disk: Disk, directory: str, segment_bytes: int, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.disk = disk
        self.directory = directory
        self.segment_bytes = max(segment_bytes, MIN_SEGMENT_PAGES * disk.page_bytes)
        self._keep_bytes = limits.recent_bytes
        self._flush_bytes = limits.flush_bytes
        self.files: dict[int, File] = {}
        self.sizes: dict[int, int] = {}
        """Bytes of every segment that is not active."""
        self.garbage: dict[int, int] = {}
        """Bytes per segment that no index entry needs any more."""
        self.unsynced: set[int] = set()
        """Segments written to since `take_sync` was last called."""
        self.active = 0
        self.offset = 0
        self.base = 0
        """The location of offset 0 of the active segment."""
        self.flushed = 0
        """Bytes of the active segment that are in the file."""
        self.damaged: set[int] = set()
        """Locations of damaged records found so far, at most `MAX_DAMAGED`."""
        self.recent: dict[int, bytes] = {}
        """Bodies by location, written or read lately. When they are many, they become `older`."""
        self.older: dict[int, bytes] = {}
        self.out: list[bytes] = []
        """Records that wait for `flush`. `Store.put_all` adds records itself: it changes this,
        `recent`, `offset` and `recent_bytes`."""
        self.recent_bytes = 0

    def path(self, number: int) -> str:
        return f"{self.directory}/{layout.segment_name(number)}"

    # Writing.

    def append(self, kind: int, body: bytes) -> int:
        """Add a record; it reaches the file with `flush`. Returns its location."""
        location = self.append_block(layout.record(kind, body))
        self.recent[location] = body
        self.recent_bytes += len(body) + RECENT_OVERHEAD_BYTES
        return location

    def append_block(self, block: bytes) -> int:
        """Add whole records, made by `layout.record`. Returns the location of the first."""
        location = self.base | self.offset
        self.out.append(block)
        self.offset += len(block)
        return location

    def append_bucket(self, bucket: int, key: bytes, value: bytes | None) -> None:
        """Add a bucket record; `None` removes the key."""
        body = layout.BUCKET_BODY.pack(bucket, value is not None, len(key)) + key + (value or b"")
        self._append_unkept(layout.BUCKET, body)

    def append_mark(self, index: int, term: int, revision: int) -> None:
        """State that everything appended so far is the state after raft entry `index`."""
        self._append_unkept(layout.MARK, layout.MARK_BODY.pack(index, term, revision))

    def _append_unkept(self, kind: int, body: bytes) -> None:
        """Append a record that only recovery reads. It counts as garbage from the start, because
        the next checkpoint replaces it."""
        self.append_block(layout.record(kind, body))
        self.garbage[self.active] += RECORD_HEADER_BYTES + len(body)

    def flush(self) -> None:
        """Write what was appended to the file."""
        if self.out:
            active = self.active
            self.files[active].pwrite(b"".join(self.out), self.flushed)
            self.unsynced.add(active)
            self.out.clear()
            self.flushed = self.offset
            if self.recent_bytes > self._keep_bytes:
                self.older, self.recent, self.recent_bytes = self.recent, {}, 0

    def fill_page(self, index: int, term: int, revision: int) -> None:
        """Let all that was appended reach the file. Only right after `append_mark` with the same
        arguments and `flush`."""
        gap = -self.offset % self.disk.page_bytes
        if gap:
            if gap < _LEAST_FILL_BYTES:
                gap += self.disk.page_bytes
            filling = bytes(gap - _LEAST_FILL_BYTES)
            body = layout.BUCKET_BODY.pack(layout.CLEANED, False, 0) + filling
            self._append_unkept(layout.BUCKET, body)
            self.append_mark(index, term, revision)
            self.flush()

    def retract(self) -> None:
        """Drop the records that wait to be flushed, because there is no space for them. All of them
        must be counted as garbage, and nothing may refer to them."""
        self.garbage[self.active] -= self.offset - self.flushed
        self.offset = self.flushed
        self.out.clear()

    def drop_recent(self) -> None:
        """Forget the recent records, unless some wait to be flushed."""
        if not self.out:
            self.older, self.recent, self.recent_bytes = {}, {}, 0

    def flush_part(self) -> None:
        """Flush if `flush_bytes` wait. For large changes that are not complete yet: it keeps the
        write at their mark small."""
        if self.offset - self.flushed >= self._flush_bytes:
            self.flush()

    @property
    def is_full(self) -> bool:
        """The active segment has reached its size; `roll` at the next mark."""
        return self.offset >= self.segment_bytes

    def roll(self) -> None:
        """Seal the active segment and begin the next one. Nothing may wait to be flushed. Without a
        descriptor or space for it, the active one goes on if it can, and the next mark tries again.
        Raises OSError."""
        assert not self.out
        number, file = self.active + 1, None
        header = layout.SEGMENT_HEADER.pack(
            layout.MAGIC, layout.FORMAT_VERSION, number, self.offset, 0
        )[:-4]
        header += struct.pack("<I", crc32(header))
        try:
            file = self.disk.create(self.path(number), header)
            if self.active:
                self.files[self.active].finish()
        except OSError as failure:
            if file is not None:
                file.close()
                self.disk.unlink(file.path)
            goes_on = self.active and self.disk.may_append(self.files[self.active])
            if failure.errno not in TRANSIENT or not goes_on or self.offset > MAX_SEGMENT_BYTES:
                raise
            return
        if self.active:
            self.sizes[self.active] = self.offset
        self.files[number] = file
        self.garbage[number] = 0
        self._activate(number, len(header))
        self.unsynced.add(number)

    def _activate(self, number: int, offset: int) -> None:
        self.active = number
        self.base = number << 32
        self.offset = self.flushed = offset

    def take_sync(self) -> Callable[[], None]:
        """Disk work that makes what the files hold now durable. Run it once, in any thread."""
        files = [self.files[number] for number in sorted(self.unsynced)]
        self.unsynced.clear()

        def sync() -> None:
            for file in files:
                file.sync()
            self.disk.sync_dir(self.directory)

        return sync

    # Reading.

    def read(self, location: int, size_bytes: int) -> bytes:
        """The body of `size_bytes` at `location`. Raises DataDamaged if it fails its check."""
        body = self.recent.get(location)
        if body is not None:
            return body
        body = self.older.get(location)
        if body is None:
            number = location >> 32
            offset = location & OFFSET_MASK
            if number not in self.files:
                raise self._damage(location, "the segment is missing")
            data = self._pread(number, size_bytes + RECORD_HEADER_BYTES, offset)
            body = data[RECORD_HEADER_BYTES:]
            if len(body) != size_bytes:
                raise self._damage(location, "the file ends inside a record")
            crc, word = RECORD_HEADER.unpack_from(data)
            if word >> 4 != size_bytes or crc32(body, word) != crc:
                raise self._damage(location, "a record does not match its checksum")
        self.recent[location] = body
        self.recent_bytes += size_bytes + RECENT_OVERHEAD_BYTES
        if self.recent_bytes > self._keep_bytes and not self.out:
            self.older, self.recent, self.recent_bytes = self.recent, {}, 0
        return body

    def read_all(self, records: Sequence[tuple[int, int]]) -> list[bytes | memoryview]:
        """The bodies at these (location, size), as `read`. Those that follow each other closely in
        the file take one read of the disk. They are not kept in `recent`: lists would drive out
        records that are read often."""
        bodies: list[bytes | memoryview] = []
        at, count = 0, len(records)
        recent, older = self.recent, self.older
        while at < count:
            location, size_bytes = records[at]
            stop = at + 1
            if body := recent.get(location) or older.get(location):
                bodies.append(body)
                at = stop
                continue
            end = location + size_bytes + RECORD_HEADER_BYTES
            limit = location + READ_BYTES
            while stop < count:
                following, size = records[stop]
                next_end = following + size + RECORD_HEADER_BYTES
                if not (end <= following <= end + READ_GAP_BYTES and next_end <= limit):
                    break
                end = next_end
                stop += 1
            if stop > at + 1 and location >> 32 in self.files:
                self._read_run(records[at:stop], end - location, bodies)
            else:
                bodies.append(self.read(location, size_bytes))
                stop = at + 1
            at = stop
        return bodies

    def _read_run(
        self, records: Sequence[tuple[int, int]], size_bytes: int, bodies: list[bytes | memoryview]
    ) -> None:
        """Append the bodies of records that lie within `size_bytes` of the first one's location."""
        first = records[0][0]
        try:
            run = self.files[first >> 32].pread(size_bytes, first & OFFSET_MASK)
        except OSError:
            run = b""  # Perhaps only a part cannot be read.
        view = memoryview(run)
        unpack = RECORD_HEADER.unpack_from
        is_whole = len(run) == size_bytes
        for location, size in records:
            at = location - first
            if is_whole:
                crc, word = unpack(run, at)
                at += RECORD_HEADER_BYTES
                body = view[at : at + size]
                if word >> 4 == size and crc32(body, word) == crc:
                    bodies.append(body)
                    continue
            bodies.append(self.read(location, size))  # It raises the right DataDamaged.

    def records(
        self, number: int, offset: int, chunk_bytes: int = SCAN_CHUNK_BYTES
    ) -> Iterator[tuple[int, int, bytes]]:
        """The flushed records of a segment from `offset` on: (location, type, body) each.

        Raises DataDamaged, with the record's own offset, where a record fails its check."""
        end = self._end(number)
        base = number << 32
        chunk = b""
        start = offset
        while offset < end:
            position = offset - start
            if position + RECORD_HEADER_BYTES > len(chunk):
                chunk = self._pread(number, min(chunk_bytes, end - offset), offset)
                start, position = offset, 0
                if len(chunk) < RECORD_HEADER_BYTES:
                    raise self._damage(base | offset, "the file ends inside a record")
            crc, word = RECORD_HEADER.unpack_from(chunk, position)
            size = word >> 4
            position += RECORD_HEADER_BYTES
            if position + size > len(chunk):
                if offset + RECORD_HEADER_BYTES + size > end:
                    raise self._damage(base | offset, "a record reaches past the end")
                want = max(chunk_bytes, size + RECORD_HEADER_BYTES)
                chunk = self._pread(number, min(want, end - offset), offset)
                start, position = offset, RECORD_HEADER_BYTES
            body = chunk[position : position + size]
            # Zeros, which a crash may leave, have the right checksum for an empty record of type 0.
            if len(body) != size or crc32(body, word) != crc or not word:
                raise self._damage(base | offset, "a record does not match its checksum")
            yield base | offset, word & 15, body
            offset += RECORD_HEADER_BYTES + size

    def block(
        self, number: int, offset: int, chunk_bytes: int, max_records: int = 1 << 32
    ) -> tuple[list[int], list[bytes], int]:
        """The next flushed records of a segment from `offset` on, up to `max_records`: their types,
        their bodies, and the offset after them. They have up to `chunk_bytes`, or are one larger
        one; at the end there are none. Takes half the time of `records`; raises the same errors."""
        # Flat: a large store has millions of records.
        end = self._end(number)
        if offset >= end:
            return [], [], offset
        chunk = self._pread(number, min(chunk_bytes, end - offset), offset)
        size = len(chunk)
        unpack = RECORD_HEADER.unpack_from
        kinds: list[int] = []
        bodies: list[bytes] = []
        at, begin = 0, RECORD_HEADER_BYTES
        while begin <= size and len(kinds) < max_records:
            crc, word = unpack(chunk, at)
            stop = begin + (word >> 4)
            body = chunk[begin:stop]
            if stop > size or crc32(body, word) != crc or not word:
                break
            kinds.append(word & 15)
            bodies.append(body)
            at = stop
            begin = stop + RECORD_HEADER_BYTES
        if not at:
            # It is larger than a chunk, or damaged.
            _, kind, body = next(self.records(number, offset, chunk_bytes))
            return [kind], [body], offset + RECORD_HEADER_BYTES + len(body)
        return kinds, bodies, offset + at

    def words(self, number: int, offset: int, chunk_bytes: int) -> tuple[list[int], int]:
        """As `block`, but returns only the headers (length << 4 | type) and the offset after the
        records. No checksum is checked: after damage, headers and offset may be wrong."""
        size = max(0, min(chunk_bytes, self._end(number) - offset))
        chunk = self.files[number].pread(size, offset)
        unpack = _RECORD_WORD.unpack_from
        words: list[int] = []
        at, last = 0, len(chunk) - RECORD_HEADER_BYTES
        while at <= last:
            (word,) = unpack(chunk, at)
            words.append(word)
            at += 8 + (word >> 4)
        return words, offset + at

    def _end(self, number: int) -> int:
        return self.flushed if number == self.active else self.sizes[number]

    def _pread(self, number: int, size_bytes: int, offset: int) -> bytes:
        """Read a segment. Raises DataRefused, which no start cuts off, if the disk cannot."""
        try:
            return self.files[number].pread(size_bytes, offset)
        except OSError as failure:
            if failure.errno != errno.EIO:
                raise
            why = f"the disk cannot read it ({failure.strerror})"
            raise self._damage(number << 32 | offset, why, layout.DataRefused) from failure

    def _damage(
        self, location: int, why: str, kind: type[DataDamaged] = DataDamaged
    ) -> DataDamaged:
        if len(self.damaged) < MAX_DAMAGED:
            self.damaged.add(location)
        file = self.files.get(location >> 32)
        if file is not None and file.fault:
            why = file.fault
        return kind(self.path(location >> 32), location & OFFSET_MASK, why)

    # Size.

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes.values()) + self.offset

    @property
    def garbage_bytes(self) -> int:
        return sum(self.garbage.values())

    def add_garbage(self, location: int, size_bytes: int) -> None:
        """Count the record at `location`, with a body of `size_bytes`, as not needed."""
        number = location >> 32
        if number in self.garbage:
            self.garbage[number] += size_bytes + RECORD_HEADER_BYTES

    # Opening and closing.

    def open_segments(self) -> None:
        """Open what is on disk and make the last segment active. Does not read headers, see
        `check_header`."""
        for name in self.disk.list(self.directory):
            path = f"{self.directory}/{name}"
            if name.endswith(".seg.tmp"):
                self.disk.unlink(path)  # A crash interrupted the replacement of a sealed segment.
            if not _NAME.fullmatch(name):
                continue
            file = self.disk.open(path)
            number = int(name[:16], 16)
            self.files[number] = file
            self.sizes[number] = file.size()
            self.garbage.setdefault(number, 0)
        if self.files:
            last = max(self.files)
            self._activate(last, self.sizes.pop(last))

    def check_header(self, number: int) -> int:
        """Check the header of a segment; returns the end of the segment before it, as the header
        says. Raises DataDamaged, DataVersionError."""
        file = self.files[number]
        header = file.pread(layout.SEGMENT_HEADER.size, 0)
        if len(header) < layout.SEGMENT_HEADER.size:
            raise DataDamaged(file.path, 0, file.fault or "the file is shorter than its header")
        magic, version, found, previous_end, crc = layout.SEGMENT_HEADER.unpack(header)
        if magic != layout.MAGIC or crc32(header[:-4]) != crc or found != number:
            raise DataDamaged(file.path, 0, "the segment header fails its check")
        if version == layout.SEALED_VERSION:
            raise layout.KeyMissing(file.path, header[20:28])
        if version > layout.FORMAT_VERSION:
            raise layout.DataVersionError(file.path, version)
        return int(previous_end)

    def cut(self, number: int, offset: int) -> None:
        """Drop everything from `offset` of segment `number` on, later segments included. Durable
        on return, so that nothing dropped comes back behind what is written there next. Begins the
        next segment if a sealed one cannot be continued there."""
        later = sorted(n for n in self.files if n > number)
        for last in reversed(later):
            self.drop_segment(last)
        self.sizes.pop(number, None)
        self._activate(number, offset)
        file = self.files[number]
        if file.size() != offset or later:
            file.truncate(offset)
            file.sync()
            self.disk.sync_dir(self.directory)
        if not self.disk.may_append(file):
            self.roll()

    def drop_segment(self, number: int) -> None:
        """Close a segment and remove its file."""
        file = self.files.pop(number)
        file.close()
        self.disk.unlink(file.path)
        self.sizes.pop(number, None)
        self.garbage.pop(number, None)
        self.unsynced.discard(number)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()


def verify(disk: Disk, directory: str) -> None:
    """Read every record of a data folder that is not in use. Raises DataDamaged at the first
    record that fails its check."""
    with closing(DataFile(disk, directory, 0)) as data:
        data.open_segments()
        for number in sorted(data.files):
            data.check_header(number)
            for _ in data.records(number, layout.SEGMENT_HEADER.size):
                pass
