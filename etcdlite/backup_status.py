"""The file in which the nightly backup (packaging/backup) says how it went.

Each line is `NAME VALUE`, ASCII, with the names of `NAMES` and whole numbers that are not negative.
This is Prometheus' text format 0.0.4, so node_exporter can read the file, too. Lines that begin
with "#", and other names, are skipped: a later version may write more. The file is replaced as a
whole. The member shows what it says among its metrics, and `etcdlite-ctl doctor` reads it.
"""

from __future__ import annotations

import re

from etcdlite.private_file import read_file

LAST_SUCCESS = "etcdlite_backup_last_success_timestamp_seconds"
LAST_FAILURE = "etcdlite_backup_last_failure_timestamp_seconds"
SIZE = "etcdlite_backup_size_bytes"

NAMES = {
    LAST_SUCCESS: "Unix time of the last backup that was saved and checked",
    LAST_FAILURE: "Unix time of the last backup that failed",
    SIZE: "Size of the last backup",
}

MAX_BYTES = 4096
"""What follows in a larger file is not read."""

_LINE = re.compile(rb"^(\w{1,100}) (\d{1,15})$", re.M)


def parse(content: bytes) -> dict[str, int]:
    """The values by name; of a name that comes twice, the last one. Anything else is skipped."""
    found = {name.decode(): int(value) for name, value in _LINE.findall(content)}
    return {name: found[name] for name in NAMES if name in found}


def read(path: str) -> dict[str, int]:
    """What the file says; empty if there is none that can be read."""
    try:
        return parse(read_file(path, MAX_BYTES)[0][:MAX_BYTES])
    except (OSError, ValueError):
        return {}
