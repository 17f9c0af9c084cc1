"""Why this process, or another user, may not use a path, and what to do about it, in words."""

from __future__ import annotations

import errno
import os
import stat

NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""The error numbers that `remedy` explains."""


def user_name(uid: int) -> str:
    """The name of a user, or the number if there is none."""
    import pwd  # Only an error needs it.

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def remedy(failure: OSError, path: str) -> str:
    """What to do about a file or directory that this process may not use: sentences."""
    if failure.errno == errno.EROFS:
        return (
            "Mount its file system read-write, and see dmesg if that was done by an error. If only "
            "the unit of systemd may not write there, name the directory in ReadWritePaths= with "
            "'systemctl edit etcdlite'"
        )
    if failure.errno not in NOT_ALLOWED:
        return "Correct that, or give another --data-dir"
    path, user = os.path.abspath(path), user_name(os.geteuid())
    found, is_closed = path, False
    while True:
        try:
            at = os.stat(found)
            break
        except OSError as why:  # It does not exist, or is in a directory closed to this user.
            is_closed = isinstance(why, PermissionError)
            found = os.path.dirname(found)
    owner = user_name(at.st_uid)
    if is_closed and not stat.S_IMODE(at.st_mode):
        return f"ProtectHome= in the unit of systemd hides {found}: choose another directory"
    if is_closed:
        todo = f"chown -R {user}: {found} if it is etcdlite's, or else chmod o+x {found}"
    elif found != path:
        todo = f"mkdir {path}; chown {user}: {path}"
    elif owner != user:
        todo = f"chown -R {user}: {path}"
    else:
        todo = f"chmod -R u+rwX {path}"
    return f"{found} belongs to {owner}, and this process runs as {user}. As root: {todo}"


def may_read(path: str, uid: int, gid: int) -> bool:
    """Whether the mode of a file lets a user read it that is in this group only, and the mode of a
    directory lets it pass. Raises OSError. Access control lists are not looked at."""
    found = os.stat(path)
    shift = 6 if uid == found.st_uid else 3 if gid == found.st_gid else 0
    needed = stat.S_IXOTH if stat.S_ISDIR(found.st_mode) else stat.S_IROTH
    return bool(found.st_mode >> shift & needed) or (uid == 0 and shift == 0)
