"""The configuration: `load` reads the flags (flags.py) from their sources and checks them.

A flag can be set on the command line (`--name x`, `--name=x`, `-name x`), in the environment
(`ETCDLITE_NAME`, `ETCD_NAME`) and in a TOML file (`name = "x"`). The command line overrides the
environment, which overrides the file; `ETCDLITE_` overrides `ETCD_`.

Setting a refused flag is a problem; setting one without effect is a warning. A flag that is set to
its default is neither.

Invariants
- All problems are found and raised together, one line each, which says where the value came from,
  what is wrong, and what to do.
- No setting is ignored silently, and nothing is guessed from a misspelt name.
- The value of a flag that holds a secret is not shown.
- `load` reads no file but the configuration file, and resolves no host name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from etcdlite import flags, sealing
from etcdlite.cipher_suites import OF_TLS_1_3
from etcdlite.flags import Flag
from etcdlite.log import quoted, shorten
from etcdlite.notation import load_toml, toml_text
from etcdlite.permissions import user_name
from etcdlite.private_file import PrivateFileError
from etcdlite.urls import collide, host_port, is_secure, is_wildcard, parse_initial_cluster

MAX_FILE_BYTES = 1 << 20
"""A larger configuration file is refused."""

DEFAULT_QUOTA_BYTES = 2 << 30
"""The meaning of `quota-backend-bytes = 0`, as in etcd."""

MIN_HEARTBEATS_PER_ELECTION = 5
"""As in etcd: a follower should miss several heartbeats before it calls an election."""

RECOMMENDED_MAX_REQUEST_BYTES = 10 << 20
"""A larger request occupies the loop for long; etcd warns at the same size."""

MAX_SHOWN_CHARS = 100
"""Of a value, in a problem or a warning."""

_LISTEN_FLAGS = (
    "listen-client-urls",
    "listen-peer-urls",
    "listen-client-http-urls",
    "listen-metrics-urls",
)
_CLUSTER_FLAGS = {
    "listen-peer-urls",
    "initial-cluster",
    "initial-advertise-peer-urls",
    "initial-cluster-state",
    "discovery-srv",
}

_SERVICE_LINK = re.compile(
    r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?)$"
)
"""Variables that Kubernetes and Docker set for a service called "etcdlite" or "etcd"."""

_NO_FLAGS = frozenset({"CLIENT_DEBUG", "UNSUPPORTED_ARCH", "VERIFY"})
"""ETCD_ variables that etcd and its clients read, and that are no flags: a log level of the client,
leave to run on another architecture, and self-checks for tests. None of them changes anything."""

_NO_SOURCES: Mapping[str, str] = {}


class Config(NamedTuple):
    """A checked configuration. Attributes are the implemented flags; units are in the names."""

    name: str
    data_dir: str
    wal_dir: str
    """Empty: inside the data directory."""
    encryption_key_file: str
    """Empty: what is written to disk is plain."""
    listen_client_urls: tuple[str, ...]
    """Port 0 means any free port."""
    advertise_client_urls: tuple[str, ...]
    listen_peer_urls: tuple[str, ...]
    initial_advertise_peer_urls: tuple[str, ...]
    initial_cluster: tuple[tuple[str, str], ...]
    """(name, peer URL) of all members; one with several URLs appears several times. With
    `discovery_srv` it is this member alone, and DNS knows the others."""
    initial_cluster_state: str
    """"new" or "existing"."""
    initial_cluster_token: str
    discovery_srv: str
    """The domain whose SRV records name the members; empty: initial_cluster does."""
    discovery_srv_name: str
    force_new_cluster: bool
    max_learners: int
    strict_reconfig_check: bool
    peer_address_check: bool
    peer_secret_file: str
    """Empty: connections between members have no shared secret."""
    corrupt_check_time_s: float
    """Time between comparisons of the members; 0: never."""
    compact_hash_check_time_s: float
    """Members are compared this soon after a compaction; 0: never."""
    initial_corrupt_check: bool
    heartbeat_interval_ms: int
    election_timeout_ms: int
    quota_backend_bytes: int
    """0: no quota. (In the file, 0 is the default of 2 GiB and a negative number means none.)"""
    max_txn_ops: int
    max_request_bytes: int
    max_concurrent_streams: int
    client_secret_file: str
    """Empty: clients of the native protocol have no shared secret."""
    max_connections: int
    """Of clients."""
    max_connections_per_address: int
    """0: a quarter of `max_connections`, without a limit for loopback addresses."""
    memory_limit: int
    """Bytes; 0: `memory.default_limit_bytes`."""
    socket_reuse_port: bool
    listen_client_http_urls: tuple[str, ...]
    listen_metrics_urls: tuple[str, ...]
    enable_grpc_gateway: bool
    cors: tuple[str, ...]
    host_whitelist: tuple[str, ...]
    grpc_keepalive_min_time_s: float
    grpc_keepalive_interval_s: float
    grpc_keepalive_timeout_s: float
    cert_file: str
    """Empty: not set, as for the other files."""
    key_file: str
    client_cert_auth: bool
    trusted_ca_file: str
    client_crl_file: str
    client_cert_allowed_hostname: tuple[str, ...]
    auto_tls: bool
    peer_cert_file: str
    peer_key_file: str
    peer_client_cert_file: str
    peer_client_key_file: str
    peer_client_cert_auth: bool
    peer_trusted_ca_file: str
    peer_crl_file: str
    peer_cert_allowed_cn: tuple[str, ...]
    peer_cert_allowed_hostname: tuple[str, ...]
    peer_skip_client_san_verification: bool
    peer_auto_tls: bool
    cipher_suites: tuple[str, ...]
    """Of TLS 1.2, by their IANA names; empty: the default."""
    tls_min_version: str
    """"TLS1.2", "TLS1.3" or empty, as `tls_max_version`."""
    tls_max_version: str
    self_signed_cert_validity: int
    """Years."""
    auto_compaction_retention_s: float
    """History to keep in mode "periodic"; 0: no automatic compaction by time."""
    auto_compaction_retention_revisions: int
    """Revisions to keep in mode "revision"; 0: no automatic compaction by number."""
    auth_token: Mapping[str, str]
    """The options of JSON Web Tokens; empty: simple tokens."""
    auth_token_ttl: int
    """Seconds."""
    watch_progress_notify_interval_s: float
    warning_apply_duration_s: float
    warning_unary_request_duration_s: float
    log_level: str
    log_format: str
    log_outputs: tuple[str, ...]
    """"stderr", "stdout" or paths of files."""
    unsafe_no_fsync: bool
    backup_status_file: str
    """Empty: none."""
    checkpoint_bytes: int
    segment_bytes: int
    wal_segment_bytes: int

    action: str = "run"
    """"run", "check-config", "help" or "version". For the last two only the command line was read,
    and the attributes above are the defaults."""
    warnings: tuple[str, ...] = ()
    """One line each, to be shown as it is."""
    sources: Mapping[str, str] = _NO_SOURCES
    """Where each flag was set, by its name: "--name", "ETCD_NAME", "/etc/etcdlite.toml: name".
    A flag that is missing here has its default."""

    @property
    def is_surely_alone(self) -> bool:
        """Nothing was set about a cluster, so no other member needs the port for members."""
        return _CLUSTER_FLAGS.isdisjoint(self.sources)

    @property
    def listeners(self) -> list[tuple[str, str]]:
        """The URLs to listen on, each with its flag."""
        return [
            (flag, url)
            for flag in _LISTEN_FLAGS
            for url in getattr(self, flags.FLAGS[flag].attribute)
        ]

    @property
    def own_files(self) -> set[str]:
        """Paths of the configuration file and the logs, which may be in the data directory."""
        # Sources are written "PATH: KEY" if they are the configuration file.
        files = {where.rpartition(": ")[0] for where in self.sources.values()}
        return files.union(self.log_outputs)


class ConfigError(Exception):
    """The configuration cannot be used: one line for each of its `problems`. The `warnings` are
    those of the part that could be read."""

    def __init__(self, problems: Sequence[str], warnings: Sequence[str] = ()) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)
        self.warnings = list(warnings)


def load(
    argv: Sequence[str],
    environ: Mapping[str, str],
    default_file: str = flags.DEFAULT_FILE,
    has_member: Callable[[str], bool] = lambda data_dir: False,
) -> Config:
    """The configuration of a server started with `argv` (without the program's name).

    Reads the file named by --config; if none is named, `default_file`, if it exists. `has_member`
    tells whether a data directory holds a member: then `initial-cluster`, which is used at the
    first start only, need not fit. Raises ConfigError."""
    reader = _Reader()
    action, on_command_line = reader.read_command_line(argv)
    if action in ("help", "version"):
        return _Resolver(reader, _DEFAULTS, has_member).config()._replace(action=action)
    layers = [reader.read_environment(environ, prefix) for prefix in ("ETCD_", "ETCDLITE_")]
    layers.append(on_command_line)
    above_file = {name: setting for layer in layers for name, setting in layer.items()}
    named = above_file.get("config-file", _DEFAULTS["config-file"])
    in_file = reader.read_file(named.value or default_file, named.where if named.value else "")
    config = _Resolver(reader, {**_DEFAULTS, **in_file, **above_file}, has_member).config()
    if reader.problems:
        raise ConfigError(reader.problems, reader.warnings)
    return config._replace(action=action)


def check_files(config: Config) -> list[str]:
    """The problems that the start would have with files and directories, one line each."""
    problems = []
    for output in config.log_outputs:
        if output not in ("stderr", "stdout") and (why := _cannot_write(output)):
            problems.append(f"log-outputs: {quoted(output)}: {why}; name a writable file")
    problems += _secret_problems(config)
    for name, path in (("data-dir", config.data_dir), ("wal-dir", config.wal_dir)):
        if path and (why := _cannot_fill(path)):
            problems.append(f"{name}: {quoted(path)}: {why}; give a writable directory")
    if config.encryption_key_file:
        try:
            sealing.read(config.encryption_key_file)
        except sealing.KeyFileError as failure:
            problems.append(str(failure))
    return problems


def _secret_problems(config: Config) -> list[str]:
    from etcdlite import secret_file  # Rarely needed.

    problems = []
    found = []
    for name, path in (
        ("peer-secret-file", config.peer_secret_file),
        ("client-secret-file", config.client_secret_file),
    ):
        try:
            found.append(secret_file.read(path) if path else ())
        except PrivateFileError as failure:
            problems.append(f"{name}: {failure}")
    if not problems:
        try:
            secret_file.check_apart(*found)
        except PrivateFileError as failure:
            problems.append(str(failure))
    return problems


def _cannot_write(path: str) -> str:
    """Why a file cannot be appended to, or created; else empty."""
    if os.path.isdir(path):
        return "is a directory"
    if os.path.exists(path):
        return "" if os.access(path, os.W_OK) else "cannot be written by this user"
    return _cannot_fill(os.path.dirname(path) or ".", must_exist=True)


def _cannot_fill(path: str, must_exist: bool = False) -> str:
    """Why nothing can be created in a directory, or in its place; else empty."""
    if os.path.isdir(path):
        return "" if os.access(path, os.W_OK | os.X_OK) else "cannot be written by this user"
    if os.path.lexists(path):
        return f"{quoted(path)} is not a directory"
    if must_exist:
        return f"there is no directory {quoted(path)}"
    return _cannot_fill(os.path.dirname(os.path.abspath(path)))


# Reading.


class _Setting(NamedTuple):
    value: Any
    where: str
    shown: str
    """`where` with the value: the beginning of a problem or a warning."""


_Layer = dict[str, _Setting]

_DEFAULTS: _Layer = {
    name: _Setting(flag.kind.parse(flag.default), "", f"{name}={flag.default}")
    for name, flag in flags.FLAGS.items()
}


def _value_shown(raw: Any) -> str:
    if isinstance(raw, str):
        return quoted(raw, MAX_SHOWN_CHARS)
    try:
        return shorten(json.dumps(raw, default=str), MAX_SHOWN_CHARS)
    except ValueError:
        return "(a number with too many digits)"


class _Reader:
    """Reads the settings of each source, and collects problems and warnings."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.bad: set[str] = set()
        """Flags with a value or a name that cannot be read. Checks that need them are skipped."""

    def read_command_line(self, argv: Sequence[str]) -> tuple[str, _Layer]:
        """The action, and the settings. The syntax is that of Go's flag package: one or two
        dashes, and a boolean takes its value only after `=`."""
        layer: _Layer = {}
        actions: set[str] = set()
        arguments = list(reversed(argv))
        while arguments:
            argument = arguments.pop()
            if argument in ("gateway", "grpc-proxy"):
                own = f"there is no etcdlite {argument}; the one of etcd works in front of etcdlite"
                self.problems.append(f"{own}: etcd {argument} start --endpoints=HOST:PORT,...")
                break
            if not argument.startswith("-") or argument in ("-", "--"):
                self.problems.append(
                    f"unexpected argument {quoted(argument)} on the command line; "
                    "etcdlite takes flags only, as in --name=value"
                )
                continue
            name, equals, text = argument.removeprefix("-").removeprefix("-").partition("=")
            if name == "h":
                name = "help"
            flag = flags.find(name)
            if name in flags.ACTIONS:
                try:
                    if not equals or flags.parse_truth(text):
                        actions.add(name)
                except ValueError as error:
                    self.problems.append(f"--{name}={quoted(text)}: {error}")
            elif flag is None:
                hint = self._did_you_mean(name, "--{}".format, "config", *flags.ACTIONS)
                hint = hint or "; see etcdlite --help"
                self.problems.append(f"unknown flag --{quoted(name)} on the command line{hint}")
            elif equals or flag.kind is flags.BOOL or arguments:
                if not equals:
                    text = "true" if flag.kind is flags.BOOL else arguments.pop()
                self._take(layer, flag, name, text, f"--{name}", "=")
            else:
                self.problems.append(f"--{name}: has no value; write --{name}={flag.kind.metavar}")
        for action in ("help", "version", "check-config"):
            if action in actions:
                return action, layer
        return "run", layer

    def read_environment(self, environ: Mapping[str, str], prefix: str) -> _Layer:
        """The variables with this prefix. As in etcd, an empty one counts as unset."""
        layer: _Layer = {}
        own = prefix == "ETCDLITE_"
        for variable in sorted(environ):
            text = environ[variable]
            rest = variable.removeprefix(prefix)
            # ETCDLITE_CTL_* are for etcdlite-ctl.
            if rest == variable or not text or (own and rest.startswith("CTL_")):
                continue
            name = rest.lower().replace("_", "-")
            flag = flags.find(name)
            if flag is not None:
                self._take(layer, flag, name, text, variable, "=")
            elif not _SERVICE_LINK.match(rest) and (own or rest not in _NO_FLAGS):
                hint = self._did_you_mean(name, lambda known: flags.variable_name(prefix, known))
                line = f"unknown variable {quoted(variable)} in the environment{hint}"
                if own:
                    self.problems.append(line if hint else line + "; remove it")
                else:
                    self.warnings.append(line + (" (it is ignored)" if hint else "; it is ignored"))
        return layer

    def read_file(self, path: str, named_by: str) -> _Layer:
        """The settings in a file. `named_by`: where its path was set; empty: it may be missing."""
        layer: _Layer = {}
        shown = quoted(path)
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            if named_by:
                self.problems.append(f"{shown}: no such file; correct {named_by} or create it")
            return layer
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            if isinstance(error, PermissionError):
                reason = f"{reason} for user {user_name(os.geteuid())}"
            self.problems.append(f"{shown}: cannot be read: {reason}; correct it or use --config")
            return layer
        if len(data) > MAX_FILE_BYTES:
            self.problems.append(f"{shown}: is larger than {MAX_FILE_BYTES} bytes; shorten it")
            return layer
        try:
            content = load_toml(data)
        except (ValueError, RecursionError) as error:
            reason = str(error) if str(error).isprintable() else quoted(str(error))
            hint = 'write it as TOML, as in: name = "value"'
            if re.search(rb"(?m)^[\w-]+:(\s|$)", data):
                hint = f"etcd's YAML is not understood (docs/configuration.md has its keys); {hint}"
            self.problems.append(f"{shown}: is not valid TOML: {reason}; {hint}")
            return layer
        for key, value in content.items():
            flag = flags.find(key)
            if isinstance(value, dict):
                why = f"{quoted(key)} is a section or a table, but there are none"
                self.problems.append(f"{shown}: {why}; write each setting as: name = value")
            elif flag is None:
                hint = self._did_you_mean(key, str) or "; remove it"
                self.problems.append(f"unknown key {quoted(key)} in {shown}{hint}")
            elif flag.name == "config-file":
                self.problems.append(f"{shown}: {key}: cannot stand in the file itself; remove it")
            else:
                self._take(layer, flag, key, value, f"{shown}: {key}", " = ")
        return layer

    def _did_you_mean(self, name: str, spell: Callable[[str], str], *others: str) -> str:
        import difflib  # Rarely needed.

        close = difflib.get_close_matches(name, (*flags.FLAGS, *others), 1)
        self.bad.update(close)
        return f", did you mean {spell(close[0])}?" if close else ""

    def _take(
        self, layer: _Layer, flag: Flag, name: str, raw: Any, where: str, equals: str
    ) -> None:
        """Read one value into `layer`. `name` is the flag's as it was written."""
        value_shown = "<redacted>" if flag.name in flags.SECRETS else _value_shown(raw)
        shown = f"{where}{equals}{value_shown}"
        if name.startswith(flags.EXPERIMENTAL):
            self.warnings.append(f"{where}: the flag is no longer experimental; write {flag.name}")
        try:
            value = flag.kind.parse(toml_text(raw, flag.kind.native))
        except ValueError as error:
            self.bad.add(flag.name)
            self.problems.append(f"{shown}: {error}")
            return
        layer[flag.name] = _Setting(value, where, shown)
        if flag.name == "feature-gates":
            self._take_gates(layer, value, where)

    def _take_gates(self, layer: _Layer, gates: Mapping[str, bool], where: str) -> None:
        """Set the flags that feature gates stand for, unless the same source sets them."""
        for gate, value in gates.items():
            shown = f"{where}: {quoted(gate, MAX_SHOWN_CHARS)}={str(value).lower()}"
            if gate in flags.GATES_FLAGS:
                layer.setdefault(flags.GATES_FLAGS[gate], _Setting(value, where, shown))
            else:
                self.warnings.append(f"{shown}: unknown feature gate; it is ignored")


class _Resolver:
    """Makes a `Config` of the settings. Problems and warnings go to the reader's."""

    def __init__(
        self, reader: _Reader, settings: _Layer, has_member: Callable[[str], bool]
    ) -> None:
        self._settings = settings
        self._has_member = has_member
        self._problem = reader.problems.append
        self._warn = reader.warnings.append
        self._warnings = reader.warnings
        self._bad = reader.bad

    def _value(self, name: str) -> Any:
        return self._settings[name].value

    def _shown(self, name: str) -> str:
        return self._settings[name].shown

    def config(self) -> Config:
        self._check_others()
        self._check_values()
        values = {
            flag.attribute: self._value(flag.name)
            for flag in flags.FLAGS.values()
            if flag.status == flags.IMPLEMENTED
        }
        compaction = ("auto_compaction_mode", "auto_compaction_retention")
        for name in ("config_file", "feature_gates", *compaction):
            del values[name]
        peer_urls = self._advertised_to_peers()
        retention_s, retention_revisions = self._retention()
        quota = self._value("quota-backend-bytes")
        values |= {
            "data_dir": self._data_dir(),
            "advertise_client_urls": self._advertised_to_clients(),
            "initial_advertise_peer_urls": peer_urls,
            "initial_cluster": self._initial_cluster(peer_urls),
            "auto_compaction_retention_s": retention_s,
            "auto_compaction_retention_revisions": retention_revisions,
            "quota_backend_bytes": max(0, quota) if quota else DEFAULT_QUOTA_BYTES,
            "log_outputs": self._log_outputs(),
        }
        sources = {name: one.where for name, one in self._settings.items() if one.where}
        config = Config(**values, sources=sources)
        self._check_listeners(config)
        self._check_files_of_tls()
        self._check_tls("", (*_LISTEN_FLAGS[:1], *_LISTEN_FLAGS[2:]))
        self._check_tls("peer-", _LISTEN_FLAGS[1:2])
        return config._replace(warnings=tuple(self._warnings))

    def _check_others(self) -> None:
        for flag in flags.OTHERS:
            setting = self._settings[flag.name]
            if setting.value == _DEFAULTS[flag.name].value:
                continue
            if flag.status == flags.REFUSED:
                self._problem(f"{setting.shown}: not supported: {flag.text}; remove it")
            else:
                self._warn(f"{setting.shown}: no effect: {flag.text}")

    def _check_values(self) -> None:
        heartbeat_ms = self._value("heartbeat-interval")
        is_readable = not self._bad & {"heartbeat-interval", "election-timeout"}
        least_ms = MIN_HEARTBEATS_PER_ELECTION * heartbeat_ms
        if is_readable and self._value("election-timeout") < least_ms:
            self._problem(
                f"{self._shown('election-timeout')}: less than {MIN_HEARTBEATS_PER_ELECTION} "
                f"times the heartbeat interval ({self._shown('heartbeat-interval')}); raise it or "
                "lower the other"
            )
        if self._value("discovery-srv-name") and not self._value("discovery-srv"):
            self._warn(f"{self._shown('discovery-srv-name')}: no effect without discovery-srv")
        if self._value("max-request-bytes") > RECOMMENDED_MAX_REQUEST_BYTES:
            self._warn(
                f"{self._shown('max-request-bytes')}: more than the recommended "
                f"{RECOMMENDED_MAX_REQUEST_BYTES}: one such request delays all others"
            )
        if self._value("force-new-cluster"):
            self._warn(
                f"{self._shown('force-new-cluster')}: each start makes this member a cluster of "
                "its own, unless it hears a leader; remove it when that is done"
            )
        if self._value("unsafe-no-fsync"):
            self._warn(
                f"{self._shown('unsafe-no-fsync')}: ACKNOWLEDGED WRITES WILL BE LOST, and the "
                "data may be damaged, when this machine crashes or loses power; for tests only"
            )

    def _check_listeners(self, config: Config) -> None:
        """One address serves one purpose."""
        if self._bad.intersection(_LISTEN_FLAGS):
            return
        for position, (flag, url) in enumerate(config.listeners):
            for other_flag, other in config.listeners[:position]:
                # A member that is surely alone runs without its default port for members.
                is_of_members = "listen-peer-urls" in (flag, other_flag)
                is_optional = is_of_members and config.is_surely_alone
                if collide(url, other) and not is_optional:
                    self._problem(
                        f"{self._shown(flag)}: {url} is also an address of {other_flag} ({other}); "
                        "give each its own address or port"
                    )

    def _check_files_of_tls(self) -> None:
        """A certificate needs its key, and settings that exclude each other are not both set."""
        for prefix in ("", "peer-", "peer-client-"):
            pair = (f"{prefix}cert-file", f"{prefix}key-file")
            for one, other in (pair, pair[::-1]):
                if self._value(one) and not self._value(other) and other not in self._bad:
                    self._problem(f"{self._shown(one)}: it needs {other}; set both")
        names = ("peer-cert-allowed-cn", "peer-cert-allowed-hostname")
        if all(map(self._value, names)):
            self._problem(f"{self._shown(names[0])}: excludes {names[1]}; set one of them")
        least, most = self._value("tls-min-version"), self._value("tls-max-version")
        if most and least > most:
            self._problem(
                f"{self._shown('tls-min-version')}: newer than tls-max-version, {most}; lower it"
            )
        suites = self._value("cipher-suites")
        if suites and (least == "TLS1.3" or OF_TLS_1_3.issuperset(suites)):
            self._problem(
                f"{self._shown('cipher-suites')}: the suites of TLS 1.3 cannot be chosen, all are "
                "on; list suites of TLS 1.2, or remove it and set tls-min-version to TLS1.3"
            )

    def _check_tls(self, prefix: str, listen_flags: Sequence[str]) -> None:
        """The URLs that are listened on fit the certificates for them."""
        listened = [(flag, url) for flag in listen_flags for url in self._value(flag)]
        secure = [pair for pair in listened if is_secure(pair[1])]
        names = ("cert-file", "key-file", "auto-tls", "client-cert-auth")
        cert, key, auto, auth = (f"{prefix}{name}" for name in names)
        if self._bad.intersection((cert, key, auto, auth, *listen_flags)):
            return
        has_files = self._value(cert) and self._value(key)
        if has_files and self._value(auto):
            self._warn(f"{self._shown(auto)}: no effect, {cert} is set")
        for flag, url in secure:
            if not has_files and not self._value(auto):
                self._problem(
                    f"{self._shown(flag)}: {quoted(url)} needs a certificate: set {cert} and {key} "
                    f"('etcdlite-ctl cert' makes them), or {auto}, or write http://"
                )
        for flag, url in listened:
            for name in () if is_secure(url) else (cert, auth) if secure else (cert,):
                if self._value(name):
                    self._warn(f"{self._shown(name)}: no effect on {quoted(url)} of {flag}")
        secret, listen = f"{prefix or 'client-'}secret-file", listen_flags[0]
        if any(flag == listen for flag, _ in secure) and self._value(secret):
            # A side that comes through TLS would not have to know the secret.
            whose = "between members" if prefix else "of clients"
            self._problem(
                f"{self._shown(secret)}: excludes https:// in {listen}; protect the connections "
                f"{whose} by one of the two"
            )
        if not secure and self._value(auto):
            self._warn(f"{self._shown(auto)}: no effect without a URL that begins with https://")
        if not secure and self._value(auth):
            self._problem(
                f"{self._shown(auth)}: no URL of {' or '.join(listen_flags)} begins with "
                "https://, so nobody would be checked; write https://"
            )

    def _advertised_to_clients(self) -> tuple[str, ...]:
        """The URLs for clients: unless set, those that are listened on."""
        listened: tuple[str, ...] = self._value("listen-client-urls")
        urls: tuple[str, ...] = self._value("advertise-client-urls")
        if urls:
            has_free_port = any(host_port(url)[1] == 0 for url in listened)
            self._check_dialable("advertise-client-urls", urls, may_be_0=has_free_port)
            return urls
        is_readable = not self._bad & {"listen-client-urls", "advertise-client-urls"}
        if is_readable and any(map(is_wildcard, listened)):
            self._problem(
                f"{self._shown('listen-client-urls')}: not an address that a client could dial; "
                "set advertise-client-urls, as in http://HOST:PORT"
            )
        return listened

    def _advertised_to_peers(self) -> tuple[str, ...]:
        """The URLs for members: unless set, those that are listened on. Where these cannot be
        dialled it is localhost, which is enough for a member that is alone."""
        urls: tuple[str, ...] = self._value("initial-advertise-peer-urls")
        if urls:
            self._check_dialable("initial-advertise-peer-urls", urls, may_be_0=False)
            return urls
        found = {}
        for url in self._value("listen-peer-urls"):
            port = host_port(url)[1]
            if is_wildcard(url) or port == 0:
                shown, url = url, f"{url.partition(':')[0]}://localhost:{port or 2380}"
                if port:
                    self._warn(
                        f"{self._shown('listen-peer-urls')}: other members cannot dial {shown}, "
                        f"so this one advertises {url}; set initial-advertise-peer-urls"
                    )
            found[url] = True
        return tuple(found)

    def _check_dialable(self, name: str, urls: Sequence[str], may_be_0: bool) -> None:
        for url in urls:
            if host_port(url)[1] == 0 and not may_be_0:
                self._problem(
                    f"{self._shown(name)}: {quoted(url)}: no port that can be dialled; write one "
                    "from 1 to 65535"
                )
            elif is_wildcard(url):
                self._warn(
                    f"{self._shown(name)}: {quoted(url)} is not an address that others can dial; "
                    "write the name or the address of this machine"
                )

    def _initial_cluster(self, peer_urls: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
        """The members: this one must be among them, at the URLs that it advertises."""
        name = self._value("name")
        alone = tuple((name, url) for url in peer_urls)
        setting = self._settings["initial-cluster"]
        if setting.value in ((), _DEFAULTS["initial-cluster"].value):
            return alone
        if self._bad & {"name", "initial-advertise-peer-urls", "listen-peer-urls"}:
            return alone
        if self._value("discovery-srv"):
            self._problem(
                f"{setting.shown}: conflicts with {self._shown('discovery-srv')}; set one of "
                "initial-cluster and discovery-srv"
            )
            return alone
        try:
            joins = self._value("initial-cluster-state") == "existing"
            return tuple(parse_initial_cluster(setting.value, name, peer_urls, joins))
        except ValueError as error:
            if self._has_member(self._data_dir()):
                self._warn(f"{setting.shown}: not used, this member has its data: {error}")
            else:
                self._problem(f"{setting.shown}: {error}")
            return alone

    def _data_dir(self) -> str:
        data_dir: str = self._value("data-dir") or flags.FLAGS["data-dir"].default
        return data_dir.replace("${name}", self._value("name"))

    def _retention(self) -> tuple[float, int]:
        """What automatic compaction keeps: (seconds, revisions), one of them 0."""
        mode, text = self._value("auto-compaction-mode"), self._value("auto-compaction-retention")
        if "auto-compaction-mode" in self._bad:
            return 0.0, 0
        digits = re.fullmatch("[0-9]{1,18}", text) is not None
        try:
            if mode == "revision":
                if not digits:
                    raise ValueError("not a number of revisions; write for example 1000")
                return 0.0, int(text)
            return flags.parse_seconds(text + "h" if digits else text), 0
        except ValueError as error:
            shown = self._shown("auto-compaction-retention")
            self._problem(f"{shown}: {error} (auto-compaction-mode is {mode})")
            return 0.0, 0

    def _log_outputs(self) -> tuple[str, ...]:
        outputs = self._value("log-outputs")
        if not all(outputs) or not outputs:
            shown = self._shown("log-outputs")
            self._problem(f"{shown}: names nothing; write stderr, stdout or a file")
        stderr = ("default", "systemd/journal")
        named = ("stderr" if output in stderr else output for output in outputs)
        return tuple(dict.fromkeys(named))
