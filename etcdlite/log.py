"""The log: one line for each event, to stderr by default.

    log.info("ready to serve client requests", address="127.0.0.1:2379")

In JSON a line is one object: `level`, `ts` (UTC, milliseconds), `caller`, `msg` and then the
fields, with etcd's names. For people ("console") a line is time, level, message, fields; when
journald reads the stream, its priority prefix replaces time and level.

Invariants
- A line has at most MAX_LINE_BYTES with its newline, and only printable characters: whatever a
  client sent, a line stays one line and moves no cursor. Fields that do not fit are shortened in
  the middle, then left out.
- Logging never raises and never waits for a reader. A line that an output does not accept at once
  is lost and counted; the count is the field `lost-lines` of the next line.
- The value of a field whose name looks like a secret's is never written.
- `_` in the name of a field is written as `-`, as in most of etcd's fields.
- Logging never ends the process: `fatal` is a level here, not an action.
"""

from __future__ import annotations

import json
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from etcdlite.wall_clock import unix_s

DEBUG, INFO, WARN, ERROR, PANIC, FATAL = range(6)

_LEVEL_NAMES = ("debug", "info", "warn", "error", "panic", "fatal")
LEVELS = dict(zip(_LEVEL_NAMES, range(6), strict=True))
FORMATS = ("json", "console")

MAX_LINE_BYTES = select.PIPE_BUF
"""A write of this size to a pipe is never mixed with another writer's, and does not block once the
pipe polls writable (pipe(7))."""

MAX_ITEMS = 64
"""The most items of a list or mapping that are written; the others are counted."""

MAX_LIMITED_KEYS = 1024
"""The most keys that `limited` remembers."""

_MAX_DEPTH = 4
_LENGTHS = (3000, 1000, 100)
"""The most characters of one value: the first of these for which the line fits."""

_JOURNAL_PRIORITY = ("<7>", "<6>", "<4>", "<3>", "<2>", "<2>")
_SECRET = re.compile("password|passwd|secret|token|credential", re.IGNORECASE)
_QUOTED = re.compile(r'[\s"\\=]|^$')


def debug(message: str, /, **fields: Any) -> None:
    if _level <= DEBUG:
        _write(DEBUG, message, fields)


def info(message: str, /, **fields: Any) -> None:
    if _level <= INFO:
        _write(INFO, message, fields)


def warn(message: str, limit: str = "", per_s: float = 1.0, /, **fields: Any) -> None:
    """With `limit`, a key, at most `per_s` lines with that key are written in a second (`limited`);
    so in `error`."""
    if _level <= WARN and not (limit and limited(limit, per_s)):
        _write(WARN, message, fields)


def error(message: str, limit: str = "", per_s: float = 1.0, /, **fields: Any) -> None:
    if _level <= ERROR and not (limit and limited(limit, per_s)):
        _write(ERROR, message, fields)


def fatal(message: str, /, **fields: Any) -> None:
    """For a reason not to start or not to continue. The caller ends the process."""
    _write(FATAL, message, fields)


def configure(
    level: str = "info",
    format: str = "console",
    outputs: Iterable[str] = ("stderr",),
    clock: Callable[[], float] = unix_s,
) -> None:
    """Set the level, format and outputs of the whole process.

    `outputs` are "stderr", "stdout" or paths of files to append to. `clock` gives seconds since
    1970. Raises OSError when a file cannot be opened (then nothing is changed), KeyError or
    ValueError for an unknown level or format."""
    global _level, _format, _outputs, _clock, _in_journal
    number = LEVELS[level]
    if format not in FORMATS:
        raise ValueError(f"unknown log format {format}")
    opened: list[int] = []
    try:
        for output in outputs:
            opened.append(_FIXED[output] if output in _FIXED else _open(output))
    except OSError:
        _close(opened)
        raise
    before = _outputs
    _limited_until.clear()
    _level, _format, _outputs, _clock = number, format, tuple(opened), clock
    _in_journal = frozenset(fd for fd in opened if _is_journal(fd))
    _close(before)  # Last: a thread that logs must not find a number that is another file's now.


def limited(key: str, per_s: float = 1.0) -> bool:
    """Whether to omit a line about `key`, because this function returned False for it less than
    1/per_s seconds ago."""
    now = _clock()
    interval_s = 1 / per_s
    # The clock may be set back: an end too far ahead does not count.
    if 0 < _limited_until.get(key, 0.0) - now <= interval_s:
        return True
    if len(_limited_until) >= MAX_LIMITED_KEYS:
        _limited_until.clear()
    _limited_until[key] = now + interval_s
    return False


def lost_lines() -> int:
    """The number of lines that an output did not accept since the process started."""
    return _lost


def quoted(text: str, max_chars: int = 200) -> str:
    """`text` on one line: shortened, and in double quotes with escapes if it contains spaces,
    quotes or characters that do not print."""
    text = shorten(text, max_chars)
    if not text.isprintable():
        return json.dumps(text)
    return json.dumps(text, ensure_ascii=False) if _QUOTED.search(text) else text


def shorten(text: str, max_chars: int) -> str:
    """About `max_chars` of a text, from its head and its tail: a value begins with what matters,
    and a stack trace ends with it."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}...({len(text) - 2 * half} more characters)...{text[-half:]}"


_FIXED = {"stdout": 1, "stderr": 2}
_level = INFO
_format = "console"
_outputs: tuple[int, ...] = (2,)
_in_journal: frozenset[int] = frozenset()
_clock: Callable[[], float] = unix_s
_lost = 0
_lost_reported = 0
_limited_until: dict[str, float] = {}


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        if fd > 2:
            os.close(fd)


def _is_journal(fd: int) -> bool:
    """Whether journald reads `fd` (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _write(level: int, message: str, fields: dict[str, Any]) -> None:
    global _lost, _lost_reported
    try:
        frame = sys._getframe(2)
        path = frame.f_code.co_filename.split(os.sep)
        caller = f"{'/'.join(path[-2:])}:{frame.f_lineno}"
        seconds, milliseconds = divmod(round(_clock() * 1000), 1000)
        day_and_time = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        stamp = f"{day_and_time}.{milliseconds:03d}Z"
        lost = _lost
        if lost > _lost_reported:
            fields["lost_lines"] = lost - _lost_reported
        complete = True
        for fd in _outputs:
            complete &= _put(fd, _line(level, stamp, caller, message, fields, fd in _in_journal))
        if complete:
            _lost_reported = lost
    except Exception:
        # A value that cannot be shown, or a clock out of range, must not fail the caller.
        _lost += 1


def _put(fd: int, line: bytes) -> bool:
    """Write a line. Returns whether `fd` accepted all of it at once."""
    global _lost
    # A closed stderr, a reader that is gone, a full disk: it cannot be reported.
    with suppress(OSError):
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if poll.poll(0) and os.write(fd, line) == len(line):
            return True
    _lost += 1
    return False


def _line(
    level: int, stamp: str, caller: str, message: str, fields: dict[str, Any], journal: bool
) -> bytes:
    """The line, shortened until it fits."""
    render = _json if _format == "json" else _console
    for length in _LENGTHS:
        shown = {
            name.replace("_", "-"): _shown(name, value, length, 0) for name, value in fields.items()
        }
        line = render(level, stamp, caller, shorten(message, length), shown, journal)
        if len(line) <= MAX_LINE_BYTES:
            return line
    return render(level, stamp, caller, shorten(message, length), {"truncated": True}, journal)


def _json(
    level: int, stamp: str, caller: str, message: str, fields: dict[str, Any], journal: bool
) -> bytes:
    record = {"level": _LEVEL_NAMES[level], "ts": stamp, "caller": caller, "msg": message}
    for name, value in fields.items():
        record[name + "-" if name in record else name] = value
    return json.dumps(record, separators=(",", ":")).encode("ascii") + b"\n"


def _console(
    level: int, stamp: str, caller: str, message: str, fields: dict[str, Any], journal: bool
) -> bytes:
    if not message.isprintable():
        message = json.dumps(message)
    head = _JOURNAL_PRIORITY[level] if journal else f"{stamp} {_LEVEL_NAMES[level].upper():5} "
    parts = [head + message]
    for name, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts.append(f"{quoted(name)}={quoted(text, MAX_LINE_BYTES)}")
    if _level == DEBUG:
        parts.append(f"({caller})")
    return "  ".join(parts).encode("utf-8", "backslashreplace") + b"\n"


def _shown(name: str, value: Any, length: int, depth: int) -> Any:
    return "<redacted>" if _SECRET.search(name) else _plain(value, length, depth)


def _plain(value: Any, length: int, depth: int) -> Any:
    """`value` as JSON, each string limited to about `length` characters."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        # JSON has neither infinity nor NaN.
        return value if abs(value) < float("inf") else str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return shorten(bytes(value[: 4 * length]).decode("utf-8", "backslashreplace"), length)
    if isinstance(value, (dict, list, tuple)) and depth == _MAX_DEPTH:
        return "..."
    if isinstance(value, dict):
        shown = {
            shorten(str(name), 100): _shown(str(name), item, length, depth + 1)
            for name, item in list(value.items())[:MAX_ITEMS]
        }
        if len(value) > MAX_ITEMS:
            shown["..."] = f"{len(value) - MAX_ITEMS} more"
        return shown
    if isinstance(value, (list, tuple)):
        items = [_plain(item, length, depth + 1) for item in value[:MAX_ITEMS]]
        return items + [f"{len(value) - MAX_ITEMS} more"] * (len(value) > MAX_ITEMS)
    if isinstance(value, BaseException):
        return shorten(str(value) or type(value).__name__, length)
    return shorten(str(value), length)
