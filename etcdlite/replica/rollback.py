"""An old copy of a data directory: a member that comes back with less than it had made durable.

A virtual machine that is set back to a snapshot, or a disk that is restored from last week, has
forgotten votes and entries on which the cluster relies. The member cannot see this itself, but the
others can. It must not take part again: as a voter it could vote a second time in a term, or elect
a leader that lacks acknowledged writes.

A position is a pair (term, index), compared as a tuple. A member has reached the position (t, i)
if its durable term is above t, or is t and its log holds at least i entries that no later message
of that term can remove. A member never goes back: its durable term only grows, in one term it takes
entries from one leader only, and an applied entry stays. So a member that comes back below a
position which it had reached has lost something, and there is no false alarm. A crash loses only
what was not durable, and so was never reported.

What the others know:

- Each member reports the position of its durable term and its applied index to every other one,
  with each PING (every `PING_INTERVAL_S` of `peer.py`).
- The leader of a term knows from the acknowledgements what each member has of its log.

Each member keeps the highest position of every other one. It writes them to a file at most once in
`SAVE_PAUSE_S`: when the connection to a member ends, every `SAVE_INTERVAL_S`, and at its own stop.
The file holds lower bounds. A loss of it, or an older version of it, makes detection weaker, never
wrong. So a damaged file is ignored, and a whole cluster that is set back to one moment starts.

A cluster that is founded again with the same peer URLs and token has the same ids. A member that is
left of the one before must neither stop the new ones nor take part with its log: the founding has a
number (`cluster_version.py`), and members with different ones refuse each other.

When two members connect, each tells the position at which its process started (`recovered`), before
anything else. A process that starts below its known position is refused, with the reason, by
whichever member it meets first; then it stops. A process that passed is not compared again: it
starts below what it reaches later. It is recognized by its incarnation.

A member that starts votes, campaigns and acknowledges only when every other voter has accepted
it, or after an election timeout. So it usually hears from a third member what the one it talks to
may not know. The time is bounded, because a third member may be down for good.

Limits: what a member made durable less than a report before it was set back is known at most to
the leader; what only lost members knew is not known; nothing is known of a member that is alone.

The file `<data-dir>/member/positions`, all numbers little-endian:

     0   8  magic "etcdlPOS"      8   4  version, 1      12   4  number of members
    for each member
     0   8  id      8   8  term      16   8  index
    24  32  the latest incarnations that passed, `MAX_INCARNATIONS` of them; 0: none
    at the end
     0   4  crc32 of all bytes before
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from functools import partial
from zlib import crc32

from etcdlite import log, proto
from etcdlite.errors import DATA_LOSS, FAILED_PRECONDITION, EtcdError
from etcdlite.loading import RunTask
from etcdlite.options import Options
from etcdlite.raft import APP, HEARTBEAT, LEADER, Message, Raft
from etcdlite.replica.state import State
from etcdlite.storage.disk import Disk

SAVE_INTERVAL_S = 60.0
SAVE_PAUSE_S = 1.0

LEADER_TIMEOUTS = 3
"""Within this many election timeouts, a quorum elects a leader and the leader is heard."""

MAX_INCARNATIONS = 4
"""Processes of one member that are remembered. More than two are alive only on copied data."""

MAX_FILE_BYTES = 1 << 20

_VERSION = 1
_HEADER = struct.Struct("<8sII")
_MEMBER = struct.Struct("<QQQ4Q")
_CRC = struct.Struct("<I")
_MAGIC = b"etcdlPOS"
_REPORT = struct.Struct("<QQ")

Position = tuple[int, int]


class _Known:
    """What is known of one other member."""

    def __init__(self, position: Position = (0, 0), incarnations: tuple[int, ...] = ()) -> None:
        self.position = position
        self.incarnations = incarnations


class RollbackCheck:
    """See the module's docstring."""

    def __init__(
        self,
        state: State,
        raft: Raft,
        run_task: RunTask,
        returned: Callable[[int], None],
        options: Options,
    ) -> None:
        """`returned` is called with the id of a member that was restarted."""
        self._state = state
        self._raft = raft
        self._run_task = run_task
        self._returned = returned
        self._own_id = state.identity.member_id
        self.durable_term = raft.recovered[0]
        """The term of the latest hard state that is durable."""
        self.refusal = ""
        """Why this member must stop, according to another one."""
        self._unheard = raft.voters - {self._own_id}
        """Voters that have not accepted this process yet."""
        self._is_forced = options.force_new_cluster
        others = state.membership.members.keys() - {self._own_id}
        self.is_over = not self._unheard and not (self._is_forced and others)
        """This member may vote, campaign and acknowledge."""
        ticks = raft.config.election_ticks + 1
        self._ticks_left = LEADER_TIMEOUTS * ticks if self._is_forced else ticks
        """How long to wait for the others, in ticks: none passes while the process is paused."""
        self._path = f"{os.path.dirname(state.store.directory)}/positions"
        self._known = _load(state.store.disk, self._path)
        self._has_changed = False
        self._is_saving = False
        self._save_at = math.inf
        self._saved_at = state.clock()

    # This member, as the others see it.

    @property
    def recovered(self) -> proto.LogPosition:
        """The position at which this process started, for an introduction."""
        term, index = self._raft.recovered
        founding = self._state.cluster_version.founding
        return proto.LogPosition(term=term, index=index, founding=founding)

    def report(self) -> bytes:
        """The position of this member now, for a PING."""
        return _REPORT.pack(self.durable_term, self._raft.log.applied)

    def accepted_by(self, node: int) -> None:
        """That member knows nothing that speaks against this process."""
        self._unheard.discard(node)
        if not self._unheard and not self.refusal and not self._is_forced:
            self.is_over = True

    def refused(self, why: str) -> None:
        """Another member knows that this one has lost something: stop taking part at once. With
        --force-new-cluster the others do not matter any more."""
        if self._is_forced:
            return
        self.refusal = self.refusal or why
        self.is_over = False

    def heard(self, message: Message) -> None:
        """A message came that is not handled. With --force-new-cluster, one from a leader shows
        that the quorum is alive, from which this member must not remove the others."""
        if self._is_forced and not self.is_over and message.kind in (APP, HEARTBEAT):
            self.refusal = (
                f"the other members are not lost: member {message.sender:x} leads them. Nothing is "
                "changed: start without --force-new-cluster, or stop the others first"
            )

    def tick(self, now: float) -> None:
        self._ticks_left -= 1
        if self._ticks_left <= 0 and not self.refusal:
            self.is_over = True
        self._note_acknowledged()
        if not self._has_changed or self._is_saving or now < self._saved_at + SAVE_PAUSE_S:
            return
        if now >= min(self._save_at, self._saved_at + SAVE_INTERVAL_S):
            self._has_changed, self._is_saving = False, True
            self._save_at, self._saved_at = math.inf, now
            write = partial(_save, self._state.store.disk, self._path, self._encode())
            self._run_task(write, self._saved)

    # The other members.

    def check(
        self, node: int, incarnation: int, recovered: proto.LogPosition | None
    ) -> EtcdError | None:
        """Whether the process that says it is `node` may take part, by the position at which it
        started; None if it may. An older version does not tell its position: nothing can be said.
        """
        own = self._state.cluster_version.founding
        if recovered and own and recovered.founding not in (0, own):
            return EtcdError(
                FAILED_PRECONDITION,
                "etcdlite: one of the two members has data of an earlier cluster of the same peer "
                "URLs and token. Stop that one, remove its data directory, and start it again",
            )
        known = self._known.setdefault(node, _Known())
        if incarnation in known.incarnations or not recovered:
            return None
        self._note_acknowledged()
        if (recovered.term, recovered.index) < known.position:
            return self._refusal(node, recovered, known.position)
        if known.incarnations:
            self._returned(node)
        known.incarnations = (*known.incarnations, incarnation)[-MAX_INCARNATIONS:]
        self._note(node, (recovered.term, 0))
        self._has_changed = True
        return None

    def reported(self, node: int, body: bytes) -> None:
        """A PING of that member arrived. An older version sends it without a report."""
        if len(body) == _REPORT.size:
            self._note(node, _REPORT.unpack(body))

    def lost(self, now: float) -> None:
        """The connection to a member ended; its next process may be one on an old copy."""
        self._save_at = min(self._save_at, now)

    def save(self) -> None:
        """Write the file now, if there is anything to write."""
        self._note_acknowledged()
        if self._has_changed:
            _save(self._state.store.disk, self._path, self._encode())

    def _note(self, node: int, position: Position) -> None:
        known = self._known.setdefault(node, _Known())
        if position > known.position:
            known.position = position
            self._has_changed = True

    def _note_acknowledged(self) -> None:
        raft = self._raft
        if raft.role == LEADER:
            for node, progress in raft.progress.items():
                if node != self._own_id and progress.match:
                    self._note(node, (raft.term, progress.match))

    def _saved(self) -> None:
        self._is_saving = False

    def _encode(self) -> bytes:
        removed = self._state.membership.removed
        self._known = {node: known for node, known in self._known.items() if node not in removed}
        parts = [_HEADER.pack(_MAGIC, _VERSION, len(self._known))]
        for node, what in self._known.items():
            none = (0,) * (MAX_INCARNATIONS - len(what.incarnations))
            parts.append(_MEMBER.pack(node, *what.position, *what.incarnations, *none))
        content = b"".join(parts)
        return content + _CRC.pack(crc32(content))

    def _refusal(self, node: int, recovered: proto.LogPosition, position: Position) -> EtcdError:
        member = self._state.membership.members.get(node)
        name = member.name if member is not None else ""
        urls = ",".join(member.peerURLs) if member is not None else "URL"
        return EtcdError(
            DATA_LOSS,
            f"etcdlite: the data directory of member {node:x} is an older copy, or part of it is "
            f"lost: this member had come to term {position[0]} and entry {position[1]}, and starts "
            f"with term {recovered.term} and entry {recovered.index}, according to member "
            f"{self._own_id:x}. It must not take part again, because it has forgotten votes and "
            f"acknowledged writes. Remove it with 'etcdlite-ctl member remove {node:x}', empty its "
            f"data directory, add it again with 'etcdlite-ctl member add {name or 'NAME'} "
            f"--learner --peer-urls={urls}', and start it with --initial-cluster-state existing. "
            "See 'An old copy of a data directory' in the documentation of clusters",
        )


def _save(disk: Disk, path: str, content: bytes) -> None:
    try:
        staged = disk.stage(path)
        staged.write(content)
        staged.publish()
    except OSError as failure:
        # These are lower bounds; the next attempt writes higher ones.
        log.warn("cannot save how far the other members had come", "positions", error=str(failure))


def _load(disk: Disk, path: str) -> dict[int, _Known]:
    try:
        file = disk.open_read(path)
        content = file.pread(MAX_FILE_BYTES, 0)
        file.close()
    except FileNotFoundError:
        return {}
    except OSError:
        content = b""  # As if it were damaged.
    body = content[: -_CRC.size]
    if len(body) < _HEADER.size or content[-_CRC.size :] != _CRC.pack(crc32(body)):
        log.warn("ignored a damaged file with the positions of the other members", path=path)
        return {}
    magic, version, count = _HEADER.unpack_from(body)
    if (magic, version) != (_MAGIC, _VERSION) or len(body) != _HEADER.size + count * _MEMBER.size:
        log.warn("ignored a file of another version with the positions of members", path=path)
        return {}
    known = {}
    for node, term, index, *incarnations in _MEMBER.iter_unpack(body[_HEADER.size :]):
        known[node] = _Known((term, index), tuple(i for i in incarnations if i))
    return known
