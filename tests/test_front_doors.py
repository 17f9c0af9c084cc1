"""Fuzzing, seeded, of the protocols of clients over one member: gRPC, JSON over HTTP/1.1 and over
HTTP/2, and the native protocol. `test_fuzz.py` does more with the native one.

Whatever a client sends, in whatever pieces, and whenever it leaves: it ends at most its own
connection, all that was counted for it is given back, and the next client is served.
`-m long` does more of it.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rigs import lone_member
from rigs.lone_member import LoneMember
from rigs.store_rig import SMALL_LIMITS
from rigs.users import User, add_users
from rigs.wire import take_output
from test_fuzz import KEYS, ROUNDS, chunks, message, mutated, random_frames

from etcdlite import datadir, log, methods, proto
from etcdlite.frames import HANDSHAKE, MAGIC
from etcdlite.session import Session
from etcdlite.wire import gateway, http2, locks
from etcdlite.wire.carried import CarryingSession
from etcdlite.wire.grpc import PREFIX, GrpcSession
from etcdlite.wire.grpc_request import ROUTES
from etcdlite.wire.hpack import pack
from etcdlite.wire.http import HttpSession, StreamSession
from etcdlite.wire.http2 import END_HEADERS, END_STREAM, PADDED, PREFACE, frame
from etcdlite.wire.native import NativeSession
from etcdlite.wire.site import Site

CONNECTIONS = 12
MAX_STEPS = 6000
"""A session that has more to produce after this many steps does not come to an end."""

EVERYTHING = {"key": b"\0", "range_end": b"\0"}
BY_GRPC_PATH = {method.grpc_path: method for method in methods.METHODS.values()}
OFTEN = [
    methods.METHOD_BY_NAME[name]
    for name in (
        "KV.Range", "KV.RangeStream", "KV.Put", "KV.Txn", "Watch.Watch", "Lease.LeaseKeepAlive",
        "Maintenance.Snapshot", "Lock.Lock", "Election.Observe",
    )
]  # fmt: skip
GRPC_PATHS = [*(path.decode() for path in ROUTES), *(method.grpc_path for method in OFTEN * 6)]
JSON_PATHS = [*gateway.METHODS, *(path for method in OFTEN * 6 for path in method.http_paths)]
PLAIN_PATHS = (
    "/", "/health", "/health?serializable=true&exclude", "/livez?verbose", "/readyz", "/version",
    "/readyz/linearizable_read", "/metrics", "/debug/vars", "/x", "*", "/%ff%00", "//", "?",
    "http://[::1/health", "https://u:p@[::1]:9/metrics", "localhost:2379", "/v3/kv/range",
)  # fmt: skip
VERBS = ("GET", "GET", "HEAD", "POST", "OPTIONS", "PUT", "CONNECT", "PRI", "TRACE", "get")
FIELDS = (
    ("expect", "100-continue"), ("origin", "http://x"), ("content-type", "text/plain"),
    ("grpc-timeout", "1n"), ("grpc-timeout", "1S"), ("grpc-timeout", "\xe9"), ("token", ""),
    ("grpc-metadata-token", ""), ("authorization", "x"), ("grpc-metadata-hasleader", "true"),
    ("hasleader", "true"), ("grpc-metadata-client-api-version", "\xff"), ("te", "trailers"),
    ("cookie", "a"), ("cookie", "b"), ("x", "\xff" * 200), ("x", "y" * 3000),
    ("content-length", "9" * 5000), ("content-length", "5"), ("host", "[::1"),
    ("client-api-version", "\xff"), ("grpc-encoding", "z"),
)  # fmt: skip
FIELDS_OF_HTTP_1 = (
    ("transfer-encoding", "gzip, chunked"), ("connection", "close"), ("upgrade", "h2c"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet_log():
    log.configure("fatal", outputs=())
    yield
    log.configure()


Maker = Callable[[], bytes]


class Client:
    """Makes what one client sends. `token` logs it in."""

    def __init__(self, rng: random.Random, token: str) -> None:
        self.rng = rng
        self.token = token

    def request(self, method: methods.Method) -> Any:
        rng = self.rng
        request = message(rng, method.request)
        if method.full == "Cluster.MemberAdd":
            request.isLearner = True  # A second voter that does not exist would take the quorum.
        elif method.full.startswith("KV.Range") and rng.random() < 0.5:
            request = method.request(**EVERYTHING)
        elif method.full == "Watch.Watch" and rng.random() < 0.5:
            create = proto.WatchCreateRequest(**EVERYTHING, start_revision=rng.randrange(3))
            request = method.request(create_request=create)
        return request

    def fields(self, *others: tuple[str, str]) -> list[tuple[str, str]]:
        found = self.rng.choices((*FIELDS, *others), k=self.rng.choice((0, 0, 0, 1, 3)))
        if self.token and self.rng.random() < 0.9:
            found.insert(0, ("authorization", self.token))
        return found

    def json(self, path: str) -> bytes:
        method = gateway.METHODS.get(path)
        if method is None:
            return self.rng.choice((b"", b"{}", b"["))
        body = json.dumps(self._object(self.request(method))).encode()
        return mutated(self.rng, body) if self.rng.random() < 0.1 else body

    def _object(self, request: proto.Message) -> dict[str, Any]:
        found = {}
        for field, value in request.present():
            values = [self._value(one) for one in (value if field.repeated else [value])]
            found[field.name] = values if field.repeated else values[0]
            if self.rng.random() < 0.02:
                found[field.name] = self.rng.choice((None, [], {}, 1e999, True, "\ud800", 10**25))
        return found

    def _value(self, value: Any) -> Any:
        if isinstance(value, proto.Message):
            return self._object(value)
        return base64.b64encode(value).decode() if isinstance(value, bytes) else value


class HttpClient(Client):
    def begin(self) -> bytes:
        return b""

    def step(self) -> bytes:
        rng = self.rng
        is_json = rng.random() < 0.6
        verb, path = rng.choice(VERBS), rng.choice(PLAIN_PATHS)
        body = b""
        if is_json:
            verb, path = "POST", rng.choice(JSON_PATHS)
            body = self.json(path)
        fields = [("Host", rng.choice(("localhost", "127.0.0.1:2379", "", "\xff")))]
        fields += self.fields(*FIELDS_OF_HTTP_1)
        if body and rng.random() < 0.4:
            fields.append(("Transfer-Encoding", "chunked"))
            pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in chunks(rng, body)]
            body = b"".join(pieces) + b"0\r\n\r\n"
        elif body:
            fields.append(("Content-Length", str(len(body) + rng.choice((0, 0, 0, 0, 1)))))
        version = rng.choice(("1.1",) * 12 + ("1.0", "2.0", "0.9"))
        lines = [f"{verb} {path} HTTP/{version}", *(f"{name}: {value}" for name, value in fields)]
        data = "\r\n".join((*lines, "\r\n")).encode("latin-1") + body
        return mutated(rng, data) if rng.random() < 0.03 else data


class NativeClient(Client):
    def begin(self) -> bytes:
        return HANDSHAKE.pack(MAGIC, 1, 1)

    def step(self) -> bytes:
        return random_frames(self.rng, self.rng.choice((1, 3, 10)))


class GrpcClient(Client):
    carries_http = False

    def begin(self) -> bytes:
        self._next_id = 1
        self._open: list[tuple[int, str, bool]] = []
        window = struct.pack(">HI", http2.INITIAL_WINDOW_SIZE, self.rng.choice((1, 300, 65535)))
        preface = PREFACE if self.rng.random() < 0.97 else mutated(self.rng, PREFACE)
        return preface + frame(http2.SETTINGS, 0, 0, window)

    def step(self) -> bytes:
        return b"".join(self._step() for _ in range(self.rng.choice((1, 1, 3, 20))))

    def _step(self) -> bytes:
        rng, choice = self.rng, self.rng.random()
        if choice < 0.35 or not self._open:
            return self._headers()
        if choice < 0.8:
            return self._data()
        stream_id = rng.randrange(1, self._next_id + 2) | 1
        number = struct.pack(">I", rng.choice((1, 100, 65535, 10**6)))
        return rng.choice(
            (
                frame(http2.RST_STREAM, 0, stream_id, number),
                frame(http2.RST_STREAM, 0, stream_id, number),
                frame(http2.WINDOW_UPDATE, 0, rng.choice((0, stream_id)), number),
                frame(http2.WINDOW_UPDATE, 0, rng.choice((0, stream_id)), number),
                frame(http2.SETTINGS, 0, 0, struct.pack(">H", rng.choice((1, 3, 4))) + number),
                frame(http2.PING, 0, 0, bytes(8)),
                frame(http2.PRIORITY, 0, stream_id, bytes(5)),
                frame(http2.DATA, 0, stream_id),
                frame(rng.randrange(10, 256), 0, stream_id, number),
            )
        )

    def _headers(self) -> bytes:
        rng = self.rng
        is_http = self.carries_http and rng.random() < 0.5
        is_json = is_http and rng.random() < 0.5
        path = rng.choice(JSON_PATHS if is_json else PLAIN_PATHS if is_http else GRPC_PATHS)
        verb = rng.choice(VERBS) if is_http and not is_json else "POST"
        fields = [(":method", verb), (":scheme", "https"), (":path", path), (":authority", "x")]
        if not is_http:
            fields += [("content-type", "application/grpc"), ("te", "trailers")]
            fields += rng.choice(([], [], [("grpc-encoding", "gzip")]))
        fields += self.fields()
        if rng.random() < 0.01:
            rng.shuffle(fields)
        block = pack((name.encode(), value.encode("latin-1")) for name, value in fields)
        if rng.random() < 0.02:
            block = mutated(rng, block)
        stream_id, self._next_id = self._next_id, self._next_id + rng.choice((2, 2, 2, 4))
        is_ended = rng.random() < (0.6 if verb != "POST" else 0.05)
        if not is_ended:
            self._open.append((stream_id, path, is_http))
        cut = rng.randrange(len(block)) if rng.random() < 0.1 else len(block)
        flags = END_STREAM * is_ended | END_HEADERS * (cut == len(block))
        data = frame(http2.HEADERS, flags, stream_id, block[:cut])
        if cut < len(block):
            data += frame(http2.CONTINUATION, END_HEADERS, stream_id, block[cut:])
        return data

    def _data(self) -> bytes:
        rng = self.rng
        at = rng.randrange(len(self._open))
        stream_id, path, is_http = self._open[at]
        body = self.json(path) if is_http else self._message(path)
        is_ended = rng.random() < 0.5
        if is_ended:
            del self._open[at]
        pieces = list(chunks(rng, body[:40_000])) or [b""]
        frames = [frame(http2.DATA, 0, stream_id, piece[:16_384]) for piece in pieces[:-1]]
        last, flags = pieces[-1][:16_000], END_STREAM * is_ended
        if rng.random() < 0.1:
            last, flags = b"\0" + last, flags | PADDED
        frames.append(frame(http2.DATA, flags, stream_id, last))
        if is_ended and rng.random() < 0.1:
            frames.append(frame(http2.RST_STREAM, 0, stream_id, bytes(4)))
        return b"".join(frames)

    def _message(self, path: str) -> bytes:
        rng = self.rng
        method = BY_GRPC_PATH.get(path)
        body = self.request(method).encode() if method else rng.choice((b"", b":\0", b"\x0a\1x"))
        if rng.random() < 0.1:
            body = mutated(rng, body)
        packed = rng.choice((0,) * 20 + (1, 1, 2))
        if packed == 1:
            body = gzip.compress(body)
        size = len(body) if rng.random() < 0.97 else rng.choice((0, 10**6, 2**32 - 1))
        return (PREFIX.pack(packed, size) + body) * rng.choice((1,) * 10 + (3, 100))


class MixedClient(GrpcClient):
    carries_http = True


KINDS = (NativeClient, GrpcClient, MixedClient, MixedClient, HttpClient, HttpClient)


def session_of(kind: type[Client], lone: LoneMember, site: Site) -> Any:
    if kind is NativeClient:
        return NativeSession(lone.member, lambda _: None)
    if kind is GrpcClient:
        return GrpcSession(lone.member, lambda _: None)
    if kind is MixedClient:
        make = functools.partial(StreamSession, site=site, is_local=False)
        return CarryingSession(lone.member, lambda _: None, make_http=make)
    return HttpSession(lone.member, lambda _: None, site)


def talk(client: Any, session: Session, lone: LoneMember) -> None:
    """Let a client send for a while; it reads its answers often, seldom or never."""
    rng, reads = client.rng, client.rng.choice((1, 0.5, 0.05))
    data = client.begin()
    for _ in range(rng.choice((5, 30, 60))):
        data += client.step()
        for piece in chunks(rng, data):
            if session.is_closing:
                return
            if session.is_full or session.outbox.unsent_bytes > session.outbox.high_water_bytes:
                take_output(session)
            else:
                session.receive(piece)
            if rng.random() < 0.3:
                lone.settle()
            if rng.random() < 0.5 and session.has_more:
                session.produce()
            if rng.random() < reads:
                take_output(session)
        data = b""
        if rng.random() < 0.1:
            lone.tick(rng.choice((0.1, 5.0, 70.0)))
            session.tick(lone.now)
        assert session.kept_bytes >= 0 and session.outbox.held_bytes >= 0


def produce_all(session: Session, lone: LoneMember, reads: bool) -> None:
    for _ in range(MAX_STEPS):
        lone.settle()
        got = take_output(session) if reads else b""
        if session.has_more:
            session.produce()
        elif not got:
            return
    raise AssertionError("it has always more to produce")


def counted(lone: LoneMember) -> dict[str, int]:
    """What a member counts of its clients."""
    member = lone.member
    reads = member.reads
    return {
        "watch streams": member.hub.streams,
        "watches": member.hub.watches,
        "backups": member.backups_under_way,
        "lines of reads": len(reads._lines),
        "slots of reads": reads._slots_taken,
        "waiting reads": reads._waiting_count,
        "bytes of reads": reads._large_bytes,
        "hashes": len(reads.background),
        "streamed answers": len(reads.streamed),
        "queues": len(locks._shared(member).queues),
    }


def prepared(path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> LoneMember:
    """A member with some keys, mostly with small limits."""
    limits = SMALL_LIMITS._replace(
        whole_answer_bytes=rng.choice((2000, 20_000)),
        high_water_bytes=rng.choice((2000, 50_000, 1 << 20)),
        max_streamed_answers=2,
    )
    if rng.random() < 0.6:
        small = functools.partial(datadir.open_member, limits=limits)
        monkeypatch.setattr(lone_member.datadir, "open_member", small)
    lone = LoneMember(path, seed=rng.randrange(1000), max_request_bytes=100_000)
    lone.elect()
    for number in range(rng.choice((3, 30))):
        value = rng.randbytes(rng.choice((1, 500, 20_000)))
        User(lone).ask("KV.Put", key=rng.choice(KEYS) + b"%d" % number, value=value)
    User(lone).ask("Lease.LeaseGrant", ID=1, TTL=100)
    return lone


@ROUNDS
def test_whatever_clients_send_they_leave_nothing_behind(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    lone = prepared(tmp_path / "member", rng, monkeypatch)
    token = ""
    if rng.random() < 0.3:
        add_users(lone)
        token = User(lone).log_in(rng.choice(("root", "ann"))).current_token
    site = Site(lone.member, metrics=lambda: b"etcdlite_up 1\n")
    for _ in range(CONNECTIONS):
        kind = rng.choice(KINDS)
        session = session_of(kind, lone, site)
        talk(kind(rng, token), session, lone)
        if rng.random() < 0.3:  # The server stops.
            session.shut_down()
        for reads in rng.choice(((), (True,), (False,), (False, True))):
            produce_all(session, lone, reads)
            session.tick(lone.now)
        session.closed()
        produce_all(session, lone, False)
        for seconds in (1, 61, 1):  # What waits for others times out.
            lone.tick(seconds)
        assert not getattr(session, "streams", None) and not len(session.calls)
        assert not session.calls.quota.watches and not session.calls.quota.sends_snapshot
        assert not any(counted(lone).values()), f"{kind.__name__} left {counted(lone)}"
        honest = HttpSession(lone.member, lambda _: None, Site(lone.member))
        honest.receive(b"GET /health?serializable=true HTTP/1.1\r\nHost: x\r\n\r\n")
        lone.settle()
        assert take_output(honest).startswith(b"HTTP/1.1 ")
        honest.closed()
    lone.close()
