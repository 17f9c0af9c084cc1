"""How a member enters a cluster: it founds a new one with others, or joins a running one.

All members of a new cluster must derive the same ids and begin with the same membership. They
derive ids as etcd does: a member's id from its peer URLs and the cluster token, the cluster's id
from the ids of its members.

A member that lost its data must not start as a new one: it may have voted and acknowledged writes.
So a first start asks the other members first, at their peer ports. This blocks; nothing is served
yet.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from etcdlite import datadir, discovery, log, methods, proto
from etcdlite.channel import ChannelError, Dialing, shake_hands
from etcdlite.client import connection
from etcdlite.client.errors import EtcdliteError
from etcdlite.config import Config
from etcdlite.datadir import Founding, Home, StartError
from etcdlite.errors import MayPass
from etcdlite.replica.membership import derive_cluster_id, derive_member_id
from etcdlite.storage.disk import Disk
from etcdlite.urls import format_address, host_port
from etcdlite.versions import CURRENT, incompatibility, parse

FETCH_TIMEOUT_S = 5.0
"""How long each of the other members has to answer."""

FETCH_DIAL_TIMEOUT_S = 2.0
"""The part of it in which the connection must be made."""

JOIN_RETRY_S = 1.0
"""The pause of a joining member after all others were asked in vain."""

JOIN_LINES_PER_S = 0.2
"""How often the log says what a joining member waits for."""

_ADD = "'etcdlite-ctl member add'"

Fetch = Callable[[str], "tuple[int, list[proto.Member]]"]
"""Ask the member at a peer URL for the cluster's id and its members. Raises NoAnswer."""

Waits = Callable[[str], None]
"""Called now and then, with the reason, while a member cannot join yet."""


class NoAnswer(StartError):
    """None of the members that were asked has answered; one may answer later."""


class NoChannel(NoAnswer):
    """A process answers, but the channel to it cannot be established, as with another secret."""


class NotAdded(StartError, MayPass):
    """The cluster does not have this member yet."""


class OtherCluster(StartError):
    """Members of another cluster answer where those of this one should be, or such as do not agree
    with this one on a channel."""


def resolve_founding(settings: Config, waits: Waits, dialing: Dialing) -> Founding:
    """The cluster with which a member starts for the first time. Waits until a running cluster that
    it joins answers, and until another cluster has left the place of a new one. Raises StartError.

    `dialing` makes the channels to the other members."""
    initial_cluster = _initial_cluster(settings)
    if settings.initial_cluster_state == "existing":
        return _join(settings.name, initial_cluster, waits, False, dialing)
    founding = new_cluster(settings.name, initial_cluster, settings.initial_cluster_token)
    if settings.discovery_srv:
        # DNS has no names, and all members must begin with the same membership.
        for member in founding.members:
            member.name = ""
    fetch = partial(fetch_members, linearizable=False, dialing=dialing)
    while True:
        try:
            check_is_new(founding, settings.name, initial_cluster, fetch)
            return founding
        except OtherCluster as failure:
            # Nothing is at risk: this member has no data and takes no part yet.
            _wait("cannot found the cluster yet; trying again", str(failure), waits)


def rejoin(settings: Config, waits: Waits, dialing: Dialing) -> Founding:
    """The cluster of a member that has data but has not received the membership from a leader yet.
    Waits until one of the others answers. Raises StartError."""
    return _join(settings.name, _initial_cluster(settings), waits, True, dialing)


def create_member(settings: Config, home: Home, founding: Founding, urls: list[str]) -> None:
    """Create a new member's data directory; `urls` are for clients. Raises StartError, OSError."""
    is_joining = settings.initial_cluster_state == "existing"
    if not is_joining and len(founding.members) == 1:
        # With others, each member publishes its URLs once it runs: all must begin with the same.
        founding.members[0].clientURLs = urls
        _warn_of_other_data(home.disk, home.data_dir)
    log.info(
        "starting local member",
        local_member_id=f"{founding.member_id:x}",
        cluster_id=f"{founding.cluster_id:x}",
        initial_cluster=",".join(
            # A member that was added has no name before it has started.
            f"{settings.name if founding.member_id == member.ID else member.name}={url}"
            for member in founding.members
            for url in member.peerURLs
        ),
    )
    datadir.create(home, founding, is_joining)


def _warn_of_other_data(disk: Disk, data_dir: str) -> None:
    """Warn of data of other members beside `data_dir`, which is named after the member by default:
    a member that was renamed begins without data."""
    folder, own = os.path.split(os.path.abspath(data_dir))
    if not own.endswith(".etcdlite"):
        return
    try:
        names = [name for name in disk.list(folder) if name.endswith(".etcdlite")]
    except OSError:
        return  # It does not exist yet, or may not be read.
    if others := [name for name in names if Home(disk, f"{folder}/{name}").exists]:
        log.warn(
            "this member begins without data, and there is data of other names beside it. If it "
            "was renamed, stop it, and name the old directory as data-dir",
            data_dir=data_dir,
            beside=", ".join(sorted(others)[:3]),
        )


def new_cluster(name: str, initial_cluster: Iterable[tuple[str, str]], token: str) -> Founding:
    """The cluster of these (name, peer URL) pairs, among them the member `name`. The same pairs and
    token give the same cluster on every member."""
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


def check_is_new(
    founding: Founding, name: str, initial_cluster: Iterable[tuple[str, str]], fetch: Fetch
) -> None:
    """Raise StartError if one of the other members knows this one as started, or as none of its
    cluster. The first of the same cluster decides; if none answers, the cluster counts as new.
    `fetch` must return what the other member itself knows, because there may be no leader.

    Raises OtherCluster if the rest, without the members that are of another cluster or that no
    channel reaches, is no majority: then the configuration is wrong, or another cluster is about to
    be replaced."""
    others = [pair for pair in initial_cluster if pair[0] != name]
    foreign: dict[str, str] = {}
    closed: list[str] = []
    for member_name, url in others:
        try:
            cluster_id, members = fetch(url)
        except NoChannel as failure:
            closed.append(str(failure))
            continue
        except NoAnswer:
            continue
        if not members:
            continue  # It was added itself and has not received the membership yet.
        known = [member for member in members if founding.member_id == member.ID]
        if known and known[0].clientURLs:  # Of this cluster, or of one that began with its backup.
            raise _bootstrapped(founding.member_id)
        if cluster_id != founding.cluster_id:
            foreign[member_name] = f"the member at {url} is of cluster {cluster_id:x}"
            continue
        if not known:
            raise StartError(
                f"member {founding.member_id:x} is not in the cluster any more, according to the "
                f"member at {url}. To join again, add it with {_ADD} and start it with "
                "--initial-cluster-state existing"
            )
        return
    count = 1 + len({member_name for member_name, _ in others})
    if count - len(foreign) - len(closed) <= count // 2:
        if closed:
            raise OtherCluster("; ".join(closed))
        raise OtherCluster(
            f"{'; '.join(foreign.values())}, but this configuration makes cluster "
            f"{founding.cluster_id:x}. If this cluster is to replace that one, stop its members. "
            "Otherwise make --initial-cluster and --initial-cluster-token the same on all members; "
            f"to add this member to a running cluster, use {_ADD} and --initial-cluster-state "
            "existing"
        )


def join_cluster(
    name: str, initial_cluster: Iterable[tuple[str, str]], fetch: Fetch, *, has_data: bool = False
) -> Founding:
    """The running cluster to which this member was added, according to the first other member
    whose answer fits. `has_data`: this is not the member's first start.

    Raises NoAnswer if no member answers. Raises StartError if no answer fits; that member may be
    behind and not know of the latest change."""
    pairs = list(initial_cluster)
    own_urls = sorted(url for member_name, url in pairs if member_name == name)
    causes = []
    refusal: StartError | None = None
    for member_name, url in pairs:
        if member_name == name:
            continue
        try:
            cluster_id, members = fetch(url)
            if not members:
                raise NoAnswer("it joins itself and has not received the members yet")
            own = _own(name, own_urls, pairs, members)
            if own.name and not has_data:
                raise _bootstrapped(own.ID)
        except NoAnswer as failure:
            causes.append(f"{url}: {failure}")
        except StartError as failure:
            refusal = refusal or failure
        else:
            return Founding(cluster_id, own.ID, members)
    if refusal is not None:
        raise refusal
    why = (
        "no other member of --initial-cluster answers "
        f"({'; '.join(causes) or 'it names no other member'}). Check --initial-cluster, or start "
        "this member with --initial-cluster-state new if the cluster does not exist yet"
    )
    raise NoAnswer(why) if causes else StartError(why)


def _own(
    name: str, own_urls: list[str], pairs: list[tuple[str, str]], members: list[proto.Member]
) -> Any:
    """This member among the cluster's. Raises StartError if the lists differ, as etcd does."""
    own = [member for member in members if sorted(member.peerURLs) == own_urls]
    if not own:
        raise NotAdded(
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
            "--initial-cluster does not name the members of the cluster. Missing peer URLs: "
            f"{missing}; peer URLs that are not in the cluster: {foreign}. Use what 'etcdlite-ctl "
            "member add' printed"
        )
    return own[0]


def _bootstrapped(member_id: int) -> StartError:
    return StartError(
        f"member {member_id:x} has already been bootstrapped: it has been running with another "
        "--data-dir. Start it with that one. If that data is lost, remove the member with "
        f"'etcdlite-ctl member remove {member_id:x}', add it again with {_ADD}, and start it with "
        "--initial-cluster-state existing"
    )


def _initial_cluster(settings: Config) -> Sequence[tuple[str, str]]:
    """The members as configured or found by DNS, which are asked next. Raises DiscoveryError."""
    found: Sequence[tuple[str, str]] = settings.initial_cluster
    if settings.discovery_srv:
        found = discovery.initial_cluster(
            settings.discovery_srv,
            settings.discovery_srv_name,
            settings.name,
            settings.initial_advertise_peer_urls,
        )
        shown = ",".join(f"{name}={url}" for name, url in found)
        log.info("got the members from DNS", initial_cluster=shown)
    if len(found) > 1:
        what = "asking the other members of --initial-cluster about the cluster"
        log.info(what, timeout=f"{FETCH_TIMEOUT_S:.0f}s each")
    return found


def _join(
    name: str,
    initial_cluster: Sequence[tuple[str, str]],
    waits: Waits,
    has_data: bool,
    dialing: Dialing,
) -> Founding:
    """Ask the running cluster until it answers. Raises StartError.

    The cluster may need this member for its quorum, so any member's own knowledge is enough to
    join. It is not enough to give up, because that member may be behind: a refusal must come from a
    member that is in contact with a leader."""
    fetch = partial(fetch_members, dialing=dialing)
    fetch_local = partial(fetch, linearizable=False)
    while True:
        try:
            return join_cluster(name, initial_cluster, fetch_local, has_data=has_data)
        except NoAnswer as failure:
            why = str(failure)
        except StartError as refusal:
            try:
                return join_cluster(name, initial_cluster, fetch, has_data=has_data)
            except NoAnswer:
                why = f"{refusal}. This may be outdated: no member is in contact with a leader"
        _wait("cannot join the cluster yet; trying again", why, waits)


def _wait(what: str, why: str, waits: Waits) -> None:
    log.warn(what, "join", JOIN_LINES_PER_S, why=why)
    waits(why)
    time.sleep(JOIN_RETRY_S)


def fetch_members(
    url: str, linearizable: bool = True, dialing: Dialing | None = None
) -> tuple[int, list[proto.Member]]:
    """Ask the member at a peer URL for the cluster's id and its members.

    With `linearizable` it answers only if it is in contact with a leader, else from its own state.
    Blocks for up to `FETCH_TIMEOUT_S`. Raises NoAnswer."""
    answer = _ask_for_members(url, linearizable, dialing)
    return answer.header.cluster_id if answer.header else 0, list(answer.members)


def unreachable(urls: Sequence[str], member_id: int, dialing: Dialing | None = None) -> str:
    """Why no peer URL of the member `member_id` can be reached; empty if one can.
    Blocks for up to `FETCH_TIMEOUT_S` for each URL."""
    causes = []
    for url in urls:
        try:
            answer = _ask_for_members(url, False, dialing)
        except NoAnswer as failure:
            causes.append(str(failure))
            continue
        found = answer.header.member_id if answer.header else 0
        if found == member_id:
            return ""
        causes.append(f"{url} leads to member {found:x}")
    return "; ".join(causes)


def check_version(asked: connection.ClientConnection, endpoint: str) -> None:
    """Raise StartError if this program is too old for the cluster of a member that answered."""
    cluster = asked.hello.cluster_version if asked.hello is not None else ""
    try:
        why = incompatibility(CURRENT, parse(cluster)) if cluster else ""
    except ValueError as failure:
        raise NoAnswer(f"{endpoint}: {failure}") from None
    if why:
        raise StartError(f"according to the member at {endpoint}, {why}")


def _ask_for_members(
    url: str, linearizable: bool, dialing: Dialing | None
) -> proto.MemberListResponse:
    """The answer of the member at a peer URL. Raises NoAnswer, and NoChannel as one."""
    host, port = host_port(url)
    endpoint = format_address(host, port)
    method = methods.METHOD_BY_NAME["Cluster.MemberList"]
    asked = connection.ClientConnection()
    request = proto.MemberListRequest(linearizable=linearizable)
    asked.open(connection.Ticket(method), request.encode(), end=True)
    deadline_s = time.monotonic() + FETCH_TIMEOUT_S
    try:
        channel = dialing and dialing(url, 0)
        with socket.create_connection((host, port), FETCH_DIAL_TIMEOUT_S) as sock:
            output = asked.take_output()
            if channel is not None:
                shake_hands(sock, channel, deadline_s)
                output = channel.seal(output)
            sock.sendall(output)
            while not asked.failure:
                sock.settimeout(max(0.001, deadline_s - time.monotonic()))
                data = sock.recv(connection.RECEIVE_BYTES)
                if channel is not None and data and not (data := channel.receive(data)):
                    continue
                for _, flags, body in asked.receive(data):
                    check_version(asked, endpoint)
                    return connection.unary_reply(method, flags, body, endpoint)
    except ChannelError as failure:
        raise NoChannel(f"{endpoint}: {failure}") from failure
    except OSError as failure:
        raise NoAnswer(f"{endpoint}: {connection.cause_of(failure, FETCH_TIMEOUT_S)}") from failure
    except EtcdliteError as failure:
        raise NoAnswer(str(failure)) from failure
    kind = NoChannel if asked.failure == connection.WANTS_SECRET else NoAnswer
    raise kind(f"{endpoint}: {asked.failure}")
