"""`etcdlite-ctl make-mirror`: copies keys to another cluster and follows their changes.

Source and destination are etcdlite or etcd, each. It speaks the native protocol to etcdlite and
JSON to etcd; the answer to /version tells which one it is.

The mirror first copies the keys as of one revision of the source, then applies the events of a
watch that begins after it. Whole revisions of the source become one transaction; several do if they
change different keys, so that a mirror keeps up with a busy source. A key gets each of its changes
once and in order. Keys that only the destination has stay there, and leases are not copied.

With --checkpoint-key the position is kept in a key of the destination, which each transaction
changes together with the data, if nobody else has changed it. So a mirror that is started again
continues exactly where it stopped, and a transaction whose outcome is unknown is sent again without
being applied twice. The value is JSON:

    {"version": 1, "source": cluster ID in hexadecimal, "prefix": base64, "destination": base64,
     "revision": the last revision that is mirrored, "done": changes of the next one that are}

and while the keys are copied, "revision" is the one that they are copied of and "after", base64,
the last key that is copied.

Without it, an unknown outcome ends the mirror.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby, zip_longest
from typing import Any, NamedTuple

from etcdlite import proto
from etcdlite.cli.failures import BadArguments, Failure, say
from etcdlite.cli.flags import CONNECTION_FLAGS
from etcdlite.cli.session import Progress, Session, describe
from etcdlite.client import Compacted, EtcdliteError, RequestTooManyRequests, Timeout
from etcdlite.client.calls import BACKOFF_FIRST_S, BACKOFF_MAX_S
from etcdlite.client.errors import error_for, part
from etcdlite.client.operations import prefix_range
from etcdlite.errors import RESOURCE_EXHAUSTED, UNAVAILABLE, UNKNOWN

TXN_BYTES = 1 << 20
"""Keys and values of one transaction, unless one change alone is larger. etcd's default limit of a
request is 1.5 MiB."""

PAGE_BYTES = 4 << 20
MAX_PAGE_KEYS = 1_000
"""A page of the keys of the source."""

MAX_AHEAD_BYTES = 16 << 20
"""Events that are received and not yet mirrored; the source waits beyond it."""

SHOW_TOTAL_S = 30.0
"""How often the number of changes is printed, as etcdctl does."""

CHECKPOINT_S = 10.0
"""How often the position is kept while nothing changes."""

CHANGE_BYTES = 64
"""What a change takes besides key and value."""

CHECKPOINT_VERSION = 1


class Change(NamedTuple):
    """A change of one key of the destination. `value` is None if it is deleted."""

    key: bytes
    value: bytes | None

    @property
    def size_bytes(self) -> int:
        return len(self.key) + len(self.value or b"") + CHANGE_BYTES


class Position(NamedTuple):
    """How far the mirror has come."""

    revision: int
    done: int = 0
    """Changes of the next revision that are mirrored."""
    after: bytes | None = None
    """While keys are copied: the last one copied, as the source has it; else None."""


# Two clusters.


def client_of(session: Session) -> Any:
    """A client of the session's cluster, native or JSON. Raises EtcdliteError, Failure."""
    connection = session.connection(session.endpoints)
    if connection["secret_file"]:
        return session.client()
    from etcdlite.client.gateway import Gateway

    del connection["secret_file"]
    try:
        gateway = Gateway(**connection)
    except ValueError as error:
        raise BadArguments(str(error)) from None
    if "etcdlite" in gateway.version():
        gateway.close()
        return session.client()
    return gateway


# Events.


class _Feed:
    """Receives the responses of a watch in a thread, so that many revisions become one
    transaction."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._changed = threading.Condition()
        self._responses: deque[tuple[Any, int]] = deque()
        self._ahead_bytes = 0
        self._end: Exception | None = None
        self._is_over = False
        self._thread = threading.Thread(target=self._read, name="mirror", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        end: Exception = error_for(UNAVAILABLE, "the watch has ended")
        try:
            for response in self._stream:
                size = CHANGE_BYTES + sum(
                    len(event.kv.key) + len(event.kv.value) + CHANGE_BYTES
                    for event in response.events
                )
                with self._changed:
                    while self._ahead_bytes > MAX_AHEAD_BYTES and not self._is_over:
                        self._changed.wait()
                    if self._is_over:
                        return
                    self._responses.append((response, size))
                    self._ahead_bytes += size
                    self._changed.notify_all()
        except Exception as error:  # Of any kind: `take` raises it again.
            end = error
        with self._changed:
            self._end = end
            self._changed.notify_all()

    def take(self, wait_s: float) -> Any:
        """The next response; None if none comes in time. Raises what has ended the stream."""
        with self._changed:
            if not self._responses and self._end is None:
                self._changed.wait(wait_s)
            if self._responses:
                response, size = self._responses.popleft()
                self._ahead_bytes -= size
                self._changed.notify_all()
                return response
            if self._end is not None:
                raise self._end
            return None

    def close(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._stream.cancel()
        self._thread.join()


# The mirror.


class _Overtaken(Exception):
    """The checkpoint key was changed after it was read: continue from what it has now. It is read
    again already."""


class Mirror:
    def __init__(self, session: Session, source: Any, target: Any) -> None:
        """`source` and `target` are clients. Raises Failure."""
        flags = session.flags
        self._session = session
        self._source = source
        self._target = target
        self._prefix = os.fsencode(flags["prefix"])
        renamed = os.fsencode(flags["dest-prefix"])
        if flags["no-dest-prefix"] and renamed:
            raise BadArguments(
                "`--dest-prefix` and `--no-dest-prefix` cannot be set at the same time, choose one"
            )
        self._renamed = renamed or (b"" if flags["no-dest-prefix"] else self._prefix)
        # The cluster ID does not tell: clusters of the default configuration have the same.
        is_own = not set(session.endpoints).isdisjoint(session.arguments[0].split(","))
        if is_own and self._renamed.startswith(self._prefix):
            raise BadArguments(
                "the destination is the source, and the mirror would copy its own changes for "
                "ever: name another one, or a --dest-prefix outside of --prefix"
            )
        self._checkpoint_key = os.fsencode(flags["checkpoint-key"])
        self._most_ops = flags["max-txn-ops"] - bool(self._checkpoint_key)
        if self._most_ops < 1:
            raise BadArguments(f"--max-txn-ops must be at least {1 + bool(self._checkpoint_key)}")
        self._checkpoint_revision = 0
        """mod_revision of the checkpoint key; 0 if there is none."""
        self._source_id = 0
        self._position = Position(0)
        """Up to where changes were taken from the source."""
        self._mirrored = Position(0)
        """Up to where they are written: without those in the batch."""
        self._kept = Position(0)
        """The position that the checkpoint key has."""
        self._may_be_behind = False
        """The checkpoint key was read, not written: an earlier mirror may still write it."""
        self._kept_s = time.monotonic()
        self._wait_s = BACKOFF_FIRST_S
        self._can_continue = True
        self._source_revision = 0
        """The newest that is known."""
        self._target_revision = 0
        self._empty_batch()
        self._total = 0
        self._shown_s = time.monotonic()
        self._progress = Progress("mirrored")

    def run(self) -> None:
        """Copy, and then follow; with --once, up to the revision that the source has now. Raises
        EtcdliteError, Failure."""
        header = part(self._source.call("KV.Range", _range(self._prefix, count_only=True)))
        self._source_id, self._source_revision = header.cluster_id, header.revision
        first: int = self._session.flags["rev"]
        self._may_be_behind = not first
        if not self._resume():
            # As in etcdctl: from revision 1 on, and without --rev, all keys are copied first.
            self._mirrored = Position(first - 1) if first > 1 else Position(header.revision, 0, b"")
        try:
            self._mirror(header.revision if self._session.flags["once"] else None)
            response = self._target.call("KV.Range", _range(self._renamed, count_only=True))
            self._target_revision = part(response).revision
        finally:
            self._progress.clear()
            self._tell()

    def _mirror(self, goal: int | None) -> None:
        """Copy what is not copied yet, and follow; again when a connection breaks."""
        while True:
            self._position = self._mirrored
            self._empty_batch()
            try:
                if self._position.after is not None:
                    self._copy()
                if goal is None or self._position.revision < goal:
                    self._follow(goal)
                return
            except _Overtaken:
                pass
            except EtcdliteError as error:
                if error.code != UNAVAILABLE and not isinstance(error, Timeout):
                    raise
                self._pause(error)

    def _empty_batch(self) -> None:
        self._batch: dict[bytes, bytes | None] = {}
        """The next transaction: values by key, as in `Change`."""
        self._batch_bytes = 0

    def _pause(self, error: EtcdliteError) -> None:
        """Wait before the next attempt."""
        if self._wait_s == BACKOFF_FIRST_S:
            self._progress.clear()
            say(f"make-mirror: {describe(error)}; trying again")
        time.sleep(self._wait_s)
        self._wait_s = min(2 * self._wait_s, BACKOFF_MAX_S)

    def _tell(self) -> None:
        """Say how far the mirror has come, and how to continue."""
        at, flags = self._mirrored, self._session.flags
        if at.after is not None:
            how = "; not all keys are copied"
        else:
            how = f", up to revision {at.revision} of the source"
            if flags["once"] and self._target_revision:
                how += f"; the destination is at revision {self._target_revision}"
            elif not self._checkpoint_key and self._can_continue:
                how += f"; --rev {at.revision + 1} continues"
        say(f"mirrored {self._total} changes{how}")

    # The checkpoint.

    def _resume(self) -> bool:
        """Continue where the checkpoint key says. Returns False if there is none."""
        if not self._checkpoint_key:
            return False
        response = self._target.call("KV.Range", proto.RangeRequest(key=self._checkpoint_key))
        if not response.kvs:
            return False
        if self._session.flags["rev"]:
            raise BadArguments("the checkpoint key exists: leave out --rev, or delete the key")
        kv = response.kvs[0]
        position = self._read_checkpoint(kv.value)
        self._checkpoint_revision = kv.mod_revision
        self._mirrored = self._kept = position
        say(f"continuing after revision {position.revision} of the source")
        return True

    def _read_checkpoint(self, value: bytes) -> Position:
        name = self._session.flags["checkpoint-key"]
        try:
            found = json.loads(value)
            if found["version"] != CHECKPOINT_VERSION:
                raise ValueError
            whose = [found[field] for field in ("source", "prefix", "destination")]
            after = found.get("after")
            position = Position(
                int(found["revision"]),
                int(found["done"]),
                None if after is None else base64.b64decode(after, validate=True),
            )
            if not 0 <= position.revision < 1 << 63 or position.done < 0:
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            text = f"--checkpoint-key {name}: the key has a value that is not a mirror's position"
            raise Failure(f"{text}; name another key") from None
        if whose != self._whose():
            text = f"--checkpoint-key {name} is of a mirror of another cluster or prefix"
            raise Failure(f"{text}; name another key, or delete this one")
        return position

    def _whose(self) -> list[str]:
        names = (self._prefix, self._renamed)
        return [f"{self._source_id:x}", *(base64.b64encode(name).decode() for name in names)]

    def _checkpoint_value(self, position: Position) -> bytes:
        value: dict[str, Any] = {"version": CHECKPOINT_VERSION}
        value |= zip(("source", "prefix", "destination"), self._whose(), strict=True)
        value |= {"revision": position.revision, "done": position.done}
        if position.after is not None:
            value["after"] = base64.b64encode(position.after).decode()
        return json.dumps(value).encode()

    # Copying.

    def _copy(self) -> None:
        """Copy the keys as of the position's revision."""
        revision, _, after = self._position
        try:
            for kv in pages(self._source, self._prefix, revision, after or b""):
                if (key := self._rename(kv.key)) is not None:
                    self._add(Change(key, kv.value))
                self._position = Position(revision, after=kv.key)
        except Compacted:
            raise Failure(self._too_late(revision)) from None
        self._position = Position(revision)
        self._commit()
        self._keep()

    def _too_late(self, revision: int) -> str:
        self._can_continue = False
        text = f"etcdserver: mvcc: required revision has been compacted (revision {revision})"
        why = "the mirror was stopped for too long, or cannot keep up with the writes to the source"
        if self._position.after is not None:
            why = "the source was compacted before all keys were copied; let it keep more history"
        keys = "keys and the checkpoint key" if self._checkpoint_key else "keys"
        again = "start again without --rev" if self._session.flags["rev"] else "start again"
        return f"{text}: {why}. Delete the mirrored {keys} at the destination, and {again}"

    # Following.

    def _follow(self, goal: int | None) -> None:
        """Apply the events after the position: for ever, or up to the revision `goal`."""
        with self._watch(goal) as stream, closing(_Feed(stream)) as feed:
            self._take_all(feed, goal)
        self._keep()

    def _watch(self, goal: int | None) -> Any:
        """The stream of events after the position. With a goal the watch is for all keys: each
        revision has an event, so the last one shows that all before it has come."""
        key, range_end = prefix_range(self._prefix if goal is None else b"")
        create = proto.WatchCreateRequest(
            key=key,
            range_end=range_end,
            start_revision=self._position.revision + 1,
            progress_notify=goal is None,
        )
        return self._source.stream("Watch.Watch", proto.WatchRequest(create_request=create))

    def _take_all(self, feed: _Feed, goal: int | None) -> None:
        """Mirror responses until the position reaches the goal."""
        events: list[Any] = []
        while goal is None or self._position.revision < goal:
            response = feed.take(0.0 if self._batch else 1.0)
            if response is None:
                # Nothing waits: mirror what has come.
                self._commit()
                if time.monotonic() - self._kept_s >= CHECKPOINT_S:
                    self._keep()
                self._show()
                continue
            if response.compact_revision:
                raise Failure(self._too_late(self._position.revision + 1))
            if response.canceled:
                raise error_for(UNKNOWN, response.cancel_reason or "the watch was canceled")
            self._wait_s = BACKOFF_FIRST_S
            revision = response.header.revision if response.header is not None else 0
            self._source_revision = max(self._source_revision, revision)
            events += response.events
            if response.fragment:
                continue
            if events:
                self._take(events, goal)
                events = []
            elif not response.created and revision > self._position.revision:
                # A progress notification: all up to this revision has come.
                self._commit()
                self._position = self._mirrored = Position(revision)
        self._commit()

    def _take(self, events: list[Any], goal: int | None) -> None:
        """Add events, which are of whole revisions, to the batch."""
        for revision, group in groupby(events, lambda event: event.kv.mod_revision):
            if goal is not None and revision > goal:
                self._position = Position(goal)
                return
            changes = [
                Change(key, None if event.type == proto.Event.DELETE else event.kv.value)
                for event in group
                if (key := self._rename(event.kv.key)) is not None
            ]
            self._take_revision(revision, changes)

    def _take_revision(self, revision: int, changes: list[Change]) -> None:
        """Add the changes of one revision, in the same transaction if they fit into one."""
        done = self._position.done
        if done or not self._fits(changes):
            self._commit()
        for change in changes[done:]:
            self._add(change)
            self._position = Position(self._position.revision, self._position.done + 1)
        self._position = Position(revision)

    # The destination.

    def _rename(self, key: bytes) -> bytes | None:
        """The key at the destination; None if it is not mirrored, like the checkpoint key."""
        renamed = self._renamed + key[len(self._prefix) :]
        is_checkpoint = bool(renamed) and renamed == self._checkpoint_key
        return renamed if key.startswith(self._prefix) and not is_checkpoint else None

    def _fits(self, changes: list[Change]) -> bool:
        """Whether the changes can be in one transaction with the batch."""
        return (
            len(self._batch) + len(changes) <= self._most_ops
            and self._batch_bytes + sum(change.size_bytes for change in changes) <= TXN_BYTES
            and self._batch.keys().isdisjoint(change.key for change in changes)
        )

    def _add(self, change: Change) -> None:
        """Add a change to the batch, while the position is still the one before the change."""
        if self._batch and not self._fits([change]):
            self._commit()
        self._batch[change.key] = change.value
        self._batch_bytes += change.size_bytes

    def _commit(self) -> None:
        if self._batch:
            self._write(self._batch, self._position)
            self._total += len(self._batch)
            self._empty_batch()
        self._mirrored = self._position
        self._show()

    def _keep(self) -> None:
        """Save the position if it moved while nothing was written."""
        if self._checkpoint_key and self._mirrored != self._kept:
            self._write({}, self._mirrored)

    def _write(self, changes: dict[bytes, bytes | None], position: Position) -> None:
        ops = [change_op(key, value) for key, value in changes.items()]
        if not self._checkpoint_key:
            self._write_once(proto.TxnRequest(success=ops))
            return
        value = self._checkpoint_value(position)
        ops.append(change_op(self._checkpoint_key, value))
        unchanged = proto.Compare(
            key=self._checkpoint_key,
            target=proto.Compare.MOD,
            mod_revision=self._checkpoint_revision,
        )
        self._write_surely(proto.TxnRequest(compare=[unchanged], success=ops), value)
        self._kept, self._kept_s = position, time.monotonic()

    def _write_once(self, request: Any) -> None:
        """Carry out a transaction that cannot be sent again."""
        try:
            response = self._target.call("KV.Txn", request)
        except EtcdliteError as error:
            hint = ". With --checkpoint-key a mirror goes on after this"
            passes = error.code == UNAVAILABLE or isinstance(error, Timeout)
            raise Failure(describe(error) + hint * passes) from None
        self._target_revision = part(response).revision

    def _write_surely(self, request: Any, value: bytes) -> None:
        """Carry out a transaction exactly once. It changes the checkpoint key to `value`, if that
        is as this mirror has left it: so it may be sent again."""
        is_again = False
        while True:
            try:
                response = self._target.call("KV.Txn", request)
                if response.succeeded:
                    self._checkpoint_revision = part(response).revision
                else:
                    self._find_written(value, is_again)
                self._may_be_behind = False
                self._target_revision = part(response).revision
                self._wait_s = BACKOFF_FIRST_S
                return
            except EtcdliteError as error:
                passes = isinstance(error, (Timeout, RequestTooManyRequests))
                if error.code != UNAVAILABLE and not passes:
                    raise Failure(describe(error)) from None
                is_again = True
                self._pause(error)

    def _find_written(self, value: bytes, is_again: bool) -> None:
        """The checkpoint key is changed: by an earlier attempt, by the last transaction of a mirror
        that was stopped just before this one began, or else by another mirror."""
        response = self._target.call("KV.Range", proto.RangeRequest(key=self._checkpoint_key))
        if is_again and response.kvs and response.kvs[0].value == value:
            self._checkpoint_revision = response.kvs[0].mod_revision
        elif self._may_be_behind:
            self._resume()
            self._may_be_behind = False
            raise _Overtaken
        else:
            name = self._session.flags["checkpoint-key"]
            text = f"the checkpoint key {name} was changed: another mirror is running with it"
            raise Failure(f"{text}. Stop one of them")

    # Reports.

    def _show(self) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s >= SHOW_TOTAL_S:
            self._shown_s = now_s
            self._session.print(str(self._total))
        self._progress.update(self._position.revision, self._source_revision)

    def verify(self) -> None:
        """Compare all keys and values as of the position with the destination. Raises Failure."""
        revision = self._position.revision
        kvs = pages(self._source, self._prefix, revision)
        theirs = ((key, kv.value) for kv in kvs if (key := self._rename(kv.key)) is not None)
        kvs = pages(self._target, self._renamed, self._target_revision)
        ours = ((kv.key, kv.value) for kv in kvs if kv.key != self._checkpoint_key)
        count = 0
        for left, right in zip_longest(theirs, ours):
            if left != right:
                first, second = left or right, right or left
                assert first is not None and second is not None
                why = "only one of them has the key"
                if left is not None and right is not None and left[0] == right[0]:
                    why = "the values differ"
                name = min(first[0], second[0]).decode("utf-8", "backslashreplace")
                raise Failure(f"the destination differs from the source at {name}: {why}")
            count += 1
        say(f"verified: {count} keys are equal, as of revision {revision} of the source")


def change_op(key: bytes, value: bytes | None, lease: int = 0) -> proto.RequestOp:
    """The operation of a transaction that puts a key, or deletes it without a value."""
    if value is None:
        return proto.RequestOp(request_delete_range=proto.DeleteRangeRequest(key=key))
    return proto.RequestOp(request_put=proto.PutRequest(key=key, value=value, lease=lease))


def _range(prefix: bytes, after: bytes = b"", **fields: Any) -> proto.RangeRequest:
    """The request for the keys of a prefix after the key `after`."""
    start, end = prefix_range(prefix)
    return proto.RangeRequest(key=after + b"\0" if after else start, range_end=end, **fields)


def pages(client: Any, prefix: bytes, revision: int, after: bytes = b"") -> Iterator[Any]:
    """The KeyValues of a prefix as of a revision (0: the one of the first answer), in order, after
    the key `after`."""
    limit = 64
    while True:
        wanted = _range(prefix, after, limit=limit, revision=revision)
        try:
            response = client.call("KV.Range", wanted)
        except EtcdliteError as failure:
            if failure.code != RESOURCE_EXHAUSTED or limit == 1:
                raise
            limit = max(1, limit // 8)  # The values are large.
            continue
        revision = revision or part(response).revision
        yield from response.kvs
        if not response.more or not response.kvs:
            return
        after = response.kvs[-1].key
        size = sum(len(kv.key) + len(kv.value) + CHANGE_BYTES for kv in response.kvs)
        limit = max(1, min(MAX_PAGE_KEYS, len(response.kvs) * PAGE_BYTES // size))


def make_mirror(session: Session) -> None:
    """The command."""
    takes = "make-mirror takes one destination argument"
    (destination,) = session.need(1, takes)
    flags = session.flags
    if flags["verify"] and not flags["once"]:
        raise BadArguments("--verify is only for --once: the source goes on changing")
    others = {name: flags[f"dest-{name}"] for name, *_ in CONNECTION_FLAGS}
    others |= {"discovery-srv": "", "endpoints": tuple(filter(None, destination.split(",")))}
    if not others["endpoints"]:
        raise BadArguments(takes)
    other = Session([], -1, {**flags, **others})
    with closing(client_of(session)) as source, closing(client_of(other)) as target:
        mirror = Mirror(session, source, target)
        mirror.run()
        if flags["verify"]:
            mirror.verify()
