"""Questions: requests that this member passes on, because only the leader can answer them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import NamedTuple

from etcdlite.errors import EtcdError, error
from etcdlite.identity import Identity
from etcdlite.methods import METHODS, Retry
from etcdlite.options import Options
from etcdlite.raft import Raft
from etcdlite.request import Done

MAX_HELD = 10_000
MAX_HELD_BYTES = 16 << 20
"""Questions that wait for a leader, and their size. More are answered "too many requests"."""

_LOST = ("Timeout", "TimeoutDueToConnectionLost")
"""After these errors a question that may be repeated is asked again: the leader may be dead."""

RETRIED_AT_ONCE = 1_000
"""Questions that one call of `retry` asks again: a few milliseconds. Each tick calls it."""


class _Question(NamedTuple):
    deadline: float
    method: int
    body: bytes
    done: Done


class Questions:
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
        self._held: list[tuple[float, int, _Question]] = []
        """A heap of those that wait for a leader: (deadline, number, question)."""
        self._held_bytes = 0
        self._sent: dict[int, tuple[int, _Question]] = {}
        """By number: (leader, question) for those that the leader was asked and may be repeated."""
        self._number = self._held_in_term = 0

    def ask(self, method: int, body: bytes, done: Done) -> None:
        """Ask the leader, and ask again if the leader changes. `done` is called once, with the
        answer or an EtcdError; with LeaderChanged if this member becomes the leader."""
        self._send(_Question(self._clock() + self._request_timeout_s, method, body, done))

    def _send(self, question: _Question) -> None:
        _, method, body, done = question
        may_repeat = METHODS[method].retry is Retry.ALWAYS
        self._number = number = self._number + 1
        leader = self._raft.leader

        def answered(answer: bytes | EtcdError) -> None:
            if may_repeat and not self._sent.pop(number, None):
                return  # Another leader is asked since, and its answer counts.
            failure = answer.name if isinstance(answer, EtcdError) else ""
            if failure == "NotLeader" or (may_repeat and failure in _LOST):
                self._hold(question)
            else:
                done(answer)

        if may_repeat:  # Noted first: `_ask` may answer at once, if the connection breaks.
            self._sent[number] = (leader, question)
        if leader and leader != self._own_id and self._ask(leader, method, body, answered):
            return
        self._sent.pop(number, None)
        self._hold(question)

    def _hold(self, question: _Question) -> None:
        size_bytes = len(question.body)
        if len(self._held) >= MAX_HELD or self._held_bytes + size_bytes > MAX_HELD_BYTES:
            question.done(error("RequestTooManyRequests"))
            return
        self._held_bytes += size_bytes
        self._number += 1
        heapq.heappush(self._held, (question.deadline, self._number, question))

    def _take(self) -> _Question:
        """The held question that times out first."""
        _, _, question = heapq.heappop(self._held)
        self._held_bytes -= len(question.body)
        return question

    def retry(self, is_open: Callable[[int], bool]) -> None:
        """If a leader can be reached, ask it some of the held questions, those that time out first.
        What an earlier leader has not answered, perhaps because it is dead, is held, too."""
        leader = self._raft.leader
        if not leader or not (leader == self._own_id or is_open(leader)):
            return
        if self._raft.term != self._held_in_term:
            self._held_in_term = self._raft.term
            for number in [number for number, sent in self._sent.items() if sent[0] != leader]:
                self._hold(self._sent.pop(number)[1])
        for _ in range(min(len(self._held), RETRIED_AT_ONCE)):
            question = self._take()
            if leader == self._own_id:  # This member can answer its own questions now.
                question.done(error("LeaderChanged"))
            else:
                self._send(question)

    def expire_steps(self, now: float) -> Iterator[None]:
        """Fail the questions that have waited too long for a leader, one in each step."""
        while self._held and self._held[0][0] <= now:
            self._take().done(self._timeout_error(now - self._request_timeout_s))
            yield
