"""A member that counts the bytecode instructions of its main thread, for `instructions.py`.

It is `etcdlite` with a trace function. The count is the first eight bytes of the file that the
environment variable `COUNT_FILE` names, which other processes map, too. Imports are not counted,
nor is what the log thread and the disk thread do.
"""

from __future__ import annotations

import mmap
import os
import sys
from types import FrameType
from typing import Any

COUNT_FILE = "COUNT_FILE"
COUNT_BYTES = 8


def map_count(path: str) -> memoryview:
    """The count in a file, as the only item of a view."""
    with open(path, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), COUNT_BYTES)).cast("Q")


def main(flags: list[str]) -> int:
    from etcdlite import __main__

    count = map_count(os.environ[COUNT_FILE])

    def in_frame(_frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "opcode":
            count[0] += 1
        return in_frame

    def at_call(frame: FrameType, _event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return in_frame

    # Python 3.12 reports instructions only if some frame asked for it before.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(at_call)
    return __main__.main(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
