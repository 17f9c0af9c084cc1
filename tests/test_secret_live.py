"""Shared secrets between real processes: what a proxy records of the traffic between members, what
replaying it does, wrong secrets, rotation, and clients."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_cluster_live
from rigs.processes import PATIENCE_S, SMALL_FILES, ServerProcess, wait_until
from test_cluster_live import LiveCluster, Proxy

from etcdlite import __version__, proto, secret, secret_file
from etcdlite.client import Client
from etcdlite.frames import HANDSHAKE, MAGIC, SECRET_MAGIC, SECRET_REFUSAL

KEY, VALUE = b"needle-in-the-traffic", b"the-value-that-nobody-may-read"


class Recording(NamedTuple):
    """One direction of one connection."""

    is_from_dialer: bool
    data: bytearray


class Tap:
    """A socket whose received bytes are recorded."""

    def __init__(self, sock: socket.socket, recording: Recording) -> None:
        self._sock = sock
        self._recording = recording

    def recv(self, size: int) -> bytes:
        data = self._sock.recv(size)
        self._recording.data.extend(data)
        return data

    def shutdown(self, how: int) -> None:
        self._sock.shutdown(how)


class RecordingProxy(Proxy):
    """Records everything that it carries."""

    def __init__(self, target: int) -> None:
        self.recordings: list[Recording] = []
        super().__init__(target)

    def _carry(self, source: Any, target: Any) -> None:
        recording = Recording(source.getsockname()[1] == self.port, bytearray())
        self.recordings.append(recording)
        super()._carry(Tap(source, recording), target)


class Secured(LiveCluster):
    """Each member has its own copy of the file with the secret."""

    source: Path

    def _make(self, name: str, url: str, initial: str, state: str) -> ServerProcess:
        member = super()._make(name, url, initial, state)
        shutil.copy(self.source, self.file(name))
        member.flags.append(f"--peer-secret-file={self.file(name)}")
        return member

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.secret"

    def give(self, name: str, *sources: Path) -> None:
        """Replace a member's file by one with the secrets of these files."""
        new = self.folder / "new.secret"
        new.touch(0o600)
        new.write_text("".join(source.read_text() for source in sources))
        new.rename(self.file(name))


def made(folder: Path, name: str) -> Path:
    path = folder / name
    secret_file.create(str(path))
    return path


def put_and_wait(cluster: LiveCluster, key: bytes, value: bytes) -> None:
    """Every member has applied it."""
    revision = cluster.call("KV.Put", proto.PutRequest(key=key, value=value)).header.revision
    for member in cluster.running:
        with Client(member.endpoint, timeout_s=PATIENCE_S) as client:
            wait_until(
                lambda c=client: c.range("x", serializable=True).revision >= revision,
                f"{member.data_dir.name} has applied the put; {member.tail()}",
            )


def traffic(cluster: LiveCluster) -> bytes:
    return b"".join(
        bytes(recording.data)
        for proxy in cluster.proxies.values()
        for recording in proxy.recordings  # type: ignore[attr-defined]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secrets")


@pytest.fixture(scope="module")
def secured(folder: Path) -> Iterator[Secured]:
    """Three members that share a secret; what they say to each other is recorded."""
    Secured.source = made(folder, "secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_cluster_live, "Proxy", RecordingProxy)
        cluster = Secured(folder, 3, *SMALL_FILES, proxied=True)
    yield cluster
    cluster.close()


def test_a_capture_holds_no_key_and_no_value(secured: Secured) -> None:
    for _ in range(3):
        put_and_wait(secured, KEY, VALUE)
    recorded = traffic(secured)
    assert len(recorded) > 5000
    assert recorded.count(SECRET_MAGIC) >= 2 * len(secured.proxies), "of both sides"
    for plaintext in (KEY, VALUE, MAGIC, b"etcd-cluster", b"127.0.0.1"):
        assert plaintext not in recorded
    for member in secured.running:
        line = member.wait_for_log("established connection to peer")
        assert "Noise_NNpsk0_25519_ChaChaPoly_SHA256, secret" in line


def test_the_same_capture_without_a_secret_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above can fail."""
    monkeypatch.setattr(test_cluster_live, "Proxy", RecordingProxy)
    cluster = LiveCluster(tmp_path, 3, proxied=True)
    try:
        put_and_wait(cluster, KEY, VALUE)
        recorded = traffic(cluster)
        for plaintext in (KEY, VALUE, MAGIC):
            assert plaintext in recorded
        assert SECRET_MAGIC not in recorded
    finally:
        cluster.close()


def answers(port: int, data: bytes, then: bytes = b"") -> bytes:
    """All that is sent back until the other side closes the connection. `then` is sent when an
    answer to `data` has come."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock:
        sock.sendall(data)
        found = b""
        try:
            if then:
                found = sock.recv(1 << 16)
                sock.sendall(then)
            while piece := sock.recv(1 << 16):
                found += piece
        except ConnectionResetError:
            pass
    return found


def test_recorded_traffic_is_refused(secured: Secured) -> None:
    """The answer to the handshake, and no frame: nothing was decrypted, so nothing was done."""
    put_and_wait(secured, KEY, VALUE)
    before = secured.call("KV.Range", proto.RangeRequest(key=KEY)).header.revision
    replayed = 0
    for name, proxy in secured.proxies.items():
        member = secured.members[name]
        assert isinstance(proxy, RecordingProxy)
        for recording in list(proxy.recordings):
            data = bytes(recording.data)
            if recording.is_from_dialer and len(data) > secret.OPENING_BYTES:
                opening, rest = data[: secret.OPENING_BYTES], data[secret.OPENING_BYTES :]

                def replay(
                    port: int = proxy.target, opening: bytes = opening, rest: bytes = rest
                ) -> None:
                    answer = answers(port, opening, rest)
                    assert len(answer) == secret.ANSWER_BYTES
                    assert answer[:8] == SECRET_MAGIC

                member.logs_when(replay, "frame 0 of the channel is not authentic")
                assert answers(proxy.target, data) == b"", "all at once is no handshake"
                replayed += 1
                break
    assert replayed == 3
    assert secured.call("KV.Range", proto.RangeRequest(key=KEY)).header.revision == before


def test_reflected_traffic_is_refused(secured: Secured) -> None:
    for name, proxy in secured.proxies.items():
        assert isinstance(proxy, RecordingProxy)
        data = next(
            bytes(recording.data)
            for recording in proxy.recordings
            if not recording.is_from_dialer and len(recording.data) > 100
        )
        answer = answers(proxy.target, data)
        assert len(answer) in (0, HANDSHAKE.size), secured.members[name].tail()


def test_strangers_at_the_peer_port_learn_nothing_and_disturb_nobody(secured: Secured) -> None:
    leader = secured.leader
    term = secured.call("KV.Range", proto.RangeRequest(key=KEY)).header.raft_term
    port = next(iter(secured.proxies.values())).target
    assert answers(port, HANDSHAKE.pack(MAGIC, 1, 2)) == SECRET_REFUSAL
    assert answers(port, b"\x16\x03\x01\x00\x05hello") == b""
    assert answers(port, b"GET /members HTTP/1.1\r\nHost: x\r\n\r\n") == b""
    stranger = secret.InitiatorChannel((secret_file.Secret(bytes(range(32, 64))),), secret.PEER)
    refusal = answers(port, stranger.output())
    assert refusal == HANDSHAKE.pack(SECRET_MAGIC, 1, secret.UNKNOWN_SECRET)
    # Half an opening: the port waits, but not for long, and nobody else waits with it.
    known = secret_file.read(str(secured.file("m1")))
    halves = []
    for size in (1, 8, 30, 91):
        sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        sock.sendall(secret.InitiatorChannel(known, secret.PEER).output()[:size])
        halves.append(sock)
    # A whole opening of one that knows the secret, and then silence.
    silent = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    silent.sendall(secret.InitiatorChannel(known, secret.PEER).output())
    assert len(silent.recv(1000)) == secret.ANSWER_BYTES
    for sock in (*halves, silent):
        assert len(sock.recv(1000)) == (18 if sock is silent else 0), "it is closed, with a notice"
        sock.close()
    assert secured.leader is leader
    assert secured.call("KV.Range", proto.RangeRequest(key=KEY)).header.raft_term == term


def test_a_flood_of_recorded_handshakes_disturbs_nobody(secured: Secured) -> None:
    """Each costs the member a key exchange, and holds a connection for as long as it can."""
    leader = secured.leader
    proxy = secured.proxies["m1"]
    assert isinstance(proxy, RecordingProxy)
    opening = next(
        bytes(recording.data[: secret.OPENING_BYTES])
        for recording in proxy.recordings
        if recording.is_from_dialer and len(recording.data) > secret.OPENING_BYTES
    )
    flood: list[socket.socket] = []
    try:
        for number in range(500):
            sock = socket.create_connection(("127.0.0.1", proxy.target), PATIENCE_S)
            flood.append(sock)
            sock.sendall(opening if number % 2 else opening[: number % 92])
            if number % 100 == 99:
                began = time.monotonic()
                secured.call("KV.Put", proto.PutRequest(key=KEY, value=VALUE))
                assert time.monotonic() - began < PATIENCE_S / 2
        # All places are taken, and yet members connect.
        follower = secured.follower()
        follower.restart()
        put_and_wait(secured, KEY, VALUE)
    finally:
        for sock in flood:
            sock.close()
    assert secured.leader is leader


def test_a_holder_of_the_secret_that_claims_another_id_inside_is_refused(secured: Secured) -> None:
    known = secret_file.read(str(secured.file("m1")))
    ids = {name: secured.id_of(member) for name, member in secured.members.items()}
    cluster_id = secured.call("KV.Range", proto.RangeRequest(key=KEY)).header.cluster_id
    channel = secret.InitiatorChannel(known, secret.PEER, cluster_id, ids["m2"], ids["m1"])
    with socket.create_connection(("127.0.0.1", secured.proxies["m1"].target), PATIENCE_S) as sock:
        from etcdlite import peer_frames
        from etcdlite.channel import shake_hands
        from etcdlite.peer import INTRODUCE

        shake_hands(sock, channel, time.monotonic() + PATIENCE_S)
        introduction = proto.Introduction(
            cluster_id=cluster_id, member_id=ids["m3"], to=ids["m1"], life=7, version=__version__
        )
        hello = HANDSHAKE.pack(MAGIC, peer_frames.VERSION, peer_frames.VERSION)
        sock.sendall(
            channel.seal(hello + peer_frames.frame(1, INTRODUCE, 0, introduction.encode()))
        )
        answer = b""
        while data := sock.recv(1 << 16):
            answer += channel.receive(data)
    assert b"in its handshake" in answer
    assert channel.is_ended, "the end came with its close notice"
    secured.members["m1"].wait_for_log("in its handshake")


def test_a_wrong_secret_is_refused_on_both_sides_until_it_is_corrected(
    secured: Secured, folder: Path
) -> None:
    wrong = made(folder, "wrong")
    good_id, wrong_id = (
        secret_file.read(str(path))[0].id.hex() for path in (Secured.source, wrong)
    )
    member = secured.members["m3"]
    member.stop()
    secured.give("m3", wrong)
    others = [secured.members["m1"], secured.members["m2"]]
    for one in (*others, member):
        one.lines.clear()
    member.spawn()
    for one in others:
        line = one.wait_for_log("the other side has another secret (id")
        assert wrong_id in line and good_id in line
        line = one.wait_for_log("the other side has another secret than this one")
        assert good_id in line and "cannot reach a peer" in line
    line = member.wait_for_log("the other side has another secret than this one")
    assert wrong_id in line
    secured.call("KV.Put", proto.PutRequest(key=KEY, value=b"while m3 is out"))
    # The right file, and no restart.
    secured.give("m3", Secured.source)
    member.wait_for_log("read peer-secret-file again")
    wait_until(lambda: member.endpoint, f"m3 serves; {member.tail()}")
    put_and_wait(secured, KEY, b"with m3")


def test_a_member_without_the_secret_is_refused_and_told_why(secured: Secured) -> None:
    member = secured.members["m3"]
    member.stop()
    flag = member.flags.pop()
    for one in secured.members.values():
        one.lines.clear()
    member.spawn()
    member.wait_for_log("set peer-secret-file here, too")
    secured.members["m1"].wait_for_log("the other side has no secret, this one has")
    secured.call("KV.Put", proto.PutRequest(key=KEY, value=b"while m3 is out"))
    member.stop()
    member.flags.append(flag)
    member.start()
    put_and_wait(secured, KEY, b"with m3")


def test_a_secret_is_rotated_while_the_cluster_runs(secured: Secured, folder: Path) -> None:
    old, new = Secured.source, made(folder, "next")
    for step in ((old, new), (new, old), (new,)):
        for name, member in secured.members.items():
            member.lines.clear()
            secured.give(name, *step)
            # The file is looked at for new connections; SIGHUP reads it at once.
            member.signal(1)
            member.wait_for_log("read peer-secret-file again")
        for proxy in secured.proxies.values():
            proxy.recordings.clear()  # type: ignore[attr-defined]
        secured.members["m2"].restart()
        put_and_wait(secured, KEY, b"rotated")
    Secured.source = new
    old_id, new_id = (secret_file.read(str(path))[0].id for path in (old, new))
    wait_until(lambda: new_id in traffic(secured), "the last start dialed with the new secret")
    assert old_id not in traffic(secured)


def test_a_bad_new_file_is_refused_and_the_old_secret_goes_on(secured: Secured) -> None:
    member = secured.members["m1"]
    member.lines.clear()
    path = secured.file("m1")
    text = path.read_text()
    path.write_text("correct horse battery staple\n")
    member.signal(1)
    member.wait_for_log("cannot be read again; the old secrets stay in use")
    secured.members["m2"].restart()
    put_and_wait(secured, KEY, b"all the same")
    path.write_text(text)


def test_a_new_member_joins_and_gets_its_snapshot_through_the_channel(secured: Secured) -> None:
    for number in range(40):
        secured.call("KV.Put", proto.PutRequest(key=b"fill/%d" % number, value=VALUE * 300))
    member = secured.add("m4")
    put_and_wait(secured, KEY, VALUE)
    with Client(member.endpoint, timeout_s=PATIENCE_S) as client:
        answer = client.range(prefix="fill/", serializable=True)
        assert answer.count == 40
    assert any("snapshot" in line for line in member.lines), member.tail()
    recorded = traffic(secured)
    assert VALUE not in recorded and b"fill/" not in recorded


def test_bits_flip_on_the_way_and_nothing_wrong_arrives(secured: Secured) -> None:
    secured.load(2)
    for proxy in secured.proxies.values():
        proxy.flips = 0.05

    def is_enough() -> bool:
        secured.progress(5)
        return sum(proxy.flipped for proxy in secured.proxies.values()) > 5

    wait_until(is_enough, "enough was damaged")
    for proxy in secured.proxies.values():
        proxy.flips = 0.0
    wait_until(
        lambda: any("is not authentic" in line for one in secured.running for line in one.lines),
        "it is logged",
    )
    secured.check()
