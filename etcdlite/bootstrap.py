"""How a member comes into a cluster: it founds one with others, or joins one that runs.

The ids are derived as etcd derives them, so the same configuration gives the same ids: a member's
from its peer URLs and the cluster token, the cluster's from its members'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from etcdlite import proto
from etcdlite.datadir import Founding, StartError
from etcdlite.replica.membership import derive_cluster_id, derive_member_id


class NoAnswer(StartError):
    """None of the members that were asked answers, now."""


def new_cluster(name: str, initial_cluster: Iterable[tuple[str, str]], token: str) -> Founding:
    """The cluster of these (name, peer URL), of which `name` is one. All members that start with
    the same get the same."""
    urls: dict[str, list[str]] = {}
    for member_name, url in initial_cluster:
        urls.setdefault(member_name, []).append(url)
    members = [
        proto.Member(
            ID=derive_member_id(peer_urls, token), name=member_name, peerURLs=sorted(peer_urls)
        )
        for member_name, peer_urls in urls.items()
    ]
    own = next(member.ID for member in members if member.name == name)
    return Founding(derive_cluster_id(member.ID for member in members), own, members)


Fetch = Callable[[str], "tuple[int, list[Any]]"]
"""Ask the member at a peer URL for the cluster's id and its members. Raises NoAnswer."""


def check_is_new(
    founding: Founding, name: str, initial_cluster: Iterable[tuple[str, str]], fetch: Fetch
) -> None:
    """Let a member found a cluster only if it is not in it already, as far as one of the others
    can tell: a member that lost its data may have voted and acknowledged writes, and must not do
    so a second time. `fetch` is to ask for what the other knows itself. Raises StartError."""
    for member_name, url in initial_cluster:
        if member_name == name:
            continue
        try:
            cluster_id, members = fetch(url)
        except NoAnswer:
            continue
        if not members:
            continue  # It has just been added itself, and knows of nobody yet.
        if cluster_id != founding.cluster_id:
            raise StartError(
                f"the member at {url} is of cluster {cluster_id:x}, but by this configuration this "
                f"one would be of cluster {founding.cluster_id:x}. Make --initial-cluster and "
                "--initial-cluster-token the same on all members; to add this member to a running "
                f"cluster, use {_ADD} and --initial-cluster-state existing"
            )
        known = [member for member in members if founding.member_id == member.ID]
        if not known:
            raise StartError(
                f"member {founding.member_id:x} is not in the cluster any more, says the member at "
                f"{url}. To join again, add it with {_ADD} and start it with "
                "--initial-cluster-state existing"
            )
        if known[0].clientURLs:
            raise _bootstrapped(founding.member_id)
        return


_ADD = "'etcdlite-ctl member add'"


def _bootstrapped(member_id: int) -> StartError:
    return StartError(
        f"member {member_id:x} has already been bootstrapped: it has been running with another "
        "--data-dir. Start it with that one. If that data is lost, remove the member with "
        f"'etcdlite-ctl member remove {member_id:x}', add it anew with {_ADD}, and start it with "
        "--initial-cluster-state existing"
    )


def join_cluster(
    name: str,
    initial_cluster: Iterable[tuple[str, str]],
    fetch: Fetch,
    *,
    has_data: bool = False,
) -> Founding:
    """The running cluster that this member was added to, as one of the others tells it. Raises
    NoAnswer if none does, and StartError if it is not that cluster. `has_data`: it is not this
    member's first start."""
    pairs = list(initial_cluster)
    own_urls = sorted(url for member_name, url in pairs if member_name == name)
    causes = []
    for member_name, url in pairs:
        if member_name == name:
            continue
        try:
            cluster_id, members = fetch(url)
        except NoAnswer as failure:
            causes.append(f"{url}: {failure}")
            continue
        own = _own(name, own_urls, pairs, members)
        if own.name and not has_data:
            raise _bootstrapped(own.ID)
        return Founding(cluster_id, own.ID, members)
    why = (
        "no other member of --initial-cluster tells who is in the cluster "
        f"({'; '.join(causes) or 'there is none in it'}). Check --initial-cluster, or start this "
        "member with --initial-cluster-state new if the cluster does not exist yet"
    )
    raise NoAnswer(why) if causes else StartError(why)


def _own(name: str, own_urls: list[str], pairs: list[tuple[str, str]], members: list[Any]) -> Any:
    """This member among those of the cluster; the lists must agree, as in etcd."""
    own = [member for member in members if sorted(member.peerURLs) == own_urls]
    if not own:
        raise StartError(
            f"the cluster has no member with the peer URLs {', '.join(own_urls)}. Add it first, "
            f"with 'etcdlite-ctl member add {name} --peer-urls={','.join(own_urls)}', or correct "
            "--initial-advertise-peer-urls"
        )
    if own[0].name and own[0].name != name:
        raise StartError(
            f"the member with the peer URLs {', '.join(own_urls)} is {own[0].name}, not {name}, "
            "and has been started already. Start it with its own --name and --data-dir"
        )
    listed = {url for _, url in pairs}
    there = {url for member in members for url in member.peerURLs}
    if listed != there:
        missing = ", ".join(sorted(there - listed)) or "none"
        foreign = ", ".join(sorted(listed - there)) or "none"
        raise StartError(
            "--initial-cluster does not name the members of the cluster. Peer URLs that it leaves"
            f" out: {missing}; that are not in the cluster: {foreign}. Use what 'etcdlite-ctl"
            " member add' printed"
        )
    return own[0]


# A snapshot from the leader replaces the data in steps, each of which a crash may follow: the
# snapshot gets its own name; the log is marked as replaced by it, and from then on it counts; the
# data is moved away; the snapshot is moved to its place.
