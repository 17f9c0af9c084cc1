"""Tests of the threads that take the steps of handshakes."""

from __future__ import annotations

import queue
import socket
import threading
from typing import Any, cast

from etcdlite import connections, handshakes
from etcdlite.channel import Channel, ChannelError
from etcdlite.handshakes import MAX_HANDSHAKES, Handshakes, Stepped


class Waiting(Channel):
    """Its step ends when it is told to."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.began, self.may_end = threading.Event(), threading.Event()
        self._fault = fault

    def receive(self, data: bytes) -> bytes:
        self.began.set()
        self.may_end.wait(30)
        if self._fault:
            raise self._fault
        return data.upper()


class Connection:
    def __init__(self, channel: Channel, host: str = "10.0.0.1") -> None:
        self.channel = channel
        self.host = host
        self.is_closed = self.is_abandoned = self.is_member = False


def made(count: int) -> list[Any]:
    return [Connection(Waiting()) for _ in range(count)]


def test_a_step_runs_in_a_thread_and_reports() -> None:
    results: queue.Queue[Stepped] = queue.Queue()
    steps = Handshakes(results.put)
    (one,) = made(1)
    steps.step(one, b"hello")
    assert results.empty()
    one.channel.may_end.set()
    assert results.get(timeout=30) == Stepped(one, b"HELLO", None)


def test_members_do_not_wait_for_clients() -> None:
    results: queue.Queue[Stepped] = queue.Queue()
    steps = Handshakes(results.put)
    client, member = made(2)
    member.is_member = True
    steps.step(client, b"slow")
    member.channel.may_end.set()
    steps.step(member, b"fast")
    assert results.get(timeout=30).connection is member
    client.channel.may_end.set()


def test_the_oldest_handshake_that_has_begun_gives_way() -> None:
    steps = Handshakes(lambda result: None)
    connections = made(MAX_HANDSHAKES + 3)
    late = [steps.begun(one) for one in connections[:MAX_HANDSHAKES]]
    assert late == [None] * MAX_HANDSHAKES
    assert steps.begun(connections[1]) is None, "another step of the same"
    assert steps.begun(connections[-3]) is connections[0]
    steps.end(connections[0])
    assert steps.begun(connections[-2]) is connections[1]
    steps.end(connections[1])
    steps.end(connections[5])
    assert steps.begun(connections[-1]) is None
    (member,) = made(1)
    member.is_member = True
    assert steps.begun(member) is None, "members have places of their own"


def test_the_address_with_the_most_gives_way() -> None:
    steps = Handshakes(lambda result: None)
    honest: Any = Connection(Waiting(), "10.0.0.2")
    crowd = made(MAX_HANDSHAKES)
    steps.begun(honest)
    late = [steps.begun(one) for one in crowd]
    assert late[-1] is crowd[0] and not any(late[:-1])


def test_addresses_take_turns_and_the_newest_comes_first() -> None:
    results: queue.Queue[Stepped] = queue.Queue()
    steps = Handshakes(results.put)
    busy, first, second, third = made(4)
    other: Any = Connection(Waiting(), "10.0.0.2")
    steps.step(busy, b"")
    assert busy.channel.began.wait(30)
    for one in (first, second, third, other):
        one.channel.may_end.set()
        steps.step(one, b"")
    busy.channel.may_end.set()
    order = [results.get(timeout=30).connection for _ in range(5)]
    assert order[0] is busy
    assert order.index(other) <= 2
    assert [one for one in order if one in (first, second, third)] == [third, second, first]


def test_faults_are_reported_and_cost_the_connection_alone(monkeypatch: Any) -> None:
    logged: list[str] = []
    monkeypatch.setattr(handshakes.log, "error", lambda text, *limit, **fields: logged.append(text))
    results: queue.Queue[Stepped] = queue.Queue()
    steps = Handshakes(results.put)
    for fault, says in ((ChannelError("not welcome"), "not welcome"),
                        (ValueError("?"), "a fault in etcdlite")):  # fmt: skip
        one: Any = Connection(Waiting(fault))
        one.channel.may_end.set()
        steps.step(one, b"")
        assert str(results.get(timeout=30).failure) == says
    assert logged == ["a fault in a handshake; please report it"]


def test_no_step_is_taken_for_a_connection_that_the_other_side_has_closed() -> None:
    """A hello costs its sender nothing, and the answer takes milliseconds of CPU."""
    results: queue.Queue[Stepped] = queue.Queue()
    steps = Handshakes(results.put)
    (left,) = made(1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        connection = connections.Connection(ours, "", "", None, cast(Any, None), left.channel)
        theirs.send(b"more of the hello")
        assert not connection.is_abandoned
        ours.recv(100)
        assert not connection.is_abandoned
        theirs.close()
        assert connection.is_abandoned
    assert connection.is_abandoned, "this side has closed it"
    left.is_abandoned = True
    steps.step(left, b"hello")
    assert "closed the connection" in str(results.get(timeout=30).failure)
    assert not left.channel.began.is_set()


def test_a_client_may_close_its_half_of_the_connection_after_its_request() -> None:
    """Its last message of the handshake, the request and the end can arrive together."""
    results: queue.Queue[Stepped] = queue.Queue()
    steps = Handshakes(results.put)
    (client,) = made(1)
    client.channel.may_end.set()
    for is_last in (False, True):
        client.is_abandoned = is_last
        steps.step(client, b"get")
        assert results.get(timeout=30) == Stepped(client, b"GET", None)
        assert is_last or steps.begun(client) is None


def test_a_closed_connection_is_passed_by() -> None:
    results: queue.Queue[Stepped] = queue.Queue()
    steps = Handshakes(results.put)
    closed, one = made(2)
    closed.is_closed = True
    one.channel.may_end.set()
    steps.step(closed, b"")
    steps.step(one, b"")
    assert results.get(timeout=30).connection is one
