"""The oldest versions of the libraries that pyproject.toml allows, which are those of Debian 12.
They raise other errors than the newest: h11 before 0.16 let a ValueError out, for example.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from etcdlite.notation import load_toml

ROOT = Path(__file__).parent.parent

CLIENTS = ["h2==4.1.0", "hyperframe==6.0.0"]
"""What the tests use of the same age: newer ones need a newer hpack."""

TESTS = [
    *("test_http", "test_http2", "test_grpc", "test_carried", "test_front_doors"),
    *("test_secret", "test_noise", "test_tls_channel", "test_cert", "test_credentials"),
    *("test_auth", "test_auth_member", "test_discovery", "test_etcd_backup", "test_sorted_table"),
]


def oldest(requirement: str) -> str:
    """ "h11==0.14" of "h11>=0.14"."""
    return requirement.partition(";")[0].strip().replace(">=", "==")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_protocols_and_credentials_work_with_the_oldest_libraries(tmp_path: Path) -> None:
    project = load_toml((ROOT / "pyproject.toml").read_bytes())["project"]
    optional = project["optional-dependencies"]
    extras = [line for name in optional if name not in ("test", "bench") for line in optional[name]]
    folder = tmp_path / "libraries"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    missing = []
    for requirement in [*CLIENTS, *map(oldest, [*project["dependencies"], *extras])]:
        done = subprocess.run([*install, requirement], capture_output=True, text=True, check=False)
        if done.returncode:
            missing.append(requirement)  # It is too old for this Python, for example.
    if any("h11" in requirement for requirement in missing):
        pytest.skip(f"pip cannot install the oldest libraries: {missing}")
    path = os.pathsep.join((str(folder), str(ROOT)))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(f"tests/{name}.py" for name in TESTS)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"without {missing}:\n{run.stdout[-8000:]}"
