"""Makes X.509 certificates, with the command `openssl`.

A certificate has version 3, an ECDSA key on P-256, a random serial number of 159 bits and a
signature with SHA-256. It follows the rules that Go checks, and so etcd and etcdctl: the names of a
server are in subjectAltName, and extendedKeyUsage fits the use. Members are servers and clients of
each other, so theirs has both uses. Keys are in PKCS #8. All is PEM.

Nothing here writes a file that stays. Some imports are made when a certificate is: few processes
make one.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import NamedTuple

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


def make(profile: Profile, authority: Pair | None = None) -> Pair:
    """A new key and its certificate, signed by the CA with these files, or by itself. Blocks for up
    to some hundred milliseconds. Raises CertificateError."""
    import tempfile

    check(profile)
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
        # The subcommand that takes both ends of the validity, in every version.
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
    except FileNotFoundError:
        raise CertificateError(
            "making a certificate needs the command openssl; on Debian: apt install openssl"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise CertificateError(f"openssl {words[0]} failed: {failure}") from failure


def _serial() -> int:
    import secrets

    return secrets.randbits(SERIAL_BITS) | 1


def _moment(at_s: int) -> str:
    """Unix time as GeneralizedTime."""
    return time.strftime("%Y%m%d%H%M%SZ", time.gmtime(at_s))
