"""What tests on real processes share: `server`, a factory of etcdlite processes.

    running = server()                       # on a free port, in a folder of its own
    running.client().put("k", "v")
    running.kill(); running.start()          # the same folder and flags, on another port

A process that still runs at the end of the test is killed. Its log is printed then, so a failed
test shows it. `LoneMember` is the other way to run a server's code: in process, without sockets.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
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

from etcdlite import bootstrap, proto
from etcdlite.client import Client
from etcdlite.member import Member
from etcdlite.proto import FRAME, FRAME_HEADER_BYTES, HANDSHAKE, MAGIC
from etcdlite.raft import Config as RaftConfig
from etcdlite.raft import Raft
from etcdlite.storage.disk import Disk

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60.0
"""How long a condition may take before the test fails: only a hang comes near it."""

SMALL_FILES = ("--checkpoint-bytes=16384", "--segment-bytes=16384", "--wal-segment-bytes=16384")
"""Flags that keep checkpoints, cleaning and log rotation busy with little data."""

# A shell's background job ignores Ctrl-C, and so would the processes that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

_SERVING = re.compile(r"serving client traffic on ([^;,\s]*:\d+)")


def wait_until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """The condition's first true value; fails saying `what` did not happen."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"this did not happen in {patience_s:g} s: {what}"
        time.sleep(0.005)
    return value


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

    def wait_for_log(self, text: str) -> str:
        return wait_until(lambda: self.logged(text), f"the server logs {text!r}; {self.tail()}")

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
        assert (request_id, method) == (0, proto.HELLO)
        self.hello = proto.Hello.decode(body)

    def send(self, request_id: int, name: str, message: Any, flags: int = proto.END) -> None:
        number = proto.METHOD_BY_NAME[name].number
        self.sock.sendall(proto.frame(request_id, number, flags, message.encode()))

    def receive(self) -> tuple[int, int, int, bytes]:
        """(request id, method, flags, body). Raises EOFError when the connection is closed."""
        length, request_id, method, flags = FRAME.unpack(self._take(FRAME_HEADER_BYTES))
        return request_id, method, flags, self._take(length - 6)

    def error(self) -> tuple[int, Any]:
        """(request id, Error) of the next frame, which must be an error."""
        request_id, _, flags, body = self.receive()
        assert flags == proto.END | proto.ERROR, (request_id, flags, body)
        return request_id, proto.Error.decode(body)

    def ping(self, request_id: int = 0xFFFF_0000) -> None:
        """Return when the server has answered a ping: the connection works."""
        self.sock.sendall(proto.frame(request_id, proto.PING, proto.END, b"here?"))
        assert self.receive() == (request_id, proto.PING, proto.END, b"here?")

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


@pytest.fixture
def server(tmp_path: Path) -> Any:
    """Makes a started `ServerProcess`; positional arguments are flags.

    `data_dir` names its folder, `program` another way to run it, `start=False` leaves it stopped.
    """
    servers: list[ServerProcess] = []

    def make(
        *flags: str,
        data_dir: Path | None = None,
        program: Sequence[str] = (sys.executable, "-m", "etcdlite"),
        start: bool = True,
    ) -> ServerProcess:
        folder = tmp_path / f"server-{len(servers)}" if data_dir is None else data_dir
        one = ServerProcess(folder, flags, program)
        servers.append(one)
        return one.start() if start else one

    yield make
    for one in servers:
        one.close()
        print(f"--- log of the server in {one.data_dir}:", *one.lines, sep="\n")


class LoneMember:
    """A member alone in its cluster over a folder, driven by hand: what `server.py` does with
    threads and sockets, done at once and in order."""

    def __init__(
        self, path: Path, *, seed: int = 0, disk: Disk | None = None, **options: Any
    ) -> None:
        disk = Disk() if disk is None else disk
        directory = str(path)
        sizes = {"segment_bytes": 1 << 16, "wal_segment_bytes": 1 << 16}
        if not bootstrap.exists(disk, directory):
            identity = proto.Member(ID=7, name="lone")
            founding = bootstrap.Founding(8, 7, [identity])
            bootstrap.create(disk, directory, "", founding, **sizes)
        opened = bootstrap.open_member(
            disk, directory, "", min_ttl_s=2, sync_enabled=False, **sizes
        )
        rng = random.Random(seed)
        self.now = 0.0
        """The member's clock, in seconds; `tick` moves it."""
        raft = Raft(
            RaftConfig(id=7, election_ticks=10),
            rng,
            voters=[7],
            hard_state=opened.hard_state,
            snapshot_index=opened.log_index,
            snapshot_term=opened.log_term,
            entries=opened.entries,
            applied=opened.store.applied_index,
        )
        settings: dict[str, Any] = {
            "quota_bytes": 1 << 31,
            "max_request_bytes": 1_572_864,
            "max_txn_ops": 128,
            "request_timeout_s": 7.0,
            "election_timeout_s": 1.0,
            "progress_interval_s": 600.0,
            "warn_apply_s": 1e9,
            "warn_request_s": 1e9,
            "checkpoint_bytes": 1 << 16,
        }
        self.wal = opened.wal
        self.member = Member(
            member_id=7,
            cluster_id=8,
            store=opened.store,
            lessor=opened.lessor,
            raft=raft,
            clock=lambda: self.now,
            rng=rng,
            **{**settings, **options},
        )
        self.settle()

    def settle(self) -> None:
        """Turn until there is nothing left to do."""
        member = self.member
        while True:
            member.turn()
            saves = member.take_saves()
            self.wal.save_all(saves)
            member.persisted(saves)
            member.housekeep()
            task = member.take_task()
            if task is not None:
                task()
                member.finished()
            elif not (saves or member.has_work):
                return

    def tick(self, seconds: float = 0.1) -> None:
        self.now += seconds
        self.member.tick()
        self.settle()

    def close(self) -> None:
        self.member.housekeeping.close()
        self.wal.close()
