"""Sealed files: the segments and the checkpoint, encrypted page by page.

`SealedDisk` stands between the storage and a `Disk`. What it writes as `%016x.seg` or `checkpoint`
is sealed (`sealing.py`); whoever reads and writes through it sees the plain content, at the same
offsets as in a plain file. So the index, a checkpoint and a snapshot are the same with and without
keys, and members of one cluster may have different keys, or none.

On disk, all integers little-endian, in blocks of 4096 bytes:

    block 0, the header
        0   8  magic of the plain file: "ETCDLSEG" or "ETCDLCHK"
        8   4  format version, 2 (a plain file has 1)
        12  8  number of the segment; 0 in a checkpoint
        20  8  id of the key
        28  4  CRC-32 of bytes 0 to 27
        32 16  file id, random
        48  4  CRC-32 of bytes 0 to 47
        52     zeros up to 4096
    block 1 + n, page n of the content
        0   4  CRC-32 of the rest of the block
        4      sealed piece of 4052 bytes of content; the last page of a file may be shorter, but
               not empty, and then the block is shorter, too

    place of a page: "etcdlite page", owner (16 bytes: cluster id and member id; empty if unknown),
    bytes 0 to 47 of the header, page number u64

Invariants

- A page is written once, when all of its content is there, and never changed. Content of less than
  a page waits in memory: the owner of the data file fills the page (`DataFile.fill_page`) before it
  relies on a sync, and the write-ahead log has what a crash takes. So a torn write destroys nothing
  that was written before it.
- A file that ends inside a page is never continued. `may_append` says so, and the next segment is
  begun.
- A block that does not match its CRC is damage, or was torn by a crash; it reads as the end of the
  file, with `fault` set. One that matches its CRC and does not open is no accident: DataAltered.
"""

from __future__ import annotations

import os
from struct import Struct
from zlib import crc32

from etcdlite.sealing import OVERHEAD_BYTES, Key, Keyring, SealBroken
from etcdlite.storage import checkpoint, layout
from etcdlite.storage.disk import COPY_BYTES, Disk, File, Staged
from etcdlite.storage.layout import DataAltered, DataDamaged

BLOCK_BYTES = 4096
CRC_BYTES = 4
PAGE_BYTES = BLOCK_BYTES - CRC_BYTES - OVERHEAD_BYTES
"""Content of a page."""
FILE_ID_BYTES = 16

_SHORT_HEADER = Struct("<8sIQ8sI")
_U64 = Struct("<Q")
_U32 = Struct("<I")
_DOMAIN = b"etcdlite page"
_MAGICS = (layout.MAGIC, checkpoint.MAGIC)
_PLAIN_VERSIONS = (_U32.pack(layout.FORMAT_VERSION), _U32.pack(checkpoint.NEWER_VERSION))


def key_id(head: bytes) -> bytes | None:
    """The id of the key of a file that begins with `head` (at least 32 bytes); None if the file is
    plain, or if it has no good header."""
    if len(head) < _SHORT_HEADER.size:
        return None
    magic, version, _, found, crc = _SHORT_HEADER.unpack_from(head)
    if magic not in _MAGICS or version != layout.SEALED_VERSION or crc32(head[:28]) != crc:
        return None
    return bytes(found)


def is_plain(head: bytes) -> bool:
    """Whether the file that begins with `head` is a plain segment or checkpoint."""
    return head[:8] in _MAGICS and head[8:12] in _PLAIN_VERSIONS


def is_sealed_name(path: str) -> bool:
    """Whether `SealedDisk` seals the file at `path`."""
    return path.endswith(".seg") or os.path.basename(path) == checkpoint.NAME


def _magic_and_number(path: str) -> tuple[bytes, int]:
    """What the header of the file at `path` says about it."""
    if path.endswith(".seg"):
        return layout.MAGIC, int(os.path.basename(path)[:16], 16)
    return checkpoint.MAGIC, 0


class _Pages:
    """Seals and opens the pages of one file."""

    __slots__ = ("_place", "header", "key")

    def __init__(self, header: bytes, key: Key, owner: bytes) -> None:
        self.header = header
        """Block 0."""
        self.key = key
        self._place = _DOMAIN + owner + header[:48]

    def block(self, page: int, content: bytes) -> bytes:
        sealed = self.key.seal(content, self._place + _U64.pack(page))
        return _U32.pack(crc32(sealed)) + sealed

    def blocks(self, page: int, content: bytes) -> bytes:
        """The blocks of `content`, which begins with `page`."""
        return b"".join(
            self.block(page + at // PAGE_BYTES, content[at : at + PAGE_BYTES])
            for at in range(0, len(content), PAGE_BYTES)
        )

    def open(self, page: int, blocks: bytes, at: int) -> bytes | None:
        """The content of a page, whose block is at offset `at`; None if the block does not match
        its checksum. Raises SealBroken."""
        end = at + BLOCK_BYTES
        try:
            return self.key.open(blocks, self._place + _U64.pack(page), at + CRC_BYTES, end)
        except SealBroken:
            # The checksum tells damage from what was put there.
            block = blocks[at:end]
            is_torn = len(block) < CRC_BYTES or (
                _U32.unpack_from(block)[0] != crc32(block[CRC_BYTES:])
            )
            if is_torn or len(block) <= CRC_BYTES + OVERHEAD_BYTES:
                return None
            raise


def _new_pages(path: str, key: Key, owner: bytes) -> _Pages:
    """For a new file at `path`."""
    magic, number = _magic_and_number(path)
    head = _SHORT_HEADER.pack(magic, layout.SEALED_VERSION, number, key.id, 0)[:-4]
    head += _U32.pack(crc32(head)) + key.random_bytes(FILE_ID_BYTES)
    head += _U32.pack(crc32(head))
    return _Pages(head.ljust(BLOCK_BYTES, b"\0"), key, owner)


def _read_pages(path: str, head: bytes, keys: Keyring, owner: bytes) -> _Pages | None:
    """Of the file at `path` that begins with `head`; None if it has no good header. Raises
    KeyMissing, DataDamaged."""
    found = key_id(head)
    if (
        found is None
        or len(head) < BLOCK_BYTES
        or _U32.unpack_from(head, 48)[0] != crc32(head[:48])
    ):
        return None
    key = keys.find(found)
    if key is None:
        raise layout.KeyMissing(path, found, keys.ids)
    magic, _, number, _, _ = _SHORT_HEADER.unpack_from(head)
    if (magic, number) != _magic_and_number(path):
        raise DataAltered(path, 0, "it is another file under this name")
    return _Pages(head, key, owner)


class SealedFile(File):
    """A sealed file, open, with the offsets of its content. Made by `SealedDisk`."""

    __slots__ = ("_disk", "_file", "_on_disk", "_pages", "_tail", "ends_in_page", "fault", "key")

    def __init__(self, disk: SealedDisk, file: File, pages: _Pages | None, tail: bytes) -> None:
        """`tail`: content that has not become a page on disk yet."""
        super().__init__(file.path, -1)
        self._disk = disk
        self._file = file
        self._pages = pages
        self.key = pages.key if pages is not None else None
        self._tail = tail
        self.fault = ""
        self._on_disk = 0
        """Bytes of content in the pages on disk."""
        if pages is None:
            self.fault = "its header fails its check"
        else:
            full, rest = divmod(max(0, file.size() - BLOCK_BYTES), BLOCK_BYTES)
            self._on_disk = full * PAGE_BYTES + max(0, rest - CRC_BYTES - OVERHEAD_BYTES)
        self.ends_in_page = self._on_disk % PAGE_BYTES != 0

    @property
    def tail(self) -> bytes:
        return self._tail

    def size(self) -> int:
        return self._on_disk + len(self._tail)

    def pread(self, size_bytes: int, offset: int) -> bytes:
        """As `File.pread`. What fails its check counts as the end of the file, and `fault` says
        what is wrong. Raises DataAltered."""
        if size_bytes <= 0 or self._pages is None:
            return b""
        first, skip = divmod(offset, PAGE_BYTES)
        stop = offset + size_bytes
        parts: list[bytes] = []
        if offset < self._on_disk:
            if skip + size_bytes <= PAGE_BYTES:
                last = self._disk.last_page
                if last[1] == first and last[0] is self:
                    return last[2][skip : skip + size_bytes]
            if not self._read_pages(first, min(stop, self._on_disk), parts):
                stop = self._on_disk
        else:
            skip = offset - self._on_disk
        if stop > self._on_disk:
            parts.append(self._tail)
        return (parts[0] if len(parts) == 1 else b"".join(parts))[skip : skip + size_bytes]

    def _read_pages(self, page: int, stop: int, parts: list[bytes]) -> bool:
        """Append the content from `page` on, up to that with offset `stop`. Returns False if it
        ends before, at a page that fails its check."""
        pages = self._pages
        assert pages is not None
        count = -(-stop // PAGE_BYTES) - page
        blocks = self._file.pread(count * BLOCK_BYTES, (1 + page) * BLOCK_BYTES)
        for at in range(0, count * BLOCK_BYTES, BLOCK_BYTES):
            try:
                content = pages.open(page, blocks, at)
            except SealBroken:
                why = "its content was changed, or put there from another place"
                raise DataAltered(self.path, page * PAGE_BYTES, why) from None
            if content is None:
                self.fault = f"page {page} does not match its checksum"
                return False
            parts.append(content)
            page += 1
        self._disk.last_page = (self, page - 1, parts[-1])
        return True

    def pwrite(self, data: bytes, offset: int) -> None:
        """Append. Whole pages reach the disk."""
        assert offset == self.size() and not self.ends_in_page, (self.path, offset, self.size())
        assert self._pages is not None
        content = self._tail + data
        whole = len(content) // PAGE_BYTES * PAGE_BYTES
        if whole:
            page = self._on_disk // PAGE_BYTES
            self._file.pwrite(self._pages.blocks(page, content[:whole]), (1 + page) * BLOCK_BYTES)
            self._on_disk += whole
        self._tail = content[whole:]

    def rewrite(self, begin: int, end: int) -> None:
        first = 1 + begin // PAGE_BYTES if begin else 0  # Block 0 is the header, which may be new.
        stop = 1 + -(-end // PAGE_BYTES)
        self._file.rewrite(first * BLOCK_BYTES, min(stop * BLOCK_BYTES, self._file.size()))

    def finish(self) -> None:
        if self._tail:
            assert self._pages is not None
            page = self._on_disk // PAGE_BYTES
            self._file.pwrite(self._pages.block(page, self._tail), (1 + page) * BLOCK_BYTES)
            self._on_disk += len(self._tail)
            self._tail = b""
            self.ends_in_page = True

    def truncate(self, size_bytes: int) -> None:
        """Cut the file. Unless the cut is between two pages, what remains is copied to a new file,
        so that a crash leaves the old one or the new one."""
        if size_bytes == self.size():
            return
        assert size_bytes < self._on_disk and not self._tail and self._pages is not None
        page, rest = divmod(size_bytes, PAGE_BYTES)
        if rest:
            content = self.pread(rest, page * PAGE_BYTES)
            if len(content) < rest:
                raise DataDamaged(self.path, page * PAGE_BYTES, self.fault)
            self._replace((1 + page) * BLOCK_BYTES, self._pages.block(page, content))
        else:
            self._file.truncate((1 + page) * BLOCK_BYTES)
        self._disk.last_page = NO_PAGE
        self._on_disk = size_bytes
        self.ends_in_page = rest != 0

    def _replace(self, keep_bytes: int, block: bytes) -> None:
        """Replace the file by its first `keep_bytes` and `block`."""
        disk = self._disk.inner
        staged = disk.stage(self.path)
        for at in range(0, keep_bytes, COPY_BYTES):
            staged.write(self._file.pread(min(COPY_BYTES, keep_bytes - at), at))
        staged.write(block)
        staged.publish()
        self._file.close()
        self._file = disk.open(self.path)

    def allocate(self, size_bytes: int) -> None:
        raise NotImplementedError("space of a sealed file is not reserved")

    def sync(self) -> None:
        """As `File.sync`, for whole pages and after `finish`."""
        self._file.sync()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._disk.closed(self)
        self._file.close()


NO_PAGE: tuple[File | None, int, bytes] = (None, 0, b"")


class _SealedStaged(Staged):
    """Seals what is written to a staged file."""

    def __init__(self, staged: Staged, pages: _Pages) -> None:
        self._staged = staged
        self._pages = pages
        self._page = 0
        self._tail = b""
        staged.write(pages.header)

    def write(self, data: bytes) -> None:
        content = self._tail + data
        whole = len(content) // PAGE_BYTES * PAGE_BYTES
        if whole:
            self._staged.write(self._pages.blocks(self._page, content[:whole]))
            self._page += whole // PAGE_BYTES
        self._tail = content[whole:]

    def finish(self) -> None:
        if self._tail:
            self._staged.write(self._pages.block(self._page, self._tail))
            self._tail = b""
        self._staged.finish()

    def publish(self) -> None:
        self.finish()
        self._staged.publish()

    def discard(self) -> None:
        self._staged.discard()


class SealedDisk(Disk):
    """A `Disk` that seals segments and checkpoints. `owner`: cluster id and member id, 16 bytes."""

    page_bytes = PAGE_BYTES

    def __init__(self, inner: Disk, keys: Keyring, owner: bytes = b"") -> None:
        self.inner = inner
        self.keys = keys
        self.last_page = NO_PAGE
        """The page that was read last: (file, number, content). Records are read one by one."""
        self._owner = owner
        self._writing: dict[str, SealedFile] = {}
        """Files open for writing, by path: a reader needs the content that waits in memory."""
        names = "lock", "list", "exists", "make_dir", "rename", "unlink", "remove_tree", "space"
        for name in (*names, "sync_dir"):  # These have nothing to do with content.
            setattr(self, name, getattr(inner, name))

    def open(self, path: str) -> File:
        file = self.inner.open(path)
        if is_sealed_name(path):
            file = self._opened(path, file, b"")
        if isinstance(file, SealedFile):
            self._writing[path] = file
        return file

    def create(self, path: str, content: bytes, size_bytes: int = 0) -> File:
        if not is_sealed_name(path):
            return self.inner.create(path, content, size_bytes)
        pages = _new_pages(path, self.keys.first, self._owner)
        file = SealedFile(self, self.inner.create(path, pages.header), pages, content)
        self._writing[path] = file
        return file

    def open_read(self, path: str) -> File:
        """A reader of what was written up to now."""
        file = self.inner.open_read(path)
        if not is_sealed_name(path):
            return file
        writer = self._writing.get(path)
        return self._opened(path, file, writer.tail if writer is not None else b"")

    def _opened(self, path: str, file: File, tail: bytes) -> File:
        try:
            head = file.pread(BLOCK_BYTES, 0)
            if is_plain(head):
                return file
            return SealedFile(self, file, _read_pages(path, head, self.keys, self._owner), tail)
        except BaseException:
            file.close()
            raise

    def closed(self, file: SealedFile) -> None:
        """`file` is not open any more."""
        if self._writing.get(file.path) is file:
            del self._writing[file.path]

    def may_append(self, file: File) -> bool:
        return (
            isinstance(file, SealedFile) and file.key is self.keys.first and not file.ends_in_page
        )

    def stage(self, path: str) -> Staged:
        staged = self.inner.stage(path)
        if not is_sealed_name(path):
            return staged
        return _SealedStaged(staged, _new_pages(path, self.keys.first, self._owner))
