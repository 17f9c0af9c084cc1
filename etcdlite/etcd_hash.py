"""HashKV as etcd computes it: two servers of the same history give the same number.

It is the CRC-32C of the text "key" and then, in the order of revisions up to the one asked for, of
key and value of each record of etcd's bucket `key` (`etcd_backup.py`). Of the records up to the
compact revision only those count that a compaction at the revision asked for would keep: those that
are the present version of their key then. If no key exists then, all of them count. (The rules are
those of server/storage/mvcc/hash.go and `keep` of key_index.go in etcd 3.6.)

Members compare each other with another hash, `Store.hash_steps`, which takes a third of the time
and which all versions of etcdlite share.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from itertools import chain, compress

from etcdlite import crc32c
from etcdlite.errors import DATA_LOSS, EtcdError
from etcdlite.etcd_file import STEP_ITEMS, items_of
from etcdlite.mvcc import Store
from etcdlite.storage.history import History
from etcdlite.storage.layout import PUT, key_and_revision


def hash_steps(store: Store, revision: int) -> Generator[None, None, int]:
    """The hash up to `revision`, which can be read and is not above the last mark: the generator's
    return value. Raises DataDamaged, EtcdError if a file cannot be opened."""
    compacted = store.compacted
    store.pinned.append(compacted)
    history: History | None = None
    try:
        history = History(store)
        yield from history.scan_steps()
        keeps_some = yield from _has_keys(store, revision)
        return (yield from _hash(store, history, compacted, revision, keeps_some))
    except OSError as failure:
        raise EtcdError(DATA_LOSS, f"etcdlite: cannot read the data: {failure}") from failure
    finally:
        store.pinned.remove(compacted)
        if history is not None:
            history.close()


def _has_keys(store: Store, revision: int) -> Generator[None, None, bool]:
    cursor: bytes | None = b""
    while cursor is not None:
        found, cursor = store.index.scan(cursor, None, revision, 1)
        if found:
            return True
        yield
    return False


def _hash(
    store: Store, history: History, compacted: int, revision: int, keeps_some: bool
) -> Generator[None, None, int]:
    update, most_bytes = crc32c.update, crc32c.STEP_BYTES

    def is_present(kind: int, body: bytes) -> bool:
        """Whether a version up to the compact revision is that of its key as of `revision`."""
        key = key_and_revision(body)[0]
        return kind == PUT and not store.index.versions(key, compacted, revision, compacted, 1)

    crc = update(b"key", 0)
    for changes in history.changes():
        parts: Iterable[bytes] = chain.from_iterable(zip(*items_of(changes), strict=True))
        revisions = changes.revisions
        is_last = bool(revisions) and revisions[-1] > revision
        if is_last or (keeps_some and revisions and revisions[0] <= compacted):
            kept: list[bool] = []
            for at in range(0, len(revisions), STEP_ITEMS):
                some = (column[at : at + STEP_ITEMS] for column in changes)
                kept += [
                    mod <= revision
                    and (mod > compacted or not keeps_some or is_present(kind, body))
                    for mod, _, kind, body in zip(*some, strict=True)
                ]
                yield
            parts = compress(parts, chain.from_iterable(zip(kept, kept, strict=True)))
        data = b"".join(parts)
        for at in range(0, len(data), most_bytes):
            crc = update(data[at : at + most_bytes], crc)
            yield
        if is_last:
            break
        yield
    return crc
