"""Three members on one machine: puts through the leader and through all, and how long no write
succeeds after the leader is killed (SIGKILL) or falls silent (SIGSTOP).

Both servers get the same flags, the same load generator (h2load over gRPC, 100 connections of 10
streams) and the same clients. The members, the load and the disk share the machine, so the rates
are those of a small machine that does everything; CPU per put is that of all members together.

After the signal, one put is sent to each of the other members every `RETRY_S`, whether or not the
earlier ones have an answer. The time from the signal to the first acknowledged put counts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from bench.clients import CallFailed, Connection, call, connect
from bench.h2load import h2load, message
from bench.native_load import key_of, value_of
from bench.servers import QUOTA_BYTES, Server, etcd_binary, free_port
from etcdlite import methods, proto

MEMBERS = 3
SPLIT = (99, 10)
RETRY_S = 0.02
KILLS = 20


class ClusterMember(Server):
    """One of three."""

    def __init__(
        self,
        name: str,
        folder: str,
        number: int,
        peer_ports: list[int],
        flags: Sequence[str] = (),
    ) -> None:
        super().__init__(name, os.path.join(folder, f"member-{number}"))
        peer_url = f"http://127.0.0.1:{peer_ports[number]}"
        client_url = f"http://127.0.0.1:{self.port}"
        cluster = ",".join(f"m{n}=http://127.0.0.1:{port}" for n, port in enumerate(peer_ports))
        program = [etcd_binary()] if name == "etcd" else self._command[:3]
        self._command = [
            *program,
            f"--name=m{number}",
            f"--data-dir={self.data_dir}",
            f"--listen-client-urls={client_url}",
            f"--advertise-client-urls={client_url}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster={cluster}",
            f"--quota-backend-bytes={QUOTA_BYTES}",
            "--log-level=error",
            *flags,
        ]


def leader_of(members: list[ClusterMember]) -> ClusterMember:
    """The member that leads, when one does."""
    while True:
        for member in members:
            if member.process is None or member.process.poll() is not None:
                continue
            try:
                connection = connect(member.name, member.port)
                status = call(connection, "Maintenance.Status", proto.StatusRequest())
                connection.close()
            except (CallFailed, OSError):
                continue
            if status.leader and status.leader == status.header.member_id:
                return member
        time.sleep(0.05)


def _put(member: ClusterMember, requests: int, split: tuple[int, int], folder: str) -> float:
    body = proto.PutRequest(key=key_of(0), value=value_of(0)).encode()
    own_folder = os.path.join(folder, f"load-{member.port}")
    os.makedirs(own_folder, exist_ok=True)
    return h2load(member, "KV.Put", message(body), requests, split, own_folder)


def _put_through_all(members: list[ClusterMember], requests: int, folder: str) -> float:
    split = (SPLIT[0] // MEMBERS, SPLIT[1])
    with ThreadPoolExecutor(MEMBERS) as pool:
        began = time.perf_counter()
        list(pool.map(lambda m: _put(m, requests // MEMBERS, split, folder), members))
        return requests / (time.perf_counter() - began)


def time_to_write_s(
    members: list[ClusterMember], leader: ClusterMember, signum: int = signal.SIGKILL
) -> float:
    """Send the signal to the leader. Returns the time until another member acknowledges a put."""
    rest = [member for member in members if member is not leader]
    connections: dict[str, Connection] = {m.data_dir: connect(m.name, m.port) for m in rest}
    put = (
        methods.METHOD_BY_NAME["KV.Put"],
        proto.PutRequest(key=key_of(0), value=value_of(0)).encode(),
    )
    assert leader.process is not None
    leader.process.send_signal(signum)
    began = time.perf_counter()
    while True:
        until = time.perf_counter() + RETRY_S
        for member in rest:
            try:
                connections[member.data_dir].send([put])
            except (CallFailed, OSError):
                connections[member.data_dir] = connect(member.name, member.port)
        while (left := until - time.perf_counter()) > 0:
            for member in rest:
                connection = connections[member.data_dir]
                connection.socket.settimeout(max(0.001, left / len(rest) / 4))
                try:
                    if connection.receive_once():
                        took_s = time.perf_counter() - began
                        for open_connection in connections.values():
                            open_connection.close()
                        return took_s
                except TimeoutError:
                    continue
                except (CallFailed, OSError):
                    connection.close()
                    connections[member.data_dir] = connect(member.name, member.port)


@contextlib.contextmanager
def started(name: str, folder: str, flags: Sequence[str] = ()) -> Iterator[list[ClusterMember]]:
    """Members that serve, until the end of the block."""
    peer_ports = [free_port() for _ in range(MEMBERS)]
    members = [ClusterMember(name, folder, n, peer_ports, flags) for n in range(MEMBERS)]
    try:
        for member in members:
            member.start()
        for member in members:
            member.wait_until_listening()
        yield members
    finally:
        for member in members:
            member.remove()


def measure(name: str, folder: str, scale: float) -> dict[str, float]:
    """One round with one server. `scale` 1.0 takes about a minute."""
    figures: dict[str, float] = {}
    with started(name, folder) as members:
        leader = leader_of(members)
        puts = int(100_000 * scale)
        _put(leader, puts // 10, SPLIT, folder)
        before = sum(member.cpu_s() for member in members)
        figures["leader_put_per_s"] = _put(leader, puts, SPLIT, folder)
        figures["leader_put_cpu_us"] = (
            (sum(member.cpu_s() for member in members) - before) / puts * 1e6
        )
        before = sum(member.cpu_s() for member in members)
        figures["all_put_per_s"] = _put_through_all(members, puts, folder)
        figures["all_put_cpu_us"] = (
            (sum(member.cpu_s() for member in members) - before) / puts * 1e6
        )
        figures["rss_mib"] = max(member.memory_kib()["VmRSS"] for member in members) / 1024
        for what, signum in (("failover", signal.SIGKILL), ("silent", signal.SIGSTOP)):
            times = []
            for _ in range(max(3, int(KILLS * scale))):
                leader = leader_of(members)
                # All members are up to date before the next signal.
                time.sleep(1.0)
                times.append(time_to_write_s(members, leader, signum) * 1000)
                if signum == signal.SIGKILL:
                    leader.kill()
                    leader.start()
                    leader.wait_until_listening()
                else:
                    assert leader.process is not None
                    leader.process.send_signal(signal.SIGCONT)
            figures[f"{what}_p50_ms"] = statistics.median(times)
            figures[f"{what}_max_ms"] = max(times)
    return figures
