"""The commands of etcdlite-ctl, one function each: from a Session to an exit status.

`watch` is in watch.py, `check` in check.py, the table that names them all in ctl.py.

Invariants: a command checks its arguments before it talks to a server; it writes to standard output
only what etcdctl does; what it holds (a lock, a lease, a half-written file) it gives back however
it ends.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etcdlite import ETCD_API_VERSION, __version__, proto
from etcdlite.cli.input import (
    EXIT_BAD_ARGUMENTS,
    EXIT_BAD_CONNECTION,
    EXIT_BAD_FEATURE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    PROGRAM,
    Failure,
    delete_request,
    parse_compare,
    parse_int,
    parse_request,
    parse_unsigned,
    put_request,
    range_request,
    read_block,
)
from etcdlite.cli.output import EndpointResponse, Health, go_quote, size_text, unhealthy_lines
from etcdlite.cli.session import Progress, Session, cause, describe, os_error_text, say
from etcdlite.client import EtcdliteError
from etcdlite.client.operations import PartialFile
from etcdlite.errors import ERRORS, NOT_FOUND, PERMISSION_DENIED, UNAVAILABLE

DEFAULT_SESSION_TTL_S = 60
"""The lease of an election, and of a lock whose --ttl is not positive."""

KEEP_ALIVE_RETRY_S = 0.5


# Keys.


def put(session: Session) -> int:
    request = put_request(session.arguments, session.flags, sys.stdin.buffer.read)
    session.write(session.printer.put(session.call("KV.Put", request)))
    return 0


def get(session: Session) -> int:
    request = range_request(session.arguments, session.flags)
    if session.flags["print-value-only"] and session.printer.name != "simple":
        text = "print-value-only is only for `--write-out=simple`"
        raise Failure(EXIT_BAD_ARGUMENTS, text)
    if session.flags["count-only"] and session.printer.name != "fields":
        raise Failure(EXIT_BAD_ARGUMENTS, "--count-only is only for `--write-out=fields`")
    session.write(session.printer.get(session.call("KV.Range", request)))
    return 0


def delete(session: Session) -> int:
    request = delete_request(session.arguments, session.flags)
    session.write(session.printer.delete(session.call("KV.DeleteRange", request)))
    return 0


def txn(session: Session) -> int:
    session.need(0, "txn command does not accept argument")
    blocks = []
    lines = iter(sys.stdin.buffer.readline, b"")
    for prompt, parse in (
        ("compares:", parse_compare),
        ("success requests (get, put, del):", parse_request),
        ("failure requests (get, put, del):", parse_request),
    ):
        if session.flags["interactive"]:
            session.write(prompt.encode() + b"\n")
        blocks.append(read_block(lines, parse))
    compare, success, failure = blocks
    request = proto.TxnRequest(compare=compare, success=success, failure=failure)
    session.write(session.printer.txn(session.call("KV.Txn", request)))
    return 0


def compaction(session: Session) -> int:
    session.need(1, "compaction command needs 1 argument")
    try:
        revision = parse_int(session.arguments[0])
    except ValueError as error:
        raise Failure(EXIT_FAILED, str(error)) from None
    request = proto.CompactionRequest(revision=revision, physical=session.flags["physical"])
    session.call("KV.Compact", request)
    session.write(b"compacted revision %d\n" % revision)
    return 0


# Leases.


def lease_grant(session: Session) -> int:
    session.need(1, "lease grant command needs TTL argument")
    try:
        ttl = parse_int(session.arguments[0])
    except ValueError as error:
        raise Failure(EXIT_BAD_ARGUMENTS, f"bad TTL ({error})") from None
    try:
        response = session.call("Lease.LeaseGrant", proto.LeaseGrantRequest(TTL=ttl))
    except EtcdliteError as error:
        raise _wrapped("failed to grant lease", error, session) from None
    session.write(session.printer.lease_grant(response))
    return 0


def _wrapped(what: str, error: EtcdliteError, session: Session) -> Failure:
    endpoint = error.endpoint or session.client().endpoint
    text = f"{what} ({error.text})"
    return Failure(EXIT_FAILED, text if endpoint in text else f"{text} (endpoint {endpoint})")


def lease_revoke(session: Session) -> int:
    lease = session.lease_argument("revoke")
    try:
        response = session.call("Lease.LeaseRevoke", proto.LeaseRevokeRequest(ID=lease))
    except EtcdliteError as error:
        raise _wrapped("failed to revoke lease", error, session) from None
    session.write(session.printer.lease_revoke(response, lease))
    return 0


def lease_time_to_live(session: Session) -> int:
    request = proto.LeaseTimeToLiveRequest(
        ID=session.lease_argument("timetolive"), keys=session.flags["keys"]
    )
    response = session.call("Lease.LeaseTimeToLive", request)
    session.write(session.printer.lease_time_to_live(response, session.flags["keys"]))
    return 0


def lease_list(session: Session) -> int:
    response = session.call("Lease.LeaseLeases", proto.LeaseLeasesRequest())
    session.write(session.printer.lease_list(response))
    return 0


def lease_keep_alive(session: Session) -> int:
    lease = session.lease_argument("keep-alive")
    request = proto.LeaseKeepAliveRequest(ID=lease)
    expires_s = -math.inf
    while True:
        sent_s = time.monotonic()
        try:
            response = session.call("Lease.LeaseKeepAlive", request)
        except EtcdliteError as error:
            if error.code == UNAVAILABLE and time.monotonic() < expires_s:
                time.sleep(KEEP_ALIVE_RETRY_S)
                continue
            if error.code != NOT_FOUND:
                raise
            response = proto.LeaseKeepAliveResponse(ID=lease)
        if response.TTL <= 0:
            if session.flags["once"]:
                text = f"{ERRORS['LeaseNotFound'][1]} (endpoint {session.client().endpoint})"
                raise Failure(EXIT_BAD_CONNECTION, text)
            if session.printer.name == "simple":
                session.write(b"lease %016x expired or revoked.\n" % lease)
            return 0
        session.write(session.printer.lease_keep_alive(response))
        if session.flags["once"]:
            return 0
        expires_s = sent_s + response.TTL
        time.sleep(response.TTL / 3)


# Cluster and maintenance.


def member_list(session: Session) -> int:
    response = session.call("Cluster.MemberList", proto.MemberListRequest(linearizable=True))
    session.write(session.printer.member_list(response))
    return 0


def _peer_urls(session: Session) -> list[str]:
    if not session.flags["peer-urls"]:
        raise Failure(EXIT_BAD_ARGUMENTS, "member peer urls not provided")
    return list(session.flags["peer-urls"])


def member_add(session: Session) -> int:
    if not session.arguments:
        raise Failure(EXIT_BAD_ARGUMENTS, "member name not provided")
    session.need(1, "too many arguments")
    (name,) = session.arguments
    urls = _peer_urls(session)
    request = proto.MemberAddRequest(peerURLs=urls, isLearner=session.flags["learner"])
    response = session.call("Cluster.MemberAdd", request)
    session.write(session.printer.member_add(response))
    if session.printer.name == "simple":
        # What the new member is to be started with.
        cluster = ",".join(
            f"{name if member.ID == response.member.ID else member.name}={url}"
            for member in response.members
            for url in member.peerURLs
        )
        session.write(
            f'\nETCD_NAME="{name}"\nETCD_INITIAL_CLUSTER="{cluster}"\n'
            f'ETCD_INITIAL_ADVERTISE_PEER_URLS="{",".join(urls)}"\n'
            'ETCD_INITIAL_CLUSTER_STATE="existing"\n'.encode()
        )
    return 0


def member_remove(session: Session) -> int:
    member_id = session.member_argument()
    response = session.call("Cluster.MemberRemove", proto.MemberRemoveRequest(ID=member_id))
    session.write(session.printer.member_changed(response, member_id, "removed from"))
    return 0


def member_update(session: Session) -> int:
    member_id = session.member_argument()
    request = proto.MemberUpdateRequest(ID=member_id, peerURLs=_peer_urls(session))
    response = session.call("Cluster.MemberUpdate", request)
    session.write(session.printer.member_changed(response, member_id, "updated in"))
    return 0


def member_promote(session: Session) -> int:
    member_id = session.member_argument()
    response = session.call("Cluster.MemberPromote", proto.MemberPromoteRequest(ID=member_id))
    session.write(session.printer.member_changed(response, member_id, "promoted in"))
    return 0


def move_leader(session: Session) -> int:
    session.need(1, "move-leader command needs 1 argument")
    try:
        target = parse_unsigned(session.arguments[0], 16)
    except ValueError as error:
        raise Failure(EXIT_BAD_ARGUMENTS, str(error)) from None
    for endpoint in session.endpoints:
        with session.client_for([endpoint]) as client:
            status = session.call("Maintenance.Status", proto.StatusRequest(), client)
            if status.leader == status.header.member_id:
                request = proto.MoveLeaderRequest(targetID=target)
                response = session.call("Maintenance.MoveLeader", request, client)
                session.write(session.printer.move_leader(response, status.leader, target))
                return 0
    endpoints = " ".join(session.endpoints)
    raise Failure(EXIT_BAD_ARGUMENTS, f"no leader endpoint given at [{endpoints}]")


def alarm_list(session: Session) -> int:
    session.need(0, "alarm list command accepts no arguments")
    session.write(session.printer.alarm(session.call("Maintenance.Alarm", proto.AlarmRequest())))
    return 0


def alarm_disarm(session: Session) -> int:
    session.need(0, "alarm disarm command accepts no arguments")
    disarmed: list[Any] = []
    for alarm in session.call("Maintenance.Alarm", proto.AlarmRequest()).alarms:
        request = proto.AlarmRequest(
            action=proto.ENUMS["AlarmRequest.AlarmAction"]["DEACTIVATE"],
            memberID=alarm.memberID,
            alarm=alarm.alarm,
        )
        disarmed.extend(session.call("Maintenance.Alarm", request).alarms)
    session.write(session.printer.alarm(proto.AlarmResponse(alarms=disarmed)))
    return 0


def _each_endpoint(session: Session) -> list[str]:
    """The endpoints that a command asks one by one; with --cluster those of all members."""
    if not session.flags["cluster"]:
        return list(session.endpoints)
    try:
        response = session.call("Cluster.MemberList", proto.MemberListRequest(linearizable=True))
    except EtcdliteError as error:
        text = f"failed to fetch endpoints from etcd cluster member list: {describe(error)}"
        try:
            response = session.call("Cluster.MemberList", proto.MemberListRequest())
        except EtcdliteError:
            raise Failure(EXIT_FAILED, text) from None
        say(f"{text}; going on with the members that this endpoint knows of")
    return [url for member in response.members for url in member.clientURLs]


def defrag(session: Session) -> int:
    if session.flags["data-dir"]:
        text = "--data-dir: a data directory is defragmented by its own server, while it runs"
        raise Failure(EXIT_BAD_FEATURE, text)
    status = 0
    for endpoint in _each_endpoint(session):
        try:
            with session.client_for([endpoint]) as client:
                session.call("Maintenance.Defragment", proto.DefragmentRequest(), client)
        except EtcdliteError as error:
            say(f"Failed to defragment etcd member[{endpoint}] ({cause(error)})")
            status = EXIT_FAILED
        else:
            session.write(f"Finished defragmenting etcd member[{endpoint}]\n".encode())
    return status


def endpoint_health(session: Session) -> int:
    found = [_health_of(session, endpoint) for endpoint in _each_endpoint(session)]
    session.write(session.printer.endpoint_health(found))
    if session.printer.name == "simple":
        for line in unhealthy_lines(found):
            say(line)
    if all(health.healthy for health in found):
        return 0
    if session.printer.name != "simple":
        say("Error: unhealthy cluster: " + ", ".join(h.endpoint for h in found if not h.healthy))
    return EXIT_FAILED


def _health_of(session: Session, endpoint: str) -> Health:
    """Healthy is who serves a linearizable read, though perhaps not to us, and has no alarm."""
    started_ns = time.monotonic_ns()
    error_text = ""
    took_ns = 0
    try:
        with session.client_for([endpoint]) as client:
            try:
                session.call("KV.Range", proto.RangeRequest(key=b"health"), client)
            except EtcdliteError as error:
                if error.code != PERMISSION_DENIED:
                    raise
            took_ns = time.monotonic_ns() - started_ns
            alarms = session.call("Maintenance.Alarm", proto.AlarmRequest(), client).alarms
            if alarms:
                names = {number: name for name, number in proto.ENUMS["AlarmType"].items()}
                shown = "".join(f"{names.get(alarm.alarm, alarm.alarm)} " for alarm in alarms)
                error_text = f"Active Alarm(s): {shown}"
    except EtcdliteError as error:
        error_text = cause(error)
    took_ns = took_ns or time.monotonic_ns() - started_ns
    return Health(endpoint, not error_text, took_ns, error_text)


def _ask_each(
    session: Session, what: str, method: str, request: Any
) -> tuple[list[EndpointResponse], int]:
    answers = []
    status = 0
    for endpoint in _each_endpoint(session):
        try:
            with session.client_for([endpoint]) as client:
                answers.append(EndpointResponse(endpoint, session.call(method, request, client)))
        except EtcdliteError as error:
            say(f"Failed to get the {what} of endpoint {endpoint} ({cause(error)})")
            status = EXIT_FAILED
    return answers, status


def endpoint_status(session: Session) -> int:
    answers, status = _ask_each(session, "status", "Maintenance.Status", proto.StatusRequest())
    session.write(session.printer.endpoint_status(answers))
    return status


def endpoint_hashkv(session: Session) -> int:
    request = proto.HashKVRequest(revision=session.flags["rev"])
    answers, status = _ask_each(session, "hash", "Maintenance.HashKV", request)
    session.write(session.printer.endpoint_hashkv(answers))
    return status


def version(session: Session) -> int:
    api = ".".join(ETCD_API_VERSION.split(".")[:2])
    session.write(f"{PROGRAM} version: {__version__}\nAPI version: {api}\n".encode())
    return 0


# Snapshots.


def snapshot_save(session: Session) -> int:
    session.need(1, "snapshot save expects one argument")
    if len(session.endpoints) != 1:
        text = (
            "snapshot must be requested to one selected node, not multiple "
            f"[{' '.join(session.endpoints)}]"
        )
        raise Failure(EXIT_INTERRUPTED, text)
    path = session.arguments[0]
    try:
        partial = PartialFile(path)
        with partial as file:
            _receive_snapshot(session, file)
            file.flush()
            _check_snapshot(partial.partial_path)
    except OSError as error:
        raise Failure(EXIT_INTERRUPTED, f"could not save to {os_error_text(error)}") from None
    except EtcdliteError as error:
        text = describe(error, session.client().endpoint)
        raise Failure(EXIT_INTERRUPTED, f"snapshot failed: {text}") from None
    session.write(b"Snapshot saved at " + os.fsencode(path) + b"\n")
    return 0


def _check_snapshot(path: str) -> None:
    """Raises Failure if it could not be restored. One of an etcd is not looked into."""
    from etcdlite import backup, snap

    with open(path, "rb") as file:
        is_ours = file.read(len(snap.MAGIC)) == snap.MAGIC
    if is_ours:
        try:
            backup.status(path)
        except snap.SnapshotError as error:
            raise Failure(EXIT_FAILED, str(error)) from None


def _receive_snapshot(session: Session, file: Any) -> None:
    progress = Progress(f"snapshot of {session.endpoints[0]}", lambda size: size_text(int(size)))
    received_bytes = remaining_bytes = 0
    try:
        with session.client().stream("Maintenance.Snapshot", proto.SnapshotRequest()) as stream:
            for response in stream:
                file.write(response.blob)
                received_bytes += len(response.blob)
                remaining_bytes = response.remaining_bytes
                progress.update(received_bytes, received_bytes + remaining_bytes)
    finally:
        progress.done()
    if remaining_bytes or not received_bytes:
        text = (
            f"the snapshot ended {remaining_bytes} bytes early "
            f"(endpoint {session.client().endpoint})"
        )
        raise Failure(EXIT_INTERRUPTED, text)


def snapshot_status(session: Session) -> int:
    from etcdlite import backup, snap

    session.need(1, "snapshot status requires exactly one argument")
    try:
        status = backup.status(session.arguments[0])
    except snap.SnapshotError as error:
        raise Failure(EXIT_FAILED, str(error)) from None
    except OSError as error:
        raise Failure(EXIT_FAILED, os_error_text(error)) from None
    session.write(session.printer.snapshot_status(status))
    return 0


def snapshot_restore(session: Session) -> int:
    from etcdlite import backup, snap

    session.need(1, "snapshot restore requires exactly one argument")
    path = session.arguments[0]
    flags = session.flags
    data_dir = flags["data-dir"] or flags["name"] + ".etcdlite"
    progress = Progress(f"restoring to {data_dir}", lambda size: size_text(int(size)))
    try:
        backup.restore(
            path,
            data_dir,
            name=flags["name"],
            initial_cluster=flags["initial-cluster"],
            initial_cluster_token=flags["initial-cluster-token"],
            initial_advertise_peer_urls=flags["initial-advertise-peer-urls"],
            wal_dir=flags["wal-dir"],
            skip_hash_check=flags["skip-hash-check"],
            progress=progress.update,
        )
    except snap.SnapshotError as error:
        raise Failure(EXIT_FAILED, str(error)) from None
    except OSError as error:
        raise Failure(EXIT_FAILED, os_error_text(error)) from None
    finally:
        progress.done()
    command = ["etcdlite"]
    if flags["name"] != "default":
        command += ["--name", flags["name"]]
    command += ["--data-dir", data_dir]
    peer_urls = flags["initial-advertise-peer-urls"]
    if peer_urls != "http://localhost:2380":
        command += ["--listen-peer-urls", peer_urls]
    say(f"restored {path}; start the server with: {shlex.join(command)}")
    return 0


# Locks and elections.


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does, so that what is held is given back."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _hold(session: Session, place: Any, command: Sequence[str]) -> int:
    """Wait for a lock or a leadership, keep it until a signal or the end of `command`."""
    with _terminated_as_interrupted():
        try:
            place.acquire()
        except KeyboardInterrupt:
            raise Failure(EXIT_FAILED, "context canceled") from None
        try:
            if command:
                return _run_holding(place, command)
            response = session.call("KV.Range", proto.RangeRequest(key=place.key))
            session.write(session.printer.get(response))
            place.lease.wait_lost()
        except KeyboardInterrupt:
            return 0
        finally:
            place.release()
    raise Failure(EXIT_FAILED, f"session expired (endpoint {session.client().endpoint})")


def _run_holding(place: Any, command: Sequence[str]) -> int:
    environment = {
        **os.environ,
        "ETCD_LOCK_KEY": os.fsdecode(place.key),
        "ETCD_LOCK_REV": str(place.revision),
    }
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)
    except FileNotFoundError:
        text = f"exec: {go_quote(os.fsencode(command[0]))}: executable file not found in $PATH"
        raise Failure(EXIT_FAILED, text) from None
    except OSError as error:
        raise Failure(EXIT_FAILED, f"exec {os_error_text(error)}") from None
    while process.returncode is None:
        # The lock is held until the command has ended, whatever signal comes.
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
    if place.lost:
        say("Warning: the lock was lost before the command ended")
    status = process.returncode
    if status < 0:
        raise Failure(128 - status, f"signal: {str(signal.strsignal(-status)).lower()}")
    if status:
        raise Failure(status, f"exit status {status}")
    return 0


def lock(session: Session) -> int:
    if not session.arguments:
        text = "lock takes a lock name argument and an optional command to execute"
        raise Failure(EXIT_BAD_ARGUMENTS, text)
    ttl = session.flags["ttl"] if session.flags["ttl"] > 0 else DEFAULT_SESSION_TTL_S
    place = session.client().lock(os.fsencode(session.arguments[0]), ttl=ttl)
    return _hold(session, place, session.arguments[1:])


def elect(session: Session) -> int:
    if not 1 <= len(session.arguments) <= 2:
        text = "elect takes one election name argument and an optional proposal argument"
        raise Failure(EXIT_BAD_ARGUMENTS, text)
    name, *proposal = map(os.fsencode, session.arguments)
    if session.flags["listen"] and proposal:
        raise Failure(EXIT_BAD_ARGUMENTS, "proposal given but -l is set")
    if not session.flags["listen"] and not proposal:
        raise Failure(EXIT_BAD_ARGUMENTS, "no proposal argument but -l not set")
    election = session.client().election(name, ttl=DEFAULT_SESSION_TTL_S)
    if proposal:
        return _hold(session, election.campaign(proposal[0]), ())
    with _terminated_as_interrupted(), contextlib.suppress(KeyboardInterrupt):
        for leader in election.observe():
            # The answer has the header; the key and value are those observed, without a count.
            response = session.call("KV.Range", proto.RangeRequest(key=leader.key))
            kv = proto.KeyValue(
                key=leader.key,
                create_revision=leader.create_revision,
                mod_revision=leader.mod_revision,
                version=leader.version,
                value=leader.value,
                lease=leader.lease,
            )
            shown = proto.RangeResponse(header=response.header, kvs=[kv])
            session.write(session.printer.get(shown))
    return 0
