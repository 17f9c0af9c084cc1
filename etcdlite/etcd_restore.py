"""Backups of etcd, read: checked as a whole, and then made into the data of a member.

The format is described in `etcd_backup.py`. Versions of etcd differ in what they write, so all that
the format allows is read: a backup of 3.4 (without term), a data file `member/snap/db` (without the
SHA-256 at its end), a compaction that was not finished. Of each key, what etcd would drop is
dropped. Alarms, members and versions of the old cluster are left out, as etcd's own restore leaves
them out, except that it keeps alarms.

A backup is refused before anything is written if it is not the history of an etcd: with a damaged
page, a record that is not a KeyValue or is of another revision, or a missing revision.

A key whose lease does not exist never expires, as in etcd. A revision without a key, which
`etcdutl snapshot restore --bump-revision` leaves behind, is left out; such a backup has another
HashKV here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from etcdlite import bolt, crc32c, proto
from etcdlite.etcd_backup import U64
from etcdlite.etcd_file import BLOCK_BYTES, DIGEST_BYTES, REVISION, REVISION_BYTES
from etcdlite.lease import KEY, MAX_TTL_S, Lessor
from etcdlite.limits import DEFAULT_LIMITS
from etcdlite.mvcc import Store, encode_key_value
from etcdlite.proto import DecodeError, varint
from etcdlite.snap import Report, SnapshotError, digests
from etcdlite.storage import layout
from etcdlite.storage.disk import Disk
from etcdlite.storage.layout import PUT, TOMBSTONE
from etcdlite.storage.recovery import Contents

MAX_INDEX = 1 << 62
"""A log index, term or auth revision above this is refused: no cluster reaches it."""

MAX_REVISION = 3 << 61
"""Of a restored member; revisions have 63 bits."""

MAX_META_BYTES = 1 << 20

MAX_SUB_REVISION = (1 << 32) - 1

MARK_RECORDS = 256
"""After this many records the data file gets a mark."""

_FIRST_BYTES = bytes(8) + bolt.META.to_bytes(2, "little")


def is_etcd(file: Any) -> bool:
    """Whether a file is a database of bbolt. Its position is 0 before and after."""
    first_bytes = file.read(20)
    file.seek(0)
    return first_bytes.startswith(_FIRST_BYTES) or (
        first_bytes[16:20] == bolt.MAGIC.to_bytes(4, "little")
    )


def has_digest(file: Any) -> bool:
    """Whether the size of a backup of etcd says that its SHA-256 is there."""
    size: int = file.seek(0, os.SEEK_END)
    return size % BLOCK_BYTES == DIGEST_BYTES


def check_digest(path: str, file: Any, progress: Report = None) -> None:
    """Compare the SHA-256 at the end of a backup of etcd with the content. Raises SnapshotError,
    OSError."""
    if not has_digest(file):
        raise SnapshotError(
            f"backup {path} of etcd has no SHA-256 at its end. If it is the file member/snap/db of "
            "a data directory, give --skip-hash-check; otherwise it was cut, so use another one"
        )
    found, expected = digests(file, file.seek(0, os.SEEK_END), progress)
    if found != expected:
        raise _refusal(path, "its SHA-256 does not match its content")


def _refusal(path: str, why: object) -> SnapshotError:
    return SnapshotError(f"backup {path} of etcd is damaged: {why}. Use another one")


class Change(NamedTuple):
    """A record of the bucket `key`."""

    revision: int
    sub: int
    kind: int
    """PUT or TOMBSTONE."""
    body: bytes
    """As in the data file."""
    lease: int


class EtcdBackup:
    """A backup that was checked."""

    def __init__(
        self,
        path: str,
        file: Any,
        skip_hash_check: bool = False,
        progress: Report = None,
        hashes: bool = False,
    ) -> None:
        """Check all of it. `file` is open; with `hashes` the result has a `hash`. `progress` gets
        (bytes done, total bytes) of the SHA-256. Raises SnapshotError, OSError."""
        self._path = path
        self.hash = 0
        """The one of `etcdutl snapshot status`: CRC-32C over buckets, keys and values."""
        self.total_keys = 0
        """Of all buckets."""
        self.revision = 1
        self.compacted = 0
        self._meta: dict[bytes, bytes] = {}
        self._leases: dict[bytes, bytes] = {}
        self._auth: dict[bytes, bytes] = {}
        self._users: dict[bytes, bytes] = {}
        self._roles: dict[bytes, bytes] = {}
        self._update = crc32c.update if hashes else None
        if not skip_hash_check:
            check_digest(path, file, progress)
        size = file.seek(0, os.SEEK_END)
        try:
            self._reader = bolt.Reader(file, size - DIGEST_BYTES * has_digest(file))
            self._check()
        except (bolt.BoltError, ValueError) as failure:
            raise _refusal(path, failure) from failure

    @property
    def size_bytes(self) -> int:
        """Of the database."""
        return self._reader.pages * self._reader.page_bytes

    # The check. A ValueError says what is wrong.

    def _check(self) -> None:
        reader = self._reader
        places = reader.buckets()
        if b"key" not in places or b"meta" not in places:
            raise ValueError("it has no buckets of etcd, so another program wrote it")
        self._meta = dict(_few(reader.items(places[b"meta"])))
        self._check_meta()
        take = {
            b"lease": self._take_lease,
            b"auth": self._auth.__setitem__,
            b"authUsers": self._take_user,
            b"authRoles": self._take_role,
        }
        for name, place in reader.buckets().items():
            self._add_to_hash(name)
            items = self._counted(reader.items(place))
            if name == b"key":
                for change in self._changes(items):
                    self.revision = change.revision
                continue
            take_item = take.get(name)
            for key, value in items:
                if take_item is not None:
                    take_item(key, value)
        self.revision = max(self.revision, self.compacted)
        if int.from_bytes(self._auth.get(b"authRevision", b""), "big") > MAX_INDEX:
            raise ValueError("its auth revision is out of range")

    def _add_to_hash(self, data: bytes) -> None:
        if self._update is not None:
            self.hash = self._update(data, self.hash)

    def _counted(self, items: Iterator[bolt.Item]) -> Iterator[bolt.Item]:
        for item in items:
            self.total_keys += 1
            if self._update is not None:
                self._add_to_hash(item[0])
                self._add_to_hash(item[1])
            yield item

    def _check_meta(self) -> None:
        applied = []
        for name in (b"consistent_index", b"term"):
            value = self._meta.get(name, bytes(8))
            if len(value) != 8 or U64.unpack(value)[0] > MAX_INDEX:
                raise ValueError(f"its {name.decode()} is {value.hex()}")
            applied.append(max(1, *U64.unpack(value)))
        self.index, self._term = applied
        """Of the last entry of the log that it has."""
        for name in (b"scheduledCompactRev", b"finishedCompactRev"):
            if name in self._meta:
                revision, _, is_delete = _revision_of(self._meta[name])
                if is_delete:
                    raise ValueError(f"its {name.decode()} is a tombstone")
                self.compacted = max(self.compacted, revision)

    def _take_lease(self, key: bytes, value: bytes) -> None:
        if len(key) != KEY.size or not any(key):
            raise ValueError(f"{key.hex()} is not the id of a lease")
        lessor = Lessor()
        (lease_id,) = KEY.unpack(key)
        lessor.restore(lease_id, value)
        if not 0 < lessor.ttl_s(lease_id) <= MAX_TTL_S:
            raise ValueError(f"lease {key.hex()} has a TTL of {lessor.ttl_s(lease_id)} s")
        self._leases[key] = value

    def _take_user(self, key: bytes, value: bytes) -> None:
        user = proto.User.decode(value)
        if not key or user.name != key:
            raise ValueError(f"the record of user {key!r} has the name of another one")
        key.decode()  # A UnicodeDecodeError is a ValueError.
        user.roles = sorted(user.roles, key=str.encode)
        self._users[key] = user.encode()

    def _take_role(self, key: bytes, value: bytes) -> None:
        if not key or proto.Role.decode(value).name != key:
            raise ValueError(f"the record of role {key!r} has the name of another one")
        key.decode()
        self._roles[key] = value

    def _changes(self, items: Iterator[bolt.Item]) -> Iterator[Change]:
        """The changes of the bucket `key`, checked one by one and as a history."""
        last, compacted = 1, max(self.compacted, 1)
        last_sub = -1
        for key, value in items:
            revision, sub, is_delete = _revision_of(key)
            if revision == last and sub == last_sub:
                raise ValueError(f"it has revision {revision}.{sub} twice")
            if revision > compacted and revision != last and revision != max(last, compacted) + 1:
                raise ValueError(f"revision {max(last, compacted) + 1} is missing")
            last, last_sub = revision, sub
            if not value and not is_delete and revision <= compacted:
                continue  # `--bump-revision` of etcdutl wrote it.
            yield _change(revision, sub, is_delete, value)

    # The data of a member.

    def make_store(self, disk: Disk, directory: str, segment_bytes: int) -> Store:
        """A store with all that is in the backup, in a new folder. Raises SnapshotError,
        OSError."""
        disk.make_dir(directory)
        contents = Contents(disk, directory, segment_bytes)
        contents.data.roll()
        contents.applied_index, contents.applied_term = self.index, self._term
        try:
            self._append_changes(contents)
        except (bolt.BoltError, ValueError) as failure:
            contents.data.close()
            raise _refusal(self._path, failure) from failure
        contents.revision = self.revision
        auth = self._auth
        enabled = {b"enabled": auth[b"authEnabled"]} if b"authEnabled" in auth else {}
        if b"authRevision" in auth:
            enabled[b"revision"] = auth[b"authRevision"]
        contents.buckets = {
            layout.LEASE: self._leases,
            layout.AUTH: enabled,
            layout.AUTH_USER: self._users,
            layout.AUTH_ROLE: self._roles,
        }
        if self.compacted:
            contents.buckets[layout.COMPACTED] = {b"": layout.U64.pack(self.compacted)}
        store = Store(Lessor(), contents, DEFAULT_LIMITS)
        if self.compacted:
            # Etcd may have been about to drop some of it.
            for _ in store.index.compact_steps(self.compacted, store.data.garbage):
                pass
        return store

    def _append_changes(self, contents: Contents) -> None:
        data, index = contents.data, contents.index
        applied = contents.applied_index, contents.applied_term
        numbering = layout.Numbering()
        index.first_revision = max(self.compacted, 2)
        last = unmarked = 0
        for change in self._changes(self._reader.items(self._reader.buckets()[b"key"])):
            revision = change.revision
            if revision != last and unmarked >= MARK_RECORDS:
                data.append_mark(*applied, last)
                data.flush()
                if data.is_full:
                    data.roll()
                numbering.reset()
                unmarked = 0
            if revision > self.compacted and not index.revisions:
                index.skip_revisions(revision - 1)
            block = numbering.set(revision, change.sub)
            if block:
                data.append_block(block)
                data.garbage[data.active] += len(block)
            contents.append_change(change.kind, change.body)
            if change.lease and KEY.pack(change.lease) not in self._leases:
                # Take the lease from the key, so that the key does not expire.
                key, _ = layout.key_and_revision(change.body)
                mod, create, version, location, _, length = index.heads[key]
                index.heads[key] = (mod, create, version, location, 0, length)
            data.flush_part()
            last = revision
            unmarked += 1
        if not index.revisions:
            index.skip_revisions(self.revision)
        data.append_mark(*applied, self.revision)
        data.flush()


def _few(items: Iterator[bolt.Item]) -> Iterator[bolt.Item]:
    """The items of a bucket that is small. Raises ValueError if it is not."""
    size = 0
    for key, value in items:
        size += len(key) + len(value)
        if size > MAX_META_BYTES:
            raise ValueError("its bucket meta is too large")
        yield key, value


def _revision_of(key: bytes) -> tuple[int, int, bool]:
    """(revision, sub-revision, is a delete). Raises ValueError."""
    is_delete = len(key) == REVISION_BYTES + 1 and key[-1:] == b"t"
    if len(key) == REVISION_BYTES or is_delete:
        revision, separator, sub = REVISION.unpack_from(key)
        if separator == b"_" and 0 < revision <= MAX_REVISION and sub <= MAX_SUB_REVISION:
            return revision, sub, is_delete
    raise ValueError(f"{key[:32].hex()} is not a revision")


def _change(revision: int, sub: int, is_delete: bool, value: bytes) -> Change:
    """The checked change of one record. Raises ValueError if the value is not of this revision."""
    try:
        kv = proto.KeyValue.decode(value)
    except DecodeError as failure:
        raise ValueError(f"revision {revision}.{sub} has no valid value: {failure}") from failure
    if not kv.key or len(value) > layout.MAX_BODY_BYTES:
        raise ValueError(
            f"revision {revision}.{sub} has no valid value: its key is empty, or it is too large"
        )
    if is_delete:
        body = proto.KeyValue(key=kv.key, mod_revision=revision).encode()
        return Change(revision, sub, TOMBSTONE, body, 0)
    create, version, lease = kv.create_revision, kv.version, kv.lease
    if kv.mod_revision != revision or not 0 < create <= revision or version < 1:
        raise ValueError(f"the value of revision {revision}.{sub} is that of another revision")
    body = encode_key_value(kv.key, varint(create), varint(revision), version, kv.value, lease)
    return Change(revision, sub, PUT, body, lease)
