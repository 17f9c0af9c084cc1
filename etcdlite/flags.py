"""The flags of `etcdlite`, each written once: --help, the environment, the configuration file and
docs/configuration.md follow from this table.

Names, meanings and defaults are etcd's. Each of etcd's flags is one of
- implemented: it does what etcd's does;
- without effect: what it tunes does not exist here, so it cannot matter;
- refused: it asks for something that etcdlite does not do (yet).

The parsers raise ValueError with what is wrong and what to write instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from etcdlite import cipher_suites
from etcdlite.log import FORMATS, LEVELS, quoted
from etcdlite.notation import parse_bool, parse_duration_s, parse_size_bytes
from etcdlite.urls import check_listen_url, check_url, host_port

DEFAULT_FILE = "/etc/etcdlite.toml"
"""Read if it exists and no other file is named."""

DEFAULT_BACKUP_STATUS = "/var/lib/etcdlite-backup/status.prom"
"""Where etcdlite-backup.service writes it. `backup_status.py` has the format."""

MAX_ELECTION_TIMEOUT_MS = 50_000
"""As in etcd."""

MAX_REQUEST_BYTES = 32 << 20
"""A larger request could not be read, logged or answered without a stall that others notice."""

MAX_DURATION_S = 100 * 365 * 86400

HELP_COLUMNS = 100

IMPLEMENTED = "implemented"
NO_EFFECT = "no effect"
REFUSED = "refused"


class Kind(NamedTuple):
    """What values a flag takes."""

    metavar: str
    parse: Callable[[str], Any]
    native: type | None = None
    """The TOML type that is accepted besides a string."""
    unit: str = ""
    """Of the value, at the end of the attribute's name in `Config`."""


class Flag(NamedTuple):
    name: str
    kind: Kind
    default: str
    text: str
    """What it does; if it is not implemented, why not."""
    status: str = IMPLEMENTED

    @property
    def attribute(self) -> str:
        """Its name in a `Config`."""
        return self.name.replace("-", "_") + self.kind.unit


# Kinds of values.


def _whole_number(text: str, what: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,19}", text):
        raise ValueError(f"not {what}; write digits only")
    return int(text)


def _in_range(value: int, low: int, high: int, unit: str = "") -> int:
    if not low <= value <= high:
        raise ValueError(f"out of range; the least is {low}{unit}, the most {high}{unit}")
    return value


def _number(low: int, high: int) -> Kind:
    return Kind("N", lambda text: _in_range(_whole_number(text, "a whole number"), low, high), int)


def _size(low: int, high: int) -> Kind:
    return Kind("BYTES", lambda text: _in_range(parse_size_bytes(text), low, high, " bytes"), int)


def parse_seconds(text: str) -> float:
    """A duration of 0 to MAX_DURATION_S."""
    try:
        seconds = parse_duration_s(text)
    except ValueError:
        reason = "not a duration; write a number and its unit, as in 300ms, 5s, 1h30m"
        raise ValueError(reason) from None
    if not 0 <= seconds <= MAX_DURATION_S:
        raise ValueError(f"out of range; write 0 to {MAX_DURATION_S // 3600}h")
    return seconds


def _milliseconds(text: str) -> int:
    """Of a plain number of milliseconds, as in etcd, or a duration with its unit."""
    if re.fullmatch(r"-?[0-9]+", text):
        value = _whole_number(text, "a number of milliseconds")
    else:
        value = round(parse_seconds(text) * 1000)
    return _in_range(value, 1, MAX_ELECTION_TIMEOUT_MS, " ms")


def parse_truth(text: str) -> bool:
    try:
        return parse_bool(text)
    except ValueError:
        raise ValueError("neither true nor false; write one of the two") from None


def _items(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",")) if text else ()


def _choice(metavar: str, *choices: str) -> Kind:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"unknown; write one of {', '.join(filter(None, choices))}")
        return text

    return Kind(metavar, parse)


def _member_name(text: str) -> str:
    if not 0 < len(text) <= 255 or not text.isprintable() or re.search("[,=/]", text):
        raise ValueError(
            "not a name for a member; write 1 to 255 printable characters without , = and /"
        )
    return text


def _auth_token(text: str) -> dict[str, str]:
    """The options of JSON Web Tokens; none for simple tokens."""
    kind, *pairs = text.split(",")
    options = dict(pair.partition("=")[::2] for pair in pairs)
    if kind == "simple" and not pairs:
        return {}
    if (
        kind != "jwt"
        or len(options) != len(pairs)
        or "sign-method" not in options
        or not options.keys() <= {"sign-method", "pub-key", "priv-key", "ttl"}
        or not all(options.values())
    ):
        raise ValueError(
            "write simple, or jwt,sign-method=METHOD,priv-key=FILE,pub-key=FILE,ttl=DURATION"
        )
    return options


def _domain(text: str) -> str:
    if len(text) > 253 or (text and not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", text, re.ASCII)):
        raise ValueError("not a DNS name; write it as in example.com")
    return text


def _check_each(urls: tuple[str, ...], check: Callable[[str], None]) -> tuple[str, ...]:
    for url in urls:
        try:
            check(url)
        except ValueError as error:
            raise ValueError(f"{quoted(url)}: {error}") from None
    return urls


def _listen_urls(text: str) -> tuple[str, ...]:
    urls = _items(text)
    if not urls:
        raise ValueError("empty; write at least one http://ADDRESS:PORT")
    _check_each(urls, check_listen_url)
    for position, url in enumerate(urls):
        if host_port(url)[1] and url in urls[:position]:
            raise ValueError(f"{quoted(url)}: there twice; remove one")
    return urls


def _advertised_as(listened: str) -> Kind:
    """URLs for others to dial; empty if they are to be those of the flag `listened`."""
    placeholder = f"${{{listened}}}"

    def parse(text: str) -> tuple[str, ...]:
        return () if text in ("", placeholder) else _check_each(_items(text), check_url)

    return Kind("URL,...", parse, list)


def _gates(text: str) -> dict[str, bool]:
    gates = {}
    for item in _items(text):
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise ValueError("not a list of gates; write NAME=true,... or NAME=false,...")
        gates[name] = parse_truth(value)
    return gates


TEXT = Kind("TEXT", str)
NAME = Kind("NAME", _member_name)
PATH = Kind("PATH", str)
DOMAIN = Kind("DOMAIN", _domain)
LIST = Kind("LIST", _items, list)
BOOL = Kind("BOOL", parse_truth, bool)
NUMBER = _number(-(1 << 62), 1 << 62)
SIZE = _size(-(1 << 62), 1 << 62)
MILLISECONDS = Kind("MS", _milliseconds, int, "_ms")
DURATION = Kind("DURATION", parse_seconds, int, "_s")
NOTIFY_INTERVAL = Kind("DURATION", lambda text: max(0.1, parse_seconds(text) or 600.0), int, "_s")
"""0 means 10 minutes; less than 100 ms is raised to that."""
LISTEN_URLS = Kind("URL,...", _listen_urls, list)
OPTIONAL_URLS = Kind("URL,...", lambda text: _listen_urls(text) if text else (), list)
ADVERTISE_CLIENTS = _advertised_as("listen-client-urls")
ADVERTISE_PEERS = _advertised_as("listen-peer-urls")
RETENTION = Kind("RETENTION", str, int)
GATES = Kind("GATE=BOOL,...", _gates, list)
SUITES = Kind("SUITE,...", lambda text: _check_each(_items(text), cipher_suites.check), list)
TLS_VERSION = _choice("VERSION", "", "TLS1.2", "TLS1.3")

# The table.

_DISCOVERY = "etcdlite uses no discovery service; set initial-cluster or discovery-srv"
_PEERS = "connections between members have limits of their own"
_TRACING = "etcdlite does not export traces"
_BBOLT = "etcdlite keeps its data in its own files, not in bbolt"
_PROCEEDS = "compaction always runs in short slices between requests"
_NO_V2 = "etcdlite has no v2 store"
_CHECKPOINTS = "the remaining time of long leases is always stored"


_no_effect = partial(Flag, status=NO_EFFECT)
_refused = partial(Flag, status=REFUSED)

GROUPS: dict[str, tuple[Flag, ...]] = {
    "Member": (
        Flag("name", NAME, "default", "The name of this member."),
        Flag("data-dir", PATH, "${name}.etcdlite", "The directory of all data."),
        Flag("wal-dir", PATH, "", "A separate directory for the write-ahead log."),
        Flag("encryption-key-file", PATH, "",
              "A file with keys: all data on disk is encrypted with the first one."),
        Flag("config-file", PATH, "", "The configuration file. --config is the same."),
        Flag("feature-gates", GATES, "",
              "etcd's feature gates. A gate sets the flag for the same feature."),
    ),
    "Clients": (
        Flag("listen-client-urls", LISTEN_URLS, "http://localhost:2379",
              "Where to listen for clients; port 0 is any free port."),
        Flag("advertise-client-urls", ADVERTISE_CLIENTS, "${listen-client-urls}",
              "Where clients reach this member; required when it listens on all addresses."),
        Flag("socket-reuse-port", BOOL, "false",
              "Let other processes of this user listen on the same ports (SO_REUSEPORT)."),
        Flag("max-connections", _number(1, 1_000_000), "20000",
              "The most open connections of clients; further ones are refused."),
        Flag("max-connections-per-address", _number(0, 1_000_000), "0",
              "The most of one address; 0: a quarter, and any number from this machine."),
        Flag("memory-limit", _size(0, 1 << 50), "0",
              "Memory for all that waits in connections; 0: half of the machine's or cgroup's."),
        Flag("max-concurrent-streams", _number(1, (1 << 32) - 1), "1024",
              "The most requests and streams of one gRPC connection; no more than 65536."),
        Flag("max-request-bytes", _size(1, MAX_REQUEST_BYTES), "1572864",
              "The largest request; at most 32 MiB."),
        Flag("client-secret-file", PATH, "",
              "Shared secrets that clients of the native protocol must know."),
        Flag("max-txn-ops", _number(1, 100_000), "128",
              "The most operations in one transaction."),
        Flag("watch-progress-notify-interval", NOTIFY_INTERVAL, "10m",
              "Interval of progress messages to idle watches that ask; at least 100ms; 0: 10m."),
    ),
    "Cluster": (
        Flag("listen-peer-urls", LISTEN_URLS, "http://localhost:2380",
              "Where to listen for the other members; port 0 is any free port."),
        Flag("initial-advertise-peer-urls", ADVERTISE_PEERS, "${listen-peer-urls}",
              "Where the other members reach this one. Used at the first start only."),
        Flag("initial-cluster", LIST, "${name}=${initial-advertise-peer-urls}",
              "All members, NAME=URL,... Used at the first start only, as the next two are."),
        Flag("initial-cluster-state", _choice("STATE", "new", "existing"), "new",
              "new, or existing for a member that was added to a running cluster."),
        Flag("initial-cluster-token", TEXT, "etcd-cluster",
              "Distinguishes clusters with the same members; part of the cluster's ID."),
        Flag("discovery-srv", DOMAIN, "",
              "Take initial-cluster from the SRV records of this DNS domain."),
        Flag("discovery-srv-name", DOMAIN, "",
              "Query _etcd-server-NAME._tcp instead of _etcd-server._tcp."),
        Flag("strict-reconfig-check", BOOL, "true",
              "Refuse membership changes that could cost the cluster its quorum."),
        Flag("max-learners", _number(0, 1000), "1", "The most learners."),
        Flag("peer-address-check", BOOL, "true",
              "Refuse a member that connects from an address which its peer URLs do not have."),
        Flag("peer-secret-file", PATH, "",
              "Shared secrets: members authenticate each other and encrypt all traffic."),
        Flag("force-new-cluster", BOOL, "false",
              "Make this member a cluster of its own, with its data, when the others are lost."),
        Flag("corrupt-check-time", DURATION, "0s",
              "How often the leader compares the data of all members; 0: never."),
        Flag("compact-hash-check-time", DURATION, "1m",
              "The leader compares the members this soon after a compaction; 0: never."),
        Flag("initial-corrupt-check", BOOL, "false",
              "Compare with the other members before serving clients."),
        Flag("heartbeat-interval", MILLISECONDS, "100",
              "Time between a leader's heartbeats, in milliseconds or with a unit."),
        Flag("election-timeout", MILLISECONDS, "1000",
              "Time without a leader before an election; at least 5 heartbeats, at most 50000."),
    ),
    "Storage": (
        Flag("quota-backend-bytes", SIZE, "0",
              "Size of the data at which writes are refused (alarm NOSPACE); 0: 2 GiB; -1: none."),
        Flag("auto-compaction-mode", _choice("MODE", "periodic", "revision"), "periodic",
              "Whether auto-compaction-retention is a time or a number of revisions."),
        Flag("auto-compaction-retention", RETENTION, "0",
              "History to keep: a duration (a plain number is hours) or revisions; 0: all of it."),
        Flag("unsafe-no-fsync", BOOL, "false",
              "Do not wait for the disk. A crash of the machine loses acknowledged writes."),
        Flag("backup-status-file", PATH, DEFAULT_BACKUP_STATUS,
              "The file in which the nightly backup says how it went, for /metrics."),
    ),
    "Users": (
        Flag("auth-token", Kind("TOKENS", _auth_token), "simple",
              "What clients get for a password: simple, or "
              "jwt,sign-method=METHOD,priv-key=FILE,pub-key=FILE,ttl=DURATION."),
        Flag("auth-token-ttl", _number(1, 365 * 86400), "300",
              "Seconds for which a simple token is valid after it was last used."),
    ),
    "gRPC and HTTP": (
        Flag("listen-client-http-urls", OPTIONAL_URLS, "",
              "More addresses, for HTTP alone; listen-client-urls serve all of it, too."),
        Flag("listen-metrics-urls", OPTIONAL_URLS, "",
              "More addresses, for /metrics and health checks alone."),
        Flag("enable-grpc-gateway", BOOL, "true", "Serve the API as JSON below /v3/."),
        Flag("cors", LIST, "",
              "Origins whose web pages may use the API, beside the server's own; * is any."),
        Flag("host-whitelist", LIST, "",
              "Host names that HTTP clients may use; * is any. Unset: any, but at loopback "
              "addresses only IP addresses, localhost, this machine's name and the hosts of the "
              "client URLs."),
        Flag("grpc-keepalive-min-time", DURATION, "5s",
              "A gRPC client that pings more often than this is disconnected."),
        Flag("grpc-keepalive-interval", DURATION, "2h",
              "A gRPC client that is silent for this long is pinged."),
        Flag("grpc-keepalive-timeout", DURATION, "20s",
              "If it does not respond within this time, its connection is closed."),
    ),
    "TLS for clients": (
        Flag("cert-file", PATH, "",
              "The server's certificate (PEM), followed by intermediate ones."),
        Flag("key-file", PATH, "", "Its private key (PEM), without a passphrase."),
        Flag("client-cert-auth", BOOL, "false",
              "Demand a client certificate; its common name is the user."),
        Flag("trusted-ca-file", PATH, "",
              "CAs of client certificates. If it is set, they are demanded, too."),
        Flag("client-crl-file", PATH, "", "Revoked client certificates (PEM or DER)."),
        Flag("client-cert-allowed-hostname", LIST, "",
              "Accept only client certificates with one of these alternative names."),
        Flag("auto-tls", BOOL, "false",
              "Make a certificate that is its own CA, in DATA-DIR/fixtures/client."),
    ),
    "TLS between members": (
        Flag("peer-cert-file", PATH, "",
              "The member's certificate, as a server and as a client of other members."),
        Flag("peer-key-file", PATH, "", "Its private key."),
        Flag("peer-client-cert-file", PATH, "",
              "Another certificate for connections to other members."),
        Flag("peer-client-key-file", PATH, "", "Its private key."),
        Flag("peer-client-cert-auth", BOOL, "false",
              "Demand a certificate of members that connect."),
        Flag("peer-trusted-ca-file", PATH, "",
              "CAs of the members' certificates. If it is set, they are demanded, too."),
        Flag("peer-crl-file", PATH, "", "Revoked certificates of members (PEM or DER)."),
        Flag("peer-cert-allowed-cn", LIST, "",
              "Accept only members' certificates with one of these common names."),
        Flag("peer-cert-allowed-hostname", LIST, "",
              "Accept only members' certificates with one of these alternative names."),
        Flag("peer-skip-client-san-verification", BOOL, "false",
              "Accept a member from an address that its certificate does not name."),
        Flag("peer-auto-tls", BOOL, "false",
              "Make a certificate, in DATA-DIR/fixtures/peer. Encrypts, but verifies nobody."),
    ),
    "TLS": (
        Flag("cipher-suites", SUITES, "",
              "The suites of TLS 1.2 that may be used, by IANA name; empty: secure ones."),
        Flag("tls-min-version", TLS_VERSION, "TLS1.2", "The oldest version: TLS1.2 or TLS1.3."),
        Flag("tls-max-version", TLS_VERSION, "", "The newest version; empty: any."),
        Flag("self-signed-cert-validity", _number(1, 100), "1",
              "Years for which the certificates of auto-tls and peer-auto-tls are valid."),
    ),
    "Logging": (
        Flag("log-level", _choice("LEVEL", *LEVELS), "info",
              "The lowest level that is logged: " + ", ".join(LEVELS) + "."),
        Flag("log-format", _choice("FORMAT", *FORMATS), "console",
              "json (etcd's field names) or console (for people and journald)."),
        Flag("log-outputs", LIST, "default",
              "stderr, stdout or files; default and systemd/journal mean stderr."),
        Flag("warning-apply-duration", DURATION, "100ms",
              "Log when applying entries takes longer than this."),
        Flag("warning-unary-request-duration", DURATION, "300ms",
              "Log a request that takes longer than this."),
    ),
    "Storage tuning (measure before you change it)": (
        Flag("checkpoint-bytes", _size(4096, 1 << 40), "64MiB",
              "Log written between checkpoints; more means less work and a slower start."),
        Flag("segment-bytes", _size(4096, 1 << 30), "16MiB", "Size of a segment of the data."),
        Flag("wal-segment-bytes", _size(4096, 1 << 30), "16MiB", "Size of a segment of the log."),
    ),
}  # fmt: skip
"""The implemented flags, in the order of --help."""

OTHERS: tuple[Flag, ...] = (
    _no_effect("snapshot-count", NUMBER, "10000",
               "checkpoints depend on the size of the log (checkpoint-bytes), not its entries"),
    _no_effect("max-snapshots", NUMBER, "5",
               "a checkpoint is removed when the next one is complete"),
    _no_effect("max-wals", NUMBER, "5", "the log is removed up to the last complete checkpoint"),
    _no_effect("metrics", _choice("SET", "basic", "extensive"), "basic",
               "durations are not kept for each gRPC method"),
    _no_effect("memory-mlock", BOOL, "false", "etcdlite does not map its data into memory"),
    _no_effect("backend-bbolt-freelist-type", TEXT, "map", _BBOLT),
    _no_effect("backend-batch-interval", DURATION, "100ms", _BBOLT),
    _no_effect("backend-batch-limit", NUMBER, "0", _BBOLT),
    _no_effect("bootstrap-defrag-threshold-megabytes", NUMBER, "0",
               "defragmentation runs by itself, a little at a time"),
    _no_effect("stop-grpc-service-on-defrag", BOOL, "false",
               "defragmentation does not interrupt the service"),
    _no_effect("compaction-batch-limit", NUMBER, "1000", _PROCEEDS),
    _no_effect("compaction-sleep-interval", DURATION, "10ms", _PROCEEDS),
    _no_effect("txn-mode-write-with-shared-buffer", BOOL, "true", _BBOLT),
    _no_effect("initial-election-tick-advance", BOOL, "true",
               "a member that starts campaigns once it reaches a quorum, if there is no leader"),
    _no_effect("wait-cluster-ready-timeout", DURATION, "5s",
               "a member serves what it can as soon as it has started"),
    _no_effect("pre-vote", BOOL, "true", "pre-vote is always on"),
    _no_effect("raft-read-timeout", DURATION, "5s", _PEERS),
    _no_effect("raft-write-timeout", DURATION, "5s", _PEERS),
    _no_effect("set-member-localaddr", BOOL, "false",
               "the system chooses the local address of connections to members"),
    _no_effect("snapshot-catchup-entries", NUMBER, "5000",
               "the log that is kept for slow members is limited by size, not by entries"),
    _no_effect("downgrade-check-time", DURATION, "5s", "members know each other's versions"),
    _no_effect("socket-reuse-address", BOOL, "false", "etcdlite always sets SO_REUSEADDR"),
    _no_effect("v2-deprecation", TEXT, "write-only", _NO_V2),
    _no_effect("logger", TEXT, "zap", "there is one logger, with the field names of etcd's zap"),
    _no_effect("log-rotation-config-json", TEXT,
               '{"maxsize": 100, "maxage": 0, "maxbackups": 0, "localtime": false, '
               '"compress": false}',
               "it only matters with enable-log-rotation"),
    _no_effect("distributed-tracing-address", TEXT, "localhost:4317", _TRACING),
    _no_effect("distributed-tracing-service-name", TEXT, "etcd", _TRACING),
    _no_effect("distributed-tracing-instance-id", TEXT, "", _TRACING),
    _no_effect("distributed-tracing-sampling-rate", NUMBER, "0", _TRACING),
    _no_effect("bcrypt-cost", NUMBER, "10", "passwords are not hashed with bcrypt"),
    _no_effect("compact-hash-check-enabled", BOOL, "true",
               "members are compared after compactions unless compact-hash-check-time is 0"),
    _no_effect("enable-lease-checkpoint", BOOL, "true", _CHECKPOINTS),
    _no_effect("enable-lease-checkpoint-persist", BOOL, "true", _CHECKPOINTS),
    *(_refused(f"discovery{part}", TEXT, "", _DISCOVERY)
      for part in ("", "-token", "-user", "-password", "-proxy", "-endpoints", "-cert", "-key",
                   "-cacert")),
    *(_refused(f"discovery-{part}", DURATION, default, _DISCOVERY)
      for part, default in (("dial-timeout", "2s"), ("request-timeout", "5s"),
                            ("keepalive-time", "2s"), ("keepalive-timeout", "6s"))),
    _refused("discovery-insecure-transport", BOOL, "true", _DISCOVERY),
    _refused("discovery-insecure-skip-tls-verify", BOOL, "false", _DISCOVERY),
    _refused("discovery-fallback", TEXT, "exit", _DISCOVERY),
    *(_no_effect(name, PATH, "", "the server does not connect to itself as a client")
      for name in ("client-cert-file", "client-key-file")),
    _refused("enable-pprof", BOOL, "false", "it serves the profiles of a program written in Go"),
    _refused("enable-distributed-tracing", BOOL, "false", _TRACING),
    _refused("enable-log-rotation", BOOL, "false",
             "use journald, or logrotate with kill -HUP in its postrotate"),
    _refused("enable-v2", BOOL, "false", _NO_V2),
    _refused("enable-v2v3", TEXT, "", _NO_V2),
    _refused("proxy", TEXT, "off", _NO_V2 + ", nor a proxy for it"),
    *(_no_effect(f"proxy-{part}", NUMBER, default, "it only matters with proxy")
      for part, default in (("failure-wait", "5000"), ("refresh-interval", "30000"),
                            ("dial-timeout", "1000"), ("write-timeout", "5000"),
                            ("read-timeout", "0"))),
    _refused("debug", BOOL, "false", "it is log-level = debug here, as in etcd 3.5"),
    _no_effect("log-package-levels", TEXT, "", "log-level counts for all parts of the server"),
)  # fmt: skip
"""etcd's other flags, up to 3.7 and back to 3.4 where a unit file may still have them."""

FLAGS: dict[str, Flag] = {
    flag.name: flag for flag in (*(f for group in GROUPS.values() for f in group), *OTHERS)
}
"""Every flag of the file and the environment, by name."""

GATES_FLAGS = {
    "CompactHashCheck": "compact-hash-check-enabled",
    "DistributedTracing": "enable-distributed-tracing",
    "InitialCorruptCheck": "initial-corrupt-check",
    "LeaseCheckpoint": "enable-lease-checkpoint",
    "LeaseCheckpointPersist": "enable-lease-checkpoint-persist",
    "SetMemberLocalAddr": "set-member-localaddr",
    "StopGRPCServiceOnDefrag": "stop-grpc-service-on-defrag",
    "TxnModeWriteWithSharedBuffer": "txn-mode-write-with-shared-buffer",
}
"""The flag that each of etcd's feature gates sets."""

ACTIONS = {
    "check-config": "Check the configuration, print what is wrong with it, and do not start.",
    "version": "Print the version.",
    "help": "Print this text.",
}
"""Flags that stand on the command line only, and what they do."""

SECRETS = ("discovery-user", "discovery-password", "discovery-token")
"""Flags whose values are never shown."""

EXPERIMENTAL = "experimental-"
"""The prefix that older versions of etcd give to many flags."""


def variable_name(prefix: str, name: str) -> str:
    return prefix + name.upper().replace("-", "_")


def find(name: str) -> Flag | None:
    """The flag of this name, of its short form, or of the name it had while experimental."""
    if name == "config":
        name = "config-file"
    return FLAGS.get(name) or FLAGS.get(name.removeprefix(EXPERIMENTAL))


def help_text() -> str:
    out = [
        "Usage: etcdlite [flags]",
        "",
        "Starts a key-value server. Without flags it serves clients of this machine on port 2379",
        "and keeps its data in ./default.etcdlite.",
        "",
        "Each flag can also be set in the environment, by the name at its right (ETCD_... works",
        f"too), or by its own name in a TOML file: {DEFAULT_FILE} or --config FILE.",
        "The command line overrides the environment, which overrides the file. Defaults are in",
        "brackets.",
    ]
    for group, flags in GROUPS.items():
        out += ["", f"{group}:"]
        for flag in flags:
            usage = f"  --{flag.name}" + f" {flag.kind.metavar}" * (flag.kind is not BOOL)
            out.append(f"{usage:45} {variable_name('ETCDLITE_', flag.name)}")
            out += _wrapped(flag.text + f" [{flag.default}]" * (flag.default != ""), " " * 6)
    out += ["", "Only on the command line:"]
    out += [f"  --{name:14} {text}" for name, text in ACTIONS.items()]
    out += ["", "etcd's other flags have no effect here, or are refused:"]
    out += _wrapped(", ".join(flag.name for flag in OTHERS), "  ")
    out += ["", "docs/configuration.md describes each of them."]
    return "\n".join(out) + "\n"


def _wrapped(text: str, indent: str) -> list[str]:
    import textwrap

    return textwrap.wrap(
        text, HELP_COLUMNS, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
