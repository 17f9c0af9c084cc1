"""The answer to a scrape of `/metrics`, in Prometheus' text format 0.0.4.

Names, types, labels and buckets are etcd's, so that its dashboards and alerts work; additional
names begin with `etcdlite_`. docs/metrics.md lists all of them with their meaning.

Rendering must not delay the loop. Its cost grows with the number of names and methods, not with the
number of keys, watches or connections.
"""

from __future__ import annotations

import functools
import math
import os
import resource
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from etcdlite import ETCD_API_VERSION, __version__, backup_status, methods
from etcdlite.errors import CODE_NAMES, OK
from etcdlite.member import Member
from etcdlite.memory import Budget, process_bytes
from etcdlite.metrics import SHORT_BOUNDS_S, SYNC_BOUNDS_S, Histogram
from etcdlite.raft import LEADER
from etcdlite.replica.alarms import CORRUPT, NOSPACE, alarm_name
from etcdlite.versions import etcd_version
from etcdlite.wall_clock import unix_s
from etcdlite.wire.health import HealthCounts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_STARTED_S = unix_s()

_Labels = Mapping[str, str] | str
"""By name, or as they are rendered."""

_Sample = tuple[_Labels, float]
"""Labels and value."""


class Scrape(NamedTuple):
    """What a scrape shows, and its families as text."""

    member: Member
    connections: Mapping[str, int]
    """The number of open ones by protocol."""
    sites: Collection[HealthCounts] = ()
    """All that answer health checks."""
    budget: Budget | None = None
    expiries: Mapping[str, float] = {}
    """When the certificates in use end (Unix time), by file."""
    backup: Mapping[str, float] = {}
    """What the nightly backup says (`backup_status.py`)."""

    def render(self) -> bytes:
        """The answer, of type `CONTENT_TYPE`. Takes about 1 ms."""
        self.member.metrics.scrapes += 1
        return "".join(self.families()).encode()

    def families(self) -> Iterator[str]:
        yield from self._consensus()
        yield from self._requests()
        yield from self._store()
        yield from self._disk()
        yield from self._watches_and_leases()
        yield from self._health()
        yield from self._rpcs()
        yield from self._peers()
        yield from self._process()
        yield from self._own()
        yield from self._own_connections()
        yield from self._of_operation()

    def _consensus(self) -> Iterator[str]:
        metrics, member = self.member.metrics, self.member
        raft = member.raft
        cluster = member.state.cluster_version.version
        for name, what, label, value in (
            ("etcd_server_id", "The member's id", "server_id", f"{member.identity.member_id:x}"),
            ("etcd_server_version", "The etcd version whose API is served", "server_version",
             ETCD_API_VERSION),
            ("etcd_cluster_version", "The etcd version whose API all members serve",
             "cluster_version", etcd_version(cluster).rpartition(".")[0]),
            ("etcdlite_cluster_version", "The formats that the members may use",
             "cluster_version", str(cluster)),
            ("etcdlite_storage_version", "The oldest etcdlite that can open the data directory",
             "storage_version", str(member.state.storage_version)),
        ):  # fmt: skip
            yield _gauge(name, what, 1, **{label: value})
        yield _families(
            ("gauge", "etcd_server_has_leader", raft.leader != 0, "Whether a leader is known"),
            ("gauge", "etcd_server_is_leader", raft.role == LEADER,
             "Whether this member is the leader"),
            ("gauge", "etcd_server_is_learner", member.identity.member_id in raft.learners,
             "Whether this member is a learner"),
            ("counter", "etcd_server_leader_changes_seen_total", member.leadership.changes,
             "New leaders seen"),
            ("counter", "etcd_server_heartbeat_send_failures_total", metrics.heartbeats_failed,
             "Heartbeats that could not be handed to a peer"),
        )  # fmt: skip

    def _requests(self) -> Iterator[str]:
        metrics, member = self.member.metrics, self.member
        yield _families(
            ("gauge", "etcd_server_proposals_committed_total", member.raft.log.committed,
             "Index of the last committed log entry; each holds a batch of requests"),
            ("gauge", "etcd_server_proposals_applied_total", member.state.store.applied_index,
             "Index of the last applied log entry"),
            ("gauge", "etcd_server_proposals_pending", metrics.proposals_pending,
             "Requests proposed here that wait to be applied"),
            ("counter", "etcd_server_proposals_failed_total", metrics.proposals_failed,
             "Requests that could not be proposed, or were not applied in time"),
            ("counter", "etcd_server_read_indexes_failed_total", metrics.read_rounds_failed,
             "Failed read index rounds"),
            ("counter", "etcd_server_slow_read_indexes_total", metrics.slow_read_rounds,
             "Read index rounds that were repeated for lack of an answer, or timed out"),
            ("counter", "etcd_server_learner_promote_successes", metrics.learners_promoted,
             "Learners promoted while this member led"),
            ("gauge", "etcd_server_snapshot_apply_in_progress_total", member.restoring.is_under_way,
             "Whether a snapshot of the leader is being installed"),
        )  # fmt: skip
        yield _histograms(
            "etcd_server_apply_duration_seconds",
            "Time to apply a write; each write of a batch counts with an equal share",
            [
                ({"op": _OPS[method], "success": str(succeeded).lower(), "version": "v3"}, seconds)
                for (method, succeeded), seconds in metrics.applies_s.items()
                if method != methods.AUTHOR
            ],
        )
        yield _families(
            ("counter", "etcd_server_slow_apply_total", metrics.slow_applies,
             "Batches that took longer than --warning-apply-duration"),
            ("gauge", "etcd_server_quota_backend_bytes", member.state.alarms.quota_bytes,
             "Size limit of the data"),
        )  # fmt: skip

    def _store(self) -> Iterator[str]:
        metrics, store = self.member.metrics, self.member.state.store
        for name, what, value in (
            ("put", "Puts applied, those in transactions included", metrics.puts),
            ("delete", "Delete requests applied", metrics.deletes),
            ("range", "Ranges read", metrics.ranges),
            ("txn", "Transactions of more than one operation", metrics.txns),
        ):
            yield _counter(f"etcd_mvcc_{name}_total", what, value)
            yield _counter(f"etcd_debugging_mvcc_{name}_total", what, value)
        for name in ("etcd_mvcc", "etcd_debugging_mvcc"):
            yield _gauge(f"{name}_db_total_size_in_bytes", "Size of the data", store.size_bytes)
        yield _families(
            ("gauge", "etcd_mvcc_db_total_size_in_use_in_bytes", store.size_in_use_bytes,
             "Size of the data without garbage; what counts for the quota"),
            ("gauge", "etcd_mvcc_db_open_read_transactions", len(store.pinned),
             "Range reads in progress that take several turns of the loop"),
            ("histogram", "etcd_mvcc_hash_duration_seconds", metrics.hash_s, "Time of a Hash"),
            ("histogram", "etcd_mvcc_hash_rev_duration_seconds", metrics.hash_rev_s,
             "Time of a HashKV"),
            ("gauge", "etcd_debugging_mvcc_keys_total", len(store.index.heads), "Keys"),
            ("gauge", "etcd_debugging_auth_revision", self.member.state.auth.revision,
             "Revision of users and roles"),
            ("gauge", "etcd_debugging_mvcc_current_revision", store.revision,
             "The store's revision"),
            ("gauge", "etcd_debugging_mvcc_compact_revision", store.compacted or -1,
             "Revision of the last compaction; -1: none"),
            ("counter", "etcd_debugging_mvcc_db_compaction_keys_total",
             self.member.maintenance.compacted_versions,
             "Key versions that compaction removed"),
            ("gauge", "etcd_debugging_mvcc_db_compaction_last", metrics.last_compaction_s,
             "Unix time of the end of the last compaction; 0: none"),
            ("histogram", "etcd_debugging_mvcc_db_compaction_pause_duration_milliseconds",
             metrics.compaction_pause_ms,
             "Time that a step of a compaction delays the loop"),
            ("histogram", "etcd_debugging_mvcc_db_compaction_total_duration_milliseconds",
             metrics.compaction_ms,
             "Duration of a compaction"),
        )  # fmt: skip

    def _disk(self) -> Iterator[str]:
        metrics = self.member.metrics
        yield _families(
            ("histogram", "etcd_disk_wal_fsync_duration_seconds",
             metrics.log_sync_s.with_bounds(SYNC_BOUNDS_S),
             "Time to write and sync a batch to the write-ahead log"),
            ("histogram", "etcd_disk_wal_write_duration_seconds", metrics.log_write_s,
             "Time to write a batch to the write-ahead log, without the sync"),
            ("gauge", "etcd_disk_wal_write_bytes_total", metrics.log_bytes,
             "Bytes of entries written to the write-ahead log"),
            ("histogram", "etcd_disk_backend_commit_duration_seconds", metrics.data_sync_s,
             "Time to sync the data file, for a checkpoint or a cleaning; no request waits for it"),
            ("histogram", "etcd_disk_backend_defrag_duration_seconds", metrics.defragment_s,
             "Duration of a defragmentation"),
            ("gauge", "etcd_disk_defrag_inflight", bool(self.member.maintenance.defragmenting),
             "Whether a defragmentation is running"),
            ("histogram", "etcd_disk_backend_snapshot_duration_seconds", metrics.snapshot_s,
             "Time to send a snapshot"),
            ("histogram", "etcd_snap_db_save_total_duration_seconds", metrics.snapshot_receive_s,
             "Time to receive a snapshot from the leader, until it is durable"),
            ("histogram", "etcd_snap_db_fsync_duration_seconds", metrics.snapshot_sync_s,
             "Time to sync the files of a received snapshot"),
            ("histogram", "etcd_debugging_snap_save_total_duration_seconds",
             metrics.checkpoint_s.with_bounds(SYNC_BOUNDS_S), "Duration of a checkpoint"),
        )  # fmt: skip

    def _watches_and_leases(self) -> Iterator[str]:
        metrics, hub = self.member.metrics, self.member.hub
        yield _families(
            ("gauge", "etcd_debugging_mvcc_watch_stream_total", hub.streams, "Watch streams"),
            ("gauge", "etcd_debugging_mvcc_watcher_total", hub.watches, "Watches"),
            ("gauge", "etcd_debugging_mvcc_slow_watcher_total", hub.slow_watches,
             "Watches that lack history or whose client does not read"),
            ("counter", "etcd_debugging_mvcc_events_total", hub.events_sent, "Events sent"),
            ("counter", "etcd_debugging_lease_granted_total", metrics.leases_granted,
             "Leases granted"),
            ("counter", "etcd_debugging_lease_revoked_total", metrics.leases_revoked,
             "Leases revoked"),
            ("counter", "etcd_debugging_lease_renewed_total", metrics.leases_renewed,
             "Keep-alives"),
            ("counter", "etcd_debugging_server_lease_expired_total", metrics.leases_expired,
             "Leases that expired"),
            ("histogram", "etcd_debugging_lease_ttl_total", metrics.lease_ttl_s,
             "TTLs of granted leases"),
        )  # fmt: skip

    def _health(self) -> Iterator[str]:
        sites = self.sites
        yield _families(
            ("counter", "etcd_server_health_success", sum(site.health_successes for site in sites),
             "Health checks passed"),
            ("counter", "etcd_server_health_failures", sum(site.health_failures for site in sites),
             "Health checks failed"),
        )  # fmt: skip
        counts: Counter[tuple[str, str, str]] = Counter()
        passed: dict[tuple[str, str], bool] = {}
        for site in sites:
            passed.update(site.last_checks)
            counts.update(site.checks)
        yield _family(
            "etcd_server_healthcheck", "gauge", "Whether the latest check passed",
            [({"type": kind, "name": name}, value) for (kind, name), value in passed.items()],
        )  # fmt: skip
        yield _family(
            "etcd_server_healthchecks_total", "counter", "Checks of /livez and /readyz",
            [
                ({"type": kind, "name": name, "status": status}, count)
                for (kind, name, status), count in counts.items()
            ],
        )  # fmt: skip

    def _rpcs(self) -> Iterator[str]:
        started: list[_Sample] = []
        handled: list[_Sample] = []
        received: list[_Sample] = []
        sent: list[_Sample] = []
        handling: list[tuple[_Labels, Histogram]] = []
        received_bytes = sent_bytes = 0
        for rpc in self.member.metrics.rpcs.values():
            received_bytes += rpc.received_bytes
            sent_bytes += rpc.sent_bytes
            if not rpc.name:
                continue
            labels = _rpc_labels(rpc.name, rpc.service, rpc.kind)
            is_unary = rpc.kind == "unary"
            started.append((labels, rpc.started))
            received.append((labels, rpc.started if is_unary else rpc.received))
            sent.append((labels, rpc.succeeded if is_unary else rpc.sent))
            handling.append((labels, rpc.handling_s))
            for code, count in ((OK, rpc.succeeded), *sorted(rpc.failed.items())):
                name = CODE_NAMES.get(code, str(code))
                handled.append((f'grpc_code="{name}",{labels}', count))
        for name, what, samples in (
            ("started", "gRPC requests begun", started),
            ("handled", "gRPC requests ended, by status", handled),
            ("msg_received", "gRPC messages received", received),
            ("msg_sent", "gRPC messages sent", sent),
        ):
            yield _family(f"grpc_server_{name}_total", "counter", what, samples)
        yield _histograms(
            "grpc_server_handling_seconds",
            "Time from the header of a gRPC request to the end of its answer",
            handling,
        )
        yield _families(
            ("counter", "etcd_network_client_grpc_received_bytes_total", received_bytes,
             "Bytes of the messages of gRPC and JSON clients"),
            ("counter", "etcd_network_client_grpc_sent_bytes_total", sent_bytes,
             "Bytes of the messages to gRPC and JSON clients"),
        )  # fmt: skip
        yield _family(
            "etcd_server_client_requests_total", "counter", "gRPC and JSON requests by client",
            [
                ({"client_api_version": version, "type": kind}, count)
                for version, client in self.member.metrics.clients.items()
                for kind, count in (("unary", client.unary), ("stream", client.streams))
                if count
            ],
        )  # fmt: skip

    def _peers(self) -> Iterator[str]:
        peers = {f"{member_id:x}": peer for member_id, peer in self.member.metrics.peers.items()}
        local = f"{self.member.identity.member_id:x}"
        links = self.member.peers.links
        for name, what, values in (
            ("known", "Members that this member sends to", dict.fromkeys(links, True)),
            (
                "active",
                "Members that this member is connected to",
                {node: link.since is not None for node, link in links.items()},
            ),
        ):
            yield _family(
                f"etcd_network_{name}_peers", "gauge", what,
                [({"Local": local, "Remote": f"{node:x}"}, on) for node, on in values.items()],
            )  # fmt: skip
        for name, field, label, what in (
            ("sent_failures", "send_failures", "To",
             "Messages to a member that were dropped: no connection, or too much waits on it"),
            ("sent_bytes", "sent_bytes", "To", "Bytes sent to a member"),
            ("received_bytes", "received_bytes", "From", "Bytes received from a member"),
        ):  # fmt: skip
            samples = [({label: node}, getattr(peer, field)) for node, peer in peers.items()]
            yield _family(f"etcd_network_peer_{name}_total", "counter", what, samples)
        yield _histograms(
            "etcd_network_peer_round_trip_time_seconds", "Round trip time to a member",
            [({"To": name}, peer.round_trip_s) for name, peer in peers.items()],
        )  # fmt: skip

    def _process(self) -> Iterator[str]:
        yield _gauge("promhttp_metric_handler_requests_in_flight", "Scrapes being answered", 1)
        scrapes = self.member.metrics.scrapes
        yield _counter("promhttp_metric_handler_requests_total", "Scrapes", scrapes, code="200")
        if not os.path.exists("/proc/self/statm"):
            return  # Without /proc the rest is not known.
        address_bytes, ram_bytes = process_bytes()
        # Linux reports the number as the size since 6.2. Listing the entries takes 0.8 us each.
        files = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
        most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
        times = os.times()
        yield _families(
            ("gauge", "process_resident_memory_bytes", ram_bytes, "Memory in RAM"),
            ("gauge", "process_virtual_memory_bytes", address_bytes, "Address space"),
            ("gauge", "process_virtual_memory_max_bytes",
             2.0**64 if most_bytes == resource.RLIM_INFINITY else most_bytes,
             "Limit of the address space"),
            ("counter", "process_cpu_seconds_total", times.user + times.system, "CPU time"),
            ("gauge", "process_start_time_seconds", _STARTED_S,
             "Unix time of the start of the process"),
        )  # fmt: skip
        for name in ("process_open_fds", "os_fd_used"):
            yield _gauge(name, "Open file descriptors", files)
        for name in ("process_max_fds", "os_fd_limit"):
            yield _gauge(name, "Limit of open file descriptors", most_files)

    def _own(self) -> Iterator[str]:
        metrics, member = self.member.metrics, self.member
        maintenance, data = member.maintenance, member.state.store.data
        yield _gauge(
            "etcdlite_build_info", "The program's versions", 1,
            version=__version__, python_version=sys.version.split()[0],
        )  # fmt: skip
        yield _families(
            ("histogram", "etcdlite_loop_turn_duration_seconds", metrics.turn_s,
             "Time of a turn of the loop, without waiting for sockets"),
            ("histogram", "etcdlite_collector_pause_duration_seconds", metrics.collector_s,
             "Time of a run of Python's garbage collector"),
            ("histogram", "etcdlite_log_sync_duration_seconds",
             metrics.log_sync_s.with_bounds(SHORT_BOUNDS_S),
             "As etcd_disk_wal_fsync_duration_seconds, with bounds for good disks"),
            ("histogram", "etcdlite_batch_requests", metrics.batch_requests,
             "Requests proposed together as one log entry"),
            ("histogram", "etcdlite_checkpoint_duration_seconds", metrics.checkpoint_s,
             "Duration of a checkpoint"),
            ("counter", "etcdlite_checkpoints_total", maintenance.checkpoints, "Checkpoints"),
            ("counter", "etcdlite_cleaned_segments_total", maintenance.cleaned_segments,
             "Data segments whose garbage was removed"),
            ("gauge", "etcdlite_segments", len(data.files), "Data segments"),
            ("gauge", "etcdlite_segment_garbage_bytes", data.garbage_bytes,
             "Garbage in data segments"),
            ("gauge", "etcdlite_damaged_records", len(data.damaged),
             "Records with a wrong checksum, found since the start"),
            ("gauge", "etcdlite_slow_watches", member.hub.slow_watches,
             "Watches that lack history or whose client does not read"),
            ("gauge", "etcdlite_leases", len(member.state.lessor), "Leases"),
        )  # fmt: skip

    def _own_connections(self) -> Iterator[str]:
        budget = self.budget
        if budget is not None:
            yield _families(
                ("gauge", "etcdlite_connection_memory_bytes", budget.held_bytes,
                 "Memory held by input and output that wait in connections"),
                ("gauge", "etcdlite_connection_memory_limit_bytes", budget.limit_bytes,
                 "memory-limit"),
                ("counter", "etcdlite_connections_shed_total", budget.shed,
                 "Connections closed because all together held more than memory-limit"),
            )  # fmt: skip
        yield _family(
            "etcdlite_failed_handshakes_total", "counter",
            "Connections that ended before their handshake was complete",
            [
                (
                    {"channel": kind, "with": "members" if is_member else "clients"},
                    self.member.metrics.failed_handshakes[kind, is_member],
                )
                for kind in ("tls", "secret")
                for is_member in (False, True)
            ],
        )  # fmt: skip
        yield _family(
            "etcdlite_connections", "gauge", "Open connections by protocol",
            [({"protocol": protocol}, count) for protocol, count in self.connections.items()],
        )  # fmt: skip
        if self.expiries:
            yield _family(
                "etcdlite_certificate_expiry_timestamp_seconds", "gauge", "End of a certificate",
                [({"file": path}, ends_at) for path, ends_at in self.expiries.items()],
            )  # fmt: skip

    def _of_operation(self) -> Iterator[str]:
        """What an operator must look after."""
        alarms = self.member.state.alarms
        active = Counter(alarm_name(kind) for _, kind in alarms)
        yield _family(
            "etcdlite_alarms", "gauge", "Members for which an alarm is active",
            [({"alarm": name}, active[name]) for name in map(alarm_name, (NOSPACE, CORRUPT))],
        )  # fmt: skip
        yield _families(
            ("gauge", "etcdlite_disk_left_bytes", alarms.disk_left_bytes,
             "Free space of the file system of the data, beyond the reserve that stays free"),
            ("gauge", "etcdlite_clock_timestamp_seconds", unix_s(), "This machine's Unix time"),
        )  # fmt: skip
        for name, value in self.backup.items():
            yield _gauge(name, backup_status.NAMES[name], value)


_OPS = {
    **{row.number: row.request.NAME.removesuffix("Request") for row in methods.ROWS},
    methods.COMPACT: "Compaction",
    methods.CHECKPOINT: "LeaseCheckpoint",
    methods.PUBLISH: "ClusterMemberAttrSet",
    methods.MEMBER_CHANGE: "ClusterMemberChange",
}
"""etcd's names of what is applied, by method number."""


def _gauge(name: str, what: str, value: float, **labels: str) -> str:
    return _family(name, "gauge", what, [(labels, value)])


def _counter(name: str, what: str, value: float, **labels: str) -> str:
    return _family(name, "counter", what, [(labels, value)])


def _families(*rows: tuple[str, str, float | Histogram, str]) -> str:
    """Families of one sample without labels each: (kind, name, value, help text)."""
    return "".join(
        _histograms(name, what, [({}, value)])
        if isinstance(value, Histogram)
        else _family(name, kind, what, [({}, value)])
        for kind, name, value, what in rows
    )


def _family(name: str, kind: str, what: str, samples: Iterable[_Sample]) -> str:
    lines = [f"# HELP {name} {what}\n# TYPE {name} {kind}\n"]
    lines += (_sample(name, labels, value) for labels, value in samples)
    return "".join(lines)


def _histograms(name: str, what: str, histograms: Iterable[tuple[_Labels, Histogram]]) -> str:
    lines = [_family(name, "histogram", what, ())]
    for labels, histogram in histograms:
        # Most lines of a scrape are those of buckets. "le" sorts behind every other label.
        pairs = _pairs(labels)
        begin = f"{name}_bucket{{{pairs},le=" if pairs else f"{name}_bucket{{le="
        total = 0
        for bound, count in zip(_bounds(tuple(histogram.bounds)), histogram.counts, strict=True):
            total += count
            lines.append(f"{begin}{bound} {_number(total)}\n")
        lines.append(_sample(f"{name}_sum", pairs, histogram.sum))
        lines.append(_sample(f"{name}_count", pairs, total))
    return "".join(lines)


@functools.cache
def _bounds(bounds: tuple[float, ...]) -> list[str]:
    """The end of each bucket's labels."""
    return [f'"{_number(bound)}"}}' for bound in (*bounds, math.inf)]


def _sample(name: str, labels: _Labels, value: float) -> str:
    if not labels:
        return f"{name} {_number(value)}\n"
    return f"{name}{{{_pairs(labels)}}} {_number(value)}\n"


def _pairs(labels: _Labels) -> str:
    if isinstance(labels, str):
        return labels
    return ",".join(f'{label}="{labels[label].translate(_ESCAPES)}"' for label in sorted(labels))


_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", '"': '\\"'})


@functools.cache
def _rpc_labels(name: str, service: str, kind: str) -> str:
    return _pairs({"grpc_method": name, "grpc_service": service, "grpc_type": kind})


def _number(value: float) -> str:
    """As Go prints it, for scripts that compare text: 1, not 1.0; an exponent from a million on."""
    if not value:
        return "0"
    if value == math.inf:
        return "+Inf"
    text = repr(float(value))
    whole, _, fraction = text.partition(".")
    if value > 0 and len(whole) > 6 and fraction:
        digits = f"{whole[0]}.{whole[1:]}{fraction}".rstrip("0").rstrip(".")
        return f"{digits}e+{len(whole) - 1:02d}"
    return text.removesuffix(".0")
