"""How a command ends: exit statuses, one line on standard error for each failure, and signals."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

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


def one_line(text: str) -> str:
    """`text` with escapes for what does not print: texts of servers and users must not control the
    terminal. Surrogates stay: they are bytes of the command line."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or "\ud800" <= char <= "\udfff" else ascii(char)[1:-1]
        for char in text
    )


def say(line: str) -> None:
    """Print one line on standard error."""
    print(one_line(line), file=sys.stderr, flush=True)


def os_error_text(error: OSError) -> str:
    """The error in lower case, after the file's name if it has one."""
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{(error.strerror or str(error)).lower()}"


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that a command removes unfinished
    files and releases its locks. Those that are ignored stay ignored."""
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    is_main = threading.current_thread() is threading.main_thread()
    caught = [s for s in ending if is_main and signal.getsignal(s) == signal.SIG_DFL]
    for signum in caught:
        signal.signal(signum, _interrupt)
    try:
        yield
    finally:
        for signum in caught:
            signal.signal(signum, signal.SIG_DFL)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt(signum)
