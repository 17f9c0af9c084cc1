"""The fixture `server`, a factory of etcdlite processes.

    running = server()                       # on a free port, in a folder of its own
    running.client().put("k", "v")
    running.kill(); running.start()          # the same folder and flags, on another port

A process that still runs at the end of the test is killed. Its log is printed then, so a failed
test shows it. `lone` (`rigs/lone_member.py`) is the other way to run a server's code: without
sockets.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from rigs.lone_member import ALWAYS_SLOW_S, LoneMember
from rigs.processes import ServerProcess

from etcdlite import member
from etcdlite.replica import reads
from etcdlite.request import Waiter, about, warn_slow

# A shell's background job ignores Ctrl-C, and so would the processes that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No example has to be quick: that would depend on the machine.
settings.register_profile("slow", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slow")

SLOW_FILES = (
    "test_mvcc.py",
    "test_encryption_live.py",
    "test_auth_live.py",
    "test_docs.py",
    "test_sim.py",
    "test_attacks.py",
    "test_crash.py",
    "test_ctl_users.py",
    "test_cluster_live.py",
    "test_tls.py",
    "test_kubernetes.py",
    "test_doctor.py",
    "test_mirror.py",
    "test_etcd_backup.py",
    "test_prometheus.py",
)
"""They take longest, so they begin first: a process gets whole files, and the last ones decide when
all are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def every_slow_request_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log names the first of the requests that were slow. In the rigs and the simulator all are
    slow, and every one is named, those that a member makes itself, too, but not logged."""

    def warn(what: str, took_s: float, expected_s: float, requests: Sequence[Waiter]) -> None:
        assert all("method" in about(waiter) for waiter in requests)
        if expected_s != ALWAYS_SLOW_S:
            warn_slow(what, took_s, expected_s, requests)

    for module in (member, reads):
        monkeypatch.setattr(module, "warn_slow", warn)


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[LoneMember]:
    """A `LoneMember` in a folder of its own."""
    lone = LoneMember(tmp_path / "lone")
    yield lone
    lone.close()


@pytest.fixture
def server(tmp_path: Path) -> Any:
    """Makes a started `ServerProcess`; positional arguments are flags.

    `data_dir` names its folder, `program` another way to run it, `start=False` leaves it stopped.
    """
    servers: list[ServerProcess] = []

    def make(
        *flags: str,
        data_dir: Path | None = None,
        program: Sequence[str] = (sys.executable, "-m", "etcdlite"),
        start: bool = True,
    ) -> ServerProcess:
        folder = tmp_path / f"server-{len(servers)}" if data_dir is None else data_dir
        one = ServerProcess(folder, flags, program)
        servers.append(one)
        return one.start() if start else one

    yield make
    for one in servers:
        one.close()
        print(f"--- log of the server in {one.data_dir}:", *one.lines, sep="\n")
