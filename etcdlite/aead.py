"""ChaCha20-Poly1305 (RFC 8439), by libsodium.

pynacl's functions check their arguments and format error messages at each call, needed or not. That
takes 8 µs of the 11 µs for a message of 100 bytes, and several times as much on a busy machine. So
libsodium is called in the way in which they call it, if this pynacl has what they use for it; else
through them.
"""

from __future__ import annotations

from nacl.bindings import (
    crypto_aead_chacha20poly1305_ietf_decrypt,
    crypto_aead_chacha20poly1305_ietf_encrypt,
)
from nacl.exceptions import CryptoError

try:
    from nacl._sodium import ffi, lib
except ImportError:  # A pynacl that is built in another way.
    lib = None

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16

__all__ = ["CryptoError", "decrypt", "encrypt"]


def encrypt(plaintext: bytes, ad: bytes, nonce: bytes, key: bytes) -> bytes:
    """The ciphertext and its tag. The nonce has 12 bytes, the key 32."""
    if lib is None:
        return crypto_aead_chacha20poly1305_ietf_encrypt(plaintext, ad, nonce, key)
    assert len(nonce) == NONCE_BYTES and len(key) == KEY_BYTES
    size = len(plaintext)
    sealed = ffi.new("unsigned char[]", size + TAG_BYTES)
    lib.crypto_aead_chacha20poly1305_ietf_encrypt(
        sealed, ffi.NULL, plaintext, size, ad, len(ad), ffi.NULL, nonce, key
    )
    return ffi.buffer(sealed)[:]


def decrypt(ciphertext: bytes, ad: bytes, nonce: bytes, key: bytes) -> bytes:
    """The plaintext. Raises CryptoError if the ciphertext is not authentic."""
    size = len(ciphertext)
    if size < TAG_BYTES:
        raise CryptoError("the ciphertext is shorter than its tag")
    if lib is None:
        return crypto_aead_chacha20poly1305_ietf_decrypt(ciphertext, ad, nonce, key)
    assert len(nonce) == NONCE_BYTES and len(key) == KEY_BYTES
    # An array of no bytes has no address that C may be given.
    opened = ffi.new("unsigned char[]", size - TAG_BYTES or 1)
    failed = lib.crypto_aead_chacha20poly1305_ietf_decrypt(
        opened, ffi.NULL, ffi.NULL, ciphertext, size, ad, len(ad), nonce, key
    )
    if failed:
        raise CryptoError("the ciphertext is not authentic")
    return ffi.buffer(opened, size - TAG_BYTES)[:]
