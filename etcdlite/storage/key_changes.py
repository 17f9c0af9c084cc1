"""The keys that were created and deleted lately, so that counting the keys of an older revision is
quick.

The number of keys in a range as of an older revision is the present one, minus the keys that were
created since, plus those that were deleted. An overwrite changes nothing. Only the last changes are
kept. The keys of a revision before them must be counted one by one.

Invariants: the revisions of each kind ascend; every change after revision `since` is there.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right


class KeyChanges:
    """The keys that were created and deleted lately, in the order of their revisions."""

    def __init__(self, since: int, kept: int) -> None:
        """`since`: the present revision. `kept`: how many of the last changes stay when a kind has
        more than twice as many."""
        self._kept = kept
        self.since = since
        # `Store.put_all`, which is hot, appends to these lists itself.
        self.born: list[bytes] = []
        self.born_at = array("Q")
        """The revision that created each key."""
        self.gone: list[bytes] = []
        self.gone_at = array("Q")

    def add_gone(self, keys: list[bytes], revision: int) -> None:
        """These keys are deleted by `revision`."""
        self.gone += keys
        self.gone_at.extend([revision] * len(keys))
        self.trim()

    def trim(self) -> None:
        """Forget the oldest changes if there are too many. Call this often."""
        kept = self._kept
        if len(self.born) > 2 * kept:
            self.forget(self.born_at[-kept - 1])
        if len(self.gone) > 2 * kept:
            self.forget(self.gone_at[-kept - 1])

    def forget(self, revision: int) -> None:
        """Forget the changes up to `revision`."""
        if revision > self.since:
            self.since = revision
        at = bisect_right(self.born_at, revision)
        del self.born[:at], self.born_at[:at]
        at = bisect_right(self.gone_at, revision)
        del self.gone[:at], self.gone_at[:at]

    def growth(self, start: bytes, end: bytes | None, since: int, until: int) -> int | None:
        """The number of keys in [start, end) as of revision `until`, minus that as of `since`. None
        if it is not known, because changes after `since` were forgotten."""
        if since < self.since:
            return None
        total = 0
        for keys, revisions, sign in ((self.born, self.born_at, 1), (self.gone, self.gone_at, -1)):
            changed = keys[bisect_right(revisions, since) : bisect_right(revisions, until)]
            if end is None:
                total += sign * len([key for key in changed if start <= key])
            else:
                total += sign * len([key for key in changed if start <= key < end])
        return total
