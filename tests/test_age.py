"""Encrypted backups: the files are age's, and no change of one goes unnoticed."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import pytest

from etcdlite import age
from etcdlite.age import CHUNK_BYTES, AgeError, DecryptedFile, Encryptor, Identity
from etcdlite.private_file import PrivateFileError

pytest.importorskip("nacl", reason="pynacl is not installed")

EXAMPLE = Identity(b"B" * 32)
"""The example of the specification."""
SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 200_000]


def encrypted(content: bytes, *recipients: Identity, step: int = 7777) -> bytes:
    file = io.BytesIO()
    encryptor = Encryptor(file, [identity.public for identity in recipients])
    for at in range(0, len(content), step):
        encryptor.write(content[at : at + step])
    encryptor.finish()
    return file.getvalue()


def decrypted(data: bytes, *identities: Identity) -> bytes:
    return DecryptedFile(io.BytesIO(data), identities).read(1 << 30)


def test_keys_are_written_as_in_the_specification() -> None:
    text = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX"
    recipient = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"
    assert (EXAMPLE.text, EXAMPLE.recipient) == (text, recipient)
    assert age.parse_recipient(recipient) == EXAMPLE.public
    assert text not in repr(EXAMPLE)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_encrypted_is_decrypted(size: int) -> None:
    content = random.Random(size).randbytes(size)
    mine, other = age.new_identity(), age.new_identity()
    data = encrypted(content, other, mine)
    assert age.is_encrypted(data[:64])
    file = DecryptedFile(io.BytesIO(data), [age.new_identity(), mine])
    assert file.size_bytes == file.seek(0, os.SEEK_END) == size
    assert file.read(100) == b""
    for at in random.Random(1).sample(range(size + 1), min(20, size + 1)):
        file.seek(at)
        assert file.read(70_000) == content[at : at + 70_000]
    assert decrypted(data, other) == content


@pytest.mark.parametrize("size", SIZES)
def test_age_and_etcdlite_read_each_others_files(size: int) -> None:
    pyrage = pytest.importorskip("pyrage", reason="pyrage is not installed")
    content = random.Random(size).randbytes(size)
    mine = age.new_identity()
    theirs = pyrage.x25519.Identity.from_str(mine.text)
    assert str(theirs.to_public()) == mine.recipient
    assert pyrage.decrypt(encrypted(content, EXAMPLE, mine), [theirs]) == content
    assert decrypted(pyrage.encrypt(content, [theirs.to_public()]), mine) == content


def test_another_identity_is_refused() -> None:
    with pytest.raises(AgeError, match="other public keys"):
        decrypted(encrypted(b"content", age.new_identity()), EXAMPLE)


def test_a_file_that_is_cut_anywhere_is_refused() -> None:
    data = encrypted(os.urandom(2 * CHUNK_BYTES + 5), EXAMPLE)
    payload = data.index(b"--- ") + 4 + 43 + 1 + 16
    ends = [*range(payload + 20), len(data) - 1, len(data) - 21, len(data) - 22]
    ends += [payload + n * (CHUNK_BYTES + 16) + more for n in (1, 2) for more in (-1, 0, 1, 16, 17)]
    for end in ends:
        with pytest.raises(AgeError):
            decrypted(data[:end], EXAMPLE)
    with pytest.raises(AgeError):
        decrypted(data + b"x", EXAMPLE)


def test_a_chunk_that_is_swapped_left_out_or_doubled_is_refused() -> None:
    content = os.urandom(5 * CHUNK_BYTES)
    data, other = encrypted(content, EXAMPLE), encrypted(content, EXAMPLE)
    payload = data.index(b"--- ") + 4 + 43 + 1 + 16
    size = CHUNK_BYTES + 16
    chunks = [data[at : at + size] for at in range(payload, len(data), size)]
    foreign = [other[at : at + size] for at in range(payload, len(other), size)]
    assert b"".join([data[:payload], *chunks]) == data and len(chunks) == 5
    for changed in (
        [chunks[1], chunks[0], *chunks[2:]],
        [*chunks[:3], chunks[4], chunks[3]],
        [chunks[0], *chunks[2:]],
        [chunks[0], *chunks],
        chunks[:4],
        [*chunks, chunks[4]],
        [foreign[0], *chunks[1:]],
        [*chunks[:4], foreign[4]],
    ):
        with pytest.raises(AgeError):
            decrypted(data[:payload] + b"".join(changed), EXAMPLE)


def test_any_flipped_bit_is_noticed() -> None:
    content = b"c" * 300
    data = encrypted(content, EXAMPLE, age.new_identity())
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(AgeError):
            decrypted(bytes(changed), EXAMPLE)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"age-encryption.org/v2\n-> X25519 a\nb\n--- c\n",
        b"age-encryption.org/v1\n",
        b"age-encryption.org/v1\n--- " + b"A" * 43 + b"\n",
        b"age-encryption.org/v1\n-> X25519\n" + b"A" * 43 + b"\n--- " + b"A" * 43 + b"\n",
        b"age-encryption.org/v1\n-> X25519 " + b"A" * 43 + b"\n\n--- " + b"A" * 43 + b"\n",
        b"age-encryption.org/v1\n->  X25519\n\n--- " + b"A" * 43 + b"\n",
        b"age-encryption.org/v1\n" + b"-> X25519 " + b"A" * 43 + b"\n" + b"A" * 43 + b"\n--- B\n",
        b"age-encryption.org/v1\n-> x y\n" + (b"A" * 64 + b"\n") * 3000,
        # A share of low order.
        b"age-encryption.org/v1\n-> X25519 " + b"A" * 43 + b"\n" + b"A" * 43
        + b"\n--- " + b"A" * 43 + b"\n" + bytes(64),
    ],
)  # fmt: skip
def test_junk_is_refused(head: bytes) -> None:
    for more in (b"", bytes(100)):
        with pytest.raises(AgeError):
            decrypted(head + more, EXAMPLE)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no public key"),
        ("age1", "no public key"),
        (EXAMPLE.recipient[:-1], "no public key"),
        (EXAMPLE.recipient[:-1] + "q", "no public key"),
        (EXAMPLE.recipient[:10] + EXAMPLE.recipient[10:].upper(), "no public key"),
        (EXAMPLE.text, "private key"),
        (EXAMPLE.text.lower(), "private key"),
        ("ssh-ed25519 AAAA", "no public key"),
    ],
)
def test_a_bad_public_key_is_refused(text: str, why: str) -> None:
    with pytest.raises(AgeError, match=why):
        age.parse_recipient(text)


def test_nothing_is_encrypted_to_nobody_or_to_a_key_of_low_order() -> None:
    for recipients in ([], [bytes(32)], [EXAMPLE.public] * 21):
        with pytest.raises(AgeError):
            Encryptor(io.BytesIO(), recipients)


def test_a_file_of_identities_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity"
    path.write_text(f"# comment\n\n{EXAMPLE.text}\n{age.new_identity().text}\n")
    path.chmod(0o644)
    with pytest.raises(PrivateFileError, match="chmod 600"):
        age.read_identities(str(path))
    path.chmod(0o600)
    assert age.read_identities(str(path))[0] == EXAMPLE
    path.write_text(EXAMPLE.recipient)
    with pytest.raises(AgeError, match="line 1"):
        age.read_identities(str(path))
    path.write_text("# nothing\n")
    with pytest.raises(AgeError, match="has no identity"):
        age.read_identities(str(path))
    with pytest.raises(PrivateFileError, match="No such file"):
        age.read_identities(str(tmp_path / "none"))
