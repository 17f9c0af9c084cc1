"""How much a well-behaved client notices of hostile ones: prints a Markdown table.

    python -m bench.attacks              every attack, a few minutes
    python -m bench.attacks windows ...  some of them

A client puts and gets one key, one request after the other, beside each attack on a fresh member.
Right: its 99th percentile stays under three times the quiet value or 50 ms, whichever is more, and
its worst answer takes under 1 s. Run it on an idle machine; `tests/test_attacks.py` has bounds that
a loaded one keeps.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from bench.servers import Server
from etcdlite.client import Client
from tests.rigs.attacks import ATTACKS, Connect, prepare

QUIET_S = 3.0
AFTER_S = 3.0
"""The time that is measured after an attack has sent everything."""

PAUSE_S = 0.005
TIMES_QUIET = 3
MAX_P99_S = 0.05
MAX_WORST_S = 1.0


def measure(port: int, during: Callable[[], None]) -> list[float]:
    """The sorted latencies of the well-behaved client while `during` runs; infinite if it fails."""
    times: list[float] = []
    is_over = threading.Event()

    def ask() -> None:
        with Client(f"127.0.0.1:{port}", timeout_s=60.0) as client:
            requests: list[Callable[[], object]] = [
                lambda: client.put("neighbour", "v"),
                lambda: client.get("neighbour"),
            ]
            while not is_over.is_set():
                for request in requests:
                    began = time.monotonic()
                    try:
                        request()
                        times.append(time.monotonic() - began)
                    except Exception as failure:
                        print(f"the well-behaved client failed: {failure}", file=sys.stderr)
                        times.append(float("inf"))
                is_over.wait(PAUSE_S)

    thread = threading.Thread(target=ask)
    thread.start()
    during()
    is_over.set()
    thread.join()
    return sorted(times)


def attack_once(name: str) -> tuple[list[float], list[float], float]:
    """Latencies when quiet and under attack, and the peak of the member's memory in MiB."""
    attack: Callable[[Connect], None] = ATTACKS[name]
    socks: list[socket.socket] = []
    with tempfile.TemporaryDirectory() as folder, Server("etcdlite", folder) as server:
        with Client(f"127.0.0.1:{server.port}", timeout_s=60.0) as client:
            prepare(client)
        quiet = measure(server.port, lambda: time.sleep(QUIET_S))

        def connect() -> socket.socket:
            sock = socket.create_connection(("127.0.0.1", server.port), 5.0)
            socks.append(sock)
            return sock

        def during() -> None:
            attack(connect)
            time.sleep(AFTER_S)

        attacked = measure(server.port, during)
        peak_mib = server.memory_kib()["VmHWM"] / 1024
        for sock in socks:
            sock.close()
    return quiet, attacked, peak_mib


def main(names: list[str]) -> int:
    print("| attack | p99 quiet, ms | p99, ms | worst, ms | peak RSS, MiB | |")
    print("|---|---|---|---|---|---|")
    is_right = True
    for name in names or ATTACKS:
        quiet, attacked, peak_mib = attack_once(name)
        quiet_p99, p99 = (times[int(len(times) * 0.99)] for times in (quiet, attacked))
        is_met = p99 < max(TIMES_QUIET * quiet_p99, MAX_P99_S) and attacked[-1] < MAX_WORST_S
        is_right &= is_met
        figures = (quiet_p99 * 1000, p99 * 1000, attacked[-1] * 1000, peak_mib)
        cells = " | ".join(f"{figure:.0f}" for figure in figures)
        print(f"| {name} | {cells} | {'' if is_met else 'FAULT'} |", flush=True)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
