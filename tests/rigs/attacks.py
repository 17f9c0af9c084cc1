"""Hostile clients. Each attack opens its connections with `connect`, which keeps them open, and
returns when it has done its worst. What the server does to its connections does not matter."""

from __future__ import annotations

import contextlib
import gzip
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from etcdlite import frames, methods, proto
from etcdlite.frames import FRAME, HANDSHAKE, MAGIC
from etcdlite.wire import http2
from etcdlite.wire.hpack import pack

Connect = Callable[[], socket.socket]

KEYS = 20_000
"""The keys big/00000 and so on that the server must hold, and `answer`, of 900 bytes."""

PATIENCE_S = 5.0
"""An attacker that can send nothing for this long goes on to the next step."""

BIG = proto.RangeRequest(key=b"big/", range_end=b"big0")


def push(sock: socket.socket, data: bytes) -> None:
    """Send as much as the server takes."""
    sock.settimeout(PATIENCE_S)
    with contextlib.suppress(OSError):
        sock.sendall(data)


def native(connect: Connect) -> socket.socket:
    sock = connect()
    push(sock, HANDSHAKE.pack(MAGIC, 1, 1))
    return sock


def native_requests(name: str, message: Any, count: int) -> bytes:
    number, body = methods.METHOD_BY_NAME[name].number, message.encode()
    return b"".join(frames.frame(n, number, frames.END, body) for n in range(1, count + 1))


def grpc(connect: Connect, window: int) -> socket.socket:
    """A connection whose streams have this window."""
    sock = connect()
    push(sock, http2.PREFACE + settings(window))
    return sock


def settings(window: int) -> bytes:
    payload = struct.pack(">HI", http2.INITIAL_WINDOW_SIZE, window)
    return http2.frame(http2.SETTINGS, 0, 0, payload)


def grpc_stream(number: int, path: str, *fields: tuple[bytes, bytes]) -> bytes:
    """The header of the request with this ordinal number."""
    common = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"here"),
        (b"content-type", b"application/grpc"),
    )
    block = pack([*common, *fields])
    return http2.frame(http2.HEADERS, http2.END_HEADERS, 2 * number + 1, block)


def grpc_request(number: int, path: str, body: bytes, packed: bool = False) -> bytes:
    """The request with this ordinal number."""
    encoding = ((b"grpc-encoding", b"gzip"),) if packed else ()
    data = struct.pack(">BI", packed, len(body)) + body
    return grpc_stream(number, path, *encoding) + http2.frame(
        http2.DATA, http2.END_STREAM, 2 * number + 1, data
    )


def windows(connect: Connect) -> None:
    """18,000 streams whose answers wait, and settings that open their windows by a byte each."""
    sock = grpc(connect, 0)
    body = proto.RangeRequest(key=b"answer", serializable=True).encode()
    for first in range(0, 18_000, 1000):
        numbers = range(first, first + 1000)
        path = "/etcdserverpb.KV/Range"
        push(sock, b"".join(grpc_request(number, path, body) for number in numbers))
    for window in range(1, 61):
        push(sock, settings(window))


def closings(connect: Connect) -> None:
    """Connections that are closed with 10,000 open streams, or with as many open watches."""
    path = "/etcdserverpb.Watch/Watch"
    for _ in range(3):
        with grpc(connect, 1 << 20) as sock:
            for first in range(0, 10_000, 1000):
                numbers = range(first, first + 1000)
                push(sock, b"".join(grpc_stream(number, path) for number in numbers))
        with native(connect) as sock:
            push(sock, native_requests("Watch.Watch", proto.WatchRequest(), 10_000))


def bombs(connect: Connect) -> None:
    """A few kilobytes of gzip that become watches with a million filters."""
    filters = proto.WatchCreateRequest(key=b"k", filters=[0] * 1_000_000)
    body = gzip.compress(proto.WatchRequest(create_request=filters).encode())
    for _ in range(4):
        sock = grpc(connect, 1 << 20)
        path = "/etcdserverpb.Watch/Watch"
        push(sock, b"".join(grpc_request(number, path, body, True) for number in range(20)))


def empty_operations(connect: Connect) -> None:
    """Transactions of a megabyte that consist of empty operations."""
    put = methods.METHOD_BY_NAME["KV.Txn"].number
    for _ in range(4):
        sock = native(connect)
        for number in range(1, 6):
            push(sock, frames.frame(number, put, frames.END, b"\x12\x00" * 500_000))


def halves(connect: Connect) -> None:
    """Frames, headers and bodies that are begun and not finished, or come a byte at a time."""
    slow = []
    for _ in range(50):
        push(native(connect), FRAME.pack(1 << 20, 1, 0x11, frames.END) + bytes(60_000))
        push(grpc(connect, 1 << 20), grpc_request(0, "/etcdserverpb.KV/Put", bytes(9000))[:-500])
        sock = connect()
        push(sock, b"POST /v3/kv/put HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n{")
        slow.append(sock)
    for _ in range(20):
        for sock in slow:
            push(sock, b" ")
        time.sleep(0.05)


def deaf_readers(connect: Connect) -> None:
    """200 connections that ask for everything and read nothing."""
    for _ in range(200):
        push(native(connect), native_requests("KV.Range", BIG, 3))


def range_streams(connect: Connect) -> None:
    """3,000 streams of everything, with shut windows, and packets that do nothing."""
    sock = grpc(connect, 0)
    path = "/etcdserverpb.KV/RangeStream"
    body = BIG.encode()
    for first in range(0, 3000, 500):
        numbers = range(first, first + 500)
        push(sock, b"".join(grpc_request(number, path, body) for number in numbers))
    for _ in range(200):
        push(sock, http2.frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)))
        time.sleep(0.005)


def snapshot_holders(connect: Connect) -> None:
    """Backups that are not read, one a connection and many a connection."""
    for count in (1, 1, 1, 1, 100):
        push(
            native(connect), native_requests("Maintenance.Snapshot", proto.SnapshotRequest(), count)
        )


def idle_connections(connect: Connect) -> None:
    """Connections that say nothing."""
    for _ in range(1500):
        with contextlib.suppress(OSError):
            connect()


def sorted_ranges(connect: Connect) -> None:
    """2,000 ranges that are sorted by value."""
    request = proto.RangeRequest(
        key=BIG.key,
        range_end=BIG.range_end,
        limit=1,
        sort_target=proto.RangeRequest.VALUE,
        sort_order=proto.RangeRequest.DESCEND,
    )
    push(native(connect), native_requests("KV.Range", request, 2000))


def lock_waiters(connect: Connect) -> None:
    """500 calls that wait for one lock."""
    push(native(connect), native_requests("Lock.Lock", proto.LockRequest(name=b"one"), 500))


def small_requests(connect: Connect) -> None:
    """Five connections that send 20,000 requests each and read nothing."""
    data = native_requests("KV.Range", proto.RangeRequest(key=b"k"), 20_000)
    for _ in range(5):
        push(native(connect), data)


def password_hashes(connect: Connect) -> None:
    """Five connections that have 2,000 passwords hashed each, for 100 names. With authentication
    enabled, logins with wrong passwords do the same."""
    for number in range(5):
        add = methods.METHOD_BY_NAME["Auth.UserAdd"].number
        bodies = [
            proto.AuthUserAddRequest(name=f"{number}/{each}", password="x").encode()
            for each in range(100)
        ]
        data = b"".join(
            frames.frame(each, add, frames.END, bodies[each % 100]) for each in range(1, 2001)
        )
        push(native(connect), data)


ATTACKS: dict[str, Callable[[Connect], None]] = {
    attack.__name__: attack
    for attack in (
        windows, closings, bombs, empty_operations, halves, deaf_readers, range_streams,
        snapshot_holders, idle_connections, sorted_ranges, lock_waiters, small_requests,
        password_hashes,
    )
}  # fmt: skip


def prepare(client: Any) -> None:
    """Store what the attacks ask for. `client` is an `etcdlite.client.Client`."""
    client.put("answer", "x" * 900)
    for first in range(0, KEYS, 100):
        puts = [
            proto.RequestOp(request_put=proto.PutRequest(key=b"big/%05d" % n, value=bytes(100)))
            for n in range(first, first + 100)
        ]
        client.call("KV.Txn", proto.TxnRequest(success=puts))
