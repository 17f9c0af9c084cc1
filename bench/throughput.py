"""Requests per second with 1,000 in flight from one client process, and latency with one.

etcd is loaded by h2load over gRPC, etcdlite by `native_load.py` over its own protocol. What is
fair about that, and what is not:

- h2load is C and sends one body, so etcd is given the same key again and again, which is the
  easiest work for its index; etcdlite is given `KEYS` keys in turn.
- The split of the 1,000 requests into connections and streams matters to etcd, so several are
  tried first and the fastest is used. etcdlite gets one connection.
- h2load sees HTTP status codes only. That the puts were done is checked by the revision, which
  must have grown by the number of requests.
- Each round starts the server on an empty directory; rounds alternate between the two.
"""

from __future__ import annotations

import statistics

from bench import native_load
from bench.clients import call, connect, timed_call
from bench.h2load import h2load, message
from bench.native_load import key_of, value_of
from bench.servers import Server
from etcdlite import proto

SPLITS = ((100, 10), (50, 20), (20, 50), (10, 100), (1, 1000))
"""Connections and streams for h2load; each makes 1,000 in flight."""

SPLIT_ROUNDS = 3

KEYS = 10_000
"""Over which etcdlite's load goes."""


def _revision(server: Server) -> int:
    connection = connect(server.name, server.port)
    revision: int = call(connection, "KV.Range", proto.RangeRequest(key=b"none")).header.revision
    connection.close()
    return revision


def put_with_h2load(server: Server, requests: int, split: tuple[int, int], folder: str) -> float:
    body = proto.PutRequest(key=key_of(0), value=value_of(0)).encode()
    before = _revision(server)
    rate = h2load(server, "KV.Put", message(body), requests, split, folder)
    if _revision(server) - before != requests:
        raise SystemExit("bench: h2load's puts were not all done")
    return rate


def range_with_h2load(server: Server, requests: int, split: tuple[int, int], folder: str) -> float:
    """Needs the key of `put_with_h2load`."""
    body = proto.RangeRequest(key=key_of(0)).encode()
    return h2load(server, "KV.Range", message(body), requests, split, folder)


def fastest_splits(folder: str, requests: int) -> dict[str, tuple[int, int]]:
    """The entry of SPLITS with which etcd is fastest at "put" and at "range", by the median."""
    rates: dict[str, dict[tuple[int, int], list[float]]] = {
        kind: {split: [] for split in SPLITS} for kind in ("put", "range")
    }
    with Server("etcd", folder) as server:
        put_with_h2load(server, requests, SPLITS[0], folder)
        for _ in range(SPLIT_ROUNDS):
            for split in SPLITS:
                rates["put"][split].append(put_with_h2load(server, requests, split, folder))
                rates["range"][split].append(range_with_h2load(server, requests, split, folder))
    return {
        kind: max(SPLITS, key=lambda split: statistics.median(found[split]))
        for kind, found in rates.items()
    }


def _put_latencies_us(server: Server, count: int) -> list[float]:
    connection = connect(server.name, server.port)
    latencies = [
        timed_call(
            connection, "KV.Put", proto.PutRequest(key=key_of(number), value=value_of(number))
        )
        * 1e6
        for number in range(count)
    ]
    connection.close()
    return sorted(latencies)


def measure(
    name: str, folder: str, splits: dict[str, tuple[int, int]], scale: float
) -> dict[str, float]:
    """One round with one server. `scale` 1.0 takes about ten seconds."""
    figures: dict[str, float] = {}
    with Server(name, folder) as server:
        if name == "etcd":
            puts, ranges = int(200_000 * scale), int(400_000 * scale)
            put_with_h2load(server, puts // 10, splits["put"], folder)
            cpu = server.cpu_s()
            figures["put_per_s"] = put_with_h2load(server, puts, splits["put"], folder)
            figures["put_cpu_us"] = (server.cpu_s() - cpu) / puts * 1e6
            cpu = server.cpu_s()
            figures["range_per_s"] = range_with_h2load(server, ranges, splits["range"], folder)
            figures["range_cpu_us"] = (server.cpu_s() - cpu) / ranges * 1e6
        else:
            puts, ranges = int(500_000 * scale), int(1_000_000 * scale)
            for kind, method_name, requests in (
                ("put", "KV.Put", puts),
                ("range", "KV.Range", ranges),
            ):
                cycle = native_load.Cycle(method_name, KEYS, native_load.VALUE_BYTES)
                if kind == "put":
                    # Every key exists before anything is measured.
                    native_load.run(server.port, "KV.Put", requests=KEYS, keys=KEYS, cycle=cycle)
                cpu = server.cpu_s()
                result = native_load.run(
                    server.port, method_name, requests=requests, keys=KEYS, cycle=cycle
                )
                figures[f"{kind}_cpu_us"] = (server.cpu_s() - cpu) / requests * 1e6
                figures[f"{kind}_per_s"] = result.per_second
                figures[f"{kind}_p50_us"] = result.p50_us
                figures[f"{kind}_p99_us"] = result.p99_us
                figures[f"{kind}_client_cpu_us"] = result.client_cpu_us
        latencies = _put_latencies_us(server, int(5000 * scale))
        figures["one_put_p50_us"] = latencies[len(latencies) // 2]
        figures["one_put_p99_us"] = latencies[len(latencies) * 99 // 100]
        figures["one_put_per_s"] = len(latencies) / sum(latencies) * 1e6
    return figures
