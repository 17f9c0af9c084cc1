"""Counters and histograms of one member. `wire/exposition.py` renders them for /metrics.

They are plain attributes, which the code that does the work increments, on the hottest paths too:
an increment costs 30 to 100 ns, and so does an observation: it only joins a list. Whoever reads a
histogram puts the list into the buckets, and so does `settle`, which the loop calls often. What
another part counts anyway is not counted here again.

Invariants:
- a counter never decreases while the process lives;
- one thread writes each figure, so no update is lost (the loop may read a sum without its count);
- lists hold only what was observed since the last `settle`;
- the labels that clients choose (their version) are limited to `MAX_CLIENT_VERSIONS`.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from etcdlite import errors, methods
from etcdlite.plain_txn import GET, PlainTxn

MAX_CLIENT_VERSIONS = 32
MAX_VERSION_CHARS = 64
"""Client versions with their own counts, and their lengths. Others count as `UNKNOWN_VERSION`."""

UNKNOWN_VERSION = "unknown"


def doubling(first: float, count: int) -> tuple[float, ...]:
    """`count` bounds, each twice the previous one."""
    return tuple(first * 2.0**at for at in range(count))


# Upper bounds of buckets. Histograms with etcd's names have etcd's bounds.
SYNC_BOUNDS_S = doubling(0.001, 14)
SHORT_BOUNDS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
APPLY_BOUNDS_S = doubling(0.0001, 20)
HANDLING_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

ALERT_CODES = (
    errors.UNKNOWN,
    errors.DEADLINE_EXCEEDED,
    errors.RESOURCE_EXHAUSTED,
    errors.FAILED_PRECONDITION,
    errors.INTERNAL,
    errors.UNAVAILABLE,
    errors.DATA_LOSS,
)
"""The status codes in etcd's alert rules. Every method exports them from the start, because
Prometheus' `rate()` does not see the first increase of a series that begins with it."""


class Histogram:
    """The number of observations in each bucket, and their sum."""

    __slots__ = ("_counts", "_latest", "_sum", "bounds", "observe")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: the upper bounds of the buckets, ascending and inclusive. One more bucket
        counts what is above the last."""
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._latest = array("d")  # Float objects would hold back memory around them.
        self.observe = self._latest.append
        """`observe(value)` adds an observation."""

    @property
    def counts(self) -> list[int]:
        self.settle()
        return self._counts

    @property
    def sum(self) -> float:
        self.settle()
        return self._sum

    def observe_several(self, value: float, count: int) -> None:
        self._latest.extend([value] * count)

    def settle(self) -> None:
        """Put the latest observations into their buckets. Only the loop calls this, and another
        thread may add some at the same time."""
        latest = sorted(self._latest)
        if not latest:
            return
        del self._latest[: len(latest)]
        self._sum += sum(latest)
        begin = 0
        for bucket, bound in enumerate((*self.bounds, math.inf)):
            end = bisect_right(latest, bound, begin)
            self._counts[bucket] += end - begin
            begin = end

    def with_bounds(self, bounds: Sequence[float]) -> Histogram:
        """The same observations in fewer buckets. `bounds` are some of the bounds."""
        other = Histogram(bounds)
        other._sum = self.sum
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            other._counts[bisect_left(bounds, bound)] += count
        return other


class Rpc:
    """The requests of one gRPC method, those of the JSON gateway included."""

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
        self.failed = dict.fromkeys(ALERT_CODES, 0)
        """By status code."""
        self.handling_s = Histogram(HANDLING_BOUNDS_S)
        """From the header of a request to the end of its answer, in seconds."""
        self.received = 0
        """Stream messages. A unary request is counted as a request only."""
        self.sent = 0
        self.received_bytes = 0
        """Sizes of messages without their gRPC prefixes."""
        self.sent_bytes = 0

    @property
    def succeeded(self) -> int:
        return sum(self.handling_s.counts) - sum(self.failed.values())

    def fail(self, code: int, took_s: float) -> None:
        """Count a request that ended with a status other than OK: CANCELED if the client did."""
        self.failed[code] = self.failed.get(code, 0) + 1
        self.handling_s.observe(took_s)


class ClientRequests:
    """Requests of the gRPC and JSON clients of one version."""

    def __init__(self) -> None:
        self.unary = 0
        self.streams = 0


class Peer:
    """The traffic with another member."""

    def __init__(self) -> None:
        self.received_bytes = 0
        self.sent_bytes = 0
        self.send_failures = 0
        """Messages that were dropped: there is no connection, or too much waits on it."""
        self.round_trip_s = Histogram(doubling(0.0001, 16))


class Metrics:
    def __init__(self) -> None:
        # Consensus.
        self.proposals_pending = 0
        """Requests that this member proposed and has not applied yet."""
        self.proposals_failed = 0
        self.read_rounds_failed = 0
        self.slow_read_rounds = 0
        """Read index rounds that were repeated for lack of an answer, or timed out."""
        self.slow_applies = 0
        self.applies_s = defaultdict[tuple[int, bool], Histogram](lambda: Histogram(APPLY_BOUNDS_S))
        """Seconds per applied write, by method number and success."""
        self.learners_promoted = 0
        self.heartbeats_failed = 0
        self.batch_requests = Histogram(doubling(1, 13))
        # The store.
        self.puts = 0
        self.deletes = 0
        self.ranges = 0
        self.txns = 0
        self.hash_s = Histogram(doubling(0.01, 15))
        self.hash_rev_s = Histogram(doubling(0.01, 15))
        self.compaction_pause_ms = Histogram(doubling(1, 13))
        self.compaction_ms = Histogram(doubling(100, 14))
        self.last_compaction_s = 0.0
        self.defragment_s = Histogram(doubling(0.1, 13))
        self.snapshot_s = Histogram(doubling(0.01, 17))
        self.snapshot_receive_s = Histogram(doubling(0.1, 10))
        """From the first byte of the leader's snapshot until it is durable."""
        self.snapshot_sync_s = Histogram(SYNC_BOUNDS_S)
        self.checkpoint_s = Histogram(doubling(0.001, 18))
        # Leases.
        self.leases_granted = 0
        self.leases_revoked = 0
        self.leases_renewed = 0
        self.leases_expired = 0
        self.lease_ttl_s = Histogram(doubling(1, 24))
        # Written by the log thread.
        self.log_sync_s = Histogram(sorted({*SYNC_BOUNDS_S, *SHORT_BOUNDS_S}))
        """Shown twice: with etcd's bounds, which begin at a millisecond, and with finer ones."""
        self.log_write_s = Histogram(SYNC_BOUNDS_S)
        """The part of `log_sync_s` before the sync."""
        self.log_bytes = 0
        # Written by the disk thread.
        self.data_sync_s = Histogram(SYNC_BOUNDS_S)
        # The loop.
        self.turn_s = Histogram(SHORT_BOUNDS_S)
        self.collector_s = Histogram(SHORT_BOUNDS_S)
        self.scrapes = 0
        self.failed_handshakes: Counter[tuple[str, bool]] = Counter()
        """Connections that ended during their handshake, by kind of channel and whether they were
        of members."""
        # The network.
        self.rpcs: dict[int, Rpc] = {
            number: Rpc(method.grpc_path, method.client_stream, method.server_stream)
            for number, method in methods.METHODS.items()
        }
        """By method number."""
        self.clients: dict[str, ClientRequests] = {UNKNOWN_VERSION: ClientRequests()}
        """By the API version that the client sends."""
        self.peers = defaultdict[int, Peer](Peer)
        """By member id. The counts of a removed member are dropped (`Peers.update`)."""

    def settle(self) -> None:
        """Put the latest observations into their buckets. Call this several times a second."""
        for value in vars(self).values():
            if value.__class__ is Histogram:
                value.settle()
        for rpc in self.rpcs.values():
            rpc.handling_s.settle()
        for peer in self.peers.values():
            peer.round_trip_s.settle()

    def add_rpc(
        self, number: int, grpc_path: str, is_client_stream: bool, is_server_stream: bool
    ) -> None:
        """Count a method outside of etcd's API. One without a path is not shown on its own."""
        self.rpcs.setdefault(number, Rpc(grpc_path, is_client_stream, is_server_stream))

    def client(self, api_version: str) -> ClientRequests:
        """The counts of the clients of a version; "" if the client does not send it."""
        found = self.clients.get(api_version)
        if found is None:
            is_short = 0 < len(api_version) <= MAX_VERSION_CHARS
            if not is_short or len(self.clients) > MAX_CLIENT_VERSIONS:
                return self.clients[UNKNOWN_VERSION]
            found = self.clients[api_version] = ClientRequests()
        return found

    def count_txn(self, request: Any, succeeded: bool) -> None:
        """Count the operations of the branch that a transaction took.

        As in etcd, a transaction with a single operation does not count as a transaction. Nested
        transactions are not counted."""
        if isinstance(request, PlainTxn):
            branch = request.on_success if succeeded else request.on_failure
            if isinstance(branch, list):
                self.puts += len(branch)
                self.txns += len(branch) > 1
            elif branch[0] == GET:
                self.ranges += 1
            else:
                self.deletes += 1
            return
        ops = request.success if succeeded else request.failure
        self.txns += len(ops) > 1
        for op in ops:
            if op.request_put is not None:
                self.puts += 1
            elif op.request_range is not None:
                self.ranges += 1
            elif op.request_delete_range is not None:
                self.deletes += 1

    def count_applied(
        self, requests: Sequence[Sequence[Any]], failed: Sequence[int], took_s: float
    ) -> None:
        """Record a batch of applied requests, whose third element is the method number. Each is
        assumed to take an equal share of the time: timing each would slow down puts by 3 %."""
        applied = [request[2] for request in requests]
        share_s = took_s / (len(applied) or 1)
        for method in set(applied):
            count = applied.count(method) - failed.count(method)
            self.applies_s[method, True].observe_several(share_s, count)
        for method in set(failed):
            self.applies_s[method, False].observe_several(share_s, failed.count(method))

    def log_synced(self, took_s: float, write_s: float, written_bytes: int) -> None:
        """Record a sync of the log, of which writing took `write_s`. `written_bytes`: since the
        start. Called by the thread that saves."""
        self.log_write_s.observe(write_s)
        self.log_sync_s.observe(took_s)
        self.log_bytes = written_bytes
