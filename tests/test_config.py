"""The configuration: where settings come from, what is refused, and in what words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rigs.flag_tables import PAGE, with_tables
from rigs.real_etcd import distributed

from etcdlite import config, flags, secret_file
from etcdlite.urls import host_port

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "packaging" / "etcdlite.toml"
ETCD_FLAGS = """
    name data-dir wal-dir snapshot-count heartbeat-interval election-timeout
    initial-election-tick-advance listen-peer-urls listen-client-urls listen-client-http-urls
    max-snapshots max-wals memory-mlock quota-backend-bytes backend-bbolt-freelist-type
    backend-batch-interval backend-batch-limit max-txn-ops max-request-bytes
    max-concurrent-streams grpc-keepalive-min-time grpc-keepalive-interval
    grpc-keepalive-timeout socket-reuse-port socket-reuse-address enable-grpc-gateway
    raft-read-timeout raft-write-timeout feature-gates initial-advertise-peer-urls
    initial-cluster initial-cluster-state initial-cluster-token advertise-client-urls discovery
    discovery-token discovery-endpoints discovery-dial-timeout discovery-request-timeout
    discovery-keepalive-time discovery-keepalive-timeout discovery-insecure-transport
    discovery-insecure-skip-tls-verify discovery-cert discovery-key discovery-cacert
    discovery-user discovery-password discovery-fallback discovery-proxy discovery-srv
    discovery-srv-name strict-reconfig-check pre-vote auto-compaction-retention
    auto-compaction-mode v2-deprecation cert-file key-file client-cert-auth client-cert-file
    client-key-file client-crl-file client-cert-allowed-hostname trusted-ca-file auto-tls
    peer-cert-file peer-key-file peer-client-cert-auth peer-client-cert-file
    peer-client-key-file peer-trusted-ca-file peer-cert-allowed-cn peer-cert-allowed-hostname
    peer-auto-tls self-signed-cert-validity peer-crl-file cipher-suites cors host-whitelist
    tls-min-version tls-max-version auth-token auth-token-ttl enable-pprof metrics
    listen-metrics-urls logger log-outputs log-level log-format enable-log-rotation
    log-rotation-config-json warning-unary-request-duration enable-distributed-tracing
    distributed-tracing-address distributed-tracing-service-name distributed-tracing-instance-id
    distributed-tracing-sampling-rate corrupt-check-time compact-hash-check-time
    compaction-batch-limit peer-skip-client-san-verification watch-progress-notify-interval
    warning-apply-duration bootstrap-defrag-threshold-megabytes max-learners
    compaction-sleep-interval downgrade-check-time snapshot-catchup-entries force-new-cluster
    unsafe-no-fsync
"""
"""etcd 3.7's, all of them."""

OLDER_FLAGS = """
    debug log-package-levels proxy proxy-failure-wait proxy-refresh-interval proxy-dial-timeout
    proxy-write-timeout proxy-read-timeout enable-v2
"""
"""Those that etcd 3.4 or 3.5 has, and 3.7 no more."""

EXPERIMENTAL_FLAGS = """
    initial-corrupt-check corrupt-check-time compact-hash-check-enabled compact-hash-check-time
    enable-v2v3 enable-lease-checkpoint enable-lease-checkpoint-persist compaction-batch-limit
    compaction-sleep-interval peer-skip-client-san-verification watch-progress-notify-interval
    warning-apply-duration warning-unary-request-duration bootstrap-defrag-threshold-megabytes
    memory-mlock txn-mode-write-with-shared-buffer enable-distributed-tracing
    distributed-tracing-address distributed-tracing-service-name distributed-tracing-instance-id
    distributed-tracing-sampling-rate max-learners downgrade-check-time snapshot-catchup-entries
    stop-grpc-service-on-defrag wait-cluster-ready-timeout set-member-localaddr
"""
"""Those that etcd 3.5 and 3.6 call experimental-..."""

IMPLEMENTED = [flag for flag in flags.FLAGS.values() if flag.status == flags.IMPLEMENTED]
OTHERS = [flag for flag in flags.FLAGS.values() if flag.status != flags.IMPLEMENTED]


def load(*argv: str, environ: dict[str, str] | None = None, file: str = "/nonexistent"):
    return config.load(argv, environ or {}, file)


def problems(*argv: str, environ: dict[str, str] | None = None, file: str = "/nonexistent"):
    with pytest.raises(config.ConfigError) as raised:
        config.load(argv, environ or {}, file)
    assert raised.value.problems
    for line in raised.value.problems + raised.value.warnings:
        assert line.isprintable(), line
    return raised.value.problems


@pytest.fixture
def file(tmp_path):
    """Writes a configuration file and gives its path."""

    def write(text: str, name: str = "etcdlite.toml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


# ------------------------------------------------------------------------------------ the table


def test_every_flag_of_etcd_is_known():
    assert set(ETCD_FLAGS.split() + OLDER_FLAGS.split()) <= set(flags.FLAGS)


def test_the_help_page_of_the_real_etcd_names_no_other_flag():
    shown = subprocess.run([distributed("etcd"), "--help"], capture_output=True, text=True)
    named = re.findall(r"(?m)^ +--([a-z0-9-]+)", shown.stdout + shown.stderr)
    assert "listen-client-urls" in named
    own = {"version", "help"}
    assert [name for name in named if flags.find(name) is None and name not in own] == []


@pytest.mark.parametrize("name", flags.FLAGS)
def test_a_flag_set_to_its_default_is_neither_a_problem_nor_a_warning(name, file):
    flag = flags.FLAGS[name]
    plain = load()
    assert load(f"--{name}={flag.default}")._replace(sources={}) == plain
    if name != "config-file":
        text = flag.default.replace('"', '\\"')
        in_file = load(file=file(f'{name} = "{text}"'))
        assert in_file._replace(sources={}) == plain


@pytest.mark.parametrize("flag", OTHERS, ids=lambda flag: flag.name)
def test_a_flag_that_is_not_implemented_is_never_silent(flag):
    other = {
        flags.BOOL: "true" if flag.default in ("", "false") else "false",
        flags.DURATION: "77s",
    }.get(flag.kind, {"STATE": "existing", "SET": "extensive"}.get(flag.kind.metavar, "77"))
    argument = f"--{flag.name}={other}"
    if flag.status == flags.REFUSED:
        (line,) = problems(argument)
        assert "not supported" in line and "remove it" in line
    else:
        (line,) = load(argument).warnings
        assert "no effect" in line
    assert line.startswith(f"--{flag.name}=") and flag.text in line


def test_the_documentation_lists_every_flag_with_its_default_and_reason():
    text = PAGE.read_text()
    assert with_tables(text) == text, "outdated: run python -m rigs.flag_tables"
    for flag in flags.FLAGS.values():
        default = f"`{flag.default}`" if flag.default else ""
        value = f"{flag.kind.metavar} | " if flag.status == flags.IMPLEMENTED else ""
        row = f"| `{flag.name}` | {value}{default} | {flag.text} |"
        assert row in text, f"docs/configuration.md lacks the row\n{row}"


def test_the_example_file_as_shipped_changes_nothing():
    assert load(file=str(EXAMPLE)) == load()


def test_the_example_file_shows_every_flag_with_its_default(file):
    text = re.sub(r"(?m)^#(?=[a-z-]+ = )", "", EXAMPLE.read_text())
    loaded = load(file=file(text))
    assert loaded._replace(sources={}) == load()
    assert set(loaded.sources) == {flag.name for flag in IMPLEMENTED} - {"config-file"}
    assert max(map(len, text.splitlines())) <= 100


def test_the_help_text_fits_100_columns_and_names_flags_variables_defaults_and_the_file():
    text = flags.help_text()
    assert max(map(len, text.splitlines())) <= 100
    for flag in flags.FLAGS.values():
        assert flag.name in text
    for flag in IMPLEMENTED:
        assert f"--{flag.name}" in text
        assert "ETCDLITE_" + flag.name.upper().replace("-", "_") in text
        assert not flag.default or f"[{flag.default}]" in text
    assert flags.DEFAULT_FILE in text and "docs/configuration.md" in text


# ------------------------------------------------------------------------- where settings stand


def test_without_any_configuration_it_is_a_member_on_loopback():
    loaded = load()
    assert loaded.action == "run"
    assert loaded.name == "default"
    assert loaded.data_dir == "default.etcdlite"
    assert loaded.listen_client_urls == ("http://localhost:2379",)
    assert loaded.advertise_client_urls == ("http://localhost:2379",)
    assert loaded.quota_backend_bytes == 2 << 30
    assert loaded.max_request_bytes == 1536 * 1024
    assert loaded.watch_progress_notify_interval_s == 600
    assert loaded.checkpoint_bytes == 64 << 20
    assert loaded.log_outputs == ("stderr",)
    assert (loaded.warnings, loaded.sources) == ((), {})


@pytest.mark.parametrize(
    ("text", "interval_s"), [("0s", 600), ("0", 600), ("1ms", 0.1), ("5s", 5), ("1h", 3600)]
)
def test_the_interval_of_progress_messages_has_a_minimum_and_a_default(text, interval_s):
    """As in etcd: NewWatchServer of server/etcdserver/api/v3rpc/watch.go."""
    loaded = load(f"--watch-progress-notify-interval={text}")
    assert loaded.watch_progress_notify_interval_s == interval_s


def test_flags_are_written_as_go_reads_them():
    for argv in (["--name", "x"], ["--name=x"], ["-name", "x"], ["-name=x"]):
        assert load(*argv).name == "x"
    assert load("--name", "a", "--name", "b").name == "b"
    assert load("--wal-dir", "-odd").wal_dir == "-odd"
    assert load("--unsafe-no-fsync", "--name", "x").unsafe_no_fsync
    for word in ("false", "0", "F"):
        assert not load(f"--unsafe-no-fsync={word}").unsafe_no_fsync


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(file):
    path = file('name = "file"\nmax-txn-ops = 1\nlog-level = "warn"\nwal-dir = "w"\n')
    loaded = load(
        "--name=flag",
        file=path,
        environ={
            "ETCDLITE_NAME": "own",
            "ETCD_NAME": "etcd",
            "ETCDLITE_MAX_TXN_OPS": "2",
            "ETCD_MAX_TXN_OPS": "3",
            "ETCD_LOG_LEVEL": "error",
        },
    )
    assert loaded.name == "flag"
    assert loaded.max_txn_ops == 2
    assert loaded.log_level == "error"
    assert loaded.wal_dir == "w"
    assert loaded.sources == {
        "name": "--name",
        "max-txn-ops": "ETCDLITE_MAX_TXN_OPS",
        "log-level": "ETCD_LOG_LEVEL",
        "wal-dir": f"{path}: wal-dir",
    }


def test_a_refused_value_does_not_matter_where_a_stronger_source_takes_it_back(file):
    path = file("client-cert-auth = true\n")
    assert load("--client-cert-auth=false", file=path).warnings == ()
    assert problems(file=path)


def test_an_empty_variable_counts_as_not_set():
    assert load(environ={"ETCD_NAME": "", "ETCDLITE_MAX_TXN_OPS": ""}) == load()


def test_the_file_can_be_named_by_flag_and_by_variable_and_replaces_the_default_one(file):
    default = file('name = "default-file"\nwal-dir = "w"', "default.toml")
    named = file('name = "named"')
    assert load(file=default).name == "default-file"
    for argv, environ in (
        (["--config", named], {}),
        (["--config-file", named], {}),
        ([], {"ETCDLITE_CONFIG_FILE": named}),
        ([], {"ETCD_CONFIG_FILE": named}),
    ):
        loaded = load(*argv, environ=environ, file=default)
        assert (loaded.name, loaded.wal_dir) == ("named", "")


def test_a_named_file_has_to_exist(tmp_path):
    path = str(tmp_path / "none.toml")
    (line,) = problems("--config", path)
    assert "none.toml: no such file; correct --config or create it" in line
    (line,) = problems(environ={"ETCD_CONFIG_FILE": path})
    assert "none.toml: no such file; correct ETCD_CONFIG_FILE or create it" in line


def test_a_file_takes_the_types_of_toml_and_the_notation_of_flags(file):
    for text in (
        'listen-client-urls = ["http://127.0.0.1:1", "http://127.0.0.1:2"]\n'
        'segment-bytes = "1MiB"\nelection-timeout = 2000\nunsafe-no-fsync = true\n',
        'listen-client-urls = "http://127.0.0.1:1,http://127.0.0.1:2"\n'
        'segment-bytes = 1048576\nelection-timeout = "2s"\nunsafe-no-fsync = "true"\n',
    ):
        loaded = load(file=file(text))
        assert loaded.listen_client_urls == ("http://127.0.0.1:1", "http://127.0.0.1:2")
        assert loaded.segment_bytes == 1 << 20
        assert loaded.election_timeout_ms == 2000
        assert loaded.unsafe_no_fsync


def test_names_from_when_a_flag_was_experimental_work_with_a_warning(file):
    path = file('experimental-warning-apply-duration = "1s"')
    for loaded in (
        load("--experimental-warning-apply-duration=1s"),
        load(environ={"ETCD_EXPERIMENTAL_WARNING_APPLY_DURATION": "1s"}),
        load(file=path),
    ):
        assert loaded.warning_apply_duration_s == 1
        (line,) = loaded.warnings
        assert "write warning-apply-duration" in line


@pytest.mark.parametrize("action", ["help", "version", "check-config"])
def test_an_action_is_told_to_the_caller(action):
    assert load(f"--{action}").action == action
    assert load(f"-{action}").action == action
    assert load(f"--{action}=false").action == "run"


def test_help_and_version_work_whatever_else_is_wrong(file):
    for argv in (["-h"], ["--help"], ["--nmae", "--version", "x"]):
        assert load(*argv, environ={"ETCDLITE_X": "y"}, file=file("[")).action != "run"
    assert problems("--check-config", "--nmae=x")


# --------------------------------------------------------------------------------- what is wrong


def test_all_problems_are_reported_together_with_where_they_come_from(file):
    path = file('nmae = "x"\nmax-txn-ops = "many"\n[sec]\nx = 1\n')
    lines = problems(
        "--enable-v2",
        "--lisen-client-urls=http://127.0.0.1:1",
        "serve",
        "--log-level=loud",
        "--max-request-bytes",
        environ={"ETCDLITE_NMAE": "x", "ETCD_CERT_FILE": "c.pem", "ETCD_SEGMENT_BYTES": "1MB"},
        file=path,
    )
    assert lines == [
        "unknown flag --lisen-client-urls on the command line, did you mean --listen-client-urls?",
        "unexpected argument serve on the command line; "
        "etcdlite takes flags only, as in --name=value",
        "--log-level=loud: unknown; write one of debug, info, warn, error, panic, fatal",
        "--max-request-bytes: has no value; write --max-request-bytes=BYTES",
        "ETCD_SEGMENT_BYTES=1MB: not a size; write bytes, or for example 64KiB, 16MiB, 8GiB",
        "unknown variable ETCDLITE_NMAE in the environment, did you mean ETCDLITE_NAME?",
        f"unknown key nmae in {path}, did you mean name?",
        f"{path}: max-txn-ops = many: not a whole number; write digits only",
        f"{path}: sec is a section or a table, but there are none; "
        "write each setting as: name = value",
        "--enable-v2=true: not supported: etcdlite has no v2 store; remove it",
        "ETCD_CERT_FILE=c.pem: it needs key-file; set both",
    ]


@pytest.mark.parametrize(
    "name",
    ["listen-peer-urls", "listen-client-urls", "cert-file", "key-file", "client-cert-auth",
     "peer-cert-file", "peer-key-file", "peer-client-cert-auth", "name",
     "initial-advertise-peer-urls"],
)  # fmt: skip
@pytest.mark.parametrize("fault", ["a name", "a value"])
def test_a_misspelled_setting_is_not_followed_by_what_it_would_have_prevented(name, fault, file):
    lines = {
        "name": '"m1"',
        "listen-client-urls": '["https://10.0.0.1:2379"]',
        "listen-peer-urls": '["https://10.0.0.1:2380"]',
        "initial-advertise-peer-urls": '["https://10.0.0.1:2380"]',
        "initial-cluster": '["m1=https://10.0.0.1:2380"]',
    }
    for prefix in ("", "peer-"):
        lines |= {f"{prefix}{file}-file": '"/x"' for file in ("cert", "key", "trusted-ca")}
        lines[f"{prefix}client-cert-auth"] = "true"
    assert load(file=file("\n".join(map(" = ".join, lines.items())))).warnings == ()
    value = lines.pop(name)
    lines |= {f"{name}x": value} if fault == "a name" else {name: "1.5"}
    with pytest.raises(config.ConfigError) as raised:
        load(file=file("\n".join(map(" = ".join, lines.items()))))
    assert (len(raised.value.problems), list(raised.value.warnings)) == (1, [])


@pytest.mark.parametrize("command", ["gateway", "grpc-proxy"])
def test_a_command_of_etcd_that_stands_in_front_of_a_cluster_is_named(command: str) -> None:
    (line,) = problems(command, "start", "--endpoints=127.0.0.1:2379")
    assert f"there is no etcdlite {command}" in line and f"etcd {command} start" in line


def test_an_unknown_variable_of_etcd_is_only_a_warning():
    first, second = load(environ={"ETCD_NMAE": "x", "ETCD_UNSUPPORTED": "arm"}).warnings
    assert "did you mean ETCD_NAME?" in first
    assert "unknown variable ETCD_UNSUPPORTED in" in second and "ignored" in second


def test_variables_that_are_meant_for_others_are_left_alone():
    environ = {
        "ETCDLITE_CTL_ENDPOINTS": "a",
        "ETCDCTL_API": "3",
        "ETCDLITE_PORT": "tcp://10.0.0.1:2379",
        "ETCDLITE_PORT_2379_TCP_ADDR": "10.0.0.1",
        "ETCDLITE_SERVICE_HOST": "10.0.0.1",
        "ETCD_SERVICE_PORT_CLIENT": "2379",
        "ETCD_UNSUPPORTED_ARCH": "arm64",
        "ETCD_VERIFY": "all",
        "ETCD_CLIENT_DEBUG": "debug",
    }
    assert load(environ=environ) == load()
    assert "ETCDLITE_VERIFY" in problems(environ={"ETCDLITE_VERIFY": "all"})[0]


def test_a_value_with_a_secret_is_not_repeated():
    lines = problems("--discovery-password=hunter2", environ={"ETCD_DISCOVERY_USER": "hunter2"})
    assert len(lines) == 2 and "hunter2" not in str(lines)


def test_a_hostile_value_stays_on_one_short_line(file):
    for lines in (
        problems("--log-level=a\n\x1b[2Jb" + "x" * 10_000),
        problems("--a\nb", "c\rd"),
        problems(environ={"ETCDLITE_A\n": "x"}),
        problems(file=file('"a\\nb" = 1\nname = ' + "[" * 50 + "]" * 50)),
        problems(file=file("max-txn-ops = 0x" + "f" * 6000)),
        problems(file=file("max-txn-ops = [0x" + "f" * 6000 + "]")),
    ):
        assert all(len(line) < 500 for line in lines)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"name = ", "not valid TOML"),
        (b'name = "\xff"', "not valid TOML"),
        (b"a = " + b"[" * 100_000, "not valid TOML"),
        (b"#" * (config.MAX_FILE_BYTES + 1), "larger than 1048576 bytes"),
        (b'config-file = "x"', "cannot stand in the file itself"),
        (b"name = 1", "wrong type; write a string"),
        (b"unsafe-no-fsync = 1", "wrong type; write true or false"),
        (b"max-txn-ops = true", "wrong type; write a whole number or a string"),
        (b"max-txn-ops = 1.5", "wrong type; write a whole number or a string"),
        (b"log-outputs = [1]", "wrong type; write a list of strings"),
        (b"log-level = 2026-11-21", "wrong type; write a string"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, content, reason):
    path = tmp_path / "c.toml"
    path.write_bytes(content)
    (line,) = problems("--config", str(path))
    assert reason in line and str(path) in line


@pytest.mark.parametrize("value", ['"a\\u0000b"', '["a\\u0000b"]'])
def test_no_setting_has_a_nul(file, value):
    """The command line and the environment cannot have one, and no path may."""
    for name in set(flags.FLAGS) - {"config-file"}:
        found = problems(file=file(f"{name} = {value}"))
        assert any("NUL" in line and name in line for line in found), name


@pytest.mark.parametrize("name", ["etcd.conf.yml", "etcd.conf", "etcdlite.toml"])
@pytest.mark.parametrize("text", ["name: default\n", "# etcd\n\nwal-dir:\nname: 'default'\n"])
def test_yaml_is_recognised(file, name, text):
    (line,) = problems("--config", file(text, name))
    assert "YAML" in line


def test_what_is_not_yaml_is_not_called_so(file):
    (line,) = problems("--config", file('name = "a:\n', "etcd.conf.yml"))
    assert "YAML" not in line


def test_a_folder_is_not_a_file(tmp_path):
    (line,) = problems("--config", str(tmp_path))
    assert "cannot be read" in line


# -------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("0", 0),
        ("0s", 0),
        ("300ms", 0.3),
        ("1h30m", 5400),
        ("1.5s", 1.5),
        (".5m", 30),
        ("1us", 1e-6),
    ],
)
def test_durations_are_written_as_in_go(text, seconds):
    assert load(f"--warning-apply-duration={text}").warning_apply_duration_s == seconds


@pytest.mark.parametrize(
    "text", ["", "5", "-5s", "5 s", "s", "5x", "1e3s", "5s ", "9999999h", "٣s"]
)
def test_what_is_not_a_duration_is_refused(text):
    (line,) = problems(f"--warning-apply-duration={text}")
    assert "not a duration" in line or "out of range" in line


@pytest.mark.parametrize(
    "text, size_bytes",
    [("4096", 4096), ("4KiB", 4096), ("1 MiB", 1 << 20), ("1GiB", 1 << 30), ("5000B", 5000)],
)
def test_sizes_take_binary_units(text, size_bytes):
    assert load(f"--segment-bytes={text}").segment_bytes == size_bytes


@pytest.mark.parametrize(
    "text", ["", "1MB", "1M", "1.5MiB", "MiB", "-4KiB", "4095", "2GiB", "9" * 99]
)
def test_what_is_not_a_size_is_refused(text):
    (line,) = problems(f"--segment-bytes={text}")
    assert "not a size" in line or "out of range" in line


@pytest.mark.parametrize("text, quota_bytes", [("0", 2 << 30), ("-1", 0), ("8GiB", 8 << 30)])
def test_the_quota_is_2_gib_unless_set_and_none_if_negative(text, quota_bytes):
    assert load(f"--quota-backend-bytes={text}").quota_backend_bytes == quota_bytes


@pytest.mark.parametrize(
    "mode, text, kept",
    [
        ("periodic", "0", (0, 0)),
        ("periodic", "8", (8 * 3600, 0)),
        ("periodic", "5m", (300, 0)),
        ("revision", "1000", (0, 1000)),
        ("revision", "0", (0, 0)),
    ],
)
def test_automatic_compaction_keeps_a_time_or_a_number_of_revisions(mode, text, kept):
    loaded = load(f"--auto-compaction-mode={mode}", f"--auto-compaction-retention={text}")
    assert kept == (loaded.auto_compaction_retention_s, loaded.auto_compaction_retention_revisions)


@pytest.mark.parametrize("mode, text", [("periodic", "-1"), ("revision", "5m"), ("revision", "-1")])
def test_a_retention_that_does_not_fit_its_mode_is_refused(mode, text):
    (line,) = problems(f"--auto-compaction-mode={mode}", f"--auto-compaction-retention={text}")
    assert f"--auto-compaction-retention={text}" in line and mode in line


def test_the_election_timeout_is_at_least_five_heartbeats_and_at_most_50_seconds():
    assert load("--heartbeat-interval=200ms").heartbeat_interval_ms == 200
    assert load("--election-timeout=50s").election_timeout_ms == 50_000
    (line,) = problems("--heartbeat-interval=201")
    assert line == (
        "election-timeout=1000: less than 5 times the heartbeat interval "
        "(--heartbeat-interval=201); raise it or lower the other"
    )
    assert "out of range" in problems("--election-timeout=50001")[0]
    assert "out of range" in problems("--heartbeat-interval=0")[0]


@pytest.mark.parametrize(
    "url, reason",
    [
        ("", "empty"),
        ("https://127.0.0.1:2379", "needs a certificate: set cert-file and key-file"),
        ("unix:///run/etcd.sock", "TCP only"),
        ("127.0.0.1:2379", "not a URL"),
        ("ftp://127.0.0.1:2379", "not a URL"),
        ("http://127.0.0.1", "not a URL"),
        ("http://:2379", "not a URL"),
        ("http://127.0.0.1:2379/", "not a URL"),
        ("http://127.0.0.1:2379?", "not a URL"),
        ("http://user@127.0.0.1:2379", "not a URL"),
        ("http://127.0.0.1:65536", "not a URL"),
        ("http://127.0.0.1:x", "not a URL"),
        ("http://127.0.0.1:23\n79", "not a URL"),
        ("http://[::1:2379", "not a URL"),
        ("http://example.com:2379", "host name to listen on"),
        ("http://127.0.0.1:1,http://127.0.0.1:1", "there twice"),
        ("http://127.0.0.1:1,", "not a URL"),
    ],
)
def test_a_url_that_cannot_be_listened_on_is_refused(url, reason):
    (line,) = problems(f"--listen-client-urls={url}")
    assert reason in line


def test_urls_are_taken_apart_for_the_socket():
    assert host_port("http://[::1]:2379") == ("::1", 2379)
    urls = load("--listen-client-urls=http://[::1]:0,http://127.0.0.1:0").listen_client_urls
    assert [host_port(url) for url in urls] == [("::1", 0), ("127.0.0.1", 0)]


def test_clients_are_told_where_the_member_listens_unless_said_otherwise():
    listen = "--listen-client-urls=http://10.0.0.1:2379"
    assert load(listen).advertise_client_urls == ("http://10.0.0.1:2379",)
    told = load(listen, "--advertise-client-urls=http://etcd.lan:2379").advertise_client_urls
    assert told == ("http://etcd.lan:2379",)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_listening_on_all_addresses_needs_an_address_for_clients(host):
    listen = f"--listen-client-urls=http://{host}:2379"
    (line,) = problems(listen)
    assert line.startswith(listen) and "set advertise-client-urls" in line
    assert load(listen, "--advertise-client-urls=http://a.lan:2379")
    (line,) = problems(listen, "--advertise-client-urls=http://a.lan:0")
    assert "no port" in line


def test_port_0_is_advertised_where_a_listener_has_it():
    told = load("--listen-client-urls=http://0.0.0.0:0", "--advertise-client-urls=http://a.lan:0")
    assert told.advertise_client_urls == ("http://a.lan:0",)
    (line,) = problems("--initial-advertise-peer-urls=http://a.lan:0")
    assert "no port" in line


def test_other_members_are_told_where_this_one_listens_unless_said_otherwise():
    assert load().initial_advertise_peer_urls == ("http://localhost:2380",)
    listen = "--listen-peer-urls=http://10.0.0.1:1234"
    assert load(listen).initial_advertise_peer_urls == ("http://10.0.0.1:1234",)
    assert load(listen, "--name=a").initial_cluster == (("a", "http://10.0.0.1:1234"),)
    told = load(listen, "--initial-advertise-peer-urls=http://a.lan:2380")
    assert told.initial_advertise_peer_urls == ("http://a.lan:2380",)
    free = load("--listen-peer-urls=http://10.0.0.1:0")
    assert (free.initial_advertise_peer_urls, free.warnings) == (("http://localhost:2380",), ())


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_an_advertised_address_that_nobody_can_dial_is_a_warning(host):
    url = f"http://{host}:2379"
    (line,) = load(f"--listen-client-urls={url}", f"--advertise-client-urls={url}").warnings
    assert line.startswith(f"--advertise-client-urls={url}: ") and "dial" in line
    (line,) = load(f"--initial-advertise-peer-urls={url}").warnings
    assert line.startswith(f"--initial-advertise-peer-urls={url}: ") and "dial" in line
    loaded = load(f"--listen-peer-urls=http://{host}:1234")
    assert loaded.initial_advertise_peer_urls == ("http://localhost:1234",)
    (line,) = loaded.warnings
    assert "set initial-advertise-peer-urls" in line


@pytest.mark.parametrize(
    ("argv", "refused"),
    [
        (["clients=http://127.0.0.1:7", "metrics=http://127.0.0.1:7"], True),
        (["clients=http://127.0.0.1:7", "peers=http://127.0.0.1:7"], True),
        (["clients=http://127.0.0.1:7", "http=http://0.0.0.0:7"], True),
        (["clients=http://localhost:7", "http=http://[::1]:7"], True),
        (["clients=http://127.0.0.1:7,http://localhost:7"], True),
        (["clients=http://127.0.0.1:7", "http=http://[::]:7"], False),
        (["clients=http://127.0.0.1:7", "http=http://127.0.0.2:7"], False),
        (["clients=http://127.0.0.1:0", "http=http://127.0.0.1:0"], False),
        # Alone, a member does without the default port for members.
        (["clients=http://localhost:2380"], False),
    ],
)
def test_an_address_serves_one_purpose(argv, refused):
    names = {
        "clients": "listen-client-urls",
        "peers": "listen-peer-urls",
        "http": "listen-client-http-urls",
        "metrics": "listen-metrics-urls",
    }
    flagged = [f"--{names[item.partition('=')[0]]}={item.partition('=')[2]}" for item in argv]
    if refused:
        (line,) = problems(*flagged)
        assert "is also an address of" in line
    else:
        load(*flagged)


def test_feature_gates_set_the_flags_of_their_features(file):
    loaded = load("--feature-gates=InitialCorruptCheck=true,LeaseCheckpoint=true")
    assert loaded.initial_corrupt_check and loaded.warnings == ()
    assert load(environ={"ETCD_FEATURE_GATES": "InitialCorruptCheck=1"}).initial_corrupt_check
    assert load(file=file('feature-gates = ["InitialCorruptCheck=true"]')).initial_corrupt_check
    both = ("--initial-corrupt-check=false", "--feature-gates=InitialCorruptCheck=true")
    assert not load(*both).initial_corrupt_check and not load(*both[::-1]).initial_corrupt_check
    unknown, no_effect = load(
        "--feature-gates=NewFeature=true,TxnModeWriteWithSharedBuffer=false"
    ).warnings
    assert "NewFeature=true: unknown feature gate" in unknown
    assert "TxnModeWriteWithSharedBuffer=false: no effect" in no_effect
    (line,) = problems("--feature-gates=DistributedTracing=true")
    assert "not supported" in line
    for bad in (
        "InitialCorruptCheck",
        "InitialCorruptCheck=",
        "InitialCorruptCheck=maybe",
        "=true",
    ):
        (line,) = problems(f"--feature-gates={bad}")
        assert line.startswith("--feature-gates=") and bad in line


def test_the_experimental_names_of_etcd_3_5_are_known():
    for name in EXPERIMENTAL_FLAGS.split():
        flag = flags.find(f"experimental-{name}")
        assert flag is not None, name
        value = flag.default or ("1" if flag.kind.native is int else "")
        (line,) = load(f"--experimental-{name}={value}").warnings
        assert f"write {name}" in line


def test_a_port_can_be_shared():
    assert load("--socket-reuse-port").socket_reuse_port
    assert not load().socket_reuse_port


# ------------------------------------------------------------------------------ what files tell


def test_files_and_folders_that_a_start_could_not_use_are_found(tmp_path):
    plain = tmp_path / "file"
    plain.touch()
    good = load(f"--data-dir={tmp_path}/a/b", f"--log-outputs=stdout,{tmp_path}/new.log")
    assert config.check_files(good) == []
    assert not list(tmp_path.glob("a")) and not list(tmp_path.glob("*.log"))
    for argument, problem in (
        (f"--data-dir={plain}", "is not a directory"),
        (f"--data-dir={plain}/below", "is not a directory"),
        (f"--wal-dir={plain}", "is not a directory"),
        (f"--log-outputs={tmp_path}/none/x.log", "there is no directory"),
        (f"--log-outputs={tmp_path}", "is a directory"),
        (f"--log-outputs={plain}/x.log", "is not a directory"),
    ):
        (line,) = config.check_files(load(f"--data-dir={tmp_path}", argument))
        assert problem in line and argument[2:].partition("=")[0] in line, line


def test_check_config_says_what_files_would_refuse(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "etcdlite", "--check-config", "--config-file=/dev/null"]
    environ = {"PYTHONPATH": str(ROOT)}
    new = f"--data-dir={tmp_path}/new"
    bad, foreign, good, inner_log, own_log, key = (
        subprocess.run([*command, *flags], capture_output=True, text=True, env=environ)
        for flags in (
            [f"--data-dir={tmp_path}/file"],
            [f"--data-dir={tmp_path}"],
            [new],
            [new, f"--wal-dir={tmp_path}/new/member"],
            [new, f"--wal-dir={tmp_path}/new/member/wal"],
            [new, "--auth-token=jwt,sign-method=HS256,priv-key=/nowhere"],
        )
    )
    assert inner_log.returncode == 2 and "which a new member creates itself" in inner_log.stderr
    assert (own_log.returncode, own_log.stderr) == (0, "")
    assert key.returncode == 2 and "cannot read the key /nowhere" in key.stderr
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("etcdlite: data-dir: ") and "is not a directory" in bad.stderr
    assert foreign.returncode == 2 and "holds no member but other files: file." in foreign.stderr
    assert (good.returncode, good.stderr) == (0, "")
    assert not (tmp_path / "new").exists()


def test_the_data_folder_carries_the_name_unless_set():
    assert load("--name=a").data_dir == "a.etcdlite"
    assert load("--name=a", "--data-dir=/srv/${name}").data_dir == "/srv/a"
    assert load("--name=a", "--data-dir=").data_dir == "a.etcdlite"


@pytest.mark.parametrize("name", ["", "a,b", "a=b", "a/b", "a\nb", "x" * 256])
def test_a_name_that_would_break_the_member_list_is_refused(name):
    (line,) = problems(f"--name={name}")
    assert "not a name for a member" in line


def test_the_initial_cluster_is_this_member_unless_it_is_said():
    peer = "--initial-advertise-peer-urls=http://10.0.0.1:2380"
    alone = load("--name=a", peer)
    assert alone.initial_advertise_peer_urls == ("http://10.0.0.1:2380",)
    assert alone.initial_cluster == (("a", "http://10.0.0.1:2380"),)
    assert load("--name=a", peer, "--initial-cluster=a=http://10.0.0.1:2380").initial_cluster == (
        alone.initial_cluster
    )
    two = load("--name=a", peer, "--initial-cluster=a=http://10.0.0.1:2380,b=http://10.0.0.2:2380")
    assert two.initial_cluster == (("a", "http://10.0.0.1:2380"), ("b", "http://10.0.0.2:2380"))


@pytest.mark.parametrize(
    ("cluster", "problem"),
    [
        ("a", "NAME=URL"),
        ("a=http://10.0.0.1:2380,b", "NAME=URL"),
        ("b=http://10.0.0.1:2380", "this member's name, a, is not in it"),
        ("a=http://10.0.0.2:2380", "make them the same"),
        ("a=http://10.0.0.1:2380,a=http://10.0.0.2:2380", "make them the same"),
        ("a=http://10.0.0.1:2380,b=http://10.0.0.1:2380", "is the URL of a and b"),
        ("a=http://10.0.0.1:2380,b=ftp://10.0.0.2:2380", "not a URL that can be used"),
        ("a=http://10.0.0.1:2380,b=unixs://10.0.0.2:2380", "TCP only"),
    ],
)
def test_an_initial_cluster_that_cannot_be_is_explained(cluster, problem):
    peer = "--initial-advertise-peer-urls=http://10.0.0.1:2380"
    (line,) = problems("--name=a", peer, f"--initial-cluster={cluster}")
    assert problem in line


def test_the_members_come_from_one_place():
    settings = load("--discovery-srv=example.com", "--discovery-srv-name=lab")
    assert (settings.discovery_srv, settings.discovery_srv_name) == ("example.com", "lab")
    (line,) = problems(
        "--discovery-srv=example.com", "--initial-cluster=default=http://localhost:2380"
    )
    assert "set one of initial-cluster and discovery-srv" in line
    (line,) = problems("--discovery-srv=http://example.com")
    assert "not a DNS name" in line
    (line,) = load("--discovery-srv-name=lab").warnings
    assert "no effect without discovery-srv" in line


def test_log_outputs_are_streams_and_files():
    assert load("--log-outputs=systemd/journal,stderr").log_outputs == ("stderr",)
    assert load("--log-outputs=stdout,/tmp/x.log").log_outputs == ("stdout", "/tmp/x.log")
    assert "names nothing" in problems("--log-outputs=stdout,")[0]


def test_what_is_dangerous_is_a_loud_warning():
    (line,) = load("--unsafe-no-fsync").warnings
    assert "ACKNOWLEDGED WRITES WILL BE LOST" in line
    (line,) = load("--force-new-cluster").warnings
    assert "remove it when that is done" in line
    (line,) = load("--max-request-bytes=11MiB").warnings
    assert "recommended" in line


def test_requests_are_32_mib_at_most():
    assert load("--max-request-bytes=32MiB").max_request_bytes == 32 << 20
    (problem,) = problems("--max-request-bytes=33MiB")
    assert "--max-request-bytes=33MiB" in problem and "the most 33554432" in problem


NAMES = st.sampled_from([*flags.FLAGS, "nmae", "experimental-max-wals", "config", ""])
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["0", "1", "-1", "true", "5s", "1GiB", "http://127.0.0.1:1", "a=http://b:1"]),
)


@given(st.lists(st.tuples(NAMES, TEXTS), max_size=4), st.dictionaries(NAMES, TEXTS, max_size=3))
def test_whatever_is_set_gives_a_configuration_or_problems_on_one_line_each(flags, variables):
    environ = {"ETCDLITE_" + name.upper().replace("-", "_"): t for name, t in variables.items()}
    try:
        load(*(f"--{name}={text}" for name, text in flags), environ=environ)
    except config.ConfigError as error:
        for line in error.problems + error.warnings:
            assert line.isprintable()


LINES = st.one_of(
    st.tuples(NAMES, TEXTS).map(lambda pair: f"{pair[0]} = {pair[1]!r}"),
    st.sampled_from(
        ["[", "a\x00 = 1", '"\x7f" = 1', 'name = "\x1b"', "[[x]]", "x = 1e999", "é = 1"]
    ),
    st.text(max_size=20),
)


@pytest.mark.parametrize("url", ["http://::1:2379", "http://10.0.0.1:80000", "http://10.0.0.1"])
def test_a_url_that_cannot_be_used_is_refused_with_the_right_form(url):
    (line,) = problems(f"--listen-client-urls={url}", "--advertise-client-urls=http://a:1")
    assert f"{url}: not a URL that can be used; write http://HOST:PORT and nothing more" in line
    assert line.endswith("(a port up to 65535, an IPv6 address in brackets)")


@given(st.lists(LINES, max_size=5))
def test_whatever_stands_in_a_file_gives_a_configuration_or_problems_on_one_line_each(lines):
    with tempfile.NamedTemporaryFile(prefix="etcdlite-", suffix=".toml") as file:
        file.write("\n".join(lines).encode("utf-8", "replace"))
        file.flush()
        try:
            load("--config", file.name)
        except config.ConfigError as error:
            for line in error.problems + error.warnings:
                assert line.isprintable()


@pytest.mark.parametrize(
    ("secret", "listen", "cert"),
    [
        ("peer-secret-file", "listen-peer-urls", "peer-"),
        ("client-secret-file", "listen-client-urls", ""),
    ],
)
def test_a_shared_secret_excludes_https_where_it_could_be_passed_by(secret, listen, cert):
    flags = (f"--{secret}=/s", f"--{cert}cert-file=/c", f"--{cert}key-file=/k")
    (line,) = problems(*flags, f"--{listen}=https://127.0.0.1:7001")
    assert f"excludes https:// in {listen}" in line and secret in line
    assert load(f"--{secret}=/s", f"--{listen}=http://127.0.0.1:7001")


def test_a_bad_file_of_secrets_is_found_by_check_config(tmp_path):
    bad, good = tmp_path / "bad", tmp_path / "good"
    bad.write_text("correct horse battery staple\n")
    bad.chmod(0o600)
    secret_file.create(str(good))
    data = f"--data-dir={tmp_path / 'data'}"
    (line,) = config.check_files(load(data, f"--peer-secret-file={bad}"))
    assert line.startswith("peer-secret-file: line 1 of")
    assert config.check_files(load(data, f"--peer-secret-file={good}")) == []
    if os.getuid() == 0:
        good.chmod(0o640)
        assert config.check_files(load(data, f"--peer-secret-file={good}"))
        os.chown(good, 0, 1)  # As the manual says: root's, and of the group of the service.
        assert config.check_files(load(data, f"--peer-secret-file={good}")) == []
    (line,) = config.check_files(
        load(data, f"--peer-secret-file={good}", f"--client-secret-file={good}")
    )
    assert "have a secret in common" in line
