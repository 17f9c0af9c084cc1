"""The client's sans-IO parts: the connection, requests and results, watch positions, recipes."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rigs.fake_server import GREETING

from etcdlite import client, errors, frames, methods, proto
from etcdlite.client import (
    Compacted,
    CreateRevision,
    Delete,
    EtcdliteError,
    Event,
    Get,
    KeyValue,
    LeaseLost,
    LeaseOf,
    ModRevision,
    Put,
    Range,
    RequestTooLarge,
    Timeout,
    Txn,
    Value,
    Version,
    WatchCanceled,
    link,
    recipes,
    scripts,
)
from etcdlite.client import calls as client_calls
from etcdlite.client import connection as client_core
from etcdlite.client import errors as client_errors
from etcdlite.client import operations as calls

PUT = methods.METHOD_BY_NAME["KV.Put"]
WATCH = methods.METHOD_BY_NAME["Watch.Watch"]
REPLY = proto.PutResponse(header=proto.ResponseHeader(revision=2)).encode()


class RecordingTicket(client_core.Ticket):
    __slots__ = ("frames",)

    def __init__(self, method: Any = PUT) -> None:
        super().__init__(method)
        self.frames: list[tuple[int, bytes]] = []


def connected() -> client_core.ClientConnection:
    core = client_core.ClientConnection()
    core.take_output()
    assert core.receive(GREETING) == []
    return core


def opened(core: client_core.ClientConnection, method: Any = PUT) -> RecordingTicket:
    ticket = RecordingTicket(method)
    core.open(ticket, b"", end=not method.client_stream)
    return ticket


def put_reply(request_id: int) -> bytes:
    return frames.frame(request_id, PUT.number, frames.END, REPLY)


# The connection.


def test_the_first_bytes_are_the_handshake() -> None:
    core = client_core.ClientConnection()
    assert core.take_output() == b"\x89ETCDLT\n\x01\x00\x01\x00"
    assert core.take_output() == b""


def test_a_reply_is_the_same_however_the_bytes_are_cut() -> None:
    for size in (1, 2, 3, 7, 11, 64):
        core = client_core.ClientConnection()
        first, second = opened(core), opened(core)
        data = GREETING + put_reply(2) + put_reply(1)
        deliveries = []
        for start in range(0, len(data), size):
            deliveries += core.receive(data[start : start + size])
        assert deliveries == [(second, frames.END, REPLY), (first, frames.END, REPLY)]
        assert core.hello.version == "fake"
        assert core.failure == ""


@pytest.mark.parametrize(
    ("garbage", "failure"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "does not speak etcdlite's native protocol"),
        (b"\0\0\x06\x04\0\0\0\0\0", "it speaks gRPC or HTTP only, as etcd does"),
        (b"", "before a greeting: it may be etcd, which speaks gRPC only"),
        (b"", "or have refused this address: its log says why"),
        (b"\x89ETX", "does not speak etcdlite's native protocol"),
        (frames.HANDSHAKE.pack(frames.MAGIC, 0, 0), "does not speak protocol version 1"),
        (GREETING + b"\x00\x00\x00\x00" * 3, "not the native protocol: frame length 0"),
        (GREETING + b"\xff" * 12, "not the native protocol: frame length"),
        (GREETING + put_reply(9), "a reply to request 9, which is not open"),
        (GREETING + frames.frame(0, 0, 0, b""), "id 0"),
        (
            frames.HANDSHAKE.pack(frames.MAGIC, 1, 0) + frames.frame(0, 0, 0, b"\xff"),
            "not the native",
        ),
        (
            GREETING + frames.frame(0, 0, 3, proto.Error(code=3, message="too much").encode()),
            "the server closes the connection: too much",
        ),
        (b"", "the server closed the connection"),
    ],
)
def test_what_breaks_the_protocol_fails_the_connection(garbage: bytes, failure: str) -> None:
    core = client_core.ClientConnection()
    ticket = opened(core)
    core.take_output()
    core.receive(garbage)
    assert failure in core.failure
    assert core.fail("") == [ticket]
    assert core.fail("") == []


def test_a_server_without_a_hello_may_be_a_port_for_peers() -> None:
    core = client_core.ClientConnection()
    core.receive(frames.HANDSHAKE.pack(frames.MAGIC, 1, 1))
    core.receive(b"")
    assert core.failure.endswith("before its hello: it may be a port for peers")


def test_a_unary_reply_without_an_end_fails_the_connection() -> None:
    core = connected()
    opened(core)
    assert core.receive(frames.frame(1, PUT.number, 0, REPLY)) == []
    assert core.failure == "KV.Put: a reply without an end"


def test_replies_before_the_garbage_are_delivered() -> None:
    core = connected()
    ticket = opened(core)
    assert core.receive(put_reply(1) + b"\x00" * 20) == [(ticket, frames.END, REPLY)]
    assert core.failure
    assert core.fail("") == []


def test_a_request_counts_as_sent_once_its_bytes_are_taken() -> None:
    core = connected()
    first = opened(core)
    core.take_output()
    second = opened(core)
    assert (first.sent, second.sent) == (True, False)
    assert core.fail("gone") == [first, second]
    assert core.take_output() == b""


def test_the_id_of_a_cancelled_request_stays_reserved_until_the_server_ends_it() -> None:
    core = connected()
    ticket = opened(core)
    assert core.cancel(ticket, 1.0)
    assert not core.cancel(ticket, 1.0)
    assert core.silent_since_s == 1.0
    core._last_id = 0  # as after 2^32 requests
    assert opened(core).request_id == 2
    assert core.receive(frames.frame(1, PUT.number, 3, b"")) == []
    assert core.failure == ""
    assert core.silent_since_s is None
    core._last_id = 0
    assert opened(core).request_id == 1


def test_ids_wrap_around_past_zero() -> None:
    core = connected()
    core._last_id = 2**32 - 2
    assert [opened(core).request_id for _ in range(2)] == [2**32 - 1, 1]


def test_a_request_that_the_server_would_refuse_is_not_sent() -> None:
    core = connected()
    with pytest.raises(RequestTooLarge):
        core.open(RecordingTicket(), b"x" * (core.hello.max_request_bytes + 1), end=True)
    assert core.take_output() == b""
    assert not core.open_tickets()


@given(st.binary(), st.booleans())
def test_no_bytes_make_the_connection_raise(data: bytes, greeted: bool) -> None:
    core = connected() if greeted else client_core.ClientConnection()
    ticket = opened(core)
    deliveries = core.receive(data)
    assert all(to is ticket for to, _, _ in deliveries)
    assert core.fail("") == ([] if deliveries else [ticket])


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0, 1, 3]), st.binary(max_size=9))))
def test_each_request_ends_once_whatever_frames_come(sent: list[tuple[int, int, bytes]]) -> None:
    core = connected()
    tickets = [opened(core, WATCH) for _ in range(3)]
    data = b"".join(frames.frame(i, WATCH.number, flags, body) for i, flags, body in sent)
    ends = [to for to, flags, _ in core.receive(data) if flags & frames.END]
    ends += core.fail("over")
    assert sorted(map(id, ends)) == sorted(map(id, tickets))


def test_a_watch_without_a_time_limit_never_times_out() -> None:
    """Not even if a wait ends early: some end at a time of day, and the clock may be set."""
    pings = []
    calls = SimpleNamespace(ping=lambda link: iter(pings.append(link) or ()))
    link = SimpleNamespace(endpoint="here", wait_limit_s=lambda until_s: until_s)
    link.usable = lambda: True
    watch: Any = SimpleNamespace(
        _stream=(link, None), _wake=None, _calls=calls, _pings_at_s=monotonic() + 1000
    )
    for deadline_s, ends_with in ((scripts.NEVER_S, StopIteration), (monotonic(), Timeout)):
        waiting = scripts.WatchBase._wait(watch, deadline_s)
        next(waiting)
        with pytest.raises(ends_with):
            waiting.send(False)
    assert pings == []
    watch._pings_at_s = monotonic()
    waiting = scripts.WatchBase._wait(watch, scripts.NEVER_S)
    next(waiting)
    with pytest.raises(StopIteration):
        waiting.send(False)
    assert pings == [link]


def test_an_unread_watch_is_cut_off_and_keeps_a_gapless_beginning() -> None:
    woken = []
    ticket = link.WatchTicket(WATCH, lambda: woken.append(1))
    limit = link.MAX_WATCH_QUEUE_MESSAGES
    wanted = [ticket.deliver(0, b"%d" % i) for i in range(limit + 10)]
    assert wanted[: limit + 1] == [True] * limit + [False]
    assert ticket.over
    assert ticket.lost == ""
    read = []
    while (item := ticket.take()) is not None:
        read.append(item[1])
    assert read == [b"%d" % i for i in range(limit)]


def test_an_unread_stream_without_bodies_is_bounded() -> None:
    paused = []
    unread = SimpleNamespace(pause_reading=lambda: paused.append(1))
    ticket = link.StreamTicket(WATCH, lambda: None, unread)  # type: ignore[arg-type]
    limit = link.MAX_STREAM_QUEUE_BYTES // frames.FRAME_HEADER_BYTES
    for _ in range(limit):
        ticket.deliver(0, b"")
    assert not paused
    ticket.deliver(0, b"")
    assert paused


def test_an_unread_watch_is_bounded_in_bytes_but_takes_one_message_of_any_size() -> None:
    ticket = link.WatchTicket(WATCH, lambda: None)
    assert ticket.deliver(0, b"x" * (link.MAX_WATCH_QUEUE_BYTES + 1))
    assert not ticket.deliver(0, b"y")
    ticket = link.WatchTicket(WATCH, lambda: None)
    for _ in range(100):
        assert ticket.deliver(0, b"x" * (link.MAX_WATCH_QUEUE_BYTES // 2))
        assert ticket.take() is not None


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("127.0.0.1:2379", ("127.0.0.1", 2379, "")),
        ("http://127.0.0.1:4001", ("127.0.0.1", 4001, "http")),
        ("http://localhost/", ("localhost", 2379, "http")),
        ("https://a:1", ("a", 1, "https")),
        ("[::1]:5", ("::1", 5, "")),
        ("[::1]", ("::1", 2379, "")),
    ],
)
def test_endpoints_are_understood(endpoint: str, address: tuple[str, int, str]) -> None:
    assert client_core.parse_endpoint(endpoint) == address


@pytest.mark.parametrize(
    "endpoint",
    ["", ":1", "a:b", "a:0", "a:65536", "unix://a:1", "ftp://a", "::1", "[::1]x", "a:1/path"],
)
def test_endpoints_that_make_no_sense_are_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        client_core.parse_endpoint(endpoint)


@pytest.mark.parametrize("host", ["a..b", "x" * 64, "a.%s.b" % ("x" * 64), "\u202e"])
def test_a_host_that_cannot_be_looked_up_is_refused_by_name(host: str) -> None:
    with pytest.raises(ValueError, match="is not a host name") as caught:
        client.Client(f"{host}:2379")
    assert repr(host) in str(caught.value)
    assert not isinstance(caught.value, UnicodeError)


def test_an_endpoint_with_a_user_is_refused_and_its_password_not_shown() -> None:
    with pytest.raises(ValueError, match="has no user: leave out all up to the @") as refused:
        client_core.parse_endpoint("https://root:hunter2@10.0.0.1:2379")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("separator", [" ", ",", ", "])
def test_two_endpoints_in_one_text_are_refused_with_the_remedy(separator: str) -> None:
    with pytest.raises(ValueError, match="by commas; in Python give a list"):
        client_core.parse_endpoint(f"10.0.0.1:2379{separator}10.0.0.2:2379")


def test_a_lease_once_lost_stays_lost() -> None:
    clock = scripts.LeaseClock(100.0, 10)
    assert not clock.lost(109.9)
    clock.renew(105.0, 10, 106.0)
    assert not clock.lost(114.9)
    assert clock.lost(115.0)
    clock.renew(114.0, 10, 115.1)
    assert clock.lost(115.2)


# The package.


def test_every_name_of_the_package_is_there_and_belongs_to_one_module() -> None:
    homes = [import_module(f"etcdlite.client.{name}") for name in client.HOMES]
    assert sorted(client.__all__) == sorted(name for home in homes for name in home.__all__)
    for name in client.__all__:
        assert any(getattr(client, name) is getattr(home, name, None) for home in homes), name
    with pytest.raises(AttributeError, match="'Nothing'"):
        _ = client.Nothing


@pytest.mark.parametrize(
    "statement",
    [
        "from etcdlite.client.connection import ClientConnection",
        "from etcdlite.client import Client, Put, Timeout",
        "from etcdlite.client.blocking import Client",
    ],
)
def test_the_blocking_client_does_not_load_asyncio(statement: str) -> None:
    program = f"{statement}; import sys; assert 'asyncio' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


# Errors.


def test_each_class_named_like_an_etcd_error_stands_for_its_text() -> None:
    for name in client_errors.__all__:
        cls = getattr(client_errors, name)
        if name in errors.ERRORS and name != "Timeout":
            code, text = errors.ERRORS[name]
            error = client_errors.error_for(code, text, "host:1")
            assert type(error) is cls
            assert (error.code, error.text, str(error)) == (code, text, text)
            assert error.endpoint == "host:1"
            assert (cls().code, cls().text) == (code, text)


def test_an_error_without_a_class_keeps_its_code_and_text() -> None:
    error = client_errors.error_for(9, "etcdserver: something new")
    assert type(error) is EtcdliteError
    assert (error.code, str(error)) == (9, "etcdserver: something new")
    assert type(client_errors.error_for(14, "busy")) is client_errors.Unavailable


# Requests.


def test_the_end_of_a_prefix_is_the_next_key_without_it() -> None:
    assert calls.prefix_end(b"a") == b"b"
    assert calls.prefix_end(b"a\xff\xff") == b"b"
    assert calls.prefix_end(b"\xff") == b"\0"
    assert calls.prefix_end(b"") == b"\0"
    assert calls.key_range(None, None, "") == (b"\0", b"\0")


def test_keys_are_said_in_one_way() -> None:
    with pytest.raises(TypeError):
        calls.range_("a", prefix="b")
    with pytest.raises(TypeError):
        calls.delete()
    with pytest.raises(TypeError):
        calls.get(7)  # type: ignore[arg-type]


def test_comparisons_become_the_messages_of_etcd() -> None:
    def message(comparison: Any) -> Any:
        return comparison.message

    C = proto.Compare
    assert message(Value("k") == "v") == C(result=0, target=3, key=b"k", value=b"v")
    assert message(Version(b"k") > 0) == C(result=1, target=0, key=b"k", version=0)
    assert message(CreateRevision("k") < 7) == C(result=2, target=1, key=b"k", create_revision=7)
    assert message(ModRevision("k") != 7) == C(result=3, target=2, key=b"k", mod_revision=7)
    assert message(LeaseOf(prefix="k") == 7) == C(
        result=0, target=4, key=b"k", range_end=b"l", lease=7
    )


def test_a_comparison_is_no_truth_value() -> None:
    with pytest.raises(TypeError):
        assert Version("k") == 1
    with pytest.raises(TypeError):
        Version("k") >= 1  # type: ignore[operator]  # noqa: B015
    with pytest.raises(TypeError):
        Version("k") == "1"  # noqa: B015


def test_a_transaction_gives_each_operation_its_own_kind_of_result() -> None:
    op = Txn(
        [Version("k") == 0],
        success=[Put("k", "v"), Get("k"), Range(prefix=""), Delete("k"), Txn(success=[Get("x")])],
        failure=[Get("k")],
    )
    kv = proto.KeyValue(key=b"k", value=b"v", mod_revision=3)
    responses = [
        proto.ResponseOp(response_put=proto.PutResponse()),
        proto.ResponseOp(response_range=proto.RangeResponse(kvs=[kv], count=1)),
        proto.ResponseOp(response_range=proto.RangeResponse(kvs=[kv], count=1)),
        proto.ResponseOp(response_delete_range=proto.DeleteRangeResponse(deleted=1)),
        proto.ResponseOp(
            response_txn=proto.TxnResponse(
                succeeded=True,
                responses=[proto.ResponseOp(response_range=proto.RangeResponse())],
            )
        ),
    ]
    result = op.result(proto.TxnResponse(succeeded=True, responses=responses))
    put, got, kvs, deleted, inner = result.results
    assert put.prev_kv is None
    assert got == kvs[0]
    assert got.value == b"v"
    assert deleted.deleted == 1
    assert inner.results == (None,)
    assert not client_calls.is_read(op.method, op.request)
    reading = Txn(success=[Get("k"), Txn(failure=[Get("x")])])
    assert client_calls.is_read(reading.method, reading.request)
    with pytest.raises(TypeError):
        Txn(success=[calls.status()])
    for wrong in ([], responses[:-1], responses[::-1], [*responses, responses[0]]):
        with pytest.raises(client.EtcdliteError, match="does not fit its operations"):
            op.result(proto.TxnResponse(succeeded=True, responses=wrong))
    with pytest.raises(client.EtcdliteError, match="does not fit its operations"):
        op.result(proto.TxnResponse(responses=[proto.ResponseOp()]))


def test_sorting_says_what_etcd_understands() -> None:
    assert calls.range_(prefix="", descending=True).request.sort_order == 2
    request = calls.range_(prefix="", sort_by="mod").request
    assert (request.sort_order, request.sort_target) == (1, 3)
    assert calls.range_(prefix="").request.sort_order == 0


# Watch positions.


def header(revision: int) -> Any:
    return proto.ResponseHeader(revision=revision)


def event(key: bytes, revision: int, kind: int = 0) -> Any:
    return proto.Event(type=kind, kv=proto.KeyValue(key=key, mod_revision=revision))


def test_a_watch_from_now_goes_on_behind_the_revision_it_was_created_at() -> None:
    cursor = calls.watch("k")
    assert cursor.request().create_request.start_revision == 0
    assert cursor.feed(proto.WatchResponse(header=header(7), created=True)) is None
    assert cursor.created
    assert cursor.request().create_request.start_revision == 8


def test_a_watch_goes_on_behind_the_last_event_and_not_behind_the_header() -> None:
    cursor = calls.watch(prefix="", start_revision=3)
    batch = cursor.feed(
        proto.WatchResponse(header=header(90), events=[event(b"a", 4), event(b"b", 5)])
    )
    assert batch is not None
    assert [e.revision for e in batch.events] == [4, 5]
    assert cursor.next_revision == 6
    mark = cursor.feed(proto.WatchResponse(header=header(90)))
    assert mark == calls.WatchBatch(90, ())
    assert cursor.next_revision == 91


def test_a_watch_that_the_server_ends_says_why() -> None:
    cursor = calls.watch("k", start_revision=3)
    with pytest.raises(Compacted) as compacted:
        cursor.feed(proto.WatchResponse(canceled=True, compact_revision=9))
    assert compacted.value.compact_revision == 9
    text = client_errors.PermissionDenied.text
    for reason in (text, f"rpc error: code = PermissionDenied desc = {text}"):
        with pytest.raises(client_errors.PermissionDenied, match=f"^{text}$"):
            cursor.feed(proto.WatchResponse(canceled=True, cancel_reason=reason))
    with pytest.raises(WatchCanceled):
        cursor.feed(proto.WatchResponse(canceled=True))


# Recipes, step by step.


def kv(key: bytes, create_revision: int, mod_revision: int = 0, value: bytes = b"") -> KeyValue:
    return KeyValue(key, value, create_revision, mod_revision or create_revision, 1, 0)


def ranged(revision: int, *kvs: KeyValue) -> calls.RangeResult:
    return calls.RangeResult(revision, kvs, len(kvs), False)


def watched(cursor: calls.WatchCursor) -> tuple[bytes, bytes, int, list[int]]:
    """What a recipe waits for: key, range end, start revision, and the events that do not count."""
    create = cursor.request().create_request
    return create.key, create.range_end, create.start_revision, list(create.filters)


NO_PUT, NO_DELETE = [proto.WatchCreateRequest.NOPUT], [proto.WatchCreateRequest.NODELETE]


def finish(script: Any, outcome: Any) -> Any:
    with pytest.raises(StopIteration) as stop:
        script.send(outcome)
    return stop.value.value


def test_the_first_in_line_holds_the_lock_at_once() -> None:
    script = recipes.stand_in_line(recipes.line("job"), 0x1F, b"")
    op = next(script)
    assert op.repeatable
    put = op.request.success[0].request_put
    assert (put.key, put.lease) == (b"job/1f", 0x1F)
    assert op.request.compare == [(CreateRevision("job/1f") == 0).message]
    placed = calls.TxnResult(5, True, (calls.PutResult(5, None), ranged(5, kv(b"job/1f", 5))))
    held = finish(script, placed)
    assert held == recipes.Held(b"job/1f", 5, 0x1F)
    assert held.guard.message == (CreateRevision("job/1f") == 5).message


def test_a_place_taken_by_a_transaction_sent_twice_is_recognised() -> None:
    script = recipes.stand_in_line(b"job/", 2, b"")
    next(script)
    mine = kv(b"job/2", 5)
    assert finish(script, calls.TxnResult(9, False, (mine, ranged(9, mine)))).revision == 5


def test_who_waits_watches_the_one_just_before() -> None:
    script = recipes.stand_in_line(b"job/", 2, b"")
    next(script)
    step = script.send(
        calls.TxnResult(9, True, (calls.PutResult(9, None), ranged(9, kv(b"job/1", 3))))
    )
    assert step.request.max_create_revision == 8
    assert (step.request.sort_order, step.request.sort_target, step.request.limit) == (2, 2, 1)
    step = script.send(ranged(10, kv(b"job/3", 7)))
    assert watched(step) == (b"job/3", b"", 11, NO_PUT)
    step = script.throw(Compacted())
    step = script.send(ranged(12, kv(b"job/1", 3)))
    assert watched(step) == (b"job/1", b"", 13, NO_PUT)
    script.send(Event("DELETE", kv(b"job/1", 0, 14), None))
    own = script.send(ranged(14))
    assert own.request.key == b"job/2"
    assert finish(script, kv(b"job/2", 9)).revision == 9


def test_who_lost_his_place_while_waiting_does_not_get_the_lock() -> None:
    script = recipes.stand_in_line(b"job/", 2, b"")
    next(script)
    script.send(calls.TxnResult(9, True, (calls.PutResult(9, None), ranged(9, kv(b"job/1", 3)))))
    script.send(ranged(10))
    with pytest.raises(LeaseLost):
        script.send(None)


def test_observing_follows_values_and_leaders() -> None:
    script = recipes.observe(b"e/")
    assert next(script).request.key == b"e/"
    assert watched(script.send(ranged(4))) == (b"e/", b"e0", 5, NO_DELETE)
    script.send(Event("PUT", kv(b"e/1", 6), None))
    leading = kv(b"e/1", 6)
    assert script.send(ranged(6, leading)) == leading
    assert watched(next(script)) == (b"e/1", b"", 7, [])
    changed = kv(b"e/1", 6, 8, b"new")
    assert script.send(Event("PUT", changed, None)) == changed
    assert watched(next(script)) == (b"e/1", b"", 9, [])
    assert isinstance(script.send(Event("DELETE", kv(b"e/1", 0, 10), None)), calls.Op)


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="sort_by='size': write one of key, version, create, mod"):
        calls.range_(prefix="a", sort_by="size")
    with pytest.raises(TypeError, match=r"comparisons such as Value.* not True"):
        calls.txn([True], [Put("k", "v")])  # type: ignore[list-item]
