"""What users have: 1 to 1,000 clients of a real gRPC library, on 1 and 3 members.

    python -m bench.real_clients                       etcdlite beside etcd
    python -m bench.real_clients --base REV            this tree beside that revision (and etcd)
    python -m bench.real_clients --only 'put, 1 '      the workloads whose name contains that
    python -m bench.real_clients --plot docs/plots     and draw latency against clients there

The load is etcd's own benchmark tool (`etcd_benchmark.py`), which needs 25 to 35 µs of CPU for each
operation. On a machine with few cores that bounds the ratio of rates, so the server's CPU per
operation says more. Rounds take turns; a ratio is the median of the ratios of neighbouring rounds.

Rows: operations per second, latency p50, p99 and worst, and per operation the CPU and the bytes
written to disk, of all members together.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench import etcd_benchmark, plots
from bench.cluster import ClusterMember, leader_of
from bench.servers import Server, free_port

ROOT = Path(__file__).resolve().parent.parent


class Workload(NamedTuple):
    """A load. `parts`: the arguments of the tools that run at once; `total`: requests of all."""

    name: str
    parts: tuple[str, ...]
    total: int
    members: int = 1
    is_through_follower: bool = False


def _put(clients: int, total: int, size: int = 256, more: str = "") -> str:
    return (
        f"put --clients={clients} --conns={min(clients, 100)} --total={total} --key-size=32 "
        f"--val-size={size} {more or '--key-space-size=10000'}"
    )


def _range(clients: int, total: int, consistency: str = "l") -> str:
    return (
        f"range key --clients={clients} --conns={min(clients, 100)} --total={total} "
        f"--consistency={consistency}"
    )


def _txn(clients: int, total: int, ops: int) -> str:
    return (
        f"txn-put --clients={clients} --conns={min(clients, 100)} --total={total} --txn-ops={ops} "
        "--key-size=32 --val-size=256 --key-space-size=10000"
    )


def _keep_alive(total: int) -> str:
    return f"lease-keepalive --clients=1000 --conns=100 --total={total}"


WORKLOADS = (
    Workload("put, 1 client", (_put(1, 2_000),), 2_000),
    Workload("put, 10 clients", (_put(10, 10_000),), 10_000),
    Workload("put, 100 clients", (_put(100, 30_000),), 30_000),
    Workload("put, 1000 clients", (_put(1000, 60_000),), 60_000),
    Workload(
        "put of new keys, 100 clients",
        (_put(100, 30_000, 256, "--sequential-keys --key-space-size=30000"),),
        30_000,
    ),
    Workload("put of 16 KB, 100 clients", (_put(100, 10_000, 16_384),), 10_000),
    Workload("range, 1 client", (_range(1, 5_000),), 5_000),
    Workload("range, 100 clients", (_range(100, 40_000),), 40_000),
    Workload("range, 1000 clients", (_range(1000, 80_000),), 80_000),
    Workload("range, 1000 clients, serializable", (_range(1000, 80_000, "s"),), 80_000),
    Workload("transaction of 16 puts, 1000 clients", (_txn(1000, 15_000, 16),), 15_000),
    Workload("transaction of 128 puts, 100 clients", (_txn(100, 2_000, 128),), 2_000),
    Workload("lease keep-alive, 1000 clients", (_keep_alive(60_000),), 60_000),
    Workload("mix: 80 clients range, 20 put", (_range(80, 32_000), _put(20, 8_000)), 40_000),
    Workload("3 members: put, 1 client", (_put(1, 1_000),), 1_000, 3),
    Workload("3 members: put, 100 clients", (_put(100, 20_000),), 20_000, 3),
    Workload("3 members: put, 1000 clients", (_put(1000, 40_000),), 40_000, 3),
    Workload("3 members: range, 1 client", (_range(1, 2_000),), 2_000, 3),
    Workload("3 members: range, 1000 clients", (_range(1000, 60_000),), 60_000, 3),
    Workload("3 members: range, serializable", (_range(1000, 60_000, "s"),), 60_000, 3),
    Workload(
        "3 members: range through a follower",
        (_range(1000, 60_000),),
        60_000,
        3,
        is_through_follower=True,
    ),
    Workload("3 members: transaction of 16 puts", (_txn(1000, 10_000, 16),), 10_000, 3),
)

ROWS = ("per s", "p50 ms", "p99 ms", "worst ms", "CPU µs", "bytes")


class Group:
    """One server, or a cluster of three. `tree`: the sources of etcdlite that run."""

    def __init__(self, name: str, folder: str, members: int, tree: str) -> None:
        self.members: Sequence[Server]
        server = "etcd" if name == "etcd" else "etcdlite"
        if members == 1:
            self.members = [Server(server, folder, tree=tree)]
        else:
            ports = [free_port() for _ in range(members)]
            self.members = [ClusterMember(server, folder, n, ports) for n in range(members)]
            for member in self.members:
                member.tree = tree

    def __enter__(self) -> Group:
        for member in self.members:
            member.start()
        for member in self.members:
            member.wait_until_listening()
        if len(self.members) > 1:
            leader_of(list(self.members))  # type: ignore[arg-type]
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.remove()

    def cpu_s(self) -> float:
        return sum(member.cpu_s() for member in self.members)

    def written_bytes(self) -> int:
        return sum(member.written_bytes() for member in self.members)


def measure(group: Group, load: Workload, program: str | None, share: float) -> list[float]:
    """A value for each of `ROWS`."""
    ports = [member.port for member in group.members]
    if len(ports) > 1:
        leader = leader_of(list(group.members))  # type: ignore[arg-type]
        ports = [
            m.port for m in group.members if (m.port != leader.port) == load.is_through_follower
        ][:1]
    total = 0
    commands = []
    for part in load.parts:
        words = part.split()
        at = next(n for n, word in enumerate(words) if word.startswith("--total="))
        count = int(int(words[at].partition("=")[2]) * share)
        words[at] = f"--total={count}"
        total += count
        commands.append(words)
    cpu_s, written_bytes = group.cpu_s(), group.written_bytes()
    began = time.perf_counter()
    loads = [etcd_benchmark.start(program, ports, words) for words in commands]
    reports = [etcd_benchmark.finish(one) for one in loads]
    took_s = time.perf_counter() - began
    worst = max(reports, key=lambda report: report.p99_ms)
    return [
        reports[0].per_s if len(reports) == 1 else total / took_s,
        worst.p50_ms,
        worst.p99_ms,
        max(report.max_ms for report in reports),
        (group.cpu_s() - cpu_s) / total * 1e6,
        (group.written_bytes() - written_bytes) / total,
    ]


def compare(
    trees: dict[str, str], loads: Sequence[Workload], rounds: int, share: float, folder: str
) -> dict[tuple[str, str], list[float]]:
    """Print a table: a line for each workload and row of it; the last server is the measure.
    Returns the medians of each workload and server."""
    program = etcd_benchmark.tool()
    print(f"load: {program or 'bench.go_client, which imitates etcd benchmark'}\n")
    names = list(trees)
    ratios = [f"{name} / {names[-1]}" for name in names[:-1]]
    print(f"| | | {' | '.join([*names, *ratios])} |")
    print("|---" * (2 + len(names) + len(ratios)) + "|", flush=True)
    medians: dict[tuple[str, str], list[float]] = {}
    for members in (1, 3):
        some = [load for load in loads if load.members == members]
        found: dict[tuple[str, str], list[list[float]]] = {}
        for _ in range(rounds if some else 0):
            for name in names:
                with Group(name, os.path.join(folder, name), members, trees[name]) as group:
                    measure(group, some[0]._replace(parts=(_put(100, 5_000),)), program, 1.0)
                    for load in some:
                        figures = measure(group, load, program, share)
                        found.setdefault((load.name, name), []).append(figures)
        for load in some:
            for at, row in enumerate(ROWS):
                columns = {n: [one[at] for one in found[load.name, n]] for n in names}
                cells = [f"{statistics.median(values):,.4g}" for values in columns.values()]
                for name in names[:-1]:
                    pairs = zip(columns[name], columns[names[-1]], strict=True)
                    quotients = [mine / theirs for mine, theirs in pairs if theirs]
                    cells.append(f"{statistics.median(quotients):.2f}" if quotients else "–")
                label = load.name if not at else ""
                print(f"| {label} | {row} | {' | '.join(cells)} |", flush=True)
        for workload, values in found.items():
            medians[workload] = [statistics.median(row) for row in zip(*values, strict=True)]
    return medians


def draw(medians: dict[tuple[str, str], list[float]], folder: Path) -> None:
    """Latency against the number of clients, of the workloads that differ in nothing else."""
    found: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
    for (workload, server), figures in medians.items():
        plain = re.fullmatch(r"(put|range), (\d+) clients?", workload)
        if plain:
            curves = found.setdefault(plain[1], {}).setdefault(server, {"p50": [], "p99": []})
            for name, curve in curves.items():
                curve.append((int(plain[2]), figures[ROWS.index(f"{name} ms")]))
    if found:
        plots.latency_by_clients(found, folder / "clients.svg")


def checked_out(revision: str, folder: str) -> str:
    """The sources of a revision, in a folder."""
    path = os.path.join(folder, "base")
    os.makedirs(path)
    archive = subprocess.Popen(
        ["git", "-C", str(ROOT), "archive", revision], stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "-x", "-C", path], stdin=archive.stdout, check=True)
    if archive.wait():
        raise SystemExit(f"bench: no revision {revision}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure with etcd's own benchmark tool.")
    parser.add_argument("--base", help="compare with this revision")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the requests")
    parser.add_argument("--only", default="", help="a part of the workloads' names; a|b for two")
    parser.add_argument("--no-etcd", action="store_true")
    parser.add_argument("--plot", type=Path, help="a folder for the plot")
    options = parser.parse_args()
    wanted = options.only.split("|")
    loads = [load for load in WORKLOADS if any(one in load.name for one in wanted)]
    if not loads:
        raise SystemExit(f"bench: no workload has {options.only!r} in its name")
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    folder = tempfile.mkdtemp(dir=build)
    try:
        trees = {"etcdlite": str(ROOT)}
        if options.base:
            trees[options.base] = checked_out(options.base, folder)
        if not options.no_etcd:
            trees["etcd"] = ""
        medians = compare(trees, loads, options.rounds, options.share, folder)
        if options.plot:
            draw(medians, options.plot)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
