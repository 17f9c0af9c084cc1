"""Other people's client libraries do their normal work, on three independent HTTP/2 stacks.

Each library has a script in `clients/`, which prints what it sees as JSON lines; all are asked for
the same. A library that is not installed skips its tests, saying what to do. The same scripts run
against a real etcd with `-m long`, which shows that they ask for no more than etcd does.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import importlib.util
import json
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from rigs.ports import free_ports
from rigs.processes import PATIENCE_S, ServerFactory
from rigs.real_etcd import distributed, running_etcd

CLIENTS = Path(__file__).resolve().parent / "clients"
NPM, TONIC, GRPCIO = "etcd3_npm.mjs", "etcd_client_py.py", "etcd_sdk_python.py"
EVERY_LIBRARY = (NPM, TONIC, GRPCIO)


def command(script: str) -> list[str]:
    """What runs a script; skips the test if its library is not there."""
    if script == NPM:
        node = shutil.which("node")
        if node is None or not (CLIENTS / "node_modules" / "etcd3").is_dir():
            pytest.skip("npm's etcd3 is not installed: apt-get install npm, then make test")
        return [node, str(CLIENTS / script)]
    module, package = {
        TONIC: ("etcd_client", "etcd-client-py"),
        GRPCIO: ("pyetcd", "etcd-sdk-python"),
    }[script]
    if importlib.util.find_spec(module) is None:
        if script == TONIC and sys.version_info < (3, 11):
            pytest.skip("etcd-client-py has no build for Python 3.10")
        pytest.skip(f"{package} is not installed: pip install {package}")
    return [sys.executable, str(CLIENTS / script)]


class Script:
    """One running client script."""

    def __init__(self, script: str, endpoint: str, scenario: str) -> None:
        self.process = subprocess.Popen(
            [*command(script), endpoint, scenario],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def step(self) -> dict[str, Any]:
        """The next thing that it says."""
        try:
            line = self._lines.get(timeout=PATIENCE_S)
        except queue.Empty:
            pytest.fail("the client script says nothing more, and does not end")
        assert line is not None, f"the client script ended: {self.process.wait()}"
        return json.loads(line)

    def expect(self, step: str, **facts: Any) -> None:
        assert self.step() == {"step": step, **facts}

    def steps_until(self, step: str) -> list[dict[str, Any]]:
        """All that it says up to `step`."""
        said = [self.step()]
        while said[-1]["step"] != step:
            said.append(self.step())
        return said

    def tell(self) -> None:
        """Let it come to its end."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def expect_end(self) -> None:
        line = self._lines.get(timeout=PATIENCE_S)
        assert line is None, f"it says more: {line}"
        assert self.process.wait(PATIENCE_S) == 0, "the client script failed, see above"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


class Target(Protocol):
    """A server that comes back with its data, on the same port or on another."""

    endpoint: str

    def start(self, *, elsewhere: bool = False) -> None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...


class Etcdlite:
    def __init__(self, server: ServerFactory) -> None:
        self._process = server(start=False)
        self._url = f"http://127.0.0.1:{free_ports(1)[0]}"
        self.stop, self.kill = self._process.stop, self._process.kill
        self.start()

    def start(self, *, elsewhere: bool = False) -> None:
        self._process.start(*(() if elsewhere else (f"--listen-client-urls={self._url}",)))
        self.endpoint = self._process.endpoint


class Etcd:
    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._ports = free_ports(2)
        self._stack = stack
        self.start()

    def start(self, *, elsewhere: bool = False) -> None:
        ports = free_ports(2) if elsewhere else self._ports
        self.endpoint = self._stack.enter_context(running_etcd(self._folder, ports))

    def stop(self) -> None:
        self._stack.close()

    kill = stop


@pytest.fixture(params=["etcdlite", pytest.param("etcd", marks=pytest.mark.long)])
def target(request: pytest.FixtureRequest, server: ServerFactory, tmp_path: Path) -> Iterator[Any]:
    if request.param == "etcdlite":
        yield Etcdlite(server)
        return
    distributed("etcd")
    with contextlib.ExitStack() as stack:
        yield Etcd(tmp_path / "etcd", stack)


Run = Callable[[str, str], Script]


@pytest.fixture
def run(target: Target) -> Iterator[Run]:
    """Starts a library's script on a scenario."""
    scripts: list[Script] = []

    def start(library: str, scenario: str) -> Script:
        scripts.append(Script(library, target.endpoint, scenario))
        return scripts[-1]

    yield start
    for script in scripts:
        script.close()


def post(target: Target, call: str, **fields: str) -> None:
    """Change something from outside, through the JSON gateway, which etcd has too."""
    body = {name: base64.b64encode(value.encode()).decode() for name, value in fields.items()}
    connection = http.client.HTTPConnection(target.endpoint, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("POST", f"/v3/kv/{call}", json.dumps(body))
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()


@pytest.mark.parametrize("library", EVERY_LIBRARY)
def test_a_library_puts_gets_and_deletes(library: str, run: Run) -> None:
    script = run(library, "kv")
    script.expect("get", found="2", missing=None)
    script.expect("prefix", pairs=[["kv/a", "1"], ["kv/b", "2"], ["kv/c", "3"]])
    if library != TONIC:  # which has ranges by prefix only
        script.expect("range", pairs=[["kv/b", "2"], ["kv/c", "3"], ["other", "4"]])
    script.expect("delete", pairs=[["kv/a", "1"], ["kv/c", "3"]])
    script.expect("delete prefix", pairs=[])
    script.expect("large", same=True)
    script.expect_end()


@pytest.mark.parametrize("library", EVERY_LIBRARY)
def test_a_transaction_of_a_library_takes_either_branch(library: str, run: Run) -> None:
    script = run(library, "txn")
    script.expect("txn", succeeded=[True, False], pairs=[["txn/else", "1"], ["txn/key", "new"]])
    script.expect_end()


@pytest.mark.parametrize("library", EVERY_LIBRARY)
def test_a_watch_of_a_library_is_taken_up_after_the_server_was_killed(
    library: str, run: Run, target: Target
) -> None:
    script = run(library, "watch")
    while_away = [["put", "watch/c", "3"], ["delete", "watch/a", ""], ["put", "watch/b", "4"]]

    def change(events: list[list[str]]) -> None:
        for kind, key, value in events:
            if kind == "put":
                post(target, "put", key=key, value=value)
            else:
                post(target, "deleterange", key=key)

    assert script.step()["step"] == "watching"
    before = [["put", "watch/a", "1"], ["put", "watch/b", "2"]]
    change(before)
    for event in before:
        script.expect("event", event=event)

    # What changes while the library cannot reach the server: it serves on another port then.
    target.kill()
    assert script.step()["step"] == "lost"
    target.start(elsewhere=True)
    change(while_away)
    target.kill()
    target.start()

    if library == TONIC:
        # Its watches begin at the present only, so its users read what they have missed.
        watching = script.steps_until("watching")[-1]
        assert watching["pairs"] == [["watch/b", "4"], ["watch/c", "3"]]
        while_away = []
    after = [["put", "watch/b", "5"], ["delete", "watch/c", ""], ["put", "watch/end", "6"]]
    change(after)
    seen: list[list[str]] = []
    while after[-1] not in seen:
        said = script.step()
        if said["step"] == "event":
            seen.append(said["event"])
    assert seen == while_away + after
    script.tell()


@pytest.mark.parametrize("library", EVERY_LIBRARY)
def test_a_library_keeps_a_lease_alive_beyond_its_ttl_and_revokes_it(
    library: str, run: Run
) -> None:
    script = run(library, "lease")
    if library == TONIC:
        script.expect("kept", names=["kept"])
        script.expect("revoked", names=[])
    else:
        if library == GRPCIO:
            script.expect("granted", ttl_s=[2, 2], keys=["lease/kept"])
        script.expect("kept", kept="1", left=None)
        script.expect("revoked", kept=None)
    script.expect_end()


@pytest.mark.parametrize("library", EVERY_LIBRARY)
def test_two_contenders_for_a_lock_of_a_library_exclude_each_other(library: str, run: Run) -> None:
    script = run(library, "lock")
    script.expect("held", other_got_it=False)
    script.expect("counted", count="10", of="10")
    script.expect_end()


@pytest.mark.parametrize("library", [NPM, GRPCIO])
def test_a_library_elects_one_candidate_after_the_other(library: str, run: Run) -> None:
    script = run(library, "election")
    script.expect("elected", leader="one", other=False)
    script.expect("proclaimed", leader="one, again", other=False)
    script.expect("resigned", leader="two", other=True)
    if library == NPM:
        script.expect("observed", leaders=["one", "one, again", "two"])
    script.expect_end()


@pytest.mark.parametrize("library", EVERY_LIBRARY)
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_library_at_work_finds_a_restarted_server_and_all_that_was_acknowledged(
    library: str, end: str, run: Run, target: Target
) -> None:
    script = run(library, "restart")
    script.expect("busy")
    getattr(target, end)()
    target.start()
    script.tell()
    kept = {} if library == TONIC else {"leased": "1", "lease_s": 600}
    script.expect("back", lost=[], **kept)
    script.expect_end()
