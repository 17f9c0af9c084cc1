"""The configuration: one table of every flag, and `load`, which reads them.

A flag can stand on the command line (`--name x`, `--name=x`, `-name x`), in the environment
(`ETCDLITE_NAME`, `ETCD_NAME`) and in a TOML file (`name = "x"`). The command line wins over the
environment, the environment over the file, `ETCDLITE_` over `ETCD_`. Names, meanings and defaults
are etcd's; what differs is in docs/configuration.md.

Each of etcd's flags is one of
- implemented: it does what etcd's does;
- without effect: what it tunes does not exist here, so it cannot matter; setting it is a warning;
- refused: it asks for something that etcdlite does not do (yet); setting it is a problem.
A flag that is set to its default is never a warning or a problem.

Invariants
- All problems are found in one go and raised together, one line each, which says where the value
  came from, what is wrong, and what to do.
- Nothing that a person wrote is ignored silently, and nothing is guessed from a misspelt name.
- The value of a flag that holds a secret is not shown.

It must never touch the disk but for the configuration file, nor resolve a host name.
"""

from __future__ import annotations

import ipaddress
import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from etcdlite.log import FORMATS, LEVELS, quoted, shorten
from etcdlite.notation import parse_bool, parse_duration_s, parse_size_bytes

DEFAULT_FILE = "/etc/etcdlite.toml"
"""Read if it exists and no other file is named."""

MAX_FILE_BYTES = 1 << 20
"""A larger configuration file is refused."""

DEFAULT_QUOTA_BYTES = 2 << 30
"""What `quota-backend-bytes = 0` stands for, as in etcd."""

MAX_ELECTION_TIMEOUT_MS = 50_000
MIN_HEARTBEATS_PER_ELECTION = 5
"""Both as in etcd: a follower should miss several heartbeats before it calls an election."""

MAX_REQUEST_BYTES = 32 << 20
"""More could neither be read, nor logged, nor answered without a stall that others notice."""

RECOMMENDED_MAX_REQUEST_BYTES = 10 << 20
"""Above it a request takes the loop for long; etcd warns at the same size."""

MAX_DURATION_S = 100 * 365 * 86400

MAX_SHOWN_CHARS = 100
"""Of a value, in a problem or a warning."""

HELP_COLUMNS = 100

IMPLEMENTED = "implemented"
NO_EFFECT = "no effect"
REFUSED = "refused"


@dataclass(frozen=True)
class Config:
    """A checked configuration. Attributes are the implemented flags; units are in the names."""

    name: str
    data_dir: str
    wal_dir: str
    """Empty: inside the data folder."""
    listen_client_urls: tuple[str, ...]
    """Port 0 stands for any free port. See `host_port`."""
    advertise_client_urls: tuple[str, ...]
    listen_peer_urls: tuple[str, ...]
    initial_advertise_peer_urls: tuple[str, ...]
    initial_cluster: tuple[tuple[str, str], ...]
    """(name, peer URL) of the members, this one among them; one with several URLs is there more
    than once. With `discovery_srv` it is this one alone, and DNS knows the others."""
    initial_cluster_state: str
    """"new" or "existing"."""
    initial_cluster_token: str
    discovery_srv: str
    """The domain whose SRV records name the members; empty: initial_cluster does."""
    discovery_srv_name: str
    force_new_cluster: bool
    max_learners: int
    strict_reconfig_check: bool
    corrupt_check_time_s: float
    """Between comparisons of the members; 0: none."""
    compact_hash_check_time_s: float
    """Within how long after a compaction members are compared; 0: not."""
    initial_corrupt_check: bool
    heartbeat_interval_ms: int
    election_timeout_ms: int
    quota_backend_bytes: int
    """0: no quota. (In the file, 0 is the default of 2 GiB and a negative number means none.)"""
    max_txn_ops: int
    max_request_bytes: int
    max_concurrent_streams: int
    max_connections: int
    listen_client_http_urls: tuple[str, ...]
    listen_metrics_urls: tuple[str, ...]
    enable_grpc_gateway: bool
    cors: tuple[str, ...]
    host_whitelist: tuple[str, ...]
    grpc_keepalive_min_time_s: float
    grpc_keepalive_interval_s: float
    grpc_keepalive_timeout_s: float
    auto_compaction_mode: str
    """"periodic" or "revision"."""
    auto_compaction_retention_s: float
    """History to keep in mode "periodic"; 0: no automatic compaction by time."""
    auto_compaction_retention_revisions: int
    """Revisions to keep in mode "revision"; 0: no automatic compaction by number."""
    watch_progress_notify_interval_s: float
    warning_apply_duration_s: float
    warning_unary_request_duration_s: float
    log_level: str
    log_format: str
    log_outputs: tuple[str, ...]
    """"stderr", "stdout" or paths of files."""
    unsafe_no_fsync: bool
    checkpoint_bytes: int
    segment_bytes: int
    wal_segment_bytes: int

    action: str = "run"
    """"run", "check-config", "help" or "version". For the last two nothing but the command line was
    read, and the attributes above are the defaults."""
    warnings: tuple[str, ...] = ()
    """One line each, in the words to be shown."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each flag was set, by its name: "--name", "ETCD_NAME", "/etc/etcdlite.toml: name".
    A flag that is not in it has its default."""


class ConfigError(Exception):
    """The configuration cannot be used: one line for each of its `problems`. The `warnings` are
    those of the part that could be read."""

    def __init__(self, problems: Sequence[str], warnings: Sequence[str] = ()) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)
        self.warnings = list(warnings)


class Kind(NamedTuple):
    """What values a flag takes."""

    metavar: str
    parse: Callable[[str], Any]
    """The value that a text stands for. Raises ValueError with what is wrong and what to write."""
    native: type | None = None
    """The TOML type that is taken besides a string."""


class Flag(NamedTuple):
    name: str
    kind: Kind
    default: str
    status: str
    text: str
    """What it does; of a flag that is not implemented, why not."""


def load(
    argv: Sequence[str],
    environ: Mapping[str, str],
    default_file: str = DEFAULT_FILE,
    has_member: Callable[[str], bool] = lambda data_dir: False,
) -> Config:
    """The configuration of a server started with `argv` (without the program's name).

    Reads the file named by --config, and only if there is none `default_file`, if it exists.
    `has_member` tells whether a data directory holds a member: then `initial-cluster`, which counts
    at the first start only, need not fit any more. Raises ConfigError.
    """
    reader = _Reader(has_member)
    action, on_command_line = reader.read_command_line(argv)
    if action in ("help", "version"):
        return replace(reader.resolve({}), action=action)
    layers = [reader.read_environment(environ, prefix) for prefix in ("ETCD_", "ETCDLITE_")]
    layers.append(on_command_line)
    above_file = {name: setting for layer in layers for name, setting in layer.items()}
    named = above_file.get("config-file")
    if named is not None and named.value:
        in_file = reader.read_file(named.value, must_exist=True)
    else:
        in_file = reader.read_file(default_file, must_exist=False)
    config = reader.resolve({**in_file, **above_file})
    if reader.problems:
        raise ConfigError(reader.problems, reader.warnings)
    return replace(config, action=action)


def host_port(url: str) -> tuple[str, int]:
    """The host (an IPv6 address without brackets) and port of a URL of a `Config`."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None, url
    return parts.hostname, parts.port


def format_address(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_initial_cluster(
    items: Sequence[str], name: str, peer_urls: Sequence[str]
) -> list[tuple[str, str]]:
    """The (name, peer URL) pairs of `NAME=URL` items, among which the member `name` must be, at
    exactly these peer URLs. Raises ValueError with what is wrong and what to do."""
    own = ",".join(f"{name}={url}" for url in peer_urls)
    pairs = []
    for item in items:
        member, _, url = item.partition("=")
        if not member or not url:
            raise ValueError(f"not a list of NAME=URL; write for example {own}")
        pairs.append((member, url))
    holders: dict[str, str] = {}
    for member, url in pairs:
        try:
            _check_url(url)
        except ValueError as error:
            raise ValueError(f"{quoted(url)}: {error}") from None
        if url in holders:
            who = f"{member}, twice" if holders[url] == member else f"{holders[url]} and {member}"
            raise ValueError(f"{url} is the URL of {who}; change one of them")
        holders[url] = member
    urls = {url for member, url in pairs if member == name}
    if not urls:
        names = ", ".join(dict.fromkeys(member for member, _ in pairs))
        raise ValueError(
            f"this member's name, {name}, is not in it; set name to one of {names}, or add {own}"
        )
    if urls != set(peer_urls):
        raise ValueError(
            f"it has {name} at {', '.join(sorted(urls))}, but initial-advertise-peer-urls is "
            f"{', '.join(peer_urls)}; make them the same"
        )
    return pairs


def help_text() -> str:
    """What --help prints."""
    out = [
        "Usage: etcdlite [flags]",
        "",
        "Starts a key-value server. Without flags it serves clients of this machine on port 2379",
        "and keeps its data in ./default.etcdlite.",
        "",
        "Each flag can also stand in the environment, as named at its right (ETCD_... works too),",
        f"or under its own name in a TOML file: {DEFAULT_FILE} or --config FILE. The command",
        "line wins over the environment, the environment over the file. Defaults are in brackets.",
    ]
    for group, flags in GROUPS.items():
        out += ["", f"{group}:"]
        for flag in flags:
            usage = f"  --{flag.name}" + f" {flag.kind.metavar}" * (flag.kind is not BOOL)
            out.append(f"{usage:45} {_variable('ETCDLITE_', flag.name)}")
            text = flag.text + f" [{flag.default}]" * (flag.default != "")
            out += _wrapped(text, " " * 6)
    out += ["", "Only on the command line:"]
    out += [f"  --{name:14} {text}" for name, text in _COMMANDS.items()]
    out += ["", "etcd's other flags are known and have no effect here or are refused:"]
    names = ", ".join(flag.name for flag in _OTHERS)
    out += _wrapped(names, "  ")
    out += ["", "docs/configuration.md tells about all of them, one by one."]
    return "\n".join(out) + "\n"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        HELP_COLUMNS,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


# ---------------------------------------------------------------------------------------------
# Kinds of values.

_MAX_DIGITS = 19
_AS_LISTENED = "${listen-client-urls}"


def _whole_number(text: str, what: str) -> int:
    if not re.fullmatch(r"-?\d+", text, re.ASCII) or len(text) > _MAX_DIGITS:
        raise ValueError(f"not {what}; write digits only")
    return int(text)


def _in_range(value: int, low: int, high: int, unit: str = "") -> int:
    if not low <= value <= high:
        raise ValueError(f"out of range; the least is {low}{unit}, the most {high}{unit}")
    return value


def _text(text: str) -> str:
    return text


def _number(low: int, high: int) -> Kind:
    return Kind("N", lambda text: _in_range(_whole_number(text, "a whole number"), low, high), int)


def _size(low: int, high: int) -> Kind:
    """Bytes."""

    def parse(text: str) -> int:
        return _in_range(parse_size_bytes(text), low, high, " bytes")

    return Kind("BYTES", parse, int)


def _seconds(text: str) -> float:
    try:
        seconds = parse_duration_s(text)
    except ValueError:
        reason = "not a duration; write a number and its unit, as in 300ms, 5s, 1h30m"
        raise ValueError(reason) from None
    if not 0 <= seconds <= MAX_DURATION_S:
        raise ValueError(f"out of range; write 0 to {MAX_DURATION_S // 3600}h")
    return seconds


def _milliseconds(low: int, high: int) -> Kind:
    """Milliseconds: a plain number, as in etcd, or a duration with its unit."""

    def parse(text: str) -> int:
        if re.fullmatch(r"-?\d+", text, re.ASCII):
            value = _whole_number(text, "a number of milliseconds")
        else:
            value = round(_seconds(text) * 1000)
        return _in_range(value, low, high, " ms")

    return Kind("MS", parse, int)


def _at_least(low_text: str) -> Kind:
    """A duration of at least so much."""

    def parse(text: str) -> float:
        value = _seconds(text)
        if value < _seconds(low_text):
            raise ValueError(f"out of range; the least is {low_text}")
        return value

    return Kind("DURATION", parse, int)


def _truth(text: str) -> bool:
    try:
        return parse_bool(text)
    except ValueError:
        raise ValueError("neither true nor false; write one of the two") from None


def _items(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",")) if text else ()


def _choice(metavar: str, *choices: str) -> Kind:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"unknown; write one of {', '.join(choices)}")
        return text

    return Kind(metavar, parse)


def _member_name(text: str) -> str:
    if not 0 < len(text) <= 255 or not text.isprintable() or re.search("[,=/]", text):
        raise ValueError(
            "not a name for a member; write 1 to 255 printable characters without , = and /"
        )
    return text


def _domain(text: str) -> str:
    if len(text) > 253 or (text and not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", text, re.ASCII)):
        raise ValueError("not a DNS name; write it as in example.com")
    return text


def _check_url(url: str) -> None:
    """Raises ValueError unless `url` is http://HOST:PORT."""
    scheme = url.partition("://")[0]
    if scheme in ("https", "unixs"):
        raise ValueError(f"not served: {_TLS}; write http://HOST:PORT")
    if scheme == "unix":
        raise ValueError("not served: clients connect by TCP only; write http://HOST:PORT")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    rest = parts.path + parts.query + parts.fragment + (parts.username or "")
    bare = url.isascii() and url.isprintable() and not re.search(r"[\s?#@]", url)
    if scheme != "http" or not host or port is None or rest or not bare:
        raise ValueError("not a URL that can be used; write http://HOST:PORT and nothing more")


def _urls(text: str) -> tuple[str, ...]:
    """URLs that others are told to dial."""
    urls = _items(text)
    if not urls:
        raise ValueError("empty; write at least one http://HOST:PORT")
    for url in urls:
        try:
            _check_url(url)
            if host_port(url)[1] == 0:
                raise ValueError("no port that can be dialled; write one from 1 to 65535")
        except ValueError as error:
            raise ValueError(f"{quoted(url)}: {error}") from None
    return urls


def _advertise_urls(text: str) -> tuple[str, ...]:
    """As `_urls`; empty when they are to be those that are listened on."""
    return () if text in ("", _AS_LISTENED) else _urls(text)


def _listen_urls(text: str) -> tuple[str, ...]:
    """URLs to listen on: as in etcd, an address of this machine rather than a name."""
    urls = _items(text)
    if not urls:
        raise ValueError("empty; write at least one http://ADDRESS:PORT")
    for position, url in enumerate(urls):
        try:
            _check_url(url)
            host, port = host_port(url)
            if host != "localhost":
                _address(host)
            if port and url in urls[:position]:
                raise ValueError("there twice; remove one")
        except ValueError as error:
            raise ValueError(f"{quoted(url)}: {error}") from None
    return urls


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(
            "a host name to listen on; write an IP address of this machine, localhost, "
            "or 0.0.0.0 for all IPv4 addresses, [::] for all"
        ) from None


TEXT = Kind("TEXT", _text)
NAME = Kind("NAME", _member_name)
PATH = Kind("PATH", _text)
DOMAIN = Kind("DOMAIN", _domain)
LIST = Kind("LIST", _items, list)
BOOL = Kind("BOOL", _truth, bool)
NUMBER = _number(-(1 << 62), 1 << 62)
SIZE = _size(-(1 << 62), 1 << 62)
DURATION = _at_least("0")
URLS = Kind("URL,...", _urls, list)
ADVERTISE_URLS = Kind("URL,...", _advertise_urls, list)
LISTEN_URLS = Kind("URL,...", _listen_urls, list)
OPTIONAL_URLS = Kind("URL,...", lambda text: _listen_urls(text) if text else (), list)
RETENTION = Kind("RETENTION", _text, int)

# ---------------------------------------------------------------------------------------------
# The table.

_TLS = "TLS comes with a later version"
_AUTH = "users and passwords come with a later version"
_DISCOVERY = "etcdlite asks no discovery service; set initial-cluster or discovery-srv"
_PEERS = "connections between members have limits of their own"
_TRACING = "etcdlite does not export traces"
_BBOLT = "etcdlite keeps its data in its own files, not in bbolt"
_PROCEEDS = "compaction always runs in short slices between requests"
_NO_V2 = "etcdlite has no v2 store"
_CHECKPOINTS = "what is left of long leases is always written down"


def _does(name: str, kind: Kind, default: str, text: str) -> Flag:
    return Flag(name, kind, default, IMPLEMENTED, text)


def _no_effect(name: str, kind: Kind, default: str, reason: str) -> Flag:
    return Flag(name, kind, default, NO_EFFECT, reason)


def _refused(name: str, kind: Kind, default: str, reason: str) -> Flag:
    return Flag(name, kind, default, REFUSED, reason)


GROUPS: dict[str, tuple[Flag, ...]] = {
    "Member": (
        _does("name", NAME, "default", "The name of this member."),
        _does("data-dir", PATH, "${name}.etcdlite", "The folder that holds everything."),
        _does("wal-dir", PATH, "", "A folder of its own for the write-ahead log."),
        _does("config-file", PATH, "", "The configuration file. --config is the same."),
    ),
    "Clients": (
        _does("listen-client-urls", LISTEN_URLS, "http://localhost:2379",
              "Where to listen for clients; port 0 takes any free port."),
        _does("advertise-client-urls", ADVERTISE_URLS, _AS_LISTENED,
              "Where clients reach this member; needed when it listens on all addresses."),
        _does("max-connections", _number(1, 1_000_000), "20000",
              "Connections at once; more are turned away."),
        _does("max-concurrent-streams", _number(1, (1 << 32) - 1), "4294967295",
              "Requests and streams that one connection may have open at once."),
        _does("max-request-bytes", _size(1, MAX_REQUEST_BYTES), "1572864",
              "The largest request; 32 MiB at most."),
        _does("max-txn-ops", _number(1, 100_000), "128",
              "The most operations in one transaction."),
        _does("watch-progress-notify-interval", _at_least("100ms"), "10m",
              "How often an idle watch that asked for it is told the current revision."),
    ),
    "Cluster": (
        _does("listen-peer-urls", LISTEN_URLS, "http://localhost:2380",
              "Where to listen for the other members; port 0 takes any free port."),
        _does("initial-advertise-peer-urls", URLS, "http://localhost:2380",
              "Where the other members reach this one. Counts at the first start only."),
        _does("initial-cluster", LIST, "${name}=${initial-advertise-peer-urls}",
              "All members, NAME=URL,... Counts at the first start only, as the next two."),
        _does("initial-cluster-state", _choice("STATE", "new", "existing"), "new",
              "new, or existing for a member that was added to a running cluster."),
        _does("initial-cluster-token", TEXT, "etcd-cluster",
              "Tells clusters with the same members apart; goes into the cluster's id."),
        _does("discovery-srv", DOMAIN, "",
              "Take initial-cluster from the SRV records of this DNS domain."),
        _does("discovery-srv-name", DOMAIN, "",
              "Ask for _etcd-server-NAME._tcp instead of _etcd-server._tcp."),
        _does("strict-reconfig-check", BOOL, "true",
              "Refuse membership changes that could cost the cluster its quorum."),
        _does("max-learners", _number(0, 1000), "1", "Learners at once."),
        _does("force-new-cluster", BOOL, "false",
              "Make this member a cluster of its own, with its data: when the others are lost."),
        _does("corrupt-check-time", DURATION, "0s",
              "How often the leader compares all members' data; 0: never."),
        _does("compact-hash-check-time", DURATION, "1m",
              "Within how long after a compaction it compares them; 0: not."),
        _does("initial-corrupt-check", BOOL, "false",
              "Compare with the other members before serving clients."),
        _does("heartbeat-interval", _milliseconds(1, MAX_ELECTION_TIMEOUT_MS), "100",
              "Between heartbeats of a leader; milliseconds, or with a unit."),
        _does("election-timeout", _milliseconds(1, MAX_ELECTION_TIMEOUT_MS), "1000",
              "Without a leader before an election; at least 5 heartbeats, at most 50000."),
    ),
    "Storage": (
        _does("quota-backend-bytes", SIZE, "0",
              "Size of the data at which writes are refused (alarm NOSPACE); 0: 2 GiB; -1: none."),
        _does("auto-compaction-mode", _choice("MODE", "periodic", "revision"), "periodic",
              "Whether auto-compaction-retention is a time or a number of revisions."),
        _does("auto-compaction-retention", RETENTION, "0",
              "History to keep: a duration (a plain number is hours) or revisions; 0: all of it."),
        _does("unsafe-no-fsync", BOOL, "false",
              "Do not wait for the disk. Acknowledged writes are lost when the machine crashes."),
    ),
    "gRPC and HTTP": (
        _does("listen-client-http-urls", OPTIONAL_URLS, "",
              "Further addresses for HTTP alone; all of it is on listen-client-urls, too."),
        _does("listen-metrics-urls", OPTIONAL_URLS, "",
              "Further addresses for /metrics and health checks alone."),
        _does("enable-grpc-gateway", BOOL, "true", "Serve the API as JSON below /v3/."),
        _does("cors", LIST, "*", "Origins whose web pages may read answers; * is any."),
        _does("host-whitelist", LIST, "*", "Names that HTTP clients may call this by; * is any."),
        _does("grpc-keepalive-min-time", DURATION, "5s",
              "A gRPC client that pings more often than this is sent away."),
        _does("grpc-keepalive-interval", DURATION, "2h",
              "A gRPC client that was silent for so long is pinged."),
        _does("grpc-keepalive-timeout", DURATION, "20s",
              "Without an answer to that for so long, its connection is closed."),
    ),
    "Logging": (
        _does("log-level", _choice("LEVEL", *LEVELS), "info",
              "The least level that is logged: " + ", ".join(LEVELS) + "."),
        _does("log-format", _choice("FORMAT", *FORMATS), "console",
              "json (etcd's field names) or console (for humans and journald)."),
        _does("log-outputs", LIST, "default",
              "stderr, stdout or files; default and systemd/journal stand for stderr."),
        _does("warning-apply-duration", DURATION, "100ms",
              "Applying entries for longer than this is logged."),
        _does("warning-unary-request-duration", DURATION, "300ms",
              "A request that takes longer than this is logged."),
    ),
    "Storage tuning (leave it alone unless you measure)": (
        _does("checkpoint-bytes", _size(4096, 1 << 40), "64MiB",
              "Log written between checkpoints: more is less work, and a slower start."),
        _does("segment-bytes", _size(4096, 1 << 30), "16MiB", "Size of a segment of the data."),
        _does("wal-segment-bytes", _size(4096, 1 << 30), "16MiB", "Size of a segment of the log."),
    ),
}  # fmt: skip
"""The implemented flags, in the order of --help."""

_OTHERS: tuple[Flag, ...] = (
    _no_effect("snapshot-count", NUMBER, "10000",
               "checkpoints go by the size of the log (checkpoint-bytes), not by its entries"),
    _no_effect("max-snapshots", NUMBER, "5", "a checkpoint goes when the next one is complete"),
    _no_effect("max-wals", NUMBER, "5", "the log is removed up to the last complete checkpoint"),
    _no_effect("metrics", _choice("SET", "basic", "extensive"), "basic",
               "how long each gRPC method takes is not kept by method"),
    _no_effect("memory-mlock", BOOL, "false", "etcdlite does not map its data into memory"),
    _no_effect("backend-bbolt-freelist-type", TEXT, "map", _BBOLT),
    _no_effect("backend-batch-interval", DURATION, "100ms", _BBOLT),
    _no_effect("backend-batch-limit", NUMBER, "0", _BBOLT),
    _no_effect("bootstrap-defrag-threshold-megabytes", NUMBER, "0",
               "defragmentation runs by itself, a little at a time"),
    _no_effect("compaction-batch-limit", NUMBER, "1000", _PROCEEDS),
    _no_effect("compaction-sleep-interval", DURATION, "10ms", _PROCEEDS),
    _no_effect("initial-election-tick-advance", BOOL, "true",
               "the first election comes after one to two election timeouts in any case"),
    _no_effect("pre-vote", BOOL, "true", "pre-vote is always on"),
    _no_effect("raft-read-timeout", DURATION, "5s", _PEERS),
    _no_effect("raft-write-timeout", DURATION, "5s", _PEERS),
    _no_effect("snapshot-catchup-entries", NUMBER, "5000",
               "the log that is kept for slow members goes by its size, not by its entries"),
    _no_effect("downgrade-check-time", DURATION, "5s", "there is no version to go down to"),
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
    _refused("discovery", TEXT, "", _DISCOVERY),
    _refused("discovery-token", TEXT, "", _DISCOVERY),
    _refused("discovery-endpoints", LIST, "", _DISCOVERY),
    _refused("discovery-dial-timeout", DURATION, "2s", _DISCOVERY),
    _refused("discovery-request-timeout", DURATION, "5s", _DISCOVERY),
    _refused("discovery-keepalive-time", DURATION, "2s", _DISCOVERY),
    _refused("discovery-keepalive-timeout", DURATION, "6s", _DISCOVERY),
    _refused("discovery-insecure-transport", BOOL, "true", _DISCOVERY),
    _refused("discovery-insecure-skip-tls-verify", BOOL, "false", _DISCOVERY),
    _refused("discovery-cert", PATH, "", _DISCOVERY),
    _refused("discovery-key", PATH, "", _DISCOVERY),
    _refused("discovery-cacert", PATH, "", _DISCOVERY),
    _refused("discovery-user", TEXT, "", _DISCOVERY),
    _refused("discovery-password", TEXT, "", _DISCOVERY),
    _refused("discovery-fallback", TEXT, "exit", _DISCOVERY),
    _refused("discovery-proxy", TEXT, "", _DISCOVERY),
    _refused("cert-file", PATH, "", _TLS),
    _refused("key-file", PATH, "", _TLS),
    _refused("client-cert-auth", BOOL, "false", _TLS),
    _refused("client-cert-file", PATH, "", _TLS),
    _refused("client-key-file", PATH, "", _TLS),
    _refused("client-crl-file", PATH, "", _TLS),
    _refused("client-cert-allowed-hostname", TEXT, "", _TLS),
    _refused("trusted-ca-file", PATH, "", _TLS),
    _refused("auto-tls", BOOL, "false", _TLS),
    _refused("peer-cert-file", PATH, "", _TLS),
    _refused("peer-key-file", PATH, "", _TLS),
    _refused("peer-client-cert-auth", BOOL, "false", _TLS),
    _refused("peer-client-cert-file", PATH, "", _TLS),
    _refused("peer-client-key-file", PATH, "", _TLS),
    _refused("peer-trusted-ca-file", PATH, "", _TLS),
    _refused("peer-cert-allowed-cn", TEXT, "", _TLS),
    _refused("peer-cert-allowed-hostname", TEXT, "", _TLS),
    _refused("peer-auto-tls", BOOL, "false", _TLS),
    _refused("peer-crl-file", PATH, "", _TLS),
    _refused("peer-skip-client-san-verification", BOOL, "false", _TLS),
    _refused("self-signed-cert-validity", NUMBER, "1", _TLS),
    _refused("cipher-suites", LIST, "", _TLS),
    _refused("tls-min-version", TEXT, "TLS1.2", _TLS),
    _refused("tls-max-version", TEXT, "", _TLS),
    _refused("auth-token", TEXT, "simple", _AUTH),
    _refused("auth-token-ttl", NUMBER, "300", _AUTH),
    _refused("socket-reuse-port", BOOL, "false",
             "two servers on one port would answer with different data"),
    _refused("enable-pprof", BOOL, "false", "it serves the profiles of a program written in Go"),
    _refused("enable-distributed-tracing", BOOL, "false", _TRACING),
    _refused("enable-log-rotation", BOOL, "false",
             "use journald, or logrotate with copytruncate, for a log that rotates"),
    _refused("feature-gates", LIST, "", "etcdlite has no parts that gates could switch"),
    _refused("enable-v2", BOOL, "false", _NO_V2),
    _refused("proxy", TEXT, "off", _NO_V2 + ", nor a proxy for it"),
)  # fmt: skip
"""etcd's other flags, up to 3.7 and back to 3.4 where a unit file may still have them."""

FLAGS: dict[str, Flag] = {
    flag.name: flag for flag in (*(f for group in GROUPS.values() for f in group), *_OTHERS)
}
"""Every flag that can stand in a file or in the environment, by name."""

_COMMANDS = {
    "check-config": "Check the configuration, say what is wrong with it, and do not start.",
    "version": "Show the version.",
    "help": "Show this text.",
}

_SECRETS = ("discovery-user", "discovery-password", "discovery-token")
_EXPERIMENTAL = "experimental-"

_SERVICE_LINK = re.compile(
    r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?)$"
)
"""Variables that Kubernetes and Docker set for a service called "etcdlite" or "etcd"."""


# ---------------------------------------------------------------------------------------------
# Reading and checking.


class _Setting(NamedTuple):
    value: Any
    where: str
    shown: str
    """`where` with the value, to begin a line with."""


_Layer = dict[str, _Setting]


def _variable(prefix: str, name: str) -> str:
    return prefix + name.upper().replace("-", "_")


def _find(name: str) -> Flag | None:
    """The flag of this name, of its short form, or of the name it had while experimental."""
    if name == "config":
        name = "config-file"
    return FLAGS.get(name) or FLAGS.get(name.removeprefix(_EXPERIMENTAL))


def _did_you_mean(name: str, spell: Callable[[str], str], known: Sequence[str]) -> str:
    import difflib  # Rarely needed.

    close = difflib.get_close_matches(name, known, 1)
    return f", did you mean {spell(close[0])}?" if close else ""


def _text_of(value: Any, kind: Kind) -> str:
    """A TOML value in the notation of the command line. Raises ValueError on another type."""
    if isinstance(value, str):
        return value
    if kind.native is bool and isinstance(value, bool):
        return "true" if value else "false"
    if kind.native is int and type(value) is int:
        return str(value)
    if kind.native is list and isinstance(value, list):
        if all(isinstance(item, str) and "," not in item for item in value):
            return ",".join(value)
    wanted: dict[type | None, str] = {
        bool: "true or false",
        int: "a number or a string",
        list: "a list of strings without commas",
    }
    raise ValueError("wrong type; write " + wanted.get(kind.native, "a string"))


def _value_shown(raw: Any) -> str:
    if isinstance(raw, str):
        return quoted(raw, MAX_SHOWN_CHARS)
    try:
        return shorten(json.dumps(raw, default=str), MAX_SHOWN_CHARS)
    except ValueError:
        return "(a number with too many digits)"


class _Reader:
    """Collects the settings of each source, and what is wrong with them."""

    def __init__(self, has_member: Callable[[str], bool]) -> None:
        self._has_member = has_member
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._bad: set[str] = set()
        """Flags with a value that could not be read: no checks against their defaults."""

    def read_command_line(self, argv: Sequence[str]) -> tuple[str, _Layer]:
        """The action that was asked for, and the settings. As Go reads flags: one or two dashes,
        a boolean takes its value only behind `=`."""
        layer: _Layer = {}
        actions: set[str] = set()
        arguments = list(reversed(argv))
        while arguments:
            argument = arguments.pop()
            if not argument.startswith("-") or argument in ("-", "--"):
                self.problems.append(
                    f"unexpected argument {quoted(argument)} on the command line; "
                    "etcdlite takes flags only, as in --name=value"
                )
                continue
            name, equals, text = argument.removeprefix("-").removeprefix("-").partition("=")
            if name == "h":
                name = "help"
            flag = _find(name)
            if name in _COMMANDS:
                try:
                    if not equals or _truth(text):
                        actions.add(name)
                except ValueError as error:
                    self.problems.append(f"--{name}={quoted(text)}: {error}")
            elif flag is None:
                known = (*FLAGS, "config", *_COMMANDS)
                hint = _did_you_mean(name, "--{}".format, known) or "; see etcdlite --help"
                self.problems.append(f"unknown flag --{quoted(name)} on the command line{hint}")
            elif equals or flag.kind is BOOL or arguments:
                if not equals:
                    text = "true" if flag.kind is BOOL else arguments.pop()
                self._take(layer, flag, name, text, f"--{name}", "=")
            else:
                self.problems.append(f"--{name}: has no value; write --{name}={flag.kind.metavar}")
        for action in ("help", "version", "check-config"):
            if action in actions:
                return action, layer
        return "run", layer

    def read_environment(self, environ: Mapping[str, str], prefix: str) -> _Layer:
        """The variables with this prefix. As in etcd, an empty one counts as not set."""
        layer: _Layer = {}
        own = prefix == "ETCDLITE_"
        for variable in sorted(environ):
            text = environ[variable]
            rest = variable.removeprefix(prefix)
            # ETCDLITE_CTL_* belong to etcdlite-ctl.
            if rest == variable or not text or (own and rest.startswith("CTL_")):
                continue
            name = rest.lower().replace("_", "-")
            flag = _find(name)
            if flag is not None:
                self._take(layer, flag, name, text, variable, "=")
            elif not _SERVICE_LINK.match(rest):
                hint = _did_you_mean(name, lambda known: _variable(prefix, known), tuple(FLAGS))
                line = f"unknown variable {quoted(variable)} in the environment{hint}"
                if own:
                    self.problems.append(line if hint else line + "; remove it")
                else:
                    self.warnings.append(line + (" (it is ignored)" if hint else "; it is ignored"))
        return layer

    def read_file(self, path: str, must_exist: bool) -> _Layer:
        layer: _Layer = {}
        shown = quoted(path)
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            if must_exist:
                self.problems.append(f"{shown}: no such file; correct --config or create the file")
            return layer
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            self.problems.append(f"{shown}: cannot be read: {reason}; correct it or use --config")
            return layer
        if len(data) > MAX_FILE_BYTES:
            self.problems.append(f"{shown}: is larger than {MAX_FILE_BYTES} bytes; shorten it")
            return layer
        # A member without a file, and etcdlite-ctl, need not load it.
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        try:
            # A file that an editor on Windows saved begins with a byte order mark.
            content = tomllib.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            reason = str(error) if str(error).isprintable() else quoted(str(error))
            hint = 'write it as TOML, as in: name = "value"'
            if path.endswith((".yml", ".yaml")):
                hint = "etcd's YAML is not understood; the keys are the same, " + hint
            self.problems.append(f"{shown}: is not valid TOML: {reason}; {hint}")
            return layer
        for key, value in content.items():
            flag = _find(key)
            if flag is None:
                hint = _did_you_mean(key, str, tuple(FLAGS)) or "; remove it"
                self.problems.append(f"unknown key {quoted(key)} in {shown}{hint}")
            elif flag.name == "config-file":
                self.problems.append(f"{shown}: {key}: cannot stand in the file itself; remove it")
            else:
                self._take(layer, flag, key, value, f"{shown}: {key}", " = ")
        return layer

    def _take(
        self, layer: _Layer, flag: Flag, name: str, raw: Any, where: str, equals: str
    ) -> None:
        """Read one value into `layer`. `name` is the flag's as it was written."""
        value_shown = "<redacted>" if flag.name in _SECRETS else _value_shown(raw)
        shown = f"{where}{equals}{value_shown}"
        if name.startswith(_EXPERIMENTAL):
            self.warnings.append(f"{where}: the flag is no longer experimental; write {flag.name}")
        try:
            value = flag.kind.parse(_text_of(raw, flag.kind))
        except ValueError as error:
            self._bad.add(flag.name)
            self.problems.append(f"{shown}: {error}")
            return
        layer[flag.name] = _Setting(value, where, shown)

    def resolve(self, settings: _Layer) -> Config:
        """The configuration, with problems and warnings about what was set."""
        for flag in _OTHERS:
            setting = settings.get(flag.name)
            if setting is None or setting.value == flag.kind.parse(flag.default):
                continue
            if flag.status == REFUSED:
                self.problems.append(f"{setting.shown}: not supported: {flag.text}; remove it")
            else:
                self.warnings.append(f"{setting.shown}: no effect: {flag.text}")

        def value(name: str) -> Any:
            if name in settings:
                return settings[name].value
            return FLAGS[name].kind.parse(FLAGS[name].default)

        def shown(name: str) -> str:
            return settings[name].shown if name in settings else f"{name}={FLAGS[name].default}"

        name = value("name")
        heartbeat_ms, election_ms = value("heartbeat-interval"), value("election-timeout")
        readable = not self._bad & {"heartbeat-interval", "election-timeout"}
        if readable and election_ms < MIN_HEARTBEATS_PER_ELECTION * heartbeat_ms:
            self.problems.append(
                f"{shown('election-timeout')}: less than {MIN_HEARTBEATS_PER_ELECTION} times the "
                f"heartbeat interval ({shown('heartbeat-interval')}); raise it or lower the other"
            )
        listen = value("listen-client-urls")
        peer_urls = value("initial-advertise-peer-urls")
        data_dir = (value("data-dir") or FLAGS["data-dir"].default).replace("${name}", name)
        initial_cluster = self._initial_cluster(settings, name, peer_urls, data_dir)
        retention_s, retention_revisions = self._retention(
            settings, value("auto-compaction-mode"), value("auto-compaction-retention")
        )
        if value("discovery-srv-name") and not value("discovery-srv"):
            self.warnings.append(f"{shown('discovery-srv-name')}: no effect without discovery-srv")
        quota = value("quota-backend-bytes")
        if value("max-request-bytes") > RECOMMENDED_MAX_REQUEST_BYTES:
            self.warnings.append(
                f"{shown('max-request-bytes')}: more than the recommended "
                f"{RECOMMENDED_MAX_REQUEST_BYTES}: one such request delays all others"
            )
        if value("unsafe-no-fsync"):
            self.warnings.append(
                f"{shown('unsafe-no-fsync')}: ACKNOWLEDGED WRITES WILL BE LOST, and the data may "
                "be damaged, when this machine crashes or loses power; use it for tests only"
            )
        return Config(
            name=name,
            data_dir=data_dir,
            wal_dir=value("wal-dir"),
            listen_client_urls=listen,
            advertise_client_urls=self._advertise(settings, listen),
            listen_peer_urls=value("listen-peer-urls"),
            initial_advertise_peer_urls=peer_urls,
            initial_cluster=initial_cluster,
            initial_cluster_state=value("initial-cluster-state"),
            initial_cluster_token=value("initial-cluster-token"),
            discovery_srv=value("discovery-srv"),
            discovery_srv_name=value("discovery-srv-name"),
            force_new_cluster=value("force-new-cluster"),
            max_learners=value("max-learners"),
            strict_reconfig_check=value("strict-reconfig-check"),
            corrupt_check_time_s=value("corrupt-check-time"),
            compact_hash_check_time_s=value("compact-hash-check-time"),
            initial_corrupt_check=value("initial-corrupt-check"),
            heartbeat_interval_ms=heartbeat_ms,
            election_timeout_ms=election_ms,
            quota_backend_bytes=quota if quota > 0 else 0 if quota < 0 else DEFAULT_QUOTA_BYTES,
            max_txn_ops=value("max-txn-ops"),
            max_request_bytes=value("max-request-bytes"),
            max_concurrent_streams=value("max-concurrent-streams"),
            max_connections=value("max-connections"),
            listen_client_http_urls=value("listen-client-http-urls"),
            listen_metrics_urls=value("listen-metrics-urls"),
            enable_grpc_gateway=value("enable-grpc-gateway"),
            cors=value("cors"),
            host_whitelist=value("host-whitelist"),
            grpc_keepalive_min_time_s=value("grpc-keepalive-min-time"),
            grpc_keepalive_interval_s=value("grpc-keepalive-interval"),
            grpc_keepalive_timeout_s=value("grpc-keepalive-timeout"),
            auto_compaction_mode=value("auto-compaction-mode"),
            auto_compaction_retention_s=retention_s,
            auto_compaction_retention_revisions=retention_revisions,
            watch_progress_notify_interval_s=value("watch-progress-notify-interval"),
            warning_apply_duration_s=value("warning-apply-duration"),
            warning_unary_request_duration_s=value("warning-unary-request-duration"),
            log_level=value("log-level"),
            log_format=value("log-format"),
            log_outputs=self._log_outputs(settings, value("log-outputs")),
            unsafe_no_fsync=value("unsafe-no-fsync"),
            checkpoint_bytes=value("checkpoint-bytes"),
            segment_bytes=value("segment-bytes"),
            wal_segment_bytes=value("wal-segment-bytes"),
            warnings=tuple(self.warnings),
            sources={name: setting.where for name, setting in settings.items()},
        )

    def _advertise(self, settings: _Layer, listen: tuple[str, ...]) -> tuple[str, ...]:
        """Where clients are told to go: unless set, where the member listens."""
        setting = settings.get("advertise-client-urls")
        if setting is not None and setting.value:
            return setting.value
        if not self._bad & {"listen-client-urls", "advertise-client-urls"}:
            for url in listen:
                host = host_port(url)[0]
                if host != "localhost" and ipaddress.ip_address(host).is_unspecified:
                    self.problems.append(
                        f"{settings['listen-client-urls'].shown}: not an address that a "
                        "client could dial; set advertise-client-urls, as in http://HOST:PORT"
                    )
                    break
        return listen

    def _initial_cluster(
        self, settings: _Layer, name: str, peer_urls: tuple[str, ...], data_dir: str
    ) -> tuple[tuple[str, str], ...]:
        """The members: this one must be among them, at the URLs that it advertises."""
        alone = tuple((name, url) for url in peer_urls)
        setting = settings.get("initial-cluster")
        default = FLAGS["initial-cluster"].kind.parse(FLAGS["initial-cluster"].default)
        if setting is None or setting.value in ((), default):
            return alone
        if self._bad & {"name", "initial-advertise-peer-urls"}:
            return alone
        if settings.get("discovery-srv") and settings["discovery-srv"].value:
            self.problems.append(
                f"{setting.shown}: conflicts with {settings['discovery-srv'].shown}; set one of "
                "initial-cluster and discovery-srv"
            )
            return alone
        try:
            return tuple(parse_initial_cluster(setting.value, name, peer_urls))
        except ValueError as error:
            if self._has_member(data_dir):
                self.warnings.append(
                    f"{setting.shown}: not used, this member has its data: {error}"
                )
            else:
                self.problems.append(f"{setting.shown}: {error}")
            return alone

    def _retention(self, settings: _Layer, mode: str, text: str) -> tuple[float, int]:
        """What automatic compaction keeps: (seconds, revisions), one of them 0."""
        if "auto-compaction-mode" in self._bad:
            return 0.0, 0
        digits = re.fullmatch(r"\d{1,18}", text, re.ASCII) is not None
        try:
            if mode == "revision":
                if not digits:
                    raise ValueError("not a number of revisions; write for example 1000")
                return 0.0, int(text)
            return _seconds(text + "h" if digits else text), 0
        except ValueError as error:
            shown = settings["auto-compaction-retention"].shown
            self.problems.append(f"{shown}: {error} (auto-compaction-mode is {mode})")
            return 0.0, 0

    def _log_outputs(self, settings: _Layer, outputs: tuple[str, ...]) -> tuple[str, ...]:
        if not all(outputs) or not outputs:
            self.problems.append(
                f"{settings['log-outputs'].shown}: names nothing; write stderr, stdout or a file"
            )
        stderr = ("default", "systemd/journal")
        named = ("stderr" if output in stderr else output for output in outputs)
        return tuple(dict.fromkeys(named))
