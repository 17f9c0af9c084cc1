"""A program that uses every public call of the Python client; `test_client_types.py` has it checked
by `mypy --strict`. It is not run."""

# ruff: noqa: F841

from __future__ import annotations

import io
from typing import Any

from etcdlite import proto
from etcdlite.client import (
    Alarm,
    AsyncClient,
    AsyncElection,
    AsyncLeadership,
    AsyncLease,
    AsyncLock,
    AsyncStream,
    AsyncWatch,
    Client,
    Compacted,
    ConnectionFailed,
    CreateRevision,
    Delete,
    DeleteResult,
    Election,
    EtcdliteError,
    Event,
    Get,
    HashKV,
    KeyValue,
    Leadership,
    Lease,
    LeaseGrant,
    LeaseInfo,
    LeaseOf,
    Lock,
    Member,
    ModRevision,
    Op,
    Put,
    PutResult,
    Range,
    RangeResult,
    Status,
    Stream,
    Timeout,
    Txn,
    TxnResult,
    Value,
    Version,
    Watch,
    WatchBatch,
    prefix_end,
)


def keys(client: Client) -> None:
    put: PutResult = client.put("k", b"v", lease=7, prev_kv=True, timeout_s=1.0)
    before: KeyValue | None = put.prev_kv
    got: KeyValue | None = client.get("k", revision=put.revision, serializable=True)
    if got is not None:
        key: bytes = got.key
        numbers: int = got.create_revision + got.mod_revision + got.version + got.lease
    found: RangeResult = client.range("a", range_end=prefix_end(b"b"), sort_by="mod", limit=1)
    values: list[bytes] = [kv.value for kv in found]
    first: KeyValue = found[0] if len(found) and not found.more else found.kvs[found.count - 1]
    deleted: DeleteResult = client.delete(prefix="a", prev_kv=True)
    gone: tuple[KeyValue, ...] = deleted.prev_kvs[: deleted.deleted]
    compare = [Value("k") == "v", Version("k") > 0, CreateRevision("k") != 1, ModRevision("k") < 9]
    success = [Put("k", "v"), Get("k"), Range(prefix=""), Delete("k"), Txn([LeaseOf("k") == 0])]
    result: TxnResult = client.txn(compare, success, failure=[Get("k")], repeatable=True)
    results: tuple[Any, ...] = result.results if result.succeeded else ()
    op: Op[PutResult] = Put("k")
    again: PutResult = client.perform(op)
    revision: int = client.compact(5, physical=True)


def leases(client: Client) -> None:
    granted: LeaseGrant = client.lease_grant(600, id=7)
    client.put("k", lease=granted)
    ttl: int = client.lease_keep_alive_once(granted)
    info: LeaseInfo = client.lease_time_to_live(granted.id, keys=True)
    client.put("k", lease=info)
    names: tuple[bytes, ...] = info.keys
    ids: tuple[int, ...] = client.leases()
    revision: int = client.lease_revoke(granted)
    with client.lease(10, id=8) as lease:
        same: Lease = lease
        client.put("k", lease=lease)
        number: int = int(lease) + lease.id + lease.ttl
        lost: bool = lease.lost or lease.wait_lost(1.0)
        lease.revoke()


def places(client: Client) -> None:
    with client.lock("job", ttl=5, timeout_s=0) as lock:
        same: Lock = lock
        lock.acquire(1.0)
        client.txn([lock.guard], [Put(lock.key, str(lock.revision), lease=lock.lease)])
        lost: bool = lock.lost
        lock.release()
    election: Election = client.election("e", ttl=5)
    with election.campaign("me", timeout_s=1.0) as leadership:
        also: Leadership = leadership
        revision: int = leadership.proclaim(b"still me")
        leadership.resign()
    leader: KeyValue | None = election.leader()
    for kv in election.observe():
        value: bytes = kv.value


def watches(client: Client) -> None:
    with client.watch(prefix="k", start_revision=2, no_put=True, timeout_s=1.0) as watch:
        same: Watch = watch
        for event in watch:
            change: Event = event
            parts: tuple[str, bytes, bytes, int] = (
                event.type,
                event.key,
                event.value,
                event.revision,
            )
            old: KeyValue | None = None if event.is_delete else event.prev_kv
        next_one: Event = watch.next_event(timeout_s=1)
        for batch in watch.batches():
            mark: WatchBatch = batch
        watch.request_progress()
        position: int = watch.revision
        watch.close()


def maintenance(client: Client) -> None:
    status: Status = client.status(timeout_s=1)
    alarms: tuple[Alarm, ...] = client.alarms()
    lifted: tuple[Alarm, ...] = client.disarm(alarms[0])
    client.defragment()
    sums: HashKV = client.hash_kv(5)
    client.move_leader(status.leader)
    size_bytes: int = client.snapshot("backup.db") + client.snapshot(io.BytesIO())
    members: tuple[Member, ...] = client.members(linearizable=False)
    added: Member = client.member_add(["http://a:1"], learner=True)
    members = client.member_remove(added.id)
    members = client.member_update(added.id, ["http://a:2"])
    members = client.member_promote(added.id)


def low_level() -> None:
    with Client(["a:1", "b:2"], timeout_s=1, dial_timeout_s=1.0) as client:
        client.timeout_s = client.dial_timeout_s
        response = client.call("KV.Put", proto.PutRequest(key=b"k"), timeout_s=1, repeatable=True)
        with client.stream("Watch.Watch", timeout_s=1.0) as stream:
            same: Stream = stream
            stream.send(proto.WatchRequest())
            stream.close_send()
            for message in stream:
                print(message, stream.endpoint)
            stream.cancel()
            stream.close()
        try:
            client.get("k")
        except Compacted as error:
            oldest: int = error.compact_revision
        except (Timeout, ConnectionFailed) as failure:
            cause: OSError = failure
        except EtcdliteError as refusal:
            said: tuple[int, str, str] = refusal.code, refusal.text, refusal.endpoint
        client.close()
        where: str = client.endpoint


async def every_call_again() -> None:
    async with AsyncClient("a:1", timeout_s=1, dial_timeout_s=1.0) as client:
        put: PutResult = await client.put("k", b"v", lease=7, prev_kv=True)
        got: KeyValue | None = await client.get("k")
        found: RangeResult = await client.range(prefix="", descending=True)
        deleted: DeleteResult = await client.delete("k")
        result: TxnResult = await client.txn([Value("k") == "v"], [Put("k")], [Get("k")])
        again: PutResult = await client.perform(Put("k"))
        numbers: int = await client.compact(5) + await client.lease_revoke(7)
        granted: LeaseGrant = await client.lease_grant(600)
        numbers += await client.lease_keep_alive_once(granted)
        info: LeaseInfo = await client.lease_time_to_live(granted)
        ids: tuple[int, ...] = await client.leases()
        status: Status = await client.status()
        alarms: tuple[Alarm, ...] = await client.disarm((await client.alarms())[0])
        await client.defragment()
        sums: HashKV = await client.hash_kv()
        await client.move_leader(1)
        size_bytes: int = await client.snapshot("backup.db")
        added: Member = await client.member_add(["http://a:1"])
        members: tuple[Member, ...] = await client.members()
        members = await client.member_remove(1)
        members = await client.member_update(1, ["http://a:1"])
        members = await client.member_promote(1)
        async with client.lease(10) as lease:
            same: AsyncLease = lease
            lost: bool = lease.lost or await lease.wait_lost()
            number: int = int(lease) + lease.id + lease.ttl
            await lease.revoke()
        async with client.lock("job") as lock:
            also: AsyncLock = lock
            await lock.acquire(1.0)
            await client.put(lock.key, str(lock.revision), lease=lock.lease)
            await client.txn([lock.guard])
            lost = lock.lost
            await lock.release()
        election: AsyncElection = client.election("e")
        async with election.campaign("me") as leadership:
            leading: AsyncLeadership = leadership
            revision: int = await leadership.proclaim("still me")
            await leadership.resign()
        leader: KeyValue | None = await election.leader()
        async for kv in election.observe():
            value: bytes = kv.value
        async with client.watch("k", progress_notify=True) as watch:
            watched: AsyncWatch = watch
            async for event in watch:
                change: Event = event
            change = await watch.next_event(timeout_s=1)
            async for batch in watch.batches():
                mark: WatchBatch = batch
            watch.request_progress()
            position: int = watch.revision
            watch.close()
        response = await client.call("KV.Put", proto.PutRequest(key=b"k"), timeout_s=1)
        async with client.stream("Watch.Watch", timeout_s=1.0) as stream:
            streaming: AsyncStream = stream
            await stream.send(proto.WatchRequest())
            await stream.close_send()
            async for message in stream:
                print(message, stream.endpoint)
            stream.cancel()
        await client.close()
        where: str = client.endpoint
