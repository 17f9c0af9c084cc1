"""Fuzzing, seeded, of clients of all protocols at once: gRPC, HTTP/2 with requests of both kinds,
JSON over HTTP/1.1 and native frames, at one member. What they send is mostly well-formed, and comes
in any order and in any pieces. Nothing but answers may come of it, and when the connections are
closed, everything that they took is given back. `-m long` does more of it.
"""

from __future__ import annotations

import base64
import gzip
import json
import random
import struct
from typing import Any

import pytest
from rigs.lone_member import LoneMember, run_logins
from test_fuzz import KEYS, chunks, message, mutated, random_frames

from etcdlite import frames, log, methods, proto
from etcdlite.errors import EtcdError
from etcdlite.proto import MAX_FIELDS
from etcdlite.request import Asked, Waiter
from etcdlite.wire import api, gateway, hpack, http2, locks
from etcdlite.wire.carried import CarryingSession
from etcdlite.wire.grpc import GrpcSession
from etcdlite.wire.grpc_request import ROUTES
from etcdlite.wire.http import HttpSession, StreamSession
from etcdlite.wire.native import NativeSession
from etcdlite.wire.site import Site

ROUNDS = pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.long) for n in range(4, 40))]
)

ACTS = 1000
CONNECTIONS = 4

TIMEOUTS = (b"1S", b"10m", b"100m", b"1n", b"x", b"00000000S", b"99999999H")
PATHS = (*gateway.METHODS, "/health", "/readyz?verbose", "/metrics", "/version", "/", "/%ff")
SETTINGS = ((4, 0), (4, 1), (4, 65_535), (4, 1 << 30), (5, 16_384), (5, 1 << 20), (1, 0))


@pytest.fixture(autouse=True)
def quiet_log():
    log.configure("fatal", outputs=())
    yield
    log.configure()


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return http2.frame(kind, flags, stream_id, payload)


class Fuzz:
    def __init__(self, lone: LoneMember, seed: int) -> None:
        self.lone = lone
        self.rng = random.Random(seed)
        self.site = Site(lone.member)
        self.tokens = [""]

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def ask(self, full: str, **fields: Any) -> bytes:
        """Carry out a request of the member itself."""
        method = methods.METHOD_BY_NAME[full]
        request = method.request(**fields)
        answers: list[bytes | EtcdError] = []
        body = frames.frame(1, method.number, 0, request.encode())
        handle, _ = api.HANDLERS[method.number]
        handle(self.lone.member, Waiter(Asked(answers.append), 0, method.number, request), body)
        self.work()
        (answer,) = answers
        assert isinstance(answer, bytes), (full, answer)
        return answer

    def work(self) -> None:
        for _ in range(3):
            self.lone.settle()
            run_logins(self.lone.member)

    def enable_auth(self) -> None:
        for user, role in (("root", "root"), ("u", "r")):
            self.ask("Auth.UserAdd", name=user, password=user)
            self.ask("Auth.RoleAdd", name=role)
            self.ask("Auth.UserGrantRole", user=user, role=role)
        perm = proto.Permission(permType=2, key=b"a", range_end=b"c")
        self.ask("Auth.RoleGrantPermission", name="r", perm=perm)
        self.ask("Auth.AuthEnable")
        for user in ("root", "u"):
            answer = self.ask("Auth.Authenticate", name=user, password=user)
            self.tokens += [proto.AuthenticateResponse.decode(answer).token] * 2
        self.tokens.append("bad")

    # What clients send.

    def json(self, cls: Any) -> bytes:
        return json.dumps(self._object(cls, 0)).encode()

    def _object(self, cls: Any, depth: int) -> dict[str, Any]:
        alternatives = [field.name for field in cls.FIELDS if field.oneof]
        chosen = self.rng.choice(alternatives) if alternatives else None
        made: dict[str, Any] = {}
        for field in cls.FIELDS:
            if (field.oneof and field.name != chosen) or self.chance(0.3 + 0.15 * depth):
                continue
            value = self._value(field, depth)
            if field.repeated:
                most = MAX_FIELDS + 1 if field.kind == "enum" else 20
                value = [value] * self.rng.choice((0, 1, 3, most))
            made[self.rng.choice((field.name, field.json_name))] = value
        return made

    def _value(self, field: proto.Field, depth: int) -> Any:
        rng = self.rng
        if self.chance(0.03):
            return rng.choice((None, True, -1, 1e308, "5e3", "", "\ud800", [], {}, 2**64))
        match field.kind:
            case "message":
                return self._object(proto.MESSAGES[field.type_name], depth + 1) if depth < 4 else {}
            case "bytes":
                return base64.b64encode(rng.choice(KEYS)).decode()
            case "string":
                return rng.choice(("", "x", "root", "http://localhost:2380"))
            case "bool":
                return self.chance(0.5)
            case "enum":
                return rng.choice((*proto.ENUMS[field.type_name], 0, 1, 3, 99))
            case _:
                return rng.choice((0, 1, 2, "3", 7, 1000, -1, str(2**63 - 1)))

    def http_1(self) -> bytes:
        path = self.rng.choice(PATHS)
        method = gateway.METHODS.get(path)
        body = self.json(method.request) if method else b""
        head = [b"%b %b HTTP/1.1" % (b"POST" if method else b"GET", path.encode()), b"host: x"]
        if token := self.rng.choice(self.tokens):
            head.append(b"authorization: " + token.encode())
        if self.chance(0.3):
            pieces = (b"%x\r\n%b\r\n" % (len(piece), piece) for piece in chunks(self.rng, body))
            body = b"".join(pieces) + b"0\r\n\r\n"
            head.append(b"transfer-encoding: chunked")
        else:
            head.append(b"content-length: %d" % len(body))
        sent = b"\r\n".join(head) + b"\r\n\r\n" + body
        return mutated(self.rng, sent) if self.chance(0.03) else sent

    def grpc_request(self) -> tuple[hpack.Headers, bytes]:
        rng = self.rng
        path, route = rng.choice(list(ROUTES.items()))
        method = methods.METHODS.get(route.number)
        body = b""
        for _ in range(rng.choice((1, 1, 0, 2, 5, 40)) if route.is_client_stream else 1):
            one = message(rng, method.request).encode() if method else rng.randbytes(9)
            packed = self.chance(0.1)
            one = gzip.compress(one, mtime=0) if packed else one
            body += struct.pack(">BI", packed, len(one)) + one
        headers = [
            *(
                (b":method", b"POST"),
                (b":scheme", b"http"),
                (b":path", path),
                (b":authority", b"x"),
            ),
            *((b"content-type", b"application/grpc"), (b"grpc-encoding", b"gzip")),
        ]
        return headers, mutated(rng, body) if body and self.chance(0.1) else body

    def http_request(self) -> tuple[hpack.Headers, bytes]:
        path = self.rng.choice(PATHS)
        method = gateway.METHODS.get(path)
        body = self.json(method.request) if method else b""
        verb = self.rng.choice((b"POST", b"GET", b"HEAD", b"CONNECT") if not method else (b"POST",))
        headers = [
            *((b":method", verb), (b":scheme", b"https"), (b":authority", b"x")),
            (b":path", path.encode()),
        ]
        if self.chance(0.3):
            headers.append((b"content-length", b"%d" % len(body)))
        return headers, body


class Client:
    """A connection, with the bytes in the fuzz's hands."""

    def __init__(self, fuzz: Fuzz) -> None:
        self.fuzz = fuzz
        self.kind = fuzz.rng.choice(("carrying", "carrying", "grpc", "native", "http"))
        member = fuzz.lone.member
        self.session: Any
        limits = {"max_streams": fuzz.rng.choice((2, 20, 65_536))}
        if self.kind == "carrying":
            make_http = lambda call: StreamSession(call, fuzz.site, True)  # noqa: E731
            self.session = CarryingSession(member, _ignore, make_http, **limits)
        elif self.kind == "grpc":
            self.session = GrpcSession(member, _ignore, **limits)
        elif self.kind == "native":
            self.session = NativeSession(member, _ignore)
        else:
            self.session = HttpSession(member, _ignore, fuzz.site)
        self.speaks_http2 = self.kind in ("carrying", "grpc")
        self.next_id = 1
        self.opened = [1]
        if self.speaks_http2:
            self.send(http2.PREFACE + frame(http2.SETTINGS, 0, 0))
        elif self.kind == "native":
            self.send(frames.HANDSHAKE.pack(frames.MAGIC, 1, 1))

    def send(self, data: bytes) -> None:
        for piece in chunks(self.fuzz.rng, data):
            if not self.session.is_closing:
                self.session.receive(piece)

    def act(self) -> None:
        fuzz, rng = self.fuzz, self.fuzz.rng
        if self.kind == "native":
            self.send(random_frames(rng, rng.choice((1, 5))))
        elif self.kind == "http":
            self.send(fuzz.http_1())
        elif fuzz.chance(0.5):
            self.request()
        else:
            stream_id = rng.choice(self.opened[-8:])
            number = struct.pack(">I", rng.choice((1, 10, 1000, 65_535, 1 << 20)))
            self.send(
                rng.choice(
                    (
                        frame(http2.RST_STREAM, 0, stream_id, bytes(4)),
                        frame(http2.DATA, rng.choice((0, 1)), stream_id, rng.randbytes(20)),
                        frame(http2.HEADERS, 5, stream_id, hpack.pack([(b"x", b"trailer")])),
                        frame(http2.WINDOW_UPDATE, 0, rng.choice((0, stream_id)), number),
                        frame(http2.SETTINGS, 0, 0, struct.pack(">HI", *rng.choice(SETTINGS))),
                        frame(http2.PING, 0, 0, bytes(8)),
                        frame(rng.randrange(12), rng.randrange(256), stream_id, rng.randbytes(5)),
                    )
                )
            )

    def request(self) -> None:
        fuzz, rng = self.fuzz, self.fuzz.rng
        is_http = self.kind == "carrying" and fuzz.chance(0.3)
        headers, body = fuzz.http_request() if is_http else fuzz.grpc_request()
        if token := rng.choice(fuzz.tokens):
            headers.append((b"authorization", token.encode()))
        if fuzz.chance(0.3):
            headers.append((b"grpc-timeout", rng.choice(TIMEOUTS)))
        if fuzz.chance(0.1):
            headers.append(
                rng.choice(((b"hasleader", b"true"), (b"x", b"y" * 3000), (b"te", b"x")))
            )
        stream_id = self.next_id
        self.next_id += rng.choice((2, 2, 2, 6))
        self.opened.append(stream_id)
        ends = fuzz.chance(0.7)
        sent = frame(http2.HEADERS, 4 | (ends and not body), stream_id, hpack.pack(headers))
        pieces = [body[at : at + 5000] for at in range(0, len(body), 5000)]
        for number, piece in enumerate(pieces, 1):
            sent += frame(http2.DATA, ends and number == len(pieces), stream_id, piece)
        self.send(sent)

    def pump(self) -> None:
        """Read some of the output, and let the session go on."""
        session, rng = self.session, self.fuzz.rng
        outbox = session.outbox
        was_blocked = session.is_blocked
        while self.fuzz.chance(0.8) and outbox.unsent_bytes and not session.is_aborted:
            size = len(outbox.take())
            outbox.sent(size if self.fuzz.chance(0.8) else rng.randrange(size + 1))
        if was_blocked and not session.is_blocked:
            session.unblocked()
        for _ in range(rng.choice((0, 1, 5))):
            if session.has_more:
                session.produce()
        if self.speaks_http2 and not session.is_closing:
            self.check_counts()

    def check_counts(self) -> None:
        session = self.session
        streams = [stream for stream in session.streams.values() if stream is not http2.GHOST]
        kept = sum(len(stream.partial or b"") + len(stream.message or b"") for stream in streams)
        if self.kind == "carrying":
            kept += sum(call._counted_bytes for call in session.carried.values())
        assert session._partial_bytes == kept
        assert session.outbox.held_bytes == sum(stream.held_bytes for stream in streams)
        assert session._deadlines.keys() | session._need_leader <= session.streams.keys()

    @property
    def is_over(self) -> bool:
        session = self.session
        return session.is_aborted or (session.is_closing and not session.outbox.unsent_bytes)

    def close(self) -> None:
        session = self.session
        session.closed()
        while session.has_more:
            session.produce()
        self.fuzz.work()
        assert not len(session.calls)
        if self.speaks_http2:
            assert not session.streams and not session._leaving


def _ignore(session: Any) -> None:
    """The `on_output` of the sessions."""


def check_all_is_given_back(fuzz: Fuzz) -> None:
    member = fuzz.lone.member
    for _ in range(3):
        fuzz.work()
        fuzz.lone.tick(10.0)
    while member.hub.has_work:
        member.hub.run(lambda: False)
    assert (member.hub.streams, member.hub.watches, member.hub.key_bytes) == (0, 0, 0)
    assert member.backups_under_way == 0
    assert not member.reads.streamed and not member.reads._lines and not member.access._rechecks
    assert not member.logins.are_under_way
    assert not locks._shared(member).queues and not locks._shared(member).places


@ROUNDS
def test_what_clients_of_all_protocols_take_is_given_back(tmp_path, seed):
    lone = LoneMember(tmp_path, seed=seed, max_request_bytes=100_000)
    fuzz = Fuzz(lone, seed)
    if seed % 2:
        fuzz.enable_auth()
    clients: list[Client] = []
    for act in range(1, ACTS + 1):
        if len(clients) < CONNECTIONS:
            clients.append(Client(fuzz))
        fuzz.rng.choice(clients).act()
        for client in clients:
            client.pump()
        if fuzz.chance(0.7):
            fuzz.work()
        if fuzz.chance(0.05):
            lone.tick(fuzz.rng.choice((0.01, 1.0, 30.0)))
            for client in clients:
                client.session.tick(lone.now)
        for client in list(clients):
            if client.is_over or fuzz.chance(0.01) or act == ACTS:
                clients.remove(client)
                client.close()
        if not clients:
            check_all_is_given_back(fuzz)
            lone.member.state.alarms._active.clear()  # Otherwise nothing is written any more.
    lone.close()
