"""The channel of a shared secret between members: what sessions and founding do with it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_peer import Caller

from etcdlite import bootstrap, frames, proto, secret_file
from etcdlite.bootstrap import NoAnswer, NoChannel
from etcdlite.client.connection import WANTS_SECRET, ClientConnection
from etcdlite.frames import HANDSHAKE, MAGIC, SECRET_REFUSAL, FrameReader
from etcdlite.peer import Dial, Local
from etcdlite.secret import CLIENT, PEER, Channels, InitiatorChannel, ResponderChannel
from etcdlite.secret_file import SecretFile
from etcdlite.wire.session import Opening

ONE = secret_file.Secret(bytes(range(100, 132)))


def output(session: Any) -> bytes:
    parts = b"".join(session.outbox.parts)
    session.outbox.parts.clear()
    session.outbox.is_queued = False
    return parts


# The introduction.


class ChannelCaller(Caller):
    """A caller whose channel has made these claims."""

    def __init__(self, cluster: int | None = None, member: int = 77, to: int | None = None) -> None:
        super().__init__(members=3)
        own = self.member.identity
        self.session.channel = ResponderChannel((ONE,), PEER)
        self.session.channel.claims = (
            own.cluster_id if cluster is None else cluster,
            member,
            own.member_id if to is None else to,
        )


def test_a_member_introduces_itself_as_it_did_in_the_handshake() -> None:
    caller = ChannelCaller()
    other = caller.nodes[1].member.identity
    assert caller.session.channel is not None and caller.session.channel.claims is not None
    cluster, _, to = caller.session.channel.claims
    caller.session.channel.claims = (cluster, other.member_id, to)
    caller.shake()
    caller.introduce(member_id=other.member_id, life=other.incarnation)
    assert caller.session.is_open


@pytest.mark.parametrize(
    "claims", [{"member": 78}, {"cluster": 5, "member": 77}, {"to": 9}, {"member": 0, "to": 0}]
)
def test_another_introduction_than_in_the_handshake_is_refused(claims: dict[str, int]) -> None:
    assert "in its handshake" in ChannelCaller(**claims).refusal()


# Between one with a secret and one without.


def test_a_member_without_a_secret_says_what_the_other_one_wants() -> None:
    caller = Caller()
    opening = InitiatorChannel((ONE,), PEER).output()
    caller.send(opening)
    assert caller.session.is_closing
    dial = Dial(_NoLink(caller.member.peers.local), lambda session: None)  # type: ignore[arg-type]
    dial.connected()
    dial.receive(SECRET_REFUSAL)
    assert dial.is_closing


class _NoLink:
    """What a `Dial` needs of its link."""

    node = 2
    metrics = None

    def __init__(self, local: Local) -> None:
        self.local = local


def test_the_refusal_of_a_listener_is_the_one_that_plain_sides_know() -> None:
    responder = ResponderChannel((ONE,), PEER)
    with pytest.raises(Exception, match="has no secret"):
        responder.receive(HANDSHAKE.pack(MAGIC, 2, 2))
    assert responder.output() == SECRET_REFUSAL


def test_a_client_without_a_secret_says_what_the_server_wants() -> None:
    connection = ClientConnection()
    connection.receive(SECRET_REFUSAL)
    assert connection.failure == WANTS_SECRET


# The first bytes at a port for clients.


def opened(first: bytes, wants_secret: bool, only_http: bool = False) -> Opening:
    session = Opening(lambda session: None, time.monotonic, only_http, wants_secret)
    session.receive(first)
    return session


OPENING = InitiatorChannel((ONE,), CLIENT).output()


@pytest.mark.parametrize(
    ("first", "wants_secret", "found"),
    [
        pytest.param(OPENING, True, "secret", id="opening"),
        (OPENING[:1], True, "secret"),
        (HANDSHAKE.pack(MAGIC, 1, 1), False, "native"),
        (b"PRI * HTTP/2.0", True, "grpc"),
        (b"GET / HTTP/1.1\r\n", True, "http"),
    ],
)
def test_the_first_bytes_tell_the_channel_from_the_protocols(
    first: bytes, wants_secret: bool, found: str
) -> None:
    session = opened(first, wants_secret)
    assert session.found == found and not session.is_closing


def test_the_native_protocol_without_the_channel_is_refused_where_there_is_a_secret() -> None:
    session = opened(HANDSHAKE.pack(MAGIC, 1, 1), True)
    assert not session.found and session.is_closing and not session.is_aborted
    assert output(session) == SECRET_REFUSAL


def test_the_channel_is_refused_where_there_is_no_secret() -> None:
    session = opened(OPENING, False)
    assert session.is_aborted and "set client-secret-file" in session.why_aborted


def test_a_port_for_http_alone_takes_no_channel() -> None:
    assert opened(OPENING, True, only_http=True).is_aborted


@pytest.mark.parametrize(
    "inner",
    [
        b"PRI * HTTP/2.0",
        b"GET / HTTP/1.1\r\n",
        pytest.param(OPENING, id="opening"),
        b"\x16\x03",
    ],
)
def test_the_channel_contains_the_native_protocol_alone(inner: bytes) -> None:
    session = opened(OPENING, True)
    assert session.enter_channel() == OPENING
    session.receive(b"")
    assert not session.is_closing
    session.receive(inner)
    assert session.is_aborted
    session = opened(OPENING, True)
    session.enter_channel()
    session.receive(HANDSHAKE.pack(MAGIC, 1, 1))
    assert session.found == "native"


# Founding and joining: questions over blocking sockets.


class FakeMember:
    """Answers one MemberList over each connection, through the channel of a secret or plainly."""

    def __init__(self, make: Callable[[], ResponderChannel] | None) -> None:
        self._make = make
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        channel = self._make() if self._make else None
        reader = FrameReader(1 << 20)
        opening = b""
        while data := sock.recv(4096):
            if channel is not None:
                try:
                    data = channel.receive(data)
                except Exception:
                    sock.sendall(channel.output())
                    return
                sock.sendall(channel.output())
            if len(opening) < HANDSHAKE.size:
                opening += data
                data, opening = opening[HANDSHAKE.size :], opening[: HANDSHAKE.size]
                if len(opening) == HANDSHAKE.size and not opening.startswith(MAGIC):
                    return
            reader.feed(data)
            for request_id, method, _, _ in reader:
                header = proto.ResponseHeader(cluster_id=9, member_id=2)
                body = proto.MemberListResponse(header=header).encode()
                answer = HANDSHAKE.pack(MAGIC, 1, 0) + frames.frame(
                    request_id, method, frames.END, body
                )
                # In two pieces, of which the first has no whole frame of the protocol.
                for piece in (answer[:5], answer[5:]):
                    sock.sendall(channel.seal(piece) if channel else piece)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def file(tmp_path: Path) -> SecretFile:
    secret_file.create(str(tmp_path / "secret"))
    return SecretFile(str(tmp_path / "secret"), "peer-secret-file")


@pytest.fixture
def other_file(tmp_path: Path) -> SecretFile:
    secret_file.create(str(tmp_path / "other"))
    return SecretFile(str(tmp_path / "other"), "peer-secret-file")


def channels(file: SecretFile) -> Channels:
    return Channels(file, PEER, time.monotonic)


def test_a_member_that_starts_asks_the_others_through_the_channel(file: SecretFile) -> None:
    there = channels(file)
    there.identify(9, 2)
    member = FakeMember(lambda: there.accept(""))
    try:
        assert bootstrap.fetch_members(member.url, dialing=channels(file).dial) == (9, [])
        assert bootstrap.unreachable([member.url], 2, channels(file).dial) == ""
        assert "leads to member 2" in bootstrap.unreachable([member.url], 3, channels(file).dial)
    finally:
        member.close()


def test_a_member_that_starts_with_another_secret_is_told_so(
    file: SecretFile, other_file: SecretFile
) -> None:
    member = FakeMember(lambda: channels(other_file).accept(""))
    try:
        with pytest.raises(NoChannel, match="the other side has another secret than this one"):
            bootstrap.fetch_members(member.url, dialing=channels(file).dial)
        with pytest.raises(NoChannel, match="wants a shared secret"):
            bootstrap.fetch_members(member.url)
    finally:
        member.close()


def test_a_member_that_starts_with_a_secret_among_those_without_is_told_so(
    file: SecretFile,
) -> None:
    member = FakeMember(None)
    try:
        with pytest.raises(NoChannel, match="peer-secret-file, too"):
            bootstrap.fetch_members(member.url, dialing=channels(file).dial)
        assert bootstrap.fetch_members(member.url) == (9, [])
    finally:
        member.close()


def test_a_cluster_is_not_founded_against_a_majority_that_refuses_the_secret() -> None:
    """A member that lost its data could otherwise start as a new one, for as long as its secret is
    wrong, and be two members of one id."""
    pairs = [(name, f"http://{name}:2380") for name in "abc"]
    founding = bootstrap.new_cluster("a", pairs, "t")

    def fetch(url: str) -> Any:
        raise NoChannel(f"{url}: another secret") if url in refusing else NoAnswer("no answer")

    refusing = {"http://b:2380"}
    bootstrap.check_is_new(founding, "a", pairs, fetch)
    refusing.add("http://c:2380")
    with pytest.raises(bootstrap.OtherCluster, match=r"b:2380: another secret; .*c:2380"):
        bootstrap.check_is_new(founding, "a", pairs, fetch)


def test_before_it_is_a_member_it_claims_nothing(file: SecretFile) -> None:
    maker = channels(file)
    there = channels(file)
    there.identify(9, 2)
    for identify, target, claims in (
        (False, 0, (0, 0, 0)),
        (True, 0, (0, 0, 0)),
        (True, 2, (9, 1, 2)),
    ):
        if identify:
            maker.identify(9, 1)
        initiator, responder = maker.dial("", target), there.accept("")
        responder.receive(initiator.output())
        initiator.receive(responder.output())
        assert responder.claims == claims
