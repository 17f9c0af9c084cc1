"""TLS of both Python clients and of etcdlite-ctl, against a server made of Python's `ssl`: what is
accepted, what is refused, and what the error says to do."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.certs import DAY_S, Authority, make_authority
from rigs.ctl_runner import run_ctl
from rigs.fake_server import FakeServer
from rigs.processes import ROOT, wait_until
from rigs.shells import clients
from rigs.tls_front import TlsFront, server_context

from etcdlite.certificates import Pair
from etcdlite.client import Client, ConnectionFailed

Connect = Callable[..., Any]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("stranger"), "another CA")


@pytest.fixture(scope="module")
def good(authority: Authority) -> Pair:
    return authority.issue("server", "good")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        server.store.put(b"k", b"v")
        yield server


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of both kinds, which are closed at the end."""
    with clients(request.param) as make:
        yield make


def failure(client: Any) -> str:
    """Why the client cannot connect."""
    with pytest.raises(ConnectionFailed) as refused:
        client.get("k")
    text = str(refused.value)
    assert "\n" not in text and text.startswith(client.endpoint), text
    return text


def test_a_client_speaks_tls_and_everything_works(
    connect: Connect, server: FakeServer, authority: Authority, good: Pair, tmp_path: Path
) -> None:
    large = os.urandom(900_000)
    with TlsFront(server_context(good), server.port) as front:
        client = connect(front.endpoint, cacert=authority.certificate)
        assert client.endpoint == front.endpoint
        with client.watch("k") as watch:
            client.put("k", "w")
            assert watch.next_event(10).value == b"w"
        client.put("large", large)
        assert client.get("large").value == large
        assert client.certificate_ends_s == pytest.approx(time.time() + 365 * DAY_S, abs=600)
        # Without a scheme, the settings of TLS decide.
        bare = connect(front.endpoint.removeprefix("https://"), cacert=authority.certificate)
        assert bare.get("k").value == b"w"
        assert bare.endpoint == front.endpoint
        assert connect(front.endpoint, cacert=Path(authority.certificate)).get("k").value == b"w"
        assert connect(front.endpoint, insecure_skip_tls_verify=True).get("k").value == b"w"
        assert set(front.alpn) == {"etcdlite"}
        # A renewed certificate is for new connections.
        front.context = server_context(authority.issue("server", "renewed", ends_s=9 * DAY_S))
        front.drop_connections()
        wait_until(lambda: client.get("k").value == b"w", "the client is connected again")
        assert client.certificate_ends_s == pytest.approx(time.time() + 9 * DAY_S, abs=600)


def test_threads_share_a_tls_connection(
    server: FakeServer, authority: Authority, good: Pair
) -> None:
    wrong: list[Any] = []
    with (
        TlsFront(server_context(good), server.port) as front,
        Client(front.endpoint, cacert=authority.certificate, timeout_s=30) as client,
    ):

        def work(number: int) -> None:
            for round_ in range(20):
                value = f"{number} {round_}".encode() * 3000
                client.put(f"key {number}", value)
                if client.get(f"key {number}").value != value:
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and len(front.alpn) == 1


def test_both_sides_show_certificates(
    connect: Connect, server: FakeServer, authority: Authority, good: Pair, stranger: Authority
) -> None:
    alice = authority.issue("client", "alice", ())
    with TlsFront(server_context(good, authority.certificate), server.port) as front:

        def dial(pair: Pair | None) -> Any:
            own = {} if pair is None else {"cert": pair.certificate, "key": pair.key}
            return connect(front.endpoint, cacert=authority.certificate, **own)

        assert dial(alice).get("k").value == b"v"
        assert "wants a certificate" in failure(dial(None))
        foreign = stranger.issue("client", "alice", ())
        assert "does not know the CA that signed it" in failure(dial(foreign))
        assert foreign.certificate in failure(dial(foreign))
        late = authority.issue("client", "late", (), ends_s=-60)
        assert "has expired" in failure(dial(late))
        assert "refuses this side's certificate" in failure(dial(good))


@pytest.mark.parametrize(
    "made, text",
    [
        ({"ends_s": -60}, "its certificate has expired: renew it"),
        ({"begins_s": 3600}, "not valid yet: correct the clock"),
        ({"hosts": ("m1.lab",)}, "does not have the address at which it was dialled"),
        ({"kind": "client"}, "is not for this purpose"),
        (None, "no CA in {cacert} signed its certificate"),
    ],
)
def test_a_bad_certificate_of_the_server_is_refused_with_what_to_do(
    connect: Connect,
    server: FakeServer,
    authority: Authority,
    stranger: Authority,
    made: dict[str, Any] | None,
    text: str,
) -> None:
    if made is None:
        pair = stranger.issue("server", "m1")
    else:
        pair = authority.issue(**{"kind": "server", "name": "bad", **made})
    with TlsFront(server_context(pair), server.port) as front:
        told = failure(connect(front.endpoint, cacert=authority.certificate))
        assert text.format(cacert=authority.certificate) in told
    assert not server.requests


def test_the_cas_of_the_system_do_not_know_the_lab(
    connect: Connect, server: FakeServer, good: Pair
) -> None:
    with TlsFront(server_context(good), server.port) as front:
        assert "name yours with cacert" in failure(connect(front.endpoint))


def test_tls_at_a_plain_port_and_plain_text_at_a_tls_port_say_so(
    connect: Connect, server: FakeServer, authority: Authority, good: Pair
) -> None:
    ca = authority.certificate
    for answer in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\x00\x12\x04\x00\x00\x00\x00\x00"):
        with speaker(answer) as port:
            told = failure(connect(f"https://127.0.0.1:{port}", cacert=ca))
            assert "is it a plain port? Then its URL begins with http://" in told
    with speaker(b"") as port:
        told = failure(connect(f"https://127.0.0.1:{port}", cacert=ca))
        assert "closed the connection during the handshake" in told and "http://" in told
    with speaker(b"\x15\x03\x01\x00\x02\x02\x0a") as port:
        told = failure(connect(f"http://127.0.0.1:{port}", cacert=ca))
        assert "the server speaks TLS: use https://" in told
    with TlsFront(server_context(good), server.port) as front:
        told = failure(connect(front.endpoint.replace("https", "http"), cacert=ca))
        assert "or want TLS (https://)" in told
    with speaker(None) as port:
        began = time.monotonic()
        told = failure(connect(f"https://127.0.0.1:{port}", cacert=ca, dial_timeout_s=0.3))
        assert "no connection within 0.3 s" in told and time.monotonic() - began < 5


@contextlib.contextmanager
def speaker(answer: bytes | None) -> Iterator[int]:
    """A port that answers the first bytes with `answer` and closes; None: that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    held.append(sock)
                    sock.recv(65_536)
                    if answer is not None:
                        sock.sendall(answer)
                        sock.close()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        for sock in held:
            sock.close()


def test_only_tls_1_2_and_later_are_spoken(server: FakeServer, good: Pair) -> None:
    context = server_context(good)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with TlsFront(context, server.port) as front:
        client = Client(front.endpoint, insecure_skip_tls_verify=True)
        assert "versions of TLS" in failure(client)


# Files.


@pytest.fixture
def files(tmp_path: Path, authority: Authority, good: Pair) -> Path:
    """A directory with files that are and are not what they should be."""
    shutil.copy(authority.certificate, tmp_path / "ca.crt")
    shutil.copy(good.certificate, tmp_path / "a.crt")
    shutil.copy(good.key, tmp_path / "a.key")
    shutil.copy(authority.issue("client", "other", ()).key, tmp_path / "b.key")
    (tmp_path / "junk").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    (tmp_path / "empty").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    "names, text",
    [
        ({"cacert": "missing"}, "cacert: cannot read {missing}: No such file"),
        ({"cacert": "."}, "Is a directory"),
        ({"cacert": "empty"}, "cacert: {empty} has no certificate in PEM format"),
        ({"cacert": "a.key"}, "cacert: {a.key} has no certificate"),
        ({"cacert": "junk"}, "cacert: {junk} cannot be used"),
        ({"cert": "a.crt"}, "cert is given without key"),
        ({"key": "a.key"}, "key is given without cert"),
        ({"cert": "a.crt", "key": "b.key"}, "{b.key} is not that of the certificate {a.crt}"),
        ({"cert": "a.key", "key": "a.key"}, "cert: {a.key} has no certificate"),
        ({"cert": "a.crt", "key": "a.crt"}, "key: {a.crt} has no private key"),
        ({"cert": "junk", "key": "a.key"}, "cannot be used"),
        ({"cert": "a.crt", "key": "locked"}, "key: the key in {locked} has a password"),
    ],
)
def test_files_that_cannot_be_used_are_named_when_the_client_is_made(
    files: Path, names: dict[str, str], text: str
) -> None:
    if "locked" in names.values():
        serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
        key = serialization.load_pem_private_key((files / "a.key").read_bytes(), None)
        locked = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
        (files / "locked").write_bytes(locked)
    for value in names.values():
        text = text.replace(f"{{{value}}}", str(files / value))
    paths = {name: str(files / value) for name, value in names.items()}
    with pytest.raises(ValueError) as refused:
        Client("https://127.0.0.1:1", **paths)
    assert text in str(refused.value)
    flags = [f"--{name}={path}" for name, path in paths.items()]
    ended = run_ctl("--endpoints=127.0.0.1:1", *flags, "get", "k")
    assert (ended.status, ended.stderr) == (128, f"Error: {refused.value}\n")


def test_renewed_files_are_for_new_connections(
    connect: Connect, server: FakeServer, authority: Authority, good: Pair, stranger: Authority,
    tmp_path: Path,
) -> None:  # fmt: skip
    own = Pair(str(tmp_path / "own.crt"), str(tmp_path / "own.key"))

    def install(pair: Pair) -> None:
        for source, target in zip(pair, own, strict=True):
            shutil.copy(source, target + ".new")
            os.replace(target + ".new", target)

    install(authority.issue("client", "first", ()))
    with TlsFront(server_context(good, authority.certificate), server.port) as front:
        client = connect(
            front.endpoint, cacert=authority.certificate, cert=own.certificate, key=own.key
        )
        assert client.get("k").value == b"v"
        (tmp_path / "own.key").write_text("half")
        front.drop_connections()
        wait_until(lambda: client.get("k").value == b"v", "the client goes on with the old files")
        install(stranger.issue("client", "second", ()))
        front.drop_connections()

        def is_refused() -> bool:
            try:
                client.get("k")
            except ConnectionFailed as error:
                return "does not know the CA" in str(error)
            return False

        wait_until(is_refused, "the new files are used")


# etcdlite-ctl.


def test_the_command_takes_etcdctls_flags_and_variables(
    server: FakeServer, authority: Authority, good: Pair
) -> None:
    alice = authority.issue("client", "alice", ())
    named = {"cacert": authority.certificate, "cert": alice.certificate, "key": alice.key}
    flags = [f"--{name}={value}" for name, value in named.items()]
    with TlsFront(server_context(good, authority.certificate), server.port) as front:
        bare = front.endpoint.removeprefix("https://")
        for words, environ in (
            ((f"--endpoints={front.endpoint}", *flags), {}),
            ((f"--endpoints={bare}", *flags), {}),
            (("--endpoints", bare), {f"ETCDCTL_{n.upper()}": v for n, v in named.items()}),
            (("--endpoints", bare), {f"ETCDLITE_CTL_{n.upper()}": v for n, v in named.items()}),
        ):
            assert run_ctl(*words, "get", "k", environ=environ) == (0, b"k\nv\n", ""), words
        ended = run_ctl(f"--endpoints={front.endpoint}", "--insecure-skip-tls-verify", "get", "k")
        assert ended.status == 1 and "wants a certificate" in ended.stderr
    with TlsFront(server_context(good), server.port) as front:
        bare = front.endpoint.removeprefix("https://")
        skip = ("--insecure-transport=false", "--insecure-skip-tls-verify")
        assert run_ctl("--endpoints", bare, *skip, "get", "k") == (0, b"k\nv\n", "")
        ended = run_ctl("--endpoints", f"http://{bare}", "--insecure-transport=false", "get", "k")
        assert ended.status == 128 and "write https://" in ended.stderr
        ended = run_ctl("--endpoints", bare, "get", "k")
        assert ended.status == 1 and "or want TLS (https://)" in ended.stderr
    # A URL of a plain endpoint is plain whatever else is set, as with etcdctl.
    plain = f"--endpoints=http://{server.endpoint}"
    assert run_ctl(plain, *flags, "get", "k") == (0, b"k\nv\n", "")


def test_health_warns_of_a_certificate_that_ends_soon(
    server: FakeServer, authority: Authority, good: Pair
) -> None:
    soon = authority.issue("server", "soon", ends_s=12.5 * DAY_S)
    with TlsFront(server_context(soon), server.port) as front:
        where = (f"--endpoints={front.endpoint}", f"--cacert={authority.certificate}")
        ended = run_ctl(*where, "endpoint", "health")
        day = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 12.5 * DAY_S))
        warning = f"Warning: the certificate of {front.endpoint} ends on {day} (in 12 days): renew"
        assert warning in ended.stderr
        front.context = server_context(good)
        assert "Warning" not in run_ctl(*where, "endpoint", "health").stderr
        own = authority.issue("client", "soon", (), ends_s=3.5 * DAY_S)
        mine = (f"--cert={own.certificate}", f"--key={own.key}")
        told = run_ctl(*where, *mine, "endpoint", "health").stderr
        assert f"Warning: the certificate of this client, {own.certificate}, ends on" in told


def test_discovery_finds_endpoints_with_tls(
    server: FakeServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: dict[str, Any] = {}

    def lookup(query: str, resolver: Any) -> list[tuple[str, int]]:
        return records.get(query, [])

    monkeypatch.setattr("etcdlite.discovery._lookup", lookup)
    of_domain = authority.issue("server", "domain", ("lab.example",))
    of_host = authority.issue("server", "host")
    discover = ("-d", "lab.example", f"--cacert={authority.certificate}")
    with TlsFront(server_context(of_host), server.port) as front:
        records["_etcd-client-ssl._tcp.lab.example"] = [("127.0.0.1", front.port)]
        records["_etcd-client._tcp.lab.example"] = [("127.0.0.1", server.port)]
        assert run_ctl(*discover, "get", "k") == (0, b"k\nv\n", "")
        assert front.alpn
        # DNS may lie about hosts: then only the domain counts, and no plain endpoint.
        ended = run_ctl(*discover, "--insecure-discovery=false", "get", "k")
        assert ended.status == 1
        assert (
            f'ignoring discovered insecure endpoint "http://127.0.0.1:{server.port}"'
            in ended.stderr
        )
        assert "does not have the name" in ended.stderr and "lab.example" in ended.stderr
        front.context = server_context(of_domain)
        ended = run_ctl(*discover, "--insecure-discovery=false", "get", "k")
        assert (ended.status, ended.stdout) == (0, b"k\nv\n")
    del records["_etcd-client-ssl._tcp.lab.example"]
    ended = run_ctl(*discover, "--insecure-discovery=false", "get", "k")
    assert "DNS names no endpoint with TLS" in ended.stderr


def test_ssl_is_imported_only_for_tls() -> None:
    statements = (
        "import etcdlite.client; etcdlite.client.Client('127.0.0.1:1')",
        "from etcdlite.ctl import main; main(['get', 'x', '--endpoints=http://127.0.0.1:1'])",
    )
    for number, statement in enumerate(statements):
        command = f"{statement}; import sys; print(*(sys.modules.keys() & {{'ssl', '_ssl'}}))"
        done = subprocess.run(
            [sys.executable, "-c", command],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
        )
        assert done.stdout.strip() == "", number
