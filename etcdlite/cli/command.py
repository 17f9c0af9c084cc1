"""A row of etcdlite-ctl's table of commands."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from etcdlite.cli.flags import Flag


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
        words = itertools.takewhile(lambda word: word[0] not in "<[", self.usage.split())
        return " ".join(words)
