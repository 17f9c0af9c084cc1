"""The threads, for what would hold up the loop: calls that block in the kernel, and passwords.

    log     appends to the write-ahead log and syncs it. While it syncs, the loop gathers the next
            batch, and the thread takes all of it at once: group commit without a timer. While the
            loop has nothing else to do, it saves a few small writes itself, if syncs are quick: to
            wake the thread and to be woken by it costs as much CPU as the rest of a put.
    disk    runs checkpoint, cleaning and snapshot tasks, one at a time.
    dial    connects to another member; one thread for each attempt.
    login   computes the hash of a password; one thread for each, at a low priority.

Each reports its results through a callback, `done`, which must be safe to call from any thread. The
log thread and the disk thread report an exception in the same way and end. The process must then
end, too (`DiskFailed`): after a failed sync it is not known what the disk holds.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from etcdlite.channel import Channel, Dialing, shake_hands
from etcdlite.loading import start_thread
from etcdlite.metrics import Metrics
from etcdlite.peer import Dial
from etcdlite.raft import Ready
from etcdlite.replica.logins import Job
from etcdlite.urls import format_address, host_port
from etcdlite.wal import WAL

DIAL_TIMEOUT_S = 1.0
SHORT_DIAL_TIMEOUT_S = 0.3
"""The time limits for a connection to another member. While a network is cut the packet that opens
a connection is lost, and the kernel repeats it only after a second; so every other attempt is
short, and one follows soon after the network is whole again."""

SHAKE_TIMEOUT_S = 5.0
"""The time limit for the TLS handshake with another member."""


class DiskFailed(Exception):
    """The log thread or the disk thread failed: the content of the disk is unknown. The failure
    itself is the `__cause__`."""


QUICK_SYNC_S = 0.001
"""While syncs take less than this on average, the caller saves by itself (`save_now`)."""

LONGEST_SYNC_S = 0.005
"""The same for a member without others, while no client asks for something during a sync. With
others, a long sync would hold up the heartbeats, too."""

ALONE_AGAIN_S = 1.0
"""A member without others: after a client asked for something during a sync that was not quick, the
thread saves for this long."""

SLOW_SYNC_S = 0.02
SLOW_SYNC_PAUSE = 25
"""After a sync that took longer than `SLOW_SYNC_S`, the thread saves for this multiple of its time.
So slow syncs block the caller for at most 4 % of the time. In a member without others this holds
only if a client asked for something during the sync."""

FEW_BYTES = 64 << 10
"""The caller does not save more than this by itself, nor what begins a segment of the log."""


class LogThread:
    """Appends to the write-ahead log, in order. What waits is written and synced as one group."""

    def __init__(self, wal: WAL, metrics: Metrics, done: Callable[[Any], None]) -> None:
        self._wal = wal
        self._metrics = metrics
        self._done = done
        self._given = 0
        self._finished = 0
        """Items put into the queue, and finished by the thread. Equal: the thread waits."""
        self._untaken = 0
        """Saves that the thread was given, and whose results the caller has not taken yet."""
        self._sync_s = QUICK_SYNC_S / 2
        """What a sync takes, as a moving average."""
        self._slow_until = 0.0
        self._asked_until = 0.0
        """Until then the thread saves, because a sync was slow, or a client asked during one."""
        self.is_alone = False
        """The member has no peers, so during a sync only clients can send something."""
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="etcdlite-log", daemon=True)
        self._thread.start()

    def save(self, saves: list[Ready]) -> None:
        """Save in the thread, which calls `done` with all that it saved at once."""
        self._untaken += len(saves)
        self._put(saves)

    def taken(self, saves: list[Ready]) -> None:
        """The caller has the result of these saves, which `done` was called with."""
        self._untaken -= len(saves)

    def is_quick(self, saves: list[Ready]) -> bool:
        """Whether `save_now` may be called, and is expected to be quick."""
        if self._untaken or self._given != self._finished:
            return False  # Results must be taken in the order of the saves.
        now = time.perf_counter()
        if now < self._slow_until:
            return False
        if self._sync_s > QUICK_SYNC_S and (
            not self.is_alone or self._sync_s > LONGEST_SYNC_S or now < self._asked_until
        ):
            return False
        size_bytes, last = 0, -1
        for save in saves:
            if save.snapshot is not None or (save.entries and save.entries[0].index <= last):
                return False  # Several frames: if a later one has no space, the first is repeated.
            for entry in save.entries:
                size_bytes, last = size_bytes + len(entry.data), entry.index
        return size_bytes < FEW_BYTES and self._wal.has_room(2 * size_bytes + FEW_BYTES)

    def save_now(self, saves: list[Ready]) -> float | None:
        """Save in the thread of the caller, and return the seconds that it took, or None: there is
        no space now, so `save` must wait for it. Only if `is_quick`. Raises DiskFailed."""
        try:
            return self._append(saves)
        except Exception as failure:
            if isinstance(failure, OSError) and not self._wal.failed:
                return None
            raise DiskFailed(str(failure)) from failure

    def record_request(self, took_s: float) -> None:
        """A client asked for something during `save_now`, which took this long."""
        now = time.perf_counter()
        self._asked_until = now + ALONE_AGAIN_S
        if took_s > SLOW_SYNC_S:
            self._slow_until = now + SLOW_SYNC_PAUSE * took_s

    def release(self, index: int, term: int, begin: int) -> None:
        """A checkpoint covers the log up to `index`; delete entries up to `begin`."""
        self._put((index, term, begin))

    def stop(self) -> None:
        """Finish all work, close the log, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _put(self, item: Any) -> None:
        self._given += 1
        self._queue.put(item)

    def _run(self) -> None:
        try:
            while True:
                items = [self._queue.get()]
                while not self._queue.empty():
                    items.append(self._queue.get())
                stop = items[-1] is None
                saves = [save for item in items if isinstance(item, list) for save in item]
                if saves:
                    self._append(saves)
                covers = [item for item in items if isinstance(item, tuple)]
                if not covers:
                    # First, because the loop may save by itself as soon as it has the result.
                    self._finished += len(items)
                if saves:
                    self._done(saves)
                for cover in covers:
                    self._wal.cover(*cover)
                if covers:
                    self._finished += len(items)
                if stop:
                    self._wal.close()
                    return
        except BaseException as failure:
            self._done(failure)

    def _append(self, saves: list[Ready]) -> float:
        wal = self._wal
        written_s = wal.write_s
        began = time.perf_counter()
        wal.save_all(saves)
        now = time.perf_counter()
        took_s = now - began
        if took_s < 2 * LONGEST_SYNC_S:
            self._sync_s += (took_s - self._sync_s) / 16
        else:
            # Limited, so that one slow sync does not count for many quick ones.
            self._sync_s += (2 * LONGEST_SYNC_S - self._sync_s) / 16
            if took_s > SLOW_SYNC_S and not self.is_alone:
                self._slow_until = now + SLOW_SYNC_PAUSE * took_s
        self._metrics.log_synced(took_s, wal.write_s - written_s, wal.written_bytes)
        return took_s


class DiskThread:
    """Runs tasks that wait for the disk, one at a time, and reports None after each."""

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


LOGIN_NICENESS = 10
"""Added to that of the process: the loop comes first, however many clients try passwords."""


def start_login(job: Job, done: Callable[[Any], None]) -> None:
    """Run a job of `Logins` in a thread of its own, which reports it."""
    if failure := start_thread("login", lambda: _login(job, done)):
        job.fail(failure)
        done(job)


def _login(job: Job, done: Callable[[Any], None]) -> None:
    if sys.platform == "linux":  # Elsewhere it would change the whole process.
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(
                os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + LOGIN_NICENESS
            )
    job.run()
    done(job)


class Dialed(NamedTuple):
    """The result of an attempt to connect to another member."""

    dial: Dial
    peer: str
    result: socket.socket | OSError
    channel: Channel | None = None
    """None: the connection is plain. If `steps_are_long`, its handshake is complete."""
    plaintext: bytes = b""
    """What came with the end of the handshake."""


def start_dial(dial: Dial, url: str, dialing: Dialing, done: Callable[[Any], None]) -> None:
    """Connect to another member in a thread of its own, which reports a `Dialed`."""
    if failure := start_thread("dial", lambda: done(_dial(dial, url, dialing))):
        done(Dialed(dial, url, OSError(str(failure))))


def _dial(dial: Dial, url: str, dialing: Dialing) -> Dialed:
    host, port = host_port(url)
    timeout_s = SHORT_DIAL_TIMEOUT_S if dial.link.failures % 2 else DIAL_TIMEOUT_S
    peer = format_address(host, port)
    sock = None
    try:
        sock = socket.create_connection((host, port), timeout_s)
        channel, plaintext = dialing(url, dial.link.node), b""
        if channel is not None and channel.steps_are_long:
            plaintext = shake_hands(sock, channel, time.monotonic() + SHAKE_TIMEOUT_S)
        return Dialed(dial, peer, sock, channel, plaintext)
    except OSError as failure:
        why = failure.with_traceback(None)
    except Exception as failure:
        # Whatever went wrong is reported: otherwise this member would not be dialed again. A
        # UnicodeError comes from a URL without a valid host name, which any member can publish.
        why = OSError(str(failure) or repr(failure))
    if sock is not None:
        sock.close()
    return Dialed(dial, peer, why)
