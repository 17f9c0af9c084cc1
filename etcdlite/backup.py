"""Backups offline: check a snapshot file, and make a new member's data directory of it.

The file is that of `snap.py` or a backup of etcd (`etcd_restore.py`), as it is or encrypted
(`age.py`). Its first bytes tell which.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

from etcdlite import age, bootstrap, datadir, snap
from etcdlite.age import AgeError, DecryptedFile, Identity
from etcdlite.datadir import Home
from etcdlite.etcd_restore import MAX_REVISION, EtcdBackup, has_digest, is_etcd
from etcdlite.flags import NAME
from etcdlite.lease import Lessor
from etcdlite.mvcc import Store
from etcdlite.replica.membership import derive_cluster_id
from etcdlite.snap import Report, SnapshotError
from etcdlite.storage.disk import Disk
from etcdlite.storage.layout import ALARM, DataDamaged
from etcdlite.urls import parse_initial_cluster


class Status(NamedTuple):
    hash: int
    """The first four bytes of the snapshot's SHA-256; of a backup of etcd, the checksum that
    etcdutl shows."""
    revision: int
    total_keys: int
    """Of a backup of etcd: in all buckets, each version of a key counts."""
    total_size_bytes: int


def status(path: str, progress: Report = None, identities: Sequence[Identity] = ()) -> Status:
    """Check a snapshot file completely, each record too, and say what it holds. `progress` gets
    (bytes done, total bytes). `identities` decrypt the file. A backup of etcd may have no SHA-256,
    as for etcdutl. Raises SnapshotError, OSError."""
    with opened(path, identities) as file:
        found: EtcdBackup | _OwnBackup
        if is_etcd(file):
            found = EtcdBackup(path, file, not has_digest(file), progress, hashes=True)
        else:
            found = _OwnBackup(path, file, False, progress)
        return Status(found.hash, found.revision, found.total_keys, found.size_bytes)


def restore(
    path: str,
    home: Home,
    *,
    name: str = "default",
    initial_cluster: str = "",
    initial_cluster_token: str = "etcd-cluster",
    initial_advertise_peer_urls: str = "http://localhost:2380",
    skip_hash_check: bool = False,
    bump_revision: int = 0,
    progress: Report = None,
    identities: Sequence[Identity] = (),
) -> None:
    """Make a new member of a snapshot. It has the keys, revisions and leases of
    the snapshot, but its own membership, so a restored member never joins its old cluster.

    With `bump_revision` the revision continues that much higher, and everything up to there is
    compacted: if it exceeds the number of writes after the snapshot, no client sees revisions go
    back, and watches that have seen later ones are told. All members need the same. `progress` gets
    (bytes done, total bytes). `identities` decrypt the file; nothing of it is written that is not
    encrypted with the member's keys, if it has any. Raises Explained, OSError."""
    founding = founding_of(
        name, initial_cluster, initial_cluster_token, initial_advertise_peer_urls
    )
    with opened(path, identities) as file:
        kind = EtcdBackup if is_etcd(file) else _OwnBackup
        backup = kind(path, file, skip_hash_check, progress)
        if bump_revision and backup.revision + bump_revision > MAX_REVISION:
            raise SnapshotError(
                f"revision {backup.revision + bump_revision} is too high; bump the revision by less"
            )
        founding = of_backup(founding, backup.revision + bump_revision, backup.index)
        sealed = home.data_disk(founding.cluster_id, founding.member_id)
        with new_member(home) as directory:
            store = backup.make_store(sealed, f"{directory}/data", home.segment_bytes)
            if bump_revision:
                store.skip_revisions(bump_revision)
            for key in list(store.buckets.get(ALARM, ())):
                store.set_bucket(ALARM, key, None)
            datadir.finish(home, directory, store, founding)


@contextmanager
def new_member(home: Home) -> Iterator[str]:
    """The directory in which a member is prepared for `datadir.finish`. After a failure, what was
    written there is removed. Raises StartError, OSError."""
    with closing(datadir.lock(home)):
        directory = datadir.begin(home, datadir.RESTORE)
        try:
            yield directory
        finally:
            if home.disk.exists(directory):
                home.disk.remove_tree(directory)


class _OwnBackup:
    """A backup in the format of `snap.py` that was checked, as `EtcdBackup` is one of etcd."""

    def __init__(self, path: str, file: Any, skip_hash_check: bool, progress: Report) -> None:
        """Raises SnapshotError, OSError."""
        self._path = path
        self._file = file
        self._header, self._start = snap.read_header(path, file)
        self.revision: int = self._header["revision"]
        self.index: int = self._header["applied_index"]
        self.total_keys: int = self._header["total_keys"]
        self.hash = 0
        self.size_bytes: int = file.seek(0, os.SEEK_END)
        if not skip_hash_check:
            self._check_digest(progress)
        # If the disk of the member that made the snapshot is failing, the SHA-256 is that of
        # damaged records.
        contents: Any = _Contents(file, self._header, self._start)
        try:
            snap.check_records(contents, "")
        except DataDamaged as damage:
            raise SnapshotError(
                f"snapshot {path} holds damaged data ({os.path.basename(damage.path)} at "
                f"offset {damage.offset}: {damage.why}): the disk of the member that made it is "
                "failing. Use another one, or make one of another member"
            ) from damage

    def _check_digest(self, progress: Report) -> None:
        """Compare the SHA-256 at the end with the content."""
        path, size = self._path, self.size_bytes
        if size % snap.BLOCK_BYTES != snap.DIGEST_BYTES:
            raise SnapshotError(
                f"snapshot {path} has {size} bytes, which is no whole snapshot: saving it was "
                "interrupted, or it was cut. Use another one"
            )
        found, expected = snap.digests(self._file, size, progress)
        if found != expected:
            raise SnapshotError(
                f"snapshot {path} is damaged: its SHA-256 does not match its content. Use another "
                "one"
            )
        self.hash = int.from_bytes(expected[:4], "big")

    def make_store(self, disk: Disk, directory: str, segment_bytes: int) -> Store:
        """As `EtcdBackup.make_store`; raises DataDamaged, too."""
        extract(self._path, self._file, self._header, self._start, directory, disk)
        store = Store.open(disk, directory, Lessor(), segment_bytes)
        if store.revision != self.revision:
            raise SnapshotError(
                f"snapshot {self._path} holds revision {store.revision} instead of "
                f"{self.revision}; it is damaged, use another one"
            )
        return store


def founding_of(
    name: str, initial_cluster: str, token: str, initial_advertise_peer_urls: str
) -> datadir.Founding:
    """The cluster that the flags name; without `initial_cluster`, of this member alone. Raises
    SnapshotError."""
    peer_urls = [url for url in initial_advertise_peer_urls.split(",") if url]
    if not peer_urls:
        raise SnapshotError("--initial-advertise-peer-urls is empty; write http://HOST:PORT")
    initial_cluster = initial_cluster or ",".join(f"{name}={url}" for url in peer_urls)
    try:
        NAME.parse(name)  # The server would not start with another one.
        pairs = parse_initial_cluster(initial_cluster.split(","), name, peer_urls)
    except ValueError as failure:
        flags = f"--name {name}, --initial-cluster {initial_cluster}"
        raise SnapshotError(f"{flags}: {failure}") from failure
    return bootstrap.new_cluster(name, pairs, token)


def of_backup(founding: datadir.Founding, revision: int, index: int) -> datadir.Founding:
    """The same, for a cluster that begins with a backup as of these. It has an id of its own:
    members with another beginning, and those of the old cluster, must not take part, because their
    logs have other entries at the same places."""
    return founding._replace(cluster_id=derive_cluster_id((founding.cluster_id, revision, index)))


@contextmanager
def opened(path: str, identities: Sequence[Identity]) -> Iterator[Any]:
    """The content of a snapshot file, decrypted if it is encrypted. Raises SnapshotError."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as failure:
        raise SnapshotError(f"cannot read snapshot {path}: {failure.strerror}") from failure
    with file:
        is_encrypted = age.is_encrypted(file.read(64))
        file.seek(0)
        if is_encrypted and not identities:
            raise SnapshotError(
                f"snapshot {path} is encrypted; give the file with the identity as --identity"
            )
        if identities and not is_encrypted:
            raise SnapshotError(f"snapshot {path} is not encrypted; leave out --identity")
        try:
            yield DecryptedFile(file, identities) if is_encrypted else file
        except AgeError as failure:
            raise SnapshotError(f"snapshot {path} cannot be decrypted: {failure}") from failure


class _Part:
    """A file in a snapshot, read like a `File`."""

    fault = ""

    def __init__(self, path: str, file: Any, begin: int, size_bytes: int) -> None:
        self.path = path
        self._file = file
        self._begin = begin
        self._size_bytes = size_bytes

    def pread(self, size_bytes: int, offset: int) -> bytes:
        self._file.seek(self._begin + offset)
        part: bytes = self._file.read(max(0, min(size_bytes, self._size_bytes - offset)))
        return part

    def size(self) -> int:
        return self._size_bytes

    def close(self) -> None:
        pass


class _Contents:
    """The files in a snapshot, read like a `Disk` with one folder."""

    page_bytes = 1

    def __init__(self, file: Any, header: dict[str, Any], start: int) -> None:
        self._parts = {}
        for item in header["files"]:
            name, size_bytes = item["name"], item["size_bytes"]
            self._parts[name] = _Part(name, file, start, size_bytes)
            start += size_bytes

    def list(self, path: str) -> list[str]:
        return list(self._parts)

    def open(self, path: str) -> _Part:
        name = path.rpartition("/")[2]
        if name not in self._parts:
            raise DataDamaged(name, 0, "it is missing")
        return self._parts[name]

    open_read = open


def extract(
    path: str, file: Any, header: dict[str, Any], start: int, directory: str, disk: Disk
) -> None:
    disk.make_dir(directory)
    file.seek(start)
    for item in header["files"]:
        target = disk.create(f"{directory}/{item['name']}", b"")
        offset, size = 0, item["size_bytes"]
        while offset < size:
            part = file.read(min(snap.READ_BYTES, size - offset))
            if not part:
                raise SnapshotError(f"snapshot {path} ends inside {item['name']}; use another one")
            target.pwrite(part, offset)
            offset += len(part)
        target.finish()
        target.sync()
        target.close()
    disk.sync_dir(directory)
