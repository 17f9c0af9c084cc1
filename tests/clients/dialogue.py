"""How a client script talks with the test that started it.

It prints one JSON object a line, `{"step": NAME, ...facts}`, and reads from standard input the one
line that tells it to come to an end. `etcd3_npm.mjs` does the same in JavaScript.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 60.0
"""How long anything may take before the script fails."""
PAUSE_S = 0.02
"""Between two tries of what does not work yet."""


def say(step: str, **facts: Any) -> None:
    print(json.dumps({"step": step, **facts}), flush=True)


def when_told() -> threading.Event:
    """Set when the test has written a line (or has gone)."""
    told = threading.Event()

    def listen() -> None:
        sys.stdin.readline()
        told.set()

    threading.Thread(target=listen, daemon=True).start()
    return told


def wait_until(condition: Callable[[], Any]) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not in {PATIENCE_S:g} s: {condition}"
        time.sleep(PAUSE_S)
    return value


def main(scenarios: dict[str, Callable[[str], None]]) -> None:
    """Run `script ENDPOINT SCENARIO`."""
    endpoint, name = sys.argv[1:]
    scenarios[name](endpoint)
