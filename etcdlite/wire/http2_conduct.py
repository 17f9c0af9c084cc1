"""Limits on what an HTTP/2 peer sends besides requests, and the check that it is alive.

Noise is input that costs the server work and the peer almost nothing: SETTINGS, PING, PRIORITY,
WINDOW_UPDATE, RST_STREAM, empty DATA, refused and reset streams (CVE-2019-9512 to 9518, 2023-44487,
2025-8671). Reading answers causes some noise, so each answer earns an allowance, and old noise is
forgotten. A peer that exceeds the limit is disconnected (ENHANCE_YOUR_CALM).

The rules for pings, in both directions, are those of gRPC's keepalive.
"""

from __future__ import annotations

from etcdlite.wire.http2_state import ENHANCE_YOUR_CALM, ConnectionFault

MAX_NOISE = 10_000
"""The limit on noisy frames, beyond the allowance for answers."""

NOISE_PER_ANSWER = 4
NOISE_PER_RESET = 10
"""The noise of a stream that is reset before it is answered."""

NOISE_PER_S = 100
"""The noise that is forgotten every second."""

MAX_PING_STRIKES = 2
"""Early pings that are tolerated, as in gRPC (ENHANCE_YOUR_CALM)."""

IDLE_PING_S = 7200.0
"""The shortest time between pings of a peer without open streams, as in gRPC."""


class Conduct:
    """The behaviour of one peer."""

    __slots__ = (
        "_answers_at_ping", "_answers_at_tick", "_heard_at", "_keepalive_interval_s",
        "_keepalive_timeout_s", "_noise", "_ping_min_s", "_ping_strikes", "_pinged_at",
        "_probed_at", "_ticked_at", "_updates", "answers", "was_heard",
    )  # fmt: skip

    def __init__(
        self, now: float, ping_min_s: float, keepalive_interval_s: float, keepalive_timeout_s: float
    ) -> None:
        """See `http2.Connection`."""
        self.answers = 0
        """Frames of answers sent so far, approximately."""
        self.was_heard = False
        """The peer sent something since the last tick."""
        self._ping_min_s = ping_min_s
        self._keepalive_interval_s = keepalive_interval_s
        self._keepalive_timeout_s = keepalive_timeout_s
        self._noise = 0
        self._answers_at_tick = 0
        self._updates = 0
        """WINDOW_UPDATEs received so far; they may arrive long after the answers they are for."""
        self._ticked_at = now
        self._pinged_at = float("-inf")
        self._ping_strikes = 0
        self._answers_at_ping = 0
        self._heard_at = now
        self._probed_at: float | None = None

    def count_noise(self, frames: int) -> None:
        """Raises ConnectionFault."""
        self._noise += frames
        if self._noise > MAX_NOISE + NOISE_PER_ANSWER * (self.answers - self._answers_at_tick):
            raise ConnectionFault(ENHANCE_YOUR_CALM, "too many frames without requests")

    def count_window_update(self) -> None:
        """Raises ConnectionFault."""
        self._updates += 1
        if self._updates > NOISE_PER_ANSWER * self.answers:
            self.count_noise(1)

    def count_ping(self, now: float, has_streams: bool) -> None:
        """Pings after an answer measure the bandwidth and are allowed. Others keep the connection
        alive and must not come too often. Raises ConnectionFault."""
        if self.answers != self._answers_at_ping:
            self._answers_at_ping = self.answers
            self._ping_strikes = 0
        else:
            self.count_noise(1)
            if now - self._pinged_at < (self._ping_min_s if has_streams else IDLE_PING_S):
                self._ping_strikes += 1
                if self._ping_strikes > MAX_PING_STRIKES:
                    raise ConnectionFault(ENHANCE_YOUR_CALM, "too_many_pings")
        self._pinged_at = now

    def tick(self, now: float) -> bool:
        """Forget old noise; whether the peer is silent. Called several times a second."""
        forgotten = NOISE_PER_S * (now - self._ticked_at) + 1
        forgotten += NOISE_PER_ANSWER * (self.answers - self._answers_at_tick)
        self._noise = max(0, self._noise - int(forgotten))
        self._answers_at_tick = self.answers
        self._ticked_at = now
        if self.was_heard:
            self.was_heard = False
            self._heard_at = now
            self._probed_at = None
            return False
        return self._probed_at is not None or now - self._heard_at > self._keepalive_interval_s

    @property
    def is_probing(self) -> bool:
        return self._probed_at is not None

    def is_gone(self, now: float) -> bool:
        """Whether the peer did not answer a ping of ours in time."""
        return self._probed_at is not None and now - self._probed_at > self._keepalive_timeout_s

    def probed(self, now: float) -> None:
        """The silent peer is pinged now."""
        self._probed_at = now
