"""Two small blocking clients with one interface: the native protocol, and gRPC over HTTP/2.

They exist so that etcdlite and etcd are measured through clients of the same kind and cost: plain
Python, bytes in and bytes out, one socket each, no threads. They are no examples of a good client
(`etcdlite/client/blocking.py` is): no retry, no failover, an error ends the benchmark.

The gRPC side speaks as much HTTP/2 (RFC 9113) as unary calls need. Its header block is written
once per method, from the static table and literals; the peer is told to keep no dynamic table
(SETTINGS_HEADER_TABLE_SIZE 0), so equal response headers are equal bytes and are decoded once.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterable
from itertools import islice
from typing import Any

import hpack

from etcdlite import methods

RECEIVE_BYTES = 1 << 18
REPLY_TIMEOUT_S = 600.0
"""Longer than any compaction or defragmentation that is measured."""


class CallFailed(Exception):
    """The server answered with an error, or broke the connection."""


class NativeConnection:
    """One connection of docs/protocol.md."""

    replies_waiting = False

    def __init__(self, port: int, timeout_s: float = REPLY_TIMEOUT_S) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(struct.pack("<8sHH", b"\x89ETCDLT\n", 1, 1))
        self._pending = bytearray()
        self._next_id = 0
        while len(self._pending) < 12:
            self._read()
        version = struct.unpack_from("<H", self._pending, 8)[0]
        if self._pending[:8] != b"\x89ETCDLT\n" or version != 1:
            raise CallFailed(f"handshake refused: {bytes(self._pending)!r}")
        del self._pending[:12]
        for request_id, _ in self.receive():  # HELLO
            assert request_id == 0

    def close(self) -> None:
        self.socket.close()

    def send(self, calls: list[tuple[methods.Method, bytes]]) -> list[int]:
        """Send requests; returns their ids."""
        out = []
        ids = []
        for method, body in calls:
            self._next_id += 1
            ids.append(self._next_id)
            out.append(struct.pack("<IIBB", 6 + len(body), self._next_id, method.number, 1))
            out.append(body)
        self.socket.sendall(b"".join(out))
        return ids

    def receive(self) -> list[tuple[int, bytes]]:
        """Wait for at least one reply; (id, body) each. Raises CallFailed on an error reply."""
        while True:
            replies = self._take_replies()
            if replies:
                return replies
            self._read()

    def receive_once(self) -> list[tuple[int, bytes]]:
        """As `receive`, after a single read: perhaps nothing."""
        self._read()
        return self._take_replies()

    def _take_replies(self) -> list[tuple[int, bytes]]:
        replies = []
        pending = self._pending
        position = 0
        end = len(pending)
        while end - position >= 10:
            length, request_id, _method, flags = struct.unpack_from("<IIBB", pending, position)
            if end - position < 4 + length:
                break
            body = bytes(pending[position + 10 : position + 4 + length])
            if flags & 2:
                raise CallFailed(f"error reply: {body!r}")
            replies.append((request_id, body))
            position += 4 + length
        del pending[:position]
        return replies

    def _read(self) -> None:
        data = self.socket.recv(RECEIVE_BYTES)
        if not data:
            raise CallFailed("the server closed the connection")
        self._pending += data


_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_MAX_WINDOW_BYTES = 2**31 - 1
_MAX_FRAME_BYTES = 16384


def _http2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


class GrpcConnection:
    """One HTTP/2 connection without TLS, unary calls only."""

    def __init__(self, port: int, timeout_s: float = REPLY_TIMEOUT_S) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._authority = b"127.0.0.1:%d" % port
        settings = struct.pack(">HIHIHI", 1, 0, 2, 0, 4, _MAX_WINDOW_BYTES)
        self.socket.sendall(
            _HTTP2_PREFACE
            + _http2_frame(_SETTINGS, 0, 0, settings)
            + _http2_frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _MAX_WINDOW_BYTES - 65535))
        )
        self._pending = bytearray()
        self._next_id = -1
        self._window_bytes = 65535
        self._stream_window_bytes = 65535
        self._unacknowledged_bytes = 0
        self._headers: dict[str, bytes] = {}
        self._decoder = hpack.Decoder()
        self._decoder.max_allowed_table_size = 0
        self._statuses: dict[bytes, bytes] = {}
        self._bodies: dict[int, bytearray] = {}
        self._replies: list[tuple[int, bytes]] = []
        self._prefix = b""
        """Control frames that go before the next requests."""

    def close(self) -> None:
        self.socket.close()

    def send(self, calls: list[tuple[methods.Method, bytes]]) -> list[int]:
        """Send requests; returns their ids. May read replies while it waits for window."""
        out: list[bytes] = [self._prefix]
        self._prefix = b""
        ids = []
        for method, body in calls:
            message = b"\0" + len(body).to_bytes(4, "big") + body
            if len(message) > self._stream_window_bytes:
                raise CallFailed("a request larger than one stream's window")
            while self._window_bytes < len(message):
                self.socket.sendall(b"".join(out))
                out.clear()
                self._read_frames()
            self._window_bytes -= len(message)
            self._next_id += 2
            ids.append(self._next_id)
            out.append(_http2_frame(_HEADERS, 4, self._next_id, self._header_block(method)))
            for start in range(0, len(message), _MAX_FRAME_BYTES):
                part = message[start : start + _MAX_FRAME_BYTES]
                last = start + len(part) == len(message)
                out.append(_http2_frame(_DATA, 1 if last else 0, self._next_id, part))
        self.socket.sendall(b"".join(out))
        return ids

    def receive(self) -> list[tuple[int, bytes]]:
        """Wait for at least one reply; (id, body) each. Raises CallFailed on an error reply."""
        while not self._replies:
            self._read_frames()
        return self._take_replies()

    def receive_once(self) -> list[tuple[int, bytes]]:
        """As `receive`, after a single read at most: perhaps nothing."""
        if not self._replies:
            self._read_frames()
        return self._take_replies()

    def _take_replies(self) -> list[tuple[int, bytes]]:
        replies = self._replies
        self._replies = []
        return replies

    @property
    def replies_waiting(self) -> bool:
        """Whether `receive` would return at once: `send` has read replies on its way."""
        return bool(self._replies)

    def _header_block(self, method: methods.Method) -> bytes:
        block = self._headers.get(method.full)
        if block is None:
            path = method.grpc_path.encode()
            # Indexed :method POST and :scheme http; the others literal, without indexing.
            block = (
                b"\x83\x86"
                + b"\x04" + bytes([len(path)]) + path
                + b"\x01" + bytes([len(self._authority)]) + self._authority
                + b"\x00\x02te\x08trailers"
                + b"\x0f\x10\x10application/grpc"
            )  # fmt: skip
            self._headers[method.full] = block
        return block

    def _read_frames(self) -> None:
        data = self.socket.recv(RECEIVE_BYTES)
        if not data:
            raise CallFailed("the server closed the connection")
        pending = self._pending
        pending += data
        position = self._skip(pending)
        end = len(pending)
        while end - position >= 9:
            length = pending[position] << 16 | pending[position + 1] << 8 | pending[position + 2]
            if end - position < 9 + length:
                break
            kind, flags, stream = struct.unpack_from(">BBI", pending, position + 3)
            payload = bytes(pending[position + 9 : position + 9 + length])
            position += 9 + length
            self._take_frame(kind, flags, stream, payload)
        del pending[:position]

    def _skip(self, pending: bytearray) -> int:
        """How many bytes at the beginning need not be taken frame by frame."""
        return 0

    def _take_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            body = self._bodies.get(stream)
            if body is None:
                self._bodies[stream] = bytearray(payload)
            else:
                body += payload
            self._unacknowledged_bytes += len(payload)
            if self._unacknowledged_bytes > _MAX_WINDOW_BYTES // 4:
                increment = struct.pack(">I", self._unacknowledged_bytes)
                self.socket.sendall(_http2_frame(_WINDOW_UPDATE, 0, 0, increment))
                self._unacknowledged_bytes = 0
        elif kind == _HEADERS:
            status = self._statuses.get(payload)
            if status is None:
                headers = dict(self._decoder.decode(payload, raw=True))
                status = headers.get(b"grpc-status", b"")
                if status not in (b"", b"0"):
                    raise CallFailed(f"error reply: {headers!r}")
                self._statuses[payload] = status
            if flags & 1:
                self._replies.append((stream, bytes(self._bodies.pop(stream, b"")[5:])))
        elif kind == _SETTINGS and not flags & 1:
            for number, value in struct.iter_unpack(">HI", payload):
                if number == 4:
                    self._stream_window_bytes = value
            self.socket.sendall(_http2_frame(_SETTINGS, 1, 0, b""))
        elif kind == _PING and not flags & 1:
            self.socket.sendall(_http2_frame(_PING, 1, 0, payload))
        elif kind == _WINDOW_UPDATE and stream == 0:
            self._window_bytes += int.from_bytes(payload, "big")
        elif kind == _GOAWAY or (kind == _RST_STREAM and any(payload)):
            # A reset with NO_ERROR follows a complete answer (RFC 9113, section 8.1).
            raise CallFailed(f"HTTP/2 frame {kind}: {payload!r}")


Connection = NativeConnection | GrpcConnection


def connect(server_name: str, port: int, timeout_s: float = REPLY_TIMEOUT_S) -> Connection:
    """A connection of the kind that the server speaks best: native to etcdlite, gRPC to etcd. No
    reply within the time is a TimeoutError."""
    kind = NativeConnection if server_name == "etcdlite" else GrpcConnection
    return kind(port, timeout_s)


def call(connection: Connection, method_name: str, request: Any) -> Any:
    """One request, and its decoded reply. Raises CallFailed."""
    method = methods.METHOD_BY_NAME[method_name]
    connection.send([(method, request.encode())])
    ((_, body),) = connection.receive()
    return method.response.decode(body)


def timed_call(connection: Connection, method_name: str, request: Any) -> float:
    """As `call`, leaving the reply encoded; returns the latency in seconds."""
    calls = [(methods.METHOD_BY_NAME[method_name], request.encode())]
    began = time.perf_counter()
    connection.send(calls)
    connection.receive()
    return time.perf_counter() - began


def pipeline(
    connections: list[Connection], method_name: str, bodies: Iterable[bytes], in_flight: int
) -> int:
    """Send every request, `in_flight` at a time over all connections; returns the replies' count.

    Raises CallFailed on the first error reply.
    """
    method = methods.METHOD_BY_NAME[method_name]
    rest = iter(bodies)
    poll = select.poll()
    by_fd = {}
    open_requests = {}
    for connection in connections:
        calls = [(method, body) for body in islice(rest, in_flight // len(connections))]
        connection.send(calls)
        fd = connection.socket.fileno()
        by_fd[fd] = connection
        open_requests[fd] = len(calls)
        poll.register(fd, select.POLLIN)
    done = 0
    while any(open_requests.values()):
        ready = [fd for fd, connection in by_fd.items() if connection.replies_waiting]
        if not ready:
            ready = [fd for fd, _ in poll.poll(REPLY_TIMEOUT_S * 1000)]
            if not ready:
                raise CallFailed("no reply in time")
        for fd in ready:
            got = len(by_fd[fd].receive_once())
            done += got
            calls = [(method, body) for body in islice(rest, got)]
            if calls:
                by_fd[fd].send(calls)
            open_requests[fd] += len(calls) - got
    return done
