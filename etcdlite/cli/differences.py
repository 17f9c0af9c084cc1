"""`etcdlite-ctl history` and `diff`: what changed, when, and by whom."""

from __future__ import annotations

import os
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from etcdlite import proto
from etcdlite.cli.failures import BadArguments, Failure, say
from etcdlite.cli.session import Session
from etcdlite.client.errors import Compacted, PermissionDenied, Unimplemented, error_for, part
from etcdlite.client.operations import prefix_range
from etcdlite.errors import UNKNOWN
from etcdlite.notation import parse_duration_s, parse_int


class Difference(NamedTuple):
    """A key that is different: as it was, and as it is; None where it does not exist."""

    old: Any
    new: Any


# Times.


def parse_time(text: str) -> int:
    """The Unix time in seconds of a text: 2026-11-24T10:00:00Z (or with an offset; without one it
    is the time of this machine), Unix seconds, or a duration before now such as 90m. Raises
    BadArguments."""
    try:
        if text.isascii() and text.isdigit() and len(text) < 13:
            return int(text)
        if text[-1:] in ("s", "m", "h"):
            return int(time.time() - parse_duration_s(text.removeprefix("-")))
        zone = "+00:00" if text[-1:] in ("Z", "z") else ""
        return int(datetime.fromisoformat(text.rstrip("Zz") + zone).timestamp())
    except (ValueError, OverflowError, OSError):
        raise BadArguments(
            f"--at {text}: write a time as 2026-11-24T10:00:00Z, or how long ago, as 90m"
        ) from None


def time_text(unix_s: int) -> str:
    """As 2026-11-24T10:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_s))


def revision_at(times: Sequence[tuple[int, int]], unix_s: int) -> int:
    """The last revision at a time, of (revision, Unix time) in order. Raises Failure if that is not
    known."""
    at = bisect_right([time_s for _, time_s in times], unix_s)
    if at:
        return times[at - 1][0]
    known = f"the first one known is {time_text(times[0][1])}" if times else "no time is known"
    raise Failure(f"no revision is known at {time_text(unix_s)}: {known}")


def asked_revision(session: Session, times: Callable[[], Sequence[tuple[int, int]]]) -> int:
    """The revision that --rev or --at names; 0 if none is given. `times` gives what `revision_at`
    needs, and is called for --at only. Raises Failure, and what `times` raises."""
    flags = session.flags
    if not flags["at"]:
        return int(flags["rev"])
    if flags["rev"]:
        raise BadArguments("--rev and --at exclude each other")
    unix_s = parse_time(flags["at"])
    revision = revision_at(times(), unix_s)
    say(f"the revision at {time_text(unix_s)} was {revision}")
    return revision


def times_of_cluster(client: Any) -> list[tuple[int, int]]:
    """(revision, Unix time) in order, as the cluster knows them. Raises EtcdliteError."""
    found = client.call("History.Timeline", proto.TimelineRequest())
    return [(one.revision, one.unix_s) for one in found.times]


# Reading history.


def events(client: Any, key: bytes, range_end: bytes, first: int, last: int) -> Iterator[Any]:
    """The events of keys at the revisions from `first` to `last`, in order. Raises EtcdliteError;
    Compacted says how much history is left."""
    create = proto.WatchCreateRequest(key=key, range_end=range_end, start_revision=first)
    with client.stream("Watch.Watch") as stream:
        stream.send(proto.WatchRequest(create_request=create))
        stream.send(proto.WatchRequest(progress_request=proto.WatchProgressRequest()))
        for response in stream:
            if response.compact_revision:
                raise Compacted(compact_revision=response.compact_revision)
            if response.canceled:
                raise error_for(UNKNOWN, response.cancel_reason)
            for event in response.events:
                if event.kv.mod_revision > last:
                    return
                yield event
            # The answer to the request for progress: all before it has come.
            if not response.events and not response.created:
                return


def _timeline(client: Any) -> proto.TimelineResponse:
    """The times and users of revisions, as far as the cluster knows them."""
    try:
        found: proto.TimelineResponse = client.call("History.Timeline", proto.TimelineRequest())
    except (Unimplemented, PermissionDenied):
        return proto.TimelineResponse()
    return found


def _about(timeline: proto.TimelineResponse, revision: int) -> dict[str, str]:
    """The "time" and the "user" of a revision; one that is not known is left out."""
    said = {}
    # A record says that all revisions up to its own had been made by then.
    at = bisect_left(timeline.times, revision, key=lambda one: one.revision)
    if at < len(timeline.times):
        said["time"] = time_text(timeline.times[at].unix_s)
    at = bisect_right(timeline.users, revision, key=lambda run: run.revision)
    if at:
        run = timeline.users[at - 1]
        said["user"] = "(a member)" if run.is_member else run.user
    return {name: text for name, text in said.items() if text}


# The commands.


def history(session: Session) -> None:
    """The versions of a key that are kept, the oldest first."""
    session.need(1, "history needs one argument: the key")
    key = os.fsencode(session.arguments[0])
    client = session.client()
    header = part(client.call("KV.Range", proto.RangeRequest(key=key)))
    old: Any = None
    try:
        found = list(events(client, key, b"", 1, header.revision))
    except Compacted as error:
        oldest = error.compact_revision
        kvs = client.call("KV.Range", proto.RangeRequest(key=key, revision=oldest)).kvs
        found = list(events(client, key, b"", oldest + 1, header.revision))
        if kvs:
            # Its time and user are known; the version before it is not.
            _show_change(session, _timeline(client), None, kvs[0])
            old = kvs[0]
    timeline = _timeline(client)
    for event in found:
        new = None if event.type == proto.Event.DELETE else event.kv
        _show_change(session, timeline, old, new, event.kv.mod_revision)
        old = new


def _show_change(
    session: Session, timeline: proto.TimelineResponse, old: Any, new: Any, revision: int = 0
) -> None:
    """Show a change of a key. `revision`: that of the change, if it is not `new`'s."""
    if old is None and new is None:
        return  # A delete of a version that is compacted.
    revision = revision or new.mod_revision
    more = {"revision": revision, **_about(timeline, revision)}
    session.show("difference", Difference(old, new), more)


def diff(session: Session) -> None:
    """The keys that are different at two revisions."""
    prefix = os.fsencode(session.optional("diff takes at most one argument: a prefix") or "")
    client = session.client()
    now = part(client.call("KV.Range", proto.RangeRequest(key=b"\0", count_only=True)))
    first, last = _revisions(session.flags["rev"], now.revision)
    changed: dict[bytes, int] = {}  # The revisions only: there may be millions of values.
    try:
        # Also if nothing changed, the older revision must be there.
        client.call("KV.Range", proto.RangeRequest(key=b"\0", revision=first, count_only=True))
        for event in events(client, *prefix_range(prefix), first + 1, last):
            changed[event.kv.key] = event.kv.mod_revision
    except Compacted:
        raise Failure(f"the history of revision {first} is compacted; name a later one") from None
    timeline = _timeline(client)
    for key in sorted(changed):
        both = [proto.RangeRequest(key=key, revision=revision) for revision in (first, last)]
        reads = proto.TxnRequest(success=[proto.RequestOp(request_range=one) for one in both])
        answers = client.call("KV.Txn", reads).responses
        old, new = (next(iter(answer.response_range.kvs), None) for answer in answers)
        if (old and (old.value, old.lease)) != (new and (new.value, new.lease)):
            _show_change(session, timeline, old, new, changed[key])


def _revisions(text: str, now: int) -> tuple[int, int]:
    """(A, B) of "A..B"; "A" and "A.." end now."""
    first, _, last = text.partition("..")
    try:
        found = parse_int(first), parse_int(last) if last else now
        if not 0 < found[0] <= found[1] <= now:
            raise ValueError
    except ValueError:
        raise BadArguments(
            f"--rev {text}: write --rev A..B, two revisions from 1 to {now}, the older one first"
        ) from None
    return found
