"""Snapshots: a copy of the whole state as one file, for backups and for members that are behind.

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

The SHA-256 says that the copy is what was read. Whether that was right the checksum of each record
says, and whoever is to live on the copy looks at all of them first: a member whose disk rots must
not hand that on.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from etcdlite import ETCD_API_VERSION, __version__, bootstrap, datadir, log, proto
from etcdlite.config import parse_initial_cluster
from etcdlite.errors import DATA_LOSS, UNAVAILABLE, EtcdError
from etcdlite.lease import Lessor
from etcdlite.mvcc import ALARM, Store
from etcdlite.storage import checkpoint
from etcdlite.storage.data import DataDamaged, segment_name, verify
from etcdlite.storage.disk import Disk, File

if TYPE_CHECKING:
    from etcdlite.member import Member
    from etcdlite.wire.peer_session import Accepted

MAGIC = b"ETCDLSNP"
FORMAT_VERSION = 1
READ_BYTES = 128 << 10
MAX_HEADER_BYTES = 16 << 20
DIGEST_BYTES = 32
BLOCK_BYTES = 512
_U32 = struct.Struct("<I")


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


class Image:
    """The snapshot of a store as it is at its last mark, as the bytes of the file above. The files
    are held open until `close`. Raises OSError."""

    def __init__(self, store: Store, cluster_id: int, member_id: int) -> None:
        self.index = store.applied_index
        self.term = store.applied_term
        self._chunk_bytes = store.limits.snapshot_chunk_bytes
        self._files: list[File] = []
        try:
            sizes = self._open_files(store)
        except OSError:
            self.close()
            raise
        header = json.dumps(
            {
                "cluster_id": cluster_id,
                "member_id": member_id,
                "revision": store.marked_revision,
                "compact_revision": store.compacted,
                "applied_index": store.applied_index,
                "applied_term": store.applied_term,
                "total_keys": len(store.index.heads),
                "etcdlite_version": __version__,
                "files": [
                    {"name": os.path.basename(file.path), "size_bytes": size}
                    for file, size in zip(self._files, sizes, strict=True)
                ],
            }
        ).encode()
        self._head = MAGIC + _U32.pack(FORMAT_VERSION) + _U32.pack(len(header)) + header
        ends = list(accumulate(sizes, initial=len(self._head)))
        self._ends = ends[1:]
        """Where each file ends in the snapshot."""
        self._digest_at = ends[-1] + -ends[-1] % BLOCK_BYTES
        self.size_bytes = self._digest_at + DIGEST_BYTES
        self._digest = hashlib.sha256()
        self._digested = 0

    def _open_files(self, store: Store) -> list[int]:
        """Open checkpoint and segments; how much of each belongs to the state."""
        data, files = store.data, self._files
        files.append(store.disk.open_read(f"{store.directory}/{checkpoint.NAME}"))
        sizes = [files[0].size()]
        for number in sorted(data.files):
            files.append(store.disk.open_read(f"{store.directory}/{segment_name(number)}"))
            sizes.append(data.flushed if number == data.active else data.sizes[number])
        return sizes

    def read(self, offset: int) -> bytes:
        """The next bytes from `offset` on, at most `snapshot_chunk_bytes`; none at the end.
        `offset` is at most where an earlier piece ended. Raises OSError."""
        if offset < len(self._head):
            part = self._head[offset : offset + self._chunk_bytes]
        elif offset < self._ends[-1]:
            at = bisect_right(self._ends, offset)
            end = self._ends[at]
            begin = self._ends[at - 1] if at else len(self._head)
            file = self._files[at]
            part = file.pread(min(self._chunk_bytes, end - offset), offset - begin)
            if not part:
                raise OSError(f"{file.path} ends at {offset - begin} instead of {end - begin}")
        elif offset < self._digest_at:
            part = bytes(self._digest_at - offset)
        else:
            return self._digest.digest()[offset - self._digest_at :]
        assert offset <= self._digested, "a piece of the snapshot was left out"
        new = self._digested - offset
        if new < len(part):
            self._digest.update(part[new:] if new else part)
            self._digested = offset + len(part)
        return part

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


def stream(member: Member) -> Iterator[bytes]:
    """The snapshot as encoded SnapshotResponses. Raises EtcdError DataLoss if a file cannot be
    read."""
    if member.is_installing:
        raise EtcdError(
            UNAVAILABLE,
            "etcdlite: this member is taking over a snapshot from the leader; ask another one",
        )
    began = member.clock()
    header = member.header(member.store.revision)
    image: Image | None = None
    try:
        image = Image(member.store, member.cluster_id, member.id)
        sent_bytes = 0
        while part := image.read(sent_bytes):
            sent_bytes += len(part)
            response = proto.SnapshotResponse(
                remaining_bytes=image.size_bytes - sent_bytes, blob=part, version=ETCD_API_VERSION
            )
            yield header + response.encode()
        member.metrics.snapshot_s.observe(member.clock() - began)
    except OSError as failure:
        raise EtcdError(DATA_LOSS, f"etcdlite: cannot read the snapshot: {failure}") from failure
    finally:
        if image is not None:
            image.close()


# Receiving one.


class Incoming:
    """The snapshot that the leader sends to this member, if it does.

    Its files are written as they come to the folder `incoming`. What came over a connection that
    broke is kept, and the next connection that offers the same snapshot goes on from there.
    """

    def __init__(self, member: Member) -> None:
        self._member = member
        self._directory = datadir.incoming_directory(member.store.directory)
        self._connection: Accepted | None = None
        self._offer: Any = None
        self._is_storing = False
        """What was received is whole and is being made durable: nothing may change it."""
        self._offset = 0
        self._head = b""
        self._targets: list[tuple[File, int]] = []
        """The files to write and their sizes, when the header is there."""
        self._content_bytes = 0
        self._digest = hashlib.sha256()
        self._expected = b""
        self._damage: DataDamaged | None = None
        """What is wrong with the records of one that came whole."""

    def begin(self, connection: Accepted, offer: Any) -> int | None:
        """A member offers a snapshot (a `SnapshotOffer`). Returns the offset to send it from, None
        if this member has everything that is in it. Raises SnapshotError if it is an offer of an
        earlier leader, or another one is being stored."""
        if offer.index <= self._member.raft.log.committed:
            return None
        if offer.leader_term < self._member.raft.term:
            raise SnapshotError("another member leads now")
        if self._is_storing and offer.nonce != self._offer.nonce:
            raise SnapshotError("an earlier one is being stored")
        if self._offer is None or offer.nonce != self._offer.nonce:
            if self._connection is not None:
                self._connection.snapshot_refused("there is a newer one")
            self._discard()
            self._offer = offer
            log.info(
                "receiving a snapshot",
                bytes=offer.size_bytes,
                **{"snapshot-index": offer.index, "remote-peer-id": f"{connection.node:x}"},
            )
        elif self._offset:
            log.info("going on with a snapshot", offset=self._offset, bytes=offer.size_bytes)
        self._connection = connection
        return self._offset

    def receive(self, connection: Accepted, data: bytes) -> None:
        """The next bytes of the file."""
        if connection is not self._connection:
            return
        try:
            self._take(data)
        except (SnapshotError, OSError) as failure:
            log.error("cannot take the snapshot", error=str(failure))
            self._refuse(str(failure))
            return
        self._offset += len(data)
        if self._targets and self._offset == self._end + DIGEST_BYTES:
            if self._digest.digest() != self._expected:
                self._refuse("the snapshot does not match its SHA-256")
            else:
                self._is_storing = True
                self._member.run_task(self._store, self._stored)

    @property
    def _end(self) -> int:
        """Where the digest begins."""
        return self._content_bytes + -self._content_bytes % BLOCK_BYTES

    def _take(self, data: bytes) -> None:
        view = memoryview(data)
        if not self._targets:
            self._head += data
            at = self._open_files()
            if at is None:
                self._digest.update(view)
                return
            body = memoryview(self._head)[at:]
            begin = at
            self._head = b""
        else:
            body, begin = view, self._offset
        end = begin + len(body)
        digested = max(0, min(len(view), self._end - self._offset))
        self._digest.update(view[:digested])
        self._expected += bytes(view[digested:])
        file_end = self._content_bytes - sum(size for _, size in self._targets)
        for file, size in self._targets:
            file_begin, file_end = file_end, file_end + size
            low, high = max(begin, file_begin), min(end, file_end)
            if low < high:
                file.pwrite(bytes(body[low - begin : high - begin]), low - file_begin)

    def _open_files(self) -> int | None:
        """When the header is complete, the files to write; where the first one begins."""
        head = self._head
        if len(head) < 16 or len(head) < 16 + _U32.unpack_from(head, 12)[0]:
            if len(head) > MAX_HEADER_BYTES:
                raise SnapshotError("its header is too large")
            return None
        header, start = _read_header("from the leader", io.BytesIO(head))
        disk = self._member.store.disk
        disk.make_dir(self._directory)
        for item in header["files"]:
            file = disk.open(f"{self._directory}/{item['name']}", create=True)
            self._targets.append((file, item["size_bytes"]))
        self._content_bytes = start + sum(size for _, size in self._targets)
        return start

    def _store(self) -> None:
        """Runs as a task: what was received becomes durable, under a name of its own."""
        disk = self._member.store.disk
        for file, _ in self._targets:
            file.sync()
            file.close()
        self._damage = None
        try:
            _check_records(disk, self._directory)
        except DataDamaged as damage:
            self._damage = damage
            return
        disk.sync_dir(self._directory)
        datadir.keep_incoming(disk, self._member.store.directory, self._offer.index)

    def _stored(self) -> None:
        offer, connection = self._offer, self._connection
        assert connection is not None
        self._is_storing = False
        self._targets = []
        if self._damage is not None:
            log.error(
                "the leader's data is damaged; nothing of it was taken",
                where=f"{os.path.basename(self._damage.path)} at {self._damage.offset}",
                next="replace the leader's disk: move the leadership, remove that member, add it "
                "anew with an empty data directory",
                **{"remote-peer-id": f"{connection.node:x}"},
            )
            self._refuse("the data of the member that sent the snapshot is damaged")
            return
        self._forget()
        if not connection.is_closing:
            connection.snapshot_taken()
        log.info("received a snapshot", **{"snapshot-index": offer.index})
        self._member.snapshot_received(connection.node, offer)

    def _refuse(self, why: str) -> None:
        connection = self._connection
        self._discard()
        if connection is not None:
            connection.snapshot_refused(why)

    def _discard(self) -> None:
        for file, _ in self._targets:
            file.close()
        self._targets = []
        self._forget()
        disk = self._member.store.disk
        if disk.exists(self._directory):
            disk.remove_tree(self._directory)

    def _forget(self) -> None:
        self._connection = None
        self._offer = None
        self._offset = self._content_bytes = 0
        self._head = self._expected = b""
        self._digest = hashlib.sha256()


# Using one.


def status(path: str, progress: Callable[[int, int], None] | None = None) -> Status:
    """What a snapshot file holds, after checking all of it, each record too. Raises SnapshotError,
    OSError."""
    with _open(path) as file:
        header, start = _read_header(path, file)
        digest = _verify(path, file, progress)
        _refuse_damaged(path, file, header, start)
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
    pairs = _initial_cluster(initial_cluster, name, peer_urls)
    disk = Disk()
    with _open(path) as file:
        header, start = _read_header(path, file)
        if not skip_hash_check:
            _verify(path, file, progress)
        _refuse_damaged(path, file, header, start)
        try:
            lock = datadir.lock(disk, data_dir)
        except datadir.StartError as failure:
            raise SnapshotError(str(failure)) from failure
        try:
            directory = datadir.begin(disk, data_dir, wal_dir)
            _extract(path, file, header, start, f"{directory}/data", disk)
            store = Store.open(disk, f"{directory}/data", Lessor(), segment_bytes)
            if store.revision != header["revision"]:
                raise SnapshotError(
                    f"snapshot {path} holds revision {store.revision} instead of "
                    f"{header['revision']}; it is damaged, use another one"
                )
            for key in list(store.buckets.get(ALARM, ())):
                store.set_bucket(ALARM, key, None)
            founding = bootstrap.new_cluster(name, pairs, initial_cluster_token)
            datadir.finish(
                disk,
                data_dir,
                wal_dir,
                store,
                founding.member_id,
                founding.members,
                founding.cluster_id,
                wal_segment_bytes,
            )
        except (datadir.StartError, DataDamaged) as failure:
            raise SnapshotError(str(failure)) from failure
        finally:
            lock.close()


def _initial_cluster(
    initial_cluster: str, name: str, peer_urls: list[str]
) -> list[tuple[str, str]]:
    """(name, peer URL) of the members that are restored together."""
    if not peer_urls:
        raise SnapshotError("--initial-advertise-peer-urls is empty; write http://HOST:PORT")
    initial_cluster = initial_cluster or ",".join(f"{name}={url}" for url in peer_urls)
    try:
        return parse_initial_cluster(initial_cluster.split(","), name, peer_urls)
    except ValueError as failure:
        raise SnapshotError(f"--initial-cluster {initial_cluster}: {failure}") from failure


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
    except (ValueError, KeyError, TypeError, RecursionError):
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
        part = file.read(min(READ_BYTES, left))
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


class _Part:
    """One of the files in a snapshot."""

    def __init__(self, path: str, file: Any, begin: int, size_bytes: int) -> None:
        self.path = path
        self._file = file
        self._begin = begin
        self._size_bytes = size_bytes

    def pread(self, size_bytes: int, offset: int) -> bytes:
        left = max(0, self._size_bytes - offset)
        return os.pread(self._file.fileno(), min(size_bytes, left), self._begin + offset)

    def size(self) -> int:
        return self._size_bytes

    def close(self) -> None:
        pass


class _Contents:
    """The files in a snapshot, for what reads those of a data folder."""

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


def _refuse_damaged(path: str, file: Any, header: dict[str, Any], start: int) -> None:
    """Raises SnapshotError if a member with a failing disk has made the snapshot: its SHA-256 is of
    what was read."""
    contents: Any = _Contents(file, header, start)
    try:
        _check_records(contents, "")
    except DataDamaged as damage:
        raise SnapshotError(
            f"snapshot {path} holds damaged data ({os.path.basename(damage.path)} at offset "
            f"{damage.offset}: {damage.why}): the disk of the member that made it is failing. Use "
            "another one, or make one of another member"
        ) from damage


def _check_records(disk: Disk, directory: str) -> None:
    """Raises DataDamaged if a checksum in the files does not match."""
    for _ in checkpoint.unpack(disk, f"{directory}/{checkpoint.NAME}"):
        pass
    verify(disk, directory)


def _extract(
    path: str, file: Any, header: dict[str, Any], start: int, directory: str, disk: Disk
) -> None:
    disk.make_dir(directory)
    file.seek(start)
    for item in header["files"]:
        target = disk.open(f"{directory}/{item['name']}", create=True)
        offset, size = 0, item["size_bytes"]
        while offset < size:
            part = file.read(min(READ_BYTES, size - offset))
            if not part:
                raise SnapshotError(f"snapshot {path} ends inside {item['name']}; use another one")
            target.pwrite(part, offset)
            offset += len(part)
        target.sync()
        target.close()
    disk.sync_dir(directory)
