"""How a command ends: exit statuses, and one line on standard error for each failure."""

from __future__ import annotations

import sys

PROGRAM = "etcdlite-ctl"

EXIT_FAILED = 1
EXIT_BAD_CONNECTION = 2
EXIT_BAD_INPUT = 3
EXIT_BAD_FEATURE = 4
EXIT_INTERRUPTED = 5
EXIT_BAD_ARGUMENTS = 128


class Failure(Exception):
    """The command ends with `status` and one line on standard error (none if `text` is empty)."""

    def __init__(self, text: str, status: int = EXIT_FAILED) -> None:
        super().__init__(text)
        self.text = text
        self.status = status


class BadArguments(Failure):
    """The command line has wrong arguments."""

    def __init__(self, text: str) -> None:
        super().__init__(text, EXIT_BAD_ARGUMENTS)


def say(line: str) -> None:
    """Print one line on standard error."""
    print(line, file=sys.stderr, flush=True)


def os_error_text(error: OSError) -> str:
    """The error in lower case, after the file's name if it has one."""
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{(error.strerror or str(error)).lower()}"
