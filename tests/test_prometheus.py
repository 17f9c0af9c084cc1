"""The alert rules and the Grafana dashboard of packaging/prometheus: every metric exists, and each
alert fires when it should and not before."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
from rigs.lone_member import LoneMember
from rigs.processes import ROOT

from etcdlite import backup_status, metrics
from etcdlite.wire import exposition

PACKAGING = ROOT / "packaging"
ALERTS = PACKAGING / "prometheus" / "alerts.yml"

sys.path.insert(0, str(PACKAGING))
import dashboard  # noqa: E402

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed; on Debian it is in the package prometheus",
)

NOT_OURS = {"up"}
"""Prometheus makes it."""


def promtool(*words: str | Path) -> None:
    done = subprocess.run(["promtool", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def alerts() -> dict[str, str]:
    """The expressions by the names of the alerts."""
    found = re.findall(r"- alert: (\w+)\n +expr: (.+)\n", ALERTS.read_text())
    assert len(found) == ALERTS.read_text().count("- alert:")
    return dict(found)


# The names.


def shown(tmp_path: Path) -> set[str]:
    """The names of all series that a member may show."""
    lone = LoneMember(tmp_path / "lone")
    lone.member.metrics.peers[0xAB] = metrics.Peer()
    scrape = exposition.Scrape(
        lone.member,
        {"native": 1},
        budget=exposition.Budget(1 << 30),
        expiries={"a.crt": 1.0},
        backup=dict.fromkeys(backup_status.NAMES, 1.0),
    )
    text = scrape.render().decode()
    lone.close()
    names = set(re.findall(r"^# TYPE (\w+) (?:gauge|counter)$", text, re.M))
    for name in re.findall(r"^# TYPE (\w+) histogram$", text, re.M):
        names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    return names


def names_in(expression: str) -> set[str]:
    """The metrics that it reads: each has a selector in braces."""
    return set(re.findall(r"\b([a-z]\w+)\{", expression))


def test_every_metric_of_the_alerts_and_the_dashboard_exists(tmp_path: Path) -> None:
    known = shown(tmp_path) | NOT_OURS
    for expression in (*alerts().values(), *dashboard.expressions()):
        names = names_in(expression)
        assert names and names <= known, (expression, names - known)
        without = re.sub(r"\{.*?\}|\".*?\"", "{}", expression)
        bare = re.findall(r"\b((?:etcd|etcdlite|grpc|process)_\w+)\b(?!\{)", without)
        assert set(bare) <= {"grpc_method", "grpc_code"}, "a metric has no selector"


# The dashboard.


def test_the_dashboard_is_the_one_that_its_table_makes() -> None:
    assert dashboard.FILE.read_text() == dashboard.text(), "run python3 packaging/dashboard.py"


def test_the_dashboard_is_complete() -> None:
    made = json.loads(dashboard.FILE.read_text())
    ids = [panel["id"] for panel in made["panels"]]
    assert len(ids) == len(set(ids)) > 30
    taken: set[tuple[int, int]] = set()
    for panel in made["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} is on top of another panel"
        assert max(x for x, _ in cells) < dashboard.COLUMNS
        taken |= cells
    variables = {variable["name"] for variable in made["templating"]["list"]}
    assert set(re.findall(r"\$(\w+)", json.dumps(made["panels"]))) - variables == {
        "__rate_interval"
    }


@needs_promtool
def test_promtool_accepts_all_expressions(tmp_path: Path) -> None:
    promtool("check", "rules", ALERTS)
    variables = {"$job": "etcd", "$instance": ".*", "$__rate_interval": "5m"}
    rules = []
    for number, expression in enumerate(dashboard.expressions()):
        for name, value in variables.items():
            expression = expression.replace(name, value)
        rules.append({"record": f"panel:{number}", "expr": expression})
    file = tmp_path / "dashboard.yml"
    # JSON is YAML.
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", file)


# The alerts.


class Case(NamedTuple):
    """Series that make one alert fire, and no other."""

    series: dict[str, str]
    """Values every minute, in promtool's notation, by the name with labels beside job and
    instance. They replace those of a healthy member."""
    at: str
    """When it fires."""
    before: str
    """When it must not fire yet."""


def buckets(name: str, per_minute: int) -> dict[str, str]:
    """All values are in the bucket up to 1 s, none in that up to 0.1 s."""
    return {
        f'{name}_bucket{{le="0.1"}}': "0x300",
        f'{name}_bucket{{le="1"}}': f"0+{per_minute}x300",
        f'{name}_bucket{{le="+Inf"}}': f"0+{per_minute}x300",
    }


HEALTHY = {
    "up": "1x300",
    "etcd_server_has_leader": "1x300",
    "etcd_server_leader_changes_seen_total": "1x300",
    'etcd_network_active_peers{Remote="b"}': "1x300",
    "etcd_server_proposals_committed_total": "0+1000x300",
    "etcd_server_proposals_applied_total": "0+1000x300",
    'etcdlite_alarms{alarm="NOSPACE"}': "0x300",
    "etcdlite_disk_left_bytes": "1e10x300",
    "etcd_mvcc_db_total_size_in_use_in_bytes": "1e8x300",
    "etcd_server_quota_backend_bytes": "2e9x300",
    'etcdlite_log_sync_duration_seconds_bucket{le="0.1"}': "0+60x300",
    'etcdlite_log_sync_duration_seconds_bucket{le="1"}': "0+60x300",
    'etcdlite_log_sync_duration_seconds_bucket{le="+Inf"}': "0+60x300",
    'etcdlite_loop_turn_duration_seconds_bucket{le="0.1"}': "0+60x300",
    'etcdlite_loop_turn_duration_seconds_bucket{le="1"}': "0+60x300",
    'etcdlite_loop_turn_duration_seconds_bucket{le="+Inf"}': "0+60x300",
    "etcdlite_damaged_records": "0x300",
    'etcdlite_certificate_expiry_timestamp_seconds{file="a"}': "1e9x300",
    "etcdlite_backup_last_success_timestamp_seconds": "0+STEPx300",
    "etcdlite_backup_last_failure_timestamp_seconds": "-1x300",
    "etcdlite_clock_timestamp_seconds": "0+STEPx300",
    "process_open_fds": "50x300",
    "process_max_fds": "65536x300",
    "etcdlite_connections_shed_total": "3x300",
    'etcdlite_build_info{version="1",python_version="3"}': "1x300",
}
"""The series of a healthy member. STEP: seconds between two values. Time begins at 0."""

CASES = {
    "EtcdliteMemberDown": Case({"up": "0x300"}, "4m", "2m"),
    "EtcdliteNoLeader": Case({"etcd_server_has_leader": "0x300"}, "2m", "0m"),
    "EtcdliteLeaderChanges": Case(
        {"etcd_server_leader_changes_seen_total": "0x30 5x300"}, "37m", "30m"
    ),
    "EtcdlitePeerDisconnected": Case({'etcd_network_active_peers{Remote="b"}': "0x99"}, "6m", "4m"),
    "EtcdliteMemberLags": Case(
        {"etcd_server_proposals_applied_total": "0x300"}, "15m", "9m"
    ),
    "EtcdliteAlarm": Case({'etcdlite_alarms{alarm="NOSPACE"}': "0 0 1x300"}, "2m", "1m"),
    "EtcdliteDiskAlmostFull": Case({"etcdlite_disk_left_bytes": "1e8x300"}, "6m", "4m"),
    "EtcdliteDiskFillsUp": Case({"etcdlite_disk_left_bytes": "1e10-1e7x300"}, "90m", "30m"),
    "EtcdliteQuotaAlmostUsed": Case(
        {"etcd_mvcc_db_total_size_in_use_in_bytes": "1.7e9x300"}, "11m", "9m"
    ),
    "EtcdliteSlowDisk": Case(buckets("etcdlite_log_sync_duration_seconds", 60), "20m", "5m"),
    "EtcdliteSlowLoop": Case(buckets("etcdlite_loop_turn_duration_seconds", 60), "20m", "5m"),
    "EtcdliteDamagedRecords": Case({"etcdlite_damaged_records": "0 1x300"}, "1m", "0m"),
    "EtcdliteCertificateEnds": Case(
        {'etcdlite_certificate_expiry_timestamp_seconds{file="a"}': "1e6x300"}, "61m", "59m"
    ),
    "EtcdliteBackupFailed": Case(
        {"etcdlite_backup_last_failure_timestamp_seconds": "0 0 1e6x300"}, "2m", "1m"
    ),
    "EtcdliteClockOff": Case({"etcdlite_clock_timestamp_seconds": "9+60x300"}, "11m", "9m"),
    "EtcdliteOpenFiles": Case({"process_open_fds": "60000x300"}, "11m", "9m"),
    "EtcdliteConnectionsShed": Case({"etcdlite_connections_shed_total": "3 3 9x300"}, "3m", "1m"),
}  # fmt: skip


STEPS_S = {"1m": 60, "1h": 3600}

Expected = tuple[str, str, int]
"""(alert, time, how many of them fire); the alert "" stands for all."""

Cluster = tuple[list[dict[str, str]], list[Expected]]
"""The series of each member that are not a healthy one's, and what fires."""


def check(folder: Path, step: str, clusters: list[Cluster]) -> None:
    """Look at these clusters at the same time; each is a job. The rules are evaluated in each
    step, which is what takes promtool long."""
    series, questions = [], []
    for job, (members, expected) in zip(map("etcd-{}".format, count()), clusters, strict=False):
        for number, changes in enumerate(members, 1):
            for name, values in {**HEALTHY, **changes}.items():
                bare, _, labels = name.partition("{")
                pairs = f'job="{job}",instance="m{number}"' + (f",{labels[:-1]}" if labels else "")
                values = values.replace("STEP", str(STEPS_S[step]))
                series.append({"series": f"{bare}{{{pairs}}}", "values": values})
        for alert, at, firing in expected:
            selector = f'alertstate="firing",job="{job}",alertname=~"{alert or ".*"}"'
            questions.append(
                {
                    "expr": f"count(ALERTS{{{selector}}})",
                    "eval_time": at,
                    "exp_samples": [{"labels": "{}", "value": firing}] if firing else [],
                }
            )
    shutil.copy(ALERTS, folder / "alerts.yml")
    group = {"interval": step, "input_series": series, "promql_expr_test": questions}
    about = {"rule_files": ["alerts.yml"], "evaluation_interval": step, "tests": [group]}
    (folder / "tests.yml").write_text(json.dumps(about))
    promtool("test", "rules", folder / "tests.yml")


def test_every_alert_has_a_case() -> None:
    others = {"EtcdliteNoMajority", "EtcdliteBackupOld", "EtcdliteVersionsDiffer"}
    assert set(CASES) | others == set(alerts())


@needs_promtool
def test_no_alert_fires_on_a_healthy_cluster(tmp_path: Path) -> None:
    healthy = [{}, {}, {}]
    unlimited = {"etcd_server_quota_backend_bytes": "0x300"}
    for_minutes = [("", f"{at}m", 0) for at in (1, 30, 90)]
    check(tmp_path, "1m", [(healthy, for_minutes), ([unlimited], [("", "30m", 0)])])
    check(tmp_path, "1h", [(healthy, [("", f"{at}h", 0) for at in (1, 24, 50)])])


@needs_promtool
def test_each_alert_fires_when_it_should_and_alone(tmp_path: Path) -> None:
    soon: list[Cluster] = []
    late: list[Cluster] = []
    for name, case in CASES.items():
        # A lone member that is down would be a cluster without a majority.
        others: list[dict[str, str]] = [{}, {}] if name == "EtcdliteMemberDown" else []
        expected = [(name, case.before, 0), (name, case.at, 1), ("", case.at, 1)]
        of_its_length = soon if int(case.at[:-1]) <= 20 else late
        of_its_length.append(([*others, case.series], expected))
    check(tmp_path, "1m", soon)
    check(tmp_path, "1m", late)


@needs_promtool
def test_alerts_of_a_whole_cluster_fire_when_they_should(tmp_path: Path) -> None:
    down = {"up": "0x300"}
    majority, backup = "EtcdliteNoMajority", "EtcdliteBackupOld"
    never = {backup_status.LAST_SUCCESS: "_x300", backup_status.LAST_FAILURE: "5x300"}
    check(
        tmp_path,
        "1m",
        [
            ([{}, down, down], [(majority, "0m", 0), (majority, "2m", 1)]),
            ([{}, {}, down], [(majority, "30m", 0)]),
            ([never], [("EtcdliteBackupFailed", "1m", 1)]),
        ],
    )
    old = {backup_status.LAST_SUCCESS: "0x300", backup_status.LAST_FAILURE: "_x300"}
    upgraded = {
        'etcdlite_build_info{version="2",python_version="3"}': "1x300",
        'etcdlite_build_info{version="1",python_version="3"}': "_x300",
    }
    version = "EtcdliteVersionsDiffer"
    check(
        tmp_path,
        "1h",
        [
            ([old, old, old], [(backup, "47h", 0), (backup, "49h", 1), ("", "49h", 1)]),
            ([old, old, {}], [("", "49h", 0)]),
            ([{}, {}, upgraded], [(version, "23h", 0), (version, "25h", 1), ("", "25h", 1)]),
        ],
    )
