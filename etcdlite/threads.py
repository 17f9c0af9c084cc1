"""The threads for calls that block in the kernel: one for the log, one for the data.

Each takes work in order and reports what it has done through a callback, which must be safe to call
from any thread. An exception is reported in the same way, and ends the thread: after a failed sync
it is not known what the disk holds, so the process must end (`DiskFailed`).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from etcdlite.metrics import Metrics
from etcdlite.wal import WAL, Save


class DiskFailed(Exception):
    """A thread could not write or sync: what the disk holds is not known any more."""


class LogThread:
    """Saves to the write-ahead log, in order, grouping what waits."""

    def __init__(self, wal: WAL, metrics: Metrics, done: Callable[[Any], None]) -> None:
        self._wal = wal
        self._metrics = metrics
        self._done = done
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="etcdlite-log", daemon=True)
        self._thread.start()

    def save(self, saves: list[Save]) -> None:
        self._queue.put(saves)

    def release(self, index: int, term: int, begin: int) -> None:
        """A checkpoint covers the log up to `index`; entries up to `begin` can go."""
        self._queue.put((index, term, begin))

    def stop(self) -> None:
        """Finish what was handed over, close the log."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                items = [self._queue.get()]
                while not self._queue.empty():
                    items.append(self._queue.get())
                stop = items[-1] is None
                self._save([save for item in items if isinstance(item, list) for save in item])
                for item in items:
                    if isinstance(item, tuple):
                        self._wal.cover(*item)
                if stop:
                    self._wal.close()
                    return
        except BaseException as failure:
            self._done(failure)

    def _save(self, saves: list[Save]) -> None:
        if not saves:
            return
        began = time.perf_counter()
        self._wal.save_all(saves)
        took_s = time.perf_counter() - began
        size = sum(len(entry.data) for save in saves for entry in save.entries)
        self._metrics.log_synced(took_s, size)
        self._done(saves)


class DiskThread:
    """Runs tasks that wait for the disk."""

    def __init__(self, metrics: Metrics, done: Callable[[Any], None]) -> None:
        self._metrics = metrics
        self._done = done
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="etcdlite-disk", daemon=True)
        self._thread.start()

    def run(self, task: Callable[[], None]) -> None:
        self._queue.put(task)

    def stop(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (task := self._queue.get()) is not None:
                began = time.perf_counter()
                task()
                self._metrics.data_sync_s.observe(time.perf_counter() - began)
                self._done(None)
        except BaseException as failure:
            self._done(failure)
