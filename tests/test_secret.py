"""The channel of a shared secret, and the files with secrets: without sockets."""

from __future__ import annotations

import os
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs.ctl_runner import run_ctl

from etcdlite import channels, config, noise, secret, secret_file
from etcdlite.channel import MAX_OVERHEAD, RECORD_BYTES, Channel, ChannelError
from etcdlite.frames import HANDSHAKE, MAGIC, SECRET_MAGIC
from etcdlite.listeners import PEERS
from etcdlite.private_file import PrivateFileError
from etcdlite.secret import CLIENT, PEER, InitiatorChannel, ResponderChannel
from etcdlite.secret_file import PREFIX, Secret, SecretFile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ONE = Secret(bytes(range(100, 132)))
TWO = Secret(bytes(range(150, 182)))
THREE = Secret(bytes(range(200, 232)))


def made(
    initiator_secrets: tuple[Secret, ...] = (ONE,),
    responder_secrets: tuple[Secret, ...] = (ONE,),
    target: int = 2,
) -> tuple[InitiatorChannel, ResponderChannel]:
    """Two ends that have sent nothing: member 1 calls member 2 of cluster 9."""
    return (
        InitiatorChannel(initiator_secrets, PEER, 9, 1, target),
        ResponderChannel(responder_secrets, PEER, 9, 2),
    )


def established(**kwargs: tuple[Secret, ...]) -> tuple[InitiatorChannel, ResponderChannel]:
    initiator, responder = made(**kwargs)
    assert responder.receive(initiator.output()) == b""
    assert initiator.receive(responder.output()) == b""
    assert initiator.is_established and responder.is_established
    return initiator, responder


# The handshake.


def test_both_sides_learn_who_the_other_one_is() -> None:
    initiator, responder = established()
    assert responder.claims == (9, 1, 2)
    assert initiator.claims == (9, 2, 1)
    assert initiator.description == responder.description
    assert ONE.id.hex() in initiator.description


def test_what_is_sent_is_what_the_docstring_says() -> None:
    initiator, responder = made()
    opening = initiator.output()
    assert opening[:20] == b"\x8aETCDLS\n" + b"\1\0" + b"\1\0" + ONE.id
    assert len(opening) == 92
    responder.receive(opening)
    answer = responder.output()
    assert answer[:12] == b"\x8aETCDLS\n" + b"\1\0" + b"\0\0"
    assert len(answer) == 76
    # A second reader, from the docstring.
    other = noise.Handshake(False, ONE.key, opening[:20])
    offer = other.read(opening[20:])
    assert [int.from_bytes(offer[at : at + 8], "little") for at in (0, 8, 16)] == [9, 1, 2]
    initiator.receive(answer)
    frame = initiator.seal(b"plain")
    assert frame[:2] == (5 + 16).to_bytes(2, "little")
    assert len(frame) == 2 + 5 + 16
    initiator.close()
    assert len(initiator.output()) == 2 + 16


def test_nothing_readable_is_sent() -> None:
    """Neither ids, nor the secret, nor plaintext; the test looks for what it would find."""
    initiator = InitiatorChannel((ONE,), PEER, 0x1122334455667788, 0x99AABBCCDDEEFF00, 2)
    responder = ResponderChannel((ONE,), PEER, 0x1122334455667788, 2)
    sent = initiator.output()
    responder.receive(sent)
    sent += responder.output()
    initiator.receive(sent[92:])
    sent += initiator.seal(b"the plaintext") + responder.seal(b"the plaintext")
    for hidden in (0x1122334455667788, 0x99AABBCCDDEEFF00):
        assert hidden.to_bytes(8, "little") not in sent
    assert b"plain" not in sent
    assert ONE.key not in sent
    assert ONE.id in sent


@pytest.mark.parametrize("size", [1, 2, 7, 91])
def test_a_handshake_may_come_in_pieces(size: int) -> None:
    initiator, responder = made()

    def feed(channel: Channel, data: bytes) -> bytes:
        return b"".join(channel.receive(data[at : at + size]) for at in range(0, len(data), size))

    assert feed(responder, initiator.output()) == b""
    first = responder.output() + responder.seal(b"hello")
    assert feed(initiator, first) == b"hello"
    assert feed(responder, initiator.seal(b"and back")) == b"and back"


def test_every_secret_of_the_list_is_accepted_and_the_first_is_offered() -> None:
    for offered in (ONE, TWO, THREE):
        initiator, responder = established(
            initiator_secrets=(offered, ONE), responder_secrets=(ONE, TWO, THREE)
        )
        assert responder.receive(initiator.seal(b"x")) == b"x"
        assert offered.id.hex() in responder.description


def test_another_secret_is_refused_on_both_sides_with_the_reason() -> None:
    initiator, responder = made(responder_secrets=(TWO, THREE))
    with pytest.raises(ChannelError) as refused:
        responder.receive(initiator.output())
    for shown in (ONE.id, TWO.id, THREE.id):
        assert shown.hex() in str(refused.value)
    assert "has another secret" in str(refused.value)
    with pytest.raises(ChannelError, match=f"another secret than this one .id {ONE.id.hex()}"):
        initiator.receive(responder.output())


def test_a_refusal_does_not_say_which_secrets_there_are() -> None:
    """The same bytes for an unknown id, and for a known id without its secret."""
    answers = []
    for opening in (
        InitiatorChannel((THREE,), PEER).output(),
        InitiatorChannel((ONE,), PEER).output()[:20] + os.urandom(72),
    ):
        _, responder = made()
        with pytest.raises(ChannelError):
            responder.receive(opening)
        answers.append(responder.output())
    assert answers[0] == answers[1]
    assert ONE.id not in answers[0]


def test_a_stranger_costs_no_key_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    opening = InitiatorChannel((ONE,), PEER).output()

    def expensive(*_: object) -> bytes:
        raise AssertionError("X25519 for a stranger")

    monkeypatch.setattr(noise, "crypto_scalarmult", expensive)
    monkeypatch.setattr(noise, "crypto_scalarmult_base", expensive)
    for forged in (opening[:20] + os.urandom(72), opening[:-1] + bytes((opening[-1] ^ 1,))):
        with pytest.raises(ChannelError):
            ResponderChannel((ONE,), PEER).receive(forged)


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (HANDSHAKE.pack(MAGIC, 1, 2), "the other side has no secret"),
        (MAGIC[:1], "the other side has no secret"),
        (b"\x16\x03\x01\x02\x00", "TLS"),
        (b"GET / HTTP/1.1\r\n\r\n", "does not speak"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "does not speak"),
        (secret.OPENING.pack(SECRET_MAGIC, 2, PEER, ONE.id), "speaks version 2"),
        (secret.OPENING.pack(SECRET_MAGIC, 1, CLIENT, ONE.id), "for members"),
        (secret.OPENING.pack(SECRET_MAGIC, 1, PEER, TWO.id), "another secret"),
    ],
)
def test_strangers_are_refused_without_waiting_for_more(first: bytes, why: str) -> None:
    _, responder = made()
    with pytest.raises(ChannelError, match=why):
        responder.receive(first)
    assert not responder.is_established


@pytest.mark.parametrize(
    ("status", "why"), [(1, "another secret"), (2, "for clients"), (3, "update"), (77, "77")]
)
def test_each_refusal_is_explained(status: int, why: str) -> None:
    initiator, _ = made()
    with pytest.raises(ChannelError, match=why):
        initiator.receive(SECRET_MAGIC + (1).to_bytes(2, "little") + status.to_bytes(2, "little"))


def test_nothing_may_follow_the_opening_before_the_answer() -> None:
    """Nobody can know the keys of the session then."""
    initiator, responder = made()
    with pytest.raises(ChannelError, match="before the answer"):
        responder.receive(initiator.output() + b"\0")
    assert not responder.is_established and not responder.has_output


def test_one_that_does_not_know_the_secret_cannot_answer() -> None:
    initiator, _ = made()
    with pytest.raises(ChannelError, match="not authentic"):
        initiator.receive(secret.OPENING.pack(SECRET_MAGIC, 1, 0, bytes(8))[:12] + os.urandom(64))
    initiator, _ = made()
    with pytest.raises(ChannelError, match="does not answer as one with a secret"):
        initiator.receive(HANDSHAKE.pack(MAGIC, 2, 0))
    initiator, _ = made()
    with pytest.raises(ChannelError, match="peer-secret-file"):
        initiator.receive_end()


def test_another_member_than_the_one_that_was_called_is_refused() -> None:
    initiator, responder = made(target=3)
    responder.receive(initiator.output())
    with pytest.raises(ChannelError, match="is member 2, not 3"):
        initiator.receive(responder.output())


def test_another_cluster_is_refused() -> None:
    initiator = InitiatorChannel((ONE,), PEER, 8, 1, 2)
    responder = ResponderChannel((ONE,), PEER, 9, 2)
    responder.receive(initiator.output())
    with pytest.raises(ChannelError, match="of cluster 9, not 8"):
        initiator.receive(responder.output())


# Replay, reflection, cuts and changes.


def test_a_recorded_session_is_refused() -> None:
    initiator, responder = made()
    opening = initiator.output()
    responder.receive(opening)
    initiator.receive(responder.output())
    frame = initiator.seal(b"put a b")
    assert responder.receive(frame) == b"put a b"
    _, again = made()
    assert again.receive(opening) == b""
    with pytest.raises(ChannelError, match="frame 0 of the channel is not authentic"):
        again.receive(frame)


def test_a_recorded_answer_is_refused() -> None:
    initiator, responder = made()
    responder.receive(initiator.output())
    answer = responder.output()
    other, _ = made()
    with pytest.raises(ChannelError, match="not authentic"):
        other.receive(answer)


def test_reflected_bytes_are_refused() -> None:
    initiator, responder = made()
    opening = initiator.output()
    with pytest.raises(ChannelError):
        initiator.receive(opening)
    initiator, responder = established()
    with pytest.raises(ChannelError, match="not authentic"):
        initiator.receive(initiator.seal(b"to the other side"))
    with pytest.raises(ChannelError, match="not authentic"):
        responder.receive(responder.seal(b"to the other side"))


def test_a_member_that_calls_itself_does_not_take_its_own_answers() -> None:
    """An initiator and a responder of the same member: the directions have different keys."""
    initiator, responder = established()
    frame = initiator.seal(b"x")
    assert responder.receive(frame) == b"x"
    with pytest.raises(ChannelError):
        initiator.receive(frame)


def test_repeated_swapped_and_left_out_frames_are_refused() -> None:
    for order in ([0, 0], [1, 0], [0, 2], [0, 1, 1]):
        initiator, responder = established()
        frames = [initiator.seal(b"frame %d" % number) for number in range(3)]
        with pytest.raises(ChannelError, match="not authentic"):
            for number in order:
                responder.receive(frames[number])


@settings(deadline=None)
@given(data=st.data())
def test_a_change_anywhere_in_a_frame_is_noticed(data: st.DataObject) -> None:
    initiator, responder = established()
    frame = bytearray(initiator.seal(b"some plaintext"))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    # A changed length may make it wait for more; more never makes it right.
    more = initiator.seal(bytes(65_000)) + initiator.seal(bytes(65_000))
    with pytest.raises(ChannelError):
        responder.receive(bytes(frame))
        responder.receive(more)


def test_a_cut_is_distinguished_from_an_end() -> None:
    initiator, responder = established()
    responder.receive(initiator.seal(b"x"))
    with pytest.raises(ChannelError, match="cut"):
        responder.receive_end()
    initiator.close()
    notice = initiator.output()
    assert responder.receive(notice) == b""
    responder.receive_end()
    assert responder.is_ended
    with pytest.raises(ChannelError, match="after its close notice"):
        responder.receive(notice)
    initiator.close()
    assert not initiator.has_output


def test_a_cut_in_every_place_delivers_a_beginning_and_no_more() -> None:
    initiator, responder = made()
    opening = initiator.output()
    responder.receive(opening)
    initiator.receive(responder.output())
    stream = initiator.seal(b"first") + initiator.seal(b"second")
    for cut in range(len(stream)):
        _, responder = made()
        # The same keys, for a second reading of the same stream.
        responder.is_established = True
        responder._needed_bytes = 0
        responder._receiving = noise.CipherState(initiator._sending._key)
        got = responder.receive(stream[:cut])
        assert got == (b"first" if cut >= 23 else b"")
        with pytest.raises(ChannelError, match="cut"):
            responder.receive_end()


def test_a_frame_shorter_than_its_tag_is_refused() -> None:
    for length in range(16):
        _, responder = established()
        with pytest.raises(ChannelError, match="length"):
            responder.receive(length.to_bytes(2, "little"))


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_junk_never_establishes_or_crashes(junk: bytes) -> None:
    initiator, responder = made()
    for channel, beginning in (
        (responder, b""),
        (made()[1], initiator.output()[:20]),
        (initiator, b""),
        (made()[0], SECRET_MAGIC + b"\1\0\0\0"),
    ):
        try:
            assert channel.receive(beginning + junk) == b""
        except ChannelError as refused:
            assert str(refused)
        assert not channel.is_established
        assert channel.held_bytes <= 92


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=300))
def test_junk_after_the_handshake_is_never_delivered(junk: bytes) -> None:
    _, responder = established()
    try:
        assert responder.receive(junk) == b""
    except ChannelError as refused:
        assert str(refused)


class Meddler:
    """Carries the bytes between two sides, and does to them what it likes."""

    def __init__(self) -> None:
        self.channels: tuple[InitiatorChannel, ResponderChannel] = made()
        self.ways = [bytearray(), bytearray()]
        """What each side has sent and the other one has not received."""
        self.recorded = [b"", b""]
        self.sent = [b"", b""]
        self.received = [b"", b""]
        """What each side sent, and what the other one took for it."""
        self.is_broken = [False, False]
        self.take_output()

    def take_output(self) -> None:
        for side, channel in enumerate(self.channels):
            if channel.has_output:
                self.put(side, channel.output())

    def put(self, side: int, data: bytes) -> None:
        self.ways[side] += data
        self.recorded[side] += data

    def say(self, side: int, size: int) -> None:
        channel = self.channels[side]
        if channel.is_established and not self.is_broken[side]:
            text = bytes((len(self.sent[side]) + at) % 251 for at in range(size))
            self.sent[side] += text
            self.put(side, channel.seal(text))

    def carry(self, side: int, size: int) -> None:
        other = 1 - side
        data = bytes(self.ways[side][:size])
        del self.ways[side][:size]
        if data and not self.is_broken[other]:
            try:
                self.received[side] += self.channels[other].receive(data)
            except ChannelError:
                self.is_broken[other] = True
            else:
                self.take_output()
        assert self.sent[side].startswith(self.received[side])

    def meddle(self, side: int, what: str, at: int, size: int) -> None:
        way = self.ways[side]
        at = at % (len(way) + 1)
        if what == "cut":
            del way[at : at + size]
        elif what == "double":
            way[at:at] = way[at : at + size]
        elif what == "swap":
            way[at:] = way[at + size :] + way[at : at + size]
        elif what == "flip" and at < len(way):
            way[at] ^= 1 << size % 8
        elif what == "reflect":
            way[at:at] = self.recorded[1 - side][-size:]
        elif what == "replay":
            way[at:at] = self.recorded[side][:size]
        elif what == "inject":
            way[at:at] = bytes(size)


SIDES = st.integers(0, 1)
SIZES = st.one_of(st.integers(1, 100), st.sampled_from([92, 76, 1000, 100_000]))
TRICKS = st.sampled_from(["cut", "double", "swap", "flip", "reflect", "replay", "inject"])


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("say"), SIDES, SIZES),
            st.tuples(st.just("carry"), SIDES, SIZES),
            st.tuples(st.just("meddle"), SIDES, TRICKS, st.integers(0, 300), SIZES),
        ),
        max_size=30,
    ),
    st.booleans(),
)
def test_a_meddler_can_only_end_what_it_carries(actions: list[Any], is_open: bool) -> None:
    """Whatever it does, each side has received a beginning of what the other one sent."""
    between = Meddler()
    if is_open:
        between.carry(0, 1000)
        between.carry(1, 1000)
        assert all(channel.is_established for channel in between.channels)
    for action, side, *rest in actions:
        getattr(between, action)(side, *rest)
    for _ in range(3):
        for side in 0, 1:
            between.carry(side, 1 << 20)


def test_the_meddler_that_only_carries_delivers_everything() -> None:
    """So the test above can fail."""
    between = Meddler()
    for size in (1000, 1000, 5, 70_000):
        between.carry(0, size)
        between.carry(1, size)
        between.say(0, size)
        between.say(1, size)
    for side in 0, 1:
        between.carry(side, 1 << 20)
    assert between.received == between.sent
    assert len(between.sent[0]) == 71_005 + 1000


# Frames.


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 100, 65_518, 65_519, 65_520, 200_000]), max_size=5),
    st.sampled_from([3, 1000, 65_536, 1 << 20]),
)
def test_the_plaintext_arrives_however_it_is_cut(sizes: list[int], piece: int) -> None:
    if piece == 3:
        sizes = [min(size, 1000) for size in sizes]
    initiator, responder = established()
    plain = b"".join(bytes((number + 1,)) * size for number, size in enumerate(sizes))
    sealed = b"".join(
        initiator.seal(bytes((number + 1,)) * size) for number, size in enumerate(sizes)
    )
    got = [responder.receive(sealed[at : at + piece]) for at in range(0, len(sealed), piece)]
    assert b"".join(got) == plain
    assert responder.held_bytes == 0
    records = sum(-(-size // RECORD_BYTES) for size in sizes)
    assert len(sealed) <= len(plain) + records * MAX_OVERHEAD


def test_a_view_is_sealed_as_bytes_are() -> None:
    initiator, responder = established()
    for data in (b"small", bytes(100_000)):
        assert responder.receive(initiator.seal(memoryview(data))) == data


def test_output_comes_before_what_is_sealed() -> None:
    initiator, responder = made()
    responder.receive(initiator.output())
    assert initiator.receive(responder.seal(b"in one piece")) == b"in one piece"
    assert not responder.has_output


def test_keys_are_replaced_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "REKEY_FRAMES", 3)
    initiator, responder = established()
    keys = set()
    for number in range(20):
        for sender, receiver in ((initiator, responder), (responder, initiator)):
            text = b"%d" % number
            assert receiver.receive(sender.seal(text)) == text
            keys.add(sender._sending._key)
    assert len(keys) == 2 * (1 + 20 // 3)


def test_held_bytes_are_bounded_by_a_frame() -> None:
    _, responder = established()
    responder.receive(b"\xff\xff")
    responder.receive(bytes(60_000))
    assert responder.held_bytes == 60_002
    with pytest.raises(ChannelError):
        responder.receive(bytes(60_000))


# Files.


def line(key: bytes) -> str:
    return f"{PREFIX}{b64encode(key).decode()}\n"


def write(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_new_file_is_private_and_never_overwrites(tmp_path: Path) -> None:
    path = str(tmp_path / "secret")
    umask = os.umask(0)
    try:
        made = secret_file.create(path)
    finally:
        os.umask(umask)
    assert os.stat(path).st_mode & 0o777 == 0o600
    found = secret_file.read(path)
    assert [one.key for one in found] == [made.key]
    before = Path(path).read_bytes()
    with pytest.raises(PrivateFileError, match="exists already"):
        secret_file.create(path)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PrivateFileError, match="exists already"):
        secret_file.create(str(link))
    assert Path(path).read_bytes() == before
    assert secret_file.create(str(tmp_path / "other")).key != made.key


def test_several_secrets_are_read_in_order(tmp_path: Path) -> None:
    text = "# the new one\r\n" + line(TWO.key) + "\n  " + line(ONE.key)
    found = secret_file.read(write(tmp_path / "s", text))
    assert [one.id for one in found] == [TWO.id, ONE.id]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has 0 secrets"),
        ("# nothing\n", "has 0 secrets"),
        ("correct horse battery staple\n", "line 1"),
        (b64encode(ONE.key).decode(), "line 1"),
        (PREFIX + "\n", "32 bytes"),
        (PREFIX + b64encode(ONE.key[:31]).decode(), "32 bytes"),
        (PREFIX + b64encode(ONE.key + b"x").decode(), "32 bytes"),
        (PREFIX + "!" + b64encode(ONE.key).decode(), "32 bytes"),
        (line(bytes(32)), "guessed"),
        (line(b"correct horse battery staple 12 "), "guessed"),
        (line(ONE.key) + line(ONE.key), "line 2 .* twice"),
        ("".join(line(bytes(range(at, at + 32))) for at in range(128, 133)), "has 5 secrets"),
        ("# " + "x" * 5000, "4096 bytes"),
        ("\xff\xfe", "line 1"),
    ],
)
def test_what_is_weaker_than_a_secret_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = write(tmp_path / "s", text)
    with pytest.raises(PrivateFileError, match=why) as refused:
        secret_file.read(path)
    assert path in str(refused.value)
    assert b64encode(ONE.key).decode() not in str(refused.value)


def test_modes_are_checked_as_ssh_does(tmp_path: Path) -> None:
    for mode in (0o640, 0o604, 0o620, 0o644, 0o777):
        path = write(tmp_path / "s", line(ONE.key), mode)
        with pytest.raises(PrivateFileError, match=f"its mode is {mode:04o}.*chmod 600"):
            secret_file.read(path)
    for mode in (0o600, 0o400):
        assert secret_file.read(write(tmp_path / "s", line(ONE.key), mode))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivateFileError, match="No such file"):
        secret_file.read(str(tmp_path / "missing"))
    with pytest.raises(PrivateFileError, match="not a regular file"):
        secret_file.read(str(tmp_path))
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(PrivateFileError, match="not a regular file"):
        secret_file.read(str(tmp_path / "pipe"))


def test_a_file_that_cannot_be_used_is_named_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(
        PrivateFileError, match=r"^peer-secret-file: cannot read .*none: .*; correct"
    ):
        SecretFile(str(tmp_path / "none"), "peer-secret-file")


def test_a_secret_is_not_shown() -> None:
    shown = f"{ONE!r} {ONE} {(ONE, TWO)} {secret_file.ids((ONE, TWO))}"
    for hidden in (repr(ONE.key), ONE.key.hex(), b64encode(ONE.key).decode()):
        assert hidden not in shown


def test_a_changed_file_is_read_again_and_a_bad_one_is_not_used(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s"
    write(path, line(ONE.key))
    file = SecretFile(str(path), "peer-secret-file")
    assert [one.id for one in file.secrets(10.0)] == [ONE.id]
    write(tmp_path / "new", line(TWO.key) + line(ONE.key))
    os.replace(tmp_path / "new", path)
    assert [one.id for one in file.secrets(10.5)] == [ONE.id], "it was looked at too often"
    assert [one.id for one in file.secrets(11.0)] == [TWO.id, ONE.id]
    write(path, "nonsense\n")
    assert [one.id for one in file.secrets(12.0)] == [TWO.id, ONE.id]
    assert "cannot be read again; the old secrets stay in use" in capfd.readouterr().err
    path.unlink()
    assert [one.id for one in file.secrets(13.0)] == [TWO.id, ONE.id]
    write(path, line(THREE.key))
    file.reload()
    assert [one.id for one in file.secrets(13.5)] == [THREE.id]


def test_the_secret_of_clients_does_not_become_one_of_members(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, known in (("peer", ONE), ("client", TWO)):
        write(tmp_path / name, line(known.key))
    made = channels.Channels(
        config.load([f"--{name}-secret-file={tmp_path / name}" for name in ("peer", "client")], {})
    )
    write(tmp_path / "peer", line(ONE.key) + line(TWO.key))
    made.reload()
    assert "have a secret in common" in capfd.readouterr().err
    stranger = InitiatorChannel((TWO,), PEER)
    accepted = made.accept(PEERS, "http://127.0.0.1:1", "127.0.0.1")
    assert accepted is not None
    with pytest.raises(ChannelError, match="another secret"):
        accepted.receive(stranger.output())


def test_ctl_makes_a_secret_and_prints_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "peer secret"
    ended = run_ctl("secret", "new", str(path))
    assert ended.status == 0 and not ended.stderr
    settings = tomllib.loads(ended.stdout.decode())
    assert settings == {"peer-secret-file": str(path)}
    [made] = secret_file.read(str(path))
    assert made.id.hex() in ended.stdout.decode()
    assert b64encode(made.key) not in ended.stdout
    before = path.read_bytes()
    again = run_ctl("secret", "new", str(path))
    assert (again.status, again.stdout) == (1, b"")
    assert "exists already and is not overwritten" in again.stderr
    assert path.read_bytes() == before
    assert run_ctl("secret", "new", "a", "b").status == 128
    nowhere = str(tmp_path / "no" / "file")
    for words in (("secret", "new"), ("key", "new"), ("key", "identity")):
        missing = run_ctl(*words, nowhere)
        assert missing.status == 1
        assert missing.stderr.startswith(f"Error: cannot write {nowhere}: no such file"), words
        assert "; correct the path" in missing.stderr
