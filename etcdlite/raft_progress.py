"""What a leader knows about each member, and the window in which it sends to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from etcdlite.raft_log import ENTRY_OVERHEAD_BYTES, Entry

PROBE, REPLICATE, SNAPSHOT = range(3)


class Progress:
    """What a leader knows about one member's log, and how it sends to that member.

    match             the last entry that the member is known to have
    next              the next entry to send
    committed         the commit index that the member is known to know
    sent_commit       what the last append lets the member commit
    paused            no append is sent until the member answers
    recent_active     a message came since the last check of the quorum
    was_active        one came between that check and the one before
    pending_snapshot  the index of the snapshot that is being sent, or 0
    kept_index        the log is kept from here until the member has caught up after a snapshot,
                      or 0

    state      how appends are sent                     the next state
    PROBE      one at a time                            REPLICATE once the logs agree
    REPLICATE  ahead of the answers, within a window    PROBE after a rejection or a lost message
    SNAPSHOT   none: a snapshot is on its way           PROBE once it is delivered or has failed,
                                                        REPLICATE once it is acknowledged
    A member whose next entry is compacted goes to SNAPSHOT."""

    def __init__(self, next: int, max_messages: int, max_bytes: int) -> None:
        self.state = PROBE
        self.match = 0
        self.next = next
        self.paused = False
        self.recent_active = self.was_active = False
        self.pending_snapshot = 0
        self.kept_index = 0
        self.sent_commit = 0
        self.committed = 0
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self.inflight: deque[tuple[int, int]] = deque()
        self._inflight_bytes = 0

    def become_probe(self) -> None:
        after_snapshot = self.pending_snapshot if self.state == SNAPSHOT else 0
        self._become(PROBE)
        self.next = max(self.match, after_snapshot) + 1

    def become_replicate(self) -> None:
        self._become(REPLICATE)
        self.next = self.match + 1

    def become_snapshot(self, index: int) -> None:
        self._become(SNAPSHOT)
        self.pending_snapshot = self.kept_index = index
        self.next = index + 1

    def _become(self, state: int) -> None:
        self.state = state
        self.paused = False
        self.pending_snapshot = 0
        self.sent_commit = 0
        self.inflight.clear()
        self._inflight_bytes = 0

    @property
    def is_active(self) -> bool:
        """A message came since the check of the quorum before the last, which may be just now."""
        return self.recent_active or self.was_active

    def is_paused(self) -> bool:
        return self.paused or self.state == SNAPSHOT

    def inflight_is_full(self) -> bool:
        return len(self.inflight) >= self._max_messages or self._inflight_bytes >= self._max_bytes

    def sent(self, entries: Sequence[Entry]) -> None:
        """Record that an append with these entries was sent."""
        if self.state == PROBE:
            self.paused = bool(entries)
            return
        if entries:
            size = ENTRY_OVERHEAD_BYTES * len(entries)
            for entry in entries:
                size += len(entry.data)
            self.next += len(entries)
            self.inflight.append((self.next - 1, size))
            self._inflight_bytes += size
        # An append that fills the window, or finds it full, is a probe: wait for its answer.
        self.paused = self.inflight_is_full()

    def free_inflight(self, index: int) -> None:
        while self.inflight and self.inflight[0][0] <= index:
            self._inflight_bytes -= self.inflight.popleft()[1]

    def maybe_update(self, index: int) -> bool:
        """The member has everything up to `index`; False if that was known."""
        if index <= self.match:
            return False
        self.match = index
        self.next = max(self.next, index + 1)
        self.paused = False
        return True

    def maybe_decrease(self, rejected: int, hint: int) -> bool:
        """The member refused the append after `rejected`; False if that answer is stale."""
        if self.state == REPLICATE:
            return rejected > self.match
        if self.next - 1 != rejected:
            return False
        self.next = max(min(rejected, hint + 1), self.match + 1)
        self.paused = False
        return True
