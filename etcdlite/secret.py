"""The channel of a shared secret: both sides prove that they know it, and all bytes are encrypted.

It follows `Noise_NNpsk0_25519_ChaChaPoly_SHA256` (`noise.py`) with a fixed opening. The secret is
the psk. All integers are little-endian.

    The initiator, which made the connection, sends
      0   8  magic: 8A "ETCDLS" 0A
      8   2  version: 1
     10   2  purpose: 1 between members, 2 of a client
     12   8  the id of the secret (`secret_file.py`)
     20  32  the first message of Noise: e,
     52  40  and its payload, encrypted: cluster id (8), own member id (8), the member id that it
             means to reach (8), and a tag (16). A 0 stands for what it does not know.
    Bytes 0 to 19 are the prologue of Noise: the messages of both sides authenticate them.

    The responder answers
      0   8  magic      8  2  version: 1      10  2  status: 0 go on; else see `_REFUSALS`
     12  32  with status 0, the second message of Noise: e,
     44  32  and its payload, encrypted: cluster id (8), own member id (8), and a tag (16)
    or ends the connection after the status.

    Then each side sends frames:
      0   2  length of the rest, 16 to 65,535
      2      a transport message of Noise: up to 65,519 bytes, encrypted, and a tag (16)
    The nonce of a message is its number in its direction. An empty one is the close notice, and the
    last one of its side. After every `REKEY_FRAMES` messages of a direction, its key is replaced by
    Noise's Rekey, which both sides count; the nonces go on.

A repeated first message gets an answer, and nothing else: what it says is believed only with the
first frame, which takes the session's keys. It costs two steps of X25519. An attacker in between
can end connections, also with a forged status. docs/peer-secret.md has what this protects against.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from etcdlite.channel import Channel, ChannelError
from etcdlite.frames import MAGIC, SECRET_MAGIC
from etcdlite.noise import (
    MAX_MESSAGE_BYTES,
    MESSAGE_OVERHEAD,
    PROTOCOL_NAME,
    TAG_BYTES,
    CipherState,
    Handshake,
    NoiseError,
)
from etcdlite.secret_file import Secret, SecretFile, Secrets, ids

VERSION = 1

PEER = 1
CLIENT = 2
"""The purposes of a channel."""

REKEY_FRAMES = 1 << 16
"""Frames of a direction under one key: at most 4 GiB."""

MAX_PLAINTEXT_BYTES = MAX_MESSAGE_BYTES - TAG_BYTES
"""In one frame."""

OPENING = struct.Struct("<8sHH8s")
_ANSWER = struct.Struct("<8sHH")
_OFFER = struct.Struct("<QQQ")
_REPLY = struct.Struct("<QQ")
_LENGTH = struct.Struct("<H")

OPENING_BYTES = OPENING.size + MESSAGE_OVERHEAD + _OFFER.size
ANSWER_BYTES = _ANSWER.size + MESSAGE_OVERHEAD + _REPLY.size

_GO_ON = 0
UNKNOWN_SECRET = 1
OTHER_PURPOSE = 2
OTHER_VERSION = 3
NO_CHANNEL = 4

_REFUSALS = {
    UNKNOWN_SECRET: "the other side has another secret than this one (id {id}). Give both the same "
    "file; while a secret is replaced, list the old and the new one in both",
    OTHER_PURPOSE: "this port is for {other}: check the address",
    OTHER_VERSION: "the other side does not speak version 1 of the channel; update the older one",
    NO_CHANNEL: "the other side wants the channel of its secret",
}
"""What a status means, as the initiator's log says it."""

_USERS = {PEER: "members", CLIENT: "clients"}
SETTINGS = {PEER: "peer-secret-file", CLIENT: "client-secret-file"}


class SecretChannel(Channel):
    """One side of a connection; `InitiatorChannel` and `ResponderChannel` do the handshake."""

    kind = "secret"

    def __init__(self, purpose: int, cluster_id: int = 0, member_id: int = 0) -> None:
        """`cluster_id` and `member_id` say who this side is; 0: unknown, or no member."""
        self.purpose = purpose
        if purpose == PEER:
            # A member is trusted not to send tiny frames. A frame at once costs 8 % less CPU.
            self.receive_bytes = MAX_MESSAGE_BYTES + 1
        self.cluster_id = cluster_id
        self.member_id = member_id
        self.is_ended = False
        """The other side sent its close notice. An end without one may be forged."""
        self._output = b""
        self._is_closed = False
        self._held = bytearray()
        """Input that is not complete: an opening, an answer, or a frame."""
        self._needed_bytes = 0
        """Nothing can be done before this many bytes are held."""
        self._sending: CipherState
        self._receiving: CipherState

    # As a channel.

    @property
    def has_output(self) -> bool:
        return bool(self._output)

    @property
    def held_bytes(self) -> int:
        return len(self._held)

    def output(self) -> bytes:
        output, self._output = self._output, b""
        return output

    def receive(self, data: bytes) -> bytes:
        if self._held or not self.is_established:
            held = self._held
            held += data
            if len(held) < self._needed_bytes:
                if held and not self.is_established:
                    self._look_at_beginning(held)
                return b""
            data = bytes(held)
            held.clear()
            if not self.is_established:
                data = self._shake(data)
        return self._open(data) if data else b""

    def seal(self, data: bytes | memoryview) -> bytes:
        assert self.is_established and not self._is_closed
        size = len(data)
        if size <= MAX_PLAINTEXT_BYTES:
            if not size:
                return self.output()
            parts = self._frame(bytes(data))
        else:
            parts = []
            for at in range(0, size, MAX_PLAINTEXT_BYTES):
                parts += self._frame(bytes(data[at : at + MAX_PLAINTEXT_BYTES]))
        if self._output:
            parts.insert(0, self.output())
        return b"".join(parts)

    def close(self) -> None:
        if self.is_established and not self._is_closed:
            self._output += b"".join(self._frame(b""))
        self._is_closed = True

    def receive_end(self) -> None:
        if not self.is_established:
            raise ChannelError(self._why_ended())
        if not self.is_ended:
            raise ChannelError("the connection was cut: no close notice came")

    # The handshake.

    def _look_at_beginning(self, held: bytearray) -> None:
        """Refuse what cannot become the awaited message without waiting for the rest."""
        raise NotImplementedError

    def _shake(self, data: bytes) -> bytes:
        """Process the other side's message, and return what follows it. Raises ChannelError."""
        raise NotImplementedError

    def _why_ended(self) -> str:
        return "it closed the connection during the handshake"

    def _establish(self, noise: Handshake, secret: Secret) -> None:
        self._sending, self._receiving = noise.split()
        self.is_established = True
        self._needed_bytes = 0
        self.description = f"{PROTOCOL_NAME.decode()}, secret {secret.id.hex()}"

    # Frames.

    def _frame(self, plaintext: bytes) -> list[bytes]:
        cipher = self._sending
        try:
            sealed = cipher.encrypt(plaintext)
        except NoiseError as failure:
            raise ChannelError(f"the channel is used up: {failure}") from None
        if not cipher.nonce % REKEY_FRAMES:
            cipher.rekey()
        return [_LENGTH.pack(len(sealed)), sealed]

    def _open(self, data: bytes) -> bytes:
        """The plaintext of the whole frames in `data`; the rest is held."""
        cipher = self._receiving
        parts = []
        at, size = 0, len(data)
        while size - at >= 2:
            length = data[at] | data[at + 1] << 8
            if self.is_ended:
                raise ChannelError("it sent something after its close notice")
            if length < TAG_BYTES:
                raise ChannelError(f"a frame has the length {length}, less than that of its tag")
            end = at + 2 + length
            if end > size:
                break
            try:
                part = cipher.decrypt(data[at + 2 : end])
            except NoiseError:
                raise ChannelError(
                    f"frame {cipher.nonce} of the channel is not authentic: it was changed, "
                    "repeated or reordered on its way"
                ) from None
            if not cipher.nonce % REKEY_FRAMES:
                cipher.rekey()
            if part:
                parts.append(part)
            else:
                self.is_ended = True
            at = end
        if at < size:
            self._held += data[at:]
            self._needed_bytes = 2 if size - at < 2 else 2 + length
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Channels:
    """Makes the channels of one purpose, each with the secrets that the file has at that time."""

    def __init__(self, file: SecretFile, purpose: int, clock: Callable[[], float]) -> None:
        """`clock` returns monotonic seconds."""
        self._file = file
        self._purpose = purpose
        self._clock = clock
        self._cluster_id = self._member_id = 0

    def identify(self, cluster_id: int, member_id: int) -> None:
        """Say who this side is, as soon as it is known; a client never does."""
        self._cluster_id, self._member_id = cluster_id, member_id

    def reload(self) -> None:
        """Read the file again if it has changed."""
        self._file.reload()

    def accept(self, address: str) -> ResponderChannel:
        """A `channel.Accepting`."""
        secrets = self._file.secrets(self._clock())
        return ResponderChannel(secrets, self._purpose, self._cluster_id, self._member_id)

    def dial(self, url: str = "", target_id: int = 0) -> InitiatorChannel:
        """A `channel.Dialing`. `target_id` is the member that must answer, if it is not 0."""
        secrets = self._file.secrets(self._clock())
        # Without a target, as before a member joins, nothing is known of the cluster there.
        cluster_id = self._cluster_id if target_id else 0
        member_id = self._member_id if target_id else 0
        return InitiatorChannel(secrets, self._purpose, cluster_id, member_id, target_id)


class InitiatorChannel(SecretChannel):
    """The side that made the connection."""

    def __init__(
        self,
        secrets: Secrets,
        purpose: int,
        cluster_id: int = 0,
        member_id: int = 0,
        target_id: int = 0,
    ) -> None:
        """`target_id` is the member that must answer; 0: any. A `cluster_id` that is not 0 must be
        that of the other side."""
        super().__init__(purpose, cluster_id, member_id)
        self.target_id = target_id
        self._secret = secrets[0]
        prologue = OPENING.pack(SECRET_MAGIC, VERSION, purpose, self._secret.id)
        self._noise: Handshake | None = Handshake(True, self._secret.key, prologue)
        self._output = prologue + self._noise.write(_OFFER.pack(cluster_id, member_id, target_id))
        self._needed_bytes = ANSWER_BYTES

    def _look_at_beginning(self, held: bytearray) -> None:
        if not held.startswith(SECRET_MAGIC[: len(held)]):
            raise ChannelError(
                "the other side does not answer as one with a secret: set "
                f"{SETTINGS[self.purpose]} there, too, or check the address"
            )
        if len(held) < _ANSWER.size:
            return
        _, version, status = _ANSWER.unpack_from(held)
        if status != _GO_ON or version != VERSION:
            text = _REFUSALS.get(status if version == VERSION else OTHER_VERSION)
            if text is None:
                raise ChannelError(f"the other side answers with the unknown status {status}")
            others = _USERS[PEER if self.purpose == CLIENT else CLIENT]
            raise ChannelError(text.format(id=self._secret.id.hex(), other=others))

    def _shake(self, data: bytes) -> bytes:
        self._look_at_beginning(bytearray(data[:ANSWER_BYTES]))
        noise, self._noise = self._noise, None
        assert noise is not None
        try:
            reply = noise.read(data[_ANSWER.size : ANSWER_BYTES])
        except NoiseError:
            raise ChannelError(
                "the answer to the handshake is not authentic: it was changed on its way, or the "
                "other side does not know the secret"
            ) from None
        cluster_id, member_id = _REPLY.unpack(reply)
        for what, wanted, found in (
            ("member", self.target_id, member_id),
            ("a member of cluster", self.cluster_id, cluster_id),
        ):
            if wanted and found != wanted:
                raise ChannelError(
                    f"the other side is {what} {found:x}, not {wanted:x}; check the peer URLs"
                )
        self.claims = cluster_id, member_id, self.member_id
        self._establish(noise, self._secret)
        return data[ANSWER_BYTES:]

    def _why_ended(self) -> str:
        return (
            "it closed the connection during the handshake; does it have "
            f"{SETTINGS[self.purpose]}, too?"
        )


class ResponderChannel(SecretChannel):
    """The side that accepted the connection."""

    def __init__(
        self, secrets: Secrets, purpose: int, cluster_id: int = 0, member_id: int = 0
    ) -> None:
        super().__init__(purpose, cluster_id, member_id)
        self._secrets = secrets
        self._needed_bytes = OPENING_BYTES

    def _look_at_beginning(self, held: bytearray) -> None:
        if not held.startswith(SECRET_MAGIC[: len(held)]):
            if MAGIC.startswith(held[: len(MAGIC)]):
                self._refuse(
                    NO_CHANNEL,
                    f"the other side has no secret, this one has: set {SETTINGS[self.purpose]} "
                    "there, too",
                )
            if held[0] == 0x16:
                raise ChannelError("it speaks TLS; this port wants the channel of a secret")
            raise ChannelError(
                f"it does not speak the channel of a secret: {bytes(held[:16]).hex()}"
            )
        if len(held) < OPENING.size:
            return
        _, version, purpose, secret_id = OPENING.unpack_from(held)
        if version != VERSION:
            self._refuse(OTHER_VERSION, f"it speaks version {version}, this side {VERSION} only")
        if purpose != self.purpose:
            self._refuse(OTHER_PURPOSE, f"this port is for {_USERS[self.purpose]}, which it is not")
        if all(secret_id != secret.id for secret in self._secrets):
            self._refuse_secret(secret_id)

    def _shake(self, data: bytes) -> bytes:
        self._look_at_beginning(bytearray(data[:OPENING_BYTES]))
        if len(data) > OPENING_BYTES:
            raise ChannelError("it sent something before the answer to its handshake")
        secret_id = OPENING.unpack_from(data)[3]
        secret = next(secret for secret in self._secrets if secret.id == secret_id)
        noise = Handshake(False, secret.key, data[: OPENING.size])
        try:
            offer = noise.read(data[OPENING.size :])
        except NoiseError:
            # The id is no secret. Whoever repeats it learns nothing new.
            self._refuse_secret(secret_id)
        cluster_id, member_id, target_id = _OFFER.unpack(offer)
        self.claims = cluster_id, member_id, target_id
        try:
            reply = noise.write(_REPLY.pack(self.cluster_id, self.member_id))
        except NoiseError as failure:
            raise ChannelError(f"the handshake fails: {failure}") from None
        self._output = _ANSWER.pack(SECRET_MAGIC, VERSION, _GO_ON) + reply
        self._establish(noise, secret)
        return b""

    def _refuse_secret(self, secret_id: bytes) -> None:
        self._refuse(
            UNKNOWN_SECRET,
            f"the other side has another secret (id {secret_id.hex()}; this side knows "
            f"{ids(self._secrets)}). Give both the same file; while a secret is replaced, list "
            "the old and the new one in both",
        )

    def _refuse(self, status: int, why: str) -> None:
        self._output = _ANSWER.pack(SECRET_MAGIC, VERSION, status)
        raise ChannelError(why)
