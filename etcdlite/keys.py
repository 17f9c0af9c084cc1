"""The keys of a data directory: which ones its files need, and how they are replaced.

A change of keys is not urgent for a file: whatever is written is sealed with the first key, and any
key reads. `replace` is for the rest, so that an old key can go. It works on the directory of a
member that is stopped, and each of its steps is safe: a start after a crash finds a member that is
whole, with some files under the old keys.

1. An interrupted installation of a snapshot is completed, as at a start.
2. Each segment of the data and the checkpoint is copied to a new file under the first key, which
   replaces the old one (`rename`). The content, and so each location, stays the same.
3. The log is written to one new segment, and then the old segments are removed
   (`WAL.replace_segments`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import NamedTuple

from etcdlite import datadir, sealing, wal
from etcdlite.datadir import Home, StartError
from etcdlite.sealing import Keyring, ids_text
from etcdlite.storage import sealed
from etcdlite.storage.disk import COPY_BYTES, Disk
from etcdlite.wal import WAL

HEAD_BYTES = 64
"""What tells the key of a file."""


class KeyUse(NamedTuple):
    """With which key a file of a member is sealed."""

    path: str
    key_id: bytes | None
    """None: the file is plain, or has no intact header."""
    is_plain: bool
    size_bytes: int


def read(path: str) -> Keyring | None:
    """The keys in the file at `path`; None if that is empty. Raises KeyFileError."""
    return sealing.read(path) if path else None


def uses(home: Home) -> list[KeyUse]:
    """The keys of all files of a member that hold keys or values; empty if there is no member. The
    member may be running. Raises OSError."""
    if not home.exists:
        return []
    disk = home.disk
    found = []
    for folder in (home.logs, *datadir.data_folders(home)):
        for name in disk.list(folder) if disk.exists(folder) else ():
            is_log = name.endswith(".wal")
            if not is_log and not sealed.is_sealed_name(name):
                continue
            try:
                file = disk.open_read(f"{folder}/{name}")
            except FileNotFoundError:
                continue  # The running member has removed it.
            head = file.pread(HEAD_BYTES, 0)
            owner = wal if is_log else sealed
            found.append(KeyUse(file.path, owner.key_id(head), owner.is_plain(head), file.size()))
            file.close()
    return found


def check(home: Home) -> None:
    """Raise StartError unless all keys that the member's files are sealed with are there. Writes
    nothing. Raises OSError."""
    keys, found = home.keys, uses(home)
    needed = dict.fromkeys(use.key_id for use in found if use.key_id is not None)
    given = keys.ids if keys is not None else []
    missing = [key_id for key_id in needed if key_id not in given]
    if missing:
        has = f"{keys.path} has {ids_text(given)}" if keys is not None else "no key was given"
        path = next(use.path for use in found if use.key_id == missing[0])
        raise StartError(
            f"the data in {home.data_dir} is encrypted, and a key is missing: it needs "
            f"{ids_text(needed)}, but {has} (for example, {path} needs {ids_text(missing[:1])}). "
            "Nothing was changed. Name the file with the missing key as --encryption-key-file"
        )


def check_start(home: Home) -> None:
    """As `check`, and raise StartError if the member has keys and plain files: anyone who can write
    to the disk could have put them there."""
    check(home)
    _, data_dir, wal_dir, keys, *_ = home
    if keys is None:
        return
    plain = [use.path for use in uses(home) if use.is_plain]
    if plain:
        where = f" --wal-dir {wal_dir}" if wal_dir else ""
        raise StartError(
            f"the data in {data_dir} has files that are not encrypted ({len(plain)}, for example "
            f"{plain[0]}). If they never were, encrypt them once with 'etcdlite-ctl rekey "
            f"--data-dir {data_dir}{where} --encryption-key-file {keys.path}'. If they were, "
            "someone replaced them: do not use them. Nothing was changed"
        )


def replace(home: Home, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Seal all files of a member that is stopped with the first key; returns how many were not. The
    caller holds the lock of the directory. `progress` gets (bytes done, total bytes). Raises
    StartError, DataDamaged, WALError, OSError."""
    keys = home.keys
    assert keys is not None
    check(home)
    log_files, recovered = WAL.open(home.disk, home.logs, home.wal_segment_bytes, keys=keys)
    with closing(log_files):
        store_disk = home.data_disk(*datadir.identity(recovered.metadata))
        datadir.settle_snapshots(store_disk, home.data, recovered.snapshot[0])
        old = [use for use in uses(home) if use.key_id != keys.first.id]
        total = sum(use.size_bytes for use in old)
        done = 0
        for use in old:
            if not use.path.endswith(".wal"):
                _copy(store_disk, use.path)
                done += use.size_bytes
                progress(done, total)
        if any(use.path.endswith(".wal") for use in old):
            log_files.replace_segments(recovered.entries)
            progress(total, total)
    return len(old)


def _copy(disk: Disk, path: str) -> None:
    """Replace a file by a copy under the first key."""
    with closing(disk.open_read(path)) as file:
        staged = disk.stage(path)
        offset, size = 0, file.size()
        while offset < size:
            part = file.pread(min(COPY_BYTES, size - offset), offset)
            if not part:
                raise StartError(
                    f"{path} cannot be read at offset {offset}: {file.fault}. If a crash left "
                    "this, a start repairs it: start the member, stop it, and run this again"
                )
            staged.write(part)
            offset += len(part)
        staged.publish()
