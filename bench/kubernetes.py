"""The load of a Kubernetes API server on three members, for etcdlite and etcd alike.

    python -m bench.kubernetes [--objects 3000] [--rounds 3] [--servers etcdlite,etcd]

Objects of 2 KB, with the requests of k8s.io/apiserver's storage/etcd3, over gRPC, `IN_FLIGHT` at a
time over a connection to each member:

- create: a transaction that compares mod_revision with 0 and puts;
- update: one that compares with the revision in the cache and puts, else gets;
- contended: `WRITERS` writers increment one object, each from what its last answer showed;
- list: all objects in pages of 500, at the revision of the first page, by ten clients;
- watch: `WATCHES` watches with previous values read everything from the first revision on;
- delete: a transaction for each object, as deletecollection sends them.

Shown are operations (tries, pages, events) per second, and the CPU that all members need for one.
The load is one process in Python. It takes up to a core, so the rates have a ceiling; CPU has none.
"""

from __future__ import annotations

import argparse
import os
import select
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import cycle, islice

from bench.clients import GrpcConnection, call
from bench.cluster import MEMBERS, ClusterMember, leader_of, started
from bench.watches import WatchConnection
from etcdlite import methods, proto

OBJECT_BYTES = 2048
IN_FLIGHT = 60
WRITERS = 100
INCREMENTS = 3
WATCHES = 50
PAGE_KEYS = 500
LISTERS = 10
PREFIX = b"/registry/pods/default/"
END = PREFIX[:-1] + b"0"

_TXN = methods.METHOD_BY_NAME["KV.Txn"]
_RANGE = methods.METHOD_BY_NAME["KV.Range"]

Worker = Generator[tuple[methods.Method, bytes], bytes, None]
"""Yields its requests, and is sent the reply to each."""


def key_of(number: int) -> bytes:
    return PREFIX + b"pod-%06d" % number


def value_of(number: int) -> bytes:
    return (b"%08d" % number) * (OBJECT_BYTES // 8)


def _txn(key: bytes, revision: int, op: proto.RequestOp, gets: bool) -> bytes:
    compare = proto.Compare(key=key, target=proto.Compare.MOD, mod_revision=revision)
    otherwise = [proto.RequestOp(request_range=proto.RangeRequest(key=key))] if gets else []
    return proto.TxnRequest(compare=[compare], success=[op], failure=otherwise).encode()


def _create(key: bytes, value: bytes) -> bytes:
    op = proto.RequestOp(request_put=proto.PutRequest(key=key, value=value))
    return _txn(key, 0, op, False)


def _update(key: bytes, revision: int, value: bytes) -> bytes:
    op = proto.RequestOp(request_put=proto.PutRequest(key=key, value=value))
    return _txn(key, revision, op, True)


def _delete(key: bytes, revision: int) -> bytes:
    op = proto.RequestOp(request_delete_range=proto.DeleteRangeRequest(key=key))
    return _txn(key, revision, op, True)


def carry_out(connections: list[GrpcConnection], workers: Iterable[Worker], at_once: int) -> int:
    """Run the workers, `at_once` at a time, each on one connection; the number of replies."""
    rest = iter(workers)
    poll = select.poll()
    by_fd = {}
    waiting: dict[tuple[int, int], Worker] = {}
    for connection in connections:
        fd = connection.socket.fileno()
        by_fd[fd] = connection
        poll.register(fd, select.POLLIN)

    def send(fd: int, ready: list[tuple[Worker, tuple[methods.Method, bytes]]]) -> None:
        ids = by_fd[fd].send([request for _, request in ready])
        for number, (worker, _) in zip(ids, ready, strict=True):
            waiting[fd, number] = worker

    def begin(count: int) -> list[tuple[Worker, tuple[methods.Method, bytes]]]:
        return [(worker, next(worker)) for worker in islice(rest, count)]

    for fd in by_fd:
        send(fd, begin(at_once // len(by_fd)))
    done = 0
    while waiting:
        ready = [fd for fd, connection in by_fd.items() if connection.replies_waiting]
        for fd in ready or [fd for fd, _ in poll.poll()]:
            again = []
            for number, body in by_fd[fd].receive_once():
                done += 1
                worker = waiting.pop((fd, number))
                try:
                    again.append((worker, worker.send(body)))
                except StopIteration:
                    again += begin(1)
            if again:
                send(fd, again)
    return done


def _creator(number: int, revisions: dict[int, int]) -> Worker:
    body = yield _TXN, _create(key_of(number), value_of(number))
    answer = proto.TxnResponse.decode(body)
    assert answer.succeeded and answer.header is not None
    revisions[number] = answer.header.revision


def _updater(number: int, revisions: dict[int, int]) -> Worker:
    body = yield _TXN, _update(key_of(number), revisions[number], value_of(number + 1))
    answer = proto.TxnResponse.decode(body)
    assert answer.succeeded and answer.header is not None
    revisions[number] = answer.header.revision


def _contender(key: bytes) -> Worker:
    found = proto.RangeResponse.decode((yield _RANGE, proto.RangeRequest(key=key).encode())).kvs[0]
    for _ in range(INCREMENTS):
        while True:
            body = yield _TXN, _update(key, found.mod_revision, found.value)
            answer = proto.TxnResponse.decode(body)
            if answer.succeeded:
                assert answer.header is not None
                found.mod_revision = answer.header.revision
                break
            response = answer.responses[0].response_range
            assert response is not None
            found = response.kvs[0]


def _lister(objects: int) -> Worker:
    key, revision, seen = PREFIX, 0, 0
    while True:
        request = proto.RangeRequest(key=key, range_end=END, limit=PAGE_KEYS, revision=revision)
        answer = proto.RangeResponse.decode((yield _RANGE, request.encode()))
        assert answer.header is not None
        seen += len(answer.kvs)
        revision = revision or answer.header.revision
        if not answer.more:
            break
        key = answer.kvs[-1].key + b"\0"
    assert seen == objects


def _deleter(number: int, revisions: dict[int, int]) -> Worker:
    body = yield _TXN, _delete(key_of(number), revisions[number])
    assert proto.TxnResponse.decode(body).succeeded


def _watch_all(members: list[ClusterMember], events: int) -> int:
    connections = [WatchConnection(m.port) for m in islice(cycle(members), WATCHES)]
    for connection in connections:
        everything = proto.WatchCreateRequest(
            key=PREFIX, range_end=END, start_revision=1, prev_kv=True
        )
        connection.create([everything])
    poll = select.poll()
    by_fd = {connection.socket.fileno(): connection for connection in connections}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    while by_fd:
        for fd, _ in poll.poll():
            connection = by_fd[fd]
            connection.receive_frames()
            if connection.events >= events:
                assert connection.events == events
                poll.unregister(fd)
                by_fd.pop(fd).close()
    return events * WATCHES


def phases(members: list[ClusterMember], objects: int) -> Iterator[tuple[str, Callable[[], int]]]:
    """The name of each phase, and what carries it out and returns the number of operations."""
    connections = [GrpcConnection(member.port) for member in members]
    revisions: dict[int, int] = {}
    numbers = range(objects)

    def run(workers: Iterable[Worker], at_once: int = IN_FLIGHT) -> Callable[[], int]:
        return lambda: carry_out(connections, workers, at_once)

    yield "create", run(_creator(n, revisions) for n in numbers)
    yield "update", run(_updater(n, revisions) for n in numbers)
    contended = key_of(objects)
    call(connections[0], "KV.Put", proto.PutRequest(key=contended, value=value_of(0)))
    yield "contended", run((_contender(contended) for _ in range(WRITERS)), WRITERS)
    yield "list", run((_lister(objects + 1) for _ in range(LISTERS)), LISTERS // MEMBERS * MEMBERS)
    version = call(connections[0], "KV.Range", proto.RangeRequest(key=contended)).kvs[0].version
    yield "watch", lambda: _watch_all(members, 2 * objects + version)
    yield "delete", run(_deleter(n, revisions) for n in numbers)
    for connection in connections:
        connection.close()


def measure(name: str, folder: str, objects: int) -> dict[str, tuple[float, float]]:
    """One round for one server: (operations per second, µs of CPU for each) by phase."""
    figures = {}
    with started(name, folder) as members:
        leader_of(members)
        for phase, do in phases(members, objects):
            cpu_s = sum(member.cpu_s() for member in members)
            began = time.perf_counter()
            count = do()
            took_s = time.perf_counter() - began
            cpu_s = sum(member.cpu_s() for member in members) - cpu_s
            figures[phase] = count / took_s, cpu_s / count * 1e6
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--servers", default="etcdlite,etcd")
    options = parser.parse_args()
    results: dict[str, list[dict[str, tuple[float, float]]]] = {}
    for number in range(options.rounds):
        for name in options.servers.split(","):
            with tempfile.TemporaryDirectory() as folder:
                found = measure(name, os.path.join(folder, str(number)), options.objects)
                results.setdefault(name, []).append(found)
    for phase in next(iter(results.values()))[0]:
        line = [f"{phase:10}"]
        for name, rounds in results.items():
            rate, cpu_us = (statistics.median(r[phase][n] for r in rounds) for n in (0, 1))
            line.append(f"{name} {rate:9,.0f}/s {cpu_us:8,.1f} µs")
        print(*line, sep="  ", flush=True)


if __name__ == "__main__":
    main()
