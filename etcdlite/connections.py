"""The connected sockets and their sessions: reading, processing and sending, in slices of time.

A connection may have a channel (`channel.py`). Output is sealed when it is about to be sent, and
counts in the outbox until its ciphertext is sent. The steps of a handshake that take long are taken
in threads (`handshakes.py`).

No connection holds up the others: what does not fit into a slice waits for the next turn, in which
it comes first; so connections take turns. Other members come before clients (`turns.py`).

Limits: those of `places.py` and `memory.py`, and those of `session.py`, which `tick` enforces.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

from etcdlite import log
from etcdlite.channel import RECORD_BYTES, Accepting, Channel, ChannelError
from etcdlite.config import Config
from etcdlite.handshakes import Handshakes, Stepped
from etcdlite.listeners import is_loopback
from etcdlite.loading import are_loaded, when_loaded
from etcdlite.member import Member
from etcdlite.memory import Budget
from etcdlite.peer import Dial
from etcdlite.places import Places
from etcdlite.session import Session, partial_timeout_s
from etcdlite.turns import SLICE_S, Ready, Turns
from etcdlite.wire.carried import HTTP_MODULES, Carried, CarryingSession
from etcdlite.wire.grpc import GrpcSession
from etcdlite.wire.native import NativeSession
from etcdlite.wire.session import ClientSession, Opening
from etcdlite.wire.site import Site

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

RECEIVE_BYTES = 64 * 1024
PIECE_BYTES = 8 * 1024
FRAME_PIECE_BYTES = 32 * 1024
"""A client's session gets input in pieces of at most this size, at least one per slice. The second
size is for the rest of a frame that has begun: it is one request, while the bytes of many small
frames can be much work."""

SAME_LINES_PER_S = 0.1
"""How often the same channel fault of one address is logged; different ones once a second."""

NOT_SENT_BYTES = 128 * 1024
"""The kernel takes output of a connection while it holds less than this that is not on its way.
Without this limit (TCP_NOTSENT_LOWAT) it holds megabytes for a slow reader, and reports a socket
writable only when a third of that is read: a reader of 20 KB/s then looks like one that stands
still."""
_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if sys.platform == "linux" else None)

TICKED_PER_TURN = 100
"""A turn enforces the deadlines of at most this many sessions; each takes 5 us."""

REST_TICKS = 16
"""A session that may rest is included in one of this many calls of `Connections.tick`."""

SEND_SLICE_S = 0.005
"""A turn sends output to clients for this long. Output for members never waits."""

PRODUCE_SLICE_S = 0.005
"""A turn produces long answers for this long. The other sessions come first in the next turn."""


class Connection:
    """A connected socket and its session."""

    __slots__ = (
        "address", "channel", "host", "is_member", "is_waiting", "mask", "pending", "ready",
        "session", "site", "sock",
    )  # fmt: skip

    def __init__(
        self,
        sock: socket.socket,
        host: str,
        address: str,
        site: Site | None,
        session: Session,
        channel: Channel | None = None,
    ) -> None:
        self.sock = sock
        self.host = host
        self.address = address
        """The host and the port of the other side, in one text for the log."""
        self.site = site
        """Set on a client's connection, None on a connection between members."""
        self.is_member = site is None
        self.session = session
        self.channel = channel
        """None on a plain connection."""
        self.ready: Ready
        self.mask = READ
        self.pending = b""
        """Input that was read but not processed."""
        self.is_waiting = False
        """A thread takes a step of the handshake, or imports the protocol: read nothing."""

    def receive_piece(self) -> None:
        """Let the session process a piece of `pending`."""
        inbox, size = self.session.inbox, PIECE_BYTES
        if inbox.waiting_bytes:
            size = max(size, min(inbox.needed_bytes - inbox.waiting_bytes, FRAME_PIECE_BYTES))
        data, self.pending = self.pending, self.pending[size:]
        self.session.receive(data[:size])

    @property
    def is_closed(self) -> bool:
        """May be called in any thread."""
        return self.sock.fileno() < 0

    @property
    def is_abandoned(self) -> bool:
        """The other side has closed it and nothing is left to read. May be called in any thread."""
        try:
            return not self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    @property
    def kept_bytes(self) -> int:
        """About how much memory the connection takes."""
        channel, size = self.channel, self.session.kept_bytes
        return size if channel is None else size + channel.memory_bytes + channel.held_bytes

    def send_reason(self, is_broken: bool) -> None:
        """Send the channel's last message, which says why the connection ends, if that is possible
        at once. Call it before the socket is closed. `is_broken`: the channel raised ChannelError.
        """
        channel = self.channel
        if channel is None or self.is_waiting or self.session.outbox.is_stuck:
            return
        # The peer may be gone, or the channel have failed.
        with contextlib.suppress(OSError, ChannelError):
            if not is_broken:
                channel.close()
            if channel.has_output:
                self.sock.send(channel.output())


class Connections:
    def __init__(
        self,
        settings: Config,
        selector: selectors.BaseSelector,
        places: Places,
        handshakes: Handshakes,
    ) -> None:
        self.all: set[Connection] = set()
        self.handshakes = handshakes
        self.dirty: list[Session] = []
        """Sessions that have output or must be closed."""
        self.member: Member
        """Set before the first connection is added."""
        self._settings = settings
        self._selector = selector
        self._places = places
        self._by_session: dict[Session, Connection] = {}
        self._producing: dict[Session, None] = {}
        """Sessions that have more to produce, in turn."""
        self._turns = Turns(time.monotonic)
        self._unread: dict[Connection, None] = {}
        """Connections with `pending` input that can be processed now."""
        self._held: dict[Connection, float] = {}
        """By when connections that hold an incomplete record, or were ended, must complete it."""
        self._awake: dict[Session, None] = {}
        """Sessions that the next `tick` includes: they had input or output, or may not rest."""
        self._rotation: Iterator[Session] = iter(())
        """The sessions that are left in this round over all; each `tick` includes the next few."""
        self._share = 1
        """How many each `tick` includes. It is the same for the whole round."""
        self._due: deque[Session] = deque()
        """Sessions chosen by `tick` that the next turns check for missed deadlines."""
        self._sizes: dict[Connection, int] = {}
        """The `kept_bytes` of each connection as of its last tick."""
        self._is_stopping = False
        self.accept_secret: Accepting | None = None
        """Makes the channel of a client that has a shared secret; None if clients need none."""

    # For the loop.

    @property
    def have_work(self) -> bool:
        """There is something to do without waiting for a socket."""
        return bool(self._producing or self._unread or self.dirty or self._due)

    @property
    def have_unread(self) -> bool:
        """Input was read that is not processed yet, or a long answer is being produced."""
        return bool(self._producing or self._unread)

    def serve(self, ready: Sequence[tuple[selectors.SelectorKey, int]], began: float) -> None:
        """Call what is ready, for one slice from `began`: a `Ready` is the data of each key."""
        if len(ready) == 1 and not self._unread:
            # Nothing to order, so nothing that `Turns.serve` has to do.
            self._turns.share_end = began + SLICE_S
            key, mask = ready[0]
            key.data(mask)
            return
        masks: dict[Ready, int] = {key.data: mask for key, mask in ready}
        for connection in self._unread:
            masks[connection.ready] = masks.get(connection.ready, 0) | READ
        self._turns.serve(masks, began)

    def are_from_clients(self, ready: Iterable[tuple[selectors.SelectorKey, int]]) -> bool:
        """Whether any of the ready files is not a connection between members."""
        return any(key.data not in self._turns.first for key, _ in ready)

    def tick(self, now: float, budget: Budget) -> None:
        """Enforce the deadlines and the limit of memory, in this turn and the next ones. Call it
        several times a second."""
        if not self._due:
            some = list(islice(self._rotation, self._share))
            if not some:
                self._rotation = iter(list(self._by_session))
                self._share = len(self._by_session) // REST_TICKS + 1
            self._due.extend(dict.fromkeys((*self._awake, *some)))
            self._awake.clear()
        self._tick_due()
        for connection, until in list(self._held.items()):
            assert connection.channel is not None
            if connection.channel.is_ended:
                self.close(connection)
            elif not connection.channel.held_bytes:
                del self._held[connection]
            elif now > until:
                self.drop(connection, "it did not finish the record that it began to send")
        budget.held_bytes = sum(self._sizes.values())
        if budget.held_bytes > budget.limit_bytes:
            for connection in budget.excess(self.all):
                log.warn(
                    "closed a connection",
                    why="connections hold more than memory-limit, and this is one of the largest",
                    remote_addr=connection.address,
                    held_bytes=connection.kept_bytes,
                    memory_limit=budget.limit_bytes,
                )
                self.close(connection)

    def _tick_due(self) -> None:
        now = time.monotonic()
        for _ in range(min(TICKED_PER_TURN, len(self._due))):
            session = self._due.popleft()
            connection = self._by_session.get(session)
            if connection is not None:
                session.tick(now)
                self._sizes[connection] = connection.kept_bytes
                if not session.may_rest:
                    self._awake[session] = None

    def begin_stop(self) -> None:
        """Read no more requests, and let those in flight finish."""
        self._is_stopping = True
        for connection in self.all:
            self._watch_socket(connection)

    def shut_down(self) -> None:
        """End the streams. May be called repeatedly."""
        for connection in list(self.all):
            connection.session.shut_down()

    @property
    def are_idle(self) -> bool:
        """Every request except streams is answered, and all output is sent."""
        return not self.dirty and all(connection.session.is_idle for connection in self.all)

    def close_all(self) -> None:
        for connection in list(self.all):
            self.close(connection)

    def add(self, connection: Connection) -> bool:
        """Begin to serve a connection. Returns False if the system refuses that: it is closed."""
        sock = connection.sock
        ready = partial(self._ready, connection)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if _NOTSENT_LOWAT is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, NOT_SENT_BYTES)
            self._selector.register(sock, connection.mask, ready)
        except OSError as failure:
            log.error("cannot serve a connection", "accept", error=str(failure))
            sock.close()
            connection.session.closed()
            return False
        connection.ready = ready
        self.all.add(connection)
        self._by_session[connection.session] = connection
        self._awake[connection.session] = None
        if connection.is_member:
            self._turns.first.add(ready)
        late = self._places.take(connection)
        if late is not None:
            self.drop(late, "too many connections have not opened the protocol")
        return True

    def produce(self) -> None:
        """Produce long answers, for one slice."""
        if self._due:
            self._tick_due()
        producing = self._producing
        if not producing:
            return
        began = time.monotonic()
        for session in list(producing):
            producing.pop(session, None)
            session.produce()
            if session.has_more:
                producing[session] = None
            if time.monotonic() - began > PRODUCE_SLICE_S:
                return

    def send_output(self, to_clients: bool = True) -> None:
        """Send what sessions have put out, and close those that are aborted, for one slice. After
        the slice, or without `to_clients`, only send, and only to members; the other sessions come
        first in the next turn."""
        if not self.dirty:
            return
        dirty = dict.fromkeys(self.dirty)
        self.dirty.clear()
        later: list[Session] = []
        clock = time.monotonic
        ends_at = clock() + SEND_SLICE_S
        for session in dirty:
            connection = self._by_session.get(session)
            if connection is None:
                continue
            if not to_clients and (not connection.is_member or session.is_aborted):
                later.append(session)
            elif session.is_aborted:
                self.drop(connection, session.why_aborted)
            elif not session.outbox.is_stuck:
                self._send(connection)
                if clock() > ends_at:
                    to_clients = False
        self.dirty[:0] = later

    def close(self, connection: Connection) -> None:
        if connection not in self.all:
            return
        self.all.discard(connection)
        self._places.free(connection)
        self._by_session.pop(connection.session, None)
        self._producing.pop(connection.session, None)
        self._awake.pop(connection.session, None)
        self._sizes.pop(connection, None)
        self._unread.pop(connection, None)
        self._turns.first.discard(connection.ready)
        connection.pending = b""
        if connection.channel is not None:
            self._count_failed(connection, connection.channel)
            self._held.pop(connection, None)
            self.handshakes.end(connection)
            connection.send_reason(is_broken=False)
        if connection.mask:
            self._selector.unregister(connection.sock)
        connection.sock.close()
        session = connection.session
        session.closed()
        if session.has_more:
            self._producing[session] = None
        # The callback holds the connection: break that cycle.
        connection.ready = lambda mask: None

    def drop(self, connection: Connection, why: str) -> None:
        """Close a connection at once and log why."""
        if connection.channel is not None and not connection.channel.is_established:
            why += f"; the handshake of {connection.channel.kind} is not complete"
        log.warn("closed a connection", "dropped", why=why, remote_addr=connection.address)
        self.close(connection)

    # Sockets.

    def _ready(self, connection: Connection, mask: int) -> None:
        if mask != READ:
            self._send(connection)
            if not mask & READ:
                return
        session = connection.session
        self._awake[session] = None
        if connection.pending:
            if not isinstance(session, Opening):
                self._process(connection)
                return
            # What `feed` left.
            data, connection.pending = connection.pending, b""
            self._watch_socket(connection)
        else:
            channel = connection.channel
            try:
                size_bytes = RECEIVE_BYTES if channel is None else channel.receive_bytes
                data = connection.sock.recv(size_bytes)
            except BlockingIOError:
                return
            except OSError:
                if connection.is_closed:  # By an earlier call in this turn.
                    return
                data = b""
            if channel is not None:
                data = self._unseal(connection, data)
                if not data:
                    return
            elif not data:
                self.close(connection)
                return
        if isinstance(session, Opening):
            session.receive(data)
            if session.found == "secret":
                assert self.accept_secret is not None
                connection.channel = self.accept_secret(connection.host)
                session.receive(self._unseal(connection, session.enter_channel()))
            if not session.found:
                return
            if session.found == "http" and not are_loaded(HTTP_MODULES):
                connection.is_waiting = True
                self._watch_socket(connection)
                again = partial(self._imported, connection, session.begin_again())
                when_loaded(HTTP_MODULES, self.member.run_task, again)
                return
            data = session.first
            session = self._replace(connection, session)
        if len(data) > PIECE_BYTES:
            connection.pending = data
            self._process(connection)
        else:
            session.receive(data)
            self._received(connection)

    def _unseal(self, connection: Connection, data: bytes) -> bytes:
        """The plaintext of what was received over a channel. At the end of the connection (`data`
        is empty) and at a fault of the channel, the connection is closed."""
        channel, session = connection.channel, connection.session
        assert channel is not None
        was_established = channel.is_established
        if data and channel.steps_are_long and not was_established:
            self._step(connection, data)
            return b""
        try:
            if not data:
                channel.receive_end()
                self.close(connection)
                return b""
            plaintext = channel.receive(data)
        except ChannelError as failure:
            if not data and channel.is_established:
                # A process that is killed ends like this. The protocol notices a missing end, too.
                log.debug("a connection ended", why=str(failure), peer=connection.address)
                self.close(connection)
            else:
                self._break(connection, failure)
            return b""
        if channel.is_established and not was_established and isinstance(session, Dial):
            session.connected()
        if channel.has_output:
            self.dirty.append(session)
        if plaintext and self._held:
            self._held.pop(connection, None)
        if channel.is_ended and not plaintext:
            self.close(connection)
        elif (channel.held_bytes or channel.is_ended) and connection not in self._held:
            self._held[connection] = time.monotonic() + partial_timeout_s(RECORD_BYTES)
        return plaintext

    def _step(self, connection: Connection, data: bytes) -> None:
        """Take a step of the handshake in a thread."""
        connection.is_waiting = True
        self._watch_socket(connection)
        self.handshakes.step(connection, data)

    def stepped(self, result: Stepped) -> None:
        """A thread has taken a step of a handshake."""
        connection = result.connection
        if connection not in self.all:
            return
        connection.is_waiting = False
        if result.failure is not None:
            self._break(connection, result.failure)
            return
        session, channel = connection.session, connection.channel
        assert channel is not None
        if channel.has_output:
            self.dirty.append(session)
        if channel.is_established:
            self.handshakes.end(connection)
            if isinstance(session, Opening):
                session.agreed = channel.alpn
        self.feed(connection, result.plaintext)
        if not channel.is_established:
            late = self.handshakes.begun(connection)
            if late is not None:
                self.drop(late, "too many handshakes at once")

    def feed(self, connection: Connection, data: bytes) -> None:
        """Process received bytes in the next turn."""
        connection.pending = data
        self._watch_socket(connection)

    def _imported(self, connection: Connection, data: bytes) -> None:
        """The protocol that the connection waited for is imported."""
        connection.is_waiting = False
        if connection in self.all:
            self.feed(connection, data)

    def _break(self, connection: Connection, failure: ChannelError) -> None:
        """The channel of a connection is broken, or cannot be established."""
        self.handshakes.end(connection)
        self._held.pop(connection, None)
        if connection.channel is not None:
            self._count_failed(connection, connection.channel)
        connection.send_reason(is_broken=True)
        connection.channel = None
        session = connection.session
        if isinstance(session, Dial) and not session.is_open:
            session.link.unreachable(session, str(failure), False)
        else:
            why, key = str(failure), f"channel of {connection.host}"
            if not (log.limited(key) or log.limited(f"{key} {why}", SAME_LINES_PER_S)):
                log.warn("closed a connection", why=why, remote_addr=connection.address)
        self.close(connection)

    def _count_failed(self, connection: Connection, channel: Channel) -> None:
        """Count the handshake of a connection that ends, if it is not complete."""
        if not channel.is_established:
            self.member.metrics.failed_handshakes[channel.kind, connection.is_member] += 1

    def _process(self, connection: Connection) -> None:
        """Process the input that was read, for one slice."""
        while connection.pending and not connection.session.is_closing:
            connection.receive_piece()
            is_late = time.monotonic() > self._turns.share_end
            if is_late or not self._may_receive(connection.session):
                break
        self._received(connection)

    def _received(self, connection: Connection) -> None:
        session = connection.session
        if session.has_more:
            self._producing[session] = None
        outbox = session.outbox
        if session.is_closing and not outbox.unsent_bytes:
            self.close(connection)
        elif connection.pending or outbox.is_stuck or session.is_full or connection in self._unread:
            self._watch_socket(connection)

    def _replace(self, connection: Connection, opening: Opening) -> Session:
        """Replace `opening` by a session of the protocol that it found."""
        on_output = self.dirty.append
        session: ClientSession
        if opening.found == "native":
            session = NativeSession(self.member, on_output)
        elif opening.found == "grpc":
            settings = self._settings
            # As in etcd, clients without TLS speak gRPC alone over HTTP/2.
            make_http = partial(_make_http, connection)
            kind = partial(CarryingSession, make_http=make_http) if opening.agreed else GrpcSession
            session = kind(
                self.member,
                on_output,
                max_streams=settings.max_concurrent_streams,
                ping_min_s=settings.grpc_keepalive_min_time_s,
                keepalive_interval_s=settings.grpc_keepalive_interval_s,
                keepalive_timeout_s=settings.grpc_keepalive_timeout_s,
            )
        else:
            from etcdlite.wire.http import HttpSession

            assert connection.site is not None
            is_local = is_loopback(connection.sock)
            session = HttpSession(self.member, on_output, connection.site, is_local)
        session.client, session.open_by = connection.address, opening.open_by
        if connection.channel is not None and opening.found != "http":
            # As in etcd, a certificate's user does not count for JSON.
            session.certificate_user = connection.channel.user
        del self._by_session[opening]
        opening.closed()
        connection.session = session
        self._by_session[session] = connection
        self._awake[session] = None
        return session

    def _send(self, connection: Connection) -> None:
        """Send the output, once; the rest follows when the socket is writable again."""
        session = connection.session
        outbox = session.outbox
        channel = connection.channel
        was_blocked = session.is_blocked
        try:
            output = outbox.take() if channel is None else outbox.take_sealed(channel)
            sent_bytes = connection.sock.send(output)
        except BlockingIOError:
            sent_bytes = 0
        except OSError:
            self.close(connection)
            return
        except ChannelError as failure:
            self._break(connection, failure)
            return
        outbox.sent(sent_bytes)
        if outbox.unsent_bytes or outbox.held_bytes:
            self._awake[session] = None
        if outbox.unsent_bytes:
            if outbox.parts and not outbox.is_stuck:
                self.dirty.append(session)
            self._watch_socket(connection)
        elif session.is_closing:
            self.close(connection)
            return
        elif connection.mask != READ or connection.pending:
            self._watch_socket(connection)
        session.check_unblocked(was_blocked)
        if session.has_more:
            self._producing[session] = None

    def _may_receive(self, session: Session) -> bool:
        outbox = session.outbox
        # Requests of a client that does not read its answers are not read either.
        return (
            not session.is_closing
            and not session.is_full
            and (outbox.unsent_bytes <= outbox.high_water_bytes or session.reads_always)
            and (not self._is_stopping or session.is_served_to_the_end)
        )

    def _watch_socket(self, connection: Connection) -> None:
        session = connection.session
        mask = WRITE if session.outbox.is_stuck else 0
        self._unread.pop(connection, None)
        if not connection.is_waiting and self._may_receive(session):
            if connection.pending:
                self._unread[connection] = None
            else:
                mask |= READ
        if mask == connection.mask:
            return
        try:
            if not mask:
                self._selector.unregister(connection.sock)
            elif not connection.mask:
                self._selector.register(connection.sock, mask, connection.ready)
            else:
                self._selector.modify(connection.sock, mask, connection.ready)
        except OSError as failure:  # Now it is not registered.
            mask = 0
            session.abort(str(failure))
            self.dirty.append(session)
        connection.mask = mask


def _make_http(connection: Connection, call: Carried) -> ClientSession:
    """The `StreamSession` of a request."""
    from etcdlite.wire.http import StreamSession

    assert connection.site is not None
    return StreamSession(call, connection.site, is_loopback(connection.sock))
