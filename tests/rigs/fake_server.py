"""A small server of the native protocol for the client's tests, which can misbehave.

Each connection has a thread; all connections, and all servers given the same `FakeStore`, share one
store: a list of events, enough for put, range and watch. `FakeServer.intercept` sees every request
first and may answer it, drop the connection, or ignore it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from etcdlite import frames, methods, proto
from rigs.ports import free_ports

HELLO = proto.Hello(cluster_id=1, member_id=1, version="fake", max_request_bytes=1 << 20)
GREETING = frames.HANDSHAKE.pack(frames.MAGIC, 1, 0) + frames.frame(0, 0, 0, HELLO.encode())

DROP = "drop the connection"
IGNORE = "say nothing, not even to a cancel"


class FakeStore:
    """Every event since revision 1, one per revision, and a condition to wait for new ones."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.events: list[Any] = []
        self.compacted = 0
        """The revision that history was compacted at."""

    @property
    def revision(self) -> int:
        return len(self.events) + 1

    def header(self) -> Any:
        return proto.ResponseHeader(cluster_id=1, member_id=1, revision=self.revision, raft_term=1)

    def put(self, key: bytes, value: bytes) -> None:
        with self.changed:
            old = self.get(key)
            revision = self.revision + 1
            kv = proto.KeyValue(
                key=key,
                value=value,
                mod_revision=revision,
                create_revision=old.create_revision if old else revision,
                version=old.version + 1 if old else 1,
            )
            self.events.append(proto.Event(kv=kv))
            self.changed.notify_all()

    def get(self, key: bytes) -> Any:
        for event in reversed(self.events):
            if event.kv.key == key:
                return event.kv if event.type == 0 else None
        return None

    def keys(self, request: Any) -> list[Any]:
        keys = {event.kv.key for event in self.events if matches(request, event.kv.key)}
        return [kv for kv in map(self.get, sorted(keys)) if kv is not None]


def matches(request: Any, key: bytes) -> bool:
    if not request.range_end:
        return key == request.key
    return request.key <= key and (request.range_end == b"\0" or key < request.range_end)


class FakeServer:
    """Listens on a free port of 127.0.0.1 until `stop`; `start` listens on the same port again."""

    def __init__(self, store: FakeStore | None = None) -> None:
        self.store = store if store is not None else FakeStore()
        self.greeting = GREETING
        self.requests: list[tuple[str, Any]] = []
        """Each request received: (method, message)."""
        self.cancelled: list[int] = []
        """The ids of the requests that were cancelled."""
        self.connections: list[FakeConnection] = []
        self.intercept: Callable[[FakeConnection, int, str, Any], str | bytes | None] | None = None
        """(connection, request id, method, message) -> raw bytes to send, DROP, IGNORE or None."""
        self.joins_first_events = False
        """The answer to a watch's create request arrives together with its first events."""
        self.bytes_at_once = 0
        """If not 0: it takes in only this much each hundredth of a second."""
        (self.port,) = free_ports(1)
        self.start()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        if self._listener.fileno() >= 0:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        self.drop_connections()

    def drop_connections(self) -> None:
        for connection in self.connections:
            connection.drop()
        self.connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            connection = FakeConnection(self, sock)
            self.connections.append(connection)
            if listener.fileno() < 0:
                connection.drop()  # It came while the server was stopped.
            threading.Thread(target=connection.serve, daemon=True).start()


class FakeConnection:
    def __init__(self, server: FakeServer, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.open_watches: set[int] = set()
        self._lock = threading.Lock()

    def drop(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        with self.server.store.changed:
            self.open_watches.clear()
            self.server.store.changed.notify_all()

    def send(self, data: bytes) -> None:
        with self._lock:
            self._send(data)

    def _send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError:
            pass  # The client is gone.

    def reply(self, request_id: int, method: int, message: Any, flags: int = frames.END) -> None:
        self.send(frames.frame(request_id, method, flags, message.encode()))

    def fail(self, request_id: int, method: int, code: int, text: str) -> None:
        message = proto.Error(code=code, message=text)
        self.reply(request_id, method, message, frames.END | frames.ERROR)

    def serve(self) -> None:
        with self.sock:
            if not self._handshake():
                return
            reader = frames.FrameReader(1 << 24)
            while True:
                for request_id, method, flags, body in reader:
                    if self._handle(request_id, method, flags, body) == DROP:
                        self.drop()
                        return
                try:
                    if self.server.bytes_at_once:
                        time.sleep(0.01)
                    data = self.sock.recv(self.server.bytes_at_once or 65536)
                except OSError:
                    data = b""
                if not data:
                    self.drop()
                    return
                reader.feed(data)

    def _handshake(self) -> bool:
        got = b""
        while len(got) < frames.HANDSHAKE.size:
            data = self.sock.recv(frames.HANDSHAKE.size - len(got))
            if not data:
                return False
            got += data
        self.send(self.server.greeting)
        return got.startswith(frames.MAGIC)

    def _handle(self, request_id: int, method: int, flags: int, body: bytes) -> str | None:
        server = self.server
        if method == frames.PING:
            name, message = "Ping", body
        else:
            rpc = methods.METHODS[method]
            name, message = rpc.full, rpc.request.decode(body)
        is_cancel = bool(flags & frames.CANCEL)
        if is_cancel:
            server.cancelled.append(request_id)
        else:
            server.requests.append((name, message))
        answer = None
        if server.intercept is not None:
            answer = server.intercept(self, request_id, name, message)
        if isinstance(answer, bytes):
            self.send(answer)
        elif answer is None and is_cancel:
            with self._lock:
                self.open_watches.discard(request_id)
            self.fail(request_id, method, 1, "etcdserver: request canceled")
        elif answer is None:
            self._serve(request_id, method, name, message)
        return answer if answer == DROP else None

    def _serve(self, request_id: int, method: int, name: str, message: Any) -> None:
        store = self.server.store
        if name == "Ping":
            self.send(frames.frame(request_id, method, frames.END, message))
        elif name == "KV.Put":
            if not message.key:
                self.fail(request_id, method, 3, "etcdserver: key is not provided")
                return
            store.put(message.key, message.value)
            self.reply(request_id, method, proto.PutResponse(header=store.header()))
        elif name == "KV.Range":
            kvs = store.keys(message)
            response = proto.RangeResponse(header=store.header(), kvs=kvs, count=len(kvs))
            self.reply(request_id, method, response)
        elif name == "Watch.Watch":
            if message.create_request is not None:
                self.open_watches.add(request_id)
                arguments = (request_id, method, message.create_request)
                threading.Thread(target=self._watch, args=arguments, daemon=True).start()
            elif message.progress_request is not None:
                response = proto.WatchResponse(header=store.header())
                self.reply(request_id, method, response, 0)
        elif name == "Lease.LeaseKeepAlive":
            response = proto.LeaseKeepAliveResponse(header=store.header(), ID=message.ID, TTL=5)
            self.reply(request_id, method, response, 0)
            self.send(frames.frame(request_id, method, frames.END, b""))
        elif name == "Maintenance.Snapshot":
            for blob in (b"one", b"two"):
                self.reply(request_id, method, proto.SnapshotResponse(blob=blob), 0)
            self.send(frames.frame(request_id, method, frames.END, b""))
        else:
            self.fail(request_id, method, 12, f"unknown method {name}")

    def _watch(self, request_id: int, method: int, request: Any) -> None:
        store = self.server.store
        created = proto.WatchResponse(header=store.header(), created=True)
        at = max(2, request.start_revision or created.header.revision + 1)
        head = frames.frame(request_id, method, 0, created.encode())
        if not self.server.joins_first_events:
            self.send(head)
            head = b""
        if at < store.compacted:
            response = proto.WatchResponse(
                header=store.header(), canceled=True, compact_revision=store.compacted
            )
            self.reply(request_id, method, response, 0)
            self.send(frames.frame(request_id, method, frames.END, b""))
            return
        while True:
            with store.changed:
                while request_id in self.open_watches and store.revision < at:
                    store.changed.wait()
                if request_id not in self.open_watches:
                    return
                events = store.events[at - 2 : at + 98]
            at += len(events)
            wanted = [event for event in events if matches(request, event.kv.key)]
            if wanted:
                response = proto.WatchResponse(header=store.header(), events=wanted)
                with self._lock:
                    # Nothing may follow the answer to a cancel.
                    if request_id in self.open_watches:
                        self._send(head + frames.frame(request_id, method, 0, response.encode()))
                        head = b""
