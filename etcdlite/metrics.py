"""The counts of one member that nothing else keeps; `wire/exposition.py` shows them.

They are plain attributes, made to be incremented where things happen, on the hottest paths too: an
increment costs 30 to 100 ns, an observation 0.2 us.

Invariants: a counter never goes back while the process lives; each figure is written by one thread
only, so no update is lost (the loop may read one half done: a sum without its count). What a client
may choose (the version it says it has) makes at most `MAX_CLIENT_VERSIONS` counts.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence

from etcdlite import methods, proto

MAX_CLIENT_VERSIONS = 32
"""Versions of clients that are told apart; the rest counts as "unknown"."""

UNKNOWN_VERSION = "unknown"


def doubling(first: float, count: int) -> tuple[float, ...]:
    """`count` bounds, each twice the one before."""
    return tuple(first * 2.0**at for at in range(count))


# Upper bounds of buckets. Those with etcd's names have etcd's bounds.
SYNC_BOUNDS_S = doubling(0.001, 14)
ROUND_TRIP_BOUNDS_S = doubling(0.0001, 16)
DEFRAGMENT_BOUNDS_S = doubling(0.1, 13)
SNAPSHOT_BOUNDS_S = doubling(0.01, 17)
HASH_BOUNDS_S = doubling(0.01, 15)
PAUSE_BOUNDS_MS = doubling(1, 13)
COMPACTION_BOUNDS_MS = doubling(100, 14)
LEASE_BOUNDS_S = doubling(1, 24)
SHORT_BOUNDS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
BATCH_BOUNDS = doubling(1, 13)
CHECKPOINT_BOUNDS_S = doubling(0.01, 14)


class Histogram:
    """Counts observations by size."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: the upper bounds of the buckets, ascending, each belonging to its bucket."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Rpc:
    """What one gRPC method was used for."""

    __slots__ = (
        "service", "name", "kind", "started", "succeeded", "failed", "received", "sent",
        "received_bytes", "sent_bytes",
    )  # fmt: skip

    def __init__(self, grpc_path: str, is_client_stream: bool, is_server_stream: bool) -> None:
        self.service, self.name = grpc_path.rpartition("/")[::2]
        self.service = self.service.lstrip("/")
        self.kind = {
            (False, False): "unary",
            (True, False): "client_stream",
            (False, True): "server_stream",
            (True, True): "bidi_stream",
        }[is_client_stream, is_server_stream]
        self.started = 0
        self.succeeded = 0
        self.failed: dict[int, int] = {}
        """By status code."""
        self.received = 0
        """Messages of a stream; those of unary requests are counted as requests only."""
        self.sent = 0
        self.received_bytes = 0
        """Of messages, without their prefixes."""
        self.sent_bytes = 0

    def fail(self, code: int) -> None:
        """A request ended with a status that is not OK; the client's giving up is CANCELED."""
        self.failed[code] = self.failed.get(code, 0) + 1


class ClientRequests:
    """Requests of the gRPC clients of one version."""

    __slots__ = ("unary", "streams")

    def __init__(self) -> None:
        self.unary = 0
        self.streams = 0


class Peer:
    """The traffic with another member."""

    __slots__ = ("received_bytes", "sent_bytes", "round_trip_s")

    def __init__(self) -> None:
        self.received_bytes = 0
        self.sent_bytes = 0
        self.round_trip_s = Histogram(ROUND_TRIP_BOUNDS_S)


class Metrics:
    """The counts of one member. Whoever does a thing increments its count."""

    def __init__(self) -> None:
        # Consensus.
        self.proposals_pending = 0
        """Requests proposed here and not answered yet."""
        self.proposals_failed = 0
        self.read_rounds_failed = 0
        self.slow_applies = 0
        self.heartbeats_failed = 0
        self.batch_requests = Histogram(BATCH_BOUNDS)
        # The store.
        self.puts = 0
        self.deletes = 0
        self.ranges = 0
        self.txns = 0
        self.hash_s = Histogram(HASH_BOUNDS_S)
        self.hash_rev_s = Histogram(HASH_BOUNDS_S)
        self.compaction_pause_ms = Histogram(PAUSE_BOUNDS_MS)
        self.compaction_ms = Histogram(COMPACTION_BOUNDS_MS)
        self.last_compaction_s = 0.0
        self.defragment_s = Histogram(DEFRAGMENT_BOUNDS_S)
        self.snapshot_s = Histogram(SNAPSHOT_BOUNDS_S)
        self.checkpoint_s = Histogram(CHECKPOINT_BOUNDS_S)
        # Leases.
        self.leases_granted = 0
        self.leases_revoked = 0
        self.leases_renewed = 0
        self.leases_expired = 0
        self.lease_ttl_s = Histogram(LEASE_BOUNDS_S)
        # The log thread's.
        self.log_sync_s = Histogram(SYNC_BOUNDS_S)
        self.log_sync_finely_s = Histogram(SHORT_BOUNDS_S)
        """The same with bounds for good disks: etcd's begin at a millisecond."""
        self.log_bytes = 0
        # The disk thread's.
        self.data_sync_s = Histogram(SYNC_BOUNDS_S)
        # The loop.
        self.turn_s = Histogram(SHORT_BOUNDS_S)
        self.scrapes = 0
        # The network.
        self.rpcs: dict[int, Rpc] = {
            number: Rpc(method.grpc_path, method.client_stream, method.server_stream)
            for number, method in methods.METHODS.items()
        }
        """By the method's number."""
        self.clients: dict[str, ClientRequests] = {UNKNOWN_VERSION: ClientRequests()}
        """By the API version that the client says it has."""
        self.peers: dict[int, Peer] = {}
        """By the member's id."""

    def add_rpc(
        self, number: int, grpc_path: str, is_client_stream: bool, is_server_stream: bool
    ) -> None:
        """Count a method that is not of etcd's API. A path of "" counts unseen."""
        self.rpcs.setdefault(number, Rpc(grpc_path, is_client_stream, is_server_stream))

    def client(self, api_version: str) -> ClientRequests:
        """Where the requests of a client count. "" is one that does not say its version."""
        found = self.clients.get(api_version)
        if found is None:
            if not api_version or len(self.clients) > MAX_CLIENT_VERSIONS:
                return self.clients[UNKNOWN_VERSION]
            found = self.clients[api_version] = ClientRequests()
        return found

    def count_txn(self, request: proto.TxnRequest, succeeded: bool) -> None:
        """A transaction took this branch. As in etcd one that does a single thing is none. What
        nested ones do is not counted."""
        ops = request.success if succeeded else request.failure
        for op in ops:
            if op.request_put is not None:
                self.puts += 1
            elif op.request_range is not None:
                self.ranges += 1
            elif op.request_delete_range is not None:
                self.deletes += 1
        if len(ops) > 1:
            self.txns += 1

    def log_synced(self, took_s: float, written_bytes: int) -> None:
        """For the log thread."""
        self.log_sync_s.observe(took_s)
        self.log_sync_finely_s.observe(took_s)
        self.log_bytes += written_bytes

    def compaction_finished(self, took_s: float) -> None:
        self.compaction_ms.observe(took_s * 1000)
        self.last_compaction_s = time.time()
