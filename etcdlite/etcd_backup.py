"""A backup in etcd's format: what `Maintenance.Snapshot` sends to the clients of etcd.

The file is a database of bbolt (`bolt.py`), whose size is a multiple of 512 bytes, and then the
SHA-256 of it. Its buckets, all integers big-endian:

    key              revision, 17 bytes: main revision u64, "_", sub-revision u64. A tombstone has
                     the letter t behind it. The value is a KeyValue; that of a tombstone has only
                     the key.
    lease            id u64: the record of `lease.py`
    alarm            AlarmMember message: nothing
    auth             authEnabled: 1 or 0, one byte; authRevision: u64
    authUsers        name: authpb.User, roles sorted
    authRoles        name: authpb.Role
    members          id in 16 hex digits: JSON with id, peerURLs, name, clientURLs, isLearner, the
                     last three only if they are not empty
    members_removed  id in 16 hex digits: "removed"
    cluster          clusterVersion: text
    meta             consistent_index u64, term u64; confState: JSON with voters, learners (if there
                     are any) and auto_leave; scheduledCompactRev and finishedCompactRev: revisions,
                     from the first compaction on

The backup says cluster version 3.5.0 and, as etcd 3.5, has no `storageVersion` in `meta`. So etcd
3.4, 3.5 and 3.6 read it, the last one as what version 3.5 left behind.

Revisions, sub-revisions, versions and leases are the ones that the store has, so HashKV of an etcd
that starts from the backup equals the store's. A compaction counts as finished: what it drops is
left out. Hashes of passwords are copied as they are. Etcd verifies those in bcrypt, which came from
an etcd. With one of argon2id nobody logs in to etcd, until the password is set again; in an
etcdlite that restores the backup it still works. The key that signs tokens is left out.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from etcdlite import proto
from etcdlite.etcd_file import REVISION, STEP_ITEMS, Records, contents, hand_over
from etcdlite.limits import Limits
from etcdlite.mvcc import Store
from etcdlite.passwords import is_bcrypt
from etcdlite.storage import layout
from etcdlite.storage.history import History
from etcdlite.storage.steps import sort_steps

VERSION = "3.5.0"
U64 = struct.Struct(">Q")

Item = tuple[bytes, bytes]


class EtcdImage:
    """The backup of a store as of its last mark. It keeps the data files open until `close`."""

    def __init__(self, store: Store) -> None:
        """Take the state of the store, which is at a mark. Raises OSError."""
        self._small = {
            b"lease": dict(store.buckets.get(layout.LEASE, {})),
            b"alarm": dict(_alarms(store)),
            b"auth": dict(_auth(store)),
            b"authUsers": dict(store.buckets.get(layout.AUTH_USER, {})),
            b"authRoles": dict(store.buckets.get(layout.AUTH_ROLE, {})),
            b"members": dict(_members(store)),
            b"members_removed": {
                key.hex().encode(): b"removed" for key in store.buckets.get(layout.REMOVED, ())
            },
            b"cluster": {b"clusterVersion": VERSION.encode()},
            b"meta": dict(_meta(store)),
        }
        self._limits = store.limits
        self.history = History(store)
        self._buckets: list[Records] = []
        self.size_bytes = 0
        """Of the whole backup; known after `prepare_steps`."""
        self.users_without_bcrypt = 0
        """Users who cannot log in to an etcd that restores the backup; known then, too."""

    def prepare_steps(self) -> Generator[None, None, None]:
        """Measure the backup, in steps. Raises DataDamaged, OSError."""
        yield from self.history.scan_steps()
        for count, record in enumerate(self._small[b"authUsers"].values(), 1):
            password = proto.User.decode(record).password
            self.users_without_bcrypt += bool(password) and not is_bcrypt(password)
            if count % STEP_ITEMS == 0:
                yield
        for name, records in self._small.items():
            self._buckets.append((yield from _sorted_steps(name, records, self._limits)))
        self._small = {}
        self.size_bytes, self._parts = contents(self.history, self._buckets)

    def parts(self) -> Iterator[bytes]:
        """The bytes of the backup, to be taken once, after `prepare_steps`. An empty part is a
        pause. Raises DataDamaged, OSError."""
        return self._parts

    def hand_over(self) -> Iterator[Any]:
        """What another process needs to make the same bytes; see `etcd_file.hand_over`."""
        return hand_over(self.history, self._buckets)

    def close(self) -> None:
        self.history.close()


def _sorted_steps(
    name: bytes, records: dict[bytes, bytes], limits: Limits
) -> Generator[None, None, Records]:
    """A bucket of what the store has in memory: there may be very many leases."""
    keys = yield from sort_steps(list(records), limits=limits)
    values = []
    size = most_key_bytes = 0
    for count, key in enumerate(keys, 1):
        values.append(records[key])
        size += len(key) + len(values[-1])
        most_key_bytes = max(most_key_bytes, len(key))
        if count % limits.sort_step_items == 0:
            yield
    return Records(name, keys, values, size, most_key_bytes)


def _alarms(store: Store) -> Iterable[Item]:
    for key in store.buckets.get(layout.ALARM, ()):
        yield proto.AlarmMember(memberID=int.from_bytes(key[:8], "big"), alarm=key[8]).encode(), b""


def _auth(store: Store) -> Iterable[Item]:
    settings = store.buckets.get(layout.AUTH, {})
    yield b"authEnabled", settings.get(b"enabled", b"\0")
    yield b"authRevision", settings.get(b"revision", b"\1").rjust(8, b"\0")


def _members(store: Store) -> Iterable[Item]:
    for key, record in store.buckets.get(layout.MEMBER, {}).items():
        member = proto.Member.decode(record)
        names = ("isLearner", "name", "clientURLs")
        given = {name: value for name in names if (value := getattr(member, name))}
        yield key.hex().encode(), _json({"id": member.ID, "peerURLs": member.peerURLs, **given})


def _meta(store: Store) -> Iterable[Item]:
    stored = store.buckets.get(layout.MEMBER, {})
    members = [proto.Member.decode(record) for record in stored.values()]
    state = {"voters": sorted(m.ID for m in members if not m.isLearner), "auto_leave": False}
    learners = sorted(m.ID for m in members if m.isLearner)
    if learners:
        state["learners"] = learners
    yield b"confState", _json(state)
    yield b"consistent_index", U64.pack(store.applied_index)
    yield b"term", U64.pack(store.applied_term)
    if store.compacted:
        revision = REVISION.pack(store.compacted, b"_", 0)
        yield b"scheduledCompactRev", revision
        yield b"finishedCompactRev", revision


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
