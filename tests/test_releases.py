"""What earlier versions left on disk (`data/`), opened by this one."""

from __future__ import annotations

import json
import sys
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from data.make import HISTORY, content, history
from rigs.ctl_runner import run_ctl
from rigs.processes import ROOT, ServerProcess

from etcdlite import __version__

ARCHIVES = sorted((ROOT / "tests" / "data").glob("*.tar.xz"))


class Answers:
    """A server, for the function that wrote down what the earlier version answered."""

    def __init__(self, server: ServerProcess) -> None:
        self.endpoint = server.endpoint

    def ask(self, path: str, request: dict[str, Any]) -> Any:
        url = f"http://{self.endpoint}/v3/{path}"
        data = json.dumps(request).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as answer:
            return json.load(answer)


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name)
def left(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what a version left."""
    folder = tmp_path_factory.mktemp("left")
    with tarfile.open(request.param) as tar:
        tar.extractall(folder)
    return folder


def check(left: Path, data_dir: Path, *flags: str) -> None:
    expected = json.loads((left / "expected.json").read_text())
    server = ServerProcess(data_dir, flags, (sys.executable, "-m", "etcdlite"))
    server.start()
    try:
        found = content(Answers(server), bool(expected["users"]))
        if "history" in expected:
            ended = run_ctl(*HISTORY, "--endpoints", server.endpoint)
            found["history"] = history(ended.stdout)
        assert found == expected
        # And it goes on from there.
        Answers(server).ask("kv/put", {"key": "bmV3"})
    finally:
        server.kill()


def test_every_released_version_is_here() -> None:
    names = [path.name.removesuffix(".tar.xz") for path in ARCHIVES]
    assert __version__ in names, f"python tests/data/make.py {__version__} v{__version__}"
    assert {"0.1.0", "0.1.0-first"} <= set(names)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_data_directory_is_opened(left: Path, how: str) -> None:
    check(left, left / how)


def test_an_encrypted_data_directory_is_opened(left: Path) -> None:
    if not (left / "sealed").exists():
        pytest.skip("this version does not encrypt")
    check(left, left / "sealed", f"--encryption-key-file={left / 'keys'}")


def test_a_backup_is_restored(left: Path) -> None:
    data_dir = left / "restored"
    ended = run_ctl("snapshot", "restore", str(left / "backup.db"), "--data-dir", str(data_dir))
    assert ended.status == 0, ended
    check(left, data_dir)
