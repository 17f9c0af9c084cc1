"""Both shells of the Python client against a server that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pickle
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rigs.fake_server import DROP, GREETING, IGNORE, FakeConnection, FakeServer, FakeStore
from rigs.ports import free_ports
from rigs.shells import Facade, clients

from etcdlite import frames, methods, proto
from etcdlite.client import (
    AsyncClient,
    Client,
    Closed,
    Compacted,
    ConnectionFailed,
    EmptyKey,
    EtcdliteError,
    LearnerNotReady,
    LeaseLost,
    LeaseNotFound,
    Member,
    MemberNotFound,
    NoLeader,
    NotLeader,
    PeerURLExist,
    PermissionDenied,
    ProtocolViolation,
    Put,
    RequestTooLarge,
    Timeout,
    Unimplemented,
    UnknownOutcome,
    aio,
    link,
    scripts,
)
from etcdlite.errors import ERRORS

Connect = Callable[..., Any]

PUT = methods.METHOD_BY_NAME["KV.Put"].number


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of the shell under test, which look the same."""

    with clients(request.param) as make:

        def connect(*servers: FakeServer | str, **options: Any) -> Any:
            return make([s if isinstance(s, str) else s.endpoint for s in servers], **options)

        yield connect


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """For what the server notices in its own time."""
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.005)


def sent(server: FakeServer, method: str) -> int:
    return sum(name == method for name, _ in server.requests)


def free_endpoint() -> str:
    """Where nobody listens."""
    return f"127.0.0.1:{free_ports(1)[0]}"


def once(answer: str | bytes, method: str) -> Callable[..., str | bytes | None]:
    """Intercepts the first request of a method."""
    left = [answer]

    def intercept(_: FakeConnection, request_id: int, name: str, __: Any) -> str | bytes | None:
        return left.pop() if name == method and left else None

    return intercept


# Calls.


def test_keys_and_values_go_in_as_text_or_bytes_and_come_out_as_bytes(
    connect: Connect, server: FakeServer
) -> None:
    client = connect(server)
    assert client.put("greeting", "hällo").revision == 2
    assert client.put(b"other", b"\xff").revision == 3
    kv = client.get(b"greeting")
    assert (kv.key, kv.value, kv.mod_revision) == (b"greeting", "hällo".encode(), 2)
    assert client.get("nothing") is None
    assert [kv.key for kv in client.range(prefix="")] == [b"greeting", b"other"]
    assert client.perform(Put("greeting", "again")).revision == 4
    assert client.endpoint == server.endpoint


def test_what_the_server_refuses_is_raised_as_its_own_type(
    connect: Connect, server: FakeServer
) -> None:
    client = connect(server)
    with pytest.raises(EmptyKey, match="etcdserver: key is not provided") as refused:
        client.put("", "v")
    assert (refused.value.code, refused.value.endpoint) == (3, server.endpoint)
    with pytest.raises(Unimplemented):
        client.members()
    assert client.put("k", "v").revision == 2, "an error costs only its own request"


def test_a_request_too_large_for_the_server_does_not_cost_the_connection(
    connect: Connect, server: FakeServer
) -> None:
    client = connect(server)
    with pytest.raises(RequestTooLarge):
        client.put("k", b"x" * (1 << 20))
    client.put("k", "v")
    assert len(server.connections) == 1


def test_a_call_that_times_out_is_cancelled(connect: Connect, server: FakeServer) -> None:
    client = connect(server)
    client.get("k")
    server.intercept = once(IGNORE, "KV.Put")
    with pytest.raises(Timeout, match=rf"{server.endpoint}: KV.Put was not answered within 0.1 s"):
        client.put("k", "v", timeout_s=0.1)
    wait_until(lambda: server.cancelled == [2], "the cancel")
    assert client.get("k") is None
    assert len(server.connections) == 1, "the connection goes on"


def test_a_reply_that_cannot_be_read_costs_only_its_call(
    connect: Connect, server: FakeServer
) -> None:
    client = connect(server)
    server.intercept = once(frames.frame(1, PUT, frames.END, b"\xff\xff"), "KV.Put")
    with pytest.raises(ProtocolViolation, match=r"KV\.Put"):
        client.put("k", "v")
    client.put("k", "v")
    assert len(server.connections) == 1


def test_threads_share_one_connection(server: FakeServer) -> None:
    with Client(server.endpoint) as client:

        def work(number: int) -> None:
            for i in range(50):
                client.put(f"{number}/{i}", "v")
                assert client.get(f"{number}/{i}").value == b"v"

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(work, range(16)))
        assert client.range(prefix="", count_only=True).count == 800
        assert len(server.connections) == 1


def test_closing_ends_the_calls_that_wait(connect: Connect, server: FakeServer) -> None:
    client = connect(server)
    client.get("k")
    server.intercept = lambda *_: IGNORE
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(client.get, "k")
        writing = pool.submit(client.put, "k", "v")
        wait_until(lambda: len(server.requests) == 3, "both calls")
        client.close()
        with pytest.raises(Closed):
            reading.result()
        with pytest.raises(UnknownOutcome):
            writing.result()
    with pytest.raises(Closed):
        client.get("k")


def test_a_call_ends_at_its_timeout_while_the_server_is_slow_to_take_it_in(
    connect: Connect,
) -> None:
    with FakeServer() as server:
        server.bytes_at_once = 1024  # 100 KiB/s; a request that waits for it all, for 10 s
        client = connect(server, timeout_s=0.2)
        server.intercept = lambda *_: DROP
        with pytest.raises(Timeout, match=r"KV\.Put was not answered within 0\.2 s"):
            client.put("k", b"x" * 1_000_000)


def test_a_large_request_is_sent_whole_however_slow_the_server_is(connect: Connect) -> None:
    with FakeServer() as server:
        server.bytes_at_once = 1 << 20
        client = connect(server)
        with ThreadPoolExecutor(8) as pool:
            values = [bytes([number]) * 1_000_000 for number in range(8)]
            list(pool.map(client.put, "abcdefgh", values))
        assert [kv.value for kv in client.range(prefix="")] == values
        assert len(server.connections) == 1


def test_a_call_that_cannot_be_sent_in_time_leaves_the_requests_of_others_alone(
    connect: Connect,
) -> None:
    with FakeServer() as server:
        server.bytes_at_once = 1 << 16
        client = connect(server, dial_timeout_s=30.0, timeout_s=60.0)
        assert client.get("k") is None
        server.intercept = lambda *about: IGNORE if about[2] == "KV.Range" else None
        with ThreadPoolExecutor(8) as pool:
            puts = [pool.submit(client.put, f"{number}", b"x" * 1_000_000) for number in range(8)]
            while not all(put.done() for put in puts):
                with contextlib.suppress(Timeout):
                    client.get("k", timeout_s=0.05)
        assert sorted(put.result().revision for put in puts) == list(range(2, 10))
        assert len(server.connections) == 1


# Broken connections and several endpoints.


def test_an_address_that_does_not_answer_leaves_time_for_the_others_of_its_name(
    connect: Connect, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as opened:
        silent = opened.enter_context(socket.socket())
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for _ in range(2):  # They fill its backlog: further connections wait.
            filling = opened.enter_context(socket.socket())
            filling.setblocking(False)
            filling.connect_ex(silent.getsockname())
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
            for address in (silent.getsockname(), ("127.0.0.1", server.port))
        ]
        look_up = socket.getaddrinfo

        def addresses(host: Any, *others: Any, **options: Any) -> Any:
            return found if host == "two.test" else look_up(host, *others, **options)

        monkeypatch.setattr(socket, "getaddrinfo", addresses)
        client = connect(f"two.test:{server.port}", dial_timeout_s=1.0)
        assert client.put("k", "v").revision == 2


def test_a_link_local_address_of_a_name_keeps_its_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    async def look_up(*_: Any, **__: Any) -> Any:
        loopback = socket.if_nametoindex("lo")
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 2379, 0, loopback))]

    async def connect(_: Any, address: Any) -> None:
        tried.append(address)
        raise OSError("no route")

    async def dial() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "getaddrinfo", look_up)
        monkeypatch.setattr(loop, "sock_connect", connect)
        async with AsyncClient("near.test", timeout_s=1.0) as client:
            with pytest.raises(ConnectionFailed):
                await client.get("k")

    asyncio.run(dial())
    assert set(tried) == {("fe80::1", 2379, 0, socket.if_nametoindex("lo"))}


def test_a_loop_that_stalls_while_it_connects_makes_one_connection(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of an address must not end when its connection is made: the handshake of the
    protocol is sent once."""
    made = asyncio.SelectorEventLoop._make_socket_transport  # type: ignore[attr-defined]

    def stalled(*args: Any, **options: Any) -> Any:
        time.sleep(1.6)
        return made(*args, **options)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "_make_socket_transport", stalled)
    look_up = socket.getaddrinfo

    def addresses(host: Any, *others: Any, **options: Any) -> Any:
        if host != "two.test":
            return look_up(host, *others, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))] * 2

    monkeypatch.setattr(socket, "getaddrinfo", addresses)

    async def put() -> int:
        endpoint = f"two.test:{server.port}"
        async with AsyncClient(endpoint, dial_timeout_s=3.0, timeout_s=30.0) as client:
            return (await client.put("k", "v")).revision

    assert asyncio.run(put()) == 2


@pytest.mark.parametrize("turns", range(8))
def test_a_cancellation_while_a_client_connects_is_not_lost(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    server.intercept = lambda *_: IGNORE
    received = aio._TaskLink.data_received

    async def cancel_when_connected() -> None:
        loop = asyncio.get_running_loop()
        async with AsyncClient(server.endpoint) as client:
            call = asyncio.ensure_future(client.get("k"))

            def cancel_in(turns: int) -> None:
                if turns:
                    loop.call_soon(cancel_in, turns - 1)
                else:
                    call.cancel()

            def data_received(link: Any, data: bytes) -> None:
                received(link, data)
                cancel_in(turns)

            monkeypatch.setattr(aio._TaskLink, "data_received", data_received)
            with pytest.raises(asyncio.CancelledError):
                await call

    asyncio.run(cancel_when_connected())


def test_input_that_comes_after_a_handshake_was_given_up_is_ignored() -> None:
    """uvloop may still pass on what it had read."""
    written: list[bytes] = []
    channel = SimpleNamespace(
        receive=lambda data: b"", output=lambda: b"more", is_established=False, has_output=False
    )

    async def give_up() -> None:
        dial = SimpleNamespace(
            server="s", silence_s=1.0, drained=asyncio.Event(), channel=lambda: channel
        )
        given_up = aio._TaskLink(dial, asyncio.get_running_loop())  # type: ignore[arg-type]
        with socket.socket() as sock:
            info = {"socket": sock}
            given_up.connection_made(
                SimpleNamespace(write=written.append, abort=list, get_extra_info=info.get)
            )
            given_up.close("the client was closed")
            given_up.data_received(b"late")

    asyncio.run(give_up())
    assert written == [b"more"]


def test_nobody_there_is_said_of_every_endpoint(connect: Connect) -> None:
    one, two = free_endpoint(), free_endpoint()
    client = connect(one, two)
    with pytest.raises(ConnectionFailed) as failed:
        client.put("k", "v")
    for endpoint in (one, two):
        assert f"{endpoint}: " in str(failed.value)
    assert "refused" in str(failed.value)
    assert failed.value.endpoint in (one, two)


def test_a_dead_endpoint_is_passed_over(connect: Connect, server: FakeServer) -> None:
    client = connect(free_endpoint(), server)
    assert client.put("k", "v").revision == 2
    assert client.endpoint == server.endpoint


def test_endpoints_that_do_not_answer_leave_time_for_the_last(
    connect: Connect, server: FakeServer
) -> None:
    with FakeServer() as stranger:
        stranger.greeting = GREETING[:5]
        client = connect(*[stranger] * 3, server, timeout_s=1.0, dial_timeout_s=0.5)
        assert client.put("k", "v").revision == 2


@pytest.mark.parametrize(
    ("greeting", "cause"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak etcdlite's native protocol"),
        (frames.HANDSHAKE.pack(frames.MAGIC, 0, 0), "does not speak protocol version 1"),
        (GREETING[:5], "no connection within 1 s"),
    ],
)
def test_what_is_no_etcdlite_server_is_passed_over(
    connect: Connect, server: FakeServer, greeting: bytes, cause: str
) -> None:
    with FakeServer() as stranger:
        stranger.greeting = greeting
        with pytest.raises(ConnectionFailed, match=cause):
            connect(stranger, dial_timeout_s=1.0).put("k", "v")
        assert connect(stranger, server, dial_timeout_s=1.0).put("k", "v").revision == 2


def test_a_read_is_sent_again_when_its_connection_breaks(
    connect: Connect, server: FakeServer
) -> None:
    with FakeServer(server.store) as second:
        client = connect(server, second)
        client.put("k", "v")
        server.intercept = once(DROP, "KV.Range")
        assert client.get("k").value == b"v"
        assert client.endpoint == second.endpoint
        assert (sent(server, "KV.Range"), sent(second, "KV.Range")) == (1, 1)


def test_a_read_is_not_sent_again_forever(connect: Connect, server: FakeServer) -> None:
    client = connect(server)
    server.intercept = lambda *_: DROP
    with pytest.raises(ConnectionFailed, match=server.endpoint):
        client.get("k")
    assert sent(server, "KV.Range") == 2


def test_a_write_whose_connection_breaks_is_not_sent_again(
    connect: Connect, server: FakeServer
) -> None:
    with FakeServer(server.store) as second:
        client = connect(server, second)
        server.intercept = once(DROP, "KV.Put")
        with pytest.raises(UnknownOutcome, match=r"KV\.Put was sent but not answered") as unknown:
            client.put("k", "v")
        assert unknown.value.endpoint == server.endpoint
        assert sent(second, "KV.Put") == 0
        assert client.put("k", "v").revision == 2, "the next call goes to the next endpoint"


def test_a_write_that_is_harmless_twice_may_be_sent_again(
    connect: Connect, server: FakeServer
) -> None:
    client = connect(server)
    server.intercept = once(DROP, "KV.Put")
    response = client.call("KV.Put", proto.PutRequest(key=b"k"), repeatable=True)
    assert response.header.revision == 2
    assert sent(server, "KV.Put") == 2


def test_a_write_after_a_restart_goes_through(connect: Connect, server: FakeServer) -> None:
    client = connect(server)
    client.put("k", "v")
    server.stop()
    server.start()

    def put() -> bool:
        try:
            return client.put("k", "v").revision > 2
        except UnknownOutcome:
            # The client had not noticed yet when it sent.
            return False

    wait_until(put, "a put after the restart")


@pytest.mark.parametrize("cut", [1, 4, 9, 10, 11])
def test_half_a_frame_is_no_reply(connect: Connect, server: FakeServer, cut: int) -> None:
    client = connect(server)
    reply = frames.frame(
        1, PUT, frames.END, proto.PutResponse(header=server.store.header()).encode()
    )

    def intercept(connection: FakeConnection, _: int, name: str, __: Any) -> str | None:
        if name != "KV.Put":
            return None
        connection.send(reply[:cut])
        return DROP

    server.intercept = intercept
    with pytest.raises(UnknownOutcome):
        client.put("k", "v")


def test_garbage_in_the_middle_ends_the_connection_and_no_more(
    connect: Connect, server: FakeServer
) -> None:
    client = connect(server)
    client.put("k", "v")
    server.intercept = once(b"\x00" * 64, "KV.Range")
    assert client.get("k").value == b"v"
    assert len(server.connections) == 2


def test_a_silent_server_is_left_for_the_next_one(connect: Connect, server: FakeServer) -> None:
    with FakeServer(server.store) as second:
        client = connect(server, second, dial_timeout_s=0.5)
        client.put("k", "v")
        server.intercept = lambda *_: IGNORE
        with pytest.raises(Timeout):
            client.get("k", timeout_s=0.1)
        assert client.get("k").value == b"v"
        assert client.endpoint == second.endpoint


def test_a_write_is_not_sent_to_a_server_that_has_gone_silent(
    connect: Connect, server: FakeServer
) -> None:
    with FakeServer(server.store) as second:
        client = connect(server, second, dial_timeout_s=0.5)
        client.put("k", "v")
        server.intercept = lambda *_: IGNORE
        with pytest.raises(Timeout):
            client.get("k", timeout_s=0.05)
        # Nobody waits on the connection while the time passes within which it should have answered.
        time.sleep(0.55)
        assert client.put("k", "v2").revision == 3
        assert client.endpoint == second.endpoint


def test_a_server_that_takes_nothing_in_ends_the_connection(connect: Connect) -> None:
    with FakeServer() as server:
        client = connect(server, timeout_s=0.5, dial_timeout_s=0.2)
        client.put("k", "v")
        blocked = threading.Event()

        def intercept(*_: Any) -> str:
            blocked.wait()
            return IGNORE

        server.intercept = intercept
        value = b"x" * 1_000_000
        with ThreadPoolExecutor(32) as pool:
            calls = [pool.submit(client.put, "k", value) for _ in range(32)]
            errors = [call.exception() for call in calls]
        assert {type(error) for error in errors} <= {Timeout, UnknownOutcome, ConnectionFailed}
        blocked.set()


def test_a_read_waits_for_a_leader(connect: Connect, server: FakeServer) -> None:
    client = connect(server)
    text = "etcdserver: no leader"
    body = proto.Error(code=14, message=text).encode()
    answers = 2

    def intercept(_: FakeConnection, request_id: int, name: str, __: Any) -> bytes | None:
        nonlocal answers
        if answers == 0:
            return None
        answers -= 1
        return frames.frame(request_id, methods.METHOD_BY_NAME[name].number, 3, body)

    server.intercept = intercept
    assert client.get("k") is None
    assert sent(server, "KV.Range") == 3
    answers = 1
    with pytest.raises(NoLeader, match=text):
        client.put("k", "v")


@pytest.mark.parametrize("refusal", ["NotSupportedForLearner", "NoLeader"])
def test_a_member_that_cannot_serve_is_left_for_the_next_endpoint(
    connect: Connect, server: FakeServer, refusal: str
) -> None:
    code, text = ERRORS[refusal]
    body = proto.Error(code=code, message=text).encode()

    def refuse(_: FakeConnection, request_id: int, name: str, __: Any) -> bytes | None:
        number = methods.METHOD_BY_NAME[name].number
        return frames.frame(request_id, number, 3, body) if name.startswith("KV.") else None

    with FakeServer(server.store) as other:
        server.intercept = refuse
        client = connect(server, other)
        with client.watch("k") as watch:
            assert client.get("k") is None
            assert client.endpoint == other.endpoint
            assert client.put("k", "v").revision == 2
            assert next(watch).value == b"v", "the watch stays where it was"
            assert len(server.connections) == len(other.connections) == 1
            # The next one is left, too; and what was left before serves nothing any more.
            server.intercept, other.intercept = None, refuse
            wait_until(lambda: client.get("k") is not None, "an answer of the first endpoint")
            assert client.endpoint == server.endpoint
            (connection,) = other.connections
            wait_until(lambda: connection.sock.fileno() < 0, "the end of the unused connection")
        server.intercept = refuse
        with pytest.raises(EtcdliteError, match=text) as refused:
            client.put("k", "v")
        assert refused.value.endpoint in (server.endpoint, other.endpoint)
        other.intercept = None
        assert client.put("k", "w").revision == 3
        client.close()
        sockets = [one.sock for one in (*server.connections, *other.connections)]
        wait_until(lambda: all(sock.fileno() < 0 for sock in sockets), "the end of all connections")


def test_a_learner_that_cannot_log_a_user_in_is_left_for_the_next_endpoint(
    connect: Connect, server: FakeServer
) -> None:
    number = methods.METHOD_BY_NAME["Auth.Authenticate"].number
    code, text = ERRORS["NotSupportedForLearner"]
    refusal = 3, proto.Error(code=code, message=text).encode()
    login = frames.END, proto.AuthenticateResponse(token="t").encode()

    def answering(flags: int, body: bytes) -> Any:
        return lambda _, request_id, name, __: (
            frames.frame(request_id, number, flags, body) if name == "Auth.Authenticate" else None
        )

    with FakeServer(server.store) as other:
        server.intercept, other.intercept = answering(*refusal), answering(*login)
        client = connect(server, other, user="u", password="p")
        with client.watch("k") as watch:
            client.put("k", "v")
            assert watch.next_event(timeout_s=10).value == b"v"
        assert client.endpoint == other.endpoint


def test_a_member_that_leaves_a_call_unanswered_is_left_for_the_next_endpoint(
    connect: Connect, server: FakeServer
) -> None:
    server.intercept = lambda _, __, name, ___: IGNORE if name == "KV.Put" else None
    with FakeServer(server.store) as other:
        client = connect(server, other, dial_timeout_s=0.2)
        with pytest.raises(Timeout) as late:
            client.put("k", "v", timeout_s=0.1)
        assert client.get("k") is None
        assert client.endpoint == server.endpoint, "the call had less time than a connection has"
        with pytest.raises(Timeout) as late:
            client.put("k", "v", timeout_s=0.3)
        assert late.value.endpoint == server.endpoint
        assert client.put("k", "v").revision == 2
        assert client.endpoint == other.endpoint


def test_a_member_that_does_not_renew_a_lease_is_left_however_short_the_lease(
    connect: Connect, server: FakeServer
) -> None:
    """A renewal has a third of the TTL: with 5 s, less than a connection has."""
    server.intercept = lambda _, __, name, ___: IGNORE if name == "Lease.LeaseKeepAlive" else None
    with FakeServer(server.store) as other:
        client = connect(server, other)
        assert client.get("k") is None, "connected: the time is the renewal's alone"
        with pytest.raises(Timeout):
            client.lease_keep_alive_once(7, timeout_s=0.1)
        assert client.endpoint == other.endpoint


# Watches.


def test_a_watch_sees_what_was_put_after_it_began(connect: Connect, server: FakeServer) -> None:
    client = connect(server)
    with client.watch(prefix="a/") as watch:
        client.put("a/1", "x")
        client.put("b", "y")
        client.put("a/2", "z")
        event = next(watch)
        assert (event.type, event.key, event.value, event.revision) == ("PUT", b"a/1", b"x", 2)
        assert next(watch).key == b"a/2"
        with pytest.raises(Timeout):
            watch.next_event(timeout_s=0.01)
    wait_until(lambda: len(server.cancelled) == 1, "the watch's cancel")


def test_a_watch_from_the_past_tells_everything_since(connect: Connect, server: FakeServer) -> None:
    for i in range(5):
        server.store.put(b"k", b"%d" % i)
    with connect(server).watch("k", start_revision=3) as watch:
        assert [next(watch).value for _ in range(4)] == [b"1", b"2", b"3", b"4"]
        assert watch.revision == 6
        watch.request_progress()


def test_events_that_arrive_with_the_confirmation_of_a_watch_are_in_its_first_batch(
    connect: Connect, server: FakeServer
) -> None:
    server.joins_first_events = True
    for i in range(5):
        server.store.put(b"k", b"%d" % i)
    client = connect(server)
    for _ in range(20):
        with client.watch("k", start_revision=3) as watch:
            batch = next(watch.batches())
            assert [event.value for event in batch.events] == [b"1", b"2", b"3", b"4"]
            assert batch.revision == watch.revision == 6


@pytest.mark.parametrize("moment", ["while waiting", "between events"])
def test_a_watch_goes_on_elsewhere_with_nothing_missed_and_nothing_twice(
    connect: Connect, server: FakeServer, moment: str
) -> None:
    with FakeServer(server.store) as second, ThreadPoolExecutor(1) as pool:
        watch = connect(server, second).watch(prefix="").__enter__()
        server.store.put(b"k", b"1")
        assert next(watch).value == b"1"
        waiting = pool.submit(next, watch) if moment == "while waiting" else None
        server.stop()
        for value in (b"2", b"3", b"4"):
            server.store.put(b"k", value)
        seen = [waiting.result()] if waiting is not None else []
        while len(seen) < 3:
            seen.append(next(watch))
        assert [event.value for event in seen] == [b"2", b"3", b"4"]
        request = second.requests[0][1].create_request
        assert request.start_revision == 3
        server.start()
        second.drop_connections()
        server.store.put(b"k", b"5")
        assert next(watch).value == b"5"
        watch.close()


def test_a_watch_outlives_a_time_without_any_server(connect: Connect, server: FakeServer) -> None:
    watch = connect(server).watch(prefix="").__enter__()
    server.stop()
    with pytest.raises(Timeout):
        watch.next_event(timeout_s=0.2)
    server.store.put(b"k", b"1")
    server.start()
    assert watch.next_event(timeout_s=10).value == b"1"
    watch.close()


def test_a_watch_that_is_polled_outlives_a_time_without_any_server(
    connect: Connect, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts, "BACKOFF_FIRST_S", 0.3)
    with connect(server).watch(prefix="") as watch:
        server.stop()
        with pytest.raises(Timeout):
            watch.next_event(timeout_s=0.05)
        server.store.put(b"k", b"1")
        server.start()
        assert poll_event(watch).value == b"1"


def poll_event(watch: Any) -> Any:
    """The next event of a watch that is polled with a short timeout."""
    found: list[Any] = []

    def ask() -> bool:
        with contextlib.suppress(Timeout):
            found.append(watch.next_event(timeout_s=0.01))
        return bool(found)

    wait_until(ask, "an event")
    return found[0]


def test_a_watch_whose_history_is_gone_says_where_it_begins(
    connect: Connect, server: FakeServer
) -> None:
    client = connect(server)
    for _ in range(10):
        server.store.put(b"k", b"v")
    watch = client.watch("k", start_revision=5).__enter__()
    assert next(watch).revision == 5
    server.store.compacted = 20
    server.drop_connections()
    with pytest.raises(Compacted) as compacted:
        while True:
            next(watch)
    assert compacted.value.compact_revision == 20
    with pytest.raises(StopIteration):
        next(watch)


def test_a_watch_that_is_refused_raises_the_reason(connect: Connect, server: FakeServer) -> None:
    client = connect(server)

    def intercept(_: FakeConnection, request_id: int, name: str, __: Any) -> bytes:
        body = proto.Error(code=7, message="etcdserver: permission denied").encode()
        return frames.frame(request_id, methods.METHOD_BY_NAME[name].number, 3, body)

    server.intercept = intercept
    with pytest.raises(PermissionDenied):
        client.watch("k").__enter__()


def reply_to_watch(request_id: int, **fields: Any) -> bytes:
    method = methods.METHOD_BY_NAME["Watch.Watch"].number
    return frames.frame(request_id, method, 0, proto.WatchResponse(**fields).encode())


def test_a_watch_that_is_refused_for_now_asks_again(connect: Connect, server: FakeServer) -> None:
    """As by a member that has no leader to ask whether the user may watch. The stream stays open
    without the watch, and must not be waited for."""
    client = connect(server)
    with client.watch("k") as watch:
        refused: list[int] = []

        def intercept(_: FakeConnection, request_id: int, name: str, __: Any) -> bytes | None:
            if name != "Watch.Watch" or refused:
                return None
            refused.append(request_id)
            reason = "rpc error: code = Unavailable desc = etcdserver: no leader"
            fields = {"watch_id": -1, "created": True, "canceled": True, "cancel_reason": reason}
            return reply_to_watch(request_id, **fields)

        server.intercept = intercept
        server.drop_connections()
        server.store.put(b"k", b"v")
        assert watch.next_event(timeout_s=10).revision == 2
        wait_until(lambda: server.cancelled == refused, "the end of the stream without a watch")


def test_a_watch_that_a_member_refuses_for_now_goes_on_at_the_next_endpoint(
    connect: Connect, server: FakeServer
) -> None:
    code, text = ERRORS["NoLeader"]
    body = proto.Error(code=code, message=text).encode()
    number = methods.METHOD_BY_NAME["Watch.Watch"].number
    server.intercept = lambda _, request_id, *__: frames.frame(request_id, number, 3, body)
    with FakeServer(server.store) as other:
        client = connect(server, other)
        with client.watch("k") as watch:
            assert client.endpoint == other.endpoint
            server.store.put(b"k", b"v")
            assert watch.next_event(timeout_s=10).revision == 2


def test_a_watch_outlives_a_login_that_no_member_can_check_now(
    connect: Connect, server: FakeServer
) -> None:
    logins = []

    def intercept(_: FakeConnection, request_id: int, name: str, __: Any) -> bytes | None:
        number = methods.METHOD_BY_NAME[name].number
        if name == "Watch.Watch" and len(logins) == 2:
            return reply_to_watch(
                request_id, created=True, canceled=True, cancel_reason=ERRORS["InvalidAuthToken"][1]
            )
        if name != "Auth.Authenticate":
            return None
        logins.append(request_id)
        if len(logins) == 3:
            no_leader = proto.Error(code=14, message=ERRORS["NoLeader"][1])
            return frames.frame(request_id, number, frames.END | frames.ERROR, no_leader.encode())
        token = proto.AuthenticateResponse(token="t").encode()
        return frames.frame(request_id, number, frames.END, token)

    server.intercept = intercept
    client = connect(server, user="u", password="p")
    with client.watch("k") as watch:
        server.drop_connections()
        server.store.put(b"k", b"v")
        assert watch.next_event(timeout_s=10).revision == 2


def test_a_new_connection_logs_in_with_the_token_alone(
    connect: Connect, server: FakeServer
) -> None:
    logins: list[tuple[str, str]] = []

    def intercept(_: FakeConnection, request_id: int, name: str, message: Any) -> bytes | None:
        if name != "Auth.Authenticate":
            return None
        logins.append((message.name, message.password))
        number = methods.METHOD_BY_NAME[name].number
        answer = proto.AuthenticateResponse(token="t").encode()
        return frames.frame(request_id, number, frames.END, answer)

    server.intercept = intercept
    client = connect(server, user="u", password="p")
    assert client.get("k") is None
    server.drop_connections()
    assert client.get("k") is None
    assert logins == [("u", "p"), ("", "t")]


def test_a_watch_that_nobody_reads_is_cancelled_and_taken_up_again_later(
    connect: Connect, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "MAX_WATCH_QUEUE_MESSAGES", 10)
    client = connect(server)
    with client.watch(prefix="") as watch:
        for i in range(200):
            client.put("k", str(i))
        wait_until(lambda: bool(server.cancelled), "the cancel of the unread watch")
        assert [int(next(watch).value) for i in range(200)] == list(range(200))
        assert sent(server, "Watch.Watch") > 1


def test_a_watch_closed_elsewhere_ends_its_iteration(connect: Connect, server: FakeServer) -> None:
    watch = connect(server).watch("k").__enter__()
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(list, watch)
        watch.close()
        assert seen.result() == []


def test_a_watch_of_a_closed_client_raises(connect: Connect, server: FakeServer) -> None:
    client = connect(server)
    watch = client.watch("k").__enter__()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, watch)
        client.close()
        with pytest.raises(Closed):
            waiting.result()


@pytest.mark.parametrize("is_polled", [False, True])
def test_a_watch_notices_a_silent_server(
    connect: Connect, server: FakeServer, monkeypatch: pytest.MonkeyPatch, is_polled: bool
) -> None:
    monkeypatch.setattr(scripts, "PING_AFTER_S", 0.05)
    with FakeServer(server.store) as second:
        client = connect(server, second, dial_timeout_s=0.5)
        with client.watch("k") as watch:
            while not sent(server, "Ping"):
                with pytest.raises(Timeout):
                    watch.next_event(timeout_s=0.2)
            server.intercept = lambda *_: IGNORE
            server.connections[0].open_watches.clear()
            server.store.put(b"k", b"v")
            ask = poll_event if is_polled else next
            assert ask(watch).value == b"v"
            assert client.endpoint == second.endpoint


@pytest.mark.parametrize("is_suspected", [True, False])
@pytest.mark.parametrize("is_left", [True, False])
def test_a_watch_leaves_a_server_that_is_silent_to_another_call(
    connect: Connect,
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    is_left: bool,
    is_suspected: bool,
) -> None:
    """So the next holder of a lock learns that its turn has come while its lease is kept alive over
    another connection. `is_left`: the call uses the next server from then on. `is_suspected`: the
    server has not answered a cancel before."""
    monkeypatch.setattr(scripts, "PING_AFTER_S", 1e6)
    with FakeServer(server.store) as second:
        client = connect(server, second, dial_timeout_s=0.2)
        with (
            client.watch("k") as watch,
            client.watch("other") as other,
            ThreadPoolExecutor(1) as pool,
        ):
            server.intercept = lambda *_: IGNORE
            server.connections[0].open_watches.clear()
            waiting = pool.submit(watch.next_event, timeout_s=20)
            if is_suspected:
                other.close()
            # It fails, or the next server answers already.
            with contextlib.suppress(Timeout, ConnectionFailed):
                client.get("k", timeout_s=0.2 if is_left else 0.1)
            server.store.put(b"k", b"v")
            assert waiting.result().value == b"v"
            assert client.endpoint == second.endpoint


# Streams.


def test_a_stream_gives_messages_until_the_server_ends_it(
    connect: Connect, server: FakeServer
) -> None:
    client = connect(server)
    with client.stream("Maintenance.Snapshot", proto.SnapshotRequest()) as stream:
        assert [message.blob for message in stream] == [b"one", b"two"]
    with client.stream("Watch.Watch") as stream:
        create = proto.WatchCreateRequest(key=b"k")
        stream.send(proto.WatchRequest(create_request=create))
        assert next(stream).created
        client.put("k", "v")
        assert next(stream).events[0].kv.value == b"v"
        stream.send(proto.WatchRequest(progress_request=proto.WatchProgressRequest()))
        assert next(stream).header.revision == 2
        stream.cancel()
        assert list(stream) == []


def test_a_stream_cancelled_elsewhere_ends(connect: Connect, server: FakeServer) -> None:
    with connect(server).stream("Watch.Watch") as stream, ThreadPoolExecutor(1) as pool:
        create = proto.WatchCreateRequest(key=b"k")
        stream.send(proto.WatchRequest(create_request=create))
        next(stream)
        waiting = pool.submit(list, stream)
        stream.cancel()
        assert waiting.result() == []


def test_a_broken_stream_raises(connect: Connect, server: FakeServer) -> None:
    client = connect(server)
    with client.stream("Lease.LeaseKeepAlive") as stream:
        stream.send(proto.LeaseKeepAliveRequest(ID=1))
        assert next(stream).TTL == 5
    server.intercept = lambda *_: DROP
    with (
        client.stream("Maintenance.Snapshot", proto.SnapshotRequest()) as stream,
        pytest.raises(ConnectionFailed, match=server.endpoint),
    ):
        next(stream)
    server.intercept = lambda *_: IGNORE
    with client.stream("Watch.Watch", timeout_s=0.05) as stream, pytest.raises(Timeout):
        next(stream)


def test_a_stream_that_cannot_begin_leaves_no_connection(
    connect: Connect, server: FakeServer
) -> None:
    create = proto.WatchCreateRequest(key=b"k" * (1 << 20))
    with pytest.raises(RequestTooLarge):
        connect(server).stream("Watch.Watch", proto.WatchRequest(create_request=create)).__enter__()
    (connection,) = server.connections
    wait_until(lambda: connection.sock.fileno() < 0, "the end of its connection")


def test_a_stream_that_is_not_read_holds_the_server_up(
    connect: Connect, server: FakeServer
) -> None:
    total, blob = 200, b"x" * 256 * 1024
    sent_blobs = []

    def intercept(connection: FakeConnection, request_id: int, name: str, _: Any) -> bytes | None:
        if name != "Maintenance.Snapshot":
            return None
        method = methods.METHOD_BY_NAME[name].number
        for i in range(total):
            connection.reply(request_id, method, proto.SnapshotResponse(blob=blob), 0)
            sent_blobs.append(i)
        return frames.frame(request_id, method, frames.END, b"")

    server.intercept = intercept
    client = connect(server)
    with client.stream("Maintenance.Snapshot", proto.SnapshotRequest()) as stream:
        next(stream)
        client.put("k", "v")
        quiet_since = (0, time.monotonic())

        def held_up() -> bool:
            nonlocal quiet_since
            if quiet_since[0] != len(sent_blobs):
                quiet_since = (len(sent_blobs), time.monotonic())
            return time.monotonic() - quiet_since[1] > 0.3

        wait_until(held_up, "the server being held up")
        assert len(sent_blobs) < total, "memory would grow without bound"
        for _ in range(total - 1):
            assert len(next(stream).blob) == len(blob)


def test_a_backup_takes_its_name_when_it_is_whole(
    connect: Connect, server: FakeServer, tmp_path: Path
) -> None:
    client = connect(server)
    path = tmp_path / "backup.db"
    assert client.snapshot(path) == 6
    assert path.read_bytes() == b"onetwo"
    file = io.BytesIO()
    assert client.snapshot(file) == 6
    server.intercept = lambda *_: DROP
    with pytest.raises(ConnectionFailed):
        client.snapshot(path)
    assert [p.name for p in tmp_path.iterdir()] == ["backup.db"]
    assert path.read_bytes() == b"onetwo"


# Leases.


class LeaseServer:
    """Grants leases and keeps them alive while `alive`."""

    def __init__(self, server: FakeServer, ttl: int = 1) -> None:
        self.alive = True
        self.answering = True
        self.ttl = ttl
        server.intercept = self.intercept

    def intercept(
        self, connection: FakeConnection, request_id: int, name: str, message: Any
    ) -> str | bytes | None:
        if name not in ("Lease.LeaseGrant", "Lease.LeaseKeepAlive", "Lease.LeaseRevoke"):
            return None
        if not self.answering:
            return IGNORE
        method = methods.METHOD_BY_NAME[name]
        response = method.response()
        if name != "Lease.LeaseRevoke":
            response.ID = 7
            response.TTL = self.ttl if self.alive else 0
        frame = frames.frame(request_id, method.number, 0, response.encode())
        if method.server_stream:
            return frame + frames.frame(request_id, method.number, frames.END, b"")
        return frames.frame(request_id, method.number, frames.END, response.encode())


def test_a_lease_is_kept_alive_and_revoked(connect: Connect, server: FakeServer) -> None:
    LeaseServer(server, ttl=3)
    client = connect(server)
    with client.lease(ttl=3) as lease:
        assert (lease.id, lease.ttl, int(lease)) == (7, 3, 7)
        wait_until(lambda: sent(server, "Lease.LeaseKeepAlive") >= 2, "keep-alives")
        assert not lease.lost
    assert sent(server, "Lease.LeaseRevoke") == 1


@pytest.mark.parametrize("how", ["expired", "silent", "gone"])
def test_a_lease_that_is_not_renewed_is_lost(
    connect: Connect, server: FakeServer, how: str
) -> None:
    leases = LeaseServer(server)
    client = connect(server)
    with client.lease(ttl=1) as lease:
        assert not lease.lost
        if how == "expired":
            leases.alive = False
        elif how == "silent":
            leases.answering = False
        else:
            server.stop()
        assert lease.wait_lost()
        assert lease.lost
        leases.answering = True


@pytest.mark.parametrize(("grant", "kept"), [((0, 5), 0), ((7, 0), 0), ((7, -5), 0), ((7, 1), 99)])
def test_a_lease_that_the_server_did_not_really_give_is_not_held(
    connect: Connect, server: FakeServer, grant: tuple[int, int], kept: int
) -> None:
    """Without an ID or without time, or when another one is renewed instead."""

    def intercept(_: FakeConnection, request_id: int, name: str, message: Any) -> Any:
        method = methods.METHOD_BY_NAME[name]
        response = method.response()
        if name == "Lease.LeaseGrant":
            response.ID, response.TTL = grant
        elif name == "Lease.LeaseKeepAlive":
            response.ID, response.TTL = kept, grant[1]
        flags = 0 if method.server_stream else frames.END
        frame = frames.frame(request_id, method.number, flags, response.encode())
        end = frames.frame(request_id, method.number, frames.END, b"")
        return frame + end if method.server_stream else frame

    server.intercept = intercept
    client = connect(server)
    if not kept:
        with pytest.raises(LeaseNotFound), client.lock("l"):
            pass
        assert sent(server, "KV.Txn") == 0
        return
    with pytest.raises(LeaseNotFound):
        client.lease_keep_alive_once(7)
    with client.lease(ttl=1) as lease:
        assert lease.wait_lost()


def test_a_lock_whose_lease_ended_before_the_answer_is_not_held(
    connect: Connect, server: FakeServer
) -> None:
    leases = LeaseServer(server)

    def intercept(
        connection: FakeConnection, request_id: int, name: str, message: Any
    ) -> str | bytes | None:
        if name != "KV.Txn":
            return leases.intercept(connection, request_id, name, message)
        granted_s = time.monotonic()
        while time.monotonic() < granted_s + leases.ttl:
            time.sleep(0.05)
        first = proto.KeyValue(key=message.compare[0].key, create_revision=2)
        response = proto.TxnResponse(
            header=proto.ResponseHeader(revision=2),
            succeeded=True,
            responses=[
                proto.ResponseOp(response_put=proto.PutResponse()),
                proto.ResponseOp(response_range=proto.RangeResponse(kvs=[first], count=1)),
            ],
        )
        number = methods.METHOD_BY_NAME[name].number
        return frames.frame(request_id, number, frames.END, response.encode())

    server.intercept = intercept
    lock = connect(server).lock("l", ttl=1)
    with pytest.raises(LeaseLost):
        lock.acquire()
    assert lock.lost
    # The answers to the cancelled renewals may end the connection before that to this comes.
    wait_until(lambda: sent(server, "Lease.LeaseRevoke") == 1, "the end of the lease")


def test_a_lease_survives_a_change_of_server(connect: Connect, server: FakeServer) -> None:
    LeaseServer(server, ttl=3)
    with FakeServer(server.store) as second:
        LeaseServer(second, ttl=3)
        with connect(server, second).lease(ttl=3) as lease:
            server.stop()
            wait_until(lambda: sent(second, "Lease.LeaseKeepAlive") >= 2, "keep-alives elsewhere")
            assert not lease.lost


def test_many_threads_ride_out_broken_connections(server: FakeServer) -> None:
    """Every put that was acknowledged is there, and none was carried out twice."""
    store: FakeStore = server.store
    stop = threading.Event()
    with FakeServer(store) as second, Client([server.endpoint, second.endpoint]) as client:

        def disturb() -> None:
            while not stop.wait(0.02):
                server.drop_connections()
                second.drop_connections()

        def work(number: int) -> list[bytes]:
            done = []
            for i in range(60):
                key = b"%d/%d" % (number, i)
                try:
                    client.put(key, b"v")
                except (UnknownOutcome, ConnectionFailed):
                    continue
                done.append(key)
            return done

        with ThreadPoolExecutor(9) as pool:
            disturbing = pool.submit(disturb)
            acknowledged = [key for keys in pool.map(work, range(8)) for key in keys]
            stop.set()
            disturbing.result()
    keys = [event.kv.key for event in store.events]
    assert len(keys) == len(set(keys)), "a put was carried out twice"
    assert set(acknowledged) <= set(keys)
    assert acknowledged


# Members.


def answer_members(server: FakeServer, answers: dict[str, Any]) -> None:
    """Let the server answer these methods, with a message or an error."""

    def intercept(connection: FakeConnection, request_id: int, name: str, message: Any) -> Any:
        answer = answers.get(name)
        if answer is None:
            return None
        number = methods.METHOD_BY_NAME[name].number
        flags = frames.END | (frames.ERROR if isinstance(answer, proto.Error) else 0)
        return frames.frame(request_id, number, flags, answer.encode())

    server.intercept = intercept


def test_members_are_added_changed_and_removed(connect: Connect, server: FakeServer) -> None:
    old = proto.Member(ID=1, name="a", peerURLs=["http://a:1"], clientURLs=["http://a:2"])
    new = proto.Member(ID=2, peerURLs=["http://b:1"], isLearner=True)
    answer_members(
        server,
        {
            "Cluster.MemberAdd": proto.MemberAddResponse(member=new, members=[old, new]),
            "Cluster.MemberPromote": proto.MemberPromoteResponse(members=[old, new]),
            "Cluster.MemberUpdate": proto.MemberUpdateResponse(members=[old, new]),
            "Cluster.MemberRemove": proto.MemberRemoveResponse(members=[old]),
            "Cluster.MemberList": proto.MemberListResponse(members=[old]),
            "Maintenance.MoveLeader": proto.MoveLeaderResponse(),
        },
    )
    client = connect(server)
    a = Member(1, "a", ("http://a:1",), ("http://a:2",), False)
    b = Member(2, "", ("http://b:1",), (), True)
    assert client.member_add(["http://b:1"], learner=True) == b
    assert client.member_promote(2) == (a, b)
    assert client.member_update(2, ["http://b:9"]) == (a, b)
    assert client.member_remove(2) == (a,)
    assert client.members(linearizable=False) == (a,)
    assert client.move_leader(1) is None
    assert [request for name, request in server.requests] == [
        proto.MemberAddRequest(peerURLs=["http://b:1"], isLearner=True),
        proto.MemberPromoteRequest(ID=2),
        proto.MemberUpdateRequest(ID=2, peerURLs=["http://b:9"]),
        proto.MemberRemoveRequest(ID=2),
        proto.MemberListRequest(),
        proto.MoveLeaderRequest(targetID=1),
    ]


def test_what_the_cluster_refuses_has_etcds_name(connect: Connect, server: FakeServer) -> None:
    def refused(name: str) -> proto.Error:
        code, text = ERRORS[name]
        return proto.Error(code=code, message=text)

    answer_members(
        server,
        {
            "Cluster.MemberAdd": refused("PeerURLExist"),
            "Cluster.MemberPromote": refused("LearnerNotReady"),
            "Cluster.MemberRemove": refused("MemberNotFound"),
            "Maintenance.MoveLeader": refused("NotLeader"),
        },
    )
    client = connect(server)
    with pytest.raises(PeerURLExist):
        client.member_add(["http://b:1"])
    with pytest.raises(LearnerNotReady):
        client.member_promote(2)
    with pytest.raises(MemberNotFound):
        client.member_remove(2)
    with pytest.raises(NotLeader):
        client.move_leader(2)


def test_a_change_of_members_is_not_sent_twice(connect: Connect, server: FakeServer) -> None:
    server.intercept = lambda connection, request_id, name, message: DROP
    with FakeServer(server.store) as other:
        with pytest.raises(UnknownOutcome):
            connect(server, other).member_remove(2)
        assert other.requests == []


# What a program may rely on.


def test_a_granted_lease_serves_as_a_lease_id(connect: Connect, server: FakeServer) -> None:
    LeaseServer(server, ttl=600)
    client = connect(server)
    granted = client.lease_grant(600)
    client.put("k", "v", lease=granted)
    assert server.requests[-1][1].lease == granted.id == 7
    assert client.lease_keep_alive_once(granted) == 600


def test_failures_are_the_builtin_ones_too(connect: Connect, server: FakeServer) -> None:
    with pytest.raises(ConnectionError, match="refused") as refused:
        connect(free_endpoint()).put("k", "v")
    client = connect(server)
    client.get("k")  # A connection may take longer than the put is waited for.
    server.intercept = lambda *_: IGNORE
    with pytest.raises(TimeoutError, match=r"KV\.Put was not answered") as late:
        client.put("k", "v", timeout_s=0.05)
    for raised, cls in ((refused.value, ConnectionFailed), (late.value, Timeout)):
        assert type(raised) is cls
        assert raised.errno is None, "the status code is no errno"
        copy = pickle.loads(pickle.dumps(raised))
        assert (type(copy), str(copy), vars(copy)) == (cls, str(raised), vars(raised))


def test_a_login_without_an_answer_names_the_endpoint_once(
    connect: Connect, server: FakeServer
) -> None:
    server.intercept = lambda *_: IGNORE
    client = connect(server, user="u", password="p", dial_timeout_s=0.3)
    with pytest.raises(ConnectionFailed) as failed:
        client.get("k")
    assert failed.value.text.count(server.endpoint) == 1


def test_objects_say_what_they_are(connect: Connect, server: FakeServer) -> None:
    LeaseServer(server, ttl=5)
    client = connect(server)
    place = server.endpoint
    for i in range(5):
        client.put(f"k{i}", "v")
    kv = "KeyValue(key=b'k%d', value=b'v', create_revision=%d, mod_revision=%d, version=1, lease=0)"
    first = [kv % (i, i + 2, i + 2) for i in range(3)]
    assert repr(client.get("k0")) == first[0]
    shown = ", ".join([*first, "... 2 more"])
    assert repr(client.range(prefix="k")) == (
        f"RangeResult(revision=6, kvs=({shown}), count=5, more=False)"
    )
    assert repr(client.lease_grant(5)) == "LeaseGrant(id=7, ttl=5)"
    prefix = "Async" if isinstance(client, Facade) else ""
    with client.lease(5) as lease:
        assert repr(lease) == f"<{prefix}Lease 7, ttl 5 s, alive>"
    with client.watch("k0", start_revision=2) as watch:
        assert repr(watch) == f"<{prefix}Watch of k0, revision 1>"
    assert repr(watch) == f"<{prefix}Watch of k0, closed>"
    with client.stream("Maintenance.Snapshot", proto.SnapshotRequest()) as stream:
        assert repr(stream) == f"<{prefix}Stream Maintenance.Snapshot to {place}>"
    assert repr(client) == f"<{prefix}Client of {place}>"
    assert repr(client.lock("job")) == f"<{prefix}Lock b'job', not held>"
    assert repr(client.election("e")) == f"<{prefix}Election b'e'>"


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="warns of a fork among threads")
def test_a_client_made_before_a_fork_says_so(connect: Connect, server: FakeServer) -> None:
    client = connect(server)
    client.put("k", "v")
    is_async = isinstance(client, Facade)
    made = client._target if is_async else client
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        report = "it worked"
        try:
            asyncio.run(made.put("k", "v")) if is_async else made.put("k", "v")
        except BaseException as error:
            report = f"{type(error).__name__}: {error}"
        finally:
            asyncio.run(made.close()) if is_async else made.close()
            os.write(sender, report.encode())
            os._exit(0)
    os.waitpid(child, 0)
    report = os.read(receiver, 1000).decode()
    os.close(receiver)
    os.close(sender)
    assert report.startswith("WrongProcess: ")
    assert f"made in another process ({os.getpid()})" in report
    assert client.get("k").value == b"v"
    assert len(server.connections) == 1, "the child left the connection alone"


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="warns of a fork among threads")
def test_closing_a_client_ends_its_connection_while_a_forked_process_has_it_open(
    connect: Connect, server: FakeServer
) -> None:
    client = connect(server)
    client.put("k", "v")
    (connection,) = server.connections
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        os.close(sender)
        os.read(receiver, 1)  # Until the parent has closed its end.
        os._exit(0)
    os.close(receiver)
    try:
        client.close()
        wait_until(lambda: connection.sock.fileno() < 0, "the end of its connection")
    finally:
        os.close(sender)
        os.waitpid(child, 0)


class _LikeUvloop(asyncio.SelectorEventLoop):
    """A loop with no more than that of uvloop has: it connects without a delay between addresses,
    its transports are no `asyncio.Transport`, and their sockets cannot be shut down."""

    async def create_connection(self, factory: Any, host: str, port: int) -> Any:  # type: ignore[override]
        link = factory()
        made = link.connection_made

        def connected(transport: asyncio.Transport) -> None:
            sock = transport.get_extra_info("socket")
            has = SimpleNamespace(setsockopt=sock.setsockopt, dup=sock.dup)
            names = ("write", "abort", "pause_reading", "resume_reading")
            methods = {name: getattr(transport, name) for name in names}
            made(SimpleNamespace(get_extra_info={"socket": has}.get, **methods))

        link.connection_made = connected
        return await super().create_connection(lambda: link, host, port)


@pytest.mark.parametrize("kind", ["like uvloop", "uvloop"])
def test_the_asyncio_client_works_with_the_loop_of_uvloop(kind: str, server: FakeServer) -> None:
    async def work() -> None:
        async with AsyncClient(server.endpoint) as client, client.watch("k") as watch:
            await client.put("k", "v")
            assert (await watch.next_event(timeout_s=10)).value == b"v"

    loop = pytest.importorskip(kind).new_event_loop() if kind == "uvloop" else _LikeUvloop()
    try:
        loop.run_until_complete(work())
        (connection,) = server.connections
        wait_until(lambda: connection.sock.fileno() < 0, "the end of the connection")
    finally:
        loop.close()


# Where a backup is written to.


@pytest.mark.parametrize("through_link", [False, True])
def test_a_backup_is_written_to_a_pipe(
    connect: Connect, server: FakeServer, tmp_path: Path, through_link: bool
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    path = tmp_path / "link" if through_link else pipe
    if through_link:
        path.symlink_to(pipe)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(pipe.read_bytes)
        assert connect(server).snapshot(path) == 6
        assert reading.result() == b"onetwo"
    assert pipe.is_fifo()
    assert path.is_symlink() == through_link
    assert connect(server).snapshot("/dev/null") == 6
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert not Path("/dev/null.part").exists()


def test_a_backup_through_a_link_replaces_the_file_and_not_the_link(
    connect: Connect, server: FakeServer, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real.db", tmp_path / "backup.db"
    link.symlink_to(real)
    for _ in ("the file does not exist", "the file exists"):
        assert connect(server).snapshot(link) == 6
        assert link.is_symlink()
        assert real.read_bytes() == b"onetwo"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["backup.db", "elsewhere", "real.db"]


def test_a_backup_is_refused_before_it_begins_if_it_cannot_be_kept(
    connect: Connect, server: FakeServer, tmp_path: Path
) -> None:
    client = connect(server)
    for path in (tmp_path, tmp_path / "missing" / "backup.db"):
        with pytest.raises(OSError, match=str(path)):
            client.snapshot(path)
    assert server.requests == []
    assert list(tmp_path.iterdir()) == []


def test_a_backup_that_cannot_take_its_name_leaves_nothing_behind(
    connect: Connect, server: FakeServer, tmp_path: Path
) -> None:
    path = tmp_path / "backup.db"

    def intercept(_: FakeConnection, request_id: int, name: str, __: Any) -> None:
        path.mkdir()  # after the client has looked

    server.intercept = intercept
    with pytest.raises(IsADirectoryError):
        connect(server).snapshot(path)
    assert list(tmp_path.iterdir()) == [path]
