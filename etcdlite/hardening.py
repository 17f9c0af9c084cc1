"""What keeps the data from other users of the machine, modes of files and no core dumps, and a
warning of what strangers on the network can do.

The memory of the process holds keys, values and secrets. A core dump would put them on the disk, or
hand them to a collector of crashes:

- RLIMIT_CORE 1 prevents both. The kernel writes no file that would be larger than the limit, and
  takes 1 as "no dump" where it would pipe one into a program (core(5), fs/coredump.c); 0 would not
  stop a pipe.
- PR_SET_DUMPABLE 0 also keeps other processes of the same user from reading the memory through
  /proc and ptrace (prctl(2), ptrace(2)). Only root can debug the process then.

Every file is made with mode 0600 and every directory with 0700. Those of a directory that was
copied, restored or made by someone else may have other modes: they are corrected at the start, if
they are this user's. etcd only warns.
"""

from __future__ import annotations

import os
import resource
import stat

from etcdlite import log
from etcdlite.config import Config
from etcdlite.urls import is_local, is_secure, is_wildcard

PR_SET_DUMPABLE = 4

UMASK = 0o077

_OTHERS = 0o077


def protect_process() -> None:
    """Make new files private, and keep other processes from reading the memory. A standard stream
    that is closed becomes /dev/null, so that no other file gets its number."""
    os.umask(UMASK)
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard != 0:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    try:
        import ctypes  # Takes 3 ms and 0.4 MB. The standard library has no other way.

        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    except (ImportError, OSError, AttributeError) as failure:
        log.debug("other processes of this user may read this one's memory", why=str(failure))


_OUTCOMES = {
    True: "other users could use files of the data directory; their modes are corrected",
    False: "other users may use files of the data directory: another user owns them, they are in a "
    "shared directory, or the file system has no modes; correct that with chmod go-rwx",
}
"""What is logged, by whether the files could be closed to other users."""


def close_files(data_dir: str, wal_dir: str) -> None:
    """Take other users' rights to the files of a member away, and log that, or log what remains."""
    found: dict[str, bool | None] = {}
    """By path: whether the file was closed to other users; None: it is private."""
    ours = {"lock", "member", "fixtures"}
    for top in filter(os.path.isdir, (data_dir, wal_dir)):
        found.setdefault(top, _close(None, top))
        for folder, folders, files, fd in os.fwalk(top):
            if folder == data_dir:
                folders[:] = ours.intersection(folders)
                files = list(ours.intersection(files))
            for name in (*folders, *files):
                found.setdefault(f"{folder}/{name}", _close(fd, name))
    for outcome, message in _OUTCOMES.items():
        paths = [path for path, is_closed in found.items() if is_closed is outcome]
        if paths:
            log.warn(message, files=len(paths), first=min(paths))


def warn_of_open_peer_port(settings: Config) -> None:
    """Log what strangers can do at a port for members that other machines reach, if members prove
    to each other who they are by nothing but their addresses."""
    is_mutual = settings.peer_client_cert_auth or settings.peer_trusted_ca_file
    urls = [
        url
        for url in settings.listen_peer_urls
        if (is_wildcard(url) or not is_local(url)) and not (is_secure(url) and is_mutual)
    ]
    if not urls or settings.peer_secret_file:
        return
    if settings.peer_address_check:
        who = "anyone who can use the address of a member, or change traffic on the network,"
    else:
        who = "anyone who reaches the port for members"
    log.warn(
        f"{who} can read and change all data as that member. Set peer-secret-file, or "
        "peer-client-cert-auth with https URLs",
        listen_peer_urls=",".join(urls),
    )


def warn_of_shared_ca(settings: Config) -> None:
    """Log that a client's certificate is accepted from a member, if one CA is trusted for both."""
    if not any(map(is_secure, settings.listen_peer_urls)):
        return
    from etcdlite.x509 import MAX_PEM_BYTES  # Needed only with TLS.

    paths = settings.trusted_ca_file, settings.peer_trusted_ca_file
    is_narrowed = settings.peer_cert_allowed_cn or settings.peer_cert_allowed_hostname
    contents = set()
    for path in filter(None, paths):
        try:
            with open(path, "rb") as file:
                contents.add(file.read(MAX_PEM_BYTES))
        except OSError:
            return  # `Channels` says what is wrong with it.
    if all(paths) and len(contents) == 1 and not is_narrowed:
        log.warn(
            "members and clients have the same CA: anyone who has a client's certificate and can "
            "use a member's address can pose as that member. Make another CA for the members, "
            "or list the names in their certificates as peer-cert-allowed-cn",
            peer_trusted_ca_file=settings.peer_trusted_ca_file,
        )


def _close(folder: int | None, name: str) -> bool | None:
    """Take other users' rights to the file `name` of an open directory away. Returns None if they
    had none, else whether they have none now.

    Some file systems have no modes. With the sticky bit, a directory is shared on purpose, like
    /tmp. Whoever may write to the directory could replace the file by a link to another one, so
    only the file that was opened without following links is changed."""
    try:
        mode = os.lstat(name, dir_fd=folder).st_mode
    except OSError:
        return None
    if stat.S_ISLNK(mode) or not mode & _OTHERS:
        return None
    if mode & stat.S_ISVTX:
        return False
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return False
    try:
        now = os.fstat(fd)
        if not stat.S_ISDIR(now.st_mode) and now.st_nlink > 1:
            return False  # A hard link to a file that may be somewhere else, too.
        os.fchmod(fd, stat.S_IMODE(now.st_mode) & ~_OTHERS)
        return not os.fstat(fd).st_mode & _OTHERS
    except OSError:
        return False
    finally:
        os.close(fd)
