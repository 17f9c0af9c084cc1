"""The files of TLS: certificates, keys, CAs and revocation lists, as contexts of `ssl`.

A `Credentials` holds one set of etcd's flags, for clients or for members. It makes the contexts for
accepting and for dialing, and checks the other side as etcd does:

- A certificate is demanded if client-cert-auth or trusted-ca-file is set.
- No certificate in the chain may be in the revocation list. etcd compares serial numbers and
  nothing else; so does this. A list that is out of date counts.
- The certificate has one of the allowed common names or alternative names, if some are set.
- A member that connects must come from an address that its certificate names, directly or by a
  name that resolves to it, if it names any.

The files are looked at again when a handshake begins, at most every `RELOAD_S`. What changed is
read and checked as a whole: files that do not fit are refused with one warning, and the old ones
stay in use. Two files are not replaced in one instant, so a failure counts when it is still there
at the next look. A new context knows no older sessions, so nobody resumes one past a new list.

All that may block (files, names) happens in the threads of handshakes and dials, under a lock.
"""

from __future__ import annotations

import os
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from etcdlite import log, private_file, x509
from etcdlite.addresses import AGAIN_S, FRESH_S, look_up
from etcdlite.channel import ChannelError
from etcdlite.cipher_suites import OPENSSL_NAMES
from etcdlite.errors import MayPass
from etcdlite.log import quoted
from etcdlite.tls import Sources, TLSChannel
from etcdlite.urls import is_address
from etcdlite.wall_clock import unix_s
from etcdlite.x509 import MAX_PEM_BYTES

RELOAD_S = 1.0
MAX_LIST_BYTES = 16 << 20
"""The largest revocation list: about 400,000 certificates."""
MAX_SESSIONS = 1000
"""Sessions of TLS 1.2 that a context may remember: `ssl` cannot turn that off, so the context is
replaced."""
MAX_NAMES = 100

VERSIONS = {"TLS1.2": ssl.TLSVersion.TLSv1_2, "TLS1.3": ssl.TLSVersion.TLSv1_3}

Protocols = tuple[str, ...]
"""The protocols to agree on (RFC 7301), the preferred one first."""

_FILE_FLAGS = (
    "cert-file", "key-file", "client-cert-file", "client-key-file", "trusted-ca-file", "crl-file",
)  # fmt: skip
"""The flags that name files, without their prefix."""

_Stamp = tuple[tuple[str, tuple[int, ...]], ...]
"""Path and `private_file.stamp` of each file."""


class CredentialsError(MayPass):
    """A file cannot be used. The text names the flag and the file, and says what to do."""


class Settings(NamedTuple):
    """One set of flags."""

    prefix: str
    """"" for clients, "peer-" for members."""
    cert_file: str
    key_file: str
    client_cert_file: str
    """For dialing, if it is another one; so is the key."""
    client_key_file: str
    trusted_ca_file: str
    crl_file: str
    client_cert_auth: bool
    allowed_names: tuple[str, ...]
    """Common names; empty: any."""
    allowed_hosts: tuple[str, ...]
    """Alternative names; empty: any."""
    checks_addresses: bool
    """The other side must come from an address that its certificate names."""
    is_self_signed: bool
    """The certificates are made by each member for itself, so a dialer verifies none."""
    suites: tuple[str, ...]
    min_version: str
    max_version: str

    @property
    def demands_certificate(self) -> bool:
        return bool(self.client_cert_auth or self.trusted_ca_file)

    def path(self, flag: str) -> str:
        """The file of a flag without its prefix; empty: not set."""
        return str(getattr(self, flag.replace("-", "_")))

    def file_of(self, flag: str) -> str:
        """The flag and its file, for messages."""
        path = self.path(flag)
        return f"--{self.flag(flag)} {quoted(path)}" if path else ""

    def flag(self, flag: str) -> str:
        name = "client-crl-file" if flag == "crl-file" and not self.prefix else flag
        return name if name.startswith("client-crl") else self.prefix + name


class Loaded(NamedTuple):
    """What the files hold."""

    stamp: _Stamp
    contexts: dict[tuple[bool, Protocols], ssl.SSLContext]
    """By whether they accept, and the protocols. All are made when the files are read."""
    revoked: frozenset[int]
    expiries: dict[str, float]
    """When the first certificate in each file ends (Unix time), by path."""


class Credentials:
    """One set of files and what is made of them."""

    def __init__(
        self,
        settings: Settings,
        protocols: Sequence[Protocols],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads the files. `protocols` are those that `accept` and `dial` are called with. Raises
        CredentialsError."""
        self.settings = settings
        self._protocols = protocols
        self._clock = clock
        self._lock = threading.Lock()
        self._look_at = clock() + RELOAD_S
        self._failed: _Stamp | None = None
        """Files that did not fit at the last look."""
        self._refused: _Stamp | None = None
        """Files that were refused, and the log has told it."""
        self._addresses: dict[str, tuple[float, frozenset[str]]] = {}
        trusted = settings.file_of("trusted-ca-file") or "the CAs of the system"
        own = settings.file_of("client-cert-file") or settings.file_of("cert-file")
        self.accepting_sources = Sources(trusted, settings.file_of("cert-file"))
        self.dialing_sources = Sources(trusted, own)
        self._loaded = self._load(self._stamp())

    @property
    def expiries(self) -> dict[str, float]:
        """When the certificates in use end (Unix time in seconds), by path."""
        return self._loaded.expiries

    def accept(self, protocols: Protocols, address: str) -> TLSChannel:
        """The channel of a connection from `address`, which may agree on one of `protocols`."""
        return TLSChannel(
            lambda: self._context(True, protocols),
            self.accepting_sources,
            check=lambda channel: self._check(channel, address),
        )

    def dial(self, protocols: Protocols, server_name: str) -> TLSChannel:
        """The channel of a connection to `server_name`. Raises ChannelError."""
        return TLSChannel(
            lambda: self._context(False, protocols),
            self.dialing_sources,
            server_name=server_name,
            check=lambda channel: self._check(channel, ""),
        )

    # Files.

    def look(self, is_asked: bool = False) -> None:
        """Read the files again if they changed, or if an operator asked for it. Blocks. Files that
        do not fit may be half copied: the log reports them at the second look, or if asked."""
        with self._lock:
            self._look_at = self._clock() + RELOAD_S
            stamp = self._stamp()
            if stamp in (self._loaded.stamp, self._refused) and not is_asked:
                self._failed = None
                return
            try:
                before, self._loaded = self._loaded, self._load(stamp)
            except CredentialsError as failure:
                if is_asked or stamp == self._failed:
                    self._refused = stamp
                    log.warn(
                        "new TLS files are refused; the old ones stay in use", why=str(failure)
                    )
                self._failed = stamp
            else:
                self._failed = self._refused = None
                if stamp == before.stamp:
                    return
                log.info("read changed TLS files", files=", ".join(path for path, *_ in stamp))

    def _stamp(self) -> _Stamp:
        paths = filter(None, map(self.settings.path, _FILE_FLAGS))
        return tuple((path, private_file.stamp(path)) for path in paths)

    def _load(self, stamp: _Stamp) -> Loaded:
        settings = self.settings
        expiries = {}
        for flag in ("cert-file", "client-cert-file", "trusted-ca-file"):
            if path := settings.path(flag):
                expiries[path] = self._read_certificates(flag, path)
        for flag in ("key-file", "client-key-file"):
            if path := settings.path(flag):
                self._read_key(flag, path)
        revoked = self._read_list(settings.crl_file) if settings.crl_file else frozenset()
        # Making the contexts tells whether the files fit together. Only members dial.
        kinds = [True] * bool(settings.cert_file) + [False] * bool(settings.prefix)
        contexts = {
            (accepts, protocols): self._make(accepts, protocols)
            for accepts in kinds
            for protocols in self._protocols
        }
        return Loaded(stamp, contexts, revoked, expiries)

    def _context(self, accepts: bool, protocols: Protocols) -> ssl.SSLContext:
        """The context for a new connection. Blocks."""
        if self._clock() >= self._look_at:
            self.look()
        contexts = self._loaded.contexts
        context = contexts[accepts, protocols]
        if context.session_stats()["number"] > MAX_SESSIONS:
            with suppress(CredentialsError):  # Files that do not match: the next look reports it.
                context = contexts[accepts, protocols] = self._make(accepts, protocols)
        return context

    def _make(self, accepts: bool, protocols: Protocols) -> ssl.SSLContext:
        settings = self.settings
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if accepts else ssl.PROTOCOL_TLS_CLIENT)
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
        context.minimum_version = VERSIONS.get(settings.min_version, ssl.TLSVersion.TLSv1_2)
        if settings.max_version:
            context.maximum_version = VERSIONS[settings.max_version]
        # As in Go, any certificate in the file of CAs ends the search, also an intermediate one.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        suites = [OPENSSL_NAMES[name] for name in settings.suites if name in OPENSSL_NAMES]
        if suites:
            try:
                context.set_ciphers(":".join(suites))
            except ssl.SSLError as failure:
                raise CredentialsError(
                    f"--cipher-suites: this machine's {ssl.OPENSSL_VERSION} allows none of them "
                    f"({failure.reason}). Choose others"
                ) from failure
        context.set_alpn_protocols(list(protocols))
        if accepts:
            context.num_tickets = 0
            context.verify_mode = (
                ssl.CERT_REQUIRED if settings.demands_certificate else ssl.CERT_NONE
            )
        else:
            context.hostname_checks_common_name = False
            if settings.is_self_signed:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
        if context.verify_mode == ssl.CERT_REQUIRED:
            self._trust(context)
        own = ("cert-file", "key-file")
        if not accepts and settings.client_cert_file:
            own = ("client-cert-file", "client-key-file")
        if settings.path(own[0]):
            self._show(context, *own)
        return context

    def _trust(self, context: ssl.SSLContext) -> None:
        path = self.settings.trusted_ca_file
        if not path:
            context.load_default_certs()
            return
        try:
            context.load_verify_locations(path)
        except (OSError, ssl.SSLError) as failure:
            raise self._misfit(
                "trusted-ca-file", f"cannot be used: {_reason(failure)}"
            ) from failure

    def _show(self, context: ssl.SSLContext, cert: str, key: str) -> None:
        """Let this side present a certificate."""
        settings = self.settings
        paths = [settings.path(flag) for flag in (cert, key)]

        def passphrase() -> str:
            raise self._misfit(key, "has a passphrase, which nobody can enter; remove it")

        try:
            context.load_cert_chain(paths[0], paths[1], passphrase)
        except ssl.SSLError as failure:
            if failure.reason == "KEY_VALUES_MISMATCH":
                why = (
                    f"is not the key of {settings.file_of(cert)}. Give the two that belong together"
                )
                raise self._misfit(key, why) from failure
            if failure.reason in ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
                why = "is too weak: use at least RSA 2048 or ECDSA P-256, and SHA-256"
                raise self._misfit(cert, why) from failure
            why = f"cannot be used with {settings.file_of(key)}: {_reason(failure)}"
            raise self._misfit(cert, why) from failure
        except OSError as failure:
            raise self._misfit(cert, f"cannot be read: {failure.strerror}") from failure

    def _misfit(self, flag: str, why: str) -> CredentialsError:
        return CredentialsError(f"{self.settings.file_of(flag)} {why}")

    def _read(self, flag: str, path: str, max_bytes: int = MAX_PEM_BYTES) -> bytes:
        try:
            data, _ = private_file.read_file(path, max_bytes)
        except OSError as failure:
            why = f"cannot be read: {failure.strerror}. Correct the path or the file's permissions"
            raise self._misfit(flag, why) from failure
        if len(data) > max_bytes:
            raise self._misfit(flag, f"is larger than {max_bytes} bytes. Is it the right file?")
        return data

    def _read_certificates(self, flag: str, path: str) -> float:
        """When the first certificate in a file ends; of several CAs, the last one to end."""
        try:
            found = x509.certificates(self._read(flag, path))
        except ValueError as failure:
            why = f"has a damaged certificate: {failure}. Copy the file again"
            raise self._misfit(flag, why) from failure
        if not found:
            why = "has no certificate in PEM format (-----BEGIN CERTIFICATE-----)"
            raise self._misfit(flag, f"{why}. Convert it, or name the right file")
        ends = [one.not_after for one in found]
        return max(ends) if flag == "trusted-ca-file" else ends[0]

    def _read_key(self, flag: str, path: str) -> None:
        data = self._read(flag, path)
        if os.stat(path).st_mode & (stat.S_IROTH | stat.S_IWOTH):
            log.warn("others may read a private key; use 'chmod o= FILE'", file=path)
        kinds = [kind for kind in x509.kinds(data) if kind.endswith("PRIVATE KEY")]
        if not kinds:
            why = "has no private key in PEM format (-----BEGIN PRIVATE KEY-----)"
            raise self._misfit(flag, f"{why}. Convert it, or name the right file")
        if "ENCRYPTED" in kinds[0] or b"Proc-Type: 4,ENCRYPTED" in data:
            why = "has a passphrase, which nobody can enter when the server starts. Remove it, "
            raise self._misfit(flag, f"{why}as in 'openssl pkey -in OLD -out NEW'")

    def _read_list(self, path: str) -> frozenset[int]:
        data = self._read("crl-file", path, MAX_LIST_BYTES)
        try:
            ders = x509.blocks(data, "X509 CRL") if b"-----BEGIN" in data else [data]
            found = [x509.parse_revocation_list(der) for der in ders]
        except ValueError as failure:
            why = f"is not a revocation list in PEM or DER format: {failure}"
            raise self._misfit("crl-file", why) from failure
        if not found:
            raise self._misfit("crl-file", "has no revocation list (-----BEGIN X509 CRL-----)")
        if any(0 < one.next_update < unix_s() for one in found):
            log.warn("the revocation list is out of date; it is used", file=path)
        return frozenset().union(*(one.serials for one in found))

    # The other side.

    def _check(self, channel: TLSChannel, address: str) -> None:
        """Raises ChannelError if the other side must be refused. `address` is where it connects
        from; empty if this side dialled."""
        settings = self.settings
        if (address and not settings.demands_certificate) or settings.is_self_signed:
            return
        try:
            certificate = x509.parse_certificate(channel.certificate())
            serials = [x509.parse_certificate(der).serial for der in channel.chain()]
        except ValueError as failure:
            raise ChannelError(f"its certificate cannot be read: {failure}") from failure
        channel.description += f", certificate of {quoted(certificate.common_name)}"
        for serial in serials:
            if serial in self._loaded.revoked:
                raise ChannelError(
                    f"its certificate (serial number {serial:x}) is revoked by "
                    f"{settings.file_of('crl-file')}: give it a new one"
                )
        if address and settings.prefix and not settings.client_cert_file:
            # A member has one certificate for both sides. If the CA signs certificates of clients,
            # too, this tells them from it.
            if not certificate.is_for_servers:
                raise ChannelError(
                    "its certificate is for clients only (extended key usage without serverAuth), "
                    "and a member's is for both sides: use one of a member, or set "
                    "peer-client-cert-file, if members have certificates for dialing alone"
                )
        self._check_names(certificate)
        if address and settings.checks_addresses:
            self._check_address(certificate, address)
        if address and settings.client_cert_auth:
            channel.user = certificate.common_name

    def _check_names(self, certificate: x509.Certificate) -> None:
        settings = self.settings
        if settings.allowed_names and certificate.common_name not in settings.allowed_names:
            raise ChannelError(
                f"its certificate is of {quoted(certificate.common_name)}, and "
                f"--{settings.prefix}cert-allowed-cn is {','.join(settings.allowed_names)}"
            )
        if settings.allowed_hosts and not any(map(certificate.names, settings.allowed_hosts)):
            flag = settings.prefix or "client-"
            names = ",".join((*certificate.dns_names, *certificate.addresses))
            raise ChannelError(
                f"its certificate is for {quoted(names)}, and --{flag}cert-allowed-hostname is "
                f"{','.join(settings.allowed_hosts)}"
            )

    def _check_address(self, certificate: x509.Certificate, address: str) -> None:
        """As in etcd: one of the addresses in the certificate, or one of the names resolves to it
        or is what it resolves to."""
        names, addresses = certificate.dns_names[:MAX_NAMES], certificate.addresses
        if address in addresses or not (names or addresses):
            return
        plain = [name for name in names if not name.startswith("*.")]
        if any(address in self._resolve(name) for name in plain):
            return
        if names:
            found = [name.rstrip(".") for name in self._resolve(address)]
            endings = tuple(name[1:] for name in names if name.startswith("*."))
            if any(name in plain or name.endswith(endings) for name in found if endings or plain):
                return
        raise ChannelError(
            f"it connects from {address}, but its certificate is for "
            f"{', '.join((*names, *addresses))}. Add the address to the certificate, or set "
            "peer-skip-client-san-verification"
        )

    def _resolve(self, host: str) -> frozenset[str]:
        """The addresses of a name, or the names of an address. Blocks."""
        now = self._clock()
        until, found = self._addresses.get(host, (0.0, frozenset()))
        if until <= now:
            new = _look_up(host)
            found = found if new is None else new
            if len(self._addresses) > 10 * MAX_NAMES:
                self._addresses.clear()
            self._addresses[host] = (now + (FRESH_S if new else AGAIN_S), found)
        return found


def _look_up(host: str) -> frozenset[str] | None:
    """The addresses of a name, as `addresses.look_up`; or the names of an address."""
    if not is_address(host):
        return look_up(host)
    try:
        name, others, _ = socket.gethostbyaddr(host)
        return frozenset((name, *others))
    except OSError:
        return frozenset()


def _reason(failure: OSError) -> str:
    """What OpenSSL or the system said, in lower case."""
    reason = getattr(failure, "reason", None) or failure.strerror or str(failure)
    return str(reason).replace("_", " ").lower()
