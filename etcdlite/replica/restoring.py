"""Replacing the data of this member by a snapshot from the leader, which is on disk already."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from etcdlite import datadir
from etcdlite.lease import Lessor
from etcdlite.loading import RunTask
from etcdlite.mvcc import Store
from etcdlite.raft import Snapshot
from etcdlite.replica.state import State


class Restoring:
    """The snapshots that are about to replace the data."""

    def __init__(
        self, state: State, run_task: RunTask, restored: Callable[[Snapshot, Store], None]
    ) -> None:
        """`restored` is called with the store of the snapshot, which replaces the old one."""
        self._state = state
        self._run_task = run_task
        self._restored = restored
        self._store: Store | None = None
        self.waiting: deque[Snapshot] = deque()
        """Snapshots that the log is marked with: they will replace the data."""
        self.is_under_way = False

    def drop_unless_needed(self, index: int) -> None:
        """The snapshot at `index` was received; remove its files if it came late or was refused."""
        if index not in [snapshot.index for snapshot in self.waiting]:
            store = self._state.store
            drop = partial(datadir.drop_snapshot, store.disk, store.directory, index)
            self._run_task(drop, lambda: None)

    def begin(self) -> None:
        """Open the next one. Nothing may be applied or maintained until it is restored."""
        self.is_under_way = True
        old = self._state.store
        snapshot = self.waiting[0]

        def task() -> None:
            datadir.install_snapshot(old.disk, old.directory, snapshot.index)
            lessor = Lessor(old.lessor.min_ttl_s, old.limits)
            segment_bytes = old.data.segment_bytes
            self._store = Store.open(old.disk, old.directory, lessor, segment_bytes, old.limits)

        self._run_task(task, self._opened)

    def _opened(self) -> None:
        snapshot, store = self.waiting.popleft(), self._store
        assert store is not None
        assert store.applied_index == snapshot.index, "the snapshot is not what it was offered as"
        self._store = None
        self.is_under_way = False
        self._restored(snapshot, store)
