"""Whether this server can serve, for load balancers, orchestrators and operators.

Over HTTP: etcd's /health, /livez and /readyz. Each is a script, run by `http.py`, that yields when
it needs a read and returns the response.

Over gRPC: `grpc.health.v1.Health`. The only service is "", the server itself. It serves while it
knows a leader, once it has caught up with it after the start. For other names Check fails with
NOT_FOUND, and Watch answers SERVICE_UNKNOWN, as the protocol requires.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from typing import Any

from etcdlite import json_mapping, log, proto
from etcdlite.errors import NOT_FOUND, EtcdError, error
from etcdlite.member import Member
from etcdlite.proto import DecodeError, varint
from etcdlite.replica.alarms import alarm_name
from etcdlite.replica.catch_up import behind_error
from etcdlite.wire.calls import Call

SERVICE = "grpc.health.v1.Health"

MAX_BODY_BYTES = 16 << 10
"""The longest request for health or reflection."""

PROBE = proto.RangeRequest(key=b"\0", keys_only=True, limit=1)
"""The read of the checks; the key need not exist."""

CHECKS = {
    "livez": ("serializable_read",),
    "readyz": ("data_corruption", "serializable_read", "linearizable_read", "non_learner"),
}

Header = tuple[str, str]
Query = dict[str, list[str]]
Answer = tuple[Any, ...]
"""(status, text, headers...)"""
Script = Generator[bool, "EtcdError | None", Answer]
"""Yields, to read `PROBE`, whether the read is serializable; is sent the error, or None."""

NOSNIFF: Header = ("X-Content-Type-Options", "nosniff")


class HealthCounts:
    """The outcomes of checks, for /metrics."""

    def __init__(self) -> None:
        self.health_successes = 0
        self.health_failures = 0
        self.checks: dict[tuple[str, str, str], int] = {}
        """(livez or readyz, check, "success" or "error") -> how often"""
        self.last_checks: dict[tuple[str, str], bool] = {}
        """(livez or readyz, check) -> whether it succeeded the last time"""


DAMAGED = "DAMAGED"
"""For `exclude` of /health: damaged data on the disk."""


def is_check(path: str) -> bool:
    kind, slash, check = path[1:].partition("/")
    return kind in CHECKS and (not slash or check in CHECKS[kind])


def serve_health(member: Member, counts: HealthCounts, query: Query) -> Script:
    """The script of /health."""
    is_serializable = query.get("serializable", [""])[0] == "true"
    reason = _alarm(member, query.get("exclude", ()))
    if not reason and member.state.store.data.damaged and DAMAGED not in query.get("exclude", ()):
        reason = "DATA DAMAGED"
    if not reason and not is_serializable and not member.raft.leader:
        reason = "RAFT NO LEADER"
    if not reason:
        # Later on this must not fail because of a snapshot: it is also used to restart a member.
        is_starting = member.catch_up.is_behind and not member.catch_up.is_over
        failure = behind_error() if is_starting else (yield is_serializable)
        reason = f"RANGE ERROR:{failure}" if failure else ""
    health = "false" if reason else "true"
    body = f'{{"health":"{health}","reason":{json_mapping.string(reason)}}}'
    if not reason:
        counts.health_successes += 1
        return 200, body
    counts.health_failures += 1
    log.warn("serving /health false", "health", reason=reason)
    return 503, body + "\n", NOSNIFF


def _alarm(member: Member, excluded: Collection[str]) -> str:
    for _, kind in sorted(member.state.alarms):
        name = alarm_name(kind)
        if name not in excluded:
            return f"ALARM {name if name in proto.ENUMS['AlarmType'] else 'UNKNOWN'}"
    return ""


def serve_checks(member: Member, counts: HealthCounts, path: str, query: Query) -> Script:
    """The script of /livez and /readyz, and of their single checks."""
    kind, _, check = path[1:].partition("/")
    excluded = () if check else query.get("exclude", ())
    lines = ""
    failed = []
    for name in (check,) if check else CHECKS[kind]:
        if name in excluded:
            continue
        problem = ""
        if name == "data_corruption":
            if member.state.alarms.is_corrupt:
                problem = "alarm activated: CORRUPT"
            elif member.state.store.data.damaged:
                problem = "the disk has damaged data; the log says where"
        elif name == "non_learner":
            if member.identity.member_id in member.raft.learners:
                problem = "not supported for learner"
        elif name == "linearizable_read" and not member.raft.leader:
            problem = str(error("NoLeader"))  # Do not wait for an election.
        else:
            problem = str((yield name == "serializable_read") or "")
            if kind == "readyz" and member.catch_up.is_behind:
                problem = problem or str(behind_error())
        lines += f"[-]{name} failed: {problem}\n" if problem else f"[+]{name} ok\n"
        if problem:
            failed.append(f"{name}: {problem}")
        key = (kind, name, "error" if problem else "success")
        counts.checks[key] = counts.checks.get(key, 0) + 1
        counts.last_checks[kind, name] = not problem
    if failed:
        log.warn(f"serving /{kind} false", "health", reason="; ".join(failed))
        return 503, lines + "\n", NOSNIFF
    return 200, (lines if "verbose" in query else "") + "ok\n", NOSNIFF


def fields(body: bytes) -> list[tuple[int, bytes | int]]:
    """(number, value) of each field of a message of strings, messages and varints. Raises
    DecodeError."""
    if len(body) > MAX_BODY_BYTES:
        raise DecodeError(f"more than {MAX_BODY_BYTES} bytes")
    found: list[tuple[int, bytes | int]] = []
    at = 0
    while at < len(body):
        tag, at = proto.read_varint(body, at, len(body))
        value, at = proto.read_varint(body, at, len(body))
        if tag & 7 == 0:
            found.append((tag >> 3, value))
        elif tag & 7 == 2 and value <= len(body) - at:
            found.append((tag >> 3, body[at : at + value]))
            at += value
        else:
            raise DecodeError("not a field of strings, messages or varints")
    return found


def sized(number: int, value: bytes) -> bytes:
    """A field that holds a string or a message."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def status(member: Member, service: str) -> int:
    statuses = proto.HealthCheckResponse
    if service:
        return statuses.SERVICE_UNKNOWN
    is_serving = member.raft.leader and member.catch_up.is_over
    return statuses.SERVING if is_serving else statuses.NOT_SERVING


def _service(body: bytes) -> str:
    if len(body) > MAX_BODY_BYTES:
        raise DecodeError(f"more than {MAX_BODY_BYTES} bytes")
    return proto.HealthCheckRequest.decode(body).service


def _response(code: int) -> bytes:
    return proto.HealthCheckResponse(status=code).encode()


class Check(Call):
    def message(self, body: bytes) -> None:
        code = status(self.member, _service(body))
        if code == proto.HealthCheckResponse.SERVICE_UNKNOWN:
            raise EtcdError(NOT_FOUND, "unknown service")
        self.send(_response(code))
        self.end()


class Watch(Call):
    """The status now, and whenever it changes."""

    ticks = True

    def opened(self) -> None:
        self._service: str | None = None
        self._sent = 0

    def message(self, body: bytes) -> None:
        if self._service is None:
            self._service = _service(body)
            self.tick(0.0)

    def tick(self, now: float) -> None:
        if self._service is None or self.blocked:
            return
        code = status(self.member, self._service)
        if code != self._sent:
            self._sent = code
            self.send(_response(code))
