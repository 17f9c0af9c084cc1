"""When revisions were made, and by whom: what `--at TIME`, `history` and `diff` need.

While keys change, the leader proposes its time about once a second: a `Time`, which says that the
revision at that place of the log was the last one at that time. So a time is known to about a
second, and nothing is written while nothing changes. Each member keeps the records in a bucket;
snapshots and backups carry them.

While auth is enabled, another bucket has the user of each change, as runs: a record says who made a
revision and those after it, up to the next record.

Both are thinned out. Of the times, the last `RECENT` records are kept, before them one of each
minute up to `MINUTES` records, and before them one of each hour up to `HOURS`. Of the users, the
last `MAX_RUNS` runs are kept. What lies before the oldest revision that can be read goes with the
compaction.

Records, in two buckets of the data file:

    TIMES    revision, u64 big-endian    Unix time in seconds, u64 little-endian
    USERS    revision, u64 big-endian    "u" and the name of the user; "m": a member itself; empty:
                                         not known, because auth was not enabled

Invariant: revisions and times of TIMES ascend. If the time of a leader is before the last records,
these are dropped: its clock was set, or that of the leader before was wrong.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Generator, Iterator

from etcdlite import proto
from etcdlite.auth import Author
from etcdlite.mvcc import Store
from etcdlite.replica.cluster_version import ClusterVersion
from etcdlite.storage.layout import TIMES, U64, USERS
from etcdlite.versions import KEEPS_TIMES

RECENT = 512
MINUTES = 720
HOURS = 816
MAX_RUNS = 1_024

STEP_RECORDS = 256
"""Records that one step drops or sends."""


class Timeline:
    """The records, as applied."""

    def __init__(self, store: Store, cluster_version: ClusterVersion) -> None:
        self._cluster_version = cluster_version
        self.restore(store)

    def restore(self, store: Store) -> None:
        """Take the records of a store."""
        self._store = store
        times = store.buckets.get(TIMES, {})
        self._revisions = array("Q", sorted(int.from_bytes(key, "big") for key in times))
        self._times = array("Q", (U64.unpack(times[_key(rev)])[0] for rev in self._revisions))
        users = store.buckets.get(USERS, {})
        self._runs = array("Q", sorted(int.from_bytes(key, "big") for key in users))
        self._user = users[_key(self._runs[-1])] if self._runs else b""

    @property
    def last_revision(self) -> int:
        """The last revision whose time is known; 0 if there is none."""
        return self._revisions[-1] if self._revisions else 0

    @property
    def knows_user(self) -> bool:
        """Whether the records name who made the last change."""
        return self._user != b""

    # Changes.

    def time_steps(self, unix_s: int) -> Generator[None, None, None]:
        revision = self._store.revision
        if revision <= max(1, self.last_revision):
            return
        dropped = 0
        while self._times and self._times[-1] > unix_s:
            self._drop(len(self._times) - 1)
            dropped += 1
            if dropped % STEP_RECORDS == 0:
                yield
        self._revisions.append(revision)
        self._times.append(unix_s)
        self._store.set_bucket(TIMES, _key(revision), U64.pack(unix_s))
        self._thin_out()

    def _thin_out(self) -> None:
        """Called for each new record. So each of the three parts has at most one too many."""
        for newer, unit_s in ((RECENT, 60), (RECENT + MINUTES, 3600)):
            at = len(self._times) - newer - 1
            if at <= 0:
                return
            if self._times[at] // unit_s == self._times[at - 1] // unit_s:
                self._drop(at)
                return
        if len(self._times) > RECENT + MINUTES + HOURS:
            self._drop(0)

    def _drop(self, at: int) -> None:
        self._store.set_bucket(TIMES, _key(self._revisions[at]), None)
        del self._revisions[at], self._times[at]

    def note_user(self, revision: int, author: Author | None) -> None:
        """Record who made a revision: the author, or None while auth is not enabled."""
        if author is None:
            user = b""
        elif author.is_member:
            user = b"m"
        else:
            user = b"u" + author.name.encode()
        if user != self._user and self._cluster_version.allows(KEEPS_TIMES):
            self._begin_run(revision, user)

    def stop(self) -> None:
        """The cluster version does not allow records any more: of later changes it is not known who
        made them."""
        if self._user:
            self._begin_run(self._store.revision + 1, b"")

    def _begin_run(self, revision: int, user: bytes) -> None:
        self._user = user
        self._store.set_bucket(USERS, _key(revision), user)
        if self._runs and self._runs[-1] == revision:
            return  # `stop` began one, and no change followed.
        self._runs.append(revision)
        if len(self._runs) > MAX_RUNS:
            self._store.set_bucket(USERS, _key(self._runs.pop(0)), None)

    def compact_steps(self, compacted: int) -> Iterator[None]:
        """Drop what is about revisions before `compacted`."""
        # The last record before `compacted` stays: it holds for the revisions from there on.
        for bucket, revisions in ((TIMES, self._revisions), (USERS, self._runs)):
            while (gone := min(bisect_right(revisions, compacted) - 1, STEP_RECORDS)) > 0:
                for revision in revisions[:gone]:
                    self._store.set_bucket(bucket, _key(revision), None)
                del revisions[:gone]
                if bucket == TIMES:
                    del self._times[:gone]
                if gone == STEP_RECORDS:
                    yield

    # Reading.

    def answer_steps(self, header: bytes) -> Iterator[bytes]:
        """A `TimelineResponse`, piece by piece, with what is known when the first one is taken."""
        times = list(zip(self._revisions, self._times, strict=True))
        users = self._store.buckets.get(USERS, {})
        named = [(rev, users[_key(rev)]) for rev in self._runs]
        yield header
        for at in range(0, len(times), STEP_RECORDS):
            some = times[at : at + STEP_RECORDS]
            items = [proto.RevisionTime(revision=rev, unix_s=unix_s) for rev, unix_s in some]
            yield proto.TimelineResponse(times=items).encode()
        for at in range(0, len(named), STEP_RECORDS):
            runs = [
                proto.RevisionUser(revision=rev, user=user[1:].decode(), is_member=user == b"m")
                for rev, user in named[at : at + STEP_RECORDS]
            ]
            yield proto.TimelineResponse(users=runs).encode()


def _key(revision: int) -> bytes:
    return revision.to_bytes(8, "big")
