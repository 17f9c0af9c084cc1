"""The Python client's types, as a program that uses it sees them."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import etcdlite
from etcdlite import client
from etcdlite.client import Client

PROGRAM = Path(__file__).parent / "rigs" / "every_client_call.py"


def mypy(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Check as a user would: strictly, with no settings, errors inside of etcdlite left out."""
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    return subprocess.run(
        [*command, "--config-file=", f"--cache-dir={folder / 'cache'}", *map(str, arguments)],
        env={**os.environ, "MYPYPATH": str(Path(etcdlite.__file__).parents[1])},
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_a_program_that_uses_every_call_passes_a_strict_check(tmp_path: Path) -> None:
    checked = mypy(PROGRAM, folder=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from etcdlite.client import AsyncClient, Client\n"
        "client = Client(5)\n"
        "client.put(7)\n"
        "client.range(prefix='', sort_by='size')\n"
        "number: int = client.get('k')\n"
        "async def main(other: AsyncClient) -> int:\n"
        "    return await other.get('k')\n"
    )
    checked = mypy(wrong, folder=tmp_path)
    lines = [int(line.split(":")[1]) for line in checked.stdout.splitlines() if ": error:" in line]
    assert lines == [2, 3, 4, 5, 7], checked.stdout


@pytest.mark.parametrize(
    "name", [name for name in client.__all__ if inspect.isclass(getattr(client, name))]
)
def test_the_program_uses_every_call(name: str) -> None:
    cls = getattr(client, name)
    used = {
        n.attr for n in ast.walk(ast.parse(PROGRAM.read_text())) if isinstance(n, ast.Attribute)
    }
    methods = {n for n, value in vars(cls).items() if callable(value) and not n.startswith("_")}
    assert methods <= used, f"{name}: not in the program: {methods - used}"


def test_methods_have_the_signature_of_what_they_send() -> None:
    signature = inspect.signature(Client.put)
    assert list(signature.parameters)[:3] == ["self", "key", "value"]
    assert signature.return_annotation == "PutResult"
    assert str(inspect.signature(Client.watch).return_annotation) == "Watch"
    assert "Store `value` under `key`" in str(Client.put.__doc__)


def test_the_package_says_that_it_has_types() -> None:
    assert (Path(etcdlite.__file__).parent / "py.typed").is_file()
