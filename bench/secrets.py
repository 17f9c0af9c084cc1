"""What a shared secret costs: the channel by itself, and puts into three members with and without.

    python -m bench.secrets             prints both tables; takes about two minutes

The members, the load and the disk share the machine. CPU per put is that of all members together;
it is steadier than the rates when other programs run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

from bench.cluster import leader_of, started
from bench.native_load import Cycle, run
from etcdlite import secret, secret_file
from etcdlite.secret_file import Secret

FRAME_BYTES = (100, 1_000, 4_000, 16_000, 65_519)

LOADS = (
    # (what, value bytes, in flight, connections, requests)
    ("256 B, 1 in flight", 256, 1, 1, 1_500),
    ("256 B, 1000 in flight", 256, 1000, 4, 60_000),
    ("16 KiB, 64 in flight", 16 << 10, 64, 4, 4_000),
)


def channel_rows() -> list[tuple[int, float, float]]:
    """(bytes, µs to seal, µs to open) of one frame."""
    shared = (Secret(os.urandom(32)),)
    initiator = secret.InitiatorChannel(shared, secret.PEER)
    responder = secret.ResponderChannel(shared, secret.PEER)
    responder.receive(initiator.output())
    initiator.receive(responder.output())
    rows = []
    for size in FRAME_BYTES:
        plaintext = bytes(size)
        count = max(500, min(20_000, 50_000_000 // size))
        began = time.perf_counter()
        frames = [initiator.seal(plaintext) for _ in range(count)]
        sealed = time.perf_counter()
        for frame in frames:
            responder.receive(frame)
        opened = time.perf_counter()
        rows.append((size, (sealed - began) / count * 1e6, (opened - sealed) / count * 1e6))
    return rows


def handshake_us() -> float:
    """CPU time of both sides together."""
    shared = (Secret(os.urandom(32)),)
    count = 300
    began = time.process_time()
    for _ in range(count):
        initiator = secret.InitiatorChannel(shared, secret.PEER)
        responder = secret.ResponderChannel(shared, secret.PEER)
        responder.receive(initiator.output())
        initiator.receive(responder.output())
    return (time.process_time() - began) / count * 1e6


def measure(folder: str, flags: list[str], scale: float) -> dict[str, dict[str, float]]:
    """One round: the figures of each load."""
    found = {}
    with started("etcdlite", folder, flags) as members:
        port = leader_of(members).port
        for what, value_bytes, in_flight, connections, requests in LOADS:
            requests = int(requests * scale)
            cycle = Cycle("KV.Put", max(2 * in_flight * connections, 1000), value_bytes)
            options = {"keys": cycle.keys, "cycle": cycle, "value_bytes": value_bytes}
            options |= {"in_flight": in_flight, "connections": connections}
            run(port, "KV.Put", requests=requests // 10 + 1, **options)
            before = sum(member.cpu_s() for member in members)
            result = run(port, "KV.Put", requests=requests, **options)
            cpu_s = sum(member.cpu_s() for member in members) - before
            found[what] = {
                "puts/s": result.per_second,
                "p50 ms": result.p50_us / 1000,
                "p99 ms": result.p99_us / 1000,
                "CPU µs": cpu_s / requests * 1e6,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a shared secret costs.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    print(f"handshake, both sides: {handshake_us():.0f} µs CPU\n")
    print("| bytes in a frame | seal | open | MB/s |\n|---|---|---|---|")
    for size, seal_us, open_us in channel_rows():
        print(f"| {size:,} | {seal_us:.1f} µs | {open_us:.1f} µs | {size / seal_us:.0f} |")
    with tempfile.TemporaryDirectory(prefix="etcdlite-bench-") as folder:
        path = os.path.join(folder, "secret")
        secret_file.create(path)
        kinds = {"plain": [], "secret": [f"--peer-secret-file={path}"]}
        rounds: dict[str, list[dict[str, dict[str, float]]]] = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind, flags in kinds.items():
                rounds[kind].append(measure(folder, flags, options.scale))
    print("\n| puts through the leader | between members | puts/s | p50 | p99 | CPU per put |")
    print("|---|---|---|---|---|---|")
    for what, *_ in LOADS:
        for kind, figures in rounds.items():
            cells = {
                name: statistics.median(one[what][name] for one in figures)
                for name in figures[0][what]
            }
            print(
                f"| {what} | {kind} | {cells['puts/s']:,.0f} | {cells['p50 ms']:.2f} ms | "
                f"{cells['p99 ms']:.2f} ms | {cells['CPU µs']:.0f} µs |"
            )


if __name__ == "__main__":
    main()
