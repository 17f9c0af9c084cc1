"""Scripts made from what people reported about stores like this one; each prints RIGHT or FAULT.

They run by hand against any server, too: `tests/cases/` says how in the first lines of each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rigs.processes import ROOT, installed

CASES = sorted(
    case for case in (ROOT / "tests" / "cases").iterdir() if case.suffix in (".sh", ".py")
)
TIMEOUT_S = 120.0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_a_reported_case_is_right(case: Path, server: Any, tmp_path: Path) -> None:
    commands = installed(tmp_path / "bin")
    folder = tmp_path / "case"
    folder.mkdir()
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ETCDLITE": str(commands / "etcdlite"),
        "CTL": str(commands / "etcdlite-ctl"),
        "DIR": str(folder),
    }
    if case.suffix == ".sh":
        text = case.read_text()
        for tool in ("curl", "mount"):
            if f"{tool} -" in text and shutil.which(tool) is None:
                pytest.skip(f"{tool} is not installed")
        if "mount -t" in text and os.geteuid():
            pytest.skip("only root may mount a file system")
        command = ["bash", str(case)]
    else:
        command = [sys.executable, str(case)]
    one = server()
    environ["ENDPOINT"] = one.endpoint
    environ["PORT"] = one.endpoint.rpartition(":")[2]
    ran = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=folder
    )
    shown = ran.stdout + ran.stderr
    if "mount:" in shown and "RIGHT" not in shown:
        pytest.skip(f"this machine mounts no file system here: {shown}")
    assert ran.returncode == 0 and "RIGHT" in shown and "FAULT" not in shown, shown
