"""The pages for operators, carried out on booted Debian machines, with nothing but their commands.

Three machines become a cluster by docs/getting-started.md; one of them is killed and replaced by
docs/operating.md. It takes minutes, root, mmdebstrap and systemd-nspawn: `make test-long`.
tests/test_docs.py runs the same pages in seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rigs.processes import ROOT
from test_docs import NAMESPACES
from test_packaging import RELEASES, deb, needs

__all__ = ["deb"]
"""A fixture."""

PAGES = ("README.md", "docs/getting-started.md", "docs/operating.md")
MAX_COMMANDS, MAX_S = 20, 600.0
"""Of a newcomer, from `apt install` to a secured cluster of three that answers."""

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def system(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the system that all machines of a release boot, once."""
    folder = tmp_path_factory.mktemp("systems")
    made: dict[str, str] = {}

    def make(release: str) -> Path:
        if os.getuid() != 0:
            pytest.skip("only root can boot a container")
        needs("mmdebstrap", "systemd-nspawn", "nsenter", "ip")
        if release not in made:
            command = ["-m", "rigs.booted", "--make", folder / release, release, deb]
            done = subprocess.run(
                [sys.executable, *command], env=environ(), capture_output=True, text=True
            )
            made[release] = done.stdout if done.returncode else ""
        if made[release]:
            pytest.skip(f"mmdebstrap cannot make {release}: {made[release]}")
        return folder / release

    return make


def environ() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def carry_out(system: Path, page: Path, report: Path) -> None:
    done = subprocess.run(
        [*NAMESPACES, sys.executable, "-m", "rigs.booted", system, page, report],
        env=environ(),
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    if "systemd-nspawn: " in done.stdout:
        pytest.skip(f"systemd-nspawn cannot boot here: {done.stdout.splitlines()[:1]}")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("page", [page for page in PAGES if (ROOT / page).exists()])
def test_booted_machines_do_what_the_page_says(
    page: str, release: str, system: Callable[[str], Path], tmp_path: Path
) -> None:
    report = tmp_path / "report"
    carry_out(system(release), ROOT / page, report)
    if page.endswith("getting-started.md"):
        commands, seconds = newcomers_clock(report.read_text())
        print(f"a newcomer on {release}: {commands} commands, {seconds:.0f} s")
        assert commands <= MAX_COMMANDS
        assert seconds <= MAX_S


@pytest.mark.parametrize("release", RELEASES)
def test_the_packages_own_test_passes(
    release: str, system: Callable[[str], Path], tmp_path: Path
) -> None:
    """What autopkgtest runs on a machine with the package installed."""
    script = (ROOT / "packaging" / "debian" / "tests" / "service").read_text()
    page = tmp_path / "page.md"
    page.write_text(f"```sh\napt install ./etcdlite.deb\n{script}```\n")
    carry_out(system(release), page, tmp_path / "report")


def newcomers_clock(report: str) -> tuple[int, float]:
    """(commands, seconds) of the section "Three machines", until the cluster answers."""
    commands, seconds = 0, 0.0
    steps = [line.split(maxsplit=4) for line in report.splitlines()]
    for took, count, _, hosts, text in steps:
        if "d" in hosts.rstrip(":"):
            continue
        seconds += float(took)
        commands += int(count)
        if text.startswith("$ etcdlite-ctl put"):
            return commands, seconds
    raise AssertionError(f"the cluster never answered:\n{report}")
