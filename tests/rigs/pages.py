"""The command blocks of a page of the documentation, and how they run, in order, as written.

A block is fenced with ```sh (commands) or ```console (commands after "$ ", and what they print). A
comment before it says what a test must know and a reader sees from the text:

    <!-- test: host=b -->           on which machine it runs (default a); a,b,c: on each at once
    <!-- test: background -->       a server in a terminal of its own: goes on when it is ready to
                                    serve; Ctrl-C stops the one of the block before
    <!-- test: answers=x,y -->      what is typed when a password is asked for
    <!-- test: for=5 -->            it goes on until Ctrl-C, which comes after this many seconds
    <!-- test: until="COMMAND" -->  the same, but Ctrl-C comes when the command succeeds
    <!-- test: fails -->            the last command must fail
    <!-- test: skip REASON -->      it does not run
    <!-- test: file=PATH -->        before a block of another language: its text is written to PATH

and without a block:

    <!-- test: stop -->             Ctrl-C in the terminal of the server
    <!-- test: kill host=c -->      the machine c loses its power
    <!-- test: run COMMAND -->      what happened before, and the reader cannot repeat
    <!-- test: serve COMMAND -->    the same for a server, which goes on

In the output of a console block, `...` stands for anything, and a line `...` for any lines. Output
is only compared where the page shows it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

FENCE = "```"
COMMANDS = ("sh", "console")
LANGUAGES = (*COMMANDS, "toml", "yaml", "json", "python", "text", "ini")
"""Every block has one of them: a block of commands cannot hide."""

MARKER = re.compile(r"<!-- test: (.*?) -->\n", re.S)
SEPARATOR = "\x01"
INTERRUPTED = (124, 130)
"""Statuses of a command that `timeout` ended, and of one that got SIGINT."""

INTERRUPT_WHEN = """\
running=$(mktemp)
( until {{ {command}; }} >/dev/null 2>&1; do sleep 0.2; done; kill -INT "$(cat $running)" ) &
bash -c 'echo $$ > "$0"; exec timeout --signal=INT 60 bash -e' "$running" <<'THE_END'
{script}THE_END
"""
"""`timeout` passes the signal on to what it runs."""


class Step(NamedTuple):
    """A block, or something that happens between blocks."""

    page: str
    line: int
    language: str
    """Of the block; empty for what happens between blocks."""
    text: str
    verb: str = ""
    """stop, kill, run, serve, skip, background, file, or empty."""
    argument: str = ""
    hosts: tuple[str, ...] = ("a",)
    answers: tuple[str, ...] = ()
    fails: bool = False
    seconds: int = 0
    until: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


class Machine(Protocol):
    """Where commands run."""

    def run(self, script: str, answers: tuple[str, ...] = ()) -> tuple[int, str]:
        """(status, output) of a script of bash. Variables that it exports, and its directory, are
        those of the next script."""

    def serve(self, script: str) -> None:
        """Run a server in a terminal of its own until it is ready."""

    def interrupt(self) -> None:
        """Ctrl-C in that terminal."""

    def kill(self) -> None:
        """Cut the power."""

    def write(self, path: str, text: str) -> None: ...


class Lab(Protocol):
    def machine(self, name: str) -> Machine:
        """The machine of that name, booted when it is first needed."""


def steps(path: Path) -> list[Step]:
    """What the page says, in order. Raises AssertionError for a block without a known language."""
    text = path.read_text(encoding="utf-8")
    found: list[Step] = []
    position = 0
    pattern = re.compile(rf"{MARKER.pattern}|^( *){FENCE}(\S*)\n(.*?)^ *{FENCE}\n", re.M | re.S)
    pending: tuple[str, int] | None = None
    for match in pattern.finditer(text):
        number = text.count("\n", 0, match.start()) + 1
        between = text[position : match.start()].strip()
        position = match.end()
        if match[1] is not None:
            assert pending is None, f"{path.name}:{number}: two markers for one block"
            step = _marked(Step(path.name, number, "", ""), match[1])
            if step.verb in ("stop", "kill", "run", "serve"):
                found.append(step)
            else:
                pending = (match[1], number)
            continue
        assert match[3] in LANGUAGES, f"{path.name}:{number}: say what language the block is in"
        body = "".join(line.removeprefix(match[2]) for line in match[4].splitlines(keepends=True))
        step = Step(path.name, number, match[3], body)
        if pending is not None:
            assert not between, f"{path.name}:{pending[1]}: no block follows the marker"
            step = _marked(step, pending[0])
            pending = None
        if step.language in COMMANDS or step.verb == "file":
            found.append(step)
    assert pending is None, f"{path.name}: no block follows the last marker"
    return found


def _marked(step: Step, marker: str) -> Step:
    words = marker.split()
    if words[0] in ("skip", "run", "serve"):
        rest = marker.partition(" ")[2].strip()
        hosts = step.hosts
        if rest.startswith("host="):
            host, _, rest = rest.partition(" ")
            hosts = tuple(host.removeprefix("host=").split(","))
        assert rest, f"{step.place}: say why, or what"
        return step._replace(verb=words[0], argument=rest, hosts=hosts)
    for word in shlex.split(marker):
        name, _, value = word.partition("=")
        if name == "host":
            step = step._replace(hosts=tuple(value.split(",")))
        elif name == "answers":
            step = step._replace(answers=tuple(value.split(",")))
        elif name == "for":
            step = step._replace(seconds=int(value))
        elif name == "until":
            step = step._replace(until=value)
        elif name == "fails":
            step = step._replace(fails=True)
        elif name in ("background", "stop", "kill", "file"):
            step = step._replace(verb=name, argument=value)
        else:
            raise AssertionError(f"{step.place}: unknown marker {word!r}")
    return step


class Command(NamedTuple):
    text: str
    shown: str
    """What the page says that it prints."""


def commands(console: str) -> list[Command]:
    """The commands of a console block."""
    found: list[Command] = []
    for line in console.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:], ""))
        else:
            assert found, f"output before the first command: {line!r}"
            last = found[-1]
            if last.text.endswith("\\") or _is_open(last.text):
                found[-1] = Command(f"{last.text}\n{line.removeprefix('> ')}", "")
            else:
                found[-1] = Command(last.text, f"{last.shown}{line}\n")
    return found


def _is_open(text: str) -> bool:
    """Whether a here-document has not ended."""
    begin = re.search(r"<<'?(\w+)'?", text)
    return bool(begin) and not re.search(rf"^{begin[1]}$", text, re.M)


def matches(shown: str, printed: str) -> bool:
    """Whether the output is the one that the page shows. Members answer in the order of their IDs,
    which are random: the lines may have another order."""
    lines = printed.rstrip().splitlines()
    wanted = [_pattern(line) for line in shown.rstrip().splitlines()]
    if ANY_LINES in wanted:
        pattern = "".join("(.*\n)*?" if w == ANY_LINES else f"{w}\n" for w in wanted)
        return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)) is not None
    for line in lines:
        found = next((pattern for pattern in wanted if re.fullmatch(pattern, line)), None)
        if found is None:
            return False
        wanted.remove(found)
    return not wanted


ANY_LINES = ".*?"


def _pattern(line: str) -> str:
    return re.escape(line.rstrip()).replace(r"\.\.\.", ANY_LINES)


class Failed(AssertionError):
    """A command of a page failed. The text says where, and what it printed."""


def run(path: Path, lab: Lab) -> Iterator[str]:
    """Carry out the page. Yields a line for each step that ran. Raises Failed."""
    for step in steps(path):
        if step.verb == "skip":
            continue
        with ThreadPoolExecutor(len(step.hosts)) as pool:
            for line in pool.map(lambda host: _carry_out(step, lab.machine(host)), step.hosts):  # noqa: B023
                if line:
                    raise Failed(f"{step.place}: {line}\n{step.text or step.argument}")
        first = (step.text or step.argument or step.verb).splitlines()[0]
        yield f"{step.place} {','.join(step.hosts)}: {first}"


def _carry_out(step: Step, machine: Machine) -> str:
    """Returns what is wrong, or nothing."""
    if step.verb == "kill":
        machine.kill()
    elif step.verb == "stop":
        machine.interrupt()
    elif step.verb == "file":
        machine.write(step.argument, step.text)
    elif step.verb in ("background", "serve"):
        machine.interrupt()
        machine.serve(step.text or step.argument)
    elif step.language == "console":
        return _carry_out_console(step, machine)
    else:
        script = step.text or step.argument
        if step.seconds:
            script = f"timeout --signal=INT {step.seconds} bash -e <<'THE_END'\n{script}THE_END\n"
        elif step.until:
            script = INTERRUPT_WHEN.format(command=step.until, script=script)
        status, printed = machine.run(script, step.answers)
        if (step.seconds and status in INTERRUPTED) or (step.until and status == INTERRUPTED[1]):
            status = 0
        if (status != 0) != step.fails:
            return f"status {status}, printed:\n{printed[-3000:]}\nof:"
    return ""


def _carry_out_console(step: Step, machine: Machine) -> str:
    wanted = commands(step.text)
    script = "".join(f"printf '{SEPARATOR}'\n{command.text}\n" for command in wanted)
    status, printed = machine.run(script, step.answers)
    if (status != 0) != step.fails:
        return f"status {status}, printed:\n{printed[-3000:]}\nof:"
    for command, output in zip(wanted, printed.split(SEPARATOR)[1:], strict=True):
        if command.shown and not matches(command.shown, output):
            return f"'{command.text}' printed this, and not what the page shows:\n{output}\nof:"
    return ""
