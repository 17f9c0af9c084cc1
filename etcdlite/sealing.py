"""Sealing: encryption of what lies on the disk, and the keys for it.

A piece of a file is sealed with XChaCha20-Poly1305 (`aead.py`) and bound to its place: it can be
opened only with the same key and as the piece of the same file at the same place.

    sealed piece: nonce (24 bytes), ciphertext (as long as the text), tag (16 bytes)
    associated data: the `place`, which names the kind of piece, the file and where in it

The nonce is random, for each piece and each time. So no nonce comes twice, whatever happens to
files: a torn write is written again with other content, an old copy of a disk or of a virtual
machine runs on, two members share a key. (Among 2**64 nonces of 192 bits, two are equal with a
probability of less than 2**-64.)

The file of keys (`encryption-key-file`) is ASCII text of at most `MAX_FILE_BYTES`. Empty lines, and
lines that begin with "#", are skipped. Each other line is one key:

    etcdlite-key-1:BASE64       32 random bytes in standard base64 (RFC 4648 section 4), padded

There are 1 to `MAX_KEYS`. The first one writes; all of them read.

A file says with which key it is sealed by the key's id: 8 bytes of BLAKE2b with the key as its key
and "etcdlite key id" as its personalization (RFC 7693). The id leads to no key, because there are
2**256, and is shown in messages.

pynacl is imported when the first key is made, so a member without keys does not load it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from etcdlite import private_file
from etcdlite.errors import MayPass

PREFIX = "etcdlite-key-1:"
KEY_BYTES = private_file.SECRET_BYTES
ID_BYTES = 8
NONCE_BYTES = 24
TAG_BYTES = 16
OVERHEAD_BYTES = NONCE_BYTES + TAG_BYTES
"""A sealed piece is this much longer than its text."""

MAX_KEYS = 16
MAX_FILE_BYTES = 16 << 10


class KeyFileError(MayPass):
    """The file of keys cannot be used. The text names the file, the reason and the remedy."""


class SealBroken(Exception):
    """A sealed piece was not made with this key for this place, or was changed since."""


class Key:
    """One key. `random_bytes(n)` makes the nonces."""

    __slots__ = ("_broken", "_decrypt", "_encrypt", "_secret", "id", "random_bytes")

    def __init__(self, secret: bytes, random_bytes: Callable[[int], bytes] = os.urandom) -> None:
        from nacl import bindings

        from etcdlite import aead

        if len(secret) != KEY_BYTES:
            raise ValueError(f"a key of {len(secret)} bytes")
        self.id: bytes = bindings.crypto_generichash_blake2b_salt_personal(
            b"", ID_BYTES, key=secret, person=b"etcdlite key id"
        )
        self._secret = secret
        self.random_bytes = random_bytes
        self._encrypt = aead.encrypt_x
        self._decrypt = aead.decrypt_x
        self._broken = aead.CryptoError

    def __repr__(self) -> str:
        return f"Key({self.id.hex()})"

    def seal(self, text: bytes, place: bytes) -> bytes:
        nonce = self.random_bytes(NONCE_BYTES)
        return nonce + self._encrypt(text, place, nonce, self._secret)

    def open(self, data: bytes, place: bytes, at: int = 0, end: int | None = None) -> bytes:
        """The text of the sealed piece that `data` has between two offsets. Raises SealBroken."""
        text_at = at + NONCE_BYTES
        nonce = data[at:text_at]
        if len(nonce) < NONCE_BYTES:
            raise SealBroken
        try:
            return self._decrypt(data[text_at:end], place, nonce, self._secret)
        except self._broken:
            raise SealBroken from None


class Keyring:
    """The keys of a member: `first` writes, all of them read. `path` is the file they are from."""

    def __init__(self, keys: Iterable[Key], path: str = "") -> None:
        self._by_id = {key.id: key for key in keys}
        self.first = next(iter(self._by_id.values()))
        self.path = path

    def find(self, key_id: bytes) -> Key | None:
        return self._by_id.get(key_id)

    @property
    def ids(self) -> list[bytes]:
        """The first one first."""
        return list(self._by_id)


def ids_text(ids: Iterable[bytes]) -> str:
    """Key ids, to be shown."""
    return ", ".join(key_id.hex() for key_id in ids) or "none"


def new_key() -> tuple[bytes, str]:
    """A new key: its id and its line for a file of keys."""
    secret = os.urandom(KEY_BYTES)
    return Key(secret).id, private_file.secret_line(PREFIX, secret)


def read(path: str) -> Keyring:
    """The keys in a file. Raises KeyFileError."""
    try:
        secrets = private_file.read_secrets(path, PREFIX, "key", MAX_KEYS, MAX_FILE_BYTES)
    except private_file.PrivateFileError as failure:
        raise KeyFileError(f"encryption-key-file: {failure}") from failure
    return Keyring(map(Key, secrets), path)
