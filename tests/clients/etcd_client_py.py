"""PyPI's `etcd-client-py` at its normal work: HTTP/2 by the Rust crates tonic and h2.

The import name is `etcd_client`. This binding has no call for elections, starts every watch at the
present, and tells the id of a lease only in the name of a lock's key; what it has is used here.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from dialogue import PATIENCE_S, PAUSE_S, main, say, when_told
from etcd_client import (
    Client,
    ClientError,
    Compare,
    CompareOp,
    CondVar,
    EtcdLockOption,
    Txn,
    TxnOp,
    WatchEventType,
)

TTL_S = 2
ROUNDS = 5


def client(endpoint: str) -> Any:
    return Client([f"http://{endpoint}"])


async def pairs(etcd: Any, prefix: str) -> list[list[str]]:
    found = await etcd.get_prefix(prefix.encode())
    return [[bytes(key).decode(), bytes(value).decode()] for key, value in found]


async def text(etcd: Any, key: str) -> str | None:
    value = await etcd.get(key.encode())
    return None if value is None else bytes(value).decode()


async def wait_until(condition: Callable[[], Awaitable[Any]]) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := await condition()):
        assert time.monotonic() < deadline, f"not in {PATIENCE_S:g} s: {condition}"
        await asyncio.sleep(PAUSE_S)
    return value


async def kv(endpoint: str) -> None:
    async with client(endpoint).connect() as etcd:
        for key, value in ((b"kv/a", b"1"), (b"kv/b", b"2"), (b"kv/c", b"3"), (b"other", b"4")):
            await etcd.put(key, value)
        say("get", found=await text(etcd, "kv/b"), missing=await text(etcd, "kv/none"))
        say("prefix", pairs=await pairs(etcd, "kv/"))
        await etcd.delete(b"kv/b")
        say("delete", pairs=await pairs(etcd, "kv/"))
        await etcd.delete_prefix(b"kv/")
        say("delete prefix", pairs=await pairs(etcd, "kv/"))
        value = bytes(range(256)) * 4000
        await etcd.put(b"large", value)
        say("large", same=bytes(await etcd.get(b"large")) == value)


async def txn(endpoint: str) -> None:
    async with client(endpoint).connect() as etcd:
        await etcd.put(b"txn/key", b"old")
        await etcd.put(b"txn/extra", b"1")
        request = (
            Txn()
            .when(
                [
                    Compare.value(b"txn/key", CompareOp.EQUAL, b"old"),
                    Compare.version(b"txn/key", CompareOp.GREATER, 0),
                ]
            )
            .and_then([TxnOp.put(b"txn/key", b"new"), TxnOp.delete(b"txn/extra")])
            .or_else([TxnOp.put(b"txn/else", b"1"), TxnOp.get(b"txn/key")])
        )
        outcomes = [(await etcd.txn(request)).succeeded() for _ in range(2)]
        say("txn", succeeded=outcomes, pairs=await pairs(etcd, "txn/"))


async def watch(endpoint: str) -> None:
    told = when_told()
    async with client(endpoint).connect() as etcd:

        async def follow() -> None:
            while True:
                try:
                    ready = CondVar()
                    events = etcd.watch_prefix(b"watch/", ready_event=ready)
                    follower = asyncio.ensure_future(read(events))
                    await asyncio.wait(
                        [follower, asyncio.ensure_future(ready.wait())],
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    if not follower.done():
                        say("watching", pairs=await pairs(etcd, "watch/"))
                    await follower
                except ClientError:
                    say("lost")
                await asyncio.sleep(PAUSE_S)

        async def read(events: Any) -> None:
            async for event in events:
                kind = "delete" if event.event == WatchEventType.DELETE else "put"
                key, value = bytes(event.key).decode(), bytes(event.value).decode()
                say("event", event=[kind, key, value])

        following = asyncio.ensure_future(follow())
        await asyncio.to_thread(told.wait)
        following.cancel()


async def lease(endpoint: str) -> None:
    etcd = client(endpoint)
    async with etcd.connect() as other:

        async def id_of(name: str) -> int:
            (key,) = await other.keys_prefix(name.encode())
            return int(bytes(key).decode().rpartition("/")[2], 16)

        async def hold(name: str, done: asyncio.Event) -> None:
            option = EtcdLockOption(lock_name=name.encode(), ttl=TTL_S)
            async with etcd.with_lock(option):
                await done.wait()

        done = asyncio.Event()
        holding = [asyncio.ensure_future(hold(name, done)) for name in ("kept", "left")]

        async def names() -> list[str]:
            keys = await other.keys_prefix(b"kept/") + await other.keys_prefix(b"left/")
            return [bytes(key).decode().partition("/")[0] for key in keys]

        async def both_are_there() -> bool:
            return await names() == ["kept", "left"]

        await wait_until(both_are_there)
        since_s = time.monotonic()
        kept = await id_of("kept")

        async def have_lived() -> bool:
            await other.lease_keep_alive(kept)
            return time.monotonic() - since_s > 2 * TTL_S and "left" not in await names()

        await wait_until(have_lived)
        say("kept", names=await names())
        await other.lease_revoke(kept)
        say("revoked", names=await names())
        done.set()
        await asyncio.wait(holding)


async def lock(endpoint: str) -> None:
    one, two = client(endpoint), client(endpoint)
    async with one.with_lock(EtcdLockOption(lock_name=b"mutex")):
        try:
            async with two.with_lock(EtcdLockOption(lock_name=b"mutex", timeout=0.2)):
                say("held", other_got_it=True)
        except (ClientError, TimeoutError):
            say("held", other_got_it=False)
    async with one.connect() as etcd:
        await etcd.put(b"count", b"0")

    async def contend(etcd: Any) -> None:
        for _ in range(ROUNDS):
            async with etcd.with_lock(EtcdLockOption(lock_name=b"mutex")) as holder:
                count = int(await text(holder, "count") or "")
                await holder.put(b"count", str(count + 1).encode())

    await asyncio.gather(contend(one), contend(two))
    async with one.connect() as etcd:
        say("counted", count=await text(etcd, "count"), of=str(2 * ROUNDS))


async def restart(endpoint: str) -> None:
    told = when_told()
    async with client(endpoint).connect() as etcd:
        acknowledged: list[str] = []
        number = 0

        async def put() -> None:
            nonlocal number
            number += 1
            try:
                await etcd.put(f"restart/{number:06}".encode(), b"1")
                acknowledged.append(f"restart/{number:06}")
            except ClientError:
                await asyncio.sleep(PAUSE_S)

        async def has_put() -> bool:
            await put()
            return len(acknowledged) >= 10

        await wait_until(has_put)
        say("busy")
        while not told.is_set():
            await put()
        acknowledged_before = len(acknowledged)

        async def goes_on() -> bool:
            await put()
            return len(acknowledged) >= acknowledged_before + 10

        await wait_until(goes_on)
        present = {key for key, _ in await pairs(etcd, "restart/")}
        say("back", lost=sorted(set(acknowledged) - present))


def blocking(scenario: Callable[[str], Coroutine[Any, Any, None]]) -> Callable[[str], None]:
    return lambda endpoint: asyncio.run(scenario(endpoint))


main({one.__name__: blocking(one) for one in (kv, txn, watch, lease, lock, restart)})
# The library's threads outlive its objects, and may abort a Python that is shutting down.
sys.stdout.flush()
os._exit(0)
