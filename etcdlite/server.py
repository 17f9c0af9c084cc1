"""The process: one selector loop and the connections that it serves.

The loop does all protocol and state work. A turn waits for sockets or the next tick, reads each
ready socket once, lets the member proceed, hands what must be durable to the log thread, and sends
each connection its output (`Server._turn`).

No connection holds up the others: reading, processing and producing are cut into slices of time.
What does not fit waits for the next turn, in which it comes first; so connections take turns.
Other members come before clients.

Nothing else owns a timer or a signal. What blocks in the kernel runs in threads (`threads.py`) that
report to the loop. `listeners.py` opens the listening sockets and accepts from them.

Limits: those of `places.py` and `memory.py`, and those of `session.py`, which `tick` enforces.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import random
import selectors
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from etcdlite import bootstrap, config, datadir, log, proto
from etcdlite.addresses import Addresses, Resolved
from etcdlite.listeners import CLIENTS, HTTP, METRICS, PEERS, Listeners, is_loopback
from etcdlite.member import Member
from etcdlite.memory import Budget, default_limit_bytes
from etcdlite.options import Options
from etcdlite.raft import LOG_TAIL_BYTES, Raft
from etcdlite.raft import Config as RaftConfig
from etcdlite.replica.maintenance import AutoCompaction
from etcdlite.session import Session
from etcdlite.storage.disk import Disk
from etcdlite.threads import Dialed, DiskFailed, DiskThread, LogThread, start_dial
from etcdlite.turns import Ready, Turns
from etcdlite.urls import format_address, host_port
from etcdlite.wire import exposition
from etcdlite.wire.grpc import GrpcSession
from etcdlite.wire.http import HttpSession
from etcdlite.wire.native import NativeSession
from etcdlite.wire.peer_session import Accepted
from etcdlite.wire.session import Opening
from etcdlite.wire.site import Site

RECEIVE_BYTES = 64 * 1024
PIECE_BYTES = 32 * 1024
"""A client's session gets input in pieces of this size, at least one per slice."""

PRODUCE_SLICE_S = 0.005
"""A turn produces long answers for this long. The other sessions come first in the next turn."""

SESSION_TICK_S = 0.25
"""How often sessions enforce their deadlines."""

SHUTDOWN_S = 10.0
"""A shutdown waits this long for work in flight."""

SAVING_PAUSE_S = 0.002
"""Background work pauses for at most this long while the log thread syncs."""

SWITCH_INTERVAL_S = 0.0005
"""The interpreter's switch interval: how long the loop may delay the log thread after a sync."""

FIELDS_PER_OP = 20
"""Fields in a request that each operation of `max-txn-ops` allows for."""

REQUEST_TIMEOUT_S = 5.0
"""A write times out after this and two election timeouts, as in etcd."""

HAND_OVER_S = 2.0
"""A leader that shuts down waits this long for another member to take over."""

READY_PATIENCE_USEC = 30_000_000
"""While there is no leader, each request to the service manager extends its timeout by this."""

REMOVED_S = 1.0
"""A removed member runs on for this long, so that the others learn the commit index from it."""


SEGMENTS_PER_DISK = 16
MIN_SEGMENT_BYTES = 1 << 20
"""A segment is at most this share of a file system, but not smaller than that for it."""


class Connection:
    """A connected socket and its session."""

    __slots__ = ("host", "mask", "peer", "ready", "rest", "session", "site", "sock")

    def __init__(
        self, sock: socket.socket, host: str, peer: str, site: Site | None, session: Session
    ) -> None:
        self.sock = sock
        self.host = host
        self.peer = peer
        """The address of the other side, of which `host` is a part."""
        self.site = site
        """Set on a client's connection, None on a connection between members."""
        self.session = session
        self.ready: Ready
        self.mask = selectors.EVENT_READ
        self.rest = b""
        """Input that was read but not processed."""


class Server:
    """The process of one member."""

    def __init__(
        self, settings: config.Config, reload: Callable[[], config.Config] | None = None
    ) -> None:
        """`reload` reads the settings again; SIGHUP applies those of the log."""
        self.settings = settings
        self._reload = reload or (lambda: settings)
        self._selector = selectors.DefaultSelector()
        self._connections: set[Connection] = set()
        self.listeners = Listeners(settings, self._selector, self._accepted)
        self._by_session: dict[Session, Connection] = {}
        self._sites: dict[str, Site] = {}
        """By purpose of the listener."""
        self._dirty: list[Session] = []
        self._producing: dict[Session, None] = {}
        """Sessions that have more to produce, in turn."""
        self._turns = Turns(time.monotonic)
        self._unread: dict[Connection, None] = {}
        """Connections whose `rest` can be processed."""
        self._done: deque[Any] = deque()
        self._signal = 0
        """The signal that stops the server, once it has come."""
        self._must_reload = False
        self._serves = False
        self._is_ready = False
        self._stopping_since: float | None = None
        self._next_tick = 0.0
        self._next_session_tick = 0.0
        self._tick_s = settings.heartbeat_interval_ms / 1000
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)

    # Starting.

    def start(self) -> None:
        """Recover the member and listen. Raises StartError, DataDamaged, WALError, OSError."""
        settings = self.settings
        disk = Disk()
        self._lock = datadir.lock(disk, settings.data_dir, settings.wal_dir, settings.own_files)
        settings = self.settings = _fit_disk(settings, disk)
        founding = None
        if not datadir.exists(disk, settings.data_dir):
            # Members that start together ask each other for the members. One that listens but does
            # not serve yet would make the others wait, so this comes before listening.
            founding = bootstrap.resolve_founding(settings, _extend_start)
        self.listeners.open()
        if founding is not None:
            bootstrap.create_member(settings, disk, founding, self._advertised_urls())
        began = time.monotonic()
        # Loading makes millions of objects and no garbage. The collector would add a fifth.
        gc.disable()
        opened = datadir.open_member(
            disk,
            settings.data_dir,
            settings.wal_dir,
            min_ttl_s=_min_ttl_s(settings),
            segment_bytes=settings.segment_bytes,
            wal_segment_bytes=settings.wal_segment_bytes,
            sync_enabled=not settings.unsafe_no_fsync,
        )
        for note in opened.notes:
            log.warn("recovered from an unclean stop", what=note)
        log.info(
            "recovered data",
            revision=opened.store.revision,
            keys=len(opened.store.index.heads),
            took=f"{time.monotonic() - began:.2f}s",
            **{"applied-index": opened.store.applied_index, "log-entries": len(opened.entries)},
        )
        self.member = _make_member(settings, opened)
        if PEERS not in self.listeners.purposes:
            self.member.reachability.probe = _without_peer_port
        self.member.attributes = proto.Member(
            ID=self.member.identity.member_id,
            name=settings.name,
            clientURLs=self._advertised_urls(),
        )
        self._sites = {
            purpose: self._site(purpose) for purpose in self.listeners.purposes - {PEERS}
        }
        self._addresses = Addresses(self._report) if settings.peer_address_check else None
        self._budget = Budget(settings.memory_limit or default_limit_bytes())
        self._log_thread = LogThread(opened.wal, self.member.metrics, self._report)
        self._disk_thread = DiskThread(self.member.metrics, self._report)

    def _advertised_urls(self) -> list[str]:
        """The configured URLs; port 0 is replaced by the port that the system chose."""
        ports = self.listeners.ports
        some_port = next((port for url, port in ports.items() if url.endswith(":0")), 0)
        return [
            f"{url[:-1]}{ports.get(url, some_port)}" if url.endswith(":0") else url
            for url in self.settings.advertise_client_urls
        ]

    # The loop.

    def run(self) -> int:
        """Serve until a signal or the removal of this member stops it. Returns the exit status.

        Raises StartError if the initial hash check finds a difference, and DiskFailed.
        """
        self._prepare_loop()
        self.listeners.accept(PEERS, METRICS)
        if self.settings.initial_corrupt_check:
            self.member.hash_check.begin_initial(time.monotonic())
        self.member.catch_up.begin()
        self._serve_if_checked()
        self._next_tick = time.monotonic() + self._tick_s
        while self._stopping_since is None or not self._may_stop(time.monotonic()):
            self._turn()
        return self._stop()

    def _turn(self) -> None:
        """Wait for sockets or the next timer, then let each part proceed."""
        member, clock = self.member, time.monotonic
        # While the log thread syncs, background work pauses: the thread needs the interpreter a few
        # times, and a busy loop would delay it each time.
        timeout_s = SAVING_PAUSE_S if member.is_saving else 0.0
        if not (member.has_work or self._producing or self._unread or self._dirty):
            timeout_s = max(0.0, min(self._next_tick, _wakes_at(member)) - clock())
        ready = self._selector.select(timeout_s)
        began = clock()
        masks = {key.data: mask for key, mask in ready}
        for connection in self._unread:
            masks[connection.ready] = masks.get(connection.ready, 0) | selectors.EVENT_READ
        self._turns.serve(masks, began)
        self._take_results()
        if self._signal and self._stopping_since is None:
            log.info("received signal; shutting down", signal=signal.Signals(self._signal).name)
            self._begin_stop()
        if (now := clock()) >= self._next_tick:
            self._tick(now)
        member.hub.tick(now)
        member.turn()
        if not self._serves:
            self._serve_if_checked()
        elif not self._is_ready:
            self._become_ready()
        self._give_work()
        if member.peers.links:
            self._dial_peers(now)
        if self._producing:
            self._produce()
        if self._dirty:
            self._send_output()
        member.maintain()
        member.metrics.turn_s.observe(clock() - began)

    def _prepare_loop(self) -> None:
        # The collector need not visit what was loaded, because it stays. It need not run often
        # either, because nothing on the hot paths makes cycles.
        gc.freeze()
        gc.enable()
        gc.set_threshold(50_000, 50, 1_000)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._signalled)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def _serve_if_checked(self) -> None:
        """Accept clients once the initial hash check, if there is one, is over, --force-new-cluster
        is carried out, and a member that joins has the data of its cluster. Raises StartError if
        the hash check found a difference."""
        member = self.member
        check = member.hash_check
        if self._stopping_since is not None or not check.is_over or not member.forced.is_done:
            return
        if member.catch_up.is_joining:
            self._wait_for_data()
            return
        if check.difference:
            raise datadir.StartError(
                f"this member's data differs from the others': {check.difference}. Remove this "
                "member, empty its data directory, and add it again"
            )
        self.listeners.accept(CLIENTS, HTTP)
        addresses = [format_address(host, port) for host, port in self.listeners.addresses]
        if addresses[0] == "127.0.0.1:2379":
            command = "etcdlite-ctl"
        else:
            command = f"etcdlite-ctl --endpoints {addresses[0]}"
        is_new = member.state.store.revision == 1 and len(member.state.membership.members) == 1
        log.info(
            f"serving client traffic on {', '.join(addresses)}"
            + (f"; next, in another terminal: {command} put greeting hello" if is_new else "")
        )
        _check_peer_port(member, self.settings)
        self._serves = True
        self._become_ready()

    def _wait_for_data(self) -> None:
        if not log.limited("joining", 0.1):
            why = "waiting for the data of the cluster before serving clients"
            store, needed = self.member.state.store, self.member.catch_up.needed_index
            log.info(why, **{"applied-index": store.applied_index, "needed-index": needed or "?"})
            _extend_start(why)

    def _become_ready(self) -> None:
        """Report readiness if there is a leader and this member has applied what was committed when
        it started. Without a leader hardly any request can be served."""
        if self.member.raft.leader and self.member.catch_up.is_over:
            self._is_ready = True
            log.info(
                "ready to serve client requests",
                **{"local-member-id": f"{self.member.identity.member_id:x}"},
            )
            notify_systemd("READY=1\nSTATUS=serving")

    def _tell_why_not_ready(self) -> None:
        if not log.limited("waiting for a leader", 0.1):
            missing = self.member.leadership.missing_voters()
            if missing or self.member.raft.leader:
                _extend_start(missing or "catching up with the leader")

    def _take_results(self) -> None:
        """Handle what the threads have reported."""
        while self._done:
            result = self._done.popleft()
            if result is None:
                self.member.finished()
            elif isinstance(result, Dialed):
                self._dialed(result)
            elif isinstance(result, Resolved):
                assert self._addresses is not None
                self._addresses.resolved(result)
            elif isinstance(result, BaseException):
                raise DiskFailed(str(result)) from result
            else:
                self.member.persisted(result)

    def _give_work(self) -> None:
        member = self.member
        saves = member.take_saves()
        if saves:
            self._log_thread.save(saves)
        task = member.take_task()
        if task is not None:
            self._disk_thread.run(task)
        released = member.maintenance.released
        if released is not None:
            member.maintenance.released = None
            self._log_thread.release(*released, min(released[0], member.log_begin))

    def _report(self, result: Any) -> None:
        """Take a result from a thread and wake the loop. Called in that thread."""
        self._done.append(result)
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            pass  # The pipe is full, so the loop wakes anyway.

    def _woken(self, mask: int) -> None:
        os.read(self._wake_read, 4096)

    def _tick(self, now: float) -> None:
        self._next_tick += self._tick_s
        if self._next_tick < now:
            self._next_tick = now + self._tick_s
        self.member.tick()
        if self._must_reload:
            self._must_reload = False
            self._reload_log()
        if self._serves and not self._is_ready:
            self._tell_why_not_ready()
        removed_since = self.member.removed_since
        if removed_since is not None and now - removed_since > REMOVED_S:
            self._leave()
        if now >= self._next_session_tick:
            self._next_session_tick = now + SESSION_TICK_S
            for session in list(self._by_session):
                session.tick(now)
            for connection in _over_budget(self._budget, self._connections):
                self._close(connection)

    # Connections.

    def _site(self, purpose: str) -> Site:
        settings = self.settings
        urls = (*self._advertised_urls(), *settings.listen_client_urls)
        return Site(
            self.member,
            metrics=self._render_metrics,
            cors=settings.cors,
            host_whitelist=settings.host_whitelist,
            own_hosts=[socket.gethostname(), *(host_port(url)[0] for url in urls)],
            serves_gateway=settings.enable_grpc_gateway,
            only_metrics=purpose == METRICS,
        )

    def _render_metrics(self) -> bytes:
        protocols = Counter(connection.session.protocol for connection in self._connections)
        return exposition.render(self.member, protocols, self._sites.values(), self._budget)

    # Other members.

    def _dial_peers(self, now: float) -> None:
        for link in list(self.member.peers.links.values()):
            for make in link.wants(now):
                dial = make(self._dirty.append)
                start_dial(dial, link.url, self._report)

    def _dialed(self, dialed: Dialed) -> None:
        dial, peer, result = dialed
        if isinstance(result, OSError):
            # The listener of a dying process resets the connections that it has not accepted.
            is_refused = isinstance(result, (ConnectionRefusedError, ConnectionResetError))
            dial.link.unreachable(dial, str(result.strerror or result), is_refused)
        elif dial.is_closing or self._stopping_since is not None:
            result.close()
            dial.closed()
        else:
            self._connected(Connection(result, "", peer, None, dial))
            dial.connected()

    def _accepted(self, sock: socket.socket, address: tuple[str, int], purpose: str) -> None:
        peer = format_address(*address)
        site = self._sites.get(purpose)
        on_output = self._dirty.append
        session: Session
        if site is None:
            session = Accepted(self.member, on_output, address[0], self._addresses)
        else:
            only_http = purpose != CLIENTS
            session = Opening(on_output, time.monotonic, only_http)
        self._connected(Connection(sock, address[0], peer, site, session))

    def _connected(self, connection: Connection) -> None:
        """Begin to serve a connection."""
        sock = connection.sock
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connections.add(connection)
        self._by_session[connection.session] = connection
        connection.ready = partial(self._ready, connection)
        if connection.site is None:
            self._turns.first.add(connection.ready)
        self._selector.register(sock, connection.mask, connection.ready)
        late = self.listeners.places.take(connection, connection.host, connection.site is None)
        if late is not None:
            self._drop(late, "too many connections have not opened the protocol")

    def _ready(self, connection: Connection, mask: int) -> None:
        session = connection.session
        if mask & selectors.EVENT_WRITE:
            self._send(connection)
        if not mask & selectors.EVENT_READ or connection.sock.fileno() < 0:
            return
        if connection.rest:
            self._process(connection)
            return
        try:
            data = connection.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(connection)
            return
        if isinstance(session, Opening):
            session.receive(data)
            if not session.found:
                return
            data = session.first
            session = self._replace(connection, session)
        if len(data) > PIECE_BYTES and connection.site is not None:
            connection.rest = data
            self._process(connection)
        else:
            session.receive(data)
            self._received(connection)

    def _process(self, connection: Connection) -> None:
        """Process the input that was read, for one slice."""
        session = connection.session
        data = connection.rest
        at = 0
        while at < len(data) and not session.is_closing:
            session.receive(data[at : at + PIECE_BYTES])
            at += PIECE_BYTES
            if not self._may_receive(session) or time.monotonic() > self._turns.share_end:
                break
        connection.rest = data[at:]
        self._received(connection)

    def _received(self, connection: Connection) -> None:
        session = connection.session
        if session.has_more:
            self._producing[session] = None
        if session.is_closing and not session.outbox.unsent_bytes:
            self._close(connection)
            return
        is_unread = connection.rest or connection in self._unread
        if session.is_full or session.outbox.is_stuck or is_unread:
            self._watch_socket(connection)

    def _replace(self, connection: Connection, opening: Opening) -> Session:
        """Put a session of the found protocol in the place of `opening`."""
        on_output = self._dirty.append
        session: NativeSession | GrpcSession | HttpSession
        if opening.found == "native":
            session = NativeSession(self.member, on_output)
        elif opening.found == "grpc":
            settings = self.settings
            session = GrpcSession(
                self.member,
                on_output,
                max_streams=settings.max_concurrent_streams,
                ping_min_s=settings.grpc_keepalive_min_time_s,
                keepalive_interval_s=settings.grpc_keepalive_interval_s,
                keepalive_timeout_s=settings.grpc_keepalive_timeout_s,
            )
        else:
            assert connection.site is not None
            is_local = is_loopback(connection.sock)
            session = HttpSession(self.member, on_output, connection.site, is_local)
        session.client, session.open_by = connection.peer, opening.open_by
        del self._by_session[opening]
        opening.closed()
        connection.session = session
        self._by_session[session] = connection
        return session

    def _produce(self) -> None:
        producing = self._producing
        began = time.monotonic()
        for session in list(producing):
            producing.pop(session, None)
            session.produce()
            if session.has_more:
                producing[session] = None
            if time.monotonic() - began > PRODUCE_SLICE_S:
                return

    def _send_output(self) -> None:
        dirty = dict.fromkeys(self._dirty)
        self._dirty.clear()
        for session in dirty:
            connection = self._by_session.get(session)
            if connection is None:
                continue
            if session.is_aborted:
                self._drop(connection, session.why_aborted)
            elif not session.outbox.is_stuck:
                self._send(connection)

    def _send(self, connection: Connection) -> None:
        """Send the output, once; the rest follows when the socket is writable again."""
        session = connection.session
        outbox = session.outbox
        was_blocked = session.is_blocked
        try:
            sent_bytes = connection.sock.send(outbox.take())
        except BlockingIOError:
            sent_bytes = 0
        except OSError:
            self._close(connection)
            return
        outbox.sent(sent_bytes)
        if outbox.parts and not outbox.is_stuck:
            self._dirty.append(session)
        if session.is_closing and not outbox.unsent_bytes:
            self._close(connection)
            return
        self._watch_socket(connection)
        if was_blocked and not session.is_blocked:
            session.unblocked()
        if session.has_more:
            self._producing[session] = None

    def _may_receive(self, session: Session) -> bool:
        outbox = session.outbox
        # Requests of a client that does not read its answers are not read either.
        return (
            not session.is_closing
            and not session.is_full
            and (outbox.unsent_bytes <= outbox.high_water_bytes or session.reads_always)
            and (self._stopping_since is None or session.is_served_to_the_end)
        )

    def _watch_socket(self, connection: Connection) -> None:
        session = connection.session
        mask = selectors.EVENT_WRITE if session.outbox.is_stuck else 0
        self._unread.pop(connection, None)
        if self._may_receive(session):
            if connection.rest:
                self._unread[connection] = None
            else:
                mask |= selectors.EVENT_READ
        if mask == connection.mask:
            return
        if not mask:
            self._selector.unregister(connection.sock)
        elif not connection.mask:
            self._selector.register(connection.sock, mask, connection.ready)
        else:
            self._selector.modify(connection.sock, mask, connection.ready)
        connection.mask = mask

    def _close(self, connection: Connection) -> None:
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        self.listeners.places.free(connection, connection.host, connection.site is None)
        self._by_session.pop(connection.session, None)
        self._producing.pop(connection.session, None)
        self._unread.pop(connection, None)
        self._turns.first.discard(connection.ready)
        connection.rest = b""
        if connection.mask:
            self._selector.unregister(connection.sock)
        connection.sock.close()
        connection.session.closed()
        # The callback holds the connection: break that cycle.
        connection.ready = _ignore

    def _drop(self, connection: Connection, why: str) -> None:
        if not log.limited("dropped"):
            log.warn("closed a connection", why=why, **{"remote-addr": connection.peer})
        self._close(connection)

    # Stopping.

    def _signalled(self, signum: int, frame: Any) -> None:
        # The loop may be at any instruction, so only record it.
        if signum == signal.SIGHUP:
            self._must_reload = True
        elif self._signal:
            log.warn("received a second signal; exiting at once")
            os._exit(1)
        else:
            self._signal = signum

    def _reload_log(self) -> None:
        """Read the log settings again and reopen the log files."""
        try:
            settings = self._reload()
            log.configure(settings.log_level, settings.log_format, settings.log_outputs)
        except (config.ConfigError, OSError) as failure:
            why = str(failure)
            log.error("received signal; the log settings are unchanged", signal="SIGHUP", why=why)
        else:
            log.info("received signal; reloaded the log settings", signal="SIGHUP")

    def _leave(self) -> None:
        """Stop, because this member was removed from the cluster."""
        if self._stopping_since is None:
            log.error(
                "this member was removed from the cluster; shutting down. Its data directory is "
                "no longer usable: remove it before this machine joins a cluster again",
                **{
                    "data-dir": self.settings.data_dir,
                    "local-member-id": f"{self.member.identity.member_id:x}",
                },
            )
            self._begin_stop()

    def _begin_stop(self) -> None:
        """Accept no more connections and requests, and let those in flight finish."""
        notify_systemd("STOPPING=1")
        self.member.peers.local.is_stopping = True
        self._stopping_since = time.monotonic()
        self.listeners.close()
        for connection in self._connections:
            self._watch_socket(connection)

    def _may_stop(self, now: float) -> bool:
        """Whether all requests are answered and no leadership is left, or time is up."""
        assert self._stopping_since is not None
        for connection in list(self._connections):
            connection.session.shut_down()
        stopping_s = now - self._stopping_since
        if stopping_s > SHUTDOWN_S:
            return True
        if (
            not self.member.is_idle
            or self._dirty
            or not all(connection.session.is_idle for connection in self._connections)
        ):
            return False
        return stopping_s > HAND_OVER_S or not self.member.leadership.hand_over()

    def _stop(self) -> int:
        log.info("closing etcdlite server", name=self.settings.name)
        for connection in list(self._connections):
            self._close(connection)
        self._give_work()
        self._log_thread.stop()
        self._disk_thread.stop()
        self._take_results()
        self.member.maintenance.close(self.member.is_applying)
        self._lock.close()
        log.info("closed etcdlite server", name=self.settings.name)
        return 0


def _over_budget(budget: Budget, connections: Iterable[Connection]) -> list[Connection]:
    """The connections of clients to close because all together hold too much memory."""
    clients = {one.session: one for one in connections if one.site is not None}
    members = [one.session for one in connections if one.site is None]
    closed = [clients[session] for session in budget.excess(clients, members)]
    for connection in closed:
        log.warn(
            "closed a connection",
            why="all hold more than memory-limit together, and it holds the most",
            **{
                "remote-addr": connection.peer,
                "held-bytes": connection.session.kept_bytes,
                "memory-limit": budget.limit_bytes,
            },
        )
    return closed


def _min_ttl_s(settings: config.Config) -> int:
    """The shortest TTL of a lease: one and a half election timeouts, as in etcd."""
    return math.ceil(1.5 * settings.election_timeout_ms / 1000)


def _make_member(settings: config.Config, opened: datadir.Opened) -> Member:
    proto.allow_fields(FIELDS_PER_OP * settings.max_txn_ops)
    rng = random.Random(int.from_bytes(os.urandom(32), "little"))
    store = opened.store
    members = datadir.membership(store, opened.member_id)
    remotes = [] if members else bootstrap.rejoin(settings, _extend_start).members
    if settings.force_new_cluster:
        members = [proto.Member(ID=opened.member_id)]
    raft = Raft(
        RaftConfig(
            id=opened.member_id,
            election_ticks=max(2, settings.election_timeout_ms // settings.heartbeat_interval_ms),
            log_tail_bytes=min(LOG_TAIL_BYTES, settings.wal_segment_bytes),
        ),
        rng,
        voters=[member.ID for member in members if not member.isLearner],
        learners=[member.ID for member in members if member.isLearner],
        hard_state=opened.hard_state,
        snapshot_index=opened.log_index,
        snapshot_term=opened.log_term,
        entries=opened.entries,
        applied=store.applied_index,
    )
    member = Member(
        cluster_id=opened.cluster_id,
        member_id=opened.member_id,
        store=store,
        raft=raft,
        clock=time.monotonic,
        rng=rng,
        options=_options(settings),
        members=remotes,
    )
    member.reachability.probe = bootstrap.unreachable
    member.hash_check.interval_s = settings.corrupt_check_time_s
    member.hash_check.after_compaction_s = settings.compact_hash_check_time_s
    member.maintenance.auto_compaction = AutoCompaction(
        settings.auto_compaction_retention_s, settings.auto_compaction_retention_revisions
    )
    return member


def _without_peer_port(urls: Sequence[str], member_id: int) -> str:
    """The probe of a member that started without its peer port. Another server answers there,
    perhaps with the same ids: two servers with default settings have them."""
    return (
        f"it does not listen at {', '.join(urls)}, which was in use when it started. Restart it "
        "with a --listen-peer-urls of its own"
    )


def _check_peer_port(member: Member, settings: config.Config) -> None:
    """Warn if the other members dial a port on which this one does not listen."""
    own = member.state.membership.members.get(member.identity.member_id)
    if own is None or settings.is_surely_alone:
        return
    listening = settings.listen_peer_urls
    ports = {urlsplit(url).port for url in listening}
    if 0 not in ports and ports.isdisjoint(urlsplit(url).port for url in own.peerURLs):
        log.warn(
            "the other members dial a port on which this one does not listen; unless "
            "something forwards it, correct --listen-peer-urls",
            **{"peer-urls": ",".join(own.peerURLs), "listen-peer-urls": ",".join(listening)},
        )


def _fit_disk(settings: config.Config, disk: Disk) -> config.Config:
    """Smaller segments and checkpoints on a small file system: the space that a segment takes at
    once, and what the log holds until a checkpoint, must leave room for the data."""
    _, total = disk.space(settings.data_dir)
    segment_bytes = max(total // SEGMENTS_PER_DISK, MIN_SEGMENT_BYTES)
    return dataclasses.replace(
        settings,
        segment_bytes=min(settings.segment_bytes, segment_bytes),
        wal_segment_bytes=min(settings.wal_segment_bytes, segment_bytes),
        checkpoint_bytes=min(settings.checkpoint_bytes, 2 * segment_bytes),
    )


def _options(settings: config.Config) -> Options:
    election_timeout_s = settings.election_timeout_ms / 1000
    return Options(
        quota_bytes=settings.quota_backend_bytes,
        segment_bytes=settings.segment_bytes
        + settings.wal_segment_bytes
        + settings.max_request_bytes,
        max_request_bytes=settings.max_request_bytes,
        max_txn_ops=settings.max_txn_ops,
        request_timeout_s=REQUEST_TIMEOUT_S + 2 * election_timeout_s,
        election_timeout_s=election_timeout_s,
        progress_interval_s=settings.watch_progress_notify_interval_s,
        warn_apply_s=settings.warning_apply_duration_s,
        warn_request_s=settings.warning_unary_request_duration_s,
        checkpoint_bytes=settings.checkpoint_bytes,
        max_learners=settings.max_learners,
        strict_reconfig_check=settings.strict_reconfig_check,
        cluster_token=settings.initial_cluster_token,
        force_new_cluster=settings.force_new_cluster,
    )


def _ignore(mask: int) -> None:
    """The callback of a closed connection."""


def _extend_start(why: str) -> None:
    """Ask the service manager to wait longer for this member to be ready."""
    notify_systemd(f"EXTEND_TIMEOUT_USEC={READY_PATIENCE_USEC}\nSTATUS={why}")


def _wakes_at(member: Member) -> float:
    """When the member has something to do: a campaign, or a progress notification."""
    progress_at = member.hub.next_tick()
    return member.wakes_at if progress_at is None else min(progress_at, member.wakes_at)


def notify_systemd(state: str) -> None:
    """Tell the service manager, if there is one (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    if path[0] == "@":
        path = "\0" + path[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(state.encode(), path)
    except OSError as failure:
        log.warn("cannot notify the service manager", error=str(failure))
