"""Tests of the threads that take the steps of handshakes."""

from __future__ import annotations

import queue
import threading
from typing import Any

from etcdlite import handshakes
from etcdlite.channel import Channel, ChannelError
from etcdlite.handshakes import MAX_HANDSHAKES, Handshakes, Stepped


class Waiting(Channel):
    """Its step ends when it is told to."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.may_end = threading.Event()
        self._fault = fault

    def receive(self, data: bytes) -> bytes:
        self.may_end.wait(30)
        if self._fault:
            raise self._fault
        return data.upper()


class Connection:
    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.is_closed = False


def made(count: int) -> list[Any]:
    return [Connection(Waiting()) for _ in range(count)]


def test_a_step_runs_in_a_thread_and_reports() -> None:
    results: queue.Queue[Stepped] = queue.Queue()
    steps = Handshakes(results.put)
    (one,) = made(1)
    assert steps.step(one, b"hello", False) is None
    assert results.empty()
    one.channel.may_end.set()
    assert results.get(timeout=30) == Stepped(one, b"HELLO", None)


def test_members_do_not_wait_for_clients() -> None:
    results: queue.Queue[Stepped] = queue.Queue()
    steps = Handshakes(results.put)
    client, member = made(2)
    steps.step(client, b"slow", False)
    member.channel.may_end.set()
    steps.step(member, b"fast", True)
    assert results.get(timeout=30).connection is member
    client.channel.may_end.set()


def test_the_oldest_unfinished_handshake_gives_way() -> None:
    steps = Handshakes(lambda result: None)
    connections = made(MAX_HANDSHAKES + 3)
    for one in connections:
        one.channel.may_end.set()
    late = [steps.step(one, b"", False) for one in connections[:MAX_HANDSHAKES]]
    assert late == [None] * MAX_HANDSHAKES
    assert steps.step(connections[1], b"another step", False) is None
    assert steps.step(connections[-3], b"", False) is connections[0]
    steps.end(connections[0], False)
    assert steps.step(connections[-2], b"", False) is connections[1]
    steps.end(connections[1], False)
    steps.end(connections[5], False)
    assert steps.step(connections[-1], b"", False) is None


def test_faults_are_reported_and_cost_the_connection_alone(monkeypatch: Any) -> None:
    logged: list[str] = []
    monkeypatch.setattr(handshakes.log, "error", lambda text, **fields: logged.append(text))
    results: queue.Queue[Stepped] = queue.Queue()
    steps = Handshakes(results.put)
    for fault, says in ((ChannelError("not welcome"), "not welcome"),
                        (ValueError("?"), "a fault in etcdlite")):  # fmt: skip
        one: Any = Connection(Waiting(fault))
        one.channel.may_end.set()
        steps.step(one, b"", False)
        assert str(results.get(timeout=30).failure) == says
    assert logged == ["a fault in a handshake; please report it"]


def test_a_closed_connection_is_passed_by() -> None:
    results: queue.Queue[Stepped] = queue.Queue()
    steps = Handshakes(results.put)
    closed, one = made(2)
    closed.is_closed = True
    one.channel.may_end.set()
    steps.step(closed, b"", False)
    steps.step(one, b"", False)
    assert results.get(timeout=30).connection is one
