"""Tests of the driver of handshakes, with a channel that XORs."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from etcdlite.channel import Channel, ChannelError, shake_hands


class Toy(Channel):
    """Each side says hello; then every byte is inverted."""

    def __init__(self, greeting: bytes = b"hello") -> None:
        self._output = greeting
        self._input = b""

    @property
    def has_output(self) -> bool:
        return bool(self._output)

    def output(self) -> bytes:
        data, self._output = self._output, b""
        return data

    def receive(self, data: bytes) -> bytes:
        if not self.is_established:
            self._input += data
            if not b"hello".startswith(self._input[:5]):
                self._output += b"alert"
                raise ChannelError("it does not greet")
            if len(self._input) < 5:
                return b""
            self.is_established = True
            data = self._input[5:]
        return self.seal(data)

    def seal(self, data: bytes | memoryview) -> bytes:
        return bytes(byte ^ 0xFF for byte in data)


def test_both_ends_shake_hands_and_keep_what_follows() -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b"hello" + bytes(byte ^ 0xFF for byte in b"first"))
        assert shake_hands(near, Toy(), time.monotonic() + 60) == b"first"
        assert far.recv(100) == b"hello"


def test_a_handshake_in_pieces() -> None:
    near, far = socket.socketpair()
    with near, far:

        def send() -> None:
            for byte in b"hello":
                far.sendall(bytes([byte]))
                time.sleep(0.01)

        sender = threading.Thread(target=send)
        sender.start()
        assert shake_hands(near, Toy(), time.monotonic() + 60) == b""
        sender.join()


def test_a_fault_is_told_to_the_other_side_and_raised() -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b"GET / HTTP/1.1")
        with pytest.raises(ChannelError, match="does not greet"):
            shake_hands(near, Toy(), time.monotonic() + 60)
        assert far.recv(100) == b"helloalert"


def test_a_handshake_that_never_ends_has_a_deadline() -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b"hel")
        with pytest.raises(TimeoutError):
            shake_hands(near, Toy(), time.monotonic() + 0.05)


def test_half_a_handshake_says_so() -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b"hel")
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(ChannelError, match="closed the connection during the handshake"):
            shake_hands(near, Toy(), time.monotonic() + 60)
