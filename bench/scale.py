"""A store of a million keys: memory, restart, ranges, and puts during maintenance.

One round, the same for both servers:

1. Load the keys (32-byte keys, 256-byte values), 1,000 puts in flight, fsync on.
2. Idle for `SETTLE_S`, then read VmRSS, RssAnon and RssFile. (etcd maps its file: its RssFile is
   page cache that it shares with the kernel. Both figures are shown.)
3. SIGKILL, start again, and time from the start of the process until the first successful
   linearizable read. The page cache is warm.
4. Time ranges and counts, one request at a time.
5. Overwrite every third key. Then one client puts, one at a time, while the store is compacted at
   its latest revision and then defragmented: latencies of the puts in each phase.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from typing import Any

from bench import native_load
from bench.clients import CallFailed, Connection, call, connect, pipeline, timed_call
from bench.native_load import key_of, value_of
from bench.servers import Server
from etcdlite import proto

SETTLE_S = 5.0
QUIET_S = 5.0
ETCD_CONNECTIONS = 20
"""Over which the 1,000 puts in flight are spread: etcd is fastest so (see `throughput.SPLITS`)."""

PREFIX = b"/bench/"
SMALL_PREFIX = b"/bench/123/"
"""A thousandth of the keys."""


def _end_of(prefix: bytes) -> bytes:
    return prefix[:-1] + bytes([prefix[-1] + 1])


def load(server: Server, numbers: range) -> None:
    """Put the keys with these numbers, 1,000 in flight."""
    if server.name == "etcdlite" and numbers.step == 1:
        native_load.run(server.port, "KV.Put", requests=len(numbers), keys=len(numbers))
        return
    count = ETCD_CONNECTIONS if server.name == "etcd" else 1
    connections = [connect(server.name, server.port) for _ in range(count)]
    bodies = (
        proto.PutRequest(key=key_of(number), value=value_of(number)).encode() for number in numbers
    )
    done = pipeline(connections, "KV.Put", bodies, 1000)
    assert done == len(numbers)
    for connection in connections:
        connection.close()


def seconds_until_first_read(server: Server, key: bytes) -> float:
    """Start a killed server; the time until a linearizable read of `key` has succeeded."""
    began = time.monotonic()
    server.start()
    while True:
        server.wait_until_listening()
        try:
            connection = connect(server.name, server.port)
            reply = call(connection, "KV.Range", proto.RangeRequest(key=key))
        except (CallFailed, OSError):
            time.sleep(0.005)
            continue
        took = time.monotonic() - began
        connection.close()
        assert reply.count == 1, "an acknowledged key is gone"
        return took


def _probe(server_name: str, port: int, keys: int, pipe: Pipe) -> None:
    """Put one key after the other until told to stop; sends back (began, latency) of each, in s."""
    connection = connect(server_name, port)
    samples = []
    number = 0
    while not pipe.poll():
        number = (number + 7919) % keys
        request = proto.PutRequest(key=key_of(number), value=value_of(number))
        began = time.monotonic()
        samples.append((began, timed_call(connection, "KV.Put", request)))
    connection.close()
    pipe.send(samples)


Spans = dict[str, tuple[float, float]]
"""Phase -> when it began and ended, by time.monotonic()."""

Samples = list[tuple[float, float]]
"""When each put was sent, by time.monotonic(), and how long it took, in s."""


def puts_during(
    server: Server, keys: int, phases: dict[str, Callable[[], Any]]
) -> tuple[Spans, Samples]:
    """Run the phases one after the other under one put at a time."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_probe, args=(server.name, server.port, keys, there))
    process.start()
    time.sleep(0.5)
    spans: Spans = {}
    for name, act in phases.items():
        began = time.monotonic()
        act()
        spans[name] = (began, time.monotonic())
        time.sleep(1.0)
    here.send(None)
    samples = here.recv()
    process.join()
    return spans, samples


def maintenance_phases(connection: Connection) -> dict[str, Callable[[], Any]]:
    """Nothing, a compaction at the latest revision, and a defragmentation."""
    revision = call(connection, "KV.Range", proto.RangeRequest(key=b"k")).header.revision
    compaction = proto.CompactionRequest(revision=revision, physical=True)
    defragmentation = proto.DefragmentRequest()
    return {
        "quiet": lambda: time.sleep(QUIET_S),
        "compaction": lambda: call(connection, "KV.Compact", compaction),
        "defragmentation": lambda: call(connection, "Maintenance.Defragment", defragmentation),
    }


def put_latencies_during(
    server: Server, keys: int, phases: dict[str, Callable[[], Any]]
) -> dict[str, float]:
    """For each phase: its duration, and p50, p99 and maximum of the puts that overlapped it, in
    ms."""
    spans, samples = puts_during(server, keys, phases)
    figures = {}
    for name, (began, ended) in spans.items():
        latencies = sorted(took for at, took in samples if at < ended and at + took > began)
        assert latencies, f"no put overlapped {name}"
        figures[f"{name}_s"] = ended - began
        figures[f"put_{name}_p50_ms"] = latencies[len(latencies) // 2] * 1e3
        figures[f"put_{name}_p99_ms"] = latencies[len(latencies) * 99 // 100] * 1e3
        figures[f"put_{name}_max_ms"] = latencies[-1] * 1e3
    return figures


def _latencies_ms(connection: Any, request: Any, times: int) -> list[float]:
    timed_call(connection, "KV.Range", request)
    return sorted(timed_call(connection, "KV.Range", request) * 1e3 for _ in range(times))


def measure(name: str, folder: str, keys: int) -> dict[str, float]:
    """One round with one server. MiB are 2**20 bytes."""
    figures: dict[str, float] = {}
    with Server(name, folder) as server:
        began = time.monotonic()
        load(server, range(keys))
        figures["load_s"] = time.monotonic() - began
        time.sleep(SETTLE_S)
        for field, kib in server.memory_kib().items():
            figures[f"loaded_{field}_mib"] = kib / 1024
        figures["loaded_disk_mib"] = server.disk_bytes() / 2**20

        server.kill()
        figures["restart_s"] = seconds_until_first_read(server, key_of(keys - 1))
        time.sleep(SETTLE_S)
        for field, kib in server.memory_kib().items():
            figures[f"restarted_{field}_mib"] = kib / 1024

        connection = connect(name, server.port)
        whole = proto.RangeRequest(key=PREFIX, range_end=_end_of(PREFIX), limit=500)
        reply = call(connection, "KV.Range", whole)
        assert len(reply.kvs) == 500 and reply.count == keys, (len(reply.kvs), reply.count)
        page = _latencies_ms(connection, whole, 50)
        figures["page_p50_ms"] = page[len(page) // 2]
        figures["page_max_ms"] = page[-1]
        for label, prefix in (("count_all", PREFIX), ("count_small", SMALL_PREFIX)):
            counting = proto.RangeRequest(key=prefix, range_end=_end_of(prefix), count_only=True)
            count = _latencies_ms(connection, counting, 50)
            figures[f"{label}_p50_ms"] = count[len(count) // 2]

        load(server, range(0, keys, 3))
        figures |= put_latencies_during(server, keys, maintenance_phases(connection))
        figures["defragmented_disk_mib"] = server.disk_bytes() / 2**20
        connection.close()
    return figures
