"""etcdlite-ctl: the command line client, with etcdctl 3.5's commands, arguments and output.

This file has the table of commands, help, shell completion and `main`. The other parts:
input.py what the user wrote, session.py the connection, commands.py, watch.py and
check.py what the commands do, output.py what they print.

Exit status, as etcdctl's: 0 done; 1 the server, the network or the command failed; 2 a lease to
keep alive is not there; 3 input (a transaction, an interactive watch) does not parse; 4 an option
value or an output format that does not exist; 5 a watch was ended by the server, or a snapshot
could not be saved; 128 wrong arguments. `lock NAME COMMAND` ends as the command does. Ended by a
signal, it ends by that signal.

Invariants: standard output holds nothing but results, in etcdctl's bytes; every failure is one
line on standard error that names the cause and, when a server was involved, the endpoint;
progress is shown only on a terminal; a flag that cannot be honoured is refused, never ignored.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from etcdlite import __version__
from etcdlite.cli import check as ctl_check
from etcdlite.cli import commands as ctl_commands
from etcdlite.cli import watch as ctl_watch
from etcdlite.cli.input import (
    DEL_FLAGS,
    ENVIRONMENT_PREFIXES,
    EXIT_BAD_ARGUMENTS,
    EXIT_BAD_FEATURE,
    EXIT_FAILED,
    GET_FLAGS,
    GLOBAL_FLAGS,
    HELP_FLAG,
    PROGRAM,
    PUT_FLAGS,
    REFUSED_FLAGS,
    BadFlag,
    Failure,
    Flag,
    did_you_mean,
    environment_flags,
    parse_flags,
)
from etcdlite.cli.output import PRINTERS
from etcdlite.cli.session import Session, describe, os_error_text, say
from etcdlite.client import EtcdliteError


class Command(NamedTuple):
    """`name` is one word or two. `prints` is the printer's method that must exist, if any."""

    name: str
    usage: str
    help: str
    run: Callable[[Session], int]
    flags: tuple[Flag, ...] = ()
    prints: str = ""
    description: str = ""
    examples: tuple[str, ...] = ()


_PEER_URLS_FLAG = Flag("peer-urls", "list", (), "where the other members reach it")
_CLUSTER_FLAG = Flag("cluster", "bool", False, "ask all members of the cluster, not --endpoints")


def completion(session: Session) -> int:
    session.need(1, "completion needs the name of the shell: bash or zsh")
    if session.arguments[0] not in ("bash", "zsh"):
        raise Failure(EXIT_BAD_ARGUMENTS, f"unknown shell {session.arguments[0]}: bash or zsh")
    session.write(completion_script(session.arguments[0]).encode())
    return 0


def _check_flags(name: str) -> tuple[Flag, ...]:
    return (
        Flag("load", "string", "s", "s(mall), m(edium), l(arge) or xl"),
        Flag("prefix", "string", f"/etcdctl-check-{name}/", "where the check's keys go"),
        Flag("auto-compact", "bool", False, "compact the history afterwards"),
        Flag("auto-defrag", "bool", False, "defragment the endpoints afterwards"),
    )


COMMANDS = (
    Command(
        "put",
        "put [options] <key> <value>  (the value comes from standard input if not given)",
        "Puts the given key into the store",
        ctl_commands.put,
        PUT_FLAGS,
        "put",
        "A value that begins with '-' has to stand behind '--'.",
        ("put greeting hello", "put -- offset -5", "put config < config.json"),
    ),
    Command(
        "get",
        "get [options] <key> [range_end]",
        "Gets the key or a range of keys",
        ctl_commands.get,
        GET_FLAGS,
        "get",
        "With range_end: key <= k < range_end.",
        (
            "get greeting",
            "get /config/ --prefix --keys-only",
            "get '' --prefix --limit 10 -w json",
            "get greeting --rev 5",
            "get /config/ --prefix --count-only -w fields",
        ),
    ),
    Command(
        "del",
        "del [options] <key> [range_end]",
        "Removes the specified key or range of keys [key, range_end)",
        ctl_commands.delete,
        DEL_FLAGS,
        "delete",
        "Prints how many keys were deleted.",
        ("del greeting", "del /config/ --prefix --prev-kv"),
    ),
    Command(
        "txn",
        "txn [options]",
        "Txn processes all the requests in one transaction",
        ctl_commands.txn,
        (Flag("interactive", "bool", False, "say what is to be typed", "i"),),
        "txn",
        "Reads three blocks of lines from standard input, each ended by an empty line:\n"
        'comparisons, requests if all hold, requests if not. A comparison is target("key") op\n'
        '"value"; targets: mod, create, version, value, lease; ops: = != < >. A request is a\n'
        "put, get or del as on the command line; words in double quotes may hold Go's escapes.",
        (
            'txn <<\'END\'\nmod("greeting") > "0"\n\nput greeting "hello again"\n\n'
            "put greeting hello\nget greeting\n\nEND",
        ),
    ),
    Command(
        "watch",
        "watch [options] [key] [range_end] [-- command [argument ...]]",
        "Watches events stream on keys or prefixes",
        ctl_watch.watch,
        (
            *ctl_watch.WATCH_FLAGS,
            Flag("interactive", "bool", False, "read watch and progress lines from stdin", "i"),
        ),
        "watch",
        "The command is run for each event, with ETCD_WATCH_REVISION, ETCD_WATCH_EVENT_TYPE,\n"
        "ETCD_WATCH_KEY and ETCD_WATCH_VALUE in its environment. The key may come from\n"
        "ETCDLITE_CTL_WATCH_KEY (and _RANGE_END). A broken connection is taken up again where it\n"
        "ended.",
        (
            "watch greeting",
            "watch /config/ --prefix --rev 1",
            "watch /config/ --prefix -- sh -c 'echo $ETCD_WATCH_KEY'",
        ),
    ),
    Command(
        "compaction",
        "compaction [options] <revision>",
        "Compacts the event history in etcd",
        ctl_commands.compaction,
        (Flag("physical", "bool", False, "wait until the history is gone from the disk"),),
        description="History before the revision cannot be read or watched any more.",
        examples=("compaction 1234",),
    ),
    Command(
        "defrag",
        "defrag [options]",
        "Defragments the storage of the etcd members with given endpoints",
        ctl_commands.defrag,
        (_CLUSTER_FLAG, Flag("data-dir", "string", "", "refused: servers do it themselves")),
        description="Gives space back to the disk while the member goes on serving.",
        examples=("defrag", "defrag --cluster"),
    ),
    Command(
        "lease grant",
        "lease grant <ttl in seconds>",
        "Creates leases",
        ctl_commands.lease_grant,
        prints="lease_grant",
        examples=("lease grant 60", "put --lease 694d77aa9e38260f key value"),
    ),
    Command(
        "lease revoke",
        "lease revoke <leaseID>",
        "Revokes leases",
        ctl_commands.lease_revoke,
        prints="lease_revoke",
        description="The keys that are attached to it are deleted.",
    ),
    Command(
        "lease timetolive",
        "lease timetolive <leaseID> [options]",
        "Get lease information",
        ctl_commands.lease_time_to_live,
        (Flag("keys", "bool", False, "show the keys that are attached to it"),),
        "lease_time_to_live",
    ),
    Command(
        "lease list",
        "lease list",
        "List all active leases",
        ctl_commands.lease_list,
        prints="lease_list",
    ),
    Command(
        "lease keep-alive",
        "lease keep-alive [options] <leaseID>",
        "Keeps leases alive (renew)",
        ctl_commands.lease_keep_alive,
        (Flag("once", "bool", False, "renew it once and end"),),
        "lease_keep_alive",
        "Renews the lease at a third of its time, until it is revoked or a signal comes.",
    ),
    Command(
        "alarm list",
        "alarm list",
        "Lists all alarms",
        ctl_commands.alarm_list,
        prints="alarm",
    ),
    Command(
        "alarm disarm",
        "alarm disarm",
        "Disarms all alarms",
        ctl_commands.alarm_disarm,
        prints="alarm",
        description="NOSPACE comes back unless space is made: compaction, then defrag.",
    ),
    Command(
        "endpoint health",
        "endpoint health [options]",
        "Checks the healthiness of endpoints specified in `--endpoints` flag",
        ctl_commands.endpoint_health,
        (_CLUSTER_FLAG,),
        "endpoint_health",
        "Healthy is who serves a linearizable read and has no alarm.",
        ("endpoint health --cluster -w table",),
    ),
    Command(
        "endpoint status",
        "endpoint status [options]",
        "Prints out the status of endpoints specified in `--endpoints` flag",
        ctl_commands.endpoint_status,
        (_CLUSTER_FLAG,),
        "endpoint_status",
        "In the simple format: endpoint, ID, version, db size, is leader, is learner, raft term,\n"
        "raft index, raft applied index, errors.",
        ("endpoint status --cluster -w table",),
    ),
    Command(
        "endpoint hashkv",
        "endpoint hashkv [options]",
        "Prints the KV history hash for each endpoint in --endpoints",
        ctl_commands.endpoint_hashkv,
        (_CLUSTER_FLAG, Flag("rev", "int", 0, "up to this revision (0: all)")),
        "endpoint_hashkv",
    ),
    Command(
        "member list",
        "member list",
        "Lists all members in the cluster",
        ctl_commands.member_list,
        prints="member_list",
        description="In the simple format: ID, status, name, peer addresses, client addresses,\n"
        "is learner.",
    ),
    Command(
        "member add",
        "member add <memberName> [options]",
        "Adds a member into the cluster",
        ctl_commands.member_add,
        (
            _PEER_URLS_FLAG,
            Flag("learner", "bool", False, "the new member does not vote until it is promoted"),
        ),
        "member_add",
        "Prints the environment that the new member is to be started with. Start it before you\n"
        "add another one.",
        ("member add m4 --peer-urls=http://10.0.0.4:2380",),
    ),
    Command(
        "member remove",
        "member remove <memberID>",
        "Removes a member from the cluster",
        ctl_commands.member_remove,
        prints="member_changed",
        description="It stops, and its data directory is of no use any more.",
    ),
    Command(
        "member update",
        "member update <memberID> [options]",
        "Updates a member in the cluster",
        ctl_commands.member_update,
        (_PEER_URLS_FLAG,),
        "member_changed",
        "Tells the cluster the member's new peer URLs.",
    ),
    Command(
        "member promote",
        "member promote <memberID>",
        "Promotes a non-voting member in the cluster",
        ctl_commands.member_promote,
        prints="member_changed",
        description="A learner that has caught up becomes a voting member.",
    ),
    Command(
        "move-leader",
        "move-leader <transferee-member-id>",
        "Transfers leadership to another etcd cluster member.",
        ctl_commands.move_leader,
        prints="move_leader",
        description="One of --endpoints must be the leader's.",
    ),
    Command(
        "snapshot save",
        "snapshot save <filename>",
        "Stores an etcd node backend snapshot to a given file",
        ctl_commands.snapshot_save,
        description="The file is complete and synced when it appears under its name.",
        examples=("snapshot save backup.db",),
    ),
    Command(
        "snapshot status",
        "snapshot status <filename>",
        "Gets backend snapshot status of a given file",
        ctl_commands.snapshot_status,
        prints="snapshot_status",
        description="In the simple format: hash, revision, total keys, total size.",
    ),
    Command(
        "snapshot restore",
        "snapshot restore <filename> [options]",
        "Restores an etcd member snapshot to an etcd directory",
        ctl_commands.snapshot_restore,
        (
            Flag("data-dir", "string", "", "where to (default: the name + .etcdlite)"),
            Flag("wal-dir", "string", "", "where the log goes (default: in the data directory)"),
            Flag("name", "string", "default", "the member's name"),
            Flag(
                "initial-cluster",
                "string",
                "default=http://localhost:2380",
                "all members: name=peer URL, separated by commas",
            ),
            Flag("initial-cluster-token", "string", "etcd-cluster", "name of the new cluster"),
            Flag(
                "initial-advertise-peer-urls",
                "string",
                "http://localhost:2380",
                "this member's peer URLs",
            ),
            Flag("skip-hash-check", "bool", False, "restore even if the checksum is wrong"),
        ),
        description="Works on local files; no server is needed. The directory must be empty or\n"
        "not exist.",
        examples=("snapshot restore backup.db --data-dir new.etcdlite",),
    ),
    Command(
        "lock",
        "lock [options] <lockname> [command [argument ...]]",
        "Acquires a named lock",
        ctl_commands.lock,
        (Flag("ttl", "int", 10, "seconds until the lock is free if this process dies"),),
        "get",
        "Prints the lock's key when the lock is held and keeps it until a signal comes; or runs\n"
        "the command, with ETCD_LOCK_KEY and ETCD_LOCK_REV in its environment, and ends as it\n"
        "does. Flags of the command stand behind '--'.",
        ("lock nightly", "lock nightly -- rsync -a data/ backup:"),
    ),
    Command(
        "elect",
        "elect [options] <election-name> [proposal]",
        "Observes and participates in leader election",
        ctl_commands.elect,
        (Flag("listen", "bool", False, "only show who leads", "l"),),
        "get",
        examples=("elect scheduler $(hostname)", "elect -l scheduler"),
    ),
    Command(
        "check perf",
        "check perf [options]",
        "Check the performance of the etcd cluster",
        ctl_check.check_perf,
        _check_flags("perf"),
        description="Puts 1 KiB values for a minute and judges rate and latency. Loads: s 150/s,\n"
        "m 1000/s, l 8000/s, xl 15000/s. Deletes its keys afterwards.",
    ),
    Command(
        "check datascale",
        "check datascale [options]",
        "Check the memory usage of holding data for different workloads on a given server "
        "endpoint.",
        ctl_check.check_datascale,
        _check_flags("datascale"),
        description="Loads: s 10,000, m 100,000, l 1,000,000, xl 3,000,000 keys of 1 KiB. Needs\n"
        "the first endpoint's /metrics. Deletes its keys afterwards.",
    ),
    Command("version", "version", f"Prints the version of {PROGRAM}", ctl_commands.version),
    Command(
        "completion",
        "completion <bash|zsh>",
        "Prints the completion script for a shell",
        completion,
        examples=("completion bash > /etc/bash_completion.d/etcdlite-ctl",),
    ),
)

COMMAND_BY_NAME = {command.name: command for command in COMMANDS}
GROUPS = {
    "lease": "Lease related commands",
    "alarm": "Alarm related commands",
    "endpoint": "Endpoint related commands",
    "member": "Membership related commands",
    "snapshot": "Manages etcd node snapshots",
    "check": "commands for checking properties of the etcd cluster",
}

NOT_YET = (
    "auth",
    "downgrade",
    "make-mirror",
    "role",
    "user",
)
"""etcdctl's commands whose features are still to come."""


# Help.


def _flag_table(flags: Sequence[Flag]) -> str:
    rows = []
    for flag in flags:
        names = f"-{flag.short}, --{flag.name}" if flag.short else f"    --{flag.name}"
        default = flag.default
        if flag.kind == "duration":
            default = f"{default:g}s"
        elif flag.kind == "list":
            default = ",".join(default)
        shown = "" if flag.kind == "bool" and not default else f"={str(default).lower()}"
        if flag.kind == "string":
            shown = f'="{default}"'
        rows.append((names + shown, flag.help))
    width = max(len(row[0]) for row in rows)
    return "".join(f"  {names.ljust(width)}  {text}\n" for names, text in rows)


def _command_table(commands: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in commands)
    return "".join(f"  {name.ljust(width)}  {text}\n" for name, text in commands)


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" if line else "\n" for line in text.splitlines())


def command_help(command: Command) -> str:
    parts = [f"NAME:\n  {command.name} - {command.help}\n"]
    parts.append(f"USAGE:\n  {PROGRAM} {command.usage}\n")
    if command.description:
        parts.append("DESCRIPTION:\n" + _indented(command.description))
    if command.examples:
        examples = "".join(_indented(f"{PROGRAM} {example}") for example in command.examples)
        parts.append("EXAMPLES:\n" + examples)
    parts.append("OPTIONS:\n" + _flag_table((*command.flags, HELP_FLAG)))
    parts.append("GLOBAL OPTIONS:\n" + _flag_table(GLOBAL_FLAGS))
    return "\n".join(parts)


def group_help(group: str) -> str:
    commands = [
        (command.name.split()[1], command.help)
        for command in COMMANDS
        if command.name.startswith(group + " ")
    ]
    return (
        f"NAME:\n  {group} - {GROUPS[group]}\n\nUSAGE:\n  {PROGRAM} {group} <subcommand>\n\n"
        f"COMMANDS:\n{_command_table(commands)}\n"
        f"More: {PROGRAM} {group} <subcommand> --help\n"
    )


def program_help() -> str:
    commands = sorted((command.name, command.help) for command in COMMANDS)
    return (
        f"NAME:\n  {PROGRAM} - the command line client of etcdlite\n\n"
        f"USAGE:\n  {PROGRAM} [global options] <command> [options] [arguments]\n\n"
        f"VERSION:\n  {__version__}\n\n"
        f"COMMANDS:\n{_command_table(commands)}\n"
        f"GLOBAL OPTIONS:\n{_flag_table((*GLOBAL_FLAGS, HELP_FLAG))}\n"
        f"Global options can stand in the environment, as {ENVIRONMENT_PREFIXES[0]}ENDPOINTS\n"
        f"(or {ENVIRONMENT_PREFIXES[1]}ENDPOINTS) and so on.\n\n"
        f"FIRST AID:\n"
        f"  {PROGRAM} endpoint status --cluster -w table   who is there, who leads, how large\n"
        f"  {PROGRAM} endpoint health --cluster            who can serve\n"
        f"  {PROGRAM} alarm list                           NOSPACE: compact, defrag, disarm\n"
        f"  {PROGRAM} snapshot save backup.db              before anything else is tried\n\n"
        f"More about a command: {PROGRAM} <command> --help\n"
    )


_BASH_COMPLETION = """# etcdlite-ctl completion for {shell}
{prelude}_etcdlite_ctl() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" names="" i
    for ((i = 1; i < COMP_CWORD; i++)); do
        [[ "${{COMP_WORDS[i]}}" == -* ]] || names+="${{names:+ }}${{COMP_WORDS[i]}}"
    done
    local choices=""
    case "$names" in
{cases}    esac
    if [[ "$word" == -* ]]; then
        choices+=" {global_flags}"
    elif [[ "$choices" != *" words"* ]]; then
        choices=""
    fi
    COMPREPLY=($(compgen -W "${{choices/ words/}}" -- "$word"))
    if [[ "$word" == --*= || ${{#COMPREPLY[@]}} -eq 0 ]]; then
        compopt -o default 2>/dev/null
    fi
}}
complete -F _etcdlite_ctl etcdlite-ctl
"""


def completion_script(shell: str) -> str:
    """The script for bash; zsh runs it too, behind its bashcompinit."""

    def words(flags: Sequence[Flag]) -> str:
        return " ".join(f"--{flag.name}" for flag in flags)

    cases = []
    top = " ".join(sorted({command.name.split()[0] for command in COMMANDS}))
    cases.append(f'        "") choices="{top} words" ;;\n')
    for group in GROUPS:
        inner = [c.name.split()[1] for c in COMMANDS if c.name.startswith(group + " ")]
        cases.append(f'        "{group}") choices="{" ".join(inner)} words" ;;\n')
    for command in COMMANDS:
        if command.name == "completion":
            cases.append('        "completion") choices="bash zsh words" ;;\n')
        elif command.flags:
            name = command.name
            cases.append(f'        "{name}"|"{name} "*) choices="{words(command.flags)}" ;;\n')
    return _BASH_COMPLETION.format(
        shell=shell,
        prelude="autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "",
        cases="".join(cases),
        global_flags=words((*GLOBAL_FLAGS, HELP_FLAG)),
    )


# main.


def _command_words(words: Sequence[str]) -> list[int]:
    """Where the first two words that are neither flags nor values of flags stand."""
    takes_value = {
        name
        for command in COMMANDS
        for flag in (*command.flags, *GLOBAL_FLAGS)
        if flag.kind != "bool"
        for name in (f"--{flag.name}", f"-{flag.short}")
    }
    found: list[int] = []
    position = 0
    while position < len(words) and len(found) < 2 and words[position] != "--":
        if words[position].startswith("-") and len(words[position]) > 1:
            position += words[position] in takes_value
        else:
            found.append(position)
        position += 1
    return found


def find_command(words: Sequence[str]) -> tuple[Command | str | None, list[str]]:
    """(the command, a group's name, or None for the program itself; the other words).

    Raises Failure for a command that does not exist.
    """
    positions = _command_words(words)
    names = [words[position] for position in positions]
    for count in (2, 1):
        name = " ".join(names[:count])
        if len(names) >= count and name in COMMAND_BY_NAME:
            taken = positions[:count]
            others = [word for index, word in enumerate(words) if index not in taken]
            return COMMAND_BY_NAME[name], others
    if not names:
        return None, list(words)
    if names[0] == "help":
        found, _ = find_command([*words[: positions[0]], *words[positions[0] + 1 :]])
        return found, ["--help"]
    if " ".join(names) in NOT_YET or names[0] in NOT_YET:
        name = " ".join(names) if " ".join(names) in NOT_YET else names[0]
        text = f"{name} is not available in this version of {PROGRAM}"
        raise Failure(EXIT_BAD_FEATURE, text)
    if names[0] in GROUPS and len(names) == 1:
        return names[0], [word for index, word in enumerate(words) if index not in positions]
    if names[0] in GROUPS:
        known = [command for command in COMMAND_BY_NAME if command.startswith(names[0] + " ")]
        name, see = " ".join(names), f"{PROGRAM} {names[0]} --help"
    else:
        known = [*COMMAND_BY_NAME, *GROUPS]
        name, see = names[0], f"{PROGRAM} --help"
    hint = did_you_mean(name, known) or f" (see {see})"
    raise Failure(EXIT_FAILED, f'unknown command "{name}" for "{PROGRAM}"{hint}')


def _flags_of(command: Command, given: Mapping[str, Any]) -> dict[str, Any]:
    """All flags' values: given, from the environment, default. Raises Failure for refused ones."""
    flags = (*GLOBAL_FLAGS, *command.flags)
    values = {flag.name: flag.default for flag in flags}
    values |= environment_flags(os.environ)
    values |= given
    for flag in GLOBAL_FLAGS:
        if flag.name in REFUSED_FLAGS and values[flag.name] != flag.default:
            text = f"--{flag.name} is refused: {REFUSED_FLAGS[flag.name]} of etcdlite"
            raise Failure(EXIT_BAD_ARGUMENTS, text)
    if values["write-out"] not in PRINTERS:
        text = f"unsupported output format {values['write-out']} (known: {', '.join(PRINTERS)})"
        raise Failure(EXIT_BAD_FEATURE, text)
    if not values["endpoints"]:
        raise Failure(EXIT_BAD_ARGUMENTS, "--endpoints names no endpoint")
    return values


def run(words: Sequence[str]) -> int:
    """Run a command line. Raises Failure and what a command raises."""
    command, others = find_command(words)
    if not isinstance(command, Command):
        parse_flags(others, GLOBAL_FLAGS)
        sys.stdout.write(program_help() if command is None else group_help(command))
        return 0
    try:
        arguments, before_dashes, given = parse_flags(others, (*GLOBAL_FLAGS, *command.flags))
    except BadFlag as error:
        raise Failure(EXIT_FAILED, f"{error}; see {PROGRAM} {command.name} --help") from None
    if given.get("help"):
        sys.stdout.write(command_help(command))
        return 0
    session = Session(arguments, before_dashes, _flags_of(command, given))
    if command.prints and not session.printer.supports(command.prints):
        text = f"{session.printer.name} not supported as output format"
        raise Failure(EXIT_BAD_FEATURE, f"{text} of {command.name}")
    try:
        return command.run(session)
    except EtcdliteError as error:
        raise Failure(EXIT_FAILED, describe(error, session.client().endpoint)) from None
    finally:
        session.close()


def main(argv: Sequence[str] | None = None) -> int:
    """The `etcdlite-ctl` command; gives its exit status."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except Failure as failure:
        if failure.text:
            say(f"Error: {failure.text}")
        return failure.status
    except BadFlag as error:
        say(f"Error: {error}; see {PROGRAM} --help")
        return EXIT_FAILED
    except BrokenPipeError:
        # Whoever read standard output has gone; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        say(f"Error: {os_error_text(error)}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        # The shell wants to know that it was the signal.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
