"""What a backup that a client took must hold: a state that was there, whole and readable."""

from __future__ import annotations

import hashlib
import io
from typing import Any

from rigs.faulty_disk import FaultyDisk

from etcdlite import backup, proto, snap
from etcdlite.auth import Auth
from etcdlite.lease import Lessor
from etcdlite.mvcc import Store
from sim.checkers import Oracle, Violation
from sim.plain_auth import text_of


def check_backup(oracle: Oracle, blob: bytes) -> int:
    """Open the backup on a disk of its own and compare all keys; returns its revision."""
    if hashlib.sha256(blob[: -snap.DIGEST_BYTES]).digest() != blob[-snap.DIGEST_BYTES :]:
        raise Violation("a backup matches its checksum")
    disk = FaultyDisk()
    file = io.BytesIO(blob)
    header, start = snap.read_header("backup", file)
    backup.extract("backup", file, header, start, "data", disk)
    store = Store.open(disk, "data", Lessor(), 1 << 20)
    if store.revision != header["revision"]:
        raise Violation(
            "a backup holds the revision that it says",
            f"{store.revision} instead of {header['revision']}",
        )
    check_state(oracle, store, "the backup")
    found = text_of(Auth(store))
    versions = oracle.auth.versions
    if all(
        found != versions[number].auth.text() for number in oracle.auth.of_revision(store.revision)
    ):
        raise Violation("a backup holds the users and roles of its revision", found)
    return store.revision


def check_state(oracle: Oracle, store: Any, who: str) -> None:
    """All keys of a store are what they must be at its revision."""
    expected = oracle.states[store.revision]
    if expected is None:
        return
    found = {}
    for key in list(store.index.heads):
        found[key] = proto.KeyValue.decode(store.get(key))
    if found != expected:
        wrong = [key for key in {**found, **expected} if found.get(key) != expected.get(key)]
        raise Violation(
            "a state is that of its revision",
            f"{who} at revision {store.revision} has "
            + ", ".join(
                f"{found.get(key)!r} instead of {expected.get(key)!r}" for key in wrong[:3]
            ),
            (who,),
        )
