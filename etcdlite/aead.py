"""ChaCha20-Poly1305 (RFC 8439) and XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha), by libsodium.

Each function takes a message, the additional data, the nonce (12 bytes; 24 for XChaCha20) and the
key. What `encrypt` returns ends with the tag.
"""

from __future__ import annotations

from nacl import bindings
from nacl.exceptions import CryptoError

KEY_BYTES = 32
TAG_BYTES = 16

encrypt = bindings.crypto_aead_chacha20poly1305_ietf_encrypt
encrypt_x = bindings.crypto_aead_xchacha20poly1305_ietf_encrypt


def decrypt(ciphertext: bytes, ad: bytes, nonce: bytes, key: bytes) -> bytes:
    """The plaintext. Raises CryptoError if the ciphertext is not authentic."""
    _check_size(ciphertext)
    return bindings.crypto_aead_chacha20poly1305_ietf_decrypt(ciphertext, ad, nonce, key)


def decrypt_x(ciphertext: bytes, ad: bytes, nonce: bytes, key: bytes) -> bytes:
    """As `decrypt`, with a nonce that is long enough to be random."""
    _check_size(ciphertext)
    return bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(ciphertext, ad, nonce, key)


def _check_size(ciphertext: bytes) -> None:
    if len(ciphertext) < TAG_BYTES:
        raise CryptoError("the ciphertext is shorter than its tag")
