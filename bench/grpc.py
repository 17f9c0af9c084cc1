"""gRPC against gRPC: what clients of etcd get, from the same load generator on both servers.

h2load (C, Debian's nghttp2-client) sends the same bodies to both, over 100 connections of 10
streams: puts, ranges of one key and transactions (a compare and a put); with one connection and one
stream for one client that asks one thing at a time; and keep-alives, `KEEP_ALIVES` messages to a
stream.
Latencies are h2load's own, of every request. The fan-out is measured by this process: `WATCHERS`
watches of one key on `WATCH_CONNECTIONS` connections; a put is sent, and the next one when all of
them have its event.
"""

from __future__ import annotations

import resource
import select
import statistics
import struct
import time

from bench.clients import GrpcConnection, call
from bench.h2load import h2load_timed, message
from bench.native_load import key_of, value_of
from bench.servers import Server
from etcdlite import methods, proto

SPLIT = (100, 10)
KEEP_ALIVES = 100
WATCHERS = 1000
WATCH_CONNECTIONS = 20
FAN_OUT_PUTS = 200

_DATA = 0


UNARY_LOADS = (
    # (what, method, connections and streams, requests)
    ("put, 1,000 in flight", "KV.Put", SPLIT, 60_000),
    ("range, 1,000 in flight", "KV.Range", SPLIT, 100_000),
    ("put, one in flight", "KV.Put", (1, 1), 2_000),
    ("range, one in flight", "KV.Range", (1, 1), 2_000),
)


def unary_rates(server: Server, folder: str, scale: float, token: str = "") -> dict[str, float]:
    """Requests per second, and the CPU of server and client per request in µs, of each of
    `UNARY_LOADS`. A server that uses several cores shares them with the client; one that uses one
    core answers at most as many requests as fit into it."""
    found = {}
    contents = {
        "KV.Put": message(proto.PutRequest(key=key_of(0), value=value_of(0)).encode()),
        "KV.Range": message(proto.RangeRequest(key=key_of(0)).encode()),
    }
    h2load_timed(server, "KV.Put", contents["KV.Put"], int(10_000 * scale), SPLIT, folder, token)
    for what, method, split, requests in UNARY_LOADS:
        count = int(requests * scale)
        cpu, client_cpu = server.cpu_s(), _clients_cpu_s()
        rate, _ = h2load_timed(server, method, contents[method], count, split, folder, token)
        found[f"{what}/s"] = rate
        found[f"{what}, server CPU µs"] = (server.cpu_s() - cpu) / count * 1e6
        found[f"{what}, client CPU µs"] = (_clients_cpu_s() - client_cpu) / count * 1e6
    return found


def _clients_cpu_s() -> float:
    """The CPU time of all programs that were run to their end."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def print_rates(rounds: dict[str, list[dict[str, float]]], ours: str, theirs: str) -> None:
    """The medians of `unary_rates`, kind by kind, and of the ratios of two kinds, as a table."""
    print(f"| gRPC | {' | '.join(rounds)} | {ours} / {theirs} |")
    print("|---" * (len(rounds) + 2) + "|")
    for what in rounds[ours][0]:
        cells = [statistics.median(one[what] for one in figures) for figures in rounds.values()]
        ratio = statistics.median(
            one[what] / other[what] for one, other in zip(rounds[ours], rounds[theirs], strict=True)
        )
        print(f"| {what} | " + " | ".join(f"{cell:,.0f}" for cell in cells) + f" | {ratio:.2f} |")


def _load(
    figures: dict[str, float],
    name: str,
    server: Server,
    method_name: str,
    body: bytes,
    requests: int,
    folder: str,
) -> None:
    cpu = server.cpu_s()
    rate, latencies = h2load_timed(server, method_name, message(body), requests, SPLIT, folder)
    figures[f"{name}_per_s"] = rate
    figures[f"{name}_cpu_us"] = (server.cpu_s() - cpu) / requests * 1e6
    figures[f"{name}_p99_us"] = latencies[len(latencies) * 99 // 100]


class Watchers(GrpcConnection):
    """A connection with watches that only counts their events."""

    def __init__(self, port: int, watches: int, key: bytes) -> None:
        super().__init__(port)
        self.frames = 0
        create = proto.WatchCreateRequest(key=key)
        request = message(proto.WatchRequest(create_request=create).encode())
        method = methods.METHOD_BY_NAME["Watch.Watch"]
        out = []
        for _ in range(watches):
            self._next_id += 2
            header = self._header_block(method)
            out.append(_frame(1, 4, self._next_id, header))
            out.append(_frame(_DATA, 0, self._next_id, request))
        self.socket.sendall(b"".join(out))
        self.wait(watches)

    def wait(self, frames: int) -> None:
        """Until that many messages have come."""
        while self.frames < frames:
            self._read_frames()
        self.frames -= frames

    def _skip(self, pending: bytearray) -> int:
        # The events of a put are alike, and to look at each would take longer than to send it.
        if len(pending) < 9 or pending[3] != _DATA:
            return 0
        size = 9 + int.from_bytes(pending[:3], "big")
        count = len(pending) // size
        for at in range(5):
            if pending[at : count * size : size].count(pending[at]) != count:
                return 0
        self.frames += count
        self._unacknowledged_bytes += count * (size - 9)
        return count * size

    def _take_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            self.frames += 1
            self._unacknowledged_bytes += len(payload)
        else:
            super()._take_frame(kind, flags, stream, payload)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def fan_out(server: Server, puts: int) -> tuple[float, float]:
    """Events per second, and the median time in milliseconds until the last watcher has one."""
    each = WATCHERS // WATCH_CONNECTIONS
    key = b"fan-out"
    watchers = [Watchers(server.port, each, key) for _ in range(WATCH_CONNECTIONS)]
    by_fd = {watcher.socket.fileno(): watcher for watcher in watchers}
    client = GrpcConnection(server.port)
    times = []
    for number in range(puts):
        began = time.perf_counter()
        call(client, "KV.Put", proto.PutRequest(key=key, value=b"%d" % number))
        waiting = dict(by_fd)
        while waiting:
            for fd in select.select(list(waiting), [], [])[0]:
                waiting[fd]._read_frames()
                if waiting[fd].frames >= each:
                    waiting[fd].frames -= each
                    del waiting[fd]
        times.append(time.perf_counter() - began)
    for connection in (*watchers, client):
        connection.close()
    return WATCHERS * puts / sum(times), sorted(times)[len(times) // 2] * 1000


def measure(name: str, folder: str, scale: float) -> dict[str, float]:
    """One round with one server. `scale` 1.0 takes about half a minute."""
    figures: dict[str, float] = {}
    put = proto.PutRequest(key=key_of(0), value=value_of(0))
    get = proto.RangeRequest(key=key_of(0))
    compare = proto.Compare(
        result=proto.Compare.GREATER,
        target=proto.Compare.VERSION,
        key=key_of(0),
        version=0,
    )
    txn = proto.TxnRequest(compare=[compare], success=[proto.RequestOp(request_put=put)])
    with Server(name, folder) as server:
        h2load_timed(server, "KV.Put", message(put.encode()), int(20_000 * scale), SPLIT, folder)
        for kind, method_name, request, requests in (
            ("put", "KV.Put", put, 200_000),
            ("range", "KV.Range", get, 300_000),
            ("txn", "KV.Txn", txn, 100_000),
        ):
            count = int(requests * scale)
            _load(figures, kind, server, method_name, request.encode(), count, folder)
        for kind, method_name, request in (
            ("one_put", "KV.Put", put),
            ("one_range", "KV.Range", get),
        ):
            count = int(5_000 * scale)
            content = message(request.encode())
            rate, latencies = h2load_timed(server, method_name, content, count, (1, 1), folder)
            figures[f"{kind}_per_s"] = rate
            figures[f"{kind}_p99_us"] = latencies[len(latencies) * 99 // 100]
        client = GrpcConnection(server.port)
        lease = call(client, "Lease.LeaseGrant", proto.LeaseGrantRequest(TTL=3600)).ID
        client.close()
        keep_alive = message(proto.LeaseKeepAliveRequest(ID=lease).encode())
        streams = int(3_000 * scale)
        cpu = server.cpu_s()
        rate, _ = h2load_timed(
            server, "Lease.LeaseKeepAlive", keep_alive * KEEP_ALIVES, streams, SPLIT, folder
        )
        figures["keep_alives_per_s"] = rate * KEEP_ALIVES
        figures["keep_alive_cpu_us"] = (server.cpu_s() - cpu) / streams / KEEP_ALIVES * 1e6
        figures["events_per_s"], figures["fan_out_ms"] = fan_out(
            server, max(20, int(FAN_OUT_PUTS * scale))
        )
    return figures
