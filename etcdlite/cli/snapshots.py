"""`etcdlite-ctl snapshot`: save, status and restore. A file gets its name when it is complete."""

from __future__ import annotations

import hashlib
import os
import shlex
from typing import Any

from etcdlite import age, backup, proto, snap
from etcdlite.age import AgeError, Encryptor
from etcdlite.cli import extracts
from etcdlite.cli.failures import EXIT_INTERRUPTED, BadArguments, Failure, os_error_text, say
from etcdlite.cli.offline import home_of, identities
from etcdlite.cli.session import Progress, Session, describe
from etcdlite.client import EtcdliteError
from etcdlite.client.partial_file import PartialFile
from etcdlite.etcd_restore import check_digest, is_etcd
from etcdlite.notation import format_size
from etcdlite.permissions import user_name
from etcdlite.urls import host_port, is_address

MAX_BUMP_REVISION = 1 << 62
"""A revision has 63 bits."""


def save(session: Session) -> None:
    session.need(1, "snapshot save expects one argument")
    if len(session.endpoints) != 1:
        text = (
            "snapshot must be requested to one selected node, not multiple "
            f"[{' '.join(session.endpoints)}]"
        )
        raise Failure(text, EXIT_INTERRUPTED)
    path = session.arguments[0]
    if extracts.is_asked_for(session) and session.flags["format"] != "etcdlite":
        raise BadArguments("a backup for etcd has the whole history: leave out --rev and --prefix")
    try:
        recipients = [age.parse_recipient(text) for text in session.flags["encrypt-to"]]
    except AgeError as error:
        raise BadArguments(f"--encrypt-to: {error}") from None  # It may be a private key.
    try:
        partial = PartialFile(path)
        with partial as file:
            encryptor = _encryptor(file, recipients)
            if extracts.is_asked_for(session):
                extracts.save(session, encryptor or file)
            elif encryptor is not None:
                # Its records can be checked only with the identity: by `status` and `restore`.
                checked = _Checked(encryptor)
                _receive_snapshot(session, checked)
                checked.check()
            else:
                _receive_snapshot(session, file)
                file.flush()
                if partial.is_plain:
                    _check_snapshot(partial.partial_path)
            if encryptor is not None:
                encryptor.finish()
    except EtcdliteError as error:
        text = describe(error, session.client().endpoint)
        raise Failure(f"snapshot failed: {text}", EXIT_INTERRUPTED) from None
    except OSError as error:
        error.filename = error.filename or path  # The error of a write has no file name.
        raise Failure(f"could not save to {os_error_text(error)}", EXIT_INTERRUPTED) from None
    # What is written to a pipe, perhaps standard output, must be the backup alone.
    (session.print if partial.is_plain else say)(f"Snapshot saved at {path}")


class _Checked:
    """Passes on a snapshot that arrives, and compares its content with its SHA-256."""

    def __init__(self, file: Encryptor) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._end = b""

    def write(self, data: bytes) -> None:
        content = self._end + data
        self._digest.update(content[: -snap.DIGEST_BYTES])
        self._end = content[-snap.DIGEST_BYTES :]
        self._file.write(data)

    def check(self) -> None:
        """Raises Failure if they differ."""
        if self._digest.digest() != self._end:
            raise Failure("the snapshot does not match its SHA-256; it was not saved")


def _encryptor(file: Any, recipients: list[bytes]) -> Encryptor | None:
    try:
        return Encryptor(file, recipients) if recipients else None
    except AgeError as error:
        raise BadArguments(f"--encrypt-to: {error}") from None


def _check_snapshot(path: str) -> None:
    """Raises SnapshotError if a snapshot could not be restored. Of one in etcd's format the SHA-256
    is checked."""
    with open(path, "rb") as file:
        if is_etcd(file):
            check_digest(path, file)
            return
    backup.status(path)


def _receive_snapshot(session: Session, file: Any) -> None:
    formats = proto.SnapshotRequest
    name = session.flags["format"]
    if name not in ("etcdlite", "etcd"):
        raise BadArguments(f"--format {name}: there are etcdlite and etcd")
    request = formats(format=formats.ETCD if name == "etcd" else formats.DEFAULT)
    received_bytes = remaining_bytes = 0
    with (
        Progress(f"snapshot of {session.endpoints[0]}", format_size) as progress,
        session.client().stream("Maintenance.Snapshot", request) as stream,
    ):
        for response in stream:
            file.write(response.blob)
            received_bytes += len(response.blob)
            remaining_bytes = response.remaining_bytes
            progress.update(received_bytes, received_bytes + remaining_bytes)
    if remaining_bytes or not received_bytes:
        text = (
            f"the snapshot ended {remaining_bytes} bytes early "
            f"(endpoint {session.client().endpoint})"
        )
        raise Failure(text, EXIT_INTERRUPTED)


def status(session: Session) -> None:
    (path,) = session.need(1, "snapshot status requires exactly one argument")
    if extracts.is_extract(session, path):
        found = extracts.status(path, session)
    else:
        found = backup.status(path, identities=identities(session))
    session.show("snapshot_status", found)


def restore(session: Session) -> None:
    (path,) = session.need(1, "snapshot restore requires exactly one argument")
    flags = session.flags
    bump_revision = flags["bump-revision"]
    if (bump_revision != 0) != flags["mark-compacted"]:
        raise BadArguments("--mark-compacted required if --bump-revision > 0")
    if not 0 <= bump_revision <= MAX_BUMP_REVISION:
        raise BadArguments(f"--bump-revision must be from 0 to {MAX_BUMP_REVISION}")
    if not flags["into-cluster"]:
        session.refuse("is only for --into-cluster", "dry-run")
    else:
        names = ("data-dir", "wal-dir", "initial-cluster", "bump-revision", "encryption-key-file")
        session.refuse("is for a new data directory, not for --into-cluster", *names)
        extracts.restore_into(session, path)
        return
    data_dir = flags["data-dir"] or flags["name"] + ".etcdlite"
    if extracts.is_asked_for(session) or extracts.is_extract(session, path):
        extracts.restore_new(session, path, data_dir)
        _tell_start(session, path, data_dir)
        return
    if flags["leases"] != "refuse":
        raise BadArguments("--leases is for new keys; restoring a whole backup keeps all leases")
    with Progress(f"restoring to {data_dir}", format_size) as progress:
        backup.restore(
            path,
            home_of(session, data_dir),
            name=flags["name"],
            initial_cluster=flags["initial-cluster"],
            initial_cluster_token=flags["initial-cluster-token"],
            initial_advertise_peer_urls=flags["initial-advertise-peer-urls"],
            skip_hash_check=flags["skip-hash-check"],
            bump_revision=bump_revision,
            progress=progress.update,
            identities=identities(session),
        )
    _tell_start(session, path, data_dir)


def _tell_start(session: Session, path: str, data_dir: str) -> None:
    flags = session.flags
    if flags["identity"] and not flags["encryption-key-file"]:
        say(f"note: the backup is encrypted, but {data_dir} is not (--encryption-key-file)")
    # Root has made files that the service cannot use.
    if (owner := os.stat(os.path.dirname(os.path.abspath(data_dir))).st_uid) != os.geteuid():
        made = shlex.join(filter(None, (data_dir, flags["wal-dir"])))
        say(f"if the server runs as {user_name(owner)}: chown -R {user_name(owner)}: {made}")
    command, others = ["etcdlite"], ""
    if flags["name"] != "default":
        command += ["--name", flags["name"]]
    command += ["--data-dir", data_dir]
    for name in ("wal-dir", "encryption-key-file"):
        command += [f"--{name}", flags[name]] if flags[name] else []
    peer_urls = flags["initial-advertise-peer-urls"]
    hosts = [host_port(url)[0] for url in peer_urls.split(",")]
    if "https:" in peer_urls or not all(host == "localhost" or is_address(host) for host in hosts):
        # They need certificates, or an address of this machine that is not known here.
        others = f", and the settings for {peer_urls}"
    elif peer_urls != "http://localhost:2380":
        command += ["--listen-peer-urls", peer_urls]
    say(f"restored {path}; start the server with: {shlex.join(command)}{others}")
