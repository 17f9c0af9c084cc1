"""The frame that all connections share: what waits, for how long, and what is given up."""

from __future__ import annotations

import errno
import inspect
import os
import socket
import time
import tracemalloc
import weakref
from pathlib import Path
from selectors import DefaultSelector
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
from rigs.held_memory import held_bytes
from rigs.lone_member import LoneMember
from rigs.wire import take_output

from etcdlite import frames, proto
from etcdlite.channel import Channel
from etcdlite.config import load
from etcdlite.connections import (
    FRAME_PIECE_BYTES,
    PIECE_BYTES,
    REST_TICKS,
    TICKED_PER_TURN,
    Connection,
    Connections,
)
from etcdlite.handshakes import Handshakes
from etcdlite.limits import DEFAULT_LIMITS
from etcdlite.memory import Budget
from etcdlite.methods import METHOD_BY_NAME, PUT, WATCH
from etcdlite.places import Places
from etcdlite.session import (
    HANDSHAKE_TIMEOUT_S,
    MAX_HELD_BYTES,
    MAX_PIECES,
    MIN_SENT_BYTES_PER_S,
    RATE_PERIOD_S,
    SEALED_BYTES,
    STALLED_TIMEOUT_S,
    Inbox,
    Outbox,
    Session,
    partial_timeout_s,
)
from etcdlite.txn import OP_BYTES
from etcdlite.wire.native import NativeSession
from etcdlite.wire.session import Opening


class Plain(Session):
    """Of which the test sets the clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.woken = 0
        super().__init__(self._wake, lambda: self.now)
        self.is_open = True

    def _wake(self, session: Session) -> None:
        self.woken += 1

    def receive(self, data: bytes) -> None:
        raise AssertionError

    def wait(self, seconds: float) -> Plain:
        self.now += seconds
        self.tick(self.now)
        return self


@pytest.fixture
def plain() -> Plain:
    return Plain()


def send_some(outbox: Outbox, size_bytes: int) -> None:
    outbox.take()
    outbox.sent(size_bytes)


def test_tls_on_a_plain_port_is_named() -> None:
    opening = Opening(lambda session: None, lambda: 0.0)
    opening.receive(bytes.fromhex("1603010200"))
    assert opening.why_aborted.startswith("TLS on a plain port")


def test_the_owner_is_woken_by_the_first_output_of_a_turn(plain: Plain) -> None:
    plain.outbox.append(b"a")
    plain.outbox.append(b"b")
    assert plain.woken == 1
    assert take_output(plain) == b"ab"
    plain.outbox.append(b"c")
    assert plain.woken == 2


def test_a_frame_is_not_late_while_the_server_does_not_read_it(tmp_path: Path) -> None:
    """A put behind the large answer to a range, to a client with a slow line."""
    lone = LoneMember(tmp_path)
    session = NativeSession(lone.member, lambda session: None)
    put = frames.frame(1, PUT, 0, proto.PutRequest(key=b"k", value=b"v" * 1000).encode())
    session.receive(frames.HANDSHAKE.pack(frames.MAGIC, 1, 1))
    session.outbox.append(bytes(4 << 20))
    session.receive(put[:100])
    outbox = session.outbox
    while outbox.unsent_bytes > outbox.high_water_bytes:
        lone.now += 10
        outbox.sent(min(100_000, len(outbox.take())))
        session.tick(lone.now)
        assert not session.is_aborted, session.why_aborted
    assert lone.now > partial_timeout_s(len(put)) * 3
    while outbox.unsent_bytes:
        outbox.sent(len(outbox.take()))
    lone.now += partial_timeout_s(len(put)) - 15
    session.tick(lone.now)
    session.receive(put[100:])
    lone.settle()
    assert not session.is_aborted and lone.member.state.store.get(b"k") is not None
    lone.close()


def test_what_the_kernel_does_not_take_is_taken_again_first(plain: Plain) -> None:
    outbox = plain.outbox
    outbox.append(b"abcdef")
    send_some(outbox, 2)
    assert outbox.is_stuck and outbox.unsent_bytes == 4
    outbox.append(b"gh")
    assert outbox.take() == b"cdef"
    outbox.sent(4)
    assert not outbox.is_stuck
    assert outbox.take() == b"gh"


def test_a_session_is_blocked_above_its_marks(plain: Plain) -> None:
    plain.outbox.append(bytes(DEFAULT_LIMITS.high_water_bytes))
    assert not plain.is_blocked and not plain.outbox.is_blocked
    plain.outbox.append(b"x")
    assert plain.is_blocked and plain.outbox.is_blocked
    take_output(plain)
    plain.outbox.hold(MAX_HELD_BYTES + 1)
    assert plain.is_blocked and plain.outbox.is_blocked and not plain.is_idle
    plain.outbox.release(1)
    assert not plain.is_blocked and plain.outbox.waiting_bytes == MAX_HELD_BYTES


def test_output_that_does_not_move_is_given_up(plain: Plain) -> None:
    plain.outbox.min_bytes_per_s = 0
    plain.outbox.append(bytes(1000))
    send_some(plain.outbox, 10)
    assert not plain.wait(STALLED_TIMEOUT_S - 1).is_aborted
    send_some(plain.outbox, 1)
    assert not plain.wait(2).is_aborted, "it moves"
    assert plain.wait(STALLED_TIMEOUT_S).is_aborted
    assert plain.why_aborted == "it does not read its answers"


def test_output_that_moves_too_slowly_is_given_up(plain: Plain) -> None:
    plain.outbox.append(bytes(10 << 20))
    send_some(plain.outbox, 1)
    while not plain.is_aborted:
        assert plain.now < 100.0 + 2 * RATE_PERIOD_S
        send_some(plain.outbox, MIN_SENT_BYTES_PER_S // 2)
        plain.wait(1.0)
    assert plain.why_aborted == "it reads its answers too slowly"


def test_output_that_moves_slowly_but_fast_enough_goes_on(plain: Plain) -> None:
    plain.outbox.append(bytes(1 << 20))
    send_some(plain.outbox, 1)
    for _ in range(int(5 * RATE_PERIOD_S)):
        send_some(plain.outbox, MIN_SENT_BYTES_PER_S + 10)
        plain.wait(1.0)
    assert not plain.is_aborted


def test_a_connection_with_nothing_to_send_may_be_silent_for_ever(plain: Plain) -> None:
    plain.outbox.append(b"x")
    take_output(plain)
    assert not plain.wait(1e6).is_aborted


def test_what_flow_control_keeps_back_is_given_up_if_none_of_it_moves(plain: Plain) -> None:
    plain.outbox.hold(DEFAULT_LIMITS.high_water_bytes + 2)
    assert not plain.wait(STALLED_TIMEOUT_S - 1).is_aborted
    plain.outbox.release(1)
    assert not plain.wait(STALLED_TIMEOUT_S - 1).is_aborted
    plain.outbox.drop(1)
    assert not plain.wait(1e6).is_aborted, "it is not much"
    plain.outbox.hold(1)
    assert not plain.wait(STALLED_TIMEOUT_S).is_aborted
    assert plain.wait(1).is_aborted


def test_a_peer_opens_the_protocol_in_time(plain: Plain) -> None:
    plain.is_open = False
    plain.wait(0)
    assert not plain.wait(HANDSHAKE_TIMEOUT_S).is_aborted
    assert plain.wait(0.1).is_aborted
    assert plain.why_aborted == "it did not open the protocol in time"


def test_input_in_pieces_is_joined_once_it_is_enough() -> None:
    inbox = Inbox(lambda: 0.0)
    assert inbox.join(b"whole") == b"whole"
    inbox.keep(b"ab", 5)
    assert inbox.join(b"c") == b"" and inbox.waiting_bytes == 3
    assert inbox.join(b"def") == b"abcdef" and not inbox.waiting_bytes


def test_small_pieces_of_input_take_the_memory_that_is_counted() -> None:
    inbox = Inbox(lambda: 0.0)
    sent = bytes(i % 251 for i in range(100_000))
    tracemalloc.start()
    try:
        inbox.keep(sent[:2], len(sent))
        for at in range(2, len(sent) - 2, 2):
            assert inbox.join(sent[at : at + 2]) == b""
        held = held_bytes(__file__, inspect.getfile(Inbox))
    finally:
        tracemalloc.stop()
    assert len(sent) < held < len(sent) + MAX_PIECES * 300
    assert inbox.join(sent[-2:]) == sent and not inbox.waiting_bytes
    for at in range(0, len(sent), 2):
        inbox.put(sent[at : at + 2])
    taken = b""
    while inbox.waiting_bytes:
        taken += inbox.take(1000)
    assert taken == sent


def test_input_is_taken_in_pieces() -> None:
    inbox = Inbox(lambda: 0.0)
    inbox.put(b"abcde")
    inbox.put(b"fg")
    assert [inbox.take(3) for _ in range(3)] == [b"abc", b"de", b"fg"]
    assert not inbox.waiting_bytes


@pytest.mark.parametrize("sent", [b"\x10", frames.frame(1, PUT, 0, bytes(1000))[:-1]])
def test_half_a_frame_is_not_waited_for_for_ever(tmp_path: Path, sent: bytes) -> None:
    lone = LoneMember(tmp_path)
    session = NativeSession(lone.member, lambda session: None)
    session.receive(frames.HANDSHAKE.pack(frames.MAGIC, 1, 1))
    session.tick(1000.0)
    session.receive(sent[:-1] or sent)
    timeout_s = partial_timeout_s(1000)
    session.tick(2000.0)
    session.tick(2000.0 + timeout_s - 1)
    assert not session.is_aborted
    if len(sent) > 1:
        session.receive(sent[-1:])
    session.tick(2000.0 + timeout_s + 1)
    assert session.is_aborted, "a byte from time to time is no frame"
    lone.close()


def test_a_whole_frame_ends_the_wait(tmp_path: Path) -> None:
    lone = LoneMember(tmp_path)
    session = NativeSession(lone.member, lambda session: None)
    session.receive(frames.HANDSHAKE.pack(frames.MAGIC, 1, 1))
    whole = frames.frame(1, frames.PING, 0, b"ping")
    session.receive(whole[:5])
    session.tick(1.0)
    session.receive(whole[5:])
    session.tick(1e6)
    assert not session.is_aborted
    lone.close()


def test_what_requests_hold_counts_as_memory_until_they_are_answered(tmp_path: Path) -> None:
    """A decoded operation takes many times its bytes."""
    lone = LoneMember(tmp_path)
    session = NativeSession(lone.member, lambda session: None)
    session.receive(frames.HANDSHAKE.pack(frames.MAGIC, 1, 1))
    take_output(session)
    op = proto.RequestOp(request_range=proto.RangeRequest(key=b"k", serializable=True))
    inner = proto.RequestOp(request_txn=proto.TxnRequest(success=[op] * 100))
    txn = proto.TxnRequest(success=[inner] * 20).encode()
    puts = [
        proto.RequestOp(request_put=proto.PutRequest(key=b"%d" % number)) for number in range(100)
    ]
    plain = proto.TxnRequest(success=puts).encode()
    wide = proto.RangeRequest(key=b"k" * 50_000).encode()
    queue = proto.LeaderRequest(name=b"n" * 50_000).encode()
    for method, body, least in (
        ("KV.Txn", txn, 20 * 100 * OP_BYTES),
        ("KV.Txn", plain, 100 * OP_BYTES),
        ("KV.Range", wide, len(wide)),
        ("Election.Leader", queue, len(queue)),
    ):
        before = session.kept_bytes
        session.receive(frames.frame(1, METHOD_BY_NAME[method].number, frames.END, body))
        assert session.kept_bytes - before >= least, method
        lone.settle()
        while session.has_more:
            session.produce()
            lone.settle()
        take_output(session)
        assert session.kept_bytes == 0, method
    lone.close()


def test_many_small_frames_are_processed_in_small_pieces_and_the_rest_of_one_frame_is_not(
    tmp_path: Path,
) -> None:
    """Thirteen bytes ask for the status, and a hundred bytes of gzip take 10 ms: a client that sent
    much cheap input first gets no larger pieces for what comes then."""
    lone = LoneMember(tmp_path)
    sizes = []

    class Measured(NativeSession):
        def receive(self, data: bytes) -> None:
            sizes.append(len(data))
            super().receive(data)

    session = Measured(lone.member, lambda session: None)
    connection = Connection(None, "", "", None, session)  # type: ignore[arg-type]
    put = proto.PutRequest(key=b"k", value=bytes(100_000)).encode()
    pings = b"".join(frames.frame(n, frames.PING, 0, bytes(64)) for n in range(2, 902))
    status = METHOD_BY_NAME["Maintenance.Status"].number
    asks = b"".join(frames.frame(n, status, 0, b"") for n in range(1000, 3000))
    connection.pending = (
        frames.HANDSHAKE.pack(frames.MAGIC, 1, 1) + frames.frame(1, PUT, 0, put) + pings + asks
    )
    while connection.pending:
        connection.receive_piece()
    large = [size for size in sizes if size > PIECE_BYTES]
    assert large and max(large) <= FRAME_PIECE_BYTES
    assert sum(large) < len(put) + 64, "only the rest of the large frame"
    assert not session.is_closing
    lone.close()


@pytest.mark.parametrize("start_revision", [0, 1])
def test_a_native_watch_goes_on_when_its_client_closes_its_side(
    tmp_path: Path, start_revision: int
) -> None:
    lone = LoneMember(tmp_path)
    session = NativeSession(lone.member, lambda session: None)
    session.receive(frames.HANDSHAKE.pack(frames.MAGIC, 1, 1))
    create = proto.WatchCreateRequest(key=b"k", start_revision=start_revision)
    request = proto.WatchRequest(create_request=create).encode()
    session.receive(frames.frame(1, WATCH, frames.END, request))
    put = proto.PutRequest(key=b"k", value=b"seen").encode()
    session.receive(frames.frame(2, PUT, 0, put))
    lone.settle()
    reader = frames.FrameReader(1 << 20)
    reader.feed(take_output(session)[frames.HANDSHAKE.size :])
    answers = [(flags, body) for request_id, _, flags, body in reader if request_id == 1]
    assert [flags for flags, _ in answers] == [0] * len(answers), "the watch has ended"
    events = [
        event.kv.value for _, body in answers for event in proto.WatchResponse.decode(body).events
    ]
    assert events == [b"seen"]
    lone.close()


class Sealer(Channel):
    """Adds 10 bytes to each piece."""

    is_established = True

    def __init__(self) -> None:
        self.sealed: list[int] = []

    def seal(self, data: bytes | memoryview) -> bytes:
        self.sealed.append(len(data))
        return bytes(data) + b"0123456789" * bool(data)

    def output(self) -> bytes:
        return b"handshake"


def drained(outbox: Outbox, channel: Channel, at_once: int) -> bytes:
    """All that is sent, when the kernel accepts `at_once` bytes each time."""
    sent = b""
    while outbox.unsent_bytes:
        data = bytes(outbox.take_sealed(channel))[:at_once]
        outbox.sent(len(data))
        sent += data
    return sent


@pytest.mark.parametrize("at_once", [1000, 50_000, 1 << 30])
def test_sealed_output_is_counted_until_it_is_sent_and_sealed_in_pieces(at_once: int) -> None:
    outbox = Outbox(None, lambda session: None, lambda: 0.0, 1 << 20)
    parts = [b"a" * 10, b"b" * (SEALED_BYTES * 2 + 5), b"c" * 100, b"d" * SEALED_BYTES, b"e"]
    for part in parts:
        outbox.append(part)
    channel = Sealer()
    assert drained(outbox, channel, at_once).replace(b"0123456789", b"") == b"".join(parts)
    assert max(channel.sealed) == SEALED_BYTES
    assert outbox.unsent_bytes == 0 and not outbox.is_stuck and not outbox.parts


def test_output_waits_for_the_handshake() -> None:
    outbox = Outbox(None, lambda session: None, lambda: 0.0, 1 << 20)
    channel = Sealer()
    channel.is_established = False
    outbox.append(b"data")
    assert outbox.take_sealed(channel) == b"handshake"
    outbox.sent(4)
    assert outbox.is_stuck and outbox.unsent_bytes == 9
    outbox.sent(5)
    assert outbox.unsent_bytes == 4
    channel.is_established = True
    assert outbox.take_sealed(channel) == b"data0123456789"


def test_a_peer_that_does_not_read_is_found_through_a_channel() -> None:
    now = [0.0]
    outbox = Outbox(None, lambda session: None, lambda: now[0], 1 << 20)
    outbox.append(b"x" * 100)
    outbox.take_sealed(Sealer())
    outbox.sent(10)
    now[0] = STALLED_TIMEOUT_S + 1
    assert outbox.problem(now[0]) == "it does not read its answers"


def test_late_output_leaves_with_the_next_output_or_when_it_is_flushed() -> None:
    woken: list[object] = []
    outbox = Outbox("session", woken.append, lambda: 0.0, 1 << 20)
    outbox.append_late(b"late")
    assert not woken and outbox.unsent_bytes == 4
    outbox.append(b"answer")
    assert outbox.take() == b"lateanswer" and woken == ["session"]
    outbox.sent(10)
    assert not outbox.unsent_bytes
    outbox.append_late(b"late")
    outbox.flush_late()
    assert woken == ["session", "session"] and outbox.take() == b"late"


def test_a_session_sends_late_output_at_the_next_tick() -> None:
    session = Plain()
    session.outbox.append_late(b"late")
    session.tick(session.now)
    assert session.woken == 1 and session.outbox.take() == b"late"


def test_a_closed_connection_has_no_late_output() -> None:
    outbox = Outbox("session", lambda session: None, lambda: 0.0, 1 << 20)
    outbox.append_late(b"late")
    outbox.close()
    assert not outbox.parts


def test_what_is_held_first_is_told_to_the_owner() -> None:
    woken: list[str] = []
    outbox = Outbox("session", woken.append, lambda: 0.0, 1 << 20)
    outbox.hold(10)
    assert woken == ["session"], "the owner must look at its size and deadline"
    outbox.hold(10)
    outbox.release(15)
    outbox.hold(10)
    assert len(woken) == 1
    outbox.drop(15)
    outbox.hold(10)
    assert len(woken) == 2


class Ticked(Session):
    """Counts its ticks."""

    may_rest = True

    def __init__(self) -> None:
        super().__init__(lambda session: None, time.monotonic)
        self.ticks = 0

    def tick(self, now: float) -> None:
        self.ticks += 1

    def receive(self, data: bytes) -> None:
        pass


def resting(count: int) -> tuple[Connections, list[Ticked], list[socket.socket]]:
    """Connections with sessions that may rest, and the clients' ends."""
    handshakes = Handshakes(lambda result: None)
    connections = Connections(load([], {}), DefaultSelector(), Places(1000, 1000), handshakes)
    sessions, clients = [], []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(count):
            clients.append(socket.create_connection(listener.getsockname()))
            sock, (host, port) = listener.accept()
            site: Any = object()
            sessions.append(Ticked())
            connections.add(Connection(sock, host, f"{host}:{port}", site, sessions[-1]))
    return connections, sessions, clients


def test_sessions_that_are_closed_hold_up_no_others_and_are_forgotten() -> None:
    connections, sessions, clients = resting(20 * REST_TICKS)
    budget = Budget(1 << 30)
    for _ in range(2):
        connections.tick(time.monotonic(), budget)
        while connections.have_work:
            connections.produce()
    last, gone = sessions[-1], weakref.ref(sessions[-2])
    del sessions
    for connection in list(connections.all):
        if connection.session is not last:
            connections.close(connection)
    del connection
    before = last.ticks
    for _ in range(2 * REST_TICKS + 3):
        connections.tick(time.monotonic(), budget)
    assert last.ticks >= before + 2
    assert gone() is None
    connections.close_all()
    for sock in clients:
        sock.close()


@pytest.mark.parametrize("is_member", [False, True])
def test_a_turn_takes_a_piece_of_the_input_and_looks_at_the_clock(is_member: bool) -> None:
    """A member passes on what its clients ask: a read of 64 KiB may have a thousand questions."""
    connections, (session,), (client,) = resting(1)
    (connection,) = connections.all
    connection.is_member = is_member
    pieces: list[bytes] = []
    session.receive = pieces.append  # type: ignore[method-assign]
    sent = bytes(range(256)) * (4 * PIECE_BYTES // 256)
    client.sendall(sent)
    connections.serve(connections._selector.select(10), began=0.0)  # The turn's time is over.
    assert [len(piece) for piece in pieces] == [PIECE_BYTES]
    while b"".join(pieces) != sent:
        ready = connections._selector.select(0 if connections.have_unread else 10)
        connections.serve(ready, time.monotonic())
    connections.close_all()
    client.close()


@pytest.mark.parametrize("refused", ["register", "setsockopt"])
def test_a_connection_that_the_system_refuses_is_closed_and_no_other(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As epoll_ctl(2) without memory, and setsockopt(2) on macOS after a reset."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    connections, sessions, clients = resting(1)
    sock, client = socket.socketpair()
    late: Any = Namespace(setblocking=sock.setblocking, setsockopt=refuse, close=sock.close)
    if refused == "register":
        late.setsockopt = lambda *_: None
        monkeypatch.setattr(connections._selector, refused, refuse)
    site: Any = object()
    session = Ticked()
    assert not connections.add(Connection(late, "1.2.3.4", "1.2.3.4:5", site, session))
    assert client.recv(1) == b"" and session.is_closing
    assert [connection.session for connection in connections.all] == sessions
    connections.close_all()
    for each in (*clients, client):
        each.close()


def test_a_connection_that_the_system_watches_no_longer_is_closed_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is watched again after a wait, as for a step of a handshake, and epoll_ctl(2) fails."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    connections, sessions, clients = resting(2)
    late = next(each for each in connections.all if each.session is sessions[1])
    late.is_waiting = True
    connections.feed(late, b"")
    assert late.mask == 0
    monkeypatch.setattr(connections._selector, "register", refuse)
    late.is_waiting = False
    connections.feed(late, b"")
    assert connections.have_work
    connections.send_output()
    assert late.is_closed and [each.session for each in connections.all] == sessions[:1]
    connections.close_all()
    for client in clients:
        client.close()


def test_sessions_that_may_rest_are_looked_at_in_turn_and_after_input() -> None:
    connections, sessions, clients = resting(REST_TICKS + 4)
    budget = Budget(1 << 30)

    def ticks(times: int) -> list[int]:
        before = [session.ticks for session in sessions]
        for _ in range(times):
            connections.tick(time.monotonic(), budget)
        return [session.ticks - count for session, count in zip(sessions, before, strict=True)]

    assert min(ticks(1)) == 1, "a new one is looked at soon"
    found = ticks(3 * REST_TICKS)
    assert min(found) >= 3 and max(found) <= 6, found
    sessions[7].may_rest = False
    ticks(REST_TICKS)
    assert ticks(10)[7] == 10
    clients[3].sendall(b"x")
    connections.serve(connections._selector.select(1.0), time.monotonic())
    assert ticks(1)[3] == 1
    sessions[4].outbox.hold(10)
    connections.dirty.append(sessions[4])
    connections.send_output()
    assert ticks(1)[4] == 1 and budget.held_bytes == 10
    # Many do not take one turn.
    connections._awake.update(dict.fromkeys(sessions))
    assert len(sessions) < TICKED_PER_TURN and not connections.have_work
    connections._due.extend(sessions * (TICKED_PER_TURN // len(sessions) + 1))
    assert sum(ticks(1)) == TICKED_PER_TURN and connections.have_work
    connections.produce()
    assert not connections.have_work
    connections.close_all()
    for sock in clients:
        sock.close()


def test_a_session_rests_while_nothing_is_due(tmp_path: Path) -> None:
    lone = LoneMember(tmp_path)
    session = NativeSession(lone.member, lambda session: None)
    assert not session.may_rest, "it must open the protocol"
    session.receive(frames.HANDSHAKE.pack(frames.MAGIC, 1, 1))
    assert not session.may_rest, "output waits"
    take_output(session)
    assert session.may_rest
    session.receive(b"\x40")
    assert not session.may_rest, "a frame is not complete"
    lone.close()


def test_a_turn_sends_to_clients_for_one_slice_and_to_members_always(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connections, sessions, clients = resting(5)
    by_session = {connection.session: connection for connection in connections.all}
    by_session[sessions[4]].is_member = True  # The last one.
    monkeypatch.setattr("etcdlite.connections.SEND_SLICE_S", -1.0)
    for session in sessions:
        session.outbox = Outbox(session, connections.dirty.append, time.monotonic, 1000)
        session.outbox.append(b"x")
    left = []
    while connections.have_work:
        connections.send_output()
        left.append([session.outbox.unsent_bytes for session in sessions])
        if len(left) == 2:
            sessions[0].outbox.append(b"y")
    assert left == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0] * 5]
    connections.close_all()
    for sock in clients:
        sock.close()
