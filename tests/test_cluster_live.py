"""Clusters of real processes under load, while members are killed, paused, cut off and replaced.

Every test ends with the check that no acknowledged write is lost and that all answers can be those
of one store (`history.py`).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.history import History, Operation
from rigs.ports import free_ports
from rigs.processes import PATIENCE_S, SMALL_FILES, ServerProcess, wait_until

from etcdlite import proto
from etcdlite.client import Client, EtcdliteError, Timeout

REQUEST_TIMEOUT_S = 3.0
KEYS = 20


class Proxy:
    """Carries bytes between members, or does not: `is_blocked` lets nothing through, either way,
    and connections stay and hang, as behind a network that drops everything. `flips` damages some
    of what is carried."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.is_blocked = False
        self.flips = 0.0
        """Share of the pieces that are carried in which one bit flips."""
        self.flipped = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._is_closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(inner,), daemon=True).start()

    def _serve(self, inner: socket.socket) -> None:
        while self.is_blocked and not self._is_closed:
            time.sleep(0.02)
        try:
            outer = socket.create_connection(("127.0.0.1", self.target), 5)
            outer.settimeout(None)
        except OSError:
            inner.close()
            return
        for source, target in ((inner, outer), (outer, inner)):
            threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                while self.is_blocked and not self._is_closed:
                    time.sleep(0.02)
                if self.flips and random.random() < self.flips:
                    self.flipped += 1
                    at = random.randrange(8 * len(data))
                    damaged = bytearray(data)
                    damaged[at // 8] ^= 1 << at % 8
                    data = bytes(damaged)
                target.sendall(data)
        except OSError:
            pass
        for sock in (source, target):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        self._is_closed = True
        self._listener.close()


class LiveCluster:
    """Members as processes. With `proxied`, what they say to each other goes through proxies."""

    scheme = "http"
    """Of the peer URLs."""

    def __init__(self, folder: Path, count: int, *flags: str, proxied: bool = False) -> None:
        self.folder = folder
        self.flags = flags
        self.members: dict[str, ServerProcess] = {}
        self.proxies: dict[str, Proxy] = {}
        self.token = "test"
        self._peer_ports: dict[str, int] = {}
        self._stopping = threading.Event()
        self._follower: threading.Thread | None = None
        self._followed: list[Any] = []
        self._is_closed = False
        self._threads: list[threading.Thread] = []
        names = [f"m{number}" for number in range(1, count + 1)]
        urls: dict[str, str] = {}
        for name, port in zip(names, free_ports(count), strict=True):
            self._peer_ports[name] = port
            if proxied:
                self.proxies[name] = Proxy(port)
            urls[name] = f"{self.scheme}://127.0.0.1:{self.proxies[name].port if proxied else port}"
        initial = ",".join(f"{name}={url}" for name, url in urls.items())
        for name in names:
            self._make(name, urls[name], initial, "new")
        for member in self.members.values():
            member.start()
        self.history = History()

    def _make(self, name: str, url: str, initial: str, state: str) -> ServerProcess:
        member = ServerProcess(
            self.folder / name,
            [
                f"--name={name}",
                f"--listen-peer-urls={self.scheme}://127.0.0.1:{self._peer_ports[name]}",
                f"--initial-advertise-peer-urls={url}",
                f"--initial-cluster={initial}",
                f"--initial-cluster-state={state}",
                f"--initial-cluster-token={self.token}",
                f"--listen-client-urls=http://127.0.0.1:{free_ports(1)[0]}",
                *self.flags,
            ],
            (sys.executable, "-m", "etcdlite"),
        )
        self.members[name] = member
        return member

    def add(self, name: str, *, is_learner: bool = False) -> ServerProcess:
        """Add a member to the cluster and start it."""
        (port,) = free_ports(1)
        self._peer_ports[name] = port
        url = f"{self.scheme}://127.0.0.1:{port}"
        request = proto.MemberAddRequest(peerURLs=[url], isLearner=is_learner)
        added = self.call("Cluster.MemberAdd", request)
        initial = [f"{m.name}={m.peerURLs[0]}" for m in added.members if m.name]
        member = self._make(name, url, ",".join([*initial, f"{name}={url}"]), "existing")
        return member.start()

    @property
    def running(self) -> list[ServerProcess]:
        return [member for member in self.members.values() if member.is_running]

    @property
    def endpoints(self) -> list[str]:
        return [member.endpoint for member in self.members.values() if member.endpoint]

    def call(self, method: str, request: Any) -> Any:
        """Ask any member, again until it is answered well."""

        def ask() -> Any:
            try:
                with Client(self.endpoints, timeout_s=REQUEST_TIMEOUT_S) as client:
                    return client.call(method, request)
            except EtcdliteError as failure:
                failures.append(failure)
                return None

        failures: list[EtcdliteError] = []
        return wait_until(ask, f"{method} is answered; {failures[-1:]}")

    def id_of(self, member: ServerProcess) -> int:
        with Client(member.endpoint, timeout_s=PATIENCE_S) as client:
            return int(client.status().member_id)

    @property
    def leader(self) -> ServerProcess:
        """The member that leads."""

        def find() -> ServerProcess | None:
            for member in self.running:
                try:
                    with Client(member.endpoint, timeout_s=1.0) as client:
                        status = client.status()
                except EtcdliteError:
                    continue
                if status.leader == status.member_id:
                    return member
            return None

        found: ServerProcess = wait_until(find, "a member leads")
        return found

    def follower(self) -> ServerProcess:
        leader = self.leader
        return next(member for member in self.running if member is not leader)

    # Load.

    def load(self, clients: int = 4) -> None:
        """Let clients put and get until `check`."""
        for number in range(clients):
            thread = threading.Thread(target=self._run_client, args=(number,), daemon=True)
            self._threads.append(thread)
            thread.start()
        self.progress(50)

    def _run_client(self, number: int) -> None:
        rng = random.Random(number)
        count = 0
        while not self._stopping.is_set():
            endpoints = list(self.endpoints)
            rng.shuffle(endpoints)
            with Client(endpoints, timeout_s=REQUEST_TIMEOUT_S) as client:
                for _ in range(50):
                    if self._stopping.is_set():
                        break
                    count += 1
                    if not self._operate(client, rng, b"%d/%d" % (number, count)):
                        break  # Try another member.

    def _operate(self, client: Client, rng: random.Random, unique: bytes) -> bool:
        key = b"key/%d" % rng.randrange(KEYS)
        if rng.random() < 0.6:
            request = proto.PutRequest(key=key, value=unique)
            operation = Operation(time.monotonic(), "put", key, unique)
            self.history.run(
                operation, lambda: (client.call("KV.Put", request).header.revision, None)
            )
        else:
            operation = Operation(time.monotonic(), "get", key, None)

            def get() -> tuple[int, bytes | None]:
                answer = client.call("KV.Range", proto.RangeRequest(key=key))
                return answer.header.revision, answer.kvs[0].value if answer.kvs else None

            self.history.run(operation, get)
        return operation.outcome == "done"

    def follow(self) -> None:
        """Watch everything from the first revision on, so that history may be compacted."""
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def _follow(self) -> None:
        with (
            Client(self.endpoints, timeout_s=REQUEST_TIMEOUT_S) as client,
            client.watch(prefix=b"key/", start_revision=1) as watch,
        ):
            while not self._is_closed:
                with contextlib.suppress(Timeout):
                    self._followed.append(watch.next_event(1.0))

    @property
    def _followed_revision(self) -> int:
        return int(self._followed[-1].kv.mod_revision) if self._followed else 0

    def compact(self) -> None:
        """Give up history that `follow` has seen."""
        revision = self._followed_revision - 100
        with contextlib.suppress(EtcdliteError), Client(self.endpoints) as client:
            client.call("KV.Compact", proto.CompactionRequest(revision=revision))

    def progress(self, operations: int = 100) -> None:
        """Wait until that many more operations are answered well."""
        target = self.history.done + operations
        logs = "\n".join(member.tail(5) for member in self.members.values())
        wait_until(lambda: self.history.done >= target, f"the cluster goes on; {logs}")

    def check(self) -> None:
        """Stop the load, and find that nothing is lost and all members agree."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        last = self.call("KV.Range", proto.RangeRequest(key=b"x")).header.revision
        if self._follower is not None:
            wait_until(lambda: self._followed_revision >= last, "the watch has seen everything")
            self.history.check(self._followed)
        for member in self.running:
            with Client(member.endpoint, timeout_s=PATIENCE_S) as client:
                wait_until(
                    lambda c=client: c.call(
                        "KV.Range", proto.RangeRequest(key=b"x", serializable=True)
                    ).header.revision >= last,
                    f"{member.data_dir.name} has everything; {member.tail()}",
                )  # fmt: skip
                if self._follower is not None:
                    continue
                events = []
                with client.watch(prefix=b"key/", start_revision=1) as watch:
                    while not events or events[-1].kv.mod_revision < last:
                        events.append(watch.next_event(PATIENCE_S))
                self.history.check(events)
        hashes = {self._hash(member, last) for member in self.running}
        assert len(hashes) == 1, f"members differ at revision {last}"

    def _hash(self, member: ServerProcess, revision: int) -> int:
        with Client(member.endpoint, timeout_s=PATIENCE_S) as client:
            request = proto.HashKVRequest(revision=revision)
            return int(client.call("Maintenance.HashKV", request).hash)

    def close(self) -> None:
        self._stopping.set()
        self._is_closed = True
        for thread in self._threads:
            thread.join(PATIENCE_S)
        for proxy in self.proxies.values():
            proxy.close()
        for member in self.members.values():
            if member.is_running:
                member.signal(signal.SIGCONT)
            member.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., LiveCluster]]:
    """Makes a `LiveCluster`."""
    made: list[LiveCluster] = []

    def make(count: int = 3, *flags: str, **options: Any) -> LiveCluster:
        made.append(LiveCluster(tmp_path, count, *flags, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
        for member in one.members.values():
            print(f"--- log of {member.data_dir.name}:", *member.lines[-60:], sep="\n")


def test_the_leader_is_killed_again_and_again(cluster: Any) -> None:
    three = cluster()
    three.load()
    for _ in range(4):
        victim = three.leader
        victim.kill()
        three.progress()
        victim.start()
        three.progress()
    three.check()


def test_a_follower_is_killed_and_comes_back(cluster: Any) -> None:
    three = cluster()
    three.load()
    for _ in range(3):
        victim = three.follower()
        victim.kill()
        three.progress()
        victim.start()
        three.progress()
    three.check()


def test_all_members_are_killed_at_once(cluster: Any) -> None:
    three = cluster()
    three.load()
    for _ in range(2):
        for member in three.members.values():
            member.signal(signal.SIGKILL)
        for member in three.members.values():
            member.wait()
        for member in three.members.values():
            member.start()
        three.progress()
    three.check()


def test_members_are_restarted_one_after_the_other(cluster: Any) -> None:
    three = cluster()
    three.load()
    for member in three.members.values():
        member.stop()
        three.progress(20)
        member.start()
        three.progress()
    three.check()


@pytest.mark.parametrize("pause_s", [3, pytest.param(10, marks=pytest.mark.long)])
def test_the_leader_is_paused(cluster: Any, pause_s: int) -> None:
    three = cluster()
    three.load()
    paused = three.leader
    paused.signal(signal.SIGSTOP)
    until = time.monotonic() + pause_s
    three.progress()
    wait_until(lambda: time.monotonic() > until, "the pause is over")
    paused.signal(signal.SIGCONT)
    three.progress(200)
    three.check()


@pytest.mark.parametrize("seconds", [6, pytest.param(120, marks=pytest.mark.long)])
def test_bits_flip_between_the_members(cluster: Any, seconds: int) -> None:
    """One of a hundred packets is damaged, with a TCP checksum that fits."""
    three = cluster(proxied=True)
    three.load()
    pids = {member.pid for member in three.running}
    for proxy in three.proxies.values():
        proxy.flips = 0.01
    until = time.monotonic() + seconds

    def is_over() -> bool:
        three.progress(20)
        flipped = sum(proxy.flipped for proxy in three.proxies.values())
        return time.monotonic() > until and flipped > 2 * seconds

    wait_until(is_over, "enough was damaged", PATIENCE_S + seconds)
    for proxy in three.proxies.values():
        proxy.flips = 0.0
    assert {member.pid for member in three.running} == pids, "no process has ended"
    wait_until(
        lambda: any("checksum" in line for member in three.running for line in member.lines),
        "the log says so",
    )
    three.check()
    request = proto.RangeRequest(key=b"\0", range_end=b"\0", serializable=True)
    keys = set()
    for member in three.running:
        with Client(member.endpoint) as client:
            answer = client.call("KV.Range", request)
            keys.add(b"".join(kv.encode() for kv in answer.kvs))
    assert len(keys) == 1


@pytest.mark.parametrize("whom", ["leader", "follower"])
def test_a_member_is_cut_off_and_reached_again(cluster: Any, whom: str) -> None:
    three = cluster(proxied=True)
    three.load()
    member = three.leader if whom == "leader" else three.follower()
    name = member.data_dir.name
    # One way: what the others send to it is held up, while it reaches them.
    three.proxies[name].is_blocked = True
    three.progress()
    # And the other way, too.
    for proxy in three.proxies.values():
        proxy.is_blocked = True
    three.proxies[name].is_blocked = whom == "follower"
    for other, proxy in three.proxies.items():
        proxy.is_blocked = other == name
    three.progress()
    for proxy in three.proxies.values():
        proxy.is_blocked = False
    three.progress(200)
    three.check()


def test_a_follower_that_was_down_for_long_gets_a_snapshot(cluster: Any) -> None:
    three = cluster(3, *SMALL_FILES)
    three.load()
    away = three.follower()
    away.kill()
    # More than the leader keeps of the log for members that are behind.
    with Client(three.endpoints, timeout_s=PATIENCE_S) as client:
        for number in range(30):
            client.put(b"ballast/%d" % number, bytes(1 << 20))
    away.spawn()
    wait_until(lambda: away.logged("receiving a snapshot"), f"a snapshot comes; {away.tail()}")
    away.kill()
    three.progress()
    away.start()
    three.progress()
    assert away.logged("installed a snapshot") or wait_until(
        lambda: away.logged("installed a snapshot"), f"the snapshot is taken; {away.tail()}"
    )
    three.check()


def test_members_are_added_promoted_and_removed_under_load(cluster: Any) -> None:
    three = cluster()
    three.load()
    learner = three.add("m4", is_learner=True)
    three.progress()
    learner_id = three.id_of(learner)
    three.call("Cluster.MemberPromote", proto.MemberPromoteRequest(ID=learner_id))
    three.progress()
    three.add("m5")
    three.progress()
    leader = three.leader
    three.call("Cluster.MemberRemove", proto.MemberRemoveRequest(ID=three.id_of(leader)))
    assert leader.wait() == 0
    assert leader.logged("this member was removed from the cluster")
    del three.members[leader.data_dir.name]
    three.progress()
    leader.spawn()
    assert leader.wait() == 2
    assert "was removed from the cluster" in leader.lines[-1]
    _, off = three.members.popitem()
    off_id = three.id_of(off)
    off.kill()
    three.call("Cluster.MemberRemove", proto.MemberRemoveRequest(ID=off_id))
    off.spawn()
    assert off.wait() == 2, "to systemd, 0 before it is ready breaks the protocol"
    assert "other members say that this one was removed" in off.lines[-1]
    three.check()


def test_a_clock_that_is_an_hour_off_changes_nothing(cluster: Any) -> None:
    faketime = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
    if not faketime.exists():
        pytest.skip("faketime is not installed (Debian: faketime)")
    three = cluster()
    three.load()
    for offset in ("+1h", "-1h"):
        member = three.follower()
        member.stop()
        member.environ = {
            "LD_PRELOAD": str(faketime),
            "FAKETIME": offset,
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        member.start()
        three.progress()
    three.check()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_half_an_hour_of_faults_leaves_everything_flat(cluster: Any) -> None:
    five = cluster(5, *SMALL_FILES, proxied=True)
    five.follow()
    five.load(6)
    rng = random.Random(int(os.environ.get("FAULT_SEED", "1")))
    minutes = float(os.environ.get("FAULT_MINUTES", "30"))
    began = time.monotonic()
    sizes: list[int] = []
    while time.monotonic() < began + 60 * minutes:
        _strike(five, rng)
        five.progress(200)
        five.compact()
        if len(five.running) == 5:
            sizes.append(max(member.rss_bytes for member in five.running))
    # Connections that were cut off are given up after a while, and files are cleaned up.
    wait_until(lambda: _open_files(five) < 100, "what is not needed is closed")
    five.check()
    third = len(sizes) // 3
    assert max(sizes[-third:]) < 1.5 * max(sizes[:third])
    for member in five.members.values():
        used = subprocess.run(
            ["du", "-sb", str(member.data_dir)], capture_output=True, text=True, check=True
        )
        assert int(used.stdout.split()[0]) < 64 << 20


def _open_files(cluster: LiveCluster) -> int:
    """Of the member that has most."""
    found = []
    for member in cluster.running:
        with urllib.request.urlopen(f"http://{member.endpoint}/metrics", timeout=10) as page:
            text = page.read().decode()
        found.append(int(float(re.search(r"^process_open_fds (\S+)", text, re.M)[1])))
    return max(found)


def _strike(five: LiveCluster, rng: random.Random) -> None:
    """One fault, and its end."""
    member = rng.choice(list(five.members.values()))
    kind = rng.choice(("kill", "stop", "pause", "cut", "kill two"))
    if kind == "kill two":
        victims = rng.sample(list(five.members.values()), 2)
        for victim in victims:
            victim.kill()
        five.progress()
        for victim in victims:
            victim.start()
    elif kind == "kill":
        member.kill()
        five.progress()
        member.start()
    elif kind == "stop":
        member.stop()
        five.progress()
        member.start()
    elif kind == "pause":
        member.signal(signal.SIGSTOP)
        five.progress()
        member.signal(signal.SIGCONT)
    else:
        proxy = five.proxies[member.data_dir.name]
        proxy.is_blocked = True
        five.progress()
        proxy.is_blocked = False
