"""Revisions: every change of a key makes a new one, and old ones can be read until compacted.

`Store` joins the index (`storage/index.py`: where each version is) and the data file
(`storage/data.py`: the versions). It also keeps the buckets: small maps for leases, members and
alarms, whose latest entries win. So the data file holds the whole state machine.

A write is any number of `put` and `delete`, then `end_revision`, which makes it the next revision.
All changes come from committed raft entries, in order; `mark` records up to which entry the state
goes. Long work is a generator (`storage/steps.py`): the caller decides how much to do at once.

Bytes are made once: the encoded `KeyValue` that `put` writes is the record on disk and, unchanged,
the `kvs` of a range and the `kv` of a watch event.

Invariants. Between two marks the state may have a part of an entry, so a copy of the files ends at
the last mark. History from `compacted` on can be read. A read in steps pins its revision, and
compaction drops nothing that a pinned revision needs.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator, Sequence
from typing import Any
from zlib import crc32

from etcdlite import memory
from etcdlite.errors import EtcdError, error
from etcdlite.lease import KEY as LEASE_KEY
from etcdlite.lease import Lessor
from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.proto import VARINTS, varint, varint64
from etcdlite.storage import checkpoint, layout
from etcdlite.storage.data import RECENT_OVERHEAD_BYTES
from etcdlite.storage.disk import TRANSIENT, Disk
from etcdlite.storage.index import HEAD, Numbered
from etcdlite.storage.key_changes import KeyChanges
from etcdlite.storage.layout import PUT, RECORD_HEADER, RECORD_HEADER_BYTES, U64, DataDamaged
from etcdlite.storage.past import DEAD, PAST, PAST_AND_TOMBSTONE
from etcdlite.storage.recovery import Contents
from etcdlite.storage.removal import Removal, Span
from etcdlite.storage.steps import Job, run

_VALUE = [b"", *(b"\x2a" + varint(n) for n in range(1, 4096))]
_KEY = [b"\x0a" + varint(n) for n in range(128)]

EMPTY_HASH = 0x40A4756D
"""etcd's hash of an empty store: the CRC-32C of its bucket's name, "key"."""

PREVIOUS_SHIFT = 4
"""Where history is read with previous values, a sixteenth of their size counts."""

Event = tuple[int, bytes, bool, bytes]
"""(revision, key, is a delete, encoded KeyValue). A delete has only key and mod_revision."""


def encode_key_value(
    key: bytes, create: bytes, mod: bytes, version: int, value: bytes, lease: int
) -> bytes:
    """The protobuf bytes of a `KeyValue`, with defaults left out. `create` and `mod` are varints:
    many keys have the same."""
    size = len(value)
    return b"".join(
        (
            _KEY[len(key)] if len(key) < 128 else b"\x0a" + varint(len(key)),
            key,
            b"\x10",
            create,
            b"\x18",
            mod,
            b"\x20",
            VARINTS[version] if version < 16384 else varint(version),
            _VALUE[size] if size < 4096 else b"\x2a" + varint(size),
            value,
            b"\x30" + varint64(lease) if lease else b"",
        )
    )


class Store:
    """One member's key-value state. Not thread-safe. Blocks only to read cold data."""

    def __init__(self, lessor: Lessor, contents: Contents, limits: Limits) -> None:
        """Made by `create` or `open`."""
        self.lessor = lessor
        self.limits = limits
        self.data = contents.data
        self.index = contents.index
        self.disk = contents.data.disk
        self.directory = contents.data.directory
        self.revision = contents.revision
        self.marked_revision = contents.revision
        """The revision at the last mark, which a copy of the files holds."""
        self.applied_index = contents.applied_index
        self.applied_term = contents.applied_term
        self.buckets = contents.buckets
        compacted = self.buckets.get(layout.COMPACTED)
        self.compacted = U64.unpack(compacted[b""])[0] if compacted else 0
        """Reads below this revision are refused; 0 before the first compaction."""
        self.events: list[Event] = []
        """Changes that the owner has not taken, for watches; whole revisions at each mark. Deleted
        keys beyond `max_events_at_once` are left out: watches read them from history."""
        self._marked_offset = contents.data.offset
        """Where the data file ended at the last mark."""
        self.pinned: list[int] = []
        """Revisions that unfinished reads need; a later compaction waits."""
        self.cut = contents.cut
        """Why recovery cut off the end of the data file; None if it did not."""
        self.checkpoint_begin = contents.checkpoint_begin
        """(segment, offset) from which a start would scan the data file."""
        self.storage_version = contents.checkpoint_version
        """The oldest etcdlite that can open the data directory, as the checkpoint on disk says."""
        self.compaction: Iterator[int] | None = None
        """The pending compaction, for `compact_step`."""
        self.leftovers: list[list[Any]] = []
        """Large lists that nothing needs any more, for maintenance to free in steps."""
        self.uncleanable: set[int] = set()
        """Segments that cleaning leaves alone, because a record in them is damaged."""
        self._first_location = 0
        """Of the first change since `end_revision`; 0 if there is none."""
        self._changes = KeyChanges(contents.revision, limits.kept_key_changes)
        self.counted: dict[tuple[int, bytes | None], tuple[bytes, int]] = {}
        """The last counts of keys one by one, by revision and end: the start of the range, and how
        many keys of it exist as of the revision."""
        self._removal: Removal | None = None
        """Of the revision that is being written, if it begins with a large delete."""
        self._packed_bytes, self._staged_bytes = contents.packed_bytes, 0
        self._is_packing = False
        """A checkpoint is being packed."""

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
        """A new store in an empty folder, durable on return."""
        store = cls(lessor, Contents(disk, directory, segment_bytes, limits), limits)
        disk.make_dir(directory)
        store.data.roll()
        store.index.first_revision = 2
        run(store.checkpoint())
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
        """The store as of its last mark. Raises DataDamaged if that cannot be read completely."""
        contents = Contents(disk, directory, segment_bytes, limits)
        temporary = f"{directory}/{checkpoint.NAME}.tmp"
        if disk.exists(temporary):
            disk.unlink(temporary)
            disk.sync_dir(directory)  # Its space may be needed at once.
        try:
            contents.load()
            store = cls(lessor, contents, limits)
            store._load_leases()
            _ = layout.cluster_version(store.buckets), layout.downgrade_target(store.buckets)
        except (ValueError, LookupError, struct.error, EtcdError) as failure:
            # The checksums are right, so this is not the fault of a disk.
            path = f"{directory}/{checkpoint.NAME}"
            raise DataDamaged(path, 0, f"its content is invalid ({failure})") from failure
        if store.index.past:
            store.compaction = store._compact_steps()
        return store

    def _load_leases(self) -> None:
        if leases := self.buckets.get(layout.LEASE):
            for lease_id, value in leases.items():
                self.lessor.restore(LEASE_KEY.unpack(lease_id)[0], value)
            heads = self.index.heads
            for key, head in zip(heads, heads.rows(b"", None), strict=True):
                if head[4]:
                    self.lessor.attach(key, head[4])

    def close(self) -> None:
        self.data.close()

    # Writing. Between two calls of `end_revision` every change belongs to revision + 1.

    def put(self, key: bytes, value: bytes, lease: int) -> None:
        """Set a key. The caller has checked the lease."""
        self.put_all(((key, value, lease),))

    def put_all(
        self, puts: Sequence[tuple[bytes, bytes, int]], own_revisions: bool = False
    ) -> None:
        """As `put`, for several keys: (key, value, lease). `own_revisions`: each gets a revision of
        its own, as if `end_revision` followed it. Not while `is_writing`."""
        # The hottest path of the program: flat, with code of `Past` and `DataFile`.
        index, data, events = self.index, self.data, self.events
        heads, out, recent = index.heads, data.out, data.recent
        find, unpack_from, long_pasts = heads.find, HEAD.unpack_from, index.past.long
        base, offset = data.base, data.offset
        mod, last_create, mod_varint = self.revision, 0, b""
        if not own_revisions:
            mod += 1
            mod_varint = varint(mod)
            if puts and not self._first_location:
                self._first_location = base | offset
        for key, value, lease in puts:
            location = base | offset
            if own_revisions:
                mod += 1
                mod_varint = varint(mod)
                index.revisions.append(location)
            at, below, is_there = find(key)
            if is_there:
                block, begin = heads.blocks[at], below * HEAD.size
                old_mod, create, version, old, old_lease, old_length = unpack_from(block, begin)
                version += 1
                entry = PAST.pack(old_mod, old, old_length)
                if (entries := long_pasts.get(key)) is not None:
                    entries += entry
                else:
                    index.past.add(key, entry)
                if old_lease:
                    self.lessor.detach(key)
            else:
                create, version = mod, 1
                self._changes.born.append(key)
                self._changes.born_at.append(mod)
            if create != last_create:
                last_create, create_varint = create, varint(create)
            body = encode_key_value(key, create_varint, mod_varint, version, value, lease)
            size = len(body)
            word = size << 4 | PUT
            out += (RECORD_HEADER.pack(crc32(body, word), word), body)
            if is_there:
                HEAD.pack_into(block, begin, mod, create, version, location, lease, size)
            else:
                packed = HEAD.pack(mod, create, version, location, lease, size)
                heads.insert(at, below, [key], packed)
            recent[location] = body
            offset += size + RECORD_HEADER_BYTES
            if lease:
                self.lessor.attach(key, lease)
            events.append((mod, key, False, body))
        overhead_bytes = (RECENT_OVERHEAD_BYTES - RECORD_HEADER_BYTES) * len(puts)
        data.recent_bytes += offset - data.offset + overhead_bytes
        data.offset = offset
        if own_revisions:
            self.revision = mod

    def delete(self, keys: list[bytes]) -> None:
        """Remove keys that exist; they are in order."""
        # Flat: a range delete of a million keys holds back other writes.
        index = self.index
        pack = PAST_AND_TOMBSTONE.pack
        mod = self.revision + 1
        if self._removal is not None:
            self._removal.add(keys)
        tail = b"\x18" + varint(mod)
        bodies = [
            (_KEY[len(key)] if len(key) < 128 else b"\x0a" + varint(len(key))) + key + tail
            for key in keys
        ]
        location = self.data.append_block(
            b"".join([layout.record(layout.TOMBSTONE, body) for body in bodies])
        )
        if not self._first_location:
            self._first_location = location
        entries: list[bytes] = []
        for key, body, head in zip(keys, bodies, index.heads.pop_run(keys), strict=True):
            old_mod, _, _, old, lease, old_length = head
            length = len(body)
            entries.append(pack(old_mod, old, old_length, mod, location, length | DEAD))
            location += length + RECORD_HEADER_BYTES
            if lease:
                self.lessor.detach(key)
        self._changes.add_gone(keys, mod)
        index.past.add_all(keys, entries)
        if len(self.events) <= self.limits.max_events_at_once:
            self.events += [(mod, key, True, body) for key, body in zip(keys, bodies, strict=True)]

    def end_revision(self) -> int:
        """Make the changes since the last call visible, under one new revision if there are any.
        Returns the store's revision."""
        if self._first_location:
            self.index.revisions.append(self._first_location)
            self._first_location = 0
            self._removal = None
            self.revision += 1
        return self.revision

    @property
    def is_writing(self) -> bool:
        """Changes were made that `end_revision` has not made visible yet."""
        return self._first_location != 0

    def begin_removal(self) -> None:
        """Prepare for deleting keys in several steps, so that `count` works between them. Does
        nothing unless this is the first change of the revision."""
        if not self._first_location:
            self._removal = Removal(self.index.heads)

    def delete_steps(self, start: bytes, end: bytes | None) -> Iterator[None]:
        """Delete all keys in [start, end), in steps of one change."""
        index = self.index
        step_keys = self.limits.delete_step_keys
        while True:
            keys = index.heads.first(start, end, step_keys)
            if len(keys) == step_keys:
                self.begin_removal()
            if keys:
                self.delete(keys)
            if len(keys) < step_keys:
                return
            yield

    def mark(self, index: int, term: int) -> None:
        """Record that the state is the one after raft entry `index`, and write it to the file.
        After an OSError of `NO_SPACE` nothing is recorded, and it may be called again."""
        data, revision = self.data, self.revision
        data.append_mark(index, term, revision)
        data.flush()
        self.applied_index = index
        self.applied_term = term
        self.marked_revision = revision
        self._changes.trim()
        if data.is_full:
            data.roll()
        self._marked_offset = data.offset

    def shed_events(self) -> None:
        """Leave `events` to history, all but the first without its record, if they are large: a few
        puts that keep a large value (`ignore_value`) write more than any request has."""
        most_bytes = self.limits.max_event_bytes_at_once
        if self.events and self.data.offset - self._marked_offset > most_bytes:
            self.events = [(*self.events[0][:3], b"")]

    def fill_page(self) -> None:
        """Let what was marked reach the file completely, so that a sync makes all of it durable.
        Between two marks only."""
        self.data.fill_page(self.applied_index, self.applied_term, self.revision)

    def set_bucket(self, bucket: int, key: bytes, value: bytes | None) -> None:
        """Set a key of a bucket, or remove it (None). Makes no revision."""
        items = self.buckets.setdefault(bucket, {})
        if value is None:
            items.pop(key, None)
        else:
            items[key] = value
        if bucket == layout.COMPACTED and value is not None:
            self.compacted = U64.unpack(value)[0]
        elif bucket == layout.LEASE:
            self.lessor.restore(LEASE_KEY.unpack(key)[0], value)
        self.data.append_bucket(bucket, key, value)

    # Reading.

    def get(self, key: bytes, revision: int | None = None) -> bytes | None:
        """The encoded KeyValue of a key, now or as of `revision`; None if it does not exist. Raises
        DataDamaged."""
        if revision is None:
            head = self.index.heads.get(key)
            return None if head is None else self.data.read(head[3], head[5])
        place = self.index.at(key, revision)
        return None if place is None else self.data.read(*place)

    def previous(self, key: bytes, revision: int) -> bytes | None:
        """The encoded KeyValue of `key` just before `revision`; None if absent or compacted. Raises
        DataDamaged."""
        if revision <= self.compacted:
            return None
        return self.get(key, revision - 1)

    def leave(self, items: list[Any]) -> None:
        """The caller, perhaps a read that is given up, does not need this list any more."""
        if len(items) > self.limits.sort_step_items:
            self.leftovers.append(items)

    def free_some(self) -> None:
        """A step of freeing the leftovers."""
        if self.leftovers:
            items = self.leftovers[-1]
            del items[-self.limits.merge_step_items :]
            if not items:
                self.leftovers.pop()

    def check_revision(self, revision: int) -> None:
        """Raise Compacted or FutureRev unless the state as of `revision` can be read (0: now)."""
        if revision <= 0:
            return
        if revision > self.revision:
            raise error("FutureRev")
        if revision < self.compacted:
            raise error("Compacted")

    def scan(
        self, start: bytes, end: bytes | None, revision: int, limit: int, limit_bytes: int = 0
    ) -> tuple[list[tuple[int, int]], bytes | None]:
        """`Index.scan` as of `revision`, which may be the one that is being written. `limit_bytes`
        0 is that of a step. The locations are valid until the next step of any job: cleaning moves
        records."""
        is_now = revision == self.revision + self.is_writing
        as_of, limit_bytes = None if is_now else revision, limit_bytes or self.limits.step_bytes
        return self.index.scan(start, end, as_of, limit, limit_bytes)

    def scan_numbers(
        self,
        start: bytes,
        end: bytes | None,
        revision: int,
        limit: int,
        limit_bytes: int,
        descends: bool = False,
    ) -> tuple[list[Numbered], bytes | None]:
        """`Index.scan_numbers` as of `revision`; as `scan`."""
        as_of = None if revision == self.revision + self.is_writing else revision
        return self.index.scan_numbers(start, end, as_of, limit, limit_bytes, descends)

    def count(self, start: bytes, end: bytes | None, revision: int) -> tuple[int, list[Span]]:
        """How many keys of [start, end) exist as of `revision`, except those in the ranges
        returned, which the caller must count with `Index.count_some`. These are none, or small,
        unless the set of keys changed much since `revision`."""
        base = self.revision + self.is_writing
        spans: list[Span] = []
        removal = self._removal
        counted = None if removal is None or revision >= base else removal.count(start, end)
        if counted is None:
            count = self.index.heads.count(start, end)
        else:
            base -= 1
            count, spans = counted
        for low, high, sign in ((start, end, -1), *((*span, 1) for span in spans)):
            growth = 0 if revision == base else self._changes.growth(low, high, revision, base)
            if growth is None:
                return 0, [(start, end)]
            count += sign * growth
        return count, spans

    def event_steps(
        self, start_revision: int, limit_bytes: int, with_previous: bool = False
    ) -> Generator[None, None, list[Event]]:
        """Events from `start_revision` to the last mark, in order, whole revisions, about
        `limit_bytes` of them (at least one revision): the generator's return value, empty if there
        is none yet. `with_previous`: count the values before them, too.

        A step can end within a revision. Until the last step, or `close`, no compaction drops what
        is still to be read. Raises DataDamaged."""
        index, limits = self.index, self.limits
        events: list[Event] = []
        size = step_events = step_bytes = 0
        revision = max(start_revision, index.first_revision)
        records: Iterator[tuple[int, int, bytes]] = iter(())
        pending: tuple[int, int, bytes] | None = None
        ahead: tuple[bytes, int] | None = None
        """Key and revision of `pending`, if they are decoded already."""
        self.pinned.append(pinned := revision)
        try:
            while revision <= self.marked_revision and size < limit_bytes:
                location = index.revisions[revision - index.first_revision]
                if pending is None or pending[0] != location:
                    number, offset = location >> 32, location & layout.OFFSET_MASK
                    records = self.data.records(number, offset, limits.event_chunk_bytes)
                    pending = next(records, None)
                    ahead = None
                begin, begin_size = len(events), size
                has_moved = False
                while pending is not None:
                    kind = pending[1] & ~layout.MOVED
                    body = pending[2]
                    if kind not in (PUT, layout.TOMBSTONE):
                        pending = next(records, None)
                        if kind == layout.MARK:
                            break
                        continue
                    key, mod = ahead or layout.key_and_revision(body)
                    if mod != revision:
                        ahead = key, mod
                        break
                    ahead = None
                    events.append((mod, key, kind == layout.TOMBSTONE, body))
                    size += len(body)
                    if with_previous and (previous := index.at(key, mod - 1)):
                        size += previous[1] >> PREVIOUS_SHIFT
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
                    # Cleaning is about to remove the segment: read the copy instead.
                    pending = ahead = None
                    del events[begin:]
                    size = begin_size
                    continue
                if len(events) == begin:
                    path = self.data.path(location >> 32)
                    why = f"no change of revision {revision} is there"
                    raise DataDamaged(path, location & layout.OFFSET_MASK, why)
                revision += 1
        finally:
            self.pinned.remove(pinned)
        return events

    def hash_steps(self, revision: int) -> Generator[None, None, int]:
        """CRC-32 of all versions up to `revision` that compaction keeps, `EMPTY_HASH` if there are
        none: the generator's return value. It is the same on all members, however far their
        compactions have come."""
        crc = step_versions = step_bytes = 0
        cursor: bytes | None = b""
        index, limits = self.index, self.limits
        step_keys, most_bytes = limits.range_step_keys, limits.step_bytes
        self.pinned.append(compacted := self.compacted)
        try:
            while cursor is not None:
                keys = index.all_keys(cursor, None, step_keys)
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
        return crc or EMPTY_HASH

    # Compaction.

    def compact(self, revision: int) -> None:
        """Refuse reads below `revision` from now on, and prepare to drop the versions that only
        they need; `compact_step` drops them. Raises EtcdError Compacted or FutureRev."""
        if revision <= self.compact_revision:
            raise error("Compacted")
        if revision > self.revision:
            raise error("FutureRev")
        self.set_bucket(layout.COMPACTED, b"", U64.pack(revision))
        if self.compaction is None:
            self.compaction = self._compact_steps()

    def skip_revisions(self, count: int) -> None:
        """Leave out the next `count` revisions, and compact up to the last one of them. For a
        restored backup: clients may have seen these revisions with other contents."""
        self.revision += count
        self.compact(self.revision)
        while self.compaction is not None:
            self.compact_step()
        self.index.skip_revisions(self.revision)

    @property
    def compact_revision(self) -> int:
        """`compacted` as etcd counts it: -1 until the first compaction, which may be at 0."""
        return self.compacted if layout.COMPACTED in self.buckets else -1

    @property
    def compaction_is_held(self) -> bool:
        """The compaction must wait: a read that began earlier needs what it would drop, or a
        checkpoint is being packed, and its garbage counts must fit the versions in it."""
        return self._is_packing or any(revision < self.compacted for revision in self.pinned)

    def compact_step(self) -> int | None:
        """Do one step of the pending compaction. Returns the versions dropped; None at the end."""
        assert self.compaction is not None and not self.compaction_is_held
        if (dropped := next(self.compaction, None)) is None:
            self.compaction = None
        return dropped

    def _compact_steps(self) -> Iterator[int]:
        compacted = -1
        while compacted < self.compacted:  # A later compaction waits for the end of the earlier.
            compacted = self.compacted
            keys_before = len(self.index.past)
            yield from self.index.compact_steps(compacted, self.data.garbage)
            self._changes.forget(compacted)
            self.lessor.shrink()
            if keys_before > 4096 + 8 * len(self.index.past):
                # Recent records lie scattered among what was freed, and would hold back its memory.
                self.data.drop_recent()
                memory.release()

    # Size and checkpoints.

    @property
    def size_bytes(self) -> int:
        return self.data.size_bytes

    @property
    def size_in_use_bytes(self) -> int:
        return self.data.size_bytes - self.data.garbage_bytes

    @property
    def bytes_since_checkpoint(self) -> int:
        number, offset = self.checkpoint_begin
        sizes = {number: offset, **self.data.sizes, self.data.active: self.data.offset}
        return sum(size for n, size in sizes.items() if n >= number) - offset

    @property
    def checkpoint_space(self) -> int:
        """About how many bytes must be free for the next checkpoint, and for one after it: the one
        before stays until a new one is complete."""
        heads, past, revisions = self.index.heads, self.index.past, len(self.index.revisions)
        entries = max(2 * len(past), revisions - len(heads))
        rows_bytes = HEAD.size * len(heads) + PAST.size * entries + U64.size * revisions
        rows_bytes += 40 * len(self.buckets.get(layout.LEASE, ()))  # A lease takes 35 to 45.
        size = rows_bytes + heads.key_bytes + past.key_bytes
        return max(size, 2 * size - self._packed_bytes) - self._staged_bytes

    def checkpoint(self) -> Job:
        """Write a checkpoint. At the end of the job, log entries up to the applied index of its
        beginning are not needed any more. The first step must run right after a mark. Raises
        `checkpoint.Discarded`."""
        assert self.data.flushed == self.data.offset, "a checkpoint begins after a mark"
        begin = (self.data.active, self.data.offset)
        applied = self.applied_index, self.applied_term
        meta = checkpoint.meta(begin, applied, self.revision, self.compacted, self.data)
        version = layout.cluster_version(self.buckets)
        chunks = checkpoint.chunks(meta, self.buckets, self.index, self.data)
        staged = None
        self._is_packing, self._staged_bytes = True, 0
        try:
            staged = self.disk.stage(f"{self.directory}/{checkpoint.NAME}")
            for part in checkpoint.pack(chunks, version):
                staged.write(part)
                self._staged_bytes += len(part)
                yield None
            staged.finish()
            self.fill_page()
        except OSError as failure:
            if failure.errno not in TRANSIENT:
                raise
            if staged is not None:
                staged.discard()
            self.data.retract()
            self._staged_bytes = 0
            raise checkpoint.Discarded(*failure.args, failure.filename) from failure
        finally:
            self._is_packing = False
        sync = self.data.take_sync()

        def publish() -> None:
            sync()
            staged.publish()

        yield publish
        self.checkpoint_begin = begin
        self._packed_bytes, self._staged_bytes = self._staged_bytes, 0
        self.storage_version = version
        # Segments that were cleaned before this checkpoint are not in it.
        for key in list(self.buckets.get(layout.CLEANED, ())):
            if U64.unpack(key)[0] not in self.data.files:
                del self.buckets[layout.CLEANED][key]
