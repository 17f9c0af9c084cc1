"""A CA and certificates in a directory, made as `etcdlite-ctl cert` makes them, good and bad."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import pytest

from etcdlite import certificates
from etcdlite.certificates import CertificateError, Pair, Profile

LOOPBACK = ("localhost", "127.0.0.1", "::1")
DAY_S = 86_400


class Authority(NamedTuple):
    """A CA whose files are in `folder`."""

    folder: Path
    files: Pair

    @property
    def certificate(self) -> str:
        return self.files.certificate

    def issue(
        self,
        kind: str,
        name: str,
        hosts: tuple[str, ...] = LOOPBACK,
        begins_s: float = -DAY_S,
        ends_s: float = 365 * DAY_S,
    ) -> Pair:
        """The files of a new certificate and its key. The times are from now."""
        now_s = time.time()
        profile = Profile(kind, name, hosts, int(now_s + begins_s), int(now_s + ends_s))
        return _write(self.folder, f"{name}-{kind}", certificates.make(profile, self.files))


def make_authority(folder: Path, name: str = "test CA") -> Authority:
    """A new CA. Skips the test where no certificate can be made."""
    now_s = int(time.time())
    profile = Profile("ca", name, (), now_s - 2 * DAY_S, now_s + 3650 * DAY_S)
    try:
        made = certificates.make(profile)
    except CertificateError as failure:
        pytest.skip(str(failure))
    folder.mkdir(parents=True, exist_ok=True)
    return Authority(folder, _write(folder, "ca", made))


def _write(folder: Path, name: str, made: Pair) -> Pair:
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    certificate.write_text(made.certificate)
    key.touch(0o600)
    key.write_text(made.key)
    return Pair(str(certificate), str(key))
