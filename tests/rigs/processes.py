"""etcdlite processes: `ServerProcess`, and `RawConnection` to talk to one by hand."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from etcdlite import frames, methods, proto
from etcdlite.client import Client
from etcdlite.frames import FRAME, FRAME_HEADER_BYTES, HANDSHAKE, MAGIC

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 60.0
"""How long a condition may take before the test fails: only a hang comes near it."""

SMALL_FILES = ("--checkpoint-bytes=16384", "--segment-bytes=16384", "--wal-segment-bytes=16384")
"""Flags that keep checkpoints, cleaning and log rotation busy with little data."""

_SERVING = re.compile(r"serving client traffic on ([^;,\s]*:\d+)")


def wait_until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """The condition's first true value; fails saying `what` did not happen."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"this did not happen in {patience_s:g} s: {what}"
        time.sleep(0.005)
    return value


def installed(folder: Path) -> Path:
    """The commands `etcdlite` and `etcdlite-ctl` in a folder, for this interpreter and source."""
    folder.mkdir(parents=True)
    for name in ("etcdlite", "etcdlite-ctl"):
        shutil.copy(ROOT / "packaging" / "launcher" / name, folder / name)
    # Not a link: through one, Python would not find the environment that it belongs to.
    run = f"PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)}"
    (folder / "python3").write_text(f'#!/bin/sh\n{run} "$@"\n')
    (folder / "python3").chmod(0o755)
    return folder


class ServerProcess:
    """One etcdlite process at a time over one data directory."""

    def __init__(self, data_dir: Path, flags: Sequence[str], program: Sequence[str]) -> None:
        self.data_dir = data_dir
        self.flags = list(flags)
        self.program = list(program)
        self.environ: dict[str, str] = {}
        """Set in the process's environment in addition."""
        self.lines: list[str] = []
        """Everything that the processes wrote to stderr."""
        self.process: subprocess.Popen[str] | None = None
        self.endpoint = ""
        self._reader: threading.Thread | None = None
        self._clients: list[Client] = []
        self._sockets: list[socket.socket] = []

    # Starting and stopping.

    def start(self, *flags: str, data_dir: Path | None = None) -> ServerProcess:
        """Run until it accepts connections."""
        self.spawn(*flags, data_dir=data_dir)
        wait_until(lambda: self.endpoint or not self.is_running, "the server serves")
        assert self.endpoint, f"the server did not start: {self.tail()}"
        with self.connect():
            pass
        return self

    def spawn(self, *flags: str, data_dir: Path | None = None) -> None:
        """Run, without waiting."""
        assert self.process is None or self.process.poll() is not None, "it runs already"
        if data_dir is not None:
            self.data_dir = data_dir
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("ETCD", "PYTHON"))}
        environ.update(self.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
        self.endpoint = ""
        arguments = [f"--data-dir={self.data_dir}", "--listen-client-urls=http://127.0.0.1:0"]
        arguments.append("--listen-peer-urls=http://127.0.0.1:0")
        self.process = subprocess.Popen(
            [*self.program, *arguments, *self.flags, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
            cwd=self.data_dir.parent,
        )
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.lines.append(line.rstrip("\n"))
            found = _SERVING.search(line)
            if found and process is self.process:
                self.endpoint = found[1]
        process.stderr.close()

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def signal(self, signum: int) -> None:
        assert self.process is not None
        self.process.send_signal(signum)

    def wait(self) -> int:
        """The exit status, when it has ended and all of its log is in `lines`."""
        assert self.process is not None and self._reader is not None
        try:
            status = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the server does not end: {self.tail()}")
        self._reader.join()
        return status

    def kill(self) -> None:
        """kill -9"""
        self.signal(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL, self.tail()

    def stop(self) -> None:
        """SIGTERM, which it must take well."""
        self.signal(signal.SIGTERM)
        assert self.wait() == 0, self.tail()

    def restart(self, *flags: str) -> None:
        self.stop()
        self.start(*flags)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for sock in self._sockets:
            sock.close()
        if self.is_running:
            self.signal(signal.SIGKILL)
            self.wait()

    # Looking at it.

    def tail(self, count: int = 15) -> str:
        return "\n".join(("its log ends with:", *self.lines[-count:]))

    def logged(self, text: str) -> str | None:
        """The first line of its log with `text` in it."""
        return next((line for line in self.lines if text in line), None)

    def wait_for_log(self, text: str, patience_s: float = PATIENCE_S) -> str:
        what = f"the server logs {text!r}; {self.tail()}"
        return wait_until(lambda: self.logged(text), what, patience_s)

    def logs_when(self, act: Callable[[], Any], text: str) -> str:
        """The line with `text`. `act` is repeated until there is one: the log omits lines that come
        too soon after another."""

        def find() -> str | None:
            act()
            with contextlib.suppress(AssertionError):
                return self.wait_for_log(text, 0.2)
            return None

        return wait_until(find, f"the server logs {text!r}; {self.tail()}")

    def status_field(self, name: str) -> int:
        """A number of /proc/PID/status; of memory, in KiB."""
        with open(f"/proc/{self.pid}/status") as file:
            return int(re.search(rf"^{name}:\s+(\d+)", file.read(), re.M)[1])

    @property
    def rss_bytes(self) -> int:
        return self.status_field("VmRSS") * 1024

    @property
    def peak_rss_bytes(self) -> int:
        """The most that VmRSS has ever been."""
        return self.status_field("VmHWM") * 1024

    def wait_until_idle(self) -> None:
        """Return when it has nothing more to do: it uses no processor time to speak of."""

        def is_idle() -> bool:
            before = self._processor_ticks()
            time.sleep(0.2)
            return self._processor_ticks() - before <= 2

        wait_until(is_idle, "the server has nothing more to do")

    def _processor_ticks(self) -> int:
        with open(f"/proc/{self.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    # Talking to it.

    def client(self, timeout_s: float = PATIENCE_S) -> Client:
        client = Client(self.endpoint, timeout_s=timeout_s, dial_timeout_s=PATIENCE_S)
        self._clients.append(client)
        return client

    def connect(self, *, buffer_bytes: int = 0) -> socket.socket:
        """A bare connection, with a small receive buffer if asked for."""
        host, port = self.endpoint.rsplit(":", 1)
        sock = socket.socket()
        if buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        sock.settimeout(PATIENCE_S)
        sock.connect((host, int(port)))
        self._sockets.append(sock)
        return sock

    def talk(self, **options: Any) -> RawConnection:
        """A connection whose handshake is done, for hand-made frames."""
        return RawConnection(self.connect(**options))


class RawConnection:
    """The native protocol by hand."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._data = b""
        sock.sendall(HANDSHAKE.pack(MAGIC, 1, 1))
        magic, version, _ = HANDSHAKE.unpack(self._take(HANDSHAKE.size))
        assert (magic, version) == (MAGIC, 1)
        request_id, method, _, body = self.receive()
        assert (request_id, method) == (0, frames.HELLO)
        self.hello = proto.Hello.decode(body)

    def send(self, request_id: int, name: str, message: Any, flags: int = frames.END) -> None:
        number = methods.METHOD_BY_NAME[name].number
        self.sock.sendall(frames.frame(request_id, number, flags, message.encode()))

    def receive(self) -> tuple[int, int, int, bytes]:
        """(request id, method, flags, body). Raises EOFError when the connection is closed."""
        length, request_id, method, flags = FRAME.unpack(self._take(FRAME_HEADER_BYTES))
        return request_id, method, flags, self._take(length - 6)

    def error(self) -> tuple[int, Any]:
        """(request id, Error) of the next frame, which must be an error."""
        request_id, _, flags, body = self.receive()
        assert flags == frames.END | frames.ERROR, (request_id, flags, body)
        return request_id, proto.Error.decode(body)

    def ping(self, request_id: int = 0xFFFF_0000) -> None:
        """Return when the server has answered a ping: the connection works."""
        self.sock.sendall(frames.frame(request_id, frames.PING, frames.END, b"here?"))
        assert self.receive() == (request_id, frames.PING, frames.END, b"here?")

    def is_closed(self) -> bool:
        """Whether the server has closed the connection, after what it may still say."""
        with contextlib.suppress(ConnectionError):
            while data := self.sock.recv(1 << 16):
                self._data += data
        return True

    def _take(self, size_bytes: int) -> bytes:
        while len(self._data) < size_bytes:
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError(f"the server closed the connection; not read yet: {self._data!r}")
            self._data += data
        taken, self._data = self._data[:size_bytes], self._data[size_bytes:]
        return taken


ServerFactory = Callable[..., ServerProcess]
