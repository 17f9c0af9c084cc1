"""`etcdlite-ctl cert`: the certificates are what TLS libraries, etcd and etcdctl accept, whichever
tool makes them, and no file is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.certs import DAY_S, Authority, make_authority
from rigs.ctl_runner import Ended, run_ctl
from rigs.real_etcd import distributed, running_etcd, without_settings

from etcdlite import certificates
from etcdlite import flags as server_flags
from etcdlite.certificates import CertificateError, Pair, Profile

Maker = Callable[[Profile, Pair | None], Pair]


@pytest.fixture(params=["cryptography", "openssl"])
def maker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """The way to make certificates; `make` takes this one in the test."""
    if request.param == "cryptography":
        pytest.importorskip("cryptography")
        found: Maker = certificates.with_cryptography
    else:
        if not shutil.which("openssl"):
            pytest.skip("needs the command openssl")
        found = certificates.with_openssl
    monkeypatch.setattr(certificates, "maker", lambda: found)
    return found


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def ctl(tmp_path: Path) -> Callable[..., Ended]:
    """Runs `etcdlite-ctl cert` on one directory."""
    try:
        certificates.maker()
    except CertificateError as failure:
        pytest.skip(str(failure))

    def run(*words: str) -> Ended:
        return run_ctl("cert", *words, f"--dir={tmp_path / 'certs'}")

    return run


def decoded(path: str) -> dict[str, Any]:
    """What Python's ssl reads in a certificate."""
    return ssl._ssl._test_decode_cert(path)  # type: ignore[attr-defined]


def shake(server: Pair, client: Pair | None, ca: str, host: str) -> None:
    """A TLS handshake in memory, in which both sides check what they are given. Raises SSLError."""
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(*server)
    dialing = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    dialing.hostname_checks_common_name = False
    for context in (accepting, dialing):
        context.load_verify_locations(ca)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    if client is not None:
        accepting.verify_mode = ssl.CERT_REQUIRED
        dialing.load_cert_chain(*client)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = accepting.wrap_bio(up, down, server_side=True)
    other = dialing.wrap_bio(down, up, server_hostname=host)
    for side in (other, one) * 3:
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert one.cipher() and other.cipher()


def test_a_certificate_is_for_its_use_and_its_hosts_only(
    maker: Maker, ctl: Callable[..., Ended], tmp_path: Path
) -> None:
    for words in (
        ("init",),
        ("server", "m1", "--host", "m1.lab,10.1.2.3"),
        ("peer", "m1", "--host=[fd00::1]"),
        ("client", "alice"),
    ):
        ended = ctl(*words)
        assert (ended.status, ended.stderr) == (0, ""), words
    folder = tmp_path / "certs"
    ca = str(folder / "ca.crt")
    files = {
        name: Pair(str(folder / f"{name}.crt"), str(folder / f"{name}.key"))
        for name in ("m1-server", "m1-peer", "alice-client")
    }
    shake(files["m1-server"], None, ca, "m1.lab")
    shake(files["m1-server"], files["alice-client"], ca, "10.1.2.3")
    shake(files["m1-peer"], files["m1-peer"], ca, "fd00::1")
    for host in ("localhost", "127.0.0.1", "::1"):
        shake(files["m1-server"], files["m1-peer"], ca, host)
    with pytest.raises(ssl.SSLError, match=r"Hostname mismatch|not valid for"):
        shake(files["m1-server"], None, ca, "m1")  # The common name is not a host.
    with pytest.raises(ssl.SSLError, match=r"unsupported|unsuitable"):
        shake(files["m1-server"], files["m1-server"], ca, "m1.lab")
    with pytest.raises(ssl.SSLError, match=r"unsupported|unsuitable"):
        shake(files["alice-client"], None, ca, "localhost")
    read = decoded(files["alice-client"].certificate)
    assert read["subject"] == ((("commonName", "alice"),),)
    assert "subjectAltName" not in read


EXTENSIONS = {
    "ca": """
        X509v3 Basic Constraints: critical
        CA:TRUE
        X509v3 Key Usage: critical
        Certificate Sign, CRL Sign
        """,
    "peer": """
        X509v3 Basic Constraints: critical
        CA:FALSE
        X509v3 Key Usage: critical
        Digital Signature
        X509v3 Extended Key Usage:
        TLS Web Server Authentication, TLS Web Client Authentication
        X509v3 Subject Alternative Name:
        DNS:m.lab, IP Address:10.0.0.1, IP Address:FD00:0:0:0:0:0:0:2
        """,
}
IDENTIFIERS = ["X509v3 Authority Key Identifier:", "X509v3 Subject Key Identifier:"]


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_a_certificate_has_what_its_profile_says_and_nothing_else(
    kind: str, maker: Maker, authority: Authority, tmp_path: Path
) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs the command openssl")
    now = int(time.time())
    hosts = ("m.lab", "10.0.0.1", "fd00::2") if kind == "peer" else ()
    profile = Profile(kind, "some name", hosts, now - 7, now + 40_000 * DAY_S)
    made = maker(profile, authority.files if kind == "peer" else None)
    assert "BEGIN PRIVATE KEY" in made.key
    path = tmp_path / "it"
    path.write_text(made.certificate)
    read = decoded(str(path))
    assert len(read["serialNumber"]) <= 40 and read["version"] == 3
    assert read["subject"] == ((("commonName", "some name"),),)
    times = [ssl.cert_time_to_seconds(read[name]) for name in ("notBefore", "notAfter")]
    assert times == [now - 7, now + 40_000 * DAY_S]
    command = ["openssl", "x509", "-noout", "-text", "-in", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "ecdsa-with-SHA256" in text and "NIST CURVE: P-256" in text
    extensions = text.partition("X509v3 extensions:")[2].partition("Signature Algorithm")[0]
    # The identifiers are hashes of keys, and the order does not matter.
    plain = [line.strip() for line in extensions.splitlines() if line.count(":") < 19]
    expected = [line.strip() for line in EXTENSIONS[kind].splitlines()]
    assert sorted(filter(None, plain)) == sorted([*filter(None, expected), *IDENTIFIERS])


def test_keys_are_for_their_owner_alone_and_no_file_is_replaced_unasked(
    ctl: Callable[..., Ended], tmp_path: Path
) -> None:
    assert ctl("init").status == ctl("server", "m1").status == 0
    folder = tmp_path / "certs"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {
        "ca.crt": 0o644,
        "ca.key": 0o600,
        "m1-server.crt": 0o644,
        "m1-server.key": 0o600,
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for words in (("init",), ("server", "m1")):
        ended = ctl(*words)
        assert ended.status == 1 and "exists; --force replaces it" in ended.stderr
    (folder / "m2-peer.key").write_text("precious")
    assert "m2-peer.key exists" in ctl("peer", "m2").stderr
    assert not (folder / "m2-peer.crt").exists()
    assert {path: path.read_bytes() for path in before} == before
    assert ctl("server", "m1", "--force").status == 0
    assert (folder / "m1-server.key").read_bytes() != before[folder / "m1-server.key"]


def test_what_is_printed_can_be_pasted(ctl: Callable[..., Ended], tmp_path: Path) -> None:
    ctl("init")
    lines = ctl("server", "m1").stdout.decode().splitlines()
    (end,) = {line.rpartition(" ")[2].rstrip(".") for line in lines if "valid until" in line}
    assert end == time.strftime("%Y-%m-%d", time.gmtime(time.time() + 365 * DAY_S))
    settings = [line.strip() for line in lines if " = " in line]
    flags = [word for line in lines if line.startswith("  --") for word in line.split()]
    for name in ("cert-file", "key-file", "trusted-ca-file"):
        (path,) = {
            line.partition(" = ")[2].strip('"') for line in settings if line.startswith(name)
        }
        assert os.path.isabs(path) and os.path.exists(path)
        assert f"--{name}={path}" in flags
    assert "client-cert-auth = true" in settings and "--client-cert-auth" in flags
    assert all(server_flags.find(line.partition(" = ")[0]) for line in settings)
    client = ctl("client", "alice").stdout.decode()
    assert f"ETCDCTL_CACERT={tmp_path}/certs/ca.crt" in client


def test_a_certificate_ends_no_later_than_its_ca(ctl: Callable[..., Ended], tmp_path: Path) -> None:
    ctl("init", "--days=30")
    ctl("server", "m1", "--days=90")
    ends = [
        decoded(str(tmp_path / "certs" / f"{name}.crt"))["notAfter"] for name in ("ca", "m1-server")
    ]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "words, status, text",
    [
        (("server",), 128, "needs 1 argument"),
        (("client", "a", "b"), 128, "needs 1 argument: the name of the user"),
        (("init", "a", "b"), 128, "at most 1 argument"),
        (("server", "../m1"), 128, "part of file names"),
        (("server", "m 1"), 128, "part of file names"),
        (("client", "x" * 65), 128, "64 letters"),
        (("client", "a\nb"), 128, "bad name"),
        (("client", "$ENV::HOME"), 128, "bad name"),
        (("server", "m1", "--host=https://m1"), 128, "without scheme and port"),
        (("server", "m1", "--host=m1:2379"), 128, "without scheme and port"),
        (("server", "m1", "--host=a b"), 128, "bad host"),
        (("server", "m1", "--host=x\nIP:1.2.3.4"), 128, "bad host"),
        (("server", "m1", "--days=0x"), 1, "invalid argument"),
        (("server", "m1", "--days=-1"), 128, "between 1 and 36500"),
        (("server", "m1", "--days=0"), 128, "between 1 and 36500"),
        (("server", "m1", "--dir=nowhere"), 1, "there is no CA: no file nowhere/ca.crt"),
    ],
)
def test_bad_input_is_refused_before_a_file_is_made(
    ctl: Callable[..., Ended], tmp_path: Path, words: tuple[str, ...], status: int, text: str
) -> None:
    ctl("init")
    named = any(word.startswith("--dir") for word in words)
    ended = run_ctl("cert", *words) if named else ctl(*words)
    assert ended.status == status and text in ended.stderr, ended
    assert {path.name for path in (tmp_path / "certs").iterdir()} == {"ca.crt", "ca.key"}


def test_what_is_not_a_ca_signs_nothing(ctl: Callable[..., Ended], tmp_path: Path) -> None:
    ctl("init")
    folder = tmp_path / "certs"
    good = {name: (folder / name).read_bytes() for name in ("ca.crt", "ca.key")}
    other = make_authority(tmp_path / "other")
    server = other.issue("server", "m9")
    old = int(time.time())
    ended_ca = certificates.make(Profile("ca", "old", (), old - 9 * DAY_S, old - DAY_S))
    for certificate, key, text in (
        (good["ca.crt"], Path(other.files.key).read_bytes(), "are not a certificate and its key"),
        (b"junk", good["ca.key"], "are not a certificate and its key"),
        (good["ca.crt"], b"", "are not a certificate and its key"),
        (
            Path(server.certificate).read_bytes(),
            Path(server.key).read_bytes(),
            "no certificate of a CA",
        ),
        (ended_ca.certificate.encode(), ended_ca.key.encode(), "ended on"),
    ):
        (folder / "ca.crt").write_bytes(certificate)
        (folder / "ca.key").write_bytes(key)
        ended = ctl("server", "m1")
        assert ended.status == 1 and text in ended.stderr, ended.stderr
        assert "PRIVATE" not in ended.stderr
    assert not (folder / "m1-server.crt").exists()


def test_without_a_tool_the_error_says_what_to_install(
    ctl: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setitem(sys.modules, "cryptography.x509", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = ctl("init")
    assert ended.status == 1 and "apt install openssl" in ended.stderr
    with pytest.raises(CertificateError, match="python3-cryptography"):
        certificates.maker()


@contextlib.contextmanager
def secured_etcd(folder: Path, authority: Authority) -> Iterator[str]:
    """A real etcd that takes clients with a certificate of the CA only."""
    certificate, own = authority.issue("peer", "m1"), authority.issue("server", "m1")
    flags = [
        f"--cert-file={own.certificate}",
        f"--key-file={own.key}",
        f"--trusted-ca-file={authority.certificate}",
        "--client-cert-auth",
        # Its gateway is a client of its own.
        f"--client-cert-file={certificate.certificate}",
        f"--client-key-file={certificate.key}",
        f"--peer-cert-file={certificate.certificate}",
        f"--peer-key-file={certificate.key}",
        f"--peer-trusted-ca-file={authority.certificate}",
        "--peer-client-cert-auth",
    ]
    with running_etcd(folder, flags=flags, scheme="https") as endpoint:
        yield f"https://{endpoint}"


def test_real_etcd_and_etcdctl_take_the_certificates(maker: Maker, tmp_path: Path) -> None:
    authority = make_authority(tmp_path / "ca")
    alice = authority.issue("client", "alice", ())
    mallory = make_authority(tmp_path / "mallory").issue("client", "alice", ())
    with secured_etcd(tmp_path, authority) as url:

        def etcdctl(*words: str, pair: Pair = alice) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [
                    distributed("etcdctl"),
                    f"--endpoints={url}",
                    f"--cacert={authority.certificate}",
                    f"--cert={pair.certificate}",
                    f"--key={pair.key}",
                    "--command-timeout=5s",
                    *words,
                ],
                capture_output=True,
                text=True,
                env=without_settings(),
                timeout=30,
            )

        done = etcdctl("put", "a", "b")
        assert (done.stdout, done.returncode) == ("OK\n", 0), done.stderr
        members = json.loads(etcdctl("member", "list", "-w", "json").stdout)["members"]
        assert members[0]["clientURLs"] == [url]
        refused = etcdctl("put", "a", "c", "--dial-timeout=1s", pair=mallory)
        assert refused.returncode != 0 and refused.stdout == ""
