"""Every command and flag of etcdctl and etcdutl is here, or refused with a reason.

`ETCDCTL` and `ETCDUTL` list those of version 3.6; in addition the help pages of the real programs
are walked, where they are installed (3.5). docs/etcdctl-parity.md shows the outcome;
`REWRITE=1 pytest tests/test_parity.py` writes it.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.ctl_runner import run_ctl
from rigs.processes import ROOT
from rigs.real_etcd import distributed, without_settings

from etcdlite import ctl
from etcdlite.cli.flags import GLOBAL_FLAGS

PAGE = ROOT / "docs" / "etcdctl-parity.md"
DEBIANS = "/usr/bin/etcdctl"

GLOBAL = """cacert cert command-timeout debug dial-timeout discovery-srv discovery-srv-name
endpoints hex insecure-discovery insecure-skip-tls-verify insecure-transport keepalive-time
keepalive-timeout key password user write-out"""

ETCDCTL = """
alarm disarm
alarm list
auth disable
auth enable
auth status
check datascale: auto-compact auto-defrag load prefix
check perf: auto-compact auto-defrag load prefix
compaction: physical
completion
defrag: cluster
del: from-key prefix prev-kv range
downgrade cancel
downgrade enable
downgrade validate
elect: listen
endpoint hashkv: cluster rev
endpoint health: cluster
endpoint status: cluster
get: consistency count-only from-key keys-only limit max-create-rev max-mod-rev min-create-rev
 min-mod-rev order prefix print-value-only rev sort-by
lease grant
lease keep-alive: once
lease list
lease revoke
lease timetolive: keys
lock: ttl
make-mirror: dest-cacert dest-cert dest-insecure-transport dest-key dest-password dest-prefix
 dest-user max-txn-ops no-dest-prefix prefix rev
member add: learner peer-urls
member list: consistency
member promote
member remove
member update: peer-urls
move-leader
put: ignore-lease ignore-value lease prev-kv
role add
role delete
role get
role grant-permission: from-key prefix
role list
role revoke-permission: from-key prefix
snapshot save
txn: interactive
user add: interactive new-user-password no-password
user delete
user get: detail
user grant-role
user list
user passwd: interactive
user revoke-role
version
watch: interactive prefix prev-kv progress-notify rev
"""

ETCDUTL = """
completion
defrag: data-dir
hashkv: rev
migrate: data-dir force target-version
snapshot restore: bump-revision data-dir initial-advertise-peer-urls initial-cluster
 initial-cluster-token initial-memory-map-size mark-compacted name skip-hash-check wal-dir
snapshot status
version
"""

ONLY_BEFORE = {"backup", "migrate"}
"""Commands that 3.6 does not have any more."""


def parsed(table: str) -> dict[str, set[str]]:
    """Command -> its flags."""
    found = {}
    for line in table.replace("\n ", " ").strip().splitlines():
        command, _, flags = line.partition(":")
        found[command] = set(flags.split())
    return found


LISTED = {"etcdctl": parsed(ETCDCTL), "etcdutl": parsed(ETCDUTL)}


def missing(command: str, flags: set[str]) -> list[str]:
    """What of a command is neither here nor refused."""
    top = command.split()[0]
    if top in ctl.REFUSED:
        ended = run_ctl(*command.split())
        why = f"Error: etcdlite-ctl has no command {top}: {ctl.REFUSED[top]}\n"
        return [] if ended == (4, b"", why) else [command]
    found = ctl.COMMAND_BY_NAME.get(command)
    if found is None:
        return [command]
    known = {flag.name for flag in (*found.flags, *GLOBAL_FLAGS)}
    return [f"{command} --{flag}" for flag in sorted(flags - known)]


@pytest.mark.parametrize("program", LISTED)
def test_every_command_and_flag_of_3_6_is_here_or_refused(program: str) -> None:
    lost = [what for row in LISTED[program].items() for what in missing(*row)]
    assert not lost
    assert {flag.name for flag in GLOBAL_FLAGS} >= set(GLOBAL.split())


# The help pages.


def page(program: str, *words: str) -> str:
    environ = without_settings() | {"ETCDCTL_API": "3"}
    words = (program, *words, "--help")
    ended = subprocess.run(words, capture_output=True, text=True, env=environ)
    return ended.stdout + ended.stderr


def flags_on(text: str) -> set[str]:
    """The flags of a help page, but for the global ones."""
    own = re.split(r"\n(?:GLOBAL OPTIONS|Global Flags):", text)[0]
    return set(re.findall(r"^ +(?:-\w, )?--([a-z][\w-]*)", own, re.M)) - {"help"}


def pages(program: str) -> Iterator[tuple[str, str]]:
    """(command, its help page) of all commands, found by walking the pages."""
    text = page(program)
    listed = re.search(r"(?:COMMANDS|Available Commands):\n(.*?)\n\n", text, re.S)
    assert listed is not None, text
    for line in listed[1].splitlines():
        names = re.match(r"\s+([a-z-]+(?: [a-z-]+)?)\s*(?:\t| {2})", line)
        assert names is not None, line
        command = names[1]
        if command == "help":
            continue
        if (
            command.split()[0] == "completion"
        ):  # Its subcommands, the shells, are arguments of ours.
            yield "completion", ""
            continue
        own = page(program, *command.split())
        if "Available Commands:" in own:
            for sub in re.findall(r"^  ([a-z-]+) ", own.partition("Available Commands:")[2], re.M):
                yield f"{command} {sub}", page(program, command, sub)
        else:
            yield command, own


@pytest.mark.parametrize("program", ["etcdctl", "etcdutl", DEBIANS])
def test_the_help_pages_of_the_real_programs_name_nothing_else(program: str) -> None:
    if program == DEBIANS and not Path(DEBIANS).exists():
        pytest.skip(f"no {DEBIANS}: apt install etcd-client")
    path = program if program == DEBIANS else distributed(program)
    count, lost, unlisted = 0, [], []
    for command, text in pages(path):
        count += 1
        flags = flags_on(text)
        lost += missing(command, flags)
        known = LISTED["etcdutl" if program == "etcdutl" else "etcdctl"].get(command)
        moved = command in LISTED["etcdutl"] or command.split()[0] in ONLY_BEFORE
        if known is None and not moved:
            unlisted.append(command)
        elif known is not None and flags - known - {"data-dir"}:
            unlisted.append(f"{command}: {flags - known}")
    assert count > 3 and not lost
    assert not unlisted, "the table of 3.6 lacks what earlier versions have"


# The page.

HEAD = """\
# Commands of etcdctl and etcdutl

Every command and flag of etcdctl 3.6 and etcdutl 3.6, and what `etcdlite-ctl` makes of it. A
command that is here has the same arguments, flags and output; what differs is listed in
[etcdlite-ctl.md](etcdlite-ctl.md#differences-from-etcdctl). `tests/test_parity.py` makes this page
and walks the help pages of the real programs.
"""


def page_text() -> str:
    out = [HEAD]
    for program, commands in LISTED.items():
        out.append(f"\n## {program}\n\n| command | flags | here |\n|---|---|---|\n")
        for command, flags in commands.items():
            here = ctl.REFUSED.get(command.split()[0])
            shown = ", ".join(f"`--{flag}`" for flag in sorted(flags))
            text = f"refused: {here}" if here else f"`{command}`"
            out.append(f"| `{command}` | {shown} | {text} |\n")
    names = ", ".join(f"`--{flag}`" for flag in sorted(GLOBAL.split()))
    out.append(f"\nGlobal flags, all here: {names}.\n")
    out.append(
        "\nOf earlier versions: `etcdctl snapshot status`, `etcdctl snapshot restore` and "
        "`etcdctl defrag --data-dir` are here;\n`migrate` and `etcdutl backup`, which concern the "
        "API v2, are refused.\n"
    )
    return "".join(out)


def test_the_page_is_up_to_date() -> None:
    if os.environ.get("REWRITE"):
        PAGE.write_text(page_text())
    assert PAGE.read_text() == page_text(), "stale: REWRITE=1 pytest tests/test_parity.py"
