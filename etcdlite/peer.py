"""The connections between members, sans-IO.

Every member dials every other one and keeps the connection: the dialer sends its raft messages and
its questions over it, and the other side answers the questions. So two members have two
connections, each with one direction of messages. A snapshot for a member that is far behind takes a
connection of its own, so that messages do not wait for it.

The framing on the peer port is that of `peer_frames.py`, version 2 of the protocol, with checksums.
A frame that fails them costs the connection, with a line in the log, and nothing else. Version 1,
the native protocol of `docs/protocol.md`, is for one question: the MemberList of a member that
joins.

After the handshake the dialer introduces itself. Before that it may only ask for the MemberList,
which a member that joins needs. All integers are little-endian.

    0xE8 INTRODUCE  `Introduction`: the cluster id, the ids of the caller and of the member that it
                    means to reach, the caller's incarnation and where it started. Answered with
                    `Welcome`, which has the latter two of the other side, or with an ERROR that
                    says what does not fit, and the end of the connection.
    0xE9 RAFT       one raft message, as below. Never answered. The accepting side sends them too,
                    while it has no connection of its own to the other member.
    0xEA FORWARD    8 bytes: a term; then the payload of an entry (`replica/entry.py`) to be
                    proposed by the leader of that term. Answered empty when it is in the leader's
                    log; with an ERROR, it is not and never will be.
    0xEB SNAPSHOT   on a connection whose Introduction offers a snapshot: the next bytes of the file
                    that `snap.py` describes, from where `Welcome` says. When the whole of it is
                    received, checked and synced, answered empty.
    0xF0 PING       the position of the dialer (`replica/rollback.py`): 8 bytes of term, 8 of index.
                    Answered with its own body. Without an answer for `SILENCE_S` the dialer hangs
                    up; so does the other side without any frame for that long.
    methods         unary requests of the native protocol that only the leader can answer, or that
                    compare members.

A raft message (see `raft.Message`; its sender and receiver follow from the connection):

     0  1  kind           1  1  flags: 1 reject
     2  2  length of the context
     4  4  number of entries
     8  8  term          16  8  index
    24  8  log term      32  8  commit
    40  8  hint
    48     the context, then the entries; their indexes follow `index` without a gap
           0  8  term     8  1  kind     9  3  zero    12  4  length    16  the data

Invariants: what a connection carries arrives in order, whole and once, or not at all; no message is
taken from a member of another cluster, a removed member, or one that means another member.

`wire/peer_session.py` is the accepting end, which answers.

Limits: `MAX_FRAME_BYTES`; `MAX_UNSENT_BYTES` wait to be sent to one member, then messages are
dropped, as by a bad network, and consensus is told; questions are answered, or fail, within
`ANSWER_TIMEOUT_S`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Protocol

from etcdlite import frames, log, peer_frames, proto
from etcdlite.channel import Channel
from etcdlite.errors import CODE_NAMES, DATA_LOSS, EtcdError, error
from etcdlite.methods import MEMBER_LIST
from etcdlite.metrics import Peer as PeerMetrics
from etcdlite.options import Options
from etcdlite.peer_frames import PeerFrameReader
from etcdlite.proto import DecodeError
from etcdlite.raft import HEARTBEAT, Message, MessageRejected
from etcdlite.raft_log import Entry
from etcdlite.replica.checks import check_member, check_peer_urls
from etcdlite.replica.entry import check_entry
from etcdlite.replica.rollback import RollbackCheck
from etcdlite.replica.state import State
from etcdlite.request import Done
from etcdlite.session import Session
from etcdlite.snap import Image
from etcdlite.storage.layout import DataDamaged
from etcdlite.versions import Version, incompatibility, parse, program_version

INTRODUCE = 0xE8
RAFT = 0xE9
FORWARD = 0xEA
SNAPSHOT = 0xEB

MAX_FRAME_BYTES = 64 << 20
"""An append has at most 1 MiB of entries, or one that is larger, of at most 32 MiB."""

MAX_UNKNOWN_FRAME_BYTES = 64 << 10
"""The same before the two members know each other."""

MAX_CONTEXT_BYTES = 64
"""The context of a raft message, which its receiver may keep. The longest has 16 bytes."""

MAX_CONNECTIONS = 4
"""Connections that one member may have open to this one. It needs one, and one for a snapshot; for
a few seconds earlier ones may be left."""

MAX_UNSENT_BYTES = 32 << 20
"""More than consensus has in flight to one member."""

PING_INTERVAL_S = 0.5
SILENCE_S = 3.0
ALIVE_S = 1.5
"""A member that was heard from this recently counts as alive."""
SNAPSHOT_SILENCE_S = 30.0
"""As `SILENCE_S`, for the connection of a snapshot, which may be slow."""
ANSWER_TIMEOUT_S = 5.0
RETIRE_S = 1.0
"""How long to wait for the answers of a removed member."""
SNAPSHOT_REDIAL_S = 0.5
SNAPSHOT_KEPT_S = 60.0
"""How long a snapshot, which keeps files open, waits for a connection."""
SNAPSHOT_PAUSE_S = 5.0
"""Pause before a snapshot is sent to a member that refused one."""
REDIAL_MIN_S = 0.05
REDIAL_MAX_S = 0.25
"""The pause before the next attempt to connect doubles, from the minimum to the maximum."""

INQUIRY_PAUSE_S = 0.2
"""Between two questions for members that are not known here."""
MAX_VOUCHED = 100

LINES_PER_S = 0.1
"""How often a repeated line is logged."""

_MESSAGE = struct.Struct("<BBHIQQQQQ")
_ENTRY = struct.Struct("<QB3xI")
_TERM = struct.Struct("<Q")
_REJECT = 1


class PeerEvents(Protocol):
    """What the connections between members tell the member."""

    def on_message(self, message: Message) -> None:
        """A raft message arrived."""

    def on_peer_opened(self, node: int) -> None:
        """Messages can be sent to that member (again)."""

    def on_peer_died(self, node: int) -> None:
        """The process of that member is dead."""

    def on_unreachable(self, node: int) -> None:
        """A message to that member may be lost."""

    def on_snapshot_sent(self, node: int, is_taken: bool) -> None:
        """That member has taken the snapshot that was sent to it, or it never will."""

    def on_removed(self, node: int) -> None:
        """That member says that this one was removed from the cluster."""


class Local:
    """What every connection between members knows of this side."""

    def __init__(
        self, state: State, events: PeerEvents, rollback: RollbackCheck, options: Options
    ) -> None:
        self.identity = state.identity
        self.events = events
        self.metrics = state.metrics
        self.clock = state.clock
        self.limits = state.store.limits
        self.rollback = rollback
        self.cluster_version = state.cluster_version
        self.version = options.version
        self.is_stopping = False
        """This member shuts down: the loss of a connection is not logged any more."""

    def checked_version(self, text: str) -> Version:
        """The version of another member's program, from what it sent. Raises ProtocolError if
        that is not a version, or if the cluster cannot have a member of that version."""
        try:
            version = parse(text)
        except ValueError as failure:
            raise frames.ProtocolError(str(failure)) from None
        if why := incompatibility(version, self.cluster_version.version):
            raise frames.ProtocolError(why)
        return version


def encode_message(message: Message) -> bytes:
    """The body of a RAFT frame."""
    context = message.context
    parts = [
        _MESSAGE.pack(
            message.kind,
            _REJECT if message.reject else 0,
            len(context),
            len(message.entries),
            message.term,
            message.index,
            message.log_term,
            message.commit,
            message.hint,
        ),
        context,
    ]
    for term, _, kind, data in message.entries:
        parts += (_ENTRY.pack(term, kind, len(data)), data)
    return b"".join(parts)


def encode_forward(term: int, payload: bytes) -> bytes:
    return _TERM.pack(term) + payload


def decode_forward(body: bytes) -> tuple[int, bytes]:
    """Term and payload. Raises ProtocolError."""
    if len(body) < _TERM.size:
        raise frames.ProtocolError("a forwarded entry has no term")
    return _TERM.unpack_from(body)[0], body[_TERM.size :]


def decode_message(body: bytes, sender: int, to: int) -> Message:
    """Raises ProtocolError."""
    try:
        kind, flags, context_bytes, count, term, index, log_term, commit, hint = (
            _MESSAGE.unpack_from(body)
        )
        if context_bytes > MAX_CONTEXT_BYTES:
            raise frames.ProtocolError(f"a raft message has a context of {context_bytes} bytes")
        at = _MESSAGE.size + context_bytes
        context = body[_MESSAGE.size : at]
        entries = []
        for number in range(index + 1, index + 1 + count):
            entry_term, entry_kind, length = _ENTRY.unpack_from(body, at)
            at += _ENTRY.size
            entries.append(Entry(entry_term, number, entry_kind, body[at : at + length]))
            at += length
    except struct.error as failure:
        raise frames.ProtocolError(f"a raft message is cut off ({failure})") from failure
    if at != len(body):
        raise frames.ProtocolError(f"a raft message has {len(body)} bytes instead of {at}")
    rejects = bool(flags & _REJECT)
    return Message(
        kind, to, sender, term, index, log_term, commit, entries, rejects, hint, None, context
    )


class PeerConnection(Session):
    """What both ends of a connection share; it is open when both sides know each other."""

    protocol = "peer"
    is_member = True
    is_served_to_the_end = True
    silence_s = SILENCE_S
    stranger = "; check the peer URLs"
    """A hint for the error about another protocol: what the other side may be."""

    def __init__(self, local: Local, on_output: Callable[[Any], None]) -> None:
        super().__init__(on_output, local.clock)
        # A slow connection is allowed; `tick` finds one on which nothing moves.
        self.outbox.min_bytes_per_s = 0
        self.local = local
        self.metrics = PeerMetrics()
        """The metrics of the other member, once its id is known."""
        self.heard_at = local.clock()
        """When the other side was last heard from."""
        self.longest_silence_s = 0.0
        """The longest time between two receipts since `Peers.hear` last reset this."""
        self._queued_bytes = 0
        self._taken_bytes = 0
        """Bytes sent since the beginning, as of the last tick; 0 if nothing was unsent then."""
        self.version = peer_frames.VERSION
        """The version of the protocol."""
        self._reader: frames.FrameReader = PeerFrameReader(MAX_UNKNOWN_FRAME_BYTES)
        self._opening = b""
        self._has_handshake = False
        self.channel: Channel | None = None
        """Set by the owner of the socket if the connection is not plain."""

    # Input.

    def receive(self, data: bytes) -> None:
        """Process bytes from the other side."""
        if self.is_closing:
            return
        now = self.local.clock()
        if now - self.heard_at > self.longest_silence_s:
            self.longest_silence_s = now - self.heard_at
        self.heard_at = now
        try:
            if not self._has_handshake:
                data = self._opening + data
                if len(data) < frames.HANDSHAKE.size:
                    self._opening = data
                    return
                self._check_handshake(*frames.HANDSHAKE.unpack_from(data))
                self._has_handshake = True
                data = data[frames.HANDSHAKE.size :]
                self._opening = b""
            self._reader.feed(data)
            for request_id, method, flags, body in self._reader:
                self._take(request_id, method, flags, body)
                if self.is_closing:
                    return
        except (frames.ProtocolError, DecodeError, MessageRejected) as fault:
            self._hang_up(f"it violates the protocol: {fault}")

    def _check_handshake(self, magic: bytes, lowest: int, highest: int) -> None:
        if magic == frames.SECRET_MAGIC:
            raise frames.ProtocolError(
                "the other member has a secret, this one has none: set peer-secret-file here, too"
            )
        if magic != frames.MAGIC:
            raise frames.ProtocolError(f"it speaks another protocol{self.stranger}")
        self._check_versions(lowest, highest)

    def _check_versions(self, lowest: int, highest: int) -> None:
        """`lowest` and `highest`: the versions of the protocol that the other side offers."""
        raise NotImplementedError

    def _take(self, request_id: int, method: int, flags: int, body: bytes) -> None:
        raise NotImplementedError

    def opened(self) -> None:
        """Both sides know each other."""
        self.is_open = True
        self._reader.max_frame_bytes = MAX_FRAME_BYTES

    def _hang_up(self, why: str) -> None:
        """Close once everything is sent."""
        log.warn("closing a connection to a peer", f"peer {why}", why=why)
        self.is_closing = True
        self.outbox.wake()

    # Output.

    def send(self, request_id: int, method: int, flags: int, body: bytes) -> None:
        if self.version == peer_frames.VERSION:
            head = peer_frames.header(request_id, method, flags, body)
        else:
            head = frames.FRAME.pack(len(body) + frames.MIN_FRAME_LENGTH, request_id, method, flags)
        self._append(head)
        self._append(body)

    def _append(self, data: bytes) -> None:
        self.outbox.append(data)
        self._queued_bytes += len(data)

    def send_message(self, message: Message) -> bool:
        """Send a raft message; False if it is dropped because too much waits already."""
        node = message.to
        unsent_bytes = self.outbox.unsent_bytes
        if unsent_bytes > MAX_UNSENT_BYTES:
            log.warn(
                "dropped a message to a peer: too much waits to be sent",
                f"slow {node:x}",
                LINES_PER_S,
                remote_peer_id=f"{node:x}",
                unsent_bytes=unsent_bytes,
            )
            return False
        body = encode_message(message)
        self.metrics.sent_bytes += len(body)
        self.send(0, RAFT, 0, body)
        return True

    def take_message(self, body: bytes, sender: int) -> None:
        """Process a raft message. Raises ProtocolError, DecodeError and MessageRejected."""
        self.metrics.received_bytes += len(body)
        message = decode_message(body, sender, self.local.identity.member_id)
        for entry in message.entries:
            check_entry(entry.data)
        self.local.events.on_message(message)

    # The rest of a session.

    @property
    def is_idle(self) -> bool:
        return True

    def tick(self, now: float) -> None:
        super().tick(now)
        # On a slow connection answers wait behind other output. The other side is alive as long as
        # output moves: a full kernel buffer gets room only when the other side reads.
        unsent_bytes = self.outbox.unsent_bytes
        taken = self._queued_bytes - unsent_bytes
        if 0 < self._taken_bytes < taken:
            self.heard_at = now
        self._taken_bytes = taken if unsent_bytes else 0
        if now - self.heard_at > self.silence_s:
            self.abort("the other member is silent")


class Dial(PeerConnection):
    """A connection that this member opens; `Link` keeps one, a snapshot has one."""

    reads_always = True

    def __init__(
        self, link: Link, on_output: Callable[[Any], None], shipment: Shipment | None = None
    ) -> None:
        super().__init__(link.local, on_output)
        self.link = link
        self.shipment = shipment
        self.metrics = link.metrics
        self._questions: dict[int, tuple[float, Done]] = {}
        self._next_id = 1
        self._next_ping_at = 0.0
        self._retires_at = math.inf

    def connected(self) -> None:
        """The connection is established: send the handshake and the introduction."""
        identity = self.local.identity
        self._append(frames.HANDSHAKE.pack(frames.MAGIC, peer_frames.VERSION, peer_frames.VERSION))
        introduction = proto.Introduction(
            cluster_id=identity.cluster_id,
            member_id=identity.member_id,
            to=self.link.node,
            version=program_version(self.local.version),
            snapshot=self.shipment.offer if self.shipment is not None else None,
            life=identity.incarnation,
            recovered=self.local.rollback.recovered,
        )
        self.ask(INTRODUCE, introduction.encode(), self._introduced)

    def ask(
        self, method: int, body: bytes, done: Done, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        """Send a question. `done` gets the answer, or after `timeout_s` an error."""
        request_id = self._next_id
        self._next_id = request_id % 0xFFFF_FFFF + 1
        self._questions[request_id] = (self.local.clock() + timeout_s, done)
        self.send(request_id, method, 0, body)

    def _check_versions(self, lowest: int, highest: int) -> None:
        if lowest != peer_frames.VERSION:
            raise frames.ProtocolError(
                f"the other member does not speak version {peer_frames.VERSION} of the protocol; "
                "update the older one of the two"
            )

    def _take(self, request_id: int, method: int, flags: int, body: bytes) -> None:
        if method == frames.HELLO:
            # The answer to the introduction says whether both members match.
            self.link.version = self.local.checked_version(proto.Hello.decode(body).version)
            return
        if method == RAFT and self.is_open:
            self.take_message(body, self.link.node)
            return
        question = self._questions.pop(request_id, None)
        if question is None:
            raise frames.ProtocolError(f"an answer to request {request_id}, which was not asked")
        if flags & frames.ERROR:
            failure = proto.Error.decode(body)
            if failure.code not in CODE_NAMES or not failure.code:
                raise frames.ProtocolError(f"an error with code {failure.code}")
            question[1](EtcdError(failure.code, failure.message))
        else:
            question[1](body)

    def _introduced(self, answer: bytes | EtcdError) -> None:
        if isinstance(answer, EtcdError):
            if not self.is_closing:
                self.link.refused(answer)
                self.is_closing = True
            return
        welcome = proto.Welcome.decode(answer)
        rollback, node = self.local.rollback, self.link.node
        refusal = rollback.check(node, welcome.life, welcome.recovered)
        rollback.accepted_by(node)
        if refusal is not None:
            # It learns why when it calls this member.
            self._hang_up(refusal.text)
            return
        self.opened()
        self.welcomed(welcome.offset)

    def welcomed(self, offset: int) -> None:
        self.link.opened()

    def retire(self) -> None:
        """The other member was removed. Close once it has answered the open questions (its own
        removal may be one), or after `RETIRE_S`."""
        self._retires_at = self.local.clock() + RETIRE_S
        if not self.is_open:
            self.abort(_REMOVED)

    def tick(self, now: float) -> None:
        super().tick(now)
        if self.is_closing:
            return
        if self._retires_at < math.inf and (not self._questions or now >= self._retires_at):
            self.abort(_REMOVED)
            return
        for request_id, (until, done) in list(self._questions.items()):
            if until <= now:
                # The answer may still come, and is ignored.
                self._questions[request_id] = (math.inf, lambda answer: None)
                done(error("Timeout"))
        if self.is_open and now >= self._next_ping_at and self._retires_at == math.inf:
            self._next_ping_at = now + PING_INTERVAL_S
            self.ask(frames.PING, self.local.rollback.report(), partial(self._pong, now))

    def _pong(self, asked_at: float, answer: bytes | EtcdError) -> None:
        if not isinstance(answer, EtcdError):
            self.link.round_trip_s = took_s = self.local.clock() - asked_at
            self.metrics.round_trip_s.observe(took_s)

    def closed(self) -> None:
        super().closed()
        questions, self._questions = self._questions, {}
        for _, done in questions.values():
            done(error("TimeoutDueToConnectionLost"))
        self.link.lost(self)


class SnapshotDial(Dial):
    """A connection that sends one snapshot. A piece is read when there is room for it."""

    silence_s = SNAPSHOT_SILENCE_S

    def __init__(self, link: Link, on_output: Callable[[Any], None], shipment: Shipment) -> None:
        super().__init__(link, on_output, shipment)
        self._image = shipment.image
        self._offset = 0
        self._allowance = 0.0
        self._refilled_at = link.local.clock()
        self._is_sending = False

    def welcomed(self, offset: int) -> None:
        self._offset = offset
        self._is_sending = True
        # The answer comes when the whole snapshot is received.
        self._questions[SNAPSHOT_ID] = (math.inf, self._taken)

    @property
    def has_more(self) -> bool:
        return (
            self._is_sending and not self.is_closing and not self.is_blocked and self._allowance > 0
        )

    def produce(self) -> None:
        while self.has_more:
            try:
                piece = self._image.read(self._offset)
            except (OSError, DataDamaged) as failure:
                self._taken(EtcdError(DATA_LOSS, f"etcdlite: cannot read it: {failure}"))
                return
            if not piece:
                self._is_sending = False
                return
            self._offset += len(piece)
            self._allowance -= len(piece)
            self.send(SNAPSHOT_ID, SNAPSHOT, 0, piece)

    def tick(self, now: float) -> None:
        super().tick(now)
        bytes_per_s = self.local.limits.snapshot_bytes_per_s
        self._allowance = min(
            bytes_per_s * 0.25, self._allowance + (now - self._refilled_at) * bytes_per_s
        )
        self._refilled_at = now
        if self.has_more:
            self.produce()

    def _taken(self, answer: bytes | EtcdError) -> None:
        """The other side has received the whole snapshot, or never will: it refuses it, or this
        side cannot read it."""
        if isinstance(answer, EtcdError):
            fields = {"error": answer.text, "remote_peer_id": f"{self.link.node:x}"}
            log.warn("the snapshot was not taken", **fields)
        if self.link.shipment is self.shipment:
            self.link.snapshot_over(not isinstance(answer, EtcdError))
        self.is_closing = True
        self.outbox.wake()

    def closed(self) -> None:
        # The snapshot is not answered: the next connection continues it.
        self._questions.pop(SNAPSHOT_ID, None)
        super().closed()


SNAPSHOT_ID = 1
"""The request id of the introduction. The snapshot is answered under the same id."""


class Shipment:
    """A snapshot on its way to another member, over several connections if one breaks."""

    def __init__(self, image: Image, offer: proto.SnapshotOffer, now: float) -> None:
        self.image = image
        self.offer = offer
        """Describes it."""
        self.dial: SnapshotDial | None = None
        self.next_dial_at = -math.inf
        self.until = now + SNAPSHOT_KEPT_S
        """It is given up if there is no connection for it by this time."""

    def lost(self, dial: Dial, now: float) -> None:
        """A connection ended before the snapshot was received: another one continues it."""
        if dial is not self.dial:
            return
        self.dial = None
        self.next_dial_at = now + SNAPSHOT_REDIAL_S
        if dial.is_open:
            self.until = now + SNAPSHOT_KEPT_S


class Link:
    """What this member keeps for each other one: the connection, when to dial again, and the
    snapshot to send, if there is one."""

    def __init__(self, local: Local, node: int, urls: list[str]) -> None:
        self.local = local
        self.node = node
        self._hex = f"{node:x}"
        self.urls = urls
        self.dial: Dial | None = None
        self.shipment: Shipment | None = None
        self.next_snapshot_at = -math.inf
        """After a refusal, no snapshot is sent before this time."""
        self.version: Version | None = None
        """Of its program, as it said last; None if it never did."""
        self.since: float | None = None
        """The time since when messages can be sent; None while they cannot."""
        self.round_trip_s = 0.0
        self.metrics = local.metrics.peers[node]
        self.failures = 0
        self._next_dial_at = 0.0
        self._redial_s = REDIAL_MIN_S
        self._url = 0
        self._was_lost = False

    # For the owner: when and where to dial.

    def dials(self, now: float, on_output: Callable[[Any], None]) -> list[Dial]:
        """The connections to make now; the owner dials each at `url`."""
        made: list[Dial] = []
        if self.dial is None and now >= self._next_dial_at:
            self.dial = Dial(self, on_output)
            made.append(self.dial)
        shipment = self.shipment
        if shipment is not None and shipment.dial is None:
            if now > shipment.until:
                self.snapshot_over(False)
            elif self.since is not None and now >= shipment.next_dial_at:
                shipment.dial = SnapshotDial(self, on_output, shipment)
                made.append(shipment.dial)
        return made

    @property
    def url(self) -> str:
        return self.urls[self._url % len(self.urls)]

    def unreachable(self, dial: Dial, why: str, is_refused: bool) -> None:
        """An attempt to connect failed. `is_refused`: the machine answers, but no process listens
        on the port."""
        dial.outbox.close()  # No connection will. It refers to the dial, and the dial to it.
        if dial.shipment is not None:
            dial.shipment.lost(dial, self.local.clock())
        if dial is not self.dial:
            return
        self.dial = None
        self.failures += 1
        key, fields = f"unreachable {self._hex} {why}", {"remote-peer-id": self._hex}
        if not self.local.is_stopping:
            log.warn("cannot reach a peer", key, LINES_PER_S, error=why, url=self.url, **fields)
        self._pause()
        if is_refused and self._was_lost:
            # Its connection ended, and no process listens on its port: it is dead.
            self._was_lost = False
            self.local.events.on_peer_died(self.node)

    def _pause(self) -> None:
        self._url += 1
        self._next_dial_at = self.local.clock() + self._redial_s
        self._redial_s = min(2 * self._redial_s, REDIAL_MAX_S)

    def dial_soon(self) -> None:
        """The other side has connected, so it is probably reachable."""
        self._next_dial_at = 0.0
        self._redial_s = REDIAL_MIN_S

    # For the connection.

    def opened(self) -> None:
        self.since = self.local.clock()
        self._redial_s = REDIAL_MIN_S
        self._was_lost = False
        own_id = f"{self.local.identity.member_id:x}"
        fields = {"local-member-id": own_id, "remote-peer-id": self._hex}
        if self.dial is not None and self.dial.channel is not None:
            fields["channel"] = self.dial.channel.description
        log.info("established connection to peer", url=self.url, **fields)
        self.local.events.on_peer_opened(self.node)

    def refused(self, failure: EtcdError) -> None:
        if failure.name == "MemberRemoved":
            self.local.events.on_removed(self.node)
        elif failure.code == DATA_LOSS:
            self.local.rollback.refused(failure.text)
        else:
            what, key = "a peer refused this member", f"refused by {self._hex}"
            own_id = f"{self.local.identity.member_id:x}"
            fields = {"remote-peer-id": self._hex, "local-member-id": own_id}
            log.error(what, key, LINES_PER_S, why=failure.text, url=self.url, **fields)

    def lost(self, dial: Dial) -> None:
        """A connection ended."""
        if dial.shipment is not None:
            dial.shipment.lost(dial, self.local.clock())
        if dial is not self.dial:
            return
        self.dial = None
        if self.since is None:
            self.failures += 1
            self._pause()
            return
        self._next_dial_at = self.since + REDIAL_MAX_S  # At once if it was open for longer.
        self.since = None
        self._was_lost = True
        if not self.local.is_stopping:
            log.warn("lost connection to peer", remote_peer_id=self._hex)
        self.local.events.on_unreachable(self.node)

    # For the member.

    def send(self, message: Message) -> None:
        dial = self.dial
        if dial is None or not dial.is_open or not dial.send_message(message):
            self.metrics.send_failures += 1
            if message.kind == HEARTBEAT:
                self.local.metrics.heartbeats_failed += 1
            self.local.events.on_unreachable(self.node)

    def send_snapshot(self, image: Image, offer: proto.SnapshotOffer) -> None:
        """Send a snapshot, over several connections if one breaks. `offer` describes it."""
        self.drop_snapshot("there is a newer snapshot to send")
        self.shipment = Shipment(image, offer, self.local.clock())

    def drop_snapshot(self, why: str) -> None:
        """Stop sending the snapshot."""
        if self.shipment is not None:
            if self.shipment.dial is not None:
                self.shipment.dial.abort(why)
            self.shipment.image.close()
            self.shipment = None

    def snapshot_over(self, taken: bool) -> None:
        """The snapshot was received, refused or given up."""
        if self.shipment is not None:
            self.shipment.image.close()
            self.shipment = None
            if not taken:
                self.next_snapshot_at = self.local.clock() + SNAPSHOT_PAUSE_S
            self.local.events.on_snapshot_sent(self.node, taken)

    def close(self) -> None:
        """The member is removed."""
        if self.dial is not None:
            self.dial.retire()
            self.dial = None
        self.drop_snapshot(_REMOVED)


class AcceptedPeer(Protocol):
    """A connection that another member opened: `wire/peer_session.py`."""

    node: int
    incarnation: int
    heard_at: float
    longest_silence_s: float

    def send_message(self, message: Message) -> bool:
        """Send a raft message; False if it is dropped."""

    def abort(self, why: str) -> None:
        """Close the connection at once; `why` is logged."""


class Peers:
    """The links to all other members, and the connections that they opened."""

    def __init__(self, local: Local) -> None:
        self.local = local
        self.links: dict[int, Link] = {}
        self._vouched: dict[int, list[str]] = {}
        """Peer URLs, by id, of members that only other members know."""
        self._inquired_at = -math.inf
        self._accepted: dict[int, AcceptedPeer] = {}
        """The connection of each other member that was introduced or pinged last."""
        self._admitted: dict[int, list[AcceptedPeer]] = {}
        """The connections that each other member has open to this one, the oldest first."""

    @property
    def nodes(self) -> Collection[int]:
        """The ids of the other members."""
        return self.links.keys()

    def update(self, members: dict[int, proto.Member]) -> None:
        """Set the members, by id: open links to new ones, close the links to removed ones."""
        self._vouched.clear()
        for node in [node for node in self.links if node not in members]:
            self.links.pop(node).close()
            self.local.metrics.peers.pop(node, None)
        for node, other in members.items():
            urls = list(other.peerURLs)
            if node in self.links:
                self.links[node].urls = urls
            elif node != self.local.identity.member_id:
                self.links[node] = Link(self.local, node, urls)

    def versions(self) -> list[Version | None]:
        """The versions of the programs of the other members; None for one that is not connected."""
        return [None if link.since is None else link.version for link in self.links.values()]

    def urls_of(self, node: int) -> list[str] | None:
        """The peer URLs of a member, or of one that only other members know; else None."""
        link = self.links.get(node)
        return self._vouched.get(node) if link is None else link.urls

    def inquire(self) -> None:
        """An unknown member connected. Ask the others for their members: it may have been added
        while this member was down or slow."""
        now = self.local.clock()
        if now - self._inquired_at < INQUIRY_PAUSE_S:
            return
        self._inquired_at = now
        for node in self.links:
            if self.is_open(node):
                self.ask(node, MEMBER_LIST, b"", self._vouch)

    def _vouch(self, answer: bytes | EtcdError) -> None:
        """Another member answered `inquire`. Raises DecodeError."""
        if isinstance(answer, EtcdError):
            return
        for other in proto.MemberListResponse.decode(answer).members:
            try:
                check_member(other)
                check_peer_urls(list(other.peerURLs))
            except EtcdError:
                continue
            if other.ID not in self.links and len(self._vouched) < MAX_VOUCHED:
                self._vouched.setdefault(other.ID, list(other.peerURLs))

    def send(self, message: Message) -> None:
        node = message.to
        link = self.links.get(node)
        if link is not None and (link.since is not None or node not in self._accepted):
            link.send(message)
        elif node in self._accepted and not self._accepted[node].send_message(message):
            # (That member is not known here yet, or cannot be reached at its peer URLs.)
            self.local.events.on_unreachable(node)

    def ask(
        self, node: int, method: int, body: bytes, done: Done, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        """Ask another member. `done` is called once, with the answer or an error."""
        dial = self.links[node].dial if node in self.links else None
        if dial is None or not dial.is_open:
            done(error("TimeoutDueToConnectionLost"))
        else:
            dial.ask(method, body, done, timeout_s)

    def is_open(self, node: int) -> bool:
        """Whether messages can be sent to that member now."""
        link = self.links.get(node)
        return link is not None and link.since is not None

    def contact_s(self, node: int) -> float:
        """How long messages could be sent to that member without a gap; negative if they cannot."""
        link = self.links.get(node)
        return -1.0 if link is None or link.since is None else self.local.clock() - link.since

    def admitted(self, connection: AcceptedPeer) -> None:
        """Another member has introduced itself."""
        others = self._admitted.setdefault(connection.node, [])
        others.append(connection)
        if len(others) > MAX_CONNECTIONS:
            others.pop(0).abort("its member has opened too many others")

    def accepted(self, connection: AcceptedPeer) -> None:
        """Another member has opened a connection for its messages."""
        self._accepted[connection.node] = connection
        if connection.node in self.links:
            self.links[connection.node].dial_soon()

    def pinged(self, connection: AcceptedPeer) -> None:
        """A connection is the one in use: an older one may have introduced itself after it."""
        if self._accepted.get(connection.node, connection).incarnation == connection.incarnation:
            self._accepted[connection.node] = connection

    def is_called_by(self, node: int) -> bool:
        """Whether that member has a connection open to this one."""
        return node in self._accepted

    def hear(self, node: int) -> tuple[float, float]:
        """When that member was last heard from on the connection that it opened, over which its
        raft messages come, and the longest silence before that since the last call, in seconds:
        (inf, 0) without such a connection."""
        connection = self._accepted.get(node)
        if connection is None:
            return math.inf, 0.0
        longest_s, connection.longest_silence_s = connection.longest_silence_s, 0.0
        return connection.heard_at, longest_s

    def has_other_incarnation(self, node: int, incarnation: int) -> bool:
        """Whether another process that says it is `node` is connected and alive."""
        other = self._accepted.get(node)
        return (
            other is not None
            and other.incarnation != incarnation
            and self.local.clock() - other.heard_at < ALIVE_S
        )

    def accepted_is_gone(self, connection: AcceptedPeer) -> None:
        """A connection of another member ended."""
        if connection in (others := self._admitted.get(connection.node, [])):
            others.remove(connection)
        if not others:
            self._admitted.pop(connection.node, None)
        if self._accepted.get(connection.node) is connection:
            del self._accepted[connection.node]
            self.local.rollback.lost(self.local.clock())
            if not self.is_open(connection.node):
                self.local.events.on_unreachable(connection.node)


_REMOVED = "that member was removed from the cluster"
