"""What is made from the tables of flags and commands: configuration file, man pages, completions.

    PYTHONPATH=. python3 packaging/generate.py toml       rewrites packaging/etcdlite.toml
    PYTHONPATH=. python3 packaging/generate.py all DIR    writes all into DIR, for the packages

`NOTES` has what the file and the page say beyond the one sentence of --help. The man pages have the
date of SOURCE_DATE_EPOCH, so that two builds are identical.
"""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import time
from pathlib import Path

from etcdlite import ETCD_API_VERSION, __version__, ctl, flags
from etcdlite.cli.flags import DEFAULT_FILE, ENVIRONMENT_PREFIXES, GLOBAL_FLAGS, HELP_FLAG, Command
from etcdlite.cli.flags import Flag as CtlFlag
from etcdlite.cli.help import completion_script, shown_flag
from etcdlite.flags import Flag

EXAMPLE = Path(__file__).parent / "etcdlite.toml"
GUIDE = Path(__file__).parent.parent / "docs" / "etcdlite-ctl.md"
COLUMNS = 100

VALUES = {
    "BYTES": 'bytes, or text with a unit: "64KiB", "16MiB", "8GiB"',
    "DURATION": 'text with a unit: "300ms", "5s", "1h30m"',
    "MS": 'milliseconds, or text with a unit: "300ms", "5s"',
    "N": "a whole number",
    "BOOL": "true or false",
    "PATH": "a path",
    "LIST": "a list of texts",
    "URL,...": 'a list of URLs, as in ["http://10.0.0.1:2379"]',
    "SUITE,...": 'a list of names, as in ["TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"]',
    "GATE=BOOL,...": 'a list, as in ["InitialCorruptCheck=true"]',
    "RETENTION": 'text or a number: "5m", 8 (hours), or 1000 (revisions)',
    "DOMAIN": "a DNS name",
}
"""What a value looks like, and its unit, by the metavar of the flag. Others are plain text."""

NOTES = {
    "name": "1 to 255 characters without comma, = and /. Part of the ID of a new cluster.",
    "data-dir": "A relative path is relative to the working directory of the process, which is "
    "/var/lib/etcdlite for the service. Only one process at a time can use it.",
    "wal-dir": "For example on a faster disk. Empty: inside data-dir. It is part of the data: keep "
    "and back up both, or neither.",
    "encryption-key-file": 'Made by "etcdlite-ctl key new FILE". Keep it outside of data-dir, and '
    "keep a copy: without it the data is lost.",
    "listen-client-urls": "Addresses of this machine, localhost, 0.0.0.0 (all of IPv4) or [::] "
    "(all of IPv6). Anyone who can connect to an http:// URL can read and write everything, unless "
    "there are users.",
    "max-connections": "The limit on open files (LimitNOFILE= in the unit, ulimit -n) must be a "
    "little larger.",
    "max-request-bytes": 'Above "10MiB" there is a warning, because a large request delays others.',
    "client-secret-file": 'Made by "etcdlite-ctl secret new". It does not concern gRPC and JSON.',
    "listen-peer-urls": "Without TLS (https://) or peer-secret-file, keep this port inside a "
    "network that you trust.",
    "discovery-srv": "The records are _etcd-server._tcp. Needs python3-dnspython.",
    "peer-address-check": "Set it to false where addresses are translated between the members.",
    "peer-secret-file": 'Made by "etcdlite-ctl secret new"; the same on all members.',
    "force-new-cluster": "Start once with it, then remove it.",
    "auto-compaction-retention": "0 keeps history until a client compacts.",
    "unsafe-no-fsync": "For tests only.",
    "backup-status-file": "etcdlite-backup.service writes it. It should be on a local disk.",
    "log-outputs": "Rotate files with logrotate and kill -HUP in its postrotate.",
    "cert-file": 'For URLs that begin with https://. "etcdlite-ctl cert" makes certificates. They '
    "are read again when they change.",
    "peer-cert-file": "For peer URLs that begin with https://.",
}
"""More sentences about a key."""

HEADER = f"""\
The configuration of etcdlite. It is also the manual: etcdlite.toml(5) has the same text.

etcdlite reads {flags.DEFAULT_FILE}, or the file that --config names. Each key below is commented \
out and has its default value: remove the "#" in front of a key to change it. The keys are etcd's \
flags. Each also works as a flag (--name=x) and in the environment (ETCDLITE_NAME=x or \
ETCD_NAME=x). A flag overrides the environment, which overrides this file.

After a change, check the file and restart the service:
   etcdlite --check-config
   systemctl restart etcdlite

An example of three members is at the end."""

CLUSTER = """\
Three members at 10.0.0.1, 10.0.0.2 and 10.0.0.3. Write this into the file of the first one \
before its first start; on the others, change the name and the address of the machine. They share \
a secret, which encrypts the traffic between them: make it on one machine and copy it to the \
others with
   etcdlite-ctl secret new /etc/etcdlite/peer.secret
   chown root:etcdlite /etc/etcdlite/peer.secret; chmod 640 /etc/etcdlite/peer.secret"""

CLUSTER_SETTINGS = (
    ("name", "m1"),
    ("listen-client-urls", ["http://127.0.0.1:2379", "http://10.0.0.1:2379"]),
    ("advertise-client-urls", ["http://10.0.0.1:2379"]),
    ("listen-peer-urls", ["http://10.0.0.1:2380"]),
    ("initial-advertise-peer-urls", ["http://10.0.0.1:2380"]),
    (
        "initial-cluster",
        ["m1=http://10.0.0.1:2380", "m2=http://10.0.0.2:2380", "m3=http://10.0.0.3:2380"],
    ),
    ("peer-secret-file", "/etc/etcdlite/peer.secret"),
)

# The configuration file.


def toml_value(flag: Flag) -> str:
    """The default as TOML."""
    if flag.kind.native is bool:
        return flag.default
    if flag.kind.native is list:
        return json.dumps(flag.default.split(",") if flag.default else [])
    if flag.kind.native is int and flag.default.isdigit():
        return flag.default
    return json.dumps(flag.default)


def sentences(flag: Flag) -> str:
    return f"{flag.text} {NOTES[flag.name]}" if flag.name in NOTES else flag.text


def value_of(flag: Flag) -> str:
    """What values the flag takes; empty for plain text."""
    return "true or false" if flag.kind is flags.BOOL else VALUES.get(flag.kind.metavar, "")


def _commented(text: str) -> list[str]:
    lines = []
    for line in text.splitlines():
        indent = "# " + " " * (len(line) - len(line.lstrip()))
        wrapped = textwrap.wrap(
            line, COLUMNS, initial_indent="# ", subsequent_indent=indent, break_on_hyphens=False
        )
        lines += wrapped or ["#"]
    return lines


def keys_of_file(members: tuple[Flag, ...]) -> list[Flag]:
    """The file cannot name itself."""
    return [flag for flag in members if flag.name != "config-file"]


def toml() -> str:
    out = _commented(HEADER)
    for group, members in flags.GROUPS.items():
        out += ["", f"## {group}"]
        for flag in keys_of_file(members):
            out += ["", *_commented(sentences(flag))]
            if value := value_of(flag):
                out += _commented(f"Value: {value}.")
            out.append(f"#{flag.name} = {toml_value(flag)}")
    out += ["", "## Example: a cluster", "", *_commented(CLUSTER), "#"]
    out += [f"#  {line}" for line in cluster_settings()]
    return "\n".join(out) + "\n"


def cluster_settings() -> list[str]:
    """The lines of the example of a cluster."""
    text = "\n".join(f"{name} = {json.dumps(value)}" for name, value in CLUSTER_SETTINGS)
    return text.replace(", ", ",\n    ").splitlines()


# The man pages.


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti")
    return escaped.replace("'", "\\(aq").replace("^", "\\(ha").replace("`", "\\(ga")


def _lines(text: str) -> str:
    """Text whose lines may begin with anything."""
    return "\n".join(
        "\\&" + line if line[:1] in (".", "\\") else line for line in _roff(text).split("\n")
    )


def _title(name: str, section: int, summary: str) -> list[str]:
    day = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", "0"))))
    return [
        f'.TH {name.upper()} {section} {day} "etcdlite {__version__}" "etcdlite"',
        ".nh",
        ".ad l",
        ".SH NAME",
        f"{_roff(name)} \\- {_roff(summary)}",
    ]


def _tagged(tag: str, text: str) -> list[str]:
    return [".TP", f"\\fB{_roff(tag)}\\fR", _lines(text)]


def _preformatted(text: str) -> list[str]:
    return [".PP", ".nf", ".RS 4", _lines(text), ".RE", ".fi"]


def _also(*pages: str) -> list[str]:
    shown = (f"\\fB{_roff(page[:-3])}\\fR{page[-3:]}" for page in pages)
    return [".SH SEE ALSO", ",\n".join(shown)]


def server_page() -> str:
    out = _title("etcdlite", 8, "key-value store for small clusters, compatible with etcd v3")
    out += [".SH SYNOPSIS", "\\fBetcdlite\\fR [\\fIflags\\fR]", ".SH DESCRIPTION"]
    out.append(
        _lines(
            "etcdlite starts one member of a cluster. It serves etcd's v3 API over gRPC and JSON, "
            "and its native protocol, on one port. Without flags it serves clients of this machine "
            "on port 2379 and keeps its data in ./default.etcdlite. As a service it keeps its data "
            "in /var/lib/etcdlite."
        )
    )
    out += [".SH OPTIONS"]
    out.append(
        _lines(
            "Each flag can also be set in the environment, as ETCDLITE_ or ETCD_ and its name in "
            "capitals with _ for -, or by its own name in a TOML file. The command line overrides "
            "the environment, which overrides the file."
        )
    )
    for name, text in flags.ACTIONS.items():
        out += _tagged(f"--{name}", text)
    for group, members in flags.GROUPS.items():
        out.append(f".SS {_roff(group)}")
        for flag in members:
            default = f" Default: {flag.default}" if flag.default else ""
            out += _tagged(f"--{flag.name}={flag.kind.metavar}", flag.text + default)
    out += [".SS Other flags of etcd", "These have no effect here, or are refused:"]
    out += [_lines(", ".join(flag.name for flag in flags.OTHERS))]
    out += [".SH SIGNALS"]
    out += _tagged(
        "SIGTERM, SIGINT",
        "Answer the requests in flight, hand leadership to another member, and stop. A second "
        "signal stops at once; no acknowledged write is lost.",
    )
    out += _tagged(
        "SIGHUP", "Apply the log settings, reopen log files, and read certificates and secrets."
    )
    out += [".SH EXIT STATUS"]
    out += _tagged("0", "Stopped by a signal, or because the member was removed while it ran.")
    out += _tagged(
        "1",
        "It failed, and another start may succeed: a port is in use, a file is missing, the disk "
        "is full or fails. The service tries again every five seconds.",
    )
    out += _tagged(
        "2",
        "No start succeeds before somebody acts: the settings are wrong, or the data is damaged, "
        "of another version, or of a member that may not take part. The service stays stopped, "
        "and is in systemctl --failed.",
    )
    out += [".PP", "The last line of the log says why, and what to do."]
    out += [".SH FILES"]
    out += _tagged(flags.DEFAULT_FILE, "The configuration, see etcdlite.toml(5).")
    out += _tagged("/etc/etcdlite/", "Secrets, keys and certificates; NAME.toml for etcdlite@NAME.")
    out += _tagged("/var/lib/etcdlite/", "The data of the service. Removing the package keeps it.")
    out += _tagged("/var/backups/etcdlite/", "The backups of etcdlite-backup.timer.")
    out += [".SH EXAMPLES", "Start the service, and see that it serves:"]
    out += _preformatted(
        "systemctl start etcdlite\netcdlite-ctl member list\netcdlite-ctl endpoint health"
    )
    out += [".PP", "Back it up every night:"]
    out += _preformatted("systemctl enable --now etcdlite-backup.timer")
    return "\n".join(out + _also("etcdlite-ctl(1)", "etcdlite.toml(5)", "systemctl(1)")) + "\n"


def toml_page() -> str:
    out = _title("etcdlite.toml", 5, "configuration of etcdlite")
    out += [".SH SYNOPSIS", _roff(flags.DEFAULT_FILE), ".SH DESCRIPTION"]
    for paragraph in HEADER.replace(" It is also the manual: etcdlite.toml(5) has the same text.",
                                    "").replace("below ", "").split("\n\n")[:-1]:  # fmt: skip
        text, _, commands = paragraph.partition("\n")
        out += [".PP", _lines(text)]
        if commands:
            out += _preformatted(textwrap.dedent(commands))
    for group, members in flags.GROUPS.items():
        out.append(f".SH {_roff(group.upper())}")
        for flag in keys_of_file(members):
            value = f" Value: {value_of(flag)}." if value_of(flag) else ""
            out += _tagged(flag.name, sentences(flag) + value)
            out += [".br", _lines(f"Default: {toml_value(flag)}")]
    text, _, commands = CLUSTER.partition("\n")
    out += [".SH EXAMPLE", _lines(text), *_preformatted(textwrap.dedent(commands))]
    out += [".PP", "The file:", *_preformatted("\n".join(cluster_settings()))]
    return "\n".join(out + _also("etcdlite(8)", "etcdlite-ctl(1)")) + "\n"


def _ctl_flags(members: tuple[CtlFlag, ...]) -> list[str]:
    out = []
    for flag in members:
        out += _tagged(shown_flag(flag).strip(), flag.help)
    return out


def _command_section(command: Command) -> list[str]:
    out = [".SS " + _roff(command.usage), _lines(command.help + ".")]
    if command.description:
        out += [_lines(command.description)]
    out += _ctl_flags(command.flags)
    if command.examples:
        out += _preformatted("\n".join(f"etcdlite-ctl {example}" for example in command.examples))
    return out


def ctl_page() -> str:
    api = ".".join(ETCD_API_VERSION.split(".")[:2])
    out = _title("etcdlite-ctl", 1, "command line client of etcdlite")
    out += [".SH SYNOPSIS"]
    out += ["\\fBetcdlite\\-ctl\\fR [\\fIoptions\\fR] \\fIcommand\\fR [\\fIarguments\\fR]"]
    out += [".SH DESCRIPTION"]
    out.append(
        _lines(
            f"etcdlite-ctl has the commands, arguments and output of etcdctl (API version {api}). "
            "A unique prefix of a command's name is enough."
        )
    )
    out += [".SH OPTIONS", *_ctl_flags((*GLOBAL_FLAGS, HELP_FLAG)), ".SH COMMANDS"]
    for command in ctl.COMMANDS:
        out += _command_section(command)
    out += [".SH ENVIRONMENT"]
    for prefix in ENVIRONMENT_PREFIXES:
        out += _tagged(f"{prefix}ENDPOINTS", "--endpoints; and so on for each option.")
    out += [".SH EXIT STATUS"]
    page = GUIDE.read_text(encoding="utf-8").partition("## Exit status")[2].partition("\n## ")[0]
    for status, text in re.findall(r"^\| ([\w, ]+) \| (.+) \|$", page, re.M)[1:]:
        out += _tagged(status, text.replace("`", ""))
    out += [".SH FILES"]
    out += _tagged(DEFAULT_FILE, "Global options, as lines of TOML.")
    return "\n".join(out + _also("etcdlite(8)", "etcdlite.toml(5)")) + "\n"


# Completions.


def everything() -> dict[str, str]:
    """The generated files, by name."""
    return {
        "etcdlite.toml": toml(),
        "etcdlite.8": server_page(),
        "etcdlite-ctl.1": ctl_page(),
        "etcdlite.toml.5": toml_page(),
        "etcdlite-ctl": completion_script("bash"),
        "_etcdlite-ctl": completion_script("zsh"),
        "etcdlite-ctl.fish": completion_script("fish"),
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["toml"]:
        EXAMPLE.write_text(toml(), encoding="utf-8")
    elif len(sys.argv) == 3 and sys.argv[1] == "all":
        for name, text in everything().items():
            Path(sys.argv[2], name).write_text(text, encoding="utf-8")
    else:
        sys.exit(__doc__)
