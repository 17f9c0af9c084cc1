"""What stands between a socket and a session: the interface of a channel, sans-IO.

A channel turns the ciphertext of one connection into the plaintext of its session and back. There
are three kinds: none (a connection without a channel is plain and costs nothing), TLS (`tls.py`)
and a shared secret (`secret.py`).

    socket -- ciphertext --> receive -- plaintext --> Session.receive
    socket <-- output ------ seal <---- plaintext --- Outbox.take

The owner of the socket drives it:

1. It makes a channel for one connection. One that dials has `output` at once.
2. Until `is_established`, it gives received bytes to `receive` and sends `output` after each call.
   If `steps_are_long`, it does so in a thread: such a step takes up to some milliseconds. One
   thread at a time uses a channel; which thread does not matter.
3. Then the facts about the other side are known: `alpn`, `user`, `description`. `receive` returns
   the plaintext of all that has arrived (what follows the handshake in the same bytes, too), and
   `seal` returns the ciphertext of all it is given, after any `output` that waits.
4. `receive` may cause output at any time, such as an alert or the answer to a new key. The owner
   sends it when `has_output`.
5. A `ChannelError` ends the connection. The owner sends `output` (an alert that tells the other
   side), as far as the socket takes it at once, logs the error and closes.
6. `close` before the end makes the output that tells the other side that no more follows.

The owner of the loop does this in `Server`; `shake_hands` does step 2 on a blocking socket, for
threads, the blocking client and `bootstrap`.

Invariants: a channel has no clock, socket or thread. It holds back no plaintext: between two calls
it keeps at most one incomplete record (`held_bytes`) and the output that was not taken, which
`receive` bounds by `MAX_OUTPUT_BYTES`. Plaintext is complete, in order and not repeated, or
`receive` raises. `seal` adds at most `MAX_OVERHEAD` to each `RECORD_BYTES` of plaintext.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from socket import socket
from typing import Protocol

RECORD_BYTES = 16 << 10
"""Plaintext is sealed in records of at most this size."""

MAX_OVERHEAD = 256
"""What sealing may add to a record, in bytes."""

MAX_OUTPUT_BYTES = 128 << 10
"""More than any honest handshake sends. A side that makes the other send more breaks the channel.
"""

RECEIVE_BYTES = 16 << 10
"""To be received at once, of ciphertext that may consist of many tiny records. Each takes about
10 us."""

SHAKE_BYTES = 16 << 10
"""A handshake reads at most this much at once."""


class ChannelError(Exception):
    """The channel cannot be established or is broken. The text is a clause for a log line or an
    error message: what happened, why, and what to do about it; it has no secrets in it."""


class Channel:
    """One connection's channel; a subclass implements the methods."""

    kind = "none"
    """For logs and metrics: tls or secret."""
    is_established = False
    """The handshake is complete: both sides are who the settings want them to be."""
    steps_are_long = False
    """A step of the handshake may take longer than a loop can wait."""
    alpn = ""
    """The protocol that both sides agreed on in the handshake; empty if they did not."""
    user = ""
    """The user that the other side proved to be: the common name of its verified certificate."""
    claims: tuple[int, int, int] | None = None
    """The cluster id, the member id, and the id of the member that it means to reach, if the other
    side says so in the handshake; 0 is unknown. Proven with the first plaintext."""
    description = ""
    """The other side, the version and the cipher, for the log. Set when established."""
    is_ended = False
    """The other side has said that it sends no more."""
    memory_bytes = 0
    """The memory that the channel takes besides `held_bytes`, approximately."""
    receive_bytes = RECEIVE_BYTES
    """How much to receive at once."""

    @property
    def has_output(self) -> bool:
        """`output` returns something."""
        raise NotImplementedError

    @property
    def held_bytes(self) -> int:
        """The size of the incomplete record that was received, approximately. While it is not 0,
        the rest must arrive in time (`session.partial_timeout_s`)."""
        return 0

    def receive(self, data: bytes) -> bytes:
        """Process bytes from the socket. Returns the plaintext in them, which may be empty.
        Raises ChannelError."""
        raise NotImplementedError

    def receive_end(self) -> None:
        """Call this when the other side has closed the connection. Raises ChannelError if the
        handshake is not complete; the text says what is missing. After the handshake, the session
        decides whether the end is an error."""
        if not self.is_established:
            raise ChannelError("it closed the connection during the handshake")

    def seal(self, data: bytes | memoryview) -> bytes:
        """The ciphertext of `data`, which may be empty, after all output that waits. Only once
        `is_established`. Raises ChannelError."""
        raise NotImplementedError

    def output(self) -> bytes:
        """Take the bytes to send that carry no plaintext: handshake, alerts."""
        raise NotImplementedError

    def close(self) -> None:
        """No more plaintext follows: add the output that says so."""


Accepting = Callable[[str], Channel]
"""Makes the channel of an accepted connection. Receives the IP address of the other side."""

Dialing = Callable[[str, int], "Channel | None"]
"""Makes the channel of a connection to a member, or None if the connection is plain. Receives the
peer URL, and the id of the member, or 0 if it is not known. Raises ChannelError if the settings do
not allow the connection."""


class Maker(Protocol):
    """Makes the channels of one purpose, as the settings say."""

    def accept(self, address: str, /) -> Channel:
        """As `Accepting`."""

    def dial(self, url: str, target_id: int, /) -> Channel | None:
        """As `Dialing`."""

    def identify(self, cluster_id: int, member_id: int, /) -> None:
        """Say who this side is, as soon as it is known."""

    def reload(self) -> None:
        """Read the files again. Logs what is wrong with them."""


def shake_hands(
    sock: socket, channel: Channel, deadline_s: float, clock: Callable[[], float] = time.monotonic
) -> bytes:
    """Establish `channel` over a blocking socket, until `deadline_s` of `clock`. Returns the first
    plaintext, if some came with the end of the handshake. The socket has a timeout afterwards.

    Raises ChannelError, TimeoutError and other OSErrors; the caller closes the socket."""
    plaintext = b""
    while True:
        left_s = deadline_s - clock()
        if left_s <= 0:
            raise TimeoutError("the handshake takes too long")
        sock.settimeout(left_s)
        if channel.has_output:
            sock.sendall(channel.output())
        if channel.is_established:
            return plaintext
        data = sock.recv(SHAKE_BYTES)
        if not data:
            channel.receive_end()
            raise ChannelError("it closed the connection during the handshake")
        try:
            plaintext += channel.receive(data)
        except ChannelError:
            if channel.has_output:
                with suppress(OSError):  # The error that follows is the one that matters.
                    sock.sendall(channel.output())
            raise
