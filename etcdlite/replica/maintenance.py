"""What a member does by itself, in the background: compaction, checkpoints, cleaning.

Compaction work and the freeing of what reads left, which only touch memory, run beside one job: a
checkpoint, the cleaning of a segment, or a defragmentation (a checkpoint and then the cleaning of
every segment with garbage).
A job is a generator (`steps.Job`); it advances in time slices on the loop, and its slow disk work
runs as a task elsewhere.

Automatic compaction works as etcd's: in mode "periodic" it keeps the history of a time, in mode
"revision" that of a number of revisions.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from etcdlite import log, proto
from etcdlite.errors import UNAVAILABLE, EtcdError, error
from etcdlite.loading import RunTask
from etcdlite.methods import COMPACT
from etcdlite.mvcc import Store
from etcdlite.options import Options
from etcdlite.replica.alarms import RAISE_AGAIN_S
from etcdlite.replica.state import State
from etcdlite.request import Done
from etcdlite.storage import checkpoint, cleaning
from etcdlite.storage.disk import NO_SPACE
from etcdlite.storage.layout import SEGMENT_HEADER, DataDamaged
from etcdlite.storage.steps import Job, discard, run
from etcdlite.wall_clock import unix_s

DEFRAGMENT_SHARE = 0.05
"""Segments with less garbage than this are not worth a defragmentation."""

MAX_COMPACTION_INTERVAL_S = 3600.0
REVISION_MODE_INTERVAL_S = 300.0
SAMPLES_PER_RETENTION = 10


class AutoCompaction:
    """When to compact, and at which revision."""

    def __init__(self, retention_s: float, retention_revisions: int) -> None:
        """Either may be 0: off."""
        self._retention_s = retention_s
        self._retention_revisions = retention_revisions
        self._samples: deque[tuple[float, int]] = deque()
        self._next_sample = 0.0
        self._next_compaction: float | None = None

    def due(self, now: float, revision: int) -> int:
        """The revision to compact at now, or 0."""
        if self._retention_revisions:
            if self._next_compaction is None:
                self._next_compaction = now + REVISION_MODE_INTERVAL_S
            if now < self._next_compaction:
                return 0
            self._next_compaction = now + REVISION_MODE_INTERVAL_S
            return max(0, revision - self._retention_revisions)
        if not self._retention_s or now < self._next_sample:
            return 0
        self._next_sample = now + self._retention_s / SAMPLES_PER_RETENTION
        self._samples.append((now, revision))
        target = 0
        while self._samples and self._samples[0][0] <= now - self._retention_s:
            target = self._samples.popleft()[1]
        if not target or (self._next_compaction is not None and now < self._next_compaction):
            return 0
        self._next_compaction = now + min(self._retention_s, MAX_COMPACTION_INTERVAL_S)
        return target


class Maintenance:
    """Runs a member's background work; driven by `Background` and `Member.tick`."""

    def __init__(
        self,
        state: State,
        propose: Callable[[int, proto.Message], None],
        run_task: RunTask,
        options: Options,
    ) -> None:
        """`propose` brings a method and its request into the log."""
        self._state = state
        self._propose = propose
        self._run_task = run_task
        self.checkpoint_bytes = options.checkpoint_bytes
        self.auto_compaction = AutoCompaction(0.0, 0)
        self.released: tuple[int, int] | None = None
        """Index and term up to which the log is not needed any more; taken by the owner."""
        self.logged_bytes = 0
        """Bytes of entries applied since the last checkpoint began."""
        self.compacted_versions = 0
        self.checkpoints = 0
        self.cleaned_segments = 0
        self.checkpoint_index = -1
        """The last applied entry that is in a checkpoint of this run; -1 if there is none."""
        self.wants_checkpoint = False
        """Write one as soon as possible."""
        self._ticked_at = -math.inf
        self._shortage: OSError | None = None
        """The lack of space or of a descriptor for which the last job was given up."""
        self._next_job_at = -math.inf
        """No checkpoint or cleaning begins by itself before this time."""
        self._compaction_began: float | None = None
        self._compaction_dropped = 0
        self._job: Job | None = None
        self._awaits_task = False
        """The job goes on when its task has run."""
        self._waiting_defragment: list[Done] = []
        self.defragmenting: list[Done] = []

    # From requests.

    def defragment(self, done: Done) -> None:
        """Write a checkpoint, without which no space can be freed, clean every segment that has
        garbage, then answer. The answer is NoSpace if there was no space for this, and Unavailable
        if there was no file descriptor."""
        self._waiting_defragment.append(done)
        self._job = self._job or self._next_job()

    # From the member.

    def tick(self, now: float) -> None:
        state = self._state
        store = state.store
        self._ticked_at = now
        if state.lessor.promoted:
            revision = self.auto_compaction.due(now, store.revision)
            if revision > store.compacted:
                log.info("starting auto compaction", revision=revision)
                self._propose(COMPACT, proto.CompactionRequest(revision=revision))
        if self._job is None:
            self._job = self._next_job()

    def _next_job(self) -> Job | None:
        store = self._state.store
        if self._waiting_defragment:
            return self._defragment()
        if self._ticked_at < self._next_job_at:
            return None
        least_bytes = len(store.index.heads) * store.limits.checkpoint_bytes_per_key
        # Writes that change nothing (a compare that fails) make the log grow, but not the data.
        new_bytes = max(store.bytes_since_checkpoint, self.logged_bytes)
        version_differs = store.storage_version != self._state.cluster_version.version
        is_due = new_bytes > max(self.checkpoint_bytes, least_bytes)
        if self.wants_checkpoint or version_differs or is_due:
            self.wants_checkpoint = False
            return self._checkpoint()
        if not self._state.alarms.has_access:
            return None  # The segment could not be removed.
        segment = cleaning.segment_to_clean(store, store.limits.clean_share)
        return self._clean(segment) if segment is not None else None

    @property
    def has_work(self) -> bool:
        """There is something to do at once, that is, not only a task to wait for."""
        store = self._state.store
        return (
            bool(store.leftovers)
            or (store.compaction is not None and not store.compaction_is_held)
            or (self._job is not None and not self._awaits_task)
        )

    def run(self, is_over: Callable[[], bool]) -> None:
        """Do one step of what there is, and more until `is_over`."""
        state = self._state
        store = state.store
        while self.has_work:
            store.free_some()
            if store.compaction is not None and not store.compaction_is_held:
                began = state.clock()
                if self._compaction_began is None:
                    self._compaction_began = began
                dropped = store.compact_step()
                state.metrics.compaction_pause_ms.observe((state.clock() - began) * 1000)
                if dropped is None:
                    self._compaction_finished()
                else:
                    self._compaction_dropped += dropped
            if self._job is not None and not self._awaits_task:
                self._advance(self._job)
            if is_over():
                return

    def _advance(self, job: Job) -> None:
        try:
            if (task := next(job)) is not None:
                self._awaits_task = True
                self._run_task(task, self._task_finished)
        except StopIteration:
            self._job = self._next_job()

    def _task_finished(self) -> None:
        self._awaits_task = False

    def stop(self) -> None:
        """Abandon the job: the store is about to be replaced. No task may be running."""
        self._job = None

    def restart(self, old: Store) -> None:
        """The member has another store now: free the old one in steps."""
        parts = (old.lessor, old.index, old.data)
        tables = (table for part in parts for table in vars(part).values())
        lists = old.index.heads.lists() + old.index.past.lists()
        self._job = discard([*old.leftovers, *old.buckets.values(), *tables, *lists])
        self.logged_bytes = 0
        self.checkpoint_index = -1
        self._compaction_began = None
        self._compaction_dropped = 0
        self._waiting_defragment += self.defragmenting
        self.defragmenting = []
        if self._state.store.compaction is None:
            self._answer_compactions()

    def close(self, is_applying: bool) -> None:
        """Write a last checkpoint, so that the next start is quick, and close the store. Blocks;
        no task may be running. A job under way is abandoned, which is safe at any step. While an
        entry is applied in part no checkpoint is written."""
        store = self._state.store
        if not is_applying and store.applied_index != self.checkpoint_index:
            run(self._checkpoint())
        store.close()

    def _compaction_finished(self) -> None:
        store = self._state.store
        # After a start the last compaction is repeated, and mostly finds nothing to drop.
        assert self._compaction_began is not None
        took_s = self._state.clock() - self._compaction_began
        self._compaction_began = None
        if self._compaction_dropped or self._state.awaiting_compaction:
            self._state.metrics.compaction_ms.observe(took_s * 1000)
            self._state.metrics.last_compaction_s = unix_s()
            fields = {"versions": self._compaction_dropped, "compact_revision": store.compacted}
            log.info("finished scheduled compaction", **fields)
        self.compacted_versions += self._compaction_dropped
        self._compaction_dropped = 0
        self._answer_compactions()

    def _answer_compactions(self) -> None:
        header = self._state.identity.header(self._state.store.revision)
        for waiter in self._state.awaiting_compaction:
            waiter.reply(header)
        self._state.awaiting_compaction.clear()

    # Jobs.

    def _checkpoint(self) -> Job:
        state = self._state
        store = state.store
        index, term = store.applied_index, store.applied_term
        logged_bytes = self.logged_bytes
        began = state.clock()
        before = store.storage_version
        try:
            yield from store.checkpoint()
        except checkpoint.Discarded as failure:
            self._give_up("cannot write a checkpoint; trying again", failure)
            return
        if store.storage_version != before:
            fields = {"from": before.full, "to": store.storage_version.full}
            log.info("updated storage version", **fields)
        self.logged_bytes -= logged_bytes
        state.metrics.checkpoint_s.observe(state.clock() - began)
        self.checkpoints += 1
        self.checkpoint_index = index
        self.released = (index, term)
        log.debug("checkpoint written", index=index, keys=len(store.index.heads))

    def _give_up(self, what: str, failure: OSError) -> None:
        """Log that a job lacked space or a descriptor, and have it tried again later. Until then
        the files only grow, which the alarm stops if there is no space."""
        self._shortage = failure
        self._next_job_at = self._state.clock() + RAISE_AGAIN_S
        log.error(what, error=str(failure))
        if failure.errno in NO_SPACE:
            self._state.alarms.raise_nospace(failure)

    def _clean(self, segment: int) -> Job:
        try:
            yield from cleaning.clean(self._state.store, segment)
        except DataDamaged as damage:
            # What is whole in it stays readable; the rest must not take the member down.
            log.error(f"{damage}. The segment is kept as it is")
            self._state.store.uncleanable.add(segment)
            return
        except OSError as failure:
            if failure.errno not in NO_SPACE:
                raise
            self._state.store.data.retract()
            self._give_up("cannot clean a segment; trying again", failure)
            return
        self.cleaned_segments += 1
        log.debug("segment cleaned", segment=segment)

    def _defragment(self) -> Job:
        state = self._state
        store = state.store
        self.defragmenting, self._waiting_defragment = self._waiting_defragment, []
        before, self._shortage = store.size_bytes, None
        began = state.clock()
        log.info("defragmenting", current_db_size_bytes=before)
        if store.data.offset > SEGMENT_HEADER.size:
            store.data.roll()
        yield from self._checkpoint()
        while not self._shortage and (
            segment := cleaning.segment_to_clean(store, DEFRAGMENT_SHARE)
        ):
            yield from self._clean(segment)
        answer: bytes | EtcdError = b""  # As in etcd, without even a header.
        if self._shortage is None:
            # Whoever waits for this may need the space at once.
            yield store.disk.wait_for_space
            sizes = {"previous_db_size_bytes": before, "current_db_size_bytes": store.size_bytes}
            log.info("finished defragmenting", **sizes)
            state.metrics.defragment_s.observe(state.clock() - began)
        elif self._shortage.errno in NO_SPACE:
            answer = error("NoSpace")
        else:
            answer = EtcdError(UNAVAILABLE, f"etcdlite: {self._shortage}")
        for done in self.defragmenting:
            done(answer)
        self.defragmenting = []
