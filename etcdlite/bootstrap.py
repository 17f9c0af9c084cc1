"""How a member comes into a cluster: it founds one with others, or joins one that runs.

The ids are derived as etcd derives them, so the same configuration gives the same ids: a member's
from its peer URLs and the cluster token, the cluster's from its members'.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from etcdlite import datadir, discovery, log, methods, proto
from etcdlite.client.connection import (
    RECEIVE_BYTES,
    Connection,
    Ticket,
    cause_of,
    unary_reply,
)
from etcdlite.client.errors import EtcdliteError
from etcdlite.config import Config
from etcdlite.datadir import Founding, StartError
from etcdlite.replica.membership import derive_cluster_id, derive_member_id
from etcdlite.storage.disk import Disk
from etcdlite.urls import format_address, host_port

FETCH_TIMEOUT_S = 5.0
"""How long each of the other members gets to tell who is in the cluster."""

FETCH_DIAL_TIMEOUT_S = 2.0
"""The part of it that a connection may take to be made."""


JOIN_PATIENCE_S = 30.0


JOIN_RETRY_S = 3.0
"""How long a member that joins asks the others, and the pause when all of them were asked."""


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


def found(settings: Config) -> Founding:
    """What a member starts its first time with. Raises StartError."""
    initial_cluster = _initial_cluster(settings)
    if settings.initial_cluster_state == "existing":
        return _join(settings.name, initial_cluster, has_data=False)
    founding = new_cluster(settings.name, initial_cluster, settings.initial_cluster_token)
    if settings.discovery_srv:
        # All members must begin with the same, and DNS has no names.
        for member in founding.members:
            member.name = ""
    fetch = partial(fetch_members, linearizable=False)
    check_is_new(founding, settings.name, initial_cluster, fetch)
    return founding


def rejoin(settings: Config) -> Founding:
    """The cluster, for a member with data that joined it and does not know its members yet. Raises
    StartError."""
    return _join(settings.name, _initial_cluster(settings), has_data=True)


def create_member(settings: Config, disk: Disk, founding: Founding, client_urls: list[str]) -> None:
    """Lay out the data directory of a new member."""
    is_joining = settings.initial_cluster_state == "existing"
    if not is_joining and len(founding.members) == 1:
        # All members must begin with the same, so otherwise each tells this later.
        founding.members[0].clientURLs = client_urls
    log.info(
        "starting local member",
        **{
            "local-member-id": f"{founding.member_id:x}",
            "cluster-id": f"{founding.cluster_id:x}",
            "initial-cluster": ",".join(
                f"{member.name}={url}" for member in founding.members for url in member.peerURLs
            ),
        },
    )
    datadir.create(
        disk,
        settings.data_dir,
        settings.wal_dir,
        founding,
        is_joining=is_joining,
        segment_bytes=settings.segment_bytes,
        wal_segment_bytes=settings.wal_segment_bytes,
    )


def _initial_cluster(settings: Config) -> Sequence[tuple[str, str]]:
    """As configured or as DNS tells. Raises StartError."""
    if not settings.discovery_srv:
        return settings.initial_cluster
    try:
        found = discovery.initial_cluster(
            settings.discovery_srv,
            settings.discovery_srv_name,
            settings.name,
            settings.initial_advertise_peer_urls,
        )
    except discovery.DiscoveryError as failure:
        raise StartError(f"--discovery-srv: {failure}") from failure
    shown = ",".join(f"{name}={url}" for name, url in found)
    log.info("got the members from DNS", **{"initial-cluster": shown})
    return found


def _join(name: str, initial_cluster: Sequence[tuple[str, str]], has_data: bool) -> Founding:
    """What the running cluster tells. Raises StartError."""
    deadline = time.monotonic() + JOIN_PATIENCE_S
    while True:
        try:
            return join_cluster(name, initial_cluster, fetch_members, has_data=has_data)
        except NoAnswer as failure:
            if time.monotonic() + JOIN_RETRY_S > deadline:
                raise
            log.warn("cannot join the cluster yet; trying again", why=str(failure))
            time.sleep(JOIN_RETRY_S)


def fetch_members(url: str, linearizable: bool = True) -> tuple[int, list[Any]]:
    """The cluster's id and members, as the member at a peer URL tells; `linearizable`: only if it
    is in contact with a leader. Blocks for up to `FETCH_TIMEOUT_S`. Raises NoAnswer."""
    host, port = host_port(url)
    endpoint = format_address(host, port)
    method = methods.METHOD_BY_NAME["Cluster.MemberList"]
    asked = Connection()
    request = proto.MemberListRequest(linearizable=linearizable)
    asked.open(Ticket(method), request.encode(), end=True)
    deadline_s = time.monotonic() + FETCH_TIMEOUT_S
    try:
        with socket.create_connection((host, port), FETCH_DIAL_TIMEOUT_S) as sock:
            sock.sendall(asked.take_output())
            while not asked.failure:
                sock.settimeout(max(0.001, deadline_s - time.monotonic()))
                for _, flags, body in asked.receive(sock.recv(RECEIVE_BYTES)):
                    answer = unary_reply(method, flags, body, endpoint)
                    return answer.header.cluster_id, list(answer.members)
    except OSError as failure:
        raise NoAnswer(f"{endpoint}: {cause_of(failure, FETCH_TIMEOUT_S)}") from failure
    except EtcdliteError as failure:
        raise NoAnswer(str(failure)) from failure
    raise NoAnswer(f"{endpoint}: {asked.failure}")
