"""Raft's log in memory: its entries, and the marks of how far each stage has come."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

ENTRY_OVERHEAD_BYTES = 200
"""Added to the size of an entry's data, in memory and in messages, by all limits of Raft."""

ENTRY_NORMAL = 0
ENTRY_CONF_CHANGE = 1


class RaftInvariantError(AssertionError):
    """A state that Raft excludes was reached: the process must stop."""


class Entry(NamedTuple):
    """One entry of the replicated log. `data` is opaque; it is empty in a new leader's no-op."""

    term: int
    index: int  # type: ignore[assignment]  # tuple.index is not missed
    kind: int
    data: bytes


class RaftLog:
    """The log in memory, and how far each stage has come. All marks are indexes of entries.

    offset     the last entry that is no longer in memory (compacted, or in a snapshot)
    applied    contained in the state machine
    applying   handed out to be applied
    committed  known to be committed
    stable     durable here
    offered    handed out to be made durable
    last       the end of the log"""

    def __init__(self, index: int, term: int, entries: Sequence[Entry]) -> None:
        self.offset = index
        self.offset_term = term
        self.entries = list(entries)
        self.size_bytes = 0
        for entry in entries:
            index += 1
            if entry.index != index or entry.term < term:
                raise RaftInvariantError(
                    f"the log has entry {entry.index} of term {entry.term}"
                    f" where entry {index} of term {term} or later must be"
                )
            term = entry.term
            self.size_bytes += len(entry.data) + ENTRY_OVERHEAD_BYTES
        self.last = self.offered = self.stable = index
        self.committed = self.applying = self.applied = self.offset
        # Batches on their way to the disk: [last index, its term, what becomes stable with it].
        self._batches: deque[list[int]] = deque()

    def recover(self, committed: int, applied: int) -> None:
        """Set the saved marks. What is applied is committed, whatever mark was saved."""
        if not self.offset <= applied <= self.last or committed > self.last:
            raise RaftInvariantError(
                f"the log has entries {self.offset + 1} to {self.last}, but {committed} is"
                f" committed and {applied} is applied"
            )
        self.committed = max(self.offset, committed, applied)
        self.applying = self.applied = applied

    def term(self, index: int) -> int:
        """The term of an entry; -1 if it is unknown (compacted, or beyond the end)."""
        if self.offset < index <= self.last:
            return self.entries[index - self.offset - 1].term
        return self.offset_term if index == self.offset else -1

    def append(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.last = entry.index
        self.size_bytes += len(entry.data) + ENTRY_OVERHEAD_BYTES

    def maybe_append(
        self, previous: int, previous_term: int, entries: Sequence[Entry], committed: int
    ) -> int | None:
        """Append what a leader sent after (previous, previous_term), and commit.

        Returns the index of the last entry that now equals the leader's, None if `previous` does
        not. Only entries that contradict the leader's are dropped: a message that comes late must
        not remove what a newer one added (thesis 3.5)."""
        if self.term(previous) != previous_term:
            return None
        last_new = previous + len(entries)
        for position, entry in enumerate(entries):
            if entry.index != previous + 1 + position:
                raise RaftInvariantError(f"an append has entry {entry.index} out of order")
            if entry.index > self.last or self.term(entry.index) != entry.term:
                self._truncate(entry.index - 1)
                for new in entries[position:]:
                    self.append(new)
                break
        self.commit_to(min(committed, last_new))
        return last_new

    def _truncate(self, last: int) -> None:
        if last >= self.last:
            return
        if last < self.committed:
            raise RaftInvariantError(
                f"entry {last + 1} contradicts the log, which is committed up to {self.committed}"
            )
        keep = last - self.offset
        self.size_bytes -= self.size_between(last, self.last)
        del self.entries[keep:]
        self.last = last
        self.stable = min(self.stable, last)
        self.offered = min(self.offered, last)
        for batch in self._batches:
            batch[2] = min(batch[2], last)

    def offer(self) -> Sequence[Entry]:
        """The entries that were not handed out to be written, at least one; now they are."""
        entries = self.entries[self.offered - self.offset :]
        self.offered = self.last
        self._batches.append([self.last, entries[-1].term, self.last])
        return entries

    def stable_to(self, index: int, term: int) -> None:
        """The batch that ended with (index, term) is durable, and all before it."""
        while self._batches:
            last, last_term, stable = self._batches.popleft()
            if stable > self.stable:
                self.stable = stable
            if last == index and last_term == term:
                return
        raise RaftInvariantError(f"entry {index} of term {term} was not handed out to be written")

    def commit_to(self, index: int) -> None:
        if index > self.committed:
            if index > self.last:
                raise RaftInvariantError(
                    f"entry {index} is committed, but the log ends with {self.last}"
                )
            self.committed = index

    def has_next_committed(self) -> bool:
        return (
            self.applying < self.committed
            and self.applying < self.stable
            and self.applied >= self.offset  # Otherwise a snapshot is still being installed.
        )

    def next_committed(self, max_bytes: int) -> Sequence[Entry]:
        """The next entries to apply: committed, durable, and not handed out yet."""
        if not self.has_next_committed():
            return ()
        entries = self.slice(self.applying + 1, min(self.committed, self.stable), max_bytes)
        self.applying += len(entries)
        return entries

    def applied_to(self, index: int) -> None:
        if not self.applied <= index <= self.applying:
            raise RaftInvariantError(
                f"entry {index} is applied, after {self.applied}; handed out is {self.applying}"
            )
        self.applied = index

    def has_unapplied_conf_change(self) -> bool:
        """Whether a committed membership change is not applied."""
        first = max(self.applied, self.offset) - self.offset
        committed = self.entries[first : self.committed - self.offset]
        return any(entry.kind == ENTRY_CONF_CHANGE for entry in committed)

    def last_index_not_above(self, index: int, term: int) -> int:
        """The last index up to `index` with a term of at most `term`, or the start of the log."""
        index = min(index, self.last)
        end = max(0, index - self.offset)
        count = bisect_right(self.entries, term, hi=end, key=lambda entry: entry.term)
        return min(index, self.offset + count)

    def slice(self, first: int, last: int, max_bytes: int) -> Sequence[Entry]:
        """The entries from `first` to `last`; at least one, and no more than `max_bytes` allow."""
        entries = self.entries[first - self.offset - 1 : last - self.offset]
        if len(entries) < 2:
            return entries
        size = 0
        for count, entry in enumerate(entries):
            size += len(entry.data) + ENTRY_OVERHEAD_BYTES
            if size > max_bytes and count:
                return entries[:count]
        return entries

    def size_between(self, after: int, last: int) -> int:
        """The size in bytes of the entries after `after` up to `last`, overhead included."""
        size = 0
        for entry in self.entries[after - self.offset : last - self.offset]:
            size += len(entry.data) + ENTRY_OVERHEAD_BYTES
        return size

    def compact(self, index: int, tail_bytes: int) -> None:
        """Drop the oldest entries up to `index`, but keep `tail_bytes`."""
        if index > self.applied:
            raise RaftInvariantError(
                f"compaction up to {index}, but only {self.applied} is applied"
            )
        if index == self.last and not tail_bytes:
            count, self.size_bytes = len(self.entries), 0
        else:
            count = 0
            for entry in islice(self.entries, max(0, index - self.offset)):
                size = len(entry.data) + ENTRY_OVERHEAD_BYTES
                if self.size_bytes - size < tail_bytes:
                    break
                self.size_bytes -= size
                count += 1
        if count:
            self.offset_term = self.entries[count - 1].term
            self.offset += count
            del self.entries[:count]

    def restore(self, index: int, term: int) -> None:
        """Replace the log by a snapshot. It is applied when `applied_to` says so."""
        self.entries = []
        self.size_bytes = 0
        self.offset = self.last = self.offered = self.stable = index
        self.committed = self.applying = index
        self.offset_term = term
        for batch in self._batches:
            batch[2] = 0
