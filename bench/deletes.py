"""A delete of many keys beside a reader and a writer: the worst answers, and the memory afterwards.

    python -m bench.deletes [KEYS] [etcd]

Keys are put, then one DeleteRange removes them all. Beside it one client gets a key of its own, one
lists ten of the keys that are deleted, with their count, and one puts; each sends a request every
5 ms. Then the store is compacted, and the memory of the process is compared with the one before.
Without `etcd`, the server is etcdlite. Run it on an idle machine.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from bench.clients import CallFailed, call, connect
from bench.scale import PREFIX, load
from bench.servers import Server
from etcdlite import proto

KEYS = 233_000
PAUSE_S = 0.005
QUIET_S = 1.0
"""The time that is measured before the delete and after it."""

SETTLE_S = 5.0
END = PREFIX[:-1] + bytes([PREFIX[-1] + 1])


def _repeat(server: Server, method: str, request: Any, is_over: Callable[[], bool]) -> list[float]:
    """The latencies of one client that sends this request again and again, in seconds; infinite
    if it fails."""
    connection = connect(server.name, server.port)
    times: list[float] = []
    while not is_over():
        began = time.monotonic()
        try:
            call(connection, method, request)
            times.append(time.monotonic() - began)
        except CallFailed as failure:
            print(f"{method} failed: {failure}", file=sys.stderr)
            times.append(float("inf"))
            break  # The connection would report the same error again.
        time.sleep(PAUSE_S)
    return times


def measure(server: Server) -> dict[str, list[float]]:
    """The latencies beside the delete; that of the delete itself is in "delete"."""
    is_over = threading.Event()
    requests: dict[str, tuple[str, Any]] = {
        "get": ("KV.Range", proto.RangeRequest(key=b"other")),
        "list 10 and count": ("KV.Range", proto.RangeRequest(key=PREFIX, range_end=END, limit=10)),
        "put": ("KV.Put", proto.PutRequest(key=b"other", value=b"v")),
    }
    times: dict[str, list[float]] = {}

    def run(name: str) -> None:
        times[name] = _repeat(server, *requests[name], is_over.is_set)

    threads = [threading.Thread(target=run, args=(name,)) for name in requests]
    for thread in threads:
        thread.start()
    time.sleep(QUIET_S)
    connection = connect(server.name, server.port)
    began = time.monotonic()
    call(connection, "KV.DeleteRange", proto.DeleteRangeRequest(key=PREFIX, range_end=END))
    times["delete"] = [time.monotonic() - began]
    time.sleep(QUIET_S)
    is_over.set()
    for thread in threads:
        thread.join()
    return times


def main() -> None:
    words = sys.argv[1:]
    name = "etcd" if "etcd" in words else "etcdlite"
    keys = next((int(word) for word in words if word.isdigit()), KEYS)
    with tempfile.TemporaryDirectory() as folder, Server(name, folder) as server:
        fresh = server.memory_kib()["VmRSS"] >> 10
        load(server, range(keys))
        loaded = server.memory_kib()["VmRSS"] >> 10
        times = measure(server)
        connection = connect(server.name, server.port)
        revision = call(
            connection, "KV.Put", proto.PutRequest(key=b"other", value=b"v")
        ).header.revision
        request = proto.CompactionRequest(revision=revision, physical=True)
        call(connection, "KV.Compact", request)
        time.sleep(SETTLE_S)
        print(f"{name}, {keys} keys: milliseconds")
        for what, found in times.items():
            print(f"  {what:20} worst {max(found) * 1000:8.1f}  answers {len(found)}")
        after = server.memory_kib()["VmRSS"] >> 10
        print(f"  MiB: fresh {fresh}, loaded {loaded}, deleted and compacted {after}")


if __name__ == "__main__":
    main()
