"""Commands of etcdutl, on files that no server uses: `defrag --data-dir` and `hashkv`. Other
commands read backups through `opened_backup`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

from etcdlite import age, backup, datadir, etcd_hash, keys
from etcdlite.age import Identity
from etcdlite.cli.failures import BadArguments, Failure, say
from etcdlite.cli.session import Progress, Session
from etcdlite.datadir import Home
from etcdlite.errors import EtcdError, Explained
from etcdlite.mvcc import Store
from etcdlite.notation import format_size
from etcdlite.permissions import user_name
from etcdlite.sealing import KEY_BYTES, Key, Keyring
from etcdlite.storage import cleaning
from etcdlite.storage.disk import Disk
from etcdlite.storage.layout import SEGMENT_HEADER
from etcdlite.storage.steps import finish, run

LEAST_GARBAGE = 0.001
"""The share of garbage from which a segment is cleaned."""


class Hash(NamedTuple):
    """What `hashkv` prints."""

    hash: int
    revision: int
    compact_revision: int


def identities(session: Session) -> list[Identity]:
    """Those of --identity; none if it is not given. Raises Failure."""
    path = session.flags["identity"]
    try:
        return age.read_identities(path) if path else []
    except Explained as error:
        raise Failure(f"--identity: {error}") from None


def home_of(session: Session, data_dir: str) -> Home:
    """The member in `data_dir`, with the other flags about its files. Raises KeyFileError."""
    flags = session.flags
    wal_dir = datadir.separate_wal_dir(data_dir, flags["wal-dir"])
    return Home(Disk(), data_dir, wal_dir, keys.read(flags["encryption-key-file"]))


def defrag(session: Session) -> None:
    """Drop the garbage of a member that is stopped."""
    home = home_of(session, session.flags["data-dir"])
    with stopped_member(home):
        keys.check(home)
        with _opened(home) as store:
            before = store.size_bytes
            _defragment(store)
            after = store.size_bytes
    say(f"{home.data_dir}: {format_size(before)} before, {format_size(after)} now")


@contextmanager
def stopped_member(home: Home) -> Iterator[None]:
    """While this process has the data locked, the member cannot start. Raises Failure,
    StartError."""
    check_member(home)
    data_dir = home.data_dir
    owner = os.stat(data_dir).st_uid
    if owner != os.geteuid():
        # The member could not read what another user writes.
        text = f"{data_dir} belongs to user {user_name(owner)}; run this as that user"
        raise Failure(f"{text} (as root: runuser -u {user_name(owner)} -- ...)")
    with closing(datadir.lock(home)):
        yield


def check_member(home: Home) -> None:
    """Raises Failure if the directory holds no member."""
    data_dir = home.data_dir
    is_closed = os.path.isdir(data_dir) and not os.access(data_dir, os.X_OK)  # It may hold one.
    if not (is_closed or home.exists):
        raise Failure(f"{data_dir} holds no member; give its --data-dir")


@contextmanager
def _opened(home: Home) -> Iterator[Store]:
    """The state of a member that does not run."""
    opened = datadir.open_member(home, min_ttl_s=1, sync_enabled=True)
    with closing(opened.wal), closing(opened.store):
        yield opened.store


def _defragment(store: Store) -> None:
    """The same as `Maintenance` does while a member runs."""
    while store.compaction is not None:
        store.compact_step()
    if store.data.offset > SEGMENT_HEADER.size:
        store.data.roll()
    run(store.checkpoint())
    while (segment := cleaning.segment_to_clean(store, LEAST_GARBAGE)) is not None:
        run(cleaning.clean(store, segment))
    run(store.checkpoint())


@contextmanager
def opened_backup(session: Session, path: str, skip_hash_check: bool = False) -> Iterator[Store]:
    """The state in a backup, in a directory beside it that goes away again. Raises Explained and
    OSError."""
    found = identities(session)
    # What is encrypted does not reach the disk in plain text.
    ring = Keyring([Key(os.urandom(KEY_BYTES))]) if found else None
    beside = os.path.dirname(os.path.abspath(path))
    with tempfile.TemporaryDirectory(prefix=".etcdlite-", dir=beside) as directory:
        home = Home(Disk(), f"{directory}/member", keys=ring)
        with Progress(f"reading {path}", format_size) as progress:
            backup.restore(
                path,
                home,
                skip_hash_check=skip_hash_check,
                progress=progress.update,
                identities=found,
            )
        with _opened(home) as store:
            yield store


def hashkv(session: Session) -> None:
    """The hash that a member with the state of a backup gives."""
    session.need(1, "hashkv requires exactly one argument")
    revision: int = session.flags["rev"]
    if revision < 0:
        raise BadArguments("--rev must not be negative")
    with opened_backup(session, session.arguments[0]) as store:
        try:
            store.check_revision(revision)
        except EtcdError as error:
            raise Failure(error.text) from None
        revision = revision or store.revision
        found = finish(etcd_hash.hash_steps(store, revision))
        session.show("hashkv", Hash(found, revision, store.compact_revision))
