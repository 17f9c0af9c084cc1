"""The latency of one client's puts over time, while the server has other things to do.

    python -m bench.over_time [--keys 1000000] [--writes 4] [--only one] [--plot docs/plots]
                              [--write docs/performance.md]

On one member: a compaction, a defragmentation, and a backup by etcdctl. On three: the leader is
killed, started again, and paused (SIGSTOP). A put that no member acknowledges is sent again to the
next one; it counts from its first try.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from bench import plots
from bench.clients import CallFailed, Connection, connect
from bench.cluster import ClusterMember, leader_of, started
from bench.native_load import key_of, value_of
from bench.page import write_sections
from bench.scale import Samples, Spans, load, maintenance_phases, puts_during
from bench.servers import Server, etcd_binary
from etcdlite import methods, proto

ROOT = Path(__file__).resolve().parent.parent
SERVERS = ("etcd", "etcdlite")
QUIET_S = 3.0
TRY_S = 0.25
"""A put waits for one member this long before it is sent to the next."""
PAUSE_S = 4.0


def maintenance(name: str, folder: str, keys: int, writes: int) -> tuple[Spans, Samples]:
    """One member with `keys` keys, each written `writes` times, or a third of them twice (0)."""
    with Server(name, folder) as server:
        for _ in range(writes or 1):
            load(server, range(keys))
        if not writes:
            load(server, range(0, keys, 3))
        connection = connect(name, server.port)
        etcdctl = os.path.join(os.path.dirname(etcd_binary()), "etcdctl")
        backup = [
            etcdctl, f"--endpoints=127.0.0.1:{server.port}", "snapshot", "save",
            os.path.join(folder, "backup.db"),
        ]  # fmt: skip
        phases = maintenance_phases(connection) | {
            "backup": lambda: subprocess.run(backup, check=True, capture_output=True)
        }
        found = puts_during(server, keys, phases)
        connection.close()
        return found


class _Writer:
    """Puts one key after the other until it is stopped, through whichever member answers."""

    def __init__(self, members: list[ClusterMember]) -> None:
        self.samples: Samples = []
        self._members = members
        self._at = 0
        self._connection: Connection | None = None
        self._stops = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stops.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._stops.is_set():
            number += 1
            body = proto.PutRequest(key=key_of(number), value=value_of(number)).encode()
            began = time.monotonic()
            while not self._put(body) and not self._stops.is_set():
                pass
            self.samples.append((began, time.monotonic() - began))
        self._close()

    def _put(self, body: bytes) -> bool:
        try:
            if self._connection is None:
                member = self._members[self._at]
                self._connection = connect(member.name, member.port, TRY_S)
            self._connection.send([(methods.METHOD_BY_NAME["KV.Put"], body)])
            self._connection.receive()
            return True
        except (CallFailed, OSError):
            self._close()
            self._at = (self._at + 1) % len(self._members)
            time.sleep(0.005)
            return False

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def failover(name: str, folder: str) -> tuple[Spans, Samples]:
    """Three members; the leader is killed, and the next one paused."""
    spans: Spans = {}
    with started(name, folder) as members:
        leader = leader_of(members)
        writer = _Writer(members)
        try:
            time.sleep(QUIET_S)
            began = time.monotonic()
            leader.kill()
            time.sleep(QUIET_S)
            leader.start()
            leader.wait_until_listening()
            spans["leader killed"] = (began, time.monotonic())
            time.sleep(QUIET_S)
            leader = leader_of(members)
            assert leader.process is not None
            began = time.monotonic()
            leader.process.send_signal(signal.SIGSTOP)
            time.sleep(PAUSE_S)
            leader.process.send_signal(signal.SIGCONT)
            spans["leader paused"] = (began, time.monotonic())
            time.sleep(QUIET_S)
        finally:
            writer.stop()
    return spans, writer.samples


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(title: str, found: dict[str, tuple[Spans, Samples]]) -> str:
    """A Markdown table: how long each span took, and p50, p99 and the worst put of it."""
    servers = list(found)
    lines = [
        f"| {title} | {' | '.join(f'{s}: took, s | put p50, ms | p99 | worst' for s in servers)} |",
        "|---" * (1 + 4 * len(servers)) + "|",
    ]
    for name in found[servers[0]][0]:
        cells = []
        for spans, samples in found.values():
            began, ended = spans[name]
            took_ms = sorted(s * 1e3 for at, s in samples if at < ended and at + s > began)
            ranks = (len(took_ms) // 2, len(took_ms) * 99 // 100, -1)
            cells += [f"{ended - began:.1f}", *(_number(took_ms[rank]) for rank in ranks)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, tuple[Spans, Samples]], path: Path) -> None:
    """Each put of both servers, and when the spans were."""
    curves = {}
    for server, (spans, samples) in found.items():
        zero = samples[0][0]
        curve = [(at - zero, took_s * 1e3) for at, took_s in samples]
        moved = {n: (began - zero, ended - zero) for n, (began, ended) in spans.items()}
        curves[server] = (curve, moved)
    plots.latency_over_time(curves, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency over time, etcdlite beside etcd.")
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--writes", type=int, default=0, help="of each key; 0: 1 or 2")
    parser.add_argument("--only", choices=["one", "three"], help="members")
    parser.add_argument("--plot", type=Path, help="a folder for the plots")
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    options = parser.parse_args()
    (ROOT / "build").mkdir(exist_ok=True)
    folder = tempfile.mkdtemp(dir=ROOT / "build")
    keys, writes = options.keys, options.writes
    measures = {
        "maintenance": ("one member", lambda name: maintenance(name, folder, keys, writes)),
        "failover": ("three members", lambda name: failover(name, folder)),
    }
    if options.only:
        del measures["failover" if options.only == "one" else "maintenance"]
    try:
        for section, (title, measure) in measures.items():
            found = {name: measure(name) for name in SERVERS}
            text = table(title, found)
            print("\n" + text, flush=True)
            if options.plot:
                draw(found, options.plot / f"{section}.svg")
            if options.write:
                command = f"python -m bench.over_time --keys {keys}"
                command += f" --writes {writes}" if writes else ""
                write_sections(options.write, {section: f"`{command}`\n\n{text}"})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
