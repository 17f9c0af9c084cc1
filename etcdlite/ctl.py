"""etcdlite-ctl: the command line client, with etcdctl 3.5's commands, arguments and output.

This file finds the command, and runs it. The parts are in etcdlite/cli/; `table` has the commands.

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
from etcdlite.cli import flags
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
from etcdlite.cli.flags import Command
from etcdlite.cli.table import COMMAND_BY_NAME, COMMANDS, GROUPS, INSTEAD, REFUSED, in_group

# Finding the command.


def _command_words(words: Sequence[str]) -> list[int]:
    """The positions of the first two words that are neither flags nor values of flags."""
    takes_value = {
        name
        for command in COMMANDS
        for flag in (*command.flags, *flags.GLOBAL_FLAGS)
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
        second = _resolve(names[1], (command.name.split()[1] for command in in_group(top)))
        taken, found = positions, COMMAND_BY_NAME.get(f"{top} {second}")
    if found is not None:
        return found, [word for index, word in enumerate(words) if index not in taken]
    if top in GROUPS:
        name, see = f"{top} {names[1]}", f"{PROGRAM} {top} --help"
        known = [command.name for command in in_group(top)]
    else:
        name, see, known = names[0], f"{PROGRAM} --help", [*COMMAND_BY_NAME, *GROUPS]
    if name in INSTEAD:
        hint = f" (did you mean {INSTEAD[name]}?)"
    else:
        hint = flags.did_you_mean(name, known) or f" (see {see})"
    raise Failure(f'unknown command "{name}" for "{PROGRAM}"{hint}')


# Running it.


def _print_help(command: Command | str | None) -> None:
    from etcdlite.cli import help as texts

    if command is None:
        sys.stdout.write(texts.program_help())
    elif isinstance(command, str):
        sys.stdout.write(texts.group_help(command))
    else:
        sys.stdout.write(texts.command_help(command))


def _print_version(arguments: Sequence[str]) -> None:
    api = ETCD_API_VERSION.rpartition(".")[0]
    sys.stdout.write(f"{PROGRAM} version: {__version__}\nAPI version: {api}\n")


def _print_completion(arguments: Sequence[str]) -> None:
    from etcdlite.cli.help import SHELLS, completion_script

    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise BadArguments("completion needs the name of the shell: bash, fish or zsh")
    sys.stdout.write(completion_script(arguments[0]))


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
        arguments, before_dashes, given = flags.parse_flags(others, (*flags.GLOBAL_FLAGS, *own))
    except flags.BadFlag as error:
        raise Failure(f"{error}; see {PROGRAM} {name}--help") from None
    if not isinstance(command, Command) or given.get("help"):
        _print_help(command)
        return 0
    values = flags.flag_values(command.flags, given, os.environ)
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
