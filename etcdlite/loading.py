"""Threads that do one thing and end, such as imports of modules that few members need: an import
may take 40 ms."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Sequence

RunTask = Callable[[Callable[[], None], Callable[[], None]], None]
"""`run_task(task, done)` runs `task`, slow work, in a thread, and then calls `done` in the loop
(`Member.run_task`)."""


def start_thread(name: str, run: Callable[[], object]) -> RuntimeError | None:
    """Call `run` in a thread that does not keep the process from ending. Returns the failure if
    there can be no more threads now."""
    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError as failure:
        return failure
    return None


def are_loaded(names: Sequence[str]) -> bool:
    """Whether all these modules are imported."""
    return all(name in sys.modules for name in names)


def when_loaded(names: Sequence[str], run_task: RunTask, do: Callable[[], None]) -> None:
    """Call `do` once these modules are imported: at once if they are, otherwise after a task has
    imported them. Name what a module imports before the module."""
    if are_loaded(names):
        do()
    else:
        run_task(lambda: _load(names), do)


def _load(names: Sequence[str]) -> None:
    for name in names:
        importlib.import_module(name)
