"""Whether this member has applied what its cluster had committed when it started.

A member that starts asks the leader for the commit index, with a ReadIndex round (Raft thesis, 6.4)
of its own, and has caught up once it has applied that index. Until then it is not ready. A second
round makes sure that the leader knows this, because the leader confirms that round only after it
has received this member's acknowledgements. So a learner that is ready can be promoted.

Until it has caught up, a member still answers serializable reads from its own state, as a slow
follower does. There are two exceptions, in which a client that comes from another member would see
revisions go back: a member that never took part in its cluster, which has no data yet, and a member
that receives a snapshot, which was away for long. Such a member `is_behind`: it refuses
serializable reads, watches and backups.
"""

from __future__ import annotations

import math
from contextlib import suppress

from etcdlite.errors import UNAVAILABLE, EtcdError
from etcdlite.identity import Identity
from etcdlite.raft import NotLeader, Raft, RequestDropped
from etcdlite.replica.state import State

RETRY_S = 0.5
"""The leader is asked again after this time without an answer."""


class CatchUp:
    """What a member waits for after its start. Nothing before `begin` is called."""

    def __init__(self, state: State, raft: Raft, identity: Identity) -> None:
        self._state = state
        self._raft = raft
        self._identity = identity
        self.is_over = True
        """This member has applied what was committed when it started."""
        self.is_behind = False
        """Clients may not read the state of this member."""
        self.is_joining = False
        """This member does not know the members of its cluster yet."""
        self.needed_index = 0
        """The index that must be applied; 0 while it is unknown."""
        self._is_confirmed = True
        """The current round is confirmed, so `needed_index` is known."""
        self._rounds_left = 0
        self._round = self._first_round = 0
        """The latest round, and the first one whose answer counts."""
        self._asked_at = -math.inf

    def begin(self) -> None:
        """The member starts."""
        members = self._state.membership.members
        own = members.get(self._identity.member_id)
        self.is_over = self._is_confirmed = False
        self._state.alarms.state_is_past = True
        self._rounds_left = 2
        self._first_round = self._round + 1
        self.is_joining = not members
        # A member publishes its client URLs as soon as it takes part.
        self.is_behind = own is None or not own.clientURLs

    def await_snapshot(self, index: int) -> None:
        """The leader sends a snapshot, because its log begins after this member's index."""
        if index > self._state.store.applied_index:
            self.needed_index = max(self.needed_index, index)
            self.is_behind = True

    @property
    def is_settled(self) -> bool:
        """There is nothing to wait for."""
        return self.is_over and not self.is_behind

    def ask(self, now: float) -> None:
        """Ask the leader for its commit index, unless that is known or asked for already."""
        if self._is_confirmed or now - self._asked_at < RETRY_S or not self._raft.leader:
            return
        self._asked_at = now
        self._round += 1
        with suppress(NotLeader, RequestDropped):  # `ask` is called again at the next tick.
            self._raft.read_index(self._context(self._round))

    def _context(self, number: int) -> bytes:
        return self._identity.incarnation.to_bytes(8, "big") + number.to_bytes(8, "big")

    def confirmed(self, context: bytes, index: int) -> None:
        """A ReadIndex round is confirmed, perhaps one of these. Far from the leader an answer takes
        longer than `RETRY_S`, so the answer to an earlier question counts too."""
        if not self._is_confirmed and self._context(self._first_round) <= context <= self._context(
            self._round
        ):
            self._is_confirmed = True
            self.needed_index = max(self.needed_index, index)

    def check_applied(self, now: float) -> None:
        """End the round if the needed index is applied. Called after entries were applied."""
        if not self._is_confirmed or self._state.store.applied_index < self.needed_index:
            return
        self.is_behind = False
        self._rounds_left -= 1
        if self._rounds_left > 0:
            self._is_confirmed = False
            self._first_round = self._round + 1
            self._asked_at = -math.inf
            self.ask(now)
        else:
            self.is_over = True
            self.is_joining = self._state.alarms.state_is_past = False


def behind_error() -> EtcdError:
    """The answer of a member that `is_behind`; clients ask another member."""
    return EtcdError(
        UNAVAILABLE, "etcdlite: this member has not caught up with its cluster yet; ask another one"
    )
