"""A backup of many keys beside a writer: its time, the memory of the server, and the worst put.

    python -m bench.backups [KEYS] [etcd | etcdlite | own]

etcdctl saves the backup of a server with KEYS keys of 128 bytes, while one client puts every 5 ms.
`etcdlite`, the default: etcdlite sends it in etcd's format. `own`: etcdlite-ctl saves one in
etcdlite's. `etcd`: etcd does. Beside each stands the same time without a backup. Run it on an idle
machine.

The file is written to memory, where the system has a place for that: written to the disk of the
server, its sync would hold up those of the log, whatever the server does.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from bench.clients import call, connect
from bench.scale import load
from bench.servers import Server, etcd_binary
from etcdlite import proto

KEYS = 1_000_000
PAUSE_S = 0.005
SETTLE_S = 5.0
IN_MEMORY = "/dev/shm"


@contextlib.contextmanager
def _writer(server: Server) -> Iterator[list[float]]:
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


def _told(times: list[float]) -> str:
    times = sorted(times)
    middle, high = times[len(times) // 2] * 1000, times[len(times) * 99 // 100] * 1000
    worst = times[-1] * 1000
    return f"puts p50 {middle:.1f}, p99 {high:.1f}, worst {worst:.1f} ms of {len(times)}"


def main() -> None:
    words = sys.argv[1:]
    keys = next((int(word) for word in words if word.isdigit()), KEYS)
    kind = next((word for word in words if not word.isdigit()), "etcdlite")
    name = "etcd" if kind == "etcd" else "etcdlite"
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory(dir=IN_MEMORY if os.path.isdir(IN_MEMORY) else None) as target,
        Server(name, folder) as server,
    ):
        load(server, range(keys))
        time.sleep(SETTLE_S)
        before = server.memory_kib()
        path = os.path.join(target, "backup.db")
        for attempt in ("first", "second"):
            with _writer(server) as beside:
                used_s, began = server.cpu_s(), time.monotonic()
                _save(server, kind, path)
                took_s, used_s = time.monotonic() - began, server.cpu_s() - used_s
            with _writer(server) as alone:
                time.sleep(max(1.0, min(took_s, 10.0)))
            after = server.memory_kib()
            print(
                f"{kind}, {keys} keys, {attempt} backup: {took_s:.1f} s "
                f"({used_s:.1f} s of the server's processor time), "
                f"{os.path.getsize(path) >> 20} MiB; {_told(beside)} (without: {_told(alone)}); "
                f"peak memory +{(after['VmHWM'] - before['VmRSS']) >> 10} MiB above "
                f"{before['VmRSS'] >> 10} MiB"
            )
            os.unlink(path)


if __name__ == "__main__":
    main()
