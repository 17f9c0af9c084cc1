"""Raft as readable transcripts, as claims about a single voter, and under a random network.

Transcripts: `tests/raft/*.txt`, one file per scenario. A paragraph of commands, a line of dashes,
then exactly what the commands print. `REWRITE=1 pytest tests/test_raft.py` writes down what they
print now; the change is then reviewed by eye. The commands are the methods of `Transcript`.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etcdlite import raft, raft_log
from etcdlite.identity import Identity
from etcdlite.options import Options
from etcdlite.raft import (
    NOTHING_READY,
    ConfChange,
    Config,
    HardState,
    Message,
    MessageRejected,
    NotLeader,
    Raft,
    ReadState,
    Ready,
    RequestDropped,
    Snapshot,
)
from etcdlite.raft_log import ENTRY_CONF_CHANGE, ENTRY_NORMAL, Entry, RaftInvariantError, RaftLog
from etcdlite.replica.leadership import Leadership

PROGRESS_NAMES = ("probe", "replicate", "snapshot")
MESSAGE_NAMES = (  # noqa: SIM905
    "App AppResp Heartbeat HeartbeatResp Vote VoteResp PreVote PreVoteResp Snap ReadIndex"
    " ReadIndexResp TimeoutNow"
).split()
ACTIONS = {
    "add-voter": raft.ADD_VOTER,
    "add-learner": raft.ADD_LEARNER,
    "remove": raft.REMOVE,
}


class Applied(NamedTuple):
    """One step of a state machine: the entry, and the membership after it."""

    entry: Entry
    voters: frozenset[int]
    learners: frozenset[int]


class Host:
    """What surrounds one Raft: a disk, a state machine (the list of what was applied) and the
    Readys that are on their way to the disk. A crash loses all but the disk and the list."""

    def __init__(
        self,
        config: Config,
        voters: Iterable[int],
        learners: Iterable[int] = (),
        index: int = 0,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.rng = random.Random(seed)
        self.first_voters = frozenset(voters)
        self.first_learners = frozenset(learners)
        self.hard_state = HardState(1 if index else 0, 0, index)
        self.offset = index
        self.offset_term = 1 if index else 0
        self.entries: list[Entry] = []
        self.history = [
            Applied(Entry(1, i, ENTRY_NORMAL, b""), self.first_voters, self.first_learners)
            for i in range(1, index + 1)
        ]
        self.received: dict[int, list[Applied]] = {}
        self.reads: list[ReadState] = []
        self.alive = False
        self.start()

    def start(self) -> None:
        """Begin, or begin again, from what is on the disk."""
        voters, learners = self.membership()
        self.unsynced: deque[Ready] = deque()
        self.alive = True
        self.raft = Raft(
            self.config,
            self.rng,
            voters=voters,
            learners=learners,
            hard_state=self.hard_state,
            snapshot_index=self.offset,
            snapshot_term=self.offset_term,
            entries=self.entries,
            applied=len(self.history),
        )

    def membership(self) -> tuple[frozenset[int], frozenset[int]]:
        if self.history:
            return self.history[-1].voters, self.history[-1].learners
        return self.first_voters, self.first_learners

    def take_ready(self) -> Ready:
        """Take a Ready; apply at once, write later."""
        if not self.raft.has_ready:
            self.raft.has_ready = True
            assert self.raft.ready() is NOTHING_READY, "`has_ready` was not set"
        ready = self.raft.ready()
        if ready is NOTHING_READY:
            return ready
        if (
            ready.hard_state
            or ready.entries
            or ready.snapshot
            or ready.messages_after_sync
            or self.unsynced
        ):
            self.unsynced.append(ready)
        for entry in ready.committed_entries:
            self.apply(entry)
        if ready.committed_entries:
            self.raft.applied(ready.committed_entries[-1].index)
        self.reads += ready.read_states
        return ready

    def apply(self, entry: Entry) -> None:
        assert entry.index == len(self.history) + 1, "entries are applied in order, once each"
        on_disk = self.entries[entry.index - self.offset - 1 : entry.index - self.offset]
        assert on_disk == [entry], "an entry is applied only when it is durable"
        if entry.kind == ENTRY_CONF_CHANGE:
            action, node = entry.data.split()
            self.raft.apply_conf_change(ConfChange(ACTIONS[action.decode()], int(node)))
        self.history.append(
            Applied(entry, frozenset(self.raft.voters), frozenset(self.raft.learners))
        )

    def sync(self) -> list[Message]:
        """The oldest Ready becomes durable. Returns the messages that may leave now."""
        ready = self.unsynced.popleft()
        if ready.snapshot:
            self.offset, self.offset_term = ready.snapshot.index, ready.snapshot.term
            self.entries = []
            self.history = self.received.pop(ready.snapshot.index)
            self.raft.applied(ready.snapshot.index)
        if ready.hard_state:
            self.hard_state = ready.hard_state
        if ready.entries:
            first = ready.entries[0].index
            assert self.offset < first <= self.offset + len(self.entries) + 1
            self.entries[first - self.offset - 1 :] = ready.entries
        out = []
        for message in ready.messages_after_sync:
            if message.to == self.config.id:
                self.raft.step(message)
            else:
                out.append(message)
        if ready.entries:
            self.raft.persisted(ready.entries[-1].index, ready.entries[-1].term)
        return out

    def receive(self, message: Message, history: list[Applied] | None) -> None:
        if message.snapshot and history is not None:
            self.received[message.snapshot.index] = history
        self.raft.step(message)

    def compact(self, index: int) -> None:
        """Drop what is applied from memory, and the same from the disk."""
        if self.raft.log.applied < self.raft.log.offset:
            return  # A snapshot is being installed.
        self.raft.compact(index)
        drop = self.raft.log.offset - self.offset
        if drop > 0:
            self.offset_term = self.entries[drop - 1].term
            del self.entries[:drop]
            self.offset += drop

    def busy(self) -> bool:
        return self.raft.has_ready or bool(self.unsynced)


# Transcripts.


class Transcript:
    """Runs the commands of a transcript. Every public method is a command; it prints lines."""

    def __init__(self) -> None:
        self.hosts: dict[int, Host] = {}
        self.network: list[tuple[Message, list[Applied] | None]] = []
        self.lines: list[str] = []
        self.cut: set[int] = set()
        self.settings: dict[str, int] = {}
        self.index = 0

    def run(self, command: str) -> None:
        words = command.split()
        quiet = words[0] == "quiet"
        if quiet:
            words = words[1:]
        before = len(self.lines)
        name, *arguments = words
        method: Callable[..., None] = getattr(self, name.replace("-", "_"))
        try:
            method(*arguments)
        except (NotLeader, RequestDropped, RaftInvariantError, ValueError) as error:
            self.lines.append(f"{type(error).__name__}: {error}")
        if quiet:
            del self.lines[before:]

    # Commands.

    def config(self, *settings: str) -> None:
        """config NAME=NUMBER...: settings of the members started from here on."""
        for setting in settings:
            name, value = setting.split("=")
            self.settings[name.replace("-", "_")] = int(value)

    def members(self, count: str, *options: str) -> None:
        """members COUNT [learners=N,...] [index=N]: start them, all with a log compacted at N."""
        given = dict(option.split("=") for option in options)
        learners = {int(word) for word in given.get("learners", "").split(",") if word}
        self.index = int(given.get("index", "0"))
        everyone = set(range(1, int(count) + 1)) | learners
        for node in sorted(everyone):
            self._start(node, everyone - learners, learners, self.index)

    def join(self, node: str) -> None:
        """join N: start a member that knows nothing yet."""
        self._start(int(node), (), (), 0)

    def campaign(self, node: str) -> None:
        self._raft(node).campaign()

    def propose(self, node: str, data: str) -> None:
        self._raft(node).propose(data.encode())

    def conf(self, node: str, action: str, member: str) -> None:
        """conf N add-voter|add-learner|remove M"""
        self._raft(node).propose_conf_change(f"{action} {member}".encode())

    def read(self, node: str, context: str) -> None:
        self._raft(node).read_index(context.encode())

    def transfer(self, node: str, to: str) -> None:
        self._raft(node).transfer_leader(int(to))

    def forget_leader(self, node: str) -> None:
        self._raft(node).forget_leader()

    def unreachable(self, node: str, member: str) -> None:
        self._raft(node).report_unreachable(int(member))

    def snapshot_delivered(self, node: str, member: str) -> None:
        self._raft(node).report_snapshot(int(member), True)

    def snapshot_failed(self, node: str, member: str) -> None:
        self._raft(node).report_snapshot(int(member), False)

    def tick(self, node: str, count: str = "1") -> None:
        for _ in range(int(count)):
            self._raft(node).tick()

    def compact(self, node: str, index: str) -> None:
        self.hosts[int(node)].compact(int(index))

    def isolate(self, *nodes: str) -> None:
        """isolate N...: all messages from and to these members get lost."""
        self.cut |= {int(node) for node in nodes}

    def heal(self) -> None:
        self.cut.clear()

    def ready(self, node: str) -> None:
        """ready N: take a Ready, apply, send; what must be written waits for `sync`."""
        if not self._take_ready(self.hosts[int(node)]):
            self.lines += [f"> {node} ready", "  nothing"]

    def _take_ready(self, host: Host) -> bool:
        """Whether there was something to do."""
        ready = host.take_ready()
        if ready is NOTHING_READY:
            return False
        self.lines.append(f"> {host.config.id} ready")
        self.lines += ["  " + line for line in describe_ready(ready)]
        self._send(host, ready.messages)
        return True

    def sync(self, node: str) -> None:
        """sync N: the oldest Ready of N that was not durable is so now."""
        host = self.hosts[int(node)]
        if not host.unsynced:
            raise ValueError("nothing waits to be synced")
        self.lines.append(f"> {node} synced {describe_written(host.unsynced[0])}")
        self._send(host, host.sync())

    def deliver(self, *nodes: str) -> None:
        """deliver [N...]: the messages to these members (or all) arrive."""
        wanted = {int(node) for node in nodes} or set(self.hosts)
        arriving = [item for item in self.network if item[0].to in wanted]
        self.network = [item for item in self.network if item[0].to not in wanted]
        for message, history in arriving:
            lost = message.to in self.cut or message.sender in self.cut
            host = self.hosts.get(message.to)
            lost = lost or host is None or not host.alive
            self.lines.append(("lost " if lost else "") + describe(message))
            if not lost and host is not None:
                host.receive(message, history)

    def drop(self, *nodes: str) -> None:
        """drop [N...]: the messages to these members (or all) get lost."""
        wanted = {int(node) for node in nodes} or set(self.hosts)
        self.network = [item for item in self.network if item[0].to not in wanted]

    def stabilize(self, *nodes: str) -> None:
        """stabilize [N...]: these members (or all) work until nothing is left to do."""
        wanted = [host for host in self.hosts.values() if host.alive]
        if nodes:
            wanted = [self.hosts[int(node)] for node in nodes]
        busy = True
        while busy:
            busy = False
            for host in wanted:
                name = str(host.config.id)
                if any(message.to == host.config.id for message, _ in self.network):
                    busy = True
                    self.deliver(name)
                while host.raft.has_ready and self._take_ready(host):
                    busy = True
                while host.unsynced:
                    busy = True
                    self.sync(name)

    def crash(self, node: str) -> None:
        """crash N: what was not synced is gone."""
        host = self.hosts[int(node)]
        host.alive = False

    def restart(self, node: str) -> None:
        self.hosts[int(node)].start()

    def status(self, node: str) -> None:
        member = self._raft(node)
        log = member.log
        self.lines.append(
            f"{node}: {raft.ROLE_NAMES[member.role]} term={member.term} vote={member.vote}"
            f" leader={member.leader} applied={log.applied} committed={log.committed}"
            f" stable={log.stable} last={log.last}"
        )
        self.lines.append(f"   voters={sorted(member.voters)} learners={sorted(member.learners)}")
        if member.role != raft.LEADER:
            return
        for other, progress in sorted(member.progress.items()):
            if other != member.id:
                self.lines.append(
                    f"   {other}: {PROGRESS_NAMES[progress.state]} match={progress.match}"
                    f" next={progress.next}"
                    + (" paused" if progress.is_paused() else "")
                    + (" active" if progress.recent_active else "")
                    + (f" inflight={len(progress.inflight)}" if progress.inflight else "")
                    + (
                        f" snapshot={progress.pending_snapshot}"
                        if progress.pending_snapshot
                        else ""
                    )
                )

    def log(self, node: str) -> None:
        log = self._raft(node).log
        self.lines.append(f"{node}: after {log.offset_term}/{log.offset}:")
        self.lines += [f"   {describe_entry(entry)}" for entry in log.entries]

    # The rest.

    def _raft(self, node: str) -> Raft:
        return self.hosts[int(node)].raft

    def _start(self, node: int, voters: Iterable[int], learners: Iterable[int], index: int) -> None:
        config = Config(id=node, **self.settings)  # type: ignore[arg-type]
        self.hosts[node] = Host(config, voters, learners, index, seed=node)

    def _send(self, host: Host, messages: Sequence[Message]) -> None:
        for message in messages:
            history = None
            if message.snapshot:
                history = host.history[: message.snapshot.index]
            self.network.append((message, history))


def describe_entry(entry: Entry) -> str:
    kind = "conf " if entry.kind == ENTRY_CONF_CHANGE else ""
    return f'{entry.term}/{entry.index} {kind}"{entry.data.decode()}"'


def describe_entries(entries: Sequence[Entry]) -> str:
    return "[" + ", ".join(describe_entry(entry) for entry in entries) + "]"


def describe(message: Message) -> str:
    """One line: only the fields that the kind of message uses, and only if they say something."""
    kind = message.kind
    words = [f"{message.sender}->{message.to} {MESSAGE_NAMES[kind - 1]} term={message.term}"]
    if kind in (raft.APP, raft.VOTE, raft.PRE_VOTE):
        words.append(f"log={message.log_term}/{message.index}")
    elif kind in (raft.APP_RESP, raft.READ_INDEX_RESP):
        words.append(f"index={message.index}")
    if kind in (raft.APP, raft.HEARTBEAT, raft.HEARTBEAT_RESP):
        words.append(f"commit={message.commit}")
    if message.entries:
        words.append(describe_entries(message.entries))
    if message.reject:
        words.append("reject")
        if kind in (raft.VOTE_RESP, raft.PRE_VOTE_RESP):
            words.append(f"commit={message.log_term}/{message.commit}")
        if kind == raft.APP_RESP:
            words.append(f"hint={message.log_term}/{message.hint}")
    if message.snapshot:
        words.append(describe_snapshot(message.snapshot))
    if message.context:
        context = message.context
        if kind in (raft.HEARTBEAT, raft.HEARTBEAT_RESP):
            words.append(f"round={int.from_bytes(context, 'little')}")
        else:
            words.append(context.decode())
    return " ".join(words)


def describe_snapshot(snapshot: Snapshot) -> str:
    return (
        f"snapshot={snapshot.term}/{snapshot.index} voters={list(snapshot.voters)}"
        f" learners={list(snapshot.learners)}"
    )


def describe_written(ready: Ready) -> str:
    parts = []
    if ready.snapshot:
        parts.append(describe_snapshot(ready.snapshot))
    if ready.hard_state:
        parts.append("hard state")
    if ready.entries:
        parts.append(f"entries {ready.entries[0].index} to {ready.entries[-1].index}")
    return ", ".join(parts) or "nothing"


def describe_ready(ready: Ready) -> list[str]:
    if ready is NOTHING_READY:
        return ["nothing"]
    lines = []
    if ready.soft_state:
        role = raft.ROLE_NAMES[ready.soft_state.role]
        lines.append(f"soft state: {role} leader={ready.soft_state.leader}")
    if ready.snapshot:
        lines.append(describe_snapshot(ready.snapshot))
    if ready.hard_state:
        term, vote, commit = ready.hard_state
        lines.append(f"hard state: term={term} vote={vote} commit={commit}")
    if ready.entries:
        lines.append(f"write: {describe_entries(ready.entries)}")
    if ready.committed_entries:
        lines.append(f"apply: {describe_entries(ready.committed_entries)}")
    lines += [f"read: {context.decode()} at {index}" for index, context in ready.read_states]
    lines += [f"send: {describe(message)}" for message in ready.messages]
    lines += [f"after sync: {describe(message)}" for message in ready.messages_after_sync]
    return lines


TRANSCRIPTS = sorted((Path(__file__).parent / "raft").glob("*.txt"))


def play(text: str) -> str:
    """The transcript again, with what its commands print now."""
    transcript = Transcript()
    out: list[str] = []
    in_output = False
    pending = False
    for line in [*text.splitlines(), ""]:
        if in_output:
            in_output = bool(line)
            if not in_output:
                out.append("")
        elif line == "----" or (not line and pending):
            out += ["----", *(transcript.lines or ["ok"])]
            transcript.lines = []
            pending = False
            in_output = line == "----"
            if not line:
                out.append("")
        else:
            out.append(line)
            if line and not line.startswith("#"):
                pending = True
                transcript.run(line)
    return "\n".join(out).rstrip("\n") + "\n"


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_the_transcript_still_reads_the_same(path: Path) -> None:
    text = path.read_text()
    now = play(text)
    if os.environ.get("REWRITE"):
        path.write_text(now)
    assert now == text or os.environ.get("REWRITE"), f"{path.name} differs; see REWRITE=1"


# Claims about a single voter, the log and its limits.


def lone(**settings: int) -> Host:
    """A member that is alone, with its first entry applied."""
    host = Host(Config(id=1, **settings), {1})  # type: ignore[arg-type]
    settle(host)
    return host


def settle(host: Host) -> None:
    while host.busy():
        host.take_ready()
        while host.unsynced:
            host.sync()


def entries_of(host: Host) -> list[bytes]:
    return [applied.entry.data for applied in host.history]


def test_a_learner_is_ready_at_every_moment_while_it_answers() -> None:
    """Also just after a check of the quorum, which no answer can have followed yet."""
    host = Host(Config(id=1), {1}, {2})
    settle(host)
    leader = host.raft
    assert leader.role == raft.LEADER and not leader.learner_is_ready(2)
    found = Message(raft.APP_RESP, 1, 2, leader.term, leader.log.last)
    leader.step(found)
    for _ in range(5 * leader.config.election_ticks):
        leader.tick()
        assert leader.learner_is_ready(2)
        settle(host)
        leader.step(Message(raft.HEARTBEAT_RESP, 1, 2, leader.term))
    for _ in range(2 * leader.config.election_ticks):
        leader.tick()
        settle(host)
    assert not leader.learner_is_ready(2), "it is silent"


def test_leadership_is_handed_to_a_voter_that_answers_still() -> None:
    """One that died is active for up to two checks of the quorum."""
    host = Host(Config(id=1, pre_vote=False), {1, 2, 3})
    leader = host.raft
    identity = Identity(1, 1, 1, leader)
    leadership = Leadership(
        leader, identity, lambda: 10.0, lambda node: True, lambda node: (0.0, 0.0), Options()
    )
    leader.campaign()
    settle(host)
    leader.step(Message(raft.VOTE_RESP, 1, 2, leader.term))
    assert leader.role == raft.LEADER

    def answer(node: int) -> None:
        leader.step(Message(raft.APP_RESP, 1, node, leader.term, leader.log.last))

    settle(host)
    answer(2)
    answer(3)
    for _ in range(leader.config.election_ticks):
        leader.tick()
    assert not leader.progress[2].recent_active and leader.progress[3].is_active
    answer(2)
    settle(host)
    assert leadership.hand_over()
    told = [one.to for one in leader.ready().messages if one.kind == raft.TIMEOUT_NOW]
    assert told == [2]


def test_a_single_voter_applies_what_was_proposed_in_order() -> None:
    host = lone()
    assert [host.raft.propose(data) for data in (b"a", b"b", b"c")] == [2, 3, 4]
    settle(host)
    assert entries_of(host) == [b"", b"a", b"b", b"c"]


def test_nothing_is_applied_before_it_is_durable() -> None:
    host = lone()
    index = host.raft.propose(b"a")
    ready = host.raft.ready()
    assert [entry.data for entry in ready.entries] == [b"a"]
    assert not ready.committed_entries
    assert host.raft.ready() is NOTHING_READY
    host.raft.persisted(index, host.raft.term)
    assert [entry.data for entry in host.raft.ready().committed_entries] == [b"a"]


def test_ready_is_the_same_empty_object_when_idle() -> None:
    host = lone()
    for _ in range(100):
        host.raft.tick()
        assert not host.raft.has_ready
        assert host.raft.ready() is NOTHING_READY


def test_a_follower_takes_no_proposals_and_names_the_leader() -> None:
    follower = Raft(Config(id=2), random.Random(0), voters={1, 2, 3})
    with pytest.raises(NotLeader) as caught:
        follower.propose(b"a")
    assert caught.value.leader == 0
    follower.step(Message(raft.HEARTBEAT, 2, 1, 5))
    with pytest.raises(NotLeader) as caught:
        follower.propose(b"a")
    assert caught.value.leader == 1


def test_uncommitted_entries_are_bounded_and_one_large_entry_is_taken() -> None:
    host = lone(max_uncommitted_bytes=1000)
    host.raft.propose(bytes(5000))
    with pytest.raises(RequestDropped):
        host.raft.propose(b"a")
    settle(host)
    host.raft.propose(b"a")


def test_a_batch_to_apply_is_bounded() -> None:
    host = lone(max_apply_bytes=3 * raft_log.ENTRY_OVERHEAD_BYTES)
    for _ in range(8):
        host.raft.propose(b"")
    host.take_ready()
    host.sync()
    batches = []
    while host.raft.has_ready:
        batches.append(len(host.take_ready().committed_entries))
    assert batches == [3, 3, 2]


def test_memory_is_bounded_by_compaction() -> None:
    batch_bytes = 10 * (100 + raft_log.ENTRY_OVERHEAD_BYTES)
    host = lone(log_tail_bytes=raft.DROPS_PER_TAIL * batch_bytes)
    for _ in range(1000):
        host.raft.propose(bytes(100))
        settle(host)
        host.raft.compact(host.raft.log.applied)
        assert len(host.raft.log.entries) <= 10
        assert host.raft.log.size_bytes < batch_bytes


def test_compaction_keeps_a_tail_for_followers() -> None:
    weight = 100 + raft_log.ENTRY_OVERHEAD_BYTES
    config = Config(id=1, log_tail_bytes=10 * weight)
    host = Host(config, {1}, {2})
    settle(host)
    for _ in range(100):
        host.raft.propose(bytes(100))
    settle(host)
    host.raft.compact(host.raft.log.applied)
    assert len(host.raft.log.entries) == 10
    assert host.raft.log.size_bytes == 10 * weight


def test_recovery_refuses_a_log_with_a_hole() -> None:
    for entries in (
        [Entry(1, 2, ENTRY_NORMAL, b"")],
        [Entry(1, 1, ENTRY_NORMAL, b""), Entry(1, 3, ENTRY_NORMAL, b"")],
        [Entry(2, 1, ENTRY_NORMAL, b""), Entry(1, 2, ENTRY_NORMAL, b"")],
    ):
        with pytest.raises(RaftInvariantError):
            Raft(Config(id=1), random.Random(0), voters={1}, entries=entries)


def test_recovery_refuses_marks_beyond_the_log() -> None:
    entries = [Entry(1, 1, ENTRY_NORMAL, b"")]
    for hard_state, applied in ((HardState(1, 1, 2), 0), (HardState(1, 1, 1), 2)):
        with pytest.raises(RaftInvariantError):
            Raft(
                Config(id=1),
                random.Random(0),
                voters={1},
                hard_state=hard_state,
                entries=entries,
                applied=applied,
            )


def test_entries_that_outlived_their_hard_state_raise_the_term() -> None:
    """A crash can leave the entries of a term without the hard state that went with them."""
    member = Raft(
        Config(id=1),
        random.Random(0),
        voters={1, 2},
        hard_state=HardState(1, 2, 0),
        entries=[Entry(3, 1, ENTRY_NORMAL, b"")],
    )
    assert (member.term, member.vote) == (3, 0)
    assert member.ready().hard_state == HardState(3, 0, 0)


def test_what_the_disk_never_got_cannot_become_durable() -> None:
    host = lone()
    with pytest.raises(RaftInvariantError):
        host.raft.persisted(99, 1)


def test_a_second_leader_in_a_term_is_rejected() -> None:
    host = lone()
    with pytest.raises(MessageRejected, match="two leaders"):
        host.raft.step(Message(raft.APP, 1, 2, host.raft.term))
    follower = Raft(Config(id=1), random.Random(0), voters={1, 2, 3})
    follower.step(Message(raft.HEARTBEAT, 1, 2, 1))
    with pytest.raises(MessageRejected, match="two leaders"):
        follower.step(Message(raft.HEARTBEAT, 1, 3, 1))


NO_VOTERS = Snapshot(9, 1, (), ())
LATER_TERM = Snapshot(9, 9, (1, 2), ())


@pytest.mark.parametrize(
    "message",
    [
        Message(raft.HEARTBEAT, 1, 2, 3, commit=6),  # The log ends with entry 5.
        Message(raft.HEARTBEAT, 1, 2, 4, commit=6),
        Message(raft.HEARTBEAT, 1, 2, 1 << 33),
        Message(raft.VOTE, 1, 3, 2**64 - 1, context=raft.CAMPAIGN_TRANSFER),
        Message(raft.APP, 1, 3, 3, 5, 2),
        Message(raft.SNAP, 1, 3, 3, snapshot=Snapshot(9, 3, (1, 2), ())),
        Message(raft.READ_INDEX_RESP, 1, 3, 3, 2**64 - 1),
        Message(raft.TIMEOUT_NOW, 1, 3, 3),
        Message(raft.APP, 1, 2, 3, 5, 2, entries=[Entry(1, 6, ENTRY_NORMAL, b"")]),
        Message(raft.APP, 1, 2, 3, 5, 2, entries=[Entry(4, 6, ENTRY_NORMAL, b"")]),
        Message(raft.APP, 1, 2, 3, 5, 2, entries=[Entry(3, 7, ENTRY_NORMAL, b"")]),
        Message(raft.APP, 1, 2, 3, 5, 2, entries=[Entry(3, 6, 2, b"")]),
        Message(raft.APP, 1, 2, 4, 9, 5),
        Message(raft.SNAP, 1, 2, 3),
        Message(raft.SNAP, 1, 2, 3, snapshot=NO_VOTERS),
        Message(raft.SNAP, 1, 2, 3, snapshot=LATER_TERM),
    ],
    ids=repr,
)
def test_a_follower_rejects_what_no_correct_member_sends(message: Message) -> None:
    """Follower 1 of leader 2 in term 3, with entries 1 to 5 of term 2."""
    follower = Raft(
        Config(id=1),
        random.Random(0),
        voters={1, 2, 3},
        hard_state=HardState(3, 2, 2),
        entries=some_entries(2, 1, 5),
    )
    follower.step(Message(raft.HEARTBEAT, 1, 2, 3))
    follower.ready()
    with pytest.raises(MessageRejected):
        follower.step(message)
    assert follower.ready() is NOTHING_READY
    assert follower.hard_state == HardState(3, 2, 2)
    assert (follower.log.last, follower.voters) == (5, {1, 2, 3})


def test_a_leader_rejects_the_acknowledgement_of_entries_that_do_not_exist() -> None:
    host = lone()
    leader = host.raft
    before = (leader.hard_state, leader.log.last)
    with pytest.raises(MessageRejected, match="the leader only"):
        leader.step(Message(raft.APP_RESP, 1, 2, leader.term, leader.log.last + 1))
    assert (leader.hard_state, leader.log.last) == before
    assert leader.role == raft.LEADER


SMALL = st.integers(0, 9)
NUMBER = SMALL | st.integers(0, 2**64 - 1)
MESSAGES = st.builds(
    Message,
    kind=st.integers(0, 13),
    to=st.just(1),
    sender=st.integers(2, 4),
    term=NUMBER,
    index=NUMBER,
    log_term=NUMBER,
    commit=NUMBER,
    entries=st.lists(st.builds(Entry, SMALL, SMALL, st.integers(0, 3), st.just(b"")), max_size=3),
    reject=st.booleans(),
    hint=NUMBER,
    snapshot=st.none() | st.just(NO_VOTERS),
    context=st.binary(max_size=8) | st.just(raft.CAMPAIGN_TRANSFER),
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.sampled_from([0, 25]), st.booleans(), st.lists(MESSAGES, min_size=1, max_size=4))
def test_no_message_breaks_an_invariant(ticks: int, elected: bool, messages: list[Message]) -> None:
    """A message of a peer is carried out, ignored, or rejected before anything changes."""
    host = Host(Config(id=1, pre_vote=False), {1, 2, 3})
    host.raft.step(Message(raft.APP, 1, 2, 3, entries=some_entries(2, 1, 5), commit=2))
    settle(host)
    for _ in range(ticks):
        host.raft.tick()
    settle(host)
    if ticks and elected:
        host.raft.step(Message(raft.VOTE_RESP, 1, 2, host.raft.term))
        assert host.raft.role == raft.LEADER
        settle(host)
    for message in messages:
        try:
            host.raft.step(message)
        except MessageRejected:
            assert host.raft.ready() is NOTHING_READY
        settle(host)


def hostile_message(rng: random.Random, member: Raft) -> Message:
    """A message whose numbers are near those that the member has, or far from all of them."""
    log = member.log

    def number() -> int:
        near = rng.choice(
            (0, 1, log.offset, log.applied, log.committed, log.stable, log.last, member.term)
        )
        far = rng.choice((1 << 20, 1 << 32, (1 << 63) - 1, (1 << 64) - 1))
        return far if rng.random() < 0.1 else max(0, near + rng.choice((-1, 0, 0, 1, 2)))

    def term() -> int:
        if rng.random() < 0.8:
            return max(0, member.term + rng.choice((-1, 0, 0, 0, 0, 1)))
        return number()

    def nodes() -> tuple[int, ...]:
        return tuple(rng.sample(range(1, 6), rng.randrange(4)))

    index, log_term = number(), number()
    if rng.random() < 0.7:
        log_term = max(0, log.term(index))
    entries: list[Entry] = []
    for place in range(rng.choice((0, 0, 1, 2, 5))):
        last_term = entries[-1].term if entries else log_term
        wrong = rng.random() < 0.1
        entries.append(
            Entry(
                number() if wrong else rng.choice((last_term, last_term, member.term)),
                number() if wrong else index + 1 + place,
                rng.choice((0, 0, 0, 1, 2)),
                b"x",
            )
        )
    snapshot = Snapshot(number(), number(), nodes(), nodes()) if rng.random() < 0.9 else None
    return Message(
        rng.randrange(14), 1, rng.choice((1, 2, 2, 2, 3, 4, 9, 2**64 - 1)), term(), index, log_term,
        number(), entries, rng.random() < 0.3, number(), snapshot,
        rng.choice((b"", bytes(8), raft.CAMPAIGN_TRANSFER, b"\1" + bytes(7), b"odd")),
    )  # fmt: skip


class Believer:
    """What surrounds a Raft that may be lied to: it has whatever it is told to have."""

    def __init__(self, member: Raft) -> None:
        self.raft = member
        self.unsynced: deque[Ready] = deque()

    def settle(self) -> None:
        member = self.raft
        while member.has_ready or self.unsynced:
            ready = member.ready()
            self.unsynced.append(ready)
            for entry in ready.committed_entries:
                if entry.kind == ENTRY_CONF_CHANGE:
                    action = ACTIONS[list(ACTIONS)[entry.index % 3]]
                    member.apply_conf_change(ConfChange(action, 1 + entry.index % 5))
            if ready.committed_entries:
                member.applied(ready.committed_entries[-1].index)
            while self.unsynced:
                self.sync()

    def sync(self) -> None:
        ready = self.unsynced.popleft()
        if ready.snapshot:
            self.raft.applied(ready.snapshot.index)
        for message in ready.messages_after_sync:
            if message.to == 1:
                self.raft.step(message)
        if ready.entries:
            self.raft.persisted(ready.entries[-1].index, ready.entries[-1].term)


@pytest.mark.parametrize(
    "seed", [*range(40), *(pytest.param(n, marks=pytest.mark.long) for n in range(40, 1500))]
)
def test_no_messages_of_any_member_break_an_invariant(seed: int) -> None:
    """A member in any role and of any age hears from members, and from others, what none should
    say. It may believe a lie that it cannot tell from the truth, but it never breaks."""
    rng = random.Random(seed)
    index = rng.choice((0, 0, 7))
    member = Raft(
        Config(id=1, pre_vote=rng.random() < 0.7, election_ticks=10, log_tail_bytes=500),
        rng,
        voters=rng.choice(({1}, {1, 2}, {1, 2, 3}, {1, 2, 3, 4, 5}, {2, 3})),
        learners=rng.choice(((), (), (6,))),
        snapshot_index=index,
        snapshot_term=index and 1,
        hard_state=HardState(index and 1, 0, index),
        applied=index,
    )
    owner = Believer(member)
    rejected = 0
    for _ in range(400):
        match rng.randrange(9):
            case 0:
                for _ in range(rng.randrange(25)):
                    member.tick()
            case 1 if member.role == raft.LEADER:
                with contextlib.suppress(RequestDropped):
                    rng.choice((member.propose, member.propose_conf_change))(b"p")
            case 2 if member.role == raft.LEADER:
                member.compact(member.log.applied)
                member.report_unreachable(rng.choice((1, 2, 9)))
                member.report_snapshot(rng.choice((1, 2, 9)), rng.random() < 0.5)
            case 3:
                with contextlib.suppress(NotLeader, RequestDropped):
                    member.read_index(b"r")
            case 4 | 5 if member.role in (raft.PRE_CANDIDATE, raft.CANDIDATE):
                for node in (2, 3, 4):
                    kind = raft.VOTE_RESP if member.role == raft.CANDIDATE else raft.PRE_VOTE_RESP
                    term = member.term + (kind == raft.PRE_VOTE_RESP)
                    member.step(Message(kind, 1, node, term))
            case _:
                before = member.hard_state
                try:
                    member.step(hostile_message(rng, member))
                except MessageRejected:
                    rejected += 1
                    assert member.hard_state == before
        if rng.random() < 0.7:
            owner.settle()
    assert rejected > 10


def some_entries(term: int, first: int, last: int) -> list[Entry]:
    return [Entry(term, index, ENTRY_NORMAL, b"") for index in range(first, last + 1)]


def test_an_old_append_takes_nothing_away() -> None:
    log = RaftLog(0, 0, ())
    assert log.maybe_append(0, 0, some_entries(1, 1, 5), 0) == 5
    assert log.maybe_append(0, 0, some_entries(1, 1, 2), 0) == 2
    assert log.last == 5


def test_a_committed_entry_is_never_overwritten() -> None:
    log = RaftLog(0, 0, ())
    log.maybe_append(0, 0, some_entries(1, 1, 5), 3)
    with pytest.raises(RaftInvariantError):
        log.maybe_append(2, 1, some_entries(2, 3, 3), 3)


class Looked(list[Entry]):
    """Counts the entries that are looked at."""

    looks = 0

    def __getitem__(self, at: Any) -> Any:
        self.looks += 1
        return super().__getitem__(at)


@given(st.lists(st.integers(1, 5), max_size=30), st.integers(0, 40), st.integers(0, 6))
def test_the_last_index_with_a_term_is_found(terms: list[int], index: int, term: int) -> None:
    entries = [Entry(term, 8 + n, ENTRY_NORMAL, b"") for n, term in enumerate(sorted(terms))]
    log = RaftLog(7, 1, entries)
    expected = min(index, log.last)
    while expected > 7 and log.term(expected) > term:
        expected -= 1
    assert log.last_index_not_above(index, term) == expected


def test_a_search_for_a_term_does_not_look_at_the_whole_log() -> None:
    """Each refusal of an append causes one, here and at the leader."""
    log = RaftLog(0, 0, some_entries(2, 1, 5000))
    log.entries = Looked(log.entries)
    assert log.last_index_not_above(5000, 1) == 0
    assert log.entries.looks < 20


def test_the_first_write_of_an_entry_says_nothing_about_its_third() -> None:
    """Entry 2 of term 1 is written, overwritten, and written again: A, B, A. etcd's raft calls this
    the append ABA race."""
    log = RaftLog(0, 0, ())
    log.maybe_append(0, 0, some_entries(1, 1, 2), 0)
    log.offer()
    log.maybe_append(1, 1, some_entries(2, 2, 2), 0)
    log.offer()
    log.maybe_append(1, 1, some_entries(1, 2, 2), 0)
    log.offer()
    log.stable_to(2, 1)
    assert log.stable == 1, "only what was not overwritten since"
    log.stable_to(2, 2)
    assert log.stable == 1
    log.stable_to(2, 1)
    assert log.stable == 2


# A random network, random disks and random crashes.


class Simulation:
    """Members on a network that loses, repeats and reorders messages; disks that lag; crashes that
    take what was not synced and set the state machine back; members that come and go. After every
    step the safety properties of the Raft paper (figure 3) and of reads are checked."""

    MAX_MEMBERS = 7
    MAX_MESSAGES = 300

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.config = {
            "pre_vote": self.random.random() < 0.8,
            "max_append_bytes": self.random.choice([300, 2000, raft.MAX_APPEND_BYTES]),
            "max_inflight_messages": self.random.choice([1, 3, 100]),
            "max_apply_bytes": self.random.choice([300, raft.MAX_APPLY_BYTES]),
            "log_tail_bytes": self.random.choice([0, 1000, raft.LOG_TAIL_BYTES]),
        }
        self.hosts: dict[int, Host] = {}
        self.network: list[tuple[Message, list[Applied] | None]] = []
        self.cut_off: set[int] = set()
        self.lives: dict[int, int] = {}
        self.leaders: dict[int, tuple[int, int]] = {}
        self.created: dict[tuple[int, int], Entry] = {}
        self.applied: list[Applied] = []
        self.reads: dict[bytes, int] = {}
        self.answered_reads = 0
        self.committed = 0
        self.proposals = 0
        first = set(range(1, self.random.choice([1, 2, 3, 3, 5]) + 1))
        for node in first:
            self.add(node, first)
        self.actions: list[tuple[Callable[[], None], float]] = [
            (self.deliver, 60),
            (self.take_ready, 40),
            (self.sync, 30),
            (self.tick, 5),
            (self.propose, 5),
            (self.read, 3),
            (self.lose, 1),
            (self.repeat, 1),
            (self.compact, 1),
            (self.restart, 1),
            (self.crash, 0.2),
            (self.cut, 0.1),
            (self.heal, 0.4),
            (self.transfer, 0.1),
            (self.forget_leader, 0.2),
            (self.change_members, 0.2),
        ]
        # No two seeds have the same weather.
        self.actions = [
            (action, weight * self.random.choice([0.3, 1, 1, 3])) for action, weight in self.actions
        ]

    def run(self, steps: int) -> None:
        actions, weights = zip(*self.actions, strict=True)
        for action in self.random.choices(actions, weights, k=steps):
            action()
            self.check()

    def add(self, node: int, voters: Iterable[int]) -> None:
        config = Config(id=node, **self.config)  # type: ignore[arg-type]
        self.lives[node] = 1
        self.hosts[node] = Host(config, voters, seed=self.random.randrange(1 << 30))

    def any_host(self) -> Host | None:
        alive = [host for host in self.hosts.values() if host.alive]
        return self.random.choice(alive) if alive else None

    def a_leader(self) -> Host | None:
        leaders = [
            host for host in self.hosts.values() if host.alive and host.raft.role == raft.LEADER
        ]
        return self.random.choice(leaders) if leaders else None

    # What can happen.

    def send(self, host: Host, messages: Iterable[Message]) -> None:
        for message in messages:
            history = None
            if message.snapshot:
                history = host.history[: message.snapshot.index]
            self.exists(message.entries)
            self.network.append((message, history))
        while len(self.network) > self.MAX_MESSAGES:
            self.lose()

    def pick(self) -> int:
        # Mostly the oldest: with a random order alone little would ever get done.
        if self.random.random() < 0.7:
            return 0
        return self.random.randrange(len(self.network))

    def deliver(self) -> None:
        if self.network:
            message, history = self.network.pop(self.pick())
            self.hand_over(message, history)

    def hand_over(self, message: Message, history: list[Applied] | None) -> None:
        host = self.hosts[message.to]
        if not host.alive or message.to in self.cut_off or message.sender in self.cut_off:
            self.lost(message)
            return
        host.receive(message, history)
        if message.kind == raft.SNAP:
            self.hosts[message.sender].raft.report_snapshot(message.to, True)

    def lose(self) -> None:
        if self.network:
            self.lost(self.network.pop(self.pick())[0])

    def lost(self, message: Message) -> None:
        sender = self.hosts[message.sender]
        if sender.alive and message.kind == raft.SNAP:
            sender.raft.report_snapshot(message.to, False)
        elif sender.alive and self.random.random() < 0.2:
            sender.raft.report_unreachable(message.to)

    def repeat(self) -> None:
        if self.network:
            self.hand_over(*self.random.choice(self.network))

    def take_ready(self) -> None:
        host = self.any_host()
        if host:
            self.send(host, host.take_ready().messages)

    def sync(self) -> None:
        host = self.any_host()
        if host and host.unsynced:
            self.exists(host.unsynced[0].entries)
            self.send(host, host.sync())

    def exists(self, entries: Iterable[Entry]) -> None:
        """These entries are on a disk or in a message."""
        for entry in entries:
            other = self.created.setdefault((entry.term, entry.index), entry)
            assert other == entry, "two entries with the same term and index"

    def tick(self) -> None:
        host = self.any_host()
        if host:
            for _ in range(self.random.choice([1, 1, 1, 5])):
                host.raft.tick()

    def propose(self) -> None:
        host = self.a_leader()
        if host:
            self.proposals += 1
            try:
                host.raft.propose(b"%d" % self.proposals)
            except RequestDropped:
                pass

    def read(self) -> None:
        host = self.any_host()
        if host:
            context = b"%d" % len(self.reads)
            self.reads[context] = self.committed
            try:
                host.raft.read_index(context)
            except NotLeader:
                pass

    def crash(self) -> None:
        host = self.any_host()
        if host:
            host.alive = False
            kept = self.random.randrange(host.offset, len(host.history) + 1)
            del host.history[kept:]

    def restart(self) -> None:
        dead = [node for node, host in self.hosts.items() if not host.alive]
        if dead:
            node = self.random.choice(dead)
            self.lives[node] += 1
            self.hosts[node].start()

    def compact(self) -> None:
        host = self.any_host()
        if host:
            host.compact(host.raft.log.applied)

    def cut(self) -> None:
        self.cut_off = {node for node in self.hosts if self.random.random() < 0.4}

    def heal(self) -> None:
        self.cut_off.clear()

    def transfer(self) -> None:
        host = self.a_leader()
        others = host.raft.voters - {host.raft.id} if host else set()
        if host and others:
            host.raft.transfer_leader(self.random.choice(sorted(others)))

    def forget_leader(self) -> None:
        host = self.any_host()
        if host:
            host.raft.forget_leader()
            if self.random.random() < 0.5:
                host.raft.campaign()

    def change_members(self) -> None:
        host = self.a_leader()
        if not host:
            return
        members = sorted(host.raft.voters | host.raft.learners)
        action = self.random.choice(["add-voter", "add-learner", "remove"])
        if action == "remove":
            node = self.random.choice(members)
        elif host.raft.learners and self.random.random() < 0.7:
            node = self.random.choice(sorted(host.raft.learners))
        else:
            # An id is never used again, as members are told to.
            node = len(self.hosts) + 1
        try:
            host.raft.propose_conf_change(f"{action} {node}".encode())
        except RequestDropped:
            return
        if node not in self.hosts:
            self.add(node, ())
        if len(self.hosts) >= self.MAX_MEMBERS:
            self.actions = [item for item in self.actions if item[0] != self.change_members]

    # What must hold.

    def check(self) -> None:
        for node, host in self.hosts.items():
            if not host.alive:
                continue
            member = host.raft
            log = member.log
            self.committed = max(self.committed, log.committed)
            assert log.applied <= log.applying <= log.committed <= log.last
            assert log.offset <= log.applying
            assert log.stable <= log.offered <= log.last
            assert log.last - log.offset == len(log.entries)
            assert log.size_bytes == log.size_between(log.offset, log.last)
            durable = host.hard_state.term == member.term and host.hard_state.vote == node
            assert durable or len(member.progress) == 1 or member.role != raft.LEADER
            # A term that is not durable yet may be used again by a member that is alone.
            if member.role == raft.LEADER and durable:
                leader = self.leaders.setdefault(member.term, (node, self.lives[node]))
                assert leader == (node, self.lives[node]), "two leaders in one term"
            for index in range(len(self.applied), len(host.history)):
                self.applied.append(host.history[index])
            # The whole history is compared at the end; here its latest part.
            recent = slice(max(0, len(host.history) - 5), len(host.history))
            assert host.history[recent] == self.applied[recent], "different histories"
            for index, context in host.reads:
                assert index >= self.reads[context], "a read that misses a committed write"
                self.answered_reads += 1
            host.reads.clear()

    def finish(self) -> None:
        """Heal everything: a leader is found and all its members come to the same history."""
        self.cut_off.clear()
        for node, host in self.hosts.items():
            if not host.alive:
                self.lives[node] += 1
                host.start()
        for _ in range(3000):
            for host in self.hosts.values():
                if self.random.random() < 0.9:
                    host.raft.tick()
                while host.raft.has_ready:
                    self.send(host, host.take_ready().messages)
                while host.unsynced:
                    self.send(host, host.sync())
            arriving, self.network = self.network, []
            for message, history in arriving:
                self.hand_over(message, history)
            self.check()
            if self.is_settled():
                break
        else:
            raise AssertionError("no leader that brings all its members to the same state")
        for host in self.hosts.values():
            assert host.history == self.applied[: len(host.history)]

    def is_settled(self) -> bool:
        for host in self.hosts.values():
            member = host.raft
            if member.role == raft.LEADER and member.log.applied == member.log.last:
                others = member.voters | member.learners
                if all(
                    self.hosts[node].raft.log.applied == member.log.last
                    and self.hosts[node].raft.leader == member.id
                    for node in others
                ):
                    return True
        return False


@pytest.mark.parametrize("seed", range(40))
def test_no_fault_breaks_safety_and_the_members_agree_in_the_end(seed: int) -> None:
    simulation = Simulation(seed)
    simulation.run(8000)
    simulation.finish()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_no_fault_breaks_safety_in_a_long_run(seed: int) -> None:
    simulation = Simulation(seed)
    simulation.run(20_000)
    simulation.finish()


def test_the_simulation_does_exercise_what_it_checks() -> None:
    runs = [Simulation(seed) for seed in range(12)]
    for simulation in runs:
        simulation.run(10_000)
    assert sum(len(simulation.leaders) for simulation in runs) > 30
    assert sum(len(simulation.applied) for simulation in runs) > 1000
    assert sum(simulation.answered_reads for simulation in runs) > 300
    assert any(len(simulation.hosts) >= Simulation.MAX_MEMBERS for simulation in runs)


def test_the_log_is_kept_until_the_receiver_of_a_snapshot_has_caught_up() -> None:
    config = Config(id=1, log_tail_bytes=2000)
    leader = Raft(config, random.Random(1), voters=[1, 2, 3])
    has = {2: 0, 3: 0}
    snapshots: list[int] = []

    def pump(*nodes: int) -> None:
        while leader.has_ready:
            ready = leader.ready()
            if ready.entries:
                leader.persisted(ready.entries[-1].index, ready.entries[-1].term)
            for entry in ready.committed_entries:
                leader.applied(entry.index)
                leader.compact(entry.index)
            for message in [*ready.messages, *ready.messages_after_sync]:
                answer(message, nodes)

    def answer(message: Message, nodes: tuple[int, ...]) -> None:
        to = message.to
        if to == 1:
            leader.step(message)
        elif message.kind in (raft.PRE_VOTE, raft.VOTE):
            kind = raft.PRE_VOTE_RESP if message.kind == raft.PRE_VOTE else raft.VOTE_RESP
            leader.step(Message(kind, 1, to, message.term))
        elif message.kind == raft.SNAP:
            assert message.snapshot is not None
            snapshots.append(message.snapshot.index)
        elif message.kind == raft.APP and to in nodes:
            refused = message.index > has[to]
            if not refused:
                has[to] = message.index + len(message.entries)
            leader.step(
                Message(
                    raft.APP_RESP,
                    1,
                    to,
                    leader.term,
                    message.index if refused else has[to],
                    log_term=leader.term if has[to] else 0,
                    reject=refused,
                    hint=has[to],
                )
            )

    def write(count: int, *nodes: int) -> None:
        for _ in range(count):
            leader.propose(bytes(100))
            pump(*nodes)

    leader.campaign()
    pump(2, 3)
    write(30, 2)
    leader.progress[3].become_probe()
    leader.step(Message(raft.HEARTBEAT_RESP, 1, 3, leader.term))
    pump(2)
    (first,) = snapshots
    write(10, 2)
    assert leader.log.offset <= first
    # It has the snapshot, and takes what came meanwhile while more is written.
    has[3] = first
    leader.report_snapshot(3, True)
    leader.step(Message(raft.APP_RESP, 1, 3, leader.term, first))
    write(20, 2, 3)
    assert snapshots == [first] and has[3] == leader.log.last
    write(20, 2, 3)
    assert leader.log.size_bytes < 3000, "nobody needs more than the tail"
    # One that does not come on is not waited for for ever.
    leader.progress[3].become_snapshot(leader.log.applied)
    write(60, 2)
    assert leader.log.size_bytes < 9000


def test_a_candidate_that_learns_of_its_removal_does_not_lead() -> None:
    entries = [Entry(1, 1, ENTRY_NORMAL, b""), Entry(1, 2, raft_log.ENTRY_CONF_CHANGE, b"")]
    voters = [1, 2, 3, 4, 5]
    state = raft.HardState(1, 1, 1)
    member = Raft(
        Config(id=1),
        random.Random(1),
        voters=voters,
        hard_state=state,
        entries=entries,
        applied=1,
    )

    def take() -> None:
        while member.has_ready:
            ready = member.ready()
            for message in ready.messages_after_sync:
                if message.to == 1:
                    member.step(message)
            for entry in ready.committed_entries:
                if entry.kind == raft_log.ENTRY_CONF_CHANGE:
                    member.apply_conf_change(raft.ConfChange(raft.REMOVE, 1))
                member.applied(entry.index)

    member.campaign()
    take()
    for node in (2, 4):
        member.step(Message(raft.PRE_VOTE_RESP, 1, node, 2))
    take()
    assert member.role == raft.CANDIDATE
    member.step(Message(raft.VOTE_RESP, 1, 3, 2, commit=2, log_term=1, reject=True))
    take()
    for node in (2, 4, 5):
        member.step(Message(raft.VOTE_RESP, 1, node, 2))
    assert member.role == raft.FOLLOWER and member.voters == {2, 3, 4, 5}
