"""A member's data directory: its layout, how it is created, and how it is opened again.

    <data-dir>/lock          held by the running process
    <data-dir>/member/wal/   the write-ahead log (or in wal-dir)
    <data-dir>/member/data/  data segments and checkpoint
    <data-dir>/member/incoming/          a snapshot while it is received from the leader
    <data-dir>/member/snapshot-<index>/  that snapshot once it is complete (index in 16 hex digits)

The directory `member` appears by one rename after everything in it is durable, so an interrupted
first start or restore leaves nothing that looks like a member. Until the rename a first start works
in `member.tmp`, which the next one replaces. A restore works in `restore.tmp`, which stops a first
start: where a backup was to be restored, no member may begin empty.

A log in wal-dir is made in a folder `.new-<random>` there, and moved out of it after that rename,
or by the next start. An empty folder of that name in the directory `member` says whose log it is.

A snapshot from the leader replaces the data in steps, and a crash may follow each of them: the
snapshot gets its own name (`keep_incoming`); the log is marked as starting at the snapshot, which
decides; the data is removed and the snapshot is moved to its place (`install_snapshot`).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection
from contextlib import suppress
from typing import NamedTuple

from etcdlite import proto
from etcdlite.errors import REPLACE, Explained, MayPass
from etcdlite.lease import Lessor
from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.mvcc import Store
from etcdlite.permissions import remedy
from etcdlite.raft import HardState
from etcdlite.raft_log import Entry
from etcdlite.sealing import Keyring
from etcdlite.storage import checkpoint, layout
from etcdlite.storage.checkpoint import NAME as CHECKPOINT
from etcdlite.storage.disk import Disk, File
from etcdlite.storage.layout import DataDamaged, DataVersionError
from etcdlite.storage.sealed import SealedDisk
from etcdlite.storage.steps import run
from etcdlite.versions import CURRENT, OLDEST, Version, incompatibility
from etcdlite.wal import WAL

_IDENTITY = struct.Struct("<QQ")
"""The log's metadata: cluster id, member id."""


class StartError(Explained):
    """The member cannot start. The text says why and what to do."""


class Home(NamedTuple):
    """Where a member keeps its files."""

    disk: Disk
    data_dir: str
    wal_dir: str = ""
    """The directory of the log; empty: it is in the data directory."""
    keys: Keyring | None = None
    """What the files are sealed with; None: what is written is plain."""
    segment_bytes: int = 16 << 20
    wal_segment_bytes: int = 16 << 20
    """The sizes of new segments of the data and of the log."""

    @property
    def member(self) -> str:
        return f"{self.data_dir}/member"

    @property
    def data(self) -> str:
        """The folder of the segments and the checkpoint."""
        return f"{self.member}/data"

    @property
    def logs(self) -> str:
        return self.wal_dir or f"{self.member}/wal"

    @property
    def exists(self) -> bool:
        """There is a member."""
        return self.disk.exists(self.member)

    def data_disk(self, cluster_id: int, member_id: int) -> Disk:
        """The disk on which the member has its data: its files are sealed if there are keys."""
        if self.keys is None:
            return self.disk
        return SealedDisk(self.disk, self.keys, _IDENTITY.pack(cluster_id, member_id))


class Opened(NamedTuple):
    """A member's state as recovered from disk."""

    cluster_id: int
    member_id: int
    store: Store
    wal: WAL
    hard_state: HardState
    log_index: int
    log_term: int
    """Index and term of the entry before the first of `entries`."""
    entries: list[Entry]
    """The entries that the store has not applied, and some earlier ones for slow members."""
    notes: list[str]
    """What recovery repaired, one line each."""


_EXPECTED = frozenset(("lock", "fixtures", "member", "member.tmp", "restore.tmp", "lost+found"))
"""Names in a data directory that are no reason to refuse it. The root of a file system has a
lost+found."""


def lock(home: Home, own: Collection[str] = ()) -> File:
    """Create the data directory if it is missing, and take its lock.

    Raises MayPass if the directory cannot be used, and StartError, before anything is written, if
    it or `wal_dir` holds anything but a member. `own`: paths of other files that may be there."""
    disk, data_dir = home.disk, home.data_dir
    try:
        check_contents(home, own)
        disk.make_dir(data_dir)
        return disk.lock(f"{data_dir}/lock")
    except BlockingIOError:
        raise MayPass(
            f"data directory {data_dir} is in use by another etcdlite process. Stop that one, or "
            "give this one its own --data-dir"
        ) from None
    except OSError as failure:
        where = str(failure.filename)
        raise MayPass(
            f"cannot use data directory {os.path.abspath(data_dir)}: {failure.strerror}. "
            f"{remedy(failure, where if os.path.exists(where) else data_dir)}"
        ) from failure


def separate_wal_dir(data_dir: str, wal_dir: str) -> str:
    """`wal_dir`; empty if it is the directory in which a log is anyway, which is made with the rest
    of `member`."""
    usual = os.path.abspath(f"{data_dir}/member/wal")
    return "" if wal_dir and os.path.abspath(wal_dir) == usual else wal_dir


def check_contents(home: Home, own: Collection[str]) -> None:
    """Check the directories of a start; writes nothing. `own`: paths of other files that may be
    there. Raises StartError if one holds anything but a member, and OSError."""
    disk, data_dir, wal_dir, *_ = home
    if home.exists:
        if not WAL.exists(disk, home.logs) and disk.exists(f"{home.member}/snap"):
            raise StartError(
                f"{data_dir} is a data directory of etcd, which etcdlite cannot continue. Give "
                "another --data-dir, and make it of a backup of the etcd with 'etcdlite-ctl "
                "snapshot restore': see docs/etcd-backups.md"
            )
        return
    member_dir = os.path.abspath(home.member)
    if f"{os.path.abspath(wal_dir)}/".startswith(f"{member_dir}/"):
        raise StartError(
            f"wal-dir {wal_dir} is in {member_dir}, which a new member creates itself. Leave out "
            f"wal-dir to use {member_dir}/wal, or name another directory"
        )
    allowed = {os.path.abspath(path) for path in (*own, wal_dir, data_dir) if path}
    for directory in filter(None, (data_dir, wal_dir)):
        if not disk.exists(directory) or WAL.exists(disk, directory):
            continue
        foreign = [
            name
            for name in disk.list(directory)
            if name not in _EXPECTED
            and not name.startswith(".")
            and os.path.abspath(f"{directory}/{name}") not in allowed
        ]
        if foreign:
            flag = "--data-dir" if directory == data_dir else "--wal-dir"
            more = ", ..." if len(foreign) > 3 else ""
            raise StartError(
                f"{directory} holds no member but other files: {', '.join(foreign[:3])}{more}. "
                f"Give an empty {flag}"
            )


def identity(metadata: bytes) -> tuple[int, int]:
    """Cluster id and member id, from the metadata of the log."""
    cluster_id, member_id = _IDENTITY.unpack(metadata)
    return cluster_id, member_id


class Founding(NamedTuple):
    """The identity and the members with which a member starts for the first time."""

    cluster_id: int
    member_id: int
    members: list[proto.Member]
    """`Member` messages, including this member's."""


def create(
    home: Home, founding: Founding, is_joining: bool = False, version: Version = CURRENT
) -> None:
    """Create a new member. One that joins a running cluster begins without members: it receives
    the membership from the leader, as it receives all other state. A new cluster has the cluster
    version `version`. Raises StartError, OSError."""
    restored = f"{home.data_dir}/{RESTORE}"
    if home.disk.exists(restored):
        raise StartError(
            f"a restore of a backup into data directory {home.data_dir} was interrupted. Repeat "
            f"it, or remove {restored} to begin with an empty member"
        )
    directory = begin(home, _FIRST_START)
    sealed = home.data_disk(founding.cluster_id, founding.member_id)
    store = Store.create(sealed, f"{directory}/data", Lessor(), home.segment_bytes)
    if is_joining:
        founding = founding._replace(members=[])
    elif version > OLDEST:
        store.set_bucket(layout.CLUSTER, layout.CLUSTER_VERSION, str(version).encode())
    finish(home, directory, store, founding)


def begin(home: Home, name: str) -> str:
    """Make the empty directory `name` in which a new member is prepared, and return its path.
    `finish` publishes it. Raises StartError if data_dir holds a member, MayPass if wal_dir does."""
    disk, data_dir, wal_dir, *_ = home
    if home.exists:
        raise StartError(f"data directory {data_dir} already holds a member; name another one")
    for left in (f"{data_dir}/{_FIRST_START}", f"{data_dir}/{RESTORE}"):
        for folder in _new_logs(disk, left):
            _remove_tree(disk, f"{wal_dir}/{folder}")
        _remove_tree(disk, left)
    if wal_dir and (WAL.exists(disk, wal_dir) or _new_logs(disk, wal_dir)):
        raise MayPass(  # The disk of the data may not be mounted yet.
            f"wal directory {wal_dir} holds the log of a member, but data directory {data_dir} "
            "holds no member. Give the data directory that belongs to it, or an empty --wal-dir"
        )
    directory = f"{data_dir}/{name}"
    disk.make_dir(directory)
    return directory


def finish(home: Home, directory: str, store: Store, founding: Founding) -> None:
    """Give the store a new membership and no number of a founding, close it, create the log, and
    publish the member that `begin` started. `founding` has no members if this one joins others."""
    disk, wal_dir = home.disk, home.wal_dir
    for bucket in (layout.MEMBER, layout.REMOVED):
        for key in list(store.buckets.get(bucket, ())):
            store.set_bucket(bucket, key, None)
    for member in founding.members:
        store.set_bucket(layout.MEMBER, member.ID.to_bytes(8, "big"), member.encode())
    if (version := layout.cluster_version(store.buckets)) > OLDEST:
        store.set_bucket(layout.CLUSTER, layout.CLUSTER_VERSION, str(version).encode())
    store.mark(store.applied_index, store.applied_term)
    run(store.checkpoint())
    store.close()
    metadata = _IDENTITY.pack(founding.cluster_id, founding.member_id)
    logs = f"{directory}/wal"
    if wal_dir:
        folder = f"{_NEW_LOG}{os.urandom(8).hex()}"
        disk.make_dir(f"{directory}/{folder}")
        disk.sync_dir(directory)
        logs = f"{wal_dir}/{folder}"
    wal = WAL.create(disk, logs, metadata, home.wal_segment_bytes, keys=home.keys)
    if store.applied_index:
        wal.save(HardState(store.applied_term, 0, store.applied_index), ())
        wal.mark_snapshot(store.applied_index, store.applied_term)
    wal.close()
    disk.sync_dir(directory)
    if wal_dir:
        disk.sync_dir(os.path.dirname(os.path.abspath(wal_dir)))
    disk.rename(directory, home.member)
    _settle(home)


def _settle(home: Home) -> None:
    """Make the rename in `finish` durable, and move a new log to its place in wal-dir."""
    disk, data_dir, wal_dir, *_ = home
    disk.sync_dir(data_dir)
    with suppress(PermissionError):  # Then the data directory was there before the first start.
        disk.sync_dir(os.path.dirname(os.path.abspath(data_dir)))
    for folder in _new_logs(disk, home.member):
        new = f"{wal_dir}/{folder}"
        if disk.exists(new):
            if (names := disk.list(new)) and WAL.exists(disk, wal_dir):
                raise StartError(f"{wal_dir} holds the log of another member; name another wal-dir")
            for name in names:
                disk.rename(f"{new}/{name}", f"{wal_dir}/{name}")
            disk.sync_dir(wal_dir)
            disk.remove_tree(new)
            disk.remove_tree(f"{home.member}/{folder}")


def _new_logs(disk: Disk, directory: str) -> list[str]:
    """The names of the folders `.new-<random>` in a wal-dir or in the directory of a member."""
    names = disk.list(directory) if disk.exists(directory) else []
    return [name for name in names if name.startswith(_NEW_LOG)]


RESTORE = "restore.tmp"
_FIRST_START = "member.tmp"
_NEW_LOG = ".new-"
_SNAPSHOT = "snapshot-"
_SNAPSHOT_NAME = re.compile(_SNAPSHOT + "[0-9a-f]{16}")


def incoming_directory(data: str) -> str:
    """The directory for a snapshot that is being received. `data`: the member's data folder."""
    return f"{os.path.dirname(data)}/incoming"


def keep_incoming(disk: Disk, data: str, index: int) -> None:
    """Give a snapshot that is complete and synced its own name."""
    directory = os.path.dirname(data)
    _remove_tree(disk, f"{directory}/{_SNAPSHOT}{index:016x}")
    disk.rename(f"{directory}/incoming", f"{directory}/{_SNAPSHOT}{index:016x}")
    disk.sync_dir(directory)


def install_snapshot(disk: Disk, data: str, index: int) -> None:
    """Replace the data by the snapshot. The log must be marked already."""
    directory = os.path.dirname(data)
    _remove_tree(disk, data)  # In overlayfs, a directory of a lower layer cannot be renamed.
    disk.rename(f"{directory}/{_SNAPSHOT}{index:016x}", data)
    disk.sync_dir(directory)


def drop_snapshot(disk: Disk, data: str, index: int) -> None:
    _remove_tree(disk, f"{os.path.dirname(data)}/{_SNAPSHOT}{index:016x}")


def data_folders(home: Home) -> list[str]:
    """The folders of a member with segments and checkpoints, but for the one of a snapshot that is
    being received."""
    names = [name for name in home.disk.list(home.member) if _SNAPSHOT_NAME.fullmatch(name)]
    folders = [f"{home.member}/{name}" for name in names]
    if home.disk.exists(home.data):
        folders.append(home.data)
    return folders


def settle_snapshots(disk: Disk, data: str, marker_index: int) -> None:
    """Finish an installation that a crash interrupted. `marker_index`: the index of the latest
    snapshot marker in the log."""
    directory = os.path.dirname(data)
    _remove_tree(disk, f"{directory}/incoming")
    for name in disk.list(directory):
        if not _SNAPSHOT_NAME.fullmatch(name):
            continue
        index = int(name[len(_SNAPSHOT) :], 16)
        # The member's own checkpoints set the marker, too. Data without one was being removed.
        has_checkpoint = disk.exists(f"{data}/{CHECKPOINT}")
        is_older = not has_checkpoint or checkpoint.applied_index(disk, data) < index
        if index == marker_index and is_older:
            install_snapshot(disk, data, index)
        else:
            drop_snapshot(disk, data, index)
    disk.sync_dir(directory)  # A kill may have come after the rename in `install_snapshot`.
    _remove_tree(disk, f"{data}.old")  # Earlier programs moved the data there.


def _remove_tree(disk: Disk, path: str) -> None:
    if disk.exists(path):
        disk.remove_tree(path)


def _check_version(disk: Disk, data: str, version: Version) -> None:
    """Refuse data that a program of this version cannot open, before anything is written. Raises
    StartError, DataVersionError. (What is sealed or damaged is looked at later.)"""
    try:
        needs = checkpoint.needed_version(disk, data)
    except DataVersionError:
        raise
    except (DataDamaged, FileNotFoundError):
        return
    if version < needs:
        raise StartError(f"{data}: {incompatibility(version, needs)}. Nothing was changed")


def open_member(
    home: Home,
    *,
    min_ttl_s: int,
    sync_enabled: bool,
    limits: Limits = DEFAULT_LIMITS,
    version: Version = CURRENT,
) -> Opened:
    """Recover a member's state from its log and data.

    Raises StartError, MayPass, DataDamaged, WALError, OSError."""
    logs, data = home.logs, home.data
    _settle(home)  # A kill may have come after the rename in `finish`.
    if not WAL.exists(home.disk, logs):
        kind = MayPass if home.wal_dir else StartError  # That disk may not be mounted yet.
        raise kind(
            f"there is no write-ahead log in {logs}, but {home.member} holds a member's data. Give "
            f"the --wal-dir that belongs to it. Or: {REPLACE}"
        )
    _check_version(home.disk, data, version)
    wal, recovered = WAL.open(
        home.disk, logs, home.wal_segment_bytes, sync_enabled=sync_enabled, keys=home.keys
    )
    ids = identity(recovered.metadata)
    disk = home.data_disk(*ids)
    settle_snapshots(disk, data, recovered.snapshot[0])
    if not disk.exists(f"{data}/{CHECKPOINT}"):
        raise StartError(
            f"{data}/{CHECKPOINT} is missing: the data directory is incomplete. {REPLACE}"
        )
    store = Store.open(disk, data, Lessor(min_ttl_s, limits), home.segment_bytes, limits)
    # A member that joins has no version until it hears from the leader.
    if store.buckets.get(layout.MEMBER) and (
        why := incompatibility(version, layout.cluster_version(store.buckets))
    ):
        raise StartError(f"{home.member}: {why}. No key is changed")
    notes = [recovered.torn] if recovered.torn else []
    if store.cut is not None:
        notes.append(
            f"{store.cut.path}: {store.cut.why} at offset {store.cut.offset}; the data file was "
            "cut there and is rewritten from the write-ahead log"
        )
    entries = [entry for entry in recovered.entries if entry.index > store.applied_index]
    _check_log_covers(store, wal, recovered.entries, entries, logs)
    log_index, log_term = store.applied_index, store.applied_term
    if recovered.entries and recovered.entries[0].index < log_index:
        # Slow members may need the entries before those that must be applied. The first of them
        # cannot be sent: it only tells the term at which the log begins.
        log_term, log_index, _, _ = recovered.entries[0]
        entries = recovered.entries[1:]
    hard_state = recovered.hard_state
    return Opened(*ids, store, wal, hard_state, log_index, log_term, entries, notes)


def membership(store: Store, member_id: int) -> list[proto.Member]:
    """The `Member` messages in a store. A member that joins has none until it hears from a leader.
    Raises StartError if this member was removed."""
    if member_id.to_bytes(8, "big") in store.buckets.get(layout.REMOVED, ()):
        raise StartError(
            f"member {member_id:x} was removed from the cluster, and its data directory is no "
            "longer usable. To join again, remove the data directory, add the member with "
            "'etcdlite-ctl member add', and start it with --initial-cluster-state existing"
        )
    return [
        proto.Member.decode(value)
        for _, value in sorted(store.buckets.get(layout.MEMBER, {}).items())
    ]


def _check_log_covers(
    store: Store, wal: WAL, recovered: list[Entry], entries: list[Entry], logs: str
) -> None:
    """Raise StartError unless log and data are of one history without a gap. (The log is never
    behind the data.)"""
    problem = ""
    if wal.last_index < store.applied_index:
        problem = (
            f"the log ends at entry {wal.last_index}, but the data has applied entry "
            f"{store.applied_index}"
        )
    elif entries and entries[0].index != store.applied_index + 1:
        problem = (
            f"the log begins at entry {entries[0].index}, but the data ends at entry "
            f"{store.applied_index}"
        )
    else:
        for entry in recovered:
            if entry.index == store.applied_index and entry.term != store.applied_term:
                problem = (
                    f"entry {entry.index} is of term {entry.term} in the log and of term "
                    f"{store.applied_term} in the data"
                )
    if problem:
        raise StartError(
            f"write-ahead log {logs} does not belong to the data, or part of it is lost: "
            f"{problem}. {REPLACE}"
        )
