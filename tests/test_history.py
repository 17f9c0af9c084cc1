"""The same history of random requests, valid and invalid, run against etcd 3.5 and etcdlite,
through gRPC and through the JSON gateway: every response, and every error's code and text, is the
same.

A history (`history`) is drawn from a seed and from etcd's answers, one request at a time; each goes
to both servers, whose answers are compared field by field before the next one is drawn. What may
differ is taken out by `comparable`, and each line there says why. Watches run beside it; what each
watch was sent is compared at the end, event by event.

Not in the histories, because the servers differ on purpose:

- Authentication and Downgrade, which etcdlite does not serve yet, and RangeStream, which etcd 3.5
  does not know.
- Changes of membership and MoveLeader: a second member that does not exist takes the quorum.
- A transaction in which one key is written twice in a way that etcd overlooks (see `txn.py`).
- Sort orders and targets that do not exist: etcd 3.5.1 sorts somehow, later ones and etcdlite
  refuse.
- A negative start_revision of a watch: etcd 3.5 takes it for history, etcdlite for compacted.
- A watch from exactly the compacted revision: whether etcd 3.5 still has a deletion of that
  revision depends on how far the compaction has come.
- HashKV of exactly the compacted revision: etcd 3.5.1 refuses it, later ones and etcdlite do not.
- HashKV through JSON, which has no path of its own in etcd 3.5.
- Nested transactions while the alarm NOSPACE is on: etcd overlooks the puts in them.
- Two alarms at once: in etcd the last one raised counts, and when one goes none does.
- Alarms of a type that does not exist: etcd 3.5 stores them.
- The id of a watch that a compaction has ended: etcd never gives it to another watch of the stream.
- A progress request on a stream without watches, which etcd 3.5 answers and 3.6 does not, or on one
  with a watch of the future, which etcdlite answers when that has come (see `watch.py`).
- A Lock, Unlock, Proclaim or Resign that would wait, or that makes a lease of its own, whose id
  is a part of the key.
"""

from __future__ import annotations

import http.client
import json
import queue
import random
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from rigs.plain_json import plain_json
from rigs.plain_model import KEYS, LEASES, Requests, within
from rigs.processes import PATIENCE_S, ServerFactory, wait_until
from rigs.real_etcd import running_etcd
from test_txn import may_be_overlooked, settle_ties

from etcdlite import json_mapping, methods, proto, txn
from etcdlite.errors import EtcdError, error

MEMBER = 1
"""Stands for the id of the server's only member, in requests and answers."""

LONG_OPERATIONS = 10_000

TTL_STEP_S = 10_000
"""The TTLs of leases are this far apart, so that time, which is not the same on both sides, changes
neither which leases exist nor the order of their ends."""


class Refusal(NamedTuple):
    code: int
    text: str


class Asked(NamedTuple):
    """A request with one answer, which is sent back into the history."""

    name: str
    request: Any


class Watched(NamedTuple):
    """Messages on a watch stream. `controls`: the responses without events that they cause."""

    stream: int
    messages: list[Any]
    controls: int


class Arrived(NamedTuple):
    """Wait until a watch has been sent an event of this revision."""

    stream: int
    watch_id: int
    revision: int


Step = Asked | Watched | Arrived


# The two ways in.


def exact(message: Any, raw: bytes) -> Any:
    """`message`, which was decoded from `raw`; nothing in `raw` was passed over."""
    assert message.encode() == raw, f"{raw!r} has more in it than {message}"
    return message


class Watching:
    """The client's end of a watch stream: `receive` runs in a thread until the stream ends."""

    def __init__(self) -> None:
        self.controls: list[Any] = []
        self.events: dict[int, list[Any]] = {}
        """By watch id: of the latest watch that has it."""
        self.histories: list[list[Any]] = []
        """The events of all watches, in the order of their creation."""
        self.ended: Any = None

    def take(self, response: Any) -> None:
        if not response.events:
            if response.created:
                self.events[response.watch_id] = []
                self.histories.append(self.events[response.watch_id])
            self.controls.append(response)
            return
        assert not (response.created or response.canceled or response.fragment), response
        known = self.events[response.watch_id]
        first = response.events[0].kv.mod_revision
        last = response.events[-1].kv.mod_revision
        # A revision's events come together.
        assert not known or known[-1].kv.mod_revision < first, (known[-1], response)
        assert response.header.revision >= last, response
        known.extend(response.events)

    def run(self, receive: Callable[[], None]) -> None:
        def body() -> None:
            try:
                receive()
            except Exception as failure:
                self.ended = failure
            else:
                self.ended = self.ended or "the server ended it"

        threading.Thread(target=body, daemon=True).start()


class GrpcSide:
    def __init__(self, endpoint: str) -> None:
        self._channel = grpc.insecure_channel(
            endpoint, options=[("grpc.max_receive_message_length", -1)]
        )
        self._streams: dict[int, tuple[Watching, queue.Queue[Any], Any]] = {}

    def _method(self, method: methods.Method, kind: str) -> Any:
        return getattr(self._channel, kind)(method.grpc_path)

    def ask(self, name: str, request: Any) -> Any:
        method = methods.METHOD_BY_NAME[name]
        try:
            if method.client_stream:
                answers = list(
                    self._method(method, "stream_stream")(
                        iter([request.encode()]), timeout=PATIENCE_S
                    )
                )
                (raw,) = answers
            else:
                raw = self._method(method, "unary_unary")(request.encode(), timeout=PATIENCE_S)
        except grpc.RpcError as failure:
            return Refusal(failure.code().value[0], failure.details())
        return exact(method.response.decode(raw), raw)

    def watch(self, number: int, messages: list[Any]) -> Watching:
        if number not in self._streams:
            sent: queue.Queue[Any] = queue.Queue()
            method = methods.METHOD_BY_NAME["Watch.Watch"]
            call = self._method(method, "stream_stream")(iter(sent.get, None))
            watching = Watching()

            def receive() -> None:
                for raw in call:
                    watching.take(exact(proto.WatchResponse.decode(raw), raw))

            watching.run(receive)
            self._streams[number] = watching, sent, call
        watching, sent, _ = self._streams[number]
        for message in messages:
            sent.put(message.encode())
        return watching

    def close(self) -> None:
        for watching, sent, call in self._streams.values():
            watching.ended = "closed by the test"
            call.cancel()
            sent.put(None)
        self._channel.close()


class JsonSide:
    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._connection = http.client.HTTPConnection(endpoint, timeout=PATIENCE_S)
        self._streams: list[tuple[Watching, socket.socket]] = []

    def ask(self, name: str, request: Any) -> Any:
        method = methods.METHOD_BY_NAME[name]
        body = json_mapping.text(request)
        self._connection.request("POST", method.http_paths[0], body)
        response = self._connection.getresponse()
        text = response.read()
        assert text.startswith(b"{"), (name, response.status, text)
        raw = json.loads(text)
        if response.status != 200:
            raw.setdefault("error", raw["message"])  # Left out by the gateway of Debian's etcd.
            # The status is a function of the code: kept beside it, it is compared, too.
            assert raw == {"error": raw["error"], "code": raw["code"], "message": raw["error"]}
            return Refusal(response.status * 100 + raw["code"], raw["error"])
        assert response.status == 200, raw
        if method.server_stream:
            assert raw.keys() == {"result"}, raw
            raw = raw["result"]
        return self._exact(method.response, raw)

    @staticmethod
    def _exact(cls: Any, raw: Any) -> Any:
        message = json_mapping.from_json(cls, raw)
        assert plain_json(message) == raw, f"{raw} has more in it than {message}"
        return message

    def watch(self, number: int, messages: list[Any]) -> Watching:
        connection = http.client.HTTPConnection(self._endpoint)
        body = "".join(json_mapping.text(message) for message in messages)
        connection.request("POST", "/v3/watch", body)
        watching = Watching()
        self._streams.append((watching, connection.sock))

        def receive() -> None:
            response = connection.getresponse()
            while line := response.readline():
                raw = json.loads(line)
                assert raw.keys() == {"result"}, raw
                watching.take(self._exact(proto.WatchResponse, raw["result"]))

        watching.run(receive)
        return watching

    def close(self) -> None:
        for watching, sock in self._streams:
            watching.ended = "closed by the test"
            sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._connection.close()


# What is equal.


def comparable(side_member: int, answer: Any, request: Any = None) -> Any:
    """The answer without what may differ."""
    if isinstance(answer, Refusal):
        return answer
    header = answer.header
    if header is not None:
        assert header.member_id == side_member and header.cluster_id, answer
        header.member_id = header.cluster_id = 0
        # How many elections there were is nobody's business.
        assert header.raft_term >= 1, answer
        header.raft_term = 0
    name = answer.NAME
    if request is not None:
        settle_ties(request, answer)
    if name in ("HashResponse", "HashKVResponse"):
        # Each store hashes its own records. The hash of no records is not 0 either.
        answer.hash = int(answer.hash != 0)
    if name == "HashKVResponse":
        answer.hash_revision = 0  # since etcd 3.6
    elif name == "LeaseTimeToLiveResponse":
        # They come out of a hash table.
        answer.keys = sorted(answer.keys)
        if answer.TTL > 0:
            # Time has passed since the grant, or the last renewal.
            assert answer.grantedTTL - TTL_STEP_S < answer.TTL <= answer.grantedTTL, answer
            answer.TTL = 0
    elif name == "StatusResponse":
        assert answer.leader == side_member and answer.version.startswith("3."), answer
        assert answer.dbSize >= answer.dbSizeInUse > 0, answer
        assert answer.raftIndex >= answer.raftAppliedIndex > 0 and answer.raftTerm, answer
        answer.errors = [text.replace(str(side_member), str(MEMBER)) for text in answer.errors]
        kept = {"header", "errors", "isLearner"}
        # storageVersion, dbSizeQuota and downgradeInfo are there since etcd 3.6.
        answer.__dict__ = {k: v for k, v in answer.__dict__.items() if k in kept}
    elif name == "AlarmResponse":
        for alarm in answer.alarms:
            alarm.memberID = MEMBER if alarm.memberID == side_member else alarm.memberID
    elif name == "MemberListResponse":
        (member,) = answer.members
        assert side_member == member.ID, answer
        member.ID = MEMBER
        # Each listens where it was told to.
        assert len(member.clientURLs) == len(member.peerURLs) == 1, answer
        member.clientURLs = member.peerURLs = ()
    return answer


def addressed(request: Any, side_member: int) -> Any:
    """The request with the id of the server's member in the place of MEMBER."""
    if type(request) is proto.AlarmRequest and request.memberID == MEMBER:
        return proto.AlarmRequest(action=request.action, alarm=request.alarm, memberID=side_member)
    return request


# The histories.


class History(Requests):
    """Draws the steps; `run` is a generator that is sent etcd's answer to each `Asked`."""

    def __init__(self, rng: random.Random, is_duplex: bool) -> None:
        """`is_duplex`: messages can be sent on a watch stream that is open."""
        super().__init__(rng)
        self.is_duplex = is_duplex
        self.streams = 0
        self.live: dict[tuple[int, int], Any] = {}
        """(stream, watch id) -> the WatchCreateRequest."""
        self.compacted_away: set[tuple[int, int]] = set()
        """(stream, watch id) of watches that were too late."""
        self.is_alarmed = False
        self.granted: set[int] = set()
        self.nudges: list[tuple[int, bytes, int]] = []
        """(revision, key, 0 for a put and 1 for a deletion), as filters count them."""

    def run(self, count: int) -> Generator[Step, Any, None]:
        kinds: list[tuple[int, Any]] = [
            (22, self._put),
            (6, self._delete_range),
            (16, self._txn),
            (4, self._read_only_txn),
            (20, self._range),
            (2, self._compact),
            (5, self._grant),
            (1, self._short_lease),
            (3, self._revoke),
            (3, self._keep_alive),
            (3, self._time_to_live),
            (2, self._leases),
            (3, self._watch_now),
            (2, self._watch_history),
            (1, self._watch_oddly),
            (2, self._cancel_watch),
            (1, self._progress),
            (3, self._alarm),
            (3, self._hash),
            (2, self._state),
            (2, self._lock),
            (2, self._unlock),
            (2, self._campaign),
            (4, self._election),
            (5, self._invalid),
        ]
        weights = [weight for weight, _ in kinds]
        for _ in range(count):
            ((_, draw),) = self.rng.choices(kinds, weights)
            if self.is_alarmed and self._maybe(0.3):
                draw = self._disarm
            yield from draw()
        while self.is_alarmed:
            yield from self._disarm()
        for stream, watch_id in list(self.live):
            yield from self._nudge(stream, watch_id)
        # One watch's nudge is an event of others, too: they must have it before all is compared.
        for (stream, watch_id), request in self.live.items():
            start, filters = request.key or b"\0", set(request.filters)
            for revision, key, kind in reversed(self.nudges):
                if revision < request.start_revision:
                    break
                if kind not in filters and within(key, start, request.range_end):
                    yield Arrived(stream, watch_id, revision)
                    break

    def ask(self, name: str, request: Any) -> Generator[Step, Any, Any]:
        answer = yield Asked(name, request)
        if not isinstance(answer, Refusal) and answer.header is not None:
            self.revision = max(self.revision, answer.header.revision)
        return answer

    # Keys.

    def key(self) -> bytes:
        return b"" if self._maybe(0.01) else super().key()

    def past_revision(self) -> int:
        return -self.rng.randint(1, 9) if self._maybe(0.02) else super().past_revision()

    def range(self) -> Any:
        request = super().range()
        if self._maybe(0.05):
            request.limit = -self.rng.randint(1, 3)
        request.serializable = self._maybe(0.3)
        return request

    def _put(self) -> Iterator[Any]:
        return self.ask("KV.Put", self.put())

    def _delete_range(self) -> Iterator[Any]:
        return self.ask("KV.DeleteRange", self.delete_range())

    def _range(self) -> Iterator[Any]:
        return self.ask("KV.Range", self.range())

    def _txn(self) -> Iterator[Any]:
        request = self.txn(depth=0 if self.is_alarmed else 2)
        try:
            txn.check_txn(request, 128)
        except EtcdError as failure:
            if failure.text == error("DuplicateKey").text and may_be_overlooked(request):
                return iter(())
        return self.ask("KV.Txn", request)

    def _read_only_txn(self) -> Iterator[Any]:
        return self.ask("KV.Txn", self.read_only_txn())

    def _compact(self) -> Generator[Step, Any, None]:
        revision = self.past_revision()
        if self._maybe(0.5):
            # Keep some history, so that reads of it and watches from it find something.
            revision = max(1, self.revision - self.rng.randint(1, 60))
        request = proto.CompactionRequest(revision=revision, physical=self._maybe(0.5))
        answer = yield from self.ask("KV.Compact", request)
        if not isinstance(answer, Refusal):
            self.compacted = revision

    # Leases.

    def _lease(self) -> int:
        if self.granted and self._maybe(0.8):
            return self.rng.choice(sorted(self.granted))
        return self.rng.choice((0, 77, *LEASES))

    def _grant(self) -> Generator[Step, Any, None]:
        request = proto.LeaseGrantRequest(
            ID=self.rng.choice((4, 5, -(1 << 63), *LEASES)), TTL=self.rng.randint(1, 9) * TTL_STEP_S
        )
        if self._maybe(0.1):
            request.TTL = self.rng.choice((9_000_000_001, 1 << 62))
        answer = yield from self.ask("Lease.LeaseGrant", request)
        if not isinstance(answer, Refusal):
            self.granted.add(request.ID)

    def _short_lease(self) -> Generator[Step, Any, None]:
        request = proto.LeaseGrantRequest(ID=88, TTL=self.rng.choice((1, 0, -1, -(1 << 40))))
        yield from self.ask("Lease.LeaseGrant", request)
        yield from self.ask("Lease.LeaseRevoke", proto.LeaseRevokeRequest(ID=88))

    def _revoke(self) -> Generator[Step, Any, None]:
        request = proto.LeaseRevokeRequest(ID=self._lease())
        answer = yield from self.ask("Lease.LeaseRevoke", request)
        if not isinstance(answer, Refusal):
            self.granted.discard(request.ID)

    def _keep_alive(self) -> Iterator[Any]:
        return self.ask("Lease.LeaseKeepAlive", proto.LeaseKeepAliveRequest(ID=self._lease()))

    def _time_to_live(self) -> Iterator[Any]:
        request = proto.LeaseTimeToLiveRequest(ID=self._lease(), keys=self._maybe(0.5))
        return self.ask("Lease.LeaseTimeToLive", request)

    def _leases(self) -> Iterator[Any]:
        return self.ask("Lease.LeaseLeases", proto.LeaseLeasesRequest())

    # Watches.

    def _create_request(self) -> Any:
        request = proto.WatchCreateRequest(key=self.key(), prev_kv=self._maybe(0.4))
        if self._maybe(0.7):
            request.range_end = self.rng.choice((b"\0", b"b", b"d", b"\xff\0"))
        if self._maybe(0.3):
            request.filters = self.rng.choice(([0], [1], [0, 1], [1, 1]))
        request.fragment = self._maybe(0.2)
        request.progress_notify = self._maybe(0.2)
        if self._maybe(0.3):
            request.watch_id = self.rng.randint(1, 12)
        return request

    def _create(
        self, request: Any, *more: Any, controls: int = 1
    ) -> Generator[Step, Any, tuple[int, int] | None]:
        """Which watch it is, if there is one now."""
        stream = self.streams
        if self.is_duplex and stream and self._maybe(0.7):
            stream = self.rng.randint(1, stream)
        else:
            self.streams = stream = stream + 1
        if (stream, request.watch_id) in self.compacted_away:
            request.watch_id = 0
        messages = [proto.WatchRequest(create_request=request), *more]
        created, *others = yield Watched(stream, messages, controls)
        assert created.created, created
        watch = stream, created.watch_id
        if any(other.compact_revision for other in others):
            self.compacted_away.add(watch)
        if created.canceled or any(other.canceled for other in others):
            return None
        self.live[watch] = request
        return watch

    def _watch_now(self) -> Generator[Step, Any, None]:
        request = self._create_request()
        if self._maybe(0.3):
            request.start_revision = self.revision + self.rng.randint(1, 40)
        if self.is_duplex or request.start_revision or not self._maybe(0.5):
            yield from self._create(request)
        elif self._maybe(0.5):
            request.watch_id = 7
            cancel = proto.WatchCancelRequest(watch_id=7)
            refused = self._is_empty(request)
            yield from self._create(
                request, proto.WatchRequest(cancel_request=cancel), controls=1 if refused else 2
            )
        elif not self._is_empty(request):
            progress = proto.WatchRequest(progress_request=proto.WatchProgressRequest())
            yield from self._create(request, progress, controls=2)

    @staticmethod
    def _is_empty(request: Any) -> bool:
        end = request.range_end
        return end not in (b"", b"\0") and (request.key or b"\0") >= end

    def _watch_history(self) -> Generator[Step, Any, None]:
        request = self._create_request()
        if self.is_alarmed or sorted(request.filters) == [0, 1] or self.compacted >= self.revision:
            return
        request.start_revision = self.rng.randint(self.compacted + 1, self.revision)
        watch = yield from self._create(request)
        if watch is not None:
            # It has caught up before the history goes on, and possibly away.
            yield from self._nudge(*watch)

    def _watch_oddly(self) -> Generator[Step, Any, None]:
        request = self._create_request()
        if self._maybe(0.3):
            request.key, request.range_end = b"c", self.rng.choice((b"a", b"c"))
        elif self.compacted > 1 and not self._is_empty(request):
            request.watch_id = 0
            request.start_revision = self.rng.randint(1, self.compacted - 1)
            yield from self._create(request, controls=2)
            return
        yield from self._create(request)

    def _nudge(self, stream: int, watch_id: int) -> Generator[Step, Any, None]:
        """Cause an event of a watch, and wait for it."""
        request = self.live[stream, watch_id]
        key = request.key or b"\0"
        answer = yield from self.ask("KV.Put", proto.PutRequest(key=key, value=b"nudge"))
        self.nudges.append((answer.header.revision, key, 0))
        if 0 in request.filters:
            answer = yield from self.ask("KV.DeleteRange", proto.DeleteRangeRequest(key=key))
            self.nudges.append((answer.header.revision, key, 1))
        revision = answer.header.revision
        if sorted(request.filters) != [0, 1] and request.start_revision <= revision:
            yield Arrived(stream, watch_id, revision)

    def _cancel_watch(self) -> Generator[Step, Any, None]:
        if not (self.is_duplex and self.live):
            return
        stream, watch_id = self.rng.choice(sorted(self.live))
        is_known = not self._maybe(0.2)
        if is_known:
            yield from self._nudge(stream, watch_id) if not self.is_alarmed else ()
            del self.live[stream, watch_id]
        request = proto.WatchCancelRequest(watch_id=watch_id if is_known else 99)
        yield Watched(stream, [proto.WatchRequest(cancel_request=request)], int(is_known))

    def _progress(self) -> Generator[Step, Any, None]:
        streams = sorted({stream for stream, _ in self.live})
        if not (self.is_duplex and streams):
            return
        stream = self.rng.choice(streams)
        if all(
            request.start_revision <= self.revision + 1
            for (number, _), request in self.live.items()
            if number == stream
        ):
            message = proto.WatchRequest(progress_request=proto.WatchProgressRequest())
            yield Watched(stream, [message], 1)

    # Locks and elections: of one client, so that nobody waits.

    def _line(self) -> Generator[Step, Any, tuple[bytes, int] | None]:
        """A name and a lease that stands in its line, or may; None if there is another."""
        name = self.rng.choice((b"a", b"b", b"\xff\x01"))
        request = proto.RangeRequest(key=name + b"/", range_end=name + b"0")
        found = yield from self.ask("KV.Range", request)
        if isinstance(found, Refusal):
            return None
        if found.kvs:
            # A key that is there without a lease is one that a proclamation left.
            (kv, *more) = found.kvs
            return (name, kv.lease) if kv.lease and not more else None
        return name, self._lease() or 77

    def _lock(self) -> Generator[Step, Any, None]:
        line = yield from self._line()
        if line is not None:
            yield from self.ask("Lock.Lock", proto.LockRequest(name=line[0], lease=line[1]))

    def _unlock(self) -> Generator[Step, Any, None]:
        line = yield from self._line()
        if line is not None:
            key = line[0] + b"/%x" % line[1]
            yield from self.ask("Lock.Unlock", proto.UnlockRequest(key=key))

    def _campaign(self) -> Generator[Step, Any, None]:
        line = yield from self._line()
        if line is not None:
            request = proto.CampaignRequest(name=line[0], lease=line[1], value=self.value())
            yield from self.ask("Election.Campaign", request)

    def _election(self) -> Generator[Step, Any, None]:
        name = self.rng.choice((b"a", b"b", b"\xff\x01"))
        found = yield from self.ask("Election.Leader", proto.LeaderRequest(name=name))
        if isinstance(found, Refusal) or not found.kv.lease:
            if self._maybe(0.1):
                yield from self.ask("Election.Resign", proto.ResignRequest())
                yield from self.ask("Election.Proclaim", proto.ProclaimRequest(value=b"x"))
            return
        kv = found.kv
        leader = proto.LeaderKey(name=name, key=kv.key, rev=kv.create_revision, lease=kv.lease)
        if self._maybe(0.2):
            leader.rev -= 1
        if self._maybe(0.6):
            request = proto.ProclaimRequest(leader=leader, value=self.value())
            yield from self.ask("Election.Proclaim", request)
        else:
            yield from self.ask("Election.Resign", proto.ResignRequest(leader=leader))

    # The server.

    def _alarm(self) -> Generator[Step, Any, None]:
        request = proto.AlarmRequest(alarm=self.rng.choice((0, 1, 2)))
        if self._maybe(0.4):
            request.action = self.rng.choice((1, 2))
            request.memberID = self.rng.choice((0, MEMBER, MEMBER, 12345))
        if request.action == 1 and self.is_alarmed:
            return
        yield from self.ask("Maintenance.Alarm", request)
        self.is_alarmed |= request.action == 1 and request.alarm != 0

    def _disarm(self) -> Generator[Step, Any, None]:
        raised = yield from self.ask("Maintenance.Alarm", proto.AlarmRequest())
        for alarm in raised.alarms:
            request = proto.AlarmRequest(action=2, memberID=alarm.memberID, alarm=alarm.alarm)
            yield from self.ask("Maintenance.Alarm", request)
        self.is_alarmed = False

    def _hash(self) -> Generator[Step, Any, None]:
        if self._maybe(0.2) or not self.is_duplex:
            yield from self.ask("Maintenance.Hash", proto.HashRequest())
        else:
            revision = self.past_revision() if self._maybe(0.7) else 0
            if revision == self.compacted:
                revision = 0
            yield from self.ask("Maintenance.HashKV", proto.HashKVRequest(revision=revision))

    def _state(self) -> Generator[Step, Any, None]:
        if self._maybe(0.4):
            request = proto.MemberListRequest(linearizable=self._maybe(0.5))
            yield from self.ask("Cluster.MemberList", request)
        elif self._maybe(0.1):
            yield from self.ask("Maintenance.Defragment", proto.DefragmentRequest())
        else:
            yield from self.ask("Maintenance.Status", proto.StatusRequest())

    # What is refused.

    def _invalid(self) -> Iterator[Any]:
        op, put = proto.RequestOp, proto.PutRequest
        name, request = self.rng.choice(
            [
                ("KV.Put", put(value=b"x")),
                ("KV.Put", put(key=b"a", value=b"x", ignore_value=True)),
                ("KV.Put", put(key=b"a", value=b"x", lease=1, ignore_lease=True)),
                ("KV.Put", put(key=b"absent", ignore_value=True)),
                ("KV.Put", put(key=b"a", lease=404)),
                ("KV.Put", put(key=b"a", value=bytes(1_600_000))),
                ("KV.Range", proto.RangeRequest()),
                ("KV.Range", proto.RangeRequest(key=b"c", range_end=b"a")),
                ("KV.Range", proto.RangeRequest(key=b"a", revision=self.revision + 100)),
                ("KV.Range", proto.RangeRequest(key=b"a", revision=self.compacted - 1)),
                ("KV.DeleteRange", proto.DeleteRangeRequest(range_end=b"b")),
                ("KV.DeleteRange", proto.DeleteRangeRequest(key=b"d", range_end=b"b")),
                ("KV.Txn", proto.TxnRequest()),
                ("KV.Txn", proto.TxnRequest(success=[op()])),
                ("KV.Txn", proto.TxnRequest(compare=[proto.Compare()])),
                ("KV.Txn", proto.TxnRequest(success=[op(request_put=put(key=b"a"))] * 2)),
                ("KV.Txn", proto.TxnRequest(failure=self._deletes(128))),
                ("KV.Txn", proto.TxnRequest(failure=self._deletes(129))),
                ("KV.Txn", proto.TxnRequest(compare=[proto.Compare(key=b"a")] * 129)),
                ("KV.Txn", proto.TxnRequest(success=[*self._puts(3), *self._late_failures()])),
                ("KV.Compact", proto.CompactionRequest(revision=self.revision + 100)),
                ("KV.Compact", proto.CompactionRequest(revision=self.compacted)),
                ("KV.Compact", proto.CompactionRequest(revision=-1)),
                ("Lease.LeaseRevoke", proto.LeaseRevokeRequest()),
                ("Lease.LeaseTimeToLive", proto.LeaseTimeToLiveRequest(keys=True)),
            ]
        )
        return self.ask(name, request)

    @staticmethod
    def _deletes(count: int) -> list[Any]:
        request = proto.DeleteRangeRequest(key=b"absent")
        return [proto.RequestOp(request_delete_range=request)] * count

    @staticmethod
    def _puts(count: int) -> list[Any]:
        puts = [proto.PutRequest(key=key, value=b"t") for key in KEYS[:count]]
        return [proto.RequestOp(request_put=request) for request in puts]

    def _late_failures(self) -> list[Any]:
        """Operations that cannot be carried out, which shows after the others were looked at."""
        future = proto.RangeRequest(key=b"a", revision=self.revision + 100)
        failures = [
            proto.RequestOp(request_range=future),
            proto.RequestOp(request_put=proto.PutRequest(key=b"late", lease=404)),
            proto.RequestOp(request_put=proto.PutRequest(key=b"later", ignore_value=True)),
        ]
        return self.rng.sample(failures, self.rng.randint(1, 3))


# Running them.


class Both:
    """etcd and etcdlite, asked the same."""

    def __init__(self, sides: list[Any]) -> None:
        self.sides = sides
        self.log: list[str] = []
        self._watching: dict[int, list[Watching]] = {}
        self._controls: dict[int, int] = {}
        self.members = [
            side.ask("Maintenance.Status", proto.StatusRequest()).header.member_id for side in sides
        ]

    def run(self, history: Generator[Step, Any, None]) -> None:
        step = next(history)
        with pytest.raises(StopIteration):
            while True:
                self.log.append(_brief(step))
                step = history.send(self._take(step))
        for number, (theirs, ours) in self._watching.items():
            pairs = zip(theirs.histories, ours.histories, strict=True)
            for count, pair in enumerate(pairs, 1):
                differing = _from_first_difference(*pair)
                self._agree(*differing, f"the events of the {count}. watch of stream {number}")

    def _take(self, step: Step) -> Any:
        if isinstance(step, Asked):
            theirs, ours = (
                comparable(
                    member,
                    side.ask(step.name, addressed(step.request, member)),
                    step.request,
                )
                for side, member in zip(self.sides, self.members, strict=True)
            )
            self._agree(theirs, ours, _brief(step))
            return theirs
        if isinstance(step, Watched):
            return self._watch(step)
        for watching in self._watching[step.stream]:
            wait_until(
                lambda watching=watching: (
                    watching.ended  # type: ignore[misc]
                    or any(
                        event.kv.mod_revision >= step.revision
                        for event in watching.events.get(step.watch_id, ())[-1:]
                    )
                ),
                f"{step} on {watching.events.get(step.watch_id, ())[-3:]}",
            )
            assert watching.ended is None, (step, watching.ended)
        return None

    def _watch(self, step: Watched) -> list[Any]:
        pair = [side.watch(step.stream, step.messages) for side in self.sides]
        self._watching[step.stream] = pair
        before = self._controls.get(step.stream, 0)
        after = self._controls[step.stream] = before + step.controls
        answers = []
        for watching, member in zip(pair, self.members, strict=True):
            wait_until(
                lambda watching=watching: (
                    watching.ended  # type: ignore[misc]
                    or len(watching.controls) >= after
                ),
                f"{step} is answered; so far {watching.controls[before:]}",
            )
            assert watching.ended is None, (step, watching.ended)
            answers.append([comparable(member, c) for c in watching.controls[before:]])
        theirs, ours = answers
        self._agree(theirs, ours, str(step))
        return theirs

    def _agree(self, theirs: Any, ours: Any, about: str) -> None:
        if theirs != ours:
            before = "\n  ".join(self.log[-12:-1])
            pytest.fail(
                f"step {len(self.log)}\n  {about}\n  etcd     {theirs}\n  etcdlite {ours}\n"
                f"after\n  {before}"
            )


def _from_first_difference(a: list[Any], b: list[Any]) -> tuple[list[Any], list[Any]]:
    """A few items of both, from where they begin to differ; nothing if they do not."""
    pairs = enumerate(zip(a, b, strict=False))
    at = next((at for at, (x, y) in pairs if x != y), min(len(a), len(b)))
    return a[at : at + 3], b[at : at + 3]


def _brief(step: Step) -> str:
    """What it is, without the middle if that is long."""
    text = str(step)
    return text if len(text) < 2000 else f"{text[:200]} ... {text[-100:]}"


SIDES: dict[str, Any] = {"gRPC": GrpcSide, "JSON": JsonSide}


def compare(server: ServerFactory, tmp_path: Path, way: str, seed: int, operations: int) -> None:
    with running_etcd(tmp_path / "etcd") as endpoint:
        sides = [SIDES[way](endpoint), SIDES[way](server("--name=default").endpoint)]
        try:
            Both(sides).run(History(random.Random(seed), way == "gRPC").run(operations))
        finally:
            for side in sides:
                side.close()


@pytest.mark.parametrize("way", SIDES)
def test_a_history_is_answered_as_etcd_answers_it(
    server: ServerFactory, tmp_path: Path, way: str
) -> None:
    compare(server, tmp_path, way, 1, 2000)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("way", SIDES)
def test_long_histories_are_answered_as_etcd_answers_them(
    server: ServerFactory, tmp_path: Path, way: str, seed: int
) -> None:
    compare(server, tmp_path, way, seed, LONG_OPERATIONS)
