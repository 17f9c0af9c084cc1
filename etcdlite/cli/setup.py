"""`setup`: the files of all members of a cluster, one archive for each.

`setup m1=10.0.0.1 m2=10.0.0.2 m3=10.0.0.3` writes `m1.tar`, `m2.tar` and `m3.tar` into a directory
(`--dir`, mode 0700; archives have mode 0600). `tar -C / -xf m1.tar` as root on a machine puts the
files of m1 in place:

    etc/etcdlite.toml            the configuration of the member
    etc/etcdlite/                its certificates and keys, or the two shared secrets
    etc/etcdlite/ctl.toml        the options of etcdlite-ctl on this machine

Private files have mode 0600 and belong to the user etcdlite, so the service and root can read them.
The directory keeps what makes further members: the two CAs (`clients/`, `peers/`), or the secrets.

With certificates, one CA signs those of clients and of the client ports, the other one those of
members. So the certificate of a client is never that of a member. The archive has a certificate for
the user root. With `--secret`, members share one secret and clients another one.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from etcdlite import certificates, fixtures, secret_file
from etcdlite.certificates import CertificateError, Pair, Profile
from etcdlite.cli import cert
from etcdlite.cli.failures import BadArguments, Failure
from etcdlite.cli.session import Session, describe
from etcdlite.client import EtcdliteError
from etcdlite.client.partial_file import PartialFile
from etcdlite.urls import format_address, is_address

CLIENT_PORT = 2379
PEER_PORT = 2380
MAX_MEMBERS = 7

OWNER = "etcdlite"
"""The user of the service, and its group."""

FOLDER = "etc/etcdlite"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")

_SECRETS = ("peer.secret", "client.secret")

_UNFINISHED = ".unfinished"
"""A file in the directory until the first setup has written all archives; else it begins again."""

Files = dict[str, tuple[str, bool]]
"""Path in the archive -> (content, whether it is private)."""


class Plan(NamedTuple):
    """What is the same for all members."""

    folder: str
    scheme: str
    """http with shared secrets, https with certificates."""
    settings: dict[str, object]
    """Those of the first start, by the name of the flag."""


def setup(session: Session) -> None:
    """Write the archives, and say what to do with them."""
    hosts = _members(session.arguments)
    folder, is_join = str(session.flags["dir"]), bool(session.flags["join"])
    has_secret = os.path.exists(f"{folder}/{_SECRETS[0]}")
    is_known = has_secret or os.path.exists(f"{folder}/clients/ca.key")
    if is_join and not is_known:
        raise Failure(
            f"{folder} has no CA and no secrets: name the directory of the first setup with --dir"
        )
    if is_known and not is_join and not os.path.exists(f"{folder}/{_UNFINISHED}"):
        raise Failure(
            f"{folder} has a cluster already: --join adds a member, --dir names another directory"
        )
    is_secret = has_secret if is_join else bool(session.flags["secret"])
    scheme = "http" if is_secret else "https"
    plan = _joined(session, folder, scheme, hosts) if is_join else _new(folder, scheme, hosts)
    if not is_join:
        _make_trust(folder, is_secret)
    for name, host in hosts.items():
        _write_archive(f"{folder}/{name}.tar", _files(session, plan, name, host, is_secret))
    Path(folder, _UNFINISHED).unlink(missing_ok=True)
    session.print(*_next_steps(folder, hosts, is_join))


def _members(arguments: Sequence[str]) -> dict[str, str]:
    """Name -> host of each NAME=HOST."""
    found: dict[str, str] = {}
    for word in arguments:
        name, _, host = word.partition("=")
        host = host.strip("[]")
        if not _NAME.match(name) or not host:
            raise BadArguments(f"bad member {word!r}: write NAME=HOST, as in m1=10.0.0.1")
        try:
            certificates.check(Profile("server", name, (host,), 0, 0))
        except CertificateError as error:
            raise BadArguments(str(error)) from None
        if name in found or host in found.values():
            raise BadArguments(f"{word}: each member has a name and a machine of its own")
        found[name] = host
    if not 1 <= len(found) <= MAX_MEMBERS:
        raise BadArguments(f"setup needs 1 to {MAX_MEMBERS} members, as NAME=HOST")
    return found


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://{format_address(host, port)}"


def _new(folder: str, scheme: str, hosts: Mapping[str, str]) -> Plan:
    members = [f"{name}={_url(scheme, host, PEER_PORT)}" for name, host in hosts.items()]
    # Two clusters on one network never mistake each other's members for their own.
    token = os.urandom(8).hex()
    return Plan(folder, scheme, {"initial-cluster": members, "initial-cluster-token": token})


def _joined(session: Session, folder: str, scheme: str, hosts: Mapping[str, str]) -> Plan:
    """Asks the cluster for its members, of which the new one must be one. Raises Failure."""
    try:
        members = session.ask("Cluster.MemberList", linearizable=True).members
    except EtcdliteError as error:
        why = f"cannot ask the cluster for its members: {describe(error)}"
        raise Failure(f"{why}. Name a member with --endpoints, or run this on one") from None
    names = {_url(scheme, host, PEER_PORT): name for name, host in hosts.items()}
    known = {url: member.name for member in members for url in member.peerURLs}
    for url, name in names.items():
        if url not in known:
            text = f"the cluster has no member at {url}: first run etcdlite-ctl member add {name}"
            raise Failure(f"{text} --peer-urls={url} --learner")
        if known[url]:
            text = f"{url} is the member {known[url]}, which has started already: remove it first"
            raise Failure(text)
    return Plan(
        folder,
        scheme,
        {
            "initial-cluster": [f"{names.get(url, name)}={url}" for url, name in known.items()],
            "initial-cluster-state": "existing",
        },
    )


# What the members trust.


def _make_trust(folder: str, is_secret: bool) -> None:
    """The CAs, or the secrets."""
    os.makedirs(folder, 0o700, exist_ok=True)
    if os.path.exists(unfinished := f"{folder}/{_UNFINISHED}"):
        for name in _SECRETS:
            Path(folder, name).unlink(missing_ok=True)
    Path(unfinished).touch()
    if is_secret:
        for name in _SECRETS:
            secret_file.create(f"{folder}/{name}")
        return
    for kind in ("peers", "clients"):
        profile = cert.profile_of("ca", f"etcdlite {kind}", (), cert.CA_DAYS, None)
        fixtures.write(cert.authority_in(f"{folder}/{kind}"), certificates.make(profile, None))


def _pair(session: Session, ca: str, kind: str, name: str, hosts: tuple[str, ...]) -> Pair:
    authority = cert.authority_in(ca)
    profile = cert.profile_of(kind, name, hosts, session.flags["days"], authority)
    return certificates.make(profile, authority)


# The files of a member.


def _files(session: Session, plan: Plan, name: str, host: str, is_secret: bool) -> Files:
    client_url, peer_url = (_url(plan.scheme, host, port) for port in (CLIENT_PORT, PEER_PORT))
    # A member listens on addresses. If the host is a name, it listens on all of the machine's.
    if is_address(host):
        listen_urls = list(dict.fromkeys((client_url, _url(plan.scheme, "127.0.0.1", CLIENT_PORT))))
        listen_peer_url = peer_url
    else:
        listen_urls = [_url(plan.scheme, "0.0.0.0", CLIENT_PORT)]
        listen_peer_url = _url(plan.scheme, "0.0.0.0", PEER_PORT)
    settings: dict[str, object] = {
        "name": name,
        "listen-client-urls": listen_urls,
        "advertise-client-urls": [client_url],
        "listen-peer-urls": [listen_peer_url],
        "initial-advertise-peer-urls": [peer_url],
        **plan.settings,
    }
    options: dict[str, object] = {"endpoints": [client_url]}
    files: Files = {}

    def put(file: str, content: str, is_private: bool = True) -> str:
        files[f"{FOLDER}/{file}"] = (content, is_private)
        return f"/{FOLDER}/{file}"

    if is_secret:
        for file, flag in zip(_SECRETS, ("peer-secret-file", "client-secret-file"), strict=True):
            settings[flag] = put(file, Path(plan.folder, file).read_text("ascii"))
        options["secret-file"] = settings["client-secret-file"]
    else:
        clients, peers = f"{plan.folder}/clients", f"{plan.folder}/peers"
        for ca, kind, prefix in ((clients, "server", ""), (peers, "peer", "peer-")):
            pair = _pair(session, ca, kind, name, cert.hosts_of((host,), kind))
            settings[f"{prefix}cert-file"] = put(f"{kind}.crt", pair.certificate, False)
            settings[f"{prefix}key-file"] = put(f"{kind}.key", pair.key)
            authority = put(f"{kind}-ca.crt", Path(ca, "ca.crt").read_text("ascii"), False)
            settings[f"{prefix}trusted-ca-file"] = authority
            settings[f"{prefix}client-cert-auth"] = True
        pair = _pair(session, clients, "client", "root", ())
        options["cacert"] = settings["trusted-ca-file"]
        options["cert"] = put("ctl.crt", pair.certificate, False)
        options["key"] = put("ctl.key", pair.key)
    files[f"{FOLDER}/ctl.toml"] = (_toml("The options of etcdlite-ctl", options), False)
    title = f"The member {name}, written by etcdlite-ctl setup. etcdlite.toml(5) has all settings"
    files["etc/etcdlite.toml"] = (_toml(title, settings), False)
    return files


def _toml(title: str, settings: Mapping[str, object]) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    return "".join(f"{line}\n" for line in (f"# {title}.", *lines))


def _write_archive(path: str, files: Files) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, (content, is_private) in files.items():
            entry = tarfile.TarInfo(name)
            encoded = content.encode()
            entry.size, entry.mtime = len(encoded), int(time.time())
            entry.mode = 0o600 if is_private else 0o644
            entry.uname = entry.gname = OWNER if is_private else "root"
            archive.addfile(entry, io.BytesIO(encoded))
    with PartialFile(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data.getvalue())


def _next_steps(folder: str, hosts: Mapping[str, str], is_join: bool) -> list[str]:
    lines = [f"{folder}/{name}.tar: the files of {name} on {host}" for name, host in hosts.items()]
    name = next(iter(hosts))
    return [
        *lines,
        "Next, as root on each machine, where etcdlite is installed, with its own archive:",
        f"  tar -C / -xf {name}.tar",
        "  systemctl restart etcdlite",
        *([f"A learner has no vote until you run: etcdlite-ctl member promote {name}"] * is_join),
        f"Keep {folder} where it is safe: it is needed to add a member."
        + (" Delete the archives." if is_join else ""),
    ]
