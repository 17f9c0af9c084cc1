"""Measures etcdlite beside etcd in one run and prints Markdown tables.

    python -m bench.run                              everything, about a quarter of an hour
    python -m bench.run --quick                      100,000 keys, fewer and shorter rounds
    python -m bench.run --write docs/performance.md  put the tables into that page too

Rounds alternate between the two servers, so that what the machine does besides hits both. A figure
is the median of its rounds, with the lowest and highest beside it; a ratio is the median of the
ratios of neighbouring rounds.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import cluster, grpc, scale, throughput
from bench.page import write_sections
from bench.servers import etcd_binary

ROOT = Path(__file__).resolve().parent.parent

Rounds = dict[str, list[dict[str, float]]]
"""Server name -> figures of each round."""

SERVERS = ("etcd", "etcdlite")

THROUGHPUT_ROWS = {
    "put_per_s": "puts/s, 1,000 in flight",
    "put_cpu_us": "server CPU per put, µs",
    "range_per_s": "ranges/s (one key, linearizable), 1,000 in flight",
    "range_cpu_us": "server CPU per range, µs",
    "put_p50_us": "put latency at 1,000 in flight, p50, µs",
    "put_p99_us": "put latency at 1,000 in flight, p99, µs",
    "range_p50_us": "range latency at 1,000 in flight, p50, µs",
    "range_p99_us": "range latency at 1,000 in flight, p99, µs",
    "put_client_cpu_us": "load generator's CPU per put, µs",
    "range_client_cpu_us": "load generator's CPU per range, µs",
    "one_put_per_s": "puts/s, one in flight",
    "one_put_p50_us": "put latency, one in flight, p50, µs",
    "one_put_p99_us": "put latency, one in flight, p99, µs",
}

SCALE_ROWS = {
    "load_s": "load, 1,000 puts in flight, s",
    "loaded_VmRSS_mib": "RSS after the load, MiB",
    "loaded_RssAnon_mib": "of it anonymous, MiB",
    "loaded_RssFile_mib": "of it mapped files, MiB",
    "loaded_disk_mib": "data directory after the load, MiB",
    "restart_s": "kill -9, start, first linearizable read, s",
    "restarted_VmRSS_mib": "RSS after the restart, MiB",
    "restarted_RssAnon_mib": "of it anonymous, MiB",
    "restarted_RssFile_mib": "of it mapped files, MiB",
    "page_p50_ms": "`get --prefix --limit 500`, all keys have the prefix, p50, ms",
    "page_max_ms": "the same, worst of 50, ms",
    "count_all_p50_ms": "count of a prefix that all keys have, p50, ms",
    "count_small_p50_ms": "count of a prefix that 1/1000 of the keys have, p50, ms",
    "put_quiet_p50_ms": "put, nothing else going on, p50, ms",
    "put_quiet_p99_ms": "p99, ms",
    "put_quiet_max_ms": "worst, ms",
    "put_compaction_p50_ms": "put during compaction, p50, ms",
    "put_compaction_p99_ms": "p99, ms",
    "put_compaction_max_ms": "worst, ms",
    "compaction_s": "the compaction took, s",
    "put_defragmentation_p50_ms": "put during defragmentation, p50, ms",
    "put_defragmentation_p99_ms": "p99, ms",
    "put_defragmentation_max_ms": "worst, ms",
    "defragmentation_s": "the defragmentation took, s",
    "defragmented_disk_mib": "data directory after it, MiB",
}


GRPC_ROWS = {
    "put_per_s": "puts/s, 100 connections x 10 streams",
    "put_cpu_us": "server CPU per put, µs",
    "put_p99_us": "p99, µs",
    "range_per_s": "ranges/s (one key, linearizable)",
    "range_cpu_us": "server CPU per range, µs",
    "range_p99_us": "p99, µs",
    "txn_per_s": "transactions/s (a compare and a put)",
    "txn_cpu_us": "server CPU per transaction, µs",
    "txn_p99_us": "p99, µs",
    "one_put_per_s": "puts/s, one client, one at a time",
    "one_put_p99_us": "p99, µs",
    "one_range_per_s": "ranges/s, one client, one at a time",
    "one_range_p99_us": "p99, µs",
    "keep_alives_per_s": "lease keep-alives/s",
    "keep_alive_cpu_us": "server CPU per keep-alive, µs",
    "events_per_s": "watch events/s, 1 put to 1,000 watchers",
    "fan_out_ms": "until the last of 1,000 watchers has it, p50, ms",
}

CLUSTER_ROWS = {
    "leader_put_per_s": "puts/s through the leader, gRPC, 990 in flight",
    "leader_put_cpu_us": "CPU per put of all three members, µs",
    "all_put_per_s": "puts/s through all three members",
    "all_put_cpu_us": "CPU per put of all three members, µs",
    "rss_mib": "RSS of the largest member, MiB",
    "failover_p50_ms": "kill -9 of the leader to the next acknowledged put, p50, ms",
    "failover_max_ms": "worst, ms",
    "silent_p50_ms": "SIGSTOP of the leader to the next acknowledged put, p50, ms",
    "silent_max_ms": "worst, ms",
}


def alternate(
    rounds: int, servers: list[str], measure: Callable[[str], dict[str, float]]
) -> Rounds:
    """Measure each server `rounds` times, taking turns."""
    results: Rounds = {name: [] for name in servers}
    for number in range(rounds):
        for name in servers:
            began = time.monotonic()
            results[name].append(measure(name))
            took = time.monotonic() - began
            print(f"  round {number + 1} of {rounds}, {name}: {took:.0f} s", file=sys.stderr)
    return results


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(rows: dict[str, str], results: Rounds) -> str:
    """A Markdown table: one row per figure, median (lowest to highest) of each server, ratio."""
    servers = list(results)
    lines = ["| | " + " | ".join(servers) + (" | etcdlite / etcd |" if len(servers) > 1 else " |")]
    lines.append("|---|" + "---|" * (len(servers) + (len(servers) > 1)))
    for row, label in rows.items():
        cells = []
        for name in servers:
            values = [figures[row] for figures in results[name] if row in figures]
            cell = "" if values else "–"
            if values:
                cell = _number(statistics.median(values))
                if len(values) > 1:
                    cell += f" ({_number(min(values))} to {_number(max(values))})"
            cells.append(cell)
        if len(servers) > 1:
            ratios = [
                mine[row] / theirs[row]
                for mine, theirs in zip(results["etcdlite"], results["etcd"], strict=True)
                if row in mine and theirs.get(row)
            ]
            ratio = statistics.median(ratios) if ratios else 0.0
            cells.append(f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}" if ratios else "–")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sync_latencies_us(folder: str) -> list[float]:
    """How long the disk takes to make one appended 4 KiB block durable, sorted."""
    path = os.path.join(folder, "sync")
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    os.posix_fallocate(fd, 0, 4 << 20)
    os.fsync(fd)
    latencies = []
    for block in range(1000):
        os.pwrite(fd, b"x" * 4096, block * 4096)
        began = time.perf_counter()
        os.fdatasync(fd)
        latencies.append((time.perf_counter() - began) * 1e6)
    os.close(fd)
    os.unlink(path)
    return sorted(latencies)


def _first_match(pattern: str, path: str) -> str:
    found = re.search(pattern, Path(path).read_text())
    return found[1] if found else "unknown"


def machine(folder: str, command: str) -> str:
    """What the figures were taken on and with, as Markdown."""
    etcd_version = subprocess.run(
        [etcd_binary(), "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    memory_kib = int(_first_match(r"MemTotal:\s+(\d+)", "/proc/meminfo"))
    sync = sync_latencies_us(folder)
    file_system = subprocess.run(
        ["stat", "--file-system", "--format=%T", folder], capture_output=True, text=True, check=True
    ).stdout.strip()
    cpu = _first_match(r"model name\s*:\s*(.+)", "/proc/cpuinfo")
    facts = {
        "date": datetime.date.today().isoformat(),
        "command": f"`{command}`",
        "processor": f"{os.cpu_count()} cores, {cpu}",
        "memory": f"{memory_kib / 2**20:.0f} GiB",
        "kernel": platform.release(),
        "file system": f"{file_system}; fdatasync of 4 KiB: p50 {sync[500]:.0f} µs, "
        f"p99 {sync[990]:.0f} µs",
        "Python": platform.python_version()
        + (", of the distribution" if sys.base_prefix == "/usr" else ", a build of its own"),
        "etcd": etcd_version.removeprefix("etcd Version: "),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure etcdlite beside etcd.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the keys, short rounds")
    parser.add_argument("--rounds", type=int, help="default 7, 5, 3 and 3")
    parser.add_argument("--keys", type=int, help="keys in the scale part; default 1,000,000")
    parser.add_argument("--only", choices=["throughput", "grpc", "cluster", "scale"])
    parser.add_argument("--servers", default=",".join(SERVERS))
    parser.add_argument("--dir", default=str(ROOT / "build" / "bench"), help="for data directories")
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    options = parser.parse_args()
    servers = options.servers.split(",")
    folder = options.dir
    os.makedirs(folder, exist_ok=True)
    if shutil.which("h2load") is None:
        raise SystemExit("bench: no h2load: install nghttp2-client")
    command = "python -m bench.run " + " ".join(
        word for word in sys.argv[1:] if not word.startswith("--write") and word[-3:] != ".md"
    )
    sections = {"machine": machine(folder, command.strip())}
    print(sections["machine"], flush=True)

    share = 0.2 if options.quick else 1.0
    if options.only in (None, "throughput"):
        splits = throughput.fastest_splits(folder, 20_000 if options.quick else 50_000)
        note = "etcd was fastest with " + " and ".join(
            f"{connections} connections of {streams} streams for {kind}s"
            for kind, (connections, streams) in splits.items()
        )
        results = alternate(
            options.rounds or (3 if options.quick else 7),
            servers,
            lambda name: throughput.measure(name, folder, splits, share),
        )
        sections["throughput"] = table(THROUGHPUT_ROWS, results) + f"\n\n{note}."
        print("\n" + sections["throughput"], flush=True)

    for name, rows, measure, rounds in (
        ("grpc", GRPC_ROWS, grpc.measure, 5),
        ("cluster", CLUSTER_ROWS, cluster.measure, 3),
    ):
        if options.only in (None, name):
            results = alternate(
                options.rounds or (2 if options.quick else rounds),
                servers,
                lambda server, measure=measure: measure(server, folder, share),  # type: ignore[misc]
            )
            sections[name] = table(rows, results)
            print("\n" + sections[name], flush=True)

    if options.only in (None, "scale"):
        keys = options.keys or (100_000 if options.quick else 1_000_000)
        results = alternate(
            options.rounds or (1 if options.quick else 3),
            servers,
            lambda name: scale.measure(name, folder, keys),
        )
        sections["scale"] = f"{keys:,} keys.\n\n" + table(SCALE_ROWS, results)
        print("\n" + sections["scale"], flush=True)

    if options.write:
        write_sections(options.write, sections)


if __name__ == "__main__":
    main()
