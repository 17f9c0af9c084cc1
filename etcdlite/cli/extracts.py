"""The state as of a revision, or of some prefixes: `snapshot save --rev --prefix`, and
`snapshot restore` of it as new keys, into a new data directory or a running cluster.

A state comes from an extract (`extract.py`), or from a backup with history and `--rev`. What is
restored into a cluster are the differences. Each transaction compares the keys that it changes with
what the differences were made of, so no change that somebody makes at the same time is lost.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, NamedTuple

from etcdlite import backup, datadir, extract, proto
from etcdlite.cli.differences import Difference, asked_revision, times_of_cluster
from etcdlite.cli.failures import BadArguments, Failure, say
from etcdlite.cli.mirror import change_op, client_of, pages
from etcdlite.cli.offline import home_of, identities, opened_backup
from etcdlite.cli.session import Progress, Session
from etcdlite.client import Client, EtcdliteError
from etcdlite.client.errors import LeaseExist, LeaseNotFound, part
from etcdlite.errors import EtcdError
from etcdlite.extract import Header
from etcdlite.lease import KEY, Lessor
from etcdlite.mvcc import Store
from etcdlite.storage.layout import LEASE, TIMES, U64
from etcdlite.storage.steps import finish

MARK_KEYS = 1_000
"""Keys that are written to a new data directory at once."""

MAX_OPS = 128
TXN_BYTES = 1 << 20
"""Of a transaction: changes, and bytes of values unless one alone is larger."""

LEASE_RULES = ("keep", "drop", "refuse")


def is_asked_for(session: Session) -> bool:
    """Whether the flags of `snapshot save` ask for an extract."""
    flags = session.flags
    return bool(flags["rev"] or flags["at"] or flags["prefix"])


# Saving.


def save(session: Session, file: Any) -> None:
    """Write an extract of the cluster to a file. Raises EtcdliteError."""
    prefixes = extract.plain_prefixes(map(os.fsencode, session.flags["prefix"])) or (b"",)
    if len(prefixes) > extract.MAX_PREFIXES:
        raise BadArguments(f"at most {extract.MAX_PREFIXES} prefixes")
    client = session.client()
    asked = asked_revision(session, lambda: times_of_cluster(client))
    request = proto.RangeRequest(key=b"\0", revision=asked, count_only=True)
    header = part(client.call("KV.Range", request))
    revision = asked or header.revision
    writer = extract.Writer(file, Header(header.cluster_id, revision, prefixes))
    leases: set[int] = set()
    with Progress(f"keys of {session.endpoints[0]}") as progress:
        for prefix in prefixes:
            for kv in pages(client, prefix, revision):
                writer.add(kv)
                if kv.lease:
                    leases.add(kv.lease)
                progress.update(writer.total_keys, 0)
    writer.finish((lease, _granted_ttl(client, lease)) for lease in sorted(leases))


def _granted_ttl(client: Client, lease: int) -> int:
    """0 if the lease has ended."""
    try:
        return client.lease_time_to_live(lease).granted_ttl
    except LeaseNotFound:
        return 0


def status(path: str, session: Session) -> backup.Status:
    """What `snapshot status` shows of an extract. Raises Explained, OSError."""
    with backup.opened(path, identities(session)) as file:
        found = extract.check(path, file)
        number = int.from_bytes(found.digest[:4], "big")
        return backup.Status(number, found.header.revision, found.total_keys, found.size_bytes)


def is_extract(session: Session, path: str) -> bool:
    """Whether the file, decrypted if need be, is an extract. Raises SnapshotError, OSError."""
    with backup.opened(path, identities(session)) as file:
        return bool(file.read(len(extract.MAGIC)) == extract.MAGIC)


# The state to restore.


class State(NamedTuple):
    """The keys as of a revision."""

    revision: int
    prefixes: tuple[bytes, ...]
    key_values: Callable[[], Iterator[Any]]
    """In order; may be called again."""
    leases: dict[int, int]
    """Granted TTL in seconds by id; 0 if the lease has ended."""


@contextmanager
def _state(session: Session, path: str) -> Iterator[State]:
    """That of the file and the flags --rev and --prefix. Raises Explained, OSError."""
    if is_extract(session, path):
        with backup.opened(path, identities(session)) as file:
            yield _narrowed(session, _of_extract(session, path, file))
        return
    with opened_backup(session, path, session.flags["skip-hash-check"]) as store:
        yield _narrowed(session, _of_store(session, store))


def _of_extract(session: Session, path: str, file: Any) -> State:
    found = extract.check(path, file)
    revision = found.header.revision
    if session.flags["rev"] not in (0, revision) or session.flags["at"]:
        text = f"{path} has the keys as of revision {revision} only: leave out --rev and --at"
        raise Failure(text)
    return State(
        revision, found.header.prefixes, lambda: extract.key_values(path, file), found.leases
    )


def _of_store(session: Session, store: Store) -> State:
    times = sorted(store.buckets.get(TIMES, {}).items())
    known = [(int.from_bytes(key, "big"), U64.unpack(value)[0]) for key, value in times]
    revision = asked_revision(session, lambda: known) or store.revision
    try:
        store.check_revision(revision)
    except EtcdError as error:
        kept = f"the backup has revisions {max(1, store.compacted)} to {store.revision}"
        raise Failure(f"{error.text}: {kept}") from None
    leases = {lease: store.lessor.ttl_s(lease) for lease in finish(store.lessor.lease_steps())}
    return State(revision, (b"",), lambda: _keys_of(store, revision), leases)


def _keys_of(store: Store, revision: int) -> Iterator[Any]:
    start: bytes | None = b""
    while start is not None:
        found, start = store.scan(start, None, revision, 1_000)
        for location, length in found:
            yield proto.KeyValue.decode(store.data.read(location, length))


def _narrowed(session: Session, state: State) -> State:
    """With --prefix, only the keys of these prefixes."""
    wanted = extract.plain_prefixes(map(os.fsencode, session.flags["prefix"]))
    if not wanted:
        return state
    for prefix in wanted:
        if not extract.in_prefixes(prefix, state.prefixes):
            raise Failure(f"--prefix {os.fsdecode(prefix)}: the file does not have all these keys")
    return state._replace(
        prefixes=wanted,
        key_values=lambda: (kv for kv in state.key_values() if extract.in_prefixes(kv.key, wanted)),
    )


def _rule(session: Session) -> str:
    rule: str = session.flags["leases"]
    if rule not in LEASE_RULES:
        raise BadArguments(f"--leases {rule}: it is one of {', '.join(LEASE_RULES)}")
    return rule


def _check_leases(state: State, rule: str, leased: Iterable[int]) -> dict[int, int]:
    """The leases to grant, (TTL by id). Raises Failure if the rule does not allow them."""
    if rule == "drop":
        return {}
    found = dict.fromkeys(leased, 0)
    if found and rule == "refuse":
        text = f"keys have leases ({len(found)} of them). Say --leases keep, to grant the leases"
        raise Failure(f"{text} again with their full TTL, or --leases drop")
    for lease in found:
        found[lease] = state.leases.get(lease, 0)
        if not found[lease]:
            text = f"lease {lease:x} had ended when the backup was made, so its TTL is not known"
            raise Failure(f"{text}. Say --leases drop")
    return found


# Into a new data directory.


def restore_new(session: Session, path: str, data_dir: str) -> None:
    """Make a data directory with the keys. Raises Explained, OSError."""
    rule = _rule(session)
    with _state(session, path) as state:
        leases = _check_leases(state, rule, {kv.lease for kv in state.key_values() if kv.lease})
        _make_member(session, data_dir, state, leases)


def _make_member(session: Session, data_dir: str, state: State, leases: dict[int, int]) -> None:
    flags = session.flags
    names = ("name", "initial-cluster", "initial-cluster-token", "initial-advertise-peer-urls")
    founding = backup.founding_of(*(flags[name] for name in names))
    founding = backup.of_backup(founding, state.revision + flags["bump-revision"], 1)
    home = home_of(session, data_dir)
    sealed = home.data_disk(founding.cluster_id, founding.member_id)
    with backup.new_member(home) as directory:
        store = Store.create(sealed, f"{directory}/data", Lessor(), home.segment_bytes)
        for lease, ttl_s in leases.items():
            store.lessor.grant(lease, ttl_s, 0.0)
            store.set_bucket(LEASE, KEY.pack(lease), store.lessor.encode(lease))
        for number, kv in enumerate(state.key_values()):
            store.put(kv.key, kv.value, kv.lease if kv.lease in leases else 0)
            store.end_revision()
            if number % MARK_KEYS == 0:
                _mark(store)
        if flags["bump-revision"]:
            store.skip_revisions(flags["bump-revision"])
        _mark(store)
        datadir.finish(home, directory, store, founding)


def _mark(store: Store) -> None:
    # Not 0: a member that joins later must get a snapshot, since the log does not have the keys.
    store.mark(1, 1)
    store.events.clear()


# Into a running cluster.


def restore_into(session: Session, path: str) -> None:
    """Change the keys of a running cluster to those of the file. Raises EtcdliteError, Failure."""
    rule = _rule(session)
    if session.flags["dry-run"]:
        session.check_format("difference", "--dry-run")
    with _state(session, path) as state, closing(client_of(session)) as client:
        revision = part(client.call("KV.Range", proto.RangeRequest(key=b"\0"))).revision
        restoration = _Restoration(client, state, rule, revision)
        if not session.flags["dry-run"]:
            restoration.restore()
            return
        for difference in restoration.differences():
            session.show("difference", difference, {})


class _Restoration(NamedTuple):
    """One restoration into a cluster, whose keys are read as of `revision`."""

    client: Any
    state: State
    rule: str
    revision: int

    def differences(self) -> Iterator[Difference]:
        """What the restoration changes, in the order of the keys."""
        now = itertools.chain.from_iterable(
            pages(self.client, prefix, self.revision) for prefix in self.state.prefixes
        )
        return differences(now, self.state.key_values(), self.rule != "drop")

    def restore(self) -> None:
        puts = deletes = 0
        leased = set()
        for _, new in self.differences():
            if new is None:
                deletes += 1
            else:
                puts += 1
                leased.add(new.lease)
        leases = _check_leases(self.state, self.rule, sorted(leased - {0}))
        say(f"{puts} keys to put, {deletes} to delete (--dry-run shows them)")
        for lease, ttl_s in leases.items():
            with suppress(LeaseExist):  # It still exists and is kept.
                self.client.call("Lease.LeaseGrant", proto.LeaseGrantRequest(ID=lease, TTL=ttl_s))
        total, done = puts + deletes, 0
        with Progress("restoring") as progress:
            for batch in _batches(self.differences()):
                self._write(batch, done, total)
                done += len(batch)
                progress.update(done, total)
        say(f"restored: {done} keys changed")

    def _write(self, batch: list[Difference], done: int, total: int) -> None:
        compares, ops = [], []
        for old, new in batch:
            key = old.key if new is None else new.key
            was = 0 if old is None else old.mod_revision
            compares.append(proto.Compare(key=key, target=proto.Compare.MOD, mod_revision=was))
            value, lease = (None, 0) if new is None else (new.value, new.lease)
            ops.append(change_op(key, value, lease))
        try:
            response = self.client.call("KV.Txn", proto.TxnRequest(compare=compares, success=ops))
        except EtcdliteError as error:
            text = f"{error.text}; {done} of {total} keys are changed. Run it again"
            raise Failure(text) from None
        if not response.succeeded:
            text = f"these keys were changed at the same time; {done} of {total} keys are changed"
            raise Failure(f"{text}. Run it again")


def differences(
    now: Iterator[Any], wanted: Iterator[Any], keeps_leases: bool
) -> Iterator[Difference]:
    """What turns the `KeyValue`s `now` into those `wanted`; both ascend. Without `keeps_leases`, no
    key is to have a lease."""
    old, new = next(now, None), next(wanted, None)
    while old is not None or new is not None:
        if new is not None and not keeps_leases:
            new.lease = 0
        if new is None or (old is not None and old.key < new.key):
            yield Difference(old, None)
            old = next(now, None)
        elif old is None or new.key < old.key:
            yield Difference(None, new)
            new = next(wanted, None)
        else:
            if (old.value, old.lease) != (new.value, new.lease):
                yield Difference(old, new)
            old, new = next(now, None), next(wanted, None)


def _batches(found: Iterator[Difference]) -> Iterator[list[Difference]]:
    batch: list[Difference] = []
    size = 0
    for difference in found:
        new = difference.new
        grows = 0 if new is None else len(new.key) + len(new.value)
        if batch and (len(batch) == MAX_OPS or size + grows > TXN_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(difference)
        size += grows
    if batch:
        yield batch
