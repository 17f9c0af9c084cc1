"""The longest turns of the loop in the situations that come seldom: prints a Markdown table.

    python -m bench.turns [NAME ...]     all situations, about six minutes, or those named

Three members run under a wrapper that measures the CPU time of each turn (`time.thread_time`, so
another process on the machine does not count) and notes where a turn over `SLOW_S` spends it. No
turn should take over 20 ms.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from bench.clients import Connection, call, connect, pipeline
from bench.cluster import ClusterMember, leader_of
from bench.servers import Server, free_port, stopped
from etcdlite import methods, proto
from etcdlite.client import Client

KEYS = 100_000
SLOW_S = 0.01
SAMPLE_S = 0.003
MAX_TURN_MS = 20.0
TURNS_FILE = "TURNS_FILE"
VALUE, DESCEND = 4, proto.RangeRequest.DESCEND
FLAGS = ("--log-level=warn", "--wal-segment-bytes=4MiB", "--segment-bytes=16MiB")


def serve(flags: list[str]) -> int:
    """Run a member, and write each turn over `SLOW_S` to the file: the time of its end, its CPU
    time in ms, and where it was found."""
    from etcdlite import __main__, server

    began, places = [0.0], []
    main = threading.get_ident()

    def sample() -> None:
        while True:
            time.sleep(SAMPLE_S)
            if began[0] and time.monotonic() - began[0] > SLOW_S / 2:
                frame, names = sys._current_frames().get(main), []
                while frame is not None and len(names) < 6:
                    names.append(frame.f_code.co_name)
                    frame = frame.f_back
                places.append(" < ".join(names))

    turn, serve_ready = server.Server._turn, server.Connections.serve

    def measured(self: Any) -> None:
        places.clear()
        cpu_s = time.thread_time()
        turn(self)
        began[0] = 0.0
        took_s = time.thread_time() - cpu_s
        if took_s > SLOW_S:
            place = max(places, key=places.count, default="")
            output.write(f"{time.monotonic()} {took_s * 1000:.1f} {place}\n")

    def ready(self: Any, *args: Any) -> None:
        began[0] = time.monotonic()  # After the wait for sockets.
        serve_ready(self, *args)

    server.Server._turn = measured  # type: ignore[method-assign]
    server.Connections.serve = ready  # type: ignore[method-assign]
    threading.Thread(target=sample, daemon=True).start()
    with open(os.environ[TURNS_FILE], "a", buffering=1) as output:
        return __main__.main(flags)


class Cluster:
    """The members, and the turns that they have noted."""

    def __init__(self, folder: str, count: int) -> None:
        self.is_right = True
        ports = [free_port() for _ in range(count)]
        self.members = [ClusterMember("etcdlite", folder, n, ports, FLAGS) for n in range(count)]
        for member in self.members:
            member._command[1:3] = ["-m", "bench.turns", "--member"]

    def start(self, member: Server) -> None:
        os.makedirs(os.path.dirname(member.data_dir), exist_ok=True)
        os.environ[TURNS_FILE] = member.data_dir + ".turns"
        member.start()

    @property
    def leader(self) -> ClusterMember:
        return leader_of(self.members)

    @property
    def follower(self) -> ClusterMember:
        leader = self.leader
        return next(member for member in self.members if member is not leader)

    @contextlib.contextmanager
    def phase(self, name: str, after_s: float = 1.0) -> Iterator[None]:
        """Print the longest turns of the block."""
        began = time.monotonic()
        yield
        time.sleep(after_s)
        found: list[tuple[float, str, str]] = []
        for member in self.members:
            with contextlib.suppress(FileNotFoundError), open(member.data_dir + ".turns") as lines:
                for line in lines:
                    at, took_ms, place = line.rstrip("\n").split(" ", 2)
                    if float(at) >= began:
                        found.append((float(took_ms), os.path.basename(member.data_dir), place))
        found.sort(reverse=True)
        worst = found[0][0] if found else 0.0
        self.is_right &= worst <= MAX_TURN_MS
        shown = f"{worst:.0f}" if found else f"under {SLOW_S * 1000:.0f}"
        over = sum(took > MAX_TURN_MS for took, _, _ in found)
        print(f"| {name} | {shown} | {over} | {found[0][2] if found else ''} |", flush=True)
        if "-v" in sys.argv:
            for took, _, place in found[:12]:
                print("      ", took, place, flush=True)


def ask(member: Server, method: str, request: Any) -> Any:
    connection = connect(member.name, member.port)
    try:
        return call(connection, method, request)
    finally:
        connection.close()


def ask_all(member: Server, method: str, bodies: Iterator[bytes], in_flight: int = 500) -> None:
    connection = connect(member.name, member.port)
    pipeline([connection], method, bodies, in_flight)
    connection.close()


def puts(count: int, prefix: bytes = b"key/", size_bytes: int = 100) -> Iterator[bytes]:
    return (
        proto.PutRequest(key=prefix + b"%07d" % n, value=bytes(size_bytes)).encode()
        for n in range(count)
    )


def writes(cluster: Cluster) -> None:
    leader = cluster.leader
    with cluster.phase(f"put {KEYS} keys, new segments of the log"):
        ask_all(leader, "KV.Put", puts(KEYS))
    with cluster.phase("checkpoint (defragment)", 5.0):
        ask(leader, "Maintenance.Defragment", proto.DefragmentRequest())
    with cluster.phase("defragment on a follower", 5.0):
        ask(cluster.follower, "Maintenance.Defragment", proto.DefragmentRequest())
    with cluster.phase("a transaction of 15 puts of 100 KB, ten times"):
        ops = [
            proto.RequestOp(request_put=proto.PutRequest(key=b"big/%d" % n, value=bytes(100_000)))
            for n in range(15)
        ]
        for _ in range(10):
            ask(leader, "KV.Txn", proto.TxnRequest(success=ops))
    with cluster.phase("30 puts of 1.4 MB at once"):
        ask_all(leader, "KV.Put", puts(30, b"large/", 1_400_000), 30)
    with cluster.phase("a transaction of 128 puts, a thousand times"):
        ops = [
            proto.RequestOp(request_put=proto.PutRequest(key=b"few/%d" % n, value=bytes(100)))
            for n in range(128)
        ]
        ask_all(leader, "KV.Txn", iter([proto.TxnRequest(success=ops).encode()] * 1000), 100)


def lists(cluster: Cluster) -> None:
    leader = cluster.leader
    with cluster.phase("a list of 42 MB (30 values of 1.4 MB)"):
        everything = proto.RangeRequest(key=b"large/", range_end=b"large0")
        ask(leader, "KV.Range", everything)
    with cluster.phase("the same, sorted by values, over gRPC"):
        by_value = proto.RangeRequest(
            key=b"large/", range_end=b"large0", sort_target=VALUE, sort_order=DESCEND
        )
        connection = connect("etcd", leader.port)
        call(connection, "KV.Range", by_value)
        connection.close()
    with cluster.phase("the same, in JSON"):
        body = b'{"key":"bGFyZ2Uv","range_end":"bGFyZ2Uw"}'
        urllib.request.urlopen(f"http://127.0.0.1:{leader.port}/v3/kv/range", body).read()
    with cluster.phase("the same, in a transaction that writes"):
        put = proto.RequestOp(request_put=proto.PutRequest(key=b"other", value=b"v"))
        ops = [proto.RequestOp(request_range=everything), put]
        ask(leader, "KV.Txn", proto.TxnRequest(success=ops))
    with cluster.phase("a list of 100,000 keys"):
        ask(leader, "KV.Range", proto.RangeRequest(key=b"key/", range_end=b"key0"))
    with cluster.phase("a transaction of 128 ranges of 100 keys"):
        ops = [
            proto.RequestOp(
                request_range=proto.RangeRequest(
                    key=b"key/%07d" % (n * 100), range_end=b"key/%07d" % (n * 100 + 100)
                )
            )
            for n in range(128)
        ]
        ask_all(leader, "KV.Txn", iter([proto.TxnRequest(success=ops).encode()] * 20), 10)


def checks(cluster: Cluster) -> None:
    for member in (cluster.leader, cluster.follower):
        with cluster.phase("HashKV"):
            ask(member, "Maintenance.HashKV", proto.HashKVRequest())
    with cluster.phase("alarm"):
        alarm = proto.AlarmRequest(action=proto.AlarmRequest.ACTIVATE, alarm=1)
        ask(cluster.leader, "Maintenance.Alarm", alarm)
        alarm.action = proto.AlarmRequest.DEACTIVATE
        ask(cluster.leader, "Maintenance.Alarm", alarm)


def idle(cluster: Cluster) -> None:
    leader = cluster.leader
    method = methods.METHOD_BY_NAME["KV.Range"]
    body = proto.RangeRequest(key=b"a").encode()
    for name, protocol in (("etcd", "gRPC"), ("etcdlite", "native")):
        with cluster.phase(f"4,000 idle {protocol} connections", 3.0):
            connections = [connect(name, leader.port) for _ in range(4000)]
        with cluster.phase("each of them asks", 1.0), stopped(leader):
            for connection in connections:
                connection.send([(method, body)])
        for connection in connections:
            connection.receive()
        with cluster.phase("all close", 1.0), stopped(leader):
            for connection in connections:
                connection.close()
    with cluster.phase("4,000 connections with a watch of one key"):
        created = proto.WatchCreateRequest(key=b"a")
        create = proto.WatchRequest(create_request=created).encode()
        connections = [connect(leader.name, leader.port) for _ in range(4000)]
        for connection in connections:
            connection.send([(methods.METHOD_BY_NAME["Watch.Watch"], create)])
    with cluster.phase("a put that they all see"):
        ask(leader, "KV.Put", proto.PutRequest(key=b"a", value=b"v"))
    for connection in connections:
        connection.close()


def metrics(cluster: Cluster) -> None:
    leader = cluster.leader
    for _ in range(2):
        with cluster.phase("/metrics"):
            urllib.request.urlopen(f"http://127.0.0.1:{leader.port}/metrics").read()
    with cluster.phase("/metrics with 1,000 connections, ten times"):
        connections = [connect(leader.name, leader.port) for _ in range(1000)]
        for _ in range(10):
            urllib.request.urlopen(f"http://127.0.0.1:{leader.port}/metrics").read()
        for connection in connections:
            connection.close()


def leases(cluster: Cluster) -> None:
    leader = cluster.leader
    with cluster.phase("grant 100,000 leases"):
        grants = (proto.LeaseGrantRequest(ID=n, TTL=600).encode() for n in range(1, 100_001))
        ask_all(leader, "Lease.LeaseGrant", grants)
    with cluster.phase("the list of the leases"):
        ask(leader, "Lease.LeaseLeases", proto.LeaseLeasesRequest())
    with cluster.phase("the same, in JSON"):
        url = f"http://127.0.0.1:{leader.port}/v3/lease/leases"
        urllib.request.urlopen(url, b"{}").read()
    with cluster.phase("leader change with them", 5.0):
        move_leader(cluster)
    with cluster.phase("20,000 leases with a key expire", 30.0):
        leader = cluster.leader
        grants = (proto.LeaseGrantRequest(ID=n, TTL=15).encode() for n in range(200_001, 220_001))
        ask_all(leader, "Lease.LeaseGrant", grants)
        bodies = (
            proto.PutRequest(key=b"leased/%d" % n, value=b"v", lease=n).encode()
            for n in range(200_001, 220_001)
        )
        ask_all(leader, "KV.Put", bodies)
    with cluster.phase("revoke a lease of 50,000 keys"):
        ask(leader, "Lease.LeaseGrant", proto.LeaseGrantRequest(ID=999_999, TTL=600))
        bodies = (
            proto.PutRequest(key=b"one/%d" % n, value=b"v", lease=999_999).encode()
            for n in range(50_000)
        )
        ask_all(leader, "KV.Put", bodies)
        ask(leader, "Lease.LeaseRevoke", proto.LeaseRevokeRequest(ID=999_999))


def timeouts(cluster: Cluster) -> None:
    """Requests that wait for a quorum, and then for their end."""
    leader = cluster.leader
    others = [member for member in cluster.members if member is not leader]
    for member in others:
        member.kill()
    for name, request in (
        ("KV.Put", proto.PutRequest(key=b"waiting", value=bytes(50))),
        ("KV.Range", proto.RangeRequest(key=b"waiting")),
        ("Lease.LeaseTimeToLive", proto.LeaseTimeToLiveRequest(ID=1)),
    ):
        method, body = methods.METHOD_BY_NAME[name], request.encode()
        with cluster.phase(f"40,000 requests of {name} without a quorum", 12.0):
            connections = [connect(leader.name, leader.port) for _ in range(20)]
            for connection in connections:
                for _ in range(10):
                    connection.send([(method, body)] * 200)
        for connection in connections:
            connection.close()
    with cluster.phase("the others return", 4.0):
        for member in others:
            cluster.start(member)


def move_leader(cluster: Cluster) -> None:
    leader, follower = cluster.leader, cluster.follower
    target = ask(follower, "Maintenance.Status", proto.StatusRequest()).header.member_id
    ask(leader, "Maintenance.MoveLeader", proto.MoveLeaderRequest(targetID=target))


def watches(cluster: Cluster) -> None:
    leader = cluster.leader
    connection = connect(leader.name, leader.port)
    streams: list[Connection] = [connection]
    with cluster.phase("20,000 watches are created on 20 connections"):
        method = methods.METHOD_BY_NAME["Watch.Watch"]
        for first in range(20):
            stream = connect(leader.name, leader.port)
            streams.append(stream)
            for some in range(0, 1000, 200):
                stream.send(
                    [
                        (
                            method,
                            proto.WatchRequest(
                                create_request=proto.WatchCreateRequest(
                                    key=b"w/%d" % (first * 1000 + n)
                                )
                            ).encode(),
                        )
                        for n in range(some, some + 200)
                    ]
                )
    with cluster.phase("leader change with them", 3.0):
        move_leader(cluster)
    with cluster.phase("their connections are closed", 3.0):
        for stream in streams:
            stream.close()
    with cluster.phase("1,000 watches of a range, created in one read on one stream"):
        raw = connect(leader.name, leader.port)
        create = proto.WatchRequest(
            create_request=proto.WatchCreateRequest(key=b"key/", range_end=b"key0")
        ).encode()
        raw.send([(method, create)] * 1000)
    with cluster.phase("a put that they all see"):
        ask(leader, "KV.Put", proto.PutRequest(key=b"key/x", value=bytes(1000)))
    raw.close()


def deletes(cluster: Cluster) -> None:
    leader = cluster.leader
    watch = connect(leader.name, leader.port)
    created = proto.WatchCreateRequest(key=b"\0", range_end=b"\0", prev_kv=True)
    watch_method = methods.METHOD_BY_NAME["Watch.Watch"]
    watch.send([(watch_method, proto.WatchRequest(create_request=created).encode())])
    watch.receive()
    with cluster.phase("delete 42 MB (30 values) with prev_kv and a watch", 0.0):
        everything = proto.DeleteRangeRequest(key=b"large/", range_end=b"large0", prev_kv=True)
        ask(leader, "KV.DeleteRange", everything)
        watch.receive()
    watch.close()
    with cluster.phase("delete 50,000 keys with prev_kv", 3.0):
        ask(
            leader,
            "KV.DeleteRange",
            proto.DeleteRangeRequest(key=b"key/", range_end=b"key/0050000", prev_kv=True),
        )
    with cluster.phase("delete the other 50,000", 3.0):
        ask(leader, "KV.DeleteRange", proto.DeleteRangeRequest(key=b"key/", range_end=b"key0"))
    with cluster.phase("compaction of all that", 10.0):
        revision = ask(leader, "KV.Put", proto.PutRequest(key=b"other", value=b"v")).header.revision
        ask(leader, "KV.Compact", proto.CompactionRequest(revision=revision))


def away(cluster: Cluster) -> None:
    follower = cluster.follower
    others = [member for member in cluster.members if member is not follower]
    follower.kill()
    with cluster.phase("a follower is dead"):
        ask_all(leader_of(others), "KV.Put", puts(5_000, b"short/"))
    with cluster.phase("it catches up with 5,000 entries", 4.0):
        cluster.start(follower)
    follower.kill()
    leader = leader_of(others)
    with cluster.phase("it is dead for 100,000 single puts", 3.0):
        for _ in range(10):
            ask_all(leader, "KV.Put", puts(10_000, b"long/", 800), 200)
    with cluster.phase("it starts and catches up (a snapshot, if the log is released)", 15.0):
        cluster.start(follower)
    leader = cluster.leader
    with cluster.phase("the leader falls silent and returns", 4.0), stopped(leader):
        time.sleep(3.0)


def starts(cluster: Cluster) -> None:
    for member in cluster.members:
        member.kill()
    with cluster.phase("all start again", 8.0):
        for member in cluster.members:
            cluster.start(member)


def membership(cluster: Cluster) -> None:
    leader = cluster.leader
    with cluster.phase("a learner is added", 2.0):
        url = f"http://127.0.0.1:{free_port()}"
        added = ask(
            leader, "Cluster.MemberAdd", proto.MemberAddRequest(peerURLs=[url], isLearner=True)
        )
    with cluster.phase("it is updated and removed", 2.0):
        new_id = added.member.ID
        url = f"http://127.0.0.1:{free_port()}"
        ask(leader, "Cluster.MemberUpdate", proto.MemberUpdateRequest(ID=new_id, peerURLs=[url]))
        ask(leader, "Cluster.MemberRemove", proto.MemberRemoveRequest(ID=new_id))


def users(cluster: Cluster) -> None:
    leader = cluster.leader
    with cluster.phase("2,000 users, and 200 roles with 20 permissions each", 2.0):
        options = proto.UserAddOptions(no_password=True)
        bodies = (
            proto.AuthUserAddRequest(name=f"user{n}", options=options).encode()
            for n in range(2_000)
        )
        ask_all(leader, "Auth.UserAdd", bodies)
        bodies = (proto.AuthRoleAddRequest(name=f"role{n}").encode() for n in range(200))
        ask_all(leader, "Auth.RoleAdd", bodies)
        bodies = (
            proto.AuthRoleGrantPermissionRequest(
                name=f"role{n // 20}",
                perm=proto.Permission(permType=2, key=b"p%05d" % n, range_end=b"p%05d" % (n + 1)),
            ).encode()
            for n in range(4_000)
        )
        ask_all(leader, "Auth.RoleGrantPermission", bodies)
        bodies = (
            proto.AuthUserGrantRoleRequest(user=f"user{n % 2000}", role=f"role{n % 200}").encode()
            for n in range(2_000)
        )
        ask_all(leader, "Auth.UserGrantRole", bodies)
        bodies = (
            proto.AuthUserGrantRoleRequest(user="user7", role=f"role{n}").encode()
            for n in range(200)
            if n != 7
        )
        ask_all(leader, "Auth.UserGrantRole", bodies)
    with cluster.phase("authentication is enabled"):
        ask(leader, "Auth.UserAdd", proto.AuthUserAddRequest(name="root", password="x"))
        ask(leader, "Auth.RoleAdd", proto.AuthRoleAddRequest(name="root"))
        ask(leader, "Auth.UserGrantRole", proto.AuthUserGrantRoleRequest(user="root", role="root"))
        ask(leader, "Auth.AuthEnable", proto.AuthEnableRequest())
    with (
        cluster.phase("login, the list of users, disabled"),
        Client(f"127.0.0.1:{leader.port}", user="root", password="x") as client,
    ):
        client.call("Auth.UserList", proto.AuthUserListRequest())
        client.call("Auth.RoleList", proto.AuthRoleListRequest())
        client.put("a", "b")
        client.call("Auth.AuthDisable", proto.AuthDisableRequest())


SITUATIONS: dict[str, Callable[[Cluster], None]] = {
    # In this order: some use what those before them have stored.
    situation.__name__: situation
    for situation in (
        users, idle, metrics, watches, writes, lists, checks, membership, leases, timeouts, deletes,
        away, starts,
    )
}  # fmt: skip


def main(words: list[str]) -> int:
    if words[:1] == ["--member"]:
        return serve(words[1:])
    names = [word for word in words if not word.startswith("-")] or list(SITUATIONS)
    print("| situation | worst turn, ms of CPU | over 20 ms | where |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(folder, 3)
        try:
            with cluster.phase("three members start", 3.0):
                for member in cluster.members:
                    cluster.start(member)
            for name in names:
                SITUATIONS[name](cluster)
        finally:
            for member in cluster.members:
                member.remove()
    return 0 if cluster.is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
