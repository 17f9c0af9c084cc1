"""TLS of real processes: every protocol with and without certificates of clients, members, what is
wrong on either side, files that change, and crowds of unfinished handshakes."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_cluster_live
from rigs.pki import Authority, Files, pki
from rigs.processes import PATIENCE_S, SMALL_FILES, ServerProcess, wait_until
from rigs.real_etcd import distributed, without_settings
from test_cluster_live import LiveCluster

from etcdlite import channels, proto, x509
from etcdlite.client import Client, EtcdliteError
from etcdlite.config import load
from etcdlite.handshakes import MAX_HANDSHAKES


class Lab:
    """A CA, certificates, and servers that use them; all live as long as the tests of this file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = pki(folder / "pki")
        self.server = self.ca.issue("server")
        self.alice = self.ca.issue("alice", hosts=(), usages=("client",))
        self.servers: list[ServerProcess] = []

    def start(self, *flags: str, files: Files | None = None) -> ServerProcess:
        files = files or self.server
        one = ServerProcess(
            self.folder / f"server-{len(self.servers)}",
            [
                "--listen-client-urls=https://127.0.0.1:0,http://127.0.0.1:0",
                f"--cert-file={files.cert}",
                f"--key-file={files.key}",
                *flags,
            ],
            (sys.executable, "-m", "etcdlite"),
        )
        self.servers.append(one)
        return one.start()

    def close(self) -> None:
        for one in self.servers:
            one.close()
            print(f"--- log of the server in {one.data_dir}:", *one.lines, sep="\n")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    one = Lab(tmp_path_factory.mktemp("tls"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def tls(lab: Lab) -> ServerProcess:
    """Demands no certificate of clients."""
    return lab.start("--listen-metrics-urls=https://127.0.0.1:0")


@pytest.fixture(scope="module")
def mutual(lab: Lab) -> ServerProcess:
    """Demands one."""
    return lab.start("--client-cert-auth", f"--trusted-ca-file={lab.ca.ca}")


def plain_address(server: ServerProcess) -> str:
    """The address of its other listener, without TLS."""
    line = server.logged("serving client traffic on")
    assert line is not None
    return re.findall(r"127\.0\.0\.1:\d+", line)[1]


def context(lab: Lab, files: Files | None = None, alpn: str = "") -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=lab.ca.ca)
    if alpn:
        made.set_alpn_protocols([alpn])
    if files:
        made.load_cert_chain(*files)
    return made


def https(server: ServerProcess, made: ssl.SSLContext) -> http.client.HTTPSConnection:
    host, _, port = server.endpoint.partition(":")
    return http.client.HTTPSConnection(host, int(port), context=made, timeout=PATIENCE_S)


def connect(server: ServerProcess, made: ssl.SSLContext) -> ssl.SSLSocket:
    host, _, port = server.endpoint.partition(":")
    sock = socket.create_connection((host, int(port)), PATIENCE_S)
    return made.wrap_socket(sock, server_hostname=host)


# The matrix.

KINDS = ("tls", "mutual")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[ServerProcess, bool]:
    """A server, and whether it demands a certificate."""
    return request.getfixturevalue(request.param), request.param == "mutual"


def test_native(lab: Lab, kind: tuple[ServerProcess, bool]) -> None:
    server, is_mutual = kind
    own = {"cert": lab.alice.cert, "key": lab.alice.key} if is_mutual else {}
    with Client(f"https://{server.endpoint}", cacert=lab.ca.ca, **own) as client:
        client.put("native", b"v" * 100)
        big = os.urandom(1_200_000)
        client.put("big", big)
        kv = client.get("big")
        assert kv is not None and kv.value == big
        with client.watch("watched") as watch:
            client.put("watched", "now")
            assert watch.next_event(PATIENCE_S).kv.value == b"now"
    with Client(plain_address(server)) as client:
        assert client.get("native") is not None


def test_grpc(lab: Lab, kind: tuple[ServerProcess, bool]) -> None:
    grpc = pytest.importorskip("grpc")
    server, is_mutual = kind
    files = [Path(lab.ca.ca).read_bytes(), None, None]
    if is_mutual:
        files[1:] = [Path(lab.alice.key).read_bytes(), Path(lab.alice.cert).read_bytes()]
    credentials = grpc.ssl_channel_credentials(*files)
    with grpc.secure_channel(server.endpoint, credentials) as channel:
        put = channel.unary_unary("/etcdserverpb.KV/Put")
        answer = put(proto.PutRequest(key=b"grpc", value=b"v").encode(), timeout=PATIENCE_S)
        assert proto.PutResponse.decode(answer).header.revision > 1
        get = channel.unary_unary("/etcdserverpb.KV/Range")
        for _ in range(100):
            answer = get(proto.RangeRequest(key=b"grpc").encode(), timeout=PATIENCE_S)
        assert proto.RangeResponse.decode(answer).kvs[0].value == b"v"


def test_etcdctl(lab: Lab, kind: tuple[ServerProcess, bool]) -> None:
    server, is_mutual = kind
    own = [f"--cert={lab.alice.cert}", f"--key={lab.alice.key}"] if is_mutual else []
    command = [distributed("etcdctl"), f"--endpoints=https://{server.endpoint}",
               f"--cacert={lab.ca.ca}", *own]  # fmt: skip
    for arguments, expected in ((("put", "ctl", "v"), "OK\n"), (("get", "ctl"), "ctl\nv\n")):
        done = subprocess.run(
            [*command, *arguments], env=without_settings(), capture_output=True, text=True,
            timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.stdout == expected, done.stderr


def test_json(lab: Lab, kind: tuple[ServerProcess, bool]) -> None:
    server, is_mutual = kind
    connection = https(server, context(lab, lab.alice if is_mutual else None))
    body = '{"key": "anNvbg==", "value": "dg=="}'
    connection.request("POST", "/v3/kv/put", body, {"Content-Type": "application/json"})
    assert connection.getresponse().read().startswith(b'{"header"')
    connection.request("GET", "/health")
    assert b"true" in connection.getresponse().read()
    connection.close()


def test_curl_gets_json_although_it_offers_http2(
    lab: Lab, kind: tuple[ServerProcess, bool]
) -> None:
    if not shutil.which("curl"):
        pytest.skip("there is no curl")
    server, is_mutual = kind
    own = ["--cert", lab.alice.cert, "--key", lab.alice.key] if is_mutual else []
    done = subprocess.run(
        ["curl", "-sS", "--cacert", lab.ca.ca, *own, f"https://{server.endpoint}/version"],
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert '"etcdserver"' in done.stdout, done.stderr


def test_a_client_that_offers_http_2_and_1_gets_http_2_for_everything(
    lab: Lab, tls: ServerProcess
) -> None:
    made = ssl.create_default_context(cafile=lab.ca.ca)
    made.set_alpn_protocols(["http/1.1", "h2"])
    with connect(tls, made) as sock:
        assert sock.selected_alpn_protocol() == "h2"
    if not shutil.which("curl"):
        pytest.skip("there is no curl")
    for path, body, answer in (
        ("/health", "", '{"health":"true"'),
        ("/metrics", "", "etcd_server_has_leader 1"),
        ("/v3/kv/put", '{"key":"aDI=","value":"Yg=="}', '"revision"'),
        ("/v3/kv/range", '{"key":"aDI="}', '"value":"Yg=="'),
    ):
        done = subprocess.run(
            ["curl", "-sS", "--cacert", lab.ca.ca, "-w", "\n%{http_version} %{http_code}",
            *(["--data-binary", body] if body else []), f"https://{tls.endpoint}{path}"],
            capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.stdout.endswith("\n2 200") and answer in done.stdout, done


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize(
    "alpn, sent, answered",
    [
        ("http/1.1", b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"HTTP/1.1 200"),
        ("", b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"HTTP/1.1 200"),
        ("h2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", b"\0\0"),
        ("", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", b"\0\0"),
        ("etcdlite", b"\x89ETCDLT\n\1\0\1\0", b"\x89ETCDLT\n"),
        ("", b"\x89ETCDLT\n\1\0\1\0", b"\x89ETCDLT\n"),
    ],
)
def test_the_protocol_is_agreed_on_or_told_by_the_first_bytes(
    lab: Lab, tls: ServerProcess, version: str, alpn: str, sent: bytes, answered: bytes
) -> None:
    made = context(lab, alpn=alpn)
    made.maximum_version = getattr(ssl.TLSVersion, version)
    with connect(tls, made) as sock:
        assert sock.selected_alpn_protocol() == (alpn or None)
        for at in range(0, len(sent), 5):
            sock.sendall(sent[at : at + 5])
        assert sock.recv(1000).startswith(answered)


def test_the_listener_for_metrics(lab: Lab, tls: ServerProcess) -> None:
    made = context(lab)
    for path, is_there in (("/metrics", True), ("/health", True), ("/version", False)):
        for port in _listening(tls.pid):
            if f":{port}" in tls.logged("serving client traffic on"):  # type: ignore[operator]
                continue
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPSConnection(
                    "127.0.0.1", port, context=made, timeout=PATIENCE_S
                )
                connection.request("GET", path)
                status = connection.getresponse().status
                assert (status == 200) == is_there, (path, status)
                break
        else:
            pytest.fail("no listener answers with TLS")


def _listening(pid: int) -> list[int]:
    """The TCP ports on which a process listens."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(f"/proc/{pid}/fd/{name}").removeprefix("socket:["))
    ports = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"{fields[9]}]" in inodes:
            ports.append(int(fields[1].rpartition(":")[2], 16))
    return ports


def test_large_answers_to_a_client_that_reads_slowly(lab: Lab, tls: ServerProcess) -> None:
    """The output is bounded and arrives whole through the channel."""
    with Client(plain_address(tls)) as client:
        for number in range(8):
            client.put(f"large/{number}", os.urandom(1_000_000))
        expected = [kv.value for kv in client.range(prefix="large/").kvs]
    with Client(f"https://{tls.endpoint}", cacert=lab.ca.ca) as client:
        got = [kv.value for kv in client.range(prefix="large/").kvs]
    assert got == expected
    made = context(lab)
    with connect(tls, made) as sock:
        sock.sendall(b"POST /v3/kv/range HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                     b"Content-Type: application/json\r\n"
                     b"Content-Length: 47\r\n\r\n"
                     b'{"key": "bGFyZ2Uv", "range_end": "bGFyZ2Uw"   }')  # fmt: skip
        data = b""
        while len(data) < 10_500_000:
            data += sock.recv(1 << 16)
        assert data.startswith(b"HTTP/1.1 200")


# What is wrong.


def answered(server: ServerProcess, made: ssl.SSLContext) -> bool:
    """Whether a client with this context gets an answer."""
    try:
        with connect(server, made) as sock:
            sock.sendall(b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            return bool(sock.recv(100))
    except OSError:
        return False


def test_plain_http_on_a_tls_port_is_told_so(tls: ServerProcess) -> None:
    with tls.connect() as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        data = b""
        while part := sock.recv(1000):
            data += part
    assert data == (
        b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
    )
    tls.wait_for_log("plain HTTP on a TLS port: its URL must begin with https://")


def test_plain_grpc_and_native_on_a_tls_port_are_logged(tls: ServerProcess) -> None:
    for sent in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x89ETCDLT\n\1\0\1\0"):

        def send(sent: bytes = sent) -> None:
            with tls.connect() as sock:
                sock.sendall(sent)
                assert sock.recv(100)[:2] in (b"", b"\x15\x03")

        tls.logs_when(send, f"(it sent {sent[:16].hex()})")


def test_tls_on_a_plain_port_is_told_and_logged(lab: Lab, tls: ServerProcess) -> None:
    host, _, port = plain_address(tls).partition(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as sock:
        made = context(lab)
        with pytest.raises(ssl.SSLError, match=r"(?i)handshake.failure"):
            made.wrap_socket(sock, server_hostname=host)
    tls.wait_for_log("TLS on a plain port: the client's endpoint must begin with http://")


def test_clients_without_a_good_certificate_are_refused(lab: Lab, mutual: ServerProcess) -> None:
    other = Authority(lab.ca.directory, "stranger-ca")
    cases: list[tuple[Files | None, str]] = [
        (None, "it showed no certificate: give it one of a CA in --trusted-ca-file"),
        (other.issue("stranger"), "no CA in --trusted-ca-file"),
        (lab.ca.issue("late", days=(-9, -2)), "its certificate has expired"),
        (lab.ca.issue("early", days=(2, 9)), "its certificate is not valid yet"),
        (lab.ca.issue("wrong", usages=("server",)), "clientAuth"),
    ]
    for files, expected in cases:
        mutual.lines.clear()

        def ask(files: Files | None = files) -> None:
            assert not answered(mutual, context(lab, files))

        mutual.logs_when(ask, expected)


def test_a_check_of_the_configuration_warns_of_an_expired_certificate(lab: Lab) -> None:
    old = lab.ca.issue("long-ago", days=(-10, -1))
    command = [sys.executable, "-m", "etcdlite", "--check-config"]
    flags = ["--listen-client-urls=https://127.0.0.1:0", f"--cert-file={old.cert}"]
    flags.append("--advertise-client-urls=https://127.0.0.1:2379")
    ended = subprocess.run(
        [*command, *flags, f"--key-file={old.key}"], capture_output=True, text=True
    )
    assert ended.returncode == 0
    assert "a certificate has expired: renew it" in ended.stderr + ended.stdout
    assert old.cert in ended.stderr + ended.stdout


def test_a_server_that_does_not_start_says_which_file(lab: Lab, tmp_path: Path) -> None:
    other = lab.ca.issue("other-key")
    secret = Path(other.key).read_text().splitlines()[1]
    cases = [
        ([f"--cert-file={lab.server.cert}"], "it needs key-file; set both"),
        ([], "needs a certificate: set cert-file and key-file"),
        ([f"--cert-file={tmp_path}/none", f"--key-file={other.key}"], "No such file"),
        ([f"--cert-file={lab.server.cert}", f"--key-file={other.key}"], "is not the key of"),
        ([f"--cert-file={tmp_path}", f"--key-file={other.key}"], "not a regular file"),
    ]
    for number, (flags, expected) in enumerate(cases):
        for extra in ([], ["--check-config"]):
            one = ServerProcess(
                tmp_path / f"{number}{bool(extra)}",
                ["--listen-client-urls=https://127.0.0.1:0", *flags, *extra],
                (sys.executable, "-m", "etcdlite"),
            )
            one.spawn()
            assert one.wait() != 0
            assert any(expected in line for line in one.lines), one.tail()
            assert not any(secret in line for line in one.lines)


# Files that change.


def served(lab: Lab, server: ServerProcess) -> bytes:
    with connect(server, context(lab)) as sock:
        return sock.getpeercert(binary_form=True) or b""


def test_a_renewed_certificate_is_used_without_a_restart(lab: Lab) -> None:
    files = lab.ca.issue("renewed")
    server = lab.start(files=files)
    first = served(lab, server)
    with Client(f"https://{server.endpoint}", cacert=lab.ca.ca) as client:
        client.put("k", "before")
        assert lab.ca.issue("renewed", days=(-1, 700)) == files
        server.signal(signal.SIGHUP)
        wait_until(lambda: served(lab, server) != first, "the new certificate is served")
        client.put("k", "after")
    server.wait_for_log("read changed TLS files")
    second = served(lab, server)
    Path(files.key).write_text("junk")
    # The log says so right after SIGHUP, before any client connects.
    server.signal(signal.SIGHUP)
    server.wait_for_log("new TLS files are refused")
    assert served(lab, server) == second != first


def test_a_certificate_that_ends_soon_is_told(lab: Lab) -> None:
    server = lab.start(files=lab.ca.issue("soon", days=(-300, 12.5)))
    line = server.wait_for_log("a certificate ends in 12 days: renew it")
    assert "soon.pem" in line
    connection = https(server, context(lab))
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    found = re.search(
        r'^etcdlite_certificate_expiry_timestamp_seconds\{file=".*soon\.pem"\} (\S+)$', text, re.M
    )
    assert found and 12.4 < (float(found[1]) - time.time()) / 86400 < 12.6


def test_a_key_that_others_may_read_is_told(lab: Lab, tmp_path: Path) -> None:
    files = lab.ca.issue("open")
    os.chmod(files.key, 0o644)
    server = lab.start(files=files)
    line = server.wait_for_log("others may read a private key")
    assert "open-key.pem" in line and "chmod" in line


def test_auto_tls(tmp_path: Path, server: Any) -> None:
    one = server("--listen-client-urls=https://127.0.0.1:0", "--auto-tls",
                 "--listen-peer-urls=https://127.0.0.1:0", "--peer-auto-tls")  # fmt: skip
    made = one.data_dir / "fixtures" / "client"
    assert (made / "key.pem").stat().st_mode & 0o777 == 0o600
    with Client(f"https://{one.endpoint}", cacert=str(made / "cert.pem")) as client:
        client.put("k", "v")
    first = (made / "cert.pem").read_bytes()
    one.restart()
    assert (made / "cert.pem").read_bytes() == first
    assert (one.data_dir / "fixtures" / "peer" / "cert.pem").exists()


def test_auto_tls_of_a_machine_whose_clock_was_wrong_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def validity() -> tuple[float, float]:
        (der,) = x509.blocks(Path(files.cert_file).read_bytes(), "CERTIFICATE")
        made = x509.parse_certificate(der)
        return made.not_before, made.not_after

    now = real = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(sys, "executable", "")  # So it is in an environment without PATH.
    for name, at in (("ahead", real + 10 * 365 * 86_400), ("behind", 1000.0)):
        now = at
        flags = ["--listen-client-urls=https://127.0.0.1:0", "--auto-tls"]
        config = load([*flags, f"--data-dir={tmp_path / name}"], {})
        made = channels.Channels(config)
        (files,) = (credentials.settings for credentials in made._credentials.values())
        begins, ends = validity()
        assert begins <= now < ends, "it is valid now"
        now = real
        made._look(False)
        begins, ends = validity()
        assert begins < now < ends, "it is valid once the clock is set"
        first = Path(files.cert_file).read_bytes()
        made._look(False)
        assert Path(files.cert_file).read_bytes() == first


def test_the_common_name_is_the_user_but_not_for_json(lab: Lab) -> None:
    server = lab.start("--client-cert-auth", f"--trusted-ca-file={lab.ca.ca}")
    own = {"cacert": lab.ca.ca, "cert": lab.alice.cert, "key": lab.alice.key}
    with Client(f"https://{server.endpoint}", **own) as client:
        allowed = proto.Permission(permType=proto.Permission.READWRITE, key=b"hers")
        for method, request in (
            ("UserAdd", proto.AuthUserAddRequest(name="root", password="r")),
            ("UserGrantRole", proto.AuthUserGrantRoleRequest(user="root", role="root")),
            ("RoleAdd", proto.AuthRoleAddRequest(name="hers")),
            ("RoleGrantPermission",
             proto.AuthRoleGrantPermissionRequest(name="hers", perm=allowed)),
            ("UserAdd", proto.AuthUserAddRequest(
                name="alice", options=proto.UserAddOptions(no_password=True))),
            ("UserGrantRole", proto.AuthUserGrantRoleRequest(user="alice", role="hers")),
            ("AuthEnable", proto.AuthEnableRequest()),
        ):  # fmt: skip
            client.call(f"Auth.{method}", request)
    with Client(f"https://{server.endpoint}", **own) as client:
        client.put("hers", "v")
        with pytest.raises(EtcdliteError, match="permission denied"):
            client.put("another's", "v")
    connection = https(server, context(lab, lab.alice))
    body = '{"key": "aGVycw==", "value": "dg=="}'
    connection.request("POST", "/v3/kv/put", body, {"Content-Type": "application/json"})
    assert b"user name is empty" in connection.getresponse().read()
    done = subprocess.run(
        [distributed("etcdctl"), f"--endpoints=https://{server.endpoint}",
         f"--cacert={lab.ca.ca}", f"--cert={lab.alice.cert}", f"--key={lab.alice.key}",
         "get", "hers"],
        env=without_settings(), capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.stdout == "hers\nv\n", done.stderr


# Members.


class Secured(LiveCluster):
    """Members with certificates of one CA."""

    scheme = "https"
    ca: Authority

    def _make(self, name: str, url: str, initial: str, state: str) -> ServerProcess:
        member = super()._make(name, url, initial, state)
        files = self.ca.issue(name, hosts=("127.0.0.1",))
        member.flags += self.tls_flags(files)
        return member

    def tls_flags(self, files: Files) -> list[str]:
        return [
            f"--peer-cert-file={files.cert}",
            f"--peer-key-file={files.key}",
            f"--peer-trusted-ca-file={self.ca.ca}",
            "--peer-client-cert-auth",
        ]


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[Callable[..., Secured]]:
    made: list[Secured] = []

    def make(*flags: str, count: int = 3, **options: Any) -> Secured:
        Secured.ca = pki(tmp_path / "pki")
        one = Secured(tmp_path, count, *flags, **options)
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()
        for member in one.members.values():
            print(f"--- log of {member.data_dir.name}:", *member.lines, sep="\n")


def test_members_serve_and_replace_each_other_over_tls(
    clusters: Callable[..., Secured], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = clusters(*SMALL_FILES)
    cluster.follow()
    cluster.load(2)
    killed = cluster.leader
    killed.kill()
    cluster.progress(100)
    killed.start()
    added = cluster.add("m4")
    cluster.progress(100)
    wait_until(lambda: added.logged("ready to serve client requests"), "it joins")
    cluster.check()
    for member in cluster.running:
        # On a slow disk a leader hands over, and gives up the snapshots that it sends.
        refused = [
            line
            for line in member.lines
            if "remote-addr" in line and "another member leads now" not in line
        ]
        assert not refused, "an honest member was refused"
    with Client(cluster.endpoints) as client:
        urls = [m.peerURLs[0] for m in client.call("Cluster.MemberList",
                                                   proto.MemberListRequest()).members]  # fmt: skip
    assert len(urls) == 4 and all(url.startswith("https://") for url in urls)


def test_a_member_gets_a_snapshot_over_tls(clusters: Callable[..., Secured]) -> None:
    cluster = clusters(*SMALL_FILES)
    late = cluster.follower()
    late.kill()
    with Client(cluster.endpoints) as client:
        for number in range(300):
            client.put(f"k/{number % 20}", os.urandom(2000))
    cluster.load(1)
    late.start()
    cluster.check()


def test_a_member_without_a_good_certificate_is_refused_on_both_sides(
    clusters: Callable[..., Secured], tmp_path: Path
) -> None:
    cluster = clusters()
    cluster.load(1)
    stranger = Authority(tmp_path / "pki", "other-ca")
    victim = cluster.follower()
    name = victim.data_dir.name
    own_flags = list(victim.flags)
    elsewhere = Files(*cluster.ca.issue("elsewhere", hosts=("10.9.9.9",)))
    cases = [
        (stranger.issue("x", hosts=("127.0.0.1",)), "no CA in --peer-trusted-ca-file",
         "refuses this side's certificate"),
        (cluster.ca.issue("old", hosts=("127.0.0.1",), days=(-9, -2)), "has expired",
         "it has expired"),
        (cluster.ca.issue("server-only", hosts=("127.0.0.1",), usages=("server",)), "clientAuth",
         "key usage does not fit"),
        (elsewhere, "it connects from 127.0.0.1, but its certificate is for 10.9.9.9", ""),
    ]  # fmt: skip
    for files, others_say, it_says in cases:
        victim.kill()
        for member in cluster.running:
            member.lines.clear()
        victim.flags[-4:] = cluster.tls_flags(files)
        victim.lines.clear()
        victim.spawn()
        wait_until(
            lambda text=others_say: any(m.logged(text) for m in cluster.running
                                        if m is not victim),
            f"the others say {others_say} of {name}",
        )  # fmt: skip
        if it_says:
            victim.wait_for_log(it_says)
        others = [m.endpoint for m in cluster.running if m is not victim]
        with Client(others, timeout_s=PATIENCE_S) as client:
            client.put("k", "v")
    victim.kill()
    victim.flags = own_flags
    victim.start()
    wait_until(lambda: victim.logged("ready to serve client requests"), "it is back")
    cluster.check()


# Crowds.


def hello(lab: Lab) -> bytes:
    """The first message of a handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context(lab).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def besiege(lab: Lab, server: ServerProcess, count: int) -> list[float]:
    """Open `count` handshakes and finish none. The times of a well-behaved client's requests."""
    first = hello(lab)
    crowd: list[socket.socket] = []
    times: list[float] = []
    try:
        with Client(f"https://{server.endpoint}", cacert=lab.ca.ca) as client:
            for number in range(count):
                sock = server.connect()
                sock.sendall(first if number % 4 else first[: 1 + number % len(first)])
                crowd.append(sock)
                if number % 50 == 0:
                    began = time.monotonic()
                    client.put("well-behaved", "v")
                    times.append(time.monotonic() - began)
        with Client(f"https://{server.endpoint}", cacert=lab.ca.ca) as client:
            assert client.get("well-behaved") is not None, "a new client gets in"
    finally:
        for sock in crowd:
            sock.close()
    return times


def test_a_crowd_of_unfinished_handshakes_is_bounded(lab: Lab, tls: ServerProcess) -> None:
    before = tls.rss_bytes
    besiege(lab, tls, 1200)
    grown = tls.rss_bytes - before
    assert grown < 48 << 20, f"it grew by {grown >> 20} MiB"
    # Which of the two bounds comes first depends on how fast the handshakes are.
    bounds = ("too many handshakes at once", "too many connections have not opened the protocol")
    wait_until(lambda: any(map(tls.logged, bounds)), "one of the bounds is told")
    assert MAX_HANDSHAKES < 1200


def test_metrics_tell_failed_handshakes_and_what_tls_takes(lab: Lab) -> None:
    tls = lab.start()

    def metric(name: str) -> float:
        with connect(tls, context(lab)) as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            text = b"".join(iter(lambda: sock.recv(1 << 16), b"")).decode()
        return next(float(s.split()[-1]) for s in text.splitlines() if s.startswith(name))

    failed = 'etcdlite_failed_handshakes_total{channel="tls",with="clients"}'
    before = metric(failed)
    for first in (b"\x16\x03\x01\x00\x04none", hello(lab)[:40]):
        with tls.connect() as sock:
            sock.sendall(first)
    wait_until(lambda: metric(failed) == before + 2, "both are counted")
    held = "etcdlite_connection_memory_bytes"
    idle = [connect(tls, context(lab)) for _ in range(20)]
    try:
        wait_until(lambda: metric(held) >= 20 * (20 << 10), "idle connections count")
    finally:
        for sock in idle:
            sock.close()


@pytest.mark.long
def test_five_thousand_unfinished_handshakes(lab: Lab) -> None:
    server = lab.start()
    before = server.rss_bytes
    times = sorted(besiege(lab, server, 5000))
    assert server.rss_bytes - before < 64 << 20
    print(f"median {times[len(times) // 2] * 1000:.1f} ms, longest {times[-1] * 1000:.1f} ms")


def test_garbage_costs_only_its_connection(lab: Lab, tls: ServerProcess) -> None:
    rng = random.Random(7)
    first = hello(lab)
    for number in range(150):
        with tls.connect() as sock, contextlib.suppress(OSError):
            data = bytearray(first)
            for _ in range(rng.randrange(1, 5)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            sock.sendall(bytes(data[: rng.randrange(1, len(data))] if number % 3 else data))
            if number % 2:
                sock.sendall(rng.randbytes(500))
            if number % 5 == 0:
                sock.settimeout(0.05)
                sock.recv(100)
    for _ in range(30):
        with connect(tls, context(lab)) as good:
            raw = socket.socket(fileno=os.dup(good.fileno()))
            raw.sendall(rng.randbytes(rng.randrange(1, 3000)))
            raw.close()
    with Client(f"https://{tls.endpoint}", cacert=lab.ca.ca) as client:
        client.put("still", "here")


@pytest.mark.long
def test_a_handshake_that_never_ends_is_closed(lab: Lab, tls: ServerProcess) -> None:
    with tls.connect() as sock:
        began = time.monotonic()
        sock.sendall(hello(lab))
        while sock.recv(10_000):
            pass
        assert 5 < time.monotonic() - began < 30
    tls.wait_for_log("the handshake of tls is not complete")


def test_many_clients_connect_at_once(lab: Lab, tls: ServerProcess) -> None:
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            for _ in range(3):
                with Client(
                    f"https://{tls.endpoint}", cacert=lab.ca.ca, dial_timeout_s=PATIENCE_S
                ) as client:
                    client.put(f"many/{number}", "v")
        except EtcdliteError as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures


class Shaking:
    """A client that connects without waiting, and again if it is dropped."""

    def __init__(self, lab: Lab, address: tuple[str, int]) -> None:
        self._context, self._address = context(lab), address
        self.tries = 0
        self._connect()

    def _connect(self) -> None:
        self.tries += 1
        sock = socket.create_connection(self._address)
        sock.setblocking(False)
        self.sock = self._context.wrap_socket(
            sock, server_hostname="127.0.0.1", do_handshake_on_connect=False
        )
        self._has_asked = False

    def is_in(self) -> bool:
        """Take the next step. Whether it has an answer."""
        try:
            if not self._has_asked:
                self.sock.do_handshake()
                self.sock.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
                self._has_asked = True
            if self.sock.recv(1000):
                return True
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError:
            pass
        self.sock.close()
        self._connect()
        return False


def test_hundreds_of_clients_behind_one_address_get_in_beside_a_hostile_one(lab: Lab) -> None:
    server = lab.start()
    host, _, port = server.endpoint.rpartition(":")
    first, is_over, crowd = hello(lab), threading.Event(), deque[socket.socket](maxlen=300)

    def besiege_on() -> None:
        while not is_over.is_set():
            sock = socket.create_connection((host, int(port)), source_address=("127.0.0.2", 0))
            sock.sendall(first)
            if len(crowd) == crowd.maxlen:
                crowd[0].close()
            crowd.append(sock)
            is_over.wait(0.005)

    hostile = threading.Thread(target=besiege_on)
    hostile.start()
    clients: list[Shaking] = []
    try:
        wait_until(lambda: len(crowd) > 100, "the hostile address has its handshakes")
        waiting = clients = [Shaking(lab, (host, int(port))) for _ in range(200)]
        deadline = time.monotonic() + PATIENCE_S
        while waiting and time.monotonic() < deadline:
            waiting = [client for client in waiting if not client.is_in()]
            time.sleep(0.01)
        assert not waiting, f"{len(waiting)} of 200 clients did not get in; {server.tail()}"
        print(f"connections for 200 clients: {sum(client.tries for client in clients)}")
    finally:
        is_over.set()
        hostile.join()
        for sock in (*crowd, *(client.sock for client in clients)):
            sock.close()


assert test_cluster_live.KEYS  # The rig of clusters is that of the other file.
