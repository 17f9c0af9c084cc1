"""The meaning of etcd's key-value store in the plainest form: a dict per revision.

`PlainStore` keeps the whole state of every revision and answers every request from that. The tests
compare the store with it (`test_mvcc.py`, `test_txn.py`, `test_recovery.py`, `test_member.py`), and
`test_txn.py` compares it with a real etcd. It shares no code with the package except the message
classes and the error texts.

`Requests` draws random requests over few keys, so that they touch the same ones.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any
from zlib import crc32

from etcdlite import proto
from etcdlite.crc32c import by_table
from etcdlite.errors import error

State = "dict[bytes, proto.KeyValue]"

KEYS = (b"\x00", b"a", b"a\x00", b"b", b"ba", b"c", b"d", b"e", b"f", b"\xff")
RANGE_ENDS = (b"", b"\x00", b"a\x00", b"b", b"c", b"d", b"\xff\x00")
VALUES = (b"", b"1", b"2", b"v" * 40, b"w" * 300)
BOUNDS = (
    "min_mod_revision",
    "max_mod_revision",
    "min_create_revision",
    "max_create_revision",
)
EMPTY_HASH = 1084519789
"""What etcd 3.5 answers to HashKV when it is empty."""
LEASES = (1, 2, 3, 7 << 50, -5)


class PlainStore:
    """A store with full history. `apply` takes a decoded request of any kind of write, `range` and
    `txn` also answer reads. Raises EtcdError, and then nothing has changed."""

    def __init__(self) -> None:
        self.states: list[dict[bytes, Any]] = [{}, {}]
        """The keys as of each revision."""
        self.events: list[list[tuple[bytes, bool, Any]]] = [[], []]
        """(key, is a delete, KeyValue) of each revision, in order."""
        self.compacted = -1
        """As etcd counts: -1 before the first compaction."""
        self.leases: dict[int, int] = {}
        self._draft: dict[bytes, Any] | None = None
        self._changes: list[tuple[bytes, bool, Any]] = []

    @property
    def revision(self) -> int:
        return len(self.states) - 1

    @property
    def now(self) -> dict[bytes, Any]:
        return self.states[-1] if self._draft is None else self._draft

    @property
    def _header(self) -> Any:
        return proto.ResponseHeader(revision=self.revision + bool(self._changes))

    # Writing.

    def apply(self, request: Any) -> Any:
        """The response, without a header; its transactions' inner ones have theirs."""
        self._draft, self._changes = dict(self.states[-1]), []
        try:
            response = self.APPLY[type(request).NAME](self, request)
            if self._changes:
                self.states.append(self._draft)
                self.events.append(self._changes)
            return response
        finally:
            self._draft, self._changes = None, []

    def _put(self, request: Any) -> Any:
        self._check_lease(request)
        self._check_exists(request)
        assert self._draft is not None
        old = self._draft.get(request.key)
        revision = self.revision + 1
        kv = proto.KeyValue(
            key=request.key,
            create_revision=old.create_revision if old else revision,
            mod_revision=revision,
            version=old.version + 1 if old else 1,
            value=old.value if request.ignore_value else request.value,
            lease=old.lease if request.ignore_lease else request.lease,
        )
        self._draft[request.key] = kv
        self._changes.append((request.key, False, kv))
        return proto.PutResponse(prev_kv=old if request.prev_kv else None)

    def _check_exists(self, request: Any) -> None:
        if (request.ignore_value or request.ignore_lease) and request.key not in self.now:
            raise error("KeyNotFound")

    def _check_lease(self, request: Any) -> None:
        if request.lease and request.lease not in self.leases:
            raise error("LeaseNotFound")

    def _delete(self, request: Any) -> Any:
        assert self._draft is not None
        keys = [key for key in sorted(self._draft) if within(key, request.key, request.range_end)]
        gone = [self._draft[key] for key in keys]
        self._remove(keys)
        return proto.DeleteRangeResponse(
            deleted=len(gone), prev_kvs=gone if request.prev_kv else ()
        )

    def _remove(self, keys: list[bytes]) -> None:
        assert self._draft is not None
        for key in keys:
            del self._draft[key]
            tombstone = proto.KeyValue(key=key, mod_revision=self.revision + 1)
            self._changes.append((key, True, tombstone))

    def _grant(self, request: Any) -> Any:
        if request.ID in self.leases:
            raise error("LeaseExist")
        self.leases[request.ID] = request.TTL
        return proto.LeaseGrantResponse(ID=request.ID, TTL=request.TTL)

    def _revoke(self, request: Any) -> Any:
        if request.ID not in self.leases:
            raise error("LeaseNotFound")
        del self.leases[request.ID]
        self._remove([key for key, kv in sorted(self.now.items()) if kv.lease == request.ID])
        return proto.LeaseRevokeResponse()

    def _compact(self, request: Any) -> Any:
        if request.revision <= self.compacted:
            raise error("Compacted")
        if request.revision > self.revision:
            raise error("FutureRev")
        self.compacted = request.revision
        return proto.CompactionResponse()

    # Transactions.

    def txn(self, request: Any) -> Any:
        choices = self._choose(request)
        self._check_branch(request, iter(choices))
        return self._run(request, iter(choices))

    def _choose(self, request: Any) -> list[bool]:
        """Which branches are taken: all compares see the state before the transaction."""
        choices = [all(self._holds(compare) for compare in request.compare)]
        for op in request.success if choices[0] else request.failure:
            if op.request_txn is not None:
                choices += self._choose(op.request_txn)
        return choices

    def _holds(self, compare: Any) -> bool:
        found = [kv for key, kv in self.now.items() if within(key, compare.key, compare.range_end)]
        field = {0: "version", 1: "create_revision", 2: "mod_revision", 3: "value", 4: "lease"}[
            compare.target
        ]
        if not found:
            if field == "value":
                return False
            found = [proto.KeyValue()]
        given = getattr(compare, field)
        if given is None:
            given = b"" if field == "value" else 0
        for kv in found:
            value = getattr(kv, field)
            if not {
                proto.Compare.EQUAL: value == given,
                proto.Compare.GREATER: value > given,
                proto.Compare.LESS: value < given,
                proto.Compare.NOT_EQUAL: value != given,
            }[compare.result]:
                return False
        return True

    def _check_branch(self, request: Any, choices: Any) -> None:
        ops = list(self._taken(request, choices))
        for op in ops:
            if op.request_put is not None:
                self._check_exists(op.request_put)
                self._check_lease(op.request_put)
        for op in ops:
            if op.request_range is not None and op.request_range.revision:
                revision = op.request_range.revision
                if revision < self.compacted:
                    raise error("Compacted")
                self._check_revision(revision)

    def _taken(self, request: Any, choices: Any) -> Any:
        for op in request.success if next(choices) else request.failure:
            if op.request_txn is not None:
                yield from self._taken(op.request_txn, choices)
            else:
                yield op

    def _run(self, request: Any, choices: Any) -> Any:
        taken = next(choices)
        responses = []
        for op in request.success if taken else request.failure:
            if op.request_range is not None:
                response = self.range(op.request_range)
                name = "response_range"
            elif op.request_put is not None:
                response = self._put(op.request_put)
                name = "response_put"
            elif op.request_delete_range is not None:
                response = self._delete(op.request_delete_range)
                name = "response_delete_range"
            else:
                response = self._run(op.request_txn, choices)
                name = "response_txn"
            response.header = proto.ResponseHeader() if name == "response_txn" else self._header
            responses.append(proto.ResponseOp(**{name: response}))
        return proto.TxnResponse(succeeded=taken, responses=responses)

    APPLY = {
        "PutRequest": _put,
        "DeleteRangeRequest": _delete,
        "TxnRequest": txn,
        "LeaseGrantRequest": _grant,
        "LeaseRevokeRequest": _revoke,
        "CompactionRequest": _compact,
    }

    # Reading.

    def _check_revision(self, revision: int) -> None:
        if revision > self.revision:
            raise error("FutureRev")
        if 0 < revision < self.compacted:
            raise error("Compacted")

    def range(self, request: Any) -> Any:
        self._check_revision(request.revision)
        return self.select(
            self.states[request.revision] if request.revision > 0 else self.now, request
        )

    @staticmethod
    def select(state: dict[bytes, Any], request: Any) -> Any:
        """What a range finds in a state."""
        found = [
            kv for key, kv in sorted(state.items()) if within(key, request.key, request.range_end)
        ]
        count = len(found)
        if request.count_only:
            return proto.RangeResponse(count=count)
        if request.sort_target and not request.sort_order and request.limit > 0:
            bounded = any(getattr(request, name) for name in BOUNDS)
            found = found if bounded else found[: request.limit + 1]
        for name in ("mod_revision", "create_revision"):
            low = getattr(request, f"min_{name}")
            high = getattr(request, f"max_{name}")
            found = [
                kv
                for kv in found
                if (not low or getattr(kv, name) >= low) and (not high or getattr(kv, name) <= high)
            ]
        field = ("key", "version", "create_revision", "mod_revision", "value")[request.sort_target]
        found.sort(key=lambda kv: getattr(kv, field), reverse=request.sort_order == 2)
        more = 0 < request.limit < len(found)
        if more:
            found = found[: request.limit]
        if request.keys_only:
            found = [
                proto.KeyValue(**{f.name: v for f, v in kv.present() if f.name != "value"})
                for kv in found
            ]
        return proto.RangeResponse(kvs=found, more=more, count=count)

    def as_of(self, revision: int, compacted: int, leases: dict[int, int]) -> PlainStore:
        """The store that went no further."""
        other = PlainStore()
        other.states = self.states[: revision + 1]
        other.events = self.events[: revision + 1]
        other.compacted = compacted
        other.leases = dict(leases)
        return other

    def events_since(self, revision: int) -> list[tuple[int, bytes, bool, bytes]]:
        """(revision, key, is a delete, encoded KeyValue) from `revision` on."""
        return [
            (at, key, is_delete, kv.encode())
            for at in range(max(1, revision), self.revision + 1)
            for key, is_delete, kv in self.events[at]
        ]

    def history(self) -> tuple[tuple[int, int, bytes, bool, bytes], ...]:
        """(revision, sub-revision, key, is a delete, encoded KeyValue) of all that compaction
        keeps: of each key the last version up to the compact revision, except a delete before it,
        and all later ones."""
        kept: dict[tuple[int, int], tuple[int, int, bytes, bool, bytes]] = {}
        last: dict[bytes, tuple[int, int]] = {}
        subs: Counter[int] = Counter()
        for at, key, is_delete, encoded in self.events_since(1):
            sub = subs[at]
            subs[at] += 1
            if at <= self.compacted:
                kept.pop(last.get(key, (0, 0)), None)
                last[key] = at, sub
            if at >= self.compacted or not is_delete:
                kept[at, sub] = (at, sub, key, is_delete, encoded)
        return tuple(kept.values())

    def etcd_hash(self, revision: int) -> int:
        """HashKV of etcd."""
        now = {kv.key: kv.mod_revision for kv in self.states[revision].values()}
        hashed = b"key"
        for at, sub, key, is_delete, encoded in self.history():
            if at <= revision and (at > self.compacted or not now or now.get(key) == at):
                name = at.to_bytes(8, "big") + b"_" + sub.to_bytes(8, "big")
                value = proto.KeyValue(key=key).encode() if is_delete else encoded
                hashed += name + b"t" * is_delete + value
        return by_table(hashed)

    def hash(self, revision: int) -> int:
        """Of every version up to `revision` that compaction keeps: in order of key, then of age."""
        versions: dict[bytes, list[tuple[int, bool, bytes]]] = {}
        for at, key, is_delete, encoded in self.events_since(1):
            if at <= self.compacted and key in versions:
                versions[key].clear()
            versions.setdefault(key, []).append((at, is_delete, encoded))
        crc = 0
        for key in sorted(versions):
            for at, is_delete, encoded in versions[key]:
                if at <= revision and not (is_delete and at < self.compacted):
                    crc = crc32(encoded, crc)
        return crc or EMPTY_HASH


def within(key: bytes, start: bytes, range_end: bytes) -> bool:
    """Whether a request for [start, range_end) means `key`, by etcd's conventions."""
    if not range_end:
        return key == start
    return key >= start and (range_end == b"\x00" or key < range_end)


# Random requests.


class Requests:
    """Draws requests with a `random.Random`; `revision` and `compacted` aim the revisions."""

    def __init__(self, rng: random.Random, revision: int = 1, compacted: int = 0) -> None:
        self.rng = rng
        self.revision = revision
        self.compacted = compacted

    def _maybe(self, share: float) -> bool:
        return self.rng.random() < share

    def key(self) -> bytes:
        return self.rng.choice(KEYS)

    def range_end(self) -> bytes:
        return self.rng.choice(RANGE_ENDS) if self._maybe(0.6) else b""

    def past_revision(self) -> int:
        """Mostly readable; sometimes compacted, sometimes of the future."""
        if self._maybe(0.1):
            return self.rng.randint(0, self.revision + 2)
        return self.rng.randint(max(1, self.compacted), self.revision)

    def value(self) -> bytes:
        return self.rng.choice(VALUES)

    def put(self) -> Any:
        request = proto.PutRequest(key=self.key())
        if self._maybe(0.2):
            request.ignore_value = True
        else:
            request.value = self.value()
        if self._maybe(0.2):
            request.ignore_lease = True
        elif self._maybe(0.3):
            request.lease = self.rng.choice(LEASES)
        request.prev_kv = self._maybe(0.3)
        return request

    def delete_range(self) -> Any:
        return proto.DeleteRangeRequest(
            key=self.key(), range_end=self.range_end(), prev_kv=self._maybe(0.5)
        )

    def range(self) -> Any:
        rng = self.rng
        request = proto.RangeRequest(key=self.key(), range_end=self.range_end())
        if self._maybe(0.3):
            request.key, request.range_end = b"\x00", b"\x00"
        if self._maybe(0.4):
            request.limit = rng.randint(1, 6)
        if self._maybe(0.4):
            request.revision = self.past_revision()
        if self._maybe(0.3):
            request.sort_order = rng.randint(0, 2)
            request.sort_target = rng.randint(0, 4)
        request.keys_only = self._maybe(0.2)
        request.count_only = self._maybe(0.15)
        for name in BOUNDS:
            if self._maybe(0.1):
                setattr(request, name, rng.randint(1, self.revision + 1))
        return request

    def compare(self) -> Any:
        rng = self.rng
        target = rng.randint(0, 4)
        compare = proto.Compare(key=self.key(), target=target, result=rng.choice((0, 0, 1, 2, 3)))
        if self._maybe(0.3):
            compare.range_end = rng.choice(RANGE_ENDS)
        if self._maybe(0.9):
            if target == 0:
                compare.version = rng.randint(0, 3)
            elif target == 1:
                compare.create_revision = rng.randint(0, self.revision)
            elif target == 2:
                compare.mod_revision = rng.randint(0, self.revision)
            elif target == 3:
                compare.value = self.value()
            else:
                compare.lease = rng.choice((0, *LEASES))
        return compare

    def txn(self, depth: int = 2) -> Any:
        return proto.TxnRequest(
            compare=[self.compare() for _ in range(self.rng.choice((0, 1, 1, 2)))],
            success=self._ops(depth),
            failure=self._ops(depth),
        )

    def read_only_txn(self) -> Any:
        request = self.txn()
        for branch in (request.success, request.failure):
            branch[:] = [proto.RequestOp(request_range=self.range()) for _ in branch]
        return request

    def _ops(self, depth: int) -> list[Any]:
        ops = []
        for _ in range(self.rng.choice((0, 1, 2, 3))):
            kind = self.rng.choice(("put", "put", "range", "delete_range", "txn"))
            if kind == "txn":
                if depth:
                    ops.append(proto.RequestOp(request_txn=self.txn(depth - 1)))
            else:
                ops.append(proto.RequestOp(**{f"request_{kind}": getattr(self, kind)()}))
        return ops

    def grant(self) -> Any:
        return proto.LeaseGrantRequest(ID=self.rng.choice(LEASES), TTL=self.rng.randint(100, 200))

    def revoke(self) -> Any:
        return proto.LeaseRevokeRequest(ID=self.rng.choice(LEASES))

    def compaction(self) -> Any:
        return proto.CompactionRequest(revision=self.past_revision())

    def write(self) -> Any:
        """Any kind of write, in proportions that keep keys, leases and history alive."""
        kinds = (self.put, self.delete_range, self.txn, self.grant, self.revoke, self.compaction)
        (kind,) = self.rng.choices(kinds, (50, 10, 20, 8, 4, 2))
        return kind()
