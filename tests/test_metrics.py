"""The metrics: etcd's names have etcd's meaning, and each event is counted once."""

from __future__ import annotations

import bisect
import math
import random
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rigs.lone_member import LoneMember, turn
from rigs.users import User, add_users

from etcdlite import __version__, backup_status, errors, log, methods, metrics, proto
from etcdlite.member import Member
from etcdlite.metrics import Histogram, Metrics
from etcdlite.raft import HEARTBEAT, Message
from etcdlite.request import Waiter, about
from etcdlite.wire import exposition
from etcdlite.wire.grpc import GrpcSession
from etcdlite.wire.hpack import pack
from etcdlite.wire.http import HttpSession
from etcdlite.wire.site import Site

ETCD = """
  etcd_cluster_version gauge cluster_version
  etcd_debugging_lease_granted_total counter
  etcd_debugging_lease_renewed_total counter
  etcd_debugging_lease_revoked_total counter
  etcd_debugging_lease_ttl_total histogram
  etcd_debugging_mvcc_compact_revision gauge
  etcd_debugging_mvcc_current_revision gauge
  etcd_debugging_mvcc_db_compaction_keys_total counter
  etcd_debugging_mvcc_db_compaction_last gauge
  etcd_debugging_mvcc_db_compaction_pause_duration_milliseconds histogram
  etcd_debugging_mvcc_db_compaction_total_duration_milliseconds histogram
  etcd_debugging_mvcc_db_total_size_in_bytes gauge
  etcd_debugging_mvcc_delete_total counter
  etcd_debugging_mvcc_events_total counter
  etcd_debugging_auth_revision gauge
  etcd_debugging_mvcc_keys_total gauge
  etcd_debugging_mvcc_put_total counter
  etcd_debugging_mvcc_range_total counter
  etcd_debugging_mvcc_slow_watcher_total gauge
  etcd_debugging_mvcc_txn_total counter
  etcd_debugging_mvcc_watch_stream_total gauge
  etcd_debugging_mvcc_watcher_total gauge
  etcd_debugging_server_lease_expired_total counter
  etcd_debugging_snap_save_total_duration_seconds histogram
* etcd_disk_backend_commit_duration_seconds histogram
  etcd_disk_backend_defrag_duration_seconds histogram
  etcd_disk_backend_snapshot_duration_seconds histogram
* etcd_disk_wal_fsync_duration_seconds histogram
  etcd_disk_wal_write_duration_seconds histogram
  etcd_disk_defrag_inflight gauge
  etcd_network_active_peers gauge Local,Remote
  etcd_network_known_peers gauge Local,Remote
* etcd_network_peer_sent_failures_total counter To
  etcd_server_apply_duration_seconds histogram op,success,version
  etcd_server_learner_promote_successes counter
  etcd_server_slow_read_indexes_total counter
  etcd_server_snapshot_apply_in_progress_total gauge
  etcd_snap_db_fsync_duration_seconds histogram
  etcd_snap_db_save_total_duration_seconds histogram
* grpc_server_handling_seconds histogram grpc_method,grpc_service,grpc_type
  etcd_disk_wal_write_bytes_total gauge
  etcd_mvcc_db_open_read_transactions gauge
* etcd_mvcc_db_total_size_in_bytes gauge
* etcd_mvcc_db_total_size_in_use_in_bytes gauge
  etcd_mvcc_delete_total counter
  etcd_mvcc_hash_duration_seconds histogram
  etcd_mvcc_hash_rev_duration_seconds histogram
  etcd_mvcc_put_total counter
  etcd_mvcc_range_total counter
  etcd_mvcc_txn_total counter
* etcd_network_client_grpc_received_bytes_total counter
* etcd_network_client_grpc_sent_bytes_total counter
* etcd_network_peer_received_bytes_total counter From
* etcd_network_peer_round_trip_time_seconds histogram To
* etcd_network_peer_sent_bytes_total counter To
  etcd_server_client_requests_total counter client_api_version,type
* etcd_server_has_leader gauge
  etcd_server_health_failures counter
  etcd_server_health_success counter
* etcd_server_heartbeat_send_failures_total counter
  etcd_server_id gauge server_id
* etcd_server_is_leader gauge
  etcd_server_is_learner gauge
* etcd_server_leader_changes_seen_total counter
* etcd_server_proposals_applied_total gauge
* etcd_server_proposals_committed_total gauge
* etcd_server_proposals_failed_total counter
* etcd_server_proposals_pending gauge
* etcd_server_quota_backend_bytes gauge
  etcd_server_read_indexes_failed_total counter
* etcd_server_slow_apply_total counter
  etcd_server_version gauge server_version
* grpc_server_handled_total counter grpc_code,grpc_method,grpc_service,grpc_type
  grpc_server_msg_received_total counter grpc_method,grpc_service,grpc_type
  grpc_server_msg_sent_total counter grpc_method,grpc_service,grpc_type
* grpc_server_started_total counter grpc_method,grpc_service,grpc_type
  os_fd_limit gauge
  os_fd_used gauge
  process_cpu_seconds_total counter
  process_max_fds gauge
  process_open_fds gauge
* process_resident_memory_bytes gauge
  process_start_time_seconds gauge
  process_virtual_memory_bytes gauge
  process_virtual_memory_max_bytes gauge
  promhttp_metric_handler_requests_in_flight gauge
  promhttp_metric_handler_requests_total counter code
"""
"""Name, type and labels of the metrics that etcd has, too. Its dashboard and its usual alert rules
read those with a star."""

BUCKETS = {
    "etcd_debugging_lease_ttl_total": (1, 24),
    "etcd_debugging_mvcc_db_compaction_pause_duration_milliseconds": (1, 13),
    "etcd_debugging_mvcc_db_compaction_total_duration_milliseconds": (100, 14),
    "etcd_debugging_snap_save_total_duration_seconds": (0.001, 14),
    "etcd_disk_backend_commit_duration_seconds": (0.001, 14),
    "etcd_disk_backend_defrag_duration_seconds": (0.1, 13),
    "etcd_disk_backend_snapshot_duration_seconds": (0.01, 17),
    "etcd_disk_wal_fsync_duration_seconds": (0.001, 14),
    "etcd_disk_wal_write_duration_seconds": (0.001, 14),
    "etcd_server_apply_duration_seconds": (0.0001, 20),
    "etcd_snap_db_fsync_duration_seconds": (0.001, 14),
    "etcd_snap_db_save_total_duration_seconds": (0.1, 10),
    "etcd_mvcc_hash_duration_seconds": (0.01, 15),
    "etcd_mvcc_hash_rev_duration_seconds": (0.01, 15),
    "etcd_network_peer_round_trip_time_seconds": (0.0001, 16),
}
"""etcd's buckets: the first bound and how many there are, each twice the one before."""

NOT_IN_THE_LIST = {"etcd_server_healthcheck", "etcd_server_healthchecks_total"}
"""Names of etcd 3.6 that the list above is too old for."""

PUT = methods.METHOD_BY_NAME["KV.Put"].number
RANGE = methods.METHOD_BY_NAME["KV.Range"].number
WATCH = methods.METHOD_BY_NAME["Watch.Watch"].number


class Asker:
    """A session that keeps the last outcome."""

    is_blocked = False
    outcome: Any = None

    def awaits(self, request_id: int) -> bool:
        return True

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        self.outcome = methods.METHODS[method].response.decode(body)

    def fail(self, request_id: int, method: int, failure: errors.EtcdError) -> None:
        self.outcome = failure


def write(lone: LoneMember, method: str, **fields: Any) -> Any:
    asker = Asker()
    about = methods.METHOD_BY_NAME[method]
    lone.member.writes.propose_message(Waiter(asker, 1, about.number, about.request(**fields)))
    lone.settle()
    return asker.outcome


def read(lone: LoneMember, method: str, **fields: Any) -> Any:
    asker = Asker()
    about = methods.METHOD_BY_NAME[method]
    lone.member.reads.read(Waiter(asker, 1, about.number, about.request(**fields)))
    lone.settle()
    return asker.outcome


def text(lone: LoneMember, **options: Any) -> str:
    return exposition.Scrape(lone.member, {"native": 2}, **options).render().decode()


def types(lone: LoneMember, **options: Any) -> dict[str, str]:
    lines = text(lone, **options).splitlines()
    return {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE ")}


def samples(lone: LoneMember, **options: Any) -> dict[tuple[str, frozenset[Any]], float]:
    """(name, labels) -> value, as Prometheus takes them in."""
    found: dict[tuple[str, frozenset[Any]], float] = {}
    for line in text(lone, **options).splitlines():
        if line.startswith("#"):
            continue
        # Prometheus' own parser takes 50 us a line; `test_prometheus_parser_accepts_all_of_it`.
        name, _, rest = line.rpartition(" ")[0].partition("{")
        labels = frozenset(re.findall(r'(\w+)="(.*?)"', rest))
        key = (name, labels)
        assert key not in found, f"{key} is shown twice"
        found[key] = float(line.rpartition(" ")[2])
    return found


def value(lone: LoneMember, name: str, **labels: str) -> float:
    return samples(lone)[name, frozenset(labels.items())]


def expected() -> list[tuple[bool, str, str, set[str]]]:
    table = []
    for line in ETCD.strip("\n").splitlines():
        name, kind, *labels = line[2:].split()
        table.append((line[0] == "*", name, kind, set(labels[0].split(",")) if labels else set()))
    return table


def use_everything(lone: LoneMember) -> SimpleNamespace:
    """Make every label appear; what answers health checks."""
    counts = lone.member.metrics
    counts.client("3.5").unary += 1
    counts.rpcs[PUT].fail(errors.UNAVAILABLE, 0.1)
    counts.peers[0xAB] = metrics.Peer()
    lone.member.peers.links[0xAB] = SimpleNamespace(since=None)  # type: ignore[assignment]
    write(lone, "KV.Put", key=b"k", value=b"v")
    return SimpleNamespace(
        health_successes=3,
        health_failures=1,
        checks={("readyz", "non_learner", "success"): 2},
        last_checks={("readyz", "non_learner"): True},
    )


# The names.


def test_all_names_that_dashboards_and_alerts_read_are_shown(lone: LoneMember) -> None:
    shown = types(lone)
    assert [name for is_read, name, _, _ in expected() if is_read and name not in shown] == []


def test_names_of_etcd_have_its_types_and_labels(lone: LoneMember) -> None:
    site = use_everything(lone)
    shown = types(lone, sites=[site])
    labels: dict[str, set[str]] = {}
    for name, pairs in samples(lone, sites=[site]):
        labels.setdefault(name, set()).update(label for label, _ in pairs)
    for _, name, kind, right in expected():
        assert shown[name] == kind, name
        one = f"{name}_count" if kind == "histogram" else name
        assert labels[one] == right, name


def test_no_name_outside_the_list_looks_like_etcds(lone: LoneMember) -> None:
    known = {name for _, name, _, _ in expected()} | NOT_IN_THE_LIST
    assert {name for name in types(lone) if not name.startswith("etcdlite_")} <= known


def test_histograms_have_etcds_buckets(lone: LoneMember) -> None:
    site = use_everything(lone)
    found: dict[str, list[float]] = {}
    for name, labels in samples(lone, sites=[site]):
        if name.endswith("_bucket") and name.startswith("etcd_"):
            found.setdefault(name.removesuffix("_bucket"), []).append(float(dict(labels)["le"]))
    right = {
        name: [*(first * 2.0**at for at in range(count)), math.inf]
        for name, (first, count) in BUCKETS.items()
    }
    assert found == right


def test_bounds_are_written_as_etcd_writes_them(lone: LoneMember) -> None:
    lines = text(lone)
    assert 'etcd_debugging_lease_ttl_total_bucket{le="1"} 0\n' in lines
    assert 'etcd_debugging_lease_ttl_total_bucket{le="131072"} 0\n' in lines
    assert 'etcd_debugging_lease_ttl_total_bucket{le="8.388608e+06"} 0\n' in lines
    assert 'etcd_disk_wal_fsync_duration_seconds_bucket{le="0.001"} 0\n' in lines


def test_values_are_written_as_etcd_writes_them(lone: LoneMember) -> None:
    """A script that asks for the line "etcd_server_has_leader 1" finds it."""
    shown = text(lone, sites=[use_everything(lone)])
    assert "etcd_server_has_leader 1\n" in shown and "etcd_server_is_learner 0\n" in shown
    assert "etcd_server_quota_backend_bytes 2.147483648e+09\n" in shown
    assert not re.findall(r".*\.0$", shown, re.MULTILINE)


def test_prometheus_parser_accepts_all_of_it(lone: LoneMember) -> None:
    families = list(text_string_to_metric_families(text(lone, sites=[use_everything(lone)])))
    assert len({family.name for family in families}) == len(families)
    assert all(family.documentation and family.type != "unknown" for family in families)


def test_the_state_of_the_member_is_shown(lone: LoneMember) -> None:
    write(lone, "KV.Put", key=b"k", value=b"v")
    assert value(lone, "etcd_server_has_leader") == 1
    assert value(lone, "etcd_server_is_leader") == 1
    assert value(lone, "etcd_server_is_learner") == 0
    assert value(lone, "etcd_server_leader_changes_seen_total") == 1
    assert value(lone, "etcd_server_quota_backend_bytes") == 1 << 31
    assert value(lone, "etcd_server_id", server_id="7") == 1
    assert value(lone, "etcd_debugging_mvcc_keys_total") == 1
    assert value(lone, "etcd_debugging_auth_revision") == 1
    assert value(lone, "etcd_debugging_mvcc_current_revision") == 2
    assert value(lone, "etcd_debugging_mvcc_compact_revision") == -1
    applied = value(lone, "etcd_server_proposals_applied_total")
    assert applied == value(lone, "etcd_server_proposals_committed_total") > 0
    store = lone.member.state.store
    assert value(lone, "etcd_mvcc_db_total_size_in_bytes") == store.size_bytes
    in_use = value(lone, "etcd_mvcc_db_total_size_in_use_in_bytes")
    garbage = value(lone, "etcdlite_segment_garbage_bytes")
    assert in_use + garbage == store.size_bytes and garbage > 0
    assert value(lone, "etcdlite_connections", protocol="native") == 2


def test_the_process_is_shown(lone: LoneMember) -> None:
    assert 1 << 20 < value(lone, "process_resident_memory_bytes") < 1 << 40
    assert value(lone, "process_virtual_memory_bytes") > value(
        lone, "process_resident_memory_bytes"
    )
    assert 0 < value(lone, "process_open_fds") < value(lone, "process_max_fds")
    assert value(lone, "process_cpu_seconds_total") > 0
    assert value(lone, "process_start_time_seconds") > 1_600_000_000
    (build,) = (dict(labels) for name, labels in samples(lone) if name == "etcdlite_build_info")
    assert build["version"] == __version__


def test_health_checks_are_summed_over_all_that_answer_them(lone: LoneMember) -> None:
    site = use_everything(lone)
    found = samples(lone, sites=[site, site])
    assert found["etcd_server_health_success", frozenset()] == 6
    assert found["etcd_server_health_failures", frozenset()] == 2
    check = {"type": "readyz", "name": "non_learner"}
    assert found["etcd_server_healthcheck", frozenset(check.items())] == 1
    done = frozenset({**check, "status": "success"}.items())
    assert found["etcd_server_healthchecks_total", done] == 4


# Counting.


@pytest.mark.parametrize("seed", range(5))
def test_a_histogram_counts_each_value_in_the_buckets_it_belongs_to(seed: int) -> None:
    rng = random.Random(seed)
    bounds = metrics.doubling(0.001, 6)
    histogram = Histogram(bounds)
    values = [rng.choice([rng.uniform(0, 0.1), rng.choice(bounds), 0.0, 7.5]) for _ in range(500)]
    for one in values:
        histogram.observe(one)
    for at, bound in enumerate((*bounds, math.inf)):
        within = sum(histogram.counts[: at + 1])
        assert within == bisect.bisect_right(sorted(values), bound), bound
    assert histogram.sum == pytest.approx(sum(values))


def test_what_is_observed_is_held_in_lists_only_until_the_next_settle() -> None:
    counts = metrics.Metrics()
    counts.peers[1] = metrics.Peer()
    histograms = [
        *[value for value in vars(counts).values() if isinstance(value, Histogram)],
        *[rpc.handling_s for rpc in counts.rpcs.values()],
        counts.peers[1].round_trip_s,
    ]
    for histogram in histograms:
        histogram.observe(0.5)
    counts.settle()
    assert len(histograms) > 50 and not any(histogram._latest for histogram in histograms)
    assert {histogram.sum for histogram in histograms} == {0.5}


def test_operations_are_counted_as_etcd_counts_them(lone: LoneMember) -> None:
    put = proto.RequestOp(request_put=proto.PutRequest(key=b"a"))
    get = proto.RequestOp(request_range=proto.RangeRequest(key=b"a"))
    delete = proto.RequestOp(request_delete_range=proto.DeleteRangeRequest(key=b"a"))
    write(lone, "KV.Put", key=b"k")
    write(lone, "KV.Put", key=b"k", lease=99)  # Refused: counts for nothing.
    write(lone, "KV.DeleteRange", key=b"k")
    read(lone, "KV.Range", key=b"k")
    read(lone, "KV.Range", key=b"k", range_end=b"\0")
    write(lone, "KV.Txn", success=[put, get])
    write(lone, "KV.Txn", success=[delete], failure=[put, get])
    read(lone, "KV.Txn", success=[get, get, get])
    counted = {
        name: value(lone, f"etcd_mvcc_{name}_total") for name in ("put", "delete", "range", "txn")
    }
    assert counted == {"put": 2, "delete": 2, "range": 6, "txn": 2}
    for name, count in counted.items():
        assert value(lone, f"etcd_debugging_mvcc_{name}_total") == count


def test_a_batch_is_one_entry_of_many_requests(lone: LoneMember) -> None:
    counts = lone.member.metrics
    index = value(lone, "etcd_server_proposals_committed_total")
    for _ in range(3):
        lone.member.writes.propose_message(Waiter(None, 0, PUT, proto.PutRequest(key=b"k")))
    turn(lone.member)
    assert value(lone, "etcd_server_proposals_pending") == 3
    lone.settle()
    assert value(lone, "etcd_server_proposals_pending") == 0
    assert value(lone, "etcd_server_proposals_committed_total") == index + 1
    assert (counts.batch_requests.sum, sum(counts.batch_requests.counts)) == (3, 1)


def test_proposals_that_fail_are_counted(lone: LoneMember, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("etcdlite.replica.writes.MAX_PROPOSED_BYTES", 0)
        write(lone, "KV.Put", key=b"k")
    assert value(lone, "etcd_server_proposals_failed_total") == 1
    for _ in range(2):
        lone.member.writes.propose_message(Waiter(None, 0, PUT, proto.PutRequest(key=b"k")))
    turn(lone.member)
    lone.now += 100.0
    lone.member.tick()
    assert value(lone, "etcd_server_proposals_failed_total") == 3
    lone.settle()
    assert value(lone, "etcd_server_proposals_pending") == 0


def test_slow_applies_are_counted_also_when_they_are_not_logged(tmp_path: Path) -> None:
    lone = LoneMember(tmp_path, warn_apply_s=-1.0)
    for _ in range(50):
        write(lone, "KV.Put", key=b"k")
    assert value(lone, "etcd_server_slow_apply_total") == 50
    lone.close()


def test_the_log_names_the_first_of_the_slow_requests(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Client(Asker):
        client = "10.0.0.9:4711"

    lone = LoneMember(tmp_path, warn_request_s=-1.0)
    put = proto.PutRequest(key=b"jobs/" + b"x" * 100, value=b"secret")
    lone.member.writes.propose_message(Waiter(Client(), 1, methods.PUT, put))
    lone.settle()
    lone.close()
    line = next(line for line in capfd.readouterr().err.splitlines() if "took too long" in line)
    assert "method=KV.Put" in line and "client=10.0.0.9:4711" in line
    assert "key=jobs/xxx" in line and "x" * 30 not in line and "secret" not in line
    # What only members ask for has a name, too.
    assert about(Waiter(None, 0, methods.PUBLISH, proto.Member()))["method"] == "Log.Publish"


def test_with_users_slow_and_failed_requests_are_those_of_clients(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With users, an entry begins with the author of its requests, which counts as none of them."""
    lone = LoneMember(tmp_path, warn_request_s=-1.0, warn_apply_s=-1.0)
    add_users(lone)
    ann = User(lone).log_in("ann")
    monkeypatch.setattr(log, "limited", lambda key, per_s=1.0: False)
    ann.send("KV.Put", key=b"a1")
    ann.send("KV.Put", key=b"a2")
    lone.settle()
    lines = [line for line in capfd.readouterr().err.splitlines() if "key=a1" in line]
    assert ["apply request" in line for line in lines] == [False, True], lines
    assert all("requests=2 " in line and "method=KV.Put" in line for line in lines)

    ann.send("KV.Put", key=b"a3")
    turn(lone.member)
    lone.now += 100.0
    lone.member.tick()
    assert value(lone, "etcd_server_proposals_failed_total") == 1
    lone.settle()
    lone.close()


def test_a_transaction_is_named_by_its_first_key() -> None:
    put = proto.RequestOp(request_put=proto.PutRequest(key=b"written"))
    compared = proto.TxnRequest(compare=[proto.Compare(key=b"compared")], success=[put])
    for request, key in ((compared, "compared"), (proto.TxnRequest(success=[put]), "written")):
        assert about(Waiter(None, 1, methods.TXN, request))["key"] == key
    assert about(Waiter(None, 1, methods.TXN, proto.TxnRequest())) == {"method": "KV.Txn"}


def test_the_life_of_leases_is_counted(lone: LoneMember) -> None:
    for lease in (1, 2, 3):
        write(lone, "Lease.LeaseGrant", ID=lease, TTL=10)
    write(lone, "KV.Put", key=b"a", lease=3)
    write(lone, "Lease.LeaseRevoke", ID=3)
    lone.tick(20.0)
    assert value(lone, "etcd_debugging_lease_granted_total") == 3
    assert value(lone, "etcd_debugging_lease_revoked_total") == 3
    assert value(lone, "etcd_debugging_server_lease_expired_total") == 2
    assert value(lone, "etcd_debugging_lease_ttl_total_bucket", le="8") == 0
    assert value(lone, "etcd_debugging_lease_ttl_total_bucket", le="16") == 3
    assert value(lone, "etcd_mvcc_delete_total") == 1


def test_what_an_operator_must_look_after_is_shown(lone: LoneMember) -> None:
    write(lone, "Lease.LeaseGrant", ID=1, TTL=10)
    assert value(lone, "etcdlite_leases") == 1
    assert value(lone, "etcdlite_disk_left_bytes") == lone.member.state.alarms.disk_left_bytes > 0
    assert abs(value(lone, "etcdlite_clock_timestamp_seconds") - time.time()) < 60
    assert value(lone, "etcdlite_alarms", alarm="NOSPACE") == 0
    write(lone, "Maintenance.Alarm", action=1, memberID=7, alarm=1)
    assert value(lone, "etcdlite_alarms", alarm="NOSPACE") == 1
    assert value(lone, "etcdlite_alarms", alarm="CORRUPT") == 0


def test_the_status_of_the_backup_is_shown_and_nothing_else_of_its_file(
    lone: LoneMember, tmp_path: Path
) -> None:
    file = tmp_path / "status.prom"
    assert backup_status.read(str(file)) == backup_status.read("") == {}
    assert backup_status.read(str(tmp_path)) == {}
    file.write_text(
        "# a comment\nup 1\netcdlite_backup_size_bytes 7\netcdlite_backup_size_bytes x\n"
        f"{backup_status.LAST_SUCCESS} 1800000000\n{backup_status.LAST_FAILURE} 1e9\n"
    )
    found = backup_status.read(str(file))
    assert found == {backup_status.LAST_SUCCESS: 1_800_000_000, backup_status.SIZE: 7}
    shown = samples(lone, backup=found)
    assert shown[backup_status.LAST_SUCCESS, frozenset()] == 1_800_000_000
    assert not any(name.startswith("etcdlite_backup_") for name, _ in samples(lone))
    file.write_bytes(b"x" * 5000 + b"\netcdlite_backup_size_bytes 7\n")
    assert backup_status.read(str(file)) == {}, "a large file is read as a whole"


def test_background_work_is_counted(lone: LoneMember) -> None:
    for _ in range(20):
        write(lone, "KV.Put", key=b"k", value=bytes(10_000))
    write(lone, "KV.Compact", revision=20)
    asker = Asker()
    method = methods.METHOD_BY_NAME["Maintenance.Defragment"].number
    lone.member.maintenance.defragment(Waiter(asker, 1, method, None).answer)
    lone.settle()
    lone.tick()
    assert type(asker.outcome) is proto.DefragmentResponse
    compacted = "etcd_debugging_mvcc_db_compaction"
    assert value(lone, f"{compacted}_keys_total") > 0
    assert value(lone, f"{compacted}_last") > 1_600_000_000
    assert value(lone, f"{compacted}_total_duration_milliseconds_count") == 1
    assert value(lone, f"{compacted}_pause_duration_milliseconds_count") >= 1
    assert value(lone, "etcd_disk_backend_defrag_duration_seconds_count") == 1
    checkpoints = value(lone, "etcdlite_checkpoints_total")
    assert checkpoints == value(lone, "etcdlite_checkpoint_duration_seconds_count") >= 1
    assert value(lone, "etcdlite_cleaned_segments_total") >= 1


def test_hashing_is_counted(lone: LoneMember) -> None:
    read(lone, "Maintenance.Hash")
    read(lone, "Maintenance.HashKV")
    assert value(lone, "etcd_mvcc_hash_duration_seconds_count") == 1
    assert value(lone, "etcd_mvcc_hash_rev_duration_seconds_count") == 1


def test_a_sync_of_the_log_counts_coarsely_and_finely(lone: LoneMember) -> None:
    lone.member.metrics.log_synced(0.0003, 0.0001, 4096)
    assert value(lone, "etcd_disk_wal_fsync_duration_seconds_bucket", le="0.001") == 1
    assert value(lone, "etcdlite_log_sync_duration_seconds_bucket", le="0.0002") == 0
    assert value(lone, "etcdlite_log_sync_duration_seconds_bucket", le="0.0005") == 1
    assert value(lone, "etcd_disk_wal_write_bytes_total") == 4096


def test_the_versions_that_clients_send_make_a_bounded_number_of_lines(lone: LoneMember) -> None:
    counts = lone.member.metrics
    for number in range(1000):
        counts.client(f"9.{number}").unary += 1
    counts.client("").streams += 1
    lines = [key for key in samples(lone) if key[0] == "etcd_server_client_requests_total"]
    assert len(lines) == metrics.MAX_CLIENT_VERSIONS + 2
    total = sum(samples(lone)[key] for key in lines)
    assert total == 1001


def test_a_long_version_of_a_client_makes_no_line(lone: LoneMember) -> None:
    counts = lone.member.metrics
    counts.client("9" * metrics.MAX_VERSION_CHARS).unary += 1
    counts.client("9" * (metrics.MAX_VERSION_CHARS + 1)).unary += 1
    name = "etcd_server_client_requests_total"
    shown = [key for key in samples(lone) if key[0] == name and "9" in str(key)]
    assert len(shown) == 1


def test_peers_are_counted_separately(lone: LoneMember) -> None:
    peer = lone.member.metrics.peers[0xABC] = metrics.Peer()
    peer.sent_bytes, peer.received_bytes = 10, 20
    peer.round_trip_s.observe(0.0003)
    assert value(lone, "etcd_network_peer_sent_bytes_total", To="abc") == 10
    assert value(lone, "etcd_network_peer_received_bytes_total", From="abc") == 20
    name = "etcd_network_peer_round_trip_time_seconds_bucket"
    assert value(lone, name, To="abc", le="0.0002") == 0
    assert value(lone, name, To="abc", le="0.0004") == 1


# gRPC.


def rpc(lone: LoneMember, name: str, number: int, **labels: str) -> float:
    method = methods.METHODS[number]
    kind = "bidi_stream" if number == WATCH else "unary"
    about = {"grpc_service": method.service, "grpc_method": method.name, "grpc_type": kind}
    return value(lone, f"grpc_server_{name}_total", **about, **labels)


def frame(kind: int, flags: int, stream_id: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + body


def ask(stream_id: int, number: int, body: bytes, *, ends: bool = True) -> bytes:
    """A request as HTTP/2 carries it."""
    head = pack(
        [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", methods.METHODS[number].grpc_path.encode()),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            (b"client-api-version", b"3.5"),
        ]
    )
    message = b"\0" + len(body).to_bytes(4, "big") + body
    return frame(1, 4, stream_id, head) + frame(0, int(ends), stream_id, message)


def test_grpc_requests_are_counted_by_method_and_status(lone: LoneMember) -> None:
    session = GrpcSession(lone.member, lambda session: None)
    put = proto.PutRequest(key=b"key", value=b"value").encode()
    watch = proto.WatchRequest(create_request=proto.WatchCreateRequest(key=b"key")).encode()
    session.receive(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
    session.receive(ask(1, WATCH, watch, ends=False) + ask(3, PUT, put) + ask(5, PUT, b""))
    lone.settle()
    assert rpc(lone, "started", PUT) == 2
    assert rpc(lone, "msg_received", PUT) == 2
    assert rpc(lone, "msg_sent", PUT) == 1
    assert rpc(lone, "handled", PUT, grpc_code="OK") == 1
    assert rpc(lone, "handled", PUT, grpc_code="InvalidArgument") == 1
    assert rpc(lone, "started", WATCH) == 1
    assert rpc(lone, "msg_received", WATCH) == 1
    assert rpc(lone, "msg_sent", WATCH) == 2, "created, and the event"
    assert rpc(lone, "handled", WATCH, grpc_code="OK") == 0
    received = value(lone, "etcd_network_client_grpc_received_bytes_total")
    assert received == len(put) + len(watch)
    assert value(lone, "etcd_network_client_grpc_sent_bytes_total") > 0
    by_client = "etcd_server_client_requests_total"
    assert value(lone, by_client, client_api_version="3.5", type="unary") == 2
    assert value(lone, by_client, client_api_version="3.5", type="stream") == 1
    session.closed()
    assert rpc(lone, "handled", WATCH, grpc_code="Canceled") == 1


def test_other_methods_are_shown_once_they_are_added() -> None:
    counts = Metrics()
    counts.add_rpc(0x100, "/grpc.health.v1.Health/Check", False, False)
    counts.add_rpc(0, "", False, False)
    added = counts.rpcs[0x100]
    assert (added.service, added.name, added.kind) == ("grpc.health.v1.Health", "Check", "unary")
    assert counts.rpcs[0].name == ""


# JSON, which in etcd is a client of gRPC.


def post(lone: LoneMember, method: str, body: bytes, *headers: str) -> HttpSession:
    session = HttpSession(lone.member, lambda session: None, Site(lone.member))
    path = methods.METHOD_BY_NAME[method].http_paths[0]
    head = [f"POST {path} HTTP/1.1", "Host: localhost", *headers]
    session.receive(
        "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode("latin-1") + body
    )
    lone.settle()
    return session


def test_json_requests_are_counted_as_grpc_requests(lone: LoneMember) -> None:
    post(lone, "KV.Put", b'{"key":"aw=="}', "Grpc-Metadata-client-api-version: 3.4")
    post(lone, "KV.Put", b"{}")
    assert rpc(lone, "started", PUT) == rpc(lone, "msg_received", PUT) == 2
    assert rpc(lone, "handled", PUT, grpc_code="OK") == rpc(lone, "msg_sent", PUT) == 1
    assert rpc(lone, "handled", PUT, grpc_code="InvalidArgument") == 1
    by_client = "etcd_server_client_requests_total"
    assert value(lone, by_client, client_api_version="3.4", type="unary") == 1
    assert value(lone, by_client, client_api_version="unknown", type="unary") == 1
    assert value(lone, "etcd_network_client_grpc_received_bytes_total") == 3
    assert value(lone, "etcd_network_client_grpc_sent_bytes_total") > 0


def test_a_json_watch_counts_from_its_header_until_its_client_leaves(lone: LoneMember) -> None:
    session = post(lone, "Watch.Watch", b'{"create_request":{"key":"aw=="}}')
    write(lone, "KV.Put", key=b"k")
    assert rpc(lone, "started", WATCH) == rpc(lone, "msg_received", WATCH) == 1
    assert rpc(lone, "msg_sent", WATCH) == 2, "created, and the event"
    assert "Canceled" not in text(lone)
    session.closed()
    assert rpc(lone, "handled", WATCH, grpc_code="Canceled") == 1
    kind = {"type": "stream", "client_api_version": "unknown"}
    assert value(lone, "etcd_server_client_requests_total", **kind) == 1


def test_the_time_of_a_request_ends_with_its_answer(lone: LoneMember) -> None:
    session = GrpcSession(lone.member, lambda session: None)
    session.receive(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
    session.receive(ask(1, PUT, proto.PutRequest(key=b"key").encode()))
    lone.now += 0.2
    lone.settle()
    about = {"grpc_service": "etcdserverpb.KV", "grpc_method": "Put", "grpc_type": "unary"}
    name = "grpc_server_handling_seconds"
    assert value(lone, f"{name}_bucket", le="0.1", **about) == 0
    assert value(lone, f"{name}_bucket", le="0.25", **about) == 1
    assert value(lone, f"{name}_sum", **about) == pytest.approx(0.2)


# etcd's alert rules and dashboard.

RULES = Path(__file__).parent / "cases" / "etcd_alerts.yml"
NOT_OURS = {"up"}
"""Prometheus makes it."""
GIVEN = {"job", "instance", "cluster", "endpoint"}
"""Labels that Prometheus adds to what it scrapes."""


def expressions() -> list[str]:
    return [
        line.partition("expr: ")[2]
        for line in RULES.read_text().splitlines()
        if line.lstrip().startswith(("expr: ", "- expr: "))
    ]


def selectors() -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The metrics in the expressions: each name, and the matchers of its labels."""
    found = []
    for expression in expressions():
        for name, matchers in re.findall(r"\b([a-z]\w+)\{(.*?)\}", expression):
            pairs = re.findall(r'(\w+)(=~|!=|=)"(.*?)"', matchers)
            found.append((name, pairs))
    return found


def test_every_series_of_etcds_alerts_and_dashboard_exists_from_the_start(lone: LoneMember) -> None:
    lone.member.metrics.peers[0xAB] = metrics.Peer()
    shown: dict[str, list[dict[str, str]]] = {}
    for name, pairs in samples(lone):
        shown.setdefault(name, []).append(dict(pairs))
    assert len(selectors()) > 30
    for name, matchers in selectors():
        if name in NOT_OURS:
            continue
        assert name in shown, name
        for label, how, text in matchers:
            if label in GIVEN:
                continue
            values = {labels[label] for labels in shown[name]}
            if how == "!=":
                assert values - {text}, (name, label)
            else:
                wanted = set(text.split("|"))
                assert wanted <= values, (name, label, wanted - values)


def test_a_failure_code_of_the_alerts_is_shown_for_every_method_before_it_occurs(
    lone: LoneMember,
) -> None:
    codes: dict[tuple[str, str], set[str]] = {}
    for name, pairs in samples(lone):
        if name == "grpc_server_handled_total":
            labels = dict(pairs)
            method = labels["grpc_service"], labels["grpc_method"]
            codes.setdefault(method, set()).add(labels["grpc_code"])
    alerted = {errors.CODE_NAMES[code] for code in metrics.ALERT_CODES}
    for row in methods.METHODS.values():
        assert alerted < codes[row.service, row.name]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", str(RULES)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_peer_has_its_series_from_the_start(tmp_path: Path) -> None:
    lone = LoneMember(tmp_path)
    other = proto.Member(ID=0xAB, peerURLs=["http://127.0.0.1:1"])
    lone.member.peers.update({7: proto.Member(ID=7), 0xAB: other})
    pair = {"Local": "7", "Remote": "ab"}
    assert value(lone, "etcd_network_known_peers", **pair) == 1
    assert value(lone, "etcd_network_active_peers", **pair) == 0
    assert value(lone, "etcd_network_peer_sent_failures_total", To="ab") == 0
    lone.member.peers.send(Message(HEARTBEAT, 0xAB, 7, 1))
    assert value(lone, "etcd_network_peer_sent_failures_total", To="ab") == 1
    lone.close()


def test_the_time_to_apply_is_shown_by_operation_and_success(lone: LoneMember) -> None:
    write(lone, "KV.Put", key=b"k")
    write(lone, "KV.Put", key=b"k", lease=99)
    name = "etcd_server_apply_duration_seconds_count"
    assert value(lone, name, version="v3", op="Put", success="true") == 1
    assert value(lone, name, version="v3", op="Put", success="false") == 1


def test_read_rounds_without_an_answer_count_as_slow(
    lone: LoneMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Member, "needs_no_round", False)
    lone.member.raft.read_index = lambda context: None  # type: ignore[method-assign]
    lone.member.reads.read(Waiter(Asker(), 1, RANGE, proto.RangeRequest(key=b"k")))
    turn(lone.member)
    lone.tick(1.0)
    assert value(lone, "etcd_server_slow_read_indexes_total") == 1
    assert value(lone, "etcd_server_read_indexes_failed_total") == 0
