"""A file that takes its name only when it is complete."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import BinaryIO


def opened(file: str | os.PathLike[str] | BinaryIO) -> AbstractContextManager[BinaryIO]:
    """What a backup is written to: a `PartialFile` for a path, else the file object itself."""
    if isinstance(file, (str, os.PathLike)):
        return PartialFile(os.fspath(file))
    return nullcontext(file)


class PartialFile:
    """A file that replaces the one at `path` only when it is complete.

    It is written as path + ".part", readable for its owner only. At the end of `with` it is synced
    and renamed; after an exception it is removed. If another process begins to write the same file,
    that one goes on, and this one fails at its end. Only a plain file is ever replaced: of a
    symbolic link, what it points to; a device or a pipe is written to; a directory is refused.
    Raises OSError."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.partial_path = path
        """Where the bytes are until the end of `with`."""
        self.is_plain = True
        """Whether there is a file to be replaced, and not a device or a pipe."""

    def __enter__(self) -> BinaryIO:
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            mode = os.stat(self._path).st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self._path)
        self.is_plain = stat.S_ISREG(mode)
        if self.is_plain:
            if os.path.islink(self._path):
                self._path = os.path.realpath(self._path)
            self.partial_path = self._path + ".part"
            # One that is there may be another user's, or a link to where that user wants it.
            self._remove()
            flags |= os.O_CREAT | os.O_EXCL
        try:
            self._file = open(os.open(self.partial_path, flags, 0o600), "wb")
            return self._file
        except KeyboardInterrupt:
            self._remove()
            raise

    def sync(self) -> None:
        self._file.flush()
        if self.is_plain:
            os.fsync(self._file.fileno())

    def _remove(self) -> None:
        if self.is_plain:
            with suppress(FileNotFoundError):
                os.unlink(self.partial_path)

    def _has_name(self) -> bool:
        """No other process has put a file of its own in the place of this one."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fileno()), os.lstat(self.partial_path))
        return False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            try:
                if kind is not None:
                    return
                self.sync()
                if self.is_plain:
                    if not self._has_name():
                        why = "another process writes it at the same time"
                        raise FileExistsError(errno.EEXIST, why, self._path)
                    os.replace(self.partial_path, self._path)
            finally:
                if self._has_name():
                    self._remove()
        if self.is_plain:
            from etcdlite.private_file import sync_directory  # Few clients need it.

            sync_directory(self._path)
