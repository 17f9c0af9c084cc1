"""Tests of the files of TLS: what they accept of the other side, what is wrong with them, and what
happens when they change."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rigs.pki import Authority, Files, make_key, pki

from etcdlite import credentials, log
from etcdlite.channel import ChannelError
from etcdlite.credentials import RELOAD_S, CredentialsError, Settings
from etcdlite.tls import TLSChannel

PROTOCOLS = ("etcdlite", "h2")
ADDRESS = "127.0.0.1"


def use(made: Settings, *clock: Any) -> credentials.Credentials:
    return credentials.Credentials(made, [PROTOCOLS], *clock)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def both(ca: Authority) -> Files:
    """A certificate for servers and clients of the name etcdlite."""
    return ca.issue("both")


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def warn(message: str, *limit: Any, **fields: Any) -> None:
        found.append(" ".join((message, *map(str, fields.values()))))

    monkeypatch.setattr(log, "warn", warn)
    return found


def settings(files: Files, **changes: Any) -> Settings:
    plain = Settings(
        prefix="peer-", cert_file=files.cert, key_file=files.key, client_cert_file="",
        client_key_file="", trusted_ca_file="", crl_file="", client_cert_auth=False,
        allowed_names=(), allowed_hosts=(), checks_addresses=False, is_self_signed=False,
        suites=(), min_version="", max_version="",
    )  # fmt: skip
    return plain._replace(**changes)


def connect(
    client: credentials.Credentials,
    server: credentials.Credentials,
    name: str = "localhost",
    address: str = ADDRESS,
) -> tuple[str, str, TLSChannel, TLSChannel]:
    """What each side says of the other (empty: nothing), and the channels."""
    said = {}
    near = client.dial(PROTOCOLS, name)
    far = server.accept(PROTOCOLS, address)
    for _ in range(4):
        for sender, receiver in ((near, far), (far, near)):
            try:
                if sender.has_output and receiver not in said:
                    receiver.receive(sender.output())
            except ChannelError as error:
                said[receiver] = str(error)
    return said.get(near, ""), said.get(far, ""), near, far


# Who is accepted.


def test_both_sides_agree(ca: Authority, both: Files) -> None:
    made = settings(both, trusted_ca_file=ca.ca)
    one = use(made._replace(client_cert_auth=True))
    client_says, server_says, client, server = connect(one, use(made))
    assert not client_says and not server_says
    assert client.is_established and server.is_established
    assert client.alpn == server.alpn == "etcdlite"
    assert server.user == "", "the user counts with client-cert-auth only, as in etcd"
    assert "certificate of both" in server.description
    assert server.receive(client.seal(b"hello")) == b"hello"
    *_, server = connect(one, one)
    assert server.user == "both"


def test_a_set_of_cas_demands_a_certificate(ca: Authority, both: Files) -> None:
    """As in etcd, where trusted-ca-file alone is enough."""
    other = Authority(ca.directory, "other")
    nobody = use(settings(Files("", ""), trusted_ca_file=ca.ca))
    stranger = use(settings(other.issue("stranger"), trusted_ca_file=ca.ca))
    server = use(settings(both, trusted_ca_file=ca.ca))
    client_says, server_says, *_ = connect(nobody, server)
    assert "it showed no certificate" in server_says and ca.ca in server_says
    assert "wants a certificate" in client_says
    client_says, server_says, *_ = connect(stranger, server)
    assert "no CA in --peer-trusted-ca-file" in server_says
    assert "does not know the CA" in client_says and "stranger.pem" in client_says
    open_to_all = use(settings(both))
    assert connect(nobody, open_to_all)[:2] == ("", "")


def test_an_intermediate_ca_can_be_the_trusted_one(ca: Authority, both: Files) -> None:
    middle = ca.intermediate("middle")
    files = middle.issue("leaf", chain=(middle,))
    server = use(settings(both, trusted_ca_file=middle.ca))
    client = use(settings(files, trusted_ca_file=ca.ca))
    assert connect(client, server)[:2] == ("", "")


def test_allowed_names(ca: Authority, both: Files) -> None:
    client = use(settings(ca.issue("alice", hosts=("a.example",)), trusted_ca_file=ca.ca))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"allowed_names": ("bob", "alice")}, ""),
        ({"allowed_names": ("bob",)}, "its certificate is of alice, and --peer-cert-allowed-cn"),
        ({"allowed_hosts": ("b.example", "a.example")}, ""),
        ({"allowed_hosts": ("b.example",)}, "is for a.example, and --peer-cert-allowed-hostname"),
    ]
    for changes, expected in cases:
        server = use(settings(both, trusted_ca_file=ca.ca, **changes))
        says = connect(client, server)[1]
        assert says.startswith(expected) if not expected else expected in says, says


def test_the_certificate_of_a_client_is_no_members(ca: Authority, both: Files) -> None:
    """Members and clients may have one CA."""
    client = use(settings(ca.issue("eve", usages=("client",)), trusted_ca_file=ca.ca))
    server = use(settings(both, trusted_ca_file=ca.ca))
    assert "its certificate is for clients only" in connect(client, server)[1]
    # Unless members have such certificates for dialing.
    dialing = {"client_cert_file": both.cert, "client_key_file": both.key}
    assert not connect(client, use(settings(both, trusted_ca_file=ca.ca, **dialing)))[1]
    without = use(settings(ca.issue("plain", usages=()), trusted_ca_file=ca.ca))
    assert not connect(without, server)[1]


def test_allowed_names_hold_for_the_side_that_is_dialled_too(ca: Authority, both: Files) -> None:
    client = use(settings(both, trusted_ca_file=ca.ca, allowed_names=("alice",)))
    assert "is of both" in connect(client, use(settings(both)))[0]


@pytest.mark.parametrize("is_pem", [True, False])
def test_a_revoked_certificate_is_refused(ca: Authority, both: Files, is_pem: bool) -> None:
    authority = Authority(ca.directory, f"crl-{is_pem}")
    good, bad = authority.issue("good"), authority.issue("bad")
    crl = authority.revoke(bad, is_pem=is_pem)
    server = use(settings(both, trusted_ca_file=authority.ca, crl_file=crl))
    assert not connect(use(settings(good, trusted_ca_file=ca.ca)), server)[1]
    says = connect(use(settings(bad, trusted_ca_file=ca.ca)), server)[1]
    assert re.search(r"serial number \w+\) is revoked by --peer-crl-file .*/crl", says)


def test_a_revoked_intermediate_certificate_is_refused(ca: Authority, both: Files) -> None:
    middle = ca.intermediate("revoked-middle")
    files = middle.issue("below", chain=(middle,))
    crl = ca.revoke(Files(middle.ca, ""))
    server = use(settings(both, trusted_ca_file=ca.ca, crl_file=crl))
    assert "is revoked" in connect(use(settings(files, trusted_ca_file=ca.ca)), server)[1]


def test_a_list_that_is_out_of_date_counts(ca: Authority, both: Files, warnings: list[str]) -> None:
    authority = Authority(ca.directory, "old")
    bad = authority.issue("old-bad")
    authority.revoke(bad)
    crl = authority.write_list("old.crl", days=-1)
    server = use(settings(both, trusted_ca_file=authority.ca, crl_file=crl))
    assert warnings == [f"the revocation list is out of date; it is used {crl}"]
    assert "is revoked" in connect(use(settings(bad, trusted_ca_file=ca.ca)), server)[1]


def test_a_member_comes_from_an_address_of_its_certificate(
    ca: Authority, both: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"a.example": {"10.0.0.7"}, "10.0.0.8": {"x.b.example"}, "10.0.0.9": {"c.example"}}
    asked: list[str] = []

    def look_up(host: str) -> frozenset[str]:
        asked.append(host)
        return frozenset(names.get(host, ()))

    monkeypatch.setattr(credentials, "_look_up", look_up)
    server = use(settings(both, trusted_ca_file=ca.ca, checks_addresses=True))
    cases: list[tuple[tuple[str, ...], str, bool]] = [
        (("10.0.0.1",), "10.0.0.1", True),
        (("10.0.0.1",), "10.0.0.2", False),
        (("fd00::1",), "fd00::1", True),
        (("a.example",), "10.0.0.7", True),
        (("a.example",), "10.0.0.8", False),
        (("a.example", "10.0.0.2"), "10.0.0.2", True),
        (("*.b.example",), "10.0.0.8", True),
        (("*.b.example",), "10.0.0.7", False),
        (("c.example",), "10.0.0.9", True),
        ((), "10.0.0.9", True),
    ]
    for number, (hosts, address, is_accepted) in enumerate(cases):
        files = ca.issue(f"at-{number}", hosts=hosts)
        client = use(settings(files, trusted_ca_file=ca.ca))
        says = connect(client, server, address=address)[1]
        assert bool(says) != is_accepted, (hosts, address, says)
        if says:
            assert f"it connects from {address}" in says
            assert "peer-skip-client-san-verification" in says
    count = len(asked)
    connect(use(settings(ca.issue("again", hosts=("a.example",)), trusted_ca_file=ca.ca)),
            server, address="10.0.0.7")  # fmt: skip
    assert len(asked) == count, "names are resolved once a minute"


def test_a_name_of_a_certificate_that_no_name_server_knows_is_asked_for_again_soon(
    ca: Authority, both: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, frozenset[str] | None] = {"a.example": None}
    now = 100.0
    monkeypatch.setattr(credentials, "_look_up", lambda host: names.get(host, frozenset()))
    config = settings(both, trusted_ca_file=ca.ca, checks_addresses=True)
    server = use(config, lambda: now)
    client = use(settings(ca.issue("moves", hosts=("a.example",)), trusted_ca_file=ca.ca))

    def refusal(address: str) -> str:
        return connect(client, server, address=address)[1]

    assert "it connects from 10.0.0.7" in refusal("10.0.0.7")
    now += 2
    names["a.example"] = frozenset({"10.0.0.7"})
    assert not refusal("10.0.0.7")
    for _ in range(2):
        now += 100
        names["a.example"] = None
        assert not refusal("10.0.0.7"), "no name server tells otherwise"
    now += 2
    names["a.example"] = frozenset()
    assert "it connects from 10.0.0.7" in refusal("10.0.0.7")


def test_self_signed_certificates_encrypt_and_verify_nobody(ca: Authority, both: Files) -> None:
    other = Authority(ca.directory, "self")
    one = use(settings(both, is_self_signed=True))
    two = use(settings(other.issue("two", hosts=()), is_self_signed=True))
    assert connect(one, two)[:2] == ("", "")


def test_versions_and_suites(ca: Authority, both: Files) -> None:
    client = use(settings(both, trusted_ca_file=ca.ca, max_version="TLS1.2"))
    *_, channel = connect(client, use(settings(both)))
    assert channel.description.startswith("TLSv1.2, ECDHE-ECDSA-")
    suite = "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"
    *_, channel = connect(client, use(settings(both, suites=(suite,))))
    assert channel.description.startswith("TLSv1.2, ECDHE-ECDSA-CHACHA20-POLY1305")
    says = connect(client, use(settings(both, min_version="TLS1.3")))[1]
    assert "tls-min-version" in says
    rsa_only = use(settings(both, suites=("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",)))
    assert "no cipher in common" in connect(client, rsa_only)[1]


def test_no_session_is_resumed(ca: Authority, both: Files) -> None:
    """Otherwise a client could go on past a new revocation list."""
    server = use(settings(both, trusted_ca_file=ca.ca))
    for version in ("TLS1.2", "TLS1.3"):
        client = use(settings(both, trusted_ca_file=ca.ca, max_version=version))
        *_, near, far = connect(client, server)
        near.receive(far.seal(b"x"))
        context = near._ssl.context  # type: ignore[union-attr]
        session = near._ssl.session  # type: ignore[union-attr]
        assert context is not None and (session is None or not session.has_ticket)


def test_sessions_that_are_remembered_are_bounded(
    ca: Authority, both: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "MAX_SESSIONS", 10)
    server = use(settings(both))
    client = use(settings(both, trusted_ca_file=ca.ca, max_version="TLS1.2"))
    for _ in range(30):
        *_, far = connect(client, server)
        assert far._ssl.context.session_stats()["number"] <= 11  # type: ignore[union-attr]


# What is wrong with files.


def refused(made: Settings) -> str:
    with pytest.raises(CredentialsError) as raised:
        use(made)
    return str(raised.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, ca: Authority, both: Files) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_bytes(os.urandom(3000))
    folder = tmp_path / "folder"
    folder.mkdir()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    huge = tmp_path / "huge.pem"
    huge.write_bytes(b"x" * (2 << 20))
    for flag in ("cert_file", "key_file", "trusted_ca_file"):
        shown = "--peer-" + flag.replace("_", "-")
        for path, why in (
            (tmp_path / "missing", "cannot be read: No such file or directory. Correct the path"),
            (folder, "not a regular file"),
            (pipe, "not a regular file"),
            (junk, "in PEM format"),
            (huge, "is larger than 1048576 bytes"),
        ):
            text = refused(settings(both, **{flag: str(path)}))
            assert text.startswith(f"{shown} {path} "), text
            assert why in text, text


def test_a_file_without_permission_is_named(tmp_path: Path, both: Files) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read anything")
    key = tmp_path / "key.pem"
    shutil.copy(both.key, key)
    key.chmod(0)
    assert "Permission denied. Correct" in refused(settings(both, key_file=str(key)))


def test_certificates_and_keys_that_do_not_fit(tmp_path: Path, ca: Authority, both: Files) -> None:
    other = ca.issue("another")
    text = refused(settings(both, key_file=other.key))
    assert f"is not the key of --peer-cert-file {both.cert}" in text
    locked = ca.write_key("locked.pem", make_key("ec"), b"secret words")
    text = refused(settings(both, key_file=locked))
    assert "has a passphrase" in text and "openssl pkey" in text and "secret words" not in text
    assert "no private key" in refused(settings(both, key_file=both.cert))
    assert "no certificate" in refused(settings(both, cert_file=both.key))
    weak = ca.issue("weak", key="1024")
    assert "is too weak" in refused(settings(weak))
    damaged = tmp_path / "damaged.pem"
    lines = Path(both.cert).read_text().splitlines()
    damaged.write_text("\n".join((lines[0], "AAAA" + lines[1][4:], *lines[2:])))
    for flag in ("cert_file", "trusted_ca_file"):
        assert "damaged certificate" in refused(settings(both, **{flag: str(damaged)}))
    assert "cannot be used" in refused(settings(both, key_file=_with_junk(tmp_path, both.key)))
    assert "no revocation list" in refused(settings(both, crl_file=both.key))
    der = tmp_path / "der"
    der.write_bytes(os.urandom(100))
    assert "not a revocation list in PEM or DER" in refused(settings(both, crl_file=str(der)))
    assert "no revocation list" in refused(settings(both, crl_file=both.cert))


def _with_junk(tmp_path: Path, path: str) -> str:
    lines = Path(path).read_text().splitlines()
    damaged = tmp_path / "damaged-key.pem"
    damaged.write_text("\n".join((lines[0], "AAAA" + lines[1][4:], *lines[2:])))
    return str(damaged)


# What changes.


def test_new_files_are_used_for_new_connections(
    ca: Authority, tmp_path: Path, clock: Clock
) -> None:
    authority = pki(tmp_path)
    files = authority.issue("renewed")
    server = use(settings(files), clock)
    client = use(settings(Files("", ""), trusted_ca_file=authority.ca))
    *_, old, _ = connect(client, server)
    first = old.certificate()
    before = server.expiries[files.cert]
    assert authority.issue("renewed", days=(-1, 700)) == files
    *_, near, _ = connect(client, server)
    assert near.certificate() == first, "it looks once a second"
    clock.now += RELOAD_S
    *_, near, _ = connect(client, server)
    assert near.certificate() != first
    assert server.expiries[files.cert] > before + 300 * 86400
    assert old.is_established and old.seal(b"the old connection goes on")


def test_a_new_list_and_new_cas_count_at_once(tmp_path: Path, both: Files, clock: Clock) -> None:
    authority = pki(tmp_path)
    files = authority.issue("soon-revoked")
    other = authority.issue("other")
    crl = authority.revoke(other)
    server = use(
        settings(both, trusted_ca_file=authority.ca, crl_file=crl, client_cert_auth=True), clock
    )
    client = use(settings(files, is_self_signed=True))
    assert connect(client, server)[:2] == ("", "")
    authority.revoke(files)
    server.look()
    assert "is revoked" in connect(client, server)[1]


def test_files_that_do_not_fit_are_refused_with_one_warning(
    tmp_path: Path, clock: Clock, warnings: list[str]
) -> None:
    authority = pki(tmp_path)
    files = authority.issue("member")
    server = use(settings(files), clock)
    client = use(settings(Files("", ""), trusted_ca_file=authority.ca))
    Path(files.key).write_text("junk")
    for _ in range(5):
        clock.now += RELOAD_S
        assert connect(client, server)[:2] == ("", "")
    assert len(warnings) == 1
    assert warnings[0].startswith("new TLS files are refused; the old ones stay in use")
    assert files.key in warnings[0]
    os.unlink(files.cert)
    for _ in range(5):
        clock.now += RELOAD_S
        assert connect(client, server)[:2] == ("", "")
    assert len(warnings) == 2 and files.cert in warnings[1]
    assert authority.issue("member", days=(-1, 800)) == files
    clock.now += RELOAD_S
    assert connect(client, server)[:2] == ("", "")
    assert server.expiries[files.cert] > 0
    assert len(warnings) == 2


def test_two_files_that_are_replaced_one_after_the_other_cause_no_warning(
    tmp_path: Path, clock: Clock, warnings: list[str]
) -> None:
    authority = pki(tmp_path)
    files = authority.issue("member")
    server = use(settings(files), clock)
    new = authority.issue("new")
    shutil.copy(new.cert, files.cert)
    server.look()
    shutil.copy(new.key, files.key)
    server.look()
    assert not warnings
    client = use(settings(Files("", ""), trusted_ca_file=authority.ca))
    *_, near, _ = connect(client, server)
    assert near.certificate() in Path(new.cert).read_bytes() or near.is_established
