"""A `Member` driven by hand: what `server.py` does with threads and sockets, done at once and in
order, on any disk and with a clock that the test moves.

It keeps a plain model of what it was asked to write, and one `Stage` per write, so that after a
crash the test can say which writes are there: those up to some stage, and none behind it.
"""

from __future__ import annotations

import contextlib
import random
from typing import Any, NamedTuple

from etcdlite import datadir, frames, methods, proto, txn
from etcdlite.errors import EtcdError
from etcdlite.limits import DEFAULT_LIMITS, Limits
from etcdlite.member import Member
from etcdlite.options import Options
from etcdlite.raft import Config, Raft
from etcdlite.request import Waiter
from etcdlite.sealing import Keyring
from etcdlite.storage.disk import Disk
from etcdlite.storage.steps import finish
from etcdlite.wire import api
from rigs.faulty_disk import FaultyDisk
from rigs.lone_member import ALWAYS_SLOW_S, run_logins, turn
from rigs.plain_model import PlainStore
from rigs.store_rig import check_store

DATA_DIR = "default.etcdlite"
MEMBER_ID = 7
CLUSTER_ID = 8

_NUMBERS = {
    method.request.NAME: number
    for number, method in methods.METHODS.items()
    if not (method.client_stream or method.server_stream)
}


class Stage(NamedTuple):
    """How far the writes have gone."""

    revision: int
    compacted: int
    leases: dict[int, int]


class Story:
    """What was written: the model, and the stage before the first and after every write."""

    def __init__(self) -> None:
        self.model = PlainStore()
        self.stages = [self._stage()]
        self.acknowledged = 0
        """Every write up to this stage is answered."""

    def _stage(self) -> Stage:
        return Stage(self.model.revision, self.model.compacted, dict(self.model.leases))

    def tell(self, request: Any) -> None:
        with contextlib.suppress(EtcdError):
            self.model.apply(request)
        self.stages.append(self._stage())

    def check(self, store: Any, least: int | None = None) -> int:
        """The store is at a stage that is at least the acknowledged one (or `least`), in every
        detail; which one it is."""
        least = self.acknowledged if least is None else least
        found = Stage(
            store.revision,
            store.compact_revision,
            {i: store.lessor.ttl_s(i) for i in finish(store.lessor.lease_steps())},
        )
        for number in range(len(self.stages) - 1, least - 1, -1):
            if self.stages[number] == found:
                check_store(store, self.model.as_of(*found))
                return number
        where = self.stages.index(found) if found in self.stages else "none"
        raise AssertionError(f"{found} is stage {where}; {least} are acknowledged")

    def fork(self, stage: int) -> Story:
        """The story that went no further than `stage`."""
        other = Story()
        other.model = self.model.as_of(*self.stages[stage])
        other.stages = self.stages[: stage + 1]
        other.acknowledged = stage
        return other


class MemberRig:
    """Options go to `Member`. `is_blocked` is what its session says: the client does not read."""

    segment_bytes = 700
    wal_segment_bytes = 2048

    def __init__(
        self,
        disk: Disk | None = None,
        story: Story | None = None,
        limits: Limits = DEFAULT_LIMITS,
        keys: Keyring | None = None,
        wal_dir: str = "",
        **options: Any,
    ) -> None:
        self.disk = FaultyDisk() if disk is None else disk
        self.story = Story() if story is None else story
        self.now = 1000.0
        self.pace_s = 0.0
        """How much time passes whenever the member looks at the clock."""
        self.looks = 0
        self.answers: dict[int, Any] = {}
        """By request id: the response, or the text of the error."""
        self.is_blocked = False
        self.cancelled: set[int] = set()
        """Requests that nobody waits for any more."""
        self._writes: dict[int, int] = {}
        self._next_id = 1
        sizes = self.segment_bytes, self.wal_segment_bytes
        home = datadir.Home(self.disk, DATA_DIR, wal_dir, keys, *sizes)
        if not home.exists:
            members = [proto.Member(ID=MEMBER_ID, name="default")]
            datadir.create(home, datadir.Founding(CLUSTER_ID, MEMBER_ID, members))
        opened = datadir.open_member(home, min_ttl_s=1, sync_enabled=True, limits=limits)
        self.notes = opened.notes
        rng = random.Random(5)
        settings: dict[str, Any] = {
            "warn_apply_s": ALWAYS_SLOW_S,
            "warn_request_s": ALWAYS_SLOW_S,
            "quota_bytes": 1 << 31,
            "checkpoint_bytes": 1 << 40,
        }
        self.wal = opened.wal
        self.member = Member(
            member_id=opened.member_id,
            cluster_id=opened.cluster_id,
            store=opened.store,
            raft=Raft(
                Config(id=opened.member_id, election_ticks=10),
                rng,
                voters=[opened.member_id],
                hard_state=opened.hard_state,
                snapshot_index=opened.log_index,
                snapshot_term=opened.log_term,
                entries=opened.entries,
                applied=opened.store.applied_index,
            ),
            clock=self._clock,
            rng=rng,
            options=Options(**{**settings, **options}),
        )

    def _clock(self) -> float:
        self.looks += 1
        self.now += self.pace_s
        return self.now

    # The session.

    is_member = False
    certificate_user = ""

    def token(self, request_id: int) -> str:
        return ""

    def logged_in(self, token: str) -> None:
        pass

    def awaits(self, request_id: int) -> bool:
        return request_id not in self.cancelled

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        self.answers[request_id] = methods.METHODS[method].response.decode(body)
        self._answered(request_id)

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        self.answers[request_id] = failure.text
        self._answered(request_id)

    def _answered(self, request_id: int) -> None:
        stage = self._writes.get(request_id, 0)
        self.story.acknowledged = max(self.story.acknowledged, stage)

    # The owner.

    def send(self, request: Any) -> int:
        """Hand a request in as a client's; its id. The model is told of writes."""
        request_id = self._next_id
        self._next_id += 1
        method = _NUMBERS[type(request).NAME]
        if type(request).NAME in PlainStore.APPLY and not (
            type(request) is proto.TxnRequest and txn.is_read_only(request)
        ):
            self.story.tell(request)
            self._writes[request_id] = len(self.story.stages) - 1
        frame = frames.frame(request_id, method, 0, request.encode())
        try:
            api.HANDLERS[method][0](self.member, Waiter(self, request_id, method, request), frame)
        except EtcdError as failure:
            self.fail(request_id, method, failure)
        return request_id

    def ask(self, request: Any) -> Any:
        """Its answer."""
        request_id = self.send(request)
        self.settle()
        return self.answers[request_id]

    def turn(self) -> bool:
        """One turn of the loop; whether anything is left to do."""
        member = self.member
        turn(member)
        saves = member.take_saves()
        if saves:
            self.wal.save_all(saves)
            member.persisted(saves)
        released = member.maintenance.released
        if released is not None:
            member.maintenance.released = None
            self.wal.cover(*released, min(released[0], member.log_begin))
        member.maintain()
        run_logins(member)
        task = member.take_task()
        if task is not None:
            task()
            member.finished()
        return bool(saves) or task is not None or member.has_work

    def settle(self) -> None:
        """Turn until there is nothing left to do."""
        while self.turn():
            pass

    def tick(self, seconds: float = 0.1) -> None:
        self.now += seconds
        self.member.tick()
        self.settle()

    def close(self) -> None:
        """As a server that is told to stop."""
        self.member.maintenance.close(self.member.is_applying)
        self.wal.close()
