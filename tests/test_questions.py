"""Questions to the leader: one that finds no leader for long enough fails, even if it was sent to
several members."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from etcdlite.errors import EtcdError, error
from etcdlite.methods import KEEP_ALIVE, METHOD_BY_NAME, TIME_TO_LIVE
from etcdlite.options import Options
from etcdlite.replica.questions import MAX_HELD_BYTES, Questions


class Elections:
    """What the questions ask of Raft. Each new leader has a term of its own."""

    def __init__(self) -> None:
        self.term = 1
        self._leader = 2

    @property
    def leader(self) -> int:
        return self._leader

    @leader.setter
    def leader(self, leader: int) -> None:
        self._leader = leader
        self.term += leader == 0


class Asked:
    """Questions of member 1 to leader 2, which answers when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.raft = Elections()
        self.waiting: list[Any] = []
        self.answers: list[Any] = []
        self.questions = Questions(
            self.raft,  # type: ignore[arg-type]
            SimpleNamespace(member_id=1),  # type: ignore[arg-type]
            lambda: self.now,
            Options(request_timeout_s=5.0),
            self._sent,
            lambda since: error("Timeout"),
        )

    def _sent(self, leader: int, method: int, body: bytes, done: Any) -> bool:
        self.waiting.append(done)
        return True

    def expire(self, now: float) -> None:
        for _ in self.questions.expire_steps(now):
            pass

    def ask(self, body: bytes = b"", method: int = 0x20) -> None:
        self.questions.ask(method, body, self.answers.append)


def test_a_question_that_is_sent_from_member_to_member_ends_with_its_time() -> None:
    asked = Asked()
    asked.ask()
    for second in range(1, 10):
        asked.now = float(second)
        for done in asked.waiting:
            done(error("NotLeader"))
        asked.waiting.clear()
        asked.expire(asked.now)
        asked.questions.retry(lambda node: True)
    (answer,) = asked.answers
    assert isinstance(answer, EtcdError) and answer.name == "Timeout"


@pytest.mark.parametrize("loss", ["Timeout", "TimeoutDueToConnectionLost"])
def test_a_question_whose_answer_is_lost_is_asked_again_if_that_does_no_harm(loss: str) -> None:
    add = METHOD_BY_NAME["Cluster.MemberAdd"].number
    for method, may_repeat in ((TIME_TO_LIVE, True), (KEEP_ALIVE, True), (add, False)):
        asked = Asked()
        asked.ask(method=method)
        asked.waiting.pop()(error(loss))
        assert bool(asked.answers) != may_repeat
        asked.questions.retry(lambda node: True)
        assert bool(asked.waiting) == may_repeat
        asked.now = 6.0
        for done in asked.waiting:
            done(error(loss))
        asked.expire(asked.now)
        (answer,) = asked.answers
        assert isinstance(answer, EtcdError)


@pytest.mark.parametrize("leader", [1, 3])
def test_a_question_to_a_leader_that_hangs_goes_to_the_next_one(leader: int) -> None:
    asked = Asked()
    asked.ask(method=KEEP_ALIVE)
    asked.ask()  # It may have been carried out.
    hanging, asked.waiting = asked.waiting, []
    asked.questions.retry(lambda node: True)
    assert not asked.waiting
    asked.raft.leader = 0
    asked.questions.retry(lambda node: True)
    assert not asked.waiting
    asked.raft.leader = leader
    asked.questions.retry(lambda node: True)
    if leader == 1:
        assert [answer.name for answer in asked.answers] == ["LeaderChanged"]
    else:
        asked.waiting.pop()(b"next")
        assert asked.answers == [b"next"] and not asked.waiting
    for done in hanging:
        done(b"late")
    assert asked.answers[1:] == [b"late"], "the one that is not asked twice"


def test_the_question_that_has_waited_longest_fails_first() -> None:
    asked = Asked()
    asked.ask()
    asked.raft.leader = 0
    asked.now = 4.0
    asked.ask()
    asked.waiting[0](error("NotLeader"))
    asked.expire(5.5)
    assert len(asked.answers) == 1
    asked.expire(9.5)
    assert len(asked.answers) == 2


@pytest.mark.parametrize("leader", [1, 2])
def test_many_questions_are_asked_again_a_part_at_a_time(leader: int) -> None:
    asked = Asked()
    asked.raft.leader = 0
    for number in range(2500):
        asked.questions.ask(0x20, b"", lambda answer, number=number: asked.answers.append(number))
    asked.raft.leader = leader
    counts = []
    for _ in range(4):
        asked.questions.retry(lambda node: True)
        while asked.waiting:
            asked.waiting.pop(0)(b"")
        counts.append(len(asked.answers))
    assert counts == [1000, 2000, 2500, 2500]
    assert asked.answers == sorted(asked.answers), "the oldest first"


def test_questions_that_wait_for_a_leader_hold_little_memory() -> None:
    asked = Asked()
    asked.raft.leader = 0
    for now in (1.0, 7.0):  # The second time, those of the first time have ended.
        asked.now = now
        asked.expire(now)
        asked.answers.clear()
        for _ in range(20):
            asked.ask(bytes(1 << 20))
        assert [answer.name for answer in asked.answers] == ["RequestTooManyRequests"] * 4
    asked.raft.leader = 2
    asked.questions.retry(lambda node: True)
    asked.raft.leader = 0
    asked.ask(bytes(MAX_HELD_BYTES))
    assert len(asked.answers) == 4


def test_a_member_that_leads_now_answers_itself() -> None:
    asked = Asked()
    asked.raft.leader = 0
    asked.ask()
    asked.raft.leader = 1
    asked.questions.retry(lambda node: True)
    assert [answer.name for answer in asked.answers] == ["LeaderChanged"]
