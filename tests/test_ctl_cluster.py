"""etcdlite-ctl on a cluster of three: it changes members, and shows what etcdctl shows of them.

etcdctl 3.5 is asked the same of the same cluster, one after the other; where it is missing, the
comparisons are skipped. Masked are ids of members that were added, times and indexes.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rigs.ctl_runner import Ended, run_ctl
from rigs.ports import free_ports
from rigs.processes import ServerProcess, wait_until
from rigs.real_etcd import distributed, without_settings
from test_cluster_live import LiveCluster

from etcdlite.client import Client, Member


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    """Three members, as every test finds and leaves them."""
    cluster = LiveCluster(tmp_path_factory.mktemp("three"), 3)
    try:
        wait_until(
            lambda: all(member.client_urls for member in members(cluster)), "all tell who they are"
        )
        wait_until(lambda: takes_changes(cluster), "the members are in contact for long enough")
        yield cluster
    finally:
        cluster.close()
        for member in cluster.members.values():
            print(f"--- log of {member.data_dir.name}:", *member.lines[-60:], sep="\n")


def members(three: LiveCluster) -> tuple[Member, ...]:
    with Client(three.endpoints, timeout_s=60.0) as client:
        found: tuple[Member, ...] = client.members()
        return found


def takes_changes(three: LiveCluster) -> bool:
    """Whether the strict check, which is etcd's, lets a member in: not soon after a start."""
    (port,) = free_ports(1)
    url = f"--peer-urls=http://127.0.0.1:{port}"
    if ours(three, "member", "add", "probe", "--learner", url).status:
        return False
    assert ours(three, "member", "remove", f"{added_id(three):x}").status == 0
    return True


def ours(three: LiveCluster, *words: str) -> Ended:
    return run_ctl("--endpoints", ",".join(three.endpoints), *words)


def etcdctls(three: LiveCluster, *words: str) -> Ended:
    ended = subprocess.run(
        [distributed("etcdctl"), "--endpoints", ",".join(three.endpoints), *words],
        capture_output=True,
        env=without_settings(),
        timeout=60,
    )
    errors = [li for li in ended.stderr.decode().splitlines() if li.startswith("Error: ")]
    return Ended(ended.returncode, ended.stdout, "\n".join(errors))


MASKS = (
    (rb"took = [\d.]+[a-z\xc2\xb5]+", b"took = TIME"),
    (rb'"took":"[^"]*"', b'"took":"TIME"'),
    (rb'"(Took|took)" : \S+', b'"Took" : TIME'),
    (rb"\| *[\d.]+(ms|\xc2\xb5s|s) \|", b"| TIME |"),
    # Any member may have answered, and things go on while the one and the other asks.
    (rb'"(member_id|MemberID|[rR]aft\w+|(db|DB)Size\w*|[rR]evision)" ?: ?\d+', b"NUMBER"),
    (rb"[\d.]+ k?B, (true|false), (true|false), [\d, ]+", rb"\1, \2"),
    (rb"\| +[\d.]+ k?B \| +(true|false) \| +(true|false) \|[ \d|]+", rb"\1 \2 "),
)


def masked(output: bytes, *member_ids: int) -> list[bytes]:
    """The lines, sorted: etcdctl asks members at once and shows them as they answer."""
    for pattern, replacement in MASKS:
        output = re.sub(pattern, replacement, output)
    for member_id in member_ids:
        output = output.replace(b"%x" % member_id, b"ID").replace(b"%d" % member_id, b"ID")
    # A line of a table, or an object of a JSON list, for each member.
    pieces = re.split(rb'\n|(?<=\}),(?=\{)|"members":\[', re.sub(rb" +|-+", b" ", output))
    return sorted(piece.strip(b"[]{}") for piece in pieces)


@pytest.mark.parametrize("output", ["simple", "json", "fields", "table"])
@pytest.mark.parametrize(
    "words", ["member list", "endpoint status", "endpoint health", "endpoint hashkv"]
)
def test_members_and_endpoints_are_shown_as_by_etcdctl(
    three: LiveCluster, words: str, output: str
) -> None:
    arguments = [*words.split(), "-w", output]
    if words != "member list":
        arguments.append("--cluster")
    theirs = etcdctls(three, *arguments)
    mine = ours(three, *arguments)
    assert mine.status == theirs.status == 0, (mine, theirs)
    assert masked(mine.stdout) == masked(theirs.stdout)
    assert all(b"%d" % int(e.rpartition(":")[2]) in mine.stdout for e in three.endpoints)


def added_id(three: LiveCluster) -> int:
    (member,) = (member for member in members(three) if not member.name)
    return member.id


@pytest.mark.parametrize("output", ["simple", "json"])
def test_members_are_changed_as_by_etcdctl(three: LiveCluster, output: str) -> None:
    ports = free_ports(3)
    one, two, other = (f"http://127.0.0.1:{port}" for port in ports)
    (taken,) = (
        f.partition("=")[2] for f in three.members["m1"].flags if "advertise-peer-urls" in f
    )
    m1 = three.id_of(three.members["m1"])

    def story(ctl: Callable[..., Ended]) -> list[tuple[str, int, list[bytes], str]]:
        told = []

        def do(command: str, member_id: int = 0) -> None:
            ended = ctl(three, *command.split(), "-w", output)
            new_id = added_id(three) if command.startswith("member add m4") else member_id
            # Which of two members is shown first depends on the id that the new one got.
            shown = masked(re.sub(rb'(?<=R=")[^"]*', by_name, ended.stdout), new_id)
            error = re.sub(r" \(endpoint \S+\)", "", ended.stderr.strip())
            told.append((command.replace(f"{new_id:x}", "ID"), ended.status, shown, error))

        do(f"member add m4 --peer-urls={one},{two} --learner")
        new = added_id(three)
        do("member list", new)
        do(f"member promote {new:x}", new)
        do(f"member promote {m1:x}")
        do(f"member add m5 --peer-urls={one}")
        do(f"member add m5 --peer-urls={other} --learner")
        do(f"member update {new:x} --peer-urls={other}", new)
        do(f"member update {new:x} --peer-urls={taken}", new)
        do("member list", new)
        do(f"member remove {new:x}", new)
        do(f"member remove {new:x}", new)
        do("member remove 1234")
        do("move-leader 1234")
        return told

    theirs, mine = story(etcdctls), story(ours)
    assert [step[1] for step in mine] == [0, 0, 1, 1, 1, 1, 0, 1, 0, 0, 1, 1, 1]
    for his, my in zip(theirs, mine, strict=True):
        assert my == his


def by_name(match: re.Match[bytes]) -> bytes:
    return b",".join(sorted(match[0].split(b",")))


def test_the_printed_environment_starts_the_new_member(three: LiveCluster, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    ended = ours(three, "member", "add", "m4", f"--peer-urls={url}", "--learner")
    assert ended.status == 0, ended
    program = three.members["m1"].program
    member = ServerProcess(tmp_path / "m4", [f"--listen-peer-urls={url}"], program)
    settings = re.findall(rb'^(ETCD_\w+)="(.*)"$', ended.stdout, re.M)
    assert len(settings) == 4
    member.environ = {name.decode(): value.decode() for name, value in settings}
    try:
        member.start()
        with Client(member.endpoint, timeout_s=60.0) as client:
            learner = wait_until(lambda: client.status().is_learner, "it takes part")
            member_id = client.status().member_id
        assert learner

        def is_promoted() -> bool:
            return ours(three, "member", "promote", f"{member_id:x}").status == 0

        wait_until(is_promoted, "it has caught up and may vote")
        row = rf"{member_id:x} \| started \| +m4 \| +{url}"

        def is_listed() -> bool:
            table = ours(three, "member", "list", "-w", "table").stdout.decode()
            return re.search(row, table) is not None

        wait_until(is_listed, "it has told its name")
        assert ours(three, "member", "remove", f"{member_id:x}").status == 0
        assert member.wait() == 0
    finally:
        member.close()
        print("--- log of m4:", *member.lines[-60:], sep="\n")


@pytest.mark.parametrize("output", ["simple", "json"])
def test_the_leader_is_moved_to_whom_one_says(three: LiveCluster, output: str) -> None:
    leader = three.leader
    leader_id = three.id_of(leader)
    target = three.id_of(three.follower())
    without = [endpoint for endpoint in three.endpoints if endpoint != leader.endpoint]
    refused = run_ctl("--endpoints", ",".join(without), "move-leader", f"{target:x}")
    assert refused.status == 128
    assert f"no leader endpoint given at [{' '.join(without)}]; --cluster asks" in refused.stderr
    ended = ours(three, "move-leader", f"{target:x}", "-w", output)
    assert ended.status == 0, ended
    if output == "simple":
        text = f"Leadership transferred from {leader_id:x} to {target:x}\n"
        assert ended.stdout.decode() == text
    assert three.id_of(three.leader) == target


def test_a_cluster_is_taken_down_and_up_again(three: LiveCluster) -> None:
    def told(*words: str) -> tuple[int, str]:
        # etcdctl 3.5 does not have the command; the texts are those of 3.6.
        ended = ours(three, "downgrade", *words)
        return ended.status, ended.stdout.decode() or ended.stderr.partition(" (endpoint")[
            0
        ].strip()

    def storage_versions() -> list[list[str]]:
        shown = ours(three, "downgrade", "status", "--cluster").stdout.decode()
        return [line.split(", ")[1:] for line in shown.splitlines()]

    wait_until(lambda: storage_versions() == [["0.2.0", ""]] * 3, "all data is of version 0.2")
    assert told("validate", "0.1") == (0, "Downgrade validate success, cluster version 0.2\n")
    for words, why in (
        (("validate", "3.5"), "invalid downgrade target version"),
        (("enable", "x"), "wrong downgrade target version format"),
        (("cancel",), "no inflight downgrade job"),
    ):
        assert told(*words) == (1, f"Error: etcdserver: {why}")
    enabled = ours(three, "downgrade", "enable", "0.1", "-w", "json")
    assert b'"version":"0.2"' in enabled.stdout
    wait_until(
        lambda: storage_versions() == [["0.1.0", "0.1.0"]] * 3, "all data can be opened by 0.1"
    )
    assert told("cancel") == (0, "Downgrade cancel success, cluster version 0.1\n")
    wait_until(lambda: storage_versions() == [["0.2.0", ""]] * 3, "the version rises again")


def test_with_cluster_the_leader_is_found_and_the_new_one_is_named(three: LiveCluster) -> None:
    leader_id = three.id_of(three.leader)
    follower = three.follower()
    name = next(member.name for member in members(three) if member.id == three.id_of(follower))
    ended = run_ctl("--endpoints", follower.endpoint, "move-leader", name, "--cluster")
    assert ended.status == 0, ended
    assert ended.stdout.decode().startswith(f"Leadership transferred from {leader_id:x} to ")


def test_without_a_quorum_the_members_that_are_known_are_asked(three: LiveCluster) -> None:
    others = [member for member in three.members.values() if member is not three.leader]
    others.append(three.leader)
    left, *lost = others
    for member in lost:
        member.kill()
    try:
        ended = run_ctl(
            "--endpoints", left.endpoint, "--command-timeout", "1s", "endpoint", "status",
            "--cluster", "-w", "table",
        )  # fmt: skip
        assert ended.status == 1
        assert "using the members that this endpoint knows" in ended.stderr
        assert f"http://{left.endpoint}" in ended.stdout.decode()
        assert "no leader" in ended.stdout.decode()
        ended = run_ctl("--endpoints", left.endpoint, "--command-timeout", "1s", "put", "k", "v")
        assert ended.status == 1
        why = r"no leader since \d+ s; 1 of 3 voting members reachable; see endpoint status"
        assert re.search(why, ended.stderr), ended.stderr
    finally:
        for member in lost:
            member.start()
    wait_until(lambda: three.leader, "they serve again")
