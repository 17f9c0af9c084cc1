"""What `etcdlite-ctl doctor` sees of the member on this machine: its configuration and what belongs
to it. It reads, and changes nothing; to measure the disk it writes one small file in the data
directory, and removes it. What this user may not see is listed in `unseen`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import shlex
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from etcdlite import backup_status, x509
from etcdlite.config import Config, ConfigError, check_files, load
from etcdlite.flags import DEFAULT_FILE
from etcdlite.permissions import may_read, user_name
from etcdlite.urls import host_port

SERVICE_DIRECTORY = "/var/lib/etcdlite"
"""A relative data-dir of the service is below this."""

SETTINGS = "/etc/"
"""The user of the service must be able to read the settings, keys and certificates below this.
Files elsewhere may be passed on by LoadCredential= of systemd."""

INSTANCE_FILES = re.compile(r"/etc/etcdlite/([^/]+)\.toml")
"""The configuration of etcdlite@NAME, which is named NAME (packaging/systemd/etcdlite@.service)."""

PROBES = 30
PROBE_BYTES = 4096
PROBE_S = 2.0
"""The disk is measured with this many synced writes of this size, in about this time."""

MIN_PROBE_SPACE_BYTES = 16 << 20

_LOCK = re.compile(rb"FLOCK +\S+ +\S+ +(\d+) +[0-9a-f]+:[0-9a-f]+:(\d+) ")
_MAX_FILES = re.compile(rb"Max open files +(\d+)")
_LISTENS = "0A"


class Port(NamedTuple):
    """An address that the member is to listen on, and another process does."""

    flag: str
    url: str
    holder: str
    """The process, as far as this user may see it."""


@dataclasses.dataclass
class Machine:
    """The member of one configuration file, on this machine."""

    file: str
    config: Config | None = None
    """None if the configuration has problems."""
    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    data_dir: str = ""
    """Absolute; empty if it does not exist or cannot be seen."""
    pid: int = 0
    """The running member; 0 if there is none."""
    open_to_others: list[str] = dataclasses.field(default_factory=list)
    """Files of the data directory, and private keys, that other users can read or change."""
    foreign: list[str] = dataclasses.field(default_factory=list)
    """Files of the data directory with another owner than `reference`."""
    reference: str = ""
    """The directory that has the right owner: the service's, or else the data directory."""
    disk: tuple[int, int] = (0, 0)
    """Of the file system of the data: (bytes free, bytes in total)."""
    syncs_s: list[float] = dataclasses.field(default_factory=list)
    """How long each synced write of the probe took."""
    max_files: int = 0
    """The limit of open files of the running member; 0 if it is not known."""
    certificates: dict[str, float] = dataclasses.field(default_factory=dict)
    """When each ends (Unix time), by file."""
    taken_ports: list[Port] = dataclasses.field(default_factory=list)
    backup: dict[str, int] = dataclasses.field(default_factory=dict)
    """What the nightly backup says (`backup_status.py`)."""
    unseen: list[str] = dataclasses.field(default_factory=list)
    """What this user cannot see, a few words each."""


def look(file: str, is_named: bool) -> Machine | None:
    """The facts of the member with this configuration file; None if it does not exist and was not
    named by the user. Takes about `PROBE_S`."""
    file = file or DEFAULT_FILE
    if not is_named and not os.path.exists(file):
        return None
    machine = Machine(file)
    environ = _environ_of_service(file)
    if not os.access(file, os.R_OK) and os.path.exists(file):
        machine.unseen.append(f"{file} (run as root)")
        return machine
    try:
        config = load(
            [f"--config={file}"],
            environ,
            has_member=lambda data_dir: os.path.isdir(f"{_existing(data_dir)}/member"),
        )
    except ConfigError as error:
        machine.problems, machine.warnings = error.problems, error.warnings
        return machine
    machine.warnings = list(config.warnings)
    data_dir = _existing(config.data_dir)
    wal_dir = config.wal_dir and _existing(config.wal_dir)
    config = config._replace(data_dir=data_dir, wal_dir=wal_dir)
    machine.config = config
    machine.backup = backup_status.read(config.backup_status_file)
    _look_at_certificates(machine, config)
    _look_at_access(machine, config)
    if not os.path.isdir(data_dir):
        machine.unseen.append(f"the data directory {data_dir} (it does not exist)")
    elif os.statvfs(data_dir).f_flag & os.ST_RDONLY:
        text = f"{data_dir}: its file system is read-only; mount it read-write, and see dmesg"
        machine.problems.append(text)
    elif not os.access(data_dir, os.R_OK | os.W_OK | os.X_OK):
        machine.unseen.append(f"the data directory {data_dir}, processes and ports (run as root)")
        return machine
    else:
        machine.data_dir = data_dir
        machine.problems += check_files(config)
        machine.pid = _holder_of_lock(f"{data_dir}/lock")
        if machine.pid and _has_older_settings(machine.pid, file):
            what = "it was changed after the member started, which still has the earlier settings"
            machine.warnings.append(f"{file}: {what}; restart the member (systemctl restart)")
        _look_at_files(machine, config)
    _look_at_ports(machine, config)
    return machine


def _environ_of_service(file: str) -> dict[str, str]:
    """The variables for etcdlite of the systemd service that uses `file`: those of its process, or
    those of Environment= in its unit if the process cannot be read."""
    instance = INSTANCE_FILES.fullmatch(file)
    if not instance and file != DEFAULT_FILE:
        return {}
    unit = f"etcdlite@{instance[1]}" if instance else "etcdlite"
    command = ["systemctl", "show", "--property=MainPID,Environment", f"{unit}.service"]
    words = [f"ETCDLITE_NAME={instance[1]}"] if instance else []
    with contextlib.suppress(OSError, subprocess.TimeoutExpired, ValueError):
        shown = subprocess.run(command, capture_output=True, text=True, timeout=5.0).stdout
        found = dict(line.partition("=")[::2] for line in shown.splitlines())
        words += shlex.split(found.get("Environment", ""))
        with open(f"/proc/{found.get('MainPID')}/environ") as variables:
            words += variables.read().split("\0")
    named = dict(word.partition("=")[::2] for word in words)
    return {key: value for key, value in named.items() if key.startswith(("ETCD_", "ETCDLITE_"))}


def _existing(path: str) -> str:
    """The absolute path of a directory: below this one if it is only there, else below the
    service's, if that exists."""
    of_service, here = os.path.join(SERVICE_DIRECTORY, path), os.path.abspath(path)
    is_only_here = os.path.isdir(here) and not os.path.isdir(of_service)
    return here if is_only_here or not os.path.isdir(SERVICE_DIRECTORY) else of_service


# Files.


def _look_at_files(machine: Machine, config: Config) -> None:
    data_dir = machine.data_dir
    is_of_service = os.path.dirname(data_dir) == SERVICE_DIRECTORY
    machine.reference = SERVICE_DIRECTORY if is_of_service else data_dir
    owner = os.stat(machine.reference).st_uid
    for path in _files_of(data_dir, config.wal_dir):
        with contextlib.suppress(OSError):
            found = os.lstat(path)
            if found.st_mode & 0o077 and not stat.S_ISLNK(found.st_mode):
                machine.open_to_others.append(path)
            if found.st_uid != owner:
                machine.foreign.append(path)
    for key in filter(None, (config.key_file, config.peer_key_file, config.peer_client_key_file)):
        with contextlib.suppress(OSError):
            # A group may be trusted with a key, as Debian's ssl-cert.
            if os.stat(key).st_mode & 0o007:
                machine.open_to_others.append(key)
    space = os.statvfs(data_dir)
    machine.disk = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize


def _look_at_access(machine: Machine, config: Config) -> None:
    """Whether the user of the service may read what root has put in /etc."""
    try:
        service = os.stat(SERVICE_DIRECTORY)
    except OSError:
        return
    named = (path for flag, path in config._asdict().items() if flag.endswith("_file"))
    user = user_name(service.st_uid)
    for path in filter(None, dict.fromkeys((machine.file, *named))):
        # The files of certbot are links into a directory that is closed to others, too.
        above = {*Path(path).parents, *Path(path).resolve().parents}
        below = (place for place in map(str, (*sorted(above), path)) if place.startswith(SETTINGS))
        with contextlib.suppress(OSError):
            if closed := [x for x in below if not may_read(x, service.st_uid, service.st_gid)]:
                them = shlex.join(closed)
                to_do = f"chgrp {user} {them} && chmod g+rX {them}"
                machine.problems.append(f"{path}: the user {user} cannot read it; {to_do}")


def _files_of(data_dir: str, wal_dir: str) -> Iterator[str]:
    """The directories and files of a member. Some may be missing."""
    yield from (data_dir, f"{data_dir}/lock")
    for top in filter(None, (f"{data_dir}/member", wal_dir)):
        yield top
        for folder, folders, files in os.walk(top):
            yield from (f"{folder}/{name}" for name in (*folders, *files))


def probe_disk(machine: Machine) -> None:
    """Measure synced writes in the directory of the log, as the member makes them."""
    if machine.config is None or not machine.data_dir:
        return
    if machine.disk[0] < MIN_PROBE_SPACE_BYTES:
        machine.unseen.append("the speed of the disk (it is full)")
        return
    folder = machine.config.wal_dir or machine.data_dir
    try:
        # A name that begins with a dot does not disturb a member.
        with tempfile.TemporaryFile(dir=folder, prefix=".doctor-", buffering=0) as file:
            ends = time.monotonic() + PROBE_S
            while len(machine.syncs_s) < PROBES and (began := time.monotonic()) < ends:
                file.write(bytes(PROBE_BYTES))
                os.fdatasync(file.fileno())
                machine.syncs_s.append(time.monotonic() - began)
    except OSError as error:
        machine.unseen.append(f"the speed of the disk ({error.strerror})")


def _look_at_certificates(machine: Machine, config: Config) -> None:
    authorities = {config.trusted_ca_file, config.peer_trusted_ca_file}
    own = {config.cert_file, config.peer_cert_file, config.peer_client_cert_file}
    for path in sorted((authorities | own) - {""}):
        try:
            with open(path, "rb") as file:
                found = x509.certificates(file.read(x509.MAX_PEM_BYTES))
            ends = [certificate.not_after for certificate in found]
        except PermissionError:
            machine.unseen.append(f"{path} (run as root)")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            machine.problems.append(f"{path}: {why}; correct the path or the file")
        else:
            # Of several CAs one is enough; of a chain, the first is the member's.
            if ends:
                machine.certificates[path] = max(ends) if path in authorities else ends[0]


# Processes.


def _holder_of_lock(path: str) -> int:
    """The process that holds the lock of a data directory (proc_locks(5)); 0: none."""
    with contextlib.suppress(OSError):
        inode = os.stat(path).st_ino
        for pid, locked in _LOCK.findall(_read("/proc/locks")):
            if int(locked) == inode and b"etcdlite" in _read(f"/proc/{int(pid)}/cmdline"):
                return int(pid)
    return 0


def _has_older_settings(pid: int, file: str) -> bool:
    """Whether a process that was started with this file read it before the file's last change."""
    words = _read(f"/proc/{pid}/cmdline").decode("utf-8", "replace").split("\0")
    with contextlib.suppress(OSError, ValueError, IndexError):
        started = int(_read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[19])
        ago_s = float(_read("/proc/uptime").split()[0]) - started / os.sysconf("SC_CLK_TCK")
        is_newer = os.stat(file).st_mtime > time.time() - ago_s
        return is_newer and any(word.endswith(file) for word in words)
    return False


def _read(path: str) -> bytes:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(16 << 20)  # The table of 100,000 connections.
    return b""


def _sockets(pid: int) -> Iterator[str]:
    """The inodes of a process's sockets. Raises OSError if this user may not see them."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith("socket:["):
                yield target[8:-1]


def listeners(port: int) -> set[str]:
    """The inodes of the sockets that listen on a TCP port (proc_net(5))."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in _read(table).decode("ascii", "replace").splitlines():
            fields = line.split()
            is_listening = len(fields) > 9 and fields[3] == _LISTENS
            if is_listening and fields[1].rpartition(":")[2] == f"{port:04X}":
                found.add(fields[9])
    return found


def _look_at_ports(machine: Machine, config: Config) -> None:
    own: set[str] = set()
    if machine.pid:
        if limit := _MAX_FILES.search(_read(f"/proc/{machine.pid}/limits")):
            machine.max_files = int(limit[1])
        try:
            own = set(_sockets(machine.pid))
        except OSError:
            machine.unseen.append("which processes listen on its ports (run as root)")
            return
    for flag, url in config.listeners:
        host, port = host_port(url)
        why_not = _bind_errno(host, port) if port else 0
        if why_not == errno.EADDRNOTAVAIL:
            text = f"{flag} = {url}: this machine does not have that address"
            machine.problems.append(f"{text}; correct the URL, or add the address")
        elif why_not == errno.EADDRINUSE and not own & (found := listeners(port)):
            machine.taken_ports.append(Port(flag, url, holder(found)))


def _bind_errno(host: str, port: int) -> int:
    """The errno of an attempt to bind another socket there; 0 if it succeeds."""
    host = "127.0.0.1" if host == "localhost" else host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            return error.errno or 0
    return 0


def holder(inodes: set[str]) -> str:
    """The process that has one of these sockets, in words."""
    for name in filter(str.isdecimal, os.listdir("/proc") if inodes else ()):
        with contextlib.suppress(OSError):
            if inodes.intersection(_sockets(int(name))):
                command = _read(f"/proc/{name}/comm").decode("utf-8", "replace").strip()
                return f"process {name} ({command})"
    return "another process"
