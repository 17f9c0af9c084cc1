"""ChaCha20-Poly1305 (RFC 8439) and XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha), by libsodium.

pynacl's functions check their arguments and format error messages at each call, needed or not. That
takes 8 µs of the 11 µs for a message of 100 bytes, and several times as much on a busy machine. So
libsodium is called in the way in which they call it, if this pynacl has what they use for it; else
through them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nacl import bindings
from nacl.exceptions import CryptoError

try:
    from nacl._sodium import ffi, lib
except ImportError:  # A pynacl that is built in another way.
    lib = None

KEY_BYTES = 32
NONCE_BYTES = 12
X_NONCE_BYTES = 24
TAG_BYTES = 16

__all__ = ["CryptoError", "decrypt", "decrypt_x", "encrypt", "encrypt_x"]

Function = Callable[[bytes, bytes, bytes, bytes], bytes]
"""Takes a message, the additional data, the nonce and the key of 32 bytes."""


def _encryption(name: str, nonce_bytes: int) -> Function:
    slow: Function = getattr(bindings, name)
    fast: Any = getattr(lib, name, None)

    def encrypt(plaintext: bytes, ad: bytes, nonce: bytes, key: bytes) -> bytes:
        """The ciphertext and its tag."""
        if lib is None or fast is None:
            return slow(plaintext, ad, nonce, key)
        assert len(nonce) == nonce_bytes and len(key) == KEY_BYTES
        size = len(plaintext)
        sealed = ffi.new("unsigned char[]", size + TAG_BYTES)
        fast(sealed, ffi.NULL, plaintext, size, ad, len(ad), ffi.NULL, nonce, key)
        return ffi.buffer(sealed)[:]

    return encrypt


def _decryption(name: str, nonce_bytes: int) -> Function:
    slow: Function = getattr(bindings, name)
    fast: Any = getattr(lib, name, None)

    def decrypt(ciphertext: bytes, ad: bytes, nonce: bytes, key: bytes) -> bytes:
        """The plaintext. Raises CryptoError if the ciphertext is not authentic."""
        size = len(ciphertext)
        if size < TAG_BYTES:
            raise CryptoError("the ciphertext is shorter than its tag")
        if lib is None or fast is None:
            return slow(ciphertext, ad, nonce, key)
        assert len(nonce) == nonce_bytes and len(key) == KEY_BYTES
        # An array of no bytes has no address that C may be given.
        opened = ffi.new("unsigned char[]", size - TAG_BYTES or 1)
        if fast(opened, ffi.NULL, ffi.NULL, ciphertext, size, ad, len(ad), nonce, key):
            raise CryptoError("the ciphertext is not authentic")
        return ffi.buffer(opened, size - TAG_BYTES)[:]

    return decrypt


encrypt = _encryption("crypto_aead_chacha20poly1305_ietf_encrypt", NONCE_BYTES)
decrypt = _decryption("crypto_aead_chacha20poly1305_ietf_decrypt", NONCE_BYTES)
encrypt_x = _encryption("crypto_aead_xchacha20poly1305_ietf_encrypt", X_NONCE_BYTES)
decrypt_x = _decryption("crypto_aead_xchacha20poly1305_ietf_decrypt", X_NONCE_BYTES)
