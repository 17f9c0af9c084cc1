"""What users have: 1 to 1,000 clients of a real gRPC library, on 1 and 3 members.

    python -m bench.real_clients                       etcdlite beside etcd
    python -m bench.real_clients --base REV            this tree beside that revision and etcd
    python -m bench.real_clients --base REV --no-etcd  and what has changed since then
    python -m bench.real_clients --only 'put, 1 '      the workloads whose name contains that
    python -m bench.real_clients --plot docs/plots     and draw latency against clients there
    python -m bench.real_clients --write docs/performance.md    and put the main ratios on that page

The load is etcd's own benchmark tool (`etcd_benchmark.py`), which needs 25 to 35 µs of CPU for each
operation. On a machine with few cores that bounds the ratio of rates, so the server's CPU per
operation says more. In each round the servers run side by side and take turns load by load; a
ratio is the median of the ratios of the rounds.

Rows: operations per second, latency p50, p99 and worst, per operation the CPU and the bytes written
to disk, of all members together, and the RSS of the largest member after the load and all before
it. With `--base`, a list at the end names what has changed: in each round in the same direction,
and by over `CHANGED` in the median.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench import etcd_benchmark, plots
from bench.cluster import ClusterMember, leader_of
from bench.page import write_sections
from bench.scale import PREFIX, load
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


def _list(clients: int, total: int) -> str:
    return (
        f"range {PREFIX.decode()} {PREFIX.decode()[:-1]}0 --clients={clients} --conns={clients} "
        f"--total={total} --consistency=l"
    )


def _swap(clients: int, total: int) -> str:
    return (
        f"stm --clients={clients} --conns={clients} --total={total} --keys=10000 "
        "--txn-wr-percent=100 --val-size=256"
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
    Workload("list of 10,000 keys, 10 clients", (_list(10, 400),), 400),
    Workload("compare-and-swap: get, then txn, 100 clients", (_swap(100, 15_000),), 15_000),
    Workload("transaction of 16 puts, 1000 clients", (_txn(1000, 15_000, 16),), 15_000),
    Workload("transaction of 128 puts, 100 clients", (_txn(100, 2_000, 128),), 2_000),
    Workload("lease keep-alive, 1000 clients", (_keep_alive(60_000),), 60_000),
    Workload("mix: 80 clients range, 20 put", (_range(80, 32_000), _put(20, 8_000)), 40_000),
    Workload("3 members: put, 1 client", (_put(1, 1_000),), 1_000, 3),
    Workload("3 members: put, 10 clients", (_put(10, 5_000),), 5_000, 3),
    Workload("3 members: put, 100 clients", (_put(100, 20_000),), 20_000, 3),
    Workload("3 members: put, 1000 clients", (_put(1000, 40_000),), 40_000, 3),
    Workload(
        "3 members: put of new keys, 100 clients",
        (_put(100, 20_000, 256, "--sequential-keys --key-space-size=20000"),),
        20_000,
        3,
    ),
    Workload("3 members: put of 16 KB, 100 clients", (_put(100, 5_000, 16_384),), 5_000, 3),
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

ROWS = ("per s", "p50 ms", "p99 ms", "worst ms", "CPU µs", "bytes", "RSS MiB")

LISTED_KEYS = 10_000

CHANGED = 0.05
COMPARED = ("p50 ms", "CPU µs", "bytes")
"""A change between two revisions is reported for these rows only. The other times vary too much
from round to round, and the memory of a server depends on the workloads that ran before."""

Found = dict[tuple[str, str], list[list[float]]]
"""(Workload, server) -> a value for each of `ROWS`, round by round."""


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
        load(self.members[0], range(LISTED_KEYS))
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.remove()

    def cpu_s(self) -> float:
        return sum(member.cpu_s() for member in self.members)

    def written_bytes(self) -> int:
        return sum(member.written_bytes() for member in self.members)

    def rss_mib(self) -> float:
        return max(member.memory_kib()["VmRSS"] for member in self.members) / 1024


def measure(group: Group, workload: Workload, program: str | None, share: float) -> list[float]:
    """A value for each of `ROWS`."""
    ports = [member.port for member in group.members]
    if len(ports) > 1:
        leader = leader_of(list(group.members))  # type: ignore[arg-type]
        ports = [
            m.port for m in group.members if (m.port != leader.port) == workload.is_through_follower
        ][:1]
    total = 0
    commands = []
    for part in workload.parts:
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
        group.rss_mib(),
    ]


def order(names: list[str], number: int) -> list[str]:
    """The order of the servers in a round. After as many rounds as there are servers, each has had
    every place once. The next rounds reverse the order, so that each also follows every other."""
    turns, place = divmod(number, len(names))
    rotated = names[place:] + names[:place]
    return rotated[::-1] if turns % 2 else rotated


def compare(
    trees: dict[str, str], workloads: Sequence[Workload], rounds: int, share: float, folder: str
) -> Found:
    """Print a table: a line for each workload and row of it, and the ratios of the first server to
    the others. Returns the figures."""
    program = etcd_benchmark.tool()
    print(f"load: {program or 'bench.go_client, which imitates etcd benchmark'}\n")
    first, *others = trees
    print(f"| | | {' | '.join([*trees, *(f'{first} / {name}' for name in others)])} |")
    print("|---" * (2 + len(trees) + len(others)) + "|", flush=True)
    found: Found = {}
    for members in (1, 3):
        some = [workload for workload in workloads if workload.members == members]
        for number in range(rounds if some else 0):
            with contextlib.ExitStack() as stack:
                groups = {
                    name: stack.enter_context(
                        Group(name, os.path.join(folder, f"data of {name}"), members, trees[name])
                    )
                    for name in order(list(trees), number)
                }
                for workload in some:
                    for name, group in groups.items():
                        figures = measure(group, workload, program, share)
                        found.setdefault((workload.name, name), []).append(figures)
        for workload in some:
            for row in ROWS:
                columns = [column(found, workload.name, name, row) for name in trees]
                cells = [f"{statistics.median(values):,.4g}" for values in columns]
                for theirs in columns[1:]:
                    quotients = ratios(columns[0], theirs)
                    cells.append(f"{statistics.median(quotients):.2f}" if quotients else "–")
                label = workload.name if row == ROWS[0] else ""
                print(f"| {label} | {row} | {' | '.join(cells)} |", flush=True)
    return found


def column(found: Found, workload: str, server: str, row: str) -> list[float]:
    """One figure of a server, round by round."""
    return [figures[ROWS.index(row)] for figures in found[workload, server]]


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The ratio of each round. Rounds in which the second figure is 0 are left out."""
    return [one / other for one, other in zip(mine, theirs, strict=True) if other]


def changes(found: Found, now: str, before: str) -> list[str]:
    """What has changed from one server to the other, a line each; the largest change first."""
    lines = []
    for workload in dict.fromkeys(workload for workload, _ in found):
        for row in COMPARED:
            new, old = (column(found, workload, name, row) for name in (now, before))
            quotients = ratios(new, old)
            if len(quotients) < len(new) or min(quotients) <= 1 <= max(quotients):
                continue
            middle = statistics.median(quotients)
            if abs(middle - 1) > CHANGED:
                was, is_now = statistics.median(old), statistics.median(new)
                line = f"{middle:.2f} times {row}: {workload} ({was:,.4g}, now {is_now:,.4g})"
                lines.append((-abs(middle - 1), line))
    return [line for _, line in sorted(lines)]


def summary(found: Found, command: str) -> str:
    """A Markdown table with a line for each workload: how etcdlite compares with etcd."""
    lines = [
        f"`{command}`",
        "",
        "| | etcd, per s | etcdlite, per s | rate | p99 | server CPU |",
        "|---|---|---|---|---|---|",
    ]
    for workload in dict.fromkeys(workload for workload, _ in found):
        rates = {name: column(found, workload, name, "per s") for name in ("etcd", "etcdlite")}
        cells = [f"{statistics.median(values):,.0f}" for values in rates.values()]
        for row in ("per s", "p99 ms", "CPU µs"):
            mine, theirs = (column(found, workload, name, row) for name in ("etcdlite", "etcd"))
            cells.append(f"{statistics.median(ratios(mine, theirs)):.2f}")
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Found, folder: Path) -> None:
    """Latency against the number of clients, of the workloads that differ in nothing else."""
    plot: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
    for workload, server in found:
        plain = re.fullmatch(r"(put|range), (\d+) clients?", workload)
        if plain:
            curves = plot.setdefault(plain[1], {}).setdefault(server, {"p50": [], "p99": []})
            for name, curve in curves.items():
                values = column(found, workload, server, f"{name} ms")
                curve.append((int(plain[2]), statistics.median(values)))
    if plot:
        plots.latency_by_clients(plot, folder / "clients.svg")


def checked_out(revision: str, folder: str) -> str:
    """The package of a revision, in a folder of its own. The folder."""
    path = os.path.join(folder, "base")
    os.makedirs(path)
    archive = subprocess.Popen(
        ["git", "-C", str(ROOT), "archive", revision, "etcdlite"], stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "-x", "-C", path], stdin=archive.stdout, check=True)
    if archive.wait():
        raise SystemExit(f"bench: no revision {revision}")
    # This tree has its bytecode; the process that compiles needs more CPU and memory.
    subprocess.run([sys.executable, "-m", "compileall", "-q", path], check=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure with etcd's own benchmark tool.")
    parser.add_argument("--base", help="compare with this revision")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the requests")
    parser.add_argument("--only", default="", help="a part of the workloads' names; a|b for two")
    parser.add_argument("--no-etcd", action="store_true")
    parser.add_argument("--plot", type=Path, help="a folder for the plot")
    parser.add_argument("--write", type=Path, help="page whose table is replaced; needs etcd")
    options = parser.parse_args()
    wanted = options.only.split("|")
    workloads = [one for one in WORKLOADS if any(part in one.name for part in wanted)]
    if not workloads:
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
        found = compare(trees, workloads, options.rounds, options.share, folder)
        if options.base:
            lines = changes(found, "etcdlite", options.base)
            print(f"\nChanged since {options.base}:", *(lines or ["nothing"]), sep="\n- ")
        if options.plot:
            draw(found, options.plot)
        if options.write:
            command = f"python -m bench.real_clients --rounds {options.rounds}"
            command += f" --share {options.share:g}" if options.share != 1 else ""
            write_sections(options.write, {"clients": summary(found, command)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
