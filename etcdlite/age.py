"""Encrypted backups: files of age, version 1 (https://age-encryption.org/v1).

Encryption takes a public key, the recipient, so a machine that makes backups cannot read them.
Decryption takes the identity, which is kept elsewhere. Files, recipients and identities are those
of the program `age`: each reads what the other one wrote.

    file        header, nonce (16 bytes), chunks
    header      "age-encryption.org/v1\\n"
                a stanza for each recipient: "-> X25519 " SHARE "\\n" BODY "\\n"
                "--- " MAC "\\n"
    SHARE       public key of a key pair of this file and recipient
    BODY        the file key, 16 random bytes, sealed with
                HKDF(X25519(private key, recipient), SHARE || recipient, the stanza's label)
                and a nonce of zeros
    MAC         HMAC-SHA-256 with HKDF(file key, "", "header") of the header up to "---"
    chunk       65,536 bytes of content, the last one 1 to 65,536 (0 only if it is the first),
                sealed with HKDF(file key, nonce, "payload"); its nonce: number of the chunk (11
                bytes, big-endian), then 1 for the last chunk, else 0

Sealed is ChaCha20-Poly1305 (RFC 8439), HKDF is that of RFC 5869 with SHA-256, SHARE, BODY and MAC
are in base64 without padding. So chunks cannot be cut off, swapped, left out, or taken from another
file (STREAM, Hoang et al., "Online Authenticated-Encryption and its Nonce-Reuse
Misuse-Resistance"). Anyone with the public key can make such a file: it does not say who did.

Recipients and identities are 32 bytes in Bech32 (BIP 173), "age1..." and "AGE-SECRET-KEY-1...".

Invariants: nothing of a chunk is returned before it is authenticated; the last chunk is checked
before anything is read. Reading is possible at any offset.
"""

from __future__ import annotations

import hmac
import os
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from typing import BinaryIO, NamedTuple

from etcdlite import private_file
from etcdlite.errors import Explained

VERSION_LINE = b"age-encryption.org/v1"
CHUNK_BYTES = 64 << 10
TAG_BYTES = 16
SEALED_CHUNK_BYTES = CHUNK_BYTES + TAG_BYTES
FILE_KEY_BYTES = 16
NONCE_BYTES = 16
KEY_BYTES = 32
MAX_HEADER_BYTES = 32 << 10
MAX_RECIPIENTS = 20
MAX_IDENTITY_FILE_BYTES = 64 << 10

_RECIPIENT = "age"
_IDENTITY = "age-secret-key-"
_X25519 = b"age-encryption.org/v1/X25519"
_BODY_COLUMNS = 64
_CHARACTERS = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATORS = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)


class AgeError(Explained):
    """A file, recipient or identity cannot be used. The text says why."""


# Keys.


class Identity(NamedTuple):
    """A private key."""

    secret: bytes

    def __repr__(self) -> str:
        return f"Identity({self.recipient})"

    @property
    def text(self) -> str:
        return _bech32(_IDENTITY, self.secret).upper()

    @property
    def public(self) -> bytes:
        from nacl import bindings

        return bytes(bindings.crypto_scalarmult_base(self.secret))

    @property
    def recipient(self) -> str:
        """The public key, as text."""
        return _bech32(_RECIPIENT, self.public)


def new_identity() -> Identity:
    return Identity(os.urandom(KEY_BYTES))


def parse_recipient(text: str) -> bytes:
    """The public key. Raises AgeError."""
    if text.upper().startswith(_IDENTITY.upper()):
        raise AgeError("it is a private key (AGE-SECRET-KEY-...); give the public key, age1...")
    public = _unbech32(_RECIPIENT, text)
    if public is None:
        raise AgeError("it is no public key of age (age1... with 62 characters)")
    return public


def read_identities(path: str) -> list[Identity]:
    """The identities in a private file: one in each line; empty lines and those that begin with "#"
    are skipped. Raises AgeError, PrivateFileError."""
    data = private_file.read(path, MAX_IDENTITY_FILE_BYTES)
    identities = []
    for number, line in enumerate(data.decode("ascii", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        secret = _unbech32(_IDENTITY, line.strip())
        if secret is None:
            raise AgeError(f"line {number} of {path} is no identity (AGE-SECRET-KEY-1...)")
        identities.append(Identity(secret))
    if not identities:
        raise AgeError(f"{path} has no identity; make one with 'etcdlite-ctl key identity FILE'")
    return identities


# Encryption.


class Encryptor:
    """Writes an encrypted file as its content arrives, at most a chunk behind. Raises OSError of
    `file`, and AgeError for a bad recipient."""

    def __init__(self, file: BinaryIO, recipients: Sequence[bytes]) -> None:
        if not 1 <= len(recipients) <= MAX_RECIPIENTS:
            raise AgeError(f"{len(recipients)} recipients; give 1 to {MAX_RECIPIENTS}")
        self._file = file
        file_key = os.urandom(FILE_KEY_BYTES)
        lines = [VERSION_LINE]
        for recipient in recipients:
            lines += _wrap(file_key, recipient)
        header = b"\n".join((*lines, b"---"))
        nonce = os.urandom(NONCE_BYTES)
        file.write(header + b" " + _base64(_mac(file_key, header)) + b"\n" + nonce)
        self._key = _hkdf(file_key, nonce, b"payload")
        self._waiting = b""
        self._chunk = 0

    def write(self, data: bytes) -> None:
        """Append content."""
        waiting = self._waiting + data
        at = 0
        # The last chunk must be known as such, so a full one waits for what follows.
        while len(waiting) - at > CHUNK_BYTES:
            self._write_chunk(waiting[at : at + CHUNK_BYTES], False)
            at += CHUNK_BYTES
        self._waiting = waiting[at:]

    def finish(self) -> None:
        """Write the last chunk."""
        self._write_chunk(self._waiting, True)

    def _write_chunk(self, content: bytes, is_last: bool) -> None:
        self._file.write(_seal(content, _chunk_nonce(self._chunk, is_last), self._key))
        self._chunk += 1


# Decryption.


class DecryptedFile:
    """The content of an encrypted file, with the methods `read` and `seek` of a file."""

    def __init__(self, file: BinaryIO, identities: Iterable[Identity]) -> None:
        """Checks header and last chunk. Raises AgeError, OSError."""
        self._file = file
        head = file.read(MAX_HEADER_BYTES)
        stanzas, header, mac, end = _parse_header(head)
        file_key = _unwrap(stanzas, identities)
        if not hmac.compare_digest(_mac(file_key, header), mac):
            raise AgeError("its header was changed")
        nonce = head[end : end + NONCE_BYTES]
        self._begin = end + NONCE_BYTES
        sealed_bytes = file.seek(0, os.SEEK_END) - self._begin
        self._chunks = -(-sealed_bytes // SEALED_CHUNK_BYTES)
        if len(nonce) < NONCE_BYTES or sealed_bytes < TAG_BYTES:
            raise AgeError("it is cut off")
        self._key = _hkdf(file_key, nonce, b"payload")
        self._cached = -1
        self._content = b""
        self._position = 0
        last = self._read_chunk(self._chunks - 1)
        if not last and self._chunks > 1:
            raise AgeError("its last chunk is empty")
        self.size_bytes = (self._chunks - 1) * CHUNK_BYTES + len(last)

    def read(self, size_bytes: int) -> bytes:
        """As `read` of a file. Raises AgeError, OSError."""
        end = min(self._position + size_bytes, self.size_bytes)
        parts = []
        while self._position < end:
            number, at = divmod(self._position, CHUNK_BYTES)
            part = self._read_chunk(number)[at : at + end - self._position]
            parts.append(part)
            self._position += len(part)
        return b"".join(parts)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset from the beginning, or with SEEK_END from the end; returns it."""
        self._position = offset + (self.size_bytes if whence == os.SEEK_END else 0)
        return self._position

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> DecryptedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_chunk(self, number: int) -> bytes:
        if number != self._cached:
            self._file.seek(self._begin + number * SEALED_CHUNK_BYTES)
            sealed = self._file.read(SEALED_CHUNK_BYTES)
            content = _open(sealed, _chunk_nonce(number, number == self._chunks - 1), self._key)
            if content is None:
                raise AgeError(
                    f"chunk {number} of {self._chunks} was changed, or the file is cut off"
                )
            self._cached, self._content = number, content
        return self._content


def is_encrypted(head: bytes) -> bool:
    """Whether the file that begins with `head` is one of age."""
    return head.startswith(VERSION_LINE[:19])


# The header.


def _wrap(file_key: bytes, recipient: bytes) -> list[bytes]:
    """The lines of the stanza of a recipient. Raises AgeError."""
    ephemeral = Identity(os.urandom(KEY_BYTES))
    share = ephemeral.public
    secret = _shared_secret(ephemeral.secret, recipient)
    if secret is None:
        raise AgeError("the public key is none to which anything can be encrypted")
    body = _seal(file_key, bytes(12), _hkdf(secret, share + recipient, _X25519))
    return [b"-> X25519 " + _base64(share), _base64(body)]


def _unwrap(stanzas: list[tuple[list[bytes], bytes]], identities: Iterable[Identity]) -> bytes:
    """The file key. Raises AgeError."""
    for identity in identities:
        public = identity.public
        for arguments, body in stanzas:
            if arguments[0] != b"X25519":
                continue
            share = _unbase64(arguments[1]) if len(arguments) == 2 else None
            if share is None or len(share) != KEY_BYTES or len(body) != FILE_KEY_BYTES + TAG_BYTES:
                raise AgeError("its header is damaged")
            secret = _shared_secret(identity.secret, share)
            if secret is None:
                raise AgeError("its header is damaged")
            file_key = _open(body, bytes(12), _hkdf(secret, share + public, _X25519))
            if file_key is not None:
                return file_key
    raise AgeError("it is encrypted to other public keys than that of the identity given")


def _parse_header(head: bytes) -> tuple[list[tuple[list[bytes], bytes]], bytes, bytes, int]:
    """Returns the stanzas, (arguments, body) each; the part of the header that its MAC covers; the
    MAC; and the offset of what follows. Raises AgeError."""
    lines = head.split(b"\n")
    if lines[0] != VERSION_LINE:
        raise AgeError("it is not encrypted with age, or with a newer version of it")
    stanzas: list[tuple[list[bytes], bytes]] = []
    at, offset = 1, len(VERSION_LINE) + 1
    while at < len(lines) - 1:
        line = lines[at]
        at += 1
        if line.startswith(b"--- "):
            mac = _unbase64(line[4:])
            if mac is None or len(mac) != 32 or not stanzas:
                break
            return stanzas, head[: offset + 3], mac, offset + len(line) + 1
        arguments = line.split(b" ")[1:]
        if not line.startswith(b"-> ") or not all(arguments):
            break
        offset += len(line) + 1
        text, columns = b"", _BODY_COLUMNS
        while columns == _BODY_COLUMNS and at < len(lines) - 1:
            text += lines[at]
            columns = len(lines[at])
            offset += columns + 1
            at += 1
        body = _unbase64(text)
        if body is None or columns >= _BODY_COLUMNS:
            break
        stanzas.append((arguments, body))
    raise AgeError("its header is damaged, or it is cut off")


# Primitives.


def _mac(file_key: bytes, header: bytes) -> bytes:
    return hmac.digest(_hkdf(file_key, b"", b"header"), header, "sha256")


def _hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """32 bytes of HKDF-SHA-256 (RFC 5869)."""
    return hmac.digest(hmac.digest(salt or bytes(32), secret, "sha256"), info + b"\1", "sha256")


def _chunk_nonce(number: int, is_last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes((is_last,))


def _seal(content: bytes, nonce: bytes, key: bytes) -> bytes:
    from etcdlite import aead

    return aead.encrypt(content, b"", nonce, key)


def _open(sealed: bytes, nonce: bytes, key: bytes) -> bytes | None:
    """None if it was not sealed with this key and nonce."""
    from etcdlite import aead

    try:
        return aead.decrypt(sealed, b"", nonce, key)
    except aead.CryptoError:
        return None


def _shared_secret(secret: bytes, public: bytes) -> bytes | None:
    """X25519 (RFC 7748); None if the public key is of low order."""
    from nacl import bindings, exceptions

    try:
        shared = bytes(bindings.crypto_scalarmult(secret, public))
    except exceptions.RuntimeError:
        return None
    return shared if any(shared) else None


def _base64(data: bytes) -> bytes:
    return b64encode(data).rstrip(b"=")


def _unbase64(text: bytes) -> bytes | None:
    """None unless it is what `_base64` would have written."""
    try:
        data = b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except ValueError:
        return None
    return data if _base64(data) == text else None


def _checksum(values: list[int]) -> int:
    """The polymod of BIP 173."""
    checksum = 1
    for value in values:
        top = checksum >> 25
        checksum = (checksum & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate(_GENERATORS):
            if top >> bit & 1:
                checksum ^= generator
    return checksum


def _expanded(prefix: str) -> list[int]:
    codes = prefix.encode()
    return [code >> 5 for code in codes] + [0] + [code & 31 for code in codes]


def _bech32(prefix: str, data: bytes) -> str:
    bits = len(data) * 8
    number = int.from_bytes(data, "big") << -bits % 5
    values = [number >> shift & 31 for shift in range(bits + -bits % 5 - 5, -1, -5)]
    rest = _checksum([*_expanded(prefix), *values, 0, 0, 0, 0, 0, 0]) ^ 1
    values += [rest >> 5 * (5 - at) & 31 for at in range(6)]
    return prefix + "1" + "".join(_CHARACTERS[value] for value in values)


def _unbech32(prefix: str, text: str) -> bytes | None:
    """The 32 bytes; None if it is something else."""
    lower = text.lower()
    found, _, data = lower.rpartition("1")
    if text not in (lower, text.upper()) or found != prefix or len(data) != 52 + 6:
        return None
    values = [_CHARACTERS.find(character) for character in data]
    if min(values) < 0 or _checksum(_expanded(prefix) + values) != 1:
        return None
    number = 0
    for value in values[:-6]:
        number = number << 5 | value
    return None if number & 15 else (number >> 4).to_bytes(KEY_BYTES, "big")
