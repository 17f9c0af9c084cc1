"""The checks of `etcdlite-ctl doctor`: from facts to findings, without input or output.

`CHECKS` is the table; docs/etcdlite-ctl.md has its thresholds. A check that lacks a fact finds
nothing: what could not be seen is listed in `Facts.unseen`. The figures of a member come from its
metrics. Those of this machine are used where the member of its configuration shows none, so that
nothing is found twice.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from etcdlite import backup_status
from etcdlite.cli.failures import one_line
from etcdlite.cli.machine import Machine
from etcdlite.cli.roster import Seen
from etcdlite.cli.scrape import Series
from etcdlite.cli.session import WARN_DAYS
from etcdlite.listeners import LOW_FILES
from etcdlite.notation import format_size
from etcdlite.replica.alarms import DISK_RESERVE_BYTES

WARNING, ERROR = 1, 2
SEVERITIES = {WARNING: "warning", ERROR: "error"}

DAY_S = 86_400.0

LOW_SPACE_BYTES = 256 << 20
"""Less space on the disk, beyond the reserve, is worth a warning."""

MAX_QUOTA_SHARE = 0.8
"""More of the quota in use is worth a warning."""

MIN_SYNCS = 20
"""Fewer syncs say nothing about a disk."""

SLOW_MEDIAN_S = 0.05
SLOW_TAIL_S = 1.0
"""A disk is slow if half of the syncs take longer than the first, or one in a hundred longer than
the second."""

MAX_CLOCK_S = 1.0
"""Clocks may differ by this much, beyond the uncertainty of the measurement."""

BAD_CLOCK_S = 60.0
"""More is an error: certificates and tokens are judged by the clock."""

MAX_BACKUP_AGE_S = 2 * DAY_S
"""Two nights without a backup."""

MIN_GARBAGE_BYTES = 32 << 20
MAX_GARBAGE_SHARE = 0.5
"""More garbage than both is fragmentation. Less is left to the cleaning in the background."""

MAX_FILES_SHARE = 0.8
"""More of the limit of open files in use is an error."""

_ALARM = re.compile(r"(?:memberID:(\d+) )?alarm:(\w+) ?")


class Finding(NamedTuple):
    """What is wrong, why it matters, and what to do."""

    severity: int
    """WARNING or ERROR."""
    check: str
    """A key of `CHECKS`."""
    where: str
    """A member, a file, or "the cluster"."""
    what: str
    why: str
    to_do: str

    @property
    def members(self) -> dict[str, str]:
        """As JSON."""
        return self._asdict() | {"severity": SEVERITIES[self.severity]}

    @property
    def line(self) -> str:
        return f"{SEVERITIES[self.severity]}: {self.where}: {self.what}; {self.why}; {self.to_do}"


class Facts(NamedTuple):
    now_s: float
    """Unix time on this machine."""
    members: tuple[Seen, ...] = ()
    """Those of the cluster, or of the endpoints if the members are not known."""
    lags: Mapping[str, int] = {}
    """By the name of a member: entries that it had not applied some time after the leader had."""
    lag_s: float = 0.0
    """That time."""
    machine: Machine | None = None
    unseen: tuple[str, ...] = ()
    """What could not be looked at, a few words each."""

    @property
    def answering(self) -> list[Seen]:
        return [member for member in self.members if member.status is not None]

    @property
    def scraped(self) -> list[tuple[str, Series]]:
        """(name, metrics) of each member that shows them."""
        return [(seen.name, seen.series) for seen in self.members if seen.series is not None]

    @property
    def unscraped_machine(self) -> Machine | None:
        """The machine, if its own member shows no metrics."""
        machine = self.machine
        if machine is None or machine.config is None:
            return machine
        return None if machine.config.name in (name for name, _ in self.scraped) else machine

    def name_of(self, member_id: int) -> str:
        names = (seen.name for seen in self.members if seen.member_id == member_id)
        return next(names, f"{member_id:x}" if member_id else "the cluster")


_Findings = Iterator[tuple[int, str, str, str, str]]
"""A finding without the name of its check."""


def _configuration(facts: Facts) -> _Findings:
    if facts.machine is not None:
        why = {ERROR: "the member does not start", WARNING: "the member runs, perhaps not as meant"}
        for severity, texts in ((ERROR, facts.machine.problems), (WARNING, facts.machine.warnings)):
            for text in texts:
                what, _, to_do = text.removeprefix(f"{facts.machine.file}: ").rpartition("; ")
                yield (severity, facts.machine.file, what or text, why[severity],
                       to_do if what else "see etcdlite --check-config")  # fmt: skip


def _modes(facts: Facts) -> _Findings:
    machine = facts.machine
    if machine is None:
        return
    if found := machine.open_to_others:
        yield (
            ERROR, found[0],
            "other users may use it" + (f" and {len(found) - 1} more" if found[1:] else ""),
            "it holds keys, values or a private key", "chmod -R go-rwx, or restart the member",
        )  # fmt: skip
    if machine.foreign:
        yield (
            ERROR, machine.foreign[0],
            f"it has another owner than {machine.reference}",
            "the member may be unable to use it and stop",
            f"chown -R --reference={machine.reference} {machine.data_dir}",
        )  # fmt: skip


def _space(facts: Facts) -> _Findings:
    left = [
        (name, value)
        for name, series in facts.scraped
        if (value := series.value("etcdlite_disk_left_bytes")) is not None
    ]
    machine = facts.unscraped_machine
    if machine is not None and machine.disk[1]:
        reserve = min(DISK_RESERVE_BYTES, machine.disk[1] // 10)
        left.append((machine.data_dir, machine.disk[0] - reserve))
    for where, value in left:
        if value <= 0:
            yield (
                ERROR, where, "the disk is full",
                "puts are refused; without any space, every write waits",
                "free space on it, then etcdlite-ctl alarm disarm",
            )  # fmt: skip
        elif value < LOW_SPACE_BYTES:
            yield (
                WARNING, where, f"the disk has space for {format_size(int(value))} more",
                "writes are refused when it is full", "free space on it, or move to a larger one",
            )  # fmt: skip


def _quota(facts: Facts) -> _Findings:
    quotas = {seen.name: seen.status.dbSizeQuota for seen in facts.answering}
    if len(set(quotas.values())) > 1:
        shown = ", ".join(f"{name} {format_size(quota)}" for name, quota in quotas.items())
        yield (
            WARNING, "the cluster", f"the members have different quotas ({shown})",
            "the smallest stops writes on all", "set quota-backend-bytes to one value",
        )  # fmt: skip
    for seen in facts.answering:
        quota, used = seen.status.dbSizeQuota, seen.status.dbSizeInUse
        left = seen.series.value("etcdlite_disk_left_bytes") if seen.series is not None else None
        if not quota:
            continue
        if used > MAX_QUOTA_SHARE * quota:
            yield (
                WARNING, seen.name, f"{used / quota:.0%} of the quota is in use",
                "writes are refused when all is used",
                "delete or compact, or raise quota-backend-bytes on all members",
            )  # fmt: skip
        elif left is not None and quota - used > left > 0:
            yield (
                WARNING, seen.name,
                f"the quota ({format_size(quota)}) is more than the disk has space for "
                f"({format_size(int(used + left))})",
                "the disk is full before the quota stops writes",
                "lower quota-backend-bytes on all members, or use a larger disk",
            )  # fmt: skip


def _disk(facts: Facts) -> _Findings:
    measured = []
    for name, series in facts.scraped:
        histogram = series.histogram("etcdlite_log_sync_duration_seconds")
        if histogram.count >= MIN_SYNCS:
            measured.append((name, histogram.quantile(0.5), histogram.quantile(0.99)))
    machine = facts.unscraped_machine
    if machine is not None and len(machine.syncs_s) > 1:
        slowest = max(machine.syncs_s)
        measured.append((machine.data_dir, statistics.median(machine.syncs_s), slowest))
    for where, median_s, tail_s in measured:
        if median_s > SLOW_MEDIAN_S or tail_s > SLOW_TAIL_S:
            yield (
                WARNING, where,
                f"the disk is slow: a sync takes about {1000 * median_s:.0f} ms, at worst about "
                f"{1000 * tail_s:.0f} ms",
                "every write waits for one", "use an SSD, or keep other work off this disk",
            )  # fmt: skip


def _certificates(facts: Facts) -> _Findings:
    ends: dict[tuple[str, str], float] = {}
    for name, series in facts.scraped:
        for labels, value in series.all("etcdlite_certificate_expiry_timestamp_seconds"):
            ends[name, labels.get("file", "")] = value
    for seen in facts.answering:
        if seen.certificate_ends_s is not None and not any(where == seen.name for where, _ in ends):
            ends[seen.name, "for clients"] = seen.certificate_ends_s
    machine = facts.unscraped_machine
    if machine is not None:
        ends.update({("this machine", path): end for path, end in machine.certificates.items()})
    for (where, path), end in ends.items():
        left_s = end - facts.now_s
        day = time.strftime("%Y-%m-%d", time.gmtime(end))
        if left_s < WARN_DAYS * DAY_S:
            is_over = left_s < 0
            yield (
                ERROR if is_over else WARNING, where,
                f"the certificate {path} {'ended' if is_over else 'ends'} on {day}",
                "connections are refused from then on",
                "renew it; the member reads the new file by itself",
            )  # fmt: skip


def _reachability(facts: Facts) -> _Findings:
    voters = [seen for seen in facts.members if not seen.is_learner]
    spare = (len(voters) - 1) // 2 - sum(seen.status is None for seen in voters)
    if not any(seen.member_id for seen in facts.members):
        effect = "the other members are not known here"
    elif spare < 0:
        effect = "without a majority nothing can be written"
    else:
        effect = f"the cluster survives the loss of {spare or 'no'} more"
    for seen in facts.members:
        if seen.status is None:
            at = f" at {seen.endpoint}" if seen.endpoint and seen.endpoint != seen.name else ""
            yield (
                ERROR, seen.name, f"does not answer{at}: {seen.error}", effect,
                "start it (its log says why it ended), correct the network or URL, or replace it",
            )  # fmt: skip
        elif not seen.status.leader:
            yield (
                ERROR, seen.name, "knows no leader", "it can serve neither writes nor reads",
                "see that a majority of the members run and reach each other",
            )  # fmt: skip
    if len(voters) == 2:
        yield (
            WARNING, "the cluster", "it has two voting members",
            "it stops when either of them fails", "add a third one",
        )  # fmt: skip
    yield from _links(facts)


def _links(facts: Facts) -> _Findings:
    """Members that this machine reaches and that do not reach each other."""
    alive = {f"{seen.member_id:x}": seen.name for seen in facts.answering}
    for name, series in facts.scraped:
        for labels, value in series.all("etcd_network_active_peers"):
            other = alive.get(labels.get("Remote", ""))
            if not value and other:
                yield (
                    ERROR, name, f"is not connected to {other}",
                    "they cannot replace each other's data or votes",
                    "correct the network or the peer URLs; its log says why",
                )  # fmt: skip


def _lag(facts: Facts) -> _Findings:
    for name, entries in facts.lags.items():
        yield (
            WARNING, name,
            f"lags: after {facts.lag_s:g} s it lacks {entries} entries of the leader's log",
            "its reads wait or are old, and it cannot replace another member",
            "look at its disk, processor and network",
        )  # fmt: skip


def _clock(facts: Facts) -> _Findings:
    # By clock: (seconds ahead of this machine, uncertainty in seconds).
    offsets = {"this machine": (0.0, 0.0)}
    for name, series in facts.scraped:
        clock = series.value("etcdlite_clock_timestamp_seconds")
        if clock is not None:
            offsets[name] = clock - series.read_at_s, series.took_s / 2
    median_s, median_open_s = statistics.median_low(offsets.values())
    for name, (offset, open_s) in offsets.items():
        off_s = offset - median_s
        if abs(off_s) - open_s - median_open_s > MAX_CLOCK_S:
            days = abs(off_s) / DAY_S
            shown = f"{abs(off_s):.1f} s" if days < 1 else f"{days:.1f} days"
            yield (
                ERROR if abs(off_s) > BAD_CLOCK_S else WARNING, name,
                f"the clock is {shown} {'ahead' if off_s > 0 else 'behind'}",
                "certificates, tokens and logs are judged by it",
                "synchronize it, with systemd-timesyncd or chrony",
            )  # fmt: skip


def _backup(facts: Facts) -> _Findings:
    found: dict[str, float] = {}
    told: list[Mapping[str, float]] = [
        {name: value for name in backup_status.NAMES if (value := series.value(name)) is not None}
        for _, series in facts.scraped
    ]
    told += [facts.machine.backup] if facts.machine is not None else []
    for one in told:
        for name, value in one.items():
            found[name] = max(value, found.get(name, 0.0))
    succeeded = found.get(backup_status.LAST_SUCCESS, 0.0)
    age_s = facts.now_s - succeeded
    if found.get(backup_status.LAST_FAILURE, 0.0) > succeeded:
        yield (
            ERROR, "the cluster", "the last backup failed", "a lost cluster cannot be restored",
            "see journalctl -u etcdlite-backup, then systemctl start etcdlite-backup",
        )  # fmt: skip
    elif succeeded and age_s > MAX_BACKUP_AGE_S:
        yield (
            WARNING, "the cluster", f"the last backup is {age_s / DAY_S:.0f} days old",
            "what was written since is lost with the cluster",
            "see systemctl status etcdlite-backup.timer, then systemctl start etcdlite-backup",
        )  # fmt: skip


def _versions(facts: Facts) -> _Findings:
    versions = {
        name: labels.get("version", "?")
        for name, series in facts.scraped
        for labels, _ in series.all("etcdlite_build_info")
    }
    if len(set(versions.values())) > 1:
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield (
            WARNING, "the cluster", f"the members have different versions ({shown})",
            "this is for the time of an upgrade only", "upgrade the others",
        )  # fmt: skip
    downgrades = (seen.status.downgradeInfo for seen in facts.answering)
    target = max((one.targetVersion for one in downgrades if one and one.enabled), default="")
    if target:
        yield (
            WARNING, "the cluster", f"a downgrade to {target} is enabled",
            "nothing is written that this version cannot read",
            "install it on all members, or end this with etcdlite-ctl downgrade cancel",
        )  # fmt: skip


def _fragmentation(facts: Facts) -> _Findings:
    for seen in facts.answering:
        size, garbage = seen.status.dbSize, seen.status.dbSize - seen.status.dbSizeInUse
        if garbage > MIN_GARBAGE_BYTES and garbage > MAX_GARBAGE_SHARE * size:
            yield (
                WARNING, seen.name,
                f"{format_size(garbage)} of {format_size(size)} of the data are garbage",
                "it takes space on the disk", f"etcdlite-ctl defrag --endpoints {seen.endpoint}",
            )  # fmt: skip


def _alarms(facts: Facts) -> _Findings:
    effects = {
        "NOSPACE": ("writes are refused", "make space, then etcdlite-ctl alarm disarm"),
        "CORRUPT": (
            "the data of the members differs, and writes are refused",
            "find the member that is wrong, replace it, then etcdlite-ctl alarm disarm",
        ),
    }
    found = set()
    for seen in facts.answering:
        for text in seen.status.errors:
            if alarm := _ALARM.fullmatch(text):
                found.add((int(alarm[1] or 0), alarm[2]))
            elif text.startswith("etcdlite: ") and seen.status.leader:
                yield (ERROR, seen.name, text.removeprefix("etcdlite: "),
                       "it may be unable to serve", "see its log")  # fmt: skip
    for member_id, name in sorted(found):
        why, to_do = effects.get(name, ("it is not known here", "see etcdlite-ctl alarm list"))
        yield ERROR, facts.name_of(member_id), f"the alarm {name} is active", why, to_do


def _files(facts: Facts) -> _Findings:
    limits: list[tuple[str, float, float]] = [
        (name, limit, series.value("process_open_fds") or 0.0)
        for name, series in facts.scraped
        if (limit := series.value("process_max_fds"))
    ]
    machine = facts.unscraped_machine
    if machine is not None and machine.max_files:
        limits.append(("this machine", machine.max_files, 0.0))
    for name, limit, used in limits:
        is_near = used > MAX_FILES_SHARE * limit
        if is_near or limit < LOW_FILES:
            yield (
                ERROR if is_near else WARNING, name,
                f"the limit of open files is {limit:.0f}"
                + (f", {used:.0f} are open" if is_near else ""),
                "each connection takes one, and more are refused",
                "raise it: LimitNOFILE= of systemd, or ulimit -n",
            )  # fmt: skip


def _ports(facts: Facts) -> _Findings:
    for port in facts.machine.taken_ports if facts.machine is not None else ():
        yield (
            ERROR, port.url, f"{port.holder} listens there", "the member cannot listen there",
            f"stop it, or change {port.flag}",
        )  # fmt: skip


CHECKS: Mapping[str, Callable[[Facts], _Findings]] = {
    check.__name__.removeprefix("_"): check
    for check in (
        _configuration, _modes, _space, _quota, _disk, _certificates, _reachability, _lag, _clock,
        _backup, _versions, _fragmentation, _alarms, _files, _ports,
    )
}  # fmt: skip
"""The checks by name. Each yields the fields of its findings, without that name."""


def examine(facts: Facts) -> list[Finding]:
    """All findings, the worst first."""
    found = [
        # Names and texts of a server may hold what controls a terminal.
        Finding(severity, name, *map(one_line, (where, what, why, to_do)))
        for name, check in CHECKS.items()
        for severity, where, what, why, to_do in check(facts)
    ]
    return sorted(found, key=lambda finding: -finding.severity)
