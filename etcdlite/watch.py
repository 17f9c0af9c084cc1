"""Watches: each change of the store goes to every watch on its key, once and in order.

A `WatchHub` has many `WatchStream`s (one per client stream), each with many watches on a key or a
range. A watch is in one of these states:

    synced  It has been sent everything up to `hub.revision`. It is in the index of synced watches,
            and `notify` sends it new events.
    behind  It lacks history from its `next` revision on, and waits for a sweep.
    served  It lacks history, and is in the index of a sweep.
    parked  It lacks history, and its sink is blocked. Nothing is read for it until the sink calls
            `wake`.
    future  Its start revision does not exist yet.

A watch that is not synced stores one number and no events, so a slow reader costs bounded memory.
A synced watch with a blocked sink is parked at the first revision that it cannot be sent.

`notify` does bounded work: watches beyond `max_sends_at_once` fall behind, and all watches do when
a batch has more than `max_events_at_once` events, or events for more than `max_moves_at_once`
watches. Large events and responses, and events in many ranges, count as several.

`run` catches up with sweeps. A sweep reads history once, slice by slice, from the first revision
that a waiting watch lacks up to the present, and sends each event to the watches of the sweep that
its index finds. A waiting watch joins the sweep when the sweep reaches its `next`; one that the
sweep has passed waits for another sweep. There are at most three, and they take turns:

    lag   for the synced watches, in their own index, after a batch that `notify` did not send
    near  from at most `near_revisions` before the present on, so that a watch that is a little
          behind does not wait for those that read a long history
    far   from anywhere on

So a watch waits for one sweep at most before it is served. A step takes about a millisecond.

Invariants. Within a watch, events ascend, none is missing or repeated, and none is below the start
revision. The events of one revision are in one response, unless the watch asked for fragments. A
response with events (its last fragment) or a progress notification with revision R in its header is
sent only after every event up to R; etcd's grpc-proxy relies on that. A watch sees a compaction
only as a canceled response, never as a gap.

A record that cannot be read ends the watches that need it, with etcd's "corrupt cluster", and no
others.

The hub never keeps events after `notify` has returned, and never sends events or periodic progress
to a blocked sink. The same calls give the same bytes: nothing depends on the order of a set or on
addresses. An ended watch is freed at once: it is in no reference cycle, which nothing would free.

The behaviour is that of etcd 3.6 (server/etcdserver/api/v3rpc/watch.go, server/storage/mvcc), with
two differences: a progress request on a stream that is not synced, or has a watch from the next
revision on, is not dropped, and responses with old events do not have the present revision in their
header.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Generator, Sequence
from itertools import chain, islice
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, Protocol

from sortedcontainers import SortedDict, SortedList

from etcdlite import errors, log, proto
from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.mvcc import Event, Store
from etcdlite.storage.intervals import Intervals
from etcdlite.storage.layout import DataDamaged
from etcdlite.storage.steps import discard, finish
from etcdlite.watch_responses import (
    CANCELED,
    CREATED,
    canceled,
    compacted,
    encode_event,
    header_field,
    id_field,
    response_steps,
)
from etcdlite.watch_slices import Encoded, Slices

FRAGMENT_BYTES = 1536 * 1024 + 512 * 1024
"""etcd's default for splitting into fragments: max-request-bytes plus 512 KiB."""

PROGRESS_INTERVAL_S = 600.0
MIN_PROGRESS_INTERVAL_S = 0.1

INVALID_WATCH_ID = -1
"""In responses that concern no watch, or all watches of a stream."""

# The reasons of a refused watch, in etcd's words.
EMPTY_RANGE = "mvcc: watcher range is empty"
DUPLICATE_ID = "mvcc: duplicate watch ID provided on the WatchStream"

_SYNCED, _BEHIND, _SERVED, _PARKED, _FUTURE = range(5)

# Options of a watch, as bits.
_NO_PUTS = 1
_NO_DELETES = 2
_PREV_KV = 4
_FRAGMENTS = 8

_NO_LIMIT = 1 << 62

# Chores: what `run` does besides sweeps, in the order of their turns.
_CHORES = _FORGET_CLOSED, _WAKE_PARKED, _START_FUTURE, _END_COMPACTED, _SYNC = range(5)

BYTES_PER_MATCH = 512
EVENTS_PER_PREVIOUS = 3
"""In `match_step_events`, this much of an encoded event counts as one more event, and a previous
value that is read counts as this many more."""

MATCHES_PER_EVENT = 4
MOVES_PER_GROUP = 10
"""In `match_step_events`, this many ranges that hold the key of an event, and groups of one of
them, count as one more event; in `max_moves_at_once`, watches of another key or range count as this
many more watches."""

BYTES_PER_SEND = 4096
"""In `max_sends_at_once`, this much of a response that is made counts as one more send."""
EVENTS_PER_SEND = 64
"""In `send_step_watches`, this many events that are joined count as one more watch."""

MAX_STARTS = 32
"""The most revisions within one slice of history at which watches begin; the slice ends before the
next one. Watches that begin at one revision are a group, and each group is matched by itself."""

_EVERYTHING = b""
"""The end of a range without an upper bound."""


class Sink(Protocol):
    """Where a stream's responses go. `send` only queues: at most it closes its stream."""

    @property
    def blocked(self) -> bool:
        """Too much is queued. When that ends, the owner calls `wake` of the stream."""

    def send(self, body: bytes) -> None:
        """Take one encoded WatchResponse."""


_CLOSED: Any = SimpleNamespace(blocked=True)
"""The sink of a closed stream: nothing can be sent to it."""


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
        self.id_field = id_field(watch_id)
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

    __slots__ = ("index", "name", "since", "options", "watches")

    def __init__(self, index: _Index, name: int, since: int, options: int) -> None:
        self.index = index
        self.name = name
        """`since` and `options` in one number."""
        self.since = since
        """The first revision whose events are sent to them."""
        self.options = options
        self.watches: dict[_Watch, None] = {}


_Groups = dict[int, _Group]
"""The groups of one key or range, by name."""


class _Index:
    """Watches by what they watch: keys in a dict, ranges in an interval tree."""

    __slots__ = ("keys", "ranges", "range_groups", "watches")

    def __init__(self, rng: random.Random) -> None:
        self.keys: dict[bytes, _Groups] = {}
        self.ranges: Intervals[_Groups] = Intervals(rng)
        self.range_groups = 0
        self.watches = 0

    def add(self, watch: _Watch, since: int) -> None:
        groups = self._make_groups(watch)
        name = since << 4 | watch.options
        group = groups.get(name)
        if group is None:
            group = groups[name] = _Group(self, name, since, watch.options)
            self.range_groups += watch.end is not None
        group.watches[watch] = None
        self.watches += 1
        watch.group = group

    def remove(self, watch: _Watch) -> None:
        group = watch.group
        assert group is not None
        watch.group = None
        self.watches -= 1
        del group.watches[watch]
        if group.watches:
            return
        self.range_groups -= watch.end is not None
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

    def _make_groups(self, watch: _Watch) -> _Groups:
        groups = self._groups(watch)
        if groups is None:
            groups = {}
            if watch.end is None:
                self.keys[watch.start] = groups
            else:
                self.ranges.add(watch.start, watch.end, groups)
        return groups

    def join_steps(self, watches: list[_Watch], step: int) -> Generator[None, None, None]:
        """Put those of these watches that are still in this index into the group that began first,
        so that all watches of one key or range share their bytes again. In steps."""
        for count, watch in enumerate(watches, 1):
            if watch.group is not None and watch.group.index is self and watch.group.since:
                self.remove(watch)
                self.add(watch, 0)
            if count % step == 0:
                yield

    def first(self, count: int) -> list[_Watch]:
        """Up to `count` of its watches."""
        every = chain(self.keys.values(), self.ranges.values())
        watches = (w for groups in every for group in groups.values() for w in group.watches)
        return list(islice(watches, count))

    def part_steps(
        self, events: Sequence[Event], limits: Limits, rng: random.Random
    ) -> Generator[None, None, list[_Index]]:
        """Indexes that share the groups of this one, for matching only. Each matches `events` with
        ranges at most `slice_matches` times, or has the range of one group."""
        matches: dict[_Group, int] = {}
        left = limits.match_step_events
        for event in events:
            left -= 1
            for groups in self.ranges.holding(event[1]):
                left -= len(groups)
                for group in groups.values():
                    matches[group] = matches.get(group, 0) + 1
            if left <= 0:
                left = limits.match_step_events
                yield
        part = _Index(rng)
        part.keys = self.keys
        parts = [part]
        size = 0
        for count, (group, number) in enumerate(matches.items(), 1):
            if size and size + number > limits.slice_matches:
                parts.append(part := _Index(rng))
                size = 0
            size += number
            watch = next(iter(group.watches), None)
            if watch is not None and watch.end is not None:
                part._make_groups(watch)[group.name] = group
            if count % limits.match_step_events == 0:
                yield
        return parts


class _Sweep:
    """One reading of history, for all watches in its index."""

    def __init__(self, index: _Index, position: int) -> None:
        self.index = index
        self.position = position
        """The first revision that its watches lack."""


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
        asked for fragments. `progress_interval_s` is at least `MIN_PROGRESS_INTERVAL_S`."""
        self.revision = store.revision
        """The last revision that `notify` got. The store may be ahead of it."""
        self.streams = 0
        self.watches = 0
        self.key_bytes = 0
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
        self._slow_watches = 0
        """Watches that are behind, served or parked."""
        self.lag: _Sweep | None = None
        """Set while the watches in the synced index lack what the sweep has not reached."""
        self._near: _Sweep | None = None
        self._far: _Sweep | None = None
        self._sweeps: deque[_Sweep] = deque()
        """Those three, without None, in the order of their turns."""
        self.closing: deque[WatchStream] = deque()
        """Closed streams whose watches `run` removes."""
        self.waking: dict[WatchStream, None] = {}
        """Streams with parked watches that `run` moves to behind, or with progress to answer."""
        self.awaiting_progress: dict[WatchStream, None] = {}
        """Streams that asked for progress while there is a lag."""
        self.slices = Slices(limits.kept_slices, 4 * limits.slice_bytes)
        self._job: Generator[None, None, None] | None = None
        """The step of a sweep that `run` continues."""
        self._is_chores_turn = False
        self._chore = 0
        """The chore that had the last turn."""
        self.timers: Any = SortedList()
        self._timer_number = 0
        self._now = 0.0

    def open(self, sink: Sink, quota: Quota | None = None) -> WatchStream:
        """`quota`: that of the client's connection."""
        self.streams += 1
        return WatchStream(self, sink, quota or Quota())

    def notify(self, events: Sequence[Event], last: int = 0) -> None:
        """Send what was just applied: all events of the next revisions, ascending. `last` is the
        last of these revisions. If there are more than `max_events_at_once`, or the first has no
        record, the rest may be left out."""
        if not events:
            return
        first, last = events[0][0], last or events[-1][0]
        assert self.revision < first <= last, (self.revision, first, last)
        self.revision = last
        if self.lag is None and self.synced.watches:
            if len(events) > self.limits.max_events_at_once or not events[0][3]:
                self._start_lag(first)
            else:
                begin = size = 0
                for at, event in enumerate(events):
                    if size > self.limits.response_bytes and event[0] != events[at - 1][0]:
                        self._notify_synced(events[begin:at])
                        begin, size = at, 0
                    size += len(event[3])
                self._notify_synced(events[begin:] if begin else events)
        self._start_future()

    @property
    def slow_watches(self) -> int:
        """Watches that lack history that exists."""
        return self._slow_watches + (self.synced.watches if self.lag is not None else 0)

    @property
    def has_work(self) -> bool:
        return bool(
            self._sweeps
            or self._behind
            or self.closing
            or self.waking
            or (self._future and self._future.peekitem(0)[0] <= self.revision + 1)
        )

    def run(self, is_over: Callable[[], bool]) -> bool:
        """Serve watches that are behind, in steps, until `is_over`; at least one step.

        Returns whether there is more work. Parked watches do not count as work."""
        while self.has_work:
            if self._job is None:
                self._begin_job()
            if self._job is not None and next(self._job, self) is self:
                self._job = None
            if is_over():
                break
        return self.has_work

    def _begin_job(self) -> None:
        """Chores and sweeps take turns, and so do the sweeps."""
        self._is_chores_turn = not self._is_chores_turn
        if self._is_chores_turn and self._do_next_chore():
            return
        self._start_sweeps()
        if self._sweeps:
            self._sweeps.rotate(-1)
            self._job = self._sweep_steps(self._sweeps[-1])
        elif not self._is_chores_turn:
            self._do_next_chore()

    def _do_next_chore(self) -> bool:
        """Each kind of chore gets its turn. Returns whether there was something to do."""
        for _ in _CHORES:
            self._chore = (self._chore + 1) % len(_CHORES)
            if self._do_chore(self._chore):
                return True
        return False

    def _do_chore(self, chore: int) -> bool:
        """Move up to `move_step_watches` watches. Returns whether the chore had anything to do."""
        most, behind, future = self.limits.move_step_watches, self._behind, self._future
        if chore == _FORGET_CLOSED and self.closing:
            watches = self.closing[0].by_id
            for watch in list(islice(watches.values(), most)):
                watch.stream.forget(watch)
            if not watches:
                self.closing.popleft()
        elif chore == _WAKE_PARKED and self.waking:
            for stream in list(islice(self.waking, most)):
                most -= stream.wake_some(most)
        elif chore == _START_FUTURE and future and future.peekitem(0)[0] <= self.revision + 1:
            self._start_future()
        elif chore == _END_COMPACTED and behind and behind.peekitem(0)[0] < self._store.compacted:
            self._end_compacted(list(islice(behind.peekitem(0)[1], most)))
        elif chore == _SYNC and behind and not self.lag and behind.peekitem(-1)[0] > self.revision:
            # They arrived while the synced watches lagged, and lack nothing now.
            first, watches = behind.peekitem(-1)
            for watch in list(islice(watches, most)):
                self.remove(watch)
                self.place(watch, _SYNCED, first)
        else:
            return False
        return True

    def restored(self, store: Store) -> None:
        """Switch to the store of a snapshot from the leader; the old one can still be read. What
        the synced watches missed is read from the new store, unless it is compacted there."""
        if self._job is not None:
            # What it has read of the old store is still right.
            finish(self._job)
            self._job = None
        self._store = store
        self.slices.clear()
        missed, self.revision = self.revision + 1, store.revision
        assert self.revision >= missed - 1, (self.revision, missed)
        if self.revision >= missed:
            if self.lag is None:
                self._start_lag(missed)
            self._start_future()

    def next_tick(self) -> float:
        """The latest time for the next `tick`; infinite if no progress timer runs."""
        return self.timers[0][0] if self.timers else math.inf

    def tick(self, now: float) -> None:
        """Send the periodic progress notifications that are due. `now`: seconds, never going back.

        The timer of a new watch starts at the latest tick, so call this in every turn of the loop;
        it costs nothing when none is due. It serves up to `tick_timers` watches: if more are due,
        `next_tick` is not after `now`."""
        self._now = now
        timers = self.timers
        header = b""
        for _ in range(self.limits.tick_timers):
            if not timers or timers[0][0] > now:
                break
            watch = timers.pop(0)[2]
            is_current = watch.state == _SYNCED and self.lag is None
            if watch.idle and is_current and not watch.sink.blocked:
                header = header or self.header_field()
                watch.sink.send(header + watch.id_field)
            watch.idle = True
            self.start_timer(watch)

    # Sending events.

    def _notify_synced(self, events: Sequence[Event]) -> None:
        """Send events to the synced watches, unless they lag; if it is too much, a lag starts."""
        if self.lag is not None:
            return
        limits = self.limits
        matching = self._match_steps(self.synced, events)
        try:
            for _ in range(0, limits.max_events_at_once, limits.match_step_events):
                next(matching)
            self._start_lag(events[0][0])
            return
        except StopIteration as matched:
            batches, most = matched.value, limits.max_sends_at_once
        moves = MOVES_PER_GROUP * len(batches) + sum(len(group.watches) for group in batches)
        if moves > limits.max_moves_at_once:  # Too many of them may be blocked or late.
            self._start_lag(events[0][0])
            return
        blocked, late = finish(self._send_steps(batches, events[-1][0], most))
        for watches, state in ((blocked, _PARKED), (late, _BEHIND)):
            for watch in watches:
                self.synced.remove(watch)
                self.place(watch, state, events[0][0])

    def _send_steps(
        self, batches: dict[_Group, list[bytes]], revision: int, max_sends: int
    ) -> Generator[None, None, tuple[list[_Watch], list[_Watch]]]:
        """Send each group its batch of encoded events, in steps. Returns two lists of watches:
        those whose sink is blocked, and those left out because of `max_sends`.

        Flat on purpose: this is the cost of a put per watch. The watches of a group share the
        joined events."""
        limits = self.limits
        blocked: list[_Watch] = []
        late: list[_Watch] = []
        if not batches:
            return blocked, late
        header = self.header_field(revision)
        send_step = limits.send_step_watches
        large_bytes = min(limits.step_bytes, self.fragment_bytes - 256)
        sends, others, pause_at = 0, 0, send_step
        for group, batch in batches.items():
            size = len(batch[0]) if len(batch) == 1 else sum(map(len, batch))
            others += len(batch) // EVENTS_PER_SEND
            is_large = size >= large_bytes
            joined = b"" if is_large else b"".join(batch)
            bodies: Sequence[bytes] = ()
            # Most clients count their watches from 0, so the watches of a group tend to have the
            # same id. Then they share the whole body, which matters when it is large.
            shared_id: bytes | None = None
            sent = 0
            for watch in list(group.watches):
                if sends + others >= pause_at:
                    pause_at = sends + others + send_step
                    yield
                sink = watch.sink
                if watch.group is not group:
                    continue  # It was cancelled between two steps.
                if sink.blocked:
                    others += 1
                    blocked.append(watch)
                    continue
                if sends >= max_sends:
                    late.append(watch)
                    continue
                if watch.id_field != shared_id:
                    shared_id = watch.id_field
                    sends += size // BYTES_PER_SEND
                    if is_large:
                        most = self.fragment_bytes if group.options & _FRAGMENTS else 0
                        bodies = yield from response_steps(header + shared_id, batch, most, limits)
                        if watch.group is not group:
                            continue
                    else:
                        bodies = (header + shared_id + joined,)
                sends += 1
                sent += 1
                watch.idle = False
                for body in bodies:
                    sink.send(body)
            self.events_sent += sent * len(batch)
        return blocked, late

    def _match_steps(
        self, index: _Index, events: Sequence[Event], known: Encoded | None = None
    ) -> Generator[None, None, dict[_Group, list[bytes]]]:
        """The encoded events for each group of watches in `index`, in steps. An event is encoded
        once for all watches (before, if it is in `known`)."""
        batches: dict[_Group, list[bytes]] = {}
        damaged: dict[_Group, DataDamaged] = {}
        left = step = self.limits.match_step_events
        keys = index.keys
        ranges = index.ranges
        has_ranges = ranges.root is not None
        for at, key, is_delete, kv in events:
            watching = ranges.holding(key) if has_ranges else []
            if (groups := keys.get(key)) is not None:
                watching.append(groups)
            left -= 1 + len(watching) // MATCHES_PER_EVENT
            while left < 0:
                left += step
                yield
            unwanted = _NO_DELETES if is_delete else _NO_PUTS
            plain = b""
            full = known.get((at, key), b"") if known else b""
            for groups in watching:
                left -= len(groups) // MATCHES_PER_EVENT
                for group in groups.values():
                    options = group.options
                    if at < group.since or options & unwanted:
                        continue
                    if options & _PREV_KV:
                        if not full:
                            left -= EVENTS_PER_PREVIOUS
                            try:
                                previous = self._store.previous(key, at)
                            except DataDamaged as found:
                                damaged[group] = found
                                continue
                            full = encode_event(is_delete, kv, previous)
                            if known is not None:
                                known[at, key] = full
                        encoded = full
                    else:
                        encoded = plain = plain or encode_event(is_delete, kv, None)
                    batch = batches.get(group)
                    if batch is None:
                        batches[group] = [encoded]
                    else:
                        batch.append(encoded)
            left -= (len(full) + len(plain)) // BYTES_PER_MATCH
        for group, damage in damaged.items():
            batches.pop(group, None)
            self._end_damaged(list(group.watches), damage)
        return batches

    def _end_compacted(self, watches: Sequence[_Watch]) -> None:
        """Cancel watches that need compacted history. As in etcd, the header has no revision."""
        self._end(watches, self.header_field(0), compacted(self._store.compacted))

    def _end_damaged(self, watches: Sequence[_Watch], damage: DataDamaged) -> None:
        """Cancel watches that need a record that cannot be read."""
        self._end(watches, self.header_field(), canceled(damage.report().text))

    def _end(self, watches: Sequence[_Watch], header: bytes, detail: bytes) -> None:
        for watch in watches:
            if watch.sink is not _CLOSED:
                watch.sink.send(header + watch.id_field + detail)
            if watch.id in watch.stream.by_id:  # Its sink may have closed the stream.
                watch.stream.forget(watch)
                self.waking[watch.stream] = None  # Progress comes after what is about to be sent.

    # Sweeps.

    def _start_lag(self, revision: int) -> None:
        self.lag = _Sweep(self.synced, revision)
        self._sweeps.append(self.lag)

    def _start_sweeps(self) -> None:
        """Start the sweeps that waiting watches need: a watch needs one that has not passed it."""
        behind = self._behind
        if not behind or (self._near is not None and self._far is not None):
            return
        near_begin = self.revision - self.limits.near_revisions
        positions = [sweep.position for sweep in self._sweeps]
        if self._near is None:
            first = next(behind.irange(near_begin, self.revision), None)
            if first is not None and not any(near_begin <= p <= first for p in positions):
                self._near = _Sweep(_Index(self._rng), first)
                self._sweeps.append(self._near)
                positions.append(first)
        first = behind.peekitem(0)[0]
        if self._far is None and first <= self.revision and not any(p <= first for p in positions):
            self._far = _Sweep(_Index(self._rng), first)
            self._sweeps.append(self._far)

    def _end_sweep(self, sweep: _Sweep) -> None:
        self._sweeps.remove(sweep)
        if not self._sweeps:
            self.slices.clear()
        if sweep is self._near:
            self._near = None
        elif sweep is self._far:
            self._far = None
        else:
            self.lag = None
            streams, self.awaiting_progress = self.awaiting_progress, {}
            for stream in streams:
                stream.answer_progress()

    def _sweep_steps(self, sweep: _Sweep) -> Generator[None, None, None]:
        """Serve one slice of history to the watches of a sweep. At the end of history they become
        synced."""
        index = sweep.index
        if not index.watches:
            first = next(self._behind.irange(sweep.position, self.revision), None)
            if first is None or sweep is self.lag:
                self._end_sweep(sweep)
                return
            sweep.position = first
        if sweep.position < self._store.compacted:
            self._end_compacted(index.first(self.limits.move_step_watches))
        elif sweep.position <= self.revision:
            yield from self._slice_steps(sweep)
        while sweep.position > self.revision and sweep is not self.lag:
            for watch in index.first(self.limits.move_step_watches):
                self.remove(watch)
                self.place(watch, _SYNCED, sweep.position)
            if not index.watches:
                break
            yield
        if not index.watches or (sweep is self.lag and sweep.position > self.revision):
            self._end_sweep(sweep)

    def _slice_steps(self, sweep: _Sweep) -> Generator[None, None, None]:
        """Read the next slice of history, serve it, and move the sweep to its end."""
        limits = self.limits
        index = sweep.index
        first, present = sweep.position, self.revision
        events, encoded = self.slices.get(first)
        try:
            if events is None:
                needed = self.slices.watches_of_previous > 0
                events = yield from self._store.event_steps(first, limits.slice_bytes, needed)
        except DataDamaged as damage:
            stuck = index.first(limits.move_step_watches)
            if not stuck:
                stuck = list(islice(self._behind.get(first, ()), limits.move_step_watches))
            self._end_damaged(stuck, damage)
            return
        last = min(events[-1][0], self.revision) if events else present
        joined, last = yield from self._join_steps(sweep, last)
        read = events
        if events and events[-1][0] > last:
            # The rest is for the next slice, or for `notify` if it was not notified yet.
            at = bisect_right(events, last, key=itemgetter(0))
            end = _piece_end(events, at, limits.max_events_at_once)
            if last < self.revision and end - at <= limits.max_events_at_once:
                self.slices.keep(last + 1, events[at:end], {})
            events = events[:at]
        yield from self._serve_steps(index, events, encoded)
        sweep.position = last + 1
        if len(read) > limits.max_events_at_once:
            yield from discard((encoded, events, read))
        elif last < self.revision:
            self.slices.keep(first, events, encoded)
        yield from index.join_steps(joined, limits.move_step_watches)

    def _serve_steps(
        self, index: _Index, events: Sequence[Event], encoded: Encoded
    ) -> Generator[None, None, None]:
        """Send events to the watches of a sweep, in pieces, and park those that do not read."""
        limits = self.limits
        begin = 0
        while begin < len(events):
            if begin:
                yield
            end = _piece_end(events, begin, limits.slice_matches // (index.range_groups or 1))
            piece = events if end - begin == len(events) else events[begin:end]
            begin = end
            parts = [index]
            if len(piece) * index.range_groups > limits.slice_matches:
                parts = yield from index.part_steps(piece, limits, self._rng)
            for number, part in enumerate(parts):
                if number:
                    yield
                    if not (yield from self._is_awaited_steps(part, index, piece[0][0])):
                        continue
                batches = yield from self._match_steps(part, piece, encoded)
                blocked, _ = yield from self._send_steps(batches, piece[-1][0], _NO_LIMIT)
                for at in range(0, len(blocked), limits.move_step_watches):
                    if at:
                        yield
                    self._park(blocked[at : at + limits.move_step_watches], index, piece[0][0])
                yield from discard(x for x in batches.values() if len(x) > limits.merge_step_items)

    def _is_awaited_steps(
        self, part: _Index, index: _Index, revision: int
    ) -> Generator[None, None, bool]:
        """Whether a watch of a part of `index` can be sent events from `revision` on. Those before
        it that cannot are parked: a client that does not read has nothing matched."""
        while watches := part.first(self.limits.move_step_watches):
            if not all(watch.sink.blocked for watch in watches):
                return True
            self._park(watches, index, revision)
            yield
        return False

    def _park(self, watches: list[_Watch], index: _Index, revision: int) -> None:
        """Park those of these watches that are still in `index` and lack events of `revision`."""
        for watch in watches:
            if watch.group is not None and watch.group.index is index:
                lacks = max(watch.next, revision)
                self.remove(watch)
                # If the sink was woken since, it will not be woken again.
                self.place(watch, _PARKED if watch.sink.blocked else _BEHIND, lacks)

    def _join_steps(
        self, sweep: _Sweep, last: int
    ) -> Generator[None, None, tuple[list[_Watch], int]]:
        """Move the waiting watches that lack nothing before the sweep's position, but something up
        to `last`, into the sweep. Returns those that do not need all of this slice, and the end of
        the slice: `last`, or before the first revision with too many starts."""
        most = self.limits.move_step_watches
        first = sweep.position
        is_lag = sweep is self.lag
        joined: list[_Watch] = []
        moved = starts = 0
        reached = first  # A watch that comes during a yield and begins below this waits.
        while (start := next(self._behind.irange(reached, last), None)) is not None:
            if start > reached:
                reached = start
                starts += 1
                if starts > MAX_STARTS:
                    return joined, start - 1
            if moved >= most:
                moved = 0
                yield
                continue
            watches = self._behind[start]
            since = 0 if start == first else start
            for _ in range(min(most, len(watches))):
                watch, _ = watches.popitem()
                if is_lag:
                    watch.state = _SYNCED
                    watch.stream.unsynced -= 1
                    watch.stream.answer_progress()
                    self._slow_watches -= 1
                else:
                    watch.state = _SERVED
                sweep.index.add(watch, since)
                if since:
                    joined.append(watch)
                moved += 1
            if not watches:
                del self._behind[start]
        return joined, last

    # States.

    def place(self, watch: _Watch, state: int, revision: int) -> None:
        """Move a detached watch into a state; `revision` is the first one that it lacks."""
        if state == _SYNCED and self.lag is not None:
            state = _BEHIND
        watch.state = state
        watch.next = revision
        stream = watch.stream
        if state == _SYNCED:
            self.synced.add(watch, 0)
            stream.answer_progress()
            return
        stream.unsynced += 1
        if state == _FUTURE:
            self._future.setdefault(revision, {})[watch] = None
            return
        self._slow_watches += 1
        if state == _PARKED:
            stream.parked[watch] = None
        else:
            self._behind.setdefault(revision, {})[watch] = None

    def remove(self, watch: _Watch) -> None:
        """Detach a watch from its state."""
        state = watch.state
        stream = watch.stream
        if watch.group is not None:
            watch.group.index.remove(watch)
        if state == _SYNCED:
            return
        stream.unsynced -= 1
        if state == _PARKED:
            del stream.parked[watch]
        elif state != _SERVED:
            queue = self._future if state == _FUTURE else self._behind
            watches = queue[watch.next]
            del watches[watch]
            if not watches:
                del queue[watch.next]
        if state != _FUTURE:
            self._slow_watches -= 1

    def _start_future(self) -> None:
        """Move some watches out of future: those whose start revision is next become synced, those
        whose start revision exists now become behind."""
        next_revision = self.revision + 1
        left = self.limits.move_step_watches
        while left > 0 and self._future and self._future.peekitem(0)[0] <= next_revision:
            start, watches = self._future.peekitem(0)
            for watch in list(islice(watches, left)):
                self.remove(watch)
                self.place(watch, _SYNCED if start == next_revision else _BEHIND, start)
                left -= 1

    def start_timer(self, watch: _Watch) -> None:
        # As etcd: up to a tenth more spreads the timers of clients that arrived together.
        wait_s = self._progress_interval_s * (1 + 0.1 * self._rng.random())
        self._timer_number += 1
        watch.timer = (self._now + wait_s, self._timer_number, watch)
        self.timers.add(watch.timer)

    def header_field(self, revision: int | None = None) -> bytes:
        return header_field(self._header(self.revision if revision is None else revision))


class Quota:
    """What the calls of one connection use together."""

    __slots__ = ("sends_snapshot", "watches")

    def __init__(self) -> None:
        self.watches = 0
        self.sends_snapshot = False
        """A backup is being sent."""


class WatchStream:
    """One client's stream of watches. Ids are unique within it. Made by `WatchHub.open`."""

    __slots__ = (
        "hub", "sink", "by_id", "_next_id", "_key_bytes", "unsynced", "parked",
        "_quota", "_wants_progress", "_is_closed",
    )  # fmt: skip

    def __init__(self, hub: WatchHub, sink: Sink, quota: Quota) -> None:
        self.hub = hub
        self._quota = quota
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
            or self._quota.watches >= limits.max_watches_per_connection
            or hub.watches >= limits.max_watches
            or hub.key_bytes + key_bytes > limits.max_key_bytes
        ):
            log.warn("refused a watch: limit of watches reached", "watches", watches=hub.watches)
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
        hub.slices.watches_of_previous += request.prev_kv
        if request.prev_kv and hub.slices.watches_of_previous == 1:
            hub.slices.clear()  # They may be too long for it.
        self._quota.watches += 1
        hub.key_bytes += key_bytes
        self._respond(watch.id_field + CREATED)
        present = hub.revision
        first = request.start_revision or present + 1
        state = _SYNCED if first == present + 1 else _BEHIND if first <= present else _FUTURE
        hub.place(watch, state, first)
        if request.progress_notify:
            hub.start_timer(watch)
        return int(watch_id)

    def refuse(self, reason: str) -> int:
        """Answer a create request that is not carried out: for example, permission denied."""
        self._respond(id_field(INVALID_WATCH_ID) + CREATED + canceled(reason))
        return INVALID_WATCH_ID

    def cancel(self, watch_id: int) -> None:
        """End a watch and confirm it. As in etcd, an unknown id gets no answer."""
        watch = self.by_id.get(watch_id)
        if watch is not None:
            self._respond(watch.id_field + CANCELED)
            self.forget(watch)
            self.answer_progress()

    def progress(self) -> None:
        """Send the revision up to which all watches of the stream are complete, once they are.

        A stream without watches gets no answer."""
        self._wants_progress = True
        self.answer_progress()

    def wake(self) -> None:
        """The sink is not blocked any more: `run` serves its parked watches again."""
        if self.parked:
            self.hub.waking[self] = None
        self.answer_progress()

    def wake_some(self, most: int) -> int:
        """Move parked watches to behind, if the sink is still not blocked. Returns how many."""
        hub = self.hub
        del hub.waking[self]
        if self.sink.blocked or self._is_closed:
            return 0
        watches = list(islice(self.parked, most))
        for watch in watches:
            hub.remove(watch)
            hub.place(watch, _BEHIND, watch.next)
        if self.parked:
            hub.waking[self] = None
        self.answer_progress()
        return len(watches)

    def close(self) -> None:
        """End all watches. Nothing is sent after this; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._wants_progress = False
            self.sink = _CLOSED  # The sink refers to the stream.
            self.hub.streams -= 1
            self.hub.waking.pop(self, None)
            self.hub.awaiting_progress.pop(self, None)
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
        hub.watches -= 1
        hub.slices.watches_of_previous -= watch.options & _PREV_KV > 0
        self._quota.watches -= 1
        if watch.timer is not None:
            hub.timers.remove(watch.timer)
            watch.timer = None  # It refers to the watch.
        del self.by_id[watch.id]
        key_bytes = len(watch.start) + len(watch.end or b"")
        self._key_bytes -= key_bytes
        hub.key_bytes -= key_bytes

    def answer_progress(self) -> None:
        # A watch in future counts as not synced: with a lower revision than its start revision, a
        # client would resume there and get events that it did not ask for.
        if not self._wants_progress or self.unsynced:
            return
        if self.hub.lag is not None:
            self.hub.awaiting_progress[self] = None
        elif not self.sink.blocked:
            self._wants_progress = False
            if self.by_id:
                self._respond(id_field(INVALID_WATCH_ID))

    def _respond(self, detail: bytes) -> None:
        self.sink.send(self.hub.header_field() + detail)


def _piece_end(events: Sequence[Event], begin: int, most: int) -> int:
    """The end of the whole revisions in `events` from `begin` on that together have at most `most`
    events, but at least the end of the first revision."""
    if len(events) - begin <= most:
        return len(events)
    revision = events[begin + most][0]
    end = bisect_left(events, revision, begin, key=itemgetter(0))
    return end if end > begin else bisect_right(events, revision, begin, key=itemgetter(0))
