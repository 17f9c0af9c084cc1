"""The shared secret of clients, with one real server: both shells, etcdlite-ctl, and what stays
plain."""

from __future__ import annotations

import asyncio
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from rigs.ctl_runner import run_ctl
from rigs.processes import ServerProcess, wait_until
from test_secret_live import RecordingProxy, answers

from etcdlite import secret, secret_file
from etcdlite.client import AsyncClient, Client, ConnectionFailed
from etcdlite.frames import HANDSHAKE, MAGIC, SECRET_MAGIC, SECRET_REFUSAL

KEY, VALUE = "needle-in-the-traffic", b"the-value-that-nobody-may-read"


class Rig(NamedTuple):
    server: ServerProcess
    file: str
    proxy: RecordingProxy

    @property
    def endpoint(self) -> str:
        """Through the proxy."""
        return f"127.0.0.1:{self.proxy.port}"

    @property
    def port(self) -> int:
        return int(self.server.endpoint.rpartition(":")[2])

    def recorded(self) -> bytes:
        return b"".join(bytes(recording.data) for recording in self.proxy.recordings)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("clients")
    file = str(folder / "client.secret")
    secret_file.create(file)
    command = (sys.executable, "-m", "etcdlite")
    server = ServerProcess(folder / "data", [f"--client-secret-file={file}"], command)
    server.spawn()
    wait_until(lambda: server.endpoint, f"it serves; {server.tail()}")
    proxy = RecordingProxy(int(server.endpoint.rpartition(":")[2]))
    yield Rig(server, file, proxy)
    proxy.close()
    server.close()


def test_the_client_for_threads_goes_through_the_channel(rig: Rig) -> None:
    rig.proxy.recordings.clear()
    with Client(rig.endpoint, secret_file=rig.file) as client:
        client.put(KEY, VALUE)
        found = client.get(KEY)
        assert found is not None and found.value == VALUE
        large = bytes(range(256)) * 4096
        client.put("large", large)
        got = client.get("large")
        assert got is not None and got.value == large
        with client.watch(KEY, start_revision=1) as watch:
            assert watch.next_event(10.0).kv.value == VALUE
        with client.lease(60) as lease:
            client.put("session", "x", lease=lease)
    recorded = rig.recorded()
    assert recorded.count(SECRET_MAGIC) >= 2
    for plaintext in (KEY.encode(), VALUE, MAGIC, large[:300]):
        assert plaintext not in recorded


def test_the_client_for_asyncio_goes_through_the_channel(rig: Rig) -> None:
    rig.proxy.recordings.clear()

    async def run() -> None:
        async with AsyncClient(rig.endpoint, secret_file=rig.file) as client:
            await client.put(KEY, VALUE)
            results = await asyncio.gather(*(client.get(KEY) for _ in range(100)))
            assert all(found is not None and found.value == VALUE for found in results)

    asyncio.run(run())
    recorded = rig.recorded()
    assert SECRET_MAGIC in recorded
    assert KEY.encode() not in recorded and VALUE not in recorded


def test_a_snapshot_comes_through_the_channel(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "backup.db"
    ended = run_ctl(
        "--endpoints", rig.server.endpoint, "--secret-file", rig.file, "snapshot", "save", str(path)
    )
    assert ended.status == 0, ended.stderr
    assert run_ctl("snapshot", "status", str(path)).status == 0


def test_ctl_takes_the_file_from_a_flag_or_the_environment(rig: Rig) -> None:
    words = ("--endpoints", rig.server.endpoint, "put", "a", "b")
    assert run_ctl("--secret-file", rig.file, *words).stdout == b"OK\n"
    assert run_ctl(*words, environ={"ETCDLITE_CTL_SECRET_FILE": rig.file}).stdout == b"OK\n"
    ended = run_ctl(*words)
    assert ended.status == 1
    assert "the server wants a shared secret" in ended.stderr


def test_a_client_without_the_secret_is_refused_and_told_why(rig: Rig) -> None:
    with Client(rig.server.endpoint) as client, pytest.raises(ConnectionFailed) as failed:
        client.get("a")
    assert "the server wants a shared secret" in str(failed.value)
    rig.server.wait_for_log("the client has no secret, this server wants one")
    assert answers(rig.port, HANDSHAKE.pack(MAGIC, 1, 1)) == SECRET_REFUSAL


def test_a_client_with_another_secret_is_refused_on_both_sides(rig: Rig, tmp_path: Path) -> None:
    other = str(tmp_path / "other.secret")
    made = secret_file.create(other)
    client = Client(rig.server.endpoint, secret_file=other)
    with client, pytest.raises(ConnectionFailed) as failed:
        client.get("a")
    assert f"another secret than this one (id {made.id.hex()})" in str(failed.value)
    rig.server.wait_for_log(f"the other side has another secret (id {made.id.hex()}")


def test_a_member_is_not_a_client(rig: Rig) -> None:
    """The same secret for another purpose."""
    opening = secret.InitiatorChannel(secret_file.read(rig.file), secret.PEER).output()
    answer = answers(rig.port, opening)
    assert answer == HANDSHAKE.pack(SECRET_MAGIC, 1, secret.OTHER_PURPOSE)


def test_a_client_with_a_secret_is_told_that_the_server_has_none(rig: Rig, server: object) -> None:
    plain: ServerProcess = server()  # type: ignore[operator]
    client = Client(plain.endpoint, secret_file=rig.file)
    with client, pytest.raises(ConnectionFailed, match="client-secret-file, too"):
        client.get("a")
    plain.wait_for_log("the client has a secret, this server has none")


def test_json_and_grpc_are_as_configured(rig: Rig) -> None:
    """The secret concerns the native protocol alone, as documented."""
    with urllib.request.urlopen(f"http://{rig.server.endpoint}/health") as answer:
        assert answer.status == 200


def test_wrong_arguments_are_refused(rig: Rig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of the two"):
        Client("https://127.0.0.1:2379", secret_file=rig.file)
    with pytest.raises(ValueError, match="No such file"):
        Client(secret_file=str(tmp_path / "missing"))
    weak = tmp_path / "weak"
    weak.write_text("correct horse battery staple\n")
    weak.chmod(0o600)
    with pytest.raises(ValueError, match="secret new"):
        AsyncClient(secret_file=str(weak))
    assert run_ctl("--secret-file", str(weak), "get", "a").status == 128


def test_a_changed_file_holds_for_the_next_connection(rig: Rig, tmp_path: Path) -> None:
    copy = tmp_path / "copy.secret"
    secret_file.create(str(copy))
    with Client(rig.server.endpoint, secret_file=str(copy)) as client:
        with pytest.raises(ConnectionFailed):
            client.get("a")
        copy.write_text(Path(rig.file).read_text())
        client.get("a")


def test_a_secret_for_members_and_clients_is_refused_at_the_start(rig: Rig, tmp_path: Path) -> None:
    flags = [f"--client-secret-file={rig.file}", f"--peer-secret-file={rig.file}"]
    server = ServerProcess(tmp_path / "data", flags, (sys.executable, "-m", "etcdlite"))
    server.spawn()
    assert server.wait() != 0
    assert server.logged("have a secret in common")
