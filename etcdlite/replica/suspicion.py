"""A leader that is silent: paused, cut off, or without power. Its connections are not reset.

A leader sends a heartbeat at every interval. A follower suspects it after a silence that is longer,
by a margin, than every one that it saw lately. So a follower on a slow network, or one whose leader
pauses now and then, waits longer. After an election timeout of silence consensus campaigns anyway,
so nothing is suspected if the limit would be longer than that.

A suspicion decides nothing. The follower forgets the leader and asks for a pre-vote, which only
followers that suspect the leader, too, or have waited for an election timeout, grant. So one slow
follower, or one bad link between two members, elects nobody, and a leader that reaches a majority
stays. Safety does not depend on any of these times: votes follow the same rules as after an
election timeout, and a leader confirms reads and renewals of leases by a round of heartbeats.

The smallest margin comes from what must not depose a leader: a stall of 0.3 s (a collection of
garbage, a slow sync in the loop, a host that runs another machine), after which the next heartbeat
still has to arrive.
"""

from __future__ import annotations

import math

MARGIN_S = 0.35
MARGIN_HEARTBEATS = 3.5
"""The margin is the longer one of the two: longer intervals say that the network is slower."""

RECENT_S = 60.0
"""The longest silences are remembered for one to two times this long."""


class Suspicion:
    """How long the leader may be silent."""

    def __init__(self, heartbeat_s: float, election_timeout_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self._margin_s = max(MARGIN_S, MARGIN_HEARTBEATS * heartbeat_s)
        self._election_timeout_s = election_timeout_s
        self._longest_s = self._longest_before_s = heartbeat_s
        """The longest silences of this period and of the one before."""
        self._period_ends_at = -math.inf

    def observe(self, silence_s: float, now: float) -> None:
        """The leader was silent for `silence_s`, and then was heard from again."""
        if now >= self._period_ends_at:
            self._period_ends_at = now + RECENT_S
            self._longest_before_s, self._longest_s = self._longest_s, self._heartbeat_s
        self._longest_s = max(self._longest_s, silence_s)

    @property
    def limit_s(self) -> float:
        """The leader is suspected after a silence of this length; infinite if it is not."""
        limit_s = max(self._longest_s, self._longest_before_s) + self._margin_s
        return limit_s if limit_s < self._election_timeout_s else math.inf
