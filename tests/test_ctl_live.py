"""etcdlite-ctl against a running etcdlite; and beside etcdctl 3.5 against etcd 3.5, where found.

The comparison runs the same command lines on both sides and compares standard output and exit
status, with what must differ masked: ids, addresses, terms, times, sizes and hashes.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
from rigs.ctl_runner import Ended, run_ctl
from rigs.ports import free_ports
from rigs.processes import PATIENCE_S, ROOT, ServerFactory, ServerProcess, wait_until
from rigs.real_etcd import distributed, running_etcd, without_settings

from etcdlite.cli import check as ctl_check
from etcdlite.cli import locks as ctl_locks
from etcdlite.cli import watch as ctl_watch
from etcdlite.cli.failures import Failure
from etcdlite.discovery import DiscoveryError

CTL = (sys.executable, "-m", "etcdlite.ctl")


def environment() -> dict[str, str]:
    return {**without_settings(), "PYTHONPATH": str(ROOT)}


# The other side.


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[str]:
    """The endpoint of a new, real etcd 3.5."""
    with running_etcd(tmp_path / "etcd") as endpoint:
        yield endpoint


Run = Callable[..., Ended]


PATIENT = {"ETCDCTL_DIAL_TIMEOUT": "60s", "ETCDCTL_COMMAND_TIMEOUT": "60s"}
"""A login takes long while the processor is busy: it gives way to everything else."""


def etcdctl(endpoint: str) -> Run:
    def run(*words: str, stdin: bytes = b"") -> Ended:
        done = subprocess.run(
            [distributed("etcdctl"), "--endpoints", endpoint, *words],
            input=stdin,
            capture_output=True,
            env={**environment(), **PATIENT},
            timeout=PATIENCE_S,
        )
        return Ended(done.returncode, done.stdout, done.stderr.decode())

    return run


def serving(server: ServerFactory, *flags: str) -> ServerProcess:
    """A new server that has published its name and URLs: its first write, before any other."""
    running: ServerProcess = server(*flags)
    with running.client() as client:
        client.delete("none")
    return running


def ctl_of(endpoint: str) -> Run:
    def run(*words: str, stdin: bytes = b"") -> Ended:
        return run_ctl("--endpoints", endpoint, *words, stdin=stdin, environ=PATIENT)

    return run


_MASKS = [
    (r"(http://)?(127\.0\.0\.1|localhost):\d+", "URL"),
    (r"\b\d{15,20}\b", "ID"),
    (r"\b[0-9a-f]{12,16}\b", "ID"),
    (r'("raft_term":|"raftTerm":|"RaftTerm" : )[1-9]\d*', r"\1TERM"),
    (r'("Took" : |"took":"|took = |\| +)[\d.]+(µs|ms|s)\b', r"\1TOOK"),
    (r"3\.\d+\.\d+", "VERSION"),
    (r'("dbSize[A-Za-z]*":|"DBSize" : )\d+', r"\1SIZE"),
    (r"\d[\d.]* k?B", "SIZE"),
    (r'("raft\w*Index":|"Raft\w*Index" : )\d+', r"\1INDEX"),
    (r'("hash":|"Hash" : |URL, )\d+', r"\1HASH"),
    (r'("ttl":|"TTL" : |remaining\()1\d\d', r"\g<1>200"),
    (r"TERM,|, 1, \d+, \d+, |, 2, \d+, \d+, ", ", STATE, "),
    (r" +\|", " |"),
    (r"\| +", "| "),
    (r"-+\+", "-+"),
    (r"\| \d+ (?=\|)", "| N "),
]


def masked(output: bytes) -> str:
    text = output.decode("utf-8", "backslashreplace")
    for pattern, mask in _MASKS:
        text = re.sub(pattern, mask, text)
    return text


# What is run: (status, command line, standard input). {lease} is a lease that was granted before.

TXN = 'mod("foo") > "0"\nvalue("foo") != "x"\n\nput foo new\nget foo\ndel foo2 --prev-kv\n\n\n'
TXN_FAILS = 'create("a") = "99"\n\nput a b\n\nput c d --prev-kv\nget f --prefix --keys-only\n\n'

PRINTED: list[tuple[int, str, str]] = [
    (0, "put foo bar", ""),
    (0, "put foo bar2 --prev-kv", ""),
    (0, "put foo2 x", ""),
    (0, "put piped", "line\nline\n"),
    (0, "get foo", ""),
    (0, "get fo --prefix", ""),
    (0, "get nokey", ""),
    (0, "get foo --hex", ""),
    (0, "get fo --prefix --limit 1", ""),
    (0, "get fo --prefix --keys-only", ""),
    (0, "get foo fop --sort-by MODIFY --order DESCEND", ""),
    (0, "get a --from-key", ""),
    (0, "get foo --rev 2", ""),
    (0, "get foo --consistency s", ""),
    (1, "get foo --rev 1000", ""),
    (0, "put leased v --lease {lease}", ""),
    (0, "get leased", ""),
    (0, "lease timetolive {lease}", ""),
    (0, "lease timetolive {lease} --keys", ""),
    (0, "lease keep-alive --once {lease}", ""),
    (2, "lease keep-alive --once 123", ""),
    (0, "lease keep-alive 123", ""),
    (0, "lease list", ""),
    (0, "lease grant 100", ""),
    (1, "lease grant 99999999999", ""),
    (0, "lease revoke {lease}", ""),
    (1, "lease revoke {lease}", ""),
    (0, "lease timetolive {lease}", ""),
    (1, "put foo z --lease 123", ""),
    (0, "put foo --ignore-value", ""),
    (0, "put foo y --ignore-lease", ""),
    (1, "put none y --ignore-lease", ""),
    (0, "txn", TXN),
    (0, "txn", TXN_FAILS),
    (0, "txn", "\n\n\n"),
    (0, "txn", "\nget foo --count-only\n\n\n"),
    (1, "txn", "\nput foo 1\nput foo 2\n\n\n"),
    (0, "txn -i", TXN),
    (0, "alarm list", ""),
    (0, "member list", ""),
    (0, "member list --hex", ""),
    (0, "endpoint health", ""),
    (0, "endpoint health --cluster", ""),
    (0, "endpoint status", ""),
    (0, "endpoint hashkv", ""),
    (0, "compaction 5", ""),
    (1, "compaction 5", ""),
    (1, "compaction 99999", ""),
    (1, "get foo --rev 2", ""),
    (0, "defrag", ""),
    (0, "del foo2", ""),
    (0, "del foo --prev-kv", ""),
    (0, "del nokey --prev-kv", ""),
    (0, "lock l1 true", ""),
    (7, "lock l1 -- sh -c 'exit 7'", ""),
]

PLAIN: list[tuple[int, str, str]] = [
    (128, "put", ""),
    (128, "put key", ""),
    (128, "get", ""),
    (128, "get a b --prefix", ""),
    (128, "del a b c", ""),
    (4, "get a --order x", ""),
    (128, "get a --count-only", ""),
    (3, "txn", "bogus\n\n\n\n"),
    (3, "txn", "\nbogus a\n\n\n"),
    (3, "txn", "\nput a b\n"),
    (128, "compaction", ""),
    (128, "lease grant x", ""),
    (128, "lease revoke zz", ""),
    (128, "watch", ""),
    (128, "lock", ""),
    (128, "elect e", ""),
    (5, "snapshot save /nonexistent/x", ""),
    (1, "snapshot status /nonexistent", ""),
    (4, "get a -w bogus", ""),
    (4, "get a -w table", ""),
    (0, "get a --prefix --print-value-only", ""),
    (0, "alarm disarm", ""),
]


def run_script(
    run: Run, output_format: str, script: list[tuple[int, str, str]]
) -> list[tuple[str, Ended]]:
    """Each command line with how it ended, on a new store."""
    lease = run("lease", "grant", "200").stdout.decode().split()[1]
    ended = []
    for _, line, stdin in script:
        words = shlex.split(line.format(lease=lease))
        ended.append((line, run("-w", output_format, *words, stdin=stdin.encode())))
    return ended


def script_for(output_format: str) -> list[tuple[int, str, str]]:
    return PRINTED + PLAIN if output_format == "simple" else PRINTED


@pytest.mark.parametrize("output_format", ["simple", "json", "fields"])
def test_every_command_ends_as_it_should_on_etcdlite(
    server: ServerFactory, output_format: str
) -> None:
    script = script_for(output_format)
    ended_all = run_script(ctl_of(server().endpoint), output_format, script)
    for (status, _, _), (line, ended) in zip(script, ended_all, strict=True):
        assert ended.status == status, (line, ended)
        if status == 0:
            assert ended.stderr == "", (line, ended)
        else:
            assert ended.stderr.startswith("Error: "), (line, ended)
            assert ended.stderr.count("\n") == 1, (line, ended)
        if output_format == "json" and ended.stdout.startswith(b"{"):
            json.loads(ended.stdout)


@pytest.mark.parametrize("output_format", ["simple", "json", "fields"])
def test_output_and_status_are_etcdctls(
    server: ServerFactory, etcd: str, output_format: str
) -> None:
    script = script_for(output_format)
    ours = run_script(ctl_of(server().endpoint), output_format, script)
    theirs = run_script(etcdctl(etcd), output_format, script)
    differing = [
        f"{line}\n  etcdlite-ctl {seen}\n  etcdctl      {expected}"
        for (line, our), (_, their) in zip(ours, theirs, strict=True)
        if (seen := (our.status, masked(our.stdout)))
        != (expected := (their.status, masked(their.stdout)))
    ]
    assert not differing, "\n".join(differing)


@pytest.mark.parametrize(
    "line", ["member list", "endpoint status", "endpoint health", "endpoint hashkv"]
)
def test_tables_are_etcdctls(server: ServerFactory, etcd: str, line: str) -> None:
    ours, theirs = (
        run("-w", "table", *line.split())
        for run in (ctl_of(serving(server).endpoint), etcdctl(etcd))
    )
    assert masked(ours.stdout) == masked(theirs.stdout)


# Commands that go on until a signal.


class Running:
    """A process whose output is looked at while it runs."""

    def __init__(self, command: Sequence[str], *words: str) -> None:
        # Under nohup it would be ignored in this process, too.
        hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        self.process = subprocess.Popen(
            [*command, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        signal.signal(signal.SIGHUP, hangup)
        self.stdout = b""
        self.stderr = b""
        self._readers = [
            threading.Thread(target=self._read, args=(name,), daemon=True)
            for name in ("stdout", "stderr")
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        file = getattr(self.process, name)
        while data := os.read(file.fileno(), 1 << 16):
            setattr(self, name, getattr(self, name) + data)

    def wait_for(self, text: bytes) -> None:
        wait_until(lambda: text in self.stdout, f"{text!r} is printed, after {self.stdout!r}")

    def type(self, text: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def end(self, signum: int | None = None) -> Ended:
        if signum is not None:
            self.process.send_signal(signum)
        else:
            assert self.process.stdin is not None
            self.process.stdin.close()
        status = self.process.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join()
        return Ended(status, self.stdout, self.stderr.decode())


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Starts `etcdlite-ctl`; what still runs at the end is killed."""
    running: list[Running] = []

    def make(endpoint: str, *words: str, command: Sequence[str] = CTL) -> Running:
        running.append(Running([*command, "--endpoints", endpoint], *words))
        return running[-1]

    yield make
    for one in running:
        one.process.kill()
        one.end(signal.SIGKILL)


Start = Callable[..., Running]

SHOW_EVENT = "echo $ETCD_WATCH_EVENT_TYPE $ETCD_WATCH_KEY $ETCD_WATCH_VALUE $ETCD_WATCH_REVISION"


def _three_events(run: Run) -> None:
    run("put", "foo", "bar")
    run("put", "foo", "bar2")
    run("del", "foo")


@pytest.mark.parametrize(
    ("words", "last", "stdout"),
    [
        (("--rev", "2"), b"DELETE\nfoo\n\n", b"PUT\nfoo\nbar\nPUT\nfoo\nbar2\nDELETE\nfoo\n\n"),
        (
            ("--rev=3", "--prev-kv"),
            b"DELETE\nfoo\nbar2\nfoo\n\n",
            b"PUT\nfoo\nbar\nfoo\nbar2\nDELETE\nfoo\nbar2\nfoo\n\n",
        ),
        (
            ("--rev", "4", "--hex", "--", "sh", "-c", SHOW_EVENT),
            b'"DELETE" "foo" "" 4\n',
            b'DELETE\n\\x66\\x6f\\x6f\n\n"DELETE" "foo" "" 4\n',
        ),
        (
            ("--rev", "4", "-w", "fields"),
            b'"Lease" : 0\n',
            None,
        ),
        (("--rev", "4", "-w", "json"), b"}\n", None),
    ],
)
def test_watch_prints_events_as_etcdctl_does(
    server: ServerFactory,
    request: pytest.FixtureRequest,
    start: Start,
    words: tuple[str, ...],
    last: bytes,
    stdout: bytes | None,
) -> None:
    endpoint = server().endpoint
    _three_events(ctl_of(endpoint))
    watch = start(endpoint, "watch", "foo", *words)
    watch.wait_for(last)
    ended = watch.end(signal.SIGINT)
    assert (ended.status, ended.stderr) == (-signal.SIGINT, "")
    if stdout is not None:
        assert ended.stdout == stdout
    other = request.getfixturevalue("etcd")  # Skips the rest where there is none.
    _three_events(etcdctl(other))
    theirs = start(other, "watch", "foo", *words, command=[distributed("etcdctl")])
    theirs.wait_for(last)
    assert masked(ended.stdout) == masked(theirs.end(signal.SIGINT).stdout)


def test_a_watch_whose_command_fails_ends_and_tells_which(
    server: ServerFactory, start: Start
) -> None:
    endpoint = server().endpoint
    ctl_of(endpoint)("put", "foo", "bar")
    ended = run_ctl("--endpoints", endpoint, "watch", "foo", "--rev=1", "--", "sh", "-c", "exit 3")
    assert ended == (
        1,
        b"PUT\nfoo\nbar\n",
        'Error: command ["sh" "-c" "exit 3"] error (exit status 3)\n',
    )


def test_a_watch_from_before_the_compaction_is_refused_by_name(server: ServerFactory) -> None:
    endpoint = server().endpoint
    _three_events(ctl_of(endpoint))
    ctl_of(endpoint)("compaction", "4")
    assert run_ctl("--endpoints", endpoint, "watch", "foo", "--rev", "2") == (
        5,
        b"",
        "Error: watch is canceled by the server: etcdserver: mvcc: required revision has been "
        f"compacted (endpoint {endpoint})\n",
    )


def test_a_watch_goes_on_after_the_server_has_restarted(
    server: ServerFactory, start: Start
) -> None:
    port = free_ports(1)[0]
    endpoint = f"127.0.0.1:{port}"
    running: ServerProcess = server(f"--listen-client-urls=http://{endpoint}")
    ctl = ctl_of(endpoint)
    ctl("put", "foo", "1")
    watch = start(endpoint, "watch", "foo", "--rev=1")
    watch.wait_for(b"PUT\nfoo\n1\n")
    running.restart()
    ctl("put", "foo", "2")
    ctl("put", "foo", "3")
    watch.wait_for(b"PUT\nfoo\n3\n")
    ended = watch.end(signal.SIGINT)
    assert ended.stdout == b"PUT\nfoo\n1\nPUT\nfoo\n2\nPUT\nfoo\n3\n"
    assert endpoint in ended.stderr and ended.stderr.endswith("; reconnecting\n")


def test_interactive_watches_share_a_stream_and_tell_what_is_wrong(
    server: ServerFactory, start: Start
) -> None:
    endpoint = server().endpoint
    ctl = ctl_of(endpoint)
    ctl("put", "a", "1")
    ctl("put", "b1", "2")
    watch = start(endpoint, "watch", "-i")
    watch.type(b"watch a --rev=1\nbogus\nwatch\nwatch c --bogus\n")
    watch.wait_for(b"PUT\na\n1\n")
    watch.type(b'watch "b" --prefix --rev=1 -- echo ran\n')
    watch.wait_for(b"PUT\nb1\n2\nran\n")
    ctl("put", "a", "3")
    watch.wait_for(b"PUT\na\n3\n")
    watch.type(b"progress\n")
    watch.wait_for(b"progress notify: 4\n")
    ended = watch.end()
    assert ended.status == 3
    assert ended.stderr.splitlines() == [
        "Invalid command bogus (watch and progress supported)",
        "Invalid command watch (bad number of arguments)",
        "Invalid command watch c --bogus (unknown flag: --bogus)",
        "Error: error reading watch request line: EOF",
    ]


def test_a_command_with_a_nul_is_no_traceback(server: ServerFactory, start: Start) -> None:
    """A line can have one, in double quotes."""
    endpoint = server().endpoint
    ctl_of(endpoint)("put", "a", "1")
    watch = start(endpoint, "watch", "-i")
    watch.type(b'watch a --rev=1 -- "echo\\x00"\n')
    # Without this, the end of the input could come first.
    wait_until(lambda: b"\n" in watch.stderr, "the command fails")
    ended = watch.end()
    assert (ended.status, ended.stdout) == (1, b"PUT\na\n1\n")
    assert ended.stderr == (
        'Error: command ["echo\\x00"] error (exec echo\\x00: embedded null byte)\n'
    )


@pytest.mark.parametrize(
    "failure", [DiscoveryError("no servers"), Failure("it ended", 5), OSError(28, "disk full")]
)
def test_what_ends_interactive_watches_ends_the_command(failure: Exception) -> None:
    """Without an end of standard input, which the command is reading."""
    read_end, write_end = os.pipe()
    with open(write_end, "wb", 0) as writer, open(read_end) as stdin:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # As in a job in the background.
        writer.write(b"watch a\n")
        watcher = Mock()
        watcher.run.side_effect = failure
        with patch("sys.stdin", stdin), pytest.raises(type(failure)) as raised:
            ctl_watch._watch_interactively(watcher)
        signal.signal(signal.SIGINT, before)
    assert raised.value is failure


def test_a_lock_is_held_until_the_signal_and_then_the_next_one_has_it(
    server: ServerFactory, start: Start
) -> None:
    endpoint = server().endpoint
    first = start(endpoint, "lock", "job")
    first.wait_for(b"job/")
    second = start(endpoint, "lock", "job", "--", "sh", "-c", 'echo "$ETCD_LOCK_KEY"; exit 5')
    third = start(endpoint, "lock", "job")
    ctl = ctl_of(endpoint)

    def in_line() -> int:
        return len(ctl("get", "job/", "--prefix", "--keys-only").stdout.split())

    wait_until(lambda: in_line() == 3, "all three stand in line")
    # Who waits and is told to stop leaves the line.
    ended = third.end(signal.SIGTERM)
    assert ended == (1, b"", "Error: context canceled\n")
    wait_until(lambda: in_line() == 2, "the third has left the line")
    assert second.stdout == b""
    ended = first.end(signal.SIGTERM)
    assert (ended.status, ended.stderr) == (0, "")
    assert re.fullmatch(rb"job/[0-9a-f]+\n\n", ended.stdout)
    second.wait_for(b"job/")
    ended = second.end()
    assert (ended.status, ended.stderr) == (5, "Error: exit status 5\n")
    assert ctl("get", "job/", "--prefix").stdout == b""
    assert ctl("lease", "list").stdout == b"found 0 leases\n"


def test_a_lock_whose_lease_is_revoked_ends(server: ServerFactory, start: Start) -> None:
    endpoint = server().endpoint
    lock = start(endpoint, "lock", "job", "--ttl=2")
    lock.wait_for(b"job/")
    ctl_of(endpoint)("lease", "revoke", lock.stdout.split(b"/")[1].split()[0].decode())
    wait_until(lambda: lock.process.poll() is not None, "the lock notices that it is lost")
    ended = lock.end()
    assert ended.status == 1
    assert ended.stderr == f"Error: session expired (endpoint {endpoint})\n"


def test_a_signal_that_is_missed_by_a_wait_ends_the_holding_soon() -> None:
    """A signal between Python's last look for one and the wait in C does not end the wait."""
    waits: list[float | None] = []

    def wait_lost(timeout_s: float | None = None) -> bool:
        waits.append(timeout_s)
        if len(waits) == 3:
            raise KeyboardInterrupt  # As Python does when the wait has ended.
        return False

    place = Mock(key=b"k")
    place.lease.wait_lost = wait_lost
    ctl_locks._hold(Mock(), place, ())
    assert waits == [ctl_locks.SIGNAL_CHECK_S] * 3 and ctl_locks.SIGNAL_CHECK_S <= 1.0
    place.release.assert_called_once_with()


def test_leaders_are_elected_and_observed(server: ServerFactory, start: Start) -> None:
    endpoint = server().endpoint
    observer = start(endpoint, "elect", "-l", "office")
    first = start(endpoint, "elect", "office", "ann")
    first.wait_for(b"\nann\n")
    observer.wait_for(b"\nann\n")
    second = start(endpoint, "elect", "office", "bob")
    assert first.end(signal.SIGINT).status == 0
    second.wait_for(b"\nbob\n")
    observer.wait_for(b"\nbob\n")
    assert second.end(signal.SIGTERM).status == 0
    ended = observer.end(signal.SIGINT)
    assert (ended.status, ended.stderr) == (0, "")
    assert re.fullmatch(rb"office/[0-9a-f]+\nann\noffice/[0-9a-f]+\nbob\n", ended.stdout)


def test_a_lease_is_kept_alive_until_it_is_revoked(server: ServerFactory, start: Start) -> None:
    endpoint = server().endpoint
    ctl = ctl_of(endpoint)
    lease = ctl("lease", "grant", "2").stdout.decode().split()[1]
    line = f"lease {lease} keepalived with TTL(2)\n".encode()
    keeper = start(endpoint, "lease", "keep-alive", lease)
    keeper.wait_for(line * 5)
    ctl("lease", "revoke", lease)
    keeper.wait_for(f"lease {lease} expired or revoked.\n".encode())
    ended = keeper.end()
    assert (ended.status, ended.stderr) == (0, "")


# Snapshots, checks, failures.


def test_a_snapshot_is_saved_described_and_restored(server: ServerFactory, tmp_path: Path) -> None:
    running: ServerProcess = server()
    ctl = ctl_of(running.endpoint)
    for number in range(20):
        ctl("put", f"key{number}", "v" * 1000)
    path, data_dir = str(tmp_path / "backup.db"), str(tmp_path / "restored")
    assert ctl("snapshot", "save", path) == (0, f"Snapshot saved at {path}\n".encode(), "")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert not os.path.exists(path + ".part")
    shown = json.loads(run_ctl("snapshot", "status", path, "-w", "json").stdout)
    assert (shown["revision"], shown["totalKey"]) == (21, 20)
    assert shown["totalSize"] == os.path.getsize(path)
    table = run_ctl("snapshot", "status", path, "-w", "table").stdout
    assert re.match(rb"\+-+\+----------\+------------\+------------\+\n\| +HASH ", table)
    ended = run_ctl("snapshot", "restore", path, "--data-dir", data_dir)
    assert (ended.status, ended.stdout) == (0, b"")
    assert f"etcdlite --data-dir {data_dir}" in ended.stderr
    again = run_ctl("snapshot", "restore", path, "--data-dir", data_dir)
    assert again.status == 1 and again.stderr.startswith("Error: ")
    named = run_ctl("snapshot", "restore", path, "--data-dir", f"{data_dir}-m1", "--name", "m1")
    assert named.status == 0, "without --initial-cluster the member is alone"
    restored = server(data_dir=Path(data_dir))
    ours = ctl_of(restored.endpoint)("get", "", "--prefix").stdout
    assert ours == ctl("get", "", "--prefix").stdout


def test_a_snapshot_of_a_failing_disk_is_not_saved(server: ServerFactory, tmp_path: Path) -> None:
    running: ServerProcess = server("--segment-bytes=16384", "--checkpoint-bytes=65536")
    with running.client() as client:
        for number in range(200):
            client.put(f"key{number}", "v" * 1000)
    running.stop()
    segment = min((running.data_dir / "member" / "data").glob("*.seg"))
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    running.start()
    path = tmp_path / "backup.db"
    ended = ctl_of(running.endpoint)("snapshot", "save", str(path))
    assert ended.status == 1 and ended.stdout == b""
    assert segment.name in ended.stderr and "make one of another member" in ended.stderr
    assert not list(tmp_path.glob("backup*"))


def test_check_perf_measures_and_leaves_nothing_behind(
    server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctl_check, "CHECK_SECONDS", 1)
    ctl = ctl_of(server().endpoint)
    ended = ctl("check", "perf", "--auto-compact", "--auto-defrag")
    shown = masked(ended.stdout)
    assert ended.stderr == "" and ended.status in (0, 1)
    assert re.match(
        r"Compacting with revision (\d+)\nCompacted with revision \1\n"
        r'Defragmenting "URL"\nDefragmented "URL"\n',
        shown,
    )
    assert re.search(r"Throughput (is|too low:) \d+ writes/s\n", shown)
    assert shown.endswith(("\nPASS\n", "\nFAIL\n"))
    assert ctl("get", "", "--prefix").stdout == b""


ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("signum", ENDING)
def test_an_interrupted_check_leaves_nothing_behind(
    server: ServerFactory, start: Start, signum: signal.Signals
) -> None:
    endpoint = server().endpoint
    ctl = ctl_of(endpoint)
    running = start(endpoint, "check", "perf")
    wait_until(lambda: ctl("get", "", "--prefix", "--limit=1").stdout, "the check puts keys")
    assert running.end(signum) == (-signum, b"", "")
    assert ctl("get", "", "--prefix").stdout == b""


@pytest.mark.parametrize("signum", ENDING)
def test_an_interrupted_snapshot_leaves_nothing_behind(
    start: Start, tmp_path: Path, signum: signal.Signals
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        path = tmp_path / "backup.db"
        running = start(endpoint, "snapshot", "save", str(path), "--dial-timeout=1m")
        connected, _ = silent.accept()
        assert list(tmp_path.glob("backup*")), "the snapshot is begun"
        assert running.end(signum) == (-signum, b"", "")
        connected.close()
        assert not list(tmp_path.glob("backup*"))


def test_a_backup_through_a_pipe_is_whole(server: ServerFactory, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "etcdlite.ctl", f"--endpoints={server().endpoint}"]
    done = subprocess.run([*command, "snapshot", "save", "/dev/stdout"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"Snapshot saved at /dev/stdout\n")
    (tmp_path / "backup.db").write_bytes(done.stdout)
    assert run_ctl("snapshot", "status", str(tmp_path / "backup.db")).status == 0


def test_a_restored_member_starts_as_it_is_said(
    server: ServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "backup.db")
    assert ctl_of(server().endpoint)("snapshot", "save", path).status == 0
    for number, (words, command) in enumerate((
        (["--wal-dir", "{dir}-wal"], "etcdlite --data-dir {dir} --wal-dir {dir}-wal"),
        (
            ["--wal-dir", "{dir}/member/wal"],  # Where it is anyway.
            "etcdlite --data-dir {dir} --wal-dir {dir}/member/wal",
        ),
        (
            ["--initial-advertise-peer-urls", "http://127.0.0.1:1"],
            "etcdlite --data-dir {dir} --listen-peer-urls http://127.0.0.1:1",
        ),
        (
            ["--initial-advertise-peer-urls", "https://a.lab:1"],
            "etcdlite --data-dir {dir}, and the settings for https://a.lab:1",
        ),
    )):  # fmt: skip
        target = str(tmp_path / f"restored{number}")
        flags = [word.format(dir=target) for word in words]
        ended = run_ctl("snapshot", "restore", path, "--data-dir", target, *flags)
        assert ended.stderr.endswith(f"start the server with: {command.format(dir=target)}\n")
    if os.geteuid() == 0:  # The service's directory, as root sees it.
        (tmp_path / "service").mkdir()
        os.chown(tmp_path / "service", 65534, 65534)
        target = str(tmp_path / "service" / "m1")
        ended = run_ctl(
            "snapshot", "restore", path, "--data-dir", target, f"--wal-dir={target}-wal"
        )
        todo = f"chown -R {pwd.getpwuid(65534).pw_name}: {target} {target}-wal"
        assert f"if the server runs as {pwd.getpwuid(65534).pw_name}: {todo}\n" in ended.stderr
    for name in ("", "a=b", "a,b", "a/b", "a\nb"):  # The command would be refused.
        target = str(tmp_path / "unnamed")
        ended = run_ctl("snapshot", "restore", path, "--data-dir", target, f"--name={name}")
        assert ended.status == 1 and "not a name for a member" in ended.stderr, ended
        assert ended.stderr.startswith("Error: --name ") and not os.path.exists(target)
    monkeypatch.chdir(tmp_path)
    ended = run_ctl("snapshot", "restore", path, "--data-dir", "default", "--wal-dir", "logs")
    assert ended.stderr.endswith("with: etcdlite --data-dir default --wal-dir logs\n")


def test_a_backup_that_does_not_fit_names_its_file(server: ServerFactory) -> None:
    ended = ctl_of(server().endpoint)("snapshot", "save", "/dev/full")
    text = "Error: could not save to /dev/full: no space left on device\n"
    assert ended == (5, b"", text)


def test_a_client_at_the_peer_port_is_told_so(server: ServerFactory) -> None:
    (port,) = free_ports(1)
    running = server(f"--listen-peer-urls=http://127.0.0.1:{port}")
    ended = ctl_of(f"127.0.0.1:{port}")("get", "k")
    assert ended.status == 1 and "it is a port for the other members" in ended.stderr
    running.wait_for_log("give a client the URL of the client port")


def test_check_datascale_tells_how_memory_grew(
    server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = {"before": 10.0 * (1 << 20), "after": 12.5 * (1 << 20)}
    monkeypatch.setattr(ctl_check, "_resident_bytes", lambda session, when: resident[when])
    monkeypatch.setitem(ctl_check.SCALE_LOADS, "s", ctl_check.Load(300, 50))
    ctl = ctl_of(server().endpoint)
    assert ctl("check", "datascale") == (
        0,
        b"Start data scale check for work load [300 key-value pairs, 1024 bytes per key-value, "
        b"50 concurrent clients].\nPASS: Approximate system memory used : 2.50 MB.\n",
        "",
    )
    assert ctl("get", "", "--prefix").stdout == b""


@pytest.mark.parametrize(
    "line",
    [
        "put a b",
        "get a",
        "txn",
        "watch a",
        "lease list",
        "lease grant 5",
        "lease keep-alive 5",
        "member list",
        "alarm disarm",
        "defrag",
        "endpoint health",
        "endpoint status",
        "endpoint hashkv --cluster",
        "snapshot save {path}",
        "lock l",
        "elect e p",
        "elect -l e",
        "check perf",
    ],
)
def test_a_server_that_is_not_there_is_named_with_the_cause(tmp_path: Path, line: str) -> None:
    endpoint = f"127.0.0.1:{free_ports(1)[0]}"
    words = line.format(path=tmp_path / "backup.db").split()
    ended = run_ctl("--endpoints", endpoint, *words, stdin=b"\n\n\n")
    assert ended.status == (5 if words[0] == "snapshot" else 1)
    assert ended.stdout == b""
    assert endpoint in ended.stderr and "connection refused" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("signum", ENDING)
def test_a_signal_does_not_wait_for_endpoints_that_are_silent(start: Start, signum: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        timeouts = ("--dial-timeout=600s", "--command-timeout=600s")
        status = start(endpoint, "endpoint", "status", *timeouts)
        connection, _ = silent.accept()
        with connection:
            assert status.end(signum).status == -signum


def test_a_server_that_says_nothing_costs_the_dial_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        ended = run_ctl("--endpoints", endpoint, "--dial-timeout=50ms", "get", "a")
    assert (ended.status, ended.stdout) == (1, b"")
    assert endpoint in ended.stderr and "no connection within 0.05 s" in ended.stderr


def test_each_listener_on_port_0_is_advertised_with_its_own_port(server: ServerFactory) -> None:
    running = serving(server, "--listen-client-urls=http://127.0.0.1:0,http://127.0.0.2:0")
    listed = ctl_of(running.endpoint)("member", "list", "-w", "json").stdout
    (member,) = json.loads(listed)["members"]
    urls = member["clientURLs"]
    assert [re.sub(r":\d+$", "", url) for url in urls] == ["http://127.0.0.1", "http://127.0.0.2"]
    for url in urls:
        assert run_ctl("--endpoints", url, "get", "a").status == 0, url


def test_debug_tells_each_request_on_standard_error(server: ServerFactory) -> None:
    endpoint = server().endpoint
    ended = run_ctl("--endpoints", endpoint, "--debug", "put", "a", "b")
    assert (ended.status, ended.stdout) == (0, b"OK\n")
    assert ended.stderr.startswith(f"debug: KV.Put to {endpoint}, ")
