"""The handshake `Noise_NNpsk0_25519_ChaChaPoly_SHA256` and its ciphers: pure computation.

Source: "The Noise Protocol Framework", revision 34 (noiseprotocol.org/noise.html). The names are
those of its section 5: CipherState (5.1), SymmetricState (5.2), HandshakeState (5.3); rekey is of
section 11.3 and psk of section 9. The primitives are libsodium's, through pynacl: X25519 (RFC 7748)
and ChaCha20-Poly1305 (`aead.py`); SHA-256 and HMAC are Python's. The pattern:

    NNpsk0:
      -> psk, e        32 bytes, the payload, a tag of 16 bytes
      <- e, ee         32 bytes, the payload, a tag of 16 bytes

Both sides know the 32 bytes of the psk. The first message is checked with the psk alone, before any
Diffie-Hellman step. It can be replayed; so what it says holds only when a transport message of the
initiator has come: that proves a fresh session. The second message proves to the initiator that the
responder knows the psk and has read this first message. The keys of the session depend on both
ephemeral keys, which are forgotten: a psk that leaks later opens no recorded session.

Python cannot overwrite the memory of a key; it is only released.
"""

from __future__ import annotations

import hmac
import os
import struct
from hashlib import sha256

from nacl.bindings import crypto_scalarmult, crypto_scalarmult_base
from nacl.exceptions import RuntimeError as SodiumError

from etcdlite.aead import KEY_BYTES, TAG_BYTES, CryptoError, decrypt, encrypt

PROTOCOL_NAME = b"Noise_NNpsk0_25519_ChaChaPoly_SHA256"

MESSAGE_OVERHEAD = KEY_BYTES + TAG_BYTES
"""What a message of the handshake has besides its payload."""

MAX_MESSAGE_BYTES = 65_535
"""Of a handshake or transport message, as in the specification."""

MAX_NONCE = 2**64 - 1
"""Reserved for `rekey`: no message is encrypted with it."""

_NONCE = struct.Struct("<IQ")
"""4 bytes of zeros and the number (12.3)."""


class NoiseError(Exception):
    """A message is not authentic, or the state does not allow what was asked."""


class CipherState:
    """A key and the nonce of its next message (5.1)."""

    __slots__ = ("_key", "nonce")

    def __init__(self, key: bytes, nonce: int = 0) -> None:
        assert len(key) == KEY_BYTES
        self._key = key
        self.nonce = nonce

    def encrypt(self, plaintext: bytes, ad: bytes = b"") -> bytes:
        """The ciphertext and its tag. Raises NoiseError if the nonces are used up."""
        sealed = encrypt(plaintext, ad, self._next_nonce(), self._key)
        self.nonce += 1
        return sealed

    def decrypt(self, ciphertext: bytes, ad: bytes = b"") -> bytes:
        """The plaintext. Raises NoiseError if the ciphertext is not authentic in this place; the
        nonce is then unchanged, as the specification wants."""
        try:
            plaintext = decrypt(ciphertext, ad, self._next_nonce(), self._key)
        except CryptoError as failure:
            raise NoiseError("a message is not authentic") from failure
        self.nonce += 1
        return plaintext

    def _next_nonce(self) -> bytes:
        if self.nonce >= MAX_NONCE:
            raise NoiseError("all nonces are used")
        return _NONCE.pack(0, self.nonce)

    def rekey(self) -> None:
        """Replace the key by one that does not lead back to it (4.2, 11.3). The nonces go on."""
        self._key = encrypt(bytes(KEY_BYTES), b"", _NONCE.pack(0, MAX_NONCE), self._key)[:KEY_BYTES]


def hkdf(chaining_key: bytes, material: bytes, count: int) -> tuple[bytes, ...]:
    """`count` outputs of 32 bytes (4.3)."""
    temporary = hmac.digest(chaining_key, material, "sha256")
    outputs: list[bytes] = []
    last = b""
    for number in range(1, count + 1):
        last = hmac.digest(temporary, last + bytes((number,)), "sha256")
        outputs.append(last)
    return tuple(outputs)


class Handshake:
    """One side of the handshake (5.2 and 5.3, for this pattern).

    The initiator calls `write`, then `read`; the responder `read`, then `write`; then each calls
    `split`, once. Any other order raises NoiseError."""

    def __init__(
        self, is_initiator: bool, psk: bytes, prologue: bytes, ephemeral: bytes | None = None
    ) -> None:
        """`psk` has 32 bytes. Both sides must have the same `prologue`. `ephemeral` is the private
        key, for test vectors only; it is random otherwise."""
        assert len(psk) == KEY_BYTES
        self._is_initiator = is_initiator
        self._private = ephemeral or os.urandom(KEY_BYTES)
        self._remote = b""
        self._messages = 0
        """The number of messages written and read."""
        self.hash = self._chaining_key = sha256(PROTOCOL_NAME).digest()
        """Identifies the handshake, once it is complete (11.2)."""
        self._mix_hash(prologue)
        # MixKeyAndHash(psk), the first token of the pattern.
        self._chaining_key, temporary, key = hkdf(self._chaining_key, psk, 3)
        self._mix_hash(temporary)
        self._cipher = CipherState(key)

    def write(self, payload: bytes) -> bytes:
        """The next message, with this payload."""
        self._take_turn(self._is_initiator)
        public = crypto_scalarmult_base(self._private)
        self._mix_ephemeral(public)
        if self._messages == 2:
            self._mix_key(self._shared())
        sealed = self._cipher.encrypt(payload, self.hash)
        self._mix_hash(sealed)
        return public + sealed

    def read(self, message: bytes) -> bytes:
        """The payload of the other side's message. Raises NoiseError if it is not authentic."""
        self._take_turn(not self._is_initiator)
        if len(message) < MESSAGE_OVERHEAD:
            raise NoiseError("a message of the handshake is too short")
        self._remote, sealed = message[:KEY_BYTES], message[KEY_BYTES:]
        self._mix_ephemeral(self._remote)
        if self._messages == 2:
            self._mix_key(self._shared())
        payload = self._cipher.decrypt(sealed, self.hash)
        self._mix_hash(sealed)
        return payload

    def split(self) -> tuple[CipherState, CipherState]:
        """The ciphers to send and to receive with."""
        if self._messages != 2:
            raise NoiseError("the handshake is not complete")
        self._messages += 1
        first, second = map(CipherState, hkdf(self._chaining_key, b"", 2))
        self._private = self._chaining_key = b""
        return (first, second) if self._is_initiator else (second, first)

    def _take_turn(self, is_of_initiator: bool) -> None:
        if self._messages != (0 if is_of_initiator else 1):
            raise NoiseError("a message of the handshake is out of turn")
        self._messages += 1

    def _mix_ephemeral(self, public: bytes) -> None:
        """The token e, in a pattern with a psk (9.2)."""
        self._mix_hash(public)
        self._mix_key(public)

    def _shared(self) -> bytes:
        """The token ee."""
        try:
            return crypto_scalarmult(self._private, self._remote)
        except SodiumError as failure:  # The point has a low order.
            raise NoiseError("the other side's ephemeral key is invalid") from failure

    def _mix_hash(self, data: bytes) -> None:
        self.hash = sha256(self.hash + data).digest()

    def _mix_key(self, material: bytes) -> None:
        self._chaining_key, key = hkdf(self._chaining_key, material, 2)
        self._cipher = CipherState(key)
