"""Run the simulator.

python -m tests.sim --seed 7 --members 5 --minutes 10 --trace out.txt
python -m tests.sim --seeds 1000            the seeds 0 to 999, a short run of each
python -m tests.sim                         fresh random seeds, until stopped
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from etcdlite.secret_file import Secret
from sim.simulation import Failure, Simulation, fresh_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--first", type=int, default=0, help="with --seeds: where to begin")
    parser.add_argument("--seeds", type=int, help="run so many seeds, one after the other")
    parser.add_argument("--members", type=int, default=0, help="1 to 7; drawn if not given")
    parser.add_argument("--clients", type=int, default=0, help="drawn if not given")
    parser.add_argument("--minutes", type=float, help="of virtual time (1; many seeds: 0.3)")
    parser.add_argument("--secret", action="store_true", help="the members share a secret")
    parser.add_argument("--users", action="store_true", help="users, and auth that changes")
    parser.add_argument("--trace", help="write the whole trace to this file")
    parser.add_argument("--keep-going", action="store_true", help="go on after a failing seed")
    options = parser.parse_args()
    if options.seed is not None:
        return run_one(options)
    return run_many(options)


def made(seed: int, options: Any) -> Simulation:
    simulation = Simulation(seed, options.members, options.clients)
    if options.secret:
        simulation.world.secret = (Secret(bytes(range(100, 132))),)
    simulation.has_users |= options.users
    return simulation


def run_one(options: Any) -> int:
    simulation = made(options.seed, options)
    trace = open(options.trace, "w") if options.trace else None  # noqa: SIM115
    if trace is not None:
        simulation.world.trace = lambda line: print(line, file=trace) or None
    progress = Progress()
    simulation.progress = progress.show
    began = time.perf_counter()
    failure = None
    try:
        simulation.run(options.minutes or 1.0)
    except Failure as found:
        failure = found
    finally:
        if trace is not None:
            trace.close()
    progress.clear()
    took_s = time.perf_counter() - began
    print(f"seed {options.seed}: {summary(simulation, took_s)}")
    print(f"trace hash {simulation.world.digest}")
    if failure is not None:
        print(failure)
        return 1
    return 0


def run_many(options: Any) -> int:
    began = time.perf_counter()
    count = failures = operations = 0
    is_terminal = sys.stdout.isatty()
    virtual_s = 0.0
    try:
        while options.seeds is None or count < options.seeds:
            seed = fresh_seed() if options.seeds is None else options.first + count
            simulation = made(seed, options)
            try:
                simulation.run(options.minutes or 0.3)
            except Failure as failure:
                print(f"\r{' ' * 78}\r{failure}\n")
                failures += 1
                if not options.keep_going:
                    return 1
            count += 1
            operations += simulation.oracle.answers
            virtual_s += simulation.world.now
            took_s = time.perf_counter() - began
            if not is_terminal and count % 100 and count != options.seeds:
                continue
            print(
                f"\r{count} seeds, {failures} fail, {virtual_s / 3600:.2f} h of virtual time, "
                f"{operations} operations, {operations / took_s:.0f}/s ",
                end="" if is_terminal else "\n",
                flush=True,
            )
    except KeyboardInterrupt:
        pass
    print()
    return bool(failures)


def summary(simulation: Simulation, took_s: float) -> str:
    oracle, safety = simulation.oracle, simulation.safety
    faults = simulation.nemesis.faults if hasattr(simulation, "nemesis") else 0
    return (
        f"{simulation.world.now:.1f} s of virtual time in {took_s:.1f} s, "
        f"{simulation.member_count} members, {oracle.answers} operations "
        f"({oracle.answers / max(took_s, 1e-9):.0f}/s), {oracle.unknown} of unknown outcome, "
        f"revision {oracle.revision}, {len(safety.entries) - 1} entries, {safety.elections} "
        f"elections, {safety.snapshots} snapshots, {safety.changes} membership changes, "
        f"{faults} faults"
    )


class Progress:
    """A line that moves, on a terminal."""

    def __init__(self) -> None:
        self._began = self._shown = time.perf_counter()

    def show(self, simulation: Simulation) -> None:
        now = time.perf_counter()
        if not sys.stderr.isatty() or now - self._shown < 0.5:
            return
        self._shown = now
        oracle = simulation.oracle
        print(
            f"\r{simulation.world.now:8.1f} s virtual, {oracle.answers} operations, "
            f"{oracle.answers / (now - self._began):.0f}/s ",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def clear(self) -> None:
        if sys.stderr.isatty():
            print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
