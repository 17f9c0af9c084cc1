"""Makes the Grafana dashboard, packaging/prometheus/dashboard.json, from a table of panels.

python3 packaging/dashboard.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parent / "prometheus" / "dashboard.json"

COLUMNS = 24
"""The width of a Grafana dashboard."""

SELECTOR = 'job="$job", instance=~"$instance"'


class Panel(NamedTuple):
    title: str
    unit: str
    """A unit of Grafana."""
    targets: tuple[tuple[str, str], ...]
    """(expression, legend) each. "{}" stands for the selector of the chosen members."""
    kind: str = "timeseries"
    text: str = ""


def _rate(name: str, legend: str = "{{instance}}") -> tuple[str, str]:
    return f"rate({name}{{}}[$__rate_interval])", legend


def _quantile(share: float, name: str, by: str = "instance", legend: str = "") -> tuple[str, str]:
    buckets = f"rate({name}_bucket{{}}[$__rate_interval])"
    found = f"histogram_quantile({share:g}, sum by ({by}, le) ({buckets}))"
    return found, legend or f"{{{{{by}}}}} {100 * share:g}%"


ROWS: dict[str, tuple[Panel, ...]] = {
    "The cluster": (
        Panel("Members up", "none", (("sum(up{})", ""),), "stat"),
        Panel("Members with a leader", "none", (("sum(etcd_server_has_leader{})", ""),), "stat"),
        Panel(
            "Active alarms", "none", (("sum(max by (alarm) (etcdlite_alarms{}))", ""),), "stat",
            "NOSPACE or CORRUPT: writes are refused.",
        ),
        Panel("Space left on the fullest disk", "bytes",
              (("min(etcdlite_disk_left_bytes{})", ""),), "stat"),
        Panel("Age of the last backup", "s",
              (("time() - max(etcdlite_backup_last_success_timestamp_seconds{})", ""),), "stat"),
        Panel("First certificate ends in", "s",
              (("min(etcdlite_certificate_expiry_timestamp_seconds{}) - time()", ""),), "stat"),
    ),
    "Requests": (
        Panel(
            "Writes", "ops",
            tuple(
                (f"max(rate(etcd_mvcc_{kind}_total{{}}[$__rate_interval]))", f"{kind}s")
                for kind in ("put", "delete", "txn")
            ),
            text="Each member applies all writes, so this is the whole cluster's rate.",
        ),
        Panel("Ranges", "ops", (_rate("etcd_mvcc_range_total"),)),
        Panel(
            "Writes per entry of the log", "none",
            (("sum(rate(etcdlite_batch_requests_sum{}[$__rate_interval])) / "
              "sum(rate(etcdlite_batch_requests_count{}[$__rate_interval]))", "writes"),),
            text="Near 1, each write waits for a sync of its own.",
        ),
        Panel("Writes that wait or fail", "none", (
            ("etcd_server_proposals_pending{}", "{{instance}} waiting"),
            _rate("etcd_server_proposals_failed_total", "{{instance}} failed/s"),
        )),
        Panel("gRPC and JSON requests", "ops", (
            ("sum by (grpc_method) (rate(grpc_server_started_total{}[$__rate_interval])) > 0",
             "{{grpc_method}}"),
        )),
        Panel("gRPC and JSON errors", "ops", (
            ('sum by (grpc_method, grpc_code) (rate(grpc_server_handled_total{grpc_code!="OK", '
             + SELECTOR + "}[$__rate_interval])) > 0", "{{grpc_method}} {{grpc_code}}"),
        )),
        Panel("Time of gRPC and JSON requests, 99%", "s", (
            _quantile(0.99, "grpc_server_handling_seconds", "grpc_method", "{{grpc_method}}"),
        )),
    ),
    "Consensus": (
        Panel("Leader", "none", (("etcd_server_is_leader{} == 1", "{{instance}}"),)),
        Panel("New leaders", "none", (
            ("increase(etcd_server_leader_changes_seen_total{}[$__rate_interval])", "{{instance}}"),
        )),
        Panel("Entries not applied yet", "none", (
            ("scalar(max(etcd_server_proposals_committed_total{})) - "
             "etcd_server_proposals_applied_total{}", "{{instance}}"),
        )),
        Panel("Round trip between members, 99%", "s",
              (_quantile(0.99, "etcd_network_peer_round_trip_time_seconds"),)),
        Panel("Traffic between members", "Bps", (
            ("sum by (instance) (rate(etcd_network_peer_sent_bytes_total{}[$__rate_interval]))",
             "{{instance}} sent"),
            ("sum by (instance) (rate(etcd_network_peer_received_bytes_total{}[$__rate_interval]))",
             "{{instance}} received"),
        )),
        Panel("Connections to other members", "none", (
            ("sum by (instance) (etcd_network_active_peers{})", "{{instance}}"),
        )),
    ),
    "Storage": (
        Panel("Time of a sync of the log", "s", (
            _quantile(0.5, "etcdlite_log_sync_duration_seconds"),
            _quantile(0.99, "etcdlite_log_sync_duration_seconds"),
        ), text="Every write waits for one."),
        Panel("Size of the data", "bytes", (
            ("etcd_mvcc_db_total_size_in_bytes{}", "{{instance}} size"),
            ("etcd_mvcc_db_total_size_in_use_in_bytes{}", "{{instance}} in use"),
            ("min(etcd_server_quota_backend_bytes{})", "quota"),
        )),
        Panel("Space left on the disk", "bytes", (("etcdlite_disk_left_bytes{}", "{{instance}}"),)),
        Panel("Written to the log", "Bps", (_rate("etcd_disk_wal_write_bytes_total"),)),
        Panel("Keys", "none", (("max(etcd_debugging_mvcc_keys_total{})", "keys"),)),
        Panel("Garbage in data segments", "bytes",
              (("etcdlite_segment_garbage_bytes{}", "{{instance}}"),)),
    ),
    "Watches and leases": (
        Panel("Watches", "none", (
            ("etcd_debugging_mvcc_watcher_total{}", "{{instance}}"),
            ("etcdlite_slow_watches{}", "{{instance}} slow"),
        )),
        Panel("Events sent", "ops", (_rate("etcd_debugging_mvcc_events_total"),)),
        Panel("Leases", "none", (("max(etcdlite_leases{})", "leases"),)),
        Panel("Leases granted, renewed and expired", "ops", tuple(
            (f"sum(rate({name}{{}}[$__rate_interval]))", legend)
            for name, legend in (
                ("etcd_debugging_lease_granted_total", "granted"),
                ("etcd_debugging_lease_renewed_total", "renewed"),
                ("etcd_debugging_server_lease_expired_total", "expired"),
            )
        )),
    ),
    "The process": (
        Panel("Time of a turn of the loop, 99%", "s",
              (_quantile(0.99, "etcdlite_loop_turn_duration_seconds", legend="{{instance}}"),),
              text="A turn delays all clients."),
        Panel("CPU", "percentunit", (_rate("process_cpu_seconds_total"),)),
        Panel("Memory", "bytes", (
            ("process_resident_memory_bytes{}", "{{instance}}"),
            ("etcdlite_connection_memory_bytes{}", "{{instance}} connections"),
        )),
        Panel("Connections", "none", (
            ("sum by (instance, protocol) (etcdlite_connections{})", "{{instance}} {{protocol}}"),
        )),
        Panel("Open files", "none", (("process_open_fds{}", "{{instance}}"),)),
        Panel("Clock, ahead of Prometheus", "s", (
            ("etcdlite_clock_timestamp_seconds{} - timestamp(etcdlite_clock_timestamp_seconds{})",
             "{{instance}}"),
        )),
    ),
}  # fmt: skip


def expressions() -> list[str]:
    """All expressions, with the variables of Grafana."""
    return [
        expression.replace("{}", f"{{{SELECTOR}}}")
        for panels in ROWS.values()
        for panel in panels
        for expression, _ in panel.targets
    ]


def _panel(panel: Panel, number: int, x: int, y: int, width: int, height: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "gridPos": {"x": x, "y": y, "w": width, "h": height},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + position),
                "expr": expression.replace("{}", f"{{{SELECTOR}}}"),
                "legendFormat": legend,
            }
            for position, (expression, legend) in enumerate(panel.targets)
        ],
    }


def _panels() -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    y = 0
    for title, panels in ROWS.items():
        out.append(
            {
                "id": len(out) + 1,
                "type": "row",
                "title": title,
                "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
            }
        )
        y += 1
        are_small = panels[0].kind == "stat"
        width, height = (4, 4) if are_small else (8, 7)
        for position, panel in enumerate(panels):
            row, column = divmod(position, COLUMNS // width)
            place = (column * width, y + row * height, width, height)
            out.append(_panel(panel, len(out) + 1, *place))
        y += -(-len(panels) // (COLUMNS // width)) * height
    return out


def _variable(name: str, query: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "query": query,
        "refresh": 2,
        "sort": 1,
        **more,
    }


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana 8 and later import it."""
    build = "etcdlite_build_info"
    every = {"multi": True, "includeAll": True, "current": {"text": "All", "value": "$__all"}}
    return {
        "uid": "etcdlite",
        "title": "etcdlite",
        "tags": ["etcdlite"],
        "schemaVersion": 36,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                _variable("job", f"label_values({build}, job)"),
                _variable("instance", f'label_values({build}{{job="$job"}}, instance)', **every),
            ]
        },
        "panels": _panels(),
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
