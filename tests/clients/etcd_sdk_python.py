"""PyPI's `etcd-sdk-python` at its normal work: HTTP/2 by grpcio.

The import name is `pyetcd`. Its watches and calls do not come back by themselves after a lost
connection, so this does what its users do: try again, a watch from the next revision.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import grpc
from dialogue import PAUSE_S, main, say, wait_until, when_told
from pyetcd.client import Endpoint, MultiEndpointEtcd3Client
from pyetcd.events import DeleteEvent
from pyetcd.exceptions import Etcd3Exception

TTL_S = 2
ROUNDS = 5
LOST = (Etcd3Exception, grpc.RpcError)
"""What the library raises when the server cannot be reached."""


def connect(endpoint: str) -> MultiEndpointEtcd3Client:
    host, port = endpoint.rsplit(":", 1)
    # Come back at once, instead of not trying a server for minutes after it failed.
    backoff = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50)]
    address = Endpoint(host, int(port), secure=False, time_retry=0, opts=backoff)
    return MultiEndpointEtcd3Client([address], timeout=20)


def pairs(found: Any) -> list[list[str]]:
    return [[metadata.key.decode(), value.decode()] for value, metadata in found]


def text(etcd: Any, key: str) -> str | None:
    value = etcd.get(key)[0]
    return None if value is None else value.decode()


def kv(endpoint: str) -> None:
    with connect(endpoint) as etcd:
        for key, value in (("kv/a", "1"), ("kv/b", "2"), ("kv/c", "3"), ("other", "4")):
            etcd.put(key, value)
        say("get", found=text(etcd, "kv/b"), missing=text(etcd, "kv/none"))
        say("prefix", pairs=pairs(etcd.get_prefix("kv/")))
        say("range", pairs=pairs(etcd.get_range("kv/b", "z")))
        etcd.delete("kv/b")
        say("delete", pairs=pairs(etcd.get_prefix("kv/")))
        etcd.delete_prefix("kv/")
        say("delete prefix", pairs=pairs(etcd.get_prefix("kv/")))
        value = bytes(range(256)) * 4000
        etcd.put("large", value)
        say("large", same=etcd.get("large")[0] == value)


def txn(endpoint: str) -> None:
    with connect(endpoint) as etcd:
        of = etcd.transactions
        etcd.put("txn/key", "old")
        etcd.put("txn/extra", "1")
        branches = {
            "compare": [of.value("txn/key") == "old", of.version("txn/key") > 0],
            "success": [of.put("txn/key", "new"), of.delete("txn/extra")],
            "failure": [of.put("txn/else", "1"), of.get("txn/key")],
        }
        outcomes = [etcd.transaction(**branches)[0] for _ in range(2)]
        say("txn", succeeded=outcomes, pairs=pairs(etcd.get_prefix("txn/")))


def watch(endpoint: str) -> None:
    with connect(endpoint) as etcd:
        last = int(etcd.get_response("none").header.revision)
        told = when_told()
        while not told.is_set():
            try:
                events, _ = etcd.watch_prefix("watch/", start_revision=last + 1)
                say("watching")
                for event in events:
                    kind = "delete" if isinstance(event, DeleteEvent) else "put"
                    say("event", event=[kind, event.key.decode(), event.value.decode()])
                    last = event.mod_revision
            except LOST:
                say("lost")
                time.sleep(PAUSE_S)


def lease(endpoint: str) -> None:
    with connect(endpoint) as etcd:
        kept, left = etcd.lease(TTL_S), etcd.lease(TTL_S)
        etcd.put("lease/kept", "1", lease=kept)
        etcd.put("lease/left", "1", lease=left)
        since_s = time.monotonic()
        say("granted", ttl_s=[kept.ttl, left.ttl], keys=[key.decode() for key in kept.keys])

        def have_lived() -> bool:
            assert kept.refresh()[0].TTL == TTL_S
            return time.monotonic() - since_s > 2 * TTL_S and text(etcd, "lease/left") is None

        wait_until(have_lived)
        say("kept", kept=text(etcd, "lease/kept"), left=text(etcd, "lease/left"))
        kept.revoke()
        say("revoked", kept=text(etcd, "lease/kept"))


def lock(endpoint: str) -> None:
    with connect(endpoint) as one, connect(endpoint) as two:
        with one.lock("mutex"):
            say("held", other_got_it=two.lock("mutex").acquire(timeout=0))
        one.put("count", "0")

        def contend(etcd: Any) -> None:
            for _ in range(ROUNDS):
                with etcd.lock("mutex") as mine:
                    assert mine.is_acquired()
                    etcd.put("count", str(int(text(etcd, "count") or "") + 1))

        threads = [threading.Thread(target=contend, args=(etcd,)) for etcd in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        say("counted", count=text(one, "count"), of=str(2 * ROUNDS))


class Candidate:
    """etcd's election recipe: the oldest key below a prefix leads, each under its own lease."""

    def __init__(self, etcd: Any, name: str) -> None:
        self.etcd = etcd
        self.lease = etcd.lease(60)
        self.key = f"election/{self.lease.id:x}"
        assert etcd.put_if_not_exists(self.key, name, lease=self.lease)

    def wait_elected(self) -> None:
        """Return when every candidate before this one has gone."""
        while True:
            found = self.etcd.get_prefix_response(
                "election/", sort_order="ascend", sort_target="create"
            )
            keys = [kv.key.decode() for kv in found.kvs]
            if keys[0] == self.key:
                return
            before = keys[keys.index(self.key) - 1]
            events, cancel = self.etcd.watch(before, start_revision=found.header.revision + 1)
            for event in events:
                if isinstance(event, DeleteEvent):
                    cancel()


def election(endpoint: str) -> None:
    with connect(endpoint) as one, connect(endpoint) as two:
        first = Candidate(one, "one")
        first.wait_elected()
        second = Candidate(two, "two")
        elected = threading.Event()

        def campaign() -> None:
            second.wait_elected()
            elected.set()

        def leader() -> str:
            return pairs(two.get_prefix("election/", sort_order="ascend", sort_target="create"))[0][
                1
            ]

        thread = threading.Thread(target=campaign)
        thread.start()
        say("elected", leader=leader(), other=elected.is_set())
        one.put(first.key, "one, again", lease=first.lease)
        say("proclaimed", leader=leader(), other=elected.is_set())
        first.lease.revoke()
        thread.join()
        say("resigned", leader=leader(), other=elected.is_set())


def restart(endpoint: str) -> None:
    with connect(endpoint) as etcd:
        told = when_told()
        held = etcd.lease(600)
        etcd.put("leased", "1", lease=held)
        acknowledged: list[str] = []
        number = 0

        def put() -> None:
            nonlocal number
            number += 1
            try:
                etcd.put(f"restart/{number:06}", "1")
                acknowledged.append(f"restart/{number:06}")
            except LOST:
                time.sleep(PAUSE_S)

        def has_put() -> bool:
            put()
            return len(acknowledged) >= 10

        wait_until(has_put)
        say("busy")
        while not told.is_set():
            put()
        acknowledged_before = len(acknowledged)

        def goes_on() -> bool:
            put()
            return len(acknowledged) >= acknowledged_before + 10

        wait_until(goes_on)
        present = {metadata.key.decode() for _, metadata in etcd.get_prefix("restart/")}
        say(
            "back",
            lost=sorted(set(acknowledged) - present),
            leased=text(etcd, "leased"),
            lease_s=held.refresh()[0].TTL,
        )


main({one.__name__: one for one in (kv, txn, watch, lease, lock, election, restart)})
