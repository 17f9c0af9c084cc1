"""`etcdlite-ctl snapshot`: save, status and restore. A file gets its name when it is complete."""

from __future__ import annotations

import os
import shlex
from typing import Any

from etcdlite import backup, proto, snap
from etcdlite.cli.failures import (
    EXIT_BAD_ARGUMENTS,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    Failure,
    os_error_text,
    say,
)
from etcdlite.cli.session import Progress, Session, describe
from etcdlite.client import EtcdliteError
from etcdlite.client.partial_file import PartialFile
from etcdlite.notation import format_size

MAX_BUMP_REVISION = 1 << 62
"""A revision has 63 bits."""


def save(session: Session) -> None:
    session.need(1, "snapshot save expects one argument")
    if len(session.endpoints) != 1:
        text = (
            "snapshot must be requested to one selected node, not multiple "
            f"[{' '.join(session.endpoints)}]"
        )
        raise Failure(EXIT_INTERRUPTED, text)
    path = session.arguments[0]
    try:
        partial = PartialFile(path)
        with partial as file:
            _receive_snapshot(session, file)
            file.flush()
            if partial.is_plain:
                _check_snapshot(partial.partial_path)
    except EtcdliteError as error:
        text = describe(error, session.client().endpoint)
        raise Failure(EXIT_INTERRUPTED, f"snapshot failed: {text}") from None
    except OSError as error:
        raise Failure(EXIT_INTERRUPTED, f"could not save to {os_error_text(error)}") from None
    session.write(b"Snapshot saved at " + os.fsencode(path) + b"\n")


def _check_snapshot(path: str) -> None:
    """Raises Failure if a snapshot could not be restored. One of an etcd is not checked."""
    with open(path, "rb") as file:
        is_ours = file.read(len(snap.MAGIC)) == snap.MAGIC
    if is_ours:
        try:
            backup.status(path)
        except snap.SnapshotError as error:
            raise Failure(EXIT_FAILED, str(error)) from None


def _receive_snapshot(session: Session, file: Any) -> None:
    progress = Progress(f"snapshot of {session.endpoints[0]}", lambda size: format_size(int(size)))
    received_bytes = remaining_bytes = 0
    try:
        with session.client().stream("Maintenance.Snapshot", proto.SnapshotRequest()) as stream:
            for response in stream:
                file.write(response.blob)
                received_bytes += len(response.blob)
                remaining_bytes = response.remaining_bytes
                progress.update(received_bytes, received_bytes + remaining_bytes)
    finally:
        progress.clear()
    if remaining_bytes or not received_bytes:
        text = (
            f"the snapshot ended {remaining_bytes} bytes early "
            f"(endpoint {session.client().endpoint})"
        )
        raise Failure(EXIT_INTERRUPTED, text)


def status(session: Session) -> None:
    session.need(1, "snapshot status requires exactly one argument")
    try:
        status = backup.status(session.arguments[0])
    except snap.SnapshotError as error:
        raise Failure(EXIT_FAILED, str(error)) from None
    except OSError as error:
        raise Failure(EXIT_FAILED, os_error_text(error)) from None
    session.show("snapshot_status", status)


def restore(session: Session) -> None:
    session.need(1, "snapshot restore requires exactly one argument")
    path = session.arguments[0]
    flags = session.flags
    bump_revision = flags["bump-revision"]
    if (bump_revision != 0) != flags["mark-compacted"]:
        raise Failure(EXIT_BAD_ARGUMENTS, "--mark-compacted required if --bump-revision > 0")
    if not 0 <= bump_revision <= MAX_BUMP_REVISION:
        raise Failure(EXIT_BAD_ARGUMENTS, f"--bump-revision must be from 0 to {MAX_BUMP_REVISION}")
    data_dir = flags["data-dir"] or flags["name"] + ".etcdlite"
    progress = Progress(f"restoring to {data_dir}", lambda size: format_size(int(size)))
    try:
        backup.restore(
            path,
            data_dir,
            name=flags["name"],
            initial_cluster=flags["initial-cluster"],
            initial_cluster_token=flags["initial-cluster-token"],
            initial_advertise_peer_urls=flags["initial-advertise-peer-urls"],
            wal_dir=flags["wal-dir"],
            skip_hash_check=flags["skip-hash-check"],
            bump_revision=bump_revision,
            progress=progress.update,
        )
    except snap.SnapshotError as error:
        raise Failure(EXIT_FAILED, str(error)) from None
    except OSError as error:
        raise Failure(EXIT_FAILED, os_error_text(error)) from None
    finally:
        progress.clear()
    command = ["etcdlite"]
    if flags["name"] != "default":
        command += ["--name", flags["name"]]
    command += ["--data-dir", data_dir]
    peer_urls = flags["initial-advertise-peer-urls"]
    if peer_urls != "http://localhost:2380":
        command += ["--listen-peer-urls", peer_urls]
    say(f"restored {path}; start the server with: {shlex.join(command)}")
