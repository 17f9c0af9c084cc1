"""`etcdlite-ctl lock` and `elect`. What is held is released however the command ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from etcdlite import proto
from etcdlite.cli.failures import BadArguments, Failure, os_error_text, say
from etcdlite.cli.session import Session
from etcdlite.notation import quote

DEFAULT_SESSION_TTL_S = 60
"""The lease of an election, and of a lock whose --ttl is not positive."""

SIGNAL_CHECK_S = 1.0
"""A wait ends after this, and is repeated: no signal ends one that it comes just before."""


def _hold(session: Session, place: Any, command: Sequence[str]) -> None:
    """Acquire a lock or a leadership, and hold it until a signal or the end of `command`."""
    try:
        place.acquire()
    except KeyboardInterrupt:
        raise Failure("context canceled") from None
    try:
        if command:
            run_holding(place, command)
            return
        session.show("get", session.ask("KV.Range", key=place.key))
        while not place.lease.wait_lost(SIGNAL_CHECK_S):
            pass
    except KeyboardInterrupt:
        return
    finally:
        place.release()
    raise Failure(f"session expired (endpoint {session.client().endpoint})")


def run_holding(place: Any, command: Sequence[str]) -> None:
    environment = {
        **os.environ,
        "ETCD_LOCK_KEY": os.fsdecode(place.key),
        "ETCD_LOCK_REV": str(place.revision),
    }
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)
    except FileNotFoundError:
        text = f"exec: {quote(os.fsencode(command[0]))}: executable file not found in $PATH"
        raise Failure(text) from None
    except OSError as error:
        raise Failure(f"exec {os_error_text(error)}") from None
    while process.returncode is None:
        # A signal does not release the lock before the command has ended.
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
    if place.lost:
        say("Warning: the lock was lost before the command ended")
    status = process.returncode
    if status < 0:
        raise Failure(f"signal: {str(signal.strsignal(-status)).lower()}", 128 - status)
    if status:
        raise Failure(f"exit status {status}", status)


def lock(session: Session) -> None:
    if not session.arguments:
        raise BadArguments("lock takes a lock name argument and an optional command to execute")
    ttl = session.flags["ttl"] if session.flags["ttl"] > 0 else DEFAULT_SESSION_TTL_S
    place = session.client().lock(os.fsencode(session.arguments[0]), ttl=ttl)
    _hold(session, place, session.arguments[1:])


def elect(session: Session) -> None:
    if not 1 <= len(session.arguments) <= 2:
        raise BadArguments(
            "elect takes one election name argument and an optional proposal argument"
        )
    name, *proposal = map(os.fsencode, session.arguments)
    if session.flags["listen"] and proposal:
        raise BadArguments("proposal given but -l is set")
    if not session.flags["listen"] and not proposal:
        raise BadArguments("no proposal argument but -l not set")
    election = session.client().election(name, ttl=DEFAULT_SESSION_TTL_S)
    if proposal:
        _hold(session, election.campaign(proposal[0]), ())
        return
    with contextlib.suppress(KeyboardInterrupt):
        for leader in election.observe():
            # The response only gives the header; the key and value are the observed ones.
            response = session.ask("KV.Range", key=leader.key)
            fields = proto.KeyValue.FIELD_BY_NAME
            kv = proto.KeyValue(**{name: getattr(leader, name) for name in fields})
            session.show("get", proto.RangeResponse(header=response.header, kvs=[kv]))
