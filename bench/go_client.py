"""The load of etcd's benchmark tool, imitated for where that cannot be built: the same arguments,
for the commands that `real_clients.py` uses, and the same report.

Each client has one connection and one request in flight. After the data of an answer it sends, with
its next request, what grpc-go sends: WINDOW_UPDATE, and a PING unless one is unanswered (its
estimate of bandwidth). A keep-alive has a stream of its own, which is ended and cancelled after the
answer. `stm` gets a key, in a transaction, too, then puts it if it is still the same, until that
succeeds. One process serves all clients, so it is busy before a fast server is.
"""

from __future__ import annotations

import argparse
import random
import select
import struct
import time

from bench.clients import GrpcConnection, call
from etcdlite import methods, proto

_DATA, _HEADERS, _RST_STREAM, _PING, _WINDOW_UPDATE = 0, 1, 3, 6, 8
_CANCEL = struct.pack(">I", 8)
_BANDWIDTH_PING = b"\x02\x04\x10\x10\x09\x0e\x07\x07"


class GoConnection(GrpcConnection):
    """A connection that answers as grpc-go does."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.pings = 0
        """Unanswered."""
        self._open = self._left = 0
        """The stream of the keep-alive under way, and of the one before."""
        self.key, self.is_swapping = b"", False
        """Of the compare-and-swap under way: its key, and whether it has been read."""

    def _take_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _PING and flags & 1:
            self.pings -= 1
        if kind == _HEADERS and stream and stream == self._left:
            return  # Its trailers.
        super()._take_frame(kind, flags, stream, payload)
        if kind == _DATA and stream == self._open:
            self._replies.append((stream, bytes(self._bodies.pop(stream)[5:])))
            self._open, self._left = 0, stream

    def ask(self, method: methods.Method, body: bytes) -> None:
        """Send a request, behind the control frames for the answer before it."""
        frames = b""
        if self._unacknowledged_bytes:
            frames = _frame(_WINDOW_UPDATE, struct.pack(">I", self._unacknowledged_bytes))
            self._unacknowledged_bytes = 0
            if not self.pings:
                self.pings = 1
                frames += _frame(_PING, _BANDWIDTH_PING)
        if not method.client_stream:
            self._prefix = frames
            self.send([(method, body)])
            return
        if self._left:
            frames += _frame(_DATA, b"", 1, self._left) + _frame(
                _RST_STREAM, _CANCEL, 0, self._left
            )
        self._next_id += 2
        self._open = self._next_id
        message = struct.pack(">BI", 0, len(body)) + body
        frames += _frame(_HEADERS, self._header_block(method), 4, self._open)
        self.socket.sendall(frames + _frame(_DATA, message, 0, self._open))


def _frame(kind: int, payload: bytes, flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


class Requests:
    """What to send, by the arguments."""

    def __init__(self, options: argparse.Namespace) -> None:
        name = {
            "put": "KV.Put",
            "range": "KV.Range",
            "txn-put": "KV.Txn",
            "stm": "KV.Txn",
            "lease-keepalive": "Lease.LeaseKeepAlive",
        }[options.command]
        self.method = methods.METHOD_BY_NAME[name]
        self._options = options
        self._number = 0
        self._value = random.Random(1).randbytes(options.val_size)
        self.lease = 0

    def _put(self) -> proto.PutRequest:
        options = self._options
        number = self._number
        self._number += 1
        if options.command == "put" and not options.sequential_keys:
            number = random.randrange(options.key_space_size)
        key = b"%0*d" % (options.key_size, number % options.key_space_size)
        return proto.PutRequest(key=key, value=self._value)

    def next(self, client: GoConnection) -> bytes:
        """What begins the next operation."""
        options = self._options
        if options.command == "put":
            return self._put().encode()
        if options.command == "range":
            serializable = options.consistency == "s"
            return proto.RangeRequest(
                key=options.words[0].encode(),
                range_end=(options.words[1] if len(options.words) > 1 else "").encode(),
                serializable=serializable,
            ).encode()
        if options.command == "stm":
            client.key = b"%016d" % random.randrange(options.keys)
            return _get(client.key).encode()
        if options.command == "txn-put":
            puts = [proto.RequestOp(request_put=self._put()) for _ in range(options.txn_ops)]
            return proto.TxnRequest(success=puts).encode()
        return proto.LeaseKeepAliveRequest(ID=self.lease).encode()

    def goes_on(self, client: GoConnection, reply: bytes) -> bool:
        """Send what the operation needs after this answer. False if it is done."""
        if self._options.command != "stm":
            return False
        client.is_swapping = not client.is_swapping
        if client.is_swapping:
            found = proto.TxnResponse.decode(reply).responses[0].response_range.kvs
            compare = proto.Compare(
                result=proto.Compare.EQUAL,
                target=proto.Compare.MOD,
                key=client.key,
                mod_revision=found[0].mod_revision if found else 0,
            )
            put = proto.PutRequest(key=client.key, value=self._value)
            swap = proto.TxnRequest(compare=[compare], success=[proto.RequestOp(request_put=put)])
            client.ask(self.method, swap.encode())
        elif proto.TxnResponse.decode(reply).succeeded:
            return False
        else:
            client.ask(self.method, _get(client.key).encode())
        return True


def _get(key: bytes) -> proto.TxnRequest:
    """As etcd's library for transactions reads."""
    get = proto.RangeRequest(key=key, serializable=True)
    return proto.TxnRequest(success=[proto.RequestOp(request_range=get)])


def run(options: argparse.Namespace) -> tuple[list[float], float]:
    """The latencies in seconds, sorted, and how long it all took."""
    port = int(options.endpoints.split(",")[0].rpartition(":")[2])
    requests = Requests(options)
    clients = [GoConnection(port) for _ in range(options.clients)]
    if options.command == "lease-keepalive":
        requests.lease = call(clients[0], "Lease.LeaseGrant", proto.LeaseGrantRequest(TTL=100)).ID
    poll = select.poll()
    by_fd = {}
    sent_at = {}
    left = options.total
    latencies: list[float] = []
    began = time.perf_counter()
    for client in clients[:left]:
        fd = client.socket.fileno()
        by_fd[fd] = client
        poll.register(fd, select.POLLIN)
        sent_at[fd] = time.perf_counter()
        client.ask(requests.method, requests.next(client))
        left -= 1
    while len(latencies) < options.total:
        for fd, _ in poll.poll():
            client = by_fd[fd]
            replies = client.receive_once()
            if not replies or requests.goes_on(client, replies[0][1]):
                continue
            now = time.perf_counter()
            latencies.append(now - sent_at[fd])
            if left:
                left -= 1
                sent_at[fd] = now
                client.ask(requests.method, requests.next(client))
    took_s = time.perf_counter() - began
    for client in clients:
        client.close()
    return sorted(latencies), took_s


def main() -> None:
    parser = argparse.ArgumentParser(description="Imitate etcd's benchmark tool.")
    parser.add_argument(
        "command",
        choices=["put", "range", "txn-put", "stm", "lease-keepalive"],
        help="what to send",
    )
    parser.add_argument("words", nargs="*", help="range: the key, or where it begins and ends")
    parser.add_argument("--endpoints", default="127.0.0.1:2379")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--conns", type=int, default=1, help="ignored: one for each client")
    parser.add_argument("--total", type=int, default=10_000)
    parser.add_argument("--key-size", type=int, default=8)
    parser.add_argument("--val-size", type=int, default=8)
    parser.add_argument("--key-space-size", type=int, default=1)
    parser.add_argument("--sequential-keys", action="store_true")
    parser.add_argument("--txn-ops", type=int, default=1)
    parser.add_argument("--consistency", default="l")
    parser.add_argument("--keys", type=int, default=1, help="stm: the number of keys")
    parser.add_argument("--txn-wr-percent", type=int, default=100, help="stm: no other percentage")
    parser.add_argument(
        "--precise", action="store_true", help="ignored: figures are always precise"
    )
    latencies, took_s = run(parser.parse_args())
    print(f"  Slowest:\t{latencies[-1]} secs.")
    print(f"  Requests/sec:\t{len(latencies) / took_s}")
    for percent in (50, 99):
        print(f"  {percent}% in {latencies[len(latencies) * percent // 100]} secs.")


if __name__ == "__main__":
    main()
