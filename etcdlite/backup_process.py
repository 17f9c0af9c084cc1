"""Another process writes a large backup in etcd's format: `start` starts it, `main` runs in it.

Writing the file takes 3 us of processor time per record, three quarters of the work. In the loop
this would delay requests. A thread would not help, because it needs the interpreter all the time.
The loop scans the data, which needs the store, and passes on what the process writes.

The process is the same Python with the same modules. It inherits the open segments, which never
change, and a socket as its stdin and stdout:

    stdin   the values of `etcd_file.hand_over`, each written by `marshal`
    stdout  parts of the backup, each after its length, u32 little-endian. Length 0: the process
            failed, and the rest is the reason, in UTF-8.

A thread of the server writes to it and reads from it, at most `WAITING_PARTS` ahead of the client.
The thread kills the process when the client leaves; without a server it ends by itself. It takes 20
MiB of memory, and what `storage/history.py` says; where memory is short, the kernel ends it before
the server. The loop writes the backup if there can be no process, as where files are sealed (it has
no keys), or if it ends before the first part: modules of another version may be installed by then.
"""

from __future__ import annotations

import contextlib
import gc
import marshal
import os
import queue
import select
import signal
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import etcdlite
from etcdlite import log
from etcdlite.errors import UNAVAILABLE, EtcdError
from etcdlite.etcd_file import contents, take_over
from etcdlite.hardening import protect_process
from etcdlite.loading import start_thread
from etcdlite.storage.layout import DataDamaged

MIN_BYTES = 8 << 20
"""The loop writes a smaller backup itself: the process needs 0.1 s to start."""

PART_BYTES = 128 << 10
"""The process joins parts until they have this much."""

WAITING_PARTS = 2
"""The thread reads this many parts ahead of the client."""

MAX_PROCESSES = 4
"""Processes at once, including those of clients that have just left."""

_LENGTH = struct.Struct("<I")

_CAN_START = hasattr(os, "posix_spawn")  # Not on Android.
_running: set[BackupProcess] = set()


def start(image: Any, woken: Callable[[], None]) -> BackupProcess | None:
    """Start the process for an `EtcdImage`, which need not be prepared yet. None if the image is
    too small, or there can be no process. `woken`: called in a thread, see `BackupProcess.parts`.
    """
    fds = image.history.fds
    is_large = image.history.data_bytes >= MIN_BYTES
    if fds is None or not is_large or len(_running) >= MAX_PROCESSES or not _CAN_START:
        return None
    try:
        return BackupProcess(fds, woken)
    except OSError as failure:
        log.warn("cannot start a process that writes a backup", why=str(failure))
        return None


class BackupProcess:
    """The process, and the thread that talks to it."""

    def __init__(self, fds: list[int], woken: Callable[[], None]) -> None:
        """Raises OSError."""
        self._woken = woken
        self._input: queue.SimpleQueue[Iterator[Any]] = queue.SimpleQueue()
        self._parts: deque[bytes | Exception] = deque()
        self._room = threading.Semaphore(WAITING_PARTS)
        self._is_closed = False
        self._pid, self._sock = _spawn(fds)
        _running.add(self)
        if failure := start_thread("backup", self._run):
            self.close()
            self._end_process()
            raise OSError(str(failure))

    def parts(self, image: Any) -> Iterator[bytes | None]:
        """As `EtcdImage.parts`, of the same image, prepared. After None, there is a part once
        `woken` was called. Raises EtcdError, OSError, DataDamaged."""
        self._input.put(image.hand_over())
        left = image.size_bytes
        while True:
            if not self._parts:
                yield None
                continue
            part = self._parts.popleft()
            self._room.release()
            if isinstance(part, Exception):
                raise part
            if not part:
                break
            left -= len(part)
            yield part
        if left == image.size_bytes:
            log.warn("the process that writes a backup has ended; the server writes it")
            yield from image.parts()
        elif left:
            raise EtcdError(UNAVAILABLE, "etcdlite: the process that wrote the backup has ended")

    def close(self) -> None:
        """End the process soon."""
        self._is_closed = True
        self._input.put(iter(()))
        self._room.release()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()  # The descriptor is closed when the thread has closed its files.

    # In the thread.

    def _run(self) -> None:
        last: bytes | Exception = b""
        try:
            with self._sock.makefile("wb") as stdin, self._sock.makefile("rb") as stdout:
                for value in self._input.get():
                    marshal.dump(value, stdin)
                stdin.flush()
                while not self._is_closed and (head := stdout.read(_LENGTH.size)):
                    size = _LENGTH.unpack(head)[0]
                    part = stdout.read(size or -1)
                    if not size:
                        last = OSError(part.decode(errors="replace"))
                    if len(part) < size or not size:
                        break
                    self._room.acquire()
                    self._add(part)
        except (OSError, struct.error):
            pass  # It has ended. `parts` finds out what is missing.
        finally:
            self._end_process()
            self._add(last)

    def _end_process(self) -> None:
        with contextlib.suppress(OSError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        _running.discard(self)

    def _add(self, part: bytes | Exception) -> None:
        self._parts.append(part)
        self._woken()


def _spawn(fds: list[int]) -> tuple[int, socket.socket]:
    """Start the process. Returns its id, and the socket that it talks over. Raises OSError."""
    paths = [os.path.dirname(os.path.dirname(etcdlite.__file__)), *sys.path]
    code = (
        f"import sys; sys.path[:] = {paths!a}\n"
        f"from etcdlite.backup_process import main; main({etcdlite.__version__!a})"
    )
    executable = sys.executable or os.devnull  # Python may not know it.
    ours, theirs = socket.socketpair()
    try:
        for fd in fds:
            os.set_inheritable(fd, True)
        pid = os.posix_spawn(
            executable,
            [executable, "-S", "-c", code],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), fd) for fd in (0, 1)],
            setpgroup=0,  # Ctrl-C is for the server.
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
        for fd in fds:
            os.set_inheritable(fd, False)
    return pid, ours


def main(version: str) -> None:
    """Write the backup that stdin describes to stdout. `version`: that of the server."""
    if version != etcdlite.__version__:
        sys.exit(f"etcdlite {etcdlite.__version__} was installed; version {version} still runs")
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as adjustment:
        adjustment.write("1000")
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)  # Those of a service are for the server.
    gc.disable()
    protect_process()
    # Not that of `sys`: with PYTHONUNBUFFERED it may write a part of what it is given.
    out = open(1, "wb", closefd=False)  # noqa: SIM115
    try:
        _, made = contents(*take_over(partial(marshal.load, sys.stdin.buffer)))
        out.writelines(_joined(made, 0))
        out.flush()
    except (ConnectionError, EOFError):
        os._exit(1)  # The server, or its client, is gone.
    except (OSError, DataDamaged) as failure:
        out.write(_LENGTH.pack(0) + str(failure).encode())
        out.flush()


def _joined(made: Iterator[bytes], server: int) -> Iterator[bytes]:
    """Parts of at least `PART_BYTES`, but for the last one, each with its length. Raises EOFError
    if they take long and the server, at this descriptor, has ended."""
    waiting: list[bytes] = []
    size = 0
    for part in made:
        if not part and select.select([server], [], [], 0)[0]:
            raise EOFError
        waiting.append(part)
        size += len(part)
        if size >= PART_BYTES:
            yield b"".join((_LENGTH.pack(size), *waiting))
            waiting, size = [], 0
    if size:
        yield b"".join((_LENGTH.pack(size), *waiting))
