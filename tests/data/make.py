"""Makes the files beside it: what a version of etcdlite leaves on disk, for later versions to open.

    python tests/data/make.py NAME COMMIT

runs the program of a commit of this repository on a loopback port and writes `NAME.tar.xz`, with

    stopped/       the data directory of a member that stopped in order
    killed/        of one that was killed, whose last writes are in the log only
    sealed/        as `killed/`, encrypted with the keys in `keys`
    backup.db      a backup of the first
    expected.json  what the version itself answered: keys, leases, users, who wrote a key

Run it for each release, with the commit that is released, and commit the archive. It is not made
again after the release: it shows what that version really wrote. Versions from 0.2 on can be made;
those of 0.1 were made by this program as it was then.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATIENCE_S = 30.0
SIGNED = "signed"
"""A key that a user wrote, and then a client without one."""
HISTORY = ("history", SIGNED, "-w", "json")


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Member:
    """A process of that version over one data directory."""

    def __init__(self, program: Path, folder: Path, *flags: str) -> None:
        self._program = program
        with socket.socket() as free, socket.socket() as other:
            free.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.endpoint, peer = (f"127.0.0.1:{s.getsockname()[1]}" for s in (free, other))
        self._process = self.run(
            "etcdlite", f"--data-dir={folder}", f"--listen-client-urls=http://{self.endpoint}",
            f"--listen-peer-urls=http://{peer}", *flags,
        )  # fmt: skip
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.ask("maintenance/status", {})
                return
            except (OSError, urllib.error.URLError):
                assert time.monotonic() < deadline, "the member does not serve"
                time.sleep(0.05)

    def run(self, module: str, *arguments: str, stdout: int | None = None) -> Any:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("ETCD")}
        environ["PYTHONPATH"] = str(self._program)
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, env=environ, cwd=self._program, stdout=stdout)

    def ctl(self, *arguments: str) -> bytes:
        """The output of a command, which must succeed."""
        process = self.run(
            "etcdlite.ctl", f"--endpoints={self.endpoint}", *arguments, stdout=subprocess.PIPE
        )
        output: bytes = process.communicate(timeout=PATIENCE_S)[0]
        assert process.returncode == 0, arguments
        return output

    def ask(self, path: str, request: dict[str, Any], token: str = "") -> Any:
        data = json.dumps(request).encode()
        headers = {"Authorization": token} if token else {}
        url = f"http://{self.endpoint}/v3/{path}"
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            return json.load(answer)

    def stop(self, signum: int) -> None:
        self._process.send_signal(signum)
        self._process.wait(PATIENCE_S)


def write(member: Member) -> None:
    """A bit of everything that a version writes."""
    for number in range(20):
        member.ask("kv/put", {"key": b64(f"k{number % 8}"), "value": b64(f"value {number}")})
    member.ask("kv/deleterange", {"key": b64("k1"), "range_end": b64("k3")})
    member.ask("lease/grant", {"ID": "77", "TTL": "600000"})
    member.ask("kv/put", {"key": b64("leased"), "value": b64("x" * 300), "lease": "77"})
    put = {"request_put": {"key": b64("by-txn"), "value": b64("\0\xff")}}
    member.ask("kv/txn", {"success": [put, {"request_delete_range": {"key": b64("k7")}}]})
    member.ask("kv/compaction", {"revision": "12"})
    for name in ("root", "alice"):
        member.ask("auth/user/add", {"name": name, "password": f"secret of {name}"})
    member.ask("auth/role/add", {"name": "readers"})
    member.ask("auth/user/grant", {"user": "alice", "role": "readers"})
    member.ask("auth/user/grant", {"user": "root", "role": "root"})
    member.ask("auth/enable", {})
    login = {"name": "root", "password": "secret of root"}
    token = member.ask("auth/authenticate", login)["token"]
    member.ask("kv/put", {"key": b64(SIGNED), "value": b64("by root")}, token)
    member.ask("auth/disable", {}, token)
    member.ask("kv/put", {"key": b64(SIGNED), "value": b64("by nobody")})
    deadline = time.monotonic() + PATIENCE_S
    while not all(one["has_time"] for one in history(member.ctl(*HISTORY))):
        assert time.monotonic() < deadline, "the times of revisions are not known"


def history(output: bytes) -> list[dict[str, Any]]:
    """What every version says of the changes of a key; times differ between the directories."""
    changes = [json.loads(line) for line in output.splitlines()]
    return [
        {"revision": one["revision"], "user": one.get("user", ""), "has_time": "time" in one}
        for one in changes
    ]


def content(member: Any, has_users: bool) -> dict[str, Any]:
    """What clients see. What differs between starts of a member is left out."""
    everything = {"key": "AA==", "range_end": "AA=="}
    expected = member.ask("kv/range", everything)
    before = member.ask("kv/range", everything | {"revision": "15"})
    del expected["header"]["raft_term"], expected["header"]["member_id"]
    del expected["header"]["cluster_id"]
    leases = member.ask("lease/leases", {})["leases"]
    users = member.ask("auth/user/list", {})["users"] if has_users else []
    return {"now": expected, "revision 15": before["kvs"], "leases": leases, "users": users}


def make(name: str, commit: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        program, made = folder / "program", folder / "made"
        program.mkdir()
        made.mkdir()
        archive = subprocess.run(["git", "archive", commit, "etcdlite"], stdout=-1, check=True)
        subprocess.run(["tar", "-x", "-C", program], input=archive.stdout, check=True)
        small = ("--quota-backend-bytes=0",)
        member = Member(program, made / "stopped", *small)
        write(member)
        expected = content(member, True) | {"history": history(member.ctl(*HISTORY))}
        member.ctl("snapshot", "save", str(made / "backup.db"))
        member.stop(signal.SIGTERM)
        member = Member(program, made / "killed", *small)
        write(member)
        assert content(member, True) | {"history": history(member.ctl(*HISTORY))} == expected
        member.stop(signal.SIGKILL)
        member.ctl("key", "new", str(made / "keys"))
        member = Member(program, made / "sealed", *small, f"--encryption-key-file={made / 'keys'}")
        write(member)
        member.stop(signal.SIGKILL)
        (made / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True))
        shutil.rmtree(program)
        with tarfile.open(HERE / f"{name}.tar.xz", "w:xz") as tar:
            tar.add(made, "", filter=_plain)


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


if __name__ == "__main__":
    make(*sys.argv[1:])
