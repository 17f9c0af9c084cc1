"""A disk in memory that fails on command and forgets what was not synced.

It takes the place of `etcdlite.storage.disk.Disk`. It can do three things that a real disk does
rarely:

- With `fail_at = n`, its n-th operation from now (the next is 1) raises an `OSError` with `error`.
  A write that fails has written the whole sectors of its first half; without space, it has not
  made the file longer. After a sync that fails, dirty data counts as clean, as in Linux: it can be
  read, and a later sync does not save it unless it was written again.
- `power_loss(keep, names)` returns the disk after a loss of power. Of each sector and file size
  written since the last sync, `keep` says whether it is there. Of the creations, renames and
  removals since the last `sync_dir`, the first `names` are there. (A journal keeps their order.)

A killed process loses nothing: open the files again on the same disk.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from etcdlite.storage.disk import NO_SPACE, Disk, File, Staged

SECTOR_BYTES = 512
SIZE = -1
"""In place of a sector number, `keep` gets this for the new size of the file."""


class _Inode:
    def __init__(self, stable: bytes = b"") -> None:
        self.data = bytearray(stable)
        self.stable = bytearray(stable)
        self.dirty: set[int] = set()  # sectors, and SIZE
        self.lost: set[int] = set()  # dirty when a sync failed

    def resize(self, size_bytes: int) -> None:
        old = len(self.data)
        if size_bytes != old:
            self.dirty.add(SIZE)
            del self.data[size_bytes:]
            self.data.extend(bytes(size_bytes - len(self.data)))
            self.touch(min(size_bytes, old), max(size_bytes, old))

    def fork(self) -> _Inode:
        other = _Inode(self.stable)
        other.data = bytearray(self.data)
        other.dirty = set(self.dirty)
        other.lost = set(self.lost)
        return other

    def touch(self, begin: int, end: int) -> None:
        sectors = range(begin // SECTOR_BYTES, -(-end // SECTOR_BYTES))
        self.dirty.update(sectors)
        self.lost.difference_update(sectors)

    def write(self, data: bytes, offset: int) -> None:
        self.resize(max(len(self.data), offset + len(data)))
        self.data[offset : offset + len(data)] = data
        self.touch(offset, offset + len(data))
        if SIZE in self.lost and offset + len(data) == len(self.data):
            # The size goes to the disk with the last bytes.
            self.lost.discard(SIZE)
            self.dirty.add(SIZE)

    def sync(self) -> None:
        if SIZE in self.dirty or len(self.stable) != len(self.data):
            self.stable = bytearray(self._mixed(self.dirty.__contains__))
        else:
            # A log segment is synced thousands of times, a sector or two at a time.
            for sector in self.dirty:
                at = sector * SECTOR_BYTES
                self.stable[at : at + SECTOR_BYTES] = self.data[at : at + SECTOR_BYTES]
        self.dirty.clear()

    def evict(self) -> None:
        for sector in self.lost - {SIZE}:
            at = sector * SECTOR_BYTES
            stable = self._piece(self.stable, sector)
            self.data[at : at + SECTOR_BYTES] = stable[: len(self.data) - at]
        self.lost &= {SIZE}

    def unsynced(self) -> list[int]:
        """The sectors (or SIZE) of which a loss of power leaves the old or the new content."""
        return [
            sector
            for sector in sorted(self.dirty | self.lost)
            if self._piece(self.data, sector) != self._piece(self.stable, sector)
        ]

    def after_power_loss(self, keep: Callable[[int], bool]) -> _Inode:
        unsynced = self.dirty | self.lost
        return _Inode(self._mixed(lambda sector: sector in unsynced and keep(sector)))

    def _piece(self, data: bytearray, sector: int) -> bytes:
        if sector == SIZE:
            return str(len(data)).encode()
        at = sector * SECTOR_BYTES
        return bytes(data[at : at + SECTOR_BYTES]).ljust(SECTOR_BYTES, b"\0")

    def _mixed(self, new: Callable[[int], bool]) -> bytes:
        size = len(self.data) if new(SIZE) else len(self.stable)
        content = self.stable[:size].ljust(size, b"\0")
        for sector in sorted(self.dirty | self.lost):
            if sector != SIZE and new(sector):
                at = sector * SECTOR_BYTES
                content[at : at + SECTOR_BYTES] = self._piece(self.data, sector)
        return bytes(content[:size])


class FaultyFile(File):
    __slots__ = ("_disk", "_inode", "_is_closed")

    def __init__(self, disk: FaultyDisk, path: str, inode: _Inode) -> None:
        super().__init__(path, -1)
        self._disk = disk
        self._inode = inode
        self._is_closed = False

    def pread(self, size_bytes: int, offset: int) -> bytes:
        assert not self._is_closed, self.path
        self._disk._step("pread", self.path)
        at = self._disk.unreadable.get(self.path, -1)
        if offset <= at < offset + size_bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.path)
        return bytes(self._inode.data[offset : offset + size_bytes])

    def pwrite(self, data: bytes, offset: int) -> None:
        def write_half() -> None:
            # Linux gives up between two pages, so also between two sectors.
            middle = (offset + len(data) // 2) // SECTOR_BYTES * SECTOR_BYTES
            size_bytes = len(self._inode.data)
            self._inode.write(data[: max(0, middle - offset)], offset)
            if self._disk.error in NO_SPACE:
                self._inode.resize(size_bytes)

        self._disk._step("pwrite", self.path, write_half)
        self._inode.write(data, offset)

    def size(self) -> int:
        self._disk._step("size", self.path)
        return len(self._inode.data)

    def truncate(self, size_bytes: int) -> None:
        self._disk._step("truncate", self.path)
        self._inode.resize(size_bytes)

    def allocate(self, size_bytes: int) -> None:
        self._disk._step("allocate", self.path)
        self._inode.resize(max(size_bytes, len(self._inode.data)))

    def sync(self) -> None:
        def forget() -> None:
            self._inode.lost |= self._inode.dirty
            self._inode.dirty.clear()

        self._disk._step("sync", self.path, forget)
        self._inode.sync()

    def fileno(self) -> int:
        raise NotImplementedError("a file in memory has no descriptor")

    def close(self) -> None:
        self._is_closed = True
        self._disk._locks.discard(self)


class FaultyDisk(Disk):
    def __init__(self) -> None:
        self.free_bytes = 1 << 40
        """What `space` says; nothing gets less by writing."""
        self.fail_at: int | None = None
        self.error = errno.EIO
        self.unreadable: dict[str, int] = {}
        """By path: the offset of a byte that cannot be read."""
        self.operations: list[tuple[str, str]] = []
        """(operation, path) of everything that was asked for."""
        self.watcher: Callable[[str, str], None] = lambda operation, path: None
        """Called before each operation, with its name and path."""
        self._names: dict[str, _Inode] = {}
        self._stable_names: dict[str, _Inode] = {}
        # (old, new, inode) of what is not synced; a folder that is renamed has no inode.
        self._renames: list[tuple[str, str, _Inode | None]] = []
        self._directories = {".", "/"}
        self._locks: set[FaultyFile] = set()

    def power_loss(
        self, keep: Callable[[str, int], bool] = lambda path, sector: False, names: int = 0
    ) -> FaultyDisk:
        """The disk after a loss of power. This one stays as it is, for other outcomes."""
        after = type(self)()
        after._directories = set(self._directories)
        stable = dict(self._stable_names)
        for change in self._renames[:names]:
            _apply(stable, change)
        for old, new, inode in reversed(self._renames[names:]):
            if old and new and inode is None:
                after._directories = _renamed(after._directories, new, old)
        inodes: dict[int, _Inode] = {}
        for path, inode in stable.items():
            if id(inode) not in inodes:
                inodes[id(inode)] = inode.after_power_loss(
                    lambda sector, path=path: keep(path, sector)  # type: ignore[misc]
                )
            after._names[path] = inodes[id(inode)]
        after._stable_names = dict(after._names)
        return after

    def copy(self) -> FaultyDisk:
        """The same files, all of them synced."""
        return self.power_loss(lambda path, sector: True, len(self._renames))

    def evict(self) -> None:
        """Drop from the page cache what a failed sync has marked as saved: it is read from the disk
        again."""
        for inode in self._names.values():
            inode.evict()

    def fork(self) -> FaultyDisk:
        """The same files with the same parts of them not synced: what a process that is killed
        leaves to the next, and a loss of power may still take from that."""
        other = type(self)()
        other._directories = set(self._directories)
        inodes = {
            id(inode): inode.fork()
            for inode in [
                *self._names.values(),
                *self._stable_names.values(),
                *[inode for _, _, inode in self._renames if inode is not None],
            ]
        }
        other._names = {path: inodes[id(inode)] for path, inode in self._names.items()}
        other._stable_names = {
            path: inodes[id(inode)] for path, inode in self._stable_names.items()
        }
        other._renames = [
            (old, new, inode and inodes[id(inode)]) for old, new, inode in self._renames
        ]
        return other

    def unsynced(self) -> list[tuple[str, int]]:
        """(path, sector or SIZE) of all that `power_loss` asks `keep` about and that matters."""
        return [(path, s) for path, inode in self._names.items() for s in inode.unsynced()]

    @property
    def used_bytes(self) -> int:
        """The size of all files."""
        return sum(len(inode.data) for inode in self._names.values())

    @property
    def unsynced_names(self) -> int:
        """How many creations, renames and removals are not durable."""
        return len(self._renames)

    def is_synced(self, path: str) -> bool:
        inode = self._names.get(path)
        return inode is not None and not inode.dirty and not inode.lost

    @property
    def paths(self) -> list[str]:
        """The files there are, sorted."""
        return sorted(self._names)

    def content(self, path: str) -> bytearray:
        """The bytes of a file, to be changed in place (a synced file only)."""
        inode = self._names[path]
        inode.stable = inode.data
        return inode.data

    def _step(self, operation: str, path: str, half_done: Callable[[], None] | None = None) -> None:
        self.watcher(operation, path)
        self.operations.append((operation, path))
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at == 0:
                self.fail_at = None
                if half_done is not None:
                    half_done()
                raise OSError(self.error, os.strerror(self.error), path)

    def _change(self, old: str, new: str, inode: _Inode | None) -> None:
        change = (old, new, inode)
        _apply(self._names, change)
        self._renames.append(change)

    def _inode(self, path: str) -> _Inode:
        if path not in self._names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return self._names[path]

    def open(self, path: str) -> File:
        self._step("open", path)
        return FaultyFile(self, path, self._inode(path))

    def open_new(self, path: str) -> File:
        self._step("create", path)
        if path in self._names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        if (os.path.dirname(path) or ".") not in self._directories:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        self._change("", path, _Inode())
        return FaultyFile(self, path, self._inode(path))

    def open_read(self, path: str) -> File:
        return self.open(path)

    def lock(self, path: str) -> File:
        self._step("lock", path)
        if any(file.path == path for file in self._locks):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
        if path not in self._names:
            self._change("", path, _Inode())
        file = FaultyFile(self, path, self._inode(path))
        self._locks.add(file)
        return file

    def list(self, path: str) -> list[str]:
        self._step("list", path)
        if path not in self._directories:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return sorted(
            os.path.basename(name)
            for name in [*self._names, *self._directories]
            if (os.path.dirname(name) or ".") == path and os.path.basename(name)
        )

    def exists(self, path: str) -> bool:
        return path in self._names or path in self._directories

    def make_dir(self, path: str) -> None:
        self._step("make_dir", path)
        while path and path not in self._directories:
            self._directories.add(path)
            path = os.path.dirname(path)

    def rename(self, old: str, new: str) -> None:
        self._step("rename", new)
        if old in self._directories:
            self._directories = _renamed(self._directories, old, new)
            self._change(old, new, None)
        else:
            self._change(old, new, self._inode(old))

    def unlink(self, path: str) -> None:
        self._step("unlink", path)
        self._inode(path)
        self._change(path, "", None)

    def remove_tree(self, path: str) -> None:
        self._step("remove_tree", path)
        for name in [name for name in self._names if name.startswith(path + "/")]:
            self._change(name, "", None)
        self._directories = {
            name for name in self._directories if name != path and not name.startswith(path + "/")
        }

    def sync_dir(self, path: str) -> None:
        self._step("sync_dir", path)
        remaining: list[tuple[str, str, _Inode | None]] = []
        for change in self._renames:
            old, new, inode = change
            if (os.path.dirname(new or old) or ".") != path:
                remaining.append(change)
                continue
            _apply(self._stable_names, change)
            if old and new and inode is None:
                # What is not durable in the folder goes where the folder goes. What was there
                # before was in another folder.
                remaining = [
                    (_moved(source, old, new), _moved(target, old, new), file)
                    for source, target, file in remaining
                    if not f"{source}{target}".startswith(new + "/")
                ]
        self._renames = remaining

    def space(self, path: str) -> tuple[int, int]:
        return self.free_bytes, 1 << 40

    def read(self, path: str) -> bytes:
        self._step("read", path)
        return bytes(self._inode(path).data)

    def stage(self, path: str) -> Staged:
        return _FaultyStaged(self, path)


class _FaultyStaged(Staged):
    def __init__(self, disk: FaultyDisk, path: str) -> None:
        self._disk = disk
        self.path = path
        if disk.exists(path + ".tmp"):
            disk.unlink(path + ".tmp")
        self._content = disk.open_new(path + ".tmp")
        self._offset = 0

    def write(self, data: bytes) -> None:
        self._content.pwrite(data, self._offset)
        self._offset += len(data)

    def finish(self) -> None:
        pass

    def discard(self) -> None:
        self._disk.unlink(self.path + ".tmp")

    def publish(self) -> None:
        self._content.sync()
        self._disk.rename(self.path + ".tmp", self.path)
        self._disk.sync_dir(os.path.dirname(self.path) or ".")


def _apply(names: dict[str, _Inode], change: tuple[str, str, _Inode | None]) -> None:
    old, new, inode = change
    if old and new and inode is None:
        for name in [name for name in names if name.startswith(new + "/")]:
            del names[name]  # They are in another folder, which had this name before.
        for name in [name for name in names if name.startswith(old + "/")]:
            names[new + name[len(old) :]] = names.pop(name)
        return
    if old:
        names.pop(old, None)
    if new and inode is not None:
        names[new] = inode


def _moved(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if path.startswith(old + "/") else path


def _renamed(directories: set[str], old: str, new: str) -> set[str]:
    return {
        new + name[len(old) :] if name == old or name.startswith(old + "/") else name
        for name in directories
    }
