"""`etcdlite-ctl doctor`: planted faults are found, and a healthy cluster gives no finding."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.ctl_runner import Ended, run_ctl
from rigs.processes import PATIENCE_S, ServerProcess, wait_until
from test_cluster_live import LiveCluster

from etcdlite import backup_status, certificates, proto
from etcdlite.cli import machine as machine_module
from etcdlite.cli.findings import CHECKS, ERROR, WARNING, Facts, examine
from etcdlite.cli.machine import Machine, Port
from etcdlite.cli.roster import Seen
from etcdlite.cli.scrape import Histogram, Series
from etcdlite.client import Client

MIB = 1 << 20
NOW = 1_800_000_000.0

# Checks without a cluster.


def seen(name: str, metrics: str = "", **fields: Any) -> Seen:
    """A member that answers and has nothing wrong with it, except for `fields`."""
    number = int(name[1:])
    about = {"version": "3.5.0", "leader": 1, "dbSize": 8 * MIB, "dbSizeInUse": 7 * MIB}
    about |= {"dbSizeQuota": 1 << 31, "raftIndex": 9, "raftAppliedIndex": 9}
    status = proto.StatusResponse(**{**about, **fields})
    text = f"etcdlite_clock_timestamp_seconds {NOW}\netcdlite_disk_left_bytes 9e9\n"
    text += 'process_max_fds 65536\nprocess_open_fds 50\netcdlite_build_info{version="1"} 1\n'
    text += metrics
    series = Series(text.encode(), NOW, 0.01)
    return Seen(name, number, f"10.0.0.{number}:2379", status=status, series=series)


def trio(**fields: Any) -> Facts:
    """Three healthy members, the third with these fields."""
    return Facts(NOW, (seen("m1"), seen("m2"), seen("m3", **fields)))


def dead(name: str, error: str = "connection refused") -> Seen:
    return Seen(name, int(name[1:]), f"10.0.0.{name[1:]}:2379", error=error)


def found(facts: Facts) -> set[tuple[str, str, int]]:
    return {(one.check, one.where, one.severity) for one in examine(facts)}


def test_a_healthy_cluster_gives_no_finding() -> None:
    assert examine(trio()) == []
    one = Facts(NOW, (seen("m1"),))
    assert examine(one) == []


def test_every_finding_says_what_why_and_what_to_do() -> None:
    for finding in examine(
        trio(dbSizeQuota=1, errors=["memberID:3 alarm:NOSPACE "], metrics="process_max_fds 0")
    ):
        assert finding.line.count("; ") >= 2 and "\n" not in finding.line
        assert all(finding), finding


CASES: dict[str, tuple[Facts, set[tuple[str, str, int]]]] = {
    "a full disk": (
        trio(metrics="etcdlite_disk_left_bytes -9e9\netcdlite_disk_left_bytes -9"),
        {("space", "m3", ERROR)},
    ),
    "little space": (
        Facts(NOW, (seen("m1", dbSizeQuota=64 * MIB)._replace(
            series=Series(b"etcdlite_disk_left_bytes 1e8", NOW)),)),
        {("space", "m1", WARNING)},
    ),
    "quotas that differ": (trio(dbSizeQuota=1 << 30), {("quota", "the cluster", WARNING)}),
    "a quota in use": (
        Facts(NOW, (seen("m1", dbSize=90 * MIB, dbSizeInUse=90 * MIB, dbSizeQuota=100 * MIB),)),
        {("quota", "m1", WARNING)},
    ),
    "a quota beyond the disk": (
        Facts(NOW, (seen("m1", dbSizeQuota=1 << 40),)), {("quota", "m1", WARNING)},
    ),
    "a slow disk": (
        trio(metrics='etcdlite_log_sync_duration_seconds_bucket{le="0.05"} 10\n'
             'etcdlite_log_sync_duration_seconds_bucket{le="0.1"} 30\n'
             'etcdlite_log_sync_duration_seconds_bucket{le="+Inf"} 30'),
        {("disk", "m3", WARNING)},
    ),
    "a disk with few syncs": (
        trio(metrics='etcdlite_log_sync_duration_seconds_bucket{le="+Inf"} 3'), set(),
    ),
    "an expired certificate": (
        trio(metrics=f'etcdlite_certificate_expiry_timestamp_seconds{{file="/a.crt"}} {NOW - 9}'),
        {("certificates", "m3", ERROR)},
    ),
    "a certificate that ends soon": (
        trio(metrics=f'etcdlite_certificate_expiry_timestamp_seconds{{file="a"}} {NOW + 9e5}'),
        {("certificates", "m3", WARNING)},
    ),
    "a certificate seen from outside": (
        Facts(NOW, (seen("m1")._replace(certificate_ends_s=NOW - 1),)),
        {("certificates", "m1", ERROR)},
    ),
    "a dead member": (
        Facts(NOW, (seen("m1"), seen("m2"), dead("m3"))), {("reachability", "m3", ERROR)},
    ),
    "no leader": (trio(leader=0), {("reachability", "m3", ERROR)}),
    "two members": (
        Facts(NOW, (seen("m1"), seen("m2"))), {("reachability", "the cluster", WARNING)},
    ),
    "a broken link": (
        trio(metrics='etcd_network_active_peers{Local="3",Remote="1"} 0'),
        {("reachability", "m3", ERROR)},
    ),
    "a lagging member": (
        trio()._replace(lags={"m3": 4000}, lag_s=2.0), {("lag", "m3", WARNING)},
    ),
    "a clock that is off": (
        Facts(NOW, (seen("m1"), seen("m2"), seen("m3")._replace(
            series=Series(f"etcdlite_clock_timestamp_seconds {NOW - 300}".encode(), NOW)))),
        {("clock", "m3", ERROR)},
    ),
    "a clock of this machine that is off": (
        Facts(NOW, tuple(one._replace(series=Series(
            f"etcdlite_clock_timestamp_seconds {NOW + 5}".encode(), NOW))
            for one in trio().members)),
        {("clock", "this machine", WARNING)},
    ),
    "a slow answer that hides the clock": (
        Facts(NOW, (seen("m1")._replace(
            series=Series(f"etcdlite_clock_timestamp_seconds {NOW - 2}".encode(), NOW, 4.0)),)),
        set(),
    ),
    "an old backup": (
        trio(metrics=f"{backup_status.LAST_SUCCESS} {NOW - 3 * 86400}"),
        {("backup", "the cluster", WARNING)},
    ),
    "an old backup here and a new one on a member": (
        trio(metrics=f"{backup_status.LAST_SUCCESS} {NOW - 3600}")._replace(
            machine=Machine("f", backup={backup_status.LAST_SUCCESS: int(NOW - 1e6)})),
        set(),
    ),
    "a failed backup": (
        trio(metrics=f"{backup_status.LAST_SUCCESS} {NOW - 9}\n{backup_status.LAST_FAILURE} {NOW}"),
        {("backup", "the cluster", ERROR)},
    ),
    "versions that differ": (
        Facts(NOW, (seen("m1"), seen("m2"), seen("m3")._replace(
            series=Series(b'etcdlite_build_info{version="2"} 1', NOW)))),
        {("versions", "the cluster", WARNING)},
    ),
    "a downgrade that was not ended": (
        trio(downgradeInfo=proto.DowngradeInfo(enabled=True, targetVersion="0.1.0")),
        {("versions", "the cluster", WARNING)},
    ),
    "fragmentation": (trio(dbSize=80 * MIB), {("fragmentation", "m3", WARNING)}),
    "an alarm": (trio(errors=["memberID:2 alarm:NOSPACE "]), {("alarms", "m2", ERROR)}),
    "damage": (trio(errors=["etcdlite: damaged data"]), {("alarms", "m3", ERROR)}),
    "a low limit of open files": (
        Facts(NOW, (seen("m1")._replace(series=Series(b"process_max_fds 1024", NOW)),)),
        {("files", "m1", WARNING)},
    ),
    "open files near the limit": (
        Facts(NOW, (seen("m1")._replace(
            series=Series(b"process_max_fds 5000\nprocess_open_fds 4500", NOW)),)),
        {("files", "m1", ERROR)},
    ),
    "a taken port": (
        trio()._replace(machine=Machine("f", taken_ports=[Port("listen", "http://h:1", "nginx")])),
        {("ports", "http://h:1", ERROR)},
    ),
    "modes": (
        trio()._replace(machine=Machine("f", open_to_others=["/d/x"], foreign=["/d/y"])),
        {("modes", "/d/x", ERROR), ("modes", "/d/y", ERROR)},
    ),
    "a slow and full disk of a member that does not answer": (
        Facts(NOW, (), machine=Machine("f", data_dir="/d", syncs_s=[0.2, 0.3], disk=(9, 1 << 40))),
        {("space", "/d", ERROR), ("disk", "/d", WARNING)},
    ),
    "a low limit of a member that does not answer": (
        Facts(NOW, (), machine=Machine("f", max_files=1024)),
        {("files", "this machine", WARNING)},
    ),
    "a configuration": (
        Facts(NOW, machine=Machine("f", problems=["x: y; do z"], warnings=["odd"])),
        {("configuration", "f", ERROR), ("configuration", "f", WARNING)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_check_finds_what_is_wrong_and_nothing_else(case: str) -> None:
    facts, wanted = CASES[case]
    assert found(facts) == wanted


def test_every_check_has_a_case() -> None:
    assert {name for _, wanted in CASES.values() for name, _, _ in wanted} == set(CHECKS)


def test_without_facts_nothing_is_found() -> None:
    assert examine(Facts(NOW)) == []
    hostile = Series(b"etcdlite_clock_timestamp_seconds NaN\nprocess_max_fds\xff 1\nx{ 1\n", NOW)
    assert examine(Facts(NOW, (seen("m1")._replace(series=hostile),))) == []


def test_what_controls_a_terminal_is_escaped() -> None:
    member = dead("m3", "\x1b[2J\nok")._replace(name="m\r3")
    (finding,) = examine(Facts(NOW, (seen("m1"), seen("m2"), member)))
    assert "m\\r3: does not answer" in finding.line and "\\x1b[2J\\nok" in finding.line


def test_metrics_of_any_kind_are_read_or_skipped() -> None:
    text = b'a{x="1\\"\\n",y="2"} 3\na 4\nb NaN\nc{ 1\n# d 1\ne 1e3\nf_bucket{le="oops"} 1\ng x\n'
    series = Series(text)
    assert series.value("a") == 7 and series.value("e") == 1000 and series.value("d") is None
    assert series.all("a")[0][0] == {"x": '1"\n', "y": "2"}
    assert series.histogram("f") == Histogram() and Histogram().quantile(0.5) == 0
    one = Histogram(((0.1, 5.0), (0.5, 9.0), (float("inf"), 10.0)))
    assert [one.quantile(share) for share in (0.5, 0.9, 0.99)] == [0.1, 0.5, 0.5]
    later = Histogram(((0.1, 5.0), (0.5, 19.0), (float("inf"), 20.0)))
    assert later.since(one).quantile(0.1) == 0.5 and one.since(later) == one


# The machine.


def expired_certificate(folder: Path) -> tuple[Path, Path]:
    day = int(time.time()) // 86400 * 86400
    profile = certificates.Profile("server", "m1", ("localhost",), day - 90 * 86400, day - 86400)
    made = certificates.make(profile)
    paths = folder / "expired.crt", folder / "expired.key"
    for path, text in zip(paths, (made.certificate, made.key), strict=True):
        path.write_text(text)
        path.chmod(0o600)
    return paths


def test_the_configuration_of_an_instance_names_the_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_module, "SERVICE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(machine_module, "INSTANCE_FILES", re.compile(r".*/(\w+)\.toml"))
    (tmp_path / "m7.etcdlite").mkdir()
    file = tmp_path / "m7.toml"
    file.write_text("")
    machine = machine_module.look(str(file), is_named=True)
    assert machine is not None and machine.config is not None
    assert machine.config.name == "m7"
    assert machine.data_dir == str(tmp_path / "m7.etcdlite")
    assert machine.pid == 0
    (tmp_path / "m7.etcdlite").rmdir()
    machine = machine_module.look(str(file), is_named=True)
    assert machine is not None and not machine.data_dir
    assert f"the data directory {tmp_path}/m7.etcdlite (it does not exist)" in machine.unseen


@pytest.mark.parametrize("runs", [False, True])
def test_variables_of_the_unit_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    """Those of a running service come from files and drop-ins, too."""
    file = tmp_path / "etcdlite.toml"
    file.write_text('name = "of-the-file"')
    monkeypatch.setattr(machine_module, "DEFAULT_FILE", str(file))
    environ = {"ETCDLITE_NAME": "of-the-process", "HOME": "/"}
    with subprocess.Popen(["sleep", "60"], env={**os.environ, **environ}) as process:
        line = f"MainPID={process.pid if runs else 0}"
        shown = f"{line}\nEnvironment=HOME=/ ETCDLITE_NAME=of-the-unit 'ETCDLITE_LOG_LEVEL=warn'"
        command = tmp_path / "systemctl"
        command.write_text(f"#!/bin/sh\ncat <<END\n{shown}\nEND\n")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        machine = machine_module.look("", is_named=False)
        process.kill()
    assert machine is not None and machine.config is not None, machine
    assert machine.config.name == ("of-the-process" if runs else "of-the-unit")
    assert machine.config.log_level == "warn"
    other = tmp_path / "other.toml"
    other.write_text("")
    machine = machine_module.look(str(other), is_named=True)
    assert machine is not None and machine.config is not None and machine.config.name == "default"


def test_a_file_that_is_missing_or_wrong_is_a_finding(tmp_path: Path) -> None:
    assert machine_module.look(str(tmp_path / "no"), is_named=False) is None
    missing = machine_module.look(str(tmp_path / "no"), is_named=True)
    assert missing is not None and "no such file" in missing.problems[0]
    file = tmp_path / "wrong.toml"
    file.write_text('nmae = "m1"\nmax-txn-ops = "many"\n')
    wrong = machine_module.look(str(file), is_named=True)
    assert wrong is not None and len(wrong.problems) == 2
    found = {(one.severity, one.why) for one in examine(Facts(NOW, machine=wrong))}
    assert found == {(ERROR, "the member does not start")}


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "etcdlite.toml"
    (tmp_path / "data").mkdir(mode=0o700)
    file.write_text(f'data-dir = "{tmp_path / "data"}"\n')
    machine = machine_module.look(str(file), is_named=True)
    assert machine is not None
    machine_module.probe_disk(machine)
    assert 1 <= len(machine.syncs_s) <= machine_module.PROBES
    assert list((tmp_path / "data").iterdir()) == []


# Twelve faults in a cluster.

FAULTY = """
import os, sys, time
folder = sys.argv.pop(1)
def fault(name):
    try:
        return float(open(os.path.join(folder, name)).read() or 0)
    except (OSError, ValueError):
        return 0.0
real_time, real_sync, real_space = time.time, os.fdatasync, os.statvfs
time.time = lambda: real_time() + fault("clock")
def slow_sync(fd):
    time.sleep(fault("sync"))
    real_sync(fd)
os.fdatasync = slow_sync
def full(path):
    found = real_space(path)
    if fault("full"):
        return os.statvfs_result((*found[:4], 0, *found[5:]))
    return found
os.statvfs = full
from etcdlite.__main__ import main
sys.exit(main())
"""
"""etcdlite on a machine whose faults are files in a folder: `clock`, `sync` (seconds), `full`."""


class Patient:
    """A cluster of three, of which the third has faults, and the configuration of the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.status_file = folder / "status.prom"
        self.backed_up(time.time())
        self.cluster = LiveCluster(
            folder, 3, "--quota-backend-bytes=256MiB", "--segment-bytes=128MiB",
            f"--backup-status-file={self.status_file}",
        )  # fmt: skip
        self.m1, self.m2, self.m3 = self.cluster.members.values()
        self.file = folder / "m1.toml"
        self.settings = dict(flag[2:].split("=", 1) for flag in self.m1.flags)
        self.settings["data-dir"] = str(self.m1.data_dir)
        self.settings["listen-client-urls"] = f"http://{self.m1.endpoint}"
        self.configure()

    def configure(self, **changes: str) -> None:
        settings = self.settings | {name.replace("_", "-"): v for name, v in changes.items()}
        self.file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))

    def backed_up(self, at_s: float) -> None:
        self.status_file.write_text(f"{backup_status.LAST_SUCCESS} {at_s:.0f}\n")

    def fault(self, name: str, value: float) -> None:
        (self.folder / name).write_text(str(value))

    def heal(self, name: str) -> None:
        (self.folder / name).unlink()

    def doctor(self, *words: str) -> Ended:
        endpoints = ",".join((self.m1.endpoint, self.m2.endpoint))
        file = f"--server-config={self.file}"
        return run_ctl("doctor", file, f"--endpoints={endpoints}", *words)

    def found(self) -> list[Any]:
        ended = self.doctor("-w", "json")
        assert ended.stdout, ended.stderr
        return list(json.loads(ended.stdout)["findings"])

    def finds(self, *wanted: tuple[str, str]) -> str:
        """Wait until these are the findings. Returns their words."""
        deadline = time.monotonic() + PATIENCE_S / 2
        while True:
            found = self.found()
            words = "".join(f"{one['what']}; {one['why']}; {one['to_do']}\n" for one in found)
            if {(one["check"], one["where"]) for one in found} == set(wanted):
                return words
            assert time.monotonic() < deadline, (found, wanted)

    def is_silent(self) -> None:
        deadline = time.monotonic() + PATIENCE_S / 2
        while (ended := self.doctor()) != (0, b"", ""):
            assert time.monotonic() < deadline, ended


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Patient]:
    folder = tmp_path_factory.mktemp("patient")
    if os.access("/dev/shm", os.W_OK):
        # The disk of a busy machine may be slow, and that would be a finding.
        folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    made = Patient(folder)
    yield made
    made.cluster.close()
    shutil.rmtree(folder)


def test_a_healthy_cluster_of_three_makes_it_silent(patient: Patient) -> None:
    patient.is_silent()


def test_faults_of_this_machine_are_found(patient: Patient, tmp_path: Path) -> None:
    segment = next((patient.m1.data_dir / "member" / "data").glob("*.seg"))
    segment.chmod(0o644)
    patient.finds(("modes", str(segment)))
    ended = patient.doctor()
    assert ended.status == 2 and ended.stdout.startswith(f"error: {segment}: ".encode())
    segment.chmod(0o600)

    patient.backed_up(time.time() - 3 * 86400)
    patient.finds(("backup", "the cluster"))
    patient.backed_up(time.time())

    # A member that this cluster does not have shows no metrics, so the files count.
    certificate, key = expired_certificate(tmp_path)
    alone = f"m9={patient.settings['initial-advertise-peer-urls']}"
    patient.configure(
        name="m9", initial_cluster=alone, listen_client_urls="https://127.0.0.1:1",
        cert_file=str(certificate), key_file=str(key),
    )  # fmt: skip
    patient.finds(("certificates", "this machine"))

    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        patient.configure(listen_metrics_urls=url)
        lines = patient.finds(("ports", url))
        assert f"process {os.getpid()} (" in lines
    patient.configure()
    patient.is_silent()


def test_a_dead_member_and_then_one_with_every_other_fault_are_found(patient: Patient) -> None:
    """One start of the member is enough: each finding comes beside those before it."""
    patient.m3.stop()
    lines = patient.finds(("reachability", "m3"))
    assert "connection refused" in lines and "survives the loss of no more" in lines
    program, patient.m3.program = (
        patient.m3.program,
        [sys.executable, "-c", FAULTY, str(patient.folder)],
    )
    patient.m3.start("--quota-backend-bytes=64MiB")
    found = [("quota", "the cluster")]
    assert "m3 67 MB" in patient.finds(*found)
    assert patient.doctor().status == WARNING

    _, hard = resource.prlimit(patient.m3.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(patient.m3.pid, resource.RLIMIT_NOFILE, (1000, hard))
    found.append(("files", "m3"))
    patient.fault("clock", 90.0)
    lines = patient.finds(*found, ("clock", "m3"))
    assert re.search(r"the clock is (89|90|91)\.\d s ahead", lines), lines
    assert patient.doctor().status == ERROR
    patient.heal("clock")

    found.append(("disk", "m3"))
    with Client(patient.m1.endpoint, timeout_s=PATIENCE_S) as client:
        patient.fault("sync", 0.1)
        stopping = threading.Event()

        def put() -> None:
            while not stopping.wait(0.01):
                client.put("k", "v")

        putting = threading.Thread(target=put)
        putting.start()
        patient.finds(*found)
        patient.fault("sync", 3.0)
        patient.finds(*found, ("lag", "m3"))
        stopping.set()
        putting.join()
    patient.heal("sync")
    patient.fault("full", 1.0)
    patient.finds(*found, ("space", "m3"), ("alarms", "m3"))
    patient.heal("full")

    patient.m3.stop()
    patient.m3.program = program
    patient.m3.start()
    wait_until(
        lambda: (
            run_ctl("alarm", "disarm", f"--endpoints={patient.m1.endpoint}").status == 0
            and not patient.found()
        ),
        "the alarm is disarmed",
    )
    patient.is_silent()


def test_fragmentation_is_found(patient: Patient) -> None:
    with Client(patient.m1.endpoint, timeout_s=PATIENCE_S) as client:
        for _ in range(40):
            client.put("large", bytes(MIB))
        client.compact(client.status().revision, physical=True)
    patient.finds(*(("fragmentation", name) for name in ("m1", "m2", "m3")))
    assert run_ctl("defrag", "--cluster", f"--endpoints={patient.m1.endpoint}").status == 0
    patient.is_silent()


# The command.


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    data_dir = tmp_path_factory.mktemp("running") / "data"
    flags = ["--backup-status-file="]
    process = ServerProcess(data_dir, flags, (sys.executable, "-m", "etcdlite"))
    yield process.start()
    process.close()


def test_what_it_cannot_see_is_said_in_one_line_and_is_no_finding(running: ServerProcess) -> None:
    ended = run_ctl("doctor", "--endpoints", running.endpoint, "--server-config", "")
    assert (ended.status, ended.stdout) == (0, b""), ended
    assert ended.stderr.startswith("Not looked at: this machine (") and "backups" in ended.stderr
    assert ended.stderr.count("\n") == 1
    shown = json.loads(run_ctl("doctor", "--endpoints", running.endpoint, "-w", "json").stdout)
    assert shown["findings"] == [] and len(shown["unseen"]) == 2


def test_no_endpoint_that_answers_is_a_finding() -> None:
    ended = run_ctl("doctor", "--endpoints", "127.0.0.1:1")
    assert ended.status == 2
    assert b"error: 127.0.0.1:1: does not answer: connection refused; " in ended.stdout
    assert run_ctl("doctor", "now").status == 128
    assert run_ctl("doctor", "-w", "table").status == 4


def test_it_finds_the_endpoints_in_the_configuration(
    running: ServerProcess, tmp_path: Path
) -> None:
    file = tmp_path / "etcdlite.toml"
    file.write_text(
        f'data-dir = "{running.data_dir}"\nlisten-client-urls = ["http://{running.endpoint}"]\n'
        # Another process may listen on the default one.
        'listen-peer-urls = ["http://127.0.0.1:0"]\n'
    )
    ended = run_ctl("doctor", "--server-config", str(file))
    assert (ended.status, ended.stdout) == (0, b""), ended


def test_an_address_that_this_machine_does_not_have_is_a_finding(tmp_path: Path) -> None:
    file = tmp_path / "etcdlite.toml"
    file.write_text(
        f'data-dir = "{tmp_path}/data"\nlisten-client-urls = "http://192.0.2.1:2379"\n'
        'advertise-client-urls = "http://192.0.2.1:2379"\n'
        'listen-peer-urls = "http://127.0.0.1:0"\n'
    )
    here = machine_module.look(str(file), is_named=True)
    assert here is not None
    (problem,) = here.problems
    assert "http://192.0.2.1:2379: this machine does not have that address" in problem


def test_a_file_that_is_newer_than_the_process_which_read_it_is_found(tmp_path: Path) -> None:
    file, other = tmp_path / "etcdlite.toml", tmp_path / "other.toml"
    for path in (file, other):
        path.touch()
    command = [sys.executable, "-c", "input()", f"--config={file}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        now = time.time()
        for path, changed_s, is_newer in ((file, -60, False), (file, 60, True), (other, 60, False)):
            os.utime(path, (now + changed_s, now + changed_s))
            assert machine_module._has_older_settings(process.pid, str(path)) == is_newer
        assert process.stdin is not None
        process.stdin.write(b"\n")
    assert not machine_module._has_older_settings(process.pid, str(file)), "it ended"
    machine = machine_module.Machine(str(file))
    machine.warnings = [f"{file}: it was changed; restart the member"]
    (finding,) = examine(Facts(NOW, machine=machine))
    assert (finding.what, finding.to_do) == ("it was changed", "restart the member")
    assert "does not start" not in finding.line


def test_without_proc_the_process_that_has_a_port_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: str) -> list[str]:
        raise FileNotFoundError(2, os.strerror(2), path)

    monkeypatch.setattr(machine_module, "_read", lambda path: b"")
    monkeypatch.setattr(os, "listdir", refuse)
    assert machine_module.holder(machine_module.listeners(2379)) == "another process"


def test_with_users_it_needs_a_user_for_the_members_only(running: ServerProcess) -> None:
    endpoint = f"--endpoints={running.endpoint}"
    for line in ("user add root:pw", "auth enable --user root:pw"):
        assert run_ctl(*line.split(), endpoint).status == 0
    ended = run_ctl("doctor", endpoint)
    assert (ended.status, ended.stdout) == (0, b"") and "the list of members" in ended.stderr
    ended = run_ctl("doctor", endpoint, "--user=root:pw")
    assert (ended.status, ended.stdout) == (0, b"") and "members:" not in ended.stderr
    assert run_ctl("auth", "disable", "--user=root:pw", endpoint).status == 0
