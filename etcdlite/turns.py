"""The order in which the loop serves the files that are ready: sockets, and the pipe that wakes it.

A turn of the loop has a slice of time. It serves the files of members first, then those that the
last turn did not reach, then the others. Each may use its share of the slice. Those that are not
reached are remembered, so every file is reached after at most as many turns as files are ready.
"""

from __future__ import annotations

from collections.abc import Callable

SLICE_S = 0.005
"""A turn serves ready files for this long."""

MIN_SHARE_S = 0.001
"""Ready files share the slice, but each may use at least this much."""

Ready = Callable[[int], None]
"""The callback of a file: receives the mask of what it is ready for."""


class Turns:
    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` returns seconds."""
        self.share_end = 0.0
        """When the callback that runs must give way."""
        self.first: set[Ready] = set()
        """The callbacks that come first in every turn."""
        self._clock = clock
        self._rotation: list[Ready] = []
        """The order of the next turn, if the last one did not reach everything."""

    def serve(self, masks: dict[Ready, int], began: float) -> None:
        """Call what is ready, for one slice from `began`."""
        clock = self._clock
        order = list(masks)
        if self._rotation:
            known = [callback for callback in self._rotation if callback in masks]
            order = list(dict.fromkeys(known + order))
        if self.first:
            order.sort(key=self.first.__contains__, reverse=True)
        share_s = max(MIN_SHARE_S, SLICE_S / len(order)) if order else 0.0
        self._rotation = []
        now = clock()
        # To order ten thousand files takes longer than a slice. Serving may take as long as the
        # ordering took; otherwise no turn would serve any file.
        slice_end = max(began + SLICE_S, 2 * now - began)
        for at, callback in enumerate(order):
            if now > slice_end:
                self._rotation = order[at:] + order[:at]
                return
            self.share_end = now + share_s
            callback(masks[callback])
            now = clock()
