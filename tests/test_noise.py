"""The Noise handshake: a published test vector, another implementation, and what must fail."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etcdlite import aead
from etcdlite.noise import MAX_NONCE, PROTOCOL_NAME, TAG_BYTES, CipherState, Handshake, NoiseError

PSK = bytes(range(32))

# From cacophony, whose vectors snow and other implementations use too:
# https://github.com/haskell-cryptography/cacophony, vectors/cacophony.txt.
VECTOR_NAME = b"Noise_NNpsk0_25519_ChaChaPoly_SHA256"
VECTOR_PROLOGUE = bytes.fromhex("4a6f686e2047616c74")
VECTOR_PSK = bytes.fromhex("54686973206973206d7920417573747269616e20706572737065637469766521")
VECTOR_EPHEMERALS = (
    bytes.fromhex("893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a"),
    bytes.fromhex("bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b"),
)
VECTOR_HASH = bytes.fromhex("f4d03dc34495c95729ea6de9e1b59004b59733102488b3e24bc441e0be208eaf")
VECTOR_MESSAGES = [
    (
        "4c756477696720766f6e204d69736573",
        "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c7944"
        "79b962b8aff8485742ac32f905ba45369e2465fb59e138a93d67a0d1266b6a54",
    ),
    (
        "4d757272617920526f746862617264",
        "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f144808843"
        "d6062704d5a9c422a8e834423f8c1feada7e8d0d910a1a2cd030fb584221e3",
    ),
    (
        "462e20412e20486179656b",
        "e632c3763d7669067383433197a3baddf146e9e70ad4b4e9e59e0f",
    ),
    (
        "4361726c204d656e676572",
        "64c6bee32ea91c8474bb4c21d7a700109ad45af77b29764ba5eb1e",
    ),
    (
        "4a65616e2d426170746973746520536179",
        "e2fa0bed0603b62d3ccac2ecabbf3fe33f3e86514909b323361626266cb2471cc8",
    ),
    (
        "457567656e2042f6686d20766f6e2042617765726b",
        "0c01dc9cec1fe4ddd692e8dd32188aa351088dc91183639a53b57aa4692b5ebdef8b8ca111",
    ),
]


def test_the_published_vector_is_met_to_the_byte() -> None:
    assert PROTOCOL_NAME == VECTOR_NAME
    sides = [
        Handshake(is_initiator, VECTOR_PSK, VECTOR_PROLOGUE, ephemeral)
        for is_initiator, ephemeral in zip((True, False), VECTOR_EPHEMERALS, strict=True)
    ]
    messages = [(bytes.fromhex(payload), bytes.fromhex(sent)) for payload, sent in VECTOR_MESSAGES]
    for number, (payload, sent) in enumerate(messages[:2]):
        assert sides[number].write(payload) == sent
        assert sides[1 - number].read(sent) == payload
    assert sides[0].hash == sides[1].hash == VECTOR_HASH
    ciphers = [side.split() for side in sides]
    for number, (payload, sent) in enumerate(messages[2:]):
        writer, reader = ciphers[number % 2], ciphers[1 - number % 2]
        assert writer[0].encrypt(payload) == sent
        assert reader[1].decrypt(sent) == payload


@pytest.mark.parametrize("is_initiator", [True, False])
@settings(deadline=None)
@given(prologue=st.binary(max_size=40), payloads=st.lists(st.binary(max_size=80), min_size=8))
def test_it_speaks_with_an_independent_implementation(
    is_initiator: bool, prologue: bytes, payloads: list[bytes]
) -> None:
    connection = pytest.importorskip("noise.connection", reason="needs noiseprotocol from PyPI")
    other = connection.NoiseConnection.from_name(PROTOCOL_NAME)
    other.set_psks(PSK)
    other.set_prologue(prologue)
    if is_initiator:
        other.set_as_responder()
    else:
        other.set_as_initiator()
    other.start_handshake()
    own = Handshake(is_initiator, PSK, prologue)
    for number in range(2):
        if (number == 0) == is_initiator:
            assert other.read_message(own.write(payloads[number])) == payloads[number]
        else:
            assert own.read(bytes(other.write_message(payloads[number]))) == payloads[number]
    send, receive = own.split()
    assert other.get_handshake_hash() == own.hash
    for number, payload in enumerate(payloads[2:]):
        if number == 3:
            for cipher, rekey in (
                (send, "rekey_inbound_cipher"),
                (receive, "rekey_outbound_cipher"),
            ):
                cipher.rekey()
                getattr(other, rekey)()
        assert other.decrypt(send.encrypt(payload)) == payload
        assert receive.decrypt(other.encrypt(payload)) == payload


def pair(
    psks: tuple[bytes, bytes] = (PSK, PSK), prologues: tuple[bytes, bytes] = (b"", b"")
) -> tuple[Handshake, Handshake]:
    return Handshake(True, psks[0], prologues[0]), Handshake(False, psks[1], prologues[1])


def test_another_secret_is_noticed_in_the_first_message() -> None:
    initiator, responder = pair(psks=(PSK, os.urandom(32)))
    with pytest.raises(NoiseError, match="not authentic"):
        responder.read(initiator.write(b"hello"))


def test_another_prologue_is_noticed_in_the_first_message() -> None:
    initiator, responder = pair(prologues=(b"1", b"2"))
    with pytest.raises(NoiseError, match="not authentic"):
        responder.read(initiator.write(b"hello"))


@settings(deadline=None)
@given(st.integers(0, 1), st.integers(0, 63), st.integers(1, 255))
def test_a_changed_byte_of_a_message_is_noticed(which: int, at: int, change: int) -> None:
    initiator, responder = pair()
    first = bytearray(initiator.write(bytes(16)))
    if which == 0:
        first[at] ^= change
        with pytest.raises(NoiseError):
            responder.read(bytes(first))
        return
    responder.read(bytes(first))
    second = bytearray(responder.write(bytes(16)))
    second[at] ^= change
    with pytest.raises(NoiseError):
        initiator.read(bytes(second))


def test_the_answer_to_another_session_is_refused() -> None:
    initiator, responder = pair()
    other_initiator, _ = pair()
    responder.read(initiator.write(b""))
    other_initiator.write(b"")
    with pytest.raises(NoiseError):
        other_initiator.read(responder.write(b""))


def test_a_side_does_not_take_its_own_message() -> None:
    initiator, _ = pair()
    message = initiator.write(b"")
    with pytest.raises(NoiseError):
        initiator.read(message)


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_a_key_of_low_order_is_refused(point: bytes) -> None:
    """Whoever knows the secret could send one; the session key would not be secret."""
    _, responder = pair()
    # What a holder of the secret that chooses this key computes as its first message.
    forged = Handshake(True, PSK, b"")
    forged._mix_ephemeral(point)
    responder.read(point + forged._cipher.encrypt(b"", forged.hash))
    with pytest.raises(NoiseError, match="ephemeral key is invalid"):
        responder.write(b"")


def test_the_order_of_the_pattern_is_enforced() -> None:
    initiator, responder = pair()
    for wrong in (
        lambda: responder.write(b""),
        lambda: initiator.read(bytes(64)),
        initiator.split,
        responder.split,
    ):
        with pytest.raises(NoiseError):
            wrong()
    first = initiator.write(b"")
    with pytest.raises(NoiseError):
        initiator.write(b"")
    responder.read(first)
    with pytest.raises(NoiseError):
        responder.read(first)
    initiator.read(responder.write(b""))
    initiator.split()
    with pytest.raises(NoiseError):
        initiator.split()


def test_nonces_end_before_the_reserved_one() -> None:
    cipher = CipherState(PSK, MAX_NONCE - 1)
    sealed = cipher.encrypt(b"last")
    with pytest.raises(NoiseError, match="nonces"):
        cipher.encrypt(b"one more")
    other = CipherState(PSK, MAX_NONCE - 1)
    assert other.decrypt(sealed) == b"last"
    with pytest.raises(NoiseError, match="nonces"):
        other.decrypt(sealed)


@settings(deadline=None)
@given(st.binary(max_size=TAG_BYTES + 20))
def test_junk_does_not_decrypt(junk: bytes) -> None:
    cipher = CipherState(PSK)
    with pytest.raises(NoiseError):
        cipher.decrypt(junk)
    assert cipher.nonce == 0


def test_a_new_key_keeps_the_nonces_and_opens_nothing_old() -> None:
    cipher, other = CipherState(PSK), CipherState(PSK)
    old = cipher.encrypt(b"old")
    other.rekey()
    with pytest.raises(NoiseError):
        other.decrypt(old)
    cipher.rekey()
    assert cipher.nonce == 1
    other.nonce = 1
    assert other.decrypt(cipher.encrypt(b"new")) == b"new"


# From RFC 8439, section 2.8.2.
RFC_PLAINTEXT = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    b"sunscreen would be it."
)
RFC_AD = bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
RFC_KEY = bytes(range(0x80, 0xA0))
RFC_NONCE = bytes.fromhex("070000004041424344454647")
RFC_TAG = bytes.fromhex("1ae10b594f09e26a7e902ecbd0600691")


def test_the_cipher_is_that_of_the_rfc() -> None:
    sealed = aead.encrypt(RFC_PLAINTEXT, RFC_AD, RFC_NONCE, RFC_KEY)
    assert sealed[-16:] == RFC_TAG
    assert sealed[:8] == bytes.fromhex("d31a8d34648e60db")
    assert aead.decrypt(sealed, RFC_AD, RFC_NONCE, RFC_KEY) == RFC_PLAINTEXT
    for wrong in (
        (sealed[:-1], RFC_AD, RFC_NONCE, RFC_KEY),
        (sealed[:15], RFC_AD, RFC_NONCE, RFC_KEY),
        (b"", RFC_AD, RFC_NONCE, RFC_KEY),
        (sealed, RFC_AD[1:], RFC_NONCE, RFC_KEY),
        (sealed, RFC_AD, bytes(12), RFC_KEY),
        (sealed, RFC_AD, RFC_NONCE, bytes(32)),
    ):
        with pytest.raises(aead.CryptoError):
            aead.decrypt(*wrong)
    # draft-irtf-cfrg-xchacha-03, A.3.1.
    nonce = bytes(range(0x40, 0x58))
    sealed = aead.encrypt_x(RFC_PLAINTEXT, RFC_AD, nonce, RFC_KEY)
    assert sealed[-16:] == bytes.fromhex("c0875924c1c7987947deafd8780acf49")
    assert sealed[:8] == bytes.fromhex("bd6d179d3e83d43b")
    assert aead.decrypt_x(sealed, RFC_AD, nonce, RFC_KEY) == RFC_PLAINTEXT
    with pytest.raises(aead.CryptoError):
        aead.decrypt_x(sealed, RFC_AD, bytes(24), RFC_KEY)
    for size in (0, 1, 15, 16, 17, 65_519):
        plaintext = bytes(range(256)) * 256
        sealed = aead.encrypt(plaintext[:size], b"", RFC_NONCE, RFC_KEY)
        assert len(sealed) == size + 16
        assert aead.decrypt(sealed, b"", RFC_NONCE, RFC_KEY) == plaintext[:size]
    for wrong_size in ((bytes(11), RFC_KEY), (RFC_NONCE, bytes(31))):
        with pytest.raises(Exception):  # noqa: B017
            aead.encrypt(b"", b"", *wrong_size)
