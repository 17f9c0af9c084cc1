"""Whether other members can reach this one, checked while it is still the only voter.

With a second voter, the quorum of a cluster of one becomes two. If the new member cannot reach the
old one, because the peer URL that the old one advertises is wrong, the cluster has no leader any
more, and no command can undo the change. So the sole voter first connects to its own peer URL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from etcdlite.errors import FAILED_PRECONDITION, EtcdError
from etcdlite.loading import RunTask
from etcdlite.options import Options
from etcdlite.replica.membership import ADD, PROMOTE
from etcdlite.replica.state import State
from etcdlite.urls import is_local


class Reachability:
    """The check before a second voter is added."""

    def __init__(
        self, state: State, options: Options, is_called_by: Callable[[int], bool], run_task: RunTask
    ) -> None:
        """`is_called_by` tells whether another member has a connection open to this one."""
        self._state = state
        self._is_strict = options.strict_reconfig_check
        self._is_called_by = is_called_by
        self._run_task = run_task
        self.probe: Callable[[Sequence[str], int], str] | None = None
        """`probe(urls, member_id)` connects to peer URLs and asks for the member with this id. It
        blocks. Returns why no URL leads to that member; empty if one does. None: check nothing."""

    def is_vital(self, change: Any) -> bool:
        """Whether a `MemberChange` makes a second voter that may be unable to reach this one."""
        adds = change.action == ADD and not change.member.isLearner
        promotes = change.action == PROMOTE and not self._is_called_by(change.member.ID)
        is_sole_voter = self._state.membership.voters == [self._state.identity.member_id]
        return self.probe is not None and self._is_strict and (adds or promotes) and is_sole_voter

    def check(self, change: Any, done: Callable[[EtcdError | None], None]) -> None:
        """Call `done`, perhaps later, with the error that forbids this change, or None."""
        own_id = self._state.identity.member_id
        members = self._state.membership.members
        urls = list(members[own_id].peerURLs)
        other_urls = members.get(change.member.ID, change.member).peerURLs
        if all(map(is_local, urls)) and not all(map(is_local, other_urls)):
            why = f"{', '.join(urls)} is another machine to members elsewhere"
            done(unreachable_error(own_id, why))
            return
        found: list[str] = []

        def task() -> None:
            assert self.probe is not None
            found.append(self.probe(urls, own_id))

        def probed() -> None:
            done(unreachable_error(own_id, found[0]) if found[0] else None)

        self._run_task(task, probed)


def unreachable_error(member_id: int, why: str) -> EtcdError:
    return EtcdError(
        FAILED_PRECONDITION,
        "etcdlite: a second voting member would stop this cluster, because other members cannot "
        f"reach the first one: {why}. Correct its peer URLs with 'etcdlite-ctl member update "
        f"{member_id:x} --peer-urls=...'; or if only this machine cannot reach them, add the new "
        "member with --learner and promote it",
    )
