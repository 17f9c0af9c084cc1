"""TLS of the clients: the settings, and the channels that they give.

The settings are those of etcd's clients. A server must show a certificate that a CA in `cacert`
(or, without it, of this system) signed, and that has the host of the endpoint among its names.
`cert` and `key` are shown to a server that asks for them.

The files are read when a client is made, and again for a new connection after they have changed, so
that a long-lived client goes on when they are renewed. If they cannot be used then, the client goes
on with what it has read before.

`ssl` takes 5 MB and 15 ms to import: this module is imported only for a client that uses TLS.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from etcdlite import private_file, x509
from etcdlite.channel import Channel, ChannelError
from etcdlite.client.connection import Endpoint
from etcdlite.tls import ALPN_NATIVE, Sources, TLSChannel

SYSTEM = "the list of this system (name yours with cacert)"

MAX_FILE_BYTES = 4 << 20
"""Of a file, to look for what it should have."""


class Settings(NamedTuple):
    """The settings of one client; paths of PEM files."""

    cacert: str = ""
    cert: str = ""
    key: str = ""
    insecure_skip_tls_verify: bool = False
    """Accept any certificate."""
    server_name: str = ""
    """What the certificate must be for; empty: the host of the endpoint."""


class ClientChannel(TLSChannel):
    """The client's side of a connection."""

    ends_s: float | None = None
    """When the server's certificate ends (Unix time); None if that cannot be read."""

    def receive_end(self) -> None:
        if not self.is_established:
            raise ChannelError(
                "it closed the connection during the handshake: if it is a plain port, its URL "
                "begins with http://; else its log tells why"
            )


def _note_end(channel: TLSChannel) -> None:
    assert isinstance(channel, ClientChannel)
    with suppress(ValueError):
        channel.ends_s = x509.parse_certificate(channel.certificate()).not_after


class Dialer:
    """Makes the channels of one client."""

    def __init__(self, settings: Settings) -> None:
        """Raises ValueError if the files cannot be used."""
        self._settings = settings
        self._files = tuple(filter(None, (settings.cacert, settings.cert, settings.key)))
        self._seen = self._look()
        self._context = context(settings)
        trusted = "no file" if settings.insecure_skip_tls_verify else settings.cacert or SYSTEM
        self._sources = Sources(trusted, settings.cert)

    def channel_for(self, endpoint: Endpoint) -> Callable[[], Channel] | None:
        """The function that makes the channel of a connection; None if it is plain."""
        if endpoint.scheme != "https":
            return None
        return partial(self._make, self._settings.server_name or endpoint.host)

    def _make(self, host: str) -> Channel:
        return ClientChannel(self._newest, self._sources, server_name=host, check=_note_end)

    def _newest(self) -> ssl.SSLContext:
        seen = self._look()
        if seen != self._seen:
            with suppress(ValueError):  # A file may be half-written: use what was read before.
                self._context = context(self._settings)
                self._seen = seen
        return self._context

    def _look(self) -> list[tuple[int, ...]]:
        """What changes with the files."""
        return list(map(private_file.stamp, self._files))


def context(settings: Settings, protocol: str = ALPN_NATIVE) -> ssl.SSLContext:
    """Raises ValueError that names the file. `protocol` is the one to speak."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.hostname_checks_common_name = False  # As Go.
    made.set_alpn_protocols([protocol])
    if bool(settings.cert) != bool(settings.key):
        given, missing = ("cert", "key") if settings.cert else ("key", "cert")
        raise ValueError(f"{given} is given without {missing}: name both files")
    if settings.insecure_skip_tls_verify:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    elif settings.cacert:
        _check_pem("cacert", settings.cacert, ("CERTIFICATE", "TRUSTED CERTIFICATE"))
        try:
            made.load_verify_locations(settings.cacert)
        except ssl.SSLError as error:
            raise _unusable("cacert", settings.cacert, error) from None
    else:
        made.load_default_certs()
    if settings.cert:
        _check_pem("cert", settings.cert, ("CERTIFICATE",))
        _check_pem("key", settings.key, ("PRIVATE KEY",))
        try:
            # Without a password here, OpenSSL would ask for one.
            made.load_cert_chain(settings.cert, settings.key, password="")
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                text = f"the key in {settings.key} is not that of the certificate {settings.cert}"
                raise ValueError(text) from None
            raise _unusable("cert or key", f"{settings.cert}, {settings.key}", error) from None
    return made


def _check_pem(name: str, path: str, kinds: tuple[str, ...]) -> None:
    try:
        with open(path, "rb") as file:
            found = x509.kinds(file.read(MAX_FILE_BYTES))
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path}: {error.strerror}") from None
    if any(kind.startswith("ENCRYPTED") for kind in found):
        raise ValueError(f"{name}: the key in {path} has a password; give one without")
    if not any(kind.endswith(kinds) for kind in found):
        raise ValueError(f"{name}: {path} has no {kinds[0].lower()} in PEM format")


def _unusable(name: str, path: str, error: ssl.SSLError) -> ValueError:
    reason = (error.reason or str(error)).replace("_", " ").lower()
    return ValueError(f"{name}: {path} cannot be used: {reason}")
