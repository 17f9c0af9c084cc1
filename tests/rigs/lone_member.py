"""A server's code in process, without sockets."""

from __future__ import annotations

import hashlib  # noqa: F401
import random
from pathlib import Path
from typing import Any

import etcdlite.etcd_backup  # noqa: F401  No thread is there to import what a backup needs.
from etcdlite import datadir, proto
from etcdlite.member import Member
from etcdlite.options import Options
from etcdlite.raft import Config as RaftConfig
from etcdlite.raft import Raft
from etcdlite.storage.disk import Disk

ALWAYS_SLOW_S = -2.0
"""What a request may take: see `every_slow_request_can_be_named` in conftest.py."""


def run_logins(member: Member) -> None:
    """Compute the hashes of all passwords that wait, as the server's threads do."""
    while (job := member.logins.take()) is not None:
        job.run()
        member.logins.finished(job)


def turn(member: Member) -> None:
    """A turn of the loop that saves nothing between its halves."""
    now = member.clock()
    member.begin_turn(now)
    member.proceed(now)


class LoneMember:
    """A member alone in its cluster over a folder, driven by hand: what `server.py` does with
    threads and sockets, done at once and in order."""

    def __init__(
        self, path: Path, *, seed: int = 0, disk: Disk | None = None, **options: Any
    ) -> None:
        disk = Disk() if disk is None else disk
        home = datadir.Home(disk, str(path), segment_bytes=1 << 16, wal_segment_bytes=1 << 16)
        if not home.exists:
            identity = proto.Member(ID=7, name="lone")
            datadir.create(home, datadir.Founding(8, 7, [identity]))
        opened = datadir.open_member(home, min_ttl_s=2, sync_enabled=False)
        rng = random.Random(seed)
        self.now = 0.0
        """The member's clock, in seconds; `tick` moves it."""
        raft = Raft(
            RaftConfig(id=7, election_ticks=10),
            rng,
            voters=[7],
            hard_state=opened.hard_state,
            snapshot_index=opened.log_index,
            snapshot_term=opened.log_term,
            entries=opened.entries,
            applied=opened.store.applied_index,
        )
        settings: dict[str, Any] = {
            "warn_apply_s": ALWAYS_SLOW_S,
            "warn_request_s": ALWAYS_SLOW_S,
            "quota_bytes": 1 << 31,
            "checkpoint_bytes": 1 << 16,
        }
        self.wal = opened.wal
        self.member = Member(
            member_id=7,
            cluster_id=8,
            store=opened.store,
            raft=raft,
            clock=lambda: self.now,
            rng=rng,
            options=Options(**{**settings, **options}),
        )
        self.settle()

    def settle(self) -> None:
        """Turn until there is nothing left to do."""
        member = self.member
        while True:
            turn(member)
            saves = member.take_saves()
            self.wal.save_all(saves)
            member.persisted(saves)
            member.maintain()
            run_logins(member)
            task = member.take_task()
            if task is not None:
                task()
                member.finished()
            elif not (saves or member.has_work):
                return

    def tick(self, seconds: float = 0.1) -> None:
        self.now += seconds
        self.member.tick()
        self.settle()

    def elect(self) -> None:
        """Let time pass until there is a leader."""
        while not self.member.raft.leader:
            self.tick()

    def close(self) -> None:
        self.member.maintenance.close(self.member.is_applying)
        self.wal.close()
