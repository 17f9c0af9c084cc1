"""The side of a connection between members that was called, sans-IO. See `peer.py`.

An `Accepted` takes raft messages, questions and snapshots from the member that called, once that
has said who it is and belongs here. Those it refuses are told why, and it is logged on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from etcdlite import errors, frames, log, peer, peer_frames, proto
from etcdlite.addresses import Addresses
from etcdlite.errors import EtcdError, error
from etcdlite.member import Member
from etcdlite.methods import KEEP_ALIVE, MEMBER_LIST, PEER_METHODS
from etcdlite.proto import DecodeError
from etcdlite.request import OwnRequester, Waiter
from etcdlite.snap import SnapshotError
from etcdlite.versions import program_version
from etcdlite.wire import api

MAX_QUESTIONS = 32_768
"""Questions that wait on a connection. More are refused: what it carries of raft cannot wait."""


class Accepted(peer.PeerConnection, OwnRequester):
    """A connection that another member opened."""

    stranger = " (is this a client, or an etcd?)"

    def __init__(
        self,
        member: Member,
        on_output: Callable[[Any], None],
        address: str = "",
        addresses: Addresses | None = None,
    ) -> None:
        """`address` is the IP address of the other side, which `addresses`, if given, compares
        with the peer URLs of the member that it says it is."""
        super().__init__(member.peers.local, on_output)
        self.member = member
        self._address = address
        self._addresses = addresses
        self.node = 0
        """The member id of the other side; 0 until its introduction."""
        self.incarnation = 0
        self._has_asked = False
        """It sent the one frame that may come before both sides know each other."""
        self._requests: dict[int, int] = {}
        self._snapshot_id = 0

    def _check_versions(self, lowest: int, highest: int) -> None:
        if lowest <= peer_frames.VERSION <= highest:
            self.version = peer_frames.VERSION
        elif lowest <= frames.PROTOCOL_VERSION <= highest:
            self.version = frames.PROTOCOL_VERSION
            self._reader = frames.FrameReader(peer.MAX_UNKNOWN_FRAME_BYTES)
        else:
            self._append(frames.HANDSHAKE.pack(frames.MAGIC, 0, 0))
            raise frames.ProtocolError(
                f"it speaks versions {lowest} to {highest}, this member {peer_frames.VERSION} only"
            )
        self._append(frames.HANDSHAKE.pack(frames.MAGIC, self.version, 0))
        hello = proto.Hello(
            cluster_id=self.member.identity.cluster_id,
            member_id=self.member.identity.member_id,
            version=program_version(self.local.version),
            cluster_version=str(self.local.cluster_version.version),
        )
        self.send(0, frames.HELLO, 0, hello.encode())

    def _take(self, request_id: int, method: int, flags: int, body: bytes) -> None:
        if self.node in self.member.state.membership.removed:
            # It may not have heard of its removal; when it calls again, it is told.
            self._hang_up("that member was removed from the cluster")
        elif method == peer.RAFT and self.node:
            self.take_message(body, self.node)
        elif not self.node:
            self._take_from_stranger(request_id, method, body)
        elif method == frames.PING:
            self.local.rollback.reported(self.node, body)
            if not self._snapshot_id:
                self.member.peers.pinged(self)
            self.send(request_id, frames.PING, frames.END, body)
        elif method == peer.SNAPSHOT and self._snapshot_id:
            self.member.incoming.receive(self, body)
        else:
            self._answer(request_id, method, body)

    def _take_from_stranger(self, request_id: int, method: int, body: bytes) -> None:
        """The other side has not introduced itself: it may do so, or ask one question."""
        if method == peer.INTRODUCE and self.version == peer_frames.VERSION and not self._has_asked:
            self._introduced(request_id, proto.Introduction.decode(body))
        elif method == MEMBER_LIST and not self._has_asked:
            self._answer(request_id, method, body)
        elif self.version != peer_frames.VERSION:
            raise frames.ProtocolError(
                f"method {method:#04x} of protocol version {self.version}, that of clients and of "
                "older members: give a client the URL of the client port; update an older member"
            )
        else:
            raise frames.ProtocolError(f"method {method:#04x} came before an introduction")
        self._has_asked = True

    def _introduced(self, request_id: int, introduction: proto.Introduction) -> None:
        refusal = self._refusal(introduction)
        if refusal is None and self._addresses is not None:
            urls = self.member.peers.urls_of(introduction.member_id) or []
            done = partial(self._address_checked, request_id, introduction)
            self._addresses.check(self._address, urls, done)
        else:
            self._admit(request_id, introduction, refusal)

    def _address_checked(
        self, request_id: int, introduction: proto.Introduction, is_right: bool
    ) -> None:
        """The other side is, or is not, where the member is that it says it is."""
        if self.is_closing:
            return
        refusal = self._refusal(introduction)
        if refusal is None and not is_right:
            node = introduction.member_id
            urls = ", ".join(self.member.peers.urls_of(node) or [])
            refusal = EtcdError(
                errors.PERMISSION_DENIED,
                f"etcdlite: {self._address} is not an address of member {node:x}, whose peer URLs "
                f"are {urls}. Correct them with 'etcdlite-ctl member update', or set "
                "peer-address-check=false where addresses are translated on the way",
            )
        self._admit(request_id, introduction, refusal)

    def _admit(
        self, request_id: int, introduction: proto.Introduction, refusal: EtcdError | None
    ) -> None:
        rollback, node = self.local.rollback, introduction.member_id
        if refusal is None:
            refusal = rollback.check(node, introduction.life, introduction.recovered)
        if refusal is not None:
            fields = {
                "remote-peer-id": f"{introduction.member_id:x}",
                "remote-cluster-id": f"{introduction.cluster_id:x}",
                "local-member-id": f"{self.member.identity.member_id:x}",
                "local-cluster-id": f"{self.member.identity.cluster_id:x}",
            }
            log.warn(
                "refused a peer", f"refused {node:x}", peer.LINES_PER_S, why=refusal.text, **fields
            )
            self._requests[request_id] = peer.INTRODUCE
            self.fail(request_id, peer.INTRODUCE, refusal)
            self.is_closing = True
            return
        self.node, self.incarnation = node, introduction.life
        self.metrics = self.member.metrics.peers[self.node]
        self.opened()
        self.member.peers.admitted(self)
        if introduction.snapshot is not None:
            self._offered(request_id, introduction.snapshot)
            return
        self.member.peers.accepted(self)
        self._welcome(request_id)

    def _welcome(self, request_id: int, offset: int = 0) -> None:
        life, recovered = self.local.identity.incarnation, self.local.rollback.recovered
        welcome = proto.Welcome(offset=offset, life=life, recovered=recovered)
        self.send(request_id, peer.INTRODUCE, frames.END, welcome.encode())

    def _offered(self, request_id: int, offer: proto.SnapshotOffer) -> None:
        self._snapshot_id = request_id
        try:
            offset = self.member.incoming.begin(self, offer)
        except SnapshotError as failure:
            self._welcome(request_id)
            self.snapshot_refused(str(failure))
            return
        if offset is None:
            self._welcome(request_id, offer.size_bytes)
            self.snapshot_taken()
            return
        self.member.catch_up.await_snapshot(offer.index)
        self._welcome(request_id, offset)
        room = self.member.state.alarms.snapshot_room
        self.member.incoming.check_space(offer.size_bytes - offset, room)

    def _refusal(self, introduction: proto.Introduction) -> EtcdError | None:
        member = self.member
        node = introduction.member_id
        claims = None if self.channel is None else self.channel.claims
        if claims is not None and claims != (introduction.cluster_id, node, introduction.to):
            return EtcdError(
                errors.PERMISSION_DENIED,
                f"etcdlite: it calls itself member {node:x} of cluster {introduction.cluster_id:x} "
                f"here, but member {claims[1]:x} of cluster {claims[0]:x} in its handshake",
            )
        if introduction.cluster_id != member.identity.cluster_id:
            return error("ClusterIDMismatch")
        if node in member.state.membership.removed:
            return error("MemberRemoved")
        if node == member.identity.member_id:
            return EtcdError(
                errors.INVALID_ARGUMENT,
                f"etcdlite: two members have the id {node:x}; was a data directory copied?",
            )
        try:
            self.local.checked_version(introduction.version)
        except frames.ProtocolError as failure:
            return EtcdError(errors.FAILED_PRECONDITION, f"etcdlite: {failure}")
        if introduction.to != member.identity.member_id:
            return EtcdError(
                errors.INVALID_ARGUMENT,
                f"etcdlite: this is member {member.identity.member_id:x}, not {introduction.to:x}; "
                "check the peer URLs",
            )
        if member.peers.has_other_incarnation(node, introduction.life):
            return EtcdError(
                errors.UNAVAILABLE,
                f"etcdlite: another process is member {node:x} too; if that lasts for more than "
                "a few seconds, was a data directory copied?",
            )
        if member.peers.urls_of(node) is None:
            # It may have been added while this member was down: the others know.
            member.peers.inquire()
            return EtcdError(
                errors.UNAVAILABLE, f"etcdlite: member {node:x} is not known here (yet)"
            )
        return None

    def _answer(self, request_id: int, method: int, body: bytes) -> None:
        """Answer a question of another member."""
        if request_id in self._requests:
            raise frames.ProtocolError(f"request id {request_id} is in use")
        self._requests[request_id] = method
        member = self.member
        try:
            if method == peer.FORWARD:
                member.writes.accept_forwarded(self.node, *peer.decode_forward(body))
                self.reply(request_id, method, b"")
            elif len(self._requests) > MAX_QUESTIONS:
                self.fail(request_id, method, error("RequestTooManyRequests"))
            elif method == KEEP_ALIVE:
                api.keep_alive(member, body, Waiter(self, request_id, method, None).answer)
            elif method in PEER_METHODS:
                handle, decode = api.HANDLERS[method]
                frame = frames.frame(request_id, method, 0, body)
                request = proto.decode_request(decode, body)
                handle(member, Waiter(self, request_id, method, request), frame)
            else:
                self.fail(request_id, method, api.unimplemented(method))
        except EtcdError as failure:
            self.fail(request_id, method, failure)
        except DecodeError as failure:
            if method == peer.FORWARD:
                raise
            # It passes on what a client sent, and may allow more fields than this member.
            self.fail(request_id, method, api.refusal(failure))

    # As a session of the member.

    def awaits(self, request_id: int) -> bool:
        return request_id in self._requests

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        if self._requests.pop(request_id, None) is not None:
            self.send(request_id, method, frames.END, body)

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        if self._requests.pop(request_id, None) is not None:
            body = proto.Error(code=failure.code, message=failure.text).encode()
            self.send(request_id, method, frames.END | frames.ERROR, body)

    def snapshot_taken(self) -> None:
        """The snapshot that came over this connection is whole and durable."""
        self.send(self._snapshot_id, peer.SNAPSHOT, frames.END, b"")

    def snapshot_refused(self, why: str) -> None:
        """The snapshot is incomplete or wrong, and must be sent again from the beginning."""
        body = proto.Error(code=errors.UNAVAILABLE, message=f"etcdlite: {why}").encode()
        self.send(self._snapshot_id, peer.SNAPSHOT, frames.END | frames.ERROR, body)
        self.is_closing = True

    def unblocked(self) -> None:
        """The other member reads again: answer what was held back."""
        self.member.reads.wake(self)

    def closed(self) -> None:
        super().closed()
        self.member.peers.accepted_is_gone(self)
        self._requests.clear()
        self.member.reads.wake(self)
