"""Questions that the program itself asks, of its own member or of another one."""

from __future__ import annotations

from collections.abc import Callable

from etcdlite.errors import EtcdError

Done = Callable[["bytes | EtcdError"], None]
"""Told the answer to a question, once: the encoded response, or why there is none."""


class Asked:
    """The session of a question to the own member."""

    is_blocked = False

    def __init__(self, done: Done) -> None:
        self._done = done

    def awaits(self, request_id: int) -> bool:
        return True

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        self._done(body)

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        self._done(failure)
