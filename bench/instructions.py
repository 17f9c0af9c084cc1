"""Bytecode instructions for one request, in this tree and in a revision: prints a Markdown table.

    python -m bench.instructions                 this tree
    python -m bench.instructions --base REV      beside that revision, and what has changed

The clients behave like grpc-go (`go_client.py`): one request in flight each. They send together
while the members are stopped (SIGSTOP), so a member finds the requests of all in the same turn. A
figure is the sum over all members, at the tenth percentile of `REPEATS` times, so that timers and
interruptions do not count. With one client and one member there are a few possible counts, by what
the log thread has done when the loop looks; otherwise they vary by a few in a hundred. So a change
is one at each of `PERCENTILES`. The count leaves out what functions in C, system calls and the
other threads do, so few instructions can still be slow; `real_clients.py` measures CPU and latency.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.clients import call
from bench.cluster import ClusterMember, leader_of
from bench.counted_member import COUNT_BYTES, COUNT_FILE, map_count
from bench.go_client import GoConnection
from bench.native_load import key_of, value_of
from bench.real_clients import checked_out
from bench.scale import PREFIX
from bench.servers import free_port, stopped
from etcdlite import methods, proto

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = 50
REPEATS = 50
PERCENTILES = (10, 25, 50)
LOOK_S = 0.002
QUIET_LOOKS = 2
"""A request is over when this many looks in a row found no member busy."""
CHANGED, CHANGED_MUCH = 0.01, 0.05
"""Larger changes are in bold type. The first is the limit for one client and one member."""
Counts = dict[str, list[float]]
"""Load -> instructions for one request, at each of `PERCENTILES`."""
KEYS = 1000


def _put(number: int) -> proto.PutRequest:
    return proto.PutRequest(key=key_of(number % KEYS), value=value_of(number))


def _swap(number: int) -> proto.TxnRequest:
    key = key_of(number % KEYS)
    compare = proto.Compare(
        result=proto.Compare.GREATER, target=proto.Compare.MOD, key=key, mod_revision=0
    )
    return proto.TxnRequest(
        compare=[compare],
        success=[proto.RequestOp(request_put=_put(number))],
        failure=[proto.RequestOp(request_range=proto.RangeRequest(key=key))],
    )


def _get_in_transaction(number: int) -> proto.TxnRequest:
    get = proto.RangeRequest(key=key_of(number % KEYS), serializable=True)
    return proto.TxnRequest(success=[proto.RequestOp(request_range=get)])


def _transaction(number: int) -> proto.TxnRequest:
    puts = [proto.RequestOp(request_put=_put(number * 16 + n)) for n in range(16)]
    return proto.TxnRequest(success=puts)


def _get(number: int) -> proto.RangeRequest:
    return proto.RangeRequest(key=key_of(number % KEYS))


def _page(_number: int) -> proto.RangeRequest:
    return proto.RangeRequest(key=PREFIX, range_end=PREFIX[:-1] + b"0", limit=500)


def _keep_alive(_number: int) -> proto.LeaseKeepAliveRequest:
    return proto.LeaseKeepAliveRequest(ID=1)


LOADS: dict[str, tuple[str, Callable[[int], object], int]] = {
    "put": ("KV.Put", _put, 1),
    f"put, {CLIENTS} clients": ("KV.Put", _put, CLIENTS),
    "range": ("KV.Range", _get, 1),
    f"range, {CLIENTS} clients": ("KV.Range", _get, CLIENTS),
    "page of 500 keys": ("KV.Range", _page, 1),
    "get in a transaction": ("KV.Txn", _get_in_transaction, 1),
    "compare-and-swap": ("KV.Txn", _swap, 1),
    f"compare-and-swap, {CLIENTS} clients": ("KV.Txn", _swap, CLIENTS),
    "transaction of 16 puts": ("KV.Txn", _transaction, 1),
    "lease keep-alive": ("Lease.LeaseKeepAlive", _keep_alive, 1),
    f"lease keep-alive, {CLIENTS} clients": ("Lease.LeaseKeepAlive", _keep_alive, CLIENTS),
}
"""Name -> (method, request by number, clients)."""


def _is_busy(member: ClusterMember) -> bool:
    """Whether a thread of it runs, waits for a core, or waits for the disk."""
    assert member.process is not None
    for stat in Path(f"/proc/{member.process.pid}/task").glob("*/stat"):
        if stat.read_text().rpartition(")")[2].split()[0] != "S":
            return True
    return False


class Counted:
    """Members of one tree, and their count."""

    def __init__(self, folder: str, count: int, tree: str) -> None:
        ports = [free_port() for _ in range(count)]
        self.members = [ClusterMember("etcdlite", folder, n, ports) for n in range(count)]
        self._counts = []
        for member in self.members:
            member.tree = tree
            member._command[1:3] = ["-m", "bench.counted_member"]
            os.makedirs(os.path.dirname(member.data_dir))
            path = member.data_dir + ".count"
            Path(path).write_bytes(bytes(COUNT_BYTES))
            self._counts.append(map_count(path))
            os.environ[COUNT_FILE] = path
            member.start()

    def settled(self) -> int:
        """The count, as soon as it stays the same and all threads of the members sleep."""
        count, looks = -1, 0
        while looks < QUIET_LOOKS:
            time.sleep(LOOK_S)
            now = sum(view[0] for view in self._counts)
            looks = looks + 1 if now == count and not any(map(_is_busy, self.members)) else 0
            count = now
        return count

    def per_request(
        self, port: int, method_name: str, request: Callable[[int], object], clients: int
    ) -> list[float]:
        """Instructions for one request of these clients, at each of `PERCENTILES`."""
        method = methods.METHOD_BY_NAME[method_name]
        connections = [GoConnection(port) for _ in range(clients)]
        found = []
        number = 0
        for _ in range(REPEATS):
            before = self.settled()
            with stopped(*self.members):
                for connection in connections:
                    connection.ask(method, request(number).encode())  # type: ignore[attr-defined]
                    number += 1
            for connection in connections:
                connection.receive()
            found.append((self.settled() - before) / clients)
        for connection in connections:
            connection.close()
        found.sort()
        return [found[REPEATS * percent // 100] for percent in PERCENTILES]

    def remove(self) -> None:
        for member in self.members:
            member.remove()


def measure(folder: str, tree: str) -> Counts:
    """Run all loads."""
    figures = {}
    for count in (1, 3):
        counted = Counted(os.path.join(folder, str(count)), count, tree)
        try:
            for member in counted.members:
                member.wait_until_listening()
            port = leader_of(counted.members).port
            client = GoConnection(port)
            call(client, "Lease.LeaseGrant", proto.LeaseGrantRequest(ID=1, TTL=3600))
            for number in range(KEYS):
                call(client, "KV.Put", _put(number))
            client.close()
            for name, load in LOADS.items():
                if count == 1:
                    figures[name] = counted.per_request(port, *load)
                elif load[-1] == 1:  # With more clients, the counts vary too much.
                    figures[f"{count} members: {name}"] = counted.per_request(port, *load)
        finally:
            counted.remove()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Count bytecode instructions for each request.")
    parser.add_argument("--base", help="compare with this revision")
    options = parser.parse_args()
    (ROOT / "build").mkdir(exist_ok=True)
    folder = tempfile.mkdtemp(dir=ROOT / "build")
    try:
        now = measure(os.path.join(folder, "now"), str(ROOT))
        if not options.base:
            print("| instructions for each request | |\n|---|---|")
            print(*(f"| {load} | {counts[0]:,.0f} |" for load, counts in now.items()), sep="\n")
            return
        before = measure(os.path.join(folder, "before"), checked_out(options.base, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"| instructions for each request | {options.base} | now | ratio |\n|---|---|---|---|")
    for load, counts in now.items():
        ratio = f"{counts[0] / before[load][0]:.3f}"
        if has_changed(load, before[load], counts):
            ratio = f"**{ratio}**"
        print(f"| {load} | {before[load][0]:,.0f} | {counts[0]:,.0f} | {ratio} |")


def has_changed(load: str, before: list[float], now: list[float]) -> bool:
    """Whether it takes more instructions now at each percentile, or fewer at each."""
    is_steady = load in LOADS and LOADS[load][-1] == 1
    limit = CHANGED if is_steady else CHANGED_MUCH
    changes = [new / old - 1 for old, new in zip(before, now, strict=True)]
    return min(changes) > limit or max(changes) < -limit


if __name__ == "__main__":
    main()
