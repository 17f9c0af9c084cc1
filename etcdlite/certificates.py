"""Makes X.509 certificates, through the Python package `cryptography` or the command `openssl`,
whichever is there. Both get the same `Profile` and make the same certificate.

A certificate has version 3, an ECDSA key on P-256, a random serial number of 159 bits and a
signature with SHA-256. It follows the rules that Go checks, and so etcd and etcdctl: the names of a
server are in subjectAltName, and extendedKeyUsage fits the use. Members are servers and clients of
each other, so theirs has both uses. Keys are in PKCS #8. All is PEM.

Nothing here writes a file that stays. The imports are made when a certificate is: few processes
make one.
"""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from etcdlite.errors import Explained
from etcdlite.urls import is_address

USES: dict[str, tuple[str, ...]] = {
    "ca": (),
    "server": ("serverAuth",),
    "peer": ("serverAuth", "clientAuth"),
    "client": ("clientAuth",),
}
"""The extended key usage by the kind of a certificate. For a CA there is none: it signs all."""

SERIAL_BITS = 159
"""A serial number has at most 20 bytes, and is positive (RFC 5280, 4.1.2.2)."""

OPENSSL_TIMEOUT_S = 30.0

MAX_NAME_CHARS = 64
"""Of a common name (RFC 5280, ub-common-name)."""

_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.@ -]{{0,{MAX_NAME_CHARS - 1}}}\Z")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*\.?\Z")


class CertificateError(Explained):
    """A certificate cannot be made. The text says why and what to do."""


class Profile(NamedTuple):
    kind: str
    """A key of `USES`."""
    name: str
    """The common name."""
    hosts: tuple[str, ...]
    """DNS names and IP addresses."""
    begins_s: int
    """Unix time; `ends_s`, too."""
    ends_s: int


class Pair(NamedTuple):
    """A certificate and its key, as PEM; or the paths of their files."""

    certificate: str
    key: str


def check(profile: Profile) -> None:
    """Raises CertificateError unless the names are safe in every notation that they appear in."""
    if not _NAME.match(profile.name):
        raise CertificateError(
            f"bad name {profile.name!r}: write up to {MAX_NAME_CHARS} letters, digits and any of "
            "_ . @ -"
        )
    for host in profile.hosts:
        if not is_address(host) and not (_HOST.match(host) and len(host) <= 253):
            raise CertificateError(
                f"bad host {host!r}: write a host name or an IP address, without scheme and port"
            )


def make(profile: Profile, authority: Pair | None = None) -> Pair:
    """A new key and its certificate, signed by the CA with these files, or by itself. Blocks for up
    to some hundred milliseconds. Raises CertificateError."""
    check(profile)
    return maker()(profile, authority)


def maker() -> Callable[[Profile, Pair | None], Pair]:
    """The function that makes certificates on this machine. Raises CertificateError."""
    try:
        import cryptography.x509  # noqa: F401

        return with_cryptography
    except ImportError:
        import shutil

    if shutil.which("openssl"):
        return with_openssl
    raise CertificateError(
        "making a certificate needs the Python package cryptography or the command openssl. "
        "Install one, on Debian with 'apt install python3-cryptography' or 'apt install openssl'"
    )


def with_cryptography(profile: Profile, authority: Pair | None) -> Pair:
    """`make` through the Python package."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, profile.name)])
    issuer, signer = (subject, key) if authority is None else _load(authority)
    is_ca = profile.kind == "ca"
    used = ("key_cert_sign", "crl_sign") if is_ca else ("digital_signature",)
    usage = {name: name in used for name in _KEY_USAGES}
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(_serial())
        .not_valid_before(datetime.datetime.fromtimestamp(profile.begins_s, datetime.timezone.utc))
        .not_valid_after(datetime.datetime.fromtimestamp(profile.ends_s, datetime.timezone.utc))
        .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    uses = {
        "serverAuth": ExtendedKeyUsageOID.SERVER_AUTH,
        "clientAuth": ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    if USES[profile.kind]:
        extended = x509.ExtendedKeyUsage([uses[use] for use in USES[profile.kind]])
        builder = builder.add_extension(extended, critical=False)
    if profile.hosts:
        names: list[Any] = [
            x509.IPAddress(ipaddress.ip_address(host)) if is_address(host) else x509.DNSName(host)
            for host in profile.hosts
        ]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    made = builder.sign(signer, hashes.SHA256())
    return Pair(
        made.public_bytes(serialization.Encoding.PEM).decode("ascii"),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode("ascii"),
    )


_KEY_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def _load(authority: Pair) -> tuple[Any, Any]:
    """The name and the key of a CA."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        issuer = x509.load_pem_x509_certificate(Path(authority.certificate).read_bytes()).subject
        return issuer, load_pem_private_key(Path(authority.key).read_bytes(), None)
    except (ValueError, TypeError) as failure:
        raise CertificateError(f"the CA cannot be used: {failure}") from failure


_OPENSSL_CONFIG = """
[req]
distinguished_name = subject
prompt = no
[subject]
CN = {name}
[ca]
default_ca = this
[this]
database = {folder}/index.txt
serial = {folder}/serial
new_certs_dir = {folder}
default_md = sha256
unique_subject = no
policy = any
x509_extensions = extensions
[any]
commonName = supplied
[extensions]
basicConstraints = critical, CA:{is_ca}
keyUsage = critical, {usage}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
"""


def with_openssl(profile: Profile, authority: Pair | None) -> Pair:
    """`make` through the command, in a temporary directory. `openssl ca` is the subcommand that
    takes both ends of the validity, in every version."""
    import tempfile

    is_ca = profile.kind == "ca"
    # The directory has mode 0700.
    with tempfile.TemporaryDirectory(prefix="etcdlite-cert-") as folder:
        config = _OPENSSL_CONFIG.format(
            name=profile.name,
            folder=folder,
            is_ca="TRUE" if is_ca else "FALSE",
            usage="keyCertSign, cRLSign" if is_ca else "digitalSignature",
        )
        if USES[profile.kind]:
            config += f"extendedKeyUsage = {', '.join(USES[profile.kind])}\n"
        if profile.hosts:
            names = [("IP:" if is_address(host) else "DNS:") + host for host in profile.hosts]
            config += f"subjectAltName = {', '.join(names)}\n"
        paths = {name: f"{folder}/{name}" for name in ("config", "key", "request", "made")}
        Path(folder, "config").write_text(config, "ascii")
        Path(folder, "index.txt").touch()
        Path(folder, "serial").write_text(f"{_serial():040x}\n", "ascii")
        _openssl(
            *("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-pkeyopt", "ec_param_enc:named_curve", "-out", paths["key"]),
        )
        _openssl(
            *("req", "-new", "-sha256", "-config", paths["config"], "-key", paths["key"]),
            *("-out", paths["request"]),
        )
        if authority is None:
            signer = ["-selfsign", "-keyfile", paths["key"]]
        else:
            signer = ["-cert", authority.certificate, "-keyfile", authority.key]
        _openssl(
            *("ca", "-batch", "-notext", "-config", paths["config"], "-in", paths["request"]),
            *("-out", paths["made"], "-startdate", _moment(profile.begins_s)),
            *("-enddate", _moment(profile.ends_s), *signer),
        )
        return Pair(*(Path(paths[name]).read_text("ascii") for name in ("made", "key")))


def _openssl(*words: str) -> None:
    import subprocess

    # A configuration of the system must not add to what is written here.
    environment = {**os.environ, "OPENSSL_CONF": os.devnull, "RANDFILE": os.devnull}
    try:
        subprocess.run(
            ["openssl", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=OPENSSL_TIMEOUT_S,
            env=environment,
        )
    except subprocess.CalledProcessError as failure:
        lines = failure.stderr.decode("utf-8", "replace").split("\n")
        text = next((line for line in lines if "rror" in line or "nable" in line), lines[0])
        raise CertificateError(f"openssl {words[0]} failed: {text.strip()}") from failure
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise CertificateError(f"openssl {words[0]} failed: {failure}") from failure


def _serial() -> int:
    import secrets

    return secrets.randbits(SERIAL_BITS) | 1


def _moment(at_s: int) -> str:
    """Unix time as GeneralizedTime."""
    return time.strftime("%Y%m%d%H%M%SZ", time.gmtime(at_s))
