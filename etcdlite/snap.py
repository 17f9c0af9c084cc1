"""Snapshots: the whole state as one file, for backups and for members that are far behind.

A snapshot is what a member has on disk at one moment: the checkpoint, and the data segments up to
their length then. Making one copies nothing. The files are read while they are sent; what they held
at that moment does not change, because segments only grow or go away as a whole, and an open file
stays readable.

The file, all integers little-endian:

    0   8  magic "ETCDLSNP"
    8   4  format version, 1
    12  4  length of the header
    16  n  header: JSON with cluster_id, member_id, revision, compact_revision, applied_index,
           applied_term, total_keys, etcdlite_version, and files: [{name, size_bytes}]
        -  the files, one after the other
        -  zeros up to a multiple of 512
       32  SHA-256 of everything before

etcd's tools also expect of a snapshot a multiple of 512 bytes and then a SHA-256.

The SHA-256 proves that the copy equals what was read. The checksum of each record proves that what
was read is right. A receiver checks all records before it uses a snapshot, so a member with a bad
disk cannot pass its damage on.
"""

from __future__ import annotations

import io
import json
import os
import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import accumulate, pairwise
from typing import Any, Protocol

from etcdlite import __version__, datadir, log, proto
from etcdlite.errors import Explained
from etcdlite.loading import RunTask
from etcdlite.metrics import Metrics
from etcdlite.mvcc import Store
from etcdlite.raft import Raft
from etcdlite.storage import checkpoint
from etcdlite.storage.data import verify
from etcdlite.storage.disk import Disk, File
from etcdlite.storage.layout import DataDamaged, segment_name

MAGIC = b"ETCDLSNP"
FORMAT_VERSION = 1
MAX_HEADER_BYTES = 1 << 20
"""Enough for 18,000 files, of up to 16 MiB each."""
DIGEST_BYTES = 32
BLOCK_BYTES = 512
READ_BYTES = 128 << 10
"""Bytes of a file that are read at once."""

_U32 = struct.Struct("<I")


Report = Callable[[int, int], None] | None
"""How progress is reported: it gets (bytes done, total bytes)."""


class SnapshotError(Explained):
    """The snapshot, or the place to restore it to, cannot be used; the text says why and what to
    do."""


# Sending.


class Image:
    """The snapshot of a store at its last mark, as the bytes of the file above. It keeps the files
    open until `close`. Raises OSError."""

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
        self._digest = _sha256()
        self._digested = 0

    def _open_files(self, store: Store) -> list[int]:
        """Open checkpoint and segments. Returns how many bytes of each belong to the state."""
        data, files = store.data, self._files
        files.append(store.disk.open_read(f"{store.directory}/{checkpoint.NAME}"))
        sizes = [files[0].size()]
        for number in sorted(data.files):
            files.append(store.disk.open_read(f"{store.directory}/{segment_name(number)}"))
            sizes.append(data.flushed if number == data.active else data.sizes[number])
        return sizes

    def read(self, offset: int) -> bytes:
        """At most `snapshot_chunk_bytes` from `offset` on; b"" at the end. `offset` is not after
        the end of what was read before, since the digest needs every byte. Raises OSError."""
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
        if offset > self._digested:
            raise OSError(f"byte {offset} is asked for, but only {self._digested} bytes were read")
        new = self._digested - offset
        if new < len(part):
            self._digest.update(part[new:] if new else part)
            self._digested = offset + len(part)
        return part

    def parts(self) -> Iterator[bytes]:
        """All of it. Raises OSError."""
        offset = 0
        while part := self.read(offset):
            offset += len(part)
            yield part

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


# Receiving.


class Sender(Protocol):
    """The connection that a snapshot arrives on. `node` is the member that sends it."""

    node: int
    is_closing: bool

    def snapshot_taken(self) -> None:
        """Tell the sender that the snapshot is whole and durable here."""

    def snapshot_refused(self, why: str) -> None:
        """Tell the sender why the snapshot is not used, and close the connection."""


class Incoming:
    """Receives the snapshot that the leader sends to this member.

    Its files are written to the folder `incoming` as they arrive. If the connection breaks, they
    stay, and the next connection that offers the same snapshot continues there."""

    def __init__(
        self,
        disk: Disk,
        data: str,
        raft: Raft,
        run_task: RunTask,
        received: Callable[[int, proto.SnapshotOffer], None],
        metrics: Metrics,
    ) -> None:
        """`data`: the member's data folder. `received(node, offer)` is called once a snapshot is
        durable."""
        self.is_storing = False
        """The snapshot is complete and is being made durable. Nothing may change it."""
        self._disk = disk
        self._data = data
        self._directory = datadir.incoming_directory(data)
        self._raft = raft
        self._run_task = run_task
        self._received = received
        self._metrics = metrics
        self._began_s = 0.0
        """When the first byte came, on the clock of `time.monotonic`."""
        self._forget()

    def _forget(self) -> None:
        """No snapshot is arriving."""
        self.connection: Sender | None = None
        self.offer: Any = None
        """The `SnapshotOffer` of the snapshot that is arriving, or None."""
        self.offset = 0
        """Bytes of it received so far."""
        self._head, self._expected = bytearray(), b""
        self._targets: list[tuple[File, int, int]] = []
        """The files to write, and where each begins and ends, once the header is complete."""
        self._written = 0
        """How many of them are written."""
        self._digest: Any = None
        """The SHA-256 of what has come; None without an offer."""
        self._damage: DataDamaged | None = None
        """The damaged record in a snapshot that is complete."""

    def begin(self, connection: Sender, offer: proto.SnapshotOffer) -> int | None:
        """Accept a `SnapshotOffer`. Returns the offset to send the snapshot from; None if this
        member has everything in it already. Raises SnapshotError if the offer is of an earlier
        leader or of no leader, or another snapshot is being stored."""
        if offer.index <= self._raft.log.committed:
            return None
        if offer.leader_term < self._raft.term or self._raft.leader not in (0, connection.node):
            raise SnapshotError("another member leads now")
        if self.is_storing and offer.nonce != self.offer.nonce:
            raise SnapshotError("an earlier snapshot is being stored")
        if self.offer is None or offer.nonce != self.offer.nonce:
            self._refuse("there is a newer snapshot")
            self.offer = offer
            self._digest = _sha256()
            log.info(
                "receiving a snapshot",
                bytes=offer.size_bytes,
                snapshot_index=offer.index,
                remote_peer_id=f"{connection.node:x}",
            )
        elif self.offset:
            log.info("continuing a snapshot", offset=self.offset, bytes=offer.size_bytes)
        self.connection = connection
        return self.offset

    def check_space(self, left_bytes: int, room: Callable[[str], int]) -> None:
        """Refuse the snapshot that has begun if the rest of it, `left_bytes`, cannot fit. A part
        that fills the file system would stop this member's log. `room`: `Alarms.snapshot_room`."""
        parent, why = os.path.dirname(self._directory), ""
        try:
            most_bytes = max(0, min(self._disk.space(parent)[0], room(parent)))
            if left_bytes > most_bytes:
                why = (
                    f"{left_bytes} bytes are to come, and {most_bytes} may be used in {parent}: it "
                    "lies beside the old data until it replaces that, and space for writes is kept"
                )
        except OSError as failure:
            why = str(failure)
        if why:
            log.error("cannot receive the snapshot", error=why)
            self._refuse(why)

    def tick(self) -> None:
        """Drop a part of a snapshot if the log has brought this member as far."""
        if self.offer and not self.is_storing and self.offer.index <= self._raft.log.committed:
            self._refuse("the log has it")

    def receive(self, connection: Sender, data: bytes) -> None:
        """Take the next bytes of the file."""
        if connection is not self.connection or self.is_storing:
            return
        if not self.offset:
            self._began_s = time.monotonic()
        try:
            self._write(data)
        except (SnapshotError, OSError) as failure:
            log.error("cannot receive the snapshot", error=str(failure))
            self._refuse(str(failure))
            return
        self.offset += len(data)
        if self.offset > self.offer.size_bytes:
            self._refuse("the snapshot is longer than what was offered")
        elif self.offset == self.offer.size_bytes:
            if not self._targets or self._digest.digest() != self._expected:
                self._refuse("the snapshot does not match its SHA-256")
            else:
                self.is_storing = True
                self._run_task(self._make_durable, self._finish)

    def _write(self, data: bytes) -> None:
        body, at = memoryview(data), self.offset
        digested = max(0, self.offer.size_bytes - DIGEST_BYTES - at)
        self._digest.update(body[:digested])
        self._expected += bytes(body[digested:])
        if not self._targets:
            self._head += data
            if not (at := self._open_files()):
                return
            body = memoryview(bytes(self._head))[at:]
            self._head.clear()
        while self._written < len(self._targets):
            file, begin, end = self._targets[self._written]
            if part := body[: end - at]:
                file.pwrite(bytes(part), at - begin)
                body, at = body[len(part) :], at + len(part)
            if at < end:
                break
            file.finish()  # Not in the task: a lack of space is answered here.
            self._written += 1

    def _open_files(self) -> int:
        """Open the files to write if the header is complete. Returns the offset of the first one,
        or 0."""
        head = self._head
        if len(head) < 16 or len(head) < 16 + _U32.unpack_from(head, 12)[0]:
            if len(head) > MAX_HEADER_BYTES:
                raise SnapshotError("its header is too large")
            return 0
        header, start = read_header("from the leader", io.BytesIO(head))
        files, offer = header["files"], self.offer
        ends = list(accumulate((item["size_bytes"] for item in files), initial=start))
        size_bytes = ends[-1] + -ends[-1] % BLOCK_BYTES + DIGEST_BYTES
        said = (header.get("applied_index"), header.get("applied_term"), size_bytes)
        if said != (offer.index, offer.term, offer.size_bytes):
            raise SnapshotError("its header contradicts the offer")
        self._disk.make_dir(self._directory)
        for item, (begin, end) in zip(files, pairwise(ends), strict=True):
            file = self._disk.create(f"{self._directory}/{item['name']}", b"")
            self._targets.append((file, begin, end))
        return start

    def _make_durable(self) -> None:
        """The task: make the snapshot durable and give it its own name."""
        disk = self._disk
        began_s = time.monotonic()
        for file, *_ in self._targets:
            file.sync()
            file.close()
        self._metrics.snapshot_sync_s.observe(time.monotonic() - began_s)
        try:
            check_records(disk, self._directory)
        except DataDamaged as damage:
            self._damage = damage
            return
        disk.sync_dir(self._directory)
        datadir.keep_incoming(disk, self._data, self.offer.index)

    def _finish(self) -> None:
        offer, connection = self.offer, self.connection
        assert connection is not None
        self.is_storing = False
        if self._damage is not None:
            log.error(
                "the leader's data is damaged; its snapshot is not used",
                where=f"{os.path.basename(self._damage.path)} at {self._damage.offset}",
                next="replace the leader's disk: move the leadership, remove that member, add it "
                "again with an empty data directory",
                remote_peer_id=f"{connection.node:x}",
            )
            self._refuse("the data of the member that sent the snapshot is damaged")
            return
        self._metrics.snapshot_receive_s.observe(time.monotonic() - self._began_s)
        self._forget()
        if not connection.is_closing:
            connection.snapshot_taken()
        log.info("received a snapshot", snapshot_index=offer.index)
        self._received(connection.node, offer)

    def _refuse(self, why: str) -> None:
        connection = self.connection
        for file, *_ in self._targets:
            file.close()
        self._forget()
        if self._disk.exists(self._directory):
            with suppress(OSError):  # What stays is removed before the next one can be stored.
                self._disk.remove_tree(self._directory)
        if connection is not None:
            connection.snapshot_refused(why)


def _sha256() -> Any:
    import hashlib  # It loads OpenSSL, which takes 3.5 MB. Few members send or take a snapshot.

    return hashlib.sha256()


def digests(file: Any, size_bytes: int, progress: Report) -> tuple[bytes, bytes]:
    """The SHA-256 of the content of a file, and the one at its end, which should be the same.
    `progress` gets (bytes done, total bytes)."""
    digest = _sha256()
    left = size_bytes - DIGEST_BYTES
    file.seek(0)
    while left and (part := file.read(min(READ_BYTES, left))):
        digest.update(part)
        left -= len(part)
        if progress is not None:
            progress(size_bytes - DIGEST_BYTES - left, size_bytes)
    return digest.digest(), file.read(DIGEST_BYTES)


def read_header(path: str, file: Any) -> tuple[dict[str, Any], int]:
    """The checked header, and the offset of the first file. Raises SnapshotError."""
    head = file.read(16)
    if len(head) < 16 or head[:8] != MAGIC:
        raise SnapshotError(
            f"{path} is neither a snapshot of etcdlite nor one of etcd. One is made with "
            "'etcdlite-ctl snapshot save'"
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
        numbers = [header[name] for name in ("revision", "applied_index", "total_keys")]
        numbers += [item["size_bytes"] for item in header["files"]]
        if any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers):
            raise ValueError
        names = [item["name"] for item in header["files"]]
        segments = [name for name in names if name != checkpoint.NAME]
        if names == segments or any(each != segment_name(int(each[:16], 16)) for each in segments):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SnapshotError(f"snapshot {path} has a damaged header; use another one") from None
    return header, 16 + length


def check_records(disk: Disk, directory: str) -> None:
    """Check all checksums in the files of a snapshot. Raises DataDamaged."""
    for _ in checkpoint.unpack(disk, f"{directory}/{checkpoint.NAME}"):
        pass
    verify(disk, directory)
