"""Snapshots: a copy of the whole state as one file, for backups.

A snapshot is what a member has on disk at one moment: the checkpoint and the data segments, as long
as they are then. Nothing is copied to make it; the files are read while they are sent, and they do
not change or lose their content meanwhile (segments only grow or go as a whole, and an open file
stays readable).

The file, all integers little-endian:

    0   8  magic "ETCDLSNP"
    8   4  format version, 1
    12  4  length of the header
    16  n  header: JSON with cluster_id, member_id, revision, compact_revision, applied_index,
           applied_term, total_keys, etcdlite_version, and files: [{name, size_bytes}]
        -  the files, one after the other
        -  zeros up to a multiple of 512
       32  SHA-256 of everything before

A file of a multiple of 512 bytes plus a SHA-256 is what etcd's tools expect of a snapshot, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from etcdlite import ETCD_API_VERSION, __version__, bootstrap, checkpoint, proto
from etcdlite.data import DataDamaged, segment_name
from etcdlite.disk import Disk, File
from etcdlite.errors import DATA_LOSS, EtcdError
from etcdlite.lease import Lessor
from etcdlite.mvcc import ALARM, Store

if TYPE_CHECKING:
    from etcdlite.member import Member

MAGIC = b"ETCDLSNP"
FORMAT_VERSION = 1
CHUNK_BYTES = 128 * 1024
MAX_HEADER_BYTES = 16 << 20
DIGEST_BYTES = 32
BLOCK_BYTES = 512


class SnapshotError(Exception):
    """The snapshot cannot be used, or not there; the text says why and what to do."""


class Status(NamedTuple):
    hash: int
    """The first four bytes of the snapshot's SHA-256."""
    revision: int
    total_keys: int
    total_size_bytes: int
    version: str


# Making one.


def stream(member: Member) -> Iterator[bytes]:
    """The snapshot as encoded SnapshotResponses. Raises EtcdError DataLoss if a file cannot be
    read."""
    began = member.clock()
    header = member.header(member.store.revision)
    files: list[File] = []
    try:
        sizes = _open_files(member.store, files)
        parts, total_bytes = _parts(member, files, sizes)
        sent_bytes = 0
        for part in parts:
            sent_bytes += len(part)
            response = proto.SnapshotResponse(
                remaining_bytes=total_bytes - sent_bytes, blob=part, version=ETCD_API_VERSION
            )
            yield header + response.encode()
        member.metrics.snapshot_s.observe(member.clock() - began)
    except OSError as failure:
        raise EtcdError(DATA_LOSS, f"etcdlite: cannot read the snapshot: {failure}") from failure
    finally:
        for file in files:
            file.close()


def _open_files(store: Store, files: list[File]) -> list[int]:
    """Add the open checkpoint and segments to `files`; how much of each belongs to the state."""
    data = store.data
    files.append(store.disk.open_read(f"{store.directory}/{checkpoint.NAME}"))
    sizes = [files[0].size()]
    for number in sorted(data.files):
        files.append(store.disk.open_read(f"{store.directory}/{segment_name(number)}"))
        sizes.append(data.flushed if number == data.active else data.sizes[number])
    return sizes


def _parts(member: Member, files: list[File], sizes: list[int]) -> tuple[Iterator[bytes], int]:
    store = member.store
    header = json.dumps(
        {
            "cluster_id": member.cluster_id,
            "member_id": member.id,
            "revision": store.marked_revision,
            "compact_revision": store.compacted,
            "applied_index": store.applied_index,
            "applied_term": store.applied_term,
            "total_keys": len(store.index.heads),
            "etcdlite_version": __version__,
            "files": [
                {"name": os.path.basename(file.path), "size_bytes": size}
                for file, size in zip(files, sizes, strict=True)
            ],
        }
    ).encode()
    head = MAGIC + FORMAT_VERSION.to_bytes(4, "little") + len(header).to_bytes(4, "little")
    content_bytes = len(head) + len(header) + sum(sizes)
    padding_bytes = -content_bytes % BLOCK_BYTES

    def parts() -> Iterator[bytes]:
        digest = hashlib.sha256()
        for part in _contents(head + header, files, sizes, padding_bytes):
            digest.update(part)
            yield part
        yield digest.digest()

    return parts(), content_bytes + padding_bytes + DIGEST_BYTES


def _contents(
    head: bytes, files: list[File], sizes: list[int], padding_bytes: int
) -> Iterator[bytes]:
    yield head
    for file, size in zip(files, sizes, strict=True):
        offset = 0
        while offset < size:
            part = file.pread(min(CHUNK_BYTES, size - offset), offset)
            if not part:
                raise OSError(f"{file.path} ends at {offset} instead of {size}")
            yield part
            offset += len(part)
    if padding_bytes:
        yield bytes(padding_bytes)


# Using one.


def status(path: str, progress: Callable[[int, int], None] | None = None) -> Status:
    """What a snapshot file holds, after checking all of it. Raises SnapshotError."""
    with _open(path) as file:
        header, _ = _read_header(path, file)
        digest = _verify(path, file, progress)
        return Status(
            int.from_bytes(digest[:4], "big"),
            header["revision"],
            header["total_keys"],
            os.path.getsize(path),
            ETCD_API_VERSION,
        )


def restore(
    path: str,
    data_dir: str,
    *,
    name: str = "default",
    initial_cluster: str = "",
    initial_cluster_token: str = "etcd-cluster",
    initial_advertise_peer_urls: str = "http://localhost:2380",
    wal_dir: str = "",
    skip_hash_check: bool = False,
    progress: Callable[[int, int], None] | None = None,
    segment_bytes: int = 16 << 20,
    wal_segment_bytes: int = 16 << 20,
) -> None:
    """Make a new member's data directory of a snapshot. It has the snapshot's keys, revisions and
    leases, and a membership of its own: a member restored from a backup never meets its old
    cluster. `progress` is told (bytes done, bytes in all). Raises SnapshotError, OSError.
    """
    peer_urls = [url for url in initial_advertise_peer_urls.split(",") if url]
    _check_initial_cluster(initial_cluster, name, peer_urls)
    disk = Disk()
    with _open(path) as file:
        header, start = _read_header(path, file)
        if not skip_hash_check:
            _verify(path, file, progress)
        try:
            lock = bootstrap.lock(disk, data_dir)
        except bootstrap.StartError as failure:
            raise SnapshotError(str(failure)) from failure
        try:
            directory = bootstrap.begin(disk, data_dir, wal_dir)
            _extract(path, file, header, start, f"{directory}/data", disk)
            store = Store.open(disk, f"{directory}/data", Lessor(), segment_bytes)
            if store.revision != header["revision"]:
                raise SnapshotError(
                    f"snapshot {path} holds revision {store.revision} instead of "
                    f"{header['revision']}; it is damaged, use another one"
                )
            for key in list(store.buckets.get(ALARM, ())):
                store.set_bucket(ALARM, key, None)
            member_id = bootstrap.derive_member_id(peer_urls, initial_cluster_token)
            member = proto.Member(ID=member_id, name=name, peerURLs=peer_urls)
            cluster_id = bootstrap.derive_cluster_id([member_id])
            bootstrap.finish(disk, data_dir, wal_dir, store, member, cluster_id, wal_segment_bytes)
        except (bootstrap.StartError, DataDamaged) as failure:
            raise SnapshotError(str(failure)) from failure
        finally:
            lock.close()


def _check_initial_cluster(initial_cluster: str, name: str, peer_urls: list[str]) -> None:
    for item in filter(None, initial_cluster.split(",")):
        member, _, url = item.partition("=")
        if member != name or url not in peer_urls:
            raise SnapshotError(
                f"--initial-cluster {initial_cluster} names {item}, but this member is {name} at "
                f"{','.join(peer_urls)}. A snapshot is restored to a cluster of one member in this "
                "version; leave --initial-cluster out, or make it agree with --name and "
                "--initial-advertise-peer-urls"
            )


def _open(path: str) -> Any:
    try:
        return open(path, "rb")
    except OSError as failure:
        raise SnapshotError(f"cannot read snapshot {path}: {failure.strerror}") from failure


def _read_header(path: str, file: Any) -> tuple[dict[str, Any], int]:
    """The header, and where the first file begins."""
    head = file.read(16)
    if len(head) < 16 or head[:8] != MAGIC:
        raise SnapshotError(
            f"{path} is not an etcdlite snapshot. One is made with 'etcdlite-ctl snapshot save'; "
            "a snapshot of etcd cannot be restored here"
        )
    version = int.from_bytes(head[8:12], "little")
    if version != FORMAT_VERSION:
        raise SnapshotError(
            f"snapshot {path} has format version {version}, but this etcdlite reads version "
            f"{FORMAT_VERSION}. Use the etcdlite that made it, or a newer one"
        )
    length = int.from_bytes(head[12:16], "little")
    try:
        if length > MAX_HEADER_BYTES:
            raise ValueError
        header = json.loads(file.read(length))
        for field in ("revision", "total_keys"):
            if type(header[field]) is not int:
                raise ValueError
        for item in header["files"]:
            if type(item["size_bytes"]) is not int or item["size_bytes"] < 0:
                raise ValueError
            name = item["name"]
            if name != checkpoint.NAME and name != segment_name(int(name[:16], 16)):
                raise ValueError
    except (ValueError, KeyError, TypeError):
        raise SnapshotError(f"snapshot {path} has a damaged header; use another one") from None
    return header, 16 + length


def _verify(path: str, file: Any, progress: Callable[[int, int], None] | None) -> bytes:
    """The SHA-256 at the end, after comparing it with the content."""
    size = os.path.getsize(path)
    left = size - DIGEST_BYTES
    if left < 0 or left % BLOCK_BYTES:
        raise SnapshotError(
            f"snapshot {path} has {size} bytes, which is no whole snapshot: saving it was "
            "interrupted, or it was cut. Use another one"
        )
    digest = hashlib.sha256()
    file.seek(0)
    while left:
        part = file.read(min(CHUNK_BYTES, left))
        if not part:
            break
        digest.update(part)
        left -= len(part)
        if progress is not None:
            progress(size - DIGEST_BYTES - left, size)
    expected: bytes = file.read(DIGEST_BYTES)
    if digest.digest() != expected:
        raise SnapshotError(
            f"snapshot {path} is damaged: its SHA-256 does not match its content. Use another one"
        )
    return expected


def _extract(
    path: str, file: Any, header: dict[str, Any], start: int, directory: str, disk: Disk
) -> None:
    disk.make_dir(directory)
    file.seek(start)
    for item in header["files"]:
        target = disk.open(f"{directory}/{item['name']}", create=True)
        offset, size = 0, item["size_bytes"]
        while offset < size:
            part = file.read(min(CHUNK_BYTES, size - offset))
            if not part:
                raise SnapshotError(f"snapshot {path} ends inside {item['name']}; use another one")
            target.pwrite(part, offset)
            offset += len(part)
        target.sync()
        target.close()
    disk.sync_dir(directory)
