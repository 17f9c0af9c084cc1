"""The Lock and Election services: the server waits in a queue on behalf of a client.

The queues are those of `client/scripts.py` and of etcd's `client/v3/concurrency`. Each contender
owns the key `<name>/<lease id in hexadecimal>`, attached to its lease. The oldest key, by
create_revision, holds the lock or leads; the others wait until no older key is left. So locks taken
here, by our clients and by etcd's clients exclude each other.

The calls that wait in one queue share a `_Queue`: it reads the queue once and then follows its
changes, so that a call costs a look at each change and not the whole queue.

A call is a script: a generator that yields its next step (`_Ask`: a request to this member,
`_Wait`: its turn in a queue, a WatchCreateRequest: a watch, None: the next event of that watch, any
other message: an answer for the client) and is sent the outcome. An event is a WatchResponse with
events, or with `canceled` if its history is compacted. `_ScriptedCall` runs the script; nothing
here blocks. Requests to the member go through `api.py` like those of a client, so they are checked,
counted and limited in the same way.

A Lock or Campaign that is cancelled or fails before it is answered deletes its key, and revokes the
lease if it made one. If the member does not know whether the key was written, the key stays until
its lease ends. After the answer, the key stays until the client gives it up or its lease ends.

A client may give up a call and ask again with the same lease, perhaps at another member, before the
first member knows. So a call that finds its key writes it again, unless this member has answered
that the key holds, and a member deletes a key only if the key's last write is its own. (etcd
deletes the key although the second call was told that it holds.)

Invariants: a call is answered at most once, and never after it was closed; a call deletes a key
only if no other call of this member waits with it, the last write of the key is by this member, and
either a call of this member created it and none was answered, or it waits behind an older one.

The behaviour is etcd's, including the code Unknown for every failure: etcd passes these requests
through an internal client that keeps only the text. The differences:

- a lease made for a call is revoked when the call is cancelled (etcd lets it expire);
- Campaign fails with "election: not leader" if its key is deleted while it waits (etcd reports
  success);
- when the history that a wait needs is compacted, the wait reads again (etcd fails the call);
- Resign with lease 0 makes no lease, because none is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sortedcontainers import SortedList

from etcdlite import frames, methods, proto
from etcdlite.errors import UNKNOWN, EtcdError, error
from etcdlite.member import Member
from etcdlite.methods import DELETE_RANGE, LEASE_GRANT, LEASE_REVOKE, RANGE, TXN, WATCH
from etcdlite.request import Asked, Waiter, empty_read
from etcdlite.watch import INVALID_WATCH_ID, WatchStream
from etcdlite.wire import api
from etcdlite.wire.calls import Call

PAGE_KEYS = 500
"""Keys of a queue that are read at once, and calls whose turn comes at once."""

MAX_EVENT_BYTES = 128 << 10
"""A queue is read again, in pages, rather than take in more events than this at once."""

MAX_HELD = 1000
"""Keys that a member remembers to have answered."""

CALL_BYTES = 2500 if sys.version_info >= (3, 11) else 4000
"""The approximate memory of a waiting call, beyond the `REQUEST_BYTES` of each request. Before
Python 3.11, each message and each call has a dict."""

LEASE_TTL_S = 60
"""The TTL of the lease made for a request with lease 0."""

# The error texts of these services, as in etcd.
NOT_LEADER = "election: not leader"
NO_LEADER = "election: no leader"
SESSION_EXPIRED = "mutex: session is expired"
MISSING_LEADER = '"leader" field must be provided'


class _Ask(NamedTuple):
    """Carry out a request; the script is sent the response."""

    method: int
    request: Any


class _Wait(NamedTuple):
    """Wait until no key of the queue is older than this revision; the script is sent True."""

    prefix: bytes
    revision: int


Script = Generator[Any, Any, Any]


class _Queue:
    """The keys under a name as of what the member's watches have seen, and the calls that wait.

    A call's turn has come when the queue has seen the revision of its key, and so everything older,
    and no older key is left. Old keys do not come back, so the queue need not be linearizable:
    only whether the call's own key is still there must be, which the call finds out by itself."""

    blocked = False

    def __init__(self, member: Member, prefix: bytes) -> None:
        self._member = member
        self._prefix = prefix
        self._seen = 0
        """Every change up to this revision is in `_keys`."""
        self._calls: dict[_ScriptedCall, tuple[int, int, _ScriptedCall] | None] = {}
        """All calls, with their items in `_waiting`."""
        self._waiting: SortedList[tuple[int, int, _ScriptedCall]] = SortedList()
        """The calls whose turn has not come, as (revision, number, call)."""
        self._number = 0
        self._stream: WatchStream | None = None
        self._failure: EtcdError | None = None
        """Why the queue could not be read: all calls fail."""
        self._read()

    def join(self, revision: int, call: _ScriptedCall) -> bool:
        """Take a call in. True if its turn has come, else `advance` is called when it has."""
        self._calls[call] = None
        if revision <= self._turn():
            return True
        self._number += 1
        item = self._calls[call] = (revision, self._number, call)
        self._waiting.add(item)
        return False

    def leave(self, call: _ScriptedCall) -> None:
        """The call needs the queue no longer. Not to be called while the hub reports an event."""
        item = self._calls.pop(call, None)
        if item is not None:
            self._waiting.remove(item)
        if not self._calls:
            self._close()
            queues = _shared(self._member).queues
            if queues.get(self._prefix) is self:
                del queues[self._prefix]

    def _turn(self) -> int:
        """The turn of all that wait with a revision up to this one has come."""
        if self._is_reading:
            return 0
        return min(self._oldest[0][0], self._seen) if self._oldest else self._seen

    def is_behind(self, revision: int) -> bool:
        """An older key is known, so the key of this revision holds nothing."""
        return not self._is_reading and bool(self._oldest) and self._oldest[0][0] < revision

    def oldest(self, gone: tuple[int, bytes] | None) -> tuple[int, bytes] | None:
        """The oldest (create_revision, key), except for one that is gone, perhaps unseen here."""
        return next((item for item in self._oldest[:2] if item != gone), None)

    def _wake(self) -> None:
        turn = self._turn()
        for _ in range(PAGE_KEYS):
            if not self._waiting or (self._waiting[0][0] > turn and self._failure is None):
                return
            _, _, call = self._waiting.pop(0)
            self._calls[call] = None
            call.advance(self._failure or True)
        # The rest follows after the reads that wait now.
        self._member.reads.read_now(empty_read(lambda _: self._wake()))

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    # The member asks itself: the calls in the queue learn nothing but their turn.

    def _read(self) -> None:
        self._is_reading = True
        """`_keys` is not complete yet."""
        self._page_revision = 0
        self._keys: dict[bytes, int] = {}
        """The create_revision of each key."""
        self._oldest: SortedList[tuple[int, bytes]] = SortedList()
        """The same in order, as (create_revision, key)."""
        self._read_page(self._prefix)

    def _read_page(self, key: bytes) -> None:
        request = proto.RangeRequest(
            key=key,
            range_end=_after(self._prefix),
            keys_only=True,
            limit=PAGE_KEYS,
            revision=self._page_revision,
        )
        self._member.reads.read_now(Waiter(Asked(self._take_page), 0, RANGE, request))

    def _take_page(self, answer: bytes | EtcdError) -> None:
        if not self._calls:
            return
        if isinstance(answer, EtcdError):
            self._fail(answer)
            return
        response = proto.RangeResponse.decode(answer)
        assert response.header is not None and self._is_reading
        self._page_revision = self._page_revision or response.header.revision
        self._keys.update((kv.key, kv.create_revision) for kv in response.kvs)
        self._oldest.update((kv.create_revision, kv.key) for kv in response.kvs)
        if response.more:
            self._read_page(response.kvs[-1].key + b"\0")
            return
        self._close()
        self._seen = self._page_revision
        self._stream = self._member.hub.open(self)
        create = proto.WatchCreateRequest(
            key=self._prefix, range_end=_after(self._prefix), start_revision=self._seen + 1
        )
        if self._stream.create(create) == INVALID_WATCH_ID:
            self._fail(error("RequestTooManyRequests"))
        else:
            self._is_reading = False
            self._wake()

    def _fail(self, failure: EtcdError) -> None:
        if self._page_revision and failure.name == "Compacted":
            self._read()
            return
        _shared(self._member).queues.pop(self._prefix, None)
        self._failure = failure
        self._wake()

    # As the sink of a watch.

    def send(self, body: bytes) -> None:
        if self._is_reading:
            return  # What is being read is newer; or this is the answer to `create`.
        response = proto.WatchResponse.decode(body) if len(body) <= MAX_EVENT_BYTES else None
        if response is None or response.canceled:
            # Too much changed at once, or the history that is needed is compacted. The read is
            # answered outside of the hub.
            self._read()
            return
        for event in response.events:
            kv = event.kv
            assert kv is not None
            self._seen = kv.mod_revision
            if event.type == proto.Event.DELETE:
                revision = self._keys.pop(kv.key, None)
                if revision is not None:
                    self._oldest.remove((revision, kv.key))
            elif kv.key not in self._keys:
                self._keys[kv.key] = kv.create_revision
                self._oldest.add((kv.create_revision, kv.key))
        self._wake()


class _Place:
    """A key, for the calls of this member that stand in line with it."""

    def __init__(self) -> None:
        self.calls = 0
        self.written = 0
        """The mod_revision of the last write of these calls."""
        self.gives_back = False
        """One of these calls created the key and none was answered: the last one deletes it."""

    def stood(self, placed: Any) -> tuple[int, bytes | None]:
        """Take in the answer to `_stand`. Returns the create_revision of the key, and the value of
        a key that was read, and not written."""
        if placed.succeeded:
            self.gives_back = True
            self.written = placed.header.revision
            return self.written, None
        found = placed.responses[0].response_txn
        (answer,) = found.responses
        is_held = found.succeeded
        kv = answer.response_range.kvs[0] if is_held else answer.response_put.prev_kv
        # Another member that wrote the key in between may have answered it.
        self.gives_back &= kv.mod_revision == self.written
        self.written = kv.mod_revision if is_held else placed.header.revision
        return kv.create_revision, kv.value if is_held else None


class _Shared:
    """What the calls of one member share."""

    def __init__(self) -> None:
        self.places: dict[bytes, _Place] = {}
        """The places of the calls that are not answered yet, by key."""
        self.held: dict[int, int] = {}
        """The create_revisions of the keys that were answered last, by the keys' hashes. A call
        that finds such a key changes nothing, as in etcd."""
        self.queues: dict[bytes, _Queue] = {}
        """The queues in which calls wait, by prefix."""

    def enter(self, key: bytes) -> _Place:
        place = self.places.setdefault(key, _Place())
        place.calls += 1
        return place

    def leave(self, key: bytes) -> None:
        place = self.places[key]
        place.calls -= 1
        if not place.calls:
            del self.places[key]

    def hold(self, key: bytes, create_revision: int) -> None:
        """A call is answered that it has the key."""
        self.held.pop(hash(key), None)
        self.held[hash(key)] = create_revision
        if len(self.held) > MAX_HELD:
            del self.held[next(iter(self.held))]


_SHARED: WeakKeyDictionary[Member, _Shared] = WeakKeyDictionary()


def _shared(member: Member) -> _Shared:
    return _SHARED.setdefault(member, _Shared())


class _ScriptedCall(Call):
    """Runs the script of a call. It is the session of its requests, and the sink of its watch."""

    is_blocked = False
    """For the member: the answers to a script's requests are small."""
    _queue: _Queue | None = None
    """Where the call waits."""

    def opened(self) -> None:
        self.owner.calls.hold(self.request_id, CALL_BYTES)
        # Kept, because what a script does after the client has cancelled it needs the token, too.
        self._token = self.owner.token(self.request_id)
        self._script: Script | None = None
        self._stream: WatchStream | None = None
        self._is_following = False
        """The script waits for an event of its watch."""
        self._is_writing = False
        """A write is in flight; its outcome decides what must be cleaned up."""
        self._is_over = False
        """The call is answered or closed."""

    def run(self, request: Any) -> Script:
        """The script. When the client cancels the call, GeneratorExit is raised where the script
        waits; if it waits for a write, where it waits next."""
        raise NotImplementedError

    def message(self, body: bytes) -> None:
        if self._script is None:
            decode = methods.METHODS[self.method].request.decode
            self._script = self.run(proto.decode_request(decode, body))
            self.resume()

    def produce(self) -> None:
        """Begin. A turn begins few calls: each costs far more than the bytes that ask for it."""
        self.is_ready = False
        self.advance(None)

    def wake(self) -> None:
        if self._stream is not None:
            self._stream.wake()

    def close(self) -> None:
        if not self._is_over:
            self._is_over = True
            self.member.reads.wake(self)
            if not self._is_writing:
                self._give_up()

    # Answers of the member.

    def awaits(self, request_id: int) -> bool:
        return True

    def token(self, request_id: int) -> str:
        return self._token

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        self._answered()
        self.advance(methods.METHODS[method].response.decode(body))

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        self._answered()
        self.advance(failure)

    def _answered(self) -> None:
        self.answered()
        self._is_writing = False
        # The hub must not be called while it reports an event.
        self._close_stream()

    def send(self, body: bytes) -> None:
        """Process a response of the watch."""
        if self._is_following:
            response = proto.WatchResponse.decode(body)
            if not response.created:
                self._is_following = False
                self.advance(response)

    # The script.

    def advance(self, outcome: Any) -> None:
        """Resume the script with an outcome, and run it until it waits again."""
        script = self._script
        assert script is not None
        while True:
            try:
                if isinstance(outcome, EtcdError):
                    step = script.throw(outcome)
                else:
                    step = script.send(outcome)
            except StopIteration:
                self._finish_with(None)
                return
            except EtcdError as failure:
                self._finish_with(EtcdError(UNKNOWN, failure.text))
                return
            finally:
                # The traceback has this frame and its callers, which have the error: a cycle.
                if isinstance(outcome, EtcdError):
                    outcome.__traceback__ = None
                outcome = None
            if self._is_over:
                self._give_up()
                return
            if isinstance(step, _Ask):
                outcome = self._ask(step)
                if outcome is None:
                    return
            elif isinstance(step, _Wait):
                if not self._join(step):
                    return
                outcome = True
            elif isinstance(step, proto.WatchCreateRequest):
                follow = partial(self._follow, step)
                self.member.access.admit(Waiter(self, self.request_id, WATCH, step), follow)
                return
            elif step is None:
                self._is_following = True
                return
            else:
                self.owner.send_message(self.request_id, self.method, step.encode())

    def _follow(self, create: proto.WatchCreateRequest, refused: EtcdError | None) -> None:
        if refused is not None and not self._is_over:
            self.advance(refused)
        elif not self._is_over:
            self._is_following = True
            self._stream = self.member.hub.open(self, self.owner.calls.quota)
            if self._stream.create(create) == INVALID_WATCH_ID:
                self._close_stream()
                self.advance(error("RequestTooManyRequests"))

    def _finish_with(self, failure: EtcdError | None) -> None:
        self._close_stream()
        if self._is_over:
            return
        self._is_over = True
        if failure is None:
            self.end()
        else:
            self.owner.fail(self.request_id, self.method, failure)

    def _ask(self, ask: _Ask) -> EtcdError | None:
        """Pass a request to the member; the error, if it is refused at once."""
        frame = frames.frame(1, ask.method, 0, ask.request.encode())
        if len(frame) > self.member.options.max_request_bytes + frames.FRAME_HEADER_BYTES:
            return error("RequestTooLarge")
        handle, _ = api.HANDLERS[ask.method]
        self._is_writing = ask.method != RANGE
        try:
            handle(self.member, Waiter(self, 1, ask.method, ask.request), frame)
        except EtcdError as failure:
            self._is_writing = False
            return failure
        self.owner.calls.unanswered += 1
        return None

    def _join(self, place: _Wait) -> bool:
        """Whether its turn has come; else the script is sent True later."""
        queues = _shared(self.member).queues
        queue = queues.get(place.prefix)
        if queue is None:
            queue = queues[place.prefix] = _Queue(self.member, place.prefix)
        self._queue = queue
        return queue.join(place.revision, self)

    def _close_stream(self) -> None:
        self._is_following = False
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._queue is not None:
            queue, self._queue = self._queue, None
            queue.leave(self)

    def _give_up(self) -> None:
        if self._script is not None:
            self._script.close()
        self._close_stream()


# Shared parts of the scripts.


def _if_created(key: bytes, revision: int, **branches: Any) -> proto.TxnRequest:
    """A transaction on the condition that a key has this create_revision (0: does not exist)."""
    compare = proto.Compare(target=proto.Compare.CREATE, key=key, create_revision=revision)
    return proto.TxnRequest(compare=[compare], **branches)


def _put(key: bytes, value: bytes, lease: int) -> proto.RequestOp:
    return proto.RequestOp(request_put=proto.PutRequest(key=key, value=value, lease=lease))


def _delete(key: bytes) -> proto.RequestOp:
    return proto.RequestOp(request_delete_range=proto.DeleteRangeRequest(key=key))


def _after(prefix: bytes) -> bytes:
    """The end of the range of keys with this prefix, which ends in "/"."""
    return prefix[:-1] + b"0"


def _oldest(prefix: bytes) -> proto.RangeRequest:
    """Read the oldest key of a queue."""
    return proto.RangeRequest(
        key=prefix,
        range_end=_after(prefix),
        sort_target=proto.RangeRequest.CREATE,
        sort_order=proto.RangeRequest.ASCEND,
        limit=1,
    )


def _count(prefix: bytes) -> proto.RequestOp:
    """Count the keys of a queue. The limit keeps the server from reading more than one of them."""
    return proto.RequestOp(
        request_range=proto.RangeRequest(
            key=prefix, range_end=_after(prefix), keys_only=True, limit=1
        )
    )


def _grant() -> _Ask:
    return _Ask(LEASE_GRANT, proto.LeaseGrantRequest(TTL=LEASE_TTL_S))


def _proclaim(leader: proto.LeaderKey, value: bytes, lease: int) -> Generator[Any, Any, Any]:
    """Set the value of a LeaderKey; returns the header."""
    put = _put(leader.key, value, lease)
    done = yield _Ask(TXN, _if_created(leader.key, leader.rev, success=[put]))
    if not done.succeeded:
        raise EtcdError(UNKNOWN, NOT_LEADER)
    return done.header


def _stand(prefix: bytes, mine: proto.LeaderKey, value: bytes | None, held: int) -> _Ask:
    """Create the key and count the keys of the queue. A key that exists is read if its
    create_revision is `held`; otherwise it is written again, so that no other member deletes it."""
    again = proto.PutRequest(key=mine.key, value=value or b"", lease=mine.lease, prev_kv=True)
    again.ignore_value = value is None
    write = proto.RequestOp(request_put=again)
    own = proto.RequestOp(request_range=proto.RangeRequest(key=mine.key))
    find = _if_created(mine.key, held, success=[own], failure=[write])
    txn = _if_created(
        mine.key,
        0,
        success=[_put(mine.key, value or b"", mine.lease), _count(prefix)],
        failure=[proto.RequestOp(request_txn=find), _count(prefix)],
    )
    return _Ask(TXN, txn)


class _QueueCall(_ScriptedCall):
    """A call that is answered when its key is the oldest of a queue."""

    lost = ""
    """The error if the key is deleted while the call waits."""

    def stand(
        self, request: proto.LockRequest | proto.CampaignRequest, value: bytes | None
    ) -> Script:
        """`value`: of the key; None if it does not matter."""
        prefix = request.name + b"/"
        mine = proto.LeaderKey(name=request.name, lease=request.lease)
        if not mine.lease:
            mine.lease = (yield _grant()).ID
        mine.key = prefix + b"%x" % mine.lease
        shared = _shared(self.member)
        place = shared.enter(mine.key)
        try:
            placed = yield _stand(prefix, mine, value, shared.held.get(hash(mine.key), -1))
            header = placed.header
            mine.rev, found = place.stood(placed)
            if value is not None and found not in (None, value):
                yield from _proclaim(mine, value, mine.lease)
            if placed.responses[1].response_range.count > 1:
                yield _Wait(prefix, mine.rev)
                now = yield _Ask(RANGE, proto.RangeRequest(key=mine.key))
                if not now.kvs or now.kvs[0].create_revision != mine.rev:
                    raise EtcdError(UNKNOWN, self.lost)
                header = now.header
            if not self._is_over:
                place.gives_back = False
                shared.hold(mine.key, mine.rev)
            yield self.won(mine, placed.header, header)
        except (GeneratorExit, EtcdError):
            self._give_back(place, mine, made_lease=not request.lease)
            raise
        finally:
            shared.leave(mine.key)

    def _give_back(self, place: _Place, mine: proto.LeaderKey, made_lease: bool) -> None:
        """The call ends without an answer: revoke the lease that it made, or delete the key if no
        other call needs it. Without waiting for the outcome."""
        propose = self.member.writes.propose_own
        if made_lease:
            propose(LEASE_REVOKE, proto.LeaseRevokeRequest(ID=mine.lease))
            return
        is_behind = self._queue is not None and self._queue.is_behind(mine.rev)
        if place.calls == 1 and (place.gives_back or is_behind):
            compare = proto.Compare(
                target=proto.Compare.MOD, key=mine.key, mod_revision=place.written
            )
            propose(TXN, proto.TxnRequest(compare=[compare], success=[_delete(mine.key)]))

    def won(self, mine: proto.LeaderKey, placed: Any, found: Any) -> Any:
        """The answer. `placed` is the header of the write that created or found the key, `found`
        that of the request that found the key to be the oldest."""
        raise NotImplementedError


class LockCall(_QueueCall):
    lost = SESSION_EXPIRED

    def run(self, request: proto.LockRequest) -> Script:
        return self.stand(request, None)

    def won(self, mine: proto.LeaderKey, placed: Any, found: Any) -> Any:
        return proto.LockResponse(header=found, key=mine.key)


class UnlockCall(_ScriptedCall):
    def run(self, request: proto.UnlockRequest) -> Script:
        done = yield _Ask(DELETE_RANGE, proto.DeleteRangeRequest(key=request.key))
        yield proto.UnlockResponse(header=done.header)


class CampaignCall(_QueueCall):
    lost = NOT_LEADER

    def run(self, request: proto.CampaignRequest) -> Script:
        return self.stand(request, request.value)

    def won(self, mine: proto.LeaderKey, placed: Any, found: Any) -> Any:
        return proto.CampaignResponse(header=placed, leader=mine)


class ProclaimCall(_ScriptedCall):
    def run(self, request: proto.ProclaimRequest) -> Script:
        leader = _leader_of(request)
        header = yield from _proclaim(leader, request.value, leader.lease or (yield _grant()).ID)
        yield proto.ProclaimResponse(header=header)


class LeaderCall(_ScriptedCall):
    def run(self, request: proto.LeaderRequest) -> Script:
        first = yield _Ask(RANGE, _oldest(request.name + b"/"))
        if not first.kvs:
            raise EtcdError(UNKNOWN, NO_LEADER)
        yield proto.LeaderResponse(header=first.header, kv=first.kvs[0])


class ResignCall(_ScriptedCall):
    def run(self, request: proto.ResignRequest) -> Script:
        leader = _leader_of(request)
        done = yield _Ask(TXN, _if_created(leader.key, leader.rev, success=[_delete(leader.key)]))
        yield proto.ResignResponse(header=done.header)


class ObserveCall(_ScriptedCall):
    """The leader's key and its values, until the client cancels. While the client does not read,
    events wait in the store, as for every watch."""

    def run(self, request: proto.LeaderRequest) -> Script:
        prefix = request.name + b"/"
        first = yield _Ask(RANGE, _oldest(prefix))
        while True:
            create = proto.WatchCreateRequest(start_revision=first.header.revision + 1)
            leader, gone = (0, b""), None
            if first.kvs:
                leader = first.kvs[0].create_revision, first.kvs[0].key
                create.key = leader[1]
                yield proto.LeaderResponse(header=first.header, kv=first.kvs[0])
            else:
                create.key, create.range_end = prefix, _after(prefix)
            seen = yield create
            while not (gone or seen.canceled):
                header, revision = seen.header, seen.header.revision
                for event in seen.events:
                    kv = event.kv
                    if event.type == proto.Event.DELETE:
                        if kv.key == leader[1]:
                            gone = leader
                            break
                    elif not leader[1]:
                        # The first key of an empty queue leads.
                        leader = kv.create_revision, kv.key
                        header.revision = kv.mod_revision
                        yield proto.LeaderResponse(header=header, kv=kv)
                    elif kv.key == leader[1]:
                        header.revision = revision
                        yield proto.LeaderResponse(header=header, kv=kv)
                if not gone:
                    seen = yield None
            first = yield from self._find_next(prefix, gone)

    def _find_next(self, prefix: bytes, gone: tuple[int, bytes] | None) -> Script:
        """Read the leader after one that is `gone`. All observers of a name learn its key from one
        queue: no older key appears, so if the key is still there, it leads."""
        yield _Wait(prefix, 1)
        found = self._queue and self._queue.oldest(gone)
        if found:
            answer = yield _Ask(RANGE, proto.RangeRequest(key=found[1]))
            if answer.kvs and answer.kvs[0].create_revision == found[0]:
                return answer
        return (yield _Ask(RANGE, _oldest(prefix)))


def _leader_of(request: proto.ProclaimRequest | proto.ResignRequest) -> proto.LeaderKey:
    if request.leader is None:
        raise EtcdError(UNKNOWN, MISSING_LEADER)
    return request.leader


CALLS: dict[str, type[Call]] = {
    "Lock.Lock": LockCall,
    "Lock.Unlock": UnlockCall,
    "Election.Campaign": CampaignCall,
    "Election.Proclaim": ProclaimCall,
    "Election.Leader": LeaderCall,
    "Election.Observe": ObserveCall,
    "Election.Resign": ResignCall,
}
"""By the method's full name, for `streams.py`."""
