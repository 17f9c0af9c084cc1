"""Revisions: every change of a key makes a new one, and the old ones can be read until compacted.

`Store` joins the index (`index.py`: where every version is) and the data file (`data.py`: the
versions), and keeps the small latest-wins buckets (leases, members, alarms) that make the data
file the whole state machine.

A write takes the next revision: any number of `put` and `delete`, then `end_revision`. All changes
come from committed raft entries, in order; `mark` after each entry says how far the state goes.
What takes long is a generator (`steps.py`): the caller decides how much of it to do in one turn.

Bytes are made once: the encoded `KeyValue` that `put` writes is the record on disk, and, untouched,
the `kvs` of a range and the `kv` of a watch event.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from operator import itemgetter
from typing import Any
from zlib import crc32

from etcdlite import proto
from etcdlite.errors import RESOURCE_EXHAUSTED, EtcdError, error
from etcdlite.lease import Lessor
from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.proto import read_varint, varint
from etcdlite.storage import checkpoint
from etcdlite.storage.data import (
    BUCKET,
    BUCKET_BODY,
    MARK,
    MARK_BODY,
    MOVED,
    OFFSET_MASK,
    PUT,
    RECORD_HEADER,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER,
    TOMBSTONE,
    DataDamaged,
    DataFile,
    DataVersionError,
    record,
    segment_name,
)
from etcdlite.storage.disk import Disk
from etcdlite.storage.index import DEAD, HEAD, PAST, Index
from etcdlite.storage.steps import finish, sort_steps

# Buckets.
COMPACTED = 1
"""Key b"": the compact revision, u64."""
LEASE = 2
MEMBER = 3
ALARM = 4
CLEANED = 5
"""Key: number of a segment, u64, that cleaning has emptied and removed."""
REMOVED = 6
"""Key: id of a member, u64 big-endian, that was removed for ever."""

MAX_REVISION = (1 << 63) - 1

U64 = struct.Struct("<Q")
POSITION = struct.Struct("<QQ")

_VARINT = [varint(n) for n in range(4096)]
_KEY = [b"\x0a" + varint(n) for n in range(128)]

Job = Iterator["Callable[[], None] | None"]
"""Long work in steps. A yielded None means: more to do. A yielded callable is slow disk work that
touches none of the store's memory: run it anywhere, once, and resume the job when it has returned.
"""


class AnswerTooLarge(EtcdError):
    """The answer would have more than `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            RESOURCE_EXHAUSTED,
            f"etcdlite: the answer has more than {limit_bytes} bytes: use limit to get it in parts",
        )


Event = tuple[int, bytes, bool, bytes]
"""(revision, key, is a delete, encoded KeyValue)"""


def encode_key_value(
    key: bytes, create: int, mod: int, version: int, value: bytes, lease: int
) -> bytes:
    """The protobuf bytes of a `KeyValue`, with defaults left out."""
    size = len(key)
    head = _KEY[size] if size < 128 else b"\x0a" + varint(size)
    size = len(value)
    return b"".join(
        (
            head,
            key,
            b"\x10",
            _VARINT[create] if create < 4096 else varint(create),
            b"\x18",
            _VARINT[mod] if mod < 4096 else varint(mod),
            b"\x20",
            _VARINT[version] if version < 4096 else varint(version),
            b"\x2a" + (_VARINT[size] if size < 4096 else varint(size)) if size else b"",
            value,
            b"\x30" + varint(lease) if lease else b"",
        )
    )


def key_and_revision(body: bytes, at: int = 0) -> tuple[bytes, int]:
    """Key and mod_revision of a record that `Store` wrote (fields in order, key first) and that
    begins at `at`."""
    size, at = read_varint(body, at + 1, len(body))
    key = body[at : at + size]
    at += size
    if body[at] == 0x10:
        _, at = read_varint(body, at + 1, len(body))
    return key, read_varint(body, at + 1, len(body))[0]


class Store:
    """One member's key-value state. Not thread-safe; never blocks but for reads of cold data."""

    def __init__(
        self,
        disk: Disk,
        directory: str,
        lessor: Lessor,
        segment_bytes: int,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.disk = disk
        self.directory = directory
        self.lessor = lessor
        self.limits = limits
        self.data = DataFile(disk, directory, segment_bytes, limits)
        self.index = Index(limits)
        self.revision = 1
        self.marked_revision = 1
        """The revision at the last mark: what a copy of the files, made now, holds."""
        self.compacted = 0
        self.applied_index = 0
        self.applied_term = 0
        self.buckets: dict[int, dict[bytes, bytes]] = {}
        self.events: list[Event] = []
        """What happened since the owner last took it, for watches. Whole revisions only."""
        self.pinned: list[int] = []
        """Revisions that unfinished range reads need; compaction waits for older ones."""
        self.cut: DataDamaged | None = None
        """What a start after a crash cut off the data file, for the log."""
        self.checkpoint_begin = (0, 0)
        """Where a start would begin to scan: (segment, offset)."""
        self.compaction: Iterator[int] | None = None
        self.uncleanable: set[int] = set()
        """Segments that cleaning must leave alone, because a record in them is damaged."""
        self._first_location = 0
        self._moved_revision = 0
        self._is_packing = False

    # Opening.

    @classmethod
    def create(
        cls,
        disk: Disk,
        directory: str,
        lessor: Lessor,
        segment_bytes: int,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Store:
        """A new store in an empty folder, durable when this returns."""
        store = cls(disk, directory, lessor, segment_bytes, limits)
        disk.make_dir(directory)
        store.data.roll()
        store.index.first_revision = 2
        for task in store.checkpoint():
            if task is not None:
                task()
        return store

    @classmethod
    def open(
        cls,
        disk: Disk,
        directory: str,
        lessor: Lessor,
        segment_bytes: int,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Store:
        """The store as of its last mark. Raises DataDamaged rather than give a wrong state."""
        store = cls(disk, directory, lessor, segment_bytes, limits)
        temporary = f"{directory}/{checkpoint.NAME}.tmp"
        if disk.exists(temporary):
            disk.unlink(temporary)
        try:
            store._load()
        except (ValueError, IndexError, struct.error, EtcdError) as failure:
            # The checksums are right, so no disk did this.
            path = f"{directory}/{checkpoint.NAME}"
            raise DataDamaged(path, 0, f"its content makes no sense ({failure})") from failure
        store.data.damaged.clear()  # A crash may have torn the end, which is cut off.
        return store

    def _load(self) -> None:
        path = f"{self.directory}/{checkpoint.NAME}"
        listed: dict[int, int] = {}
        begin = end = (0, 0)
        first_chunk = True
        for kind, body in checkpoint.unpack(self.disk, path):
            if first_chunk != (kind == checkpoint.META):
                raise DataDamaged(path, 0, "the checkpoint does not begin with its META chunk")
            first_chunk = False
            if kind == checkpoint.HEADS:
                self.index.load_heads(body)
            elif kind == checkpoint.PAST:
                self.index.load_past(body)
            elif kind == checkpoint.BUCKET:
                bucket, _, size = BUCKET_BODY.unpack_from(body)
                at = BUCKET_BODY.size + size
                self._set_bucket(bucket, body[BUCKET_BODY.size : at], body[at:])
            elif kind == checkpoint.REVISIONS:
                (first,) = U64.unpack_from(body)
                if not self.index.revisions:
                    self.index.first_revision = first
                self.index.revisions.extend(_u64s(body)[1:])
            elif kind == checkpoint.META:
                fields = _u64s(body)
                begin = (fields[0], fields[1])
                self.applied_index, self.applied_term, self.revision = fields[2:5]
                self.compacted = fields[5]
                for at in range(6, len(fields), 3):
                    number, size, garbage = fields[at : at + 3]
                    listed[number] = size
                    self.data.garbage[number] = garbage
            elif kind == checkpoint.END:
                end = POSITION.unpack(body)
        self.index.loaded()
        self.checkpoint_begin = begin
        self.data.open_segments()
        if begin[0] not in self.data.files:
            path = f"{self.directory}/{segment_name(begin[0])}"
            raise DataDamaged(path, 0, "the segment is missing")
        self._scan(begin, end)
        self.marked_revision = self.revision
        # A process that was killed may have left these to the page cache.
        self.data.unsynced.update(n for n in self.data.files if n >= begin[0])
        self._check_segments(listed, begin[0])
        self._attach_leases()
        if self.index.past:
            self.compaction = self.index.compact_steps(self.compacted, self.data.garbage)

    def _attach_leases(self) -> None:
        if self.buckets.get(LEASE):
            for key, head in self.index.heads.items():
                lease = HEAD.unpack(head)[4]
                if lease:
                    self.lessor.attach(key, lease)

    def _scan(self, begin: tuple[int, int], end: tuple[int, int]) -> None:
        """Take in the records behind the checkpoint up to the last mark; cut off the rest."""
        data = self.data
        number, offset = valid = begin
        size = data.sizes.get(number, data.offset)
        if size < offset:
            path = f"{self.directory}/{segment_name(number)}"
            raise DataDamaged(path, size, f"it has {size} bytes instead of {offset} or more")
        data.check_header(number)
        try:
            while number in data.files:
                waiting = []
                for location, kind, body in data.records(number, offset):
                    waiting.append((location, kind, body))
                    if kind == MARK:
                        for record in waiting:
                            self._replay(*record)
                        waiting.clear()
                        after = location & OFFSET_MASK
                        valid = (number, after + RECORD_HEADER_BYTES + len(body))
                if waiting:
                    break
                number, offset = number + 1, SEGMENT_HEADER.size
                if number in data.files:
                    if data.check_header(number) != valid[1]:
                        path = f"{self.directory}/{segment_name(valid[0])}"
                        raise DataDamaged(path, valid[1], "the end of the segment is missing")
                    valid = (number, offset)
        except DataVersionError:
            raise  # It is no crash that left this: it must not be cut off.
        except DataDamaged as damage:
            if valid < end:
                raise
            self.cut = damage
        if valid < end:
            path = f"{self.directory}/{segment_name(valid[0])}"
            raise DataDamaged(path, valid[1], "records that the checkpoint counts on are missing")
        data.cut(*valid)

    def _check_segments(self, listed: dict[int, int], active: int) -> None:
        """Every segment of the checkpoint must be there, whole, or have been cleaned since."""
        cleaned = self.buckets.get(CLEANED, {})
        for number, size in listed.items():
            path = f"{self.directory}/{segment_name(number)}"
            if U64.pack(number) in cleaned:
                continue
            if number not in self.data.files:
                raise DataDamaged(path, 0, "the segment is missing")
            if number < active:
                self.data.check_header(number)
                found = self.data.sizes[number]
                if found != size:
                    raise DataDamaged(
                        path, min(found, size), f"it has {found} bytes instead of {size}"
                    )
        gone = [
            number
            for number in self.data.files
            if U64.pack(number) in cleaned or (number not in listed and number < active)
        ]
        if gone:
            # What was moved out of them may not be durable yet.
            self.data.take_sync()()
        for number in gone:
            self.data.drop_segment(number)
        for number in listed.keys() - self.data.files.keys():
            self.data.garbage.pop(number, None)

    def _replay(self, location: int, kind: int, body: bytes) -> None:
        """Take in a record of the data file; once or more often makes no difference."""
        if kind == MARK:
            self.data.add_garbage(location, len(body))
            self.applied_index, self.applied_term, revision = MARK_BODY.unpack(body)
            self.revision = max(self.revision, revision)
            self._moved_revision = 0
            return
        if kind == BUCKET:
            self.data.add_garbage(location, len(body))
            bucket, present, size = BUCKET_BODY.unpack_from(body)
            at = BUCKET_BODY.size + size
            self._set_bucket(bucket, body[BUCKET_BODY.size : at], body[at:] if present else None)
            return
        index = self.index
        if kind & MOVED:
            key, mod = key_and_revision(body)
            old = index.move(key, mod, None, location)
            if old != location:
                # Without an old place nobody needs the version any more.
                self.data.add_garbage(location if old is None else old, len(body))
            at = mod - index.first_revision
            if 0 <= at < len(index.revisions) and self._moved_revision != mod:
                index.revisions[at] = location
            self._moved_revision = mod
            return
        message = proto.KeyValue.decode(body)
        key, mod = message.key, message.mod_revision
        if mod - index.first_revision == len(index.revisions):
            index.revisions.append(location)
        head = index.heads.get(key)
        if head is not None:
            head_mod, _, _, old, _, length = HEAD.unpack(head)
            if head_mod >= mod:
                return
            index.supersede(key, head_mod, old, length)
        if kind == PUT:
            index.set_head(
                key,
                mod,
                message.create_revision,
                message.version,
                location,
                message.lease,
                len(body),
            )
        else:
            if head is not None:
                index.remove_head(key)
            index.supersede(key, mod, location, len(body) | DEAD)

    def close(self) -> None:
        self.data.close()

    # Writing. Between two calls of `end_revision` every change belongs to revision + 1.

    def put(self, key: bytes, value: bytes, lease: int) -> None:
        """Set a key. The caller has checked the lease."""
        # The hottest path of the program: flat on purpose.
        index = self.index
        data = self.data
        mod = self.revision + 1
        head = index.heads.get(key)
        if head is None:
            create = mod
            version = 1
            index.keys.add(key)
        else:
            old_mod, create, version, old, old_lease, old_length = HEAD.unpack(head)
            version += 1
            entries = index.past.get(key)
            if entries is None:
                index.past[key] = bytearray(PAST.pack(old_mod, old, old_length))
                index.past_keys.add(key)
            else:
                entries += PAST.pack(old_mod, old, old_length)
            if old_lease:
                self.lessor.detach(key)
        body = encode_key_value(key, create, mod, version, value, lease)
        location = data.append(PUT, body)
        index.heads[key] = HEAD.pack(mod, create, version, location, lease, len(body))
        if lease:
            self.lessor.attach(key, lease)
        if not self._first_location:
            self._first_location = location
        self.events.append((mod, key, False, body))

    def delete(self, key: bytes) -> None:
        """Remove a key that exists."""
        index = self.index
        mod = self.revision + 1
        old_mod, _, _, old, lease, length = HEAD.unpack(index.heads[key])
        index.supersede(key, old_mod, old, length)
        size = len(key)
        body = (_KEY[size] if size < 128 else b"\x0a" + varint(size)) + key
        body += b"\x18" + varint(mod)
        location = self.data.append(TOMBSTONE, body)
        index.remove_head(key)
        index.supersede(key, mod, location, len(body) | DEAD)
        if lease:
            self.lessor.detach(key)
        if not self._first_location:
            self._first_location = location
        self.events.append((mod, key, True, body))

    def end_revision(self) -> int:
        """Make the changes since the last call visible; they get one new revision if any."""
        if self._first_location:
            self.index.revisions.append(self._first_location)
            self._first_location = 0
            self.revision += 1
        return self.revision

    @property
    def is_writing(self) -> bool:
        """Changes were made that `end_revision` has not made visible yet."""
        return self._first_location != 0

    def delete_steps(self, start: bytes, end: bytes | None) -> Iterator[None]:
        """Delete all keys in [start, end), yielding now and then; it is one change all the same."""
        index = self.index
        step_keys = self.limits.delete_step_keys
        while True:
            keys = list(islice(index.keys.irange(start, end, (True, False)), step_keys))
            for key in keys:
                self.delete(key)
            if len(keys) < step_keys:
                return
            yield

    def mark(self, index: int, term: int) -> None:
        """State that the store now is what raft entry `index` left, and hand it to the file."""
        self.applied_index = index
        self.applied_term = term
        self.marked_revision = self.revision
        self.data.append_mark(index, term, self.revision)
        self.data.flush()
        if self.data.is_full:
            self.data.roll()

    def set_bucket(self, bucket: int, key: bytes, value: bytes | None) -> None:
        """Set or (None) remove a key of a bucket. Takes no revision."""
        self._set_bucket(bucket, key, value)
        self.data.append_bucket(bucket, key, value)

    def _set_bucket(self, bucket: int, key: bytes, value: bytes | None) -> None:
        items = self.buckets.setdefault(bucket, {})
        if value is None:
            items.pop(key, None)
        else:
            items[key] = value
        if bucket == COMPACTED and value is not None:
            self.compacted = U64.unpack(value)[0]
        elif bucket == LEASE:
            self.lessor.restore(int.from_bytes(key, "big"), value)

    # Reading.

    def get(self, key: bytes, revision: int | None = None) -> bytes | None:
        """The encoded KeyValue of a key, now or as of `revision`; None if it does not exist."""
        if revision is None:
            head = self.index.heads.get(key)
            if head is None:
                return None
            _, _, _, location, _, length = HEAD.unpack(head)
            return self.data.read(location, length)
        record = self.index.at(key, revision)
        return None if record is None else self.data.read(*record)

    def previous(self, key: bytes, revision: int) -> bytes | None:
        """The KeyValue of `key` just before `revision`; None if absent or compacted."""
        if revision <= self.compacted:
            return None
        return self.get(key, revision - 1)

    def check_revision(self, revision: int) -> None:
        """Raise Compacted or FutureRev unless the state as of `revision` can be read (0: now)."""
        if revision <= 0:
            return
        if revision > self.revision:
            raise error("FutureRev")
        if revision < self.compacted:
            raise error("Compacted")

    def scan(
        self,
        start: bytes,
        end: bytes | None,
        revision: int,
        limit: int,
        limit_bytes: int | None = None,
    ) -> tuple[list[tuple[int, int]], bytes | None]:
        """`Index.scan` as of `revision`, which may be the one that is being written. The locations
        are good until the next step: then cleaning may have moved the records."""
        is_now = revision == self.revision + self.is_writing
        if limit_bytes is None:
            limit_bytes = self.limits.step_bytes
        return self.index.scan(start, end, None if is_now else revision, limit, limit_bytes)

    def range_steps(
        self,
        request: Any,
        revision: int | None = None,
        head: bytes = b"",
        limit_bytes: int | None = None,
    ) -> Generator[None, None, bytes]:
        """Answer a RangeRequest: the generator's return value is `head` and the RangeResponse,
        encoded, without its header. Raises EtcdError Compacted or FutureRev; AnswerTooLarge if the
        records in it have more than `limit_bytes` (None: `max_answer_bytes`); DataDamaged.

        The answer is as of the revision that the request names, else as of `revision`, else as of
        the one it begins at, however the store changes between the steps.
        """
        start, end = key_range(request.key, request.range_end)
        self.check_revision(request.revision)
        if request.revision > 0:
            revision = request.revision
        elif revision is None:
            revision = self.revision
        if limit_bytes is None:
            limit_bytes = self.limits.max_answer_bytes
        self.pinned.append(revision)
        try:
            if request.count_only:
                count = yield from self._count_steps(start, end, revision)
                return head + _range_tail(False, count)
            return (yield from self._read_steps(request, start, end, revision, head, limit_bytes))
        finally:
            self.pinned.remove(revision)

    def _read_steps(
        self,
        request: Any,
        start: bytes,
        end: bytes | None,
        revision: int,
        head: bytes,
        limit_bytes: int,
    ) -> Generator[None, None, bytes]:
        step_keys, step_bytes = self.limits.range_step_keys, self.limits.step_bytes
        bounds = _bounds(request)
        order = _order(request)
        limit = request.limit if request.limit > 0 else 1 << 62
        # As in etcd, an order without a direction is only that of what the limit lets through.
        room = limit + 1 if not (bounds or (order and request.sort_order)) else 1 << 62
        enough = 1 << 62 if order else limit + 1
        read = self.data.read
        answer = bytearray(head)
        parts: list[bytes] = []
        limit_bytes += len(head)
        count = found = 0
        ranked: list[tuple[Any, bytes]] = []
        ranked_bytes = 0
        cursor: bytes | None = start
        while cursor is not None:
            if count >= room or found >= enough:
                # Enough is read; what is left is the count of the whole range.
                count += yield from self._count_steps(cursor, end, revision)
                break
            records, cursor = self.scan(cursor, end, revision, min(step_keys, room - count))
            count += len(records)
            for location, length in records:
                kv = read(location, length)
                if bounds or order:
                    message = proto.KeyValue.decode(kv)
                    if not all(low <= getattr(message, name) <= high for name, low, high in bounds):
                        continue
                    if order:
                        ranked.append((getattr(message, order), message.key))
                found += 1
                if order:
                    if order == "value":
                        ranked_bytes += length
                elif found <= limit:
                    parts += _range_part(without_value(kv) if request.keys_only else kv)
            answer += b"".join(parts)
            parts.clear()
            if len(answer) + ranked_bytes > limit_bytes:
                raise AnswerTooLarge(self.limits.max_answer_bytes)
            if cursor is not None:
                yield
        if order:
            descends = request.sort_order == proto.RangeRequest.DESCEND
            ranked = yield from sort_steps(ranked, itemgetter(0), descends, self.limits)
            ranked.reverse()
            size = 0
            for step in range(1, min(limit, len(ranked)) + 1):
                _, key = ranked.pop()
                found_kv = self.get(key, revision)
                assert found_kv is not None, "the range was read a moment ago"
                parts += _range_part(without_value(found_kv) if request.keys_only else found_kv)
                size += len(found_kv)
                if step % step_keys == 0 or size >= step_bytes:
                    size = 0
                    answer += b"".join(parts)
                    parts.clear()
                    if len(answer) > limit_bytes:
                        raise AnswerTooLarge(self.limits.max_answer_bytes)
                    yield
            answer += b"".join(parts)
            parts.clear()
            while ranked:  # Even to forget many takes its time.
                del ranked[-self.limits.sort_step_items :]
                yield
            if len(answer) > limit_bytes:
                raise AnswerTooLarge(self.limits.max_answer_bytes)
        answer += _range_tail(found > limit, count)
        if len(answer) > step_bytes:
            # To copy a large answer is a step of its own, and so is to send it.
            yield
            whole = bytes(answer)
            answer.clear()
            yield
            return whole
        return bytes(answer)

    def _count_steps(
        self, start: bytes, end: bytes | None, revision: int
    ) -> Generator[None, None, int]:
        count = 0
        cursor: bytes | None = start
        while cursor is not None:
            if revision == self.revision + self.is_writing:
                return count + self.index.count(cursor, end)
            records, cursor = self.index.scan(cursor, end, revision, self.limits.range_step_keys)
            count += len(records)
            if cursor is not None:
                yield
        return count

    def size_steps(
        self, start: bytes, end: bytes | None, revision: int, limit: int, enough_bytes: int
    ) -> Generator[None, None, int]:
        """Bytes of the first `limit` (0: of all) records in [start, end) as of `revision`. Stops
        when it has `enough_bytes`. Reads nothing but the index."""
        size = 0
        left = limit or 1 << 62
        cursor: bytes | None = start
        while cursor is not None and left and size < enough_bytes:
            records, cursor = self.scan(
                cursor, end, revision, min(self.limits.range_step_keys, left), enough_bytes
            )
            left -= len(records)
            size += sum(length for _, length in records)
            if cursor is not None:
                yield
        return size

    def read_events(self, start_revision: int, limit_bytes: int) -> list[Event]:
        """Events from `start_revision` on, in order, whole revisions, about `limit_bytes` of them
        (at least one revision). Empty if there is none yet. Raises DataDamaged."""
        return finish(self.event_steps(start_revision, limit_bytes))

    def event_steps(
        self, start_revision: int, limit_bytes: int
    ) -> Generator[None, None, list[Event]]:
        """As `read_events`, in steps: also within a revision, which may have any number of events.
        Until it ends (or is closed), no compaction gives up what it still reads."""
        index, limits = self.index, self.limits
        events: list[Event] = []
        size = step_events = step_bytes = 0
        revision = max(start_revision, index.first_revision)
        records: Iterator[tuple[int, int, bytes]] = iter(())
        pending: tuple[int, int, bytes] | None = None
        self.pinned.append(pinned := revision)
        try:
            while revision <= self.revision and size < limit_bytes:
                location = index.revisions[revision - index.first_revision]
                if pending is None or pending[0] != location:
                    number, offset = location >> 32, location & OFFSET_MASK
                    records = self.data.records(number, offset, limits.event_chunk_bytes)
                    pending = next(records, None)
                begin, begin_size = len(events), size
                has_moved = False
                while pending is not None:
                    kind = pending[1] & ~MOVED
                    body = pending[2]
                    if kind not in (PUT, TOMBSTONE):
                        pending = next(records, None)
                        if kind == MARK:
                            break
                        continue
                    key, mod = key_and_revision(body)
                    if mod != revision:
                        break
                    events.append((mod, key, kind == TOMBSTONE, body))
                    size += len(body)
                    step_events += 1
                    step_bytes += len(body)
                    if step_events == limits.event_step_events or step_bytes >= limits.step_bytes:
                        step_events = step_bytes = 0
                        yield
                        has_moved = index.revisions[revision - index.first_revision] != location
                        if has_moved:
                            break
                    pending = next(records, None)
                if has_moved:
                    # Cleaning has removed the segment, or soon will: read the copy instead.
                    pending = None
                    del events[begin:]
                    size = begin_size
                    continue
                if len(events) == begin:
                    path = f"{self.directory}/{segment_name(location >> 32)}"
                    why = f"no change of revision {revision} stands there"
                    raise DataDamaged(path, location & OFFSET_MASK, why)
                revision += 1
        finally:
            self.pinned.remove(pinned)
        return events

    def hash_steps(self, revision: int) -> Generator[None, None, int]:
        """Hash what a store compacted where this one is must keep up to `revision`: the
        generator's return value. Equal on all members, whatever they have cleaned up so far."""
        compacted = self.compacted
        crc = step_versions = step_bytes = 0
        cursor: bytes | None = b""
        index, limits = self.index, self.limits
        step_keys, most_bytes = limits.range_step_keys, limits.step_bytes
        self.pinned.append(compacted)
        try:
            while cursor is not None:
                keys = list(islice(index.all_keys(cursor, None), step_keys))
                for key in keys:
                    done = 0
                    while part := index.versions(
                        key, compacted, revision, done, limits.hash_part_versions
                    ):
                        for done, location, length in part:  # noqa: B007
                            crc = crc32(self.data.read(location, length), crc)
                            step_versions += 1
                            step_bytes += length
                            if step_bytes >= most_bytes:
                                break
                        if step_versions >= limits.hash_step_versions or step_bytes >= most_bytes:
                            step_versions = step_bytes = 0
                            yield
                cursor = keys[-1] + b"\0" if len(keys) == step_keys else None
                yield
        finally:
            self.pinned.remove(compacted)
        return crc

    # Compaction.

    def compact(self, revision: int) -> None:
        """Give up what is superseded before `revision`. Reads below it are refused from now on;
        `compact_step` does the work. Raises EtcdError Compacted or FutureRev."""
        if revision <= self.compact_revision:
            raise error("Compacted")
        if revision > self.revision:
            raise error("FutureRev")
        self.set_bucket(COMPACTED, b"", U64.pack(revision))
        self.compaction = self.index.compact_steps(revision, self.data.garbage)

    @property
    def compact_revision(self) -> int:
        """`compacted` as etcd counts it: -1 until the first compaction, which may be at 0."""
        return self.compacted if COMPACTED in self.buckets else -1

    @property
    def compaction_is_held(self) -> bool:
        """A range read that began earlier still needs what the compaction would give up, or a
        checkpoint is being packed, whose count of garbage must fit the versions in it."""
        return self._is_packing or any(revision < self.compacted for revision in self.pinned)

    def compact_step(self) -> int | None:
        """Do a part of the pending compaction; versions dropped, or None when it is done."""
        assert self.compaction is not None and not self.compaction_is_held
        dropped = next(self.compaction, None)
        if dropped is None:
            self.compaction = None
        return dropped

    # Checkpoints and cleaning: long work in the background, one at a time.

    @property
    def size_bytes(self) -> int:
        return self.data.size_bytes

    @property
    def size_in_use_bytes(self) -> int:
        return self.data.size_bytes - self.data.garbage_bytes

    @property
    def bytes_since_checkpoint(self) -> int:
        number, offset = self.checkpoint_begin
        data = self.data
        if number == data.active:
            return data.offset - offset
        between = sum(size for n, size in data.sizes.items() if n > number)
        return data.sizes.get(number, offset) - offset + between + data.offset

    def checkpoint(self) -> Job:
        """Write a checkpoint. When the job ends, log entries up to the applied index that it
        began with are not needed any more. Begins right behind a mark."""
        assert self.data.flushed == self.data.offset, "a checkpoint begins behind a mark"
        begin = (self.data.active, self.data.offset)
        meta = self._meta(begin)
        staged = self.disk.stage(f"{self.directory}/{checkpoint.NAME}")
        self._is_packing = True
        try:
            for part in checkpoint.pack(self._chunks(meta)):
                staged.write(part)
                yield None
        finally:
            self._is_packing = False
        sync = self.data.take_sync()

        def publish() -> None:
            sync()
            staged.publish()

        yield publish
        self.checkpoint_begin = begin
        # Segments that were cleaned before this checkpoint need no mention any more.
        for key in list(self.buckets.get(CLEANED, ())):
            if U64.unpack(key)[0] not in self.data.files:
                del self.buckets[CLEANED][key]

    def _meta(self, begin: tuple[int, int]) -> bytes:
        """The META chunk: the state as it is where the checkpoint begins."""
        data = self.data
        fields = [*begin, self.applied_index, self.applied_term, self.revision, self.compacted]
        for number in sorted(data.files):
            size = data.offset if number == data.active else data.sizes[number]
            fields += [number, size, data.garbage[number]]
        return struct.pack(f"<{len(fields)}Q", *fields)

    def _chunks(self, meta: bytes) -> Iterator[tuple[int, bytes]]:
        data = self.data
        yield checkpoint.META, meta
        for bucket, items in sorted(self.buckets.items()):
            for key, value in list(items.items()):
                yield checkpoint.BUCKET, BUCKET_BODY.pack(bucket, 1, len(key)) + key + value
        for chunk in self.index.pack_heads():
            yield checkpoint.HEADS, chunk
        for chunk in self.index.pack_past():
            yield checkpoint.PAST, chunk
        first = self.index.first_revision
        revisions = self.index.revisions[:]
        count = self.limits.pack_revisions
        for at in range(0, len(revisions) or 1, count):
            part = revisions[at : at + count]
            yield checkpoint.REVISIONS, struct.pack(f"<{len(part) + 1}Q", first + at, *part)
        yield checkpoint.END, POSITION.pack(data.active, data.offset)

    def segment_to_clean(self, least_garbage: float) -> int | None:
        """The sealed segment with the largest share of garbage, if it has at least that share.

        Only segments that a start would not scan: what they say besides keys is in the checkpoint.
        """
        data = self.data
        shares = [
            (data.garbage[number] / size, number)
            for number, size in data.sizes.items()
            if number < self.checkpoint_begin[0] and number not in self.uncleanable
        ]
        share, number = max(shares, default=(0.0, 0))
        return number if number and share >= least_garbage else None

    def clean(self, number: int) -> Job:
        """Move what is still needed of a segment to the tail, sync it, remove the segment.

        The records of a revision whose history can be read must stay side by side. So what is moved
        is gathered, revision by revision, appended at once, and then the index is told of the new
        places: all but the appending, which is one write, in steps.
        """
        data, index = self.data, self.index
        most_records, most_bytes = self.limits.clean_step_records, self.limits.step_bytes
        block = bytearray()
        last = block_records = step_records = step_bytes = 0
        for location, kind, body in data.records(number, SEGMENT_HEADER.size):
            kind &= ~MOVED
            if kind in (PUT, TOMBSTONE):
                key, mod = key_and_revision(body)
                is_large = block_records >= most_records or len(block) >= most_bytes
                if block and is_large and (mod != last or mod < self._oldest_read):
                    yield from self._append_moved(bytes(block))
                    block = bytearray()
                    block_records = step_records = step_bytes = 0
                last = mod
                if index.is_at(key, mod, location):
                    block += record(kind | MOVED, body)
            block_records += 1
            step_records += 1
            step_bytes += len(body)
            if step_records > most_records or step_bytes >= most_bytes:
                step_records = step_bytes = 0
                yield None
        if block:
            yield from self._append_moved(bytes(block))
        self.set_bucket(CLEANED, U64.pack(number), b"")
        self.mark(self.applied_index, self.applied_term)
        yield data.take_sync()
        data.drop_segment(number)

    @property
    def _oldest_read(self) -> int:
        """Nobody reads the history before this revision any more."""
        return min((self.compacted, *self.pinned))

    def _append_moved(self, block: bytes) -> Iterator[None]:
        """Append copies of records, of whole revisions, and point the index to them."""
        data, index = self.data, self.index
        begin = data.append_block(block)
        number = begin >> 32
        data.garbage[number] += len(block)
        self.mark(self.applied_index, self.applied_term)
        at = step_records = 0
        while at < len(block):
            size = RECORD_HEADER.unpack_from(block, at)[1] >> 4
            key, mod = key_and_revision(block, at + RECORD_HEADER_BYTES)
            location = begin + at
            old = index.move(key, mod, None, location)
            if old is not None:
                data.add_garbage(old, size)
                data.garbage[number] -= size + RECORD_HEADER_BYTES
                revision = mod - index.first_revision
                if 0 <= revision < len(index.revisions) and index.revisions[revision] == old:
                    index.revisions[revision] = location
            at += size + RECORD_HEADER_BYTES
            step_records += 1
            if step_records == self.limits.clean_step_records:
                step_records = 0
                yield None
        yield None


def _u64s(body: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(body) // 8}Q", body)


# Ranges.


def key_range(key: bytes, range_end: bytes) -> tuple[bytes, bytes | None]:
    """etcd's range as [start, end): no range_end is one key, b"\\0" is 'and all above'."""
    if not range_end:
        return key, key + b"\0"
    if range_end == b"\0":
        return key, None
    return key, range_end


def _range_part(kv: bytes) -> tuple[bytes, bytes]:
    """A record as one of the `kvs` of a RangeResponse."""
    size = len(kv)
    return b"\x12" + (_VARINT[size] if size < 4096 else varint(size)), kv


def _range_tail(more: bool, count: int) -> bytes:
    """`more` and `count` of a RangeResponse."""
    return (b"\x18\x01" if more else b"") + (b"\x20" + varint(count) if count else b"")


def is_plain(request: Any) -> bool:
    """The answer to a RangeRequest is, as they are, the first records of the range."""
    return not (
        request.keys_only
        or request.count_only
        or _bounds(request)
        or (request.limit > 0 and _order(request))
    )


def without_value(kv: bytes) -> bytes:
    message = proto.KeyValue.decode(kv)
    message.value = b""
    encoded: bytes = message.encode()
    return encoded


def _bounds(request: Any) -> list[tuple[str, int, int]]:
    """(field, lowest, highest) of the filters that a RangeRequest sets."""
    bounds = (
        ("mod_revision", request.min_mod_revision, request.max_mod_revision or MAX_REVISION),
        (
            "create_revision",
            request.min_create_revision,
            request.max_create_revision or MAX_REVISION,
        ),
    )
    return [bound for bound in bounds if bound[1] or bound[2] != MAX_REVISION]


_SORT_FIELDS = ("key", "version", "create_revision", "mod_revision", "value")


def _order(request: Any) -> str:
    """The field to sort by; "" if that is the key, ascending, as they come."""
    descends = request.sort_order == proto.RangeRequest.DESCEND
    return _SORT_FIELDS[request.sort_target] if request.sort_target or descends else ""
