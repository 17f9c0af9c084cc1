"""The clients' side of TLS against real servers: etcdlite-ctl and both Python clients, with and
without TLS and certificates of their own, for all kinds of calls."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rigs.certs import Authority, make_authority
from rigs.ctl_runner import Ended, run_ctl
from rigs.processes import ROOT, ServerProcess, wait_until
from rigs.real_etcd import free_ports, without_settings
from rigs.shells import clients

from etcdlite import proto
from etcdlite.certificates import Pair
from etcdlite.client import ConnectionFailed, PermissionDenied, Put
from etcdlite.methods import METHOD_BY_NAME


class Door(NamedTuple):
    """A way into a server: the URL, and the files that it takes."""

    url: str
    files: dict[str, str]

    @property
    def flags(self) -> list[str]:
        named = (f"--{name}={path}" for name, path in self.files.items())
        return [f"--endpoints={self.url}", "--command-timeout=30s", *named]


class House(NamedTuple):
    """A server with TLS and without, another one that wants certificates, and their CA."""

    authority: Authority
    doors: dict[str, Door]
    own: Pair
    """The certificate of the first server; the other one's is a copy of the same."""
    servers: list[ServerProcess]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    authority = make_authority(folder / "ca")
    own, alice = authority.issue("server", "m1"), authority.issue("client", "alice", ())
    ca = {"cacert": authority.certificate}
    servers: list[ServerProcess] = []
    doors: dict[str, Door] = {}
    try:
        for name, flags in (
            ("tls", ("--listen-client-urls=https://127.0.0.1:0,http://127.0.0.1:0",)),
            (
                "mutual",
                (
                    # It is the same after a restart.
                    f"--listen-client-urls=https://127.0.0.1:{free_ports(1)[0]}",
                    "--client-cert-auth",
                    f"--trusted-ca-file={authority.certificate}",
                ),
            ),
        ):
            files = (f"--cert-file={own.certificate}", f"--key-file={own.key}")
            program = [sys.executable, "-m", "etcdlite"]
            server = ServerProcess(folder / name, [*files, *flags], program)
            servers.append(server)
            server.start()
            line = server.logged("serving client traffic on")
            assert line is not None
            addresses = re.findall(r"127\.0\.0\.1:\d+", line.partition(";")[0])
            doors[name] = Door(f"https://{addresses[0]}", ca)
            if name == "tls":
                doors["plain"] = Door(f"http://{addresses[1]}", {})
            else:
                keys = {"cert": alice.certificate, "key": alice.key}
                doors["mutual"] = Door(f"https://{addresses[0]}", ca | keys)
        yield House(authority, doors, own, servers)
    finally:
        for server in servers:
            server.close()
            print("--- log of a server:", *server.lines, sep="\n")


@pytest.fixture(params=["plain", "tls", "mutual"])
def door(request: pytest.FixtureRequest, house: House) -> Door:
    return house.doors[request.param]


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes clients of both kinds, which are closed at the end."""
    with clients(request.param) as make:
        yield lambda url, **options: make(url, **{"timeout_s": 30, "dial_timeout_s": 30, **options})


def test_every_kind_of_call_goes_through_every_door(
    connect: Callable[..., Any], door: Door, tmp_path: Path
) -> None:
    client = connect(door.url, **door.files)
    large = os.urandom(1_000_000)
    with client.watch("k") as watch, client.lease(10) as lease:
        client.put("k", large, lease=lease)
        assert watch.next_event(30).value == large
        assert client.get("k").value == large
        assert client.txn([], [Put("k", "v")]).succeeded
        with client.lock("door", ttl=10) as lock:
            assert not lock.lost
    for number in range(60):
        client.put(f"range/{number}", large[:100_000])
    found = client.range(prefix="range/")
    assert found.count == 60 and {kv.value for kv in found} == {large[:100_000]}
    assert client.snapshot(tmp_path / "backup.db") > 6_000_000
    assert (client.certificate_ends_s is None) == door.url.startswith("http:")
    client.delete(prefix="range/")


def test_the_command_goes_through_every_door(door: Door, tmp_path: Path) -> None:
    def ctl(*words: str, stdin: bytes = b"") -> Ended:
        ended = run_ctl(*door.flags, *words, stdin=stdin)
        assert ended.status == 0, (words, ended.stderr)
        return ended

    assert ctl("put", "greeting", "hello").stdout == b"OK\n"
    assert ctl("get", "greeting").stdout == b"greeting\nhello\n"
    assert ctl("txn", stdin=b'val("greeting") = "hello"\n\nget greeting\n\n\n').stdout
    health = ctl("endpoint", "health")
    assert f"{door.url} is healthy" in health.stdout.decode() and health.stderr == ""
    assert ctl("endpoint", "status").stdout
    assert b"started" in ctl("member", "list").stdout
    ctl("snapshot", "save", str(tmp_path / "backup.db"))
    assert ctl("snapshot", "status", str(tmp_path / "backup.db")).stdout
    ctl("lock", "door", "--", "true")


def test_a_wrong_door_is_told_of(house: House) -> None:
    tls, mutual, plain = (house.doors[name] for name in ("tls", "mutual", "plain"))
    ca = f"--cacert={house.authority.certificate}"
    server = (f"--cert={house.own.certificate}", f"--key={house.own.key}")
    for url, flags, text in (
        (tls.url.replace("https", "http"), (), "the server speaks TLS: use https://"),
        (tls.url.removeprefix("https://"), (), "the server speaks TLS: use https://"),
        (plain.url.replace("http", "https"), (ca,), "not a TLS port"),
        (tls.url, (), "name yours with cacert"),
        (mutual.url, (ca,), "wants a certificate"),
        (mutual.url, (ca, *server), "its key usage does not fit"),
    ):
        ended = run_ctl(f"--endpoints={url}", "--dial-timeout=20s", *flags, "get", "k")
        assert ended.status == 1 and text in ended.stderr, (url, flags, ended.stderr)
        assert len(ended.stderr.splitlines()) == 1 and "PRIVATE" not in ended.stderr


def test_a_client_goes_on_when_the_server_renews_its_certificate(
    house: House, connect: Callable[..., Any]
) -> None:
    door, server = house.doors["tls"], house.servers[0]
    client = connect(door.url, **door.files)
    client.put("renewed", "before")
    before_s = client.certificate_ends_s
    renewed = house.authority.issue("server", "renewed", ends_s=before_s - time.time() - 86_400)
    kept = [Path(path).read_bytes() for path in house.own]
    try:
        for source, target in zip(renewed, house.own, strict=True):
            shutil.copy(source, target + ".new")
            os.replace(target + ".new", target)
        assert client.get("renewed").value == b"before", "an open connection goes on"

        def is_renewed() -> bool:
            late = connect(door.url, **door.files)
            assert late.get("renewed").value == b"before"
            return late.certificate_ends_s != before_s

        wait_until(is_renewed, f"new connections get the new certificate; {server.tail()}")
    finally:
        for path, data in zip(house.own, kept, strict=True):
            Path(path + ".new").write_bytes(data)
            os.chmod(path + ".new", 0o600)
            os.replace(path + ".new", path)


def test_a_watch_goes_on_after_its_tls_server_was_restarted(
    house: House, connect: Callable[..., Any]
) -> None:
    door, server = house.doors["mutual"], house.servers[1]
    client = connect(door.url, **door.files)
    with client.watch("again") as watch:
        client.put("again", "1")
        assert watch.next_event(30).value == b"1"
        server.stop()
        with pytest.raises(ConnectionFailed):
            client.get("again", timeout_s=1)
        server.start()
        wait_until(lambda: _puts(client), "the client is connected again")
        assert watch.next_event(30).value == b"2"


def _puts(client: Any) -> bool:
    try:
        client.put("again", "2")
    except ConnectionFailed:
        return False
    return True


def test_the_common_name_of_a_certificate_is_the_user(
    house: House, connect: Callable[..., Any]
) -> None:
    door = house.doors["mutual"]
    alice = connect(door.url, **door.files)
    root_pair = house.authority.issue("client", "root", ())
    files = {**door.files, "cert": root_pair.certificate, "key": root_pair.key}
    root = connect(door.url, **files)

    def change(method: str, **fields: Any) -> None:
        root.call(f"Auth.{method}", METHOD_BY_NAME[f"Auth.{method}"].request(**fields))

    for name in ("root", "alice"):
        change("UserAdd", name=name, options=proto.UserAddOptions(no_password=True))
        change("RoleAdd", name=name)
        change("UserGrantRole", user=name, role=name)
    mine = proto.Permission(permType=proto.Permission.READWRITE, key=b"mine")
    change("RoleGrantPermission", name="alice", perm=mine)
    change("AuthEnable")
    try:
        alice.put("mine", "1")
        root.put("other", "1")
        for refused in (lambda: alice.put("other", "2"), lambda: alice.get("other")):
            with pytest.raises(PermissionDenied):
                refused()
        assert run_ctl(*door.flags, "get", "mine") == (0, b"mine\n1\n", "")
        ended = run_ctl(*door.flags, "get", "other")
        assert ended.status == 1 and "permission denied" in ended.stderr
    finally:
        change("AuthDisable")
        for name in ("alice", "root"):
            change("UserDelete", name=name)
            change("RoleDelete", role=name)


def test_a_program_of_its_own_reads_the_variables_of_etcdctl(house: House) -> None:
    door = house.doors["mutual"]
    environ = {f"ETCDCTL_{name.upper()}": path for name, path in door.files.items()}
    done = subprocess.run(
        [sys.executable, "-m", "etcdlite.ctl", "put", "variable", "set"],
        capture_output=True,
        text=True,
        env={
            **without_settings(),
            **environ,
            "ETCDCTL_ENDPOINTS": door.url,
            "ETCDCTL_COMMAND_TIMEOUT": "30s",
            "PYTHONPATH": str(ROOT),
        },
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "OK\n", "")


def test_a_lab_is_made_of_what_the_command_prints(tmp_path: Path) -> None:
    certs = f"--dir={tmp_path / 'certs'}"
    lines = ["listen-client-urls = ['https://127.0.0.1:0']", "data-dir = 'data'", "name = 'm1'"]
    assert run_ctl("cert", "init", certs).status == 0
    for kind in ("server", "peer"):
        printed = run_ctl("cert", kind, "m1", certs).stdout.decode().splitlines()
        lines += [line.strip() for line in printed if " = " in line]
    (port,) = free_ports(1)
    lines += [
        f"{name} = ['https://127.0.0.1:{port}']"
        for name in ("listen-peer-urls", "initial-advertise-peer-urls")
    ]
    lines.append(f"initial-cluster = ['m1=https://127.0.0.1:{port}']")
    (tmp_path / "etcdlite.toml").write_text("\n".join(lines) + "\n")
    log = tmp_path / "log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "etcdlite", "--config=etcdlite.toml"],
            cwd=tmp_path,
            stderr=file,
            env={**without_settings(), "PYTHONPATH": str(ROOT)},
        )
    try:

        def serving() -> str:
            assert process.poll() is None, log.read_text()
            found = re.search(r"serving client traffic on ([\d.:]+)", log.read_text())
            return found[1] if found else ""

        endpoint = f"--endpoints=https://{wait_until(serving, 'the server serves')}"
        printed = run_ctl("cert", "client", "alice", certs).stdout.decode().splitlines()
        (flags,) = [line.split() for line in printed if line.startswith("  --cacert")]
        words = (endpoint, "--command-timeout=30s")
        assert run_ctl(*words, *flags, "put", "k", "v") == (0, b"OK\n", "")
        assert "wants a certificate" in run_ctl(*words, flags[0], "get", "k").stderr
        assert not [line for line in log.read_text().splitlines() if " ERROR " in line]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("alert", [10, 20, 40, 42, 43, 46, 47, 49, 50, 51, 70, 71, 80, 86, 90,
                                   109, 110, 112, 113, 115, 116, 120])  # fmt: skip
def test_every_alert_of_a_server_is_told_in_words(alert: int, tmp_path: Path) -> None:
    """Python has no name for some of them: 120 is that of a TLS server without this protocol."""
    authority = make_authority(tmp_path / "ca")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1 << 16)
                sock.sendall(bytes((21, 3, 3, 0, 2, 2, alert)))

        thread = threading.Thread(target=refuse)
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        ended = run_ctl("--endpoints", url, "--cacert", authority.certificate, "get", "k")
        thread.join()
    assert ended.status == 1 and f"Error: {url}: " in ended.stderr, ended
    said = ended.stderr.partition(f"{url}: ")[2].strip()
    assert re.fullmatch(r"(TLS: )?[a-z][^_]+ .*", said) and "sslerror" not in said, said
    if alert == 120:
        assert said.startswith("the other side does not speak etcdlite's protocol: "), said
