"""An expiry storm: many leases, each with a key, end within a second, beside a client that puts.

    python -m bench.leases [--leases 10000] [--rounds 3]

A watch sees the keys go. Rows: the time from the end of the leases to the last event (`late`), from
the first event to the last (`storm`), CPU and bytes written for each lease
(a few puts included), and the latency of one client that puts every 5 ms while the storm lasts.
The puts go over the native protocol to etcdlite, and over gRPC to etcd.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

from bench.backups import writer
from bench.clients import GrpcConnection, pipeline
from bench.servers import Server
from bench.watches import WatchConnection
from etcdlite import proto

TTL_S = 20
"""Of the first lease: long enough to grant all leases and to put their keys."""

CONNECTIONS = 10
IN_FLIGHT = 1000


def _fill(port: int, leases: int) -> float:
    """Grant the leases, and put a key for each. The later a lease is granted, the shorter its TTL:
    all end together. Returns when, by time.monotonic()."""
    connections = [GrpcConnection(port) for _ in range(CONNECTIONS)]
    numbers = range(1, leases + 1)
    ends = time.monotonic() + TTL_S
    grants = (
        proto.LeaseGrantRequest(ID=n, TTL=int(ends - time.monotonic())).encode() for n in numbers
    )
    pipeline(list(connections), "Lease.LeaseGrant", grants, IN_FLIGHT)
    puts = (proto.PutRequest(key=b"leased/%d" % n, value=b"v", lease=n).encode() for n in numbers)
    pipeline(list(connections), "KV.Put", puts, IN_FLIGHT)
    for connection in connections:
        connection.close()
    return ends


def measure(name: str, folder: str, leases: int) -> dict[str, float]:
    """One round for one server: figures by name."""
    with Server(name, folder) as server:
        ends = _fill(server.port, leases)
        watch = WatchConnection(server.port)
        watch.create([proto.WatchCreateRequest(key=b"leased/", range_end=b"leased0")])
        watch.wait(1, 0)
        with writer(server) as times:
            watch.wait(1, 1)
            began, puts = time.monotonic(), len(times)
            cpu_s, written_bytes = server.cpu_s(), server.written_bytes()
            watch.wait(1, leases)
            over, beside = time.monotonic(), sorted(times[puts:])
            cpu_s, written_bytes = server.cpu_s() - cpu_s, server.written_bytes() - written_bytes
        watch.close()
    return {
        "late, s": over - ends,
        "storm, s": over - began,
        "CPU for each lease, µs": cpu_s / leases * 1e6,
        "bytes for each lease": written_bytes / leases,
        "put, p50, ms": beside[len(beside) // 2] * 1e3,
        "put, p99, ms": beside[len(beside) * 99 // 100] * 1e3,
        "put, worst, ms": beside[-1] * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure an expiry storm, beside etcd.")
    parser.add_argument("--leases", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {"etcd": [], "etcdlite": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name, rounds in results.items():
                rounds.append(measure(name, folder, options.leases))
    print(f"| {options.leases:,} leases | {' | '.join(results)} |")
    print("|---" * (1 + len(results)) + "|")
    for row in results["etcd"][0]:
        cells = (statistics.median(one[row] for one in rounds) for rounds in results.values())
        print(f"| {row} | {' | '.join(f'{cell:,.4g}' for cell in cells)} |")


if __name__ == "__main__":
    main()
