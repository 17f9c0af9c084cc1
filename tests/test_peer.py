"""The way between members: what is taken, what is refused, and what hostile bytes do."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs.wire import take_output
from sim.world import Node, World, url

from etcdlite import __version__, frames, methods, peer_frames, proto
from etcdlite.frames import (
    END,
    ERROR,
    HANDSHAKE,
    MAGIC,
    PING,
    PROTOCOL_VERSION,
    FrameReader,
    ProtocolError,
)
from etcdlite.peer import (
    FORWARD,
    INTRODUCE,
    MAX_CONNECTIONS,
    MAX_CONTEXT_BYTES,
    MAX_UNSENT_BYTES,
    RAFT,
    SILENCE_S,
    SNAPSHOT,
    Dial,
    Link,
    decode_message,
    encode_forward,
    encode_message,
)
from etcdlite.peer_frames import PeerFrameReader
from etcdlite.proto import MAX_FIELDS, DecodeError
from etcdlite.raft import APP, HEARTBEAT, Message
from etcdlite.raft_log import Entry
from etcdlite.replica.entry import check_entry, decode_requests, encode_entry, read_header
from etcdlite.snap import Image
from etcdlite.storage.layout import segment_name
from etcdlite.wire import peer_session
from etcdlite.wire.peer_session import Accepted

U64 = st.integers(0, 2**64 - 1)
SMALL = st.integers(0, 2**40)


@st.composite
def messages(draw: Any) -> Message:
    index = draw(SMALL)
    entries = [
        Entry(draw(U64), index + 1 + n, draw(st.integers(0, 1)), data)
        for n, data in enumerate(draw(st.lists(st.binary(max_size=50), max_size=5)))
    ]
    return Message(
        draw(st.integers(1, 12)), 2, 1, draw(U64), index, draw(U64), draw(U64), entries,
        draw(st.booleans()), draw(U64), None, draw(st.binary(max_size=20)),
    )  # fmt: skip


@settings(deadline=None)
@given(messages())
def test_a_message_comes_out_as_it_went_in(message: Message) -> None:
    assert decode_message(encode_message(message), 1, 2) == message


@settings(deadline=None)
@given(messages(), st.data())
def test_a_message_that_is_cut_or_too_long_is_refused(message: Message, data: Any) -> None:
    body = encode_message(message)
    cut = body[: data.draw(st.integers(0, len(body) - 1))]
    long = encode_message(message._replace(context=bytes(MAX_CONTEXT_BYTES + 1)))
    for wrong in (cut, body + b"\0", long):
        with pytest.raises(ProtocolError):
            decode_message(wrong, 1, 2)


class Caller:
    """The dialing end, by hand, of a connection to a member."""

    def __init__(self, members: int = 1) -> None:
        self.world = World(1)
        self.nodes = self.world.found(members)
        self.world.elect()
        self.member = self.nodes[0].member
        self.session = Accepted(self.member, lambda session: None)
        self._reader: Any = PeerFrameReader(1 << 26)
        self.shaken: tuple[bytes, int, int] | None = None

    def send(self, data: bytes) -> list[tuple[int, int, int, bytes]]:
        """What is answered to it."""
        self.session.receive(data)
        self.nodes[0].turn()
        out = take_output(self.session)
        if self.shaken is None and len(out) >= HANDSHAKE.size:
            self.shaken = HANDSHAKE.unpack_from(out)
            out = out[HANDSHAKE.size :]
        self._reader.feed(out)
        return list(self._reader)

    def ask(
        self, method: int, body: bytes, request_id: int = 1
    ) -> list[tuple[int, int, int, bytes]]:
        return self.send(peer_frames.frame(request_id, method, 0, body))

    def shake(self, lowest: int = peer_frames.VERSION, highest: int = peer_frames.VERSION) -> Any:
        return self.send(HANDSHAKE.pack(MAGIC, lowest, highest))

    def introduce(self, **fields: Any) -> list[tuple[int, int, int, bytes]]:
        fields = {
            "cluster_id": self.member.identity.cluster_id,
            "member_id": 77,
            "version": __version__,
            "to": self.member.identity.member_id,
            **fields,
        }
        return self.ask(INTRODUCE, proto.Introduction(**fields).encode())

    def refusal(self, **fields: Any) -> str:
        self.shake()
        ((_, method, flags, body),) = self.introduce(**fields)
        assert (method, flags) == (INTRODUCE, END | ERROR)
        assert self.session.is_closing
        text: str = proto.Error.decode(body).message
        return text


def test_who_belongs_to_the_cluster_is_welcome() -> None:
    caller = Caller(members=3)
    ((_, method, _, body),) = caller.shake()
    hello = proto.Hello.decode(body)
    assert (method, hello.cluster_id, hello.member_id) == (
        0, caller.member.identity.cluster_id, caller.member.identity.member_id,
    )  # fmt: skip
    other = caller.nodes[1].member
    ((_, method, flags, body),) = caller.introduce(
        member_id=other.identity.member_id, life=other.identity.incarnation
    )
    assert (method, flags, proto.Welcome.decode(body).offset) == (INTRODUCE, END, 0)
    assert caller.ask(PING, b"abc", 2) == [(2, PING, END, b"abc")]


def test_a_message_that_contradicts_the_log_costs_only_the_connection() -> None:
    caller = Caller(members=3)
    caller.shake()
    other = caller.nodes[1].member
    caller.introduce(member_id=other.identity.member_id, life=other.identity.incarnation)
    raft = caller.member.raft
    state = raft.hard_state
    bad = Message(HEARTBEAT, raft.id, other.identity.member_id, raft.term + 1, commit=10**9)
    caller.ask(RAFT, encode_message(bad))
    assert caller.session.is_closing
    assert raft.hard_state == state


def test_a_question_with_more_fields_than_a_request_may_have_costs_only_its_answer() -> None:
    """A member passes on what a client sent. In JSON the client may have sent more."""
    caller = Caller(members=3)
    caller.shake()
    other = caller.nodes[1].member
    caller.introduce(member_id=other.identity.member_id, life=other.identity.incarnation)
    add = methods.METHOD_BY_NAME["Cluster.MemberAdd"]
    request = add.request(peerURLs=["http://m4:2380"] * (MAX_FIELDS + 1))
    ((_, _, flags, body),) = caller.ask(add.number, request.encode(), 2)
    assert flags == END | ERROR
    assert "fields" in proto.Error.decode(body).message
    assert not caller.session.is_closing
    assert caller.ask(PING, b"abc", 3) == [(3, PING, END, b"abc")]


def test_the_wrong_cluster_is_refused() -> None:
    assert Caller().refusal(cluster_id=5) == "etcdserver: cluster ID mismatch"


def test_a_member_with_our_own_id_is_refused() -> None:
    caller = Caller()
    text = caller.refusal(member_id=caller.member.identity.member_id)
    assert "two members have the id" in text and "data directory" in text


def test_a_second_process_of_a_member_is_refused_while_the_first_one_lives() -> None:
    caller = Caller(members=3)
    text = caller.refusal(member_id=caller.nodes[1].member_id, life=5)
    assert "another process is member" in text and "data directory" in text
    caller.nodes[1].pause()
    caller.world.run(2)
    again = Accepted(caller.member, lambda session: None)
    again.receive(HANDSHAKE.pack(MAGIC, peer_frames.VERSION, peer_frames.VERSION))
    introduction = proto.Introduction(
        version=__version__,
        cluster_id=caller.member.identity.cluster_id,
        member_id=caller.nodes[1].member_id,
        to=caller.member.identity.member_id,
        life=5,
    )
    again.receive(peer_frames.frame(1, INTRODUCE, 0, introduction.encode()))
    assert again.is_open, "it may have been started again"


@pytest.mark.parametrize("ends", [True, False])
def test_a_connection_that_was_introduced_late_does_not_take_the_place_of_the_live_one(
    ends: bool,
) -> None:
    """What a member dialled long ago may arrive when it has dialled again."""
    caller = Caller(members=3)
    other, peers = caller.nodes[1].member, caller.member.peers
    live = peers._accepted[other.identity.member_id]
    caller.shake()
    caller.introduce(member_id=other.identity.member_id, life=other.identity.incarnation)
    assert peers._accepted[other.identity.member_id] is caller.session
    if ends:
        caller.session.closed()
    caller.world.run(1)
    assert peers._accepted[other.identity.member_id] is live


def test_who_wants_somebody_else_is_refused() -> None:
    assert "check the peer URLs" in Caller().refusal(to=99)


def test_who_is_not_a_member_is_refused_while_there_is_a_leader() -> None:
    assert "is not known here" in Caller().refusal()


def test_who_was_removed_is_told_so() -> None:
    caller = Caller()
    caller.member.state.membership.removed.add(77)
    assert "permanently removed" in caller.refusal()


def test_a_foreign_version_is_refused_and_told_which_one_is_spoken() -> None:
    caller = Caller()
    assert caller.shake(9, 12) == []
    assert caller.shaken == (MAGIC, 0, 0)
    assert caller.session.is_closing


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n", bytes(64)])
def test_what_is_no_peer_is_hung_up_on(first: bytes) -> None:
    caller = Caller()
    assert caller.send(first) == []
    assert caller.session.is_closing


def test_nothing_but_a_member_list_is_answered_before_the_introduction() -> None:
    caller = Caller()
    caller.shake()
    number = methods.METHOD_BY_NAME["Cluster.MemberList"].number
    ((_, method, flags, body),) = caller.ask(number, b"")
    assert (method, flags) == (number, END)
    assert [m.ID for m in proto.MemberListResponse.decode(body).members] == [
        caller.member.identity.member_id
    ]
    for method in (RAFT, FORWARD, SNAPSHOT, methods.METHOD_BY_NAME["KV.Put"].number):
        caller = Caller()
        caller.shake()
        assert caller.ask(method, b"") == []
        assert caller.session.is_closing, hex(method)


def test_version_1_of_the_protocol_is_for_one_member_list() -> None:
    number = methods.METHOD_BY_NAME["Cluster.MemberList"].number
    caller = Caller(members=3)
    caller._reader = FrameReader(1 << 16)
    caller.shake(1, 1)
    assert caller.shaken == (MAGIC, PROTOCOL_VERSION, 0)
    ((_, method, _, body),) = caller.send(frames.frame(1, number, 0, b""))
    assert len(proto.MemberListResponse.decode(body).members) == 3
    assert caller.send(frames.frame(2, number, 0, b"")) == []
    assert caller.session.is_closing
    for method in (INTRODUCE, RAFT, FORWARD, PING):
        caller = Caller(members=3)
        caller._reader = FrameReader(1 << 16)
        caller.shake(1, 1)
        assert caller.send(frames.frame(1, method, 0, b"")) == []
        assert caller.session.is_closing, hex(method)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(0, 255),
                          st.binary(max_size=40)), max_size=6), st.data())  # fmt: skip
def test_frames_come_out_as_they_went_in_whatever_the_pieces(sent: list[Any], data: Any) -> None:
    stream = b"".join(peer_frames.frame(*frame) for frame in sent)
    reader = PeerFrameReader(100)
    received = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        reader.feed(stream[:size])
        stream = stream[size:]
        received += list(reader)
    assert received == sent


@settings(deadline=None)
@given(st.binary(max_size=40), st.data())
def test_a_frame_with_any_bit_flipped_is_refused_at_once(body: bytes, data: Any) -> None:
    frame = peer_frames.frame(5, RAFT, 0, body)
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    damaged = bytearray(frame)
    damaged[bit // 8] ^= 1 << bit % 8
    reader = PeerFrameReader(1 << 26)
    reader.feed(bytes(damaged))
    with pytest.raises(ProtocolError, match="checksum"):
        list(reader)


def leader_and_follower() -> tuple[Caller, Any]:
    """A caller that plays a follower to the leader."""
    caller = Caller(members=3)
    leader = caller.world.leader
    assert leader is not None
    follower = next(node for node in caller.nodes if node is not leader)
    caller.member, caller.nodes[0] = leader.member, leader
    caller.session = Accepted(leader.member, lambda session: None)
    caller.shake()
    other = follower.member.identity
    caller.introduce(member_id=other.member_id, life=other.incarnation)
    return caller, follower


@pytest.mark.parametrize("method", [methods.KEEP_ALIVE, methods.TIME_TO_LIVE])
def test_a_follower_may_have_a_number_of_questions_without_an_answer(
    method: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_session, "MAX_QUESTIONS", 10)
    caller, _ = leader_and_follower()
    body = proto.LeaseKeepAliveRequest(ID=5).encode()
    frames_ = [peer_frames.frame(number, method, 0, body) for number in range(1, 31)]
    refused = caller.send(b"".join(frames_))
    assert [(number, flags) for number, _, flags, _ in refused] == [
        (number, END | ERROR) for number in range(11, 31)
    ]
    assert "too many requests" in proto.Error.decode(refused[0][3]).message
    caller.world.run(1.0)
    answers = caller.send(b"")
    assert [number for number, _, flags, _ in answers] == list(range(1, 11))
    assert len(caller.send(b"".join(frames_[:5]))) == 0  # It may ask again.


def test_a_damaged_entry_is_not_taken_from_a_follower() -> None:
    caller, follower = leader_and_follower()
    put = frames.frame(1, methods.PUT, 0, proto.PutRequest(key=b"k").encode())
    payload = encode_entry(follower.member_id, 1, [put])
    last = caller.member.raft.log.last
    damaged = payload[:-1] + b"x"
    assert caller.ask(FORWARD, encode_forward(caller.member.raft.term, damaged), 5) == []
    assert caller.session.is_closing and caller.member.raft.log.last == last


def test_a_damaged_entry_is_not_appended_by_a_follower() -> None:
    caller = Caller(members=3)
    leader = caller.world.leader
    assert leader is not None
    follower = next(node for node in caller.nodes if node is not leader)
    caller.member, caller.nodes[0] = follower.member, follower
    caller.session = Accepted(follower.member, lambda session: None)
    caller.shake()
    caller.introduce(member_id=leader.member_id, life=leader.member.identity.incarnation)
    raft = follower.member.raft
    last = raft.log.last
    put = frames.frame(1, methods.PUT, 0, proto.PutRequest(key=b"k").encode())
    payload = encode_entry(leader.member_id, 1, [put])
    for data in (payload[:-1] + b"x", payload):
        entry = Entry(raft.term, last + 1, 0, data)
        append = Message(
            APP, raft.id, leader.member_id, raft.term, last, raft.log.term(last), entries=[entry]
        )
        caller.session.receive(peer_frames.frame(0, RAFT, 0, encode_message(append)))
        assert raft.log.last == last + (data == payload)
        if data != payload:
            assert caller.session.is_closing
            caller.session.closed()
            caller.session = Accepted(follower.member, lambda session: None)
            caller._reader = PeerFrameReader(1 << 16)
            caller.shaken = None
            caller.shake()
            caller.introduce(member_id=leader.member_id, life=leader.member.identity.incarnation)


@settings(deadline=None)
@given(st.binary(max_size=40), st.data())
def test_an_entry_with_any_bit_flipped_is_refused(body: bytes, data: Any) -> None:
    put = frames.frame(1, methods.PUT, 0, proto.PutRequest(key=b"k", value=body).encode())
    payload = encode_entry(7, 9, [put, put])
    check_entry(payload)
    assert len(decode_requests(payload)) == 2
    bit = data.draw(st.integers(0, 8 * len(payload) - 1))
    damaged = bytearray(payload)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DecodeError):
        decode_requests(bytes(damaged))


def test_an_entry_of_version_1_is_read() -> None:
    put = frames.frame(1, methods.PUT, 0, proto.PutRequest(key=b"k").encode())
    header = struct.pack("<B3xIQQ", 1, 2, 7, 9)
    check_entry(header + put + put)
    assert read_header(header + put + put)[2:] == (7, 9)
    assert [waiter[2] for waiter in decode_requests(header + put + put)] == [methods.PUT] * 2
    for wrong in (header + put, header + put + put[:-1], header + put * 3):
        with pytest.raises(DecodeError):
            decode_requests(wrong)


class Offered:
    """A follower, and a snapshot that its leader offers it."""

    def __init__(self) -> None:
        self.caller = Caller(members=3)
        self.caller.world.run(0.5)
        leader = self.caller.world.leader
        assert leader is not None
        self.leader = leader
        self.follower = next(node for node in self.caller.nodes if node is not leader)
        self.incoming = self.follower.member.incoming
        self.image = Image(leader.member.state.store, leader.cluster_id, leader.member_id)

    def offer(self, to: Node, sender: Node, **changes: int) -> list[Any]:
        """What it is answered. `changes` are to the offer of the leader."""
        caller = self.caller
        caller.member, caller.nodes[0] = to.member, to
        caller.session = Accepted(to.member, lambda session: None)
        caller.shaken, caller._reader = None, PeerFrameReader(1 << 16)
        caller.shake()
        offer = proto.SnapshotOffer(
            index=self.image.index + 1,
            term=self.image.term,
            voters=[1, 2, 3],
            size_bytes=self.image.size_bytes,
            nonce=caller.world.rng.getrandbits(32),
            leader_term=to.member.raft.term,
        )
        for name, value in changes.items():
            setattr(offer, name, value)
        return caller.introduce(
            member_id=sender.member_id, life=sender.member.identity.incarnation, snapshot=offer
        )

    def send(self, data: bytes) -> list[Any]:
        return self.caller.ask(SNAPSHOT, data, 1)

    def refusal(self, answers: list[Any]) -> str:
        ((_, method, flags, body),) = answers
        assert (method, flags) == (SNAPSHOT, END | ERROR)
        assert self.incoming.offer is None and self.caller.session.is_closing
        text: str = proto.Error.decode(body).message
        return text


@pytest.mark.parametrize("lie", [1, 1 << 63])
def test_a_snapshot_that_is_not_what_was_offered_is_refused(lie: int) -> None:
    offered = Offered()
    offered.offer(offered.follower, offered.leader, index=offered.image.index + lie)
    answers = []
    offset = 0
    while piece := offered.image.read(offset):
        offset += len(piece)
        answers += offered.send(piece)
    assert "contradicts the offer" in offered.refusal(answers)


def head_of(offered: Offered, sizes: list[int]) -> bytes:
    """The beginning of a snapshot with segments of these sizes."""
    files = [{"name": "checkpoint", "size_bytes": 1}]
    files += [{"name": segment_name(n), "size_bytes": size} for n, size in enumerate(sizes, 1)]
    numbers = {"revision": 1, "total_keys": 1, "applied_term": offered.image.term}
    header = {**numbers, "applied_index": offered.image.index + 1, "files": files}
    text = json.dumps(header).encode()
    return b"ETCDLSNP" + struct.pack("<II", 1, len(text)) + text


def test_a_snapshot_that_is_larger_than_what_was_offered_is_refused() -> None:
    """There may be no space for it: only the offered size was compared with that."""
    offered = Offered()
    offered.offer(offered.follower, offered.leader)
    assert "contradicts the offer" in offered.refusal(offered.send(head_of(offered, [1 << 40])))


def test_a_snapshot_that_its_leader_does_not_offer_is_refused() -> None:
    """Otherwise any member could stop the one that the leader sends, or have a member wait for an
    index that does not exist."""
    offered = Offered()
    leader, follower = offered.leader, offered.follower
    other = next(node for node in offered.caller.nodes if node not in (leader, follower))
    for to, sender in ((follower, other), (leader, follower)):
        member = to.member
        answers = offered.offer(to, sender, index=1 << 62, leader_term=member.raft.term + 9)
        assert "another member leads now" in offered.refusal(answers[1:])
        assert not member.catch_up.is_behind and member.incoming.offer is None


def test_the_cost_of_a_piece_of_a_snapshot_does_not_depend_on_what_came_before() -> None:
    offered = Offered()
    head = head_of(offered, [0] * 300)
    size_bytes = -(-(len(head) + 1) // 512) * 512 + 32
    offered.offer(offered.follower, offered.leader, size_bytes=size_bytes)
    collected = offered.incoming._head
    for at in range(0, len(head), 100):
        offered.send(head[at : at + 100])
        assert offered.incoming._head is collected, "it is not copied for each piece"
    offered.send(b"")
    targets = offered.incoming._targets = Looked(offered.incoming._targets)
    offered.send(b"")
    assert len(targets) == 301 and targets.looks <= 2
    offered.send(b"x")
    offered.send(b"")
    assert offered.incoming._written == 301


class Looked(list[Any]):
    """Counts the items that are looked at."""

    looks = 0

    def __getitem__(self, at: Any) -> Any:
        self.looks += 1
        return super().__getitem__(at)

    def __iter__(self) -> Any:
        self.looks += len(self)
        return super().__iter__()


def test_a_member_has_a_few_connections_only() -> None:
    """Each may hold a frame that has begun, and without a limit one member could take the places of
    all others."""
    caller = Caller(members=3)
    other = caller.nodes[1].member.identity
    sessions = []
    for _ in range(2 * MAX_CONNECTIONS):
        caller.session, caller.shaken = Accepted(caller.member, lambda session: None), None
        caller._reader = PeerFrameReader(1 << 16)
        caller.shake()
        caller.introduce(member_id=other.member_id, life=other.incarnation)
        sessions.append(caller.session)
    assert [session.is_aborted for session in sessions] == [True] * 4 + [False] * 4
    for session in sessions:
        session.closed()
    assert other.member_id not in caller.member.peers._admitted, "nor is that of the real member"


def test_an_error_without_a_known_code_ends_the_connection() -> None:
    caller = Caller(members=3)
    link = caller.member.peers.links[caller.nodes[1].member_id]
    assert link.dial is not None
    answers: list[Any] = []
    link.dial.ask(FORWARD, b"", answers.append)
    request_id = max(link.dial._questions)
    body = proto.Error(code=99, message="?").encode()
    link.dial.receive(peer_frames.frame(request_id, FORWARD, END | ERROR, body))
    assert link.dial.is_closing


def test_a_follower_does_not_take_what_only_a_leader_may() -> None:
    caller = Caller(members=3)
    leader = caller.world.leader
    follower = next(node for node in caller.nodes if node is not leader)
    caller.member, caller.nodes[0] = follower.member, follower
    caller.session = Accepted(follower.member, lambda session: None)
    caller.shake()
    assert leader is not None
    caller.introduce(member_id=leader.member_id, life=leader.member.identity.incarnation)
    payload = bytes(8) + bytes([1, 0, 0, 0]) + bytes(20)
    ((_, method, flags, body),) = caller.ask(FORWARD, payload, 5)
    assert (method, flags) == (FORWARD, END | ERROR)
    assert proto.Error.decode(body).message == "etcdserver: not leader"


def test_who_is_silent_is_hung_up_on() -> None:
    caller = Caller()
    caller.shake()
    now = caller.member.clock()
    caller.session.tick(now + SILENCE_S - 0.1)
    assert not caller.session.is_aborted
    caller.session.tick(now + SILENCE_S + 0.1)
    assert caller.session.is_aborted


def test_who_is_slow_is_not_silent() -> None:
    """Megabytes are on their way to it, and every tick some more of them are."""
    caller = Caller()
    caller.shake()
    session = caller.session
    session.is_open = True
    now = caller.member.clock()
    session.send(1, RAFT, 0, bytes(10 << 20))
    for _ in range(100):
        now += SILENCE_S / 8
        session.outbox.unsent_bytes -= 1000
        session.tick(now)
    assert not session.is_aborted
    for _ in range(9):
        now += SILENCE_S / 8
        session.tick(now)
    assert session.is_aborted, "nothing moves any more"


def test_what_the_kernel_takes_is_no_sign_of_life() -> None:
    caller = Caller()
    caller.shake()
    session = caller.session
    now = caller.member.clock()
    for _ in range(9):
        session.send(1, RAFT, 0, b"a heartbeat")
        session.outbox.unsent_bytes = 0
        now += SILENCE_S / 8
        session.tick(now)
    assert session.is_aborted


def test_who_is_removed_while_connected_has_to_call_again() -> None:
    caller = Caller(members=3)
    caller.shake()
    node = caller.nodes[1].member_id
    caller.introduce(member_id=node, life=caller.nodes[1].member.identity.incarnation)
    assert caller.ask(PING, b"", 2)
    caller.member.state.membership.removed.add(node)
    assert caller.ask(PING, b"", 3) == []
    assert caller.session.is_closing


def test_messages_to_a_member_that_does_not_read_are_dropped_beyond_a_limit() -> None:
    caller = Caller(members=3)
    node = caller.nodes[1].member_id
    link = caller.member.peers.links[node]
    assert link.dial is not None
    entry = Entry(1, 1, 0, bytes(1 << 20))
    for _ in range(2 * (MAX_UNSENT_BYTES >> 20)):
        link.send(Message(APP, node, caller.member.identity.member_id, 1, entries=[entry]))
    assert MAX_UNSENT_BYTES < link.dial.outbox.unsent_bytes < MAX_UNSENT_BYTES + (2 << 20)


def test_heartbeats_that_cannot_be_handed_to_a_peer_are_counted() -> None:
    caller = Caller(members=3)
    metrics = caller.member.metrics
    node = caller.nodes[1]
    link = caller.member.peers.links[node.member_id]
    heartbeat = Message(HEARTBEAT, node.member_id, caller.member.identity.member_id, 1)
    link.send(heartbeat)
    assert metrics.heartbeats_failed == 0
    for _ in range(2 * (MAX_UNSENT_BYTES >> 20)):
        entry = Entry(1, 1, 0, bytes(1 << 20))
        link.send(
            Message(APP, node.member_id, caller.member.identity.member_id, 1, entries=[entry])
        )
    assert metrics.heartbeats_failed == 0
    link.send(heartbeat)
    assert metrics.heartbeats_failed == 1
    node.crash()
    caller.world.run(1)
    assert metrics.heartbeats_failed > 1


def test_questions_end_with_the_connection() -> None:
    caller = Caller(members=3)
    node = caller.nodes[1]
    answers: list[Any] = []
    caller.member.peers.ask(node.member_id, FORWARD, b"", answers.append)
    node.crash()
    caller.world.run(1)
    assert [answer.text for answer in answers] == [
        "etcdserver: request timed out, possibly due to connection lost"
    ]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=60) | st.tuples(st.integers(0, 255), st.binary(max_size=80)),
                max_size=8), st.booleans())  # fmt: skip
def test_hostile_bytes_close_the_connection_and_nothing_else(
    pieces: list[Any], introduces: bool
) -> None:
    caller = CALLERS[0]
    caller.session = Accepted(caller.member, lambda session: None)
    caller.shaken = None
    caller._reader = PeerFrameReader(1 << 26)
    caller.shake()
    if introduces:
        caller.introduce(member_id=caller.nodes[1].member_id)
    for piece in pieces:
        if isinstance(piece, tuple):
            method, body = piece
            if method == RAFT and len(body) > 8:
                body = bytes([HEARTBEAT, 0, 0, 0, 0, 0, 0, 0, *bytes(8)]) + body[16:]
            caller.ask(method, body, 7)
        else:
            caller.send(piece)
    caller.session.closed()
    assert caller.member.raft.leader


CALLERS = [Caller(members=3)]


def test_a_member_that_ends_each_connection_at_once_is_not_dialled_without_a_pause() -> None:
    """Each connection has two lines in the log."""
    caller = Caller(members=3)
    world, link = caller.world, Link(caller.member.peers.local, 99, [url("m9")])

    def dials(lives_s: float) -> int:
        count = 0
        for dial in link.dials(world.now, lambda session: None):
            count += 1
            link.opened()
            world.run(lives_s)
            dial.closed()
        return count

    assert sum((dials(0), world.run(0.01))[0] for _ in range(200)) < 15  # In two seconds.
    world.run(1)
    assert [dials(2), dials(0)] == [1, 1], "the loss of one that was stable may be a short outage"
    assert dials(0) == 0


def test_a_dialer_hangs_up_on_what_is_not_a_member() -> None:
    caller = Caller(members=3)
    link = Link(caller.member.peers.local, 99, [url("m9")])
    dial = Dial(link, lambda session: None)
    dial.connected()
    dial.receive(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert dial.is_closing
    dial = Dial(link, lambda session: None)
    dial.connected()
    dial.receive(
        HANDSHAKE.pack(MAGIC, peer_frames.VERSION, 0) + peer_frames.frame(9, RAFT, END, b"")
    )
    assert dial.is_closing
