"""What `etcdlite-ctl top` shows: two looks at the members become lines of text. No input or output,
so the same lines go to a terminal and to a pipe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from etcdlite.cli.changes import Changes
from etcdlite.cli.failures import one_line
from etcdlite.cli.roster import Seen
from etcdlite.cli.scrape import Series
from etcdlite.client.errors import part
from etcdlite.notation import format_size

MAX_CELL_CHARS = 24
UNKNOWN = "-"


class View(NamedTuple):
    """Two looks at all members, and what changed."""

    before: Sequence[Seen]
    now: Sequence[Seen]
    changes: Changes
    unix_s: float

    def _series_before(self, seen: Seen) -> Series | None:
        return next((before.series for before in self.before if before.name == seen.name), None)

    def rate(self, seen: Seen, name: str) -> float | None:
        """What a counter of a member grew by in a second; None if that is not known."""
        before = self._series_before(seen)
        if before is None or seen.series is None:
            return None
        old, new = before.value(name), seen.series.value(name)
        elapsed_s = seen.series.monotonic_s - before.monotonic_s
        if old is None or new is None or new < old or elapsed_s <= 0:
            return None
        return (new - old) / elapsed_s

    def sync_s(self, seen: Seen, share: float) -> float | None:
        """This share of the syncs since the look before took no longer."""
        name = "etcdlite_log_sync_duration_seconds"
        before = self._series_before(seen)
        if before is None or seen.series is None:
            return None
        added = seen.series.histogram(name).since(before.histogram(name))
        return added.quantile(share) if added.count else None


def _number(value: float | None) -> str:
    """Three digits of a number: 0.25, 12.3, 456, 12k."""
    if value is None:
        return UNKNOWN
    if value >= 10_000:
        return f"{value / 1e6:.1f}M" if value >= 1e6 else f"{value / 1000:.0f}k"
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.3g}"


def _ms(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else f"{_number(1000 * seconds)} ms"


def _size(size_bytes: float | None) -> str:
    return UNKNOWN if size_bytes is None else format_size(int(size_bytes))


def _value(seen: Seen, name: str) -> float | None:
    return seen.series.value(name) if seen.series is not None else None


def _role(view: View, seen: Seen) -> str:
    if seen.status.leader == seen.member_id:
        return "leader"
    return "learner" if seen.is_learner else "follower"


def _lag(view: View, seen: Seen) -> str:
    answering = [other for other in view.now if other.status is not None]
    committed = max(other.status.raftIndex for other in answering)
    return str(max(0, committed - seen.status.raftAppliedIndex))


_Column = tuple[str, Callable[[View, Seen], str]]

COLUMNS: tuple[_Column, ...] = (
    ("MEMBER", lambda view, seen: one_line(seen.name)[:MAX_CELL_CHARS]),
    ("ROLE", _role),
    ("ANSWER", lambda view, seen: _ms(seen.took_s)),
    ("SYNC 50%", lambda view, seen: _ms(view.sync_s(seen, 0.5))),
    ("99%", lambda view, seen: _ms(view.sync_s(seen, 0.99))),
    ("LAG", _lag),
    ("RANGES/S", lambda view, seen: _number(view.rate(seen, "etcd_mvcc_range_total"))),
    ("EVENTS/S", lambda view, seen: _number(view.rate(seen, "etcd_debugging_mvcc_events_total"))),
    ("CLIENTS", lambda view, seen: _number(_value(seen, "etcdlite_connections"))),
    ("WATCHES", lambda view, seen: _number(_value(seen, "etcd_debugging_mvcc_watcher_total"))),
    ("DATA", lambda view, seen: _size(seen.status.dbSize)),
    ("MEMORY", lambda view, seen: _size(_value(seen, "process_resident_memory_bytes"))),
    ("CPU", lambda view, seen: _percent(view.rate(seen, "process_cpu_seconds_total"))),
)
"""Of the table of members: heading, and the cell of a member that answers."""


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0%}"


def lines(view: View) -> list[str]:
    """The screen, for any width."""
    return [*_head(view), "", *_members(view), "", *_changes(view.changes)]


def _head(view: View) -> list[str]:
    members = view.now
    answering = [seen for seen in members if seen.status is not None]
    leader = next((s.name for s in answering if s.status.leader == s.member_id), "")
    clock = time.strftime("%H:%M:%S", time.localtime(view.unix_s))
    parts = [
        clock,
        f"{len(answering)} of {len(members)} members answer",
        f"leader {one_line(leader)[:MAX_CELL_CHARS]}" if leader else "NO LEADER",
    ]
    if answering:
        # The member that has applied the most shows what the cluster has.
        first = max(answering, key=lambda seen: seen.status.raftAppliedIndex)
        quota = first.status.dbSizeQuota
        parts.append(f"revision {part(first.status).revision}")
        rates = [
            f"{_number(view.rate(first, f'etcd_mvcc_{kind}_total'))} {kind}s/s"
            for kind in ("put", "delete", "txn")
        ]
        ranges = [view.rate(seen, "etcd_mvcc_range_total") for seen in answering]
        known = [rate for rate in ranges if rate is not None]
        rates.append(f"{_number(math.fsum(known) if known else None)} ranges/s")
        sizes = [
            f"{_number(_value(first, 'etcd_debugging_mvcc_keys_total'))} keys",
            f"{_number(_value(first, 'etcdlite_leases'))} leases",
            f"{_size(first.status.dbSizeInUse)} in use" + (f" of {_size(quota)}" if quota else ""),
        ]
        found = dict.fromkeys(text.strip() for seen in answering for text in seen.status.errors)
        problems = [f"! {one_line(text)}" for text in list(found)[:3]]
        return ["  ".join(parts), "  ".join(rates + sizes), *problems]
    return ["  ".join(parts)]


def _members(view: View) -> list[str]:
    rows = [[heading for heading, _ in COLUMNS]]
    rest: dict[int, str] = {}
    for seen in view.now:
        if seen.status is None:
            rest[len(rows)] = f"  does not answer: {one_line(seen.error)}"
            rows.append([one_line(seen.name)[:MAX_CELL_CHARS]])
        else:
            rows.append([cell(view, seen) for _, cell in COLUMNS])
    widths = [max(len(row[n]) for row in rows if n < len(row)) for n in range(len(COLUMNS))]
    out = []
    for number, row in enumerate(rows):
        # Names and roles begin at the left, figures end at the right.
        cells = (
            cell.ljust(width) if n < 2 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=False))
        )
        out.append(("  ".join(cells) + rest.get(number, "")).rstrip())
    return out


def _changes(changes: Changes) -> list[str]:
    if changes.error:
        return [f"CHANGES/S  not seen: {one_line(changes.error)}"]
    sampled = f"  (a sample: {changes.share:.0%} of the time)" if 0 < changes.share < 0.95 else ""
    out = [f"CHANGES/S  KEY OR PREFIX{sampled}"]
    for prefix, rate in changes.rates:
        out.append(f"{_number(rate):>9}  {one_line(prefix.decode('utf-8', 'backslashreplace'))}")
    return out
