"""TLS (RFC 8446, RFC 5246) as a channel, with the standard library's `ssl`, for both sides.

`ssl` does the protocol over two buffers in memory; no socket is involved. This module adds what a
server among strangers needs:

- The object of `ssl`, which takes about 40 KiB during a handshake, is made only when the first
  record is complete. Before that, plain text is recognized and answered.
- What a handshake may send, what records without content may come, and what is fed to `ssl` at once
  have limits. So a record costs its sender at least about what it costs here.
- Errors are sentences that name the files and what to do (`explain`), not OpenSSL's words.

The first import of `ssl` takes 5 MB of memory, so import this module only where TLS is configured.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from etcdlite.channel import MAX_OUTPUT_BYTES, RECORD_BYTES, Channel, ChannelError

MAX_INPUT_BYTES = 160 << 10
"""A handshake receives at most this much. OpenSSL limits the chain of certificates to 100 KiB."""

MAX_HELLO_BYTES = RECORD_BYTES
"""The largest first record."""

MAX_PIECE_RECORDS = 64
"""`ssl` is fed at most this many records, or `RECORD_BYTES`, at once."""

MAX_EMPTY_RECORDS = 32
"""Records without content (a new key, an empty record) that may come in a row, or for each
`REFILL_BYTES` of content. A new key costs this side 50 times what its 27 bytes cost the other."""

REFILL_BYTES = 1 << 20

HEADER_BYTES = 5
"""A record begins with its type (1), a version (2) and the length of the rest (2)."""

ALPN_NATIVE = "etcdlite"
"""The native protocol's name in the handshake (RFC 7301); HTTP/2 is h2, HTTP/1.1 http/1.1."""

_HANDSHAKE = 0x16
_ALERT = b"\x15\x03\x01\x00\x02\x02\x0a"
"""A fatal alert: unexpected message."""
_HTTP = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ", b"PATCH ")
_HTTP_ANSWER = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
"""The answer of Go's server."""


class Sources(NamedTuple):
    """Where the settings of one side come from, for error messages."""

    trusted: str
    """What the other side's certificate is verified with, such as `--cacert /etc/ca.pem`."""
    own: str
    """This side's certificate, such as `--cert-file /etc/server.pem`; empty if it has none."""


class TLSChannel(Channel):
    kind = "tls"
    steps_are_long = True
    memory_bytes = 20 << 10  # Measured: 600 idle connections, with OpenSSL 3.0.

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext],
        sources: Sources,
        *,
        server_name: str | None = None,
        check: Callable[[TLSChannel], None] | None = None,
    ) -> None:
        """`context` is called when the handshake begins; it may read files and raise ChannelError.
        `server_name` is the host that was dialled; None on the accepting side. `check` is called
        when the handshake is complete: it refuses the other side by raising ChannelError, or sets
        `user` and `description`."""
        self._context = context
        self._sources = sources
        self._server_name = server_name
        self._check = check
        self._ssl: ssl.SSLObject | None = None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._input_bytes = 0
        """Received during the handshake."""
        # The record that is not complete: how many bytes are missing, and its header while that is
        # not complete. Only of records after the handshake.
        self._missing = 0
        self._header = b""
        self._held = 0
        self._may_be_empty = MAX_EMPTY_RECORDS
        self._content_bytes = 0
        self._first = b""
        """The beginning of the first record."""
        if server_name is not None:
            self._begin()

    # The handshake.

    def _begin(self) -> None:
        """Make the object of `ssl`. The side that dials speaks first."""
        is_server = self._server_name is None
        try:
            self._ssl = self._context().wrap_bio(
                self._incoming, self._outgoing, is_server, self._server_name or None
            )
        except ValueError as failure:  # A name that can be in no certificate.
            raise ChannelError(f"cannot verify the name of the server: {failure}") from failure
        if not is_server:
            self._proceed()

    def _proceed(self) -> None:
        assert self._ssl is not None
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError as failure:
            raise ChannelError(explain(failure, self._sources)) from failure
        self.alpn = self._ssl.selected_alpn_protocol() or ""
        cipher = self._ssl.cipher()
        self.description = f"{self._ssl.version()}, {cipher[0] if cipher else 'no cipher'}"
        if self._check is not None:
            self._check(self)
        self.is_established = True

    def _shake(self, data: bytes) -> bytes:
        """Take a step of the handshake; returns the plaintext that follows its end."""
        self._input_bytes += len(data)
        if self._input_bytes > MAX_INPUT_BYTES:
            raise ChannelError(f"its handshake is larger than {MAX_INPUT_BYTES} bytes")
        if self._ssl is None:
            data = self._first = self._first + data
            if not self._is_record(data):
                return b""
            self._first = b""
            self._begin()
        self._incoming.write(data)
        self._proceed()
        # `ssl` reads whole records, so what it has not read begins with one.
        return self.receive(self._incoming.read()) if self.is_established else b""

    def receive_end(self) -> None:
        if self._input_bytes:  # Whoever sends nothing looks whether the port is open.
            super().receive_end()

    def _is_record(self, data: bytes) -> bool:
        """Whether the first record is complete. Raises ChannelError if it is plain text."""
        if data[0] != _HANDSHAKE:
            if any(data.startswith(verb[: len(data)]) for verb in _HTTP):
                if len(data) < HEADER_BYTES:
                    return False
                self._outgoing.write(_HTTP_ANSWER)
                raise ChannelError("plain HTTP on a TLS port: its URL must begin with https://")
            self._outgoing.write(_ALERT)
            raise ChannelError(
                "plain text on a TLS port: the other side must be configured for TLS "
                f"(it sent {data[:16].hex()})"
            )
        if len(data) < HEADER_BYTES:
            return False
        size = int.from_bytes(data[3:HEADER_BYTES], "big")
        if size > MAX_HELLO_BYTES:
            self._outgoing.write(_ALERT)
            raise ChannelError(f"its first record has {size} bytes; is it TLS?")
        return len(data) >= HEADER_BYTES + size

    def certificate(self) -> bytes:
        """The DER of the other side's certificate; empty if it showed none."""
        assert self._ssl is not None
        return self._ssl.getpeercert(binary_form=True) or b""

    def chain(self) -> list[bytes]:
        """The DER of all certificates that the other side showed, its own first."""
        assert self._ssl is not None
        get = getattr(self._ssl, "get_unverified_chain", None)
        if get is not None:
            return list(get())
        # Before Python 3.13 only the inner object has it.
        return [one.public_bytes(2) for one in self._ssl._sslobj.get_unverified_chain() or ()]  # type: ignore[attr-defined]

    # Data.

    def receive(self, data: bytes) -> bytes:
        if not self.is_established:
            return self._shake(data) if data else b""
        if self.is_ended:
            return b""
        read, write = self._ssl.read, self._incoming.write  # type: ignore[union-attr]
        size = len(data)
        # The hot path: one whole record. It takes half of the time of what follows.
        if (
            HEADER_BYTES < size == HEADER_BYTES + (data[3] << 8 | data[4])
            and not self._missing
            and not self._header
            and self._may_be_empty == MAX_EMPTY_RECORDS
        ):
            write(data)
            try:
                if part := read(RECORD_BYTES):
                    return part
                self.is_ended = True
            except ssl.SSLWantReadError:
                self._count_empty(1)
            except ssl.SSLError as failure:
                raise ChannelError(explain(failure, self._sources)) from failure
            return b""
        pending = self._incoming
        parts: list[bytes] = []
        at = 0
        while at < size:
            end, records = self._next_piece(data, at)
            write(data[at:end] if at or end < size else data)
            at = end
            count = len(parts)
            try:
                while pending.pending:
                    part = read(RECORD_BYTES)
                    if not part:
                        self.is_ended = True
                        return b"".join(parts)
                    parts.append(part)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as failure:
                raise ChannelError(explain(failure, self._sources)) from failure
            if records > len(parts) - count:
                self._count_empty(records - (len(parts) - count))
        if self._may_be_empty < MAX_EMPTY_RECORDS:
            self._content_bytes += sum(map(len, parts))
            if self._content_bytes > REFILL_BYTES:
                self._content_bytes = 0
                self._may_be_empty = MAX_EMPTY_RECORDS
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _next_piece(self, data: bytes, begin: int) -> tuple[int, int]:
        """Where the next piece of `data` ends, and how many records it completes."""
        if self._header:
            # Complete the header first. What `ssl` gets is the same.
            taken = data[begin : begin + HEADER_BYTES - len(self._header)]
            self._header += taken
            self._held += len(taken)
            if len(self._header) == HEADER_BYTES:
                self._missing = int.from_bytes(self._header[3:], "big")
                self._header = b""
                return begin + len(taken), int(not self._missing)
            return begin + len(taken), 0
        limit = min(len(data), begin + RECORD_BYTES)
        at = begin + self._missing
        if at > limit:
            self._missing = at - limit
            self._held += limit - begin
            return limit, 0
        records = 1 if self._missing else 0
        opened = at
        while at + HEADER_BYTES <= limit and records < MAX_PIECE_RECORDS:
            opened = at
            at += HEADER_BYTES + (data[at + 3] << 8 | data[at + 4])
            if at > limit:
                self._missing = at - limit
                self._held = limit - opened
                return limit, records
            records += 1
        self._missing = 0
        if records < MAX_PIECE_RECORDS:
            self._header = data[at:limit]
            at = limit
        self._held = len(self._header)
        return at, records

    def _count_empty(self, records: int) -> None:
        self._may_be_empty -= records
        if self._may_be_empty < 0 or self._outgoing.pending > MAX_OUTPUT_BYTES:
            raise ChannelError("it sends too many records without content")

    @property
    def held_bytes(self) -> int:
        return len(self._first) or self._held

    def seal(self, data: bytes | memoryview) -> bytes:
        assert self._ssl is not None
        write, outgoing = self._ssl.write, self._outgoing
        try:
            if len(data) <= RECORD_BYTES:
                if data:
                    write(data)
                return outgoing.read()
            # A piece at a time: the buffer of `outgoing` never shrinks.
            parts = []
            view = memoryview(data)
            for at in range(0, len(view), RECORD_BYTES):
                write(view[at : at + RECORD_BYTES])
                parts.append(outgoing.read())
        except ssl.SSLError as failure:
            raise ChannelError(explain(failure, self._sources)) from failure
        return b"".join(parts)

    @property
    def has_output(self) -> bool:
        return self._outgoing.pending > 0

    def output(self) -> bytes:
        return self._outgoing.read()

    def close(self) -> None:
        if self.is_established:
            with suppress(ssl.SSLError):  # The peer has not sent its close_notify.
                self._ssl.unwrap()  # type: ignore[union-attr]


# Errors.

_UNKNOWN_CA = "no CA in {trusted} signed its certificate: give it one of such a CA, or add its CA"

_VERIFY = {
    2: _UNKNOWN_CA,
    9: "its certificate is not valid yet: correct the clock of one of the machines",
    10: "its certificate has expired: renew it",
    18: _UNKNOWN_CA,
    19: _UNKNOWN_CA,
    20: _UNKNOWN_CA,
    21: _UNKNOWN_CA,
    23: "its certificate is revoked: give it a new one",
    26: "its certificate is not for this purpose: a server needs the extended key usage "
    "serverAuth, a client (and a member that dials) clientAuth",
    62: "its certificate does not have the name by which it was dialled ({detail}): dial a name "
    "that is in the certificate, or add this one",
    64: "its certificate does not have the address at which it was dialled ({detail}): dial a name "
    "that is in the certificate, or add this address",
    66: "the key of its certificate is too short: use at least RSA 2048 or ECDSA P-256",
    67: "the key of its CA is too short: use at least RSA 2048 or ECDSA P-256",
    68: "its certificate is signed with an algorithm that is too weak: use SHA-256",
}
"""By OpenSSL's X509_V_ERR_ numbers (X509_STORE_CTX_get_error(3)), stable since 1.1."""

_OWN = "the other side refuses this side's certificate ({own})"

_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate: give it one of a CA in "
    "{trusted}",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the other side wants a certificate: configure one",
    "TLSV1_ALERT_UNKNOWN_CA": _OWN + ": it does not know the CA that signed it",
    "SSLV3_ALERT_BAD_CERTIFICATE": _OWN + ": its log tells why",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": _OWN + ": its key usage does not fit, or it is of a "
    "kind that the other side does not support",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": _OWN + ": it is revoked",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": _OWN + ": it has expired, or a clock is wrong",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": _OWN + ": its log tells why",
    "TLSV1_ALERT_ACCESS_DENIED": _OWN + ": its log tells why",
    "TLSV1_ALERT_DECRYPT_ERROR": "the other side cannot verify this side's signature ({own})",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the other side refuses the handshake: it is not a TLS port "
    "(then its URL begins with http://), it wants a certificate, or both sides have no cipher in "
    "common",
    "TLSV1_ALERT_NO_APPLICATION_PROTOCOL": "the other side does not speak etcdlite's protocol: it "
    "may be etcd, or a proxy for gRPC or HTTP",
    "NO_SHARED_CIPHER": "both sides have no cipher in common: see cipher-suites; an ECDSA key "
    "needs ECDSA suites, an RSA key RSA ones",
    "UNSUPPORTED_PROTOCOL": "it only speaks versions of TLS that are not allowed here: see "
    "tls-min-version and tls-max-version",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the other side does not allow this side's versions of TLS: "
    "see tls-min-version and tls-max-version of both",
    "WRONG_VERSION_NUMBER": "it does not answer with TLS: is it a plain port? Then its URL begins "
    "with http://",
    "HTTP_REQUEST": "plain HTTP on a TLS port: its URL must begin with https://",
    "EXCESSIVE_MESSAGE_SIZE": "its chain of certificates is larger than 100 KiB",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": "a record is damaged",
    "RECORD_LAYER_FAILURE": "a record is damaged",  # The same, since OpenSSL 3.6.
    "NO_RENEGOTIATION": "it asks for a new handshake, which is not allowed",
    "UNSAFE_LEGACY_RENEGOTIATION_DISABLED": "it does not support secure renegotiation (RFC 5746)",
}
"""By the name of OpenSSL's reason."""


def explain(failure: ssl.SSLError, sources: Sources) -> str:
    """What a failure of `ssl` means and what to do about it: a clause for a log line."""
    if isinstance(failure, ssl.SSLCertVerificationError):
        detail = failure.verify_message
        text = _VERIFY.get(failure.verify_code, "its certificate cannot be verified: {detail}")
    else:
        # Python does not know the names of all reasons. The text has OpenSSL's words for each.
        detail = str(failure).partition(" (_ssl")[0].rpartition("] ")[2].lower()
        text = _REASONS.get(failure.reason or detail.upper().replace(" ", "_"), "TLS: {detail}")
    own = sources.own or "none is configured"
    return text.format(trusted=sources.trusted, own=own, detail=detail)
