"""The Python client against a real etcdlite: every operation, locks and elections."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rigs.ports import free_ports
from rigs.processes import ServerProcess
from rigs.shells import clients

from etcdlite import proto
from etcdlite.client import (
    Client,
    Compacted,
    ConnectionFailed,
    CreateRevision,
    Delete,
    DuplicateKey,
    FutureRev,
    Get,
    KeyNotFound,
    LeaseExist,
    LeaseNotFound,
    LeaseOf,
    ModRevision,
    NotElected,
    Put,
    Range,
    Timeout,
    Txn,
    UnknownOutcome,
    Value,
    Version,
)

Connect = Callable[..., Any]


def server_in(folder: Path) -> ServerProcess:
    """Its port is the same after a restart."""
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    program = (sys.executable, "-m", "etcdlite")
    return ServerProcess(folder / "data", [f"--listen-client-urls={url}"], program).start()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = server_in(tmp_path_factory.mktemp("live"))
    yield server
    server.close()


@pytest.fixture(params=["blocking", "asyncio"])
def connect(live: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of the shell under test, connected to an empty store."""
    with Client(live.endpoint) as cleaner:
        cleaner.delete(prefix="")
    with clients(request.param) as make:
        yield lambda: make(live.endpoint)


def test_keys(connect: Connect) -> None:
    client = connect()
    first = client.put("a", "1").revision
    put = client.put("a", "2", prev_kv=True)
    assert (put.revision, put.prev_kv.value, put.prev_kv.mod_revision) == (first + 1, b"1", first)
    kv = client.get("a")
    assert (kv.value, kv.version, kv.create_revision) == (b"2", 2, first)
    assert client.get("a", revision=first).value == b"1"
    assert client.get("a", serializable=True) == kv
    assert client.get("b") is None
    with pytest.raises(KeyNotFound):
        client.put("b", ignore_value=True)
    with pytest.raises(FutureRev):
        client.get("a", revision=10**9)
    deleted = client.delete("a", prev_kv=True)
    assert (deleted.deleted, [kv.value for kv in deleted.prev_kvs]) == (1, [b"2"])
    assert client.delete("a").deleted == 0


def test_ranges(connect: Connect) -> None:
    client = connect()
    revisions = [client.put(f"k/{name}", name[::-1]).revision for name in ("ca", "ab", "bc")]
    client.put("l", "")

    def keys(*args: Any, **options: Any) -> list[bytes]:
        return [kv.key for kv in client.range(*args, **options)]

    assert keys(prefix="k/") == [b"k/ab", b"k/bc", b"k/ca"]
    assert keys(prefix="k/", descending=True) == [b"k/ca", b"k/bc", b"k/ab"]
    assert keys(prefix="k/", sort_by="mod") == [b"k/ca", b"k/ab", b"k/bc"]
    assert keys(prefix="k/", sort_by="value") == [b"k/ca", b"k/ab", b"k/bc"]
    assert keys("k/b", range_end="k/d") == [b"k/bc", b"k/ca"]
    assert keys("k/c", range_end=b"\0") == [b"k/ca", b"l"]
    assert keys(prefix="k/", revision=revisions[1]) == [b"k/ab", b"k/ca"]
    assert keys(prefix="k/", min_mod_revision=revisions[1]) == [b"k/ab", b"k/bc"]
    assert keys(prefix="k/", max_create_revision=revisions[1]) == [b"k/ab", b"k/ca"]
    limited = client.range(prefix="", limit=1)
    assert (len(limited), limited.count, limited.more) == (1, 4, True)
    counted = client.range(prefix="k/", count_only=True)
    assert (len(counted), counted.count) == (0, 3)
    assert client.range(prefix="k/", keys_only=True)[0].value == b""


def test_transactions(connect: Connect) -> None:
    client = connect()
    made = client.txn(
        [CreateRevision("k") == 0, LeaseOf("k") == 0],
        success=[Put("k", "v"), Get("k"), Txn([Value("k") == "v"], [], [Put("n", "1")])],
        failure=[Get("k")],
    )
    assert made.succeeded
    assert made.results[1].value == b"v"
    assert not made.results[2].succeeded, "every comparison sees the store as it was before"
    again = client.txn(
        [Value("k") != "v"], failure=[Get("k"), Range(prefix=""), Delete("n"), Get("n")]
    )
    assert not again.succeeded
    got, kvs, deleted, gone = again.results
    assert (got.mod_revision, kvs.count, deleted.deleted, gone) == (made.revision, 2, 1, None)
    assert client.txn([Version(prefix="k") > 0, ModRevision("k") < made.revision + 1]).succeeded
    assert not client.txn([Version("k") < 1]).succeeded
    with pytest.raises(DuplicateKey):
        client.txn(success=[Put("x", "1"), Put("x", "2")])


def test_watches(connect: Connect) -> None:
    client = connect()
    with client.watch(prefix="w/", prev_kv=True) as watch:
        client.put("w/1", "a")
        client.put("v", "not watched")
        client.put("w/1", "b")
        client.delete("w/1")
        events = [next(watch) for _ in range(3)]
        assert [(e.type, e.value) for e in events] == [
            ("PUT", b"a"),
            ("PUT", b"b"),
            ("DELETE", b""),
        ]
        assert [e.prev_kv and e.prev_kv.value for e in events] == [None, b"a", b"b"]
    start = events[0].revision
    with client.watch("w/1", start_revision=start, no_delete=True) as watch:
        assert [next(watch).value for _ in range(2)] == [b"a", b"b"]
    with client.watch("w/1", start_revision=start, no_put=True) as watch:
        assert next(watch).is_delete
        watch.request_progress()
        with pytest.raises(Timeout):
            watch.next_event(timeout_s=0.1)
        assert watch.revision == events[2].revision


def test_a_compacted_watch(connect: Connect) -> None:
    client = connect()
    revisions = [client.put("k", str(i)).revision for i in range(5)]
    client.compact(revisions[3])
    with pytest.raises(Compacted):
        client.get("k", revision=revisions[0])
    with pytest.raises(Compacted):
        client.compact(revisions[1])
    with pytest.raises(Compacted) as compacted, client.watch("k", start_revision=2) as watch:
        next(watch)
    assert compacted.value.compact_revision == revisions[3]
    with client.watch("k", start_revision=revisions[3]) as watch:
        assert next(watch).value == b"3"


def test_leases(connect: Connect) -> None:
    client = connect()
    with client.lease(ttl=5) as lease:
        client.put("k", "v", lease=lease)
        assert client.get("k").lease == lease.id
        info = client.lease_time_to_live(lease, keys=True)
        assert (info.id, info.granted_ttl, info.keys) == (lease.id, 5, (b"k",))
        assert 0 <= info.ttl <= 5
        assert lease.id in client.leases()
        assert client.lease_keep_alive_once(lease) == 5
        with pytest.raises(LeaseExist):
            client.lease_grant(5, id=lease.id)
        assert not lease.lost
    assert client.get("k") is None
    for call in (client.lease_keep_alive_once, client.lease_time_to_live, client.lease_revoke):
        with pytest.raises(LeaseNotFound):
            call(lease.id)


def test_a_revoked_lease_is_lost(connect: Connect) -> None:
    client = connect()
    with client.lease(ttl=2) as lease:
        client.lease_revoke(lease)
        assert lease.wait_lost()


def test_maintenance(connect: Connect, live: ServerProcess, tmp_path: Path) -> None:
    client = connect()
    revision = client.put("k", "v" * 1000).revision
    status = client.status()
    assert status.revision == revision
    assert status.leader == status.member_id
    assert status.db_size > 0
    (member,) = client.members()
    assert member.id == status.member_id
    assert client.alarms() == ()
    client.defragment()
    assert client.hash_kv().hash_revision == revision
    assert client.hash_kv() == client.hash_kv()
    size_bytes = client.snapshot(tmp_path / "backup")
    assert (tmp_path / "backup").stat().st_size == size_bytes > 1000


# Locks and elections.


def test_a_lock_is_held_by_one_at_a_time(connect: Connect) -> None:
    clients = [connect() for _ in range(3)]
    inside: list[int] = []
    order: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            with clients[number].lock("job", ttl=5) as lock:
                inside.append(number)
                assert inside == [number]
                assert not lock.lost
                order.append(lock.revision)
                inside.clear()

    with ThreadPoolExecutor(3) as pool:
        for result in [pool.submit(work, number) for number in range(3)]:
            result.result()
    assert order == sorted(order), "the fencing token grows"
    assert len(order) == 15
    assert connect().range(prefix="job/").count == 0


def test_a_lock_has_the_layout_of_etcd_and_guards_transactions(connect: Connect) -> None:
    client = connect()
    with client.lock("job", ttl=5) as lock:
        assert lock.key == b"job/%x" % lock.lease.id
        kv = client.get(lock.key)
        assert (kv.create_revision, kv.lease, kv.value) == (lock.revision, lock.lease.id, b"")
        assert client.txn([lock.guard], [Put("done", "by me")]).succeeded
        guard = lock.guard
    assert not client.txn([guard], [Put("done", "too late")]).succeeded


def test_a_taken_lock_is_not_waited_for_longer_than_asked(connect: Connect) -> None:
    client = connect()
    with client.lock("job", ttl=5):
        for timeout_s in (0, 0.1):
            with pytest.raises(Timeout), client.lock("job", ttl=5, timeout_s=timeout_s):
                pass
        assert client.range(prefix="job/").count == 1, "who gave up has left the line"
    with client.lock("job", ttl=5, timeout_s=0):
        pass


def test_a_lock_is_lost_with_its_lease_and_goes_to_the_next(connect: Connect) -> None:
    client, other = connect(), connect()
    with client.lock("job", ttl=2) as lock, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.lock("job", ttl=5).__enter__)
        other.lease_revoke(lock.lease.id)
        second = waiting.result()
        assert lock.lease.wait_lost()
        assert lock.lost
        assert not second.lost
        second.release()


def test_an_election(connect: Connect) -> None:
    client, other, watcher = connect(), connect(), connect()
    assert client.election("boss").leader() is None
    seen: list[bytes] = []
    done = threading.Event()

    def observe() -> None:
        for kv in watcher.election("boss").observe():
            seen.append(kv.value)
            if kv.value == b"two":
                done.set()
                return

    with ThreadPoolExecutor(2) as pool:
        observing = pool.submit(observe)
        with client.election("boss", ttl=5).campaign("one") as leadership:
            assert client.election("boss").leader().value == b"one"
            second = pool.submit(other.election("boss", ttl=5).campaign("two").__enter__)
            leadership.proclaim("one again")
            while seen[-1:] != [b"one again"]:
                assert not observing.done()
                time.sleep(0.005)
            assert not second.done()
            place = leadership.key
        following = second.result()
        assert done.wait(10)
        observing.result()
        assert other.election("boss").leader().value == b"two"
        client.delete(following.key)
        with pytest.raises(NotElected):
            following.proclaim("too late")
        following.resign()
    assert seen[-2:] == [b"one again", b"two"]
    assert client.get(place) is None


# The server goes and comes back.


def test_a_client_lives_through_kills_of_its_server(tmp_path: Path) -> None:
    server = server_in(tmp_path)
    try:
        with Client(server.endpoint) as client, client.watch(prefix="") as watch:
            acknowledged = {}
            for round_number in range(3):
                for i in range(20):
                    key = b"%d/%d" % (round_number, i)
                    acknowledged[key] = client.put(key, "v").revision
                server.kill()
                with pytest.raises((ConnectionFailed, UnknownOutcome)):
                    client.put("lost", "v")
                server.start()
            seen = [watch.next_event(timeout_s=10) for _ in acknowledged]
            assert {event.key: event.revision for event in seen} == acknowledged
    finally:
        server.close()


def test_the_low_level_speaks_messages(live: ServerProcess) -> None:
    with Client(f"http://{live.endpoint}") as client:
        response = client.call("KV.Put", proto.PutRequest(key=b"low", value=b"level"))
        assert response.header.revision > 0
        with client.stream("Lease.LeaseKeepAlive") as stream:
            stream.send(proto.LeaseKeepAliveRequest(ID=12345))
            assert next(stream).TTL == 0
            stream.close_send()
            assert list(stream) == []
