"""HTTP over HTTP/2, on the connections of gRPC; `test_tls.py` has curl over a real one."""

from __future__ import annotations

import functools
import gc
import json
import random
import weakref
from typing import Any

import pytest
from rigs.lone_member import LoneMember, turn
from rigs.wire import take_output
from test_grpc import KV, Client, framed
from test_http import BAR, EVERYTHING, FOO, Browser, b64
from test_http2 import frames

from etcdlite.errors import error
from etcdlite.methods import METHOD_BY_NAME
from etcdlite.session import MAX_HELD_BYTES
from etcdlite.wire import grpc as grpc_module
from etcdlite.wire import http2
from etcdlite.wire.carried import MAX_CARRIED, CarryingSession, head_of
from etcdlite.wire.grpc import MAX_PARTIAL_BYTES, STALLED_BYTES
from etcdlite.wire.http import BODY_TIMEOUT_S, IDLE_TIMEOUT_S, StreamSession
from etcdlite.wire.http2 import STREAM_WINDOW_BYTES
from etcdlite.wire.http2_state import INTERNAL_ERROR
from etcdlite.wire.site import Site

Headers = dict[str, str]


class Surfer(Client):
    """A client of gRPC and of HTTP on one connection."""

    kind = CarryingSession

    def __init__(self, lone: LoneMember, window: int | None = None) -> None:
        site = Site(lone.member, metrics=lambda: b"etcdlite_up 1\n")
        make = functools.partial(StreamSession, site=site, is_local=False)
        super().__init__(lone, window, make_http=make)

    def begin(self, verb: str, path: str, ended: bool = False, **headers: str) -> int:
        others = {"content_type": "", "te": "", "user_agent": "", ":authority": "localhost"}
        return self.open(path, ended=ended, **{**others, ":method": verb, **headers})

    def surf(self, verb: str, path: str, body: Any = b"", **headers: str) -> Any:
        """A request and its answer."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body:
            headers.setdefault("content_length", str(len(body)))
        stream_id = self.begin(verb, path, ended=not body, **headers)
        if body:
            self.write(stream_id, body, ended=True)
        self.pump()
        return self.answers[stream_id]


@pytest.fixture
def lone(lone: LoneMember) -> LoneMember:
    lone.elect()
    return lone


@pytest.fixture
def surfer(lone: LoneMember) -> Surfer:
    return Surfer(lone)


@pytest.mark.parametrize(
    "verb, path, body, headers",
    [
        ("GET", "/", b"", {}),
        ("HEAD", "/", b"", {}),
        ("GET", "/health", b"", {}),
        ("GET", "/health?serializable=true", b"", {}),
        ("HEAD", "/health", b"", {}),
        ("POST", "/health", b"", {}),
        ("GET", "/livez?verbose", b"", {}),
        ("GET", "/readyz/linearizable_read", b"", {}),
        ("GET", "/version", b"", {}),
        ("GET", "/nothing", b"", {}),
        ("GET", "/v3/kv/range", b"", {}),
        ("GET", "/v3/nothing", b"", {}),
        ("GET", "/etcdserverpb.KV/Range", b"", {}),
        ("OPTIONS", "/v3/kv/range", b"", {"origin": "http://elsewhere"}),
        ("POST", "/v3/kv/range", {"key": FOO}, {"origin": "http://elsewhere"}),
        ("POST", "/v3/kv/range", {"key": FOO}, {"content_type": "application/json"}),
        ("POST", "/v3/kv/range", EVERYTHING, {}),
        ("POST", "/v3beta/kv/range", EVERYTHING, {}),
        ("POST", "/v3/kv/range", b"", {}),
        ("POST", "/v3/kv/range", b"{", {}),
        ("POST", "/v3/kv/range", b"[]", {}),
        ("POST", "/v3/kv/range", {"key": FOO, "revision": "99"}, {}),
        ("POST", "/v3/kv/range", {"key": FOO}, {"grpc_timeout": "1n"}),
        ("POST", "/v3/kv/range", {"key": FOO}, {"authorization": "none"}),
        ("POST", "/v3/maintenance/status", b"{}", {}),
        ("POST", "/v3/lease/keepalive", {"ID": "7"}, {}),
        ("POST", "/v3/kv/put", b"x" * 3_000_000, {}),
        ("PUT", "/v3/kv/put", {"key": FOO}, {}),
    ],
)
def test_the_answer_is_that_of_http_1(
    lone: LoneMember, surfer: Surfer, verb: str, path: str, body: Any, headers: Headers
) -> None:
    assert surfer.put(b"foo", b"bar").status == 0
    plain = Browser(lone).ask(verb, path, body, headers)
    answer = surfer.surf(verb, path, body, **headers)
    assert plain.is_whole and answer.is_ended and answer.endings == 1
    status = answer.headers.pop(":status")
    expected = {name.lower(): value for name, value in plain.headers.items()}
    expected.pop("transfer-encoding", "")
    expected.pop("connection", "")
    assert (status, answer.headers, answer.data) == (str(plain.status), expected, plain.body)
    assert not surfer.session.streams and not surfer.session.carried
    assert surfer.session._partial_bytes == 0
    assert surfer.get(b"foo").kvs[0].value == b"bar", "gRPC goes on beside it"


def test_json_writes_and_reads(surfer: Surfer) -> None:
    assert surfer.surf("POST", "/v3/kv/put", {"key": FOO, "value": BAR}).headers[":status"] == "200"
    assert surfer.get(b"foo").kvs[0].value == b"bar"


@pytest.mark.parametrize("piece_bytes", [1, 7, 16_384])
def test_a_body_without_a_length_comes_in_pieces(surfer: Surfer, piece_bytes: int) -> None:
    body = json.dumps({"key": FOO, "value": BAR}).encode()
    stream_id = surfer.begin("POST", "/v3/kv/put")
    for at in range(0, len(body), piece_bytes):
        surfer.h2.send_data(stream_id, body[at : at + piece_bytes])
        surfer.pump()
        assert not surfer.answers[stream_id].headers
    surfer.h2.end_stream(stream_id)
    surfer.pump()
    assert surfer.answers[stream_id].headers[":status"] == "200"
    assert surfer.get(b"foo").kvs[0].value == b"bar"


@pytest.mark.parametrize("is_sized", [False, True])
def test_a_large_body_and_a_large_answer(lone: LoneMember, is_sized: bool) -> None:
    surfer = Surfer(lone, window=5000)
    value = random.Random(0).randbytes(1_000_000)
    body = {"key": FOO, "value": b64(value)}
    headers = {} if is_sized else {"content_length": ""}
    assert surfer.surf("POST", "/v3/kv/put", body, **headers).headers[":status"] == "200"
    answer = surfer.surf("POST", "/v3/kv/range", {"key": FOO})
    assert answer.is_ended and json.loads(answer.data)["kvs"][0]["value"] == b64(value)


def test_an_answer_that_nobody_reads_is_held_back(lone: LoneMember) -> None:
    surfer = Surfer(lone, window=5000)
    for number in range(40):
        surfer.put(b"%d" % number, random.Random(number).randbytes(100_000))
    surfer.reads = False
    stream_id = surfer.begin("POST", "/v3/kv/range")
    surfer.write(stream_id, json.dumps(EVERYTHING).encode(), ended=True)
    assert len(surfer.answers[stream_id].data) == 5000
    assert surfer.session.streams[stream_id].held_bytes < 4 * STALLED_BYTES < MAX_HELD_BYTES
    surfer.reads = True
    surfer.h2.increment_flow_control_window(1 << 24)
    surfer.h2.increment_flow_control_window(1 << 24, stream_id)
    surfer.pump()
    answer = surfer.answers[stream_id]
    assert answer.is_ended and len(json.loads(answer.data)["kvs"]) == 40


def test_a_watch_lasts_until_its_stream_is_reset(lone: LoneMember, surfer: Surfer) -> None:
    stream_id = surfer.begin("POST", "/v3/watch")
    watch = {"create_request": {"key": FOO}}
    surfer.write(stream_id, json.dumps(watch).encode(), ended=True)
    surfer.put(b"foo", b"bar")
    lines = surfer.answers[stream_id].data.splitlines()
    assert [list(json.loads(line)["result"])[1] for line in lines] == ["created", "events"]
    assert lone.member.hub.watches == 1
    surfer.h2.reset_stream(stream_id)
    surfer.pump()
    assert not lone.member.hub.watches and not surfer.session.streams
    assert not surfer.answers[stream_id].is_ended


def test_a_connection_that_ends_takes_its_requests_along(lone: LoneMember, surfer: Surfer) -> None:
    watch = json.dumps({"create_request": {"key": FOO}}).encode()
    surfer.write(surfer.begin("POST", "/v3/watch"), watch, ended=True)
    surfer.write(surfer.begin("POST", "/v3/kv/put"), b"{")
    assert lone.member.hub.watches
    surfer.session.closed()
    while surfer.session.has_more:
        surfer.session.produce()
    lone.settle()
    assert not lone.member.hub.watches


def test_a_connection_that_ends_leaves_no_cycle_of_references(lone: LoneMember) -> None:
    """The garbage collector does not look at old objects."""
    surfer = Surfer(lone)
    surfer.surf("GET", "/health")
    watch = json.dumps({"create_request": {"key": FOO}}).encode()
    surfer.write(surfer.begin("POST", "/v3/watch"), watch, ended=True)
    surfer.write(surfer.begin("POST", "/v3/kv/put"), b"{")
    found = [weakref.ref(thing) for thing in (surfer.session, *surfer.session.carried.values())]
    surfer.session.closed()
    while surfer.session.has_more:
        surfer.session.produce()
    lone.settle()
    gc.disable()
    try:
        del surfer
        assert [one() for one in found] == [None] * 3
    finally:
        gc.enable()


def test_many_at_once_are_served_in_turn_and_more_are_refused(surfer: Surfer) -> None:
    asked = [surfer.begin("GET", "/metrics", ended=True) for _ in range(MAX_CARRIED + 1)]
    surfer.session.receive(surfer.h2.data_to_send())
    surfer.session.produce()
    assert 0 < MAX_CARRIED - len(surfer.session.carried) < 10, "a turn serves a few"
    surfer.pump()
    statuses = [surfer.answers[stream_id].headers[":status"] for stream_id in asked]
    assert statuses == ["200"] * MAX_CARRIED + ["503"]
    assert surfer.surf("GET", "/metrics").data == b"etcdlite_up 1\n"


def test_bodies_that_wait_are_counted_and_limited(surfer: Surfer) -> None:
    session = surfer.session
    body = b'"' + bytes(2_000_000)
    for _ in range(2 * MAX_PARTIAL_BYTES // len(body)):
        surfer.write(surfer.begin("POST", "/v3/kv/put"), body)
        assert session._partial_bytes <= session.kept_bytes < MAX_PARTIAL_BYTES + (4 << 20)
    statuses = {answer.headers.get(":status") for answer in surfer.answers.values()}
    assert statuses == {None, "503"}
    assert session._partial_bytes > MAX_PARTIAL_BYTES - (4 << 20)
    for stream_id in list(session.streams):
        surfer.h2.reset_stream(stream_id)
    surfer.pump()
    assert session._partial_bytes == 0 and not session.carried


def test_a_client_stream_sends_no_faster_than_it_is_served(surfer: Surfer) -> None:
    surfer.surf("POST", "/v3/lease/grant", {"ID": "7", "TTL": "60"})
    stream_id = surfer.begin("POST", "/v3/lease/keepalive")
    message = b'{"ID":"7"' + 8000 * b" " + b"}"
    sent = 0
    while surfer.h2.local_flow_control_window(stream_id) >= len(message):
        surfer.h2.send_data(stream_id, message)
        surfer.session.receive(surfer.h2.data_to_send())
        surfer.h2.receive_data(take_output(surfer.session))
        sent += 1
        assert sent * len(message) <= STREAM_WINDOW_BYTES, "nothing is processed yet"
    surfer.pump()
    assert surfer.answers[stream_id].data.count(b"\n") == sent
    assert surfer.h2.local_flow_control_window(stream_id) > STREAM_WINDOW_BYTES // 2


def test_a_stopping_server_ends_streams_and_answers_requests(lone: LoneMember) -> None:
    surfer = Surfer(lone)
    session = surfer.session
    surfer.surf("POST", "/v3/lease/grant", {"ID": "7", "TTL": "60"})
    watch = surfer.begin("POST", "/v3/watch")
    surfer.write(watch, json.dumps({"create_request": {"key": FOO}}).encode(), ended=True)
    keep_alive = surfer.begin("POST", "/v3/lease/keepalive")
    surfer.write(keep_alive, b'{"ID":"7"}')
    half = surfer.begin("POST", "/v3/kv/put")
    surfer.write(half, b"{")
    begun, waiting = surfer.begin("POST", "/v3/kv/put"), surfer.begin("POST", "/v3/kv/put")
    for stream_id in (begun, waiting):
        surfer.h2.send_data(stream_id, json.dumps({"key": FOO}).encode(), end_stream=True)
        session.receive(surfer.h2.data_to_send())
        if stream_id == begun:
            session.produce()
    session.shut_down()
    assert not session.is_idle
    while not session.is_idle:
        lone.settle()
        session.shut_down()
        while session.has_more:
            session.produce()
        sent = [f for f in frames(take_output(session)) if f.kind != http2.GOAWAY]
        # Without GOAWAY, because h2 takes it for the end of everything.
        for event in surfer.h2.receive_data(b"".join(http2.frame(*f) for f in sent)):
            surfer._handle(event)
    streams = (surfer.answers[watch], surfer.answers[keep_alive])
    for answer in streams:
        error = json.loads(answer.data.splitlines()[-1])["error"]
        assert answer.is_ended and error["message"] == "etcdserver: server stopped"
    statuses = [surfer.answers[n].headers[":status"] for n in (half, begun, waiting)]
    assert statuses == ["503", "200", "200"] and not session.streams


@pytest.mark.parametrize("ended", [False, True])
def test_a_request_that_waits_for_its_turn_is_not_late(
    lone: LoneMember, surfer: Surfer, ended: bool
) -> None:
    surfer.surf("GET", "/health")
    stream_id = surfer.begin("GET" if ended else "POST", "/metrics", ended=ended)
    for _ in range(2):
        surfer.session.receive(surfer.h2.data_to_send())
        for _ in range(3):
            surfer.session.tick(lone.now)
            lone.now += IDLE_TIMEOUT_S + 1
        if not ended:
            surfer.session.produce()
            surfer.h2.send_data(stream_id, b"{}", end_stream=True)
            ended = True
    surfer.pump()
    assert surfer.answers[stream_id].headers[":status"] == "200"


def test_the_requests_of_a_connection_share_its_quota(lone: LoneMember) -> None:
    surfer = Surfer(lone, window=5000)
    for number in range(6):
        surfer.put(b"%d" % number, random.Random(number).randbytes(1_000_000))
    surfer.reads = False

    def begin(path: str, body: Any) -> Any:
        stream_id = surfer.begin("POST", path)
        surfer.write(stream_id, json.dumps(body).encode(), ended=True)
        return surfer.answers[stream_id]

    for _ in range(3):
        begin("/v3/watch", {"create_request": {"key": BAR}})
    assert surfer.session.calls.quota.watches == lone.member.hub.watches == 3
    begin("/v3/maintenance/snapshot", {})
    refused = begin("/v3/maintenance/snapshot", {})
    assert refused.is_ended and b"too many requests" in refused.data
    assert lone.member.backups_under_way == 1
    surfer.session.closed()
    assert not surfer.session.calls.quota.watches and not lone.member.backups_under_way


def test_a_body_may_end_when_nothing_more_may_be_held(
    surfer: Surfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream_id = surfer.begin("POST", "/v3/kv/put")
    surfer.write(stream_id, b"{}")
    monkeypatch.setattr(grpc_module, "MAX_PARTIAL_BYTES", surfer.session._partial_bytes)
    surfer.h2.end_stream(stream_id)
    surfer.pump()
    assert surfer.answers[stream_id].headers[":status"] == "400"


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize(
    "path, body",
    [
        ("/health", None),
        ("/metrics", None),
        ("/v3/kv/range", EVERYTHING),
        ("/v3/kv/put", {"key": FOO}),
        ("/v3/kv/txn", {"success": [{"request_range": {"key": FOO}}]}),
        ("/v3/lease/grant", {"TTL": 60}),
        ("/v3/lease/leases", {}),
        ("/v3/watch", {"create_request": {"key": FOO}}),
        ("/v3/maintenance/hash", {}),
        ("/v3/maintenance/snapshot", {}),
        ("/v3/lock/lock", {"name": FOO}),
    ],
)
def test_a_client_may_leave_while_its_request_is_served(
    lone: LoneMember, path: str, body: Any, stage: int, leaves: bool
) -> None:
    surfer = Surfer(lone)
    session = surfer.session
    surfer.surf("GET", "/health")
    stream_id = surfer.begin("GET" if body is None else "POST", path, ended=body is None)
    if body is not None:
        surfer.h2.send_data(stream_id, json.dumps(body).encode(), end_stream=True)
    session.receive(surfer.h2.data_to_send())
    if stage > 0:
        while session.has_more:
            session.produce()
    if stage > 1:
        turn(lone.member)
    if leaves:
        session.closed()
    else:
        surfer.h2.reset_stream(stream_id)
        session.receive(surfer.h2.data_to_send())
    while session.has_more:
        session.produce()
    lone.settle()
    assert not session.streams and not len(session.calls) and not lone.member.hub.watches
    assert Surfer(lone).surf("GET", "/health").headers[":status"] == "200"


def test_a_body_that_does_not_come_is_given_up(lone: LoneMember, surfer: Surfer) -> None:
    stream_id = surfer.begin("POST", "/v3/kv/put")
    surfer.write(stream_id, b"{")
    lone.now += BODY_TIMEOUT_S - 1
    surfer.session.tick(lone.now)
    surfer.pump()
    assert not surfer.answers[stream_id].headers
    assert not surfer.session.may_rest, "its time is due"
    lone.now += 2
    surfer.session.tick(lone.now)
    surfer.pump()
    assert surfer.answers[stream_id].headers[":status"] == "408"
    assert not surfer.session.streams and not surfer.session.is_closing


@pytest.mark.parametrize("begins", [False, True])
def test_an_answer_that_fails_half_way_does_not_look_complete(
    lone: LoneMember, begins: bool
) -> None:
    surfer = Surfer(lone, window=5000)
    for number in range(40):
        surfer.put(b"%d" % number, random.Random(number).randbytes(100_000))
    surfer.reads = False
    stream_id = surfer.begin("POST", "/v3/kv/range" if begins else "/v3/kv/put")
    surfer.write(stream_id, json.dumps(EVERYTHING).encode(), ended=begins)
    surfer.session.fail(stream_id, 0, error("Stopped"))
    surfer.pump()
    answer = surfer.answers[stream_id]
    if begins:
        assert answer.reset == INTERNAL_ERROR and not answer.is_ended
    else:
        assert answer.headers[":status"] == "503"
    assert not surfer.session.streams and not surfer.session.outbox.held_bytes


@pytest.mark.parametrize(
    "headers, status",
    [
        ({":path": "/a b"}, "400"),
        ({":path": "health"}, "404"),
        ({":path": "*"}, "404"),
        ({":path": "/health HTTP/1.0"}, "400"),
        ({":method": "GET /secret"}, "400"),
        ({":method": "BREW"}, "405"),
        ({":method": "CONNECT", ":path": "/metrics"}, "405"),
        ({":method": "HEAD", ":path": "/a b"}, "400"),
        ({":authority": ""}, "200"),
        ({"host": "elsewhere"}, "200"),
        ({"expect": "100-continue"}, "200"),
        ({"grpc-metadata-token": "none"}, "200"),
    ],
)
def test_what_http_1_cannot_say_is_refused(surfer: Surfer, headers: Headers, status: str) -> None:
    fields = {":method": "GET", ":scheme": "https", ":path": "/health", ":authority": "localhost"}
    stream_id = surfer.h2.get_next_available_stream_id()
    surfer.h2.config.validate_outbound_headers = False
    fields = {name: value for name, value in {**fields, **headers}.items() if value}
    surfer.h2.send_headers(stream_id, list(fields.items()), end_stream=True)
    surfer.pump()
    answer = surfer.answers[stream_id]
    assert answer.headers[":status"] == status and answer.is_ended
    assert bool(answer.data) == (fields[":method"] != "HEAD")


def test_a_client_that_was_told_to_go_on_may_be_refused(surfer: Surfer) -> None:
    stream_id = surfer.begin("POST", "/v3/kv/put", expect="100-continue")
    surfer.pump()
    surfer.session.fail(stream_id, 0, error("Stopped"))
    surfer.pump()
    assert surfer.answers[stream_id].headers[":status"] == "503"


def test_the_head_has_one_host_and_no_field_of_http_2() -> None:
    fields = [
        (b":method", b"GET"), (b":path", b"/"), (b":authority", b"real"), (b":scheme", b"https"),
        (b"host", b"other"), (b"accept", b"a"), (b"accept", b"b"),
    ]  # fmt: skip
    assert head_of(fields) == b"GET / HTTP/1.1\r\nhost: real\r\naccept: a\r\naccept: b\r\n"
    fields[2] = (b":authority", b"")
    assert head_of(fields).splitlines()[1] == b"host: other"


def test_without_tls_other_requests_than_those_of_grpc_are_refused(lone: LoneMember) -> None:
    client = Client(lone)
    assert client.ask("/health", content_type="text/plain").headers[":status"] == "415"


def test_requests_behind_json_are_counted_once(lone: LoneMember, surfer: Surfer) -> None:
    rpc = lone.member.metrics.rpcs[METHOD_BY_NAME["KV.Range"].number]
    clients = lone.member.metrics.client("")
    before, unary = rpc.started, clients.unary
    surfer.surf("POST", "/v3/kv/range", {"key": FOO})
    assert (rpc.started, clients.unary) == (before + 1, unary + 1)


def test_random_frames_of_http_and_grpc_leave_nothing_behind(lone: LoneMember) -> None:
    rng = random.Random(5)
    surfer = Surfer(lone, window=300)
    asked: list[int] = []
    for _ in range(400):
        choice = rng.random()
        if choice < 0.3:
            asked.append(surfer.begin(*rng.choice([("GET", "/health"), ("GET", "/")]), ended=True))
        elif choice < 0.5:
            asked.append(surfer.begin("POST", rng.choice(["/v3/kv/put", "/v3/watch", "/v3/x"])))
        elif choice < 0.6:
            surfer.h2.send_data(surfer.open(KV + "Put"), framed(b"\n\1a"), end_stream=True)
        elif asked:
            stream_id = asked.pop(rng.randrange(len(asked)))
            answer = surfer.answers[stream_id]
            is_open = not answer.is_ended and answer.reset is None
            if is_open and rng.random() < 0.5:
                surfer.h2.reset_stream(stream_id)
        if rng.random() < 0.3:
            surfer.reads = rng.random() < 0.7
            surfer.pump()
    surfer.reads = True
    for stream_id in list(surfer.session.streams):
        surfer.h2.reset_stream(stream_id)
    surfer.pump()
    session = surfer.session
    assert not session.is_closing and not session.streams and not session.carried
    assert session._partial_bytes == 0 and session.outbox.waiting_bytes == 0
    assert surfer.surf("GET", "/health").headers[":status"] == "200"
