"""A server that runs the garbage collector only on SIGUSR1, and writes down what it found.

    CYCLES_FILE=FILE python -m tests.rigs.uncollected [FLAG ...]

FILE gets a line of JSON for each signal: how many unreachable objects of each type there were, and
how many connections are open.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections import Counter
from typing import Any

from etcdlite import __main__, server
from etcdlite.connections import Connection


def _name(found: Any) -> str:
    kind = type(found).__qualname__
    place = getattr(found, "f_code", found)
    return f"{kind} {place.__qualname__}" if hasattr(place, "__qualname__") else kind


def _look(*_: object) -> None:
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.unfreeze()
    gc.collect()
    cycles = Counter(map(_name, gc.garbage))
    gc.garbage.clear()
    gc.set_debug(0)
    gc.collect()
    connections = sum(isinstance(one, Connection) for one in gc.get_objects())
    with open(os.environ["CYCLES_FILE"], "a") as file:
        file.write(json.dumps({"cycles": cycles, "connections": connections}) + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _look)
    # The start has turned it off.
    server.collect_only_new_objects = server.collect_new = lambda: None
    sys.exit(__main__.main(sys.argv[1:]))
