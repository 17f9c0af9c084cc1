"""The server leaves no reference cycles behind, whatever its clients do.

The collector visits only new objects (`memory.py`): what was old before it became part of a cycle
is never freed. And until the collector runs, a cycle keeps what it refers to, often a whole
connection: the traceback of an error has the frames of all callers, and their variables.
"""

from __future__ import annotations

import contextlib
import json
import signal
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rigs import attacks
from rigs.certs import make_authority
from rigs.processes import ServerProcess, wait_until

from etcdlite import frames, methods, proto
from etcdlite.errors import EtcdError
from etcdlite.frames import HANDSHAKE, MAGIC
from etcdlite.wire import http2

TIMES = 4
EVERYTHING = proto.RangeRequest(key=b"\0", range_end=b"\0")
WATCH = proto.WatchRequest(create_request=proto.WatchCreateRequest(key=b"k"))
BIG = proto.RangeRequest(key=b"big/", range_end=b"big0")
CLIENT_METHODS = [
    name
    for name, method in methods.METHOD_BY_NAME.items()
    if not name.startswith("Log.") and name not in ("Auth.AuthEnable", "Maintenance.Snapshot")
]


class Uncollected:
    """A running server of `rigs/uncollected.py`."""

    def __init__(self, folder: Path, server: Any, *flags: str) -> None:
        program = (sys.executable, "-m", "tests.rigs.uncollected")
        self.process: ServerProcess = server(*flags, program=program, start=False)
        self._file = folder / f"{self.process.data_dir.name}.cycles"
        self._file.touch()
        self.process.environ["CYCLES_FILE"] = str(self._file)
        self.process.start()

    def look(self) -> dict[str, Any]:
        """What the collector finds now."""
        count = self._file.read_text().count("\n")
        self.process.signal(signal.SIGUSR1)
        wait_until(lambda: self._file.read_text().count("\n") > count, "it looks")
        return json.loads(self._file.read_text().splitlines()[-1])

    def check(self, acts: dict[str, Callable[[int], object]]) -> None:
        """Carry out each act a few times: it leaves no cycle, and no connection that is closed."""
        found = {name: cycles for name, act in acts.items() if (cycles := self._cycles(name, act))}
        assert not found, json.dumps(found, indent=1)

    def _cycles(self, name: str, act: Callable[[int], object]) -> dict[str, int]:
        act(0)
        before = self.look()["connections"]
        cycles: dict[str, int] = {}

        def is_over() -> bool:
            seen = self.look()
            cycles.update(seen["cycles"])
            return seen["connections"] <= before

        for attempt in range(2):  # What is imported for it leaves cycles once.
            cycles.clear()
            for number in range(TIMES):
                act(1 + TIMES * attempt + number)
            wait_until(is_over, f"all connections are closed after: {name}")
            if not cycles:
                break
        return cycles

    # What clients do.

    def send(self, data: bytes) -> None:
        """Send bytes on a new connection, wait for an answer or the end, and close it."""
        with self.process.connect() as sock:
            sock.sendall(data)
            if data:
                sock.settimeout(0.3)
                with contextlib.suppress(OSError):
                    sock.recv(1 << 16)

    def ask(self, *asked: tuple[str, Any], flags: int = frames.END) -> None:
        """Send native requests on a new connection, get an answer to each, and close it."""
        raw = self.process.talk()
        for number, (name, request) in enumerate(asked, 1):
            raw.send(number, name, request, flags)
        for _ in asked:
            raw.receive()
        raw.sock.close()

    def hang_up(self, *asked: tuple[str, Any]) -> None:
        """Send native requests, and close the connection when the first one is answered."""
        raw = self.process.talk()
        raw.send(1, "KV.Put", proto.PutRequest(key=b"k"))
        for number, (name, request) in enumerate(asked, 2):
            raw.send(number, name, request, 0)
        raw.receive()
        raw.sock.close()

    def grpc(self, path: str, request: Any, *fields: tuple[bytes, bytes], end: bool = True) -> None:
        """Send a gRPC request on a new connection, get the response or a part, and close it."""
        body = request if isinstance(request, bytes) else request.encode()
        message = bytes(1) + len(body).to_bytes(4, "big") + body
        flags = http2.END_STREAM if end else 0
        with self.process.connect() as sock:
            sock.sendall(
                http2.PREFACE
                + attacks.settings(1 << 20)
                + attacks.grpc_stream(0, path, *fields)
                + http2.frame(http2.DATA, flags, 1, message)
            )
            sock.settimeout(0.5)
            data = b""
            with contextlib.suppress(OSError):
                while len(data) < 150 and (some := sock.recv(1 << 16)):
                    data += some

    def post(self, path: str, body: str) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        self.send((head + body).encode())


def path(name: str) -> str:
    service = {"Lock": "v3lockpb", "Election": "v3electionpb"}
    package = service.get(name.split(".")[0], "etcdserverpb")
    return f"/{package}.{name.replace('.', '/')}"


@pytest.mark.timeout(300)
def test_requests_and_connections_that_end_in_any_way(server: Any, tmp_path: Path) -> None:
    one = Uncollected(tmp_path, server)
    for number in range(80):
        one.ask(("KV.Put", proto.PutRequest(key=b"big/%d" % number, value=bytes(1 << 20))))
    put = proto.PutRequest(key=b"k")
    hello, grpc = HANDSHAKE.pack(MAGIC, 1, 1), http2.PREFACE + attacks.settings(1 << 20)
    eight = [proto.RequestOp(request_range=BIG)] * 8
    too_large = proto.TxnRequest(success=eight)
    writes_too = proto.TxnRequest(success=[*eight, proto.RequestOp(request_put=put)])
    waits = proto.LockRequest(name=b"n")
    number = methods.METHOD_BY_NAME["KV.Put"].number

    def lock(n: int) -> None:
        lease = n + 1000
        holder, waiter = one.process.talk(), one.process.talk()
        for raw, ID in ((holder, lease), (waiter, lease + 100)):
            raw.send(1, "Lease.LeaseGrant", proto.LeaseGrantRequest(ID=ID, TTL=600))
            raw.receive()
            raw.send(2, "Lock.Lock", proto.LockRequest(name=b"door", lease=ID))
            if raw is holder:
                raw.receive()
        waiter.send(3, "Lease.LeaseRevoke", proto.LeaseRevokeRequest(ID=lease + 100))
        waiter.receive()
        holder.send(3, "Lease.LeaseRevoke", proto.LeaseRevokeRequest(ID=lease))
        waiter.receive()  # It had its turn, and no key any more.
        holder.receive()
        holder.sock.close()
        waiter.sock.close()

    def cancel(n: int) -> None:
        raw = one.process.talk()
        raw.send(1, "Watch.Watch", WATCH, 0)
        raw.receive()
        raw.send(2, "Lock.Lock", waits, 0)
        for call, name in ((1, "Watch.Watch"), (2, "Lock.Lock")):
            method = methods.METHOD_BY_NAME[name].number
            raw.sock.sendall(frames.frame(call, method, frames.CANCEL, b""))
        raw.send(3, "KV.Put", put)
        while raw.receive()[0] != 3:
            pass
        raw.sock.close()

    acts: dict[str, Callable[[int], object]] = {
        "nothing": lambda n: one.send(b""),
        "half a handshake": lambda n: one.send(hello[:5]),
        "another version": lambda n: one.send(HANDSHAKE.pack(MAGIC, 99, 99)),
        "a frame that is none": lambda n: one.send(hello + bytes(30)),
        "a message that is none": lambda n: one.send(
            hello + frames.frame(1, number, frames.END, b"\xff\xff")
        ),
        "an unknown method": lambda n: one.send(hello + frames.frame(1, 0xEE, frames.END, b"")),
        "hang up": lambda n: one.hang_up(
            ("Watch.Watch", WATCH), ("Lock.Lock", waits), ("KV.Range", BIG), ("KV.RangeStream", BIG)
        ),
        "hang up during a backup": lambda n: one.hang_up(
            ("Maintenance.Snapshot", proto.SnapshotRequest())
        ),
        "a lock and one who waits for it": lock,
        "cancelled calls": cancel,
        "a transaction that is too large": lambda n: one.ask(
            ("KV.Txn", too_large), ("KV.Txn", writes_too)
        ),
        "gRPC: nothing": lambda n: one.send(grpc),
        "gRPC: an unknown path": lambda n: one.grpc("/no/such", b""),
        "gRPC: a message that is none": lambda n: one.grpc(path("KV.Put"), b"\xff\xff"),
        "gRPC: bad headers": lambda n: one.send(
            grpc + http2.frame(http2.HEADERS, http2.END_HEADERS, 1, b"\xff" * 6)
        ),
        "gRPC: an open watch": lambda n: one.grpc(path("Watch.Watch"), WATCH, end=False),
        "gRPC: a token that is none": lambda n: one.grpc(path("KV.Put"), put, (b"token", b"x.7")),
        "HTTP: metrics": lambda n: one.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        "HTTP: health": lambda n: one.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        "HTTP: bad": lambda n: one.send(b"GET / HTTP/1.1\r\nbad header\r\n\r\n"),
        "JSON": lambda n: one.post("/v3/kv/range", '{"key": "aw=="}'),
        "JSON that is none": lambda n: one.post("/v3/kv/range", "{"),
        "JSON: a watch": lambda n: one.post("/v3/watch", '{"create_request": {"key": "aw=="}}'),
        "JSON: a lock": lambda n: one.post("/v3/lock/lock", '{"lease": 5}'),
    }
    for name in CLIENT_METHODS:
        empty = methods.METHOD_BY_NAME[name].request()
        acts[f"empty {name}"] = lambda n, name=name, empty=empty: one.hang_up((name, empty))
        acts[f"gRPC: empty {name}"] = lambda n, name=name, empty=empty: one.grpc(path(name), empty)
    alarm = proto.AlarmRequest(action=proto.AlarmRequest.ACTIVATE, alarm=1)
    refused = (
        ("KV.Put", put), ("Lease.LeaseGrant", proto.LeaseGrantRequest(TTL=60)), ("Lock.Lock", waits)
    )  # fmt: skip
    one.check(acts)
    one.ask(("Maintenance.Alarm", alarm))
    one.check({"no space": lambda n: one.ask(*refused)})


def test_users_that_are_refused(server: Any, tmp_path: Path) -> None:
    one = Uncollected(tmp_path, server)
    client = one.process.client()
    for name in ("root", "joe"):
        client.call("Auth.UserAdd", proto.AuthUserAddRequest(name=name, password="x"))
    client.call("Auth.RoleAdd", proto.AuthRoleAddRequest(name="root"))
    client.call("Auth.UserGrantRole", proto.AuthUserGrantRoleRequest(user="root", role="root"))
    client.call("Auth.AuthEnable", proto.AuthEnableRequest())
    login = proto.AuthenticateRequest(name="joe", password="x")
    raw = one.process.talk()
    raw.send(1, "Auth.Authenticate", login)
    token = proto.AuthenticateResponse.decode(raw.receive()[3]).token.encode()
    wrong = proto.AuthenticateRequest(name="joe", password="y")
    acts: dict[str, Callable[[int], object]] = {
        "a wrong password": lambda n: one.ask(("Auth.Authenticate", wrong)),
        "no token": lambda n: one.ask(("KV.Put", proto.PutRequest(key=b"k"))),
        "a watch with a token that is none": lambda n: one.grpc(
            path("Watch.Watch"), WATCH, (b"token", b"x.7")
        ),
        "a backup with a token that is none": lambda n: one.grpc(
            path("Maintenance.Snapshot"), b"", (b"token", b"x.7")
        ),
        "a lock with a token that is none": lambda n: one.grpc(
            path("Lock.Lock"), proto.LockRequest(name=b"k"), (b"token", b"x.7")
        ),
        "hang up before a login": lambda n: one.hang_up(("Auth.Authenticate", login)),
    }
    for name, request in {
        "KV.Put": proto.PutRequest(key=b"k"),
        "KV.Range": EVERYTHING,
        "KV.Txn": proto.TxnRequest(success=[proto.RequestOp(request_range=BIG)]),
        "Watch.Watch": WATCH,
        "Lock.Lock": proto.LockRequest(name=b"k"),
        "Election.Campaign": proto.CampaignRequest(name=b"k", lease=4),
        "Election.Observe": proto.LeaderRequest(name=b"k"),
        "Lease.LeaseKeepAlive": proto.LeaseKeepAliveRequest(ID=4),
        "Maintenance.Snapshot": proto.SnapshotRequest(),
        "Maintenance.Defragment": proto.DefragmentRequest(),
        "Auth.UserAdd": proto.AuthUserAddRequest(name="z", password="y"),
        "Cluster.MemberAdd": proto.MemberAddRequest(peerURLs=["http://a:1"]),
    }.items():
        acts[name] = lambda n, name=name, request=request: one.grpc(
            path(name), request, (b"token", token)
        )
    one.check(acts)


def test_handshakes_that_fail(server: Any, tmp_path: Path) -> None:
    authority = make_authority(tmp_path / "ca")
    certificate, key = authority.issue("server", "s")
    url = "https://127.0.0.1:0"
    one = Uncollected(
        tmp_path, server, f"--cert-file={certificate}", f"--key-file={key}", "--client-cert-auth",
        f"--trusted-ca-file={authority.certificate}", f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
    )  # fmt: skip
    strict, good = ssl.create_default_context(), ssl.create_default_context()
    good.load_verify_locations(authority.certificate)
    good.load_cert_chain(*authority.issue("client", "c"))
    bare = ssl.create_default_context(cafile=authority.certificate)

    def shake(context: ssl.SSLContext) -> None:
        with contextlib.suppress(OSError), one.process.connect() as sock:
            sock.settimeout(0.5)
            with context.wrap_socket(sock, server_hostname="localhost") as channel:
                channel.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                channel.recv(1 << 16)

    one.check(
        {
            "nothing": lambda n: one.send(b""),
            "not TLS": lambda n: one.send(b"GET / HTTP/1.1\r\n\r\n"),
            "an unknown authority": lambda n: shake(strict),
            "no certificate": lambda n: shake(bare),
            "as it should be": lambda n: shake(good),
        }
    )


def test_members_that_cannot_be_reached(server: Any, tmp_path: Path) -> None:
    one = Uncollected(tmp_path, server)
    client = one.process.client()

    def add_and_remove(n: int) -> None:
        request = proto.MemberAddRequest(peerURLs=["http://127.0.0.1:1"], isLearner=True)
        added = client.call("Cluster.MemberAdd", request).member.ID
        one.process.logs_when(lambda: None, f"remote-peer-id={added:x}")
        client.call("Cluster.MemberRemove", proto.MemberRemoveRequest(ID=added))
        with contextlib.suppress(EtcdError, OSError):
            client.get("k")

    one.check({"a member that never starts": add_and_remove})
