"""The process: one selector loop and the connections that it serves.

The loop does all protocol and state work. A turn waits for sockets or the next tick, reads each
ready socket once, lets the member proceed, hands what must be durable to the log thread, and sends
each connection its output (`Server._turn`).

Nothing else owns a timer or a signal. What blocks in the kernel runs in threads (`threads.py`) that
report to the loop. `listeners.py` opens the listening sockets and accepts from them, and
`connections.py` reads from and sends to the connected ones.
"""

from __future__ import annotations

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
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from etcdlite import (
    backup_status,
    bootstrap,
    config,
    datadir,
    hardening,
    jwt_tokens,
    keys,
    limits,
    log,
    proto,
    service_manager,
    threads,
)
from etcdlite.addresses import Addresses
from etcdlite.channel import Dialing
from etcdlite.channels import Channels
from etcdlite.connections import Connection, Connections
from etcdlite.errors import MayPass
from etcdlite.handshakes import Handshakes
from etcdlite.listeners import CLIENTS, HTTP, METRICS, PEERS, Listeners
from etcdlite.member import Member
from etcdlite.memory import Budget, collect_new, collect_only_new_objects, default_limit_bytes
from etcdlite.options import Options
from etcdlite.raft import LOG_TAIL_BYTES, Raft, Ready
from etcdlite.raft import Config as RaftConfig
from etcdlite.replica.maintenance import AutoCompaction
from etcdlite.storage.disk import Disk, stop_waiting
from etcdlite.tokens import Tokens
from etcdlite.urls import format_address, host_port, is_secure
from etcdlite.wire import exposition
from etcdlite.wire.peer_session import Accepted
from etcdlite.wire.session import Opening
from etcdlite.wire.site import Site

LONE_TICK_S = 0.25
"""How often a member that is alone and idle looks at its timers: it has no heartbeats to send."""

SESSION_TICK_S = 0.25
"""How often sessions enforce their deadlines, and a failed accept is repeated."""

LOOK_S = 60.0
"""How often the TLS files are checked for changes; each handshake checks them, too."""

SHUTDOWN_S = 10.0
"""A shutdown waits this long for work in flight."""

QUICK_WRITES = 8
"""With more writes pending than this, the log thread saves them while the loop reads requests."""

STALL_S = 0.25
"""If the loop stands still for longer, as in a slow sync, leases are extended by that time."""

SWITCH_INTERVAL_S = 0.0005
"""The interpreter's switch interval: how long the loop may delay the log thread after a sync."""

FIELDS_PER_OP = 20
"""Fields in a request that each operation of `max-txn-ops` allows for."""

REQUEST_TIMEOUT_S = 5.0
"""A write times out after this and two election timeouts, as in etcd."""

ONE_SIGNAL_S = 0.1
"""Signals this close together count as one: `timeout` signals a process, then its group."""

HAND_OVER_S = 2.0
"""A leader that shuts down waits this long for another member to take over."""

REMOVED_S = 1.0
"""A removed member runs on for this long, so that the others learn the commit index from it."""

SEGMENTS_PER_DISK = 16
MIN_SEGMENT_BYTES = 1 << 20
"""A segment takes at most this fraction of a file system, or the minimum if that is more."""


class Server:
    def __init__(
        self, settings: config.Config, reload: Callable[[], config.Config] | None = None
    ) -> None:
        """`reload` reads the settings again; SIGHUP applies those of the log."""
        self.settings = settings
        self._reload = reload or (lambda: settings)
        self._selector = selectors.DefaultSelector()
        self.listeners = Listeners(settings, self._selector, self._accepted)
        handshakes = Handshakes(self._reports(lambda stepped: self.connections.stepped(stepped)))
        self.connections = Connections(settings, self._selector, self.listeners.places, handshakes)
        self._sites: dict[str, Site] = {}
        """By purpose of the listener."""
        self._results: deque[Callable[[], None]] = deque()
        """What the threads ask the loop to call: `_take_results` does it."""
        self._signal = 0
        self._signal_at_s = 0.0
        """The signal that stops the server, 0 before it comes, and when it came."""
        self._must_reload = False
        self._serves = False
        self._is_ready = False
        self._stopping_since: float | None = None
        self._next_tick = 0.0
        self._next_session_tick = 0.0
        self._next_look = 0.0
        self._ran_at = math.inf
        """When the loop was last seen to run; see `_look_for_stall`."""
        self._collects_since = 0.0
        """When the garbage collection under way began."""
        self._watchdog = service_manager.Watchdog()
        self._tick_s = settings.heartbeat_interval_ms / 1000
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)

    # Starting.

    def start(self) -> None:
        """Recover the member and listen. Raises Explained, OSError."""
        settings = self.settings
        keyring = keys.read(settings.encryption_key_file)
        home = datadir.Home(Disk(), settings.data_dir, settings.wal_dir, keyring)
        self._lock = datadir.lock(home, settings.own_files)
        hardening.close_files(settings.data_dir, settings.wal_dir)
        settings = self.settings = _fit_disk(settings, home.disk)
        home = home._replace(
            segment_bytes=settings.segment_bytes, wal_segment_bytes=settings.wal_segment_bytes
        )
        self._channels = Channels(settings)
        hardening.warn_of_open_peer_port(settings)
        hardening.warn_of_shared_ca(settings)
        keys.check_start(home)
        founding = None
        if not home.exists:
            # Members that start together ask each other for the members. One that listens but does
            # not serve yet would make the others wait, so this comes before listening.
            founding = bootstrap.resolve_founding(
                settings, service_manager.extend_start, self._channels.dial
            )
        self.listeners.open()
        if founding is not None:
            bootstrap.create_member(settings, home, founding, self._advertised_urls())
        began = time.monotonic()
        # Loading makes millions of objects and no garbage. The collector would add a fifth.
        gc.disable()
        opened = datadir.open_member(
            home,
            min_ttl_s=math.ceil(1.5 * settings.election_timeout_ms / 1000),  # As in etcd.
            sync_enabled=not settings.unsafe_no_fsync,
            limits=limits.fitting(settings.memory_limit or default_limit_bytes()),
        )
        for note in opened.notes:
            log.warn("recovered from an unclean stop", what=note)
        log.info(
            "recovered data",
            revision=opened.store.revision,
            keys=len(opened.store.index.heads),
            took=f"{time.monotonic() - began:.2f}s",
            applied_index=opened.store.applied_index,
            log_entries=len(opened.entries),
        )
        self.member = self.connections.member = _make_member(settings, opened, self._channels.dial)
        self._channels.identify(opened.cluster_id, opened.member_id)
        if self._channels.client_secret is not None:
            self.connections.accept_secret = self._channels.client_secret.accept
        if PEERS not in self.listeners.purposes:
            self.member.reachability.probe = _without_peer_port
        self.member.start_writer = self._start_writer
        self.member.attributes = proto.Member(
            ID=self.member.identity.member_id,
            name=settings.name,
            clientURLs=self._advertised_urls(),
        )
        self._sites = {
            purpose: self._site(purpose) for purpose in self.listeners.purposes - {PEERS}
        }
        self._addresses = Addresses(self._do_in_loop) if settings.peer_address_check else None
        self._budget = Budget(settings.memory_limit or default_limit_bytes())
        reports = self._reports(self._disk_reported)
        self._log_thread = threads.LogThread(opened.wal, self.member.metrics, reports)
        self._disk_thread = threads.DiskThread(self.member.metrics, reports)

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

        Raises StartError if the initial hash check finds a difference, and DiskFailed."""
        self._prepare_loop()
        self.listeners.accept(PEERS, METRICS)
        if self.settings.initial_corrupt_check:
            self.member.hash_check.initial.begin(time.monotonic())
        self.member.catch_up.begin()
        self._serve_if_checked()
        self._next_tick = time.monotonic() + self._tick_s
        while self._stopping_since is None or not self._may_stop(time.monotonic()):
            self._turn()
        return self._stop()

    def _turn(self) -> None:
        """Wait for sockets or the next timer, then let each part proceed."""
        member, connections, clock = self.member, self.connections, time.monotonic
        timeout_s = 0.0
        if not (connections.have_work or member.has_urgent_work):
            timeout_s = max(0.0, min(self._next_tick, member.rests_until) - clock())
        ready = self._selector.select(timeout_s)
        began = clock()
        self._look_for_stall(began, timeout_s)
        connections.serve(ready, began)
        if self._results:
            self._take_results()
        if self._signal and self._stopping_since is None:
            log.info("received signal; shutting down", signal=signal.Signals(self._signal).name)
            self._begin_stop()
        self._look_for_stall(now := clock())
        if now >= self._next_tick:
            self._tick(now)
        member.hub.tick(now)
        member.begin_turn(now)
        if (saves := member.take_saves()) and self._save_now(saves):
            saves = []
        member.proceed(clock())
        if not self._serves:
            self._serve_if_checked()
        elif not self._is_ready:
            self._become_ready()
        self._give_work(saves)
        if member.peers.links:
            self._dial_peers(now)
        connections.produce()
        connections.send_output()
        member.maintain(lambda: bool(self._selector.select(0)))
        self._give_disk_work()  # After `maintain`, whose tasks would wait for the next tick.
        collect_new()
        member.metrics.turn_s.observe(clock() - began)

    def _look_for_stall(self, now: float, waited_s: float = 0.0) -> None:
        """Extend leases by the time in which the loop stood still: no client could renew one.
        `waited_s`: how much of the time since the last call it was meant to wait."""
        lost_s = now - self._ran_at - waited_s
        if lost_s > STALL_S and (lessor := self.member.state.lessor).promoted:
            lessor.postpone(now - lost_s, lost_s)
            now = time.monotonic()  # Millions of leases take a while: this is not another stall.
        self._ran_at = now

    def _prepare_loop(self) -> None:
        collect_only_new_objects()
        gc.callbacks.append(self._collecting)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._signalled)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGHUP,))  # One may have come already.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # Ignored, it hides how children end.
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def _collecting(self, phase: str, _: Any) -> None:
        """The garbage collector starts or stops."""
        now = time.perf_counter()
        if phase == "start":
            self._collects_since = now
        else:
            self.member.metrics.collector_s.observe(now - self._collects_since)

    def _serve_if_checked(self) -> None:
        """Accept clients once the initial hash check, if there is one, is over, --force-new-cluster
        is carried out, and a member that joins has the data of its cluster. Raises StartError if
        the hash check found a difference."""
        member = self.member
        check = member.hash_check.initial
        is_checked = check.is_over and member.forced.is_done and member.rollback.is_over
        if self._stopping_since is not None or not is_checked:
            return
        if member.catch_up.is_joining:
            if not log.limited("joining", 0.1):
                why = "waiting for the data of the cluster before serving clients"
                store, needed = member.state.store, member.catch_up.needed_index
                log.info(why, applied_index=store.applied_index, needed_index=needed or "?")
                service_manager.extend_start(why)
            return
        if check.difference:
            raise datadir.StartError(
                f"this member's data differs from the others': {check.difference}. If this one is "
                "wrong, remove this member, empty its data directory, and add it again"
            )
        self.listeners.accept(CLIENTS, HTTP)
        addresses = [format_address(host, port) for host, port in self.listeners.addresses]
        command = first_command(self.settings, addresses[0])
        is_new = member.state.store.revision == 1 and len(member.state.membership.members) == 1
        log.info(
            f"serving client traffic on {', '.join(addresses)}"
            + (f"; next, in another terminal: {command} put greeting hello" if is_new else "")
        )
        _check_peer_port(member, self.settings)
        self._serves = True
        self._become_ready()

    def _become_ready(self) -> None:
        """Report readiness if there is a leader and this member has applied what was committed when
        it started. Without a leader hardly any request can be served."""
        if self.member.raft.leader and self.member.catch_up.is_over:
            self._is_ready = True
            own_id = f"{self.member.identity.member_id:x}"
            log.info("ready to serve client requests", local_member_id=own_id)
            service_manager.notify("READY=1\nSTATUS=serving")

    def _take_results(self) -> None:
        """Handle what the threads have reported."""
        while self._results:
            self._results.popleft()()

    def _disk_reported(self, result: Any) -> None:
        """Handle None (a task is done), saves that are durable, or the error of a failed disk."""
        if isinstance(result, BaseException):
            raise threads.DiskFailed(str(result)) from result
        if result is None:
            self.member.finished()
        else:
            self._log_thread.taken(result)
            self.member.persisted(result)

    def _give_work(self, saves: Sequence[Ready] = ()) -> None:
        member = self.member
        if saves := [*saves, *member.take_saves()]:
            self._log_thread.save(saves)
        while (job := member.logins.take()) is not None:
            threads.start_login(job, self._reports(member.logins.finished))

    def _give_disk_work(self) -> None:
        member = self.member
        if (task := member.take_task()) is not None:
            self._disk_thread.run(task)
        if (released := member.maintenance.released) is not None:
            member.maintenance.released = None
            self._log_thread.release(*released, min(released[0], member.log_begin))

    def _save_now(self, saves: list[Ready]) -> bool:
        """Save before anything is applied, because the other members wait for it, if that is quick
        and no input waits. If not, the log thread saves later: it would slow `proceed` down."""
        member, thread, connections = self.member, self._log_thread, self.connections
        thread.is_alone = not member.peers.links
        if not thread.is_alone:
            # Appends leave first, so that the other members save at the same time.
            connections.send_output(to_clients=False)
        if (
            member.metrics.proposals_pending > QUICK_WRITES
            or member.is_applying
            or connections.have_unread
            or not thread.is_quick(saves)
            or (took_s := thread.save_now(saves)) is None
        ):
            return False
        if took_s > threads.QUICK_SYNC_S:
            self._look_for_stall(time.monotonic())  # Before the renewals that are answered now.
            if connections.are_from_clients(self._selector.select(0)):
                thread.record_request(took_s)
        member.persisted(saves)
        connections.send_output(to_clients=False)  # A follower's acknowledgement.
        return True

    def _reports(self, handle: Callable[[Any], None]) -> Callable[[Any], None]:
        """For a thread: calls `handle` in the loop with what the thread reports."""
        return lambda result: self._do_in_loop(partial(handle, result))

    def _do_in_loop(self, do: Callable[[], None]) -> None:
        """Wake the loop, which then calls `do`. Called in a thread."""
        self._results.append(do)
        with suppress(BlockingIOError):  # The pipe is full, so the loop wakes anyway.
            os.write(self._wake_write, b"\0")

    def _start_writer(self, image: Any, resume: Callable[[], None]) -> Any:
        from etcdlite import backup_process  # Few members send a backup for etcd.

        return backup_process.start(image, partial(self._do_in_loop, resume))

    def _woken(self, mask: int) -> None:
        os.read(self._wake_read, 4096)

    def _tick(self, now: float) -> None:
        tick_s = self._tick_s
        if self._is_ready and may_rest(self.member):
            tick_s = max(tick_s, LONE_TICK_S)
        self._next_tick += tick_s
        if self._next_tick < now:
            self._next_tick = now + tick_s
        self.member.tick()
        self._watchdog.feed(now)
        if self._must_reload:
            self._must_reload = False
            self._reload_log()
        if self._serves and not self._is_ready and not log.limited("waiting for a leader", 0.1):
            missing = self.member.leadership.missing_voters()
            if missing or self.member.raft.leader:
                service_manager.extend_start(missing or "catching up with the leader")
        if self.member.rollback.refusal and self._stopping_since is None:
            raise datadir.StartError(self.member.rollback.refusal.removeprefix("etcdlite: "))
        if (since := self.member.removal.since) is not None and now - since > REMOVED_S:
            self._leave()
        if now >= self._next_session_tick:
            self._next_session_tick = now + SESSION_TICK_S
            self.listeners.resume()
            self.connections.tick(now, self._budget)
            self.member.metrics.settle()
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self._channels.look()

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
        protocols = Counter(connection.session.protocol for connection in self.connections.all)
        scrape = exposition.Scrape(
            self.member,
            protocols,
            self._sites.values(),
            self._budget,
            self._channels.expiries,
            backup_status.read(self.settings.backup_status_file),
        )
        return scrape.render()

    # Other members.

    def _dial_peers(self, now: float) -> None:
        for link in tuple(self.member.peers.links.values()):
            if link.dial is None or link.shipment is not None:
                for dial in link.dials(now, self.connections.dirty.append):
                    reports = self._reports(self._dialed)
                    threads.start_dial(dial, link.url, self._channels.dial, reports)

    def _dialed(self, dialed: threads.Dialed) -> None:
        dial, peer, result, channel, plaintext = dialed
        if isinstance(result, OSError):
            # The listener of a dying process resets the connections that it has not accepted.
            is_refused = isinstance(result, (ConnectionRefusedError, ConnectionResetError))
            dial.link.unreachable(dial, str(result.strerror or result), is_refused)
        elif dial.is_closing or self._stopping_since is not None:
            result.close()
            dial.closed()
        else:
            dial.channel = channel
            connection = Connection(result, "", peer, None, dial, channel)
            if not self.connections.add(connection):
                return
            if channel is None or channel.is_established:
                dial.connected()
            else:
                self.connections.dirty.append(dial)
            if plaintext:
                self.connections.feed(connection, plaintext)

    def _accepted(
        self, sock: socket.socket, address: tuple[str, int], purpose: str, url: str
    ) -> None:
        peer = format_address(*address)
        channel = self._channels.accept(purpose, url, address[0])
        site = self._sites.get(purpose)
        on_output = self.connections.dirty.append
        session: Accepted | Opening
        if site is None:
            session = Accepted(self.member, on_output, address[0], self._addresses)
            session.channel = channel
        else:
            wants_secret = channel is None and self._channels.client_secret is not None
            session = Opening(on_output, time.monotonic, purpose != CLIENTS, wants_secret)
            session.client = peer
        self.connections.add(Connection(sock, address[0], peer, site, session, channel))

    # Stopping.

    def _signalled(self, signum: int, frame: Any) -> None:
        # The loop may be at any instruction, so only record it.
        if signum == signal.SIGHUP:
            self._must_reload = True
        elif not self._signal:
            self._signal, self._signal_at_s = signum, time.monotonic()
        elif time.monotonic() > self._signal_at_s + ONE_SIGNAL_S:
            log.warn("received a second signal; exiting at once")
            os._exit(1)

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
        self._channels.reload()

    def _leave(self) -> None:
        """Stop, because this member was removed from the cluster. Raises StartError if it was not
        ready: then it was removed while it was off, and this start was in vain."""
        if self._stopping_since is None:
            own_id = self.member.identity.member_id
            who, unless = "this member", "Its data directory is no longer usable: "
            if own_id not in self.member.state.membership.removed:
                who = "other members say that this one"
                unless = "Unless one was made a new cluster by mistake (--force-new-cluster), "
            what = (
                f"{who} was removed from the cluster; shutting down. {unless}remove "
                f"{self.settings.data_dir} before this machine joins a cluster again"
            )
            if not self._is_ready:
                raise datadir.StartError(what)
            log.error(what, local_member_id=f"{own_id:x}")
            self._begin_stop()
            self.member.give_up()

    def _begin_stop(self) -> None:
        """Accept no more connections and requests, and let those in flight finish."""
        service_manager.notify("STOPPING=1")
        self.member.peers.local.is_stopping = True
        self._stopping_since = time.monotonic()
        self.listeners.close()
        self.connections.begin_stop()

    def _may_stop(self, now: float) -> bool:
        """Whether all requests are answered and no leadership is left, or time is up."""
        assert self._stopping_since is not None
        self.connections.shut_down()
        stopping_s = now - self._stopping_since
        if stopping_s > SHUTDOWN_S:
            return True
        if not self.member.is_idle or not self.connections.are_idle:
            return False
        return stopping_s > HAND_OVER_S or not self.member.leadership.hand_over()

    def _stop(self) -> int:
        log.info("closing etcdlite server", name=self.settings.name)
        self.connections.close_all()
        self._give_work()
        self._give_disk_work()
        stop_waiting()
        self._log_thread.stop()
        self._disk_thread.stop()
        self._take_results()
        self.member.rollback.save()
        self.member.maintenance.close(self.member.is_applying)
        self._lock.close()
        log.info("closed etcdlite server", name=self.settings.name)
        return 0


def _make_member(settings: config.Config, opened: datadir.Opened, dialing: Dialing) -> Member:
    proto.allow_fields(FIELDS_PER_OP * settings.max_txn_ops)
    rng = random.Random(int.from_bytes(os.urandom(32), "little"))
    store = opened.store
    members = datadir.membership(store, opened.member_id)
    remotes = (
        [] if members else bootstrap.rejoin(settings, service_manager.extend_start, dialing).members
    )
    if settings.force_new_cluster:
        members = []
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
        tokens=load_tokens(settings),
    )
    member.reachability.probe = partial(bootstrap.unreachable, dialing=dialing)
    member.hash_check.interval_s = settings.corrupt_check_time_s
    member.hash_check.after_compaction_s = settings.compact_hash_check_time_s
    member.maintenance.auto_compaction = AutoCompaction(
        settings.auto_compaction_retention_s, settings.auto_compaction_retention_revisions
    )
    return member


def load_tokens(settings: config.Config) -> Tokens | None:
    """The tokens that the settings ask for; None for simple ones. Raises StartError."""
    if not settings.auth_token:
        return None
    try:
        return jwt_tokens.load(settings.auth_token)
    except ValueError as failure:
        raise MayPass(f"auth-token: {failure}") from failure


def _without_peer_port(urls: Sequence[str], member_id: int) -> str:
    """The probe of a member that started without its peer port. Another server answers there,
    perhaps with the same ids: two servers with default settings have them."""
    return (
        f"it does not listen at {', '.join(urls)}, which was in use when it started. Restart it "
        "with a --listen-peer-urls of its own"
    )


def first_command(settings: config.Config, address: str) -> str:
    """etcdlite-ctl with the options that reach the first client URL, which listens on `address`."""
    for wildcard, loopback in (("0.0.0.0:", "127.0.0.1:"), ("[::]:", "[::1]:")):
        if address.startswith(wildcard):
            address = loopback + address.removeprefix(wildcard)
    command = "etcdlite-ctl"
    if is_secure(settings.listen_client_urls[0]):
        command += f" --endpoints https://{address} --cacert CA-FILE"
        if settings.client_cert_auth or settings.trusted_ca_file:
            command += " --cert FILE --key FILE"
    elif address != "127.0.0.1:2379":
        command += f" --endpoints {address}"
    if settings.client_secret_file:
        command += f" --secret-file {settings.client_secret_file}"
    return command


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
            peer_urls=",".join(own.peerURLs),
            listen_peer_urls=",".join(listening),
        )


def _fit_disk(settings: config.Config, disk: Disk) -> config.Config:
    """Smaller segments and checkpoints on a small file system: the space that a segment takes at
    once, and what the log holds until a checkpoint, must leave room for the data."""
    data_bytes, wal_bytes = (
        max(disk.space(_existing(path))[1] // SEGMENTS_PER_DISK, MIN_SEGMENT_BYTES)
        for path in (settings.data_dir, settings.wal_dir or settings.data_dir)
    )
    return settings._replace(
        segment_bytes=min(settings.segment_bytes, data_bytes),
        wal_segment_bytes=min(settings.wal_segment_bytes, wal_bytes),
        checkpoint_bytes=min(settings.checkpoint_bytes, 2 * data_bytes, 2 * wal_bytes),
    )


def _existing(path: str) -> str:
    """The directory, or the nearest one above it that exists."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _options(settings: config.Config) -> Options:
    election_timeout_s = settings.election_timeout_ms / 1000
    return Options(
        quota_bytes=settings.quota_backend_bytes,
        segment_bytes=settings.segment_bytes
        + settings.wal_segment_bytes
        + settings.max_request_bytes,
        wal_dir=settings.wal_dir,
        wal_segment_bytes=settings.wal_segment_bytes + settings.max_request_bytes,
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
        token_ttl_s=settings.auth_token_ttl,
    )


def may_rest(member: Member) -> bool:
    """The member is alone and every request is answered, so that ticks may come late."""
    return member.raft.is_sole_voter and not member.raft.learners and member.is_idle
