"""`etcdlite-ctl check`: puts under load, and a verdict in etcdctl's words.

`check perf` puts at a fixed rate for a minute and judges the rate, the slowest put and the
deviation. `check datascale` puts many keys and shows how the server's memory grew.

Invariants: nothing is put under a prefix that has keys; the keys are deleted afterwards.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from etcdlite.cli import scrape
from etcdlite.cli.failures import EXIT_BAD_FEATURE, EXIT_BAD_INPUT, EXIT_FAILED, PROGRAM, Failure
from etcdlite.cli.session import Progress, Session, describe
from etcdlite.client import AsyncClient, EtcdliteError
from etcdlite.client.errors import part
from etcdlite.client.operations import prefix_range
from etcdlite.notation import quote


class Load(NamedTuple):
    """`puts`: per second for `check perf`, in total for `check datascale`."""

    puts: int
    clients: int


PERF_LOADS = {
    "s": Load(150, 50),
    "m": Load(1000, 200),
    "l": Load(8000, 500),
    "xl": Load(15000, 1000),
}
SCALE_LOADS = {
    "s": Load(10_000, 50),
    "m": Load(100_000, 100),
    "l": Load(1_000_000, 500),
    "xl": Load(3_000_000, 1000),
}

LOAD_NAMES = {"small": "s", "medium": "m", "large": "l", "xLarge": "xl"}

CHECK_SECONDS = 60
CHECK_KEY_BYTES = 256
CHECK_VALUE_BYTES = 1024

MIN_RATE_SHARE = 0.9
MAX_SLOWEST_S = 0.5
MAX_DEVIATION_S = 0.1
"""The limits of `check perf`, as in etcdctl."""


class Puts:
    """The results of a check's puts. Times are in seconds."""

    def __init__(self) -> None:
        self.took_s: list[float] = []
        self.errors: Counter[str] = Counter()
        self.elapsed_s = 0.0


async def _put_keys(session: Session, prefix: bytes, clients: int, count: int, rate: float) -> Puts:
    """Put `count` random keys under `prefix`, `clients` at a time, at most `rate` per second.

    All clients share one connection. Rate 0 means no limit."""
    puts = Puts()
    numbers = iter(range(count))
    value = os.urandom(CHECK_VALUE_BYTES)
    clock = time.monotonic
    started_s = clock()

    async def work(client: AsyncClient, progress: Progress) -> None:
        for number in numbers:
            if rate:
                await asyncio.sleep(max(0.0, started_s + number / rate - clock()))
            key = prefix + os.urandom(CHECK_KEY_BYTES - len(prefix) % CHECK_KEY_BYTES)
            sent_s = clock()
            try:
                await client.put(key, value)
            except EtcdliteError as error:
                puts.errors[describe(error, client.endpoint)] += 1
            else:
                puts.took_s.append(clock() - sent_s)
            progress.update(number + 1, count)

    with Progress("puts") as progress:
        async with AsyncClient(**session.connection(session.endpoints)) as client:
            await asyncio.gather(*(work(client, progress) for _ in range(clients)))
    puts.elapsed_s = clock() - started_s
    return puts


def _run(session: Session, prefix: bytes, load: Load, count: int, rate: float = 0) -> Puts:
    try:
        return asyncio.run(_put_keys(session, prefix, load.clients, count, rate))
    except KeyboardInterrupt:
        _clean_up(session, prefix)
        raise


def _load_of(session: Session, loads: Mapping[str, Load]) -> Load:
    name = session.flags["load"]
    load = loads.get(LOAD_NAMES.get(name, name))
    if load is None:
        raise Failure(f"unknown load option {name}", EXIT_BAD_FEATURE)
    return load


def _check_prefix(session: Session) -> bytes:
    """The prefix for a check's keys. Raises Failure if it has keys."""
    name = session.flags["prefix"]
    prefix = os.fsencode(name)
    key, range_end = prefix_range(prefix)
    if session.ask("KV.Range", key=key, range_end=range_end, limit=1).kvs:
        text = f"prefix \"{name}\" has keys. Delete with '{PROGRAM} del --prefix {name}' first"
        raise Failure(text, EXIT_BAD_INPUT)
    return prefix


def _clean_up(session: Session, prefix: bytes) -> None:
    """Delete the keys of a check; compact and defragment if the flags say so."""
    key, range_end = prefix_range(prefix)
    revision = part(session.ask("KV.DeleteRange", key=key, range_end=range_end)).revision
    if session.flags["auto-compact"]:
        session.print(f"Compacting with revision {revision}")
        session.ask("KV.Compact", revision=revision, physical=True)
        session.print(f"Compacted with revision {revision}")
    if session.flags["auto-defrag"]:
        for endpoint in session.endpoints:
            name = quote(endpoint)
            session.print(f"Defragmenting {name}")
            with session.client_for([endpoint]) as client:
                session.ask("Maintenance.Defragment", client)
            session.print(f"Defragmented {name}")


def _error_lines(puts: Puts) -> list[str]:
    if not puts.errors:
        return []
    errors = (f"FAIL: ERROR({text}) -> {count}" for text, count in puts.errors.items())
    return ["FAIL: too many errors", *errors]


def perf_verdict(puts: Puts, rate: int) -> tuple[list[str], bool]:
    """(etcdctl's lines, whether the check passed) for a `check perf` of `rate` puts per second."""
    reached = len(puts.took_s) / puts.elapsed_s if puts.elapsed_s else 0.0
    slowest_s = max(puts.took_s, default=0.0)
    deviation_s = statistics.pstdev(puts.took_s) if puts.took_s else 0.0
    speed = f"{int(reached) + 1} writes/s"
    verdicts = (
        (
            reached > rate * MIN_RATE_SHARE,
            f"Throughput is {speed}",
            f"FAIL: Throughput too low: {speed}",
        ),
        (
            slowest_s <= MAX_SLOWEST_S,
            f"Slowest request took {slowest_s:f}s",
            f"Slowest request took too long: {slowest_s:f}s",
        ),
        (
            deviation_s <= MAX_DEVIATION_S,
            f"Stddev is {deviation_s:f}s",
            f"Stddev too high: {deviation_s:f}s",
        ),
    )
    passed = not puts.errors and all(good for good, _, _ in verdicts)
    lines = [f"PASS: {text}" if good else failure for good, text, failure in verdicts]
    return [*_error_lines(puts), *lines, "PASS" if passed else "FAIL"], passed


def check_perf(session: Session) -> int:
    load = _load_of(session, PERF_LOADS)
    prefix = _check_prefix(session)
    puts = _run(session, prefix, load, load.puts * CHECK_SECONDS, load.puts)
    _clean_up(session, prefix)
    lines, passed = perf_verdict(puts, load.puts)
    session.print(*lines)
    return 0 if passed else EXIT_FAILED


def _resident_bytes(session: Session, when: str) -> float:
    endpoint = session.client_for(session.endpoints[:1]).endpoint
    name = "process_resident_memory_bytes"
    try:
        value = scrape.fetch(session, endpoint).value(name)
        if value is not None:
            return value
        cause = "it is not among the metrics"
    except (OSError, ValueError) as error:
        cause = scrape.why(error)
    where = scrape.url_of(endpoint)
    raise Failure(f"Could not read {name} {when} the put operations from {where}: {cause}")


def check_datascale(session: Session) -> int:
    load = _load_of(session, SCALE_LOADS)
    prefix = _check_prefix(session)
    before_bytes = _resident_bytes(session, "before")
    session.print(
        f"Start data scale check for work load [{load.puts} key-value pairs, {CHECK_VALUE_BYTES} "
        f"bytes per key-value, {load.clients} concurrent clients]."
    )
    puts = _run(session, prefix, load, load.puts)
    used_bytes = _resident_bytes(session, "after") - before_bytes
    _clean_up(session, prefix)
    if puts.errors:
        session.print(*_error_lines(puts))
        return EXIT_FAILED
    session.print(f"PASS: Approximate system memory used : {used_bytes / (1 << 20):.2f} MB.")
    return 0
