"""etcdlite-ctl: the command line client, with etcdctl 3.5's commands, arguments and output.

This file has the table of commands and `main`. The parts are in etcdlite/cli/.

The exit status is etcdctl's (docs/etcdlite-ctl.md). Ended by a signal, it ends by that signal.

Invariants: standard output holds nothing but results, in etcdctl's bytes; every failure is one
line on standard error that names the cause and, when a server was involved, the endpoint;
progress is shown only on a terminal; a flag that cannot be honoured is refused, never ignored.

Only what a command needs is imported: starting must be cheap, because shell loops call it.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence

from etcdlite import ETCD_API_VERSION, __version__
from etcdlite.cli.data_commands import DATA_COMMANDS
from etcdlite.cli.failures import (
    EXIT_BAD_CONNECTION,
    EXIT_BAD_FEATURE,
    EXIT_FAILED,
    PROGRAM,
    BadArguments,
    Failure,
    interruptible,
    os_error_text,
    say,
)
from etcdlite.cli.flags import (
    CLUSTER_FLAG,
    CONSISTENCY_FLAG,
    DEL_FLAGS,
    FROM_KEY_FLAG,
    GET_FLAGS,
    GLOBAL_FLAGS,
    INTERACTIVE_FLAG,
    KEY_FILE_FLAG,
    PEER_URLS_FLAG,
    PREFIX_FLAG,
    PUT_FLAGS,
    WATCH_FLAGS,
    BadFlag,
    Command,
    Flag,
    did_you_mean,
    flag_values,
    parse_flags,
)


def _check_flags(name: str) -> tuple[Flag, ...]:
    return (
        Flag("load", "string", "s", "s(mall), m(edium), l(arge) or xl"),
        Flag("prefix", "string", f"/etcdctl-check-{name}/", "prefix of the check's keys"),
        Flag("auto-compact", "bool", False, "compact the history afterwards"),
        Flag("auto-defrag", "bool", False, "defragment the endpoints afterwards"),
    )


_CERT_FLAGS = (
    Flag("dir", "string", "certs", "the directory of the CA and of all certificates"),
    Flag("days", "int", None, "how long it is valid (default: a CA 3650 days, others 365)"),
    Flag("force", "bool", False, "replace files that exist"),
)
_PERMISSION_FLAGS = (PREFIX_FLAG, FROM_KEY_FLAG)
_PASSWORD_FLAG = Flag("interactive", "bool", True, "false: read the password from standard input")
_HOST_FLAG = Flag("host", "list", (), "its host names and addresses (default: this machine's name)")

COMMANDS = (
    Command("put [options] <key> <value>  (without a value, it is read from standard input)",
            "Put a key", "commands.put", PUT_FLAGS, "put",
            "A value that begins with '-' must follow '--'.",
            ("put greeting hello", "put -- offset -5", "put config < config.json")),
    Command("get [options] <key> [range_end]",
            "Get a key or a range of keys", "commands.get", GET_FLAGS, "get",
            "With range_end: key <= k < range_end.",
            ("get greeting", "get /config/ --prefix --keys-only",
             "get '' --prefix --limit 10 -w json", "get greeting --rev 5",
             "get /config/ --prefix --count-only -w fields")),
    Command("del [options] <key> [range_end]", "Delete a key or a range of keys", "commands.delete",
            DEL_FLAGS, "delete", "Prints how many keys were deleted.",
            ("del greeting", "del /config/ --prefix --prev-kv")),
    Command("txn [options]", "Run a transaction", "commands.txn", (INTERACTIVE_FLAG,), "txn",
            "Reads three blocks of lines from standard input, each ended by an empty line:\n"
            "comparisons, requests if all hold, requests if not. A comparison is\n"
            'target("key") op "value". Targets: mod, create, version, value, lease.\n'
            "Operators: = != < >. A request is a put, get or del as on the command line;\n"
            "words in double quotes may contain Go's escapes. The blocks may have labels as\n"
            "tutorials show them, lines such as compares: and success requests (get, put, del):",
            ("txn <<'END'\nmod(\"greeting\") > \"0\"\n\nput greeting \"hello again\"\n\n"
             "put greeting hello\nget greeting\n\nEND",)),
    Command("watch [options] [key] [range_end] [-- command [argument ...]]",
            "Watch keys for changes", "watch.watch", (*WATCH_FLAGS, INTERACTIVE_FLAG), "watch",
            "The command is run for each event, with ETCD_WATCH_REVISION,\n"
            "ETCD_WATCH_EVENT_TYPE, ETCD_WATCH_KEY and ETCD_WATCH_VALUE in its environment.\n"
            "The key may come from ETCDLITE_CTL_WATCH_KEY (and _RANGE_END). After a broken\n"
            "connection the watch continues where it stopped. -i reads lines with watch and\n"
            "progress commands from standard input.",
            ("watch greeting", "watch /config/ --prefix --rev 1",
             "watch /config/ --prefix -- sh -c 'echo $ETCD_WATCH_KEY'")),
    Command("compaction [options] <revision>",
            "Remove the history before a revision", "commands.compaction",
            (Flag("physical", "bool", False, "wait until the history is gone from the disk"),),
            description="History before the revision can no longer be read or watched.",
            examples=("compaction 1234",)),
    Command("defrag [options]", "Defragment the storage of the endpoints", "commands.defrag",
            (CLUSTER_FLAG,
             Flag("data-dir", "string", "", "instead: the directory of a member that is stopped"),
             Flag("wal-dir", "string", "", "directory of its log (default: in --data-dir)"),
             KEY_FILE_FLAG),
            description="Returns free space to the disk while the member continues to serve.",
            examples=("defrag", "defrag --cluster")),
    Command("lease grant <ttl in seconds>",
            "Create a lease", "commands.lease_grant", prints="lease_grant",
            examples=("lease grant 60", "put --lease 694d77aa9e38260f key value")),
    Command("lease revoke <leaseID>",
            "Revoke a lease", "commands.lease_revoke", prints="lease_revoke",
            description="The attached keys are deleted."),
    Command("lease timetolive <leaseID> [options]", "Show a lease", "commands.lease_time_to_live",
            (Flag("keys", "bool", False, "show the attached keys"),), "lease_time_to_live"),
    Command("lease list", "List all leases", "commands.lease_list", prints="lease_list"),
    Command("lease keep-alive [options] <leaseID>",
            "Keep a lease alive", "commands.lease_keep_alive",
            (Flag("once", "bool", False, "renew it once and end"),), "lease_keep_alive",
            "Renews the lease after each third of its TTL, until it is revoked or a signal ends\n"
            "the command."),
    Command("alarm list", "List the alarms", "commands.alarm_list", prints="alarm"),
    Command("alarm disarm", "Disarm all alarms", "commands.alarm_disarm", prints="alarm",
            description="NOSPACE comes back unless space is made: compaction, then defrag."),
    Command("endpoint health [options]", "Check whether the endpoints can serve",
            "commands.endpoint_health", (CLUSTER_FLAG,), "endpoint_health",
            "A healthy member serves a linearizable read and has no alarm.",
            ("endpoint health --cluster -w table",)),
    Command("endpoint status [options]", "Show the status of the endpoints",
            "commands.endpoint_status", (CLUSTER_FLAG,), "endpoint_status",
            "In the simple format: endpoint, ID, version, db size, is leader, is learner,\n"
            "raft term, raft index, raft applied index, errors.",
            ("endpoint status --cluster -w table",)),
    Command("endpoint hashkv [options]", "Show a hash of the history of each endpoint",
            "commands.endpoint_hashkv",
            (CLUSTER_FLAG, Flag("rev", "int", 0, "up to this revision (0: all)")),
            "endpoint_hashkv"),
    Command("member list [options]", "List the members", "commands.member_list",
            (CONSISTENCY_FLAG,), "member_list",
            "In the simple format: ID, status, name, peer addresses,\n"
            "client addresses, is learner."),
    Command("member add <memberName> [options]", "Add a member", "commands.member_add",
            (PEER_URLS_FLAG,
             Flag("learner", "bool", False, "the new member does not vote until promoted")),
            "member_add",
            "Prints the environment to start the new member with. Start it before you add\n"
            "another one.", ("member add m4 --peer-urls=http://10.0.0.4:2380",)),
    Command("member remove <memberID or name>",
            "Remove a member", "commands.member_remove", prints="member_changed",
            description="The member stops, and its data directory becomes useless."),
    Command("member update <memberID or name> [options]",
            "Change a member's peer URLs", "commands.member_update", (PEER_URLS_FLAG,),
            "member_changed"),
    Command("member promote <memberID or name>",
            "Make a learner a voting member", "commands.member_promote", prints="member_changed",
            description="The learner must have caught up with the leader."),
    Command("move-leader <memberID or name>",
            "Transfer leadership to another member", "commands.move_leader",
            (CLUSTER_FLAG,), "move_leader",
            "Without --cluster, one of --endpoints must be the leader's."),
    *DATA_COMMANDS,
    Command("lock [options] <lockname> [command [argument ...]]",
            "Hold a lock, until a signal or while a command runs", "locks.lock",
            (Flag("ttl", "int", 10, "seconds until the lock is free if this process dies"),), "get",
            "Prints the key of the lock once it is held, and holds it until a signal; or runs\n"
            "the command, with ETCD_LOCK_KEY and ETCD_LOCK_REV in its environment, and ends as\n"
            "the command does. Flags of the command follow '--'.",
            ("lock nightly", "lock nightly -- rsync -a data/ backup:")),
    Command("elect [options] <election-name> [proposal]",
            "Take part in an election, or observe it", "locks.elect",
            (Flag("listen", "bool", False, "only show the leaders", "l"),), "get",
            examples=("elect scheduler $(hostname)", "elect -l scheduler")),
    Command("check perf [options]",
            "Check the performance of the cluster", "check.check_perf", _check_flags("perf"),
            description="Puts 1 KiB values for a minute and judges rate and latency. Loads:\n"
            "s 150/s, m 1000/s, l 8000/s, xl 15000/s. Deletes its keys afterwards."),
    Command("check datascale [options]",
            "Check how a server's memory grows with its data", "check.check_datascale",
            _check_flags("datascale"),
            description="Loads: s 10,000, m 100,000, l 1,000,000, xl 3,000,000 keys of 1 KiB.\n"
            "Needs the first endpoint's /metrics. Deletes its keys afterwards."),
    Command("doctor [options]", "Find what is wrong with the cluster and this machine",
            "doctor.doctor",
            (Flag("server-config", "string", "", "the configuration of the member on this machine "
                  "(default: that of the package)"),), "doctor",
            "Prints a line for each finding: what, why it matters, what to do. The status is 0\n"
            "without findings, 1 for warnings, 2 for errors. As root it sees the most.",
            ("doctor", "doctor --server-config /etc/etcdlite/m1.toml -w json")),
    Command("top [options]", "Show members, rates and the keys that change most, live", "top.top",
            (Flag("interval", "duration", 2.0, "time between two looks"),
             Flag("count", "int", 0, "print this many snapshots as text (0: one, or on a terminal "
                  "a live screen)"),
             Flag("depth", "int", 2, "parts of a key that make a prefix (0: whole keys)")), "top",
            "On a terminal, q ends it. The rates of puts, deletes and transactions are those of\n"
            "the whole cluster. What changes is seen by a watch of all keys, of a sample if there\n"
            "are many changes.",
            ("top", "top --count 1 --interval 5s --depth 3")),
    Command("user add [options] <user name or user:password>", "Add a user", "users.user_add",
            (_PASSWORD_FLAG,
             Flag("new-user-password", "string", "", "the password (seen by others)"),
             Flag("no-password", "bool", False, "a user who logs in by certificate only")),
            "done", "Without a password on the command line, it is asked for on the terminal.",
            ("user add root", "user add alice --interactive=false < password.txt")),
    Command("user delete <user name>", "Delete a user", "users.user_delete", prints="done"),
    Command("user get [options] <user name>", "Show a user", "users.user_get",
            (Flag("detail", "bool", False, "show the permissions of the roles"),), "user_get"),
    Command("user list", "List the users", "users.user_list", prints="user_list"),
    Command("user passwd [options] <user name>", "Change a user's password", "users.user_passwd",
            (_PASSWORD_FLAG,),
            "done"),
    Command("user grant-role <user name> <role name>", "Give a user a role",
            "users.user_grant_role", prints="done", examples=("user grant-role alice readers",)),
    Command("user revoke-role <user name> <role name>", "Take a role from a user",
            "users.user_revoke_role", prints="done"),
    Command("role add <role name>", "Add a role", "users.role_add", prints="done"),
    Command("role delete <role name>", "Delete a role", "users.role_delete", prints="done"),
    Command("role get <role name>", "Show a role", "users.role_get", prints="role_get"),
    Command("role list", "List the roles", "users.role_list", prints="role_list"),
    Command("role grant-permission [options] <role name> <permission type> <key> [endkey]",
            "Allow a role to read or write keys", "users.role_grant_permission",
            _PERMISSION_FLAGS, "done", "The permission type is read, write or readwrite.",
            ("role grant-permission readers read /config/ --prefix",)),
    Command("role revoke-permission [options] <role name> <key> [endkey]",
            "Take a permission from a role", "users.role_revoke_permission", _PERMISSION_FLAGS,
            "role_revoke_permission",
            "The range must be the one that was granted."),
    Command("auth enable", "Make users and roles count", "users.auth_enable",
            description="From then on each request needs a user, whose roles say what is allowed.\n"
            "There must be a user root, who gets the role root if he does not have it. With\n"
            "--user, checks that this user can log in.",
            examples=("user add root", "auth enable --user root")),
    Command("auth disable", "Let everybody do everything", "users.auth_disable"),
    Command("auth status", "Show whether users count", "users.auth_status", prints="auth_status"),
    Command("cert init [options] [name]", "Make a CA", "cert.init", _CERT_FLAGS,
            description="Makes ca.crt and ca.key, for certificates of members and clients in a\n"
            "lab.", examples=("cert init", "cert init --dir /root/certs 'Lab CA'")),
    Command("cert server [options] <name>", "Make a member's certificate for its clients",
            "cert.server", (*_CERT_FLAGS, _HOST_FLAG),
            description="It is also for localhost, 127.0.0.1 and ::1. Prints the settings of the\n"
            "server that use it.", examples=("cert server m1 --host m1.lab,10.0.0.1",)),
    Command("cert peer [options] <name>", "Make a member's certificate for the other members",
            "cert.peer", (*_CERT_FLAGS, _HOST_FLAG),
            description="It is also for localhost, 127.0.0.1 and ::1. Prints the settings of the\n"
            "server that use it.", examples=("cert peer m1 --host m1.lab,10.0.0.1",)),
    Command("cert client [options] <user>", "Make a client's certificate", "cert.client",
            (*_CERT_FLAGS, Flag("host", "list", (), "its host names and addresses (none needed)")),
            description="The name is the user, if auth is enabled. Prints the flags that use it.",
            examples=("cert client alice",)),
    Command("setup [options] <name>=<host> ...", "Make the files of the members of a cluster",
            "setup.setup",
            (Flag("dir", "string", "members", "where to write the archives and what they need"),
             Flag("secret", "bool", False, "secure it with shared secrets, not with certificates"),
             Flag("join", "bool", False, "a member that was added to the running cluster"),
             Flag("days", "int", None, "how long the certificates are valid (default: 3650 days)")),
            description="Writes an archive for each member: its configuration, its certificates\n"
            "or secrets, and the options of etcdlite-ctl there. On the machine, as root:\n"
            "tar -C / -xf m1.tar",
            examples=("setup m1=10.0.0.1 m2=10.0.0.2 m3=10.0.0.3", "setup --join m4=10.0.0.4")),
    Command("secret new [file]", "Make a file with a new shared secret", "keys.new_secret",
            description="The file (default: etcdlite.secret) has mode 0600; one that exists is\n"
            "kept. Prints the settings of the server that use it.",
            examples=("secret new /etc/etcdlite/peer.secret",)),
    Command("key new [file]", "Make a file with a new key for data at rest", "keys.new",
            description="The file has mode 0600; one that exists is kept. Without a file, prints\n"
            "the key.", examples=("key new /etc/etcdlite/data.keys",)),
    Command("key add <file>", "Put a new key first in a file of keys", "keys.add",
            description="The first key writes, the others read what it has not replaced yet.",
            examples=("key add /etc/etcdlite/data.keys",)),
    Command("key identity [file]", "Make an identity for encrypted backups", "keys.identity",
            description="Prints the public key, for snapshot save --encrypt-to. The identity, in\n"
            "a file of mode 0600, is for snapshot restore --identity. Without a file, prints both.",
            examples=("key identity backup.identity",)),
    Command("rekey [options]", "Encrypt a member's data with the first key", "keys.rekey",
            (Flag("data-dir", "string", "default.etcdlite", "the directory of the member"),
             Flag("wal-dir", "string", "", "directory of the log (default: in --data-dir)"),
             KEY_FILE_FLAG,
             Flag("check", "bool", False, "only show which keys are needed; also for a running "
                  "member")),
            description="The member must be stopped. After it, the other keys can be removed from\n"
            "the file. With --check, the status is 1 if that is not so yet.",
            examples=("rekey --data-dir m1.etcdlite --encryption-key-file data.keys",)),
    Command("version", "Print the version", ""),
    Command("completion <bash|fish|zsh>", "Print the completion script for a shell", "",
            examples=("completion bash > /etc/bash_completion.d/etcdlite-ctl",)),
)  # fmt: skip

COMMAND_BY_NAME = {command.name: command for command in COMMANDS}
GROUPS = {
    "lease": "Leases",
    "alarm": "Alarms",
    "endpoint": "Health, status and data of each endpoint",
    "member": "The members of the cluster",
    "snapshot": "Backups",
    "check": "Checks under load",
    "user": "Users and their roles",
    "role": "Roles and their permissions",
    "auth": "Whether users and roles count",
    "cert": "A CA and certificates for labs",
    "key": "Keys for data at rest and for backups",
    "secret": "Secrets that members, or clients and members, share",
    "downgrade": "Go back to the previous version of etcdlite",
}

REFUSED = {
    "backup": "it saves the data of etcd's API v2, which is not here; see snapshot save",
    "migrate": "a data directory has the format of the cluster version, which 'downgrade' lowers",
}
"""Commands of etcdctl and etcdutl that are not here, and why. They count for prefixes."""

INSTEAD = {"set": "put", "mk": "put", "rm": "del", "ping": "endpoint health"} | dict.fromkeys(
    ("ls", "keys"), "get --prefix --keys-only"
)
"""The command here for one of other programs, such as etcdctl for API v2. They are never prefixes:
"set" is not short for setup."""


# Finding the command.


def _command_words(words: Sequence[str]) -> list[int]:
    """The positions of the first two words that are neither flags nor values of flags."""
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


def _resolve(word: str, names: Iterable[str]) -> str:
    """The name that `word` is, or the only one that it is a prefix of (as cobra's
    EnablePrefixMatching does); else empty."""
    matches = [name for name in dict.fromkeys(names) if name.startswith(word)]
    if word in matches:
        return word
    return matches[0] if len(matches) == 1 else ""


def _in_group(group: str) -> list[Command]:
    return [command for command in COMMANDS if command.name.startswith(group + " ")]


def find_command(words: Sequence[str]) -> tuple[Command | str | None, list[str]]:
    """(the command, a group's name, or None for the program itself; the other words).

    Raises Failure for a command that does not exist."""
    positions = _command_words(words)
    if not positions:
        return (COMMAND_BY_NAME["version"], []) if "--version" in words else (None, list(words))
    names = [words[position] for position in positions]
    tops = (*(command.name.split()[0] for command in COMMANDS), *REFUSED, "help")
    top = "" if names[0] in INSTEAD else _resolve(names[0], tops)
    if top == "help" or (not top and "help".startswith(names[0])):  # As in etcdctl.
        found, _ = find_command([*words[: positions[0]], *words[positions[0] + 1 :]])
        return found, ["--help"]
    if top in REFUSED:
        raise Failure(f"{PROGRAM} has no command {top}: {REFUSED[top]}", EXIT_BAD_FEATURE)
    taken, found = positions[:1], COMMAND_BY_NAME.get(top)
    if top in GROUPS and len(names) == 1:
        found = top
    elif top in GROUPS:
        second = _resolve(names[1], (command.name.split()[1] for command in _in_group(top)))
        taken, found = positions, COMMAND_BY_NAME.get(f"{top} {second}")
    if found is not None:
        return found, [word for index, word in enumerate(words) if index not in taken]
    if top in GROUPS:
        name, see = f"{top} {names[1]}", f"{PROGRAM} {top} --help"
        known = [command.name for command in _in_group(top)]
    else:
        name, see, known = names[0], f"{PROGRAM} --help", [*COMMAND_BY_NAME, *GROUPS]
    if name in INSTEAD:
        hint = f" (did you mean {INSTEAD[name]}?)"
    else:
        hint = did_you_mean(name, known) or f" (see {see})"
    raise Failure(f'unknown command "{name}" for "{PROGRAM}"{hint}')


# Running it.


def _print_help(command: Command | str | None) -> None:
    from etcdlite.cli import help as texts

    if command is None:
        sys.stdout.write(texts.program_help(COMMANDS))
    elif isinstance(command, str):
        sys.stdout.write(texts.group_help(command, GROUPS[command], _in_group(command)))
    else:
        sys.stdout.write(texts.command_help(command))


def _print_version(arguments: Sequence[str]) -> None:
    api = ETCD_API_VERSION.rpartition(".")[0]
    sys.stdout.write(f"{PROGRAM} version: {__version__}\nAPI version: {api}\n")


def _print_completion(arguments: Sequence[str]) -> None:
    from etcdlite.cli.help import SHELLS, completion_script

    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise BadArguments("completion needs the name of the shell: bash, fish or zsh")
    sys.stdout.write(completion_script(arguments[0], COMMANDS, GROUPS))


_OWN: dict[str, Callable[[Sequence[str]], None]] = {
    "version": _print_version,
    "completion": _print_completion,
}
"""The commands that need no session."""


def run(words: Sequence[str]) -> int:
    """Run a command line. Raises Failure and what a command raises."""
    command, others = find_command(words)
    name, own = (f"{command.name} ", command.flags) if isinstance(command, Command) else ("", ())
    try:
        arguments, before_dashes, given = parse_flags(others, (*GLOBAL_FLAGS, *own))
    except BadFlag as error:
        raise Failure(f"{error}; see {PROGRAM} {name}--help") from None
    if not isinstance(command, Command) or given.get("help"):
        _print_help(command)
        return 0
    values = flag_values(command.flags, given, os.environ)
    if not command.run:
        _OWN[command.name](arguments)
        return 0
    # Imports make many objects and no garbage: without the collector they take 7 % less.
    gc.disable()
    from etcdlite.cli.session import Session, describe
    from etcdlite.client import EtcdliteError
    from etcdlite.client.errors import AuthFailed
    from etcdlite.errors import Explained

    module, function = command.run.split(".")
    run_command = getattr(importlib.import_module(f"etcdlite.cli.{module}"), function)
    gc.enable()
    session = Session(arguments, before_dashes, values)
    if command.prints:
        session.check_format(command.prints, command.name)
    try:
        with interruptible():
            status: int | None = run_command(session)
        return status or 0
    except EtcdliteError as error:
        text = describe(error, session.client().endpoint)
        # etcdctl logs in while it connects.
        status = EXIT_BAD_CONNECTION if isinstance(error, AuthFailed) else EXIT_FAILED
        raise Failure(text + session.why_unanswered(error), status) from None
    except Explained as error:
        raise Failure(str(error)) from None
    except UnicodeError as error:  # Of names and passwords; keys and values are bytes.
        raise BadArguments(f"this must be text in UTF-8: {error}") from None
    finally:
        session.close()


def main(argv: Sequence[str] | None = None) -> int:
    """The `etcdlite-ctl` command. Returns its exit status."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    try:
        status = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except Failure as failure:
        if failure.text:
            say(f"Error: {failure.text}")
        return failure.status
    except ModuleNotFoundError as error:
        say(f"Error: {error}. Install it, on Debian with 'apt install python3-{error.name}'")
        return EXIT_FAILED
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:  # Python would complain about it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        say(f"Error: {os_error_text(error)}")
        return EXIT_FAILED
    except KeyboardInterrupt as interrupt:
        # The shell must see that the signal ended the program.
        signum = interrupt.args[0] if interrupt.args else signal.SIGINT
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return 128 + int(signum)


if __name__ == "__main__":
    sys.exit(main())
