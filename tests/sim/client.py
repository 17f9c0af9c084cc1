"""Clients: they speak the native protocol, byte for byte, over wires that break.

A `Client` has one connection to one member at a time. It sends bursts of random requests, holds
watches that it resumes where they stopped, keeps leases alive, and takes backups. What it asks and
is answered it tells the oracle (`checkers.py`), which raises a `Violation` if that cannot be.

A client with a `user` logs in on each new connection, with the user's password, a wrong one or the
token of an earlier connection, and again when it learns that its token does not count any more.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from rigs.plain_model import BOUNDS

from etcdlite import frames, methods, proto
from etcdlite.errors import EtcdError, error
from etcdlite.storage.layout import DataDamaged
from etcdlite.wire.native import NativeSession
from sim.backup import check_backup
from sim.changes import change
from sim.checkers import Op, Oracle, Violation, Watched
from sim.plain_auth import Certificate, Token
from sim.world import Node, Wire, World

GIVE_UP_S = (1.0, 12.0)
"""After how long without an answer a client turns to another member. (One that lives answers within
7 s, or says that it cannot.)"""

RECONNECT_S = (0.01, 0.5)
MAX_TTL_S = 6

_NUMBER = {name: method.number for name, method in methods.METHOD_BY_NAME.items()}
_RESPONSE = {number: method.response.decode for number, method in methods.METHODS.items()}
_WATCH = _NUMBER["Watch.Watch"]
_KEEP_ALIVE = _NUMBER["Lease.LeaseKeepAlive"]
_SNAPSHOT = _NUMBER["Maintenance.Snapshot"]
_DAMAGED = error("Corrupt").text
_LOG_IN_AGAIN = frozenset(error(name).text for name in ("InvalidAuthToken", "UserEmpty"))

WRONG_SHARE = 0.1
"""Of the logins, those with a wrong password."""
REUSED_SHARE = 0.4
"""Of the logins, those with a token that the client has already."""

Handler = Callable[[int, bytes], None]
"""Told (flags, body) of each frame that answers a request."""


MANY = 40
"""A purge deletes at least this many keys."""


class Load:
    """What the clients of a simulation do, drawn from the seed."""

    def __init__(self, rng: random.Random) -> None:
        self.keys = [b"k%d" % i for i in range(rng.choice((2, 6, 15, 40)))]
        self.value_bytes = rng.choice((0, 0, 30, 300, 2000))
        self.pause_s = rng.choice((0.02, 0.1, 0.3))
        self.burst = rng.choice((2, 8, 16, 32))
        self.watches = rng.choice((0, 1, 3))
        self.is_slow_share = rng.choice((0.0, 0.0, 0.3))
        self.range_share = 0.0
        """Of the parts of transactions, those that mean a range of keys; and of the ranges that are
        read, those that leave out some revisions."""
        self.weights = {
            "put": 40,
            "get": rng.choice((5, 20, 60)),
            "get_serializable": rng.choice((0, 10)),
            "range": rng.choice((0, 6)),
            "past": rng.choice((0, 4)),
            "txn": rng.choice((0, 12, 30)),
            "read_txn": rng.choice((0, 4)),
            "delete": rng.choice((2, 10)),
            "delete_range": rng.choice((0, 2)),
            "purge": rng.choice((0, 0, 3)),
            "lease": rng.choice((0, 1, 3)),
            "lease_put": rng.choice((0, 4)),
            "revoke": rng.choice((0, 1)),
            "time_to_live": rng.choice((0, 2)),
            "compact": rng.choice((0.1, 1.0, 3.0)),
            "hash": rng.choice((0.0, 0.5)),
            "members": rng.choice((0.0, 0.5)),
            "status": rng.choice((0.0, 0.5)),
        }
        self.settle()

    def settle(self) -> None:
        """The weights stand."""
        self.names = list(self.weights)
        self.cumulative = list(accumulate(self.weights.values()))


class HeldLease:
    """A lease that a client keeps alive for a while."""

    def __init__(self, lease_id: int, ttl_s: int, renewals: int) -> None:
        self.id = lease_id
        self.ttl_s = ttl_s
        self.renewals = renewals
        self.asked: list[float] = []
        """When the renewals that are not answered yet were asked for, on this connection."""
        self.stream = 0


class Client:
    """See the module's docstring. For a `Wire` it is what a `Node` is."""

    def __init__(self, world: World, oracle: Oracle, load: Load, name: str) -> None:
        self.world = world
        self.oracle = oracle
        self.load = load
        self.name = name
        self.is_up = True
        self.is_busy = True
        """It begins new requests; otherwise it only watches."""
        self.told_revision = 0
        """The highest revision that this connection was told."""
        self.node: Node | None = None
        self.preferred: str | None = None
        self._give_up_s = 12.0
        self.is_patient = False
        """It waits for its answers as long as its connection is whole."""
        self.bytes_per_s = 0.0
        """How fast it reads; 0: at once."""
        self.user = ""
        """As whom it logs in; nobody if empty."""
        self.identities: list[Token | Certificate | None] = [None]
        """Whom the server may take the connection for."""
        self.tokens: list[Token] = []
        """The last ones that it was given."""
        self.passwords: Callable[[str], str] = lambda name: ""
        """The present password of a user."""
        self.watches: list[Watched] = []
        self.leases: list[HeldLease] = []
        self._rng = world.rng
        self._session: Any = None
        self._to: Wire | None = None
        self._back: Wire | None = None
        self._out: list[bytes] = []
        self._reader = frames.FrameReader(64 << 20)
        self._is_shaken = False
        self._pending: dict[int, Handler] = {}
        self._streams: set[int] = set()
        """Ids of the streams of this connection."""
        self._began: dict[int, float] = {}
        self._open_ops: dict[int, Op] = {}
        self._watch_stream = 0
        self._watching: set[int] = set()
        """Numbers of the watches that the server has begun on this connection."""
        self._creating: dict[int, Op] = {}
        """By number: watches that it was asked for."""
        self._refused: set[int] = set()
        """Numbers of the watches that are not permitted."""
        self._is_logging_in = False

    def start(self) -> None:
        self._give_up_s = self._rng.choice(GIVE_UP_S)
        for number in range(self.load.watches):
            self.watches.append(self._new_watch(number))
        if self._rng.random() < self.load.is_slow_share:
            self.bytes_per_s = 20_000.0
        self.world.at(self._rng.uniform(0.0, 0.2), self._connect)
        self.world.at(self._rng.uniform(0.0, 2 * self.load.pause_s), self._act)
        self.world.at(self._rng.uniform(0.0, 1.0), self._look_after)

    # The connection.

    def _connect(self) -> None:
        if self._session is not None:
            return
        world = self.world
        nodes = [n for n in world.nodes.values() if n.is_up and not n.is_gone]
        if self.preferred is not None:
            nodes = [n for n in nodes if n.name == self.preferred]
        if not nodes:
            world.at(0.2, self._connect)
            return
        node = self._rng.choice(nodes)
        self.node = node
        self._to = Wire(world, self.name, node.name)
        self._back = back = Wire(world, node.name, self.name)
        self._session = session = NativeSession(node.member, node.new_output)
        self._to.session, self._to.node = session, node
        back.session, back.node = self, self
        node.attach(session, back, self._to)
        self._reader = frames.FrameReader(64 << 20)
        self._is_shaken = False
        self.told_revision = 0
        self._out.append(frames.HANDSHAKE.pack(frames.MAGIC, 1, frames.PROTOCOL_VERSION))
        if self.user:
            self._log_in()
        elif self.watches:
            self._resume_watches()
        self.flush()

    def receive(self, wire: Wire, data: bytes) -> None:
        """Bytes came."""
        if not self._is_shaken:
            # The server sends its handshake and its hello at once.
            data = data[frames.HANDSHAKE.size :]
            self._is_shaken = True
        self._reader.feed(data)
        session = self._session
        for request_id, _, flags, body in self._reader:
            handler = self._pending.get(request_id)
            if handler is None:
                # What crossed the end of a stream on its way is taken for a new one, and ended too.
                if request_id and request_id not in self._streams:
                    raise Violation(
                        "what is answered was asked", f"request #{request_id} of {self.name}"
                    )
                continue
            if flags & frames.END:
                del self._pending[request_id]
                self._began.pop(request_id, None)
            handler(flags, body)
            if self._session is not session:
                return
        self.flush()

    def ended(self, session: Any) -> None:
        """The server closed the connection, or it broke."""
        if self._session is not None:
            self._lose()

    def drain_s(self, size_bytes: int) -> float:
        is_slow = self.bytes_per_s and self.is_busy
        return size_bytes / self.bytes_per_s if is_slow else 0.0

    def hang_up(self) -> None:
        """Close the connection, whatever is under way."""
        if self._session is None:
            return
        assert self._back is not None and self._to is not None
        self._back.is_cut = True  # What is on its way here is not read any more.
        self._to.close()
        self._lose()

    def _lose(self) -> None:
        self._session = None
        self._to = None
        self._out.clear()
        self._pending.clear()
        self._streams.clear()
        self._began.clear()
        self._watching.clear()
        self._creating.clear()
        self._refused.clear()
        self._watch_stream = 0
        self._is_logging_in = False
        self.identities = [None]
        for op in self._open_ops.values():
            self.oracle.lose(op)
        self._open_ops.clear()
        for lease in self.leases:
            lease.asked.clear()
            lease.stream = 0
        self.world.at(self.world.delay(RECONNECT_S), self._connect)

    def flush(self) -> None:
        if self._out and self._to is not None:
            data = b"".join(self._out)
            self._out.clear()
            self._to.send(data)

    def _send(self, request_id: int, number: int, body: bytes, flags: int = 0) -> None:
        self._out.append(frames.frame(request_id, number, flags, body))

    # Unary requests.

    def ask(
        self,
        name: str,
        request: Any,
        *,
        is_write: bool = False,
        then: Callable[[Op, Any], None] | None = None,
    ) -> Op | None:
        """Send a request; `then` is told the answer instead of the oracle."""
        if self._session is None:
            return None
        oracle = self.oracle
        op = oracle.begin(name, request, self, is_write)
        self._open_ops[op.id] = op
        self._began[op.id] = self.world.now
        if oracle.world.trace is not None or is_write:
            self.world.note(f"{self.name} #{op.id} {name} {_brief(request)}")

        def answered(flags: int, body: bytes) -> None:
            del self._open_ops[op.id]
            answer: Any
            if flags & frames.ERROR:
                failure = proto.Error.decode(body)
                answer = EtcdError(failure.code, failure.message)
            else:
                answer = _RESPONSE[op.number](body)
                if then is not None and not is_write:
                    oracle.judge(op, answer)
                header = getattr(answer, "header", None)
                if header is not None:
                    told = header.revision
                    if then is None:
                        self._trace_answer(op, told)
                    if then is not None:
                        then(op, answer)
                    else:
                        oracle.answer(op, answer)
                    if op.name.startswith("KV."):
                        # Others may be answered by the leader.
                        self.told_revision = max(self.told_revision, told)
                    return
            self._trace_answer(op, answer)
            is_refused = isinstance(answer, EtcdError) and answer.text in _LOG_IN_AGAIN
            if is_refused and self.user and op.name != "Auth.Authenticate":
                self.world.at(self._rng.uniform(0.01, 0.5), self._log_in)
            if then is not None:
                if not is_write:
                    oracle.judge(op, answer)
                then(op, answer)
            elif answer.text == _DAMAGED and self.node is not None and self.node.is_rotten:
                oracle.lose(op)  # Read, or what the write found, is lost there.
                self.world.at(0.0, self.hang_up)
            else:
                oracle.answer(op, answer)

        self._pending[op.id] = answered
        self._send(op.id, op.number, request.encode())
        return op

    def _trace_answer(self, op: Op, answer: Any) -> None:
        if op.is_write or isinstance(answer, EtcdError):
            self.world.note(f"{self.name} #{op.id} {op.name} answered {answer}")

    # Users.

    def _log_in(self) -> None:
        if self._session is None or self._is_logging_in:
            return
        rng = self._rng
        self._is_logging_in = True
        request = proto.AuthenticateRequest(name=self.user, password=self.passwords(self.user))
        luck = rng.random()
        if luck < REUSED_SHARE and self.tokens:
            request = proto.AuthenticateRequest(password=rng.choice(self.tokens).text)
        elif luck > 1 - WRONG_SHARE and self.user != "root":
            request.password = "wrong"
        self.ask("Auth.Authenticate", request, then=self._logged_in)
        self.flush()

    def _logged_in(self, op: Op, answer: Any) -> None:
        self._is_logging_in = False
        if isinstance(answer, EtcdError):
            self.oracle.login_failed(op, answer)
            if not op.request.name:
                self.tokens.clear()
        else:
            token = self.oracle.logged_in(op, answer.token)
            self.tokens = [*self.tokens[-1:], token]
            # A request that is not answered yet may count as one of the user before or of this one.
            # After several logins its list may be older than the current one.
            lists = [self.identities, *(asked.identities for asked in self._open_ops.values())]
            for identities in {id(each): each for each in lists}.values():
                identities.append(token)
            self.identities = [token]
            self.world.note(f"{self.name} is {token.name}, auth revision {token.revision}")
        if self.watches and not self._watch_stream:
            self._resume_watches()
            self.flush()

    def _do_auth_read(self) -> None:
        name, request = self._rng.choice(
            (
                ("Auth.AuthStatus", proto.AuthStatusRequest()),
                ("Auth.UserList", proto.AuthUserListRequest()),
                ("Auth.RoleList", proto.AuthRoleListRequest()),
                ("Auth.UserGet", proto.AuthUserGetRequest(name=self.user or "u1")),
                ("Auth.UserGet", proto.AuthUserGetRequest(name="u1")),
                ("Auth.RoleGet", proto.AuthRoleGetRequest(role="r1")),
            )
        )
        self.ask(name, request, then=self._ignore)

    def _do_change_auth(self) -> None:
        """Permitted only to those with the role root, or while auth is disabled."""
        name, request = change(self._rng, self.oracle, self.load.keys)
        self.ask(name, request, is_write=True)

    # Random requests.

    def _act(self) -> None:
        rng, load = self._rng, self.load
        is_open = self._session is not None and not self._is_logging_in
        if self.is_busy and is_open and len(self._pending) < 4 * load.burst:
            for name in rng.choices(
                load.names, cum_weights=load.cumulative, k=rng.randint(1, load.burst)
            ):
                getattr(self, f"_do_{name}")()
            self.flush()
        self.world.at(rng.expovariate(1.0 / load.pause_s), self._act)

    def _key(self) -> bytes:
        return self._rng.choice(self.load.keys)

    def _value(self) -> bytes:
        """A value that no other write has."""
        value = b"%d" % self.oracle.next_id
        size = self.load.value_bytes
        return value.ljust(self._rng.randint(0, size), b".") if size else value

    def _range(self) -> tuple[bytes, bytes]:
        rng = self._rng
        if rng.random() < 0.3:
            return b"k", b"l"
        first, last = sorted((self._key(), self._key()))
        return first, last + b"\0"

    def _put_request(self) -> Any:
        rng = self._rng
        request = proto.PutRequest(key=self._key(), value=self._value())
        luck = rng.random()
        if luck < 0.15:
            request.prev_kv = True
        elif luck < 0.18:
            request.value = b""
            request.ignore_value = True
        elif luck < 0.21:
            request.ignore_lease = True
        return request

    def _do_put(self) -> None:
        self.ask("KV.Put", self._put_request(), is_write=True)

    def _do_get(self) -> None:
        self.ask("KV.Range", proto.RangeRequest(key=self._key()))

    def _do_get_serializable(self) -> None:
        self.ask("KV.Range", proto.RangeRequest(key=self._key(), serializable=True))

    def _do_range(self) -> None:
        rng = self._rng
        key, range_end = self._range()
        request = proto.RangeRequest(key=key, range_end=range_end)
        request.serializable = rng.random() < 0.3
        luck = rng.random()
        if luck < 0.2:
            request.limit = rng.randint(1, 5)
        elif luck < 0.3:
            request.keys_only = True
        elif luck < 0.4:
            request.count_only = True
        elif luck < 0.6:
            request.sort_target = rng.randint(1, 4)
            request.sort_order = rng.randint(1, 2)
        if self._means_ranges():
            setattr(request, rng.choice(BOUNDS), rng.randint(1, self.oracle.revision))
        self.ask("KV.Range", request)

    def _do_past(self) -> None:
        oracle = self.oracle
        low = max(1, oracle.compacted)
        key, range_end = self._range()
        request = proto.RangeRequest(
            key=key, range_end=range_end, revision=self._rng.randint(low, oracle.revision)
        )
        self.compacted_at = oracle.compaction_answered
        self.ask("KV.Range", request)

    def _do_txn(self) -> None:
        rng = self._rng
        keys = rng.sample(self.load.keys, min(len(self.load.keys), rng.randint(1, 4)))
        request = proto.TxnRequest(
            compare=[self._compare(key) for key in keys[: rng.randint(0, 2)]],
            success=[self._operation(key) for key in keys],
            failure=[self._operation(key) for key in keys[: rng.randint(0, 3)]],
        )
        if self.user and rng.random() < 0.5:
            # Of other keys, which others may touch.
            request.failure = [self._operation(self._key())]
        if rng.random() < 0.1:
            inner = proto.TxnRequest(compare=[self._compare(keys[0])], success=request.success)
            request.success = [proto.RequestOp(request_txn=inner)]
        is_write = any(
            op.request_range is None for op in (*request.success, *request.failure)
        ) and not _is_read_only(request)
        self.ask("KV.Txn", request, is_write=is_write)

    def _means_ranges(self) -> bool:
        share = self.load.range_share
        return share > 0.0 and self._rng.random() < share

    def _compare(self, key: bytes) -> Any:
        rng = self._rng
        oracle = self.oracle
        result = rng.choice((0, 0, 1, 2, 3))
        if self._means_ranges():
            start, range_end = self._range()
            name, highest = rng.choice(
                (("version", 3), ("create_revision", oracle.revision), ("lease", 0))
            )
            compare = proto.Compare(key=start, range_end=range_end, result=result)
            compare.target = getattr(proto.Compare, name.removesuffix("_revision").upper())
            setattr(compare, name, rng.randint(0, highest))
            return compare
        known = oracle.now.get(key)
        luck = rng.random()
        if luck < 0.5:
            revision = known.mod_revision if known else 0
            return proto.Compare(
                key=key, target=proto.Compare.MOD, result=result, mod_revision=revision
            )
        if luck < 0.7:
            return proto.Compare(
                key=key, target=proto.Compare.VERSION, result=result, version=rng.randint(0, 2)
            )
        value = known.value if known and rng.random() < 0.7 else b"1"
        return proto.Compare(key=key, target=proto.Compare.VALUE, result=result, value=value)

    def _operation(self, key: bytes) -> Any:
        rng = self._rng
        if self._means_ranges():
            if rng.random() < 0.3:
                # Of keys that no transaction puts beside it, which etcd refuses.
                many = proto.DeleteRangeRequest(key=b"m", range_end=b"n")
                many.prev_kv = rng.random() < 0.3
                return proto.RequestOp(request_delete_range=many)
            start, range_end = self._range()
            asked = proto.RangeRequest(key=start, range_end=range_end)
            asked.count_only = rng.random() < 0.3
            return proto.RequestOp(request_range=asked)
        luck = rng.random()
        if luck < 0.5:
            put = proto.PutRequest(key=key, value=self._value(), prev_kv=rng.random() < 0.2)
            return proto.RequestOp(request_put=put)
        if luck < 0.75:
            return proto.RequestOp(
                request_delete_range=proto.DeleteRangeRequest(key=key, prev_kv=rng.random() < 0.3)
            )
        request = proto.RangeRequest(key=key)
        if rng.random() < 0.2:
            request.revision = max(1, self.oracle.revision - rng.randint(0, 20))
        return proto.RequestOp(request_range=request)

    def _do_read_txn(self) -> None:
        serializable = self._rng.random() < 0.3
        request = proto.TxnRequest(
            compare=[self._compare(self._key())],
            success=[
                proto.RequestOp(
                    request_range=proto.RangeRequest(key=self._key(), serializable=serializable)
                )
                for _ in range(2)
            ],
        )
        self.ask("KV.Txn", request)

    def _do_delete(self) -> None:
        request = proto.DeleteRangeRequest(key=self._key(), prev_kv=self._rng.random() < 0.3)
        self.ask("KV.DeleteRange", request, is_write=True)

    def _do_delete_range(self) -> None:
        key, range_end = self._range()
        request = proto.DeleteRangeRequest(
            key=key, range_end=range_end, prev_kv=self._rng.random() < 0.3
        )
        self.ask("KV.DeleteRange", request, is_write=True)

    def _do_purge(self) -> None:
        """Delete many keys at once, and read beside it, also when a member has answered the delete
        and others still apply it. If there are few, put some first."""
        if sum(key.startswith(b"m") for key in self.oracle.now) < MANY:
            puts = [proto.PutRequest(key=b"m%02d" % number) for number in range(2 * MANY)]
            request = proto.TxnRequest(success=[proto.RequestOp(request_put=put) for put in puts])
            self.ask("KV.Txn", request, is_write=True)
            return
        request = proto.DeleteRangeRequest(key=b"m", range_end=b"n")
        self.ask("KV.DeleteRange", request, is_write=True)
        for _ in range(8):
            self.world.at(self._rng.uniform(0.0, 0.05), self._read_many)

    def _read_many(self) -> None:
        rng = self._rng
        request = proto.RangeRequest(key=b"m", range_end=b"n")
        if self._means_ranges():
            request.key = b"m%02d" % rng.randrange(MANY)
            request.range_end = b"m%02d" % rng.randint(MANY, 2 * MANY)
        request.serializable = rng.random() < 0.3
        request.count_only = rng.random() < 0.5
        request.limit = rng.choice((0, 0, 3))
        self.ask("KV.Range", request)
        self.flush()

    def _do_lease(self) -> None:
        if len(self.leases) >= 3:
            return
        rng = self._rng
        lease = HeldLease(
            rng.getrandbits(40) + 1, rng.randint(1, MAX_TTL_S), rng.choice((0, 2, 10))
        )
        request = proto.LeaseGrantRequest(ID=lease.id, TTL=lease.ttl_s)
        if self.ask("Lease.LeaseGrant", request, is_write=True) is not None:
            self.leases.append(lease)
            self.world.at(rng.uniform(0.05, 0.5), lambda: self._keep_alive(lease))

    def _do_lease_put(self) -> None:
        if self.user and self.oracle.leases and self._rng.random() < 0.5:
            lease_id = self._rng.choice(list(self.oracle.leases))
            request = proto.PutRequest(key=self._key(), value=self._value(), lease=lease_id)
            self.ask("KV.Put", request, is_write=True)
        elif self.leases:
            lease = self._rng.choice(self.leases)
            request = proto.PutRequest(key=self._key(), value=self._value(), lease=lease.id)
            self.ask("KV.Put", request, is_write=True)

    def _do_revoke(self) -> None:
        if self.user and self.oracle.leases and self._rng.random() < 0.5:
            lease_id = self._rng.choice(list(self.oracle.leases))
            self.ask("Lease.LeaseRevoke", proto.LeaseRevokeRequest(ID=lease_id), is_write=True)
        elif self.leases:
            lease = self._rng.choice(self.leases)
            self.leases.remove(lease)
            self.ask("Lease.LeaseRevoke", proto.LeaseRevokeRequest(ID=lease.id), is_write=True)

    def _do_time_to_live(self) -> None:
        book = self.oracle.lease_book
        if book:
            lease_id = self._rng.choice(list(book)[-5:])
            request = proto.LeaseTimeToLiveRequest(ID=lease_id, keys=self._rng.random() < 0.5)
            self.ask("Lease.LeaseTimeToLive", request, then=self._told_time)

    def _told_time(self, op: Op, answer: Any) -> None:
        if not isinstance(answer, EtcdError):
            self.oracle.time_to_live(op, answer)

    def _do_compact(self) -> None:
        oracle = self.oracle
        back = self._rng.choice((0, 5, 50, 500))
        request = proto.CompactionRequest(
            revision=max(1, oracle.revision - back), physical=self._rng.random() < 0.3
        )
        self.ask("KV.Compact", request, is_write=True)

    def _do_hash(self) -> None:
        self.ask("Maintenance.HashKV", proto.HashKVRequest(), then=self._told_hash)

    def _told_hash(self, op: Op, answer: Any) -> None:
        if isinstance(answer, EtcdError):
            return
        self.oracle.answers += 1
        name = self.node.name if self.node is not None else ""
        self.oracle.hashed("etcd", name, answer.hash_revision, answer.compact_revision, answer.hash)

    def _do_members(self) -> None:
        request = proto.MemberListRequest(linearizable=self._rng.random() < 0.5)
        self.ask("Cluster.MemberList", request, then=self._ignore)

    def _do_status(self) -> None:
        self.ask("Maintenance.Status", proto.StatusRequest(), then=self._ignore)

    def _ignore(self, op: Op, answer: Any) -> None:
        self.oracle.answers += 1

    # Leases.

    def _keep_alive(self, lease: HeldLease) -> None:
        if lease not in self.leases:
            return
        if lease.renewals <= 0:
            self.leases.remove(lease)
            return
        rng = self._rng
        if self._session is not None and len(lease.asked) < 4:
            if not lease.stream:
                lease.stream = self._stream(
                    lambda flags, body: self._kept_alive(lease, flags, body)
                )
            lease.asked.append(self.world.now)
            self._send(lease.stream, _KEEP_ALIVE, proto.LeaseKeepAliveRequest(ID=lease.id).encode())
            self.flush()
            lease.renewals -= 1
        self.world.at(rng.uniform(0.1, 0.6) * lease.ttl_s, lambda: self._keep_alive(lease))

    def _kept_alive(self, lease: HeldLease, flags: int, body: bytes) -> None:
        if flags & (frames.ERROR | frames.END):
            lease.asked.clear()
            lease.stream = 0
            return
        response = proto.LeaseKeepAliveResponse.decode(body)
        asked_at = lease.asked.pop(0)
        self.oracle.answers += 1
        self.world.note(
            f"{self.name} lease {lease.id:x} asked at {asked_at:.4f} TTL {response.TTL}"
        )
        self.oracle.renewed(lease.id, asked_at, response)
        if not response.TTL and lease in self.leases:
            self.leases.remove(lease)

    def _stream(self, handler: Handler) -> int:
        """The id of a new stream."""
        op_id = self.oracle.next_id
        self.oracle.next_id += 1
        self.oracle.applied.append(0)
        self._pending[op_id] = handler
        self._streams.add(op_id)
        return op_id

    # Watches.

    def _new_watch(self, number: int) -> Watched:
        rng = self._rng
        key, range_end = (b"k", b"l") if rng.random() < 0.5 else (self._key(), b"")
        watched = Watched(self.oracle, f"{self.name}/w{number + 1}", key, range_end)
        watched.prev_kv = rng.random() < 0.3
        if rng.random() < 0.15:
            watched.wants_puts = False
        elif rng.random() < 0.15:
            watched.wants_deletes = False
        luck = rng.random()
        if luck < 0.3:
            watched.next = 1
        elif luck < 0.5:
            watched.next = rng.randint(2, 200)
        return watched

    def _resume_watches(self) -> None:
        self._watch_stream = self._stream(self._watch_answer)
        for number in range(len(self.watches)):
            self._create(number)

    def _create(self, number: int) -> None:
        watched = self.watches[number]
        kinds = proto.WatchCreateRequest
        filters = []
        if not watched.wants_puts:
            filters.append(kinds.NOPUT)
        if not watched.wants_deletes:
            filters.append(kinds.NODELETE)
        create = proto.WatchCreateRequest(
            key=watched.key,
            range_end=watched.range_end,
            start_revision=watched.next,
            prev_kv=watched.prev_kv,
            progress_notify=self._rng.random() < 0.5,
            fragment=self._rng.random() < 0.3,
            filters=filters,
            watch_id=number + 1,
        )
        self._refused.discard(number)
        self._creating[number] = op = Op(0, "Watch.Watch", create, self, self.world.now)
        self.oracle.note_auth(op)
        self._send(self._watch_stream, _WATCH, proto.WatchRequest(create_request=create).encode())

    def _watch_answer(self, flags: int, body: bytes) -> None:
        if flags & (frames.ERROR | frames.END):
            self._watch_stream = 0
            self._watching.clear()
            self.hang_up()
            return
        response = proto.WatchResponse.decode(body)
        number = response.watch_id - 1
        revision = response.header.revision if response.header else 0
        if response.created and response.canceled:
            self._watch_refused(response.cancel_reason)
        elif response.created:
            self.oracle.judge(self._creating.pop(number), response)
            watched = self.watches[number]
            watched.created(revision, watched.next)
            self._watching.add(number)
        elif response.canceled:
            watched = self.watches[number]
            self._watching.discard(number)
            if response.compact_revision:
                self.world.note(
                    f"{watched.name} is cancelled, compacted {response.compact_revision}"
                )
                watched.compacted(response.compact_revision)
            if self.node is not None and self.node.is_rotten:
                self.world.at(0.0, self.hang_up)
            else:
                self._create(number)
        elif response.events:
            watched = self.watches[number]
            if self.world.trace is not None:
                self.world.note(f"{watched.name} told up to {response.events[-1].kv.mod_revision}")
            watched.told(response)
        elif response.watch_id == -1:
            for at in self._watching:
                self.watches[at].progressed(revision)
        else:
            self.watches[number].progressed(revision)

    def _watch_refused(self, reason: str) -> None:
        """The answer does not say which watch was refused."""
        reason = reason.rpartition(" desc = ")[2]
        refused = EtcdError(7, reason)
        for number, op in list(self._creating.items()):
            try:
                self.oracle.judge(op, refused)
            except Violation:
                if number == list(self._creating)[-1]:
                    raise
            else:
                self.world.note(f"{self.watches[number].name} is refused: {reason}")
                del self._creating[number]
                self._refused.add(number)
                if reason in _LOG_IN_AGAIN and self.user:
                    self.world.at(self._rng.uniform(0.01, 0.5), self._log_in)
                return
        raise Violation("a watch is refused only if it was asked for", f"{self.name}: {reason}")

    @property
    def is_asking(self) -> bool:
        """An answer is still to come."""
        return bool(self._open_ops)

    @property
    def is_quiet(self) -> bool:
        """It waits for nothing, and has all watches that it may have."""
        return (
            self._session is not None
            and not self._open_ops
            and len(self._watching) + len(self._refused) == len(self.watches)
        )

    def has_watch(self, watched: Watched) -> bool:
        return self.watches.index(watched) not in self._refused

    # Backups and maintenance.

    def back_up(self) -> None:
        """Take a snapshot and look what is in it."""
        if self._session is None:
            return
        parts: list[bytes] = []
        node = self.node

        def part(flags: int, body: bytes) -> None:
            if flags & frames.ERROR:
                failure = proto.Error.decode(body)
                self.oracle.judge(op, EtcdError(failure.code, failure.message))
                return
            if body:
                parts.append(proto.SnapshotResponse.decode(body).blob)
            if flags & frames.END:
                self.oracle.answers += 1
                self.oracle.judge(op, None)
                assert node is not None
                try:
                    check_backup(self.oracle, b"".join(parts))
                except DataDamaged as damage:
                    if not node.is_rotten:
                        raise
                    self.world.note(f"{self.name} cannot use a backup of {node.name}: {damage}")
                else:
                    self.world.note(f"{self.name} has a backup of {node.name}")

        request_id = self._stream(part)
        op = Op(request_id, "Maintenance.Snapshot", None, self, self.world.now)
        self.oracle.note_auth(op)
        self._send(request_id, _SNAPSHOT, b"", frames.END)
        self.flush()

    def defragment(self) -> None:
        self.ask("Maintenance.Defragment", proto.DefragmentRequest(), then=self._ignore)
        self.flush()

    # Now and then.

    def _is_whole(self) -> bool:
        """The member that was asked lives and has the other end of the connection."""
        node, to = self.node, self._to
        return node is not None and to is not None and node.is_up and node.holds(to.session)

    def _look_after(self) -> None:
        """Give up a member that does not answer; ask watches how far they are; move on."""
        rng = self._rng
        now = self.world.now
        is_whole = self._is_whole()
        is_late = any(began < now - self._give_up_s for began in self._began.values())
        # A connection whose other end is gone is found out by and by, as by TCP's keep-alives.
        if (is_late and not (self.is_patient and is_whole)) or (
            self._session is not None and not is_whole and rng.random() < 0.3
        ):
            self.world.note(f"{self.name} gives up on {self.node.name if self.node else ''}")
            self.hang_up()
        elif self._session is None:
            self._connect()
        else:
            if self._refused and rng.random() < 0.3:
                self._create(min(self._refused))
            luck = rng.random()
            if luck < 0.05 and self.preferred is None:
                self.hang_up()
            elif luck < 0.4 and self._watch_stream:
                request = proto.WatchRequest(progress_request=proto.WatchProgressRequest())
                self._send(self._watch_stream, _WATCH, request.encode())
            elif luck < 0.5 and self._watch_stream and self._watching:
                number = rng.choice(sorted(self._watching))
                cancel = proto.WatchCancelRequest(watch_id=number + 1)
                self._send(
                    self._watch_stream, _WATCH, proto.WatchRequest(cancel_request=cancel).encode()
                )
            self.flush()
        self.world.at(rng.uniform(0.5, 1.5), self._look_after)


def _is_read_only(request: Any) -> bool:
    return all(
        op.request_range is not None
        or (op.request_txn is not None and _is_read_only(op.request_txn))
        for op in (*request.success, *request.failure)
    )


def _brief(request: Any) -> str:
    text = repr(request)
    return text if len(text) < 160 else text[:157] + "..."
