"""Long work in steps: generators that yield where other work may go first.

A step takes a millisecond or two on a usual machine. It ends by a count of whatever takes time:
keys, versions of keys, bytes of records. The counts are in `Limits`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from heapq import merge
from io import BytesIO
from itertools import islice
from typing import Any, TypeVar

from etcdlite.limits import DEFAULT_LIMITS, Limits

SHRINK_FROM_BYTES = 256 << 10
"""A dict smaller than this is not worth a copy."""

T = TypeVar("T")

Job = Iterator["Callable[[], None] | None"]
"""Long work in steps. A yielded None means that there is more to do. A yielded callable is slow
disk work that does not touch the store's memory: run it once, in any thread, and resume the job
when it has returned."""


def finish(steps: Generator[None, None, T]) -> T:
    """Run all steps at once; returns their result."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result


def run(job: Job) -> None:
    """Do all of a job at once, here."""
    for task in job:
        if task is not None:
            task()


def discard(tables: Iterable[object]) -> Iterator[None]:
    """Empty those of these objects that are dicts or lists, in steps. Freeing a large one at once
    takes many milliseconds."""
    for table in tables:
        while isinstance(table, (dict, list)) and table:
            for _ in range(min(len(table), 1000)):
                table.popitem() if isinstance(table, dict) else table.pop()
            yield None


def shrunk(table: dict[Any, T]) -> dict[Any, T]:
    """The dict, or a copy of it if it takes much more memory than its items need: a dict keeps the
    memory of its largest size. A copy takes less time than the growth to that size took."""
    size = sys.getsizeof(table)
    return dict(table) if size > SHRINK_FROM_BYTES and size > 800 * len(table) else table


def sort_steps(
    items: list[Any],
    key: Callable[[Any], Any] | None = None,
    reverse: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> Generator[None, None, list[Any]]:
    """As `sorted`: pieces are sorted and then merged."""
    runs: list[list[Any]] = []
    size = limits.sort_step_items
    for at in range(0, len(items), size):
        if at:
            yield
        runs.append(sorted(items[at : at + size], key=key, reverse=reverse))
    if len(runs) <= 1:
        return runs[0] if runs else []
    merged = merge(*runs, key=key, reverse=reverse)
    result: list[Any] = []
    while piece := list(islice(merged, limits.merge_step_items)):
        result += piece
        yield
    while len(runs) > 32:  # To free them takes time, too.
        del runs[-32:]
        yield
    return result


def join_steps(
    pieces: Iterable[bytes], limits: Limits = DEFAULT_LIMITS
) -> Generator[None, None, bytes]:
    """As `b"".join`."""
    parts: list[bytes] = []
    some: list[bytes] = []
    size = 0
    for piece in pieces:
        if some and (size + len(piece) > limits.step_bytes or len(some) == limits.join_step_pieces):
            parts.append(b"".join(some))
            some.clear()
            size = 0
            yield
        some.append(piece)
        size += len(piece)
    parts.append(b"".join(some))
    if len(parts) == 1:
        return parts[0]
    # The buffer has its final size from the start. So each step copies its part and no other byte,
    # and `getvalue` copies nothing.
    joined = BytesIO(bytes(sum(map(len, parts))))
    for part in parts:
        for at in range(0, len(part), limits.step_bytes):
            joined.write(memoryview(part)[at : at + limits.step_bytes])
            yield
    return joined.getvalue()
