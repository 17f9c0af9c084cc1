"""The listening sockets: open them, accept connections, refuse those beyond the limit.

A listener has a purpose: the name of the flag that configures it. Accepted connections are handed
to a callback (`Accept`).

Limits: those of `places.py`; `ACCEPTS_PER_TURN` connections from one listener in a turn.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import resource
import selectors
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from etcdlite import config, log
from etcdlite.errors import MayPass
from etcdlite.places import Places
from etcdlite.urls import format_address, host_port

BACKLOG = 1024
"""Connections that the kernel completes and holds until they are accepted."""

ACCEPTS_PER_TURN = 128

OWN_FILES = 2048
"""Open files reserved for the data: this number, or half of the limit if that is less."""

LOW_FILES = 4096
"""A limit of open files that deserves a warning."""

# The purposes of listeners.
CLIENTS = "listen-client-urls"
PEERS = "listen-peer-urls"
HTTP = "listen-client-http-urls"
METRICS = "listen-metrics-urls"

Accept = Callable[[socket.socket, tuple[str, int], str, str], None]
"""Receives an accepted socket, the other side's (host, port), the listener's purpose and URL."""


class Listeners:
    """All listening sockets of the process."""

    def __init__(
        self, settings: config.Config, selector: selectors.BaseSelector, accept: Accept
    ) -> None:
        self.addresses: list[tuple[str, int]] = []
        """The (host, port) pairs for clients."""
        self.ports: dict[str, int] = {}
        """The ports of the URLs for clients, by URL."""
        self._settings = settings
        self._selector = selector
        self._accept_one = accept
        self._waiting: list[tuple[socket.socket, str, str]] = []
        """Listeners that are open but do not accept yet."""
        self._accepting: list[socket.socket] = []
        self._paused: list[selectors.SelectorKey] = []
        """Listeners with a connection that cannot be accepted now."""
        self._spare_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        max_files = raise_file_limit()
        # The store's files come first: the member must stop if it cannot open one.
        most = min(settings.max_connections, max_files - min(OWN_FILES, max_files // 2))
        self.places = Places(most, settings.max_connections_per_address)
        """The open connections; the owner of the sockets counts them."""
        is_low = max_files < LOW_FILES or "max-connections" in settings.sources
        if is_low and most < settings.max_connections:
            log.warn(
                "the limit of open files is low: fewer connections are accepted than "
                "--max-connections. Raise it (LimitNOFILE= of systemd, ulimit -n)",
                open_files=max_files,
                connections=most,
                max_connections=settings.max_connections,
            )

    def open(self) -> None:
        """Listen on all configured addresses without accepting yet. Raises MayPass."""
        for purpose, url in self._settings.listeners:
            try:
                self._listen_at(url, purpose)
            except MayPass as failure:
                if purpose != PEERS or not self._settings.is_surely_alone:
                    raise
                log.warn(f"{failure}. This member is alone and goes on without it")

    @property
    def purposes(self) -> set[str]:
        """The purposes of the listeners that do not accept yet."""
        return {purpose for _, purpose, _ in self._waiting}

    def accept(self, *purposes: str) -> None:
        """Begin to accept connections at the listeners of these purposes."""
        for listener, purpose, url in self._waiting:
            if purpose in purposes:
                accept = partial(self._accept, listener, purpose, url)
                self._selector.register(listener, selectors.EVENT_READ, accept)
                self._accepting.append(listener)
        self._waiting = [waiting for waiting in self._waiting if waiting[1] not in purposes]

    def resume(self) -> None:
        """Try again where accepting failed. Called a few times a second."""
        while self._paused:
            key = self._paused.pop()
            self._selector.register(key.fileobj, key.events, key.data)

    def close(self) -> None:
        """Close all listeners. Accepted connections stay open."""
        self.resume()
        for listener in self._accepting:
            self._selector.unregister(listener)
            listener.close()
        for listener, _, _ in self._waiting:
            listener.close()
        self._accepting.clear()
        self._waiting.clear()

    def _listen_at(self, url: str, purpose: str) -> None:
        host, port = host_port(url)
        failure: OSError | None = None
        listening = False
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            found, failure = [], error
        # A name like localhost may have several addresses, of which not all exist here.
        for family, _, _, _, address in sorted(found, key=lambda info: info[0]):
            try:
                listener = self._listen_on(family, (*address[:1], port, *address[2:]))
            except OSError as error:
                failure = error
                if error.errno != errno.EADDRNOTAVAIL:
                    listening = False
                    break
            else:
                listening = True
                port = listener.getsockname()[1]
                self._waiting.append((listener, purpose, url))
                if purpose == CLIENTS:
                    self.ports.setdefault(url, port)
                    self.addresses.append(listener.getsockname()[:2])
        if not listening:
            assert failure is not None
            if failure.errno == errno.EADDRNOTAVAIL:
                raise MayPass(
                    f"cannot listen on {url}: this machine does not have that address. Give one of "
                    f"its own with --{purpose}, or 0.0.0.0 for all of them"
                ) from failure
            if not found:
                raise MayPass(
                    f"cannot listen on {url}: no address of {host} is known: {failure.strerror}. "
                    f"Add it to /etc/hosts, or give an IP address with --{purpose}"
                ) from failure
            raise MayPass(
                f"cannot listen on {url}: {failure.strerror}. Stop what uses that address, or "
                f"give another one with --{purpose}"
            ) from failure

    def _listen_on(self, family: int, address: tuple[Any, ...]) -> socket.socket:
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._settings.socket_reuse_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        listener.setblocking(False)
        return listener

    def _accept(self, listener: socket.socket, purpose: str, url: str, mask: int) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as failure:
                log.error("cannot accept a connection", "accept", error=str(failure))
                if not self._refuse_one(listener, failure):
                    self._paused.append(self._selector.unregister(listener))
                return
            places = self.places
            why = places.refusal(address[0], purpose == PEERS)
            if why:
                log.warn(
                    f"refused a connection: {why}",
                    why,
                    remote_addr=format_address(*address[:2]),
                    max_connections=places.max_clients,
                    max_connections_per_address=places.max_per_address,
                )
                sock.close()
                continue
            self._accept_one(sock, address[:2], purpose, url)

    def _refuse_one(self, listener: socket.socket, failure: OSError) -> bool:
        """Accept and close one connection with the spare file descriptor, so that its client does
        not wait while no descriptor is free. Returns whether that worked: otherwise a listener with
        a waiting connection would keep the loop awake."""
        if failure.errno not in (errno.EMFILE, errno.ENFILE):
            return False
        refused = False
        if self._spare_fd >= 0:
            os.close(self._spare_fd)
        with suppress(OSError):  # The other side closed it, or another process took the descriptor.
            listener.accept()[0].close()
            refused = True
        try:
            self._spare_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._spare_fd = -1  # Another process took it; try again the next time.
        return refused


def raise_file_limit() -> int:
    """Raise the limit of open files to the hard limit, if the kernel allows it, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except ValueError:
            hard = soft  # The kernel allows no more than fs.nr_open, which may be lower now.
    return hard if hard != resource.RLIM_INFINITY else sys.maxsize


def is_loopback(sock: socket.socket) -> bool:
    """Whether the other side connected to a loopback address of this machine."""
    try:
        return ipaddress.ip_address(sock.getsockname()[0]).is_loopback
    except OSError:
        return False  # The connection is broken.
