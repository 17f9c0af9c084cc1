"""`etcdlite-ctl doctor`: gathers facts about the cluster and this machine, and tells what is wrong.

Standard output has one line for each finding, and nothing if there is none. What could not be
looked at is one line on standard error. The exit status is the worst severity (`findings.py`).
"""

from __future__ import annotations

import contextlib
import time

from etcdlite import backup_status
from etcdlite.cli import findings, machine
from etcdlite.cli.failures import one_line, say
from etcdlite.cli.findings import Facts
from etcdlite.cli.flags import GLOBAL_FLAGS
from etcdlite.cli.roster import Roster, Seen
from etcdlite.cli.session import Session
from etcdlite.client import EtcdliteError

LAG_S = 2.0
"""A member that has not applied an entry this long after the leader committed it lags."""

LAG_RETRY_S = 0.1

_DEFAULT_ENDPOINTS = next(flag.default for flag in GLOBAL_FLAGS if flag.name == "endpoints")


def doctor(session: Session) -> int:
    session.need(0, "doctor command accepts no arguments")
    facts = _gather(session)
    found = findings.examine(facts)
    unseen = [one_line(text) for text in facts.unseen]
    session.show("doctor", found, unseen)
    if unseen and session.printer.format == "simple":
        say(f"Not looked at: {', '.join(unseen)}")
    return max((finding.severity for finding in found), default=0)


def _gather(session: Session) -> Facts:
    file = session.flags["server-config"]
    here = machine.look(file, is_named=bool(file))
    unseen = []
    if here is None:
        unseen.append("this machine (it has no configuration file; see --server-config)")
    elif here.config is not None and session.endpoints == _DEFAULT_ENDPOINTS:
        session.use_endpoints(here.config.advertise_client_urls)
    with contextlib.closing(Roster(session)) as roster:
        members = roster.look()
        lags = _lags(roster, members)
    if roster.error:
        unseen.append(roster.error)
    for seen in members:
        if seen.status is not None and seen.series is None:
            unseen.append(f"the metrics of {seen.name} ({seen.series_error})")
    facts = Facts(time.time(), tuple(members), lags, LAG_S, here)
    if facts.unscraped_machine is not None:
        machine.probe_disk(facts.unscraped_machine)
    if here is not None:
        unseen += here.unseen
    is_told = any(series.all(name) for _, series in facts.scraped for name in backup_status.NAMES)
    if not is_told and (facts.machine is None or not facts.machine.backup):
        unseen.append("backups (no member reports one; see etcdlite-backup.timer)")
    return facts._replace(now_s=time.time(), unseen=tuple(unseen))


def _lags(roster: Roster, members: list[Seen]) -> dict[str, int]:
    """How many entries each member lacks that were committed before it got `LAG_S` for them."""
    answering = {seen.name: seen for seen in members if seen.status is not None}
    applied = {name: seen.status.raftAppliedIndex for name, seen in answering.items()}
    committed = max((seen.status.raftIndex for seen in answering.values()), default=0)
    ends = time.monotonic() + LAG_S
    while behind := [name for name, index in applied.items() if index < committed]:
        if time.monotonic() > ends:
            break
        time.sleep(LAG_RETRY_S)
        for name in behind:
            with contextlib.suppress(EtcdliteError):
                status, _ = roster.status((answering[name].endpoint,))
                applied[name] = status.raftAppliedIndex
    return {name: committed - applied[name] for name in behind}
