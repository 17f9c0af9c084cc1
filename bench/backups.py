"""A backup of many keys beside a writer: its time, the memory of the server, and the worst put.

    python -m bench.backups [KEYS] [--rounds N] [--shm] [etcd | etcdlite | own]...

etcdctl saves the backup of a server with KEYS keys of 256 bytes, while one client puts every 5 ms.
`etcdlite`, the default: etcdlite sends it in etcd's format. `own`: etcdlite-ctl saves one in
etcdlite's. `etcd`: etcd does. Several take turns, each with a server of its own. Beside each stands
the same time without a backup. The memory is that of the server and the process that it starts for
the backup. `--shm`: the data of the servers is in memory, too. Run it on an idle machine.

The file is written to memory, where the system has a place for that: written to the disk of the
server, its sync would hold up those of the log, whatever the server does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.clients import call, connect
from bench.scale import load
from bench.servers import Server, etcd_binary
from etcdlite import proto

KEYS = 1_000_000
PAUSE_S = 0.005
SETTLE_S = 5.0
WATCH_S = 0.02
IN_MEMORY = "/dev/shm"


@contextlib.contextmanager
def writer(server: Server) -> Iterator[list[float]]:
    """The latencies in seconds of a client that puts every 5 ms."""
    times: list[float] = []
    is_over = threading.Event()
    request = proto.PutRequest(key=b"other", value=b"v" * 100)

    def write() -> None:
        connection = connect(server.name, server.port)
        while not is_over.is_set():
            began = time.monotonic()
            call(connection, "KV.Put", request)
            times.append(time.monotonic() - began)
            time.sleep(PAUSE_S)

    thread = threading.Thread(target=write)
    thread.start()
    yield times
    is_over.set()
    thread.join()


def _save(server: Server, kind: str, path: str) -> None:
    if kind == "own":
        command = [sys.executable, "-m", "etcdlite.ctl"]
    else:
        command = [os.path.join(os.path.dirname(etcd_binary()), "etcdctl")]
    endpoint = f"--endpoints=127.0.0.1:{server.port}"
    subprocess.run([*command, endpoint, "snapshot", "save", path], check=True, capture_output=True)


def _resident_kib(server: Server) -> int:
    """The memory of the server and of the processes that it has started."""
    assert server.process is not None
    total = server.memory_kib()["VmRSS"]
    with contextlib.suppress(OSError):  # A thread or a process that has just ended.
        own = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
        for path in Path(f"/proc/{server.process.pid}/task").glob("*/children"):
            for child in path.read_text().split():
                if Path(f"/proc/{child}/cmdline").read_bytes() == own:
                    continue  # It has not begun its program, and shares all memory until then.
                status = Path(f"/proc/{child}/status").read_text()
                if "VmRSS:" in status:  # It has not just ended.
                    total += int(status.partition("VmRSS:")[2].split()[0])
    return total


@contextlib.contextmanager
def _peak(server: Server) -> Iterator[list[int]]:
    """The memory of the server, in KiB: at the beginning, and the most that was seen since."""
    found = [_resident_kib(server)] * 2
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(WATCH_S):
            found[1] = max(found[1], _resident_kib(server))

    thread = threading.Thread(target=watch)
    thread.start()
    yield found
    is_over.set()
    thread.join()


def _told(times: list[float]) -> str:
    times = sorted(times)
    middle, high = times[len(times) // 2] * 1000, times[len(times) * 99 // 100] * 1000
    worst = times[-1] * 1000
    return f"puts p50 {middle:.1f}, p99 {high:.1f}, worst {worst:.1f} ms of {len(times)}"


def _round(server: Server, kind: str, keys: int, path: str) -> None:
    with _peak(server) as memory, writer(server) as beside:
        used_s, began = server.cpu_s(), time.monotonic()
        _save(server, kind, path)
        took_s, used_s = time.monotonic() - began, server.cpu_s() - used_s
    with writer(server) as alone:
        time.sleep(max(1.0, min(took_s, 10.0)))
    print(
        f"{kind}, {keys} keys: {took_s:.2f} s ({used_s:.1f} s of the server's processor time), "
        f"{os.path.getsize(path) >> 20} MiB; {_told(beside)} (without: {_told(alone)}); "
        f"memory {memory[0] >> 10} MiB, at most {(memory[1] - memory[0]) >> 10} more",
        flush=True,
    )
    os.unlink(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shm", action="store_true")
    options = parser.parse_intermixed_args()
    keys = next((int(word) for word in options.words if word.isdigit()), KEYS)
    kinds = [word for word in options.words if not word.isdigit()] or ["etcdlite"]
    memory = IN_MEMORY if os.path.isdir(IN_MEMORY) else None
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(tempfile.TemporaryDirectory(dir=memory))
        servers = []
        for kind in kinds:
            place = tempfile.TemporaryDirectory(dir=memory if options.shm else None)
            name = "etcd" if kind == "etcd" else "etcdlite"
            server = stack.enter_context(Server(name, stack.enter_context(place)))
            load(server, range(keys))
            servers.append(server)
        time.sleep(SETTLE_S)
        for _ in range(options.rounds):
            for kind, server in zip(kinds, servers, strict=True):
                _round(server, kind, keys, os.path.join(target, "backup.db"))


if __name__ == "__main__":
    main()
