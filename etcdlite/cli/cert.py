"""`cert init|server|peer|client`: a small CA and certificates for labs (`certificates.py`).

All files are in one directory (`--dir`, made with mode 0700), keys with mode 0600:

    ca.crt, ca.key                      the CA
    NAME-server.crt, NAME-server.key    a member's certificate for its clients
    NAME-peer.crt, NAME-peer.key        a member's certificate for the other members
    NAME-client.crt, NAME-client.key    a client's certificate; the common name is its user

A certificate is valid from an hour before it is made, because clocks differ, and no longer than its
CA. A file that exists is replaced only with `--force`.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
import socket
import ssl
import time

from etcdlite import certificates, fixtures
from etcdlite.certificates import CertificateError, Pair, Profile
from etcdlite.cli.failures import BadArguments, Failure
from etcdlite.cli.session import Session
from etcdlite.urls import is_address

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names that every certificate of a server has."""

BEGINS_EARLIER_S = 3600
MAX_DAYS = 36_500
CA_DAYS = 3650
DAY_S = 86_400

_OWNERS = {"server": "member", "peer": "member", "client": "user"}


# The commands.


def init(session: Session) -> None:
    """Make the CA."""
    given = session.optional("cert init takes at most 1 argument: the name of the CA")
    name = "etcdlite CA" if given is None else given
    files = authority_in(session.flags["dir"])
    ends_s = _make(session, files, "ca", name, (), None)
    session.print(
        f"The CA is in {files.certificate}, its key in {files.key}; valid until {_day(ends_s)}.",
        "Whoever has the key can make certificates for anyone: keep it off the members.",
        "Next: cert server NAME and cert peer NAME for each member, cert client NAME for each user",
    )


def server(session: Session) -> None:
    """Make a member's certificate for its clients."""
    files, authority = _issue(session, "server")
    session.print(
        *_settings({"cert-file": files.certificate, "key-file": files.key}),
        "To admit only clients with a certificate of the same CA, add:",
        *_settings({"trusted-ca-file": authority, "client-cert-auth": "true"}),
        "Write https:// in listen-client-urls and advertise-client-urls.",
    )


def peer(session: Session) -> None:
    """Make a member's certificate for the other members."""
    files, authority = _issue(session, "peer")
    settings = {
        "peer-cert-file": files.certificate,
        "peer-key-file": files.key,
        "peer-trusted-ca-file": authority,
        "peer-client-cert-auth": "true",
    }
    session.print(
        *_settings(settings),
        "Certificates of clients that this CA signs are accepted from members, too. So make them "
        "with another CA (cert init --dir), or list the names of all members as "
        "peer-cert-allowed-cn.",
        "Write https:// in listen-peer-urls, initial-advertise-peer-urls and initial-cluster.",
    )


def client(session: Session) -> None:
    """Make a client's certificate."""
    files, authority = _issue(session, "client")
    paths = {"cacert": authority, "cert": files.certificate, "key": files.key}
    flags = (f"--{name}={shlex.quote(path)}" for name, path in paths.items())
    variables = (f"ETCDCTL_{name.upper()}={shlex.quote(path)}" for name, path in paths.items())
    session.print(
        "Flags of etcdlite-ctl and etcdctl:",
        f"  {' '.join(flags)}",
        "In the environment:",
        f"  export {' '.join(variables)}",
        "In Python:",
        f'  Client("https://...", {", ".join(f"{n}={path!r}" for n, path in paths.items())})',
    )


def _settings(settings: dict[str, str]) -> list[str]:
    """Settings of the server, as the lines of its file and as flags."""
    lines, flags = [], []
    for name, value in settings.items():
        is_path = value != "true"
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'  {name} = "{escaped}"' if is_path else f"  {name} = true")
        flags.append(f"--{name}={shlex.quote(value)}" if is_path else f"--{name}")
    return ["In the configuration file:", *lines, "As flags:", f"  {' '.join(flags)}"]


def _issue(session: Session, kind: str) -> tuple[Pair, str]:
    """Make a certificate and report it. Returns the paths: its own, and the CA's."""
    (name,) = session.need(1, f"cert {kind} needs 1 argument: the name of the {_OWNERS[kind]}")
    if name.startswith(".") or " " in name or "/" in name:
        raise BadArguments(f"bad name {name!r}: it is part of file names")
    folder = session.flags["dir"]
    authority = authority_in(folder)
    files = Pair(f"{folder}/{name}-{kind}.crt", f"{folder}/{name}-{kind}.key")
    hosts = hosts_of(session.flags["host"], kind)
    ends_s = _make(session, files, kind, name, hosts, authority)
    whom = f" for {', '.join(hosts)}" if hosts else ""
    session.print(
        f"The {kind} certificate of {name}{whom} is in {files.certificate}, its key in "
        f"{files.key}; valid until {_day(ends_s)}."
    )
    return Pair(*map(os.path.abspath, files)), os.path.abspath(authority.certificate)


def authority_in(folder: str) -> Pair:
    """The paths of the CA in a directory."""
    return Pair(f"{folder}/ca.crt", f"{folder}/ca.key")


def hosts_of(given: tuple[str, ...], kind: str) -> tuple[str, ...]:
    hosts = [host.strip("[]") for host in given]
    if kind != "client":
        hosts = [*(hosts or [socket.gethostname()]), *LOOPBACK]
    plain = (str(ipaddress.ip_address(h)) if is_address(h) else h for h in hosts)
    return tuple(dict.fromkeys(plain))


# The files.


def _make(
    session: Session,
    files: Pair,
    kind: str,
    name: str,
    hosts: tuple[str, ...],
    authority: Pair | None,
) -> int:
    """Make a certificate and write it and its key. Returns when it ends (Unix time)."""
    days = session.flags["days"]
    if days is None:
        days = CA_DAYS if kind == "ca" else 365
    profile = profile_of(kind, name, hosts, days, authority)
    for path in files:
        if os.path.lexists(path) and not session.flags["force"]:
            raise Failure(f"{path} exists; --force replaces it" + _COST.get(kind, ""))
    fixtures.write(files, certificates.make(profile, authority))
    return profile.ends_s


def profile_of(
    kind: str, name: str, hosts: tuple[str, ...], days: int, authority: Pair | None
) -> Profile:
    """What a certificate of `authority` (paths) says. Raises BadArguments, or Failure if the CA
    cannot sign."""
    if not 0 < days <= MAX_DAYS:
        raise BadArguments(f"--days must be between 1 and {MAX_DAYS}")
    now_s = int(time.time())
    ends_s = now_s + days * DAY_S
    if authority is not None:
        ends_s = min(ends_s, _authority_end_s(authority, now_s))
    profile = Profile(kind, name, hosts, now_s - BEGINS_EARLIER_S, ends_s)
    try:
        certificates.check(profile)
    except CertificateError as error:
        raise BadArguments(str(error)) from None
    return profile


_COST = {"ca": ", and the certificates of the old CA stop working"}


def _authority_end_s(authority: Pair, now_s: int) -> int:
    """When the CA ends (Unix time), if it can sign. Raises Failure."""
    for path in authority:
        if not os.path.isfile(path):
            text = f"there is no CA: no file {path}; make one with cert init, or name the directory"
            raise Failure(f"{text} with --dir")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(authority.certificate)
        context.load_cert_chain(*authority, password="")
    except ssl.SSLError as error:
        text = f"{authority.certificate} and {authority.key} are not a certificate and its key"
        raise Failure(f"{text}: {error.reason or error}") from None
    found = context.get_ca_certs()
    if not found:
        text = f"{authority.certificate} is no certificate of a CA"
        raise Failure(f"{text}; make one with cert init")
    ends_s = int(ssl.cert_time_to_seconds(str(found[0]["notAfter"])))
    if ends_s <= now_s:
        text = f"the CA {authority.certificate} ended on {_day(ends_s)}; make a new one with"
        raise Failure(f"{text} cert init --force, and new certificates with it")
    return ends_s


def _day(at_s: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(at_s))
