"""etcd's own tests, those of Debian 13's etcd 3.5.16, with etcdlite as the server.

They are Go programs, which `tests/etcd_suite/build.sh` makes. `e2e` starts servers, etcdctl and
etcdutl, as a shell does. The others are etcd's tests/integration: the API, the Go client, its locks
and elections, and the library of the gRPC proxy; `tests/etcd_suite` has what takes the place of the
servers within their process. Each test runs in a network of its own, since ports are fixed. All
take up to an hour: `make test-long`. With STORE=/usr/bin/etcd in the environment, etcd is tested.
On a later Debian, `build.sh` makes the tests of its etcd, up to 3.5.30, and SUITE_TESTS names them.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILT = Path(os.environ.get("SUITE_TESTS") or ROOT / "build" / "etcd-tests")
TIMEOUT_S = 240
SHOWN_CHARS = 20_000

TRIES = 2
"""Some tests wait for a second or two only, and fail on a busy machine with any server."""

IN_A_NETWORK = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""A network and processes that end with the test."""

PROGRAMS = (
    "e2e",
    "integration",
    "clientv3",
    "concurrency",
    "connectivity",
    "examples",
    "grpcproxy",
    "lease",
    "naming",
    "recipes",
)

V2 = "it uses the API v2"
DATA_FILE = "it opens etcd's data file, member/snap/db"
LOG = "it reads etcd's log"
VERSION = "it wants version 3.5.16; etcdlite says 3.6.0"
OTHER_RELEASE = "it starts another release of etcd on the data"
INSIDE = "it looks into the server's process"
SOCKETS = "it uses unix sockets"
PROXY = "it starts etcd's grpc-proxy or gateway"
RESPONSES = "it counts responses of a watch; here one may have the events of several revisions"

LEFT_OUT = {
    "e2e/Test(Utl)?CtlV2.*": V2,
    "e2e/TestV2.*": V2,
    "e2e/TestEtcdPeer(Name|CN|MultiCN)Auth": LOG,
    "e2e/TestBootstrapDefragFlag": LOG,
    "e2e/TestCompactHashCheckDetectCorruptionInterrupt": LOG,
    "e2e/TestAuthority": LOG,
    "e2e/TestWatchDelay.*": "it wants events within 150 ms at full load, from any machine",
    "integration/TestIssue2904": V2,
    "integration/TestV3LeaseCheckpoint": "no flag sets how often remaining times are stored",
    "clientv3/TestWatchMultiWatcher": RESPONSES,
}
"""Patterns of PROGRAM/TEST that are not run, and why. Most would take minutes to fail."""

FAILS = {
    "e2e/TestConnectionMultiplexing": V2,
    "e2e/Test(EtcdCorruptHash|PeriodicCheckDetects.*|CompactHashCheckDetectCorruption)": DATA_FILE,
    "e2e/TestCtlV3DefragOffline(Etcdutl)?": DATA_FILE,
    "e2e/Test(Issue6361(etcdutl)?|RestoreCompactionRevBump)": DATA_FILE,
    "e2e/Test(ClusterVersion|V3Metrics(Secure|Insecure)|V3CurlCipherSuitesValid)": VERSION,
    "e2e/TestV3Curl_MaxStreams_ReachLimit_.*": "all requests over HTTP share a connection in etcd",
    "e2e/TestHTTPLivezReadyzHandler": DATA_FILE,
    "e2e/TestV3CurlMaintenanceHash": "it wants term 2; a cluster begins with term 1 here",
    "e2e/TestV3CurlTxn": "with Debian's gateway library it writes wrong JSON",
    "e2e/TestMixVersionsSnapshotByAddingMember": OTHER_RELEASE,
    "e2e/TestEtcdUnixPeers": SOCKETS,
    "e2e/Test(EtcdListenMetricsURLsWithMissingClientTLSInfo|ServerJsonLogging)": LOG,
    "e2e/TestConnectionRejectMessage": LOG,
    "e2e/Test(GrpcproxyAndCommonName|GrpcProxyAutoSync|Gateway)": PROXY,
    "integration/Test(TLS)?ClusterOf[13]UsingDiscovery": V2,
    "integration/Test(ForceNewCluster|Issue3699|SnapshotAndRestartMember)": V2,
    "integration/TestFirstCommitNotification": INSIDE,
    "integration/TestRestartRemoved": "a member is set not to check the cluster's health; here the "
    "leader's setting counts",
    "integration/TestV3WatchRestoreSnapshotUnsync": "a snapshot is needed after more entries here",
    "integration/TestV3CorruptAlarm(WithLeaseCorrupted)?": DATA_FILE,
    "clientv3/TestCompactionHash": "it asks a URL that only etcd has for peers",
    "clientv3/TestMaintenanceSnapshotErrorInflight": DATA_FILE,
    "clientv3/TestWatchFragment(Disable|Enable).*": RESPONSES,
    "clientv3/TestKVForLearner": "a learner answers serializable transactions here",
    "connectivity/TestDropReadUnderNetworkPartition": "a read waits for the next leader here",
}
"""Patterns of PROGRAM/TEST that must fail, and why: one that passes is reported."""

FAILS_SINCE_3_5_16 = {
    "e2e/TestCtlV3PromotingLearner": SOCKETS,
    "e2e/TestForceNewCluster_MemberCount": DATA_FILE,
    "e2e/Test(EtcdDeprecatedFlags|NoErrorLogsDuringNormalOperations)": LOG,
    "e2e/TestGrpcProxyTLSVersions": PROXY,
    "integration/TestRemoveMemberAndWALReplay": V2,
    "integration/TestV3AuthMemberListAndStatus": "Status needs no user here",
}
"""The same of tests that 3.5.16 does not have."""

MUST_FAIL = FAILS | FAILS_SINCE_3_5_16


def reason_of(name: str, table: dict[str, str]) -> str:
    return next((why for pattern, why in table.items() if re.fullmatch(pattern, name)), "")


@cache
def names() -> list[str]:
    """PROGRAM/TEST of all tests that are built."""
    found = []
    for program in PROGRAMS:
        binary = BUILT / f"{program}.test"
        if binary.exists():
            command = [binary, "-test.list=."]
            listed = subprocess.run(command, capture_output=True, cwd=BUILT, text=True, check=True)
            tests = re.findall(r"^(?:Test|Example)\w+$", listed.stdout, re.M)
            found += [f"{program}/{test}" for test in tests]
    return found


def cases() -> list[object]:
    if not names():
        missing = f"no {BUILT}: tests/etcd_suite/build.sh {BUILT} makes it (root, Debian's Go)"
        return [pytest.param("", marks=pytest.mark.skip(missing))]
    made = []
    for name in names():
        marks = []
        if why := reason_of(name, LEFT_OUT):
            marks.append(pytest.mark.skip(why))
        elif "STORE" not in os.environ and (why := reason_of(name, MUST_FAIL)):
            marks.append(pytest.mark.xfail(strict=True, reason=why))
        made.append(pytest.param(name, marks=marks))
    return made


@cache
def network() -> list[str]:
    """What runs a program in a network of its own; empty if the system does not allow it."""
    for options in ([], ["--map-root-user"]):
        command = [*IN_A_NETWORK, *options, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        if not subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
            return command
    return []


def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Makes the folder of programs and the one to run in, where certificates are found above."""
    programs = tmp_path / "bin"
    programs.mkdir()
    store = programs / "etcd"
    words = [os.environ["STORE"]] if "STORE" in os.environ else [sys.executable, "-m", "etcdlite"]
    store.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    store.chmod(0o755)
    for tool in ("etcdctl", "etcdutl"):
        (programs / tool).symlink_to(BUILT / tool)
    inside = tmp_path / "1" / "2" / "3"
    inside.mkdir(parents=True)
    for above in (tmp_path, inside.parent):
        (above / "fixtures").symlink_to(BUILT / "fixtures")
    for above in (inside.parent.parent, inside):
        (above / "fixtures-expired").symlink_to(BUILT / "fixtures-expired")
    return programs, inside


@pytest.mark.long
@pytest.mark.timeout(TRIES * (TIMEOUT_S + 60))
@pytest.mark.parametrize("name", cases())
def test_what_works_with_etcd(name: str, tmp_path: Path) -> None:
    if not network():
        pytest.skip("a network of its own takes root, or user namespaces: unshare --net")
    programs, inside = folders(tmp_path)
    program, test = name.split("/")
    command = [
        *network(),
        str(BUILT / f"{program}.test"),
        f"-test.run=^{test}$",
        "-test.v",
        f"-test.timeout={TIMEOUT_S}s",
        *(["-bin-dir", str(programs)] if program == "e2e" else []),
    ]
    variables = {
        **os.environ,
        "STORE": str(programs / "etcd"),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for _ in range(1 if reason_of(name, MUST_FAIL) else TRIES):
        ended = subprocess.run(
            command,
            env=variables,
            cwd=inside,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        passed = re.search(rf"^--- PASS: {test} ", ended.stdout, re.M) and not ended.returncode
        if passed:
            break
    if re.search(rf"^--- SKIP: {test} ", ended.stdout, re.M):
        said = re.findall(r"^ +\w+\.go:\d+: (.*)$", ended.stdout, re.M)
        pytest.skip("the test skips itself: " + (said[-1] if said else ""))
    assert passed, ended.stdout[-SHOWN_CHARS:]


@pytest.mark.long
def test_each_reason_names_a_test() -> None:
    if not names():
        pytest.skip(f"no {BUILT}")
    for pattern in LEFT_OUT | FAILS:
        assert any(re.fullmatch(pattern, name) for name in names()), pattern
