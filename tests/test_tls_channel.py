"""Tests of TLS as a channel, sans-IO: both ends in one process, bytes passed by hand."""

from __future__ import annotations

import hmac
import random
import re
import ssl
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from rigs.pki import Authority, Files, pki

from etcdlite import x509
from etcdlite.channel import MAX_OUTPUT_BYTES, ChannelError
from etcdlite.tls import MAX_EMPTY_RECORDS, MAX_INPUT_BYTES, Sources, TLSChannel

SERVER = Sources("--trusted-ca-file ca.pem", "--cert-file server.pem")
CLIENT = Sources("--cacert ca.pem", "--cert client.pem")


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def server_files(ca: Authority) -> Files:
    return ca.issue("server")


def server_context(files: Files, trusted: str = "") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    context.set_alpn_protocols(["etcdlite", "h2", "http/1.1"])
    context.num_tickets = 0
    if trusted:
        context.load_verify_locations(trusted)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(trusted: str, files: Files | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(trusted)
    context.set_alpn_protocols(["h2"])
    if files:
        context.load_cert_chain(*files)
    return context


class Pair:
    """A client and a server with bytes that go back and forth."""

    def __init__(
        self,
        client: ssl.SSLContext,
        server: ssl.SSLContext,
        name: str = "localhost",
        check: Callable[[TLSChannel], None] | None = None,
    ) -> None:
        self.client = TLSChannel(lambda: client, CLIENT, server_name=name)
        self.server = TLSChannel(lambda: server, SERVER, check=check)

    def shake(self, step: int = 1 << 20) -> None:
        """Complete the handshake, with at most `step` bytes at a time."""
        for _ in range(10):
            for sender, receiver in ((self.client, self.server), (self.server, self.client)):
                data = sender.output()
                for at in range(0, len(data), step):
                    assert receiver.receive(data[at : at + step]) == b""
        assert self.client.is_established and self.server.is_established


@pytest.fixture
def pair(ca: Authority, server_files: Files) -> Pair:
    return Pair(client_context(ca.ca), server_context(server_files))


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_plaintext_arrives_however_the_ciphertext_is_cut(pair: Pair, step: int) -> None:
    pair.shake(step)
    assert pair.server.alpn == pair.client.alpn == "h2"
    assert pair.server.description.startswith("TLSv1.3, ")
    sent = random.Random(1).randbytes(200_000 if step > 1 else 40_000)
    sealed = pair.client.seal(sent[:100]) + pair.client.seal(sent[100:])
    assert sent[:50] not in sealed
    got = b"".join(
        pair.server.receive(sealed[at : at + step]) for at in range(0, len(sealed), step)
    )
    assert got == sent
    assert not pair.server.held_bytes
    back = pair.server.seal(memoryview(sent)[:70_000])
    assert pair.client.receive(back) == sent[:70_000]


@pytest.mark.parametrize("seed", range(20))
def test_plaintext_arrives_in_random_pieces(pair: Pair, seed: int) -> None:
    pair.shake()
    rng = random.Random(seed)
    sent = [rng.randbytes(rng.choice((1, 5, 100, 3000, 16384, 40000))) for _ in range(150)]
    stream = b"".join(map(pair.client.seal, sent))
    got, at = [], 0
    while at < len(stream):
        size = rng.choice((1, 2, 3, 4, 5, 6, 22, 1000, 16384, 65536))
        got.append(pair.server.receive(stream[at : at + size]))
        at += size
        assert bool(pair.server.held_bytes) == (sum(map(len, got)) < _ended(sent, at, stream, pair))
    assert b"".join(got) == b"".join(sent)


def _ended(sent: list[bytes], at: int, stream: bytes, pair: Pair) -> float:
    """A bound for `held_bytes` from the records' headers: infinite inside of a record."""
    position = 0
    while position < at:
        if position + 5 > len(stream):
            break
        position += 5 + int.from_bytes(stream[position + 3 : position + 5], "big")
    return float("inf") if position > at else -1.0


def test_data_may_follow_the_handshake_in_the_same_bytes(pair: Pair) -> None:
    pair.server.receive(pair.client.output())
    pair.client.receive(pair.server.output())
    assert pair.client.is_established
    assert pair.server.receive(pair.client.seal(b"first request")) == b"first request"
    assert pair.server.is_established


def test_goodbye_is_noticed(pair: Pair) -> None:
    pair.shake()
    last = pair.client.seal(b"last")
    pair.client.close()
    assert pair.server.receive(last + pair.client.output()) == b"last"
    assert pair.server.is_ended


def test_nothing_is_made_for_a_connection_that_sends_nothing_whole(pair: Pair) -> None:
    made: list[int] = []
    server = TLSChannel(lambda: made.append(1), SERVER)  # type: ignore[arg-type, return-value]
    hello = pair.client.output()
    assert server.receive(hello[:-1]) == b"" and server.held_bytes == len(hello) - 1
    assert not made


@pytest.mark.parametrize(
    "first, says, answer",
    [
        (b"GET /version HTTP/1.1\r\n", "plain HTTP on a TLS port", b"HTTP/1.0 400 Bad Request"),
        (b"PUT /", "plain HTTP on a TLS port", b"HTTP/1.0 400 Bad Request"),
        (b"PRI * HTTP/2.0\r\n", "plain text on a TLS port", b"\x15\x03"),
        (b"etcdlite", "plain text on a TLS port", b"\x15\x03"),
        (b"\x16\x03\x01\xff\xff", "is it TLS", b"\x15\x03"),
    ],
)
def test_plain_text_is_recognized(first: bytes, says: str, answer: bytes) -> None:
    server = TLSChannel(lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), SERVER)
    with pytest.raises(ChannelError, match=says):
        for at in range(len(first)):
            server.receive(first[at : at + 1])
    assert server.output().startswith(answer)


def test_half_a_handshake_says_so(pair: Pair) -> None:
    pair.server.receive(pair.client.output())
    with pytest.raises(ChannelError, match="closed the connection during the handshake"):
        pair.server.receive_end()


# Certificates.


def failure(pair: Pair) -> tuple[str, str]:
    """What the client and the server say of a handshake that fails; empty: nothing."""
    said = {}
    for _ in range(4):
        for sender, receiver in ((pair.client, pair.server), (pair.server, pair.client)):
            try:
                receiver.receive(sender.output())
            except ChannelError as error:
                said.setdefault(receiver, str(error))
    return said.get(pair.client, ""), said.get(pair.server, "")


def test_bad_server_certificates_are_refused_with_the_reason(ca: Authority) -> None:
    other = Authority(ca.directory, "other")
    cases = [
        (other.issue("s1"), "no CA in --cacert ca.pem signed", "does not know the CA"),
        (ca.issue("s2", days=(-10, -1)), "has expired: renew it", "it has expired"),
        (ca.issue("s3", days=(1, 10)), "is not valid yet: correct the clock", "its log tells why"),
        (ca.issue("s4", hosts=("elsewhere",)), "does not have the name .*localhost", ""),
        (ca.issue("s5", usages=("client",)), "needs the extended key usage serverAuth", ""),
        (ca.issue("s6", hosts=()), "does not have the name", ""),
    ]
    for files, client_says, server_says in cases:
        said = failure(Pair(client_context(ca.ca), server_context(files)))
        for text, expected in zip(said, (client_says, server_says), strict=True):
            assert text and re.search(expected, text), (expected, text)
        assert "--cert-file server.pem" in said[1]


def test_a_certificate_without_the_dialled_address_is_refused(ca: Authority) -> None:
    files = ca.issue("s7", hosts=("localhost",))
    said, _ = failure(Pair(client_context(ca.ca), server_context(files), "127.0.0.1"))
    assert "does not have the address" in said


def test_bad_client_certificates_are_refused_with_the_reason(
    ca: Authority, server_files: Files
) -> None:
    other = Authority(ca.directory, "other")
    cases = [
        (None, "showed no certificate: .*--trusted-ca-file ca.pem", "wants a certificate"),
        (other.issue("c1"), "no CA in --trusted-ca-file ca.pem signed", "does not know the CA"),
        (ca.issue("c2", days=(-10, -1)), "has expired", "--cert client.pem.*: it has expired"),
        (ca.issue("c3", days=(1, 10)), "is not valid yet", "refuses this side's certificate"),
        (ca.issue("c4", usages=("server",)), "clientAuth", "key usage does not fit"),
    ]
    for files, server_says, client_says in cases:
        client, server = client_context(ca.ca, files), server_context(server_files, ca.ca)
        said = failure(Pair(client, server))
        for text, expected in zip(said, (client_says, server_says), strict=True):
            assert text and re.search(expected, text), (expected, text)


def test_the_other_side_can_be_refused_after_the_handshake(
    ca: Authority, server_files: Files
) -> None:
    def check(channel: TLSChannel) -> None:
        name = x509.parse_certificate(channel.certificate()).common_name
        raise ChannelError(f"{name} of {len(channel.chain())} is not welcome")

    middle = ca.intermediate("middle")
    files = middle.issue("carol", chain=(middle,))
    pair = Pair(client_context(ca.ca, files), server_context(server_files, ca.ca), check=check)
    assert failure(pair)[1] == "carol of 2 is not welcome"
    assert not pair.server.is_established


def test_versions_without_one_in_common_say_so(ca: Authority, server_files: Files) -> None:
    client, server = client_context(ca.ca), server_context(server_files)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    server.minimum_version = ssl.TLSVersion.TLSv1_3
    assert "tls-min-version" in failure(Pair(client, server))[1]


# Hostile input.


def test_a_handshake_that_is_too_large_is_refused(pair: Pair) -> None:
    pair.server.receive(pair.client.output())
    with pytest.raises(ChannelError):
        for _ in range(2 * MAX_INPUT_BYTES // 16384):
            pair.server.receive(b"\x16\x03\x03\x40\x00" + b"\x0b" + bytes(16383))
    assert len(pair.server.output()) <= MAX_OUTPUT_BYTES


def test_random_bytes_never_establish_anything(ca: Authority, server_files: Files) -> None:
    rng = random.Random(3)
    context = server_context(server_files)
    hello = TLSChannel(lambda: client_context(ca.ca), CLIENT, server_name="localhost").output()
    for _ in range(300):
        server = TLSChannel(lambda: context, SERVER)
        data = bytearray(hello)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            data += rng.randbytes(rng.randrange(2000))
        try:
            for at in range(0, len(data), 50):
                server.receive(bytes(data[at : at + 50]))
        except ChannelError as error:
            assert str(error)
        assert not server.is_established
        assert len(server.output()) <= MAX_OUTPUT_BYTES


def test_changed_records_break_the_channel(ca: Authority, server_files: Files) -> None:
    rng = random.Random(4)
    client, server = client_context(ca.ca), server_context(server_files)
    for _ in range(150):
        pair = Pair(client, server)
        pair.shake()
        data = bytearray(pair.client.seal(b"x" * rng.randrange(1, 3000)))
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        try:
            got = pair.server.receive(bytes(data))
        except ChannelError:
            continue
        # What changed is the length of the record: it is not complete.
        assert got == b"" and pair.server.held_bytes


def test_records_are_not_taken_twice_or_in_another_order(pair: Pair) -> None:
    pair.shake()
    first, second = pair.client.seal(b"first"), pair.client.seal(b"second")
    with pytest.raises(ChannelError, match="a record is damaged"):
        pair.server.receive(second)
    assert first


def test_records_are_not_taken_twice(pair: Pair) -> None:
    pair.shake()
    first = pair.client.seal(b"first")
    assert pair.server.receive(first) == b"first"
    with pytest.raises(ChannelError, match="a record is damaged"):
        pair.server.receive(first)


class KeyUpdates:
    """Makes TLS 1.3 records that only announce a new key (RFC 8446 4.6.3), which `ssl` never sends,
    from the secret in a key log."""

    def __init__(self, key_log: str) -> None:
        lines = Path(key_log).read_text().splitlines()
        secret = next(line for line in lines if line.startswith("CLIENT_TRAFFIC_SECRET_0"))
        self._secret = bytes.fromhex(secret.split()[2])
        self._hash = {32: "sha256", 48: "sha384"}[len(self._secret)]

    def _expand(self, label: str, size: int) -> bytes:
        """HKDF-Expand-Label (RFC 8446 7.1), one block."""
        name = b"tls13 " + label.encode()
        info = struct.pack(">HB", size, len(name)) + name + b"\0\x01"
        return hmac.digest(self._secret, info, self._hash)[:size]

    def record(self, message: bytes = b"\x18\0\0\x01\x01", kind: int = 22) -> bytes:
        """A record with one message, which also asks the other side for a new key."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        header = struct.pack(">BHH", 23, 0x303, len(message) + 1 + 16)
        key, iv = self._expand("key", 32 if self._hash == "sha384" else 16), self._expand("iv", 12)
        sealed = AESGCM(key).encrypt(iv, message + bytes([kind]), header)
        self._secret = self._expand("traffic upd", len(self._secret))
        return header + sealed


def test_too_many_new_keys_are_refused(ca: Authority, server_files: Files, tmp_path: Path) -> None:
    client, server = client_context(ca.ca), server_context(server_files)
    client.keylog_filename = str(tmp_path / "keys")
    pair = Pair(client, server)
    pair.shake()
    updates = KeyUpdates(str(tmp_path / "keys"))
    assert pair.server.receive(b"".join(updates.record() for _ in range(MAX_EMPTY_RECORDS))) == b""
    assert pair.server.has_output, "each asks for an answer"
    assert not pair.server.held_bytes
    with pytest.raises(ChannelError, match="without content"):
        pair.server.receive(updates.record())
    assert len(pair.server.output()) < 3000


def test_no_new_handshake_within_a_connection(ca: Authority, server_files: Files) -> None:
    client, server = client_context(ca.ca), server_context(server_files)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    server.options |= ssl.OP_NO_RENEGOTIATION
    pair = Pair(client, server)
    pair.shake()
    hello = TLSChannel(lambda: client, CLIENT, server_name="localhost").output()
    with pytest.raises(ChannelError):
        pair.server.receive(hello)


# The fields of certificates.


def test_the_fields_of_a_certificate(ca: Authority) -> None:
    files = ca.issue("fields", cn="Zoë", hosts=("a.example", "*.b.example", "10.0.0.1", "fd00::1"))
    (der,) = x509.blocks(Path(files.cert).read_bytes(), "CERTIFICATE")
    found = x509.parse_certificate(der)
    assert found.common_name == "Zoë"
    assert found.dns_names == ("a.example", "*.b.example")
    assert found.addresses == ("10.0.0.1", "fd00::1")
    assert 363 * 86400 < found.not_after - found.not_before < 367 * 86400
    assert [
        host for host in ("a.example", "A.example.", "x.b.example", "b.example", "x.y.b.example",
                          "10.0.0.1", "[fd00::1]", "10.0.0.2", "Zoë") if found.names(host)
    ] == ["a.example", "A.example.", "x.b.example", "10.0.0.1", "[fd00::1]"]  # fmt: skip


def test_a_revocation_list_in_both_encodings(ca: Authority) -> None:
    files = ca.issue("revoked")
    (der,) = x509.blocks(Path(files.cert).read_bytes(), "CERTIFICATE")
    serial = x509.parse_certificate(der).serial
    pem = Path(ca.revoke(files)).read_bytes()
    (inner,) = x509.blocks(pem, "X509 CRL")
    other = Path(ca.write_list("crl.der", is_pem=False)).read_bytes()
    for one in (inner, other):
        found = x509.parse_revocation_list(one)
        assert found.serials == {serial}
        assert found.next_update > 0


def test_every_cut_and_many_changes_of_a_certificate_are_errors_or_values(ca: Authority) -> None:
    (der,) = x509.blocks(Path(ca.issue("fuzz").cert).read_bytes(), "CERTIFICATE")
    (crl,) = x509.blocks(Path(ca.revoke(Files(ca.ca, ""))).read_bytes(), "X509 CRL")
    rng = random.Random(5)
    for data, parse in ((der, x509.parse_certificate), (crl, x509.parse_revocation_list)):
        for size in range(len(data)):
            with pytest.raises(ValueError):
                parse(data[:size])  # type: ignore[operator]
        for _ in range(5000):
            changed = bytearray(data)
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            try:
                parse(bytes(changed))  # type: ignore[operator]
            except ValueError:
                pass
