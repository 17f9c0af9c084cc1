"""Nothing in the log can kill a member: from the FORWARD of another member, and from an entry that
is in the log already, to the end of apply, on every member alike, and again after a restart.

The requests are of all methods that an entry can hold, and of those that it cannot: structures with
extreme contents, and bytes that are a message only by chance. `-m long` does more of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import pytest
from rigs.wire import take_output
from sim.world import Node, World
from test_fuzz import message, mutated, state

from etcdlite import __version__, frames, methods, peer_frames, proto
from etcdlite.frames import HANDSHAKE, MAGIC
from etcdlite.methods import (
    ALARM_METHOD,
    MEMBER_CHANGE,
    METHOD_BY_NAME,
    PEER_METHODS,
    PUBLISH,
    PUT,
    TXN,
)
from etcdlite.peer import FORWARD, INTRODUCE, RAFT, SNAPSHOT, encode_forward, encode_message
from etcdlite.peer_frames import PeerFrameReader
from etcdlite.proto import DecodeError
from etcdlite.raft import Message
from etcdlite.raft_log import Entry
from etcdlite.replica.entry import encode_entry
from etcdlite.request import Waiter
from etcdlite.storage.steps import finish
from etcdlite.wire.peer_session import Accepted

ROUNDS = pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.long) for n in range(4, 60))]
)

NESTED = proto.TxnRequest()
for _ in range(45):
    NESTED = proto.TxnRequest(success=[proto.RequestOp(request_txn=NESTED)])

POISON = {
    "an operation without a request": (TXN, proto.TxnRequest(success=[proto.RequestOp()])),
    "the same in a branch within": (
        TXN,
        proto.TxnRequest(
            success=[
                proto.RequestOp(request_put=proto.PutRequest(key=b"x")),
                proto.RequestOp(
                    request_txn=proto.TxnRequest(failure=[proto.RequestOp()]),
                ),
            ]
        ),
    ),
    "a compare with an unknown target": (
        TXN,
        proto.TxnRequest(
            compare=[proto.Compare(key=b"k", target=9, result=7)],
            success=[proto.RequestOp(request_put=proto.PutRequest(key=b"x"))],
        ),
    ),
    "a transaction that only reads": (TXN, NESTED),
    "a put without a key": (PUT, proto.PutRequest(value=b"v")),
    "two puts of one key": (
        TXN,
        proto.TxnRequest(success=[proto.RequestOp(request_put=proto.PutRequest(key=b"x"))] * 2),
    ),
    "a lease with the id 0": (
        METHOD_BY_NAME["Lease.LeaseGrant"].number,
        proto.LeaseGrantRequest(ID=0, TTL=-1),
    ),
    "a checkpoint of a negative time": (
        methods.CHECKPOINT,
        proto.LeaseCheckpointRequest(
            checkpoints=[proto.LeaseCheckpoint(ID=70, remaining_TTL=-(2**63))]
        ),
    ),
    "a huge checkpoint": (
        methods.CHECKPOINT,
        proto.LeaseCheckpointRequest(
            checkpoints=[proto.LeaseCheckpoint(ID=70, remaining_TTL=5)] * 50_000
        ),
    ),
    "a name of a megabyte": (PUBLISH, proto.Member(ID=1, name="x" * (1 << 20))),
    "a membership change among writes": (
        MEMBER_CHANGE,
        proto.MemberChange(action=1, member=proto.Member(ID=1)),
    ),
    "a question": (METHOD_BY_NAME["KV.Range"].number, proto.RangeRequest(key=b"k")),
}

CHANGES = {
    "an unknown action": proto.MemberChange(action=9, member=proto.Member(ID=5)),
    "no member": proto.MemberChange(action=1),
    "no URL": proto.MemberChange(action=0, member=proto.Member(ID=5)),
    "a URL that is none": proto.MemberChange(
        action=0, member=proto.Member(ID=5, peerURLs=["http://[", "\x00"])
    ),
    "the id 0": proto.MemberChange(
        action=0, member=proto.Member(peerURLs=["http://x:2380"], isLearner=True)
    ),
}


class Cluster:
    """Three members, with keys and leases; and a hostile fourth that plays one of the followers."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self.nodes = self.world.found(3)
        self.leader = self.world.elect().member
        self.world.run(1.0)
        self.batch = 0
        setting = [
            (METHOD_BY_NAME["Lease.LeaseGrant"].number, proto.LeaseGrantRequest(ID=70, TTL=1000)),
            *((PUT, proto.PutRequest(key=key, value=b"v", lease=70)) for key in (b"a", b"ab")),
        ]
        self.leader.writes.propose_once(setting)
        self.world.run(0.5)

    @property
    def follower(self) -> Node:
        return next(node for node in self.nodes if not node.member.leads)

    def entry(self, requests: list[tuple[int, bytes]]) -> bytes:
        self.batch += 1
        parts = [frames.frame(1, method, 0, body) for method, body in requests]
        return encode_entry(self.follower.member_id, self.batch, parts)

    def session(
        self,
        victim: Node | None = None,
        follower: Node | None = None,
        offer: proto.SnapshotOffer | None = None,
    ) -> Accepted:
        """A connection to the leader, or another victim, that says it is the follower's, and that
        may bring a snapshot."""
        other = (follower or self.follower).member.identity
        member = self.leader if victim is None else victim.member
        session = Accepted(member, lambda session: None)
        introduction = proto.Introduction(
            version=__version__,
            cluster_id=other.cluster_id,
            member_id=other.member_id,
            to=member.identity.member_id,
            life=other.incarnation,
            snapshot=offer,
        )
        version = peer_frames.VERSION
        session.receive(HANDSHAKE.pack(MAGIC, version, version))
        session.receive(peer_frames.frame(1, INTRODUCE, 0, introduction.encode()))
        take_output(session)
        assert session.is_open
        return session

    def forward(self, session: Accepted, payload: bytes) -> str | None:
        """Its answer: the text of the error, or "" if it was taken. None: the connection ends."""
        body = encode_forward(self.leader.raft.term, payload)
        session.receive(peer_frames.frame(9, FORWARD, 0, body))
        reader = PeerFrameReader(1 << 26)
        reader.feed(take_output(session))
        for request_id, _, flags, answer in reader:
            if request_id == 9:
                return proto.Error.decode(answer).message if flags & frames.ERROR else ""
        assert session.is_closing
        return None

    def disarm(self) -> None:
        """Otherwise an alarm keeps everything else from having an effect."""
        for node, kind in self.leader.state.alarms:
            request = proto.AlarmRequest(action=2, memberID=node, alarm=kind)
            self.leader.writes.propose_once([(ALARM_METHOD, request)])

    def check(self) -> None:
        """All members serve, are equal, and are the same after a restart of all."""
        self.disarm()
        self.world.run(1.0)
        for _ in range(50):
            # A lease may just expire.
            if len({node.member.raft.log.applied for node in self.nodes}) == 1:
                break
            self.world.run(0.05)
        expected = facts(self.nodes[0])
        for node in self.nodes[1:]:
            assert facts(node) == expected
        for node in self.nodes:
            node.crash()
            node.start()
        self.world.elect()
        self.world.run(1.0)
        for node in self.nodes:
            assert facts(node) == expected
        leader = self.world.leader
        assert leader is not None
        leader.member.writes.propose_once([(PUT, proto.PutRequest(key=b"alive"))])
        self.world.run(0.5)
        for node in self.nodes:
            assert b"alive" in node.member.state.store.index.heads
        self.leader = leader.member


def facts(node: Node) -> Any:
    """All of a member's state."""
    assert node.is_up
    member = node.member.state
    store, lessor = member.store, member.lessor
    first = max(1, store.compacted)
    return (
        store.revision,
        [state(store, revision) for revision in range(first, store.revision + 1)],
        {i: (lessor.encode(i), lessor.keys(i)) for i in sorted(finish(lessor.lease_steps()))},
        sorted(member.alarms),
        {i: other.encode() for i, other in member.membership.members.items()},
        member.membership.removed,
        {
            name: dict(sorted(bucket.items()))
            for name, bucket in sorted(store.buckets.items())
            if bucket
        },
    )


@pytest.mark.parametrize("name", POISON)
def test_an_invalid_request_of_another_member_is_refused(name: str) -> None:
    cluster = Cluster(1)
    method, request = POISON[name]
    payload = cluster.entry([(PUT, b"\x0a\x01k"), (method, request.encode())])
    answer = cluster.forward(cluster.session(), payload)
    revision = cluster.leader.state.store.revision
    cluster.world.run(0.5)
    if name == "a compare with an unknown target":
        assert answer == ""  # As in etcd it compares nothing.
    else:
        assert answer
        assert cluster.leader.state.store.revision == revision
    cluster.check()


@pytest.mark.parametrize("name", POISON)
def test_an_invalid_request_in_the_log_has_no_effect(name: str) -> None:
    cluster = Cluster(2)
    method, request = POISON[name]
    payload = cluster.entry([(PUT, b"\x0a\x01k"), (method, request.encode()), (PUT, b"\x0a\x01l")])
    revision = cluster.leader.state.store.revision
    cluster.leader.raft.propose(payload)
    cluster.world.run(0.5)
    # What is around it has its effect.
    effective = 3 if name == "a compare with an unknown target" else 2
    assert cluster.leader.state.store.revision == revision + effective
    cluster.check()


@pytest.mark.parametrize("name", CHANGES)
def test_an_invalid_membership_change_in_the_log_has_no_effect(name: str) -> None:
    cluster = Cluster(3)
    cluster.leader.raft.propose_conf_change(
        cluster.entry([(MEMBER_CHANGE, CHANGES[name].encode()), (PUT, b"\x0a\x01k")])
    )
    cluster.world.run(0.5)
    assert len(cluster.leader.state.membership.members) == 3
    assert len(cluster.leader.raft.voters) == 3
    cluster.check()


def test_a_refused_entry_is_answered_to_the_client() -> None:
    """A follower whose checks are weaker than the leader's."""
    cluster = Cluster(4)
    failures = []

    class Session:
        def reply(self, *answer: Any) -> None:
            raise AssertionError

        def fail(self, request_id: int, method: int, failure: Any) -> None:
            failures.append(failure.text)

    request = proto.PutRequest(value=b"v")
    frame = frames.frame(1, PUT, 0, request.encode())
    follower = cluster.follower
    follower.member.writes.propose(Waiter(Session(), 1, PUT, request), frame)
    follower.turn()
    cluster.world.run(0.5)
    assert failures == ["etcdserver: key is not provided"]


def likely_put(rng: random.Random) -> Any:
    return proto.PutRequest(
        key=rng.choice((b"a", b"ab", b"b", b"c")),
        value=rng.randbytes(rng.choice((0, 3, 300))),
        lease=rng.choice((0, 0, 70, 71)),
        prev_kv=rng.random() < 0.3,
        ignore_lease=rng.random() < 0.1,
    )


def likely_request(rng: random.Random, method: int) -> Any:
    """One that has an effect most of the time."""
    if method == PUT:
        return likely_put(rng)
    if method != TXN:
        return message(rng, methods.REQUESTS[method])
    ops = []
    for _ in range(rng.choice((1, 2, 3))):
        op = message(rng, proto.RequestOp)
        ops.append(proto.RequestOp(request_put=likely_put(rng)) if rng.random() < 0.5 else op)
    compares = [message(rng, proto.Compare) for _ in range(rng.choice((0, 1, 2)))]
    return proto.TxnRequest(compare=compares, success=ops, failure=ops[:1])


def damaged(rng: random.Random, payload: bytes) -> bytes:
    """Its checksum is right most of the time: otherwise nothing else would be looked at."""
    payload = mutated(rng, payload)
    if rng.random() < 0.8:
        payload = payload[:4] + crc32(payload[8:]).to_bytes(4, "little") + payload[8:]
    return payload


def random_bodies(rng: random.Random, count: int) -> Iterator[tuple[int, bytes]]:
    rows = [row for row in methods.ROWS if row.route & methods.Route.WRITE]
    for _ in range(count):
        row = rng.choice(rows if rng.random() < 0.97 else methods.ROWS)
        number = rng.choice((row.number, PUT, TXN))
        if number == row.number or rng.random() < 0.3:
            request = message(rng, methods.REQUESTS[number])
        else:
            request = likely_request(rng, number)
        if rng.random() < 0.1 and number == methods.COMPACT:
            request.revision = rng.randrange(1, 20)
        body = request.encode()
        if rng.random() < 0.2:
            body = mutated(rng, body)
        if rng.random() < 0.05:
            body = rng.randbytes(rng.choice((1, 5, 20)))
        yield number, body


@ROUNDS
def test_whatever_is_forwarded_all_members_stay_equal(seed: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster(seed)
    taken = refused = ended = 0
    for _ in range(150):
        session = cluster.session()
        for _ in range(4):
            payload = cluster.entry(list(random_bodies(rng, rng.choice((1, 1, 2)))))
            if rng.random() < 0.05:
                payload = damaged(rng, payload)
            answer = cluster.forward(session, payload)
            taken += answer == ""
            refused += bool(answer)
            ended += answer is None
            if answer is None:
                break
        session.closed()
        cluster.disarm()
        cluster.world.run(0.05)
    assert taken > 40 and refused > 40 and ended > 20, (taken, refused, ended)
    assert cluster.leader.state.store.revision > 40
    cluster.check()


@ROUNDS
def test_whatever_is_in_the_log_all_members_stay_equal(seed: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster(seed)
    for _ in range(150):
        payload = cluster.entry(list(random_bodies(rng, rng.choice((1, 1, 3)))))
        if rng.random() < 0.2:
            payload = payload[:24] + mutated(rng, payload[24:])
            # With a wrong one no follower appends it.
            payload = payload[:4] + crc32(payload[8:]).to_bytes(4, "little") + payload[8:]
        cluster.leader.raft.propose(payload)
        cluster.disarm()
        if rng.random() < 0.1:
            change = message(rng, proto.MemberChange)
            if change.member is not None and rng.random() < 0.7:
                # One that has a chance: a learner, as a voter that does not exist takes the quorum.
                change.member.peerURLs = [f"http://x{rng.randrange(9)}:2380"]
            if change.member is not None:
                change.member.isLearner = True
            change.action = rng.choice((0, 0, 1, 2, change.action))
            body = change.encode()
            if rng.random() < 0.2:
                body = mutated(rng, body)
            try:
                decoded = proto.MemberChange.decode(body).member
            except DecodeError:
                decoded = None
            if decoded is None or decoded.isLearner:
                entry = cluster.entry([(MEMBER_CHANGE, body)])
                cluster.world.run(0.1)
                cluster.leader.raft.propose_conf_change(entry)
        cluster.world.run(0.05)
    cluster.check()


def likely_message(rng: random.Random, cluster: Cluster, victim: Node, other: Node) -> Message:
    """A raft message of `other` with numbers that are near the right ones most of the time."""
    raft = victim.member.raft

    def near(*numbers: int) -> int:
        return rng.choice((*numbers, *numbers, *numbers, 0, 1, 2**63, 2**64 - 1))

    index = near(raft.log.last, raft.log.last + 1, raft.log.last - 1, raft.log.committed)
    put = cluster.entry([(PUT, b"\x0a\x01k")])
    change = cluster.entry([(MEMBER_CHANGE, rng.choice(list(CHANGES.values())).encode())])
    entries = [
        Entry(near(raft.term, raft.term - 1), index + 1, rng.choice((0, 0, 1, 255)), data)
        for data in rng.choices((b"", put, change, b"x"), k=rng.choice((0, 0, 1, 3)))
    ]
    return Message(
        kind=rng.choice((*range(1, 13), *range(1, 13), 0, 13, 200)),
        to=victim.member_id,
        sender=other.member_id,
        term=near(raft.term, raft.term, raft.term + 1, raft.term - 1),
        index=index % 2**64,
        log_term=near(raft.term, raft.term - 1),
        commit=near(raft.log.committed, raft.log.last, raft.log.last + 1),
        entries=entries,
        reject=rng.random() < 0.3,
        hint=near(raft.log.last, raft.log.committed),
        context=rng.choice((b"", b"transfer", bytes(8), rng.randbytes(16))),
    )


def likely_frame(rng: random.Random, cluster: Cluster, victim: Node, other: Node) -> bytes:
    """A frame of `other`, which has introduced itself."""
    method, body = RAFT, b""
    match rng.choice(("raft", "raft", "raft", "question", "snapshot", "ping")):
        case "raft":
            body = encode_message(likely_message(rng, cluster, victim, other))
        case "question":
            method = rng.choice(sorted(PEER_METHODS))
            body = message(rng, methods.REQUESTS[method]).encode()
        case "snapshot":
            method, body = SNAPSHOT, rng.choice((b"", rng.randbytes(40), bytes(16)))
        case _:
            method, body = frames.PING, rng.randbytes(rng.choice((0, 8, 16, 40)))
    body = mutated(rng, body) if rng.random() < 0.1 else body
    return peer_frames.frame(rng.randrange(1, 99), method, 0, body)


@ROUNDS
def test_whatever_a_member_says_no_other_one_ends(seed: int) -> None:
    """It may lead, and have them lose what they have: that is for consensus among members that are
    not hostile. But it cannot end their processes."""
    rng = random.Random(seed)
    refused = 0
    for _ in range(4):
        cluster = Cluster(rng.getrandbits(32))
        for _ in range(20):
            victim, other = rng.sample(cluster.nodes, 2)
            offer = message(rng, proto.SnapshotOffer) if rng.random() < 0.2 else None
            session = cluster.session(victim, other, offer)
            for _ in range(4):
                session.receive(likely_frame(rng, cluster, victim, other))
                cluster.world.run(rng.choice((0.001, 0.01, 0.2)))
                take_output(session)
            refused += session.is_closing
            session.closed()
        cluster.world.run(1.0)
        assert all(node.is_up for node in cluster.nodes)
    assert refused > 10
