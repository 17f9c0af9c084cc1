"""`etcdlite-ctl top`: a live view of the cluster. On a terminal it is a screen until "q";
elsewhere, or with --count, it prints snapshots as text.

The members are looked at in a thread of their own, so that the keyboard is served while one of them
does not answer.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from etcdlite.cli.changes import ChangeWatch
from etcdlite.cli.failures import BadArguments, Failure
from etcdlite.cli.roster import Roster, Seen
from etcdlite.cli.session import Session
from etcdlite.cli.top_view import View, lines

MIN_INTERVAL_S = 0.2
MAX_INTERVAL_S = 3600.0

MAX_DEPTH = 20

KEY_S = 0.1
"""The keyboard is looked at this often."""


def top(session: Session) -> None:
    session.need(0, "top command accepts no arguments")
    interval_s, count = session.flags["interval"], session.flags["count"]
    if not MIN_INTERVAL_S <= interval_s <= MAX_INTERVAL_S:
        raise BadArguments(f"--interval: give {MIN_INTERVAL_S:g}s to {MAX_INTERVAL_S:g}s")
    if count < 0 or not 0 <= session.flags["depth"] <= MAX_DEPTH:
        raise BadArguments(f"--count must not be negative, and --depth 0 to {MAX_DEPTH}")
    client = session.client_for(session.endpoints)
    with (
        contextlib.closing(Roster(session)) as roster,
        contextlib.closing(ChangeWatch(client, session.flags["depth"], interval_s / 2)) as watch,
    ):
        if count or not sys.stdout.isatty():
            _print(session, roster, watch, count or 1)
        else:
            _show(roster, watch, interval_s)


def _looks(roster: Roster, watch: ChangeWatch) -> Iterator[View]:
    """What each look at the members shows, together with the look before it."""
    before: list[Seen] = []
    while True:
        now = roster.look()
        yield View(before or now, now, watch.seen, time.time())
        before = now


def _print(session: Session, roster: Roster, watch: ChangeWatch, count: int) -> None:
    looks = _looks(roster, watch)
    next(looks)
    for number in range(count):
        time.sleep(session.flags["interval"])
        session.show("top", ([""] if number else []) + lines(next(looks)))


def _show(roster: Roster, watch: ChangeWatch, interval_s: float) -> None:
    import curses
    import locale

    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_ALL, "")
    try:
        curses.wrapper(_run_screen, _looks(roster, watch), interval_s)
    except curses.error as error:
        raise Failure(f"this terminal cannot show a screen ({error}): use --count 1") from None


def _run_screen(screen: Any, looks: Iterator[View], interval_s: float) -> None:
    import curses

    with contextlib.suppress(curses.error):
        curses.curs_set(0)
    screen.timeout(int(1000 * KEY_S))
    shown = ["looking at the members ..."]
    next_look = 0.0
    pending: Future[View] | None = None
    pool = ThreadPoolExecutor(1)
    try:
        while screen.getch() not in (ord("q"), ord("Q")):
            if pending is None and time.monotonic() >= next_look:
                next_look = time.monotonic() + interval_s
                pending = pool.submit(next, looks)
            elif pending is not None and pending.done():
                shown, pending = lines(pending.result()), None
            _draw(screen, [*shown, "", "q: quit"])
    finally:
        # A look that is under way ends when the connections are closed.
        pool.shutdown(wait=False)


def _draw(screen: Any, shown: list[str]) -> None:
    import curses

    height, width = screen.getmaxyx()
    screen.erase()
    for row, line in enumerate(shown[:height]):
        is_heading = not row or line.startswith(("MEMBER ", "CHANGES/S", "! "))
        # The last cell of the screen cannot be written.
        with contextlib.suppress(curses.error):
            screen.addnstr(row, 0, line, width - 1, curses.A_BOLD if is_heading else 0)
    screen.refresh()
