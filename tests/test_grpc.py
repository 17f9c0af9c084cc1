"""gRPC sessions over a member: driven in process by the `h2` library, over sockets by grpcio."""

from __future__ import annotations

import gzip
import re
import selectors
import socket
import struct
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc as grpcio
import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rigs.held_memory import held_bytes
from rigs.lone_member import LoneMember, turn
from rigs.processes import wait_until
from rigs.wire import take_output
from test_http2 import frames

from etcdlite import errors, methods, proto
from etcdlite.errors import CANCELED, error
from etcdlite.limits import DEFAULT_LIMITS
from etcdlite.member import Member
from etcdlite.wire import grpc as grpc_module
from etcdlite.wire import hpack, http2, http2_state, reflection, streams
from etcdlite.wire.calls import CLOSED_PER_SLICE, MAX_UNANSWERED, REQUEST_BYTES
from etcdlite.wire.carried import CarryingSession
from etcdlite.wire.grpc import GrpcSession, percent_encode
from etcdlite.wire.grpc_request import ROUTES, read_request
from etcdlite.wire.health import fields
from etcdlite.wire.http2 import GHOST
from etcdlite.wire.native import NativeSession
from etcdlite.wire.session import INVALID_TOKEN

KV = "/etcdserverpb.KV/"
SNAPSHOT = "/etcdserverpb.Maintenance/Snapshot"
WATCH = "/etcdserverpb.Watch/Watch"
KEEP_ALIVE = "/etcdserverpb.Lease/LeaseKeepAlive"
HEALTH = "/grpc.health.v1.Health/"


def framed(body: bytes, packed: int = 0) -> bytes:
    return struct.pack(">BI", packed, len(body)) + body


class Answer:
    """What came back on one stream."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.data = b""
        self.trailers: dict[str, str] = {}
        self.is_ended = False
        self.endings = 0
        self.reset: int | None = None

    @property
    def messages(self) -> list[bytes]:
        found = []
        at = 0
        while at < len(self.data):
            packed, size = struct.unpack_from(">BI", self.data, at)
            assert packed == 0
            assert at + 5 + size <= len(self.data), "a message is cut off"
            found.append(self.data[at + 5 : at + 5 + size])
            at += 5 + size
        return found

    @property
    def message(self) -> bytes:
        (message,) = self.messages
        return message

    @property
    def status(self) -> int | None:
        text = (self.trailers or self.headers).get("grpc-status")
        return None if text is None else int(text)

    @property
    def text(self) -> str:
        return (self.trailers or self.headers).get("grpc-message", "")


class Client:
    """h2 on one end, a session of a real member on the other, nothing between them."""

    kind: type[GrpcSession] = GrpcSession

    def __init__(self, lone: LoneMember, window: int | None = None, **limits: Any) -> None:
        self.lone = lone
        self.session = self.kind(lone.member, lambda _: None, **limits)
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        if window is not None:
            self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.reads = True
        """Gives back the windows of what it is sent."""
        self.answers: dict[int, Answer] = {}
        self.goaway: h2.events.ConnectionTerminated | None = None
        self.pump()

    def pump(self) -> None:
        """Carry bytes both ways, and let the member work, until nothing moves."""
        while True:
            sent = self.h2.data_to_send()
            if sent:
                self.session.receive(sent)
            self.lone.settle()
            while self.session.has_more:
                self.session.produce()
            got = take_output(self.session)
            if not sent and not got:
                return
            for event in self.h2.receive_data(got):
                self._handle(event)

    def _handle(self, event: Any) -> None:
        answer = self.answers.setdefault(getattr(event, "stream_id", None) or 0, Answer())
        if isinstance(event, h2.events.ResponseReceived):
            answer.headers = dict(event.headers)
        elif isinstance(event, h2.events.TrailersReceived):
            answer.trailers = dict(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            answer.data += event.data
            if self.reads and event.flow_controlled_length:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            answer.is_ended = True
            answer.endings += 1
        elif isinstance(event, h2.events.StreamReset):
            answer.reset = int(event.error_code)
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.goaway = event

    def open(self, path: str, *more: tuple[str, str], ended: bool = False, **others: str) -> int:
        """Begin a request; its stream id. `others` replace what a request has."""
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "here",
            "content-type": "application/grpc",
            "te": "trailers",
            "user-agent": "test",
        }
        fields.update({name.replace("_", "-"): value for name, value in others.items()})
        stream_id = self.h2.get_next_available_stream_id()
        headers = [item for item in fields.items() if item[1]] + list(more)
        self.h2.send_headers(stream_id, headers, end_stream=ended)
        self.answers[stream_id] = Answer()
        return stream_id

    def write(self, stream_id: int, data: bytes, *, ended: bool = False) -> None:
        """As much as the windows allow at a time."""
        answer = self.answers[stream_id]
        while data and not answer.is_ended and self.goaway is None:
            room = self.h2.local_flow_control_window(stream_id)
            room = min(room, self.h2.max_outbound_frame_size, len(data))
            assert room, "the server gives no window"
            self.h2.send_data(stream_id, data[:room], end_stream=ended and room == len(data))
            data = data[room:]
            self.pump()
        if ended and not data and not answer.is_ended and self.goaway is None:
            self.pump()

    def ask(self, path: str, message: Any = b"", *more: tuple[str, str], **others: str) -> Answer:
        """A request of one message, answered."""
        body = message if isinstance(message, bytes) else message.encode()
        stream_id = self.open(path, *more, **others)
        if len(body) < 10_000:
            self.h2.send_data(stream_id, framed(body), end_stream=True)
        else:
            self.write(stream_id, framed(body), ended=True)
        self.pump()
        return self.answers[stream_id]

    def ask_only(self, **others: str) -> int:
        """Send a put and let it wait: the member does nothing yet. The stream id."""
        stream_id = self.open(KV + "Put", **others)
        body = proto.PutRequest(key=b"k", value=b"v").encode()
        self.h2.send_data(stream_id, framed(body), end_stream=True)
        self.session.receive(self.h2.data_to_send())
        return stream_id

    def say(self, stream_id: int, message: Any) -> None:
        """A message on an open stream."""
        self.h2.send_data(stream_id, framed(message.encode()))
        self.pump()

    def put(self, key: bytes, value: bytes = b"v") -> Answer:
        return self.ask(KV + "Put", proto.PutRequest(key=key, value=value))

    def get(self, key: bytes, **options: Any) -> Any:
        answer = self.ask(KV + "Range", proto.RangeRequest(key=key, **options))
        assert answer.status == 0, answer.text
        return proto.RangeResponse.decode(answer.message)


@pytest.fixture
def client(lone: LoneMember) -> Client:
    return Client(lone)


# --- Unary -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", (GrpcSession, CarryingSession, NativeSession))
def test_a_session_has_no_dict_of_its_own(kind: type) -> None:
    assert kind.__dictoffset__ == 0, "a class that it derives from has no __slots__"


def test_a_put_and_a_range(client: Client) -> None:
    answer = client.put(b"k", b"v")
    assert answer.headers[":status"] == "200"
    assert answer.headers["content-type"] == "application/grpc"
    assert (answer.status, answer.endings, answer.reset) == (0, 1, None)
    assert proto.PutResponse.decode(answer.message).header.revision == 2
    assert client.get(b"k").kvs[0].value == b"v"


def test_what_was_put_this_way_is_recovered_from_the_log(tmp_path: Path) -> None:
    lone = LoneMember(tmp_path, checkpoint_bytes=1 << 30)
    for n in range(20):
        Client(lone).put(b"k%d" % n, b"v%d" % n)
    lone.close()
    again = LoneMember(tmp_path)
    assert Client(again).get(b"k", range_end=b"l").count == 20
    again.close()


def test_many_requests_at_once_are_all_answered(client: Client) -> None:
    ids = []
    for n in range(100):
        stream_id = client.open(KV + "Put")
        body = proto.PutRequest(key=b"%d" % n, value=b"x").encode()
        client.h2.send_data(stream_id, framed(body), end_stream=True)
        ids.append(stream_id)
    client.pump()
    assert [client.answers[i].status for i in ids] == [0] * 100
    assert client.session.is_idle and not client.session.streams


def test_an_error_has_etcds_code_and_text(client: Client) -> None:
    answer = client.put(b"")
    assert (answer.status, answer.text) == (3, "etcdserver: key is not provided")
    assert answer.endings == 1 and answer.data == b"" and not answer.trailers


def test_the_text_of_an_error_is_percent_encoded() -> None:
    assert percent_encode("a b%c\n\u00e9~\x7f") == b"a b%25c%0A%C3%A9~%7F"
    assert len(percent_encode("x" * 100_000)) == 2048
    for text in ("\u00ff" * 100_000, "x" + "\u00ff" * 100_000, "xx" + "\u00ff" * 100_000):
        encoded = percent_encode(text)
        assert 2045 <= len(encoded) <= 2048 and re.fullmatch(rb"x*(%[0-9A-F]{2})*", encoded)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/no.Such/Method", "unknown service no.Such"),
        ("/etcdserverpb.KV/No", "unknown method No for service etcdserverpb.KV"),
        ("nonsense", 'malformed method name: "nonsense"'),
        ("/nonsense", 'malformed method name: "/nonsense"'),
    ],
)
def test_what_does_not_exist_is_unimplemented(client: Client, path: str, text: str) -> None:
    answer = client.ask(path, b"whatever")
    assert (answer.status, answer.text) == (errors.UNIMPLEMENTED, text)
    assert client.put(b"k").status == 0, "and costs the request only"


def test_a_downgrade_to_no_version_is_refused(client: Client) -> None:
    answer = client.ask("/etcdserverpb.Maintenance/Downgrade", proto.DowngradeRequest())
    assert answer.status == errors.INVALID_ARGUMENT
    assert answer.text == "etcdserver: wrong downgrade target version format"


@pytest.mark.parametrize(
    ("others", "http_status", "status", "text"),
    [
        ({":method": "GET"}, "405", 13, "Received a HEADERS frame with :method \"GET\" which "
         "should be POST"),
        ({"content-type": "text/html"}, "415", 3, 'invalid gRPC request content-type "text/html"'),
        ({"content-type": ""}, "415", 3, 'invalid gRPC request content-type ""'),
        ({"content-type": "application/grpcx"}, "415", 3,
         'invalid gRPC request content-type "application/grpcx"'),
        ({"grpc-timeout": "soon"}, "400", 13, 'malformed grpc-timeout: "soon"'),
        ({"grpc-timeout": "123456789S"}, "400", 13, 'malformed grpc-timeout: "123456789S"'),
        ({"grpc-encoding": "snappy"}, "200", 12,
         'grpc: Decompressor is not installed for grpc-encoding "snappy"'),
    ],
)  # fmt: skip
def test_a_header_that_is_refused(
    client: Client, others: dict[str, str], http_status: str, status: int, text: str
) -> None:
    answer = client.ask(KV + "Range", proto.RangeRequest(key=b"k"), **others)
    assert (answer.headers[":status"], answer.status, answer.text) == (http_status, status, text)
    if status == errors.UNIMPLEMENTED:
        assert answer.headers["grpc-accept-encoding"] == "gzip"


@pytest.mark.parametrize("kind", ["application/grpc+proto", "application/grpc;x=y"])
def test_subtypes_of_the_content_type_are_taken(client: Client, kind: str) -> None:
    answer = client.ask(KV + "Range", proto.RangeRequest(key=b"k"), **{"content-type": kind})
    assert answer.status == 0


def test_te_is_not_required(client: Client) -> None:
    assert client.ask(KV + "Range", proto.RangeRequest(key=b"k"), te="").status == 0


def test_bytes_that_are_no_message_cost_the_request_only(client: Client) -> None:
    for body in (b"\xff", b"\x0a\x05abc", b"\x0b" * 300):
        answer = client.ask(KV + "Put", body)
        assert answer.status == errors.INTERNAL
        assert answer.text.startswith("grpc: error unmarshalling request: ")
    assert client.put(b"k").status == 0


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "grpc: the request has no message"),
        (b"\0\0", "grpc: the request ends within a message"),
        (framed(b"")[:-1] + b"\x05ab", "grpc: the request ends within a message"),
        (framed(b"") + framed(b""), "grpc: more than one message in a unary request"),
        (framed(b"", 1), "grpc: compressed flag set with identity or empty encoding"),
        (framed(b"", 7), "grpc: received unexpected payload format 7"),
    ],
)
def test_a_body_that_is_not_one_message(client: Client, data: bytes, text: str) -> None:
    for one_frame in (True, False):
        stream_id = client.open(KV + "Put", ended=False)
        if one_frame:
            client.h2.send_data(stream_id, data, end_stream=True)
        else:
            for byte in data:
                client.h2.send_data(stream_id, bytes((byte,)))
            client.h2.send_data(stream_id, b"", end_stream=True)
        client.pump()
        answer = client.answers[stream_id]
        assert (answer.status, answer.text, answer.endings) == (errors.INTERNAL, text, 1)
    assert client.put(b"k").status == 0


def test_a_request_in_many_small_pieces(client: Client) -> None:
    stream_id = client.open(KV + "Put")
    for byte in framed(proto.PutRequest(key=b"k", value=b"small").encode()):
        client.h2.send_data(stream_id, bytes((byte,)))
        client.pump()
    client.h2.send_data(stream_id, b"", end_stream=True)
    client.pump()
    assert client.answers[stream_id].status == 0
    assert client.get(b"k").kvs[0].value == b"small"


# --- Sizes -----------------------------------------------------------------------------------


def test_small_pieces_of_a_request_take_the_memory_that_is_counted(client: Client) -> None:
    stream_id = client.open(KV + "Put")
    client.write(stream_id, struct.pack(">BI", 0, 1 << 20))
    pieces = http2.frame(http2.DATA, 0, stream_id, b"ab") * 1000
    tracemalloc.start()
    try:
        for _ in range(100):
            client.session.receive(pieces)
        held = held_bytes(grpc_module.__file__, http2.__file__)
    finally:
        tracemalloc.stop()
    assert client.session._partial_bytes >= 200_000
    assert 200_000 <= held < 300_000


def test_large_values_pass_both_ways_through_the_windows(lone: LoneMember) -> None:
    client = Client(lone, window=5000)
    value = bytes(range(256)) * 5000
    assert client.put(b"k", value).status == 0
    assert client.get(b"k").kvs[0].value == value
    assert client.get(b"k").kvs[0].value == value
    assert not client.session.outbox.held_bytes and client.session.is_idle


def test_a_message_above_the_limits_is_refused(client: Client) -> None:
    most = client.lone.member.options.max_request_bytes
    answer = client.put(b"k", bytes(most))
    assert (answer.status, answer.text) == (3, "etcdserver: request is too large")
    limit = most + (512 << 10)
    answer = client.put(b"k", bytes(limit))
    size = len(proto.PutRequest(key=b"k", value=bytes(limit)).encode())
    assert answer.status == errors.RESOURCE_EXHAUSTED
    assert answer.text == f"grpc: received message larger than max ({size} vs. {limit})"
    assert client.put(b"k").status == 0


def test_requests_that_do_not_come_whole_hold_a_bounded_memory(client: Client) -> None:
    refused = 0
    for _ in range(30):
        stream_id = client.open(KV + "Put")
        client.write(stream_id, struct.pack(">BI", 0, 2 << 20) + bytes((2 << 20) - 1))
        refused += client.answers[stream_id].status == errors.RESOURCE_EXHAUSTED
        assert client.session._partial_bytes <= 33 << 20
    assert refused > 10
    client.session.closed()
    assert client.session._partial_bytes == 0


def test_gzip_requests_are_unpacked(client: Client) -> None:
    body = gzip.compress(proto.PutRequest(key=b"k", value=b"x" * 100_000).encode())
    stream_id = client.open(KV + "Put", grpc_encoding="gzip")
    client.h2.send_data(stream_id, framed(body, 1), end_stream=True)
    client.pump()
    assert client.answers[stream_id].status == 0
    assert client.get(b"k").kvs[0].value == b"x" * 100_000


def test_a_gzip_message_may_have_several_members(client: Client) -> None:
    body = proto.PutRequest(key=b"k", value=b"x" * 1000).encode()
    stream_id = client.open(KV + "Put", grpc_encoding="gzip")
    members = gzip.compress(body[:500]) + gzip.compress(b"") + gzip.compress(body[500:])
    client.h2.send_data(stream_id, framed(members, 1), end_stream=True)
    client.pump()
    assert client.answers[stream_id].status == 0
    assert client.get(b"k").kvs[0].value == b"x" * 1000


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (gzip.compress(bytes(50 << 20)), errors.RESOURCE_EXHAUSTED),
        (b"this is not gzip", errors.INTERNAL),
        (gzip.compress(b"abc")[:-4], errors.INTERNAL),
        (gzip.compress(b"abc") + b"x", errors.INTERNAL),
        (gzip.compress(b"") * 10_000, errors.INTERNAL),
        (gzip.compress(bytes(1 << 20)) * 5, errors.RESOURCE_EXHAUSTED),
        (b"", errors.INTERNAL),
    ],
    ids=["bomb", "no gzip", "cut off", "with a tail", "many members", "large members", "nothing"],
)
def test_gzip_that_is_a_bomb_or_broken(client: Client, body: bytes, status: int) -> None:
    stream_id = client.open(KV + "Put", grpc_encoding="gzip")
    client.write(stream_id, framed(body, 1), ended=True)
    assert client.answers[stream_id].status == status
    assert client.put(b"k").status == 0


# --- Metadata --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"\xb2S", b"\xb2\xb3\xb9m", b"S", b"", b"-1S", b"1_0S", b" 1S"])
def test_a_timeout_that_is_no_number_is_refused(value: bytes) -> None:
    fields = [
        (b":method", b"POST"),
        (b":path", KV.encode() + b"Put"),
        (b"content-type", b"application/grpc"),
        (b"grpc-timeout", value),
    ]
    failure = read_request(fields).failure
    assert failure is not None and failure.text.startswith("malformed grpc-timeout")


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etcdserverpb.Lease/LeaseKeepAlive", proto.LeaseKeepAliveRequest(ID=5)),
        (
            "/etcdserverpb.Watch/Watch",
            proto.WatchRequest(create_request=proto.WatchCreateRequest(key=b"k")),
        ),
        (
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            proto.WatchRequest(progress_request=proto.WatchProgressRequest()),
        ),
    ],
    ids=["keep-alive", "watch", "reflection"],
)
def test_what_follows_the_message_that_ended_a_call_is_ignored(
    lone: LoneMember, path: str, message: Any, is_last: bool
) -> None:
    client = Client(lone, window=0)
    stream_id = client.open(path)
    good, bad = framed(message.encode()), framed(b"\xff")
    more = b"" if is_last else good + b"\0"
    client.h2.send_data(stream_id, good + bad + more, end_stream=is_last)
    client.pump()
    assert client.session.streams[stream_id].tail, "it ended behind an answer that is held"
    assert client.session._partial_bytes == 0
    client.h2.increment_flow_control_window(1000, stream_id)
    client.pump()
    assert len(client.answers[stream_id].messages) == 1
    assert client.answers[stream_id].status == errors.INTERNAL
    assert not client.session.streams


def test_a_client_that_reads_no_answers_cannot_ask_for_renewals_for_ever(lone: LoneMember) -> None:
    client = Client(lone, window=0)
    stream_id = client.open("/etcdserverpb.Lease/LeaseKeepAlive")
    renewal = framed(proto.LeaseKeepAliveRequest(ID=5).encode())
    for _ in range(300):
        client.h2.send_data(stream_id, renewal * 100)
        client.pump()
        if client.session.streams[stream_id].tail:
            break
    else:
        raise AssertionError("it goes on for ever")
    held = client.session.streams[stream_id].held
    assert held is not None and client.session.outbox.held_bytes < 1 << 20 and len(held) == 1


def test_renewals_wait_while_many_have_no_answer(
    lone: LoneMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Member, "needs_no_round", False)
    client = Client(lone)
    session, count = client.session, MAX_UNANSWERED * 3 // 2
    streams = [client.open(KEEP_ALIVE) for _ in range(2)]
    client.pump()
    renewals = framed(proto.LeaseKeepAliveRequest(ID=5).encode()) * (count // 2)
    while renewals:
        for stream_id in streams:
            client.h2.send_data(stream_id, renewals[:16384])
        renewals = renewals[16384:]
        session.receive(client.h2.data_to_send())
    while session.has_more:
        session.produce()
    assert session.is_full and session.calls.unanswered < MAX_UNANSWERED + 600
    client.pump()
    assert [len(client.answers[stream_id].messages) for stream_id in streams] == [count // 2] * 2
    assert session.calls.unanswered == 0


def test_metadata_reach_the_request() -> None:
    fields = [
        (b":method", b"POST"),
        (b":path", KV.encode() + b"Put"),
        (b"content-type", b"application/grpc"),
        (b"token", b"secret.7"),
        (b"hasleader", b"true"),
        (b"client-api-version", b"3.5.0"),
        (b"grpc-timeout", b"250m"),
    ]
    request = read_request(fields)
    assert (request.token, request.has_leader, request.api_version) == ("secret.7", True, "3.5.0")
    assert request.timeout_s == 0.25 and request.failure is None
    assert read_request([*fields[:3], (b"authorization", b"abc")]).token == "abc"
    # Of several the first counts, as in etcd.
    other = [(name, b"other") for name in (b"authorization", b"token", b"hasleader")]
    request = read_request([*fields, *other])
    assert (request.token, request.has_leader) == ("secret.7", True)
    # One of no bytes is not valid, as in etcd, and "token" counts before "authorization".
    for empty in ([(b"token", b""), (b"authorization", b"abc")], [(b"authorization", b"")]):
        assert read_request([*fields[:3], *empty]).token == INVALID_TOKEN
    assert read_request(fields[:3]).token == ""


def test_the_token_of_a_request_can_be_asked_for(client: Client) -> None:
    stream_id = client.open(WATCH, ("token", "secret.7"))
    client.pump()
    assert client.session.token(stream_id) == "secret.7"
    assert client.session.token(99) == INVALID_TOKEN


def test_hasleader_refuses_what_would_wait_for_a_leader(client: Client) -> None:
    client.ask(KV + "Range", proto.RangeRequest(key=b"k"), hasleader="true")
    watch = client.open(WATCH, hasleader="true")
    client.say(watch, proto.WatchRequest(create_request=proto.WatchCreateRequest(key=b"k")))
    client.lone.member.raft.leader = 0
    answer = client.ask(KV + "Range", proto.RangeRequest(key=b"k"), hasleader="true")
    assert (answer.status, answer.text) == (14, "etcdserver: no leader")
    client.session.tick(10.0)
    client.session.tick(12.0)
    client.pump()
    assert client.answers[watch].status is None, "a stream survives a short time without leader"
    client.session.tick(13.1)
    client.pump()
    assert client.answers[watch].text == "etcdserver: no leader"


def test_a_path_in_another_script_is_named_in_its_own_bytes(client: Client) -> None:
    answer = client.ask("/etcdserverpb.KV/Größe", b"")
    assert answer.text == "unknown method Gr%C3%B6%C3%9Fe for service etcdserverpb.KV"


def test_a_client_api_version_that_is_no_text_is_refused() -> None:
    fields = [
        (b":method", b"POST"),
        (b":path", KV.encode() + b"Put"),
        (b"content-type", b"application/grpc"),
        (b"client-api-version", b"\xff"),
    ]
    assert str(read_request(fields).failure) == "etcdserver: invalid client api version"


def test_a_learner_refuses_with_the_code_on_which_the_client_goes_on(client: Client) -> None:
    refusal = error("NotSupportedForLearner")
    for version, status in (("3.4", 14), ("3.5", 14), ("3.6", 9), ("", 9)):
        stream_id = client.ask_only(client_api_version=version)
        client.session.fail(stream_id, methods.PUT, refusal)
        client.pump()
        answer = client.answers[stream_id]
        assert (answer.status, answer.text) == (status, refusal.text), version
    stream_id = client.ask_only(client_api_version="3.5")
    client.session.fail(stream_id, methods.PUT, error("LearnerNotReady"))
    client.pump()
    assert client.answers[stream_id].status == 9


# --- Giving up -------------------------------------------------------------------------------


def test_a_request_past_its_deadline_is_answered_so_once(client: Client) -> None:
    for _ in range(3):  # The second and third come with a known header.
        stream_id = client.ask_only(grpc_timeout="1S")
        session = client.session
        session.tick(client.lone.now + 0.9)
        assert session.streams[stream_id] is not GHOST
        session.tick(client.lone.now + 1.1)
        assert session.streams[stream_id] is GHOST and not session.is_idle
        client.pump()  # The member answers now.
        answer = client.answers[stream_id]
        assert (answer.status, answer.endings) == (errors.DEADLINE_EXCEEDED, 1)
        assert answer.text == "etcdserver: context deadline exceeded"
        assert not session.streams and not session._deadlines and session.is_idle


def test_a_deadline_that_is_met_is_forgotten(client: Client) -> None:
    answer = client.ask(KV + "Range", proto.RangeRequest(key=b"k"), grpc_timeout="1S")
    assert answer.status == 0 and not client.session._deadlines


def test_requests_that_differ_in_their_deadlines_alone_keep_their_own(client: Client) -> None:
    session = client.session
    asked = {seconds: client.ask_only(grpc_timeout=f"{seconds}S") for seconds in (2, 9, 4, 2)}
    again = client.ask_only(grpc_timeout="9S")
    assert len(session._recalled) == 1
    for passed, late in ((1, []), (3, [2]), (5, [2, 4]), (10, [2, 4, 9])):
        session.tick(client.lone.now + passed)
        assert [
            seconds for seconds in (2, 4, 9) if session.streams[asked[seconds]] is GHOST
        ] == late
        assert (session.streams[again] is GHOST) == (passed == 10)
    client.pump()
    assert not session.streams and not session._deadlines


@pytest.mark.parametrize("timeout", ["", "9S"])
def test_requests_with_the_same_header_are_timed_from_their_own_begin(
    client: Client, timeout: str
) -> None:
    rpc = client.lone.member.metrics.rpcs[ROUTES[KV.encode() + b"Put"].number]
    for _ in range(2):  # Then the header is known.
        client.ask_only(grpc_timeout=timeout)
    client.pump()
    before = rpc.handling_s.sum
    for _ in range(3):
        client.ask_only(grpc_timeout=timeout)
        client.lone.now += 1.0
    client.h2.reset_stream(client.ask_only(grpc_timeout=timeout))
    client.lone.now += 0.5
    client.pump()
    assert rpc.handling_s.sum - before == 3.5 + 2.5 + 1.5 + 0.5


PUT_FIELDS = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", KV.encode() + b"Put"),
    (b"content-type", b"application/grpc"),
]


def test_remembered_headers_are_small_and_count_as_memory(client: Client) -> None:
    session = client.session
    fields = [*PUT_FIELDS, (b"grpc-timeout", b"1S")]
    before = session.kept_bytes
    session.read_request(fields + [(b"a", b"")] * 500)  # It would take 60 KB.
    assert session.kept_bytes == before and not session._recalled
    for n in range(10):
        session.read_request([*fields, (b"user-agent", b"%d" % n)])
    assert session.kept_bytes == before + 10 * grpc_module.HEADER_BYTES


def test_only_the_deadline_of_a_header_is_not_read_again(client: Client) -> None:
    headers = [*PUT_FIELDS, (b"token", b"secret.7"), (b"grpc-timeout", b"1S")]
    session = client.session
    session.read_request(headers)

    def recalled(at: int, *fields: tuple[bytes, bytes]) -> Any:
        return session.recall([*headers[:at], *fields, *headers[at + 1 :]])

    assert recalled(5, (b"grpc-timeout", b"250m")).timeout_s == 0.25
    assert recalled(4, (b"token", b"secret.7")).token == "secret.7"
    assert recalled(4, (b"token", b"secret.8")) is None
    assert recalled(5) is None, "a request without a deadline is another one"
    assert recalled(5, (b"grpc-timeout", b"soon")) is None
    assert recalled(5, headers[5], headers[5]) is None
    assert session.recall([headers[5], *headers[:5]]) is None, "pseudo-headers come first"
    for n in range(2 * grpc_module.MAX_RECALLED):
        session.read_request([*headers, (b"token", b"%d" % n)])
    assert len(session._recalled) <= grpc_module.MAX_RECALLED
    session._recalled.clear()
    for more in ((b"token", bytes(http2.MAX_KNOWN_BYTES)), (b"content-length", b"7")):
        session.read_request([*headers, more])
    assert not session._recalled


def test_a_stream_past_its_deadline_ends(client: Client) -> None:
    watch = client.open(WATCH, grpc_timeout="5S")
    client.say(watch, proto.WatchRequest(create_request=proto.WatchCreateRequest(key=b"k")))
    client.session.tick(client.lone.now + 6)
    client.pump()
    assert client.answers[watch].status == errors.DEADLINE_EXCEEDED
    assert client.lone.member.hub.watches == 0


def test_a_deadline_in_the_middle_of_an_answer_cancels_it(lone: LoneMember) -> None:
    # To trailers behind half a message Go's clients say "Internal: unexpected EOF", and to this
    # "DeadlineExceeded", as their own clocks have come to.
    client = Client(lone, window=5000)
    client.put(b"k", bytes(20_000))
    client.reads = False
    create = proto.WatchCreateRequest(key=b"k", start_revision=1)
    watch = client.open(WATCH, grpc_timeout="5S")
    client.say(watch, proto.WatchRequest(create_request=create))
    client.pump()
    assert 0 < len(client.answers[watch].data) <= 5000
    client.session.tick(lone.now + 6)
    client.pump()
    answer = client.answers[watch]
    assert answer.reset == h2.errors.ErrorCodes.CANCEL and not answer.trailers
    assert not client.session.outbox.held_bytes and lone.member.hub.watches == 0
    assert not client.session.streams and not client.session._deadlines


def test_many_streams_fail_in_slices(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_module, "FAILED_PER_SLICE", 4)
    session = client.session
    for _ in range(10):
        client.open(WATCH, grpc_timeout="5S")
    client.pump()
    late = client.lone.now + 6
    client.lone.now = late
    session.tick(late)
    assert len(session.streams) == 6 and session.has_more
    session.produce()
    session.produce()
    assert not session.streams and not session.has_more
    client.pump()
    ended = [answer.status for stream_id, answer in client.answers.items() if stream_id]
    assert ended == [errors.DEADLINE_EXCEEDED] * 10
    # The server stops.
    for _ in range(10):
        client.open(WATCH)
    client.pump()
    for left in (6, 2, 0):
        session.shut_down()
        take_output(session)
        assert len(session.streams) == left and session.is_idle == (not left)


def test_incomplete_requests_fail_in_slices(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_module, "FAILED_PER_SLICE", 4)
    session = client.session
    for _ in range(10):
        client.open(KV + "Put")
    client.pump()
    now = client.lone.now
    for interval, left in ((1, 10), (2, 6), (2, 2), (2, 0)):
        session.tick(now + interval * session._check_interval_s + 1)
        assert len(session.streams) == left, interval
    client.pump()
    ended = [answer.status for stream_id, answer in client.answers.items() if stream_id]
    assert ended == [errors.DEADLINE_EXCEEDED] * 10


def test_a_request_that_was_reset_is_not_answered(client: Client) -> None:
    stream_id = client.ask_only()
    client.h2.reset_stream(stream_id, http2_state.CANCEL)
    client.pump()
    answer = client.answers[stream_id]
    assert answer.status is None and not answer.is_ended
    assert not client.session.streams
    assert client.get(b"k").count in (0, 1), "a write may have been applied"


def test_resetting_a_watch_closes_it(client: Client) -> None:
    watch = client.open(WATCH)
    client.say(watch, proto.WatchRequest(create_request=proto.WatchCreateRequest(key=b"k")))
    assert client.lone.member.hub.watches == 1
    client.h2.reset_stream(watch, http2_state.CANCEL)
    client.pump()
    assert client.lone.member.hub.watches == 0
    assert not client.session.streams and not len(client.session.calls)
    client.put(b"k")


def test_closing_the_connection_closes_everything(client: Client) -> None:
    for _ in range(3):
        watch = client.open(WATCH)
        client.say(watch, proto.WatchRequest(create_request=proto.WatchCreateRequest(key=b"k")))
    client.open(SNAPSHOT)
    client.pump()
    client.session.closed()
    assert client.lone.member.hub.watches == 0 and client.lone.member.hub.streams == 0
    client.lone.settle()


def test_a_closed_connection_with_many_streams_is_dropped_in_slices(client: Client) -> None:
    count = 3 * CLOSED_PER_SLICE
    for _ in range(count):
        client.open(WATCH)
    client.session.receive(client.h2.data_to_send())
    session, hub = client.session, client.lone.member.hub
    rpc = client.lone.member.metrics.rpcs[ROUTES[WATCH.encode()].number]
    session.closed()
    slices = [hub.streams]
    while session.has_more:
        session.produce()
        slices.append(hub.streams)
    assert slices == [count - CLOSED_PER_SLICE, count - 2 * CLOSED_PER_SLICE, 0]
    assert rpc.failed[CANCELED] == count


def test_a_header_that_is_not_complete_counts_as_memory(client: Client) -> None:
    before = client.session.kept_bytes
    client.session.receive(http2.frame(http2.HEADERS, 0, 1, bytes(10_000)))
    client.session.receive(http2.frame(http2.CONTINUATION, 0, 1, bytes(5_000)))
    assert client.session.kept_bytes == before + 15_000


def test_open_requests_count_as_memory(client: Client) -> None:
    before = client.session.kept_bytes
    client.open(WATCH)
    client.pump()
    assert client.session.kept_bytes == before + REQUEST_BYTES


def test_a_large_header_in_a_small_block_is_not_cached_and_counts_as_memory(
    client: Client,
) -> None:
    """The token is in the dynamic table, and one byte of each later block refers to it."""
    token = b"x" * 3900 + "\N{GRINNING FACE}".encode()
    fixed = hpack.pack(PUT_FIELDS)
    length = b"\x7f" + bytes(((len(token) - 127) & 127 | 128, (len(token) - 127) >> 7))
    stored = fixed + b"\x40\x05token" + length + token
    client.session.receive(http2.frame(http2.HEADERS, http2.END_HEADERS, 1, stored))
    before = client.session.kept_bytes
    for n in range(1, 101):
        block = fixed + b"\xbe" + hpack.pack([(b"a", b"%d" % n)])
        client.session.receive(http2.frame(http2.HEADERS, http2.END_HEADERS, 2 * n + 1, block))
    tokens = [stream.request.token for stream in client.session.streams.values()]
    assert len(tokens) == 101 and not client.session._known
    assert client.session.kept_bytes - before >= sum(map(sys.getsizeof, tokens[1:]))


def test_a_message_counts_as_memory_until_its_request_is_answered(client: Client) -> None:
    """Both before the stream ends and while the answer is pending."""
    before = client.session.kept_bytes
    message = proto.PutRequest(key=b"k", value=bytes(100_000)).encode()
    data = grpc_module.PREFIX.pack(0, len(message)) + message
    asked = client.open(KV + "Put")
    for at in range(0, len(data), 10_000):
        client.h2.send_data(asked, data[at : at + 10_000])
    client.pump()
    assert client.session.kept_bytes - before > 100_000
    client.h2.end_stream(asked)
    client.session.receive(client.h2.data_to_send())
    assert client.session.kept_bytes - before > 100_000 and client.session._partial_bytes == 0
    client.pump()
    assert client.answers[asked].status == 0
    assert client.session.kept_bytes == before


def test_requests_that_have_not_ended_count_as_incomplete(client: Client) -> None:
    message = proto.PutRequest(key=b"k", value=bytes(1 << 20)).encode()
    packed = gzip.compress(message, 1) + gzip.compress(b"") * 8
    data = grpc_module.PREFIX.pack(1, len(packed)) + packed
    asked = [client.open(KV + "Put", grpc_encoding="gzip") for _ in range(40)]
    for stream_id in asked:
        client.h2.send_data(stream_id, data)
        client.pump()
    refused = [n for n in asked if n in client.answers and client.answers[n].status is not None]
    assert len(refused) == 40 - grpc_module.MAX_PARTIAL_BYTES // len(message)
    assert {client.answers[n].status for n in refused} == {errors.RESOURCE_EXHAUSTED}
    for stream_id in set(asked) - set(refused):
        client.h2.reset_stream(stream_id)
    client.pump()
    assert client.session._partial_bytes == 0


def packed_creates(count: int, unpacked_bytes: int = 5000) -> bytes:
    """Messages that create watches: a few bytes of gzip each, and thousands unpacked."""
    create = proto.WatchCreateRequest(key=b"k" * unpacked_bytes)
    return framed(gzip.compress(proto.WatchRequest(create_request=create).encode()), 1) * count


def test_the_messages_of_a_frame_are_processed_over_several_turns(client: Client) -> None:
    watch = client.open(WATCH, grpc_encoding="gzip")
    client.pump()
    client.h2.send_data(watch, packed_creates(100), end_stream=True)
    client.session.receive(client.h2.data_to_send())
    hub = client.lone.member.hub
    counts = [hub.watches]
    while client.session.has_more:
        client.session.produce()
        counts.append(hub.watches)
    most = grpc_module.READ_BYTES // 5000 + 1
    assert counts[-1] == 100 and not client.session._partial_bytes
    assert max(after - before for before, after in pairwise([0, *counts])) <= most
    client.pump()
    created = [proto.WatchResponse.decode(each) for each in client.answers[watch].messages]
    assert [response.watch_id for response in created] == list(range(100))


def test_input_that_is_not_processed_does_not_widen_the_window(client: Client) -> None:
    watch = client.open(WATCH, grpc_encoding="gzip")
    client.pump()
    data = packed_creates(200, unpacked_bytes=2000)
    sent = 0
    while client.h2.local_flow_control_window(watch) >= len(data):
        client.h2.send_data(watch, data)
        sent += 200
        client.session.receive(client.h2.data_to_send())
    assert client.session._partial_bytes <= http2.STREAM_WINDOW_BYTES
    client.h2.receive_data(take_output(client.session))
    assert client.h2.local_flow_control_window(watch) < len(data)
    client.pump()
    assert client.lone.member.hub.watches == sent
    assert client.h2.local_flow_control_window(watch) > http2.STREAM_WINDOW_BYTES // 2


def test_noise_in_input_that_is_processed_later_ends_the_connection(client: Client) -> None:
    streams = [client.open(WATCH, grpc_encoding="gzip") for _ in range(2)]
    client.pump()
    unknown = b"\x7a" + proto.varint(1 << 20) + bytes(1 << 20)
    data = framed(gzip.compress(unknown), 1) * 500
    for at in range(0, len(data), 10_000):
        for stream_id in streams:
            client.h2.send_data(stream_id, data[at : at + 10_000])
            client.session.receive(client.h2.data_to_send())
    client.pump()
    assert client.session.is_closing and not client.session.has_more
    assert client.goaway is not None and client.goaway.error_code == http2_state.ENHANCE_YOUR_CALM


def test_a_stream_whose_input_is_processed_in_turns_is_not_late(client: Client) -> None:
    watch = client.open(WATCH, grpc_encoding="gzip")
    client.pump()
    session, now = client.session, client.lone.now
    for interval in range(1, 5):
        client.h2.send_data(watch, packed_creates(20))
        session.receive(client.h2.data_to_send())
        assert session.has_more
        session.tick(now + interval * (session._check_interval_s + 1))
        client.pump()
        assert client.lone.member.hub.watches == 20 * interval and watch in session.streams


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_stream_with_unprocessed_input_can_end(client: Client, how: str) -> None:
    watch = client.open(WATCH, grpc_encoding="gzip")
    client.pump()
    client.h2.send_data(watch, packed_creates(100))
    client.session.receive(client.h2.data_to_send())
    assert client.session.has_more
    if how == "reset":
        client.h2.reset_stream(watch)
        client.pump()
    else:
        client.session.closed()
        while client.session.has_more:
            client.session.produce()
    assert client.lone.member.hub.watches == 0 and not client.session._partial_bytes


def test_shut_down_finishes_unary_requests_and_ends_streams(client: Client) -> None:
    watch = client.open(WATCH)
    half = client.open(KV + "Put")
    client.pump()
    session = client.session
    unary = client.ask_only()
    session.shut_down()
    session.shut_down()
    assert not session.is_idle
    client.ask_only()
    client.lone.settle()
    # Read by hand, because h2 takes GOAWAY for the end of everything.
    sent = frames(take_output(session))
    goaways = [f.payload for f in sent if f.kind == http2.GOAWAY]
    assert goaways == [struct.pack(">II", unary, http2_state.NO_ERROR)]
    ends = [(f.stream_id, f.payload) for f in sent if f.kind == http2.HEADERS and f.flags & 1]
    assert [stream_id for stream_id, _ in ends] == [watch, half, unary]
    stopped = [b"etcdserver: server stopped" in payload for _, payload in ends]
    assert stopped == [True, True, False]
    assert session.is_idle and not session.is_closing


def test_a_server_may_stop_while_the_answer_to_a_cancelled_request_is_to_come(
    client: Client,
) -> None:
    session = client.session
    asked = client.ask_only()
    client.h2.reset_stream(asked)
    session.receive(client.h2.data_to_send())
    assert session.streams[asked] is GHOST
    session.shut_down()
    assert not session.is_idle
    client.lone.settle()
    take_output(session)
    assert session.is_idle and not session.streams


@pytest.mark.parametrize("how", ["cancelled", "late"])
def test_a_request_that_ends_before_it_is_read_leaves_nothing_behind(
    client: Client, how: str
) -> None:
    """No answer to it will come, because the member was not asked."""
    session = client.session
    asked = client.open(KV + "Put", grpc_timeout="1S")
    put = proto.PutRequest(key=b"k", value=bytes(grpc_module.READ_BYTES))
    client.h2.send_data(asked, framed(put.encode()) + framed(b""), end_stream=True)
    session.receive(client.h2.data_to_send())
    assert session.has_more
    if how == "cancelled":
        client.h2.reset_stream(asked)
    else:
        session.tick(client.lone.now + 2)
    client.pump()
    assert session.is_idle and not session.streams and not session._partial_bytes
    assert client.get(b"k").count == 0


# --- Streams ---------------------------------------------------------------------------------


def responses(client: Client, stream_id: int) -> list[Any]:
    return [proto.WatchResponse.decode(body) for body in client.answers[stream_id].messages]


def test_a_watch(client: Client) -> None:
    watch = client.open(WATCH)
    client.pump()
    assert not client.answers[watch].headers, "nothing is said before there is something to say"
    create = proto.WatchCreateRequest(key=b"k", range_end=b"l", prev_kv=True)
    client.say(watch, proto.WatchRequest(create_request=create))
    client.put(b"k1", b"one")
    client.put(b"x", b"other")
    client.ask(KV + "DeleteRange", proto.DeleteRangeRequest(key=b"k1"))
    created, put, deleted = responses(client, watch)
    assert created.created
    assert put.events[0].kv.value == b"one"
    assert deleted.events[0].type == 1 and deleted.events[0].prev_kv.value == b"one"
    client.say(watch, proto.WatchRequest(cancel_request=proto.WatchCancelRequest(watch_id=0)))
    assert responses(client, watch)[-1].canceled
    client.h2.end_stream(watch)
    client.pump()
    assert client.answers[watch].status == 0
    assert not client.session.streams and client.lone.member.hub.streams == 0


@pytest.mark.parametrize("start_revision", [0, 1])
def test_a_watch_goes_on_when_its_client_closes_its_side(
    client: Client, start_revision: int
) -> None:
    client.put(b"k", b"before")
    watch = client.open(WATCH)
    create = proto.WatchCreateRequest(key=b"k", start_revision=start_revision)
    client.say(watch, proto.WatchRequest(create_request=create))
    client.h2.end_stream(watch)
    client.pump()
    client.put(b"k", b"after")
    client.pump()
    events = [event.kv.value for response in responses(client, watch) for event in response.events]
    assert events == ([b"before", b"after"] if start_revision else [b"after"])
    assert not client.answers[watch].is_ended
    client.h2.reset_stream(watch, http2_state.CANCEL)
    client.pump()
    assert client.lone.member.hub.streams == 0 and not client.session.streams


@pytest.mark.parametrize("timeout", ["0S", "0n", "1n", "99u"])
def test_a_request_without_time_has_failed_when_it_comes(client: Client, timeout: str) -> None:
    answer = client.ask(KV + "Put", proto.PutRequest(key=b"k"), **{"grpc-timeout": timeout})
    assert answer.status == errors.DEADLINE_EXCEEDED
    assert not client.get(b"k").kvs, "it is not carried out"


def test_requests_that_do_not_come_whole_are_given_up_in_time(
    lone: LoneMember, client: Client
) -> None:
    silent = client.open(KV + "Put")
    slow = client.open(KV + "Put")
    watch = client.open(WATCH)
    half = client.open(WATCH)
    client.write(slow, struct.pack(">BI", 0, 100))
    client.write(half, struct.pack(">BI", 0, 100))
    client.pump()
    for _ in range(400):
        lone.now += 1.0
        client.session.tick(lone.now)
        if client.answers[slow].status is None:
            client.write(slow, b"x" if lone.now < 50 else b"")
    client.pump()
    for stream_id in (silent, slow, half):
        assert client.answers[stream_id].status == errors.DEADLINE_EXCEEDED
    assert client.answers[watch].status is None, "a stream may be silent"
    assert client.put(b"k").status == 0


def test_a_watch_whose_client_does_not_read_holds_nobody_up(lone: LoneMember) -> None:
    client = Client(lone, window=1000)
    watch = client.open(WATCH)
    client.say(watch, proto.WatchRequest(create_request=proto.WatchCreateRequest(key=b"k")))
    client.reads = False
    other = Client(lone)
    for n in range(300):
        assert other.put(b"k", b"%d" % n + bytes(1000)).status == 0
    client.pump()
    assert client.session.outbox.held_bytes < 100_000, "it waits in the history instead"
    client.reads = True
    client.h2.increment_flow_control_window(1 << 20)
    client.h2.increment_flow_control_window(1 << 20, watch)
    client.pump()
    events = [e for r in responses(client, watch) for e in r.events]
    assert [e.kv.version for e in events] == list(range(1, 301))


def test_a_ping_beside_a_watch_is_acknowledged_at_once(client: Client) -> None:
    watch = client.open(WATCH)
    client.say(watch, proto.WatchRequest(create_request=proto.WatchCreateRequest(key=b"k")))
    client.session.receive(http2.frame(http2.PING, 0, 0, b"12345678"))
    answer = [(f.kind, f.flags) for f in frames(take_output(client.session))]
    assert answer == [(http2.PING, http2.ACK)], "no answer to a request is about to be sent"


def test_lease_keep_alive(client: Client) -> None:
    grant = client.ask("/etcdserverpb.Lease/LeaseGrant", proto.LeaseGrantRequest(TTL=60))
    lease_id = proto.LeaseGrantResponse.decode(grant.message).ID
    stream_id = client.open(KEEP_ALIVE)
    client.say(stream_id, proto.LeaseKeepAliveRequest(ID=lease_id))
    client.say(stream_id, proto.LeaseKeepAliveRequest(ID=12345))
    answers = [proto.LeaseKeepAliveResponse.decode(m) for m in client.answers[stream_id].messages]
    assert [(a.ID, a.TTL) for a in answers] == [(lease_id, 60), (12345, 0)]
    client.h2.end_stream(stream_id)
    client.pump()
    assert client.answers[stream_id].status == 0


def test_a_snapshot_larger_than_every_window(lone: LoneMember) -> None:
    client = Client(lone, window=3000)
    for n in range(20):
        client.put(b"k%d" % n, bytes(100_000))
    answer = client.ask(SNAPSHOT, proto.SnapshotRequest())
    parts = [proto.SnapshotResponse.decode(m) for m in answer.messages]
    assert answer.status == 0 and parts[-1].remaining_bytes == 0
    assert sum(len(p.blob) for p in parts) == parts[0].remaining_bytes + len(parts[0].blob)
    assert sum(len(p.blob) for p in parts) > 2_000_000


def test_a_backup_that_is_not_read_is_ended_and_gives_its_place_to_others(
    lone: LoneMember,
) -> None:
    Client(lone).put(b"k", bytes(1_000_000))
    holders = [Client(lone, window=3000) for _ in range(streams.MAX_SNAPSHOTS)]
    for holder in holders:
        holder.reads = False
        holder.h2.send_data(holder.open(SNAPSHOT), framed(b""), end_stream=True)
        holder.pump()
    other = Client(lone)
    assert other.ask(SNAPSHOT).status == errors.RESOURCE_EXHAUSTED
    for _ in range(2):
        lone.now += streams.SNAPSHOT_PERIOD_S
        for holder in holders:
            holder.session.tick(lone.now)
    assert not lone.member.backups_under_way
    assert other.ask(SNAPSHOT).status == 0
    (answer,) = [answer for number, answer in holders[0].answers.items() if number]
    holders[0].h2.increment_flow_control_window(1 << 24)
    holders[0].h2.increment_flow_control_window(1 << 24, max(holders[0].answers))
    holders[0].pump()
    assert answer.status == errors.UNAVAILABLE and "too slowly" in answer.text


def test_a_connection_has_one_place_for_backups(lone: LoneMember) -> None:
    client = Client(lone, window=3000)
    client.put(b"k", bytes(1_000_000))
    client.reads = False
    client.h2.send_data(client.open(SNAPSHOT), framed(b""), end_stream=True)
    client.pump()
    client.reads = True
    assert client.ask(SNAPSHOT).status == errors.RESOURCE_EXHAUSTED
    assert Client(lone).ask(SNAPSHOT).status == 0


def test_one_connection_cannot_have_all_watches(tmp_path: Path) -> None:
    limits = DEFAULT_LIMITS._replace(
        max_watches_per_stream=3, max_watches_per_connection=5, max_watches=9
    )
    lone = LoneMember(tmp_path)
    lone.member.hub.limits = limits
    client, other = Client(lone), Client(lone)
    request = proto.WatchRequest(create_request=proto.WatchCreateRequest(key=b"k"))
    created = [0, 0]
    for number, one in enumerate((client, other)):
        for _ in range(4):
            stream_id = one.open(WATCH)
            for _ in range(2):
                one.say(stream_id, request)
            for response in responses(one, stream_id):
                created[number] += not response.canceled
    lone.close()
    assert created == [5, 4]


def test_a_snapshot_that_is_not_read_is_not_made(lone: LoneMember) -> None:
    client = Client(lone, window=3000)
    for n in range(20):
        client.put(b"k%d" % n, bytes(100_000))
    client.reads = False
    stream_id = client.open(SNAPSHOT)
    client.h2.send_data(stream_id, framed(b""), end_stream=True)
    client.pump()
    assert client.session.outbox.held_bytes < 300_000 and not client.session.has_more
    assert Client(lone).put(b"k").status == 0
    client.h2.reset_stream(stream_id, http2_state.CANCEL)
    client.pump()
    assert not client.session.outbox.held_bytes and not len(client.session.calls)


def test_a_backup_whose_modules_are_not_loaded_leaves_the_loop_alone(
    lone: LoneMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "etcdlite.etcd_backup", raising=False)
    client = Client(lone)
    client.put(b"k")
    stream_id = client.open(SNAPSHOT)
    client.h2.send_data(stream_id, framed(b""), end_stream=True)
    client.session.receive(client.h2.data_to_send())
    assert lone.member.backups_under_way == 1 and not client.session.has_more
    client.pump()
    assert client.answers[stream_id].status == 0 and not lone.member.backups_under_way


def test_a_backup_gives_way_to_a_write_that_is_being_saved(
    lone: LoneMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PARTS_PER_SLICE", 1)
    client, writer = Client(lone), Client(lone)
    for n in range(20):
        client.put(b"k%d" % n, bytes(10_000))
    client.ask(SNAPSHOT)  # Now its modules are loaded.
    stream_id = client.open(SNAPSHOT)
    client.h2.send_data(stream_id, framed(b""), end_stream=True)
    client.session.receive(client.h2.data_to_send())
    put = proto.PutRequest(key=b"k").encode()
    writer.h2.send_data(writer.open("/etcdserverpb.KV/Put"), framed(put), end_stream=True)
    writer.session.receive(writer.h2.data_to_send())
    turn(lone.member)
    assert lone.member.is_saving
    outbox = client.session.outbox
    sent = []
    for pause_s in (0.003, 0.0, 0.003):
        before = outbox.waiting_bytes
        for _ in range(100):
            lone.now += pause_s
            client.session.produce()
            if outbox.waiting_bytes > before:
                break
        sent.append(outbox.waiting_bytes)
    assert 0 < sent[0] == sent[1] < sent[2]
    client.pump()
    assert client.answers[stream_id].status == 0


def merged(answer: Answer) -> Any:
    """The RangeResponse that the messages of a RangeStream merge to."""
    whole = b"".join(
        proto.RangeStreamResponse.decode(m).range_response.encode() for m in answer.messages
    )
    return proto.RangeResponse.decode(whole)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keys_only": True},
        {"count_only": True},
        {"limit": 7},
        {"limit": 10_000},
        {"revision": 300},
        {"serializable": True},
        {"min_mod_revision": 100, "max_mod_revision": 200},
        {"range_end": b""},
        {"key": b"nothing", "range_end": b""},
        {"key": b"k0100", "range_end": b"\0"},
        {"key": b"large", "range_end": b""},
    ],
)
def test_a_range_stream_merges_to_what_range_answers(
    lone: LoneMember, options: dict[str, Any]
) -> None:
    client = Client(lone, window=50_000)
    for n in range(600):
        client.put(b"k%04d" % (n % 500), b"%d" % n + bytes(2000))
    client.put(b"large", bytes(streams.RANGE_CHUNK_BYTES))  # A piece of its own.
    client.put(b"large\0")
    request = proto.RangeRequest(**{"key": b"k", "range_end": b"l", **options})
    streamed = client.ask(KV + "RangeStream", request)
    assert streamed.status == 0
    expected = client.ask(KV + "Range", request)
    assert merged(streamed) == proto.RangeResponse.decode(expected.message)
    if not options:
        assert len(streamed.messages) > 3


def test_a_range_stream_is_of_one_revision(lone: LoneMember) -> None:
    client = Client(lone, window=1000)
    for n in range(1000):
        client.put(b"k%04d" % n, bytes(1000))
    client.reads = False
    request = proto.RangeRequest(key=b"k", range_end=b"l")
    stream_id = client.open(KV + "RangeStream")
    client.h2.send_data(stream_id, framed(request.encode()), end_stream=True)
    client.pump()
    assert not client.answers[stream_id].is_ended
    other = Client(lone)
    other.ask(KV + "DeleteRange", proto.DeleteRangeRequest(key=b"k", range_end=b"l"))
    other.put(b"k9999")
    client.reads = True
    client.h2.increment_flow_control_window(1 << 24)
    client.h2.increment_flow_control_window(1 << 24, stream_id)
    client.pump()
    response = merged(client.answers[stream_id])
    assert response.count == len(response.kvs) == 1000 and response.header.revision == 1001


def test_a_range_stream_fails_when_its_revision_is_compacted(lone: LoneMember) -> None:
    client = Client(lone, window=1000)
    for n in range(1000):
        client.put(b"k%04d" % n, bytes(1000))
    client.reads = False
    stream_id = client.open(KV + "RangeStream")
    body = proto.RangeRequest(key=b"k", range_end=b"l").encode()
    client.h2.send_data(stream_id, framed(body), end_stream=True)
    client.pump()
    other = Client(lone)
    other.put(b"k")
    other.ask(KV + "Compact", proto.CompactionRequest(revision=1002))
    client.reads = True
    client.h2.increment_flow_control_window(1 << 24)
    client.h2.increment_flow_control_window(1 << 24, stream_id)
    client.pump()
    assert client.answers[stream_id].text == error("Compacted").text


def test_a_range_stream_is_checked(client: Client) -> None:
    for request, text in (
        (proto.RangeRequest(), error("EmptyKey").text),
        (proto.RangeRequest(key=b"k", sort_target=3), error("InvalidSortOption").text),
        (proto.RangeRequest(key=b"k", revision=99), error("FutureRev").text),
        (proto.RangeRequest(key=b"k", limit=3, revision=99), error("FutureRev").text),
    ):
        answer = client.ask(KV + "RangeStream", request)
        assert answer.text == text and answer.endings == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit": 80},
        {"limit": 100},
        {"revision": 90},
        {"serializable": True},
        {"sort_order": proto.RangeRequest.ASCEND},
        {"sort_order": proto.RangeRequest.DESCEND},
        {"sort_order": proto.RangeRequest.DESCEND, "limit": 50, "revision": 90},
        {"keys_only": True},
        {"keys_only": True, "revision": 90, "limit": 60},
        {"keys_only": True, "sort_order": proto.RangeRequest.DESCEND},
        {"min_mod_revision": 40, "max_create_revision": 90},
        {"min_mod_revision": 40, "max_create_revision": 90, "limit": 30},
        {"min_mod_revision": 40, "revision": 90, "sort_order": proto.RangeRequest.DESCEND},
        {"range_end": b"\0"},
    ],
)
def test_a_large_range_is_the_same_when_it_is_sent_as_it_is_read(
    lone: LoneMember, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(lone, window=50_000)
    for n in range(120):
        client.put(b"k%04d" % (n % 100), b"%d" % n + bytes(n * 40))
    request = proto.RangeRequest(**{"key": b"k", "range_end": b"l", **options})
    whole = client.ask(KV + "Range", request)
    assert whole.status == 0
    store = lone.member.state.store
    store.limits = store.limits._replace(step_bytes=300, whole_answer_bytes=500)
    begin, begun = streams.LargeRangeCall.begin, []

    def begin_and_note(call: Any, *arguments: Any) -> None:
        begun.append(call)
        begin(call, *arguments)

    monkeypatch.setattr(streams.LargeRangeCall, "begin", begin_and_note)
    streamed = client.ask(KV + "Range", request)
    assert streamed.status == 0 and streamed.message == whole.message
    assert len(begun) == 1
    assert not lone.member.reads.streamed and not store.pinned


def large_range(lone: LoneMember, client: Client | None = None) -> tuple[Client, int]:
    """A client that does not read, and the id of its range of a megabyte."""
    client = client or Client(lone, window=1000)
    for n in range(100):
        client.put(b"k%04d" % n, bytes(10_000))
    store = lone.member.state.store
    limits = store.limits._replace(whole_answer_bytes=100_000, max_answer_bytes=200_000)
    store.limits = limits._replace(step_bytes=20_000, max_streamed_answers=2)
    client.reads = False
    stream_id = client.open(KV + "Range")
    body = proto.RangeRequest(key=b"k", range_end=b"l").encode()
    client.h2.send_data(stream_id, framed(body), end_stream=True)
    client.pump()
    return client, stream_id


def test_a_large_range_waits_for_its_client_and_is_of_one_revision(lone: LoneMember) -> None:
    client, stream_id = large_range(lone)
    assert 0 < client.session.outbox.held_bytes < 400_000
    assert not client.session.has_more
    other = Client(lone)
    other.ask(KV + "DeleteRange", proto.DeleteRangeRequest(key=b"k", range_end=b"l"))
    other.ask(KV + "Compact", proto.CompactionRequest(revision=102))
    client.reads = True
    client.h2.increment_flow_control_window(1 << 24)
    client.h2.increment_flow_control_window(1 << 24, stream_id)
    client.pump()
    answer = client.answers[stream_id]
    response = proto.RangeResponse.decode(answer.message)
    assert answer.status == 0
    assert response.count == len(response.kvs) == 100 and response.header.revision == 101


def test_a_large_range_that_sends_nothing_yet_is_of_the_revision_at_which_it_began(
    lone: LoneMember,
) -> None:
    client, other = Client(lone), Client(lone)
    for n in range(100):
        other.put(b"k%04d" % n, bytes(1000))
    lone.member.state.store.limits = DEFAULT_LIMITS._replace(whole_answer_bytes=10_000)
    stream_id = client.open(KV + "Range")
    body = proto.RangeRequest(key=b"k", range_end=b"l").encode()
    client.h2.send_data(stream_id, framed(body), end_stream=True)
    client.session.receive(client.h2.data_to_send())
    lone.settle()
    assert stream_id in client.session.calls.ready  # It waits: its client may not read now.
    other.ask(KV + "DeleteRange", proto.DeleteRangeRequest(key=b"k", range_end=b"l"))
    other.ask(KV + "Compact", proto.CompactionRequest(revision=102))
    client.pump()
    response = proto.RangeResponse.decode(client.answers[stream_id].message)
    assert (response.header.revision, response.count, len(response.kvs)) == (101, 100, 100)


def test_a_large_range_ends_with_its_client(lone: LoneMember) -> None:
    client, stream_id = large_range(lone)
    streamed = lone.member.reads.streamed
    assert list(streamed.values()) == [1]
    large_range(lone, client)
    _, third = large_range(lone, client)
    assert client.answers[third].status == 8
    second, fourth = large_range(lone)
    assert second.answers[fourth].status is None, "one connection cannot take all places"
    assert list(streamed.values()) == [2, 1]
    _, fifth = large_range(lone, second)
    assert second.answers[fifth].status == 8
    client.h2.reset_stream(stream_id, http2_state.CANCEL)
    client.pump()
    assert list(streamed.values()) == [1, 1]
    client.session.closed()
    second.session.closed()
    assert not streamed and not lone.member.state.store.pinned


def test_a_client_that_stops_reading_a_large_range_does_not_stop_compactions(
    lone: LoneMember,
) -> None:
    """It holds back less than closes its connection."""
    client, stream_id = large_range(lone)
    store, other = lone.member.state.store, Client(lone)
    other.ask(KV + "DeleteRange", proto.DeleteRangeRequest(key=b"k", range_end=b"l"))
    other.ask(KV + "Compact", proto.CompactionRequest(revision=102))
    lone.tick(60.0)
    client.session.tick(lone.now)
    assert store.pinned == [101] and store.compaction_is_held
    client.h2.increment_flow_control_window(1 << 24)
    client.h2.increment_flow_control_window(300_000, stream_id)
    client.pump()
    lone.tick(60.0)
    client.session.tick(lone.now)
    assert store.compaction_is_held, "it reads on, slowly"
    lone.tick(0.1)
    client.session.tick(lone.now)
    assert not store.pinned and not lone.member.reads.streamed
    client.h2.increment_flow_control_window(1 << 24, stream_id)
    client.pump()
    assert client.answers[stream_id].status == errors.UNAVAILABLE
    assert "does not read" in client.answers[stream_id].text
    assert client.ask(KV + "Range", proto.RangeRequest(key=b"k")).status == 0


def test_one_connection_cannot_take_all_places_of_hashes(lone: LoneMember) -> None:
    store = lone.member.state.store
    store.limits = store.limits._replace(max_background_reads=2)
    many, other = Client(lone), Client(lone)
    body = framed(proto.HashKVRequest(of_members=True).encode())
    for _ in range(2):  # The places are free again.
        asked = []
        for client in (many, many, many, other, other):
            stream_id = client.open("/etcdserverpb.Maintenance/HashKV")
            client.h2.send_data(stream_id, body, end_stream=True)
            client.session.receive(client.h2.data_to_send())
            asked.append((client, stream_id))
        many.pump()
        other.pump()
        statuses = [client.answers[stream_id].status for client, stream_id in asked]
        assert statuses == [0, 0, errors.RESOURCE_EXHAUSTED, 0, errors.RESOURCE_EXHAUSTED]


def test_other_requests_are_answered_beside_a_large_range(lone: LoneMember) -> None:
    client, _ = large_range(lone)
    client.h2.increment_flow_control_window(1 << 20)
    client.pump()
    assert client.put(b"other").status == 0


# --- Health and reflection -------------------------------------------------------------------


def test_health(client: Client) -> None:
    assert client.ask(HEALTH + "Check", b"").message == b"\x08\x01"
    unknown = client.ask(HEALTH + "Check", b"\x0a\x03xyz")
    assert (unknown.status, unknown.text) == (errors.NOT_FOUND, "unknown service")
    assert client.ask(HEALTH + "Watch", b"\x0a\x03xyz").messages == [b"\x08\x03"]
    assert client.ask(HEALTH + "Check", b"\x0a\x09x").status == errors.INTERNAL
    stream_id = client.open(HEALTH + "Watch")
    client.h2.send_data(stream_id, framed(b""), end_stream=True)
    client.pump()
    client.lone.member.raft.leader = 0
    for _ in range(3):
        client.session.tick(1.0)
        client.pump()
    client.lone.member.raft.leader = 7
    client.session.tick(2.0)
    client.pump()
    answer = client.answers[stream_id]
    assert answer.messages == [b"\x08\x01", b"\x08\x02", b"\x08\x01"] and not answer.is_ended


def test_the_descriptors_are_those_of_the_schema() -> None:
    pool = descriptor_pool.DescriptorPool()
    for data in reflection.files().values():
        pool.Add(descriptor_pb2.FileDescriptorProto.FromString(data))
    for method in methods.METHODS.values():
        if not method.service.startswith("etcdlite"):
            service = pool.FindServiceByName(method.service)
            described = service.methods_by_name[method.name]
            assert described.input_type.name == method.request.NAME
            assert described.output_type.name == method.response.NAME
            kinds = descriptor_pb2.MethodDescriptorProto()
            described.CopyToProto(kinds)
            assert kinds.client_streaming == method.client_stream
            assert kinds.server_streaming == method.server_stream
    compare = pool.FindMessageTypeByName("etcdserverpb.Compare")
    assert [f.name for f in compare.oneofs_by_name["target_union"].fields] == [
        "version", "create_revision", "mod_revision", "value", "lease",
    ]  # fmt: skip
    assert compare.fields_by_name["result"].enum_type.full_name.endswith("Compare.CompareResult")
    assert pool.FindServiceByName("grpc.health.v1.Health").methods_by_name["Watch"]


@pytest.mark.parametrize("service", reflection.SERVICES)
def test_reflection(client: Client, service: str) -> None:
    def ask(stream_id: int, request: bytes) -> dict[int, Any]:
        client.h2.send_data(stream_id, framed(request))
        client.pump()
        return dict(fields(client.answers[stream_id].messages[-1]))

    stream_id = client.open(f"/{service}/ServerReflectionInfo")
    listed = ask(stream_id, b"\x3a\x01*")
    names = [dict(fields(item))[1].decode() for _, item in fields(listed[6])]
    assert "etcdserverpb.KV" in names and "grpc.health.v1.Health" in names and service in names
    assert set(names) >= {path.split(b"/")[1].decode() for path in ROUTES}
    symbol = b"etcdserverpb.KV.Put"
    found = ask(stream_id, bytes((0x22, len(symbol))) + symbol)
    parts = [descriptor_pb2.FileDescriptorProto.FromString(d) for _, d in fields(found[4])]
    assert parts[0].name == "rpc.proto"
    assert {p.name for p in parts} == {"rpc.proto", "kv.proto", "auth.proto"}
    assert 4 in ask(stream_id, b"\x1a\x08kv.proto")
    missing = ask(stream_id, b"\x22\x02no")
    assert dict(fields(missing[7]))[1] == errors.NOT_FOUND
    assert 7 in ask(stream_id, b"\x2a\x02\x10\x01") and 7 in ask(stream_id, b"")
    client.h2.end_stream(stream_id)
    client.pump()
    assert client.answers[stream_id].status == 0


# --- Fuzz ------------------------------------------------------------------------------------


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([path.decode() for path in ROUTES]),
            st.lists(st.binary(max_size=30) | st.just(framed(b"\x0a\x01k")), max_size=4),
            st.sampled_from([None, "1n", "1S"]),
            st.booleans(),
        ),
        max_size=8,
    )
)
def test_any_bodies_are_survived(lone: LoneMember, requests: list[Any]) -> None:
    client = Client(lone)
    for path, pieces, timeout, reset in requests:
        stream_id = client.open(path, grpc_timeout=timeout or "")
        client.pump()
        for piece in pieces:
            if not client.answers[stream_id].is_ended:
                client.h2.send_data(stream_id, piece)
                client.pump()
        if not client.answers[stream_id].is_ended:
            if reset:
                client.h2.reset_stream(stream_id, http2_state.CANCEL)
            else:
                client.h2.end_stream(stream_id)
            client.pump()
        lone.now += 0.1
        client.session.tick(lone.now)
        client.pump()
    assert client.goaway is None
    assert all(answer.endings <= 1 for answer in client.answers.values())
    client.session.closed()
    lone.settle()
    assert client.session._partial_bytes == 0
    assert lone.member.hub.streams == 0


# --- grpcio ----------------------------------------------------------------------------------


class Loop:
    """The least that serves sessions over sockets: a thread, a selector, a member."""

    def __init__(self, lone: LoneMember) -> None:
        self.lone = lone
        lone.now = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sessions: dict[socket.socket, GrpcSession] = {}
        self._stops = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stops = True
        self._thread.join()
        for sock in (*self._sessions, self._listener):
            sock.close()

    def _run(self) -> None:
        while not self._stops:
            for key, _ in self._selector.select(0.01):
                if key.data is None:
                    sock, _ = self._listener.accept()
                    session = GrpcSession(self.lone.member, lambda _: None)
                    self._sessions[sock] = session
                    self._selector.register(sock, selectors.EVENT_READ, session)
                else:
                    self._receive(key.fileobj, key.data)
            self.lone.now = time.monotonic()
            self.lone.tick(0.0)
            for sock, session in list(self._sessions.items()):
                session.tick(self.lone.now)
                self._send(sock, session)

    def _receive(self, sock: Any, session: GrpcSession) -> None:
        try:
            data = sock.recv(1 << 16)
        except OSError:
            data = b""
        if data:
            session.receive(data)
            return
        self._selector.unregister(sock)
        session.closed()
        sock.close()
        del self._sessions[sock]

    def _send(self, sock: socket.socket, session: GrpcSession) -> None:
        while True:
            if session.has_more:
                session.produce()
            data = take_output(session)
            if not data:
                return
            sock.settimeout(60)
            sock.sendall(data)
            sock.setblocking(False)


@pytest.fixture
def channel(lone: LoneMember) -> Iterator[Any]:
    loop = Loop(lone)
    with grpcio.insecure_channel(loop.address) as channel:
        yield channel
    loop.stop()


def method(channel: Any, full: str, kind: str = "unary_unary") -> Callable[..., Any]:
    known = methods.METHOD_BY_NAME[full]
    return getattr(channel, kind)(
        known.grpc_path,
        request_serializer=lambda m: m.encode(),
        response_deserializer=known.response.decode,
    )


def test_grpcio_puts_ranges_and_is_told_errors(channel: Any) -> None:
    put = method(channel, "KV.Put")
    assert put(proto.PutRequest(key=b"k", value=b"v"), timeout=60).header.revision == 2
    calls = [
        put.future(proto.PutRequest(key=b"k%d" % n, value=bytes(n * 100)), timeout=60)  # type: ignore[attr-defined]
        for n in range(200)
    ]
    assert sorted(c.result().header.revision for c in calls) == list(range(3, 203))
    response = method(channel, "KV.Range")(proto.RangeRequest(key=b"k", range_end=b"l"), timeout=60)
    assert response.count == 201
    with pytest.raises(grpcio.RpcError) as failure:
        put(proto.PutRequest(), timeout=60)
    assert failure.value.code() == grpcio.StatusCode.INVALID_ARGUMENT
    assert failure.value.details() == "etcdserver: key is not provided"


def test_grpcio_sends_gzip_and_large_messages(channel: Any) -> None:
    value = bytes(1_500_000)
    method(channel, "KV.Put")(
        proto.PutRequest(key=b"k", value=value), timeout=60, compression=grpcio.Compression.Gzip
    )
    method(channel, "KV.Put")(proto.PutRequest(key=b"l", value=value), timeout=60)
    response = method(channel, "KV.Range")(proto.RangeRequest(key=b"k", range_end=b"m"), timeout=60)
    assert [kv.value for kv in response.kvs] == [value, value]


def test_grpcio_watches_keeps_leases_alive_and_streams(channel: Any, lone: LoneMember) -> None:
    requests = iter([proto.WatchRequest(create_request=proto.WatchCreateRequest(key=b"k"))])
    going_on = threading.Event()

    def messages() -> Iterator[Any]:
        yield from requests
        going_on.wait(60)

    watch = method(channel, "Watch.Watch", "stream_stream")(messages(), timeout=60)
    assert next(watch).created
    method(channel, "KV.Put")(proto.PutRequest(key=b"k", value=b"seen"), timeout=60)
    assert next(watch).events[0].kv.value == b"seen"
    going_on.set()  # The client closes its side.
    method(channel, "KV.Put")(proto.PutRequest(key=b"k", value=b"still seen"), timeout=60)
    assert next(watch).events[0].kv.value == b"still seen"
    watch.cancel()
    watch = method(channel, "Watch.Watch", "stream_stream")(
        iter([proto.WatchRequest(create_request=proto.WatchCreateRequest(key=b"k"))]), timeout=60
    )
    watch.cancel()
    grant = method(channel, "Lease.LeaseGrant")(proto.LeaseGrantRequest(TTL=60), timeout=60)
    renewed = method(channel, "Lease.LeaseKeepAlive", "stream_stream")(
        iter([proto.LeaseKeepAliveRequest(ID=grant.ID)] * 3), timeout=60
    )
    assert [r.TTL for r in renewed] == [60] * 3
    parts = list(
        method(channel, "Maintenance.Snapshot", "unary_stream")(proto.SnapshotRequest(), timeout=60)
    )
    assert parts[-1].remaining_bytes == 0
    streamed = list(
        method(channel, "KV.RangeStream", "unary_stream")(proto.RangeRequest(key=b"k"), timeout=60)
    )
    assert streamed[-1].range_response.count == 1
    wait_until(lambda: lone.member.hub.streams == 0, "the watch streams are closed")


def test_grpcio_gives_a_request_up_at_its_deadline(channel: Any) -> None:
    watch = method(channel, "Watch.Watch", "stream_stream")(iter([]), timeout=60)
    assert list(watch) == []
    waiting = threading.Event()

    def nothing() -> Iterator[Any]:
        waiting.wait(60)
        yield from ()

    watch = method(channel, "Watch.Watch", "stream_stream")(nothing(), timeout=0.3)
    with pytest.raises(grpcio.RpcError) as failure:
        next(watch)
    waiting.set()
    assert failure.value.code() == grpcio.StatusCode.DEADLINE_EXCEEDED


def test_messages_that_unpack_to_much_are_noise(client: Client) -> None:
    bomb = framed(gzip.compress(proto.PutRequest(key=b"k", value=bytes(1 << 20)).encode()), 1)
    for _ in range(1000):
        if client.session.is_closing:
            break
        stream_id = client.open(KV + "Range", grpc_encoding="gzip")
        client.h2.send_data(stream_id, bomb, end_stream=True)
        for piece in [client.h2.data_to_send()]:
            client.session.receive(piece)
    assert client.session.is_closing
