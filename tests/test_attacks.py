"""Hostile clients of a running member, each beside a well-behaved client that must be served.

These tests allow for a loaded machine. `bench/attacks.py` measures how much the well-behaved client
notices.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from rigs.attacks import ATTACKS, Connect, prepare
from rigs.processes import ServerProcess, wait_until

from etcdlite.client import Client

WORST_S = 5.0
"""The longest that one request of the well-behaved client may take."""

MEMORY_LIMIT = 128 << 20

SLACK_BYTES = 192 << 20
"""Answers in the making, and what comes between two counts."""


class Neighbour:
    """A well-behaved client: puts and gets, one after the other, until stopped."""

    def __init__(self, server: ServerProcess) -> None:
        self.times: list[float] = []
        self.failures: list[Exception] = []
        self._client: Client = server.client(timeout_s=60.0)
        self._stops = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        number = 0
        while not self._stops.is_set():
            number += 1
            began = time.monotonic()
            try:
                self._client.put("neighbour", str(number))
                self._client.get("neighbour")
            except Exception as failure:
                self.failures.append(failure)
                return
            self.times.append((time.monotonic() - began) / 2)
            self._stops.wait(0.005)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        # It must also be served after the attack.
        count = len(self.times)
        deadline = time.monotonic() + 60.0
        while len(self.times) < count + 3 and not self.failures and time.monotonic() < deadline:
            time.sleep(0.01)
        self._stops.set()
        self._thread.join(120.0)
        if error[0] is None:
            assert not self.failures, self.failures
            assert self.times, "the well-behaved client got no answer"
            assert max(self.times) < WORST_S, f"a request took {max(self.times):.1f} s"


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
def test_a_neighbour_is_served_during(attack: Callable[[Connect], None], server: Any) -> None:
    member: ServerProcess = server(
        "--max-connections=1200", f"--memory-limit={MEMORY_LIMIT}", "--max-concurrent-streams=65536"
    )
    prepare(member.client(timeout_s=60.0))
    before = member.rss_bytes
    with Neighbour(member) as neighbour:
        attack(member.connect)
        count = len(neighbour.times)
        wait_until(lambda: len(neighbour.times) > count + 20 or neighbour.failures, "it is served")
    assert member.is_running, member.tail()
    assert member.peak_rss_bytes - before < MEMORY_LIMIT + SLACK_BYTES, member.tail()
