"""The commands of etcdlite-ctl that ask and print, one function each.

The table (table.py) names them; `lock`, `snapshot`, `watch` and `check` have files of their own.
A command checks its arguments before it talks to a server, and writes to standard output only what
etcdctl does.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from etcdlite import proto
from etcdlite.cli import requests
from etcdlite.cli.failures import (
    EXIT_BAD_CONNECTION,
    EXIT_BAD_FEATURE,
    EXIT_FAILED,
    BadArguments,
    Failure,
    say,
)
from etcdlite.cli.output import EndpointResponse, Health, alarm_name
from etcdlite.cli.session import Session, cause, describe
from etcdlite.client import EtcdliteError
from etcdlite.client.errors import Unhealthy, part
from etcdlite.errors import ERRORS, NOT_FOUND, PERMISSION_DENIED
from etcdlite.notation import parse_int

KEEP_ALIVE_RETRY_S = 0.5
CHANGE_RETRY_S = 0.5
CHANGE_WAIT_S = 6.0
"""A change of members is refused until each voter has been in contact for 5 s."""
LIST_TIMEOUT_S = 5.0
"""For the list of all members, which needs a quorum, also if each has more time for its answer."""

MAX_AT_ONCE = 32
"""Endpoints that are asked at the same time."""

_Found = TypeVar("_Found")


# Keys.


def put(session: Session) -> None:
    request = requests.put_request(session.arguments, session.flags, sys.stdin.buffer.read)
    session.show("put", session.call("KV.Put", request))


def get(session: Session) -> None:
    request = requests.range_request(session.arguments, session.flags)
    if session.flags["print-value-only"] and session.printer.format != "simple":
        raise BadArguments("print-value-only is only for `--write-out=simple`")
    if session.flags["count-only"] and session.printer.format != "fields":
        raise BadArguments("--count-only is only for `--write-out=fields`")
    session.show("get", session.call("KV.Range", request))


def delete(session: Session) -> None:
    request = requests.delete_request(session.arguments, session.flags)
    session.show("delete", session.call("KV.DeleteRange", request))


def txn(session: Session) -> None:
    session.need(0, "txn command does not accept argument")
    _prompt(session, "compares:")
    rest = iter(sys.stdin.buffer.readline, b"")
    first = next(rest, b"")
    lines = itertools.chain([first] if first else [], rest)
    if requests.section_of(first):
        compare, success, failure = requests.read_sections(lines)
    else:
        compare = requests.read_block(lines, requests.parse_compare)
        _prompt(session, "success requests (get, put, del):")
        success = requests.read_block(lines, requests.parse_request)
        _prompt(session, "failure requests (get, put, del):")
        failure = requests.read_block(lines, requests.parse_request)
    session.show("txn", session.ask("KV.Txn", compare=compare, success=success, failure=failure))


def _prompt(session: Session, text: str) -> None:
    if session.flags["interactive"]:
        session.print(text)


def compaction(session: Session) -> None:
    session.need(1, "compaction command needs 1 argument")
    try:
        revision = parse_int(session.arguments[0])
    except ValueError as error:
        raise Failure(str(error)) from None
    session.ask("KV.Compact", revision=revision, physical=session.flags["physical"])
    session.print(f"compacted revision {revision}")


# Leases.


def lease_grant(session: Session) -> None:
    session.need(1, "lease grant command needs TTL argument")
    try:
        ttl = parse_int(session.arguments[0])
    except ValueError as error:
        raise BadArguments(f"bad TTL ({error})") from None
    response = _ask_lease(session, "failed to grant lease", "Lease.LeaseGrant", TTL=ttl)
    session.show("lease_grant", response)


def _ask_lease(session: Session, failed: str, method: str, **fields: Any) -> Any:
    try:
        return session.ask(method, **fields)
    except EtcdliteError as error:
        endpoint, text = error.endpoint or session.client().endpoint, f"{failed} ({error.text})"
        text = text if endpoint in text else f"{text} (endpoint {endpoint})"
        raise Failure(text) from None


def lease_revoke(session: Session) -> None:
    lease = session.lease_argument("revoke")
    response = _ask_lease(session, "failed to revoke lease", "Lease.LeaseRevoke", ID=lease)
    session.show("lease_revoke", response, lease)


def lease_time_to_live(session: Session) -> None:
    lease, keys = session.lease_argument("timetolive"), session.flags["keys"]
    response = session.ask("Lease.LeaseTimeToLive", ID=lease, keys=keys)
    session.show("lease_time_to_live", response, keys)


def lease_list(session: Session) -> None:
    session.show("lease_list", session.ask("Lease.LeaseLeases"))


def lease_keep_alive(session: Session) -> None:
    lease = session.lease_argument("keep-alive")
    expires_s = -math.inf
    while True:
        sent_s = time.monotonic()
        try:
            response = session.ask("Lease.LeaseKeepAlive", ID=lease)
        except EtcdliteError as error:
            if error.code != NOT_FOUND:
                if time.monotonic() >= expires_s:
                    raise
                time.sleep(KEEP_ALIVE_RETRY_S)  # The lease is alive, and the cause may pass.
                continue
            response = proto.LeaseKeepAliveResponse(ID=lease)
        if response.TTL <= 0:
            if session.flags["once"]:
                text = f"{ERRORS['LeaseNotFound'][1]} (endpoint {session.client().endpoint})"
                raise Failure(text, EXIT_BAD_CONNECTION)
            if session.printer.format == "simple":
                session.print(f"lease {lease:016x} expired or revoked.")
            return
        session.show("lease_keep_alive", response)
        if session.flags["once"]:
            return
        expires_s = sent_s + response.TTL
        # If this member stalls, there is time to ask another one.
        session.client().timeout_s = min(session.client().timeout_s, response.TTL / 3)
        time.sleep(response.TTL / 3)


# Cluster and maintenance.


def member_list(session: Session) -> None:
    consistency = session.flags["consistency"]
    if consistency not in ("l", "s"):
        raise Failure(f'unknown consistency flag "{consistency}"', EXIT_BAD_FEATURE)
    session.show("member_list", session.ask("Cluster.MemberList", linearizable=consistency == "l"))


def _peer_urls(session: Session) -> list[str]:
    if not session.flags["peer-urls"]:
        raise BadArguments("member peer urls not provided")
    return list(session.flags["peer-urls"])


def _change(session: Session, method: str, **fields: Any) -> Any:
    """The response to a change of members. As long as the cluster refuses it because a voter is not
    in contact, ask again, for up to `CHANGE_WAIT_S`."""
    gives_up_at = math.inf
    while True:
        try:
            response = session.ask(f"Cluster.{method}", **fields)
            urls = [url for member in response.members for url in member.peerURLs]
            if "peerURLs" in fields and len({url.partition(":")[0] for url in urls}) == 2:
                what = "Warning: some peer URLs of this cluster have http://, others https://;"
                say(f"{what} a URL works only as its member listens (member update corrects it)")
            return response
        except Unhealthy as error:
            now = time.monotonic()
            if gives_up_at == math.inf:
                gives_up_at = now + CHANGE_WAIT_S
                what = f"{error.text} (etcdlite-ctl doctor shows which members are missing)"
                say(f"{what}: trying again for {CHANGE_WAIT_S:.0f}s")
            elif now > gives_up_at:
                raise
        time.sleep(CHANGE_RETRY_S)


def member_add(session: Session) -> None:
    if not session.arguments:
        raise BadArguments("member name not provided")
    given = [word for word in session.arguments[1:] if word.lower().startswith("http")]
    hints = "".join(f", did you mean --peer-urls={url}" for url in given)
    (name,) = session.need(1, f"too many arguments{hints}")
    urls = _peer_urls(session)
    response = _change(session, "MemberAdd", peerURLs=urls, isLearner=session.flags["learner"])
    session.show("member_add", response)
    if session.printer.format == "simple":
        # The environment to start the new member with.
        cluster = ",".join(
            f"{name if member.ID == part(response, 'member').ID else member.name}={url}"
            for member in response.members
            for url in member.peerURLs
        )
        session.print(
            "",
            f'ETCD_NAME="{name}"',
            f'ETCD_INITIAL_CLUSTER="{cluster}"',
            f'ETCD_INITIAL_ADVERTISE_PEER_URLS="{",".join(urls)}"',
            'ETCD_INITIAL_CLUSTER_STATE="existing"',
        )
    voters = [member for member in response.members if not member.isLearner]
    if len(voters) == 2 and not session.flags["learner"]:
        say("Nothing can be written until the new member runs: start it now")


def _change_member(session: Session, method: str, done: str, **fields: Any) -> None:
    member_id = session.member_argument()
    response = _change(session, method, ID=member_id, **fields)
    session.show("member_changed", response, member_id, done)


member_remove = partial(_change_member, method="MemberRemove", done="removed from")
member_promote = partial(_change_member, method="MemberPromote", done="promoted in")


def member_update(session: Session) -> None:
    session.need(1, "member ID is not provided")
    _change_member(session, "MemberUpdate", "updated in", peerURLs=_peer_urls(session))


def move_leader(session: Session) -> None:
    session.need(1, "move-leader command needs 1 argument")
    try:
        target = session.member_id(session.arguments[0])
    except ValueError as error:
        raise BadArguments(str(error)) from None
    endpoints = _each_endpoint(session)
    for endpoint in endpoints:
        try:
            client = session.client_for([endpoint])
            status = session.ask("Maintenance.Status", client)
        except (EtcdliteError, BadArguments):
            if session.flags["cluster"]:
                continue
            raise
        with client:
            if status.leader == part(status).member_id:
                response = session.ask("Maintenance.MoveLeader", client, targetID=target)
                session.show("move_leader", response, status.leader, target)
                return
    asked = f"no leader endpoint given at [{' '.join(endpoints)}]"
    raise BadArguments(f"{asked}; --cluster asks all members")


def alarm_list(session: Session) -> None:
    session.need(0, "alarm list command accepts no arguments")
    session.show("alarm", session.ask("Maintenance.Alarm"))


def alarm_disarm(session: Session) -> None:
    session.need(0, "alarm disarm command accepts no arguments")
    disarmed: list[Any] = []
    for alarm in session.ask("Maintenance.Alarm").alarms:
        response = session.ask(
            "Maintenance.Alarm",
            action=proto.AlarmRequest.DEACTIVATE,
            memberID=alarm.memberID,
            alarm=alarm.alarm,
        )
        disarmed.extend(response.alarms)
    session.show("alarm", proto.AlarmResponse(alarms=disarmed))


def _each_endpoint(session: Session) -> list[str]:
    """The endpoints to ask one by one; with --cluster, those of all members."""
    if not session.flags["cluster"]:
        return list(session.endpoints)
    try:
        with session.client_for(session.endpoints, limit_s=LIST_TIMEOUT_S) as client:
            response = session.ask("Cluster.MemberList", client, linearizable=True)
    except EtcdliteError as error:
        text = f"failed to fetch endpoints from etcd cluster member list: {describe(error)}"
        try:
            response = session.ask("Cluster.MemberList")
        except EtcdliteError:
            raise Failure(text) from None
        say(f"{text}; using the members that this endpoint knows")
    return [url for member in response.members for url in member.clientURLs]


def _ask_at_once(session: Session, ask: Callable[[str], _Found]) -> list[_Found]:
    """The results of `ask` for each endpoint, in their order. All are asked at the same time, so
    several that do not answer take no longer than one."""
    from concurrent.futures import ThreadPoolExecutor

    endpoints = _each_endpoint(session)
    session.connection(session.endpoints)  # Asks for a password before there are threads.
    pool = ThreadPoolExecutor(MAX_AT_ONCE)  # Not in a `with`: Ctrl-C waits for no answer.
    return list(pool.map(ask, endpoints))


def _ask_endpoint(
    session: Session, failed: str, method: str, endpoint: str, **fields: Any
) -> EndpointResponse:
    """The answer of an endpoint. A failure is printed, and its response is None.

    `failed` is the text of a failure, with a place for the endpoint."""
    response = None
    try:
        with session.client_for([endpoint]) as client:
            response = session.ask(method, client, **fields)
    except (EtcdliteError, BadArguments) as error:
        say(f"{failed.format(endpoint)} ({cause(error)})")
    return EndpointResponse(endpoint, response)


def defrag(session: Session) -> int:
    if session.flags["data-dir"]:
        from etcdlite.cli import offline

        session.refuse("is for running members, not for --data-dir", "cluster")
        offline.defrag(session)
        return 0
    session.refuse("is only for --data-dir", "wal-dir", "encryption-key-file")
    status = 0
    failed = "Failed to defragment etcd member[{}]"
    for endpoint in _each_endpoint(session):  # Not all at once: it slows a member.
        if _ask_endpoint(session, failed, "Maintenance.Defragment", endpoint).response is None:
            status = EXIT_FAILED
        else:
            session.print(f"Finished defragmenting etcd member[{endpoint}]")
    return status


def _show_each(session: Session, kind: str, what: str, method: str, **fields: Any) -> int:
    """`what`: the answer's name, for the text of a failure."""
    failed = f"Failed to get the {what} of endpoint {{}}"
    answers = _ask_at_once(session, partial(_ask_endpoint, session, failed, method, **fields))
    answered = [answer for answer in answers if answer.response is not None]
    session.show(kind, answered)
    if kind == "endpoint_hashkv":
        if len({(a.response.hash_revision, a.response.compact_revision) for a in answered}) > 1:
            what = "Warning: these hashes cannot be compared: they end at different revisions (give"
            say(f"{what} --rev), or a compaction has not reached all members yet (ask again)")
    return 0 if len(answered) == len(answers) else EXIT_FAILED


_show_status = partial(_show_each, what="status", method="Maintenance.Status")
endpoint_status = partial(_show_status, kind="endpoint_status")
downgrade_status = partial(_show_status, kind="downgrade_status")


def downgrade(session: Session, action: str, count: int) -> None:
    if len(session.arguments) < count or (count and not session.arguments[0]):
        raise BadArguments("TARGET_VERSION not provided")
    if len(session.arguments) > count:
        raise BadArguments("too many arguments")
    version = "".join(session.arguments)
    number = proto.ENUMS["DowngradeRequest.DowngradeAction"][action.upper()]
    response = session.ask("Maintenance.Downgrade", action=number, version=version)
    session.show("downgrade", response, action)


downgrade_validate = partial(downgrade, action="validate", count=1)
downgrade_enable = partial(downgrade, action="enable", count=1)
downgrade_cancel = partial(downgrade, action="cancel", count=0)


def endpoint_hashkv(session: Session) -> int:
    revision = session.flags["rev"]
    return _show_each(session, "endpoint_hashkv", "hash", "Maintenance.HashKV", revision=revision)


def endpoint_health(session: Session) -> int:
    if own := session.flags["cert"]:
        from etcdlite import x509

        session.warn_of_end(x509.ends_s(own), f"this client, {own},")
    found = _ask_at_once(session, partial(_health_of, session))
    session.show("endpoint_health", found)
    unhealthy = [health for health in found if not health.healthy]
    if not unhealthy:
        return 0
    if session.printer.format == "simple":
        for health in unhealthy:
            say(f"{health.endpoint} is unhealthy: failed to commit proposal: {health.error}")
    else:
        say("Error: unhealthy cluster: " + ", ".join(health.endpoint for health in unhealthy))
    return EXIT_FAILED


def _health_of(session: Session, endpoint: str) -> Health:
    """A healthy member has no alarm and serves a linearizable read, if only with a refusal."""
    started_ns = time.monotonic_ns()
    error_text = ""
    took_ns = 0
    try:
        with session.client_for([endpoint]) as client:
            try:
                session.ask("KV.Range", client, key=b"health")
            except EtcdliteError as error:
                if error.code != PERMISSION_DENIED:
                    raise
            took_ns = time.monotonic_ns() - started_ns
            session.warn_of_end(client.certificate_ends_s, endpoint)
            alarms = session.ask("Maintenance.Alarm", client).alarms
            if alarms:
                shown = "".join(f"{alarm_name(alarm)} " for alarm in alarms)
                error_text = f"Active Alarm(s): {shown}"
            else:
                status = session.ask("Maintenance.Status", client)
                error_text = "; ".join(e for e in status.errors if e.startswith("etcdlite: "))
    except (EtcdliteError, BadArguments) as error:
        error_text = cause(error) + session.why_unanswered(error)
    took_ns = took_ns or time.monotonic_ns() - started_ns
    return Health(endpoint, not error_text, took_ns, error_text)
