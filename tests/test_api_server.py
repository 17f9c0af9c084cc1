"""Kubernetes' own tests of its storage, k8s.io/apiserver, with etcdlite as the store.

They are Go programs: `etcd3` creates, updates, lists in pages, watches, compacts and reuses leases,
as the API server does, and `cacher` is its watch cache (bookmarks, consistent reads, WatchList).
`tests/api_server` has what takes the place of their etcd, and a test that kills the leader. They
take minutes: `make test-long`. With STORE=/usr/bin/etcd in the environment, etcd is tested instead.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILT = Path(os.environ.get("API_SERVER_TESTS") or ROOT / "build" / "api-server-tests")
TIMEOUT_S = 1800

TRIES = 3
"""Some tests wait for 100 ms only, and fail on a busy machine with any store."""

CLUSTER_TEST = "TestLeaderKilled"
"""It needs several members."""


@pytest.mark.long
@pytest.mark.timeout(TRIES * TIMEOUT_S)
@pytest.mark.parametrize(("program", "members"), [("etcd3", 1), ("etcd3", 3), ("cacher", 1)])
def test_the_storage_of_kubernetes_works(program: str, members: int, tmp_path: Path) -> None:
    binary = BUILT / f"{program}.test"
    if not binary.exists():
        pytest.skip(f"no {binary}: tests/api_server/build.sh {BUILT} makes it (root, Debian's Go)")
    store = os.environ.get("STORE")
    if not store:
        script = tmp_path / "store"
        words = f"exec {shlex.quote(sys.executable)} -m etcdlite"
        script.write_text(f'#!/bin/sh\ncd {shlex.quote(str(ROOT))}\n{words} "$@"\n')
        script.chmod(0o755)
        store = str(script)
    chosen = [] if members > 1 else [f"-test.skip=^{CLUSTER_TEST}$"]
    for attempt in range(TRIES):
        ended = subprocess.run(
            [binary, "-test.v", f"-test.timeout={TIMEOUT_S}s", *chosen],
            env={**os.environ, "STORE": store, "MEMBERS": str(members), "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        passed, failed = (
            re.findall(rf"^--- {word}: (\w+)", ended.stdout, re.M) for word in ("PASS", "FAIL")
        )
        assert attempt or len(passed) >= 50, f"the tests did not run:\n{ended.stdout[-20_000:]}"
        if not failed:
            break
        chosen = [f"-test.run=^({'|'.join(failed)})$"]
    assert not failed and not ended.returncode, f"{failed}\n{ended.stdout[-20_000:]}"
