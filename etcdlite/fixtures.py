"""The certificates of auto-tls and peer-auto-tls: made at the start, by the member for itself.

    <data-dir>/fixtures/client/cert.pem, key.pem    for clients
    <data-dir>/fixtures/peer/cert.pem, key.pem      for members

These are etcd's places. A certificate is its own CA, valid for the hosts of the listen URLs, and
used again at the next start. etcd goes on with one that has expired; here it is replaced, because
nobody could use it.

A machine without a battery for its clock may start with a wrong time. So a certificate is valid
from a time that has passed for certain, even if the clock is ahead when it is made. One that has
ended once the clock is set is replaced while the server runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from etcdlite import certificates, log, x509
from etcdlite.certificates import Pair
from etcdlite.client.partial_file import PartialFile
from etcdlite.errors import MayPass
from etcdlite.urls import host_port
from etcdlite.wall_clock import unix_s

DAY_S = 86400
YEAR_S = 365 * DAY_S

BEGINS_S = 1_704_067_200
"""Certificates are valid from this Unix time on: 2024-01-01, before the first etcdlite."""

KINDS = {"client": "server", "peer": "peer"}
"""Directory name -> the kind of certificate in it, as `certificates` names it."""


def ensure(data_dir: str, name: str, urls: Iterable[str], years: int) -> tuple[str, str]:
    """The paths of a certificate and its key in the directory `name`; made if they are missing or
    have expired. Blocks. Raises MayPass."""
    directory = f"{data_dir}/fixtures/{name}"
    cert, key = f"{directory}/cert.pem", f"{directory}/key.pem"
    now = unix_s()
    if os.path.exists(key) and (x509.ends_s(cert) or 0.0) > now:
        return cert, key
    hosts = tuple(dict.fromkeys(host_port(url)[0] for url in urls))
    begins = min(now, BEGINS_S)
    profile = certificates.Profile(
        KINDS[name], "etcdlite", hosts, int(begins), int(now) + years * YEAR_S
    )
    try:
        write(Pair(cert, key), certificates.make(profile))
    except (certificates.CertificateError, OSError) as failure:
        flag = "auto-tls" if name == "client" else "peer-auto-tls"
        raise MayPass(f"--{flag}: cannot make a certificate: {failure}") from failure
    fields = {"file": cert, "hosts": ", ".join(hosts), "valid_days": years * 365}
    log.warn("made a certificate that is its own CA", **fields)
    return cert, key


def write(paths: Pair, made: Pair) -> None:
    """Write a certificate and its key, each in one step, and make their directory if it does not
    exist. Raises OSError."""
    os.makedirs(os.path.dirname(paths.key), 0o700, exist_ok=True)
    # The key first: without it, a certificate is of no use.
    for path, content, mode in (
        (paths.key, made.key, 0o600),
        (paths.certificate, made.certificate, 0o644),
    ):
        with PartialFile(path) as file:
            os.fchmod(file.fileno(), mode)
            file.write(content.encode("ascii"))
