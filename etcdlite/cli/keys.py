"""`etcdlite-ctl key`, `rekey`, `secret`: files with encryption keys, identities and secrets."""

from __future__ import annotations

import json
import os

from etcdlite import age, keys, private_file, sealing, secret_file
from etcdlite.cli.failures import BadArguments, Failure, say
from etcdlite.cli.offline import check_member, home_of, stopped_member
from etcdlite.cli.session import Progress, Session
from etcdlite.client.partial_file import PartialFile
from etcdlite.datadir import Home
from etcdlite.notation import format_size
from etcdlite.sealing import Keyring, ids_text


def new(session: Session) -> None:
    """Make a file with one key; without a file, print its line."""
    key_id, line = sealing.new_key()
    text = f"# id {key_id.hex()}\n{line}"
    path = session.optional("key new takes the name of one file")
    if path is None:
        session.write(text.encode())
        return
    private_file.create(path, text)
    session.print(
        f"# A new key, id {key_id.hex()}. Keep a copy of the file, but not with the data: without "
        "it the data is lost.",
        f"encryption-key-file = {json.dumps(os.path.abspath(path), ensure_ascii=False)}",
    )


def new_secret(session: Session) -> None:
    """Make a file with one secret and print the settings that use it, as lines of TOML."""
    path = session.optional("secret new takes the name of one file") or "etcdlite.secret"
    made = secret_file.create(os.path.abspath(path))
    shown = json.dumps(os.path.abspath(path), ensure_ascii=False)
    session.print(
        f"# A new secret, id {made.id.hex()}. Copy the file to each machine that needs it, with "
        "mode 0600.",
        "# Between members, in the configuration of all of them:",
        f"peer-secret-file = {shown}",
        "# Or for clients of the native protocol (never the secret of the members):",
        f"# client-secret-file = {shown}",
    )


def add(session: Session) -> None:
    """Put a new key first in a file of keys, which is replaced as a whole."""
    (path,) = session.need(1, "key add takes the name of one file")
    key_id, line = sealing.new_key()
    ring = sealing.read(path)
    if len(ring.ids) >= sealing.MAX_KEYS:
        raise Failure(f"{path} has {len(ring.ids)} keys; remove one first")
    old = private_file.read(path, sealing.MAX_FILE_BYTES)
    owner = os.stat(path)
    with PartialFile(path) as file:
        os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
        os.fchmod(file.fileno(), owner.st_mode & 0o777)  # The service may read it as the group.
        file.write(f"# id {key_id.hex()}\n{line}".encode() + old)
    say(
        f"key {key_id.hex()} is the first one in the file now; restart the member, or stop it and "
        "run 'etcdlite-ctl rekey'"
    )


def identity(session: Session) -> None:
    """Make an identity, and print its public key; without a file, print both."""
    made = age.new_identity()
    text = f"# public key: {made.recipient}\n{made.text}\n"
    path = session.optional("key identity takes the name of one file")
    if path is None:
        session.write(text.encode())
    else:
        private_file.create(path, text)
        session.print(made.recipient)


def rekey(session: Session) -> int:
    """Seal everything with the first key. With --check only say what needs another one."""
    session.need(0, "rekey takes no arguments")
    data_dir = session.flags["data-dir"]
    home = home_of(session, data_dir)
    ring = home.keys
    if ring is None:
        raise BadArguments("rekey needs --encryption-key-file")
    if session.flags["check"]:
        return _check(session, home, ring)
    with stopped_member(home), Progress(f"rekeying {data_dir}", format_size) as progress:
        count = keys.replace(home, progress.update)
    say(f"{count} files rewritten; everything in {data_dir} needs key {ring.first.id.hex()} only")
    return 0


def _check(session: Session, home: Home, ring: Keyring) -> int:
    """Prints a line for each key in use; the status is 1 if the first key is not enough."""
    check_member(home)
    sums: dict[bytes | None, tuple[int, int]] = {}
    for use in keys.uses(home):
        files, size = sums.get(use.key_id, (0, 0))
        sums[use.key_id] = files + 1, size + use.size_bytes
    for key_id, (files, size) in sums.items():
        name = "none (plain)" if key_id is None else key_id.hex()
        note = "" if key_id is None or key_id in ring.ids else ", which is not in the file"
        session.print(f"key {name}{note}: {files} files, {format_size(size)}")
    others = [key_id for key_id in sums if key_id is not None and key_id != ring.first.id]
    if others:
        say(f"still needed besides the first key: {ids_text(others)}")
    return int(sums.keys() != {ring.first.id})
