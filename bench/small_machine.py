"""Both servers on a small machine: by default half of one core and 512 MiB of memory.

    sudo python -m bench.small_machine [--keys 1000000] [--cores 0.5] [--memory-mib 512]

The limits are those of a control group (v1 or v2), so this needs root. The client runs outside of
it, and is the same for both: gRPC, 32-byte keys, 256-byte values. The memory limit counts the page
cache, too. Phases, one after the other:

1. load the keys, 100 puts in flight, until all are there or the server is killed for its memory;
2. one put at a time, and linearizable ranges of one key: 100 in flight, and one at a time;
3. SIGKILL, and the time from the start until the first linearizable read.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.clients import CallFailed, GrpcConnection, pipeline
from bench.native_load import key_of, value_of
from bench.scale import seconds_until_first_read
from bench.servers import Server
from etcdlite import proto

ROOT = Path(__file__).resolve().parent.parent
GROUPS = Path("/sys/fs/cgroup")
NAME = "etcdlite-bench"
PERIOD_US = 100_000
IN_FLIGHT = 100
CONNECTIONS = 10
OPERATIONS = 20_000
"""Of each phase after the load; a tenth of it one at a time."""


class _Group:
    """A control group with the limits."""

    def __init__(self, cores: float, memory_bytes: int) -> None:
        quota = str(int(cores * PERIOD_US))
        if (GROUPS / "cgroup.controllers").exists():
            (GROUPS / "cgroup.subtree_control").write_text("+cpu +memory")
            self._folders = [GROUPS / NAME]
            limits = {"cpu.max": f"{quota} {PERIOD_US}", "memory.max": str(memory_bytes)}
            limits["cpu.weight"] = "10000"  # What else runs on the machine disturbs it less.
        else:
            self._folders = [GROUPS / "cpu" / NAME, GROUPS / "memory" / NAME]
            limits = {"cpu.cfs_quota_us": quota, "memory.limit_in_bytes": str(memory_bytes)}
            limits["cpu.shares"] = "100000"
        for folder in self._folders:
            folder.mkdir(exist_ok=True)
            for name, limit in limits.items():
                if (folder / name).exists():
                    (folder / name).write_text(limit)

    def add(self, server: Server) -> None:
        assert server.process is not None
        for folder in self._folders:
            (folder / "cgroup.procs").write_text(str(server.process.pid))

    def remove(self) -> None:
        for folder in self._folders:
            folder.rmdir()


class _SmallServer(Server):
    """A server within the limits."""

    group: _Group

    def start(self) -> None:
        super().start()
        self.group.add(self)


@contextmanager
def _connected(server: Server, count: int) -> Iterator[list[GrpcConnection]]:
    connections = [GrpcConnection(server.port) for _ in range(count)]
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


def _rate(server: Server, name: str, bodies: Iterable[bytes], in_flight: int) -> dict[str, float]:
    """Requests per second, and CPU of the server for each in us."""
    began, cpu_s = time.monotonic(), server.cpu_s()
    with _connected(server, min(in_flight, CONNECTIONS)) as connections:
        count = pipeline(connections, name, bodies, in_flight)
    took_s = time.monotonic() - began
    return {"per_s": count / took_s, "cpu_us": (server.cpu_s() - cpu_s) / count * 1e6}


def _puts(numbers: Iterable[int]) -> Iterator[bytes]:
    return (proto.PutRequest(key=key_of(n), value=value_of(n)).encode() for n in numbers)


def _ranges(count: int, keys: int) -> Iterator[bytes]:
    return (proto.RangeRequest(key=key_of(n * 7919 % keys)).encode() for n in range(count))


def measure(name: str, folder: str, keys: int) -> dict[str, float]:
    """One round with one server. `loaded`: the number of keys that it took. If it is killed because
    it needs more memory, the figures of that phase and of the later ones are missing."""
    figures: dict[str, float] = {"loaded": 0}
    with _SmallServer(name, folder) as server:
        try:
            _measure(server, keys, figures)
        except (CallFailed, OSError) as failure:
            print(f"{name}: {failure}, after {', '.join(figures)}")
    return figures


def _measure(server: Server, keys: int, figures: dict[str, float]) -> None:
    part = max(1, keys // 20)
    began, cpu_s = time.monotonic(), server.cpu_s()
    for first in range(0, keys, part):
        _rate(server, "KV.Put", _puts(range(first, first + part)), IN_FLIGHT)
        figures["loaded"] = loaded = first + part
        figures["put_100_per_s"] = loaded / (time.monotonic() - began)
        figures["put_100_cpu_us"] = (server.cpu_s() - cpu_s) / loaded * 1e6
        memory = server.memory_kib()
        figures["rss_mib"], figures["anonymous_mib"] = (
            memory[field] / 1024 for field in ("VmRSS", "RssAnon")
        )
    few = OPERATIONS // 10
    for label, method, bodies, in_flight in (
        ("put_1", "KV.Put", _puts(range(few)), 1),
        ("range_100", "KV.Range", _ranges(OPERATIONS, loaded), IN_FLIGHT),
        ("range_1", "KV.Range", _ranges(few, loaded), 1),
    ):
        found = _rate(server, method, bodies, in_flight)
        figures |= {f"{label}_{unit}": figure for unit, figure in found.items()}
    server.kill()
    figures["restart_s"] = seconds_until_first_read(server, key_of(loaded - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description="A small machine, etcdlite beside etcd.")
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--cores", type=float, default=0.5)
    parser.add_argument("--memory-mib", type=int, default=512)
    options = parser.parse_args()
    try:
        group = _Group(options.cores, options.memory_mib << 20)
    except OSError as failure:
        raise SystemExit(f"bench: no control group can be made ({failure}): run as root") from None
    _SmallServer.group = group
    (ROOT / "build").mkdir(exist_ok=True)
    folder = tempfile.mkdtemp(dir=ROOT / "build")
    try:
        found = {name: measure(name, folder, options.keys) for name in ("etcd", "etcdlite")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        group.remove()
    print(f"| {options.cores} cores, {options.memory_mib} MiB | etcd | etcdlite |\n|---|---|---|")
    for row in dict.fromkeys((*found["etcd"], *found["etcdlite"])):
        cells = (figures.get(row) for figures in found.values())
        print(f"| {row} | {' | '.join('–' if c is None else f'{c:,.4g}' for c in cells)} |")


if __name__ == "__main__":
    if os.geteuid():
        raise SystemExit("bench: run as root: only it makes control groups")
    main()
