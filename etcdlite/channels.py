"""The channels of the server, as the settings say: which one a connection has by the URL that is
listened on, or dialled.

    https://    TLS, with the files of the flags for clients or for members
    http://     the shared secret if there is one (of clients, only the native protocol), else plain

`ssl` and the files of TLS are loaded only if some URL begins with https://.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

from etcdlite import log
from etcdlite.channel import Channel, ChannelError, Maker
from etcdlite.config import Config
from etcdlite.errors import Explained
from etcdlite.listeners import CLIENTS, HTTP, METRICS, PEERS
from etcdlite.loading import start_thread
from etcdlite.urls import host_port, is_secure
from etcdlite.wall_clock import unix_s

WARNED_BEFORE_S = 30 * 86400
"""The log warns when a certificate ends within this time."""

EXPIRY_LINES_PER_S = 1 / 86400
"""Once a day."""

_PROTOCOLS = {
    CLIENTS: ("etcdlite", "h2", "http/1.1"),
    HTTP: ("http/1.1",),
    METRICS: ("http/1.1",),
    PEERS: ("etcdlite-peer",),
}
"""The protocols to agree on in the handshake of TLS (RFC 7301), by the purpose of the listener."""


class Channels:
    """Makes the channel of each connection."""

    def __init__(self, settings: Config) -> None:
        """Reads secrets and the files of TLS. Makes certificates for auto-tls in the data
        directory. Blocks. Raises Explained."""
        self._settings = settings
        self._lock = threading.Lock()
        self._credentials: dict[str, Any] = {}
        """Of clients ("") and members ("peer-"), once they are needed."""
        self._secrets = _secret_makers(settings)
        """By the purpose of the listener."""
        if any(map(is_secure, _urls_for_clients(settings))):
            self._credentials_of("")
        if any(map(is_secure, settings.listen_peer_urls)):
            self._credentials_of("peer-")

    def accept(self, purpose: str, url: str, address: str) -> Channel | None:
        """The channel of a connection from the IP address `address`, which was accepted at a
        listener; None: it is plain. Clients may have `accept_secret` instead."""
        if is_secure(url):
            credentials = self._credentials["peer-" if purpose == PEERS else ""]
            return credentials.accept(_PROTOCOLS[purpose], address)
        maker = self._secrets.get(PEERS) if purpose == PEERS else None
        return None if maker is None else maker.accept(address)

    def dial(self, url: str, target_id: int) -> Channel | None:
        """As `channel.Dialing`. Blocks: it may read files."""
        if is_secure(url):
            try:
                credentials = self._credentials_of("peer-")
            except Explained as failure:
                raise ChannelError(str(failure)) from failure
            return credentials.dial(_PROTOCOLS[PEERS], host_port(url)[0])
        maker = self._secrets.get(PEERS)
        return None if maker is None else maker.dial(url, target_id)

    @property
    def client_secret(self) -> Maker | None:
        """What makes the channels of clients with a shared secret; None if there is none."""
        return self._secrets.get(CLIENTS)

    def identify(self, cluster_id: int, member_id: int) -> None:
        """Say who this side is, as soon as it is known."""
        for maker in self._secrets.values():
            maker.identify(cluster_id, member_id)

    def reload(self) -> None:
        """Read the files again. Logs what is wrong with them."""
        for maker in self._secrets.values():
            maker.reload()
        self.look(is_asked=True)

    def look(self, is_asked: bool = False) -> None:
        """Read the files of TLS again if they changed, and log which certificates end soon, each
        once a day. In a thread, because files may block. Call it now and then. `is_asked`: an
        operator waits for the result."""
        if self._credentials:  # If there can be no more threads now, it looks again later.
            start_thread("certificates", partial(self._look, is_asked))

    def _look(self, is_asked: bool) -> None:
        for prefix, credentials in list(self._credentials.items()):
            if credentials.settings.is_self_signed:
                try:
                    _ensure_certificate(self._settings, prefix)
                except Explained as failure:
                    log.warn(str(failure), f"made {prefix}", EXPIRY_LINES_PER_S)
            credentials.look(is_asked)
        now = unix_s()
        for path, ends_at in self.expiries.items():
            if ends_at - now < WARNED_BEFORE_S:
                days = int((ends_at - now) // 86400)
                text = f"ends in {days} days" if ends_at > now else "has expired"
                key = f"expiry {path}"
                log.warn(f"a certificate {text}: renew it", key, EXPIRY_LINES_PER_S, file=path)

    @property
    def expiries(self) -> dict[str, float]:
        """When the certificates in use end (Unix time in seconds), by file."""
        found: dict[str, float] = {}
        for credentials in list(self._credentials.values()):
            found.update(credentials.expiries)
        return found

    def _credentials_of(self, prefix: str) -> Any:
        with self._lock:
            if prefix not in self._credentials:
                self._credentials[prefix] = _read_credentials(self._settings, prefix)
            return self._credentials[prefix]


def _secret_makers(settings: Config) -> dict[str, Maker]:
    """What makes the channels of shared secrets, by purpose of the listener. Raises
    PrivateFileError."""
    found: dict[str, Maker] = {}
    if not (settings.peer_secret_file or settings.client_secret_file):
        return found
    from etcdlite import secret, secret_file

    files = []
    for listener, purpose, path in (
        (PEERS, secret.PEER, settings.peer_secret_file),
        (CLIENTS, secret.CLIENT, settings.client_secret_file),
    ):
        if path:
            file = secret_file.SecretFile(path, secret.SETTINGS[purpose])
            files.append(file)
            found[listener] = secret.Channels(file, purpose, time.monotonic)
    if len(files) > 1:
        first, second = files
        secret_file.check_apart(*(file.secrets(time.monotonic()) for file in files))
        first.apart_from, second.apart_from = second, first
    return found


def check(settings: Config) -> list[str]:
    """What is wrong with the files of TLS, one line each. Makes no file. Blocks."""
    problems = []
    for prefix in ("", "peer-"):
        if getattr(settings, f"{prefix}cert_file".replace("-", "_")):
            try:
                found = _read_credentials(settings, prefix)
            except Explained as failure:
                problems.append(str(failure))
                continue
            now = unix_s()
            for path, ends_at in found.expiries.items():
                if ends_at <= now:
                    log.warn("a certificate has expired: renew it", file=path)
    return problems


def _read_credentials(settings: Config, prefix: str) -> Any:
    """The `Credentials` of the flags with this prefix. Raises CredentialsError, StartError."""
    from etcdlite import credentials

    protocols = [_PROTOCOLS[purpose] for purpose in ((PEERS,) if prefix else (CLIENTS, HTTP))]
    return credentials.Credentials(_tls_settings(settings, prefix), protocols)


def _ensure_certificate(settings: Config, prefix: str) -> tuple[str, str]:
    """The files of the certificate and key of auto-tls, which are made if there are none that are
    valid. Raises StartError."""
    from etcdlite import fixtures

    name, urls = "client", _urls_for_clients(settings)
    if prefix:
        name, urls = "peer", settings.listen_peer_urls
    years = settings.self_signed_cert_validity
    return fixtures.ensure(settings.data_dir, name, filter(is_secure, urls), years)


def _urls_for_clients(settings: Config) -> tuple[str, ...]:
    http_urls = settings.listen_client_http_urls + settings.listen_metrics_urls
    return settings.listen_client_urls + http_urls


def _tls_settings(settings: Config, prefix: str) -> Any:
    """The flags with this prefix, as `credentials.Settings`. Makes a certificate if they ask for
    it. Raises StartError."""
    from etcdlite import credentials

    is_peer = bool(prefix)

    def of(name: str) -> Any:
        return getattr(settings, prefix.replace("-", "_") + name)

    cert, key = of("cert_file"), of("key_file")
    is_made = of("auto_tls") and not cert
    if is_made:
        cert, key = _ensure_certificate(settings, prefix)
    hosts = settings.client_cert_allowed_hostname
    return credentials.Settings(
        prefix=prefix,
        cert_file=cert,
        key_file=key,
        client_cert_file=settings.peer_client_cert_file if is_peer else "",
        client_key_file=settings.peer_client_key_file if is_peer else "",
        trusted_ca_file=of("trusted_ca_file"),
        crl_file=settings.peer_crl_file if is_peer else settings.client_crl_file,
        client_cert_auth=of("client_cert_auth"),
        allowed_names=settings.peer_cert_allowed_cn if is_peer else (),
        allowed_hosts=settings.peer_cert_allowed_hostname if is_peer else hosts,
        checks_addresses=is_peer and not settings.peer_skip_client_san_verification,
        is_self_signed=is_made,
        suites=settings.cipher_suites,
        min_version=settings.tls_min_version,
        max_version=settings.tls_max_version,
    )
