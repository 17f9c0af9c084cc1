"""Files that hold secrets: keys and identities. Only their owner may read them.

A file that other users may read or change is refused, as ssh refuses such a key. The modes of a
file of another owner (root's in a container, for example) are that owner's choice, as in OpenSSH
(sshkey_perm_ok): there, only what all users may read or change is refused. So it is for a file that
root gave to another group than its own, such as that of the service, also when root checks it.
"""

from __future__ import annotations

import errno
import os
import stat
from base64 import b64decode, b64encode

from etcdlite.errors import MayPass

MODE = 0o600

SECRET_BYTES = 32
"""Of each secret in a file of secrets."""

MIN_DISTINCT_BYTES = 12
"""Fewer different bytes are not random: that happens to one of 10**25 random secrets."""


class PrivateFileError(MayPass):
    """The file cannot be used. The text names the file, the reason and the remedy."""


def stamp(path: str) -> tuple[int, ...]:
    """What changes when a file is replaced or written; empty if it cannot be looked at."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_file(path: str, max_bytes: int) -> tuple[bytes, os.stat_result]:
    """The content of a file, and its `stat`. Of a file larger than `max_bytes`, that and one more
    byte are read. Raises OSError, also if it is not a regular file."""
    # Without O_NONBLOCK a pipe would block.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        return os.read(fd, max_bytes + 1), found
    finally:
        os.close(fd)


def read(path: str, max_bytes: int) -> bytes:
    """The content of a private file. Raises PrivateFileError."""
    try:
        data, found = read_file(path, max_bytes)
    except (OSError, ValueError) as failure:
        why = getattr(failure, "strerror", None) or str(failure)
        raise PrivateFileError(
            f"cannot read {path}: {why}; correct the path or the permissions"
        ) from failure
    mode = stat.S_IMODE(found.st_mode)
    # Root gives a file to the group of a service on purpose, as the manual says.
    is_given = found.st_uid == 0 and found.st_gid != 0
    is_own = found.st_uid == os.getuid() and not is_given
    if mode & (0o077 if is_own else 0o007):
        raise PrivateFileError(
            f"{path} may be read or changed by other users (its mode is {mode:04o}); "
            f"correct that with 'chmod 600 {path}'"
        )
    if len(data) > max_bytes:
        raise PrivateFileError(f"{path} has more than {max_bytes} bytes; name another file")
    return data


def read_secrets(path: str, prefix: str, what: str, most: int, max_bytes: int) -> list[bytes]:
    """The secrets in a private file of at most `max_bytes`: 1 to `most` of them. Empty lines, and
    lines that begin with "#", are skipped. Each other line is `prefix` and `SECRET_BYTES` random
    bytes in base64. `what` is their name in errors. Raises PrivateFileError."""
    secrets: list[bytes] = []
    for number, raw in enumerate(read(path, max_bytes).splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith(b"#"):
            continue
        why = ""
        encoded = line.removeprefix(prefix.encode())
        try:
            secret = b64decode(encoded, validate=True)
        except ValueError:
            secret = b""
        if encoded == line or len(secret) != SECRET_BYTES:
            why = f"it is not {prefix}... with {SECRET_BYTES} bytes in base64"
        elif len(set(secret)) < MIN_DISTINCT_BYTES or all(32 <= byte < 127 for byte in secret):
            why = f"its {what} is not random and could be guessed"
        elif secret in secrets:
            why = f"its {what} is there twice"
        if why:
            raise PrivateFileError(
                f"line {number} of {path} cannot be used: {why}. Make a {what} with "
                f"'etcdlite-ctl {what} new FILE'"
            )
        secrets.append(secret)
    if not 1 <= len(secrets) <= most:
        raise PrivateFileError(
            f"{path} has {len(secrets)} {what}s; it must have 1 to {most}. Make one with "
            f"'etcdlite-ctl {what} new FILE'"
        )
    return secrets


def secret_line(prefix: str, secret: bytes) -> str:
    """The line of a file of secrets for this one."""
    return f"{prefix}{b64encode(secret).decode()}\n"


def create(path: str, content: str) -> None:
    """Make a private file, durable on return. Raises PrivateFileError if it cannot be made, OSError
    if it cannot be written."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags, MODE)
    except FileExistsError:
        raise PrivateFileError(
            f"{path} exists already and is not overwritten; name another file, or remove it"
        ) from None
    except OSError as failure:
        text = str(failure.strerror).lower()
        raise PrivateFileError(
            f"cannot write {path}: {text}; correct the path or the permissions"
        ) from failure
    with open(fd, "w", encoding="ascii") as file:
        os.fchmod(fd, MODE)
        file.write(content)
        file.flush()
        os.fsync(fd)
    sync_directory(path)


def sync_directory(path: str) -> None:
    """Make creations and renames beside the file at `path` durable."""
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
