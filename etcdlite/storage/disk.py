"""The thin layer between the storage files and the operating system.

All storage reaches the disk through a `Disk` and the `File` objects that it opens, and in no other
way, so that tests can put a faulty or simulated disk in its place.

Every method may raise `OSError`. After a failed `sync` the state of the file is unknown (the kernel
may have dropped the dirty pages and cleared the error), so the caller must not retry: it ends the
process. A call that found no space, no free descriptor or no access may be repeated. In a thread,
methods wait for a descriptor and access by themselves, and `create` for space, too. Callers of the
others `pause`.

The one thread here does work that no caller can wait for: see `_Eraser`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, TypeVar

from etcdlite import log

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The file system or the user's quota is full, or a file has reached its maximum size."""

FILE_SIZE_REMEDY = "raise the limit of the size of files (LimitFSIZE= of systemd, ulimit -f)"

REFUSED = (errno.EMFILE, errno.ENFILE, errno.EACCES)
"""No file descriptor is free, or a directory has another owner or mode than before."""

TRANSIENT = NO_SPACE + REFUSED
"""Errors after which another attempt may succeed later."""

PAUSE_S = 1.0
"""Between two attempts."""

MAX_PAUSES = 60
"""Pauses after `REFUSED`. After them the process must end, which closes all of its files."""

COPY_BYTES = 1 << 20
"""The contents of a file are copied in pieces of this size."""

_Call = TypeVar("_Call", bound=Callable[..., Any])

_is_stopping = threading.Event()


def pause(failure: OSError) -> None:
    """Wait before a call that failed with one of `TRANSIENT` is repeated. Raises `failure` instead
    in the main thread, which must not wait, and once the process stops."""
    if threading.current_thread() is threading.main_thread():
        raise failure
    if not log.limited("exhausted", 0.1):
        why = "has no space or no file descriptor left"
        if failure.errno == errno.EACCES:
            why = "refuses access to the data"
        elif failure.errno == errno.EFBIG:
            why = f"allows no file of this size: {FILE_SIZE_REMEDY}"
        log.error(f"the system {why}; waiting", error=str(failure))
    if _is_stopping.wait(PAUSE_S):
        raise failure


def stop_waiting() -> None:
    """The process stops: from now on `pause` does not wait, but raises."""
    _is_stopping.set()


def _patiently(call: Callable[..., Any], *args: Any) -> Any:
    """The result of `call`, repeated while it fails with one of `REFUSED` (see `pause`)."""
    for pauses in range(MAX_PAUSES + 1):
        try:
            return call(*args)
        except OSError as failure:
            if failure.errno not in REFUSED or pauses == MAX_PAUSES:
                raise
            pause(failure)


def _open(path: str, flags: int) -> int:
    fd: int = _patiently(os.open, path, flags | os.O_CLOEXEC, 0o600)
    return fd


def _names_file(call: _Call) -> _Call:
    """The method of a `File` or `Staged`, with its path in the errors."""

    @wraps(call)
    def named(self: File | Staged, *args: Any) -> Any:
        try:
            return call(self, *args)
        except OSError as failure:
            failure.filename = self.path
            raise

    return named  # type: ignore[return-value]


class File:
    """An open file: positioned reads and writes, no shared cursor.

    Errors name the file."""

    __slots__ = ("_fd", "path")

    fault = ""
    """Why the last read ended early; a file that is not sealed does not know it."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd

    @_names_file
    def pread(self, size_bytes: int, offset: int) -> bytes:
        """At most `size_bytes` from `offset`; fewer only at the end of the file."""
        data = os.pread(self._fd, size_bytes, offset)
        while data and len(data) < size_bytes:
            more = os.pread(self._fd, size_bytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    @_names_file
    def pwrite(self, data: bytes, offset: int) -> None:
        """All of `data` at `offset`. After an error the file is not longer than before."""
        done = os.pwrite(self._fd, data, offset)
        try:
            while done < len(data):
                done += os.pwrite(self._fd, memoryview(data)[done:], offset + done)
        except OSError:
            if self.size() == offset + done:
                os.ftruncate(self._fd, offset)
            raise

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    @_names_file
    def truncate(self, size_bytes: int) -> None:
        os.ftruncate(self._fd, size_bytes)

    @_names_file
    def allocate(self, size_bytes: int) -> None:
        """Reserve zero-filled space up to `size_bytes`, so that later writes there find it,
        unless the file system copies on write. After an error none of it is taken."""
        before_bytes = self.size()
        try:
            os.posix_fallocate(self._fd, 0, size_bytes)
        except OSError as failure:
            os.ftruncate(self._fd, before_bytes)  # ext4 has reserved what it found.
            if failure.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            # As in etcd. NFS, for example, cannot reserve; glibc then writes zeros, but not musl.
            os.ftruncate(self._fd, max(before_bytes, size_bytes))

    @_names_file
    def sync(self) -> None:
        """Return when everything written is on stable storage (fdatasync)."""
        os.fdatasync(self._fd)

    def rewrite(self, begin: int, end: int) -> None:
        """Write the bytes [begin, end) again, unchanged. After a failed sync Linux counts them as
        saved: it may drop them and read older ones, and the next sync does not save them."""
        for at in range(begin, end, COPY_BYTES):
            self.pwrite(self.pread(min(COPY_BYTES, end - at), at), at)

    def finish(self) -> None:
        """Nothing is appended any more: write what waits in memory (only a sealed file has it)."""

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Staged:
    """A file that is written at `path + ".tmp"`, with `write`, and moved to `path` by `publish`."""

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk = disk
        self.path = path
        # Always a new file: an abandoned `Staged` may still write to an old one.
        if os.path.exists(path + ".tmp"):
            os.unlink(path + ".tmp")
        fd = _open(path + ".tmp", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._file = open(fd, "wb")  # noqa: SIM115

    @_names_file
    def write(self, data: bytes) -> None:
        self._file.write(data)

    @_names_file
    def finish(self) -> None:
        """Hand the rest to the system, so that a lack of space shows now. No more writes."""
        self._file.flush()

    @_names_file
    def publish(self) -> None:
        """Sync, rename into place, sync the folder."""
        self.finish()
        os.fdatasync(self._file.fileno())
        self._file.close()
        self._disk.rename(self.path + ".tmp", self.path)
        self._disk.sync_dir(os.path.dirname(self.path) or ".")

    def discard(self) -> None:
        """Remove the unfinished file. No other call may follow."""
        with suppress(OSError):
            self._file.close()  # This tries to write what is left.
        os.unlink(self.path + ".tmp")


ERASE_STEP_BYTES = 2 << 20
ERASE_PAUSE_S = 0.005


class _Eraser:
    """Frees the space of removed files in small steps, in a thread.

    On a file system that is mounted with `discard`, freeing 64 MiB at once takes 70 ms in which no
    other sync completes. A file is erased only when its removal is durable. A file that is still
    open elsewhere (a snapshot that is being sent: every `File` holds a shared lock) or has another
    name is left to the kernel."""

    def __init__(self) -> None:
        self._removed: dict[int, str] = {}
        """Descriptors of removed files, and the folder of each, until its removal is durable."""
        self.waiting: queue.Queue[int] = queue.Queue()
        self._thread: threading.Thread | None = None

    def remove(self, path: str, call: Callable[..., None], *args: str) -> None:
        """Remove the name `path` with `call(*args)`. A large file is erased after `synced`."""
        fd = -1
        with suppress(OSError):  # There is none, it is a folder, or no descriptor is free.
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _patiently(call, *args)
            if fd >= 0 and os.fstat(fd).st_size > ERASE_STEP_BYTES:
                self._removed[fd] = os.path.dirname(path) or "."
                fd = -1
        finally:
            if fd >= 0:
                os.close(fd)

    def synced(self, folder: str) -> None:
        """Erase what was removed from a folder so far: the removals are durable now."""
        for fd, its_folder in self._removed.copy().items():
            if its_folder != folder or self._removed.pop(fd, None) is None:
                continue
            if self._thread is None:
                thread = threading.Thread(None, self._run, "etcdlite-eraser", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # There can be no thread now: the kernel frees the space.
                    os.close(fd)
                    continue
                self._thread = thread
            self.waiting.put(fd)

    def _run(self) -> None:
        while True:
            fd = self.waiting.get()
            try:
                if os.fstat(fd).st_nlink == 0:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    for size in range(os.fstat(fd).st_size, 0, -ERASE_STEP_BYTES):
                        os.ftruncate(fd, size - min(size, ERASE_STEP_BYTES))
                        time.sleep(ERASE_PAUSE_S)
            except (OSError, MemoryError):
                pass  # A reader holds it, or it cannot be changed: closing frees it, too.
            finally:
                os.close(fd)
                self.waiting.task_done()


_ERASER = _Eraser()


class Disk:
    """The real file system. Paths are strings, absolute or relative to the working directory."""

    page_bytes = 1
    """Files reach the disk in whole pages of this size. More than 1 if they are sealed."""

    def may_append(self, file: File) -> bool:
        """Whether an open data segment may be continued where it ends."""
        return True

    def open(self, path: str) -> File:
        """Open for reading and writing."""
        return self._locked(path, os.O_RDWR, fcntl.LOCK_SH)

    def create(self, path: str, content: bytes, size_bytes: int = 0) -> File:
        """Create a file with this content, and reserve `size_bytes` for it. It must not exist yet.
        A thread waits for space (see `pause`); after an error there is no file."""
        while True:
            file = None
            try:
                file = self.open_new(path)
                if size_bytes:
                    file.allocate(size_bytes)
                if content:
                    file.pwrite(content, 0)
                return file
            except OSError as failure:
                if file is not None:
                    file.close()
                    self.unlink(path)
                if failure.errno not in NO_SPACE:
                    raise
                pause(failure)

    def open_new(self, path: str) -> File:
        """An empty file, which must not exist yet."""
        return self._locked(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, fcntl.LOCK_SH)

    def open_read(self, path: str) -> File:
        while True:
            try:
                file = self._locked(path, os.O_RDONLY, fcntl.LOCK_SH)
            except BlockingIOError:
                continue  # It was just replaced and is being erased: open its replacement.
            if os.fstat(file.fileno()).st_nlink:
                return file
            file.close()

    def lock(self, path: str) -> File:
        """Create the lock file if needed, and lock it. Raises BlockingIOError if it is locked."""
        return self._locked(path, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX)

    @staticmethod
    def _locked(path: str, flags: int, mode: int) -> File:
        """A file that is locked until it is closed. `_Eraser` leaves alone what is locked."""
        fd = _open(path, flags)
        try:
            fcntl.flock(fd, mode | fcntl.LOCK_NB)
        except OSError as failure:
            failure.filename = path
            os.close(fd)
            raise
        return File(path, fd)

    def list(self, path: str) -> list[str]:
        """The names in a folder, sorted."""
        return sorted(_patiently(os.listdir, path))

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def make_dir(self, path: str) -> None:
        """Create a folder (mode 0700); fine if it exists. Missing parents are made durably."""
        parent = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(parent):
            self.make_dir(parent)
            self.sync_dir(os.path.dirname(parent))
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)

    def rename(self, old: str, new: str) -> None:
        """Atomically replace `new` by `old`. Durable only after `sync_dir`."""
        _ERASER.remove(new, os.rename, old, new)

    def unlink(self, path: str) -> None:
        """Remove the name. The space is freed in steps, see `_Eraser`."""
        _ERASER.remove(path, os.unlink, path)

    def remove_tree(self, path: str) -> None:
        import shutil  # It loads every compression library, and trees are rarely removed.

        _patiently(shutil.rmtree, path)

    def space(self, path: str) -> tuple[int, int]:
        """Bytes of the file system of `path`: (free for this user, total)."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def sync_dir(self, path: str) -> None:
        """Make creations, renames and removals in the folder durable."""
        fd = _open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        except OSError as failure:
            failure.filename = path
            raise
        finally:
            os.close(fd)
        _ERASER.synced(path)

    def wait_for_space(self) -> None:
        """Wait until the space of the files removed before the last `sync_dir` is free."""
        _ERASER.waiting.join()

    def stage(self, path: str) -> Staged:
        """Begin to write a file that atomically replaces `path` when it is published."""
        return Staged(self, path)
