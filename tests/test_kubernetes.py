"""The requests of a Kubernetes API server, in the shapes of k8s.io/apiserver's storage/etcd3, over
gRPC by grpcio. They are sent to etcd, too, where it is installed: so the shapes are right."""

from __future__ import annotations

import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from rigs.processes import PATIENCE_S, ServerProcess, wait_until
from rigs.real_etcd import running_etcd
from test_cluster_live import LiveCluster

from etcdlite import methods, proto

REGISTRY = b"/registry/"
COMPACT_REV_KEY = b"compact_rev_key"
QUOTA_BYTES = 16 << 20
MAX_RECEIVE_BYTES = (1 << 31) - 1
"""What Go's client takes."""

PROGRESS_INTERVAL_S = 1.0
RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
ETCDLITE = (sys.executable, "-m", "etcdlite")


def prefix_end(prefix: bytes) -> bytes:
    return prefix[:-1] + bytes([prefix[-1] + 1])


class Watch:
    """A watch as the API server opens it: on a prefix, from the revision after `revision`, with
    previous values and progress notifications, and only while the cluster has a leader."""

    def __init__(self, channel: Any, prefix: bytes, revision: int, **options: Any) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call = rpc(channel, "Watch.Watch", "stream_stream")(
            iter(self._requests.get, None), metadata=(("hasleader", "true"),), timeout=PATIENCE_S
        )
        create = proto.WatchCreateRequest(
            key=prefix,
            range_end=prefix_end(prefix),
            start_revision=revision + 1,
            prev_kv=True,
            **options,
        )
        self._requests.put(proto.WatchRequest(create_request=create))
        self.created = next(self._call)
        assert self.created.created and not self.created.canceled

    def request_progress(self) -> None:
        self._requests.put(proto.WatchRequest(progress_request=proto.WatchProgressRequest()))

    def next(self) -> Any:
        return next(self._call)

    def events(self, count: int) -> list[Any]:
        """The next events, at least so many."""
        found: list[Any] = []
        while len(found) < count:
            found += self.next().events
        return found

    def bookmark(self) -> int:
        """The revision of the next response, which must have no events."""
        response = self.next()
        assert not response.events and not response.canceled
        return int(response.header.revision)

    def close(self) -> None:
        self._call.cancel()
        self._requests.put(None)


def rpc(channel: Any, name: str, kind: str = "unary_unary") -> Callable[..., Any]:
    known = methods.METHOD_BY_NAME[name]
    return getattr(channel, kind)(
        known.grpc_path,
        request_serializer=lambda message: message.encode(),
        response_deserializer=known.response.decode,
    )


class Api:
    """What an API server asks of its store."""

    def __init__(self, endpoint: str, server: str = "etcdlite") -> None:
        self.server = server
        limit = ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES)
        self.channel = grpc.insecure_channel(endpoint, [limit])
        self._watches: list[Watch] = []

    def call(self, name: str, request: Any) -> Any:
        return rpc(self.channel, name)(request, timeout=PATIENCE_S)

    def create(self, key: bytes, value: bytes, lease: int = 0) -> int:
        """The revision; 0 if the object exists."""
        put = proto.PutRequest(key=key, value=value, lease=lease)
        answer = self._txn(key, 0, proto.RequestOp(request_put=put))
        return int(answer.responses[0].response_put.header.revision) if answer.succeeded else 0

    def update(self, key: bytes, revision: int, value: bytes) -> Any:
        """A try to replace the version of that revision. If it fails, the answer has the present
        version."""
        put = proto.PutRequest(key=key, value=value)
        return self._txn(key, revision, proto.RequestOp(request_put=put), key)

    def delete(self, key: bytes, revision: int) -> Any:
        delete = proto.DeleteRangeRequest(key=key)
        return self._txn(key, revision, proto.RequestOp(request_delete_range=delete), key)

    def _txn(self, key: bytes, revision: int, op: Any, get: bytes = b"") -> Any:
        # Go's client sends the number 0, too.
        compare = proto.Compare(key=key, target=proto.Compare.MOD, mod_revision=revision)
        otherwise = [proto.RequestOp(request_range=proto.RangeRequest(key=get))] if get else []
        request = proto.TxnRequest(compare=[compare], success=[op], failure=otherwise)
        return self.call("KV.Txn", request)

    def guaranteed_update(self, key: bytes, change: Callable[[bytes], bytes]) -> tuple[int, int]:
        """(revision, number of tries)"""
        found = self.call("KV.Range", proto.RangeRequest(key=key)).kvs[0]
        for tries in itertools.count(1):
            answer = self.update(key, found.mod_revision, change(found.value))
            if answer.succeeded:
                return int(answer.header.revision), tries
            found = answer.responses[0].response_range.kvs[0]
        raise AssertionError

    def page(self, prefix: bytes, limit: int, after: bytes = b"", revision: int = 0) -> Any:
        """A page of a list; `after` and `revision` are what `continue` holds."""
        request = proto.RangeRequest(
            key=after + b"\0" if after else prefix,
            range_end=prefix_end(prefix),
            limit=limit,
            revision=revision,
        )
        return self.call("KV.Range", request)

    def pages(self, prefix: bytes, limit: int) -> Iterator[Any]:
        page = self.page(prefix, limit)
        revision = page.header.revision
        yield page
        while page.more:
            page = self.page(prefix, limit, page.kvs[-1].key, revision)
            yield page

    def count(self, prefix: bytes) -> int:
        request = proto.RangeRequest(key=prefix, range_end=prefix_end(prefix), count_only=True)
        return int(self.call("KV.Range", request).count)

    def compact(self, version: int, revision: int) -> tuple[int, int]:
        """One round of the compactor: (version of the key, revision) for the next round."""
        put = proto.PutRequest(key=COMPACT_REV_KEY, value=b"%d" % revision)
        request = proto.TxnRequest(
            compare=[proto.Compare(key=COMPACT_REV_KEY, target=0, version=version)],
            success=[proto.RequestOp(request_put=put)],
            failure=[proto.RequestOp(request_range=proto.RangeRequest(key=COMPACT_REV_KEY))],
        )
        answer = self.call("KV.Txn", request)
        if not answer.succeeded:
            version = answer.responses[0].response_range.kvs[0].version
        else:
            version += 1
            if revision:
                self.call("KV.Compact", proto.CompactionRequest(revision=revision))
        return version, int(answer.header.revision)

    def watch(self, prefix: bytes, revision: int, **options: Any) -> Watch:
        self._watches.append(Watch(self.channel, prefix, revision, **options))
        return self._watches[-1]

    def close(self) -> None:
        for watch in self._watches:
            watch.close()
        self.channel.close()


@pytest.fixture(scope="module", params=["etcdlite", "etcd"])
def api(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("kubernetes")
    flags = [f"--quota-backend-bytes={QUOTA_BYTES}"]
    if request.param == "etcd":
        flags.append(f"--experimental-watch-progress-notify-interval={PROGRESS_INTERVAL_S:g}s")
        with running_etcd(folder, flags=flags) as endpoint:
            api = Api(endpoint, "etcd")
            yield api
            api.close()
        return
    flags.append(f"--watch-progress-notify-interval={PROGRESS_INTERVAL_S:g}s")
    server = ServerProcess(folder / "data", flags, ETCDLITE).start()
    api = Api(server.endpoint)
    yield api
    api.close()
    server.close()


@pytest.fixture
def pods(request: Any) -> bytes:
    """A prefix for one test."""
    return REGISTRY + b"pods/%s/" % request.node.name.partition("[")[0].encode()


def fill(api: Api, prefix: bytes, count: int, value: bytes = b"pod", at_once: int = 100) -> int:
    """Create so many objects; the last revision."""
    create = rpc(api.channel, "KV.Txn")
    revision = 0
    for first in range(0, count, at_once):
        waiting = []
        for n in range(first, min(count, first + at_once)):
            key = prefix + b"%06d" % n
            put = proto.RequestOp(request_put=proto.PutRequest(key=key, value=value))
            compare = proto.Compare(key=key, target=proto.Compare.MOD, mod_revision=0)
            request = proto.TxnRequest(compare=[compare], success=[put])
            waiting.append(create.future(request, timeout=PATIENCE_S))  # type: ignore[attr-defined]
        for future in waiting:
            answer = future.result()
            assert answer.succeeded
            revision = max(revision, answer.header.revision)
    return revision


def test_the_version_allows_reads_from_the_cache(api: Api) -> None:
    # The API server asks for progress from 3.5.13 on.
    version = api.call("Maintenance.Status", proto.StatusRequest()).version
    if api.server == "etcdlite":
        assert tuple(map(int, version.split("."))) >= (3, 5, 13)


def test_an_object_is_created_once(api: Api, pods: bytes) -> None:
    revision = api.create(pods + b"a", b"1")
    assert revision and not api.create(pods + b"a", b"2")
    found = api.call("KV.Range", proto.RangeRequest(key=pods + b"a"))
    assert [(kv.value, kv.mod_revision, kv.version) for kv in found.kvs] == [(b"1", revision, 1)]


def test_an_update_or_delete_of_an_old_version_gets_the_present_one(api: Api, pods: bytes) -> None:
    key = pods + b"a"
    first = api.create(key, b"1")
    second = api.update(key, first, b"2")
    assert second.succeeded
    assert second.responses[0].response_put.header.revision == second.header.revision == first + 1
    for answer in (api.update(key, first, b"3"), api.delete(key, first)):
        assert not answer.succeeded
        (found,) = answer.responses[0].response_range.kvs
        assert (found.value, found.mod_revision, found.version) == (b"2", first + 1, 2)
        assert found.create_revision == first
        assert answer.responses[0].response_range.count == 1
        assert answer.header.revision == first + 1
    gone = api.delete(key, first + 1)
    assert gone.succeeded and gone.responses[0].response_delete_range.deleted == 1
    assert gone.responses[0].response_delete_range.header.revision == first + 2
    answer = api.update(key, first + 1, b"4")
    assert not answer.succeeded and not answer.responses[0].response_range.kvs


def test_contended_updates_all_happen(api: Api, pods: bytes) -> None:
    key = pods + b"counter"
    api.create(key, b"0")
    tries: list[int] = []

    def add() -> None:
        for _ in range(20):
            tries.append(api.guaranteed_update(key, lambda value: b"%d" % (int(value) + 1))[1])

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = api.call("KV.Range", proto.RangeRequest(key=key)).kvs[0]
    assert (found.value, found.version) == (b"160", 161)
    assert len(tries) == 160


def test_pages_show_the_revision_of_the_first_one(api: Api, pods: bytes) -> None:
    fill(api, pods, 250)
    found = []
    for number, page in enumerate(api.pages(pods, 100)):
        assert page.count == 250 - 100 * number, "the client shows the items that remain"
        found += page.kvs
        api.create(pods + b"%06d-new" % (100 * number + 150), b"new")
        api.delete(pods + b"%06d" % (249 - number), page.kvs[-1].mod_revision)
        present = api.call("KV.Range", proto.RangeRequest(key=pods + b"%06d" % (249 - number)))
        api.delete(pods + b"%06d" % (249 - number), present.kvs[0].mod_revision)
    assert [kv.key for kv in found] == [pods + b"%06d" % n for n in range(250)]
    assert api.count(pods) == 250


def test_a_watch_has_previous_values_from_its_revision_on(api: Api, pods: bytes) -> None:
    key = pods + b"a"
    began = api.create(key, b"1")
    api.update(key, began, b"2")
    watch = api.watch(pods, began)
    api.delete(key, began + 1)
    api.create(key, b"3")
    put, delete, create = watch.events(3)
    assert (put.kv.value, put.prev_kv.value, put.kv.mod_revision) == (b"2", b"1", began + 1)
    assert (delete.type, delete.prev_kv.value) == (proto.Event.DELETE, b"2")
    assert delete.kv.mod_revision == began + 2
    # What the API server calls "added".
    assert create.prev_kv is None and create.kv.create_revision == create.kv.mod_revision


def test_progress_that_is_requested_makes_a_cache_as_fresh_as_the_store(
    api: Api, pods: bytes
) -> None:
    """A consistent read, and a WatchList, from the watch cache: they wait until its watch has
    come to the revision of the store, and ask for progress every 100 ms until then."""
    began = fill(api, pods, 10)
    watch = api.watch(pods, began - 10, progress_notify=True)
    cache = {event.kv.key for event in watch.events(10)}
    api.create(REGISTRY + b"other/" + pods[-8:], b"moves the revision")
    now = api.page(pods, 1).header.revision
    assert now > began

    watch.request_progress()
    wait_until(lambda: watch.bookmark() >= now or watch.request_progress(), "the cache is fresh")
    assert cache == {kv.key for kv in api.page(pods, 0).kvs}


def test_an_idle_watch_gets_bookmarks(api: Api, pods: bytes) -> None:
    watch = api.watch(pods, fill(api, pods, 1), progress_notify=True)
    now = api.create(REGISTRY + b"other/" + pods[-8:], b"moves the revision")
    wait_until(lambda: watch.bookmark() >= now, "a bookmark with the revision of the store")


def test_api_servers_compact_in_turn(api: Api, pods: bytes) -> None:
    key = pods + b"a"
    began = api.create(key, b"1")
    first = api.compact(0, 0)
    second = api.compact(0, 0)
    assert first[0] == second[0] == 1, "the second API server finds the version of the first"
    api.update(key, began, b"2")
    continued = api.page(pods, 1)
    assert api.compact(*first)[0] == 2
    assert api.compact(*second)[0] == 2, "it has lost, and compacts nothing"
    version, revision = api.compact(2, api.page(pods, 1).header.revision)
    assert version == 3
    api.compact(version, revision)

    with pytest.raises(grpc.RpcError) as failure:
        api.page(pods, 1, key, continued.header.revision)
    assert failure.value.code() == grpc.StatusCode.OUT_OF_RANGE
    assert failure.value.details() == "etcdserver: mvcc: required revision has been compacted"
    watch = api.watch(pods, began)
    canceled = watch.next()
    assert canceled.canceled and canceled.compact_revision > began
    with pytest.raises(grpc.RpcError) as failure:
        api.page(pods, 1, revision=canceled.header.revision + 1000)
    assert failure.value.details() == "etcdserver: mvcc: required revision is a future revision"


def test_events_share_a_lease(api: Api, pods: bytes) -> None:
    lease = api.call("Lease.LeaseGrant", proto.LeaseGrantRequest(TTL=3)).ID
    began = api.create(pods + b"0", b"event", lease)
    for n in range(1, 5):
        assert api.create(pods + b"%d" % n, b"event", lease)
    watch = api.watch(pods, began - 1)
    events = watch.events(10)
    assert [event.type for event in events] == [proto.Event.PUT] * 5 + [proto.Event.DELETE] * 5
    assert all(event.kv.lease == lease for event in events[:5])
    assert all(event.prev_kv.lease == lease for event in events[5:])
    with pytest.raises(grpc.RpcError) as failure:
        api.create(pods + b"late", b"event", lease)
    assert failure.value.details() == "etcdserver: requested lease not found"


def test_an_object_that_is_too_large_is_refused(api: Api, pods: bytes) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        api.create(pods + b"a", bytes(1_600_000))
    # The API server makes "request entity too large" of these words.
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert failure.value.details() == "etcdserver: request is too large"
    assert api.create(pods + b"a", bytes(1_500_000))


def test_a_full_store_says_so_and_can_be_emptied(api: Api, pods: bytes) -> None:
    # The last test of the module: it fills the store.
    with pytest.raises(grpc.RpcError) as failure:
        for n in range(100):
            api.create(pods + b"%d" % n, bytes([n]) * 1_000_000)
    assert failure.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.value.details() == "etcdserver: mvcc: database space exceeded"
    if api.server == "etcdlite":  # etcd 3.5.1 refuses deletes in transactions; later ones do not.
        kv = api.page(pods, 1).kvs[0]
        assert api.delete(kv.key, kv.mod_revision).succeeded


class Cache:
    """A watch cache: what its events say, and nothing else. It opens its watch again, at the next
    member, from the revision that it has."""

    def __init__(self, apis: list[Api], prefix: bytes) -> None:
        self._apis = apis
        self._prefix = prefix
        self.revision = 1
        self.objects: dict[bytes, Any] = {}
        self.faults: list[str] = []
        self.resumed = 0
        self._is_over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for api in itertools.cycle(self._apis):
            if self._is_over:
                return
            try:
                watch = api.watch(self._prefix, self.revision, progress_notify=True)
                while not self._is_over:
                    for event in watch.next().events:
                        self._take(event)
            except (grpc.RpcError, StopIteration, AssertionError):
                self.resumed += 1
                time.sleep(0.05)

    def _take(self, event: Any) -> None:
        kv = event.kv
        had = self.objects.pop(kv.key, None)
        if kv.mod_revision <= self.revision:
            self.faults.append(f"revision {kv.mod_revision} after {self.revision}")
        if (had and had.mod_revision) != (event.prev_kv and event.prev_kv.mod_revision):
            self.faults.append(f"before revision {kv.mod_revision} something is missing")
        self.revision = kv.mod_revision
        if event.type == proto.Event.PUT:
            self.objects[kv.key] = kv

    def close(self) -> None:
        self._is_over = True


def test_lists_and_watches_go_on_when_the_leader_is_killed(tmp_path: Path, pods: bytes) -> None:
    cluster = LiveCluster(tmp_path, 3)
    apis: list[Api] = []
    caches: list[Cache] = []
    try:
        cluster.leader  # noqa: B018
        apis += [Api(member.endpoint) for member in cluster.members.values()]
        last = fill(apis[0], pods, 300)
        caches += [Cache(apis[n:] + apis[:n], pods) for n in range(3)]
        page = apis[0].page(pods, 50, revision=last)
        listed = list(page.kvs)
        written: dict[bytes, bytes] = {}
        leader = cluster.leader
        for n in range(300):
            key = pods + b"%06d" % (n % 60)
            value = b"%d" % n
            _retried(apis, lambda api, key=key, value=value: _set(api, key, value))
            written[key] = value
            if n == 100:
                leader.kill()
            if n % 50 == 49:
                after = listed[-1].key
                page = _retried(
                    apis, lambda api, after=after: api.page(pods, 50, after, revision=last)
                )
                listed += page.kvs
        assert not page.more
        assert [kv.key for kv in listed] == [pods + b"%06d" % n for n in range(300)]
        assert {kv.value for kv in listed} == {b"pod"}, "all pages are of the revision of the first"
        everything = _retried(apis, lambda api: api.page(pods, 0)).kvs
        assert {kv.key: kv.value for kv in everything} | written == {
            kv.key: kv.value for kv in everything
        }, "no acknowledged write is lost"
        final = {kv.key: kv.mod_revision for kv in everything}
        for cache in caches:
            wait_until(
                lambda c=cache: {k: kv.mod_revision for k, kv in c.objects.items()} == final,
                "the watch has seen everything",
            )
            assert not cache.faults
        assert any(cache.resumed for cache in caches), "a watch was at the leader"
    finally:
        for cache in caches:
            cache.close()
        for api in apis:
            api.close()
        cluster.close()


def _set(api: Api, key: bytes, value: bytes) -> None:
    api.guaranteed_update(key, lambda _: value)


def _retried(apis: list[Api], do: Callable[[Api], Any]) -> Any:
    for api in itertools.cycle(apis):
        try:
            return do(api)
        except grpc.RpcError as failure:
            assert failure.code() in RETRIED, failure
            time.sleep(0.02)
    raise AssertionError


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_hundred_thousand_objects_are_listed_beside_writes(tmp_path: Path, pods: bytes) -> None:
    server = ServerProcess(tmp_path / "data", [], ETCDLITE).start()
    api = Api(server.endpoint)
    is_over = threading.Event()

    def write() -> None:
        for n in itertools.cycle(range(0, 100_000, 97)):
            if is_over.is_set():
                return
            api.guaranteed_update(pods + b"%06d" % n, lambda _: b"changed")

    writer = threading.Thread(target=write)
    try:
        last = fill(api, pods, 100_000, bytes(500), at_once=500)
        writer.start()
        found = 0
        revision = 0
        for page in api.pages(pods, 500):
            revision = revision or page.header.revision
            assert page.count == 100_000 - found
            assert all(kv.mod_revision <= revision for kv in page.kvs)
            found += len(page.kvs)
        assert found == 100_000 and revision >= last
        # Too old for the watch, after the API server has compacted.
        version, now = api.compact(0, 0)
        api.compact(version, now)
        with pytest.raises(grpc.RpcError, match="required revision has been compacted"):
            api.page(pods, 500, revision=last)
    finally:
        is_over.set()
        if writer.is_alive():
            writer.join()
        api.close()
        server.close()
