"""Reads a member's metrics from its client URL. What comes from there may be anything: it is
bounded, and lines that do not parse are skipped."""

from __future__ import annotations

import http.client
import math
import re
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from etcdlite.cli.session import Session

MAX_BYTES = 8 << 20
"""What follows in a longer answer is not read. A member's has about 300 KiB."""

TIMEOUT_S = 5.0

_LINE = re.compile(rb"^([a-zA-Z_:]\w*)(?:\{(.*)\})? ([-+\w.]+)$", re.M)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")


class Series:
    """The samples of one scrape."""

    def __init__(
        self, text: bytes, read_at_s: float = 0.0, took_s: float = 0.0, monotonic_s: float = 0.0
    ) -> None:
        """`read_at_s` (Unix time) and `monotonic_s`: the middle of the request, which took
        `took_s`."""
        self.read_at_s = read_at_s
        self.monotonic_s = monotonic_s
        self.took_s = took_s
        self._samples: dict[str, list[tuple[Mapping[str, str], float]]] = {}
        for name, labels, number in _LINE.findall(text):
            try:
                value = float(number)
            except ValueError:
                continue
            if not math.isfinite(value):
                continue
            pairs = _LABEL.findall(labels.decode("utf-8", "replace")) if labels else ()
            about = {label: _ESCAPE.sub(_unescaped, text) for label, text in pairs}
            self._samples.setdefault(name.decode(), []).append((about, value))

    def all(self, name: str) -> Sequence[tuple[Mapping[str, str], float]]:
        """(labels, value) of each sample of this name."""
        return self._samples.get(name, ())

    def value(self, name: str) -> float | None:
        """The value of the name's only sample, or the sum of all; None if there is none."""
        found = self._samples.get(name)
        return sum(value for _, value in found) if found else None

    def histogram(self, name: str) -> Histogram:
        """All histograms of this name as one; empty if there is none."""
        counts: dict[float, float] = {}
        for labels, value in self.all(f"{name}_bucket"):
            try:
                bound = float(labels.get("le", ""))
            except ValueError:
                continue
            counts[bound] = counts.get(bound, 0.0) + value
        return Histogram(tuple(sorted(counts.items())))


@dataclass(frozen=True)
class Histogram:
    """Values by size."""

    buckets: tuple[tuple[float, float], ...] = ()
    """(upper bound, how many values are not above it) of each, in order."""

    @property
    def count(self) -> float:
        return self.buckets[-1][1] if self.buckets else 0.0

    def quantile(self, share: float) -> float:
        """A value that this share of all values does not exceed: the bound of its bucket, and for
        the last one, which has none, that of the bucket before. 0 if there are no values."""
        wanted = share * self.count
        below = 0.0
        for bound, count in self.buckets if wanted else ():
            if count >= wanted:
                return bound if bound < math.inf else below
            below = bound
        return 0.0

    def since(self, before: Histogram) -> Histogram:
        """What was added after `before`; all of it if the process started again in between."""
        earlier = dict(before.buckets)
        added = tuple((bound, count - earlier.get(bound, 0.0)) for bound, count in self.buckets)
        return self if any(count < 0 for _, count in added) else Histogram(added)


def _unescaped(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]


def url_of(endpoint: str) -> str:
    """Where the metrics of a member are, by the endpoint of a client."""
    return (endpoint if "://" in endpoint else f"http://{endpoint}") + "/metrics"


def fetch(session: Session, endpoint: str) -> Series:
    """The metrics of the member at this endpoint. Raises OSError, ValueError."""
    url = url_of(endpoint)
    context = None
    if url.startswith("https://"):
        from etcdlite.client import tls

        connection = session.connection([endpoint])
        settings = tls.Settings(**{name: connection[name] for name in tls.Settings._fields})
        context = tls.context(settings, "http/1.1")
    # As other requests to members, this one goes through no proxy.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    began_s, began = time.time(), time.monotonic()
    text = b""
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            while len(text) < MAX_BYTES and (data := answer.read1(1 << 16)):
                text += data
                if time.monotonic() - began > TIMEOUT_S:
                    raise TimeoutError("timed out")
    except http.client.HTTPException:
        raise ValueError("the answer is not HTTP") from None
    took_s = time.monotonic() - began
    return Series(text, began_s + took_s / 2, took_s, began + took_s / 2)


def why(error: Exception) -> str:
    """The cause of a failed `fetch` in a few words."""
    return str(getattr(error, "reason", error))
