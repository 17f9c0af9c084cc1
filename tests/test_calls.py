"""The calls of a session take turns, and those that wait cost nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rigs.lone_member import LoneMember

from etcdlite.errors import EtcdError
from etcdlite.wire.calls import PIECES_PER_SLICE, Call, Calls

MANY = 3000


class Endless(Call):
    def message(self, body: bytes) -> None:
        self.resume()

    def produce(self) -> None:
        self.send(b"piece")


class Waiting(Call):
    pass


class Owner:
    """A session of which each call may be stalled."""

    def __init__(self, lone: LoneMember) -> None:
        self.calls = Calls(lone.member, self)
        self.sent: list[int] = []
        self.stalled: set[int] = set()
        self.is_blocked = False
        self.looked = 0
        """How often the state of a call was asked for."""

    def open(self, count: int, kind: type[Call]) -> None:
        for request_id in range(1, count + 1):
            self.calls.open(request_id, 1, kind)
            self.calls.message(request_id, b"")

    def send_message(self, request_id: int, method: int, body: bytes) -> None:
        self.sent.append(request_id)

    def end_call(self, request_id: int, method: int) -> None:
        self.calls.close(request_id)

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        self.calls.close(request_id)

    def is_stalled(self, request_id: int) -> bool:
        self.looked += 1
        return request_id in self.stalled

    def resume(self, request_id: int) -> None:
        self.calls.resume(request_id)


@pytest.fixture
def owner(tmp_path: Path) -> Any:
    lone = LoneMember(tmp_path)
    yield Owner(lone)
    lone.close()


def test_calls_take_turns_a_few_pieces_at_a_time(owner: Owner) -> None:
    owner.open(MANY, Endless)
    owner.calls.produce()
    assert len(owner.sent) == PIECES_PER_SLICE
    for _ in range(MANY // PIECES_PER_SLICE):
        owner.calls.produce()
    assert owner.sent[:MANY] == list(range(1, MANY + 1))


def test_calls_that_their_client_does_not_read_are_looked_at_once(owner: Owner) -> None:
    owner.open(MANY, Endless)
    owner.stalled = set(range(1, MANY + 1))
    while owner.calls.have_more:
        owner.calls.produce()
    assert not owner.sent and owner.looked == MANY
    for _ in range(100):  # As many packets.
        assert not owner.calls.have_more
        owner.calls.produce()
    assert owner.looked == MANY
    owner.stalled.remove(7)
    owner.calls.wake(7)
    owner.calls.produce()
    assert owner.sent == [7]


def test_calls_with_nothing_to_produce_are_never_looked_at(owner: Owner) -> None:
    owner.open(MANY, Waiting)
    assert not owner.calls.have_more
    owner.calls.produce()
    owner.calls.wake_all()
    assert not owner.looked


def test_calls_keep_their_places_while_nothing_of_the_connection_is_read(owner: Owner) -> None:
    owner.open(10, Endless)
    owner.is_blocked = True
    assert not owner.calls.have_more
    owner.calls.produce()
    assert not owner.looked
    owner.is_blocked = False
    assert owner.calls.have_more


def test_a_call_that_ended_is_forgotten(owner: Owner) -> None:
    owner.open(2, Endless)
    owner.calls.close(1)
    owner.calls.produce()
    assert set(owner.sent) == {2}
