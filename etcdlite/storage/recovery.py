"""Recovery: the state that the files of a data folder add up to.

A start loads the checkpoint, and then takes in the records of the data file behind the place where
that checkpoint began, up to the last mark. The rest, which a crash may have left incomplete, is cut
off; the write-ahead log has it. To take a record in twice makes no difference, so a checkpoint may
hold changes that the scan meets again.

Recovery never guesses: a record that fails its check before the end that the checkpoint vouches
for, or a segment that is missing or has another size, is DataDamaged. Nothing on disk is changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from etcdlite import proto
from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.storage import checkpoint, layout
from etcdlite.storage.data import SCAN_CHUNK_BYTES, DataFile
from etcdlite.storage.disk import Disk
from etcdlite.storage.index import HEAD, Index
from etcdlite.storage.layout import BUCKET, MARK, MOVED, PUT, RECORD_HEADER_BYTES, DataDamaged
from etcdlite.storage.past import DEAD
from etcdlite.versions import OLDEST


class Contents:
    """What a data folder holds: nothing yet, or what `load` has found there."""

    def __init__(
        self, disk: Disk, directory: str, segment_bytes: int, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.data = DataFile(disk, directory, segment_bytes, limits)
        self.index = Index(limits)
        self.revision = 1
        self.applied_index = 0
        self.applied_term = 0
        self.buckets: dict[int, dict[bytes, bytes]] = {}
        self.checkpoint_version = OLDEST
        self.checkpoint_begin = (0, 0)
        """Where the scan began: (segment, offset)."""
        self.packed_bytes = 0  # of the checkpoint
        self.cut: DataDamaged | None = None
        """What made the scan end early, after a crash; None if the data file was whole."""
        self._moved_revision = 0
        """The revision of the last MOVED record since a mark: only its first one begins it."""
        self._new: dict[bytes, bytes] = {}
        """The heads that the scan has found, until they are entered in the index together."""

    def load(self) -> None:
        """The state as of the last mark. Raises DataDamaged; ValueError, LookupError and
        struct.error if what is in the files was never written by this program."""
        self.checkpoint_version = checkpoint.needed_version(self.data.disk, self.data.directory)
        begin, end, listed = self._load_checkpoint()
        data = self.data
        data.open_segments()
        if begin[0] not in data.files:
            raise DataDamaged(data.path(begin[0]), 0, "the segment is missing")
        for number, file in data.files.items():
            if number >= begin[0]:
                # After a kill or a failed sync, only the page cache may hold these bytes. They
                # are written again, so that what is read here cannot be lost later.
                file.rewrite(begin[1] if number == begin[0] else 0, file.size())
        self._scan(begin, end)
        self._settle()
        data.unsynced.update(n for n in data.files if n >= begin[0])
        self._check_segments(listed, begin[0])
        data.damaged.clear()  # A crash may have torn the end, which is cut off.

    def append_change(self, kind: int, body: bytes) -> None:
        """Append a PUT or TOMBSTONE to an imported history. Revisions must ascend. Raises
        ValueError if the same revision has already changed the key."""
        location = self.data.append(kind, body)
        self._replay(location, (kind,), (body,))
        self._settle()
        key, mod = layout.key_and_revision(body)
        if not self.index.is_at(key, mod, location):
            raise ValueError(f"revision {mod} changes a key twice")

    def _load_checkpoint(self) -> tuple[tuple[int, int], tuple[int, int], dict[int, int]]:
        """Returns where to scan from, how far the data file must reach, and the segments that must
        be there, with their sizes in bytes."""
        path = f"{self.data.directory}/{checkpoint.NAME}"
        index = self.index
        listed: dict[int, int] = {}
        end = (0, 0)
        first_chunk = True
        for kind, body in checkpoint.unpack(self.data.disk, path):
            if first_chunk != (kind == checkpoint.META):
                raise DataDamaged(path, 0, "the checkpoint does not begin with its META chunk")
            first_chunk = False
            self.packed_bytes += len(body)
            if kind == checkpoint.HEADS:
                index.load_heads(body)
            elif kind == checkpoint.PAST:
                index.load_past(body)
            elif kind == checkpoint.BUCKET:
                self._load_bucket(body, True)
            elif kind == checkpoint.REVISIONS:
                index.load_revisions(body)
            elif kind == checkpoint.META:
                fields = [number for (number,) in layout.U64.iter_unpack(body)]
                self.checkpoint_begin = (fields[0], fields[1])
                self.applied_index, self.applied_term, self.revision = fields[2:5]
                for at in range(6, len(fields), 3):
                    number, size, garbage = fields[at : at + 3]
                    listed[number] = size
                    self.data.garbage[number] = garbage
            elif kind == checkpoint.END:
                end = layout.POSITION.unpack(body)
        return self.checkpoint_begin, end, listed

    def _scan(self, begin: tuple[int, int], end: tuple[int, int]) -> None:
        """Take in the records behind the checkpoint up to the last mark; cut off the rest."""
        data = self.data
        number, offset = valid = begin
        size = data.sizes.get(number, data.offset)
        if size < offset:
            why = f"it has {size} bytes instead of {offset} or more"
            raise DataDamaged(data.path(number), size, why)
        data.check_header(number)
        try:
            while number in data.files:
                location = number << 32 | offset
                waiting: tuple[list[int], list[bytes]] = [], []
                """Records from `location` on that no mark follows yet: their types and bodies."""
                while True:
                    kinds, bodies, offset = data.block(number, offset, SCAN_CHUNK_BYTES)
                    if not kinds:
                        break
                    waiting[0].extend(kinds)
                    waiting[1].extend(bodies)
                    if MARK in kinds:
                        rest = len(kinds) - kinds[::-1].index(MARK)
                        count = len(waiting[0]) - len(kinds) + rest
                        location = self._replay(location, waiting[0][:count], waiting[1][:count])
                        waiting = kinds[rest:], bodies[rest:]
                        valid = (number, location & layout.OFFSET_MASK)
                if waiting[0]:
                    break
                number, offset = number + 1, layout.SEGMENT_HEADER.size
                if number in data.files:
                    if data.check_header(number) != valid[1]:
                        path = data.path(valid[0])
                        raise DataDamaged(path, valid[1], "the end of the segment is missing")
                    valid = (number, offset)
        except layout.DataRefused:
            raise  # No crash left this, so it must not be cut off.
        except DataDamaged as damage:
            if valid < end:
                raise
            self.cut = damage
        if valid < end:
            why = "records that the checkpoint counts on are missing"
            raise DataDamaged(data.path(valid[0]), valid[1], why)
        data.cut(*valid)

    def _check_segments(self, listed: dict[int, int], active: int) -> None:
        """Every segment of the checkpoint must be there, whole, or have been cleaned since."""
        data = self.data
        cleaned = self.buckets.get(layout.CLEANED, {})
        for number, size in listed.items():
            if layout.U64.pack(number) in cleaned:
                continue
            if number not in data.files:
                raise DataDamaged(data.path(number), 0, "the segment is missing")
            if number < active:
                data.check_header(number)
                found = data.sizes[number]
                if found != size:
                    why = f"it has {found} bytes instead of {size}"
                    raise DataDamaged(data.path(number), min(found, size), why)
        gone = [
            number
            for number in data.files
            if layout.U64.pack(number) in cleaned or (number not in listed and number < active)
        ]
        if gone:
            # What was moved out of them may not be durable yet.
            data.take_sync()()
            for number in gone:
                data.drop_segment(number)
            data.take_sync()()
        for number in listed.keys() - data.files.keys():
            data.garbage.pop(number, None)

    def _replay(self, location: int, kinds: Sequence[int], bodies: Sequence[bytes]) -> int:
        """Take in records of one segment that follow each other. Returns the location after them. A
        second time makes no difference."""
        # Flat: a start may meet hundreds of thousands of records.
        index = self.index
        heads, new, revisions = index.heads, self._new, index.revisions
        pack, unpack = HEAD.pack, HEAD.unpack
        next_mod = index.first_revision + len(revisions)
        next_location, garbage = location, 0
        for kind, body in zip(kinds, bodies, strict=True):
            location, size = next_location, len(body)
            next_location += RECORD_HEADER_BYTES + size
            if kind == MARK:
                garbage += RECORD_HEADER_BYTES + size
                self.applied_index, self.applied_term, revision = layout.MARK_BODY.unpack(body)
                self.revision = max(self.revision, revision)
                self._moved_revision = 0
            elif kind == BUCKET:
                garbage += RECORD_HEADER_BYTES + size
                self._load_bucket(body, body[1] != 0)
            elif kind & MOVED:
                self._replay_move(location, body)
            else:
                key, create, mod, version, lease = key_and_numbers(body)
                if mod == next_mod:
                    revisions.append(location)
                    next_mod += 1
                head = unpack(new[key]) if key in new else heads.get(key)
                if head is not None:
                    if head[0] >= mod:
                        continue
                    index.supersede(key, head[0], head[3], head[5])
                if kind == PUT:
                    new[key] = pack(mod, create, version, location, lease, size)
                else:
                    new.pop(key, None)
                    heads.pop(key, None)
                    index.supersede(key, mod, location, size | DEAD)
        self.data.garbage[location >> 32] += garbage
        return next_location

    def _settle(self) -> None:
        """Enter the keys of `_new` in the index."""
        new, heads = self._new, self.index.heads
        keys = sorted(new)
        if not heads.add_run(keys, b"".join([new[key] for key in keys])):
            heads.update({key: HEAD.unpack(head) for key, head in new.items()})
        new.clear()

    def _load_bucket(self, body: bytes, is_present: bool) -> None:
        bucket, _, size = layout.BUCKET_BODY.unpack_from(body)
        at = layout.BUCKET_BODY.size + size
        key = body[layout.BUCKET_BODY.size : at]
        items = self.buckets.setdefault(bucket, {})
        if is_present:
            items[key] = body[at:]
        else:
            items.pop(key, None)

    def _replay_move(self, location: int, body: bytes) -> None:
        """Point the index to a record's copy, which cleaning has made."""
        index = self.index
        self._settle()
        key, mod = layout.key_and_revision(body)
        old = index.move(key, mod, location)
        if old != location:
            # A version without an old place is not needed any more.
            self.data.add_garbage(location if old is None else old, len(body))
        at = mod - index.first_revision
        if 0 <= at < len(index.revisions) and self._moved_revision != mod:
            index.revisions[at] = location
        self._moved_revision = mod


def key_and_numbers(body: bytes) -> tuple[bytes, int, int, int, int]:
    """Key, create_revision, mod_revision, version and lease of a PUT or TOMBSTONE. Raises
    DecodeError, IndexError if it is cut off."""
    # Flat: a start without a checkpoint takes a third less time.
    end = len(body)
    at = 2 + body[1]
    if body[0] == 0x0A and body[1] < 128 and body[at] == 0x10:
        key = body[2:at]
        create, at = _number(body, at + 1)
        if body[at] == 0x18:
            mod, at = _number(body, at + 1)
            if body[at] == 0x20:
                version, at = _number(body, at + 1)
                if at < end and body[at] == 0x2A:
                    size, at = _number(body, at + 1)
                    at += size
                if at == end:
                    return key, create, mod, version, 0
    kv = proto.KeyValue.decode(body)
    return kv.key, kv.create_revision, kv.mod_revision, kv.version, kv.lease


def _number(body: bytes, at: int) -> tuple[int, int]:
    """The varint at offset `at`, and the offset after it. Raises IndexError if it is cut off."""
    number = body[at]
    if number < 128:
        return number, at + 1
    # Add seven bits, and take away the bit of the last byte that announces them.
    number += (body[at + 1] - 1) << 7
    if number < 1 << 14:
        return number, at + 2
    number += (body[at + 2] - 1) << 14
    at, shift = at + 3, 21
    while number >> shift and shift < 64:
        number += (body[at] - 1) << shift
        at, shift = at + 1, shift + 7
    return number, at
