"""A certificate authority for tests: certificates of every kind, good and bad, made when asked for.

It needs the package `cryptography`; `pki(directory)` skips the test where that is missing.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Files(NamedTuple):
    """The paths of a certificate and its key."""

    cert: str
    key: str


def pki(directory: Path, name: str = "ca") -> Authority:
    """A new CA that keeps its files in `directory`."""
    pytest.importorskip("cryptography", reason="needs the Python package cryptography")
    directory.mkdir(parents=True, exist_ok=True)
    return Authority(directory, name)


class Authority:
    """A CA. `ca` is the path of its certificate."""

    def __init__(self, directory: Path, name: str, parent: Authority | None = None) -> None:
        self.directory = directory
        self.name = name
        self.key = make_key("ec")
        self._revoked: list[int] = []
        self.certificate = self._sign(
            self.key.public_key(), f"Test {name}", parent or self, is_ca=True
        )
        self.ca = self._write(f"{name}.pem", pem_of(self.certificate))

    def intermediate(self, name: str) -> Authority:
        return Authority(self.directory, name, self)

    def issue(
        self,
        name: str,
        *,
        cn: str | None = None,
        hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1"),
        usages: tuple[str, ...] = ("server", "client"),
        key: str = "ec",
        days: tuple[float, float] = (-1, 365),
        chain: tuple[Authority, ...] = (),
    ) -> Files:
        """A certificate and its key, in the files NAME.pem and NAME-key.pem. `days`: the beginning
        and the end of its validity, from now. `chain` is appended to the file."""
        made = make_key(key)
        certificate = self._sign(
            made.public_key(), name if cn is None else cn, self, hosts=hosts, usages=usages,
            days=days,
        )  # fmt: skip
        pem = pem_of(certificate) + b"".join(pem_of(one.certificate) for one in chain)
        return Files(self._write(f"{name}.pem", pem), self.write_key(f"{name}-key.pem", made))

    def write_key(self, file: str, key: Any, password: bytes = b"") -> str:
        from cryptography.hazmat.primitives import serialization as form

        cipher: Any = form.BestAvailableEncryption(password) if password else form.NoEncryption()
        pem = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, cipher)
        path = self._write(file, pem)
        os.chmod(path, 0o600)
        return path

    def revoke(self, files: Files, file: str = "crl", is_pem: bool = True) -> str:
        """Add a certificate to the revocation list, and write that."""
        from cryptography import x509

        certificate = x509.load_pem_x509_certificate(Path(files.cert).read_bytes())
        self._revoked.append(certificate.serial_number)
        return self.write_list(file, is_pem)

    def write_list(self, file: str = "crl", is_pem: bool = True, days: float = 30) -> str:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization

        now = datetime.datetime.now(datetime.timezone.utc)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - datetime.timedelta(days=60))
            .next_update(now + datetime.timedelta(days=days))
        )
        for serial in self._revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
            builder = builder.add_revoked_certificate(entry.build())
        made = builder.sign(self.key, hashes.SHA256())
        encoding = serialization.Encoding.PEM if is_pem else serialization.Encoding.DER
        return self._write(file, made.public_bytes(encoding))

    def _sign(
        self,
        public_key: Any,
        cn: str,
        issuer: Authority,
        *,
        hosts: tuple[str, ...] = (),
        usages: tuple[str, ...] = (),
        days: tuple[float, float] = (-1, 365),
        is_ca: bool = False,
    ) -> Any:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

        def name(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])

        now = datetime.datetime.now(datetime.timezone.utc)
        subject = name(cn)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if issuer is self and is_ca else issuer.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=days[0]))
            .not_valid_after(now + datetime.timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            # From Python 3.13 on, clients verify strictly (VERIFY_X509_STRICT) and want these.
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()),
                critical=False,
            )
        )
        if is_ca:
            usage = x509.KeyUsage(
                digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
                key_encipherment=False, data_encipherment=False, key_agreement=False,
                encipher_only=False, decipher_only=False,
            )  # fmt: skip
            builder = builder.add_extension(usage, critical=True)
        if hosts:
            names = [_general_name(host) for host in hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        purposes = {"server": ExtendedKeyUsageOID.SERVER_AUTH,
                    "client": ExtendedKeyUsageOID.CLIENT_AUTH}  # fmt: skip
        if usages:
            purpose = x509.ExtendedKeyUsage([purposes[one] for one in usages])
            builder = builder.add_extension(purpose, critical=False)
        return builder.sign(issuer.key, hashes.SHA256())

    def _write(self, file: str, data: bytes) -> str:
        """Replace a file in one step, as an operator should."""
        path = self.directory / file
        beside = self.directory / f".{file}.new"
        beside.write_bytes(data)
        os.replace(beside, path)
        return str(path)


def _general_name(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def make_key(kind: str) -> Any:
    """A private key: ec (P-256) or a number of bits for RSA."""
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    if kind == "ec":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(public_exponent=65537, key_size=int(kind))


def pem_of(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM)
