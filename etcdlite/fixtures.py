"""The certificates of auto-tls and peer-auto-tls: made at the start, by the member for itself.

    <data-dir>/fixtures/client/cert.pem, key.pem    for clients
    <data-dir>/fixtures/peer/cert.pem, key.pem      for members

These are etcd's places. A certificate is its own CA, valid for the hosts of the listen URLs, and
used again at the next start. etcd goes on with one that has expired; here it is replaced, because
nobody could use it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from etcdlite import certificates, log, x509
from etcdlite.datadir import StartError
from etcdlite.urls import host_port

DAY_S = 86400
YEAR_S = 365 * DAY_S

KINDS = {"client": "server", "peer": "peer"}
"""Directory name -> the kind of certificate in it, as `certificates` names it."""


def ensure(data_dir: str, name: str, urls: Iterable[str], years: int) -> tuple[str, str]:
    """The paths of a certificate and its key in the directory `name`; made if they are missing or
    have expired. Blocks. Raises StartError."""
    directory = f"{data_dir}/fixtures/{name}"
    cert, key = f"{directory}/cert.pem", f"{directory}/key.pem"
    now = time.time()
    if os.path.exists(cert) and os.path.exists(key) and _ends_at(cert) > now:
        return cert, key
    hosts = tuple(dict.fromkeys(host_port(url)[0] for url in urls))
    profile = certificates.Profile(
        KINDS[name], "etcdlite", hosts, int(now), int(now) + years * YEAR_S
    )
    try:
        made = certificates.make(profile)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        _write(key, made.key, 0o600)
        _write(cert, made.certificate, 0o644)
    except (certificates.CertificateError, OSError) as failure:
        flag = "auto-tls" if name == "client" else "peer-auto-tls"
        raise StartError(f"--{flag}: cannot make a certificate: {failure}") from failure
    fields = {"file": cert, "hosts": ", ".join(hosts), "valid_days": years * 365}
    log.warn("made a certificate that is its own CA", **fields)
    return cert, key


def _ends_at(path: str) -> float:
    """When a certificate ends (Unix time); 0 if it is damaged."""
    try:
        with open(path, "rb") as file:
            found = x509.blocks(file.read(1 << 20), "CERTIFICATE")
        return x509.parse_certificate(found[0]).not_after if found else 0.0
    except (OSError, ValueError):
        return 0.0


def _write(path: str, text: str, mode: int) -> None:
    """Write a file in one step: a crash leaves the old one or the new one."""
    beside = f"{path}.new"
    if os.path.lexists(beside):
        os.unlink(beside)
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(fd, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
