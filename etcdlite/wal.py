"""The write-ahead log: what a member promises is on stable storage before it says so.

It holds Raft's entries, hard state and snapshot markers. One `save` is one frame: one write and one
`fdatasync`, however many entries it carries. When `save` returns, its content survives a loss of
power; before that, nothing may depend on it.

Invariants
    A frame is written only after the frame before it was synced, into reserved space that reads
    as zeros. So only the last frame can be torn by a crash, and a sector of it that was not written
    is all zeros.
    Every byte before the end of the log is covered by a checksum; every byte after it is zero.
    A segment is complete (header written and synced, file renamed, folder synced) before its first
    frame is written. Its header repeats the state of the log up to there, so that an earlier
    segment can be removed once a snapshot covers its entries.
    After an `OSError` the log refuses every later write, because the state of the file is unknown
    until it is opened again. The exception is a frame that finds no space: it is written again at
    the same place. It may be longer then, but never shorter: the rest of the first one would stay.
    If it no longer fits there, zeros replace the first one, because only the last segment may be
    torn.

The log never returns an entry that was not saved, and never drops one that was synced: unless the
last frame is provably torn, `WAL.open` raises `WALDamaged` and changes nothing.

There are no threads here; one thread at a time may call a `WAL`.

Segment file
    `%016x.wal`, the number being the segment sequence, which grows by one and never repeats. A
    segment under construction has `.tmp` appended. All numbers are little-endian, `crc` is CRC-32
    (ISO-HDLC, as in zlib). The size of the file is a multiple of 512 and never changes.

     offset  size  segment header
          0     8  magic "etcdlWAL"
          8     4  version, 1
         12     4  header_bytes: size of this header, a multiple of 512, at most MAX_HEADER_BYTES
         16     8  segment sequence, as in the name
         24     8  segment_bytes: size of the file
         32     4  salt: random, the same in all segments of a log
         36     4  chain: crc of the last frame before this segment, 0 in a new log
         40     8  sequence of the first frame of this segment; counts all frames of the log, from 1
         48     8  index of the last entry before this segment
         56     8  index of the latest snapshot
         64     8  term of the latest snapshot
         72     8  hard state: term
         80     8  hard state: vote
         88     8  hard state: commit
         96     4  metadata_bytes
        100        metadata, then zeros
         -4     4  crc of the header up to here

    Magic, version, header_bytes and the crc at the end have the same places in every version.
    Frames follow the header without gaps. After the last one the file is all zeros.

    Version 2 is sealed (`sealing.py`): all after the sequence of the first frame is different.

     offset  size  segment header, version 2
         48     8  id of the key
         56     4  sealed_bytes
         60        sealed piece of sealed_bytes: bytes 48 to the end of the metadata of version 1;
                   its place: "etcdlite log segment", bytes 0 to 59
                   zeros
         -4     4  crc of the header up to here

Frame
    A multiple of 32 bytes. Its header has 32 bytes, and header_bytes is a multiple of 512, so a
    frame header never crosses a sector boundary: it is written completely or not at all.

     offset  size  frame header
          0     4  magic "WALf"
          4     4  length of the body, a multiple of 32
          8     8  frame sequence, one more than in the frame before
         16     4  salt, as in the segment header
         20     4  crc of the body, seeded with the crc of the frame before (the chain)
         24     4  blank: the number of sectors that hold only zeros within the frame. Of a sector
                   at the border, only the part within the frame counts.
         28     4  crc of bytes 0 to 27

    The body is a sequence of records, then fewer than 32 zeros. In a sealed segment it is a sealed
    piece of that. Its place: "etcdlite log frame", the last 16 bytes (the tag) of the sealed piece
    of the segment header, frame sequence u64, offset of the frame in the file u64.

     offset  size  record
          0     1  type: 1 entry, 2 hard state, 3 snapshot marker (0: the body ends here)
          1     1  kind: of an entry, Raft's entry kind; of a marker, 1 if it discards the log
          2     2  0
          4     4  length of what follows
          8     8  entry: term         hard state: term      marker: index
         16     8  entry: index        hard state: vote      marker: term
         24        entry: data         hard state: commit, 8 bytes

Meaning
    An entry replaces an earlier one with the same index and drops all entries after that one. A
    marker drops all entries if it discards the log, or if its index is past the last entry; the
    next entry has the marker's index + 1.

Recovery
    Frames are read until only zeros are left. The last segment may end in a torn frame, which is
    overwritten with zeros and reported. A frame that fails its check counts as torn only in the
    last segment, and only
    (a) if its header is good, more of its sectors are all zero than `blank` says, and everything
        after it is zero; or
    (b) if the sector that should hold its header is all zero from there on, and no good header of
        a later frame follows. (The salt ensures that data of clients is not mistaken for one.)
    Anything else is damage: a wrong size, name or header, a bad checksum with no sector missing,
    bytes after the end, a gap in the sequence, a segment that does not continue the one before.
    One kind of damage looks like a torn frame: damage within the last frame that leaves one of its
    sectors all zero. It loses the last save, and is reported as torn.
    A sealed piece that does not open although its checksum is right was altered: damage, too.

    A good last frame may have been read from the page cache alone (the process was killed before
    its sync ended, or the sync failed). It is written again and synced before anything depends on
    it.

Keys
    New segments are sealed if there are keys. `WAL.open` begins a new segment if the last one is
    not sealed with the first key. It refuses a sealed log without its key, before it changes
    anything. `replace_segments` is for a change of keys. docs/encryption.md has what keys protect
    against.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterable, Sequence
from struct import Struct
from typing import NamedTuple
from zlib import crc32

from etcdlite.errors import REPLACE, Explained
from etcdlite.raft import HardState, Ready
from etcdlite.raft_log import Entry
from etcdlite.sealing import ID_BYTES, OVERHEAD_BYTES, TAG_BYTES, Key, Keyring, SealBroken, ids_text
from etcdlite.storage.disk import NO_SPACE, Disk, File, pause

VERSION = 1
SEALED_VERSION = 2
SECTOR_BYTES = 512
"""What a disk writes atomically."""
MAX_METADATA_BYTES = 32 << 10
MAX_HEADER_BYTES = 64 << 10
MAX_FRAME_BYTES = 256 << 20
"""Limit of one `save`."""
MIN_SEGMENT_BYTES = 2 * SECTOR_BYTES
COPY_FRAME_BYTES = 1 << 20
"""The size of the frames that `replace_segments` writes, without the last entry of each."""

_SEGMENT_MAGIC = b"etcdlWAL"
_SEGMENT_HEADER = Struct("<8sIIQQIIQQQQQQQI")
_PLAIN_BYTES = 48
"""The part of the segment header that no version seals."""
_SEAL = Struct("<8sI")
_SEALED_AT = _PLAIN_BYTES + _SEAL.size
_SEGMENT_PLACE = b"etcdlite log segment"
_FRAME_PLACE = b"etcdlite log frame"
_PLACE = Struct("<QQ")
_FRAME_MAGIC = b"WALf"
_FRAME_HEADER = Struct("<4sIQIIII")
_FRAME_HEADER_BYTES = 32
_CRC = Struct("<I")
_ENTRY = Struct("<BBHIQQ")
_HARD_STATE = Struct("<BBHIQQQ")
_MARKER = Struct("<BBHIQQ")
_END, _ENTRY_TYPE, _HARD_STATE_TYPE, _MARKER_TYPE = range(4)

_NAME = re.compile(r"[0-9a-f]{16}\.wal")
_ZERO_SECTOR = bytes(SECTOR_BYTES)
_ZEROS = bytes(64 << 10)


class WALError(Explained):
    """The log cannot be used."""


class WALDamaged(WALError):
    """The file at `path` fails its check at byte `offset`: `why`."""

    def __init__(self, path: str, offset: int, why: str) -> None:
        super().__init__(
            f"write-ahead log {path} is damaged at byte {offset}: {why}. Nothing was changed. "
            f"Check the disk. {REPLACE}"
        )
        self.path, self.offset, self.why = path, offset, why


class WALVersionError(WALError):
    """The file at `path` was written by a newer etcdlite, in format `version`."""

    def __init__(self, path: str, version: int) -> None:
        super().__init__(
            f"write-ahead log {path} has format version {version}, but this etcdlite reads up to "
            f"version {SEALED_VERSION}: a newer etcdlite wrote it. Nothing was changed. Start that "
            f"version again. Or: {REPLACE}"
        )
        self.version = version


class WALKeyMissing(WALError):
    """The file at `path` is sealed with the key `key_id`, which `keys` does not have."""

    def __init__(self, path: str, key_id: bytes, keys: Keyring | None) -> None:
        given = ids_text(keys.ids if keys is not None else ())
        super().__init__(
            f"write-ahead log {path} is encrypted with key {key_id.hex()}, but the keys given are: "
            f"{given}. Nothing was changed. Name the file with that key as --encryption-key-file."
        )


def key_id(head: bytes) -> bytes | None:
    """The id of the key of the segment that begins with `head`; None if the segment is plain, or if
    `head` is too short."""
    is_sealed = head[:8] == _SEGMENT_MAGIC and head[8:12] == SEALED_VERSION.to_bytes(4, "little")
    if not is_sealed or len(head) < _SEALED_AT:
        return None
    return head[_PLAIN_BYTES : _PLAIN_BYTES + ID_BYTES]


def is_plain(head: bytes) -> bool:
    """Whether the file that begins with `head` is a plain segment."""
    return head[:8] == _SEGMENT_MAGIC and head[8:12] == VERSION.to_bytes(4, "little")


class Recovered(NamedTuple):
    """What `WAL.open` found."""

    metadata: bytes
    hard_state: HardState
    """All zeros if none was saved."""
    snapshot: tuple[int, int]
    """(index, term) of the latest marker; (0, 0) if there is none."""
    entries: list[Entry]
    """Without gaps, up to `WAL.last_index`. Some that the snapshot covers may come first."""
    torn: str | None
    """A text for the log if a crash cut off the last frame, which has been removed."""


class _Seal(NamedTuple):
    """The key that seals the frames of a segment, and what their places begin with."""

    key: Key
    place: bytes

    def frame_place(self, sequence: int, position: int) -> bytes:
        return self.place + _PLACE.pack(sequence, position)


class Segment:
    """A file of the log."""

    def __init__(self, path: str, sequence: int, size_bytes: int) -> None:
        self.path = path
        self.sequence = sequence
        self.size_bytes = size_bytes
        self.last_index = 0
        """The highest index of an entry in this segment that no later entry replaces."""


class WAL:
    """An open log. Made by `WAL.create` or `WAL.open`.

    `hard_state`, `snapshot` (index, term) and `last_index` are those last saved; `failed` is True
    after an `OSError`, unless only space was missing: then `save` may be called again. Without
    `sync_enabled` (`unsafe-no-fsync`) a save survives the end of the process, but no power loss."""

    def __init__(
        self,
        disk: Disk,
        directory: str,
        metadata: bytes,
        salt: int,
        segment_bytes: int,
        keys: Keyring | None,
    ) -> None:
        self.sync_enabled = True
        self.write_s = 0.0
        """Seconds spent in writes of frames so far, without their syncs."""
        self.written_bytes = 0
        """The size of these frames."""
        self.failed = False
        self.hard_state = HardState(0, 0, 0)
        self.snapshot = (0, 0)
        self.last_index = 0
        self._disk = disk
        self._directory = directory
        self._metadata = metadata
        self._salt = salt
        self._segment_bytes = segment_bytes
        self._keys = keys
        self._seal: _Seal | None = None  # of the last segment; None if that is plain
        self.segments: list[Segment] = []
        self._file: File | None = None
        self._position = 0  # where the next frame goes in the last segment
        self._failed_bytes = 0  # the size of a frame that found no space there
        self._frame_sequence = 1  # of the next frame
        self._chain = 0  # crc of the last frame's body

    @classmethod
    def exists(cls, disk: Disk, directory: str) -> bool:
        """Whether `directory` holds a log (a `create` that was interrupted leaves none)."""
        return disk.exists(directory) and any(map(_NAME.fullmatch, disk.list(directory)))

    @classmethod
    def create(
        cls,
        disk: Disk,
        directory: str,
        metadata: bytes,
        segment_bytes: int,
        *,
        sync_enabled: bool = True,
        keys: Keyring | None = None,
    ) -> WAL:
        """Start an empty log; the folder is made if needed. Durable on return.

        `metadata` (at most MAX_METADATA_BYTES) is repeated in every segment. A segment takes
        `segment_bytes` on disk, rounded up to whole sectors, or what one larger save needs.
        Raises FileExistsError if there is a log already, OSError."""
        if len(metadata) > MAX_METADATA_BYTES or segment_bytes < MIN_SEGMENT_BYTES:
            raise ValueError(f"{len(metadata)} bytes of metadata, segments of {segment_bytes}")
        disk.make_dir(directory)
        if cls.exists(disk, directory):
            raise FileExistsError(errno.EEXIST, "there is a write-ahead log already", directory)
        _remove_unfinished(disk, directory)
        salt = int.from_bytes(os.urandom(4), "little")
        wal = cls(disk, directory, metadata, salt, segment_bytes, keys)
        wal.sync_enabled = sync_enabled
        wal._roll(0)
        if sync_enabled:
            disk.sync_dir(os.path.dirname(directory) or ".")
        return wal

    @classmethod
    def open(
        cls,
        disk: Disk,
        directory: str,
        segment_bytes: int,
        *,
        sync_enabled: bool = True,
        keys: Keyring | None = None,
    ) -> tuple[WAL, Recovered]:
        """Read the log and make it ready for `save`; what is returned is durable.

        `segment_bytes` is for new segments. Raises FileNotFoundError if there is no log,
        WALDamaged, WALVersionError, WALKeyMissing, OSError."""
        names = [name for name in disk.list(directory) if _NAME.fullmatch(name)]
        if not names:
            raise FileNotFoundError(errno.ENOENT, "there is no write-ahead log", directory)
        return _Recovery(disk, directory, names, keys).run(segment_bytes, sync_enabled)

    def has_room(self, size_bytes: int) -> bool:
        """This much still fits into the current segment."""
        return self._position + size_bytes <= self.segments[-1].size_bytes

    def save_all(self, saves: Sequence[Ready]) -> None:
        """Make durable what several Readys of consensus have to save, with as few syncs as their
        order allows. A snapshot replaces the log; its entries come after it. Raises as `save`."""
        if len(saves) == 1 and saves[0].snapshot is None:
            return self.save(*saves[0][:2])
        hard_state: HardState | None = None
        entries: list[Entry] = []
        for save in saves:
            if save.snapshot is not None:
                self.save(hard_state, entries)
                hard_state, entries = None, []
                self.mark_snapshot(save.snapshot.index, save.snapshot.term, discard_log=True)
            elif entries and save.entries and save.entries[0].index <= entries[-1].index:
                # They replace earlier ones.
                self.save(hard_state, entries)
                hard_state, entries = None, []
            hard_state = save.hard_state or hard_state
            entries += save.entries
        self.save(hard_state, entries)

    def save(self, hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        """Append. On return it is durable; after an error, either all of it or nothing is.

        Indexes of `entries` are consecutive; the first is above the snapshot's and at most
        `last_index` + 1. Entries from there on that were saved earlier are replaced. Raises OSError
        (then the log has `failed`, or no space), WALError if it had failed before, ValueError on
        more than MAX_FRAME_BYTES; then nothing was written."""
        parts: list[bytes] = []
        if hard_state is not None:
            parts.append(_HARD_STATE.pack(_HARD_STATE_TYPE, 0, 0, 24, *hard_state))
        if entries:
            first = last = entries[0].index
            assert self.snapshot[0] < first <= self.last_index + 1, (first, self.last_index)
            for term, index, kind, data in entries:
                assert index == last, (first, last, index)
                parts += (_ENTRY.pack(_ENTRY_TYPE, kind, 0, 16 + len(data), term, index), data)
                last += 1
        if parts:
            self._append(parts)
        if hard_state is not None:
            self.hard_state = hard_state
        if entries:
            self._replace_from(first)
            self.segments[-1].last_index = self.last_index = last - 1

    def cover(self, index: int, term: int, begin: int) -> None:
        """Note that the data file holds everything up to entry `index`, of `term`, and release
        entries up to `begin`, which no other member needs. Does nothing if a later snapshot was
        marked."""
        if index >= self.snapshot[0]:
            self.mark_snapshot(index, term)
            self.release(begin)

    def mark_snapshot(self, index: int, term: int, *, discard_log: bool = False) -> None:
        """Note durably that a snapshot holds everything up to entry `index`, which is of `term`.

        `discard_log` is for a snapshot from the leader that replaces a log that conflicts with it.
        A log that ends before `index` is always discarded, so for a snapshot of the member's own
        the saves up to `index` come first. Raises as `save`."""
        assert index >= self.snapshot[0], (index, self.snapshot)
        self._append([_MARKER.pack(_MARKER_TYPE, discard_log, 0, 16, index, term)])
        self._apply_marker(index, term, discard_log)

    def release(self, index: int) -> None:
        """Remove the oldest segments that hold only entries up to `index`, but never the last one.

        `index` is at most the snapshot's. Raises as `save`."""
        assert index <= self.snapshot[0], (index, self.snapshot)
        while len(self.segments) > 1 and self.segments[0].last_index <= index:
            self._begin_change()
            self._disk.unlink(self.segments[0].path)
            # One by one: a second segment gone before the first would leave a gap.
            self._sync_directory()
            self.failed = False
            del self.segments[0]

    def close(self) -> None:
        """Close the file. Everything saved is durable already."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def replace_segments(self, entries: Iterable[Entry]) -> None:
        """Write the log to one new segment, sealed with the first key, and remove the others, whose
        keys are not needed any more. `entries` are those of `Recovered`; what the snapshot covers
        is left out. A crash leaves the log as it was, at every step. Raises as `save`."""
        groups: list[list[bytes]] = []
        size_bytes = COPY_FRAME_BYTES
        for term, index, kind, data in entries:
            if index > self.snapshot[0]:
                if size_bytes >= COPY_FRAME_BYTES:
                    groups.append([])
                    size_bytes = 0
                head = _ENTRY.pack(_ENTRY_TYPE, kind, 0, 16 + len(data), term, index)
                groups[-1] += head, data
                size_bytes += len(head) + len(data)
        self._begin_change()
        self._roll(0, groups)
        self.failed = False
        for segment in self.segments[:-1]:
            segment.last_index = 0
        self.segments[-1].last_index = self.last_index
        self.release(self.snapshot[0])

    def _append(self, parts: list[bytes]) -> None:
        """Write and sync `parts` as one frame. Hot: two system calls."""
        body = b"".join(parts)
        size_bytes = _frame_bytes(len(body), self._seal)
        self._begin_change()
        if self._position + size_bytes > self.segments[-1].size_bytes:
            if self._failed_bytes:
                self._write(bytes(self._failed_bytes)).sync()
            self._roll(size_bytes)
        frame, chain = _frame(
            body, self._frame_sequence, self._position, self._salt, self._chain, self._seal
        )
        began = time.perf_counter()
        file = self._write(frame)
        self.write_s += time.perf_counter() - began
        self.written_bytes += size_bytes
        if self.sync_enabled:
            file.sync()
        self._position += size_bytes
        self._frame_sequence += 1
        self._chain = chain
        self.failed = False

    def _write(self, frame: bytes) -> File:
        """Write a frame in the next place. Without space (Btrfs and ZFS copy on write, so what is
        reserved does not help) this waits, or raises in the main thread, which must not wait."""
        assert self._file is not None
        while True:
            try:
                self._file.pwrite(frame, self._position)
                self._failed_bytes = 0
                return self._file
            except OSError as failure:
                if failure.errno not in NO_SPACE:
                    raise
                self._failed_bytes = len(frame)
                self.failed = False  # What was written does not count, and is overwritten.
                pause(failure)
                self.failed = True

    def _begin_change(self) -> None:
        """Until a change of the disk is complete, the log counts as failed: after a failure there
        is no other attempt."""
        if self.failed:
            raise WALError("an earlier write to the write-ahead log failed; it must be reopened")
        self.failed = True

    def _roll(self, frame_bytes: int, groups: Sequence[list[bytes]] = ()) -> None:
        """Start the next segment, with room for a frame of `frame_bytes`, or with a frame of each
        of `groups` of records in it. Durable on return.

        Reserves the space, so a full disk is found before anything is written; a thread waits
        for it."""
        sequence = self.segments[-1].sequence + 1 if self.segments else 1
        path = os.path.join(self._directory, f"{sequence:016x}.wal")
        key = self._keys.first if self._keys is not None else None
        extra = _CRC.size + (0 if key is None else _SEAL.size + OVERHEAD_BYTES)
        header_bytes = _whole_sectors(_SEGMENT_HEADER.size + len(self._metadata) + extra)
        bodies = [b"".join(parts) for parts in groups]
        frame_bytes += sum(_frame_bytes(len(body), key) for body in bodies)
        segment_bytes = _whole_sectors(max(self._segment_bytes, header_bytes + frame_bytes))
        version = VERSION if key is None else SEALED_VERSION
        state = self._salt, self._chain, self._frame_sequence, self.last_index
        numbers = *state, *self.snapshot, *self.hard_state, len(self._metadata)
        head = _SEGMENT_MAGIC, version, header_bytes, sequence, segment_bytes
        header = _SEGMENT_HEADER.pack(*head, *numbers)
        header, seal = _sealed_header(header + self._metadata, key)
        header = header.ljust(header_bytes - _CRC.size, b"\0")
        content = [header, _CRC.pack(crc32(header))]
        position, frame_sequence, chain = header_bytes, self._frame_sequence, self._chain
        for body in bodies:
            frame, chain = _frame(body, frame_sequence, position, self._salt, chain, seal)
            content.append(frame)
            position += len(frame)
            frame_sequence += 1
        file = self._disk.create(path + ".tmp", b"".join(content), segment_bytes)
        try:
            if self.sync_enabled:
                file.sync()
            self._disk.rename(path + ".tmp", path)
            file.path = path
            self._sync_directory()
        except BaseException:
            file.close()
            raise
        self.close()
        self._file, self._seal = file, seal
        self._position, self._frame_sequence, self._chain = position, frame_sequence, chain
        self.segments.append(Segment(path, sequence, segment_bytes))

    def _sync_directory(self) -> None:
        if self.sync_enabled:
            self._disk.sync_dir(self._directory)

    def _replace_from(self, index: int) -> None:
        """Forget the entries from `index` on."""
        if index <= self.last_index:
            self.last_index = index - 1
            for segment in self.segments:
                segment.last_index = min(segment.last_index, index - 1)

    def _apply_marker(self, index: int, term: int, discard_log: bool) -> bool:
        """Returns whether the marker drops the entries."""
        self.snapshot = (index, term)
        if not discard_log and index <= self.last_index:
            return False
        self._replace_from(1)
        self.last_index = index
        return True


class _Header(NamedTuple):
    header_bytes: int
    segment_bytes: int
    metadata: bytes
    salt: int
    chain: int
    frame_sequence: int
    last_index: int
    snapshot: tuple[int, int]
    hard_state: HardState


class _Recovery:
    """One run of `WAL.open`. It reads everything before it changes anything."""

    def __init__(self, disk: Disk, directory: str, names: list[str], keys: Keyring | None) -> None:
        self._disk = disk
        self._keys = keys
        self._directory = directory
        self._names = names
        self._entries: list[Entry] = []
        self._last_frame = 0  # where the last good frame of the last segment begins; 0: none

    def run(self, segment_bytes: int, sync_enabled: bool) -> tuple[WAL, Recovered]:
        wal: WAL | None = None
        file: File | None = None
        try:
            for name in self._names:
                path = os.path.join(self._directory, name)
                if file is not None:
                    file.close()
                file = self._disk.open(path)
                header, seal = _read_header(file, path, int(name[:16], 16), self._keys)
                if wal is None:
                    wal = self._begin(header, segment_bytes)
                wal._seal = seal
                self._check_continues(wal, path, header)
                wal.segments.append(Segment(path, int(name[:16], 16), header.segment_bytes))
                wal._position = header.header_bytes
                data = file.pread(header.segment_bytes, 0)
                torn_end = self._replay(wal, data, path, last=name == self._names[-1])
            assert wal is not None and file is not None
            index = wal.snapshot[0] + 1
            if index <= wal.last_index and not (self._entries and self._entries[0].index <= index):
                why = f"the segments before it, with entry {index}, are missing"
                raise WALDamaged(wal.segments[0].path, 0, why)
            wal.sync_enabled = sync_enabled
            torn = None
            if torn_end:
                torn = (
                    f"write-ahead log {path}: the write at byte {wal._position} (frame "
                    f"{wal._frame_sequence}) was cut off by a crash and never acknowledged; "
                    f"removed {torn_end - wal._position} bytes"
                )
                for position in range(wal._position, torn_end, len(_ZEROS)):
                    file.pwrite(_ZEROS[: torn_end - position], position)
            elif self._last_frame:
                file.pwrite(data[self._last_frame : wal._position], self._last_frame)
            if sync_enabled:
                file.sync()
            _remove_unfinished(self._disk, self._directory)
            wal._sync_directory()
            wal._file = file
            if self._keys is not None and (seal is None or seal.key is not self._keys.first):
                wal._roll(0)
        except BaseException:
            if file is not None:
                file.close()
            raise
        return wal, Recovered(wal._metadata, wal.hard_state, wal.snapshot, self._entries, torn)

    def _begin(self, header: _Header, segment_bytes: int) -> WAL:
        """The log as of the start of its first remaining segment, from that segment's header."""
        wal = WAL(
            self._disk, self._directory, header.metadata, header.salt, segment_bytes, self._keys
        )
        wal._chain = header.chain
        wal._frame_sequence = header.frame_sequence
        wal.last_index = header.last_index
        wal.snapshot = header.snapshot
        wal.hard_state = header.hard_state
        return wal

    def _check_continues(self, wal: WAL, path: str, header: _Header) -> None:
        """Raise WALDamaged unless the segment at `path` continues those read so far."""
        if wal.segments:
            before = wal.segments[-1]
            sequence = before.sequence + 1
            if not path.endswith(f"{sequence:016x}.wal"):
                missing = os.path.join(self._directory, f"{sequence:016x}.wal")
                raise WALDamaged(missing, 0, f"this segment is missing, but there is {path}")
            if header.salt == wal._salt and header.frame_sequence > wal._frame_sequence:
                raise WALDamaged(
                    before.path,
                    wal._position,
                    f"the segment ends before frame {wal._frame_sequence}, but the next segment "
                    f"begins with frame {header.frame_sequence}",
                )
        state = wal._metadata, wal._salt, wal._chain, wal._frame_sequence, wal.last_index
        if header[2:] != (*state, wal.snapshot, wal.hard_state):
            raise WALDamaged(path, 0, "the segment does not continue the one before it")

    def _replay(self, wal: WAL, data: bytes, path: str, last: bool) -> int:
        """Apply the frames of a segment, and leave `wal` at the end of the last good one.

        Returns the end of a torn frame after that, or 0. Raises WALDamaged. Hot: one loop over
        frames and records takes half to two thirds of the time of a call for each."""
        end, seal, segment = _used_bytes(data), wal._seal, wal.segments[-1]
        sequence, chain, position = wal._frame_sequence, wal._chain, wal._position
        last_index, covered = wal.last_index, wal.snapshot[0]
        entries, last_frame, hard_state = self._entries, 0, b""
        new, unpack, unpack_record = tuple.__new__, _FRAME_HEADER.unpack_from, _ENTRY.unpack_from
        while position < end:
            magic, length, found, salt, crc, blank, check = unpack(data, position)
            stop = position + _FRAME_HEADER_BYTES + length
            if check != crc32(data[position : position + 28]):
                if any(data[position : position + _FRAME_HEADER_BYTES]):
                    why = f"the header of frame {sequence} fails its check"
                    raise WALDamaged(path, position, why)
                other = _find_later_frame(data, position, end, sequence, wal._salt)
                if other:
                    why = f"zeros instead of frame {sequence}, with another frame at byte {other}"
                    raise WALDamaged(path, position, why)
                sector_end = position + SECTOR_BYTES - position % SECTOR_BYTES
                if not last or any(data[position:sector_end]):
                    raise WALDamaged(path, position, f"bytes after the end, before byte {end}")
                break
            if (found, salt, magic) != (sequence, wal._salt, _FRAME_MAGIC) or stop > len(data):
                raise WALDamaged(path, position, f"another frame in the place of frame {sequence}")
            body = data[position + _FRAME_HEADER_BYTES : stop]
            if crc != crc32(body, chain):
                if last and stop >= end and _blank(body, position) > blank:
                    break
                raise WALDamaged(path, position, f"the checksum of frame {sequence} does not match")
            if seal is not None:
                body = _opened(body, seal, sequence, path, position)
            at, body_bytes = 0, len(body)
            while at <= body_bytes - 24 and body[at]:
                record, kind, _, length, term, index = unpack_record(body, at)
                data_at = at + 24
                at += 8 + length
                if record == _ENTRY_TYPE and covered < index == last_index + 1:
                    entries.append(new(Entry, (term, index, kind, body[data_at:at])))
                    segment.last_index = last_index = index
                elif record == _HARD_STATE_TYPE:
                    hard_state = body[data_at - 24 : data_at + 8]
                else:
                    wal.last_index = last_index
                    entry = Entry(term, index, kind, body[data_at:at])
                    self._apply(wal, record, entry, path, position)
                    last_index, covered = wal.last_index, wal.snapshot[0]
            if at > body_bytes or (at < body_bytes and body[at]):
                raise WALDamaged(path, position, f"a record passes the end of frame {sequence}")
            chain, last_frame, position, sequence = crc, position, stop, sequence + 1
        wal._position, wal._frame_sequence, wal._chain = position, sequence, chain
        wal.last_index, self._last_frame = last_index, last_frame
        if hard_state:
            wal.hard_state = HardState(*_HARD_STATE.unpack(hard_state)[4:])
        return end if position < end else 0

    def _apply(self, wal: WAL, record: int, entry: Entry, path: str, start: int) -> None:
        """Apply an unusual record of the frame at `start`. If it is invalid, it was written so."""
        entries, index = self._entries, entry.index
        if record == _ENTRY_TYPE:
            if not wal.snapshot[0] < index <= wal.last_index + 1:
                raise WALDamaged(path, start, f"entry {index} comes after entry {wal.last_index}")
            if index <= wal.last_index:
                wal._replace_from(index)
                del entries[max(0, index - entries[0].index) if entries else 0 :]
            entries.append(entry)
            wal.segments[-1].last_index = wal.last_index = index
        elif record == _MARKER_TYPE:  # It has index and term in the other order.
            if wal._apply_marker(entry.term, index, bool(entry.kind)):
                entries.clear()
        else:
            raise WALDamaged(path, start, f"record of unknown type {record}")


def _read_header(
    file: File, path: str, sequence: int, keys: Keyring | None
) -> tuple[_Header, _Seal | None]:
    """The checked header of a segment, and the seal of its frames. Raises WALDamaged,
    WALVersionError, WALKeyMissing."""
    size_bytes = file.size()
    head = file.pread(MAX_HEADER_BYTES, 0)
    if not any(head):
        raise WALDamaged(path, 0, "the file is empty" if not head else "no segment header")
    if len(head) < _SEGMENT_HEADER.size:
        raise WALDamaged(path, size_bytes, "the file ends inside its header")
    magic, version, header_bytes = _SEGMENT_HEADER.unpack_from(head)[:3]
    if magic != _SEGMENT_MAGIC:
        raise WALDamaged(path, 0, "this is not a segment of a write-ahead log")
    if header_bytes > size_bytes and header_bytes <= MAX_HEADER_BYTES:
        raise WALDamaged(path, size_bytes, "the file ends inside its header")
    crc_at = header_bytes - _CRC.size
    if not _SEGMENT_HEADER.size <= crc_at <= len(head) - _CRC.size:
        raise WALDamaged(path, 12, f"the segment header cannot have {header_bytes} bytes")
    if _CRC.unpack_from(head, crc_at)[0] != crc32(head[:crc_at]):
        raise WALDamaged(path, 0, "the checksum of the segment header does not match")
    seal = None
    if version == SEALED_VERSION:
        head, seal = _unsealed_header(path, head, keys)
    elif version != VERSION:
        raise WALVersionError(path, version)
    _, _, _, named, segment_bytes, salt, chain, *rest = _SEGMENT_HEADER.unpack_from(head)
    frame, last, snapshot_index, snapshot_term, term, vote, commit, metadata_bytes = rest
    if named != sequence:
        raise WALDamaged(path, 16, f"this is segment {named:016x} under another name")
    if size_bytes != segment_bytes:
        why = f"the file has {size_bytes} bytes instead of {segment_bytes}"
        raise WALDamaged(path, min(size_bytes, segment_bytes), why)
    metadata = head[_SEGMENT_HEADER.size : _SEGMENT_HEADER.size + metadata_bytes]
    snapshot, hard_state = (snapshot_index, snapshot_term), HardState(term, vote, commit)
    state = salt, chain, frame, last, snapshot, hard_state
    return _Header(header_bytes, segment_bytes, metadata, *state), seal


def _opened(body: bytes, seal: _Seal, sequence: int, path: str, start: int) -> bytes:
    """The records of a sealed frame. Raises WALDamaged."""
    try:
        return seal.key.open(body, seal.frame_place(sequence, start))
    except SealBroken:
        why = f"frame {sequence} was altered, or put there from another place"
        raise WALDamaged(path, start, why) from None


def _frame_bytes(length: int, seal: object) -> int:
    """The size of a frame that holds `length` bytes of records. Raises ValueError on more than
    MAX_FRAME_BYTES."""
    if seal is not None:
        length += OVERHEAD_BYTES
    if length + _FRAME_HEADER_BYTES > MAX_FRAME_BYTES:
        raise ValueError(f"a save of {length} bytes, the limit is {MAX_FRAME_BYTES}")
    return _FRAME_HEADER_BYTES + length + -length % _FRAME_HEADER_BYTES


def _frame(
    body: bytes, sequence: int, position: int, salt: int, chain: int, seal: _Seal | None
) -> tuple[bytes, int]:
    """The frame of the records in `body`, to be written at `position`, and the crc of its body.
    `chain`: the crc of the frame before."""
    if seal is None:
        body += bytes(-len(body) % _FRAME_HEADER_BYTES)
    else:
        body += bytes(-(len(body) + OVERHEAD_BYTES) % _FRAME_HEADER_BYTES)
        body = seal.key.seal(body, seal.frame_place(sequence, position))
    chain = crc32(body, chain)
    return frame_header(len(body), sequence, salt, chain, _blank(body, position)) + body, chain


def _sealed_header(plain: bytes, key: Key | None) -> tuple[bytes, _Seal | None]:
    """A segment header without zeros and crc, sealed if there is a key, and the seal of its frames.
    `plain`: the header of version 1, with the metadata."""
    if key is None:
        return plain, None
    text = plain[_PLAIN_BYTES:]
    head = plain[:_PLAIN_BYTES] + _SEAL.pack(key.id, len(text) + OVERHEAD_BYTES)
    sealed = key.seal(text, _SEGMENT_PLACE + head)
    return head + sealed, _Seal(key, _FRAME_PLACE + sealed[-TAG_BYTES:])


def _unsealed_header(path: str, head: bytes, keys: Keyring | None) -> tuple[bytes, _Seal]:
    """The reverse of `_sealed_header` with a key. Raises WALKeyMissing, WALDamaged."""
    key_id, sealed_bytes = _SEAL.unpack_from(head, _PLAIN_BYTES)
    key = keys.find(key_id) if keys is not None else None
    if key is None:
        raise WALKeyMissing(path, key_id, keys)
    sealed = head[_SEALED_AT : _SEALED_AT + sealed_bytes]
    try:
        text = key.open(sealed, _SEGMENT_PLACE + head[:_SEALED_AT])
    except SealBroken:
        raise WALDamaged(path, _SEALED_AT, "the segment header was altered") from None
    return head[:_PLAIN_BYTES] + text, _Seal(key, _FRAME_PLACE + sealed[-TAG_BYTES:])


def frame_header(length: int, sequence: int, salt: int, chain: int, blank: int) -> bytes:
    header = _FRAME_HEADER.pack(_FRAME_MAGIC, length, sequence, salt, chain, blank, 0)[:-4]
    return header + _CRC.pack(crc32(header))


def _blank(body: bytes, position: int) -> int:
    """How many sectors of the frame at `position` contain only zeros.

    The sector with the header is never one of them. For nearly every frame two searches are enough,
    which take 2 us for 100 KB."""
    start = SECTOR_BYTES - _FRAME_HEADER_BYTES - position % SECTOR_BYTES
    if body.find(_ZERO_SECTOR, start) < 0 and any(body[-32:]):
        return 0
    return sum(
        _ZERO_SECTOR.startswith(body[at : at + SECTOR_BYTES])
        for at in range(start, len(body), SECTOR_BYTES)
    )


def _used_bytes(data: bytes) -> int:
    """The offset of the zeros at the end of `data`."""
    end = len(data)
    while end and data[max(0, end - len(_ZEROS)) : end] == _ZEROS:
        end -= len(_ZEROS)
    begin = max(0, end - len(_ZEROS))
    return begin + len(data[begin:end].rstrip(b"\0"))


def _find_later_frame(data: bytes, start: int, end: int, sequence: int, salt: int) -> int:
    """The offset of a good header of a frame after `sequence`, between `start` and `end`, or 0.

    A client may have stored a copy of an earlier part of the log, but cannot know a later one."""
    at = data.find(_FRAME_MAGIC, start, end)
    while at >= 0:
        header = data[at : at + _FRAME_HEADER_BYTES]
        if at % _FRAME_HEADER_BYTES == 0:
            _, _, found, found_salt, _, _, check = _FRAME_HEADER.unpack(header)
            if check == crc32(header[:28]) and found > sequence and found_salt == salt:
                return at
        at = data.find(_FRAME_MAGIC, at + 1, end)
    return 0


def _remove_unfinished(disk: Disk, directory: str) -> None:
    """Remove a segment that a crash left unfinished; it was never used."""
    for name in disk.list(directory):
        if name.endswith(".wal.tmp"):
            disk.unlink(os.path.join(directory, name))


def _whole_sectors(size_bytes: int) -> int:
    return -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES
