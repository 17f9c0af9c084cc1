"""Lets one test drive both shells of the Python client.

`Facade` makes an `AsyncClient`, and every object that comes from it, look like its blocking
counterpart: it runs their methods in an event loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

from etcdlite.client import AsyncClient, Client


class LoopThread:
    """An event loop in a thread, until `stop`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Facade:
    def __init__(self, thread: LoopThread, target: Any) -> None:
        self._thread = thread
        self._target = target

    def __getattr__(self, name: str) -> Any:
        async def read() -> Any:
            return getattr(self._target, name)

        value = self._thread.run(read())
        if not inspect.ismethod(value):
            return self._wrapped(value)

        def call(*args: Any, **kwargs: Any) -> Any:
            async def call_in_loop() -> Any:
                result = value(*args, **kwargs)
                return await result if inspect.isawaitable(result) else result

            return self._wrapped(self._thread.run(call_in_loop()))

        return call

    def _wrapped(self, value: Any) -> Any:
        if type(value).__module__ == "etcdlite.client.aio" or inspect.isasyncgen(value):
            return self if value is self._target else Facade(self._thread, value)
        return value

    def __int__(self) -> int:
        return int(self._target)

    def __repr__(self) -> str:
        return repr(self._target)

    def __enter__(self) -> Any:
        return self._wrapped(self._thread.run(self._target.__aenter__()))

    def __exit__(self, *error: object) -> None:
        self._thread.run(self._target.__aexit__(*error))

    def __iter__(self) -> Facade:
        return self

    def __next__(self) -> Any:
        async def advance() -> Any:
            return await self._target.__anext__()

        try:
            return self._thread.run(advance())
        except StopAsyncIteration:
            raise StopIteration from None


@contextlib.contextmanager
def clients(shell: str) -> Iterator[Callable[..., Any]]:
    """Makes clients of a shell, "blocking" or "asyncio", which look the same; closes them."""
    made: list[Any] = []
    thread = LoopThread() if shell == "asyncio" else None

    def make(*arguments: Any, **options: Any) -> Any:
        if thread is None:
            client: Any = Client(*arguments, **options)
        else:

            async def create() -> AsyncClient:
                return AsyncClient(*arguments, **options)

            client = Facade(thread, thread.run(create()))
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()
    if thread is not None:
        thread.stop()
