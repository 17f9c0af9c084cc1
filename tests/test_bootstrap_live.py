"""First starts of real members: founding a cluster, joining it, and what is refused."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.homes import home
from rigs.ports import free_ports
from rigs.processes import ROOT, ServerProcess, wait_until
from test_cluster_live import LiveCluster, cluster
from test_discovery import FakeDns, fake_dns

from etcdlite import backup, proto
from etcdlite.client import Client, EtcdliteError
from etcdlite.client.errors import Unhealthy

__all__ = ["cluster", "fake_dns"]  # Fixtures.


def lose_data(member: ServerProcess) -> None:
    member.kill()
    shutil.rmtree(member.data_dir)


def refused(member: ServerProcess, *flags: str, status: int = 2) -> str:
    """Why the member does not start."""
    member.spawn(*flags)
    assert member.wait() == status, member.tail()
    return member.lines[-1]


def fourth(three: LiveCluster) -> tuple[ServerProcess, str]:
    """A member m4 that is ready to join, and its peer URL."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    flags = [flag.partition("=") for flag in three.members["m1"].flags]
    (initial,) = (value for name, _, value in flags if name == "--initial-cluster")
    three._peer_ports["m4"] = port
    return three._make("m4", url, f"{initial},m4={url}", "existing"), url


def test_a_member_that_lost_its_data_must_be_added_again(cluster: Any) -> None:
    three = cluster()
    three.load(1)
    lost = three.follower()
    lost_id = three.id_of(lost)
    lose_data(lost)
    assert "has already been bootstrapped" in refused(lost)
    assert "has already been bootstrapped" in refused(lost, "--initial-cluster-state=existing")
    three.call("Cluster.MemberRemove", proto.MemberRemoveRequest(ID=lost_id))
    assert "is not in the cluster any more" in refused(lost)
    del three.members[lost.data_dir.name]
    three.add("m4")
    three.progress()
    three.check()


def test_a_member_with_another_token_is_told_what_differs(cluster: Any) -> None:
    three = cluster()
    odd = three.follower()
    lose_data(odd)
    odd.spawn("--initial-cluster-token=typo")
    why = odd.wait_for_log("cannot found the cluster yet; trying again")
    assert "--initial-cluster-token the same on all members" in why
    assert odd.is_running and not odd.data_dir.joinpath("member").exists()


def test_a_new_cluster_takes_the_place_of_an_old_one_member_by_member(cluster: Any) -> None:
    three = cluster()
    three.call("KV.Put", proto.PutRequest(key=b"old"))
    members = list(three.members.values())
    for number, member in enumerate(members):
        lose_data(member)
        member.spawn("--initial-cluster-token=new")
        if number == 0:
            member.wait_for_log("cannot found the cluster yet; trying again")
    for member in members:
        wait_until(lambda member=member: member.endpoint, f"it serves; {member.tail()}")
        with member.client() as client:
            assert client.range(prefix="old").count == 0


def test_a_member_that_was_not_added_is_told_to_be_added(cluster: Any) -> None:
    three = cluster()
    stranger, url = fourth(three)
    assert f"member add m4 --peer-urls={url}" in refused(stranger, status=1)


def test_a_member_says_what_it_waits_for_while_the_others_are_silent(cluster: Any) -> None:
    three = cluster()
    first, *others = three.members.values()
    lose_data(first)
    for member in others:
        os.kill(member.process.pid, signal.SIGSTOP)
    try:
        first.spawn()
        line = first.wait_for_log("asking the other members")
    finally:
        for member in others:
            os.kill(member.process.pid, signal.SIGCONT)
    assert "timeout=5s each" in line.replace('"', "")


def test_a_member_waits_a_while_for_the_cluster_that_it_joins(cluster: Any) -> None:
    three = cluster()
    old = list(three.members.values())
    joining, url = fourth(three)
    three.call("Cluster.MemberAdd", proto.MemberAddRequest(peerURLs=[url]))
    for member in old:
        member.stop()
    joining.spawn()
    joining.wait_for_log("cannot join the cluster yet; trying again")
    for member in old:
        member.start()
    wait_until(lambda: joining.endpoint, f"it joins; {joining.tail()}")
    with Client(joining.endpoint, timeout_s=60.0) as client:
        client.put("k", "v")


def test_one_member_grows_to_two_although_the_second_one_starts_late(cluster: Any) -> None:
    one = cluster(1)
    with one.members["m1"].client() as client:
        client.put("k", "v")
        joining, url = fourth(one)
        client.member_add([url])
        # Now two votes are needed: without the second member nothing can be agreed on.
        one.members["m1"].wait_for_log("lost leader")
    joining.start()
    with joining.client() as client:
        assert client.get("k").value == b"v"
    # And the same with its data, when neither of them knows a leader.
    one.members["m1"].kill()
    joining.kill()
    one.members["m1"].start()
    joining.start()
    with joining.client() as client:
        assert client.get("k").value == b"v"


def test_a_member_that_nobody_reaches_does_not_take_a_second_voter(cluster: Any) -> None:
    one = cluster(1, proxied=True)
    url = "http://127.0.0.1:1"
    with one.members["m1"].client() as client:
        (own,) = client.members()
        one.proxies["m1"].is_blocked = True
        with pytest.raises(EtcdliteError, match=r"cannot reach the first one.*member update"):
            client.member_add([url])
        with pytest.raises(EtcdliteError, match="is another machine to members elsewhere"):
            client.member_add(["http://10.0.0.9:2380"])
        # A learner takes no vote, but it cannot be promoted before it calls.
        learner = client.member_add([url], learner=True)
        client.member_remove(learner.id)
        client.member_update(own.id, [f"http://127.0.0.1:{one._peer_ports['m1']}"])
        client.member_add([url])


def test_a_member_without_its_peer_port_takes_no_second_voter(server: Any) -> None:
    """The server that has the port may have the same ids: all with default settings do."""
    script = """if True:
        import sys
        from etcdlite.__main__ import main
        sys.argv = [flag for flag in sys.argv if not flag.startswith("--listen-peer-urls")]
        sys.exit(main())
    """
    program = (sys.executable, "-c", script)
    server(program=program)
    second = server(program=program)
    second.wait_for_log("goes on without it")
    reason = r"does not listen at http://localhost:2380.*--listen-peer-urls"
    with second.client() as client, pytest.raises(EtcdliteError, match=reason):
        client.member_add(["http://127.0.0.1:1"])


def test_a_cluster_is_restored_from_one_members_backup(cluster: Any, tmp_path: Path) -> None:
    three = cluster()
    with Client(three.endpoints) as client:
        client.put("k", "v")
        revision = client.get("k").mod_revision
        client.snapshot(str(tmp_path / "backup"))
    for member in three.members.values():
        lose_data(member)
    for name, member in three.members.items():
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in member.flags)
        backup.restore(
            str(tmp_path / "backup"),
            home(member.data_dir),
            name=name,
            initial_cluster=flags["initial-cluster"],
            initial_cluster_token="restored",
            initial_advertise_peer_urls=flags["initial-advertise-peer-urls"],
        )
    for member in three.members.values():
        member.start()
    for member in three.members.values():
        with Client(member.endpoint, timeout_s=60.0) as client:
            assert client.get("k").mod_revision == revision
            assert {m.name for m in client.members()} == set(three.members)


def test_a_cluster_that_shuts_down_does_not_log_lost_peers(cluster: Any) -> None:
    three = cluster()
    three.load(1)
    for member in three.members.values():
        member.process.send_signal(signal.SIGTERM)
    for member in three.members.values():
        assert member.wait() == 0
        begin = next(n for n, line in enumerate(member.lines) if "shutting down" in line)
        lost = ("lost connection to peer", "cannot reach a peer")
        said = [line for line in member.lines[begin:] if any(text in line for text in lost)]
        assert said == [], member.tail()


# Instead of the system's, the resolver that asks the test's DNS server.
WITH_FAKE_DNS = """
    import sys
    import dns.resolver
    fake = dns.resolver.Resolver(configure=False)
    fake.nameservers, fake.port = ["127.0.0.1"], int(sys.argv.pop(1))
    dns.resolver.Resolver = lambda: fake
    from etcdlite.__main__ import main
    sys.exit(main())
"""


@pytest.fixture
def discovered(fake_dns: FakeDns, tmp_path: Path) -> Iterator[list[ServerProcess]]:
    """Three members that know each other from DNS alone."""
    ports = free_ports(3)
    fake_dns.records["_etcd-server._tcp.lab.invalid"] = [f"0 0 {p} 127.0.0.1." for p in ports]
    members = [
        ServerProcess(
            tmp_path / f"m{port}",
            [
                f"--name=m{port}",
                "--discovery-srv=lab.invalid",
                f"--listen-peer-urls=http://127.0.0.1:{port}",
                f"--initial-advertise-peer-urls=http://127.0.0.1:{port}",
            ],
            [sys.executable, "-c", textwrap.dedent(WITH_FAKE_DNS), str(fake_dns.resolver.port)],
        )
        for port in ports
    ]
    yield members
    for member in members:
        member.close()
        print(f"--- log of {member.data_dir.name}:", *member.lines[-60:], sep="\n")


def test_members_find_each_other_by_dns(discovered: list[ServerProcess]) -> None:
    for member in discovered:
        member.start()
    names = {member.data_dir.name for member in discovered}
    with Client([member.endpoint for member in discovered], timeout_s=60.0) as client:
        client.put("k", "v")
        wait_until(lambda: {m.name for m in client.members()} == names, "all names are published")
    # Only the first start asks: afterwards the data directory knows the members.
    assert discovered[0].logged("got the members from DNS")
    lines = len(discovered[0].lines)
    discovered[0].stop()
    discovered[0].start()
    assert not [li for li in discovered[0].lines[lines:] if "from DNS" in li]


def local_cluster(folder: Path, ports: list[int]) -> subprocess.Popen[str]:
    pairs = zip(ports[::2], ports[1::2], strict=True)
    members = {f"m{number}": pair for number, pair in enumerate(pairs, 1)}
    code = (
        "import sys; from etcdlite.cli import local_cluster; "
        f"local_cluster.MEMBERS = {members}; local_cluster.RESTART_S = 0.1; "
        f"sys.exit(local_cluster.main([{str(folder)!r}]))"
    )
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ETCD_NAME": "nobody"},
    )


def test_one_command_runs_a_cluster_to_try(tmp_path: Path) -> None:
    ports = free_ports(6)
    with local_cluster(tmp_path / "cluster", ports) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        shown = "".join(itertools.takewhile(lambda line: "Ctrl-C" not in line, lines))
        assert "Three members serve" in shown
        endpoints = re.search("ENDPOINTS=(.*)", shown)
        assert endpoints is not None
        with Client(endpoints[1].split(","), timeout_s=60.0) as client:
            client.put("k", "v")
            assert {member.name for member in client.members()} == {"m1", "m2", "m3"}
        killed = re.search(r"kill -9 (\d+) \(m2\)", shown)
        assert killed is not None
        os.kill(int(killed[1]), signal.SIGKILL)
        assert any("m2 was started again" in line for line in lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_cluster_to_try_goes_on_without_a_member_that_was_removed(tmp_path: Path) -> None:
    ports = free_ports(6)
    with local_cluster(tmp_path / "cluster", ports) as process:
        assert process.stdout is not None
        assert next(li for li in process.stdout if "serve" in li)
        with Client([f"127.0.0.1:{port}" for port in ports[:4:2]], timeout_s=60.0) as client:
            (third,) = (member.id for member in client.members() if member.name == "m3")

            def removed() -> bool:
                with contextlib.suppress(Unhealthy):  # All have just begun.
                    client.member_remove(third)
                    return True
                return False

            wait_until(removed, "m3 is removed")
            assert next(li for li in process.stdout if "m3 is not started again" in li)
            assert next(li for li in process.stdout if "was removed from the cluster" in li)
            client.put("k", "v")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_local_cluster_whose_port_is_in_use_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    ports = free_ports(6)
    with (
        socket.create_server(("127.0.0.1", ports[2])),
        local_cluster(tmp_path, ports) as process,
    ):
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"port {ports[2]} is taken by process {os.getpid()} (" in errors
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_a_second_cluster_to_try_says_who_has_the_ports(tmp_path: Path) -> None:
    ports = free_ports(6)
    with local_cluster(tmp_path / "cluster", ports) as first:
        assert first.stdout is not None
        assert "Three members serve" in next(li for li in first.stdout if "serve" in li)
        with local_cluster(tmp_path / "cluster", ports) as second:
            out, errors = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "serve" not in out and errors.count("is taken by process") == 6
        first.send_signal(signal.SIGHUP)
        assert first.wait(60) == 0


def test_the_members_of_a_cluster_to_try_end_with_it(tmp_path: Path) -> None:
    ports = free_ports(6)
    with local_cluster(tmp_path / "cluster", ports) as process:
        assert process.stdout is not None
        assert next(li for li in process.stdout if "serve" in li)
        process.kill()

    def all_ended() -> bool:
        for port in ports:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
                return False
        return True

    wait_until(all_ended, "all members have stopped")


def _has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as sock:
        try:
            sock.bind(("::1", 0))
        except OSError:
            return False
    return True


def test_members_have_ipv6_addresses_and_host_names(tmp_path: Path) -> None:
    if not _has_ipv6():
        pytest.skip("this machine has no ::1")
    one, two = free_ports(2)
    urls = {"m1": f"http://[::1]:{one}", "m2": f"http://localhost:{two}"}
    initial = ",".join(f"{name}={url}" for name, url in urls.items())
    members = [
        ServerProcess(
            tmp_path / name,
            [
                f"--name={name}",
                f"--listen-peer-urls={url}",
                f"--initial-advertise-peer-urls={url}",
                f"--initial-cluster={initial}",
                "--listen-client-urls=http://[::1]:0",
            ],
            (sys.executable, "-m", "etcdlite"),
        )
        for name, url in urls.items()
    ]
    try:
        for member in members:
            member.spawn()
        for member in members:
            wait_until(lambda: member.endpoint, "it serves")  # noqa: B023
            with Client(member.endpoint, timeout_s=60.0) as client:
                client.put(member.data_dir.name, "v")
        with Client(members[0].endpoint, timeout_s=60.0) as client:
            assert {kv.key for kv in client.range(prefix="m")} == {b"m1", b"m2"}

            def published() -> Any:
                found = client.call("Cluster.MemberList", proto.MemberListRequest()).members
                return found if all(m.clientURLs for m in found) else None

            found = wait_until(published, "all have published their URLs")
        assert {m.name: m.peerURLs[0] for m in found} == urls
        assert all(m.clientURLs[0].startswith("http://[::1]:") for m in found)
    finally:
        for member in members:
            member.close()
