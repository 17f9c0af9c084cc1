"""The types of flags and commands of etcdlite-ctl, its common flags, and how flags are read.

The syntax is that of etcdctl (Go's pflag), which argparse does not have: a boolean takes its value
only after `=` (`--hex=false`, but `--hex key`), arguments and flags mix freely, `--` ends the flags
and its position matters, and any value may start with a dash.

A bad flag raises BadFlag with etcdctl's text. Text that is not UTF-8 keeps its bytes as surrogates,
as Python's command line has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etcdlite.cli.failures import EXIT_BAD_FEATURE, BadArguments, Failure, say
from etcdlite.notation import load_toml, parse_bool, parse_duration_s, parse_int, toml_text

FORMATS = ("fields", "json", "protobuf", "simple", "table")
"""The output formats, in the order of the help text."""

ENVIRONMENT_PREFIXES = ("ETCDLITE_CTL_", "ETCDCTL_")
"""Of the environment variables for global flags. The first that is set and not empty counts."""


class BadFlag(ValueError):
    """A flag that does not exist, has no value, or a wrong one."""


class Flag(NamedTuple):
    name: str
    kind: str
    """A key of `_PARSERS`."""
    default: Any
    help: str
    short: str = ""


class Command(NamedTuple):
    usage: str
    """Begins with the command's name, of one word or two."""
    help: str
    run: str
    """The "module.function" of etcdlite.cli that takes a Session and returns an exit status, or
    None for 0. It is imported when the command runs. Empty: ctl.py runs the command itself."""
    flags: tuple[Flag, ...] = ()
    prints: str = ""
    """The kind of response that the command prints, a key of `output.PRINTERS`; or empty."""
    description: str = ""
    examples: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join(itertools.takewhile(lambda word: word[0] not in "<[", self.usage.split()))


_PARSERS: dict[str, Callable[[str], Any]] = {
    "bool": parse_bool,
    "int": lambda text: parse_int(text, 0),
    "duration": parse_duration_s,
    "string": str,
    "list": lambda text: tuple(part.strip() for part in text.split(",") if part.strip()),
}
"""From the text of a flag to its value. Durations are in seconds."""

_NATIVE = {"bool": bool, "int": int, "list": list}
"""The types other than strings that a flag of each kind may have in the file of options."""

CONNECTION_FLAGS = (
    Flag("insecure-transport", "bool", True, "false: use TLS unless an endpoint is http://"),
    Flag("insecure-skip-tls-verify", "bool", False, "accept any certificate of the server"),
    Flag("cacert", "string", "", "file with the CAs of servers (default: this system's)"),
    Flag("cert", "string", "", "file with the certificate of this client"),
    Flag("key", "string", "", "file with its key"),
    Flag("secret-file", "string", "", "file with the secret shared with servers, instead of TLS"),
    Flag("user", "string", "", "user name[:password]; a missing password is asked for"),
    Flag("password", "string", "", "password of the user (seen by others: rather be asked)"),
)
"""How to connect; make-mirror has them once more, for the destination."""

GLOBAL_FLAGS = (
    Flag("endpoints", "list", ("127.0.0.1:2379",), "servers, separated by commas"),
    Flag("write-out", "string", "simple", f"output format ({', '.join(FORMATS)})", "w"),
    Flag("hex", "bool", False, "print keys and values as \\x66\\x6f"),
    Flag("command-timeout", "duration", 5.0, "how long to wait for an answer"),
    Flag("dial-timeout", "duration", 2.0, "how long to wait for a connection (0s: no limit)"),
    Flag("debug", "bool", False, "log each request to standard error"),
    Flag("keepalive-time", "duration", 2.0, "no effect; TCP keep-alive is always on"),
    Flag("keepalive-timeout", "duration", 6.0, "no effect; TCP keep-alive is always on"),
    *CONNECTION_FLAGS,
    Flag("insecure-discovery", "bool", True, "accept endpoints without TLS from --discovery-srv"),
    Flag("discovery-srv", "string", "", "domain whose SRV records name the endpoints", "d"),
    Flag("discovery-srv-name", "string", "", "query the records _etcd-client-NAME._tcp"),
    Flag("config-file", "string", "", "file with these options (default: /etc/etcdlite/ctl.toml)"),
)  # fmt: skip

DEFAULT_FILE = "/etc/etcdlite/ctl.toml"
"""The file with values of global flags: TOML, a line for each flag. It is used if this process may
read it."""

MAX_FILE_BYTES = 65_536

HELP_FLAG = Flag("help", "bool", False, "show this help", "h")


# Reading.


def _set_flag(values: dict[str, Any], flag: Flag, text: str, shown: str) -> None:
    try:
        value = _PARSERS[flag.kind](text)
    except ValueError as error:
        raise BadFlag(f'invalid argument "{text}" for "{shown}" flag: {error}') from None
    if flag.kind == "list" and flag.name in values:
        value = values[flag.name] + value
    values[flag.name] = value


def parse_flags(
    words: Sequence[str], flags: Sequence[Flag]
) -> tuple[list[str], int, dict[str, Any]]:
    """(arguments, how many of them precede "--" or -1, flags that were given).

    Accepts --name value, --name=value, -n value, -nvalue, -n=value and clusters of short booleans.
    Flags are not abbreviated. Raises BadFlag."""
    by_name = {flag.name: flag for flag in (*flags, HELP_FLAG)}
    by_short = {flag.short: flag for flag in (*flags, HELP_FLAG) if flag.short}
    arguments: list[str] = []
    values: dict[str, Any] = {}
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            return [*arguments, *words[position:]], len(arguments), values
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            if name not in by_name:
                raise BadFlag(f"unknown flag: --{name}{did_you_mean(name, by_name, '--')}")
            flag, shown, missing = by_name[name], f"--{name}", f"--{name}"
        elif word.startswith("-") and len(word) > 1:
            letter, text = word[1], word[2:]
            if letter not in by_short:
                hint = f" (if {word} is an argument, write -- before it)"
                raise BadFlag(f"unknown shorthand flag: '{letter}' in {word}{hint}")
            flag = by_short[letter]
            shown, missing = f"-{letter}, --{flag.name}", f"'{letter}' in {word}"
            if flag.kind == "bool" and text and not text.startswith("="):
                # -ih is -i -h.
                values[flag.name] = True
                position -= 1
                words = [*words[:position], "-" + text, *words[position + 1 :]]
                continue
            equals = "=" if text else ""
            text = text.removeprefix("=")
        else:
            arguments.append(word)
            continue
        if not equals:
            if flag.kind == "bool":
                values[flag.name] = True
                continue
            if position == len(words):
                raise BadFlag(f"flag needs an argument: {missing}")
            text = words[position]
            position += 1
        _set_flag(values, flag, text, shown)
    return arguments, -1, values


_OTHER_NAMES = {
    **{"ca-file": "cacert", "trusted-ca-file": "cacert", "cert-file": "cert", "key-file": "key"},
    **{"peers": "endpoints"},
}
"""The flags here for those of etcd, and of etcdctl for API v2."""


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    import difflib

    by_word = {other.lower().replace("_", "-"): other for other in known}
    word = name.lower().replace("_", "-")
    close = difflib.get_close_matches(_OTHER_NAMES.get(word, word), by_word, 1)
    return f" (did you mean {prefix}{by_word[close[0]]}?)" if close else ""


def variable(environment: Mapping[str, str], name: str) -> tuple[str, str] | None:
    """(variable, text) that the environment has for `name`. An empty variable counts as unset."""
    for prefix in ENVIRONMENT_PREFIXES:
        found = prefix + name.upper().replace("-", "_")
        if environment.get(found):
            return found, environment[found]
    return None


def _check_variables(environment: Mapping[str, str]) -> None:
    """Warn of unknown ETCDCTL_ variables. Raises BadArguments for unknown ETCDLITE_CTL_ ones, and
    for another API than 3."""
    names = [*(flag.name for flag in GLOBAL_FLAGS), "watch-key", "watch-range-end", "api"]
    known = [name.upper().replace("-", "_") for name in names]
    own, etcds = ENVIRONMENT_PREFIXES
    for found, text in sorted(environment.items()):
        name = found.removeprefix(own).removeprefix(etcds)
        if text and name != found and name not in known:
            hint = did_you_mean(name, known, found.removesuffix(name))
            line = f"unknown variable {found} in the environment{hint}"
            if found.startswith(own):
                raise BadArguments(f"{line}; correct or unset it")
            say(f"Warning: {line}; it is ignored")
    if (api := variable(environment, "api")) and api[1] != "3":
        raise BadArguments(f"{api[0]}={api[1]}: only etcd's API 3 is here; write 3 or unset it")


def _environment_flags(environment: Mapping[str, str]) -> dict[str, Any]:
    _check_variables(environment)
    values: dict[str, Any] = {}
    for flag in GLOBAL_FLAGS:
        if found := variable(environment, flag.name):
            try:
                values[flag.name] = _PARSERS[flag.kind](found[1])
            except ValueError as error:
                text = f"invalid value for environment variable {found[0]}: {error}"
                raise BadArguments(text) from None
    return values


def _file_flags(path: str) -> dict[str, Any]:
    """The values of global flags in the file at `path`, or if that is empty in `DEFAULT_FILE`."""
    try:
        with open(path or DEFAULT_FILE, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        if not path:
            return {}
        raise BadArguments(f"cannot read --config-file {path}: {error.strerror}") from None
    path = path or DEFAULT_FILE
    by_name = {flag.name: flag for flag in GLOBAL_FLAGS if flag.name != "config-file"}
    values = {}
    try:
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        for name, value in load_toml(data).items():
            if name not in by_name:
                raise ValueError(f"unknown option {name!r}{did_you_mean(name, by_name)}")
            kind = by_name[name].kind
            try:
                values[name] = _PARSERS[kind](toml_text(value, _NATIVE.get(kind)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadArguments(f"{path} cannot be used: {error}; correct it") from None
    return values


def unreadable_file_hint() -> str:
    """For an error: that this user may not read the default file of options; empty if not so."""
    try:
        with open(DEFAULT_FILE, "rb"):
            return ""
    except PermissionError:
        return f"; {DEFAULT_FILE} may have the options, but this user may not read it (try sudo)"
    except OSError:
        return ""


def flag_values(
    flags: Sequence[Flag], given: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, Any]:
    """The values of a command's own `flags` and of the global ones: those given, else those from
    the environment, else those in the file of options, else the defaults. Raises Failure for what
    is refused."""
    values = {flag.name: flag.default for flag in (*GLOBAL_FLAGS, *flags)}
    chosen = {**_environment_flags(environment), **given}
    values |= _file_flags(chosen.get("config-file", "")) | chosen
    values["names-server"] = bool("endpoints" in chosen or values["discovery-srv"])
    if values["write-out"] not in FORMATS:
        text = f"unsupported output format {values['write-out']} (known: {', '.join(FORMATS)})"
        raise Failure(text, EXIT_BAD_FEATURE)
    if not values["endpoints"]:
        raise BadArguments("--endpoints names no endpoint")
    return values
