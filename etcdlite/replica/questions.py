"""Questions: requests that this member passes on, because only the leader can answer them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from etcdlite.errors import EtcdError, error
from etcdlite.identity import Identity
from etcdlite.options import Options
from etcdlite.raft import Raft
from etcdlite.request import Done

MAX_HELD = 10_000
"""Questions that wait for a leader. A further one is answered "too many requests"."""


class Questions:
    """The questions that are not answered yet."""

    def __init__(
        self,
        raft: Raft,
        identity: Identity,
        clock: Callable[[], float],
        options: Options,
        ask: Callable[[int, int, bytes, Done], bool],
        timeout_error: Callable[[float], EtcdError],
    ) -> None:
        """`ask(leader, method, body, done)` sends a question to the leader; it returns False if the
        leader cannot be reached now. `timeout_error` returns the error for a request that waits
        since a time."""
        self._raft = raft
        self._own_id = identity.member_id
        self._clock = clock
        self._ask = ask
        self._timeout_error = timeout_error
        self._request_timeout_s = options.request_timeout_s
        self._held: deque[tuple[float, int, bytes, Done]] = deque()
        """(deadline, method, body, done) of the questions that wait for a leader."""

    def ask(self, method: int, body: bytes, done: Done) -> None:
        """Ask the leader, and ask again if the leader changes. `done` is called once, with the
        answer or an EtcdError; with LeaderChanged if this member becomes the leader."""
        deadline = self._clock() + self._request_timeout_s

        def answered(answer: bytes | EtcdError) -> None:
            if isinstance(answer, EtcdError) and answer.name == "NotLeader":
                self._held.append((deadline, method, body, done))
            else:
                done(answer)

        leader = self._raft.leader
        if leader and leader != self._own_id and self._ask(leader, method, body, answered):
            return
        if len(self._held) < MAX_HELD:
            self._held.append((deadline, method, body, done))
        else:
            done(error("RequestTooManyRequests"))

    def retry(self, is_open: Callable[[int], bool]) -> None:
        """Ask the held questions, if there is a leader that can be reached."""
        leader = self._raft.leader
        if not self._held or not leader:
            return
        if leader == self._own_id:
            # This member can answer its own questions now.
            held, self._held = self._held, deque()
            for _, _, _, done in held:
                done(error("LeaderChanged"))
        elif is_open(leader):
            held, self._held = self._held, deque()
            for _, method, body, done in held:
                self.ask(method, body, done)

    def tick(self, now: float) -> None:
        """Fail the questions that have waited too long for a leader."""
        while self._held and self._held[0][0] <= now:
            _, _, _, done = self._held.popleft()
            done(self._timeout_error(now - self._request_timeout_s))
