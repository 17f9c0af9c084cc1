"""Watches: each change of the store goes to every watch on its key, once and in order.

A `WatchHub` has many `WatchStream`s (one per client stream), each with many watches on a key or a
range. A watch is in one of these states:

    synced  It has been sent everything up to `hub.revision`. It is in the index of synced watches,
            and `notify` sends it new events.
    behind  It lacks history from its `next` revision on. `run` reads that from the store, in
            slices, until the watch is level with `hub.revision`.
    served  It is behind, and the slice of history that is being sent is for it, among others.
    parked  It is behind, and its sink is blocked. Nothing is read for it until the sink calls
            `wake`.
    future  Its start revision does not exist yet.

A watch that is not synced stores one number and no events, so a slow reader costs bounded memory.
A synced watch with a blocked sink is parked at the first revision that it cannot be sent.

`notify` does bounded work: watches beyond `max_sends_at_once` fall behind, and all watches do when
a batch has more than `max_events_at_once` events.

`run` works like a sweep. It serves the watches that are furthest behind, many of them in one pass
over a slice of history; then they are all at the same revision. So watches that start at many
different revisions merge into one front. A step takes about a millisecond.

Invariants. Within a watch, events ascend, none is missing or repeated, and none is below the start
revision. The events of one revision are in one response, unless the watch asked for fragments. A
watch sees a compaction only as a canceled response, never as a gap. A progress notification with
revision R is sent only after every event up to R on the same stream.

A record that cannot be read ends the watches that need it, with etcd's "corrupt cluster", and no
others.

The hub never keeps events after `notify` has returned, and never sends events or periodic progress
to a blocked sink. The same calls give the same bytes: nothing depends on the order of a set or on
addresses. An ended watch is free at once, in no reference cycle: the garbage collector runs rarely.

The behaviour is that of etcd 3.6 (server/etcdserver/api/v3rpc/watch.go, server/storage/mvcc), with
one difference: etcd drops a progress request on a stream that is not synced; here it is answered
when the stream is synced.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Sequence
from itertools import islice
from typing import Any, Protocol

from sortedcontainers import SortedDict, SortedList

from etcdlite import errors, log, proto
from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.mvcc import Event
from etcdlite.proto import varint
from etcdlite.storage.data import DataDamaged
from etcdlite.storage.intervals import Intervals
from etcdlite.storage.steps import finish

FRAGMENT_BYTES = 1536 * 1024 + 512 * 1024
"""etcd's default for splitting into fragments: max-request-bytes plus 512 KiB."""

PROGRESS_INTERVAL_S = 600.0
MIN_PROGRESS_INTERVAL_S = 0.1

INVALID_WATCH_ID = -1
"""In responses that concern no watch, or all watches of a stream."""

# The reasons of a refused watch, in etcd's words.
EMPTY_RANGE = "mvcc: watcher range is empty"
DUPLICATE_ID = "mvcc: duplicate watch ID provided on the WatchStream"

_SYNCED, _BEHIND, _SERVED, _PARKED, _FUTURE, _GONE = range(6)

# Options of a watch, as bits.
_NO_PUTS = 1
_NO_DELETES = 2
_PREV_KV = 4
_FRAGMENTS = 8

# Fields of a WatchResponse and of an Event, with their tags.
_HEADER = b"\x0a"
_WATCH_ID = b"\x10"
_CREATED = b"\x18\x01"
_CANCELED = b"\x20\x01"
_COMPACT_REVISION = b"\x28"
_CANCEL_REASON = b"\x32"
_FRAGMENT = b"\x38\x01"
_EVENT = b"\x5a"
_EVENT_IS_DELETE = b"\x08\x01"
_EVENT_KV = b"\x12"
_EVENT_PREV_KV = b"\x1a"

_EVERYTHING = b""
"""The end of a range without an upper bound."""


class Store(Protocol):
    """What the hub needs of the store."""

    @property
    def revision(self) -> int: ...

    @property
    def compacted(self) -> int:
        """History from this revision on can be read."""

    def event_steps(
        self, start_revision: int, limit_bytes: int
    ) -> Generator[None, None, list[Event]]:
        """As `mvcc.Store.event_steps`."""

    def previous(self, key: bytes, revision: int) -> bytes | None:
        """As `mvcc.Store.previous`. Raises DataDamaged."""


class Sink(Protocol):
    """Where a stream's responses go. `send` only queues: it must not call the hub."""

    @property
    def blocked(self) -> bool:
        """Too much is queued. When that ends, the owner calls `wake` of the stream."""

    def send(self, body: bytes) -> None:
        """Take one encoded WatchResponse."""


class _ClosedSink:
    """The sink of a closed stream and its watches."""

    blocked = True

    def send(self, body: bytes) -> None:
        raise AssertionError("a response for a closed stream")


_CLOSED = _ClosedSink()


class _Watch:
    """One watch. 200,000 of these must be small."""

    __slots__ = (
        "stream", "sink", "id", "id_field", "start", "end", "options", "state", "next", "group",
        "idle", "timer",
    )  # fmt: skip

    def __init__(self, stream: WatchStream, watch_id: int, start: bytes, end: bytes | None) -> None:
        self.stream = stream
        self.sink: Sink = stream.sink
        self.id = watch_id
        self.id_field = _id_field(watch_id)
        self.start = start
        self.end = end
        """None: the one key `start`. `_EVERYTHING`: all keys from `start` on."""
        self.options = 0
        self.state = _SYNCED
        self.next = 0
        """While not synced: the first revision that may hold an event to send."""
        self.group: _Group | None = None
        self.idle = True
        """No events were sent since the last progress timer."""
        self.timer: tuple[float, int, _Watch] | None = None
        """Its entry in `hub.timers`; a reference cycle until the watch ends."""


class _Group:
    """The watches of one key or range that are sent the same bytes."""

    __slots__ = ("since", "options", "watches")

    def __init__(self, since: int, options: int) -> None:
        self.since = since
        """The first revision whose events are sent to them."""
        self.options = options
        self.watches: dict[_Watch, None] = {}

    @property
    def name(self) -> int:
        return _group_name(self.since, self.options)


_Groups = dict[int, _Group]
"""The groups of one key or range, by name."""


def _group_name(since: int, options: int) -> int:
    return since << 4 | options


class _Index:
    """Watches by what they watch: keys in a dict, ranges in an interval tree."""

    __slots__ = ("keys", "ranges")

    def __init__(self, rng: random.Random) -> None:
        self.keys: dict[bytes, _Groups] = {}
        self.ranges: Intervals[_Groups] = Intervals(rng)

    def add(self, watch: _Watch, since: int) -> None:
        groups = self._groups(watch)
        if groups is None:
            groups = {}
            if watch.end is None:
                self.keys[watch.start] = groups
            else:
                self.ranges.add(watch.start, watch.end, groups)
        name = _group_name(since, watch.options)
        group = groups.get(name)
        if group is None:
            group = groups[name] = _Group(since, watch.options)
        group.watches[watch] = None
        watch.group = group

    def remove(self, watch: _Watch) -> None:
        group = watch.group
        assert group is not None
        watch.group = None
        del group.watches[watch]
        if group.watches:
            return
        groups = self._groups(watch)
        assert groups is not None
        del groups[group.name]
        if not groups:
            if watch.end is None:
                del self.keys[watch.start]
            else:
                self.ranges.remove(watch.start, watch.end)

    def _groups(self, watch: _Watch) -> _Groups | None:
        if watch.end is None:
            return self.keys.get(watch.start)
        return self.ranges.get(watch.start, watch.end)

    def all(self) -> list[_Watch]:
        every = [*self.keys.values(), *self.ranges.values()]
        return [w for groups in every for group in groups.values() for w in group.watches]


class WatchHub:
    """All watches of one member. Not thread-safe. It sends only from within its methods."""

    def __init__(
        self,
        store: Store,
        header: Callable[[int], bytes],
        *,
        rng: random.Random,
        fragment_bytes: int = FRAGMENT_BYTES,
        progress_interval_s: float = PROGRESS_INTERVAL_S,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """`header` returns the content of a ResponseHeader with a given revision. Clients must not
        be able to predict `rng`. Responses of `fragment_bytes` or more are split for watches that
        asked for fragments. `progress_interval_s` is at least `MIN_PROGRESS_INTERVAL_S`.
        """
        self.revision = store.revision
        """The last revision that `notify` got. The store may be ahead of it."""
        self.streams = 0
        self.watches = 0
        self.key_bytes = 0
        self.slow_watches = 0
        """Watches that are behind, served or parked."""
        self.events_sent = 0
        self.fragment_bytes = fragment_bytes
        self.limits = limits
        self._store = store
        self._header = header
        self._rng = rng
        self._progress_interval_s = max(progress_interval_s, MIN_PROGRESS_INTERVAL_S)
        self.synced = _Index(rng)
        # Both map a revision to the watches with that `next`, in order of arrival.
        self._behind: Any = SortedDict()
        self._future: Any = SortedDict()
        self._front = _Index(rng)
        """The index of served watches."""
        self.lag_revision = 0
        """If not 0: the watches in the synced index have missed everything from this revision on;
        `run` moves them to behind."""
        self.closing: deque[WatchStream] = deque()
        """Closed streams whose watches `run` removes."""
        self._job: Generator[None, None, None] | None = None
        """The job that `run` continues."""
        self.timers: Any = SortedList()
        self._timer_number = 0
        self._now = 0.0

    def open(self, sink: Sink) -> WatchStream:
        self.streams += 1
        return WatchStream(self, sink)

    def notify(self, events: Sequence[Event]) -> None:
        """Send what was just applied: all events of the next revisions, ascending."""
        if not events:
            return
        first, last = events[0][0], events[-1][0]
        assert self.revision < first <= last, (self.revision, first, last)
        self.revision = last
        if not self.lag_revision and (self.synced.keys or self.synced.ranges.root is not None):
            if len(events) > self.limits.max_events_at_once:
                self.lag_revision = first
            else:
                response_bytes = self.limits.response_bytes
                begin = size = 0
                for at, event in enumerate(events):
                    if size > response_bytes and event[0] != events[at - 1][0]:
                        self._notify_synced(events[begin:at])
                        begin, size = at, 0
                    size += len(event[3])
                self._notify_synced(events[begin:] if begin else events)
        if self._future:
            self._start_future()

    @property
    def has_work(self) -> bool:
        """There is work for `run`."""
        return self._job is not None or bool(self._behind or self.closing) or self.lag_revision > 0

    def run(self, is_over: Callable[[], bool]) -> bool:
        """Serve watches that are behind, in steps, until `is_over`; at least one step.

        Returns whether there is more work. Parked watches do not count as work.
        """
        while self.has_work:
            if self._job is None:
                self._job = self._next_job()
            if next(self._job, self) is self:
                self._job = None
            if is_over():
                break
        return self.has_work

    def _next_job(self) -> Generator[None, None, None]:
        if self.lag_revision:
            return self._lag_steps()
        return self._close_steps() if self.closing else self._catch_up_steps()

    def restored(self, store: Store) -> None:
        """Switch to the store of a snapshot from the leader; the old one can still be read. What
        the synced watches missed is read from the new store, unless it is compacted there."""
        if self._job is not None:
            # What it has read of the old store is still right.
            for _ in self._job:
                pass
            self._job = None
        self._store = store
        missed, self.revision = self.revision + 1, store.revision
        assert self.revision >= missed - 1, (self.revision, missed)
        if self.revision >= missed:
            self.lag_revision = self.lag_revision or missed
            self._start_future()

    def _lag_steps(self) -> Generator[None, None, None]:
        """Move synced watches to behind."""
        step = self.limits.move_step_watches
        for count, watch in enumerate(self.synced.all(), 1):
            if watch.state == _SYNCED:
                self.synced.remove(watch)
                self.place(watch, _BEHIND, self.lag_revision)
            if count % step == 0:
                yield
        self.lag_revision = 0

    def _close_steps(self) -> Generator[None, None, None]:
        """Remove the watches of closed streams."""
        while self.closing:
            watches = self.closing[0].by_id
            for watch in list(islice(watches.values(), self.limits.move_step_watches)):
                watch.stream.forget(watch)
            if not watches:
                self.closing.popleft()
            yield

    def next_tick(self) -> float | None:
        """The latest time for the next `tick`; None if no progress timer runs."""
        return self.timers[0][0] if self.timers else None

    def tick(self, now: float) -> None:
        """Send the periodic progress notifications that are due. `now`: seconds, never going back.

        The timer of a new watch starts at the latest tick, so call this in every turn of the loop;
        it costs nothing when none is due. It serves up to `tick_timers` watches: if more are due,
        `next_tick` is not after `now`.
        """
        self._now = now
        timers = self.timers
        header = b""
        for _ in range(self.limits.tick_timers):
            if not timers or timers[0][0] > now:
                break
            watch = timers.pop(0)[2]
            is_level = watch.state == _SYNCED and not self.lag_revision
            if watch.idle and is_level and not watch.sink.blocked:
                header = header or self.header_field()
                watch.sink.send(header + watch.id_field)
            watch.idle = True
            self.start_timer(watch)

    # Sending events.

    def _notify_synced(self, events: Sequence[Event]) -> None:
        steps = self._dispatch_steps(
            self.synced, events, events[-1][0], self.limits.max_sends_at_once
        )
        blocked, late = finish(steps)
        for watch in blocked:
            self.synced.remove(watch)
            self.place(watch, _PARKED, events[0][0])
        for watch in late:
            self.synced.remove(watch)
            self.place(watch, _BEHIND, events[0][0])

    def _dispatch_steps(
        self, index: _Index, events: Sequence[Event], revision: int, max_sends: int
    ) -> Generator[None, None, tuple[list[_Watch], list[_Watch]]]:
        """Send each watch in `index` its share of `events`, in steps. Returns the watches whose
        sink is blocked, and those left out because `max_sends` others were sent something.

        Flat on purpose: this is the cost of a put per event and per watch. An event is encoded once
        for all watches, and the watches of a group share the joined events.
        """
        limits = self.limits
        batches: dict[_Group, list[bytes]] = {}
        damaged: dict[_Group, DataDamaged] = {}
        step = limits.match_step_events
        if len(events) <= step:
            self._match(index, events, batches, damaged)
        else:
            for begin in range(0, len(events), step):
                if begin:
                    yield
                self._match(index, events[begin : begin + step], batches, damaged)
        for group, damage in damaged.items():
            batches.pop(group, None)
            self._end_damaged(list(group.watches), damage)
        blocked: list[_Watch] = []
        late: list[_Watch] = []
        if not batches:
            return blocked, late
        header = self.header_field(revision)
        send_step = limits.send_step_watches
        sends = step_sends = 0
        for group, batch in batches.items():
            joined = batch[0] if len(batch) == 1 else b"".join(batch)
            may_split = group.options & _FRAGMENTS and len(batch) > 1
            bodies: Sequence[bytes] = ()
            # Most clients count their watches from 0, so the watches of a group tend to have the
            # same id. Then they share the whole body, which matters when it is large.
            id_field: bytes | None = None
            sent = 0
            for watch in list(group.watches):
                sink = watch.sink
                if watch.group is not group:
                    continue  # It was cancelled between two steps.
                if sink.blocked:
                    blocked.append(watch)
                    continue
                if sends >= max_sends:
                    late.append(watch)
                    continue
                sends += 1
                sent += 1
                watch.idle = False
                if watch.id_field != id_field:
                    id_field = watch.id_field
                    if may_split and len(joined) >= self.fragment_bytes - 256:
                        bodies = self._fragments(header + id_field, batch)
                    else:
                        bodies = (header + id_field + joined,)
                for body in bodies:
                    sink.send(body)
                step_sends += 1
                if step_sends == send_step:
                    step_sends = 0
                    yield
            self.events_sent += sent * len(batch)
        return blocked, late

    def _match(
        self,
        index: _Index,
        events: Sequence[Event],
        batches: dict[_Group, list[bytes]],
        damaged: dict[_Group, DataDamaged],
    ) -> None:
        """Add to `batches` the encoded events for each group."""
        keys = index.keys
        ranges = index.ranges
        has_ranges = ranges.root is not None
        for at, key, is_delete, kv in events:
            groups = keys.get(key)
            if has_ranges:
                watching = ranges.holding(key)
                if groups is not None:
                    watching.append(groups)
            elif groups is not None:
                watching = [groups]
            else:
                continue
            unwanted = _NO_DELETES if is_delete else _NO_PUTS
            plain = full = b""
            for groups in watching:
                for group in groups.values():
                    options = group.options
                    if at < group.since or options & unwanted:
                        continue
                    if options & _PREV_KV:
                        if not full:
                            try:
                                previous = self._store.previous(key, at)
                            except DataDamaged as damage:
                                damaged[group] = damage
                                continue
                            full = encode_event(is_delete, kv, previous)
                        encoded = full
                    else:
                        encoded = plain = plain or encode_event(is_delete, kv, None)
                    batch = batches.get(group)
                    if batch is None:
                        batches[group] = [encoded]
                    else:
                        batch.append(encoded)

    def _fragments(self, prefix: bytes, batch: Sequence[bytes]) -> list[bytes]:
        """Split a response: each part is smaller than `fragment_bytes` unless one event is not."""
        limit = self.fragment_bytes - len(prefix) - len(_FRAGMENT)
        bodies = []
        begin = size = 0
        for at, encoded in enumerate(batch):
            if at > begin and size + len(encoded) >= limit:
                bodies.append(b"".join((prefix, _FRAGMENT, *batch[begin:at])))
                begin, size = at, 0
            size += len(encoded)
        bodies.append(b"".join((prefix, *batch[begin:])))
        return bodies

    def _end_compacted(self, watches: Sequence[_Watch]) -> None:
        """Cancel watches that need compacted history. As in etcd, the header has no revision."""
        header = self.header_field(0)
        detail = _CANCELED + _COMPACT_REVISION + varint(self._store.compacted)
        for watch in watches:
            if watch.sink is not _CLOSED:
                watch.sink.send(header + watch.id_field + detail)
            watch.stream.forget(watch)

    def _end_damaged(self, watches: Sequence[_Watch], damage: DataDamaged) -> None:
        """Cancel watches that need a record that cannot be read."""
        if not log.limited("damaged"):
            log.error(str(damage))
        reason = errors.error("Corrupt").text.encode()
        detail = _CANCELED + _CANCEL_REASON + varint(len(reason)) + reason
        for watch in watches:
            if watch.sink is not _CLOSED:
                watch.sink.send(self.header_field() + watch.id_field + detail)
            watch.stream.forget(watch)

    def _catch_up_steps(self) -> Generator[None, None, None]:
        """Serve one slice of history to the watches that are furthest behind."""
        limits = self.limits
        first, watches = self._behind.peekitem(0)
        if first > self.revision:
            # They arrived while the synced watches were behind, and lack nothing now.
            for watch in list(islice(watches, limits.move_step_watches)):
                self.remove(watch)
                self.place(watch, _SYNCED, first)
            return
        if first < self._store.compacted:
            self._end_compacted(list(islice(watches, limits.slice_watches)))
            return
        try:
            events = yield from self._store.event_steps(first, limits.slice_bytes)
        except DataDamaged as damage:
            stuck = self._behind.get(first, ())
            self._end_damaged(list(islice(stuck, limits.move_step_watches)), damage)
            return
        if events and events[-1][0] > self.revision:
            # What is applied but not notified yet is for `notify` to send.
            events = [event for event in events if event[0] <= self.revision]
        last = events[-1][0] if events else self.revision
        front = self._front
        cohort = self._form_cohort(first, last, len(events))
        blocked, _ = yield from self._dispatch_steps(
            front, events, self.revision, limits.slice_watches
        )
        for watch in blocked:
            if watch.state == _SERVED:
                # If the sink was woken since, it will not be woken again.
                self._end_serving(watch, _PARKED if watch.sink.blocked else _BEHIND, watch.next)
        level = last >= self.revision
        for watch in cohort:
            if watch.state == _SERVED:
                self._end_serving(watch, _SYNCED if level else _BEHIND, last + 1)
        self._front = _Index(self._rng)

    def _form_cohort(self, first: int, last: int, event_count: int) -> list[_Watch]:
        """Move the watches that this slice of history serves to the front index."""
        limits = self.limits
        front = self._front
        cohort: list[_Watch] = []
        matches = 0
        while len(cohort) < limits.slice_watches and matches < limits.slice_matches:
            # Watches that lack history before `first` may have arrived while it was read.
            start = next(self._behind.irange(first, last), None)
            if start is None:
                break
            watches = self._behind[start]
            while watches and len(cohort) < limits.slice_watches:
                watch, _ = watches.popitem()
                cohort.append(watch)
                watch.state = _SERVED
                front.add(watch, start)
                if len(watch.group.watches) == 1:
                    matches += event_count
                    if matches >= limits.slice_matches:
                        break
            if not watches:
                del self._behind[start]
        return cohort

    def _end_serving(self, watch: _Watch, state: int, revision: int) -> None:
        """Move a served watch to `state`. The front index is dropped as a whole later."""
        watch.group = None
        self.slow_watches -= 1
        watch.stream.unsynced -= 1
        self.place(watch, state, revision)

    # States.

    def place(self, watch: _Watch, state: int, revision: int) -> None:
        """Move a detached watch into a state; `revision` is the first one that it lacks."""
        if state == _SYNCED and self.lag_revision:
            state = _BEHIND
        watch.state = state
        watch.next = revision
        stream = watch.stream
        if state == _SYNCED:
            self.synced.add(watch, 0)
            if not stream.unsynced:
                stream.answer_progress()
            return
        stream.unsynced += 1
        if state == _FUTURE:
            self._future.setdefault(revision, {})[watch] = None
            return
        self.slow_watches += 1
        if state == _PARKED:
            stream.parked[watch] = None
        else:
            self._behind.setdefault(revision, {})[watch] = None

    def remove(self, watch: _Watch) -> None:
        """Detach a watch from its state."""
        state = watch.state
        stream = watch.stream
        if state == _SYNCED:
            self.synced.remove(watch)
            return
        stream.unsynced -= 1
        if state == _SERVED:
            self._front.remove(watch)
        elif state == _PARKED:
            del stream.parked[watch]
        else:
            queue = self._future if state == _FUTURE else self._behind
            watches = queue[watch.next]
            del watches[watch]
            if not watches:
                del queue[watch.next]
        if state != _FUTURE:
            self.slow_watches -= 1

    def _start_future(self) -> None:
        """Move watches out of future: those whose start revision is next become synced, those
        whose start revision exists now become behind."""
        level = self.revision + 1
        while self._future and self._future.peekitem(0)[0] <= level:
            start, watches = self._future.peekitem(0)
            for watch in list(watches):
                self.remove(watch)
                self.place(watch, _SYNCED if start == level else _BEHIND, start)

    def start_timer(self, watch: _Watch) -> None:
        # As etcd: up to a tenth more spreads the timers of clients that arrived together.
        wait_s = self._progress_interval_s * (1 + 0.1 * self._rng.random())
        self._timer_number += 1
        watch.timer = (self._now + wait_s, self._timer_number, watch)
        self.timers.add(watch.timer)

    def header_field(self, revision: int | None = None) -> bytes:
        content = self._header(self.revision if revision is None else revision)
        return _HEADER + varint(len(content)) + content


class WatchStream:
    """One client's stream of watches. Ids are unique within it. Made by `WatchHub.open`."""

    __slots__ = (
        "hub", "sink", "by_id", "_next_id", "_key_bytes", "unsynced", "parked",
        "_wants_progress", "_is_closed",
    )  # fmt: skip

    def __init__(self, hub: WatchHub, sink: Sink) -> None:
        self.hub = hub
        self.sink: Sink = sink
        self.by_id: dict[int, _Watch] = {}
        self.unsynced = 0
        """Watches of this stream that are not synced."""
        self.parked: dict[_Watch, None] = {}
        self._next_id = 0
        self._key_bytes = 0
        self._wants_progress = False
        self._is_closed = False

    def create(self, request: proto.WatchCreateRequest) -> int:
        """Create the watch that a WatchCreateRequest asks for, and answer the request. Returns the
        watch id, or INVALID_WATCH_ID if the request is refused."""
        hub = self.hub
        start = request.key or b"\0"
        end = request.range_end or None
        if end == b"\0":
            end = _EVERYTHING
        elif end is not None and start >= end:
            return self.refuse(EMPTY_RANGE)
        if request.start_revision < 0:
            return self.refuse(errors.error("Compacted").text)
        key_bytes = len(start) + len(end or b"")
        limits = hub.limits
        if (
            len(self.by_id) >= limits.max_watches_per_stream
            or self._key_bytes + key_bytes > limits.max_key_bytes_per_stream
            or hub.watches >= limits.max_watches
            or hub.key_bytes + key_bytes > limits.max_key_bytes
        ):
            if not log.limited("watches"):
                log.warn("refused a watch: limit of watches reached", watches=hub.watches)
            return self.refuse(errors.error("RequestTooManyRequests").text)
        watch_id = request.watch_id
        if watch_id == 0:
            while self._next_id in self.by_id:
                self._next_id += 1
            watch_id = self._next_id
            self._next_id += 1
        elif watch_id in self.by_id:
            return self.refuse(DUPLICATE_ID)

        watch = _Watch(self, watch_id, start, end)
        kinds = proto.WatchCreateRequest
        watch.options = (
            _NO_PUTS * (kinds.NOPUT in request.filters)
            | _NO_DELETES * (kinds.NODELETE in request.filters)
            | _PREV_KV * request.prev_kv
            | _FRAGMENTS * request.fragment
        )
        self.by_id[watch_id] = watch
        self._key_bytes += key_bytes
        hub.watches += 1
        hub.key_bytes += key_bytes
        self._respond(watch.id_field + _CREATED)
        first = request.start_revision or hub.revision + 1
        if first <= hub.revision:
            hub.place(watch, _BEHIND, first)
        elif first == hub.revision + 1:
            hub.place(watch, _SYNCED, first)
        else:
            hub.place(watch, _FUTURE, first)
        if request.progress_notify:
            hub.start_timer(watch)
        return int(watch_id)

    def refuse(self, reason: str) -> int:
        """Answer a create request that is not carried out: for example, permission denied."""
        text = reason.encode()
        detail = _CREATED + _CANCELED + _CANCEL_REASON + varint(len(text)) + text
        self._respond(_id_field(INVALID_WATCH_ID) + detail)
        return INVALID_WATCH_ID

    def cancel(self, watch_id: int) -> None:
        """End a watch and confirm it. As in etcd, an unknown id gets no answer."""
        watch = self.by_id.get(watch_id)
        if watch is not None:
            self._respond(watch.id_field + _CANCELED)
            self.forget(watch)

    def progress(self) -> None:
        """Send the revision up to which all watches of the stream are complete, once they are.

        A stream without watches gets no answer.
        """
        self._wants_progress = True
        self.answer_progress()

    def wake(self) -> None:
        """The sink is not blocked any more: `run` serves its parked watches again."""
        if self.sink.blocked or self._is_closed:
            return
        hub = self.hub
        for watch in list(self.parked):
            hub.remove(watch)
            hub.place(watch, _BEHIND, watch.next)
        self.answer_progress()

    def close(self) -> None:
        """End all watches. Nothing is sent after this; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._wants_progress = False
            self.sink = _CLOSED  # The sink refers to the stream.
            self.hub.streams -= 1
            if len(self.by_id) <= self.hub.limits.move_step_watches:
                for watch in list(self.by_id.values()):
                    self.forget(watch)
                return
            for watch in self.by_id.values():
                watch.sink = _CLOSED
            self.hub.closing.append(self)

    def __len__(self) -> int:
        return len(self.by_id)

    def forget(self, watch: _Watch) -> None:
        hub = self.hub
        hub.remove(watch)
        watch.state = _GONE
        hub.watches -= 1
        if watch.timer is not None:
            hub.timers.remove(watch.timer)
            watch.timer = None  # It refers to the watch.
        del self.by_id[watch.id]
        key_bytes = len(watch.start) + len(watch.end or b"")
        self._key_bytes -= key_bytes
        hub.key_bytes -= key_bytes
        if self._wants_progress:
            self.answer_progress()

    def answer_progress(self) -> None:
        # A watch in future counts as not synced: with a lower revision than its start revision, a
        # client would resume there and get events that it did not ask for.
        is_level = not self.unsynced and not self.hub.lag_revision
        if self._wants_progress and is_level and not self.sink.blocked:
            self._wants_progress = False
            if self.by_id:
                self._respond(_id_field(INVALID_WATCH_ID))

    def _respond(self, detail: bytes) -> None:
        self.sink.send(self.hub.header_field() + detail)


def encode_event(is_delete: bool, kv: bytes, prev_kv: bytes | None) -> bytes:
    """An Event as a field of a WatchResponse."""
    parts = [_EVENT_KV, varint(len(kv)), kv]
    if is_delete:
        parts.insert(0, _EVENT_IS_DELETE)
    if prev_kv is not None:
        parts += (_EVENT_PREV_KV, varint(len(prev_kv)), prev_kv)
    event = b"".join(parts)
    return b"".join((_EVENT, varint(len(event)), event))


def _id_field(watch_id: int) -> bytes:
    # A negative int64 is encoded as its two's complement; 0 is left out.
    return _WATCH_ID + varint(watch_id & (1 << 64) - 1) if watch_id else b""
