"""Lists of many keys and of large values, beside writes, as a Kubernetes API server asks for them.

    python -m bench.lists [KEYS] [etcd] [pages] [lists]

`pages` (default a million keys): the latency of a page of 500 keys with the count of the rest,
while another client puts 50 times a second: each at the newest revision, and all at the revision
of the first page. `lists` (5,000 keys of 4 KiB): keys only, all in one answer, all in pages of
500; and a get and a put beside two clients that list all. Without `pages` and `lists`: both.
Without `etcd`, the server is etcdlite. All clients speak gRPC. Run it on an idle machine.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from typing import Any

from bench.clients import GrpcConnection, call, timed_call
from bench.scale import PREFIX, load
from bench.servers import Server
from etcdlite import proto

KEYS = 1_000_000
PAGE_KEYS = 500
PAGES = 400
WRITES_PER_S = 50

LISTED_KEYS = 5_000
LISTED_VALUE_BYTES = 4096
LISTED = b"/listed/"
LISTS = 20
LISTERS = 2
BESIDE_S = 10.0


def end_of(prefix: bytes) -> bytes:
    """The end of the range of all keys with this prefix."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _write(port: int, is_over: Event) -> None:
    """Put new keys and delete some, `WRITES_PER_S` in all."""
    connection = GrpcConnection(port)
    number = 0
    while not is_over.is_set():
        number += 1
        key = PREFIX + b"%d/new" % (number * 7919 % 1000)
        call(connection, "KV.Put", proto.PutRequest(key=key, value=bytes(100)))
        if number % 5 == 0:
            call(connection, "KV.DeleteRange", proto.DeleteRangeRequest(key=key))
        time.sleep(1 / WRITES_PER_S)


def _list_all(port: int, is_over: Event) -> None:
    connection = GrpcConnection(port)
    while not is_over.is_set():
        _whole(connection)


def _whole(connection: GrpcConnection, **fields: Any) -> None:
    request = proto.RangeRequest(key=LISTED, range_end=end_of(LISTED), **fields)
    timed_call(connection, "KV.Range", request)


def _beside(port: int, target: Callable[[int, Event], None], clients: int) -> Callable[[], None]:
    """Start clients that go on until the function returned is called."""
    is_over = multiprocessing.Event()
    processes = [
        multiprocessing.Process(target=target, args=(port, is_over)) for _ in range(clients)
    ]
    for process in processes:
        process.start()
    time.sleep(0.5)

    def end() -> None:
        is_over.set()
        for process in processes:
            process.join()

    return end


def _timed(do: Callable[[], Any]) -> float:
    began = time.perf_counter()
    do()
    return (time.perf_counter() - began) * 1000


def _show(name: str, times_ms: list[float]) -> None:
    times_ms.sort()
    p50, p99 = times_ms[len(times_ms) // 2], times_ms[len(times_ms) * 99 // 100]
    print(f"  {name:32} p50 {p50:8.2f}  p99 {p99:8.2f}  worst {times_ms[-1]:8.2f} ms", flush=True)


def _pages_ms(connection: GrpcConnection, keys: int, is_fixed: bool) -> list[float]:
    times = []
    start, revision, before = PREFIX, 0, 0
    for _ in range(PAGES):
        request = proto.RangeRequest(
            key=start, range_end=end_of(PREFIX), limit=PAGE_KEYS, revision=revision
        )
        began = time.perf_counter()
        answer = call(connection, "KV.Range", request)
        times.append((time.perf_counter() - began) * 1000)
        if is_fixed:
            revision = revision or answer.header.revision
            assert answer.count <= keys - before + 100 * WRITES_PER_S
        before += PAGE_KEYS
        if answer.more:
            start = answer.kvs[-1].key + b"\0"
        else:
            start, before = PREFIX, 0
    return times


def pages(server: Server, keys: int) -> None:
    """The latency of pages over `keys` keys."""
    load(server, range(keys))
    connection = GrpcConnection(server.port)
    _show("page, nothing beside", _pages_ms(connection, keys, False))
    end = _beside(server.port, _write, 1)
    _show("page at the newest revision", _pages_ms(connection, keys, False))
    _show("page at a fixed revision", _pages_ms(connection, keys, True))
    end()


def lists(server: Server) -> None:
    """The latency of lists of large values, and of a get and a put beside them."""
    connection = GrpcConnection(server.port)
    for number in range(LISTED_KEYS):
        key = LISTED + b"%06d" % number
        value = (b"%d:" % number) * (LISTED_VALUE_BYTES // 6)
        call(connection, "KV.Put", proto.PutRequest(key=key, value=value))

    def in_pages() -> None:
        for first in range(0, LISTED_KEYS, PAGE_KEYS):
            request = proto.RangeRequest(
                key=LISTED + b"%06d" % first, range_end=end_of(LISTED), limit=PAGE_KEYS
            )
            timed_call(connection, "KV.Range", request)

    kinds: dict[str, Callable[[], None]] = {
        "keys only": lambda: _whole(connection, keys_only=True),
        "all in one answer": lambda: _whole(connection),
        "all in pages": in_pages,
    }
    for name, do in kinds.items():
        cpu_s = server.cpu_s()
        _show(name, [_timed(do) for _ in range(LISTS)])
        print(f"{'server CPU':>34} {(server.cpu_s() - cpu_s) / LISTS * 1000:12.2f} ms each")
    end = _beside(server.port, _list_all, LISTERS)
    requests: dict[str, tuple[str, Any]] = {
        "get": ("KV.Range", proto.RangeRequest(key=LISTED + b"000001")),
        "put": ("KV.Put", proto.PutRequest(key=b"other", value=b"v")),
    }
    for name, (method, request) in requests.items():
        times = []
        ends_at = time.monotonic() + BESIDE_S
        while time.monotonic() < ends_at:
            times.append(_timed(lambda m=method, r=request: call(connection, m, r)))  # type: ignore[misc]
            time.sleep(0.01)
        _show(f"{name} beside two lists", times)
    end()


def main() -> None:
    words = sys.argv[1:]
    name = "etcd" if "etcd" in words else "etcdlite"
    keys = next((int(word) for word in words if word.isdigit()), KEYS)
    parts = {"pages", "lists"}.intersection(words) or {"pages", "lists"}
    with tempfile.TemporaryDirectory() as folder:
        if "pages" in parts:
            with Server(name, folder) as server:
                print(f"{name}, {keys} keys", flush=True)
                pages(server, keys)
        if "lists" in parts:
            with Server(name, folder) as server:
                print(f"{name}, {LISTED_KEYS} keys of {LISTED_VALUE_BYTES} bytes", flush=True)
                lists(server)


if __name__ == "__main__":
    main()
